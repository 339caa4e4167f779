"""What a machine has free, as a process on it finds out; imports nothing that takes time."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from fedpilot.errors import ClientError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
PR_SET_PDEATHSIG = 1


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that this process could still take: of the machine, of its control groups and of its own limit, the least.

    Raises:
        ClientError: The machine does not say.
    """
    free = [_kib(proc / "meminfo", "MemAvailable"), *_free_in_groups(proc, cgroups)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - _kib(proc / "self" / "status", "VmSize"))
    return max(0, min(free))


def follow_parent() -> None:
    """Ends this process when the one that started it ends, however that is: nothing is left behind by a kill."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before that was asked
        sys.exit(1)


def begun(number: int, proc: Path = PROC) -> int | None:
    """When a process began, in the kernel's ticks; ``None`` where there is none of that number, or a dead one."""
    found = _stat(proc / str(number) / "stat")
    return None if found is None or found[0] == "Z" else int(found[19])


def descendants(number: int, proc: Path = PROC) -> dict[int, int]:
    """Processes that a process started, and that those started: number -> when it began; empty without ``/proc``."""
    parents: dict[int, int] = {}
    for folder in proc.glob("[0-9]*"):
        found = _stat(folder / "stat")
        if found is not None:
            parents[int(folder.name)] = int(found[1])
    family, new = set[int](), {number}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - family
        family |= new
    return {child: when for child in family if (when := begun(child, proc)) is not None}


def _stat(file: Path) -> list[str] | None:
    """Fields of a process from its state on: what stands before is its name, which may hold anything."""
    try:
        return file.read_text().rpartition(")")[2].split()
    except OSError:
        return None


def oom_kills(proc: Path = PROC) -> int:
    """Processes that the kernel has killed for memory since it started, in whatever control group."""
    try:
        lines = (proc / "vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _kib(file: Path, name: str) -> int:
    """Bytes of a line such as ``MemAvailable:   1234 kB``."""
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise ClientError(f"free memory must be readable from {file}, got {error}; give --memory") from error
    for line in lines:
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ClientError(f"free memory must be readable from {file}, got no line {name}; give --memory")


def _free_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """What is left in each control group that holds this process and has a limit; file caches count as free."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = cgroups / "memory"
        else:
            continue
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group == root.parent:
                break
            found = _free_in(group, *names)
            if found is not None:
                yield found


def _free_in(group: Path, limit: str, used: str, cache: str) -> int | None:
    """Bytes left in a control group; ``None`` where it has no limit, or is not seen from here."""
    try:
        most = (group / limit).read_text().strip()
        taken = int((group / used).read_text())
        stat = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if most == "max" or int(most) >= 2**60:  # the older kind writes a very large number for none
        return None
    cached = next((int(line.split()[1]) for line in stat if line.split()[0] == cache), 0)
    return int(most) - taken + cached
