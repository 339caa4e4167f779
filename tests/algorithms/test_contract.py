"""The contract that every algorithm holds, as a table: one row an algorithm, one test a clause."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.your_algorithm import ClippedFedIT
from tests import toy

from fedpilot import attachments, base_deltas, checkpoint, lora, memory, planning, rounds, tensors
from fedpilot.algorithms import ALGORITHMS
from fedpilot.algorithms.fed_hello import FedHello
from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.algorithms.fedaf import RESAMPLED, FedAF
from fedpilot.algorithms.fedbiot import FedBiOT
from fedpilot.algorithms.fedex_lora import FedExLoRA
from fedpilot.algorithms.fedins import FedIns
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.fedra import FedRA
from fedpilot.algorithms.ffa_lora import FFALoRA
from fedpilot.algorithms.flexlora import FlexLoRA
from fedpilot.algorithms.flora import FLoRA
from fedpilot.algorithms.galore import GaLore
from fedpilot.algorithms.hetlora import HetLoRA
from fedpilot.algorithms.lora_fair import LoRAFair
from fedpilot.algorithms.reclora import RecLoRA
from fedpilot.algorithms.xgblora import XGBLoRA
from fedpilot.errors import TrainingError
from fedpilot.memory import MemoryProfile
from fedpilot.types import (
    Algorithm,
    ClientProfile,
    Exchanges,
    Failure,
    ModelSpec,
    Plan,
    Projection,
    StepKind,
    Task,
    Upload,
)

RANK = 3
SPEC = toy.spec()


@dataclass(frozen=True)
class Row:
    """One algorithm of the table.

    Attributes:
        make: From spec and profile to the algorithm.
        as_fedit: The method set up so that, with equal budgets, it is FedIT by its paper; ``None`` where it never is.
        kind: Of its steps, where its profile needs a trace of its own.
    """

    make: Callable[[ModelSpec, MemoryProfile], Algorithm[Any]]
    as_fedit: Callable[[ModelSpec, MemoryProfile], Algorithm[Any]] | None = None
    kind: StepKind | None = None


def pilot(**options: Any) -> Row:
    return Row(
        lambda s, p: FedPilot(s, p, rank=RANK, refresh_every=2, **options),
        lambda s, p: FedPilot(s, p, rank=RANK, **options),
    )


def hello(allocation: Any) -> Row:
    return Row(
        lambda s, p: FedHello(s, p, rank=RANK, allocation=allocation, fim_examples=4, warmup_rounds=1, refresh_every=2),
        lambda s, p: FedHello(
            s, p, rank=RANK, allocation=allocation, fim_examples=4, warmup_rounds=1, weights="examples"
        ),
    )


def galore(**options: Any) -> Row:
    kind = StepKind(("W",), projection=Projection(options["rank"], 200, 0.25))  # the gap does not show in a profile
    return Row(lambda s, p: GaLore(s, p, **options), kind=kind)


def fedaf(**options: Any) -> Row:
    """FedAF uploads no adapter: what comes back is what its plans send, in two exchanges a round."""
    made = partial(FedAF, rank=RANK, ipc=4, iterations=2, server_steps=2, mix=3, **options)
    return Row(lambda s, p: made(s, p), kind=made(SPEC, None).step_kind)  # type: ignore[arg-type]


def fedins(**options: Any) -> Row:
    """FedIns holds a pool and no pairs."""
    return Row(lambda s, p: FedIns(s, p, **options), kind=FedIns(SPEC, None, **options).step_kind)  # type: ignore[arg-type]


def reclora(**options: Any) -> Row:
    """RecLoRA holds a bank and its gates, and no pairs; the toy model seeds no dropout."""
    options = {"N": 3, "rank": 2, "hidden": 5, "dropout": 0.0, "user_width": 4, **options}
    return Row(lambda s, p: RecLoRA(s, p, **options), kind=RecLoRA(SPEC, None, **options).step_kind)  # type: ignore[arg-type]


TABLE = {
    "fedit": Row(lambda s, p: FedIT(s, p, rank=RANK, participation="exclusive"), lambda s, p: FedIT(s, p, rank=RANK)),
    "fedit-straggler": Row(
        lambda s, p: FedIT(s, p, rank=RANK, participation="straggler", budget_bytes=budgets(p)[0]),
        lambda s, p: FedIT(s, p, rank=RANK, participation="straggler", budget_bytes=10**9),
    ),
    "hetlora": Row(
        lambda s, p: HetLoRA(s, p, r_min=1, r_max=RANK, gamma=0.7),
        lambda s, p: HetLoRA(s, p, r_min=RANK, r_max=RANK, gamma=1.0, weights="examples"),
    ),
    "hetlora-by-module": Row(lambda s, p: HetLoRA(s, p, r_min=1, r_max=RANK, gamma=0.7, norm="module")),
    "fedex-lora": Row(lambda s, p: FedExLoRA(s, p, rank=RANK, participation="exclusive")),
    "fedex-lora-straggler": Row(
        lambda s, p: FedExLoRA(s, p, rank=RANK, participation="straggler", budget_bytes=budgets(p)[0])
    ),
    "fedex-lora-truncated": Row(
        lambda s, p: FedExLoRA(s, p, rank=RANK, residual_rank=1, participation="exclusive", weights="examples")
    ),
    "fedex-lora-keep": Row(lambda s, p: FedExLoRA(s, p, rank=RANK, assign="keep", participation="exclusive")),
    "fedex-lora-reinit": Row(lambda s, p: FedExLoRA(s, p, rank=RANK, assign="reinit", participation="exclusive")),
    "ffa-lora": Row(lambda s, p: FFALoRA(s, p, rank=RANK, participation="exclusive")),
    "ffa-lora-straggler": Row(
        lambda s, p: FFALoRA(s, p, rank=RANK, participation="straggler", budget_bytes=budgets(p)[0])
    ),
    "ffa-lora-ranks": Row(lambda s, p: FFALoRA(s, p, rank=RANK, participation="ranks")),
    "ffa-lora-private": Row(
        lambda s, p: FFALoRA(s, p, rank=RANK, participation="exclusive", noise_multiplier=1.2, clip=0.5)
    ),
    "ffa-lora-epsilon": Row(
        lambda s, p: FFALoRA(s, p, rank=RANK, participation="ranks", epsilon=4.0, num_rounds=12, weights="uniform")
    ),
    "flora": Row(lambda s, p: FLoRA(s, p, r_min=1, r_max=RANK)),
    "flexlora": Row(lambda s, p: FlexLoRA(s, p, r_min=1, r_max=RANK)),
    "lora-fair": Row(
        lambda s, p: LoRAFair(s, p, rank=RANK, steps=20, participation="exclusive"),
        lambda s, p: LoRAFair(s, p, rank=RANK, steps=0),
    ),
    "lora-fair-ridge": Row(
        lambda s, p: LoRAFair(s, p, rank=RANK, solver="ridge", participation="straggler", budget_bytes=budgets(p)[0])
    ),
    "xgblora": Row(lambda s, p: XGBLoRA(s, p, blocks_per_round=2, lam=0.01)),
    "xgblora-proj1": Row(lambda s, p: XGBLoRA(s, p, blocks_per_round=2, kappa=2, server="proj1")),
    "xgblora-freeze-a": Row(lambda s, p: XGBLoRA(s, p, blocks_per_round=2, server="freeze_a", weights="uniform")),
    "fed-pilot": pilot(),
    "fed-pilot-comagg": pilot(aggregation="comagg"),
    "fed-pilot-layerwise": pilot(aggregation="layerwise"),
    "fed-pilot-ranks": Row(lambda s, p: FedPilot(s, p, rank=RANK, ranks=(1, RANK), refresh_every=2)),
    "fed-pilot-temporal-mean": Row(lambda s, p: FedPilot(s, p, rank=RANK, refresh_every=2, temporal_mean=4.0)),
    "fed-pilot-straggler": Row(
        lambda s, p: FedPilot(s, p, rank=RANK, solver="straggler", aggregation="layerwise", budget_bytes=budgets(p)[0]),
        lambda s, p: FedPilot(s, p, rank=RANK, solver="straggler", aggregation="layerwise", budget_bytes=10**9),
    ),
    "fed-pilot-random": pilot(solver="random"),
    "fed-pilot-suffix": pilot(solver="suffix"),
    "fed-pilot-additive": pilot(solver="additive"),
    "fed-hello": hello("fim"),
    "fed-hello-geometric": hello("geometric"),
    "fed-hello-random-geometric": hello("random-geometric"),
    "fedra": Row(
        lambda s, p: FedRA(s, p, rank=RANK),
        lambda s, p: FedRA(s, p, rank=RANK, weights="examples"),
    ),
    "fedbiot": Row(lambda s, p: FedBiOT(s, p, rank=RANK, adapter_blocks=1, pre_steps=2, align_steps=1)),
    "fedbiot-two-blocks": Row(
        lambda s, p: FedBiOT(s, p, rank=RANK, beta=0.0, pre_steps=0, align_steps=2, layerwise=True, weights="uniform")
    ),
    "galore": galore(rank=2, participation="exclusive"),
    "galore-suffix": galore(rank=RANK, gap=2, participation="suffix", weights="examples"),
    "fedins": fedins(size=5, top_k=2, weights="examples"),
    "fedins-lora": fedins(size=3, top_k=1, pool="lora", rank=2),
    "fedaf": fedaf(),
    "fedaf-deep": fedaf(depth=1, gamma=0.5, start="noise", rounds_kept=2),
    "reclora": reclora(participation="suffix"),
    "reclora-factor": reclora(participation="exclusive", mix="factor", weights="uniform"),
    "reclora-even": reclora(participation="suffix", gate="none"),
    "your-algorithm": Row(lambda s, p: ClippedFedIT(s, p, rank=RANK)),
}


@cache
def traced(kind: StepKind) -> MemoryProfile:
    program = partial(toy.program, kind=kind)
    if (how := kind.condensation) is not None:
        whole = planning.frozen_from(SPEC, 0, how.rank, how.depth)
        plans = [replace(whole, micro_batch=size) for size in (None, 4, 2)]
        shape = (toy.WIDTH,)
        return memory.trace_plans(program, SPEC, plans, batch=8, sizes=(8, 4, 2), item_shape=shape, rehearsed=2)
    if kind.attachment is not None:
        return memory.trace_attached(program, SPEC, kind.attachment, batch=8)
    return memory.trace(program, SPEC, batch=8, patterns=kind.patterns, checkpointing=False)


@pytest.fixture
def profile(request: pytest.FixtureRequest, profile: MemoryProfile) -> MemoryProfile:
    """The shared profile, or that of the row's own kind of step."""
    kind = request.getfixturevalue("row").kind if "row" in request.fixturenames else None
    return profile if kind is None else traced(kind)


def budgets(profile: MemoryProfile) -> tuple[int, int, int]:
    """A budget for the last block alone, one for the last two, one for all; or for pieces of 2, 4 and 8 items."""
    if profile.item_shape:
        return tuple(sorted(whole.peak for whole in profile.plans.values()))  # type: ignore[return-value]
    if profile.plans:  # of an attachment: the suffixes
        peaks = sorted((whole.peak for whole in profile.plans.values()), reverse=True)
        return peaks[2], peaks[1], peaks[0]
    peaks = [memory.peak_bytes(profile, plan_from(profile, block)) for block in range(SPEC.num_blocks)]
    return peaks[2], peaks[1], peaks[0]


def plan_from(profile: MemoryProfile, block: int) -> Plan:
    """The deepest blocks trained: whole weights where the profile is of these, else pairs."""
    modules = lora.blocks_modules(SPEC, range(block, SPEC.num_blocks))
    if profile.optimiser.whole:
        return Plan(0, {}, frozenset(map(base_deltas.weight_name, modules)) | frozenset(SPEC.head))
    return Plan(0, dict.fromkeys(SPEC.modules, RANK), frozenset(lora.names(modules)) | frozenset(SPEC.head))


def population(profile: MemoryProfile, equal: bool = False) -> list[ClientProfile]:
    """Six clients with unlike examples and, unless equal, three budgets."""
    sizes = budgets(profile)
    return [ClientProfile(k, 5 + 3 * k, 10**9 if equal else sizes[k % 3]) for k in range(6)]


class Engine:
    """Runs tasks on fresh toy sites; can make one client fail, and keeps what went over the wire."""

    def __init__(self, algorithm: Algorithm[Any], clients: Sequence[ClientProfile], failing: int | None = None) -> None:
        self.algorithm, self.clients, self.failing = algorithm, {c.client_id: c for c in clients}, failing
        self.tasks: list[Task] = []
        self.uploads: list[Upload] = []
        self.sites: dict[int, Any] = {}

    def exchange(self, round: int, tasks: Iterator[Task]) -> Iterator[Upload | Failure]:
        for task in tasks:
            client_id = task.plan.client_id
            if client_id == self.failing:
                yield Failure(client_id, str(TrainingError("made to fail")))
                continue
            kept = self.sites[client_id].kept if task.exchange == 2 else {}
            self.sites[client_id] = toy.site(self.clients[client_id])
            self.sites[client_id].kept = kept
            upload = self.algorithm.local_update(task, self.sites[client_id])
            self.tasks.append(task)
            self.uploads.append(upload)
            yield upload


def run(
    row: Row, profile: MemoryProfile, *, num_rounds: int = 4, seed: int = 3, failing: int | None = None
) -> tuple[Any, list[rounds.RoundRecord], Engine]:
    """The row's algorithm over six unlike clients, four of them a round."""
    algorithm = row.make(SPEC, profile)
    clients = population(profile)
    engine = Engine(algorithm, clients, failing)
    states_and_records = list(
        rounds.run_rounds(
            algorithm,
            engine,
            clients,
            lambda d: {"loss": 0.0},
            num_rounds=num_rounds,
            seed=seed,
            cohort_size=4,
            server=toy.server,
        )
    )
    return states_and_records[-1][0], [record for _, record in states_and_records], engine


def exchanged(algorithm: Algorithm[Any], state: Any, engine: Engine, plans: Sequence[Plan]) -> Iterator[Any]:
    """What comes back of a round, after as many exchanges as the method has."""
    results = engine.exchange(1, (algorithm.distribute(state, plan) for plan in plans))
    if not isinstance(algorithm, Exchanges):
        return results
    tasks = algorithm.mid_round(state, {plan.client_id: plan for plan in plans}, list(results))  # type: ignore[arg-type]
    return engine.exchange(1, (replace(task, exchange=2) for task in tasks))


def flat(value: Any, path: str = "state") -> dict[str, torch.Tensor]:
    """All tensors of a state, at any depth, under the way to them."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items: Iterable[tuple[Any, Any]] = ()
    if dataclasses.is_dataclass(value):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple):
        items = enumerate(value)
    return {name: tensor for key, item in items for name, tensor in flat(item, f"{path}/{key}").items()}


def trained_name(name: str) -> str:
    """Of an uploaded tensor: a weight's change may come as its factors."""
    module, _, kind = name.rpartition(".")
    return base_deltas.weight_name(module) if kind in ("base_A", "base_B") else name


every_row = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())


def test_every_registered_algorithm_has_a_row() -> None:
    made = {type(row.make(SPEC, None)) for name, row in TABLE.items() if name in ALGORITHMS}  # type: ignore[arg-type]
    assert made == set(ALGORITHMS.values())


@every_row
def test_it_runs_records_and_learns_something(row: Row, profile: MemoryProfile) -> None:
    state, records, _ = run(row, profile)
    assert [record.round for record in records] == [1, 2, 3, 4]
    assert all(record.aggregated and record.bytes_up > 0 and not record.failures for record in records)
    start = row.make(SPEC, profile).init(rounds.generator(3, 0))
    assert tensors.digest(flat(state)) != tensors.digest(flat(start))
    assert tensors.is_finite(flat(state))


@every_row
def test_algorithm_and_state_are_frozen(row: Row, profile: MemoryProfile) -> None:
    algorithm = row.make(SPEC, profile)
    state = algorithm.init(np.random.default_rng(0))
    for noun in (algorithm, state):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(noun, dataclasses.fields(noun)[0].name, None)


@every_row
def test_an_upload_holds_exactly_what_the_plan_trains(row: Row, profile: MemoryProfile) -> None:
    _, _, engine = run(row, profile)
    assert engine.uploads
    for task, upload in zip(engine.tasks, engine.uploads, strict=True):
        assert {trained_name(name) for name in upload.tensors} == task.plan.trainable | task.plan.sends.keys()
        for name, shape in task.plan.sends.items():
            assert (tuple(upload.tensors[name].shape), upload.tensors[name].dtype) == (shape, torch.float32)


@every_row
def test_distributed_shapes_match_the_planned_ranks(row: Row, profile: MemoryProfile) -> None:
    _, _, engine = run(row, profile)
    for task in engine.tasks:
        # In a second exchange the client has the model already.
        expected = attachments.shapes(SPEC, task.plan.ranks, task.plan.attachment) if task.exchange == 1 else {}
        assert {name: tuple(tensor.shape) for name, tensor in task.tensors.items()} == expected


@every_row
def test_what_a_client_draws_itself_is_what_the_server_means(row: Row, profile: MemoryProfile) -> None:
    _, _, engine = run(row, profile)
    for task in engine.tasks:
        if task.fresh is not None:
            drawn = lora.fresh(SPEC, task.fresh, task.plan.ranks)
            assert drawn
            assert all(torch.equal(tensor, task.tensors[name]) for name, tensor in drawn.items())


@every_row
def test_every_client_replays_its_downloads_to_the_servers_base(row: Row, profile: MemoryProfile) -> None:
    """Four of six clients a round, one of them failing: whoever trains has the server's base, bit for bit."""
    state, records, engine = run(row, profile, num_rounds=12, failing=2)
    totals: dict[int, Any] = {}
    versions: dict[int, int] = {}
    for task in engine.tasks:
        client, base = task.plan.client_id, task.base_delta
        assert base.since == versions.get(client, 0)
        totals[client] = base_deltas.replayed(totals.get(client, {}), base)
        versions[client] = base.version
        assert tensors.digest(totals[client]) == tensors.digest(base_deltas.total(base))
    last = row.make(SPEC, profile).deploy(state).base_delta
    assert last.version in (0, sum(record.aggregated for record in records))


@every_row
def test_what_a_plan_does_not_train_is_bit_identical_on_the_client(row: Row, profile: MemoryProfile) -> None:
    algorithm = row.make(SPEC, profile)
    clients = population(profile)
    state = algorithm.init(np.random.default_rng(0))
    for plan in algorithm.plan(state, clients, np.random.default_rng(0)):
        if isinstance(plan, Plan):
            task = algorithm.distribute(state, plan)
            site = toy.site(clients[plan.client_id])
            algorithm.local_update(task, site)
            after = site.model.read()
            frozen = [name for name in task.tensors if name not in plan.trainable]
            begun = site.kept.get(RESAMPLED, task.tensors)  # FedAF's clients mix a fresh draw in before they begin
            assert all(torch.equal(after[name], begun[name]) for name in frozen)


@every_row
def test_a_plan_fits_its_budget_by_the_profile_itself(row: Row, profile: MemoryProfile) -> None:
    _, _, engine = run(row, profile)
    for task in engine.tasks:
        assert task.plan.peak_bytes is not None
        assert task.plan.peak_bytes >= memory.peak_bytes(profile, replace(task.plan, scored=frozenset()))
        assert task.plan.peak_bytes <= engine.clients[task.plan.client_id].memory_bytes


@every_row
def test_a_client_with_no_memory_is_left_out_with_the_budget_it_needs(row: Row, profile: MemoryProfile) -> None:
    algorithm = row.make(SPEC, profile)
    state = algorithm.init(np.random.default_rng(0))
    poor = ClientProfile(0, 5, 1)
    (entry,) = algorithm.plan(state, [poor], np.random.default_rng(0))
    assert not isinstance(entry, Plan)
    assert entry.needed_bytes is not None
    (again,) = algorithm.plan(state, [replace(poor, memory_bytes=entry.needed_bytes)], np.random.default_rng(0))
    assert isinstance(again, Plan)
    (less,) = algorithm.plan(state, [replace(poor, memory_bytes=entry.needed_bytes - 1)], np.random.default_rng(0))
    assert not isinstance(less, Plan)


@every_row
def test_a_state_is_never_edited(row: Row, profile: MemoryProfile) -> None:
    algorithm = row.make(SPEC, profile)
    clients = population(profile)
    engine = Engine(algorithm, clients)
    state = algorithm.init(np.random.default_rng(0))
    for _ in range(3):
        before, fields = (
            tensors.digest(flat(state)),
            {f.name: getattr(state, f.name) for f in dataclasses.fields(state)},
        )
        plans = [p for p in algorithm.plan(state, clients, np.random.default_rng(1)) if isinstance(p, Plan)]
        new = algorithm.aggregate(state, exchanged(algorithm, state, engine, plans))
        assert tensors.digest(flat(state)) == before
        assert all(getattr(state, name) is value for name, value in fields.items())
        state = new


@every_row
def test_the_same_seed_gives_the_same_bits_and_another_does_not(row: Row, profile: MemoryProfile) -> None:
    digests = [tensors.digest(flat(run(row, profile, seed=seed)[0])) for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


@every_row
def test_a_failed_client_is_recorded_and_the_round_goes_on(row: Row, profile: MemoryProfile) -> None:
    state, records, _ = run(row, profile, failing=2)
    failed = [failure for record in records for failure in record.failures]
    assert {failure.client_id for failure in failed} == {2}
    assert all(record.aggregated for record in records)
    assert tensors.is_finite(flat(state))


@every_row
def test_a_state_survives_a_checkpoint_bit_for_bit(row: Row, profile: MemoryProfile, tmp_path: Path) -> None:
    state, _, _ = run(row, profile)
    checkpoint.save(tmp_path / "c", {}, {"state": state})
    _, values, saved = checkpoint.read(tmp_path / "c")
    again = checkpoint.decode(values["state"], saved, checkpoint.classes_of(type(state)))
    assert type(again) is type(state)
    assert tensors.digest(flat(again)) == tensors.digest(flat(state))
    for field in dataclasses.fields(state):
        if not flat(getattr(state, field.name)):
            assert getattr(again, field.name) == getattr(state, field.name)


@every_row
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(
    row: Row, profile: MemoryProfile, tmp_path: Path
) -> None:
    """A tensor that a file lays out otherwise would be summed otherwise."""
    whole, _, _ = run(row, profile)
    half, _, _ = run(row, profile, num_rounds=2)
    checkpoint.save(tmp_path / "c", {}, {"state": half})
    _, values, saved = checkpoint.read(tmp_path / "c")
    again = checkpoint.decode(values["state"], saved, checkpoint.classes_of(type(half)))
    algorithm, clients = row.make(SPEC, profile), population(profile)
    *_, (state, _) = rounds.run_rounds(
        algorithm,
        Engine(algorithm, clients),  # type: ignore[arg-type]
        clients,
        lambda d: {"loss": 0.0},
        num_rounds=4,
        seed=3,
        cohort_size=4,
        first_round=3,
        state=again,
        server=toy.server,
    )
    assert tensors.digest(flat(state)) == tensors.digest(flat(whole))


@every_row
def test_an_upload_of_the_global_adapter_changes_nothing(row: Row, profile: MemoryProfile) -> None:
    """Fixed point: clients that learnt nothing leave the adapter where it is, whoever held which slot."""
    algorithm = row.make(SPEC, profile)
    if isinstance(algorithm, Exchanges):
        return  # there is no upload of an adapter
    clients = population(profile)
    state = algorithm.init(np.random.default_rng(0))
    if hasattr(state, "adapter"):  # else every round starts from fresh pairs
        state = replace(state, adapter=tensors.select(toy.random_adapter(SPEC, RANK), state.adapter))
    before = algorithm.deploy(state).tensors
    plans = [p for p in algorithm.plan(state, clients, np.random.default_rng(1)) if isinstance(p, Plan)]
    if isinstance(algorithm, HetLoRA | FlexLoRA):
        plans = [p for p in plans if set(p.ranks.values()) == {RANK}]  # padding and cutting are none, by design
    sent = [algorithm.distribute(state, plan) for plan in plans]
    told = {"rank": RANK, "steps": 3.0, "sample_rate": 0.5, "noise_multiplier": 1.0}
    uploads = (
        Upload(t.plan.client_id, 5 + t.plan.client_id, tensors.only(t.tensors, t.plan.trainable), told) for t in sent
    )
    after = algorithm.aggregate(state, uploads)
    deployed = algorithm.deploy(after).tensors
    for module in SPEC.modules if isinstance(algorithm, FlexLoRA) else ():  # the same product in another basis
        torch.testing.assert_close(lora.delta(deployed, module, 1.0), lora.delta(before, module, 1.0))
    for name in SPEC.head if isinstance(algorithm, FlexLoRA) else deployed:
        torch.testing.assert_close(deployed[name], before[name], rtol=1e-5, atol=1e-6)
    for change in base_deltas.total(algorithm.deploy(after).base_delta).values():
        torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.as_fedit is not None])
def test_it_is_fedit_bit_for_bit_where_its_paper_says_so(name: str, profile: MemoryProfile) -> None:
    clients = population(profile, equal=True)
    adapters = []
    for make in (TABLE["fedit"].as_fedit, TABLE[name].as_fedit):
        assert make is not None
        algorithm = make(SPEC, profile)
        engine = Engine(algorithm, clients)
        *_, (state, _) = rounds.run_rounds(
            algorithm, engine, clients, lambda d: {"loss": 0.0}, num_rounds=4, seed=1, cohort_size=4
        )
        adapters.append(tensors.digest(algorithm.deploy(state).tensors))
    assert adapters[0] == adapters[1]
