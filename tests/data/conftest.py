"""Tokenizers small enough to count by hand (one token a byte, one like SentencePiece), rows, and the whole stage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anima.config.schema import DataConfig
from anima.data.prepare import PreparedData, prepare

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPM_TEXT = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nhello world\n\n### Response: hello answer",
    "A chat between a curious user and an assistant. USER: hello ASSISTANT: answer hello world",
]


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """Make a tokenizer with one token a byte; arguments: the chat template, and whether text gets a BOS by default."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(chat_template: str | None = CHATML, *, adds_bos: bool = False, eos: str | None = "</s>") -> Any:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *letters])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token=eos)
        fast.chat_template = chat_template
        return fast

    return make


@pytest.fixture(scope="session")
def spm_tokenizer() -> Any:
    """A BPE over Metaspace that puts a space before every text, adds a BOS, and has no chat template: like Llama's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(SPM_TEXT * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def smol_tokenizer(small_model_dir: Path) -> Any:
    """The real tokenizer of SmolLM2-Instruct, whose pad token is its EOS."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_model_dir)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON lines and return the file's name."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return str(path)

    return write


@pytest.fixture
def run(tmp_path: Path, byte_tokenizer: Any) -> Callable[..., PreparedData[Any]]:
    """Prepare with one token a byte; keyword arguments go to DataConfig, but for seed and tokenizer."""

    def call(*files: str, seed: int = 42, tokenizer: Any = None, **options: Any) -> PreparedData[Any]:
        config = DataConfig(**{"train_files": files, "data_cache_dir": str(tmp_path / "cache"), **options})
        return prepare(config, tokenizer or byte_tokenizer(), seed=seed)

    return call
