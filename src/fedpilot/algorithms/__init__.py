"""One paper, one file; no algorithm knows another."""

from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.hetlora import HetLoRA

__all__ = ["ALGORITHMS", "FedIT", "FedPilot", "HetLoRA"]

ALGORITHMS = {
    "fed-pilot": FedPilot,
    "fedit": FedIT,
    "hetlora": HetLoRA,
}
"""Name in a recipe -> class."""
