"""The log of what was added to frozen weights: extended by the server, replayed by clients that missed rounds.

`types.BaseDelta` says what it holds. A version is a sum in a fixed order, so replaying from any earlier version gives
the server's bits. Old steps are folded into a dense snapshot as soon as they are larger than it: a log is never more
than twice the size of the weights that it changes. Where the steps that a client lacks are larger than their sum, or
folded, the sum travels: a download is never larger than those weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from fedpilot import tensors
from fedpilot.errors import PlanError
from fedpilot.types import BaseDelta, Tensors


def a_name(module: str) -> str:
    """Name of the right factor, (rank, in), of a module's step."""
    return f"{module}.base_A"


def b_name(module: str) -> str:
    """Name of the left factor, (out, rank), of a module's step; it carries all scaling."""
    return f"{module}.base_B"


def weight_name(module: str) -> str:
    """Name of the module's weight, and of a dense change of it, (out, in)."""
    return f"{module}.weight"


def modules_of(step: Tensors) -> tuple[str, ...]:
    """Modules whose weights a step changes."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in step))


def pair(module: str, b: torch.Tensor, a: torch.Tensor) -> Tensors:
    """The change ``b @ a`` of a module's weight: as factors, or dense where that is smaller.

    Factors lie row by row: the order in which a product is summed follows the layout, which files and wires lose.
    """
    rank, in_features = a.shape
    out_features = b.shape[0]
    if rank * (in_features + out_features) < in_features * out_features:
        return {a_name(module): a.contiguous(), b_name(module): b.contiguous()}
    return {weight_name(module): b @ a}


def dense(step: Tensors) -> Tensors:
    """``<module>.weight`` -> the step's change, (out, in), in float32.

    >>> step = {"m.base_A": torch.tensor([[1.0, 2.0, 3.0]]), "m.base_B": torch.tensor([[1.0], [10.0]])}
    >>> dense(step)["m.weight"].tolist()
    [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]
    """
    result: dict[str, torch.Tensor] = {}
    for module in modules_of(step):
        if weight_name(module) in step:
            result[weight_name(module)] = step[weight_name(module)].float()
        else:
            result[weight_name(module)] = step[b_name(module)].float() @ step[a_name(module)].float()
    return result


def added(total: Tensors, steps: Iterable[Tensors]) -> Tensors:
    """The total after the steps, one after the other; the given total is not changed."""
    result = {name: tensor.clone() for name, tensor in total.items()}
    for step in steps:
        for name, change in dense(step).items():
            result[name] = result[name] + change if name in result else change.clone()
    return result


def total(base: BaseDelta) -> Tensors:
    """``<module>.weight`` -> what is added to the pristine weight, (out, in), in float32."""
    return added(base.snapshot, base.steps)


def extended(base: BaseDelta, step: Tensors) -> BaseDelta:
    """The next version; steps that have become larger than the snapshot are folded into it, oldest first."""
    steps = (*base.steps, step)
    snapshot, folded = base.snapshot, base.snapshot_version
    whole = _dense_bytes([base.snapshot, *steps])
    while sum(map(tensors.num_bytes, steps)) > whole:
        snapshot, steps, folded = added(snapshot, steps[:1]), steps[1:], folded + 1
    return BaseDelta(base.version + 1, snapshot, folded, steps)


def since(base: BaseDelta, version: int) -> BaseDelta:
    """The log for a client that has a version.

    Raises:
        PlanError: The version has not been made yet.
    """
    if not 0 <= version <= base.version:
        raise PlanError(f"a client's base must be of version 0 to {base.version}, got {version}; resume the right run")
    return replace(base, since=version)


def lacking(base: BaseDelta, held: Mapping[int, int], client_id: int) -> BaseDelta:
    """The log for a client, by what it is known to hold: client -> version, and nothing where it has none."""
    return since(base, held.get(client_id, 0))


def steps_after(base: BaseDelta, version: int) -> tuple[Tensors, ...]:
    """The steps that were made since a version; it must not be older than the snapshot."""
    return base.steps[version - base.snapshot_version :]


def travelling(base: BaseDelta) -> BaseDelta:
    """The log as it travels to a client of version ``base.since``: the steps that it lacks, or the sum of all."""
    if _whole(base):
        return BaseDelta(base.version, total(base), base.version, (), base.since)
    return BaseDelta(base.version, {}, base.since, steps_after(base, base.since), base.since)


def num_bytes(base: BaseDelta) -> int:
    """Bytes of the download."""
    if _whole(base):
        return _dense_bytes([base.snapshot, *base.steps])
    return sum(map(tensors.num_bytes, steps_after(base, base.since)))


def replayed(held: Tensors, base: BaseDelta) -> Tensors:
    """A client's total after a download, equal bit for bit to `total` of the server's log.

    Args:
        held: Its own total at version ``base.since``; not needed where that is older than the snapshot.
        base: What was downloaded.
    """
    if base.since >= base.snapshot_version:
        return added(held, steps_after(base, base.since))
    return total(base)


def _whole(base: BaseDelta) -> bool:
    """Whether the sum travels: steps that are lacking are folded, or larger than it."""
    if base.since < base.snapshot_version:
        return True
    lacking = steps_after(base, base.since)
    return sum(map(tensors.num_bytes, lacking)) > _dense_bytes([base.snapshot, *base.steps])


def _dense_bytes(parts: Iterable[Tensors]) -> int:
    """Bytes of all weights that the parts change, dense in float32."""
    sizes: dict[str, int] = {}
    for part in parts:
        for module in modules_of(part):
            if weight_name(module) in part:
                sizes[module] = part[weight_name(module)].numel()
            else:
                sizes[module] = part[b_name(module)].shape[0] * part[a_name(module)].shape[1]
    return 4 * sum(sizes.values())
