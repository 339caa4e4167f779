import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedpilot.data import Rows, encode
from fedpilot.data.vision import check_images, encode_images, normalisation, resized
from fedpilot.errors import DataError

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)


def grey(value: int) -> np.ndarray:
    return np.full((4, 6), value, dtype=np.uint8)


def test_pixels_are_normalised_by_hand() -> None:
    rows = Rows(np.array([1, 0]), images=np.stack([grey(255), grey(0)]))
    (batch,) = encode_images(rows, 3, mean=MEAN, std=STD).batches(2)
    assert batch["pixel_values"].shape == (2, 3, 3, 3)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"][0, :, 0, 0].tolist() == [1.0, 3.0, 1.0]
    assert batch["pixel_values"][1, :, 2, 2].tolist() == [-1.0, -1.0, 0.0]
    assert batch["labels"].tolist() == [1, 0]


def test_grey_images_are_stored_as_one_channel_of_bytes() -> None:
    data = encode_images(Rows(np.array([0, 1]), images=[grey(1), grey(2)]), 5, mean=MEAN, std=STD)
    assert data.store.pixels.shape == (2, 1, 5, 5)
    assert data.store.pixels.dtype == torch.uint8


def test_grey_and_coloured_images_go_together() -> None:
    red = np.zeros((4, 6, 3), dtype=np.uint8)
    red[..., 0] = 255
    data = encode_images(Rows(np.array([0, 1]), images=[grey(255), red]), 2, mean=(0, 0, 0), std=(1, 1, 1))
    (batch,) = data.batches(2)
    assert batch["pixel_values"][:, :, 0, 0].tolist() == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]


def test_every_image_comes_once_in_the_generators_order() -> None:
    rows = Rows(np.arange(10), images=[grey(value) for value in range(10)])
    data = encode_images(rows, 2, mean=(0, 0, 0), std=(1, 1, 1))
    batches = list(data.batches(4, torch.Generator().manual_seed(0)))
    labels = torch.cat([batch["labels"] for batch in batches])
    values = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in batches]) * 255
    assert sorted(labels.tolist()) == list(range(10))
    assert labels.tolist() != list(range(10))
    assert torch.equal(values.round().long(), labels)


def test_files_of_several_formats_are_read(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.gif"):
        Image.fromarray(np.zeros((5, 7, 3), dtype=np.uint8)).save(tmp_path / name)
        assert resized(tmp_path / name, 4).shape == (3, 4, 4)
    Image.new("RGBA", (5, 7)).save(tmp_path / "d.png")
    assert resized(tmp_path / "d.png", 4).shape == (3, 4, 4)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png must be a readable image"):
        resized(tmp_path / "broken.png", 4)
    with pytest.raises(DataError, match=r"got 2 that are not: .*missing\.png, .*broken\.png"):
        check_images([tmp_path / "missing.png", tmp_path / "broken.png"])


def test_normalisation_is_the_models_own(tmp_path: Path) -> None:
    config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert normalisation(tmp_path) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    rows = Rows(np.array([0]), images=grey(0)[None])
    data = encode(rows, task="image-classification", model=str(tmp_path), image_size=2)
    assert data.store.mean == (0.1, 0.2, 0.3)


def test_a_model_without_normalisation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must come with image_mean and image_std"):
        normalisation(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    with pytest.raises(DataError, match="must have three channels, got 1 and 1"):
        normalisation(tmp_path)


def test_images_need_a_size(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image_size must be at least 1 pixel"):
        encode(Rows(np.array([0]), images=grey(0)[None]), task="image-classification", model=str(tmp_path))
