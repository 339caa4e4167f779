"""The trainer behind its Unix socket."""

import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fedpilot.engines.flower import sockets
from fedpilot.engines.flower.codec import Packed
from fedpilot.errors import ClientError


class Echo:
    """Answers with what it got; refuses what says so."""

    def describe(self, settings: str) -> str:
        return settings.upper()

    def note(self, settings: str, manifest: str) -> str:
        return f"{manifest} noted by {settings}"

    def update(self, settings: str, packed: Packed, note: str = "") -> Packed:
        if packed.manifest == "refuse":
            raise ClientError("the task must be readable")
        return Packed(packed.manifest + settings + note, bytes(packed.payload)[::-1])


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with TemporaryDirectory(prefix="fp") as folder:
        path = Path(folder) / "own" / "trainer"
        threading.Thread(target=sockets.serve, args=(Echo(), path), daemon=True).start()
        yield path


def update(place: Path, manifest: str, payload: bytes) -> tuple[dict[str, str], bytearray]:
    return sockets.ask(place, {"op": "update", "settings": "S", "manifest": manifest}, payload)


def test_a_question_is_answered_and_payloads_of_any_size_pass(place: Path) -> None:
    assert sockets.ask(place, {"op": "describe", "settings": "{a}"})[0] == {"answer": "{A}"}
    for size in (0, 1, 3 * 2**20 + 1):
        payload = bytes(range(256)) * (size // 256 + 1)
        head, result = update(place, "mä\n", payload)
        assert head == {"manifest": "mä\nS"}
        assert bytes(result) == payload[::-1]


def test_notes_of_secure_sums_are_answered_and_go_with_tasks(place: Path) -> None:
    asked = {"op": "note", "settings": "S", "manifest": "keys"}
    assert sockets.ask(place, asked) == ({"manifest": "keys noted by S"}, bytearray())
    task = {"op": "update", "settings": "S", "manifest": "m", "note": "letters"}
    assert sockets.ask(place, task, b"x") == ({"manifest": "mSletters"}, bytearray(b"x"))


def test_a_refusal_is_said_and_the_next_question_answered(place: Path) -> None:
    assert update(place, "refuse", b"")[0] == {"error": "the task must be readable"}
    assert update(place, "good", b"x")[0] == {"manifest": "goodS"}


@pytest.mark.parametrize(
    "garbage", [b"", b"\0", b"\xff" * 16, sockets.LENGTHS.pack(3, 0) + b"abc", b"GET / HTTP/1.1\r\n"]
)
def test_garbage_leaves_the_trainer_answering(place: Path, garbage: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(place))
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1000)
    assert update(place, "good", b"x")[0] == {"manifest": "goodS"}


def test_whoever_asks_and_goes_leaves_the_trainer_answering(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(place))
        sockets.send(connection, {"op": "update", "settings": "", "manifest": "m"}, bytes(10**6))
    assert update(place, "good", b"x")[0] == {"manifest": "goodS"}


def test_only_its_owner_can_enter_the_sockets_folder(place: Path) -> None:
    update(place, "good", b"")
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700


def test_a_trainer_that_never_comes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "START_S", 0.0)
    with pytest.raises(ClientError, match="a trainer must listen at"):
        sockets.ask(tmp_path / "nobody", {"op": "describe", "settings": ""})


def test_a_trainer_that_dies_over_a_task_is_an_error(tmp_path: Path) -> None:
    with TemporaryDirectory(prefix="fp") as folder, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path = Path(folder) / "t"
        listener.bind(str(path))
        listener.listen()

        def die() -> None:
            connection, _ = listener.accept()
            sockets.receive(connection)
            connection.close()

        thread = threading.Thread(target=die)
        thread.start()
        with pytest.raises(ClientError, match="the trainer must answer, got the end"):
            update(path, "m", b"x")
        thread.join()


def test_a_trainer_that_dies_before_it_has_read_its_task_is_the_same_error(tmp_path: Path) -> None:
    with TemporaryDirectory(prefix="fp") as folder, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path = Path(folder) / "t"
        listener.bind(str(path))
        listener.listen()

        def die() -> None:
            connection, _ = listener.accept()
            connection.recv(1)
            connection.close()  # with the rest unread: the other side's connection is reset

        thread = threading.Thread(target=die)
        thread.start()
        with pytest.raises(ClientError, match=r"the trainer must answer, got .*; see its log"):
            update(path, "m", b"x" * 2**20)
        thread.join()


def test_the_short_lived_process_imports_no_model_and_no_torch() -> None:
    code = (
        "import sys, fedpilot.engines.flower.client_app as _; print([n for n in ('torch', 'peft') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
