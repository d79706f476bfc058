"""The errors a user meets.

Every message says what happened, both numbers, why it matters, what to do, and which sample or field.
The command line prints ``str(error)`` without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations


class VlmflowError(Exception):
    """Base of every error that is meant to be read by a user."""

    exit_code = 2


class RecipeError(VlmflowError):
    """A recipe has a wrong field, type, unit or an unreachable combination."""


class StorageError(VlmflowError):
    """An object store or file system refused or failed."""

    exit_code = 3


class NotFound(StorageError):
    """The object or bucket does not exist."""


class AccessDenied(StorageError):
    """The store knows us not, or forbids the action."""


class Unreachable(StorageError):
    """No store answers at the endpoint."""


class NoSpace(StorageError):
    """The disk or quota is full; nothing was left under the final name."""


class DataError(VlmflowError):
    """A dataset, table, shard, layer or sample is not what it claims to be."""


class StepFailed(VlmflowError):
    """A step stopped because too much of its input failed."""

    exit_code = 4


class CheckpointError(VlmflowError):
    """A training checkpoint is partial, corrupt or does not fit this run."""


class ModelError(VlmflowError):
    """A model's configuration or weights do not fit what was asked of them."""


class RegistryError(VlmflowError):
    """MLflow is missing, refuses, or holds something else than expected."""

    exit_code = 5


class ServiceError(VlmflowError):
    """A server that vlmflow starts or calls does not work."""

    exit_code = 6
