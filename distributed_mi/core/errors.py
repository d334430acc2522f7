"""The exceptions of the project. Each carries one message that names the thing, the value and the next step.

Every class survives pickling (Ray ships exceptions between processes), because the message is the only argument.
"""


class DistributedMIError(Exception):
    """Base of all errors that a user can act on. The command line prints the message without a traceback."""

    exit_code = 1


class ConfigError(DistributedMIError):
    """A configuration file, an override or a name in it is wrong."""

    exit_code = 2


class UnknownNameError(ConfigError):
    """A registry name that has no file behind it."""


class InputError(DistributedMIError):
    """A file, a column or a value of the user's data cannot be used."""


class RejectedRowsError(InputError):
    """More rows were set aside than `max_rejected_fraction` allows."""


class LeakageError(InputError):
    """Evaluation labels were found in the training sequences."""


class WorkspaceError(DistributedMIError):
    """A workspace is missing a stage, is locked, or cannot be read."""


class WorkspaceLockedError(WorkspaceError):
    """Another run holds the workspace."""


class SchemaMismatchError(WorkspaceError):
    """A table or manifest was written by another schema version or has other columns."""


class CheckpointError(DistributedMIError):
    """A checkpoint is incomplete, corrupt, or belongs to another model."""


class StageError(DistributedMIError):
    """A stage stopped for a reason the user should see (failed answers over the limit, no users left, ...)."""


class UnknownUserError(DistributedMIError):
    """A user or item id that the workspace does not hold."""


class MissingDependencyError(DistributedMIError):
    """An optional library is needed; the message names the extra that brings it."""


def own_error(error: BaseException) -> BaseException:
    """The project's error behind one that Ray wrapped, or the error itself.

    Ray hands over a class made on the spot that is both its own and the project's; what comes back here is of the
    project's class alone.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DistributedMIError):
            own = next(c for c in type(seen).__mro__ if c.__module__ == DistributedMIError.__module__)
            return own(*seen.args)
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
