"""How much memory this process may still take, and whether a dataset fits into it."""

from __future__ import annotations

from pathlib import Path

# Share of the free memory that decoded rows may take: the rest is the model's, the optimizer's and the batches'.
FRACTION = 0.25

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def free_bytes() -> int:
    """Bytes that this machine, or the container that this process is in, still has to give; 0 where none can tell."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for limit, usage in _CGROUPS:
        if limit.exists() and usage.exists() and (text := limit.read_text().strip()) != "max":
            found.append(max(0, int(text) - int(usage.read_text())))
    return min(found, default=0)


def fits(nbytes: int, processes: int) -> bool:
    """Whether each of some processes on this machine can hold so many bytes in its share of :data:`FRACTION`."""
    return nbytes * processes <= FRACTION * free_bytes()
