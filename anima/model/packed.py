"""The network as training sees it: a packed row in, hidden states out.

The output head is not part of the forward pass, so that no full table of logits ever exists; objectives
read its weight and work in chunks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from anima.errors import ModelError
from anima.model.attention import IMPLEMENTATION, serves_short
from anima.model.lora import AdaptedModel
from anima.model.recompute import apply_policy
from anima.model.shared_keys import SharedKeys

CausalModel = PreTrainedModel
"""A transformers model with a head, under a name that later stages may use."""


class PackedModel(nn.Module):
    """A PEFT model that eats packed rows."""

    def __init__(self, adapted: AdaptedModel, recompute: str) -> None:
        """Wrap `adapted`; `recompute` as in `--recompute`, but for auto."""
        super().__init__()
        self.adapted = adapted
        head = self.causal_lm.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ModelError("the model's output head is no plain matrix", got=type(head).__name__)
        apply_policy(self.causal_lm, recompute)
        serves_short(head.weight.device, self.head_dim)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model with LoRA layers in place."""
        return cast(PreTrainedModel, self.adapted.get_base_model())

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        config = self.causal_lm.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @property
    def head_weight(self) -> Tensor:
        """Output head, (vocabulary, hidden)."""
        return cast(nn.Linear, self.causal_lm.get_output_embeddings()).weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        document_lengths: Sequence[int],
        shared_prompts: SharedKeys | None = None,
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            input_ids: (1, T).
            position_ids: (1, T), restarting at every document, or going on from the prompt that it shares.
            cu_seqlens: int32 (documents + 1,).
            document_lengths: The same boundaries as lengths, on the host.
            shared_prompts: Which documents go on from the beginning of the document before them.

        Returns:
            (T, hidden).
        """
        row = (input_ids, position_ids, cu_seqlens, document_lengths, shared_prompts)
        return packed_hidden(self.causal_lm, *row)


def packed_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    document_lengths: Sequence[int],
    shared_prompts: SharedKeys | None = None,
) -> Tensor:
    """Hidden states of a packed row; arguments as in `PackedModel.forward`, (T, hidden)."""
    output = model.get_decoder()(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        cu_seqlens=cu_seqlens,
        document_lengths=document_lengths,
        shared_prompts=shared_prompts,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden.squeeze(0)


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Let `generate` run on a model that trains on packed rows: padded attention, cache on, eval mode."""
    was_training = model.training
    model.eval()
    model.set_attn_implementation("sdpa")
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = False
        model.set_attn_implementation(IMPLEMENTATION)
        model.train(was_training)
