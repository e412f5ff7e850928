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
import re
import shutil
import stat
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from repro_sweep.errors import SweepError
from repro_sweep.provenance import source
from repro_sweep.sweep import Source, SourceRules, SweepSpec

MANIFEST_NAME = "manifest.json"
_OBJECTS = "objects"
_HASHES = "hashes.json"
_KEYS = re.compile(r"(?:.*/)?(?:\.env(?:\.local)?|\.netrc|[^/]*\.pem|id_(?:rsa|ecdsa|ed25519))")
"""Files that hold secrets, by their names."""
_RACY_NS = 2_000_000_000
"""A file that was changed so shortly before may be changed again without another time of change."""
_CHUNK = 1 << 20

Seen: TypeAlias = tuple[tuple[int, int, int, int], str]
"""Of a file: its size, when its content and when anything of it has changed, its inode; and its hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot in its folder. ``id`` depends on the files alone, wherever they lie.

    ``roots`` are where they were taken from: the files of ``roots[i]`` are below ``folder/i``. ``left_out`` are the
    files and folders that are not frozen, with the reason. ``files`` are the SHA-256 of the others, by their paths;
    ``code`` are those of them that are no output of anything.
    """

    id: str
    folder: Path
    roots: tuple[Path, ...]
    left_out: Mapping[str, str]
    files: Mapping[str, str]
    code: Mapping[str, str]

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
                files=about["files"],
                code={name: about["files"][name] for name in about["code"]},
            )
        except (OSError, ValueError, KeyError) as error:
            raise SweepError(f"the sweep's source is not in {folder}: {error}") from error


def digest_of(path: Path) -> str:
    """The SHA-256 of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ident_of(folder: Path) -> str:
    """The id of the snapshot whose files lie in a folder, from what they hold; links are not part of it."""
    files = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            path = Path(parent, name)
            if path.is_symlink() or path.parent == folder:
                continue
            files[path.relative_to(folder).as_posix()] = _File(
                str(path), digest_of(path), bool(path.stat().st_mode & stat.S_IXUSR)
            )
    return _ident(dict(sorted(files.items())))


def frozen_s(digest: str) -> int:
    """The time of change (seconds since 1970) that a frozen file with a hash has: with another, it was written to.

    It follows from the hash, as Python takes files of one size and time for the same. Zip files have no time before
    1980, in any time zone.
    """
    return 631_152_000 + int(digest[:6], 16)


def partial_name(name: str) -> str:
    """The name of a file while it is written; nobody else takes the same."""
    return f".{name}.{uuid.uuid4().hex}.partial"


def _ident(files: Mapping[str, _File]) -> str:
    return _digest(
        "\0\0".join(f"{name}\0{file.digest}\0{int(file.runnable)}" for name, file in files.items())
    )


def has_same_code(one: Path, other: Path) -> bool:
    """Whether the snapshots in two folders have the same code, whatever output lies beside it."""
    try:
        first, second = (Snapshot.read(each).code for each in (one, other))
    except SweepError:  # one of them is gone
        return False
    return first == second


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
        self._partial = f"{self._objects}/{partial_name('object')}"
        self._began_ns = time.time_ns()
        self._known = _read_hashes(store / _HASHES)
        self._seen: dict[str, Seen] = {}
        self._made: set[str] = set()
        self._code: set[str] = set()
        self._left_out: dict[str, str] = {}
        self._live: dict[str, str] = {}

    def take(self, roots: Sequence[Path]) -> Snapshot:
        files = dict(sorted(each for number, root in enumerate(roots) for each in self._below(root, number)))
        ident = _ident(files)
        about: dict[str, Any] = {
            "id": ident,
            "roots": [str(root) for root in roots],
            "left_out": self._left_out,
            "files": {name: file.digest for name, file in files.items()},
            "code": sorted(self._code & files.keys()),
        }
        folder = self._store / _digest(json.dumps([ident, about["roots"], self._live]))[:16]
        exists = (folder / MANIFEST_NAME).exists()
        if not exists or not all(_is_frozen(f"{folder}/{name}", file.digest) for name, file in files.items()):
            self._write(folder, files, about)
        self._remember()
        return Snapshot.read(folder)

    def _below(self, root: Path, number: int) -> Iterator[tuple[str, _File]]:
        found = source.listed(root)
        if found is None:
            raise SweepError(
                f"sweep.source: {root} has too many folders to look into; make it a git repository, whose .gitignore"
                " says what does not belong to it"
            )
        self._code |= {f"{number}/{name}" for name in found.code}
        outside = [str(path.relative_to(root)) for path in self._without if root in path.parents]
        apart = tuple(f"{name}/" for name in outside)
        chosen = {path for pattern in self._rules.include for path in root.glob(pattern)}
        included = {path.relative_to(root).as_posix() for each in chosen for path in _files_of(each)}
        links: list[str] = []
        own = [
            name
            for name in sorted({*found.files, *included})
            if name not in outside and not name.startswith(apart)
        ]
        yield from self._files(root, number, own, included, links)
        for link in links:
            yield from self._files(root, number, self._behind(root, link, number), included, [])
        for name in found.ignored:
            if name not in included and name not in outside and not name.startswith(apart):
                self._leave_out(f"{number}/{name}", f"{root}/{name}", "git ignores it")

    def _files(
        self, root: Path, number: int, names: Iterable[str], included: Collection[str], links: list[str]
    ) -> Iterator[tuple[str, _File]]:
        """The files that are frozen among those with some names; folders are added to ``links``."""
        for name in names:
            path = f"{root}/{name}"
            try:
                about = os.stat(path)
            except FileNotFoundError:  # it was deleted, or is a link to nowhere
                continue
            if stat.S_ISDIR(about.st_mode):
                links.append(name)
            elif not stat.S_ISREG(about.st_mode):
                continue
            elif any(fnmatch.fnmatch(name, pattern) for pattern in self._rules.exclude):
                self._leave_out(f"{number}/{name}", path, "sweep.source.exclude")
            elif name not in included and _KEYS.fullmatch(name):
                self._leave_out(f"{number}/{name}", path, "it holds secrets, by its name")
            elif about.st_size > self._rules.max_mb * 1e6 and name not in included:
                why = f"{about.st_size / 1e6:.0f} MB (sweep.source.max_mb)"
                self._leave_out(f"{number}/{name}", path, why)
            else:
                runnable = bool(about.st_mode & stat.S_IXUSR)
                yield f"{number}/{name}", _File(path, self._hash(path, about), runnable)

    def _behind(self, root: Path, link: str, number: int) -> Iterator[str]:
        """The files of a folder that is a link to elsewhere, or out of the project."""
        target = (root / link).resolve()
        files = None
        if not source.is_output(target) and not root.resolve().is_relative_to(target):
            files = source.files_below(target)
        if files is None:
            self._leave_out(f"{number}/{link}", f"{root}/{link}", f"a link to {target}")
        yield from (f"{link}/{name}" for name in files or ())

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
        total = hashlib.sha256()
        with open(path, "rb", buffering=0) as read, open(self._partial, "wb", buffering=0) as write:
            while data := read.read(_CHUNK):
                total.update(data)
                write.write(data)
            os.fchmod(write.fileno(), 0o444)
            digest = total.hexdigest()
            os.utime(write.fileno(), (frozen_s(digest),) * 2)
        target = self._object(digest)
        if _is_frozen(target, digest):
            os.unlink(self._partial)
        else:
            self._make(os.path.dirname(target))
            os.replace(self._partial, target)
        return digest

    def _make(self, folder: str) -> None:
        if folder not in self._made:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._made.add(folder)

    def _object(self, digest: str) -> str:
        return f"{self._objects}/{digest[:2]}/{digest}"

    def _write(self, folder: Path, files: Mapping[str, _File], about: Mapping[str, Any]) -> None:
        """Make the folder of a snapshot, also in the place of one whose files somebody has written to."""
        partial = folder.with_name(partial_name(folder.name))
        for name, file in files.items():
            target = f"{partial}/{name}"
            self._make(os.path.dirname(target))
            kept = self._object(file.digest)
            if not _is_frozen(kept, file.digest) and self._keep(file.path) != file.digest:
                raise SweepError(f"sweep.source: {file.path} was changed meanwhile; start the sweep again")
            _link(kept, target, file)
        for number in range(len(about["roots"])):
            self._make(f"{partial}/{number}")
        for name, path in self._live.items():
            self._make(os.path.dirname(f"{partial}/{name}"))
            with contextlib.suppress(FileExistsError):  # an ignored folder of which some files are included
                os.symlink(path, f"{partial}/{name}")
        (partial / MANIFEST_NAME).write_text(json.dumps(about, indent=1), encoding="utf-8")
        old = folder.with_name(partial_name(folder.name))
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / MANIFEST_NAME).exists():  # no other sweep has just made it
                raise
            shutil.rmtree(partial)
        shutil.rmtree(old, ignore_errors=True)

    def _remember(self) -> None:
        if self._seen == self._known:
            return
        partial = self._store / partial_name(_HASHES)
        partial.write_text(json.dumps(self._seen), encoding="utf-8")
        partial.replace(self._store / _HASHES)


def _link(kept: str, target: str, file: _File) -> None:
    if not file.runnable:
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(kept, target)
            return
    shutil.copyfile(kept, target)
    os.utime(target, (frozen_s(file.digest),) * 2)
    os.chmod(target, 0o555 if file.runnable else 0o444)


def _is_frozen(path: str, digest: str) -> bool:
    """Whether a file of the store is there, and nobody has written to it."""
    try:
        return os.stat(path).st_mtime == frozen_s(digest)
    except FileNotFoundError:
        return False


def _files_of(path: Path) -> Iterator[Path]:
    """A file itself, or the files below a folder."""
    if not path.is_dir():
        yield path
    for parent, _, names in os.walk(path):
        yield from (Path(parent, name) for name in names)


def _read_hashes(path: Path) -> dict[str, Seen]:
    try:
        return {
            name: (tuple(about), digest) for name, (about, digest) in json.loads(path.read_text()).items()
        }
    except (OSError, ValueError, AttributeError):
        return {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
