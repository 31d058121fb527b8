"""What the data stage asks of a tokenizer: the protocol, its special tokens, its identity.

The tokenizer arrives as an object (a Hugging Face one in practice); nothing here imports transformers.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def chat_template(self) -> object: ...

    @property
    def bos_token(self) -> object: ...

    @property
    def eos_token(self) -> object: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool,
        split_special_tokens: bool = False,
        return_offsets_mapping: bool = False,
        return_attention_mask: bool = False,
        return_token_type_ids: bool = False,
        verbose: bool = False,
    ) -> Mapping[str, Any]: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: list[Any] | None,
        tokenize: bool,
        add_generation_prompt: bool,
        enable_thinking: bool,
    ) -> object: ...

    def convert_tokens_to_ids(self, tokens: str) -> object: ...

    def decode(self, token_ids: list[int]) -> object: ...

    def get_vocab(self) -> Mapping[str, int]: ...


def tokenize(tokenizer: Tokenizer, texts: list[str], *, split_special: bool = False) -> list[list[int]]:
    """Token ids of each text, nothing added at either end.

    Args:
        tokenizer: The tokenizer.
        texts: What to tokenise; an empty text gives no ids.
        split_special: Read spelled-out special tokens as plain characters, as is right for text of the data.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=split_special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Spelling and id of every control token, such as <|im_end|>; words of the model such as <think> are not."""
    return {token.content: int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether plain text gets the tokenizer's BOS in front of it by default, as Llama's does."""
    if tokenizer.bos_token is None:
        return False
    ids = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0]
    return len(ids) > 0 and ids[0] == tokenizer.convert_tokens_to_ids(str(tokenizer.bos_token))


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 over everything that decides ids: vocabulary, merges, normaliser, special tokens, chat template."""
    tokenize(tokenizer, ["a"])  # switches off a truncation or padding stored with the tokenizer, which we never use
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    identity = [
        type(tokenizer).__name__,
        core,
        json.dumps(tokenizer.chat_template, sort_keys=True),
        str(tokenizer.bos_token),
        str(tokenizer.eos_token),
        str(adds_bos(tokenizer)),
        json.dumps(sorted(special_tokens(tokenizer).items())),
    ]
    return hashlib.sha256("\0".join(identity).encode("utf-8", "surrogatepass")).hexdigest()
