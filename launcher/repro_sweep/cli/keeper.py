"""The first process of a job in which a sweep's coordinator runs: it keeps one alive for as long as the job may run.

A coordinator that was killed is started again: it takes over from its ledger, and its workers come to it. Before the
job's time limit the coordinator hands over, and the job is queued again. What ends of its own accord has ended.

It must not import anything that could fail or grow: it is there for when the coordinator does.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import FrameType

_KEPT = "REPRO_SWEEP_KEPT"
_HANDED_OVER = 75
_INTERRUPTED = 130
_MOST_KILLS = 5
_WITHIN_S = 600.0
_PAUSE_S = 1.0
_LEAVE_S = 25.0
_LOOK_S = 1.0
_REQUEUED_S = 120.0
_COMMAND_S = 60.0
_FRONT_DOOR = "import sys; sys.argv[0] = 'repro-sweep'; from repro_sweep.cli.main import main; main()"


class Keeper:
    """Starts ``command`` and waits for it; returns from :meth:`run` with the job's exit status."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._command = command
        self._environ = environ
        self._job = environ.get("SLURM_JOB_ID")
        self._again = environ.get("SLURM_RESTART_COUNT", "0") != "0"
        self._child: subprocess.Popen[bytes] | None = None
        self._ending = False
        self._handing_over = False

    def run(self) -> int:
        """Keep the coordinator alive until it ends of its own accord, or the job ends."""
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGUSR2, self._hand_over)
        kills: deque[float] = deque(maxlen=_MOST_KILLS)
        while True:
            code = self._run_once()
            if self._handing_over and code in (_HANDED_OVER, _INTERRUPTED):
                return self._requeue()
            if self._ending or code >= 0:
                asked_to_go = code == _HANDED_OVER or (self._ending and code == _INTERRUPTED)
                return 0 if asked_to_go or code < 0 else code
            now = time.monotonic()
            if len(kills) == _MOST_KILLS and now - kills[0] < _WITHIN_S:
                _say(
                    f"the coordinator was killed {_MOST_KILLS + 1} times within {_WITHIN_S / 60:.0f} min: the job ends"
                )
                return 1
            kills.append(now)
            _say(f"the coordinator was killed by signal {-code}: it is started again")
            time.sleep(_PAUSE_S)
            if self._ending or self._handing_over:
                return self._requeue() if self._handing_over else 0

    def _run_once(self) -> int:
        kept = {_KEPT: "again" if self._again else "first"}
        self._again = True
        self._child = subprocess.Popen(self._command, env={**self._environ, **kept})
        if self._ending or self._handing_over:  # between the last child's end and this one's start
            self._child.terminate()
        left_s = _LEAVE_S
        while True:
            try:
                return self._child.wait(timeout=_LOOK_S)
            except subprocess.TimeoutExpired:
                left_s -= _LOOK_S if self._ending or self._handing_over else 0.0
            if left_s <= 0:
                self._child.kill()

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        """The job ends: the coordinator may have heard of it itself, or not."""
        self._ending = True
        self._tell(signal.SIGTERM)

    def _hand_over(self, _number: int, _frame: FrameType | None) -> None:
        """The job's time is nearly over."""
        self._handing_over = True
        self._tell(signal.SIGUSR2)

    def _tell(self, number: signal.Signals) -> None:
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(number)

    def _requeue(self) -> int:
        """Queue this job again; SLURM ends it meanwhile."""
        if self._job is None:
            return 0
        _say("this job's time is nearly over: it is queued again, and goes on then")
        until = time.monotonic() + _REQUEUED_S
        while time.monotonic() < until:  # the controller may be away for a moment
            try:
                asked = subprocess.run(["scontrol", "requeue", self._job], timeout=_COMMAND_S, check=False)
            except subprocess.TimeoutExpired:
                continue
            if not asked.returncode:
                time.sleep(_REQUEUED_S)
                return 0
            time.sleep(_LOOK_S)
        return 1


def _say(text: str) -> None:
    print(f"repro-sweep: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point of a coordinator's job: of a detached sweep, or of a whole command line."""
    parser = argparse.ArgumentParser(prog="repro-sweep-keeper")
    parser.add_argument("--directory", help="the directory of a sweep that is recorded already")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what repro-sweep gets, after --")
    args = parser.parse_args()
    command = [sys.executable, "-P"]
    if args.directory is not None:
        command += ["-m", "repro_sweep.cli.coordinate", args.directory]
    else:
        command += ["-c", _FRONT_DOOR, *args.arguments[args.arguments[:1] == ["--"] :]]
    sys.exit(Keeper(command, os.environ).run())


if __name__ == "__main__":
    main()
