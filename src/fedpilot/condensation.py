"""Condenses a client's examples into few synthetic items that a frozen model sees alike; trains on such items.

With φ the features (what the head reads), u the logits, D_c the real examples of class c and S_c its items,

    L(S) = Σ_c ||mean φ(D_c) - mean φ(S_c)||² + λ_loc SWD(mean u(S_c), V_c),

where V_c are the cohort's mean logits for the class. L depends on the items through means alone, so that its gradient
is exact in pieces of any size: one pass for the means, one more for each piece's part of the gradient.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch.nn import functional as F

from fedpilot import training
from fedpilot.errors import TrainingError
from fedpilot.training import Batch
from fedpilot.types import Condensation, Condensed, Matching

REHEARSED = 2
"""Iterations of a `rehearsal`: in the second the optimiser's state stands."""

REFERENCES = 128
"""Real examples, at most, whose distances from each other say what is near."""

Batches: TypeAlias = Callable[[], Iterable[Batch]]
"""The client's examples on the device, in the same order at each call; no batch larger than a piece."""


class Lens(Protocol):
    """A model as condensation sees it."""

    @property
    def num_classes(self) -> int:
        """Of its head."""

    def real(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Examples as items (examples, ...), features (examples, width) and logits (examples, classes); no graph."""

    def synthetic(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits of items (items, ...), with the graph back to them."""


def classes_of(labels: Sequence[int], num_classes: int, min_examples: int) -> list[int]:
    """Classes that are present: fewer examples than two would give an example itself for a mean of it.

    >>> classes_of([2, 0, 2, 1, 0, 2], 4, min_examples=2)
    [0, 2]
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes)
    return [label for label in range(num_classes) if counts[label] >= max(min_examples, 2)]


def nothing_to_condense(how: Condensation) -> TrainingError:
    """What a client without a present class says."""
    return TrainingError(
        f"a client must have a class with {max(how.min_examples, 2)} examples to condense, got none; "
        "give it more data, or lower min_examples"
    )


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Squared sliced Wasserstein-2 distance of two sets of equally many points, with its graph.

    Args:
        a: (..., points, dimensions).
        b: Alike.
        directions: (projections, dimensions), unit vectors.

    Returns:
        (...,) mean over directions and points of the squared distance between sorted projections.

    >>> a, b = torch.tensor([[0.0, 0.0], [2.0, 9.0]]), torch.tensor([[3.0, 5.0], [0.0, 5.0]])
    >>> sliced_wasserstein(a, b, torch.tensor([[1.0, 0.0]])).item()
    0.5
    """
    projected_a = (a @ directions.T).sort(dim=-2).values
    projected_b = (b @ directions.T).sort(dim=-2).values
    return (projected_a - projected_b).square().mean(dim=(-2, -1))


def knowledge_divergence(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """½ Σ_c [KL(R_c || T_c) + KL(T_c || R_c)]; zero where the two are equal, and nowhere else.

    Args:
        r: (classes, outcomes), each row a distribution.
        t: Alike.
    """
    r, t = r.clamp(min=1e-8), t.clamp(min=1e-8)
    return ((r - t) * (r.log() - t.log())).sum() / 2


# --- the client -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassSums:
    """Sums over a client's examples by class; a mean where divided by ``counts``.

    Attributes:
        counts: (classes, 1).
        features: (classes, width).
        logits: (classes, classes).
        soft: (classes, classes) of softened predictions.
        mixtures: (items, ...) averages of real items, where asked for.
    """

    counts: torch.Tensor
    features: torch.Tensor
    logits: torch.Tensor
    soft: torch.Tensor
    mixtures: torch.Tensor | None = None


def class_sums(lens: Lens, batches: Batches, tau: float, chosen: Sequence[Sequence[int]] = ()) -> ClassSums:
    """One pass over all examples.

    Args:
        lens: The model.
        batches: The examples.
        tau: τ of the softened predictions.
        chosen: For each mixture the positions of its examples, in the order of the batches.

    Raises:
        TrainingError: There are no examples.
    """
    sums: ClassSums | None = None
    start, num_classes = 0, lens.num_classes
    for batch in batches():
        items, features, logits = lens.real(batch)
        labels = batch["labels"]
        if sums is None:
            zeros = features.new_zeros
            mixtures = items.new_zeros(len(chosen), *items.shape[1:]) if chosen else None
            sums = ClassSums(
                zeros(num_classes, 1), zeros(num_classes, features.shape[1]), zeros(num_classes, num_classes),
                zeros(num_classes, num_classes), mixtures,
            )  # fmt: skip
        sums.counts.index_add_(0, labels, torch.ones_like(features[:, :1]))
        sums.features.index_add_(0, labels, features)
        sums.logits.index_add_(0, labels, logits)
        sums.soft.index_add_(0, labels, (logits / tau).softmax(dim=1))
        if sums.mixtures is not None:
            weights = items.new_tensor(_weights(chosen, start, len(labels)))
            sums.mixtures.view(len(chosen), -1).addmm_(weights, items.reshape(len(labels), -1).to(weights.dtype))
        start += len(labels)
        del batch, items, features, logits, labels
    if sums is None:
        raise TrainingError("a client must have examples to condense, got none")
    return sums


def _weights(chosen: Sequence[Sequence[int]], start: int, count: int) -> list[list[float]]:
    """(mixtures, count): the share of each example of a batch that begins at position ``start``."""
    rows = [[0.0] * count for _ in chosen]
    for row, positions in zip(rows, chosen, strict=True):
        for position in positions:
            if start <= position < start + count:
                row[position - start] = 1 / len(positions)
    return rows


def condense(
    lens: Lens,
    batches: Batches,
    labels: Sequence[int],
    peers: torch.Tensor,
    how: Condensation,
    *,
    piece: int,
    seed: int,
    classes: Sequence[int] | None = None,
) -> Condensed:
    """Optimises items of each class that is present against the frozen model.

    Args:
        lens: The model.
        batches: The examples.
        labels: Their classes, in the order of the batches.
        peers: (present classes, classes) V_c.
        how: Settings.
        piece: Items of a forward pass.
        seed: Of all draws.
        classes: Present classes; ``None`` to take them from the labels.

    Raises:
        TrainingError: No class is present, or an item is not finite.
    """
    rng = np.random.default_rng(seed)
    present = classes_of(labels, lens.num_classes, how.min_examples) if classes is None else list(classes)
    if not present:
        raise nothing_to_condense(how)
    sums = class_sums(lens, batches, how.tau, _chosen(labels, present, how, rng))
    rows = torch.tensor(present, device=sums.counts.device)
    counts = sums.counts[rows].clamp(min=1)
    target, soft = sums.features[rows] / counts, sums.soft[rows] / counts
    assert sums.mixtures is not None, "asked for"
    items, spread = _start(sums.mixtures, how, rng)
    del sums
    peers = peers.to(items.device)

    def objective(features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        phi = features.reshape(len(present), how.ipc, -1).mean(dim=1)
        u = logits.reshape(len(present), how.ipc, -1).mean(dim=1)
        swd = sliced_wasserstein(u[:, None], peers[:, None], _directions(how.projections, peers, rng))
        total: torch.Tensor = (phi - target).square().sum() + how.lam_loc * swd.sum()
        return total

    losses = _optimise(lens, items, objective, how, how.lr * spread, piece)
    if not math.isfinite(losses[-1]) or bool((~torch.isfinite(items)).any()):
        raise TrainingError("condensed items must be finite, got NaN or infinity; lower the algorithm's lr")
    metrics = {
        "loss": losses[-1] / len(present),
        "loss_first": losses[0] / len(present),
        "steps": float(len(losses)),
        "classes": float(len(present)),
        **_nearness(lens, batches, items, rng.permutation(len(labels))[:REFERENCES].tolist()),
    }
    own = torch.tensor([float(label) for label in present]).repeat_interleave(how.ipc)
    return Condensed(items.cpu(), own, soft.cpu(), metrics)


def _chosen(
    labels: Sequence[int], present: Sequence[int], how: Condensation, rng: np.random.Generator
) -> list[list[int]]:
    """For each item the positions of the examples of its class that it starts as the average of."""
    known = np.asarray(labels, dtype=np.int64)
    result = []
    for label in present:
        positions = np.flatnonzero(known == label)
        count = min(max(how.mix, 2), len(positions))
        result += [sorted(rng.choice(positions, count, replace=False).tolist()) for _ in range(how.ipc)]
    return result


def _start(mixtures: torch.Tensor, how: Condensation, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Items before the first step, and their standard deviation."""
    spread = float(mixtures.std()) or 1.0
    noise = mixtures.new_empty(mixtures.shape).normal_(0, spread, generator=_generator(mixtures, rng))
    items = noise if how.start == "noise" else mixtures.add_(noise, alpha=how.jitter)
    return items, spread


def _generator(like: torch.Tensor, rng: np.random.Generator) -> torch.Generator:
    return torch.Generator(device=like.device).manual_seed(int(rng.integers(2**63)))


def _directions(count: int, like: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(count, dimensions) random unit vectors."""
    drawn = like.new_empty(count, like.shape[-1]).normal_(generator=_generator(like, rng))
    return F.normalize(drawn, dim=1)


Objective: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Features and logits of all items -> scalar."""


def _optimise(
    lens: Lens, items: torch.Tensor, objective: Objective, how: Condensation, lr: float, piece: int
) -> list[float]:
    """Adam on the items, in place; the objective before each step."""
    optimiser = torch.optim.Adam([items], lr=lr, foreach=False, fused=False)
    losses = []
    for _ in range(how.iterations):
        loss, items.grad = gradient(lens, items, objective, piece)
        optimiser.step()
        items.grad = None
        losses.append(float(loss))
    return losses


def gradient(lens: Lens, items: torch.Tensor, objective: Objective, piece: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective and its gradient by the items, exact however many of them a forward pass takes.

    Args:
        lens: The model.
        items: (items, ...).
        objective: Of all items' features and logits.
        piece: Items of a pass with a graph.
    """
    parts = torch.split(items.detach(), piece)
    if len(parts) == 1:
        leaf = parts[0].requires_grad_()
        loss = objective(*lens.synthetic(leaf))
        return loss.detach(), torch.autograd.grad(loss, [leaf])[0]
    with torch.no_grad():
        seen = [lens.synthetic(part) for part in parts]
    features, logits = (torch.cat(column).requires_grad_() for column in zip(*seen, strict=True))
    del seen
    loss = objective(features, logits)
    outer = torch.autograd.grad(loss, [features, logits], materialize_grads=True)
    result = torch.empty_like(items)
    into = zip(parts, torch.split(result, piece), *(torch.split(upstream, piece) for upstream in outer), strict=True)
    for part, target, *upstream in into:
        leaf = part.requires_grad_()
        target.copy_(torch.autograd.grad(lens.synthetic(leaf), [leaf], upstream)[0])
    return loss.detach(), result


def _nearness(lens: Lens, batches: Batches, items: torch.Tensor, references: Sequence[int]) -> Mapping[str, float]:
    """How close items come to real ones, in units of how close real ones come to each other.

    ``nearest_ratio`` is that of the closest item, ``nearest_ratio_median`` that of the middle one. The unit is the
    median over the references of the distance to the nearest other reference; of all examples it would be smaller,
    so that the ratios are rather too small than too large.
    """
    flat = items.flatten(1)
    nearest = flat.new_full((len(flat),), math.inf)
    held = flat.new_zeros(len(references), flat.shape[1])
    start = 0
    for batch in batches():
        real = lens.real(batch)[0].flatten(1).to(flat.dtype)
        nearest = torch.minimum(nearest, _distances(flat, real).amin(dim=1))
        for row, position in enumerate(references):
            if start <= position < start + len(real):
                held[row] = real[position - start]
        start += len(real)
        del batch, real
    apart = _distances(held, held)
    unit = apart.fill_diagonal_(math.inf).amin(dim=1).median()
    if not float(unit) > 0:
        return {}
    return {
        "nearest_ratio": float(nearest.min() / unit),
        "nearest_ratio_median": float(nearest.median() / unit),
    }


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(a, b) Euclidean distances, without the product that loses small ones."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


# --- the server -----------------------------------------------------------------------------------------------------


def matching_loss(
    logits: torch.Tensor, labels: torch.Tensor, soft_labels: torch.Tensor, matching: Matching
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of items, and λ_glob times their divergence from the clients' soft labels.

    Args:
        logits: (items, classes).
        labels: (items,).
        soft_labels: (classes, classes) R_c; a row of zeros where nobody said.
        matching: Settings.
    """
    soft = (logits.float() / matching.tau).softmax(dim=1)
    counts = soft.new_zeros(len(soft_labels), 1).index_add(0, labels, torch.ones_like(soft[:, :1]))
    sums = torch.zeros_like(soft_labels).index_add(0, labels, soft)
    rows = ((counts[:, 0] > 0) & (soft_labels.sum(dim=1) > 0)).nonzero()[:, 0]
    divergence = knowledge_divergence(soft_labels[rows], sums[rows] / counts[rows])
    return F.cross_entropy(logits.float(), labels), matching.lam_glob * divergence


def fit_items(
    lens: Lens,
    train: Callable[[Callable[[Batch], torch.Tensor]], training.Step],
    batch_size: int,
    items: torch.Tensor,
    labels: torch.Tensor,
    soft_labels: torch.Tensor,
    matching: Matching,
    *,
    generator: torch.Generator,
) -> Mapping[str, float]:
    """Trains on items in random batches; ``loss``, ``matching`` and ``steps``.

    Args:
        lens: The model.
        train: From the loss of a batch to an optimiser step.
        batch_size: Items of a step.
        items: (items, ...).
        labels: (items,) int64.
        soft_labels: As for `matching_loss`.
        matching: Settings.
        generator: Of the order.
    """
    divergences: list[torch.Tensor] = []

    def loss(batch: Batch) -> torch.Tensor:
        cross_entropy, divergence = matching_loss(
            lens.synthetic(batch["items"])[1], batch["labels"], soft_labels, matching
        )
        divergences.append(divergence.detach())
        return cross_entropy + divergence

    step = train(loss)
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.long)
    for number in range(1, matching.steps + 1):
        if not len(order):
            order = torch.randperm(len(items), generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        batch = {"items": items[rows], "labels": labels[rows]}
        losses.append(training.checked(step([training.on_device(batch, soft_labels.device)]), number))
    matched = float(torch.stack(divergences).mean()) if divergences else 0.0
    return {
        "loss": sum(losses) / max(len(losses), 1),
        "matching": matched / matching.lam_glob if matching.lam_glob else 0.0,
        "steps": float(len(losses)),
    }


# --- memory ---------------------------------------------------------------------------------------------------------


def rehearsal(lens: Lens, batch: Batch, how: Condensation, piece: int) -> Callable[[], None]:
    """A whole local update on one made-up batch with every class present; what it needs, no real one exceeds.

    Args:
        lens: The model, as a rule without storage.
        batch: Of ``piece`` full-length examples.
        how: Settings, but for ``iterations``.
        piece: Examples and items of a forward pass.

    Returns:
        Runs it.
    """
    short = replace(how, iterations=REHEARSED)
    labels = [label for label in range(lens.num_classes) for _ in range(max(2, -(-REFERENCES // lens.num_classes)))]

    def run() -> None:
        peers = batch["labels"].new_zeros(lens.num_classes, lens.num_classes, dtype=torch.float32)
        condense(lens, lambda: [batch], labels, peers, short, piece=piece, seed=0, classes=range(lens.num_classes))

    return run
