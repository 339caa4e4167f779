"""Every exception that fedpilot raises on purpose.

    FedpilotError
    ├── ConfigError        a recipe or an option is wrong: all its problems at once      (exit code 2)
    ├── AssetError         a packaged model or data set cannot be had or is not the pinned one
    ├── DataError          a data set cannot be read, split or used as asked
    ├── ModelError         a model cannot be loaded or adapted as asked
    ├── PlanError          a plan contradicts the model or an algorithm's own rules
    ├── RecordError        a run directory or a checkpoint is missing, corrupt or of another run
    ├── SecureSumError     a secure sum cannot be had, or what was asked would give a client away
    └── ClientError        one client failed; the round goes on without it
        ├── TrainingError  its loss or its tensors are not finite
        └── UploadError    what it sent is not what it was asked for

Messages read ``<what> must <rule>, got <value>; <what to do>``.
"""

from collections.abc import Sequence


class FedpilotError(Exception):
    """Root of fedpilot's own exceptions; the command line prints it without a traceback."""


class ConfigError(FedpilotError):
    """A recipe or an option is wrong.

    Args:
        problems: One sentence each; all that were found, not only the first.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class AssetError(FedpilotError):
    """A packaged asset is unknown, unreachable or not the pinned file."""


class DataError(FedpilotError):
    """A data set cannot be read, split or used as asked."""


class ModelError(FedpilotError):
    """A model cannot be loaded or adapted as asked."""


class PlanError(FedpilotError):
    """A plan contradicts the model or an algorithm's rules."""


class RecordError(FedpilotError):
    """A run directory or a checkpoint is missing, corrupt or belongs to another run."""


class SecureSumError(FedpilotError):
    """A secure sum cannot be had, or what was asked of a client would give one away."""


class ClientError(FedpilotError):
    """One client failed; engines turn it into a recorded failure and go on."""


class TrainingError(ClientError):
    """Local training produced a loss or tensors that are not finite."""


class UploadError(ClientError):
    """An upload does not hold what its plan asked for."""
