"""What looks like a secret, and how it is kept out of records, logs and messages."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "***"
_NAME = re.compile(
    r"(?!(?:n|num|max|min|not|no|non)_)"  # max_session_tokens, not_secret
    r"(?:"
    r".*passw(?:or)?ds?"
    r"|(?:.*_)?(?:passphrase|pwd|secret|credential)s?"
    r"|(?:.*_)?(?:db|user|admin|root|smtp|ftp|mysql|postgres|pg|redis|mongo)_?(?:pass|pw)"
    r"|(?:.*_)?(?:api|access|secret|private|auth|account|encryption|signing|ssh|hmac|ngc)_?keys?"
    r"|(?:.*_)?(?:o?auth|access|api|bearer|refresh|session|secret|security|personal|private|service|app|login|deploy"
    r"|webhook|jwt|hub|hf|hugging_?face|wandb|comet|neptune|mlflow|clearml|kaggle|databricks|git|git_?hub|git_?lab|slack"
    r"|discord|telegram|open_?ai|anthropic|ngc|nvidia|aws|azure|gcp|vault|registry|docker|pypi|npm)(?:_?bot)?_?tokens?"
    r"|token"
    r")"
)
"""In lower case, with its words apart. Not every token is one: there are ``pad_token`` and ``max_tokens``."""
_WORDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_VARIABLE = re.compile(r"TOKEN|SECRET|PASSW|PASSPHRASE|PWD|CREDENTIAL|KEY|PRIVATE|AUTH|COOKIE", re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):([^/\s]*)@")
_INTERPOLATION = re.compile(r"\$\{[^${}]*\}")
_ASSIGNMENT = re.compile(r"(?P<key>[\w.@/+~-]+)=(?P<value>'[^']*'|\"[^\"]*\"|\S+)")


def redacted(text: str) -> str:
    """A text without the passwords of the URLs in it."""
    return _PASSWORD.sub(rf"\1:{HIDDEN}@", text)


def has_password(text: str) -> bool:
    """Whether a URL in a text has a password that stands there, and is no interpolation."""
    if "://" not in text or "@" not in text:
        return False
    while (shorter := _INTERPOLATION.sub("\0", text)) != text:
        text = shorter
    return any(password and "\0" not in password for _, password in _PASSWORD.findall(text))


def secret_message(key: str, *, url: bool = False) -> str:
    """What is wrong with a key whose value is a secret, or a URL with one, that stands in the configuration."""
    variable = re.sub(r"\W+", "_", key.rpartition(".")[2]).strip("_").upper()
    what = "has a URL with a password" if url else "looks like a secret"
    return (
        f"{what}, which would be kept in records and in MLflow: write ${{oc.env:{variable}}} and put it"
        " into the environment (or name the key in sweep.not_secret, if it is none)"
    )


@functools.lru_cache(1 << 14)
def is_secret(key: str) -> bool:
    """Whether a key's name says that its value is a secret: ``db.password``, ``API_KEY``, ``hf_token``.

    So does the name of a key above it (``api_keys.mine``), but for ``token``, of which there may be a ``dim``.
    """
    *above, name = key.lstrip("+~").split(".")
    return _is_named(name) or any(each != "token" and _is_named(each) for each in above)


def _is_named(name: str) -> bool:
    return _NAME.fullmatch(_WORDS.sub("_", name).strip("_").lower()) is not None


def is_secret_variable(name: str) -> bool:
    """The same for variables of the environment, where rather one too many is left out: nothing is refused for it."""
    return is_secret(name) or _VARIABLE.search(name) is not None


def reveals(value: object, *, secret: bool) -> bool:
    """Whether a value is a secret that stands there: any text or number where ``secret``, else a URL's password."""
    if isinstance(value, str):
        return (secret and bool(value) and "${" not in value) or has_password(value)
    return secret and isinstance(value, int | float | bytes) and not isinstance(value, bool)


def revealed(value: Any, key: str, not_secret: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """The keys of the secrets that stand in JSON-able data, and what is wrong with each.

    ``key``: the data's own. ``not_secret``: keys whose values are none, nor what is below them.
    """
    if is_excepted(key, not_secret):
        return
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from revealed(each, f"{key}.{name}", not_secret)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from revealed(each, key, not_secret)
    elif reveals(value, secret=is_secret(key)):
        yield key, secret_message(key, url=not is_secret(key))


def is_excepted(key: str, not_secret: Collection[str]) -> bool:
    """Whether a key, or one above it, is among those that only look like a secret's."""
    return any(key == each or key.startswith((f"{each}.", f"{each}[")) for each in not_secret)


def without_secrets(command: str) -> str:
    """A command line without the values of such keys, and without passwords."""

    def hide(found: re.Match[str]) -> str:
        return f"{found['key']}={HIDDEN}" if is_secret(found["key"]) else found[0]

    return _ASSIGNMENT.sub(hide, redacted(command))


def hidden(value: Any, key: str = "") -> Any:
    """JSON-able data without secrets: texts and numbers below such keys, and passwords of URLs."""
    if isinstance(value, Mapping):
        return {name: hidden(each, f"{key}.{name}" if key else str(name)) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [hidden(each, key) for each in value]
    if key and is_secret(key) and reveals(value, secret=True):
        return HIDDEN
    return redacted(value) if isinstance(value, str) else value
