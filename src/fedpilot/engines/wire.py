"""Messages between the processes of one run on one machine: pickles with flat tensors.

Never used over a network: whoever can write to these sockets can run code. The algorithm and a task's log of base
changes are the same objects round after round; they cross once, and come out as the same objects every time, so that a
worker's model sees that nothing has changed.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


class Sender:
    """Packs messages for one receiver; knows what the receiver holds."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, object]] = {}  # the object itself too, so that no id is used twice
        self._next = 0

    def pack(self, message: object, parts: Sequence[object] | None = None) -> bytes:
        """The message as bytes.

        Args:
            message: Any object that can be pickled.
            parts: Objects within it that are sent only when the last message with parts did not have them; ``None``
                leaves the receiver what it holds.
        """
        held = {id(part): self._held.get(id(part)) for part in parts or ()}
        new: dict[int, object] = {}
        for part in parts or ():
            if held[id(part)] is None:
                held[id(part)] = (self._next, part)
                new[self._next] = part
                self._next += 1
        if parts is not None:
            self._held = {key: value for key, value in held.items() if value is not None}
        numbers = {key: number for key, (number, _) in self._held.items()}
        keep = None if parts is None else tuple(numbers.values())
        return _dumps((_dumps((new, keep), {}), _dumps(message, numbers)), {})


class Receiver:
    """Unpacks what one `Sender` packed, in its order."""

    def __init__(self) -> None:
        self._parts: dict[int, object] = {}

    def unpack(self, data: bytes) -> Any:
        """The message."""
        outer, body = pickle.loads(data)
        new, keep = pickle.loads(outer)
        if keep is not None:
            self._parts = {number: part for number, part in {**self._parts, **new}.items() if number in keep}
        return _Unpickler(io.BytesIO(body), self._parts).load()


class _Pickler(pickle.Pickler):
    """Writes tensors as flat arrays (a view's own part only, not its whole storage), and known parts as numbers."""

    def __init__(self, file: io.BytesIO, known: Mapping[int, int]) -> None:
        super().__init__(file, protocol=5)
        self._known = known

    def persistent_id(self, obj: Any) -> int | None:
        return self._known.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor:
            return NotImplemented
        flat = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (flat, obj.dtype, tuple(obj.shape))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parts: Mapping[int, object]) -> None:
        super().__init__(file)
        self._parts = parts

    def persistent_load(self, number: Any) -> object:
        return self._parts[number]


def _tensor(flat: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(flat).view(dtype).reshape(shape)


def _dumps(value: object, known: Mapping[int, int]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, known).dump(value)
    return file.getvalue()
