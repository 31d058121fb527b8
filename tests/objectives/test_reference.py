"""The cache of a reference's log-probabilities: whole parts only, of this identity only, also after a cut."""

import json
from pathlib import Path

import numpy as np
import pytest

from anima.objectives.reference import ReferenceCache

IDENTITY = {"base": "b1", "adapter": "", "compute_dtype": "torch.float32", "data": "d1"}


def filled(root: Path) -> ReferenceCache:
    cache = ReferenceCache(root, IDENTITY, 5)
    cache.add(np.array([3, 0]), np.array([[-3.0, -3.5], [-0.5, -1.0]], dtype=np.float32))
    cache.add(np.array([1]), np.array([[-1.0, -1.5]], dtype=np.float32))
    return cache


def test_parts_add_up_and_the_rest_is_unknown(tmp_path: Path) -> None:
    filled(tmp_path)
    known, problems = ReferenceCache(tmp_path, IDENTITY, 5).load()
    assert problems == []
    assert np.isnan(known).all(axis=1).tolist() == [False, False, True, False, True]
    assert known[[0, 1, 3]].tolist() == [[-0.5, -1.0], [-1.0, -1.5], [-3.0, -3.5]]


@pytest.mark.parametrize("name", [*IDENTITY, "pairs"])
def test_another_identity_is_another_cache(name: str, tmp_path: Path) -> None:
    first = filled(tmp_path)
    changed = IDENTITY if name == "pairs" else {**IDENTITY, name: "other"}
    other = ReferenceCache(tmp_path, changed, 6 if name == "pairs" else 5)
    assert other.key != first.key
    assert np.isnan(other.load()[0]).all()


def test_a_folder_of_something_else_is_not_used_and_then_replaced(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    (cache.folder / "identity.json").write_text(json.dumps({**IDENTITY, "base": "b2", "pairs": "5"}))
    known, problems = cache.load()
    assert np.isnan(known).all()
    assert "not used" in problems[0]
    cache.add(np.array([2]), np.array([[-2.0, -2.5]], dtype=np.float32))
    known, problems = cache.load()
    assert problems == []
    assert np.isnan(known[:, 0]).tolist() == [True, True, False, True, True]


def test_a_damaged_part_is_told_and_not_used(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    large = max(cache.folder.glob("part-*.npz"), key=lambda path: path.stat().st_size)
    content = bytearray(large.read_bytes())
    place = content.index(np.float32(-3.5).tobytes())
    content[place] ^= 1  # a flipped bit: the entry's checksum tells
    large.write_bytes(content)
    small = min(cache.folder.glob("part-*.npz"), key=lambda path: path.stat().st_size)
    if small != large:
        small.write_bytes(small.read_bytes()[:50])  # cut off
    known, problems = cache.load()
    assert np.isnan(known).all()
    assert len(problems) == len(list(cache.folder.glob("part-*.npz")))
    assert all("damaged" in problem for problem in problems)


def test_numbers_out_of_place_are_not_used(tmp_path: Path) -> None:
    for number, value in ((7, -1.0), (-1, -1.0), (2, float("nan"))):
        cache = ReferenceCache(tmp_path / str(number), IDENTITY, 5)
        cache.add(np.array([number]), np.array([[value, -1.0]], dtype=np.float32))
        known, problems = cache.load()
        assert np.isnan(known).all()
        assert len(problems) == 1


def test_a_write_that_was_cut_off_leaves_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tmp_path)
    before = cache.load()[0]

    def fail(source: object, target: object) -> None:
        raise OSError("killed here")

    monkeypatch.setattr("anima.disk.os.replace", fail)
    with pytest.raises(OSError, match="killed here"):
        cache.add(np.array([4]), np.array([[-4.0, -4.5]], dtype=np.float32))
    assert np.array_equal(cache.load()[0], before, equal_nan=True)
