"""The outer loop: the one file that orders the steps of a round.

Randomness has no state: the generator of a step is made of the seed, the round and the step's number, so a resumed
run draws what the uninterrupted one would have drawn.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, Protocol, TypeAlias, runtime_checkable

import numpy as np

from fedpilot import margins, secure_round, tensors
from fedpilot.aggregation_error import AggregationError, global_model
from fedpilot.errors import ConfigError, PlanError
from fedpilot.exchange import Ahead, Clock, RoundResults, UploadRecord, second_tasks, whole_weights
from fedpilot.margins import Margins
from fedpilot.privacy import client_dp
from fedpilot.privacy.fixed_point import Sums
from fedpilot.privacy.secure_settings import SecureAggregation, weighs_by_examples
from fedpilot.safeguards import NONE, Safeguards
from fedpilot.screening import WINDOW, Norms, Screen
from fedpilot.secure_round import Agreement, SecureResults
from fedpilot.types import (
    Algorithm,
    Averages,
    Charges,
    ClientProfile,
    Deployment,
    DeploysMore,
    Engine,
    Exchanges,
    Failure,
    HasStepKind,
    LeftOut,
    ModelSpec,
    Plan,
    RefinesOnServer,
    Site,
    State,
    State_contra,
    StepKind,
    Task,
    Tensors,
    Upload,
)

logger = logging.getLogger(__name__)

Evaluate: TypeAlias = Callable[[Deployment], Mapping[str, float]]

ServerSite: TypeAlias = Callable[[int], Site]
"""Round -> the server's own site, for methods that train there; round 0 is the preparation."""

SAMPLING, PLANNING = 0, 1  # numbers of a round's random steps


def generator(seed: int, *step: int) -> np.random.Generator:
    """The generator of one step: ``(seed, 0)`` for the first state, ``(seed, round, SAMPLING)`` and so on after."""
    return np.random.default_rng([seed, *step])


def not_evaluated(deployment: Deployment) -> Mapping[str, float]:
    """The metrics of a round that is not evaluated: none."""
    return {}


def measured(algorithm: Algorithm[State], state: State, evaluate: Evaluate) -> dict[str, float]:
    """Metrics of all that the state deploys; those of a further deployment under its prefix, ``emulator_accuracy``."""
    metrics = dict(evaluate(algorithm.deploy(state)))
    if isinstance(algorithm, DeploysMore):
        for prefix, deployment in algorithm.deploy_more(state).items():
            metrics |= {f"{prefix}_{name}": value for name, value in evaluate(deployment).items()}
    return metrics


def first_state(algorithm: Algorithm[State], seed: int, server: ServerSite | None) -> State:
    """The state before round 1, prepared where the method prepares on the server; a function of seed and site.

    Raises:
        PlanError: The method trains on the server and there is no site for it.
    """
    check_server(algorithm, server)
    state = algorithm.init(generator(seed, 0))
    if isinstance(algorithm, RefinesOnServer):
        assert server is not None, "checked above"
        state = algorithm.prepare(state, server(0))
    return state


def check_server(algorithm: object, server: ServerSite | None) -> None:
    """Refuses a method that trains on the server where it cannot.

    Raises:
        PlanError: As said.
    """
    if isinstance(algorithm, RefinesOnServer) and server is None:
        raise PlanError(
            f"{type(algorithm).__name__} trains on the server and must have a site there, got none; "
            "give run_rounds or train a server"
        )


def check_clients(algorithm: Algorithm[State], state: State, population: Sequence[ClientProfile], seed: int) -> None:
    """Refuses a method that cannot serve a client, before any is sampled; draws nothing that the rounds draw.

    Raises:
        PlanError: As said.
    """
    asked = hardest(population)
    if asked:
        check_plans(algorithm.plan(state, asked, generator(seed, 0, PLANNING)), asked)


def hardest(population: Sequence[ClientProfile]) -> list[ClientProfile]:
    """A few clients, of whom a method refuses one if it refuses anybody.

    It refuses for too few bytes, for too many steps in a given time, or because of privacy for too few examples or too
    many; nothing is known of anybody yet. Of 100,000 clients of four tiers that is some ten, so planning them costs no
    more than a round does.

    >>> steps = {5: 1, 6: 3, 7: 2, 8: 9}
    >>> people = [ClientProfile(k, 10 + k, memory_bytes=k, num_steps=n) for k, n in steps.items()]
    >>> [client.client_id for client in hardest([*people, ClientProfile(9, 12, 100)])]
    [5, 6, 8, 9]
    """
    by_examples = sorted(population, key=lambda client: client.num_examples)
    kept = {client.client_id for client in (*by_examples[:1], *by_examples[-1:])}
    most_steps: dict[tuple[float | None, float | None], int] = {}
    for client in sorted(population, key=lambda client: (client.memory_bytes, -client.num_steps)):
        time = client.deadline_s, client.flops_per_second
        if client.num_steps > most_steps.get(time, -1):  # else one of no more bytes has as many steps to do
            most_steps[time] = client.num_steps
            kept.add(client.client_id)
    return [client for client in population if client.client_id in kept]


# --- what is recorded ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanRecord:
    """A plan in short: blocks instead of modules.

    Attributes:
        client_id: The client.
        budget_bytes: Its memory.
        trained: Blocks with at least one trained tensor, ascending.
        ranks: Block -> rank of its pairs; module -> rank where the block's modules differ.
        blocks: Blocks loaded; ``None`` means all.
        checkpointed: Blocks recomputed in the backward pass.
        micro_batch: Examples per forward pass; ``None`` means the whole batch.
        values: Block -> the value that the allocation maximised.
        peak_bytes: Predicted peak.
        seconds: Predicted seconds.
    """

    client_id: int
    budget_bytes: int
    trained: tuple[int, ...]
    ranks: Mapping[int, int | Mapping[str, int]]
    blocks: tuple[int, ...] | None = None
    checkpointed: tuple[int, ...] = ()
    micro_batch: int | None = None
    values: Mapping[int, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RoundRecord:
    """A round without its tensors; round 0 is the evaluation before any training.

    Attributes:
        round: From 1.
        plans: One for each client that was asked.
        left_out: Sampled clients for which nothing fits.
        uploads: What came back and was accepted.
        failures: Clients that were asked and did not deliver, or delivered something else.
        aggregated: Whether the round counts: false when nobody delivered, or fewer than the recipe's fewest. The state
            then stays but for what uploads that came have cost in privacy.
        bytes_down: Sent to clients, tensors only.
        bytes_up: Received from clients, tensors only, refused uploads included.
        bytes_base: Of ``bytes_down``: changes of the frozen base that clients lacked.
        metrics: Of the evaluation; empty where the round was not evaluated.
        facts: What the algorithm says of its new state; see `Explains`. ``epsilon`` is what a private run has cost.
        norms: Client -> norms of its update, in the order of arrival and refused ones included, where uploads are
            screened.
        margins: Client -> factor on its predicted bytes from the next round on, of those that ever ran out of memory.
        seconds: Phase -> seconds; phases do not overlap, ``total`` is the whole round.
    """

    round: int
    plans: tuple[PlanRecord, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    uploads: tuple[UploadRecord, ...] = ()
    failures: tuple[Failure, ...] = ()
    aggregated: bool = False
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_base: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[int, Norms] = field(default_factory=dict)
    margins: Margins = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Explains(Protocol[State_contra]):
    """An algorithm with numbers of its own to record each round (Fed-piLot's global scores)."""

    def explain(self, state: State_contra) -> Mapping[str, float]:
        """Name -> number, read off the state after aggregation."""


class Observer(Protocol):
    """Watches a run, for a live display; changes nothing."""

    def round_started(self, round: int, plans: Sequence[Plan], left_out: Sequence[LeftOut]) -> None:
        """The round is planned; nothing is sent yet."""

    def client_done(self, round: int, result: UploadRecord | Failure) -> None:
        """A client's result is in; ``result.metrics["loss"]`` is its mean training loss."""

    def round_done(self, record: RoundRecord) -> None:
        """The round is evaluated."""


class Unwatched:
    """The observer that looks away."""

    def round_started(self, round: int, plans: Sequence[Plan], left_out: Sequence[LeftOut]) -> None:
        """Nothing."""

    def client_done(self, round: int, result: UploadRecord | Failure) -> None:
        """Nothing."""

    def round_done(self, record: RoundRecord) -> None:
        """Nothing."""


def plan_record(plan: Plan, client: ClientProfile, spec: ModelSpec) -> PlanRecord:
    """The plan in short."""
    by_block: dict[int, dict[str, int]] = {}
    for module, rank in plan.ranks.items():
        by_block.setdefault(spec.block_of[module], {})[module] = int(rank)
    trained_modules = {name.rpartition(".")[0] for name in plan.trainable}
    return PlanRecord(
        client_id=plan.client_id,
        budget_bytes=int(client.memory_bytes),
        trained=tuple(sorted({spec.block_of[module] for module in trained_modules if module in spec.block_of})),
        ranks={
            block: next(iter(ranks.values())) if len(set(ranks.values())) == 1 else ranks
            for block, ranks in sorted(by_block.items())
        },
        blocks=plan.blocks,
        checkpointed=tuple(sorted(plan.checkpointed)),
        micro_batch=plan.micro_batch,
        values={block: float(value) for block, value in plan.values.items()},
        peak_bytes=plan.peak_bytes,
        seconds=plan.seconds,
    )


# --- the loop -----------------------------------------------------------------------------------------------------


def run_rounds(
    algorithm: Algorithm[State],
    engine: Engine,
    population: Sequence[ClientProfile],
    evaluate: Evaluate,
    *,
    num_rounds: int,
    seed: int,
    cohort_size: int | None = None,
    first_round: int = 1,
    state: State | None = None,
    observer: Observer | None = None,
    evaluated: Callable[[int], bool] = lambda round: True,
    measure_aggregation: bool = False,
    safeguards: Safeguards = NONE,
    norms: tuple[Norms, ...] = (),
    server: ServerSite | None = None,
    known: Margins | None = None,
) -> Iterator[tuple[State, RoundRecord]]:
    """Yields the state and the record after each round.

    Args:
        algorithm: The method.
        engine: Carries tasks to clients.
        population: All clients, ids distinct.
        evaluate: Metrics of a deployment.
        num_rounds: The last round.
        seed: Of everything that the server draws.
        cohort_size: Clients sampled each round; ``None`` for all.
        first_round: Where a resumed run goes on.
        state: State after round ``first_round - 1``; ``None`` for the algorithm's first.
        observer: Watches.
        evaluated: Whether a round is evaluated; others are recorded without metrics.
        measure_aggregation: Whether to record ``aggregation_error``, which a run with noise on the sum never does.
        safeguards: Screening, a robust rule, privacy of clients; the run ends where a privacy budget does.
        norms: Of updates in the rounds before ``first_round``, for screening; see `screening.recalled`.
        server: The server's site in a round, for methods that train there.
        known: Margins learnt before ``first_round``; see `margins.recalled`.

    Raises:
        ConfigError: The population or the cohort size cannot be used.
        PlanError: A plan exceeds its client's budget, or contradicts its task; or a safeguard cannot serve the method;
            or the method trains on the server and has no site there.
    """
    _check_population(population, cohort_size)
    safeguards.check(algorithm)
    check_server(algorithm, server)
    last = safeguards.last_round(num_rounds, population, cohort_size)
    private = safeguards.private
    current = first_state(algorithm, seed, server) if state is None else state
    watched = observer or Unwatched()
    learnt = known or {}
    for round in range(first_round, last + 1):
        draw = sample if safeguards.central is None else safeguards.central.sample
        drawn = draw(population, cohort_size, generator(seed, round, SAMPLING))
        cohort = [margins.applied(client, learnt) for client in drawn]
        current, record = run_round(
            algorithm,
            engine,
            cohort,
            evaluate if evaluated(round) else not_evaluated,
            current,
            round=round,
            seed=seed,
            observer=watched,
            measure_aggregation=measure_aggregation,
            safeguards=safeguards,
            norms=norms,
            expected_clients=cohort_size or len(population),
            server=server,
        )
        norms = (*norms, *record.norms.values())[-WINDOW:]
        learnt = _learnt(learnt, record)
        record = replace(record, margins=learnt)
        if private is not None:
            cost = private.facts(round, private.rate(len(population), cohort_size))
            record = replace(record, facts={**record.facts, **cost})
        watched.round_done(record)
        logger.info("round %d/%d: %s", round, num_rounds, summary(record))
        yield current, record
    if last < num_rounds:
        logger.warning("ended after round %d of %d: another one would exceed the privacy budget", last, num_rounds)


@dataclass(frozen=True)
class _Round(Generic[State]):
    """What the steps of one round share.

    Attributes:
        algorithm: The method.
        state: Before the round.
        engine: Carries tasks to clients.
        safeguards: Screening, a robust rule, privacy of clients.
        number: From 1.
        cohort: The sampled clients.
        plans: Of those that take part.
        screen: Of the updates' norms; ``None`` where nothing is screened.
        expected_clients: That a round samples; what noise is scaled to.
        seed: Of everything that the server draws.
        tell: Hears of each client once.
        clock: Of the round's phases.
    """

    algorithm: Algorithm[State]
    state: State
    engine: Engine
    safeguards: Safeguards
    number: int
    cohort: Sequence[ClientProfile]
    plans: Sequence[Plan]
    screen: Screen | None
    expected_clients: int
    seed: int
    tell: Callable[[UploadRecord | Failure], None]
    clock: Clock

    @property
    def seeds(self) -> list[int]:
        """Of the round's noise."""
        return [self.seed, self.number]

    @property
    def averages_updates(self) -> bool:
        """Whether the server sees each client's update, so that a mean of them can be held against the new state."""
        plain = self.safeguards.central is None and self.safeguards.secure is None
        # What is exchanged instead of pairs and weights has no mean that is one change of a weight.
        pairs = not isinstance(self.algorithm, Exchanges) and self.algorithm.deploy(self.state).attachment is None
        return plain and pairs

    def distribute(self, plan: Plan) -> Task:
        """What the planned client downloads."""
        return self.algorithm.distribute(self.state, plan)

    @property
    def trained(self) -> Tensors:
        """Global values of what the method trains: of method, settings and state, whoever was sampled."""
        kind = self.algorithm.step_kind if isinstance(self.algorithm, HasStepKind) else StepKind()
        present = client_dp.trained_by(global_model(self.algorithm, self.state).tensors, kind.patterns)
        how = self.algorithm.averaging if isinstance(self.algorithm, Averages) else None
        if how is None or not how.same_names:
            return present
        # All clients train the same, so what one does that fits everything says it, also where nobody takes part.
        ample = ClientProfile(client_dp.NOBODY, 1, 2**62)
        [plan] = self.algorithm.plan(self.state, [ample], generator(self.seed, self.number, PLANNING))
        assert isinstance(plan, Plan), "everything fits"
        return tensors.only(present, plan.trainable)


def run_round(
    algorithm: Algorithm[State],
    engine: Engine,
    cohort: Sequence[ClientProfile],
    evaluate: Evaluate,
    state: State,
    *,
    round: int,
    seed: int,
    observer: Observer,
    measure_aggregation: bool = False,
    safeguards: Safeguards = NONE,
    norms: tuple[Norms, ...] = (),
    expected_clients: int = 1,
    server: ServerSite | None = None,
) -> tuple[State, RoundRecord]:
    """One round: plan, distribute, local update, upload, aggregate, refine, evaluate, record."""
    clock, start = Clock(), time.perf_counter()
    with clock.phase("plan"):
        entries = algorithm.plan(state, cohort, generator(seed, round, PLANNING)) if cohort else []
        check_plans(entries, cohort)
    plans = [entry for entry in entries if isinstance(entry, Plan)]
    left_out = tuple(entry for entry in entries if isinstance(entry, LeftOut))
    observer.round_started(round, plans, left_out)

    screen = Screen(safeguards.screening, norms, algorithm.spec.scale) if safeguards.screening.on else None
    tell = partial(observer.client_done, round)
    this = _Round(
        algorithm, state, engine, safeguards, round, cohort, plans, screen, expected_clients, seed, tell, clock
    )
    results = _results(this)
    error = AggregationError(algorithm, state, plans) if measure_aggregation and this.averages_updates else None
    state, aggregated, facts = _aggregated(this, results, error)
    if isinstance(algorithm, Charges):
        state = algorithm.charged(state, results.arrived)
    if aggregated and isinstance(algorithm, RefinesOnServer) and server is not None:
        with clock.phase("refine"):
            state = algorithm.refine(state, server(round))
    with clock.phase("evaluate"):
        metrics = measured(algorithm, state, evaluate)
    profiles = {client.client_id: client for client in cohort}
    record = RoundRecord(
        round=round,
        plans=tuple(plan_record(plan, profiles[plan.client_id], algorithm.spec) for plan in plans),
        left_out=left_out,
        uploads=tuple(results.records),
        failures=tuple(results.failures),
        aggregated=aggregated,
        bytes_down=results.bytes_down,
        bytes_up=results.bytes_up,
        bytes_base=results.bytes_base,
        metrics=metrics,
        facts={**(algorithm.explain(state) if isinstance(algorithm, Explains) else {}), **results.facts, **facts},
        norms={} if screen is None else screen.measured,
        seconds={**clock.seconds, "total": time.perf_counter() - start},
    )
    return state, record


def _results(this: _Round[State]) -> RoundResults | SecureResults:
    """The round's exchange with its clients: a plain one, the second of two, or one of masked uploads."""
    if isinstance(this.algorithm, Exchanges):
        return _second_exchange(this, this.algorithm)
    if this.safeguards.secure is not None:
        carrier, agreement = this.safeguards.carrier(this.engine), _agreement(this, this.safeguards.secure)
        return SecureResults(carrier, this.number, this.plans, this.distribute, this.tell, this.clock, agreement)
    kind = this.algorithm.step_kind if isinstance(this.algorithm, HasStepKind) else None
    whole = whole_weights(this.algorithm.spec, kind)
    public = None if this.safeguards.private is None else client_dp.PUBLIC
    return RoundResults(
        this.engine, this.number, this.plans, this.distribute, this.tell, this.clock, whole, this.screen, public
    )


def _second_exchange(this: _Round[State], exchanges: Exchanges[State]) -> RoundResults:
    """The first exchange to its end, and what comes of the second; observers hear of a client once."""

    def failed(result: UploadRecord | Failure) -> None:
        if isinstance(result, Failure):
            this.tell(result)

    first = RoundResults(this.engine, this.number, this.plans, this.distribute, failed, this.clock)
    messages = list(first)
    with this.clock.phase("mid_round"):
        of = {plan.client_id: plan for plan in this.plans}
        tasks = second_tasks(exchanges.mid_round(this.state, of, messages) if messages else (), messages, of)
    of_client = {task.plan.client_id: task for task in tasks}

    def distribute(plan: Plan) -> Task:
        return of_client.pop(plan.client_id)

    second = [task.plan for task in tasks]
    return RoundResults(this.engine, this.number, second, distribute, this.tell, this.clock, earlier=first)


def _agreement(this: _Round[State], secure: SecureAggregation) -> Agreement:
    """What a round with secure aggregation sums, and the mean or the noisy mean that becomes of it."""
    present, central = this.trained, this.safeguards.central
    by_examples = weighs_by_examples(this.algorithm)
    most = max((client.num_examples for client in this.cohort), default=1) if by_examples else 1
    if central is None:
        present = tensors.only(present, frozenset().union(*(plan.trainable for plan in this.plans)))
        how = this.algorithm.averaging if isinstance(this.algorithm, Averages) else None
        outcome = secure_round.outcome(present, padded=how is not None and how.padded)
        return Agreement(secure, present, by_examples, most, outcome)

    def noisy(sums: Sums) -> Upload:
        return client_dp.released(
            central,
            sums.values,
            present,
            expected_clients=this.expected_clients,
            seed=this.seeds,
            secret=this.safeguards.noise_key,
        )

    return Agreement(secure, present, by_examples, most, noisy)


def _aggregated(
    this: _Round[State], results: RoundResults | SecureResults, error: AggregationError[State] | None
) -> tuple[State, bool, dict[str, float]]:
    """The next state, whether it is one, and its error: a round in which too few deliver leaves the state as it is."""
    uploads = Ahead(_guarded(this, results, error))
    if not uploads.any():
        return this.state, False, {}
    with this.clock.phase("aggregate"):
        state = this.algorithm.aggregate(this.state, uploads)
        _check_read(uploads, results, this.algorithm)
    if this.safeguards.too_few(len(results.records), len(this.plans)):
        logger.warning("round %d: %d uploads are too few to count", this.number, len(results.records))
        return this.state, False, {}
    if error is None:
        return state, True, {}
    with this.clock.phase("aggregation_error"):
        return state, True, {"aggregation_error": error.result(state)}


def _guarded(
    this: _Round[State], results: RoundResults | SecureResults, error: AggregationError[State] | None
) -> Iterator[Upload]:
    """The uploads as the method gets them: counted, through the robust rule, or their noisy mean instead."""

    def counted(upload: Upload) -> Upload:
        assert error is not None, "or nothing is counted"
        with this.clock.phase("aggregation_error"):
            return error.take(upload)

    uploads = Ahead(this.safeguards.robust(results if error is None else map(counted, results)))
    central = this.safeguards.central
    if central is None or this.safeguards.secure is not None:  # secure sums have their noise already
        return uploads
    of_client = {plan.client_id: plan for plan in this.plans}
    return client_dp.noisy_mean(
        central,
        uploads,
        lambda client_id: this.distribute(of_client[client_id]),
        this.trained,
        expected_clients=this.expected_clients,
        seed=this.seeds,
        secret=this.safeguards.noise_key,
    )


def _learnt(known: Margins, record: RoundRecord) -> Margins:
    """The margins after a round that is recorded."""
    budgets = {plan.client_id: plan.budget_bytes for plan in record.plans}
    return margins.learnt(known, record.failures, budgets, {plan.client_id: plan.peak_bytes for plan in record.plans})


def sample(
    population: Sequence[ClientProfile], cohort_size: int | None, rng: np.random.Generator
) -> Sequence[ClientProfile]:
    """The round's clients, without replacement, in the population's order."""
    if cohort_size is None or cohort_size == len(population):
        return population
    return [population[index] for index in sorted(rng.choice(len(population), cohort_size, replace=False))]


def check_plans(entries: Sequence[Plan | LeftOut], cohort: Sequence[ClientProfile]) -> None:
    """Refuses plans that are not the cohort's or do not fit; nothing that does not fit is sent.

    Raises:
        PlanError: As said.
    """
    asked, planned = [client.client_id for client in cohort], [entry.client_id for entry in entries]
    if asked != planned:
        raise PlanError(f"plans must be the cohort's, in its order {asked}, got {planned}; plan each client once")
    for entry, client in zip(entries, cohort, strict=True):
        if isinstance(entry, Plan) and entry.peak_bytes is not None and entry.peak_bytes > client.memory_bytes:
            raise PlanError(
                f"plan of client {client.client_id} must fit its budget of {client.memory_bytes} bytes, "
                f"got a predicted peak of {entry.peak_bytes} bytes; train less or leave the client out"
            )


def summary(record: RoundRecord) -> str:
    """The round in a line, for logs."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics.items() if "/" not in name)
    return (
        f"{len(record.uploads)} uploads, {len(record.failures)} failures, {len(record.left_out)} left out, "
        f"{record.bytes_down} bytes down, {record.bytes_up} up, {record.seconds['total']:.1f} s; {metrics}"
    )


def _check_population(population: Sequence[ClientProfile], cohort_size: int | None) -> None:
    ids = [client.client_id for client in population]
    problems = []
    if not ids or len(set(ids)) != len(ids):
        problems.append(f"population must be clients with distinct ids, got {ids}; number them apart")
    if cohort_size is not None and not 1 <= cohort_size <= max(len(ids), 1):
        problems.append(f"cohort_size must lie in 1..{len(ids)}, got {cohort_size}; leave it out for all clients")
    if problems:
        raise ConfigError(problems)


def _check_read(uploads: Ahead, results: RoundResults | SecureResults, algorithm: object) -> None:
    if uploads.any():
        raise PlanError(
            f"{type(algorithm).__name__}.aggregate must read every upload, got to {len(results.records)} and stopped; "
            "loop to the end"
        )
