"""A real Ray cluster on this machine for tests: a head and nodes that come and go, each with an address of its own."""

from __future__ import annotations

import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import environment, eventually

from slurm.testbed import processes
from slurm.testbed.processes import Process

_START_S = 120.0
_RAY = str(Path(sys.executable).with_name("ray"))


class RayCluster:
    """Started when made; a folder of its own, loopback only, with a token."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # its sockets' paths must be short
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_worker_prestart": "0",
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._last = 1

    def start_head(self, *options: str) -> None:
        """The head, which takes no actors unless the options give it something."""
        self._start(
            "head", "--head", f"--port={self.port}", "--node-ip-address=127.0.0.1", f"--temp-dir={self.folder}",
            "--include-dashboard=false", *(options or ("--num-cpus=0",)),
        )  # fmt: skip

    def add_node(
        self, name: str, *options: str, env: dict[str, str] | None = None, hidden: Path | None = None
    ) -> None:
        """A node with the custom resource ``name`` and two CPUs, unless the options say otherwise.

        ``hidden``: a folder that it does not see; it has an empty one in its place.
        """
        self._last += 1
        given = {option.partition("=")[0] for option in options}
        defaults = [("--num-cpus", "2"), ("--num-gpus", "0"), ("--resources", f'{{"{name}": 1}}')]
        self._start(
            name, f"--address={self.address}", f"--node-ip-address=127.0.0.{self._last}",
            *(f"{key}={value}" for key, value in defaults if key not in given), *options, env=env, hidden=hidden,
        )  # fmt: skip

    def pids(self, name: str, what: str = "") -> list[int]:
        """The processes of a node whose command lines contain something."""
        found = []
        for pid in _descendants(self._nodes[name].pid):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if what in line:
                found.append(pid)
        return found

    def stop_node(self, name: str) -> None:
        """Take a node away, as an autoscaler does."""
        process = self._nodes.pop(name)
        descendants = _descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _kill(descendants)

    def kill_node(self, name: str) -> None:
        """Lose a node: all of its processes at once."""
        process = self._nodes.pop(name)
        _kill([process.pid, *_descendants(process.pid)])
        process.wait()

    def stop(self) -> None:
        """Stop everything that was started here."""
        for name in list(self._nodes)[::-1]:
            self.kill_node(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(
        self, name: str, *options: str, env: dict[str, str] | None = None, hidden: Path | None = None
    ) -> None:
        command = [_RAY, "start", "--block", "--disable-usage-stats", *options]
        if hidden is not None:
            hide = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hide, str(hidden), *command]
        with (self.folder / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                command, env=environment({**self.env, **(env or {})}), stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._nodes[name] = process

        def started() -> bool:
            said = (self.folder / f"{name}.out").read_text(errors="replace")
            assert process.poll() is None, said
            return "Ray runtime started" in said

        eventually(started, f"node {name} starts", _START_S)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        more = children.get(todo.pop(), [])
        found += more
        todo += more
    return found


def _kill(pids: list[int]) -> None:
    processes.kill(found for pid in pids if (found := Process.find(pid)) is not None)
