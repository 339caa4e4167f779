"""Sections of a recipe that belong to no module: the run, the clients' machines, the evaluation, the method."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fedpilot.config.schema import AT_LEAST_ONE, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, ByteSize, Rule

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
    """

    name: Annotated[str, _PLAIN_NAME] = "run"
    rounds: Annotated[int, AT_LEAST_ONE] = 10
    cohort: Annotated[int | None, AT_LEAST_ONE] = None
    seed: Annotated[int, NOT_NEGATIVE] = 0
    out: str = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int | None, AT_LEAST_ONE] = None


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
class EvaluationSettings:
    """What is measured after each round, and when that is enough.

    Attributes:
        batch_size: Examples of a forward pass.
        by: Column of the data by whose values the metrics are given too; ``"none"`` for the whole test set only.
        metric: What chooses the best adapter, stops the run and decides the comparison: ``accuracy``,
            ``loss`` or ``perplexity``, with ``/value`` behind it for one value of ``by``. ``auto`` is perplexity for
            language models and accuracy for all else.
        patience: Rounds without a gain after which the run stops; ``"none"`` to run all rounds.
        min_delta: Smallest gain that counts.
    """

    batch_size: Annotated[int, AT_LEAST_ONE] = 64
    by: str | None = None
    metric: str = "auto"
    patience: Annotated[int | None, AT_LEAST_ONE] = None
    min_delta: Annotated[float, NOT_NEGATIVE] = 0.0


@dataclass(frozen=True)
class AlgorithmSettings:
    """A method and its hyper-parameters.

    Attributes:
        name: A key of `fedpilot.algorithms.ALGORITHMS`.
        options: Fields of that class.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
