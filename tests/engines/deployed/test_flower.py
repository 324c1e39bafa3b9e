"""examples/flower under Flower's own processes: the simulation, and SuperLink with SuperNodes.

Slow: each message starts a process that imports torch. `make test-engines` runs them.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fedmap_sparse import FedMapServer
from fedmap_sparse.engines.in_process import InProcessEngine, Round

pytest.importorskip("flwr", reason="Flower is not installed: make test-engines installs it")
if not os.environ.get("FEDMAP_SPARSE_ENGINES"):
    pytest.skip("slow: make test-engines runs it", allow_module_level=True)

HERE = Path(__file__).parent
APP = HERE.parents[2] / "examples/flower"
BIN = Path(sys.executable).parent
CLIENTS = 2


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(APP))
    threads = torch.get_num_threads()
    from fedmap_app import task

    # As the app's processes have it: torch's products depend on it. The import sets it but once.
    torch.set_num_threads(1)
    yield task
    torch.set_num_threads(threads)


def alone(task: object, rounds: int, dtype: str) -> tuple[FedMapServer, list[Round]]:
    server = task.make_server(CLIENTS)
    clients = {n: task.make_client(dtype) for n in range(CLIENTS)}
    engine = InProcessEngine(server, clients, lambda n, c, m: task.train(n, CLIENTS, c, m))
    return server, [engine.round() for _ in range(rounds)]


def saved(task: object, checkpoint: Path) -> FedMapServer:
    server = task.make_server(CLIENTS)
    if checkpoint.exists():
        server.from_bytes(checkpoint.read_bytes().partition(b"\n")[2])
    return server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


class Deployment:
    """Flower's processes on loopback, each known by its id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        home = folder / "home"
        home.mkdir()
        config = f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "tested"\n[superlink.tested]\n{config}'
            '[superlink.local]\naddress = ":local:"\n'
        )
        self.env = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdout=log, stderr=log, text=True
            )

    def start_link(self) -> None:
        self.start(
            "link",
            *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)),
        )
        self.until(self._link_answers, 60)

    def _link_answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def start_node(self, part: int, port: int | None = None) -> None:
        self.start(
            f"node-{part}",
            *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port or self.port}"),
            *("--port", str(free_port()), "--node-config", f"partition-id={part}"),
        )

    def start_proxy(self, part: int) -> int:
        command = [sys.executable, str(HERE / "counting_proxy.py"), str(self.port)]
        proxy = subprocess.Popen(
            [*command, str(self.folder / f"wire-{part}.json")], stdout=subprocess.PIPE, text=True
        )
        self.processes[f"proxy-{part}"] = proxy
        assert proxy.stdout is not None
        with proxy.stdout:
            return int(proxy.stdout.readline())

    def flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            ["flwr", *arguments],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def until(self, holds: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                logs = [f"{p.name}:\n{p.read_text()[-3000:]}" for p in self.folder.glob("*.log")]
                raise AssertionError(f"not within {seconds} s\n" + "\n".join(logs))
            time.sleep(0.25)

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        process.terminate()
        process.wait(10)

    def kill(self, name: str) -> None:
        """The process and what it started, at once."""
        process = self.processes.pop(name)
        for child in (*children(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        # What Flower detached, told by this test's own folder in its environment.
        mark = f"FLWR_HOME={self.folder / 'home'}".encode()
        for found in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in found.read_bytes().split(b"\0"):
                    os.kill(int(found.parent.name), signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Ids of all processes below one, deepest first."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += [*children(int(child)), int(child)]
    return found


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    shutil.copytree(APP, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    found = Deployment(tmp_path)
    yield found
    found.end()


def config(**options: object) -> str:
    values = {"clients": CLIENTS, **options}
    return " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in values.items())


def check_equal(found: FedMapServer, wanted: FedMapServer) -> None:
    assert found.round == wanted.round
    assert torch.equal(found.params.values, wanted.params.values)
    assert found.mask == wanted.mask


def test_the_simulation(deployment: Deployment, task: object) -> None:
    checkpoint = deployment.folder / "server"
    said = deployment.flwr(
        *("run", "app", "local", "--stream"),  # two nodes, if nothing is said
        *("--run-config", config(rounds=3, checkpoint=str(checkpoint))),
    )
    wanted, _ = alone(task, 3, "float32")
    assert "accuracy" in said
    check_equal(saved(task, checkpoint), wanted)


def test_two_nodes_behind_a_link(deployment: Deployment, task: object) -> None:
    """Bits, and on the wire at most 25 kB beside the messages per round and node."""
    rounds = 2
    deployment.start_link()
    for part in range(CLIENTS):
        deployment.start_node(part, deployment.start_proxy(part))
    checkpoint = deployment.folder / "server"
    deployment.flwr(
        *("run", "app", "tested"),
        *("--run-config", config(rounds=rounds, evaluate=0.0, checkpoint=str(checkpoint))),
    )
    deployment.until(lambda: saved(task, checkpoint).round == rounds, 240)
    wanted, done = alone(task, rounds, "float32")
    check_equal(saved(task, checkpoint), wanted)
    sent = {
        "up": sum(r.uplink_bytes for r in done) // CLIENTS,
        "down": sum(r.downlink_bytes for r in done) // CLIENTS,
    }
    for part in range(CLIENTS):
        deployment.stop(f"proxy-{part}")
        wire = json.loads((deployment.folder / f"wire-{part}.json").read_text())
        for way, messages in sent.items():
            assert messages <= wire[way] <= messages + 25_000 * rounds, (way, wire, sent)


def test_a_node_and_the_link_are_killed_and_the_run_goes_on(
    deployment: Deployment, task: object
) -> None:
    """With int8 the error of each update is kept: bits show that none was lost."""
    rounds = 3
    checkpoint = deployment.folder / "server"
    options = config(
        rounds=rounds,
        dtype="int8",
        evaluate=0.0,
        checkpoint=str(checkpoint),
        state_folder=str(deployment.folder / "clients"),
    )

    def start() -> None:
        deployment.start_link()
        for part in range(CLIENTS):
            deployment.start_node(part)
        deployment.flwr("run", "app", "tested", "--run-config", options)

    start()
    deployment.until(lambda: saved(task, checkpoint).round == 1, 240)
    deployment.kill("node-1")
    deployment.kill("link")
    deployment.kill("node-0")
    assert saved(task, checkpoint).round < rounds
    start()
    deployment.until(lambda: saved(task, checkpoint).round == rounds, 300)
    wanted, _ = alone(task, rounds, "int8")
    check_equal(saved(task, checkpoint), wanted)
