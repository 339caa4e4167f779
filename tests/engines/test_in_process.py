"""The engine that runs every client in this process."""

import weakref
from collections.abc import Iterator

import pytest
import torch

from fedpilot.engines.in_process import InProcess
from fedpilot.errors import TrainingError
from fedpilot.types import ClientProfile, Failure, Plan, Site, Task, Upload
from tests import toy


class Doubling:
    """A client sends twice what it got, and counts in ``kept`` how often it was asked."""

    def __init__(self, errors: dict[int, Exception] | None = None) -> None:
        self.errors = errors or {}

    def local_update(self, task: Task, site: Site) -> Upload:
        site.kept["asked"] = {"times": site.kept.get("asked", {"times": torch.zeros(1)})["times"] + 1}
        if site.profile.client_id in self.errors:
            raise self.errors[site.profile.client_id]
        doubled = {name: 2 * tensor for name, tensor in task.tensors.items()}
        return Upload(site.profile.client_id, site.profile.num_examples, doubled)


def site_for(client_id: int, round: int) -> Site:
    return Site(ClientProfile(client_id, 10 * client_id, 0), toy.ToyModel(1, 0))


def tasks(*client_ids: int) -> list[Task]:
    return [Task(Plan(k, {}, frozenset({"x"})), {"x": torch.tensor([1.0, float(k)])}) for k in client_ids]


def test_results_come_in_the_tasks_order() -> None:
    results = list(InProcess(Doubling(), site_for).exchange(1, tasks(3, 1, 2)))
    assert [result.client_id for result in results] == [3, 1, 2]
    assert [result.tensors["x"].tolist() for result in results] == [[2.0, 6.0], [2.0, 2.0], [2.0, 4.0]]


def test_a_client_that_fails_becomes_a_failure_and_the_round_goes_on() -> None:
    algorithm = Doubling({1: TrainingError("loss must be finite, got nan in step 3; lower the learning rate")})
    results = list(InProcess(algorithm, site_for).exchange(1, tasks(1, 2)))
    assert results[0] == Failure(1, "loss must be finite, got nan in step 3; lower the learning rate")
    assert isinstance(results[1], Upload)


def test_a_client_without_a_site_becomes_a_failure() -> None:
    def no_site(client_id: int, round: int) -> Site:
        raise TrainingError("client has no data")

    assert list(InProcess(Doubling(), no_site).exchange(1, tasks(4))) == [Failure(4, "client has no data")]


def test_any_other_error_stops_the_run_and_names_client_and_round() -> None:
    engine = InProcess(Doubling({2: ZeroDivisionError("a bug")}), site_for)
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        list(engine.exchange(7, tasks(1, 2)))
    assert caught.value.__notes__ == ["raised by client 2 in round 7"]


def test_what_a_client_keeps_comes_back_in_the_next_round_and_a_failed_round_leaves_it() -> None:
    algorithm = Doubling()
    engine = InProcess(algorithm, site_for)
    list(engine.exchange(1, tasks(1, 2)))
    algorithm.errors[2] = TrainingError("out of luck")
    list(engine.exchange(2, tasks(1, 2)))
    times = {client_id: kept["asked"]["times"].item() for client_id, kept in engine.snapshot().items()}
    assert times == {1: 2.0, 2: 1.0}


def test_a_snapshot_restores_another_engine_and_is_not_changed_by_it() -> None:
    engine, other = InProcess(Doubling(), site_for), InProcess(Doubling(), site_for)
    list(engine.exchange(1, tasks(1)))
    snapshot = engine.snapshot()
    other.restore(snapshot)
    list(other.exchange(2, tasks(1)))
    assert snapshot[1]["asked"]["times"].item() == 1.0
    assert other.snapshot()[1]["asked"]["times"].item() == 2.0


def test_a_task_is_read_when_its_client_has_its_turn_and_forgotten_after_it() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def lazily() -> Iterator[Task]:
        nonlocal most
        for client_id in (1, 2, 3):
            most = max(most, sum(ref() is not None for ref in alive))
            task = tasks(client_id)[0]
            alive.append(weakref.ref(task.tensors["x"]))
            yield task
            del task

    results = InProcess(Doubling(), site_for).exchange(1, lazily())
    assert len(alive) == 0
    next(results)
    assert len(alive) == 1
    list(results)
    assert len(alive) == 3
    assert most == 0
