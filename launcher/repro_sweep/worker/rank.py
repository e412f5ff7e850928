"""A rank of a trial on another node than the worker's: srun starts it, and kills it with everything it has started.

It runs the same task with the same config as rank 0, in a process of its own, and says on its standard output that it
lives and how that has ended. It reports nothing and writes into the trial's directory only its log.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from typing import IO, Any

from repro_sweep import machine, protocol
from repro_sweep.errors import SweepError
from repro_sweep.states import FailureKind
from repro_sweep.sweep import SweepSpec
from repro_sweep.worker import ranks
from repro_sweep.worker.attempt import Part, Run, failure
from repro_sweep.worker.nursery import Nursery
from repro_sweep.worker.outbox import Answer
from repro_sweep.worker.slurm import inspect


class _Desk:
    """Nobody hears what this rank reports."""

    def report(self, report: protocol.Report, answer: Answer | None) -> None:
        """Pass over it; whoever waits for a verdict goes on."""
        if answer is not None:
            answer(report.seq, False)

    def find_run(self, attempt: str) -> dict[str, Any]:
        """It has none."""
        del attempt
        return {"error": "only rank 0 of a trial logs to MLflow"}


class _Voice:
    """Lines of JSON to the agent, and a sign of life between them."""

    def __init__(self, rank: int, out: IO[str]) -> None:
        self._rank = rank
        self._out = out
        self._lock = threading.Lock()
        self.run: Run | None = None

    def say(self, **message: object) -> None:
        """Say something now; if nobody listens any more, srun ends this process."""
        with self._lock:
            self._out.write(json.dumps({"rank": self._rank, **message}) + "\n")
            self._out.flush()

    def beat(self) -> None:
        """Say something again and again."""
        while True:
            over = self.run is not None and self.run.over_at is not None
            self.say(node=os.environ.get("SLURMD_NODENAME", ""), over=over)
            time.sleep(ranks.BEAT_S)


def main() -> None:
    """Entry point, started by srun; what to run comes as the first line of standard input."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the agent decides; and it ends us by SIGKILL
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    rank = int(os.environ["SLURM_PROCID"]) + 1
    voice = _Voice(rank, out)
    threading.Thread(target=voice.beat, daemon=True, name="beat").start()
    line = sys.stdin.readline()
    if line:
        # the zygote ends with this process
        voice.say(result={"at": time.time(), **_run(rank, json.loads(line), voice)})
    os._exit(0)


def _run(rank: int, task: dict[str, Any], voice: _Voice) -> dict[str, Any]:
    spec = ranks.alone(SweepSpec.model_validate_json(task["spec"]))
    try:
        (gpus,) = machine.slots(inspect(), spec.resources, 1)
    except SweepError as error:
        return failure(FailureKind.NODE_LOST, str(error))
    nursery = Nursery(spec.model_dump_json())
    nursery.wait_ready()
    if nursery.failed is not None:
        return failure(FailureKind.NODE_LOST, nursery.failed)
    part = Part(rank, ranks.environment(rank, task))
    assignment = protocol.Assignment(**task["assignment"])
    run = voice.run = Run(_Desk(), nursery, spec, assignment, gpus, part=part)

    def await_end() -> None:
        sys.stdin.read()
        run.kill(FailureKind.CANCELLED)  # the agent is gone

    threading.Thread(target=await_end, daemon=True, name="stdin").start()
    result = run.run()
    return {"at": run.over_at or time.time(), **result}


if __name__ == "__main__":
    main()
