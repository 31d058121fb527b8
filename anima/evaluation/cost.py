"""What judging will cost, as an estimate before and an account after. Knows prices a million tokens, no endpoint."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from anima.evaluation.verdicts import Call, Verdict

CHARS_PER_TOKEN = 4.0
"""Of alphabetic text, for common tokenizers."""
TOKENS_PER_WIDE_CHAR = 1.0
"""Of Chinese, Japanese and Korean text: between 0.6 and 1.4, by tokenizer."""
MESSAGE_TOKENS = 10
"""What the chat format adds to a call."""


@dataclass(frozen=True)
class Price:
    """Money per million tokens; the currency is the user's."""

    input: float = 0.0
    output: float = 0.0

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


@dataclass(frozen=True)
class Estimate:
    """Before judging. `highest_cost` is the cost if every reply is as long as it may be."""

    calls: int
    prompt_tokens: int
    highest_completion_tokens: int
    highest_cost: float

    def line(self) -> str:
        """One line for the terminal."""
        if not self.calls:
            return "nothing left to judge"
        return (
            f"{self.calls:,} calls, about {self.prompt_tokens:,} tokens in, at most "
            f"{self.highest_completion_tokens:,} out: at most {self.highest_cost:.2f}"
        )


@dataclass(frozen=True)
class Account:
    """After judging: what all stored verdicts took, as the endpoint counted."""

    verdicts: int
    unparsable: int
    prompt_tokens: int
    completion_tokens: int
    cost: float

    def line(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.verdicts:,} verdicts stored, {self.unparsable:,} unparsable (kept, never scored); "
            f"{self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out: {self.cost:.2f}"
        )


def count_tokens(text: str) -> float:
    """Tokens of a text, roughly, without any tokenizer."""
    wide = sum(1 for char in text if "\u2e80" <= char <= "\ua4cf" or "\uac00" <= char <= "\uffef")
    return wide * TOKENS_PER_WIDE_CHAR + (len(text) - wide) / CHARS_PER_TOKEN


def estimate(calls: Sequence[Call], max_tokens: int, price: Price) -> Estimate:
    """What these calls will take; a text that occurs twice is paid once."""
    different = {call.key: call for call in calls}.values()
    prompt_tokens = sum(MESSAGE_TOKENS + count_tokens(call.prompt.system + call.user) for call in different)
    completion_tokens = max_tokens * len(different)
    return Estimate(len(different), round(prompt_tokens), completion_tokens, price.of(prompt_tokens, completion_tokens))


def account(verdicts: Iterable[Verdict], price: Price) -> Account:
    """What these verdicts took."""
    stored = list(verdicts)
    prompt_tokens = sum(verdict.prompt_tokens for verdict in stored)
    completion_tokens = sum(verdict.completion_tokens for verdict in stored)
    return Account(
        len(stored),
        sum(verdict.reading.outcome is None for verdict in stored),
        prompt_tokens,
        completion_tokens,
        price.of(prompt_tokens, completion_tokens),
    )
