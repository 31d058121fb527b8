"""A network that is scored: held-out loss over packed rows, and which letter it gives to multiple-choice questions."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from anima.data.batching import MicroBatch
from anima.evaluation.mmlu import Choice, ChoiceEncoder, summarise
from anima.model.packed import CausalModel, packed_hidden
from anima.objectives.objective import PackedBatch
from anima.objectives.sft import SupervisedFineTuning


class Scored:
    """A loaded model as objectives see a policy; nothing is trained."""

    def __init__(self, model: CausalModel) -> None:
        """`model` as `load_base` leaves it, with or without an adapter in force."""
        self._model = model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    @property
    def head_weight(self) -> Tensor:
        """Output head, (vocabulary, hidden)."""
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Hidden states of a packed row, (tokens, hidden)."""
        row = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.document_lengths, batch.shared_prompts)
        return packed_hidden(self._model, *row)


def held_out_loss(network: Scored, batches: Iterable[MicroBatch]) -> dict[str, float]:
    """Mean negative log-likelihood of the scored tokens, and its exponential."""
    objective, loss, tokens = SupervisedFineTuning(), 0.0, 0
    with torch.no_grad():
        for batch in batches:
            loss += float(objective(network, batch.to(network.device)).loss_sum)
            tokens += batch.num_scored
    mean = loss / max(tokens, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "scored_tokens": float(tokens)}


def score_choices(
    network: Scored,
    choices: Sequence[Choice],
    encoder: ChoiceEncoder,
    *,
    batch_tokens: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[list[tuple[bool, float]], int]:
    """Answer the questions as the ancestor's evaluation did: the likeliest of four letters behind "Answer:".

    Args:
        network: What answers.
        choices: The questions.
        encoder: Makes them token ids.
        batch_tokens: Tokens of one pass, at most (one question at least).
        on_batch: Called with the number of questions answered.

    Returns:
        For each question whether it is right, and the mean loss of letter and EOS; how many had to be shortened.
    """
    encoded = [encoder.encode(choice) for choice in choices]
    rows = [[*one.ids, encoder.letters[one.answer]] for one in encoded]
    scores: list[tuple[bool, float]] = []
    letters = torch.tensor(encoder.letters, device=network.device)
    while len(scores) < len(rows):
        begin = end = len(scores)
        load = 0
        while end < len(rows) and (end == begin or load + len(rows[end]) <= batch_tokens):
            load += len(rows[end])
            end += 1
        logps = _last_logps(network, rows[begin:end])
        for two_V, one in zip(logps, encoded[begin:end], strict=True):
            right = int(two_V[0, letters].argmax()) == one.answer
            target = encoder.letters[one.answer]
            scores.append((right, -(float(two_V[0, target]) + float(two_V[1, encoder.eos])) / 2))
        on_batch(end)
    return scores, sum(one.shortened for one in encoded)


def _last_logps(network: Scored, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities at the last two positions of each row, (2, vocabulary)."""
    lengths = [len(row) for row in rows]
    batch = MicroBatch(
        input_ids=torch.tensor([[token for row in rows for token in row]], device=network.device),
        labels=torch.empty(0, device=network.device),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(network.device),
        document_lengths=tuple(lengths),
    )
    ends = torch.tensor(lengths).cumsum(0)
    wanted = torch.stack([ends - 2, ends - 1], dim=1).flatten().to(network.device)
    with torch.no_grad():
        logits = (network(batch)[wanted] @ network.head_weight.T).float()
    return list(logits.log_softmax(-1).view(len(rows), 2, -1))


def benchmark(
    network: Scored, choices: Sequence[Choice], encoder: ChoiceEncoder, *, batch_tokens: int
) -> dict[str, float]:
    """Score and summarise."""
    scores, shortened = score_choices(network, choices, encoder, batch_tokens=batch_tokens)
    return {**summarise(choices, scores), "questions": float(len(choices)), "shortened": float(shortened)}
