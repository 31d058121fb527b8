"""A contestant as something that answers prompts: a model that is loaded when it is called for, or a file.

Knows how to load, not what is asked.
"""

from collections.abc import Sequence
from typing import Literal

from anima.config.paths import expanded
from anima.data.records import Message
from anima.evaluation.answers import Answer, answers_of_file
from anima.evaluation.contestants import Contestant
from anima.evaluation.questions import Question, QuestionField
from anima.inference.adapter_folder import read_adapter_record
from anima.model.tokenizer import check_model_source


def check_contestant(contestant: Contestant, questions: Sequence[Question], field: QuestionField) -> None:
    """Find what is wrong with a contestant without loading its model.

    Raises:
        ModelError: the folder is no adapter of ours or is damaged, or there is no such model or base.
        DataError: the file of answers cannot be used.
    """
    if contestant.kind == "adapter":
        check_model_source(read_adapter_record(expanded(contestant.path)).model_name_or_path)
    elif contestant.kind == "base":
        check_model_source(contestant.path)
    else:
        answers_of_file(contestant.path, questions, field)


def load_contestant(
    contestant: Contestant,
    questions: Sequence[Question],
    field: QuestionField,
    *,
    device: Literal["auto", "cuda", "cpu"],
    max_new_tokens: int,
) -> Answer:
    """Load what answers for this contestant; greedy, in the template it was trained with.

    Raises:
        ModelError: the model cannot be loaded.
        DataError: the file of answers cannot be used.
    """
    if contestant.kind == "file":
        return answers_of_file(contestant.path, questions, field)
    from anima.inference.chat import load_answerer, load_base_answerer
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)
    if contestant.kind == "adapter":
        answerer = load_answerer(contestant.path, device=device)
    else:
        answerer = load_base_answerer(contestant.path, device=device, quantization=contestant.quantization)

    def answer(prompts: Sequence[str]) -> list[str]:
        asked = [[Message("user", prompt)] for prompt in prompts]
        return answerer.answer(asked, max_new_tokens=max_new_tokens)

    return answer
