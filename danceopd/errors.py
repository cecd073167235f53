"""The error that a user can mend."""


class UserError(ValueError):
    """Bad input: the message says what is wrong and what to do. The command line prints it without a trace."""
