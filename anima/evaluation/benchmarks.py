"""--eval_benchmarks: questions scored during training, each rank its share."""

from collections.abc import Callable
from pathlib import Path

from anima import distributed
from anima.config.benchmarks import BenchmarkConfig
from anima.data.tokenizer import Tokenizer
from anima.distributed import Ranks
from anima.evaluation.mmlu import Choice, ChoiceEncoder, read_choices, spread, summarise
from anima.evaluation.scoring import Scored, score_choices
from anima.model.packed import CausalModel

MAX_PROMPT_TOKENS = 2048


class Benchmarks:
    """The files of a run, read once."""

    def __init__(
        self, config: BenchmarkConfig, ranks: Ranks, tokenizer: Tokenizer, model: CausalModel, batch_tokens: int
    ) -> None:
        """Read the files.

        Raises:
            DataError: a file that cannot be used.
        """
        self._files: dict[str, list[Choice]] = {
            Path(path).stem: spread(read_choices(path), config.eval_benchmark_questions)
            for path in config.eval_benchmarks
        }
        self._ranks, self._network, self._budget = ranks, Scored(model), batch_tokens
        self._encoder = ChoiceEncoder(tokenizer, MAX_PROMPT_TOKENS)

    def score(self, alive: Callable[[str], None]) -> dict[str, float]:
        """Accuracy and loss of each file, over all ranks; a collective.

        Args:
            alive: Told what is being done, so that nobody takes it for a hang.
        """
        found: dict[str, float] = {}
        for name, choices in self._files.items():
            mine = choices[self._ranks.rank :: self._ranks.world_size]
            scores, _ = score_choices(
                self._network,
                mine,
                self._encoder,
                batch_tokens=self._budget,
                on_batch=lambda done, name=name: alive(f"{name}, {done} questions"),  # type: ignore[misc]
            )
            shares = distributed.gather_objects(scores)
            together = [shares[index % len(shares)][index // len(shares)] for index in range(len(choices))]
            totals = summarise(choices, together)
            found |= {f"{name}/{metric}": totals[metric] for metric in ("accuracy", "accuracy_by_question", "loss")}
        return found
