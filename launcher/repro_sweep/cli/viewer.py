"""MLflow's own server for a store on this machine, for as long as somebody looks at it."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from repro_sweep.errors import SweepError

_HOST = "127.0.0.1"
_STARTS_S = 120.0
_ENDS_S = 5.0
_LOOK_S = 0.1
_MESSAGE = 300


class Ended(BaseException):
    """This process was told to end, and must stop the server first."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. ``log`` is what it has said."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def wait(self) -> None:
        """Wait until it ends.

        Raises:
            SweepError: it has, though nobody has asked it to.
        """
        code = self.process.wait()
        raise SweepError(f"MLflow's server has ended (status {code}): {_last_words(self.log)}")


@contextlib.contextmanager
def running(uri: str, port: int | None) -> Iterator[Server]:
    """Run a server for a store within this context; it answers when the context begins, and is gone after it.

    Args:
        uri: of the store.
        port: where it listens; None for any free one.

    Raises:
        SweepError: the port is taken, or it does not start.
        Ended: this process got SIGTERM or SIGHUP.
    """
    port = _free_port(port)
    with tempfile.TemporaryDirectory(prefix="repro-sweep-ui-") as folder:
        log = Path(folder) / "server.log"
        previous = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
        process: subprocess.Popen[bytes] | None = None
        try:
            process = _start(uri, port, folder, log)
            server = Server(process, f"http://{_HOST}:{port}", log)
            _await_answer(server, port)
            yield server
        finally:
            for number in previous:
                signal.signal(number, signal.SIG_IGN)
            if process is not None:
                _stop(process)
            for number, handler in previous.items():
                signal.signal(number, handler)


def _start(uri: str, port: int, folder: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", _HOST]
    command += ["--port", str(port), "--workers", "1", "--artifacts-destination", f"{folder}/artifacts"]
    # MLflow's jobs are for what nobody does here, and take processes of their own
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with log.open("wb") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,  # Ctrl-C is for us, who then stop it and its workers
        )  # fmt: skip


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDS_S)


def _end(_number: int, _frame: FrameType | None) -> None:
    raise Ended


def _free_port(port: int | None) -> int:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_HOST, port or 0))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise SweepError(f"--port {port}: {why}; without it, any free port is taken") from error
        found: int = listener.getsockname()[1]
        return found


def _await_answer(server: Server, port: int) -> None:
    deadline = time.monotonic() + _STARTS_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise SweepError(f"MLflow's server does not start: {_last_words(server.log)}")
        connection = http.client.HTTPConnection(_HOST, port, timeout=2)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return
        time.sleep(_LOOK_S)
    raise SweepError(f"MLflow's server has not answered within {_STARTS_S:.0f} s: {_last_words(server.log)}")


def _last_words(log: Path) -> str:
    """The last line that says something, without the hint at the log, which is gone when we are."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line and "see the logs above" not in line]
    return said[-1][:_MESSAGE] if said else "it has said nothing"
