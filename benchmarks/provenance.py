"""``snapshot``: what it takes to freeze the source of a large project, and to look at one that has not changed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.report import OURS, Row, Table, Target
from repro_sweep.provenance import snapshot
from repro_sweep.sweep import SourceRules

_FILES = 10_000
_BYTES = 2_000
_RACY_S = 2.5
_TURNS = 5


def freeze(folder: Path, *, quick: bool) -> Table:
    """Seconds for a snapshot of a repository of 10,000 files: the first one, of the same, and of one changed file."""
    count = 1_000 if quick else _FILES
    root = folder / "project"
    for number in range(count):
        path = root / f"package{number % 100}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {number}\n" * (_BYTES // 8))
    git = ["git", "-C", str(root), "-c", "user.name=b", "-c", "user.email=b@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    time.sleep(_RACY_S)  # younger files are read again, as they may change without another time

    def take(number: int = 0) -> object:
        return snapshot.take([root], folder / f"store{number}", SourceRules())

    def copy(number: int) -> object:
        return subprocess.run(["cp", "-r", root, folder / f"copy{number}"], check=True)

    # in turn, as disks have their moods
    pairs = [(_timed(partial(take, number)), _timed(partial(copy, number))) for number in range(_TURNS)]
    first, copied = (min(each) for each in zip(*pairs, strict=True))
    same = min(_timed(take) for _ in range(_TURNS))
    (root / "package0" / "module0.py").write_text("changed\n")
    changed = _timed(take)
    added = _timed(lambda: subprocess.run([*git, "stash", "create"], check=True, capture_output=True))
    return Table(
        title="snapshot: freezing the source",
        text=f"A git repository of {count:,} files of {_BYTES / 1000:g} KB in 100 folders. The best of {_TURNS}"
        " turns; the first snapshot and the copy took "
        + ", ".join(f"{one:.1f} and {other:.1f}" for one, other in pairs)
        + " s.",
        unit="s",
        rows=[
            Row(system=OURS, value=first, note="the first snapshot: every file is read, and stored"),
            Row(system=f"{OURS}, nothing changed", value=same),
            Row(system=f"{OURS}, one file changed", value=changed),
            Row(system="cp -r", value=copied, note="what the disk needs to hold them once more"),
            Row(
                system="git stash create",
                value=added,
                note="the same change, in a repository that has all else",
            ),
        ],
        targets=[
            Target(what="the first snapshot", value=first, limit=3.0, unit="s"),
            Target(what="an unchanged one", value=same, limit=0.5, unit="s"),
        ],
    )


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
