"""launch/arena.py as its users type it: a whole tournament with a judge whose strengths are known, and kill -9."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from evaluation.scripted_judge import ScriptedJudge

import launch.arena as arena_script
from anima.errors import AnimaError, ConfigError, DataError, ModelError

REPOSITORY = Path(__file__).resolve().parents[2]
STRENGTHS = {"alpha": 1150.0, "beta": 1050.0, "gamma": 950.0, "delta": 850.0}
CATEGORIES = ("generic", "coding", "math")


@pytest.fixture
def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An arena in which four contestants of known strength have answered 60 questions."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANIMA_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    questions = [{"question_id": n, "text": f"Question {n}?", "category": CATEGORIES[n % 3]} for n in range(60)]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    draw = random.Random(0)
    for name in STRENGTHS:
        rows = [{"question_id": n, "answer": f"{name}: {'word ' * draw.randint(1, 60)}"} for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    contestants = [f"file:{name}={tmp_path / name}.jsonl" for name in STRENGTHS]
    run(
        "answers",
        "--arena",
        tmp_path / "arena",
        "--questions",
        tmp_path / "questions.json",
        "--contestants",
        *contestants,
    )
    return tmp_path / "arena"


def run(*argv: object) -> None:
    arena_script.main([str(part) for part in argv])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_known_strengths_come_out_within_their_intervals(answered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedJudge(STRENGTHS, first_bonus=80, unparsable_share=0.03) as server:
        judge = ("judge", "--arena", answered, "--judge_model", "scripted", "--base_url", server.base_url)
        run(*judge, "--dry_run")
        assert server.requests == []
        run(*judge, "--concurrency", "4", "--price_input", "2", "--price_output", "10")
        asked = len(server.requests)
        run(*judge)
        assert len(server.requests) == asked == 2 * 6 * 60
    run("rate", "--arena", answered, "--num_orderings", "200", "--num_bootstrap", "300")
    run("report", "--arena", answered)
    document = json.loads((answered / "ratings.json").read_text())
    assert sorted(STRENGTHS, key=lambda name: -document["ratings"][name]) == list(STRENGTHS)
    for name, truth in STRENGTHS.items():
        low, high = document["intervals"][name]
        assert low < truth < high, name
        assert high - low < 150
    assert document["position_controlled"]["effect"] == pytest.approx(80, abs=35)
    assert 5 < document["num_unparsable"] < 45
    assert document["num_verdicts"] == 720
    assert document["num_matches"] % 2 == 0  # both orders of every battle that counts, and only these
    assert document["resampled_by"] == "question"
    page = (answered / "report.html").read_text(encoding="utf-8")
    assert page.count("scripted") > 100
    said = capsys.readouterr().out
    assert "720 calls" in said
    assert f"{document['num_unparsable']} unparsable (kept, never scored)" in said
    assert f"{720 * 100:,} tokens in, {720 * 10:,} out: {720 * (100 * 2 + 10 * 10) / 1e6:.2f}" in said
    # what was rated is itself a match file, and gives the same ratings
    run("rate", "--matches", answered / "matches.jsonl", "--method", "bradley_terry", "--json", answered / "again.json",
        "--num_bootstrap", "2")  # fmt: skip
    again = json.loads((answered / "again.json").read_text())
    assert again["ratings"] == pytest.approx(document["ratings"], abs=0.1)


def test_adaptive_judging_costs_less_and_tells_neighbours_apart(answered: Path) -> None:
    with ScriptedJudge({"alpha": 1400.0, "beta": 1200.0, "gamma": 1000.0, "delta": 950.0}) as server:
        run("judge", "--arena", answered, "--judge_model", "m", "--base_url", server.base_url, "--schedule", "adaptive",
            "--battles_per_pair", "10", "--judge_prompts", "threeclass")  # fmt: skip
        assert 2 * 6 * 10 <= len(server.requests) < 2 * 6 * 60
    pairs = [tuple(sorted((row["first"], row["second"]))) for row in lines(answered / "verdicts.jsonl")]
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert counts["delta", "gamma"] > counts["alpha", "beta"]


def test_kill_9_loses_nothing(answered: Path) -> None:
    """Every stored verdict counts: only the calls that were under way, one a thread, are asked again."""
    threads, wanted = 4, 2 * 6 * 25
    with ScriptedJudge(STRENGTHS, seconds=0.01) as server:
        argv = ["judge", "--arena", str(answered), "--judge_model", "m", "--base_url", server.base_url]
        argv += ["--concurrency", str(threads), "--schedule", "balanced", "--battles_per_pair", "25"]
        verdicts = answered / "verdicts.jsonl"
        process = subprocess.Popen(
            [sys.executable, "launch/arena.py", *argv], cwd=REPOSITORY, stdout=subprocess.DEVNULL, env=os.environ
        )
        deadline = time.monotonic() + 60
        while not verdicts.is_file() or verdicts.read_bytes().count(b"\n") < 50:
            assert process.poll() is None, "judging ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 50 <= verdicts.read_bytes().count(b"\n") < wanted
        with verdicts.open("ab") as file:
            file.write(b'{"key": "torn')
        run(*argv)
        assert wanted <= len(server.requests) <= wanted + threads
    rows = lines(verdicts)
    assert len({(row["question_id"], row["first"], row["second"]) for row in rows}) == len(rows) == wanted


def test_the_seeds_replay_from_the_command_line(tmp_path: Path, shared_data_dir: Path) -> None:
    rows = lines(shared_data_dir / "elo_matches.jsonl")
    winner = {1.0: "model_a", 0.5: "tie", 0.0: "model_b"}
    matches = [
        {"model_a": row["first"], "model_b": row["second"], "winner": winner[row["outcome_first"]]} for row in rows[1:]
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(match) + "\n" for match in matches))
    start = [f"{name}={value!r}" for name, value in rows[0]["ratings_after"].items()]
    run("rate", "--matches", tmp_path / "m.jsonl", "--method", "elo", "--json", tmp_path / "out" / "elo.json",
        "--start_ratings", *start)  # fmt: skip
    assert json.loads((tmp_path / "out" / "elo.json").read_text())["ratings"] == rows[-1]["ratings_after"]


def test_translate_reproduces_the_published_format(tmp_path: Path, shared_data_dir: Path) -> None:
    published = json.loads((shared_data_dir / "translated_vicuna_eval_set.json").read_text(encoding="utf-8"))
    with ScriptedJudge({}, reply="“如何提高我的时间管理技能？”") as server:
        argv = ("translate", "--arena", tmp_path / "arena", "--questions", shared_data_dir / "vicuna_questions.jsonl",
                "--output", tmp_path / "zh.json", "--judge_model", "m", "--base_url", server.base_url)  # fmt: skip
        run(*argv)
        run(*argv)
        assert len(server.requests) == 80
    made = json.loads((tmp_path / "zh.json").read_text(encoding="utf-8"))
    assert [list(row) for row in made] == [list(row) for row in published]
    for mine, theirs in zip(made, published, strict=True):
        assert [mine[key] for key in ("question_id", "text", "category")] == [
            theirs[key] for key in ("question_id", "text", "category")
        ]
    assert made[0] == published[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "which verb?"),
        (["jugde"], "arena.py judge --help"),
        (["rate"], "exactly one"),
        (["rate", "--matches", "x", "--method", "elos"], "method"),
        (["rate", "--matches", "x", "--start_ratings", "a"], "NAME=NUMBER"),
        (["rate", "--matches", "x", "--start_ratings", "a=1", "--method", "bradley_terry"], "starts nowhere"),
        (["rate", "--matches", "/no/such/file"], "no such match file"),
        (["judge", "--arena", "x"], "--judge_model"),
        (["judge", "--arena", "x", "--judge_model", "m"], "OPENAI_API_KEY"),
        (["judge", "--arena", "x", "--judge_model", "m", "--base_url", "localhost:1"], "http://"),
        (["judge", "--arena", "x", "--judge_model", "m", "--base_url", "http://localhost:80a/v1"], "http://"),
        (
            ["judge", "--arena", "x", "--judge_model", "m", "--base_url", "http://h/v1", "--judge_prompts", "y"],
            "no such judge",
        ),
        (["judge", "--arena", "x", "--judge_model", "m", "--concurrency", "0"], "concurrency"),
        (["answers", "--arena", "x", "--questions", "/no/such/file"], "no such question file"),
        (["report", "--arena", "/no/such/arena"], "nobody has answered"),
    ],
)
def test_mistakes_are_told(argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANIMA_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnimaError) as caught:
        run(*argv)
    assert words in str(caught.value)


def test_a_budget_is_kept_and_the_key_is_nowhere(answered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "sk-secret-0123456789abcdef"
    with ScriptedJudge(STRENGTHS) as server:
        judge = ("judge", "--arena", answered, "--judge_model", "m", "--base_url", server.base_url, "--api_key", key)
        with pytest.raises(ConfigError, match="more than allowed"):
            run(*judge, "--price_output", "10", "--max_cost", "1")
        assert server.requests == []
        run(*judge, "--schedule", "balanced", "--battles_per_pair", "1")
        assert server.keys == [f"Bearer {key}"] * 12
    run("rate", "--arena", answered, "--num_orderings", "10", "--num_bootstrap", "10")
    run("report", "--arena", answered)
    written = "".join(path.read_text(encoding="utf-8") for path in answered.rglob("*") if path.is_file())
    printed = capsys.readouterr()
    assert key not in written + printed.out + printed.err


def test_a_mistyped_model_is_told_before_anybody_answers(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "Q?"}\n')
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "answer": "A."}\n')
    contestants = (f"file:given={tmp_path / 'a.jsonl'}", f"base:mistyped={tmp_path / 'nowhere'}")
    with pytest.raises(ModelError, match="no such model folder"):
        run(
            "answers", "--arena", tmp_path / "arena", "--questions", tmp_path / "q.jsonl", "--contestants", *contestants
        )
    assert not (tmp_path / "arena").exists()


def test_a_report_without_ratings(answered: Path) -> None:
    with pytest.raises(DataError, match="no ratings"):
        run("report", "--arena", answered)


def test_a_report_on_more_or_fewer_models_than_have_ratings(answered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = answered / "answers" / "alpha.jsonl"
    kept = late.rename(answered / "alpha.jsonl")
    with ScriptedJudge(STRENGTHS) as server:
        judge = ("judge", "--arena", answered, "--judge_model", "m", "--base_url", server.base_url)
        few = ("--schedule", "balanced", "--battles_per_pair", "2")
        run(*judge, *few)
        run("rate", "--arena", answered, "--num_orderings", "10", "--num_bootstrap", "10")
        kept.rename(late)
        run(*judge, *few)
    run("report", "--arena", answered)
    assert "verdicts came in after the ratings" in capsys.readouterr().err
    page = (answered / "report.html").read_text(encoding="utf-8")
    assert '"models": ["' in page
    assert json.loads(page.split('"models": ')[1].split("]")[0] + "]")[-1] == "alpha"
    (answered / "answers" / "beta.jsonl").unlink()
    run("report", "--arena", answered)
    assert '"beta": {}' in (answered / "report.html").read_text(encoding="utf-8")


def test_models_answer_and_an_unfinished_file_is_finished(
    tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = "".join(json.dumps({"question_id": n, "text": f"Q{n}?"}) + "\n" for n in range(5))
    (tmp_path / "q.jsonl").write_text(questions)
    argv = ["answers", "--arena", tmp_path / "arena", "--questions", tmp_path / "q.jsonl", "--max_new_tokens", "4"]
    argv += ["--device", "cpu", "--quantization", "none", "--contestants", f"base:tiny={tiny_llama_dir}"]
    run(*argv, "--batch_size", "5")
    path = tmp_path / "arena" / "answers" / "tiny.jsonl"
    whole = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(whole) == 6
    path.write_text("".join(whole[:3]) + whole[3][:9], encoding="utf-8")
    run(*argv, "--batch_size", "2")
    # answers do not depend on the batch they were made in
    assert sorted(path.read_text(encoding="utf-8").splitlines(keepends=True)) == sorted(whole)
    assert "tiny: 2 of 5 answered" in capsys.readouterr().out
