"""Several clients in one pass, through the engine and real methods."""

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fedpilot import memory, planning, tensors
from fedpilot.engines.in_process import AHEAD, InProcess
from fedpilot.errors import ClientError, TrainingError
from fedpilot.types import ClientProfile, Failure, Fit, Fitted, Plan, Site, Task, Tensors, Upload
from tests import joint, tiny, toy
from tests.joint import relative

CLOSE = 1e-6
"""Bound on the distance of two tensors over the norm of one, for rules that do not blow roundings up as AdamW does."""


# --- methods, round by round ------------------------------------------------------------------------------------------

METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedit": {"rank": 3},
    "ffa-lora": {"rank": 3},
    "lora-fair": {"rank": 3},
    "hetlora": {"r_min": 2, "r_max": 5, "gamma": 0.6, "lam": 0.05},
    "fed-pilot": {"rank": 3, "ig_examples": 4, "warmup_rounds": 0, "refresh_every": 1},
    "fedex-lora": {"rank": 3},
    "flora": {"r_min": 1, "r_max": 3},
    "flexlora": {"r_min": 1, "r_max": 3},
    "fedra": {"rank": 3},
    "xgblora": {"blocks_per_round": 1},
    "fed-hello": {"rank": 3, "fim_examples": 3, "warmup_rounds": 0, "refresh_every": 1},
}
SIZES = (10, 7, 13, 4, 9)
SMALL = (1, 3)
"""Clients with less memory, where the method makes a difference."""


def budgets(method: Any, name: str) -> dict[int, int]:
    """What is enough for the smallest rank, or for the top block alone."""
    spec = method.spec
    if name in ("hetlora", "flora", "flexlora"):
        least = planning.train_all(spec, 0, method.r_min)
    elif name in ("fed-pilot", "fed-hello"):
        least = planning.train_blocks(spec, 0, method.rank, [spec.num_blocks - 1])
    else:
        return {}
    return dict.fromkeys(SMALL, memory.peak_bytes(method.profile, least))


def both(name: str, family: str, per_pass: int = 3, **options: Any) -> tuple[joint.Run, joint.Run]:
    """A method's rounds with several clients in a pass, and with one."""
    method = joint.method(name, family, **METHODS[name])
    settings = {"sizes": SIZES, "budgets": budgets(method, name), **options}
    return joint.run(method, family, per_pass, **settings), joint.run(method, family, 1, **settings)


def check_same(several: joint.Run, one: joint.Run, close: float = CLOSE) -> None:
    assert relative(several.adapter, one.adapter) < close
    for ours, theirs in zip(several.records, one.records, strict=True):
        assert [up.client_id for up in ours.uploads] == [up.client_id for up in theirs.uploads]
        assert ours.failures == theirs.failures
        assert (ours.bytes_up, ours.bytes_down) == (theirs.bytes_up, theirs.bytes_down)
        for a, b in zip(ours.uploads, theirs.uploads, strict=True):
            assert a.metrics.keys() == {*b.metrics, "clients_in_pass"}
            for metric, value in b.metrics.items():
                if metric != "seconds":
                    assert a.metrics[metric] == pytest.approx(value, rel=1e-5), metric


@pytest.mark.parametrize("name", METHODS)
def test_a_method_comes_to_the_same_adapter_and_the_same_metrics(name: str) -> None:
    several, one = both(name, "vit")
    # FlexLoRA decomposes its mean anew in each round, and small singular directions blow the roundings up: 1.1e-6.
    check_same(several, one, close=5e-6 if name == "flexlora" else CLOSE)
    shared = several.metrics("clients_in_pass")
    assert max(shared) > 1
    if name in ("hetlora", "fed-pilot", "flora", "flexlora"):  # three who can do all, two who cannot
        assert shared[:5] == [3.0, 2.0, 3.0, 2.0, 3.0]
    elif name in ("fedit", "ffa-lora", "lora-fair", "fedex-lora", "xgblora"):
        assert shared == [3.0, 2.0, 3.0, 2.0, 3.0] * 2


@pytest.mark.parametrize(
    ("name", "family"), [("fedit", "bert"), ("fed-pilot", "bert"), ("fedit", "llama"), ("hetlora", "llama")]
)
def test_other_families_agree_as_well(name: str, family: str) -> None:
    several, one = both(name, family, learning_rate=0.01)
    check_same(several, one)
    assert max(several.metrics("clients_in_pass")) > 1


def test_a_small_client_had_another_plan_and_scores_were_measured_on_the_way() -> None:
    several, _ = both("fed-pilot", "vit")
    plans = several.records[0].plans
    assert set(plans[1].trained) < set(plans[0].trained)
    assert any(metric.startswith("score/") for metric in several.records[0].uploads[0].metrics)


# --- what trains by itself all the same -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("galore", {"rank": 2, "gap": 1}),
        ("ffa-lora", {"rank": 3, "epsilon": 50.0, "delta": 1e-3, "num_rounds": 2, "batch_size": 4}),
    ],
    ids=["projected gradients", "clipping by example"],
)
def test_a_method_that_cannot_share_a_pass_is_the_same_to_the_bit(name: str, options: Mapping[str, Any]) -> None:
    method = joint.method(name, "vit", **options)
    settings = {"optimiser": "adamw", "learning_rate": 0.01}
    several, one = (joint.run(method, "vit", k, **settings) for k in (3, 1))
    assert tensors.digest(several.adapter) == tensors.digest(one.adapter)
    assert set(several.metrics("clients_in_pass")) == {1.0}


def test_dropout_keeps_clients_apart_and_their_bits_as_they_were() -> None:
    dropping = tiny.build("vit", dropout=0.2)
    method = joint.method("fedit", "vit", rank=3)
    several, one = (joint.run(method, "vit", k, adapted=dropping) for k in (3, 1))
    assert tensors.digest(several.adapter) == tensors.digest(one.adapter)
    assert set(several.metrics("clients_in_pass")) == {1.0}


def test_without_passes_nothing_is_said_of_them() -> None:
    method = joint.method("fedit", "vit", rank=3)
    assert "clients_in_pass" not in joint.run(method, "vit", 1, rounds=1).records[0].uploads[0].metrics


# --- the engine, with a stand-in for the pass -------------------------------------------------------------------------


@dataclass
class Twice:
    """Fits by doubling everything; clients are alike whose plans have the same ``micro_batch``, unless it is 1."""

    clients_per_pass: int = 3
    refuses: bool = False
    breaks: bool = False
    fails: tuple[int, ...] = ()
    most: int = 99
    passes: list[list[int]] = field(default_factory=list)

    def likeness(self, model: object, task: Task) -> object:
        return None if task.plan.micro_batch == 1 else task.plan.micro_batch

    def room(self, model: object, task: Task) -> int:
        return min(self.most, self.clients_per_pass)

    def fit(self, fits: Sequence[Fit]) -> list[Fitted | ClientError] | None:
        self.passes.append([fit.task.plan.client_id for fit in fits])
        assert len(fits) > 1
        if self.breaks:
            raise ZeroDivisionError("a bug")
        return None if self.refuses else [self.fitted(fit) for fit in fits]

    def fitted(self, fit: Fit) -> Fitted | ClientError:
        if fit.task.plan.client_id in self.fails:
            return TrainingError("no luck")
        return Fitted({"seconds": 3.0, "loss": 1.0}, {name: 2 * t for name, t in fit.task.tensors.items()})


class Own:
    """A client's model that does the same, and notes what it is asked."""

    def __init__(self, client_id: int, log: list[str]) -> None:
        self.client_id, self.log = client_id, log
        self.tensors: Tensors = {}
        self.seed = 7

    def load(self, task: Task) -> None:
        self.log.append(f"{self.client_id} loads {float(task.tensors['x'][0])}")
        self.tensors = task.tensors

    def fit(self, trainable: frozenset[str], **how: Any) -> Mapping[str, float]:
        self.log.append(f"{self.client_id} fits")
        self.tensors = {name: 2 * tensor for name, tensor in self.tensors.items()}
        return {"loss": 1.0}

    def gradients(self, names: frozenset[str], *, num_examples: int, squared: bool = False) -> Tensors:
        self.log.append(f"{self.client_id} measures on {threading.current_thread() is threading.main_thread()}")
        if num_examples == 0:
            raise TrainingError("nothing to measure on")
        return self.tensors

    def read(self) -> Tensors:
        return self.tensors


@dataclass
class Fitting:
    """Fits once or more, with whatever else a test wants around it."""

    fits: int = 1
    measures: bool = False
    fails: Mapping[int, Exception] = field(default_factory=dict)
    fails_after: Mapping[int, Exception] = field(default_factory=dict)
    by_itself: bool = False

    def local_update(self, task: Task, site: Site) -> Upload:
        client_id = site.profile.client_id
        site.kept["asked"] = {"times": site.kept.get("asked", {"times": torch.zeros(1)})["times"] + 1}
        site.model.load(task)
        if client_id in self.fails:
            raise self.fails[client_id]
        metrics: dict[str, float] = {}
        for _ in range(self.fits):
            if self.measures:
                metrics["gradient"] = float(site.model.gradients(frozenset("x"), num_examples=1)["x"][0])
            metrics |= site.model.fit(task.plan.trainable)
        if self.by_itself:
            metrics["seed"] = site.model.seed  # type: ignore[attr-defined]
            metrics |= site.model.fit(task.plan.trainable)
        if client_id in self.fails_after:
            raise self.fails_after[client_id]
        return site.upload(task.plan, metrics)


def tasks(*client_ids: int, kinds: Sequence[int] = ()) -> list[Task]:
    chosen = kinds or [2] * len(client_ids)
    return [
        Task(Plan(k, {}, frozenset({"x"}), micro_batch=kind), {"x": torch.tensor([float(k)])})
        for k, kind in zip(client_ids, chosen, strict=True)
    ]


def engine(algorithm: Any, together: Any, log: list[str] | None = None) -> InProcess:
    def site_for(client_id: int, round: int) -> Site:
        if client_id == 99:
            raise TrainingError("client has no data")
        return Site(ClientProfile(client_id, 10, 0), Own(client_id, [] if log is None else log))

    return InProcess(algorithm, site_for, together=together)


def values(results: Sequence[Upload | Failure]) -> list[object]:
    return [float(r.tensors["x"][0]) if isinstance(r, Upload) else r.reason for r in results]


def test_clients_that_are_alike_share_a_pass_wherever_they_stand_and_results_keep_the_tasks_order() -> None:
    together = Twice()
    results = list(engine(Fitting(), together).exchange(1, tasks(1, 2, 3, 4, 5, 6, kinds=(2, 3, 2, 1, 3, 2))))
    assert together.passes == [[1, 3, 6], [2, 5]]
    assert [result.client_id for result in results] == [1, 2, 3, 4, 5, 6]
    assert values(results) == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert [up.metrics["clients_in_pass"] for up in results if isinstance(up, Upload)] == [3, 2, 3, 1, 2, 3]


def test_passes_are_as_evenly_full_as_can_be_and_no_larger_than_there_is_room_for() -> None:
    together = Twice()
    list(engine(Fitting(), together).exchange(1, tasks(1, 2, 3, 4)))
    assert together.passes == [[1, 3], [2, 4]]
    together = Twice(clients_per_pass=4, most=2)
    list(engine(Fitting(), together).exchange(1, tasks(1, 2, 3, 4, 5, 6)))
    assert [len(clients) for clients in together.passes] == [2, 2, 2]


def test_clients_fit_as_often_as_they_like_and_measure_from_what_they_hold() -> None:
    log: list[str] = []
    together = Twice()
    results = list(engine(Fitting(fits=2, measures=True), together, log).exchange(1, tasks(1, 2)))
    assert together.passes == [[1, 2], [1, 2]]
    assert values(results) == [4.0, 8.0]
    assert log == [
        *("1 loads 1.0", "1 measures on True", "2 loads 2.0", "2 measures on True"),
        *("1 loads 2.0", "1 measures on True", "2 loads 4.0", "2 measures on True"),
    ]
    assert [up.metrics["gradient"] for up in results if isinstance(up, Upload)] == [2.0, 4.0]


def test_what_cannot_be_fitted_together_is_fitted_one_by_one() -> None:
    log: list[str] = []
    results = list(engine(Fitting(fits=2), Twice(refuses=True), log).exchange(1, tasks(1, 2)))
    assert values(results) == [4.0, 8.0]
    assert log == ["1 loads 1.0", "1 fits", "2 loads 2.0", "2 fits", "1 loads 2.0", "1 fits", "2 loads 4.0", "2 fits"]
    assert [up.metrics["clients_in_pass"] for up in results if isinstance(up, Upload)] == [1, 1]


def test_whatever_else_a_model_can_do_is_done_by_its_own() -> None:
    log: list[str] = []
    results = list(engine(Fitting(by_itself=True), Twice(), log).exchange(1, tasks(1, 2)))
    assert values(results) == [4.0, 8.0]
    assert log == ["1 loads 2.0", "1 fits", "2 loads 4.0", "2 fits"]
    assert [up.metrics["seed"] for up in results if isinstance(up, Upload)] == [7, 7]


def test_a_client_that_fails_before_within_or_after_the_fit_is_recorded_and_the_others_go_on() -> None:
    algorithm = Fitting(fails={1: TrainingError("before")}, fails_after={4: TrainingError("after")})
    results = list(engine(algorithm, Twice(clients_per_pass=6, fails=(3,))).exchange(1, tasks(1, 2, 3, 4, 99, 5)))
    assert values(results) == ["before", 4.0, "no luck", "after", "client has no data", 10.0]
    one = engine(Fitting(fails={1: TrainingError("before")}), Twice())
    (_, upload) = one.exchange(1, tasks(1, 2))
    assert isinstance(upload, Upload)
    assert upload.metrics["clients_in_pass"] == 1  # it was the only one left


def test_a_failed_measurement_is_raised_where_the_client_asked_for_it() -> None:
    class Measuring(Fitting):
        def local_update(self, task: Task, site: Site) -> Upload:
            site.model.load(task)
            with pytest.raises(TrainingError, match="nothing to measure on"):
                site.model.gradients(frozenset("x"), num_examples=0)
            return super().local_update(task, site)

    assert values(list(engine(Measuring(), Twice()).exchange(1, tasks(1, 2)))) == [2.0, 4.0]


@pytest.mark.parametrize("where", ["before", "after", "pass"])
def test_any_other_error_stops_the_run_says_whose_it_was_and_leaves_no_thread(where: str) -> None:
    before, bug = threading.active_count(), {2: ZeroDivisionError("a bug")}
    algorithm = Fitting(fails=bug if where == "before" else {}, fails_after=bug if where == "after" else {})
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        list(engine(algorithm, Twice(breaks=where == "pass")).exchange(7, tasks(1, 2, 3)))
    wanted = "raised in one pass of clients 1, 2, 3" if where == "pass" else "raised by client 2 in round 7"
    assert caught.value.__notes__ == [wanted]
    assert threading.active_count() == before


def test_an_interrupt_in_the_pass_ends_all_threads() -> None:
    class Interrupted(Twice):
        def fit(self, fits: Sequence[Fit]) -> list[Fitted | ClientError] | None:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        list(engine(Fitting(), Interrupted()).exchange(1, tasks(1, 2, 3)))
    assert threading.active_count() == before


def test_a_client_reads_what_it_holds_and_cannot_change_it_by_that() -> None:
    class Spoiling(Fitting):
        def local_update(self, task: Task, site: Site) -> Upload:
            site.model.load(task)
            site.model.read()["x"].zero_()
            site.model.fit(task.plan.trainable)
            site.model.read()["x"].zero_()
            return site.upload(task.plan, {})

    given = tasks(1, 2)
    assert values(list(engine(Spoiling(), Twice()).exchange(1, given))) == [2.0, 4.0]
    assert [float(task.tensors["x"][0]) for task in given] == [1.0, 2.0]


def test_seconds_are_the_clients_own_and_its_share_of_the_pass() -> None:
    (one, other) = engine(Fitting(), Twice()).exchange(1, tasks(1, 2))
    for upload in (one, other):
        assert isinstance(upload, Upload)
        assert 3.0 < upload.metrics["seconds"] < 3.5


def test_what_clients_keep_comes_back_and_a_failed_round_leaves_it() -> None:
    algorithm = Fitting()
    running = engine(algorithm, Twice())
    list(running.exchange(1, tasks(1, 2)))
    algorithm.fails_after = {2: TrainingError("out of luck")}
    list(running.exchange(2, tasks(1, 2)))
    times = {client_id: kept["asked"]["times"].item() for client_id, kept in running.snapshot().items()}
    assert times == {1: 2.0, 2: 1.0}


def test_tasks_of_a_few_passes_are_read_ahead_and_no_more() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def lazily() -> Iterator[Task]:
        for task in tasks(*range(1, 30)):
            copy = replace(task, tensors={"x": task.tensors["x"].clone()})
            alive.append(weakref.ref(copy.tensors["x"]))
            yield copy
            del copy

    results = engine(Fitting(), Twice(clients_per_pass=2)).exchange(1, lazily())
    assert len(alive) == 0
    next(results)
    assert len(alive) == AHEAD * 2
    assert len(list(results)) == 28
    assert sum(ref() is not None for ref in alive) == 0


def test_a_model_that_knows_nothing_of_passes_trains_by_itself() -> None:
    from fedpilot.together import Together

    def site_for(client_id: int, round: int) -> Site:
        return toy.site(ClientProfile(client_id, 9, 0))

    adapter = toy.random_adapter(toy.spec(), 2)
    ranks = dict.fromkeys(toy.spec().modules, 2)
    given = [Task(Plan(k, ranks, frozenset(adapter)), adapter) for k in (1, 2)]
    several = list(InProcess(Fitting(), site_for, together=Together(2)).exchange(1, given))
    one = list(InProcess(Fitting(), site_for).exchange(1, given))
    for ours, theirs in zip(several, one, strict=True):
        assert isinstance(ours, Upload)
        assert isinstance(theirs, Upload)
        assert tensors.digest(ours.tensors) == tensors.digest(theirs.tensors)
        assert ours.metrics["clients_in_pass"] == 1
