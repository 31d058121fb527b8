"""A 16-bit model to an NF4 folder, once: training on it starts in seconds, and ranks share its pages in memory.

python launch/prequantize.py --model_name_or_path /models/my-33b --output_dir /models/my-33b-nf4
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.checks import require
from anima.config.cli import parse_flags
from anima.config.paths import expanded
from anima.entry import run_command


@dataclass(frozen=True, kw_only=True)
class PrequantizeOptions:
    """Write a model in NF4."""

    model_name_or_path: str
    """Folder or hub name of a model in 16 bit (safetensors)."""
    output_dir: str
    """New folder for the NF4 model."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to quantise. Bits are those of training on the same kind of device."""
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """What weights are rounded to first, as in training; without effect on a model stored in bf16."""
    shard_gib: float = 2.0
    """Size of the written files, GiB; host memory needed is about twice that."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""

    def __post_init__(self) -> None:
        require(0 < self.shard_gib < math.inf, "no size of a file", "shard_gib", self.shard_gib, "above 0")


def main(argv: Sequence[str]) -> None:
    """Convert, prove, report."""
    options = parse_flags(PrequantizeOptions, argv, prog="launch/prequantize.py")
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)  # before bitsandbytes is imported
    from anima.model.compute import choose_compute
    from anima.model.prequantize import prequantize
    from anima.tracking.bar import byte_bar, host_peak_gib

    began = time.perf_counter()
    with byte_bar("quantising") as advance:
        made = prequantize(
            options.model_name_or_path,
            expanded(options.output_dir, "--output_dir"),
            choose_compute(options.device, options.compute_dtype, 0),
            trust_remote_code=options.trust_remote_code,
            shard_bytes=int(options.shard_gib * 2**30),
            on_tensor=advance,
        )
    print(f"{options.output_dir}: {made.source_gib:.2f} GiB became {made.gib:.2f} GiB of NF4, read back and equal")
    print(f"fingerprint {made.fingerprint} (as quantised on the fly in {made.dtype} on this {made.device})")
    print(f"{time.perf_counter() - began:.0f} s, peak host memory {host_peak_gib():.2f} GiB")
    print(f"next: --model_name_or_path {options.output_dir} in launch/train.py")


if __name__ == "__main__":
    run_command(main)
