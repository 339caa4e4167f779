from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fedpilot import lora, tensors
from fedpilot.memory.counting import LiveStorages
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
    again = toy.pad(cut, 4)
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


def terms(
    out_features: int, in_features: int, ranks: tuple[int, ...]
) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """B (out, rank), A (rank, in) and unequal weights."""
    generator = torch.Generator().manual_seed(out_features)
    return [
        (
            torch.randn(out_features, r, generator=generator),
            torch.randn(r, in_features, generator=generator),
            1.0 + 3 * k,
        )
        for k, r in enumerate(ranks)
    ]


def dense_sum(parts: list[tuple[torch.Tensor, torch.Tensor, float]]) -> torch.Tensor:
    return torch.stack([weight * (b.double() @ a.double()) for b, a, weight in parts]).sum(dim=0)


@pytest.mark.parametrize(("out_features", "rank", "in_features"), [(9, 4, 6), (5, 8, 7), (7, 6, 5), (4, 20, 9)])
def test_a_factored_svd_is_the_dense_one(out_features: int, rank: int, in_features: int) -> None:
    ((left, right, _),) = terms(out_features, in_features, (rank,))
    left, right = left.double(), right.double()
    u, s, vh = lora.factored_svd(left, right)
    k = min(out_features, rank, in_features)
    assert (u.shape, s.shape, vh.shape) == ((out_features, k), (k,), (k, in_features))
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[:k])
    torch.testing.assert_close((u * s) @ vh, left @ right)
    torch.testing.assert_close(u.T @ u, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(vh @ vh.T, torch.eye(k, dtype=torch.float64))


def test_the_signs_of_singular_vectors_do_not_hang_on_the_factors() -> None:
    ((left, right, _),) = terms(9, 6, (3,))
    one = lora.factored_svd(left, right)
    other = lora.factored_svd(-left, -right)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y)
    assert (one[2].gather(1, one[2].abs().argmax(dim=1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("block", [1, 4, 7, 256])
@pytest.mark.parametrize("ranks", [(3,), (2, 1, 4), (3,) * 5, (5, 2) * 9, (30, 1, 1)])
def test_a_sum_of_products_is_exact_however_it_is_stacked(block: int, ranks: tuple[int, ...]) -> None:
    parts = terms(13, 21, ranks)
    total = lora.ProductSum(13, 21, block=block)
    for b, a, weight in parts:
        total.add(b, a, weight)
    ideal = dense_sum(parts)
    left, right = total.factors()
    u, s, vh = total.svd()
    x = torch.randn(21, 4, generator=torch.Generator().manual_seed(0))
    bound = 1e-5 * float(ideal.norm())
    assert float((left.double() @ right.double() - ideal).norm()) < bound
    assert float(((u * s).double() @ vh.double() - ideal).norm()) < bound
    assert float((total.times(x).double() - ideal @ x.double()).norm()) < bound * float(x.norm())
    assert total.norm() == pytest.approx(float(ideal.norm()), rel=1e-5)


def test_a_sum_of_products_copies_its_terms_and_does_not_edit_them() -> None:
    ((b, a, _),) = terms(5, 8, (2,))
    before = b.clone(), a.clone()
    total = lora.ProductSum(5, 8)
    total.add(b, a, 3.0)
    assert torch.equal(b, before[0])
    assert torch.equal(a, before[1])
    b.zero_()
    a.zero_()
    torch.testing.assert_close(total.times(torch.eye(8)), 3.0 * before[0] @ before[1])


class Shapes(TorchDispatchMode):  # type: ignore[misc]
    """Notes the shape of every result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result


def test_no_matrix_of_the_weights_shape_is_made_while_factors_are_smaller() -> None:
    parts = terms(200, 230, (16, 8, 16))
    with Shapes() as shapes:
        total = lora.ProductSum(200, 230)
        for b, a, weight in parts:
            total.add(b, a, weight)
        total.svd()
        total.norm()
        total.times(parts[0][1].T)
        assert (200, 230) not in shapes.seen
        assert (230, 200) not in shapes.seen
        assert total.rank == 40
        for _ in range(11):
            total.add(*parts[0])
        assert (200, 230) in shapes.seen  # 216 ranks: nothing exact is smaller than the sum itself


def test_the_memory_of_a_sum_of_products_does_not_grow_with_its_terms() -> None:
    def held(count: int) -> int:
        """Bytes after all terms."""
        counter = LiveStorages()
        total = lora.ProductSum(60, 80, block=8)
        with counter.counting():
            for seed in range(count):
                ((b, a, weight),) = terms(60, 80, (4,))
                total.add(b, a, weight + seed)
                del b, a
        return counter.live

    assert held(1) == held(8) == 4 * (60 + 80) * 32  # room for eight terms
    assert held(9) == held(15) == 4 * (60 + 80) * 60
    assert held(17) == held(201) == 4 * (60 * 80 + (60 + 80) * 8)


@pytest.mark.parametrize("held", [0, 1, 3])
def test_slots_without_a_singular_value_are_as_at_the_start(held: int) -> None:
    ((left, right, _),) = terms(9, 6, (3,))
    left[:, held:] = 0.0
    fresh = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    a, b = lora.pair_of(*lora.factored_svd(left, right), fresh)
    assert (a.shape, b.shape) == ((5, 6), (9, 5))
    torch.testing.assert_close(b @ a, left @ right)
    assert torch.equal(a[held:], fresh[held:])
    assert not b[:, held:].any()


def test_a_padded_slot_mean_is_the_mean_of_padded_terms_bit_for_bit() -> None:
    parts = [(toy.random_adapter(SPEC, rank, rank), 2.0 + 5 * rank) for rank in (2, 4, 1, 3)]
    mean = lora.SlotMean(toy.random_adapter(SPEC, 4, 9), padded=True)
    for term, weight in parts:
        mean.add(term, weight)
    ideal = tensors.weighted_mean((toy.pad(term, 4), weight) for term, weight in parts)
    assert tensors.digest(mean.result()) == tensors.digest(ideal)


def test_padding_goes_up_to_the_largest_rank_that_came_and_what_lies_above_is_kept() -> None:
    present = toy.random_adapter(SPEC, 5, 9)
    parts = [(toy.random_adapter(SPEC, rank, rank), 2.0 + 5 * rank) for rank in (2, 3, 1)]
    mean = lora.SlotMean(present, padded=True)
    for term, weight in parts:
        mean.add(term, weight)
    ideal = tensors.weighted_mean((toy.pad(term, 3), weight) for term, weight in parts)
    found = mean.result()
    assert tensors.digest(lora.truncate(found, dict.fromkeys(SPEC.modules, 3))) == tensors.digest(ideal)
    for module in SPEC.modules:
        assert torch.equal(found[lora.a_name(module)][3:], present[lora.a_name(module)][3:])
        assert torch.equal(found[lora.b_name(module)][:, 3:], present[lora.b_name(module)][:, 3:])
