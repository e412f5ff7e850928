"""The benchmarks' report says what was measured, and the exit status whether it is good enough."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import __main__ as command
from benchmarks import asha, functions, quality, virtual
from benchmarks.report import OURS, Row, Table, Target, markdown, number
from benchmarks.spans import Span, busy_share, handouts, quantile

X = {"x": "interval(0.0, 1.0)"}


def table(value: float, limit: float) -> Table:
    return Table(
        title="noop",
        text="A task.",
        unit="ms a trial",
        rows=[Row(system=OURS, value=value, note="tracked"), Row(system="a peer", value=10 * value)],
        ideal=value / 2,
        ideal_is="a fork",
        targets=[Target(what="a trial", value=value, limit=limit, unit="ms")],
    )


def test_a_table_shows_each_figure_with_its_ratio_to_ours_and_to_the_ideal() -> None:
    assert markdown(table(12.0, 15.0)) == (
        "## noop\n\nA task.\n\n"
        "| system          | ms a trial | / repro-sweep | / ideal | remarks |\n"
        "| --------------- | ---------: | ------------: | ------: | ------- |\n"
        "| *ideal: a fork* |       6.00 |         0.500 |    1.00 |         |\n"
        "| **repro-sweep** |       12.0 |          1.00 |    2.00 | tracked |\n"
        "| a peer          |        120 |          10.0 |    20.0 |         |\n\n"
        "- Target: a trial at most 15.0 ms; measured 12.0 ms: reached.\n"
    )


def test_a_table_of_several_figures_a_line_shows_its_own_grid() -> None:
    shown = Table(
        title="quality", text="Best.", unit="", rows=(), grid=(("function", "ours"), ("Levy", "1.5"))
    )
    assert markdown(shown) == (
        "## quality\n\nBest.\n\n| function | ours |\n| -------- | ---: |\n| Levy     |  1.5 |\n"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0293, "0.029"), (2.345, "2.35"), (48.61, "48.6"), (10_000, "10,000")]
)
def test_figures_have_about_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "options", "status"), [(12, [], 0), (16, [], 1), (16, ["--no-check"], 0)])
def test_a_missed_target_is_the_exit_status(
    value: float, options: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BENCHMARKS", {"noop": lambda _folder, *, quick: table(value, 15.0)})
    monkeypatch.setattr(command, "GROUPS", {"one": ("noop",)})
    report = tmp_path / "docs/report.md"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--output", str(report), *options])
    assert command.main() == status
    assert ("**MISSED**" in report.read_text(encoding="utf-8")) == (value > 15)


def spans(*rows: tuple[str, float, float]) -> list[Span]:
    return [
        Span(trial=number, slot=slot, started_s=start, ended_s=end)
        for number, (slot, start, end) in enumerate(rows)
    ]


def test_slots_that_are_never_empty_are_wholly_busy() -> None:
    assert busy_share(spans(("a", 10, 12), ("b", 10, 14), ("a", 12, 20)), 2) == pytest.approx(1.0)


def test_a_gap_on_one_of_two_slots_counts_for_half_of_its_time() -> None:
    assert busy_share(spans(("a", 0, 4), ("b", 0, 9), ("a", 8, 9)), 2) == pytest.approx(1 - 4 / 16)


def test_what_runs_after_the_last_start_does_not_make_slots_busier() -> None:
    early = spans(("a", 0, 1), ("b", 1, 2), ("a", 2, 3))
    late = spans(("a", 0, 1), ("b", 1, 2), ("a", 2, 300))
    assert busy_share(early, 2) == busy_share(late, 2) == pytest.approx(0.5)


def test_a_handout_is_the_time_between_two_trials_of_one_slot_whatever_the_order_of_the_rows() -> None:
    rows = spans(("a", 3.5, 4), ("b", 0, 1), ("a", 0, 3), ("b", 1.25, 9))
    assert sorted(handouts(rows)) == [0.25, 0.5]


@pytest.mark.parametrize(("share", "value"), [(0.5, 5), (0.95, 10), (0.9, 9), (0.0, 1), (1.0, 10)])
def test_a_quantile_is_a_value_that_so_many_do_not_exceed(share: float, value: float) -> None:
    assert quantile([3, 1, 2, 10, 9, 8, 7, 6, 5, 4], share) == value


def test_simulated_time_jumps_to_what_is_due_next() -> None:
    async def wait() -> float:
        await asyncio.gather(asyncio.sleep(5000), asyncio.sleep(86_400))
        return asyncio.get_running_loop().time()

    loop = virtual.VirtualLoop()
    try:
        assert loop.run_until_complete(wait()) == pytest.approx(86_400)
    finally:
        loop.close()


def test_a_simulation_in_which_nothing_can_happen_any_more_says_so() -> None:
    loop = virtual.VirtualLoop()
    try:
        future = loop.create_future()
        with pytest.raises(virtual.StuckError, match="nothing is left"):
            loop.run_until_complete(future)
    finally:
        loop.close()


def x_of(params: Mapping[str, Any]) -> float:
    return float(params["x"])


def simulated(durations: list[float], slots: int, seed: int = 0) -> list[float]:
    # all are start-up trials of the sampler, so that what it suggests does not depend on what has ended
    return virtual.ours(X, x_of, durations, slots=slots, seed=seed, options={"n_startup_trials": 100})


def test_a_simulated_search_with_one_slot_ends_its_trials_in_their_order() -> None:
    assert simulated([1, 5, 2, 1], 1) == simulated([1, 1, 1, 1], 1)
    assert simulated([1, 1, 1, 1], 1) != simulated([1, 1, 1, 1], 1, seed=1)


def test_a_simulated_search_runs_other_trials_while_a_long_one_holds_its_slot() -> None:
    first, *others = simulated([1, 1, 1, 1], 1)
    assert simulated([10, 1, 1, 1], 2) == [*others, first]


def test_a_simulated_search_never_runs_more_trials_than_it_has_slots() -> None:
    first, second, third, fourth = simulated([1, 1, 1, 1], 1)
    # the short last one ends first if it may start before a slot is free
    assert simulated([3, 4, 5, 0.5], 2) == [first, second, fourth, third]
    assert simulated([3, 4, 5, 0.5], 4) == [fourth, first, second, third]


def test_a_simulated_search_tells_its_sampler_what_came_out() -> None:
    options = {"n_startup_trials": 5, "multivariate": True}
    durations = [1.0] * 40
    found = virtual.ours(X, x_of, durations, slots=2, seed=0, options=options)
    assert len(found) == 40
    assert sum(found[20:]) / 20 < 0.5 * sum(found[:5]) / 5


def test_simulated_slots_under_ask_and_tell_end_trials_in_the_order_of_time() -> None:
    def run(durations: list[float], slots: int) -> list[float]:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        return virtual.asked_and_told(
            study, lambda trial: {"x": trial.suggest_float("x", 0, 1)}, x_of, durations, slots=slots
        )

    first, second, third, fourth = run([1, 1, 1, 1], 1)
    assert run([3, 4, 5, 0.5], 2) == [first, second, fourth, third]


def test_a_mean_that_is_larger_by_more_than_two_standard_errors_is_worse() -> None:
    theirs = [0.0, 1.0, 2.0, 3.0, 4.0]  # a variance of 2.5: an error of 1 for the difference of two
    assert quality.difference(theirs, theirs).error == pytest.approx(1.0)
    assert not quality.difference([value + 1.99 for value in theirs], theirs).is_worse
    assert quality.difference([value + 2.01 for value in theirs], theirs).is_worse
    assert not quality.difference([value - 9.0 for value in theirs], theirs).is_worse


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("Branin", [3.14159265, 2.275]),
        ("Hartmann, 6-D", [0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573]),
        ("Rosenbrock, 5-D", [1.0] * 5),
        ("Ackley, 5-D", [0.0] * 5),
        ("Levy, 5-D", [1.0] * 5),
    ],
)
def test_standard_functions_have_their_known_minima(name: str, point: list[float]) -> None:
    function = next(each for each in functions.FUNCTIONS if each.name == name)
    params = {f"x{index}": value for index, value in enumerate(point)}
    assert function.evaluate(params) == pytest.approx(function.least, abs=1e-5)


@pytest.mark.parametrize("function", functions.FUNCTIONS, ids=lambda function: function.name)
def test_our_space_and_optunas_of_a_function_have_the_same_domains(function: functions.Function) -> None:
    from repro_sweep.config.space import Space
    from repro_sweep.search.study import _distribution

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    theirs: dict[str, str] = {}
    for _ in range(20):
        trial = study.ask()
        function.evaluate(function.suggest(trial))
        theirs |= {name: str(each) for name, each in trial.distributions.items()}
    ours = [
        str(_distribution(each.domain)) for each in Space(params=function.params, search=True).parameters()
    ]
    assert sorted(theirs.values()) == sorted(ours)


def test_the_best_setting_of_the_stand_in_for_tuning_has_its_least_value() -> None:
    best = {"optimizer": "Adam", "lr": 10**-2.5, "beta1": 0.92, "width": 128, "layers": 3, "dropout": 0.2}
    assert functions.tuning(best) == pytest.approx(0.08)


def test_the_standard_error_of_an_accuracy_shrinks_with_the_root_of_the_images() -> None:
    assert asha.standard_error(0.5, 100) == pytest.approx(0.05)
    assert asha.standard_error(0.98, 400) == pytest.approx(0.007)
