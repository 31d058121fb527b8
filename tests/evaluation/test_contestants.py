"""Who takes part, from flags and from the folders of runs."""

import json
from pathlib import Path

import pytest

from anima.errors import ConfigError, DataError, ModelError
from anima.evaluation.contestants import Contestant, contestants_of_runs, parse_contestants, with_prefixes
from anima.inference.adapter_folder import AdapterRecord, write_record


def make_run(folder: Path, objective: str, base: str = "models/base", quantization: str = "nf4") -> str:
    (folder / "adapter").mkdir(parents=True)
    write_record(folder / "adapter", AdapterRecord(base, "f00d", quantization, "model", "…", objective))
    return str(folder)


def test_spellings() -> None:
    found = parse_contestants(["a=runs/a=b", "base:b=models/b", "file:c-1.x=c.jsonl"], "none")
    assert [(c.name, c.kind, c.path) for c in found] == [
        ("a", "adapter", "runs/a=b"),
        ("b", "base", "models/b"),
        ("c-1.x", "file", "c.jsonl"),
    ]
    assert found[1].quantization == "none"
    for wrong in ("a", "a=", "=x", "model:a=x", "a/b=x", "../a=x", "base:=x"):
        with pytest.raises(ConfigError, match="no contestant"):
            parse_contestants([wrong], "none")


def test_prefixes_and_names() -> None:
    contestants = [Contestant("a", "base", "x"), Contestant("b", "file", "y")]
    assert [c.prefix for c in with_prefixes(contestants, ["a=Be brief = good. "])] == ["Be brief = good. ", ""]
    for wrong in ("c=x", "a", "b=x"):
        with pytest.raises(ConfigError, match="belongs to no contestant"):
            with_prefixes(contestants, [wrong])
    with pytest.raises(ConfigError, match="one name"):
        with_prefixes([*contestants, Contestant("a", "file", "z")], [])


def test_base_sft_dpo_and_the_previous_best_are_found(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one", "sft"), make_run(tmp_path / "two", "dpo")]
    earlier = tmp_path / "arena"
    earlier.mkdir()
    contestants = [
        {"name": "gpt", "kind": "file", "path": "gpt.jsonl"},
        {"name": "old", "kind": "adapter", "path": "runs/old/adapter"},
        {"name": "older", "kind": "adapter", "path": "runs/older/adapter"},
    ]
    ratings = {"gpt": 1200.0, "old": 1100.0, "older": 900.0}
    (earlier / "ratings.json").write_text(json.dumps({"ratings": ratings, "contestants": contestants}))
    found = contestants_of_runs(runs, str(earlier))
    assert [(c.name, c.kind, c.path) for c in found] == [
        ("base", "base", "models/base"),
        ("sft", "adapter", f"{runs[0]}/adapter"),
        ("dpo", "adapter", f"{runs[1]}/adapter"),
        ("previous-best", "adapter", "runs/old/adapter"),
    ]


def test_two_runs_of_one_kind_and_two_bases(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one", "sft"), make_run(tmp_path / "two", "sft", quantization="none")]
    assert [(c.name, c.quantization) for c in contestants_of_runs(runs, None)][:2] == [
        ("base", "nf4"),
        ("base-2", "none"),
    ]
    assert [c.name for c in contestants_of_runs(runs, None)][2:] == ["sft-one", "sft-two"]


def test_what_is_no_run_and_no_earlier_arena(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        contestants_of_runs([str(tmp_path)], None)
    with pytest.raises(DataError, match="no ratings"):
        contestants_of_runs([], str(tmp_path))
    (tmp_path / "ratings.json").write_text('{"ratings": {"a": 1}, "contestants": []}')
    with pytest.raises(DataError, match="no adapter"):
        contestants_of_runs([], str(tmp_path))
