"""Condensation: its distances, its gradient in pieces, what it starts from, and what it needs of memory."""

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedpilot import condensation, memory, planning
from fedpilot.algorithms.fedaf import FedAF
from fedpilot.client import ClientModel
from fedpilot.config import setup
from fedpilot.errors import ModelError, TrainingError
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel, ModelLens
from fedpilot.model.inside import fitted, pooled
from fedpilot.training import Batch, TrainingSettings
from fedpilot.types import Condensation, Matching, Plan, StepKind, Task
from tests import tiny, toy

OPTIONS = FedAF(toy.spec(), cast(MemoryProfile, None), depth=1, length=5, ipc=2, iterations=3, rank=2, mix=3)
HOW = OPTIONS.condensation
TRAINING = TrainingSettings(learning_rate=0.01, batch_size=6)


# --- maths ----------------------------------------------------------------------------------------------------------


def test_the_sliced_distance_of_single_points_is_the_mean_squared_projection() -> None:
    u, v = torch.tensor([[[1.0, 2.0, 0.0]]]), torch.tensor([[[0.0, 4.0, 0.0]]])
    directions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert condensation.sliced_wasserstein(u, v, directions).tolist() == [(1.0 + 4.0) / 2]


def test_the_sliced_distance_does_not_see_the_order_of_points_and_has_a_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    directions = F.normalize(torch.randn(64, 3, generator=generator), dim=1)
    distance = condensation.sliced_wasserstein(a.requires_grad_(), b, directions)
    shuffled = condensation.sliced_wasserstein(a.flip(0), b, directions)
    assert distance.item() == pytest.approx(shuffled.item())
    assert condensation.sliced_wasserstein(a, a, directions).item() == 0
    (gradient,) = torch.autograd.grad(distance, [a])
    assert bool((gradient.norm(dim=1) > 0).all())


def test_the_divergence_is_zero_where_the_two_agree_and_nowhere_else() -> None:
    r = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]])
    assert float(condensation.knowledge_divergence(r, r.clone())) == 0
    t = torch.tensor([[0.7, 0.1, 0.2], [0.25, 0.5, 0.25]])
    by_hand = 0.5 * sum(
        float((p * (p / q).log()).sum()) for one, other in ((r, t), (t, r)) for p, q in zip(one, other, strict=True)
    )
    assert float(condensation.knowledge_divergence(r, t)) == pytest.approx(by_hand)
    assert by_hand > 0


def test_matching_leaves_out_classes_that_no_client_or_no_item_has() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 0])
    r = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.6, 0.2], [0.0, 0.0, 0.0]])
    how = Matching(steps=1, lam_glob=0.5, tau=2.0)
    cross_entropy, divergence = condensation.matching_loss(logits, labels, r, how)
    t = (logits / 2).softmax(dim=1).mean(dim=0, keepdim=True)
    assert float(divergence) == pytest.approx(0.5 * float(condensation.knowledge_divergence(r[:1], t)))
    assert float(cross_entropy) == pytest.approx(float(F.cross_entropy(logits, labels)))
    _, silent = condensation.matching_loss(logits, torch.tensor([2, 2]), r, how)
    assert float(silent) == 0


def test_a_class_with_one_example_counts_as_absent() -> None:
    assert condensation.classes_of([0, 1, 1, 3], 4, min_examples=2) == [1]
    assert condensation.classes_of([0, 1, 1, 3], 4, min_examples=1) == [1]  # a mean over one example is the example
    assert condensation.classes_of([0, 1, 1, 1, 3, 3], 4, min_examples=3) == [1]


# --- a toy model ----------------------------------------------------------------------------------------------------


def lens(depth: int = 1) -> toy.ToyLens:
    return toy.ToyLens(toy.Net().requires_grad_(False), depth)


def batches(count: int = 11, seed: int = 5) -> list[Batch]:
    x = torch.randn(count, toy.WIDTH, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) % 2  # class 2 is absent
    return [{"x": x[i : i + 4], "labels": y[i : i + 4]} for i in range(0, count, 4)]


def made(how: Condensation, piece: int = 4, seed: int = 3, peers: torch.Tensor | None = None) -> condensation.Condensed:
    data = batches()
    labels = [int(label) for batch in data for label in batch["labels"]]
    peers = torch.zeros(2, toy.NUM_LABELS) if peers is None else peers
    return condensation.condense(lens(how.depth), lambda: data, labels, peers, how, piece=piece, seed=seed)


def test_sums_by_class_are_those_of_all_examples_together() -> None:
    data = batches()
    sums = condensation.class_sums(lens(), lambda: data, tau=2.0)
    whole = {name: torch.cat([batch[name] for batch in data]) for name in ("x", "labels")}
    _, features, logits = lens().real(whole)
    for label in (0, 1):
        rows = whole["labels"] == label
        assert int(sums.counts[label]) == int(rows.sum())
        torch.testing.assert_close(sums.features[label], features[rows].sum(dim=0))
        torch.testing.assert_close(sums.soft[label], (logits[rows] / 2).softmax(dim=1).sum(dim=0))
    assert float(sums.counts[2]) == 0


@pytest.mark.parametrize("lam_loc", [0.0, 3.0])
def test_the_gradient_in_pieces_is_that_of_all_items_at_once(lam_loc: float) -> None:
    generator = torch.Generator().manual_seed(1)
    items = torch.randn(7, toy.WIDTH, generator=generator)
    target = torch.randn(1, toy.WIDTH, generator=generator)

    def objective(features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return (features.mean(dim=0) - target).square().sum() + lam_loc * logits.mean(dim=0).square().sum()

    whole_loss, whole = condensation.gradient(lens(), items, objective, 7)
    for piece in (1, 3):
        loss, pieces = condensation.gradient(lens(), items, objective, piece)
        torch.testing.assert_close(loss, whole_loss)
        torch.testing.assert_close(pieces, whole)
    assert bool((whole.norm(dim=1) > 0).all())


def test_the_peers_knowledge_moves_items_through_the_sliced_distance() -> None:
    """Without the first term nothing but the distance can move them, towards the peers' mean logits."""
    how = replace(HOW, iterations=60, lam_loc=1.0, jitter=0.0)
    far = torch.tensor([[3.0, -1.0, 0.5], [-2.0, 2.0, 1.0]])

    def reached(lam_loc: float) -> float:
        items = made(replace(how, lam_loc=lam_loc), peers=far).items
        _, logits = lens(how.depth).synthetic(items)
        return float((logits.reshape(2, how.ipc, -1).mean(dim=1) - far).norm())

    assert reached(100.0) < 0.8 * reached(0.0)


def test_condensing_lowers_the_objective_and_gives_equally_many_items_of_each_present_class() -> None:
    found = made(replace(HOW, ipc=3, iterations=40, start="noise"))
    assert found.items.shape == (6, toy.WIDTH)
    assert found.labels.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert found.metrics["loss"] < 0.5 * found.metrics["loss_first"]
    torch.testing.assert_close(found.soft_labels.sum(dim=1), torch.ones(2))


def test_condensed_items_are_a_function_of_the_seed() -> None:
    assert torch.equal(made(HOW).items, made(HOW).items)
    assert not torch.equal(made(HOW).items, made(HOW, seed=4).items)


def test_items_start_from_averages_of_two_examples_or_more() -> None:
    rng = np.random.default_rng(0)
    chosen = condensation._chosen([0, 0, 1, 1, 1, 1, 1], [0, 1], replace(HOW, mix=2, ipc=4), rng)
    assert [len(set(positions)) for positions in chosen] == [2] * 8
    assert all(set(positions) <= {0, 1} for positions in chosen[:4])
    assert all(set(positions) <= {2, 3, 4, 5, 6} for positions in chosen[4:])


def test_nothing_real_is_among_the_items_and_how_near_they_come_is_reported() -> None:
    found = made(replace(HOW, iterations=30, mix=2))
    real = torch.cat([lens(HOW.depth).real(batch)[0] for batch in batches()])
    distances = torch.cdist(found.items, real)
    assert float(distances.min()) > 1e-3
    apart = torch.cdist(real, real).fill_diagonal_(float("inf")).amin(dim=1).median()
    assert found.metrics["nearest_ratio"] == pytest.approx(float(distances.min() / apart), rel=1e-4)
    assert found.metrics["nearest_ratio_median"] >= found.metrics["nearest_ratio"]


def test_an_item_that_is_a_real_example_would_be_seen() -> None:
    data = batches()
    stolen = lens(1).real(data[1])[0][2:3]
    assert condensation._nearness(lens(1), lambda: data, stolen, list(range(11)))["nearest_ratio"] == 0


def test_a_client_without_a_class_of_two_examples_fails() -> None:
    data = [{"x": torch.randn(2, toy.WIDTH), "labels": torch.tensor([0, 2])}]
    with pytest.raises(TrainingError, match="a class with 2 examples to condense, got none"):
        condensation.condense(lens(), lambda: data, [0, 2], torch.zeros(0, 3), HOW, piece=4, seed=0)


# --- real architectures ---------------------------------------------------------------------------------------------


def loaded(family: str, how: Condensation) -> tuple[AdaptedModel, Plan]:
    adapted = tiny.shared(family)
    plan = planning.frozen_from(adapted.spec, 0, how.rank, how.depth)
    adapter = toy.random_adapter(adapted.spec, how.rank)
    held = planning.trainable(adapted.spec, plan.ranks)
    adapted.load(Task(plan, {name: 0.1 * adapter[name] for name in adapter if name in held}))
    adapted.base.eval()
    return adapted, plan


@pytest.mark.parametrize(("family", "depth"), [("bert", 0), ("bert", 1), ("dinov2", 2), ("vit", 0)])
def test_states_that_enter_a_block_give_the_logits_of_the_inputs_that_they_are_of(family: str, depth: int) -> None:
    how = replace(HOW, depth=depth, length=tiny.LENGTH)
    adapted, _ = loaded(family, how)
    batch = adapted.made_up_batch(3)  # texts of full length, of which the first has no padding
    if family == "bert":
        batch = {**batch, "input_ids": torch.randint(3, tiny.WORDS, (3, tiny.LENGTH))}
        batch["attention_mask"].fill_(1)
    else:
        batch = tiny.batch(family, 3)
    found = ModelLens(adapted, how)
    items, features, logits = found.real(batch)
    again, follows = found.synthetic(items)
    torch.testing.assert_close(again, features)
    torch.testing.assert_close(follows, logits)
    with torch.no_grad():
        torch.testing.assert_close(logits, adapted.logits(batch))
    leaf = items.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(found.synthetic(leaf)[1].square().sum(), [leaf])
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    assert all(parameter.grad is None for parameter in adapted.base.parameters())


def test_pixels_are_a_space_of_images_alone() -> None:
    how = replace(HOW, space="pixels", depth=0)
    adapted, _ = loaded("dinov2", how)
    batch = tiny.batch("dinov2", 3)
    assert torch.equal(ModelLens(adapted, how).real(batch)[0], batch["pixel_values"])
    with pytest.raises(ModelError, match="space 'pixels' must go with images"):
        ModelLens(tiny.shared("bert"), how)
    with pytest.raises(ModelError, match="depth must be below 3"):
        ModelLens(adapted, replace(HOW, depth=3))
    with pytest.raises(ModelError, match="must have a classifier"):
        ModelLens(tiny.shared("llama"), HOW)


def test_texts_are_cut_and_filled_with_their_own_mean_wherever_the_padding_stands() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [9.0], [9.0]], [[9.0], [2.0], [4.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    assert fitted(hidden, mask, 5)[:, :, 0].tolist() == [[1.0, 3.0, 2.0, 2.0, 2.0], [2.0, 4.0, 6.0, 4.0, 4.0]]
    assert fitted(hidden, mask, 2)[:, :, 0].tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert pooled(hidden, mask)[:, 0].tolist() == [3.0, 6.0]


def profile_of(family: str, how: Condensation, sizes: tuple[int, ...]) -> MemoryProfile:
    sketch = tiny.build(family, device="fake")
    kind = StepKind(condensation=how)
    return setup.profile_of(sketch, TRAINING, checkpointing=False, micro_batches=sizes, kind=kind)


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("dinov2", HOW),
        pytest.param("bert", replace(HOW, depth=10), marks=pytest.mark.slow),
        pytest.param("dinov2", replace(HOW, space="pixels", depth=0), marks=pytest.mark.slow),
    ],
    ids=["image", "text", "pixels"],
)
def test_no_client_needs_more_memory_than_predicted(family: str, how: Condensation) -> None:
    """Texts of unlike length, an odd last batch, and pieces of which the items need several."""
    profile = profile_of(family, how, (6, 2))
    adapted, plan = loaded(family, how)
    assert MemoryProfile.from_json(profile.to_json()).item_shape == profile.item_shape
    peaks = []
    for size in (None, 2):
        measured = replace(plan, micro_batch=size)
        adapter = planning.trainable(adapted.spec, plan.ranks)
        tensors = {n: t for n, t in toy.random_adapter(adapted.spec, how.rank).items() if n in adapter}
        model = ClientModel(
            adapted, tiny.examples(family, 140), TRAINING, learning_rate=0.1, seed=1, measured=set[object]()
        )
        model.load(Task(measured, tensors))
        found = model.condense(how, torch.zeros(tiny.NUM_LABELS, tiny.NUM_LABELS))
        assert tuple(found.items.shape[1:]) == profile.item_shape
        peaks.append(memory.peak_bytes(profile, measured))
        # With more examples than the references that the prediction has room for.
        assert 0.95 * peaks[-1] < found.metrics["peak_bytes"] <= peaks[-1]
    assert peaks[1] < peaks[0]


def test_a_rehearsal_measured_on_the_real_model_is_what_was_traced() -> None:
    from fedpilot.model import program_of

    profile = profile_of("dinov2", HOW, (6,))
    adapted, plan = loaded("dinov2", HOW)
    program = program_of(adapted, plan, TRAINING, None, StepKind(condensation=HOW))
    assert memory.measure_peak(program) == memory.peak_bytes(profile, plan)


def test_the_server_learns_the_items_classes() -> None:
    adapted, plan = loaded("dinov2", HOW)
    plan = replace(plan, trainable=frozenset(adapted.parameters_by_name()))

    model = ClientModel(adapted, tiny.examples("dinov2", 1), TRAINING, learning_rate=0.05, seed=1)
    model.load(Task(plan, adapted.read()))
    items, _, _ = ModelLens(adapted, HOW).real(tiny.batch("dinov2", 9))
    labels = torch.arange(9) % 3
    soft = torch.eye(3) * 0.7 + 0.1
    metrics = model.fit_items(plan.trainable, items, labels, soft, HOW, Matching(30, 0.5, 2.0))
    assert metrics["steps"] == 30
    again = model.fit_items(plan.trainable, items, labels, soft, HOW, Matching(5, 0.5, 2.0))
    assert again["loss"] < metrics["loss"]
