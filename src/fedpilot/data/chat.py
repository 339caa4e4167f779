"""Conversations to tokens by the model's own chat template, with targets in the assistant's turns alone."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, cast

import numpy as np

from fedpilot.data.encoded import EncodedDataset, TokenStore
from fedpilot.data.tables import Conversation, Rows
from fedpilot.data.text import Tokenizer, flattened, input_limit, pad_id, tokenised
from fedpilot.errors import DataError

NO_LIMIT = 10**9
ASSISTANT = "assistant"

Piece: TypeAlias = tuple[str, bool]
"""A stretch of the written conversation, and whether the model is to learn it."""


class _Template(Protocol):
    """The part of a tokenizer that writes conversations."""

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The conversation as text."""


def conversations(values: Sequence[object], name: str, source: str) -> list[Conversation]:
    """Checked conversations of a column.

    Args:
        values: Lists of messages ``{"role": ..., "content": ...}``.
        name: The column, for messages.
        source: Its table, for messages.

    Raises:
        DataError: A row is no such list, or has nothing that an assistant says.
    """
    found: list[Conversation] = []
    for number, value in enumerate(values, start=1):
        turns = _turns(value)
        if turns is None or not any(role == ASSISTANT for role, _ in turns):
            rule = 'must be a list of {"role", "content"} with a turn of the assistant'
            raise DataError(f"column {name!r} of {source} {rule}, got {str(value)[:80]!r} in row {number}")
        found.append(turns)
    return found


def _turns(value: object) -> Conversation | None:
    if not isinstance(value, list):
        return None
    turns: list[tuple[str, str]] = []
    for message in value:
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, Mapping) else (0, 0)
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        turns.append((role, content))
    return tuple(turns)


def encode_chat(
    rows: Rows, tokenizer: Tokenizer, *, max_length: int | None = None, name: str = "data set"
) -> EncodedDataset:
    """Tokens of each conversation, cut at its end; the loss asks for what the assistant says and what ends its turns.

    Args:
        rows: With conversations.
        tokenizer: The model's, with a chat template.
        max_length: Tokens of a conversation at most; ``None`` for what the model takes.
        name: What the data set is called in messages.

    Raises:
        DataError: There is no template, or one that cannot be split into turns; or a cut conversation has no answer.
    """
    longest = input_limit(tokenizer, max_length)
    written = [_pieces(conversation, cast(_Template, tokenizer)) for conversation in rows.conversations]
    spoken = tokenised(tokenizer, [text for pieces in written for text, _ in pieces], NO_LIMIT, special=False)[0]
    stream = iter(spoken)
    sequences, targets = [], []
    for pieces in written:
        parts = [(next(stream), learnt) for _, learnt in pieces]
        sequences.append([token for part, _ in parts for token in part])
        targets.append([t if learnt else TokenStore.IGNORED for part, learnt in parts for t in part])
    cut = np.array([len(sequence) > longest for sequence in sequences], dtype=np.bool_)
    targets = [target[:longest] for target in targets]
    mute = [number for number, target in enumerate(targets, 1) if set(target) <= {TokenStore.IGNORED}]
    if mute:
        what = f"{len(mute)} of {len(targets)} that have none (first: row {mute[0]})"
        raise DataError(
            f"every conversation of {name} must have an answer in its first {longest} tokens, got {what}; "
            "raise max_length or remove them"
        )
    tokens, offsets = flattened([sequence[:longest] for sequence in sequences])
    store = TokenStore(tokens, offsets, rows.labels, pad_id(tokenizer), targets=flattened(targets)[0])
    return EncodedDataset(store, np.arange(len(rows)), rows.labels, np.diff(offsets), cut, name)


def _pieces(conversation: Conversation, tokenizer: _Template) -> list[Piece]:
    """The written conversation, cut before and behind every turn of the assistant."""
    messages = [{"role": role, "content": content} for role, content in conversation]
    pieces: list[Piece] = []
    before = ""
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        asked = _written(tokenizer, messages[:index], asking=True)
        said = _written(tokenizer, messages[: index + 1], asking=False)
        if not asked.startswith(before) or not said.startswith(asked):
            raise DataError(
                "the model's chat template must write a turn the same way whatever follows it, got one that does not; "
                "give single turns, or columns prompt and text without chat"
            )
        pieces += [(asked.removeprefix(before), False), (said.removeprefix(asked), True)]
        before = said
    return [piece for piece in pieces if piece[0]]


def _written(tokenizer: _Template, messages: Sequence[Mapping[str, str]], *, asking: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
    except Exception as error:  # a template is a program, and raises what it likes
        raise DataError(
            f"the model must come with a chat template that takes the data's turns, got: "
            f"{str(error).strip().splitlines()[0]}; take a model with one, or leave chat and messages out"
        ) from error
