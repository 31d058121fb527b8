"""Preference training set up: the reference is resolved early and asked once, then the pairs carry what it said."""

from collections.abc import Sequence

import numpy as np

from anima import distributed
from anima.config.schema import Config
from anima.data.batching import PairMicroBatch
from anima.data.kinds import PAIRS, RecordKind
from anima.data.loader import StepLoader
from anima.data.order import IndexArray
from anima.data.pairs import PairDataset
from anima.data.prepare import PreparedData
from anima.errors import ConfigError
from anima.model.base_model import fingerprint
from anima.objectives.preference import PreferenceOptimization
from anima.train.engine import Engine
from anima.train.method import Method, Place, Setup, nothing_to_say
from anima.train.preference_watch import PreferenceWatch
from anima.train.reference_pass import NetworkPolicy, Reference, ReferencePass, cache_of, resolve_reference
from anima.train.start_check import check_start


class Preference:
    """Training on pairs.

    Raises:
        ModelError: the reference's adapter, or the one to start from, lacks files.
    """

    records: RecordKind[PairDataset] = PAIRS

    def __init__(self, config: Config) -> None:
        """Find out which model the reference is, before anything heavy."""
        self.reference = resolve_reference(config)

    def set_up(self, data: PreparedData[PairDataset], place: Place) -> Setup:
        """Ask the reference about every pair that the run will see; a collective.

        Raises:
            ModelError: the reference's adapter does not fit.
            TrainingError: the reference gives numbers that are not finite.
        """
        settings = place.config.preference
        objective = PreferenceOptimization(settings)
        watch = nothing_to_say if data.eval is None else PreferenceWatch(data.eval.longer_wins())
        if self.reference is None:
            place.tell(f"reference none: {settings.loss_type} compares the policy with nothing")
            return Setup(objective, data.train, data.eval, "none", watch=watch)
        reference, dtype = self.reference, place.compute.dtype
        needed, prompts = pairs_of_run(data.train, place), place.config.output.sample_prompts
        train, held_out, identity, answers = ask_reference(reference, data, place, needed, prompts)

        def check(engine: Engine, micro_batches: Sequence[PairMicroBatch]) -> dict[str, float]:
            must_be_equal = reference.equals_start
            return check_start(engine, settings, micro_batches, dtype, must_be_equal=must_be_equal)

        return Setup(objective, train, held_out, identity, answers, check, watch)


def ask_reference(
    reference: Reference, data: PreparedData[PairDataset], place: Place, needed: IndexArray, prompts: Sequence[str]
) -> tuple[PairDataset, PairDataset | None, str, tuple[str, ...]]:
    """Both sets with the reference's log-probabilities, its identity, and its answers to the prompts.

    Args:
        reference: The model.
        data: Training and held-out pairs.
        place: Where the run happens.
        needed: Numbers of the training pairs that will be used; of the held-out ones all are.
        prompts: Questions to answer, on the main rank.
    """
    config, base = place.config, fingerprint(place.network)
    identity = reference.named(base)
    place.tell(f"reference {identity}")
    answers: list[str] = []
    with reference.in_place(place.network):
        work = ReferencePass(
            NetworkPolicy(place.network),
            place.compute.device,
            place.ranks,
            config.batch.tokens_unmeasured(_longest(data)),
            config.batch.packing,
            place.tell,
        )

        def complete(name: str, pairs: PairDataset, numbers: IndexArray) -> PairDataset:
            cache = cache_of(config, reference, base, place.compute.label, pairs)
            return pairs.with_reference(work.complete(name, pairs, numbers, cache))

        train = complete("train", data.train, needed)
        held_out = None
        if data.eval is not None:
            held_out = complete("eval", data.eval, np.arange(len(data.eval), dtype=np.int64))
        if prompts and place.ranks.is_main:
            answers = place.answer(prompts)
        distributed.wait_for_all()
    return train, held_out, identity, tuple(answers)


def _longest(data: PreparedData[PairDataset]) -> int:
    return max(int(pairs.lengths.max()) for pairs in (data.train, data.eval) if pairs is not None)


def ask_about_all(method: Method, data: PreparedData[PairDataset], place: Place) -> None:
    """Fill the cache with what the reference says about every pair of both sets; a collective.

    Raises:
        ConfigError: the run has no reference.
    """
    reference = method.reference if isinstance(method, Preference) else None
    if reference is None:
        raise ConfigError(
            "this run compares the policy with no other model",
            where="--objective, --loss_type, --reference",
            got=f"{place.config.objective}, {place.config.preference.loss_type}, {place.config.preference.reference}",
            allowed="--objective dpo with a loss that has a reference",
        )
    ask_reference(reference, data, place, np.arange(len(data.train), dtype=np.int64), ())


def pairs_of_run(pairs: PairDataset, place: Place) -> IndexArray:
    """Numbers of the pairs that the run's steps hold, each once: a short run over a large set needs few."""
    optimization, batch = place.config.optimization, place.config.batch
    loader = StepLoader(
        pairs,
        global_batch_size=batch.global_batch_size,
        micro_batch_tokens=batch.micro_batch_tokens,
        packing=batch.packing,
        seed=place.config.seed,
        rank=0,
        world_size=1,
    )
    epochs = None if optimization.max_steps else optimization.num_train_epochs
    steps = optimization.max_steps or loader.num_steps(optimization.num_train_epochs)
    if steps * batch.global_batch_size >= len(pairs):  # at least one whole epoch
        return np.arange(len(pairs), dtype=np.int64)
    rows = [loader.rows(step, num_train_epochs=epochs) for step in range(steps)]
    return np.unique(np.concatenate(rows))
