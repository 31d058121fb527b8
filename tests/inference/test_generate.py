"""Steps of fixed shapes against transformers' own loop: the same tokens, whatever is asked for."""

from pathlib import Path

import pytest
import torch
from made_adapter import trained
from recorded_ops import OpRecorder
from transformers.generation.streamers import BaseStreamer

from anima.config.schema import ModelConfig
from anima.inference import answering, generate
from anima.inference.chat import BASE, Speakers, SpeakerSettings, load_speakers
from anima.inference.generate import FEWEST_TOKENS, GREEDY, Sampling, generate_answers, generate_tokens
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.packed import CausalModel, generating
from anima.model.tokenizer import load_tokenizer

FP32 = Compute(torch.device("cpu"), torch.float32, "test")
Loaded = tuple[CausalModel, object]


@pytest.fixture(scope="module")
def loaded(tiny_llama_dir: Path) -> Loaded:
    config = ModelConfig(model_name_or_path=str(tiny_llama_dir), quantization="none")
    return load_base(config, FP32), load_tokenizer(config)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 261, (length,), generator=generator).tolist() for length in lengths]


class Seen(BaseStreamer):
    """What a streamer gets."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=0.8, top_p=0.9, seed=3),
        Sampling(temperature=1.5, repetition_penalty=1.1, seed=8),
    ],
)
@pytest.mark.parametrize("lengths", [(17,), (1,), (1, 3, 17, 64, 130, 2)])
def test_the_same_tokens_as_with_a_growing_cache(loaded: Loaded, sampling: Sampling, lengths: tuple[int, ...]) -> None:
    model, tokenizer = loaded
    recorder = OpRecorder()
    with generating(model):
        options = {"max_new_tokens": 40, "sampling": sampling, "stop_ids": [200]}
        growing = generate_tokens(model, tokenizer, prompts(*lengths), **options)
        fixed = generate_tokens(model, tokenizer, prompts(*lengths), **options, recorder=recorder)
    assert fixed == growing
    assert not recorder.refusals
    assert [recording.closed for recording in recorder.recordings] == [True]


def test_rows_end_at_their_stop_tokens(loaded: Loaded) -> None:
    model, tokenizer = loaded
    asked, steps = prompts(5, 9, 12, 30), []
    with generating(model):
        free = generate_tokens(model, tokenizer, asked, max_new_tokens=30)
        stops = [*free[0][4:5], *(row[12] for row in free[1:])]
        options = {"max_new_tokens": 30, "stop_ids": stops}
        found = []
        for recorder in (None, OpRecorder()):
            streamer = Seen()
            found.append(generate_tokens(model, tokenizer, asked, **options, streamer=streamer, recorder=recorder))
            steps.append(len(streamer.pieces))
        alone = generate_tokens(model, tokenizer, asked[:1], **options, recorder=OpRecorder())
    assert found[0] == found[1]
    assert steps[0] == steps[1] == 1 + max(len(row) for row in found[0]) < 15  # the prompt, then until all have ended
    assert alone == found[0][:1]
    assert alone[0][-1] in stops


def test_a_streamer_sees_the_same(loaded: Loaded) -> None:
    model, tokenizer = loaded
    seen = {}
    with generating(model):
        for recorder in (None, OpRecorder()):
            streamer = seen[recorder is None] = Seen()
            generate_tokens(model, tokenizer, prompts(6), max_new_tokens=20, streamer=streamer, recorder=recorder)
    assert seen[False].pieces == seen[True].pieces
    assert len(seen[False].pieces) > 3
    assert seen[False].ended == 1


def test_short_answers_are_not_recorded(loaded: Loaded) -> None:
    model, tokenizer = loaded
    recorder = OpRecorder()
    with generating(model):
        generate_tokens(model, tokenizer, prompts(6), max_new_tokens=FEWEST_TOKENS - 1, recorder=recorder)
    assert not recorder.warmed_up


def test_ctrl_c_leaves_the_model_as_it_was(loaded: Loaded) -> None:
    class Interrupting(Seen):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.pieces) == 8:
                raise KeyboardInterrupt

    model, tokenizer = loaded
    recorder = OpRecorder()
    with generating(model):
        before = generate_tokens(model, tokenizer, prompts(6), max_new_tokens=20)
        with pytest.raises(KeyboardInterrupt):
            generate_tokens(model, tokenizer, prompts(6), max_new_tokens=20, streamer=Interrupting(), recorder=recorder)
        assert [recording.closed for recording in recorder.recordings] == [True]
        assert generate_tokens(model, tokenizer, prompts(6), max_new_tokens=20, recorder=recorder) == before
        assert generate_tokens(model, tokenizer, prompts(6), max_new_tokens=20) == before


def test_every_speaker_gets_a_recording_of_its_own(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anima.inference.chat.choose_compute", lambda *_: FP32)
    folders = {name: trained(tmp_path / name, tiny_llama_dir, seed) for seed, name in enumerate(("sft", "dpo"))}
    speakers: Speakers = load_speakers(SpeakerSettings(folders))
    order = ("dpo", BASE, "sft", BASE, "dpo")

    def answers() -> list[list[str]]:
        asked = [[answering.Message("user", text)] for text in ("Hi", "What is the capital of France, and why?")]
        return [speakers.answer(name, asked, max_new_tokens=20) for name in order]

    growing = answers()
    assert len({tuple(found) for found in growing}) == 3
    recorder = OpRecorder()
    monkeypatch.setattr(generate, "recorder_for", lambda device: recorder)
    assert answers() == growing
    assert len(recorder.recordings) == len(order)
    assert not recorder.refusals


def test_answers_are_recorded_where_the_device_can(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    recorder, devices = OpRecorder(), []
    monkeypatch.setattr(generate, "recorder_for", lambda device: devices.append(device) or recorder)
    with generating(model):
        generate_answers(model, tokenizer, prompts(6), max_new_tokens=20)
    assert devices == [model.device]
    assert len(recorder.recordings) == 1
