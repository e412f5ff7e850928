"""The config of each trial: composed by Hydra once for each combination of options, then changed on copies.

What Hydra composes from files and the ConfigStore depends on the *group* overrides alone (``optimizer=adam``,
``~db``): ``hydra._internal.defaults_list.Overrides`` separates them from the *value* overrides, and
``ConfigLoaderImpl._load_configuration_impl`` applies those, in their order, to the composed config. So a
config composed with the group overrides serves every trial that has the same ones; on a copy of it Hydra's
own ``_apply_overrides_to_config`` does the rest, with the same result and the same errors, at a hundredth of
the cost.

Hydra's whole way is taken wherever that is not certain:

- an override of the ``hydra`` node (its bookkeeping and search path), or of a node that trials must not see;
- an override that must resolve an interpolation to be applied: one on its path, or at its end if Hydra looks
  there (``+``, ``~``), or below it if a dict or list is merged into it;
- a config whose own ``hydra`` node makes the bookkeeping depend on values, by interpolations in it.

Nothing here resolves a config (:mod:`repro_sweep.config.identity` does) or knows what a trial is.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hydra import __version__, version
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime, setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, Node, OmegaConf, open_dict, read_write
from omegaconf._utils import split_key
from packaging.version import Version

from repro_sweep.config.hydra_errors import mapped_errors
from repro_sweep.config.nodes import clone, has_interpolation, held
from repro_sweep.config.yamltext import hydra_yaml, to_yaml
from repro_sweep.errors import CompositionError
from repro_sweep.sweep import Composition

_MAX_BASES = 256


def composition_of(
    master: DictConfig, loader: ConfigLoader, *, strip: tuple[str, ...] = ("sweep",)
) -> Composition:
    """All that another process needs to compose as a running multirun does, given the same files and ConfigStore.

    ``master`` is the config that a sweeper's ``setup`` gets. Call it after the sweep's directory is resolved, so that
    trials see the same date (Hydra's ``load_sweep_config`` copies the resolvers' cache for that).
    """
    hydra = master.hydra
    hydra_overrides = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    assert isinstance(hydra_overrides, list)
    return Composition(
        config_name=hydra.job.config_name,
        search_path=tuple((e.provider or "", e.path or "") for e in loader.get_search_path().get_path()),
        hydra_overrides=tuple(hydra_overrides),
        job_name=str(JobRuntime.instance().get("name")),
        version_base=hydra.runtime.version_base,
        strip=strip,
        now=tuple((pattern, value) for (pattern,), value in OmegaConf.get_cache(master)["now"].items()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What Hydra composed for one combination of group overrides."""

    full: DictConfig
    task: DictConfig
    task_lines: int
    """How many lines ``hydra.overrides.task`` of ``full`` owes to the overrides it was composed with."""
    interpolated: bool


class Composer:
    """Composes the configs of one sweep's trials. For one thread at a time.

    Create it after the task's module is imported, so that the ConfigStore has its entries. Files are read
    when a combination of options is composed for the first time, and not looked at again.

    Without ``loader`` it is a Hydra of its own: it sets what Hydra sets for the whole process when an
    application starts (resolvers, ``version_base``, the job's name, plugins).

    Raises :class:`CompositionError` if the search path or the Hydra overrides cannot be used.
    """

    def __init__(self, spec: Composition, *, loader: ConfigLoader | None = None) -> None:
        self.spec = spec
        self._bases: OrderedDict[tuple[str, ...], _Base | str | None] = OrderedDict()
        self._warm: set[int] = set()
        self._group_exists: dict[str, bool] = {}
        self._reserved = frozenset({"hydra", "", *spec.strip})
        if loader is not None and not isinstance(loader, ConfigLoaderImpl):
            raise TypeError(f"needs Hydra's own ConfigLoaderImpl, got {type(loader).__name__}")
        with mapped_errors(spec.hydra_overrides):
            self._loader = loader or _start_hydra(spec)
            self._loader.ensure_main_config_source_available()
            hydras, self._repository = self._loader._parse_overrides_and_create_caching_repo(
                spec.config_name, list(spec.hydra_overrides)
            )
        self._hydras = tuple(hydras)

    @property
    def loader(self) -> ConfigLoader:
        """Hydra's own, which finds the options of config groups."""
        return self._loader

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The config that the task gets: Hydra's result without ``hydra`` and the stripped nodes.

        It shares nothing with other results. Raises :class:`CompositionError`.
        """
        base, values = self._prepared(overrides)
        if base is not None:
            cfg = clone(base.task)
            if self._apply(cfg, values, base):
                return self._with_cache(cfg)
        cfg = self._hydras_way(overrides)
        cfg.__dict__["_content"].pop("hydra")
        return self._with_cache(cfg)

    def whole(self, overrides: Sequence[str]) -> DictConfig:
        """The whole config, ``hydra`` included, that these overrides' values and choices lead to.

        Raises :class:`CompositionError`.
        """
        return self._with_cache(self._hydras_way(overrides))

    def prepare(self, overrides: Sequence[str]) -> bool:
        """Compose what these overrides' config stands on, so that processes forked afterwards need not.

        Returns whether that was new. Raises :class:`CompositionError`.
        """
        base, _ = self._prepared(overrides)
        if base is None or id(base) in self._warm:
            return False
        self._warm.add(id(base))
        hydra_yaml(base.full)  # remembers the texts of its scalars
        to_yaml(base.task)
        return True

    def hydra(self, overrides: Sequence[str]) -> DictConfig:
        """The ``hydra`` node that these overrides' options lead to, with nothing of a job in it; only read it.

        Raises :class:`CompositionError`.
        """
        base, _ = self._prepared(overrides)
        full = self._hydras_way(overrides) if base is None else base.full
        node: DictConfig = full.__dict__["_content"]["hydra"]
        return node

    def job_config(
        self,
        overrides: Sequence[str],
        *,
        num: int,
        job_id: str,
        output_dir: str,
        consume: bool = False,
    ) -> DictConfig:
        """The whole config as Hydra's ``run_job`` would have it, ``hydra`` included, the stripped nodes not.

        ``output_dir`` is an absolute path. ``consume`` spares a copy: for a process that uses this composer
        once. Variables of ``hydra.job.env_copy`` have the values they had when the base was composed, in the
        launching process. Raises :class:`CompositionError`.
        """
        base, values = self._prepared(overrides)
        if base is not None:
            cfg = base.full if consume else clone(base.full)
            if consume:
                self._bases.clear()
        if base is not None and self._apply(cfg, values, base):
            self._keep_books(cfg, overrides, base)
        else:
            cfg = self._hydras_way(overrides)
        job, runtime = cfg.hydra.job, cfg.hydra.runtime
        with mapped_errors(overrides), open_dict(cfg):
            job.id = job_id
            job.num = num
        with read_write(runtime), open_dict(runtime):
            runtime.output_dir = output_dir
        return self._with_cache(cfg)

    def _with_cache(self, cfg: DictConfig) -> DictConfig:
        OmegaConf.clear_cache(cfg)
        OmegaConf.get_cache(cfg)["now"].update({(pattern,): value for pattern, value in self.spec.now})
        return cfg

    def _prepared(self, overrides: Sequence[str]) -> tuple[_Base | None, list[Override]]:
        """The base for ``overrides`` and the value overrides; no base where Hydra's way must be taken."""
        with mapped_errors(overrides):
            parsed = _parse(overrides)
            self._loader.validate_sweep_overrides_legal(parsed, run_mode=RunMode.RUN, from_shell=True)
        groups: list[str] = []
        values: list[Override] = []
        for override in parsed:
            if self._is_group_choice(override):
                groups.append(override.input_line or "")
            elif _first_key(override.key_or_group) in self._reserved:
                return None, []
            else:
                values.append(override)
        return self._base(tuple(groups)), values

    def _is_group_choice(self, override: Override) -> bool:
        """As ``Overrides`` in Hydra's defaults_list.py decides it."""
        key = override.key_or_group
        exists = self._group_exists.get(key)
        if exists is None:
            exists = self._group_exists[key] = self._repository.group_exists(key)
        return exists and not isinstance(override._value, dict)

    def _base(self, groups: tuple[str, ...]) -> _Base | None:
        if groups in self._bases:
            self._bases.move_to_end(groups)
            base = self._bases[groups]
        else:
            base = self._bases[groups] = self._compose_base(groups)
            if len(self._bases) > _MAX_BASES:
                self._bases.popitem(last=False)
        if isinstance(base, str):
            raise CompositionError(base)
        return base

    def _compose_base(self, groups: tuple[str, ...]) -> _Base | str | None:
        """The base; or the message of an error that no value override can cure; or nothing if one might."""
        try:
            full = self._hydras_way(groups)
        except CompositionError as error:
            try:
                cfg = self._without_books(groups)
            except CompositionError:
                return str(error)
            return str(error) if _books_are_plain(cfg) else None
        if not _books_are_plain(full):
            return None
        task = clone(full, without=("hydra",))
        given = [*self._hydras, *_parse(groups)]
        return _Base(
            full=full,
            task=task,
            task_lines=sum(not override.is_hydra_override() for override in given),
            interpolated=has_interpolation(task),
        )

    def _without_books(self, groups: Sequence[str]) -> DictConfig:
        """``_load_configuration_impl`` up to the overrides, without the bookkeeping that follows."""
        lines = [*self.spec.hydra_overrides, *groups]
        with mapped_errors(groups):
            parsed, repository = self._loader._parse_overrides_and_create_caching_repo(
                self.spec.config_name, lines
            )
            found = create_defaults_list(
                repo=repository,
                config_name=self.spec.config_name,
                overrides_list=parsed,
                prepend_hydra=True,
                skip_missing=False,
            )
            cfg = self._loader._compose_config_from_defaults_list(defaults=found.defaults, repo=repository)
            OmegaConf.set_struct(cfg, True)
            OmegaConf.set_readonly(cfg.hydra, False)
            ConfigLoaderImpl._apply_overrides_to_config(found.config_overrides, cfg)
        return cfg

    def _hydras_way(self, overrides: Sequence[str]) -> DictConfig:
        with mapped_errors(overrides):
            cfg = self._loader.load_configuration(
                config_name=self.spec.config_name,
                overrides=[*self.spec.hydra_overrides, *overrides],
                run_mode=RunMode.RUN,
            )
        for name in self.spec.strip:
            cfg.__dict__["_content"].pop(name, None)
        return cfg

    def _apply(self, cfg: DictConfig, values: Sequence[Override], base: _Base) -> bool:
        """Apply value overrides in place; False, with ``cfg`` spoilt, if Hydra might do something else."""
        interpolated = base.interpolated
        for override in values:
            if interpolated and _meets_interpolation(cfg, override):
                return False
            line = override.input_line or ""
            with mapped_errors((line,)):
                ConfigLoaderImpl._apply_overrides_to_config([override], cfg)
            interpolated = interpolated or "${" in line
        return True

    def _keep_books(self, cfg: DictConfig, overrides: Sequence[str], base: _Base) -> None:
        """Write into the ``hydra`` node what ``_load_configuration_impl`` would have."""
        hydra = cfg.hydra
        with mapped_errors(overrides):
            given = [*self._hydras, *_parse(overrides)]
            app_overrides = [override for override in given if not override.is_hydra_override()]
            lines = hydra.overrides.task
            if base.task_lines:
                del lines.__dict__["_content"][-base.task_lines :]
            for override in app_overrides:
                lines.append(override.input_line)
            hydra.runtime.cwd = os.getcwd()  # noqa: PTH109  (Hydra's own words)
            naming = hydra.job.config.override_dirname
            hydra.job.override_dirname = get_overrides_dirname(
                overrides=app_overrides,
                kv_sep=naming.kv_sep,
                item_sep=naming.item_sep,
                exclude_keys=naming.exclude_keys,
            )


def _start_hydra(spec: Composition) -> ConfigLoaderImpl:
    """What ``hydra.main`` does for the process before it composes: ``_run_hydra`` and ``Hydra.__init__``."""
    base = version._get_version(__version__ if spec.version_base is None else spec.version_base)
    version.VersionBase.instance().setbase(Version(str(base)))  # not setbase(), which warns of 1.1 once more
    Plugins.instance()
    setup_globals()
    JobRuntime.instance().set("name", spec.job_name)
    search_path = ConfigSearchPathImpl()
    for provider, path in spec.search_path:
        search_path.append(provider=provider, path=path)
    return ConfigLoaderImpl(config_search_path=search_path)


@lru_cache(maxsize=1)
def _parser() -> OverridesParser:
    return OverridesParser.create()  # stateless, and slow to create


@lru_cache(maxsize=1 << 16)
def _parse_line(line: str) -> Override:
    return _parser().parse_overrides([line])[0]


def _parse(lines: Sequence[str]) -> list[Override]:
    return [_parse_line(line) for line in lines]


@lru_cache(maxsize=1 << 12)
def _first_key(key: str) -> str:
    parts = split_key(key)
    return parts[0] if parts else ""


def _meets_interpolation(cfg: DictConfig, override: Override) -> bool:
    """Whether OmegaConf would have to resolve something to apply the override."""
    node: Node | None = cfg
    for part in split_key(override.key_or_group):
        value = held(node) if node is not None else None
        if isinstance(value, str):
            return "${" in value
        if isinstance(value, dict):
            node = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            node = value[int(part)]
        else:
            return False
    if node is None:
        return False
    looks = override.is_add() or override.is_delete() or isinstance(override._value, dict | list)
    return looks and has_interpolation(node)


def _books_are_plain(full: DictConfig) -> bool:
    """Whether no interpolation stands where Hydra reads or writes its bookkeeping."""
    nodes = held(held(full)["hydra"])
    if not isinstance(nodes, dict):
        return False
    lines, runtime, job = (held(nodes[name]) for name in ("overrides", "runtime", "job"))
    if not (isinstance(lines, dict) and isinstance(runtime, dict) and isinstance(job, dict)):
        return False
    return (
        isinstance(held(runtime["choices"]), dict)
        and isinstance(held(job["env_set"]), dict)
        and isinstance(held(lines["task"]), list)
        and isinstance(held(lines["hydra"]), list)
        and not has_interpolation(job["env_copy"])
        and not has_interpolation(job["config"])
    )
