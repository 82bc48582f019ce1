"""Errors that cross layers. Each is one line for the person who reads it at night: what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class NotifyServerError(Exception):
    """The base of the package's own errors."""


class ConfigError(NotifyServerError):
    """The configuration is wrong. `problems` has one line for each wrong key."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class ContractError(NotifyServerError):
    """A body violates the platform's document. `field` is the path, e.g. `file_list[3].target_url`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class SignatureError(NotifyServerError):
    """The signed envelope does not prove its sender. `code` is the platform's (401001, 403001); the text is for the
    log only.
    """

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(problem)
        self.code = code


class StoreRefusedError(NotifyServerError):
    """The store cannot be opened safely (in use, corrupt, newer): the text says what to do. Fatal at start."""


class StoreNotReachedError(StoreRefusedError):
    """The database does not accept connections now. A starting daemon waits for it; a command ends."""


class StoreUnavailableError(NotifyServerError):
    """The store cannot commit now (full, locked, I/O error, gone). Nothing was written; the same call may succeed
    later.
    """


class NonceReusedError(NotifyServerError):
    """The nonce of a signed request has been consumed before; nothing was written."""


class RejectionGoneError(NotifyServerError):
    """The rejection to be replayed does not exist (any more); nothing was written."""


class ListenError(NotifyServerError):
    """The server cannot listen on the address. Fatal at start."""
