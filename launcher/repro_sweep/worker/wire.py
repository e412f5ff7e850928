"""Framed JSON messages, with file descriptors, over the socket between an agent and its zygote."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any

_LENGTH = struct.Struct("!I")
_MAX_FDS = 2
LEAVE_SIGNAL = signal.SIGUSR2
"""Tells an agent that its time is nearly over: submitit lets SLURM send it before a time limit."""
STACKS_SIGNAL = signal.SIGRTMIN + 7
"""Makes a trial write its Python stacks to its log; a real-time signal, which leaves all others to the task."""


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message, and file descriptors with it."""
    data = json.dumps(message).encode()
    socket.send_fds(sock, [_LENGTH.pack(len(data))], list(fds))
    sock.sendall(data)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message and its file descriptors; None when the other side is gone."""
    head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, _MAX_FDS)
    head = head + _exactly(sock, _LENGTH.size - len(head)) if head else head
    if len(head) < _LENGTH.size:
        return None, fds
    body = _exactly(sock, _LENGTH.unpack(head)[0])
    for fd in fds:
        os.set_inheritable(fd, False)
    return json.loads(body), fds


def _exactly(sock: socket.socket, size: int) -> bytes:
    parts = []
    while size > 0:
        part = sock.recv(min(size, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
