"""The same messages and the same app in Flower's simulation: nodes are turns of Ray's workers, here or on a cluster."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpilot import jobs
from fedpilot.comparison import Comparison
from fedpilot.engines.flower import client_app, compat
from fedpilot.engines.flower.running import Waiting
from fedpilot.engines.flower.running import run as run_over
from fedpilot.engines.flower.server_app import HOME
from fedpilot.engines.flower.timing import Timing
from fedpilot.errors import FedpilotError
from fedpilot.jobs import Job, Watch

logger = logging.getLogger(__name__)


_PASSED_ON = (*compat.QUIET, "FLWR_HOME", "FEDPILOT_CACHE", "OMP_NUM_THREADS", client_app.FOLDER)
"""Of the environment, what workers on another machine are to have."""


def run(job: Job, watch: Watch = jobs.unwatched, *, read_test: bool = True) -> Comparison | None:
    """Runs what is left of the job with one node for each client of the recipe.

    Ray has ``run.workers`` processes, each with a model of its own; on a cluster (``run.ray_address``) as many as there
    is room for.

    Args:
        job: The run.
        watch: Who watches.
        read_test: As in `jobs.run`.

    Returns:
        As `jobs.run`.

    Raises:
        FedpilotError: Ray is not installed, there is no cluster, or the run failed.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise FedpilotError(
            "Flower's simulation must have Ray, got none; pip install 'fedpilot[flower-simulation]'"
        ) from error
    from flwr.simulation import run_simulation

    ended: list[BaseException | Comparison | None] = []
    app, timing = ServerApp(), Timing(reconnect_s=0.0, poll_s=0.02)

    def main(grid: Grid, context: Context) -> None:
        try:
            ended.append(run_over(grid, job, Waiting(), timing, watch, read_test=read_test))
        except BaseException as error:  # Flower's thread would only log it
            ended.append(error)
            raise

    app.main()(main)
    settings = job.recipe.run
    workers = settings.workers if isinstance(settings.workers, int) else 1
    resources = {"num_cpus": 1, "num_gpus": 1.0 / workers if _on_gpu(job) else 0.0}
    backend: Any = {"client_resources": resources, "init_args": {"num_cpus": workers, "include_dashboard": False}}
    with _quiet((job.path / HOME).resolve()), _joined(settings.ray_address), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run_simulation(app, client_app.app, len(job.experiment.population.clients), backend_config=backend)
        except Exception:
            if not ended:
                raise
    if not ended:
        raise FedpilotError("Flower's simulation must run the server, got an end without it; see its messages above")
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    """In the body this process belongs to the Ray cluster, which Flower then takes instead of starting its own."""
    if address is None:
        yield
        return
    import ray

    _check_reachable(address)
    variables = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, runtime_env={"env_vars": variables}, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuses an address that nobody listens on, which Ray itself would try again for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> FedpilotError:
    return FedpilotError(
        f"run.ray_address must be that of a running Ray cluster, got {address!r}: {error}; start one with "
        "'ray start --head' on a machine and 'ray start --address=...' on the others"
    )


def _on_gpu(job: Job) -> bool:
    return job.experiment.adapted.device.type == "cuda"


@contextmanager
def _quiet(home: Path) -> Iterator[None]:
    """Where nodes remember, and nothing reported or looked up; the environment is as it was afterwards."""
    (home / "nodes").mkdir(parents=True, exist_ok=True)
    changes = {**compat.QUIET, "FLWR_HOME": str(home / "flwr"), client_app.FOLDER: str(home / "nodes")}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
