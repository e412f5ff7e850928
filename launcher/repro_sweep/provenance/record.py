"""The record of a trial: all that is needed to run it again and to tell what was different.

It lies as ``record.json`` in the trial's directory and as an artifact in MLflow; each trial's is complete in itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from repro_sweep.errors import SweepError
from repro_sweep.exchange import RECORD_NAME
from repro_sweep.provenance.environment import Environment
from repro_sweep.sweep import Data, Determinism, Resources


class TorchFacts(BaseModel):
    """What torch says of itself in the trial: its CUDA and cuDNN (None without), and how many threads it uses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    cuda: str | None
    cudnn: int | None
    threads: int
    deterministic: bool


class Facts(BaseModel):
    """What only the trial's own process knows, at its end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int | None
    variables: Mapping[str, str]
    torch: TorchFacts | None = None


class TrialRecord(BaseModel):
    """What ran, from what, on and with what. Times are seconds UTC.

    ``snapshot`` is the id of the frozen source, ``submission`` that of all that was submitted with it, ``commit`` and
    ``dirty`` what git said of it; ``gpus_seen`` are the devices of the trial as ``CUDA_VISIBLE_DEVICES`` named them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    sweep: str
    sweep_id: str
    task: str
    trial: int
    attempt: str
    identity: str
    overrides: tuple[str, ...]
    snapshot: str | None
    submission: str
    commit: str | None
    dirty: bool | None
    data: Mapping[str, Data] = {}
    determinism: Determinism
    resources: Resources
    facts: Facts
    environment: Environment
    gpus_seen: tuple[str, ...]
    host: str
    user: str
    command: str
    started_at: float
    ended_at: float

    def write(self, directory: Path) -> None:
        """Write it into the trial's directory, at once or not at all."""
        partial = directory / f".{RECORD_NAME}.partial"
        partial.write_text(self.model_dump_json(), encoding="utf-8")
        partial.replace(directory / RECORD_NAME)

    @classmethod
    def parse(cls, text: str) -> TrialRecord:
        """Read one.

        Raises:
            SweepError: it is none that this version knows.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first: Any = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise SweepError(f"{RECORD_NAME} is no record of a trial: {where}: {first['msg']}") from error
