"""The template behind --chat_template: the model's own, or one of the plain-text ones.

`segments` and `prompt_segments` of a Template agree: a prompt is exactly the text before the answer.
"""

from anima.config.schema import ChatTemplate
from anima.data.model_template import ModelTemplate
from anima.data.records import Conversation
from anima.data.segments import Segment, Template, join
from anima.data.text_templates import TextTemplate
from anima.data.tokenizer import Tokenizer

__all__ = ["Segment", "Template", "join", "make_template", "rendered"]


def make_template(name: ChatTemplate, tokenizer: Tokenizer, *, mask_answers: bool = True) -> Template:
    """The template of that name; auto is the model's own if the tokenizer brings one, else alpaca.

    Args:
        name: A value of --chat_template.
        tokenizer: Its chat template, BOS and EOS are used.
        mask_answers: Whether answers must be told from the rest, as for --train_on assistant.

    Raises:
        DataError: The model's own template is asked for and there is none.
        ModelError: The tokenizer has no EOS token.
    """
    if name == "auto":
        name = "model" if tokenizer.chat_template else "alpaca"
    if name in ("model", "model_thinking"):
        return ModelTemplate(tokenizer, mask_answers=mask_answers, thinking=name == "model_thinking")
    return TextTemplate(name, tokenizer)


def rendered(template: Template, conversation: Conversation) -> str:
    """The whole conversation as text."""
    return join(template.segments(conversation))
