"""Texts to tokens with a target for each, for causal language models."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpilot.data.encoded import EncodedDataset, TokenStore
from fedpilot.data.tables import Rows
from fedpilot.data.text import Tokenizer, flattened, input_limit, pad_id, tokenised
from fedpilot.errors import DataError

PROMPT_TEMPLATE = "{prompt}\n\n"
NO_LIMIT = 10**9


def encode_lm(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    prompt_template: str = PROMPT_TEMPLATE,
    name: str = "data set",
    answers: Sequence[str] = (),
) -> EncodedDataset:
    """Prompt, text and end-of-text token as one sequence; the loss asks for the text and its end.

    Prompt and text are tokenised apart, so that the border between them does not depend on what stands around it. A
    sequence that is too long loses the end of its prompt first, then the end of its text.

    Args:
        rows: Texts, with prompts or without.
        tokenizer: The model's.
        max_length: Tokens of a sequence at most; ``None`` for what the model takes.
        prompt_template: How a prompt is put, with ``{prompt}`` in it.
        name: What the data set is called in messages.
        answers: Texts that stand for the classes, where the model is to choose among them; such a text is one token,
            and none follows it.

    Raises:
        DataError: As :func:`fedpilot.data.text.encode_text`; or an answer is not one token, or a text no answer.
    """
    longest = input_limit(tokenizer, max_length)
    chosen = _answer_tokens(answers, rows.texts, tokenizer, name)
    end = [] if tokenizer.eos_token_id is None or chosen else [tokenizer.eos_token_id]
    texts, truncated = tokenised(tokenizer, rows.texts, longest - len(end), special=False)
    texts = [text + end for text in texts]
    rooms = [longest - len(text) for text in texts]
    prompts, cut = _prompts(rows.prompts, tokenizer, prompt_template, rooms)
    tokens, offsets = flattened([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    ignored = [[TokenStore.IGNORED] * len(prompt) for prompt in prompts]
    targets, _ = flattened([before + text for before, text in zip(ignored, texts, strict=True)])
    store = TokenStore(tokens, offsets, rows.labels, pad_id(tokenizer), targets=targets)
    return EncodedDataset(store, np.arange(len(rows)), rows.labels, np.diff(offsets), truncated | cut, name, chosen)


def _answer_tokens(answers: Sequence[str], texts: Sequence[str], tokenizer: Tokenizer, name: str) -> tuple[int, ...]:
    if not answers:
        return ()
    found, _ = tokenised(tokenizer, answers, NO_LIMIT, special=False)
    wrong = [answer for answer, tokens in zip(answers, found, strict=True) if len(tokens) != 1]
    if wrong or len({tokens[0] for tokens in found}) != len(found):
        raise DataError(f"answers must be one token each and differ, got {', '.join(wrong or answers)}; choose others")
    if strangers := sorted(set(texts) - set(answers)):
        raise DataError(f"every text of {name} must be an answer ({', '.join(answers)}), got {strangers[0]!r}")
    return tuple(tokens[0] for tokens in found)


def _prompts(
    prompts: Sequence[str], tokenizer: Tokenizer, template: str, rooms: list[int]
) -> tuple[list[list[int]], NDArray[np.bool_]]:
    """Tokens of each prompt within its room, and whether it was cut; the template's frame is cut last."""
    if not len(prompts):
        return [[] for _ in rooms], np.zeros(len(rooms), dtype=np.bool_)
    before, after = (tokenised(tokenizer, [part], NO_LIMIT, special=False)[0][0] for part in _frame(template))
    bodies, _ = tokenised(tokenizer, prompts, NO_LIMIT, special=False)
    cut = np.array([len(before) + len(body) + len(after) > room for body, room in zip(bodies, rooms, strict=True)])
    spare = [max(0, room - len(before) - len(after)) for room in rooms]
    framed = [before + body[:size] + after for body, size in zip(bodies, spare, strict=True)]
    return [prompt[:room] for prompt, room in zip(framed, rooms, strict=True)], cut


def _frame(template: str) -> tuple[str, str]:
    before, mark, after = template.partition("{prompt}")
    if not mark:
        raise DataError(f"prompt template must contain {{prompt}}, got {template!r}")
    return before, after
