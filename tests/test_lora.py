import numpy as np
import pytest
import torch

from fedpilot import lora, tensors
from tests import toy

SPEC = toy.spec()


def test_a_fresh_adapter_changes_nothing_and_follows_its_seed() -> None:
    ranks = dict(zip(SPEC.modules, (1, 2, 3), strict=True))
    one = lora.init(SPEC, ranks, np.random.default_rng(0))
    two = lora.init(SPEC, ranks, np.random.default_rng(0))
    other = lora.init(SPEC, ranks, np.random.default_rng(1))
    assert tensors.digest(one) == tensors.digest(two) != tensors.digest(other)
    assert {name: tuple(t.shape) for name, t in one.items()} == lora.shapes(SPEC, ranks)
    for module, (out_features, in_features) in SPEC.modules.items():
        change = lora.delta(one, module, SPEC.scale)
        assert change.shape == (out_features, in_features)
        assert not change.any()
        assert one[lora.a_name(module)].abs().max() <= in_features**-0.5


def test_blocks_are_looked_up_not_searched_by_substring() -> None:
    spec = toy.spec(tuple(range(3, 15)))
    assert spec.num_blocks == 12
    assert lora.blocks_modules(spec, [1]) == ("blocks.1.linear",)


def test_padding_undoes_truncation_where_the_cut_slots_were_zero() -> None:
    full = toy.random_adapter(SPEC, 4)
    cut = lora.truncate(full, dict.fromkeys(SPEC.modules, 2))
    again = lora.pad(cut, 4)
    for module in SPEC.modules:
        a, b = again[lora.a_name(module)], again[lora.b_name(module)]
        assert torch.equal(a[:2], full[lora.a_name(module)][:2])
        assert not a[2:].any()
        assert not b[:, 2:].any()
        assert a.shape == full[lora.a_name(module)].shape
        assert torch.allclose(lora.delta(again, module, 2.0), lora.delta(cut, module, 2.0))
    assert torch.equal(again["head.weight"], full["head.weight"])


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_norm_of_a_product_needs_no_product(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, 9, generator=generator), torch.randn(5, rank, generator=generator)
    assert lora.product_norm(a, b) == pytest.approx(float((b.double() @ a.double()).norm()), rel=1e-6)


def test_a_slot_mean_with_equal_ranks_is_the_holder_mean_bit_for_bit() -> None:
    terms = [(toy.random_adapter(SPEC, 3, seed), weight) for seed, weight in ((1, 7.0), (2, 11.0), (3, 5.0))]
    mean = lora.SlotMean(toy.random_adapter(SPEC, 3, 9))
    for term, weight in terms:
        mean.add(term, weight)
    assert tensors.digest(mean.result()) == tensors.digest(tensors.weighted_mean(terms))


def test_a_slot_counts_its_holders_and_rests_without_any() -> None:
    module = "blocks.0.linear"
    present = {lora.a_name(module): torch.full((3, 6), 9.0), lora.b_name(module): torch.full((5, 3), 9.0)}
    mean = lora.SlotMean(present)
    mean.add({lora.a_name(module): torch.full((1, 6), 1.0), lora.b_name(module): torch.full((5, 1), 1.0)}, 1.0)
    mean.add({lora.a_name(module): torch.full((2, 6), 4.0), lora.b_name(module): torch.full((5, 2), 4.0)}, 2.0)
    result = mean.result()
    assert result[lora.a_name(module)][:, 0].tolist() == [3.0, 4.0, 9.0]
    assert result[lora.b_name(module)][0].tolist() == [3.0, 4.0, 9.0]
    assert mean.weights == {lora.a_name(module): 3.0, lora.b_name(module): 3.0}
