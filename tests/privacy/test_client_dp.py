"""Privacy of clients: sensitivity, noise, the accountant, the end of a budget."""

import math
from dataclasses import replace
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from tests import toy
from tests.hostile import CLIENTS, SPEC, Engine, even_reclora, fedbiot, fedins, scaled

from fedpilot import lora, memory, planning, tensors
from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.ffa_lora import FFALoRA
from fedpilot.algorithms.flora import FLoRA
from fedpilot.algorithms.hetlora import HetLoRA
from fedpilot.engines.in_process import InProcess
from fedpilot.errors import PlanError
from fedpilot.manifest import manifest
from fedpilot.memory import MemoryProfile
from fedpilot.privacy.client_dp import ClientDP, LocalNoise, clipped_change, noisy_mean, trained_by
from fedpilot.record import RunDirectory
from fedpilot.robust import Robust
from fedpilot.rounds import RoundRecord, Unwatched, run_round, run_rounds
from fedpilot.runs import train
from fedpilot.safeguards import Safeguards
from fedpilot.screening import Screening
from fedpilot.types import Algorithm, ClientProfile, Plan, Site, Task, Tensors, Upload

PRESENT = toy.random_adapter(SPEC, 3, 1)


def task(client_id: int, rank: int = 3) -> Task:
    ranks = dict.fromkeys(SPEC.modules, rank)
    return Task(Plan(client_id, ranks, frozenset(PRESENT)), lora.truncate(PRESENT, ranks))


def trained(client_id: int, rank: int = 3) -> Upload:
    return Upload(
        client_id,
        5 + client_id,
        lora.truncate(toy.random_adapter(SPEC, 3, 10 + client_id), dict.fromkeys(SPEC.modules, rank)),
    )


def moved(private: ClientDP, uploads: list[Upload], expected: float, round: int = 1) -> Tensors:
    ranks = {upload.client_id: upload.tensors["blocks.0.linear.lora_A"].shape[0] for upload in uploads}
    [found] = noisy_mean(
        *(private, iter(uploads), lambda k: task(k, ranks[k]), PRESENT), expected_clients=expected, seed=[3, round]
    )
    return tensors.subtract(found.tensors, PRESENT)


def test_a_clipped_update_has_at_most_the_norm_and_keeps_its_direction() -> None:
    whole = tensors.subtract(trained(0).tensors, PRESENT)
    clipped = clipped_change(trained(0), PRESENT, 0.25)
    assert tensors.norm(clipped) == pytest.approx(0.25, rel=1e-5)
    for name, tensor in clipped.items():
        torch.testing.assert_close(tensor / 0.25, whole[name] / tensors.norm(whole))
    untouched = clipped_change(trained(0), PRESENT, 1e6)
    assert all(torch.equal(untouched[name], whole[name]) for name in whole)


@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_one_client_more_moves_the_sum_by_at_most_the_clip(factor: float) -> None:
    private = ClientDP("client", 0.5, 0.0)
    loud = replace(trained(3), tensors=tensors.scale(trained(3).tensors, factor))
    without, with_it = (moved(private, [trained(0), trained(1), *more], 4.0) for more in ([], [loud]))
    assert tensors.norm(tensors.subtract(with_it, without)) <= 0.5 / 4.0 * (1 + 1e-5)


def test_without_noise_and_clipping_it_is_the_sum_of_changes_over_the_fixed_number() -> None:
    found = moved(ClientDP("client", 1e9, 0.0), [trained(0), trained(1, 2)], 5.0)
    for name, tensor in found.items():
        padded = torch.zeros_like(tensor)
        part = trained(1, 2).tensors[name]
        slots = tuple(slice(size) for size in part.shape)
        padded[slots] = part - PRESENT[name][slots]
        torch.testing.assert_close(
            tensor, (trained(0).tensors[name] - PRESENT[name] + padded) / 5.0, rtol=1e-4, atol=1e-6
        )


def test_the_noise_has_the_stated_deviation_falls_on_every_tensor_and_differs_by_round() -> None:
    private = ClientDP("client", 2.0, 1.5)
    drawn = [moved(private, [], 4.0, round) for round in range(1, 40)]
    for name in PRESENT:
        values = torch.cat([each[name].flatten() for each in drawn])
        assert float(values.std()) == pytest.approx(2.0 * 1.5 / 4.0, rel=5 / math.sqrt(len(values)))
    assert tensors.digest(drawn[0]) == tensors.digest(moved(private, [], 4.0, 1))
    assert len({tensors.digest(each) for each in drawn}) == len(drawn)


def test_only_what_the_method_trains_is_moved() -> None:
    names = trained_by(PRESENT, ("B",)).keys()
    assert not any(name.endswith("lora_A") for name in names)
    assert {"head.bias", "blocks.2.linear.lora_B"} <= names
    assert trained_by(PRESENT, ("AB",)).keys() == PRESENT.keys()


def test_epsilon_of_sampled_rounds_is_that_of_an_independent_accountant() -> None:
    private = ClientDP("client", 1.0, 1.1, delta=1e-4)
    accountant = RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(1.1))
    accountant.compose(event, 30)
    assert private.epsilon(30, private.rate(50, 10)) == pytest.approx(accountant.get_epsilon(1e-4), rel=0.01)


def test_local_epsilon_is_that_of_half_the_noise_without_sampling() -> None:
    accountant = RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(4.0), 7)
    assert ClientDP("local", 1.0, 8.0).epsilon(7, 0.1) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)


@pytest.mark.parametrize("rounds", [1, 5, 17, 30])
def test_the_last_round_is_the_last_within_the_budget(rounds: int) -> None:
    private = ClientDP("client", 1.0, 1.3)
    budget = private.epsilon(rounds, 0.3)
    private = replace(private, max_epsilon=budget)
    assert private.last_round(30, 0.3) == rounds
    assert replace(private, max_epsilon=math.nextafter(budget, 0)).epsilon(rounds, 0.3) > math.nextafter(budget, 0)


def test_a_budget_for_no_round_is_refused() -> None:
    with pytest.raises(PlanError, match="max_epsilon must allow one round, which costs"):
        ClientDP("client", 1.0, 0.5, max_epsilon=0.1).last_round(3, 1.0)


def test_poisson_cohorts_vary_in_size_around_the_mean() -> None:
    people = [ClientProfile(k, 1, 1) for k in range(40)]
    private = ClientDP("client", 1.0, 1.0)
    sizes = [len(private.sample(people, 10, np.random.default_rng(seed))) for seed in range(300)]
    assert np.mean(sizes) == pytest.approx(10, abs=4 * math.sqrt(7.5 / 300))
    assert np.var(sizes) == pytest.approx(7.5, rel=0.3)
    assert private.sample(people, None, np.random.default_rng(0)) == people


# --- in a run -----------------------------------------------------------------------------------------------------


def method(profile: MemoryProfile) -> FedIT:
    return FedIT(SPEC, profile, rank=2, weights="uniform")


def run(
    algorithm: Algorithm[object], private: ClientDP, num_rounds: int = 3, cohort: int | None = None, **guards: object
) -> list[tuple[Tensors, RoundRecord]]:
    rounds = run_rounds(
        algorithm,
        Engine(algorithm, {5: scaled(1e4)}),
        CLIENTS,
        lambda _: {},
        num_rounds=num_rounds,
        seed=3,
        cohort_size=cohort,
        measure_aggregation=True,
        safeguards=Safeguards(private=private, **guards),  # type: ignore[arg-type]
        server=toy.server,
    )
    return [(algorithm.deploy(state).tensors, record) for state, record in rounds]


def test_a_private_round_records_epsilon_and_no_loss(profile: MemoryProfile) -> None:
    private = ClientDP("client", 0.5, 1.0)
    for _, record in run(method(profile), private):
        assert record.facts["epsilon"] == private.epsilon(record.round, 1.0)
        assert record.facts["epsilon_next"] == private.epsilon(record.round + 1, 1.0)
        assert "aggregation_error" not in record.facts
        assert record.uploads
        assert all("loss" not in upload.metrics for upload in record.uploads)


def test_no_client_moves_the_adapter_by_more_than_its_share(profile: MemoryProfile) -> None:
    algorithm = method(profile)
    start = algorithm.init(np.random.default_rng([3, 0])).adapter
    [(adapter, _)] = run(algorithm, ClientDP("client", 0.5, 0.0), num_rounds=1)
    assert 0 < tensors.norm(tensors.subtract(adapter, start)) <= 0.5 * (1 + 1e-5)


def test_a_round_of_nobody_still_releases_noise(profile: MemoryProfile) -> None:
    records = run(method(profile), ClientDP("client", 0.5, 1.0), num_rounds=8, cohort=1)
    empty = [index for index, (_, record) in enumerate(records) if not record.plans]
    assert empty  # by the seed
    for index in empty:
        assert records[index][1].aggregated
        assert tensors.digest(records[index][0]) != tensors.digest(records[index - 1][0])


BESIDE_PAIRS = {
    "fedbiot": lambda profile: fedbiot(profile, adapter_blocks=1, weights="uniform"),
    "fedbiot-two-blocks": lambda profile: fedbiot(profile, weights="uniform"),
    "fedins": lambda profile: fedins(),
    "fedins-lora": lambda profile: fedins(pool="lora", rank=2, participation="all"),
    "reclora": lambda profile: even_reclora(weights="uniform"),
    "reclora-suffix": lambda profile: even_reclora(weights="uniform", participation="suffix"),
}
"""Methods whose state holds more than a server's mean of pairs, or something else."""

LEAVE_OUT = ("fedbiot", "fedbiot-two-blocks", "fedins", "reclora-suffix")
"""Of these, those that do without a client for which nothing fits."""


@pytest.mark.parametrize(
    "make",
    [
        lambda profile: FFALoRA(SPEC, profile, rank=2, weights="uniform"),
        lambda profile: FedPilot(SPEC, profile, rank=2, weights="uniform", aggregation="layerwise", solver="suffix"),
        lambda profile: HetLoRA(SPEC, profile, r_min=1, r_max=3, gamma=1.0, weights="uniform"),
        *BESIDE_PAIRS.values(),
    ],
    ids=["ffa-lora", "fed-pilot", "hetlora", *BESIDE_PAIRS],
)
def test_other_means_run_privately_too(make, profile: MemoryProfile) -> None:  # type: ignore[no-untyped-def]
    algorithm = make(profile)
    start = algorithm.deploy(algorithm.init(np.random.default_rng([3, 0]))).tensors
    [(adapter, record)] = run(algorithm, ClientDP("client", 0.5, 0.0), num_rounds=1)
    assert record.aggregated
    assert 0 < tensors.norm(tensors.subtract(adapter, start)) <= 0.5 * (1 + 1e-5)


def test_a_private_round_goes_on_from_the_newest_adapter_and_not_from_the_mean_over_rounds(
    profile: MemoryProfile,
) -> None:
    options = {"weights": "uniform", "aggregation": "layerwise", "solver": "suffix"}
    algorithm = FedPilot(SPEC, profile, rank=2, temporal_mean=0.0, **options)  # type: ignore[arg-type]
    plain = [adapter for adapter, _ in run(replace(algorithm, temporal_mean=None), ClientDP("client", 0.5, 0.3))]
    deployed = [adapter for adapter, _ in run(algorithm, ClientDP("client", 0.5, 0.3))]
    assert len(plain) > 1
    for name, tensor in deployed[-1].items():
        torch.testing.assert_close(tensor, sum(adapter[name] for adapter in plain) / len(plain))


@pytest.mark.parametrize("cohort", [None, 1])
def test_noise_spares_the_drawn_factor_of_ffa_lora(cohort: int | None, profile: MemoryProfile) -> None:
    """Also in rounds of nobody, which name no tensors."""
    algorithm = FFALoRA(SPEC, profile, rank=2, weights="uniform")
    start = algorithm.init(np.random.default_rng([3, 0])).adapter
    *_, (adapter, _) = records = run(algorithm, ClientDP("client", 0.5, 1.0), num_rounds=6, cohort=cohort)
    assert cohort is None or not all(record.plans for _, record in records)
    for name, tensor in adapter.items():
        assert torch.equal(tensor, start[name]) == name.endswith("lora_A"), name


def straggler(profile: MemoryProfile) -> FedIT:
    """Everybody trains the last block alone."""
    last = planning.train_blocks(SPEC, 0, 2, [SPEC.num_blocks - 1])
    budget = memory.peak_bytes(profile, last)
    return FedIT(SPEC, profile, rank=2, weights="uniform", participation="straggler", budget_bytes=budget)


def ffa_straggler(profile: MemoryProfile) -> FFALoRA:
    """The same with B alone."""
    budget = memory.peak_bytes(profile, planning.train_blocks(SPEC, 0, 2, [SPEC.num_blocks - 1], "B"))
    return FFALoRA(SPEC, profile, rank=2, weights="uniform", participation="straggler", budget_bytes=budget)


@pytest.mark.parametrize(
    ("make", "frozen"),
    [
        (straggler, tuple(lora.names(["blocks.0.linear", "blocks.1.linear"]))),
        (lambda profile: FFALoRA(SPEC, profile, rank=2, weights="uniform", participation="ranks"), ("lora_A",)),
        (ffa_straggler, ("lora_A", *lora.names(["blocks.0.linear", "blocks.1.linear"]))),
        (lambda profile: FedIT(SPEC, profile, rank=2, weights="uniform", participation="exclusive"), ()),
        *((BESIDE_PAIRS[name], ()) for name in LEAVE_OUT),
    ],
    ids=["fedit-straggler", "ffa-lora", "ffa-lora-straggler", "fedit", *LEAVE_OUT],
)
def test_the_noise_falls_on_the_same_tensors_whoever_was_sampled(make, frozen, profile: MemoryProfile) -> None:  # type: ignore[no-untyped-def]
    """Or the release would say whether the cohort was empty, which the accountant takes for hidden."""
    algorithm = make(profile)
    state = algorithm.init(np.random.default_rng([3, 0]))
    before = algorithm.deploy(state).tensors
    poor = [replace(client, memory_bytes=1) for client in CLIENTS]
    moved = []
    for cohort in ([], poor, CLIENTS):
        after, record = run_round(
            *(algorithm, Engine(algorithm), cohort, lambda _: {}, state),
            round=1,
            seed=3,
            observer=Unwatched(),
            safeguards=Safeguards(private=ClientDP("client", 0.5, 1.0)),
            expected_clients=10,
            server=toy.server,
        )
        assert record.aggregated
        assert bool(record.plans) == (cohort is CLIENTS)
        now = algorithm.deploy(after).tensors
        moved.append({name for name, tensor in now.items() if not torch.equal(tensor, before[name])})
    assert moved[0] == moved[1] == moved[2]
    assert moved[0] == {name for name in before if not name.endswith(frozen)}


@pytest.mark.parametrize("name", BESIDE_PAIRS)
def test_the_noise_of_a_round_of_nobody_has_the_stated_deviation(name: str, profile: MemoryProfile) -> None:
    """On all that the method deploys; what the server trains from it on data of its own is no client's."""
    algorithm = BESIDE_PAIRS[name](profile)
    state = algorithm.init(np.random.default_rng([3, 0]))
    after, _ = run_round(
        *(algorithm, Engine(algorithm), [], lambda _: {}, state),
        round=1,
        seed=3,
        observer=Unwatched(),
        safeguards=Safeguards(private=ClientDP("client", 2.0, 1.5)),
        expected_clients=10,
    )
    noise = tensors.subtract(algorithm.deploy(after).tensors, algorithm.deploy(state).tensors)
    assert all(bool(tensor.all()) for tensor in noise.values())
    count = sum(tensor.numel() for tensor in noise.values())
    assert tensors.norm(noise) / math.sqrt(count) == pytest.approx(0.3, rel=4 / math.sqrt(2 * count))
    if name.startswith("fedbiot"):
        assert tensors.digest(after.emulator) == tensors.digest(state.emulator)


REFUSED = {
    "which weighs clients unlike": lambda profile: FedIT(SPEC, profile, rank=2),
    "which does not average": lambda profile: FLoRA(SPEC, profile),
    "depends on what clients say": lambda profile: HetLoRA(SPEC, profile, weights="uniform"),
    "whose state depends": lambda profile: FFALoRA(SPEC, profile, weights="uniform", noise_multiplier=1.0),
    "depends on what": lambda profile: FedPilot(SPEC, profile, weights="uniform", aggregation="layerwise"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_methods_are_refused_before_the_run(reason: str, profile: MemoryProfile) -> None:
    with pytest.raises(PlanError, match=f"{reason}.*take fedit"):
        run(REFUSED[reason](profile), ClientDP("client", 0.5, 1.0))


@pytest.mark.parametrize("guard", [{"screening": Screening(5.0)}, {"robust": Robust("median")}])
def test_decisions_between_clients_do_not_go_with_noise_on_the_sum(guard, profile: MemoryProfile) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match="must go without screening and robust rules"):
        run(method(profile), ClientDP("client", 0.5, 1.0), **guard)


def test_a_run_ends_before_the_round_that_would_exceed_the_budget_and_stays_ended(
    profile: MemoryProfile, tmp_path: Path
) -> None:
    private = ClientDP("client", 0.5, 1.0)
    private = replace(private, max_epsilon=(private.epsilon(2, 0.4) + private.epsilon(3, 0.4)) / 2)
    directory = RunDirectory.create(tmp_path / "run", manifest({}, seed=5, dtype="float32"))
    algorithm = method(profile)
    digests = []
    for _ in range(2):
        ended = train(
            *(algorithm, Engine(algorithm), CLIENTS, lambda _: {}, directory),
            num_rounds=6,
            cohort_size=4,
            checkpoint_every=4,
            safeguards=Safeguards(private=private),
        )
        assert (ended.round, ended.stopped_early) == (2, True)
        digests.append(tensors.digest(ended.state.adapter))
    assert digests[0] == digests[1]
    assert directory.checkpoints()[-1].name == "round-0002"
    last = directory.lines()[-1]
    assert last["round"] == 2
    assert last["facts"]["epsilon"] <= private.max_epsilon < last["facts"]["epsilon_next"]  # type: ignore[index,operator]


def test_local_noise_is_on_the_upload_before_it_leaves(profile: MemoryProfile) -> None:
    private = ClientDP("local", 0.5, 2.0)
    upload = replace(trained(1), metrics={"loss": 0.7, "score/1": 3.0, "seconds": 1.0, "steps": 4.0})
    noisy = LocalNoise(private, (3, 1, 1))(task(1), upload)
    assert noisy.metrics == {"seconds": 1.0, "steps": 4.0}
    assert not torch.equal(noisy.tensors["head.bias"], upload.tensors["head.bias"])
    quiet = LocalNoise(replace(private, noise_multiplier=0.0), (3, 1, 1))(task(1), upload)
    noise = tensors.subtract(noisy.tensors, quiet.tensors)
    assert tensors.norm(tensors.subtract(quiet.tensors, PRESENT)) <= 0.5 * (1 + 1e-5)
    count = sum(tensor.numel() for tensor in noise.values())
    assert tensors.norm(noise) / math.sqrt(count) == pytest.approx(1.0, rel=4 / math.sqrt(2 * count))


@pytest.mark.parametrize("make", [method, *BESIDE_PAIRS.values()], ids=["fedit", *BESIDE_PAIRS])
def test_a_site_that_releases_is_asked_by_the_engine(make, profile: MemoryProfile) -> None:  # type: ignore[no-untyped-def]
    algorithm = make(profile)

    def site_for(client_id: int, round: int) -> Site:
        site = toy.site(CLIENTS[client_id])
        site.release = LocalNoise(ClientDP("local", 0.5, 2.0), (3, client_id, round))
        return site

    plain = InProcess(algorithm, lambda k, _: toy.site(CLIENTS[k]))
    noisy = InProcess(algorithm, site_for)
    found = []
    for engine in (plain, noisy):
        guards = Safeguards(private=ClientDP("local", 0.5, 2.0))
        [(state, record)] = run_rounds(
            *(algorithm, engine, CLIENTS, lambda _: {}), num_rounds=1, seed=3, safeguards=guards, server=toy.server
        )
        found.append(algorithm.deploy(state).tensors)
        assert record.facts["epsilon"] == pytest.approx(ClientDP("local", 0.5, 2.0).epsilon(1, 1.0))
    deviation = tensors.norm(tensors.subtract(*found)) / math.sqrt(sum(t.numel() for t in found[0].values()))
    assert 0.25 < deviation < 0.45  # of the mean of ten: 1 / sqrt(10)
    assert all(bool(tensor.all()) for tensor in tensors.subtract(*found).values())


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"noise_multiplier": -1.0}, {"delta": 1.0}])
def test_numbers_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=f"{next(iter(wrong))} must"):
        ClientDP("client", **{"clip": 1.0, "noise_multiplier": 1.0, **wrong})
