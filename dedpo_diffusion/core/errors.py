"""What goes wrong by no fault of the program, said in words for the person who can mend it."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend; its text names the file, the row where there is one, and the remedy."""


UNREACHED = {
    *("ConnectError", "ConnectTimeout", "ConnectionError", "gaierror", "MaxRetryError", "NewConnectionError"),
    *("OfflineModeIsEnabled", "LocalEntryNotFoundError"),
}  # types that libraries of the hub raise where there is no network; they stand somewhere in the chain of causes


def unreachable(error: BaseException | None) -> bool:
    """Whether something went wrong because the hub could not be reached."""
    while error is not None:
        if UNREACHED & {kind.__name__ for kind in type(error).__mro__} and not isinstance(error, BrokenPipeError):
            return True
        error = error.__cause__ or error.__context__
    return False


class NoSpace(UserError):
    """The disk, or the user's share of it, is full; its text names the file that was being written."""

    def __init__(self, what: object) -> None:
        super().__init__(f"{what}: no space left on its disk; make some room there, then give the same command again")
