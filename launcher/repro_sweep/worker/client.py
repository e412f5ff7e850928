"""The worker's side of the protocol: HTTP over the coordinator's Unix socket, or over TCP with its token."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from typing import TypeAlias, TypeVar

from pydantic import ValidationError

from repro_sweep.errors import ProtocolError
from repro_sweep.protocol import Message

_Reply = TypeVar("_Reply", bound=Message)

RETRY_FOR_S = 10.0
_DEAD_AFTER_S = 1.0
_PAUSE_S = 0.2
_CONNECT_S = 10.0
_ANOTHER = frozenset({http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN, http.HTTPStatus.NOT_FOUND})
"""What somebody else answers who has got the address since."""
_ABSENT = (ConnectionRefusedError, FileNotFoundError)


class CoordinatorLostError(Exception):
    """Nobody answers at the coordinator's address, or one who has been replaced."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self.busy = threading.Lock()

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.close()
            raise


class _TcpConnection(http.client.HTTPConnection):
    def __init__(self, target: str, timeout_s: float) -> None:
        host, _, port = target.rpartition(":")
        super().__init__(host.strip("[]"), int(port), timeout=min(timeout_s, _CONNECT_S))
        self._reply_s = timeout_s
        self.busy = threading.Lock()

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self._reply_s)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


_Connection: TypeAlias = _UnixConnection | _TcpConnection


class Client:
    """Sends messages, again and again until one is answered; each thread has its own connection.

    Every message may be repeated, so a lost reply needs no other care.

    Args:
        target: the path of a Unix socket, or ``host:port``.
        token: what the coordinator asks for over TCP.
        timeout_s: how long a reply may take.
    """

    def __init__(self, target: str, token: str = "", *, timeout_s: float = 90.0) -> None:
        self._target = target
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s = timeout_s
        self._local = threading.local()
        self._open: set[_Connection] = set()
        self._closed = False

    def post(self, path: str, message: Message, reply: type[_Reply]) -> _Reply:
        """Send a message and return the reply.

        Raises:
            CoordinatorLostError: nobody answers.
            ProtocolError: the coordinator refuses the message.
        """
        data = self.exchange(path, message)
        try:
            return reply.model_validate_json(data)
        except ValidationError as error:
            raise ProtocolError(f"{path}: {error}") from error

    def exchange(self, path: str, message: Message) -> bytes:
        """The same for a reply that is JSON of another kind."""
        body = message.model_dump_json().encode()  # as text, HTTP takes nothing beyond Latin-1
        began = time.monotonic()
        trouble, tries = "", 0
        while not self._closed:
            absent = False
            try:
                status, data = self._once(path, body)
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                trouble, absent = str(error), isinstance(error, _ABSENT)
            else:
                if status == http.HTTPStatus.OK:
                    return data
                if status == http.HTTPStatus.GONE:
                    raise CoordinatorLostError(data.decode(errors="replace"))
                trouble = f"{path}: {status} {data[:500].decode(errors='replace')}"
                if status in _ANOTHER:
                    raise CoordinatorLostError(f"{self._target}: {trouble}")
                if status < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise ProtocolError(trouble)
            if time.monotonic() - began > (_DEAD_AFTER_S if absent else RETRY_FOR_S):
                break
            tries += 1
            if tries > 1:  # the first time at once: an idle connection may have been closed
                time.sleep(_PAUSE_S)
        raise CoordinatorLostError(f"{self._target}: {trouble or 'there is another coordinator'}")

    def close(self) -> None:
        """End all connections; threads that wait for a reply are told at once."""
        self._closed = True
        for connection in list(self._open):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            with connection.busy:
                connection.close()

    def _once(self, path: str, body: bytes) -> tuple[int, bytes]:
        connection: _Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            kind = _UnixConnection if self._target.startswith("/") else _TcpConnection
            connection = kind(self._target, self._timeout_s)
            connection.connect()
            self._local.connection = connection
            self._open.add(connection)
            if self._closed:  # meanwhile: nobody would end this connection
                raise ConnectionAbortedError("closed")
        with connection.busy:
            connection.request("POST", path, body, self._headers)
            response = connection.getresponse()
            return response.status, response.read()

    def _drop(self) -> None:
        connection: _Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._open.discard(connection)
            self._local.connection = None
