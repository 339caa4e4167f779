import pytest

from fedpilot.data.language_modelling import encode_lm
from fedpilot.errors import DataError
from tests.data.words import END, Words, rows

A, B, C, D = 10, 11, 12, 13


def test_without_prompts_every_token_is_asked_for() -> None:
    (batch,) = encode_lm(rows("a b", "c"), Words()).batches(2)
    assert batch["input_ids"].tolist() == [[A, B, END], [C, END, 0]]
    assert batch["labels"].tolist() == [[A, B, END], [C, END, -100]]


def test_the_loss_does_not_ask_for_prompt_and_padding() -> None:
    data = encode_lm(rows("c", "d", prompts=("a b", "a")), Words(), prompt_template="{prompt} ")
    (batch,) = data.batches(2)
    assert batch["input_ids"].tolist() == [[A, B, C, END], [A, D, END, 0]]
    assert batch["labels"].tolist() == [[-100, -100, C, END], [-100, D, END, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_the_template_frames_the_prompt() -> None:
    data = encode_lm(rows("c", prompts=("a",)), Words(), prompt_template="b {prompt} d ")
    assert next(data.batches(1))["input_ids"].tolist() == [[B, A, D, C, END]]


def test_a_long_prompt_loses_its_end_before_the_text_does() -> None:
    data = encode_lm(rows("c c", prompts=("a a a a b",)), Words(), max_length=6, prompt_template="{prompt} d")
    assert next(data.batches(1))["input_ids"].tolist() == [[A, A, D, C, C, END]]
    assert data.truncated.tolist() == [True]


def test_a_text_that_fills_all_leaves_no_room_for_its_prompt() -> None:
    data = encode_lm(rows("c c c c c c", prompts=("a",)), Words(), max_length=5, prompt_template="{prompt} d")
    assert next(data.batches(1))["input_ids"].tolist() == [[C, C, C, C, END]]
    assert data.report.num_truncated == 1


def test_what_fits_exactly_is_not_counted_as_truncated() -> None:
    data = encode_lm(rows("c", prompts=("a a",)), Words(), max_length=4, prompt_template="{prompt}")
    assert data.report.num_truncated == 0


def test_a_template_without_a_place_for_the_prompt_is_refused() -> None:
    with pytest.raises(DataError, match=r"must contain \{prompt\}, got 'Title:'"):
        encode_lm(rows("c", prompts=("a",)), Words(), prompt_template="Title:")


def test_a_single_token_an_example_is_not_taken_for_a_class() -> None:
    tokenizer = Words()
    tokenizer.eos_token_id = None
    (batch,) = encode_lm(rows("a", "b"), tokenizer).batches(2)
    assert batch["labels"].tolist() == [[A], [B]]


# --- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_only_token_asked_for_and_nothing_follows_it() -> None:
    data = encode_lm(rows("c", "d", prompts=("a b", "a")), Words(), prompt_template="{prompt} ", answers=("d", "c"))
    (batch,) = data.batches(2)
    assert batch["input_ids"].tolist() == [[A, B, C], [A, D, 0]]
    assert batch["labels"].tolist() == [[-100, -100, C], [-100, D, -100]]
    assert data.answers == (D, C)
    assert data.subset([1]).answers == (D, C)


def test_an_answer_of_two_tokens_is_refused_and_so_is_a_text_that_is_none() -> None:
    with pytest.raises(DataError, match="must be one token each and differ, got a b"):
        encode_lm(rows("c"), Words(), answers=("a b", "c"))
    with pytest.raises(DataError, match="must be one token each and differ, got c, c"):
        encode_lm(rows("c"), Words(), answers=("c", "c"))
    with pytest.raises(DataError, match=r"must be an answer \(a, b\), got 'c'"):
        encode_lm(rows("a", "c"), Words(), answers=("a", "b"))
