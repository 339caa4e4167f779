"""How a node that runs out of memory says so, in each of the ways that it may happen."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedpilot.config.recipe import load_recipe
from fedpilot.engines.flower import client_app, codec, machine, messages, sockets
from fedpilot.engines.flower.codec import NodeFailure, Packed
from fedpilot.engines.flower.trainer import Loader, NodeOptions, Trainer, ran_out
from fedpilot.errors import ClientError
from fedpilot.types import OutOfMemory, Task, Upload
from tests.engines.flower import test_engine as engines
from tests.engines.flower.recipes import RECIPE
from tests.engines.flower.test_trainer import answered, stamp, task_for, told
from tests.test_cli import save_data, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    save_model(folder / "model")
    save_data(folder / "data.csv")
    (folder / "toy.toml").write_text(RECIPE)
    return folder


def test_an_allocation_that_the_machine_refuses_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**45)  # 128 TiB, of torch's own allocator
    assert ran_out(refused.value)
    assert ran_out(MemoryError())
    assert ran_out(RuntimeError("could not create a primitive"))  # oneDNN, under RLIMIT_AS
    assert not ran_out(RuntimeError("shapes must match"))
    assert not ran_out(ValueError("can't allocate memory"))


def test_a_trainer_that_runs_out_says_memory_and_goes_on_with_the_next_task(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, settings = Trainer(NodeOptions(tmp_path, partition=0), Loader()), told(load_recipe(folder / "toy.toml"))
    task = task_for(trainer, settings)

    def greedy(*_: object, **__: object) -> None:
        torch.empty(2**45)

    with monkeypatch.context() as patch:
        patch.setattr("fedpilot.engines.flower.trainer.carry", greedy)
        found = answered(trainer, settings, task, stamp())
    assert isinstance(found, NodeFailure)
    assert found.cause == "memory"
    assert "you tried to allocate" in found.reason
    assert isinstance(answered(trainer, settings, task, stamp(round=2)), Upload)


def test_a_plan_above_what_the_node_promises_now_is_refused_as_memory(folder: Path, tmp_path: Path) -> None:
    settings = told(load_recipe(folder / "toy.toml"))
    trainer = Trainer(NodeOptions(tmp_path, partition=0, memory_bytes=1000), Loader())
    task = task_for(trainer, settings)
    task = replace(task, plan=replace(task.plan, peak_bytes=1001))
    found = answered(trainer, settings, task, stamp())
    assert found == NodeFailure("memory", "plan must fit 1000 bytes, this node's budget now, got 1001")
    within = replace(task, plan=replace(task.plan, peak_bytes=1000))
    assert isinstance(answered(trainer, settings, within, stamp(round=2)), Upload)


def test_the_engine_tells_the_round_of_memory_and_of_nothing_else() -> None:
    def short(stamp: codec.Stamp, task: Task) -> Packed:
        cause: codec.Cause = "memory" if stamp.client_id == 1 else "error"
        return codec.encode_failure(NodeFailure(cause, "why"), stamp)

    first, second = engines.engine_of(short).exchange(1, engines.tasks(1, 2))
    assert first == OutOfMemory(1, "why")
    assert not isinstance(second, OutOfMemory)


def test_what_the_short_lived_side_says_is_what_the_codec_would_have_said() -> None:
    packed = codec.encode_task(engines.task_of(4), stamp())
    content = messages.failed(packed.manifest, "memory", "killed\nby the kernel")
    answer = Packed(messages.text_of(content, "manifest"), messages.payload_of(content))
    assert codec.decode_answer(answer, stamp(), most_bytes=0) == NodeFailure("memory", "killed by the kernel")


class Dying:
    """A trainer whose process is killed in the middle of its task, or that cannot even read it."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def update(self, settings: str, packed: Packed, note: str = "") -> Packed:
        self.act()
        raise AssertionError("it is gone")


@pytest.fixture
def place() -> Iterator[Path]:
    with TemporaryDirectory(prefix="fp") as folder:
        yield Path(folder) / "own" / "trainer"


def task_message() -> Message:
    packed = codec.encode_task(engines.task_of(4), stamp())
    return Message(messages.carried(packed.manifest, packed.payload, "{}"), dst_node_id=1, message_type=messages.UPDATE)


def context(place: Path) -> Context:
    return Context(1, 1, {client_app.SOCKET: str(place)}, RecordDict(), {})


def serve_and_die(place: Path) -> int:
    """A process that ends by SIGKILL when it has its task; its number."""
    place.parent.mkdir()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(place))
    listener.listen()
    pid = os.fork()
    if pid == 0:
        connection, _ = listener.accept()
        sockets.receive(connection)
        os.kill(os.getpid(), signal.SIGKILL)
    listener.close()
    return pid


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_trainer_that_the_kernel_kills_for_memory_is_told_from_one_that_somebody_else_kills(
    place: Path, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([7, 8 if by_kernel else 7])  # the kernel's counter before and after
    monkeypatch.setattr(machine, "oom_kills", lambda: next(counts))
    pid = serve_and_die(place)
    try:
        if by_kernel:
            reply = client_app.update(task_message(), context(place))
            answer = Packed(messages.text_of(reply.content, "manifest"), messages.payload_of(reply.content))
            found = codec.decode_answer(answer, stamp(), most_bytes=0)
            assert isinstance(found, NodeFailure)
            assert found.cause == "memory"
        else:
            with pytest.raises(ClientError, match="the trainer must answer, got the end"):
                client_app.update(task_message(), context(place))
    finally:
        os.waitpid(pid, 0)


def test_a_trainer_without_the_memory_to_read_its_task_says_so(place: Path) -> None:
    def run_out() -> None:
        raise MemoryError

    threading.Thread(target=sockets.serve, args=(Dying(run_out), place), daemon=True).start()
    reply = client_app.update(task_message(), context(place))
    answer = Packed(messages.text_of(reply.content, "manifest"), messages.payload_of(reply.content))
    found = codec.decode_answer(answer, stamp(), most_bytes=0)
    assert isinstance(found, NodeFailure)
    assert found.cause == "memory"
    assert "MemoryError" in found.reason
