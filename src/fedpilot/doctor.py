"""What is wrong with a machine before a run finds out: versions, memory, disk, the cache, the GPU, threads."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

SCARCE_MEMORY, SCARCE_DISK = 2 * 2**30, 2 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Of what.
        state: ``problem`` keeps a run or a node from working; ``warning`` may.
        said: What was found.
        advice: What to do.
    """

    what: str
    state: Literal["ok", "warning", "problem"]
    said: str
    advice: str = ""


def package_version(name: str) -> str | None:
    """Of an installed package; ``None`` where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine(folder: Path) -> Iterator[Finding]:
    """What can be said of this machine without a network.

    Args:
        folder: Where runs or a node's files will be.
    """
    yield python()
    yield from packages()
    yield memory()
    yield disk(folder)
    yield cache()
    yield from devices()
    yield threads()


def python() -> Finding:
    """The interpreter."""
    here = ".".join(map(str, sys.version_info[:3]))
    wanted = importlib.metadata.metadata("fedpilot")["Requires-Python"]
    fits = Requirement(f"python{wanted}").specifier.contains(here)
    advice = "" if fits else f"install one that is {wanted}"
    return Finding("python", "ok" if fits else "problem", f"{here} at {sys.executable}", advice)


def packages() -> Iterator[Finding]:
    """What fedpilot needs, in the versions that it was tested with."""
    found: list[str] = []
    for text in importlib.metadata.requires("fedpilot") or ():
        need = Requirement(text)
        optional = need.marker is not None and not need.marker.evaluate({"extra": ""})
        if need.marker is not None and not need.marker.evaluate({"extra": "flower"}):
            continue
        here = package_version(need.name)
        if here is None and not optional:
            yield Finding(need.name, "problem", "not installed", f"pip install '{need.name}{need.specifier}'")
        elif here is not None and not need.specifier.contains(here, prereleases=True):
            wanted = f"{need.name}{need.specifier}"
            yield Finding(need.name, "problem", f"{here}, fedpilot needs {need.specifier}", f"pip install '{wanted}'")
        elif here is not None:
            found.append(f"{need.name} {here}")
    flower = package_version("flwr")
    if flower is None:
        yield Finding("flwr", "warning", "not installed", "pip install 'fedpilot[flower]' to serve or to join")
    else:
        found.append(f"flwr {flower}")  # also where the installed package's own list is older than the sources
    yield Finding("packages", "ok", ", ".join([f"fedpilot {package_version('fedpilot')}", *dict.fromkeys(found)]))


def memory() -> Finding:
    """What a process here can still take."""
    from fedpilot.display import size
    from fedpilot.engines.flower import machine

    free = machine.free_memory()
    if free < SCARCE_MEMORY:
        return Finding("memory", "warning", f"{size(free)} free", "end other programs, or take a smaller model")
    return Finding("memory", "ok", f"{size(free)} free")


def disk(folder: Path) -> Finding:
    """Room for runs and checkpoints."""
    from fedpilot.display import size

    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding("disk", "problem", f"{there} cannot be written", "choose another folder")
    if free < SCARCE_DISK:
        return Finding("disk", "warning", f"{size(free)} free at {there}", "free space: a run stops on a full disk")
    return Finding("disk", "ok", f"{size(free)} free at {there}")


def cache() -> Finding:
    """The packaged models and data that are there."""
    from fedpilot import assets

    try:
        folder = assets.cache_folder()
    except OSError as error:
        return Finding("cache", "problem", f"cannot be made: {error}", "set FEDPILOT_CACHE to a folder of yours")
    if not os.access(folder, os.W_OK):
        return Finding("cache", "problem", f"{folder} cannot be written", "set FEDPILOT_CACHE to a folder of yours")
    there = sorted(name for name in assets.ASSETS if (folder / name).is_dir())
    if not there:
        return Finding("cache", "ok", f"{folder} is empty", "fedpilot assets --list says what can be fetched")
    return Finding("cache", "ok", f"{folder} has {', '.join(there)}")


def devices() -> Iterator[Finding]:
    """GPUs as torch sees them."""
    import torch

    from fedpilot.display import size

    if not torch.cuda.is_available():
        yield Finding("gpu", "ok", "none: clients train on the CPU")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        kind = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        said = f"{torch.cuda.get_device_name(index)}, {size(free)} of {size(total)} free, {kind}"
        yield Finding("gpu", "ok", said)


def threads() -> Finding:
    """Threads of a matrix product and cores for them."""
    import torch

    used, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    said = f"{used} of torch's for {cores} cores, {os.getloadavg()[0]:.1f} busy"
    if used > cores:
        return Finding("threads", "warning", said, f"set OMP_NUM_THREADS to at most {cores}")
    return Finding("threads", "ok", said)
