"""Texts to tokens for classification."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from fedpilot.data.encoded import EncodedDataset, TokenStore
from fedpilot.data.tables import Rows
from fedpilot.errors import DataError

CHUNK = 1024
"""Texts tokenised at a time."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    pad_token_id: int | None
    eos_token_id: int | None
    padding_side: str
    model_max_length: int

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, truncation: bool, max_length: int | None, verbose: bool
    ) -> dict[str, list[list[int]]]:
        """Tokens of each text under ``input_ids``."""


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder or hub id.

    Raises:
        DataError: There is none, or it cannot be reached.
    """
    from transformers import AutoTokenizer

    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(model))
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        if isinstance(error, OSError) and not Path(model).is_dir():
            raise DataError(
                f"model must be a packaged name, a folder or a hub id that can be reached, got {str(model)!r}; give "
                f"the path of a folder, which in a recipe is relative to the recipe's own [{first_line}]"
            ) from error
        raise DataError(f"model {str(model)!r} must come with a tokenizer, got: {first_line}") from error


def encode_text(
    rows: Rows, tokenizer: Tokenizer, *, max_length: int | None = None, name: str = "data set"
) -> EncodedDataset:
    """Tokenises texts once, cutting each to the longest input that the model takes.

    Args:
        rows: Texts with classes.
        tokenizer: The model's.
        max_length: Tokens of an example at most, special ones included; ``None`` for what the model takes.
        name: What the data set is called in messages.

    Raises:
        DataError: There are no texts, or ``max_length`` is more than the model takes.
    """
    longest = input_limit(tokenizer, max_length)
    sequences, truncated = tokenised(tokenizer, rows.texts, longest)
    tokens, offsets = flattened(sequences)
    store = TokenStore(tokens, offsets, rows.labels, pad_id(tokenizer), tokenizer.padding_side == "left")
    return EncodedDataset(store, np.arange(len(rows)), rows.labels, np.diff(offsets), truncated, name)


def tokenised(
    tokenizer: Tokenizer, texts: Sequence[str], longest: int, *, special: bool = True
) -> tuple[list[list[int]], NDArray[np.bool_]]:
    """Tokens of each text, at most ``longest``; and whether the text had more."""
    sequences: list[list[int]] = []
    truncated = np.zeros(len(texts), dtype=np.bool_)
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        whole = _tokens(tokenizer, chunk, special, None)
        over = [index for index, tokens in enumerate(whole) if len(tokens) > longest]
        # Cut by the tokenizer, which knows to keep its special tokens.
        cut = _tokens(tokenizer, [chunk[index] for index in over], special, longest)
        for index, tokens in zip(over, cut, strict=True):
            whole[index] = tokens
            truncated[start + index] = True
        sequences += whole
    return sequences, truncated


def flattened(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Sequences end to end, and where each starts, with the end."""
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
    return np.fromiter(itertools.chain.from_iterable(sequences), np.int32, int(offsets[-1])), offsets


def input_limit(tokenizer: Tokenizer, max_length: int | None) -> int:
    """Longest example in tokens.

    Raises:
        DataError: ``max_length`` is too small or more than the model takes, or none is given and the model names none.
    """
    # A tokenizer that knows of no limit says so with a number of thirty digits.
    limit = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    if max_length is None:
        if limit is None:
            raise DataError("max_length must be given for a model that names no longest input, got none")
        return limit
    if max_length < 4 or (limit is not None and max_length > limit):
        highest = "any number" if limit is None else f"{limit}, which is what the model takes"
        raise DataError(f"max_length must be from 4 to {highest}, got {max_length}")
    return max_length


def pad_id(tokenizer: Tokenizer) -> int:
    """Token that fills up: the padding token, else the end of text; it is masked in either case."""
    chosen = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if chosen is None else chosen


def _tokens(tokenizer: Tokenizer, texts: list[str], special: bool, longest: int | None) -> list[list[int]]:
    if not texts:
        return []
    cut = longest is not None
    return tokenizer(texts, add_special_tokens=special, truncation=cut, max_length=longest, verbose=False)["input_ids"]
