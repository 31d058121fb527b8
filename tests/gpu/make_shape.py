"""Make a model folder without weights: the shape of a known model and a tokenizer trained on given text.

    python tests/gpu/make_shape.py --shape llama-33b --train_files data/*.json --output_dir /tmp/llama-33b
    deepspeed launch/train.py --model_name_or_path /tmp/llama-33b --random_weights True …

Benchmarks need a model's shape and real text, not its 65 GB of weights.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHAPES = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-33b": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52},
    "llama-33b-8-layers": {
        "hidden_size": 6656,
        "intermediate_size": 17920,
        "num_hidden_layers": 8,
        "num_attention_heads": 52,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
VOCABULARY = 32000
"""Of the tokenizer, and of shapes that name none."""
SPECIAL = ("<unk>", "<s>", "</s>")


def main() -> None:
    """Write config.json and the tokenizer's files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--train_files", nargs="+", type=Path, required=True, help="text to learn the tokenizer from")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    config = LlamaConfig(
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        **{"vocab_size": VOCABULARY, **SHAPES[options.shape]},
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(options.output_dir)
    train_tokenizer(options.train_files).save_pretrained(options.output_dir)
    print(f"{options.output_dir}: {options.shape}, vocabulary {config.vocab_size}")


def train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the LLaMA vocabulary's size; unused ids are filled so that every id exists."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def _texts(files: list[Path]) -> Iterator[str]:
    for path in files:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        for row in rows:
            yield json.dumps(row, ensure_ascii=False)


if __name__ == "__main__":
    main()
