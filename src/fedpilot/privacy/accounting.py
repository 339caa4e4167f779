"""What DP-SGD has cost a client in privacy: (epsilon, delta) by Opacus' accountant of Rényi differential privacy.

Two data sets are neighbours where one has one example more. Of Opacus' accountants this one is an upper bound with no
grid and no numerical error to bound in its turn, and it is linear in the steps: a client's curve is computed once, and
each round of each client after that is one vector operation. The PRV accountant is tighter (about a tenth at
epsilon 6), but convolves anew for every client and round.
"""

import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from fedpilot.errors import PlanError

ORDERS: tuple[float, ...] = (
    *(1 + x / 10 for x in range(1, 100)),
    *(float(x) for x in range(11, 64)),
    *(64.0, 80.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0),
)
"""Rényi orders that the bound is minimised over: Opacus' own and larger ones, for little privacy spent."""

MAX_NOISE = 1e6
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Spent:
    """Steps of DP-SGD whose results a client has released.

    Attributes:
        sample_rate: q, probability with which each example is in a step's batch.
        noise_multiplier: σ, standard deviation of the noise in units of the clipping norm.
        steps: Optimiser steps.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int


def sample_rate(num_examples: int, batch_size: int) -> float:
    """q = batch / n, at most 1.

    >>> sample_rate(40, 16), sample_rate(10, 16)
    (0.4, 1.0)
    """
    return min(1.0, batch_size / num_examples)


def plus(before: Spent | None, now: Spent) -> Spent:
    """Both together; where rate or noise differ, all steps count at the rate and noise that cost more.

    >>> plus(Spent(0.1, 1.0, 5), Spent(0.2, 1.0, 3))
    Spent(sample_rate=0.2, noise_multiplier=1.0, steps=8)
    """
    if before is None:
        return now
    rate = max(before.sample_rate, now.sample_rate)
    return Spent(rate, min(before.noise_multiplier, now.noise_multiplier), before.steps + now.steps)


def epsilon(spent: Spent, delta: float) -> float:
    """The least epsilon for which the steps are (epsilon, delta)-private by the bound; infinite without noise.

    Raises:
        PlanError: Opacus is not installed.
    """
    if not spent.steps:
        return 0.0
    if not spent.noise_multiplier:
        return math.inf
    rdp = spent.steps * _one_step(spent.sample_rate, spent.noise_multiplier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the first or the last: the bound holds all the same
        found, _ = _analysis().get_privacy_spent(orders=ORDERS, rdp=rdp, delta=delta)
    return max(float(found), 0.0)


@lru_cache(maxsize=4096)
def noise_for(target: float, delta: float, rate: float, steps: int) -> float:
    """The least σ, to a thousandth, with which so many steps at sample rate ``rate`` cost at most ``target``.

    Raises:
        PlanError: No noise suffices, or Opacus is not installed.
    """
    spent = Spent(rate, 1.0, steps)
    low, high = 0.0, 1.0
    while epsilon(replace(spent, noise_multiplier=high), delta) > target:
        low, high = high, 2 * high
        if high > MAX_NOISE:
            raise PlanError(
                f"epsilon must be within reach of {steps} steps at delta {delta:g}, got {target:g}; "
                "raise epsilon or run fewer rounds"
            )
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        within = epsilon(replace(spent, noise_multiplier=middle), delta) <= target
        low, high = (low, middle) if within else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _one_step(rate: float, noise_multiplier: float) -> NDArray[np.float64]:
    """(orders,) Rényi divergence of one step."""
    curve = _analysis().compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS)
    return np.asarray(curve, dtype=np.float64)


def _analysis() -> ModuleType:
    try:
        from opacus.accountants.analysis import rdp
    except ImportError as error:
        raise PlanError(
            f"differential privacy needs the package opacus, got {error}; pip install 'fedpilot[dp]'"
        ) from error
    module: ModuleType = rdp
    return module
