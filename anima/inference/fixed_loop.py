"""The loop of transformers' generate over steps of fixed shapes, handed to it as `custom_generate`.

It prepares prompts, logits processors and stopping criteria as always; tokens are chosen here in the same way, drawn
ones from the same random numbers.
"""

from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from anima.model.decoding import FixedDecoder
from anima.model.replay import Recorder


class FixedLoop:
    """Reads prompts and chooses tokens until every row has stopped."""

    def __init__(self, recorder: Recorder, *, length: int, drawn: bool, streamer: BaseStreamer | None) -> None:
        """Set up one call of `generate`.

        Args:
            recorder: What records a step.
            length: Of the cache: prompts and answers.
            drawn: Draw tokens, or take the most likely ones.
            streamer: Receives the new tokens; transformers hands it the prompt, but does not hand it on to here.
        """
        self._recorder = recorder
        self._length = length
        self._drawn = drawn
        self._streamer = streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Tensor | None,  # named parameters would be taken out of what transformers prepares
    ) -> Tensor:
        """Prompts (rows, T) to prompts and answers, (rows, T + new); called by transformers.

        Behind its stop token a row goes on in whatever way while others are unfinished.

        Args:
            model: The model.
            input_ids: The prompts.
            logits_processor: Temperature and the like.
            stopping_criteria: Which rows have stopped.
            generation_config: What these two were made from.
            inputs: `position_ids` of the prompts, and `attention_mask` where transformers found any padding; what else
                there is belongs to other loops.
        """
        positions = inputs["position_ids"]
        assert positions is not None
        decoder = FixedDecoder(
            model, input_ids, inputs["attention_mask"], positions, length=self._length, recorder=self._recorder
        )
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        try:
            logits = decoder.prompt()
            while True:
                # A copy: processors may write, and the next replay does.
                scores = logits_processor(cast(LongTensor, input_ids), logits.to(torch.float32, copy=True))
                tokens = self._choose(scores)
                input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
                if self._streamer is not None:
                    self._streamer.put(tokens.cpu())
                unfinished &= ~stopping_criteria(input_ids, None)
                if not unfinished.any():
                    break
                logits = decoder.next(tokens)
        finally:
            decoder.close()
        if self._streamer is not None:
            self._streamer.end()
        return input_ids

    def _choose(self, scores: Tensor) -> Tensor:
        """(rows, vocabulary) to (rows,)."""
        if self._drawn:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)
