"""Multiple-choice questions: the ancestor's ids and scores worked out from stock logits, and its defects mended."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from anima.errors import DataError
from anima.evaluation.mmlu import LETTERS, Choice, ChoiceEncoder, few_shot, read_choices, spread, summarise
from anima.evaluation.scoring import Scored, score_choices

HEAD = "The following are multiple choice questions (with answers) about  {}."


def question(subject: str, text: str, output: str) -> Choice:
    body = f"{text}\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    return Choice(subject, f"{HEAD.format(subject)}\n\n{body}", output)


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from anima.config.schema import ModelConfig
    from anima.model.base_model import load_base
    from anima.model.compute import Compute

    compute = Compute(torch.device("cpu"), torch.float32, "test")
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama_dir), quantization="none"), compute)
    return base, AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.mark.parametrize("batch_tokens", [1, 400, 10_000])
def test_scores_are_the_ancestors_worked_out_from_stock_logits(
    tiny: tuple[Any, Any], tiny_llama_dir: Path, batch_tokens: int
) -> None:
    from transformers import AutoModelForCausalLM

    base, tokenizer = tiny
    choices = [question("algebra", f"What is {n}?" * (1 + n), LETTERS[n % 4]) for n in range(7)]
    scores, shortened = score_choices(Scored(base), choices, ChoiceEncoder(tokenizer, 2048), batch_tokens=batch_tokens)
    assert shortened == 0
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    letters = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in LETTERS]
    for choice, (right, loss) in zip(choices, scores, strict=True):
        source = tokenizer(choice.input, add_special_tokens=False).input_ids
        target = tokenizer(choice.output + tokenizer.eos_token, add_special_tokens=False).input_ids
        assert len(target) == 2
        ids = torch.tensor([source + target])
        labels = torch.tensor([[-100] * len(source) + target])
        with torch.no_grad():
            out = stock(ids, labels=labels)
        at_letter = out.logits[0, len(source) - 1, letters]
        assert right == (LETTERS[int(at_letter.argmax())] == choice.output)
        assert loss == pytest.approx(out.loss.item(), rel=1e-4)
    assert {right for right, _ in scores} == {True, False}


def test_a_prompt_over_the_limit_keeps_its_question(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    examples = [question("law", f"Example\n\n{n}?", "B") for n in range(6)]
    long = few_shot([question("law", "The\n\nquestion?", "C")], examples, 5)[0]
    assert long.input.count("Answer: B") == 5
    whole = tokenizer(long.input, add_special_tokens=False).input_ids
    encoder = ChoiceEncoder(tokenizer, len(whole))
    assert encoder.encode(long).ids == tuple(whole)
    one_less = ChoiceEncoder(tokenizer, len(whole) - 1).encode(long)
    text = tokenizer.decode(one_less.ids)
    assert one_less.shortened
    assert text.startswith(HEAD.format("law"))
    assert text.count("Answer: B") == 4
    assert text.endswith("The\n\nquestion?\nA. one\nB. two\nC. three\nD. four\nAnswer:")
    assert "Example\n\n0?" not in text
    hard = ChoiceEncoder(tokenizer, 20).encode(long)
    assert len(hard.ids) == 20
    assert tokenizer.decode(hard.ids) == long.input[-20:]


def test_examples_are_of_the_subject_and_never_the_question_itself() -> None:
    pool = [question(subject, f"{subject} {n}", "A") for subject in ("law", "art") for n in range(3)]
    made = few_shot([pool[0]], pool, 2)[0]
    assert made.input == (
        f"{HEAD.format('law')}\n\nlaw 1\nA. one\nB. two\nC. three\nD. four\nAnswer: A\n\n"
        "law 2\nA. one\nB. two\nC. three\nD. four\nAnswer: A\n\nlaw 0\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )
    with pytest.raises(DataError, match="too few examples"):
        few_shot([pool[0]], pool, 3)


def test_subjects_weigh_equally() -> None:
    choices = [
        question("law", "1", "A"),
        question("law", "2", "A"),
        question("law", "3", "A"),
        question("art", "4", "A"),
    ]
    found = summarise(choices, [(True, 1.0), (False, 2.0), (False, 3.0), (True, 6.0)])
    assert found["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["accuracy_by_question"] == 0.5
    assert found["loss"] == 3.0
    assert found["accuracy/law"] == pytest.approx(1 / 3)


def test_rows_of_another_layout_are_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for row, message in (
        ({"subject": "a", "input": "Q Answer:", "output": "E"}, "output 'E'"),
        ({"input": "Q Answer:", "output": "A"}, "subject missing"),
        ({"subject": "a", "input": "Q", "output": "A"}, "no multiple-choice"),
    ):
        path.write_text(json.dumps({"subject": "a", "input": "Q Answer:", "output": "A"}) + "\n" + json.dumps(row))
        with pytest.raises(DataError) as caught:
            read_choices(str(path))
        assert message in str(caught.value)
        assert "q.jsonl:2" in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_choices(str(tmp_path / "none.json"))


def test_the_real_file_is_read_and_spread_over_its_subjects(shared_data_dir: Path) -> None:
    choices = read_choices(str(shared_data_dir / "mmlu_zero_shot_val.jsonl"))
    assert (len(choices), len({choice.subject for choice in choices})) == (1531, 57)
    assert len({choice.subject for choice in spread(choices, 200)}) == 57
    assert spread(choices, None) == choices
    assert few_shot(choices[:50], choices, 5)[0].input.count("Answer:") == 6
