"""The options of what a run writes, how often it looks at itself, and who is told."""

from dataclasses import dataclass
from typing import Literal

from anima.config.checks import require as _require


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written, how often, and who is told."""

    output_dir: str
    """Folder of this run; it must not hold another one, unless --resume goes on with that."""
    logging_steps: int = 1
    """Optimizer steps between two lines of metrics."""
    eval_steps: int = 0
    """Optimizer steps between two evaluations; 0: before the first and after the last step only."""
    save_steps: int = 0
    """Optimizer steps between two checkpoints; 0: none before the end."""
    save_total_limit: int = 3
    """Checkpoints kept: the newest ones, and beside them the one with the lowest held-out loss."""
    sample_prompts: tuple[str, ...] = ()
    """Questions that the model answers at every evaluation."""
    sample_max_new_tokens: int = 64
    """Longest such answer, tokens."""
    eval_benchmarks: tuple[str, ...] = ()
    """Files of multiple-choice questions (subject, input, output, as MMLU's) scored at every evaluation."""
    eval_benchmark_questions: int | None = 200
    """Only so many questions of each, spread evenly over the file; None for all."""
    tracker: Literal["wandb", "jsonl", "none"] = "jsonl"
    """Weights & Biases beside the local metrics.jsonl; only the latter; or neither."""
    wandb_project: str = "anima"
    """Project of the run on Weights & Biases."""
    wandb_log_adapter: bool = False
    """Upload the final adapter as an artifact."""
    run_name: str | None = None
    """Name of the run in trackers; None: the last part of output_dir."""

    def __post_init__(self) -> None:
        _require(self.logging_steps >= 1, "nothing would be logged", "logging_steps", self.logging_steps, ">= 1")
        for name in ("eval_steps", "save_steps"):
            _require(getattr(self, name) >= 0, "an interval cannot be negative", name, getattr(self, name), ">= 0")
        _require(self.save_total_limit >= 1, "keep at least one", "save_total_limit", self.save_total_limit, ">= 1")
        number = self.eval_benchmark_questions
        _require(number is None or number >= 1, "no question", "eval_benchmark_questions", number, ">= 1, or None")
        _require(self.output_dir != "", "no output folder", "output_dir", self.output_dir, "a folder")
