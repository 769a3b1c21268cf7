"""The exceptions whose message is all a person needs: it is printed without a traceback."""


class InputError(ValueError):
    """A mistake in settings, data or files that the person running plumbline can fix.

    The message names the key or the file and row, the value seen, what is accepted and the next move.
    The command line prints it alone and exits with code 2.
    """


class TrainingFailure(RuntimeError):
    """Training that cannot go on, though settings and data are acceptable: what is known of it, and the next moves.

    The command line prints it alone and exits with code 1; any other exception is a failure with a traceback.
    """
