"""Everything the loop drives, as launch/train.py builds it. Does nothing itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anima.config.schema import Config
from anima.objectives.objective import Objective
from anima.tracking.progress import Progress
from anima.tracking.tracker import Tracker
from anima.train.engine import Engine
from anima.train.method import StartCheck, Watch, nothing_to_check, nothing_to_say
from anima.train.step import GradientProbe
from anima.train.stop import StopRequest
from anima.train.watchdog import Watchdog


class Steps(Protocol):
    """The training set as steps: `data/loader.py`."""

    def num_steps(self, num_train_epochs: float) -> int:
        """Steps until every row was seen so often."""
        ...

    def step(self, index: int, *, num_train_epochs: float | None = None) -> Sequence[Any]:
        """This rank's micro-batches of optimizer step `index` (0-based)."""
        ...

    def sources(self, index: int, *, num_train_epochs: float | None = None) -> list[str]:
        """Where the step's rows came from."""
        ...

    def epoch(self, index: int) -> float:
        """Epochs seen before step `index`."""
        ...

    def heaviest(self, num_steps: int, *, num_train_epochs: float | None = None) -> Any:  # noqa: ANN401  (a micro-batch)
        """The micro-batch with the most tokens of all ranks and steps, or one at least as large."""
        ...

    def probe(self) -> Any:  # noqa: ANN401  (a micro-batch)
        """A micro-batch that depends on the data alone, not on ranks or budgets."""
        ...


@dataclass(frozen=True)
class Plan:
    """How large a micro-batch may be and what is recomputed: as asked for, or as --recompute auto chose.

    Attributes:
        micro_batch_tokens: Of a micro-batch, at most.
        recompute: all, cheap, none, or a number of layers.
        why: What was chosen and why; empty where nothing was.
        peak: Tokens of a micro-batch -> bytes expected at its peak; None if nothing was measured.
    """

    micro_batch_tokens: int
    recompute: str
    why: str = ""
    peak: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Fitted:
    """A plan in force: the sets cut as it says.

    Attributes:
        held_out: The held-out micro-batches; None without a set.
        smaller: Puts a plan with less memory into force, for when this one does not fit after all; None: there is none.
    """

    plan: Plan
    steps: Steps
    held_out: Iterable[Any] | None
    smaller: "Callable[[], Fitted] | None" = None


@dataclass(frozen=True)
class Identity:
    """What a run is, as far as another process that goes on from its checkpoints must agree with it.

    Attributes:
        config: All options by their flag names.
        base_fingerprint: Hash of the frozen base as it computes.
        data_fingerprint: Hash of the training set's tokens and their order.
        rendering: A fixed conversation in the run's template.
        versions: Libraries that compute.
        place: Device, processor and threads: where they agree, a CPU repeats every bit.
        world_size: Ranks.
    """

    config: Mapping[str, Any]
    base_fingerprint: str
    data_fingerprint: str
    rendering: str
    versions: Mapping[str, str]
    place: str
    world_size: int


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run goes on from.

    Attributes:
        folder: Where it is.
        step: Optimizer steps done.
        state: Its trainer_state.json.
        continues: True if it lies in this run's own folder; False if this run branches off another one.
    """

    folder: Path
    step: int
    state: Mapping[str, Any]
    continues: bool


@dataclass(frozen=True)
class Run:
    """Everything the loop drives; built by launch/train.py.

    Attributes:
        adapter_writer: Copies the adapter now, and returns what writes the copy into a folder later.
        origin: Where the run goes on from; None starts afresh.
        benchmarks: Scores --eval_benchmarks over all ranks, telling the watchdog of its life; None without.
    """

    config: Config
    num_steps: int
    engine: Engine
    objective: Objective[Any]
    fitted: Fitted
    num_train_epochs: float | None
    probe: GradientProbe
    tracker: Tracker
    progress: Progress
    answer: Callable[[Sequence[str]], list[str]]
    adapter_writer: Callable[[], Callable[[Path], None]]
    identity: Identity
    origin: Origin | None
    stop: StopRequest
    watchdog: Watchdog
    reference: str = ""
    reference_answers: Sequence[str] = ()
    benchmarks: Callable[[Callable[[str], None]], dict[str, float]] | None = None
    check_start: StartCheck = nothing_to_check
    watch: Watch = nothing_to_say

    @property
    def plan(self) -> Plan:
        """Micro-batches and recomputation in force."""
        return self.fitted.plan

    @property
    def steps(self) -> Steps:
        """The training set as steps."""
        return self.fitted.steps

    @property
    def held_out(self) -> Iterable[Any] | None:
        """The held-out micro-batches."""
        return self.fitted.held_out
