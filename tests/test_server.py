"""What the coordinator's server answers, seen from a socket: statuses, the token, and where a message ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import environment

from repro_sweep import protocol
from repro_sweep import server as server_module
from repro_sweep.errors import LeaseLostError, LedgerError, UnwritableError
from repro_sweep.failpoints import ENVIRONMENT
from repro_sweep.progress import Progress
from repro_sweep.server import Server
from repro_sweep.states import TrialState

BEAT = protocol.Heartbeat(worker="w").model_dump_json().encode()


class Handlers:
    """Answers all messages; notes those that reach it, and raises what it is told to."""

    def __init__(self) -> None:
        self.heard: list[protocol.Message] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Callable[[Any], Coroutine[Any, Any, object]]:
        replies = {
            "register": protocol.Registered(spec="{}"),
            "claim": protocol.Claimed(over=True),
            "heartbeat": protocol.Beat(stop=("a",)),
            "run_reference": protocol.RunReference(run_id="r"),
            "source": protocol.SourcePiece(size=3),
            "cancel": protocol.Cancelled(trials=(1,)),
            "status": Progress(
                name="n", counts={TrialState.COMPLETE: 2}, slots=1, busy=0.5, seconds_left=None, elapsed_s=1.0,
                best=None, failures=(), draining=False, not_tracked=0,
            ),
        }  # fmt: skip

        async def answer(message: protocol.Message) -> object:
            self.heard.append(message)
            if self.error is not None:
                raise self.error
            return replies.get(name, protocol.Acknowledged())

        return answer


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: str


class Talk:
    """A connection to the server, and the bytes that go over it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def reply(self) -> Reply:
        """The next reply, framed by its length."""
        head = (await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 30)).decode().splitlines()
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)
        }
        body = await self._reader.readexactly(int(headers["content-length"]))
        return Reply(int(head[0].split()[1]), headers, body.decode())

    async def ask(self, path: str, body: bytes, *, method: str = "POST", token: str | None = None) -> Reply:
        """Send a message and wait for its reply."""
        self.writer.write(request(path, body, method=method, token=token))
        return await self.reply()


def request(path: str, body: bytes, *, method: str = "POST", token: str | None = None) -> bytes:
    """The bytes of a message."""
    authorization = "" if token is None else f"Authorization: Bearer {token}\r\n"
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{authorization}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Site:
    """A server, what it serves, and the connections to it."""

    def __init__(self, host: str | None) -> None:
        self.handlers = Handlers()
        self.server = Server(self.handlers, host)  # type: ignore[arg-type]
        self.talks: list[Talk] = []

    async def by_socket(self) -> Talk:
        """A connection to the Unix socket."""
        self.talks.append(Talk(*await asyncio.open_unix_connection(self.server.path)))
        return self.talks[-1]

    async def by_tcp(self) -> Talk:
        """A connection over TCP."""
        self.talks.append(Talk(*await asyncio.open_connection(*self.tcp)))
        return self.talks[-1]

    @property
    def tcp(self) -> tuple[str, int]:
        """Where it listens over TCP."""
        name, _, port = self.server.tcp[0].rpartition(":")
        return name, int(port)


def serve(
    scenario: Callable[[Site], Coroutine[Any, Any, None]], host: str | None = None
) -> list[protocol.Message]:
    """Run a server while ``scenario`` talks to it; returns the messages that its handlers got."""

    async def run() -> list[protocol.Message]:
        site = Site(host)
        await site.server.start()
        try:
            await scenario(site)
        finally:
            for talk in site.talks:
                talk.writer.close()
                with contextlib.suppress(ConnectionError):
                    await talk.writer.wait_closed()
            await site.server.stop()
        return site.handlers.heard

    return asyncio.run(run())


MESSAGES: list[tuple[str, protocol.Message, dict[str, Any]]] = [
    ("/register", protocol.Register(worker="w", host="h", pid=1, slots=1), {"spec": "{}"}),
    ("/claim", protocol.Claim(worker="w", slot=0, attempt="a"), {"over": True}),
    ("/report", protocol.Reports(worker="w", reports=()), {"refused": False}),
    ("/finish", protocol.Finish(worker="w", attempt="a", state=TrialState.COMPLETE, ended_at=1.0), {"refused": False}),
    ("/heartbeat", protocol.Heartbeat(worker="w"), {"known": True, "stop": ["a"]}),
    ("/run", protocol.RunRequest(attempt="a"), {"run_id": "r"}),
    ("/piece", protocol.Piece(attempt="a", path="x", offset=0, data=""), {"refused": False}),
    ("/source", protocol.SourceRequest(), {"size": 3}),
    ("/status", protocol.StatusRequest(), {"name": "n", "counts": {"COMPLETE": 2}, "seconds_left": None}),
    ("/cancel", protocol.Cancel(trials=(1,)), {"trials": [1]}),
]  # fmt: skip


def test_every_kind_of_message_reaches_its_handler_whole_and_is_answered_as_json() -> None:
    async def scenario(site: Site) -> None:
        talk = await site.by_socket()
        for path, message, expected in MESSAGES:
            reply = await talk.ask(path, message.model_dump_json().encode())
            assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
            assert expected.items() <= json.loads(reply.body).items()
            assert site.handlers.heard[-1] == message

    assert len(serve(scenario)) == len(MESSAGES)


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "text"),
    [
        ("/nosuch", "POST", BEAT, 404, "there is no such path"),
        ("/heartbeat/", "POST", BEAT, 404, "there is no such path"),
        ("/heartbeat", "GET", b"", 405, "every message is a POST"),
        ("/heartbeat", "POST", b"", 422, "the message: Invalid JSON: EOF while parsing"),
        ("/heartbeat", "POST", b'{"worker": "w"', 422, "the message: Invalid JSON: EOF while parsing"),
        ("/heartbeat", "POST", b"{}", 422, "worker: Field required"),
        ("/heartbeat", "POST", b'{"worker": "w", "x": 1}', 422, "x: Extra inputs are not permitted"),
        (
            "/claim", "POST", b'{"worker": "w", "slot": "no", "attempt": "a", "wait_s": 61}', 422,
            "slot: Input should be a valid integer, unable to parse string as an integer; wait_s: Input should be less",
        ),
        ("/cancel", "POST", b'{"trials": [[], [], [], [], [], [], []]}', 422, "; and 2 more"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused_in_one_line_and_reaches_nobody(
    path: str, method: str, body: bytes, status: int, text: str
) -> None:
    async def scenario(site: Site) -> None:
        talk = await site.by_socket()
        reply = await talk.ask(path, body, method=method)
        assert reply.status == status
        assert text in reply.body
        assert "\n" not in reply.body
        assert reply.headers.get("allow") == ("POST" if status == 405 else None)
        assert (await talk.ask("/status", b"{}")).status == 200  # and the connection goes on

    assert serve(scenario) == [protocol.StatusRequest()]


@pytest.mark.parametrize(
    ("error", "status"), [(LeaseLostError("gone"), 410), (LedgerError("gone"), 503), (UnwritableError("gone"), 503)]
)  # fmt: skip
def test_an_error_of_the_ledger_is_told_with_its_text(error: Exception, status: int) -> None:
    async def scenario(site: Site) -> None:
        site.handlers.error = error
        reply = await (await site.by_socket()).ask("/heartbeat", BEAT)
        assert (reply.status, reply.body) == (status, "gone")

    serve(scenario)


def test_a_bug_is_answered_with_500_and_its_traceback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(site: Site) -> None:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)
        site.handlers.error = ZeroDivisionError("a bug")
        reply = await (await site.by_socket()).ask("/heartbeat", BEAT)
        assert (reply.status, reply.body) == (500, "Internal Server Error")
        site.handlers.error = None
        assert (await (await site.by_socket()).ask("/heartbeat", BEAT)).status == 200

    try:
        serve(scenario)
    finally:
        logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    [record] = [record for record in caplog.records if record.exc_info]
    assert isinstance(record.exc_info[1], ZeroDivisionError) if record.exc_info else False


def test_over_tcp_only_who_has_the_token_is_heard() -> None:
    async def scenario(site: Site) -> None:
        talk = await site.by_tcp()
        for token in (None, "", "wrong", site.server.token[:-1], f"{site.server.token}x"):
            reply = await talk.ask("/heartbeat", BEAT, token=token)
            assert (reply.status, reply.body) == (401, "not this sweep's token")
            assert (await talk.ask("/nosuch", BEAT, token=token)).status == 401
        assert site.handlers.heard == []
        assert (await talk.ask("/heartbeat", BEAT, token=site.server.token)).status == 200
        assert (await (await site.by_socket()).ask("/heartbeat", BEAT)).status == 200

    assert len(serve(scenario, "127.0.0.1")) == 2


def test_who_hangs_up_over_tcp_before_it_is_heard_is_not_taken_for_one_of_this_machine() -> None:
    """Its address cannot be had any more, as that of a process at the Unix socket cannot."""

    async def scenario(site: Site) -> None:
        with socket.create_connection(site.tcp) as caller:  # it is accepted when this function waits
            caller.sendall(request("/cancel", b"{}"))
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for _ in range(50):
            await asyncio.sleep(0.01)

    assert serve(scenario, "127.0.0.1") == []


def test_a_message_in_pieces_is_one_and_two_in_one_piece_are_two() -> None:
    async def scenario(site: Site) -> None:
        talk = await site.by_socket()
        for byte in request("/heartbeat", BEAT):
            talk.writer.write(bytes([byte]))
            await talk.writer.drain()
            await asyncio.sleep(0)
        assert (await talk.reply()).status == 200
        assert site.handlers.heard == [protocol.Heartbeat(worker="w")]
        other = protocol.Heartbeat(worker="v").model_dump_json().encode()
        talk.writer.write(
            request("/heartbeat", BEAT) + request("/heartbeat", other) + request("/nosuch", b"x")
        )
        assert [(await talk.reply()).status for _ in range(3)] == [200, 200, 404]
        assert site.handlers.heard[1:] == [protocol.Heartbeat(worker="w"), protocol.Heartbeat(worker="v")]
        talk.writer.write(b"POST /heartbeat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        talk.writer.write(b"".join(b"%x\r\n%b\r\n" % (1, bytes([byte])) for byte in BEAT) + b"0\r\n\r\n")
        assert (await talk.reply()).status == 200

    assert len(serve(scenario)) == 4


def test_a_large_message_is_whole_and_a_larger_one_than_any_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports = tuple(
        protocol.Report(attempt="a", seq=seq, step=seq, time=1.0, metrics={"loss": float("nan"), "x": 1 / 3})
        for seq in range(20_000)
    )
    message = protocol.Reports(worker="w", reports=reports)
    body = message.model_dump_json().encode()
    monkeypatch.setattr(server_module, "_MOST_BYTES", len(body))

    async def scenario(site: Site) -> None:
        assert (await (await site.by_socket()).ask("/report", body)).status == 200
        assert str(site.handlers.heard) == str([message])  # NaN is not equal to itself
        reply = await (await site.by_socket()).ask("/report", body + b" ")
        assert (reply.status, reply.body) == (413, f"a message has {len(body)} bytes at most")

    assert len(serve(scenario)) == 1


def test_a_message_whose_sender_dies_within_it_reaches_nobody() -> None:
    async def scenario(site: Site) -> None:
        talk = await site.by_socket()
        talk.writer.write(request("/heartbeat", BEAT + b" " * 100)[:-50])  # what came is whole JSON
        await talk.writer.drain()
        await asyncio.sleep(0.1)
        talk.writer.close()
        assert (await (await site.by_socket()).ask("/status", b"{}")).status == 200

    assert serve(scenario) == [protocol.StatusRequest()]


PROGRAM = """
import asyncio
import contextlib
from repro_sweep import protocol
from repro_sweep.server import Server

class Handlers:
    def __getattr__(self, name):
        async def answer(message):
            print("handled", flush=True)
            return protocol.Beat()
        return answer

async def main():
    server = Server(Handlers())
    await server.start()
    print(server.path, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize(("place", "handled"), [("received", ""), ("answering", "handled\n")])
def test_a_coordinator_can_be_told_to_die_before_and_after_it_handles_a_message(
    place: str, handled: str
) -> None:
    env = environment({ENVIRONMENT: f"heartbeat.{place}"})
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            assert process.stdout is not None
            path = process.stdout.readline().strip()
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(path)
                caller.sendall(request("/heartbeat", BEAT))
                assert caller.recv(100) == b""
            assert process.stdout.read() == handled
        finally:
            process.kill()
    Path(path).unlink()
    Path(path).parent.rmdir()
    assert process.returncode == -9
