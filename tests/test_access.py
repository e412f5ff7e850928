"""What a server says before a sweep starts: only what will not change by itself is in its way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest
from helpers import free_port

from repro_sweep.cli import uploading
from repro_sweep.errors import TrackingError
from repro_sweep.provenance import environment
from repro_sweep.tracking import access, credentials
from repro_sweep.tracking.base import Progress, Trouble
from repro_sweep.tracking.process import TrackerProcess
from repro_sweep.tracking.store import Unavailable

Reply = tuple[int, str, Mapping[str, str]]
HAS = json.dumps({"experiment": {"experiment_id": "7", "lifecycle_stage": "active"}})
DELETED = json.dumps({"experiment": {"experiment_id": "7", "lifecycle_stage": "deleted"}})
NONE = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Could not find experiment"})
MALFORMED = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid value"})
PAGE = "<html><body>Sign in</body></html>"


@contextlib.contextmanager
def answering(
    answer: Callable[[str, str], Reply | None],
) -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    """A server that gives these answers to method and path; None: none at all. Yields its URI and what it was asked."""
    seen: list[tuple[str, str, str, str]] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            seen.append((self.command, self.path, body, self.headers.get("Authorization", "")))
            reply = answer(self.command, self.path)
            if reply is None:
                over.wait(20)
                return
            status, text, headers = reply
            self.send_response(status)
            for key, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = _handle  # noqa: N815  (http.server's names)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def environ(home: Path, **variables: str) -> dict[str, str]:
    """An environment with nothing but these, and a home."""
    return {"HOME": str(home), **variables}


def replies(first: Reply, second: Reply | None = None) -> Callable[[str, str], Reply | None]:
    """One answer to who reads, and one to who writes."""
    return lambda method, _path: first if method == "GET" else second


def test_two_requests_that_change_nothing_tell_whether_a_sweep_may_write(tmp_path: Path) -> None:
    mine = environ(tmp_path, MLFLOW_TRACKING_USERNAME="ada", MLFLOW_TRACKING_PASSWORD="secret")
    with answering(replies((200, HAS, {}), (400, MALFORMED, {}))) as (uri, seen):
        assert access.check(uri, "my experiment", mine) is None
    assert [(method, path) for method, path, _, _ in seen] == [
        ("GET", "/api/2.0/mlflow/experiments/get-by-name?experiment_name=my+experiment"),
        ("POST", "/api/2.0/mlflow/runs/create"),
    ]
    body = json.loads(seen[1][2])
    assert body["experiment_id"] == "7"
    with pytest.raises(ValueError, match="invalid literal"):
        int(body["start_time"])  # with which MLflow would make a run
    assert {authorization for *_, authorization in seen} == {"Basic YWRhOnNlY3JldA=="}
    with answering(replies((404, NONE, {}), (400, MALFORMED, {}))) as (uri, seen):
        assert access.check(f"{uri}/prefix", "new", mine) is None
    assert seen[1][:3] == ("POST", "/prefix/api/2.0/mlflow/experiments/create", "{}")


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ((401, "You are not authenticated.", {}), None, "refuses the credentials of user 'ada', from MLFLOW_TRACK"),
        ((401, PAGE, {}), None, "(401): are they right, and have they expired? set MLFLOW_TRACKING_USERNAME and"),
        ((403, "Permission denied", {}), None, "does not let user 'ada' read experiment 'x' (403): the permission"),
        ((200, HAS, {}), (403, "Permission denied", {}), "does not let user 'ada' write into experiment 'x' (403):"),
        ((200, HAS, {}), (403, "Permission denied", {}), "permission EDIT is lacking, which its owner or an admin"),
        ((200, HAS, {}), (403, "Permission denied", {}), "; sweep.tracking.experiment=… names another experiment"),
        ((200, HAS, {}), (401, "", {}), "refuses the credentials of user 'ada'"),
        ((404, NONE, {}), (403, "Permission denied", {}), "does not let user 'ada' create experiment 'x' (403)"),
        ((403, "Invalid Host header - possible DNS rebinding attack detected", {}), None, "--allowed-hosts"),
        ((200, DELETED, {}), None, "experiment 'x' was deleted there: restore it"),
    ],
)  # fmt: skip
def test_what_will_not_change_by_itself_is_one_line_without_a_secret(
    first: Reply, second: Reply | None, says: str, tmp_path: Path
) -> None:
    mine = environ(tmp_path, MLFLOW_TRACKING_USERNAME="ada", MLFLOW_TRACKING_PASSWORD="secret")
    with answering(replies(first, second)) as (uri, _), pytest.raises(TrackingError) as raised:
        access.check(uri, "x", mine)
    text = str(raised.value)
    assert text.startswith(f"MLflow at {uri}")
    assert says in text
    assert "\n" not in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ((200, PAGE, {}), None, "it answers 200, but not as an MLflow server does: is the address right?"),
        ((404, PAGE, {}), None, "it answers 404, but not as"),
        ((302, "", {"Location": "https://login.example.org/start?state=1"}), None,
         "it answers 302 and sends on to https://login.example.org/start: is the address right?"),
        ((403, PAGE, {}), None, "something before it answers 403 with a page of its own"),
        ((500, "Internal Server Error", {}), None, "it answers 500, Internal Server Error"),
        ((502, PAGE, {}), None, "it answers 502)"),
        ((503, json.dumps({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}), {}), None, "503, later"),
        ((200, json.dumps([]), {}), None, "it answers 200"),
        ((200, HAS, {}), (404, PAGE, {}), "it answers 404"),
        ((200, HAS, {}), (500, "", {}), "it answers 500"),
        ((200, HAS[:20], {"Content-Length": "100000"}), None, "it answers 200, but not as"),
    ],
)  # fmt: skip
def test_an_odd_answer_is_a_note_and_no_obstacle(
    first: Reply, second: Reply | None, says: str, tmp_path: Path
) -> None:
    with answering(replies(first, second)) as (uri, seen):
        note = access.check(uri, "x", environ(tmp_path))
    assert note is not None
    assert says in note
    assert "\n" not in note
    assert note.endswith("the sweep starts without, its results wait for it")
    assert len(seen) <= 2


def test_a_token_that_a_server_with_accounts_stumbles_over_is_one_line(tmp_path: Path) -> None:
    """MLflow answers 500 to any token, where it keeps passwords in a cache."""
    told = iter(
        [(500, "", {}), (401, "You are not authenticated.", {"WWW-Authenticate": 'Basic realm="mlflow"'})]
    )
    with answering(lambda _method, _path: next(told)) as (uri, seen), pytest.raises(TrackingError) as raised:
        access.check(uri, "x", environ(tmp_path, MLFLOW_TRACKING_TOKEN="abc"))
    assert "does not know the token in MLFLOW_TRACKING_TOKEN: it wants a user and a password" in str(
        raised.value
    )
    assert [authorization for *_, authorization in seen] == ["Bearer abc", ""]


def test_a_server_that_is_away_or_says_nothing_costs_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = access.check(f"http://127.0.0.1:{free_port()}", "x", environ(tmp_path))
    assert note is not None
    assert "refused" in note
    monkeypatch.setattr(access, "ANSWER_S", 0.3)
    began = time.monotonic()
    with answering(lambda _method, _path: None) as (uri, _):
        note = access.check(uri, "x", environ(tmp_path))
    assert note is not None
    assert "no answer" in note
    assert time.monotonic() - began < 10


def test_a_database_is_not_asked_nor_a_server_whose_requests_a_plugin_signs(tmp_path: Path) -> None:
    assert access.check("postgresql://nobody@127.0.0.1:1/x", "x", environ(tmp_path)) is None
    with answering(replies((401, "", {}))) as (uri, seen):
        assert access.check(uri, "x", environ(tmp_path, MLFLOW_TRACKING_AUTH="kubernetes")) is None
    assert seen == []


def test_the_check_does_not_import_mlflow() -> None:
    code = "import repro_sweep.tracking.access, sys; assert not {'mlflow', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- credentials -------------------------------------------------------------------------------------------------


def write_file(home: Path, text: str) -> None:
    """The credentials file of a home."""
    (home / ".mlflow").mkdir(exist_ok=True)
    (home / ".mlflow" / "credentials").write_text(text)


def as_mlflow_sends(home: Path, variables: Mapping[str, str]) -> str | None:
    """What MLflow's own client sends as ``Authorization``, from a process of its own."""
    code = (
        "import sys; from unittest import mock; from mlflow.utils import rest_utils, credentials\n"
        "with mock.patch.object(rest_utils, '_get_http_response_with_retries') as sent:\n"
        "    rest_utils.http_request(credentials.get_default_host_creds('http://h.example'), '/x', 'GET')\n"
        "print(sent.call_args.kwargs['headers'].get('Authorization'))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", **variables},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = done.stdout.split("\n")[-2]
    return None if said == "None" else said


def test_credentials_are_those_that_mlflow_takes(tmp_path: Path) -> None:
    write_file(tmp_path, "[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = from file\n")
    mixed = {"MLFLOW_TRACKING_USERNAME": "bob", "MLFLOW_TRACKING_TOKEN": "t"}
    found = credentials.find("http://h.example", environ(tmp_path, **mixed))
    assert found.header == as_mlflow_sends(tmp_path, mixed)
    assert (found.user, found.name) == ("bob", "user 'bob'")
    assert "MLFLOW_TRACKING_USERNAME and" in found.who
    assert "from file" not in repr(found)
    assert credentials.find("http://h.example", environ(tmp_path)).user == "ada"


def test_a_token_stands_where_there_is_no_password_and_half_of_them_are_none(tmp_path: Path) -> None:
    token = credentials.find("http://h", environ(tmp_path, MLFLOW_TRACKING_TOKEN="abc"))
    assert (token.header, token.user) == ("Bearer abc", None)
    assert token.name == "the token in MLFLOW_TRACKING_TOKEN"
    half = credentials.find("http://h", environ(tmp_path, MLFLOW_TRACKING_USERNAME="ada"))
    assert half.header is None
    assert half.who == "nobody: MLFLOW_TRACKING_USERNAME has one half, MLFLOW_TRACKING_PASSWORD is not set"
    assert credentials.find("http://h", environ(tmp_path)).who == "nobody: there are none"


def test_a_netrc_file_wins_as_it_does_with_requests(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine h.example login net password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    mine = environ(tmp_path, MLFLOW_TRACKING_TOKEN="abc")
    assert credentials.find("http://h.example:5000", mine).user == "net"
    assert credentials.find("http://other.example", mine).header == "Bearer abc"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mlflow_tracking_username = ada\n", r"a line \[mlflow\]"),
        ("[mlflow]\nmlflow_tracking_password = 50%secret\n", "write %% for each %"),
    ],
)
def test_a_credentials_file_that_mlflow_could_not_read_is_one_line_without_its_text(
    text: str, says: str, tmp_path: Path
) -> None:
    write_file(tmp_path, text)
    with pytest.raises(TrackingError, match=says) as raised:
        credentials.find("http://h", environ(tmp_path))
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert credentials.known("http://h", environ(tmp_path)).name == "this user"


def test_credentials_are_no_part_of_the_record_of_the_environment() -> None:
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    assert environment.variables(dict.fromkeys(names, "secret") | {"OMP_NUM_THREADS": "2"}) == {
        "OMP_NUM_THREADS": "2"
    }


# --- giving up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "busy"),
    [
        ("http://h:5000: Read timed out. (read timeout=30)", True),
        ("http://h:5000: Connection to h timed out. (connect timeout=30)", False),
        ("http://h:5000: Failed to establish a new connection: [Errno 111] Connection refused", False),
        ("API request to endpoint /api/2.0/mlflow/runs/create failed with error code 429 != 200", True),
        ("API request to endpoint /x failed with error code 502 != 200. Response body: '<html>'", False),
        ("INTERNAL_ERROR: (psycopg.OperationalError) FATAL: sorry, too many clients already", True),
        ("QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00", True),
    ],
)
def test_a_server_that_is_busy_is_told_from_one_that_is_away(text: str, *, busy: bool) -> None:
    assert Unavailable(text).busy is busy


class _Stuck:
    """A tracker that gets no further for the given reason, and has done it all after some looks."""

    def __init__(self, trouble: Trouble | None, looks: int) -> None:
        self._trouble, self._left = trouble, looks
        self._over = asyncio.Event()

    @property
    def progress(self) -> Progress:
        self._left -= 1
        if self._left == 0:
            self._over.set()
        return Progress(left=3, trouble=self._trouble)

    async def finish(self, _timeout_s: float) -> int:
        await self._over.wait()
        return 0


@pytest.mark.parametrize(
    ("trouble", "left"), [(None, 3), (Trouble.AWAY, 3), (Trouble.DENIED, 3), (Trouble.BUSY, 0)]
)
def test_a_busy_server_is_waited_for_longer_than_one_that_is_away(
    trouble: Trouble | None, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "PATIENCE_S", 0.1)
    monkeypatch.setattr(uploading, "BUSY_S", 60.0)
    monkeypatch.setattr(uploading, "_LOOK_S", 0.01)
    tracker = cast("TrackerProcess", _Stuck(trouble, 60))
    assert asyncio.run(uploading.upload(tracker)) == left
