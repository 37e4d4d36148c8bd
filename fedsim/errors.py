"""Errors that end a run and that its user, not its author, can do something about."""


class FederationError(RuntimeError):
    """A federation that cannot go on; the message is one line. What was finished is kept."""
