"""The loop, over clients whose numbers can be added up by hand."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpilot import tensors
from fedpilot.algorithms import FedExLoRA, FedIT, FedRA, FFALoRA, LoRAFair
from fedpilot.engines.in_process import InProcess
from fedpilot.errors import ConfigError, PlanError
from fedpilot.exchange import UploadRecord
from fedpilot.manifest import manifest
from fedpilot.memory import MemoryProfile
from fedpilot.record import RunDirectory
from fedpilot.rounds import SAMPLING, RoundRecord, generator, hardest, run_rounds, sample
from fedpilot.runs import train
from fedpilot.stopping import EarlyStop, Goal
from fedpilot.types import (
    BaseDelta,
    ClientProfile,
    Deployment,
    Engine,
    Failure,
    Fresh,
    LeftOut,
    ModelSpec,
    Plan,
    Site,
    Task,
    Tensors,
    Upload,
)
from tests import toy

A, B, HEAD = "block.0.linear.lora_A", "block.0.linear.lora_B", "head.bias"
SPEC = ModelSpec(
    modules={"block.0.linear": (3, 2), "block.1.linear": (5, 3)},
    block_of={"block.0.linear": 0, "block.1.linear": 1},
    num_blocks=2,
    scale=1.0,
    head={HEAD: torch.zeros(4)},
)
START = {A: torch.zeros(2, 2), B: torch.zeros(3, 2), HEAD: torch.zeros(4)}
CLIENTS = (ClientProfile(1, 10, 1000), ClientProfile(2, 30, 1000))
BYTES = 4 * (4 + 6 + 4)


@dataclass(frozen=True)
class Adding:
    """Everybody trains block 0 at rank 2 and the head; the server takes the mean by examples."""

    spec: ModelSpec = SPEC
    entries: Mapping[int, LeftOut] = field(default_factory=dict)
    peak_bytes: int = 900

    def init(self, rng: np.random.Generator) -> Tensors:
        return dict(START)

    def plan(self, state: Tensors, cohort: Sequence[ClientProfile], rng: np.random.Generator) -> list[Plan | LeftOut]:
        plan = Plan(0, {"block.0.linear": 2}, frozenset(START), peak_bytes=self.peak_bytes)
        return [self.entries.get(c.client_id, replace(plan, client_id=c.client_id)) for c in cohort]

    def distribute(self, state: Tensors, plan: Plan) -> Task:
        return Task(plan, {name: tensor.clone() for name, tensor in state.items()})

    def local_update(self, task: Task, site: Site) -> Upload:
        raise AssertionError("the tests' engine makes the uploads")

    def aggregate(self, state: Tensors, uploads: Iterable[Upload]) -> Tensors:
        total, sums = 0, {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for upload in uploads:
            total += upload.num_examples
            for name, tensor in upload.tensors.items():
                sums[name] += upload.num_examples * tensor
            del upload  # or the loop's variable would hold it while the next client trains
        assert total > 0
        return {name: tensor / total for name, tensor in sums.items()}

    def deploy(self, state: Tensors) -> Deployment:
        return Deployment(state)


Answer = Callable[[Task], Upload | Failure]


def added(task: Task) -> Upload:
    """What it got, plus its client's number."""
    step = float(task.plan.client_id)
    sent = {name: tensor + step for name, tensor in task.tensors.items()}
    examples = {client.client_id: client.num_examples for client in CLIENTS}
    return Upload(task.plan.client_id, examples[task.plan.client_id], sent, {"loss": step / 2})


class Answers:
    """An engine with an answer for each client."""

    def __init__(self, answers: Mapping[int, Answer] | None = None) -> None:
        self.answers = answers or {}

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        return map(self.answer, tasks)

    def answer(self, task: Task) -> Upload | Failure:
        return self.answers.get(task.plan.client_id, added)(task)


def mean_head(deployment: Deployment) -> dict[str, float]:
    return {"head": float(deployment.tensors[HEAD].mean())}


def one_round(engine: Engine, algorithm: Adding | None = None) -> tuple[Tensors, RoundRecord]:
    [(state, record)] = run_rounds(algorithm or Adding(), engine, CLIENTS, mean_head, num_rounds=1, seed=0)
    return state, record


def test_two_clients_make_the_mean_by_examples() -> None:
    state, record = one_round(Answers())
    assert torch.equal(state[B], torch.full((3, 2), (10 * 1 + 30 * 2) / 40))
    assert record.metrics == {"head": 1.75}
    assert record.aggregated


def test_rounds_follow_each_other_and_a_later_start_goes_on_from_a_state() -> None:
    whole = list(run_rounds(Adding(), Answers(), CLIENTS, mean_head, num_rounds=3, seed=0))
    rest = list(
        run_rounds(Adding(), Answers(), CLIENTS, mean_head, num_rounds=3, seed=0, first_round=3, state=whole[1][0])
    )
    assert [record.metrics["head"] for _, record in whole] == [1.75, 3.5, 5.25]
    assert [record.round for _, record in rest] == [3]
    assert torch.equal(rest[0][0][A], whole[2][0][A])


@dataclass(frozen=True)
class Refining(Adding):
    """The server adds 100 before the first round, and after each aggregation the number that its site has."""

    def prepare(self, state: Tensors, server: Site) -> Tensors:
        assert server.profile.num_examples == 0  # of round 0
        return {name: tensor + 100 for name, tensor in state.items()}

    def refine(self, state: Tensors, server: Site) -> Tensors:
        return {name: tensor + server.profile.num_examples for name, tensor in state.items()}

    def deploy_more(self, state: Tensors) -> Mapping[str, Deployment]:
        return {"half": Deployment({name: tensor / 2 for name, tensor in state.items()})}


def server_site(round: int) -> Site:
    return Site(ClientProfile(-1, 1000 * round, 0), toy.ToyModel(1, 0))


def test_the_server_prepares_once_and_refines_after_each_aggregation_with_the_rounds_own_site() -> None:
    def run(**options: Any) -> list[tuple[Tensors, RoundRecord]]:
        return list(run_rounds(Refining(), Answers(), CLIENTS, mean_head, seed=0, server=server_site, **options))

    whole = run(num_rounds=2)
    assert [record.metrics["head"] for _, record in whole] == [100 + 1.75 + 1000, 100 + 2 * 1.75 + 3000]
    assert all("refine" in record.seconds for _, record in whole)
    (again,) = run(num_rounds=2, first_round=2, state=whole[0][0])
    assert torch.equal(again[0][A], whole[1][0][A])  # a state that is given is not prepared again


def test_a_round_in_which_nobody_delivers_is_not_refined() -> None:
    nobody = Answers({1: lambda t: Failure(1, "no"), 2: lambda t: Failure(2, "no")})
    ((state, record),) = run_rounds(Refining(), nobody, CLIENTS, mean_head, num_rounds=1, seed=0, server=server_site)
    assert torch.equal(state[HEAD], torch.full((4,), 100.0))
    assert "refine" not in record.seconds


def test_a_further_deployment_is_measured_under_its_prefix() -> None:
    ((_, record),) = run_rounds(Refining(), Answers(), CLIENTS, mean_head, num_rounds=1, seed=0, server=server_site)
    assert record.metrics == {"head": 1101.75, "half_head": 1101.75 / 2}


def test_a_method_that_trains_on_the_server_is_refused_where_there_is_no_site_for_it() -> None:
    with pytest.raises(PlanError, match="Refining trains on the server and must have a site there, got none"):
        next(run_rounds(Refining(), Answers(), CLIENTS, mean_head, num_rounds=1, seed=0))


def test_the_record_says_who_trained_what_and_how_many_bytes_went() -> None:
    _, record = one_round(Answers())
    plan = record.plans[1]
    assert (plan.client_id, plan.budget_bytes, plan.peak_bytes) == (2, 1000, 900)
    assert (plan.trained, plan.ranks) == ((0,), {0: 2})
    assert record.uploads[1] == UploadRecord(2, 30, BYTES, {"loss": 1.0})
    assert (record.bytes_down, record.bytes_up) == (2 * BYTES, 2 * BYTES)
    assert set(record.seconds) == {"plan", "distribute", "clients", "aggregate", "evaluate", "total"}
    assert sum(record.seconds.values()) <= 2 * record.seconds["total"]


def test_a_change_of_the_base_is_charged_to_the_download() -> None:
    @dataclass(frozen=True)
    class Merging(Adding):
        def distribute(self, state: Tensors, plan: Plan) -> Task:
            steps = tuple({"m.base_A": torch.ones(1, 5), "m.base_B": torch.full((9, 1), x)} for x in (0.0, 1.0))
            held = {1: 0, 2: 1}[plan.client_id]  # the second client has the first step already
            return Task(plan, state, BaseDelta(2, steps=steps, since=held))

    _, record = one_round(Answers(), Merging())
    assert record.bytes_down == 2 * BYTES + 3 * 4 * 14


def test_what_a_client_draws_itself_is_not_charged() -> None:
    @dataclass(frozen=True)
    class Drawing(Adding):
        def distribute(self, state: Tensors, plan: Plan) -> Task:
            return Task(plan, state, fresh=Fresh(seed=0, rank=2, names=frozenset({A})))

    _, record = one_round(Answers(), Drawing())
    assert record.bytes_down == 2 * (BYTES - 4 * START[A].numel())


def test_blocks_whose_modules_differ_in_rank_are_recorded_by_module() -> None:
    @dataclass(frozen=True)
    class Uneven(Adding):
        def plan(self, state: Tensors, cohort: Sequence[ClientProfile], rng: np.random.Generator) -> list[Plan]:
            return [Plan(c.client_id, {"q": 1, "v": 2}, frozenset({"q.lora_B"})) for c in cohort]

        def distribute(self, state: Tensors, plan: Plan) -> Task:
            return Task(plan, {"q.lora_B": torch.zeros(3, 1)})

        def aggregate(self, state: Tensors, uploads: Iterable[Upload]) -> Tensors:
            return state if list(uploads) else {}

    _, record = one_round(Answers(), Uneven(ModelSpec({"q": (3, 2), "v": (5, 2)}, {"q": 0, "v": 0}, 1, 1.0)))
    assert record.plans[0].ranks == {0: {"q": 1, "v": 2}}
    assert record.plans[0].trained == (0,)


def test_a_failed_client_is_recorded_and_the_others_count() -> None:
    state, record = one_round(Answers({1: lambda task: Failure(1, "out of memory")}))
    assert torch.equal(state[A], torch.full((2, 2), 2.0))
    assert record.failures == (Failure(1, "out of memory"),)
    assert [upload.client_id for upload in record.uploads] == [2]
    assert (record.bytes_down, record.bytes_up) == (2 * BYTES, BYTES)


def test_when_nobody_delivers_the_state_stays_and_the_record_says_so() -> None:
    fail: Answer = lambda task: Failure(task.plan.client_id, "gone")  # noqa: E731
    state, record = one_round(Answers({1: fail, 2: fail}))
    assert all(torch.equal(state[name], tensor) for name, tensor in START.items())
    assert not record.aggregated
    assert len(record.failures) == 2
    assert record.metrics == {"head": 0.0}


def test_left_out_clients_are_recorded_and_nothing_goes_to_them() -> None:
    left = LeftOut(1, "needs 2000 bytes", 2000)
    state, record = one_round(Answers(), Adding(entries={1: left}))
    assert record.left_out == (left,)
    assert record.bytes_down == BYTES
    assert torch.equal(state[HEAD], torch.full((4,), 2.0))


def test_a_round_in_which_everybody_is_left_out_keeps_the_state() -> None:
    left = {client.client_id: LeftOut(client.client_id, "too small") for client in CLIENTS}
    state, record = one_round(Answers(), Adding(entries=left))
    assert not record.aggregated
    assert (record.plans, record.uploads, record.bytes_down) == ((), (), 0)
    assert torch.equal(state[A], START[A])


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Answer:
    def answer(task: Task) -> Upload:
        upload = added(task)
        tensors = dict(upload.tensors)
        change(tensors)
        return replace(upload, tensors=tensors)

    return answer


BAD = {
    "nan": (with_tensors(lambda t: t[B].fill_(math.nan)), f"{B} must be finite, got 6 entries"),
    "infinite": (with_tensors(lambda t: t[A][0].fill_(math.inf)), f"{A} must be finite, got 2 entries"),
    "missing": (with_tensors(lambda t: t.pop(A)), f"lacks {A}, adds none"),
    "extra": (with_tensors(lambda t: t.update(more=torch.zeros(1))), "lacks none, adds more"),
    "shape": (with_tensors(lambda t: t.update({HEAD: torch.zeros(5)})), r"must have shape \(4,\), got \(5,\)"),
    "transposed": (with_tensors(lambda t: t.update({B: t[B].T})), r"must have shape \(3, 2\), got \(2, 3\)"),
    "rank above": (
        with_tensors(lambda t: t.update({A: torch.zeros(3, 2), B: torch.zeros(3, 3)})),
        r"must have shape \(2, 2\), got \(3, 2\)",
    ),
    "rank zero": (
        with_tensors(lambda t: t.update({A: torch.zeros(0, 2), B: torch.zeros(3, 0)})),
        r"must have shape \(2, 2\), got \(0, 2\)",
    ),
    "ranks apart": (with_tensors(lambda t: t.update({A: t[A][:1]})), r"must have shape \(3, 1\), got \(3, 2\)"),
    "dtype": (with_tensors(lambda t: t.update({A: t[A].double()})), "must be torch.float32, got torch.float64"),
    "no examples": (lambda task: replace(added(task), num_examples=0), "num_examples must be positive, got 0"),
}


@pytest.mark.parametrize(("answer", "reason"), BAD.values(), ids=BAD.keys())
def test_an_upload_that_is_not_as_planned_becomes_a_failure(answer: Answer, reason: str) -> None:
    state, record = one_round(Answers({1: answer}))
    [failure] = record.failures
    assert failure.client_id == 1
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(failure.reason)
    assert torch.equal(state[A], torch.full((2, 2), 2.0))


def test_a_pair_may_come_back_pruned_to_a_smaller_rank() -> None:
    @dataclass(frozen=True)
    class Collecting(Adding):
        def aggregate(self, state: Tensors, uploads: Iterable[Upload]) -> Tensors:
            return {str(upload.client_id): upload.tensors[B] for upload in uploads}

        def deploy(self, state: Tensors) -> Deployment:
            return Deployment({HEAD: torch.zeros(1)})

    pruned = with_tensors(lambda t: t.update({A: t[A][:1], B: t[B][:, :1]}))
    state, record = one_round(Answers({1: pruned}), Collecting())
    assert record.failures == ()
    assert state["1"].shape == (3, 1)
    assert record.bytes_up == BYTES + 4 * (2 + 3 + 4)


def test_an_upload_that_nobody_asked_for_and_a_client_that_is_silent_are_failures() -> None:
    class Twice:
        def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
            first, _ = tasks
            yield added(first)
            yield added(first)

    state, record = one_round(Twice())
    assert [(failure.client_id, failure.reason[:30]) for failure in record.failures] == [
        (1, "upload must answer a task, got"),
        (2, "no result came back"),
    ]
    assert torch.equal(state[A], torch.full((2, 2), 1.0))


def test_at_most_one_task_and_one_upload_are_alive_at_a_time() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watch(tensor: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))

    @dataclass(frozen=True)
    class Watched(Adding):
        def distribute(self, state: Tensors, plan: Plan) -> Task:
            assert not any(ref() is not None for ref in alive)  # the last client's task and upload are gone
            task = super().distribute(state, plan)
            watch(task.tensors[A])
            return task

    def answer(task: Task) -> Upload:
        upload = added(task)
        watch(upload.tensors[A])
        return upload

    def refused(task: Task) -> Upload:
        return replace(answer(task), num_examples=-1)

    population = [ClientProfile(1, 1, 1000), *(replace(CLIENTS[1], client_id=k) for k in range(2, 8))]
    answers: dict[int, Answer] = {k: (lambda task: replace(answer_as(task, answer), num_examples=1)) for k in range(8)}
    answers[4] = lambda task: replace(answer_as(task, refused), num_examples=-1)
    [(_, record)] = run_rounds(Watched(), Answers(answers), population, mean_head, num_rounds=1, seed=0)
    assert (len(record.uploads), len(record.failures)) == (6, 1)
    assert len(alive) == 14
    assert most == 2  # a client's task and its upload


def answer_as(task: Task, answer: Answer) -> Upload:
    """The answer of client 1, under the task's own number."""
    upload = answer(replace(task, plan=replace(task.plan, client_id=1)))
    assert isinstance(upload, Upload)
    return replace(upload, client_id=task.plan.client_id)


def test_a_plan_over_its_budget_is_refused_with_both_figures() -> None:
    with pytest.raises(PlanError, match=r"client 1 must fit its budget of 1000 bytes, got .* 1001 bytes"):
        one_round(Answers(), Adding(peak_bytes=1001))


def test_plans_must_be_the_cohorts() -> None:
    with pytest.raises(PlanError, match=r"in its order \[1, 2\], got \[2, 2\]"):
        one_round(Answers(), Adding(entries={1: LeftOut(2, "mistaken")}))


def test_a_task_must_hold_what_its_plan_trains_at_the_planned_rank() -> None:
    @dataclass(frozen=True)
    class Short(Adding):
        def distribute(self, state: Tensors, plan: Plan) -> Task:
            return Task(plan, {name: tensor for name, tensor in state.items() if name != B})

    @dataclass(frozen=True)
    class Wide(Adding):
        def distribute(self, state: Tensors, plan: Plan) -> Task:
            return Task(plan, {**state, B: torch.zeros(3, 4)})

    with pytest.raises(PlanError, match=f"lacks {B}"):
        one_round(Answers(), Short())
    with pytest.raises(PlanError, match=r"planned rank 2, got shape \(3, 4\)"):
        one_round(Answers(), Wide())


def test_an_algorithm_that_leaves_uploads_unread_is_refused() -> None:
    @dataclass(frozen=True)
    class Hasty(Adding):
        def aggregate(self, state: Tensors, uploads: Iterable[Upload]) -> Tensors:
            return next(iter(uploads)).tensors

    with pytest.raises(PlanError, match=r"Hasty.aggregate must read every upload"):
        one_round(Answers(), Hasty())


def test_a_cohort_is_drawn_without_replacement_in_the_populations_order_and_again_the_same() -> None:
    population = [ClientProfile(k, 1, 1) for k in range(20)]
    drawn = [client.client_id for client in sample(population, 8, generator(5, 1, 0))]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 8
    assert drawn == [client.client_id for client in sample(population, 8, generator(5, 1, 0))]
    assert drawn != [client.client_id for client in sample(population, 8, generator(5, 2, 0))]
    assert sample(population, None, generator(5, 1, 0)) == population


@pytest.mark.parametrize("size", [0, 3])
def test_a_cohort_size_that_the_population_has_not_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"cohort_size must lie in 1\.\.2, got {size}"):
        next(run_rounds(Adding(), Answers(), CLIENTS, mean_head, num_rounds=1, seed=0, cohort_size=size))


class Nobody:
    """An engine that must not be asked."""

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        raise AssertionError(f"round {round} has begun")


@pytest.mark.parametrize(
    ("make", "odd", "message"),
    [
        (partial(FedIT, rank=2), {"memory_bytes": 1}, "client 17 must train everything with participation 'all'"),
        (partial(FedExLoRA, rank=2), {"memory_bytes": 1}, "client 17 must train everything"),
        (partial(LoRAFair, rank=2), {"num_steps": 40}, "client 17 must train everything .* deadline"),
        (partial(FFALoRA, rank=2), {"memory_bytes": 1}, "client 17 must train B at rank 2"),
        (
            partial(FFALoRA, rank=2, noise_multiplier=1.0, delta=0.01),
            {"num_examples": 100},
            "delta must be below 1 / 100, the examples of client 17",
        ),
    ],
)
def test_what_a_method_cannot_do_for_a_client_is_an_error_before_anybody_is_sampled(
    tmp_path: Path, profile: MemoryProfile, make: Any, odd: dict[str, Any], message: str
) -> None:
    """Whom it cannot serve is not in round 1; without being asked it would be found out when its turn comes."""
    algorithm = make(toy.spec(), profile)
    usual = ClientProfile(0, 10, 10**9, 2, deadline_s=1.0, flops_per_second=1e5)
    people = [replace(usual, client_id=k, **(odd if k == 17 else {})) for k in range(50)]
    assert 17 not in {client.client_id for client in sample(people, 3, generator(0, 1, SAMPLING))}
    directory = RunDirectory.create(tmp_path / "run", manifest({}, seed=0, dtype="float32"))
    with pytest.raises(PlanError, match=message):
        train(algorithm, Nobody(), people, lambda d: {"loss": 0.0}, directory, num_rounds=9, cohort_size=3)
    assert directory.lines() == []


def test_asking_beforehand_changes_nothing_that_a_run_draws(tmp_path: Path, profile: MemoryProfile) -> None:
    """`run_rounds` does not ask; FedRA's plans are drawn."""
    algorithm = FedRA(toy.spec(), profile, rank=2)
    people = [ClientProfile(k, 4 + k, 1500 + 150 * k) for k in range(6)]

    def engine() -> InProcess:
        return InProcess(algorithm, lambda client_id, round: toy.site(people[client_id]))

    def evaluate(deployment: Deployment) -> dict[str, float]:
        return {"loss": tensors.norm(deployment.tensors)}

    directory = RunDirectory.create(tmp_path / "run", manifest({}, seed=3, dtype="float32"))
    after = train(algorithm, engine(), people, evaluate, directory, num_rounds=3, cohort_size=2).state
    *_, (state, record) = run_rounds(algorithm, engine(), people, evaluate, num_rounds=3, seed=3, cohort_size=2)
    assert record.plans
    assert tensors.digest(after.adapter) == tensors.digest(state.adapter)


def test_a_few_hardest_clients_are_refused_where_anybody_is() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        people = [
            ClientProfile(
                k,
                int(rng.integers(1, 400)),
                int(rng.integers(1000)),
                int(rng.integers(1, 30)),
                deadline_s=float(rng.integers(1, 3)),
                flops_per_second=1.0,
            )
            for k in range(300)
        ]
        few = hardest(people)
        assert len(few) < 30
        for _ in range(200):
            small, large, late = rng.integers(0, 150), rng.integers(850, 1000), rng.integers(8, 30)
            fewest, most = rng.integers(1, 8), rng.integers(392, 401)

            def refused(
                client: ClientProfile,
                small: int = small,
                large: int = large,
                late: int = late,
                fewest: int = fewest,
                most: int = most,
            ) -> bool:
                """It needs the fewer bytes where it recomputes, for which it must have the time."""
                recomputes = client.memory_bytes < large
                in_time = client.num_steps * (2 if recomputes else 1) <= late * (client.deadline_s or 0)
                return client.memory_bytes < small or not in_time or not fewest <= client.num_examples <= most

            assert any(map(refused, few)) == any(map(refused, people))


def test_of_many_clients_few_are_asked() -> None:
    people = [ClientProfile(k, 64 + k % 700, 1000 * (1 + k % 4), 1 + (64 + k % 700) // 16) for k in range(100_000)]
    assert len(hardest(people)) <= 10
    assert hardest([]) == []


def test_a_population_must_have_clients_with_distinct_ids() -> None:
    for population in ([], [CLIENTS[0], CLIENTS[0]]):
        with pytest.raises(ConfigError, match="population must be clients with distinct ids"):
            next(run_rounds(Adding(), Answers(), population, mean_head, num_rounds=1, seed=0))


def test_facts_of_an_algorithm_that_explains_itself_are_recorded() -> None:
    @dataclass(frozen=True)
    class Open(Adding):
        def explain(self, state: Tensors) -> dict[str, float]:
            return {"first": float(state[A][0, 0])}

    _, record = one_round(Answers(), Open())
    assert record.facts == {"first": 1.75}


def test_an_observer_hears_of_the_plan_of_each_client_and_of_the_end() -> None:
    heard: list[str] = []

    class Listener:
        def round_started(self, round: int, plans: Sequence[Plan], left_out: Sequence[LeftOut]) -> None:
            heard.append(f"start {round}: {len(plans)} plans")

        def client_done(self, round: int, result: UploadRecord | Failure) -> None:
            done = result.metrics["loss"] if isinstance(result, UploadRecord) else result.reason
            heard.append(f"client {result.client_id}: {done}")

        def round_done(self, record: RoundRecord) -> None:
            heard.append(f"end {record.round}: {record.metrics['head']}")

    engine = Answers({1: lambda task: Failure(1, "gone")})
    list(run_rounds(Adding(), engine, CLIENTS, mean_head, num_rounds=1, seed=0, observer=Listener()))
    assert heard == ["start 1: 2 plans", "client 1: gone", "client 2: 1.0", "end 1: 2.0"]


def accuracies(*values: float) -> list[dict[str, float]]:
    return [{"accuracy": value} for value in values]


def test_patience_counts_rounds_since_the_last_gain() -> None:
    stop = EarlyStop(Goal("accuracy"), patience=2, min_delta=0.01)
    assert not stop.due(accuracies(0.5, 0.6, 0.605))
    assert stop.due(accuracies(0.5, 0.6, 0.605, 0.609))
    assert not stop.due(accuracies(0.5, 0.6, 0.605, 0.62))


def test_small_gains_add_up_against_the_best_that_counted() -> None:
    assert Goal("accuracy").best(accuracies(0.5, 0.506, 0.512), min_delta=0.01) == 2


def test_lower_may_be_better_and_nan_never_is() -> None:
    goal = Goal("accuracy", higher_is_better=False)
    assert goal.best(accuracies(math.nan, 0.4, 0.3, math.nan, 0.3)) == 2
    assert goal.best(accuracies(math.nan)) is None
    assert EarlyStop(goal, patience=2).due(accuracies(math.nan, math.nan))


def test_an_unknown_metric_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="one of accuracy, got 'acuracy'; did you mean 'accuracy'"):
        Goal("acuracy").best(accuracies(0.5))
