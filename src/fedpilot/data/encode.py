"""Rows to an encoded data set, whatever the task."""

import logging

from fedpilot.data.chat import encode_chat
from fedpilot.data.encoded import EncodedDataset
from fedpilot.data.language_modelling import encode_lm
from fedpilot.data.tables import Rows, TaskType
from fedpilot.data.text import encode_text, load_tokenizer
from fedpilot.data.vision import encode_images, normalisation
from fedpilot.errors import DataError

logger = logging.getLogger(__name__)


def encode(
    rows: Rows,
    *,
    task: TaskType,
    model: str,
    max_length: int | None = None,
    image_size: int | None = None,
    name: str = "data set",
    answers: tuple[str, ...] = (),
) -> EncodedDataset:
    """Encodes rows as the model wants them.

    Args:
        rows: Texts or images.
        task: What the model is trained for.
        model: Folder or hub id whose tokenizer or image normalisation is used.
        max_length: Tokens of an example at most; ``None`` for what the model takes.
        image_size: Height and width of images in pixels; needed for images.
        name: What the data set is called in messages.
        answers: Texts that stand for the classes, for a language model that chooses among them.

    Raises:
        DataError: The model has no tokenizer or normalisation, or the rows do not suit the task.
    """
    if task == "image-classification":
        if image_size is None or image_size < 1:
            raise DataError(f"image_size must be at least 1 pixel for images, got {image_size}")
        mean, std = normalisation(model)
        return encode_images(rows, image_size, mean=mean, std=std, name=name)
    tokenizer = load_tokenizer(model)
    if len(rows.conversations):
        dataset = encode_chat(rows, tokenizer, max_length=max_length, name=name)
    elif task == "causal-lm":
        dataset = encode_lm(rows, tokenizer, max_length=max_length, name=name, answers=answers)
    else:
        dataset = encode_text(rows, tokenizer, max_length=max_length, name=name)
    if dataset.report.num_truncated:
        logger.warning("%s: %s", name, dataset.report)
    return dataset
