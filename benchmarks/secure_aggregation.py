"""What secure aggregation costs: bytes of a client against a plain upload, and seconds of each stage of a round.

The adapter of MiniLM-L6 (rank 8, query and value of six blocks, a head of 77 classes), 10 clients in this process, one
after the other, without training: each stage is the sum over its clients, so what a client of a deployment needs is a
tenth, and what the server needs stands apart. Two clients leave after they masked and one before, so that both kinds of
mask are taken off. Usage: python benchmarks/secure_aggregation.py [--clients 10] [--rounds 5] [--bits 32]
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterator
from datetime import date

import torch

from fedpilot.privacy import notes
from fedpilot.privacy.fixed_point import FixedPoint
from fedpilot.privacy.notes import Layout, Note
from fedpilot.privacy.participant import MASKED, Participant, vector_of
from fedpilot.privacy.secure_aggregation import Gathered, Letters, MaskedInput
from fedpilot.privacy.secure_settings import SecureAggregation
from fedpilot.tensors import num_bytes
from fedpilot.types import Plan, Task, Tensors, Upload

WIDTH, BLOCKS, RANK, LABELS = 384, 6, 8, 77


def adapter(seed: int) -> Tensors:
    """Random entries of the size of an update."""
    shapes: dict[str, tuple[int, ...]] = {"classifier.weight": (LABELS, WIDTH), "classifier.bias": (LABELS,)}
    for block in range(BLOCKS):
        for kind in ("query", "value"):
            module = f"encoder.layer.{block}.attention.self.{kind}"
            shapes |= {f"{module}.lora_A": (RANK, WIDTH), f"{module}.lora_B": (WIDTH, RANK)}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Stages:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str) -> "Stage":
        return Stage(self.seconds.setdefault(name, []))


class Stage:
    def __init__(self, found: list[float]) -> None:
        self._found = found

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._found.append(time.perf_counter() - self._started)


def one_round(
    round: int, settings: SecureAggregation, present: Tensors, uploads: dict[int, Upload], stages: Stages
) -> tuple[float, dict[str, int]]:
    """A whole round; its largest error, and bytes of one client up and down beside the task."""
    people = {k: Participant(settings) for k in uploads}
    layout = Layout({name: tuple(tensor.shape) for name, tensor in present.items()}, False, 1)
    tasks = {k: Task(Plan(k, {}, frozenset(present)), present) for k in uploads}
    counted = {"up": 0, "down": 0}

    def asked(stage: notes.Stage, bodies: dict[int, notes.Json]) -> Iterator[tuple[int, Note]]:
        for k, body in bodies.items():
            text = notes.written(stage, f"session {round}", body)
            answer = people[k].answer(k, round, text)
            if k == 0:
                counted["up"] += len(answer)
                counted["down"] += len(text)
            yield k, Note(answer)

    with stages.timed("advertise"):
        roster = {k: note.keys(k) for k, note in asked("advertise", {k: {} for k in uploads})}
    agreed = settings.agreed(layout.shapes, len(roster), 1)
    with stages.timed("share"):
        body = notes.of_roster(roster, layout)
        dealt: dict[int, Letters] = {k: note.letters(k) for k, note in asked("share", dict.fromkeys(uploads, body))}
    gathered: Gathered | None = None
    left, silent = {len(uploads) - 1}, {1, 2}
    masked: list[Upload] = []
    with stages.timed("mask"):
        for k in uploads.keys() - left:
            box = {sender: letters.to[k] for sender, letters in dealt.items() if sender != k}
            text = notes.written("mask", f"session {round}", notes.of_box(box))
            masked.append(people[k].mask(round, text, tasks[k], uploads[k]))
            if k == 0:
                counted["up"] += num_bytes(masked[-1].tensors)
                counted["down"] += len(text)
    with stages.timed("gather (server)"):
        for upload in masked:
            gathered = agreed.gather(gathered, MaskedInput(upload.client_id, vector_of(upload, agreed)))
    assert gathered is not None
    with stages.timed("unmask"):
        request = agreed.request(dealt, gathered)
        bodies = {k: notes.of_request(request) for k in sorted(request.arrived - silent)}
        answers = [note.unmasking(k) for k, note in asked("unmask", bodies)]
    with stages.timed("take off masks (server)"):
        for answer in answers:
            agreed.check_answer(dealt, request, answer)
        sums = agreed.total(round, roster, request, gathered, answers)
    error = 0.0
    for name, value in sums.values.items():
        plain = sum(uploads[k].tensors[name].double() - present[name].double() for k in request.arrived)
        error = max(error, float((value - plain).abs().max()))
    assert error <= len(request.arrived) * agreed.numbers.step / 2 * (1 + 1e-9), "the sum is wrong"
    assert MASKED in masked[0].tensors
    return error, counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, choices=(32, 64), default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = SecureAggregation(bits=options.bits)
    present = adapter(0)
    uploads = {
        k: Upload(k, 10, {n: t + u for (n, t), u in zip(present.items(), adapter(k + 1).values(), strict=True)})
        for k in range(options.clients)
    }
    stages, error, counted = Stages(), 0.0, dict[str, int]()
    for round in range(1, options.rounds + 1):
        found, counted = one_round(round, settings, present, uploads, stages)
        error = max(error, found)
    numbers: FixedPoint = settings.agreed({n: tuple(t.shape) for n, t in present.items()}, options.clients, 1).numbers
    plain = num_bytes(present)
    load = os.getloadavg()[0]
    print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, 1 thread, "
        f"torch {torch.__version__}"
    )
    print(
        f"{options.clients} clients, {plain // 4} entries, {options.bits} bits, step {numbers.step:.3g}, "
        f"largest error of the sum {error:.3g}, bound {options.clients * numbers.step / 2:.3g}"
    )
    print(
        f"a client sends {counted['up']} bytes ({counted['up'] / plain:.4f} x a plain upload of {plain}) and gets "
        f"{counted['down']} beside its task"
    )
    for name, seconds in stages.seconds.items():
        print(f"{name:24} {statistics.median(seconds):8.4f} s ({min(seconds):.4f} to {max(seconds):.4f})")


if __name__ == "__main__":
    main()
