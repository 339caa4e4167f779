"""Several clients in one forward pass: the frozen base runs once over all examples, pairs and head are each one's own.

The clients' batches stand one behind the other along the axis of examples. What a plan loads is stacked along a first
axis of clients, and each example is multiplied by its own client's matrices, in one batched product a layer. The loss
is each client's mean over its own targets: the gradient of their sum is, client by client, the one that it has alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fedpilot import training
from fedpilot.model.adapted import AdaptedModel, cross_entropy
from fedpilot.training import IGNORED, Batch
from fedpilot.types import Tensors


class UnlikeError(Exception):
    """What the clients bring does not go through the model together."""


class Stack:
    """Loaded tensors of several clients.

    Args:
        adapted: With the task of one of them loaded; the others' tensors have the same names and shapes.
        tensors: Of each client.
        trainable: Names of those with gradients.

    Attributes:
        parameters: Name -> (clients, ...), in the model's order.
    """

    def __init__(self, adapted: AdaptedModel, tensors: Sequence[Tensors], trainable: frozenset[str]) -> None:
        self._adapted = adapted
        self.parameters: dict[str, nn.Parameter] = {}
        for name, live in adapted.parameters_by_name().items():
            stacked = torch.stack([own[name] for own in tensors]).to(live.device, live.dtype)
            self.parameters[name] = nn.Parameter(stacked, requires_grad=name in trainable)
        self._everybody = tuple(range(len(tensors)))
        self._present, self._counts = self._everybody, [0] * len(tensors)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters with gradients."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    def read(self, clients: Sequence[int]) -> list[Tensors]:
        """Copies of the tensors of the clients in these places, on the CPU."""
        here = {name: parameter.detach()[list(clients)].cpu() for name, parameter in self.parameters.items()}
        return [{name: tensor[row].clone() for name, tensor in here.items()} for row in range(len(clients))]

    def keep(self, clients: Sequence[int]) -> None:
        """Lets all others go; the parameters are new objects, without gradients, and places count anew."""
        for name, old in self.parameters.items():
            self.parameters[name] = nn.Parameter(old.detach()[list(clients)], requires_grad=old.requires_grad)
        self._everybody = tuple(range(len(clients)))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In the body the model computes with the stack."""
        named = self._adapted.linear_layers()
        layers = {path: _StackedLinear(self, weight, bias) for path, (weight, bias) in named.items()}
        with self._adapted.with_layers(layers):
            yield

    def losses(self, batches: Mapping[int, Batch]) -> list[torch.Tensor]:
        """Mean loss of each client over its own targets, with their graph.

        Args:
            batches: Place of a client -> its examples; some clients may have none.

        Raises:
            UnlikeError: The examples do not go into one batch, or a layer does not see them one by one.
        """
        adapted = self._adapted
        own = [{n: t for n, t in batch.items() if n in adapted.accepted or n == "labels"} for batch in batches.values()]
        self._present, self._counts = tuple(batches), [len(batch["labels"]) for batch in own]
        batch = training.on_device(joined(own, adapted.filler), adapted.device)
        logits = torch.split(adapted.logits(batch), self._counts)
        labels = torch.split(batch["labels"], self._counts)
        return [
            cross_entropy(scores, targets) / training.num_targets({"labels": targets}).clamp(min=1)
            for scores, targets in zip(logits, labels, strict=True)
        ]

    def product(self, x: torch.Tensor, weight: str, bias: str | None) -> torch.Tensor:
        """(examples, ..., out) of (examples, ..., in): each example times its own client's matrix.

        Raises:
            UnlikeError: The first axis is not that of the examples.
        """
        if x.shape[0] != sum(self._counts):
            raise UnlikeError(f"{weight} sees {x.shape[0]} rows of {sum(self._counts)} examples")
        return stacked_product(x, self._own(weight), None if bias is None else self._own(bias), self._counts)

    def _own(self, name: str) -> torch.Tensor:
        """The tensors of the clients that are in the pass."""
        tensor = self.parameters[name]
        return tensor if self._present == self._everybody else tensor[list(self._present)]


class _StackedLinear(nn.Module):
    """Stands where a linear layer stood."""

    def __init__(self, stack: Stack, weight: str, bias: str | None) -> None:
        super().__init__()
        self._stack, self._weight, self._bias = stack, weight, bias

    @property
    def weight(self) -> torch.Tensor:
        """(clients, out, in); PEFT asks for its type."""
        return self._stack.parameters[self._weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._stack.product(x, self._weight, self._bias)


def stacked_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts: Sequence[int]
) -> torch.Tensor:
    """One batched product for clients whose examples stand one behind the other.

    Clients with fewer examples are filled up with zeros: nothing of one client is ever multiplied by anything of
    another's, so that one whose numbers are not finite spoils nobody's.

    Args:
        x: (examples, ..., in).
        weight: (clients, out, in).
        bias: (clients, out).
        counts: Examples of each client; they sum to all.

    Returns:
        (examples, ..., out).
    """
    most = max(counts)
    even = min(counts) == most
    if even:
        by_client = torch.unflatten(x, 0, (len(counts), most))
    else:
        by_client = pad_sequence(list(torch.split(x, list(counts))), batch_first=True)
    rows = by_client.flatten(1, -2)
    result = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    result = result.reshape(*by_client.shape[:-1], weight.shape[1])
    if even:
        return result.flatten(0, 1)
    return torch.cat([own[:count] for own, count in zip(result, counts, strict=True)])


def joined(batches: Sequence[Batch], filler: int) -> Batch:
    """All examples as one batch; texts are filled up behind, to the longest of all.

    Behind, wherever a client's own filling stands: a token then keeps its place in the row, from which many models
    count positions, and what is added is masked.

    Args:
        batches: With the same names.
        filler: Token that may stand where the mask is 0.

    Raises:
        UnlikeError: Names or shapes differ otherwise.
    """
    fill = {"input_ids": filler, "labels": IGNORED}
    length = max(batch["attention_mask"].shape[1] if "attention_mask" in batch else 0 for batch in batches)
    if any(batch.keys() != batches[0].keys() for batch in batches):
        raise UnlikeError(f"batches hold {[sorted(batch) for batch in batches]}")

    def filled(batch: Batch, name: str) -> torch.Tensor:
        tensor = batch[name]
        if "attention_mask" not in batch or tensor.shape != batch["attention_mask"].shape:
            return tensor
        return F.pad(tensor, (0, length - tensor.shape[1]), value=fill.get(name, 0))

    result: dict[str, torch.Tensor] = {}
    for name in batches[0]:
        parts = [filled(batch, name) for batch in batches]
        if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
            raise UnlikeError(f"{name} has shapes {[tuple(part.shape) for part in parts]}")
        result[name] = torch.cat(parts)
    return result
