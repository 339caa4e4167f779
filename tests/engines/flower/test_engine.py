"""The engine over Flower's messages, with an app that needs no model."""

import json
import pickle
import re
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

from fedpilot.engines.flower import codec, messages
from fedpilot.engines.flower.codec import NodeFailure, Packed
from fedpilot.engines.flower.engine import FlowerEngine, Nodes
from fedpilot.engines.flower.timing import Timing
from fedpilot.exchange import Clock, RoundResults
from fedpilot.types import Failure, Plan, Task, Upload
from tests.engines.flower.local_grid import LocalGrid
from tests.engines.flower.mutations import honest

QUICK = Timing(timeout_s=0.0, reconnect_s=0.0, poll_s=0.0)
Answer = Callable[[codec.Stamp, Task], Packed]


def doubling(stamp: codec.Stamp, task: Task) -> Packed:
    return codec.encode_upload(
        Upload(stamp.client_id, 5, {name: 2 * task.tensors[name] for name in task.plan.trainable}), stamp
    )


def app_of(answer: Answer = doubling, names: Callable[[int], str] = "client {}".format) -> ClientApp:
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        facts = {"name": names(context.node_config["number"]), "num_examples": 5, "memory_bytes": 100}
        return Message(messages.answer(json.dumps(facts)), reply_to=message)

    @app.train("update")
    def update(message: Message, context: Context) -> Message:
        manifest, payload = messages.text_of(message.content, "manifest"), messages.payload_of(message.content)
        done = answer(*codec.decode_task(Packed(manifest, payload), lambda fresh, ranks: {}))
        return Message(messages.carried(done.manifest, done.payload), reply_to=message)

    return app


def engine_of(answer: Answer = doubling, timing: Timing = QUICK, clients: int = 3, **options: Any) -> FlowerEngine:
    grid = LocalGrid(app_of(answer), {500 - k: {"number": k} for k in range(clients)}, **options)
    return FlowerEngine(grid, Nodes(grid, "{}"), {k: f"client {k}" for k in range(clients)}, "{}", "run", 2.0, timing)


def task_of(client_id: int) -> Task:
    return Task(Plan(client_id, {}, frozenset({"x"})), {"x": torch.tensor([1.0, client_id]), "y": torch.zeros(9)})


def tasks(*client_ids: int) -> list[Task]:
    return [task_of(client_id) for client_id in client_ids]


def reason(result: Upload | Failure) -> str:
    assert isinstance(result, Failure)
    return result.reason


def test_results_come_in_the_tasks_order_with_the_time_of_their_round_trip() -> None:
    results = list(engine_of().exchange(1, tasks(2, 0, 1)))
    assert [result.client_id for result in results] == [2, 0, 1]
    assert [result.tensors["x"].tolist() for result in results] == [[2.0, 4.0], [2.0, 0.0], [2.0, 2.0]]
    assert all(result.metrics["round_trip_seconds"] >= 0 for result in results)


@pytest.mark.parametrize("ahead", [1, 2])
def test_tasks_are_read_up_to_the_bound_ahead_and_forgotten_when_they_are_sent(ahead: int) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def lazily() -> Iterator[Task]:
        for client_id in (0, 1, 2):
            assert all(ref() is None for ref in alive)
            task = task_of(client_id)
            alive.append(weakref.ref(task.tensors["x"]))
            yield task
            del task

    results = engine_of(timing=Timing(0.0, reconnect_s=0.0, poll_s=0.0, ahead=ahead)).exchange(1, lazily())
    assert len(alive) == 0
    next(results)
    assert len(alive) == ahead
    list(results)
    assert len(alive) == 3


def test_an_answer_stays_with_the_superlink_until_its_turn() -> None:
    engine = engine_of()
    results = engine.exchange(1, tasks(0, 1, 2))
    next(results)
    assert isinstance(engine.grid, LocalGrid)
    assert len(engine.grid.pulled) == 3 + 1  # the three queries and one answer


def test_clients_are_known_by_name_whatever_number_their_node_has() -> None:
    engine = engine_of()
    list(engine.exchange(1, tasks(0, 1)))
    assert isinstance(engine.grid, LocalGrid)
    engine.grid.configs = {7: {"number": 1}, 8: {"number": 0}}  # both restarted
    assert [r.client_id for r in engine.exchange(2, tasks(0, 1)) if isinstance(r, Upload)] == [0, 1]
    assert [node_id for node_id, message in engine.grid.sent[-2:]] == [8, 7]


def test_a_client_whose_node_is_gone_fails_and_the_others_do_not() -> None:
    engine = engine_of()
    assert isinstance(engine.grid, LocalGrid)
    del engine.grid.configs[499]
    results = list(engine.exchange(1, tasks(0, 1, 2)))
    assert reason(results[1]) == "node 'client 1' must be connected, got none within 0 s"
    assert [type(result) for result in results] == [Upload, Failure, Upload]


def test_absent_clients_of_a_round_are_waited_for_once_together() -> None:
    engine = engine_of(timing=Timing(0.0, reconnect_s=0.3, poll_s=0.01), clients=4)
    assert isinstance(engine.grid, LocalGrid)
    engine.grid.configs = {500: {"number": 0}}
    started = time.monotonic()
    results = list(engine.exchange(1, tasks(1, 2, 3, 0)))
    assert [type(result) for result in results] == [Failure, Failure, Failure, Upload]
    assert 0.3 <= time.monotonic() - started < 0.8


def test_a_node_that_comes_while_it_is_waited_for_gets_its_task() -> None:
    engine = engine_of(timing=Timing(0.0, reconnect_s=20.0, poll_s=0.01))
    assert isinstance(engine.grid, LocalGrid)
    del engine.grid.configs[500]
    threading.Timer(0.2, lambda: engine.grid.configs.update({77: {"number": 0}})).start()  # type: ignore[attr-defined]
    assert [type(result) for result in engine.exchange(1, tasks(0, 1))] == [Upload, Upload]


def test_a_late_answer_is_a_failure_and_does_not_count_in_the_next_round() -> None:
    engine = engine_of()
    assert isinstance(engine.grid, LocalGrid)
    list(engine.nodes.look())
    engine.grid.silent = {500}
    results = list(engine.exchange(1, tasks(0, 1)))
    assert reason(results[0]) == "an answer must come within 0 s, got none"
    engine.grid.silent = set()
    stale = codec.encode_upload(Upload(0, 5, {"x": torch.zeros(2)}), codec.Stamp("run", 1, 0, "whatever", 2.0))
    engine.grid.around = lambda node_id, message: Message(
        messages.carried(stale.manifest, stale.payload), reply_to=message
    )
    assert "round must be 2, got 1" in reason(next(engine.exchange(2, tasks(0))))


def test_a_predicted_time_is_waited_for_with_slack() -> None:
    timing = Timing(timeout_s=10.0, slack=4.0)
    assert timing.wait_s(Plan(0, {}, frozenset())) == 10.0
    assert timing.wait_s(Plan(0, {}, frozenset(), seconds=30.0)) == 120.0


def test_an_error_on_a_node_is_a_failure_that_says_what_it_was() -> None:
    def fail(stamp: codec.Stamp, task: Task) -> Packed:
        raise ZeroDivisionError("by zero")

    assert "the node raised an error" in reason(next(engine_of(fail).exchange(1, tasks(1))))
    assert "by zero" in reason(next(engine_of(fail).exchange(1, tasks(1))))


def test_what_the_method_says_of_its_failure_comes_word_for_word() -> None:
    def fail(stamp: codec.Stamp, task: Task) -> Packed:
        return codec.encode_failure(NodeFailure("client", "training loss must be finite, got nan"), stamp)

    assert reason(next(engine_of(fail).exchange(1, tasks(1)))) == "training loss must be finite, got nan"


BAD: dict[str, tuple[Callable[[dict[str, Any], bytearray], object], str]] = {
    "of another round": (lambda document, payload: document.update(round=2), "round must be 3, got 2"),
    "of another client": (lambda document, payload: document.update(client_id=0), "client_id must be 1, got 0"),
    "of another task": (lambda document, payload: document.update(task="t"), "task must be"),
    "of another run": (lambda document, payload: document.update(run="other"), "run must be 'run', got 'other'"),
    "at another scale": (lambda document, payload: document.update(scale=1.0), "scale must be 2.0, got 1.0"),
    "too large": (
        lambda document, payload: payload.extend(bytes(10**6)),
        "must be at most 8 bytes, got 1000008",
    ),
    "with NaN": (lambda document, payload: payload.__setitem__(slice(0, 4), b"\0\0\xc0\x7f"), "x must be finite"),
    "of other names": (lambda document, payload: document["body"]["tensors"][0].__setitem__(0, "z"), "adds z"),
    "of another dtype": (lambda d, p: d["body"]["tensors"][0].__setitem__(1, "int32"), "x must be torch.float32"),
    "of another shape": (lambda d, p: d["body"]["tensors"][0].__setitem__(2, [1, 2]), r"x must have shape \(2,\)"),
    "without examples": (lambda document, payload: document["body"].update(num_examples=0), "num_examples must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_is_refused_with_its_reason_and_the_round_goes_on(name: str) -> None:
    change, expected = BAD[name]

    def lie(stamp: codec.Stamp, task: Task) -> Packed:
        good = doubling(stamp, task)
        if stamp.client_id != 1:
            return good
        document, payload = json.loads(good.manifest), bytearray(good.payload)
        change(document, payload)
        return Packed(honest(json.dumps(document), payload), payload)

    plans = [task.plan for task in tasks(0, 1, 2)]
    results = RoundResults(engine_of(lie), 3, plans, lambda plan: task_of(plan.client_id), lambda _: None, Clock())
    assert [upload.client_id for upload in results] == [0, 2]
    (failure,) = results.failures
    assert failure.client_id == 1
    assert re.search(expected, failure.reason)


def told_200_times(array: Array) -> bytes:
    """The array in bytes, as one that names its one chunk again and again."""
    told = {"dtype": "uint8", "shape": [10**10], "stype": messages.PACKED, "arraychunk_ids": [0] * 200}
    return add_header_to_object_body(json.dumps(told).encode(), array)


def test_zeros_that_travel_as_one_chunk_named_many_times_are_refused_without_allocating(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of()
    assert isinstance(engine.grid, LocalGrid)
    engine.nodes.look()

    def bomb(node_id: int, message: Message) -> Message:
        monkeypatch.setattr(Array, "deflate", told_200_times)
        return Message(messages.carried("{}", bytes(5 * 2**20)), reply_to=message)

    engine.grid.around = bomb
    results = engine.exchange(1, tasks(0))
    tracemalloc.start()
    assert "an array must be at most 8 bytes, got 1048576000" in reason(next(results))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**8


def test_a_reply_without_a_packed_array_is_refused() -> None:
    engine = engine_of()
    assert isinstance(engine.grid, LocalGrid)
    engine.nodes.look()
    engine.grid.around = lambda node_id, message: Message(messages.answer("{}"), reply_to=message)
    assert "a message must hold the text 'manifest'" in reason(next(engine.exchange(1, tasks(0))))


@pytest.mark.parametrize(
    "facts",
    [
        "[]",
        "[" * 10_000,
        '{"name": "a"}',
        '{"name": "", "num_examples": 1, "memory_bytes": 1}',
        '{"name": "a", "num_examples": -1, "memory_bytes": 1}',
        '{"name": "a", "num_examples": 1, "memory_bytes": true}',
        '{"name": "a", "error": "no data"}',
    ],
)
def test_a_node_that_describes_itself_wrongly_takes_no_part(facts: str) -> None:
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return Message(messages.answer(facts), reply_to=message)

    nodes = Nodes(LocalGrid(app, {1: {}}), "{}")
    assert nodes.look() == {}
    assert len(nodes.refused) == 1


def test_what_travels_is_the_payload_and_little_more() -> None:
    engine = engine_of(clients=1)
    assert isinstance(engine.grid, LocalGrid)
    large = Task(Plan(0, {}, frozenset({"x"})), {"x": torch.zeros(10**6)})
    engine.nodes.look()
    before = engine.grid.wire_bytes
    list(engine.exchange(1, [large]))
    assert 8_000_000 < engine.wire.down + engine.wire.up < 8_002_000
    assert engine.wire.seconds.keys() == {"encode", "push", "pull", "decode"}
    assert engine.grid.wire_bytes - before < 8_010_000


def test_flowers_numpy_loading_is_never_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    assert all(isinstance(result, Upload) for result in engine_of().exchange(1, tasks(0, 1)))
