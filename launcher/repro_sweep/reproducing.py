"""Makes a sweep that runs trials again: their frozen source in an empty folder, their configs, seeds and environment.

Whatever would make the answer meaningless is found before anything starts: a source, data or an environment that is
not the recorded one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from repro_sweep.comparison import Comparison, Curves, compare
from repro_sweep.errors import SweepError
from repro_sweep.ledger import Ledger
from repro_sweep.originals import Original, curves, is_cut, last_step
from repro_sweep.provenance import data, environment, snapshot, source
from repro_sweep.provenance.environment import Environment
from repro_sweep.provenance.record import TrialRecord
from repro_sweep.records import NewTrial
from repro_sweep.states import TrialState, Verdict
from repro_sweep.sweep import Data, Origin, Source, SweepSpec
from repro_sweep.tracking.encoding import Curve, points_of, safe_key

_SOURCE = "source"
_OURSELVES = "repro-sweep"
_OF_THE_MACHINE = frozenset(
    {
        "CUDA_VISIBLE_DEVICES",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "PYTHONHOME",
        "LANG",
        "TZ",
    }
)
_OF_THE_MACHINE_TOO = ("SLURM_", "CONDA_", "NVIDIA_", "LC_", "NCCL_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one trial that was run again.

    ``reasons``: why it is UNVERIFIABLE, or why it has failed now. ``differences``: what is not as it was around it.
    ``run_id``: its new run; None where it did not get that far.
    """

    original: Original
    verdict: Verdict
    comparison: Comparison | None = None
    reasons: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    run_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """A sweep that is ready to run some trials again."""

    spec: SweepSpec
    trials: tuple[NewTrial, ...]
    originals: Mapping[int, Original]
    variables: Mapping[str, str | None] = field(default_factory=dict)
    """Of the environment, for the sweep's processes; None: without it."""
    notes: tuple[str, ...] = ()


def groups(originals: Iterable[Original]) -> list[list[Original]]:
    """Trials that one sweep can run: with the same source, resources, determinism, data and environment."""
    found: dict[str, list[Original]] = {}
    for each in originals:
        assert each.record is not None
        record = each.record
        key = json.dumps([
            record.sweep_id, record.snapshot, record.environment.digest, record.resources.model_dump(),
            record.determinism.model_dump(), {name: one.digest for name, one in record.data.items()},
            _numeric(record.facts.variables),
        ])  # fmt: skip
        found.setdefault(key, []).append(each)
    return list(found.values())


def unverifiable(original: Original) -> Result | None:
    """The result of a trial of which something is missing; None where nothing is."""
    if not original.missing:
        return None
    reasons = tuple(f"MLflow does not have {each}" for each in original.missing)
    return Result(original=original, verdict=Verdict.UNVERIFIABLE, reasons=reasons)


def rebuild(
    originals: Sequence[Original],
    directory: Path,
    executor: tuple[str, dict[str, object]] | None,
    *,
    uri: str,
    command: str,
) -> Repetition:
    """Build the source of such trials in an empty folder, and the sweep that runs them there.

    Args:
        originals: of one of the :func:`groups`.
        directory: the new sweep's; it does not exist, or is empty.
        executor: name and options of where to run; None: as many slots here as fit.
        uri: the MLflow store.
        command: the command line, for the record.

    Raises:
        SweepError: the source is not what was recorded, or cannot be built.
    """
    first = originals[0]
    record, old = first.record, first.spec
    assert record is not None
    assert old is not None
    assert old.source is not None
    assert first.archive is not None
    folder = directory / _SOURCE
    try:
        folder.mkdir(parents=True, mode=0o700)
        source.unpack(first.archive, folder)
    except (OSError, EOFError, ValueError) as error:
        raise SweepError(f"the source of {first.name} cannot be unpacked in {folder}: {error}") from error
    found = snapshot.Snapshot.read(folder)
    if (ident := snapshot.ident_of(folder)) != record.snapshot:
        raise SweepError(
            f"the source of {first.name} is not the recorded one: its hash is {ident[:16]}, recorded is"
            f" {(record.snapshot or '')[:16]}"
        )
    notes = tuple(_link_what_was_left_out(found, old.source.roots))
    moved = source.relocated(old, folder, directory)
    roots = tuple(str(folder / str(number)) for number in range(len(old.source.roots)))
    name, options = executor or ("local", {})
    spec = moved.model_copy(update={
        "sweep_id": uuid.uuid4().hex, "name": directory.name, "directory": str(directory),
        "source": Source(snapshot=found.id, folder=str(folder), roots=roots), "resources": record.resources,
        "determinism": record.determinism, "data": _moved(record.data, old.source.roots, roots),
        "tracking": old.tracking.model_copy(update={"uri": uri}), "executor_name": name, "executor": dict(options),
        "origin": Origin.here(command, git_commit=record.commit, git_dirty=record.dirty), "created_at": time.time(),
        "reuse": False, "search": None, "pruner": None, "sampler": "grid", "detach": False, "max_failures": None,
        "reproduces": {each.trial.number: each.trial.run_id for each in originals},
    })  # fmt: skip
    trials = tuple(
        NewTrial(
            number=each.trial.number, identity=each.trial.identity, directory=f"trials/{each.trial.number}",
            overrides=each.trial.overrides, params=each.trial.params, repeat=each.trial.repeat, config=each.config,
            point=each.trial.point,
        )
        for each in originals
    )  # fmt: skip
    return Repetition(
        spec=spec, trials=trials, originals={each.trial.number: each for each in originals},
        variables=_variables(record), notes=notes,
    )  # fmt: skip


def _link_what_was_left_out(found: snapshot.Snapshot, roots: Sequence[str]) -> Iterable[str]:
    """Take files that were not frozen from where they lay, if they still do: nobody knows whether they are the same."""
    for name, why in found.left_out.items():
        number, _, path = name.partition("/")
        lay, target = Path(roots[int(number)], path), found.folder / name
        if lay.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(lay)
        if "max_mb" in why:
            what = f"is taken from {lay}" if lay.exists() else "is not there"
            yield f"{path} was not frozen ({why}) and {what}"


def _moved(found: Mapping[str, Data], old: Sequence[str], new: Sequence[str]) -> dict[str, Data]:
    """Data within the project are read where its source is now."""
    moved = {}
    for name, each in found.items():
        uri = each.uri
        for root, there in zip(old, new, strict=True):
            if uri.startswith(f"{root}/") and Path(there + uri[len(root) :]).exists():
                uri = there + uri[len(root) :]
        moved[name] = each.model_copy(update={"uri": uri})
    return moved


def _numeric(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that change results and are not about one machine."""
    return {
        key: value
        for key, value in variables.items()
        if key not in _OF_THE_MACHINE and not key.startswith(_OF_THE_MACHINE_TOO)
    }


def _variables(record: TrialRecord) -> dict[str, str | None]:
    """What the processes of the new sweep must have in their environment so that its trials have what they had."""
    here, there = _numeric(environment.variables(os.environ)), _numeric(record.facts.variables)
    own = {str(record.resources.threads), "1"}
    wanted: dict[str, str | None] = {key: None for key in here if key not in there}
    for key, value in there.items():
        made_here = key.endswith("_NUM_THREADS") or key == "VECLIB_MAXIMUM_THREADS"
        if made_here and value in own and value == str(record.resources.threads):
            wanted[key] = None  # workers do this themselves
        elif here.get(key) != value:
            wanted[key] = value
    return {key: value for key, value in wanted.items() if os.environ.get(key) != value}


def check_data(made: Repetition) -> tuple[list[str], list[str]]:
    """What of the data is not as it was, a line each: of what is read now, and of what still lies where it lay.

    The two are not the same where data belong to the source, of which a frozen copy is read.
    """
    store = Path(made.spec.directory).parent / snapshot.STORE_NAME
    original = next(iter(made.originals.values()))
    assert original.record is not None
    for digest, files in original.manifests.items():
        data.keep_manifest(store, digest, files)
    read = {name: data.changed(name, each, store) for name, each in made.spec.data.items()}
    there = {
        name: each for name, each in original.record.data.items() if each.uri != made.spec.data[name].uri
    }
    lie = {name: data.changed(name, each, store) for name, each in there.items() if Path(each.uri).exists()}
    return [each for each in read.values() if each], [each for each in lie.values() if each]


def check_environment(was: Environment, here: Environment, roots: Sequence[str]) -> list[str]:
    """In what Python and its packages differ from the recorded ones, a line each.

    Args:
        was: the recorded one.
        here: this one.
        roots: the folders whose files were frozen. Packages that lay there to be edited are run from the frozen source.
    """
    found = [
        f"{what}: {before} before, {now} now"
        for what, before, now in (
            ("python", f"{was.implementation} {was.python}", f"{here.implementation} {here.python}"),
        )
        if before != now
    ]
    frozen = {name for name, each in was.packages.items() if each.lies_in(roots)}
    for name in sorted({*was.packages, *here.packages} - {_OURSELVES, *frozen}):
        before, now = was.packages.get(name), here.packages.get(name)
        if before is None or now is None:
            found.append(f"{name}: {_version(before)} before, {_version(now)} now")
        elif before.version != now.version:
            found.append(f"{name}: {before.version} before, {now.version} now")
        elif before.editable is None and now.editable is None and before.digest != now.digest:
            found.append(f"{name}: other files of version {now.version}")
    return found


def _version(package: environment.Package | None) -> str:
    return "not installed" if package is None else package.version


def differences(was: TrialRecord, now: TrialRecord) -> tuple[str, ...]:
    """What is not as it was around a trial and does not forbid to compare it: the machine."""
    pairs = (
        ("host", was.host, now.host),
        ("system", was.environment.system, now.environment.system),
        ("libc", was.environment.libc, now.environment.libc),
        ("cpu", was.environment.cpu, now.environment.cpu),
        ("gpus", _gpus(was), _gpus(now)),
        ("cuda", was.facts.torch and was.facts.torch.cuda, now.facts.torch and now.facts.torch.cuda),
        ("cudnn", was.facts.torch and was.facts.torch.cudnn, now.facts.torch and now.facts.torch.cudnn),
    )
    return tuple(f"{what}: {before} before, {here} now" for what, before, here in pairs if before != here)


def _gpus(record: TrialRecord) -> str:
    if not record.gpus_seen:
        return "none"
    return ", ".join(f"{gpu.model} (driver {gpu.driver})" for gpu in record.environment.gpus)


def broken_conditions(was: TrialRecord, now: TrialRecord) -> list[str]:
    """What had to be the same in both runs, and was not: then equal results prove nothing."""
    before, here = _numeric(was.facts.variables), _numeric(now.facts.variables)
    found = [
        f"{key}: {before.get(key, 'not set')} before, {here.get(key, 'not set')} now"
        for key in sorted({*before, *here})
        if before.get(key) != here.get(key)
    ]
    pairs: list[tuple[str, object, object]] = [
        ("seed", was.facts.seed, now.facts.seed),
        ("source", was.snapshot, now.snapshot),
        ("overrides", was.overrides, now.overrides),
        ("determinism", was.determinism, now.determinism),
        ("data", _digests(was), _digests(now)),
        (
            "torch's threads",
            was.facts.torch and was.facts.torch.threads,
            now.facts.torch and now.facts.torch.threads,
        ),
    ]
    return found + [f"{what}: {one} before, {other} now" for what, one, other in pairs if one != other]


def _digests(record: TrialRecord) -> dict[str, str]:
    return {name: each.digest for name, each in record.data.items()}


def judge(original: Original, ledger: Ledger, *, rtol: float, allowed: Sequence[str] = ()) -> Result:
    """The verdict on a trial that was run again.

    Args:
        original: what it was.
        ledger: of the sweep that has run it again.
        rtol: see :func:`repro_sweep.comparison.compare`.
        allowed: differences of the environment that the user has allowed.
    """
    trial = ledger.trial(original.trial.number)
    assert original.record is not None
    attempt = ledger.attempts(trial.number)[-1] if trial.attempt is not None else None
    if trial.state is not TrialState.COMPLETE:
        said = (attempt.message if attempt is not None else None) or "it did not run"
        verdict = (
            Verdict.DIFFERS
            if trial.state is TrialState.FAIL and attempt is not None
            else Verdict.UNVERIFIABLE
        )
        return Result(original=original, verdict=verdict, reasons=(f"it ends as {trial.state} now: {said}",))
    record = _record(ledger.spec.trial_directory(trial.directory))
    if record is None:
        return Result(
            original=original, verdict=Verdict.UNVERIFIABLE, reasons=("its repetition has no record",)
        )
    broken = broken_conditions(original.record, record)
    around = (*allowed, *differences(original.record, record))
    if broken:
        return Result(
            original=original, verdict=Verdict.UNVERIFIABLE, reasons=tuple(broken), differences=around
        )
    was = curves(original.trial)
    until = last_step(was) if is_cut(original.trial) else None
    comparison = compare(was, _curves(ledger, trial.number), rtol=rtol, until=until)
    reasons = () if comparison.values else ("it has no metrics to compare",)
    return Result(
        original=original,
        verdict=comparison.verdict,
        comparison=comparison,
        reasons=reasons,
        differences=around,
    )


def _record(directory: Path) -> TrialRecord | None:
    from repro_sweep.exchange import RECORD_NAME

    try:
        return TrialRecord.parse((directory / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, SweepError):
        return None


def _curves(ledger: Ledger, number: int) -> Curves:
    """A trial's metrics as MLflow will have them."""
    curve = Curve()
    points = []
    for report in ledger.reports(trial=number):
        some = points_of(report.metrics, step=report.step, at=report.time)
        curve.add(some)
        points += some
    attempt = ledger.attempts(number)[-1]
    points += curve.final(attempt.metrics, attempt.ended_at)
    found: dict[str, dict[int, float]] = {}
    for point in sorted(points, key=lambda each: each.at_ms):
        found.setdefault(safe_key(point.key), {})[point.step] = point.value
    return found


def discard(directory: Path) -> None:
    """Remove the folder of a repetition that did not come to run."""
    shutil.rmtree(directory, ignore_errors=True)
