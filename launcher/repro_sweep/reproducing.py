"""Makes a sweep that runs trials again: their frozen source in an empty folder, their configs, seeds and environment.

Whatever would make the answer meaningless is found before anything starts: a source, data or an environment that is
not the recorded one.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from repro_sweep.comparison import Comparison, compare
from repro_sweep.errors import SweepError
from repro_sweep.ledger import Ledger
from repro_sweep.originals import Original
from repro_sweep.provenance import archive, bundle, data, environment, snapshot, source
from repro_sweep.provenance.environment import Environment
from repro_sweep.provenance.record import TrialRecord
from repro_sweep.records import NewTrial
from repro_sweep.results import Trial, histories, is_whole
from repro_sweep.states import FailureKind, TrialState, Verdict
from repro_sweep.sweep import Origin, Source, SweepSpec, Tracking

_SOURCE = "source"
_OURSELVES = "repro-sweep"
_NUMERIC = (
    "PYTHONHASHSEED", "*_NUM_THREADS", "*_MAXIMUM_THREADS", "OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*",
    "BLIS_*", "NUMEXPR_*", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TF_*", "XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DEFAULT_PRNG_IMPL",
)  # fmt: skip
"""Variables that change results, and say nothing of one machine."""
_OF_ONE_RUN = ("SLURM_*", "CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV", "CONDA_*")
_OF_THE_TASK = frozenset({FailureKind.EXCEPTION, FailureKind.INVALID_METRIC})


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
    roots: tuple[str, ...] = ()
    """The folders that the source was frozen from."""
    lacking: tuple[str, ...] = ()
    """Files and folders of the project that were not frozen, and are not here."""
    known: tuple[str, ...] = ()
    """What is known not to be as it was, and was allowed."""


def groups(originals: Iterable[Original]) -> list[list[Original]]:
    """Trials that one sweep can run: with the same source, resources, determinism, data and environment."""
    found: dict[str, list[Original]] = {}
    for each in originals:
        assert each.record is not None
        record = each.record
        key = json.dumps([
            record.sweep_id, record.submission, record.environment.digest, record.resources.model_dump(),
            record.determinism.model_dump(), {name: one.digest for name, one in record.data.items()},
            _matching(record.facts.variables, _NUMERIC),
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
    tracking: Tracking,
    command: str,
    anyway: bool,
) -> Repetition:
    """Build the source of such trials in an empty folder, and the sweep that runs them there.

    Args:
        originals: of one of the :func:`groups`.
        directory: the new sweep's; it does not exist, or is empty.
        executor: name and options of where to run; None: as many slots here as fit.
        tracking: where the new runs go.
        command: the command line, for the record.
        anyway: take files that were not frozen from where they lay, if they still do.

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
    except OSError as error:
        raise SweepError(f"{folder} cannot be made: {error}") from error
    found = archive.unpack_verified(first.archive, folder, record.snapshot)
    lacking = _link_what_was_left_out(found, old, everything=anyway)
    moved = source.relocated(old, folder, directory)
    data_then = {
        name: each.model_copy(update={"uri": old.data[name].uri}) for name, each in record.data.items()
    }
    roots = tuple(str(folder / str(number)) for number in range(len(old.source.roots)))
    name, options = executor or ("local", {})
    spec = moved.model_copy(update={
        "sweep_id": uuid.uuid4().hex, "name": directory.name, "directory": str(directory),
        "source": Source(snapshot=found.id, folder=str(folder), roots=roots), "resources": record.resources,
        "determinism": record.determinism, "data": source.data_in(data_then, old.source.roots, folder),
        "tracking": tracking, "executor_name": name, "executor": dict(options),
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
        spec=bundle.identified(spec), trials=trials, originals={each.trial.number: each for each in originals},
        variables=_variables(record), roots=old.source.roots, lacking=tuple(lacking),
    )  # fmt: skip


def _link_what_was_left_out(found: snapshot.Snapshot, old: SweepSpec, *, everything: bool) -> list[str]:
    """Take data of the sweep, or ``everything`` that was not frozen, from where it lies; returns what is not there."""
    assert old.source is not None
    lay: dict[str, Path] = {}
    for number, root in enumerate(map(Path, old.source.roots)):
        lay |= {
            f"{number}/{path.relative_to(root)}": path
            for path in (Path(each.uri) for each in old.data.values())
            if path != root and path.is_relative_to(root)
        }
    if everything:
        parts = (name.partition("/") for name in found.left_out)
        lay |= {
            "/".join((number, path)): Path(old.source.roots[int(number)], path) for number, _, path in parts
        }
    for name, path in lay.items():
        target = found.folder / name
        if path.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return [name.partition("/")[2] for name in found.left_out if not (found.folder / name).exists()]


def _matching(variables: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    return {
        key: value
        for key, value in variables.items()
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
    }


def _variables(record: TrialRecord) -> dict[str, str | None]:
    """What the processes of the new sweep must have in their environment so that its trials have what they had."""
    here = _matching(environment.variables(os.environ), _NUMERIC)
    there = _matching(record.facts.variables, _NUMERIC)
    threads = str(record.resources.threads)
    wanted: dict[str, str | None] = {key: None for key in here if key not in there}
    for key, value in there.items():
        if key.endswith(("_NUM_THREADS", "_MAXIMUM_THREADS")) and value == threads:
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
    assert original.spec is not None
    for digest, files in original.manifests.items():
        data.keep_manifest(store, digest, files)
    read = {name: data.changed(name, each, store) for name, each in made.spec.data.items()}
    there = {
        name: each.model_copy(update={"uri": original.spec.data[name].uri})
        for name, each in made.spec.data.items()
        if each.uri != original.spec.data[name].uri
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
    found = [f"{what}: {before} before, {here} now" for what, before, here in pairs if before != here]
    before, here = (
        {
            key: value
            for key, value in each.facts.variables.items()
            if not _matching({key: value}, (*_NUMERIC, *_OF_ONE_RUN))
        }
        for each in (was, now)
    )
    return (*found, *_told(before, here))


def _told(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{key}: {before.get(key, 'not set')} before, {now.get(key, 'not set')} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def _gpus(record: TrialRecord) -> str:
    if not record.gpus_seen:
        return "none"
    return ", ".join(f"{gpu.model} (driver {gpu.driver})" for gpu in record.environment.gpus)


def broken_conditions(was: TrialRecord, now: TrialRecord) -> list[str]:
    """What had to be the same in both runs, and was not: then equal results prove nothing."""
    found = _told(_matching(was.facts.variables, _NUMERIC), _matching(now.facts.variables, _NUMERIC))
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


def judge(
    original: Original, made: Repetition, ledger: Ledger, again: Trial | None, *, rtol: float, anyway: bool
) -> Result:
    """The verdict on a trial that was run again.

    Args:
        original: what it was.
        made: what has run it again.
        ledger: of that sweep.
        again: what it is now in MLflow; None if it has no run.
        rtol: see :func:`repro_sweep.comparison.compare`.
        anyway: another environment is no reason not to compare.

    Raises:
        TrackingError: MLflow cannot be read.
    """
    was = original.record
    assert was is not None
    trial = ledger.trial(original.trial.number)
    attempt = ledger.attempts(trial.number)[-1] if trial.attempt is not None else None
    run_id = None if again is None else again.run_id

    def unverifiable(*reasons: str) -> Result:
        return Result(original=original, verdict=Verdict.UNVERIFIABLE, reasons=reasons, run_id=run_id)

    if trial.state not in (TrialState.COMPLETE, original.trial.state):
        said = (attempt.message if attempt is not None else None) or "it did not run"
        reason = f"it ends as {trial.state} now: {said}"
        task = trial.state is TrialState.PRUNED or (attempt is not None and attempt.kind in _OF_THE_TASK)
        if not task or made.lacking:
            return unverifiable(reason, *(f"{name} was not frozen" for name in made.lacking))
        return Result(original=original, verdict=Verdict.DIFFERS, reasons=(reason,), run_id=run_id)
    now = _record(ledger.spec.trial_directory(trial.directory))
    if now is None:
        return unverifiable("its repetition has no record")
    if again is None or not is_whole(again):
        return unverifiable(f"not all of it is in MLflow yet: repro-sweep sync {ledger.path.parent}")
    broken = broken_conditions(was, now)
    other = check_environment(was.environment, now.environment, made.roots)
    around = (*made.known, *(other if anyway else ()), *differences(was, now))
    if broken or (other and not anyway):
        return replace(unverifiable(*broken, *other), differences=around)
    cut = original.trial.state is TrialState.PRUNED and trial.state is TrialState.COMPLETE
    comparison = compare(histories(original.trial), histories(again), rtol=rtol, cut=cut)
    return Result(
        original=original,
        verdict=comparison.verdict,
        comparison=comparison,
        reasons=() if comparison.values else ("it has no metrics to compare",),
        differences=around,
        run_id=run_id,
    )


def _record(directory: Path) -> TrialRecord | None:
    from repro_sweep.exchange import RECORD_NAME

    try:
        return TrialRecord.parse((directory / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, SweepError):
        return None


def discard(directory: Path) -> None:
    """Remove the folder of a repetition that did not come to run."""
    shutil.rmtree(directory, ignore_errors=True)
