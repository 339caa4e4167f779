"""Uploads judged by their size: one far outside what the cohort sends is refused, or cut to the median.

An update has two sizes. The *effective* one is the norm of the change of the weights, ``scale (B' A' - B A)`` over all
adapted modules with the head's change beside it, from the factors and never from a product. The *entries'* one is the
norm of the change of the tensors themselves. Both count: for any c, ``(c A, B / c)`` changes no weight, and ruins a
mean of factors all the same.

Uploads stream: a decision knows the sizes of earlier rounds and of the uploads that came before in this round, and no
later ones. At most `WINDOW` sizes are remembered. Refused uploads are among them: less than half of the clients cannot
move a median beyond what the others send, and a shift that most clients share is not refused for ever.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch

from fedpilot import base_deltas, lora
from fedpilot.errors import UploadError
from fedpilot.types import Tensors, Upload

WINDOW = 256
"""Newest sizes that are remembered."""

ENOUGH = 5
"""Sizes below which nothing is refused or cut."""


@dataclass(frozen=True)
class Norms:
    """How large an update is.

    Attributes:
        effective: Norm of the change of all weights together.
        entries: Norm of the change of all tensors as they travel.
    """

    effective: float
    entries: float


@dataclass(frozen=True)
class Screening:
    """How uploads are judged; the default passes all of them.

    Attributes:
        max_norm_factor: An upload is refused where one of its norms is more than this many times the median of those
            known; ``None`` refuses none.
        clip: ``median`` scales an update down until both norms are at most their medians over earlier rounds.
    """

    max_norm_factor: float | None = None
    clip: Literal["none", "median"] = "none"

    @property
    def on(self) -> bool:
        """Whether anything is measured."""
        return self.max_norm_factor is not None or self.clip != "none"


# --- how large an update is ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """An update as numbers, from which its norms follow for every share c of the way that it went.

    With ``L = dB A + B dA`` and ``Q = dB dA`` the weights change by ``scale (c L + c² Q)``.

    Attributes:
        linear: ``||scale L||²`` over all modules, and the squares of what is not a pair.
        cross: ``2 <scale L, scale Q>``.
        quadratic: ``||scale Q||²``.
        entries: Squares of all tensors' changes.
    """

    linear: float
    cross: float
    quadratic: float
    entries: float

    def norms(self, share: float = 1.0) -> Norms:
        """Both norms where every tensor goes this share of its way."""
        square = share**2 * (self.linear + share * self.cross + share**2 * self.quadratic)
        return Norms(math.sqrt(max(square, 0.0)), share * math.sqrt(self.entries))

    def share_within(self, limit: Norms) -> float:
        """A share, the largest to within rounding where norms grow with it, at which both are at most the limit."""
        high = min(1.0, limit.entries / math.sqrt(self.entries)) if self.entries else 1.0
        if self.norms(high).effective <= limit.effective:
            return high
        low = 0.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.norms(middle).effective <= limit.effective else (low, middle)
        return low


def change(upload: Upload, sent: Tensors, scale: float) -> Change:
    """What the upload changes of what its client got.

    A pair that came back at a smaller rank is held against the same slots of what was sent. A base weight comes as its
    change already, dense or as factors.

    Args:
        upload: Checked.
        sent: All tensors of its task.
        scale: Factor on ``B @ A``.
    """
    linear = cross = quadratic = entries = 0.0
    trained = upload.tensors
    for module in dict.fromkeys(name.rpartition(".")[0] for name in trained if _is_pair(name)):
        a, b = lora.a_name(module), lora.b_name(module)
        rank = trained[a].shape[0] if a in trained else trained[b].shape[1]
        old_a, old_b = sent[a][:rank].double(), sent[b][:, :rank].double()
        step_a = trained[a].double() - old_a if a in trained else torch.zeros_like(old_a)
        step_b = trained[b].double() - old_b if b in trained else torch.zeros_like(old_b)
        left, right = torch.cat([step_b, old_b], dim=1), torch.cat([old_a, step_a])
        linear += scale**2 * _inner(left, right, left, right)
        cross += 2 * scale**2 * _inner(left, right, step_b, step_a)
        quadratic += scale**2 * _inner(step_b, step_a, step_b, step_a)
        entries += _square(step_a) + _square(step_b)
    for name, tensor in trained.items():
        if _is_pair(name) or name.endswith(".base_A"):
            continue
        if name.endswith(".base_B"):
            b_step, a_step = tensor.double(), trained[base_deltas.a_name(name.rpartition(".")[0])].double()
            square = _inner(b_step, a_step, b_step, a_step)
        else:
            square = _square(tensor.double() - sent[name].double() if name in sent else tensor.double())
        linear, entries = linear + square, entries + square
    return Change(linear, cross, quadratic, entries)


def shortened(upload: Upload, sent: Tensors, share: float) -> Upload:
    """The upload whose tensors went only this share of their way from what was sent."""

    def toward(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(".base_A"):
            return tensor  # its partner carries the factor
        if name not in sent:
            return tensor * share
        start = sent[name]
        if start.shape != tensor.shape:
            start = start[tuple(slice(size) for size in tensor.shape)]
        return torch.lerp(start, tensor, share)

    return replace(upload, tensors={name: toward(name, tensor) for name, tensor in upload.tensors.items()})


# --- the judgement ------------------------------------------------------------------------------------------------


class Screen:
    """Judges one round's uploads, in their order.

    Args:
        screening: How.
        known: Norms of earlier rounds, the newest last.
        scale: Factor on ``B @ A``.
    """

    def __init__(self, screening: Screening, known: tuple[Norms, ...], scale: float) -> None:
        self.measured: dict[int, Norms] = {}
        self._screening, self._earlier, self._scale = screening, known[-WINDOW:], scale

    @property
    def known(self) -> tuple[Norms, ...]:
        """Norms that the next judgement knows, the newest last."""
        return (*self._earlier, *self.measured.values())[-WINDOW:]

    def passed(self, upload: Upload, sent: Tensors) -> Upload:
        """The upload, cut where that is asked for.

        Raises:
            UploadError: It is too large.
        """
        if not self._screening.on:
            return upload
        step, known = change(upload, sent, self._scale), self.known
        norms = step.norms()
        self.measured[upload.client_id] = norms
        factor = self._screening.max_norm_factor
        if factor is not None and len(known) >= ENOUGH:
            _refuse_large(norms, median(known), factor)
        if self._screening.clip == "none" or len(self._earlier) < ENOUGH:
            return upload
        limit = median(self._earlier)
        if norms.effective <= limit.effective and norms.entries <= limit.entries:
            return upload
        return shortened(upload, sent, step.share_within(limit))


def median(known: Iterable[Norms]) -> Norms:
    """The median of each norm by itself.

    >>> median([Norms(1.0, 5.0), Norms(9.0, 4.0), Norms(2.0, 8.0), Norms(4.0, 6.0)])
    Norms(effective=3.0, entries=5.5)
    """
    found = tuple(known)
    return Norms(_middle([norms.effective for norms in found]), _middle([norms.entries for norms in found]))


def recalled(lines: Iterable[Mapping[str, object]]) -> tuple[Norms, ...]:
    """The norms that a run's recorded rounds leave known: a resumed run judges as if it had never stopped.

    Args:
        lines: Of ``metrics.jsonl``, in order.
    """
    found: list[Norms] = []
    for line in lines:
        measured = cast(Mapping[str, Mapping[str, float]], line.get("norms", {}))
        found = [*found, *(Norms(**norms) for norms in measured.values())][-WINDOW:]
    return tuple(found)


def _refuse_large(norms: Norms, usual: Norms, factor: float) -> None:
    for what, norm, middle in (
        ("norm of the change of all weights", norms.effective, usual.effective),
        ("norm of the change of all tensors", norms.entries, usual.entries),
    ):
        if middle > 0 and norm > factor * middle:
            raise UploadError(
                f"{what} must be at most {factor:g} times the median of the cohort's, {middle:.6g}, got {norm:.6g}; "
                "look at the client's data and code, or raise defence.max_norm_factor"
            )


def _middle(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _inner(left: torch.Tensor, right: torch.Tensor, left2: torch.Tensor, right2: torch.Tensor) -> float:
    """``<left @ right, left2 @ right2>`` from two products of the ranks' size."""
    return float(((left.T @ left2) * (right @ right2.T)).sum())


def _square(x: torch.Tensor) -> float:
    return float(x.square().sum())


def _is_pair(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))
