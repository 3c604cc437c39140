"""The processor and the memory of this machine, and the part of them that a container leaves to this process."""

import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def processor() -> str:
    """The processor's name, as far as the system says it."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int | None:
    """Bytes of the whole machine; None where the system does not say."""
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int | None:
    """Bytes that new work can have without swapping; None on other systems than Linux."""
    words = next((line.split() for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")), None)
    return 1024 * int(words[1]) if words else None


def memory_limit(**where: Path) -> int | None:
    """Bytes that this process may use by its control groups; None without a limit."""
    found = []
    for folder in _group_folders("memory", **where):
        words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        if words and words[0].isdigit():  # not "max"
            found.append(int(words[0]))
    return min(found, default=None)


@functools.cache
def usable_memory() -> int:
    """Bytes of the machine, or of this process's control groups where that is less; 0 where the system does not say."""
    return min(filter(None, (total_memory(), memory_limit())), default=0)


def cpu_quota(**where: Path) -> float | None:
    """CPUs that this process may use at a time by its control groups; None without a limit."""
    found = []
    for folder in _group_folders("cpu", **where):
        words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and all(map(str.isdigit, words)):  # not "max", nor -1
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _group_folders(
    controller: str, mounts: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[Path]:
    """Folders of the control groups that this process is in, and of those around them, which limit it as well."""
    for line in _lines(own):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not path or (controllers and controller not in controllers.split(",")):
            continue
        root = mounts / controller if controllers else mounts  # version 1 has a tree for each controller
        inner = root / path.strip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
