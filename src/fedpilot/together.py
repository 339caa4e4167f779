"""Clients that are alike, trained in one pass: what `client.ClientModel.fit` does for one, for several at once.

Every client has its own batches in its own order, its own loss, clipping, penalty and optimiser state, and takes as
many steps as by itself; it leaves when it has done them or has failed. Only the order of some sums differs. What draws
random numbers within a step, or keeps something for each example or of whole weights, is left to train by itself.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fedpilot import training
from fedpilot.client import ClientModel, check_trained
from fedpilot.errors import ClientError, ModelError, TrainingError
from fedpilot.model import AdaptedModel, Stack, UnlikeError, check_tensors
from fedpilot.training import Batch, TrainingSettings
from fedpilot.types import Fit, Fitted, Model, StepKind, Task, Tensors


class Together:
    """Implements `types.FitsTogether` over `ClientModel`s.

    Args:
        clients_per_pass: Most clients of a pass; at least 2.
        free_bytes: What the device has left beside the base; ``None`` where nobody counts it.
    """

    def __init__(self, clients_per_pass: int, free_bytes: Callable[[], int] | None = None) -> None:
        self._clients_per_pass = clients_per_pass
        self._free_bytes = free_bytes

    @property
    def clients_per_pass(self) -> int:
        """As `types.FitsTogether.clients_per_pass`."""
        return self._clients_per_pass

    def likeness(self, model: Model, task: Task) -> Hashable | None:
        """As `types.FitsTogether.likeness`: the base and its changes, the settings, and the plan but for whose it is.

        ``None`` with dropout, whose draws depend on the batch; with attachments, whole weights, a head of other layers
        than linear ones, or remembered prefixes; and where nothing is trained.
        """
        plan, base = task.plan, task.base_delta
        if not isinstance(model, ClientModel) or plan.attachment is not None or model.settings.cache_bytes:
            return None
        adapted = model.adapted
        pairs = {f"{module}.{kind}" for module in plan.ranks for kind in ("lora_A", "lora_B")}
        if not plan.trainable or plan.trainable - pairs - adapted.spec.head.keys():
            return None
        if not (adapted.rows_are_independent and adapted.head_is_linear):
            return None
        return (
            id(adapted),
            (base.snapshot_version, id(base.snapshot) if base.snapshot else None, tuple(map(id, base.steps))),
            (model.settings, model.learning_rate),
            (tuple(sorted(plan.ranks.items())), plan.trainable, plan.blocks, plan.checkpointed, plan.micro_batch),
        )

    def room(self, model: Model, task: Task) -> int:
        """As `types.FitsTogether.room`, by what the plan is predicted to need beside the base, which all share."""
        predicted = task.plan.peak_bytes
        if self._free_bytes is None or predicted is None or not isinstance(model, ClientModel):
            return self._clients_per_pass
        of_base = sum(tensor.nbytes for tensor in model.adapted.resident())
        return max(1, min(self._clients_per_pass, self._free_bytes() // max(1, predicted - of_base)))

    def fit(self, fits: Sequence[Fit]) -> Sequence[Fitted | ClientError] | None:
        """As `types.FitsTogether.fit`; ``seconds`` of a client is its share, by examples, of the time of the pass."""
        models = [fit.model for fit in fits if isinstance(fit.model, ClientModel)]
        first, alike = fits[0], {(fit.trainable, _kind(fit.kind)) for fit in fits}
        if len(models) < len(fits) or len(alike) > 1 or not first.trainable or _kind(first.kind) is None:
            return None
        adapted = models[0].adapted
        try:
            for fit in fits:
                check_tensors(adapted.spec, fit.task.plan.ranks, fit.task.tensors)
            return _Pass(models, fits).run()
        except (UnlikeError, ModelError):  # trained one by one, each has its own error, or none
            return None
        finally:
            adapted.plan = None  # whoever goes on with a client loads its task again


def _kind(kind: StepKind | None) -> StepKind | None:
    """What matters of a kind of step; ``None`` for one that keeps more than a gradient and the optimiser's state."""
    plain = replace(kind, patterns=StepKind.patterns) if kind is not None else StepKind()
    return plain if plain == StepKind() else None


@dataclass
class _Member:
    """A client of a pass, and how far it is.

    Attributes:
        fit: What it asked for.
        batches: Those to come.
        batch: Of the next step.
        losses: Of the steps so far.
        examples: Seen so far.
    """

    fit: Fit
    batches: Iterator[Batch]
    batch: Batch = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    examples: float = 0.0
    problem: ClientError | None = None

    def has_next(self) -> bool:
        """Draws the batch of the next step, if there is one."""
        batch = None if self.problem is not None else next(self.batches, None)
        self.batch = batch or {}
        return batch is not None

    def note(self, loss: float) -> None:
        """Takes down a step's loss; one that is not finite is the client's last."""
        self.losses.append(loss)
        self.examples += len(self.batch["labels"])
        try:
            training.checked(loss, len(self.losses))
        except TrainingError as error:
            self.problem = error

    def outcome(self, tensors: Tensors) -> Fitted | ClientError:
        """What came of the fit, but for its seconds."""
        steps = {"steps": float(len(self.losses))} if self.losses else {}
        trained = {name: tensor for name, tensor in tensors.items() if name in self.fit.trainable}
        try:
            if self.problem is not None:
                raise self.problem
            check_trained(self.fit.task.plan, steps, trained)
        except ClientError as error:
            return error
        loss = sum(self.losses) / len(self.losses)
        return Fitted({"loss": loss, "seconds": 0.0, "examples": self.examples, **steps}, tensors)


class _Pass:
    """Several fits, step by step; all clients of a step have taken as many before it."""

    def __init__(self, models: Sequence[ClientModel], fits: Sequence[Fit]) -> None:
        first = models[0]
        self._adapted: AdaptedModel = first.adapted
        self._settings: TrainingSettings = first.settings
        self._learning_rate = first.learning_rate
        self._trainable = fits[0].trainable
        self._micro_batch = fits[0].task.plan.micro_batch
        self._members = [_Member(fit, model.batches(fit.max_steps)) for fit, model in zip(fits, models, strict=True)]

    def run(self) -> list[Fitted | ClientError]:
        """Trains all; one entry for each, in their order."""
        started = time.perf_counter()
        adapted, settings = self._adapted, self._settings
        adapted.load(self._members[0].fit.task)
        adapted.set_trainable(frozenset())  # its own tensors are out of the way: the stack is trained
        adapted.train(self._trainable, frozen_dropout=settings.frozen_dropout)
        self._stack = Stack(adapted, [member.fit.task.tensors for member in self._members], self._trainable)
        self._optimiser = self._new_optimiser()
        with self._stack.installed():
            outcomes = self._train()
        return self._with_seconds(outcomes, time.perf_counter() - started)

    def _train(self) -> dict[int, Fitted | ClientError]:
        outcomes: dict[int, Fitted | ClientError] = {}
        active = list(range(len(self._members)))
        while active:
            going = [place for place, index in enumerate(active) if self._members[index].has_next()]
            ended = [place for place in range(len(active)) if place not in going]
            for place, tensors in zip(ended, self._stack.read(ended) if ended else [], strict=True):
                outcomes[active[place]] = self._members[active[place]].outcome(tensors)
            active = [active[place] for place in going]
            if active and ended:
                self._keep(going)
            if active:
                self._step([self._members[index] for index in active])
        return outcomes

    def _with_seconds(self, outcomes: Mapping[int, Fitted | ClientError], seconds: float) -> list[Fitted | ClientError]:
        """The outcomes in order, each with its share of the time."""
        seen = max(1.0, sum(member.examples for member in self._members))
        shares = [seconds * member.examples / seen for member in self._members]
        found = [outcomes[index] for index in range(len(self._members))]
        return [
            replace(entry, metrics={**entry.metrics, "seconds": share}) if isinstance(entry, Fitted) else entry
            for entry, share in zip(found, shares, strict=True)
        ]

    def _step(self, members: Sequence[_Member]) -> None:
        """One optimiser step of every client that is left; `training.train_step`, side by side."""
        self._optimiser.zero_grad(set_to_none=True)
        losses = self._backward([member.batch for member in members])
        trained = self._stack.trained()
        for place, member in enumerate(members):
            if member.fit.penalty is not None:
                _add_penalty(trained, place, member.fit.penalty)
        if self._settings.max_grad_norm is not None:
            clip_by_client(list(trained.values()), self._settings.max_grad_norm)
        self._optimiser.step()
        for member, loss in zip(members, losses.tolist(), strict=True):  # the one wait for the device
            member.note(loss)

    def _backward(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Adds each client's gradient of its batch's mean loss, however the batches are cut; the means, (clients,)."""
        pieces = [training.micro_batches(batch, self._micro_batch) for batch in batches]
        means = torch.zeros(len(batches), device=self._adapted.device)
        for turn in range(max(map(len, pieces))):
            present = {place: own[turn] for place, own in enumerate(pieces) if turn < len(own)}
            with training.arithmetic(self._settings.autocast, self._adapted.device.type):
                losses = torch.stack(self._stack.losses(present))
            shares = [_share(pieces[place], turn) for place in present]
            if any(share != 1 for share in shares):
                losses = losses * torch.tensor(shares, device=losses.device)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            means[list(present)] += losses.detach()
            del losses  # else the graph's last values outlive the next forward pass
        return means

    def _keep(self, places: Sequence[int]) -> None:
        """Lets the other clients go, and their share of the optimiser's state."""
        before, state = self._stack.trained(), self._optimiser.state
        self._stack.keep(places)
        self._optimiser = self._new_optimiser()
        for name, after in self._stack.trained().items():
            own = state.get(before[name], {})
            self._optimiser.state[after] = {key: _rows(value, before[name], places) for key, value in own.items()}

    def _new_optimiser(self) -> torch.optim.Optimizer:
        """Over the whole stack: its rules go entry by entry, and all clients have taken as many steps."""
        return training.make_optimiser(
            self._stack.trained(), self._settings, self._learning_rate, self._adapted.spec.head
        )


def _share(pieces: Sequence[Batch], turn: int) -> float:
    """The share of a batch's targets that a piece of it has."""
    if len(pieces) == 1:
        return 1.0
    counts = [float(training.num_targets(piece)) for piece in pieces]
    return counts[turn] / max(sum(counts), 1.0)


def _rows(value: object, whole: torch.Tensor, places: Sequence[int]) -> object:
    """The clients' part of what an optimiser keeps for a tensor; a count of steps is everybody's."""
    return value[list(places)] if isinstance(value, torch.Tensor) and value.shape == whole.shape else value


def _add_penalty(trained: Mapping[str, nn.Parameter], place: int, penalty: Callable[[Tensors], torch.Tensor]) -> None:
    """Adds the gradient of a client's penalty, which sees its own tensors alone, to that client's rows."""
    live = {name: parameter.detach()[place].requires_grad_() for name, parameter in trained.items()}
    penalty(live).backward()  # type: ignore[no-untyped-call]
    for name, tensor in live.items():
        parameter = trained[name]
        if tensor.grad is not None:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad[place] += tensor.grad


def clip_by_client(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scales each client's gradients, over all its tensors together, down to a norm; `clip_grad_norm_` for several.

    Args:
        parameters: (clients, ...) each; those without a gradient are left alone.
        max_norm: Largest norm.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients])
    factors = (max_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.reshape(-1, *[1] * (gradient.ndim - 1)))
