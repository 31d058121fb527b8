"""Speed of the ancestor's DPO recipe on the 33B shape, and against TRL on its 8-layer cut, on one GPU, without network.

    python tests/gpu/bench_dpo.py --output_dir /tmp/bench --pairs PAIRS.jsonl
    python tests/gpu/bench_dpo.py --output_dir /tmp/bench --pairs PAIRS.jsonl --against trl

Ours is launch/train.py with launch/configs/anima_33b_dpo.yaml, on random weights. TRL gets the same pairs, after our
limits, as text, a saved checkpoint of the same shape, and the settings that were its fastest (micro-batch 16, Liger).
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
RECIPE = REPOSITORY / "launch" / "configs" / "anima_33b_dpo.yaml"
RECIPE_STEPS, RECIPE_PAIRS = 100, 16
WARM_UP_STEPS = 2
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass
class Result:
    """What one run measured."""

    name: str
    seconds_per_step: float
    tokens_per_second: float
    peak_gib: float
    reference_seconds_per_pair: float = 0.0
    pairs: int = 0

    @property
    def seconds_with_reference(self) -> float:
        """A step whose pairs were never asked about before."""
        return self.seconds_per_step + RECIPE_PAIRS * self.reference_seconds_per_pair

    @property
    def tokens_with_reference(self) -> float:
        """Policy tokens a second over such steps."""
        return self.tokens_per_second * self.seconds_per_step / self.seconds_with_reference


def main() -> None:
    """Run ours, or be the process that runs TRL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="models, runs and results; a new folder")
    parser.add_argument("--pairs", nargs="+", type=Path, required=True, help="files of preference pairs")
    parser.add_argument("--steps", type=int, default=10, help=f"steps of each run, {WARM_UP_STEPS} of them warm-up")
    parser.add_argument("--shape", default="llama-33b", help="a shape of make_shape.py, for the run on its own")
    parser.add_argument("--against", choices=["trl"], help="compare with it on llama-33b-8-layers, in this command")
    parser.add_argument("--only_against", action="store_true", help="leave the run on --shape out")
    parser.add_argument("--trl_micro_batch", type=int, default=RECIPE_PAIRS, help="pairs of a TRL micro-batch")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU: does this script run?")
    parser.add_argument("--ours", nargs="*", default=[], metavar="FLAG=VALUE", help="more flags for launch/train.py")
    parser.add_argument("--tokens_per_pair", type=int, default=550, help="of the original tokenizer, to extrapolate")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    results = []
    if not options.only_against:
        shape = make_shape(options, options.shape)
        result = run_ours(options, shape, options.shape)
        results.append(result)
        print_recipe(result, options.tokens_per_pair)
    if options.against:
        shape = make_shape(options, "llama-33b-8-layers")
        ours = run_ours(options, shape, "llama-33b-8-layers")
        theirs = start_trl(options, shape)
        results += [ours, theirs]
        print_ratio(ours, theirs)
    (options.output_dir / "bench_dpo.json").write_text(json.dumps([vars(result) for result in results], indent=1))


def make_shape(options: argparse.Namespace, name: str) -> Path:
    """A model folder without weights, its tokenizer trained on the pairs."""
    folder: Path = options.output_dir / name
    if not (folder / "config.json").exists():
        script = str(REPOSITORY / "tests" / "gpu" / "make_shape.py")
        files = [str(path) for path in options.pairs]
        arguments = ["--shape", name, "--train_files", *files, "--output_dir", str(folder)]
        subprocess.run([sys.executable, script, *arguments], check=True)
        if options.rehearse:
            config = json.loads((folder / "config.json").read_text())
            config = {**config, **TINY, "num_key_value_heads": 4, "head_dim": 16}
            (folder / "config.json").write_text(json.dumps(config))
    return folder


def flags(options: argparse.Namespace, shape: Path) -> list[str]:
    """The recipe, with what a benchmark changes of it: no weights, no evaluation, few steps."""
    changed = [
        *("--config", str(RECIPE), "--model_name_or_path", str(shape), "--train_files", *map(str, options.pairs)),
        *("--max_steps", str(options.steps), "--eval_size", "0", "--eval_steps", "0", "--save_steps", "0"),
        *("--tracker", "jsonl", "--sample_prompts"),
        *("--data_cache_dir", str(options.output_dir / "data")),
    ]
    rehearsal = ["--device", "cpu", "--compute_dtype", "auto", "--lora_r", "8"] if options.rehearse else []
    return [*changed, *rehearsal, *(f"--{flag}" for flag in options.ours)]


def run_ours(options: argparse.Namespace, shape: Path, name: str) -> Result:
    """launch/train.py in a process of its own; the reference pass is timed by the lines that it prints."""
    run = options.output_dir / f"run-{name}"
    references = options.output_dir / f"reference-{name}"
    for folder in (run, references):
        shutil.rmtree(folder, ignore_errors=True)
    command = [
        *(sys.executable, str(REPOSITORY / "launch" / "train.py"), *flags(options, shape), "--random_weights", "True"),
        *("--output_dir", str(run), "--reference_cache_dir", str(references)),
    ]
    print(f"== ours, {name}: {' '.join(command)}", flush=True)
    asked: list[tuple[float, int]] = []
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            print(line, end="", file=sys.stderr, flush=True)
            if line.startswith("reference, train:"):
                asked.append((time.perf_counter(), int(line.split()[2].replace(",", ""))))
    if process.returncode:
        sys.exit(process.returncode)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "perf/step_seconds" in line][WARM_UP_STEPS:]
    seconds = sum(line["perf/step_seconds"] for line in steps)
    tokens = sum(line["perf/tokens_per_second"] * line["perf/step_seconds"] for line in steps)
    (begun, known), (ended, done) = asked[0], asked[-1]
    return Result(
        f"anima, {name}",
        seconds / len(steps),
        tokens / seconds,
        max(line["memory/peak_gib"] for line in steps),
        (ended - begun) / max(1, done - known),
        pairs_of(options, shape)[1],
    )


def pairs_of(options: argparse.Namespace, shape: Path) -> tuple[Any, int]:
    """The pairs as launch/train.py trains on them, and their number."""
    from transformers import AutoTokenizer

    from anima.config.cli import parse_config
    from anima.data.kinds import PAIRS
    from anima.data.prepare import prepare_records

    config, _ = parse_config([*flags(options, shape), "--output_dir", "unused"])
    tokenizer = AutoTokenizer.from_pretrained(shape)
    train = prepare_records(PAIRS, config.data, tokenizer, seed=config.seed).train
    return train, len(train)


def print_recipe(result: Result, tokens_per_pair: int) -> None:
    """What 100 steps of the recipe take, with this tokenizer and with one that makes more tokens of Chinese."""
    asked = min(result.pairs, RECIPE_STEPS * RECIPE_PAIRS)
    reference = result.reference_seconds_per_pair * asked
    total = RECIPE_STEPS * result.seconds_per_step + reference
    tokens_here = result.tokens_per_second * result.seconds_per_step / RECIPE_PAIRS
    longer = tokens_per_pair / tokens_here
    print(
        f"\n{result.name}: {result.seconds_per_step:.2f} s/step of {RECIPE_PAIRS} pairs, "
        f"{result.tokens_per_second:,.0f} tokens/s (both sides, policy), peak {result.peak_gib:.1f} GiB\n"
        f"reference: {result.reference_seconds_per_pair * 1000:.0f} ms a pair, {reference:.0f} s for {asked:,} pairs\n"
        f"{RECIPE_STEPS} steps with the reference pass: {total / 60:.1f} minutes at {tokens_here:.0f} tokens a pair; "
        f"at {tokens_per_pair} and the same speed {longer * total / 60:.1f} minutes\n",
        flush=True,
    )


def print_ratio(ours: Result, theirs: Result) -> None:
    """Ours against theirs; their step holds the reference's forward pass, so ours is counted with it too."""
    for result in (ours, theirs):
        print(
            f"{result.name}: {result.seconds_with_reference:.2f} s/step with the reference, "
            f"{result.tokens_with_reference:,.0f} tokens/s, peak {result.peak_gib:.1f} GiB"
        )
    first = ours.tokens_with_reference / theirs.tokens_with_reference
    later = ours.tokens_per_second / theirs.tokens_with_reference
    print(f"ratio {first:.2f} where every pair is new, {later:.2f} where it was asked about before\n", flush=True)


def start_trl(options: argparse.Namespace, shape: Path) -> Result:
    """TRL in a process of its own, on a checkpoint of the shape and the pairs of as many steps."""
    train, _ = pairs_of(options, shape)
    save_pairs(train, shape, options.output_dir / "trl_pairs.jsonl", options.steps * RECIPE_PAIRS)
    report = options.output_dir / "trl.json"
    command = [
        *(sys.executable, str(Path(__file__).with_name("bench_dpo_trl.py")), "--shape_dir", str(shape)),
        *("--work_dir", str(options.output_dir), "--report", str(report), "--steps", str(options.steps)),
        *("--micro_batch", str(options.trl_micro_batch), "--lora_r", "8" if options.rehearse else "256"),
    ]
    print(f"== trl {importlib.metadata.version('trl')}", flush=True)
    subprocess.run(command, check=True)
    return Result(**json.loads(report.read_text()))


def save_pairs(train: Any, shape: Path, path: Path, count: int) -> None:
    """The first pairs of our order as text, with their tokens in our tokenization; repeated if they are too few."""
    from transformers import AutoTokenizer

    from anima.data.encode import IGNORE_INDEX
    from anima.data.order import shuffled

    tokenizer = AutoTokenizer.from_pretrained(shape)
    order = [int(i) for epoch in range(1 + count // len(train)) for i in shuffled(len(train), 42, 2, epoch)]
    with path.open("w", encoding="utf-8") as file:
        for number in order[:count]:
            row: dict[str, object] = {"tokens": sum(map(len, train[number]))}  # whole sides, as our tokens/s count
            for name, side in zip(("chosen", "rejected"), train[number], strict=True):
                scored = side.labels != IGNORE_INDEX
                row["prompt"] = tokenizer.decode(side.input_ids[~scored])
                row[name] = tokenizer.decode(side.input_ids[scored][:-1])  # TRL adds the end token itself
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
