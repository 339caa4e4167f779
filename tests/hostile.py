"""Clients of the toy net, some of whom lie about what they trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from fedpilot.algorithms.fedbiot import FedBiOT
from fedpilot.algorithms.fedins import FedIns
from fedpilot.algorithms.reclora import RecLoRA
from fedpilot.memory import MemoryProfile
from fedpilot.types import Algorithm, ClientProfile, Failure, Task, Upload
from tests import toy

SPEC = toy.spec()
CLIENTS = tuple(ClientProfile(k, 6 + 3 * k, 10**9, name=f"client-{k}") for k in range(10))


def fedbiot(profile: MemoryProfile, **options: Any) -> FedBiOT:
    return FedBiOT(SPEC, profile, **{"rank": 2, "pre_steps": 1, "align_steps": 1, **options})


def fedins(**options: Any) -> FedIns:
    options = {"size": 3, "top_k": 2, **options}
    kind = FedIns(SPEC, None, **options).step_kind  # type: ignore[arg-type]
    return FedIns(SPEC, toy.attached_profile(kind), **options)


def even_reclora(**options: Any) -> RecLoRA:
    """Without a gate, so without a click model."""
    options = {"N": 3, "rank": 2, "gate": "none", **options}
    kind = RecLoRA(SPEC, None, **options).step_kind  # type: ignore[arg-type]
    return RecLoRA(SPEC, toy.attached_profile(kind), **options)


Lie: TypeAlias = Callable[[Task, Upload], Upload]


def scaled(factor: float) -> Lie:
    """The true update times a factor: 100 for a loud one, a negative one for a flipped sign."""

    def lie(task: Task, upload: Upload) -> Upload:
        moved = {n: task.tensors[n] + factor * (t - task.tensors[n]) for n, t in upload.tensors.items()}
        return replace(upload, tensors=moved)

    return lie


def balanced(task: Task, upload: Upload) -> Upload:
    """Pairs (1000 A, B / 1000): no weight changes, but a mean of factors does."""
    factors = {"lora_A": 1000.0, "lora_B": 0.001}
    moved = {n: t * factors.get(n.rpartition(".")[2], 1.0) for n, t in upload.tensors.items()}
    return replace(upload, tensors=moved)


class Engine:
    """Trains for true on the toy net, one client after the other; liars change what they send."""

    def __init__(self, algorithm: Algorithm[Any], liars: Mapping[int, Lie] | None = None) -> None:
        self._algorithm, self._liars = algorithm, liars or {}

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        for task in tasks:
            k = task.plan.client_id
            site = toy.site(CLIENTS[k])
            site.model.generator.manual_seed(1000 * round + k)
            upload = self._algorithm.local_update(task, site)
            yield self._liars[k](task, upload) if k in self._liars else upload
