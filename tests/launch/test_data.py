"""launch/data.py as a user types it, in this process but once: verbs, flags, exit status, pages."""

import json
from pathlib import Path
from typing import Any

import pytest

from anima.errors import ConfigError, DataError
from launch import data

NEEDED = ["--model_name_or_path", "m", "--train_files", "f.jsonl"]
GOOD = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7919 % 1000}."} for n in range(8)]


@pytest.fixture
def flags(tmp_path: Path, tiny_llama_dir: Path) -> Any:
    def make(rows: list[dict[str, object]], *more: str) -> list[str]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = {"model_name_or_path": tiny_llama_dir, "train_files": file, "data_cache_dir": tmp_path / "cache"}
        return [*(word for name, value in named.items() for word in (f"--{name}", str(value))), *more]

    return make


def test_check_says_by_its_status_whether_training_would_start(flags: Any, capsys: Any) -> None:
    data.main(["check", *flags(GOOD)])
    assert "Training would start, on 8 of 8 rows." in capsys.readouterr().out
    bad = [*GOOD, {"prompt": "a", "completion": ""}]
    with pytest.raises(SystemExit) as left:
        data.main(["check", *flags(bad), "--json"])
    assert left.value.code == 2
    found = json.loads(capsys.readouterr().out)
    assert found["would_train"] is False
    assert "rows.jsonl:9" in found["refusal"]
    data.main(["check", *flags(bad), "--bad_rows", "drop", "--json"])
    assert json.loads(capsys.readouterr().out)["would_train"] is True


def test_show_writes_a_page(flags: Any, capsys: Any, tmp_path: Path) -> None:
    page = tmp_path / "rows.html"
    bad = [*GOOD, {"prompt": "a", "completion": ""}]
    data.main(["show", *flags(bad), "--rows", "2", "9", "--boundaries", "--html", str(page)])
    out = capsys.readouterr().out
    assert "rows.jsonl:2" in out
    assert "⟦I│t│ │i│s│" in out
    assert "left out, the answer is empty" in out
    assert page.read_text("utf-8").count("<article") == 2
    with pytest.raises(DataError, match="no such row"):
        data.main(["show", *flags(GOOD), "--rows", "9"])


def test_stats_takes_the_flags_of_training(flags: Any, capsys: Any, tmp_path: Path) -> None:
    page = tmp_path / "stats.html"
    data.main(["stats", *flags(GOOD), "--global_batch_size", "3", "--ranks", "2", "--html", str(page), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["steps_an_epoch"], found["ranks"], found["rows"]) == (3, 2, 8)
    assert page.exists()
    data.main(["stats", *flags([*GOOD, {"prompt": "a"}])])
    out = capsys.readouterr().out
    assert "training would stop: the row has no key completion" in out
    assert "rows by total tokens" in out


def test_the_objective_decides_what_a_row_is(flags: Any, capsys: Any) -> None:
    pairs = [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": "no"} for n in range(4)]
    with pytest.raises(SystemExit):
        data.main(["check", *flags(pairs)])
    assert "these are preferences: --objective dpo" in capsys.readouterr().out
    data.main(["check", *flags(pairs, "--objective", "dpo")])
    assert "Training would start, on 4 of 4 rows." in capsys.readouterr().out
    data.main(["show", *flags(pairs, "--objective", "dpo"), "--rows", "2"])
    out = capsys.readouterr().out
    assert "rows.jsonl:2 chosen" in out
    assert "rows.jsonl:2 rejected" in out
    data.main(["stats", *flags(pairs, "--objective", "dpo")])
    assert "4 pairs" in capsys.readouterr().out


def test_a_config_of_training_is_enough(flags: Any, capsys: Any, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    words = flags(GOOD)
    pairs = zip(words[::2], words[1::2], strict=True)
    config.write_text(
        "".join(f"{name.removeprefix('--')}: {value}\n" for name, value in pairs) + "output_dir: runs/x\n"
    )
    data.main(["check", "--config", str(config)])
    assert "8 of 8 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["first word", "check, show, stats"]),
        (["chekc"], ["did you mean check"]),
        (["--config", "x.yaml"], ["first word"]),
        (["check"], ["required options are missing", "--train_files"]),
        (["check", "--rowz", "1"], ["did you mean rows"]),
        (["stats", "--ranks", "0"], ["nobody would train"]),
        (["check", "--similarity", "80"], ["a similarity is a share"]),
        (["check", "--max_near_rows", "-1"], ["not negative"]),
        (["check", "--html", "x.html", *NEEDED], ["--html means nothing to check", "with show and stats"]),
        (["stats", "--rows", "7", *NEEDED], ["--rows means nothing to stats"]),
    ],
)
def test_mistakes(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        data.main(argv)
    assert all(word in str(caught.value) for word in words)


def test_as_a_program(launch: Any, flags: Any) -> None:
    done = launch(["check", *flags([*GOOD, {"prompt": "a"}])], script="launch/data.py")
    assert done.returncode == 2, done.stderr
    assert "Training would refuse this data" in done.stdout
    assert "Traceback" not in done.stderr


def test_half_a_character_is_named_and_shown(flags: Any, capsys: Any, tmp_path: Path) -> None:
    bad = [*GOOD, {"prompt": "a question of some length", "completion": "yes \ud83d no"}]
    with pytest.raises(SystemExit):
        data.main(["check", *flags(bad)])
    assert "the text holds half a character" in capsys.readouterr().out
    data.main(["show", *flags(bad), "--rows", "9", "--html", str(tmp_path / "rows.html")])
    shown = capsys.readouterr().out
    assert "yes \\ud83d no" in shown
    assert shown.encode()


def test_show_without_rows_takes_the_first_ones(flags: Any, capsys: Any) -> None:
    for rows, shown in ((GOOD, ["1", "2", "3"]), (GOOD[:2], ["1", "2"])):
        data.main(["show", *flags(rows)])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[0].rpartition(":")[2] for line in lines if "rows.jsonl:" in line] == shown
    with pytest.raises(ConfigError, match="no held-out files"):
        data.main(["show", *flags(GOOD), "--held_out"])
    words = flags(GOOD)
    Path(words[words.index("--train_files") + 1]).write_text("{broken\n")
    with pytest.raises(DataError, match="no such row") as caught:
        data.main(["show", *words])
    assert caught.value.got == "no row that can be read"


@pytest.mark.parametrize("verb", ["show", "stats"])
def test_a_page_that_cannot_be_written(verb: str, flags: Any, tmp_path: Path) -> None:
    page = tmp_path / "pages"
    page.mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        data.main([verb, *flags(GOOD), "--html", str(page)])
    assert {item.name for item in tmp_path.iterdir()} <= {"pages", "rows.jsonl", "cache"}
