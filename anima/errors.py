"""The errors a user can mend: what is wrong, where, what was given, what is allowed, what to type next.

Everything else that goes wrong is a bug or a fault of the machine and keeps its traceback.
`launch/` prints an AnimaError as a few lines and exits with its `exit_code`.
"""


class AnimaError(Exception):
    """A mistake in the input, found before heavy work wherever that is possible.

    Args:
        what: One sentence: what is wrong.
        where: File, `file:line`, flag or key.
        got: The offending value.
        allowed: What would have been accepted.
        fix: What to type or change next.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        allowed: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.got = got
        self.allowed = allowed
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        for label in ("where", "got", "allowed", "fix"):
            value = getattr(self, label)
            if value is not None:
                lines.append(f"  {label + ':':<9}{value}")
        return "\n".join(lines)


class ConfigError(AnimaError):
    """A flag, a YAML key or a DeepSpeed JSON entry cannot be used."""


class DataError(AnimaError):
    """A data file or a row cannot be used."""


class ModelError(AnimaError):
    """A model folder, tokenizer or adapter cannot be used."""


class TrackingError(AnimaError):
    """The experiment tracker that was asked for cannot start."""


class CheckpointError(AnimaError):
    """A checkpoint or an output folder cannot be used."""


class TrainingError(AnimaError):
    """Training had to stop: its numbers show that going on would be waste."""

    exit_code = 3
