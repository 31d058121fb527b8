"""What is said about held-out metrics, and when it is not."""

from anima.train.preference_watch import PreferenceWatch


def metrics(chosen: float, rejected: float, accuracy: float = 0.5, shorter: float | None = 0.9) -> dict[str, float]:
    found = {
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "rewards/accuracies": accuracy,
        "rewards/margins": 0.25,
        "rewards/accuracies_chosen_shorter": shorter,
    }
    return {name: value for name, value in found.items() if value is not None}


def test_both_falling_three_times_in_a_row_is_said() -> None:
    watch = PreferenceWatch(0.5)
    said = [watch(step, metrics(-100 - step, -120 - step)) for step in range(4)]
    assert [len(lines) for lines in said] == [1, 1, 1, 2]
    assert "both log-probabilities fell in 3 evaluations in a row" in said[3][1]
    assert "--sft_weight" in said[3][1]


def test_one_that_rises_starts_the_count_again() -> None:
    watch = PreferenceWatch(0.5)
    chosen = (-100, -101, -102, -101.5, -103, -104)
    said = [watch(step, metrics(value, -120 - step)) for step, value in enumerate(chosen)]
    assert all(len(lines) == 1 for lines in said)
    assert len(watch(6, metrics(-105, -130))) == 2


def test_an_accuracy_that_length_explains_is_said() -> None:
    assert "length alone explains" in PreferenceWatch(0.9)(5, metrics(-1, -2, accuracy=0.92, shorter=0.1))[1]
    assert "never the shorter one" in PreferenceWatch(1.0)(5, metrics(-1, -2, accuracy=1.0, shorter=None))[1]


def test_an_accuracy_that_length_does_not_explain_is_not() -> None:
    assert len(PreferenceWatch(0.5)(5, metrics(-1, -2, accuracy=0.92, shorter=0.4))) == 1  # better than length
    assert len(PreferenceWatch(0.9)(5, metrics(-1, -2, accuracy=0.92, shorter=0.8))) == 1  # right on the others too
    assert len(PreferenceWatch(0.9)(0, metrics(-1, -2, accuracy=0.92, shorter=0.1))) == 1  # nothing learned yet
    assert len(PreferenceWatch(0.9)(5, metrics(-1, -2, accuracy=0.5, shorter=0.1))) == 1


def test_a_tie_is_named() -> None:
    assert "every pair is a tie" in PreferenceWatch(0.5)(0, {**metrics(-1, -2, 0.0), "rewards/margins": 0.0})[0]
