"""Algorithms and workplaces that worker processes can import."""

import os
import signal
import sys
import time
from dataclasses import dataclass

import torch

from fedpilot.errors import TrainingError
from fedpilot.types import ClientProfile, Site, Task, Upload
from tests import toy


@dataclass(frozen=True)
class Doubling:
    """Sends twice what it got, counts in ``kept`` how often it was asked, and fails where it is told to."""

    fails: tuple[int, ...] = ()
    breaks: tuple[int, ...] = ()
    dies: tuple[int, ...] = ()
    slow: tuple[int, ...] = ()
    fails_again: tuple[int, ...] = ()
    dies_again: tuple[int, ...] = ()

    def local_update(self, task: Task, site: Site) -> Upload:
        client_id = site.profile.client_id
        site.kept["asked"] = {"times": site.kept.get("asked", {"times": torch.zeros(1)})["times"] + 1}
        again = bool(site.kept["asked"]["times"] > 1)
        if client_id in self.fails or (again and client_id in self.fails_again):
            raise TrainingError(f"client {client_id} has no luck")
        if client_id in self.breaks:
            raise ZeroDivisionError("a bug")
        if client_id in self.dies or (again and client_id in self.dies_again):
            os.kill(os.getpid(), signal.SIGKILL)
        if client_id in self.slow:
            time.sleep(0.3)
        doubled = {name: 2 * tensor for name, tensor in task.tensors.items()}
        return Upload(client_id, site.profile.num_examples, doubled, {"pid": float(os.getpid())})


class Toys:
    """A workplace without a model."""

    def site(self, client_id: int, round: int) -> Site:
        return Site(ClientProfile(client_id, 10 * client_id, 0), toy.ToyModel(1, 0))

    def square(self, number: int) -> tuple[int, int]:
        return number * number, os.getpid()

    def hides_bitsandbytes(self) -> bool:
        return sys.modules.get("bitsandbytes", sys) is None

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def broken_workplace() -> Toys:
    raise FileNotFoundError("no data here")
