"""launch/chat.py: what is refused, and that no model is loaded before."""

from pathlib import Path

import pytest
from made_adapter import trained

import launch.chat as chat_script
from anima.errors import AnimaError
from anima.inference import chat


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("chat") / "adapter", tiny_llama_dir, 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top_p", "2"], "--top_p"),
        (["--repetition_penalty", "0"], "--repetition_penalty"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--seed", "-1"], "--seed"),
        (["--speaker", "stf"], "base, sft, all"),
        (["--quantization", "none"], "auto or nf4"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    adapter: Path, flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(chat, "load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(AnimaError) as caught:
        chat_script.main(["--adapter", str(adapter), "--prompt", "Hi", "--device", "cpu", *flags])
    assert words in str(caught.value)
