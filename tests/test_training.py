import math

import pytest
import torch
from torch import nn

from fedpilot import training
from fedpilot.errors import TrainingError
from fedpilot.training import TrainingSettings


def net(seed: int = 0) -> nn.Linear:
    linear = nn.Linear(4, 3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(3, 4, generator=generator))
        linear.bias.zero_()
    return linear


def classification_batch(examples: int = 7) -> training.Batch:
    generator = torch.Generator().manual_seed(5)
    return {"x": torch.randn(examples, 4, generator=generator), "labels": torch.arange(examples) % 3}


def mean_loss(model: nn.Linear):
    def loss(batch: training.Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    return loss


def step(model: nn.Linear, settings: TrainingSettings, pieces=None, penalty=None, optimiser=None) -> torch.Tensor:
    parameters = dict(model.named_parameters())
    optimiser = optimiser or training.make_optimiser(parameters, settings, settings.learning_rate)
    pieces = pieces or [classification_batch()]
    return training.train_step(mean_loss(model), pieces, optimiser, parameters, settings, penalty)


def plain(**changes) -> TrainingSettings:
    return TrainingSettings(**{"learning_rate": 0.1, "optimiser": "sgd", "max_grad_norm": None, **changes})


# --- settings -----------------------------------------------------------------------------------------------------


def test_the_cosine_falls_from_the_full_rate_towards_the_smallest_one() -> None:
    settings = plain(learning_rate=2.0, schedule="cosine", min_lr_ratio=0.25)
    rates = [settings.learning_rate_at(round, 4) for round in (1, 2, 3, 4)]
    assert rates[0] == 2.0
    assert rates[2] == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0.5


def test_a_constant_rate_does_not_change() -> None:
    assert {plain().learning_rate_at(round, 3) for round in (1, 2, 3)} == {0.1}


def test_all_broken_settings_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"optimiser must .*batch_size must .*learning_rate must .*momentum must"):
        TrainingSettings(learning_rate=-1.0, optimiser="adam", batch_size=0, momentum=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"autocast": "fp16"},
        {"schedule": "linear"},
        {"local_epochs": 0},
        {"max_steps": 0},
        {"max_grad_norm": 0.0},
        {"weight_decay": -0.1},
        {"min_lr_ratio": 1.5},
        {"learning_rate": math.nan},
        {"head_lr_factor": 0.0},
    ],
)
def test_a_broken_setting_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must"):
        plain(**change)


# --- optimisers ---------------------------------------------------------------------------------------------------


def test_sgd_subtracts_the_gradient_times_the_rate() -> None:
    model, reference = net(), net()
    loss = step(model, plain(weight_decay=0.5))
    expected = mean_loss(reference)(classification_batch())
    expected.backward()
    assert loss == expected
    decayed = reference.weight.grad + 0.5 * reference.weight
    torch.testing.assert_close(model.weight, reference.weight - 0.1 * decayed)


def test_momentum_remembers_the_last_gradient() -> None:
    settings = plain(optimiser="momentum", momentum=0.5)
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimiser = training.make_optimiser({"w": parameter}, settings, 0.1)
    for _ in range(2):
        parameter.grad = torch.tensor([1.0, 2.0, -4.0])
        optimiser.step()
    torch.testing.assert_close(parameter.data, torch.tensor([1.0, -2.0, 3.0]) - 0.25 * torch.tensor([1.0, 2.0, -4.0]))


def test_adamw_moves_every_entry_by_the_rate_in_its_first_step() -> None:
    model, before = net(), net()
    step(model, plain(optimiser="adamw"))
    torch.testing.assert_close((model.weight - before.weight).abs(), torch.full((3, 4), 0.1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum"])
def test_the_head_has_its_own_multiple_of_the_rate(name: str) -> None:
    alike, apart = net(), net()
    for model, factor in ((alike, 1.0), (apart, 3.0)):
        settings = plain(optimiser=name, head_lr_factor=factor)
        train = training.make_step(mean_loss(model), dict(model.named_parameters()), settings, 0.1, head=["bias"])
        train([classification_batch()])
    start = net()
    assert torch.equal(apart.weight, alike.weight)
    torch.testing.assert_close(apart.bias - start.bias, 3 * (alike.bias - start.bias))


@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum"])
def test_no_optimiser_updates_many_tensors_at_once(name: str) -> None:
    optimiser = training.make_optimiser(dict(net().named_parameters()), plain(optimiser=name), 0.1)
    assert all(group["foreach"] is False and not group["fused"] for group in optimiser.param_groups)


# --- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(size: int) -> None:
    whole, cut = net(), net()
    pieces = training.micro_batches(classification_batch(), size)
    assert sum(piece["labels"].shape[0] for piece in pieces) == 7
    losses = step(whole, plain()), step(cut, plain(), pieces)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(cut.weight.grad, whole.weight.grad)


def test_pieces_of_text_weigh_as_many_words_as_they_predict() -> None:
    labels = torch.full((3, 5), training.IGNORED)
    labels[0, 1:4] = 1  # three targets
    labels[1, 4] = 2  # one; the first position is nobody's target
    labels[2, 0] = 2  # none
    batch = {"labels": labels, "x": torch.tensor([[1.0], [5.0], [100.0]])}
    weight = nn.Parameter(torch.ones(1))
    pieces = training.micro_batches(batch, 1)
    assert [float(training.num_targets(piece)) for piece in pieces] == [3.0, 1.0, 0.0]
    loss = training.backward(lambda piece: (weight * piece["x"]).sum(), pieces, "float32", "cpu")
    assert float(loss) == (3 * 1.0 + 1 * 5.0) / 4
    assert weight.grad is not None
    assert weight.grad.item() == 2.0


def test_micro_batches_are_views() -> None:
    batch = classification_batch()
    pieces = training.micro_batches(batch, 3)
    assert [piece["labels"].shape[0] for piece in pieces] == [3, 3, 1]
    assert all(piece["x"].untyped_storage().data_ptr() == batch["x"].untyped_storage().data_ptr() for piece in pieces)
    assert training.micro_batches(batch, None) == training.micro_batches(batch, 7) == [batch]


@pytest.mark.parametrize("size", [None, 2])
def test_the_penalty_is_added_once_a_step_and_is_not_in_the_loss(size: int | None) -> None:
    model, reference = net(), net()
    pieces = training.micro_batches(classification_batch(), size)
    loss = step(model, plain(), pieces, penalty=lambda live: 3.0 * live["weight"].square().sum())
    expected = mean_loss(reference)(classification_batch())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(model.weight.grad, reference.weight.grad + 6.0 * reference.weight)


def test_gradients_are_clipped_to_one_norm_over_all_tensors() -> None:
    model = net()
    step(model, plain(max_grad_norm=0.01))
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_a_step_does_not_remember_the_gradient_of_the_last_one() -> None:
    model = net()
    settings = plain(learning_rate=1e-12)
    optimiser = training.make_optimiser(dict(model.named_parameters()), settings, 1e-12)
    step(model, settings, optimiser=optimiser)
    first = model.weight.grad.clone()
    step(model, settings, optimiser=optimiser)
    torch.testing.assert_close(model.weight.grad, first)


def test_arithmetic_that_was_left_to_the_recipe_is_not_taken_for_float32() -> None:
    with pytest.raises(ValueError, match="autocast must be settled before it is used, got 'auto'"):
        training.arithmetic("auto", "cpu")


def test_bf16_autocast_changes_products_and_not_weights() -> None:
    model, reference = net(), net()
    loss, exact = step(model, plain(autocast="bf16")), step(reference, plain())
    assert loss != exact
    torch.testing.assert_close(loss.float(), exact, rtol=0.05, atol=0.05)
    assert model.weight.dtype == model.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("optimiser", ["adamw", "momentum"])
@pytest.mark.parametrize("size", [None, 2])
def test_a_step_runs_on_the_meta_device_where_no_value_can_be_read(optimiser: str, size: int | None) -> None:
    model = nn.Linear(4, 3, device="meta")
    batch = {"x": torch.empty(7, 4, device="meta"), "labels": torch.empty(7, dtype=torch.long, device="meta")}
    settings = plain(optimiser=optimiser, max_grad_norm=1.0)
    pieces = training.micro_batches(batch, size)
    loss = step(model, settings, pieces, penalty=lambda live: live["weight"].square().sum())
    assert loss.device.type == "meta"


# --- the check ----------------------------------------------------------------------------------------------------


def test_a_finite_loss_is_returned_as_a_number() -> None:
    assert training.checked(torch.tensor(1.5), 3) == 1.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_step_and_a_remedy(value: float) -> None:
    with pytest.raises(TrainingError, match=r"local step 3; lower the learning rate"):
        training.checked(torch.tensor(value), 3)
