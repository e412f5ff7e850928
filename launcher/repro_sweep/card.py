"""A reproducibility card of a sweep, after the machine learning reproducibility checklist of Pineau et al. (2020).

Source: https://arxiv.org/abs/2003.12206. Nothing is invented: what MLflow does not have is said to be unknown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from repro_sweep.originals import Original
from repro_sweep.provenance.record import TrialRecord
from repro_sweep.ranking import Ranking, Row, Trial
from repro_sweep.standings import mean_and_std
from repro_sweep.states import TrialState

_HEAD = (
    "After the machine learning reproducibility checklist (Pineau et al. 2020, arXiv:2003.12206). Made from MLflow"
    " by `repro-sweep card`; what is not recorded there is called unknown."
)
_UNKNOWN = "unknown (not recorded)"
_SHOWN_VALUES = 12
_SHOWN_POINTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a card is made from; ``tags`` are those of each trial's run, ``originals`` one of each kind of record."""

    ranking: Ranking
    trials: Sequence[Trial]
    tags: Mapping[int, Mapping[str, str]]
    originals: Sequence[Original]


def kinds(originals: Iterable[Original]) -> list[Original]:
    """One trial of each kind of record: there may be thousands, and hardly any two kinds."""
    found: dict[str, Original] = {}
    for each in originals:
        found.setdefault(_kind(each.record), each)
    return list(found.values())


def _kind(record: TrialRecord | None) -> str:
    """Equal for trials of which a card says the same."""
    if record is None:
        return ""
    torch = record.facts.torch
    return json.dumps([
        record.task, record.commit, record.dirty, record.snapshot, record.environment.digest,
        record.environment.system, bool(record.gpus_seen), torch and torch.model_dump(),
        record.resources.model_dump(), record.determinism.model_dump(),
        {name: each.model_dump() for name, each in record.data.items()},
    ])  # fmt: skip


def card(facts: Facts) -> str:
    """The card as Markdown."""
    ranking = facts.ranking
    records = [each.record for each in facts.originals if each.record is not None]
    parts = [
        f"# Reproducibility card: {ranking.sweep}",
        _HEAD,
        "## Search space\n\n" + _space(facts),
        "## Runs\n\n" + _runs(facts),
        "## How the best was chosen\n\n" + _choice(facts),
        "## Seeds\n\n" + _seeds(facts, records),
        "## Results\n\n" + _results(facts),
        "## Compute\n\n" + _compute(facts, records),
        "## Code\n\n" + _code(records),
        "## Data\n\n" + _data(records),
        "## Environment\n\n" + _environment(records),
        "## Run again\n\n" + _again(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _space(facts: Facts) -> str:
    values: dict[str, Counter[str]] = {}
    for trial in facts.trials:
        for name, value in {**trial.params, **trial.repeat}.items():
            values.setdefault(name, Counter())[str(value)] += 1
    search = next((each.spec.search for each in facts.originals if each.spec is not None), None)
    lines = []
    if search is not None:
        space = search.space
        given = json.dumps(space.params if space.params is not None else space.hydra_params, default=str)
        lines += [f"Searched: `{given}`", ""]
    lines += ["| parameter | values tried | how many |", "| --- | --- | ---: |"]
    for name, found in values.items():
        shown = ", ".join(f"`{value}`" for value in list(found)[:_SHOWN_VALUES])
        more = ", …" if len(found) > _SHOWN_VALUES else ""
        lines.append(f"| `{name}` | {shown}{more} | {len(found)} |")
    return "\n".join(lines) if values else "No parameter was varied."


def _runs(facts: Facts) -> str:
    counts = Counter(trial.state for trial in facts.trials)
    attempts = sum(int(tags.get("attempts") or 0) for tags in facts.tags.values())
    reused = sum(trial.reused_from is not None for trial in facts.trials)
    lines = [
        f"- trials: {len(facts.trials)} ({', '.join(f'{counts[each]} {each}' for each in TrialState if counts[each])})",
        f"- points: {len(facts.ranking.rows)}",
        f"- executions, repeated ones included: {attempts}",
    ]
    lines += [f"- results taken over from other sweeps: {reused}"] if reused else []
    return "\n".join(lines)


def _choice(facts: Facts) -> str:
    by = " and ".join(f"{each.metric} ({each.direction})" for each in facts.ranking.objectives)
    spec = next((each.spec for each in facts.originals if each.spec is not None), None)
    lines = [f"- ranked by: {by}, the mean over the repeats of each point"]
    lines += [
        f"- constraint: {each.metric} {each.operator} {each.bound:g}" for each in facts.ranking.constraints
    ]
    if spec is None:
        return "\n".join([*lines, f"- sampler: {_UNKNOWN}"])
    lines.append(f"- sampler: {spec.sampler}")
    if spec.search is not None:
        budget = spec.search.budget.model_dump(exclude_none=True)
        lines.append(
            f"- its seed: {spec.search.seed}; budget: {', '.join(f'{k} {v}' for k, v in budget.items())}"
        )
    pruner = "none" if spec.pruner is None else spec.pruner.name
    return "\n".join([*lines, f"- pruner: {pruner}"])


def _seeds(facts: Facts, records: Sequence[TrialRecord]) -> str:
    seeds = {tags["seed"] for tags in facts.tags.values() if tags.get("seed")}
    repeats = Counter(len(row.trials) for row in facts.ranking.rows)
    numbers = sorted(seeds, key=lambda each: (len(each), each))
    shown = ", ".join(numbers[:_SHOWN_VALUES]) + (", …" if len(numbers) > _SHOWN_VALUES else "")
    determinism = {(each.determinism.seed, str(each.determinism.strict)) for each in records}
    return "\n".join([
        f"- repeats of a point: {', '.join(f'{count} points with {n}' for n, count in sorted(repeats.items()))}",
        f"- seeds of the trials: {shown or _UNKNOWN}",
        "- `sweep.determinism`: "
        + ("; ".join(f"seed {seed}, strict {strict}" for seed, strict in sorted(determinism, key=str)) or _UNKNOWN),
    ])  # fmt: skip


def _results(facts: Facts) -> str:
    objectives = facts.ranking.objectives
    head = ["rank", *(each.metric for each in objectives), "n", "point"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in facts.ranking.rows[:_SHOWN_POINTS]:
        figures = [mean_and_std(mean, std) for mean, std in zip(row.means, row.stds, strict=True)]
        lines.append(f"| {' | '.join([str(row.rank or '-'), *figures, str(row.n), _point(row)])} |")
    note = "Mean ± standard deviation (one degree of freedom taken off) over the complete trials of a point."
    return "\n".join([note, "", *lines])


def _point(row: Row) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in row.params.items()) or "(the only one)"


def _compute(facts: Facts, records: Sequence[TrialRecord]) -> str:
    seconds, unknown = 0.0, 0
    for tags in facts.tags.values():
        spans = _spans(tags.get("attempt_history", ""))
        unknown += spans is None
        seconds += sum(spans or ())
    gpus = {each.resources.gpus * each.resources.nodes for each in records}
    cpus = {each.resources.cpus * each.resources.nodes for each in records}
    hours = seconds / 3600
    lines = [
        f"- time of all executions: {hours:.3g} h" + (f" ({unknown} trials: {_UNKNOWN})" if unknown else "")
    ]
    if len(gpus) == 1:
        lines.append(f"- GPU hours: {hours * next(iter(gpus)):.3g} ({next(iter(gpus)):g} GPUs a trial)")
    else:
        lines.append(
            f"- GPU hours: {_UNKNOWN}"
            if not gpus
            else f"- GPUs a trial: {_listed(f'{each:g}' for each in gpus)}"
        )
    if len(cpus) == 1:
        lines.append(f"- CPU hours: {hours * next(iter(cpus)):.3g} ({next(iter(cpus)):g} CPUs a trial)")
    elif cpus:
        lines.append(f"- CPUs a trial: {_listed(f'{each:g}' for each in cpus)}")
    for what in ("cpu", "gpu"):
        found = Counter(tags.get(what, "") for tags in facts.tags.values())
        named = [f"{name} ({count} trials)" for name, count in found.most_common() if name]
        none = what == "gpu" and records and not any(each.gpus_seen for each in records)
        lines.append(f"- {what.upper()}: {', '.join(named) or ('none' if none else _UNKNOWN)}")
    return "\n".join(lines)


def _spans(history: str) -> list[float] | None:
    """Seconds of each execution of a trial; None where they are not known."""
    try:
        return [
            float(each["ended"] or each["started"]) - float(each["started"]) for each in json.loads(history)
        ]
    except (ValueError, KeyError, TypeError):
        return None


def _code(records: Sequence[TrialRecord]) -> str:
    found = {(each.commit, each.dirty, each.snapshot, each.task) for each in records}
    lines = []
    for commit, dirty, snapshot, task in sorted(found, key=str):
        state = "" if dirty is None else (", with changes that were not committed" if dirty else ", clean")
        lines.append(
            f"- `{task}`: git commit {commit or _UNKNOWN}{state}; frozen source {snapshot or _UNKNOWN}"
        )
    return "\n".join(lines) or _UNKNOWN


def _data(records: Sequence[TrialRecord]) -> str:
    found = {(name, each.uri, each.digest) for record in records for name, each in record.data.items()}
    lines = [f"- `{name}`: {uri}, `{digest}`" for name, uri, digest in sorted(found)]
    return "\n".join(lines) or "Unknown: no data were declared (`sweep.data`)."


def _environment(records: Sequence[TrialRecord]) -> str:
    lines = []
    for each in {record.environment.digest: record for record in records}.values():
        was = each.environment
        torch = each.facts.torch
        named = [
            f"{name} {was.packages[name].version}"
            for name in ("torch", "numpy", "scikit-learn")
            if name in was.packages
        ]
        cuda = "" if torch is None or torch.cuda is None else f", CUDA {torch.cuda}, cuDNN {torch.cudnn}"
        lines.append(
            f"- {was.implementation} {was.python} on {was.system}; {len(was.packages)} packages"
            f" ({', '.join(named) or 'none of torch, numpy and scikit-learn'}){cuda}"
        )
    return "\n".join(lines) or _UNKNOWN


def _again(facts: Facts) -> str:
    verdicts = Counter(str(trial.reproduced) for trial in facts.trials if trial.reproduced is not None)
    done = sum(verdicts.values())
    if not done:
        return "No trial was run again (`repro-sweep reproduce`)."
    parts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return f"{done} of {len(facts.trials)} trials were run again (`repro-sweep reproduce`): {parts}."


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))
