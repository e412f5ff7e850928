"""The front door: ``repro-sweep OVERRIDE...`` as a Hydra application that is always a multirun with our sweeper."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf

from repro_sweep import task
from repro_sweep.config.hydra_errors import mapped_errors
from repro_sweep.errors import SweepError
from repro_sweep.tracking import child

_VERSION_BASE = "1.3"
_CONFIG_DIR = "conf"
_PRUNERS = ("sweep/pruner", "sweep/repeats_pruner")
_FORCED = ("hydra/sweeper=repro_sweep", "hydra.mode=MULTIRUN")


def named_by_sweep(config: object) -> None:
    """Stands for the task function in Hydra's calls; the sweep's YAML names the real one."""
    raise AssertionError(f"the placeholder of a task was called with {config!r}")


def main(arguments: Sequence[str], *, forced: Sequence[str] = ()) -> int:
    """Run a sweep, or show what Hydra shows; returns the exit status.

    Raises:
        UserError: something to correct first.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage, four lines of it
    args = parser.parse_args(list(arguments))
    if args.run:
        raise SweepError(
            "--run: repro-sweep always runs a sweep; run the application itself for a single job"
        )
    shown = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    if not shown and not forced:
        child.start_early()
    version.setbase(_VERSION_BASE)
    sys.path.insert(0, str(Path.cwd()))
    search_path = _search_path(args)
    config_name = args.config_name or "config"
    with mapped_errors(args.overrides):
        dotted = _named_task(search_path, config_name, args.overrides)
    if dotted is not None:
        task.load(task.from_dotted(dotted, "sweep.task"))
    name = dotted.split(".")[-2] if dotted is not None and "." in dotted else "repro_sweep"
    hydra = Hydra.create_main_hydra2(task_name=name, config_search_path=search_path)
    try:
        with mapped_errors(args.overrides):
            args.overrides = _with_pruners_added(hydra, config_name, args.overrides)
        show = _shown(hydra, parser, args, config_name)
        if show is None:
            _multirun(hydra, config_name, args.overrides, [*_FORCED, *forced])
        else:
            with mapped_errors(args.overrides):
                show()
    finally:
        GlobalHydra.instance().clear()
    return 0


def _with_pruners_added(hydra: Hydra, config_name: str, overrides: Sequence[str]) -> list[str]:
    """``sweep/pruner=median`` as ``+sweep/pruner=median`` where the sweep's file chooses none that it could replace."""
    chosen = [override for override in overrides if override.split("=")[0] in _PRUNERS]
    if not chosen:
        return list(overrides)
    rest = [override for override in overrides if override not in chosen]
    found = hydra.config_loader.compute_defaults_list(
        config_name=config_name, overrides=rest, run_mode=RunMode.MULTIRUN
    )
    known = found.overrides.known_choices
    return [f"+{each}" if each in chosen and each.split("=")[0] not in known else each for each in overrides]


def _multirun(hydra: Hydra, config_name: str, overrides: Sequence[str], forced: Sequence[str]) -> None:
    """``Hydra.multirun``, in which only what Hydra itself says of the configuration is the user's mistake."""
    with mapped_errors(overrides):
        config = hydra.compose_config(
            config_name=config_name,
            overrides=[*overrides, *forced],
            run_mode=RunMode.MULTIRUN,
            with_log_configuration=False,
        )
        callbacks = Callbacks(config)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
        sweeper = Plugins.instance().instantiate_sweeper(
            config=config, hydra_context=context, task_function=named_by_sweep
        )
    callbacks.on_multirun_start(config=config, config_name=config_name)
    arguments = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(arguments, list)
    sweeper.sweep(arguments=arguments)
    callbacks.on_multirun_end(config=config, config_name=config_name)


def _refuse(message: str) -> NoReturn:
    raise SweepError(message)


def _shown(
    hydra: Hydra, parser: argparse.ArgumentParser, args: argparse.Namespace, config_name: str
) -> Callable[[], object] | None:
    """What Hydra's own options ask for instead of a sweep."""
    overrides = args.overrides
    if args.help:
        return lambda: hydra.app_help(config_name=config_name, args_parser=parser, args=args)
    if args.hydra_help:
        return lambda: hydra.hydra_help(config_name=config_name, args_parser=parser, args=args)
    if args.cfg:
        return lambda: hydra.show_cfg(config_name, overrides, args.cfg, args.package, args.resolve)
    if args.info:
        return lambda: hydra.show_info(args.info, config_name=config_name, overrides=[*overrides, *_FORCED])
    if args.shell_completion:
        return lambda: hydra.shell_completion(config_name=config_name, overrides=overrides)
    return None


def _search_path(args: argparse.Namespace) -> ConfigSearchPath:
    primary = Path(args.config_path or _CONFIG_DIR).absolute()
    extra = Path(args.config_dir).absolute() if args.config_dir else None
    if extra is not None and not extra.is_dir():
        raise SweepError(f"--config-dir: {extra} is not a directory")
    if not primary.is_dir():
        if args.config_path is not None or extra is None:
            raise SweepError(
                f"there is no directory {primary}: start repro-sweep where '{_CONFIG_DIR}/' is,"
                " or name another with --config-dir or --config-path"
            )
        primary, extra = extra, None
    search_path = create_config_search_path(str(primary))
    if extra is not None:
        search_path.prepend(
            provider="command-line", path=f"file://{extra}", anchor=SearchPathQuery(provider="schema")
        )
    return search_path


def _named_task(search_path: ConfigSearchPath, config_name: str, overrides: Sequence[str]) -> str | None:
    """The task that the sweep names, before the whole config can be composed: that needs what the task registers.

    None where it cannot be told; what is wrong is then seen when the whole config is composed.
    """
    choice: object = None
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group == "sweep.task":
            return str(override.value())
        if override.key_or_group == "sweep":
            choice = override.value()
    if choice is None:
        choice = _default_sweep(search_path, config_name)
    if not isinstance(choice, str):
        return None
    try:
        config = ConfigLoaderImpl(search_path).load_configuration(f"sweep/{choice}", [], RunMode.RUN)
        named = OmegaConf.select(config, "sweep.task")
    except Exception:  # noqa: BLE001  (said again, and well, by the composition of the whole config)
        return None
    return None if named is None else str(named)


def _default_sweep(search_path: ConfigSearchPath, config_name: str) -> object:
    loaded = ConfigRepository(search_path).load_config(config_name)
    for default in (loaded.defaults_list if loaded is not None else None) or ():
        if isinstance(default, GroupDefault) and default.group == "sweep":
            return default.value
    return None


def command_line() -> str:
    """The command line of this process, for the record."""
    import shlex

    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])  # noqa: PTH119  (not a path to open)
