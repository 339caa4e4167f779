"""Sections of a recipe that belong to no module: the run, the clients' machines, the evaluation, the method."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fedpilot import robust
from fedpilot.config.schema import AT_LEAST_ONE, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, SHARE, ByteSize, Rule
from fedpilot.trackers import TrackerName

_COUNT_OR_AUTO = Rule('be at least 1, or "auto"', lambda value: value == "auto" or value >= 1)
_PLAIN_NAME = Rule("be a name without slashes", lambda value: bool(value) and "/" not in value and value != "..")


@dataclass(frozen=True)
class RunSettings:
    """How long, with whom, where to.

    Attributes:
        name: Of the run directory.
        rounds: Rounds.
        cohort: Clients sampled each round; ``"none"`` for all.
        seed: Of everything that is drawn.
        out: Folder that run directories are made in.
        device: Where clients train; ``auto`` takes a GPU where there is one.
        threads: Threads of a matrix product; ``"none"`` leaves torch's choice.
        workers: Processes that clients train in and that evaluations are dealt out to, of one thread each where there
            are several; ``1`` is this process. ``auto`` measures at the start whether as many as there are threads get
            more done than one, and records the number.
        clients_per_pass: Most clients that train in one pass over the base that they share, where their plans are alike
            and nothing drops out; ``1`` for one after the other. ``auto`` is 8 on a GPU and 1 elsewhere, and records
            the number; on a GPU a pass has no more clients than there is memory for.
        kept: Where what clients keep between rounds is held: in ``memory`` and checkpoints, or on ``disk``, for
            populations that memory does not hold.
        engine: What carries tasks to clients: ``in-process``, or worker processes, on this machine;
            ``flower-simulation``, the same over Flower's messages and Ray; ``flower``, nodes on other machines, which
            ``fedpilot serve`` runs.
        ray_address: Of a running Ray cluster that ``flower-simulation`` spreads clients over, as ``host:6379``, or
            ``auto`` for the one that this machine belongs to; ``"none"`` starts Ray on this machine alone.
        trackers: Where curves go besides the run's own files: ``tensorboard``, and ``mlflow`` and ``wandb``, extras of
            the same names. They write into the run directory unless their own environment variables say otherwise.
        min_uploads: Fewest uploads that change the state; a round with fewer is recorded and leaves it as it is.
        min_share: The same as a share of the clients that were asked; both must be reached.
    """

    name: Annotated[str, _PLAIN_NAME] = "run"
    rounds: Annotated[int, AT_LEAST_ONE] = 10
    cohort: Annotated[int | None, AT_LEAST_ONE] = None
    seed: Annotated[int, NOT_NEGATIVE] = 0
    out: str = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int | None, AT_LEAST_ONE] = None
    workers: Annotated[int | Literal["auto"], _COUNT_OR_AUTO] = 1
    clients_per_pass: Annotated[int | Literal["auto"], _COUNT_OR_AUTO] = "auto"
    kept: Literal["memory", "disk"] = "memory"
    engine: Literal["in-process", "flower-simulation", "flower"] = "in-process"
    ray_address: Annotated[str | None, NOT_EMPTY] = None
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    min_uploads: Annotated[int, AT_LEAST_ONE] = 1
    min_share: Annotated[float, Rule("lie in [0, 1]", lambda value: 0 <= value <= 1)] = 0.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.cohort is not None and self.min_uploads > self.cohort:
            rule = f"min_uploads must be at most cohort, {self.cohort}"
            problems.append(f"{rule}, got {self.min_uploads}; no round would count")
        elsewhere = self.workers not in (1, "auto") or self.engine != "in-process"
        if elsewhere and self.clients_per_pass not in (1, "auto"):
            rule = "clients_per_pass must be 1 where clients do not train in this process"
            problems.append(f"{rule}, got {self.clients_per_pass}; set workers = 1 and engine = 'in-process'")
        if self.ray_address is not None and self.engine != "flower-simulation":
            rule = "ray_address must be left out where engine is not 'flower-simulation'"
            problems.append(f"{rule}, got {self.ray_address!r}; set engine = 'flower-simulation'")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class ClientSettings:
    """What the clients' machines can do.

    Attributes:
        memory: Budget of each tier: bytes, or a number with a unit such as ``"220 MiB"``.
        tiers: Names of the tiers; numbered where left out.
        assign: ``cycle`` gives client k the tier ``k mod tiers``; ``shuffle`` deals the same tiers out at random.
        deadline_s: Seconds that a client's local update may take, for each tier; empty for no deadline.
        flops_per_second: Speed of each tier, for predicted seconds; empty to have this machine's measured at the start
            where there is a deadline.
        micro_batches: Examples of a forward pass that a plan may choose besides the whole batch, where the method can;
            each divides ``training.batch_size``.
        overhead_bytes: What a device needs beside the tensors; ``"none"`` to have it measured at the start on a GPU,
            and for nothing on a CPU.
    """

    memory: Annotated[tuple[ByteSize, ...], NOT_EMPTY]
    tiers: tuple[str, ...] = ()
    assign: Literal["cycle", "shuffle"] = "cycle"
    deadline_s: tuple[Annotated[float, POSITIVE], ...] = ()
    flops_per_second: tuple[Annotated[float, POSITIVE], ...] = ()
    micro_batches: tuple[Annotated[int, AT_LEAST_ONE], ...] = ()
    overhead_bytes: ByteSize | None = None

    def __post_init__(self) -> None:
        uneven = [
            f"{name} must have one entry for each of the {len(self.memory)} of memory, got {len(getattr(self, name))}"
            for name in ("tiers", "deadline_s", "flops_per_second")
            if getattr(self, name) and len(getattr(self, name)) != len(self.memory)
        ]
        if uneven:
            raise ValueError("; ".join(uneven))


@dataclass(frozen=True)
class ServerSettings:
    """What the server trains with, for methods that train there; other methods leave all of it alone.

    Attributes:
        source: Public data, named as in ``data.source``; inputs alone are read, no classes. ``"none"`` for none.
        text: Its column of the text.
        image: Its column of the image.
        prompt: Its column of the text that stands before ``text``, for a language model; ``"none"`` for none.
        fraction: In place of ``source``, share of the training rows that the server holds; no client of any method has
            them.
        limit: Rows of ``source`` kept at most; ``"none"`` for all.
        optimiser: As in ``training``.
        learning_rate: The same in every round.
        batch_size: Examples of a step; ``"none"`` for ``training.batch_size``.
    """

    source: Annotated[str | None, NOT_EMPTY] = None
    text: str = "text"
    image: str = "image"
    prompt: str | None = None
    fraction: Annotated[float, Rule("lie in [0, 1)", lambda value: 0 <= value < 1)] = 0.0
    limit: Annotated[int | None, AT_LEAST_ONE] = None
    optimiser: Literal["adamw", "sgd", "momentum"] = "adamw"
    learning_rate: Annotated[float, POSITIVE] = 1e-3
    batch_size: Annotated[int | None, AT_LEAST_ONE] = None

    def __post_init__(self) -> None:
        if self.source is not None and self.fraction:
            raise ValueError(f"fraction must be 0 where source names the server's data, got {self.fraction}")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured after which rounds, and when that is enough.

    Attributes:
        on: What the rounds are evaluated on: the ``test`` set, or the ``validation`` set that
            ``data.validation_fraction`` asks for; the test set is then read once, at the end of the run.
        every: Rounds between two evaluations; round 0 is always evaluated.
        last: Rounds at the end of a run that are evaluated whatever ``every`` says; their mean is what a comparison of
            methods goes by.
        aggregation_error: Whether each round records how far the new global update is from the exact weighted mean of
            the clients' updates.
        batch_size: Examples of a forward pass.
        by: Column of the data by whose values the metrics are given too; ``"none"`` for the whole test set only.
        metric: What chooses the best adapter, stops the run and decides the comparison: ``accuracy``,
            ``loss`` or ``perplexity``, with ``/value`` behind it for one value of ``by``. ``auto`` is perplexity for
            language models and accuracy for all else.
        patience: Rounds without a gain after which the run stops, at an evaluation; ``"none"`` to run all rounds.
        min_delta: Smallest gain that counts.
    """

    on: Literal["test", "validation"] = "test"
    every: Annotated[int, AT_LEAST_ONE] = 1
    last: Annotated[int, AT_LEAST_ONE] = 5
    aggregation_error: bool = True
    batch_size: Annotated[int, AT_LEAST_ONE] = 64
    by: str | None = None
    metric: str = "auto"
    patience: Annotated[int | None, AT_LEAST_ONE] = None
    min_delta: Annotated[float, NOT_NEGATIVE] = 0.0


@dataclass(frozen=True)
class DefenceSettings:
    """What a hostile or broken client can do to a round.

    Attributes:
        max_norm_factor: An upload is refused where its update's norm is more than this many times the median of those
            seen so far; ``"none"`` refuses none.
        clip: ``median`` scales updates down to the median norm of earlier rounds; ``none`` does not.
        rule: What stands in for the mean of uploads: the ``mean`` itself, ``trimmed-mean``, ``median`` or
            ``multi-krum``. All but the first hold a round's uploads at once.
        attackers: Share of uploads that may be hostile, for ``trimmed-mean`` and ``multi-krum``.
    """

    max_norm_factor: Annotated[float | None, Rule("be above 1", lambda value: value > 1)] = None
    clip: Literal["none", "median"] = "none"
    rule: robust.Rule = "mean"
    attackers: Annotated[float, Rule("lie in [0, 0.5)", lambda value: 0 <= value < 0.5)] = 0.2


@dataclass(frozen=True)
class PrivacySettings:
    """Differential privacy of whole clients, and secure aggregation.

    Attributes:
        kind: ``client`` puts noise on the sum of clipped updates, by a server that is trusted; ``local`` on every
            client's own; ``none`` nowhere.
        clip: C, norm that a client's update is clipped to, over all trained tensors together.
        noise_multiplier: σ; noise of standard deviation σ C.
        delta: δ.
        max_epsilon: The run ends before the round that would cost more; ``"none"`` for no limit.
        secure_aggregation: Whether the server learns the sum of a round's uploads and no single one.
        threshold: Share of a round's clients that must stay until the sum is unmasked, above a half in any case.
        min_clients: Fewest clients of a sum.
        bits: Of a number in a masked upload.
        bound: Largest magnitude of an entry of an update that can be summed; the quantisation is the finest at which
            sums of such entries have room in ``bits``.
    """

    kind: Literal["none", "client", "local"] = "none"
    clip: Annotated[float, POSITIVE] = 1.0
    noise_multiplier: Annotated[float, NOT_NEGATIVE] = 1.0
    delta: Annotated[float, SHARE] = 1e-5
    max_epsilon: Annotated[float | None, POSITIVE] = None
    secure_aggregation: bool = False
    threshold: Annotated[float, Rule("lie in [0.5, 1]", lambda value: 0.5 <= value <= 1)] = 0.6
    min_clients: Annotated[int, Rule("be at least 3", lambda value: value >= 3)] = 3
    bits: Literal[32, 64] = 32
    bound: Annotated[float, POSITIVE] = 4.0


@dataclass(frozen=True)
class AlgorithmSettings:
    """A method and its hyper-parameters.

    Attributes:
        name: A key of `fedpilot.algorithms.ALGORITHMS`.
        options: Fields of that class.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodSettings:
    """A method of a comparison: ``[methods.NAME]``.

    Attributes:
        algorithm: The method and its hyper-parameters.
        set: Overrides ``section.key=value`` of the recipe for this method only.
    """

    algorithm: AlgorithmSettings
    set: tuple[str, ...] = ()
