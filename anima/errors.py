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
    on_every_rank = True
    """Every rank meets it, so one of them need speak. False: it is this rank's alone."""

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


class OutOfMemory(TrainingError):
    """The accelerator of one rank is too small for what was asked."""

    exit_code = 7
    on_every_rank = False


class RunStopped(AnimaError):
    """The run was asked to stop and has saved its state: no mistake, and not finished either.

    Not zero, because W&B sweeps and Slurm take zero for finished; 75 is sysexits' EX_TEMPFAIL, "try again".
    """

    exit_code = 75
