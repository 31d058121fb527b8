"""What launch/evaluate.py can measure, as flags. Knows nothing of how."""

from dataclasses import dataclass
from pathlib import Path

from anima.config.checks import require
from anima.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What is measured; the fields are flags of launch/evaluate.py."""

    eval_files: tuple[str, ...] = ()
    """Held-out conversations (as --eval_files of training): loss and perplexity of the answers."""
    max_seq_length: int = 1024
    """Longest held-out sequence, tokens; longer ones are dropped and counted."""
    questions: str | None = None
    """Question file (question_id, text, category): every model's answers go into answers/NAME.jsonl."""
    num_questions: int | None = None
    """Only the first so many questions; None for all."""
    max_new_tokens: int = 512
    """Longest answer, tokens."""
    batch_size: int = 8
    """Answers, or rows of the harness, at a time."""
    mmlu_files: tuple[str, ...] = ()
    """Multiple-choice questions (subject, input, output), scored as they stand: zero-shot or few-shot."""
    mmlu_examples: str | None = None
    """File of the same layout with solved examples that are put before the questions."""
    mmlu_shots: int = 5
    """Examples of its subject before each question, with --mmlu_examples."""
    mmlu_max_tokens: int = 2048
    """Longest such prompt; a longer one loses examples, then its start, never the question."""
    mmlu_questions: int | None = None
    """Only so many questions of each file, spread evenly over it; None for all."""
    lm_eval_tasks: tuple[str, ...] = ()
    """Tasks of EleutherAI's harness, where it is installed."""
    lm_eval_include: str | None = None
    """Folder with task YAMLs of one's own."""
    lm_eval_shots: int | None = None
    """Solved examples of the harness; None for each task's own number."""
    lm_eval_limit: int | None = None
    """Only so many rows of each task; None for all."""
    micro_batch_tokens: int = 4096
    """Tokens of one pass for losses and letters."""

    def __post_init__(self) -> None:
        if not (self.eval_files or self.questions or self.mmlu_files or self.lm_eval_tasks):
            raise ConfigError(
                "nothing to measure",
                where="--eval_files, --questions, --mmlu_files or --lm_eval_tasks",
                fix="--eval_files launch/data/quickstart_sft_eval.jsonl",
            )
        for name in ("batch_size", "max_new_tokens", "mmlu_shots", "mmlu_max_tokens", "micro_batch_tokens"):
            require(getattr(self, name) >= 1, "too small", name, getattr(self, name), "1 or more")
        for name in ("num_questions", "mmlu_questions", "lm_eval_limit"):
            number = getattr(self, name)
            require(number is None or number >= 1, "nothing would be asked", name, number, "1 or more, or None")
        for name, whole in (("mmlu_examples", "mmlu_files"), ("lm_eval_include", "lm_eval_tasks")):
            given = getattr(self, name)
            require(
                given is None or bool(getattr(self, whole)),
                "there is nothing it belongs to",
                name,
                given,
                f"beside --{whole}",
            )
        names = [Path(path).stem for path in self.mmlu_files]
        require(
            len(set(names)) == len(names),
            "two files of one name, by which their results are kept",
            "mmlu_files",
            names,
            "different names",
        )
