"""The error tree. Every error a user can meet is one of these, and also a standard-library type.

Exit codes of the command line: 2 for `ConfigError` (nothing was started), 1 for everything else.
"""


class MatpoError(Exception):
    """Root of every error raised on purpose by this package."""

    exit_code = 1


class ConfigError(MatpoError, ValueError):
    """The recipe, an override, or a file that it names is wrong. Raised before anything starts."""

    exit_code = 2


class DataError(ConfigError):
    """A dataset file or row does not have the expected shape; names file, row and field."""


class EngineError(MatpoError, RuntimeError):
    """A rollout engine failed; the message names the engine and the deadline that applied."""


class EngineUnreachable(EngineError):
    """No connection to the engine, or it broke."""


class EngineTimeout(EngineError):
    """The engine did not answer inside the deadline named in the message."""


class EngineRejected(EngineError):
    """The engine answered with an error or with something that is not its protocol."""


class ToolError(MatpoError, RuntimeError):
    """A tool server could not be started, reached, or broke its protocol (infrastructure)."""


class CacheMissError(ToolError):
    """Offline replay, and the cache has no reply to a request; names the request and the file."""


class JudgeError(MatpoError, RuntimeError):
    """The judge gave no verdict (infrastructure); never a reward of 0."""


class JudgeRefusedError(JudgeError):
    """The judge will refuse every request: its key, its model or its address is wrong."""


class RolloutError(MatpoError, RuntimeError):
    """A whole step's rollout cannot be completed; the message counts the reasons."""


class WeightSyncError(MatpoError, RuntimeError):
    """The engines did not take the new weights, or report another version than was pushed."""


class HandoverError(MatpoError, RuntimeError):
    """Device memory that one side of a colocated run gave back is not free for the other."""


class CheckpointError(MatpoError, RuntimeError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class NonFiniteError(MatpoError, ArithmeticError):
    """A loss or gradient norm is not finite; raised before the optimizer moves."""


class DeadlineError(MatpoError, TimeoutError):
    """A wait ran past its deadline; the message names the setting that holds the deadline."""
