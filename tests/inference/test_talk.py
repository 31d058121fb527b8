"""The chat's commands and history, with speakers that only echo."""

from collections.abc import Callable, Sequence

from anima.data.records import Message
from anima.inference.generate import Sampling
from anima.inference.talk import Talk, TalkSettings


class Echo:
    """Answers with its name and all that it was told."""

    names = ("base", "sft", "dpo")

    def stream(
        self,
        name: str,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        write: Callable[[str], None],
        sampling: Sampling,
    ) -> str:
        text = f"{name}<" + "|".join(f"{message.role[0]}:{message.content}" for message in messages) + ">"
        write(text)
        return text


def said(*lines: str, system: str | None = None) -> str:
    """What a chat prints for these lines."""
    waiting, out = list(lines), []
    talk = Talk(Echo(), TalkSettings(), lambda prompt: waiting.pop(0) if waiting else None, out.append, system=system)
    talk.run()
    return "".join(out)


def test_the_newest_adapter_answers_and_the_history_grows() -> None:
    text = said("one", "two")
    assert "talking to dpo" in text
    assert text.splitlines()[-2:] == ["[dpo] dpo<u:one>", "[dpo] dpo<u:one|a:dpo<u:one>|u:two>"]


def test_switching_keeps_each_speakers_own_answers() -> None:
    text = said("/all", "one", "/switch base", "two", "/switch sft", "three")
    lines = text.splitlines()
    assert lines[1:4] == ["[base] base<u:one>", "[sft] sft<u:one>", "[dpo] dpo<u:one>"]
    assert lines[4] == "[base] base<u:one|a:base<u:one>|u:two>"
    # sft did not answer "two": it goes on from the answer that was given.
    assert lines[5].startswith("[sft] sft<u:one|a:sft<u:one>|u:two|a:base<u:one|a:base<u:one>|u:two>|u:three>")


def test_again_asks_those_who_have_not_answered() -> None:
    assert said("one", "/again").splitlines()[1:] == ["[dpo] dpo<u:one>", "[base] base<u:one>", "[sft] sft<u:one>"]


def test_commands_say_what_they_did_and_why_they_could_not() -> None:
    assert said("one", "two", "/undo", "/history").splitlines()[3:] == [
        "forgotten: two",
        "1. one",
        "   dpo: dpo<u:one>",
    ]
    for empty in ("/undo", "/retry", "/again", "/edit 1 x"):
        lines = said(empty).splitlines()[1:]
        assert "nothing was asked yet" in lines[0]
        assert "1 to 0" not in "".join(lines)
    assert "no other speaker" in said("/all", "one", "/again").splitlines()[-1]


def test_the_history_can_be_edited_undone_retried_and_cleared() -> None:
    text = said("one", "two", "/edit 1 eins", "/undo", "three")
    assert text.splitlines()[-3:] == ["[dpo] dpo<u:eins>", "forgotten: eins", "[dpo] dpo<u:three>"]
    assert said("one", "two", "/retry").splitlines()[-1] == "[dpo] dpo<u:one|a:dpo<u:one>|u:two>"
    assert said("one", "/clear", "two").splitlines()[-1] == "[dpo] dpo<u:two>"
    history = said("one", "/system Be kind.", "two", "/history").splitlines()
    assert history[-5:] == [
        "system: Be kind.",
        "1. one",
        "   dpo: dpo<u:one>",
        "2. two",
        "   dpo: dpo<s:Be kind.|u:one|a:dpo<u:one>|u:two>",
    ]


def test_the_system_prompt_comes_first_and_can_be_taken_away() -> None:
    assert said("one", "/system", "two", system="S").splitlines()[1:] == [
        "[dpo] dpo<s:S|u:one>",
        "[dpo] dpo<u:one|a:dpo<s:S|u:one>|u:two>",
    ]


def test_lines_go_on_behind_a_backslash() -> None:
    assert said("one\\", "two").endswith("[dpo] dpo<u:one\ntwo>\n")


def test_mistakes_are_said_and_the_chat_goes_on() -> None:
    text = said("/swich base", "/switch bse", "/edit x", "one", "/edit 3 y", "/retry", "/help", "/quit", "never")
    for part in ("did you mean /switch?", "did you mean base?", "/edit N TEXT", "no such question", "/history  "):
        assert part in text
    assert "never" not in text
    assert said().count("\n") == 1
