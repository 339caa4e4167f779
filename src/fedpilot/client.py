"""A client's model: the shared base bound to one client's data, settings and seed for one round."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch

from fedpilot import alignment, condensation, galore, privacy, training
from fedpilot.errors import ModelError, TrainingError
from fedpilot.memory import LiveStorages
from fedpilot.model import AdaptedModel, ModelLens
from fedpilot.tensors import is_finite
from fedpilot.training import Batch, Examples, Step, TrainingSettings
from fedpilot.types import Condensation, Condensed, Matching, Penalty, Plan, StepKind, Task, Tensors


class ClientModel:
    """Implements `types.Model`. Nothing of it depends on ambient randomness, and none is left behind.

    Args:
        adapted: Shared with other clients; a client's turn lasts from its `load` to the next one's.
        examples: The client's training data.
        settings: How it trains.
        learning_rate: Of this round.
        seed: Of the order of examples, of dropout and of a private step's noise; another one each round.
        subset_seed: Of the examples that gradients are measured on; the same in each round.
        measured: What plans were like whose peak was measured; a plan that is unlike them is measured too, and added.
            `fit` then reports ``peak_bytes`` of its longest step, or of its first where that makes projectors and needs
            more. ``None`` to measure nothing.
        noise_key: Secret that a private step's noise and draws follow from instead of the seed.
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
        measured: set[object] | None = None,
        noise_key: bytes | None = None,
    ) -> None:
        self._adapted = adapted
        self._examples = examples
        self._settings = settings
        self._learning_rate = learning_rate
        seeds = (int(s) for s in np.random.SeedSequence(seed).generate_state(4))
        self._order_seed, self._dropout_seed, self._noise_seed, self._draw_seed = seeds
        self._noise_key = noise_key
        self._subset_seed = subset_seed
        self._measured = measured
        self._measure_peak = False
        self._plan: Plan | None = None
        self._factors: Tensors = {}

    @property
    def adapted(self) -> AdaptedModel:
        """The model that it shares with other clients."""
        return self._adapted

    @property
    def settings(self) -> TrainingSettings:
        """How it trains."""
        return self._settings

    @property
    def learning_rate(self) -> float:
        """Of this round."""
        return self._learning_rate

    def load(self, task: Task) -> None:
        """Takes the task's tensors and marks what its plan trains and recomputes."""
        self._adapted.load(task)
        self._plan = task.plan
        self._factors = {}
        if self._measured is not None:
            self._measure_peak = _shape(task.plan) not in self._measured
            self._measured.add(_shape(task.plan))

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
            ``peak_bytes`` if asked for; of a private kind ``sample_rate`` too, and ``loss`` is NaN where every draw was
            empty.

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
        train = training.make_step(
            adapted.loss,
            parameters,
            settings,
            self._learning_rate,
            penalty=penalty,
            kind=kind,
            head=adapted.spec.head,
            noisy=adapted.noisy_sum(parameters, kind, self._expected_examples, self._step_noise),
        )
        private = kind is not None and kind.private is not None
        measured = self._measured_steps(max_steps, kind) if self._measure_peak else frozenset[int]()
        started = time.perf_counter()
        losses: list[float] = []
        metrics: dict[str, float] = {"examples": 0.0}
        with self._seeded():
            adapted.train(trainable, frozen_dropout=settings.frozen_dropout)
            adapted.remember_prefix(trainable, self._cache_bytes())
            for step, drawn in enumerate(self._drawn(max_steps, private), start=1):
                counter = self._counter(train) if step in measured else None
                with counter.counting() if counter else nullcontext():
                    loss = train(self._pieces(drawn, plan, counter))
                if counter:
                    metrics["peak_bytes"] = max(metrics.get("peak_bytes", 0.0), float(counter.peak))
                if size := _size(drawn):
                    losses.append(training.checked(loss, step))
                metrics["examples"] += size
                metrics["steps"] = float(step)
        if private:
            metrics["sample_rate"] = self._sample_rate
        check_trained(plan, metrics, parameters)
        self._factors = adapted.factored(galore.factors(train.optimiser, parameters))
        seconds = time.perf_counter() - started
        return {"loss": sum(losses) / len(losses) if losses else math.nan, "seconds": seconds, **metrics}

    def gradients(self, names: frozenset[str], *, num_examples: int, squared: bool = False) -> Tensors:
        """Mean gradient of the loss at the loaded tensors over a fixed subset of the client's data, dropout off.

        The plan's recomputed blocks are recomputed here too, and its micro-batch bounds the examples of a pass.
        With ``squared``, the mean over examples of each entry's square, from passes of one example each.
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
        adapted.remember_prefix(names, self._cache_bytes())
        if squared:
            squares = self._mean_squares(subset, names)
            adapted.set_trainable(plan.trainable)
            return squares

        def share(batch: Batch) -> torch.Tensor:
            return adapted.loss(batch) * (training.num_targets(batch) / total)

        for batch in subset.batches(size, None):  # one at a time: the predicted peak has room for one
            piece = training.on_device(batch, adapted.device)
            training.backward(share, [piece], self._settings.autocast, adapted.device.type)
        live = adapted.parameters_by_name()
        result = {name: _gradient(live[name]) for name in live if name in names}
        adapted.set_trainable(plan.trainable)
        return result

    def _mean_squares(self, subset: Examples, names: frozenset[str]) -> Tensors:
        """Mean over the examples of the square of each entry's gradient."""
        adapted = self._adapted
        live = {name: tensor for name, tensor in adapted.parameters_by_name().items() if name in names}
        sums = {name: torch.zeros_like(parameter) for name, parameter in live.items()}
        for batch in subset.batches(1, None):
            piece = training.on_device(batch, adapted.device)
            training.backward(adapted.loss, [piece], self._settings.autocast, adapted.device.type)
            for name, parameter in live.items():
                if parameter.grad is not None:
                    sums[name].addcmul_(parameter.grad, parameter.grad)
                    parameter.grad = None
        return {name: (total / len(subset)).to("cpu") for name, total in sums.items()}

    def align(
        self, trainable: frozenset[str], *, emulated: int, num_steps: int, lam: float, layerwise: bool = False
    ) -> Mapping[str, float]:
        """As `types.AlignsEmulator.align`; the distance is measured on a tenth of the examples, the same each time."""
        plan, adapted = self._loaded(), self._adapted
        adapted.set_trainable(trainable)
        live = adapted.parameters_by_name()
        metrics = alignment.align(
            alignment.Emulation(adapted, emulated, lam, layerwise),
            self._examples,
            self._settings,
            {name: live[name] for name in live if name in trainable},
            learning_rate=self._learning_rate,
            num_steps=num_steps,
            order_seed=self._order_seed,
            subset_seed=self._subset_seed,
        )
        adapted.set_trainable(plan.trainable)
        return metrics

    @property
    def seed(self) -> int:
        """As `types.Condenses.seed`."""
        return self._draw_seed

    def class_means(self, how: Condensation) -> Tensors:
        """As `types.Condenses.class_means`; dropout is off."""
        plan, lens = self._loaded(), self._lens(how)
        batches = self._condensed_from(plan, how, None)
        sums = condensation.class_sums(lens, batches, how.tau)
        present = (sums.counts >= max(how.min_examples, 2)).float()
        if not bool(present.any()):
            raise condensation.nothing_to_condense(how)
        means = present * sums.logits / sums.counts.clamp(min=1)
        return {"logits": means.cpu(), "present": present[:, 0].cpu()}

    def condense(self, how: Condensation, peers: torch.Tensor) -> Condensed:
        """As `types.Condenses.condense`; dropout is off. Adds ``seconds``, and ``peak_bytes`` if asked for."""
        plan, lens, started = self._loaded(), self._lens(how), time.perf_counter()
        counter = LiveStorages() if self._measure_peak else None
        if counter:
            counter.hold(self._adapted.resident())
        batches = self._condensed_from(plan, how, counter)
        labels = [label for batch in batches() for label in batch["labels"].tolist()]
        with counter.counting() if counter else nullcontext():
            made = condensation.condense(
                lens, batches, labels, peers, how, piece=plan.micro_batch or self._settings.batch_size, seed=self.seed
            )
        measured = {"peak_bytes": float(counter.peak)} if counter else {}
        metrics = {**made.metrics, **measured, "examples": float(len(labels)), "seconds": time.perf_counter() - started}
        return replace(made, metrics=metrics)

    def fit_items(
        self,
        trainable: frozenset[str],
        items: torch.Tensor,
        labels: torch.Tensor,
        soft_labels: torch.Tensor,
        how: Condensation,
        matching: Matching,
    ) -> Mapping[str, float]:
        """As `types.Condenses.fit_items`."""
        plan, adapted, settings = self._loaded(), self._adapted, self._settings
        adapted.set_trainable(trainable)
        live = {name: tensor for name, tensor in adapted.parameters_by_name().items() if name in trainable}
        with self._seeded():
            adapted.train(trainable, frozen_dropout=settings.frozen_dropout)
            metrics = condensation.fit_items(
                ModelLens(adapted, how),  # the step itself chooses the arithmetic
                lambda loss: training.make_step(loss, live, settings, self._learning_rate, head=adapted.spec.head),
                settings.batch_size,
                items,
                labels,
                soft_labels.to(adapted.device),
                matching,
                generator=torch.Generator().manual_seed(self._order_seed),
            )
        check_trained(plan, metrics, live)
        adapted.set_trainable(plan.trainable)
        return metrics

    def _lens(self, how: Condensation) -> ModelLens:
        self._adapted.set_trainable(frozenset())
        self._adapted.base.eval()
        # Real examples run through the blocks below the items' once, whatever the round: nothing is trained there.
        self._adapted.remember_prefix(frozenset(self._adapted.parameters_by_name()), self._cache_bytes())
        return ModelLens(self._adapted, how, self._settings.autocast)

    def _condensed_from(self, plan: Plan, how: Condensation, counter: LiveStorages | None) -> condensation.Batches:
        """All examples on the device, batch by batch and always in the same order."""
        size = plan.micro_batch or self._settings.batch_size

        def batches() -> Iterator[Batch]:
            for batch in self._examples.batches(size, None):
                piece = training.on_device(batch, self._adapted.device)
                if counter:
                    counter.hold(list(piece.values()))
                yield piece
                del batch, piece

        return batches

    def read(self) -> Tensors:
        """Copies of all loaded tensors, head included; of weights trained whole the change, and its exact factors.

        There are factors, under the names of a base delta, where the last fit had one projector and no decay.
        """
        self._loaded()
        return {**self._adapted.read(), **self._factors}

    def _cache_bytes(self) -> int:
        """The bound on what is remembered of the frozen prefix.

        Raises:
            ModelError: It is not 0, and what is to be remembered changes from step to step.
        """
        if self._settings.cache_bytes and self._settings.frozen_dropout and self._adapted.has_frozen_dropout:
            raise ModelError(
                f"cache_bytes must be 0 while frozen blocks drop out, got {self._settings.cache_bytes}; "
                "set training.frozen_dropout = false, or model.dropout and model.lora_dropout to 0"
            )
        return self._settings.cache_bytes

    def _loaded(self) -> Plan:
        if self._plan is None or self._adapted.plan is not self._plan:
            raise ModelError("a client's task must be loaded before it is worked on, got none or another client's")
        return self._plan

    def batches(self, max_steps: int | None = None) -> Iterator[Batch]:
        """The batches of all local epochs, up to the caps on steps."""
        generator = torch.Generator().manual_seed(self._order_seed)
        left = min((cap for cap in (self._settings.max_steps, max_steps) if cap is not None), default=None)
        for _ in range(self._settings.local_epochs):
            if left == 0:
                return
            for batch in self._examples.batches(self._settings.batch_size, generator, left):
                left = None if left is None else left - 1
                yield batch

    @property
    def _expected_examples(self) -> float:
        """Mean size of a batch that Poisson sampling draws."""
        return self._sample_rate * len(self._examples)

    @property
    def _step_noise(self) -> int | bytes:
        return self._noise_seed if self._noise_key is None else self._noise_key

    @property
    def _sample_rate(self) -> float:
        return privacy.sample_rate(max(len(self._examples), 1), self._settings.batch_size)

    def _drawn(self, max_steps: int | None, private: bool) -> Iterator[Batch | Sequence[int]]:
        """The batches of all steps; of a private kind the positions of the examples that Poisson sampling draws."""
        if not private:
            yield from self.batches(max_steps)
            return
        settings = self._settings
        caps = (settings.max_steps, max_steps, settings.local_epochs * -(-len(self._examples) // settings.batch_size))
        generator = privacy.draws(self._order_seed if self._noise_key is None else self._noise_key)
        num_steps = min(cap for cap in caps if cap is not None)
        yield from privacy.poisson_draws(len(self._examples), self._sample_rate, num_steps, generator)

    def _pieces(self, drawn: Batch | Sequence[int], plan: Plan, counter: LiveStorages | None) -> Iterable[Batch]:
        """The micro-batches of a step on the device; drawn examples come one piece at a time.

        A draw may be larger than the batch that the plan was priced for: no piece is.
        """
        device = self._adapted.device
        if isinstance(drawn, Mapping):
            batch = training.on_device(drawn, device)
            if counter:
                counter.hold(list(batch.values()))
            yield from training.micro_batches(batch, plan.micro_batch)
        elif drawn:
            size = plan.micro_batch or self._settings.batch_size
            for piece in self._examples.subset(drawn).batches(size, None):
                piece = training.on_device(piece, device)
                if counter:
                    counter.hold(list(piece.values()))
                yield piece
                del piece  # else two would stand while the next is made

    def _measured_steps(self, max_steps: int | None, kind: StepKind | None) -> frozenset[int]:
        """The longest step; where gradients are projected also the first, which makes the projectors."""
        longest = self._longest_step(max_steps, kind is not None and kind.private is not None)
        first = {1} if kind is not None and kind.projection is not None else set[int]()
        return frozenset(first if longest is None else {longest, *first})

    def _longest_step(self, max_steps: int | None, private: bool) -> int | None:
        """Number, from 1, of the largest batch; not the first if there are more, which has no optimiser state yet."""
        sizes = [_size(drawn, whole=True) for drawn in self._drawn(max_steps, private)]
        later = range(2, len(sizes) + 1) if len(sizes) > 1 else range(1, len(sizes) + 1)
        return max(later, key=lambda step: sizes[step - 1], default=None)

    def _counter(self, train: Step) -> LiveStorages:
        """A counter that knows what is alive before a step, but for its batch."""
        counter = LiveStorages()
        counter.hold([*self._adapted.resident(), *train.state()])
        return counter

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Seeds dropout, and gives the caller its generators back as they were."""
        device = self._adapted.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._dropout_seed)
            yield


def check_trained(plan: Plan, metrics: Mapping[str, float], trained: Tensors) -> None:
    """Refuses what a fit came to.

    Raises:
        TrainingError: There were no examples, or a trained tensor is not finite.
    """
    if "steps" not in metrics:
        raise TrainingError(f"client {plan.client_id} must have examples to train on, got none")
    if not is_finite(trained):
        raise TrainingError(
            f"trained tensors must be finite, got NaN or infinity after {metrics['steps']:.0f} steps of client "
            f"{plan.client_id}; lower the learning rate or set max_grad_norm"
        )


def _shape(plan: Plan) -> object:
    """What a plan's memory depends on, and whose it is."""
    ranks = tuple(sorted(plan.ranks.items()))
    return (
        plan.client_id,
        ranks,
        plan.trainable,
        plan.blocks,
        plan.checkpointed,
        plan.micro_batch,
        tuple(sorted(plan.sends.items())),
    )


def _size(drawn: Batch | Sequence[int], *, whole: bool = False) -> int:
    """Examples of a step's batch, or with ``whole`` entries of all its tensors where it is there already."""
    if not isinstance(drawn, Mapping):
        return len(drawn)
    return sum(tensor.numel() for tensor in drawn.values()) if whole else drawn["labels"].shape[0]


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter, device="cpu") if gradient is None else gradient.to("cpu", copy=True)
