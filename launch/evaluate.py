"""Numbers about a base, its adapters or a merged model, side by side: held-out loss, MMLU, lm-eval, answers.

python launch/evaluate.py --adapter runs/sft/adapter runs/dpo/adapter --output_dir runs/numbers \\
    --eval_files launch/data/quickstart_sft_eval.jsonl --mmlu_files zero_shot_mmlu_val.json
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.cli import parse_flags
from anima.config.paths import expanded
from anima.entry import run_command
from anima.errors import ConfigError
from anima.evaluation.measurements import Measurements


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure models."""

    output_dir: str
    """Folder for results.json and answers/; the same folder again adds to it and goes on."""
    adapter: tuple[str, ...] = ()
    """Adapter folders, also as NAME=FOLDER; their base is measured beside them."""
    model_name_or_path: str | None = None
    """The base, or a merged model; None for the base that the adapters were trained on."""
    quantization: Literal["auto", "nf4", "none"] = "auto"
    """Of a model without adapters: auto is none for a merged folder, else nf4. Adapters run as they were trained."""
    speakers: tuple[str, ...] = ()
    """Only these of base and the adapters' names; empty for all."""
    measurements: Measurements = field(default_factory=Measurements)
    allow_mismatch: bool = False
    """Go on with another base or template than those of the training."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute."""


def main(argv: Sequence[str]) -> None:
    """Check, measure one model after the other, write after each."""
    options = parse_flags(EvaluateOptions, argv, prog="launch/evaluate.py")
    # This folder leaves the search path: the harness imports a library that is called evaluate as well.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)  # before bitsandbytes is imported
    from anima.evaluation.numbers import Numbers, check_measurements, measure, number_lines, write_numbers
    from anima.inference.chat import BASE, SpeakerSettings, load_speakers, named_adapters

    output_dir, adapters = expanded(options.output_dir, "--output_dir"), named_adapters(options.adapter)
    names = (BASE, *adapters)
    if unknown := sorted(set(options.speakers) - set(names)):
        raise ConfigError("no such model", where="--speakers", got=", ".join(unknown), allowed=", ".join(names))
    check_measurements(options.measurements, output_dir)
    speakers = load_speakers(
        SpeakerSettings(
            adapters=adapters,
            model_name_or_path=options.model_name_or_path,
            device=options.device,
            quantization=options.quantization,
            allow_mismatch=options.allow_mismatch,
        )
    )
    numbers: dict[str, Numbers] = {}
    for name in options.speakers or speakers.names:
        numbers[name] = measure(speakers, name, options.measurements, output_dir, tell)
        write_numbers(output_dir, numbers)
    print("\n".join(["", *number_lines(numbers), "", f"{output_dir / 'results.json'}"]))


def tell(line: str) -> None:
    """A line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
