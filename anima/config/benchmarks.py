"""Options of the questions that are scored during training."""

from dataclasses import dataclass

from anima.config.checks import require


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is asked at every evaluation."""

    eval_benchmarks: tuple[str, ...] = ()
    """Files of multiple-choice questions (subject, input, output, as MMLU's) scored at every evaluation."""
    eval_benchmark_questions: int | None = 200
    """Only so many questions of each, spread evenly over the file; None for all."""

    def __post_init__(self) -> None:
        number = self.eval_benchmark_questions
        require(number is None or number >= 1, "no question", "eval_benchmark_questions", number, ">= 1, or None")
