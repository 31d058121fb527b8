"""Greedy answers of a model to rendered, encoded prompts. The only user of transformers' generate."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """The model's greedy continuations of all prompts in one padded batch, without special tokens.

    Prompts are padded on the left and masked, so that each continues as it would alone.

    Args:
        model: A causal language model in a state to generate (see `model.packed.generating`).
        tokenizer: Its tokenizer.
        prompts: Rendered prompts, encoded as in training.
        max_new_tokens: Longest answer, tokens.
        stop_ids: Tokens that end an answer beside the tokenizer's end of sequence.
        streamer: Receives the tokens as they come; for a single prompt.
    """
    longest = max(len(prompt) for prompt in prompts)
    stops = sorted({int(tokenizer.eos_token_id), *stop_ids})
    filled = [[stops[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]  # PreTrainedModel does not declare it
            input_ids=torch.tensor(filled, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=stops,
            pad_token_id=stops[0],
            streamer=streamer,
        )
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    # An answer cut at max_new_tokens may end within a character of several bytes.
    return [text.rstrip("\ufffd").strip() for text in texts]
