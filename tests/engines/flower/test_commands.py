"""The commands ``certs``, ``serve`` and ``join`` as far as they need no other process."""

import signal
import sys
from pathlib import Path

import pytest

from fedpilot.engines.flower import commands
from fedpilot.errors import ConfigError
from tests.engines.flower.recipes import RECIPE
from tests.test_cli import fedpilot


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "toy.toml").write_text(RECIPE)
    return tmp_path / "toy.toml"


@pytest.mark.parametrize("package", ["flwr", "cryptography"])
def test_without_flower_every_command_says_how_to_get_it(
    package: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    keys = ["--ca", "a", "--key", "b"]
    for arguments in (
        ["certs", str(tmp_path / "c")],
        ["serve", str(recipe)],
        ["join", "h:1", *keys, "--partition", "0"],
    ):
        result = fedpilot(*arguments)
        assert result.exit_code == 1
        assert "pip install 'fedpilot[flower]'" in " ".join(result.output.split())
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:x", "host:0", "host:65536", "host:-1"])
def test_an_address_without_a_host_or_a_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="address must be host:port"):
        commands.host_and_port(address)


def test_certificates_are_made_and_said(tmp_path: Path) -> None:
    result = fedpilot("certs", str(tmp_path / "c"), "--host", "fl.example.org", "--node", "a", "--node", "b")
    assert result.exit_code == 0, result.output
    made = {path.name for path in (tmp_path / "c").rglob("*") if path.is_file()}
    assert made == {"ca.crt", "server.crt", "server.key", "a", "a.pub", "b", "b.pub"}
    assert "has all of it already" in fedpilot("certs", str(tmp_path / "c"), "--node", "a").output


def test_a_server_without_certificates_or_nodes_keys_is_a_wrong_option(recipe: Path, tmp_path: Path) -> None:
    served = ["serve", str(recipe), "--out", str(tmp_path / "run"), "--certs", str(tmp_path / "c")]
    assert fedpilot(*served).exit_code == 2
    fedpilot("certs", str(tmp_path / "c"))
    result = fedpilot(*served)
    assert result.exit_code == 2
    assert "lacks the key of any node" in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def test_a_recipe_for_flower_is_not_run_here_and_leaves_no_directory(recipe: Path, tmp_path: Path) -> None:
    result = fedpilot("run", str(recipe), "--set", "run.engine=flower", "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "use fedpilot serve and fedpilot join" in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "must have --data, its own file, or --partition"),
        (["--partition", "0", "--data", "x.csv"], "must have --data, its own file, or --partition"),
        (["--data", "x.csv"], "--data must be a file, got x.csv"),
        (["--partition", "0", "--memory", "much"], "--memory must be auto, recipe, or be bytes"),
        (["--partition", "0"], "must be a file; copy it from the server's certificates"),
    ],
)
def test_a_node_with_wrong_options_does_not_start(options: list[str], message: str, tmp_path: Path) -> None:
    keys = ["--ca", str(tmp_path / "ca"), "--key", str(tmp_path / "key"), "--folder", str(tmp_path / "node")]
    result = fedpilot("join", "127.0.0.1:9", *keys, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "node").exists()


def test_sigterm_ends_what_is_inside_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, commands.ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
