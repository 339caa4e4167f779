"""The nouns of a round and the protocols between its parts.

A round is data moving one way: plan, distribute, local update, upload, aggregate, evaluate, record. Each
arrow carries one of the frozen values below. Shapes are written in words: ``(rank, in)``, ``(out, rank)``.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch

from fedpilot.errors import ClientError

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""Named tensors: ``<module>.lora_A`` (rank, in), ``<module>.lora_B`` (out, rank), ``<module>.weight`` (out, in)."""

Penalty: TypeAlias = Callable[[Tensors], torch.Tensor]
"""From the live parameters to a scalar that is added to each step's loss."""


@dataclass(frozen=True)
class ModelSpec:
    """What an algorithm needs to know of a model; no weights but the head's first values.

    Attributes:
        modules: Adapted module -> (out, in).
        block_of: Adapted module -> index of the transformer block it lies in.
        num_blocks: Number of blocks; block 0 is next to the input.
        scale: Factor on ``B @ A``, that is alpha / rank, equal for every module.
        head: Initial values of the dense tensors that every client trains in full (a classifier's weight and bias);
            empty for a language model.
        width: Entries of a hidden state; 0 where nobody asks.
    """

    modules: Mapping[str, tuple[int, int]]
    block_of: Mapping[str, int]
    num_blocks: int
    scale: float
    head: Tensors = field(default_factory=dict)
    width: int = 0


@dataclass(frozen=True)
class ClientProfile:
    """A client as the server sees it.

    Attributes:
        client_id: Stable number, the key of everything that is remembered of a client.
        num_examples: Training examples it holds.
        memory_bytes: Its budget.
        num_steps: Optimiser steps of one local update.
        deadline_s: Seconds that its local update may take; ``None`` for no deadline.
        flops_per_second: Speed that predicted seconds are computed with; ``None`` where no deadline is given.
        name: What people call it.
        margin: What its budget was divided by because it ran out of memory before; see `margins`.
    """

    client_id: int
    num_examples: int
    memory_bytes: int
    num_steps: int = 1
    deadline_s: float | None = None
    flops_per_second: float | None = None
    name: str = ""
    margin: float = 1.0


@runtime_checkable
class Attachment(Protocol):
    """Modules hooked onto the base model instead of LoRA pairs, as a frozen dataclass of their hyper-parameters.

    The model installs what a task's plan or a deployment names, and takes it off again for the next that names none.
    """

    @property
    def columns(self) -> Mapping[str, tuple[int, ...]]:
        """Columns of a batch that it reads and the base model does not: name -> shape of an example's entry."""

    def shapes(self, spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of each of its tensors; ``<module>.<kind>`` where it belongs to a module."""

    def replaces(self, spec: ModelSpec) -> frozenset[str]:
        """Names of the head's tensors that it has its own of; a task and a deployment then lack these."""

    def init(self, spec: ModelSpec, rng: np.random.Generator) -> Tensors:
        """First values of its tensors."""


@dataclass(frozen=True)
class Plan:
    """Who trains what in one round.

    Attributes:
        client_id: The client.
        ranks: Module -> rank of the pair it holds; a module that is left out has no adapter there.
        trainable: Names of the tensors with gradients and optimiser state, head included.
        blocks: Blocks loaded; ``None`` means all.
        checkpointed: Blocks whose activations are recomputed in the backward pass.
        micro_batch: Examples per forward pass; gradients accumulate up to the batch. ``None`` means the whole batch.
        scored: Names of tensors whose gradients are measured before training, for an importance score.
        values: Block -> the value that the allocation maximised; recorded, so that a choice can be explained.
        peak_bytes: Predicted peak of the local update.
        seconds: Predicted seconds of the local update, where a speed is known.
        attachment: What is hooked onto the base model beside pairs; ``None`` for nothing.
        sends: Name -> shape of each float32 tensor that comes back beside the trained ones.
    """

    client_id: int
    ranks: Mapping[str, int]
    trainable: frozenset[str]
    blocks: tuple[int, ...] | None = None
    checkpointed: frozenset[int] = frozenset()
    micro_batch: int | None = None
    scored: frozenset[str] = frozenset()
    values: Mapping[int, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    seconds: float | None = None
    attachment: Attachment | None = None
    sends: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """A sampled client for which nothing fits.

    Attributes:
        client_id: The client.
        reason: One sentence for people.
        needed_bytes: The smallest budget with which it could take part; ``None`` when memory is not the reason.
    """

    client_id: int
    reason: str
    needed_bytes: int | None = None


@dataclass(frozen=True)
class BaseDelta:
    """How the frozen weights have changed since the run began, as a log with a snapshot; see `base_deltas`.

    Version 0 is the pristine base; each step makes the next version. A step holds ``<module>.weight`` (out, in), or a
    pair ``<module>.base_A`` (rank, in) and ``<module>.base_B`` (out, rank) whose product is the change. The sum of all
    steps, in float32 and in their order, is added to the pristine weights: so whoever has the same version has the same
    bits, by whatever way it came there.

    A method that makes steps has ``changes_base = True``: a weight that is stored in few bits has the sum beside it,
    which its clients' budgets are charged with.

    Attributes:
        version: After the last step.
        snapshot: Sum of the first ``snapshot_version`` steps, dense.
        snapshot_version: Steps in the snapshot.
        steps: The steps after the snapshot, oldest first; ``version - snapshot_version`` of them.
        since: In a task, the version that the client is known to have: only what is newer travels.
    """

    version: int = 0
    snapshot: Tensors = field(default_factory=dict)
    snapshot_version: int = 0
    steps: tuple[Tensors, ...] = ()
    since: int = 0


@dataclass(frozen=True)
class Fresh:
    """Tensors that a client draws itself, so that they do not travel: those of ``lora.fresh``.

    Attributes:
        seed: Of the draw.
        rank: Rank at which all modules are drawn; the plan's ranks take the first rows.
        names: The drawn tensors.
    """

    seed: int
    rank: int
    names: frozenset[str]


@dataclass(frozen=True)
class Task:
    """What goes down to a client.

    Attributes:
        plan: What it is to train.
        tensors: All tensors that it starts from, drawn ones included.
        base_delta: Changes of frozen weights that it applies first.
        fresh: Which of the tensors it draws itself; ``None`` where all of them travel.
        extra: Tensors that are not the model's, such as what other clients know of the classes.
        exchange: Of the round: 1, or 2 for what `Exchanges.mid_round` sends.
    """

    plan: Plan
    tensors: Tensors
    base_delta: BaseDelta = field(default_factory=BaseDelta)
    fresh: Fresh | None = None
    extra: Tensors = field(default_factory=dict)
    exchange: int = 1


@dataclass(frozen=True)
class Upload:
    """What comes back: exactly the tensors that the plan trains or sends, and numbers about the local update."""

    client_id: int
    num_examples: int
    tensors: Tensors
    metrics: Mapping[str, float] = field(default_factory=dict)

    def weight(self, weights: str) -> float:
        """How much the client counts in a mean: n_k with ``examples``, 1 with ``uniform``."""
        return float(self.num_examples) if weights == "examples" else 1.0


@dataclass(frozen=True)
class Failure:
    """A client that was asked and did not deliver."""

    client_id: int
    reason: str


@dataclass(frozen=True)
class OutOfMemory(Failure):
    """A client whose plan fitted its budget and not its memory."""


@dataclass(frozen=True)
class Deployment:
    """What is evaluated, saved and exported.

    Attributes:
        tensors: Pairs, head, and what the attachment has.
        base_delta: Change of the frozen weights.
        blocks: Blocks that run; ``None`` means all.
        attachment: What is hooked onto the base model beside pairs.
    """

    tensors: Tensors
    base_delta: BaseDelta = field(default_factory=BaseDelta)
    blocks: tuple[int, ...] | None = None
    attachment: Attachment | None = None


@dataclass(frozen=True)
class ExampleDP:
    """Example-level differential privacy of a local update: DP-SGD.

    Attributes:
        clip: C, norm that each example's gradient over all trained tensors together is clipped to.
        noise_multiplier: σ; noise of standard deviation σ C is added to the sum of a batch.
    """

    clip: float
    noise_multiplier: float


@dataclass(frozen=True)
class Projection:
    """GaLore: whole weights are trained, with optimiser states of projected gradients.

    Attributes:
        rank: Of the projection; at most the smaller side of every trained weight.
        gap: Steps between two projectors.
        scale: Factor on the projected-back step.
    """

    rank: int
    gap: int
    scale: float


@dataclass(frozen=True)
class Condensation:
    """FedAF: how a client condenses its examples into few synthetic ones; the model is frozen meanwhile.

    Attributes:
        space: Where synthetic items live: ``hidden``, the states that enter block ``depth``; or ``pixels``.
        depth: The block; 0 is what the embeddings give. Must be 0 for ``pixels``.
        rank: Of the pairs, which only blocks from ``depth`` on have: below nothing would be trained.
        length: Positions of a synthetic text; images have as many as the model gives them.
        ipc: Items per class.
        iterations: Steps on the items.
        lr: Step of Adam on them, in units of their standard deviation at the start.
        lam_loc: λ_loc, weight of the peers' knowledge.
        projections: Directions of the sliced Wasserstein distance.
        tau: τ of the soft labels.
        start: What items start from: the ``average`` of local examples of the class, or ``noise``.
        mix: Examples of an average, at most; never fewer than two.
        jitter: Noise on the average, in units of the averages' standard deviation.
        min_examples: A class with fewer of them counts as absent; at least two.
    """

    space: Literal["hidden", "pixels"]
    depth: int
    rank: int
    length: int
    ipc: int
    iterations: int
    lr: float
    lam_loc: float
    projections: int
    tau: float
    start: Literal["average", "noise"]
    mix: int
    jitter: float
    min_examples: int


@dataclass(frozen=True)
class Condensed:
    """What a client condensed.

    Attributes:
        items: (items, ...) class by class, equally many of each.
        labels: (items,) their classes, float32 so that they travel beside the rest.
        soft_labels: (classes, classes of the model) mean softened prediction on the real examples of each class.
        metrics: Numbers about it, for people.
    """

    items: torch.Tensor
    labels: torch.Tensor
    soft_labels: torch.Tensor
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Matching:
    """FedAF: how the server trains on condensed items.

    Attributes:
        steps: Optimiser steps.
        lam_glob: λ_glob, weight of the divergence from the soft labels.
        tau: τ of the predictions that are held against them.
    """

    steps: int
    lam_glob: float
    tau: float


@dataclass(frozen=True)
class StepKind:
    """What an optimiser step of a method is like where it is not plain LoRA's; the memory profile traces this kind.

    Attributes:
        patterns: What a trained block may train, as `memory.trace` names it: ``AB``, ``A``, ``B``, or ``W`` for whole
            weights.
        private: Clipping by example, which keeps a gradient for each.
        projection: For whole weights.
        attachment: What is trained instead of pairs; the profile then knows `attachments.suffix_plan` and no other.
        condensation: Of a client that trains nothing and optimises synthetic items.
    """

    patterns: tuple[str, ...] = ("AB",)
    private: ExampleDP | None = None
    projection: Projection | None = None
    attachment: Attachment | None = None
    condensation: Condensation | None = None


class Model(Protocol):
    """A client's model with its data and training settings; names in, names out."""

    def load(self, task: Task) -> None:
        """Takes the task's tensors and marks what its plan trains and recomputes."""

    def fit(
        self,
        trainable: frozenset[str],
        *,
        penalty: Penalty | None = None,
        max_steps: int | None = None,
        kind: StepKind | None = None,
    ) -> Mapping[str, float]:
        """Trains the named tensors on the client's data; returns at least ``loss`` and ``steps``.

        Args:
            trainable: Names.
            penalty: Added to each step's loss.
            max_steps: Most optimiser steps, where the method has a say in it.
            kind: How a step is made, where it is not plain LoRA's.

        Raises:
            TrainingError: The loss is not finite.
        """

    def gradients(self, names: frozenset[str], *, num_examples: int, squared: bool = False) -> Tensors:
        """Mean gradient of the loss at the loaded tensors over a fixed subset of the client's data.

        Args:
            names: Tensors.
            num_examples: Size of the subset.
            squared: Gives the mean over examples of each entry's square instead: the diagonal of the empirical Fisher
                information.
        """

    def read(self) -> Tensors:
        """Copies of all loaded tensors, head included."""


@dataclass(frozen=True)
class Fit:
    """What a client asks of `Model.fit`, with all that it starts from.

    Attributes:
        model: The client's.
        task: Its task, with the tensors that it holds now.
        trainable: As `Model.fit` has it, and so are the others.
        penalty: Added to each step's loss.
        max_steps: Most optimiser steps.
        kind: How a step is made.
    """

    model: Model
    task: Task
    trainable: frozenset[str]
    penalty: Penalty | None = None
    max_steps: int | None = None
    kind: StepKind | None = None


@dataclass(frozen=True)
class Fitted:
    """What came of a `Fit`.

    Attributes:
        metrics: As `Model.fit` returns them.
        tensors: All loaded tensors after it, as `Model.read` has them.
    """

    metrics: Mapping[str, float]
    tensors: Tensors


class FitsTogether(Protocol):
    """Trains several clients in one pass over the base that they share."""

    @property
    def clients_per_pass(self) -> int:
        """Most clients of a pass; at least 2."""

    def likeness(self, model: Model, task: Task) -> Hashable | None:
        """What all clients of a pass have in common; ``None`` for one that must train by itself."""

    def room(self, model: Model, task: Task) -> int:
        """How many clients like this one a pass has memory for; at least 1."""

    def fit(self, fits: Sequence[Fit]) -> Sequence[Fitted | ClientError] | None:
        """Trains clients that are alike, each to what it would come to by itself.

        Args:
            fits: Of at least two clients.

        Returns:
            One entry for each; ``None`` where they cannot train in one pass after all. Nothing is changed then.
        """


@runtime_checkable
class AlignsEmulator(Model, Protocol):
    """A server's model that can bring an emulator closer to the blocks it stands for (FedBiOT)."""

    def align(
        self, trainable: frozenset[str], *, emulated: int, num_steps: int, lam: float, layerwise: bool = False
    ) -> Mapping[str, float]:
        """Trains the named tensors of the loaded, shallow model towards the whole one; see `alignment`.

        Args:
            trainable: Names, of pairs in the emulator.
            emulated: Blocks, from 0, that the emulator stands for; those above are the same in both models.
            num_steps: Optimiser steps.
            lam: λ, weight of the divergence between the outputs.
            layerwise: Whether the hidden states after each kept block count, not the last alone.

        Returns:
            ``distance_before`` and ``distance``, relative squared distances of the hidden states on examples that it
            does not train on, ``loss`` and ``steps``.
        """


@runtime_checkable
class Condenses(Model, Protocol):
    """A client's model that can condense its examples, and a server's that trains on what came of it (FedAF)."""

    @property
    def seed(self) -> int:
        """Of what the client draws in this round; the same in both exchanges."""

    def class_means(self, how: Condensation) -> Tensors:
        """``logits`` (classes, classes), mean by class of the loaded model's; ``present`` (classes,), 0 or 1."""

    def condense(self, how: Condensation, peers: torch.Tensor) -> Condensed:
        """Synthetic items of each class that is present.

        Args:
            how: Settings.
            peers: (present classes, classes) mean logits that the cohort has for them.

        Raises:
            TrainingError: No class has enough examples, or an item is not finite.
        """

    def fit_items(
        self,
        trainable: frozenset[str],
        items: torch.Tensor,
        labels: torch.Tensor,
        soft_labels: torch.Tensor,
        how: Condensation,
        matching: Matching,
    ) -> Mapping[str, float]:
        """Trains the named tensors on condensed items; returns ``loss``, ``matching`` and ``steps``.

        Args:
            trainable: Names.
            items: (items, ...).
            labels: (items,) int64.
            soft_labels: (classes, classes) what the clients predict for each class; zeros where nobody said.
            how: Where the items live.
            matching: Settings.
        """


@dataclass
class Site:
    """A client's own place. The only mutable noun.

    Attributes:
        profile: The client.
        model: With its data.
        kept: What it keeps between rounds.
        release: What it does to an upload before that leaves, such as adding noise; ``None`` for nothing.
    """

    profile: ClientProfile
    model: Model
    kept: dict[str, Tensors] = field(default_factory=dict)
    release: Callable[[Task, Upload], Upload] | None = None

    def upload(self, plan: Plan, metrics: Mapping[str, float]) -> Upload:
        """What the plan trains, as the model holds it now."""
        trained = {name: tensor for name, tensor in self.model.read().items() if name in plan.trainable}
        return Upload(self.profile.client_id, self.profile.num_examples, trained, metrics)


State = TypeVar("State")
State_contra = TypeVar("State_contra", contravariant=True)


class Algorithm(Protocol[State]):
    """The contract of every method: state goes in and comes out; nothing hides on the object."""

    @property
    def spec(self) -> ModelSpec:
        """The model that the method adapts."""

    def init(self, rng: np.random.Generator) -> State:
        """The state before the first round."""

    def plan(self, state: State, cohort: Sequence[ClientProfile], rng: np.random.Generator) -> Sequence[Plan | LeftOut]:
        """One entry for each client of the cohort, in its order; every plan fits its client's budget."""

    def distribute(self, state: State, plan: Plan) -> Task:
        """What the planned client downloads."""

    def local_update(self, task: Task, site: Site) -> Upload:
        """Runs on the client."""

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        """The next state; reads each upload once and keeps none."""

    def deploy(self, state: State) -> Deployment:
        """What the state is worth to a user."""


@runtime_checkable
class HasStepKind(Protocol):
    """An algorithm whose optimiser steps are not plain LoRA's."""

    @property
    def step_kind(self) -> StepKind:
        """What the memory profile must have traced for it."""


@dataclass(frozen=True)
class Averaging:
    """How a method's aggregation is a mean of what clients send; what robust rules and privacy need to know.

    Attributes:
        uniform: Whether clients weigh alike.
        same_shapes: Whether all holders send a tensor in one shape.
        same_names: Whether every client sends the same tensors.
        tensors_only: Whether nothing else that clients send or were measured to be changes state or plans: no scores,
            ranks or counts of steps.
        padded: Whether a slot of a pair that a client lacks, up to the round's largest rank, counts as a zero of its
            weight.
        learnt_before: Whether clients train on what was learnt from all of them before the first round, which no noise
            and no masks of the rounds cover.
    """

    uniform: bool
    same_shapes: bool = True
    same_names: bool = True
    tensors_only: bool = True
    padded: bool = False
    learnt_before: bool = False


@runtime_checkable
class Averages(Protocol):
    """An algorithm whose new state is a mean of each uploaded tensor, at least with some of its options."""

    @property
    def averaging(self) -> Averaging | None:
        """How; ``None`` where the options make it something else."""


Arrived: TypeAlias = Sequence[tuple[int, Mapping[str, float]]]
"""Client and metrics of every upload that reached the server, refused ones included."""


@runtime_checkable
class Charges(Protocol[State]):
    """An algorithm whose clients pay in privacy for each upload that somebody saw (DP-SGD)."""

    def charged(self, state: State, arrived: Arrived) -> State:
        """The state with what the uploads have cost; called after every round, also one that leaves the rest alone."""


@runtime_checkable
class RefinesOnServer(Protocol[State]):
    """An algorithm whose server trains too (FedAF, FedBiOT)."""

    def prepare(self, state: State, server: Site) -> State:
        """Called once, before the first round."""

    def refine(self, state: State, server: Site) -> State:
        """Called after ``aggregate``; the site's generator is that of the round."""


@runtime_checkable
class UsesPublicData(Protocol):
    """An algorithm whose server may train on data of its own, which the recipe's ``[server]`` then has to name."""

    @property
    def uses_public_data(self) -> bool:
        """Whether it does, with these options."""


@runtime_checkable
class Exchanges(Protocol[State_contra]):
    """An algorithm with a second exchange inside the round (FedAF)."""

    def mid_round(self, state: State_contra, plans: Mapping[int, Plan], messages: Sequence[Upload]) -> Sequence[Task]:
        """Tasks of the second exchange; what is answered goes to ``aggregate``.

        Args:
            state: Before the round.
            plans: Client -> its plan of the first exchange; the second may need no more memory.
            messages: What came; there is at least one. Only these clients may be asked again.
        """


@runtime_checkable
class DeploysMore(Protocol[State_contra]):
    """An algorithm with further forms of its outcome that are worth evaluating (FedBiOT's emulator)."""

    def deploy_more(self, state: State_contra) -> Mapping[str, Deployment]:
        """Prefix of the metrics' names -> deployment; evaluated beside ``deploy``'s."""


@runtime_checkable
class GoesOnFrom(Protocol[State_contra]):
    """An algorithm that deploys other tensors than its next round goes on from (Fed-piLot's mean over rounds)."""

    def goes_on_from(self, state: State_contra) -> Tensors:
        """The global values of all that clients may train."""


@runtime_checkable
class Personalises(Protocol):
    """An algorithm whose outcome is a model of its own for each client (RecLoRA)."""

    def personal(self, deployment: Deployment, side: Tensors) -> Deployment:
        """A client's own model, as plain pairs where the method can say it so; it reads no further columns.

        Args:
            deployment: What the run deploys.
            side: The attachment's columns of the client's own examples, (examples, ...) each; empty for a client of
                whom nothing is known.
        """


class Engine(Protocol):
    """Carries tasks to clients and results back; does not think."""

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        """Results in the tasks' order, so that sums are reproducible. Reads a task only when it is carried."""


@dataclass(frozen=True)
class Choice:
    """One way to treat a block at or above the lowest trained one.

    Attributes:
        rank: Rank of the pairs that are trained; ``None`` when the block is only passed through.
        checkpointed: Whether its activations are recomputed in the backward pass.
    """

    rank: int | None
    checkpointed: bool = False


@dataclass(frozen=True)
class BlockCosts:
    """What each choice costs for each block in one training step.

    Arrays are int64 of shape (num_blocks, num_choices), in bytes but for ``flops``.

    Attributes:
        resident: Live through the whole step: the block's adapters and their optimiser state.
        saved: Live from the end of the block's forward pass until its backward pass.
        forward_peak: Highest live bytes within the forward pass, above what stands and what earlier blocks saved.
        backward_peak: Highest live bytes within the backward pass, above what stands, what this and earlier blocks
            saved, and the gradients of the head and of later blocks.
        gradient: Gradients, live from the block's backward pass until the optimiser step.
        optimiser_peak: Scratch of the optimiser while it updates the block, above what stands and all gradients.
        flops: Floating-point operations, forward and backward.
    """

    resident: np.ndarray
    saved: np.ndarray
    forward_peak: np.ndarray
    backward_peak: np.ndarray
    gradient: np.ndarray
    optimiser_peak: np.ndarray
    flops: np.ndarray


@dataclass(frozen=True)
class CostTable:
    """The whole cost of a training step as pure numbers; the input of allocation.

    With s the lowest trained block, c_j the choice of block j >= s, and the entry of ``lowest`` instead of
    ``above`` for block s, *standing* is ``fixed + sum(frozen_resident[:s]) + sum resident`` and the peak is
    standing plus the largest of

    - frozen forward  ``frozen_forward_peak[j]``                                              for j < s
    - forward         ``sum saved[s:j] + forward_peak[j]``                                    for j >= s
    - head            ``sum saved[s:] + head_peak``
    - backward        ``sum saved[s:j+1] + head_gradient + sum gradient[j+1:] + backward_peak[j]``  for j >= s
    - optimiser       ``head_gradient + sum gradient[s:] + max(optimiser_peak[s:], head_optimiser_peak)``

    Attributes:
        choices: Meaning of the second axis. In ``lowest`` only choices that train are used.
        above: Costs of blocks above the lowest trained one.
        lowest: Costs of a block as the lowest trained one.
        frozen_resident: (num_blocks,) adapters of a block below the lowest trained one.
        frozen_forward_peak: (num_blocks,) peak of such a block's forward pass above what stands.
        frozen_flops: (num_blocks,) its floating-point operations.
        fixed: Bytes that always stand: base weights, buffers, head with its optimiser state, the batch.
        head_peak: Peak of loss and head, forward and backward, above what stands and all that blocks saved.
        head_gradient: Gradients of the head.
        head_optimiser_peak: Scratch of the optimiser for the head.
        head_flops: Operations of embeddings, head and loss.
    """

    choices: tuple[Choice, ...]
    above: BlockCosts
    lowest: BlockCosts
    frozen_resident: np.ndarray
    frozen_forward_peak: np.ndarray
    frozen_flops: np.ndarray
    fixed: int
    head_peak: int
    head_gradient: int
    head_optimiser_peak: int
    head_flops: int
