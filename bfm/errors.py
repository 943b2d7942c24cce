"""What can go wrong, by whose doing: the user (exit 2), a damaged artefact (exit 1), a run that diverged."""

from __future__ import annotations


class UserError(ValueError):
    """The user's input is wrong: one line with file, key, what is wrong, what to do. The CLI prints it and exits 2."""

    def __init__(self, what: str, *, file: str | None = None, key: str | None = None, fix: str | None = None) -> None:
        self.what, self.file, self.key, self.fix = what, file, key, fix
        super().__init__(": ".join(part for part in (file, key, self.reason) if part))

    @property
    def reason(self) -> str:
        """What is wrong and what to do, wherever that is."""
        return f"{self.what}; {self.fix}" if self.fix else self.what

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling (Ray carries them between processes).
        return _rebuild_user_error, (type(self), self.what, self.file, self.key, self.fix)


class InfeasibleError(UserError):
    """No model, step count or batch satisfies the request; the message names the bound that binds."""


class CorruptError(RuntimeError):
    """An artefact (shard, checkpoint, ledger segment) is truncated, altered or not what it says it is. Exit 1."""


class DivergedError(ArithmeticError):
    """Training produced a non-finite loss or gradient: a result of the configuration, never retried."""


class PausedError(RuntimeError):
    """Work stopped by itself over something that is nobody's configuration; later the same command goes on. Exit 1."""


def _rebuild_user_error(
    kind: type[UserError], what: str, file: str | None, key: str | None, fix: str | None
) -> UserError:
    return kind(what, file=file, key=key, fix=fix)
