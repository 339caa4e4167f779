"""Attachments: names and shapes, how the model takes them on and off, memory, prefixes, and how they travel."""

import json
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from fedpilot import attachments, memory, planning, tensors
from fedpilot.attachments import ATTACHMENTS, KEYS, InstancePool
from fedpilot.client import ClientModel
from fedpilot.errors import ModelError, PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel
from fedpilot.record import RunDirectory
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile, Deployment, ExampleDP, LeftOut, Plan, StepKind, Task, Tensors
from tests import tiny, toy

POOL = InstancePool(size=5, top_k=2, rank=3, query="mean")
LORAS = replace(POOL, pool="lora")
SPREAD = replace(POOL, query_blocks=2, choice="spread")
SETTINGS = TrainingSettings(learning_rate=0.02, batch_size=4)


def random_pool(model: AdaptedModel, pool: InstancePool, seed: int = 0) -> Tensors:
    """A pool, its keys and heads, none of them as at the start."""
    generator = torch.Generator().manual_seed(seed)
    start = attachments.init(model.spec, pool, np.random.default_rng(seed))
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}


def task(model: AdaptedModel, pool: InstancePool, first: int = 0, seed: int = 0, **plan: Any) -> Task:
    """Trains the pool from a block on."""
    made = replace(attachments.suffix_plan(model.spec, 0, pool, first), **plan)
    return Task(made, random_pool(model, pool, seed))


# --- names and numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"top_k": 6}, r"top_k must lie in 1\.\.size, got 6 with size 5"),
        ({"top_k": 0}, r"top_k must lie in 1\.\.size, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"key_weight": 1.0}, r"key_weight must be in \[0, 1\), got 1\.0"),
        ({"query_blocks": -1}, "query_blocks must be at least 0, got -1; 0 stands for all blocks"),
    ],
)
def test_hyper_parameters_that_make_no_pool_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        replace(POOL, **change)


def test_a_pool_has_sets_of_every_module_keys_and_heads_in_place_of_the_last_layer() -> None:
    spec = toy.spec()
    shapes = attachments.shapes(spec, {}, POOL)
    assert shapes["blocks.1.linear.pool_gamma"] == (5, 7)
    assert shapes["blocks.1.linear.pool_beta"] == (5, 7)
    assert shapes[KEYS] == (5, toy.WIDTH)
    assert shapes["head.pool_weight"] == (5, toy.NUM_LABELS, toy.WIDTH)
    assert shapes["head.pool_bias"] == (5, toy.NUM_LABELS)
    assert not shapes.keys() & spec.head.keys()
    loras = attachments.shapes(spec, {}, LORAS)
    assert (loras["blocks.1.linear.pool_A"], loras["blocks.1.linear.pool_B"]) == ((5, 3, toy.WIDTH), (5, 7, 3))


def test_layers_of_the_head_below_its_last_one_stay_single() -> None:
    spec = tiny.shared("bert").spec
    head = {"pooler.weight": torch.ones(24, 24), "pooler.bias": torch.ones(24), **spec.head}
    shapes = attachments.shapes(replace(spec, head=head), {}, POOL)
    assert shapes["pooler.weight"] == (24, 24)
    assert "classifier.weight" not in shapes
    assert shapes["classifier.pool_weight"] == (5, *spec.head["classifier.weight"].shape)


def test_first_values_are_the_papers_and_follow_from_the_generator() -> None:
    spec, pool = toy.spec((50, 70, 40)), replace(POOL, size=40)
    values = attachments.init(spec, pool, np.random.default_rng(3))
    gamma = torch.cat([tensor.flatten() for name, tensor in values.items() if name.endswith("gamma")])
    beta = torch.cat([tensor.flatten() for name, tensor in values.items() if name.endswith("beta")])
    assert float(gamma.mean()) == pytest.approx(1, abs=0.002)
    assert float(gamma.std()) == pytest.approx(0.02, rel=0.05)
    assert float(beta.mean()) == pytest.approx(0, abs=0.002)
    assert float(beta.std()) == pytest.approx(0.02, rel=0.05)
    assert all(torch.equal(head, spec.head["head.weight"]) for head in values["head.pool_weight"])
    assert tensors.digest(values) == tensors.digest(attachments.init(spec, pool, np.random.default_rng(3)))
    assert tensors.digest(values) != tensors.digest(attachments.init(spec, pool, np.random.default_rng(4)))


def test_a_pool_of_loras_starts_as_the_base_model() -> None:
    values = attachments.init(toy.spec(), LORAS, np.random.default_rng(0))
    assert not any(tensor.any() for name, tensor in values.items() if name.endswith("pool_B"))
    assert all(tensor.abs().max() <= toy.WIDTH**-0.5 for name, tensor in values.items() if name.endswith("pool_A"))


def test_a_suffix_trains_its_blocks_and_what_lies_in_none() -> None:
    plan = attachments.suffix_plan(toy.spec(), 4, POOL, 1)
    assert (plan.client_id, dict(plan.ranks), plan.attachment) == (4, {}, POOL)
    frozen = attachments.shapes(toy.spec(), {}, POOL).keys() - plan.trainable
    assert frozen == {"blocks.0.linear.pool_gamma", "blocks.0.linear.pool_beta"}
    assert planning.trained_blocks(toy.spec(), plan) == (1, 2)


# --- as JSON ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [POOL, LORAS, replace(POOL, key_weight=0.25, similarity="mean", query="cls"), SPREAD])
def test_an_attachment_comes_back_from_its_table(pool: InstancePool) -> None:
    assert attachments.from_table(json.loads(json.dumps(attachments.to_table(pool)))) == pool


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "os.system"}, "an attachment must be one of .*instance-pool.*, got 'os.system'"),
        ({"name": None}, "an attachment must be one of"),
        ({"size": "5"}, "instance-pool size must be int, got '5'"),
        ({"size": True}, "instance-pool size must be int"),
        ({"size": 2**40}, "instance-pool size must be int"),
        ({"key_weight": float("nan")}, "instance-pool key_weight must be float"),
        ({"pool": "code"}, "instance-pool pool must be"),
        ({"more": 1}, "instance-pool must have just"),
        ({"top_k": 9}, r"top_k must lie in 1\.\.size"),
    ],
)
def test_a_table_that_is_no_attachments_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        attachments.from_table({**attachments.to_table(POOL), **change})


def test_an_attachment_of_an_unknown_class_does_not_travel() -> None:
    with pytest.raises(PlanError, match=r"an attachment must be one of .*, got Plan"):
        attachments.to_table(Plan(0, {}, frozenset()))  # type: ignore[arg-type]


def test_every_registered_attachment_is_one_that_the_model_runs() -> None:
    from fedpilot.model.attached import MAKERS

    assert set(MAKERS) == set(ATTACHMENTS.values())


def test_an_adapters_folder_holds_an_attachment_to_the_bit(tmp_path: Any) -> None:
    run = RunDirectory.create(tmp_path / "run", {"run_id": "x", "seed": 0})
    values = attachments.init(toy.spec(), POOL, np.random.default_rng(0))
    run.save_adapter("last", Deployment(values, attachment=POOL), {"round": 1})
    found, facts = RunDirectory.open(tmp_path / "run").load_adapter("last")
    assert found.attachment == POOL
    assert facts["round"] == 1
    assert tensors.digest(found.tensors) == tensors.digest(values)


# --- in the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [POOL, LORAS], ids=["ssf", "lora"])
@pytest.mark.parametrize("family", ["bert", "dinov2"])
def test_a_batch_gives_what_its_examples_give_one_by_one(family: str, pool: InstancePool) -> None:
    model, rows = tiny.shared(family), tiny.examples(family, 7)
    model.deploy(Deployment(random_pool(model, pool), attachment=pool))
    together = tiny.logits(model, next(rows.batches(7)))
    alone = torch.cat([tiny.logits(model, batch) for batch in rows.batches(1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tolist()) for row in (model._attached._weights > 0)}) >= 1  # type: ignore[union-attr]


def test_examples_of_one_batch_are_run_with_different_sets() -> None:
    model = tiny.shared("dinov2")
    model.deploy(Deployment(random_pool(model, POOL, seed=2), attachment=POOL))
    tiny.logits(model, tiny.batch("dinov2", 12))
    chosen = model._attached._weights > 0  # type: ignore[union-attr]
    assert (chosen.sum(dim=1) == POOL.top_k).all()
    assert len({tuple(row.tolist()) for row in chosen}) > 1


def test_what_is_hooked_on_comes_off_with_the_next_task_that_has_none() -> None:
    model, batch = tiny.build("bert"), tiny.batch("bert")
    ranks = tiny.mixed_ranks(model)
    plain = tiny.task(model, ranks)
    model.load(plain)
    before = tiny.logits(model, batch)
    model.load(task(model, POOL))
    assert set(model.read()) == set(attachments.shapes(model.spec, {}, POOL))
    assert not torch.equal(tiny.logits(model, batch), before)
    model.load(plain)
    assert torch.equal(tiny.logits(model, batch), before)
    assert set(model.read()) == set(plain.tensors)


def test_a_loaded_pool_reads_back_to_the_bit_and_only_the_plan_has_gradients() -> None:
    model = tiny.shared("bert")
    made = task(model, POOL, first=9)
    model.load(made)
    assert tensors.digest(model.read()) == tensors.digest(made.tensors)
    live = model.parameters_by_name()
    assert {name for name, parameter in live.items() if parameter.requires_grad} == made.plan.trainable
    model.loss(tiny.batch("bert")).backward()
    assert {name for name, parameter in live.items() if parameter.grad is not None} == made.plan.trainable


@pytest.mark.parametrize(
    "change",
    [{"ranks": {"encoder": 1}}, {"blocks": (0, 1, 2)}],
    ids=["pairs", "blocks"],
)
def test_a_plan_with_an_attachment_has_no_pairs_and_all_blocks(change: dict[str, Any]) -> None:
    model = tiny.shared("dinov2")
    made = task(model, POOL)
    if "ranks" in change:
        module = next(iter(model.spec.modules))
        pairs = tiny.random_tensors(model, {module: 1})
        held = {**{n: t for n, t in pairs.items() if "lora_" in n}, **made.tensors}
        made, change = replace(made, tensors=held), {"ranks": {module: 1}}
    with pytest.raises(ModelError, match="a plan or deployment with an attachment must have no pairs"):
        model.load(replace(made, plan=replace(made.plan, **change)))


def test_tensors_that_are_not_the_attachments_are_refused() -> None:
    model = tiny.shared("dinov2")
    made = task(model, POOL)
    with pytest.raises(ModelError, match=r"got none too many and pool\.keys missing"):
        model.load(replace(made, tensors={n: t for n, t in made.tensors.items() if n != KEYS}))
    with pytest.raises(ModelError, match=r"pool\.keys must have shape \(5, 24\), got \(4, 24\)"):
        model.load(replace(made, tensors={**made.tensors, KEYS: made.tensors[KEYS][:4]}))


def test_a_private_step_refuses_an_attachment() -> None:
    model = tiny.shared("bert")
    made = task(model, POOL)
    client = ClientModel(model, tiny.examples("bert"), SETTINGS, learning_rate=0.1, seed=0)
    client.load(made)
    with pytest.raises(ModelError, match="a private step must train pairs and head alone"):
        client.fit(made.plan.trainable, kind=StepKind(private=ExampleDP(1.0, 1.0)))


def test_the_query_is_the_frozen_models_whatever_the_pool_and_dropout_are() -> None:
    model, batch = tiny.build("bert"), tiny.batch("bert")
    bare = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.load(tiny.task(model, {}, []))
    model.base.eval()
    expected = model.query(bare, "mean", 0)
    model.load(task(model, POOL))
    model.train(model.plan.trainable, frozen_dropout=True)  # type: ignore[union-attr]
    model._attached._weights = None  # type: ignore[union-attr]
    training = [module.training for module in model.base.modules()]
    assert torch.equal(model.query(bare, "mean", 0), expected)
    assert [module.training for module in model.base.modules()] == training


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_a_query_from_lower_blocks_is_what_they_give(depth: int) -> None:
    model, batch = tiny.shared("bert"), tiny.batch("bert")
    bare = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.load(task(model, POOL))
    model._attached._weights = None  # type: ignore[union-attr]
    model.base.eval()
    with torch.no_grad():
        states = model.base.base_model(**bare, output_hidden_states=True).hidden_states  # type: ignore[operator]
    assert torch.equal(model.query(bare, "cls", depth), states[depth][:, 0])
    assert len(model.blocks) == 12


def weights_of(model: AdaptedModel, batch: Any, *, learns: bool) -> torch.Tensor:
    """(examples, N) as the model mixes the sets."""
    with torch.set_grad_enabled(learns):
        model.logits({name: tensor for name, tensor in batch.items() if name != "labels"})
    weights = model._attached._weights  # type: ignore[union-attr]
    assert weights is not None
    return weights


def test_in_training_a_key_is_held_against_its_own_mean_so_that_none_stays_unused() -> None:
    model, batch = tiny.build("bert", dropout=0.0), tiny.batch("bert", 8)
    bare = {name: tensor for name, tensor in batch.items() if name != "labels"}
    pool = replace(SPREAD, size=4, top_k=1)
    made = task(model, pool)
    model.load(made)
    model._attached.forget()  # type: ignore[union-attr]
    query = torch.nn.functional.normalize(model.query(bare, "mean", 2), dim=1)
    keys = torch.nn.functional.normalize(made.tensors[KEYS], dim=1)
    cosines = query @ keys.T
    nearest = torch.eye(4)[cosines.argmax(dim=1)]
    furthest_above = torch.eye(4)[(cosines - cosines.mean(dim=0)).argmax(dim=1)]
    assert int(nearest.any(dim=0).sum()) < int(furthest_above.any(dim=0).sum())
    model.train(made.plan.trainable, frozen_dropout=True)
    assert torch.equal(weights_of(model, batch, learns=True), furthest_above)
    assert torch.equal(weights_of(model, batch, learns=False), nearest)
    one = {name: tensor[:1] for name, tensor in batch.items()}
    assert torch.equal(weights_of(model, one, learns=True), nearest[:1])


def test_a_column_that_only_an_attachment_would_read_does_not_reach_the_base_model() -> None:
    model, batch = tiny.shared("bert"), tiny.batch("bert")
    model.load(task(model, POOL))
    before = tiny.logits(model, batch)
    assert torch.equal(tiny.logits(model, {**batch, "user_vector": torch.ones(5, 3)}), before)


# --- training, memory and prefixes --------------------------------------------------------------------------------


def fitted(model: AdaptedModel, made: Task, **changes: Any) -> tuple[Tensors, ClientModel]:
    settings = replace(SETTINGS, **changes)
    client = ClientModel(model, tiny.examples("bert", 8), settings, learning_rate=0.02, seed=1)
    client.load(made)
    client.fit(made.plan.trainable)
    return client.read(), client


def test_pieces_and_recomputed_blocks_do_not_show_in_what_is_learnt() -> None:
    model = tiny.build("bert", dropout=0.0)
    whole, _ = fitted(model, task(model, POOL, first=8))
    kept = frozenset(range(8, 12))
    cut, _ = fitted(model, task(model, POOL, first=8, micro_batch=2, checkpointed=kept))
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(whole[name], tensor) for name, tensor in task(model, POOL, first=8).tensors.items())


def test_remembered_queries_do_not_show_in_what_is_learnt() -> None:
    model, again = tiny.build("bert", dropout=0.0), tiny.build("bert", dropout=0.0)
    plain, _ = fitted(model, task(model, POOL, first=8), local_epochs=2)
    cached, _ = fitted(again, task(again, POOL, first=8), local_epochs=2, cache_bytes=2**20)
    for name in plain:
        torch.testing.assert_close(cached[name], plain[name], rtol=1e-3, atol=1e-5)
    assert again.prefix_cache is not None
    assert (again.prefix_cache.hits, again.prefix_cache.misses) == (8, 8)  # the second epoch asks for nothing new


@pytest.mark.parametrize("pool", [POOL, SPREAD], ids=["last", "lower"])
def test_blocks_below_the_lowest_hooked_one_are_remembered_and_no_others(pool: InstancePool) -> None:
    upper = tuple(f"{block}.output.dense" for block in (10, 11))
    model = tiny.build("bert", dropout=0.0, target_modules=upper)
    assert min(model.spec.block_of.values()) == 10
    plain, _ = fitted(model, task(model, pool, first=11), local_epochs=2)
    again = tiny.build("bert", dropout=0.0, target_modules=upper)
    cached, _ = fitted(again, task(again, pool, first=11), local_epochs=2, cache_bytes=2**22)
    assert again._prefix is not None
    assert len(again._prefix.rest) == 12
    assert sum(type(block).__name__ in ("_PassesOn", "_Gives") for block in again._prefix.rest) == 10
    for name in plain:
        torch.testing.assert_close(cached[name], plain[name], rtol=1e-3, atol=1e-5)


UPPER = ("layer.1.attention.q_proj", "layer.2.attention.v_proj")
"""Modules of two of three blocks: two plans for each micro-batch."""


@cache
def traced(pool: InstancePool, checkpointing: bool) -> MemoryProfile:
    sketch, kind = tiny.build("dinov2", device="fake", target_modules=UPPER), StepKind(attachment=pool)
    return memory.trace_attached(
        lambda plan, size: sketch.program(plan, SETTINGS, size, kind),
        sketch.spec,
        pool,
        batch=4,
        micro_batches=(4,) if checkpointing else (4, 2),
        checkpointing=checkpointing,
    )


@cache
def upper() -> AdaptedModel:
    return tiny.build("dinov2", target_modules=UPPER)


@pytest.mark.parametrize(
    ("pool", "checkpointing"), [(POOL, False), (LORAS, True), (SPREAD, False)], ids=["ssf", "lora", "spread"]
)
def test_the_predicted_peak_is_the_measured_one_to_the_byte(pool: InstancePool, checkpointing: bool) -> None:
    model, profile = upper(), MemoryProfile.from_json(traced(pool, checkpointing).to_json())
    assert len(profile.plans) == 4
    for size in profile.sizes:
        for plan in memory.candidates(model.spec, pool, 4, size, checkpointing):
            measured = memory.measure_peak(model.program(plan, SETTINGS, size, StepKind(attachment=pool)))
            assert memory.peak_bytes(profile, plan) == measured


def test_a_client_measures_the_peak_that_was_predicted() -> None:
    model, made = upper(), task(upper(), POOL, first=2)
    client = ClientModel(model, tiny.examples("dinov2", 12), SETTINGS, learning_rate=0.02, seed=1, measured=set())
    client.load(made)
    assert client.fit(made.plan.trainable)["peak_bytes"] == memory.peak_bytes(traced(POOL, False), made.plan)


def test_all_that_a_pool_holds_counts_as_resident_and_a_choice_only_until_the_next_task() -> None:
    model, made = tiny.shared("dinov2"), task(tiny.shared("dinov2"), POOL)
    model.load(made)
    before = model.resident()
    assert {id(parameter) for parameter in model.parameters_by_name().values()} <= {id(tensor) for tensor in before}
    tiny.logits(model, tiny.batch("dinov2"))
    assert len(model.resident()) == len(before) + 1
    model.load(made)
    assert len(model.resident()) == len(before)


def test_the_query_is_charged_as_a_second_forward_pass() -> None:
    """The last block alone: its backward pass aside, a step runs the model twice and not once."""
    sketch = tiny.build("dinov2", device="fake", target_modules=UPPER)
    plain = measured_flops(sketch, planning.train_blocks(sketch.spec, 0, 1, [2]), StepKind())
    pooled = memory.seconds(traced(POOL, False), attachments.suffix_plan(sketch.spec, 0, POOL, 2), 1.0, 1)
    assert 1.3 * plain < pooled < 2.2 * plain


def measured_flops(sketch: AdaptedModel, plan: Plan, kind: StepKind) -> float:
    profile = memory.trace_plans(
        lambda plan, size: sketch.program(plan, SETTINGS, size, kind), sketch.spec, [plan], batch=4, sizes=(4,)
    )
    (whole,) = profile.plans.values()
    return float(whole.flops)


@cache
def toy_profile() -> MemoryProfile:
    program = partial(toy.program, kind=StepKind(attachment=POOL))
    return memory.trace_attached(program, toy.spec(), POOL, batch=8, micro_batches=(8, 4), checkpointing=False)


def test_budgets_give_suffixes_and_whom_the_least_does_not_fit_is_left_out() -> None:
    profile, spec = toy_profile(), toy.spec()
    whole, halves = (
        [memory.peak_bytes(profile, plan) for plan in memory.candidates(spec, POOL, 8, size, False)] for size in (8, 4)
    )
    assert whole == sorted(whole, reverse=True)
    least = min(*whole, *halves)
    cohort = [ClientProfile(k, 5, budget) for k, budget in enumerate((whole[0], whole[0] - 1, least, least - 1))]
    ample, less, smallest, absent = planning.largest_suffixes(profile, cohort, spec, POOL)
    assert isinstance(ample, Plan)
    assert isinstance(less, Plan)
    assert isinstance(smallest, Plan)
    assert planning.trained_blocks(spec, ample) == (0, 1, 2)
    assert ample.micro_batch is None
    assert planning.trained_blocks(spec, less) == ((0, 1, 2) if halves[0] < whole[0] else (1, 2))
    assert planning.trained_blocks(spec, smallest)[-1] == 2
    assert isinstance(absent, LeftOut)
    assert absent.needed_bytes == least


def test_a_plan_that_was_not_traced_is_refused() -> None:
    profile, spec = toy_profile(), toy.spec()
    for stranger in (replace(POOL, size=6), LORAS):
        with pytest.raises(PlanError, match="must be one that was traced"):
            memory.peak_bytes(profile, attachments.suffix_plan(spec, 0, stranger, 1))
    with pytest.raises(PlanError, match="must be one that was traced"):
        memory.peak_bytes(profile, replace(attachments.suffix_plan(spec, 0, POOL, 1), micro_batch=1))


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused() -> None:
    program = partial(toy.program, kind=StepKind(attachment=POOL))
    with pytest.raises(PlanError, match="a micro-batch must divide the batch of 8, got 3"):
        memory.trace_attached(program, toy.spec(), POOL, batch=8, micro_batches=(3,))
