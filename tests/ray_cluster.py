"""A real Ray cluster on this machine for tests: a head and nodes that come and go, each with an address of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from helpers import TIMEOUT_S, Project, environment, eventually, free_port

from repro_sweep.states import FailureKind, TrialState
from slurm.testbed import processes
from slurm.testbed.processes import Process

_START_S = 120.0
_RAY = str(Path(sys.executable).with_name("ray"))
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
"""As in the environment that has been activated."""

FILES = {
    "conf/config.yaml": "{x: 0, wait_s: 0.0, steps: 1}",
    "conf/sweep/grid.yaml": """
        defaults: [base_sweep, sampler: grid, executor: ray, _self_]
        task: tasks.train
        metric: score
        reuse: false
        executor: {host: 127.0.0.1}
    """,
    "tasks.py": """
        import os
        import time

        import repro_sweep

        def train(cfg):
            print("runs on node", os.environ.get("NODE"))
            with open("ran", "a") as ran:
                print(cfg.x, os.environ.get("NODE"), os.environ.get("CUDA_VISIBLE_DEVICES"), time.time(), file=ran)
            kept = repro_sweep.checkpoint_dir() / "step"
            first = int(kept.read_text()) if kept.exists() else 0
            for step in range(first, cfg.steps):
                if os.path.exists("enough"):
                    break
                time.sleep(cfg.wait_s)
                new = kept.with_name(f"step-{os.getpid()}")
                new.write_text(str(step + 1))
                new.replace(kept)
                repro_sweep.report(step, score=cfg.x)
            return {"score": cfg.x, "first": first}
    """,
}


class RayCluster:
    """A folder of its own, loopback only, with a token; ``env`` is for all of its processes and for commands."""

    def __init__(self, **env: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # its sockets' paths must be short
        self.port, self._dashboard = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_worker_prestart": "0",
            "PATH": PATH,
            **env,
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._last = 1

    def start_head(self, *options: str, jobs: bool = False) -> None:
        """The head, which takes no actors unless the options give it something; another one if the last is gone.

        ``jobs``: it has a dashboard, where jobs can be submitted.
        """
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)  # nodes of the last one may still run
        self._start(
            "head", "--head", f"--port={self.port}", "--node-ip-address=127.0.0.1", f"--temp-dir={self.folder}",
            *(options or ("--num-cpus=0",)), f"--include-dashboard={str(jobs).lower()}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard}", "--dashboard-agent-listen-port=0",
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

    def ray(self, *arguments: str) -> str:
        """Run ``ray`` to its end, from elsewhere; returns what it said."""
        env = environment({**self.env, "RAY_ADDRESS": f"http://127.0.0.1:{self._dashboard}"})
        done = subprocess.run(
            [_RAY, *arguments], env=env, cwd=self.folder, timeout=TIMEOUT_S, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

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


class Place:
    """A project whose sweeps run on the cluster."""

    def __init__(self, project: Project, cluster: RayCluster) -> None:
        self.project, self.cluster, self.env = project, cluster, cluster.env

    def run(self, *arguments: str, env: Mapping[str, str] | None = None, status: int = 0) -> str:
        """Run the command to its end; returns what it said."""
        done = self.project.run(*arguments, env={**self.env, **(env or {})})
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    def ran(self) -> list[list[str]]:
        """Of each execution: the trial's x, the node, what CUDA_VISIBLE_DEVICES was, and when."""
        path = self.project.root / "ran"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def executed(self) -> Counter[str]:
        """How often each trial was executed, by its x."""
        return Counter(line[0] for line in self.ran())

    def nodes(self) -> set[str]:
        """Where trials were executed."""
        return {line[1] for line in self.ran()}

    def states(self, name: str = "grid") -> Counter[TrialState]:
        """How many trials are in each state."""
        return self.project.sweep(name).states()

    def kinds(self) -> Counter[FailureKind]:
        """How often attempts have failed as each kind."""
        return Counter(each.kind for each in self.project.sweep("grid").attempts if each.kind is not None)

    def workers(self) -> list[str]:
        """All workers that the sweep ever had."""
        return [path.name for path in (self.project.root / "multirun/grid/workers").glob("ray-*")]


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
