"""Answers of a model to rendered, encoded prompts: greedy or drawn. The only user of transformers' generate.

On a GPU its loop is ours, over steps that are recorded once and replayed (`model.replay`); on a CPU it is its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from anima.inference.fixed_loop import FixedLoop
from anima.model.decoding import cache_length, can_decode
from anima.model.replay import Recorder, recorder_for

FEWEST_TOKENS = 16
"""Answers that may get as long as this are worth a recording, which costs about as much as a plain step."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; `temperature` 0 is greedy: always the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """The model's continuations of all prompts in one padded batch, without special tokens.

    Prompts are padded on the left and masked, so that each continues as it would alone.

    Args:
        model: A causal language model in a state to generate (see `model.packed.generating`).
        tokenizer: Its tokenizer.
        prompts: Rendered prompts, encoded as in training.
        max_new_tokens: Longest answer, tokens.
        stop_ids: Tokens that end an answer beside the tokenizer's end of sequence.
        sampling: How tokens are chosen.
        streamer: Receives the tokens as they come; for a single prompt.
    """
    tokens = generate_tokens(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        streamer=streamer,
        recorder=recorder_for(model.device),
    )
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    # An answer cut at max_new_tokens may end within a character of several bytes.
    return [text.rstrip("\ufffd").strip() for text in texts]


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    streamer: BaseStreamer | None = None,
    recorder: Recorder | None = None,
) -> list[list[int]]:
    """`generate_answers` as token ids, each up to and with its stop token.

    Args beside those of `generate_answers`:
        recorder: What records the steps; None to launch each of them anew, with a cache that grows.
    """
    longest = max(len(prompt) for prompt in prompts)
    stops = sorted({int(tokenizer.eos_token_id), *stop_ids})
    filled = [[stops[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    drawn = sampling.temperature > 0
    length, loop = cache_length(longest + max_new_tokens), None
    if recorder is not None and max_new_tokens >= FEWEST_TOKENS and can_decode(model, len(prompts), length):
        loop = FixedLoop(recorder, length=length, drawn=drawn, streamer=streamer)
    if drawn and sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]  # PreTrainedModel does not declare it
            input_ids=torch.tensor(filled, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=drawn,
            temperature=sampling.temperature if drawn else None,
            top_p=sampling.top_p if drawn else None,
            top_k=0 if drawn else None,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=stops,
            pad_token_id=stops[0],
            streamer=streamer,
            custom_generate=loop,
        )
    return [_up_to_stop(row, stops) for row in output[:, longest:].tolist()]


def _up_to_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens
