"""Who may join a server, whom it turns away and what is said of it: a real SuperLink with TLS and node keys."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedpilot.doctor import Finding
from fedpilot.engines.flower import certificates, deployment, reach, status
from fedpilot.engines.flower.timing import Timing
from fedpilot.record import RunDirectory
from tests.engines.flower.deployed import Place, gone, kept_environment, make_place
from tests.engines.flower.test_reach import DAY, NOW, listening, signed

pytestmark = pytest.mark.slow

PULL = "/v1/fleet/pull-messages"
SERVER = """
import sys
from pathlib import Path
from fedpilot.engines.flower import commands
recipe, out, certs, address = sys.argv[1:]
where = commands.Where(Path(out), None, Path(certs), address)
commands.serve(Path(recipe), [], where, 3, 600.0, 60.0, 0.2, lambda text: print(text, flush=True))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("joining"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with kept_environment():
        yield


@contextmanager
def waiting_server(place: Place, run: Path, certs: Path | None = None, port: int | None = None) -> Iterator[Path]:
    """A server that waits for nodes, in a process of its own; its output."""
    port = port or place.port
    arguments = [place.folder / "toy.toml", run, certs or place.certs, f"127.0.0.1:{port}"]
    said = run.with_suffix(".out")
    with said.open("wb") as log:
        command = [sys.executable, "-c", SERVER, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=place.folder, stdout=log, stderr=log)
    deadline = time.monotonic() + 180
    try:
        while "may join" not in said.read_text():
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield said
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def server(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of a server that waits."""
    run = tmp_path_factory.mktemp("server") / "run"
    with kept_environment(), waiting_server(place, run):
        yield run


def asked(place: Place, ca: Path, scheme: str = "https") -> int:
    """HTTP status of a node's request without a signature."""
    context = ssl.create_default_context(cafile=str(ca)) if scheme == "https" else None
    request = urllib.request.Request(f"{scheme}://127.0.0.1:{place.port}{PULL}", data=b"")
    try:
        return int(urllib.request.urlopen(request, context=context, timeout=20).status)
    except urllib.error.HTTPError as error:
        return error.code


def findings(place: Place, key: Path, **options: Callable[[], datetime.datetime]) -> list[Finding]:
    return list(reach.examine("127.0.0.1", place.port, place.certs / "ca.crt", key, **options))


def test_a_request_without_a_signature_over_plain_http_or_to_a_server_of_another_authority_gets_nowhere(
    place: Place, server: Path, tmp_path: Path
) -> None:
    certificates.make(tmp_path / "stranger", [], [])
    assert asked(place, place.certs / "ca.crt") >= 400
    with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
        asked(place, tmp_path / "stranger" / "ca.crt")
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        asked(place, place.certs / "ca.crt", "http")


def test_the_doctor_finds_nothing_in_the_way_of_a_registered_key_and_changes_nothing(
    place: Place, server: Path
) -> None:
    for _ in range(2):
        found = findings(place, place.certs / "nodes" / "Bern")
        assert {one.what: one.state for one in found} == dict.fromkeys(
            ("authority", "key", "port", "certificate", "version", "clock", "registered"), "ok"
        )
    assert status.read(server).state == "running"
    told = json.loads((server / ".flower" / status.SERVER).read_text())
    control = status.Control(told["address"], Path(told["ca"]))
    with contextlib.closing(control):
        assert control.connected() == {"Bern": False, "Oslo": False, "Rome": False}


def test_the_doctor_names_a_key_that_is_not_registered(place: Place, server: Path, tmp_path: Path) -> None:
    certificates.make(tmp_path / "stranger", [], ["Oslo"])
    (*before, last) = findings(place, tmp_path / "stranger" / "nodes" / "Oslo")
    assert all(one.state == "ok" for one in before)
    assert (last.what, last.state) == ("registered", "problem")
    assert "the server does not know" in last.said


@pytest.mark.parametrize(("ahead", "problem"), [(120.0, True), (-600.0, True), (-60.0, False), (2.0, False)])
def test_the_doctor_names_a_clock_that_is_wrong(place: Place, server: Path, ahead: float, problem: bool) -> None:
    found = findings(
        place, place.certs / "nodes" / "Bern", clock=lambda: reach.utc_now() + datetime.timedelta(seconds=ahead)
    )
    clock = next(one for one in found if one.what == "clock")
    assert (clock.state == "problem") == problem
    registered = [one for one in found if one.what == "registered"]
    assert all((one.state == "problem") == problem for one in registered)


def test_a_server_with_an_expired_certificate_is_not_believed_by_a_node_and_the_doctor_says_why(tmp_path: Path) -> None:
    certs = signed(tmp_path / "expired", NOW - 3 * DAY, NOW - DAY)
    certificates.make(certs, [], ["Bern"])  # adds the node's key to what is there
    folder = tmp_path / "node"
    with listening(certs) as port:
        options = (f"127.0.0.1:{port}", "--ca", certs / "ca.crt", "--key", certs / "nodes" / "Bern")
        command = [sys.executable, "-m", "fedpilot", "join", *options, "--folder", folder, "--partition", "0"]
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert _appears(folder / "supernode.log", "certificate has expired", "CERTIFICATE_VERIFY_FAILED")
            assert "SuperNode ID" not in (folder / "supernode.log").read_text()
        finally:
            process.terminate()
            process.wait(60)
        (*_, last) = reach.examine("127.0.0.1", port, certs / "ca.crt", certs / "nodes" / "Bern")
    assert "the server's certificate ended on" in last.said


def test_a_node_with_an_unregistered_key_and_one_with_another_authority_never_join(
    place: Place, server: Path, tmp_path: Path
) -> None:
    certificates.make(tmp_path / "stranger", [], ["Oslo"])
    for options in ({"key": tmp_path / "stranger" / "nodes" / "Oslo"}, {"ca": tmp_path / "stranger" / "ca.crt"}):
        log = place.folder / "node-Oslo" / "supernode.log"
        log.unlink(missing_ok=True)
        with place.node(1, **options) as folder:  # type: ignore[arg-type]
            assert _appears(folder / "supernode.log", "retrying", "Failed")
        assert "SuperNode ID" not in log.read_text()
        assert "Receiving" not in log.read_text()


def test_a_node_that_is_revoked_in_the_middle_of_a_run_is_shut_out_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    place = make_place(_made(tmp_path / "place"))
    said: list[str] = []

    def revoke(text: str) -> None:
        said.append(text)
        if text.startswith("round 2"):
            shutil.copy(place.certs / "nodes" / "Oslo", tmp_path / "Oslo")  # it is on the node too
            certificates.revoke(place.certs, ["Oslo"])

    with place.nodes() as folders:
        timing = Timing(timeout_s=60.0, reconnect_s=2.0)
        serving = place.serving(tmp_path / "run", place.recipe(rounds=6), timing=timing)
        deployment.serve(serving, revoke)
        assert "Oslo is shut out: its key was revoked" in said
        lines = RunDirectory.open(tmp_path / "run").lines()
        clients = [{upload["client_id"] for upload in line["uploads"]} for line in lines]  # type: ignore[attr-defined]
        assert clients[1] == {0, 1, 2}
        assert clients[-1] == {0, 2}
        assert [line["aggregated"] for line in lines[1:]] == [True] * 6
        # It does not come back in the next run either, and a doctor says so.
        with waiting_server(place, tmp_path / "next") as out:
            assert "may join: Bern, Rome" in out.read_text()
            (*_, last) = findings(place, tmp_path / "Oslo")
        assert (last.what, last.state) == ("registered", "problem")
    assert gone(place.folder)
    assert not (place.certs / "nodes" / "Oslo").exists()
    _nothing_secret(place, [tmp_path, *folders])


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _nothing_secret(place: Place, folders: list[Path]) -> None:
    """No log of a deployment, Flower's among them, holds a line of a private key."""
    secrets = []
    for file in (place.certs / "server.key", *(path for path in (place.certs / "nodes").iterdir() if not path.suffix)):
        lines = file.read_text().splitlines()
        secrets += [line for line in lines[1:-1] if len(line) > 20]
    assert len(secrets) > 6
    logs = {
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".log", ".txt", ".out", ".json", ".toml")
    }
    assert len(logs) > 8
    for path in logs:
        text = path.read_text(errors="replace")
        assert "PRIVATE KEY" not in text, path
        assert not [line for line in secrets if line in text], path


def _appears(log: Path, *words: str) -> bool:
    """Whether one of the words is in the log, sooner or later."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if log.exists() and any(word in log.read_text(errors="replace") for word in words):
            return True
        time.sleep(0.5)
    return False


def test_the_status_of_a_run_that_goes_on_says_who_is_connected_and_how_long_it_takes(
    place: Place, tmp_path: Path
) -> None:
    seen: list[status.Status] = []

    def look(text: str) -> None:
        if text.startswith("round 2"):
            seen.append(status.read(tmp_path / "run"))

    quiet = Place(place.folder, deployment.free_port())
    with quiet.nodes():
        deployment.serve(quiet.serving(tmp_path / "run", quiet.recipe(rounds=4)), look)
    (found,) = seen
    assert found.state == "running"
    assert {client.name: client.connected for client in found.clients} == dict.fromkeys(("Bern", "Oslo", "Rome"), True)
    assert found.left_s is not None
    assert found.recorded >= 2
    assert status.read(tmp_path / "run").state == "done"
    assert os.environ.get("FLWR_HOME") is not None
