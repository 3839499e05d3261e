"""The one error that a user can cause."""


class InputError(ValueError):
    """What the user gave cannot be used: data, a checkpoint, a setting.

    The message says what was expected, what was found and what to do. Programs print it without a traceback.
    """
