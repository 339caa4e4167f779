"""Clients of one pass: each one's local update runs until it asks for a fit, and goes on when all of them have asked.

A local update is plain code with `fit` somewhere in its middle, so each has a thread of its own. But only one thread
runs at any time, the engine's or the one that has the turn, and all work on the model is the engine's: clients still
come one after the other, in their order, and nothing hangs on timing.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fedpilot.types import Fit, FitsTogether, Fitted, Model, Penalty, StepKind, Task, Tensors


class _AbandonedError(BaseException):
    """The engine has stopped; the client's code is to end without a result."""


class Turn:
    """A local update in a thread of its own, which runs only while `advance` waits for it.

    Args:
        work: The local update; is given the turn, to `ask` with.

    Attributes:
        asked: What it waits for: a fit, or work on the model; ``None`` before its start and after its end.
        ended: Whether it is over.
        result: Of the work.
        error: What the work raised.
        seconds: That it ran, and that the engine worked for it.
        pass_size: Clients in the pass of its last fit.
    """

    def __init__(self, work: Callable[["Turn"], Any]) -> None:
        self.asked: Fit | Callable[[], object] | None = None
        self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.pass_size = 1
        self._work: Callable[[Turn], Any] | None = work
        self._answer: object = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)  # an interpreter that ends does not wait

    def advance(self, answer: object = None) -> None:
        """Gives the client what it asked for, or an error to be raised, and lets it run until it asks again or ends."""
        started = time.perf_counter()
        self._answer, self.asked = answer, None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        self.seconds += time.perf_counter() - started

    def ask(self, request: Fit | Callable[[], object]) -> Any:
        """Waits for the engine; called in the client's thread."""
        self.asked = request
        self._back.release()
        self._go.acquire()
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def abandon(self) -> None:
        """Ends the client's thread where it is."""
        if self._thread.ident is not None and not self.ended:
            self._answer = _AbandonedError()
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        assert self._work is not None, "a thread runs once"
        try:
            self.result = self._work(self)
        except BaseException as error:
            self.error = error
        self._work = self._answer = None  # they know the site and, by its model, this turn: a ring that would live on
        self.ended = True
        self._back.release()


class JoiningModel:
    """A client's model whose fits wait for those of its pass; it holds the client's tensors between two of them.

    Args:
        own: Does the work where the client is by itself, after a `load` of its own each time.
        turn: Of the client.
    """

    def __init__(self, own: Model, turn: Turn) -> None:
        self._own, self._turn = own, turn
        self._task: Task | None = None
        self._by_itself = False

    def load(self, task: Task) -> None:
        """As `types.Model.load`."""
        self._task, self._by_itself = task, False

    def fit(
        self,
        trainable: frozenset[str],
        *,
        penalty: Penalty | None = None,
        max_steps: int | None = None,
        kind: StepKind | None = None,
    ) -> Mapping[str, float]:
        """As `types.Model.fit`."""
        if self._by_itself or self._task is None:
            return self._own.fit(trainable, penalty=penalty, max_steps=max_steps, kind=kind)
        fitted: Fitted = self._turn.ask(Fit(self._own, self._task, trainable, penalty, max_steps, kind))
        self._task = replace(self._task, tensors=fitted.tensors)
        return fitted.metrics

    def gradients(self, names: frozenset[str], *, num_examples: int, squared: bool = False) -> Tensors:
        """As `types.Model.gradients`."""
        ask = partial(self._gradients, names, num_examples, squared)
        found: Tensors = self._turn.ask(ask)
        return found

    def _gradients(self, names: frozenset[str], num_examples: int, squared: bool) -> Tensors:
        return self._loaded().gradients(names, num_examples=num_examples, squared=squared)

    def read(self) -> Tensors:
        """As `types.Model.read`."""
        if self._by_itself or self._task is None:
            return self._own.read()
        return {name: tensor.clone() for name, tensor in self._task.tensors.items()}

    def __getattr__(self, name: str) -> Any:
        """Anything else a model can do: from there to the next `load` the client is by itself."""
        found = getattr(self._own, name)
        self._loaded()
        self._by_itself = True
        return found

    def _loaded(self) -> Model:
        if not self._by_itself and self._task is not None:
            self._own.load(self._task)
        return self._own


def run(works: Sequence[Callable[[Turn], Any]], together: FitsTogether) -> list[Turn]:
    """Local updates of clients that are alike, from start to end; their turns, with the results.

    Raises:
        Exception: Whatever one of them raises; the others are ended.
    """
    turns = [Turn(work) for work in works]
    try:
        for turn in turns:
            _forward(turn)
        while waiting := [(turn, turn.asked) for turn in turns if isinstance(turn.asked, Fit)]:
            _fit(waiting, together)
    finally:
        for turn in turns:
            turn.abandon()
    return turns


def _fit(waiting: Sequence[tuple[Turn, Fit]], together: FitsTogether) -> None:
    """One fit of each, in one pass or, where that cannot be, one after the other; then all go on."""
    fits = [fit for _, fit in waiting]
    try:
        answers = together.fit(fits) if len(fits) > 1 else None
    except Exception as error:
        error.add_note(f"raised in one pass of clients {', '.join(str(fit.task.plan.client_id) for fit in fits)}")
        raise
    for index, (turn, fit) in enumerate(waiting):
        answer = _done(turn, partial(_by_itself, fit)) if answers is None else answers[index]
        turn.pass_size = 1 if answers is None else len(waiting)
        if answers is not None and isinstance(answer, Fitted):
            turn.seconds += answer.metrics["seconds"]
        _forward(turn, answer)


def _by_itself(fit: Fit) -> Fitted:
    fit.model.load(fit.task)
    metrics = fit.model.fit(fit.trainable, penalty=fit.penalty, max_steps=fit.max_steps, kind=fit.kind)
    return Fitted(metrics, fit.model.read())


def _forward(turn: Turn, answer: object = None) -> None:
    """Lets a client run until it fits or ends, and does all else that it asks for.

    Raises:
        BaseException: What the client raised.
    """
    turn.advance(answer)
    while turn.asked is not None and not isinstance(turn.asked, Fit):
        turn.advance(_done(turn, turn.asked))
    if turn.error is not None:
        raise turn.error


def _done(turn: Turn, work: Callable[[], object]) -> object:
    """What the work returns or raises; its time is the client's."""
    started = time.perf_counter()
    try:
        return work()
    except Exception as error:
        return error
    finally:
        turn.seconds += time.perf_counter() - started
