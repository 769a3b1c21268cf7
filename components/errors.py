"""The one exception for what a person can fix."""


class InputError(ValueError):
    """A mistake in settings, data or files that the person running plumbline can fix.

    The message names the key or the file and row, the value seen, what is accepted and the next move.
    The command line prints it alone and exits with code 2; any other exception is a failure of the step.
    """
