"""A team's server: many sweeps of several users at once, each with an account, and users who lose access."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from helpers import MakeProject, Project, environment, eventually
from team_server import TeamServer, postgres, team_server
from tracking_helpers import (
    add_trial,
    end,
    make_ledger,
    points_in,
    points_of_ledger,
    report,
    run_trial,
    runs_of,
    start,
)

import repro_sweep
from repro_sweep.errors import TrackingError
from repro_sweep.ledger import Ledger
from repro_sweep.tracking import access
from repro_sweep.tracking.base import Trouble
from repro_sweep.tracking.mlflow import MlflowTracker
from repro_sweep.tracking.store import prepare_environment

USERS = ("ada", "bob", "eve")
SHARED = "shared"
FILES = {
    "conf/config.yaml": "x: 0\n",
    "tasks.py": """
        import time
        from pathlib import Path
        import repro_sweep

        def train(cfg):
            Path(f"started-{cfg.x}").write_text("")
            deadline = time.monotonic() + 250
            while cfg.x > 0 and not Path("open").exists():
                assert time.monotonic() < deadline, "nobody has opened the gate"
                time.sleep(0.02)
            for step in range(3):
                repro_sweep.report(step, loss=cfg.x + 1 / (step + 1))
            return {"score": float(cfg.x)}
    """,
}
_DRAIN = """
import sys, threading
from pathlib import Path
from tracking_helpers import drain
from repro_sweep.tracking.store import prepare_environment
prepare_environment()
threads = [threading.Thread(target=drain, args=(Path(each),), kwargs={"timeout_s": 240}) for each in sys.argv[1:]]
[each.start() for each in threads]
[each.join() for each in threads]
"""


@dataclass
class Team:
    """A server with three users, who may all write into one experiment, and each into one of their own."""

    server: TeamServer
    passwords: dict[str, str] = field(default_factory=dict)

    def variables(self, user: str) -> dict[str, str]:
        """What a user's commands have in their environment."""
        return self.server.environment(user, self.passwords[user])

    def experiment(self, name: str, owner: str) -> str:
        """A new experiment; returns its id."""
        import requests

        done = requests.post(
            f"{self.server.uri}/api/2.0/mlflow/experiments/create",
            json={"name": name}, auth=(owner, self.passwords[owner]), timeout=60,
        )  # fmt: skip
        assert done.status_code == 200, done.text
        return str(done.json()["experiment_id"])

    def grant(self, user: str, experiment: str, permission: str, *, again: bool = False) -> None:
        """Say what a user may do with an experiment; ``again``: in place of what was said before."""
        about = {"username": user, "resource_type": "experiment", "resource_id": experiment}
        if again:
            self.server.call("POST", "3.0/mlflow/users/permissions/revoke", about)
        self.server.call("POST", "3.0/mlflow/users/permissions/grant", {**about, "permission": permission})

    def change_password(self, user: str) -> str:
        """Give a user another password, and wait until no process of the server takes the old one; returns the old."""
        import requests

        old, new = self.passwords[user], f"changed-{time.monotonic_ns()}"
        self.server.call("PATCH", "2.0/mlflow/users/update-password", {"username": user, "password": new})
        self.passwords[user] = new

        def refused() -> bool:
            url = f"{self.server.uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
            answers = [requests.get(url, auth=(user, old), timeout=60).status_code for _ in range(6)]
            return set(answers) == {401}

        eventually(refused, "the old password is refused")
        return old

    def counts(self) -> str:
        """How much is in the server's store."""
        named = self.server.postgres.execute(
            "SELECT datname FROM pg_database WHERE datname ~ '^t[0-9a-f]{8}$'"
        )
        return self.server.postgres.execute(
            "SELECT (SELECT count(*) FROM experiments), (SELECT count(*) FROM runs), (SELECT count(*) FROM tags)",
            named,
        )


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """One PostgreSQL and one server for all of these tests."""
    with (
        postgres() as database,
        team_server(tmp_path_factory.mktemp("team"), database, cached_s=2) as server,
    ):
        made = Team(server)
        for user in USERS:
            made.passwords[user] = server.create_user(user)
        shared = made.experiment(SHARED, "ada")
        for user in USERS[1:]:
            made.grant(user, shared, "EDIT")
        yield made


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a tracker's own process, and with a home that has no credentials."""
    before = dict(os.environ)
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare_environment()
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def become(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    """Let this process have a user's credentials."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


class Tracking:
    """A tracker that works in this process, in a thread of its own, until the block ends."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._woken = threading.Event()
        self._finish = threading.Event()
        self._stop = False
        self.progress: Any = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        tracker = MlflowTracker(self._directory, wake=self._woken.set)
        told = False
        try:
            while not self._stop:
                if self._finish.is_set() and not told:
                    tracker.finish()
                    told = True
                delay = tracker.sync()
                self.progress = tracker.progress
                self._woken.wait(delay)
                self._woken.clear()
        finally:
            tracker.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._woken.set()
        self._thread.join()

    def until(self, holds: Callable[[Any], object], what: str) -> None:
        """Wait until what the tracker says of itself is so."""
        eventually(lambda: self.progress is not None and holds(self.progress), f"{what}: {self.progress}")

    def finish(self) -> None:
        """Let it send all, and wait until it has."""
        self._finish.set()
        self._woken.set()
        self.until(lambda progress: progress.done, "it is done")
        assert self.progress.left == 0, self.progress


def assert_whole(ledger: Ledger, uri: str) -> None:
    """Of a sweep there is one run, and one of each trial with exactly the points of the ledger."""
    sweep_id = ledger.spec.sweep_id
    runs = runs_of(uri, sweep_id=sweep_id)
    assert [int(run.data.tags["repro_sweep.trial"]) for run in runs] == [
        number for number, _ in ledger.states()
    ]
    assert len(runs_of(uri, sweep=True, sweep_id=sweep_id)) == 1
    for number, run in enumerate(runs):
        points = points_in(uri, run)
        assert sorted(points) == sorted(points_of_ledger(ledger, number)), (ledger.spec.name, number)
        assert set(run.data.metrics) >= set(ledger.attempts(number)[-1].metrics)


def finished_ledger(
    directory: Path, team: Team, name: str, experiment: str = SHARED, trials: int = 3
) -> Ledger:
    """A sweep that has ended, of which MLflow has nothing yet."""
    ledger = make_ledger(directory, team.server.uri, name=name, experiment=experiment)
    for number in range(trials):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 0.5 + number / 10}, steps=5)
    return ledger


def sweep(name: str, *more: str, experiment: str = SHARED, x: str = "0,-1,-2") -> tuple[str, ...]:
    """A command line."""
    return (
        "+sweep=default", "sweep.task=tasks.train", "sweep.metric=score", f"sweep.name={name}", f"x={x}",
        "sweep.executor.slots=1", f"sweep.tracking.experiment={experiment}", *more,
    )  # fmt: skip


def test_ten_sweeps_of_three_users_at_once_are_whole_and_each_user_reads_the_others(
    team: Team, make_bare_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers = [finished_ledger(tmp_path / f"made{i}", team, f"made{i}") for i in range(7)]
    mine = {
        user: [each for i, each in enumerate(ledgers) if i % 3 == index] for index, user in enumerate(USERS)
    }
    project = make_bare_project(FILES)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    draining = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _DRAIN, *(each.path.parent for each in mine[user])],
            env=environment({**team.variables(user), "PYTHONPATH": path}), stderr=subprocess.PIPE,
        )
        for user in USERS
    ]  # fmt: skip
    running = {user: project.start(*sweep(f"real-{user}"), env=team.variables(user)) for user in USERS}
    for process in draining:
        _, said = process.communicate(timeout=400)
        assert (process.returncode, said) == (0, b"")
    for user, command in running.items():
        with command:
            assert command.wait(400) == 0, command.stderr
            ledgers.append(Ledger.open(project.root / "multirun" / f"real-{user}", readonly=True))
    become(monkeypatch, team.server.environment())
    for ledger in ledgers:
        assert_whole(ledger, team.server.uri)
    for user in USERS:
        become(monkeypatch, team.variables(user))
        assert [repro_sweep.best_trial(f"made{i}").metrics["accuracy"] for i in (0, 1, 2)] == [0.7] * 3
        assert [repro_sweep.best_trial(f"real-{each}").metrics["score"] for each in USERS] == [0.0] * 3
    for ledger in ledgers:
        ledger.close()


def test_who_may_not_write_is_told_before_anything_is_made(
    team: Team, make_bare_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = team.server.uri
    team.experiment("adas", "ada")
    hidden = team.experiment("hidden", "ada")
    team.grant("eve", hidden, "DENY")
    before = team.counts()
    good = team.variables("bob")
    for variables, experiment, says in [
        (
            good | {"MLFLOW_TRACKING_PASSWORD": "wrong"},
            SHARED,
            "refuses the credentials of user 'bob', from MLFLOW_",
        ),
        (good | {"MLFLOW_TRACKING_USERNAME": "nobody"}, SHARED, "refuses the credentials of user 'nobody'"),
        ({}, SHARED, "wants credentials (401), of nobody: there are none: set MLFLOW_TRACKING_USERNAME and"),
        (
            {"MLFLOW_TRACKING_TOKEN": "expired"},
            SHARED,
            "does not know the token in MLFLOW_TRACKING_TOKEN: it wants a user and a password",
        ),
        (
            good,
            "adas",
            "does not let user 'bob' write into experiment 'adas' (403): the permission EDIT is lacking",
        ),
        (team.variables("eve"), "hidden", "does not let user 'eve' read experiment 'hidden' (403)"),
    ]:
        with pytest.raises(TrackingError) as raised:
            access.check(uri, experiment, {"HOME": str(tmp_path), **variables})
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)
    for user, experiment in [("bob", SHARED), ("bob", "one that is new"), ("ada", "adas"), ("ada", "hidden")]:
        assert access.check(uri, experiment, {"HOME": str(tmp_path), **team.variables(user)}) is None
    assert access.check(uri, "adas", {"HOME": str(tmp_path), **team.server.environment()}) is None
    project = make_bare_project(FILES)
    done = project.run(*sweep("denied", experiment="adas"), env=good)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(
        f"repro-sweep: MLflow at {uri} does not let user 'bob' write into experiment 'adas' (403)"
    )
    assert not (project.root / "multirun").exists()
    assert team.counts() == before
    become(monkeypatch, good | {"MLFLOW_TRACKING_PASSWORD": "wrong"})
    with pytest.raises(TrackingError, match=r"it refuses the credentials of user 'bob' \(401\)$"):
        repro_sweep.best_trial("anything")


def test_results_in_a_hidden_experiment_are_not_to_be_had(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = team.experiment("secret", "ada")
    ledger = finished_ledger(tmp_path / "secret", team, "secret-sweep", experiment="secret", trials=1)
    become(monkeypatch, team.variables("ada"))
    with Tracking(ledger.path.parent) as tracking:
        tracking.finish()
    assert repro_sweep.best_trial("secret-sweep").metrics == {"accuracy": 0.5, "loss": pytest.approx(0.2)}
    team.grant("eve", secret, "DENY")
    become(monkeypatch, team.variables("eve"))
    with pytest.raises(TrackingError, match="no sweep named 'secret-sweep'"):
        repro_sweep.best_trial("secret-sweep")


def test_a_password_that_is_changed_while_a_sweep_runs_loses_nothing(
    team: Team, make_bare_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project: Project = make_bare_project(FILES)
    command = sweep("renewed", x="0,1,2")
    with project.start(*command, env=team.variables("ada")) as running:
        running.until((project.root / "started-1").exists, "a trial runs")
        running.until(lambda: len(_done_runs(team, "renewed")) == 1, "the first trial is in MLflow")
        old = team.variables("ada") | {"MLFLOW_TRACKING_PASSWORD": team.change_password("ada")}
        (project.root / "open").write_text("")
        running.until(lambda: "refuses the credentials of user 'ada' (401)" in running.stderr, "it says so")
        assert running.wait(120) == 0, running.stderr
        said = running.stderr
    assert f"MLflow at {team.server.uri}: it refuses the credentials of user 'ada' (401): " in said
    assert "wait, and their results are safe" in said
    refused = project.run("sync", "renewed", env=old)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "refuses the credentials of user 'ada', from MLFLOW_TRACKING_USERNAME" in refused.stderr
    synced = project.run("sync", "renewed", env=team.variables("ada"))
    assert synced.returncode == 0, synced.stderr
    assert synced.stderr.endswith(f"repro-sweep: MLflow has all of sweep renewed ({team.server.uri})\n")
    ledger = Ledger.open(project.root / "multirun" / "renewed", readonly=True)
    become(monkeypatch, team.server.environment())
    assert_whole(ledger, team.server.uri)
    ledger.close()
    assert json.loads(project.run("status", "renewed", "--json").stdout)["not_in_mlflow"] == 0


def _done_runs(team: Team, name: str) -> list[dict[str, Any]]:
    condition = f"tags.`repro_sweep.sweep` = '{name}' and attributes.status = 'FINISHED'"
    experiments = [team.server.call("GET", f"2.0/mlflow/experiments/get-by-name?experiment_name={SHARED}")]
    ids = [each["experiment"]["experiment_id"] for each in experiments]  # type: ignore[index]
    found = team.server.call("POST", "2.0/mlflow/runs/search", {"experiment_ids": ids, "filter": condition})
    return found.get("runs", [])  # type: ignore[return-value]


def test_a_permission_that_is_taken_away_and_given_back_while_a_sweep_runs_loses_nothing(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = team.experiment("lent", "ada")
    team.grant("bob", lent, "EDIT")
    ledger = make_ledger(tmp_path / "lent", team.server.uri, name="lent", experiment="lent")
    become(monkeypatch, team.variables("bob"))
    for number in range(4):
        add_trial(ledger, number)
    run_trial(ledger, 0, {"accuracy": 0.5})
    attempt = start(ledger, 1)
    report(ledger, 1, attempt, range(2))
    with Tracking(tmp_path / "lent") as tracking:
        tracking.until(lambda progress: progress.left == 0, "all so far is sent")
        team.grant("bob", lent, "READ", again=True)
        report(ledger, 1, attempt, range(2, 4))
        end(ledger, 1, attempt, {"accuracy": 0.9})
        run_trial(ledger, 2, {"accuracy": 0.7})
        tracking.until(lambda progress: progress.trouble is Trouble.DENIED, "it is denied")
        assert tracking.progress.error == "it does not let user 'bob' write into experiment 'lent' (403)"
        run_trial(ledger, 3, {"accuracy": 0.8})
        tracking.until(lambda progress: progress.left >= 3, "it goes on gathering")
        assert not tracking.progress.done
        team.grant("bob", lent, "EDIT", again=True)
        tracking.finish()
        assert tracking.progress.trouble is None
    assert_whole(ledger, team.server.uri)


def _never_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tracker that was denied wait for hours, if nothing tells it better."""
    monkeypatch.setattr("repro_sweep.tracking.mlflow._PAUSE_S", 10_000.0)
    monkeypatch.setattr("repro_sweep.tracking.mlflow._LONGEST_PAUSE_S", 10_000.0)


def test_credentials_that_are_renewed_in_the_file_are_taken_up_by_a_tracker_that_runs(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _never_by_itself(monkeypatch)
    become(monkeypatch, {"MLFLOW_TRACKING_URI": team.server.uri})
    file = tmp_path / ".mlflow" / "credentials"
    file.parent.mkdir()

    def write() -> None:
        file.write_text(
            f"[mlflow]\nmlflow_tracking_username = eve\nmlflow_tracking_password = {team.passwords['eve']}\n"
        )

    write()
    ledger = finished_ledger(tmp_path / "rotated", team, "rotated", trials=2)
    add_trial(ledger, 2)
    with Tracking(tmp_path / "rotated") as tracking:
        tracking.until(lambda progress: progress.left == 0, "all so far is sent")
        team.change_password("eve")
        run_trial(ledger, 2, {"accuracy": 0.9})
        tracking.until(lambda progress: progress.trouble is Trouble.DENIED, "it is denied")
        assert tracking.progress.error == "it refuses the credentials of user 'eve' (401)"
        write()
        tracking.until(lambda progress: progress.left == 0, "the new ones are used")
        tracking.finish()
    assert_whole(ledger, team.server.uri)


def test_a_run_that_was_removed_for_good_comes_back_though_the_server_only_says_that_it_is_denied(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = finished_ledger(tmp_path / "removed", team, "removed", trials=1)
    add_trial(ledger, 1)
    attempt = start(ledger, 1)
    report(ledger, 1, attempt, range(2))
    become(monkeypatch, team.variables("bob"))
    with Tracking(tmp_path / "removed") as tracking:
        tracking.until(lambda progress: progress.left == 0, "all so far is sent")
        first, second = runs_of(team.server.uri, sweep_id=ledger.spec.sweep_id)
        _remove(team, second.info.run_id)
        report(ledger, 1, attempt, range(2, 4))
        end(ledger, 1, attempt, {"accuracy": 0.9})
        tracking.finish()
    assert_whole(ledger, team.server.uri)
    again = runs_of(team.server.uri, sweep_id=ledger.spec.sweep_id)
    assert again[0].info.run_id == first.info.run_id
    assert again[1].info.run_id != second.info.run_id


def _remove(team: Team, run_id: str) -> None:
    """What ``mlflow gc`` does."""
    named = team.server.postgres.execute("SELECT datname FROM pg_database WHERE datname ~ '^t[0-9a-f]{8}$'")
    tables = ("tags", "params", "metrics", "latest_metrics", "runs")
    statements = "".join(f"DELETE FROM {each} WHERE run_uuid = '{run_id}';" for each in tables)
    team.server.postgres.execute(statements, named)


def test_a_trial_of_an_experiment_that_may_only_be_read_is_not_reproduced_there(
    team: Team, make_bare_project: MakeProject
) -> None:
    team.experiment("read", "ada")
    project = make_bare_project(FILES)
    made = project.run(*sweep("original", experiment="read", x="-7"), env=team.variables("ada"))
    assert made.returncode == 0, made.stderr
    refused = project.run("reproduce", "original/0", env=team.variables("bob"))
    assert refused.returncode == 2, refused.stderr
    [line] = refused.stderr.splitlines()
    assert "does not let user 'bob' write into experiment 'read' (403)" in line
    assert line.endswith("; --experiment names another one for the new runs")
    assert not (project.root / "reproduced").exists()
    done = project.run("reproduce", "original/0", "--experiment", SHARED, env=team.variables("bob"))
    assert done.returncode == 0, done.stderr
    assert "EXACT" in done.stdout
    assert "the verdict cannot be noted in MLflow" in done.stderr


def test_a_tracker_that_dies_before_it_speaks_has_not_sent_everything(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from repro_sweep.cli import sync
    from repro_sweep.tracking import child

    ledger = finished_ledger(tmp_path / "dead", team, "dead", trials=2)
    ledger.close()
    monkeypatch.setattr(child, "_MODULE", "there.is.no.such.module")
    become(monkeypatch, team.variables("bob"))
    assert sync.main([str(tmp_path / "dead")]) == 1
    assert "MLflow still lacks 3 runs of sweep" in capsys.readouterr().err
