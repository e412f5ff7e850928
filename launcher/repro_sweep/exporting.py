"""Writes a trial as a folder that is complete in itself: source, config, lock, fingerprints, and how to run it."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib import resources
from pathlib import Path

import yaml

from repro_sweep.errors import SweepError
from repro_sweep.originals import Original
from repro_sweep.provenance import archive, source
from repro_sweep.provenance.record import TrialRecord
from repro_sweep.results import histories, tags_of
from repro_sweep.states import TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking.encoding import json_number, safe_key

_FILES = {"run.py": "run.py", "repro_sweep.py": "stand_in/repro_sweep.py"}
_SOURCE = "source"
_README = """\
# Trial {trial} of the sweep {sweep}

It ran as `{task}` with

{overrides}

MLflow run `{run_id}`; git commit {commit}.

## Run it

It needs Python {python} and the packages of `requirements.txt`; repro-sweep may be missing, `stand_in` takes its place.

    python{minor} -m venv venv
    venv/bin/pip install --no-deps -r requirements.txt
    venv/bin/python run.py

`run.py` calls the task with `config.yaml`, seeded as it was, and prints its final metrics beside the recorded ones; its
exit status is 1 if one differs or is missing, or if there are none. What the task has logged with MLflow itself is not
compared. Hydra is not started, so a task that asks Hydra for its configuration needs `repro-sweep reproduce` instead.

## What it ran on

- {system}, {cpu}, GPUs: {gpus}
- CPUs of the trial: {cpus:g}; seed: {seed}

## Data

{data}

## Not in this folder

{left}
"""


def export(original: Original, target: Path) -> list[str]:
    """Write a trial to a folder, or to a zip file where ``target`` ends with ``.zip``.

    Returns:
        What is not in it, a line each.

    Raises:
        SweepError: MLflow lacks something that it needs, the source is not the recorded one, or it cannot be
            written. Then nothing is left behind.
        TrackingError: MLflow cannot be read.
    """
    if original.missing:
        raise SweepError(f"{original.name}: MLflow does not have {'; '.join(original.missing)}")
    if target.exists():
        raise SweepError(f"{target} exists already")
    is_zip = target.suffix == ".zip"
    there = next(each for each in target.absolute().parents if each.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".repro-sweep-", dir=there) as temporary:
            made = Path(temporary, target.stem if is_zip else target.name)
            made.mkdir()
            lacking = _write(original, made)
            if is_zip:
                made = Path(shutil.make_archive(f"{made}", "zip", temporary, made.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            made.rename(target)
            return lacking
    except OSError as error:
        raise SweepError(f"{target} cannot be written: {error}") from error


def _write(original: Original, folder: Path) -> list[str]:
    record, spec = original.record, original.spec
    assert record is not None
    assert spec is not None
    assert spec.source is not None
    assert original.archive is not None
    try:
        found = archive.unpack_verified(original.archive, folder / _SOURCE, record.snapshot)
    except SweepError as error:
        raise SweepError(f"{original.name}: {error}") from error
    here = source.relocated(spec, folder / _SOURCE, folder)

    def relative(path: str) -> str | None:
        return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else None

    paths = [each for each in map(relative, here.task.sys_path) if each is not None]
    about = {
        "sweep": record.sweep,
        "trial": record.trial,
        "run_id": original.trial.run_id,
        "module": here.task.module,
        "file": None if here.task.file is None else relative(here.task.file),
        "qualname": here.task.qualname,
        "cwd": relative(here.task.cwd) or ".",
        "sys_path": paths,
        "seed": record.facts.seed,
        "seed_at_import": record.determinism.seed,
        "strict": record.determinism.strict,
        "threads": record.facts.torch.threads if record.facts.torch is not None else record.resources.threads,
        "variables": {
            key: value
            for key, value in record.facts.variables.items()
            if key.endswith("_NUM_THREADS") or key in ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG")
        },
        "objectives": [each.metric for each in spec.all_objectives],
        **_metrics(original),
    }
    texts = {
        "trial.json": json.dumps(about, indent=1, allow_nan=False),
        "config.yaml": original.config,
        "overrides.yaml": yaml.safe_dump(list(record.overrides), allow_unicode=True),
        "record.json": record.model_dump_json(indent=1),
        "requirements.txt": "".join(
            line  # the stand-in takes its place
            for line in record.environment.lock().splitlines(keepends=True)
            if not line.startswith("repro-sweep==")
        ),
        "data.json": json.dumps({name: each.model_dump() for name, each in record.data.items()}, indent=1),
    }
    lacking = [f"{name.partition('/')[2]} ({why})" for name, why in found.left_out.items()]
    texts["README.md"] = _readme(original, record, spec, lacking)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, path in _FILES.items():
        (folder / path).parent.mkdir(exist_ok=True)
        text = resources.files("repro_sweep.provenance.exported").joinpath(name).read_text(encoding="utf-8")
        (folder / path).write_text(text, encoding="utf-8")
    return lacking


def _metrics(original: Original) -> dict[str, object]:
    """The final metrics, apart from those that the task has logged with MLflow itself, as far as that is known.

    ``until``: of a trial that was pruned, the last step of each.
    """
    trial = original.trial
    # where they are too long for a tag, nobody knows which are whose
    own = json.loads(tags_of(trial.run_id, trial.uri).get("metrics") or "{}") or trial.metrics
    until = None
    if trial.state is TrialState.PRUNED:
        steps = histories(trial)
        until = {name: max(steps[safe_key(name)]) for name in own if steps.get(safe_key(name))}
    return {
        "metrics": {name: json_number(value) for name, value in trial.metrics.items() if name in own},
        "logged": {name: json_number(value) for name, value in trial.metrics.items() if name not in own},
        "until": until,
    }


def _readme(original: Original, record: TrialRecord, spec: SweepSpec, lacking: list[str]) -> str:
    was = record.environment
    data = [
        f"- `{name}`: {each.uri}, {each.files} files, `{each.digest}`" for name, each in record.data.items()
    ]
    left = [f"- {each}" for each in lacking]
    gpus = ", ".join(sorted({gpu.model for gpu in was.gpus})) if record.gpus_seen else "none"
    commit = (
        f"{record.commit or 'not recorded'}{', with changes that were not committed' if record.dirty else ''}"
    )
    return _README.format(
        trial=record.trial,
        sweep=record.sweep,
        task=spec.task.name,
        overrides="\n".join(f"    {each}" for each in record.overrides),
        run_id=original.trial.run_id,
        commit=commit,
        python=was.python,
        minor=".".join(was.python.split(".")[:2]),
        system=was.system,
        cpu=was.cpu or "a CPU that was not recorded",
        gpus=gpus,
        cpus=record.resources.cpus,
        seed=record.facts.seed,
        data="\n".join(data) or "None were declared (`sweep.data`).",
        left="\n".join(left) or "Nothing that belongs to the source.",
    )
