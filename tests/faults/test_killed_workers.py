"""Whatever of a worker dies, its trials are run again, and go on where they were."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from chaos import AGENT, SLOTS, STEPS, ZYGOTE, Finished, Swarm, kill, wait_at_most
from helpers import Project
from tracking_helpers import points_in, points_of_ledger, runs_of

from repro_sweep.ledger import Ledger
from repro_sweep.states import FailureKind, TrialState

ROOT = Path(__file__).resolve().parents[2]

Size = Callable[[int, int], int]


def test_workers_zygotes_and_trials_killed_at_random_instants(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    rng: random.Random,
    size: Size,
    figures: Callable[..., None],
) -> None:
    """A trial that is killed is run again as often as it takes; one that has ended is not."""
    trials, kills = size(60, 500), size(12, 200)
    pause_s = 0.03
    expected = undisturbed(trials)
    swarm = make_swarm(trials, "sweep.retries.NODE_LOST=null", "sweep.retries.CRASH=null", pause_s=pause_s)
    swarm.hold(str(trials - 1))
    killed: Counter[str] = Counter()
    find = {
        "workers": lambda: swarm.pids(AGENT),
        "zygotes": lambda: swarm.pids(ZYGOTE),
        "trials": swarm.trial_pids,
    }
    with swarm.start() as command:
        while killed.total() < kills:
            left_s = (trials - swarm.count("end")) * (STEPS * pause_s + 0.02) / SLOTS
            at_s = rng.random() * (0.5 + 2 * left_s / (kills - killed.total()))
            assert not wait_at_most(at_s, lambda: command.process.poll() is not None), command.stderr
            what = rng.choice(list(find))
            command.until(find[what], f"there are {what}")
            pids = find[what]()
            if pids and kill(rng.choice(pids)):
                killed[what] += 1
        swarm.release()
        assert command.wait(600) == 0, command.stderr
    verdict = swarm.verdict(expected)
    figures(**{f"killed_{what}": killed[what] for what in find}, **verdict.counted)
    assert verdict.wrong == {}, verdict.remarks
    kinds = {attempt.kind for attempt in swarm.sweep.attempts if attempt.kind is not None}
    assert kinds <= {FailureKind.NODE_LOST, FailureKind.CRASH}
    assert verdict.attempts - trials <= SLOTS * killed.total()


def test_a_study_killed_in_the_middle_goes_on_from_its_last_epoch_and_ends_with_the_same_bits(
    make_project: Callable[..., Project], size: Size, figures: Callable[..., None]
) -> None:
    """Killed as a trial and with its whole worker; both attempts have one history."""
    epochs, kills = 40, size(2, 20)
    whole, cut = (make_project({}, name=name) for name in ("whole", "cut"))
    for project in (whole, cut):
        shutil.copytree(ROOT / "conf", project.root / "conf")
    command = [
        "+sweep=default", "sweep.name=digits", "sweep.task=sweeps.digits.train", "sweep.metric=val_accuracy",
        "sweep.retries.CRASH=null", "sweep.executor.slots=1", f"epochs={epochs}", "optimizer=SGD",
        f"seed=range({kills})", "model=lstm",
    ]  # fmt: skip
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    undisturbed = whole.run(*command, env=env)
    assert undisturbed.returncode == 0, undisturbed.stderr
    swarm = Swarm(cut, kills, (), "digits")
    done = 0
    with cut.start(*command, env=env) as running:
        while done < kills:
            number = done
            running.until(
                lambda number=number: _reported(cut, number) >= 2, f"trial {number} is in the middle"
            )
            pids = swarm.pids(AGENT) if done % 2 else swarm.trial_pids()
            done += sum(kill(pid) for pid in pids)
        assert running.wait(300) == 0, running.stderr
    again, more = _epochs_again(cut, epochs), _steps(cut, epochs)
    differing = sum(one != other for one, other in zip(_results(whole), _results(cut), strict=True))
    figures(
        kills=done,
        attempts=len(cut.sweep("digits").attempts),
        epochs_executed_again=again,
        steps_twice_or_missing=more,
        differing_results=differing,
    )
    assert done == kills
    assert differing == 0
    assert more == 0
    assert again <= kills  # one that was reported, but not yet in a checkpoint
    uri = f"sqlite:///{cut.root}/mlflow.db"
    ledger = Ledger.open(cut.root / "multirun/digits", readonly=True)
    for run in runs_of(uri):
        number = int(run.data.tags["repro_sweep.trial"])
        points = points_in(uri, run)
        assert sorted(points) == sorted(points_of_ledger(ledger, number))
        assert [step for key, _, step, _ in sorted(points) if key == "train_loss"] == list(range(epochs))
    ledger.close()


def _reported(project: Project, number: int) -> int:
    """How many epochs of a trial the ledger has, 0 where it does not run."""
    if not (project.root / "multirun/digits/ledger.db").exists():
        return 0
    attempts = [each for each in project.sweep("digits").attempts if each.trial == number]
    if attempts and attempts[-1].state is not TrialState.RUNNING:
        raise AssertionError(f"trial {number} has ended before it was killed")
    return sum(attempt.reports for attempt in attempts)


def _results(project: Project) -> list[tuple[dict[str, float], list[tuple[int, dict[str, float]]], bytes]]:
    """Final metrics, history and model of each trial."""
    ledger = Ledger.open(project.root / "multirun/digits", readonly=True)
    found = []
    for trial in sorted(ledger.trials(), key=lambda trial: trial.number):
        history = [(each.step, each.metrics) for each in ledger.reports(trial=trial.number)]
        model = project.root / "multirun/digits" / trial.directory / "artifacts/model.pt"
        found.append((ledger.attempts(trial.number)[-1].metrics, history, model.read_bytes()))
    ledger.close()
    return found


def _epochs_again(project: Project, epochs: int) -> int:
    attempts = project.sweep("digits").attempts
    return sum(attempt.reports for attempt in attempts) - epochs * len(
        {attempt.trial for attempt in attempts}
    )


def _steps(project: Project, epochs: int) -> int:
    ledger = Ledger.open(project.root / "multirun/digits", readonly=True)
    wrong = 0
    for number, _ in ledger.states():
        wrong += [each.step for each in ledger.reports(trial=number)] != list(range(epochs))
    ledger.close()
    return wrong
