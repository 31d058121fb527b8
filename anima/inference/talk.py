"""A chat line by line: commands, the active speaker or all of them in turn. Lines come and go through callables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from anima.config.spelling import nearest
from anima.data.records import Message
from anima.errors import AnimaError, DataError
from anima.inference.dialogue import Dialogue
from anima.inference.generate import GREEDY, Sampling

HELP = """\
/switch NAME     go on with another speaker; its past answers stay its own
/all             every speaker answers, one below the other; /switch NAME ends that
/again           the other speakers answer the last question too
/system TEXT     set the system prompt; without TEXT take it away
/history         what was said
/edit N TEXT     ask question N in other words and go on from there
/retry           another answer to the last question
/undo            forget the last question and its answers
/clear           forget everything
/quit            leave (also Ctrl-D); Ctrl-C ends an answer
A line that ends in \\ goes on in the next one."""


class Voices(Protocol):
    """The part of `Speakers` that a chat needs."""

    @property
    def names(self) -> tuple[str, ...]:
        """The base first."""
        ...

    def stream(
        self,
        name: str,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        write: Callable[[str], None],
        sampling: Sampling,
    ) -> str:
        """An answer, handed on as it comes."""
        ...


@dataclass(frozen=True)
class TalkSettings:
    """How answers are made."""

    max_new_tokens: int = 512
    sampling: Sampling = GREEDY


class Talk:
    """A chat. `read` gives the next line or None at the end; `write` takes text as it comes."""

    def __init__(
        self,
        voices: Voices,
        settings: TalkSettings,
        read: Callable[[str], str | None],
        write: Callable[[str], None],
        *,
        system: str | None = None,
    ) -> None:
        """Begin with the last speaker: the newest adapter, or the base where there is none."""
        self._voices = voices
        self._settings = settings
        self._read = read
        self._write = write
        self.active: tuple[str, ...] = (voices.names[-1],)
        self.dialogue = Dialogue(system)

    def run(self) -> None:
        """Until /quit or the end of the lines."""
        self._write(f"{', '.join(self._voices.names)}; talking to {self.active[0]}. /help lists what can be typed.\n")
        while (line := self._line()) is not None:
            if line in ("/quit", "/exit"):
                return
            try:
                self.take(line)
            except AnimaError as error:
                self._write(f"{error}\n")

    def ask_once(self, question: str) -> None:
        """Answer one question of a pipe; the speakers' names are said only where several answer.

        Raises:
            AnimaError: a template that refuses the messages.
        """
        self.dialogue.ask(question)
        self._answer(self.active, label=len(self.active) > 1)

    def take(self, line: str) -> None:
        """One line: a command, or something to answer.

        Raises:
            AnimaError: a command that cannot be done, or a template that refuses the messages.
        """
        if not line:
            return
        if not line.startswith("/"):
            self.dialogue.ask(line)
            self._answer(self.active)
            return
        command, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._write(f"{HELP}\n"),
            "switch": self._switch,
            "all": lambda _: self._everyone(),
            "again": lambda _: self._again(),
            "system": self._system,
            "history": lambda _: self._write("\n".join([*self.dialogue.lines(self._voices.names), ""])),
            "edit": self._edit,
            "retry": lambda _: self._repeat(),
            "undo": lambda _: self._write(f"forgotten: {self.dialogue.undo()}\n"),
            "clear": lambda _: self.dialogue.clear(),
        }
        if command not in commands:
            guess = nearest(command, commands)
            self._write(f"there is no /{command}{f'; did you mean /{guess}?' if guess else ''} (/help)\n")
            return
        commands[command](rest.strip())

    def _line(self) -> str | None:
        name = "all" if len(self.active) > 1 else self.active[0]
        line = self._read(f"\n{name}> ")
        while line is not None and line.endswith("\\"):
            more = self._read("... ")
            line = f"{line[:-1]}\n{more}" if more is not None else line[:-1]
        return None if line is None else line.strip()

    def _answer(self, names: tuple[str, ...], *, label: bool | None = None) -> None:
        for name in names:
            messages = self.dialogue.messages(name)
            if len(self._voices.names) > 1 if label is None else label:
                self._write(f"[{name}] ")
            text = self._voices.stream(
                name,
                messages,
                max_new_tokens=self._settings.max_new_tokens,
                write=self._write,
                sampling=self._settings.sampling,
            )
            self._write("\n")
            self.dialogue.answered(name, text)

    def _switch(self, name: str) -> None:
        if name not in self._voices.names:
            guess = nearest(name, self._voices.names)
            raise DataError(
                f"nobody is called {name!r}" + (f"; did you mean {guess}?" if guess else ""),
                where="/switch",
                allowed=", ".join(self._voices.names),
            )
        self.active = (name,)

    def _everyone(self) -> None:
        self.active = self._voices.names

    def _system(self, text: str) -> None:
        self.dialogue.system = text or None

    def _edit(self, rest: str) -> None:
        number, _, text = rest.partition(" ")
        if not number.isdecimal() or not text.strip():
            self._write("/edit N TEXT, such as /edit 1 What is rain?\n")
            return
        self.dialogue.edit(int(number), text.strip())
        self._answer(self.active)

    def _again(self) -> None:
        others = tuple(name for name in self._voices.names if name not in self.active)
        if not others:
            self._write("there is no other speaker; /retry asks again\n")
        self._answer(others)

    def _repeat(self) -> None:
        self.dialogue.retry()
        self._answer(self.active)
