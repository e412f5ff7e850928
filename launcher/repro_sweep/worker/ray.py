"""A worker as a Ray actor: it holds its slots' place and what Ray has given to it; its agent runs elsewhere.

All actors of a sweep on a node share a process (:mod:`repro_sweep.worker.node`), in which their agents run: that has
imported everything once. The first actor starts it. It isn't the actor's child, since it stays for the others, and is
told apart from that of another node on the same machine by the raylet, the parent of all actors of a node. A worker
ends with its actor, and an actor with its worker.

Only the standard library is imported here: that is what the start of an actor costs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from repro_sweep import host

LOCK = "lock"
_SOCKET = "node.sock"
_LONGEST_FOLDER = 60
_BACKLOG = 1024
_GOODBYE_S = 2.0


class RayWorker:
    """What :mod:`repro_sweep.ray_driver` makes an actor of, with several calls at a time.

    Args:
        worker: its id.
        sweep_id: the sweep's.
        directory: the sweep's, on the coordinator's machine.
        socket_path: where the coordinator listens on this machine; None: over TCP.
        address: the text of its ``coordinator.json``; None: on this machine.
        slots: trials at a time.
        gpus: of a trial.
    """

    def __init__(
        self,
        worker: str,
        sweep_id: str,
        directory: str,
        socket_path: str | None,
        address: str | None,
        *,
        slots: int,
        gpus: float,
    ) -> None:
        self._node = _connect(_folder(sweep_id), Path(directory, "workers", worker))
        self._over = threading.Event()
        self._result: dict[str, Any] = {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if gpus else ""
        self._say(
            worker=worker, directory=directory, socket=socket_path, address=address, visible=visible, slots=slots,
            gpus=gpus,
        )  # fmt: skip
        threading.Thread(target=self._hear, name="node", daemon=True).start()

    def where(self) -> str:
        """The name of the machine: that this is answered means that the actor has its place."""
        return host.name()

    def work(self) -> str | None:
        """Work until there is nothing more to do; returns what went wrong. May be called again and again.

        The actor's process ends soon after.
        """
        self._over.wait()
        trouble: str | None = self._result.get("trouble", "its node's process for this sweep has died")
        return trouble

    def stop(self) -> None:
        """Have the agent stop its trials and leave."""
        self._say(stop=True)

    def announce(self, address: str) -> None:
        """There is another coordinator."""
        self._say(address=address)

    def _say(self, **message: object) -> None:
        self._node.sendall(json.dumps(message).encode() + b"\n")

    def _hear(self) -> None:
        try:
            with self._node.makefile("rb") as lines:
                for line in lines:
                    self._result = json.loads(line)
        except OSError:
            pass
        self._over.set()
        threading.Timer(_GOODBYE_S, os._exit, (0,)).start()


def _folder(sweep_id: str) -> Path:
    """The private folder of the node's process."""
    base = Path(host.folder_for_sockets(_LONGEST_FOLDER))
    name = f"{sweep_id} {host.name()} {os.getppid()}"
    folder = base / f"repro-sweep-{os.getuid()}" / hashlib.sha256(name.encode()).hexdigest()[:16]
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    found = folder.parent.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise PermissionError(f"{folder.parent} must be a folder of this user that nobody else may enter")
    return folder


def _connect(folder: Path, logs: Path) -> socket.socket:
    """A connection to the node's process, which is started where there is none, with its log in the worker's folder."""
    path = folder / _SOCKET
    with (folder.parent / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process doesn't leave while somebody comes
        folder.mkdir(mode=0o700, exist_ok=True)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen(_BACKLOG)
                _start(folder, listener, logs if logs.is_dir() else folder)
            connection.connect(str(path))
    return connection


def _start(folder: Path, listener: socket.socket, logs: Path) -> None:
    fd = listener.fileno()
    module = ["-m", "repro_sweep.worker.node"]
    command = ["setsid", "--fork", sys.executable, "-P", *module, str(folder), str(fd)]
    with (logs / "worker.log").open("ab") as log:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[fd])
