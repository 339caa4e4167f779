"""The engine of worker processes."""

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedpilot import base_deltas, tensors
from fedpilot.engines.in_process import InProcess
from fedpilot.engines.kept import DiskKept, MemoryKept
from fedpilot.engines.workers import Pool, Workers
from fedpilot.startup import Parent
from fedpilot.types import BaseDelta, Failure, Plan, Task, Upload
from tests import tiny
from tests.engines import bert_parts, parts


def tasks(*client_ids: int) -> list[Task]:
    return [Task(Plan(k, {}, frozenset({"x"})), {"x": torch.tensor([1.0, float(k)])}) for k in client_ids]


@pytest.fixture(scope="module")
def shared() -> Iterator[Workers]:
    """One set of processes for the tests that need no algorithm or store of their own."""
    algorithm = parts.Doubling((13,), (14,), (15,), slow=(3, 15), fails_again=(6,), dies_again=(7,))
    engine = Workers(algorithm, Pool(parts.Toys, 2))
    yield engine
    engine.pool.close()


def test_results_come_in_the_tasks_order_whoever_is_slow(shared: Workers) -> None:
    results = list(shared.exchange(1, tasks(3, 1, 2, 5, 4)))
    assert [result.client_id for result in results] == [3, 1, 2, 5, 4]
    assert [result.tensors["x"].tolist() for result in results] == [[2.0, 2.0 * k] for k in (3, 1, 2, 5, 4)]
    assert len({result.metrics["pid"] for result in results}) == 2
    assert os.getpid() not in {result.metrics["pid"] for result in results}


def test_a_client_that_fails_becomes_a_failure_and_the_round_goes_on(shared: Workers) -> None:
    results = list(shared.exchange(1, tasks(13, 2)))
    assert results[0] == Failure(13, "client 13 has no luck")
    assert isinstance(results[1], Upload)


def test_any_other_error_names_client_and_round_and_where_it_was_raised(shared: Workers) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        list(shared.exchange(7, tasks(1, 14, 2)))
    notes = caught.value.__notes__
    assert notes[0] == "raised by client 14 in round 7"
    assert "parts.py" in notes[1]
    assert len(list(shared.exchange(8, tasks(1, 2)))) == 2  # and the engine works on


def test_a_worker_that_dies_is_a_failure_of_its_client_and_another_takes_its_place(shared: Workers) -> None:
    results = list(shared.exchange(2, tasks(1, 15, 2, 15, 4)))
    assert [type(result) for result in results] == [Upload, Failure, Upload, Failure, Upload]
    assert "SIGKILL" in results[1].reason
    assert len(list(shared.exchange(3, tasks(1, 2, 4)))) == 3


def test_a_worker_killed_from_outside_at_work_or_at_rest_is_a_failure_of_one_client(shared: Workers) -> None:
    assert all(isinstance(result, Upload) for result in shared.exchange(1, tasks(1, 2)))
    os.kill(shared.pool.pids()[-1], signal.SIGKILL)  # the next to be given work
    time.sleep(0.2)
    results = list(shared.exchange(2, tasks(4, 5, 6)))
    assert [type(result) for result in results] == [Failure, Upload, Upload]


def test_a_method_is_called_on_all_workers_and_answers_come_in_order(shared: Workers) -> None:
    answers = shared.pool.call("square", [(number,) for number in range(7)])
    assert [square for square, _ in answers] == [0, 1, 4, 9, 16, 25, 36]
    assert shared.pool.call("hides_bitsandbytes", [()]) == [True]
    with pytest.raises(RuntimeError, match="die must not end its worker process, got one that was ended by signal"):
        shared.pool.call("die", [()])


def test_a_task_is_read_only_a_little_ahead_and_forgotten(shared: Workers) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def made() -> Iterator[Task]:
        nonlocal most
        for k in range(1, 13):
            tensor = torch.full((3,), float(k))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield Task(Plan(k, {}, frozenset({"x"})), {"x": tensor})
            del tensor

    results = shared.exchange(1, made())
    next(results)
    assert len(alive) <= 5
    list(results)
    assert most == 1


def test_an_exchange_that_is_not_read_to_its_end_leaves_no_work_behind(shared: Workers) -> None:
    seen = {pid for _, pid in shared.pool.call("square", [(1,), (2,), (3,)])}
    results = shared.exchange(1, tasks(1, 3, 3, 3))
    assert next(results).client_id == 1
    results.close()
    assert {pid for pid in seen if Path(f"/proc/{pid}").exists()} <= set(shared.pool.pids())
    assert [result.client_id for result in shared.exchange(2, tasks(4, 5))] == [4, 5]


def test_what_a_client_keeps_comes_back_and_a_failed_or_killed_round_leaves_it(shared: Workers, tmp_path: Path) -> None:
    for store in (MemoryKept(), DiskKept(tmp_path / "kept")):
        shared.store = store
        list(shared.exchange(1, tasks(1, 6, 7)))
        results = list(shared.exchange(2, tasks(1, 6, 7)))
        assert [type(result) for result in results] == [Upload, Failure, Failure]
        times = {k: store.get(k)["asked"]["times"].item() for k in (1, 6, 7)}
        assert times == {1: 2.0, 6: 1.0, 7: 1.0}
        assert sorted(shared.snapshot()) == ([1, 6, 7] if isinstance(store, MemoryKept) else [])


def test_workers_train_to_the_same_bits_as_the_process_itself() -> None:
    make = bert_parts.MakeBerts(str(tiny.folder("bert")))
    workplace = make()
    ranks = tiny.mixed_ranks(workplace.adapted)
    first = tiny.random_tensors(workplace.adapted, ranks)
    module = next(iter(ranks))
    out, width = workplace.adapted.spec.modules[module]
    generator = torch.Generator().manual_seed(3)
    step = base_deltas.pair(
        module, torch.randn(out, 2, generator=generator), torch.randn(2, width, generator=generator)
    )
    base = base_deltas.extended(BaseDelta(), step)

    def work() -> list[Task]:
        return [Task(Plan(k, ranks, frozenset(first)), first, base if k % 2 else BaseDelta()) for k in (5, 2, 7, 1, 3)]

    engine = Workers(bert_parts.Fitting(), Pool(make, 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for round in (1, 2):
            expected = InProcess(bert_parts.Fitting(), workplace.site).exchange(round, work())
            for got, wanted in zip(engine.exchange(round, work()), expected, strict=True):
                assert isinstance(got, Upload)
                assert isinstance(wanted, Upload)
                assert got.client_id == wanted.client_id
                assert got.metrics["loss"] == wanted.metrics["loss"]
                assert tensors.digest(got.tensors) == tensors.digest(wanted.tensors)
    finally:
        torch.set_num_threads(threads)
        engine.pool.close()


def test_what_breaks_while_a_workplace_is_set_up_is_raised() -> None:
    engine = Workers(parts.Doubling(), Pool(parts.broken_workplace, 2))
    with pytest.raises(FileNotFoundError, match="no data here"):
        list(engine.exchange(1, tasks(1)))
    engine.pool.close()


SCRIPT = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
from fedpilot.engines.workers import Pool, Workers
from fedpilot.types import Plan, Task
from tests.engines import parts
engine = Workers(parts.Doubling(slow=(3,)), Pool(parts.Toys, 2))
work = (Task(Plan(3, {}, frozenset({"x"})), {"x": torch.zeros(2)}) for _ in range(1000))
for result in engine.exchange(1, work):
    print(int(result.metrics["pid"]), flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_run_that_is_interrupted_or_killed(how: signal.Signals) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root, start_new_session=True
    )
    assert run.stdout is not None
    assert run.stderr is not None
    pids = {int(run.stdout.readline()) for _ in range(4)}
    if how is signal.SIGINT:
        os.killpg(run.pid, how)  # as a terminal does: to every process of the run
    else:
        run.send_signal(how)
    try:
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert (b"KeyboardInterrupt" in errors) == (how is signal.SIGINT)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


# --- the process that they are forked from ----------------------------------------------------------------------------


def doubled(pool: Pool) -> list[list[float]]:
    found = Workers(parts.Doubling(), pool).exchange(1, tasks(1, 2, 5))
    return [result.tensors["x"].tolist() for result in found if isinstance(result, Upload)]


def test_workers_are_forked_from_a_process_that_was_there_before_the_work_was_known() -> None:
    parent = Parent(["fedpilot.data"])
    pool = Pool(parts.Toys, 2, parent=parent)
    assert doubled(pool) == [[2.0, 2.0], [2.0, 4.0], [2.0, 10.0]]
    assert parent.process.poll() is None
    pool.close()
    assert parent.process.returncode == 0


def test_a_parent_that_nobody_needed_ends_with_its_pool() -> None:
    parent = Parent()
    Pool(parts.Toys, 2, parent=parent).close()
    assert parent.process.returncode == -signal.SIGKILL


def test_a_parent_that_died_is_replaced() -> None:
    parent = Parent()
    parent.process.kill()
    parent.process.wait()
    pool = Pool(parts.Toys, 2, parent=parent)
    assert doubled(pool) == [[2.0, 2.0], [2.0, 4.0], [2.0, 10.0]]
    pool.close()


def test_the_engines_process_computes_with_one_thread_while_workers_are_at_work(shared: Workers) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = [torch.get_num_threads() for _ in shared.exchange(1, tasks(1, 2, 5))]
        assert (seen, torch.get_num_threads()) == ([1, 1, 1], 2)
    finally:
        torch.set_num_threads(before)
