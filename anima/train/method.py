"""What an objective brings along beside its loss: the kind of its records, what must be known before the engine is
built, what is checked before the first step and said after an evaluation. `choice.py` says which there are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from anima.config.schema import Config
from anima.data.dataset import TokenizedDataset
from anima.data.kinds import CONVERSATIONS, RecordKind
from anima.data.loader import Examples
from anima.data.prepare import PreparedData
from anima.distributed import Ranks
from anima.model.compute import Compute
from anima.model.packed import PackedModel
from anima.objectives.objective import Objective
from anima.objectives.sft import SupervisedFineTuning
from anima.train.engine import Engine

StartCheck = Callable[[Engine, Sequence[Any]], dict[str, float]]
"""(engine, first micro-batches) -> metrics of the untrained policy."""
Watch = Callable[[int, Mapping[str, float]], list[str]]
"""(step, held-out metrics) -> what a person should be told about them."""


@dataclass(frozen=True)
class Place:
    """Where a run happens, before its engine is built.

    Attributes:
        config: All options.
        ranks: This process among the others.
        compute: Device and number format.
        network: Base and adapter.
        answer: Answers of the model, as it is, to questions; for the main rank.
        tell: Prints a line on the main rank.
    """

    config: Config
    ranks: Ranks
    compute: Compute
    network: PackedModel
    answer: Callable[[Sequence[str]], list[str]]
    tell: Callable[[str], None]


def nothing_to_check(engine: Engine, micro_batches: Sequence[Any]) -> dict[str, float]:
    """For objectives that know nothing about the untrained policy."""
    return {}


def nothing_to_say(step: int, metrics: Mapping[str, float]) -> list[str]:
    """For objectives whose metrics need no interpreter."""
    return []


@dataclass(frozen=True)
class Setup:
    """An objective ready to run.

    Attributes:
        objective: The loss.
        train: Training set.
        held_out: Held-out set, or None.
        reference: Identity of the model that the policy is compared with; empty without one.
        reference_answers: Its answers to the sample prompts, on the main rank.
        check_start: Given the engine and the first step's micro-batches, metrics of the untrained policy; raises a
            TrainingError where they show that something is wrong. A collective.
        watch: What to say after an evaluation.
    """

    objective: Objective[Any]
    train: Examples[Any]
    held_out: Examples[Any] | None
    reference: str = ""
    reference_answers: tuple[str, ...] = ()
    check_start: StartCheck = nothing_to_check
    watch: Watch = nothing_to_say


class Method(Protocol):
    """One way to train; made before anything heavy, so that its constructor finds mistakes early."""

    @property
    def records(self) -> RecordKind[Any]:
        """What a row of the data is."""
        ...

    def set_up(self, data: PreparedData[Any], place: Place) -> Setup:
        """Compute what the objective needs. A collective, before the engine is built."""
        ...


class Supervised:
    """Supervised fine-tuning needs nothing."""

    records: RecordKind[TokenizedDataset] = CONVERSATIONS

    def set_up(self, data: PreparedData[TokenizedDataset], place: Place) -> Setup:
        """The sets as they are."""
        return Setup(SupervisedFineTuning(), data.train, data.eval)
