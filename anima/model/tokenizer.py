"""Loading of a tokenizer, and where its model lies. Rendering and encoding of conversations belong to data/."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from anima.config.schema import ModelConfig
from anima.errors import ModelError


def load_tokenizer(config: ModelConfig, *, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `model_name_or_path`, or the one that was saved in `folder` beside an adapter.

    Raises:
        ModelError: the folder is missing, holds no tokenizer, or the hub cannot be reached.
    """
    if folder is None:
        check_model_source(config.model_name_or_path)
    source = model_location(config.model_name_or_path) if folder is None else str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, padding_side="right"
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            "no tokenizer could be loaded",
            where=source,
            got=str(error).strip().splitlines()[0],
            allowed="a folder with tokenizer.json (or tokenizer.model) and tokenizer_config.json",
            fix="copy the tokenizer files of the original model into the folder",
        ) from error
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so that no answer could learn to stop",
            where=f"--model_name_or_path {config.model_name_or_path}",
            fix='set "eos_token" in tokenizer_config.json',
        )
    return tokenizer


def model_location(name_or_path: str) -> str:
    """Where the model lies, so that it is found from any working folder: an absolute path, or its hub name."""
    path = Path(os.path.expanduser(name_or_path))
    return str(path.resolve()) if path.is_dir() else name_or_path


def check_model_source(name_or_path: str) -> None:
    """Tell a mistyped folder from a hub name before anything is downloaded.

    Raises:
        ModelError: the path looks local and does not exist, or holds no config.json.
    """
    path = Path(os.path.expanduser(name_or_path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                "the folder holds no model",
                where=f"--model_name_or_path {name_or_path}",
                allowed="a folder with config.json and *.safetensors",
                fix="point to the folder that holds config.json",
            )
        return
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1 or path.parent.is_dir()
    if path.exists() or looks_local:
        raise ModelError(
            "no such model folder",
            where=f"--model_name_or_path {name_or_path}",
            got="a file" if path.exists() else "nothing there",
            allowed="a folder with config.json, or a hub name such as owner/name",
            fix="make models (for the quickstart's model), or check the path",
        )
