"""The benchmarks' report says what was measured, and the exit status whether it is good enough."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import __main__ as command
from benchmarks.report import OURS, Row, Table, Target, markdown, number


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
    report = tmp_path / "docs/report.md"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--output", str(report), *options])
    assert command.main() == status
    assert ("**MISSED**" in report.read_text(encoding="utf-8")) == (value > 15)
