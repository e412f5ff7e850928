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
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
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
_LOCAL = re.compile(r"^(file|local)://")
_THREADS = min(16, 2 * (os.cpu_count() or 1))
_FRESH_S = 10.0
_PAUSE = 20
"""What was found counts for so many times as long as the look has taken, but never for longer than ten seconds."""
_WAITS_S = (0.5, 1.0, 2.0)
_DVC_2 = "md5-dos2unix"
_TEXT = bytes(range(32, 127)) + b"\n\r\t\f\b"
_SUMS = (
    "ETag", "etag", "Content-MD5", "content_md5", "Digest", "Last-Modified", "md5Hash", "md5Checksum", "crc32c", "CRC",
    "checksum", "blob_id", "sha",
)  # fmt: skip
"""What comes with an object and says what it holds; HTTP's time too: an ETag can be whatever its server likes."""
_TIMES = (
    "LastModified", "last_modified", "mtime", "modified", "updated", "modifiedTime", "modificationTime", "modify",
    "date_time", "created",
)  # fmt: skip


class UnreadableError(SweepError):
    """Data cannot be read now; whether they have changed is not known."""


def fingerprint(name: str, where: str, cwd: Path, store: Path) -> Data:
    """The fingerprint of what ``where`` names: a path below ``cwd`` or anywhere, or a URI.

    Args:
        name: what the sweep calls it, for messages.
        where: path or URI.
        cwd: where relative paths begin.
        store: where hashes and manifests are kept.

    Raises:
        UnreadableError: it cannot be read now.
        SweepError: it is not there, or is not what DVC says.
    """
    if _URI.match(where) and not _LOCAL.match(where):
        return _of_uri(name, where)
    path = Path(os.path.normpath(cwd / _LOCAL.sub("", where)))
    hashes = _Hashes(store / _FOLDER)
    try:
        recorded = _recorded_by_dvc(path)
        if recorded is not None:
            found = _checked_with_dvc(name, path, *recorded, hashes)
        elif path.exists():
            found = _of_files(path, hashes, "sha256")
        else:
            raise SweepError(f"sweep.data.{name}: {path} is not there")
    except OSError as error:
        kind = SweepError if isinstance(error, FileNotFoundError) else UnreadableError
        raise kind(f"sweep.data.{name}: {path} cannot be read: {_one_line(error)}") from error
    hashes.save(found)
    return Data(uri=str(path), digest=found.digest, files=len(found.files), size=found.size)


def changed(name: str, data: Data, store: Path) -> str | None:
    """What is wrong with data that had this fingerprint, in one line that names the file; None: it is the same."""
    try:
        return _change(name, data, store)
    except UnreadableError as error:
        return str(error)


def _change(name: str, data: Data, store: Path) -> str | None:
    try:
        now = fingerprint(name, data.uri, Path("/"), store)
    except UnreadableError:
        raise
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
    """Looks whether the data of a sweep are still the same: before each start, but for a twentieth of the time at most.

    Only a look that takes more than half a second takes a larger part: after ten seconds there is another one.
    """

    def __init__(self, data: Mapping[str, Data], store: Path) -> None:
        self._data = data
        self._store = store
        self._lock = threading.Lock()
        self._due = 0.0
        self._found: str | None = None

    def look(self) -> str | None:
        """What is wrong, in one line; None: nothing.

        Raises:
            UnreadableError: they cannot be read now, also not some seconds later. The next call tries again.
        """
        for wait_s in _WAITS_S:
            with contextlib.suppress(UnreadableError):
                return self._look()
            time.sleep(wait_s)
        return self._look()

    def _look(self) -> str | None:
        with self._lock:
            began = time.monotonic()
            if self._data and began >= self._due:
                found = (_change(name, data, self._store) for name, data in self._data.items())
                self._found = next(filter(None, found), None)
                now = time.monotonic()
                self._due = now + min(_FRESH_S, _PAUSE * (now - began))
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
        self._new = False
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
        with path.open("rb") as file:
            total = hashlib.new("md5" if algorithm == _DVC_2 else algorithm, usedforsecurity=False)
            while data := file.read(_CHUNK):
                total.update(_read_by_dvc_2(data) if algorithm == _DVC_2 else data)
        if about.st_ctime_ns < self._began_ns - _RACY_NS:
            self._known[key] = [now, total.hexdigest()]
            self._new = True
        return total.hexdigest(), about.st_size

    def save(self, found: _Files) -> None:
        """Keep them, and the manifest of what was found; where that cannot be, they are made again."""
        with contextlib.suppress(OSError):
            keep_manifest(self._folder.parent, found.digest, found.files)
            if self._new:
                _write(self._folder / _HASHES, json.dumps(self._known))


def keep_manifest(store: Path, digest: str, files: Mapping[str, str]) -> None:
    """Have the hashes of the files of data at hand, so that the file that has changed can be named."""
    folder = store / _FOLDER
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    path = folder / f"{digest}.json"
    if files and not path.exists():
        _write(path, json.dumps(files))


def manifests(found: Iterable[Data], store: Path) -> dict[str, dict[str, str]]:
    """Hashes of files by the data's digests, as far as they are known."""
    return {each.digest: files for each in found if (files := _manifest(store, each.digest))}


def _write(path: Path, text: str) -> None:
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)


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


def _recorded_by_dvc(path: Path) -> tuple[str, str] | None:
    """The hash that DVC has of a file or folder (that one ends with ``.dir``), and how it is made.

    It stands in ``PATH.dvc``, or in ``dvc.lock``.
    """
    beside = path.with_name(f"{path.name}.dvc")
    if beside.is_file():
        for out in _outs(beside, _yaml(beside)):
            if path == Path(os.path.normpath(path.parent / str(out.get("path")))):
                return _hash_in(out)
    for folder in path.parents:
        lock = folder / "dvc.lock"
        if lock.is_file():
            stages = _yaml(lock).get("stages") or {}
            if not isinstance(stages, dict):
                raise _malformed(lock, "'stages' is no mapping")
            outs = [out for stage in stages.values() for out in _outs(lock, stage)]
            found = [out for out in outs if path == Path(os.path.normpath(folder / str(out.get("path"))))]
            if found:
                return _hash_in(found[0])
        if (folder / ".dvc").is_dir():
            break
    return None


def _outs(file: Path, stage: object) -> list[dict[str, Any]]:
    if not isinstance(stage, dict):
        raise _malformed(file, f"a stage is no mapping but {stage!r}")
    outs = stage.get("outs") or []
    if not isinstance(outs, list) or not all(isinstance(out, dict) for out in outs):
        raise _malformed(file, "'outs' is no list of mappings")
    return outs


def _hash_in(out: Mapping[str, Any]) -> tuple[str, str] | None:
    found = out.get("md5")
    return None if found is None else (str(found), "md5" if "hash" in out else _DVC_2)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise _malformed(path, _one_line(error)) from error
    if not isinstance(found, dict | None):
        raise _malformed(path, "it is no mapping")
    return found or {}


def _malformed(path: Path, what: str) -> SweepError:
    return SweepError(f"{path} is no file of DVC's: {what}")


def _read_by_dvc_2(block: bytes) -> bytes:
    """What DVC 2 hashes of a block, as ``dvc_data.hashfile.hash`` still has it: text with the line ends of Unix."""
    begin = block[:512]
    is_text = b"\0" not in begin and len(begin.translate(None, _TEXT)) / len(begin) <= 0.3
    return block.replace(b"\r\n", b"\n") if is_text else block


def _checked_with_dvc(name: str, path: Path, recorded: str, algorithm: str, hashes: _Hashes) -> _Files:
    """DVC's hash, if the data are what it was made of; data that are not here (not pulled) are taken at its word."""
    if not path.exists():
        return _Files(f"md5:{recorded}", {}, 0)
    found = _of_files(path, hashes, algorithm)
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

    trouble = f"{where}: {redacted(uri)} cannot be read: "
    try:
        system, path = fsspec.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise SweepError(f"{trouble}{_one_line(error)}") from error
    except Exception as error:  # some connect here
        raise UnreadableError(f"{trouble}{_one_line(error)}") from error
    try:
        system.invalidate_cache()
        entries = sorted(_entries(system, path).items())
        marks = [(entry, _mark(about, system, entry)) for entry, about in entries]
    except Exception as error:  # whatever file system it is
        kind = SweepError if _is_gone(error, system) else UnreadableError
        raise kind(f"{trouble}{_one_line(error)}") from error
    if not marks:
        raise SweepError(f"{where}: {redacted(uri)} is not there")
    for entry, mark in marks:
        if not mark:
            of = "" if entry == path else f" of {redacted(entry)}"
            raise SweepError(
                f"{where}: {redacted(uri)}: no size, ETag or time{of} is known, so no change would be seen"
            )
    digest = hashlib.sha256("\0\0".join(f"{entry}\0{mark}" for entry, mark in marks).encode()).hexdigest()
    size = sum(int(about.get("size") or 0) for _, about in entries)
    return Data(uri=uri, digest=digest, files=len(entries), size=size)


def _entries(system: Any, path: str) -> dict[str, Mapping[str, Any]]:
    """What a file system knows of a file, or of each below a folder."""
    if not system.isdir(path):
        return {path: system.info(path)}
    if not _is_http(system):
        found: dict[str, Mapping[str, Any]] = system.find(path, detail=True)
        return found
    # A folder is a page with links. All that is known of files is in their own headers; links such as '?C=N' sort it.
    names = [name for name in system.find(path, on_error="raise") if "/?" not in name]
    if not path.endswith("/"):
        names.append(path)  # or else it is a file that has links
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(system.info, names), strict=True))


def _mark(about: Mapping[str, Any], system: Any, entry: str) -> str:
    """What changes when an object does: checksums, else times or what fsspec thinks of it, and the size; or nothing."""
    sums, times = ([f"{key}={about[key]}" for key in keys if about.get(key)] for keys in (_SUMS, _TIMES))
    size = about.get("size")
    if not sums and not times and size is None:
        return ""
    return "\0".join([*(sums or times or [str(system.ukey(entry))]), f"size={size}"])


def _is_http(system: Any) -> bool:
    return "http" in system.protocol


def _is_gone(error: Exception, system: Any) -> bool:
    """Whether it is not there. Of HTTP, fsspec says so whatever went wrong; the cause has what it was."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    return not _is_http(system) or cause is None or getattr(cause, "status", None) == HTTPStatus.NOT_FOUND


def _one_line(error: BaseException) -> str:
    return redacted(" ".join(str(error).split()))[:300] or type(error).__name__
