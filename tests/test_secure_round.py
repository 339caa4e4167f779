"""Rounds with secure aggregation in one process: the plain means, to the quantisation, for every rule that is a sum."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedpilot import tensors
from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.ffa_lora import FFALoRA
from fedpilot.algorithms.flora import FLoRA
from fedpilot.algorithms.hetlora import HetLoRA
from fedpilot.errors import PlanError, SecureSumError, UploadError
from fedpilot.memory import MemoryProfile
from fedpilot.privacy import notes
from fedpilot.privacy.client_dp import ClientDP
from fedpilot.privacy.fixed_point import FixedPoint
from fedpilot.privacy.participant import MASKED, InMemory, Participant
from fedpilot.privacy.secure_aggregation import PublicKeys, SecureSum, UnmaskRequest
from fedpilot.privacy.secure_settings import SecureAggregation
from fedpilot.robust import Robust
from fedpilot.rounds import RoundRecord, run_rounds
from fedpilot.safeguards import Safeguards
from fedpilot.screening import Screening
from fedpilot.types import Algorithm, ClientProfile, Failure, Task, Tensors, Upload
from tests import toy
from tests.hostile import CLIENTS, SPEC, Engine, even_reclora, fedbiot, fedins, scaled

SECURE = SecureAggregation(threshold=0.6)


class Tampering(InMemory):
    """In this process, with hands on the messages; keeps what the server saw."""

    def __init__(
        self,
        engine: Any,
        *,
        note: Callable[[int, int, str, str], str | None] = lambda round, client_id, asked, answer: answer,
        task: Callable[[int, int, Upload], Upload | None] = lambda round, client_id, upload: upload,
    ) -> None:
        super().__init__(engine, lambda: Participant(SECURE))
        self.note, self.task = note, task
        self.seen: list[str] = []
        self.uploads: dict[int, Upload] = {}

    def ask(self, round: int, asked: Mapping[int, str]) -> Iterator[tuple[int, str | Failure]]:
        for client_id, answer in super().ask(round, asked):
            changed = self.note(round, client_id, asked[client_id], answer) if isinstance(answer, str) else answer
            if isinstance(changed, str):
                self.seen.append(changed)
            yield client_id, Failure(client_id, "gone") if changed is None else changed

    def masked(self, round: int, tasks: Iterable[tuple[Task, str]], most_bytes: int) -> Iterator[Upload | Failure]:
        for result in super().masked(round, tasks, most_bytes):
            changed = self.task(round, result.client_id, result) if isinstance(result, Upload) else result
            if isinstance(changed, Upload):
                self.uploads[result.client_id] = changed
            yield Failure(result.client_id, "gone") if changed is None else changed


def stage_of(note: str) -> str:
    return str(json.loads(note)["stage"])


def rounds_of(
    algorithm: Algorithm[Any],
    engine: Any = None,
    *,
    secure: SecureAggregation | None = SECURE,
    clients: tuple[ClientProfile, ...] = CLIENTS,
    num_rounds: int = 1,
    **options: Any,
) -> list[tuple[Any, RoundRecord]]:
    found = run_rounds(
        algorithm,
        engine or Engine(algorithm),
        clients,
        lambda _: {},
        num_rounds=num_rounds,
        seed=3,
        safeguards=Safeguards(secure=secure, **options),
        server=toy.server,
    )
    return [(algorithm.deploy(state).tensors, record) for state, record in found]


def tiered(profile: MemoryProfile) -> tuple[ClientProfile, ...]:
    """Clients whose memory gives them unlike ranks and blocks."""
    method = HetLoRA(SPEC, profile, r_min=1, r_max=3, gamma=1.0)
    rng = np.random.default_rng(0)
    peaks = [
        plan.peak_bytes
        for rank in (1, 2, 3)
        for plan in HetLoRA(SPEC, profile, r_min=rank, r_max=rank, gamma=1.0).plan(method.init(rng), CLIENTS[:1], rng)
    ]
    return tuple(ClientProfile(c.client_id, c.num_examples, int(peaks[c.client_id % 3]), name=c.name) for c in CLIENTS)


METHODS: dict[str, Callable[[MemoryProfile], Algorithm[Any]]] = {
    "fedit by examples": lambda profile: FedIT(SPEC, profile, rank=2),
    "fedit uniform": lambda profile: FedIT(SPEC, profile, rank=2, weights="uniform"),
    "ffa-lora": lambda profile: FFALoRA(SPEC, profile, rank=2),
    "ffa-lora at ranks": lambda profile: FFALoRA(SPEC, profile, rank=3, participation="ranks"),
    "hetlora by examples": lambda profile: HetLoRA(SPEC, profile, r_min=1, r_max=3, gamma=1.0, weights="examples"),
    "hetlora uniform": lambda profile: HetLoRA(SPEC, profile, r_min=1, r_max=3, gamma=1.0, weights="uniform"),
    "fed-pilot": lambda profile: FedPilot(SPEC, profile, rank=2, aggregation="layerwise", solver="random"),
    "fedbiot": lambda profile: fedbiot(profile),
    "fedins": lambda profile: fedins(weights="examples"),
    "reclora": lambda profile: even_reclora(weights="uniform"),
}

ALIKE = ("fedit by examples", "fedit uniform", "ffa-lora", "fedbiot", "fedins", "reclora")


@pytest.mark.parametrize("name", METHODS)
def test_a_round_is_the_plain_one_up_to_the_quantisation(name: str, profile: MemoryProfile) -> None:
    algorithm, clients = METHODS[name](profile), CLIENTS if name in ALIKE else tiered(profile)
    for (plain, before), (summed, record) in zip(
        rounds_of(algorithm, secure=None, clients=clients, num_rounds=2),
        rounds_of(algorithm, clients=clients, num_rounds=2),
        strict=True,
    ):
        assert record.aggregated
        assert not record.failures
        step = record.facts["secure_step"]
        assert step < 1e-4
        for tensor in plain:
            torch.testing.assert_close(summed[tensor], plain[tensor], rtol=1e-5, atol=10 * step + 1e-5, msg=tensor)
        assert [upload.num_examples for upload in record.uploads] == [u.num_examples for u in before.uploads]
        assert record.bytes_down == before.bytes_down
        assert all("loss" not in upload.metrics for upload in record.uploads)
        assert {"advertise", "share", "clients", "unmask"} <= record.seconds.keys()


def test_a_slot_that_nobody_in_a_round_holds_is_kept_as_in_a_plain_one(profile: MemoryProfile) -> None:
    algorithm = METHODS["hetlora uniform"](profile)
    poorest = min(client.memory_bytes for client in tiered(profile))
    clients = tuple(replace(client, memory_bytes=poorest) for client in CLIENTS)
    [(plain, _)] = rounds_of(algorithm, secure=None, clients=clients)
    [(summed, record)] = rounds_of(algorithm, clients=clients)
    assert {rank for plan in record.plans for rank in plan.ranks.values()} == {1}
    for name in (name for name in plain if name.endswith("lora_A")):
        assert torch.equal(summed[name][1:], plain[name][1:])
        assert summed[name][1:].any()


def test_plans_of_the_compared_rounds_are_unlike(profile: MemoryProfile) -> None:
    """Or the comparison would say nothing of ranks and holders."""
    clients = tiered(profile)
    [(_, het)] = rounds_of(METHODS["hetlora uniform"](profile), clients=clients)
    assert len({tuple(plan.ranks.items()) for plan in het.plans}) > 1
    [(_, pilot)] = rounds_of(METHODS["fed-pilot"](profile), clients=clients)
    assert len({plan.trained for plan in pilot.plans}) > 1


@pytest.mark.parametrize("stage", ["advertise", "share", "unmask"])
def test_a_client_whose_answer_is_no_note_is_left_out_and_the_rest_is_summed(
    stage: str, profile: MemoryProfile
) -> None:
    algorithm = METHODS["fedit uniform"](profile)

    def broken(round: int, client_id: int, asked: str, answer: str) -> str:
        if client_id == 4 and stage_of(asked) == stage:
            return '{"stage": "' + stage + '", "session": 7}'
        return answer

    [(_, record)] = rounds_of(algorithm, Tampering(Engine(algorithm), note=broken))
    assert record.aggregated
    assert record.facts["secure_clients"] == (10 if stage == "unmask" else 9)
    reasons = [failure.reason for failure in record.failures]
    assert reasons == ([] if stage == "unmask" else reasons[:1])
    assert all("a note of a secure sum must be" in reason for reason in reasons)


def test_a_key_that_nobody_can_agree_with_fails_its_client_and_not_the_others(profile: MemoryProfile) -> None:
    algorithm = METHODS["fedit uniform"](profile)

    def zero(round: int, client_id: int, asked: str, answer: str) -> str:
        if client_id == 3 and stage_of(asked) == "advertise":
            nothing = base64.b64encode(bytes(32)).decode()
            return json.dumps({**json.loads(answer), "keys": [nothing, nothing]})
        return answer

    [(_, record)] = rounds_of(algorithm, Tampering(Engine(algorithm), note=zero))
    [failure] = record.failures
    assert failure.client_id == 3
    assert "a public key must be one of X25519" in failure.reason
    assert record.facts["secure_clients"] == 9


def test_letters_to_too_few_make_their_sender_leave(profile: MemoryProfile) -> None:
    algorithm = METHODS["fedit uniform"](profile)

    def short(round: int, client_id: int, asked: str, answer: str) -> str:
        if client_id == 2 and stage_of(asked) == "share":
            found = json.loads(answer)
            return json.dumps({**found, "letters": found["letters"][1:]})
        return answer

    [(_, record)] = rounds_of(algorithm, Tampering(Engine(algorithm), note=short))
    assert record.aggregated
    [failure] = record.failures
    assert failure.client_id == 2
    assert "letters must go to all others on the roster" in failure.reason


def test_masked_uploads_of_another_size_or_kind_leave_the_sum(profile: MemoryProfile) -> None:
    algorithm = METHODS["fedit uniform"](profile)
    start = algorithm.deploy(algorithm.init(np.random.default_rng([3, 0]))).tensors

    def odd(round: int, client_id: int, upload: Upload) -> Upload:
        vector = upload.tensors[MASKED]
        wrong: dict[int, Tensors] = {
            0: {MASKED: vector[:-1]},
            1: {MASKED: vector.float()},
            2: {MASKED: vector, "more": vector},
            3: {"head.bias": start["head.bias"]},
        }
        return Upload(client_id, upload.num_examples, wrong.get(client_id, upload.tensors), upload.metrics)

    [(_, record)] = rounds_of(algorithm, Tampering(Engine(algorithm), task=odd))
    assert record.aggregated
    assert [failure.client_id for failure in record.failures] == [0, 1, 2, 3]
    assert all("a masked upload must be one vector of" in failure.reason for failure in record.failures)
    assert [upload.client_id for upload in record.uploads] == list(range(4, 10))


def test_too_few_at_any_stage_leave_the_state_and_say_why(profile: MemoryProfile) -> None:
    algorithm = METHODS["fedit uniform"](profile)
    start = algorithm.deploy(algorithm.init(np.random.default_rng([3, 0]))).tensors
    for stage in ("advertise", "share", "unmask"):

        def gone(round: int, client_id: int, asked: str, answer: str, stage: str = stage) -> str | None:
            return None if stage_of(asked) == stage and client_id < 8 else answer

        [(adapter, record)] = rounds_of(algorithm, Tampering(Engine(algorithm), note=gone))
        assert not record.aggregated
        assert not record.uploads
        assert sorted(failure.client_id for failure in record.failures) == list(range(10))
        assert tensors.digest(adapter) == tensors.digest(start)
    assert "at least 6 clients must unmask for a sum, got 2" in record.failures[0].reason


def test_an_entry_beyond_the_bound_fails_its_client_alone(profile: MemoryProfile) -> None:
    algorithm = METHODS["fedit uniform"](profile)
    loud = Engine(algorithm, {5: lambda task, upload: far(upload)})
    [(_, record)] = rounds_of(algorithm, loud)
    [failure] = record.failures
    assert failure.client_id == 5
    assert "must lie within ±4 to be summed" in failure.reason
    assert len(record.uploads) == 9


def far(upload: Upload) -> Upload:
    return Upload(
        upload.client_id, upload.num_examples, {name: t + 100 for name, t in upload.tensors.items()}, upload.metrics
    )


# --- a server that lies -------------------------------------------------------------------------------------------


def asked_of(participant: Participant, stage: Any, session: str, body: notes.Json, round: int = 1) -> notes.Note:
    return notes.Note(participant.answer(0, round, notes.written(stage, session, body)))


def begun(session: str = "s", count: int = 5) -> tuple[Participant, dict[int, PublicKeys]]:
    """A client that has sent its keys, and a roster with others."""
    participant = Participant(SECURE)
    roster = {0: asked_of(participant, "advertise", session, {}).keys(0)}
    roster |= {k: SecureSum.advertise(k, 1)[1] for k in range(1, count)}
    return participant, roster


LAYOUT = notes.Layout({"head.bias": (3,)}, by_examples=False, max_weight=1)


def test_a_client_takes_no_note_of_another_session_round_or_order() -> None:
    participant, roster = begun()
    body = notes.of_roster(roster, LAYOUT)
    for session, round in (("other", 1), ("s", 2)):
        with pytest.raises(SecureSumError, match="must belong to the attempt whose keys client 0 sent last"):
            asked_of(participant, "share", session, body, round)
    request = notes.of_request(UnmaskRequest(frozenset(range(5)), frozenset()))
    with pytest.raises(SecureSumError, match="must be unmasked once, at its end, got asked before"):
        asked_of(participant, "unmask", "s", request)
    asked_of(participant, "share", "s", body)
    with pytest.raises(SecureSumError, match="must be unmasked once, at its end, got one before the input was masked"):
        asked_of(participant, "unmask", "s", request)
    with pytest.raises(SecureSumError, match="must share its secrets once a round"):
        asked_of(participant, "share", "s", body)


def test_a_server_cannot_have_a_sum_of_fewer_than_the_clients_own_recipe_allows() -> None:
    participant, roster = begun(count=2)
    with pytest.raises(SecureSumError, match="a sum must be of at least 3 clients, got 2"):
        asked_of(participant, "share", "s", notes.of_roster(roster, LAYOUT))
    assert SecureAggregation(threshold=0.5).needed(5) == 3
    assert SecureAggregation(threshold=0.9).needed(5) == 5


def test_clients_that_were_told_unlike_rosters_cannot_read_each_others_letters() -> None:
    others = {k: SecureSum.advertise(k, 1) for k in range(4)}
    told = {k: keys for k, (_, keys) in others.items()}
    agreed = SecureSum(FixedPoint({"head.bias": (3,)}), 3)
    forged = {**told, 3: SecureSum.advertise(3, 1)[1]}
    here, _ = agreed.share(others[0][0], told)
    letters = {k: agreed.share(others[k][0], roster)[1].to[0] for k, roster in ((1, told), (2, forged))}
    with pytest.raises(SecureSumError, match=r"a letter \(round 1, 2 to 0\) must be whole"):
        agreed.mask(here, letters, {"head.bias": torch.zeros(3)})


MALFORMED = [
    *("", "[]", "7", '{"stage": "share"}', '{"stage": "share", "session": "s", "roster": 3}'),
    '{"stage": "share", "session": "s", "roster": [[0, "AA", "AA"]]}',
    '{"stage": "share", "session": "s", "roster": [[-1, "AA", "AA"]], "layout": []}',
    '{"stage": "share", "session": "s", "roster": [], "layout": [["a", [0]]]}',
    '{"stage": "boil", "session": "s"}',
    '{"stage": "advertise", "session": 7}',
    "[" * 100_000,
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_note_is_refused_without_a_crash(text: str) -> None:
    participant, _ = begun()
    with pytest.raises(SecureSumError):
        participant.answer(0, 1, text)


def test_a_refusal_does_not_print_a_share() -> None:
    share = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo="
    with pytest.raises(SecureSumError) as caught:
        notes.Note(json.dumps({"seeds": [[1, share]], "keys": []})).unmasking(0)
    assert share[:10] not in str(caught.value)


# --- what goes with it, and what does not -------------------------------------------------------------------------


def test_noise_on_the_sum_is_that_of_a_run_without_masks_and_clients_clip(profile: MemoryProfile) -> None:
    algorithm = FedIT(SPEC, profile, rank=2, weights="uniform")
    private = ClientDP("client", 0.05, 1.0)
    loud = Engine(algorithm, {5: scaled(30.0)})
    [(plain, _)] = rounds_of(algorithm, loud, secure=None, private=private)
    [(summed, record)] = rounds_of(algorithm, loud, private=private)
    assert record.facts["epsilon"] == private.epsilon(1, 1.0)
    for name in plain:
        torch.testing.assert_close(summed[name], plain[name], rtol=1e-4, atol=1e-5)
    quiet = ClientDP("client", 0.05, 0.0)
    start = algorithm.deploy(algorithm.init(np.random.default_rng([3, 0]))).tensors
    [(moved, _)] = rounds_of(algorithm, loud, private=quiet)
    assert 0 < tensors.norm(tensors.subtract(moved, start)) <= 0.05


@pytest.mark.parametrize("bits", [32, 64])
def test_a_clipped_update_is_within_the_clip_after_it_is_quantised(bits: Any, profile: MemoryProfile) -> None:
    secure = SecureAggregation(bits=bits, bound=2.0**14 if bits == 32 else 4.0)  # at 32 a step of 2^-13
    numbers = secure.agreed({"w": (400, 5)}, 10, 1).numbers
    participant = Participant(secure, clip=0.05)
    grown = {"w": torch.randn(400, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    if bits == 32:
        assert numbers.step >= 2.0**-14
    clipped = participant._clipped(grown, SecureSum(numbers, 6))
    vector = numbers.encoded(clipped)[:2000].view(f"<i{bits // 8}").astype(np.float64) * numbers.step
    assert 0.9 * 0.05 * (bits == 64) < np.linalg.norm(vector) <= 0.05


def test_a_clip_below_what_quantisation_adds_is_said(profile: MemoryProfile) -> None:
    numbers = SecureAggregation(bound=2.0**20).agreed({"w": (400, 5)}, 10, 1)
    with pytest.raises(UploadError, match="clip must exceed what quantisation adds"):
        Participant(SECURE, clip=0.05)._clipped({"w": torch.ones(400, 5)}, numbers)


@pytest.mark.parametrize("guard", [{"screening": Screening(5.0)}, {"robust": Robust("median")}])
def test_judging_single_uploads_does_not_go_with_masks(guard: dict[str, Any], profile: MemoryProfile) -> None:
    with pytest.raises(PlanError, match="secure_aggregation must go without screening and robust rules"):
        rounds_of(FedIT(SPEC, profile, rank=2, weights="uniform"), **guard)


def test_a_rule_that_cannot_be_summed_says_so_before_the_run(profile: MemoryProfile) -> None:
    algorithm = FLoRA(SPEC, profile)
    carrier = Tampering(Engine(algorithm))
    with pytest.raises(PlanError, match=r"needs only sums of uploads, got FLoRA, which stacks.*take fedit, "):
        rounds_of(algorithm, carrier)
    assert not carrier.seen


def test_cohorts_that_one_client_could_make_large_enough_do_not_go_with_noise(profile: MemoryProfile) -> None:
    algorithm = FedIT(SPEC, profile, rank=2, weights="uniform")
    guards = Safeguards(secure=SECURE, private=ClientDP("client", 0.5, 1.0))
    people = [ClientProfile(k, 5, 10**9) for k in range(400)]
    with pytest.raises(PlanError, match="must hardly ever have just 3 clients"):
        guards.last_round(10, people, 8)
    assert guards.last_round(10, people, 60) == 10
    assert guards.last_round(10, people, None) == 10
    guards.check(algorithm)


@pytest.mark.parametrize(("wrong", "said"), [({"threshold": 0.4}, "threshold"), ({"min_clients": 2}, "min_clients")])
def test_settings_that_protect_nobody_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=f"{said} must"):
        SecureAggregation(**wrong)


def test_weights_that_leave_no_room_for_a_sum_are_said_to_need_more_bits() -> None:
    with pytest.raises(PlanError, match="weights must leave room for a sum in 32 bits, got 100 clients of weight"):
        SecureAggregation().agreed({"w": (4, 5)}, 100, 10**8)
    assert SecureAggregation(bits=64).agreed({"w": (4, 5)}, 100, 10**8).numbers.step < 1e-3
