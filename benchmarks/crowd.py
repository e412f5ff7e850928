"""A crowd of simulated workers in one process: ``python -m benchmarks.crowd``.

Each has two connections, as a real one with a slot: on one its slot claims trial after trial, on the other it says
every second that it lives. What it sends is what ``worker.agent`` sends. That it runs no trials, and speaks HTTP with
next to no code, is what lets a thousand of them live in one process.

The process prints ``ready`` when all have registered, begins when it is sent a line, and prints what came of it as one
line of JSON: see :class:`Tally`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
import uuid
from collections import deque
from dataclasses import asdict, dataclass, field

from repro_sweep import protocol
from repro_sweep.states import TrialState

_HEARTBEAT_S = 1.0
_CLAIM_WAIT_S = 20.0
_PATIENCE_S = 60.0
_TRIAL = re.compile(rb'"attempt":"([0-9a-f]{32})","trial":(\d+),')
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@dataclass(kw_only=True)
class Tally:
    """What a crowd has done.

    ``trials`` are the numbers of those that it was given, in their order; ``claim_s`` is how long each claim took that
    was answered with a trial. ``refused`` counts results that were not taken, ``messages`` all that were answered.
    """

    trials: list[int] = field(default_factory=list)
    claim_s: list[float] = field(default_factory=list)
    messages: int = 0
    beats: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0


class CrowdError(Exception):
    """The coordinator did not answer as it must."""


class Connection(asyncio.Protocol):
    """One connection: a message at a time, or several whose replies come in their order."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """A reply, or a part of one, or several."""
        self._buffer += data
        while (head := self._buffer.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self._buffer, 0, head)
            end = head + 4 + (int(found[1]) if found is not None else 0)
            if len(self._buffer) < end:
                return
            status, body = bytes(self._buffer[9:12]), bytes(self._buffer[head + 4 : end])
            del self._buffer[:end]
            future = self._waiting.popleft()
            if status == b"200":
                future.set_result(body)
            else:
                future.set_exception(CrowdError(f"{status.decode()} {body[:200].decode(errors='replace')}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody answers any more."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(CrowdError(f"the connection was closed: {exc}"))

    def send(self, request: bytes) -> asyncio.Future[bytes]:
        """Send a request; the future is its reply."""
        assert self._transport is not None
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting.append(future)
        self._transport.write(request)
        return future

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.close()


class Address:
    """Where the coordinator listens, and the head of every request to it."""

    def __init__(self, target: str, token: str) -> None:
        self._target = target
        self._head = b"Host: localhost\r\nContent-Type: application/json\r\n"
        if token:
            self._head += f"Authorization: Bearer {token}\r\n".encode()

    async def connect(self) -> Connection:
        """A connection to it."""
        loop = asyncio.get_running_loop()
        if self._target.startswith("/"):
            return (await loop.create_unix_connection(Connection, self._target))[1]
        host, _, port = self._target.rpartition(":")
        return (await loop.create_connection(Connection, host, int(port)))[1]

    def request(self, path: str, body: bytes) -> bytes:
        """The bytes of a message."""
        return b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b" % (
            path.encode(), self._head, len(body), body,
        )  # fmt: skip


class Worker:
    """One simulated worker with one slot.

    Args:
        name: its id.
        address: the coordinator's.
        tally: what becomes of it.
        apart: it sends each result as a message of its own, before it claims the next trial.
        trial_s: how long its trials take, in the mean; each between half and one and a half of it.
    """

    def __init__(self, name: str, address: Address, tally: Tally, *, apart: bool, trial_s: float) -> None:
        self._name = name
        self._address = address
        self._tally = tally
        self._apart = apart
        self._trial_s = trial_s
        self._random = random.Random(name)
        self._attempt = ""
        self._over = asyncio.Event()

    async def join(self) -> None:
        """Register, on a connection for that alone, and open those for the slot and the heartbeats."""
        connection = await self._address.connect()
        message = protocol.Register(worker=self._name, host="crowd", pid=1, slots=1)
        await connection.send(self._request("/register", message))
        connection.close()
        self._slot, self._pulse = await self._address.connect(), await self._address.connect()

    async def work(self) -> None:
        """Run trials until there are no more, then leave."""
        beating = asyncio.create_task(self._beat())
        try:
            await self._claim_all()
        finally:
            self._over.set()
            await beating
        await self._pulse.send(
            self._request("/heartbeat", protocol.Heartbeat(worker=self._name, leaving=True))
        )
        self._slot.close()
        self._pulse.close()

    async def _claim_all(self) -> None:
        finished: protocol.Finish | None = None
        while True:
            attempt = uuid.uuid4().hex
            claim = protocol.Claim(
                worker=self._name, slot=0, attempt=attempt, wait_s=_CLAIM_WAIT_S, finished=finished
            )
            began = time.perf_counter()
            reply = await self._slot.send(self._request("/claim", claim))
            self._tally.messages += 1
            finished, found = None, _TRIAL.search(reply)
            if found is None:
                if b'"over":true' in reply:
                    return
                continue
            if found[1].decode() != attempt:
                raise CrowdError(f"asked for attempt {attempt}, got {found[1].decode()}")
            self._tally.claim_s.append(time.perf_counter() - began)
            self._tally.trials.append(int(found[2]))
            self._attempt = attempt
            if self._trial_s:
                await asyncio.sleep(self._trial_s * self._random.uniform(0.5, 1.5))
            finished = protocol.Finish(
                worker=self._name, attempt=attempt, state=TrialState.COMPLETE,
                metrics={"value": self._random.random()}, ended_at=time.time(),
            )  # fmt: skip
            self._attempt = ""
            if self._apart:
                reply = await self._slot.send(self._request("/finish", finished))
                self._tally.messages += 1
                self._tally.refused += b'"refused":false' not in reply
                finished = None

    async def _beat(self) -> None:
        await asyncio.sleep(self._random.uniform(0.0, _HEARTBEAT_S))
        while not self._over.is_set():
            running = (self._attempt,) if self._attempt else ()
            message = protocol.Heartbeat(worker=self._name, attempts=running)
            reply = await self._pulse.send(self._request("/heartbeat", message))
            self._tally.messages += 1
            self._tally.beats += 1
            if b'"known":true' not in reply:
                raise CrowdError(f"worker {self._name} was given up: {reply.decode()}")
            try:
                await asyncio.wait_for(self._over.wait(), _HEARTBEAT_S)
            except TimeoutError:
                continue

    def _request(self, path: str, message: protocol.Message) -> bytes:
        return self._address.request(path, message.model_dump_json().encode())


async def _ask_only(address: Address, connections: int, requests: int, tally: Tally) -> None:
    """Send the smallest message again and again over so many connections."""
    request = address.request("/heartbeat", protocol.Heartbeat(worker="w").model_dump_json().encode())

    async def one(connection: Connection, count: int) -> None:
        for _ in range(count):
            await connection.send(request)
            tally.messages += 1

    opened = [await address.connect() for _ in range(connections)]
    await _begin(tally)
    await asyncio.gather(*(one(each, requests // connections) for each in opened))
    tally.ended = time.time()


async def _begin(tally: Tally) -> None:
    print(json.dumps("ready"), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    tally.began = time.time()


async def _crowd(args: argparse.Namespace, tally: Tally) -> None:
    address = Address(args.target, args.token)
    if args.empty:
        await _ask_only(address, args.workers, args.empty, tally)
        return
    workers = [
        Worker(f"w{number}", address, tally, apart=args.apart, trial_s=args.trial_s)
        for number in range(args.first, args.first + args.workers)
    ]
    for worker in workers:
        await worker.join()
    await _begin(tally)
    for result in await asyncio.gather(*(worker.work() for worker in workers), return_exceptions=True):
        if isinstance(result, BaseException):
            tally.errors.append(f"{type(result).__name__}: {result}")
    tally.ended = time.time()


def main() -> int:
    """Run a crowd; prints its tally."""
    parser = argparse.ArgumentParser(prog="benchmarks.crowd", description=__doc__)
    parser.add_argument("--target", required=True, help="the path of a Unix socket, or host:port")
    parser.add_argument("--token", default="")
    parser.add_argument("--first", type=int, default=0, help="the number of the first worker")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--apart", action="store_true", help="results come in messages of their own")
    parser.add_argument("--trial-s", type=float, default=0.0, help="how long trials take, in the mean")
    parser.add_argument("--empty", type=int, default=0, help="send so many empty messages instead of working")
    args = parser.parse_args()
    tally = Tally()
    asyncio.run(_crowd(args, tally))
    print(json.dumps(asdict(tally)), flush=True)
    return 1 if tally.errors else 0


if __name__ == "__main__":
    sys.exit(main())
