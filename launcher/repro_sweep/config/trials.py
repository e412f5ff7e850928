"""From a point to a trial: its config composed and checked, its identity, its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf.errors import OmegaConfBaseException

from repro_sweep.config.compose import Composer
from repro_sweep.config.identity import check, identity
from repro_sweep.errors import CompositionError
from repro_sweep.points import Point
from repro_sweep.records import NewTrial
from repro_sweep.sweep import SweepSpec

SUBDIR = "trials/${hydra.job.num}"
"""``hydra.sweep.subdir``, unless the user sets another."""


class TrialMaker:
    """Makes the trials of one sweep.

    Args:
        composer: composes their configs.
        task: the name of the task, for identities.
        repeats: the keys over which results are averaged.
        overrides: the task's overrides from the command line: rankings show what they set for all trials, as another
            command may set something else.
        spec: the sweep's: fingerprints of what the trials read (other data make other trials), and what is no secret.
    """

    def __init__(
        self,
        composer: Composer,
        task: str,
        repeats: Sequence[str],
        overrides: Sequence[str],
        spec: SweepSpec,
    ) -> None:
        digests = {name: each.digest for name, each in sorted(spec.data.items())}
        self._data = json.dumps(digests) if digests else ""
        self._not_secret = frozenset(spec.not_secret)
        self._composer = composer
        self._task = task
        self._repeats = repeats
        self._fixed = _fixed(overrides)
        self.custom_subdir = f"hydra.sweep.subdir={SUBDIR}" not in composer.spec.hydra_overrides

    def make(self, point: Point, number: int) -> NewTrial:
        """The trial of a point.

        Raises:
            CompositionError: its config cannot be used; a line for each problem.
        """
        config = self._composer.compose(point.overrides)
        checked = check(config, hydra=self._composer.hydra(point.overrides), not_secret=self._not_secret)
        if checked.problems:
            raise CompositionError("\n".join(str(problem) for problem in checked.problems))
        fixed = {key: value for key, value in self._fixed.items() if key not in point.repeat}
        return NewTrial(
            number=number,
            identity=identity(self._task, checked.container, data=self._data),
            point=identity(self._task, _without(checked.container, self._repeats), data=self._data),
            directory=self._directory(point, number),
            overrides=point.overrides,
            params={**point.params, **fixed},
            repeat=point.repeat,
            config=checked.yaml,
        )

    def _directory(self, point: Point, number: int) -> str:
        if not self.custom_subdir:
            return f"trials/{number}"
        job = self._composer.job_config(point.overrides, num=number, job_id=str(number), output_dir=".")
        try:
            return str(job.hydra.sweep.subdir)
        except OmegaConfBaseException as error:
            raise CompositionError(f"hydra.sweep.subdir: {str(error).splitlines()[0]}") from error


def _fixed(arguments: Sequence[str]) -> dict[str, object]:
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    return {
        override.key_or_group: override.get_value_string()
        if isinstance(override.value(), QuotedString | dict | list)
        else override.value()
        for override in parsed
        if not (override.is_sweep_override() or override.is_delete() or override.is_hydra_override())
    }


def _without(container: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A resolved config without some dotted keys, which are no part of what its repeats have in common."""
    rest = dict(container)
    for key in keys:
        first, _, below = key.partition(".")
        if below and isinstance(rest.get(first), dict):
            rest[first] = _without(rest[first], [below])
        elif not below:
            rest.pop(first, None)
    return rest
