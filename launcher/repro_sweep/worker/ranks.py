"""The other ranks of a trial that spans several nodes: started through ``srun``, watched, judged and killed together.

Rank 0 is an ordinary trial of the agent; each other node runs :mod:`repro_sweep.worker.rank`, which says on its
standard output what becomes of its rank. What the ranks return is ignored; that one fails is not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from repro_sweep import protocol
from repro_sweep.errors import SweepError
from repro_sweep.exchange import LOG_NAME
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import SweepSpec

BEAT_S = 1.0
_COMMAND_S = 20.0
_FIRST_WORD_S = 180.0
"""What srun and the start of an interpreter on a busy node may take."""
_SILENT_S = 60.0
_ENDING_S = 30.0
"""So long the other ranks may go on after rank 0 has returned."""
_EXPLAIN_S = 6.0
"""So long rank 0's failure waits for what the others have to say: theirs may be its reason."""
_NEWS_S = 0.5
_GOODBYE_S = 1.0
_TERM_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Team:
    """The nodes of this job, this one first, and the address at which the others reach it."""

    nodes: tuple[str, ...]
    address: str

    @classmethod
    def of_job(cls, environ: Mapping[str, str] = os.environ) -> Team:
        """The team of the SLURM job whose batch script runs in this process.

        Raises:
            SweepError: SLURM does not say which nodes it has.
        """
        listed = environ.get("SLURM_JOB_NODELIST", "")
        nodes = _said("scontrol", "show", "hostnames", listed).split() if listed else []
        here = environ.get("SLURMD_NODENAME", nodes[0] if nodes else "")
        if here not in nodes:
            raise SweepError(f"the nodes of this job are not known (SLURM_JOB_NODELIST is {listed!r})")
        found = re.search(r"\bNodeAddr=(\S+)", _said("scontrol", "show", "node", here))
        return cls((here, *(node for node in nodes if node != here)), found[1] if found else here)


class Ranks:
    """Ranks 1 and up of one attempt. ``on_failure`` is called, from a thread, when one of them fails.

    Args:
        team: the job's nodes.
        spec: the sweep's record, as JSON.
        assignment: the attempt.
    """

    def __init__(self, team: Team, spec: str, assignment: protocol.Assignment) -> None:
        self._team = team
        self._spec = spec
        self._assignment = assignment
        self._count = len(team.nodes) - 1
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._results: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self._over = False
        self._killed = False
        self._on_failure: Callable[[], None] = lambda: None

    @property
    def environment(self) -> dict[str, str]:
        """What rank 0 finds in its environment."""
        return environment(0, self._shared())

    @property
    def failed(self) -> bool:
        """Whether a rank has failed."""
        return any(_is_failure(result) for result in list(self._results.values()))

    @property
    def broken(self) -> bool:
        """Whether a node of the job is lost: nothing more can run in it."""
        return any(result.get("kind") == FailureKind.NODE_LOST for result in list(self._results.values()))

    def start(self, on_failure: Callable[[], None]) -> str:
        """Start them; returns a line about it for the trial's log.

        Raises:
            OSError: there is no srun.
        """
        self._on_failure = on_failure
        others = self._team.nodes[1:]
        command = [
            "srun",
            "--overlap",
            f"--nodes={self._count}",
            f"--ntasks={self._count}",
            "--ntasks-per-node=1",
        ]
        command += [f"--nodelist={','.join(others)}", "--unbuffered", "--kill-on-bad-exit=0"]
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")
        command += [f"--cpus-per-task={cpus}"] if cpus else []
        self._process = subprocess.Popen(
            [*command, sys.executable, "-P", "-m", "repro_sweep.worker.rank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._attend, args=(self._process,), daemon=True, name="ranks").start()
        return (
            f"[repro-sweep: {self._count + 1} ranks; those on {', '.join(others)} write to trial.rank*.log]\n"
        )

    def kill(self) -> None:
        """Kill them all, at once; srun, asked to end, kills its tasks first."""
        with self._changed:
            if self._killed:
                return
            self._killed = True
            self._changed.notify_all()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.send_signal(signal.SIGTERM)
        threading.Thread(target=_see_off, args=(process,), daemon=True, name="srun").start()

    def settle(self, result: dict[str, Any], at: float, *, whole: bool) -> dict[str, Any]:
        """Rank 0 is over: wait for the others as long as that makes sense, and kill them.

        Args:
            result: rank 0's.
            at: when rank 0 was over, in seconds UTC. What happened first is the reason of the rest, as long as the
                nodes' clocks agree.
            whole: it is rank 0's own doing, nobody has killed it.

        Returns:
            The attempt's result.
        """
        ended = time.monotonic()
        if result["state"] == TrialState.COMPLETE:
            self._wait(lambda: self.failed or len(self._results) == self._count, _ENDING_S)
        elif self.failed or (whole and result.get("kind") in _UNCLEAR):
            self._wait(lambda: all(self._has_spoken(rank, ended) for rank in self._numbers()), _EXPLAIN_S)
            if not self._killed:
                for rank in [each for each in self._numbers() if not self._has_spoken(each, ended)]:
                    self._note(rank, _lost("has not been heard of any more"))
        failures = [(each["at"], rank, each) for rank, each in self._results.items() if _is_failure(each)]
        self.kill()
        if not failures:
            return result
        mine = [(at, 0, result)] if whole and _is_failure(result) else []
        _, rank, cause = min([*mine, *failures], key=lambda each: (not _is_cause(each[2]), each[0]))
        if rank == 0:
            return result
        return {
            "state": TrialState.FAIL,
            "kind": FailureKind(cause["kind"]),
            "message": f"rank {rank} on {self._names.get(rank, 'its node')}: {cause['message']}",
            "metrics": result.get("metrics", {}),
        }

    def _shared(self) -> dict[str, Any]:
        return {
            "address": self._team.address,
            "port": self._port,
            "size": self._count + 1,
            "attempt": self._assignment.attempt,
            "ordinal": self._assignment.ordinal,
        }

    def _numbers(self) -> range:
        return range(1, self._count + 1)

    def _has_spoken(self, rank: int, since: float) -> bool:
        """Whether a rank has said that it is over, or that it goes on long after something has happened elsewhere."""
        return rank in self._results or self._heard.get(rank, float("-inf")) > since + _NEWS_S

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._killed or condition(), timeout_s)

    def _attend(self, process: subprocess.Popen[bytes]) -> None:
        """Hear what the ranks say until srun is over."""
        assert process.stdin is not None
        assert process.stdout is not None
        task = {"spec": self._spec, "assignment": self._assignment.model_dump(), **self._shared()}
        with contextlib.suppress(OSError):  # it is over already
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
        began, buffer = time.monotonic(), b""
        source = process.stdout.fileno()
        while True:
            if select.select([source], [], [], BEAT_S)[0]:
                data = os.read(source, 1 << 16)
                if not data:
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self._hear(line)
            self._look_for_silence(began)
        status = process.wait()
        self._wait(lambda: False, _GOODBYE_S)  # whoever ends the job says so at about the same time
        if not self._killed:
            for rank in [each for each in self._numbers() if each not in self._results]:
                self._note(rank, _lost(f"srun ended with status {status}, see the output of the job"))

    def _hear(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            rank = int(message["rank"])
        except (ValueError, KeyError, TypeError):
            log.warning("a rank says %r", line[:200])
            return
        with self._changed:
            if not message.get("over"):  # else its result is about to come
                self._heard[rank] = time.monotonic()
            self._names[rank] = message.get("node", self._names.get(rank, ""))
            self._changed.notify_all()
        if "result" in message:
            self._note(rank, message["result"])

    def _look_for_silence(self, began: float) -> None:
        now = time.monotonic()
        for rank in self._numbers():
            heard = self._heard.get(rank)
            silent = now - began > _FIRST_WORD_S if heard is None else now - heard > _SILENT_S
            if silent and rank not in self._results:
                self._note(rank, _lost("has not been heard of any more"))

    def _note(self, rank: int, result: dict[str, Any]) -> None:
        with self._changed:
            self._results[rank] = {"at": time.time(), **result}
            self._changed.notify_all()
        if _is_failure(result) and not self._killed:
            self._on_failure()


def environment(rank: int, shared: Mapping[str, Any]) -> dict[str, str]:
    """What torchrun sets for a rank, where each node has one; and SLURM's own words for the same things."""
    size = str(shared["size"])
    number = str(rank)
    return {
        "MASTER_ADDR": shared["address"],
        "MASTER_PORT": str(shared["port"]),
        "RANK": number,
        "WORLD_SIZE": size,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": number,
        "NODE_RANK": number,
        "ROLE_NAME": "default",
        "ROLE_RANK": number,
        "ROLE_WORLD_SIZE": size,
        "TORCHELASTIC_RUN_ID": shared["attempt"],
        "TORCHELASTIC_RESTART_COUNT": str(shared["ordinal"]),
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "SLURM_PROCID": number,
        "SLURM_NODEID": number,
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": size,
        "SLURM_NPROCS": size,
    }


def log_name(rank: int) -> str:
    """The file of a rank's output in the trial's directory."""
    return f"trial.rank{rank}.log" if rank else LOG_NAME


def alone(spec: SweepSpec) -> SweepSpec:
    """The record by which a rank runs that reports nothing: rank 0 has the limits, and the pruner."""
    limits = spec.limits.model_copy(update={"trial_timeout_min": None, "stall_timeout_min": None})
    return spec.model_copy(update={"limits": limits, "pruner": None})


_UNCLEAR = frozenset({FailureKind.EXCEPTION, FailureKind.CRASH})
"""Failures of a rank that another one's end may be the reason of."""
_CAUSES = frozenset({FailureKind.OUT_OF_MEMORY, FailureKind.GPU_OUT_OF_MEMORY, FailureKind.NODE_LOST})


def _is_cause(result: Mapping[str, Any]) -> bool:
    """Whether a failure is surely no consequence of another rank's: those raise, or abort."""
    crashed = result["kind"] == FailureKind.CRASH and "SIGABRT" not in result["message"]
    return crashed or result["kind"] in _CAUSES


def _is_failure(result: Mapping[str, Any]) -> bool:
    return bool(result["state"] == TrialState.FAIL)


def _lost(why: str) -> dict[str, Any]:
    return {"state": TrialState.FAIL, "kind": FailureKind.NODE_LOST, "message": why}


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s: %s", " ".join(command), error)
        return ""


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        port: int = sock.getsockname()[1]
        return port


def _see_off(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_TERM_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def team_of(nodes: int) -> Team | None:
    """The team of this job where its trials have several nodes.

    Raises:
        SweepError: it has fewer nodes than a trial needs, or they are not known.
    """
    if nodes == 1:
        return None
    team = Team.of_job()
    if len(team.nodes) < nodes:
        raise SweepError(
            f"sweep.resources.nodes_per_trial: {nodes} asked for, this job has {len(team.nodes)}"
        )
    return team
