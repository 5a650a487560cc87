"""What a rank of `run` consists of, piece by piece, without a gang."""

from __future__ import annotations

import json
import math
import socket
from types import SimpleNamespace

import numpy as np
import pytest

from spark_nn.errors import ParamError
from spark_nn.gang.ports import Port, local_addresses, numeric
from spark_nn.ranks import values
from spark_nn.ranks.roles import Cast
from spark_nn.ranks.saves import Saves
from spark_nn.store import RunDir

pytestmark = pytest.mark.timeout(60)


def gang(folder, attempt=0):
    folder.joinpath("scratch").mkdir(exist_ok=True, parents=True)
    run = RunDir(f"file://{folder}/run")
    run.mkdir(f"attempt-{attempt}")
    return SimpleNamespace(run=run, scratch=folder / "scratch", attempt=attempt, rank=0)


def test_roles():
    assert Cast(3).parts == [("chief", 0), ("worker", 0), ("worker", 1)]
    assert Cast(1, evaluator=True).parts == [("chief", 0), ("evaluator", 0)]
    cast = Cast(2, parameterServers=1)
    assert cast.parts == [("chief", 0), ("worker", 0), ("worker", 1), ("ps", 0)]
    assert [cast.serves(rank) for rank in range(4)] == [False, True, True, True]
    assert (cast.readers, Cast(3, evaluator=True).readers) == (1, 3)
    assert cast.spec(list("abcd")) == {"chief": ["a"], "worker": ["b", "c"], "ps": ["d"]}
    assert not any(Cast(2).serves(rank) for rank in range(2))


def test_values_travel_as_json_and_arrays(tmp_path):
    value = {
        "a": [1, 2.5, None, True, "x"],
        "dict": {"array": np.arange(6.0).reshape(2, 3)},
        "b": b"\0\1",
        "n": np.int64(3),
    }
    found = values.left(gang(tmp_path), {**value, "t": (1, np.float32(0.5))})
    json.dumps(found)
    back = values.fetched(RunDir(f"file://{tmp_path}/run"), found)
    np.testing.assert_array_equal(back["dict"].pop("array"), np.arange(6.0).reshape(2, 3))
    assert back == {"a": [1, 2.5, None, True, "x"], "dict": {}, "b": b"\0\1", "n": 3, "t": [1, 0.5]}
    assert math.isnan(values.fetched(None, values.left(gang(tmp_path), float("nan"))))


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": [set()]}, np.array([object()])])
def test_values_that_cannot_travel_are_named(tmp_path, value):
    with pytest.raises(TypeError, match="what can travel to the driver are None, booleans"):
        values.left(gang(tmp_path), value)


def test_saves_are_found_by_later_attempts_whole_or_not_at_all(tmp_path):
    first = Saves(gang(tmp_path))
    assert first.restore() is None
    for content in (b"one", b"two", b"three"):
        first.save(content)
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(b"content")
    first.save(folder, "files")
    second = Saves(gang(tmp_path, attempt=1))
    assert second.restore() == b"three"
    copy = second.restore("files")
    assert copy != folder
    assert (copy / "deep" / "file").read_bytes() == b"content"
    kept = sorted((tmp_path / "run" / "attempt-0" / "saved").glob("checkpoint-*"))
    assert len(kept) == 2
    kept[-1].write_bytes(b"damaged")
    assert second.restore() == b"two"
    second.save(b"four")
    assert Saves(gang(tmp_path, attempt=2)).restore() == b"four"
    with pytest.raises(ParamError, match="must consist of letters"):
        second.save(b"", "../elsewhere")
    assert [path.name for path in (tmp_path / "scratch").iterdir() if path.suffix != ".folder"] == []


def reaches(host, port, family=socket.AF_INET, rest=()):
    with socket.socket(family) as sock:
        sock.settimeout(0.5)
        try:
            sock.connect((host, port, *rest))
        except OSError:
            return False
    return True


def listening_everywhere(port):
    """A server as gRPC's: on every address, of both kinds."""
    server = socket.socket(socket.AF_INET6)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("::", port.number))
    server.listen()
    return server


def outside():
    found = [each for each in local_addresses() if not each[0].startswith("127.") and each[0] != "::1"]
    assert found, "this machine has no address but loopback: nothing can be shown"
    return found


def reached(address, port):
    host, _, *rest = address
    return reaches(host, port.number, socket.AF_INET6 if ":" in host else socket.AF_INET, rest)


def test_a_port_lets_nobody_in_from_outside_whatever_listens_there():
    port = Port("127.0.0.1")
    with listening_everywhere(port):
        assert reaches("127.0.0.1", port.number)
        assert [address for address in outside() if reached(address, port)] == []
        port.close()
        assert reached(outside()[0], port)  # so it is the guards that keep strangers out


def test_a_port_of_several_machines_is_reached_at_the_address_of_the_task_alone():
    own, *others = outside()
    port = Port(own[0])
    with listening_everywhere(port):
        assert port.address == f"{own[0]}:{port.number}"
        assert reached(own, port)
        assert [address for address in others if reached(address, port)] == []
    port.close()


def test_a_port_is_for_an_address_and_not_for_a_name():
    assert numeric("localhost") in ("127.0.0.1", "::1")
    assert numeric("192.0.2.7") == "192.0.2.7"
    with pytest.raises(ValueError, match="localhost"):
        Port("localhost")
