"""FedAF: two exchanges a round, a pool instead of a mean, and nothing of a client's own examples on the wire."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny, toy

from fedpilot import exchange, lora, memory, planning, rounds, tensors
from fedpilot.algorithms.fedaf import RESAMPLED, FedAF, FedAFState
from fedpilot.client import ClientModel
from fedpilot.errors import ClientError, PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.memory.attached import key_of
from fedpilot.memory.profile import WholeTrace
from fedpilot.model import ModelLens
from fedpilot.privacy.client_dp import ClientDP
from fedpilot.robust import Robust
from fedpilot.safeguards import Safeguards
from fedpilot.screening import Screening
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile, Failure, LeftOut, Plan, Site, Task, Upload

SPEC = toy.spec()
C = toy.NUM_LABELS
OPTIONS: dict[str, Any] = {"rank": 2, "depth": 1, "ipc": 2, "iterations": 2, "server_steps": 3, "mix": 3}


@cache
def profile() -> MemoryProfile:
    kind = FedAF(SPEC, None, **OPTIONS).step_kind  # type: ignore[arg-type]
    whole = planning.frozen_from(SPEC, 0, 2, 1)
    plans = [replace(whole, micro_batch=size) for size in (None, 2)]
    program = partial(toy.program, kind=kind)
    return memory.trace_plans(program, SPEC, plans, batch=8, sizes=(8, 2), item_shape=(toy.WIDTH,), rehearsed=2)


def fedaf(**options: Any) -> FedAF:
    return FedAF(SPEC, profile(), **{**OPTIONS, **options})


CLIENTS = [ClientProfile(k, 6 + 3 * k, 10**9) for k in range(3)]


class Engine:
    """Toy sites that keep what they keep; clients fail in the exchange that they are told to."""

    def __init__(self, algorithm: FedAF, failing: dict[int, int] | None = None) -> None:
        self.algorithm, self.failing = algorithm, failing or {}
        self.kept: dict[int, Any] = {}
        self.tasks: list[Task] = []
        self.uploads: list[Upload] = []

    def exchange(self, round: int, tasks: Iterator[Task]) -> Iterator[Upload | Failure]:
        for task in tasks:
            client_id = task.plan.client_id
            self.tasks.append(task)
            if self.failing.get(client_id) == task.exchange:
                yield Failure(client_id, "made to fail")
                continue
            site = toy.site(CLIENTS[client_id])
            site.kept = self.kept.get(client_id, {})
            upload = self.algorithm.local_update(task, site)
            self.kept[client_id] = site.kept
            self.uploads.append(replace(upload, metrics={**upload.metrics, "seconds": 1.5}))
            yield self.uploads[-1]


class Observer(rounds.Unwatched):
    def __init__(self) -> None:
        self.heard: list[tuple[int, bool]] = []

    def client_done(self, round: int, result: exchange.UploadRecord | Failure) -> None:
        self.heard.append((result.client_id, isinstance(result, Failure)))


def run(engine: Engine, num_rounds: int = 1, **options: Any) -> tuple[FedAFState, list[rounds.RoundRecord]]:
    found = list(
        rounds.run_rounds(
            engine.algorithm, engine, CLIENTS, lambda d: {"loss": 0.0}, num_rounds=num_rounds, seed=2,
            server=toy.server, **options,
        )
    )  # fmt: skip
    return found[-1][0], [record for _, record in found]


# --- a round --------------------------------------------------------------------------------------------------------


def test_a_round_has_two_exchanges_and_charges_both_of_them() -> None:
    engine, observer = Engine(fedaf()), Observer()
    state, (record,) = run(engine, observer=observer)
    assert [(task.plan.client_id, task.exchange) for task in engine.tasks] == [
        *((k, 1) for k in range(3)),
        *((k, 2) for k in range(3)),
    ]
    assert record.bytes_down == sum(map(exchange.download_bytes, engine.tasks))
    assert record.bytes_up == sum(tensors.num_bytes(upload.tensors) for upload in engine.uploads)
    assert [upload.bytes_up for upload in record.uploads] == [
        sum(tensors.num_bytes(upload.tensors) for upload in engine.uploads if upload.client_id == k) for k in range(3)
    ]
    assert [upload.metrics["seconds"] for upload in record.uploads] == [3.0] * 3
    assert observer.heard == [(0, False), (1, False), (2, False)]
    assert len(state.pools[0]["items"]) == record.facts["pool"] > 0
    assert "mid_round" in record.seconds


def test_the_second_download_is_the_peers_knowledge_alone_and_nothing_stays_with_the_client() -> None:
    engine = Engine(fedaf())
    run(engine)
    for task in engine.tasks[3:]:
        classes = len(task.extra["peers"])
        assert exchange.download_bytes(task) == 4 * classes * C
    assert engine.kept == {0: {}, 1: {}, 2: {}}


def test_the_communication_is_that_of_the_page() -> None:
    """Down w and C_k C; up C C + C, then IPC C_k (d + 1) + C_k C."""
    engine = Engine(fedaf(ipc=3))
    _, (record,) = run(engine)
    w = sum(rows * 2 + 2 * columns for rows, columns in list(SPEC.modules.values())[1:]) + C * toy.WIDTH + C
    classes = [len(task.extra["peers"]) for task in engine.tasks[3:]]
    assert record.bytes_down == 4 * sum(w + k * C for k in classes)
    assert record.bytes_up == 4 * sum(C * C + C + 3 * k * (toy.WIDTH + 1) + k * C for k in classes)


@pytest.mark.parametrize("exchange_number", [1, 2])
def test_a_client_that_fails_in_either_exchange_is_one_failure_and_the_round_goes_on(exchange_number: int) -> None:
    engine, observer = Engine(fedaf(), {1: exchange_number}), Observer()
    state, (record,) = run(engine, observer=observer)
    assert [failure.client_id for failure in record.failures] == [1]
    assert [upload.client_id for upload in record.uploads] == [0, 2]
    assert sorted(observer.heard) == [(0, False), (1, True), (2, False)]
    assert [task.plan.client_id for task in engine.tasks if task.exchange == 2] == (
        [0, 2] if exchange_number == 1 else [0, 1, 2]
    )
    assert state.pools


def test_a_round_in_which_no_message_comes_leaves_the_state() -> None:
    engine = Engine(fedaf(), dict.fromkeys(range(3), 1))
    state, (record,) = run(engine)
    assert not record.aggregated
    assert len(record.failures) == 3
    assert state.pools == ()
    assert all(task.exchange == 1 for task in engine.tasks)


def test_an_upload_of_another_shape_is_refused_by_name() -> None:
    class Greedy(Engine):
        def exchange(self, round: int, tasks: Iterator[Task]) -> Iterator[Upload | Failure]:
            for result in super().exchange(round, tasks):
                if isinstance(result, Upload) and "items" in result.tensors and result.client_id == 2:
                    items = torch.cat([result.tensors["items"]] * 2)
                    result = replace(result, tensors={**result.tensors, "items": items})
                yield result

    _, (record,) = run(Greedy(fedaf()))
    assert [failure.client_id for failure in record.failures] == [2]
    assert "items must have shape" in record.failures[0].reason


def test_runs_repeat_to_the_bit_and_pools_of_earlier_rounds_stay_as_long_as_they_are_asked_to() -> None:
    states = [run(Engine(fedaf(rounds_kept=2)), 3)[0] for _ in range(2)]
    assert tensors.digest(states[0].adapter) == tensors.digest(states[1].adapter)
    assert len(states[0].pools) == 2
    assert len(run(Engine(fedaf()), 3)[0].pools) == 1


# --- its steps ------------------------------------------------------------------------------------------------------


def test_peers_knowledge_is_the_mean_over_the_clients_that_have_the_class() -> None:
    algorithm = fedaf()
    state = algorithm.init(np.random.default_rng(0))
    logits = [torch.full((C, C), 1.0 + k) + torch.arange(3.0) for k in range(2)]
    present = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])]
    messages = [Upload(k, 5 + k, {"logits": logits[k], "present": present[k]}) for k in range(2)]
    plans = {k: replace(planning.frozen_from(SPEC, k, 2, 1), micro_batch=2, peak_bytes=7) for k in range(2)}
    first, second = algorithm.mid_round(state, plans, messages)
    torch.testing.assert_close(first.extra["peers"], torch.stack([logits[0][0], (logits[0][1] + logits[1][1]) / 2]))
    torch.testing.assert_close(second.extra["peers"], (logits[0] + logits[1])[1:2] / 2)
    assert first.plan.sends == {"items": (4, toy.WIDTH), "labels": (4,), "soft_labels": (2, C)}
    assert second.plan.sends == {"items": (2, toy.WIDTH), "labels": (2,), "soft_labels": (1, C)}
    assert (second.plan.micro_batch, second.plan.peak_bytes) == (2, 7)


def condensed(client: int, labels: list[float], soft: list[list[float]]) -> Upload:
    items = torch.full((len(labels), toy.WIDTH), float(client))
    return Upload(client, 4, {"items": items, "labels": torch.tensor(labels), "soft_labels": torch.tensor(soft)})


def test_the_pool_is_all_items_and_soft_labels_are_means_over_the_clients_that_sent_the_class() -> None:
    algorithm = fedaf()
    state = algorithm.init(np.random.default_rng(0))
    uploads = [
        condensed(0, [0.0, 0.0, 2.0, 2.0], [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]),
        condensed(1, [2.0, 2.0], [[0.3, 0.3, 0.4]]),
    ]
    (pool,) = algorithm.aggregate(state, iter(uploads)).pools
    assert pool["labels"].tolist() == [0, 0, 2, 2, 2, 2]
    assert pool["items"][:, 0].tolist() == [0, 0, 0, 0, 1, 1]
    torch.testing.assert_close(pool["soft_labels"], torch.tensor([[0.5, 0.3, 0.2], [0, 0, 0], [0.2, 0.2, 0.6]]))


@pytest.mark.parametrize("labels", [[0.5, 0.5], [3.0, 3.0], [-1.0, -1.0], [0.0, 1.0]])
def test_labels_that_are_no_classes_stop_nobody(labels: list[float]) -> None:
    algorithm = fedaf()
    state = algorithm.init(np.random.default_rng(0))
    good, bad = condensed(0, [1.0, 1.0], [[0.2, 0.6, 0.2]]), condensed(1, labels, [[0.2, 0.6, 0.2]])
    (pool,) = algorithm.aggregate(state, iter([bad, good])).pools
    assert pool["labels"].tolist() == [1, 1]
    assert algorithm.aggregate(state, iter([bad])).pools == ()


def test_clients_mix_their_own_fresh_draw_into_the_model() -> None:
    algorithm = fedaf(gamma=0.75)
    state = algorithm.init(np.random.default_rng(0))
    random = tensors.select(toy.random_adapter(SPEC, 2), state.adapter)
    plan = algorithm.plan(state, CLIENTS[:1], np.random.default_rng(0))[0]
    assert isinstance(plan, Plan)
    site = toy.site(CLIENTS[0])
    algorithm.local_update(Task(plan, random), site)
    w = site.kept[RESAMPLED]
    b = lora.b_name("blocks.2.linear")
    torch.testing.assert_close(w[b], 0.75 * random[b])  # the fresh B is zero
    fresh = (w["blocks.2.linear.lora_A"] - 0.75 * random["blocks.2.linear.lora_A"]) / 0.25
    assert 0 < float(fresh.abs().max()) <= 1 / toy.WIDTH**0.5
    torch.testing.assert_close(w["head.weight"], 0.75 * random["head.weight"] + 0.25 * SPEC.head["head.weight"])
    same = fedaf(gamma=1.0)
    same.local_update(Task(plan, random), site)
    assert tensors.digest(site.kept[RESAMPLED]) == tensors.digest(random)


def test_a_client_that_lost_the_first_exchange_fails() -> None:
    plan = replace(planning.frozen_from(SPEC, 0, 2, 1))
    with pytest.raises(ClientError, match="must have the model of the round's first exchange"):
        fedaf().local_update(Task(plan, {}, extra={"peers": torch.zeros(1, C)}, exchange=2), toy.site(CLIENTS[0]))


def test_blocks_below_the_items_have_no_pairs() -> None:
    state = fedaf().init(np.random.default_rng(0))
    assert lora.modules_of(state.adapter) == ("blocks.1.linear", "blocks.2.linear")


def test_a_client_takes_the_largest_pieces_that_fit_and_sits_out_where_none_do() -> None:
    small, large = 400, 1000
    plans = [replace(planning.frozen_from(SPEC, 0, 2, 1), micro_batch=size) for size in (None, 2)]
    traces = zip(plans, (large, small), strict=True)
    priced = replace(profile(), plans={key_of(plan, 8): WholeTrace(peak, 10, 0, 0) for plan, peak in traces})
    algorithm = replace(fedaf(), profile=priced)
    state = algorithm.init(np.random.default_rng(0))
    cohort = [replace(CLIENTS[0], memory_bytes=size) for size in (large, small, small - 1)]
    cohort = [replace(client, client_id=k) for k, client in enumerate(cohort)]
    rich, poor, none = algorithm.plan(state, cohort, np.random.default_rng(0))
    assert isinstance(rich, Plan)
    assert isinstance(poor, Plan)
    assert isinstance(none, LeftOut)
    assert (rich.micro_batch, rich.peak_bytes, poor.micro_batch, poor.peak_bytes) == (None, large, 2, small)
    assert none.needed_bytes == small


def test_the_server_fits_the_pool_and_says_how_well() -> None:
    algorithm = fedaf(server_steps=40)
    state, (record,) = run(Engine(algorithm))
    assert {"pool", "pool_loss", "pool_matching"} <= record.facts.keys()
    before = algorithm.init(rounds.generator(2, 0))
    assert tensors.digest(state.adapter) != tensors.digest(before.adapter)
    assert tensors.digest(state.adapter) == tensors.digest(algorithm.deploy(state).tensors)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": 1}, "mix must be at least 2, got 1"),
        ({"min_examples": 1}, "min_examples must be at least 2, got 1"),
        ({"ipc": 0}, "ipc must be at least 1, got 0"),
        ({"gamma": 1.5}, r"gamma must lie in 0\.\.1, got 1\.5"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"lam_loc": float("nan")}, "lam_loc must be at least 0, got nan"),
        ({"space": "pixels", "depth": 1}, "depth must be 0 where space is 'pixels'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fedaf(**options)


@pytest.mark.parametrize(
    ("safeguards", "message"),
    [
        (Safeguards(screening=Screening(max_norm_factor=3.0)), "screening must judge updates of an adapter"),
        (Safeguards(robust=Robust(rule="median")), "must replace a plain mean, got FedAF"),
        (
            Safeguards(private=ClientDP("client", clip=1.0, noise_multiplier=1.0, delta=1e-5)),
            "means of tensors from clients",
        ),
    ],
    ids=["screening", "robust", "private"],
)
def test_safeguards_of_averages_are_refused_before_the_run(safeguards: Safeguards, message: str) -> None:
    engine = Engine(fedaf())
    with pytest.raises(PlanError, match=message):
        run(engine, safeguards=safeguards)
    assert not engine.tasks


def test_a_second_plan_that_needs_more_or_is_for_somebody_else_is_refused() -> None:
    plan = replace(planning.frozen_from(SPEC, 1, 2, 1), peak_bytes=100)
    messages = [Upload(1, 4, {})]
    (task,) = exchange.second_tasks([Task(plan, {})], messages, {1: plan})
    assert task.exchange == 2
    with pytest.raises(PlanError, match="must need no more than the first, 100 bytes, got 101"):
        exchange.second_tasks([Task(replace(plan, peak_bytes=101), {})], messages, {1: plan})
    with pytest.raises(PlanError, match="must be for clients whose message came"):
        exchange.second_tasks([Task(plan, {})], [], {1: plan})


# --- a real architecture --------------------------------------------------------------------------------------------


def test_nothing_that_a_client_sends_is_one_of_its_examples() -> None:
    """Neither an item nor a row of what goes up is a real example's state, features or logits."""
    adapted = tiny.shared("dinov2")
    algorithm = FedAF(adapted.spec, None, rank=2, depth=1, ipc=3, iterations=8, mix=2)  # type: ignore[arg-type]
    training = TrainingSettings(learning_rate=0.1, batch_size=4)
    data = tiny.examples("dinov2", 7)
    site = Site(ClientProfile(0, 7, 10**9), ClientModel(adapted, data, training, learning_rate=0.1, seed=3))
    state = algorithm.init(np.random.default_rng(0))
    plan = planning.frozen_from(adapted.spec, 0, 2, 1)
    message = algorithm.local_update(Task(plan, state.adapter), site)
    has = message.tensors["present"] > 0
    upload = algorithm.local_update(Task(plan, {}, extra={"peers": message.tensors["logits"][has]}, exchange=2), site)
    reals = ModelLens(adapted, algorithm.condensation).real(next(data.batches(7)))
    for real in reals:
        for name, tensor in {**message.tensors, **upload.tensors}.items():
            if tensor.ndim > 1 and tensor.shape[1:] == real.shape[1:]:
                assert float(torch.cdist(tensor.flatten(1), real.flatten(1)).min()) > 1e-3, name
    assert upload.metrics["nearest_ratio"] > 0.01
    assert upload.tensors["items"].shape == (3 * int(has.sum()), *reals[0].shape[1:])
