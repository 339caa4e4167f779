from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpilot.data.encoded import POOL_BATCHES, EncodedDataset, TokenStore, few_widths
from fedpilot.errors import DataError


def dataset_of(lengths: list[int], *, left: bool = False) -> EncodedDataset:
    """Example k is its number, ``lengths[k]`` times, counted from 1 so that padding (0) differs."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)
    labels = np.arange(len(lengths), dtype=np.int64) % 3
    store = TokenStore(tokens, offsets, labels, pad_id=0, left=left)
    return EncodedDataset(store, np.arange(len(lengths)), labels, np.array(lengths), np.zeros(len(lengths), dtype=bool))


def content(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Each example's tokens without its padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=60)


@given(lengths=LENGTHS, batch_size=st.integers(1, 7), seed=st.none() | st.integers(0, 99), left=st.booleans())
@settings(deadline=None, max_examples=60)
def test_each_example_comes_once_and_padding_changes_nothing(
    lengths: list[int], batch_size: int, seed: int | None, left: bool
) -> None:
    data = dataset_of(lengths, left=left)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(data.batches(batch_size, generator))
    seen = [example for batch in batches for example in content(batch)]
    assert sorted(seen) == [[number] * length for number, length in enumerate(lengths, start=1)]
    for batch in batches:
        assert len(batch["input_ids"]) <= batch_size
        assert batch["input_ids"][batch["attention_mask"] == 0].eq(0).all()
        assert batch["input_ids"].shape[1] == max(map(len, content(batch)))
        assert batch["labels"].tolist() == [(example[0] - 1) % 3 for example in content(batch)]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_only_one_batch_is_smaller_than_asked_for(lengths: list[int], seed: int) -> None:
    sizes = [len(batch["labels"]) for batch in dataset_of(lengths).batches(4, torch.Generator().manual_seed(seed))]
    assert len(sizes) == -(-len(lengths) // 4)
    assert sum(size < 4 for size in sizes) <= 1


def test_a_batch_is_padded_by_hand() -> None:
    (batch,) = dataset_of([2, 3, 1]).batches(4)
    assert batch["input_ids"].tolist() == [[2, 2, 2], [1, 1, 0], [3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0, 2]


def test_padding_can_stand_before_the_tokens() -> None:
    (batch,) = dataset_of([2, 3], left=True).batches(2)
    assert batch["input_ids"].tolist() == [[2, 2, 2], [0, 1, 1]]


def test_batches_can_be_padded_to_one_length() -> None:
    widths = {batch["input_ids"].shape[1] for batch in dataset_of([2, 3, 1]).batches(1, pad_to=5)}
    assert widths == {5}
    with pytest.raises(DataError, match="pad_to must be at least 3"):
        next(dataset_of([2, 3, 1]).batches(1, pad_to=2))


@given(longest=st.integers(1, 3000))
@settings(deadline=None)
def test_a_few_widths_hold_every_length_with_less_than_an_eighth_more(longest: int) -> None:
    widths = few_widths(longest)
    assert list(widths) == sorted(set(widths))
    assert widths[-1] == longest
    assert len(widths) <= 8 + 8 * max(0, longest.bit_length() - 3)
    for length in range(1, longest + 1):
        assert length <= min(width for width in widths if width >= length) < 1.125 * length + 1e-9


@given(lengths=LENGTHS, batch_size=st.integers(1, 7), seed=st.none() | st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_batches_of_few_widths_hold_the_same_examples_in_the_same_order(
    lengths: list[int], batch_size: int, seed: int | None
) -> None:
    free = dataset_of(lengths)
    bound = replace(free, widths=(2, 5, 9))

    def batches(data: EncodedDataset) -> list[dict[str, torch.Tensor]]:
        order = None if seed is None else torch.Generator().manual_seed(seed)
        return list(data.subset(range(len(lengths))).batches(batch_size, order))

    for one, other in zip(batches(free), batches(bound), strict=True):
        assert content(one) == content(other)
        assert other["input_ids"].shape[1] == min(w for w in (2, 5, 9) if w >= one["input_ids"].shape[1])
    assert {batch["input_ids"].shape[1] for batch in bound.batches(3, pad_to=12)} == {12}


def test_the_order_follows_from_the_generator_alone() -> None:
    data = dataset_of([1 + index % 5 for index in range(40)])

    def order(seed: int) -> list[int]:
        return [e[0] for b in data.batches(4, torch.Generator().manual_seed(seed)) for e in content(b)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_two_epochs_of_one_generator_differ() -> None:
    data, generator = dataset_of([1] * 20), torch.Generator().manual_seed(0)
    first, second = (
        [e[0] for b in data.batches(4, generator) for e in content(b)],
        [e[0] for b in data.batches(4, generator) for e in content(b)],
    )
    assert sorted(first) == sorted(second)
    assert first != second


def test_bucketing_saves_padding_and_still_mixes() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 4 * POOL_BATCHES * 3).tolist()
    data = dataset_of(lengths)
    sizes = [batch["input_ids"].numel() for batch in data.batches(4, torch.Generator().manual_seed(0))]
    order = np.random.default_rng(1).permutation(len(lengths)).reshape(-1, 4)
    unsorted = sum(4 * max(lengths[index] for index in batch) for batch in order)
    assert sum(sizes) < 1.15 * sum(lengths)
    assert unsorted > 1.4 * sum(lengths)
    widths = [size // 4 for size in sizes]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)


def test_evaluation_starts_with_the_longest() -> None:
    widths = [batch["input_ids"].shape[1] for batch in dataset_of([2, 7, 1, 5]).batches(1)]
    assert widths == [7, 5, 2, 1]


def test_an_epoch_can_be_cut_short() -> None:
    assert len(list(dataset_of([1] * 10).batches(3, max_batches=2))) == 2
    assert len(list(dataset_of([1] * 10).batches(3, max_batches=9))) == 4


def test_a_subset_keeps_order_names_itself_and_shares_memory() -> None:
    data = dataset_of([2, 3, 1, 4])
    client = data.subset([3, 0], name="client 7")
    assert client.store is data.store
    assert client.labels.tolist() == [0, 0]
    assert client.lengths.tolist() == [4, 2]
    assert content(next(client.batches(5))) == [[4] * 4, [1] * 2]
    assert content(next(client.subset([1]).batches(5))) == [[1] * 2]


def test_an_empty_client_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="client 7 must hold at least one example, got none"):
        dataset_of([2, 3]).subset([], name="client 7")


def test_positions_outside_are_refused() -> None:
    with pytest.raises(DataError, match="must be from 0 to 1, got 1 to 2"):
        dataset_of([2, 3]).subset([1, 2])


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        next(dataset_of([1]).batches(0))


def test_the_report_counts() -> None:
    data = dataset_of([2, 3, 1])
    assert str(data.report) == "3 examples, 2.0 tokens on average and 3 at most; 0 truncated (0.0%)"


def test_side_columns_follow_their_examples_through_subsets_and_orders() -> None:
    """Example k's column says k, as its tokens do."""
    column = torch.arange(1, 9).float().unsqueeze(1) * torch.ones(8, 3)
    data = replace(dataset_of([3, 1, 4, 1, 5, 9, 2, 6]), side={"user_vector": column})
    chosen = data.subset([6, 1, 4, 3])
    for batch in [*chosen.batches(3, torch.Generator().manual_seed(0)), *chosen.batches(4)]:
        assert batch["user_vector"].shape == (len(batch["labels"]), 3)
        assert batch["user_vector"][:, 0].tolist() == batch["input_ids"][:, 0].float().tolist()
