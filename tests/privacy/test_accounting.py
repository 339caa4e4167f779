"""The accountant against an independent one, and the noise that it asks for."""

import math
import sys

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedpilot import privacy
from fedpilot.errors import ModelError, PlanError
from fedpilot.privacy import Budget, Spent
from fedpilot.types import ClientProfile, LeftOut

CASES = [Spent(0.05, 1.1, 400), Spent(0.8, 3.0, 40), Spent(1.0, 5.0, 20), Spent(0.2, 0.9, 7)]


def independent(accountant: RdpAccountant | PLDAccountant, spent: Spent, delta: float) -> float:
    step = dp_accounting.PoissonSampledDpEvent(spent.sample_rate, dp_accounting.GaussianDpEvent(spent.noise_multiplier))
    accountant.compose(step, spent.steps)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("spent", CASES)
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_epsilon_is_that_of_an_independent_accountant(spent: Spent, delta: float) -> None:
    assert privacy.epsilon(spent, delta) == pytest.approx(independent(RdpAccountant(), spent, delta), rel=0.01)


@pytest.mark.parametrize("spent", CASES)
def test_epsilon_is_never_below_the_tight_value(spent: Spent) -> None:
    tight = independent(PLDAccountant(), spent, 1e-5)
    assert tight <= privacy.epsilon(spent, 1e-5) <= 1.25 * tight


def test_epsilon_grows_with_steps_and_sample_rate_and_falls_with_noise() -> None:
    base = privacy.epsilon(Spent(0.1, 1.0, 10), 1e-5)
    assert privacy.epsilon(Spent(0.1, 1.0, 11), 1e-5) > base
    assert privacy.epsilon(Spent(0.2, 1.0, 10), 1e-5) > base
    assert privacy.epsilon(Spent(0.1, 1.1, 10), 1e-5) < base


def test_no_step_costs_nothing_and_a_step_without_noise_costs_everything() -> None:
    assert privacy.epsilon(Spent(0.1, 1.0, 0), 1e-5) == 0.0
    assert privacy.epsilon(Spent(0.1, 0.0, 1), 1e-5) == math.inf


def test_unlike_steps_together_are_charged_at_the_dearer_rate_and_noise() -> None:
    first, second = Spent(0.1, 2.0, 5), Spent(0.3, 1.0, 4)
    both = privacy.plus(first, second)
    assert both == Spent(0.3, 1.0, 9)
    assert privacy.plus(None, first) == first
    assert privacy.epsilon(both, 1e-5) > max(privacy.epsilon(spent, 1e-5) for spent in (first, second))


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(3.0, 0.05, 400), (8.0, 1.0, 60), (0.5, 0.3, 20), (60.0, 0.3, 50), (300.0, 1.0, 20)]
)
def test_the_noise_for_a_target_reaches_it_and_hardly_overshoots(target: float, rate: float, steps: int) -> None:
    noise = privacy.noise_for(target, 1e-5, rate, steps)
    assert 0.99 * target < privacy.epsilon(Spent(rate, noise, steps), 1e-5) <= target
    assert privacy.epsilon(Spent(rate, 0.997 * noise, steps), 1e-5) > target


def test_no_steps_need_no_noise() -> None:
    assert privacy.noise_for(1.0, 1e-5, 0.1, 0) == 0.0


def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(PlanError, match="epsilon must be within reach of 50 steps"):
        privacy.noise_for(1e-9, 1e-12, 1.0, 50)


def test_a_target_gives_each_client_its_own_noise_for_all_rounds() -> None:
    budget = Budget(noise_multiplier=None, target=2.0, delta=1e-4, clip=0.7, num_rounds=5)
    few, many = ClientProfile(0, 20, 1, num_steps=3), ClientProfile(1, 400, 1, num_steps=50)
    for client in (few, many):
        own = budget.of_client(client, batch_size=8)
        assert own is not None
        assert own.clip == 0.7
        spent = Spent(8 / client.num_examples, own.noise_multiplier, 5 * client.num_steps)
        assert 1.98 < privacy.epsilon(spent, 1e-4) <= 2.0


def test_a_client_whose_target_is_spent_is_left_out_and_not_before() -> None:
    budget = Budget(noise_multiplier=None, target=2.0, delta=1e-4, clip=1.0, num_rounds=5)
    client = ClientProfile(3, 20, 1, num_steps=3)
    own = budget.of_client(client, batch_size=8)
    assert own is not None
    after_four = Spent(0.4, own.noise_multiplier, 12)
    assert budget.refusal(client, None, 8) is None
    assert budget.refusal(client, after_four, 8) is None
    refusal = budget.refusal(client, Spent(0.4, own.noise_multiplier, 15), 8)
    assert isinstance(refusal, LeftOut)
    assert refusal.client_id == 3
    assert "has spent epsilon" in refusal.reason


def test_a_delta_that_would_allow_publishing_an_example_is_refused() -> None:
    budget = Budget(noise_multiplier=1.0, target=None, delta=0.01, clip=1.0, num_rounds=None)
    assert budget.refusal(ClientProfile(0, 99, 1), None, 8) is None
    with pytest.raises(PlanError, match="delta must be below 1 / 100"):
        budget.refusal(ClientProfile(0, 100, 1), None, 8)


def test_without_opacus_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    with pytest.raises(PlanError, match=r"pip install 'fedpilot\[dp\]'"):
        privacy.epsilon(Spent(0.123, 1.234, 5), 1e-5)
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    import torch

    from fedpilot.types import ExampleDP

    layer = torch.nn.Linear(3, 2)
    with pytest.raises(ModelError, match=r"pip install 'fedpilot\[dp\]'"):
        privacy.NoisySum(layer, dict(layer.named_parameters()), ExampleDP(1.0, 1.0), expected_examples=4.0)
