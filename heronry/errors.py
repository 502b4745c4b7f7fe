"""The one error a user can cause."""


class InputError(ValueError):
    """What came from outside is wrong: a file, a prompt, a state, an option.

    The message is one line that says what is wrong and, where it helps, what to do.
    The command line prints it and exits with code 2.
    """
