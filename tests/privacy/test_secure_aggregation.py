"""The secure sum: right to the quantisation, blind to single uploads, robust to clients that leave, deaf to lies."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import toy

from fedpilot import lora, tensors
from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.ffa_lora import FFALoRA
from fedpilot.algorithms.flexlora import FlexLoRA
from fedpilot.algorithms.flora import FLoRA
from fedpilot.algorithms.hetlora import HetLoRA
from fedpilot.errors import PlanError, SecureSumError
from fedpilot.memory import MemoryProfile
from fedpilot.privacy.fixed_point import FixedPoint, Sums
from fedpilot.privacy.secure_aggregation import (
    Client,
    Gathered,
    MaskedInput,
    PublicKeys,
    SecureSum,
    Unmasking,
    UnmaskRequest,
)
from fedpilot.privacy.secure_settings import SecureAggregation
from fedpilot.types import Tensors

SPEC = toy.spec()
PRESENT = toy.random_adapter(SPEC, 3, 1)
SHAPES = {name: tuple(tensor.shape) for name, tensor in PRESENT.items()}
STEP = 2.0**-16
NUMBERS = FixedPoint(SHAPES, step=STEP, bound=8.0, max_clients=20, max_weight=50)
SUM = SecureSum(NUMBERS, threshold=6)
WEIGHTS = {k: 1 + 4 * k for k in range(10)}


def inputs(count: int = 10) -> dict[int, Tensors]:
    return {k: toy.random_adapter(SPEC, 3, 20 + k) for k in range(count)}


class Round:
    """All parties in one place; those that leave do so after a named trip."""

    def __init__(
        self, given: Mapping[int, Tensors], *, agreed: SecureSum = SUM, weights: Mapping[int, int] = WEIGHTS
    ) -> None:
        self.agreed, self.clients, self.roster = agreed, dict[int, Client](), dict[int, PublicKeys]()
        for k in given:
            self.clients[k], self.roster[k] = agreed.advertise(k, round=4)
        self.given, self.weights = given, weights
        self.masked: dict[int, MaskedInput] = {}
        self.answers: list[Unmasking] = []

    def share(self, but: Iterable[int] = ()) -> "Round":
        self.boxes: dict[int, dict[int, bytes]] = {k: {} for k in self.clients}
        self.shared = [k for k in self.clients if k not in but]
        for k in self.shared:
            self.clients[k], letters = self.agreed.share(self.clients[k], self.roster)
            for other, letter in letters.to.items():
                self.boxes[other][k] = letter
        return self

    def mask(self, but: Iterable[int] = ()) -> "Round":
        self.gathered: Gathered | None = None
        for k in self.shared:
            if k not in but:
                self.clients[k], self.masked[k] = self.agreed.mask(
                    self.clients[k], self.boxes[k], self.given[k], self.weights[k]
                )
                self.gathered = self.agreed.gather(self.gathered, self.masked[k])
        return self

    def unmask(self, but: Iterable[int] = ()) -> Sums:
        request = self.agreed.request(self.shared, self.gathered)
        for k in request.arrived:
            if k not in but:
                self.clients[k], answer = self.agreed.unmask(self.clients[k], request)
                self.answers.append(answer)
        assert self.gathered is not None
        return self.agreed.total(4, self.roster, request, self.gathered, self.answers)


def assert_sum(
    found: Sums, given: Mapping[int, Tensors], clients: Iterable[int], weights: Mapping[int, int] = WEIGHTS
) -> None:
    """Within half a step for each contribution; weights exactly."""
    clients = list(clients)
    for name, value in found.values.items():
        plain = torch.zeros(value.shape, dtype=torch.float64)
        held = torch.zeros_like(found.weights[name])
        for k in clients:
            if name in given[k]:
                part = given[k][name].double()
                plain[tuple(slice(size) for size in part.shape)] += weights[k] * part
                slots = {"lora_A": part.shape[0], "lora_B": part.shape[-1]}.get(name.rpartition(".")[2], 1)
                held[:slots] += weights[k]
        assert float((value - plain).abs().max()) <= len(clients) * STEP / 2 * (1 + 1e-9), name
        assert torch.equal(found.weights[name], held), name


def test_the_sum_is_the_plain_sum_up_to_the_quantisation() -> None:
    given = inputs()
    assert_sum(Round(given).share().mask().unmask(), given, given)


def test_the_mean_of_the_sum_is_the_mean_by_weight() -> None:
    given = inputs()
    mean = Round(given).share().mask().unmask().mean(PRESENT)
    plain = tensors.weighted_mean((given[k], float(WEIGHTS[k])) for k in given)
    for name in plain:
        torch.testing.assert_close(mean[name], plain[name], rtol=0, atol=10 * STEP / sum(WEIGHTS.values()) + 1e-6)


@pytest.mark.parametrize("gone", [(1, 4, 8), (0,), (7, 8, 9), (0, 2, 4, 6)])
def test_clients_that_leave_after_sharing_change_only_what_is_summed(gone: tuple[int, ...]) -> None:
    given = inputs()
    assert_sum(Round(given).share().mask(but=gone).unmask(), given, set(given) - set(gone))


def test_three_of_ten_that_drop_after_they_masked_are_in_the_right_sum() -> None:
    given = inputs()
    assert_sum(Round(given).share().mask().unmask(but=(1, 4, 8)), given, given)


def test_drop_outs_at_every_trip_together_still_give_the_right_sum() -> None:
    given = inputs()
    found = Round(given).share(but=(9,)).mask(but=(3, 5)).unmask(but=(0,))
    assert_sum(found, given, {0, 1, 2, 4, 6, 7, 8})


def test_below_the_threshold_there_is_no_sum() -> None:
    given = inputs()
    with pytest.raises(SecureSumError, match="at least 6 masked inputs must come for a sum, got 5"):
        Round(given).share().mask(but=(0, 1, 2, 3, 4)).unmask()
    with pytest.raises(SecureSumError, match="at least 6 clients must unmask for a sum, got 5"):
        Round(given).share().mask().unmask(but=(0, 1, 2, 3, 4))
    with pytest.raises(SecureSumError, match="at least 6 clients must have shared, got 5"):
        Round(given).share(but=(0, 1, 2, 3, 4)).mask()


def test_unlike_plans_sum_over_their_holders() -> None:
    """Ranks differ, some blocks are not trained: the mean over holders without anybody's plan in the open."""
    given = inputs()
    given[2] = lora.truncate(given[2], dict.fromkeys(SPEC.modules, 1))
    given[5] = lora.truncate(given[5], dict.fromkeys(SPEC.modules, 2))
    for k in (3, 6, 7):
        given[k] = {name: tensor for name, tensor in given[k].items() if not name.startswith("blocks.1")}
    everybody = Round(given).share().mask()
    assert len({each.vector.shape for each in everybody.masked.values()}) == 1
    found = everybody.unmask()
    assert_sum(found, given, given)
    mean = lora.SlotMean(PRESENT)
    for k, each in given.items():
        mean.add(each, float(WEIGHTS[k]))
    for name, tensor in mean.result().items():
        torch.testing.assert_close(found.mean(PRESENT)[name], tensor, rtol=0, atol=1e-5)


def test_a_slot_that_nobody_holds_keeps_its_present_value_and_padding_counts_zeros() -> None:
    given = {k: lora.truncate(each, dict.fromkeys(SPEC.modules, 2)) for k, each in inputs().items()}
    found = Round(given).share().mask().unmask()
    name = "blocks.0.linear.lora_A"
    assert torch.equal(found.mean(PRESENT)[name][2], PRESENT[name][2])
    twice = float(2 * sum(WEIGHTS.values()))
    torch.testing.assert_close(found.mean(PRESENT, twice)[name][:2], found.mean(PRESENT)[name][:2] / 2)


def test_one_upload_looks_uniform_whatever_is_in_it() -> None:
    """Chi-square over the bytes and a z-score for every bit: within five standard deviations, for zeros too."""
    shapes = {"big.weight": (300, 101)}
    agreed = SecureSum(FixedPoint(shapes, bound=8.0, max_clients=10), 4)
    given: dict[int, Tensors] = {k: {"big.weight": torch.zeros(300, 101)} for k in range(6)}
    given[1] = {"big.weight": torch.full((300, 101), 7.5)}
    everybody = Round(given, agreed=agreed, weights=dict.fromkeys(given, 1)).share().mask()
    for k in (0, 1):
        found = np.frombuffer(everybody.masked[k].vector.tobytes(), dtype=np.uint8)
        assert chi_square(found) < 255 + 5 * math.sqrt(2 * 255)
        assert worst_bit(everybody.masked[k].vector) < 5
        plain = agreed.numbers.encoded(given[k])  # the same tests see through what is not masked
        assert chi_square(np.frombuffer(plain.tobytes(), dtype=np.uint8)) > 1e5
        assert worst_bit(plain) > 100
    together = everybody.masked[0].vector - everybody.masked[1].vector
    assert chi_square(np.frombuffer(together.tobytes(), dtype=np.uint8)) < 255 + 5 * math.sqrt(2 * 255)


def chi_square(found: np.ndarray) -> float:
    counts = np.bincount(found, minlength=256)
    return float(((counts - len(found) / 256) ** 2 / (len(found) / 256)).sum())


def worst_bit(vector: np.ndarray) -> float:
    bits = np.unpackbits(vector.view(np.uint8).reshape(len(vector), -1), axis=1)
    return float(np.abs((bits.mean(axis=0) - 0.5) * 2 * math.sqrt(len(vector))).max())


def test_two_rounds_and_two_clients_never_share_a_mask() -> None:
    given = {k: {"m.weight": torch.zeros(5, 7)} for k in range(3)}
    agreed = SecureSum(FixedPoint({"m.weight": (5, 7)}), 2)
    found = [Round(given, agreed=agreed, weights=dict.fromkeys(given, 1)).share().mask() for _ in range(2)]
    vectors = [each.vector.tobytes() for one in found for each in one.masked.values()]
    assert len(set(vectors)) == 6


def test_even_with_the_same_secrets_two_rounds_have_unlike_masks() -> None:
    agreed, found = SecureSum(FixedPoint({"m.weight": (5, 7)}), 2), set()
    for round in (1, 2):
        made = [agreed.advertise(k, round, bytes([k + 1]).__mul__) for k in range(3)]
        roster = {keys.client_id: keys for _, keys in made}
        shared = [agreed.share(client, roster) for client, _ in made]
        letters = {sent.client_id: sent.to[0] for _, sent in shared[1:]}
        found.add(agreed.mask(shared[0][0], letters, {})[1].vector.tobytes())
    assert len(found) == 2


# --- lies ---------------------------------------------------------------------------------------------------------


def test_a_server_that_asks_for_both_shares_of_a_client_is_refused() -> None:
    everybody = Round(inputs()).share().mask()
    request = UnmaskRequest(frozenset(range(10)), frozenset({3}))
    for client in everybody.clients.values():
        with pytest.raises(SecureSumError, match="no client must be unmasked in both ways, got both for client 3"):
            SUM.unmask(client, request)


def test_a_second_request_is_refused() -> None:
    everybody = Round(inputs()).share().mask()
    client, answer = SUM.unmask(everybody.clients[0], UnmaskRequest(frozenset(range(10)), frozenset()))
    assert answer.seeds.keys() == set(range(10))
    with pytest.raises(SecureSumError, match="unmasked once, at its end, got a second request"):
        SUM.unmask(client, UnmaskRequest(frozenset(range(9)), frozenset({9})))


def test_a_request_that_hides_clients_or_names_too_few_is_refused() -> None:
    client = Round(inputs()).share().mask().clients[0]
    with pytest.raises(SecureSumError, match="must name the 10 clients that shared, got 9"):
        SUM.unmask(client, UnmaskRequest(frozenset(range(9)), frozenset()))
    with pytest.raises(SecureSumError, match="a sum must have at least 6 inputs, got 5"):
        SUM.unmask(client, UnmaskRequest(frozenset(range(5)), frozenset(range(5, 10))))


def test_two_stories_about_who_left_leave_too_few_answers_for_one_of_them() -> None:
    everybody = Round(inputs()).share().mask()
    arrived = UnmaskRequest(frozenset(range(10)), frozenset())
    without = UnmaskRequest(frozenset(range(10)) - {3}, frozenset({3}))
    seeds = [SUM.unmask(everybody.clients[k], arrived)[1].seeds[3] for k in range(5)]
    keys = [SUM.unmask(everybody.clients[k], without)[1].keys[3] for k in range(5, 10)]
    assert len(seeds) < SUM.threshold
    assert len(keys) < SUM.threshold
    with pytest.raises(SecureSumError, match="threshold must be more than half"):
        SecureSum(NUMBERS, 5).check_roster(everybody.roster)


def test_a_client_masks_and_shares_once_a_round() -> None:
    everybody = Round(inputs()).share().mask()
    with pytest.raises(SecureSumError, match="must mask one input a round"):
        SUM.mask(everybody.clients[0], everybody.boxes[0], everybody.given[1])
    with pytest.raises(SecureSumError, match="must share its secrets once a round"):
        SUM.share(everybody.clients[0], everybody.roster)


def test_a_roster_with_other_keys_of_a_client_is_refused_by_it() -> None:
    everybody = Round(inputs())
    forged = {**everybody.roster, 2: replace(everybody.roster[2], masks=everybody.roster[3].masks)}
    with pytest.raises(SecureSumError, match="roster must hold the keys of client 2 as it sent them"):
        SUM.share(everybody.clients[2], forged)


def test_a_letter_that_was_altered_or_sent_to_another_is_refused() -> None:
    everybody = Round(inputs()).share()
    box = everybody.boxes[0]
    altered = {**box, 1: bytes([*box[1][:-1], box[1][-1] ^ 1])}
    with pytest.raises(SecureSumError, match=r"a letter \(round 4, 1 to 0\) must be whole"):
        SUM.mask(everybody.clients[0], altered, everybody.given[0])
    swapped = {**box, 1: box[2]}
    with pytest.raises(SecureSumError, match="must be whole"):
        SUM.mask(everybody.clients[0], swapped, everybody.given[0])
    with pytest.raises(SecureSumError, match="a letter must have"):
        SUM.mask(everybody.clients[0], {**box, 1: b"short"}, everybody.given[0])


def test_an_altered_share_gives_no_wrong_sum_of_one_that_left() -> None:
    everybody = Round(inputs()).share().mask(but=(3,))
    request = SUM.request(everybody.shared, everybody.gathered)
    answers = [SUM.unmask(everybody.clients[k], request)[1] for k in request.arrived]
    share = answers[0].keys[3]
    answers[0] = replace(answers[0], keys={3: bytes([*share[:-1], share[-1] ^ 1])})
    assert everybody.gathered is not None
    with pytest.raises(SecureSumError, match=r"altered"):
        SUM.total(4, everybody.roster, request, everybody.gathered, answers)


def test_a_second_input_or_one_of_another_layout_is_dropped() -> None:
    everybody = Round(inputs()).share().mask()
    with pytest.raises(SecureSumError, match="client 0 must send one masked input, got a second"):
        SUM.gather(everybody.gathered, everybody.masked[0])
    with pytest.raises(SecureSumError, match="masked input of client 11 must be"):
        SUM.gather(everybody.gathered, MaskedInput(11, np.zeros(3, dtype=NUMBERS.dtype)))


def test_a_public_key_that_would_give_a_known_secret_is_refused() -> None:
    everybody = Round(inputs())
    forged = {**everybody.roster, 2: PublicKeys(2, bytes(32), bytes(32))}
    with pytest.raises(SecureSumError, match="a public key must be one of X25519"):
        SUM.share(everybody.clients[0], forged)


def test_a_clients_secrets_are_not_printed() -> None:
    client = Round(inputs()).share().clients[0]
    for secret in (client.seed, client.masks_key, client.letters_key, client.shares[0][0]):
        assert repr(secret)[2:-1] not in repr(client)


# --- methods ------------------------------------------------------------------------------------------------------


def test_methods_that_need_only_sums_pass(profile: MemoryProfile) -> None:
    for algorithm in (
        FedIT(SPEC, profile),
        FFALoRA(SPEC, profile, participation="ranks"),
        HetLoRA(SPEC, profile, gamma=1.0, weights="examples"),
        FedPilot(SPEC, profile, aggregation="layerwise", solver="suffix"),
    ):
        SecureAggregation().check(algorithm)


REFUSED = {
    "stacks, decomposes or corrects": lambda profile: FLoRA(SPEC, profile),
    "decomposes or corrects": lambda profile: FlexLoRA(SPEC, profile),
    "send scores, ranks or counts": lambda profile: FedPilot(SPEC, profile, aggregation="layerwise"),
    "weighs clients by what they send": lambda profile: HetLoRA(SPEC, profile, gamma=1.0),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_methods_that_cannot_be_summed_are_told_which_can(reason: str, profile: MemoryProfile) -> None:
    with pytest.raises(PlanError, match=f"{reason}.*take fedit, fedbiot, fedins, ffa-lora"):
        SecureAggregation().check(REFUSED[reason](profile))


def test_without_cryptography_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(PlanError, match=r"pip install 'fedpilot\[flower\]'"):
        SUM.advertise(0, 1)
