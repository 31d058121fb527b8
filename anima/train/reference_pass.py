"""The reference: which model it is, and its log-probabilities of all pairs of a set in one pass without gradients.

Never a second base: the network itself with its adapter off, as it was loaded, or with another adapter for a while.
All ranks share the work; rank 0 alone reads and writes the cache, so that every rank knows the same numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anima import distributed
from anima.config.schema import Config
from anima.data.batching import assign
from anima.data.order import IndexArray
from anima.data.pairs import LogpsArray, PairDataset
from anima.distributed import Ranks
from anima.errors import TrainingError
from anima.model.lora import adapter_hash, with_other_adapter, without_adapter
from anima.model.packed import PackedModel
from anima.objectives.objective import PackedBatch
from anima.objectives.preference import pair_logps
from anima.objectives.reference import ReferenceCache

CODE_VERSION = 2
"""Part of every cache key: raise it when the same model would give other numbers."""
ROUND_MICRO_BATCHES = 16
"""Micro-batches of each rank between two writes: what is lost when the pass is cut off."""


@dataclass(frozen=True)
class Reference:
    """A model to compare with.

    Attributes:
        adapter: Hash of its adapter; empty for the base alone.
        folder: Folder of an adapter that must be put in place of the trained one; None if none must.
        adapter_off: Whether the trained adapter must be switched off.
        equals_start: Whether the policy is the same model before the first step.
    """

    adapter: str
    folder: str | None
    adapter_off: bool
    equals_start: bool

    def named(self, base_fingerprint: str) -> str:
        """Identity for people and records."""
        return f"adapter {self.adapter} on base {base_fingerprint}" if self.adapter else f"base {base_fingerprint}"

    @contextmanager
    def in_place(self, network: PackedModel) -> Iterator[None]:
        """Let the network be the reference, in eval mode; before the engine is built.

        Raises:
            ModelError: the reference's adapter does not fit.
        """
        was_training = network.training
        network.eval()
        switched: AbstractContextManager[None] = nullcontext()
        if self.folder is not None:
            switched = with_other_adapter(network.adapted, self.folder)
        elif self.adapter_off:
            switched = without_adapter(network.adapted)
        try:
            with switched:
                yield
        finally:
            network.train(was_training)


def resolve_reference(config: Config) -> Reference | None:
    """Which model `--reference` names; None for no reference.

    Raises:
        ModelError: an adapter's folder lacks files.
    """
    settings, start = config.preference, config.model.adapter_path
    if not settings.needs_reference:
        return None
    start_hash = "" if start is None else adapter_hash(start)
    if settings.reference == "base" or (settings.reference == "auto" and start is None):
        return Reference("", None, adapter_off=True, equals_start=start is None)
    named = settings.reference_adapter
    wanted = start_hash if named is None else adapter_hash(named)
    if wanted == start_hash:
        return Reference(wanted, None, adapter_off=False, equals_start=True)
    return Reference(wanted, named, adapter_off=False, equals_start=False)


class NetworkPolicy:
    """The network as objectives see a policy, before there is an engine."""

    def __init__(self, network: PackedModel) -> None:
        """Call `network` itself."""
        self._network = network

    @property
    def head_weight(self) -> Tensor:
        """Output head, (vocabulary, hidden)."""
        return self._network.head_weight

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Hidden states, (tokens, hidden)."""
        hidden: Tensor = self._network(
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            document_lengths=batch.document_lengths,
            shared_prompts=batch.shared_prompts,
        )
        return hidden


@dataclass(frozen=True)
class ReferencePass:
    """How the pass is shared out.

    Attributes:
        policy: The reference, in eval mode.
        device: Where it computes.
        ranks: This process among the others.
        micro_batch_tokens: Tokens of one forward pass, at most.
        packing: Several pairs in a forward pass.
        tell: Prints a line on the main rank.
    """

    policy: NetworkPolicy
    device: torch.device
    ranks: Ranks
    micro_batch_tokens: int
    packing: bool
    tell: Callable[[str], None]

    def complete(self, name: str, pairs: PairDataset, numbers: IndexArray, cache: ReferenceCache) -> LogpsArray:
        """The log-probabilities of the pairs `numbers` (NaN for others), from the cache or computed and kept there.

        A collective. Cut off and started again, on any number of ranks, it goes on where it stopped.

        Args:
            name: What to call the set.
            pairs: The set.
            numbers: Pairs that are needed.
            cache: Where their log-probabilities are kept.

        Returns:
            fp32 (pairs, 2), chosen first; the same on every rank.

        Raises:
            TrainingError: a log-probability is not finite.
        """
        nothing: tuple[LogpsArray, list[str]] = (np.zeros((0, 2), dtype=np.float32), [])
        known, problems = distributed.from_main(cache.load() if self.ranks.is_main else nothing)
        for problem in problems:
            self.tell(f"reference, {name}: {problem}")
        missing = numbers[np.isnan(known[numbers, 0])]
        found = len(numbers) - len(missing)
        self.tell(f"reference, {name}: {found:,} of {len(numbers):,} pairs known from {cache.folder}")
        # Longest first: what does not fit into memory fails at once.
        missing = missing[np.argsort(-pairs.lengths[missing], kind="stable")]
        done = 0
        for part in self._rounds(pairs.lengths[missing]):
            now = missing[part]
            known[now] = self._logps(pairs, now)
            self._keep(cache, now, known[now])
            done += len(now)
            self.tell(f"reference, {name}: {found + done:,} of {len(numbers):,} pairs")
        return known

    def _rounds(self, lengths: IndexArray) -> list[slice]:
        """Neighbouring pairs whose tokens fill ROUND_MICRO_BATCHES micro-batches of every rank."""
        budget = ROUND_MICRO_BATCHES * self.micro_batch_tokens * self.ranks.world_size
        number = (np.cumsum(lengths) - lengths) // budget
        borders = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(lengths)]
        return [slice(start, stop) for start, stop in pairwise(borders) if stop > start]

    def _logps(self, pairs: PairDataset, numbers: IndexArray) -> LogpsArray:
        values = torch.zeros(len(numbers), 2, dtype=torch.float64, device=self.device)
        shares = assign(
            pairs.lengths[numbers].tolist(),
            world_size=self.ranks.world_size,
            micro_batch_tokens=self.micro_batch_tokens,
            packing=self.packing,
        )
        with torch.no_grad():
            for members in filter(None, shares[self.ranks.rank]):
                logps = pair_logps(self.policy, pairs.batch(numbers[members]).to(self.device))
                values[members] = torch.stack((logps.chosen, logps.rejected), dim=1).double()
        result: LogpsArray = distributed.sum_over_ranks(values).float().cpu().numpy()
        broken = [pairs.source(int(i)) for i in numbers[~np.isfinite(result).all(axis=1)]]
        if broken:
            raise TrainingError(
                "the reference gives answers a probability that is no number",
                where=", ".join(broken[:5]),
                got=f"{len(broken)} pairs",
                fix="look at these rows, or try --compute_dtype fp32",
            )
        return result

    def _keep(self, cache: ReferenceCache, numbers: IndexArray, logps: LogpsArray) -> None:
        if not self.ranks.is_main:
            return
        try:
            cache.add(numbers, logps)
        except OSError as error:  # the run has the numbers; only the next one would have to compute them again
            self.tell(f"reference: {cache.folder} cannot be written ({error.strerror}), the numbers are not kept")


def cache_of(
    config: Config, reference: Reference, base_fingerprint: str, compute_dtype: str, pairs: PairDataset
) -> ReferenceCache:
    """The cache of a set under a reference; its key covers all that the numbers depend on.

    Template, tokenizer, limits, files and split are in the set's fingerprint.
    """
    identity = {
        "code": str(CODE_VERSION),
        "base": base_fingerprint,
        "adapter": reference.adapter,
        "compute_dtype": compute_dtype,
        "data": pairs.fingerprint,
    }
    return ReferenceCache(Path(config.preference.reference_cache_dir), identity, len(pairs))
