"""Allocation against brute force over the formula of ``CostTable``, which is written out here once more."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpilot import allocation
from fedpilot.allocation import Allocation, multipliers, search, solve
from fedpilot.errors import PlanError
from fedpilot.types import BlockCosts, Choice, CostTable

Floats = npt.NDArray[np.float64]


def choices_of(ranks: tuple[int, ...], *, checkpointing: bool) -> tuple[Choice, ...]:
    plain = (Choice(None), *map(Choice, ranks))
    return plain + tuple(replace(choice, checkpointed=True) for choice in plain) if checkpointing else plain


def random_table(
    rng: np.random.Generator, num_blocks: int, ranks: tuple[int, ...], *, checkpointing: bool
) -> CostTable:
    """Unequal blocks, and costs with no structure at all: every stage is the highest somewhere."""
    choices = choices_of(ranks, checkpointing=checkpointing)

    def costs() -> BlockCosts:
        highest = {"resident": 6, "saved": 20, "forward_peak": 25, "backward_peak": 30, "gradient": 8}
        highest |= {"optimiser_peak": 15, "flops": 20}
        return BlockCosts(**{name: rng.integers(0, top, (num_blocks, len(choices))) for name, top in highest.items()})

    fixed, head_peak, head_gradient, head_scratch, head_flops = (
        int(rng.integers(0, top)) for top in (20, 30, 9, 20, 9)
    )
    below = [rng.integers(0, top, num_blocks) for top in (5, 40, 8)]
    above = costs()
    return CostTable(choices, above, costs(), *below, fixed, head_peak, head_gradient, head_scratch, head_flops)


def transformer_table(num_blocks: int, ranks: tuple[int, ...], *, checkpointing: bool) -> CostTable:
    """Equal blocks in units of batch x length x width: 14 passed through, 1 more trained, 1 checkpointed."""
    choices, unit = choices_of(ranks, checkpointing=checkpointing), 1000

    def costs(*, lowest: bool) -> BlockCosts:
        columns: dict[str, list[int]] = {name: [] for name in BlockCosts.__dataclass_fields__}
        for choice in choices:
            rank = choice.rank or 0
            plain = (14 - 3 * lowest) * unit + (unit + 8 * rank if rank else 0)
            parameters = 20 * rank
            again = 15 * unit if choice.checkpointed else 2 * unit
            columns["resident"].append(2 * parameters)
            columns["saved"].append(unit if choice.checkpointed else plain)
            columns["forward_peak"].append(4 * unit if choice.checkpointed else plain + unit)
            columns["backward_peak"].append(again - 3 * unit * lowest + parameters)
            columns["gradient"].append(parameters)
            columns["optimiser_peak"].append(parameters // 2)
            columns["flops"].append(100 * (2 - lowest + choice.checkpointed) + rank)
        return BlockCosts(**{name: np.tile(np.array(column), (num_blocks, 1)) for name, column in columns.items()})

    nothing = np.zeros(num_blocks, dtype=np.int64)
    return CostTable(
        choices,
        costs(lowest=False),
        costs(lowest=True),
        nothing,
        nothing + 5 * unit,
        nothing + 100,
        10**6,
        1500,
        30,
        60,
        50,
    )


class Plans(NamedTuple):
    """Every plan of a table."""

    peaks: npt.NDArray[np.int64]
    flops: npt.NDArray[np.int64]
    values: Floats
    kinds: npt.NDArray[np.int64]  # alike where plans train the same blocks at the same ranks and values

    def fitting(self, budget: int, max_flops: int | None) -> npt.NDArray[np.bool_]:
        return (self.peaks <= budget) & (max_flops is None or self.flops <= max_flops)


def brute_force(table: CostTable, values: Floats) -> Plans:
    """Peak, operations and value of every plan, stage by stage as the docstring of ``CostTable`` lists them."""
    num_blocks, num_choices = values.shape
    training = [index for index, choice in enumerate(table.choices) if choice.rank is not None]
    ranks = [choice.rank for choice in table.choices]
    kind = np.array(
        [[list(zip(ranks, row, strict=True)).index(pair) for pair in zip(ranks, row, strict=True)] for row in values]
    )
    found = []
    for s in range(num_blocks):
        free = [range(num_choices)] * (num_blocks - 1 - s)
        picked = np.array(list(itertools.product(training, *free)))

        def cost(name: str, s: int = s, picked: npt.NDArray[np.int64] = picked) -> npt.NDArray[np.int64]:
            columns = [getattr(table.lowest, name)[s][picked[:, 0]]]
            columns += [getattr(table.above, name)[j][picked[:, j - s]] for j in range(s + 1, num_blocks)]
            return np.stack(columns, axis=1)

        saved, gradient = cost("saved"), cost("gradient")
        stages = [np.full(len(picked), table.frozen_forward_peak[j]) for j in range(s)]
        for i in range(num_blocks - s):
            stages.append(saved[:, :i].sum(axis=1) + cost("forward_peak")[:, i])
            later = table.head_gradient + gradient[:, i + 1 :].sum(axis=1)
            stages.append(saved[:, : i + 1].sum(axis=1) + later + cost("backward_peak")[:, i])
            stages.append(table.head_gradient + gradient.sum(axis=1) + cost("optimiser_peak")[:, i])
        stages.append(table.head_gradient + gradient.sum(axis=1) + table.head_optimiser_peak)
        stages.append(saved.sum(axis=1) + table.head_peak)
        standing = table.fixed + table.frozen_resident[:s].sum() + cost("resident").sum(axis=1)
        flops = table.head_flops + table.frozen_flops[:s].sum() + cost("flops").sum(axis=1)
        worth = np.stack([values[j][picked[:, j - s]] for j in range(s, num_blocks)], axis=1).sum(axis=1)
        kinds = sum((1 + kind[j][picked[:, j - s]]) * (num_choices + 1) ** j for j in range(s, num_blocks))
        found.append((standing + np.max(stages, axis=0), flops, worth, kinds))
    return Plans(*map(np.concatenate, zip(*found, strict=True)))


def random_values(rng: np.random.Generator, table: CostTable, *, whole: bool = False) -> Floats:
    shape = (len(table.frozen_resident), len(table.choices))
    values = rng.integers(-1, 4, shape).astype(np.float64) if whole else rng.random(shape)
    values[:, [choice.rank is None for choice in table.choices]] = 0.0
    return values


def recomputing(table: CostTable, costs: BlockCosts) -> BlockCosts:
    checkpointed = np.array([choice.checkpointed for choice in table.choices])
    saved = np.where(checkpointed, costs.saved // 4, costs.saved)
    return replace(costs, saved=saved, backward_peak=costs.backward_peak + 60 * checkpointed)


def small_instance(seed: int) -> tuple[CostTable, Floats, np.random.Generator]:
    """At most eight blocks and 4,000 plans; every second one with checkpointing, every third one with equal values."""
    rng = np.random.default_rng(seed)
    ranks = (4, 8, 16)[: int(rng.integers(1, 4))]
    checkpointing = seed % 2 == 1
    most = int(np.log(4000) / np.log((len(ranks) + 1) * (1 + checkpointing)))
    table = random_table(rng, int(rng.integers(1, min(8, most) + 1)), ranks, checkpointing=checkpointing)
    if seed % 4 == 3:  # recomputing a block is the highest moment, as in a transformer
        table = replace(table, above=recomputing(table, table.above), lowest=recomputing(table, table.lowest))
    return table, random_values(rng, table, whole=seed % 3 == 0), rng


def check(found: Allocation | None, table: CostTable, plans: Plans, budget: int, max_flops: int | None) -> None:
    fits = plans.fitting(budget, max_flops)
    if not fits.any():
        assert found is None
        return
    assert found is not None
    best = plans.values[fits].max()
    assert found.value == pytest.approx(best, abs=1e-9)
    assert found.gap == 0
    # Of the plans of the greatest value, the one of the lowest peak; of its forms, the one of the fewest operations.
    equal = fits & (plans.values > best - 1e-9)
    lowest = equal & (plans.peaks == plans.peaks[equal].min())
    least = []
    for kind in np.unique(plans.kinds[lowest]):
        forms = equal & (plans.kinds == kind)
        fewest = forms & (plans.flops == plans.flops[forms].min())
        least.append((int(plans.flops[fewest][0]), int(plans.peaks[fewest].min())))
    assert (found.flops, found.peak_bytes) in least
    assert found.peak_bytes == allocation.peak(table, found.choices) <= budget
    assert found.flops == allocation.flops(table, found.choices)
    assert max_flops is None or found.flops <= max_flops


@pytest.mark.parametrize("part", range(10))
def test_the_plan_is_the_best_of_all_plans_on_a_thousand_random_instances(part: int) -> None:
    for seed in range(100 * part, 100 * part + 100):
        table, values, rng = small_instance(seed)
        plans = brute_force(table, values)
        budget = int(rng.choice(plans.peaks)) if seed % 5 else int(plans.peaks.min() + rng.integers(-2, 3))
        max_flops = int(rng.choice(plans.flops)) if rng.random() < 0.5 else None
        check(allocation.allocate(table, values, budget, max_flops=max_flops), table, plans, budget, max_flops)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("deadline", [False, True])
def test_the_plan_is_the_best_of_all_plans_for_equal_blocks(checkpointing: bool, deadline: bool) -> None:
    rng = np.random.default_rng(7)
    ranks = (8,) if checkpointing else (4, 16)
    table = transformer_table(6, ranks, checkpointing=checkpointing)
    block_values = rng.random((40, 6))
    block_values[20:] = np.round(block_values[20:], 1)  # ties between blocks
    values = allocation.choice_values(table, block_values, {4: 0.5, 8: 0.75, 16: 1.0})
    every = [brute_force(table, each) for each in values]
    budgets = [int(rng.choice(plans.peaks)) for plans in every]
    limits = [int(rng.choice(plans.flops)) if deadline else None for plans in every]
    found = allocation.allocate_many(table, values, budgets, max_flops=limits if deadline else None)  # type: ignore[arg-type]
    for client, plans in enumerate(every):
        check(found[client], table, plans, budgets[client], limits[client])


def test_a_narrow_search_is_widened_until_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "FIRST_WIDTH", 1)
    monkeypatch.setattr(solve, "WIDER", 2)
    monkeypatch.setattr(solve, "PROMISING", 0)
    monkeypatch.setattr(solve, "SHARED_STEPS", 1)  # no multipliers: the bounds are as poor as they can be
    monkeypatch.setattr(solve, "OWN_STEPS", 1)
    monkeypatch.setattr(solve, "STATES_AT_ONCE", 4)
    monkeypatch.setattr(solve, "CASES_AT_ONCE", 3)
    monkeypatch.setattr(search, "NEIGHBOURS", 1)
    for seed in range(60):
        table, values, rng = small_instance(seed)
        plans = brute_force(table, values)
        budget, max_flops = int(rng.choice(plans.peaks)), int(rng.choice(plans.flops))
        check(allocation.allocate(table, values, budget, max_flops=max_flops), table, plans, budget, max_flops)


class WildSteps(multipliers.Steps):
    """Takes whatever multipliers come, the last of them for the best."""

    def advance(self, bound: Floats, subgradient: Floats, floor: Floats | float = -np.inf) -> None:
        rng = np.random.default_rng(len(bound) + int(1e6 * np.abs(self.theta).sum()))
        self.best, self.best_theta = bound, self.theta
        self.theta = rng.choice([0.0, 1e-3, 1.0, 256.0], self.theta.shape) * rng.random(self.theta.shape)


def test_no_multipliers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "Steps", WildSteps)
    for seed in range(60):
        table, values, rng = small_instance(seed)
        plans = brute_force(table, values)
        budget, max_flops = int(rng.choice(plans.peaks)), int(rng.choice(plans.flops))
        check(allocation.allocate(table, values, budget, max_flops=max_flops), table, plans, budget, max_flops)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), budgets=st.lists(st.integers(0, 400), min_size=2, max_size=6))
def test_no_budget_is_exceeded_and_a_larger_one_is_worth_no_less(seed: int, budgets: list[int]) -> None:
    rng = np.random.default_rng(seed)
    table = random_table(rng, 9, (4, 8), checkpointing=bool(seed % 2))
    values = np.repeat(random_values(rng, table)[None], len(budgets), axis=0)
    found = allocation.allocate_many(table, values, sorted(budgets), max_flops=120)
    worth = [-np.inf if plan is None else plan.value for plan in found]
    assert worth == sorted(worth)
    for plan, budget in zip(found, sorted(budgets), strict=True):
        assert plan is None or allocation.peak(table, plan.choices) <= budget
        assert plan is None or allocation.flops(table, plan.choices) <= 120


def test_clients_planned_together_and_alone_get_the_same_value_and_peak() -> None:
    rng = np.random.default_rng(3)
    table = transformer_table(12, (4, 8, 16), checkpointing=True)
    values = allocation.choice_values(table, rng.random((30, 12)), {4: 0.5, 8: 0.7, 16: 1.0})
    budgets = rng.integers(1_010_000, 1_200_000, 30)
    limits = rng.integers(1350, 4000, 30)
    budgets[0], limits[1] = 1_010_000, 1_300
    together = allocation.allocate_many(table, values, budgets, max_flops=limits)
    assert any(plan is None for plan in together)
    assert (
        sum(plan is not None and any(c is not None and c.checkpointed for c in plan.choices) for plan in together) > 5
    )
    for client, plan in enumerate(together):
        alone = allocation.allocate(table, values[client], int(budgets[client]), max_flops=int(limits[client]))
        assert (alone is None) == (plan is None)
        if alone is not None and plan is not None:
            assert (alone.value, alone.peak_bytes) == (pytest.approx(plan.value, abs=1e-9), plan.peak_bytes)


def test_the_same_call_gives_the_same_plans() -> None:
    table = transformer_table(9, (4, 8), checkpointing=True)
    values = allocation.choice_values(table, np.ones((5, 9)), {4: 1.0, 8: 1.0})  # ties everywhere
    budgets = [1_020_000, 1_030_000, 1_040_000, 1_050_000, 1_200_000]
    first = allocation.allocate_many(table, values, budgets)
    assert first == allocation.allocate_many(table, values, budgets)


def hand_table(*, checkpointing: bool = False) -> CostTable:
    """Three blocks; a block saves 4 bytes, 5 where trained, 1 where checkpointed; a frozen one costs 1 flop."""
    choices = choices_of((8,), checkpointing=checkpointing)
    saved = np.array([[4, 5, 1, 1][: len(choices)]] * 3)
    again = np.array([[0, 0, 5, 5][: len(choices)]] * 3)
    flops = np.array([[2, 3, 3, 4][: len(choices)]] * 3)
    none, nothing = np.zeros_like(saved), np.zeros(3, dtype=np.int64)
    costs = BlockCosts(none, saved, none, again, none, none, flops)
    return CostTable(choices, costs, costs, nothing, nothing, nothing + 1, 100, 0, 0, 0, 10)


TRAINED, PASSED = Choice(8), Choice(None)


def test_a_deeper_block_costs_more_than_a_further_one() -> None:
    values = [[0.0, 3.0], [0.0, 1.0], [0.0, 1.5]]
    by_budget = {
        104.9: None,
        105: (2,),  # one block
        110: (1, 2),  # blocks 1 and 2
        113: (0,),  # 5 + 4 + 4: worth 3, more than 1 + 1.5
        114: (0, 2),
        115: (0, 1, 2),
    }
    for budget, blocks in by_budget.items():
        plan = allocation.allocate(hand_table(), values, budget)
        assert (plan.trained_blocks if plan else None) == blocks


def test_plans_of_equal_value_differ_by_memory() -> None:
    plan = allocation.allocate(hand_table(), [[0.0, 1.0]] * 3, 108)
    assert plan == Allocation((None, None, TRAINED), 1.0, 105, 15)
    assert plan.lowest == 2


def test_nothing_is_recomputed_that_fits_plainly() -> None:
    table = hand_table(checkpointing=True)
    values = allocation.choice_values(table, [1.0, 1.0, 1.0], {8: 1.0})
    roomy = allocation.allocate(table, values, 1000)
    assert roomy is not None
    assert roomy.choices == (TRAINED,) * 3
    assert roomy == allocation.allocate(table, values, roomy.peak_bytes)
    tight = allocation.allocate(table, values, roomy.peak_bytes - 1)
    assert tight is not None
    assert [choice is not None and choice.checkpointed for choice in tight.choices].count(True) == 1
    assert tight.trained_blocks == (0, 1, 2)


def test_checkpointing_reaches_all_blocks_where_time_allows() -> None:
    table = hand_table(checkpointing=True)
    values = allocation.choice_values(table, [1.0, 1.0, 1.0], {8: 1.0})
    everywhere = allocation.allocate(table, values, 107)
    assert everywhere is not None
    assert everywhere.trained_blocks == (0, 1, 2)
    # The top block plain: its 5 bytes are gone when the block below is recomputed, 1 + 1 + 5 = 7 either way.
    assert everywhere == Allocation((Choice(8, True), Choice(8, True), TRAINED), 3.0, 107, 21)
    hurried = allocation.allocate(table, values, 107, max_flops=17)
    # Two blocks plain would need 110 bytes: block 1 is checkpointed, 10 + 1 + 4 + 3 operations are one too many.
    assert hurried == Allocation((None, None, TRAINED), 1.0, 105, 10 + 1 + 1 + 3)
    assert allocation.allocate(table, values, 107, max_flops=14.9) is None


def test_negative_values_are_taken_only_where_something_must_be_trained() -> None:
    plan = allocation.allocate(hand_table(), [[0.0, -1.0], [0.0, -2.0], [0.0, -3.0]], 1000)
    assert plan is not None
    assert (plan.trained_blocks, plan.value) == ((0,), -1.0)


def test_the_larger_micro_batch_is_taken_unless_a_smaller_one_is_worth_more() -> None:
    small, large = hand_table(), hand_table()
    large = replace(large, fixed=103)
    values = [[0.0, 3.0], [0.0, 1.0], [0.0, 1.5]]
    sizes = [(8, small), (16, large)]
    chosen = allocation.allocate_micro_batches(sizes, values, 118)
    assert chosen is not None
    assert (chosen[0], chosen[1].value) == (16, 5.5)
    chosen = allocation.allocate_micro_batches(sizes, values, 117)
    assert chosen is not None
    assert (chosen[0], chosen[1].value) == (8, 5.5)
    assert allocation.allocate_micro_batches(sizes, values, 104) is None
    with pytest.raises(PlanError, match="same choices"):
        allocation.allocate_micro_batches([(8, small), (4, hand_table(checkpointing=True))], values, 118)


def test_the_smallest_budget_allows_a_plan_and_one_byte_less_does_not() -> None:
    for seed in range(30):
        table, values, rng = small_instance(seed)
        plans = brute_force(table, values)
        max_flops = int(rng.choice(plans.flops)) if seed % 4 > 1 else None
        smallest = allocation.smallest_budget(table, max_flops=max_flops)
        assert smallest is not None
        least = plans.peaks[plans.fitting(10**6, max_flops)].min()
        assert smallest.peak_bytes == allocation.peak(table, smallest.choices) == least
        assert allocation.allocate(table, values, smallest.peak_bytes, max_flops=max_flops) is not None
        assert allocation.allocate(table, values, smallest.peak_bytes - 1, max_flops=max_flops) is None
    assert allocation.smallest_budget(table, max_flops=0) is None


def test_the_additive_knapsack_overstates_and_so_trains_less() -> None:
    rng = np.random.default_rng(5)
    table = transformer_table(12, (8,), checkpointing=False)
    values = allocation.choice_values(table, rng.random(12), {8: 1.0})
    budget = allocation.peak(table, [TRAINED] * 12)
    literal = allocation.additive(table, values, budget)
    exact = allocation.allocate(table, values, budget)
    assert literal is not None
    assert exact is not None
    assert len(exact.trained_blocks) == 12
    assert len(literal.trained_blocks) < 6
    assert literal.peak_bytes == allocation.peak(table, literal.choices) < budget
    assert allocation.additive(table, values, 10**6) is None
    # By hand: alone, blocks cost 13, 9 and 5 bytes; 3 + 1.5 would need 18, 1 + 1.5 needs 14.
    found = allocation.additive(hand_table(), [[0.0, 2.0], [0.0, 1.0], [0.0, 1.5]], 117)
    assert found is not None
    assert (found.trained_blocks, found.peak_bytes) == ((1, 2), 110)
    assert allocation.additive(hand_table(), [[0.0, 2.0], [0.0, 1.0], [0.0, 1.5]], 117, max_flops=14) is None


def test_the_suffix_is_as_deep_as_fits_then_as_wide() -> None:
    table = transformer_table(5, (4, 16), checkpointing=False)
    for length, rank in itertools.product(range(1, 6), (4, 16)):
        choices = (None,) * (5 - length) + (Choice(rank),) * length
        found = allocation.suffix(table, allocation.peak(table, choices))
        assert found is not None
        assert found.choices == choices
        hurried = allocation.suffix(table, 10**9, max_flops=allocation.flops(table, choices))
        assert hurried is not None
        assert hurried.lowest == 5 - length
    assert allocation.suffix(table, 10**6) is None


def test_a_random_subset_fits_and_comes_from_its_generator() -> None:
    table = transformer_table(8, (4, 16), checkpointing=False)
    budget = allocation.peak(table, [None] * 3 + [Choice(16), PASSED, PASSED, PASSED, Choice(4)])
    seen = set()
    for seed in range(20):
        found = allocation.random_subset(table, budget, np.random.default_rng(seed))
        assert found == allocation.random_subset(table, budget, np.random.default_rng(seed))
        assert found is not None
        assert found.peak_bytes == allocation.peak(table, found.choices) <= budget
        seen.add(found.trained_blocks)
    assert len(seen) > 1
    assert allocation.random_subset(table, 10**6, np.random.default_rng(0)) is None


def test_a_weighted_subset_fits_and_comes_from_its_generator() -> None:
    table = transformer_table(8, (4, 16), checkpointing=False)
    budget = allocation.peak(table, [None] * 3 + [Choice(16), PASSED, PASSED, PASSED, Choice(4)])
    weights = np.arange(1.0, 9.0)
    seen = set()
    for seed in range(20):
        found = allocation.weighted_subset(table, budget, weights, np.random.default_rng(seed))
        assert found == allocation.weighted_subset(table, budget, 7 * weights, np.random.default_rng(seed))
        assert found is not None
        assert found.peak_bytes == allocation.peak(table, found.choices) <= budget
        seen.add(found.trained_blocks)
    assert len(seen) > 1
    assert allocation.weighted_subset(table, 10**6, weights, np.random.default_rng(0)) is None
    everything = allocation.weighted_subset(table, 10**9, weights, np.random.default_rng(0))
    assert everything is not None
    assert everything.choices == (Choice(16),) * 8


def test_blocks_are_drawn_in_proportion_to_their_weights_and_then_among_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights 3 : 2 : 1: first 3/6, 2/6, 1/6; after block 0 the others come 2 : 1."""
    orders: list[list[int]] = []
    monkeypatch.setattr(allocation.strategies, "in_order", lambda table, budget, order, **_: orders.append(order))
    rng, draws = np.random.default_rng(11), 4000
    for _ in range(draws):
        allocation.weighted_subset(hand_table(), 10**9, [3.0, 2.0, 1.0], rng)
    firsts = [sum(order[0] == block for order in orders) / draws for block in range(3)]
    assert firsts == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=3 * (0.25 / draws) ** 0.5)
    after = [order[1] for order in orders if order[0] == 0]
    assert after.count(1) / len(after) == pytest.approx(2 / 3, abs=3 * (0.25 / len(after)) ** 0.5)
    assert all(sorted(order) == [0, 1, 2] for order in orders)


def test_blocks_in_a_given_order_are_kept_as_long_as_they_fit() -> None:
    """By hand: block 1 takes 9 bytes alone and 10 with block 2 trained above it; block 0 takes 13 alone."""
    table = hand_table()
    for order, budget, trained in (([1, 0, 2], 110, (1, 2)), ([2, 1, 0], 105, (2,)), ([0, 1, 2], 10**6, (0, 1, 2))):
        found = allocation.in_order(table, budget, order)
        assert found is not None
        assert found.trained_blocks == trained
        assert found.peak_bytes == allocation.peak(table, found.choices) <= budget


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, 0.0, 2.0], [1.0, -1.0, 2.0], [1.0, np.inf, 2.0], [np.nan] * 3])
def test_weights_that_make_no_sense_are_refused(weights: list[float]) -> None:
    with pytest.raises(PlanError, match="weights must be 3 positive finite numbers"):
        allocation.weighted_subset(hand_table(), 10**9, weights, np.random.default_rng(0))


def test_three_means_have_the_least_spread_of_all_partitions() -> None:
    def spread(scores: Floats, labels: npt.ArrayLike) -> float:
        groups = [scores[np.asarray(labels) == label] for label in set(np.asarray(labels).tolist())]
        return sum(float(((group - group.mean()) ** 2).sum()) for group in groups)

    rng = np.random.default_rng(2)
    for case in range(40):
        scores = rng.integers(0, 6, 7).astype(float) if case % 2 else rng.lognormal(0, 2, 7)
        labels = allocation.three_means(scores.tolist())
        least = min(spread(scores, partition) for partition in itertools.product(range(3), repeat=7))
        assert spread(scores, labels) == pytest.approx(least, abs=1e-12)
        assert len({(score, label) for score, label in zip(scores, labels, strict=True)}) == len(set(scores))
        in_order = [label for _, label in sorted(zip(scores, labels, strict=True))]
        assert in_order == sorted(in_order)
        assert set(labels) == set(range(min(3, len(set(scores)))))


def test_clusters_get_one_two_and_three_parts_by_their_score_not_their_number() -> None:
    assert allocation.cluster_weights([9.0, 0.1, 4.0, 0.2]) == pytest.approx([3 / 7, 1 / 7, 2 / 7, 1 / 7])
    assert allocation.cluster_weights([1.0, 2.0]) == pytest.approx([1 / 3, 2 / 3])
    assert allocation.cluster_weights([5.0] * 4) == [1 / 4] * 4


@pytest.mark.parametrize("num_blocks", [3, 5, 6, 12, 32])
def test_shapes_sum_to_one_and_are_wide_where_they_say(num_blocks: int) -> None:
    shapes: dict[str, list[float]] = {
        name: allocation.shape_weights(name, num_blocks)  # type: ignore[arg-type]
        for name in ("triangle", "inverted-triangle", "bottleneck", "uniform")
    }
    assert all(sum(weights) == pytest.approx(1.0) for weights in shapes.values())
    assert shapes["triangle"] == sorted(shapes["triangle"], reverse=True) == shapes["inverted-triangle"][::-1]
    assert shapes["triangle"][0] == pytest.approx(3 * shapes["triangle"][-1])
    bone = shapes["bottleneck"]
    assert bone[0] == bone[-1] == pytest.approx(3 * min(bone))
    assert min(bone) == bone[num_blocks // 2]
    assert shapes["uniform"] == [1 / num_blocks] * num_blocks
    with pytest.raises(PlanError, match=r"shape must be one of triangle, .*, got 'bone'"):
        allocation.shape_weights("bone", num_blocks)  # type: ignore[arg-type]


def test_the_bottleneck_of_twelve_blocks_is_the_published_one() -> None:
    published = [1 / 9] * 3 + [2 / 27] * 2 + [1 / 27] * 3 + [2 / 27] + [1 / 9] * 3
    assert allocation.shape_weights("bottleneck", 12) == pytest.approx(published)


def test_everything_is_trained_or_nothing() -> None:
    table = transformer_table(4, (4, 16), checkpointing=True)
    plain, checkpointed = [Choice(16)] * 4, [Choice(16, checkpointed=True)] * 4
    for strategy, choices in ((allocation.everything, plain), (allocation.everything_checkpointed, checkpointed)):
        needed, operations = allocation.peak(table, choices), allocation.flops(table, choices)
        found = strategy(table, needed, values=np.ones((4, 6)), max_flops=operations)
        assert found == Allocation(tuple(choices), 4.0, needed, operations)
        assert strategy(table, needed - 1) is None
        assert strategy(table, needed, max_flops=operations - 1) is None
    assert allocation.peak(table, checkpointed) < allocation.peak(table, plain)


def test_values_of_choices_are_block_values_times_rank_weights() -> None:
    table = replace(hand_table(), choices=(Choice(8), Choice(None)))
    assert allocation.choice_values(table, [1.0, 2.0, 3.0], {8: 0.5}).tolist() == [[0.5, 0], [1.0, 0], [1.5, 0]]
    with pytest.raises(PlanError, match=r"every rank of the table, got none for \[8\]"):
        allocation.choice_values(table, [1.0, 2.0, 3.0], {4: 0.5})


@pytest.mark.parametrize(
    ("values", "budget", "max_flops", "message"),
    [
        ([[0.0, np.nan]] * 3, 110, None, "values must be finite, got nan for client 0, block 0, choice 1"),
        ([[0.0, 1.0]] * 2, 110, None, r"values must be of shape \(clients, 3 blocks, 2 choices\), got \(1, 2, 2\)"),
        ([[1.0, 1.0]] * 3, 110, None, "values of choices that do not train must be 0"),
        ([[0.0, 1.0]] * 3, -1, None, "budgets must be at least 0, got -1"),
        ([[0.0, 1.0]] * 3, float("nan"), None, "budgets must be at least 0, got nan"),
        ([[0.0, 1.0]] * 3, 110, -2.5, "max_flops must be at least 0, got -2.5"),
    ],
)
def test_what_makes_no_sense_is_refused(
    values: list[list[float]], budget: float, max_flops: float, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        allocation.allocate(hand_table(), values, budget, max_flops=max_flops)


def test_a_table_or_a_plan_that_contradicts_itself_is_refused() -> None:
    table = hand_table()
    with pytest.raises(PlanError, match="budgets must be one for each of 2 clients"):
        allocation.allocate_many(table, np.zeros((2, 3, 2)), [110])
    with pytest.raises(PlanError, match=r"above.saved of a cost table must be whole numbers of shape \(3, 2\)"):
        allocation.smallest_budget(replace(table, above=replace(table.above, saved=np.zeros((3, 1), dtype=np.int64))))
    with pytest.raises(PlanError, match="frozen_flops of a cost table must be below"):
        allocation.smallest_budget(replace(table, frozen_flops=np.array([0, 2**60, 0])))
    with pytest.raises(PlanError, match="must have a choice that trains"):
        allocation.smallest_budget(replace(table, choices=(Choice(None), Choice(None, True))))
    for choices in ([None] * 3, [None, PASSED, TRAINED], [TRAINED, None, TRAINED], [TRAINED] * 2, [Choice(4)] * 3):
        with pytest.raises(PlanError, match="choices must be None below the lowest trained block"):
            allocation.peak(table, choices)
    with pytest.raises(PlanError, match="must have a checkpointed choice that trains"):
        allocation.everything_checkpointed(table, 110)
    with pytest.raises(PlanError, match="budget_bytes and max_flops must be at least 0"):
        allocation.suffix(table, -1)
    with pytest.raises(PlanError, match="values must be finite and of shape"):
        allocation.everything(table, 1000, values=[[1.0]])


def test_a_search_that_is_given_up_says_what_it_may_have_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "WIDEST", 2)
    monkeypatch.setattr(solve, "WIDEST_FOR_TIES", 2)
    gaps = []
    for seed in range(1, 121, 2):
        table, values, rng = small_instance(seed)
        plans = brute_force(table, values)
        budget, max_flops = int(rng.choice(plans.peaks)), int(rng.choice(plans.flops))
        fits = plans.fitting(budget, max_flops)
        found = allocation.allocate(table, values, budget, max_flops=max_flops)
        assert (found is None) == (not fits.any())
        if found is not None:
            best = plans.values[fits].max()
            assert best - 1e-9 <= found.value + found.gap
            assert found.gap > 0 or found.value == pytest.approx(best, abs=1e-9)
            assert found.peak_bytes <= budget
            gaps.append(found.gap)
    assert max(gaps) > 0
