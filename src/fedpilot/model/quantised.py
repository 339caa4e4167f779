"""Frozen linear layers in 8 or 4 bits: stored small, made whole for each product, and forgotten again.

Both are the storage that bitsandbytes gives a model, so that an adapter trained here loads beside such a base there.

- ``int8``: LLM.int8 (Dettmers et al., 2022, arXiv 2208.07339). A row is whole multiples, up to 127, of a 127th of its
  largest magnitude. Weights alone: activations keep their precision, where bitsandbytes rounds them too.
- ``nf4``: QLoRA (Dettmers et al., 2023, arXiv 2305.14314), without its second quantisation of scales. 64 entries in a
  row share their largest magnitude, and each is one of 16 quantiles of a normal distribution.
"""

from typing import Any, Literal, TypeAlias, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedpilot import startup
from fedpilot.errors import ModelError

Quantisation: TypeAlias = Literal["int8", "nf4"]

_SHARED = 64
"""Entries of NF4 with one scale; what bitsandbytes and PEFT's users have by default."""

_PIECE = 2**20
"""Entries that are quantised at once: on the way there are a dozen bytes for each."""


class QuantisedLinear(nn.Linear):
    """A linear layer whose frozen weight is stored in few bits.

    It is an `nn.Linear` to whoever looks for one, with ``in_features`` and ``out_features``; ``weight`` is what is
    stored.

    Attributes:
        kind: How.
        weight: (out, in) int8; or (⌈out · in / 2⌉, 1) uint8, two entries a byte.
        scales: (out,) or (⌈out · in / 64⌉,) float32, largest magnitudes.
        change: (out, in) float32, what a base delta adds; it stands beside the weight, which would round it away.
    """

    scales: torch.Tensor
    change: torch.Tensor | None

    def __init__(self, linear: nn.Linear, kind: Quantisation, device: str | torch.device | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.kind = kind
        stored, scales = _stored(linear.weight.detach().to(device), kind)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("change", None, persistent=False)
        self.bias = linear.bias

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in) the weight that the stored numbers stand for, and its change."""
        if self.kind == "int8":
            weight = self.weight.to(dtype).mul_(self.scales.unsqueeze(1) / 127)
        else:
            shape = [self.out_features, self.in_features]
            if _has_numbers(self.weight):
                weight = _kernels().dequantize_4bit(self.weight, self.scales, _SHARED, "nf4", shape, dtype)
            else:  # a trace needs its storage alone, and so no bitsandbytes
                weight = torch.empty(shape, dtype=dtype, device=self.weight.device)
        return weight if self.change is None else weight.add_(self.change)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., out) of (..., in)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return cast(torch.Tensor, _Product.apply(x, self))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """For people who print a model."""
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """``x W^T + b`` that keeps nothing for its backward pass, in which the weight is made whole once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.whole(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.whole(gradient.dtype), None


def quantise(blocks: nn.ModuleList, kind: Quantisation, device: str | torch.device | None = None) -> None:
    """Replaces all linear layers of the blocks; one after the other, so that few weights stand twice.

    Args:
        blocks: The model's.
        kind: How.
        device: Where each weight goes before it is quantised; ``None`` leaves it where it is.

    Raises:
        ModelError: bitsandbytes is not there, or a layer is of another kind.
    """
    names = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for name in names:  # not the modules: each is to go before the next is read
        module = blocks.get_submodule(name)
        if isinstance(module, Conv1D):
            raise ModelError(
                f"model.quantisation = {kind!r} must go with linear layers, got {name}, a Conv1D as GPT-2 has; "
                "set model.quantisation = 'none'"
            )
        blocks.set_submodule(name, QuantisedLinear(cast(nn.Linear, module), kind, device))


def _stored(weight: torch.Tensor, kind: Quantisation) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored of a weight, and its scales; without numbers where the weight has none."""
    if not _has_numbers(weight):
        entries, rows = weight.numel(), weight.shape[0]
        sizes = (tuple(weight.shape), rows) if kind == "int8" else ((-(-entries // 2), 1), -(-entries // _SHARED))
        dtype = torch.int8 if kind == "int8" else torch.uint8
        return torch.empty(sizes[0], dtype=dtype, device="meta"), torch.empty(sizes[1], device="meta")
    if kind == "nf4":
        pieces = torch.split(weight.reshape(-1), _PIECE)
        made = [_kernels().quantize_4bit(piece.float(), _SHARED, "nf4", torch.uint8) for piece in pieces]
    else:
        made = [_eight_bits(rows.float()) for rows in torch.split(weight, max(1, _PIECE // weight.shape[1]))]
    return torch.cat([stored for stored, _ in made]), torch.cat([scales for _, scales in made])


def _eight_bits(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = rows.abs().amax(dim=1)
    per_step = 127 / scales.clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros has no scale to divide by
    return (rows * per_step.unsqueeze(1)).round().to(torch.int8), scales


def _has_numbers(tensor: torch.Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _kernels() -> Any:
    """bitsandbytes' operators, on a CPU as on a GPU."""
    startup.unhidden()
    try:
        import bitsandbytes  # noqa: F401  an extra; it registers them
    except ImportError as error:
        raise ModelError(
            "model.quantisation = 'nf4' needs bitsandbytes, which is not installed; "
            "install it with pip install 'fedpilot[quant]', or set model.quantisation = 'int8'"
        ) from error
    return torch.ops.bitsandbytes
