"""Elo against the seed's recorded tournament bit for bit, and orderings against the sequential loop."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from anima.evaluation.elo import EloScale, elo_over_orderings, sequential_elo


def seed_matches(shared_data_dir: Path) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    lines = (shared_data_dir / "elo_matches.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    names = sorted(rows[0]["ratings_after"])
    first, second = (np.array([names.index(row[key]) for row in rows]) for key in ("first", "second"))
    after = np.array([[row["ratings_after"][name] for name in names] for row in rows])
    return names, first, second, np.array([row["outcome_first"] for row in rows]), after


def test_replay_is_exact(shared_data_dir: Path) -> None:
    names, first, second, score, after = seed_matches(shared_data_dir)
    history = sequential_elo(first[1:], second[1:], score[1:], after[0])
    np.testing.assert_array_equal(history, after[1:])
    table = {name: round(float(value), 2) for name, value in zip(names, history[-1], strict=True)}
    assert table == {"chatgpt": 1341.98, "anima": 1096.69, "belle": 937.71, "cn_vicuna": 623.62}


def test_from_1000_in_file_order(shared_data_dir: Path) -> None:
    names, first, second, score, _ = seed_matches(shared_data_dir)
    golden = json.loads((shared_data_dir / "golden_cases.json").read_text(encoding="utf-8"))
    expected = golden["elo_sequential_file_order"]["anima_215_from_1000"]
    last = sequential_elo(first, second, score, np.full(4, 1000.0))[-1]
    assert dict(zip(names, last.tolist(), strict=True)) == pytest.approx(expected, abs=1e-9)


def test_one_match_by_hand() -> None:
    """1200 beats 1000: expected 1 / (1 + 10 ** -0.5) = 0.75975, so it gains 32 * 0.24025 = 7.688."""
    history = sequential_elo(np.array([0]), np.array([1]), np.array([1.0]), np.array([1200.0, 1000.0]))
    assert history[0] == pytest.approx([1207.688, 992.312], abs=1e-3)


def test_orderings_are_the_sequential_loop_on_shuffled_matches() -> None:
    """Reference: the sequential function on the same permutations, drawn in the same way."""
    generator = np.random.default_rng(5)
    first = generator.integers(0, 4, 60)
    second = (first + generator.integers(1, 4, 60)) % 4
    score = generator.choice([0.0, 0.5, 1.0], 60)
    kinds, kind = np.unique(np.stack([first, second, (score * 2).astype(int)]), axis=1, return_inverse=True)
    expected = []
    for ordering in np.random.default_rng(3).spawn(7):
        shuffled = kind.reshape(-1).astype(np.uint8)
        ordering.shuffle(shuffled)
        one, other, twice = kinds[:, shuffled]
        expected.append(sequential_elo(one, other, twice / 2, np.full(4, 1000.0))[-1])
    result = elo_over_orderings(first, second, score, 4, num_orderings=7, seed=3)
    np.testing.assert_allclose(result.mean, np.mean(expected, axis=0), atol=1e-9)
    np.testing.assert_allclose(result.spread, np.std(expected, axis=0), atol=1e-9)


def test_chunks_change_nothing() -> None:
    first, second, score = np.array([0, 1, 2, 0, 1]), np.array([1, 2, 0, 2, 0]), np.array([1, 0.5, 0, 1, 1])
    whole = elo_over_orderings(first, second, score, 3, num_orderings=11, seed=1)
    parts = elo_over_orderings(first, second, score, 3, num_orderings=11, seed=1, chunk_bytes=5 * 3 * 4)
    np.testing.assert_array_equal(whole.mean, parts.mean)
    np.testing.assert_array_equal(whole.high, parts.high)


def test_other_constants_reach_the_loop() -> None:
    first, second, score = np.array([0]), np.array([1]), np.array([1.0])
    scale = EloScale(k=4, scale=100, base=2, start=0)
    result = elo_over_orderings(first, second, score, 2, num_orderings=3, scale=scale)
    np.testing.assert_allclose(result.mean, [2, -2])
    history = sequential_elo(first, second, score, np.array([100.0, 0.0]), scale)  # odds 2 to 1: gains 4 / 3
    np.testing.assert_allclose(history[0], [100 + 4 / 3, -4 / 3])


def test_the_seeds_lead_shrinks_over_orderings(shared_data_dir: Path) -> None:
    """The recount that the seed never made: Anima leads Belle by 73, not by 159."""
    names, first, second, score, _ = seed_matches(shared_data_dir)
    result = elo_over_orderings(first, second, score, 4, num_orderings=4000)
    mean = dict(zip(names, result.mean.tolist(), strict=True))
    assert mean == pytest.approx({"chatgpt": 1324.9, "anima": 1052.2, "belle": 979.5, "cn_vicuna": 643.5}, abs=2.5)
    assert dict(zip(names, result.spread.tolist(), strict=True)) == pytest.approx(
        {"chatgpt": 16, "anima": 36, "belle": 31, "cn_vicuna": 23}, abs=2
    )


def test_a_large_tournament_is_quick_enough() -> None:
    """A twentieth of 40,000 matches x 10,000 orderings, which may take a minute on two cores; measured 12 s on one."""
    generator = np.random.default_rng(0)
    first = generator.integers(0, 8, 8000)
    second = (first + generator.integers(1, 8, 8000)) % 8
    begin = time.process_time()
    elo_over_orderings(first, second, generator.choice([0.0, 0.5, 1.0], 8000), 8, num_orderings=2500)
    assert time.process_time() - begin < 3
