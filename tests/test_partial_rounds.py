"""Rounds that not everybody delivers to: how few are too few, and what running out of memory teaches."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpilot import margins
from fedpilot.config.recipe import read_recipe
from fedpilot.errors import ConfigError, PlanError
from fedpilot.privacy.client_dp import ClientDP
from fedpilot.record import RunDirectory
from fedpilot.rounds import RoundRecord, run_rounds
from fedpilot.runs import train
from fedpilot.safeguards import Safeguards
from fedpilot.types import ClientProfile, Failure, LeftOut, OutOfMemory, Plan, Task, Tensors, Upload
from tests.test_rounds import SPEC, START, Adding

CLIENTS = tuple(ClientProfile(number, 10 * number, 1000) for number in (1, 2, 3))


@dataclass(frozen=True)
class Fitting(Adding):
    """Everybody trains what fits: two thirds of its memory, and at least 300 bytes."""

    def plan(self, state: Tensors, cohort: Sequence[ClientProfile], rng: np.random.Generator) -> list[Plan | LeftOut]:
        plan = Plan(0, {"block.0.linear": 2}, frozenset(START))
        return [
            replace(plan, client_id=client.client_id, peak_bytes=2 * client.memory_bytes // 3)
            if client.memory_bytes >= 450
            else LeftOut(client.client_id, "nothing fits", 450)
            for client in cohort
        ]


class Cohort:
    """Answers with ones; some clients fail, some have less memory than they said."""

    def __init__(self, failing: frozenset[int] = frozenset(), holds: dict[int, int] | None = None) -> None:
        self.failing, self.holds = failing, holds or {}
        self.peaks: list[dict[int, int | None]] = []

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        self.peaks.append({})
        for task in tasks:
            client_id, peak = task.plan.client_id, task.plan.peak_bytes
            self.peaks[-1][client_id] = peak
            if client_id in self.failing:
                yield Failure(client_id, "gone")
            elif (peak or 0) > self.holds.get(client_id, 2**60):
                yield OutOfMemory(client_id, f"could not have {peak} bytes")
            else:
                yield Upload(client_id, 10 * client_id, {name: torch.ones_like(START[name]) for name in START})


def records(engine: Cohort, rounds: int = 1, **options: object) -> tuple[Tensors, list[RoundRecord]]:
    found = list(
        run_rounds(Fitting(SPEC), engine, CLIENTS, lambda _: {}, num_rounds=rounds, seed=0, **options)  # type: ignore[arg-type]
    )
    return found[-1][0], [record for _, record in found]


@pytest.mark.parametrize(
    ("safeguards", "failing", "counts"),
    [
        (Safeguards(min_uploads=2), {1}, True),
        (Safeguards(min_uploads=3), {1}, False),
        (Safeguards(min_share=0.6), {1}, True),  # 2 of 3
        (Safeguards(min_share=0.7), {1}, False),
        (Safeguards(min_uploads=2, min_share=0.3), {1, 3}, False),
        (Safeguards(), {1, 3}, True),
    ],
)
def test_a_round_with_too_few_uploads_leaves_the_state_and_says_so(
    safeguards: Safeguards, failing: set[int], counts: bool
) -> None:
    state, (record,) = records(Cohort(frozenset(failing)), safeguards=safeguards)
    assert record.aggregated == counts
    assert len(record.uploads) == 3 - len(failing)  # what came is on record
    assert len(record.failures) == len(failing)
    changed = any(not torch.equal(state[name], START[name]) for name in START)
    assert changed == counts


def test_a_round_after_one_that_did_not_count_goes_on_from_the_state_before_it() -> None:
    engine = Cohort(frozenset({1, 2}))
    found = list(
        run_rounds(
            Fitting(SPEC), engine, CLIENTS, lambda _: {}, num_rounds=2, seed=0, safeguards=Safeguards(min_uploads=3)
        )
    )
    assert [record.aggregated for _, record in found] == [False, False]
    engine.failing = frozenset()
    state, record = next(
        run_rounds(
            Fitting(SPEC), engine, CLIENTS, lambda _: {}, num_rounds=3, seed=0, first_round=3, state=found[-1][0]
        )
    )
    assert record.aggregated
    assert torch.equal(state["head.bias"], torch.ones(4))


def test_a_minimum_and_noise_that_hides_who_took_part_do_not_go_together() -> None:
    private = ClientDP("client", 1.0, 1.0, 1e-5, None)
    with pytest.raises(PlanError, match=r"must go without run\.min_uploads and run\.min_share"):
        Safeguards(private=private, min_uploads=2).check(Fitting(SPEC))


def test_a_minimum_above_the_cohort_is_a_wrong_recipe() -> None:
    tables = {"run": {"cohort": 2, "min_uploads": 3}}
    with pytest.raises(ConfigError, match="min_uploads must be at most cohort, 2, got 3"):
        read_recipe(tables, "recipe")


def test_who_ran_out_of_memory_is_planned_for_with_less_until_it_delivers() -> None:
    engine = Cohort(holds={2: 500})
    _, found = records(engine, rounds=3)
    # 666 bytes did not fit: the next plan is for 666 / 1.25 = 532 of budget, two thirds of that are trained.
    assert [peaks[2] for peaks in engine.peaks] == [666, 354, 354]
    assert [peaks[1] for peaks in engine.peaks] == [666, 666, 666]
    assert [[failure.client_id for failure in record.failures] for record in found] == [[2], [], []]
    assert found[0].margins == found[2].margins == {2: pytest.approx(1000 / 666 * 1.25)}
    assert [plan.budget_bytes for plan in found[1].plans] == [1000, 532, 1000]
    assert isinstance(found[0].failures[0], OutOfMemory)


def test_who_has_too_little_for_anything_is_left_out_in_the_end_and_the_rounds_go_on() -> None:
    engine = Cohort(holds={3: 10})
    _, found = records(engine, rounds=3)
    assert [len(record.uploads) for record in found] == [2, 2, 2]
    assert [[entry.client_id for entry in record.left_out] for record in found] == [[], [], [3]]


def test_margins_are_of_the_record_so_that_a_resumed_run_plans_alike(tmp_path: Path) -> None:
    def run(path: Path, rounds: int, engine: Cohort) -> list[dict[str, object]]:
        known = (path / "manifest.json").exists()
        facts = {"seed": 0, "run_id": "r", "config": {}}
        directory = RunDirectory.open(path) if known else RunDirectory.create(path, facts)
        train(Fitting(SPEC), engine, CLIENTS, lambda _: {"loss": 0.0}, directory, num_rounds=rounds)
        return directory.lines()

    whole = run(tmp_path / "whole", 4, Cohort(holds={2: 300, 3: 500}))
    run(tmp_path / "stopped", 2, Cohort(holds={2: 300, 3: 500}))
    again = run(tmp_path / "stopped", 4, Cohort(holds={2: 300, 3: 500}))
    assert [(line["plans"], line["margins"]) for line in whole] == [(line["plans"], line["margins"]) for line in again]
    assert json.loads((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()[-1])["margins"].keys() == {
        "2",
        "3",
    }


def test_a_record_from_before_there_were_margins_reads_as_none() -> None:
    assert margins.recalled([]) == {}
    assert margins.recalled([{"round": 1}]) == {}
