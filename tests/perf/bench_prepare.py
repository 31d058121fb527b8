"""Rows a second, memory and start time of preparing synthetic rows: the table of README.md.

python tests/perf/bench_prepare.py --model_dir .models/smollm2-135m-instruct --rows 10000 100000 1000000

Each preparation is a process of its own, so that its peak memory is its own; that of the processes that it starts is
sampled from /proc. "Start" is a second preparation with everything cached, up to the micro-batches of the first step.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = """the model learns what it is shown a question an answer some numbers of light and water under old bridges
we measure time in rows how far is the sea from here write a list of three names explain why it rains"""
WORDS = TEXT.split()


def write_rows(path: Path, count: int) -> None:
    """Alpaca rows of random words, about 110 tokens each in a chat template."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked = " ".join(generator.choices(WORDS, k=generator.randint(5, 40)))
            answer = " ".join(generator.choices(WORDS, k=generator.randint(10, 100)))
            file.write(json.dumps({"instruction": f"{number}: {asked}?", "input": "", "output": f"{answer}."}) + "\n")


def one_preparation(model_dir: str, rows: str, cache: str, workers: int | None) -> dict[str, float]:
    """In this process: prepare, and make the first step's micro-batches; seconds and bytes."""
    begin = time.perf_counter()
    from transformers import AutoTokenizer

    from anima.config.schema import DataConfig
    from anima.data.loader import StepLoader
    from anima.data.prepare import prepare

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    imported = time.perf_counter()
    config = DataConfig(train_files=(rows,), data_cache_dir=cache, data_workers=workers)
    data = prepare(config, tokenizer, seed=42)
    prepared = time.perf_counter()
    loader = StepLoader(
        data.train,
        global_batch_size=64,
        micro_batch_tokens=8192,
        packing=True,
        seed=42,
        rank=0,
        world_size=1,
    )
    loader.step(0)
    first_step = time.perf_counter()
    return {
        "imports": imported - begin,
        "prepare": prepared - imported,
        "first_step": first_step - prepared,
        "tokens": data.report.train.tokens,
        "reused": data.report.train_cache.reused,
    }


def private_bytes(pid: int) -> int:
    """Memory of a process that no file backs; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for parent in found:
        try:
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
        except OSError:
            continue
    return found


def measured(command: list[str]) -> dict[str, float]:
    """Run a preparation and add the peak memory of its processes: the first one's, and of all together."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    peaks = {"main_gib": 0.0, "all_gib": 0.0}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.2):
            sizes = [private_bytes(pid) for pid in family(process.pid)]
            peaks["main_gib"] = max(peaks["main_gib"], sizes[0] / 2**30)
            peaks["all_gib"] = max(peaks["all_gib"], sum(sizes) / 2**30)

    sampler = threading.Thread(target=sample)
    sampler.start()
    output, _ = process.communicate()
    done.set()
    sampler.join()
    return {**json.loads(output.splitlines()[-1]), **peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default=str(REPOSITORY / ".models" / "smollm2-135m-instruct"))
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--one", nargs=2, metavar=("ROWS", "CACHE"), help="used by this script itself")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_preparation(options.model_dir, *options.one, options.workers)))
        return
    print(
        "| rows | tokens | first start | rows/s | memory, main process | memory, all | start once cached | of it data |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for count in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            path, cache = Path(folder) / "rows.jsonl", Path(folder) / "cache"
            write_rows(path, count)
            time.sleep(2.1)  # files written moments ago are not remembered by their time stamps
            command = [sys.executable, __file__, "--model_dir", options.model_dir, "--one", str(path), str(cache)]
            command += ["--workers", str(options.workers)] if options.workers else []
            first, again = measured(command), measured(command)
        data = again["prepare"] + again["first_step"]
        cells = [
            f"{count:,}",
            f"{first['tokens'] / 1e6:.1f} M",
            f"{first['prepare']:.1f} s",
            f"{count / first['prepare']:,.0f}",
            f"{first['main_gib']:.2f} GiB",
            f"{first['all_gib']:.2f} GiB",
            f"{again['imports'] + data:.1f} s",
            f"{data:.2f} s",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
