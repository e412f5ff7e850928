"""The worker's side of the protocol: HTTP over the coordinator's Unix socket."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from typing import TypeVar

from pydantic import ValidationError

from repro_sweep.errors import ProtocolError
from repro_sweep.protocol import Message

_Reply = TypeVar("_Reply", bound=Message)

RETRY_FOR_S = 10.0
_PAUSE_S = 0.2


class CoordinatorLostError(Exception):
    """The coordinator has not answered for :data:`RETRY_FOR_S`."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """Sends messages, again and again until one is answered; each thread has its own connection.

    Every message may be repeated, so a lost reply needs no other care.
    """

    def __init__(self, path: str, *, timeout_s: float = 90.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._local = threading.local()

    def post(self, path: str, message: Message, reply: type[_Reply]) -> _Reply:
        """Send a message and return the reply.

        Raises:
            CoordinatorLostError: nobody answers.
            ProtocolError: the coordinator refuses the message.
        """
        body = message.model_dump_json()
        deadline: float | None = None
        while True:
            try:
                status, data = self._once(path, body)
                break
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                if deadline is None:  # at once: an idle connection may have been closed
                    deadline = time.monotonic() + RETRY_FOR_S
                elif time.monotonic() > deadline:
                    raise CoordinatorLostError(f"{self._path}: {error}") from error
                else:
                    time.sleep(_PAUSE_S)
        if status != http.HTTPStatus.OK:
            raise ProtocolError(f"{path}: {status} {data[:500].decode(errors='replace')}")
        try:
            return reply.model_validate_json(data)
        except ValidationError as error:
            raise ProtocolError(f"{path}: {error}") from error

    def _once(self, path: str, body: str) -> tuple[int, bytes]:
        connection: _UnixConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = _UnixConnection(self._path, self._timeout_s)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    def _drop(self) -> None:
        connection: _UnixConnection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None
