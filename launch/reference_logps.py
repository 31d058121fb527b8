"""Ask the reference about every pair beforehand, with the flags of the training that will use its answers.

deepspeed launch/reference_logps.py --config launch/configs/anima_33b_dpo.yaml

launch/train.py does the same before its first step, for the pairs that it needs; both use and fill the same cache, so
that a cut-off pass goes on where it stopped, and restarts and the trials of a sweep do not repeat it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.cli import describe, parse_config
from anima.config.deepspeed_json import merge_deepspeed
from anima.entry import run_command
from launch.train import answering, build_network, prepare_inputs


def main(argv: Sequence[str]) -> None:
    """Parse the flags of a training, then fill the cache."""
    config, options = parse_config(argv, prog="launch/reference_logps.py")
    from anima.distributed import read_ranks
    from anima.model.compute import claim_device, compute_for_training
    from anima.model.console import quiet_libraries

    ranks = read_ranks()
    compute = compute_for_training(config, ranks.local_rank, dry_run=options.dry_run)
    if options.dry_run:
        print(describe(config, merge_deepspeed(config, bf16=compute.is_bf16)), end="")
        return
    if compute.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    quiet_libraries(show_progress=ranks.is_main and sys.stderr.isatty())
    from anima import distributed
    from anima.tracking.progress import Progress
    from anima.train.choice import choose_method
    from anima.train.method import Place
    from anima.train.preference import ask_about_all

    method = choose_method(config)
    claim_device(compute, config.max_gpu_memory_gib)
    inputs = prepare_inputs(config, method)
    distributed.start(ranks, compute.device, config.backend)
    network = build_network(config, compute)
    tell = Progress(0, is_main=ranks.is_main).message
    for line in inputs.data.report.lines():
        tell(line)
    place = Place(config, ranks, compute, network, answering(config, inputs, network), tell)
    ask_about_all(method, inputs.data, place)
    distributed.stop()


if __name__ == "__main__":
    run_command(main)
