"""Models: `loading` gets one and finds its parts, `adapted` puts adapters into it, `batched` several clients'."""

from fedpilot.model.adapted import AdaptedModel, build_model, check_tensors, cross_entropy, ranks_of
from fedpilot.model.batched import Stack, UnlikeError
from fedpilot.model.inside import ModelLens, item_shape, program_of
from fedpilot.model.loading import Device, ModelSettings, TaskType, faster_attention, precision
from fedpilot.model.quantised import Quantisation

__all__ = [
    "AdaptedModel",
    "Device",
    "ModelLens",
    "ModelSettings",
    "Quantisation",
    "Stack",
    "TaskType",
    "UnlikeError",
    "build_model",
    "check_tensors",
    "cross_entropy",
    "faster_attention",
    "item_shape",
    "precision",
    "program_of",
    "ranks_of",
]
