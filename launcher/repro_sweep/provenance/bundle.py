"""What was submitted, in the sweep's directory: its record, source, environment and lock, from which MLflow gets them.

A trial can be run again from this and its own record, on a machine that has nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from repro_sweep import redaction
from repro_sweep.errors import SweepError
from repro_sweep.exchange import ARCHIVE_NAME, BUNDLE, BUNDLE_ID
from repro_sweep.provenance import archive, data, environment
from repro_sweep.provenance.snapshot import STORE_NAME
from repro_sweep.sweep import SweepSpec

SWEEP_NAME = "sweep.json"
DATA_NAME = "data.json"
ENVIRONMENT_NAME = "environment.json"
LOCK_NAME = "requirements.txt"


def identified(spec: SweepSpec) -> SweepSpec:
    """A sweep with the id of its submission: equal ones have the same source, composition, task and data.

    The time of submission is no part of it: a sweep that goes on keeps its workers.
    """
    assert spec.source is not None
    composition = spec.composition.model_dump(mode="json", exclude={"now"})
    what = [
        spec.source.snapshot, spec.source.roots, composition, spec.task.model_dump(mode="json"),
        {name: each.model_dump() for name, each in spec.data.items()},
    ]  # fmt: skip
    ident = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    return spec.model_copy(update={"source": spec.source.model_copy(update={"submission": ident})})


def write(spec: SweepSpec) -> str | None:
    """Write the bundle of a sweep whose source is frozen; returns why the source is not in it.

    Raises:
        SweepError: it cannot be written.
    """
    folder = Path(spec.directory) / BUNDLE
    about = environment.inspect()
    store = Path(spec.directory).parent / STORE_NAME
    texts = {
        DATA_NAME: json.dumps(data.manifests(spec.data.values(), store)),
        SWEEP_NAME: json.dumps(redaction.hidden(spec.model_dump(mode="json")), indent=1),
        ENVIRONMENT_NAME: about.model_dump_json(indent=1),
        LOCK_NAME: about.lock(),
    }
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / BUNDLE_ID).unlink(missing_ok=True)
        trouble = _put_source(spec, folder)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        assert spec.source is not None
        ident = hashlib.sha256("\0".join([spec.source.snapshot, *texts.values()]).encode()).hexdigest()
        (folder / BUNDLE_ID).write_text(f"{spec.source.submission} {ident}", encoding="utf-8")
    except OSError as error:
        raise SweepError(f"{folder} cannot be written: {error}") from error
    return trouble


def _put_source(spec: SweepSpec, folder: Path) -> str | None:
    """Link the archive of the source here, which the store has once for all sweeps that have the same source."""
    target = folder / ARCHIVE_NAME
    target.unlink(missing_ok=True)
    packed, trouble = archive.pack(spec)
    if trouble is None:
        try:
            os.link(packed, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(packed, target)
    return trouble
