"""What running out of memory teaches: from then on a client's predicted bytes times a margin must fit its budget.

A prediction is of the training step's tensors. A machine also has other programs, an allocator that keeps what it was
given back, and operators who promise more than there is. So a client that ran out although its plan fitted is planned
for as if it had less: for what the failed plan needed, and a fifth less again each time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from fedpilot.types import ClientProfile, Failure, OutOfMemory

STEP = 1.25
"""A plan that did not fit is followed by one that needs at most 1 / STEP of its bytes."""

Margins = Mapping[int, float]
"""Client -> factor on its predicted bytes; absent where it never ran out."""


def applied(client: ClientProfile, margins: Margins) -> ClientProfile:
    """The client with the budget that its margin leaves.

    >>> applied(ClientProfile(3, 10, memory_bytes=1000), {3: 1.25}).memory_bytes
    800
    """
    margin = margins.get(client.client_id)
    if margin is None:
        return client
    return replace(client, memory_bytes=int(client.memory_bytes / margin), margin=margin)


def learnt(
    margins: Margins, failures: Iterable[Failure], budgets: Mapping[int, int], peaks: Mapping[int, int | None]
) -> Margins:
    """The margins after a round.

    >>> learnt({}, [OutOfMemory(3, "killed")], budgets={3: 1000}, peaks={3: 500})
    {3: 2.5}

    Args:
        margins: Before it.
        failures: Of the round.
        budgets: Client -> bytes that it was planned for, its margin applied.
        peaks: Client -> predicted peak of its plan; ``None`` where none was predicted.
    """
    result = dict(margins)
    for failure in failures:
        if isinstance(failure, OutOfMemory):
            client_id = failure.client_id
            budget = budgets[client_id]
            slack = budget / (peaks[client_id] or budget)  # what the plan had left over did not help
            result[client_id] = result.get(client_id, 1.0) * slack * STEP
    return result


def recalled(lines: Sequence[Mapping[str, object]]) -> Margins:
    """The margins that a run's recorded rounds leave known: a resumed run plans as if it had never stopped.

    Args:
        lines: Of ``metrics.jsonl``, in order.
    """
    last = cast(Mapping[str, float], lines[-1].get("margins", {})) if lines else {}
    return {int(client_id): margin for client_id, margin in last.items()}
