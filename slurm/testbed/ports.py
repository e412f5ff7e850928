"""Free ports on the loopback address, kept from other testbeds until the daemons have taken them."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from slurm.testbed.errors import TestbedError
from slurm.testbed.settings import LOOPBACK

# below what Linux gives to outgoing connections, which could take a port between its choice and its use
_FIRST, _LAST = 20000, 32000
_TRIES = 1000


@contextmanager
def reserved(count: int) -> Iterator[list[int]]:
    """``count`` free ports; inside the context, no other call anywhere on the machine gets them.

    Raises:
        TestbedError: There are not as many.
    """
    with ExitStack() as held:
        found: list[int] = []
        for _ in range(_TRIES):
            if len(found) == count:
                break
            port = random.randint(_FIRST, _LAST)  # noqa: S311
            holder = socket.socket()
            held.callback(holder.close)
            try:
                holder.bind((LOOPBACK, port))
            except OSError:
                continue
            # set after the bind: who sets the same (as Slurm does) may now listen; a bind without it still fails
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.append(port)
        if len(found) < count:
            raise TestbedError(f"no {count} free ports between {_FIRST} and {_LAST} on {LOOPBACK}")
        yield found
