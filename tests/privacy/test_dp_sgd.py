"""Clipping by example, noise and sampling, on real small models, and the memory that they take."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from tests import tiny
from torch import nn

from fedpilot import lora, memory, privacy, tensors, training
from fedpilot.client import ClientModel
from fedpilot.errors import ModelError, PlanError
from fedpilot.model import AdaptedModel
from fedpilot.privacy import NoisySum
from fedpilot.training import Batch, TrainingSettings
from fedpilot.types import ExampleDP, Plan, Projection, StepKind, Task

FAMILIES = ("bert", "llama", "gpt2", "vit")
NO_NOISE = StepKind(("B",), ExampleDP(math.inf, 0.0))
PRIVATE = StepKind(("B",), ExampleDP(0.5, 1.3))
SETTINGS = TrainingSettings(learning_rate=0.1, optimiser="sgd", batch_size=4, max_grad_norm=1e-3)


def task_of_b(model: AdaptedModel, **plan: object) -> Task:
    """B of every module and the head, at unlike ranks."""
    ranks = tiny.mixed_ranks(model)
    return tiny.task(model, ranks, [*map(lora.b_name, ranks), *model.spec.head], **plan)  # type: ignore[arg-type]


def loaded(model: AdaptedModel, **plan: object) -> dict[str, nn.Parameter]:
    """What is trained, live; dropout off."""
    task = task_of_b(model, **plan)
    model.load(task)
    model.base.eval()
    return {name: p for name, p in model.parameters_by_name().items() if name in task.plan.trainable}


def sum_of_clipped(model: AdaptedModel, pieces: list[Batch], private: ExampleDP, seed: int = 0) -> tensors.Tensors:
    """What the optimiser gets for these pieces, times the expected batch size of 1."""
    parameters = loaded(model)
    noisy = NoisySum(model.base, parameters, private, expected_examples=1.0, seed=seed)
    training.private_step(model.loss, pieces, torch.optim.SGD(parameters.values(), lr=0.0), noisy, "float32")
    return {name: total.clone() for name, total in zip(parameters, noisy.sums, strict=True)}


def one_by_one(model: AdaptedModel, batch: Batch) -> list[tensors.Tensors]:
    """Gradient of each example's own mean loss, from a backward pass of its own."""
    parameters = loaded(model)
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(batch["labels"].shape[0])]
    return [
        dict(zip(parameters, torch.autograd.grad(model.loss(row), list(parameters.values())), strict=True))
        for row in rows
    ]


def close(found: tensors.Tensors, expected: tensors.Tensors, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert tensors.norm(tensors.subtract(found, expected)) <= tolerance * tensors.norm(expected)


# --- one step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [None, 2])
def test_clipped_gradients_are_those_of_one_backward_pass_an_example(family: str, cut: int | None) -> None:
    model, batch = tiny.shared(family), tiny.batch(family, 5)
    single = one_by_one(model, batch)
    norms = sorted(map(tensors.norm, single))
    assert norms[-1] > 1.05 * norms[0]
    clip = (norms[1] + norms[2]) / 2  # some are clipped and some are not
    expected = {
        name: sum(g[name] * min(1.0, clip / tensors.norm(g)) for g in single)  # type: ignore[misc]
        for name in single[0]
    }
    close(sum_of_clipped(model, training.micro_batches(batch, cut), ExampleDP(clip, 0.0)), expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_changing_one_example_in_any_way_moves_the_sum_by_at_most_two_clips(family: str) -> None:
    model, batch, clip = tiny.shared(family), tiny.batch(family, 5), 0.01
    before = sum_of_clipped(model, [batch], ExampleDP(clip, 0.0))
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["input_ids"][2] = (other["input_ids"][2] * 7 + 5) % tiny.WORDS
    other["labels"][2] = other["input_ids"][2] if family == "llama" else (other["labels"][2] + 1) % tiny.NUM_LABELS
    if family == "llama":
        other["labels"][2, 3:] = training.IGNORED  # fewer words: the others must not feel their number
    moved = tensors.norm(tensors.subtract(sum_of_clipped(model, [other], ExampleDP(clip, 0.0)), before))
    assert 0.1 * clip < moved <= 2 * clip * (1 + 1e-4)
    without = {name: tensor[[0, 1, 3, 4]] for name, tensor in batch.items()}
    moved = tensors.norm(tensors.subtract(sum_of_clipped(model, [without], ExampleDP(clip, 0.0)), before))
    assert 0.9 * clip < moved <= clip * (1 + 1e-4)


def test_the_sum_is_that_of_opacus_own_optimiser() -> None:
    model, batch = tiny.shared("bert"), tiny.batch("bert", 5)
    single, clip = one_by_one(model, batch), 0.3
    parameters = loaded(model)
    theirs = DPOptimizer(
        torch.optim.SGD(parameters.values(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=3,
    )
    for name, parameter in parameters.items():
        parameter.grad_sample = torch.stack([gradient[name] for gradient in single])  # type: ignore[attr-defined]
    theirs.pre_step()
    expected = {name: parameter.grad * 3 for name, parameter in parameters.items()}  # type: ignore[operator]
    close(sum_of_clipped(model, [batch], ExampleDP(clip, 0.0)), expected)


def test_noise_has_the_deviation_asked_for_and_follows_from_its_seed() -> None:
    model = tiny.shared("vit")
    first, again, other = (sum_of_clipped(model, [], ExampleDP(0.5, 3.0), seed) for seed in (1, 1, 2))
    entries = torch.cat([tensor.flatten() for tensor in first.values()])
    assert entries.numel() > 400
    assert float(entries.std()) == pytest.approx(1.5, rel=0.1)
    assert abs(float(entries.mean())) < 0.2
    assert tensors.digest(first) == tensors.digest(again) != tensors.digest(other)


def test_two_steps_have_noise_of_their_own() -> None:
    model = tiny.shared("vit")
    parameters = loaded(model)
    noisy = NoisySum(model.base, parameters, ExampleDP(1.0, 1.0), expected_examples=2.0)
    draws = []
    for _ in range(2):
        noisy.start()
        draws.append(noisy.sums[0].clone())
    assert not torch.equal(*draws)


def test_the_gradient_is_over_the_expected_batch_whatever_was_drawn() -> None:
    model, batch = tiny.shared("vit"), tiny.batch("vit", 5)
    whole = sum_of_clipped(model, [batch], ExampleDP(0.5, 0.0))
    parameters = loaded(model)
    noisy = NoisySum(model.base, parameters, ExampleDP(0.5, 0.0), expected_examples=2.5)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    training.private_step(model.loss, [batch], torch.optim.SGD(parameters.values(), lr=1.0), noisy, "float32")
    moved = {name: start[name] - parameter.detach() for name, parameter in parameters.items()}
    close(moved, tensors.scale(whole, 1 / 2.5), 1e-4)


def test_under_bf16_autocast_clipping_is_still_exact() -> None:
    model, batch, clip = tiny.shared("bert"), tiny.batch("bert", 5), 0.01
    parameters = loaded(model)
    noisy = NoisySum(model.base, parameters, ExampleDP(clip, 0.0), expected_examples=1.0)
    optimiser = torch.optim.SGD(parameters.values(), lr=0.0)
    one = {name: tensor[:1] for name, tensor in batch.items()}
    training.private_step(model.loss, [one], optimiser, noisy, "bf16")
    total = dict(zip(parameters, noisy.sums, strict=True))
    assert all(tensor.dtype == torch.float32 for tensor in total.values())
    assert tensors.norm(total) == pytest.approx(clip, rel=1e-3)


# --- refusals -----------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A layer of a type that nobody knows a formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_a_layer_without_a_formula_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Scaled())
    with pytest.raises(ModelError, match=r"1\.factor in a Scaled"):
        NoisySum(model, dict(model.named_parameters()), ExampleDP(1.0, 1.0), expected_examples=4.0)


def test_noise_without_a_clip_is_refused() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ModelError, match="clip must be finite"):
        NoisySum(model, dict(model.named_parameters()), ExampleDP(math.inf, 1.0), expected_examples=4.0)


def test_privacy_beside_a_penalty_or_a_projection_is_refused_and_names_who_can() -> None:
    model = tiny.shared("vit")
    parameters = loaded(model)
    noisy = model.noisy_sum(parameters, PRIVATE, 4.0)
    with pytest.raises(PlanError, match="got a penalty too; choose ffa-lora"):
        training.make_step(
            model.loss, parameters, SETTINGS, 0.1, penalty=lambda t: torch.zeros(()), kind=PRIVATE, noisy=noisy
        )
    both = replace(PRIVATE, projection=Projection(1, 1, 1.0))
    with pytest.raises(PlanError, match="got a projection of gradients too"):
        training.make_step(model.loss, parameters, SETTINGS, 0.1, kind=both, noisy=noisy)


# --- a client's local update --------------------------------------------------------------------------------------


def fit(family: str, kind: StepKind, *, count: int = 10, seed: int = 1, settings: TrainingSettings = SETTINGS, **plan):
    adapted = tiny.shared(family)
    model = ClientModel(
        adapted, tiny.examples(family, count), settings, learning_rate=settings.learning_rate, seed=seed, **plan
    )
    task = task_of_b(adapted)
    model.load(task)
    metrics = model.fit(task.plan.trainable, kind=kind)
    return tensors.only(model.read(), task.plan.trainable), dict(metrics), task


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_without_noise_and_clip_it_is_plain_training_on_the_same_batches(family: str) -> None:
    """Not in the norm of a step either: with privacy on, ``max_grad_norm`` clips nothing."""
    adapted = tiny.build(family, dropout=0.0)
    settings, examples = replace(SETTINGS, local_epochs=3), tiny.examples(family, 10)
    model = ClientModel(adapted, examples, settings, learning_rate=0.1, seed=5)
    task = task_of_b(adapted)
    model.load(task)
    model.fit(task.plan.trainable, kind=NO_NOISE)
    found = tensors.only(model.read(), task.plan.trainable)

    adapted.load(task)
    adapted.base.train()
    live = {name: p for name, p in adapted.parameters_by_name().items() if name in task.plan.trainable}
    order_seed = int(np.random.SeedSequence(5).generate_state(1)[0])
    generator = torch.Generator().manual_seed(order_seed)
    sizes = []
    for drawn in privacy.poisson_draws(10, 0.4, 9, generator):
        sizes.append(len(drawn))
        gradients = {name: torch.zeros_like(p) for name, p in live.items()}
        for index in drawn:
            (row,) = examples.subset([index]).batches(1)
            for name, g in zip(live, torch.autograd.grad(adapted.loss(row), list(live.values())), strict=True):
                gradients[name] += g / 4  # the mean over the expected batch
        with torch.no_grad():
            for name, parameter in live.items():
                parameter -= 0.1 * gradients[name]
    assert len(set(sizes)) > 2
    close(found, {name: p.detach() for name, p in live.items()}, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_private_fit_follows_from_its_seed_alone_and_touches_no_a(family: str) -> None:
    results = []
    for ambient, seed in ((0, 1), (5, 1), (5, 2)):
        torch.manual_seed(ambient)
        results.append(fit(family, PRIVATE, seed=seed))
    digests = [tensors.digest(trained) for trained, _, _ in results]
    assert digests[0] == digests[1] != digests[2]
    adapted, task = tiny.shared(family), results[-1][2]
    frozen = {name: t for name, t in adapted.read().items() if name not in task.plan.trainable}
    assert frozen
    assert all(torch.equal(tensor, task.tensors[name]) for name, tensor in frozen.items())


def test_it_takes_the_planned_steps_and_says_at_what_rate() -> None:
    _, metrics, _ = fit("vit", PRIVATE, settings=replace(SETTINGS, local_epochs=2))
    assert metrics["steps"] == 6.0  # 2 epochs of 10 examples in batches of 4
    assert metrics["sample_rate"] == 0.4
    _, metrics, _ = fit("vit", PRIVATE, settings=replace(SETTINGS, local_epochs=2, max_steps=5))
    assert metrics["steps"] == 5.0
    _, metrics, _ = fit("vit", PRIVATE, count=3)
    assert (metrics["steps"], metrics["sample_rate"], metrics["examples"]) == (1.0, 1.0, 3.0)


def test_a_step_whose_draw_is_empty_is_noise_alone() -> None:
    rows = replace(SETTINGS, batch_size=1, max_steps=1)
    for seed in range(40):
        trained, metrics, task = fit("vit", PRIVATE, seed=seed, settings=rows)
        if not metrics["examples"]:
            break
    assert metrics["examples"] == 0.0
    assert math.isnan(metrics["loss"])
    moved = tensors.subtract(trained, tensors.only(task.tensors, task.plan.trainable))
    assert all(bool((tensor != 0).all()) for tensor in moved.values())


def test_poisson_draws_take_each_example_by_itself() -> None:
    draws = list(privacy.poisson_draws(50, 0.1, 2000, torch.Generator().manual_seed(3)))
    sizes = np.array([len(drawn) for drawn in draws])
    assert sizes.mean() == pytest.approx(5.0, rel=0.05)
    assert sizes.var() == pytest.approx(4.5, rel=0.15)  # n q (1 - q)
    assert sizes.min() == 0
    taken = np.bincount(np.concatenate(draws).astype(int), minlength=50)
    assert taken.min() > 130
    assert taken.max() < 270
    assert all(drawn == list(range(4)) for drawn in privacy.poisson_draws(4, 1.0, 3, torch.Generator()))


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_a_private_steps_peak_is_predicted_to_the_byte(family: str) -> None:
    settings = replace(SETTINGS, optimiser="adamw")
    sketch, model = tiny.build(family, device="fake"), tiny.shared(family)
    profile = memory.trace(
        lambda plan, micro: sketch.program(plan, settings, micro, PRIVATE),
        sketch.spec,
        batch=4,
        micro_batches=(2, 4),
        patterns=("B",),
        checkpointing=family == "vit",
    )
    plain = memory.trace(
        lambda plan, micro: sketch.program(plan, settings, micro),
        sketch.spec,
        batch=4,
        patterns=("B",),
        checkpointing=False,
    )
    rng = np.random.default_rng(1)
    for index in range(8):
        largest = 300 if index % 2 else 7  # by examples, gradients of large ranks outweigh the activations
        ranks = {module: int(rng.integers(1, largest)) for module in model.spec.modules}
        first = index % model.spec.num_blocks
        modules = lora.blocks_modules(model.spec, range(first, model.spec.num_blocks))
        trainable = frozenset(map(lora.b_name, modules)) | frozenset(model.spec.head)
        plan = Plan(0, ranks, trainable, micro_batch=2 if index in (2, 3) else None)
        if index == 4 and family == "vit":
            plan = replace(plan, checkpointed=frozenset(range(first, model.spec.num_blocks)))
        peak = memory.peak_bytes(profile, plan)
        assert peak == memory.measure_peak(model.program(plan, settings, kind=PRIVATE))
        if plan.micro_batch is None and index % 2:
            assert peak > memory.peak_bytes(plain, plan) + sum(ranks.values())


def test_a_draw_larger_than_the_batch_keeps_the_predicted_peak() -> None:
    settings = replace(SETTINGS, optimiser="adamw", local_epochs=4)
    sketch, adapted = tiny.build("vit", device="fake"), tiny.shared("vit")
    profile = memory.trace(
        lambda plan, micro: sketch.program(plan, settings, micro, PRIVATE),
        sketch.spec,
        batch=4,
        patterns=("B",),
        checkpointing=False,
    )
    draws, peaks = [], []
    for seed in range(3):
        _, metrics, task = fit("vit", PRIVATE, seed=seed, settings=settings, measured=set())
        draws.append(metrics["examples"])
        peaks.append(metrics["peak_bytes"])
    order_seed = int(np.random.SeedSequence(0).generate_state(1)[0])
    sizes = list(map(len, privacy.poisson_draws(10, 0.4, 12, torch.Generator().manual_seed(order_seed))))
    assert max(sizes) > 4
    assert max(peaks) == memory.peak_bytes(profile, task.plan)
    assert adapted.plan is task.plan
