"""How fast adapters are aggregated as they come in, against what the machine's memory can copy.

    python benchmarks/aggregation.py                        # 200 clients a rule, extrapolated to 10,000
    python benchmarks/aggregation.py --clients 10000 --runs 1
    python benchmarks/aggregation.py --dense                # also products of more clients than a matrix has rows

Adapters have the shapes of a 7B model: 32 blocks, query and value projections of 4096 x 4096, rank 16, float32, 32 MiB
a client. Uploads come from a small ring of buffers, larger than the caches together. Each rule is the algorithm's own
``aggregate``. Its time is split: *passing*, while uploads come in, which is paid for every client; and *closing*, after
the last, which is paid once a round.

The yardstick is a copy of the same uploads, measured right before each run of a rule: tensor by tensor into one set of
buffers, and as one piece; the faster counts. Ratios are of a run and the copy before it. A copy reads and writes a byte
for each byte of an upload; a running mean reads the upload and the sum and writes the sum, so two thirds of the copy
are its bound where the sum lies in memory and not in a cache. Three rules are bound by arithmetic instead, that is by
the machine's matrix product:

- HetLoRA's norm ||B A|| takes r / 2 = 8 operations in float64 a byte of an upload.
- FLoRA and FlexLoRA stack: passing copies and transposes, into memory that is touched for the first time, which a copy
  without any arithmetic ("kept") pays for as well. That is so as long as the stacked ranks are at most 4096, for 256
  clients. Beyond that the sum has full rank, and to take a client in costs 2 r in out operations a module: 1024 a byte.
- FlexLoRA closes with QR and SVD of the stack, FLoRA with a copy of it, or with the product where that is smaller.
"""

import argparse
import datetime
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpilot import lora, tensors
from fedpilot.algorithms import FedIT, FedPilot, FlexLoRA, FLoRA, HetLoRA
from fedpilot.memory.counting import LiveStorages
from fedpilot.types import Algorithm, ModelSpec, Tensors, Upload

POPULATION = 10_000


@dataclass(frozen=True)
class Rule:
    """An algorithm's aggregation.

    Attributes:
        name: For the table.
        make: From the spec and the rank to the algorithm.
        stacks: Whether it keeps the uploads' factors, so that a run takes fewer clients.
        mixed: Whether every second client has half the rank.
    """

    name: str
    make: Callable[[ModelSpec, int], Algorithm[Any]]
    stacks: bool = False
    mixed: bool = False


NO_PROFILE: Any = None
RULES = (
    Rule("mean (FedIT)", lambda s, r: FedIT(s, NO_PROFILE, rank=r)),
    Rule("slot mean (Fed-piLot, layerwise)", lambda s, r: FedPilot(s, NO_PROFILE, rank=r, aggregation="layerwise")),
    Rule(
        "slot mean, ranks 8 and 16", lambda s, r: FedPilot(s, NO_PROFILE, rank=r, aggregation="layerwise"), mixed=True
    ),
    Rule("padded mean (HetLoRA by examples)", lambda s, r: HetLoRA(s, NO_PROFILE, r_max=r, weights="examples")),
    Rule("padded mean, ranks 8 and 16", lambda s, r: HetLoRA(s, NO_PROFILE, r_max=r, weights="examples"), mixed=True),
    Rule("padded mean and norms (HetLoRA)", lambda s, r: HetLoRA(s, NO_PROFILE, r_max=r)),
    Rule("stack (FLoRA)", lambda s, r: FLoRA(s, NO_PROFILE, r_max=r), stacks=True),
    Rule("stack and SVD (FlexLoRA)", lambda s, r: FlexLoRA(s, NO_PROFILE, r_max=r), stacks=True),
)


def model(blocks: int, width: int) -> ModelSpec:
    """Query and value projections of every block."""
    modules = {f"layers.{j}.self_attn.{kind}_proj": (width, width) for j in range(blocks) for kind in "qv"}
    return ModelSpec(modules, {name: int(name.split(".")[1]) for name in modules}, blocks, scale=2.0)


def ring(spec: ModelSpec, rank: int, size: int, *, mixed: bool) -> list[Tensors]:
    """Adapters without zeros, as after training."""
    made = []
    for index in range(size):
        generator = torch.Generator().manual_seed(index)
        of_client = rank // 2 if mixed and index % 2 else rank
        shapes = lora.shapes(spec, dict.fromkeys(spec.modules, of_client))
        made.append({name: torch.randn(shape, generator=generator) / 16 for name, shape in shapes.items()})
    return made


class Passing:
    """Hands out uploads of the ring and measures how long their reader takes between two of them."""

    def __init__(self, buffers: Sequence[Tensors], clients: int) -> None:
        self.seconds, self.num_bytes, self.ended = 0.0, 0, 0.0
        self._buffers, self._clients = buffers, clients

    def __iter__(self) -> Iterator[Upload]:
        for client in range(self._clients):
            adapter = self._buffers[client % len(self._buffers)]
            rank = next(iter(adapter.values())).shape[0]
            self.num_bytes += tensors.num_bytes(adapter)
            upload = Upload(client, 50 + client % 7, adapter, {"rank": float(rank)})
            start = time.perf_counter()
            yield upload
            self.ended = time.perf_counter()
            self.seconds += self.ended - start


def copy_speed(buffers: Sequence[Tensors], target: dict[str, torch.Tensor], clients: int) -> float:
    """GB/s of copying uploads: tensor by tensor into one set of buffers, or as one piece, whichever is faster."""
    num_bytes, start = 0, time.perf_counter()
    for client in range(clients):
        for name, tensor in buffers[client % len(buffers)].items():
            target[name].reshape(-1)[: tensor.numel()].copy_(tensor.reshape(-1))
            num_bytes += tensor.numel() * tensor.element_size()
    by_tensor = num_bytes / (time.perf_counter() - start)
    piece = torch.ones(sum(tensor.numel() for adapter in buffers for tensor in adapter.values()))
    copied = piece.clone()
    start = time.perf_counter()
    for _ in range(3):
        copied.copy_(piece)
    return max(by_tensor, 3 * 4 * piece.numel() / (time.perf_counter() - start)) / 1e9


def keep_speed(buffers: Sequence[Tensors], clients: int) -> float:
    """GB/s of copying uploads into memory that is touched for the first time, a slab of eight clients at a time."""
    num_bytes, kept, start = 0, [], time.perf_counter()
    for client in range(clients):
        adapter = buffers[client % len(buffers)]
        if client % 8 == 0:
            kept.append({name: torch.empty(8, tensor.numel()) for name, tensor in adapter.items()})
        for name, tensor in adapter.items():
            kept[-1][name][client % 8].copy_(tensor.reshape(-1))
            num_bytes += tensor.numel() * tensor.element_size()
    return num_bytes / (time.perf_counter() - start) / 1e9


def product_speed(width: int, inner: int, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a matrix product with the inner dimension of a block of stacked ranks."""
    left, right = torch.randn(width, inner, dtype=dtype), torch.randn(inner, width, dtype=dtype)
    total = torch.zeros(width, width, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        total.addmm_(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * width * width * inner / min(seconds) / 1e9


def held_bytes(rule: Rule, spec: ModelSpec, rank: int, clients: int) -> int:
    """Highest bytes alive during an aggregation, uploads of the ring left out."""
    algorithm = rule.make(spec, rank)
    state, buffers = algorithm.init(np.random.default_rng(0)), ring(spec, rank, 2, mixed=rule.mixed)
    counter = LiveStorages()
    counter.hold([tensor for adapter in buffers for tensor in adapter.values()])
    before = counter.live
    with counter.counting():
        algorithm.aggregate(state, iter(Passing(buffers, clients)))
    return counter.peak - before


def row(rule: Rule, spec: ModelSpec, options: argparse.Namespace) -> str:
    """Medians over the runs of a rule."""
    algorithm = rule.make(spec, options.rank)
    state = algorithm.init(np.random.default_rng(0))
    buffers = ring(spec, options.rank, options.ring, mixed=rule.mixed)
    target = {name: torch.empty_like(tensor) for name, tensor in buffers[0].items()}
    clients = min(options.clients, options.stacked) if rule.stacks else options.clients
    rates, ratios, kept, closing = [], [], [], []
    for _ in range(options.runs):
        copied = copy_speed(buffers, target, min(clients, 100))
        passing = Passing(buffers, clients)
        algorithm.aggregate(state, iter(passing))
        closing.append(time.perf_counter() - passing.ended)
        rates.append(passing.num_bytes / passing.seconds / 1e9)
        ratios.append(rates[-1] / copied)
        if rule.stacks:
            kept.append(rates[-1] / keep_speed(buffers, clients))
    client_s = passing.num_bytes / clients / statistics.median(rates) / 1e9
    whole = (
        f"{statistics.median(kept):.2f} of a kept copy"
        if rule.stacks
        else f"{POPULATION * client_s + statistics.median(closing):8.0f} s"
    )
    return (
        f"{rule.name:36}{clients:8}  {statistics.median(rates):7.2f}  {statistics.median(ratios):6.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f})  {statistics.median(closing):9.2f}  {whole:>12}"
    )


def dense_row(options: argparse.Namespace) -> str:
    """One module beyond the rank at which the sum is dense: operations a second, and what 10,000 clients would take."""
    (adapter,) = ring(model(1, options.width), options.rank, 1, mixed=False)
    a, b = list(adapter.values())[:2]
    total = lora.ProductSum(options.width, options.width)
    for _ in range(options.width // options.rank + 1):  # fills the stack; what is timed begins behind it
        total.add(b, a, 1.0)
    clients, start = 1024 // options.rank, time.perf_counter()
    for _ in range(clients):
        total.add(b, a, 1.0)
    seconds = (time.perf_counter() - start) / clients
    rate = 2 * options.width**2 * options.rank / seconds / 1e9
    bound = product_speed(options.width, 256)
    start = time.perf_counter()
    total.svd()
    closing = time.perf_counter() - start
    modules = 2 * options.blocks
    return (
        f"a dense sum of products, one module: {seconds * 1e3:.1f} ms a client, {rate:.1f} GFLOP/s of the {bound:.1f} "
        f"that a matrix product of the same shape reaches ({rate / bound:.2f}); its SVD {closing:.1f} s; "
        f"{modules} modules and {POPULATION} clients: {modules * POPULATION * seconds / 3600:.1f} h, "
        f"closing {modules * closing / 60:.0f} min (extrapolated)"
    )


def norm_row(options: argparse.Namespace) -> str:
    """Operations a second of HetLoRA's norm."""
    (adapter,) = ring(model(1, options.width), options.rank, 1, mixed=False)
    a, b = list(adapter.values())[:2]
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        lora.product_norm(a, b)
        seconds.append(time.perf_counter() - start)
    rate = 4 * options.rank**2 * options.width / statistics.median(seconds) / 1e9
    bound = product_speed(2048, 256, torch.float64)
    return (
        f"the norm of a product of {options.width} x {options.rank}: {rate:.1f} GFLOP/s in float64 with its "
        f"conversion, of the {bound:.1f} that a large matrix product reaches ({rate / bound:.2f})"
    )


def machine() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} used, "
        f"load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--stacked", type=int, default=16, help="most clients of a run of the rules that keep factors")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--ring", type=int, default=6, help="adapters that uploads are taken from")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="rules whose name holds this")
    parser.add_argument("--dense", action="store_true", help="also the sum beyond full rank; a few minutes")
    options = parser.parse_args()
    spec = model(options.blocks, options.width)
    size = tensors.num_bytes(ring(model(1, options.width), options.rank, 1, mixed=False)[0]) * options.blocks
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; {machine()}")
    print(
        f"{len(spec.modules)} modules of {options.width} x {options.width}, rank {options.rank}: "
        f"{size / 2**20:.0f} MiB a client, from a ring of {options.ring}; medians of {options.runs} runs"
    )
    kind = "measured" if options.clients == POPULATION else "extrapolated"
    print(f"{'':36}{'':8}  {'passing':>7}  {'of a copy':>18}  {'closing':>9}  {f'{POPULATION} clients':>14}")
    print(f"{'rule':36}{'clients':>8}  {'GB/s':>7}  {'(least-most)':>18}  {'s a round':>9}  {kind:>14}")
    for rule in RULES:
        if options.only in rule.name:
            print(row(rule, spec, options), flush=True)
    small = model(2, 512)
    print("\nhighest bytes alive beside the uploads, 4 modules of 512 x 512, by clients:")
    for rule in RULES:
        held = {clients: held_bytes(rule, small, 16, clients) for clients in (80, 160, 320)}
        print(f"{rule.name:36}" + "  ".join(f"{count}: {size / 2**20:.2f} MiB" for count, size in held.items()))
    print("\n" + norm_row(options))
    if options.dense:
        print(dense_row(options))
    print(
        f"\npeak resident memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )


if __name__ == "__main__":
    main()
