"""The one error type for bad input, and imports that need an optional extra."""


class UserError(Exception):
    """Bad input. Its text is one sentence for the person who gave it."""
