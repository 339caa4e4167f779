"""What stands between clients' uploads and the aggregation: how few are too few, screening, a robust rule, noise, and
masks that only a sum takes off."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedpilot.errors import PlanError
from fedpilot.privacy import primitives
from fedpilot.privacy.client_dp import ClientDP
from fedpilot.privacy.participant import Carrier, InMemory, Participant
from fedpilot.privacy.secure_settings import SecureAggregation
from fedpilot.robust import Robust
from fedpilot.screening import Screening
from fedpilot.types import ClientProfile, Engine, Exchanges

_NOT_JUDGED = (
    "privacy.kind 'client' must go without screening and robust rules, whose decisions let one client's "
    "upload change what others count for; its clipping bounds each client's influence already"
)
_NOT_SECURE = (
    "privacy.secure_aggregation must go without screening and robust rules, which look at single uploads; set "
    'defence.max_norm_factor and defence.clip to "none" and defence.rule to "mean"'
)
_NO_MINIMUM = (
    "privacy.kind 'client' must go without run.min_uploads and run.min_share: whether a round counts would "
    "say how many took part, which the accountant takes for hidden"
)


@dataclass(frozen=True)
class Safeguards:
    """The safeguards of a run; the default has none.

    Attributes:
        screening: Uploads far larger than the others' are refused or cut.
        robust: Rule that stands in for the mean.
        private: Privacy of clients.
        min_uploads: Fewest accepted uploads that change the state.
        min_share: The same as a share of the clients that were asked; both must be reached.
        secure: Secure aggregation: nobody sees a single upload.
        noise_key: Secret of the server that its noise follows from; ``None`` for the run's seed, which repeats and
            which every client of a deployment knows.
    """

    screening: Screening = field(default_factory=Screening)
    robust: Robust = field(default_factory=Robust)
    private: ClientDP | None = None
    min_uploads: int = 1
    min_share: float = 0.0
    secure: SecureAggregation | None = None
    noise_key: bytes | None = field(default=None, repr=False)

    def too_few(self, uploads: int, asked: int) -> bool:
        """Whether so many uploads, of so many clients that were asked, leave the state as it is.

        >>> Safeguards(min_share=0.5).too_few(3, asked=7), Safeguards(min_share=0.5).too_few(4, asked=7)
        (True, False)
        """
        return self.has_minimum and uploads < max(self.min_uploads, math.ceil(self.min_share * asked))

    @property
    def has_minimum(self) -> bool:
        """Whether one upload may be too few."""
        return self.min_uploads > 1 or self.min_share > 0

    @property
    def central(self) -> ClientDP | None:
        """Privacy that the server's noise gives."""
        return self.private if self.private is not None and self.private.kind == "client" else None

    def carrier(self, engine: Engine) -> Carrier:
        """What carries secure sums: the engine, or this process around it."""
        return engine if isinstance(engine, Carrier) else InMemory(engine, self.participant)

    def participant(self) -> Participant:
        """A client's side of secure sums; it clips, since nobody else can.

        Raises:
            PlanError: There are none in this run.
        """
        if self.secure is None:
            raise PlanError("a secure sum must be of a run with privacy.secure_aggregation, got one without")
        return Participant(self.secure, None if self.central is None else self.central.clip)

    def check(self, algorithm: object) -> None:
        """Refuses what does not go together, before the run.

        Raises:
            PlanError: As said, all at once.
        """
        if problems := self.problems(algorithm):
            raise PlanError("\n".join(text for _, text in problems))

    def problems(self, algorithm: object) -> list[tuple[str, str]]:
        """What does not go together: section of a recipe, and a sentence."""
        found: list[tuple[str, str]] = []
        for section, part in (("defence", self.robust), ("privacy", self.private), ("privacy", self.secure)):
            try:
                if part is not None:
                    part.check(algorithm)
            except PlanError as error:
                found.append((section, str(error)))
        if self.screening.on and isinstance(algorithm, Exchanges):
            found.append(
                (
                    "privacy",
                    "screening must judge updates of an adapter by their norms, got "
                    f"{type(algorithm).__name__}, whose clients upload none; "
                    'set defence.max_norm_factor and defence.clip to "none"',
                )
            )
        judged = self.screening.on or self.robust.rule != "mean"
        if self.secure is not None and judged:
            found.append(("privacy", _NOT_SECURE))
        elif self.central is not None and judged:
            found.append(("privacy", _NOT_JUDGED))
        if self.central is not None and self.has_minimum:
            found.append(("privacy", _NO_MINIMUM))
        if self.secure is not None:
            try:
                primitives.check_installed()
            except PlanError as error:
                found.append(("privacy", str(error)))
        return found

    def last_round(self, num_rounds: int, population: Sequence[ClientProfile], cohort_size: int | None) -> int:
        """The last round that the privacy budget allows.

        Raises:
            PlanError: It allows none.
        """
        if self.private is None:
            return num_rounds
        if self.secure is not None and self.central is not None:
            self._check_cohorts(self.central, self.secure.min_clients, num_rounds, len(population), cohort_size)
        return self.private.last_round(num_rounds, self.private.rate(len(population), cohort_size))

    @staticmethod
    def _check_cohorts(
        private: ClientDP, fewest: int, num_rounds: int, num_clients: int, cohort_size: int | None
    ) -> None:
        """Whether a sum comes about says whether enough were sampled, which one client can decide in a cohort of just
        one less. Over the run that must be much less likely than δ."""
        rate, others = private.rate(num_clients, cohort_size), num_clients - 1
        chance = num_rounds * rate * _exactly(fewest - 1, others, rate)
        if chance > private.delta / 10:
            raise PlanError(
                f"secure sums with noise of privacy.kind 'client' must hardly ever have just {fewest} clients, got a "
                f"probability of {chance:.2g} over the run, above a tenth of delta; sample more clients in a round, or "
                "all of them"
            )


def _exactly(count: int, of: int, rate: float) -> float:
    """Probability that so many are sampled."""
    if not 0 <= count <= of:
        return 0.0
    if rate >= 1:
        return float(count == of)
    ways = math.lgamma(of + 1) - math.lgamma(count + 1) - math.lgamma(of - count + 1)
    return math.exp(ways + count * math.log(rate) + (of - count) * math.log1p(-rate))


NONE = Safeguards()
"""No safeguard."""
