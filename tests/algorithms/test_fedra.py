"""Identities of FedRA, and that its client models are really shallower."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny, toy

from fedpilot import lora, memory, planning, tensors
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.fedra import FedRA, FedRAState
from fedpilot.client import ClientModel
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel, build_model
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile, Deployment, LeftOut, Plan, Site, Task, Upload

SPEC = toy.spec()
RANK = 2
PLENTY = 10**9
BATCH = 4
SETTINGS = TrainingSettings(learning_rate=0.05, batch_size=BATCH)


def shallow(blocks: Sequence[int], rank: int = RANK, spec: Any = SPEC, **plan: Any) -> Plan:
    modules = lora.blocks_modules(spec, blocks)
    trained = frozenset(lora.names(modules)) | frozenset(spec.head)
    return Plan(0, dict.fromkeys(modules, rank), trained, blocks=tuple(blocks), **plan)


def drawn(algorithm: FedRA, clients: Sequence[ClientProfile], seed: int = 0) -> list[Plan]:
    state = algorithm.init(np.random.default_rng(0))
    plans = algorithm.plan(state, clients, np.random.default_rng(seed))
    assert all(isinstance(plan, Plan) for plan in plans)
    return [plan for plan in plans if isinstance(plan, Plan)]


@cache
def fake(family: str) -> AdaptedModel:
    return tiny.build(family, device="fake")


@cache
def profile_of(family: str) -> MemoryProfile:
    model = fake(family)
    programs = lambda plan, size: model.program(plan, SETTINGS, size)  # noqa: E731
    return memory.trace(programs, model.spec, batch=BATCH, checkpointing=False)


# --- draws --------------------------------------------------------------------------------------------------------


def test_where_everything_fits_it_is_fedit_with_uniform_weights_bit_for_bit(profile: MemoryProfile) -> None:
    clients = [ClientProfile(k, 5 + 3 * k, PLENTY) for k in range(3)]
    adapters = []
    for algorithm in (FedRA(SPEC, profile, RANK), FedIT(SPEC, profile, RANK, weights="uniform")):
        state: Any = algorithm.init(np.random.default_rng(0))
        for _ in range(3):
            plans = algorithm.plan(state, clients, np.random.default_rng(1))
            uploads = [
                algorithm.local_update(algorithm.distribute(state, plan), toy.site(client))
                for plan, client in zip(plans, clients, strict=True)
                if isinstance(plan, Plan)
            ]
            state = algorithm.aggregate(state, uploads)
        adapters.append(tensors.digest(state.adapter))
    assert len(uploads) == 3
    assert adapters[0] == adapters[1]


def test_a_block_is_the_plain_mean_over_the_clients_that_drew_it(profile: MemoryProfile) -> None:
    """Client k sends k everywhere, whatever its number of examples; the head is the mean over all."""
    budget = max(memory.peak_bytes(profile, shallow(pair)) for pair in itertools.combinations(range(3), 2))
    algorithm = FedRA(SPEC, profile, RANK)
    state = FedRAState(toy.random_adapter(SPEC, RANK))
    plans = drawn(algorithm, [ClientProfile(k, 1 + 9 * k, budget) for k in range(5)], seed=5)
    sent = [algorithm.distribute(state, plan).tensors for plan in plans]
    uploads = [
        Upload(k, 1 + 9 * k, {name: torch.full_like(tensor, float(k)) for name, tensor in task.items()})
        for k, task in enumerate(sent)
    ]
    after = algorithm.aggregate(state, uploads).adapter
    for block in range(3):
        holders = [k for k, plan in enumerate(plans) if plan.blocks is not None and block in plan.blocks]
        assert 0 < len(holders) < 5
        for name in lora.names([f"blocks.{block}.linear"]):
            torch.testing.assert_close(after[name], torch.full_like(after[name], sum(holders) / len(holders)))
    assert (after["head.weight"] == 2.0).all()


def test_weights_by_examples_count_holders_by_their_examples(profile: MemoryProfile) -> None:
    state = FedRAState(toy.random_adapter(SPEC, RANK))
    name = lora.a_name("blocks.1.linear")
    shape = state.adapter[name].shape
    uploads = [Upload(0, 1, {name: torch.full(shape, 2.0)}), Upload(1, 3, {name: torch.full(shape, 6.0)})]
    after = FedRA(SPEC, profile, RANK, weights="examples").aggregate(state, uploads).adapter
    assert (after[name] == 5.0).all()


def test_a_block_that_nobody_drew_keeps_its_bits(profile: MemoryProfile) -> None:
    algorithm = FedRA(SPEC, profile, RANK)
    budget = max(memory.peak_bytes(profile, shallow([block])) for block in range(3))
    state = FedRAState(toy.random_adapter(SPEC, RANK))
    client = ClientProfile(0, 8, budget)
    (plan,) = drawn(algorithm, [client])
    assert plan.blocks is not None
    assert len(plan.blocks) == 1
    task = algorithm.distribute(state, plan)
    assert task.tensors.keys() == plan.trainable == set(lora.names(plan.ranks)) | set(SPEC.head)
    after = algorithm.aggregate(state, [algorithm.local_update(task, toy.site(client))]).adapter
    for name in state.adapter:
        assert torch.equal(after[name], state.adapter[name]) == (name not in plan.trainable)


def test_a_client_does_not_run_the_blocks_that_it_did_not_draw(profile: MemoryProfile) -> None:
    """Its first loss is that of blocks 0 and 2 alone, put together by hand."""
    algorithm, client = FedRA(SPEC, profile, RANK), ClientProfile(0, 8, PLENTY)
    state = FedRAState(toy.random_adapter(SPEC, RANK))
    site = Site(client, toy.ToyModel(8, seed=3, steps=1))
    upload = algorithm.local_update(algorithm.distribute(state, shallow((0, 2))), site)
    whole = toy.ToyModel(8, seed=3)
    whole.load(Task(shallow((0, 1, 2)), state.adapter))
    low, _, high = whole.net.blocks.children()
    with torch.no_grad():
        shallow_loss, whole_loss = (
            float(torch.nn.functional.cross_entropy(logits, whole.y))
            for logits in (whole.net.head(high(low(whole.x))), whole.net(whole.x))
        )
    assert upload.metrics["loss"] == pytest.approx(shallow_loss)
    assert abs(whole_loss - shallow_loss) > 0.01


def test_every_subset_is_as_likely_over_many_rounds() -> None:
    """Twelve blocks, five a draw: each block in 5/12 of the draws, each pair of blocks in 5/12 x 4/11."""
    spec, profile, num_draws = fake("bert").spec, profile_of("bert"), 2000
    budget = memory.peak_bytes(profile, shallow(range(5), spec=spec))
    plans = drawn(FedRA(spec, profile, RANK), [ClientProfile(k, 5, budget) for k in range(num_draws)], seed=7)
    blocks = Counter(block for plan in plans for block in plan.blocks or ())
    pairs = Counter(pair for plan in plans for pair in itertools.combinations(plan.blocks or (), 2))
    assert {len(plan.blocks or ()) for plan in plans} == {5}
    for counts, cells, share in ((blocks, 12, 5 / 12), (pairs, 66, 20 / 132)):
        sigma = math.sqrt(num_draws * share * (1 - share))
        assert len(counts) == cells
        assert max(abs(count - num_draws * share) for count in counts.values()) < 4 * sigma


def test_blocks_run_in_the_models_order_and_are_redrawn_each_round(profile: MemoryProfile) -> None:
    budget = max(memory.peak_bytes(profile, shallow(pair)) for pair in itertools.combinations(range(3), 2))
    seen = {drawn(FedRA(SPEC, profile, RANK), [ClientProfile(0, 5, budget)], seed)[0].blocks for seed in range(30)}
    assert seen == {(0, 1), (0, 2), (1, 2)}


# --- capacities ---------------------------------------------------------------------------------------------------


def test_capacity_is_decided_by_the_worst_subset_of_unlike_blocks(profile: MemoryProfile) -> None:
    models = planning.ShallowModels(SPEC, profile, RANK)
    peaks = {
        count: [memory.peak_bytes(profile, shallow(blocks)) for blocks in itertools.combinations(range(3), count)]
        for count in (1, 2, 3)
    }
    assert min(peaks[2]) < max(peaks[2])
    for budget in sorted(itertools.chain(*peaks.values())):
        for exact in (budget - 1, budget):
            expected = max((count for count in peaks if max(peaks[count]) <= exact), default=0)
            assert models.capacity(ClientProfile(0, 5, exact), 8) == expected


def test_unlike_subsets_have_each_sequence_of_kinds_once() -> None:
    rng = np.random.default_rng(0)
    for count in range(6):
        kinds = "".join(rng.choice(list("abc"), size=7))
        found = ["".join(kinds[block] for block in blocks) for blocks in planning.unlike_subsets(kinds, count)]
        assert sorted(found) == sorted({"".join(some) for some in itertools.combinations(kinds, count)})
        assert all(list(blocks) == sorted(set(blocks)) for blocks in planning.unlike_subsets(kinds, count))


def test_a_draw_that_a_hidden_subset_makes_too_large_gets_fewer_blocks(profile: MemoryProfile) -> None:
    peaks = sorted(memory.peak_bytes(profile, shallow(pair)) for pair in itertools.combinations(range(3), 2))
    models = planning.ShallowModels(SPEC, profile, RANK)
    models.__dict__["_worst"] = {**models._worst, (8, 2): (peaks[0], 0.0)}  # as if the others had not been priced
    client = ClientProfile(0, 5, peaks[0])
    plans = [models.random_subset(client, np.random.default_rng(seed)) for seed in range(20)]
    assert {len(plan.blocks or ()) for plan in plans if isinstance(plan, Plan)} == {1, 2}
    assert all(isinstance(plan, Plan) and planning.fits(plan, client) for plan in plans)


def test_a_smaller_micro_batch_is_taken_where_it_affords_more_blocks() -> None:
    profile = memory.trace(toy.program, SPEC, batch=8, micro_batches=(2, 8), checkpointing=False)
    algorithm = FedRA(SPEC, profile, RANK)
    whole, small = (
        max(memory.peak_bytes(profile, shallow([block], micro_batch=size)) for block in range(3)) for size in (8, 2)
    )
    assert small < whole
    (plan,) = drawn(algorithm, [ClientProfile(0, 5, whole - 1)])
    assert plan.micro_batch == 2
    (plan,) = drawn(algorithm, [ClientProfile(0, 5, PLENTY)])
    assert (plan.micro_batch, plan.blocks) == (None, (0, 1, 2))
    state = algorithm.init(np.random.default_rng(0))
    (out,) = algorithm.plan(state, [ClientProfile(0, 5, 1)], np.random.default_rng(0))
    assert isinstance(out, LeftOut)
    assert out.needed_bytes == small


def test_a_deadline_bounds_the_number_of_blocks_too(profile: MemoryProfile) -> None:
    models = planning.ShallowModels(SPEC, profile, RANK)
    pairs = [shallow(pair) for pair in itertools.combinations(range(3), 2)]
    slowest = max(memory.seconds(profile, plan, 1000.0, 4) for plan in pairs)
    client = ClientProfile(0, 5, PLENTY, num_steps=4, deadline_s=slowest, flops_per_second=1000.0)
    assert models.capacity(client, 8) == 2
    assert models.capacity(replace(client, deadline_s=slowest * 0.999), 8) == 1
    out = models.random_subset(replace(client, deadline_s=0.001), np.random.default_rng(0))
    assert isinstance(out, LeftOut)
    assert "deadline" in out.reason
    assert out.needed_bytes is None


def test_a_block_without_an_adapted_module_is_refused(profile: MemoryProfile) -> None:
    algorithm = FedRA(replace(SPEC, num_blocks=4), profile, RANK)
    state = algorithm.init(np.random.default_rng(0))
    with pytest.raises(PlanError, match="got none in block 3; add target modules, or choose fed-pilot or fed-hello"):
        algorithm.plan(state, [ClientProfile(0, 5, PLENTY)], np.random.default_rng(0))


# --- real models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_a_random_shallow_model_takes_the_predicted_bytes_and_less_than_a_frozen_one(family: str) -> None:
    """Measured on the real step: the prediction is exact, and leaving blocks out saves what freezing them does not."""
    model, profile = tiny.shared(family), profile_of(family)
    spec = model.spec
    for count in {1, 2, spec.num_blocks // 2}:
        budget = memory.peak_bytes(profile, shallow(range(count), spec=spec))
        (plan,) = drawn(FedRA(spec, profile, RANK), [ClientProfile(0, 5, budget)], seed=count)
        assert len(plan.blocks or ()) == count
        measured = memory.measure_peak(model.program(plan, SETTINGS))
        assert measured == plan.peak_bytes == budget
        frozen = planning.train_blocks(spec, 0, RANK, plan.blocks or ())
        assert measured < memory.measure_peak(model.program(frozen, SETTINGS))


def test_a_clients_training_of_a_shallow_model_is_measured_within_its_plan() -> None:
    model, profile = tiny.shared("vit"), profile_of("vit")
    algorithm = FedRA(model.spec, profile, RANK)
    budget = memory.peak_bytes(profile, shallow([0, 1], spec=model.spec))
    (plan,) = drawn(algorithm, [ClientProfile(0, 9, budget)], seed=1)
    state = FedRAState(tiny.random_tensors(model, dict.fromkeys(model.spec.modules, RANK)))
    client = ClientModel(model, tiny.examples("vit", 2 * BATCH), SETTINGS, learning_rate=0.05, seed=0, measured=set())
    client.load(algorithm.distribute(state, plan))
    assert client.fit(plan.trainable)["peak_bytes"] == plan.peak_bytes


def test_a_shallow_bert_equals_one_built_without_the_other_blocks(tmp_path: Path) -> None:
    chosen = (1, 4, 10)
    model, inputs = tiny.build("bert"), tiny.batch("bert")
    ranks = tiny.mixed_ranks(model, chosen)
    task = tiny.task(model, ranks, blocks=chosen)
    model.load(task)

    def renamed(name: str) -> str:
        prefix, found, rest = name.partition("encoder.layer.")
        number, _, end = rest.partition(".")
        return f"{prefix}{found}{chosen.index(int(number))}.{end}" if found else name

    config = tiny.config_of("bert")
    config.num_hidden_layers = len(chosen)
    config.save_pretrained(tmp_path)
    weights = load_file(tiny.folder("bert") / "model.safetensors")
    others = tuple(f"encoder.layer.{block}." for block in range(12) if block not in chosen)
    kept = {renamed(name): tensor for name, tensor in weights.items() if not any(o in name for o in others)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    small = build_model(tiny.settings("bert", source=str(tmp_path)), num_labels=tiny.NUM_LABELS)
    small.deploy(Deployment({renamed(name): tensor for name, tensor in task.tensors.items()}))
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(small, inputs))
    whole = tiny.build("bert")
    whole.load(Task(replace(task.plan, blocks=None), task.tensors))
    assert not torch.allclose(tiny.logits(whole, inputs), tiny.logits(small, inputs))
