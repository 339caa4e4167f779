"""How long a server waits."""

from dataclasses import dataclass

from fedpilot.types import Plan


@dataclass(frozen=True)
class Timing:
    """How long is waited for what.

    Attributes:
        timeout_s: For a task's answer, where no time is predicted, and at least.
        slack: Times the predicted seconds of a plan that are waited where that is longer.
        reconnect_s: For clients whose nodes are not there when a round begins, all of them together.
        poll_s: Between two looks for an answer.
        ahead: Most tasks that are sent and not yet answered.
        note_s: For the answers to a trip of a secure sum, all clients together; tasks have their own time.
    """

    timeout_s: float = 600.0
    slack: float = 4.0
    reconnect_s: float = 30.0
    poll_s: float = 0.1
    ahead: int = 64
    note_s: float = 60.0

    def wait_s(self, plan: Plan) -> float:
        """Seconds to wait for the answer to a planned task."""
        return max(self.timeout_s, self.slack * (plan.seconds or 0.0))
