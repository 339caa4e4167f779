"""What a run says of its secure sums, from which server and clients each work out the same agreement for a round."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedpilot.errors import PlanError, SecureSumError
from fedpilot.privacy.fixed_point import FixedPoint
from fedpilot.privacy.secure_aggregation import SecureSum
from fedpilot.types import Averages


@dataclass(frozen=True)
class SecureAggregation:
    """Secure sums of a run.

    Attributes:
        threshold: Share of a round's clients that must stay to its end, at least just above a half.
        min_clients: Fewest clients of a round; with fewer a sum says too much of each.
        bits: Of a number on the wire.
        bound: Largest magnitude of an entry of an update; a larger one makes its client fail, it is not cut.
    """

    threshold: float = 0.6
    min_clients: int = 3
    bits: Literal[32, 64] = 32
    bound: float = 4.0

    def __post_init__(self) -> None:
        problems = []
        if not 0.5 <= self.threshold <= 1:
            problems.append(f"threshold must lie in [0.5, 1], got {self.threshold}; 0.6 is usual")
        if self.min_clients < 3:
            problems.append(
                f"min_clients must be at least 3, got {self.min_clients}: of a sum of two each knows the other's part"
            )
        if not 0 < self.bound < math.inf:
            problems.append(f"bound must be positive and finite, got {self.bound}; 4 is ample for most adapters")
        if problems:
            raise PlanError("; ".join(problems))

    def needed(self, num_clients: int) -> int:
        """Clients of so many that must stay.

        >>> SecureAggregation(threshold=0.7).needed(10), SecureAggregation(threshold=0.5).needed(10)
        (7, 6)
        """
        return max(math.ceil(self.threshold * num_clients - 1e-9), num_clients // 2 + 1)

    def agreed(self, shapes: Mapping[str, tuple[int, ...]], num_clients: int, max_weight: int) -> SecureSum:
        """The agreement of a round.

        Args:
            shapes: Name -> shape of every tensor of the layout.
            num_clients: That advertised keys.
            max_weight: Largest weight that a client of them may have.

        Raises:
            SecureSumError: There are too few clients.
            PlanError: The numbers of a sum would not have room.
        """
        if num_clients < self.min_clients:
            raise SecureSumError(
                f"a sum must be of at least {self.min_clients} clients, got {num_clients}; sample more of them"
            )
        numbers = FixedPoint.finest(
            shapes, bound=self.bound, max_clients=num_clients, max_weight=max_weight, bits=self.bits
        )
        return SecureSum(numbers, self.needed(num_clients))

    def check(self, algorithm: object) -> None:
        """Refuses a method whose aggregation is not a sum, or which sends more than tensors.

        Raises:
            PlanError: As said.
        """
        how = algorithm.averaging if isinstance(algorithm, Averages) else None
        if how is None:
            reason = "which stacks, decomposes or corrects them"
        elif not how.tensors_only:
            reason = "whose clients also send scores, ranks or counts, which would travel openly"
        elif how.learnt_before:
            reason = "whose clients train on what was learnt from all of them before the rounds, without masks"
        elif not (how.uniform or weighs_by_examples(algorithm)):
            reason = "which weighs clients by what they send"
        else:
            return
        raise PlanError(
            "secure aggregation must go with a method that needs only sums of uploads, got "
            f"{type(algorithm).__name__}, {reason}; take fedit, fedbiot, fedins, ffa-lora without noise_multiplier and "
            "epsilon, hetlora with gamma 1 and weights 'uniform' or 'examples', fed-pilot with aggregation 'layerwise' "
            "and a solver without scores, or reclora with gate 'none'"
        )


def weighs_by_examples(algorithm: object) -> bool:
    """Whether an averaging method weighs clients by n_k."""
    return getattr(algorithm, "weights", None) == "examples"
