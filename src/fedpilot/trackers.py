"""Where a run's curves go besides its own files: TensorBoard, MLflow, Weights & Biases, each by its own library.

A tracker is a convenience: one that fails is said once and left out, and the run goes on. None reaches a network unless
its own environment variables say so: MLflow writes a store in the run directory unless ``MLFLOW_TRACKING_URI`` names
another, and Weights & Biases is offline unless ``WANDB_MODE`` says otherwise.
"""

import importlib.util
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast

from fedpilot.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")
TrackerName: TypeAlias = Literal["tensorboard", "mlflow", "wandb"]
Values: TypeAlias = Mapping[str, float]
Write: TypeAlias = Callable[[int, Values], None]
"""Round and the values of its curves -> nothing."""

LANDMARK = "bytes/down"
"""A curve that every round has, by which a resumed run finds how far it came."""
_PARAMETERS_AT_ONCE = 100  # of a batch, which MLflow's servers take


@dataclass(frozen=True)
class Place:
    """What a tracker is told of a run.

    Attributes:
        path: The run directory.
        run_id: Stays the same when the run is resumed.
        config: The resolved configuration, sections and keys.
        done: Last round that is on record; curves of rounds after it are written anew.
    """

    path: Path
    run_id: str
    config: Mapping[str, object]
    done: int


class Tracker(Protocol):
    """Takes the curves of one run."""

    def write(self, round: int, values: Values) -> None:
        """Adds a round."""

    def close(self, *, finished: bool) -> None:
        """Ends; ``finished`` is false where the run was stopped or failed."""


class TensorBoard:
    """Event files in the folder ``tensorboard``; those of rounds after the last on record are purged."""

    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(place.path / "tensorboard"), purge_step=place.done + 1 if place.done else 0)

    def write(self, round: int, values: Values) -> None:
        """Adds a round, on the disk when this returns."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        """Ends."""
        self._writer.close()


class MLflow:
    """A run of the experiment ``fedpilot``, by default in ``mlflow/mlflow.db`` of the run directory."""

    def __init__(self, place: Place) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._metric = Metric
        self._client = mlflow.MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or _store(place.path))
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedpilot"), place.path)
        tags = {"fedpilot.run": place.run_id}
        found = self._client.search_runs([experiment], f"tags.`fedpilot.run` = '{place.run_id}'")
        if found:
            self._run = str(found[0].info.run_id)
            self._client.update_run(self._run, status="RUNNING")
            self._last = max((int(m.step) for m in self._client.get_metric_history(self._run, LANDMARK)), default=-1)
        else:
            self._run = str(self._client.create_run(experiment, tags=tags, run_name=place.path.name).info.run_id)
            self._last = -1
            parameters = [Param(name, value) for name, value in flat(place.config).items()]
            for start in range(0, len(parameters), _PARAMETERS_AT_ONCE):
                self._client.log_batch(self._run, params=parameters[start : start + _PARAMETERS_AT_ONCE])

    def write(self, round: int, values: Values) -> None:
        """Adds a round; one that is done again after a stop is there already, with the same values."""
        if round <= self._last:
            return
        now = int(time.time() * 1000)
        metrics = [self._metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, round) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        """Ends."""
        self._client.set_terminated(self._run, status="FINISHED" if finished else "KILLED")

    def _experiment(self, name: str, path: Path) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        own = None if os.environ.get("MLFLOW_TRACKING_URI") else (path / "mlflow" / "artifacts").absolute().as_uri()
        return str(self._client.create_experiment(name, artifact_location=own))


def _store(path: Path) -> str:
    """A database of the run's own: many runs may write at once."""
    (path / "mlflow").mkdir(exist_ok=True)
    return f"sqlite:///{(path / 'mlflow' / 'mlflow.db').absolute()}"


class WeightsAndBiases:
    """A run of the project ``fedpilot`` in the folder ``wandb``, for ``wandb sync`` to send."""

    def __init__(self, place: Place) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")  # wandb itself refuses what it does not know
        quiet = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, save_code=False)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedpilot"),
            name=place.path.name,
            id=place.run_id,
            dir=str(place.path),
            mode=mode,
            resume="allow",
            reinit="create_new",
            config=flat(place.config),
            settings=quiet,
        )

    def write(self, round: int, values: Values) -> None:
        """Adds a round."""
        self._run.log(dict(values), step=round)

    def close(self, *, finished: bool) -> None:
        """Ends."""
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: Mapping[TrackerName, Callable[[Place], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
"""Name in a recipe -> what opens it."""


def check(names: Sequence[TrackerName]) -> None:
    """Refuses trackers whose library is not installed.

    Raises:
        ConfigError: As said, naming the extra that brings it.
    """
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        problem = "run.trackers must name installed trackers, got {0!r} without its library; "
        raise ConfigError([f"{problem}pip install 'fedpilot[{{0}}]'".format(name) for name in absent])


@contextmanager
def opened(names: Sequence[TrackerName], place: Place) -> Iterator[Write]:
    """The trackers, as one function that writes a round to all of them."""
    live: dict[TrackerName, Tracker] = {}
    for name in names:
        tracker = _tried(name, lambda name=name: TRACKERS[name](place))  # type: ignore[misc]
        if tracker is not None:
            live[name] = tracker

    def write(round: int, values: Values) -> None:
        for name, tracker in list(live.items()):
            if _tried(name, lambda tracker=tracker: _written(tracker, round, values)) is None:  # type: ignore[misc]
                del live[name]

    finished = False
    try:
        yield write
        finished = True
    finally:
        for name, tracker in live.items():
            _tried(name, lambda tracker=tracker: tracker.close(finished=finished))  # type: ignore[misc]


def _written(tracker: Tracker, round: int, values: Values) -> bool:
    tracker.write(round, values)
    return True


def _tried(name: TrackerName, action: Callable[[], T]) -> T | None:
    """What the action gives; ``None``, said once, where a tracker's library fails in whatever way."""
    try:
        with warnings.catch_warnings(action="ignore"):  # libraries warn of their own dependencies
            return action()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("tracker %s failed and gets nothing more of this run; the run goes on: %s", name, reason)
        logger.debug("tracker %s", name, exc_info=True)
        return None


def flat(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Values as text under ``section.key``.

    >>> flat({"run": {"seed": 3, "out": "runs"}, "clients": {"memory": [1, 2]}})
    {'run.seed': '3', 'run.out': 'runs', 'clients.memory': '[1, 2]'}
    """
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(cast(Mapping[str, object], value), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found
