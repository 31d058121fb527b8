"""The check as a whole: refusals are training's own, and what a person should see is seen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anima.config.schema import DataConfig
from anima.data.kinds import CONVERSATIONS, PAIRS
from anima.data.prepare import prepare_records
from anima.data.templates import make_template
from anima.errors import DataError
from anima.inspection import check as module
from anima.inspection.check import CheckOptions, check
from anima.inspection.findings import CheckReport

GOOD = [{"prompt": f"What is {n} and {n * n}?", "completion": f"Number {n * 37 % 101} it is."} for n in range(12)]


@pytest.fixture
def run(tmp_path: Path, byte_tokenizer: Any) -> Callable[..., CheckReport]:
    def call(
        *files: str, similarity: float = 0.8, near: int = 1000, kind: Any = CONVERSATIONS, **options: Any
    ) -> CheckReport:
        config = DataConfig(train_files=files, data_cache_dir=str(tmp_path / "cache"), data_workers=1, **options)
        tokenizer = byte_tokenizer()
        template = make_template(config.chat_template, tokenizer)
        report = check(
            kind, config, tokenizer, template, seed=5, options=CheckOptions(similarity=similarity, max_near_rows=near)
        )
        assert report.refusal == _refusal(kind, config, tokenizer)
        return report

    return call


def _refusal(kind: Any, config: DataConfig, tokenizer: Any) -> str | None:
    """What training itself says."""
    try:
        prepare_records(kind, config, tokenizer, seed=5)
    except DataError as error:
        return str(error)
    return None


def _places(report: CheckReport) -> dict[str, list[str]]:
    return {
        finding.name: [" ".join(word.rpartition("/")[2] for word in place.split()) for place in finding.places]
        for finding in report.findings
    }


def test_clean_rows(run: Any, write_rows: Any) -> None:
    report = run(write_rows(GOOD), similarity=0.95)
    assert (report.rows, report.kept, report.findings, report.dropped) == (12, 12, [], {})
    assert "Nothing odd was found in the texts." in report.lines()
    assert report.lines()[-1] == "Training would start, on 12 of 12 rows."


def test_bad_rows_are_all_named_whatever_the_policy(run: Any, write_rows: Any) -> None:
    file = write_rows([GOOD[0], {"prompt": "a", "completion": ""}, GOOD[1], {"prompt": "b"}, *GOOD[2:]])
    for policy in ("error", "drop"):
        report = run(file, bad_rows=policy)
        assert (report.refusal is None) == (policy == "drop")
        assert report.dropped == {
            "bad row: the answer is empty (completion)": {"rows": 1, "first": [f"{file}:2"]},
            "bad row: the row has no key completion": {"rows": 1, "first": [f"{file}:4"]},
        }
        assert (report.rows, report.kept) == (14, 12)


def test_long_rows(run: Any, write_rows: Any) -> None:
    file = write_rows([*GOOD, {"prompt": "x" * 2000, "completion": "y"}])
    assert run(file).dropped == {"longer than max_seq_length": {"rows": 1, "first": [f"{file}:13"]}}
    refused = run(file, truncation="error")
    assert "row is too long" in str(refused.refusal)
    assert "longer than max_seq_length" in refused.dropped
    trimmed = run(file, truncation="trim_prompt")
    assert trimmed.dropped == {"trimmed to the limits": {"rows": 1, "first": [f"{file}:13"]}}


def test_duplicates(run: Any, write_rows: Any) -> None:
    again = {"prompt": GOOD[3]["prompt"].upper(), "completion": GOOD[3]["completion"] + "\n"}
    long = {"prompt": "Tell me about the old bridge over the river. " * 3, "completion": "It is made of stone." * 5}
    near = {**long, "completion": long["completion"] + " And wood."}
    file = write_rows([*GOOD, again, long, near])
    places = _places(run(file))
    assert places[module.DUPLICATE] == ["rows.jsonl:13 = rows.jsonl:4"]
    assert places[module.NEAR][-1].startswith("rows.jsonl:15 ~ rows.jsonl:14 (0.")
    assert module.NEAR not in _places(run(file, similarity=0.0))
    assert "first 14 rows only" in run(file, near=14).notes[-1]


def test_leakage_between_files(run: Any, write_rows: Any) -> None:
    long = {"prompt": "Tell me about the old bridge over the river. " * 3, "completion": "It is made of stone." * 5}
    train = write_rows([*GOOD, long], "train.jsonl")
    held_out = [
        {"prompt": "New?", "completion": "Yes."},
        GOOD[2],
        {"prompt": GOOD[5]["prompt"], "completion": "another answer"},
        {**long, "prompt": long["prompt"] + "?"},
    ]
    places = _places(run(train, eval_files=(write_rows(held_out, "eval.jsonl"),)))
    assert places[module.LEAK] == ["eval.jsonl:2 = train.jsonl:3"]
    assert places[module.LEAKED_PROMPT] == ["eval.jsonl:3 = train.jsonl:6"]
    assert places[module.NEAR_LEAK][0].startswith("eval.jsonl:4 ~ train.jsonl:13")


def test_leakage_of_the_split(run: Any, write_rows: Any) -> None:
    file = write_rows(GOOD + GOOD)
    report = run(file, eval_size=12, similarity=0.0)
    counts = {finding.name: finding.rows for finding in report.findings}
    assert counts[module.LEAK] + counts.get(module.DUPLICATE, 0) == 12
    assert counts[module.LEAK] > 3
    assert module.LEAK not in {finding.name for finding in run(file, similarity=0.0).findings}


def test_texts_that_look_damaged(run: Any, write_rows: Any) -> None:
    rows = [
        {"prompt": "### Instruction:\nAdd", "completion": "3"},
        {"prompt": "cafÃ©", "completion": "a </s> b"},
        {"prompt": "bell \x07", "completion": "x\ufffd"},
        {"prompt": "pаypal", "completion": "```\nnever closed"},
    ]
    places = _places(run(write_rows(rows)))
    assert places == {
        "template artefacts": ["rows.jsonl:1 '### Instruction:'", "rows.jsonl:2 s>'"],
        "mojibake": ["rows.jsonl:2 'Ã©' for 'é'"],
        "special tokens of the tokenizer": ["rows.jsonl:2 s>"],
        "control characters": ["rows.jsonl:3 U+0007"],
        "replacement characters": ["rows.jsonl:3 'x\ufffd'"],
        "mixed scripts in a word": ["rows.jsonl:4 'pаypal'"],
        "answers that seem cut off": ["rows.jsonl:4 '```\\nnever closed'"],
    }


def test_rows_that_are_no_conversations_are_still_looked_at(run: Any, write_rows: Any) -> None:
    preferences = [{"prompt": f"Q{n}", "chosen": "a long answer", "rejected": "no"} for n in range(9)]
    report = run(write_rows([*preferences, {"prompt": "Q", "chosen": "A", "rejected": "A"}]))
    assert "fits no known format" in str(report.refusal)
    assert _places(report) == {"chosen equal to rejected": ["rows.jsonl:10"]}
    assert "Whoever only prefers length is right in 95%" in "\n".join(report.lines())
    other = run(write_rows([{"question": "caf\ufffd", "answer": "B"}]))
    assert _places(other) == {"replacement characters": ["rows.jsonl:1 'caf\ufffd'"]}


def test_pairs_of_a_preference_run(run: Any, write_rows: Any) -> None:
    """The same rows with --objective dpo: what its data stage drops, and what a person should know."""
    pairs = [{"prompt": f"Question {n * 7919}?", "chosen": f"good answer {n}", "rejected": "no"} for n in range(6)]
    odd = [
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "caf\ufffd", "rejected": "B"},
        {"prompt": "Q", "chosen": "", "rejected": "B"},
    ]
    file = write_rows([*pairs, *odd])
    report = run(file, kind=PAIRS, bad_rows="drop", similarity=0.95)
    assert report.refusal is None
    assert (report.rows, report.kept) == (9, 7)
    assert {reason: tally["first"] for reason, tally in report.dropped.items()} == {
        "chosen and rejected are the same": [f"{file}:7"],
        "bad row: the answer is empty (chosen)": [f"{file}:9"],
    }
    assert _places(report) == {
        "chosen equal to rejected": ["rows.jsonl:7"],
        "an empty answer": ["rows.jsonl:9"],
        "replacement characters": ["rows.jsonl:8 'caf\ufffd'"],
    }
    assert any("chosen is longer in 78%" in note for note in report.notes)
    refused = run(file, kind=PAIRS)
    assert "the answer is empty (chosen)" in str(refused.refusal)


def test_messages_where_pairs_were_expected_are_not_all_the_same(run: Any, write_rows: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in (1, 2, 3, 1)]
    path = write_rows(rows)
    report = run(path, kind=PAIRS)
    assert "fits no known format" in str(report.refusal)
    assert _places(report)[module.DUPLICATE] == ["rows.jsonl:4 = rows.jsonl:1"]


def test_files_that_cannot_be_read(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'[{"prompt": "a", "completion": "b"}, {"prompt"')
    report = run(str(file))
    assert "wrong JSON" in str(report.refusal)
    assert report.lines()[-4].startswith("  wrong JSON") or any("wrong JSON" in line for line in report.lines())


def test_json_says_the_same(run: Any, write_rows: Any) -> None:
    file = write_rows([*GOOD, GOOD[0], {"prompt": "b"}])
    found = json.loads(json.dumps(run(file).to_json()))
    assert (found["would_train"], found["rows"], found["kept"]) == (False, 14, 13)
    assert found["dropped_or_changed"]["bad row: the row has no key completion"]["rows"] == 1
    (duplicates,) = [f for f in found["findings"] if f["name"] == module.DUPLICATE]
    assert (duplicates["rows"], duplicates["places"]) == (1, [f"{file}:13 = {file}:1"])


def test_real_sets_show_their_known_faults(run: Any, shared_data_dir: Path) -> None:
    # Counted once by hand with grep: two letters of UTF-8 read as Latin-1, and U+FFFD, stand in these files.
    for name, finding in (("mmlu_zero_shot_val.jsonl", "mojibake"), ("dpo_zh_demo.json", "replacement characters")):
        report = run(str(shared_data_dir / name), similarity=0.0, bad_rows="drop")
        assert finding in {found.name for found in report.findings}
