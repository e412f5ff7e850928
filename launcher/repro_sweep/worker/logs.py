"""Hydra's job logging: configured once in the zygote where that is surely the same, since it costs a trial 4 ms.

All that differs between trials is then the folder of their log files. It is the same for handlers of the root logger
that write to streams and files, and strings that refer to nothing but the output directory and the job's name. Any
other configuration is made in the trial, by Hydra itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from hydra._internal.logging_config import configure_logging
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf

_FOLDER = "/repro-sweep-output-dir"
_INTERPOLATION = re.compile(r"\$\{([^{}]*)\}")
_KNOWN = {
    "hydra.runtime.output_dir": _FOLDER,
    "hydra:runtime.output_dir": _FOLDER,
    "hydra.job.name": None,
    "hydra:job.name": None,
}
_HANDLERS = {"logging.StreamHandler", "logging.FileHandler"}
_SECTIONS = {"version", "formatters", "handlers", "root", "disable_existing_loggers"}


class JobLogging:
    """Prepared in the zygote with :meth:`prepare`, set up in each trial with :meth:`enter`."""

    def __init__(self) -> None:
        self._node: DictConfig | None = None
        self._key: object = None
        self._handlers: list[logging.Handler] | None = None

    def prepare(self, hydra: DictConfig) -> None:
        """Configure what this hydra node asks for, with no file opened and nothing left at the root logger."""
        if hydra is self._node:
            return
        self._node, key = hydra, _key(hydra)
        if key == self._key:
            return
        self._key, self._handlers = key, None
        config = key[0]
        if not _is_simple(config):
            return
        prepared = _filled(config, hydra.job.name)
        for handler in prepared["handlers"].values():
            if handler["class"] == "logging.FileHandler":
                handler["delay"] = True
        configure_logging(prepared)
        self._handlers = logging.root.handlers[:]
        logging.root.handlers.clear()

    def enter(self, hydra: DictConfig) -> None:
        """In the trial: log where its hydra node says."""
        same = hydra is self._node or _key(hydra) == self._key
        if self._handlers is None or hydra.verbose or not same:
            configure_log(hydra.job_logging, hydra.verbose)
            return
        for handler in self._handlers:
            if isinstance(handler, logging.FileHandler):
                handler.baseFilename = handler.baseFilename.replace(_FOLDER, hydra.runtime.output_dir, 1)
                handler.stream = handler._open()
        logging.root.handlers[:] = self._handlers


def _key(hydra: DictConfig) -> tuple[Any, str]:
    node = hydra.job_logging
    return (None if node is None else OmegaConf.to_container(node, resolve=False), hydra.job.name)


def _is_simple(config: Any) -> bool:
    if (
        not isinstance(config, dict)
        or not config.keys() <= _SECTIONS
        or config.get("disable_existing_loggers", True)
    ):
        return False
    root, handlers = config.get("root"), config.get("handlers")
    if not isinstance(root, dict) or not isinstance(handlers, dict):
        return False
    if any(
        not isinstance(handler, dict) or handler.get("class") not in _HANDLERS
        for handler in handlers.values()
    ):
        return False
    return all(
        name in _KNOWN for text in _strings(config) for name in _INTERPOLATION.findall(text)
    ) and not any("${" in _INTERPOLATION.sub("", text) or "\\" in text for text in _strings(config))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _filled(value: Any, job_name: str) -> Any:
    if isinstance(value, str):
        return _INTERPOLATION.sub(lambda found: _KNOWN[found[1]] or job_name, value)
    if isinstance(value, dict):
        return {key: _filled(item, job_name) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, job_name) for item in value]
    return value
