"""The one exception that users are meant to read."""

from typing import Any


class WorldlineError(Exception):
    """A mistake a user can mend. The message says what was expected, what came, and the next step.

    The command line prints it as one line and exits with status 2; anything else is a bug and shows its traceback.
    """


def require_at_least(options: object, least: dict[str, int], prefix: str = "") -> None:
    """Check numbers of a configuration against the least that each may be; `prefix` leads the message.

    Raises:
        WorldlineError: one is less.
    """
    for name, limit in least.items():
        if getattr(options, name) < limit:
            raise WorldlineError(f"{prefix}{name} must be at least {limit}, got {getattr(options, name)}")


def differing(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say which options of something stored are not those asked for; nothing if all are."""
    return "; ".join(
        f"{key}={there.get(key)} there, {key}={wanted.get(key)} asked for"
        for key in sorted(wanted.keys() | there.keys())
        if there.get(key) != wanted.get(key)
    )
