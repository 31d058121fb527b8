"""EleutherAI's lm-eval harness on a loaded model, through its own API. The only user of lm_eval, which is optional."""

from collections.abc import Sequence
from importlib.util import find_spec

from anima.data.tokenizer import Tokenizer
from anima.errors import ConfigError
from anima.model.packed import CausalModel, generating


def check_harness(tasks: Sequence[str], include_path: str | None) -> None:
    """Find out before a model is loaded whether the harness is there and knows the tasks.

    Raises:
        ConfigError: it is not installed, or does not know one.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-eval is not installed",
            where="--lm_eval_tasks",
            fix='pip install -c constraints.txt "lm-eval>=0.4.13"',
        )
    from lm_eval.tasks import TaskManager

    unknown = sorted(set(tasks) - set(TaskManager(include_path=include_path).match_tasks(list(tasks))))
    if unknown:
        raise ConfigError(
            "the harness knows no such task",
            where="--lm_eval_tasks",
            got=", ".join(unknown),
            fix="lm-eval ls tasks lists them; --lm_eval_include FOLDER adds one's own",
        )


def run_harness(
    model: CausalModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Metrics by task; `check_harness` has said that all tasks are known.

    Args:
        model: As `load_base` leaves it, with or without an adapter in force.
        tokenizer: Its tokenizer.
        tasks: Names the harness knows, or of tasks in `include_path`.
        include_path: Folder with task YAMLs of one's own, whose data may be local files.
        num_fewshot: Solved examples before each question; None for the task's own number.
        limit: Only so many rows of each task; None for all.
        batch_size: Rows at a time.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with generating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=TaskManager(include_path=include_path),
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    return {
        task: {key.removesuffix(",none"): float(value) for key, value in metrics.items() if _is_number(value)}
        for task, metrics in found["results"].items()
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
