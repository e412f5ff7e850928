"""A worker's link to its coordinator, whoever that is: it outlives one, and finds the next.

Slots and helpers post their messages and wait; the worker's main thread looks for the coordinator. What a message says
is repeated to the next coordinator, and a result that cannot be delivered is kept on disk at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from repro_sweep import protocol, spool
from repro_sweep.errors import ProtocolError
from repro_sweep.lease import Address, address_of
from repro_sweep.protocol import Message
from repro_sweep.worker.client import Client, CoordinatorLostError

_Reply = TypeVar("_Reply", bound=Message)
_JOIN_TIMEOUT_S = 20.0
_LOOK_S = 1.0
_LOST_LOOK_S = 0.1

log = logging.getLogger(__name__)


class Link:
    """Posts to the coordinator of a sweep.

    Args:
        directory: the sweep's, where coordinators announce themselves.
        socket: where the first one listens; None: on another machine, over TCP, as all that come later.
        introduce: makes the message by which the worker registers, now.
    """

    def __init__(
        self, directory: Path, socket: str | None, introduce: Callable[[], protocol.Register]
    ) -> None:
        self._directory = directory
        self._introduce = introduce
        announced = address_of(directory)
        epoch = announced.epoch if announced is not None and announced.socket == socket else 0
        self._address = Address(epoch=epoch, socket=socket or "")
        self._over_tcp = socket is None
        self.trouble = "no coordinator has announced itself"
        """Why there is none."""
        self.is_announced = socket is not None
        """Whether there is or was one that has not left of its own accord, as far as this worker knows."""
        self._client: Client | None = None
        self._changed = threading.Condition()
        self._generation = 0
        self._lost_at: float | None = time.monotonic()
        self._over = False
        self._look_at = 0.0
        self._kept: set[str] = set()

    @property
    def lost_for_s(self) -> float:
        """For how long there has been no coordinator, 0 while there is one."""
        lost_at = self._lost_at
        return 0.0 if lost_at is None else time.monotonic() - lost_at

    def post(self, path: str, message: Message, reply: type[_Reply]) -> _Reply:
        """Send a message until a coordinator answers it.

        Raises:
            CoordinatorLostError: the worker has given up.
            ProtocolError: the coordinator refuses the message.
        """
        finish = _result_in(message)
        while True:
            with self._changed:
                client, generation = self._client, self._generation
            try:
                if client is None:
                    raise CoordinatorLostError("there is no coordinator")
                answer = client.post(path, message, reply)
            except CoordinatorLostError as error:
                if finish is not None:
                    self._keep(finish)
                self._await_next(generation, error)
            except ProtocolError:
                if finish is not None:
                    self._keep(finish)
                raise
            else:
                if finish is not None and finish.attempt in self._kept:
                    self._kept.discard(finish.attempt)
                    spool.drop_result(self._directory, finish.worker, finish.attempt)
                return answer

    def look(self) -> protocol.Registered | None:
        """Register where there is a new coordinator, or again where the old one was lost; done by one thread.

        Returns:
            What it said, None where nothing has changed.
        """
        now = time.monotonic()
        if now < self._look_at:
            return None
        self._look_at = now + (_LOOK_S if self._lost_at is None else _LOST_LOOK_S)
        announced = address_of(self._directory)
        self.is_announced = announced is not None or not self._over_tcp
        newer = announced is not None and announced.epoch > self._address.epoch
        if self._lost_at is None and not newer:
            return None
        address = announced if announced is not None and newer else self._address
        return self._join(address)

    def rejoin(self) -> None:
        """The coordinator does not know this worker any more: register again."""
        with self._changed:
            self._lose()

    def give_up(self) -> None:
        """Wait for no coordinator any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give up, and end all connections."""
        self.give_up()
        if self._client is not None:
            self._client.close()

    def _join(self, address: Address) -> protocol.Registered | None:
        troubles: list[str] = []
        for target in address.tcp if self._over_tcp else (address.socket,):
            registered = self._join_at(target, address, troubles)
            if registered is not None:
                return registered
        if troubles:
            self.trouble = "; ".join(troubles)
            if self._over_tcp:
                self.trouble += (
                    "; if this machine cannot connect to the one where the sweep was started, give an address that it"
                    " can (sweep.executor.host), or run the coordinator as a job (sweep.detach=true)"
                )
        return None

    def _join_at(self, target: str, address: Address, troubles: list[str]) -> protocol.Registered | None:
        client = Client(target, address.token, timeout_s=_JOIN_TIMEOUT_S)
        try:
            registered = client.post("/register", self._introduce(), protocol.Registered)
        except (CoordinatorLostError, ProtocolError) as error:
            troubles.append(str(error) if isinstance(error, CoordinatorLostError) else f"{target}: {error}")
            log.info("no coordinator at %s: %s", target, error)
            return None
        finally:
            client.close()
        with self._changed:
            if self._client is not None:
                self._client.close()
            self._client = Client(target, address.token)
            self._address = address
            self._generation += 1
            self._lost_at = None
            self._changed.notify_all()
        log.info("registered at %s (epoch %d)", target, address.epoch)
        return registered

    def _lose(self) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()

    def _await_next(self, generation: int, error: CoordinatorLostError) -> None:
        with self._changed:
            if self._generation == generation and self._client is not None and self._lost_at is None:
                log.warning("the coordinator is lost: %s", error)
                self._lose()
            while self._generation == generation and not self._over:
                self._changed.wait()
            if self._generation == generation:
                raise error

    def _keep(self, finish: protocol.Finish) -> None:
        if finish.attempt in self._kept:
            return
        try:
            spool.keep_result(self._directory, finish)
            self._kept.add(finish.attempt)
        except OSError as error:
            log.warning("the result of attempt %s cannot be kept on disk: %s", finish.attempt, error)


def _result_in(message: Message) -> protocol.Finish | None:
    if isinstance(message, protocol.Finish):
        return message
    return message.finished if isinstance(message, protocol.Claim) else None
