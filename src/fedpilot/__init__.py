"""Federated LoRA fine-tuning across clients that differ in memory.

The public names are imported when they are first used, so that ``import fedpilot`` costs nothing.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpilot.algorithms import (
        ALGORITHMS,
        FedExLoRA,
        FedHello,
        FedIns,
        FedIT,
        FedPilot,
        FedRA,
        FFALoRA,
        FlexLoRA,
        FLoRA,
        GaLore,
        HetLoRA,
        LoRAFair,
        XGBLoRA,
    )
    from fedpilot.client import ClientModel
    from fedpilot.comparison import Comparison
    from fedpilot.config.recipe import Recipe, load_recipe
    from fedpilot.config.setup import Experiment, experiment
    from fedpilot.data import DataSettings, PartitionSettings
    from fedpilot.engines.in_process import InProcess
    from fedpilot.errors import FedpilotError
    from fedpilot.evaluation import evaluate
    from fedpilot.export import export_peft
    from fedpilot.jobs import Job, resume, run, start
    from fedpilot.memory import MemoryProfile, peak_bytes
    from fedpilot.model import AdaptedModel, ModelSettings, build_model
    from fedpilot.prediction import Prediction, Predictor, predict
    from fedpilot.record import RunDirectory
    from fedpilot.rounds import run_rounds
    from fedpilot.runs import train
    from fedpilot.training import TrainingSettings
    from fedpilot.types import (
        Algorithm,
        BaseDelta,
        ClientProfile,
        Deployment,
        LeftOut,
        ModelSpec,
        Plan,
        Site,
        Task,
        Upload,
    )

_HOMES = {
    "algorithms": (
        "ALGORITHMS",
        "FFALoRA",
        "FLoRA",
        "FedExLoRA",
        "FedHello",
        "FedIT",
        "FedIns",
        "FedPilot",
        "FedRA",
        "FlexLoRA",
        "GaLore",
        "HetLoRA",
        "LoRAFair",
        "XGBLoRA",
    ),
    "client": ("ClientModel",),
    "comparison": ("Comparison",),
    "config.recipe": ("Recipe", "load_recipe"),
    "config.setup": ("Experiment", "experiment"),
    "data": ("DataSettings", "PartitionSettings"),
    "engines.in_process": ("InProcess",),
    "errors": ("FedpilotError",),
    "evaluation": ("evaluate",),
    "export": ("export_peft",),
    "jobs": ("Job", "resume", "run", "start"),
    "memory": ("MemoryProfile", "peak_bytes"),
    "model": ("AdaptedModel", "ModelSettings", "build_model"),
    "prediction": ("Prediction", "Predictor", "predict"),
    "record": ("RunDirectory",),
    "rounds": ("run_rounds",),
    "runs": ("train",),
    "training": ("TrainingSettings",),
    "types": (
        "Algorithm",
        "BaseDelta",
        "ClientProfile",
        "Deployment",
        "LeftOut",
        "ModelSpec",
        "Plan",
        "Site",
        "Task",
        "Upload",
    ),
}
"""Module -> the public names that live there."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ALGORITHMS",
    "AdaptedModel",
    "Algorithm",
    "BaseDelta",
    "ClientModel",
    "ClientProfile",
    "Comparison",
    "DataSettings",
    "Deployment",
    "Experiment",
    "FFALoRA",
    "FLoRA",
    "FedExLoRA",
    "FedHello",
    "FedIT",
    "FedIns",
    "FedPilot",
    "FedRA",
    "FedpilotError",
    "FlexLoRA",
    "GaLore",
    "HetLoRA",
    "InProcess",
    "Job",
    "LeftOut",
    "LoRAFair",
    "MemoryProfile",
    "ModelSettings",
    "ModelSpec",
    "PartitionSettings",
    "Plan",
    "Prediction",
    "Predictor",
    "Recipe",
    "RunDirectory",
    "Site",
    "Task",
    "TrainingSettings",
    "Upload",
    "XGBLoRA",
    "__version__",
    "build_model",
    "evaluate",
    "experiment",
    "export_peft",
    "load_recipe",
    "peak_bytes",
    "predict",
    "resume",
    "run",
    "run_rounds",
    "start",
    "train",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("fedpilot")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fedpilot' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"fedpilot.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
