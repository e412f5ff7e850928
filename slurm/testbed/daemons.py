"""The daemons of a testbed: how each is started in the foreground, told to be ready, stopped, killed and started again.

A daemon is known by the process recorded for it, so that another program than the one that started it can stop it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slurm.testbed import processes
from slurm.testbed.errors import TestbedError
from slurm.testbed.processes import Process, wait_until
from slurm.testbed.settings import LOOPBACK, Layout, Options, Ports, node_names

READY_S = 30.0
_STOP_S = 5.0
_LOG_LINES = 15
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
_ACCOUNTING_PROGRAMS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db")
_INSTALL = "apt-get install -y --no-install-recommends"


def search_path() -> str:
    """Where programs are looked for: a user's PATH often lacks the folders that hold daemons."""
    return f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"


def check_programs(options: Options) -> None:
    """See that everything is installed.

    Raises:
        TestbedError: Something is missing; the message has the command that installs it.
    """
    wanted = _SLURM_PROGRAMS + (_ACCOUNTING_PROGRAMS if options.accounting else ())
    missing = [name for name in wanted if shutil.which(name, path=search_path()) is None]
    if missing:
        packages = "slurm-wlm munge" + (" slurmdbd mariadb-server" if options.accounting else "")
        raise TestbedError(f"not installed: {', '.join(missing)}; install with: {_INSTALL} {packages}")


@dataclass(kw_only=True)
class Daemon:
    """One daemon. ``changed`` is called after each start and stop, to record the process."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    output: Path
    ready: Callable[[], bool]
    changed: Callable[[], None]
    process: Process | None = None
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        if self.process is not None and self.process.alive:
            return True
        self._reap()
        return False

    def start(self) -> None:
        """Start it and wait until it answers; nothing if it runs.

        Raises:
            TestbedError: It ended at once, or does not answer in time; with the end of what it said.
        """
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start it without waiting."""
        if self.alive:
            return
        program = shutil.which(self.command[0], path=_SYSTEM_PATH) or self.command[0]
        with self.output.open("ab") as output:
            self._child = subprocess.Popen(
                [program, *self.command[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=dict(self.environment), cwd=self.output.parent, start_new_session=True,
            )  # fmt: skip
        self.process = Process.find(self._child.pid)
        self.changed()

    def wait_ready(self) -> None:
        """Wait until it answers.

        Raises:
            TestbedError: It has ended, or does not answer in time; with the end of what it said.
        """
        try:
            wait_until(lambda: self.ready() or not self.alive, f"{self.name} answers", READY_S)
        except TestbedError as error:
            raise TestbedError(f"{error}\n{self.tail()}") from None
        if not self.alive:
            raise TestbedError(f"{self.name} ended at its start; {self.output} ends with:\n{self.tail()}")

    def stop(self) -> None:
        """End it in the ordinary way, by force after some seconds; nothing if it does not run."""
        self._finish(lambda process: processes.end([process], patience_s=_STOP_S))

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._finish(lambda process: processes.kill([process]))

    def restart(self) -> None:
        """Stop it and start it."""
        self.stop()
        self.start()

    def tail(self) -> str:
        """The last lines that it said."""
        lines = self.output.read_text(errors="replace").splitlines() if self.output.exists() else []
        return "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])

    def _finish(self, how: Callable[[Process], None]) -> None:
        if self.process is not None:
            how(self.process)
        self._reap()
        self.process = None
        self.changed()

    def _reap(self) -> None:
        if self._child is not None:
            self._child.wait(_STOP_S)
            self._child = None


@dataclass(kw_only=True)
class Node(Daemon):
    """One node: its slurmd, and what its jobs run."""

    layout: Layout

    def jobs(self) -> list[Process]:
        """The processes of the jobs on it."""
        return processes.of_jobs(self.layout.slurm_conf, self.layout.log, [self.name])

    def lose(self) -> None:
        """Take the node away as a power cut would: its slurmd and all that its jobs run are killed; nobody is told."""
        self.kill()
        processes.kill_all(self.jobs)


def munged(layout: Layout, changed: Callable[[], None]) -> Daemon:
    """What proves to Slurm's processes who a message is from."""
    folder = layout.munge_key.parent
    # forced: munged dislikes parent folders that only their owner may enter, and temporary ones are such
    command = (
        "munged", "--foreground", "--force", f"--key-file={layout.munge_key}", f"--socket={layout.munge_socket}",
        f"--pid-file={folder / 'pid'}", f"--log-file={layout.log('munged')}", f"--seed-file={folder / 'seed'}",
    )  # fmt: skip
    return _daemon("munged", command, layout, lambda: _answers_unix(layout.munge_socket), changed)


def mariadb(layout: Layout, changed: Callable[[], None]) -> Daemon:
    """The database of the accounting: on a socket only, small, and careless of power cuts."""
    command = (
        "mariadbd", "--no-defaults", "--user=root", f"--datadir={layout.mariadb_data}",
        f"--socket={layout.mariadb_socket}", f"--pid-file={layout.pid_file('mariadbd')}", "--skip-networking",
        "--performance-schema=OFF", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0",
        "--innodb-flush-method=nosync", "--innodb-buffer-pool-size=32M", "--innodb-lock-wait-timeout=900",
    )  # fmt: skip
    return _daemon("mariadbd", command, layout, lambda: _answers_unix(layout.mariadb_socket), changed)


def slurmdbd(layout: Layout, ports: Ports, changed: Callable[[], None]) -> Daemon:
    """The accounting daemon."""
    return _daemon("slurmdbd", ("slurmdbd", "-D"), layout, lambda: _answers(ports.accounting), changed)


def slurmctld(layout: Layout, ports: Ports, changed: Callable[[], None]) -> Daemon:
    """The controller."""
    return _daemon("slurmctld", ("slurmctld", "-D"), layout, lambda: _answers(ports.controller), changed)


def nodes(layout: Layout, options: Options, ports: Ports, changed: Callable[[], None]) -> tuple[Node, ...]:
    """One slurmd for each node."""
    return tuple(
        _node(layout, name, port, changed)
        for name, port in zip(node_names(options), ports.nodes, strict=True)
    )


def jobs(layout: Layout, names: Collection[str]) -> list[Process]:
    """The processes of the jobs on some nodes."""
    return processes.of_jobs(layout.slurm_conf, layout.log, names)


def _node(layout: Layout, name: str, port: int, changed: Callable[[], None]) -> Node:
    return Node(
        name=name, command=("slurmd", "-D", "-N", name), environment=_environment(layout), layout=layout,
        output=layout.output(name), ready=lambda: _answers(port), changed=changed,
    )  # fmt: skip


def _daemon(
    name: str,
    command: tuple[str, ...],
    layout: Layout,
    ready: Callable[[], bool],
    changed: Callable[[], None],
) -> Daemon:
    return Daemon(
        name=name, command=command, environment=_environment(layout), output=layout.output(name), ready=ready,
        changed=changed,
    )  # fmt: skip


def _environment(layout: Layout) -> dict[str, str]:
    return {
        "PATH": _SYSTEM_PATH,
        "LANG": "C.UTF-8",
        # a user's own files must not change what the daemons do
        "HOME": str(layout.root),
        "SLURM_CONF": str(layout.slurm_conf),
        "MYSQL_UNIX_PORT": str(layout.mariadb_socket),
    }


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1):
            return True
    except OSError:
        return False


def _answers_unix(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True
