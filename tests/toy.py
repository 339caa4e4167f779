"""A real, tiny classifier with low-rank pairs in plain torch: a `types.Model` that tests can compute by hand.

No matrix is square, blocks differ in shape, and there are eleven blocks where a test asks for them, so that a name that
catches its neighbour shows.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from fedpilot import lora
from fedpilot.errors import TrainingError
from fedpilot.types import ClientProfile, ModelSpec, Penalty, Site, Task, Tensors

WIDTHS = (6, 5, 7, 4)
SCALE = 2.0


class Pair(nn.Module):
    """A frozen linear map with a low-rank pair beside it."""

    def __init__(self, out_features: int, in_features: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A = nn.Parameter(torch.zeros(0, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + SCALE * (x @ self.lora_A.T) @ self.lora_B.T


class Block(nn.Module):
    """A pair and a nonlinearity."""

    def __init__(self, out_features: int, in_features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = Pair(out_features, in_features, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    """Blocks and a linear head."""

    def __init__(self, widths: Sequence[int] = WIDTHS, num_labels: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(Block(o, i, generator) for i, o in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], num_labels)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(num_labels, widths[-1], generator=generator) / 2)
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def spec(widths: Sequence[int] = WIDTHS) -> ModelSpec:
    """The spec of `Net`."""
    modules = {f"blocks.{j}.linear": (o, i) for j, (i, o) in enumerate(itertools.pairwise(widths))}
    head = {name: p.detach().clone() for name, p in Net(widths).named_parameters() if name.startswith("head.")}
    block_of = {name: int(name.split(".")[1]) for name in modules}
    return ModelSpec(modules=modules, block_of=block_of, num_blocks=len(modules), scale=SCALE, head=head)


class ToyModel:
    """`types.Model` over `Net` with its own examples: plain gradient descent on the whole data set."""

    def __init__(self, examples: int, seed: int, *, widths: Sequence[int] = WIDTHS, steps: int = 3, lr: float = 0.5):
        generator = torch.Generator().manual_seed(seed)
        self.net = Net(widths)
        self.x = torch.randn(examples, widths[0], generator=generator)
        self.y = torch.randint(0, 3, (examples,), generator=generator)
        self.steps, self.lr = steps, lr

    def load(self, task: Task) -> None:
        for name, tensor in task.tensors.items():
            owner = self.net.get_submodule(name.rpartition(".")[0])
            parameter = nn.Parameter(tensor.clone(), requires_grad=name in task.plan.trainable)
            setattr(owner, name.rpartition(".")[2], parameter)

    def live(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.net.named_parameters() if "lora_" in name or name.startswith("head.")}

    def fit(self, trainable: frozenset[str], *, penalty: Penalty | None = None) -> Mapping[str, float]:
        total = 0.0
        for _ in range(self.steps):
            loss = nn.functional.cross_entropy(self.net(self.x), self.y)
            total += float(loss)
            if not torch.isfinite(loss):
                raise TrainingError("loss must be finite, got nan; lower the learning rate")
            objective = loss if penalty is None else loss + penalty(self.live())
            for parameter in self.live().values():
                parameter.grad = None
            objective.backward()
            with torch.no_grad():
                for name, parameter in self.live().items():
                    if name in trainable:
                        assert parameter.grad is not None
                        parameter -= self.lr * parameter.grad
        return {"loss": total / self.steps, "steps": float(self.steps)}

    def gradients(self, names: frozenset[str], *, num_examples: int) -> Tensors:
        live = self.live()
        wanted = [name for name in live if name in names]
        for name in wanted:
            live[name].requires_grad_(True)
        loss = nn.functional.cross_entropy(self.net(self.x[:num_examples]), self.y[:num_examples])
        return dict(zip(wanted, torch.autograd.grad(loss, [live[name] for name in wanted]), strict=True))

    def read(self) -> Tensors:
        return {name: p.detach().clone() for name, p in self.live().items()}


def site(profile: ClientProfile, widths: Sequence[int] = WIDTHS) -> Site:
    """A site whose data follow from its client's number."""
    return Site(profile, ToyModel(profile.num_examples, 100 + profile.client_id, widths=widths))


def random_adapter(spec: ModelSpec, rank: int, seed: int = 7) -> Tensors:
    """An adapter without zeros, as after training."""
    rng = np.random.default_rng(seed)
    fresh = lora.init(spec, dict.fromkeys(spec.modules, rank), rng)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in fresh.items()}
