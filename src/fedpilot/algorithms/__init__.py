"""One paper, one file; no algorithm knows another."""

from fedpilot.algorithms.fed_hello import FedHello
from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.algorithms.fedaf import FedAF
from fedpilot.algorithms.fedbiot import FedBiOT
from fedpilot.algorithms.fedex_lora import FedExLoRA
from fedpilot.algorithms.fedins import FedIns
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.fedra import FedRA
from fedpilot.algorithms.ffa_lora import FFALoRA
from fedpilot.algorithms.flexlora import FlexLoRA
from fedpilot.algorithms.flora import FLoRA
from fedpilot.algorithms.galore import GaLore
from fedpilot.algorithms.hetlora import HetLoRA
from fedpilot.algorithms.lora_fair import LoRAFair
from fedpilot.algorithms.reclora import RecLoRA
from fedpilot.algorithms.xgblora import XGBLoRA

__all__ = [
    "ALGORITHMS",
    "FFALoRA",
    "FLoRA",
    "FedAF",
    "FedBiOT",
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
    "RecLoRA",
    "XGBLoRA",
]

ALGORITHMS = {
    "fed-hello": FedHello,
    "fed-pilot": FedPilot,
    "fedaf": FedAF,
    "fedbiot": FedBiOT,
    "fedex-lora": FedExLoRA,
    "fedins": FedIns,
    "fedit": FedIT,
    "fedra": FedRA,
    "ffa-lora": FFALoRA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "galore": GaLore,
    "hetlora": HetLoRA,
    "lora-fair": LoRAFair,
    "reclora": RecLoRA,
    "xgblora": XGBLoRA,
}
"""Name in a recipe -> class."""
