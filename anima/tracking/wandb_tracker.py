"""The only user of the package wandb: one run on Weights & Biases, written by the main rank.

Online or offline is wandb's own choice (WANDB_MODE, `wandb offline`). Starting may fail and says how to go on;
after that nothing here stops a training: failures warn once. Imported only when W&B is asked for.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import wandb

from anima.config.schema import OutputConfig
from anima.errors import RunStopped, TrackingError
from anima.tracking.metrics_file import json_safe
from anima.tracking.sample import Sample
from anima.tracking.secrets import find_secret
from anima.tracking.terminal import warn
from anima.tracking.wandb_check import FIXES

STEP_METRIC = "step"

_INIT_SECONDS = 30.0
_FINISH_SECONDS = 60.0
_FINISH_SECONDS_WITH_ADAPTER = 1800.0
"""A 33B adapter of rank 64 is 2 GB: a minute is too short to upload it."""


class WandbTracker:
    """One run on W&B. W&B's own step counter is left alone: `step` is a metric and the x axis of all others.

    Args:
        output: Project, name, folder, and whether the adapter is uploaded.
        resolved_config: All options, flat; becomes the run's config.
        run_id: Run to continue (see the attribute `run_id`); None starts a new one. In a sweep W&B owns project, name
            and id, and only a trial that it hands out again is continued.
        logged_until: Steps up to this one are there already and are not sent again.

    Raises:
        TrackingError: An option holds a secret, or W&B does not start within 30 s (WANDB_INIT_TIMEOUT).
    """

    run_id: str | None

    def __init__(
        self,
        output: OutputConfig,
        *,
        resolved_config: Mapping[str, object],
        run_id: str | None = None,
        logged_until: int = -1,
    ) -> None:
        """Start the run; bounded in time."""
        _refuse_secrets(resolved_config)
        self._name = run_name(output)
        self._with_adapter = output.wandb_log_adapter
        self._num_failures = 0
        self._finished = False
        self._logged_until = logged_until
        try:
            self._run = _init(output, self._name, resolved_config, run_id)
            self._run.define_metric(STEP_METRIC, hidden=True)
            self._run.define_metric("*", step_metric=STEP_METRIC)
        except (wandb.Error, OSError, ValueError) as error:  # ValueError: a WANDB_* variable it does not understand
            wandb.teardown(1)
            raise TrackingError(
                f"W&B did not start: {error}", where="--tracker wandb", fix=f"{FIXES}; slow network: WANDB_INIT_TIMEOUT"
            ) from error
        self.run_id = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at `step`."""
        if step <= self._logged_until:
            return
        self._attempt(lambda: self._run.log({STEP_METRIC: step, **metrics}))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Log a table `samples`, one row per sample."""
        if not samples or step <= self._logged_until:
            return
        rows = [[step, sample.label, sample.prompt, sample.answer] for sample in samples]
        columns: list[str | int] = ["step", "label", "prompt", "answer"]
        self._attempt(lambda: self._run.log({STEP_METRIC: step, "samples": wandb.Table(columns=columns, data=rows)}))

    def summary(self, values: Mapping[str, object]) -> None:
        """Write the run's summary, beside the last value of every metric."""
        self._attempt(lambda: self._run.summary.update(json_safe(values)))

    def log_adapter(self, folder: Path) -> None:
        """Upload the files of `folder` as an artifact of type model, if `wandb_log_adapter` asks for it."""
        if self._with_adapter:
            self._attempt(lambda: self._upload(folder))

    def finish(self, exit_code: int = 0) -> None:
        """Upload the rest, bounded in time, and end wandb's child process; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        if exit_code == RunStopped.exit_code:
            self._attempt(self._run.mark_preempting)  # a sweep then hands the run out again
        self._attempt(lambda: self._run.finish(exit_code=exit_code))
        self._attempt(lambda: wandb.teardown(exit_code))
        if self._num_failures:
            warn(f"{self._num_failures} calls to W&B failed; metrics.jsonl holds all metrics")

    def _upload(self, folder: Path) -> None:
        artifact = wandb.Artifact(artifact_name(self._name), type="model")
        # The adapter is final and stays where it is: no second copy in the home folder, which often has a quota.
        # An absolute path, since `wandb sync` of an offline run may be called from anywhere.
        artifact.add_dir(str(folder.resolve()), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - wandb has no common base class, and a dead sink must not end a training
            self._num_failures += 1
            if self._num_failures == 1:
                warn(f"W&B: {type(error).__name__}: {error}; training goes on, metrics.jsonl holds all metrics")


def _init(output: OutputConfig, name: str, resolved_config: Mapping[str, object], run_id: str | None) -> wandb.Run:
    in_sweep = bool(os.environ.get("WANDB_SWEEP_ID"))
    goes_on = run_id is not None and (not in_sweep or run_id == os.environ.get("WANDB_RUN_ID"))
    project = os.environ.get("WANDB_PROJECT")
    if not in_sweep and project and project != output.wandb_project:
        warn(f"WANDB_PROJECT={project} is overruled by --wandb_project {output.wandb_project}")
    return wandb.init(
        project=None if in_sweep else output.wandb_project,
        name=None if in_sweep else name,
        id=None if in_sweep else run_id,
        resume="allow" if goes_on else None,  # in a sweep too: a trial that was preempted comes back under its id
        config=json_safe(resolved_config),
        dir=output.output_dir,
        settings=_settings(output),
    )


def _settings(output: OutputConfig) -> wandb.Settings:
    """Our defaults for what the user's WANDB_* variables leave open."""
    seconds = _FINISH_SECONDS_WITH_ADAPTER if output.wandb_log_adapter else _FINISH_SECONDS
    # The console stays here: it may hold what must not leave the machine, and wandb would wrap sys.stderr.
    defaults = {"init_timeout": _INIT_SECONDS, "finish_timeout": seconds, "console": "off", "quiet": True}
    settings = wandb.Settings()
    for name, value in defaults.items():
        if f"WANDB_{name.upper()}" not in os.environ:
            setattr(settings, name, value)
    return settings


def _refuse_secrets(resolved_config: Mapping[str, object]) -> None:
    if found := find_secret(resolved_config, os.environ):
        option, kind = found
        raise TrackingError(
            "a secret would be sent to W&B with the run's config",
            where=f"--{option}",
            got=f"a value with {kind} in it",
            fix="keep keys in environment variables or in files of their own, and remove it from the option",
        )


def run_name(output: OutputConfig) -> str:
    """The run's name in trackers: `run_name`, or WANDB_NAME, or the last part of `output_dir`."""
    return output.run_name or os.environ.get("WANDB_NAME") or Path(output.output_dir).resolve().name or "run"


def artifact_name(name: str) -> str:
    """`name` with what W&B does not allow in artifact names (all but letters, digits, `_-.`) as `-`, 128 at most."""
    cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"
    return f"{cleaned[:120]}-adapter"
