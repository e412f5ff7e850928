"""What a testbed is made of: its options, the files of its directory, and the text of Slurm's configuration.

Pure functions of options and ports; nothing here touches the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CLUSTER_NAME = "testbed"
ACCOUNTS = ("lab", "other")
GPU_TYPE = "fake"

# An address that only this machine reaches; the two words make Slurm listen on nothing else.
LOOPBACK = "127.0.0.1"
_LOOPBACK_ONLY = "NoCtldInAddrAny,NoInAddrAny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a testbed differs from the next.

    ``cpus`` and ``memory_mb`` are what each node claims to have, whatever the machine has. ``grace_s`` is the time
    between the first signal to a preempted job and its end; with ``send_user_signal`` that signal is the one the job
    wants by ``--signal``. ``kill_wait_s`` is the time between SIGTERM and SIGKILL for a job that is preempted,
    cancelled or out of time. ``node_timeout_s`` is how long a node may be silent before it is DOWN.
    ``min_job_age_s`` is how long the controller knows a job that has ended. ``requeue_delay_s`` is how long a
    requeued job waits.
    """

    nodes: int = 4
    gpus: int = 2
    cpus: int = 4
    memory_mb: int = 4000
    accounting: bool = True
    enforce: bool = False
    grace_s: int = 0
    send_user_signal: bool = False
    kill_wait_s: int = 5
    node_timeout_s: int = 15
    min_job_age_s: int = 300
    requeue_delay_s: int = 5
    max_array_size: int = 1001
    max_job_count: int = 10000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The ports of one testbed, all on the loopback address."""

    controller: int
    accounting: int
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things stand in a testbed's directory."""

    root: Path

    @property
    def state(self) -> Path:
        """What runs here: options, ports, processes."""
        return self.root / "testbed.json"

    @property
    def slurm_conf(self) -> Path:
        """What ``SLURM_CONF`` names; the other files of Slurm's configuration stand beside it."""
        return self.root / "etc" / "slurm.conf"

    @property
    def munge_key(self) -> Path:
        """The secret that Slurm's processes share."""
        return self.root / "munge" / "key"

    @property
    def munge_socket(self) -> Path:
        """Where munged listens."""
        return self.root / "munge" / "socket"

    @property
    def mariadb_data(self) -> Path:
        """MariaDB's data."""
        return self.root / "db"

    @property
    def mariadb_socket(self) -> Path:
        """Where MariaDB listens."""
        return self.root / "db.socket"

    def gpu(self, node: str, number: int) -> Path:
        """The device file of a GPU."""
        return self.root / "dev" / node / f"gpu{number}"

    def spool(self, node: str) -> Path:
        """Where a node's slurmd keeps its state."""
        return self.root / "spool" / node

    def log(self, daemon: str) -> Path:
        """What a daemon says."""
        return self.root / "log" / f"{daemon}.log"

    def output(self, daemon: str) -> Path:
        """What a daemon prints, its complaints before it opens its log among it."""
        return self.root / "log" / f"{daemon}.out"

    def pid_file(self, daemon: str) -> Path:
        """Where a daemon writes its pid; nothing reads it."""
        return self.root / "run" / f"{daemon}.pid"

    def folders(self, nodes: list[str]) -> list[Path]:
        """All folders that must exist before a daemon starts."""
        top = [self.root / name for name in ("etc", "munge", "dev", "spool", "log", "run", "state")]
        return top + [self.root / kind / node for kind in ("dev", "spool") for node in nodes]


def node_names(options: Options) -> list[str]:
    """The nodes' names."""
    return [f"node{number}" for number in range(1, options.nodes + 1)]


def files(options: Options, layout: Layout, ports: Ports) -> dict[str, str]:
    """Slurm's configuration by file name."""
    return {
        "slurm.conf": slurm_conf(options, layout, ports),
        "gres.conf": gres_conf(options, layout),
        "slurmdbd.conf": slurmdbd_conf(layout, ports),
        # without the file Slurm looks for the machine's own
        "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
    }


def slurm_conf(options: Options, layout: Layout, ports: Ports) -> str:
    """The cluster: who talks to whom, how jobs are started and scheduled, nodes, partitions."""
    sections = (
        _daemons(options, layout, ports),
        _jobs(options),
        _scheduling(options),
        _accounting(options, layout, ports),
    )
    lines = [line for section in sections for line in section] + _nodes(options, ports) + _partitions(options)
    return "\n".join(lines) + "\n"


def _daemons(options: Options, layout: Layout, ports: Ports) -> list[str]:
    return [
        f"ClusterName={CLUSTER_NAME}",
        f"SlurmctldHost=localhost({LOOPBACK})",
        f"SlurmctldPort={ports.controller}",
        f"CommunicationParameters={_LOOPBACK_ONLY}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={layout.munge_socket},cred_expire={options.requeue_delay_s}",
        "SlurmUser=root",
        "SlurmdUser=root",
        f"StateSaveLocation={layout.root / 'state'}",
        f"SlurmdSpoolDir={layout.root / 'spool'}/%n",
        f"SlurmctldPidFile={layout.pid_file('slurmctld')}",
        f"SlurmdPidFile={layout.pid_file('%n')}",
        f"SlurmctldLogFile={layout.log('slurmctld')}",
        f"SlurmdLogFile={layout.log('%n')}",
        "SlurmctldDebug=info",
        "SlurmdDebug=info",
        "MailProg=/bin/true",
        "MessageTimeout=30",
        "SlurmctldTimeout=30",
        f"SlurmdTimeout={options.node_timeout_s}",
        "ReturnToService=2",
    ]


def _jobs(options: Options) -> list[str]:
    return [
        "MpiDefault=none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "PropagateResourceLimits=NONE",
        "SlurmdParameters=config_overrides",
        "JobRequeue=1",
        f"KillWait={options.kill_wait_s}",
        "OverTimeLimit=0",
        "CompleteWait=0",
        "InactiveLimit=0",
        f"MinJobAge={options.min_job_age_s}",
        f"MaxArraySize={options.max_array_size}",
        f"MaxJobCount={options.max_job_count}",
    ]


def _scheduling(options: Options) -> list[str]:
    user_signal = ["SlurmctldParameters=preempt_send_user_signal"] if options.send_user_signal else []
    return [
        *user_signal,
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=100",
        "GresTypes=gpu",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=50000,bf_interval=1",
        "SchedulerTimeSlice=5",
        "PreemptType=preempt/partition_prio",
        # partitions say what becomes of their preempted jobs; only this line starts the gang scheduler, which resumes
        "PreemptMode=SUSPEND,GANG",
    ]


def _accounting(options: Options, layout: Layout, ports: Ports) -> list[str]:
    if not options.accounting:
        return ["AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/none"]
    enforced = ["AccountingStorageEnforce=associations,limits"] if options.enforce else []
    return [
        *enforced,
        "AccountingStorageType=accounting_storage/slurmdbd",
        f"AccountingStorageHost={LOOPBACK}",
        f"AccountingStoragePort={ports.accounting}",
        f"AccountingStoragePass={layout.munge_socket}",
        "AccountingStorageTRES=gres/gpu",
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherFrequency=30",
    ]


def _nodes(options: Options, ports: Ports) -> list[str]:
    gres = f" Gres=gpu:{GPU_TYPE}:{options.gpus}" if options.gpus else ""
    return [
        f"NodeName={name} NodeHostname=localhost NodeAddr={LOOPBACK} Port={port} CPUs={options.cpus} Sockets=1"
        f" CoresPerSocket={options.cpus} ThreadsPerCore=1 RealMemory={options.memory_mb}{gres} State=UNKNOWN"
        for name, port in zip(node_names(options), ports.nodes, strict=True)
    ]


def _partitions(options: Options) -> list[str]:
    common = f"Nodes=ALL State=UP DefaultTime=60 MaxTime=INFINITE GraceTime={options.grace_s}"
    return [
        f"PartitionName=debug Default=YES PriorityTier=1 PreemptMode=OFF {common}",
        f"PartitionName=requeued PriorityTier=1 PreemptMode=REQUEUE {common}",
        f"PartitionName=cancelled PriorityTier=1 PreemptMode=CANCEL {common}",
        f"PartitionName=suspended PriorityTier=1 PreemptMode=SUSPEND OverSubscribe=FORCE:1 {common}",
        f"PartitionName=high PriorityTier=10 PreemptMode=OFF OverSubscribe=FORCE:1 {common}",
    ]


def gres_conf(options: Options, layout: Layout) -> str:
    """The GPUs of each node."""
    lines = ["AutoDetect=off"]
    if options.gpus:
        numbers = f"[0-{options.gpus - 1}]" if options.gpus > 1 else "0"
        lines += [
            f"NodeName={node} Name=gpu Type={GPU_TYPE} File={layout.gpu(node, 0).parent}/gpu{numbers}"
            for node in node_names(options)
        ]
    return "\n".join(lines) + "\n"


def slurmdbd_conf(layout: Layout, ports: Ports) -> str:
    """The accounting daemon; it finds MariaDB's socket in ``MYSQL_UNIX_PORT``."""
    return (
        "AuthType=auth/munge\n"
        f"AuthInfo=socket={layout.munge_socket}\n"
        f"CommunicationParameters={_LOOPBACK_ONLY}\n"
        f"DbdHost=localhost\nDbdAddr={LOOPBACK}\nDbdPort={ports.accounting}\n"
        "SlurmUser=root\n"
        f"LogFile={layout.log('slurmdbd')}\nPidFile={layout.pid_file('slurmdbd')}\nDebugLevel=info\n"
        "StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser=root\nStorageLoc=slurm\n"
    )
