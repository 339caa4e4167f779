"""Where the noise of privacy comes from: a seed that repeats, for a run on one machine, or a secret that one side has.

torch's generator is for repeating and not for secrets: on a CPU it takes 32 bits of its seed, which can be tried one by
one. A secret is a key of 32 bytes, and its numbers are those of ChaCha20's key stream.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from fedpilot.privacy import primitives

CHUNK = 2**15
"""Numbers that are drawn at a time, so that drawing takes next to no memory."""


class SecretNoise:
    """Random numbers that follow from a secret key alone: the same key gives the same ones.

    Args:
        key: 32 secret bytes, used for nothing else.

    Raises:
        PlanError: The package cryptography is not installed.
    """

    def __init__(self, key: bytes) -> None:
        self._stream = primitives.Stream(key)

    def uniform(self, count: int) -> torch.Tensor:
        """(count,) float64 in [0, 1), multiples of 2^-53."""
        words = np.frombuffer(self._stream.read(8 * count), dtype="<u8")
        return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    @torch.no_grad()
    def fill(self, tensor: torch.Tensor, deviation: float) -> torch.Tensor:
        """Makes each entry N(0, deviation²), by the method of Box and Muller; returns the tensor."""
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), CHUNK):
            count = min(CHUNK, flat.numel() - start)
            pairs = (count + 1) // 2
            radius = torch.sqrt(-2 * torch.log1p(-self.uniform(pairs)))
            angle = 2 * math.pi * self.uniform(pairs)
            drawn = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count]
            flat[start : start + count].copy_(drawn * deviation)
        return tensor


def seed_of(numbers: Sequence[int]) -> int:
    """A seed that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
