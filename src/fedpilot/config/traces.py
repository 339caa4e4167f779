"""Memory profiles of one model, one for each kind of optimiser step: traced when a method first asks."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from fedpilot import checkpoint
from fedpilot.memory import MemoryProfile
from fedpilot.types import StepKind


class Traces:
    """Profiles by kind of step; remembered, and kept in a folder where one is given.

    Args:
        trace: Kind, or ``None`` for plain LoRA's, and whether blocks may be recomputed -> profile.
        facts: What the profiles depend on besides, for the names of the files.
        folder: Where profiles outlast the process; ``None`` for nowhere.
    """

    def __init__(
        self,
        trace: Callable[[StepKind | None, bool], MemoryProfile],
        facts: Mapping[str, object],
        folder: Path | None = None,
    ) -> None:
        self._trace, self._facts, self._folder = trace, facts, folder
        self._known: dict[tuple[StepKind | None, bool], MemoryProfile] = {}

    def of(self, kind: StepKind | None, *, checkpointing: bool) -> MemoryProfile:
        """The profile of a kind; one with recomputed blocks serves those that recompute none, too.

        Raises:
            ModelError: The model cannot be traced.
        """
        for known in ((kind, True), (kind, checkpointing)):
            if known in self._known:
                return self._known[known]
        self._known[kind, checkpointing] = found = self._read_or_trace(kind, checkpointing)
        return found

    def _read_or_trace(self, kind: StepKind | None, checkpointing: bool) -> MemoryProfile:
        if self._folder is None:
            return self._trace(kind, checkpointing)
        key = json.dumps([self._facts, repr(kind), checkpointing], sort_keys=True, default=repr)
        file = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if file.exists():
            return MemoryProfile.from_json(file.read_text())
        found = self._trace(kind, checkpointing)
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_file(file, found.to_json().encode())
        return found
