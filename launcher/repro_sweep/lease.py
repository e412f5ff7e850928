"""The right to be a sweep's coordinator: one process at a time, with a fencing epoch that only grows.

The lease stands in the ledger, and every commit of a coordinator checks in the same transaction that its epoch is
still the ledger's: one that was stopped for long and comes back writes nothing. A file lock tells at once that a
holder is gone; where it cannot (a holder that is stopped, or on a machine that has died), the lease ends when it was
not renewed for :data:`LEASE_S`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from repro_sweep import host
from repro_sweep.errors import SweepError
from repro_sweep.failpoints import failpoint
from repro_sweep.ledger import Ledger
from repro_sweep.spool import write_file

ADDRESS_NAME = "coordinator.json"
LEASE_S = float(os.environ.get("REPRO_SWEEP_LEASE_S", "30"))  # shorter in tests
RENEW_S = LEASE_S / 6
_LOCK_NAME = "coordinator.lock"
_WAIT_S = 10.0
_TAKING_S = 2.0
_KEY = "lease"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease.

    ``started`` tells a process from a later one of the same id; ``locked``: it has the file lock too; stamps are
    seconds UTC.
    """

    host: str
    pid: int
    started: int
    since: float
    renewed: float
    epoch: int
    locked: bool

    @property
    def was_here(self) -> bool:
        """Whether it is, or was, a process of this machine; on others a file lock may not be seen."""
        return self.host == host.name()

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine that still exists."""
        return self.was_here and started_at(self.pid) == self.started

    def describe(self) -> str:
        """The process, its machine, and since when it holds the lease."""
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} since {since}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a coordinator listens; of two the one with the larger epoch is right.

    ``socket`` is for processes of its own machine. ``tcp`` are ways in for others, ``host:port``, any of which will do;
    who comes there must know ``token``. Empty where it does not listen for others.
    """

    epoch: int
    socket: str
    tcp: tuple[str, ...] = ()
    token: str = field(default="", repr=False)


class Lease:
    """Held from :meth:`acquire` to :meth:`release`, or until the process ends or another one takes it."""

    def __init__(self, directory: Path, holder: Holder, lock: int) -> None:
        self._directory = directory
        self._lock = lock
        self.holder = holder

    @classmethod
    def acquire(cls, ledger: Ledger, name: str, *, patient: bool = False) -> Lease:
        """Take the lease of a ledger's sweep; from then on the ledger is fenced.

        ``patient``: where it cannot be told whether its holder lives, see whether it renews the lease, for as long as
        a lease lasts.

        Raises:
            SweepError: another process holds it; the message says which, and since when.
        """
        directory = ledger.path.parent
        lock = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            holder = _take(ledger, name, locked=_lock_soon(lock, ledger), patient=patient)
        except BaseException:
            os.close(lock)
            raise
        failpoint("lease.taken")
        return cls(directory, holder, lock)

    def announce(self, socket_path: str, tcp: tuple[str, ...] = (), token: str = "") -> None:
        """Tell workers where this coordinator listens: in a file that only its user can read."""
        before = address_of(self._directory)
        address = Address(epoch=self.holder.epoch, socket=socket_path, tcp=tcp, token=token)
        record = {
            "host": self.holder.host,
            "pid": self.holder.pid,
            "since": self.holder.since,
            **asdict(address),
        }
        write_file(self._directory / ADDRESS_NAME, json.dumps(record))
        failpoint("lease.announced")
        # what a coordinator that was killed has left in the folder for temporary files
        if before is not None and self.holder.was_here:
            with contextlib.suppress(OSError):
                Path(before.socket).unlink()
                Path(before.socket).parent.rmdir()

    def renew(self, ledger: Ledger) -> None:
        """Note that the holder lives. Part of the ledger's open change."""
        failpoint("lease.before_renew")
        locked = self.holder.locked or _lock(self._lock)
        self.holder = replace(self.holder, renewed=time.time(), locked=locked)
        ledger.set_meta(_KEY, json.dumps(asdict(self.holder)))

    def release(self, ledger: Ledger) -> None:
        """Give the lease back. Part of the ledger's open change."""
        failpoint("lease.before_release")
        ledger.set_meta(_KEY, "")
        announced = address_of(self._directory)
        if announced is not None and announced.epoch == self.holder.epoch:
            (self._directory / ADDRESS_NAME).unlink(missing_ok=True)

    def drop(self) -> None:
        """Let go of the file lock, when the lease was given back or lost."""
        os.close(self._lock)


def holder_of(ledger: Ledger) -> Holder | None:
    """Who holds the lease, or held it when it died."""
    text = ledger.meta(_KEY)
    return Holder(**json.loads(text)) if text else None


def is_held(directory: Path, holder: Holder) -> bool:
    """Whether a holder still has its lease, as far as can be told without waiting."""
    if not (_is_fresh(holder) and holder.locked and holder.was_here):
        return _is_fresh(holder)
    with contextlib.suppress(OSError):
        lock = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
    return True


def address_of(directory: Path) -> Address | None:
    """Where the sweep's coordinator listens, or listened."""
    try:
        record = json.loads((directory / ADDRESS_NAME).read_text())
        return Address(
            epoch=record["epoch"],
            socket=record["socket"],
            tcp=tuple(record.get("tcp", ())),
            token=record.get("token", ""),
        )
    except (OSError, ValueError, KeyError):
        return None


def started_at(pid: int) -> int:
    """When a process started, in clock ticks since the machine did; 0 where there is none of that id, or a dead one."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    return 0 if state in "ZX" else int(rest[18])


def _lock(lock: int) -> bool:
    """Take the file lock; returns whether that was possible, so that nobody who holds a lease with it is alive."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks: then only time can tell
        return False
    return True


def _lock_soon(lock: int, ledger: Ledger) -> bool:
    """The same, but wait a moment for one who is just taking the lease, or just looks whether it is held."""
    deadline = time.monotonic() + _TAKING_S
    while not _lock(lock):
        holder = holder_of(ledger)
        alive = holder is not None and (not holder.was_here or holder.is_here)
        if alive or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _take(ledger: Ledger, name: str, *, locked: bool, patient: bool) -> Holder:
    found = holder_of(ledger)
    if found is not None and not (locked and found.locked and found.was_here):
        _await_expiry(ledger, found, name, patient=patient)
    failpoint("lease.before_take")
    if not ledger.begin(_WAIT_S):
        _break_in(ledger, found, name)
    try:
        now = holder_of(ledger)
        if now is not None and now != found:
            raise _refusal(now, name)
        epoch = int(ledger.meta("epoch") or 0) + 1
        pid, stamp = os.getpid(), time.time()
        holder = Holder(
            host=host.name(), pid=pid, started=started_at(pid), since=stamp, renewed=stamp, epoch=epoch,
            locked=locked,
        )  # fmt: skip
        ledger.set_meta("epoch", str(epoch))
        ledger.set_meta(_KEY, json.dumps(asdict(holder)))
        ledger.commit()
    except BaseException:
        ledger.rollback()
        raise
    ledger.fence(epoch)
    return holder


def _is_fresh(holder: Holder) -> bool:
    return time.time() - holder.renewed <= LEASE_S


def _await_expiry(ledger: Ledger, found: Holder, name: str, *, patient: bool) -> None:
    """Return when the lease that somebody else held has surely ended.

    Raises:
        SweepError: it has not.
    """
    died_here = found.was_here and not found.is_here and not found.locked
    fresh = _is_fresh(found) and not died_here
    if fresh and not patient:
        raise _refusal(found, name)
    if found.was_here and not fresh:
        return
    deadline = time.monotonic() + LEASE_S  # clocks differ between machines: see whether it is renewed
    while time.monotonic() < deadline:
        time.sleep(min(1.0, LEASE_S / 4))
        now = holder_of(ledger)
        if now is None:  # it was given back
            return
        if now.renewed != found.renewed:
            raise _refusal(now, name)


def _break_in(ledger: Ledger, found: Holder | None, name: str) -> None:
    """The holder was stopped in the middle of a commit, and nobody can write before it is gone."""
    if found is None or not found.is_here or _is_fresh(found):
        who = found.describe() if found is not None else "another process"
        raise SweepError(f"sweep '{name}': its ledger is locked by {who}; end that first")
    log.warning("%s holds the ledger's lock and does not go on: it is killed", found.describe())
    os.kill(found.pid, signal.SIGKILL)
    if not ledger.begin(_WAIT_S):
        raise SweepError(f"sweep '{name}': its ledger stays locked")


def _refusal(holder: Holder, name: str) -> SweepError:
    return SweepError(
        f"sweep '{name}' is already running: {holder.describe()};"
        f" watch it with 'repro-sweep attach {name}', stop it with 'repro-sweep cancel {name}'"
    )
