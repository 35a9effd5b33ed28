"""Errors that a user can act on.

A mistake in the input is a ValueError (exit code 2); a run that cannot go on is a RunError (exit code 1). Programs print
their message as one line. Anything else is a bug and keeps its traceback.
"""


class RunError(RuntimeError):
    """A run that cannot go on; the message tells its user why and what to do."""
