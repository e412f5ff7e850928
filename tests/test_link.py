"""A worker's link to whoever coordinates its sweep, and what it keeps on disk when nobody does."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from helpers import eventually

from repro_sweep import protocol, spool
from repro_sweep.errors import ProtocolError
from repro_sweep.lease import ADDRESS_NAME
from repro_sweep.records import NewReport
from repro_sweep.spool import ReportLog
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.worker import agent, oom
from repro_sweep.worker import client as client_module
from repro_sweep.worker.client import Client, CoordinatorLostError
from repro_sweep.worker.link import Link
from repro_sweep.worker.output import CappedLog
from repro_sweep.worker.runner import _kind

Answer = tuple[int, str]
OK: Answer = (200, "{}")


class Coordinator:
    """A coordinator that says what it is told to; it notes what it is sent."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = str(folder / f"{name}.sock")
        self.heard: list[str] = []
        self.answers: dict[str, list[Answer]] = {}
        self.hangs = threading.Event()
        """Where it is set, a claim is not answered."""
        self.released = threading.Event()
        coordinator = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                coordinator.heard.append(self.path)
                if self.path == "/claim" and coordinator.hangs.is_set():
                    coordinator.released.wait(100)
                    self.close_connection = True
                    return
                status, text = coordinator.next_answer(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: object) -> None:
                pass

        self._server = socketserver.ThreadingUnixStreamServer(self.path, Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def next_answer(self, path: str) -> Answer:
        """What it says to a message: the answers in their order, the last one for ever."""
        if path == "/register":
            return 200, json.dumps({"spec": "{}"})
        answers = self.answers.get(path, [OK])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def end(self) -> None:
        """Listen no more, as if it were killed."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        Path(self.path).unlink(missing_ok=True)
        self._thread.join()


@pytest.fixture
def coordinators(tmp_path: Path) -> Iterator[Callable[[str], Coordinator]]:
    """Makes coordinators by name."""
    made: list[Coordinator] = []

    def make(name: str = "one") -> Coordinator:
        made.append(Coordinator(tmp_path, name))
        return made[-1]

    yield make
    for coordinator in made:
        if Path(coordinator.path).exists():
            coordinator.end()


BEAT = protocol.Heartbeat(worker="w")


def finish(attempt: str = "a") -> protocol.Finish:
    """A result."""
    return protocol.Finish(
        worker="w", attempt=attempt, state=TrialState.COMPLETE, metrics={"score": float("inf")}, ended_at=2.0
    )


# --- one message ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503])
def test_a_message_is_sent_again_while_the_coordinator_has_an_error(
    coordinators: Callable[..., Coordinator], status: int
) -> None:
    """It may be one of the moment."""
    coordinator = coordinators()
    coordinator.answers["/heartbeat"] = [(status, "busy"), (status, "busy"), OK]
    client = Client(coordinator.path)
    assert client.post("/heartbeat", BEAT, protocol.Beat).known
    assert coordinator.heard == ["/heartbeat"] * 3
    client.close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_whoever_has_got_the_coordinators_address_since_is_not_the_coordinator(
    coordinators: Callable[..., Coordinator], status: int
) -> None:
    """Another sweep's, or anything else that speaks HTTP: the worker waits for its own."""
    coordinator = coordinators()
    coordinator.answers["/heartbeat"] = [(status, "who are you?")]
    client = Client(coordinator.path)
    with pytest.raises(CoordinatorLostError, match=f"{status} who are you"):
        client.post("/heartbeat", BEAT, protocol.Beat)
    client.close()


def test_a_message_that_the_coordinator_refuses_is_not_sent_again(
    coordinators: Callable[..., Coordinator],
) -> None:
    """Neither one whose answer is not understood."""
    coordinator = coordinators()
    coordinator.answers["/heartbeat"] = [(422, "no such field"), (200, '{"unknown": 1}')]
    client = Client(coordinator.path)
    with pytest.raises(ProtocolError, match="/heartbeat: 422 no such field"):
        client.post("/heartbeat", BEAT, protocol.Beat)
    with pytest.raises(ProtocolError, match="unknown"):
        client.post("/heartbeat", BEAT, protocol.Beat)
    assert len(coordinator.heard) == 2
    client.close()


def test_a_coordinator_that_has_been_replaced_or_is_gone_is_lost(
    coordinators: Callable[..., Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first at once, the second after a moment in which it might still begin to listen."""
    monkeypatch.setattr(client_module, "RETRY_FOR_S", 0.5)
    coordinator = coordinators()
    coordinator.answers["/heartbeat"] = [(410, "there is another one"), (500, "still")]
    client = Client(coordinator.path)
    with pytest.raises(CoordinatorLostError, match="there is another one"):
        client.post("/heartbeat", BEAT, protocol.Beat)
    assert len(coordinator.heard) == 1
    with pytest.raises(CoordinatorLostError, match="500 still"):
        client.post("/heartbeat", BEAT, protocol.Beat)
    client.close()
    coordinator.end()
    with pytest.raises(CoordinatorLostError, match="No such file"):
        Client(coordinator.path).post("/heartbeat", BEAT, protocol.Beat)


def test_a_client_that_is_closed_lets_nobody_wait(coordinators: Callable[..., Coordinator]) -> None:
    """Neither who waits for a reply, nor who comes later."""
    coordinator = coordinators()
    coordinator.hangs.set()
    client = Client(coordinator.path)
    claiming, lost = claim_in_thread(client.post)
    eventually(lambda: coordinator.heard, "the claim arrives")
    client.close()
    claiming.join(60)
    assert not claiming.is_alive()
    with pytest.raises(CoordinatorLostError):
        client.post("/heartbeat", BEAT, protocol.Beat)
    assert [type(error) for error in lost] == [CoordinatorLostError]


def claim_in_thread(post: Callable[..., object]) -> tuple[threading.Thread, list[object]]:
    """Claim in a thread of its own; returns it, and where its answer or error will be."""
    answers: list[object] = []

    def claim() -> None:
        message = protocol.Claim(worker="w", slot=0, attempt="next", finished=finish())
        try:
            answers.append(post("/claim", message, protocol.Claimed))
        except CoordinatorLostError as error:
            answers.append(error)

    thread = threading.Thread(target=claim, daemon=True)
    thread.start()
    return thread, answers


# --- whoever coordinates -------------------------------------------------------------------------------------


def announce(folder: Path, coordinator: Coordinator, epoch: int) -> None:
    """What a coordinator does when it takes a sweep over."""
    (folder / ADDRESS_NAME).write_text(json.dumps({"epoch": epoch, "socket": coordinator.path}))


@contextmanager
def link_to(folder: Path, coordinator: Coordinator) -> Iterator[Link]:
    """A worker's link, registered at its first coordinator."""
    announce(folder, coordinator, 1)
    link = Link(folder, coordinator.path, lambda: protocol.Register(worker="w", host="h", pid=1, slots=1))
    eventually(link.look, "it registers")
    yield link
    link.give_up()
    if link._client is not None:
        link._client.close()


def test_a_worker_that_cannot_connect_says_where_it_has_tried_and_what_helps(tmp_path: Path) -> None:
    with socket.socket() as first, socket.socket() as second:  # bound, but nobody listens
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        targets = [f"127.0.0.1:{each.getsockname()[1]}" for each in (first, second)]
        record = {"epoch": 1, "socket": "", "tcp": targets, "token": "t"}
        (tmp_path / ADDRESS_NAME).write_text(json.dumps(record))
        link = Link(tmp_path, None, lambda: protocol.Register(worker="w", host="h", pid=1, slots=1))
        assert "no coordinator has announced itself" in link.trouble
        assert link.look() is None
    for target in targets:
        assert f"{target}: [Errno 111] Connection refused" in link.trouble
    assert "sweep.executor.host" in link.trouble
    assert "sweep.detach=true" in link.trouble


def test_a_worker_waits_longer_for_a_coordinator_between_two_than_for_one_it_cannot_reach(
    tmp_path: Path, coordinators: Callable[..., Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has left to go on in another job takes its announcement with it."""
    monkeypatch.setattr(agent, "_FIRST_JOIN_S", 0.5)
    new = coordinators("new")
    announced = {"epoch": 1, "socket": "", "tcp": [f"{tmp_path}/nobody"], "token": "t"}
    (tmp_path / ADDRESS_NAME).write_text(json.dumps(announced))
    assert agent.Agent("w", tmp_path, None, [()])._join() is None
    (tmp_path / ADDRESS_NAME).unlink()
    announced |= {"epoch": 2, "tcp": [new.path]}
    late = threading.Timer(1.5, (tmp_path / ADDRESS_NAME).write_text, (json.dumps(announced),))
    late.start()
    assert agent.Agent("w", tmp_path, None, [()])._join() is not None
    assert "/register" in new.heard


def kept(folder: Path) -> list[protocol.Finish]:
    """The results on disk."""
    return list(spool.results(folder))


def test_a_claim_that_hangs_at_a_stopped_coordinator_is_answered_by_its_successor(
    tmp_path: Path, coordinators: Callable[..., Coordinator]
) -> None:
    """As soon as that has announced itself; the result goes with it and is not left on disk."""
    old, new = coordinators("old"), coordinators("new")
    with link_to(tmp_path, old) as link:
        old.hangs.set()
        claiming, answers = claim_in_thread(link.post)
        eventually(lambda: "/claim" in old.heard, "the claim arrives")
        assert link.look() is None
        announce(tmp_path, new, 2)
        eventually(link.look, "it registers at the new one")
        claiming.join(60)
        assert answers == [protocol.Claimed()]
        assert new.heard == ["/register", "/claim"]
        assert link.lost_for_s == 0
    assert kept(tmp_path) == []


def test_a_coordinator_with_an_older_epoch_is_not_followed(
    tmp_path: Path, coordinators: Callable[..., Coordinator]
) -> None:
    """Its file may come late."""
    new, old = coordinators("new"), coordinators("old")
    with link_to(tmp_path, old) as link:
        announce(tmp_path, new, 2)
        eventually(link.look, "it registers at the new one")
        announce(tmp_path, old, 1)
        link.rejoin()
        eventually(link.look, "it registers again")
        assert (old.heard, new.heard) == (["/register"], ["/register"] * 2)


def test_a_result_that_finds_no_coordinator_is_kept_on_disk_until_one_has_it(
    tmp_path: Path, coordinators: Callable[..., Coordinator]
) -> None:
    """Whole, and before anybody comes."""
    old = coordinators("old")
    with link_to(tmp_path, old) as link:
        old.end()
        claiming, answers = claim_in_thread(link.post)
        eventually(lambda: kept(tmp_path) == [finish()], "the result is kept")
        eventually(lambda: link.lost_for_s > 0, "the coordinator is lost")
        assert link.look() is None
        new = coordinators("new")
        announce(tmp_path, new, 2)
        eventually(link.look, "it registers at the new one")
        claiming.join(60)
        assert answers == [protocol.Claimed()]
    assert kept(tmp_path) == []


@pytest.mark.parametrize("answer", [(410, "there is another one"), (422, "refused")])
def test_a_result_that_nobody_takes_stays_on_disk(
    tmp_path: Path, coordinators: Callable[..., Coordinator], answer: Answer
) -> None:
    """The worker may end; the next coordinator finds it."""
    coordinator = coordinators()
    coordinator.answers["/finish"] = [answer]
    with link_to(tmp_path, coordinator) as link:
        giving_up = threading.Thread(
            target=lambda: (eventually(lambda: kept(tmp_path), "it is kept"), link.give_up())
        )
        giving_up.start()
        with pytest.raises((CoordinatorLostError, ProtocolError)):
            link.post("/finish", finish(), protocol.Acknowledged)
        giving_up.join()
    assert kept(tmp_path) == [finish()]
    assert spool.result_of(tmp_path, "w", "a") == finish()


# --- what is kept --------------------------------------------------------------------------------------------


def test_a_result_on_disk_is_its_user_s_alone_and_whole_or_not_there(tmp_path: Path) -> None:
    """What is torn is left alone."""
    for attempt in ("a", "b"):
        spool.keep_result(tmp_path, finish(attempt))
    folder = tmp_path / "workers" / "w" / "results"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    (folder / "c.json").write_text(finish("c").model_dump_json()[:-20])
    assert [each.attempt for each in spool.results(tmp_path)] == ["a", "b"]
    assert spool.result_of(tmp_path, "w", "c") is None
    assert spool.result_of(tmp_path, "w", "d") is None
    for _ in range(2):
        spool.drop_result(tmp_path, "w", "a")
    assert [each.attempt for each in spool.results(tmp_path)] == ["b"]
    assert sorted(path.name for path in folder.iterdir()) == ["b.json", "c.json"]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    """Nothing half-written is left beside it."""
    target = tmp_path / "taken"
    target.mkdir()
    (target / "inside").write_text("")
    with pytest.raises(OSError, match="taken"):
        spool.write_file(target, "text")
    assert list(tmp_path.iterdir()) == [target]


def test_a_trial_s_own_record_of_its_reports_counts_them_and_ends_at_the_first_torn_line(
    tmp_path: Path,
) -> None:
    """A trial that has reported nothing has none."""
    log = ReportLog(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []
    assert [log.add(step, 1.5, {"score": float("nan") if step else 1.0}) for step in range(3)] == [0, 1, 2]
    [path] = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    first, second = spool.reports_of(tmp_path, "a")
    assert first == NewReport(seq=0, step=0, time=1.5, metrics={"score": 1.0})
    assert (second.seq, second.step) == (1, 1)
    path.write_bytes(b"\xff\n" + whole)
    assert spool.reports_of(tmp_path, "a") == []
    spool.drop_reports(tmp_path, "a")
    assert spool.reports_of(tmp_path, "a") == []


def test_a_report_that_cannot_be_written_is_passed_over_but_counted(tmp_path: Path) -> None:
    """No trial fails for a full disk."""
    (tmp_path / "reports-a.jsonl").symlink_to("/dev/full")
    log = ReportLog(tmp_path, "a")
    assert [log.add(step, 1.0, {"score": 1.0}) for step in range(2)] == [0, 1]


def test_a_log_on_a_full_disk_is_left_out_and_fails_no_trial() -> None:
    """Neither when it is written nor when it is closed."""
    log = CappedLog(Path("/dev/full"), 100)
    for _ in range(30):
        log.write(b"0123456789")
    log.close()


# --- too little memory ---------------------------------------------------------------------------------------


def test_the_kernel_s_count_of_killed_processes_is_read_in_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first file that has one."""
    one, two, none = tmp_path / "one", tmp_path / "two", tmp_path / "none"
    one.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    two.write_text("low 0\nhigh 0\nmax 5\noom 2\noom_kill 1\noom_group_kill 0\n")
    none.write_text("oom_kill_disable 0\nunder_oom 0\n")
    for files, count in [([one], 3), ([two, one], 1), ([tmp_path / "missing", none, two], 1), ([none], None)]:
        monkeypatch.setattr(oom, "_counters", lambda files=files: files)
        assert oom.kills() == count


class OutOfMemoryError(RuntimeError):
    """Called as torch's."""


def raised_from(cause: BaseException) -> BaseException:
    """An exception that was raised from another one."""
    try:
        raise ValueError("wrapped") from cause
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), FailureKind.OUT_OF_MEMORY),
        (OSError(12, "Cannot allocate memory"), FailureKind.OUT_OF_MEMORY),
        (OSError(28, "No space left on device"), FailureKind.NODE_LOST),
        (OSError(2, "No such file"), FailureKind.EXCEPTION),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), FailureKind.GPU_OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), FailureKind.GPU_OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), FailureKind.GPU_OUT_OF_MEMORY),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), FailureKind.GPU_OUT_OF_MEMORY),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            FailureKind.OUT_OF_MEMORY,
        ),
        (RuntimeError("a memory of old days"), FailureKind.EXCEPTION),
        (ValueError("out of memory"), FailureKind.EXCEPTION),
        (raised_from(MemoryError()), FailureKind.OUT_OF_MEMORY),
        (raised_from(raised_from(OutOfMemoryError("CUDA out of memory."))), FailureKind.GPU_OUT_OF_MEMORY),
        (raised_from(ValueError()), FailureKind.EXCEPTION),
    ],
)
def test_the_kind_of_a_failure_follows_from_what_the_task_raised(
    error: BaseException, kind: FailureKind
) -> None:
    """Or from what that was raised from."""
    assert _kind(error) is kind


def test_torch_s_own_errors_are_known(tmp_path: Path) -> None:
    """The GPU's by its class's text; the host's when it really allocates too much."""
    torch = pytest.importorskip("torch")
    assert _kind(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")) is (
        FailureKind.GPU_OUT_OF_MEMORY
    )
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert _kind(caught.value) is FailureKind.OUT_OF_MEMORY
