"""Images to bytes of one size, with the model's own normalisation."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray

from fedpilot.data.encoded import EncodedDataset, ImageStore
from fedpilot.data.tables import AnyImage, Images, Rows
from fedpilot.errors import DataError

if TYPE_CHECKING:
    from PIL import Image  # an extra

Channels = tuple[float, float, float]


def normalisation(model: str | Path) -> tuple[Channels, Channels]:
    """Mean and standard deviation of the three channels, as the model's image processor names them.

    Raises:
        DataError: The folder or hub id has no ``preprocessor_config.json`` with both.
    """
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(str(model), "preprocessor_config.json")
        config = json.loads(Path(found).read_text())
        mean, std = (tuple(map(float, config[key])) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"model {str(model)!r} must come with image_mean and image_std in preprocessor_config.json, got: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if len(mean) != 3 or len(std) != 3:
        raise DataError(f"image_mean and image_std must have three channels, got {len(mean)} and {len(std)}")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def encode_images(
    rows: Rows, image_size: int, *, mean: Channels, std: Channels, name: str = "data set"
) -> EncodedDataset:
    """Resizes images once, to squares; normalisation waits for the batch so that bytes are what is stored.

    Args:
        rows: Images with classes.
        image_size: Height and width in pixels.
        mean: Of each channel, in 0..1.
        std: Of each channel, in 0..1.
        name: What the data set is called in messages.

    Raises:
        DataError: An image cannot be read.
    """
    arrays = [resized(image, image_size) for image in rows.images]
    if len({array.shape[0] for array in arrays}) > 1:
        arrays = [np.broadcast_to(array, (3, image_size, image_size)) for array in arrays]
    pixels = np.stack(arrays) if arrays else np.zeros((0, 1, image_size, image_size), np.uint8)
    store = ImageStore(torch.from_numpy(pixels), rows.labels, mean, std)
    ones = np.ones(len(rows), dtype=np.int64)
    return EncodedDataset(store, np.arange(len(rows)), rows.labels, ones, np.zeros(len(rows), dtype=np.bool_), name)


def resized(image: AnyImage, size: int) -> NDArray[np.uint8]:
    """An image as (1 or 3, size, size) bytes; one channel only where the image is grey.

    Raises:
        DataError: The file is missing or is no image.
    """
    require()
    from PIL import Image

    try:
        opened = opened_image(image)
        opened = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    except (OSError, ValueError, TypeError) as error:  # what is no image is an OSError too
        what = str(image) if isinstance(image, Path) else "an image of the table"
        raise DataError(f"{what} must be a readable image, got: {error}; replace the file or drop its row") from error
    array = np.asarray(opened.resize((size, size), Image.Resampling.BICUBIC))
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def require() -> None:
    """Says how to get the library that opens images.

    Raises:
        DataError: It is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"images must have Pillow, got: {error}; pip install 'fedpilot[vision]'") from error


def decoded(image: object) -> "TypeGuard[Image.Image]":
    """Whether it is an image that a library has decoded."""
    require()
    from PIL import Image

    return isinstance(image, Image.Image)


def opened_image(image: AnyImage) -> "Image.Image":
    """The image decoded, whatever it comes as."""
    from PIL import Image

    if isinstance(image, Path):
        with Image.open(image) as file:
            file.load()
            return file
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def check_images(images: Images) -> None:
    """Opens the head of each image file, so that a bad one is told before anything is trained.

    Raises:
        DataError: A file is missing or is no image; all of them are counted and the first few named.
    """
    require()
    bad = [image for image in images if isinstance(image, Path) and not _is_image(image)]
    if bad:
        named = ", ".join(str(path) for path in bad[:3])
        raise DataError(f"every image must be a readable file, got {len(bad)} that are not: {named}; drop their rows")


def _is_image(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as file:
            file.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True
