"""The history of a chat with one or several speakers, and its editing. Knows neither models nor a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from anima.data.records import Message
from anima.errors import DataError


@dataclass
class Turn:
    """What was asked, and who answered what."""

    asked: str
    answers: dict[str, str] = field(default_factory=dict)


class Dialogue:
    """Turns that can be edited. A speaker that did not answer a turn goes on from the answer that was given."""

    def __init__(self, system: str | None = None) -> None:
        """An empty history under a system prompt."""
        self.system = system
        self.turns: list[Turn] = []

    def ask(self, text: str) -> None:
        """A new turn, to be answered."""
        self.turns.append(Turn(text))

    def messages(self, speaker: str) -> list[Message]:
        """What a speaker is to answer: the history as it lived it, up to the last question.

        Raises:
            DataError: there is nothing to answer.
        """
        if not self.turns:
            raise DataError("nothing was asked yet", where="chat")
        found = [] if self.system is None else [Message("system", self.system)]
        for turn in self.turns[:-1]:
            answers = list(turn.answers.values())
            if answers:  # a turn that was interrupted before its first word is left out
                found += [Message("user", turn.asked), Message("assistant", turn.answers.get(speaker, answers[0]))]
        return [*found, Message("user", self.turns[-1].asked)]

    def answered(self, speaker: str, text: str) -> None:
        """A speaker's answer to the last question; an empty one is none."""
        if text:
            self.turns[-1].answers[speaker] = text

    def undo(self) -> str:
        """Forget the last turn.

        Returns:
            What was asked in it.

        Raises:
            DataError: there is none.
        """
        if not self.turns:
            raise DataError("nothing was asked yet", where="chat")
        return self.turns.pop().asked

    def retry(self) -> None:
        """Forget the answers to the last question.

        Raises:
            DataError: there is no question.
        """
        self.edit(len(self.turns), None)

    def edit(self, number: int, text: str | None) -> None:
        """Change question `number` (from 1; None keeps its words) and forget all that followed from it.

        Raises:
            DataError: there is no such question.
        """
        if not self.turns:
            raise DataError("nothing was asked yet", where="chat")
        if not 1 <= number <= len(self.turns):
            raise DataError(
                "there is no such question", where="chat", got=number, allowed=f"1 to {len(self.turns)}", fix="/history"
            )
        asked = self.turns[number - 1].asked if text is None else text
        del self.turns[number - 1 :]
        self.ask(asked)

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns = []

    def lines(self, speakers: Sequence[str]) -> list[str]:
        """The history to read; answers carry their speaker's name."""
        found = [] if self.system is None else [f"system: {self.system}"]
        for number, turn in enumerate(self.turns, start=1):
            found.append(f"{number}. {turn.asked}")
            found += [f"   {name}: {turn.answers[name]}" for name in speakers if name in turn.answers]
        return found
