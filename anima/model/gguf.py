"""A GGUF file made into a Hugging Face folder in bf16, once: where the quickstart's and the tests' model comes from.

Owns the conversion and the rule when such a folder is whole. Does not know what the model is used for.
"""

import importlib.util
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from anima.errors import ModelError
from anima.model.new_folder import written_aside

WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DIGITS_APART = "smollm"
"""GGUF's name for: split off every single digit, then split as GPT-2 does."""


def packaged_gguf(package: str) -> Path:
    """The one GGUF file that an installed Python package carries; the package itself is not imported.

    Raises:
        ModelError: the package is not installed, or carries no GGUF file or several.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a name with dots whose first part is not there, or no name
        spec = None
    if spec is None or spec.origin is None:
        raise ModelError("the package is not installed", where=f"--package {package}", fix="make venv")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(
            "the package does not carry exactly one GGUF file",
            where=f"--package {package}",
            got=", ".join(path.name for path in found) or "none",
            fix="name the file: --gguf_path FILE",
        )
    return found[0]


def is_whole(model_dir: Path) -> bool:
    """Whether every file of a converted model is there and the weights have their full length."""
    if not all((model_dir / name).is_file() for name in FILES):
        return False
    try:
        with safe_open(model_dir / WEIGHTS, framework="np") as weights:
            return len(weights.keys()) > 0
    except SafetensorError:  # shorter than its own header says
        return False


def convert_gguf(gguf_path: Path, output_dir: Path) -> bool:
    """Write model and tokenizer of `gguf_path` to `output_dir`: all of it or nothing. A whole folder is left alone.

    The files are written beside `output_dir` and moved there by one rename, under a lock, so that neither a
    killed nor a parallel conversion can leave a folder that only looks whole.

    Returns:
        False if the folder was whole already.

    Raises:
        ModelError: no such file, or none in GGUF; a tokenizer of an unknown kind; or `output_dir` holds something else.
    """
    if is_whole(output_dir):
        return False
    if not gguf_path.is_file():
        raise ModelError("no such GGUF file", where=str(gguf_path), fix="check the path")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir.with_name(f".{output_dir.name}.lock")):
        if is_whole(output_dir):  # a parallel conversion got there first
            return False
        with written_aside(output_dir) as partial_dir:
            _save_tokenizer(gguf_path, partial_dir)
            _save_model(gguf_path, partial_dir)
    return True


def _save_tokenizer(gguf_path: Path, model_dir: Path) -> None:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    try:
        field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(
            "the GGUF file is damaged, or no GGUF file",
            where=str(gguf_path),
            got=f"{type(error).__name__}: {error}",
            fix="copy or download it again",
        ) from error
    splitting = "none" if field is None else field.contents()
    if splitting != DIGITS_APART:
        raise ModelError(
            "the GGUF file's way to split text into words is not known here",
            where=f"{gguf_path}: tokenizer.ggml.pre",
            got=splitting,
            allowed=DIGITS_APART,
            fix="use the model's original Hugging Face folder",
        )
    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    # transformers 5.23 reads vocabulary and merges but not tokenizer.ggml.pre. Without this line every list
    # (":\n\n1.") is tokenised in another way than in the model's own training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.save_pretrained(model_dir)


def _save_model(gguf_path: Path, model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The tensors are plain bf16 by now, but transformers 5.23 still calls the model quantised and would not save it.
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, name, value)
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(model_dir)
