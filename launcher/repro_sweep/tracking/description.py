"""The description of a sweep's run in MLflow: how far it is and its best points, as Markdown.

Pure, but for :class:`Board`, which remembers what it has read of a ledger. It is a marked part of the description:
what a user writes outside of it stays, and a part that a user has changed or taken away is not written again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from repro_sweep.ledger import Ledger
from repro_sweep.standings import (
    Entry,
    Row,
    columns,
    constraints_of,
    entries_of,
    front_of,
    front_text,
    mean_and_std,
    rank_points,
    trials_text,
    value_text,
)
from repro_sweep.states import TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking.encoding import clean, digest

TAG = "mlflow.note.content"
NOTE_LIMIT = 8000
"""Characters that MLflow takes; it would cut the rest off."""
OWN_LIMIT = 5000
"""Characters of our part: room is left for what a user adds."""
_LEAST = 200
_SHOWN = (10, 5, 2, 0)
_COLUMNS = 8
_CELL = 40
_TRIALS = 5
_GAP = "&emsp;"
_FEW = 100
"""Of more changed trials than this, the attempts of all are read at once."""

_OPEN = "<!-- repro-sweep {} writes this part; what stands above and below it is yours -->"
_CLOSE = "<!-- /repro-sweep -->"
_PART = re.compile(
    re.escape(_OPEN).replace(r"\{\}", "([0-9a-f]{8})") + r"(.*?)" + re.escape(_CLOSE), re.DOTALL
)
_SPECIAL = re.compile(r"[\\`*\[\]|<>&~#@:¨]|(?<!\w)_|_(?!\w)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a sweep is at one time. ``rows`` are its best points, ``points`` is how many it has."""

    counts: dict[TrialState, int]
    cancelled: int
    rows: Sequence[Row]
    points: int
    front: int


class Board:
    """The ranking of a sweep, kept in memory: only trials that have changed are read again."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._spec = ledger.spec
        self._entries: dict[int, Entry] = {}
        self._change = -1

    def look(self) -> Standing:
        """How the sweep is now.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        ledger, spec = self._ledger, self._spec
        changed = list(ledger.trials(changed_after=self._change))
        if changed:
            self._change = changed[-1].change
            attempts = (
                [each for trial in changed for each in ledger.attempts(trial.number)]
                if len(changed) <= _FEW
                else ledger.attempts()
            )
            self._entries |= {each.number: each for each in entries_of(spec, changed, attempts)}
        first, *more = (each.direction for each in spec.all_objectives)
        rows = rank_points(self._entries.values(), first, more=more, constraints=constraints_of(spec))
        cancelled = ledger.cancelled
        apart = cancelled | ledger.withdrawn
        return Standing(
            counts=Counter(each.state for each in self._entries.values() if each.number not in apart),
            cancelled=len(cancelled),
            rows=rows[: _SHOWN[0]],
            points=len(rows),
            front=len(front_of(rows)),
        )


def text_of(spec: SweepSpec, standing: Standing, links: Mapping[str, str], limit: int = OWN_LIMIT) -> str:
    """The description within a limit of characters, empty where that is too small; ``links`` are by their texts."""
    for shown in _SHOWN:
        # MLflow folds it after some lines: the links are seen at once
        about = " ".join(filter(None, [_summary(spec, standing), _links(links)]))
        text = clean("\n\n".join(filter(None, [about, _table(spec, standing, shown)])))
        if len(text) <= limit:
            return text
    return ""


def renewed(note: str | None, text: Callable[[int], str]) -> str | None:
    """The description with our part renewed; None where nothing is to be changed.

    Args:
        note: what stands there, None where there never was a description.
        text: our part within a limit of characters.
    """
    if note is None:
        return _marked(text(OWN_LIMIT))
    found = _PART.search(note)
    if found is None or digest(_plain(found[2])) != found[1]:  # a user's own
        return None
    room = NOTE_LIMIT - len(note) + len(found[0]) - len(_marked(""))
    ours = text(min(room, OWN_LIMIT)) if room >= _LEAST else ""
    if not ours or _plain(ours) == _plain(found[2]):
        return None
    return note[: found.start()] + _marked(ours) + note[found.end() :]


def _marked(text: str) -> str:
    return f"{_OPEN.format(digest(_plain(text)))}\n\n{text}\n\n{_CLOSE}"


def _plain(text: str) -> str:
    """What an editor leaves as it is."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def _summary(spec: SweepSpec, standing: Standing) -> str:
    aims = ", ".join(f"{each.direction} **{escaped(each.metric)}**" for each in spec.all_objectives)
    parts = [f"{standing.counts[state]:,} {state.lower()}" for state in TrialState if standing.counts[state]]
    parts += [f"{standing.cancelled:,} cancelled"] if standing.cancelled else []
    points = f" of {standing.points:,} points" if spec.repeats else ""
    total = sum(standing.counts.values()) + standing.cancelled
    text = f"{aims[:1].upper()}{aims[1:]}. {total:,} trials{points}: {', '.join(parts) or 'none yet'}."
    if len(spec.all_objectives) > 1 and standing.front:
        text += f" {_escaped(front_text(spec.all_objectives, standing.front))}."
    return text


def _table(spec: SweepSpec, standing: Standing, shown: int) -> str:
    """The best points; nothing as long as none of them has a value."""
    rows = [row for row in standing.rows if row.n][:shown]
    if not rows:
        return ""
    params = columns(rows)
    kept = params[:_COLUMNS]
    metrics = [each.metric for each in spec.all_objectives]
    lines = [_line(["#", *metrics, "n", *kept, "trials"])]
    lines.append("|" + " --- |" * (len(metrics) + len(kept) + 3))
    for row in rows:
        cells = ["-" if row.rank is None else str(row.rank), *map(mean_and_std, row.means, row.stds)]
        cells.append(str(row.n))
        cells += [value_text(row.params[name]) if name in row.params else "" for name in kept]
        lines.append(_line([*cells, trials_text(row.trials, _TRIALS)]))
    more = []
    if standing.points > len(rows):
        more.append(f"{standing.points - len(rows):,} more points: `repro-sweep rank {_code(spec.name)}`")
    if len(params) > len(kept):
        more.append(f"{len(params) - len(kept)} more parameters")
    return "\n".join(lines) + (f"\n\n{'; '.join(more)}" if more else "")


def _links(links: Mapping[str, str]) -> str:
    return " · ".join(f"[{escaped(text)}]({address})" for text, address in links.items())


def _line(cells: Sequence[str]) -> str:
    """A row of a table; MLflow's pages have nothing between columns, and would break values that have spaces."""
    shown = (escaped(cell).replace(" ", "\N{NO-BREAK SPACE}") for cell in cells)
    return f"| {f'{_GAP} | '.join(shown)}{_GAP} |"


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def escaped(text: str) -> str:
    """A text of one line as Markdown that shows it as it is; too much of it is cut off."""
    line = " ".join(text.split())
    if len(line) > _CELL:
        line = f"{line[: _CELL - 1]}…"
    return _escaped(line)


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", text)
