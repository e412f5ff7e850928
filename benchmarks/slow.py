"""A real ``mlflow server`` behind a proxy that takes its time for every call; both on the loopback interface."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks import harness

_START_S = 120.0
_DROPPED = {"connection", "transfer-encoding", "content-length", "host", "keep-alive"}


class Slow(ThreadingHTTPServer):
    """Passes every call on to ``port`` after ``delay_s``."""

    daemon_threads = True

    def __init__(self, port: int, delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.delay_s, self.calls = port, delay_s, 0

    @property
    def uri(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Slow

    def _pass_on(self) -> None:
        self.server.calls += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.delay_s)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, _kept(self.headers.items()))
            reply = connection.getresponse()
            data = reply.read()
        finally:
            connection.close()
        with contextlib.suppress(ConnectionError):  # the client has gone away meanwhile
            self.send_response(reply.status)
            for name, value in _kept(reply.getheaders()).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815  (the names that http.server calls)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


def _kept(headers: object) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in _DROPPED}


@contextlib.contextmanager
def server(folder: Path, *, delay_s: float) -> Iterator[Slow]:
    """Start both, stop both."""
    folder.mkdir(parents=True)
    port = harness.free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "DO_NOT_TRACK": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    proxy = Slow(port, delay_s)
    try:
        _wait_until_up(process, port, folder / "server.log")
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()
    finally:
        proxy.server_close()
        harness.stop(process)


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.suppress(OSError):
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        connection.close()
        time.sleep(0.2)
    raise harness.BenchmarkError(f"mlflow server did not start\n{log.read_text(errors='replace')[-3000:]}")
