"""A client's model: the shared base bound to one client's data, settings and seed for one round."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from fedpilot import training
from fedpilot.errors import ModelError, TrainingError
from fedpilot.memory import LiveStorages
from fedpilot.model import AdaptedModel
from fedpilot.tensors import is_finite
from fedpilot.training import Batch, Examples, Step, TrainingSettings
from fedpilot.types import Penalty, Plan, StepKind, Task, Tensors


class ClientModel:
    """Implements `types.Model`. Nothing of it depends on ambient randomness, and none is left behind.

    Args:
        adapted: Shared with other clients; a client's turn lasts from its `load` to the next one's.
        examples: The client's training data.
        settings: How it trains.
        learning_rate: Of this round.
        seed: Of the order of examples and of dropout; another one each round.
        subset_seed: Of the examples that gradients are measured on; the same in each round.
        measure_peak: Whether `fit` reports the measured ``peak_bytes`` of its longest step.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        examples: Examples,
        settings: TrainingSettings,
        *,
        learning_rate: float,
        seed: int,
        subset_seed: int = 0,
        measure_peak: bool = False,
    ) -> None:
        self._adapted = adapted
        self._examples = examples
        self._settings = settings
        self._learning_rate = learning_rate
        self._order_seed, self._dropout_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
        self._subset_seed = subset_seed
        self._measure_peak = measure_peak
        self._plan: Plan | None = None

    def load(self, task: Task) -> None:
        """Takes the task's tensors and marks what its plan trains and recomputes."""
        self._adapted.load(task)
        self._plan = task.plan

    def fit(
        self,
        trainable: frozenset[str],
        *,
        penalty: Penalty | None = None,
        max_steps: int | None = None,
        kind: StepKind | None = None,
    ) -> Mapping[str, float]:
        """Trains the named tensors on the client's data.

        Returns:
            ``loss`` (mean over steps), ``steps``, ``examples`` (each time one was seen), ``seconds``, and
            ``peak_bytes`` if asked for.

        Raises:
            ModelError: The loaded task is another client's, or there is nothing to train.
            TrainingError: There are no examples, or a loss or a trained tensor is not finite.
        """
        plan = self._loaded()
        adapted, settings = self._adapted, self._settings
        adapted.set_trainable(trainable)
        parameters = {name: tensor for name, tensor in adapted.parameters_by_name().items() if name in trainable}
        if not parameters:
            raise ModelError(f"a fit must train at least one tensor, got none for client {plan.client_id}")
        train = training.make_step(adapted.loss, parameters, settings, self._learning_rate, penalty=penalty, kind=kind)
        longest = self._longest_step(max_steps) if self._measure_peak else None
        started = time.perf_counter()
        losses: list[float] = []
        metrics: dict[str, float] = {"examples": 0.0}
        with self._seeded():
            adapted.base.train()
            for step, batch in enumerate(self._batches(max_steps), start=1):
                batch = training.on_device(batch, adapted.device)
                pieces = training.micro_batches(batch, plan.micro_batch)

                counter = self._counter(train, batch) if step == longest else None
                with counter.counting() if counter else nullcontext():
                    loss = train(pieces)
                if counter:
                    metrics["peak_bytes"] = float(counter.peak)
                losses.append(training.checked(loss, step))
                metrics["examples"] += batch["labels"].shape[0]
        self._check(plan, losses, parameters)
        seconds = time.perf_counter() - started
        return {"loss": sum(losses) / len(losses), "steps": float(len(losses)), "seconds": seconds, **metrics}

    def gradients(self, names: frozenset[str], *, num_examples: int) -> Tensors:
        """Mean gradient of the loss at the loaded tensors over a fixed subset of the client's data, dropout off.

        The plan's recomputed blocks are recomputed here too, and its micro-batch bounds the examples of a pass.
        """
        plan = self._loaded()
        adapted = self._adapted
        generator = torch.Generator().manual_seed(self._subset_seed)
        chosen = torch.randperm(len(self._examples), generator=generator)[:num_examples].sort().values
        subset = self._examples.subset(chosen.tolist())
        size = plan.micro_batch or self._settings.batch_size
        total = sum(float(training.num_targets(batch)) for batch in subset.batches(size, None))
        if not total:
            raise TrainingError(f"client {plan.client_id} must have examples to measure gradients on, got none")
        adapted.set_trainable(names)
        adapted.eval_recomputing()

        def share(batch: Batch) -> torch.Tensor:
            return adapted.loss(batch) * (training.num_targets(batch) / total)

        for batch in subset.batches(size, None):  # one at a time: the predicted peak has room for one
            piece = training.on_device(batch, adapted.device)
            training.backward(share, [piece], self._settings.autocast, adapted.device.type)
        live = adapted.parameters_by_name()
        result = {name: _gradient(live[name]) for name in live if name in names}
        adapted.set_trainable(plan.trainable)
        return result

    def read(self) -> Tensors:
        """Copies of all loaded tensors, head included."""
        self._loaded()
        return self._adapted.read()

    def _loaded(self) -> Plan:
        if self._plan is None or self._adapted.plan is not self._plan:
            raise ModelError("a client's task must be loaded before it is worked on, got none or another client's")
        return self._plan

    def _batches(self, max_steps: int | None) -> Iterator[Batch]:
        """The batches of all local epochs, up to the caps on steps."""
        generator = torch.Generator().manual_seed(self._order_seed)
        left = min((cap for cap in (self._settings.max_steps, max_steps) if cap is not None), default=None)
        for _ in range(self._settings.local_epochs):
            if left == 0:
                return
            for batch in self._examples.batches(self._settings.batch_size, generator, left):
                left = None if left is None else left - 1
                yield batch

    def _longest_step(self, max_steps: int | None) -> int | None:
        """Number, from 1, of the largest batch; not the first if there are more, which has no optimiser state yet."""
        sizes = [sum(tensor.numel() for tensor in batch.values()) for batch in self._batches(max_steps)]
        later = range(2, len(sizes) + 1) if len(sizes) > 1 else range(1, len(sizes) + 1)
        return max(later, key=lambda step: sizes[step - 1], default=None)

    def _counter(self, train: Step, batch: Batch) -> LiveStorages:
        """A counter that knows what is alive before a step."""
        counter = LiveStorages()
        counter.hold([*self._adapted.resident(), *train.state(), *batch.values()])
        return counter

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Seeds dropout, and gives the caller its generators back as they were."""
        device = self._adapted.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._dropout_seed)
            yield

    @staticmethod
    def _check(plan: Plan, losses: list[float], trained: Tensors) -> None:
        if not losses:
            raise TrainingError(f"client {plan.client_id} must have examples to train on, got none")
        if not is_finite(trained):
            raise TrainingError(
                f"trained tensors must be finite, got NaN or infinity after {len(losses)} steps of client "
                f"{plan.client_id}; lower the learning rate or set max_grad_norm"
            )


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter, device="cpu") if gradient is None else gradient.to("cpu", copy=True)
