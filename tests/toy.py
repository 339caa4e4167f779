"""A real, tiny classifier with low-rank pairs in plain torch: a `types.Model` that tests can compute by hand.

No matrix is square, blocks differ in shape, and there are eleven blocks where a test asks for them, so that a name that
catches its neighbour shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedpilot import base_deltas, condensation, galore, lora, memory
from fedpilot.errors import TrainingError
from fedpilot.galore import GaLoreAdamW
from fedpilot.memory import MemoryProfile, StepProgram
from fedpilot.model.attached import Attached, attach
from fedpilot.training import TrainingSettings, make_step
from fedpilot.types import (
    BaseDelta,
    ClientProfile,
    Condensation,
    Condensed,
    ExampleDP,
    Matching,
    ModelSpec,
    Penalty,
    Plan,
    Projection,
    Site,
    StepKind,
    Task,
    Tensors,
)

WIDTH = 6
HIDDEN = (5, 7, 4)
NUM_LABELS = 3
SCALE = 2.0
BATCH = 8


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
    """A pair, a nonlinearity and a fixed way back to the stream's width, added to the stream."""

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = Pair(hidden, WIDTH, generator)
        self.back = nn.Parameter(torch.randn(WIDTH, hidden, generator=generator) / hidden**0.5, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x)) @ self.back.T


class Net(nn.Module):
    """Blocks and a linear head."""

    def __init__(self, hidden: Sequence[int] = HIDDEN) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(Block(h, generator) for h in hidden)
        self.head = nn.Linear(WIDTH, NUM_LABELS)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(NUM_LABELS, WIDTH, generator=generator) / 2)
            self.head.bias.zero_()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the head gets."""
        for block in self.blocks.children():
            x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def attached_loss(net: Net, attached: Attached | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, and what an attachment adds to it; every example has ones in the attachment's columns."""
    if attached is None:
        return nn.functional.cross_entropy(net(x), y)

    def query(pooling: str, blocks: int) -> torch.Tensor:
        with torch.no_grad():
            return net.features(x)

    side = {name: torch.ones(len(x), *shape) for name, shape in attached.columns.items()}
    attached.begin({"x": x}, side, query)
    return attached.loss(nn.functional.cross_entropy(net(x), y))


def spec(hidden: Sequence[int] = HIDDEN) -> ModelSpec:
    """The spec of `Net`."""
    modules = {f"blocks.{j}.linear": (h, WIDTH) for j, h in enumerate(hidden)}
    head = {name: p.detach().clone() for name, p in Net(hidden).named_parameters() if name.startswith("head.")}
    block_of = {name: int(name.split(".")[1]) for name in modules}
    return ModelSpec(modules, block_of, num_blocks=len(modules), scale=SCALE, head=head, width=WIDTH)


def program(plan: Plan, micro_batch: int, batch: int = BATCH, kind: StepKind | None = None) -> StepProgram:
    """A step of plain gradient descent, or of projected AdamW, on fake tensors, as `memory.trace` wants it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    net = Net()

    def fake(parameter: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)

    with mode:
        for module in net.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, fake(parameter))
        for name, (hidden, width) in spec().modules.items():
            pair, rank = net.get_submodule(name), plan.ranks.get(name, 0)
            pair.lora_A, pair.lora_B = fake(torch.empty(rank, width)), fake(torch.empty(hidden, rank))
        loaded = range(len(net.blocks)) if plan.blocks is None else plan.blocks
        net.blocks = nn.ModuleList(net.blocks[j] for j in loaded)
        x, y = torch.empty(batch, WIDTH), torch.zeros(batch, dtype=torch.long)
        held = {
            f"blocks.{j}.linear.{kind}": getattr(block.linear, kind)
            for j, block in zip(loaded, net.blocks, strict=True)
            for kind in ("lora_A", "lora_B")
            if f"blocks.{j}.linear" in plan.ranks
        }
        held |= {
            name: block.linear.weight
            for j, block in zip(loaded, net.blocks, strict=True)
            if (name := f"blocks.{j}.linear.weight") in plan.trainable
        }
        held |= {name: p for name, p in net.named_parameters() if name.startswith("head.")}
        attached = None
        if plan.attachment is not None:
            attached = attach(plan.attachment, spec(), net, x.device)
            replaced = plan.attachment.replaces(spec())
            held = {**attached.parameters, **{name: p for name, p in held.items() if name not in replaced}}
        for name, parameter in held.items():
            parameter.requires_grad_(name in plan.trainable)
        trained = {name: parameter for name, parameter in held.items() if parameter.requires_grad}
        if kind is not None and kind.projection is not None:
            optimiser = projected_optimiser(trained, 0.1, replace(kind.projection, gap=1))
        else:
            optimiser = torch.optim.SGD(trained.values() or [x], lr=0.1, foreach=False)

    if kind is not None and kind.condensation is not None:
        pieces, lens = {"x": x[:micro_batch], "labels": y[:micro_batch]}, ToyLens(net, kind.condensation.depth)
        rehearsal = condensation.rehearsal(lens, pieces, kind.condensation, micro_batch)
        return StepProgram([*net.parameters(), x, y], list(net.blocks), held, rehearsal, context=lambda: mode)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        for i in range(0, batch, micro_batch):
            attached_loss(net, attached, x[i : i + micro_batch], y[i : i + micro_batch]).backward()
        optimiser.step()

    return StepProgram([*net.parameters(), *held.values(), x, y], list(net.blocks), held, step, context=lambda: mode)


def projected_optimiser(
    parameters: Mapping[str, nn.Parameter], lr: float, projection: Projection
) -> torch.optim.Optimizer:
    """GaLore's own, over whole weights and the head."""
    head = {name: p for name, p in parameters.items() if name.startswith("head.")}
    whole = [p for name, p in parameters.items() if name not in head]
    return GaLoreAdamW(whole, list(head.values()), projection, learning_rate=lr)


class ToyLens:
    """`condensation.Lens` over a `Net`: items are the states that enter block ``depth``."""

    num_classes = NUM_LABELS

    def __init__(self, net: Net, depth: int) -> None:
        self.blocks, self.head, self.depth = list(net.blocks.children()), net.head, depth

    def real(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            x = batch["x"]
            for block in self.blocks[: self.depth]:
                x = block(x)
            return x, *self.synthetic(x)

    def synthetic(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks[self.depth :]:
            items = block(items)
        return items, self.head(items)


class ToyModel:
    """`types.Model` over `Net` with its own examples: plain gradient descent on the whole data set."""

    def __init__(
        self, examples: int, seed: int, *, steps: int = 3, lr: float = 0.5, hidden: Sequence[int] = HIDDEN
    ) -> None:
        self.generator = generator = torch.Generator().manual_seed(seed)
        self.hidden = hidden
        self.net = Net(hidden)
        self.blocks = list(self.net.blocks)
        self.x = torch.randn(examples, WIDTH, generator=generator)
        self.y = torch.randint(0, NUM_LABELS, (examples,), generator=generator)
        self.steps, self.lr = steps, lr
        self.starts: dict[str, torch.Tensor] = {}
        self.factors: dict[str, torch.Tensor] = {}
        self.attached: Attached | None = None
        self.replaced: frozenset[str] = frozenset()

    def load(self, task: Task) -> None:
        self.run_blocks(range(len(self.blocks)))
        self.attach(task)
        for name, start in self.starts.items():
            self.net.get_parameter(name).requires_grad_(False).copy_(start)
        for name, tensor in task.tensors.items():
            if self.attached is not None and name in self.attached.parameters:
                continue
            owner = self.net.get_submodule(name.rpartition(".")[0])
            parameter = nn.Parameter(tensor.clone(), requires_grad=name in task.plan.trainable)
            setattr(owner, name.rpartition(".")[2], parameter)
        self.change_base(task.base_delta)
        if task.plan.blocks is not None:
            self.run_blocks(task.plan.blocks)
        whole = [f"blocks.{j}.linear.weight" for j in range(len(self.blocks))]
        self.starts = {
            name: self.net.get_parameter(name).requires_grad_(True).detach().clone()
            for name in whole
            if name in task.plan.trainable
        }
        self.factors = {}

    def attach(self, task: Task) -> None:
        """Hooks on what the plan names, in place of what was there."""
        if self.attached is not None:
            self.attached.remove()
        self.attached, attachment = None, task.plan.attachment
        self.replaced = frozenset() if attachment is None else attachment.replaces(spec(self.hidden))
        if attachment is None:
            return
        self.attached = attach(attachment, spec(self.hidden), self.net, torch.device("cpu"))
        with torch.no_grad():
            for name, parameter in self.attached.parameters.items():
                parameter.copy_(task.tensors[name]).requires_grad_(name in task.plan.trainable)

    def run_blocks(self, blocks: Sequence[int]) -> None:
        """Makes the net one of these blocks alone, under the names that they have in the whole."""
        self.net.blocks = nn.ModuleDict({str(j): self.blocks[j] for j in blocks})

    def change_base(self, base: BaseDelta) -> None:
        """Adds a base delta to the pristine frozen weights."""
        pristine = Net(self.hidden)
        for name, change in base_deltas.total(base).items():
            self.net.get_parameter(name).data = pristine.get_parameter(name).data + change

    def live(self) -> dict[str, nn.Parameter]:
        own = {
            name: p
            for name, p in self.net.named_parameters()
            if "lora_" in name or (name.startswith("head.") and name not in self.replaced) or name in self.starts
        }
        if self.attached is None:
            return own
        return {**self.attached.parameters, **{name: p for name, p in own.items() if "lora_" not in name}}

    def fit(
        self,
        trainable: frozenset[str],
        *,
        penalty: Penalty | None = None,
        max_steps: int | None = None,
        kind: StepKind | None = None,
    ) -> Mapping[str, float]:
        total = 0.0
        steps = self.steps if max_steps is None else min(self.steps, max_steps)
        if kind is not None and kind.private is not None:
            return self._fit_privately(trainable, kind.private, steps)
        trained = {name: p for name, p in self.live().items() if name in trainable}
        projection = None if kind is None else kind.projection
        optimiser = None if projection is None else projected_optimiser(trained, self.lr / 10, projection)
        for _ in range(steps):
            loss = attached_loss(self.net, self.attached, self.x, self.y)
            total += float(loss.detach())
            if not torch.isfinite(loss):
                raise TrainingError("loss must be finite, got nan; lower the learning rate")
            objective = loss if penalty is None else loss + penalty(self.live())
            for parameter in self.live().values():
                parameter.grad = None
            objective.backward()
            if optimiser is not None:
                optimiser.step()
                continue
            with torch.no_grad():
                for name, parameter in self.live().items():
                    if name in trainable:
                        assert parameter.grad is not None
                        parameter -= self.lr * parameter.grad
        for name, (left, right) in ({} if optimiser is None else galore.factors(optimiser, trained)).items():
            module = name.removesuffix(".weight")
            self.factors |= {base_deltas.b_name(module): left.clone(), base_deltas.a_name(module): right.clone()}
        return {"loss": total / steps, "steps": float(steps)}

    def _fit_privately(self, trainable: frozenset[str], private: ExampleDP, steps: int) -> Mapping[str, float]:
        """DP-SGD by the book: one backward pass an example."""
        rate = min(1.0, BATCH / len(self.x))
        trained = {name: p for name, p in self.live().items() if name in trainable}
        for _ in range(steps):
            deviation = private.noise_multiplier * private.clip if private.noise_multiplier else 0.0
            total = {n: deviation * torch.randn(p.shape, generator=self.generator) for n, p in trained.items()}
            for i in (torch.rand(len(self.x), generator=self.generator) < rate).nonzero().flatten().tolist():
                loss = nn.functional.cross_entropy(self.net(self.x[i : i + 1]), self.y[i : i + 1])
                gradients = torch.autograd.grad(loss, list(trained.values()))
                norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
                for name, gradient in zip(trained, gradients, strict=True):
                    total[name] += gradient * min(1.0, private.clip / float(norm))
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter -= self.lr * total[name] / (rate * len(self.x))
        return {"loss": 1.0, "steps": float(steps), "sample_rate": rate}

    @property
    def seed(self) -> int:
        return len(self.x)

    def batches(self) -> Iterator[Mapping[str, torch.Tensor]]:
        for x, y in zip(self.x.split(BATCH), self.y.split(BATCH), strict=True):
            yield {"x": x, "labels": y}

    def class_means(self, how: Condensation) -> Tensors:
        sums = condensation.class_sums(ToyLens(self.net, how.depth), self.batches, how.tau)
        present = (sums.counts >= how.min_examples).float()
        return {"logits": present * sums.logits / sums.counts.clamp(min=1), "present": present[:, 0]}

    def condense(self, how: Condensation, peers: torch.Tensor) -> Condensed:
        for parameter in self.live().values():
            parameter.requires_grad_(False)
        lens, labels = ToyLens(self.net, how.depth), self.y.tolist()
        return condensation.condense(lens, self.batches, labels, peers, how, piece=BATCH, seed=self.seed)

    def fit_items(
        self,
        trainable: frozenset[str],
        items: torch.Tensor,
        labels: torch.Tensor,
        soft_labels: torch.Tensor,
        how: Condensation,
        matching: Matching,
    ) -> Mapping[str, float]:
        settings = TrainingSettings(learning_rate=self.lr / 10, optimiser="sgd")
        live = {name: p for name, p in self.live().items() if name in trainable}
        return condensation.fit_items(
            ToyLens(self.net, how.depth),
            lambda loss: make_step(loss, live, settings, settings.learning_rate),
            BATCH,
            items,
            labels,
            soft_labels,
            matching,
            generator=torch.Generator().manual_seed(0),
        )

    def gradients(self, names: frozenset[str], *, num_examples: int, squared: bool = False) -> Tensors:
        if squared:
            return self._mean_squares(names, num_examples)
        live = self.live()
        wanted = [name for name in live if name in names]
        for name in wanted:
            live[name].requires_grad_(True)
        loss = nn.functional.cross_entropy(self.net(self.x[:num_examples]), self.y[:num_examples])
        return dict(zip(wanted, torch.autograd.grad(loss, [live[name] for name in wanted]), strict=True))

    def _mean_squares(self, names: frozenset[str], num_examples: int) -> Tensors:
        x, y, total = self.x, self.y, dict[str, torch.Tensor]()
        for i in range(count := min(num_examples, len(x))):
            self.x, self.y = x[i : i + 1], y[i : i + 1]
            for name, gradient in self.gradients(names, num_examples=1).items():
                total[name] = total.get(name, torch.zeros(())) + gradient.square() / count
        self.x, self.y = x, y
        return total

    def read(self) -> Tensors:
        live = {name: p.detach().clone() for name, p in self.live().items()}
        return {**live, **{name: live[name] - start for name, start in self.starts.items()}, **self.factors}


class ToyServer(ToyModel):
    """A server's model: aligns an emulator by plain gradient descent on the squared distance after it."""

    def align(
        self, trainable: frozenset[str], *, emulated: int, num_steps: int, lam: float, layerwise: bool = False
    ) -> Mapping[str, float]:
        live = {name: p for name, p in self.live().items() if name in trainable}
        distances = []
        for _ in range(num_steps):
            student = self._run([j for j in map(int, self.net.blocks) if j < emulated])
            teacher = self._run(range(emulated), bare=True)
            loss = (student - teacher.detach()).square().sum() / teacher.detach().square().sum()
            for parameter in live.values():
                parameter.requires_grad_(True)
            gradients = torch.autograd.grad(loss, list(live.values()))
            with torch.no_grad():
                for parameter, gradient in zip(live.values(), gradients, strict=True):
                    parameter -= self.lr * gradient
            distances.append(float(loss.detach()))
        return {"distance_before": distances[0], "distance": distances[-1], "loss": 0.0, "steps": float(num_steps)}

    def _run(self, blocks: Sequence[int], bare: bool = False) -> torch.Tensor:
        x = self.x
        for j in blocks:
            if bare:
                x = x + torch.tanh(x @ self.blocks[j].linear.weight.T) @ self.blocks[j].back.T
            else:
                x = self.blocks[j](x)
        return x


def attached_profile(kind: StepKind) -> MemoryProfile:
    """The memory profile of a method with an attachment, traced."""
    assert kind.attachment is not None
    return memory.trace_attached(partial(program, kind=kind), spec(), kind.attachment, batch=BATCH)


def server(round: int) -> Site:
    """The server's site, with data of its own in each round."""
    return Site(ClientProfile(-1, 9, 2**62), ToyServer(9, 1000 + round))


def site(profile: ClientProfile) -> Site:
    """A site whose data follow from its client's number."""
    return Site(profile, ToyModel(profile.num_examples, 100 + profile.client_id))


def random_adapter(spec: ModelSpec, rank: int, seed: int = 7) -> Tensors:
    """An adapter without zeros, as after training."""
    rng = np.random.default_rng(seed)
    fresh = lora.init(spec, dict.fromkeys(spec.modules, rank), rng)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in fresh.items()}


def pad(tensors: Tensors, rank: int) -> Tensors:
    """Rows of zeros below A and columns of zeros beside B up to ``rank``; other tensors as they are."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A"):
            result[name] = torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        elif name.endswith(".lora_B"):
            result[name] = torch.nn.functional.pad(tensor, (0, rank - tensor.shape[1]))
        else:
            result[name] = tensor
    return result
