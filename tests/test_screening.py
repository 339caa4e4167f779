"""Norms against dense matrices, and runs with clients that send too much."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fedpilot import base_deltas, lora, tensors
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.ffa_lora import FFALoRA
from fedpilot.errors import UploadError
from fedpilot.manifest import manifest
from fedpilot.memory import MemoryProfile
from fedpilot.record import RunDirectory
from fedpilot.rounds import RoundRecord, run_rounds
from fedpilot.runs import train
from fedpilot.safeguards import Safeguards
from fedpilot.screening import WINDOW, Norms, Screen, Screening, change, median, recalled, shortened
from fedpilot.types import Tensors, Upload
from tests import toy
from tests.hostile import CLIENTS, SPEC, Engine, Lie, balanced, scaled

MODULES = tuple(SPEC.modules)


def dense_norm(sent: Tensors, trained: Tensors, scale: float) -> float:
    """Over (out, in) matrices in float64; tensors that were not trained are as sent, slots that are gone left out."""
    square = 0.0
    for module in MODULES:
        a, b = lora.a_name(module), lora.b_name(module)
        if a not in trained and b not in trained:
            continue
        rank = trained[a].shape[0] if a in trained else trained[b].shape[1]
        old_a, old_b = sent[a][:rank].double(), sent[b][:, :rank].double()
        new_a, new_b = trained.get(a, old_a).double(), trained.get(b, old_b).double()
        square += float((scale * (new_b @ new_a - old_b @ old_a)).square().sum())
    for name in SPEC.head:
        if name in trained:
            square += float((trained[name].double() - sent[name].double()).square().sum())
    return math.sqrt(square)


@pytest.mark.parametrize(
    "kept",
    [("lora_A", "lora_B", "weight", "bias"), ("lora_B", "bias"), ("lora_A",), ("weight",)],
    ids=["all", "B and bias", "A", "head"],
)
def test_the_effective_norm_is_that_of_the_dense_change(kept: tuple[str, ...]) -> None:
    sent, trained = toy.random_adapter(SPEC, 3, 1), toy.random_adapter(SPEC, 3, 2)
    part = {name: tensor for name, tensor in trained.items() if name.rpartition(".")[2] in kept}
    found = change(Upload(0, 1, part), sent, 2.0).norms()
    assert found.effective == pytest.approx(dense_norm(sent, part, 2.0), rel=1e-9)
    steps = {name: part[name].double() - sent[name].double() for name in part}
    assert found.entries == pytest.approx(tensors.norm(steps), rel=1e-9)


def test_a_pair_that_was_pruned_is_held_against_the_same_slots() -> None:
    sent = toy.random_adapter(SPEC, 3, 1)
    trained = lora.truncate(toy.random_adapter(SPEC, 3, 2), dict.fromkeys(MODULES, 2))
    found = change(Upload(0, 1, trained), sent, 2.0).norms()
    assert found.effective == pytest.approx(dense_norm(sent, trained, 2.0), rel=1e-9)


def test_changes_of_base_weights_count_by_their_product() -> None:
    b, a = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)), torch.ones(2, 6)
    whole, other = b @ a, torch.full((5, 6), 0.5)
    factors = {base_deltas.a_name("m"): a, base_deltas.b_name("m"): b, "n.weight": other}
    expected = math.sqrt(float(whole.double().square().sum() + other.square().sum()))
    assert change(Upload(0, 1, factors), {}, 2.0).norms().effective == pytest.approx(expected, rel=1e-6)
    assert change(Upload(0, 1, {"m.weight": whole, "n.weight": other}), {}, 2.0).norms().entries == pytest.approx(
        expected, rel=1e-6
    )
    halved = shortened(Upload(0, 1, factors), {}, 0.5).tensors
    torch.testing.assert_close(halved["m.base_B"] @ halved["m.base_A"], whole / 2)
    torch.testing.assert_close(halved["n.weight"], other / 2)


@pytest.mark.parametrize("limit", [Norms(3.0, 100.0), Norms(1000.0, 0.7), Norms(0.2, 0.3)])
def test_a_shortened_update_reaches_the_limit_and_does_not_pass_it(limit: Norms) -> None:
    sent, upload = toy.random_adapter(SPEC, 3, 1), Upload(0, 1, toy.random_adapter(SPEC, 3, 2))
    share = change(upload, sent, 2.0).share_within(limit)
    found = change(shortened(upload, sent, share), sent, 2.0).norms()
    assert found.effective <= limit.effective * (1 + 1e-5)
    assert found.entries <= limit.entries * (1 + 1e-5)
    assert max(found.effective / limit.effective, found.entries / limit.entries) > 0.999


def test_a_balanced_pair_changes_no_weight_and_is_refused_all_the_same() -> None:
    sent = toy.random_adapter(SPEC, 3, 1)
    screen = Screen(Screening(max_norm_factor=10.0), (Norms(1.0, 1.0),) * 5, 2.0)
    upload = Upload(0, 1, {n: t * (1000.0 if n.endswith("lora_A") else 0.001) for n, t in sent.items() if "lora" in n})
    assert change(upload, sent, 2.0).norms().effective < 0.01
    with pytest.raises(UploadError, match="norm of the change of all tensors must be at most 10 times the median"):
        screen.passed(upload, sent)
    assert screen.known[-1].entries > 1000


def test_with_few_norms_known_nothing_is_refused_or_cut() -> None:
    sent, upload = toy.random_adapter(SPEC, 3, 1), Upload(0, 1, toy.random_adapter(SPEC, 3, 2))
    four = (Norms(1e-9, 1e-9),) * 4
    assert Screen(Screening(2.0, "median"), four, 2.0).passed(upload, sent) is upload
    with pytest.raises(UploadError):
        Screen(Screening(2.0, "median"), (*four, Norms(1e-9, 1e-9)), 2.0).passed(upload, sent)


def test_a_bounded_number_of_norms_is_known() -> None:
    lines = [{"norms": {str(k): {"effective": float(t), "entries": float(k)} for k in range(100)}} for t in range(9)]
    found = recalled(lines)
    assert len(found) == WINDOW
    assert found[-1] == Norms(8.0, 99.0)
    assert found[0] == Norms(6.0, 44.0)
    assert len(Screen(Screening(2.0), found, 1.0).known) == WINDOW


def test_a_shift_that_most_share_is_refused_only_at_first() -> None:
    sent = {"head.bias": torch.zeros(3)}
    screen, refused = Screen(Screening(3.0), (Norms(1.0, 1.0),) * 8, 1.0), []
    for k in range(20):
        try:
            screen.passed(Upload(k, 1, {"head.bias": torch.full((3,), 50.0)}), sent)
        except UploadError:
            refused.append(k)
    assert refused == list(range(8))  # then half of those known are large, and the middle of both is the median


# --- in a run -----------------------------------------------------------------------------------------------------


def run(
    profile: MemoryProfile, screening: Screening, liars: Mapping[int, Lie], num_rounds: int = 3
) -> list[tuple[Tensors, RoundRecord]]:
    algorithm = FedIT(SPEC, profile, rank=2)
    rounds = run_rounds(
        algorithm,
        Engine(algorithm, liars),
        CLIENTS,
        lambda _: {},
        num_rounds=num_rounds,
        seed=3,
        safeguards=Safeguards(screening),
    )
    return [(state.adapter, record) for state, record in rounds]


def test_an_update_a_hundred_times_too_large_is_refused_and_the_round_goes_on(profile: MemoryProfile) -> None:
    for _, record in run(profile, Screening(max_norm_factor=5.0), {7: scaled(100.0)}):
        [failure] = record.failures
        assert failure.client_id == 7
        assert "must be at most 5 times the median of the cohort's" in failure.reason
        assert len(record.uploads) == 9
        assert list(record.norms) == list(range(10))


def test_a_balanced_attacker_is_refused_in_a_run(profile: MemoryProfile) -> None:
    records = [record for _, record in run(profile, Screening(max_norm_factor=5.0), {8: balanced})]
    assert [[failure.client_id for failure in record.failures] for record in records] == [[8]] * 3


def test_honest_clients_pass_a_factor_of_ten(profile: MemoryProfile) -> None:
    for _, record in run(profile, Screening(max_norm_factor=10.0), {}):
        assert not record.failures


def test_without_screening_nothing_is_measured_and_no_bit_differs(profile: MemoryProfile) -> None:
    plain, watched = run(profile, Screening(), {}), run(profile, Screening(max_norm_factor=1e9), {})
    assert not plain[-1][1].norms
    assert tensors.digest(plain[-1][0]) == tensors.digest(watched[-1][0])


def test_clipping_brings_an_attacker_down_to_the_median_of_earlier_rounds(profile: MemoryProfile) -> None:
    algorithm = FFALoRA(SPEC, profile, rank=2)
    cut: list[float] = []

    class Watched(FFALoRA):
        def aggregate(self, state, uploads):  # type: ignore[no-untyped-def]
            kept = list(uploads)
            cut.extend(change(u, state.adapter, SPEC.scale).norms().entries for u in kept if u.client_id == 4)
            return super().aggregate(state, kept)

    watched = Watched(**{name: getattr(algorithm, name) for name in algorithm.__dataclass_fields__})
    guards = Safeguards(Screening(clip="median"))
    engine = Engine(watched, {4: scaled(100.0)})
    records = [
        record
        for _, record in run_rounds(watched, engine, CLIENTS, lambda _: {}, num_rounds=2, seed=3, safeguards=guards)
    ]
    usual = median(records[0].norms.values())
    assert cut[0] == pytest.approx(records[0].norms[4].entries, rel=1e-5)  # nothing known yet
    assert cut[1] <= usual.entries * (1 + 1e-5)
    assert records[1].norms[4].entries > 10 * usual.entries


def test_a_resumed_run_judges_to_the_bit_as_if_it_had_never_stopped(profile: MemoryProfile, tmp_path: Path) -> None:
    algorithm = FedIT(SPEC, profile, rank=2)
    guards = Safeguards(Screening(max_norm_factor=2.0, clip="median"))
    facts = manifest({}, seed=5, dtype="float32")

    def go(path: Path, num_rounds: int) -> None:
        directory = RunDirectory.open(path) if path.exists() else RunDirectory.create(path, facts)
        engine = Engine(algorithm, {1: scaled(100.0), 9: scaled(1.5)})
        train(
            *(algorithm, engine, CLIENTS, lambda _: {}, directory),
            num_rounds=num_rounds,
            cohort_size=4,
            safeguards=guards,
        )

    go(tmp_path / "whole", 6)
    for stop in (1, 3, 4, 6):
        go(tmp_path / "stopped", stop)
    lines = {}
    for name in ("whole", "stopped"):
        directory = RunDirectory.open(tmp_path / name)
        lines[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in directory.lines()]
        for line in lines[name]:
            for upload in line["uploads"]:  # type: ignore[attr-defined]
                upload["metrics"].pop("seconds", None)
    assert lines["whole"] == lines["stopped"]
    assert any(line["failures"] for line in lines["whole"])
    digests = {
        name: tensors.digest(RunDirectory.open(tmp_path / name).load_adapter("last")[0].tensors) for name in lines
    }
    assert digests["whole"] == digests["stopped"]


def test_recorded_norms_read_back_to_the_bit() -> None:
    measured = {3: Norms(1 / 3, math.pi), 1: Norms(2e-17, 1e30)}
    line = json.loads(json.dumps(asdict(RoundRecord(1, norms=measured))))
    assert recalled([{"round": 0}, line]) == (*measured.values(),)
