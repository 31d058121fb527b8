"""Talk to an adapter in the terminal, in the template it was trained with.

python launch/chat.py --adapter runs/quickstart/adapter
echo "Why is the sky blue?" | python launch/chat.py --adapter runs/quickstart/adapter
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.cli import parse_flags
from anima.entry import run_command

HELP = "An empty line or /quit ends, /clear forgets the conversation."


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Talk to an adapter."""

    adapter: str
    """Folder of the adapter: adapter/ of a run, or one of its checkpoints."""
    model_name_or_path: str | None = None
    """Folder or hub name of the base; None for the one it was trained on."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute."""
    max_new_tokens: int = 256
    """Longest answer, tokens."""
    prompt: str | None = None
    """Answer this one question and leave."""


def main(argv: Sequence[str]) -> None:
    """Answer one question (`--prompt` or a pipe), or talk until an empty line."""
    options = parse_flags(ChatOptions, argv, prog="launch/chat.py")
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)  # before bitsandbytes is imported
    from anima.data.records import Message
    from anima.inference.chat import load_answerer

    answerer = load_answerer(options.adapter, device=options.device, model_name_or_path=options.model_name_or_path)
    question = options.prompt if options.prompt is not None or sys.stdin.isatty() else sys.stdin.read()
    if question is not None:
        answerer.stream([Message("user", question.strip())], max_new_tokens=options.max_new_tokens)
        return
    print(HELP)
    messages: list[Message] = []
    while (text := input("\n> ").strip()) not in ("", "/quit"):
        if text == "/clear":
            messages = []
            continue
        messages.append(Message("user", text))
        messages.append(Message("assistant", answerer.stream(messages, max_new_tokens=options.max_new_tokens)))


if __name__ == "__main__":
    run_command(main)
