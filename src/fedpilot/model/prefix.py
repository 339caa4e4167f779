"""The frozen prefix: blocks below the lowest trained one, run once an example and remembered within a bound.

What such a block gives depends on the example and on tensors that do not change while a client trains. Its output is
kept by example, without padding, so that batches may be drawn anew in every epoch; a batch of which nothing is known
goes through the prefix as it is, to the same bits as without a cache.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from fedpilot.tensors import digest
from fedpilot.types import Tensors

Inputs = Mapping[str, torch.Tensor]


class PrefixCache:
    """Outputs of frozen prefixes, by prefix and example, in at most so many bytes.

    What was used longest ago goes first; nothing of the current turn goes, so that a client with more examples than
    fit keeps those that do.

    Args:
        max_bytes: Bound on the sum of the kept tensors.

    Attributes:
        num_bytes: The sum.
        hits: Examples that were found.
        misses: Examples that were not.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._turn = 0
        self._prefix = b""
        self._kept: OrderedDict[tuple[bytes, bytes], tuple[int, torch.Tensor]] = OrderedDict()

    def begin(self, prefix: bytes) -> None:
        """Starts a turn with a prefix; what is kept of it from earlier turns counts."""
        self._turn += 1
        self._prefix = prefix

    def get(self, example: bytes, prefix: bytes | None = None) -> torch.Tensor | None:
        """The output for an example, (length, width), of the turn's prefix or of another."""
        key = (self._prefix if prefix is None else prefix, example)
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept[key] = (self._turn, found[1])
        self._kept.move_to_end(key)
        return found[1]

    def put(self, example: bytes, view: torch.Tensor, prefix: bytes | None = None) -> None:
        """Keeps a copy if there is room, or room can be made."""
        size, key = view.nbytes, (self._prefix if prefix is None else prefix, example)
        if key in self._kept or size > self.max_bytes:
            return
        while self.num_bytes + size > self.max_bytes:
            turn, oldest = next(iter(self._kept.values()))
            if turn == self._turn:
                return
            self._kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes
        self._kept[key] = (self._turn, view.clone())
        self.num_bytes += size

    def tensors(self) -> list[torch.Tensor]:
        """All that is kept."""
        return [tensor for _, tensor in self._kept.values()]


class Prefix:
    """A loaded model's blocks below its lowest trained one.

    Args:
        blocks: All blocks that run.
        depth: How many of them are the prefix; at least 1.
        cache: Keeps outputs.
        key: Of all that the outputs depend on beside the example.
    """

    def __init__(self, blocks: Sequence[nn.Module], depth: int, cache: PrefixCache, key: bytes) -> None:
        self._last, self._cache = blocks[depth - 1], cache
        self._gives = _Gives(self._last)
        # As many entries as there are blocks: some models choose a block's mask by its number.
        self.rest = nn.ModuleList([*(_PassesOn(block) for block in blocks[: depth - 1]), self._gives, *blocks[depth:]])
        cache.begin(key)

    def prepare(self, inputs: Inputs, forward: Callable[[Inputs], object]) -> None:
        """Makes ``rest`` give the prefix's output for these inputs.

        Args:
            inputs: A batch without its labels.
            forward: Runs the whole model on a batch; is stopped at the end of the prefix.
        """
        examples = _examples(inputs)
        found = [self._cache.get(key) for key, _ in examples]
        missing = [index for index, hidden in enumerate(found) if hidden is None]
        made: torch.Tensor | None = None
        if missing:
            everything = len(missing) == len(examples)
            made = self._run(inputs if everything else {n: t[missing] for n, t in inputs.items()}, forward)
            for row, index in enumerate(missing):
                key, length = examples[index]
                found[index] = made[row] if length is None else made[row, :length]
                self._cache.put(key, found[index])  # type: ignore[arg-type]
        self._gives.hidden = made if len(missing) == len(examples) else _stacked(found, examples, inputs)

    def clear(self) -> None:
        """Lets go of the last output."""
        self._gives.hidden = None

    @torch.no_grad()
    def _run(self, inputs: Inputs, forward: Callable[[Inputs], object]) -> torch.Tensor:
        hook = self._last.register_forward_hook(_stop)
        try:
            forward(inputs)
        except _ReachedError as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise AssertionError("the last block of the prefix runs in every forward pass")


def by_example(
    cache: PrefixCache | None, name: bytes, inputs: Inputs, run: Callable[[Inputs], torch.Tensor]
) -> torch.Tensor:
    """``run(inputs)``, (examples, width), where each row follows from its example alone: known rows are not run again.

    Args:
        cache: Keeps rows; ``None`` runs all.
        name: Of all that the rows depend on beside the example.
        inputs: A batch without its labels.
        run: From inputs to rows.
    """
    if cache is None:
        return run(inputs)
    keys = [key for key, _ in _examples(inputs)]
    found = [cache.get(key, name) for key in keys]
    missing = [index for index, row in enumerate(found) if row is None]
    if missing:
        made = run(inputs if len(missing) == len(keys) else {n: t[missing] for n, t in inputs.items()})
        for row, index in zip(made, missing, strict=True):
            found[index] = row
            cache.put(keys[index], row, name)
    return torch.stack([row for row in found if row is not None])


class _ReachedError(Exception):
    """The prefix is done; what follows is not needed."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(module: nn.Module, args: object, output: torch.Tensor) -> None:
    raise _ReachedError(output)


class _PassesOn(nn.Module):
    """Stands where a block stood and does nothing."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if hasattr(block, "attention_type"):  # by which some models choose its mask
            self.attention_type = block.attention_type

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden


class _Gives(_PassesOn):
    """Stands where the prefix's last block stood and gives what it gave."""

    hidden: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        assert self.hidden is not None, "prepared before every forward pass"
        return self.hidden


def entered_at(blocks: Sequence[nn.Module], depth: int) -> nn.ModuleList:
    """The blocks, of which those below ``depth`` do nothing."""
    return nn.ModuleList([*(_PassesOn(block) for block in blocks[:depth]), *blocks[depth:]])


def _examples(inputs: Inputs) -> list[tuple[bytes, int | None]]:
    """Each example's key, and its length where padding stands behind it; ``None`` keeps whole rows.

    Padding before the tokens shifts their positions, which some models count from the row's start.
    """
    arithmetic = f"{torch.is_autocast_enabled(next(iter(inputs.values())).device.type)} "
    host = {name: tensor.cpu().contiguous() for name, tensor in sorted(inputs.items())}
    mask = host.get("attention_mask")
    count = next(iter(host.values())).shape[0]
    lengths: list[int | None] = [None] * count
    if mask is not None and mask.ndim == 2:
        sums = mask.sum(dim=1)
        if torch.equal(mask.bool(), torch.arange(mask.shape[1]) < sums[:, None]):
            lengths = [int(length) for length in sums]

    def key(index: int) -> bytes:
        hashed = hashlib.blake2b(arithmetic.encode(), digest_size=16)
        for name, tensor in host.items():
            row = tensor[index]
            along = mask is not None and tensor.shape == mask.shape
            row = row[: lengths[index]] if along else row
            hashed.update(f"{name} {tuple(row.shape)} {row.dtype} ".encode())
            hashed.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())
        return hashed.digest()

    return [(key(index), lengths[index]) for index in range(count)]


def _stacked(
    found: Sequence[torch.Tensor | None], examples: Sequence[tuple[bytes, int | None]], inputs: Inputs
) -> torch.Tensor:
    """(examples, length, width) with zeros for padding: it is masked, so that no value there counts."""
    rows = [row for row in found if row is not None]
    if all(length is None for _, length in examples):
        return torch.stack(rows)
    hidden = rows[0].new_zeros(len(rows), inputs["attention_mask"].shape[1], rows[0].shape[-1])
    for index, row in enumerate(rows):
        hidden[index, : row.shape[0]] = row
    return hidden


def key_of(tensors: Tensors, *facts: object) -> bytes:
    """A key that differs wherever a tensor below or one of the facts does."""
    return f"{digest(tensors)} {facts}".encode()
