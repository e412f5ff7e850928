"""What a SLURM cluster has and allows, compared with what a sweep's jobs ask for, before anything is submitted.

Only SLURM's own commands are asked, all at once and with an end: a cluster that does not answer is no reason not to
start. Nothing is submitted here. What cannot be known for sure is a note, never a problem.
"""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")
_PATIENCE_S = 15.0
_AGAIN_S = 3.0
_SHOWN = 12
_MB = 1024
_NOTHING = {"", "(null)", "N/A", "n/a", "NONE", "none"}
_UNLIMITED = {"UNLIMITED", "INFINITE", "unlimited", "infinite", *_NOTHING}
_WHERE = "sweep.executor"
_FEATURE = re.compile(r"[A-Za-z_][\w.:/-]*")
_AWAY = (
    "Unable to contact",
    "Socket timed out",
    "Connection refused",
    "connect failure",
    "Zero Bytes were transmitted",
    "Unexpected message received",
    "Problem talking to the database",
)
"""What a command says when whom it asks is away."""
_FOR_NOW = ("not available (down", "are busy", "job submit limit", "reserved")
"""What sbatch says of jobs that may run another time."""
_NO_NODES = "node configuration is not available"
"""What ``sbatch --test-only`` says of jobs that no node can ever run, and as well where all that could are away; then
sbatch itself takes them (Slurm 22.05)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What each of ``jobs`` jobs asks for: of ``nodes`` nodes, each with these GPUs, CPUs and memory."""

    jobs: int = 1
    nodes: int = 1
    minutes: int = 60
    gpus: int = 0
    gpu_type: str | None = None
    cpus: int = 1
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Nodes of one partition that are alike."""

    partition: str
    default: bool
    count: int
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]
    features: frozenset[str]
    state: str

    def gpus_of(self, kind: str | None) -> int:
        """How many GPUs of a type each of them has; None: of any."""
        return sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the commands have said; None where one did not answer. ``limits`` are those of each partition."""

    nodes: Sequence[Nodes] | None = None
    limits: Mapping[str, Mapping[str, str]] | None = None
    settings: Mapping[str, str] | None = None
    associations: Sequence[Mapping[str, str]] | None = None
    qos: Mapping[str, Mapping[str, str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """``problems`` would keep jobs from ever running; ``notes`` are worth knowing. One line each.

    ``away``: there are nodes that would do, and all of them are away for now.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    away: bool = False


def missing_commands() -> list[str]:
    """Those of SLURM's commands that this machine lacks."""
    return [command for command in COMMANDS if shutil.which(command) is None]


def inspect(wish: Wish, script: str) -> Findings:
    """Compare what jobs ask for with the cluster, and have SLURM itself judge their script.

    Args:
        wish: what the jobs ask for.
        script: what sbatch would get; SLURM validates it without taking it (``--test-only``).
    """
    found, said = _inspect(wish, script)
    if said is not None and _NO_NODES in said:
        time.sleep(_AGAIN_S)  # a controller that has just started does not know its nodes at once
        found, said = _inspect(wish, script)
    if said is not None:
        return Findings(problems=(f"sweep/executor=slurm: sbatch refuses such a job: {said}",))
    return found


def _inspect(wish: Wish, script: str) -> tuple[Findings, str | None]:
    """What is found, and what sbatch says where it refuses what nothing else speaks against."""
    with ThreadPoolExecutor() as pool:
        verdict = pool.submit(_ask, "sbatch", "--test-only", input=script)
        facts = _facts(pool)
        answer = verdict.result()
    found = compare(wish, facts)
    if answer.away and facts.nodes is None and facts.settings is None:
        return Findings(notes=(f"the cluster does not answer, nothing is checked: {answer.said}",)), None
    if found.problems or answer.away:
        return found, None
    if answer.ok:
        return Findings(notes=(*found.notes, *_estimate(answer.said))), None
    if any(each in answer.said for each in _FOR_NOW) or (found.away and _NO_NODES in answer.said):
        return Findings(notes=(*found.notes, f"sbatch says of such a job: {answer.said}")), None
    return found, answer.said


def compare(wish: Wish, facts: Facts) -> Findings:
    """Problems and notes, from what is known."""
    problems: list[str] = []
    notes: list[str] = []
    partitions = _chosen(wish, facts, problems)
    if partitions:
        problems += _closed(partitions, facts)
        problems += _too_long(wish, partitions, facts)
        problems += _not_admitted(wish, partitions, facts)
        problems += _too_large(wish, partitions, facts)
    waits = tuple(_unfit(wish, partitions, facts))
    notes += waits
    _look_at_accounting(wish, facts, problems, notes)
    _look_at_numbers(wish, facts, problems, notes)
    return Findings(problems=tuple(problems), notes=tuple(notes), away=bool(waits))


# --- what SLURM says -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    ok: bool
    text: str
    said: str
    away: bool = False


def _ask(*command: str, input: str = "") -> _Answer:  # noqa: A002  (subprocess's name)
    try:
        done = subprocess.run(
            command, input=input, capture_output=True, text=True, timeout=_PATIENCE_S, check=False,
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return _Answer(False, "", f"{command[0]} says nothing for {_PATIENCE_S:.0f} s", away=True)
    except OSError as error:
        return _Answer(False, "", f"{command[0]}: {error}", away=True)
    said = " ".join(done.stderr.split())
    away = done.returncode != 0 and any(each in said for each in _AWAY)
    return _Answer(done.returncode == 0, done.stdout, said, away=away)


def _facts(pool: ThreadPoolExecutor) -> Facts:
    user = getpass.getuser()
    asked = {
        "nodes": ("sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%m|%G|%f|%T"),
        "limits": ("scontrol", "show", "partition", "--oneliner"),
        "settings": ("scontrol", "show", "config"),
        "associations": (
            "sacctmgr", "--noheader", "--parsable2", "show", "associations", "where", f"user={user}",
            "format=account,partition,qos,maxsubmit,maxwall",
        ),
        "qos": ("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=name,maxwall,maxsubmitpu"),
    }  # fmt: skip
    running = {name: pool.submit(_ask, *command) for name, command in asked.items()}
    texts = {name: answer.result().text if answer.result().ok else None for name, answer in running.items()}

    def read(name: str, reader: Callable[[str], object]) -> object:
        text = texts[name]
        with contextlib.suppress(
            ValueError, IndexError
        ):  # another version's words: as if it had said nothing
            return None if text is None else reader(text)
        return None

    return Facts(
        nodes=read("nodes", nodes_of),  # type: ignore[arg-type]  # each reader's own type
        limits=read("limits", partitions_of),  # type: ignore[arg-type]
        settings=read("settings", settings_of),  # type: ignore[arg-type]
        associations=read(  # type: ignore[arg-type]
            "associations",
            lambda text: rows_of(text, ("account", "partition", "qos", "maxsubmit", "maxwall")),
        ),
        qos=read(  # type: ignore[arg-type]
            "qos",
            lambda text: {row["name"]: row for row in rows_of(text, ("name", "maxwall", "maxsubmit"))},
        ),
    )


def nodes_of(text: str) -> list[Nodes]:
    """The lines of ``sinfo --format=%P|%D|%c|%m|%G|%f|%T``."""
    found = []
    for line in text.splitlines():
        partition, count, cpus, memory, gres, features, state = line.split("|")
        if count.isdigit() and int(count) > 0:
            found.append(
                Nodes(
                    partition=partition.rstrip("*"), default=partition.endswith("*"), count=int(count),
                    cpus=int(cpus.rstrip("+")), memory_mb=int(memory.rstrip("+")), gpus=gpus_in(gres),
                    features=frozenset() if features in _NOTHING else frozenset(features.split(",")), state=state,
                )
            )  # fmt: skip
    return found


def gpus_in(gres: str) -> dict[str, int]:
    """GPUs by type in what SLURM calls GRES, such as ``gpu:a100:4(S:0-1),nvme:1``; without a type under ``''``."""
    found: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = part.strip().split(":")
        if name == "gpu":
            count = rest.pop() if rest and rest[-1].isdigit() else "1"
            found[":".join(rest)] = found.get(":".join(rest), 0) + int(count)
    return found


def partitions_of(text: str) -> dict[str, dict[str, str]]:
    """The lines of ``scontrol show partition --oneliner``."""
    found = {}
    for line in text.splitlines():
        pairs = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in pairs:
            found[pairs["PartitionName"]] = pairs
    return found


def settings_of(text: str) -> dict[str, str]:
    """``scontrol show config``."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def rows_of(text: str, names: Sequence[str]) -> list[dict[str, str]]:
    """The lines of ``sacctmgr --parsable2 --noheader``."""
    rows = [line.split("|") for line in text.splitlines() if line.strip()]
    return [dict(zip(names, row, strict=True)) for row in rows]


def minutes_of(text: str) -> float:
    """Minutes of a time limit as SLURM writes it: ``days-hours:minutes:seconds``; infinite where there is none.

    Raises:
        ValueError: it is none.
    """
    if text in _UNLIMITED:
        return math.inf
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = (0, 0, *parts)[-3:]
        if len(parts) == 1:
            hours, minutes, seconds = 0, parts[0], 0
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60


# --- what does not fit -----------------------------------------------------------------------------------------


def _chosen(wish: Wish, facts: Facts, problems: list[str]) -> list[str]:
    """The partitions that jobs may run in."""
    known = list(facts.limits or dict.fromkeys(each.partition for each in facts.nodes or ()))
    if not known:
        return []
    if wish.partition is None:
        defaults = [name for name, limits in (facts.limits or {}).items() if limits.get("Default") == "YES"]
        defaults = defaults or [each.partition for each in facts.nodes or () if each.default]
        if not defaults:
            problems.append(
                f"{_WHERE}.partition: this cluster has no default partition; choose one of {_list(known)}"
            )
        return defaults[:1]
    asked = [name.strip() for name in wish.partition.split(",")]
    problems += [
        f"{_WHERE}.partition: '{name}' is not a partition of this cluster ({_list(known)})"
        for name in asked
        if name not in known
    ]
    return [name for name in asked if name in known]


def _closed(partitions: Sequence[str], facts: Facts) -> Iterable[str]:
    states = {name: _limit(facts, name, "State") or "UP" for name in partitions}
    if all(state != "UP" for state in states.values()):
        for name, state in states.items():
            yield f"{_WHERE}.partition: '{name}' is {state}: no job starts there"


def _too_long(wish: Wish, partitions: Sequence[str], facts: Facts) -> Iterable[str]:
    longest = {}
    for name in partitions:
        with contextlib.suppress(ValueError):
            longest[name] = minutes_of(_limit(facts, name, "MaxTime"))
    if longest and wish.minutes > max(longest.values()):
        name = max(longest, key=lambda each: longest[each])
        yield (
            f"{_WHERE}.timeout_min: {wish.minutes} is more than partition '{name}' allows ({longest[name]:g})"
        )


def _not_admitted(wish: Wish, partitions: Sequence[str], facts: Facts) -> Iterable[str]:
    """Accounts and qualities of service that none of the partitions lets in."""
    for key, given, allow, deny in (
        ("account", wish.account, "AllowAccounts", "DenyAccounts"),
        ("qos", wish.qos, "AllowQos", "DenyQos"),
    ):
        if given is None:
            continue
        refused = {}
        for name in partitions:
            allowed, denied = _limit(facts, name, allow), _limit(facts, name, deny)
            if given in denied.split(",") or (allowed not in {"", "ALL"} and given not in allowed.split(",")):
                refused[name] = "" if allowed in {"", "ALL"} else f" ({_list(allowed.split(','))})"
        if len(refused) == len(partitions):
            name, others = next(iter(refused.items()))
            yield f"{_WHERE}.{key}: '{given}' is not allowed in partition '{name}'{others}"


def _too_large(wish: Wish, partitions: Sequence[str], facts: Facts) -> Iterable[str]:
    """What no node of the partitions has: one thing at a time, then all of them at once."""
    nodes = [each for each in facts.nodes or () if each.partition in partitions]
    if not nodes:
        return
    where = f"partition '{','.join(partitions)}'"
    found: list[str] = []
    if wish.gpus > (most := max(each.gpus_of(wish.gpu_type) for each in nodes)):
        found.append(_no_gpus(wish, nodes, most, where))
    if wish.cpus > (most := max(each.cpus for each in nodes)):
        found.append(
            f"{_WHERE}.cpus_per_task: {wish.cpus} is more than the nodes of {where} have (at most {most})"
        )
    if wish.mem_gb is not None and wish.mem_gb * _MB > (most := max(each.memory_mb for each in nodes)):
        found.append(
            f"{_WHERE}.mem_gb: {wish.mem_gb:g} is more than the nodes of {where} have (at most {most / _MB:.1f})"
        )
    features = frozenset().union(*(each.features for each in nodes))
    for feature in _FEATURE.findall(wish.constraint or ""):
        if feature not in features:
            known = f" ({_list(sorted(features))})" if features else ", which have none"
            found.append(f"{_WHERE}.constraint: '{feature}' is not a feature of the nodes of {where}{known}")
    fitting = sum(each.count for each in nodes if _fits(wish, each))
    if not found and fitting < wish.nodes:
        what = _described(wish)
        found.append(
            f"{_WHERE}: {wish.nodes} nodes with {what} are more than {where} has ({fitting})"
            if wish.nodes > 1
            else f"{_WHERE}: no node of {where} has {what} together"
        )
    yield from found


def _no_gpus(wish: Wish, nodes: Sequence[Nodes], most: int, where: str) -> str:
    kinds = sorted({kind for each in nodes for kind in each.gpus if kind})
    if wish.gpu_type is not None and wish.gpu_type not in kinds:
        known = f" ({_list(kinds)})" if kinds else ""
        return f"{_WHERE}.gpus_per_node: '{wish.gpu_type}' is not a type of GPU in {where}{known}"
    what = f"{wish.gpus} of type '{wish.gpu_type}'" if wish.gpu_type else str(wish.gpus)
    return f"{_WHERE}.gpus_per_node: {what} is more than the nodes of {where} have (at most {most})"


def _fits(wish: Wish, nodes: Nodes) -> bool:
    return (
        nodes.gpus_of(wish.gpu_type) >= wish.gpus
        and nodes.cpus >= wish.cpus
        and nodes.memory_mb >= (wish.mem_gb or 0) * _MB
    )


def _unfit(wish: Wish, partitions: Sequence[str], facts: Facts) -> Iterable[str]:
    """Nodes that would do, and are all away for now."""
    fitting = [each for each in facts.nodes or () if each.partition in partitions and _fits(wish, each)]
    away = [each for each in fitting if _is_away(each.state)]
    if fitting and len(away) == len(fitting):
        states = ", ".join(sorted({each.state for each in away}))
        yield f"all nodes that have what a job needs are {states}: jobs would wait"


def _is_away(state: str) -> bool:
    """Whether a node in a state, as sinfo writes it, takes no jobs now; a ``*`` says that it does not answer."""
    return "*" in state or state.rstrip("~#!%$@^-").lower() in _AWAY_STATES


_AWAY_STATES = frozenset({"down", "drained", "draining", "drain", "fail", "failing", "maint", "unknown"})


def _look_at_accounting(wish: Wish, facts: Facts, problems: list[str], notes: list[str]) -> None:
    settings = facts.settings or {}
    kind = settings.get("AccountingStorageType", "")
    if not kind or kind.endswith("none"):
        return
    enforced = settings.get("AccountingStorageEnforce", "none").lower()
    if facts.associations is None or facts.qos is None:
        if wish.account or wish.qos or "associations" in enforced:
            notes.append("SLURM's accounting does not answer: account and qos are not checked")
        return
    found: list[str] = []
    mine = facts.associations
    accounts = sorted({row["account"] for row in mine})
    if wish.account is not None and wish.account not in accounts:
        known = f" ({_list(accounts)})" if accounts else ""
        found.append(f"{_WHERE}.account: '{wish.account}' is not an account of yours{known}")
    elif not accounts and "associations" in enforced:
        found.append(f"{_WHERE}.account: user {getpass.getuser()} has no account on this cluster")
    if wish.qos is not None and wish.qos not in facts.qos:
        found.append(f"{_WHERE}.qos: '{wish.qos}' is not a qos of this cluster ({_list(facts.qos)})")
    elif wish.qos is not None:
        usable = {
            qos for row in mine if wish.account in (None, row["account"]) for qos in row["qos"].split(",")
        }
        if usable and wish.qos not in usable:
            found.append(
                f"{_WHERE}.qos: '{wish.qos}' is not one that your account may use ({_list(sorted(usable))})"
            )
    if any(each in enforced for each in ("associations", "limits", "qos", "safe")):
        problems += found
    else:
        notes += [f"{each}; this cluster does not enforce it" for each in found]


def _look_at_numbers(wish: Wish, facts: Facts, problems: list[str], notes: list[str]) -> None:
    """How many jobs, and for how long, by the user's associations and the quality of service."""
    enforced = (facts.settings or {}).get("AccountingStorageEnforce", "none").lower()
    if not any(each in enforced for each in ("limits", "safe")):
        return
    rows = [row for row in facts.associations or () if wish.account in (None, row["account"])]
    if wish.qos is not None and facts.qos is not None and wish.qos in facts.qos:
        rows = [*rows, facts.qos[wish.qos]]
    for row in rows:
        who = f"qos '{row['name']}'" if "name" in row else f"account '{row['account']}'"
        if row["maxsubmit"].isdigit() and wish.jobs > int(row["maxsubmit"]):
            notes.append(
                f"{who} allows {row['maxsubmit']} jobs at a time: not all {wish.jobs} workers will run"
            )
        with contextlib.suppress(ValueError):
            if wish.minutes > (longest := minutes_of(row["maxwall"])):
                problems.append(
                    f"{_WHERE}.timeout_min: {wish.minutes} is more than {who} allows ({longest:g})"
                )


def _estimate(said: str) -> Iterable[str]:
    """``sbatch: Job 5 to start at 2026-01-02T03:04:05 using 4 processors on nodes a in partition b``."""
    found = re.search(r"to start at (\S+)", said)
    if found:
        yield f"a worker would start at {found[1].replace('T', ' ')}, by SLURM's estimate"


def _limit(facts: Facts, partition: str, key: str) -> str:
    return (facts.limits or {}).get(partition, {}).get(key, "")


def _described(wish: Wish) -> str:
    parts = [f"{wish.gpus} {wish.gpu_type or ''} GPUs".replace("  ", " ")] if wish.gpus else []
    parts.append(f"{wish.cpus} CPUs")
    parts += [f"{wish.mem_gb:g} GiB"] if wish.mem_gb is not None else []
    return ", ".join(parts)


def _list(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_SHOWN]) + (f", and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
