"""What a private run may cost each client: noise as given, or the noise with which a target epsilon lasts the run."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fedpilot.errors import PlanError
from fedpilot.privacy.accounting import Spent, epsilon, noise_for, plus, sample_rate
from fedpilot.types import ClientProfile, ExampleDP, LeftOut


@dataclass(frozen=True)
class Budget:
    """Example-level privacy of every client by itself; the fields are those of a method that offers it.

    Attributes:
        noise_multiplier: σ, alike for all clients.
        target: ε that no client's run may exceed, instead of ``noise_multiplier``; σ then follows for each client.
        delta: δ.
        clip: C.
        num_rounds: Rounds of the run, in each of which a client may take part; for ``target``.
    """

    noise_multiplier: float | None
    target: float | None
    delta: float
    clip: float
    num_rounds: int | None

    def problems(self) -> Iterator[str]:
        """What is wrong with the fields, one sentence each."""
        if self.target is not None and self.noise_multiplier is not None:
            yield "epsilon must be given without noise_multiplier, which follows from it; leave one out"
        if self.target is not None and not 0 < self.target < math.inf:
            yield f"epsilon must be positive and finite, got {self.target}; 1 to 8 are usual"
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < math.inf:
            yield f"noise_multiplier must be zero or more, got {self.noise_multiplier}; about 1 is usual"
        if not 0 < self.delta < 1:
            yield f"delta must lie between 0 and 1, got {self.delta}; 1e-5 is usual"
        if not 0 < self.clip < math.inf:
            yield f"clip must be positive and finite, got {self.clip}; 1 to 10 are usual"

    @property
    def private(self) -> ExampleDP | None:
        """What a step is like, for its memory, which the noise does not change; ``None`` for a run without privacy."""
        if self.target is None and self.noise_multiplier is None:
            return None
        return ExampleDP(self.clip, 1.0 if self.noise_multiplier is None else self.noise_multiplier)

    def of_client(self, client: ClientProfile, batch_size: int) -> ExampleDP | None:
        """A client's own clipping and noise.

        Raises:
            PlanError: The target is out of reach, or the rounds of the run are not known.
        """
        if self.private is None or self.target is None:
            return self.private
        if self.num_rounds is None:
            raise PlanError("num_rounds must be the rounds of the run for a target epsilon, got none; give it")
        rate = sample_rate(client.num_examples, batch_size)
        noise = noise_for(self.target, self.delta, rate, self.num_rounds * client.num_steps)
        return replace(self.private, noise_multiplier=noise)

    def refusal(self, client: ClientProfile, spent: Spent | None, batch_size: int) -> LeftOut | None:
        """Why a client may not train once more; ``None`` where it may.

        Raises:
            PlanError: Delta is so large that one of the client's examples may be published whole.
        """
        own = self.of_client(client, batch_size)
        if own is None:
            return None
        if self.delta * client.num_examples >= 1:
            raise PlanError(
                f"delta must be below 1 / {client.num_examples}, the examples of client {client.client_id}, got "
                f"{self.delta:g}; lower it"
            )
        if self.target is None:
            return None
        rate = sample_rate(client.num_examples, batch_size)
        after = plus(spent, Spent(rate, own.noise_multiplier, client.num_steps))
        if epsilon(after, self.delta) <= self.target:
            return None
        now = 0.0 if spent is None else epsilon(spent, self.delta)
        reason = f"has spent epsilon {now:.3g}, and another local update would exceed {self.target:g}"
        return LeftOut(client.client_id, reason)

    def largest(self, spent: Mapping[int, Spent]) -> float:
        """The largest epsilon that a client has spent."""
        return max((epsilon(of_client, self.delta) for of_client in spent.values()), default=0.0)


def released(metrics: Mapping[str, float]) -> Spent:
    """The steps behind an upload, from what the client says of them; as if without noise where it does not say."""
    rate, noise, steps = (metrics.get(name, math.nan) for name in ("sample_rate", "noise_multiplier", "steps"))
    if 0 < rate <= 1 and 0 <= noise < math.inf and 0 <= steps < math.inf:
        return Spent(rate, noise, math.ceil(steps))
    return Spent(1.0, 0.0, 1)
