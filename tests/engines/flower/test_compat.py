"""What is needed of Flower beyond its public modules is there, and outsiders reach the Fleet API only."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from flwr.superlink import extensions
from flwr.supernode import start_client_internal

from fedpilot.engines.flower import certificates, compat


def answer(path: str, client: str | None, server: str = "10.0.0.1", kind: str = "http") -> int:
    """Status of a request."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {}

    peer = None if client is None else (client, 5)
    scope = {"type": kind, "path": path, "client": peer, "server": (server, 8000)}
    asyncio.run(compat.Gate(app)(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/", "/v1/fleet"])
def test_from_another_machine_only_the_fleet_api_is_reached(path: str) -> None:
    assert answer(path, "10.0.0.9") == 403
    assert answer(path, None) == 403
    assert answer(path, "not an address") == 403
    assert answer("/v1/fleet/pull-messages", "10.0.0.9") == 200


@pytest.mark.parametrize("client", ["127.0.0.1", "127.5.5.5", "::1", "10.0.0.1"])
def test_from_this_machine_everything_is_reached(client: str) -> None:
    assert answer("/v1/control/start-run", client) == 200


def test_a_websocket_is_no_way_around() -> None:
    assert answer("/v1/control/x", "10.0.0.9", kind="websocket") == 403


def test_flower_takes_its_middleware_from_where_the_gate_is_put() -> None:
    from flwr.superlink import main

    assert main.extensions is extensions
    assert list(extensions.get_middleware()) == []


def test_the_supernode_waits_through_the_module_that_is_exchanged() -> None:
    source = Path(str(start_client_internal.__file__)).read_text()
    assert "\nimport time\n" in source
    assert source.count("time.sleep(") == source.count("sleep(") == 3


def test_nothing_is_reported_looked_up_or_installed(tmp_path: Path) -> None:
    environment = compat.environment(tmp_path, 0.001)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert float(environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]) >= 0.01  # less is refused


def test_a_nodes_key_is_read_as_flower_registers_it(tmp_path: Path) -> None:
    certificates.make(tmp_path, [], ["Bern"])
    assert b"PUBLIC KEY" in compat.key_bytes(tmp_path / "nodes" / "Bern.pub")
