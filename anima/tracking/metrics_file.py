"""metrics.jsonl and samples.jsonl in the run's folder: written line by line while training, read back afterwards.

JSON has no NaN: numbers that are not finite are written as the strings "nan", "inf" and "-inf", and read back as
floats. Knows nothing of W&B. Before a resumed run appends, `rewind` moves what it will repeat to *.dropped.jsonl.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from anima.disk import replace_file
from anima.errors import DataError, TrackingError
from anima.tracking.line_file import LineFile
from anima.tracking.sample import Sample

METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples.jsonl"

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonlTracker:
    """Writes `{"step": 10, "train/loss": 1.5}` lines into `output_dir`.

    The summary and the adapter are files of the run's folder already (`summary.json`, `adapter/`): nothing to do.

    Raises:
        TrackingError: metrics.jsonl cannot be opened at the start. Later failures only warn.
    """

    run_id: str | None = None

    def __init__(self, output_dir: Path) -> None:
        """Create the folder and open metrics.jsonl for appending."""
        self._metrics = LineFile(output_dir / METRICS_NAME)
        self._samples = LineFile(output_dir / SAMPLES_NAME)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._metrics.open()
        except OSError as error:
            raise TrackingError(
                f"cannot write metrics: {error.strerror}",
                where=self._metrics.path,
                fix="choose an --output_dir that can be written, or --tracker none",
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics."""
        if "step" in metrics:
            raise ValueError("a metric must not be called step: that is the key of the step number")
        self._metrics.append(json.dumps({"step": step} | json_safe(metrics), ensure_ascii=False, allow_nan=False))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Append one line per sample."""
        for sample in samples:
            row = {"step": step, "label": sample.label, "prompt": sample.prompt, "answer": sample.answer}
            self._samples.append(json.dumps(row, ensure_ascii=False))

    def summary(self, values: Mapping[str, object]) -> None:
        """Nothing: `summary.json` holds it."""

    def log_adapter(self, folder: Path) -> None:
        """Nothing: the adapter lies in the run's folder."""

    def finish(self, exit_code: int = 0) -> None:
        """Close the files; says on stderr if lines are missing."""
        self._metrics.close()
        self._samples.close()

    def abandon(self) -> None:
        """Close after a failed start; an empty file of metrics goes, so that the folder does not look used."""
        self.finish()
        if self._metrics.path.stat().st_size == 0:
            self._metrics.path.unlink()


def rewind(output_dir: Path, step: int) -> int:
    """Take the lines later than `step` out of metrics.jsonl and samples.jsonl: a resumed run writes them again.

    They go to the end of metrics.dropped.jsonl and samples.dropped.jsonl first; then the shorter file replaces the
    longer one at once. Killed in between, the next call repeats the move: dropped lines may be there twice, kept ones
    never.

    Returns:
        The latest step that was in metrics.jsonl, or `step` if that is later.

    Raises:
        TrackingError: the files cannot be rewritten.
    """
    latest = step
    for name in (METRICS_NAME, SAMPLES_NAME):
        path = output_dir / name
        try:
            if path.is_file():
                latest = max(latest, _rewind_file(path, step))
        except OSError as error:
            raise TrackingError(
                f"cannot take repeated steps out: {error.strerror}", where=path, fix="make the folder writable"
            ) from error
    return latest


def _rewind_file(path: Path, step: int) -> int:
    kept: list[bytes] = []
    dropped: list[bytes] = []
    latest = step
    for line in path.read_bytes().splitlines(keepends=True):
        number = _step_of(line)
        later = number is None or number > step
        (dropped if later else kept).append(line if line.endswith(b"\n") else line + b"\n")
        latest = max(latest, number or 0)
    if dropped:
        with path.with_suffix(".dropped.jsonl").open("ab") as file:
            file.writelines(dropped)
            file.flush()
            os.fsync(file.fileno())
        replace_file(path, b"".join(kept))
    return latest


def _step_of(line: bytes) -> int | None:
    """The step of a line; None for one that a killed process left unfinished."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


def json_safe(values: Mapping[str, object]) -> dict[str, object]:
    """`values` with numbers that are not finite as "nan", "inf" or "-inf", tuples as lists and paths as text."""
    return {str(name): _json_safe_value(value) for name, value in values.items()}


def _json_safe_value(value: object) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return json_safe(value)
    if isinstance(value, list | tuple):
        return [_json_safe_value(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__float__"):  # float, and the number types of numpy
        number = float(value)
        return number if math.isfinite(number) else str(number)
    raise TypeError(f"{type(value).__name__} has no JSON form here")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All lines of a metrics.jsonl, in file order; `step` is an int.

    A last line without its newline is what a killed process left: it is dropped.

    Raises:
        DataError: A line elsewhere is not a JSON object of numbers with an integer `step`; names file:line.
    """
    lines = path.read_bytes().split(b"\n")
    return [_parse_line(line, f"{path}:{number}") for number, line in enumerate(lines[:-1], start=1)]


def _parse_line(line: bytes, where: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"not a line of JSON: {error}", where=where, got=repr(line[:80])) from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError("not a line of metrics", where=where, got=repr(line[:80]), allowed='{"step": 1, …}')
    return {name: _number(value, name, where) for name, value in row.items()}


def _number(value: object, name: str, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    raise DataError(f"metric {name} is not a number", where=where, got=repr(value), allowed='a number, "nan" or "inf"')
