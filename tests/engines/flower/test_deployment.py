"""Real processes: a SuperLink with TLS and node authentication, SuperNodes, trainers that stay. Minutes."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedpilot import jobs
from fedpilot.engines.flower import certificates, deployment
from fedpilot.engines.flower.timing import Timing
from fedpilot.errors import ConfigError, FedpilotError
from fedpilot.record import RunDirectory
from tests.engines.flower.deployed import (
    Place,
    adapter,
    gone,
    in_process,
    kept_environment,
    make_place,
    processes_of,
)
from tests.engines.flower.recipes import METHODS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("deployment"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with kept_environment():
        yield


def test_the_final_adapter_is_bit_equal_in_process_and_deployed_and_nodes_join_run_after_run(
    place: Place, tmp_path: Path
) -> None:
    said: list[str] = []
    with place.nodes():
        for name in METHODS:
            recipe = place.recipe(name)
            deployment.serve(place.serving(tmp_path / name, recipe), said.append)
            assert adapter(tmp_path / name) == in_process(recipe, tmp_path / f"{name}-here"), name
            assert not any(line["failures"] for line in RunDirectory.open(tmp_path / name).lines())
    assert sum(text.startswith("round 2: accuracy") for text in said) == len(METHODS)
    assert gone(place.folder)
    assert gone(tmp_path)


def test_a_killed_node_comes_back_and_the_run_goes_on(place: Place, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_in_round_1(text: str) -> None:
        if text.startswith("round 1") and not killed:
            for pid in processes_of(place.folder / "node-Oslo"):
                command = Path(f"/proc/{pid}/cmdline").read_text()
                if "flower.node" in command or "compat\0supernode" in command:
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)

    with place.nodes():
        timing = Timing(timeout_s=60.0, reconnect_s=90.0)
        serving = place.serving(tmp_path / "run", place.recipe(rounds=4), timing=timing)
        deployment.serve(serving, kill_in_round_1)
    assert killed
    lines = RunDirectory.open(tmp_path / "run").lines()
    assert len(lines) == 5
    assert {upload["client_id"] for upload in lines[4]["uploads"]} == {0, 1, 2}  # type: ignore[attr-defined]


def test_a_killed_server_goes_on_from_its_checkpoint_to_the_same_bits(place: Place, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill_after_round_2(text: str) -> None:
        if text.startswith("round 2"):
            for pid in processes_of(tmp_path / "run"):
                os.kill(pid, signal.SIGKILL)
            raise KilledError

    recipe = place.recipe("fedex-lora", rounds=4)
    with place.nodes():
        with pytest.raises(KilledError):
            deployment.serve(place.serving(tmp_path / "run", recipe), kill_after_round_2)
        deployment.serve(place.serving(tmp_path / "run", None), lambda text: None)
    assert adapter(tmp_path / "run") == in_process(recipe, tmp_path / "here")


@pytest.mark.parametrize("times", [1, 2])
def test_a_served_run_that_ctrl_c_stopped_leaves_no_process_and_goes_on_to_the_same_bits(
    place: Place, tmp_path: Path, times: int
) -> None:
    recipe, path = place.recipe("fedit", rounds=6), tmp_path / "run"
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    command = [sys.executable, "-m", "fedpilot", "serve", str(tmp_path / "recipe.toml"), "--out", str(path)]
    command += ["--certs", str(place.certs), "--address", f"127.0.0.1:{place.port}", "--poll", "0.2"]
    with place.nodes():
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stdout is not None
        said = ""
        while "\nround 1: " not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.2)
        rest, _ = process.communicate(timeout=120)
        assert process.returncode == 1, said + rest
        assert f"Go on with: fedpilot serve --resume {path}" in rest
        assert "Traceback" not in rest
        assert gone(tmp_path)
        assert 1 <= RunDirectory.open(path).lines()[-1]["round"] < 6  # type: ignore[operator]
        deployment.serve(place.serving(path, None), lambda text: None)
    assert adapter(path) == in_process(recipe, tmp_path / "here")


@contextmanager
def superlink(place: Place, path: Path) -> Iterator[None]:
    """A server that waits for nodes, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from fedpilot.engines.flower import commands\n"
        "recipe, out, certs, address = sys.argv[1:]\n"
        "where = commands.Where(Path(out), None, Path(certs), address)\n"
        "commands.serve(Path(recipe), [], where, 3, 120.0, 60.0, 0.2, print)"
    )
    arguments = ["toy.toml", path, "certs", f"127.0.0.1:{place.port}"]  # as people type them
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=place.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    try:
        while not deployment._answers(place.port):
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def status(address: str, path: str, context: ssl.SSLContext | None = None) -> int:
    try:
        request = urllib.request.Request(f"{address}{path}", data=b"")
        return int(urllib.request.urlopen(request, context=context, timeout=10).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_strangers_are_refused(place: Place, tmp_path: Path) -> None:
    certificates.make(tmp_path / "stranger", [], ["Oslo"])
    with superlink(place, tmp_path / "run"):
        address = f"127.0.0.1:{place.port}"
        trusting = ssl.create_default_context(cafile=str(place.certs / "ca.crt"))
        wrong = ssl.create_default_context(cafile=str(tmp_path / "stranger" / "ca.crt"))
        assert status(f"https://{address}", "/v1/fleet/pull-messages", trusting) >= 400  # no signature
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            status(f"https://{address}", "/v1/fleet/pull-messages", wrong)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            status(f"http://{address}", "/v1/fleet/pull-messages")
        for options in ({"key": tmp_path / "stranger" / "nodes" / "Oslo"}, {"ca": tmp_path / "stranger" / "ca.crt"}):
            log = place.folder / "node-Oslo" / "supernode.log"
            log.unlink(missing_ok=True)
            with place.node(1, **options) as folder:  # type: ignore[arg-type]
                deadline = time.monotonic() + 90
                while "retrying" not in _text(folder) and "Failed" not in _text(folder):
                    assert time.monotonic() < deadline, _text(folder)
                    time.sleep(0.5)
            assert "Receiving" not in _text(folder)
        secret = (place.certs / "nodes" / "Bern").read_text().splitlines()[1]
        logs = "".join(path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*.log"))
        assert secret not in logs
        assert "PRIVATE KEY" not in logs
    assert gone(tmp_path / "run")  # SIGTERM stopped all that the server had started


def _text(folder: Path) -> str:
    log = folder / "supernode.log"
    return log.read_text(errors="replace") if log.exists() else ""


def test_a_server_that_nobody_joins_ends_with_the_reason(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 nodes must join within 1 s, got 0 \(nobody\)"):
        deployment.serve(place.serving(tmp_path / "run", place.recipe(), wait_s=1.0), lambda text: None)
    assert gone(tmp_path)


def test_an_error_of_the_run_is_the_servers_error(place: Place, tmp_path: Path) -> None:
    recipe = place.recipe()
    broken = replace(recipe, data=replace(recipe.data, source=str(tmp_path / "gone.csv")))
    with pytest.raises(FedpilotError, match=r"gone\.csv"):
        deployment.serve(place.serving(tmp_path / "run", broken), lambda text: None)
    assert json.loads((tmp_path / "run" / ".flower" / "outcome.json").read_text())["problems"] == []


def test_a_port_in_use_is_said(place: Place, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} must be a free port"):
            deployment.serve(place.serving(tmp_path / "run", place.recipe(), port=port), lambda text: None)
    assert not (tmp_path / "run").exists()


def test_flowers_simulation_has_the_bits_of_the_run_in_process(place: Place, tmp_path: Path) -> None:
    from fedpilot.engines.flower import simulation

    for name in METHODS:
        recipe = place.recipe(name)
        job = jobs.start(recipe, tmp_path / name)
        simulation.run(job)
        assert adapter(tmp_path / name) == in_process(recipe, tmp_path / f"{name}-here"), name


CLUSTER = """
from ray.cluster_utils import Cluster
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
made.add_node(num_cpus=1)
made.wait_for_nodes()
print(made.address, flush=True)
input()
made.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of two machines' worth of Ray, each with a core."""
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield next(line for line in process.stdout if re.fullmatch(r"[\d.]+:\d+\n", line)).strip()
        process.communicate("\n", timeout=60)


def test_a_run_on_a_ray_cluster_uses_all_its_machines_and_has_the_bits_of_the_run_in_process(
    cluster: str, place: Place, tmp_path: Path
) -> None:
    import ray

    for name in ("fedit", "fed-pilot"):
        recipe = place.recipe(name, engine="flower-simulation", ray_address=cluster)
        jobs.run(jobs.start(recipe, tmp_path / name))
        here = place.recipe(name)
        assert adapter(tmp_path / name) == in_process(here, tmp_path / f"{name}-here"), name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(address=cluster, logging_level="ERROR")
    try:
        actors = ray._private.state.actors().values()
    finally:
        ray.shutdown()
    used = {actor["Address"]["NodeID"] for actor in actors if "ClientApp" in actor["ActorClassName"]}
    assert len(used) == 2


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "auto"])
def test_an_address_without_a_cluster_is_said(place: Place, tmp_path: Path, address: str) -> None:
    recipe = place.recipe(engine="flower-simulation", ray_address=address)
    job = jobs.start(recipe, tmp_path / "run")
    with pytest.raises(
        FedpilotError, match=rf"run\.ray_address must be that of a running Ray cluster, got '{address}'"
    ):
        jobs.run(job)
