"""--recompute auto: the micro-batches and the recomputation that are fastest within the memory of the device.

Measures on examples of the run's first steps, chooses for these steps, and cuts the sets accordingly. Without auto, it
only cuts.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from anima import distributed
from anima.config.schema import Config
from anima.data.batching import assign
from anima.data.loader import EvalLoader, StepLoader
from anima.data.order import IndexArray
from anima.distributed import Ranks
from anima.errors import OutOfMemory
from anima.free_memory import free_host_memory
from anima.model.host_memory import HOST_SHARE
from anima.model.packed import PackedModel
from anima.model.recompute import apply_policy, host_memory_held
from anima.train.budget import Choice, Costs, Load, best, choices, sizes
from anima.train.engine import Engine
from anima.train.measuring import Gauge, GpuGauge, Measured, measure
from anima.train.method import Setup
from anima.train.run import Fitted, Plan

GIB = 2**30
SAMPLED_STEPS, SAMPLED_EXAMPLES = 20, 4000
"""How many of the first steps are packed for every size in question, and how many examples they may have together."""
MARGIN = 0.04
"""Share of the memory that is left free: freed blocks of one size are no room for another."""
LESS = 0.9
"""Of what a plan that did not fit was expected to take, the share that the next one may."""


def fit(
    config: Config,
    ranks: Ranks,
    setup: Setup,
    engine: Engine,
    network: PackedModel,
    tell: Callable[[str], None],
    gauge: Gauge | None = None,
) -> Fitted:
    """The plan of a run in force; with --recompute auto it is made here, by measuring where there is a GPU.

    A collective. Measuring leaves the state of the training as it was.

    Args:
        config: All options.
        ranks: This process among the others.
        setup: Objective and sets.
        engine: Around the network.
        network: Whose layers are recomputed.
        tell: Prints a line on the main rank.
        gauge: Reads the memory; None: that of the engine's device.

    Raises:
        OutOfMemory: not even a step without activations fits.
    """
    longest = _longest(setup)
    tokens, recompute = config.batch.tokens_unmeasured(longest), config.optimization.recompute
    if recompute != "auto":
        return _cut(config, ranks, setup, Plan(tokens, recompute))
    if gauge is None and engine.device.type == "cuda":
        cap = config.max_gpu_memory_gib
        gauge = GpuGauge(engine.device, None if cap is None else cap * GIB)
    if gauge is None:
        apply_policy(network.causal_lm, "all")
        why = f"--recompute auto: no GPU to measure, so all layers are recomputed, {tokens:,} tokens a micro-batch"
        return _cut(config, ranks, setup, Plan(tokens, "all", why))
    engine.train_mode()
    began = time.perf_counter()
    try:
        search = _Search(config, ranks, setup, engine, network, gauge)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"rank {ranks.rank} has no memory for the gradients of the adapter",
            got="out of memory at the end of a step, without any activations",
            fix="a smaller --lora_r; more GPUs, which share optimizer state and gradients; or a smaller base",
        ) from error
    tell(f"--recompute auto: passes measured in {time.perf_counter() - began:.1f} s{search.measured}")
    return search.fitted()


def _longest(setup: Setup) -> int:
    """Tokens of the longest example of both sets, which a micro-batch must hold."""
    return max(int(examples.lengths.max()) for examples in (setup.train, setup.held_out) if examples is not None)


def _cut(config: Config, ranks: Ranks, setup: Setup, plan: Plan, smaller: Callable[[], Fitted] | None = None) -> Fitted:
    """The sets as micro-batches of the plan's size."""
    place: dict[str, Any] = {
        "micro_batch_tokens": plan.micro_batch_tokens,
        "packing": config.batch.packing,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
    }
    steps = StepLoader(setup.train, global_batch_size=config.batch.global_batch_size, seed=config.seed, **place)
    held_out = None if setup.held_out is None else EvalLoader(setup.held_out, **place)
    return Fitted(plan, steps, held_out, smaller)


class _Search:
    """What was measured, and what can be chosen from it."""

    def __init__(
        self, config: Config, ranks: Ranks, setup: Setup, engine: Engine, network: PackedModel, gauge: Gauge
    ) -> None:
        self._config, self._ranks, self._setup, self._network = config, ranks, setup, network
        self._sampled = _first_steps(config, ranks, setup)
        self._num_layers = len(network.causal_lm.get_decoder().layers)
        longest, most = _longest(setup), self._most()
        given = config.batch.micro_batch_tokens
        self._sizes: Sequence[int] = [given] if given else sizes(longest, most)
        if not config.batch.packing:
            self._sizes = [longest]
        self.measured = measure(
            engine,
            setup.objective,
            self._packed,
            lambda policy: apply_policy(network.causal_lm, policy),
            list(dict.fromkeys(["all", *(policy_of(half, self._num_layers, away) for half, away in self._halves())])),
            longest=longest,
            most=min(most, given or most),
            gauge=gauge,
        )

    def _halves(self) -> list[tuple[int, int]]:
        """Layers to recompute, and to send away, of the policies that are measured beside `all`."""
        half = self._num_layers // 2
        return [(half, 0), (0, half), (0, 0)]

    def _costs(self) -> Costs | None:
        """What was measured, by layers; None if not even the smallest pass fitted."""
        points, every = self.measured.points, self._num_layers
        half = every // 2
        by_layers = {layers: policy_of(layers, every) for layers in (0, half, every)}
        found = {layers: points[policy] for layers, policy in by_layers.items() if policy in points}
        away = points.get(policy_of(0, every, half)) if half else None
        sent = None if away is None else (half, away)
        return Costs(found, sent, self.measured.host_speed) if every in found else None

    def _host_room(self) -> float:
        """Host memory that a rank may take on the machine with the least for each of its ranks."""
        held = host_memory_held(self._network.causal_lm)  # by measuring, for activations: as good as free
        everywhere = distributed.gather_objects((platform.node(), free_host_memory().size, held))
        machines = [machine for machine, *_ in everywhere]
        held_on = {name: sum(part for machine, _, part in everywhere if machine == name) for name in machines}
        shares = (HOST_SHARE * (free + held_on[name]) / machines.count(name) for name, free, _ in everywhere)
        return float(min(shares))

    def _most(self) -> int:
        """Tokens of the largest micro-batch of the sampled steps if memory were endless."""
        if not self._config.batch.packing:
            return max(int(lengths.max()) for lengths in self._lengths())
        whole = max(sum(part) for lengths in self._lengths() for part in self._shares(lengths, int(lengths.sum())))
        # Several ranks: what fills each of them evenly does not always fit into exactly that.
        return whole if self._ranks.world_size == 1 else whole + whole // 8

    def _lengths(self) -> list[IndexArray]:
        return [self._setup.train.lengths[rows] for rows in self._sampled]

    def _shares(self, lengths: IndexArray, tokens: int) -> list[list[int]]:
        """Tokens of every micro-batch of a step, by rank."""
        shares = assign(
            lengths.tolist(),
            world_size=self._ranks.world_size,
            micro_batch_tokens=tokens,
            packing=self._config.batch.packing,
        )
        return [[int(lengths[members].sum()) for members in share] for share in shares]

    def _packed(self, tokens: int) -> Any:  # noqa: ANN401  (a micro-batch)
        """Examples of the first steps, in their order, up to so many tokens; one alone where they are not packed."""
        rows = [int(row) for step in self._sampled for row in step]
        lengths = self._setup.train.lengths
        fitting = [row for row in rows if lengths[row] <= tokens] or [min(rows, key=lambda row: int(lengths[row]))]
        if not self._config.batch.packing:
            return self._setup.train.batch([max(fitting, key=lambda row: int(lengths[row]))])
        chosen, left = fitting[:1], tokens - int(lengths[fitting[0]])
        for row in fitting[1:]:
            if lengths[row] <= left:
                chosen.append(row)
                left -= int(lengths[row])
        return self._setup.train.batch(chosen)

    def fitted(self, limit: float | None = None) -> Fitted:
        """Choose within `limit` bytes for a pass, at first all there are, and put the choice into force."""
        measured, costs = self.measured, self._costs()
        smaller: Callable[[], Fitted] | None = None
        if costs is None:
            plan = Plan(
                self._sizes[0], "all", f"--recompute auto: {_NOTHING} {_tokens(self._sizes[0])}, all recomputed"
            )
        else:
            room = (1 - MARGIN) * measured.capacity - measured.before if limit is None else limit
            total = sum(int(lengths.sum()) for lengths in self._lengths())
            options = choices(costs, self._loads(costs, room), total, self._host_room())
            choice = best(options, room)
            plan = _plan(choice, options, room, costs, measured)
            less = LESS * (measured.before + choice.bytes) - measured.before
            if limit is None and choice != best(
                options, float("-inf")
            ):  # there is something smaller, and once is enough
                smaller = lambda: self.fitted(less)  # noqa: E731
        apply_policy(self._network.causal_lm, plan.recompute)
        return _cut(self._config, self._ranks, self._setup, plan, smaller)

    def _loads(self, costs: Costs, limit: float) -> Mapping[int, Load]:
        """What the sampled steps ask for at every size that could fit; at the smallest in any case."""
        loads: dict[int, Load] = {}
        for size in self._sizes:
            if loads and costs.bytes(size, costs.all_layers) > limit:
                break
            steps = [self._shares(lengths, size) for lengths in self._lengths()]
            passes = sum(len(shares[0]) for shares in steps)
            loads[size] = Load(passes, sum(max(map(sum, shares)) for shares in steps), self._heaviest(size))
        return loads

    def _heaviest(self, size: int) -> int:
        """Tokens of the run's largest micro-batch: of a size that was given, steps may never fill all."""
        if not self._config.batch.micro_batch_tokens:
            return size
        optimization = self._config.optimization
        steps = _cut(self._config, self._ranks, self._setup, Plan(size, "all")).steps
        epochs = None if optimization.max_steps else optimization.num_train_epochs
        count = optimization.max_steps or steps.num_steps(optimization.num_train_epochs)
        return sum(steps.heaviest(count, num_train_epochs=epochs).document_lengths)


_NOTHING = "no pass fitted into memory; the smallest micro-batch is tried:"


def _first_steps(config: Config, ranks: Ranks, setup: Setup) -> list[IndexArray]:
    """Numbers of the examples of the run's first steps."""
    batch, optimization = config.batch, config.optimization
    loader = StepLoader(
        setup.train,
        global_batch_size=batch.global_batch_size,
        micro_batch_tokens=0,  # only the order is asked for
        packing=batch.packing,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    epochs = None if optimization.max_steps else optimization.num_train_epochs
    steps = optimization.max_steps or loader.num_steps(optimization.num_train_epochs)
    count = min(steps, SAMPLED_STEPS, max(1, SAMPLED_EXAMPLES // batch.global_batch_size))
    return [loader.rows(step, num_train_epochs=epochs) for step in range(count)]


def policy_of(layers: int, num_layers: int, away: int = 0) -> str:
    """What `--recompute` calls the first `layers` recomputed as a whole, the cheap parts of the others, and `away` of
    these in host memory.
    """
    if layers == num_layers:
        return "all"
    return (str(layers) if layers else "cheap") + (f"/{away}" if away else "")


def _plan(choice: Choice, options: Sequence[Choice], limit: float, costs: Costs, measured: Measured) -> Plan:
    every = costs.all_layers
    expected = (measured.before + choice.bytes) / GIB
    memory = f"{expected:.1f} of {measured.capacity / GIB:.1f} GiB"
    layers = {0: "only the cheap parts", every: f"all {every} layers"}.get(
        choice.layers, f"{choice.layers} of {every} layers"
    )
    host = f", what {choice.away} layers keep in host memory" if choice.away else ""
    what = f"{_tokens(choice.tokens)}, {layers} recomputed{host}"
    if choice.bytes > limit:
        why = f"--recompute auto: nothing fits by measure; the smallest is tried: {what}, {memory}"
    else:
        speed = f"{choice.speed:,.0f} tokens/s expected before the optimizer's part"
        why = f"--recompute auto: {what}: {speed}, {memory}{_others(choice, options, limit, every)}"
    policy = policy_of(choice.layers, every, choice.away)
    return Plan(
        choice.tokens, policy, why, lambda tokens: measured.before + costs.bytes(tokens, choice.layers, choice.away)
    )


def _tokens(tokens: int) -> str:
    return f"{tokens:,} tokens a micro-batch"


def _others(choice: Choice, options: Sequence[Choice], limit: float, every: int) -> str:
    """The best of both ends, in parentheses."""
    told = []
    for layers, name in ((0, "cheap"), (every, "all")):
        fitting = [o for o in options if o.layers == layers and not o.away and o.bytes <= limit]
        if not fitting:
            told.append(f"{name} does not fit")
        elif (choice.layers, choice.away) != (layers, 0):
            other = best(fitting, limit)
            told.append(f"{name} at {other.tokens:,}: {other.speed:,.0f} tokens/s")
    return f" ({'; '.join(told)})" if told else ""
