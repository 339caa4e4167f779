"""Differential privacy of examples and of whole clients, what it has cost, and secure aggregation."""

from fedpilot.privacy.accounting import Spent, epsilon, noise_for, plus, sample_rate
from fedpilot.privacy.budget import Budget, released
from fedpilot.privacy.client_dp import ClientDP, LocalNoise
from fedpilot.privacy.dp_sgd import NoisySum, draws, poisson_draws
from fedpilot.privacy.fixed_point import FixedPoint
from fedpilot.privacy.secure_aggregation import SecureSum

__all__ = [
    "Budget",
    "ClientDP",
    "FixedPoint",
    "LocalNoise",
    "NoisySum",
    "SecureSum",
    "Spent",
    "draws",
    "epsilon",
    "noise_for",
    "plus",
    "poisson_draws",
    "released",
    "sample_rate",
]
