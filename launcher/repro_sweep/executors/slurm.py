"""``sweep/executor=slurm``: workers as SLURM jobs, submitted through submitit as job arrays.

A job is a worker with slots, not a trial: it pulls trials until none is left or its time is nearly over. All that
SLURM is asked is asked by one thread, so that a slow or absent controller holds nothing up: what it does not know yet
is alive. Jobs are recognised by their names, which are written down before they are submitted; so a submission whose
reply was lost is found again, and not repeated.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import math
import queue
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repro_sweep import cluster, jobs, machine
from repro_sweep.errors import SweepError
from repro_sweep.executors.base import (
    ALIVE,
    GONE,
    Cause,
    Context,
    Executor,
    Outlook,
    WorkerState,
    WorkerStatus,
)
from repro_sweep.spool import write_file
from repro_sweep.submitting import Submission, TooManyJobsError, UnansweredError

REMOTE = True
"""Its workers come over TCP."""
SPANS_NODES = True
"""A job may have several nodes, all for one trial."""
FOLDER = "slurm"
_WORKER = "repro_sweep.worker.slurm"
_WHERE = "sweep.executor"
_SURE_AFTER = 2
"""So many answers of squeue without a job mean that it is gone, where accounting cannot tell."""
_STARTS_WITHIN_S = 30.0
_LEAVE_S = 5.0
_CANCEL_AGAIN_S = 20.0
_NAMES = (
    "partition", "account", "qos", "constraint", "exclude", "host", "coordinator_partition", "coordinator_qos",
)  # fmt: skip
_HAND_OVER_S = 120
_CLOSING_POLL_S = 0.5
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_GPUS = re.compile(r"(?:[\w.-]+:)?[0-9]+")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")

log = logging.getLogger(__name__)


@dataclass
class Options:
    """The names are those of hydra-submitit-launcher and submitit, where these have one.

    Each of up to ``workers`` jobs has a node's ``gpus_per_node`` GPUs (``2``, or with a type ``a100:2``),
    ``cpus_per_task`` CPUs and ``mem_gb`` GiB for ``timeout_min`` minutes; its ``nodes`` are those of one trial, which
    ``sweep.resources.nodes_per_trial`` says. ``slots``: trials at a time in a job; null:
    as many as its GPUs, or else its CPUs, have room for. ``expected_trial_min``: how long a trial takes, before any has
    ended. ``signal_delay_s``: how long before its time limit a worker interrupts its trials. ``poll_s``: how long
    between two looks at the queue. ``host``: the name or address at which the workers reach this machine; null: its
    own. With ``sweep.detach`` the coordinator is a job too: of ``coordinator_partition`` and ``coordinator_qos`` (null:
    the workers'), with ``coordinator_mem_gb`` GiB for ``coordinator_timeout_min`` minutes (null: the workers'), after
    which it hands over to the next.
    """

    workers: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    timeout_min: int = 60
    nodes: int | None = None
    gpus_per_node: int | str | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    constraint: str | None = None
    exclude: str | None = None
    array_parallelism: int = 256
    setup: list[str] = field(default_factory=list)
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    signal_delay_s: int = 90
    slots: int | None = None
    expected_trial_min: float | None = None
    poll_s: float = 10.0
    host: str | None = None
    coordinator_partition: str | None = None
    coordinator_qos: str | None = None
    coordinator_timeout_min: int | None = None
    coordinator_mem_gb: float = 2.0


@dataclass(slots=True)
class _Batch:
    """Jobs that are submitted together: an array of ``count`` workers, found by its name; ``job`` is its id.

    ``earlier``: another coordinator has submitted them, and this one has not looked at them yet: what the user has
    cancelled before counts no more.
    """

    ident: str
    count: int
    name: str
    submitted_at: float
    job: str | None = None
    unseen: dict[int, int] = field(default_factory=dict)
    earlier: bool = False
    statuses: dict[int, WorkerStatus] = field(default_factory=dict)

    def worker(self, index: int) -> str:
        return f"slurm-{self.ident}-{index}"

    def id_of(self, index: int) -> str:
        """What SLURM calls one of them, once ``job`` is known."""
        return f"{self.job}_{index}" if self.count > 1 else str(self.job)

    def record(self) -> str:
        """What a later coordinator needs to find these jobs again."""
        keys = ("ident", "count", "name", "submitted_at", "job")
        return json.dumps({key: getattr(self, key) for key in keys})


class SlurmExecutor(Executor):
    """Workers as the tasks of SLURM job arrays.

    Raises:
        SweepError: an option cannot be used.
    """

    def __init__(self, context: Context, options: Options) -> None:
        self._context = context
        self._options = options
        check_options(options, context)
        self._folder = Path(context.spec.directory) / FOLDER
        self._slots = slots_per_job(options, context)
        self._lock = threading.Lock()
        self._batches = {batch.ident: batch for batch in self._recorded()}
        self._orders: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._held: list[_Batch] = []
        self._why_held = ""
        self._accepted = False
        self._cancelled: dict[str, float] = {}
        self._failed: SweepError | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._most: int | None = None
        if self._batches:
            self._serve()

    def describe(self) -> str:
        """Jobs, slots and partition."""
        where = f", partition {self._options.partition}" if self._options.partition else ""
        nodes = self._context.spec.resources.nodes
        each = f"{nodes} nodes for one trial" if nodes > 1 else f"{self._slots} slots"
        return f"up to {self._options.workers} SLURM jobs with {each} each{where}"

    def outlook(self, trials: int) -> Outlook:
        """The job script, and what the cluster says of it."""
        missing = cluster.missing_commands()
        if missing:
            names = ", ".join(missing)
            return Outlook(
                problems=(f"sweep/executor=slurm: there is no SLURM on this machine ({names} not on PATH)",)
            )
        wanted = max(1, self.wanted(trials))
        count = min(wanted, self._largest_array(wanted))
        name = f"{_UNSAFE.sub('-', self._context.spec.name)}.{'x' * 10}"
        script = submission(self._options, self._context, name).script(
            worker_command(self._options, self._context, "x" * 10), count
        )
        found = cluster.inspect(wish(self._options, self._context, wanted), script)
        return Outlook(problems=found.problems, notes=found.notes, script=script)

    def wanted(self, trials: int) -> int:
        """As many jobs as have enough slots, and not more than ``workers``."""
        return min(self._options.workers, math.ceil(trials / self._slots))

    def start(self, count: int) -> list[str]:
        """Submit jobs; returns at once, and their submission may fail later."""
        if self._failed is not None:
            raise self._failed
        most = self._largest_array(count)
        sizes = [min(most, count - begun) for begun in range(0, count, most)]
        return [worker for size in sizes for worker in self._start(size)]

    def _largest_array(self, count: int) -> int:
        """How many of so many jobs may be submitted together."""
        if count > 1 and self._most is None:
            self._most = jobs.largest_array()
        return self._most or count

    def _start(self, count: int) -> list[str]:
        batch = self._new_batch(count)
        self._orders.put(("submit", batch))
        self._serve()
        return [batch.worker(index) for index in range(count)]

    def _new_batch(self, count: int) -> _Batch:
        ident = uuid.uuid4().hex[:10]
        name = f"{_UNSAFE.sub('-', self._context.spec.name)}.{ident}"
        batch = _Batch(ident=ident, count=count, name=name, submitted_at=time.time())
        self._folder.mkdir(mode=0o700, exist_ok=True)
        write_file(self._folder / f"{ident}.json", batch.record())
        with self._lock:
            self._batches[ident] = batch
            batch.statuses = dict.fromkeys(range(count), ALIVE)
        return batch

    def poll(self) -> Mapping[str, WorkerStatus]:
        """What SLURM has said last; jobs that it has not been asked about are alive."""
        if self._failed is not None:
            raise self._failed
        return self._snapshot()

    def _snapshot(self) -> dict[str, WorkerStatus]:
        with self._lock:
            return {
                batch.worker(index): batch.statuses.get(index, ALIVE)
                for batch in self._batches.values()
                for index in range(batch.count)
            }

    def stop(self, workers: Iterable[str]) -> None:
        """Cancel jobs: those that run get SIGTERM, and have SLURM's KillWait to leave."""
        alive = self._snapshot()
        chosen = [worker for worker in workers if worker in alive and alive[worker].state not in GONE]
        if chosen:
            self._cancelled.update(dict.fromkeys(chosen, time.monotonic()))
            self._orders.put(("cancel", chosen))
            self._serve()

    def close(self, timeout_s: float) -> None:
        """Give workers that leave by themselves a moment, cancel the other jobs, and wait until all have ended.

        Those that do not in time get SIGKILL from SLURM itself.
        """
        self._closing = True
        deadline = time.monotonic() + timeout_s
        if self._batches:
            self._orders.put(("look", None))
            self._serve()
            if not self._ended_before(time.monotonic() + min(_LEAVE_S, timeout_s / 3)):
                self.stop(self._snapshot())
                if not self._ended_before(deadline):
                    names = ", ".join(
                        sorted({b.job or b.name for b in self._batches.values() if self._left(b)})
                    )
                    log.warning("SLURM has not said that all jobs have ended; see to them: %s", names)
        self._orders.put(("end", None))
        if self._thread is not None:
            self._thread.join(timeout=max(_LEAVE_S, deadline - time.monotonic()))

    def _ended_before(self, deadline: float) -> bool:
        while any(status.state not in GONE for status in self._snapshot().values()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    # --- the thread that speaks with SLURM -------------------------------------------------------------------

    def _serve(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="slurm", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        look_at = time.monotonic()
        while True:
            try:
                order, what = self._orders.get(timeout=max(0.0, look_at - time.monotonic()))
            except queue.Empty:
                order, what = "look", None
            if order == "end":
                return
            try:
                if order == "submit":
                    self._submit(what)
                    continue
                if order == "cancel":
                    self._cancel(what)
                self._look()
            except SweepError as error:
                self._failed = error
            except Exception:
                log.exception("SLURM")
            wait_s = min(_CLOSING_POLL_S, self._options.poll_s) if self._closing else self._options.poll_s
            look_at = time.monotonic() + wait_s

    def _submit(self, batch: _Batch) -> None:
        """Submit a batch. Where it is not known whether that has worked, its name will tell.

        Raises:
            SweepError: SLURM refuses it, and has taken none before.
        """
        try:
            batch.job = submission(self._options, self._context, batch.name).submit(
                worker_command(self._options, self._context, batch.ident), batch.count
            )
        except UnansweredError as error:
            log.warning("submission %s was not answered: %s", batch.name, error)
            return
        except TooManyJobsError as error:
            self._hold(batch, error)
            return
        except SweepError as error:
            if not self._accepted:
                self._drop(batch)
                raise
            self._hold(batch, error)  # it has taken such jobs before: the ones that run go on
            return
        self._accepted = True
        write_file(self._folder / f"{batch.ident}.json", batch.record())

    def _hold(self, batch: _Batch, why: Exception) -> None:
        """SLURM has no room for so many jobs: try half of them, and the others at later looks."""
        if batch.count == 1:
            if str(why) != self._why_held:
                log.warning("SLURM takes no more jobs for now: workers wait to be submitted: %s", why)
                self._why_held = str(why)
            self._held.append(batch)
            return
        # both before the whole one goes: at no instant there may seem to be too few workers
        halves = [self._new_batch(size) for size in (batch.count - batch.count // 2, batch.count // 2)]
        self._drop(batch)
        for half in halves:
            if self._held:
                self._held.append(half)
            else:
                self._submit(half)

    def _try_held(self) -> None:
        held, self._held = self._held, []
        for batch in held:
            if self._closing:
                self._drop(batch)
            elif self._held:
                self._held.append(batch)
            else:
                batch.submitted_at = time.time()
                self._submit(batch)

    def _drop(self, batch: _Batch) -> None:
        """Forget a batch that was never submitted."""
        with self._lock:
            del self._batches[batch.ident]
        (self._folder / f"{batch.ident}.json").unlink(missing_ok=True)

    def _cancel(self, workers: Sequence[str]) -> None:
        for batch in [each for each in self._held if each.worker(0) in workers]:  # all of it or nothing
            self._held.remove(batch)
            self._drop(batch)
        with self._lock:
            chosen = {
                batch.ident: [index for index in range(batch.count) if batch.worker(index) in workers]
                for batch in self._batches.values()
            }
            affected = [batch for batch in self._batches.values() if chosen.get(batch.ident)]
        if any(batch.job is None for batch in affected):
            self._look()
        ids = [
            batch.id_of(index) for batch in affected if batch.job is not None for index in chosen[batch.ident]
        ]
        names = [batch.name for batch in affected if batch.job is None]
        if ids:
            jobs.ask("scancel", *ids)
        for name in names:  # submitted perhaps
            jobs.ask("scancel", f"--name={name}")

    def _cancel_again(self, batches: Sequence[_Batch]) -> None:
        """Those that were cancelled some time ago, and are still there: SLURM may not have heard of it."""
        since = time.monotonic() - _CANCEL_AGAIN_S
        late = [
            (batch, index)
            for batch in batches
            for index in self._left(batch)
            if batch.job is not None and self._cancelled.get(batch.worker(index), math.inf) < since
        ]
        if late:
            self._cancelled |= {batch.worker(index): time.monotonic() for batch, index in late}
            jobs.ask("scancel", *(batch.id_of(index) for batch, index in late))

    def _look(self) -> None:
        """One look at the queue for all jobs, and one at the accounting for those that are not there."""
        self._try_held()
        with self._lock:
            open_ones = [batch for batch in self._batches.values() if self._is_open(batch)]
        if not open_ones:
            return
        self._cancel_again(open_ones)
        names = ",".join(batch.name for batch in open_ones)
        queued = jobs.ask(
            "squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", f"--name={names}",
            jobs.SQUEUE_FORMAT,
        )  # fmt: skip
        if queued is None:
            return  # the controller is away: all that was known stays
        seen = {(each.name, each.index): each for each in jobs.queued(queued)}
        if any((batch.name, index) not in seen for batch in open_ones for index in self._left(batch)):
            since = time.strftime(
                "%Y-%m-%dT%H:%M:%S", time.localtime(min(b.submitted_at for b in open_ones) - 60)
            )
            ended = jobs.ask(
                "sacct", "--noheader", "--allocations", "--parsable2", f"--name={names}", f"--starttime={since}",
                jobs.SACCT_FORMAT,
            )  # fmt: skip
            accounted = [each for each in jobs.accounted(ended or "") if each.state in jobs.ENDED]
            seen = {(each.name, each.index): each for each in accounted} | seen
        with self._lock:
            for batch in open_ones:
                self._note(batch, seen)

    def _is_open(self, batch: _Batch) -> bool:
        return batch not in self._held and bool(self._left(batch))

    def _left(self, batch: _Batch) -> list[int]:
        """The indices of a batch's workers of whose ends nothing is known."""
        return [
            index
            for index in range(batch.count)
            if batch.statuses.get(index, ALIVE).state is not WorkerState.ENDED
        ]

    def _note(self, batch: _Batch, seen: Mapping[tuple[str, int], jobs.Job]) -> None:
        missing = []
        for index in self._left(batch):
            each = seen.get((batch.name, index))
            if each is None:
                batch.unseen[index] = batch.unseen.get(index, 0) + 1
                if batch.unseen[index] >= _SURE_AFTER:
                    missing.append(index)
                continue
            batch.unseen.pop(index, None)
            batch.job = batch.job or each.array
            known_end = batch.earlier or batch.worker(index) in self._cancelled
            batch.statuses[index] = self._status(batch.worker(index), each, cancelled_by_us=known_end)
        batch.earlier = False
        if missing and time.time() > batch.submitted_at + _STARTS_WITHIN_S:
            gone = WorkerStatus(
                state=WorkerState.MISSING, detail="is not known to SLURM any more", cause=Cause.LOST
            )
            batch.statuses |= dict.fromkeys(missing, gone)

    def _status(self, worker: str, seen: jobs.Job, *, cancelled_by_us: bool) -> WorkerStatus:
        job = f"(job {seen.array}{f'_{seen.index}' if seen.index else ''})"
        if seen.state in jobs.STOPPED:
            return WorkerStatus(
                state=WorkerState.SUSPENDED, detail=f"is {seen.state} {job}", cause=Cause.EVICTED
            )
        if seen.state not in jobs.ENDED:
            return ALIVE
        cause = Cause.OWN
        if seen.state in jobs.EVICTED:
            cause = Cause.EVICTED
        elif seen.state in jobs.LOST:
            cause = Cause.LOST
        elif seen.state == "CANCELLED":
            cause = Cause.EVICTED if cancelled_by_us else Cause.CANCELLED
        detail = f"ended as {seen.state} {job}"
        if cause is Cause.OWN and seen.state != "COMPLETED":
            detail += last_words(Path(self._context.spec.directory), worker)
        return WorkerStatus(state=WorkerState.ENDED, detail=detail, cause=cause)

    def _recorded(self) -> Iterable[_Batch]:
        """The jobs that an earlier coordinator of the sweep has submitted."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                yield _Batch(**json.loads(path.read_text()), earlier=True)
            except (OSError, ValueError, TypeError):
                log.warning("%s cannot be read", path)


def slots_per_job(options: Options, context: Context) -> int:
    """How many trials run at a time in a job."""
    resources = context.spec.resources
    if resources.nodes > 1 and options.slots not in (None, 1):
        raise SweepError(
            f"{_WHERE}.slots: must be 1 where a trial has several nodes"
            f" (sweep.resources.nodes_per_trial is {resources.nodes}), got {options.slots}"
        )
    if options.slots is not None:
        return options.slots
    if resources.gpus > 0:
        slots = machine.trials_on(gpus_per_node(options, context), resources.gpus)
        return min(1, slots) if resources.nodes > 1 else slots
    if resources.nodes > 1:
        return 1
    return max(1, int((options.cpus_per_task or resources.cpus) / resources.cpus + 1e-9))


def gpus_per_node(options: Options, context: Context) -> int:
    """GPUs of a job: what is asked for, else what one trial needs."""
    given = options.gpus_per_node
    return math.ceil(context.spec.resources.gpus) if given is None else int(str(given).rpartition(":")[2])


def wish(options: Options, context: Context, count: int) -> cluster.Wish:
    """What ``count`` jobs ask the cluster for."""
    kind = str(options.gpus_per_node).rpartition(":")[0] if options.gpus_per_node is not None else ""
    return cluster.Wish(
        jobs=count, nodes=context.spec.resources.nodes, minutes=options.timeout_min,
        gpus=gpus_per_node(options, context), gpu_type=kind or None, cpus=cpus_per_job(options, context),
        mem_gb=options.mem_gb, partition=options.partition, account=options.account, qos=options.qos,
        constraint=options.constraint,
    )  # fmt: skip


def cpus_per_job(options: Options, context: Context) -> int:
    """CPUs of a job: what is asked for, else what its slots need."""
    return options.cpus_per_task or math.ceil(slots_per_job(options, context) * context.spec.resources.cpus)


def check_options(options: Options, context: Context) -> None:
    """See that the options can be used.

    Raises:
        SweepError: the first one that cannot.
    """
    for key in ("workers", "timeout_min", "array_parallelism", "signal_delay_s"):
        value = getattr(options, key)
        if value < 1:
            raise SweepError(f"{_WHERE}.{key}: must be at least 1, got {value}")
    for key in (
        "cpus_per_task", "slots", "mem_gb", "expected_trial_min", "poll_s", "coordinator_timeout_min",
        "coordinator_mem_gb",
    ):  # fmt: skip
        value = getattr(options, key)
        if value is not None and not value > 0:
            raise SweepError(f"{_WHERE}.{key}: must be greater than 0, got {value}")
    for where, text in _texts(options):
        if _CONTROL.search(text):
            raise SweepError(f"{where}: must have no control characters, got {text!r}")
    if not _GPUS.fullmatch(str(options.gpus_per_node or 0)):
        raise SweepError(
            f"{_WHERE}.gpus_per_node: must be a number, or a type and a number like a100:2,"
            f" got {options.gpus_per_node!r}"
        )
    if options.signal_delay_s >= 60 * options.timeout_min:
        raise SweepError(
            f"{_WHERE}.signal_delay_s: must be less than timeout_min, got {options.signal_delay_s} s"
            f" and {options.timeout_min} min"
        )
    nodes = context.spec.resources.nodes
    if options.nodes not in (None, nodes):
        raise SweepError(
            f"{_WHERE}.nodes: a job has the nodes of one trial, sweep.resources.nodes_per_trial, which is {nodes};"
            f" got {options.nodes}"
        )
    if slots_per_job(options, context) < 1:
        raise SweepError(
            f"{_WHERE}.gpus_per_node: {gpus_per_node(options, context)} are too few for one trial:"
            f" sweep.resources.gpus_per_trial is {context.spec.resources.gpus:g}"
        )


def _texts(options: Options) -> Iterable[tuple[str, str]]:
    for key in _NAMES:
        if getattr(options, key) is not None:
            yield f"{_WHERE}.{key}", getattr(options, key)
    for index, line in enumerate(options.setup):
        yield f"{_WHERE}.setup[{index}]", line.replace("\t", " ")
    for key, value in options.additional_parameters.items():
        yield f"{_WHERE}.additional_parameters.{key}", f"{key}{value}"


def worker_command(options: Options, context: Context, batch: str) -> str:
    """The command line of a worker, for a shell; its index in the array is in its environment."""
    resources = context.spec.resources
    words = [sys.executable, "-P", "-m", _WORKER, "--directory", context.spec.directory, "--batch", batch]
    words += ["--cpus", f"{resources.cpus:g}", "--gpus", f"{resources.gpus:g}"]
    words += ["--slots", str(options.slots)] if options.slots is not None else []
    words += ["--mem-gb", f"{resources.mem_gb:g}"] if resources.mem_gb is not None else []
    words += ["--minutes", str(options.timeout_min)]
    # the agent of several nodes starts steps of the job itself, so it is the batch script's only process
    words = (
        ["exec", *words, "--nodes", str(resources.nodes), "--slots", "1"] if resources.nodes > 1 else words
    )
    return shlex.join(words)


def submission(options: Options, context: Context, name: str) -> Submission:
    """The submission of a sweep's workers, which also writes their sbatch script.

    Raises:
        SweepError: there is no SLURM here, or an option cannot be used.
    """
    gpus = gpus_per_node(options, context)
    nodes = context.spec.resources.nodes
    # without B: all steps would get it, and not the agent
    signal = {"signal": f"B:USR2@{options.signal_delay_s}"} if nodes > 1 else {}
    parameters: dict[str, Any] = {
        "job_name": name,
        "time": options.timeout_min,
        "nodes": nodes,
        "use_srun": nodes == 1,
        # from Slurm 22.05 on, a step does not inherit this from its job
        "srun_args": [f"--cpus-per-task={cpus_per_job(options, context)}"] if nodes == 1 else None,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus_per_job(options, context),
        "gpus_per_node": (options.gpus_per_node or gpus) if gpus else None,
        "mem": None if options.mem_gb is None else f"{math.ceil(1024 * options.mem_gb)}M",
        "signal_delay_s": options.signal_delay_s,
        "array_parallelism": options.array_parallelism,
        "stderr_to_stdout": True,
        "setup": options.setup or None,
        "additional_parameters": {"requeue": True, **signal, **options.additional_parameters},
        **{key: getattr(options, key) for key in ("partition", "account", "qos", "constraint", "exclude")},
    }
    given = {key: value for key, value in parameters.items() if value is not None}
    return Submission(Path(context.spec.directory) / FOLDER, given)


def coordinator_job(options: Options) -> dict[str, Any]:
    """The parameters of the job that a sweep's coordinator is: it starts jobs itself, so it is no job step."""
    partition = options.coordinator_partition or options.partition
    qos = options.coordinator_qos or (None if options.coordinator_partition else options.qos)
    minutes = options.coordinator_timeout_min or options.timeout_min
    parameters: dict[str, Any] = {
        "time": minutes,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": 1,
        "mem_gb": options.coordinator_mem_gb,
        "partition": partition,
        "qos": qos,
        "account": options.account,
        "setup": options.setup or None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": {"requeue": True, "signal": f"B:USR2@{min(_HAND_OVER_S, 20 * minutes)}"},
    }
    return {key: value for key, value in parameters.items() if value is not None}


def last_words(directory: Path, worker: str) -> str:
    """What a worker said last, for a message; empty if nothing."""
    with contextlib.suppress(OSError):
        lines = (
            (directory / "workers" / worker / "worker.log").read_text(errors="replace").strip().splitlines()
        )
        if lines:
            return f": {lines[-1][:300]}"
    return ""


OPTIONS = Options
EXECUTOR = SlurmExecutor
