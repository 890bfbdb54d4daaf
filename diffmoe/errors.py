"""The one class of errors that a user can cause and fix."""


class UserError(ValueError):
    """Bad input, or a run that cannot go on: one line on stderr and exit code 2, "do not try again"
    to a job script.

    Every other exception, a plain ``ValueError`` too, is a fault of this program or of the machine:
    it keeps its traceback and exits with 1, after which a job script tries again.
    """
