"""What a person is told before the first step: data, base, compute, adapter, optimizer, steps. Only words."""

from collections.abc import Sequence

from anima.config.schema import Config
from anima.model.attention import SHORT, serves_short, uses_flash
from anima.model.compute import Compute
from anima.model.lora import layers_outside_fp8, trainable_parameters
from anima.model.packed import PackedModel
from anima.train.engine import Engine


def opening_lines(
    config: Config,
    compute: Compute,
    network: PackedModel,
    engine: Engine,
    report: Sequence[str],
    num_steps: int,
    chosen: str,
) -> list[str]:
    """What is about to run; `report` is what the data has to say, `chosen` what --recompute auto has."""
    numel = sum(parameter.numel() for parameter in trainable_parameters(network).values())
    unpaged = config.optimization.optimizer.startswith("paged") and compute.device.type == "cpu"
    unit = "sequences" if config.objective == "sft" else "pairs"
    flash = uses_flash(compute.device, compute.dtype, network.head_dim)
    short = flash and serves_short(compute.device, network.head_dim)
    attention = "variable-length flash" if flash else "a loop over documents"
    attention += f", up to {SHORT:,} tokens a document by our kernels" if short else ""
    left = layers_outside_fp8(network.adapted) if compute.fp8 else []
    bf16 = f"; {len(left)} layers stay out of fp8 ({', '.join(left[:3])}, …)" if left else ""
    return [
        *report,
        f"base {config.model.model_name_or_path}, {config.model.quantization}, fingerprint {engine.base_fingerprint}",
        f"compute {compute.reason}; attention {attention}{bf16}",
        f"adapter {numel:,} trainable parameters, sharded over {engine.ranks.world_size} rank(s) by ZeRO-2",
        f"optimizer {config.optimization.optimizer}{' (unpaged on a CPU)' if unpaged else ''}, ZeRO-2 settings from "
        f"{config.deepspeed}",
        f"steps {num_steps:,} of {config.batch.global_batch_size} {unit}",
        *([chosen] if chosen else []),
    ]
