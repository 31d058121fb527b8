"""Which tokens end an answer in a template."""

from anima.data.encode import Encoder
from anima.data.records import Conversation, Message
from anima.data.segments import Template

_EXAMPLE = Conversation((Message("user", "Q"), Message("assistant", "A")), source="stop probe")


def stop_ids(template: Template, encoder: Encoder) -> tuple[int, ...]:
    """The control token that training put behind every answer; beside it the tokenizer's EOS always ends one.

    A model's template may end a turn in another token than EOS (`<|im_end|>`, `<|eot_id|>`).
    """
    learned = [run for run in encoder.encode([template.segments(_EXAMPLE)])[0] if run.trainable]
    return tuple(token for token in learned[-1].ids[-2:] if encoder.is_stop(token)) if learned else ()
