"""Models: `loading` gets one and finds its parts, `adapted` puts adapters into it."""

from fedpilot.model.adapted import AdaptedModel, build_model, check_tensors, cross_entropy, ranks_of
from fedpilot.model.loading import Device, ModelSettings, TaskType

__all__ = [
    "AdaptedModel",
    "Device",
    "ModelSettings",
    "TaskType",
    "build_model",
    "check_tensors",
    "cross_entropy",
    "ranks_of",
]
