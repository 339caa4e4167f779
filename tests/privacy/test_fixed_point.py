"""Tensors as integers and back: what is not of the layout, or would wrap around, is an error."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import toy

from fedpilot.errors import PlanError, UploadError
from fedpilot.privacy.fixed_point import FixedPoint

SHAPES = {name: tuple(tensor.shape) for name, tensor in toy.random_adapter(toy.spec(), 3, 1).items()}
NUMBERS = FixedPoint(SHAPES, step=2.0**-16, bound=8.0, max_clients=20, max_weight=50)


def test_beyond_the_bound_is_an_error_and_is_not_cut() -> None:
    with pytest.raises(UploadError, match=r"entries of head.bias must lie within ±8 to be summed, got 8.5"):
        NUMBERS.encoded({"head.bias": torch.tensor([1.0, -8.5, 0.0])})
    with pytest.raises(UploadError, match="got nan"):
        NUMBERS.encoded({"head.bias": torch.tensor([1.0, math.nan, 0.0])})
    assert NUMBERS.encoded({"head.bias": torch.tensor([8.0, -8.0, 0.0])}).dtype == np.uint32


def test_what_is_not_of_the_layout_is_refused() -> None:
    with pytest.raises(UploadError, match="must be of the agreed layout, got other"):
        NUMBERS.encoded({"other": torch.zeros(3)})
    with pytest.raises(UploadError, match="must fit into"):
        NUMBERS.encoded({"blocks.0.linear.lora_A": torch.zeros(4, 6)})
    with pytest.raises(UploadError, match="must fit into"):
        NUMBERS.encoded({"head.bias": torch.zeros(2)})
    with pytest.raises(UploadError, match=r"weight must lie in 1..50, got 51"):
        NUMBERS.encoded({}, 51)


def test_a_sum_that_could_wrap_around_is_refused_beforehand() -> None:
    with pytest.raises(PlanError, match="sums must lie below 2\\^31 steps"):
        replace(NUMBERS, max_clients=100)
    wide = replace(NUMBERS, max_clients=100, bits=64)
    largest = {name: torch.full(shape, 8.0) for name, shape in SHAPES.items()}
    vectors = [wide.encoded(largest, 50) for _ in range(100)]
    assert wide.decoded(sum(vectors[1:], vectors[0])).values["head.bias"].tolist() == [100 * 50 * 8.0] * 3


def test_the_largest_sum_that_32_bits_hold_does_not_wrap() -> None:
    tight = FixedPoint({"x": (2,)}, step=1.0, bound=2.0**20, max_clients=2047)
    found = tight.decoded(tight.encoded({"x": torch.tensor([2.0**20, -(2.0**20)])}) * np.uint32(2047))
    assert found.values["x"].tolist() == [2047 * 2.0**20, -2047 * 2.0**20]
    with pytest.raises(PlanError):
        replace(tight, max_clients=2048)


def test_the_vector_has_the_values_in_name_order_and_a_weight_for_each_slot_behind_them() -> None:
    numbers = FixedPoint({"m.lora_B": (3, 2), "m.lora_A": (2, 4), "bias": (2,)}, step=0.5, max_weight=10)
    part = {"m.lora_A": torch.full((1, 4), 1.5), "bias": torch.tensor([-1.0, 2.0])}
    vector = numbers.encoded(part, 3).astype(np.int32)
    assert vector.tolist() == [-6, 12, *[9] * 4, *[0] * 4, *[0] * 6, 3, 3, 0, 0, 0]
    assert numbers.num_entries == len(vector)
    assert numbers.num_bytes == 4 * len(vector)
