"""Sweeps: check a W&B sweep file before forty trials find its mistakes, or run it here without an account or network.

python launch/sweep.py check launch/sweeps/quickstart_sft.yaml
python launch/sweep.py run launch/sweeps/quickstart_sft.yaml --trials 8
python launch/sweep.py run FILE.yaml --trials 32 --at_once 8 -- --max_steps 200       eight at a time, GPUs shared out
python launch/sweep.py show FILE.yaml

Flags behind -- win over the sweep's command. A sweep that was stopped or killed goes on with the same command.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.paths import expanded
from anima.entry import run_command
from anima.errors import ConfigError
from anima.sweeps.check import check_sweep, extra_flags
from anima.sweeps.journal import Journal, Trial
from anima.sweeps.sweep_file import ONLY_WANDB, Sweep, read_sweep
from anima.sweeps.table import measured, table_lines
from anima.sweeps.trial import Place


def main(argv: Sequence[str]) -> None:
    """Read the command line and do what the word says."""
    own, behind = (list(argv[: argv.index("--")]), argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    options = parse(own)
    sweep = read_sweep(options.file)
    extra = extra_flags(behind)
    folder = options.sweep_dir or Path("runs/sweeps") / Path(options.file).stem
    if options.word != "check":
        check_packages()
    if options.word == "show":
        finish(sweep, folder, Journal.open(folder, sweep).trials() if folder.is_dir() else [])
        return
    remarks = check_sweep(sweep, extra)
    for line in remarks:
        print(line)
    if options.word == "check":
        print(f"{options.file}: every trial can start")
        return
    run(sweep, folder, extra, options)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description="Check a sweep, run it locally, or show its trials.")
    parser.add_argument("word", choices=("check", "run", "show"))
    parser.add_argument("file", help="a sweep in W&B's format, such as launch/sweeps/quickstart_sft.yaml")
    parser.add_argument("--trials", type=int, help="run: trials in all; a grid without it runs all its points")
    parser.add_argument("--at_once", type=int, default=1, help="run: trials at the same time; GPUs are shared out")
    parser.add_argument("--sweep_dir", type=expanded, help="folder of the trials; default runs/sweeps/NAME OF THE FILE")
    parser.add_argument("--seed", type=int, default=42, help="run: seed of what is chosen at random")
    parser.add_argument("--worker", default="local", help="run: name among processes that share the folder")
    return parser.parse_args(argv)


def check_packages() -> None:
    """Refuse to begin without what chooses trials and draws them."""
    if missing := [name for name in ("optuna", "matplotlib") if find_spec(name) is None]:
        fix = "pip install 'anima[sweeps]', or in the repository: make venv"
        raise ConfigError("a package is not installed", where="launch/sweep.py", got=" ".join(missing), fix=fix)


def run(sweep: Sweep, folder: Path, extra: dict[str, str], options: argparse.Namespace) -> None:
    """Run trials, then show them."""
    from anima.sweeps.running import LocalSweep
    from anima.sweeps.sampler import check_local

    check_local(sweep)
    if options.trials is None and sweep.method != "grid":
        raise ConfigError(f"{sweep.method} has no end of its own", where="--trials", fix="--trials 20")
    if options.at_once < 1:
        raise ConfigError("no trial at all", where="--at_once", got=options.at_once, allowed="1 or more")
    if options.seed < 0:
        raise ConfigError("a seed is a natural number", where="--seed", got=options.seed, allowed="0 or more")
    if ignored := [key for key in ONLY_WANDB if key in sweep.lines]:
        print(f"without effect here, only on W&B: {', '.join(ignored)}; --trials trials run, each to its end")
    local = LocalSweep(
        sweep=sweep,
        journal=Journal.open(folder, sweep),
        places=[Place(folder, extra, gpus) for gpus in share_gpus(options.at_once)],
        num_trials=sys.maxsize if options.trials is None else options.trials,
        seed=options.seed,
        worker=options.worker,
        tell=lambda text: print(text, flush=True),
    )
    finish(sweep, folder, local.run())


def share_gpus(at_once: int) -> list[list[str] | None]:
    """The GPUs of each of the trials that run at the same time; None where there is nothing to share out."""
    if at_once == 1:
        return [None]
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if not gpus or not torch.cuda.is_available():
        return [None] * at_once
    if len(gpus) < at_once:
        raise ConfigError("fewer GPUs than trials", where="--at_once", got=f"{at_once} trials, {len(gpus)} GPUs")
    each = len(gpus) // at_once
    return [gpus[index * each : (index + 1) * each] for index in range(at_once)]


def finish(sweep: Sweep, folder: Path, trials: Sequence[Trial]) -> None:
    """The table, the picture, and what to type next."""
    from anima.sweeps.plot import draw

    if not trials:
        raise ConfigError("there are no trials", where=folder, fix="python launch/sweep.py run FILE --trials 8")
    print("\n".join(["", *table_lines(sweep, trials), ""]))
    picture = folder / "sweep.png"
    if draw(sweep, trials, picture):
        best = measured(sweep, trials)[0]
        print(f"picture  {picture}")
        print(f"best     {folder / best.name}")
        print(f"Next:\n  python launch/chat.py --adapter {folder / best.name / 'adapter'}")


if __name__ == "__main__":
    run_command(main)
