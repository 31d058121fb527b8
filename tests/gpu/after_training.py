"""What comes after training, timed on the shape of a large model: NF4 conversion, merge, host memory, tokens a second.

    python tests/gpu/make_shape.py --shape llama-33b --train_files data/*.json --output_dir /tmp/33b
    python tests/gpu/after_training.py --shape_dir /tmp/33b --work_dir /scratch/after --json after.json
    python tests/gpu/after_training.py --shape_dir TINY --work_dir /tmp/after --device cpu --batches 1 2 --new_tokens 4

Shards with random weights are generated in bf16 (65 GB for 33B; the NF4 folder takes 18, each merge 65: 150 GB of disk
and 24 GiB of host memory). Every step runs in a process of its own, so that its peak of host memory
is its own; page cache and mapped files in use count in it.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

STEPS = ("generate", "prequantize", "start", "adapter", "merge_nf4", "merge_original", "speed")
LORA_R = 64


def main() -> None:
    """Run all steps, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape_dir", type=Path, required=True, help="config.json and tokenizer (make_shape.py)")
    parser.add_argument("--work_dir", type=Path, required=True, help="scratch folder; emptied at the end")
    parser.add_argument("--merged_dir", type=Path, help="another scratch folder for the merged model; not needed twice")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--shard_gib", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--inside", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measured(options)))
        return
    options.work_dir.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {"versions": {n: version(n) for n in ("torch", "transformers", "peft", "bitsandbytes")}}
    for step in options.steps:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--inside", step], stdout=subprocess.PIPE, text=True, check=True
        )
        numbers[step] = json.loads(done.stdout.splitlines()[-1])
        print(f"{step}: {numbers[step]}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(numbers, indent=1) + "\n")


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """One step with its seconds and its peak of host memory."""
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)
    from anima.model.compute import choose_compute

    compute = choose_compute(options.device, "auto", 0)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began = time.perf_counter()
    found = globals()[options.inside](options, compute)
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
        found["gpu_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "host_before_gib": round(imported, 2),
        "device": compute.name,
        "dtype": str(compute.dtype),
        **found,
    }


def generate(options: argparse.Namespace, compute: Any) -> dict[str, Any]:
    """Random weights of the shape in bf16, shard by shard."""
    import torch

    from anima.config.schema import ModelConfig
    from anima.model.base_model import load_settings, skeleton
    from anima.model.prequantize import copy_companions
    from anima.model.weights import ShardWriter

    folder = options.work_dir / "source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = load_settings(ModelConfig(model_name_or_path=str(options.shape_dir)))
    writer = ShardWriter(folder, int(options.shard_gib * 2**30))
    generator = torch.Generator(compute.device).manual_seed(0)
    for name, parameter in skeleton(settings).named_parameters():
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=compute.device)
        value.fill_(1) if "norm" in name else value.normal_(0, settings.initializer_range, generator=generator)
        writer.add({name: value})
    writer.finish()
    copy_companions(options.shape_dir, folder)
    config = json.loads((options.shape_dir / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return {"gib": round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30, 2)}


def prequantize(options: argparse.Namespace, compute: Any) -> dict[str, Any]:
    """16 bit to NF4, read back."""
    from anima.model.prequantize import prequantize as convert

    shutil.rmtree(options.work_dir / "nf4", ignore_errors=True)
    made = convert(
        str(options.work_dir / "source"),
        options.work_dir / "nf4",
        compute,
        shard_bytes=int(options.shard_gib * 2**30),
    )
    return {"gib": made.gib, "source_gib": made.source_gib}


def start(options: argparse.Namespace, compute: Any) -> dict[str, Any]:
    """Loading the base for training: from the NF4 folder, cold and warm, against quantising on the fly."""
    import gc

    from anima.config.schema import ModelConfig
    from anima.model.base_model import load_base
    from anima.model.nf4 import fingerprint

    found: dict[str, Any] = {}
    prints = set()
    for name, folder in (("nf4_first", "nf4"), ("nf4_again", "nf4"), ("on_the_fly", "source")):
        began = time.perf_counter()
        base = load_base(ModelConfig(model_name_or_path=str(options.work_dir / folder)), compute)
        found[f"{name}_seconds"] = round(time.perf_counter() - began, 1)
        prints.add(fingerprint(base))
        del base
        gc.collect()
    return {**found, "same_fingerprint": len(prints) == 1}


def adapter(options: argparse.Namespace, compute: Any) -> dict[str, Any]:
    """An adapter of random matrices, as a run leaves it."""
    import torch

    from anima.config.schema import LoraConfig, ModelConfig
    from anima.data.templates import make_template
    from anima.inference.adapter_folder import AdapterRecord, rendering_of, writer
    from anima.model.base_model import load_base
    from anima.model.lora import attach_lora, lora_b_parameters
    from anima.model.nf4 import fingerprint
    from anima.model.tokenizer import load_tokenizer

    config = ModelConfig(model_name_or_path=str(options.work_dir / "nf4"))
    base, tokenizer = load_base(config, compute), load_tokenizer(config)
    template = make_template("alpaca", tokenizer)
    before = fingerprint(base)
    adapted = attach_lora(base, LoraConfig(lora_r=LORA_R, lora_alpha=16), dtype=compute.dtype, seed=1)
    generator = torch.Generator(compute.device).manual_seed(1)
    for parameter in lora_b_parameters(adapted).values():
        parameter.data.normal_(0, 0.01, generator=generator)
    place = f"{compute.device.type} {str(compute.dtype).removeprefix('torch.')}"
    record = AdapterRecord(config.model_name_or_path, before, "nf4", "alpaca", rendering_of(template), "sft", "", place)
    folder = options.work_dir / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer(adapted, tokenizer, record)(folder)
    return {"fingerprint": before}


def merge_nf4(options: argparse.Namespace, compute: Any) -> dict[str, Any]:
    """Into the NF4 base as trained."""
    return _merge(options, compute, "nf4")


def merge_original(options: argparse.Namespace, compute: Any) -> dict[str, Any]:
    """Into the 16-bit original."""
    return _merge(options, compute, "original")


def _merge(options: argparse.Namespace, compute: Any, into: Any) -> dict[str, Any]:
    from anima.inference.merged_folder import MergeRequest
    from anima.inference.merging import prepare_merge, run_merge

    out = (options.merged_dir or options.work_dir) / "merged"
    shutil.rmtree(out, ignore_errors=True)
    request = MergeRequest(
        (str(options.work_dir / "adapter"),),
        str(out),
        into=into,
        allow_drift=True,
        shard_bytes=int(options.shard_gib * 2**30),
    )
    drifts = run_merge(prepare_merge(request, compute), lambda done, total: None)
    gib = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 2**30
    shutil.rmtree(out)
    return {"gib": round(gib, 2), "drift": {name: vars(drift) for name, drift in drifts.items()}}


def speed(options: argparse.Namespace, compute: Any) -> dict[str, Any]:
    """Tokens a second of greedy answers, NF4 with the adapter in force, by batch; a short answer warms up."""
    import torch

    from anima.inference.chat import SpeakerSettings, load_speakers
    from anima.inference.generate import generate_tokens
    from anima.model.packed import generating
    from anima.model.replay import recorder_for

    speakers = load_speakers(SpeakerSettings({"sft": options.work_dir / "adapter"}, device=options.device))
    found: dict[str, Any] = {}
    with speakers.network("sft") as (model, tokenizer), generating(model):
        for batch in options.batches:
            prompts = torch.randint(3, len(tokenizer), (batch, options.prompt_tokens)).tolist()
            seconds, made = 0.0, 0
            for number in (4, options.new_tokens):
                began = time.perf_counter()
                answers = generate_tokens(
                    model, tokenizer, prompts, max_new_tokens=number, recorder=recorder_for(model.device)
                )
                seconds, made = time.perf_counter() - began, sum(map(len, answers))
            found[f"batch_{batch}_tokens_per_second"] = round(made / seconds, 1)
    return found


if __name__ == "__main__":
    main()
