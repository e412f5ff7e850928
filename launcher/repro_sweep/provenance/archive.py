"""How frozen source travels to machines that do not see it: as an archive of the files that its manifest names."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import zlib
from pathlib import Path
from typing import Any

from repro_sweep.errors import SweepError
from repro_sweep.provenance import snapshot
from repro_sweep.provenance.snapshot import MANIFEST_NAME, Snapshot
from repro_sweep.sweep import SweepSpec

_LARGEST_MB = 500
_BROKEN = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error)


def pack(spec: SweepSpec) -> tuple[Path, str | None]:
    """Write a sweep's frozen source to an archive beside it, unless it is there; and why it cannot be packed.

    What trials have written into its folder since is not in it.
    """
    assert spec.source is not None
    folder = Path(spec.source.folder)
    archive = folder.with_name(f"{folder.name}.tar.gz")
    if archive.exists():
        return archive, None
    try:
        files = Snapshot.read(folder).files
    except SweepError as error:
        return archive, str(error)
    if sum((folder / name).stat().st_size for name in files) > _LARGEST_MB * 1e6:
        return archive, f"the files of the project take more than {_LARGEST_MB} MB"
    partial = archive.with_name(snapshot.partial_name(archive.name))
    with tarfile.open(partial, "w:gz", compresslevel=1) as tar:
        for name, digest in files.items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                partial.unlink()
                return archive, f"{folder / name} was changed after it was frozen"
            _add(tar, name, data, digest, (folder / name).stat().st_mode)
        _add(tar, MANIFEST_NAME, (folder / MANIFEST_NAME).read_bytes(), "0" * 64, 0o444)
    partial.replace(archive)
    return archive, None


def _add(tar: tarfile.TarFile, name: str, data: bytes, digest: str, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), stat.S_IMODE(mode), snapshot.frozen_s(digest)
    tar.addfile(member, io.BytesIO(data))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack such an archive.

    Raises:
        SweepError: it is broken, or the folder cannot be written.
    """
    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, **options)  # noqa: S202  (from the sweep's own coordinator, or its MLflow run)
    except _BROKEN as error:
        raise SweepError(f"the source cannot be unpacked in {folder}: {error}") from error


def unpack_verified(archive: Path, folder: Path, ident: str | None) -> Snapshot:
    """Unpack the archive of the snapshot with an id, and see that it is that one.

    Raises:
        SweepError: it is broken, it is another one, or the folder cannot be written.
    """
    unpack(archive, folder)
    found = snapshot.ident_of(folder)
    if found != ident:
        raise SweepError(
            f"the source is not the recorded one: its hash is {found[:16]}, recorded is {(ident or 'none')[:16]}"
        )
    return Snapshot.read(folder)
