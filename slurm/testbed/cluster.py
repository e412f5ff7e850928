"""A real Slurm cluster on this machine, in one directory, beside and apart from what the machine has installed.

All daemons run as root, on loopback addresses and sockets of their own. Nothing outside the directory is written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Self

from slurm.testbed import daemons, processes
from slurm.testbed.daemons import READY_S, Daemon, Node
from slurm.testbed.errors import TestbedError
from slurm.testbed.ports import reserved
from slurm.testbed.processes import Process, wait_until
from slurm.testbed.settings import ACCOUNTS, CLUSTER_NAME, Layout, Options, Ports, files, node_names

COMMAND_S = 60.0
_POLL_S = 0.1
_SETTINGS_OF_COMMANDS = (
    "SLURM",
    "SBATCH_",
    "SRUN_",
    "SALLOC_",
    "SQUEUE_",
    "SINFO_",
    "SACCT_",
    "SCANCEL_",
    "SCONTROL_",
)
# a Unix socket's path has at most 107 bytes, and slurmstepd's has about 45 after the directory
_LONGEST_PATH = 60
_PLAIN_PATH = re.compile(r"[\w./+-]+", re.ASCII)
_NULL_DEVICE = os.makedev(1, 3)
_RECORDING = threading.Lock()


class Cluster:
    """A testbed, also as a context manager that starts and stops it. Not for several threads at a time."""

    def __init__(self, directory: str | Path, options: Options | None = None) -> None:
        """Prepare a testbed in ``directory``, which must not exist, be empty, or hold a testbed that was stopped.

        Raises:
            TestbedError: The directory's path is too long for sockets, or has characters that Slurm's files can't hold.
        """
        self.layout = Layout(Path(directory).absolute())
        self.options = options or Options()
        self.start_s = 0.0
        """How long the last start took."""
        _check_path(self.layout.root)
        self._ports: Ports | None = None
        self._daemons: dict[str, Daemon] = {}

    @classmethod
    def attach(cls, directory: str | Path) -> Cluster:
        """The testbed that another process has started in ``directory``.

        Raises:
            TestbedError: There is none.
        """
        layout = Layout(Path(directory).absolute())
        try:
            state = json.loads(layout.state.read_text())
        except FileNotFoundError:
            raise TestbedError(f"no testbed in {layout.root}: start one there first") from None
        cluster = cls(layout.root, Options(**state["options"]))
        ports = state["ports"]
        cluster._build(Ports(**(ports | {"nodes": tuple(ports["nodes"])})))
        for name, process in state["processes"].items():
            cluster._daemons[name].process = Process(**process)
        return cluster

    def start(self) -> None:
        """Start everything and wait until all nodes are idle; what a failed start has begun is stopped again.

        Raises:
            TestbedError: Something is missing or does not start.
        """
        began = time.monotonic()
        if os.geteuid() != 0:
            raise TestbedError("a testbed must be started by root: slurmd and munged need it")
        daemons.check_programs(self.options)
        self._make_room()
        with reserved(2 + self.options.nodes) as ports:
            self._build(Ports(controller=ports[0], accounting=ports[1], nodes=tuple(ports[2:])))
            try:
                self._write_files()
                self._start_daemons()
            except BaseException:
                self.stop()
                raise
        self.start_s = time.monotonic() - began

    def stop(self) -> None:
        """End all jobs' processes and all daemons; nothing if there are none. The directory and its logs stay."""
        # in this order: slurmctld waits for slurmdbd when it ends, slurmdbd for MariaDB; all need munged
        for node in self.nodes:
            # a slurmd has nothing to save, and would wait for its jobs
            node.kill()
        processes.kill_all(self.jobs)
        for daemon in self._some("slurmctld", "slurmdbd", "mariadbd", "munged"):
            daemon.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def controller(self) -> Daemon:
        """The slurmctld."""
        return self._daemons["slurmctld"]

    @property
    def accounting(self) -> Daemon:
        """The slurmdbd.

        Raises:
            TestbedError: The testbed has no accounting.
        """
        if not self.options.accounting:
            raise TestbedError("this testbed runs without accounting")
        return self._daemons["slurmdbd"]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes."""
        return tuple(daemon for daemon in self._daemons.values() if isinstance(daemon, Node))

    def node(self, name: str) -> Node:
        """A node by name.

        Raises:
            TestbedError: There is no such node.
        """
        found = self._daemons.get(name)
        if not isinstance(found, Node):
            raise TestbedError(
                f"'{name}' is not a node of this testbed ({', '.join(node_names(self.options))})"
            )
        return found

    def status(self) -> dict[str, bool]:
        """Whether each daemon runs."""
        return {name: daemon.alive for name, daemon in self._daemons.items()}

    def jobs(self) -> list[Process]:
        """The processes of all jobs, with the slurmstepds that own them."""
        return daemons.jobs(self.layout, node_names(self.options))

    def exports(self) -> dict[str, str]:
        """The variables that turn Slurm's commands to this cluster."""
        return {"SLURM_CONF": str(self.layout.slurm_conf)}

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """A whole environment for a command: this process's without what would change Slurm's commands."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(_SETTINGS_OF_COMMANDS)}
        return clean | {"PATH": daemons.search_path()} | self.exports() | dict(extra or {})

    def run(self, *command: str | Path, cwd: Path | None = None, timeout_s: float = COMMAND_S) -> str:
        """Run one of Slurm's commands, or any other that uses them, to its end; returns what it prints.

        Raises:
            TestbedError: It fails or takes longer; with what it said.
        """
        words = [str(word) for word in command]
        try:
            done = subprocess.run(
                words, env=self.environment(), cwd=cwd or self.layout.root, timeout=timeout_s, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise TestbedError(f"not within {timeout_s:g} s: {' '.join(words)}") from None
        if done.returncode:
            raise TestbedError(
                f"{' '.join(words)} failed ({done.returncode}): {(done.stderr or done.stdout).strip()}"
            )
        return done.stdout

    def node_state(self, name: str) -> str:
        """A node's state as sinfo says it: 'idle', 'mixed', 'allocated', 'down*', ..."""
        return self.run("sinfo", "--noheader", "--nodes", name, "--partition=debug", "--format=%T").strip()

    def job_state(self, job: str) -> str:
        """A job's state as the controller says it: 'PENDING', 'RUNNING', 'COMPLETED', ...; '' where it knows none."""
        try:
            text = self.run("scontrol", "show", "job", "--oneliner", job)
        except TestbedError as error:
            if "Invalid job id" in str(error):
                return ""
            raise
        found = re.search(r"\bJobState=(\S+)", text)
        return found[1] if found else ""

    def submit(self, *options: str, script: str) -> str:
        """Submit a shell script by sbatch with some of its options; returns the job's id.

        Raises:
            TestbedError: sbatch refuses it.
        """
        return self.run("sbatch", "--parsable", *options, f"--wrap={script}").strip()

    def clear(self) -> None:
        """Start what was stopped, cancel all jobs, wait until all nodes are idle: a clean cluster for the next test.

        Raises:
            TestbedError: It does not become clean in time.
        """
        for daemon in self._daemons.values():
            daemon.start()
        jobs = self.run("squeue", "--noheader", "--format=%A").split()
        if jobs:
            self.run("scancel", "--quiet", *sorted(set(jobs)))
        self.until(
            lambda: not self.run("squeue", "--noheader") and self._all_idle(),
            "no jobs, and all nodes are idle",
        )

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = READY_S) -> None:
        """Wait until something holds in the cluster.

        Raises:
            TestbedError: It does not within ``timeout_s``.
        """
        wait_until(condition, what, timeout_s, _POLL_S)

    def _some(self, *names: str) -> list[Daemon]:
        return [self._daemons[name] for name in names if name in self._daemons]

    def _make_room(self) -> None:
        root = self.layout.root
        if self.layout.state.exists():
            old = Cluster.attach(root)
            if any(old.status().values()):
                raise TestbedError(f"a testbed runs in {root}: stop it first")
            shutil.rmtree(root)
        elif root.exists() and any(root.iterdir()):
            raise TestbedError(
                f"{root} holds something else: name a directory that is empty or does not exist"
            )
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _build(self, ports: Ports) -> None:
        self._ports = ports
        layout, options = self.layout, self.options
        made: list[Daemon] = [daemons.munged(layout, self._record)]
        if options.accounting:
            made += [daemons.mariadb(layout, self._record), daemons.slurmdbd(layout, ports, self._record)]
        made += [
            daemons.slurmctld(layout, ports, self._record),
            *daemons.nodes(layout, options, ports, self._record),
        ]
        self._daemons = {daemon.name: daemon for daemon in made}

    def _record(self) -> None:
        assert self._ports is not None
        running = {name: daemon.process for name, daemon in list(self._daemons.items())}
        state = {
            "options": asdict(self.options),
            "ports": asdict(self._ports),
            "processes": {name: asdict(process) for name, process in running.items() if process is not None},
        }
        with _RECORDING:
            temporary = self.layout.state.with_suffix(".new")
            temporary.write_text(json.dumps(state, indent=2))
            temporary.replace(self.layout.state)

    def _write_files(self) -> None:
        assert self._ports is not None
        layout, names = self.layout, node_names(self.options)
        for folder in layout.folders(names):
            folder.mkdir(parents=True, exist_ok=True)
        self._record()
        for name, text in files(self.options, layout, self._ports).items():
            path = layout.slurm_conf.with_name(name)
            path.touch(mode=0o600)
            path.write_text(text)
        layout.munge_key.touch(mode=0o600)
        layout.munge_key.write_bytes(os.urandom(128))
        for path in (layout.gpu(name, number) for name in names for number in range(self.options.gpus)):
            _make_device(path)

    def _start_daemons(self) -> None:
        with ThreadPoolExecutor() as pool:
            database = pool.submit(self._start_database)
            self._daemons["munged"].start()
            database.result()
        if self.options.accounting:
            self.accounting.start()
            self._make_accounts()
        self.controller.start()
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_ready()
        self.until(self._all_idle, "all nodes are idle")

    def _start_database(self) -> None:
        if not self.options.accounting:
            return
        self.run(
            "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={self.layout.mariadb_data}",
            "--skip-test-db", "--skip-name-resolve", "--auth-root-authentication-method=normal",
        )  # fmt: skip
        self._daemons["mariadbd"].start()

    def _make_accounts(self) -> None:
        user = "root"
        accounts = ",".join(ACCOUNTS)
        self._sacctmgr("add", "cluster", CLUSTER_NAME)
        self._sacctmgr(
            "add", "account", accounts, f"Cluster={CLUSTER_NAME}", "Description=test", "Organization=test"
        )
        self._sacctmgr("add", "user", user, f"Account={accounts}", f"Cluster={CLUSTER_NAME}")
        self._sacctmgr("modify", "user", user, "set", f"DefaultAccount={ACCOUNTS[0]}")

    def _sacctmgr(self, *words: str) -> None:
        self.run("sacctmgr", "--immediate", "--quiet", *words)

    def _all_idle(self) -> bool:
        for node in self.nodes:
            if not node.alive:
                raise TestbedError(f"{node.name} ended at its start; {node.output} ends with:\n{node.tail()}")
        states = self.run("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%T").split()
        return states == ["idle"] * self.options.nodes


def _check_path(root: Path) -> None:
    if len(str(root)) > _LONGEST_PATH:
        raise TestbedError(f"the path of a testbed must have at most {_LONGEST_PATH} characters: {root}")
    if not _PLAIN_PATH.fullmatch(str(root)):
        raise TestbedError(f"the path of a testbed may have letters, digits and ./_+- only: '{root}'")


def _make_device(path: Path) -> None:
    # Slurm binds a GPU only to a character device; the null device will do, since no job opens it
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, _NULL_DEVICE)
    except OSError as error:
        raise TestbedError(
            f"no device file can be made at {path} ({error}): start with --gpus 0, or elsewhere"
        ) from None
