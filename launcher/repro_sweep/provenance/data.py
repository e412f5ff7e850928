"""Fingerprints of the data that trials read: hashes of files and folders, DVC's where it keeps them, or a URI's state.

Files are hashed side by side, and read again only if their size or time of change is another one. A manifest for each
fingerprint says which file it was that changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from repro_sweep.errors import SweepError
from repro_sweep.redaction import redacted
from repro_sweep.sweep import Data

_CHUNK = 1 << 20
_RACY_NS = 2_000_000_000
_FOLDER = "data"
_HASHES = "hashes.json"
_URI = re.compile(r"[a-z][a-z0-9+.-]*://")
_THREADS = min(16, 2 * (os.cpu_count() or 1))
_FRESH_S = 10.0


def fingerprint(name: str, where: str, cwd: Path, store: Path) -> Data:
    """The fingerprint of what ``where`` names: a path below ``cwd`` or anywhere, or a URI.

    Args:
        name: what the sweep calls it, for messages.
        where: path or URI.
        cwd: where relative paths begin.
        store: where hashes and manifests are kept.

    Raises:
        SweepError: it is not there, cannot be read, or is not what DVC says.
    """
    if _URI.match(where):
        return _of_uri(name, where)
    path = Path(os.path.normpath(cwd / where))
    hashes = _Hashes(store / _FOLDER)
    try:
        recorded = _recorded_by_dvc(path)
        if recorded is not None:
            found = _checked_with_dvc(name, path, recorded, hashes)
        elif path.exists():
            found = _of_files(path, hashes, "sha256")
        else:
            raise SweepError(f"sweep.data.{name}: {path} is not there")
    except OSError as error:
        raise SweepError(f"sweep.data.{name}: {path} cannot be read: {error}") from error
    hashes.save(found)
    return Data(uri=str(path), digest=found.digest, files=len(found.files), size=found.size)


def changed(name: str, data: Data, store: Path) -> str | None:
    """What is wrong with data that had this fingerprint, in one line that names the file; None: it is the same."""
    try:
        now = fingerprint(name, data.uri, Path("/"), store)
    except SweepError as error:
        return str(error)
    if now.digest == data.digest:
        return None
    what = redacted(data.uri)
    old, new = (_manifest(store, digest) for digest in (data.digest, now.digest))
    if old and new and data.files + now.files > 2:
        files = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        more = f" and {len(files) - 1} others" if len(files) > 1 else ""
        what = f"{data.uri}/{files[0]}{more}"
    return f"sweep.data.{name}: {what} has changed since the sweep was submitted"


class Guard:
    """Looks whether the data of a sweep are still the same, at most every ten seconds."""

    def __init__(self, data: Mapping[str, Data], store: Path) -> None:
        self._data = data
        self._store = store
        self._lock = threading.Lock()
        self._looked_at = -_FRESH_S
        self._found: str | None = None

    def look(self) -> str | None:
        """What is wrong, in one line; None: nothing."""
        with self._lock:
            if self._data and time.monotonic() >= self._looked_at + _FRESH_S:
                found = (changed(name, data, self._store) for name, data in self._data.items())
                self._found = next(filter(None, found), None)
                self._looked_at = time.monotonic()
            return self._found


@dataclass(frozen=True, slots=True)
class _Files:
    """Hashes of files by their paths below the data's; that of a single file is called ``.``."""

    digest: str
    files: Mapping[str, str]
    size: int


class _Hashes:
    """Hashes of files by size and times."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began_ns = time.time_ns()
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = json.loads((folder / _HASHES).read_text(encoding="utf-8"))

    def of(self, path: Path, algorithm: str) -> tuple[str, int]:
        """A file's hash and size."""
        about = path.stat()
        now = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
        key = f"{algorithm}:{path}"
        known = self._known.get(key)
        if known is not None and known[0] == now:
            return known[1], about.st_size
        with path.open("rb", buffering=0) as file:
            total = hashlib.new(algorithm, usedforsecurity=False)
            while data := file.read(_CHUNK):
                total.update(data)
        if about.st_ctime_ns < self._began_ns - _RACY_NS:
            self._known[key] = [now, total.hexdigest()]
        return total.hexdigest(), about.st_size

    def save(self, found: _Files) -> None:
        """Keep them, and the manifest of what was found; where that cannot be, they are made again."""
        with contextlib.suppress(OSError):
            keep_manifest(self._folder.parent, found.digest, found.files)
            _write(self._folder / _HASHES, json.dumps(self._known))


def keep_manifest(store: Path, digest: str, files: Mapping[str, str]) -> None:
    """Have the hashes of the files of data at hand, so that the file that has changed can be named."""
    folder = store / _FOLDER
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    _write(folder / f"{digest}.json", json.dumps(files))


def manifests(found: Iterable[Data], store: Path) -> dict[str, dict[str, str]]:
    """Hashes of files by the data's digests, as far as they are known."""
    return {each.digest: files for each in found if (files := _manifest(store, each.digest))}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _manifest(store: Path, digest: str) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads((store / _FOLDER / f"{digest}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _of_files(path: Path, hashes: _Hashes, algorithm: str) -> _Files:
    names = sorted(_below(path)) if path.is_dir() else ["."]
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(lambda name: hashes.of(path / name, algorithm), names))
    files = {name: digest for name, (digest, _) in zip(names, found, strict=True)}
    size = sum(each for _, each in found)
    if not path.is_dir():
        return _Files(files["."], files, size)
    text = "".join(f"{name}\0{digest}\0" for name, digest in files.items())
    return _Files(hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(), files, size)


def _below(path: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(path, followlinks=True):
        folders.sort()
        for name in names:
            yield (Path(parent) / name).relative_to(path).as_posix()


# --- DVC -----------------------------------------------------------------------------------------------------


def _recorded_by_dvc(path: Path) -> str | None:
    """The MD5 that DVC has of a file or folder (that one ends with ``.dir``): in ``PATH.dvc``, or in ``dvc.lock``."""
    beside = path.with_name(f"{path.name}.dvc")
    if beside.is_file():
        for out in _yaml(beside).get("outs", ()):
            if path == Path(os.path.normpath(path.parent / str(out.get("path")))):
                return _hash_in(out)
    for folder in path.parents:
        lock = folder / "dvc.lock"
        if lock.is_file():
            stages: Mapping[str, Any] = _yaml(lock).get("stages", {})
            outs = [out for stage in stages.values() for out in stage.get("outs", ())]
            found = [out for out in outs if path == Path(os.path.normpath(folder / str(out.get("path"))))]
            if found:
                return _hash_in(found[0])
        if (folder / ".dvc").is_dir():
            break
    return None


def _hash_in(out: Mapping[str, Any]) -> str | None:
    found = out.get("md5")
    return None if found is None else str(found)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is no file of DVC's: {' '.join(str(error).split())}") from error
    return found if isinstance(found, dict) else {}


def _checked_with_dvc(name: str, path: Path, recorded: str, hashes: _Hashes) -> _Files:
    """DVC's hash, if the data are what it was made of; data that are not here (not pulled) are taken at its word."""
    if not path.exists():
        return _Files(f"md5:{recorded}", {}, 0)
    found = _of_files(path, hashes, "md5")
    here = found.digest if path.is_file() else f"{_dvc_tree(found.files)}.dir"
    if here != recorded:
        raise SweepError(
            f"sweep.data.{name}: {path} is not what DVC has recorded (its hash is {here}, recorded is {recorded});"
            " 'dvc commit' records it, 'dvc checkout' brings the recorded one back"
        )
    return _Files(f"md5:{recorded}", found.files, found.size)


def _dvc_tree(files: Mapping[str, str]) -> str:
    """DVC's hash of a folder: of the JSON of its files (``dvc_data.hashfile.tree.Tree.as_bytes``)."""
    listed = [{"md5": digest, "relpath": name} for name, digest in sorted(files.items())]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest()


# --- other places ----------------------------------------------------------------------------------------------


def _of_uri(name: str, uri: str) -> Data:
    where = f"sweep.data.{name}"
    if find_spec("fsspec") is None:
        raise SweepError(f"{where}: fsspec is not installed, which reads {redacted(uri)}; pip install fsspec")
    import fsspec

    try:
        system, path = fsspec.url_to_fs(uri)
        entries = system.find(path, detail=True) if system.isdir(path) else {path: system.info(path)}
    except Exception as error:  # whatever file system it is
        raise SweepError(f"{where}: {redacted(uri)} cannot be read: {_one_line(error)}") from error
    if not entries:
        raise SweepError(f"{where}: {redacted(uri)} is not there")
    marks = [f"{entry}\0{_mark(about, system.ukey, entry)}" for entry, about in sorted(entries.items())]
    digest = hashlib.sha256("\0\0".join(marks).encode()).hexdigest()
    size = sum(int(about.get("size") or 0) for about in entries.values())
    return Data(uri=uri, digest=digest, files=len(entries), size=size)


def _mark(about: Mapping[str, Any], ukey: Callable[[str], str], entry: str) -> str:
    """What changes when an object does: the store's own checksum, else what fsspec thinks of it."""
    for key in ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "checksum", "blob_id"):
        if about.get(key):
            return str(about[key])
    return str(ukey(entry))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
