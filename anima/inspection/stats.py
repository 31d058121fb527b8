"""The figures of a tokenised set: how long its rows are, what the limits cut, how a step is packed.

Quantiles interpolate linearly, as pandas and the ancestor's length report do. Knows no text.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from anima.config.schema import BatchConfig, DataConfig
from anima.data.batching import assign
from anima.data.loader import Examples, StepLoader
from anima.data.report import SetReport

QUANTILES = (0.5, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
KINDS = ("source", "target", "total")
MAX_STEPS = 200
"""Steps of the epoch that are packed to measure the packing, spread evenly over it."""

NUM_BINS = 24


@dataclass(frozen=True, slots=True)
class Packing:
    """How the steps of an epoch fill their micro-batches; over all ranks where not said otherwise."""

    steps_measured: int
    micro_batches_mean: float
    micro_batches_max: int
    efficiency: float
    """Computed tokens of the examples over the tokens of the budget of all micro-batches."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Rows by total tokens: counts[i] rows have edges[i] <= tokens < edges[i + 1]; the last bin holds the longest."""

    edges: list[int]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of the training set (and, before the split, of its held-out part)."""

    rows: int
    quantiles: dict[str, dict[str, float]]
    """Tokens by kind (source, target, total) and quantile, of all rows that could be rendered, before cutting."""
    limits: dict[str, int | None]
    over_limit: dict[str, float]
    """Share of the rows over each limit, by kind."""
    histogram: Histogram
    supervised_share: float
    unit: str
    """What an example is, in the plural: sequences, or pairs."""
    examples_an_epoch: int
    tokens_an_epoch: int
    """Tokens that are computed: a prompt that both sides of a pair begin with counts once."""
    steps_an_epoch: int
    examples_a_step: int
    micro_batch_tokens: int
    ranks: int
    packing: Packing

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def quantiles(lengths: npt.NDArray[np.int32]) -> dict[str, float]:
    """The QUANTILES of lengths, linearly interpolated, by their name such as "0.95"."""
    if not len(lengths):
        return {}
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)}


def histogram(lengths: npt.NDArray[np.int32]) -> Histogram:
    """Bins of equal width from 0 to the 0.99 quantile; the last one holds all that is longer."""
    if not len(lengths):
        return Histogram([0, 1], [0])
    top = float(np.quantile(lengths, 0.99))
    least = max(1, int(np.ceil(top / (NUM_BINS - 1))))
    power = 10 ** (len(str(least)) - 1)
    width = next(round(power * step) for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * step >= least)
    counts = np.bincount(np.minimum(lengths // width, NUM_BINS - 1), minlength=NUM_BINS)
    used = int(np.flatnonzero(counts)[-1]) + 1
    edges = [i * width for i in range(used)] + [max(used * width, int(lengths.max()) + 1)]
    return Histogram(edges, counts[:used].tolist())


def packing(loader: StepLoader[Any], lengths: Sequence[int], steps: int, batch: BatchConfig, ranks: int) -> Packing:
    """Pack some steps of the first epoch as training would.

    Args:
        loader: The run's loader.
        lengths: Tokens to compute of each example of its set.
        steps: Steps of an epoch.
        batch: The budget.
        ranks: Number of ranks.
    """
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, MAX_STEPS)).astype(int))
    counts, tokens = [], 0
    for step in chosen:
        sizes = [int(lengths[i]) for i in loader.rows(int(step), num_train_epochs=1)]
        shares = assign(sizes, world_size=ranks, micro_batch_tokens=batch.micro_batch_tokens, packing=batch.packing)
        counts.append(sum(map(len, shares)))
        tokens += sum(sizes)
    return Packing(
        steps_measured=len(chosen),
        micro_batches_mean=float(np.mean(counts)),
        micro_batches_max=max(counts),
        efficiency=tokens / (sum(counts) * batch.micro_batch_tokens),
    )


def measure(
    train: Examples[Any],
    lengths: npt.NDArray[np.int32],
    report: SetReport,
    data: DataConfig,
    batch: BatchConfig,
    *,
    unit: str,
    seed: int,
    ranks: int,
) -> Stats:
    """All figures.

    Args:
        train: What an epoch holds, after split and mixture.
        lengths: Source, target and total tokens of every row, (rows, 3).
        report: Of the training files.
        data: The limits.
        batch: The step and the budget.
        unit: What an example is, in the plural.
        seed: The run's seed.
        ranks: Number of ranks that share a step.
    """
    limits = {"source": data.source_max_len, "target": data.target_max_len, "total": data.sequence_limit}
    columns = dict(zip(KINDS, lengths.T, strict=True))
    over = {
        kind: float(np.mean(columns[kind] > limit)) if limit is not None and len(lengths) else 0.0
        for kind, limit in limits.items()
    }
    loader = StepLoader(
        train,
        global_batch_size=batch.global_batch_size,
        micro_batch_tokens=batch.micro_batch_tokens,
        packing=batch.packing,
        seed=seed,
        rank=0,
        world_size=ranks,
    )
    steps = loader.num_steps(1)
    batch = replace(batch, micro_batch_tokens=batch.tokens_unmeasured(int(train.lengths.max())))
    return Stats(
        rows=len(lengths),
        quantiles={kind: quantiles(column) for kind, column in columns.items()},
        limits=limits,
        over_limit=over,
        histogram=histogram(columns["total"]),
        supervised_share=report.supervised_tokens / max(1, report.tokens),
        unit=unit,
        examples_an_epoch=len(train),
        tokens_an_epoch=int(train.lengths.sum()),
        steps_an_epoch=steps,
        examples_a_step=batch.global_batch_size,
        micro_batch_tokens=batch.micro_batch_tokens,
        ranks=ranks,
        packing=packing(loader, train.lengths.tolist(), steps, batch, ranks),
    )


def table(stats: Stats) -> list[list[str]]:
    """Quantiles as rows of text: a header, then a row for each kind of length."""
    header = ["tokens", *("longest" if q == 1 else f"q{q:g}" for q in QUANTILES), "limit", "over it"]
    rows = [header]
    for kind in KINDS:
        found = stats.quantiles[kind]
        values = [f"{found[f'{q:g}']:,.6g}" if found else "-" for q in QUANTILES]
        limit = stats.limits[kind]
        over = "-" if limit is None else f"{stats.over_limit[kind]:.2%}"
        rows.append([kind, *values, "-" if limit is None else f"{limit:,}", over])
    return rows


def facts(stats: Stats) -> list[str]:
    """The other figures in words."""
    packed = stats.packing
    once = " (shared prompts once)" if stats.unit == "pairs" else ""
    return [
        f"an epoch: {stats.examples_an_epoch:,} {stats.unit}, {stats.tokens_an_epoch:,} tokens{once}, "
        f"{stats.steps_an_epoch:,} steps of {stats.examples_a_step}",
        f"supervised: {stats.supervised_share:.1%} of the tokens",
        f"a step: {packed.micro_batches_mean:.1f} micro-batches on average, {packed.micro_batches_max} at most, over "
        f"{stats.ranks} rank(s), at {stats.micro_batch_tokens:,} tokens; {packed.efficiency:.1%} of that budget is "
        f"filled (measured on {packed.steps_measured} steps)",
    ]
