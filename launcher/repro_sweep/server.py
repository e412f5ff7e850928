"""The coordinator's HTTP side: FastAPI on a Unix socket that only the user can open, and on TCP for other machines.

Over TCP, each message must carry the sweep's token, which its user finds in ``coordinator.json``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import secrets
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.types import Message, Receive, Scope, Send

from repro_sweep import protocol
from repro_sweep.errors import LeaseLostError, LedgerError, SweepError
from repro_sweep.failpoints import failpoint
from repro_sweep.host import folder_for_sockets
from repro_sweep.progress import Progress

ANY_HOST = "*"
_LONGEST_FOLDER = 70


class Handlers(Protocol):
    """What the coordinator answers; one method a path of :mod:`repro_sweep.protocol`."""

    async def register(self, message: protocol.Register) -> protocol.Registered: ...
    async def claim(self, message: protocol.Claim) -> protocol.Claimed: ...
    async def report(self, message: protocol.Reports) -> protocol.Acknowledged: ...
    async def finish(self, message: protocol.Finish) -> protocol.Acknowledged: ...
    async def heartbeat(self, message: protocol.Heartbeat) -> protocol.Beat: ...
    async def run_reference(self, message: protocol.RunRequest) -> protocol.RunReference: ...
    async def piece(self, message: protocol.Piece) -> protocol.Acknowledged: ...
    async def source(self, message: protocol.SourceRequest) -> protocol.SourcePiece: ...
    async def status(self, message: protocol.StatusRequest) -> Progress: ...
    async def cancel(self, message: protocol.Cancel) -> protocol.Cancelled: ...


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the coordinator."""
        yield


class Server:
    """Serves a coordinator's handlers from :meth:`start` to :meth:`stop`.

    Args:
        handlers: answers the messages.
        host: the name or address at which other machines reach this one, ``*`` for any of its own; None: they need not.
    """

    def __init__(self, handlers: Handlers, host: str | None = None) -> None:
        self._host = host
        self.token = secrets.token_urlsafe(32) if host is not None else ""
        """What messages over TCP must carry."""
        self.tcp: tuple[str, ...] = ()
        """Where it listens for other machines, once it does: ``host:port``, any of which will do."""
        folder = folder_for_sockets(_LONGEST_FOLDER)
        self._folder = tempfile.TemporaryDirectory(prefix="repro-sweep-", dir=folder)
        self.path = str(Path(self._folder.name) / "coordinator.sock")
        config = uvicorn.Config(
            _app(handlers, self.token), log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=3600,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen; returns when connections are accepted.

        Raises:
            SweepError: it cannot listen at the host.
        """
        listeners = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)]
        listeners[0].bind(self.path)
        if self._host is not None:
            listener, self.tcp = _listen(self._host)
            listeners.append(listener)
        self._task = asyncio.create_task(self._server.serve(sockets=listeners))
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


def _listen(host: str) -> tuple[socket.socket, tuple[str, ...]]:
    """A socket that waits for other machines, and the names under which they find it.

    Raises:
        SweepError: there is no such address here.
    """
    anywhere = host == ANY_HOST
    try:
        where = "0.0.0.0" if anywhere else host  # noqa: S104  (only who has the token is heard)
        family, _, _, _, address = socket.getaddrinfo(where, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
    except OSError as error:
        raise SweepError(f"the coordinator cannot listen at '{host}': {error}") from error
    port = listener.getsockname()[1]
    names = dict.fromkeys([socket.gethostname(), *_own_address()] if anywhere else [host])
    return listener, tuple(f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names)


def _own_address() -> list[str]:
    """The address from which this machine would speak to others; nothing is sent to find out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address that is nobody's, by RFC 5737
            return [str(probe.getsockname()[0])]
        except OSError:
            return []


def _app(handlers: Handlers, token: str) -> _Answering:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    paths: dict[str, Callable[..., Awaitable[object]]] = {
        "/register": handlers.register,
        "/claim": handlers.claim,
        "/report": handlers.report,
        "/finish": handlers.finish,
        "/heartbeat": handlers.heartbeat,
        "/run": handlers.run_reference,
        "/piece": handlers.piece,
        "/source": handlers.source,
        "/status": handlers.status,
        "/cancel": handlers.cancel,
    }
    for path, handler in paths.items():
        app.add_api_route(path, handler, methods=["POST"])
    app.add_exception_handler(LeaseLostError, _gone)
    app.add_exception_handler(LedgerError, _unavailable)
    return _Answering(app, token)


def _gone(_request: Request, error: Exception) -> Response:
    return Response(str(error), status_code=http.HTTPStatus.GONE)


def _unavailable(_request: Request, error: Exception) -> Response:
    return Response(str(error), status_code=http.HTTPStatus.SERVICE_UNAVAILABLE)


class _Answering:
    """Refuses who comes over TCP without the token; passes by the failpoints before and after a message is handled."""

    def __init__(self, app: FastAPI, token: str) -> None:
        self._app = app
        self._wanted = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        over_tcp = scope.get("client") is not None
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if over_tcp and not hmac.compare_digest(given, self._wanted):
            await Response("not this sweep's token", status_code=http.HTTPStatus.UNAUTHORIZED)(
                scope, receive, send
            )
            return
        name = scope.get("path", "")[1:]
        failpoint(f"{name}.received")

        async def answer(message: Message) -> None:
            failpoint(f"{name}.answering")
            await send(message)

        await self._app(scope, receive, answer)
