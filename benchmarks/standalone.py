"""The main job on a cluster of Spark's own: `python benchmarks/standalone.py`.

Starts a master and two workers of one core each, every one a process of its own on this machine, runs
`notebooks/flights.py` on `local[2]` and then on the cluster, and prints what both came to. Nothing is different but the
master's URL: the store that all share is in the cluster's configuration, where it would be on a real one.

Everything listens on the loopback address alone, and asks for a secret. The processes and their files are gone at the
end, also after an error or Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyspark

from spark_nn.doctor import requireJava

HOST = "127.0.0.1"
LOCAL = "local[2]"
JOB = Path(__file__).parent.parent / "notebooks" / "flights.py"
ROOM = 90.0  # seconds that a process may take to come up on a busy machine


class Cluster:
    """A standalone cluster of Spark's on this machine, for as long as a ``with`` block lasts.

    Parameters
    ----------
    folder : pathlib.Path
        Where it keeps its configuration, logs, what executors leave, and the store.
    workers : int, default 2
        Worker processes.
    cores : int, default 1
        Cores of each.
    memory : str, default ``"2g"``
        What each may give to executors.

    Attributes
    ----------
    master : str
        The master's URL.
    environment : dict of str to str
        That of a driver which is to use the cluster.

    Raises
    ------
    RuntimeError
        On entering: a process has ended, or did not come up in time; with the last lines of its log.
    """

    def __init__(self, folder: Path, workers: int = 2, cores: int = 1, memory: str = "2g") -> None:
        self.folder = folder
        self.workers = workers
        self.cores = cores
        self.memory = memory
        self.master = ""
        self.environment: dict[str, str] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        with self._stack as stack:
            stack.callback(self._stop)
            self._configure()
            address = ["--host", HOST, "--port", "0", "--webui-port", "0"]
            self._start("master", "org.apache.spark.deploy.master.Master", *address)
            self.master = self._said("master", r"Starting Spark master at (spark://\S+)")[0]
            for number in range(self.workers):
                size = ["--cores", str(self.cores), "--memory", self.memory]
                place = ["--work-dir", str(self.folder / f"work{number}")]
                name = f"worker{number}"
                self._start(name, "org.apache.spark.deploy.worker.Worker", *address, *size, *place, self.master)
            self._said("master", r"Registering worker", self.workers)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _configure(self) -> None:
        """Write what master, workers and drivers read by themselves."""
        conf = self.folder / "conf"
        conf.mkdir(mode=0o700, parents=True)
        settings: dict[str, Any] = {
            "spark.authenticate": True,
            "spark.authenticate.secret": secrets.token_hex(32),
            "spark.master.rest.enabled": False,
            "spark.driver.host": HOST,
            "spark.nn.storeUrl": self.folder / "store",
        }
        (conf / "spark-defaults.conf").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        self.environment = {
            **os.environ,
            "PYSPARK_PYTHON": sys.executable,
            "SPARK_HOME": str(Path(pyspark.__file__).parent),
            "SPARK_CONF_DIR": str(conf),
            "SPARK_LOCAL_IP": HOST,  # where web pages listen, too
            "SPARK_DAEMON_MEMORY": "512m",
        }

    def _start(self, name: str, *command: str) -> None:
        spark_class = Path(self.environment["SPARK_HOME"], "bin", "spark-class")
        # A group of its own: Ctrl-C is for this process to act on, and the driver is to end before the cluster.
        with self._log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [str(spark_class), *command],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _said(self, name: str, what: str, times: int = 1) -> list[str]:
        """What a process has written of a pattern, once it has so many times."""
        until = time.monotonic() + ROOM
        while True:
            text = self._log(name).read_text(errors="replace")
            found = re.findall(what, text)
            if len(found) >= times:
                return found
            ended = [each for each, process in self._processes.items() if process.poll() is not None]
            if ended or time.monotonic() > until:
                guilty = ended[0] if ended else name
                last = "\n".join(self._log(guilty).read_text(errors="replace").splitlines()[-10:])
                raise RuntimeError(f"the cluster's {guilty} {'has ended' if ended else 'did not come up'}:\n{last}")
            time.sleep(0.1)

    def _stop(self) -> None:
        """End the workers, which end their executors, and then the master."""
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def flights(master: str, out: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run the job on a master; return what it prints, and the seconds it took."""
    began = time.monotonic()
    command = [sys.executable, str(JOB), "--master", master, "--out", str(out)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"The job failed on {master}")
    rate = re.search(r"at ([\d,]+) rows/s", done.stdout)
    auc = re.search(r"test AUC +([\d.]+)", done.stdout)
    if rate is None or auc is None:
        sys.exit(f"The job on {master} printed no rate or AUC:\n{done.stdout}")
    return {
        "AUC": float(auc[1]),
        "rows/s": float(rate[1].replace(",", "")),
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Run the job on both masters and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="of the cluster; the job takes two tasks")
    parser.add_argument("--cores", type=int, default=1, help="of each worker")
    arguments = parser.parse_args()
    requireJava()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = {LOCAL: flights(LOCAL, folder / "local", dict(os.environ))}
        began = time.monotonic()
        with Cluster(folder / "cluster", arguments.workers, arguments.cores) as cluster:
            print(f"{cluster.master} is up after {time.monotonic() - began:.1f} s", file=sys.stderr)
            name = f"standalone, {arguments.workers} x {arguments.cores} cores"
            found[name] = flights(cluster.master, folder / "out", cluster.environment)
    print(f"\n{'':<26}{'test AUC':>12}{'rows/s':>12}{'seconds':>12}")
    for master, row in found.items():
        print(f"{master:<26}{row['AUC']:12.6f}{row['rows/s']:12,.0f}{row['seconds']:12.1f}")


if __name__ == "__main__":
    main()
