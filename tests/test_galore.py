"""GaLore's optimiser by hand, weights that are trained whole and given back, and the bytes of both."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from fedpilot import base_deltas, exchange, galore, lora, memory, tensors, training
from fedpilot.client import ClientModel
from fedpilot.errors import ModelError, PlanError, TrainingError, UploadError
from fedpilot.galore import GaLoreAdamW
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel
from fedpilot.training import TrainingSettings
from fedpilot.types import BaseDelta, Deployment, ModelSpec, Plan, Projection, StepKind, Task, Upload
from tests import tiny

SHAPES = [(7, 5), (5, 7)]
both_ways = pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide"])


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(
    shape: tuple[int, int], count: int, *, rank: int, gap: int = 200, scale: float = 0.25, **options: float
) -> tuple[torch.Tensor, torch.Tensor, GaLoreAdamW, nn.Parameter]:
    """First and last bits of a matrix under so many steps with unlike gradients."""
    weight = nn.Parameter(random_matrix(*shape))
    start = weight.detach().clone()
    optimiser = GaLoreAdamW([weight], [], Projection(rank, gap, scale), learning_rate=0.1, **options)
    for step in range(count):
        weight.grad = random_matrix(*shape, seed=1 + step)
        optimiser.step()
    return start, weight.detach(), optimiser, weight


def rank_of(matrix: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-10))


# --- the optimiser ------------------------------------------------------------------------------------------------


@both_ways
def test_with_one_projector_the_change_lies_in_its_span_and_is_the_product_of_the_factors(
    shape: tuple[int, int],
) -> None:
    start, end, optimiser, weight = steps(shape, 6, rank=2, gap=6)
    change = end - start
    pair = optimiser.factors(weight)
    assert pair is not None
    left, right = pair
    assert (left.shape, right.shape) == ((shape[0], 2), (2, shape[1]))
    torch.testing.assert_close(left @ right, change, rtol=1e-12, atol=1e-14)
    assert rank_of(change) == 2
    q = right.T if shape[0] >= shape[1] else left  # (small, rank), orthonormal
    torch.testing.assert_close(q.T @ q, torch.eye(2, dtype=torch.float64))
    inside = change @ q @ q.T if shape[0] >= shape[1] else q @ q.T @ change
    torch.testing.assert_close(inside, change, rtol=1e-12, atol=1e-14)


@both_ways
def test_each_further_projector_adds_at_most_its_rank(shape: tuple[int, int]) -> None:
    start, end, optimiser, weight = steps(shape, 6, rank=2, gap=3)
    assert rank_of(end - start) == 4
    assert optimiser.factors(weight) is None


def test_the_projector_spans_the_first_singular_vectors_of_the_gradient_of_every_gap_th_step() -> None:
    for count, seed in ((1, 1), (3, 1), (4, 4), (6, 4), (7, 7)):
        _, _, optimiser, weight = steps((7, 5), count, rank=2, gap=3)
        projector = optimiser.state[weight]["projector"]
        _, _, right = torch.linalg.svd(random_matrix(7, 5, seed=seed))
        torch.testing.assert_close((projector @ right[:2].T).abs(), torch.eye(2, dtype=torch.float64))


def test_at_full_rank_and_scale_one_it_is_adamw_in_the_rotated_basis() -> None:
    """X = W Qᵀ goes as under torch's AdamW with gradients G Qᵀ; the two differ in where ε stands, so it is nothing."""
    start, end, optimiser, weight = steps((7, 5), 4, rank=5, scale=1.0, eps=0.0)
    projector = optimiser.state[weight]["projector"]
    rotated = nn.Parameter(start @ projector.T)
    reference = torch.optim.AdamW([rotated], lr=0.1, weight_decay=0.0, eps=0.0)
    for step in range(4):
        rotated.grad = random_matrix(7, 5, seed=1 + step) @ projector.T
        reference.step()
    torch.testing.assert_close(end, rotated.detach() @ projector, rtol=1e-10, atol=1e-12)


def test_two_steps_by_hand() -> None:
    """One entry of each kind: rank 1 of a (2, 1) matrix, Q = ±1, so that Q cancels."""
    weight = nn.Parameter(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    optimiser = GaLoreAdamW([weight], [], Projection(1, 200, 0.25), learning_rate=0.1, eps=0.5)
    moved = 0.0
    m = v = 0.0
    for t, gradient in ((1, 3.0), (2, -1.0)):
        weight.grad = torch.tensor([[gradient], [0.0]], dtype=torch.float64)
        optimiser.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        moved += 0.25 * 0.1 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v**0.5 + 0.5)
    assert weight[0, 0].item() == pytest.approx(1 - moved, rel=1e-12)
    assert weight[1, 0].item() == 2.0


def test_moments_stay_as_they_are_when_the_projector_is_renewed() -> None:
    _, _, before, weight = steps((7, 5), 3, rank=2, gap=3)
    mean, square = before.state[weight]["exp_avg"], before.state[weight]["exp_avg_sq"]
    _, _, after, renewed = steps((7, 5), 4, rank=2, gap=3)
    moment = random_matrix(7, 5, seed=4) @ after.state[renewed]["projector"].T
    torch.testing.assert_close(after.state[renewed]["exp_avg"], 0.9 * mean + 0.1 * moment)
    torch.testing.assert_close(after.state[renewed]["exp_avg_sq"], 0.999 * square + 0.001 * moment**2)


def test_a_wide_matrix_goes_as_its_transpose_does() -> None:
    tall, wide = nn.Parameter(random_matrix(7, 5)), nn.Parameter(random_matrix(7, 5).T.contiguous())
    for weight in (tall, wide):
        optimiser = GaLoreAdamW([weight], [], Projection(2, 2, 0.25), learning_rate=0.1)
        for step in range(3):
            gradient = random_matrix(7, 5, seed=step)
            weight.grad = gradient if weight is tall else gradient.T.contiguous()
            optimiser.step()
    torch.testing.assert_close(tall.detach(), wide.detach().T)


def test_decay_comes_after_the_step_and_leaves_no_factors() -> None:
    start, plain, _, _ = steps((7, 5), 1, rank=2)
    _, decayed, optimiser, weight = steps((7, 5), 1, rank=2, weight_decay=0.3)
    torch.testing.assert_close(decayed, plain * (1 - 0.1 * 0.3))
    assert optimiser.factors(weight) is None
    assert rank_of(decayed - start) == 5


@pytest.mark.parametrize("rates", [{"learning_rate": 0.1}, {"learning_rate": 0.5, "plain_learning_rate": 0.1}], ids=str)
def test_tensors_that_are_not_projected_go_as_under_torchs_adamw_bit_for_bit(rates: dict[str, float]) -> None:
    ours, theirs = (nn.Parameter(random_matrix(3, 4).float()) for _ in range(2))
    one = GaLoreAdamW([], [ours], Projection(2, 200, 0.25), weight_decay=0.2, **rates)
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, foreach=False, fused=False)
    for step in range(3):
        for parameter, optimiser in ((ours, one), (theirs, other)):
            parameter.grad = random_matrix(3, 4, seed=step).float()
            optimiser.step()
    assert torch.equal(ours, theirs)


@both_ways
@pytest.mark.parametrize(("decay", "wide_states"), [(0.0, 3), (0.1, 2)])
def test_the_state_is_the_projector_two_moments_and_without_decay_the_sum_of_all_steps(
    shape: tuple[int, int], decay: float, wide_states: int
) -> None:
    _, _, optimiser, weight = steps(shape, 2, rank=3, weight_decay=decay)
    assert tensors.num_bytes(optimiser.state[weight]) == 8 * (wide_states * 3 * 7 + 3 * 5)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_above_the_smaller_side_is_refused_with_the_largest_allowed(rank: int) -> None:
    weights = [nn.Parameter(random_matrix(7, 9)), nn.Parameter(random_matrix(5, 8))]
    with pytest.raises(PlanError, match=rf"must lie in 1\.\.5, .* got {rank}; choose at most 5"):
        GaLoreAdamW(weights, [], Projection(rank, 200, 0.25), learning_rate=0.1)


def test_a_gradient_that_is_not_finite_is_a_failure_of_the_client() -> None:
    weight = nn.Parameter(random_matrix(7, 5))
    weight.grad = torch.full((7, 5), torch.nan, dtype=torch.float64)
    with pytest.raises(TrainingError, match="gradients must be finite for a projector"):
        GaLoreAdamW([weight], [], Projection(2, 200, 0.25), learning_rate=0.1).step()


def test_only_adamw_can_be_projected() -> None:
    settings = TrainingSettings(learning_rate=0.1, optimiser="sgd")
    kind = StepKind(("W",), projection=Projection(2, 200, 0.25))
    with pytest.raises(PlanError, match="optimiser must be adamw where gradients are projected, got sgd"):
        training.make_step(lambda batch: batch["x"], {"w": nn.Parameter(torch.zeros(3, 2))}, settings, 0.1, kind=kind)


def test_other_optimisers_have_no_factors() -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    assert galore.factors(torch.optim.SGD([weight], lr=0.1), {"w": weight}) == {}


# --- weights that are trained whole -------------------------------------------------------------------------------

FAMILIES = ("bert", "vit", "llama", "gpt2")


def kind_of(rank: int, gap: int = 200) -> StepKind:
    return StepKind(("W",), projection=Projection(rank, gap, 0.25))


def plan_of(spec: ModelSpec, blocks: Sequence[int], **changes: object) -> Plan:
    names = map(base_deltas.weight_name, lora.blocks_modules(spec, blocks))
    return Plan(0, {}, frozenset(names) | frozenset(spec.head), **changes)  # type: ignore[arg-type]


@cache
def model_of(family: str, device: str = "cpu") -> AdaptedModel:
    return tiny.build(family, device=device)


def fitted(
    family: str, task: Task, *, rank: int = 3, gap: int = 200, **changes: float
) -> tuple[tensors.Tensors, ClientModel]:
    """What a client reads after three steps, and the client, whose turn lasts until the next load."""
    settings = TrainingSettings(learning_rate=0.02, batch_size=4, **changes)  # type: ignore[arg-type]
    client = ClientModel(model_of(family), tiny.examples(family), settings, learning_rate=0.02, seed=1)
    client.load(task)
    client.fit(task.plan.trainable, kind=kind_of(rank, gap))
    return client.read(), client


def bits(model: AdaptedModel) -> dict[str, str]:
    """Digest of each weight of the base, head left out."""
    head = {id(model.parameters_by_name()[name]) for name in model.spec.head}
    return {n: tensors.digest({"": p}) for n, p in model.base.named_parameters() if id(p) not in head}


def task_of(family: str, blocks: Sequence[int], base: BaseDelta | None = None) -> Task:
    spec = model_of(family).spec
    return Task(plan_of(spec, blocks), spec.head, base or BaseDelta())


def random_step(spec: ModelSpec, seed: int) -> tensors.Tensors:
    """A change of every adapted weight, (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    modules = spec.modules.items()
    return {base_deltas.weight_name(m): 0.1 * torch.randn(shape, generator=generator) for m, shape in modules}


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_gives_the_change_as_out_by_in_and_the_next_load_gives_the_first_bits_back(family: str) -> None:
    model = model_of(family)
    model.deploy(Deployment(model.spec.head))
    before = bits(model)
    read, _ = fitted(family, task_of(family, [1, 2]))
    changed = {name for name, digest in bits(model).items() if digest != before[name]}
    modules = lora.blocks_modules(model.spec, [1, 2])
    assert changed == {base_deltas.weight_name(module) for module in modules}
    live = {module: model.base.get_submodule(module).weight.detach().clone() for module in modules}
    model.deploy(Deployment(model.spec.head))
    assert bits(model) == before
    for module in modules:
        change = read[base_deltas.weight_name(module)]
        assert (tuple(change.shape), change.dtype) == (model.spec.modules[module], torch.float32)
        assert change.abs().max() > 0
        start = model.base.get_submodule(module).weight.detach()
        assert torch.equal(live[module] - start, change.T if family == "gpt2" else change)


def test_what_one_client_trained_never_leaks_into_the_next_even_when_it_failed() -> None:
    """Both work on the shared base with a change of their run; the second's start is compared bit for bit."""
    model = model_of("bert")
    base = base_deltas.extended(BaseDelta(), random_step(model.spec, 1))
    task = task_of("bert", [10, 11], base)
    model.load(task)
    start = bits(model)
    fitted("bert", task)
    assert bits(model) != start
    settings = TrainingSettings(learning_rate=0.02, batch_size=4, max_grad_norm=None)
    client = ClientModel(model, tiny.examples("bert"), settings, learning_rate=0.02, seed=1)
    client.load(task)
    assert bits(model) == start
    factors = iter([1.0, 1.0, torch.nan])
    with pytest.raises(TrainingError, match="finite for a projector"):
        client.fit(
            task.plan.trainable,
            penalty=lambda live: next(factors) * torch.stack([p.sum() for p in live.values()]).sum(),
            kind=kind_of(3, 1),
        )
    assert bits(model) != start
    model.load(task)
    assert bits(model) == start
    assert not any(p.requires_grad or p.grad is not None for n, p in model.base.named_parameters() if "layer.0." in n)
    model.load(task_of("bert", [0], base_deltas.extended(base, random_step(model.spec, 2))))
    model.load(task)
    assert bits(model) == start


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_factors_that_a_client_reads_are_the_dense_change(family: str) -> None:
    """Equal to 1e-6 of the weight: the dense change is a difference of weights that were rounded at each step."""
    model = model_of(family)
    read, _ = fitted(family, task_of(family, [1, 2]), rank=3, gap=3)
    for module in lora.blocks_modules(model.spec, [1, 2]):
        out_features, in_features = model.spec.modules[module]
        a, b = read[base_deltas.a_name(module)], read[base_deltas.b_name(module)]
        assert (tuple(a.shape), tuple(b.shape)) == ((3, in_features), (out_features, 3))
        dense = read[base_deltas.weight_name(module)]
        weight = float(model.base.get_submodule(module).weight.detach().norm())
        assert float((b @ a - dense).norm()) <= 1e-6 * weight
        assert float(dense.norm()) > 1e-3 * weight


@pytest.mark.parametrize("changes", [{"gap": 2}, {"weight_decay": 0.1}])
def test_a_second_projector_or_decay_leaves_the_dense_change_alone(changes: dict[str, float]) -> None:
    read, _ = fitted("vit", task_of("vit", [2]), **changes)  # type: ignore[arg-type]
    assert read.keys() == task_of("vit", [2]).plan.trainable


def test_factors_are_those_of_the_last_load() -> None:
    task = task_of("vit", [2])
    read, client = fitted("vit", task)
    assert any(name.endswith(".base_A") for name in read)
    client.load(task)
    assert not any(name.endswith(".base_A") for name in client.read())


def test_a_client_follows_the_optimiser_bit_for_bit() -> None:
    """The same steps by hand over the same batches."""
    model, task = tiny.build("vit"), task_of("vit", [1, 2])
    read, _ = fitted("vit", task, max_grad_norm=None)  # type: ignore[arg-type]
    model.load(task)
    live = model.parameters_by_name()
    starts = {name: parameter.detach().clone() for name, parameter in live.items()}
    whole = [parameter for name, parameter in live.items() if name not in model.spec.head]
    head = [live[name] for name in model.spec.head]
    optimiser = GaLoreAdamW(whole, head, Projection(3, 200, 0.25), learning_rate=0.02)
    order = torch.Generator().manual_seed(int(_order_seed(1)))
    model.base.train()
    for batch in tiny.examples("vit").batches(4, order):
        optimiser.zero_grad()
        model.loss(batch).backward()
        optimiser.step()
    for name, parameter in live.items():
        expected = parameter.detach() - starts[name] if name not in model.spec.head else parameter.detach()
        assert torch.equal(read[name], expected)


def _order_seed(seed: int) -> int:
    """Of a client's batches, as `ClientModel` takes it from its seed."""
    return int(np.random.SeedSequence(seed).generate_state(2)[0])


def test_a_deployment_of_a_changed_base_needs_no_pairs() -> None:
    model, inputs = model_of("vit"), tiny.batch("vit")
    step = random_step(model.spec, 3)
    model.deploy(Deployment(model.spec.head))
    plain = tiny.logits(model, inputs)
    model.deploy(Deployment(model.spec.head, base_deltas.extended(BaseDelta(), step)))
    assert not torch.equal(tiny.logits(model, inputs), plain)
    assert model.read().keys() == model.spec.head.keys()
    model.deploy(Deployment(model.spec.head))
    assert torch.equal(tiny.logits(model, inputs), plain)


def test_a_weight_is_not_trained_whole_beside_its_pair_nor_outside_the_loaded_blocks() -> None:
    model = model_of("vit")
    module = lora.blocks_modules(model.spec, [1])[0]
    ranks = {module: 2}
    beside = Plan(0, ranks, frozenset({base_deltas.weight_name(module)}))
    outside = replace(plan_of(model.spec, [1]), blocks=(0, 2))
    for plan, start in ((beside, tiny.random_tensors(model, ranks)), (outside, model.spec.head)):
        with pytest.raises(ModelError, match="must lie in a loaded block and have no pair"):
            model.load(Task(plan, start))
    model.load(task_of("vit", [1]))


def test_weights_of_a_bf16_base_are_not_trained() -> None:
    model = tiny.build("llama", dtype="bf16")
    with pytest.raises(ModelError, match=r"must be float32, got torch.bfloat16 .* set model.dtype = 'float32'"):
        model.load(Task(plan_of(model.spec, [2]), model.spec.head))


# --- bytes --------------------------------------------------------------------------------------------------------

BATCH = 4


@cache
def profile_of(family: str, rank: int, **changes: object) -> MemoryProfile:
    model, settings = model_of(family, "fake"), settings_of(family, **changes)
    return memory.trace(
        lambda plan, micro_batch: model.program(plan, settings, micro_batch, kind_of(rank)),
        model.spec,
        batch=settings.batch_size,
        micro_batches=(2, 4) if settings.batch_size == BATCH else (),
        patterns=("W",),
        checkpointing=family == "vit",
    )


def settings_of(family: str, **changes: object) -> TrainingSettings:
    autocast = "bf16" if family == "bert" else "float32"
    settings = TrainingSettings(learning_rate=0.01, batch_size=BATCH, autocast=autocast)  # type: ignore[arg-type]
    return replace(settings, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("gap", [1, 200])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_predicted_peak_is_the_measured_one_to_the_byte(family: str, gap: int) -> None:
    """Random suffixes, also with blocks left out; ranks and gaps of which the profile has seen one."""
    model, rng = model_of(family), random.Random(gap)
    for rank in (3, 9):
        profile = profile_of(family, rank)
        for _ in range(3):
            first = rng.randrange(model.spec.num_blocks)
            blocks = [block for block in range(first, model.spec.num_blocks) if block == first or rng.random() < 0.8]
            kept = frozenset({rng.randrange(model.spec.num_blocks)}) if family == "vit" else frozenset()
            plan = plan_of(model.spec, blocks, checkpointed=kept, micro_batch=rng.choice((2, 4)))
            program = model.program(plan, settings_of(family), kind=kind_of(rank, gap))
            assert memory.peak_bytes(profile, plan) == memory.measure_peak(program)


def test_the_prediction_holds_where_renewing_projectors_is_the_peak() -> None:
    """One image a batch: the vectors of the gradient are larger than all that is kept for the backward pass."""
    changes = {"batch_size": 1, "max_grad_norm": None, "weight_decay": 0.1}
    wide = tiny.build("bert", target_modules=("intermediate.dense", "output.dense"), max_length=1)
    sketch = tiny.build("bert", target_modules=("intermediate.dense", "output.dense"), max_length=1, device="fake")
    settings = settings_of("vit", **changes)
    profile = memory.trace(
        lambda plan, micro_batch: sketch.program(plan, settings, micro_batch, kind_of(2)),
        sketch.spec,
        batch=1,
        patterns=("W",),
        checkpointing=False,
    )
    plan = plan_of(sketch.spec, [11])
    assert memory.breakdown(profile, plan).moment == "optimiser"
    assert memory.peak_bytes(profile, plan) == memory.measure_peak(wide.program(plan, settings, kind=kind_of(2)))
    word = {"input_ids": torch.tensor([5]), "attention_mask": torch.tensor([1]), "labels": torch.tensor(1)}
    rows = tiny.Rows((word, word, word))
    client = ClientModel(wide, rows, settings, learning_rate=0.01, seed=1, measured=set())
    client.load(Task(plan, wide.spec.head))
    assert client.fit(plan.trainable, kind=kind_of(2))["peak_bytes"] == memory.peak_bytes(profile, plan)


def test_the_breakdown_of_whole_weights_adds_up_and_names_their_optimiser_state() -> None:
    profile, spec = profile_of("vit", 3), model_of("vit").spec
    plan = plan_of(spec, [1, 2])
    parts = memory.breakdown(profile, plan)
    named = (parts.weights, parts.head, parts.batch, parts.adapters, parts.optimiser, parts.gradients)
    assert sum(named) + parts.activations == parts.peak == memory.peak_bytes(profile, plan)
    assert parts.adapters == 0
    state = sum(4 * 3 * (3 * max(spec.modules[m]) + min(spec.modules[m])) for m in lora.blocks_modules(spec, [1, 2]))
    head = sum(2 * 4 * tensor.numel() + 4 for tensor in spec.head.values())
    assert parts.optimiser == state + head


def test_a_profile_of_whole_weights_survives_json_and_refuses_what_it_has_not_seen() -> None:
    profile, spec = profile_of("vit", 3), model_of("vit").spec
    again = MemoryProfile.from_json(profile.to_json())
    plan = plan_of(spec, [2])
    assert again.to_json() == profile.to_json()
    assert memory.peak_bytes(again, plan) == memory.peak_bytes(profile, plan)
    module = lora.blocks_modules(spec, [2])[0]
    pair = Plan(0, {module: 2}, frozenset(lora.names([module])) | frozenset(spec.head))
    both = replace(plan, ranks={module: 2})
    for stray, message in ((pair, "in a way that was traced"), (both, "one that the plan holds")):
        with pytest.raises(PlanError, match=message):
            memory.peak_bytes(profile, stray)
    with pytest.raises(PlanError, match="pattern must train pairs, got 'W'"):
        memory.cost_table(profile, (1,), checkpointing=False, pattern="W")


# --- what comes up ------------------------------------------------------------------------------------------------

SHAPE = (5, 4)
WEIGHT, A, B = "m.weight", "m.base_A", "m.base_B"
WHOLE = exchange.whole_weights(ModelSpec({"m": SHAPE}, {"m": 0}, 1, 1.0), kind_of(2))
SENT = {WEIGHT: (SHAPE, torch.float32)}


def uploaded(**shapes: tuple[int, ...]) -> Upload:
    return Upload(0, 3, {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()})


FACTORS_OF_RANK = {rank: {"m__base_A": (rank, 4), "m__base_B": (5, rank)} for rank in (1, 2)}


@pytest.mark.parametrize("good", [{"m__weight": SHAPE}, *FACTORS_OF_RANK.values()])
def test_a_change_comes_up_dense_or_as_factors_of_at_most_the_projections_rank(
    good: dict[str, tuple[int, ...]],
) -> None:
    exchange.check_upload(uploaded(**good), SENT, WHOLE)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"m__weight": (4, 5)}, r"m.weight must have shape \(5, 4\), got \(4, 5\)"),
        ({}, "lacks m.weight, adds none"),
        ({"m__base_A": (2, 4)}, "lacks m.base_B, adds none"),
        ({"m__base_B": (5, 2)}, "lacks m.weight, adds m.base_B"),
        ({"m__base_A": (2, 4), "m__base_B": (5, 2), "m__weight": SHAPE}, "adds m.base_A, m.base_B"),
        ({"m__base_A": (3, 4), "m__base_B": (5, 3)}, r"m.base_A must have shape \(2, 4\), got \(3, 4\)"),
        ({"m__base_A": (2, 4), "m__base_B": (5, 1)}, r"m.base_B must have shape \(5, 2\), got \(5, 1\)"),
        ({"m__base_A": (0, 4), "m__base_B": (5, 0)}, r"m.base_A must have shape \(1, 4\), got \(0, 4\)"),
        ({"m__base_A": (), "m__base_B": (5, 2)}, r"m.base_A must have shape \(1, 4\), got \(\)"),
        ({"m__base_A": (2, 5), "m__base_B": (4, 2)}, r"m.base_A must have shape \(2, 4\), got \(2, 5\)"),
    ],
)
def test_any_other_upload_is_refused(bad: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UploadError, match=message):
        exchange.check_upload(uploaded(**bad), SENT, WHOLE)


@pytest.mark.parametrize("name", [WEIGHT, A, B])
def test_a_change_that_is_not_finite_or_not_float32_is_refused(name: str) -> None:
    good = uploaded(m__weight=SHAPE) if name == WEIGHT else uploaded(m__base_A=(2, 4), m__base_B=(5, 2))
    for broken, message in (
        (torch.full_like(good.tensors[name], torch.nan), f"{name} must be finite"),
        (good.tensors[name].double(), f"{name} must be torch.float32"),
    ):
        with pytest.raises(UploadError, match=message):
            exchange.check_upload(replace(good, tensors={**good.tensors, name: broken}), SENT, WHOLE)


def test_factors_are_refused_where_no_gradient_is_projected() -> None:
    dense = exchange.whole_weights(ModelSpec({"m": SHAPE}, {"m": 0}, 1, 1.0), None)
    exchange.check_upload(uploaded(m__weight=SHAPE), SENT, dense)
    with pytest.raises(UploadError, match=r"lacks m\.weight, adds m\.base_A, m\.base_B"):
        exchange.check_upload(uploaded(m__base_A=(2, 4), m__base_B=(5, 2)), SENT, dense)


def test_a_weight_of_the_base_need_not_go_down_and_any_other_trained_tensor_must() -> None:
    exchange.check_task(Task(Plan(0, {}, frozenset({WEIGHT})), {}), WHOLE)
    with pytest.raises(PlanError, match=r"lacks stranger\.weight"):
        exchange.check_task(Task(Plan(0, {}, frozenset({WEIGHT, "stranger.weight"})), {}), WHOLE)
