import pytest
import torch

from fedpilot import assets
from fedpilot.data import encode
from fedpilot.data.text import CHUNK, encode_text, load_tokenizer
from fedpilot.errors import DataError
from tests.data.words import END, START, Words, rows


def test_texts_become_tokens_with_their_classes() -> None:
    data = encode_text(rows("b a", "c"), Words())
    (batch,) = data.batches(2)
    assert batch["input_ids"].tolist() == [[START, 11, 10, END], [START, 12, END, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_a_text_that_is_too_long_is_cut_and_counted() -> None:
    data = encode_text(rows("a b c d e", "a b", "a b c"), Words(), max_length=5)
    assert data.lengths.tolist() == [5, 4, 5]
    assert data.truncated.tolist() == [True, False, False]
    assert data.report.num_truncated == 1
    assert "1 truncated (33.3%)" in str(data.report)
    assert next(data.subset([0]).batches(1))["input_ids"].tolist() == [[START, 10, 11, 12, END]]


def test_truncation_is_counted_across_chunks() -> None:
    texts = ["a"] * CHUNK + ["a b c d"]
    data = encode_text(rows(*texts), Words(), max_length=4)
    assert data.truncated.nonzero()[0].tolist() == [CHUNK]


def test_the_longest_input_is_the_models_unless_it_is_given() -> None:
    long = "a " * 30
    assert encode_text(rows(long), Words(limit=12)).longest == 12
    with pytest.raises(DataError, match="max_length must be from 4 to 12, which is what the model takes, got 13"):
        encode_text(rows(long), Words(limit=12), max_length=13)
    with pytest.raises(DataError, match="max_length must be from 4"):
        encode_text(rows(long), Words(limit=12), max_length=3)
    with pytest.raises(DataError, match="max_length must be given"):
        encode_text(rows(long), Words(limit=10**30))
    assert encode_text(rows(long), Words(limit=10**30), max_length=20).longest == 20


def test_a_tokenizer_without_a_padding_token_pads_with_its_end() -> None:
    (batch,) = encode_text(rows("a b", "c"), Words(pad=None)).batches(2)
    assert batch["input_ids"][1].tolist() == [START, 12, END, END]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0]


def test_an_empty_table_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="client 3 must hold at least one example"):
        encode_text(rows(), Words(), name="client 3")


def test_a_real_tokenizer_gives_what_transformers_gives(caplog: pytest.LogCaptureFixture) -> None:
    folder = assets.resolve("minilm-l6")
    texts = ["A man is eating food.", "Unbelievably long-winded prose, again and again!", "No"]
    data = encode(rows(*texts), task="sequence-classification", model=folder, max_length=10, name="sample")
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(folder)(
        [texts[1], texts[0], texts[2]], padding=True, truncation=True, max_length=10, return_tensors="pt"
    )
    (batch,) = data.batches(3)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert "sample: 3 examples" in caplog.text
    assert "1 truncated (33.3%)" in caplog.text


def test_a_model_without_a_tokenizer_is_refused(tmp_path: pytest.TempPathFactory) -> None:
    with pytest.raises(DataError, match="must come with a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_model_that_is_nowhere_is_told_where_folders_are_looked_for() -> None:
    with pytest.raises(DataError, match=r"got 'my-model'; give the path of a folder, which in a recipe is relative"):
        load_tokenizer("my-model")
