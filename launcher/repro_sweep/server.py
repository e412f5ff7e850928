"""The coordinator's HTTP side: on a Unix socket that only the user can open, and on TCP for other machines.

uvicorn speaks HTTP; what it serves is a bare ASGI application, as a thousand workers send some thousand messages a
second. Each message is a POST of JSON to the path of its kind (see ``protocol``). Over TCP, it must carry the sweep's
token, which its user finds in ``coordinator.json``.

======  ================================================================================================================
status  meaning
======  ================================================================================================================
200     the reply, as JSON
401     over TCP, without the token
404     there is no such path
405     not a POST
410     another coordinator has taken the sweep over
413     more bytes than any message has
422     not a message of that kind: one line says what is wrong with it
500     a bug; the traceback is in the log
503     the ledger cannot be written
======  ================================================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import uvicorn
from pydantic import TypeAdapter, ValidationError

from repro_sweep import protocol
from repro_sweep.errors import LeaseLostError, LedgerError, SweepError
from repro_sweep.failpoints import failpoint
from repro_sweep.host import folder_for_sockets
from repro_sweep.progress import Progress

ANY_HOST = "*"
_LONGEST_FOLDER = 70
_MOST_BYTES = 256 << 20
"""Of a message: a result may bring along what its trial has reported while there was no coordinator."""
_MOST_ERRORS = 5
_JSON = b"application/json"
_TEXT = b"text/plain; charset=utf-8"

_Event: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[_Event]]
_Send: TypeAlias = Callable[[_Event], Awaitable[None]]


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
            _App(handlers, self.token), http="httptools", ws="none", lifespan="off", log_level="warning",
            access_log=False, proxy_headers=False, server_header=False, date_header=False, timeout_keep_alive=3600,
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


@dataclass(frozen=True, slots=True)
class _Route:
    """How one kind of message is answered."""

    request: TypeAdapter[Any]
    reply: TypeAdapter[Any]
    handle: Callable[[Any], Awaitable[object]]
    received: str
    answering: str


def _routes(handlers: Handlers) -> dict[str, _Route]:
    kinds: list[tuple[str, type, type, Callable[[Any], Awaitable[object]]]] = [
        ("register", protocol.Register, protocol.Registered, handlers.register),
        ("claim", protocol.Claim, protocol.Claimed, handlers.claim),
        ("report", protocol.Reports, protocol.Acknowledged, handlers.report),
        ("finish", protocol.Finish, protocol.Acknowledged, handlers.finish),
        ("heartbeat", protocol.Heartbeat, protocol.Beat, handlers.heartbeat),
        ("run", protocol.RunRequest, protocol.RunReference, handlers.run_reference),
        ("piece", protocol.Piece, protocol.Acknowledged, handlers.piece),
        ("source", protocol.SourceRequest, protocol.SourcePiece, handlers.source),
        ("status", protocol.StatusRequest, Progress, handlers.status),
        ("cancel", protocol.Cancel, protocol.Cancelled, handlers.cancel),
    ]
    return {
        f"/{name}": _Route(
            TypeAdapter(request), TypeAdapter(reply), handle, f"{name}.received", f"{name}.answering"
        )
        for name, request, reply, handle in kinds
    }


class _RefusedError(Exception):
    """A message that is answered with an error."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class _App:
    """The ASGI application: finds the handler of a message, and passes by the failpoints before and after it."""

    def __init__(self, handlers: Handlers, token: str) -> None:
        self._routes = _routes(handlers)
        self._wanted = f"Bearer {token}".encode()

    async def __call__(self, scope: _Event, receive: _Receive, send: _Send) -> None:
        if not _came_by_the_socket(scope) and not self._has_token(scope):
            await _send(send, HTTPStatus.UNAUTHORIZED, _TEXT, b"not this sweep's token")
            return
        route = self._routes.get(scope["path"])
        if route is None:
            await _send(send, HTTPStatus.NOT_FOUND, _TEXT, b"there is no such path")
            return
        failpoint(route.received)
        try:
            body = await _answer(route, scope, receive)
        except (_RefusedError, LedgerError) as error:
            failpoint(route.answering)
            await _send(send, _status(error), _TEXT, str(error).encode())
        else:
            failpoint(route.answering)
            await _send(send, HTTPStatus.OK, _JSON, body)

    def _has_token(self, scope: _Event) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._wanted)


def _came_by_the_socket(scope: _Event) -> bool:
    """Whether a message came over the Unix socket. Who has hung up already has no address, but we still have ours."""
    server = scope.get("server")
    return server is not None and server[1] is None


async def _answer(route: _Route, scope: _Event, receive: _Receive) -> bytes:
    if scope["method"] != "POST":
        raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "every message is a POST")
    try:
        message = route.request.validate_json(await _read(receive))
    except ValidationError as error:
        raise _RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, _explain(error)) from error
    return route.reply.dump_json(await route.handle(message))


async def _read(receive: _Receive) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the message is not whole")
        parts.append(event["body"])
        size, more = size + len(parts[-1]), event["more_body"]
        if size > _MOST_BYTES:
            text = f"a message has {_MOST_BYTES} bytes at most"
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
    return b"".join(parts)


def _explain(error: ValidationError) -> str:
    """What is wrong with a message, in one line."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [f"{'.'.join(map(str, each['loc'])) or 'the message'}: {each['msg']}" for each in found]
    more = [f"and {len(lines) - _MOST_ERRORS} more"] if len(lines) > _MOST_ERRORS else []
    return " ".join("; ".join([*lines[:_MOST_ERRORS], *more]).split())


def _status(error: _RefusedError | LedgerError) -> HTTPStatus:
    if isinstance(error, _RefusedError):
        return error.status
    return HTTPStatus.GONE if isinstance(error, LeaseLostError) else HTTPStatus.SERVICE_UNAVAILABLE


async def _send(send: _Send, status: HTTPStatus, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append((b"allow", b"POST"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
