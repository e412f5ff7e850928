"""The report as a page: what a sweep has found, its best points and its figures, in one file that needs no network."""

from __future__ import annotations

import os
import tempfile
from html import escape
from pathlib import Path

from repro_sweep.ledger import Ledger
from repro_sweep.reporting.figures import Figure, figures_of
from repro_sweep.reporting.study import Findings, read
from repro_sweep.standings import (
    Row,
    columns,
    constraints_of,
    front_of,
    front_text,
    incomplete,
    infeasible_text,
    mean_and_std,
    trials_text,
    value_text,
)
from repro_sweep.states import Direction, TrialState

_SHOWN = 50
_TRIALS = 8
_CELL = 80
_HEIGHT_PX = 440

# No source at all may be loaded, so that whoever opens the file is told to nobody; plotly needs eval to draw in 3D.
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1.25rem 3rem; background: #fff; color: #1b1b1b;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .35rem 0; overflow-wrap: anywhere; }
pre { margin: .35rem 0; padding: .6rem .8rem; background: #f4f4f4; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.note { color: #555; font-size: .9rem; }
"""


def write(ledger: Ledger, path: Path) -> Path:
    """Write the page of a sweep (see ``reporting.write_report``); returns its path."""
    text = _page(read(ledger))
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # only its owner may read it
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def _page(findings: Findings) -> str:
    name = escape(findings.spec.name)
    body = [f"<h1>{name}</h1>", *_summary(findings), *_best(findings), *_table(findings)]
    first = True
    for number, figure in enumerate(figures_of(findings)):
        body.append(_section(figure, number, with_library=first))
        first = first and figure.drawn is None
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def _summary(findings: Findings) -> list[str]:
    """What is looked for, and how far the sweep is."""
    spec = findings.spec
    aims = ", ".join(f"{each.direction} <b>{escape(each.metric)}</b>" for each in spec.all_objectives)
    parts = [f"{count} {state.lower()}" for state, count in findings.counts.items() if count]
    parts += [f"{findings.cancelled} cancelled"] if findings.cancelled else []
    about = f"{aims[:1].upper()}{aims[1:]}. Sampler: {escape(spec.sampler)}."
    limits = [f"{each.metric} {each.operator} {each.bound:g}" for each in constraints_of(spec)]
    if limits:
        about += f" Constraints: {escape(', '.join(limits))}."
    points = len(findings.rows)
    trials = f"{sum(findings.counts.values())} trials" + (f" of {points} points" if spec.repeats else "")
    return [f"<p>{about}</p>", f"<p>{trials}: {', '.join(parts) or 'none yet'}.</p>"]


def _best(findings: Findings) -> list[str]:
    """The best point, or of several objectives the best one for each, with what makes it."""
    objectives = findings.spec.all_objectives
    front = front_of(findings.rows)
    if not front:
        ranked = any(row.rank is not None for row in findings.rows)
        why = "Every complete point violates a constraint." if ranked else "No point is complete yet."
        return [f"<h2>Best point</h2><p>{why}</p>"]
    if len(objectives) == 1:
        return ["<h2>Best point</h2>", *_point(findings, front[0], 0)]
    lines = [f"<h2>Best points</h2><p>{escape(front_text(objectives, len(front)))}.</p>"]
    for index, objective in enumerate(objectives):
        sign = -1.0 if objective.direction is Direction.MAXIMIZE else 1.0
        best = min(front, key=lambda row: (sign * (row.means[index] or 0.0), row.trials[0]))
        lines += _point(findings, best, index)
    return lines


def _point(findings: Findings, row: Row, index: int) -> list[str]:
    metric = findings.spec.all_objectives[index].metric
    number = row.trials[0] if row.best is None else row.best
    value = mean_and_std(row.means[index], row.stds[index])
    word = "trial" if len(row.trials) == 1 else "trials"
    best = f"; trial {number} is the best of them" if len(row.trials) > 1 and index == 0 else ""
    overrides = "\n".join(findings.overrides.get(number, ())) or "(no overrides)"
    return [
        f"<p><b>{escape(metric)} {value}</b>, {word} {', '.join(map(str, row.trials))}{best}</p>",
        f"<pre>{escape(overrides)}</pre>",
    ]


def _table(findings: Findings) -> list[str]:
    """The leaderboard: the best points; one that has no rank has none yet, or never will."""
    rows = findings.rows[:_SHOWN]
    if not rows:
        return []
    metrics = [each.metric for each in findings.spec.all_objectives]
    params = columns(findings.rows)
    remarks = [infeasible_text(row) for row in rows]
    head = ["#", *metrics, "n", "states", "trials", *(["remarks"] if any(remarks) else []), *params]
    lines = [f"<tr>{''.join(f'<th>{escape(each)}</th>' for each in head)}</tr>"]
    for row, remark in zip(rows, remarks, strict=True):
        cells = ["-" if row.rank is None else str(row.rank)]
        cells += map(mean_and_std, row.means, row.stds)
        cells += [
            str(row.n),
            _states(row),
            trials_text(row.trials, _TRIALS),
            *([remark] if any(remarks) else []),
        ]
        cells += [value_text(row.params[name]) if name in row.params else "" for name in params]
        lines.append(f"<tr>{''.join(map(_cell, cells))}</tr>")
    more = len(findings.rows) - len(rows)
    notes = [f"{more:,} more: repro-sweep rank {findings.spec.name}"] if more else []
    if findings.spec.repeats:
        notes.append("Values are means over a point's n complete repeats ± their standard deviation.")
    return [
        '<h2>Leaderboard</h2>\n<div class="wide"><table>',
        *lines,
        "</table></div>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
    ]


def _states(row: Row) -> str:
    complete = row.states[TrialState.COMPLETE]
    return ", ".join(filter(None, [f"{complete} COMPLETE" if complete else "", incomplete(row)]))


def _cell(text: str) -> str:
    if len(text) > 2 * _CELL:
        text = f"{text[: 2 * _CELL]}…"
    kind = ' class="long"' if len(text) > _CELL // 2 else ""
    return f"<td{kind}>{escape(text)}</td>"


def _section(figure: Figure, number: int, *, with_library: bool) -> str:
    lines: list[str] = [f"<h2>{escape(figure.title)}</h2>"]
    if figure.drawn is not None:
        drawn = figure.drawn.to_html(
            full_html=False,
            include_plotlyjs=with_library,
            config={"responsive": True, "displaylogo": False},
            default_width="100%",
            default_height=f"{_HEIGHT_PX}px",
            div_id=f"figure-{number}",
        )
        lines.append(f'<div class="wide"><div style="min-width: {figure.width}px">{drawn}</div></div>')
    if figure.note:
        kind = "" if figure.drawn is None else ' class="note"'
        lines.append(f"<p{kind}>{escape(figure.note.strip())}</p>")
    return "\n".join(lines)
