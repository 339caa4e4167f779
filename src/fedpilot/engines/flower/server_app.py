"""What Flower runs on the server: a recipe in its run directory, from its start or from where it stopped."""

import json
import logging
import traceback
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpilot import checkpoint, jobs
from fedpilot.config.recipe import load_recipe
from fedpilot.engines.flower.running import Waiting, run
from fedpilot.engines.flower.timing import Timing
from fedpilot.errors import FedpilotError
from fedpilot.jobs import Job
from fedpilot.stopping import Halted

HOME, RECIPE, OUTCOME, STOP = ".flower", "recipe.toml", "outcome.json", "stop"

logger = logging.getLogger(__name__)

app = ServerApp()


def main(grid: Grid, context: Context) -> None:
    """Runs the recipe that the configuration names; how it ended is in ``.flower/outcome.json``."""
    path = Path(str(context.run_config["run-dir"]))
    settings = json.loads((path / HOME / "settings.json").read_bytes())
    outcome: dict[str, object] = {"error": "the server's process ended", "problems": []}
    try:
        job = replace(begin(path), halt=(path / HOME / STOP).exists)
        _log_to(path)
        keys = {int(node_id): name for name, node_id in settings["keys"].items()}
        waiting, timing = Waiting(settings["nodes"], settings["wait_s"]), Timing(**settings["timing"])
        run(grid, job, waiting, timing, keys=keys, noted=True, noise_folder=path / HOME)
        outcome = {}
    except Halted:
        outcome = {"halted": True}
        logger.info("the run ended after a round, as it was asked to")
    except FedpilotError as error:
        outcome = {"error": str(error), "problems": list(getattr(error, "problems", ()))}
        logger.error("the run ended: %s", error)
        raise
    except BaseException as error:
        outcome = {"error": "".join(traceback.format_exception_only(error)).strip(), "problems": []}
        logger.exception("the run ended with an error")
        raise
    finally:
        checkpoint.write_file(path / HOME / OUTCOME, json.dumps(outcome).encode())


app.main()(main)


def begin(path: Path) -> Job:
    """The run in the directory, or a new one of the recipe that lies in its hidden folder."""
    traces = path / HOME / "traces"
    if (path / "manifest.json").exists():
        return jobs.resume(path, traces=traces)
    return jobs.start(load_recipe(path / HOME / RECIPE), path, traces=traces)


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path / jobs.LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("fedpilot").setLevel(logging.INFO)
    logging.getLogger("fedpilot").addHandler(handler)
