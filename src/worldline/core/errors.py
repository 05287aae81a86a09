"""The one exception that users are meant to read."""


class WorldlineError(Exception):
    """A mistake a user can mend. The message says what was expected, what came, and the next step.

    The command line prints it as one line and exits with status 2; anything else is a bug and shows its traceback.
    """
