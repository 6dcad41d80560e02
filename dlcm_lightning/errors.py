"""What a user can mend, and the exit codes of the command; standard library only.

Each message names the thing, what was found and the remedy. Whoever catches a `UserError` shows its message and no
traceback; every other exception is a fault of this package.
"""

from __future__ import annotations

DONE, FAILED, USER_ERROR, NO_PROGRESS, STOPPED, INTERRUPTED = 0, 1, 2, 3, 75, 130
"""Exit codes. FAILED: a proof or a check that did not hold, or a fault. USER_ERROR: something that the user can mend.
NO_PROGRESS: a job that gave up after several attempts. STOPPED: a run that was asked to stop and has saved itself, the
system's word for "try again later". INTERRUPTED: by Ctrl-C, nothing saved."""


class UserError(Exception):
    """An error whose message is written for the user."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run."""


class DataError(UserError, ValueError):
    """Data that cannot be used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, or none that can be read."""


class DamagedCheckpoint(CheckpointError):
    """One that was read, and is not as it was written. One that cannot be read may be whole."""


class RunError(UserError, RuntimeError):
    """A run's directory, or its processes, that cannot be used."""


class Stopped(UserError):
    """A run that was asked to stop and has saved itself. Names the signal, or the file."""
