"""Differential privacy of whole clients: updates clipped, Gaussian noise, and what the rounds have cost.

McMahan et al., "Learning Differentially Private Recurrent Language Models", 2018, arXiv 1710.06963: the fixed
denominator. Two populations are neighbours where one has one client more.

``client``: a server that is trusted clips each update to C, adds N(0, σ²C²) to their sum and divides by the expected
number of clients. A client is in a round's cohort with probability q, by itself (Poisson sampling), which is what the
accountant assumes; a round of nobody still releases noise. The guarantee is about adapters, for whoever does not know
the cohorts: records name them and stay with the server.

``local``: each client clips and adds N(0, σ²C²) before its upload leaves it, so nobody need be trusted. Neighbours are
then any two updates of one client, 2 C apart at most, and sampling hides nothing. What is charged is a client that
takes part in every round.

In one process noise follows from the run's seed, so that runs repeat; whoever knows the seed can take it off again. In
a deployment it follows from a secret of the node, or for the sum of the server.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from fedpilot import tensors
from fedpilot.errors import PlanError, UploadError
from fedpilot.privacy import primitives
from fedpilot.privacy.accounting import Spent, epsilon
from fedpilot.privacy.noise import SecretNoise, seed_of
from fedpilot.types import Averages, Averaging, ClientProfile, Task, Tensors, Upload

CENTRAL, LOCAL = 7, 8  # what a noise generator is for, beside the seed, the round and the client

PUBLIC = frozenset({"rank", "seconds", "peak_bytes", "sample_rate", "steps", "clients_in_pass"})
"""Metrics of an upload that follow from the plan, the client's size and its machine; losses and scores do not."""

NOBODY = -1
"""Client of the upload that a round's sum makes."""


@dataclass(frozen=True)
class ClientDP:
    """Privacy of clients in a run.

    Attributes:
        kind: ``client`` trusts the server with single updates, ``local`` trusts nobody.
        clip: C, norm that an update is clipped to, over all trained tensors together.
        noise_multiplier: σ; noise of standard deviation σ C on every entry of the sum, or of an update.
        delta: δ.
        max_epsilon: ε that the run may cost; it ends before the round that would exceed it. ``None`` for no limit.
    """

    kind: Literal["client", "local"]
    clip: float
    noise_multiplier: float
    delta: float = 1e-5
    max_epsilon: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.clip < math.inf:
            problems.append(f"clip must be positive and finite, got {self.clip}; a usual update's norm is a start")
        if not 0 <= self.noise_multiplier < math.inf:
            problems.append(f"noise_multiplier must be zero or more, got {self.noise_multiplier}; about 1 is usual")
        if not 0 < self.delta < 1:
            problems.append(f"delta must lie between 0 and 1, got {self.delta}; below one over the clients is usual")
        if problems:
            raise PlanError("; ".join(problems))

    def check(self, algorithm: object) -> None:
        """Refuses a method whose state takes more from clients than their tensors, or weighs them by claims.

        Raises:
            PlanError: As said.
        """
        how = algorithm.averaging if isinstance(algorithm, Averages) else None
        if reason := self._against(how):
            raise PlanError(
                f"privacy.kind {self.kind!r} must go with a method that takes only means of tensors from clients, got "
                f"{type(algorithm).__name__}, {reason}; take fedit, fedbiot, fedins, ffa-lora without noise_multiplier "
                "and epsilon, fed-pilot with aggregation 'layerwise' and a solver without scores, hetlora with gamma "
                "1, or reclora with gate 'none'; with weights 'uniform'"
            )

    def sample(
        self, population: Sequence[ClientProfile], cohort_size: int | None, rng: np.random.Generator
    ) -> Sequence[ClientProfile]:
        """A round's clients by Poisson sampling, ``cohort_size`` on average; there may be none."""
        drawn = rng.random(len(population)) < self.rate(len(population), cohort_size)
        return [client for client, chosen in zip(population, drawn, strict=True) if chosen]

    def rate(self, num_clients: int, cohort_size: int | None) -> float:
        """q, probability with which a client is in a cohort."""
        return 1.0 if cohort_size is None else cohort_size / num_clients

    def epsilon(self, rounds: int, rate: float) -> float:
        """ε of so many rounds; see the module for who is charged."""
        if self.kind == "local":
            return epsilon(Spent(1.0, self.noise_multiplier / 2, rounds), self.delta)
        return epsilon(Spent(rate, self.noise_multiplier, rounds), self.delta)

    def last_round(self, num_rounds: int, rate: float) -> int:
        """The last round that the budget allows, at most ``num_rounds``.

        Raises:
            PlanError: It allows none.
        """
        cost = self.epsilon(1, rate)  # in any case, so that a missing accountant shows before the run
        if self.max_epsilon is None:
            return num_rounds
        low, high = 0, num_rounds
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.epsilon(middle, rate) <= self.max_epsilon else (low, middle - 1)
        if low == 0:
            raise PlanError(
                f"max_epsilon must allow one round, which costs {cost:.4g}, got {self.max_epsilon:g}; raise it or the "
                "noise_multiplier, or sample fewer clients"
            )
        return low

    def facts(self, round: int, rate: float) -> Mapping[str, float]:
        """What the record says: ε so far, and what another round would make of it."""
        return {"epsilon": self.epsilon(round, rate), "epsilon_next": self.epsilon(round + 1, rate)}

    def _against(self, how: Averaging | None) -> str:
        if how is None:
            return "which does not average what clients send"
        if not how.tensors_only:
            return "whose state depends on what clients say of themselves"
        if how.learnt_before:
            return "whose clients train on what was learnt from all of them before the rounds, without noise"
        return "" if how.uniform or self.kind == "local" else "which weighs clients unlike"


def clipped_change(upload: Upload, sent: Tensors, clip: float) -> Tensors:
    """The update ``upload - sent`` times ``min(1, C / norm)``, with one norm over all tensors.

    A pair of a smaller rank than was sent is held against the same slots.
    """
    step = {name: tensor - _slots(sent[name], tensor) for name, tensor in upload.tensors.items()}
    norm = tensors.norm(step)
    return step if norm <= clip else tensors.scale(step, clip / norm)


def change(upload: Upload, sent: Tensors) -> Tensors:
    """The update ``upload - sent`` in float64; a pair of a smaller rank is held against the same slots.

    Raises:
        UploadError: It holds a tensor that was not sent.
    """
    if foreign := sorted(upload.tensors.keys() - sent.keys()):
        raise UploadError(f"an update must be of tensors that were sent, got {foreign[0]}; send what the plan trains")
    return {name: tensor.double() - _slots(sent[name], tensor).double() for name, tensor in upload.tensors.items()}


def noise_like(of: Tensors, deviation: float, seed: Sequence[int] | bytes) -> Tensors:
    """Gaussian noise for each tensor, in name order.

    Args:
        of: Whose shapes and dtypes it has.
        deviation: Standard deviation.
        seed: Numbers, or a secret key of 32 bytes.
    """
    if isinstance(seed, bytes):
        secret = SecretNoise(seed)
        return {name: secret.fill(torch.empty_like(of[name]), deviation) for name in sorted(of)}
    generator = torch.Generator().manual_seed(seed_of(seed))
    return {
        name: torch.randn(of[name].shape, generator=generator, dtype=of[name].dtype) * deviation for name in sorted(of)
    }


def noisy_mean(
    private: ClientDP,
    uploads: Iterable[Upload],
    distribute: Callable[[int], Task],
    present: Tensors,
    *,
    expected_clients: float,
    seed: Sequence[int],
    secret: bytes | None = None,
) -> Iterator[Upload]:
    """The round as one upload: ``present + (Σ clipped changes + noise) / expected_clients``; it is there in any case.

    Slots and tensors that a client lacks count as not changed.

    Args:
        private: Clipping and noise.
        uploads: Of the cohort, one at a time.
        distribute: Client -> the task that it had.
        present: Global values of every tensor that the method trains.
        expected_clients: Mean size of a cohort.
        seed: Of this round's noise.
        secret: Of the server, for noise that does not follow from the seed; see `released`.
    """
    total = {name: torch.zeros_like(tensor) for name, tensor in present.items()}
    for upload in uploads:
        for name, step in clipped_change(upload, distribute(upload.client_id).tensors, private.clip).items():
            _slots(total[name], step).add_(step)
        del upload
    yield released(private, total, present, expected_clients=expected_clients, seed=seed, secret=secret)


def released(
    private: ClientDP,
    total: Tensors,
    present: Tensors,
    *,
    expected_clients: float,
    seed: Sequence[int],
    secret: bytes | None = None,
) -> Upload:
    """``present + (total + noise) / expected_clients`` as one upload.

    Args:
        private: Deviation of the noise.
        total: Σ of clipped changes.
        present: Global values.
        expected_clients: Mean size of a cohort.
        seed: Of this round's noise.
        secret: Key that the noise follows from instead, together with the seed and the total: a round that is repeated
            with another total gets other noise, since the difference of two sums under one noise is a sum without any.
    """
    deviation = private.noise_multiplier * private.clip
    source = [*seed, CENTRAL] if secret is None else keyed(secret, f"sum, {list(seed)}, {tensors.digest(total)}")
    noise = noise_like(present, deviation, source)
    moved = {
        name: value + ((total[name] + noise[name]) / expected_clients).to(value.dtype)
        for name, value in present.items()
    }
    return summed(moved)


def summed(moved: Tensors) -> Upload:
    """A round's outcome as the one upload that stands for all."""
    ranks = [value.shape[0] for name, value in moved.items() if name.endswith(".lora_A")]
    ranks += [value.shape[1] for name, value in moved.items() if name.endswith(".lora_B")]
    return Upload(NOBODY, 1, moved, {"rank": float(max(ranks, default=0))})


def keyed(secret: bytes, purpose: str) -> bytes:
    """A key for one purpose."""
    return primitives.derived(secret, f"fedpilot noise: {purpose}")


def trained_by(present: Tensors, patterns: Sequence[str]) -> Tensors:
    """The tensors that a method trains: the head, and A and B, or B alone where ``patterns`` says so."""
    frozen = () if "AB" in patterns else tuple(f".lora_{kind}" for kind in "AB" if kind not in patterns)
    return {name: tensor for name, tensor in present.items() if not name.endswith(frozen)}


@dataclass(frozen=True)
class LocalNoise:
    """What a client does to its upload before it leaves; a `Site.release`.

    Attributes:
        private: Clipping and noise.
        seed: Numbers that no other client and round has.
        secret: Key that the noise follows from instead.
    """

    private: ClientDP
    seed: Sequence[int]
    secret: bytes | None = field(default=None, repr=False)

    def __call__(self, task: Task, upload: Upload) -> Upload:
        """The clipped and noisy upload, without what it says of the client's data."""
        step = clipped_change(upload, task.tensors, self.private.clip)
        source = [*self.seed, LOCAL] if self.secret is None else keyed(self.secret, "upload")
        noise = noise_like(step, self.private.noise_multiplier * self.private.clip, source)
        moved = {name: _slots(task.tensors[name], step[name]) + step[name] + noise[name] for name in upload.tensors}
        return replace(upload, tensors=moved, metrics=public(upload.metrics))


def public(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of `PUBLIC`."""
    return {name: value for name, value in metrics.items() if name in PUBLIC}


def _slots(whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The leading slots of a tensor that another one of a smaller rank has; a view."""
    return whole if whole.shape == part.shape else whole[tuple(slice(size) for size in part.shape)]
