"""A model folder in NF4 with random weights, as stock transformers loads it, without 65 GB of 16 bit before.

    python tests/gpu/make_shape.py --shape llama-33b --train_files DATA… --output_dir /tmp/llama-33b
    python tests/gpu/make_nf4.py --shape_dir /tmp/llama-33b --output_dir /dev/shm/llama-33b-nf4

For start-up times of launch/train.py, and as the checkpoint of peers in bench_sft_peers.py.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape_dir", type=Path, required=True, help="a folder of make_shape.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder; 17.3 GiB for llama-33b")
    options = parser.parse_args()
    save_random_nf4(options.shape_dir, options.output_dir)
    print(f"{options.output_dir}: {sum(path.stat().st_size for path in options.output_dir.iterdir()) / 2**30:.1f} GiB")


def save_random_nf4(shape: Path, folder: Path) -> None:
    """Random weights as load_base makes them on this machine's GPU, or CPU; all of the folder or nothing."""
    import torch

    from anima.config.schema import ModelConfig
    from anima.model.base_model import load_base
    from anima.model.compute import choose_compute, claim_device
    from anima.model.nf4 import Quantized, nf4_layers, nf4_settings
    from anima.model.prequantize import copy_companions
    from anima.model.weights import ShardWriter

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    compute = choose_compute("auto", "bf16", 0)
    claim_device(compute, None)
    model = load_base(ModelConfig(model_name_or_path=str(shape), random_weights=True), compute)
    writer, quantized = ShardWriter(part), {}
    for name, layer in nf4_layers(model).items():
        state = layer.weight.quant_state
        assert state is not None
        quantized[f"{name}.weight"] = Quantized(layer.weight.data, state)
    for name, parameter in model.named_parameters():
        tensors = quantized[name].stored(name) if name in quantized else {name: parameter.data}
        writer.add({key: value.cpu().contiguous() for key, value in tensors.items()})
    writer.finish()
    copy_companions(shape, part)
    config = json.loads((shape / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    settings = nf4_settings(torch.bfloat16).to_dict()
    (part / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": settings}))
    part.rename(folder)


if __name__ == "__main__":
    main()
