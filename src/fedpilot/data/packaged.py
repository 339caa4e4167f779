"""Readers of the packaged data sets: what each package holds, as columns."""

import gzip
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpilot import assets

Column: TypeAlias = Sequence[object] | NDArray[np.uint8]
Columns: TypeAlias = Mapping[str, Column]
"""A table by columns, all equally long."""


@dataclass(frozen=True)
class Raw:
    """A source as it was read, before anything is checked, chosen or split.

    Attributes:
        train: Its rows.
        test: Rows that the source itself sets aside; ``None`` when it does not.
        label_names: Its own order of classes; ``None`` for sorted names.
        keep: Columns that are kept without being asked for.
        folder: What paths of images are relative to.
        validation: Rows that the source itself sets aside for choosing settings; ``None`` when it does not.
    """

    train: Columns
    test: Columns | None = None
    label_names: tuple[str, ...] | None = None
    keep: tuple[str, ...] = ()
    folder: Path = Path()
    validation: Columns | None = None


_VADER_DOMAINS = {
    "amazon": "amazonReviewSnippets",
    "movie": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
VADER_NEUTRAL = 0.5
"""Mean ratings up to this far from zero are neither negative nor positive."""

_FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def vader() -> Raw:
    """Sentences of four domains with the sign of their mean human rating; neutral ones and repeated texts left out."""
    columns: dict[str, list[object]] = {"text": [], "label": [], "domain": []}
    seen: set[str] = set()
    with tarfile.open(assets.folder("vader") / "hutto_ICWSM_2014.tar.gz") as archive:
        for domain, stem in _VADER_DOMAINS.items():
            stream = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert stream is not None, "the archive's SHA-256 was checked"
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                _, rating, text = line.rstrip("\r\n").split("\t", 2)
                if abs(float(rating)) <= VADER_NEUTRAL or text in seen:
                    continue
                seen.add(text)
                columns["text"].append(text)
                columns["label"].append("positive" if float(rating) > 0 else "negative")
                columns["domain"].append(domain)
    return Raw(columns, keep=("domain",))


def bbc() -> Raw:
    """News articles with their topic; ``text`` is headline and body, which are columns of their own too."""
    columns: dict[str, list[object]] = {"text": [], "label": [], "headline": [], "body": []}
    seen: set[str] = set()
    root = assets.folder("bbc")
    for path in sorted(root.glob("*/*.txt")):
        text = _decoded(path.read_bytes()).strip()
        if text in seen:
            continue
        seen.add(text)
        headline, _, body = text.partition("\n")
        columns["text"].append(text)
        columns["label"].append(path.parent.name)
        columns["headline"].append(headline.strip())
        columns["body"].append(body.strip())
    return Raw(columns)


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        # One article of 2,225 has its pound sign in Latin-1.
        return raw.decode("latin-1")


def fashion_mnist() -> Raw:
    """The 60,000 training and 10,000 test images of 28 x 28."""
    root = assets.folder("fashion-mnist")

    def part(stem: str) -> Columns:
        labels = idx(root / f"{stem}-labels-idx1-ubyte.gz")
        return {"image": idx(root / f"{stem}-images-idx3-ubyte.gz"), "label": [_FASHION_CLASSES[i] for i in labels]}

    return Raw(part("train"), part("t10k"), label_names=_FASHION_CLASSES)


FASHION_DOMAINS: Mapping[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "upright": lambda image: image,
    "inverted": lambda image: 255 - image,
    "turned": lambda image: np.rot90(image),
    "turned inverted": lambda image: 255 - np.rot90(image),
}


def fashion_mnist_domains() -> Raw:
    """Fashion-MNIST with every image in one of four domains, drawn once and for all; column ``domain``."""
    plain = fashion_mnist()
    assert plain.test is not None, "it has a test set"
    train, test = (
        _in_domains(columns, np.random.default_rng(seed)) for seed, columns in enumerate((plain.train, plain.test))
    )
    return Raw(train, test, label_names=plain.label_names, keep=("domain",))


def _in_domains(columns: Columns, rng: np.random.Generator) -> Columns:
    images, names = np.array(columns["image"], dtype=np.uint8), list(FASHION_DOMAINS)
    drawn = [names[index] for index in rng.integers(len(names), size=len(images))]
    changed = np.stack([FASHION_DOMAINS[name](image) for name, image in zip(drawn, images, strict=True)])
    return {**columns, "image": changed, "domain": drawn}


def optdigits() -> Raw:
    """The 1,797 digits of 8 x 8 that come with scikit-learn, their 17 grey levels spread over 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Raw({"image": images, "label": [str(label) for label in digits.target]})


def idx(path: Path) -> NDArray[np.uint8]:
    """Array of a gzipped file in MNIST's format: two zeros, a type, the number of axes, their sizes, the bytes."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", axes, offset=4))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


PACKAGED: dict[str, Callable[[], Raw]] = {
    "bbc": bbc,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-domains": fashion_mnist_domains,
    "optdigits": optdigits,
    "vader": vader,
}
"""Name of a source -> its reader."""
