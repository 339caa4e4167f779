"""Identities of FFA-LoRA, and what its private runs are charged."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import toy

from fedpilot import exchange, lora, memory, planning, privacy, rounds, tensors
from fedpilot.algorithms.ffa_lora import FFALoRA, FFALoRAState
from fedpilot.config.recipe import read_recipe
from fedpilot.errors import ConfigError, PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.privacy import Spent
from fedpilot.robust import Robust
from fedpilot.safeguards import NONE, Safeguards
from fedpilot.screening import Screening
from fedpilot.types import ClientProfile, Failure, LeftOut, Plan, Task, Upload

SPEC = toy.spec()
RANK = 3


def peak_at(profile: MemoryProfile, rank: int) -> int:
    names = frozenset(map(lora.b_name, SPEC.modules)) | frozenset(SPEC.head)
    return memory.peak_bytes(profile, Plan(0, dict.fromkeys(SPEC.modules, rank), names))


def rich(client_id: int, **changes: int) -> ClientProfile:
    return ClientProfile(client_id, 5 + 4 * client_id, 10**9, **changes)


class Direct:
    """Runs tasks on fresh toy sites and keeps them; some clients are away, some send what is not finite."""

    def __init__(
        self, algorithm: FFALoRA, clients: list[ClientProfile], away: tuple[int, ...] = (), broken: tuple[int, ...] = ()
    ) -> None:
        self.algorithm, self.clients = algorithm, {client.client_id: client for client in clients}
        self.away, self.broken = away, broken
        self.tasks: list[Task] = []
        self.held: list[tensors.Tensors] = []
        self.uploads: list[Upload] = []

    def exchange(self, round, tasks):
        for task in tasks:
            if task.plan.client_id in self.away:
                yield Failure(task.plan.client_id, "away")
                continue
            site = toy.site(self.clients[task.plan.client_id])
            upload = self.algorithm.local_update(task, site)
            if task.plan.client_id in self.broken:
                upload = replace(upload, tensors={n: t + math.inf for n, t in upload.tensors.items()})
            self.uploads.append(upload)
            self.tasks.append(task)
            self.held.append(site.model.read())
            yield upload


def run(
    algorithm: FFALoRA,
    clients: list[ClientProfile],
    num_rounds: int = 3,
    seed: int = 2,
    safeguards: Safeguards = NONE,
    **unlike: tuple[int, ...],
):
    engine = Direct(algorithm, clients, **unlike)
    done = list(
        rounds.run_rounds(
            *(algorithm, engine, clients, lambda d: {"loss": 0.0}),
            num_rounds=num_rounds,
            seed=seed,
            safeguards=safeguards,
        )
    )
    return [state for state, _ in done], [record for _, record in done], engine


def digest_of_a(held: tensors.Tensors) -> str:
    return tensors.digest({name: tensor for name, tensor in held.items() if name.endswith("lora_A")})


# --- the method ---------------------------------------------------------------------------------------------------


def test_a_is_the_same_on_all_clients_in_all_rounds(profile: MemoryProfile) -> None:
    states, _, engine = run(FFALoRA(SPEC, profile, rank=RANK), [rich(k) for k in range(4)])
    everywhere = [*engine.held, *(task.tensors for task in engine.tasks), *(state.adapter for state in states)]
    assert len({digest_of_a(held) for held in everywhere}) == 1
    assert len({tensors.digest(tensors.select(held, map(lora.b_name, SPEC.modules))) for held in engine.held}) == 12


def test_the_mean_of_b_is_the_mean_of_the_products(profile: MemoryProfile) -> None:
    """B̄ A0 = Σ p_k B_k A0, for unequal weights."""
    algorithm = FFALoRA(SPEC, profile, rank=RANK)
    state = algorithm.init(np.random.default_rng(0))
    names = frozenset(map(lora.b_name, SPEC.modules)) | frozenset(SPEC.head)
    uploads = [Upload(k, 1 + 2 * k, tensors.only(toy.random_adapter(SPEC, RANK, k), names)) for k in range(3)]
    after = algorithm.aggregate(state, iter(uploads)).adapter
    total = sum(upload.num_examples for upload in uploads)
    for module in SPEC.modules:
        a = state.adapter[lora.a_name(module)]
        exact = sum(u.num_examples / total * u.tensors[lora.b_name(module)] @ a for u in uploads)
        torch.testing.assert_close(after[lora.b_name(module)] @ after[lora.a_name(module)], exact, rtol=1e-6, atol=1e-7)


def test_unlike_ranks_are_averaged_slot_by_slot_over_the_same_rows_of_a(profile: MemoryProfile) -> None:
    algorithm = FFALoRA(SPEC, profile, rank=RANK, participation="ranks")
    state = algorithm.init(np.random.default_rng(0))
    uploads = []
    for k, rank in enumerate((1, 3)):
        task = algorithm.distribute(state, Plan(k, dict.fromkeys(SPEC.modules, rank), frozenset()))
        for module in SPEC.modules:
            assert torch.equal(task.tensors[lora.a_name(module)], state.adapter[lora.a_name(module)][:rank])
        drawn = toy.random_adapter(SPEC, rank, k)
        uploads.append(Upload(k, 2 + 3 * k, {name: t for name, t in drawn.items() if not name.endswith("lora_A")}))
    after = algorithm.aggregate(state, iter(uploads)).adapter
    for module in SPEC.modules:
        small, large = (upload.tensors[lora.b_name(module)] for upload in uploads)
        torch.testing.assert_close(after[lora.b_name(module)][:, :1], (2 * small + 5 * large[:, :1]) / 7)
        torch.testing.assert_close(after[lora.b_name(module)][:, 1:], large[:, 1:])


def test_uniform_weights_ignore_examples(profile: MemoryProfile) -> None:
    algorithm = FFALoRA(SPEC, profile, rank=RANK, weights="uniform")
    b = lora.b_name("blocks.1.linear")
    uploads = [Upload(k, 1 + 9 * k, {b: toy.random_adapter(SPEC, RANK, k)[b]}) for k in range(2)]
    after = algorithm.aggregate(algorithm.init(np.random.default_rng(0)), iter(uploads)).adapter
    torch.testing.assert_close(after[b], (uploads[0].tensors[b] + uploads[1].tensors[b]) / 2)


def test_both_ways_carry_b_and_the_head_alone(profile: MemoryProfile) -> None:
    """r · out numbers a module, 4 bytes each, and the head."""
    _, records, engine = run(FFALoRA(SPEC, profile, rank=RANK), [rich(0)], num_rounds=1)
    numbers = sum(RANK * out for out, _ in SPEC.modules.values()) + sum(t.numel() for t in SPEC.head.values())
    assert sum(tensor.numel() for tensor in engine.uploads[0].tensors.values()) == numbers
    assert exchange.download_bytes(engine.tasks[0]) == 4 * numbers
    assert (records[-1].bytes_up, records[-1].bytes_down) == (4 * numbers, 4 * numbers)


# --- memory -------------------------------------------------------------------------------------------------------


def plans(algorithm: FFALoRA, clients: list[ClientProfile]) -> list[Plan | LeftOut]:
    return list(algorithm.plan(algorithm.init(np.random.default_rng(0)), clients, np.random.default_rng(0)))


def test_exclusive_leaves_out_whom_b_does_not_fit(profile: MemoryProfile) -> None:
    needed = peak_at(profile, RANK)
    clients = [ClientProfile(0, 5, needed), ClientProfile(1, 5, needed - 1)]
    plan, out = plans(FFALoRA(SPEC, profile, rank=RANK, participation="exclusive"), clients)
    assert isinstance(plan, Plan)
    assert not any(name.endswith("lora_A") for name in plan.trainable)
    assert isinstance(out, LeftOut)
    assert out.needed_bytes == needed


def test_all_refuses_to_run_where_somebody_does_not_fit(profile: MemoryProfile) -> None:
    with pytest.raises(PlanError, match="client 1 must train B at rank 3"):
        plans(FFALoRA(SPEC, profile, rank=RANK), [rich(0), ClientProfile(1, 5, 100)])


def test_all_leaves_out_who_ran_out_of_memory_before(profile: MemoryProfile) -> None:
    _, out = plans(FFALoRA(SPEC, profile, rank=RANK), [rich(0), ClientProfile(1, 5, 100, margin=1.25)])
    assert isinstance(out, LeftOut)


@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_straggler_trains_b_of_what_the_weakest_can(profile: MemoryProfile, lowest: int) -> None:
    blocks = range(lowest, SPEC.num_blocks)
    budget = memory.peak_bytes(profile, planning.train_blocks(SPEC, 0, RANK, blocks, "B"))
    algorithm = FFALoRA(SPEC, profile, rank=RANK, participation="straggler", budget_bytes=budget)
    few, many = plans(algorithm, [ClientProfile(0, 5, budget), rich(1)])
    assert isinstance(few, Plan)
    assert isinstance(many, Plan)
    assert few.trainable == many.trainable
    assert few.trainable == {lora.b_name(f"blocks.{j}.linear") for j in blocks} | set(SPEC.head)
    with pytest.raises(PlanError, match="budget_bytes"):
        plans(replace(algorithm, budget_bytes=None), [rich(0)])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_ranks_gives_the_largest_that_fits(profile: MemoryProfile, rank: int) -> None:
    algorithm = FFALoRA(SPEC, profile, rank=RANK, participation="ranks")
    (plan,) = plans(algorithm, [ClientProfile(0, 5, peak_at(profile, rank))])
    assert isinstance(plan, Plan)
    assert set(plan.ranks.values()) == {rank}
    (only,) = plans(FFALoRA(SPEC, profile, rank=RANK, participation="ranks", ranks=(2,)), [rich(0)])
    assert isinstance(only, Plan)
    assert set(only.ranks.values()) == {2}


# --- privacy ------------------------------------------------------------------------------------------------------


def private(profile: MemoryProfile, **options: object) -> FFALoRA:
    return FFALoRA(SPEC, profile, rank=RANK, **{"clip": 0.5, **options})  # type: ignore[arg-type]


def test_epsilon_is_recorded_each_round_grows_and_is_the_largest_of_the_clients(profile: MemoryProfile) -> None:
    clients = [rich(k) for k in range(3)]
    states, records, _ = run(private(profile, noise_multiplier=1.5), clients)
    shown = [record.facts["epsilon"] for record in records]
    assert shown == sorted(set(shown))
    for number, state in enumerate(states, start=1):
        assert {k: spent.steps for k, spent in state.spent.items()} == dict.fromkeys(range(3), 3 * number)
        each = [privacy.epsilon(Spent(min(1.0, 8 / c.num_examples), 1.5, 3 * number), 1e-5) for c in clients]
        assert shown[number - 1] == max(each) > min(each)


def test_a_client_that_did_not_take_part_is_not_charged(profile: MemoryProfile) -> None:
    algorithm = private(profile, noise_multiplier=1.5)
    state = FFALoRAState(0, toy.random_adapter(SPEC, RANK), {1: Spent(0.5, 1.5, 6), 2: Spent(0.5, 1.5, 6)})
    told = {"sample_rate": 0.5, "noise_multiplier": 1.5, "steps": 3.0}
    assert algorithm.charged(state, [(2, told)]).spent == {1: Spent(0.5, 1.5, 6), 2: Spent(0.5, 1.5, 9)}
    assert state.spent[2].steps == 6
    _, _, engine = run(algorithm, [rich(k) for k in range(3)], num_rounds=1, away=(1,))
    assert [upload.client_id for upload in engine.uploads] == [0, 2]


@pytest.mark.parametrize(
    ("safeguards", "unlike", "counts"),
    [
        (Safeguards(min_uploads=3), {"away": (1,)}, False),
        (Safeguards(min_share=0.9), {"away": (1,)}, False),
        (Safeguards(robust=Robust("multi-krum")), {"away": (1,)}, False),
        (Safeguards(min_uploads=3), {"broken": (1,)}, False),
        (NONE, {"broken": (1,)}, True),
        (NONE, {"broken": (0, 1, 2)}, False),
        (Safeguards(screening=Screening(max_norm_factor=1.0 + 1e-9)), {}, True),
    ],
    ids=["min_uploads", "min_share", "multi-krum", "refused and too few", "refused", "all refused", "screened"],
)
def test_every_upload_that_came_is_charged_whatever_became_of_it(
    safeguards: Safeguards, unlike: dict[str, tuple[int, ...]], counts: bool, profile: MemoryProfile
) -> None:
    """The server saw it, and the promise is against the server too."""
    clients = [rich(k) for k in range(3)]
    algorithm = private(profile, noise_multiplier=1.0, weights="uniform")
    states, records, engine = run(algorithm, clients, num_rounds=4, safeguards=safeguards, **unlike)
    assert {record.aggregated for record in records} == {counts}
    came = Counter(upload.client_id for upload in engine.uploads)
    assert {k: spent.steps for k, spent in states[-1].spent.items()} == {k: 3 * count for k, count in came.items()}
    each = [privacy.epsilon(Spent(min(1.0, 8 / clients[k].num_examples), 1.0, 12), 1e-5) for k in came]
    assert records[-1].facts["epsilon"] == max(each) > 0
    if not counts:
        assert tensors.digest(states[-1].adapter) == tensors.digest(states[0].adapter)


def test_screening_refuses_some_of_the_uploads_that_are_charged_above(profile: MemoryProfile) -> None:
    algorithm = private(profile, noise_multiplier=1.0, weights="uniform")
    guards = Safeguards(screening=Screening(max_norm_factor=1.0 + 1e-9))
    _, records, _ = run(algorithm, [rich(k) for k in range(3)], num_rounds=4, safeguards=guards)
    assert any(record.failures for record in records)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"sample_rate": math.nan, "noise_multiplier": 1.0, "steps": 3.0},
        {"sample_rate": 0.5, "noise_multiplier": -1.0, "steps": 3.0},
        {"sample_rate": 0.5, "noise_multiplier": 1.0, "steps": math.inf},
        {"sample_rate": 2.0, "noise_multiplier": 1.0, "steps": 3.0},
    ],
)
def test_an_upload_that_does_not_say_what_it_cost_is_charged_as_if_it_had_no_noise(
    said: dict[str, float], profile: MemoryProfile
) -> None:
    algorithm = private(profile, noise_multiplier=1.0)
    state = algorithm.charged(FFALoRAState(0, {}), [(4, said)])
    assert algorithm.explain(state) == {"epsilon": math.inf}


def test_a_target_is_kept_to_the_end_and_then_clients_are_left_out(profile: MemoryProfile) -> None:
    clients = [rich(k, num_steps=3) for k in range(2)]
    _, records, engine = run(private(profile, epsilon=2.0, num_rounds=3), clients, num_rounds=4)
    shown = [record.facts["epsilon"] for record in records]
    assert shown[1] < 1.9 < shown[2] <= 2.0
    assert [len(record.left_out) for record in records] == [0, 0, 0, 2]
    assert "has spent epsilon" in records[3].left_out[0].reason
    noise = {upload.client_id: upload.metrics["noise_multiplier"] for upload in engine.uploads}
    assert noise[0] > noise[1]  # the smaller client's examples are drawn more often


def test_a_private_upload_says_nothing_of_the_examples_but_their_number(profile: MemoryProfile) -> None:
    _, _, engine = run(private(profile, noise_multiplier=1.0), [rich(0)], num_rounds=1)
    assert engine.uploads[0].metrics.keys() == {"steps", "sample_rate", "noise_multiplier"}
    _, _, engine = run(FFALoRA(SPEC, profile, rank=RANK), [rich(0)], num_rounds=1)
    assert "loss" in engine.uploads[0].metrics


def test_its_steps_are_b_alone_and_private_ones_are_clipped_by_example(profile: MemoryProfile) -> None:
    plain = FFALoRA(SPEC, profile).step_kind
    assert (plain.patterns, plain.private) == (("B",), None)
    kind = private(profile, epsilon=3.0).step_kind.private
    assert kind is not None
    assert kind.clip == 0.5
    known = private(profile, noise_multiplier=0.7).step_kind.private
    assert known is not None
    assert known.noise_multiplier == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "epsilon must be given without noise_multiplier"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": math.inf}, "epsilon must be positive and finite"),
        ({"noise_multiplier": -0.1}, "noise_multiplier must be zero or more"),
        ({"delta": 1.0}, "delta must lie between 0 and 1"),
        ({"clip": math.inf}, "clip must be positive and finite"),
        ({"ranks": (1, 2)}, "go with participation 'ranks'"),
        ({"ranks": (1, 9), "participation": "ranks"}, r"ranks must lie in 1\.\.3"),
    ],
)
def test_a_wrong_option_is_refused_before_the_run(
    profile: MemoryProfile, options: dict[str, object], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        private(profile, **options)


def test_a_target_needs_the_number_of_rounds(profile: MemoryProfile) -> None:
    with pytest.raises(PlanError, match="num_rounds must be the rounds of the run"):
        plans(private(profile, epsilon=1.0), [rich(0)])


def test_privacy_asked_of_another_method_names_those_that_can() -> None:
    tables = {
        "model": {"source": "minilm-l6"},
        "data": {"source": "optdigits"},
        "partition": {"num_clients": 4},
        "clients": {"memory": ["1 GiB"]},
        "training": {"learning_rate": 0.1},
        "algorithm": {"name": "hetlora", "epsilon": 3.0},
    }
    with pytest.raises(ConfigError, match=r"algorithm\.epsilon .*; ffa-lora has it"):
        read_recipe(tables, "here.toml")
