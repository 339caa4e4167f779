"""Secure aggregation: the server learns a sum of uploads and no single one, though some clients leave on the way.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", 2017 (CCS; ePrint 2017/281).

A round has four trips, each of them pure functions over frozen messages:

1. *advertise*: every client draws two X25519 key pairs, one for letters and one for masks; the server hands all public
   keys to all.
2. *share*: every client draws a seed of its own and sends Shamir shares of it, and of its mask key, to each other one,
   encrypted through the server.
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

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from fedpilot.errors import PlanError, SecureSumError
from fedpilot.privacy import shamir
from fedpilot.privacy.fixed_point import FixedPoint, Sums, Words
from fedpilot.types import Averages, Tensors

Random: TypeAlias = Callable[[int], bytes]
"""Gives so many secret random bytes."""

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16


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
    """Trip 2, up: one encrypted letter to each other client, which the server passes on and cannot read."""

    client_id: int
    to: Mapping[int, bytes]


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

    def check(self, algorithm: object) -> None:
        """Refuses a method whose aggregation is not a sum, or which sends more than tensors.

        Raises:
            PlanError: As said.
        """
        how = algorithm.averaging if isinstance(algorithm, Averages) else None
        by_examples = getattr(algorithm, "weights", "uniform") in ("uniform", "examples")
        if how is None:
            reason = "which stacks, decomposes or corrects them"
        elif not how.tensors_only:
            reason = "whose clients also send scores, ranks or counts, which would travel openly"
        elif not by_examples:
            reason = "which weighs clients by what they send"
        else:
            return
        raise PlanError(
            "secure aggregation must go with a method that needs only sums of uploads, got "
            f"{type(algorithm).__name__}, {reason}; take fedit, ffa-lora, hetlora with gamma 1 and weights 'uniform' "
            "or 'examples', or fed-pilot with aggregation 'layerwise' and a solver without scores"
        )

    # a client's side

    def advertise(self, client_id: int, round: int, random: Random = os.urandom) -> tuple[Client, PublicKeys]:
        """Trip 1: fresh keys; none is used in two rounds.

        Raises:
            PlanError: The package cryptography is not installed.
        """
        client = Client(client_id, round, random(KEY_BYTES), random(KEY_BYTES), random(KEY_BYTES))
        return client, PublicKeys(client_id, _public(client.letters_key), _public(client.masks_key))

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
        if own != PublicKeys(client.client_id, _public(client.letters_key), _public(client.masks_key)):
            raise SecureSumError(f"roster must hold the keys of client {client.client_id} as it sent them; refuse it")
        points = [_point(other) for other in roster]
        seeds = shamir.split(client.seed, self.threshold, points, random)
        keys = shamir.split(client.masks_key, self.threshold, points, random)
        letters = {
            other: _sealed(
                self._letter_key(client, keys_of.letters),
                seeds[_point(other)] + keys[_point(other)],
                _address(client.round, client.client_id, other),
                random,
            )
            for other, keys_of in roster.items()
            if other != client.client_id
        }
        point = _point(client.client_id)
        shared = replace(client, roster=dict(roster), shares={client.client_id: (seeds[point], keys[point])})
        return shared, Letters(client.client_id, letters)

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
            key = self._letter_key(client, client.roster[sender].letters)
            both = _opened(key, letter, _address(client.round, sender, client.client_id))
            shares[sender] = both[: shamir.SHARE_BYTES], both[shamir.SHARE_BYTES :]
        if len(shares) < self.threshold:
            raise SecureSumError(
                f"at least {self.threshold} clients must have shared, got {len(shares)}; wait for more, or start over"
            )
        vector = self.numbers.encoded(tensors, weight) + self._own_mask(client.seed, client.round)
        for other in shares:
            if other != client.client_id:
                agreed = _agreed(client.masks_key, client.roster[other].masks)
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
            if _public(key) != roster[gone].masks:
                raise SecureSumError(f"shares of client {gone}'s mask key must give its key; somebody altered one")
            for other in sorted(request.arrived):  # adds what the client would have added
                vector = self._with_pair(vector, _agreed(key, roster[other].masks), round, gone, other)
        return self.numbers.decoded(vector)

    # masks

    def _secret(self, shares: Mapping[int, bytes]) -> bytes:
        return shamir.combined({_point(client_id): share for client_id, share in shares.items()}, self.threshold)

    def _own_mask(self, seed: bytes, round: int) -> Words:
        return self._stream(_derived(seed, f"own mask, round {round}"))

    def _with_pair(self, vector: Words, agreed: bytes, round: int, client_id: int, other: int) -> Words:
        """The vector with what the client adds for its agreement with another one."""
        low, high = sorted((client_id, other))
        mask = self._stream(_derived(agreed, f"mask of {low} and {high}, round {round}"))
        return vector + mask if client_id < other else vector - mask

    def _stream(self, key: bytes) -> Words:
        """ChaCha20's key stream; a key is used once, so its nonce may be zero."""
        algorithms = _primitives().algorithms
        encryptor = _primitives().Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        return np.frombuffer(encryptor.update(bytes(self.numbers.num_bytes)), dtype=self.numbers.dtype)

    def _letter_key(self, client: Client, public: bytes) -> bytes:
        return _derived(_agreed(client.letters_key, public), f"letters, round {client.round}")


def _point(client_id: int) -> int:
    """Where a client's shares lie; 0 is the secret's."""
    return client_id + 1


def _address(round: int, sender: int, receiver: int) -> bytes:
    return f"round {round}, {sender} to {receiver}".encode()


# --- primitives ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Primitives:
    """What is used of the package cryptography."""

    algorithms: Any
    Cipher: Any
    x25519: Any
    AESGCM: Any
    HKDF: Any
    SHA256: Any
    InvalidTag: type[Exception]


def _primitives() -> _Primitives:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.asymmetric import x25519
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise PlanError(
            f"secure aggregation needs the package cryptography, got {error}; pip install 'fedpilot[flower]'"
        ) from error
    return _Primitives(algorithms, Cipher, x25519, AESGCM, HKDF, SHA256, InvalidTag)


def _public(private: bytes) -> bytes:
    key: bytes = _primitives().x25519.X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return key


def _agreed(private: bytes, public: bytes) -> bytes:
    """X25519 of one's private key and the other's public one."""
    x25519 = _primitives().x25519
    try:
        other = x25519.X25519PublicKey.from_public_bytes(public)
        secret: bytes = x25519.X25519PrivateKey.from_private_bytes(private).exchange(other)
    except ValueError as error:
        raise SecureSumError(f"a public key must be one of X25519, got {error}; drop its client") from error
    return secret


def _derived(secret: bytes, purpose: str) -> bytes:
    """HKDF-SHA256 to a key for one purpose."""
    kit = _primitives()
    info = f"fedpilot secure sum: {purpose}".encode()
    key: bytes = kit.HKDF(algorithm=kit.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)
    return key


def _sealed(key: bytes, text: bytes, address: bytes, random: Random) -> bytes:
    """AES-256-GCM; round, sender and receiver are bound to the text."""
    nonce = random(NONCE_BYTES)
    sealed: bytes = nonce + _primitives().AESGCM(key).encrypt(nonce, text, address)
    return sealed


def _opened(key: bytes, letter: bytes, address: bytes) -> bytes:
    kit = _primitives()
    expected = NONCE_BYTES + 2 * shamir.SHARE_BYTES + TAG_BYTES
    if len(letter) != expected:
        raise SecureSumError(f"a letter must have {expected} bytes, got {len(letter)}; refuse it")
    try:
        text: bytes = kit.AESGCM(key).decrypt(letter[:NONCE_BYTES], letter[NONCE_BYTES:], address)
    except kit.InvalidTag as error:
        raise SecureSumError(f"a letter ({address.decode()}) must be whole, got one that is not; refuse it") from error
    return text
