"""What a person is told before a run begins: data, base, precision, adapter, optimizer, steps."""

from anima.config.schema import Config
from anima.data.report import PreparationReport
from anima.model.attention import uses_flash
from anima.model.compute import Compute
from anima.model.lora import trainable_parameters
from anima.model.packed import PackedModel
from anima.train.engine import Engine


def announcement(
    config: Config, compute: Compute, report: PreparationReport, network: PackedModel, engine: Engine, num_steps: int
) -> list[str]:
    """What is about to run, line by line."""
    numel = sum(parameter.numel() for parameter in trainable_parameters(network).values())
    unpaged = config.optimization.optimizer.startswith("paged") and compute.device.type == "cpu"
    flash = uses_flash(compute.device, compute.dtype, network.head_dim)
    return [
        *report.lines(),
        f"base {config.model.model_name_or_path}, {config.model.quantization}, fingerprint {engine.base_fingerprint}",
        f"compute {compute.reason}; attention {'variable-length flash' if flash else 'a loop over documents'}",
        f"adapter {numel:,} trainable parameters, sharded over {engine.ranks.world_size} rank(s) by ZeRO-2",
        f"optimizer {config.optimization.optimizer}{' (unpaged on a CPU)' if unpaged else ''}, ZeRO-2 settings from "
        f"{config.deepspeed}",
        f"steps {num_steps:,} of {config.batch.global_batch_size} {report.unit}",
    ]
