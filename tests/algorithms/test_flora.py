"""Identities of FLoRA."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny, toy

from fedpilot import base_deltas, lora, memory, planning, tensors
from fedpilot.algorithms.flora import FLoRA, FLoRAState
from fedpilot.errors import PlanError
from fedpilot.exchange import download_bytes
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, LeftOut, ModelSpec, Plan, Task, Upload

SHAPES = {"0.tall": (90, 30), "0.wide": (40, 70), "1.wide": (40, 70)}
SPEC = ModelSpec(SHAPES, {"0.tall": 0, "0.wide": 0, "1.wide": 1}, 2, 1.5, {"head.weight": torch.ones(3, 5)})
SIDES = sum(map(sum, SHAPES.values()))
HEAD_BYTES = 4 * 15
RANKS = (1, 4, 2, 3, 1, 2)
"""Of clients 0, 1, and so on."""


def flora(spec: ModelSpec = SPEC, **options: Any) -> FLoRA:
    return FLoRA(spec, None, **{"r_min": 1, "r_max": 4, **options})  # type: ignore[arg-type]


def task_of(algorithm: FLoRA, state: FLoRAState, client: int, rank: int | None = None) -> Task:
    ranks = dict.fromkeys(algorithm.spec.modules, rank or RANKS[client])
    return algorithm.distribute(state, Plan(client, ranks, planning.trainable(algorithm.spec, ranks)))


def trained(task: Task, seed: int, size: float = 1.0) -> Upload:
    """An upload that differs from what went down in every entry; client k has 3 + 4 k examples."""
    generator = torch.Generator().manual_seed(1000 * seed + task.plan.client_id)
    moved = {name: t + size * torch.randn(t.shape, generator=generator) for name, t in task.tensors.items()}
    return Upload(task.plan.client_id, 3 + 4 * task.plan.client_id, moved)


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_the_stack_is_the_exact_mean_of_unlike_ranks(weights: str) -> None:
    algorithm, rng = flora(weights=weights), np.random.default_rng(1)
    state = algorithm.init(np.random.default_rng(0))
    exact = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for round in range(5):
        clients = [int(client) for client in rng.choice(6, 3, replace=False)]
        uploads = [trained(task_of(algorithm, state, client), round) for client in clients]
        shares = [upload.num_examples if weights == "examples" else 1 for upload in uploads]
        for share, upload in zip(shares, uploads, strict=True):
            for module in SHAPES:
                b, a = upload.tensors[lora.b_name(module)].double(), upload.tensors[lora.a_name(module)].double()
                exact[module] += SPEC.scale * share / sum(shares) * b @ a
        state = algorithm.aggregate(state, iter(uploads))
        expected_head = sum(s / sum(shares) * u.tensors["head.weight"] for s, u in zip(shares, uploads, strict=True))
        torch.testing.assert_close(state.head["head.weight"], expected_head)
        for module, expected in exact.items():
            found = base_deltas.total(algorithm.deploy(state).base_delta)[base_deltas.weight_name(module)]
            assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_a_stack_has_the_sum_of_the_ranks_until_the_dense_change_is_smaller() -> None:
    algorithm, stacked = flora(r_max=8), sum(RANKS[:4])
    state = algorithm.init(np.random.default_rng(0))
    (step,) = algorithm.aggregate(state, (trained(task_of(algorithm, state, k), 0) for k in range(4))).base.steps
    assert {tuple(t.shape) for n, t in step.items() if "wide" in n} == {(stacked, 70), (40, stacked)}
    (step,) = algorithm.aggregate(state, (trained(task_of(algorithm, state, k, 8), 0) for k in range(4))).base.steps
    assert {name: tuple(t.shape) for name, t in step.items()} == {f"{m}.weight": shape for m, shape in SHAPES.items()}


def test_a_fresh_pair_starts_at_zero_does_not_travel_and_differs_each_round() -> None:
    algorithm = flora()
    state = algorithm.init(np.random.default_rng(0))
    first = task_of(algorithm, state, 1)
    assert download_bytes(first) == HEAD_BYTES
    assert all(not t.any() for name, t in first.tensors.items() if name.endswith("lora_B"))
    assert all(t.all() for name, t in first.tensors.items() if name.endswith("lora_A"))
    smaller = task_of(algorithm, state, 2).tensors["0.wide.lora_A"]
    assert torch.equal(smaller, first.tensors["0.wide.lora_A"][: RANKS[2]])
    after = algorithm.aggregate(state, [trained(first, 0)])
    assert not torch.equal(task_of(algorithm, after, 1).tensors["0.wide.lora_A"], first.tensors["0.wide.lora_A"])


def test_a_late_client_pays_for_every_stack_that_it_missed() -> None:
    algorithm = flora()
    state = algorithm.init(np.random.default_rng(0))
    for round, clients in enumerate(([0, 1], [2, 4], [0, 2])):
        state = algorithm.aggregate(state, [trained(task_of(algorithm, state, k), round) for k in clients])
    stacked = [RANKS[0] + RANKS[1], RANKS[2] + RANKS[4], RANKS[0] + RANKS[2]]
    # Client 3 never took part, client 1 was sent version 0 in round 1, client 4 version 1, clients 0 and 2 version 2.
    lacking = {3: sum(stacked), 1: sum(stacked), 4: sum(stacked[1:]), 0: stacked[2], 2: stacked[2]}
    found = {client: download_bytes(task_of(algorithm, state, client)) - HEAD_BYTES for client in lacking}
    assert found == {client: 4 * SIDES * rank for client, rank in lacking.items()}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_the_first_pass_after_a_merge_is_that_of_the_averaged_change(family: str) -> None:
    """GPT-2 keeps its weights transposed: a change that is not turned over is wrong, silently where they are square."""
    model, plain = tiny.build(family), tiny.build(family)
    algorithm = flora(model.spec)
    state = algorithm.init(np.random.default_rng(0))
    uploads = [trained(task_of(algorithm, state, client), 0, size=0.2) for client in range(3)]
    total = sum(upload.num_examples for upload in uploads)
    for module, shape in model.spec.modules.items():
        change = torch.zeros(shape)
        for upload in uploads:
            change += upload.num_examples / total * lora.delta(upload.tensors, module, model.spec.scale)
        weight = plain.base.get_parameter(f"{module}.weight")
        weight.data += change.T if family == "gpt2" else change
    state = algorithm.aggregate(state, uploads)
    plain.base.load_state_dict(dict(state.head), strict=False)
    batch = tiny.batch(family)
    expected = tiny.logits(plain, batch)
    model.load(task_of(algorithm, state, 1))
    torch.testing.assert_close(tiny.logits(model, batch), expected, rtol=0, atol=1e-5)
    model.deploy(algorithm.deploy(state))
    torch.testing.assert_close(tiny.logits(model, batch), expected, rtol=0, atol=1e-5)
    model.load(task_of(algorithm, algorithm.init(np.random.default_rng(0)), 1))
    assert float((tiny.logits(model, batch) - expected).norm() / expected.norm()) > 0.1


def test_a_client_trains_at_the_largest_rank_that_fits(profile: MemoryProfile) -> None:
    spec = toy.spec()
    algorithm = FLoRA(spec, profile, r_min=2, r_max=5)
    peaks = {rank: memory.peak_bytes(profile, planning.train_all(spec, 0, rank)) for rank in range(1, 6)}
    cohort = [ClientProfile(k, 5, size) for k, size in enumerate([peaks[1], peaks[2], peaks[4], 10**9])]
    state = algorithm.init(np.random.default_rng(0))
    entries = algorithm.plan(state, cohort, np.random.default_rng(0))
    found: list[Mapping[str, int] | int | None] = [
        entry.needed_bytes if isinstance(entry, LeftOut) else entry.ranks for entry in entries
    ]
    assert found == [peaks[2], *(dict.fromkeys(spec.modules, rank) for rank in (2, 4, 5))]


def test_many_clients_of_any_rank_are_summed_in_bounded_memory() -> None:
    algorithm = flora(weights="uniform")
    state = algorithm.init(np.random.default_rng(0))
    start = task_of(algorithm, state, 1)
    after = algorithm.aggregate(state, (Upload(k, 1, trained(start, k).tensors) for k in range(200)))
    exact = sum(lora.delta(trained(start, k).tensors, "0.tall", SPEC.scale).double() / 200 for k in range(200))
    found = base_deltas.total(after.base)["0.tall.weight"]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    assert tensors.num_bytes(after.base.steps[0]) == 4 * sum(m * n for m, n in SHAPES.values())


def test_ranks_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(PlanError, match=r"r_min must lie in 1\.\.r_max, got 5 with r_max 4"):
        flora(r_min=5)
