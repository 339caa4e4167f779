"""What a run is made of, and whether it is still the same."""

import importlib.metadata
import json
import logging
import platform
import subprocess
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from fedpilot.errors import RecordError

logger = logging.getLogger(__name__)

PACKAGES = ("fedpilot", "torch", "transformers", "peft", "numpy")


def manifest(config: Mapping[str, object], *, seed: int, dtype: str) -> dict[str, object]:
    """What a run is made of, for `RunDirectory.create` and `check_same_run`.

    Args:
        config: The resolved configuration; values that JSON does not know are written as text.
        seed: Of the whole run.
        dtype: Arithmetic of local training, as people call it.
    """
    return {
        "run_id": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "dtype": dtype,
        "num_threads": torch.get_num_threads(),
        "versions": package_versions(),
        **_commit(Path(__file__).parent),
        "config": as_json(config),
    }


def as_json(config: Mapping[str, object]) -> dict[str, object]:
    """A configuration as a manifest keeps it."""
    kept: dict[str, object] = json.loads(json.dumps(config, default=str))
    return kept


def package_versions() -> dict[str, str | None]:
    """Python and the packages that results may depend on -> version; null for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(package: Path) -> dict[str, object]:
    """Commit of the checkout that the package runs from and whether it was edited since; null when installed."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top) / "src" / "fedpilot" != package:  # a checkout of something else around us
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def differences(old: object, new: object, key: str = "") -> list[str]:
    """One line for each leaf that differs between two JSON values.

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4})
    ['a.b: 1 -> 3', 'c: 2 -> absent', 'd: absent -> 4']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{key}." if key else ""
        names = [*old, *(name for name in new if name not in old)]
        return [
            line
            for name in names
            for line in differences(old.get(name, "absent"), new.get(name, "absent"), prefix + name)
        ]
    return [] if old == new else [f"{key}: {old} -> {new}"]


def settled(old: object, new: object) -> object:
    """The new value with whatever it leaves to us, ``"auto"``, as it was decided in the old one.

    >>> settled({"workers": 2, "rounds": 3}, {"workers": "auto", "rounds": 4})
    {'workers': 2, 'rounds': 4}
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return {name: settled(old[name], value) if name in old else value for name, value in new.items()}
    return old if new == "auto" else new


def check_same_run(path: Path, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Refuses another configuration; another version or thread count is only said: it changes bits, not meaning.

    Args:
        path: The run directory, for the message.
        found: The manifest in it.
        expected: A manifest of now.

    Raises:
        RecordError: Seed, dtype or configuration differ; the message lists each key.
    """
    now = {key: settled(found.get(key), expected.get(key)) for key in ("seed", "dtype", "config")}
    lines = [line for key in now for line in differences(found.get(key), now[key], "" if key == "config" else key)]
    if lines:
        raise RecordError(
            f"configuration must be the one that {path} was started with, got other values for "
            f"{'; '.join(lines)}; put them back, or start a run in another directory"
        )
    for key in ("num_threads", "versions", "commit"):
        for line in differences(found.get(key), expected.get(key), key):
            logger.warning(
                "%s differs from the start of the run (%s): results may differ in their last bits", key, line
            )
