"""The last block of a classifier that reads the first position alone: behind its attention it computes no other.

Keys and values of the last block need every position; the product behind the attention, both LayerNorms and the
feed-forward layers, three quarters of a block's products, are applied position by position, and of what they give at
all others nothing is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedpilot.errors import ModelError

_FAMILIES = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
"""Whose classifiers read position 0, and whose blocks have the module `_BEHIND_ATTENTION`."""

_BEHIND_ATTENTION = "attention.output"
"""Adds what the attention gives to what entered the block."""


class FirstPosition:
    """Narrows the last block of a model to the first position.

    Args:
        block: The model's last block; it computes all positions as long as another block is the last that runs.
        family: The configuration's ``model_type``.
        task: What the model does.

    Raises:
        ModelError: The head is not known to read the first position alone.
    """

    def __init__(self, block: Any, family: str, task: str) -> None:
        if family not in _FAMILIES or task != "sequence-classification":
            raise ModelError(
                "model.last_block = 'first-position' must go with sequence-classification and one of "
                f"{', '.join(_FAMILIES)}, got {task} and {family}; set model.last_block = 'whole'"
            )
        self._active = True
        block.get_submodule(_BEHIND_ATTENTION).register_forward_pre_hook(self._narrow)
        block.last_block = "first-position"  # for whoever compares blocks: it is unlike the others

    def _narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
        # of strided states a linear layer multiplies one example at a time, each by its own copy of the weight
        return tuple(states[:, :1].contiguous() for states in args) if self._active else None

    @contextmanager
    def off(self) -> Iterator[None]:
        """In the body the block computes all positions. Not for passes with a graph: blocks may be recomputed later."""
        self._active = False
        try:
            yield
        finally:
            self._active = True
