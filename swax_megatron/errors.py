"""Errors that a user can act on, and the exit codes by which whoever started a run decides what to do next.

A mistake in the input is a ValueError; a run that cannot go on is a RunError. Programs print their message as one line.
Anything else is a crash and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum


class RunError(RuntimeError):
    """A run that cannot go on; the message tells its user why and what to do."""


class ExitCode(IntEnum):
    """Of every process of a run and of its launchers. Any other code is a crash (128 + n: by signal n) and may be started again."""

    FINISHED = 0
    RUN_ERROR = 1  # the run cannot go on by itself: starting it again as it is would end the same way
    USER_ERROR = 2  # a mistake in the input; nothing was started
    CRASHED = 70  # an exception that nobody expected, a lost peer among them: start it again
    PREEMPTED = 75  # told to stop, saved, stopped: start it again
    HUNG = 76  # the watchdog ended a step or a collective that did not come back: start it again
    UNHEALTHY_NODE = 77  # a node failed the checks before training: start again without it
