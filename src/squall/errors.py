"""What can go wrong, as the user sees it: one sentence with the file, row or flag, what is wrong, and what to do."""


class SquallError(Exception):
    """The job failed for a reason that the user can understand. `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(SquallError):
    """The call or the input is wrong: a file, a row, a flag."""

    exit_code = 2
