"""Held-out rows that no seed changes, and the loss of saved adapters on them by one code, whoever trained them.

    python tests/gpu/held_out.py --model MODEL --rows HELD_OUT.jsonl… --adapters RUN/adapter… --json metrics.json

The base is NF4, the computation bf16 (fp32 on a CPU), whatever the training computed in, by the objectives of
launch/train.py; for dpo the base is the reference and beta 0.1. Used by fp8_curves.py and time_to_loss.py.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from turns import REPOSITORY, wait_for_turn

sys.path.insert(0, str(REPOSITORY))
SPLIT_SEED = 0


def main() -> None:
    """Measure every adapter; their folders and metrics as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model's folder, in 16 bit or NF4")
    parser.add_argument("--rows", nargs="+", required=True, help="files of held-out rows")
    parser.add_argument("--objective", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--adapters", nargs="+", type=Path, required=True, help="PEFT folders of one shape")
    parser.add_argument("--max_seq_length", type=int, default=1024)
    parser.add_argument("--micro_batch_tokens", type=int, default=8192)
    parser.add_argument("--data_cache_dir", required=True)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--in_turn", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.json.write_text(json.dumps(measure(options)))


def split_files(files: list[Path], folder: Path, share: float) -> tuple[list[str], list[str]]:
    """Part every file of rows (.json or .jsonl) into rows to train on and rows held out, the same ones at every call.

    Returns:
        Names of the files to train on and of the held-out ones, in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: tuple[list[str], list[str]] = ([], [])
    for number, path in enumerate(files):
        text = path.read_text("utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        order = list(range(len(rows)))
        random.Random(SPLIT_SEED).shuffle(order)
        count = max(1, round(share * len(rows)))
        for kind, numbers, names in (("train", order[count:], parts[0]), ("held", order[:count], parts[1])):
            lines = (json.dumps(rows[i], ensure_ascii=False) for i in sorted(numbers))
            written = folder / f"{number}-{path.stem}-{kind}.jsonl"
            written.write_text("".join(f"{line}\n" for line in lines), "utf-8")
            names.append(str(written))
    return parts


def metrics_of(
    adapters: list[Path], *, model: str, rows: list[str], work_dir: Path, flags: list[str]
) -> list[dict[str, float]]:
    """The held-out metrics of every adapter, measured in a process of its own that leaves the GPU afterwards."""
    command = metrics_command(adapters, model=model, rows=rows, work_dir=work_dir, flags=flags)
    subprocess.run(command, check=True, cwd=REPOSITORY)
    found: dict[str, dict[str, float]] = json.loads((work_dir / "held_out.json").read_text())
    return [found[str(folder)] for folder in adapters]


def metrics_command(
    adapters: list[Path], *, model: str, rows: list[str], work_dir: Path, flags: list[str]
) -> list[str]:
    """What measures adapters into held_out.json in `work_dir`."""
    return [
        *(sys.executable, __file__, "--model", model, "--rows", *rows, "--adapters", *map(str, adapters)),
        *("--data_cache_dir", str(work_dir / "data"), "--json", str(work_dir / "held_out.json"), *flags),
    ]


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Adapter's folder -> means of the objective's metrics; the base is loaded once."""
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)  # before bitsandbytes is imported
    import torch

    from anima.config.preference import PreferenceConfig
    from anima.config.schema import DataConfig, LoraConfig, ModelConfig
    from anima.data.kinds import CONVERSATIONS, PAIRS
    from anima.data.prepare import prepare_records
    from anima.model.base_model import load_base
    from anima.model.compute import choose_compute, claim_device
    from anima.model.lora import adapter_tensors, attach_lora, trainable_parameters
    from anima.model.packed import PackedModel
    from anima.model.tokenizer import load_tokenizer
    from anima.objectives.preference import PreferenceOptimization
    from anima.objectives.sft import SupervisedFineTuning

    if options.in_turn:
        wait_for_turn()
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    compute = choose_compute("cuda" if on_gpu else "cpu", "bf16" if on_gpu else "fp32", 0)
    claim_device(compute, None)
    model = ModelConfig(model_name_or_path=options.model)
    data = DataConfig(
        train_files=tuple(options.rows), max_seq_length=options.max_seq_length, data_cache_dir=options.data_cache_dir
    )
    pairs = options.objective == "dpo"
    kind: Any = PAIRS if pairs else CONVERSATIONS
    rows: Any = prepare_records(kind, data, load_tokenizer(model), seed=0).train
    stored = json.loads((options.adapters[0] / "adapter_config.json").read_text("utf-8"))
    lora = LoraConfig(lora_r=stored["r"], lora_alpha=stored["lora_alpha"])
    adapted = attach_lora(load_base(model, compute), lora, dtype=compute.dtype, seed=0)  # B = 0: the base
    network = PackedModel(adapted, "none").eval()
    parameters = {name.replace(".default.", "."): p for name, p in trainable_parameters(adapted).items()}
    objective: Any = PreferenceOptimization(PreferenceConfig()) if pairs else SupervisedFineTuning()
    found = {}
    with torch.no_grad():
        if pairs:
            rows = with_reference(rows, network, options.micro_batch_tokens, compute.device)
        for folder in options.adapters:
            tensors = adapter_tensors(folder)
            if tensors.keys() != parameters.keys():
                sys.exit(f"{folder} holds other matrices than a new adapter of its rank")
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
            found[str(folder)] = means(objective, rows, network, options.micro_batch_tokens, compute.device)
    return found


def with_reference(rows: Any, network: Any, budget: int, device: Any) -> Any:
    """The pairs with the log-probabilities of the network as it is."""
    import torch

    from anima.data.loader import EvalLoader
    from anima.objectives.preference import pair_logps
    from anima.train.reference_pass import NetworkPolicy

    policy = NetworkPolicy(network)
    logps = [
        torch.stack((found.chosen, found.rejected), dim=1)
        for batch in EvalLoader(rows, micro_batch_tokens=budget, packing=True, rank=0, world_size=1)
        for found in [pair_logps(policy, batch.to(device))]
    ]
    return rows.with_reference(torch.cat(logps).float().cpu().numpy())


def means(objective: Any, rows: Any, network: Any, budget: int, device: Any) -> dict[str, float]:
    """As anima/train/evaluate.py does it, without an engine."""
    from anima.data.loader import EvalLoader
    from anima.train.metrics import MetricSums
    from anima.train.reference_pass import NetworkPolicy

    sums, policy = MetricSums(), NetworkPolicy(network)
    for batch in EvalLoader(rows, micro_batch_tokens=budget, packing=True, rank=0, world_size=1):
        for name, metric in objective(policy, batch.to(device)).metrics.items():
            sums.add(name, metric)
    return sums.reduce()


if __name__ == "__main__":
    main()
