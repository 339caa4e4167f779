"""One paper, one file; no algorithm knows another."""

from fedpilot.algorithms.fed_hello import FedHello
from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.algorithms.fedex_lora import FedExLoRA
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.fedra import FedRA
from fedpilot.algorithms.ffa_lora import FFALoRA
from fedpilot.algorithms.flexlora import FlexLoRA
from fedpilot.algorithms.flora import FLoRA
from fedpilot.algorithms.galore import GaLore
from fedpilot.algorithms.hetlora import HetLoRA
from fedpilot.algorithms.lora_fair import LoRAFair
from fedpilot.algorithms.xgblora import XGBLoRA

__all__ = [
    "ALGORITHMS",
    "FFALoRA",
    "FLoRA",
    "FedExLoRA",
    "FedHello",
    "FedIT",
    "FedPilot",
    "FedRA",
    "FlexLoRA",
    "GaLore",
    "HetLoRA",
    "LoRAFair",
    "XGBLoRA",
]

ALGORITHMS = {
    "fed-hello": FedHello,
    "fed-pilot": FedPilot,
    "fedex-lora": FedExLoRA,
    "fedit": FedIT,
    "fedra": FedRA,
    "ffa-lora": FFALoRA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "galore": GaLore,
    "hetlora": HetLoRA,
    "lora-fair": LoRAFair,
    "xgblora": XGBLoRA,
}
"""Name in a recipe -> class."""
