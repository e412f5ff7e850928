"""A disk that fills up: a sweep pauses and says so, loses nothing, and goes on when there is room again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import Finished, Swarm
from helpers import eventually

from repro_sweep.states import FailureKind, TrialState

_MB = 1_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB in memory; only root can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    assert mounted.returncode == 0, (
        f"the test of a full disk needs to mount a tmpfs: {mounted.stderr.strip()}"
    )
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_below_the_limit_of_free_space_nothing_starts_until_there_is_more(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    small_disk: Path,
    figures: Callable[..., None],
) -> None:
    """What runs ends and is recorded; the line on stderr says what is missing where."""
    swarm = _on_disk(make_swarm, small_disk, "sweep.min_free_mb=10")
    with swarm.start(REPRO_SWEEP_LEASE_S="6") as command:
        command.until(lambda: swarm.count("end") >= 5, "some trials end")
        _fill(small_disk, leave=5 * _MB)
        command.until(lambda: "paused: " in command.stderr, "it says that it pauses")
        command.until(lambda: not swarm.trial_pids(), "what runs ends")
        eventually(lambda: TrialState.RUNNING not in swarm.sweep.states(), "it is recorded")
        said = command.stderr
        before = swarm.count("start")
        seconds = _beats(swarm, 3)
        started_while_paused = swarm.count("start") - before
        assert swarm.sweep.states()[TrialState.WAITING] > 0
        _empty(small_disk)
        assert command.wait(300) == 0, command.stderr
    verdict = swarm.verdict(undisturbed(swarm.trials))
    figures(heartbeats_paused=seconds, started_while_paused=started_while_paused, **verdict.counted)
    assert f"MB are free in {swarm.directory}, less than 10 (sweep.min_free_mb)" in said
    assert started_while_paused == 0
    assert verdict.wrong == {}, verdict.remarks
    assert verdict.executions == swarm.trials


def test_what_was_acknowledged_before_a_disk_was_full_is_there_afterwards(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    small_disk: Path,
    figures: Callable[..., None],
) -> None:
    """No byte is free while trials end; the coordinator is killed on top of that; the next start completes it."""
    swarm = _on_disk(make_swarm, small_disk, "sweep.min_free_mb=0")
    with swarm.start() as command:
        command.until(lambda: swarm.count("end") >= 5, "some trials end")
        swarm.hold("all")
        command.until(lambda: len(swarm.trial_pids()) == 2, "trials run")
        _fill(small_disk, leave=0)
        swarm.release()
        command.until(lambda: "paused: " in command.stderr, "it says that it pauses")
        assert "disk" in command.stderr.rpartition("paused: ")[2], command.stderr
        acknowledged = _complete(swarm)
        command.process.kill()
        assert command.wait() == -signal.SIGKILL
    _empty(small_disk)
    kept = set(_complete(swarm))
    with swarm.start() as command:
        assert command.wait(300) == 0, command.stderr
    verdict = swarm.verdict(undisturbed(swarm.trials))
    lost = set(acknowledged) - kept
    kinds = Counter(attempt.kind for attempt in swarm.sweep.attempts if attempt.kind is not None)
    figures(acknowledged=len(acknowledged), acknowledged_lost=len(lost), **verdict.counted)
    assert len(acknowledged) >= 5
    assert lost == set()
    assert verdict.wrong == {}, verdict.remarks
    assert set(kinds) <= {FailureKind.NODE_LOST}


def _on_disk(make_swarm: Callable[..., Swarm], disk: Path, *options: str) -> Swarm:
    swarm = make_swarm(
        60, f"hydra.sweep.dir={disk}/sweep", "sweep.retries.NODE_LOST=null", *options, pause_s=0.03
    )
    swarm.directory = disk / "sweep"
    return swarm


def _fill(disk: Path, *, leave: int) -> None:
    """Fill a disk but for so many bytes."""
    with (disk / "ballast").open("ab") as file:
        while (free := shutil.disk_usage(disk).free) > leave:
            try:
                os.write(file.fileno(), b"\0" * min(_MB, free - leave))
            except OSError:
                return


def _empty(disk: Path) -> None:
    (disk / "ballast").unlink()


def _beats(swarm: Swarm, count: int) -> int:
    """Wait until the coordinator has renewed its lease so often: it had the time to hand something out."""
    for _ in range(count):
        since = _written(swarm)
        eventually(lambda before=since: _written(swarm) != before, "the lease is renewed")
    return count


def _written(swarm: Swarm) -> object:
    from repro_sweep.lease import holder_of
    from repro_sweep.ledger import Ledger

    ledger = Ledger.open(swarm.directory, readonly=True)
    try:
        holder = holder_of(ledger)
        return None if holder is None else holder.renewed
    finally:
        ledger.close()


def _complete(swarm: Swarm) -> dict[int, str]:
    return {
        attempt.trial: attempt.id for attempt in swarm.sweep.attempts if attempt.state is TrialState.COMPLETE
    }
