"""Robust rules by hand, and runs among ten clients of whom some attack."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fedpilot import tensors
from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.algorithms.fedex_lora import FedExLoRA
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.ffa_lora import FFALoRA
from fedpilot.algorithms.flora import FLoRA
from fedpilot.algorithms.hetlora import HetLoRA
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.robust import Robust, Rule, squared_distances
from fedpilot.rounds import run_rounds
from fedpilot.safeguards import Safeguards
from fedpilot.screening import Screening
from fedpilot.types import Algorithm, Tensors, Upload
from tests.hostile import CLIENTS, SPEC, Engine, Lie, balanced, scaled

RULES: tuple[Rule, ...] = ("trimmed-mean", "median", "multi-krum")


def uploads(*values: float, name: str = "x") -> list[Upload]:
    return [Upload(k, 1 + k, {name: torch.tensor([[v, -v, 0.0]])}, {"loss": v}) for k, v in enumerate(values)]


def value(found: list[Upload]) -> float:
    return float(found[0].tensors["x"][0, 0])


def test_the_trimmed_mean_drops_a_share_at_each_end() -> None:
    found = list(Robust("trimmed-mean", 0.2)(uploads(1.0, 2.0, 900.0, 4.0, -700.0)))
    assert value(found) == pytest.approx((1 + 2 + 4) / 3)


def test_the_median_is_the_middle_or_the_mean_of_two() -> None:
    assert value(list(Robust("median")(uploads(1.0, 900.0, 3.0, -5.0, 2.0)))) == 2.0
    assert value(list(Robust("median")(uploads(1.0, 900.0, 4.0, -5.0)))) == 2.5


def test_multi_krum_takes_the_mean_of_those_that_lie_together() -> None:
    found = list(Robust("multi-krum", 0.3)(uploads(1.0, 1.2, 50.0, 0.9, 1.1, 1.3, 51.0, 0.8)))
    assert value(found) == pytest.approx((1.0 + 1.2 + 0.9 + 1.1 + 1.3 + 0.8) / 6, rel=1e-5)


def test_multi_krum_counts_just_the_n_minus_f_minus_2_nearest() -> None:
    """With one neighbour more or less than two, 0 would be dropped in place of 19."""
    found = list(Robust("multi-krum", 0.2)(uploads(19.0, 0.0, 14.0, 8.0, 7.0)))
    assert value(found) == (0 + 14 + 8 + 7) / 4


def test_multi_krum_with_fewer_than_three_uploads_gives_none() -> None:
    assert list(Robust("multi-krum")(uploads(1.0, 2.0))) == []
    assert len(list(Robust("multi-krum")(uploads(1.0, 2.0, 3.0)))) == 3


@pytest.mark.parametrize("rule", RULES)
def test_every_upload_keeps_its_client_and_its_numbers(rule: Rule) -> None:
    sent = uploads(1.0, 2.0, 3.0, 4.0, 50.0, 6.0)
    found = list(Robust(rule, 0.2)(sent))
    assert [(u.client_id, u.num_examples, u.metrics) for u in found] == [
        (u.client_id, u.num_examples, u.metrics) for u in sent
    ]
    assert len({tensors.digest(u.tensors) for u in found}) == 1


def test_a_tensor_is_judged_among_its_holders() -> None:
    sent = [*uploads(1.0, 2.0, 3.0, 40.0, 5.0), *uploads(7.0, 7.0, 9.0, name="y")]
    found = list(Robust("median")(sent))
    assert value(found) == 3.0
    assert found[-1].tensors["y"][0, 0] == 7.0
    assert found[0].tensors.keys() == {"x"}


def test_distances_are_those_between_all_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    held = [{"a": torch.randn(2, 5, generator=generator), "b": torch.randn(3, generator=generator)} for _ in range(4)]
    found = squared_distances(held)
    for i in range(4):
        for j in range(4):
            expected = -1.0 if i == j else tensors.norm(tensors.subtract(held[i], held[j])) ** 2
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0])
def test_a_hostile_half_is_refused(share: float) -> None:
    with pytest.raises(PlanError, match=r"attackers must lie in \[0, 0.5\)"):
        Robust("median", share)


# --- in a run -----------------------------------------------------------------------------------------------------

Make = Any
METHODS: Mapping[str, Make] = {
    "fedit": lambda profile: FedIT(SPEC, profile, rank=2, weights="uniform"),
    "ffa-lora": lambda profile: FFALoRA(SPEC, profile, rank=2, weights="uniform"),
    "fed-pilot": lambda profile: FedPilot(
        SPEC, profile, rank=2, weights="uniform", aggregation="layerwise", solver="all"
    ),
}
CASES = [(m, r) for m in METHODS for r in RULES if (m, r) != ("fed-pilot", "multi-krum")]
ATTACKS: Mapping[str, Mapping[int, Lie]] = {
    "100 times": {6: scaled(100.0)},
    "sign flip": {2: scaled(-5.0), 6: scaled(-5.0)},
    "balanced": {6: balanced},
}


def final(algorithm: Algorithm[Any], rule: Robust, liars: Mapping[int, Lie], clients: Any = CLIENTS) -> Tensors:
    engine = Engine(algorithm, liars)
    *_, (state, _) = run_rounds(
        algorithm, engine, clients, lambda _: {}, num_rounds=1, seed=3, safeguards=Safeguards(robust=rule)
    )
    return algorithm.deploy(state).tensors


def honest_span(algorithm: Algorithm[Any], liars: Mapping[int, Lie]) -> tuple[Tensors, Tensors]:
    """Least and greatest honest value of every entry."""
    seen: list[Tensors] = []

    def note(upload: Upload) -> Upload:
        seen.append(upload.tensors)
        return upload

    class Noting(Engine):
        def exchange(self, round, tasks):  # type: ignore[no-untyped-def]
            return map(note, super().exchange(round, tasks))

    honest = [client for client in CLIENTS if client.client_id not in liars]
    for _ in run_rounds(algorithm, Noting(algorithm), honest, lambda _: {}, num_rounds=1, seed=3):
        pass
    return (
        {name: torch.stack([each[name] for each in seen]).amin(0) for name in seen[0]},
        {name: torch.stack([each[name] for each in seen]).amax(0) for name in seen[0]},
    )


def farthest(found: Tensors, low: Tensors, high: Tensors) -> float:
    """How far the entries lie outside the honest span, in units of its widest."""
    width = max(float((high[name] - low[name]).max()) for name in low)
    out = max(float(torch.maximum(low[name] - found[name], found[name] - high[name]).max()) for name in low)
    return max(out, 0.0) / width


@pytest.mark.parametrize(
    ("method", "rule", "attack"),
    [(m, r, a) for m, r in CASES for a in ATTACKS if (m, a) != ("ffa-lora", "balanced")],  # it has no A to balance with
)
def test_a_robust_rule_stays_within_the_honest_span_where_the_mean_does_not(
    method: str, rule: Rule, attack: str, profile: MemoryProfile
) -> None:
    algorithm, liars = METHODS[method](profile), ATTACKS[attack]
    low, high = honest_span(algorithm, liars)
    assert farthest(final(algorithm, Robust(rule, 0.2), liars), low, high) < 1e-5
    if attack != "sign flip":
        assert farthest(final(algorithm, Robust(), liars), low, high) > 1.0
    else:
        honest = final(algorithm, Robust(), {}, [c for c in CLIENTS if c.client_id not in liars])
        mean, robust = final(algorithm, Robust(), liars), final(algorithm, Robust(rule, 0.2), liars)
        far = [
            tensors.norm(tensors.subtract(tensors.select(a, low), tensors.select(honest, low))) for a in (mean, robust)
        ]
        assert far[0] > 2 * far[1]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_trimmed_is_the_mean_to_the_bit(method: str, profile: MemoryProfile) -> None:
    algorithm = METHODS[method](profile)
    plain, trimmed = final(algorithm, Robust(), {}), final(algorithm, Robust("trimmed-mean", 0.0), {})
    assert tensors.digest(plain) == tensors.digest(trimmed)


def test_among_equal_uploads_every_rule_gives_them_back(profile: MemoryProfile) -> None:
    algorithm, same = METHODS["fedit"](profile), uploads(*[2.5] * 6)
    for rule in RULES:
        assert value(list(Robust(rule, 0.2)(same))) == 2.5
    assert algorithm.averaging.uniform


REFUSED = {
    "weighs clients unlike": lambda profile: FedIT(SPEC, profile, rank=2),
    "does not average": lambda profile: FLoRA(SPEC, profile),
    "does not average what": lambda profile: FedExLoRA(SPEC, profile, rank=2),
    "unlike shapes": lambda profile: HetLoRA(SPEC, profile, weights="uniform"),
    "in unlike shapes": lambda profile: FFALoRA(SPEC, profile, participation="ranks", weights="uniform"),
    "average what clients send": lambda profile: FedPilot(SPEC, profile, weights="uniform"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_method_that_is_no_plain_mean_is_refused_before_the_run(reason: str, profile: MemoryProfile) -> None:
    algorithm = REFUSED[reason](profile)
    with pytest.raises(PlanError, match=f"{reason}.*take fedit, ffa-lora"):
        final(algorithm, Robust("median"), {})


def test_multi_krum_wants_the_same_tensors_of_all(profile: MemoryProfile) -> None:
    with pytest.raises(PlanError, match="whose clients send unlike tensors"):
        final(METHODS["fed-pilot"](profile), Robust("multi-krum"), {})


def test_screening_goes_before_a_rule(profile: MemoryProfile) -> None:
    algorithm = METHODS["fedit"](profile)
    guards = Safeguards(Screening(max_norm_factor=5.0), Robust("median"))
    engine = Engine(algorithm, {7: scaled(100.0)})
    [(_, record)] = run_rounds(algorithm, engine, CLIENTS, lambda _: {}, num_rounds=1, seed=3, safeguards=guards)
    assert [failure.client_id for failure in record.failures] == [7]
    assert record.aggregated
