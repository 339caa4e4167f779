"""What all rules of aggregation share: memory that does not grow with the clients."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fedpilot.algorithms import FedIT, FedPilot, FlexLoRA, FLoRA, HetLoRA, LoRAFair
from fedpilot.memory import MemoryProfile
from fedpilot.memory.counting import LiveStorages
from fedpilot.types import Algorithm, ModelSpec, Upload
from tests import toy

RANK = 3
SPEC = toy.spec((40, 31, 44))

RULES: dict[str, Callable[[ModelSpec, MemoryProfile], Algorithm[Any]]] = {
    "fedit": lambda s, p: FedIT(s, p, rank=RANK),
    "fed-pilot": lambda s, p: FedPilot(s, p, rank=RANK),
    "hetlora": lambda s, p: HetLoRA(s, p, r_min=1, r_max=RANK),
    "flora": lambda s, p: FLoRA(s, p, r_min=1, r_max=RANK),
    "flexlora": lambda s, p: FlexLoRA(s, p, r_min=1, r_max=RANK),
    "lora-fair": lambda s, p: LoRAFair(s, p, rank=RANK, steps=5),
}


def stream(count: int, *, unlike: bool) -> Iterator[Upload]:
    """Uploads that nobody else holds, of ranks 1 to 3 where the rule takes them."""
    for client in range(count):
        rank = 1 + client % RANK if unlike else RANK
        adapter = toy.random_adapter(SPEC, rank, client)
        yield Upload(client, 2 + client % 5, adapter, {"rank": float(rank)})
        del adapter


@pytest.mark.parametrize("name", RULES)
def test_the_memory_of_an_aggregation_does_not_grow_with_the_clients(name: str, profile: MemoryProfile) -> None:
    algorithm = RULES[name](SPEC, profile)

    def peak(count: int) -> int:
        state = algorithm.init(np.random.default_rng(0))
        counter = LiveStorages()
        with counter.counting():
            algorithm.aggregate(state, stream(count, unlike=name not in ("fedit", "lora-fair")))
        return counter.peak

    assert peak(300) == peak(201)  # the last client of both has the same rank
