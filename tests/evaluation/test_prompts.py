"""Judge prompts: ours, and the published files by path."""

import json
from pathlib import Path
from typing import Any

import pytest

from anima.errors import ConfigError, DataError
from anima.evaluation.prompts import BUILT_IN, load_prompts, prompt_for


@pytest.mark.parametrize("name", BUILT_IN)
def test_ours_hold_everything_and_ask_for_what_is_read(name: str) -> None:
    prompts = load_prompts(name)
    for prompt in prompts.values():
        text = prompt.render("Why {answer_1}?", "Because {question}.", "So {prompt}.")
        # what contestants write is never taken for a place to fill
        assert all(part in text for part in ("Why {answer_1}?", "Because {question}.", "So {prompt}."))
        assert text.count(prompt.instruction) == 1
        assert ("number: 1 if" in text) == (prompt.style == "choice")
    assert set(prompts) == ({"general"} if name == "threeclass" else {"general", "coding", "math"})


def test_who_calculates_is_not_asked_for_a_number_first() -> None:
    assert "Begin with one line" in load_prompts("scores")["general"].instruction
    assert "End with one line" in load_prompts("scores")["math"].instruction


def test_categories() -> None:
    prompts = load_prompts("scores")
    assert prompt_for(prompts, "math") is prompts["math"]
    assert prompt_for(prompts, "Coding") is prompts["coding"]
    assert prompt_for(prompts, "fermi") is prompts["general"]


@pytest.mark.parametrize(
    ("name", "style", "categories"),
    [
        ("judge_vicuna_prompt_relative.jsonl", "scores", {"general", "coding", "math"}),
        ("judge_vicuna_prompt_threeclass.jsonl", "choice", {"general", "coding", "math"}),
        ("judge_oa_prompt_threeclass.jsonl", "choice", {"general"}),
    ],
)
def test_published_files(shared_data_dir: Path, name: str, style: str, categories: set[str]) -> None:
    path = shared_data_dir / name
    prompts = load_prompts(str(path))
    assert set(prompts) == categories
    assert {prompt.style for prompt in prompts.values()} == {style}
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    by_format = row["prompt_template"].format(question="q", answer_1="a", answer_2="b", **row["defaults"])
    assert prompts["general"].render("q", "a", "b") == by_format
    assert prompts["general"].system == row["system_prompt"]


def test_what_cannot_be_used(tmp_path: Path) -> None:
    good: dict[str, Any] = {
        "system_prompt": "s",
        "prompt_template": "{question}{answer_1}{answer_2}{prompt}",
        "defaults": {"prompt": "p"},
        "category": "math",
    }
    path = tmp_path / "prompts.jsonl"

    def load(*rows: dict[str, Any]) -> Any:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_prompts(str(path))

    assert set(load(good)) == {"general"}  # a single prompt serves all
    assert load(good | {"verdict": "choice"})["general"].style == "choice"
    for rows, words in (
        ((good | {"prompt_template": "{question}{prompt}"},), "leaves something out"),
        ((good | {"defaults": {}},), "defaults.prompt"),
        ((good | {"verdict": "stars"},), "unknown kind"),
        ((good, good), "two prompts"),
        ((good, good | {"category": "coding"}), "no prompt for general"),
    ):
        with pytest.raises(DataError, match=words):
            load(*rows)
    with pytest.raises(ConfigError, match="no such judge prompts"):
        load_prompts("threeclas")
