"""Secure aggregation: the server learns a sum of uploads and no single one, though some clients leave on the way.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", 2017 (CCS; ePrint 2017/281).

A round has four trips, each of them pure functions over frozen messages:

1. *advertise*: every client draws two X25519 key pairs, one for letters and one for masks; the server hands all public
   keys to all.
2. *share*: every client draws a seed of its own and sends Shamir shares of it, and of its mask key, to each other one,
   encrypted through the server, with a hash of each share in the open.
3. *masked input*: ``y_u = x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv)``, modulo 2^32 or 2^64, with b_u
   its own seed and s_uv what it and v agree on. The server adds up what comes.
4. *unmask*: for a client whose input came the others give their shares of its seed, for one that left their shares of
   its mask key; never both, and once a round. The server takes off what is left of the masks.

More than half of the clients must answer (``threshold``), so that a server which tells two groups two stories about
who left has too few answers for one of them. It may collude with fewer than ``2 threshold - n`` clients. What it must
not do is lie about the keys in trip 1: a deployment signs them, or carries them over authenticated connections.

Only sums can be had in this way: stacking and singular value decompositions of single uploads cannot, and neither can
screening and robust rules, which look at single uploads. The layout and its quantisation are those of `FixedPoint`.

Differs from the paper: no trip for signatures on who left; the threshold of more than half stands in for it.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedpilot.errors import SecureSumError
from fedpilot.privacy import primitives, shamir
from fedpilot.privacy.fixed_point import FixedPoint, Sums, Words
from fedpilot.privacy.primitives import KEY_BYTES, Random
from fedpilot.types import Tensors

# --- messages -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublicKeys:
    """Trip 1, up; the server hands everybody's to everybody.

    Attributes:
        client_id: Who.
        letters: X25519, for encrypted shares.
        masks: X25519, for what two clients' masks are drawn from.
    """

    client_id: int
    letters: bytes
    masks: bytes


@dataclass(frozen=True)
class Letters:
    """Trip 2, up: one encrypted letter to each other client, which the server passes on and cannot read.

    Attributes:
        client_id: Who.
        to: Receiver -> letter.
        hashes: Receiver, the sender among them -> SHA-256 of its share of the seed and of its share of the mask key, by
            which the server knows a share that somebody altered.
    """

    client_id: int
    to: Mapping[int, bytes]
    hashes: Mapping[int, tuple[bytes, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskedInput:
    """Trip 3, up."""

    client_id: int
    vector: Words


@dataclass(frozen=True)
class UnmaskRequest:
    """Trip 4, down.

    Attributes:
        arrived: Clients whose masked input is in the sum.
        left: Those that shared in trip 2 and sent none.
    """

    arrived: frozenset[int]
    left: frozenset[int]


@dataclass(frozen=True)
class Unmasking:
    """Trip 4, up: shares of the seeds of those that arrived, and of the mask keys of those that left."""

    client_id: int
    seeds: Mapping[int, bytes]
    keys: Mapping[int, bytes]


# --- what a client remembers during a round -----------------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """A client's secrets of one round; each trip returns the next one.

    Attributes:
        client_id: Who.
        round: From 1; a key of all that is derived, so that no mask is used twice.
        letters_key: Private.
        masks_key: Private.
        seed: b, of its own mask.
        roster: Public keys of all, from trip 1.
        shares: Client -> its share of that one's seed and of its mask key; its own among them.
        masked: Whether its input is under masks already; two inputs under one mask would give their difference away.
        answered: Whether it has unmasked already.
    """

    client_id: int
    round: int
    letters_key: bytes = field(repr=False)
    masks_key: bytes = field(repr=False)
    seed: bytes = field(repr=False)
    roster: Mapping[int, PublicKeys] = field(default_factory=dict)
    shares: Mapping[int, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)
    masked: bool = False
    answered: bool = False


@dataclass(frozen=True)
class Gathered:
    """What the server has added up: memory does not grow with the clients."""

    vector: Words
    arrived: frozenset[int] = frozenset()


# --- the protocol -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SecureSum:
    """The agreement of a round, alike for the server and all clients.

    Attributes:
        numbers: Layout and quantisation.
        threshold: Clients that must stay to the end; more than half of those that advertise.
    """

    numbers: FixedPoint
    threshold: int

    # a client's side

    @staticmethod
    def advertise(client_id: int, round: int, random: Random = os.urandom) -> tuple[Client, PublicKeys]:
        """Trip 1: fresh keys; none is used in two rounds.

        Raises:
            PlanError: The package cryptography is not installed.
        """
        client = Client(client_id, round, random(KEY_BYTES), random(KEY_BYTES), random(KEY_BYTES))
        return client, _keys_of(client)

    def share(
        self, client: Client, roster: Mapping[int, PublicKeys], random: Random = os.urandom
    ) -> tuple[Client, Letters]:
        """Trip 2: a share of the seed and of the mask key for each client on the roster.

        Raises:
            SecureSumError: The roster is too small, or not the one that this client is on.
        """
        if client.shares:
            raise SecureSumError("a client must share its secrets once a round, got a second roster; refuse the server")
        self.check_roster(roster)
        own = roster.get(client.client_id)
        if own != _keys_of(client):
            raise SecureSumError(f"roster must hold the keys of client {client.client_id} as it sent them; refuse it")
        points = [_point(other) for other in roster]
        seeds = shamir.split(client.seed, self.threshold, points, random)
        keys = shamir.split(client.masks_key, self.threshold, points, random)
        letters = {
            other: primitives.sealed(
                self._letter_key(client, roster, keys_of.letters),
                seeds[_point(other)] + keys[_point(other)],
                _address(client.round, client.client_id, other),
                random,
            )
            for other, keys_of in roster.items()
            if other != client.client_id
        }
        point = _point(client.client_id)
        shared = replace(client, roster=dict(roster), shares={client.client_id: (seeds[point], keys[point])})
        hashes = {k: (_hash(seeds[_point(k)]), _hash(keys[_point(k)])) for k in roster}
        return shared, Letters(client.client_id, letters, hashes)

    def mask(
        self, client: Client, letters: Mapping[int, bytes], tensors: Tensors, weight: int = 1
    ) -> tuple[Client, MaskedInput]:
        """Trip 3: the input under masks.

        Args:
            client: After `share`.
            letters: Sender -> the letter to this client; whoever is missing has left before.
            tensors: What is summed.
            weight: A whole number.

        Raises:
            SecureSumError: A letter cannot be read, or too few came.
            UploadError: The tensors are not of the layout, or beyond its bound.
        """
        if client.masked:
            raise SecureSumError("a client must mask one input a round, got asked for a second; refuse the server")
        shares = dict(client.shares)
        for sender, letter in letters.items():
            if sender == client.client_id or sender not in client.roster:
                raise SecureSumError(f"letters must come from others on the roster, got one from {sender}; refuse it")
            key = self._letter_key(client, client.roster, client.roster[sender].letters)
            address = _address(client.round, sender, client.client_id)
            both = primitives.opened(key, letter, address, 2 * shamir.SHARE_BYTES)
            shares[sender] = both[: shamir.SHARE_BYTES], both[shamir.SHARE_BYTES :]
        if len(shares) < self.threshold:
            raise SecureSumError(
                f"at least {self.threshold} clients must have shared, got {len(shares)}; wait for more, or start over"
            )
        vector = self.numbers.encoded(tensors, weight) + self._own_mask(client.seed, client.round)
        for other in shares:
            if other != client.client_id:
                agreed = primitives.agreed(client.masks_key, client.roster[other].masks)
                vector = self._with_pair(vector, agreed, client.round, client.client_id, other)
        return replace(client, shares=shares, masked=True), MaskedInput(client.client_id, vector)

    def unmask(self, client: Client, request: UnmaskRequest) -> tuple[Client, Unmasking]:
        """Trip 4: one share for each client, of its seed or of its mask key.

        Raises:
            SecureSumError: The request would give a client away: both shares of one, a second request, too few inputs,
                or clients that are not those of trip 2.
        """
        if both := sorted(request.arrived & request.left):
            raise SecureSumError(
                f"no client must be unmasked in both ways, got both for client {both[0]}: that would reveal its input; "
                "refuse the server"
            )
        if client.answered or not client.masked:
            when = "a second request" if client.answered else "one before the input was masked"
            raise SecureSumError(f"a round must be unmasked once, at its end, got {when}; refuse the server")
        if request.arrived | request.left != client.shares.keys():
            raise SecureSumError(
                f"an unmasking must name the {len(client.shares)} clients that shared, got "
                f"{len(request.arrived | request.left)}; refuse the server"
            )
        if len(request.arrived) < self.threshold:
            raise SecureSumError(
                f"a sum must have at least {self.threshold} inputs, got {len(request.arrived)}; too many clients left"
            )
        answer = Unmasking(
            client.client_id,
            {other: client.shares[other][0] for other in sorted(request.arrived)},
            {other: client.shares[other][1] for other in sorted(request.left)},
        )
        return replace(client, answered=True, shares={}), answer

    # the server's side

    @staticmethod
    def usable(keys: PublicKeys) -> PublicKeys:
        """The keys, where all others can agree on secrets with them; else one client would make all of them fail.

        Raises:
            SecureSumError: They cannot.
        """
        for public in (keys.letters, keys.masks):
            primitives.agreed(os.urandom(KEY_BYTES), public)
        return keys

    def check_roster(self, roster: Mapping[int, PublicKeys]) -> None:
        """Refuses a roster that the threshold does not suit.

        Raises:
            SecureSumError: As said.
        """
        if not len(roster) / 2 < self.threshold <= len(roster) <= self.numbers.max_clients:
            raise SecureSumError(
                f"threshold must be more than half of the clients and at most all of them, got {self.threshold} of "
                f"{len(roster)} (at most {self.numbers.max_clients}); change it, or wait for more clients"
            )
        if any(client_id < 0 or keys.client_id != client_id for client_id, keys in roster.items()):
            raise SecureSumError("a roster must name each client by its own number from 0; mend the server")

    def gather(self, gathered: Gathered | None, masked: MaskedInput) -> Gathered:
        """The sum with one more masked input.

        Raises:
            SecureSumError: The client is in it already, or its vector is not of the layout.
        """
        if gathered is None:
            gathered = Gathered(np.zeros(self.numbers.num_entries, dtype=self.numbers.dtype))
        if masked.client_id in gathered.arrived:
            raise SecureSumError(f"client {masked.client_id} must send one masked input, got a second; drop it")
        if masked.vector.dtype != self.numbers.dtype or masked.vector.shape != gathered.vector.shape:
            raise SecureSumError(
                f"masked input of client {masked.client_id} must be {gathered.vector.shape} {self.numbers.dtype}, got "
                f"{masked.vector.shape} {masked.vector.dtype}; drop it"
            )
        return Gathered(gathered.vector + masked.vector, gathered.arrived | {masked.client_id})

    def request(self, shared: Iterable[int], gathered: Gathered | None) -> UnmaskRequest:
        """What trip 4 asks.

        Args:
            shared: Clients whose letters were passed on in trip 2.
            gathered: What came in trip 3.

        Raises:
            SecureSumError: Too few inputs came; or one came of a client that had not shared.
        """
        arrived = frozenset[int]() if gathered is None else gathered.arrived
        if foreign := arrived - frozenset(shared):
            raise SecureSumError(f"inputs must come from clients that shared, got one from {min(foreign)}; start over")
        if len(arrived) < self.threshold:
            raise SecureSumError(
                f"at least {self.threshold} masked inputs must come for a sum, got {len(arrived)}; start the round "
                "over with those that are there, or lower the threshold"
            )
        return UnmaskRequest(arrived, frozenset(shared) - arrived)

    def check_answer(self, dealt: Mapping[int, Letters], request: UnmaskRequest, answer: Unmasking) -> None:
        """Refuses an answer whose shares are not those that were asked for and dealt.

        Args:
            dealt: Client -> its letters of trip 2.
            request: What was asked.
            answer: What came.

        Raises:
            SecureSumError: As said.
        """
        if answer.seeds.keys() != request.arrived or answer.keys.keys() != request.left:
            raise SecureSumError(f"client {answer.client_id} must answer what it was asked; drop its answer")
        for kind, shares in enumerate((answer.seeds, answer.keys)):
            for client_id, share in shares.items():
                if _hash(share) != dealt[client_id].hashes[answer.client_id][kind]:
                    raise SecureSumError(
                        f"client {answer.client_id} must give its share of client {client_id}'s secret as it was "
                        "dealt, got another; drop its answer"
                    )

    def total(
        self,
        round: int,
        roster: Mapping[int, PublicKeys],
        request: UnmaskRequest,
        gathered: Gathered,
        answers: Iterable[Unmasking],
    ) -> Sums:
        """The plain sum of what arrived.

        Args:
            round: Of the inputs.
            roster: Of trip 1.
            request: That was answered.
            gathered: Of trip 3.
            answers: At least ``threshold`` of them.

        Raises:
            SecureSumError: Too few clients answered, or an answer is not of this round.
        """
        given = {answer.client_id: answer for answer in answers}
        if len(given) < self.threshold:
            raise SecureSumError(
                f"at least {self.threshold} clients must unmask for a sum, got {len(given)}; too many have left: start "
                "the round over"
            )
        for answer in given.values():
            if answer.seeds.keys() != request.arrived or answer.keys.keys() != request.left:
                raise SecureSumError(f"client {answer.client_id} must answer what it was asked; drop its answer")
        vector = gathered.vector.copy()
        for client_id in sorted(request.arrived):
            seed = self._secret({k: answer.seeds[client_id] for k, answer in given.items()})
            vector -= self._own_mask(seed, round)
        for gone in sorted(request.left):
            key = self._secret({k: answer.keys[gone] for k, answer in given.items()})
            if primitives.public_key(key) != roster[gone].masks:
                raise SecureSumError(f"shares of client {gone}'s mask key must give its key; somebody altered one")
            for other in sorted(request.arrived):  # adds what the client would have added
                vector = self._with_pair(vector, primitives.agreed(key, roster[other].masks), round, gone, other)
        return self.numbers.decoded(vector)

    # masks

    def _secret(self, shares: Mapping[int, bytes]) -> bytes:
        return shamir.combined({_point(client_id): share for client_id, share in shares.items()}, self.threshold)

    def _own_mask(self, seed: bytes, round: int) -> Words:
        return self._stream(_key(seed, f"own mask, round {round}"))

    def _with_pair(self, vector: Words, agreed: bytes, round: int, client_id: int, other: int) -> Words:
        """The vector with what the client adds for its agreement with another one."""
        low, high = sorted((client_id, other))
        mask = self._stream(_key(agreed, f"mask of {low} and {high}, round {round}"))
        return vector + mask if client_id < other else vector - mask

    def _stream(self, key: bytes) -> Words:
        """Of a key that is used once."""
        return np.frombuffer(primitives.Stream(key).read(self.numbers.num_bytes), dtype=self.numbers.dtype)

    def _letter_key(self, client: Client, roster: Mapping[int, PublicKeys], public: bytes) -> bytes:
        """Of two clients that were told one roster: those who were told two cannot read each other."""
        told = hashlib.sha256()
        for client_id in sorted(roster):
            told.update(client_id.to_bytes(8) + roster[client_id].letters + roster[client_id].masks)
        agreed = primitives.agreed(client.letters_key, public)
        return _key(agreed, f"letters, round {client.round}, among {told.hexdigest()}")


def _keys_of(client: Client) -> PublicKeys:
    letters, masks = primitives.public_key(client.letters_key), primitives.public_key(client.masks_key)
    return PublicKeys(client.client_id, letters, masks)


def _point(client_id: int) -> int:
    """Where a client's shares lie; 0 is the secret's."""
    return client_id + 1


def _hash(share: bytes) -> bytes:
    """Of 256 random bits, which it does not give away."""
    return hashlib.sha256(b"fedpilot secure sum: share" + share).digest()


def _address(round: int, sender: int, receiver: int) -> bytes:
    return f"round {round}, {sender} to {receiver}".encode()


def _key(secret: bytes, purpose: str) -> bytes:
    return primitives.derived(secret, f"fedpilot secure sum: {purpose}")
