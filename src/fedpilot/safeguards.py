"""What stands between clients' uploads and the aggregation: screening, a robust rule, noise."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedpilot.errors import PlanError
from fedpilot.privacy.client_dp import ClientDP
from fedpilot.robust import Robust
from fedpilot.screening import Screening
from fedpilot.types import ClientProfile


@dataclass(frozen=True)
class Safeguards:
    """The safeguards of a run; the default has none.

    Attributes:
        screening: Uploads far larger than the others' are refused or cut.
        robust: Rule that stands in for the mean.
        private: Privacy of clients.
    """

    screening: Screening = field(default_factory=Screening)
    robust: Robust = field(default_factory=Robust)
    private: ClientDP | None = None

    @property
    def central(self) -> ClientDP | None:
        """Privacy that the server's noise gives."""
        return self.private if self.private is not None and self.private.kind == "client" else None

    def check(self, algorithm: object) -> None:
        """Refuses what does not go together, before the run.

        Raises:
            PlanError: As said.
        """
        self.robust.check(algorithm)
        if self.private is not None:
            self.private.check(algorithm)
        if self.central is not None and (self.screening.on or self.robust.rule != "mean"):
            raise PlanError(
                "privacy.kind 'client' must go without screening and robust rules, whose decisions let one client's "
                "upload change what others count for; its clipping bounds each client's influence already"
            )

    def last_round(self, num_rounds: int, population: Sequence[ClientProfile], cohort_size: int | None) -> int:
        """The last round that the privacy budget allows.

        Raises:
            PlanError: It allows none.
        """
        if self.private is None:
            return num_rounds
        return self.private.last_round(num_rounds, self.private.rate(len(population), cohort_size))


NONE = Safeguards()
"""No safeguard."""
