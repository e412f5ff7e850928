"""A sweep's coordinator in another process: whether there is one, and what it answers."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from repro_sweep import protocol
from repro_sweep.errors import ProtocolError, SweepError
from repro_sweep.lease import LEASE_S, Address, Holder, address_of, holder_of, is_held
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
    if holder.was_here and (holder.is_here or not holder.locked):
        return holder.is_here
    return is_held(directory, holder)


def is_still(ledger: Ledger, holder: Holder) -> bool:
    """Whether one who was the sweep's coordinator is so now: one on another machine lives as long as it says so."""
    now = coordinator_of(ledger)
    return now is not None and now.epoch == holder.epoch


def no_answer(directory: Path, holder: Holder) -> SweepError:
    """What to tell the user when a coordinator that lives cannot be reached, with all that was tried."""
    text = f"the sweep's coordinator, {holder.describe()}, does not answer"
    address = _address(directory, holder)
    if holder.was_here or address is None:
        return SweepError(f"{text}; if it is stuck, end that process and try again")
    if not address.tcp:
        return SweepError(f"{text}: it listens on its own machine only, so give this command there")
    return SweepError(f"{text} at {' or '.join(address.tcp)}: can this machine reach {holder.host} over TCP?")


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


def answers(directory: Path, holder: Holder) -> bool:
    """Whether a coordinator can be reached from here; one that has just started may need a moment."""
    deadline = time.monotonic() + _ANNOUNCE_S
    while _ask(directory, holder, "/status", protocol.StatusRequest()) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def await_end(ledger: Ledger) -> Holder | None:
    """Wait, as long as a lease lasts, for the end of a coordinator that was told to go; returns one that has not."""
    deadline = time.monotonic() + 2 * LEASE_S
    while (holder := coordinator_of(ledger)) is not None and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return holder


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
