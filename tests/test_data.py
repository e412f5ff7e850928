"""Data that a sweep declares: fingerprints, what they are part of, and what happens when data change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import MakeProject, environment, write

from repro_sweep import TrialState
from repro_sweep.errors import SweepError
from repro_sweep.provenance import data
from repro_sweep.states import FailureKind
from repro_sweep.sweep import Data

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)
TASK = """
    import time
    from pathlib import Path

    import repro_sweep


    def train(cfg):
        repro_sweep.report(0, read=len(Path("data/a.txt").read_text()))
        Path("started").touch()
        ends = time.monotonic() + 60
        while cfg.wait and not Path("go").exists() and time.monotonic() < ends:
            time.sleep(0.05)
        return float(cfg.x)
"""
FILES = {
    "conf/config.yaml": "x: 0\nwait: false\n",
    "tasks.py": TASK,
    "data/a.txt": "first\n",
    "data/b/c.txt": "second\n",
}
SWEEP = ("+sweep=default", "sweep.task=tasks.train", "+sweep.data.train=data")


def of(where: str | Path, folder: Path) -> Data:
    """A fingerprint, with the store beside."""
    return data.fingerprint("train", str(where), folder, folder / "store")


def test_a_fingerprint_depends_on_names_and_bytes_alone(tmp_path: Path) -> None:
    """Not on where they lie, nor on their times; a file's is its SHA-256."""
    one = write(tmp_path / "one", {"d/a": "1", "d/b/c": "2"})
    same = write(tmp_path / "same", {"d/b/c": "2", "d/a": "1"})
    os.utime(same / "d/a", (0, 0))
    first = of("d", one)
    assert first.digest == of("d", same).digest
    assert (first.files, first.size) == (2, 2)
    others = [
        {"d/a": "1", "d/b/c": "3"},
        {"d/a": "1", "d/b/d": "2"},
        {"d/a": "1"},
        {"d/a": "12", "d/b/c": ""},
    ]
    digests = {of("d", write(tmp_path / str(number), files)).digest for number, files in enumerate(others)}
    assert len(digests | {first.digest}) == 5
    assert of("d/a", one).digest == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"


def test_a_file_is_read_again_only_if_it_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As git does it: by size and times."""
    write(tmp_path, {"d/a": "1", "d/b": "2"})
    monkeypatch.setattr(data, "_RACY_NS", 0)  # else files that are so new are always read
    first = of("d", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(data.hashlib, "new", lambda *_a, **_k: pytest.fail("read again"))
        assert of("d", tmp_path) == first
    (tmp_path / "d/a").write_text("3")
    assert of("d", tmp_path).digest != first.digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "d/b").write_text("3"), "d/b"),
        (lambda folder: (folder / "d/new").write_text(""), "d/new"),
        (lambda folder: (folder / "d/a").unlink(), "d/a"),
    ],
)
def test_the_file_that_has_changed_is_named(tmp_path: Path, change: object, named: str) -> None:
    """Also one that is new, or gone."""
    write(tmp_path, {"d/a": "1", "d/b": "2"})
    was = of("d", tmp_path)
    assert data.changed("train", was, tmp_path / "store") is None
    assert callable(change)
    change(tmp_path)
    said = data.changed("train", was, tmp_path / "store")
    assert said == f"sweep.data.train: {tmp_path / named} has changed since the sweep was submitted"


def test_what_is_written_by_two_at_once_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both have the same process id, as in two containers; and nothing is left of it."""
    replace = Path.replace

    def late(partial: Path, target: Path) -> Path:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", replace)
            data.keep_manifest(tmp_path, "digest", {"a": "the other's"})
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", late)
    data.keep_manifest(tmp_path, "digest", {"a": "one's"})
    [written] = (tmp_path / "data").iterdir()
    assert json.loads(written.read_text()) == {"a": "one's"}


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_a_uri_of_a_local_file_is_its_path(tmp_path: Path, scheme: str) -> None:
    """So that it is the bytes that count."""
    write(tmp_path, {"d/a": "1"})
    assert of(f"{scheme}{tmp_path}/d", tmp_path) == of("d", tmp_path)
    assert of(f"{scheme}d", tmp_path) == of("d", tmp_path)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("gone", "sweep.data.train: {folder}/gone is not there"),
        ("file:///gone/away", "sweep.data.train: /gone/away is not there"),
        ("memory://gone", "sweep.data.train: memory://gone cannot be read: "),
        ("nowhere://x", "sweep.data.train: nowhere://x cannot be read: Protocol not known: nowhere"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, where: str, said: str) -> None:
    """In one line, and for good."""
    with pytest.raises(SweepError) as caught:
        of(where, tmp_path)
    assert str(caught.value).startswith(said.format(folder=tmp_path))
    assert not isinstance(caught.value, data.UnreadableError)


# --- a URI -------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """An HTTP server whose answer to every path in ``headers`` is those headers, and no more than they say."""

    uri: str = ""
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    pages: dict[str, bytes] = field(default_factory=dict)
    status: list[int] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body: first what is in ``status``, one for each request."""
        status = self.status.pop(0) if self.status else 200
        if status != 200:
            return status, {"Content-Length": "0"}, b""
        if path not in self.headers:
            return 404, {"Content-Length": "0"}, b""
        page = self.pages.get(path, b"")
        kind = "text/html" if page else "text/csv"
        return 200, {"Content-Type": kind, **self.headers[path]}, page


@pytest.fixture
def server() -> Iterator[Server]:
    """One on this machine."""
    made = Server()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            status, headers, page = made.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            body = page.ljust(int(headers.get("Content-Length", len(page))))
            self.wfile.write(body if self.command == "GET" else b"")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name there)
            pass

        do_GET = do_HEAD = _handle  # noqa: N815  (http.server's names)

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    made.uri = f"http://127.0.0.1:{listener.server_port}"
    yield made
    listener.shutdown()
    thread.join()
    listener.server_close()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"Content-Length": "1"}, {"Content-Length": "5"}),
        ({"Content-Length": "1", "ETag": '"a"'}, {"Content-Length": "1", "ETag": '"b"'}),
        ({"ETag": '"a"', "Content-Length": "1"}, {"ETag": '"a"', "Content-Length": "2"}),
        (
            {"Content-Length": "1", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
            {"Content-Length": "1", "Last-Modified": "Mon, 01 Jan 2024 00:00:01 GMT"},
        ),
        ({"Content-MD5": "a", "ETag": '"x"'}, {"Content-MD5": "b", "ETag": '"x"'}),
    ],
)
def test_a_change_behind_a_url_is_seen(
    tmp_path: Path, server: Server, before: dict[str, str], after: dict[str, str]
) -> None:
    """By each thing that its server says of it."""
    server.headers["/x"] = before
    was = of(f"{server.uri}/x", tmp_path)
    assert data.changed("train", was, tmp_path) is None
    server.headers["/x"] = after
    said = data.changed("train", was, tmp_path)
    assert said == f"sweep.data.train: {server.uri}/x has changed since the sweep was submitted"


def test_a_change_behind_a_page_of_links_is_seen(tmp_path: Path, server: Server) -> None:
    """Of each file; it is a folder, and links that sort it are no files."""
    page = b'<a href="?C=N">N</a> <a href="a.csv">a</a> <a href="b.csv">b</a>'
    server.headers |= {"/d/": {}, "/d/a.csv": {"Content-Length": "1"}, "/d/b.csv": {"Content-Length": "2"}}
    server.pages["/d/"] = page
    was = of(f"{server.uri}/d/", tmp_path)
    assert (was.files, was.size) == (2, 3)
    server.headers["/d/b.csv"] = {"Content-Length": "3"}
    assert of(f"{server.uri}/d/", tmp_path).digest != was.digest


def test_what_no_server_identifies_is_refused(tmp_path: Path, server: Server) -> None:
    """Else every change of it would be missed."""
    server.headers["/x"] = {}
    with pytest.raises(SweepError) as caught:
        of(f"{server.uri}/x", tmp_path)
    said = "no size, ETag or time is known, so no change would be seen"
    assert str(caught.value) == f"sweep.data.train: {server.uri}/x: {said}"


def test_an_object_is_known_by_its_checksum_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checksum the time does not count; and nothing comes from a list that fsspec has kept."""
    from fsspec.implementations.memory import MemoryFileSystem

    asked = []
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda *_: asked.append(1))
    digests = []
    for about in (
        {"size": 1, "mtime": 1},
        {"size": 1, "mtime": 2},
        {"size": 1, "ETag": "a", "mtime": 1},
        {"size": 1, "ETag": "a", "mtime": 2},
        {"size": 1, "ETag": "b", "mtime": 2},
        {"size": 2, "ETag": "b", "mtime": 2},
    ):
        about["type"] = "file"
        monkeypatch.setattr(MemoryFileSystem, "info", lambda *_, about=about, **__: about)
        digests.append(of("memory://test_data/x", tmp_path).digest)
    assert len(set(digests)) == 5
    assert digests[2] == digests[3]
    assert len(asked) == 6


@pytest.mark.parametrize("status", [[503], [503, 429], [200, 503, 503]])
def test_what_cannot_be_read_for_a_moment_is_read_again(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, status: list[int]
) -> None:
    """Nothing has changed because of that."""
    monkeypatch.setattr(data, "_WAITS_S", (0.0, 0.0))
    server.headers["/x"] = {"Content-Length": "1"}
    guard = data.Guard({"train": of(f"{server.uri}/x", tmp_path)}, tmp_path)
    server.status = list(status)
    assert guard.look() is None
    assert not server.status


def test_what_cannot_be_read_has_not_changed(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another failure, and the next look tries again; but what is gone is gone."""
    monkeypatch.setattr(data, "_WAITS_S", (0.0, 0.0))
    server.headers["/x"] = {"Content-Length": "1"}
    guard = data.Guard({"train": of(f"{server.uri}/x", tmp_path)}, tmp_path)
    server.status = [503] * 3
    with pytest.raises(data.UnreadableError, match=r"sweep\.data\.train: .*/x cannot be read: 503"):
        guard.look()
    assert guard.look() is None
    monkeypatch.setattr(data, "_FRESH_S", 0.0)
    guard = data.Guard({"train": of(f"{server.uri}/x", tmp_path)}, tmp_path)
    del server.headers["/x"]
    said = guard.look()
    assert said is not None
    assert said.startswith(f"sweep.data.train: {server.uri}/x cannot be read: ")


def test_no_password_of_a_url_is_in_a_message(tmp_path: Path, server: Server) -> None:
    """Whatever part of fsspec has made it."""
    for path, status in (("/gone", []), ("/broken", [503])):
        server.status = list(status)
        uri = f"{server.uri.replace('//', '//u:planted@')}{path}"
        with pytest.raises(SweepError) as caught:
            of(uri, tmp_path)
        assert "u:***@127.0.0.1" in str(caught.value)
        assert "planted" not in str(caught.value)


# --- the guard ---------------------------------------------------------------------------------------------------


def test_what_was_found_counts_for_twenty_times_as_long_as_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most for ten seconds: small data are looked at before each start, large ones take little of the time."""
    now, looks, takes = 100.0, 0, 0.0

    def look(*_: object) -> None:
        nonlocal now, looks
        now, looks = now + takes, looks + 1

    monkeypatch.setattr(data, "_change", look)
    monkeypatch.setattr(data.time, "monotonic", lambda: now)
    guard = data.Guard({"train": Data(uri="d", digest="")}, tmp_path)
    for took, pause in ((0.0, 0.0), (0.01, 0.2), (0.2, 4.0), (3.0, 10.0)):
        takes, before = took, looks
        guard.look()
        assert looks == before + 1, took
        now += 0.99 * pause
        if pause:
            guard.look()
            assert looks == before + 1, took
        now += 0.02 * pause


# --- in a sweep --------------------------------------------------------------------------------------------------


def test_other_data_make_other_trials(make_project: MakeProject) -> None:
    """Their fingerprint is part of the identity: nothing is taken for done that has read something else."""
    project = make_project(FILES)
    assert project.run(*SWEEP, "x=1,2").returncode == 0
    assert "2 of 2 trials are complete already" in project.run(*SWEEP, "x=1,2").stderr
    (project.root / "data/b/c.txt").write_text("third\n")
    assert project.run(*SWEEP, "x=1,2").returncode == 0
    assert project.sweep("default").states() == {TrialState.COMPLETE: 4}


def test_data_are_inputs_of_the_runs_in_mlflow(make_project: MakeProject) -> None:
    """Of the sweep's and of each trial's, by name and digest."""
    import mlflow

    project = make_project(FILES)
    assert project.run(*SWEEP, "x=1,2").returncode == 0
    found = of("data", project.root)
    client = mlflow.MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'default'")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3
    for run in runs:
        [each] = run.inputs.dataset_inputs
        assert (each.dataset.name, each.dataset.digest) == ("train", found.digest[:36])
        assert json.loads(each.dataset.source) == {"uri": str(project.root / "data")}


def test_a_change_while_trials_wait_fails_them_and_names_the_file(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has started goes on; nothing starts with other data."""
    project = make_project(FILES)
    with project.start(*SWEEP, "x=1,2", "wait=true", "sweep.executor.slots=1") as running:
        running.until((project.root / "started").exists, "a trial runs")
        (project.root / "data/a.txt").write_text("others\n")
        (project.root / "go").touch()
        assert running.wait() == 1
    first, second = sorted(project.sweep("default").attempts, key=lambda each: each.started_at)
    assert first.state is TrialState.COMPLETE
    assert second.state is TrialState.FAIL
    assert second.message == (
        f"sweep.data.train: {project.root}/data/a.txt has changed since the sweep was submitted"
    )


def test_a_trial_is_tried_again_if_its_data_cannot_be_read(make_project: MakeProject, server: Server) -> None:
    """As after the loss of a worker; with what is read then, it starts."""
    project = make_project(FILES)
    server.headers["/x"] = {"Content-Length": "1"}
    server.status = [
        200,
        200,
        *[503] * 5,
    ]  # at submission; in the four tries of one look, and in the first of another
    assert project.run(*SWEEP, f"+sweep.data.other={server.uri}/x", "x=1").returncode == 0
    failed, complete = sorted(project.sweep("default").attempts, key=lambda each: each.started_at)
    assert (failed.kind, complete.kind) == (FailureKind.NODE_LOST, None)
    assert "/x cannot be read: 503" in (failed.message or "")


def test_wrong_data_are_one_line_before_anything_starts(make_bare_project: MakeProject) -> None:
    """A path that is not there, and something that is no path."""
    project = make_bare_project(FILES)
    for option, said in (
        ("+sweep.data.x=gone", f"sweep.data.x: {project.root}/gone is not there"),
        ("+sweep.data.x=3", "sweep.data.x: must be a path or a URI, got 3"),
    ):
        done = project.run("+sweep=default", "sweep.task=tasks.train", option)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [f"repro-sweep: {said}"]


# --- DVC ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracked(tmp_path: Path) -> Path:
    """A folder and a file that the real DVC tracks, and the output of one of its stages."""
    root = write(tmp_path / "repository", {"d/a": "1\n", "d/b/c": "2\n", "one.txt": "3\n"})
    dvc(root, "init", "-q", "--no-scm")
    dvc(root, "add", "-q", "d", "one.txt")
    dvc(root, "stage", "add", "-q", "--name", "make", "--outs", "made.txt", "echo 4 > made.txt")
    dvc(root, "repro", "-q")
    return root


def dvc(root: Path, *arguments: str) -> None:
    """Run DVC, in a place of its own."""
    place = {
        name: str(root.parent / "dvc")
        for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR")
    }
    env = environment({**place, "DVC_NO_ANALYTICS": "1"})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "dvc", *arguments],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["d", "one.txt", "made.txt"])
def test_dvcs_own_hash_is_the_fingerprint(tracked: Path, name: str) -> None:
    """Of a folder, of a file, and of what a stage makes (``dvc.lock``), with the data here or not."""
    import yaml

    here = of(name, tracked)
    beside = tracked / f"{name}.dvc"
    if beside.exists():
        [out] = yaml.safe_load(beside.read_text())["outs"]
    else:
        [out] = yaml.safe_load((tracked / "dvc.lock").read_text())["stages"]["make"]["outs"]
    assert here.digest == f"md5:{out['md5']}"
    (tracked / name).rename(tracked / "away")
    assert of(name, tracked).digest == here.digest


def test_data_that_are_not_what_dvc_says_are_refused(tracked: Path) -> None:
    """With the commands that help; after one of them it is well."""
    was = of("d", tracked)
    (tracked / "d").rename(tracked / "linked")
    write(tracked, {"d/a": "1\n", "d/b/c": "changed\n"})
    with pytest.raises(
        SweepError, match=r"sweep\.data\.train: .*/d is not what DVC has recorded .*'dvc commit'"
    ):
        of("d", tracked)
    dvc(tracked, "commit", "-q", "-f", "d")
    assert of("d", tracked).digest not in ("", was.digest)


@pytest.mark.parametrize(
    "content",
    [
        b"one\r\ntwo\r\n",
        b"\0one\r\n",
        b"\xff" * 400 + b"\r\n",
        "größer\r\n".encode(),
        b"",
        (b"a" * 1022 + b"\r\n") * 2000,
        b"a" * (2**20 - 1) + b"\r\n" + b"\0" * 2**20 + b"\r\n",
    ],
    ids=["text", "null", "binary", "umlauts", "empty", "long", "mixed"],
)
def test_what_dvc_2_tracks_has_its_hash(tmp_path: Path, content: bytes) -> None:
    """That was made of texts with the line ends of Unix, and has no ``hash: md5`` beside it."""
    from dvc_data.hashfile.hash import file_md5
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    write(tmp_path, {"d/a": "", "d/b": "1\r\n"})
    (tmp_path / "d/a").write_bytes(content)
    kind = "md5-dos2unix"
    tree = Tree()
    for name in ("a", "b"):
        tree.add((name,), None, HashInfo(kind, file_md5(str(tmp_path / "d" / name), name=kind)))
    tree.digest(name=kind)
    (tmp_path / "d.dvc").write_text(f"outs:\n- md5: {tree.oid}\n  path: d\n")
    assert of("d", tmp_path).digest == f"md5:{tree.oid}"
    one = file_md5(str(tmp_path / "d/a"), name=kind)
    (tmp_path / "d/a.dvc").write_text(f"outs:\n- md5: '{one}'\n  path: a\n")
    assert of("d/a", tmp_path).digest == f"md5:{one}"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("d.dvc", "outs: 3\n", "'outs' is no list of mappings"),
        ("d.dvc", "outs: [d]\n", "'outs' is no list of mappings"),
        ("d.dvc", "[outs]\n", "it is no mapping"),
        ("d.dvc", "outs: [\n", "while parsing a flow node"),
        ("dvc.lock", "stages: [make]\n", "'stages' is no mapping"),
        ("dvc.lock", "stages: {make: 3}\n", "a stage is no mapping but 3"),
        ("dvc.lock", "stages: {make: {outs: {path: d}}}\n", "'outs' is no list of mappings"),
    ],
)
def test_a_malformed_file_of_dvcs_is_one_line(tmp_path: Path, file: str, text: str, said: str) -> None:
    """That names it."""
    write(tmp_path, {"d/a": "1", file: text})
    with pytest.raises(SweepError) as caught:
        of("d", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / file} is no file of DVC's: {said}")


@pytest.mark.parametrize("text", ["", "outs:\n", "outs: []\n", "stages:\n", "stages: {make: {cmd: x}}\n"])
def test_where_dvc_has_recorded_nothing_the_bytes_count(tmp_path: Path, text: str) -> None:
    """Its files can be there and say nothing."""
    write(tmp_path, {"d/a": "1"})
    was = of("d", tmp_path)
    write(tmp_path, {"dvc.lock" if "stages" in text else "d.dvc": text})
    assert of("d", tmp_path) == was
