"""What DP-SGD has cost a client in privacy: (epsilon, delta) by Opacus' accountant of Rényi differential privacy.

Two data sets are neighbours where one has one example more. Of Opacus' accountants this one is an upper bound with no
grid and no numerical error to bound in its turn, and it is linear in the steps: a client's curve is computed once, and
each round of each client after that is one vector operation. The PRV accountant is tighter (about a tenth at
epsilon 6), but convolves anew for every client and round.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
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

WHOLE_ORDERS = tuple(order for order in ORDERS if order.is_integer())
"""Their divergence is a finite sum, which costs a tenth of the series of an order between two of them."""

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
    return _least(spent, delta, ORDERS)[0]


@lru_cache(maxsize=4096)
def noise_for(target: float, delta: float, rate: float, steps: int) -> float:
    """The least σ, to a thousandth, with which so many steps at sample rate ``rate`` cost at most ``target``.

    By whole orders first, which bound it from above, then by those beside the best of them: no subset of the orders
    says less than all of them do, so the target is kept in any case, and σ is the least where the best order is there.

    Raises:
        PlanError: No noise suffices, or Opacus is not installed.
    """
    if not steps:
        return 0.0

    def within(orders: tuple[float, ...], noise: float) -> bool:
        return _least(Spent(rate, noise, steps), delta, orders)[0] <= target

    low, high = 0.0, 1.0
    while not within(WHOLE_ORDERS, high):
        low, high = high, 2 * high
        if high > MAX_NOISE:
            raise PlanError(
                f"epsilon must be within reach of {steps} steps at delta {delta:g}, got {target:g}; "
                "raise epsilon or run fewer rounds"
            )
    high = _last_within(low, high, partial(within, WHOLE_ORDERS))
    best = _least(Spent(rate, high, steps), delta, WHOLE_ORDERS)[1]
    beside = tuple(order for order in ORDERS if abs(order - best) <= 1)
    share = _TOLERANCE
    while within(beside, low := high * (1 - share)):
        high, share = low, min(2 * share, 0.5)
    return _last_within(low, high, partial(within, beside))


def _last_within(low: float, high: float, within: Callable[[float], bool]) -> float:
    """Bisects until what is within is known to a thousandth; ``high`` is, ``low`` is not."""
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def _least(spent: Spent, delta: float, orders: tuple[float, ...]) -> tuple[float, float]:
    """The least epsilon that one of the orders bounds, and that order."""
    if not spent.steps:
        return 0.0, orders[0]
    if not spent.noise_multiplier:
        return math.inf, orders[0]
    rdp = spent.steps * _one_step(spent.sample_rate, spent.noise_multiplier, orders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the first or the last: the bound holds all the same
        found, best = _analysis().get_privacy_spent(orders=orders, rdp=rdp, delta=delta)
    return max(float(found), 0.0), float(best)


@lru_cache(maxsize=4096)
def _one_step(rate: float, noise_multiplier: float, orders: tuple[float, ...]) -> NDArray[np.float64]:
    """(orders,) Rényi divergence of one step."""
    curve = _analysis().compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=orders)
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
