"""Which credentials MLflow's client will use for a server, found as it finds them; they are never shown or recorded.

Never imports mlflow: what it does is in its ``utils/credentials.py`` and ``utils/rest_utils.py``, and in ``requests``.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from repro_sweep.errors import TrackingError

USER = "MLFLOW_TRACKING_USERNAME"
PASSWORD = "MLFLOW_TRACKING_PASSWORD"  # noqa: S105  (a variable's name)
TOKEN = "MLFLOW_TRACKING_TOKEN"  # noqa: S105
FILE = "~/.mlflow/credentials"
PLACES = f"set {USER} and {PASSWORD}, or {TOKEN}, or write {FILE}"
_FOREIGN = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What is sent with each request.

    ``header`` is the value of ``Authorization``, None where there are no credentials. ``user`` is the account's name
    where it is known. ``foreign``: nothing is known of them here, for instance as a plugin of MLflow's
    signs the requests.
    """

    who: str
    user: str | None = None
    header: str | None = field(default=None, repr=False)
    foreign: bool = False

    @property
    def name(self) -> str:
        """Whose they are, in a word or two: ``user 'ada'``."""
        return self.who.partition(",")[0].partition(":")[0] if self.user is None else f"user {self.user!r}"

    @property
    def missing(self) -> bool:
        """Whether it is known that nobody speaks to the server."""
        return self.header is None and self.user is None and not self.foreign


def find(uri: str, environ: Mapping[str, str] = os.environ) -> Credentials:
    """The credentials that MLflow would use now for the server at ``uri``.

    Raises:
        TrackingError: the credentials file cannot be understood; MLflow could not either.
    """
    for name in _FOREIGN:
        if environ.get(name, "").lower() not in {"", "false", "0"}:
            return Credentials(who=f"the credentials of {name}", foreign=True)
    user, password = environ.get(USER), environ.get(PASSWORD)
    places = [USER if user else "", PASSWORD if password else ""]
    file = Path(environ.get("HOME", "~"), ".mlflow", "credentials").expanduser()
    there = _from_file(file)
    if not user and there[0]:
        user, places[0] = there[0], str(file)
    if not password and there[1]:
        password, places[1] = there[1], str(file)
    kept = _from_netrc(uri, environ)
    if kept is not None:  # requests lets it win
        return Credentials(who=f"user {kept[0]!r}, from the netrc file", user=kept[0], header=_basic(*kept))
    if user and password:
        origin = " and ".join(dict.fromkeys(places))
        return Credentials(who=f"user {user!r}, from {origin}", user=user, header=_basic(user, password))
    if environ.get(TOKEN):
        return Credentials(who=f"the token in {TOKEN}", header=f"Bearer {environ[TOKEN]}")
    if user or password:
        has, lacks = (places[0], PASSWORD) if user else (places[1], USER)
        return Credentials(who=f"nobody: {has} has one half, {lacks} is not set", user=user or None)
    return Credentials(who="nobody: there are none")


def known(uri: str, environ: Mapping[str, str] = os.environ) -> Credentials:
    """What is known of them, for a message that must never fail."""
    with contextlib.suppress(TrackingError):
        return find(uri, environ)
    return Credentials(who="this user", foreign=True)


def _basic(user: str, password: str) -> str:
    return f"Basic {base64.standard_b64encode(f'{user}:{password}'.encode()).decode()}"


def _from_file(file: Path) -> tuple[str | None, str | None]:
    parser = configparser.ConfigParser()
    try:
        parser.read(file)
        if "mlflow" not in parser:
            return None, None
        section = parser["mlflow"]
        return section.get(USER.lower()), section.get(PASSWORD.lower())
    except configparser.InterpolationError as error:  # its text has the value
        raise TrackingError(f"{file}: write %% for each % of a password") from error
    except (configparser.Error, UnicodeDecodeError) as error:
        raise TrackingError(
            f"{file}: cannot be read as a credentials file of MLflow: a line [mlflow], and below it"
            f" {USER.lower()} = … and {PASSWORD.lower()} = …"
        ) from error


def _from_netrc(uri: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """What ``requests`` would take from a netrc file."""
    named = environ.get("NETRC")
    places = (
        [Path(named)] if named else [Path(environ.get("HOME", "~"), name) for name in (".netrc", "_netrc")]
    )
    file = next((each.expanduser() for each in places if each.expanduser().exists()), None)
    host = urlsplit(uri).hostname
    if file is None or host is None:
        return None
    with contextlib.suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
        found = netrc.netrc(str(file)).authenticators(host)
        if found is not None and any(found):
            return found[0] or found[1] or "", found[2] or ""
    return None
