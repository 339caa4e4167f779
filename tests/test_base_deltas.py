import numpy as np
import pytest
import torch

from fedpilot import base_deltas, tensors
from fedpilot.errors import PlanError
from fedpilot.types import BaseDelta, Tensors

SHAPES = {"low": (40, 30), "thin": (50, 3)}


def step(seed: int, rank: int = 2) -> Tensors:
    """One module in factors, one dense because that is smaller."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for module, (out_features, in_features) in SHAPES.items():
        b = torch.randn(out_features, rank, generator=generator)
        a = torch.randn(rank, in_features, generator=generator)
        made |= base_deltas.pair(module, b, a)
    return made


def log(length: int, rank: int = 2) -> BaseDelta:
    base = BaseDelta()
    for seed in range(length):
        base = base_deltas.extended(base, step(seed, rank))
    return base


def test_a_pair_is_stored_the_smaller_way() -> None:
    made = step(0)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        "low.base_A": (2, 30),
        "low.base_B": (40, 2),
        "thin.base_A": (2, 3),
        "thin.base_B": (50, 2),
    }
    assert base_deltas.pair("thin", torch.ones(50, 3), torch.ones(3, 3)).keys() == {"thin.weight"}


def test_a_total_is_the_sum_of_its_steps_in_their_order() -> None:
    by_hand: dict[str, torch.Tensor] = {}
    for seed in range(9):
        made = step(seed)
        for module in SHAPES:
            change = made[f"{module}.base_B"] @ made[f"{module}.base_A"]
            name = f"{module}.weight"
            by_hand[name] = by_hand[name] + change if seed else change
    assert tensors.digest(base_deltas.total(log(9))) == tensors.digest(by_hand)


def test_folding_changes_no_bit_and_bounds_the_log() -> None:
    dense = 4 * sum(m * n for m, n in SHAPES.values())
    folded = []
    for length in range(1, 30):
        base = log(length)
        assert base.version == length == base.snapshot_version + len(base.steps)
        assert sum(map(tensors.num_bytes, base.steps)) <= dense
        assert tensors.num_bytes(base.snapshot) <= dense
        folded.append(base.snapshot_version)
    assert folded[0] == 0
    assert folded[-1] > 10


@pytest.mark.parametrize("seed", range(5))
def test_whoever_replays_has_the_servers_bits_whatever_it_missed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base, held = BaseDelta(), {client: ({}, 0) for client in range(7)}
    for round in range(40):
        base = base_deltas.extended(base, step(100 * seed + round, rank=int(rng.integers(1, 4))))
        for client in rng.choice(7, 2, replace=False):
            total, version = held[int(client)]
            task = base_deltas.since(base, version)
            held[int(client)] = (base_deltas.replayed(total, task), base.version)  # type: ignore[assignment]
            assert tensors.digest(held[int(client)][0]) == tensors.digest(base_deltas.total(base))


@pytest.mark.parametrize(("length", "rank"), [(4, 2), (12, 2), (29, 2), (15, 9)])
def test_a_download_is_the_smaller_of_what_is_missing_and_of_all(length: int, rank: int) -> None:
    whole = 4 * sum(m * n for m, n in SHAPES.values())
    made = [tensors.num_bytes(step(seed, rank)) for seed in range(length)]
    base = log(length, rank)
    for version in range(length + 1):
        wanted = base_deltas.since(base, version)
        travels = base_deltas.travelling(wanted)
        missing = sum(made[version:])
        exact = missing if version >= base.snapshot_version else whole
        assert base_deltas.num_bytes(wanted) == min(exact, whole) == min(missing, whole)
        assert base_deltas.num_bytes(wanted) == sum(map(tensors.num_bytes, (travels.snapshot, *travels.steps)))
        held = base_deltas.total(log(version, rank))
        assert tensors.digest(base_deltas.replayed(held, travels)) == tensors.digest(base_deltas.total(base))


def test_a_version_of_the_future_is_refused() -> None:
    with pytest.raises(PlanError, match="must be of version 0 to 2, got 3"):
        base_deltas.since(log(2), 3)


def test_extending_leaves_the_earlier_log_as_it_was() -> None:
    base = log(20)
    before = tensors.digest(base_deltas.total(base))
    later = base
    for seed in range(20, 40):
        later = base_deltas.extended(later, step(seed))
    assert tensors.digest(base_deltas.total(base)) == before
