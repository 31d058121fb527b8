"""Templates that are plain text: alpaca, vicuna, guanaco, plain. Each answer ends in the tokenizer's EOS.

BOS opens the text when the tokenizer has one and adds it by default (Llama does, Qwen and SmolLM do not).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anima.data.records import Conversation, Message
from anima.data.segments import Segment, join, user_segments
from anima.data.tokenizer import Tokenizer, adds_bos, tokenize
from anima.errors import DataError, ModelError

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Opening = Callable[[int, str | None, Message], list[Segment]]
"""(number of the exchange from 0, system text, user's message) -> all that stands between two answers."""


def _scaffold(text: str) -> Segment:
    return Segment(text, trainable=False)


def _system(text: str) -> Segment:
    return Segment(text, trainable=False, literal=True)


def _alpaca(number: int, system: str | None, user: Message) -> list[Segment]:
    """Stanford Alpaca's text. A system text takes the place of its first sentences; later turns repeat the blocks."""
    if number:
        start = [_scaffold("\n\n")]
    else:
        preamble = _scaffold(ALPACA_WITH_INPUT if user.context else ALPACA_WITHOUT_INPUT)
        start = [_system(system) if system is not None else preamble, _scaffold("\n\n")]
    asked = user_segments(user, separator="\n\n### Input:\n")
    return [*start, _scaffold("### Instruction:\n"), *asked, _scaffold("\n\n### Response: ")]


def _vicuna(number: int, system: str | None, user: Message) -> list[Segment]:
    """Vicuna 1.1's text; a system text takes the place of its own."""
    start = [] if number else [_system(VICUNA_SYSTEM if system is None else system), _scaffold(" ")]
    return [*start, _scaffold("USER: "), *user_segments(user), _scaffold(" ASSISTANT:")]


def _guanaco(number: int, system: str | None, user: Message) -> list[Segment]:
    """Guanaco's text; it has no sentence in front unless the conversation brings a system text."""
    first = [] if system is None else [_system(system), _scaffold("\n")]
    start = [_scaffold("\n")] if number else first
    return [*start, _scaffold("### Human: "), *user_segments(user), _scaffold("\n### Assistant:")]


def _plain(number: int, system: str | None, user: Message) -> list[Segment]:
    """The prompt and nothing else."""
    return user_segments(user)


@dataclass(frozen=True, slots=True)
class _Style:
    opening: Opening
    before_answer: str
    """Said by the model before its answer: a space that would otherwise dangle at the end of the prompt."""
    one_exchange: bool = False


_STYLES = {
    "alpaca": _Style(_alpaca, ""),
    "vicuna": _Style(_vicuna, " "),
    "guanaco": _Style(_guanaco, " "),
    "plain": _Style(_plain, "", one_exchange=True),
}


class TextTemplate:
    """One of the plain-text templates, bound to the tokenizer's BOS and EOS.

    Raises:
        ModelError: The tokenizer has no EOS token that could end an answer.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._style = _STYLES[name]
        self._bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
        self._eos = eos_token(tokenizer)

    @property
    def fingerprint(self) -> str:
        """All text that the template itself brings, by way of an example of each case."""
        asked = [Message("user", "Q"), Message("assistant", "A"), Message("user", "Q", "C")]
        if self._style.one_exchange:
            return f"{self.name} {join(self.prompt_segments(asked[-1:]))!r} {self._answer('A')!r}"
        cases = (asked, [Message("system", "S"), *asked], asked[-1:])
        return f"{self.name} {[join(self.prompt_segments(case)) for case in cases]!r}"

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The whole conversation.

        Raises:
            DataError: The template holds one exchange only and the conversation has more.
        """
        if conversation.tools:
            raise DataError(
                f"the {self.name} template knows no tools",
                where=conversation.source,
                got=conversation.tools[:60],
                fix="use --chat_template model with a model whose template writes tools, or take `tools` out",
            )
        return self._render(conversation.messages, conversation.source)

    def prompt_segments(self, messages: Sequence[Message]) -> list[Segment]:
        """What stands before the answer to `messages`, which end in a user turn."""
        return self._render(messages, "prompt")

    def prompt(self, messages: Sequence[Message]) -> str:
        """`prompt_segments` as text."""
        return join(self.prompt_segments(messages))

    def _answer(self, content: str) -> list[Segment]:
        space = [Segment(self._style.before_answer, trainable=True)] if self._style.before_answer else []
        return [*space, Segment(content, trainable=True, literal=True), Segment(self._eos, trainable=True)]

    def _render(self, messages: Sequence[Message], source: str) -> list[Segment]:
        if any(message.role == "tool" or message.tool_calls for message in messages):
            raise DataError(
                f"the {self.name} template knows no tools",
                where=source,
                got=", ".join(m.role for m in messages),
                fix="use --chat_template model with a model whose template writes tools, or leave these rows out",
            )
        system = messages[0].content if messages[0].role == "system" else None
        turns = messages if system is None else messages[1:]
        if self._style.one_exchange and (system is not None or len(turns) > 2):
            raise DataError(
                f"the {self.name} template holds one prompt and one answer",
                where=source,
                got=", ".join(m.role for m in messages),
                allowed="user, assistant",
                fix="use another --chat_template",
            )
        segments = [_scaffold(self._bos)] if self._bos else []
        for i, message in enumerate(turns):
            if message.role == "user":
                segments += self._style.opening(i // 2, system, message)
            else:
                segments += self._answer(message.content)
        return segments


def eos_token(tokenizer: Tokenizer) -> str:
    """The tokenizer's EOS, made sure to be one token when it is read as text.

    Raises:
        ModelError: There is none, or its spelling is read as something else.
    """
    fix = "set eos_token in tokenizer_config.json to the token that ends an answer"
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has no EOS token: answers could not end", where="tokenizer", fix=fix)
    eos = str(tokenizer.eos_token)
    if tokenize(tokenizer, [eos])[0] != [tokenizer.convert_tokens_to_ids(eos)]:
        got = f"{eos!r} is read as the ids {tokenize(tokenizer, [eos])[0]}"
        raise ModelError("the tokenizer's EOS is no single token", where="tokenizer", got=got, fix=fix)
    return eos
