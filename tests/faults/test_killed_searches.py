"""A search whose coordinator dies goes on with the suggestions that it would have made."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import AGENT, wait_at_most
from helpers import Project, eventually, kill_all, projects
from search_helpers import FILES, Searched, searched

from repro_sweep.failpoints import ENVIRONMENT, SEARCH
from repro_sweep.states import TrialState

Size = Callable[[int, int], int]
ASKER = "repro_sweep.asker"
WAIT = "wait_s=0.15"


@pytest.fixture
def make_project(tmp_path: Path, empty_store: Path) -> Iterator[Callable[..., Project]]:
    """Makes projects with a search."""
    yield from projects(tmp_path, empty_store)


def command(slots: int, trials: int) -> tuple[str, ...]:
    return (
        "+sweep=search", "sweep.sampler.seed=7", f"sweep.executor.slots={slots}", f"sweep.budget.trials={trials}",
        "sweep.report=false", WAIT,
    )  # fmt: skip


def executions(project: Project) -> Counter[str]:
    """How often each trial was executed, by its number."""
    return Counter((project.root / "ran").read_text().split())


def killed_at_random(
    project: Project, arguments: tuple[str, ...], kills: int, rng: random.Random, span_s: float
) -> Searched:
    """Run a search to its end, with its coordinator killed so many times; its worker lives on."""
    done = 0
    while done < kills:
        with project.start(*arguments) as running:
            if wait_at_most(1.0 + rng.random() * span_s, lambda: running.process.poll() is not None):
                assert running.wait() == 0, running.stderr
                break
            running.process.kill()
            assert running.wait() == -signal.SIGKILL
        done += 1
    assert done >= min(kills, 3), "the search was over before it was killed"
    last = project.run(*arguments)
    assert last.returncode == 0, last.stderr
    return searched(project)


def test_a_search_with_one_slot_suggests_the_same_however_often_it_was_killed(
    make_project: Callable[..., Project], rng: random.Random, size: Size, figures: Callable[..., None]
) -> None:
    trials, kills = size(40, 150), size(6, 60)
    undisturbed, project = make_project(FILES, name="undisturbed"), make_project(FILES)
    arguments = command(1, trials)
    assert undisturbed.run(*arguments).returncode == 0
    found = killed_at_random(project, arguments, kills, rng, span_s=2.5)
    expected = searched(undisturbed).values()
    others = sum(one != other for one, other in zip(found.values(), expected, strict=True))
    figures(kills=kills, trials=trials, other_suggestions=others)
    assert found.values() == expected
    assert executions(project) == Counter(str(number) for number in range(trials))


@pytest.mark.parametrize(
    "options",
    [
        ("sweep/sampler=nsgaii", "sweep.sampler.population_size=6"),
        ("sweep/repeats_pruner=median", "+sweep.repeats.seed='range(2)'"),
    ],
    ids=["a sampler that remembers", "repeats that are pruned"],
)
def test_so_does_one_whose_state_is_more_than_its_trials(
    make_project: Callable[..., Project], rng: random.Random, size: Size, options: tuple[str, ...]
) -> None:
    trials, kills = size(14, 120), size(3, 40)
    undisturbed, project = make_project(FILES, name="undisturbed"), make_project(FILES)
    arguments = (*command(1, trials), *options)
    assert undisturbed.run(*arguments).returncode == 0
    found = killed_at_random(project, arguments, kills, rng, span_s=2.5)
    assert found.values() == searched(undisturbed).values()
    assert executions(project) == Counter(str(trial.number) for trial in found.trials)
    assert project.run("replay", "search").returncode == 0


def test_a_search_whose_trials_are_pruned_replays_however_often_it_was_killed(
    make_project: Callable[..., Project], rng: random.Random, size: Size
) -> None:
    """A trial that runs while there is no coordinator is not pruned, so what is found may differ."""
    trials, kills = size(30, 150), size(3, 40)
    project = make_project(FILES)
    arguments = (*command(4, trials), "sweep/pruner=median", "steps=6")
    found = killed_at_random(project, arguments, kills, rng, span_s=1.5)
    assert found.count(TrialState.COMPLETE) + found.count(TrialState.PRUNED) == len(found.trials) == trials
    assert found.count(TrialState.PRUNED) > 0
    assert executions(project) == Counter(str(number) for number in range(trials))
    replayed = project.run("replay", "search")
    assert replayed.returncode == 0, replayed.stderr


def test_a_search_with_four_slots_replays_however_often_it_was_killed(
    make_project: Callable[..., Project], rng: random.Random, size: Size, figures: Callable[..., None]
) -> None:
    trials, kills = size(80, 300), size(6, 60)
    project = make_project(FILES)
    found = killed_at_random(project, command(4, trials), kills, rng, span_s=1.5)
    figures(kills=kills, trials=trials)
    assert found.count(TrialState.COMPLETE) == len(found.trials) == trials
    assert [ask["suggestion"] for ask in found.asks()] == list(range(len(found.asks())))
    assert executions(project) == Counter(str(number) for number in range(trials))
    replayed = project.run("replay", "search")
    assert replayed.returncode == 0, replayed.stderr


@pytest.mark.parametrize("place", SEARCH)
def test_a_search_that_dies_between_a_suggestion_and_its_start_makes_it_again(
    make_project: Callable[..., Project], place: str
) -> None:
    undisturbed, project = make_project(FILES, name="undisturbed"), make_project(FILES)
    arguments = command(1, 8)
    assert undisturbed.run(*arguments).returncode == 0
    for count in (1, 3):
        with project.start(*arguments, env={ENVIRONMENT: f"{place}:{count}"}) as running:
            assert running.wait() == -signal.SIGKILL, f"{place}:{count} is not reached\n{running.stderr}"
    assert project.run(*arguments).returncode == 0
    assert searched(project).values() == searched(undisturbed).values()
    assert executions(project) == Counter(str(number) for number in range(8))


def test_a_search_goes_on_when_everything_of_it_was_killed(make_project: Callable[..., Project]) -> None:
    undisturbed, project = make_project(FILES, name="undisturbed"), make_project(FILES)
    arguments = command(1, 12)
    assert undisturbed.run(*arguments).returncode == 0
    ran = project.root / "ran"
    with project.start(*arguments) as running:
        running.until(lambda: ran.exists() and len(ran.read_text().split()) == 5, "five trials have begun")
        running.process.kill()
        assert running.wait() == -signal.SIGKILL
    for module in (AGENT, ASKER):
        end_leftovers_of(project, module)
    assert project.run(*arguments).returncode == 0
    assert searched(project).values() == searched(undisturbed).values()


def end_leftovers_of(project: Project, module: str) -> None:
    """Kill what a coordinator has left behind."""
    kill_all(project.processes_of(module))
    eventually(lambda: not project.processes_of(module), f"no {module} is left")
