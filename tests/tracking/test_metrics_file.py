"""metrics.jsonl and samples.jsonl: strict JSON, exact numbers back, clear errors for broken lines."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anima.errors import DataError, TrackingError
from anima.tracking.metrics_file import JsonlTracker, json_safe, read_metrics, rewind
from anima.tracking.sample import Sample


def strict(text: str) -> object:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_lines_are_one_strict_json_object_each(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "new" / "run")
    tracker.log(0, {"eval/loss": 2.5})
    tracker.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "low": -math.inf, "tokens": 12})
    tracker.finish()
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [
        {"step": 0, "eval/loss": 2.5},
        {"step": 1, "train/loss": "nan", "train/grad_norm": "inf", "low": "-inf", "tokens": 12},
    ]
    back = read_metrics(tmp_path / "new" / "run" / "metrics.jsonl")
    assert math.isnan(back[1]["train/loss"])
    assert (back[1]["train/grad_norm"], back[1]["low"], back[1]["step"]) == (math.inf, -math.inf, 1)
    assert not (tmp_path / "new" / "run" / "samples.jsonl").exists()


@given(value=st.floats())
def test_every_float_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    folder = tmp_path_factory.mktemp("run")
    tracker = JsonlTracker(folder)
    tracker.log(7, {"x": value})
    tracker.finish()
    (row,) = read_metrics(folder / "metrics.jsonl")
    assert row["x"] == value or (math.isnan(row["x"]) and math.isnan(value))


def test_resumed_run_appends(tmp_path: Path) -> None:
    for steps in ((1, 2), (2, 3)):
        tracker = JsonlTracker(tmp_path)
        for step in steps:
            tracker.log(step, {"train/loss": float(step)})
        tracker.finish()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]


def test_a_metric_called_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step"):
        JsonlTracker(tmp_path).log(1, {"step": 2.0})


def test_samples_keep_every_character(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.log_samples(3, [Sample("你是谁？", 'a\n"b"\x1b'), Sample("q", "half a pair \ud83d", label="base")])
    tracker.finish()
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 3, "label": "", "prompt": "你是谁？", "answer": 'a\n"b"\x1b'},
        {"step": 3, "label": "base", "prompt": "q", "answer": "half a pair \ud83d"},
    ]
    assert "你是谁" in text


def test_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.5}\n{"step": 2, "a": 1.')
    assert read_metrics(path) == [{"step": 1, "a": 1.5}]
    path.write_text("")
    assert read_metrics(path) == []


@pytest.mark.parametrize(
    "broken",
    [
        '{"step": 2, "a": 1.',
        "",
        "[1]",
        '{"a": 1}',
        '{"step": "2"}',
        '{"step": 2, "a": "high"}',
        '{"step": 2, "a": [1]}',
    ],
)
def test_broken_line_elsewhere_is_an_error_with_its_number(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "a": 1}}\n{broken}\n{{"step": 3, "a": 1}}\n')
    with pytest.raises(DataError) as caught:
        read_metrics(path)
    assert caught.value.where == f"{path}:2"


def test_bytes_that_are_no_text_are_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\x00\n')
    with pytest.raises(DataError, match="JSON") as caught:
        read_metrics(path)
    assert caught.value.where == f"{path}:2"


def test_folder_that_cannot_be_made_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrackingError, match="cannot write metrics") as caught:
        JsonlTracker(tmp_path / "file" / "run")
    assert "--output_dir" in str(caught.value)


def test_disk_full_while_training_only_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    tracker = JsonlTracker(tmp_path)
    for step in range(5):
        tracker.log(step, {"a": 1.0})
        tracker.log_samples(step, [Sample("q", "a")])
    assert capsys.readouterr().err.count("warning") == 2
    tracker.finish()
    assert capsys.readouterr().err.count("lacks 5 lines") == 2


def test_json_safe_forms() -> None:
    class Number:
        def __float__(self) -> float:
            return 0.5

    values = {"t": ("a", math.nan), "d": {"x": math.inf}, "p": Path("a/b"), "n": None, "b": True, "i": 3, "f": Number()}
    expected = {"t": ["a", "nan"], "d": {"x": "inf"}, "p": "a/b", "n": None, "b": True, "i": 3, "f": 0.5}
    assert json_safe(values) == expected
    with pytest.raises(TypeError, match="object"):
        json_safe({"o": object()})


def test_rewind_moves_later_steps_aside_and_tells_how_far_the_run_had_come(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for step in (0, 1, 2, 3):
        tracker.log(step, {"train/loss": 1.0 + step})
        tracker.log_samples(step, [Sample(prompt="q", answer="a\u2028b")])
    tracker.finish()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "train/lo')  # killed while writing
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert rewind(tmp_path, 1) == 3
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True) == before[:2]
    dropped = (tmp_path / "metrics.dropped.jsonl").read_bytes().splitlines()
    assert [line[:9] for line in dropped] == [b'{"step": ', b'{"step": ', b'{"step": ']
    assert [row["step"] for row in map(json.loads, dropped[:2])] == [2, 3]
    samples = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["step"] for line in samples] == [0, 1]
    assert rewind(tmp_path, 1) == 1  # nothing left to do
    assert len((tmp_path / "metrics.dropped.jsonl").read_bytes().splitlines()) == 3
    assert rewind(tmp_path, -1) == 1
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert rewind(tmp_path / "nowhere", 5) == 5
