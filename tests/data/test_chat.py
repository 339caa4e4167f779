from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedpilot import data
from fedpilot.data import DataSettings, Rows
from fedpilot.data.chat import conversations, encode_chat
from fedpilot.data.tables import Conversation
from fedpilot.errors import DataError

CHATML = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }} {% endif %}{% endfor %}"
VOCABULARY = ["<pad>", "</s>", "<s>", ":", "user", "assistant", "system", *"abcdefgh"]


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    words = Words(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", chat_template=template
    )


def rows(*talks: Conversation) -> Rows:
    return Rows(np.zeros(len(talks), dtype=np.int64), conversations=talks)


def words(tokens: torch.Tensor) -> str:
    return " ".join("_" if token == -100 else VOCABULARY[token] for token in tokens.tolist())


TWO_TURNS: Conversation = (("system", "a"), ("user", "b c"), ("assistant", "d"), ("user", "e"), ("assistant", "f g"))
SHORT: Conversation = (("user", "h"), ("assistant", "a b"))


def test_only_what_the_assistant_says_and_what_ends_it_is_learnt() -> None:
    encoded = encode_chat(rows(TWO_TURNS, SHORT), tokenizer(), max_length=64)
    (batch,) = encoded.batches(2, None)
    longest, short = batch["input_ids"]
    assert words(longest) == (
        "<s> system : a </s> <s> user : b c </s> <s> assistant : d </s> <s> user : e </s> <s> assistant : f g </s>"
    )
    assert words(batch["labels"][0]) == f"{'_ ' * 14}d </s>{' _' * 8} f g </s>"
    assert words(short[:11]) == "<s> user : h </s> <s> assistant : a b </s>"
    assert words(batch["labels"][1][:11]) == f"{'_ ' * 8}a b </s>"
    assert set(batch["labels"][1][11:].tolist()) == {-100}
    assert encoded.report.num_truncated == 0


def test_what_is_written_is_what_the_template_writes() -> None:
    made = tokenizer()
    encoded = encode_chat(rows(TWO_TURNS), made, max_length=64)
    (batch,) = encoded.batches(1, None)
    messages = [{"role": role, "content": content} for role, content in TWO_TURNS]
    whole = made(made.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0].tolist() == whole


def test_a_conversation_that_is_too_long_loses_its_end_and_is_counted() -> None:
    encoded = encode_chat(rows(TWO_TURNS, SHORT), tokenizer(), max_length=16)
    assert encoded.lengths.tolist() == [16, 11]
    assert (encoded.report.num_truncated, encoded.report.longest) == (1, 16)


def test_a_conversation_that_would_lose_every_answer_is_refused_with_its_row() -> None:
    with pytest.raises(
        DataError, match=r"an answer in its first 12 tokens, got 1 of 2 that have none \(first: row 2\)"
    ):
        encode_chat(rows(SHORT, TWO_TURNS), tokenizer(), max_length=12, name="training data")


@pytest.mark.parametrize(("template", "message"), [(None, "must come with a chat template"), (FORGETFUL, "same way")])
def test_a_template_that_cannot_serve_is_refused(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_chat(rows(TWO_TURNS), tokenizer(template), max_length=64)


@pytest.mark.parametrize(
    "value",
    [
        "user: hello",
        [{"role": "user", "content": "a"}],
        [{"role": "assistant"}],
        [{"role": "assistant", "content": None}],
        ["assistant"],
        [],
    ],
)
def test_what_is_no_conversation_is_refused_with_its_row(value: object) -> None:
    good: list[Mapping[str, str]] = [{"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=r"column 'messages' of x\.jsonl must be a list of .* in row 2"):
        conversations([good, value], "messages", "x.jsonl")


def table(folder: Path) -> Path:
    path = folder / "qa.csv"
    path.write_text("question,answer,team\n" + "".join(f"a {w},b {w},{'xy'[n % 2]}\n" for n, w in enumerate("cdefgh")))
    return path


def test_two_columns_become_a_users_turn_and_the_assistants(tmp_path: Path) -> None:
    settings = DataSettings(
        str(table(tmp_path)),
        "causal-lm",
        text="answer",
        prompt="question",
        chat=True,
        columns=("team",),
        test_fraction=0.5,
    )
    loaded = data.load(settings)
    talks = {*loaded.train.conversations, *loaded.test.conversations}
    assert talks == {(("user", f"a {w}"), ("assistant", f"b {w}")) for w in "cdefgh"}
    half = loaded.train.take(np.array([2, 0]))
    assert half.conversations == [loaded.train.conversations[2], loaded.train.conversations[0]]
    assert half.columns["team"].tolist() == [loaded.train.columns["team"][2], loaded.train.columns["team"][0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat": True, "task": "sequence-classification"}, "chat must be left out for sequence-classification"),
        ({"messages": "answer", "task": "image-classification"}, "messages must be left out for image-classification"),
        ({"chat": True}, "chat must go with a prompt column"),
        ({"messages": "answer", "prompt": "question"}, "prompt must be left out beside messages"),
        ({"messages": "answer", "answers": ("yes", "no")}, "answers must be left out for chats"),
    ],
)
def test_settings_of_chats_that_contradict_each_other_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    settings = {"source": str(table(tmp_path)), "task": "causal-lm", "text": "answer", **changes}
    with pytest.raises(DataError, match=message):
        data.load(DataSettings(**settings))  # type: ignore[arg-type]
