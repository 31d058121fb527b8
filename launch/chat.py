"""Talk to adapters, their base or a merged model in the terminal, in the template of the training.

python launch/chat.py --adapter runs/sft/adapter runs/dpo/adapter        # /switch base | sft | dpo, /all
python launch/chat.py --model_name_or_path runs/sft/merged --quantization none
echo "Why is the sky blue?" | python launch/chat.py --adapter runs/sft/adapter
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.checks import require
from anima.config.cli import parse_flags
from anima.config.paths import expanded
from anima.config.schema import ChatTemplate
from anima.entry import run_command
from anima.errors import ConfigError

if TYPE_CHECKING:
    from anima.inference.chat import Speakers

HISTORY = "~/.cache/anima/chat_history"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Talk to adapters, their base, or a merged model."""

    adapter: tuple[str, ...] = ()
    """Adapter folders (adapter/ of a run, or a checkpoint), also as NAME=FOLDER; one base is loaded for all."""
    model_name_or_path: str | None = None
    """The base, or a merged model; None for the base that the adapters were trained on."""
    quantization: Literal["auto", "nf4", "none"] = "auto"
    """Of a model without adapters: auto is none for a merged folder, else nf4. Adapters run as they were trained."""
    chat_template: ChatTemplate | None = None
    """Another template than the training's; refused beside an adapter unless --allow_mismatch True."""
    system: str | None = None
    """System prompt."""
    temperature: float = 0.0
    """0 for the most likely answer; above, answers are drawn."""
    top_p: float = 1.0
    """With a temperature: draw from the most likely tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were said become less likely; training knows no such thing."""
    seed: int | None = None
    """Of drawn answers."""
    max_new_tokens: int = 512
    """Longest answer, tokens."""
    prompt: str | None = None
    """Answer this one question and leave."""
    speaker: str | None = None
    """Who answers first: base, or an adapter's name; all for everyone. None for the last adapter."""
    allow_mismatch: bool = False
    """Go on with another base or template than those of the training."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "no temperature", "temperature", self.temperature, "0 or more")
        require(0 < self.top_p <= 1, "no share", "top_p", self.top_p, "above 0, up to 1")
        penalty, seed = self.repetition_penalty, self.seed
        require(penalty > 0, "no penalty", "repetition_penalty", penalty, "above 0; 1 for none")
        require(seed is None or 0 <= seed < 2**63, "no seed", "seed", seed, "0 to 2^63 - 1, or None")
        require(self.max_new_tokens >= 1, "an empty answer", "max_new_tokens", self.max_new_tokens, "1 or more")


def main(argv: Sequence[str]) -> None:
    """Answer one question (`--prompt` or a pipe), or talk."""
    options = parse_flags(ChatOptions, argv, prog="launch/chat.py")
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)  # before bitsandbytes is imported
    from anima.inference.generate import Sampling
    from anima.inference.talk import Talk, TalkSettings

    question = options.prompt if options.prompt is not None or sys.stdin.isatty() else sys.stdin.read()
    if question is not None and not question.strip():
        raise ConfigError("no question", where="--prompt or the pipe", fix='echo "Why is the sky blue?" | …')
    speakers = load(options)
    sampling = Sampling(options.temperature, options.top_p, options.repetition_penalty, options.seed)
    read = (lambda prompt: None) if question is not None else line_reader()
    talk = Talk(speakers, TalkSettings(options.max_new_tokens, sampling), read, show, system=options.system)
    if options.speaker is not None:
        talk.take("/all" if options.speaker == "all" else f"/switch {options.speaker}")
    if question is not None:
        talk.ask_once(question.strip())
    else:
        talk.run()


def load(options: ChatOptions) -> Speakers:
    """Everyone who speaks."""
    from anima.inference.chat import BASE, SpeakerSettings, load_speakers, named_adapters

    adapters = named_adapters(options.adapter)
    names = (BASE, *adapters)
    if options.speaker not in (None, "all", *names):
        raise ConfigError(
            "nobody is called so", where="--speaker", got=options.speaker, allowed=", ".join((*names, "all"))
        )
    return load_speakers(
        SpeakerSettings(
            adapters=adapters,
            model_name_or_path=options.model_name_or_path,
            device=options.device,
            quantization=options.quantization,
            chat_template=options.chat_template,
            allow_mismatch=options.allow_mismatch,
        )
    )


def show(text: str) -> None:
    """Print a piece of an answer at once; control characters of a model never reach the terminal."""
    from anima.tracking.terminal import printable

    print(printable(text), end="", flush=True)


def line_reader() -> Callable[[str], str | None]:
    """Lines with editing, wide characters and a history that outlives the chat."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    history = expanded(HISTORY)
    history.parent.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)))

    def read(prompt: str) -> str | None:
        while True:
            try:
                return session.prompt(prompt)
            except KeyboardInterrupt:  # Ctrl-C on a line throws the line away
                continue
            except EOFError:
                return None

    return read


if __name__ == "__main__":
    run_command(main)
