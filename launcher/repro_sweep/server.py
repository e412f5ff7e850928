"""The coordinator's HTTP side: FastAPI on a Unix socket that only the user can open."""

from __future__ import annotations

import asyncio
import contextlib
import http
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.types import Message, Receive, Scope, Send

from repro_sweep import protocol
from repro_sweep.errors import LeaseLostError, LedgerError
from repro_sweep.failpoints import failpoint
from repro_sweep.progress import Progress

_LONGEST_FOLDER = 70  # a socket's path has 108 bytes at most


class Handlers(Protocol):
    """What the coordinator answers; one method a path of :mod:`repro_sweep.protocol`."""

    async def register(self, message: protocol.Register) -> protocol.Registered: ...
    async def claim(self, message: protocol.Claim) -> protocol.Claimed: ...
    async def report(self, message: protocol.Reports) -> protocol.Acknowledged: ...
    async def finish(self, message: protocol.Finish) -> protocol.Acknowledged: ...
    async def heartbeat(self, message: protocol.Heartbeat) -> protocol.Beat: ...
    async def run_reference(self, message: protocol.RunRequest) -> protocol.RunReference: ...
    async def status(self, message: protocol.StatusRequest) -> Progress: ...
    async def cancel(self, message: protocol.Cancel) -> protocol.Cancelled: ...


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the coordinator."""
        yield


class Server:
    """Serves a coordinator's handlers from :meth:`start` to :meth:`stop`."""

    def __init__(self, handlers: Handlers) -> None:
        short = "/tmp" if len(tempfile.gettempdir()) > _LONGEST_FOLDER else None  # noqa: S108  (a private folder in it)
        self._folder = tempfile.TemporaryDirectory(prefix="repro-sweep-", dir=short)
        self.path = str(Path(self._folder.name) / "coordinator.sock")
        config = uvicorn.Config(
            _app(handlers), log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=3600,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen; returns when connections are accepted."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self.path)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not self._task.done():  # noqa: ASYNC110  (uvicorn has no event for it)
            await asyncio.sleep(0.01)
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        """Stop listening and remove the socket."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._folder.cleanup()


def _app(handlers: Handlers) -> _Answering:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    paths: dict[str, Callable[..., Awaitable[object]]] = {
        "/register": handlers.register,
        "/claim": handlers.claim,
        "/report": handlers.report,
        "/finish": handlers.finish,
        "/heartbeat": handlers.heartbeat,
        "/run": handlers.run_reference,
        "/status": handlers.status,
        "/cancel": handlers.cancel,
    }
    for path, handler in paths.items():
        app.add_api_route(path, handler, methods=["POST"])
    app.add_exception_handler(LeaseLostError, _gone)
    app.add_exception_handler(LedgerError, _unavailable)
    return _Answering(app)


def _gone(_request: Request, error: Exception) -> Response:
    return Response(str(error), status_code=http.HTTPStatus.GONE)


def _unavailable(_request: Request, error: Exception) -> Response:
    return Response(str(error), status_code=http.HTTPStatus.SERVICE_UNAVAILABLE)


class _Answering:
    """Passes by the failpoints before a message is handled and before it is answered."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope.get("path", "")[1:]
        failpoint(f"{name}.received")

        async def answer(message: Message) -> None:
            failpoint(f"{name}.answering")
            await send(message)

        await self._app(scope, receive, answer)
