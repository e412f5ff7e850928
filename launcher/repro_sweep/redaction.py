"""What looks like a secret, and how it is kept out of records, logs and messages."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_KEY = re.compile(
    r"(.*[_-])?(password|passwd|passphrase|secret|credentials?"
    r"|(api|access|secret|private|auth|account|encryption|signing)[_-]?key"
    r"|(auth|access|api|bearer|refresh|session|secret|personal|hf|wandb|github|gitlab|slack)[_-]?token)"
    r"|token|pwd",
    re.IGNORECASE,
)
"""Not every token is one: there are ``pad_token`` and ``max_tokens``."""
_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]*@")
_ASSIGNMENT = re.compile(r"(?P<key>[\w.@/+~-]+)=(?P<value>'[^']*'|\"[^\"]*\"|\S+)")


def redacted(text: str) -> str:
    """A text without the passwords of the URLs in it."""
    return _PASSWORD.sub(rf"\1:{HIDDEN}@", text)


def secret_message(key: str) -> str:
    """What is wrong with a key whose value is a secret that stands in the configuration."""
    variable = re.sub(r"\W", "_", key.rpartition(".")[2]).upper()
    return (
        f"looks like a secret, which would be kept in records and in MLflow: write ${{oc.env:{variable}}} and put it"
        " into the environment (or name the key in sweep.not_secret, if it is none)"
    )


@functools.cache
def is_secret(key: str) -> bool:
    """Whether a key's name says that its value is a secret: ``db.password``, ``API_KEY``, ``hf_token``."""
    return _KEY.fullmatch(key.lstrip("+~").rpartition(".")[2]) is not None


def without_secrets(command: str) -> str:
    """A command line without the values of such keys, and without passwords."""

    def hide(found: re.Match[str]) -> str:
        return f"{found['key']}={HIDDEN}" if is_secret(found["key"]) else found[0]

    return _ASSIGNMENT.sub(hide, redacted(command))


def hidden(value: Any, key: str = "") -> Any:
    """JSON-able data without secrets: texts below such keys, and passwords of URLs."""
    if isinstance(value, Mapping):
        return {name: hidden(each, str(name)) for name, each in value.items()}
    if isinstance(value, str):
        return HIDDEN if key and is_secret(key) and value and "${" not in value else redacted(value)
    if isinstance(value, Sequence):
        return [hidden(each, key) for each in value]
    return value
