"""How often the kernel has killed a process of this control group for want of memory."""

from __future__ import annotations

from pathlib import Path


def kills() -> int | None:
    """The count so far; None where the kernel does not say."""
    for path in _counters():
        try:
            words = path.read_text().split()
        except OSError:
            continue
        if "oom_kill" in words:
            return int(words[words.index("oom_kill") + 1])
    return None


def _counters() -> list[Path]:
    """The files that may have it: this group's own (version 2, then version 1), else that of the whole container."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append(Path(f"/sys/fs/cgroup{path}") / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(Path(f"/sys/fs/cgroup/memory{path}") / "memory.oom_control")
    return [
        *found, Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"),
    ]  # fmt: skip
