"""Fold adapters into their base and say how far the result is from what was trained.

python launch/merge.py --adapter runs/sft/adapter --output_dir runs/sft/merged
python launch/merge.py --adapter runs/sft/adapter --into original --output_dir runs/sft/merged-16bit
python launch/merge.py --adapter runs/sft/adapter              # only the comparison
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
from anima.entry import run_command
from anima.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merge adapters into 16 bit, layer by layer."""

    adapter: tuple[str, ...]
    """Adapter folders in the order of their training; a later one must have been trained on the merge of the earlier
    ones. A run that went on from an adapter (--adapter_path) holds it already: name that run alone."""
    output_dir: str | None = None
    """New folder for the merged model; None: compare only, write nothing."""
    into: Literal["nf4", "original"] = "nf4"
    """nf4: the NF4 base dequantised, exactly as trained. original: the 16-bit model, which training never saw."""
    model_name_or_path: str | None = None
    """The base; None for the one that the first adapter names."""
    original: str | None = None
    """The 16-bit model, where the base is an NF4 folder; None for where that came from, if it is still there."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the merged model."""
    max_drift: float = 0.5
    """Refuse a merge whose logits differ more than this from base and adapter apart, mean |difference|."""
    allow_drift: bool = False
    """Write it all the same."""
    allow_mismatch: bool = False
    """Go on although base, order or template are not those of the training."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute; it needs memory for a few matrices only."""
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the comparison."""
    shard_gib: float = 2.0
    """Size of the written files, GiB."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""

    def __post_init__(self) -> None:
        if not self.adapter:
            raise ConfigError("no adapter to merge", where="--adapter", fix="--adapter runs/NAME/adapter")
        require(0 < self.shard_gib < math.inf, "no size of a file", "shard_gib", self.shard_gib, "above 0")


def main(argv: Sequence[str]) -> None:
    """Check, merge, report."""
    options = parse_flags(MergeOptions, argv, prog="launch/merge.py")
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)  # before bitsandbytes is imported
    from anima.inference.merged_folder import DTYPES, MergeRequest, drift_lines
    from anima.inference.merging import prepare_merge, run_merge
    from anima.model.compute import choose_compute
    from anima.tracking.bar import byte_bar, host_peak_gib

    request = MergeRequest(
        adapters=options.adapter,
        output_dir=options.output_dir,
        model_name_or_path=options.model_name_or_path,
        original=options.original,
        into=options.into,
        out_dtype=DTYPES[options.dtype],
        max_drift=options.max_drift,
        allow_drift=options.allow_drift,
        allow_mismatch=options.allow_mismatch,
        trust_remote_code=options.trust_remote_code,
        shard_bytes=int(options.shard_gib * 2**30),
    )
    began = time.perf_counter()
    prepared = prepare_merge(request, choose_compute(options.device, options.compute_dtype, 0))
    for note in prepared.notes:
        print(f"note: {note}")
    with byte_bar("merging") as reach:
        drifts = run_merge(prepared, reach)
    print("\n".join(drift_lines(drifts)))
    print(f"{time.perf_counter() - began:.0f} s, peak host memory {host_peak_gib():.2f} GiB")
    if options.output_dir is None:
        print("nothing was written: --output_dir FOLDER writes the first of these")
        return
    into = prepared.request.into  # over 16 bit there is no nf4 to merge into
    print(f"{options.output_dir}: merged {into} in {options.dtype}, with tokenizer, template and model card")
    print(f"next: python launch/chat.py --model_name_or_path {options.output_dir}")


if __name__ == "__main__":
    run_command(main)
