"""Runs attachments: live parameters, and forward hooks that use them on the base model's own modules.

A hook has no inputs but its module's. What it needs to know of the batch is prepared by `Attached.begin` before the
forward pass, and stands until the next one: blocks that are recomputed ask for it again in the backward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedpilot.attachments import KEYS, USER_VECTOR, AdapterBank, InstancePool, Pooling, gate_weights, last_layer
from fedpilot.errors import ModelError
from fedpilot.training import Batch
from fedpilot.types import Attachment, ModelSpec

Query = Callable[[Pooling, int], torch.Tensor]
"""Hidden states of the batch after so many blocks (0: all) of the frozen base, without attachments, pooled:
(examples, width) float32."""


class Attached:
    """What is hooked onto a base model.

    Args:
        attachment: Its hyper-parameters.
        spec: The model.
        base: Whose modules the names of the spec are.
        device: Of the parameters, which have no values yet.

    Attributes:
        parameters: Live tensors by global name.
        columns: Columns of a batch that it reads, and the shape of an example's entry.
        depends_on_itself: Whether what a hooked block gives for an example changes while only blocks above it, or
            tensors that lie in no block, are trained. If so, only blocks below ``lowest`` are remembered.
    """

    depends_on_itself = False

    def __init__(self, attachment: Attachment, spec: ModelSpec, base: nn.Module, device: torch.device) -> None:
        self.parameters = {
            name: nn.Parameter(torch.empty(shape, device=device), requires_grad=False)
            for name, shape in attachment.shapes(spec).items()
        }
        self._spec, self._base, self._device = spec, base, device
        self.columns = attachment.columns
        self._handles: list[Any] = []

    @property
    def lowest(self) -> int:
        """The lowest block that it hooks."""
        return min(self._spec.block_of.values())

    def begin(self, inputs: Batch, side: Batch, query: Query) -> None:
        """Prepares the hooks for a batch, before its forward pass.

        Args:
            inputs: What the base model gets.
            side: Columns of the batch that it does not get.
            query: Asked only by who needs it: it takes a forward pass.

        Raises:
            ModelError: A column is missing or of another shape.
        """
        for name, shape in self.columns.items():
            got = None if name not in side else tuple(side[name].shape[1:])
            if got != tuple(shape):
                raise ModelError(
                    f"examples must have a column {name} of shape {tuple(shape)} each, "
                    f"got {'none' if got is None else got}; give the data that column"
                )

    def loss(self, mean: torch.Tensor) -> torch.Tensor:
        """The batch's loss from its mean cross-entropy."""
        return mean

    def standing(self) -> list[torch.Tensor]:
        """Parameters, and what stands from one batch to the next."""
        return list(self.parameters.values())

    def uses(self) -> torch.Tensor | None:
        """(N,) examples of the last batch by the set that they were run with; ``None`` where there is no choice."""
        return None

    def forget(self) -> None:
        """Lets go of what stands from the last batch."""

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, module: str, hook: Callable[..., torch.Tensor | None]) -> None:
        """``hook(module, args, output)`` may return another output."""
        self._handles.append(self._base.get_submodule(module).register_forward_hook(hook))


class _Pool(Attached):
    """`InstancePool`: every example with the mean of the k sets whose keys are nearest to its query."""

    depends_on_itself = True  # on the keys

    def __init__(self, attachment: InstancePool, spec: ModelSpec, base: nn.Module, device: torch.device) -> None:
        super().__init__(attachment, spec, base, device)
        self._settings = attachment
        self._weights: torch.Tensor | None = None  # (examples, N): 1 / k for the chosen sets
        self._similarity: torch.Tensor | None = None
        for module in spec.modules:
            self._hook(module, self._scale_and_shift(module) if attachment.pool == "ssf" else self._add_pairs(module))
        head = last_layer(spec)
        if head is not None:
            self._hook(head, self._classify(head))

    def begin(self, inputs: Batch, side: Batch, query: Query) -> None:
        """Chooses each example's sets. The query has no gradient; the chosen keys have.

        A batch of one has no mean to stand out from: it takes the nearest.
        """
        self.forget()  # hooks are off for the query
        super().begin(inputs, side, query)
        asked, keys = query(self._settings.query, self._settings.query_blocks), self.parameters[KEYS]
        learns = torch.is_grad_enabled() and keys.requires_grad
        with torch.autocast(self._device.type, enabled=False):
            cosines = F.normalize(asked, dim=1) @ F.normalize(keys, dim=1).T
            ranked = cosines.detach()
            if learns and self._settings.choice == "spread" and len(ranked) > 1:
                ranked = ranked - ranked.mean(dim=0)
            chosen = ranked.topk(self._settings.top_k, dim=1).indices
            self._weights = torch.zeros_like(cosines).scatter(1, chosen, 1 / self._settings.top_k)
        if learns:
            values = cosines.gather(1, chosen)
            each = values.sum(dim=1) if self._settings.similarity == "sum" else values.mean(dim=1)
            self._similarity = each.mean()

    def loss(self, mean: torch.Tensor) -> torch.Tensor:
        """``(1 - λ) CE + λ (1 - Σ cos)``; of frozen keys the cross-entropy alone."""
        if self._similarity is None:
            return mean
        weight, similarity = self._settings.key_weight, self._similarity
        self._similarity = None  # else its graph outlives the backward pass
        return (1 - weight) * mean + weight * (1 - similarity)

    def uses(self) -> torch.Tensor | None:
        """An example that is run with k sets counts 1 / k for each."""
        return None if self._weights is None else self._weights.sum(dim=0)

    def forget(self) -> None:
        """No example has chosen."""
        self._weights = self._similarity = None

    def standing(self) -> list[torch.Tensor]:
        """Parameters and the last choice."""
        return [*super().standing(), *([] if self._weights is None else [self._weights])]

    def _mean(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """(examples, 1, ..., features): the mean of each example's chosen rows, to be broadcast over its positions."""
        assert self._weights is not None, "begin runs before every forward pass"
        with torch.autocast(self._device.type, enabled=False):
            rows = (self._weights @ self.parameters[name]).to(like.dtype)
        return rows.reshape(rows.shape[0], *[1] * (like.ndim - 2), rows.shape[1])

    def _scale_and_shift(self, module: str) -> Callable[..., torch.Tensor | None]:
        def hook(owner: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self._weights is None:
                return None
            check_examples(module, output, self._weights)
            gamma, beta = (self._mean(f"{module}.pool_{kind}", output) for kind in ("gamma", "beta"))
            return torch.addcmul(beta, output, gamma)

        return hook

    def _add_pairs(self, module: str) -> Callable[..., torch.Tensor | None]:
        def hook(owner: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self._weights is None:
                return None
            check_examples(module, output, self._weights)
            a, b = (self.parameters[f"{module}.pool_{kind}"] for kind in "AB")
            return output + self._spec.scale * mixed_pairs(args[0], a, b, self._weights)

        return hook

    def _classify(self, head: str) -> Callable[..., torch.Tensor | None]:
        def hook(owner: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self._weights is None:
                return None
            weight, bias = (self.parameters.get(f"{head}.pool_{kind}") for kind in ("weight", "bias"))
            assert weight is not None, "a classifier's layer has a weight"
            # The mean of heads is the mean of their logits, which are fewer.
            logits = _by_set(F.linear(args[0], weight.flatten(0, 1)), weight)
            chosen = self._weights.to(logits.dtype).reshape(-1, *[1] * (logits.ndim - 3), weight.shape[0], 1)
            mean = (chosen * logits).sum(dim=-2)
            return mean if bias is None else mean + self._mean(f"{head}.pool_bias", mean)

        return hook


class _Bank(Attached):
    """`AdapterBank`: every example with its own mix of a module's LoRAs."""

    def __init__(self, attachment: AdapterBank, spec: ModelSpec, base: nn.Module, device: torch.device) -> None:
        super().__init__(attachment, spec, base, device)
        self._settings = attachment
        self._vectors: torch.Tensor | None = None
        for module in spec.modules:
            self._hook(module, self._add_mixed(module))

    def begin(self, inputs: Batch, side: Batch, query: Query) -> None:
        """Takes the users' vectors; without any all LoRAs weigh alike."""
        self.forget()
        if USER_VECTOR in side:
            super().begin(inputs, side, query)
            self._vectors = side[USER_VECTOR].float() if self._settings.width else None

    def forget(self) -> None:
        """No user is known."""
        self._vectors = None

    def standing(self) -> list[torch.Tensor]:
        """Parameters and the last users' vectors."""
        return [*super().standing(), *([] if self._vectors is None else [self._vectors])]

    def _weights(self, module: str, output: torch.Tensor, training: bool) -> torch.Tensor:
        """(examples, N) in float32."""
        if self._vectors is None:
            size = self._settings.size
            return torch.full((output.shape[0], size), 1 / size, device=self._device)
        check_examples(module, output, self._vectors)
        with torch.autocast(self._device.type, enabled=False):
            return gate_weights(self._settings, self.parameters, module, self._vectors, training=training)

    def _add_mixed(self, module: str) -> Callable[..., torch.Tensor | None]:
        mix = mixed_pairs if self._settings.mix == "product" else mixed_factors

        def hook(owner: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            weights = self._weights(module, output, owner.training)
            a, b = (self.parameters[f"{module}.bank_{kind}"] for kind in "AB")
            return output + self._spec.scale * mix(args[0], a, b, weights)

        return hook


def _by_set(values: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """(..., N * rows) as (..., N, rows) of the sets' (N, rows, in)."""
    return values.reshape(*values.shape[:-1], *sets.shape[:2])


def check_examples(module: str, output: torch.Tensor, weights: torch.Tensor) -> None:
    """Refuses a module whose first axis is not the batch's examples.

    Raises:
        ModelError: As said.
    """
    if output.shape[0] != weights.shape[0] or output.ndim < 2:
        raise ModelError(
            f"a mixed module must give (examples, ..., features), got {tuple(output.shape)} of {module} for "
            f"{weights.shape[0]} examples; leave it out of model.target_modules"
        )


def mixed_pairs(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``Σ_i w_i B_i A_i x`` for each example, as one wide pair; weights have a gradient where they ask for one.

    Args:
        x: (examples, ..., in).
        a: (N, rank, in).
        b: (N, out, rank).
        weights: (examples, N).

    Returns:
        (examples, ..., out).
    """
    size, rank, _ = a.shape
    hidden = F.linear(x, a.flatten(0, 1))
    by_slot = weights.to(hidden.dtype).unsqueeze(2).expand(-1, -1, rank).flatten(1)
    hidden = hidden * by_slot.reshape(by_slot.shape[0], *[1] * (hidden.ndim - 2), size * rank)
    return F.linear(hidden, b.transpose(0, 1).flatten(1))


def mixed_factors(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``(Σ_i w_i B_i)(Σ_i w_i A_i) x`` for each example, without forming an example's factors.

    The arguments and the result are those of `mixed_pairs`.
    """
    size = a.shape[0]
    hidden = _by_set(F.linear(x, a.flatten(0, 1)), a)
    by_member = weights.to(hidden.dtype).reshape(weights.shape[0], *[1] * (hidden.ndim - 3), size, 1)
    inner = (by_member * hidden).sum(dim=-2, keepdim=True)
    return F.linear((by_member * inner).flatten(-2), b.transpose(0, 1).flatten(1))


def pool_hidden(hidden: torch.Tensor, mask: torch.Tensor | None, kind: Pooling) -> torch.Tensor:
    """(examples, width) float32 of (examples, length, width): the first position, or the mean without padding."""
    if kind == "cls":
        return hidden[:, 0].float()
    if mask is None:
        return hidden.float().mean(dim=1)
    mask = mask.unsqueeze(-1).float()
    return (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1)


MAKERS: Mapping[type[Any], type[Any]] = {AdapterBank: _Bank, InstancePool: _Pool}
"""Class of the hyper-parameters -> class that runs them."""


def attach(attachment: Attachment, spec: ModelSpec, base: nn.Module, device: torch.device) -> Attached:
    """Hooks an attachment onto a base model.

    Raises:
        ModelError: It is of an unknown class.
    """
    if type(attachment) not in MAKERS:
        raise ModelError(f"an attachment must be one that the model can run, got {type(attachment).__name__}")
    made: Attached = MAKERS[type(attachment)](attachment, spec, base, device)
    return made
