"""The server's side of a round with secure aggregation: four trips, and one upload that is the outcome of all.

It stands where `exchange.RoundResults` stands in other rounds: tasks go down, records and failures are kept, bytes are
counted. What comes out is not the clients' uploads but their sum: the method's ``aggregate`` sees one upload, or none
where the sum did not come about.
"""

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedpilot import base_deltas, tensors
from fedpilot.errors import SecureSumError
from fedpilot.exchange import Clock, UploadRecord, check_task, download_bytes
from fedpilot.privacy import client_dp, notes
from fedpilot.privacy.fixed_point import Sums
from fedpilot.privacy.notes import Json, Layout, Note, Stage
from fedpilot.privacy.participant import Carrier, vector_of
from fedpilot.privacy.secure_aggregation import (
    Gathered,
    Letters,
    MaskedInput,
    PublicKeys,
    SecureSum,
    Unmasking,
    UnmaskRequest,
)
from fedpilot.privacy.secure_settings import SecureAggregation
from fedpilot.types import Arrived, Failure, Plan, Task, Tensors, Upload

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Agreement:
    """What is summed in a round and what becomes of it.

    Attributes:
        settings: Of the run.
        present: Global values of every tensor that a client of the round may train.
        by_examples: Whether a client weighs by its examples.
        max_weight: Largest weight of a client.
        outcome: The sums of weighted changes -> the upload that stands for all.
    """

    settings: SecureAggregation
    present: Tensors
    by_examples: bool
    max_weight: int
    outcome: Callable[[Sums], Upload]

    @property
    def layout(self) -> Layout:
        """As clients are told."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.present.items()}
        return Layout(shapes, self.by_examples, self.max_weight)


class SecureResults(Iterator[Upload]):
    """The round's sum as one upload.

    Args:
        carrier: Carries notes and tasks.
        round: From 1.
        plans: One for each client.
        distribute: Plan -> task; called when the carrier asks for the task.
        tell: Called with each result without its tensors.
        clock: Gets the phases ``advertise``, ``share``, ``distribute``, ``clients`` and ``unmask``.
        agreement: What is summed.
    """

    def __init__(
        self,
        carrier: Carrier,
        round: int,
        plans: Sequence[Plan],
        distribute: Callable[[Plan], Task],
        tell: Callable[[UploadRecord | Failure], None],
        clock: Clock,
        agreement: Agreement,
    ) -> None:
        self.bytes_down = 0
        self.bytes_up = 0
        self.bytes_base = 0
        self.records: list[UploadRecord] = []
        self.failures: list[Failure] = []
        self.arrived: Arrived = ()  # nobody has seen an upload
        self.facts: dict[str, float] = {}
        self._carrier, self._round, self._plans = carrier, round, {plan.client_id: plan for plan in plans}
        self._distribute, self._tell, self._clock, self._agreement = distribute, tell, clock, agreement
        self._session, self._note_bytes, self._done = uuid.uuid4().hex, 0, False

    def __next__(self) -> Upload:
        if self._done:
            raise StopIteration
        self._done = True
        try:
            return self._summed()
        except SecureSumError as error:
            logger.warning("round %d came to no sum: %s", self._round, error)
            told = {record.client_id for record in self.records}
            known = told | {failure.client_id for failure in self.failures}
            self.records.clear()
            self.failures += [Failure(k, f"no sum came about: {error}") for k in self._plans if k in told]
            for client_id in self._plans.keys() - known:
                self._fail(Failure(client_id, f"no sum came about: {error}"))
            raise StopIteration from error
        finally:
            self.facts["secure_note_bytes"] = float(self._note_bytes)

    def _summed(self) -> Upload:
        with self._clock.phase("advertise"):
            roster = self._advertised()
            layout = self._agreement.layout
            agreed = self._agreement.settings.agreed(layout.shapes, len(roster), layout.max_weight)
        with self._clock.phase("share"):
            dealt = self._dealt(agreed, roster, layout)
        gathered = self._gathered(agreed, dealt)
        with self._clock.phase("unmask"):
            request = agreed.request(dealt, gathered)
            assert gathered is not None, "or the request would have been refused"
            answers = self._answers(agreed, dealt, request)
            sums = agreed.total(self._round, roster, request, gathered, answers)
        self.facts |= {"secure_step": agreed.numbers.step, "secure_clients": float(len(request.arrived))}
        return self._agreement.outcome(sums)

    # the trips

    def _advertised(self) -> dict[int, PublicKeys]:
        found = self._asked("advertise", {client_id: {} for client_id in self._plans}, required=True)
        return self._read("advertise", found, lambda note, client_id: SecureSum.usable(note.keys(client_id)))

    def _dealt(self, agreed: SecureSum, roster: Mapping[int, PublicKeys], layout: Layout) -> dict[int, Letters]:
        agreed.check_roster(roster)
        body = notes.of_roster(roster, layout)
        found = self._asked("share", dict.fromkeys(roster, body), required=True)
        dealt = self._read("share", found, lambda note, client_id: note.letters(client_id))
        for client_id, letters in list(dealt.items()):
            if letters.to.keys() != roster.keys() - {client_id} or letters.hashes.keys() != roster.keys():
                del dealt[client_id]
                self._fail(Failure(client_id, "letters must go to all others on the roster, got some to fewer or more"))
        if len(dealt) < agreed.threshold:
            raise SecureSumError(f"at least {agreed.threshold} clients must share their secrets, got {len(dealt)}")
        return dealt

    def _gathered(self, agreed: SecureSum, dealt: Mapping[int, Letters]) -> Gathered | None:
        """The sum of the masked inputs, one at a time."""

        def sent() -> Iterator[tuple[Task, str]]:
            for client_id in dealt:
                box = {sender: letters.to[client_id] for sender, letters in dealt.items() if sender != client_id}
                yield self._sent(self._plans[client_id]), self._written("mask", notes.of_box(box))

        gathered: Gathered | None = None
        awaited = set(dealt)
        results = self._carrier.masked(self._round, sent(), agreed.numbers.num_bytes)
        while True:
            with self._clock.phase("clients"):
                result = next(results, None)
            if result is None:
                break
            if result.client_id in awaited:
                awaited.discard(result.client_id)
                gathered = self._taken(agreed, gathered, result)
            del result
        for client_id in sorted(awaited):
            self._fail(Failure(client_id, "no result came back"))
        return gathered

    def _taken(self, agreed: SecureSum, gathered: Gathered | None, result: Upload | Failure) -> Gathered | None:
        if isinstance(result, Failure):
            self._fail(result)
            return gathered
        bytes_up = tensors.num_bytes(result.tensors)
        self.bytes_up += bytes_up
        try:
            if result.num_examples <= 0:
                raise SecureSumError(f"num_examples must be positive, got {result.num_examples}; drop the upload")
            gathered = agreed.gather(gathered, MaskedInput(result.client_id, vector_of(result, agreed)))
        except SecureSumError as error:
            self._fail(Failure(result.client_id, str(error)))
            return gathered
        metrics = client_dp.public(result.metrics)
        record = UploadRecord(result.client_id, result.num_examples, bytes_up, metrics)
        self.records.append(record)
        self._tell(record)
        return gathered

    def _answers(self, agreed: SecureSum, dealt: Mapping[int, Letters], request: UnmaskRequest) -> Iterable[Unmasking]:
        """Those that are as they were dealt; whoever gives none is in the sum all the same."""
        found = self._asked("unmask", dict.fromkeys(sorted(request.arrived), notes.of_request(request)))
        answers = self._read("unmask", found, lambda note, client_id: note.unmasking(client_id), lasting=False)
        good: list[Unmasking] = []
        for answer in answers.values():
            try:
                agreed.check_answer(dealt, request, answer)
                good.append(answer)
            except SecureSumError as error:
                logger.warning("round %d: %s", self._round, error)
        return good

    # notes

    def _asked(self, stage: Stage, bodies: Mapping[int, Json], *, required: bool = False) -> dict[int, str]:
        """Answers to a note for each client; who gives none has failed where one is required."""
        asked = {client_id: self._written(stage, body) for client_id, body in bodies.items()}
        found: dict[int, str] = {}
        for client_id, answer in self._carrier.ask(self._round, asked):
            if isinstance(answer, str):
                self._note_bytes += len(answer)
                found[client_id] = answer
            elif required:
                self._fail(answer)
            else:
                logger.warning("round %d: client %d did not %s: %s", self._round, client_id, stage, answer.reason)
        return found

    def _read(
        self, stage: Stage, answers: Mapping[int, str], read: Callable[[Note, int], Found], *, lasting: bool = True
    ) -> dict[int, Found]:
        """What answers hold, of clients whose answer is one."""
        found: dict[int, Found] = {}
        for client_id, text in answers.items():
            try:
                note = Note(text)
                note.expect(stage, self._session)
                found[client_id] = read(note, client_id)
            except SecureSumError as error:
                if lasting:
                    self._fail(Failure(client_id, str(error)))
                else:
                    logger.warning("round %d: client %d: %s", self._round, client_id, error)
        return found

    def _written(self, stage: Stage, body: Json) -> str:
        text = notes.written(stage, self._session, body)
        self._note_bytes += len(text)
        return text

    def _sent(self, plan: Plan) -> Task:
        with self._clock.phase("distribute"):
            task = self._distribute(plan)
            check_task(task)
        self.bytes_down += download_bytes(task)
        self.bytes_base += base_deltas.num_bytes(task.base_delta)
        return task

    def _fail(self, failure: Failure) -> None:
        logger.warning("round %d: client %d failed: %s", self._round, failure.client_id, failure.reason)
        self.failures.append(failure)
        self._tell(failure)


def outcome(present: Tensors, *, padded: bool) -> Callable[[Sums], Upload]:
    """Of a round without noise: the mean over holders, or over all with what is lacking as zeros."""

    def made(sums: Sums) -> Upload:
        return client_dp.summed(sums.moved(present, padded=padded))

    return made
