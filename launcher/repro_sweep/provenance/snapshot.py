"""Frozen source: what a sweep's tasks run from, as it was when the sweep was submitted.

A store holds each file once, under the hash of what it holds, and a folder for each snapshot whose files are hard
links to these. So a snapshot of a project that has hardly changed costs hardly anything. Hashes are remembered by a
file's size and time of change, as git does it.

What is left out of a snapshot (files that git ignores, and large ones) is linked to where it lies, so that code which
looks for data beside itself finds it; such files are not frozen, and the snapshot names them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from repro_sweep.errors import SweepError
from repro_sweep.provenance import source
from repro_sweep.sweep import Source, SourceRules, SweepSpec

MANIFEST_NAME = "manifest.json"
_OBJECTS = "objects"
_HASHES = "hashes.json"
_RACY_NS = 2_000_000_000
"""A file that was changed so shortly before may be changed again without another time of change."""
_CHUNK = 1 << 20

Seen: TypeAlias = tuple[tuple[int, int, int, int], str]
"""Of a file: its size, when its content and when anything of it has changed, its inode; and its hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot in its folder. ``id`` depends on the files alone, wherever they lie.

    ``roots`` are where they were taken from: the files of ``roots[i]`` are below ``folder/i``. ``left_out`` are the
    files and folders that are not frozen, with the reason.
    """

    id: str
    folder: Path
    roots: tuple[Path, ...]
    left_out: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Snapshot:
        """The snapshot in a folder.

        Raises:
            SweepError: there is none.
        """
        try:
            about = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
            return cls(
                id=about["id"],
                folder=folder,
                roots=tuple(map(Path, about["roots"])),
                left_out=about["left_out"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise SweepError(f"the sweep's source is not in {folder}: {error}") from error


def ident_of(folder: Path) -> str:
    """The id of the snapshot whose files lie in a folder, from what they hold; links are not part of it."""
    files = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            path = Path(parent, name)
            if path.is_symlink() or path.parent == folder:
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = _File(
                str(path), digest, bool(path.stat().st_mode & stat.S_IXUSR)
            )
    return _ident(dict(sorted(files.items())))


def _ident(files: Mapping[str, _File]) -> str:
    return _digest(
        "\0\0".join(f"{name}\0{file.digest}\0{int(file.runnable)}" for name, file in files.items())
    )


_CODE = frozenset({".py", ".yaml", ".yml", ".toml", ".json", ".cfg", ".ini"})


def has_same_code(one: Path, other: Path) -> bool:
    """Whether the snapshots in two folders have the same code and configuration, whatever else lies beside it."""
    try:
        found = [
            json.loads((each / MANIFEST_NAME).read_text(encoding="utf-8"))["files"] for each in (one, other)
        ]
    except (OSError, ValueError, KeyError):  # one of them is gone
        return False
    return (
        len({json.dumps({name: each[name] for name in each if Path(name).suffix in _CODE}) for each in found})
        == 1
    )


STORE_NAME = ".source"


def freeze(spec: SweepSpec) -> tuple[SweepSpec, Snapshot]:
    """Take the snapshot that a sweep's trials will run from, into the store beside its directory.

    Raises:
        SweepError: it cannot be read or stored.
    """
    directory = Path(spec.directory)
    store = directory.parent / STORE_NAME
    results = spec.tracking.uri.removeprefix("sqlite:///")
    without = (directory, store, *(Path(f"{results}{end}") for end in ("", "-journal", "-wal", "-shm")))
    taken = take(source.roots(spec), store, spec.source_rules, without=without)
    found = Source(snapshot=taken.id, folder=str(taken.folder), roots=tuple(map(str, taken.roots)))
    return spec.model_copy(update={"source": found}), taken


class _File(NamedTuple):
    path: str
    digest: str
    runnable: bool


def take(roots: Sequence[Path], store: Path, rules: SourceRules, *, without: Sequence[Path] = ()) -> Snapshot:
    """Freeze what lies below some folders; a snapshot that is there already is found again.

    Args:
        roots: the folders; none lies in another.
        store: where snapshots are kept.
        rules: what belongs to it.
        without: files and folders below them that don't.

    Raises:
        SweepError: it cannot be read or stored.
    """
    try:
        return _Taking(store, rules, without).take(roots)
    except OSError as error:
        raise SweepError(f"the source cannot be frozen in {store}: {error}") from error


class _Taking:
    def __init__(self, store: Path, rules: SourceRules, without: Sequence[Path]) -> None:
        self._store = store
        self._objects = f"{store}/{_OBJECTS}"
        self._rules = rules
        self._without = without
        self._began_ns = time.time_ns()
        self._known = _read_hashes(store / _HASHES)
        self._seen: dict[str, Seen] = {}
        self._made: set[str] = set()
        self._left_out: dict[str, str] = {}
        self._live: dict[str, str] = {}

    def take(self, roots: Sequence[Path]) -> Snapshot:
        files = dict(sorted(each for number, root in enumerate(roots) for each in self._below(root, number)))
        ident = _ident(files)
        about = {
            "id": ident,
            "roots": [str(root) for root in roots],
            "left_out": self._left_out,
            "files": {name: file.digest for name, file in files.items()},
        }
        folder = self._store / _digest(json.dumps([ident, about["roots"], self._live]))[:16]
        if not (folder / MANIFEST_NAME).exists():
            self._write(folder, files, about)
        self._remember()
        return Snapshot(id=ident, folder=folder, roots=tuple(roots), left_out=self._left_out)

    def _below(self, root: Path, number: int) -> Iterator[tuple[str, _File]]:
        found = source.listed(root)
        if found is None:
            raise SweepError(
                f"sweep.source: {root} has too many folders to look into; make it a git repository, whose .gitignore"
                " says what does not belong to it"
            )
        outside = [str(path.relative_to(root)) for path in self._without if root in path.parents]
        apart = tuple(f"{name}/" for name in outside)
        included = {
            path.relative_to(root).as_posix()
            for pattern in self._rules.include
            for path in root.glob(pattern)
        }
        for name in sorted({*found.files, *included}):
            if name.startswith(apart) or name in outside:
                continue
            path = f"{root}/{name}"
            try:
                about = os.stat(path)
            except FileNotFoundError:  # it was deleted, or is a link to nowhere
                continue
            if not stat.S_ISREG(about.st_mode):
                continue
            if any(fnmatch.fnmatch(name, pattern) for pattern in self._rules.exclude):
                self._leave_out(f"{number}/{name}", path, "sweep.source.exclude")
            elif about.st_size > self._rules.max_mb * 1e6 and name not in included:
                self._leave_out(
                    f"{number}/{name}", path, f"{about.st_size / 1e6:.0f} MB (sweep.source.max_mb)"
                )
            else:
                runnable = bool(about.st_mode & stat.S_IXUSR)
                yield f"{number}/{name}", _File(path, self._hash(path, about), runnable)
        for name in found.ignored:
            if name not in included and name not in outside and not name.startswith(apart):
                self._leave_out(f"{number}/{name}", f"{root}/{name}", "git ignores it")

    def _leave_out(self, name: str, path: str, why: str) -> None:
        self._left_out[name] = why
        self._live[name] = path

    def _hash(self, path: str, about: os.stat_result) -> str:
        """The hash of a file, read only if it may have changed."""
        now = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        known = self._known.get(path)
        digest = known[1] if known is not None and tuple(known[0]) == now else self._keep(path)
        if about.st_ctime_ns < self._began_ns - _RACY_NS:
            self._seen[path] = (now, digest)
        return digest

    def _keep(self, path: str) -> str:
        """Copy a file into the store, under the hash of what was copied."""
        self._make(self._objects)
        partial = f"{self._objects}/.{os.getpid()}.partial"
        total = hashlib.sha256()
        with open(path, "rb", buffering=0) as read, open(partial, "wb", buffering=0) as write:
            while data := read.read(_CHUNK):
                total.update(data)
                write.write(data)
            os.fchmod(write.fileno(), 0o444)
        digest = total.hexdigest()
        target = self._object(digest)
        if os.path.exists(target):
            os.unlink(partial)
        else:
            self._make(os.path.dirname(target))
            os.replace(partial, target)
        return digest

    def _make(self, folder: str) -> None:
        if folder not in self._made:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._made.add(folder)

    def _object(self, digest: str) -> str:
        return f"{self._objects}/{digest[:2]}/{digest}"

    def _write(self, folder: Path, files: Mapping[str, _File], about: Mapping[str, Any]) -> None:
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name, file in files.items():
            target = f"{partial}/{name}"
            self._make(os.path.dirname(target))
            kept = self._object(file.digest)
            if not os.path.exists(kept) and self._keep(file.path) != file.digest:
                raise SweepError(f"sweep.source: {file.path} was changed meanwhile; start the sweep again")
            _link(kept, target, runnable=file.runnable)
        for number in range(len(about["roots"])):
            self._make(f"{partial}/{number}")
        for name, path in self._live.items():
            self._make(os.path.dirname(f"{partial}/{name}"))
            with contextlib.suppress(FileExistsError):  # an ignored folder of which some files are included
                os.symlink(path, f"{partial}/{name}")
        (partial / MANIFEST_NAME).write_text(json.dumps(about, indent=1), encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / MANIFEST_NAME).exists():  # no other sweep has just made it
                raise
            shutil.rmtree(partial)

    def _remember(self) -> None:
        if self._seen == self._known:
            return
        partial = self._store / f".{_HASHES}.{os.getpid()}.partial"
        partial.write_text(json.dumps(self._seen), encoding="utf-8")
        partial.replace(self._store / _HASHES)


def _link(kept: str, target: str, *, runnable: bool) -> None:
    if not runnable:
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(kept, target)
            return
    shutil.copyfile(kept, target)
    os.chmod(target, 0o555 if runnable else 0o444)


def _read_hashes(path: Path) -> dict[str, Seen]:
    try:
        return {
            name: (tuple(about), digest) for name, (about, digest) in json.loads(path.read_text()).items()
        }
    except (OSError, ValueError, AttributeError):
        return {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
