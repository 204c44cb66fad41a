"""The exceptions that end a command with a message instead of a traceback."""


class UserError(Exception):
    """A mistake of the user's: the command prints this message and ends with exit code 2, without a traceback.

    The message says what is wrong, where (file, key, value, allowed range) and what to do.
    """


class RunError(Exception):
    """A failure of the run that is not the user's: the command prints this message and ends with exit code 1."""
