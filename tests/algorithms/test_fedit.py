"""Identities of FedIT."""

import numpy as np
import pytest
import torch
from tests import toy

from fedpilot import lora, memory
from fedpilot.algorithms.fedit import FedIT, FedITState
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, LeftOut, Plan, Upload

SPEC = toy.spec()


def peak_from(profile: MemoryProfile, block: int) -> int:
    names = frozenset(lora.names(lora.blocks_modules(SPEC, range(block, 3)))) | frozenset(SPEC.head)
    return memory.peak_bytes(profile, Plan(0, dict.fromkeys(SPEC.modules, 2), names))


def test_the_bias_of_the_mean_is_the_mean_product_of_deviations(profile: MemoryProfile) -> None:
    """B̄Ā - Σ p_k B_k A_k = -Σ p_k (B_k - B̄)(A_k - Ā), for unequal weights."""
    uploads = [Upload(k, 1 + 2 * k, toy.random_adapter(SPEC, 2, k)) for k in range(3)]
    state = FedITState(toy.random_adapter(SPEC, 2, 9))
    mean = FedIT(SPEC, profile, rank=2).aggregate(state, uploads).adapter
    total = sum(upload.num_examples for upload in uploads)
    for module in SPEC.modules:
        a, b = lora.a_name(module), lora.b_name(module)
        exact = sum(u.num_examples / total * u.tensors[b] @ u.tensors[a] for u in uploads)
        spread = sum(u.num_examples / total * (u.tensors[b] - mean[b]) @ (u.tensors[a] - mean[a]) for u in uploads)
        torch.testing.assert_close(mean[b] @ mean[a] - exact, -spread, rtol=1e-4, atol=1e-5)


def test_uniform_weights_ignore_examples(profile: MemoryProfile) -> None:
    uploads = [Upload(k, 1 + 9 * k, toy.random_adapter(SPEC, 2, k)) for k in range(2)]
    state = FedITState(toy.random_adapter(SPEC, 2, 9))
    mean = FedIT(SPEC, profile, rank=2, weights="uniform").aggregate(state, uploads).adapter
    name = lora.a_name("blocks.0.linear")
    torch.testing.assert_close(mean[name], (uploads[0].tensors[name] + uploads[1].tensors[name]) / 2)


def test_exclusive_leaves_out_whom_everything_does_not_fit(profile: MemoryProfile) -> None:
    needed = peak_from(profile, 0)
    clients = [ClientProfile(0, 5, needed), ClientProfile(1, 5, needed - 1)]
    algorithm = FedIT(SPEC, profile, rank=2, participation="exclusive")
    plan, out = algorithm.plan(algorithm.init(np.random.default_rng(0)), clients, np.random.default_rng(0))
    assert isinstance(plan, Plan)
    assert isinstance(out, LeftOut)
    assert out.needed_bytes == needed


def test_all_refuses_to_run_where_somebody_does_not_fit(profile: MemoryProfile) -> None:
    algorithm = FedIT(SPEC, profile, rank=2, participation="all")
    state = algorithm.init(np.random.default_rng(0))
    with pytest.raises(PlanError, match="client 1 must train everything"):
        algorithm.plan(state, [ClientProfile(0, 5, 10**9), ClientProfile(1, 5, 100)], np.random.default_rng(0))


@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_straggler_trains_what_the_weakest_can(profile: MemoryProfile, lowest: int) -> None:
    budget = peak_from(profile, lowest)
    algorithm = FedIT(SPEC, profile, rank=2, participation="straggler", budget_bytes=budget)
    state = algorithm.init(np.random.default_rng(0))
    rich = ClientProfile(0, 5, 10**9)
    (plan,) = algorithm.plan(state, [rich], np.random.default_rng(0))
    assert isinstance(plan, Plan)
    trained = {name for name in plan.trainable if name.endswith("lora_A")}
    assert trained == {lora.a_name(f"blocks.{j}.linear") for j in range(lowest, 3)}


def test_straggler_must_know_the_smallest_budget(profile: MemoryProfile) -> None:
    algorithm = FedIT(SPEC, profile, rank=2, participation="straggler")
    with pytest.raises(PlanError, match="budget_bytes"):
        algorithm.plan(algorithm.init(np.random.default_rng(0)), [ClientProfile(0, 5, 10**9)], np.random.default_rng(0))
