import numpy as np
import pytest
import torch

from fedpilot import lora, tensors
from fedpilot.client import ClientModel
from fedpilot.errors import ModelError, TrainingError
from fedpilot.memory import measure_peak
from fedpilot.training import TrainingSettings
from fedpilot.types import Plan, Task
from tests import tiny
from tests.tiny import FAMILIES


def client(family: str, adapted=None, *, count: int = 10, seed: int = 1, **changes) -> ClientModel:
    own = {name: changes.pop(name) for name in ("measured", "subset_seed", "examples") if name in changes}
    settings = TrainingSettings(**{"learning_rate": 0.02, "batch_size": 4, **changes})
    data = own.pop("examples", tiny.examples(family, count))
    return ClientModel(
        adapted or tiny.shared(family), data, settings, learning_rate=settings.learning_rate, seed=seed, **own
    )


def fitted(family: str, **changes) -> tuple[tensors.Tensors, dict[str, float]]:
    model = client(family, **changes)
    adapted = changes.get("adapted") or tiny.shared(family)
    task = tiny.task(adapted, tiny.mixed_ranks(adapted))
    model.load(task)
    metrics = model.fit(task.plan.trainable)
    return model.read(), dict(metrics)


# --- fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fit_changes_what_it_trains_and_not_a_bit_of_anything_else(family: str) -> None:
    adapted = tiny.shared(family)
    ranks = tiny.mixed_ranks(adapted)
    names = {*lora.names(lora.blocks_modules(adapted.spec, [1])), *adapted.spec.head}
    task = tiny.task(adapted, ranks, names)
    model = client(family, adapted)
    model.load(task)
    live = {id(parameter) for parameter in adapted.parameters_by_name().values()}
    frozen = {n: p for n, p in adapted.base.named_parameters() if id(p) not in live}
    before = tensors.digest(frozen)
    model.fit(frozenset(names))
    after = model.read()
    assert {name for name in after if not torch.equal(after[name], task.tensors[name])} == names
    assert tensors.digest(frozen) == before


def test_a_fit_follows_from_its_seed_alone() -> None:
    results = []
    for ambient, seed in ((0, 1), (5, 1), (5, 2)):
        torch.manual_seed(ambient)
        np.random.seed(ambient)
        results.append(tensors.digest(fitted("bert", seed=seed)[0]))
    assert results[0] == results[1] != results[2]


def test_a_fit_leaves_the_global_generator_as_it_found_it() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    fitted("bert")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fit_learns() -> None:
    _, first = fitted("vit", local_epochs=1, learning_rate=0.01)
    _, last = fitted("vit", local_epochs=12, learning_rate=0.01)
    assert last["loss"] < 0.7 * first["loss"]


def test_a_fit_goes_over_every_example_in_each_epoch() -> None:
    _, metrics = fitted("llama", local_epochs=2)
    assert (metrics["steps"], metrics["examples"]) == (6.0, 20.0)
    assert metrics["seconds"] > 0
    assert "peak_bytes" not in metrics


@pytest.mark.parametrize(("cap", "steps", "examples"), [(2, 2.0, 8.0), (4, 4.0, 14.0), (99, 6.0, 20.0)])
def test_the_cap_on_steps_holds_across_epochs(cap: int, steps: float, examples: float) -> None:
    _, metrics = fitted("vit", local_epochs=2, max_steps=cap)
    assert (metrics["steps"], metrics["examples"]) == (steps, examples)


def test_a_client_smaller_than_a_batch_takes_one_step() -> None:
    _, metrics = fitted("bert", count=2)
    assert (metrics["steps"], metrics["examples"]) == (1.0, 2.0)


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_micro_batches_and_recomputing_do_not_change_what_is_learnt(family: str) -> None:
    adapted = tiny.build(family, dropout=0.0)
    ranks = tiny.mixed_ranks(adapted)
    results = []
    for plan in ({}, {"micro_batch": 3}, {"checkpointed": frozenset({0, 2})}):
        task = tiny.task(adapted, ranks, **plan)
        model = client(family, adapted, optimiser="sgd")
        model.load(task)
        model.fit(task.plan.trainable)
        results.append(model.read())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-5)
    assert tensors.digest(results[2]) == tensors.digest(results[0])


def test_the_penalty_sees_live_tensors_and_pulls_on_them() -> None:
    adapted = tiny.shared("vit")
    task = tiny.task(adapted, tiny.mixed_ranks(adapted))
    norms = []
    for weight in (0.0, 50.0):
        model = client("vit", adapted, optimiser="sgd")
        model.load(task)
        model.fit(
            task.plan.trainable,
            penalty=lambda live, weight=weight: weight * sum(t.square().sum() for t in live.values()),
        )
        norms.append(tensors.norm(model.read()))
    assert norms[1] < norms[0]


def test_the_measured_peak_is_that_of_a_step_on_full_length_examples() -> None:
    adapted = tiny.build("llama")
    words = torch.arange(3, 3 + tiny.LENGTH)
    row = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}
    rows = tiny.Rows((row,) * 7 + ({name: tensor[:4] for name, tensor in row.items()},))
    ranks = tiny.mixed_ranks(adapted)
    trained = frozenset(lora.names(lora.blocks_modules(adapted.spec, [1, 2])))
    task = tiny.task(adapted, ranks, trained)
    model = client("llama", adapted, examples=rows, measured=set(), local_epochs=2)
    model.load(task)
    measured = model.fit(trained)["peak_bytes"]
    unmeasured = client("llama", adapted, examples=rows, local_epochs=2)
    learnt = model.read()
    unmeasured.load(task)
    unmeasured.fit(trained)
    assert tensors.digest(unmeasured.read()) == tensors.digest(learnt)
    program = adapted.program(task.plan, TrainingSettings(learning_rate=0.1, batch_size=4))
    # Here no example has padding, so that the fused attention needs no mask: less than predicted, never more.
    assert 0.95 * measure_peak(program) < measured <= measure_peak(program)


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_a_training_error() -> None:
    data = tiny.examples("vit")
    data.tensors[3]["pixel_values"].fill_(torch.inf)
    adapted = tiny.shared("vit")
    model = client("vit", adapted, examples=data)
    task = tiny.task(adapted, tiny.mixed_ranks(adapted))
    model.load(task)
    with pytest.raises(TrainingError, match="training loss must be finite, got nan at local step"):
        model.fit(task.plan.trainable)


def test_tensors_that_overflow_in_the_last_step_are_a_training_error() -> None:
    adapted = tiny.shared("vit")
    task = tiny.task(adapted, tiny.mixed_ranks(adapted))
    model = client("vit", adapted, learning_rate=1e38, optimiser="sgd", max_grad_norm=None, max_steps=1)
    model.load(task)
    with pytest.raises(TrainingError, match="trained tensors must be finite"):
        model.fit(task.plan.trainable, penalty=lambda live: 1e3 * sum(t.square().sum() for t in live.values()))


@pytest.mark.parametrize("work", ["fit", "gradients"])
def test_an_empty_client_is_a_training_error(work: str) -> None:
    adapted = tiny.shared("vit")
    task = tiny.task(adapted, tiny.mixed_ranks(adapted))
    model = client("vit", adapted, examples=tiny.Rows(()), measured=set())
    model.load(task)
    with pytest.raises(TrainingError, match="client 0 must have examples"):
        model.fit(task.plan.trainable) if work == "fit" else model.gradients(task.plan.trainable, num_examples=3)


def test_a_client_works_only_on_its_own_task() -> None:
    adapted = tiny.shared("vit")
    first, second = client("vit", adapted), client("vit", adapted)
    tasks = [tiny.task(adapted, tiny.mixed_ranks(adapted), seed=seed) for seed in (0, 1)]
    with pytest.raises(ModelError, match="must be loaded before"):
        first.fit(tasks[0].plan.trainable)
    first.load(tasks[0])
    second.load(tasks[1])
    with pytest.raises(ModelError, match="got none or another client's"):
        first.read()
    second.read()


def test_a_fit_must_train_something() -> None:
    adapted = tiny.shared("vit")
    model = client("vit", adapted)
    model.load(tiny.task(adapted, {}))
    with pytest.raises(ModelError, match="must train at least one tensor"):
        model.fit(frozenset())


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_are_the_mean_over_the_subset_with_dropout_off(family: str) -> None:
    adapted = tiny.build(family, dropout=0.3)
    ranks = tiny.mixed_ranks(adapted)
    scored = frozenset(lora.names(lora.blocks_modules(adapted.spec, [0, 2])))
    task = tiny.task(adapted, ranks, lora.names(lora.blocks_modules(adapted.spec, [2])), micro_batch=2, scored=scored)
    model = client(family, adapted)
    model.load(task)
    measured = model.gradients(scored, num_examples=10)
    assert {n for n, p in adapted.parameters_by_name().items() if p.requires_grad} == task.plan.trainable
    assert all(parameter.grad is None for parameter in adapted.base.parameters())
    adapted.set_trainable(scored)
    adapted.base.eval()
    adapted.loss(next(tiny.examples(family).batches(10))).backward()
    assert measured.keys() == scored
    for name, parameter in adapted.parameters_by_name().items():
        if name in scored:
            torch.testing.assert_close(measured[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_squared_gradients_are_the_mean_of_each_examples_own_squares(family: str) -> None:
    adapted = tiny.build(family, dropout=0.3)
    scored = frozenset(lora.names(lora.blocks_modules(adapted.spec, [0, 2])))
    task = tiny.task(adapted, tiny.mixed_ranks(adapted), lora.names(lora.blocks_modules(adapted.spec, [2])))
    model = client(family, adapted)
    model.load(task)
    measured = model.gradients(scored, num_examples=10, squared=True)
    squared_mean = {name: g.square() for name, g in model.gradients(scored, num_examples=10).items()}
    assert {n for n, p in adapted.parameters_by_name().items() if p.requires_grad} == task.plan.trainable
    adapted.set_trainable(scored)
    adapted.base.eval()
    expected = {name: torch.zeros_like(tensor) for name, tensor in measured.items()}
    for example in tiny.examples(family).batches(1):
        adapted.base.zero_grad()
        adapted.loss(example).backward()
        for name in scored:
            expected[name] += adapted.parameters_by_name()[name].grad.square() / 10
    assert measured.keys() == scored
    for name in scored:
        torch.testing.assert_close(measured[name], expected[name], rtol=1e-3, atol=1e-7)
        assert measured[name].sum() > squared_mean[name].sum()


def test_gradients_are_measured_on_the_same_examples_each_round() -> None:
    adapted = tiny.shared("vit")
    task = tiny.task(adapted, tiny.mixed_ranks(adapted))
    digests = []
    for seed, subset_seed in ((1, 7), (2, 7), (1, 8)):
        model = client("vit", adapted, seed=seed, subset_seed=subset_seed)
        model.load(task)
        digests.append(tensors.digest(model.gradients(task.plan.trainable, num_examples=4)))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_recomputing_saves_memory_when_gradients_are_measured_too(family: str) -> None:
    adapted = tiny.build(family, dropout=0.3)
    ranks = tiny.mixed_ranks(adapted)
    results, calls = [], []
    inner = next(module for module in adapted.blocks[1].modules() if isinstance(module, torch.nn.Linear))
    inner.register_forward_hook(lambda *_: calls.append(1))
    for checkpointed in (frozenset(), frozenset({1})):
        task = tiny.task(adapted, ranks, checkpointed=checkpointed)
        model = client(family, adapted)
        model.load(task)
        calls.clear()
        results.append((tensors.digest(model.gradients(task.plan.trainable, num_examples=4)), len(calls)))
    assert results[0][0] == results[1][0]
    assert (results[0][1], results[1][1]) == (1, 2)


def test_a_tensor_that_does_not_reach_the_loss_has_a_zero_gradient() -> None:
    adapted = tiny.shared("vit")
    module = next(iter(adapted.spec.modules))
    start = tiny.random_tensors(adapted, {module: 2})
    start = {**start, lora.b_name(module): torch.zeros(24, 2)}
    model = client("vit", adapted)
    model.load(Task(Plan(0, {module: 2}, frozenset(lora.names([module]))), start))
    measured = model.gradients(frozenset(lora.names([module])), num_examples=4)
    assert not measured[lora.a_name(module)].any()
    assert measured[lora.b_name(module)].any()
