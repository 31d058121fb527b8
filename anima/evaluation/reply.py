"""What a model behind an endpoint sends back; apart from judge.py so that rating needs no client."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply. Token counts are the endpoint's, 0 where it does not say."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
