"""A sweep's coordinator in another process: whether there is one, and what it answers."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from repro_sweep import protocol
from repro_sweep.errors import ProtocolError, SweepError
from repro_sweep.lease import Address, Holder, address_of, holder_of, is_held
from repro_sweep.ledger import Ledger
from repro_sweep.progress import Progress
from repro_sweep.worker.client import Client, CoordinatorLostError

_TIMEOUT_S = 5.0
_ANNOUNCE_S = 3.0
_LOOK_S = 0.1


def coordinator_of(ledger: Ledger) -> Holder | None:
    """Who is the sweep's coordinator now."""
    holder = holder_of(ledger)
    return holder if holder is not None and is_alive(ledger.path.parent, holder) else None


def is_alive(directory: Path, holder: Holder) -> bool:
    """Whether a holder of the lease still exists, as far as can be told from here; it may have been stopped."""
    if holder.host == socket.gethostname() and (holder.is_here or not holder.locked):
        return holder.is_here
    return is_held(directory, holder)


def check_here(holder: Holder) -> None:
    """Make sure that a coordinator can be reached: it listens on its own machine only.

    Raises:
        SweepError: it is on another one.
    """
    if holder.host != socket.gethostname():
        raise SweepError(f"the sweep's coordinator is {holder.describe()}: give this command on that machine")


def ask_progress(directory: Path, holder: Holder) -> Progress | None:
    """What a coordinator says of its sweep; None where it does not answer (within about ten seconds)."""
    from pydantic import TypeAdapter

    data = _ask(directory, holder, "/status", protocol.StatusRequest())
    return None if data is None else TypeAdapter(Progress).validate_json(data)


def ask_cancel(directory: Path, holder: Holder, trials: tuple[int, ...] | None) -> bool:
    """Let a coordinator cancel trials, or stop its sweep; returns whether it has answered."""
    deadline = time.monotonic() + _ANNOUNCE_S
    while _address(directory, holder) is None and time.monotonic() < deadline:
        time.sleep(_LOOK_S)  # it is just starting
    return _ask(directory, holder, "/cancel", protocol.Cancel(trials=trials)) is not None


def _ask(directory: Path, holder: Holder, path: str, message: protocol.Message) -> bytes | None:
    address = _address(directory, holder)
    if address is None:
        return None
    for target in (address.socket,) if holder.was_here else address.tcp:
        try:
            with contextlib.closing(Client(target, address.token, timeout_s=_TIMEOUT_S)) as client:
                return client.exchange(path, message)
        except (CoordinatorLostError, ProtocolError):
            continue
    return None


def _address(directory: Path, holder: Holder) -> Address | None:
    announced = address_of(directory)
    return announced if announced is not None and announced.epoch == holder.epoch else None
