"""What ends a command: an error that a user can mend, and a signal."""


class UserError(ValueError):
    """Bad input: the message says what is wrong and what to do. The command line prints it without a trace."""


class Terminated(KeyboardInterrupt):
    """A TERM signal, as schedulers send before they take a machine away, ended a run, with a checkpoint."""
