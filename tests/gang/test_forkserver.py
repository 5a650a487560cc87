"""What the processes that a server forks have of each other: nothing but the imports."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest

from spark_nn.errors import ParamError
from spark_nn.gang.forkserver import ForkServer
from spark_nn.gang.launch import Gang
from spark_nn.gang.worker import Home
from spark_nn.store import RunDir
from tests.failure.processes import named, no_rank_is_left, servers, wait_for

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone"),
]

KERAS = Home({"KERAS_BACKEND": "tensorflow"}, ("spark_nn.keras.training:prepare",), 30.0)


@pytest.fixture(scope="module", autouse=True)
def _no_servers_of_other_files():
    """Those of fits before, which wait for another of their kind, are not to be counted here."""
    for each in servers():
        each.kill()
    wait_for(lambda: not servers(), 20, "the end of the servers that other tests have left")


def run(spark, store, function, home=KERAS, world=2):
    with RunDir.open(f"file://{store}") as directory:
        return Gang(spark, world).run(function, directory, home=home).value


def look(context):
    """What a fresh process would have, as far as a fit could have changed it."""
    began = time.monotonic()
    import keras
    import tensorflow as tf
    from tensorflow.python.eager import context as tf_context

    imported = time.monotonic() - began
    with open("/proc/self/status") as file:
        rss = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    return {
        "imported": imported,
        "started": tf_context.context()._context_handle is not None,
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "rss": rss,
        "names": keras.layers.Dense(1).name,
        "policy": keras.config.dtype_policy().name,
        "custom": sorted(keras.saving.get_custom_objects()),
        "mark": os.environ.get("MARK"),
        "module": getattr(keras, "mark", None),
        "argv": sys.argv[1:],
        "temporary": tempfile.gettempdir(),
        "draws": [random.random(), float(np.random.random())],
        "parent": os.getppid(),
        "devices": [device.name for device in tf.config.list_physical_devices()],
    }


def spoil(context):
    """A fit that leaves all it can."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy("mixed_float16")
    keras.mark = os.environ["MARK"] = "spoiled"
    sys.argv.append("spoiled")
    keras.saving.register_keras_serializable("spoiled")(type("Spoiled", (keras.layers.Layer,), {}))
    spoil.held = np.ones(300 << 20, np.uint8)
    threading.Thread(target=time.sleep, args=(60,), daemon=True, name="spoiled").start()
    model = keras.Sequential([keras.layers.Dense(4)])
    model.compile("adam", "mse")
    model.fit(np.ones((8, 2)), np.ones((8, 4)), verbose=0)
    return float(tf.reduce_sum(tf.ones(3)))


def test_nothing_of_a_fit_reaches_the_next_one(spark, store):
    fresh = run(spark, store, look)
    (server,) = servers()
    assert run(spark, store, spoil) == 3.0
    again = run(spark, store, look)
    assert [each.pid for each in servers()] == [server.pid]
    assert fresh["parent"] == again["parent"] == server.pid
    # Imported already, and not a step further.
    assert again["imported"] < 0.2
    assert not again["started"]
    assert again["rss"] < fresh["rss"] + 50_000
    for name in ("threads", "names", "policy", "custom", "mark", "module", "argv", "devices"):
        assert again[name] == fresh[name], name
    # Each draws other numbers, and keeps its temporary files in a folder of its own.
    assert fresh["draws"][0] != again["draws"][0]
    assert fresh["draws"][1] != again["draws"][1]
    assert not os.path.exists(again["temporary"])
    no_rank_is_left()


def test_the_server_itself_never_grows(spark, store):
    run(spark, store, look)
    (server,) = servers()
    before = server.memory_info().rss
    for _ in range(3):
        run(spark, store, spoil)
    assert server.memory_info().rss < before + (20 << 20)
    assert server.num_fds() < 20
    assert server.children() == []


def environment(context):
    return {name: os.environ.get(name) for name in ("KERAS_BACKEND", "OMP_NUM_THREADS", "OTHER", "MALLOC_TOP_PAD_")}


def test_another_environment_is_another_server(spark, store):
    run(spark, store, environment)
    other = Home({**KERAS.variables, "OTHER": "1"}, KERAS.preload, 2.0)
    found = run(spark, store, environment, other)
    assert found == {
        "KERAS_BACKEND": "tensorflow",
        "OMP_NUM_THREADS": "1",
        "OTHER": "1",
        "MALLOC_TOP_PAD_": "67108864",
    }
    assert len(servers()) == 2
    # And one that nobody uses goes.
    wait_for(lambda: len(servers()) == 1, 10, "end of an idle server")


def test_without_idle_time_each_rank_is_a_process_from_nothing(spark, store):
    cold = Home(KERAS.variables, KERAS.preload, 0.0)
    before = {each.pid for each in servers()}
    assert run(spark, store, look, cold)["parent"] not in before
    assert {each.pid for each in servers()} <= before


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_the_idle_time_is_checked(spark, value):
    spark.conf.set("spark.nn.workerIdleSeconds", value)
    try:
        with pytest.raises(ParamError, match=f"spark.nn.workerIdleSeconds='{value}': must be a number of seconds"):
            Gang(spark, 1).home({}, ("os:getpid",))
    finally:
        spark.conf.unset("spark.nn.workerIdleSeconds")


GUARDIAN = "import sys; sys.stdin.read()"


@pytest.fixture
def server(tmp_path):
    """A server that an ordinary process is the guardian of."""
    guardian = subprocess.Popen([sys.executable, "-c", GUARDIAN], stdin=subprocess.PIPE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MARK": str(tmp_path)}
    made = ForkServer(environment, ("os:getpid",), 20.0, guardian.pid, str(tmp_path))
    yield made, guardian
    guardian.kill()
    guardian.wait()


def test_a_server_ends_with_its_guardian(server):
    made, guardian = server
    made.start()
    made.start()  # there is one already: nothing happens
    process = the_process_of(made)
    guardian.send_signal(signal.SIGKILL)
    wait_for(lambda: not process.is_running() or process.status() == "zombie", 5, "end of the server")


def the_process_of(server):
    def find():
        for process in named("spark_nn warm", session=False):
            if process.environ().get("MARK") == server.environment["MARK"]:
                return process
        return None

    return wait_for(find, 10, "server")


def test_a_caller_that_hangs_up_has_its_process_killed_though_that_is_stopped(server):
    made, _ = server
    made.start()
    process = the_process_of(made)
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as listener:
        sock = made.call([listener.fileno(), log.fileno()])
        child = wait_for(lambda: process.children(), 10, "child")[0]
        child.send_signal(signal.SIGSTOP)
        sock.close()
        wait_for(lambda: not process.children(), 5, "end of the child")


@pytest.mark.parametrize("token", [bytes(32), b"x", b""])
def test_a_caller_without_the_token_gets_no_process(server, token):
    made, _ = server
    made.start()
    process = the_process_of(made)
    with socket.socket(socket.AF_UNIX) as sock, tempfile.TemporaryFile() as file:
        sock.settimeout(10)
        sock.connect(made.address)
        if token:
            socket.send_fds(sock, [token], [file.fileno(), file.fileno()])
        assert sock.recv(1) == b""
    assert process.children() == []
    assert os.stat(f"{made.home}/spark_nn-token").st_mode & 0o777 == 0o600
    # And the next one, who has it, gets one.
    with tempfile.TemporaryFile() as log, made.call([log.fileno(), log.fileno()]):
        wait_for(lambda: process.children(), 5, "child")


def test_a_module_that_cannot_be_imported_beforehand_is_no_end(server):
    made, _ = server
    broken = ForkServer(made.environment, ("no_such_module:prepare", "os:getpid"), 20.0, made.guardian, made.home)
    assert broken.address != made.address
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as listener:
        with broken.call([listener.fileno(), log.fileno()]) as sock:
            sock.settimeout(20)
            sock.sendall(bytes(16))  # an empty order, and an empty function
            assert json.loads(sock.recv(1000)) == {"status": 1}
        log.seek(0)
        assert b"JSONDecodeError" in log.read()
