"""The small messages of a secure sum as JSON, and back without trusting them; nothing is ever unpickled.

A note names its stage and the session: a number that the server draws for each attempt at a round, so that what belongs
to another attempt, late or replayed, is refused.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedpilot.errors import SecureSumError
from fedpilot.privacy import shamir
from fedpilot.privacy.primitives import KEY_BYTES, NONCE_BYTES, TAG_BYTES
from fedpilot.privacy.secure_aggregation import Letters, PublicKeys, Unmasking, UnmaskRequest

Json: TypeAlias = Mapping[str, object]
Stage: TypeAlias = Literal["advertise", "share", "mask", "unmask"]

HASH_BYTES = 32
LETTER_BYTES = NONCE_BYTES + 2 * shamir.SHARE_BYTES + TAG_BYTES
MOST_AXES, MOST_NAME = 8, 1024


@dataclass(frozen=True)
class Layout:
    """What is summed in a round, and by what weight.

    Attributes:
        shapes: Name -> shape of every tensor.
        by_examples: Whether a client's weight is its number of examples; else it is 1.
        max_weight: Largest weight of a client.
    """

    shapes: Mapping[str, tuple[int, ...]]
    by_examples: bool
    max_weight: int


def written(stage: Stage, session: str, body: Json) -> str:
    """A note."""
    return json.dumps({"stage": stage, "session": session, **body}, allow_nan=False, separators=(",", ":"))


class Note:
    """Checked access to a note that came.

    Args:
        text: JSON.

    Raises:
        SecureSumError: It is no note; every method raises it for what is not as it must be.
    """

    def __init__(self, text: str) -> None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _refused("JSON", str(error)) from error
        if not isinstance(found, dict):
            raise _refused("a JSON object", found)
        self._body: Json = found
        self.stage, self.session = found.get("stage"), found.get("session")

    def expect(self, stage: Stage, session: str) -> None:
        """Refuses a note of another stage or session."""
        if self.stage != stage or self.session != session:
            raise _refused(f"of stage {stage} and this session", f"{self.stage}, {self.session}")

    # what is in them

    def keys(self, client_id: int) -> PublicKeys:
        """Of trip 1."""
        letters, masks = self._list("keys", 2)
        return PublicKeys(client_id, _bytes(letters, KEY_BYTES), _bytes(masks, KEY_BYTES))

    def roster(self) -> dict[int, PublicKeys]:
        """Of trip 2, down."""
        return {k: PublicKeys(k, *row) for k, row in self._rows("roster", KEY_BYTES, KEY_BYTES).items()}

    def layout(self) -> Layout:
        """Of trip 2, down."""
        shapes: dict[str, tuple[int, ...]] = {}
        for row in self._list("layout"):
            name, shape = _row(row, 2)
            if not isinstance(name, str) or len(name) > MOST_NAME or name in shapes:
                raise _refused("distinct names of tensors", name)
            shapes[name] = tuple(_integer(size, 1) for size in _row(shape, None)[: MOST_AXES + 1])
        by_examples = self._body.get("by_examples")
        if not isinstance(by_examples, bool):
            raise _refused("true or false for by_examples", by_examples)
        return Layout(shapes, by_examples, _integer(self._body.get("max_weight"), 1))

    def letters(self, client_id: int) -> Letters:
        """Of trip 2, up."""
        to = {k: row[0] for k, row in self._rows("letters", LETTER_BYTES).items()}
        hashes = {k: (row[0], row[1]) for k, row in self._rows("hashes", HASH_BYTES, HASH_BYTES).items()}
        return Letters(client_id, to, hashes)

    def box(self) -> dict[int, bytes]:
        """Of trip 3, down: sender -> letter."""
        return {k: row[0] for k, row in self._rows("box", LETTER_BYTES).items()}

    def request(self) -> UnmaskRequest:
        """Of trip 4, down."""
        arrived, left = (frozenset(_integer(k, 0) for k in self._list(key)) for key in ("arrived", "left"))
        return UnmaskRequest(arrived, left)

    def unmasking(self, client_id: int) -> Unmasking:
        """Of trip 4, up."""
        seeds, keys = (self._rows(key, shamir.SHARE_BYTES) for key in ("seeds", "keys"))
        return Unmasking(client_id, {k: row[0] for k, row in seeds.items()}, {k: row[0] for k, row in keys.items()})

    def _list(self, key: str, length: int | None = None) -> Sequence[object]:
        return _row(self._body.get(key), length)

    def _rows(self, key: str, *sizes: int) -> dict[int, tuple[bytes, ...]]:
        """Client -> texts of so many bytes each."""
        found: dict[int, tuple[bytes, ...]] = {}
        for row in self._list(key):
            client, *texts = _row(row, 1 + len(sizes))
            client_id = _integer(client, 0)
            if client_id in found:
                raise _refused(f"each client once in {key}", client_id)
            found[client_id] = tuple(_bytes(text, size) for text, size in zip(texts, sizes, strict=True))
        return found


# --- bodies -------------------------------------------------------------------------------------------------------


def of_keys(keys: PublicKeys) -> Json:
    """Trip 1, up."""
    return {"keys": [_text(keys.letters), _text(keys.masks)]}


def of_roster(roster: Mapping[int, PublicKeys], layout: Layout) -> Json:
    """Trip 2, down."""
    return {
        "roster": [[k, _text(keys.letters), _text(keys.masks)] for k, keys in sorted(roster.items())],
        "layout": [[name, list(shape)] for name, shape in sorted(layout.shapes.items())],
        "by_examples": layout.by_examples,
        "max_weight": layout.max_weight,
    }


def of_letters(letters: Letters) -> Json:
    """Trip 2, up."""
    hashes = [[k, _text(seed), _text(key)] for k, (seed, key) in sorted(letters.hashes.items())]
    return {"letters": _texts(letters.to), "hashes": hashes}


def of_box(box: Mapping[int, bytes]) -> Json:
    """Trip 3, down."""
    return {"box": _texts(box)}


def of_request(request: UnmaskRequest) -> Json:
    """Trip 4, down."""
    return {"arrived": sorted(request.arrived), "left": sorted(request.left)}


def of_unmasking(answer: Unmasking) -> Json:
    """Trip 4, up."""
    return {"seeds": _texts(answer.seeds), "keys": _texts(answer.keys)}


def _texts(of: Mapping[int, bytes]) -> list[list[object]]:
    return [[client_id, _text(data)] for client_id, data in sorted(of.items())]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- checks -------------------------------------------------------------------------------------------------------


def _refused(rule: str, got: object) -> SecureSumError:
    shown = repr(got)
    return SecureSumError(f"a note of a secure sum must be {rule}, got {shown[:80]}; refuse it")


def _bytes(value: object, size: int) -> bytes:
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != size:
        raise _refused(f"made of {size} bytes where it says so", type(value).__name__)  # not the value: it is a secret
    return data


def _integer(value: object, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**63:
        raise _refused(f"made of whole numbers from {lowest}", value)
    return value


def _row(value: object, length: int | None) -> Sequence[object]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise _refused("a list" if length is None else f"made of lists of {length}", type(value).__name__)
    return value
