"""Speakers over one base against each alone; batches against one by one; the training's template and stop tokens."""

import shutil
from pathlib import Path

import pytest
import torch
from made_adapter import trained

from anima.data.records import Message
from anima.errors import ModelError
from anima.inference.chat import (
    BASE,
    Speakers,
    SpeakerSettings,
    load_answerer,
    load_base_answerer,
    load_speakers,
    named_adapters,
)
from anima.inference.generate import Sampling, generate_tokens
from anima.inference.merged_folder import MergeRequest
from anima.inference.merging import prepare_merge
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.packed import generating
from anima.model.prequantize import prequantize

FP32 = Compute(torch.device("cpu"), torch.float32, "test")
ASKED = [[Message("user", text)] for text in ("Hi", "What is the capital of France, and why?", "你好" * 20, "?")]


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anima.inference.chat.choose_compute", lambda *_: FP32)


@pytest.fixture(scope="module")
def folders(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: trained(folder / name, tiny_llama_dir, seed) for seed, name in enumerate(("sft", "dpo"))}


def answers(speakers: Speakers, name: str) -> list[str]:
    return speakers.answer(name, ASKED, max_new_tokens=12)


def test_side_by_side_each_says_what_it_says_alone(folders: dict[str, Path], tiny_llama_dir: Path) -> None:
    together = load_speakers(SpeakerSettings(folders))
    assert together.names == (BASE, "sft", "dpo")
    alone = {
        BASE: load_base_answerer(str(tiny_llama_dir)).answer(ASKED, max_new_tokens=12),
        **{name: load_answerer(str(folder)).answer(ASKED, max_new_tokens=12) for name, folder in folders.items()},
    }
    assert len({tuple(found) for found in alone.values()}) == 3
    for name in ("dpo", BASE, "sft", BASE, "dpo"):
        assert answers(together, name) == alone[name]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_batch_answers_token_for_token_as_one_by_one(tiny_llama_dir: Path, quantization: str) -> None:
    from anima.config.schema import ModelConfig
    from anima.model.tokenizer import load_tokenizer

    config = ModelConfig(model_name_or_path=str(tiny_llama_dir), quantization=quantization)  # type: ignore[arg-type]
    tokenizer, model = load_tokenizer(config), load_base(config, FP32)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 261, (length,), generator=generator).tolist() for length in (1, 3, 17, 64, 130, 2)]
    with generating(model):
        batch = generate_tokens(model, tokenizer, prompts, max_new_tokens=40)
        single = [generate_tokens(model, tokenizer, [prompt], max_new_tokens=40)[0] for prompt in prompts]
    assert batch == single
    assert any(len(tokens) == 40 for tokens in single)


def test_the_real_model_too_in_a_batch_and_alone(small_model_dir: Path) -> None:
    questions = (
        "Why is the sky blue?",
        "Hi!",
        "List three prime numbers and say what makes them prime.",
        "你好，你是谁？",
    )
    answerer = load_base_answerer(str(small_model_dir), quantization="none")
    asked = [[Message("user", text)] for text in questions]
    batch = answerer.answer(asked, max_new_tokens=16)
    assert batch == [answerer.answer([one], max_new_tokens=16)[0] for one in asked]
    assert len(set(batch)) == len(questions)


def test_an_answer_ends_at_the_templates_stop_token(tiny_llama_dir: Path) -> None:
    answerer = load_base_answerer(str(tiny_llama_dir))
    assert answerer._stops == (4,)  # <|im_end|>; the tokenizer's EOS is </s>
    model, seen = answerer._model, []
    original = model.generate

    def generate(**options: object) -> object:
        seen.append(options["eos_token_id"])
        return original(**options)

    model.generate = generate
    answerer.answer(ASKED[:1], max_new_tokens=2)
    assert seen == [[2, 4]]
    assert load_base_answerer(str(tiny_llama_dir), chat_template="alpaca")._stops == (2,)


def test_what_streams_is_the_answer(folders: dict[str, Path]) -> None:
    speakers, pieces = load_speakers(SpeakerSettings(folders)), []
    text = speakers.stream("sft", ASKED[0], max_new_tokens=12, write=pieces.append)
    assert "".join(pieces).strip() == text == answers(speakers, "sft")[0]

    def interrupted(piece: str) -> None:
        pieces.append(piece)
        raise KeyboardInterrupt

    pieces.clear()
    partial = speakers.stream("sft", ASKED[0], max_new_tokens=12, write=interrupted)
    assert partial == pieces[0].strip()


def test_drawn_answers_repeat_with_their_seed(folders: dict[str, Path]) -> None:
    speakers = load_speakers(SpeakerSettings(folders))

    def drawn(seed: int) -> list[str]:
        return speakers.answer("sft", ASKED, max_new_tokens=12, sampling=Sampling(1.5, seed=seed))

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1) != answers(speakers, "sft")


def test_an_nf4_folder_answers_as_the_original(folders: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path) -> None:
    prequantize(str(tiny_llama_dir), tmp_path / "nf4", FP32)
    found = load_speakers(SpeakerSettings(folders, model_name_or_path=str(tmp_path / "nf4")))
    assert answers(found, "dpo") == answers(load_speakers(SpeakerSettings(folders)), "dpo")


def test_another_template_or_base_is_refused_unless_told(
    folders: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="template differs") as caught:
        load_speakers(SpeakerSettings(folders, chat_template="alpaca"))
    assert "--chat_template model" in str(caught.value.fix)
    told = load_speakers(SpeakerSettings(folders, chat_template="alpaca", allow_mismatch=True))
    assert told.template("sft").name == "alpaca"
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1
    model.save_pretrained(other)
    with pytest.raises(ModelError, match="another base"):
        load_speakers(SpeakerSettings(folders, model_name_or_path=str(other)))
    load_speakers(SpeakerSettings(folders, model_name_or_path=str(other), allow_mismatch=True))
    sixteen = trained(tmp_path / "sixteen", tiny_llama_dir, 3, quantization="none")
    with pytest.raises(ModelError, match="do not share a base"):
        load_speakers(SpeakerSettings({**folders, "third": sixteen}))
    with pytest.raises(ModelError, match="nobody"):
        load_speakers(SpeakerSettings({}))


def test_names_of_speakers(folders: dict[str, Path]) -> None:
    sft = str(folders["sft"])
    assert list(named_adapters([sft, sft, f"mine={sft}", sft])) == ["sft", "sft-2", "mine", "sft-3"]
    for spec in (f"base={sft}", f"={sft}"):
        with pytest.raises(ModelError, match="taken"):
            named_adapters([spec])
    for spec in (f"../x={sft}", f"a b={sft}", f"runs/lr=0.1/{sft}"):
        with pytest.raises(ModelError, match="neither"):
            named_adapters([spec])


def test_a_folder_may_have_an_equals_sign_in_its_name(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1" / "adapter"
    shutil.copytree(folders["sft"], folder)
    assert named_adapters([str(folder), f"mine={folder}"]) == {"sft": folder, "mine": folder}


def test_names_that_a_module_cannot_have_speak_too(folders: dict[str, Path]) -> None:
    alone = answers(load_speakers(SpeakerSettings({"sft": folders["sft"]})), "sft")
    speakers = load_speakers(SpeakerSettings({"v1.2": folders["dpo"], "update": folders["sft"]}))
    assert answers(speakers, "update") == alone
    assert answers(speakers, "v1.2") != alone


def test_a_folder_that_is_none_says_what_is_there(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sft"], tmp_path / "run" / "adapter")
    (tmp_path / "file").write_text("")
    for name, words in (("gone", "no such folder"), ("file", "a file"), ("run", f"{tmp_path / 'run' / 'adapter'} is")):
        with pytest.raises(ModelError) as caught:
            named_adapters([str(tmp_path / name)])
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_model.safetensors", None, "damaged"),  # cut off
        ("adapter_model.safetensors", b"", "damaged"),
        ("adapter_config.json", b"", "damaged"),
        ("adapter_config.json", b"[]", "damaged"),
        ("adapter_config.json", b'{"peft_type": "IA3", "r": 4, "lora_alpha": 8}', "damaged"),
        ("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 8}', "damaged"),
        ("anima.json", b"[]", "how its adapter was trained"),
    ],
)
def test_a_damaged_adapter_is_told_before_the_base_is_loaded(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    content: bytes | None,
    message: str,
) -> None:
    monkeypatch.setattr("anima.inference.chat.load_base", lambda *_: pytest.fail("the base was loaded"))
    copy = tmp_path / "copy"
    shutil.copytree(folders["sft"], copy)
    (copy / file).write_bytes((copy / file).read_bytes()[:-9] if content is None else content)
    with pytest.raises(ModelError, match=message):
        load_speakers(SpeakerSettings({"sft": copy}))
    with pytest.raises(ModelError, match=message):
        prepare_merge(MergeRequest((str(copy),), None), FP32)
