"""Several clients in one pass: each comes to what it comes to by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedpilot import base_deltas, lora, tensors, training
from fedpilot.attachments import AdapterBank
from fedpilot.client import ClientModel
from fedpilot.errors import TrainingError
from fedpilot.model import Stack, UnlikeError
from fedpilot.model.batched import joined, stacked_product
from fedpilot.together import Together, clip_by_client
from fedpilot.training import TrainingSettings
from fedpilot.types import BaseDelta, ExampleDP, Fit, Fitted, StepKind
from tests import joint, tiny
from tests.joint import SIZES, relative
from tests.tiny import FAMILIES

CLOSE = 1e-6
"""Bound on the distance of two tensors over the norm of one, for rules that do not blow roundings up as AdamW does."""


def client(family: str, size: int, seed: int, *, adapted: Any = None, data: Any = None, **settings: Any) -> ClientModel:
    chosen = TrainingSettings(**{"learning_rate": 0.01, "batch_size": 4, "optimiser": "sgd", **settings})
    examples = data or tiny.examples(family, size, seed=seed)
    shared = adapted or joint.model(family)
    return ClientModel(shared, examples, chosen, learning_rate=chosen.learning_rate, seed=seed)


def fits(
    family: str, *, sizes: Sequence[int] = SIZES, plan: Mapping[str, Any] | None = None, **settings: Any
) -> list[Fit]:
    """Of clients with unlike tensors, examples and numbers of them."""
    found = []
    for k, size in enumerate(sizes):
        own = client(family, size, k + 1, **settings)
        ranks = tiny.mixed_ranks(own.adapted, (plan or {}).get("blocks"))
        task = tiny.task(own.adapted, ranks, seed=k, **(plan or {}))
        task = replace(task, plan=replace(task.plan, client_id=k))
        found.append(Fit(own, task, task.plan.trainable))
    return found


def alone(fit: Fit) -> Fitted:
    fit.model.load(fit.task)
    metrics = fit.model.fit(fit.trainable, penalty=fit.penalty, max_steps=fit.max_steps, kind=fit.kind)
    return Fitted(metrics, fit.model.read())


def together(asked: Sequence[Fit]) -> list[Any]:
    found = Together(len(asked)).fit(asked)
    assert found is not None
    return list(found)


def check_same(one: Fitted, other: Fitted, close: float = CLOSE) -> None:
    assert relative(one.tensors, other.tensors) < close
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=close)
    for name in ("steps", "examples"):
        assert one.metrics[name] == other.metrics[name]


# --- the same computation, client by client -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_client_comes_to_what_it_comes_to_by_itself(family: str) -> None:
    asked = fits(family, local_epochs=2)
    found = together(asked)
    for fit, one in zip(asked, found, strict=True):
        other = alone(fit)
        check_same(one, other)
        assert relative(one.tensors, fit.task.tensors) > 1e-3  # it did train
    assert [one.metrics["steps"] for one in found] == [6.0, 4.0, 8.0, 2.0]


@pytest.mark.parametrize("changes", [{"optimiser": "momentum", "weight_decay": 0.1}, {"max_grad_norm": None}])
def test_every_rule_that_follows_the_gradient_is_as_close(changes: Mapping[str, Any]) -> None:
    asked = fits("vit", **changes)
    for fit, one in zip(asked, together(asked), strict=True):
        check_same(one, alone(fit))


def test_the_heads_own_rate_is_kept_in_a_pass() -> None:
    asked = fits("vit", head_lr_factor=5.0)
    for fit, one in zip(asked, together(asked), strict=True):
        check_same(one, alone(fit))


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_adamw_differs_no_more_than_by_other_ways_to_add_up_the_same_batch(family: str) -> None:
    # AdamW divides by the gradient's own size, so an entry whose gradient is all rounding moves by a rounding's sign.
    # How much that makes is measured on one client whose batches are cut in pieces, which is exact but for roundings.
    settings = {"optimiser": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "local_epochs": 3}
    asked = fits(family, **settings)
    pieces = [replace(fit, task=replace(fit.task, plan=replace(fit.task.plan, micro_batch=2))) for fit in asked]
    plain = [alone(fit) for fit in asked]
    noise = max(relative(alone(cut).tensors, one.tensors) for cut, one in zip(pieces, plain, strict=True))
    for one, other in zip(together(asked), plain, strict=True):
        check_same(one, other, close=max(10 * noise, CLOSE))
    assert noise < 1e-4


def test_what_is_not_trained_stays_to_the_bit_and_nothing_below_has_a_gradient() -> None:
    model = joint.model("bert")
    names = frozenset({*lora.names(lora.blocks_modules(model.spec, [10])), *model.spec.head})
    asked = [replace(fit, trainable=names) for fit in fits("bert")]
    for fit, one in zip(asked, together(asked), strict=True):
        rest = one.tensors.keys() - names
        assert tensors.digest(tensors.select(one.tensors, sorted(rest))) == tensors.digest(
            tensors.select(fit.task.tensors, sorted(rest))
        )
        check_same(one, alone(fit))


@pytest.mark.parametrize("plan", [{"micro_batch": 3}, {"checkpointed": frozenset({0, 2})}, {"blocks": (0, 2)}], ids=str)
@pytest.mark.parametrize("family", ["vit", "llama"])
def test_plans_of_other_kinds_are_followed(family: str, plan: Mapping[str, Any]) -> None:
    asked = fits(family, plan=plan)
    for fit, one in zip(asked, together(asked), strict=True):
        check_same(one, alone(fit))


def test_a_changed_base_is_everybodys() -> None:
    asked = fits("vit")
    module = next(iter(joint.model("vit").spec.modules))
    out, width = joint.model("vit").spec.modules[module]
    base = base_deltas.extended(
        BaseDelta(), base_deltas.pair(module, torch.ones(out, 1), torch.arange(width)[None] / 9)
    )
    changed = [replace(fit, task=replace(fit.task, base_delta=base)) for fit in asked]
    for one, other, fit in zip(together(changed), together(asked), changed, strict=True):
        check_same(one, alone(fit))
        assert relative(one.tensors, other.tensors) > 1e-3


def test_each_client_has_its_own_penalty_and_its_own_cap_on_steps() -> None:
    asked = [
        replace(fit, penalty=lambda live, w=w: w * sum(t.square().sum() for t in live.values()), max_steps=cap)
        for fit, w, cap in zip(fits("vit"), (0.0, 0.3, 0.1, 0.2), (None, 1, 2, 5), strict=True)
    ]
    asked[0] = replace(asked[0], penalty=None)
    found = together(asked)
    assert [one.metrics["steps"] for one in found] == [3.0, 1.0, 2.0, 1.0]
    for fit, one in zip(asked, found, strict=True):
        check_same(one, alone(fit))


def test_bf16_products_are_as_close_as_bf16_is() -> None:
    asked = fits("vit", autocast="bf16")
    for fit, one in zip(asked, together(asked), strict=True):
        check_same(one, alone(fit), close=2e-2)


def test_nothing_is_left_behind_in_the_shared_model() -> None:
    model = joint.model("vit")
    asked = fits("vit")
    before = alone(asked[1])
    torch.manual_seed(3)
    ambient = torch.get_rng_state()
    modules = dict(model.base.named_modules())
    together(asked)
    assert dict(model.base.named_modules()) == modules
    assert torch.equal(torch.get_rng_state(), ambient)
    assert model.plan is None  # a client that forgot to load does not train somebody else's tensors
    assert tensors.digest(alone(asked[1]).tensors) == tensors.digest(before.tensors)


def test_seconds_are_shared_by_examples() -> None:
    found = together(fits("vit"))
    shares = [one.metrics["seconds"] / one.metrics["examples"] for one in found]
    assert shares == pytest.approx([shares[0]] * len(found))
    assert shares[0] > 0


# --- clients that fail ------------------------------------------------------------------------------------------------


def test_a_client_whose_loss_is_not_finite_leaves_and_spoils_nobody() -> None:
    asked = fits("vit", local_epochs=2)
    rows = list(tiny.examples("vit", SIZES[1], seed=2).tensors)
    rows[3] = {**rows[3], "pixel_values": torch.full_like(rows[3]["pixel_values"], torch.nan)}
    asked[1] = replace(asked[1], model=client("vit", 0, 2, data=tiny.Rows(tuple(rows)), local_epochs=2))
    found = together(asked)
    with pytest.raises(TrainingError) as caught:
        alone(asked[1])
    assert isinstance(found[1], TrainingError)
    assert str(found[1]) == str(caught.value)
    for k in (0, 2, 3):
        check_same(found[k], alone(asked[k]))


def test_a_client_without_examples_fails_as_it_does_by_itself() -> None:
    asked = fits("vit")
    asked[2] = replace(asked[2], model=client("vit", 0, 9, data=_Nothing(())))
    found = together(asked)
    with pytest.raises(TrainingError, match="client 2 must have examples") as caught:
        alone(asked[2])
    assert str(found[2]) == str(caught.value)
    check_same(found[3], alone(asked[3]))


class _Nothing(tiny.Rows):
    """No examples; a stand-in whose emptiness is not its falsehood."""

    def __bool__(self) -> bool:
        return True


# --- what cannot share a pass -----------------------------------------------------------------------------------------


def likeness(fit: Fit) -> object:
    return Together(4).likeness(fit.model, fit.task)


def test_clients_are_alike_where_all_but_their_data_and_tensors_is() -> None:
    asked = fits("vit")
    assert likeness(asked[0]) == likeness(asked[1]) is not None
    task = asked[0].task
    fewer = dict.fromkeys(task.plan.ranks, 2)
    delta = BaseDelta(1, steps=({"x": torch.ones(1)},))
    others = [
        replace(task, base_delta=delta),
        *(
            replace(task, plan=replace(task.plan, **change))
            for change in (
                {"ranks": fewer},
                {"trainable": frozenset(joint.model("vit").spec.head)},
                {"blocks": (0, 1, 2)},
                {"checkpointed": frozenset({1})},
                {"micro_batch": 2},
            )
        ),
    ]
    keys = [likeness(replace(asked[0], task=other)) for other in [task, *others]]
    keys += [likeness(fit) for fit in (fits("vit", learning_rate=0.1)[0], fits("vit", max_steps=9)[0])]
    assert None not in keys
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_bytes": 10**6},
        {"adapted": tiny.build("vit", dropout=0.1)},
        {"adapted": tiny.build("vit", dropout=0.0, lora_dropout=0.1)},
    ],
    ids=["remembered prefixes", "dropout", "dropout before A"],
)
def test_steps_that_draw_or_remember_are_never_shared(settings: Mapping[str, Any]) -> None:
    (fit,) = fits("vit", sizes=(4,), **settings)
    assert likeness(fit) is None


def test_whole_weights_attachments_and_clients_that_train_nothing_are_never_shared() -> None:
    (fit,) = fits("vit", sizes=(4,))
    plan, module = fit.task.plan, next(iter(fit.task.plan.ranks))
    whole = replace(plan, trainable=frozenset({base_deltas.weight_name(module)}))
    hooked = replace(plan, attachment=AdapterBank(size=2, rank=2, width=0))
    for chosen in (whole, replace(plan, trainable=frozenset()), hooked):
        assert likeness(replace(fit, task=replace(fit.task, plan=chosen))) is None


def test_a_private_step_is_refused_and_so_are_fits_that_are_not_alike() -> None:
    asked = fits("vit")
    private = StepKind(("B",), ExampleDP(1.0, 1.0))
    assert Together(4).fit([replace(fit, kind=private) for fit in asked]) is None
    assert Together(4).fit([asked[0], replace(asked[1], trainable=frozenset(joint.model("vit").spec.head))]) is None
    plain = [replace(fit, kind=StepKind(("B",), None)) for fit in asked]
    check_same(together(plain)[0], alone(asked[0]))


def test_batches_that_do_not_go_together_are_left_to_their_clients() -> None:
    asked = fits("vit")
    small = tiny.Rows(
        tuple({**row, "pixel_values": row["pixel_values"][:, :8]} for row in tiny.examples("vit").tensors)
    )
    asked[0] = replace(asked[0], model=client("vit", 0, 1, data=small))
    modules = list(joint.model("vit").base.modules())
    assert Together(4).fit(asked) is None
    assert list(joint.model("vit").base.modules()) == modules


def test_a_pass_has_as_many_clients_as_there_is_memory_for() -> None:
    (fit,) = fits("vit", sizes=(4,))
    base = sum(tensor.nbytes for tensor in joint.model("vit").resident())
    priced = replace(fit.task, plan=replace(fit.task.plan, peak_bytes=base + 1000))
    for free, most in ((500, 1), (2500, 2), (10**9, 8)):
        assert Together(8, lambda free=free: free).room(fit.model, priced) == most
    assert Together(8, lambda: 0).room(fit.model, fit.task) == 8  # nobody knows what it needs
    assert Together(8).room(fit.model, priced) == 8


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("biased", [True, False])
def test_each_example_meets_its_own_clients_matrix(counts: tuple[int, ...], biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 4, generator=generator, requires_grad=True)
    bias = torch.randn(3, 5, generator=generator, requires_grad=True) if biased else None
    for shape in ((6, 4), (6, 7, 4)):
        x = torch.randn(*shape, generator=generator)
        result = stacked_product(x, weight, bias, counts)
        wanted = torch.cat(
            [
                nn.functional.linear(own, weight[k], None if bias is None else bias[k])
                for k, own in enumerate(x.split(list(counts)))
            ]
        )
        torch.testing.assert_close(result, wanted)


def test_nothing_of_a_client_reaches_another_even_if_it_is_not_a_number() -> None:
    weight = torch.randn(3, 5, 4, requires_grad=True)
    x = torch.randn(6, 4)
    x[3] = torch.nan  # of the second client
    result = stacked_product(x, weight, None, (3, 1, 2))
    result.sum().backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).flatten(1).all(dim=1).tolist() == [True, False, True]


def test_padding_goes_behind_so_that_tokens_keep_their_places() -> None:
    short = {"input_ids": torch.tensor([[0, 7], [8, 9]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    long = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    labels = torch.tensor([[-100, 7], [8, 9]]), torch.tensor([[5, 6, 7]])
    batch = joined([{**short, "labels": labels[0]}, {**long, "labels": labels[1]}], filler=4)
    assert batch["input_ids"].tolist() == [[0, 7, 4], [8, 9, 4], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 7, -100], [8, 9, -100], [5, 6, 7]]
    classes = [{**short, "labels": torch.tensor([2, 1])}, {**long, "labels": torch.tensor([0])}]
    assert joined(classes, filler=4)["labels"].tolist() == [2, 1, 0]
    with pytest.raises(UnlikeError, match="labels"):
        joined([classes[0], {**long, "labels": labels[1]}], filler=4)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "llama-classifier"])
def test_a_text_that_is_filled_up_in_front_has_the_loss_that_it_has_by_itself(family: str) -> None:
    model = joint.model(family)
    tasks = [tiny.task(model, tiny.mixed_ranks(model), seed=k) for k in range(2)]
    batches = [turned(tiny.batch(family, 3, seed=1), 4), tiny.batch(family, 2, seed=2)]
    assert batches[0]["input_ids"].shape[1] < batches[1]["input_ids"].shape[1]
    wanted = []
    for task, batch in zip(tasks, batches, strict=True):
        model.load(task)
        model.base.eval()
        wanted.append(float(model.loss(batch).detach()))
    stack = Stack(model, [task.tensors for task in tasks], tasks[0].plan.trainable)
    with stack.installed():
        found = [float(loss.detach()) for loss in stack.losses(dict(enumerate(batches)))]
    assert found == pytest.approx(wanted, rel=1e-6)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-2)


def turned(batch: training.Batch, width: int) -> training.Batch:
    """A batch of texts cut to a width, with what fills them up in front."""
    text = [name for name, tensor in batch.items() if tensor.ndim == 2]
    counts = batch["attention_mask"][:, :width].sum(dim=1).tolist()
    return {
        name: torch.stack([row[:width].roll(width - n) for row, n in zip(tensor, counts, strict=True)])
        if name in text
        else tensor
        for name, tensor in batch.items()
    }


def test_clipping_is_by_client() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.01, 1.0, 100.0])
    stacked = [nn.Parameter(torch.zeros(3, *shape)) for shape in ((2, 5), (4,))]
    for parameter in stacked:
        by_client = scales.view(-1, *[1] * (parameter.ndim - 1))
        parameter.grad = by_client * torch.randn(parameter.shape, generator=generator)
    wanted: list[list[torch.Tensor]] = []
    for k in range(3):
        own = [nn.Parameter(torch.zeros_like(parameter[k])) for parameter in stacked]
        for mine, parameter in zip(own, stacked, strict=True):
            assert parameter.grad is not None
            mine.grad = parameter.grad[k].clone()
        nn.utils.clip_grad_norm_(own, 0.7, foreach=False)
        wanted.append([mine.grad for mine in own if mine.grad is not None])
    clip_by_client([*stacked, nn.Parameter(torch.zeros(3, 2))], 0.7)
    for k in range(3):
        for parameter, one in zip(stacked, wanted[k], strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad[k], one)
    assert stacked[0].grad is not None
    assert stacked[0].grad[0].norm() < 0.1  # a small one is left as it is
