"""Fine-tune: argv -> Config -> method, tokenizer, data, tracker, model, objective, engine -> run -> results.

deepspeed launch/train.py --deepspeed ds_configs/zero2.json --config launch/configs/quickstart_sft.yaml
torchrun --nproc_per_node 2 launch/train.py --config FILE.yaml --learning_rate 1e-4
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.cli import describe, parse_config, write_config
from anima.config.deepspeed_json import merge_deepspeed
from anima.config.schema import Config
from anima.entry import run_command

if TYPE_CHECKING:  # these take seconds to import: at run time after the command line has been parsed
    from transformers import PreTrainedTokenizerBase

    from anima.data.prepare import PreparedData
    from anima.data.templates import Template
    from anima.distributed import Ranks
    from anima.model.compute import Compute
    from anima.model.packed import PackedModel
    from anima.tracking.tracker import Tracker
    from anima.train.engine import Engine
    from anima.train.method import Method, Setup
    from anima.train.trainer import History, Run


def main(argv: Sequence[str]) -> None:
    """Parse, then print (`--dry_run`) or train."""
    config, options = parse_config(argv)
    from anima.distributed import read_ranks
    from anima.model.compute import choose_compute

    ranks = read_ranks()
    compute = choose_compute("auto" if options.dry_run else config.device, config.model.compute_dtype, ranks.local_rank)
    merged = merge_deepspeed(config, bf16=compute.is_bf16, trainable_numel=None)
    if options.dry_run:
        print(describe(config, merged), end="")
        return
    if compute.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported, by whichever library
    train(config, ranks, compute)


def train(config: Config, ranks: Ranks, compute: Compute) -> None:
    """The whole line; what a user can have got wrong is found before the base is loaded."""
    from anima import distributed
    from anima.train.trainer import train as run_steps

    check(config, ranks, compute)
    from anima.train.choice import choose_method

    method = choose_method(config)
    inputs = prepare_inputs(config, method)
    distributed.start(ranks, compute.device, config.backend)
    tracker = start_tracking(config, ranks)
    try:
        network = build_network(config, compute)
        setup = set_up(config, ranks, compute, inputs, network, method)
        engine = build_engine(config, ranks, compute, network)
        run = build_run(config, ranks, compute, inputs, network, setup, engine, tracker)
        history = run_steps(run)
        write_results(config, compute, inputs, network, run, history)
    except BaseException:
        tracker.finish(1)
        raise
    tracker.finish(0)
    distributed.stop()


@dataclass(frozen=True)
class Inputs:
    """What is known before any rank meets another."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    data: PreparedData[Any]


def check(config: Config, ranks: Ranks, compute: Compute) -> None:
    """Everything that can be refused in the first second."""
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=ranks.is_main and sys.stderr.isatty())  # before bitsandbytes is imported
    from anima.model.base_model import load_settings
    from anima.model.compute import claim_device
    from anima.tracking.tracker import check_tracker
    from anima.train.run_folder import check_run_folder

    check_run_folder(config.output.output_dir)
    check_tracker(config.output, is_main=ranks.is_main)
    load_settings(config.model)
    claim_device(compute, config.max_gpu_memory_gib)


def prepare_inputs(config: Config, method: Method) -> Inputs:
    """Tokenizer, template and tokenised data."""
    from anima.data.prepare import prepare_records
    from anima.data.templates import make_template
    from anima.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    template = make_template(config.data.chat_template, tokenizer, mask_answers=config.data.train_on == "assistant")
    data = prepare_records(method.records, config.data, tokenizer, seed=config.seed, template=template)
    return Inputs(tokenizer, template, data)


def start_tracking(config: Config, ranks: Ranks) -> Tracker:
    """The run's folder with its config, and the trackers; a failure of rank 0 is one of every rank."""
    from anima import distributed
    from anima.errors import AnimaError
    from anima.tracking.tracker import NullTracker, start_tracker
    from anima.train import run_folder

    tracker: Tracker = NullTracker()
    failure: AnimaError | None = None
    if ranks.is_main:
        try:
            tracker = start_tracker(config.output, resolved_config=config.flat(), is_main=True)
            write_config(config, Path(config.output.output_dir) / run_folder.CONFIG)
        except AnimaError as error:
            failure = error
    failure = distributed.from_main(failure)
    if failure is not None:
        raise failure
    return tracker


def build_network(config: Config, compute: Compute) -> PackedModel:
    """Frozen base with a trainable adapter."""
    from anima.model.base_model import load_base
    from anima.model.lora import attach_lora
    from anima.model.packed import PackedModel

    base = load_base(config.model, compute)
    adapter_path = config.model.adapter_path
    adapted = attach_lora(base, config.lora, dtype=compute.dtype, seed=config.seed, adapter_path=adapter_path)
    return PackedModel(adapted, config.optimization.recompute)


def set_up(
    config: Config, ranks: Ranks, compute: Compute, inputs: Inputs, network: PackedModel, method: Method
) -> Setup:
    """The objective with its sets; whatever it must ask the untrained network is asked here."""
    from anima.tracking.progress import Progress
    from anima.train.method import Place

    tell = Progress(0, is_main=ranks.is_main).message
    return method.set_up(inputs.data, Place(config, ranks, compute, network, answering(config, inputs, network), tell))


def answering(config: Config, inputs: Inputs, network: PackedModel) -> Callable[[Sequence[str]], list[str]]:
    """Questions to the network's answers, in the template of the training."""
    from anima.data.records import Message
    from anima.inference.chat import Answerer

    answerer = Answerer(network.causal_lm, inputs.tokenizer, inputs.template)

    def answer(prompts: Sequence[str]) -> list[str]:
        asked = [[Message("user", prompt)] for prompt in prompts]
        return answerer.answer(asked, max_new_tokens=config.output.sample_max_new_tokens)

    return answer


def build_engine(config: Config, ranks: Ranks, compute: Compute, network: PackedModel) -> Engine:
    """DeepSpeed around network and optimizer."""
    from anima.model.base_model import fingerprint
    from anima.model.lora import trainable_parameters
    from anima.train.engine import Engine
    from anima.train.optimizer import build_optimizer

    parameters = list(trainable_parameters(network).values())
    numel = sum(parameter.numel() for parameter in parameters)
    settings = merge_deepspeed(config, bf16=compute.is_bf16, trainable_numel=numel)
    return Engine(network, build_optimizer(parameters, config.optimization), settings, ranks, fingerprint)


def build_run(
    config: Config,
    ranks: Ranks,
    compute: Compute,
    inputs: Inputs,
    network: PackedModel,
    setup: Setup,
    engine: Engine,
    tracker: Tracker,
) -> Run:
    """The loop's parts, and the lines that tell a person what is about to happen."""
    from anima.data.loader import EvalLoader, StepLoader
    from anima.model.lora import lora_b_parameters
    from anima.tracking.progress import Progress
    from anima.train.announcement import announcement
    from anima.train.step import GradientProbe
    from anima.train.trainer import Run

    batch, optimization, held_out = config.batch, config.optimization, None
    place: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
    budget: dict[str, Any] = {"micro_batch_tokens": batch.micro_batch_tokens, "packing": batch.packing}
    steps = StepLoader(setup.train, global_batch_size=batch.global_batch_size, seed=config.seed, **place, **budget)
    if setup.held_out is not None:
        held_out = EvalLoader(setup.held_out, **place, **budget)
    num_steps = optimization.max_steps or steps.num_steps(optimization.num_train_epochs)
    progress = Progress(num_steps, is_main=ranks.is_main)
    for line in announcement(config, compute, inputs.data.report, network, engine, num_steps):
        progress.message(line)
    return Run(
        config=config,
        num_steps=num_steps,
        num_train_epochs=None if optimization.max_steps else optimization.num_train_epochs,
        engine=engine,
        objective=setup.objective,
        steps=steps,
        held_out=held_out,
        probe=GradientProbe(lora_b_parameters(network)),
        tracker=tracker,
        progress=progress,
        answer=answering(config, inputs, network),
        write_adapter=lambda folder: write_adapter(config, inputs, network, setup, engine, folder),
        reference=setup.reference,
        reference_answers=setup.reference_answers,
        check_start=setup.check_start,
        watch=setup.watch,
    )


def write_adapter(
    config: Config, inputs: Inputs, network: PackedModel, setup: Setup, engine: Engine, folder: Path
) -> None:
    """The adapter in PEFT's form with tokenizer, template and record beside it; on rank 0."""
    from anima.inference.adapter_folder import AdapterRecord, rendering_of, write_record
    from anima.model.lora import save_adapter

    save_adapter(network.adapted, folder)
    inputs.tokenizer.save_pretrained(str(folder))
    record = AdapterRecord(
        model_name_or_path=config.model.model_name_or_path,
        base_fingerprint=engine.base_fingerprint,
        quantization=config.model.quantization,
        chat_template=inputs.template.name,
        rendering=rendering_of(inputs.template),
        objective=config.objective,
        reference=setup.reference,
    )
    write_record(folder, record)


def write_results(
    config: Config, compute: Compute, inputs: Inputs, network: PackedModel, run: Run, history: History
) -> None:
    """Final adapter, summary.json, and the summary on the terminal."""
    from anima import distributed
    from anima.tracking.summary import format_summary, write_summary
    from anima.train import checkpoint, run_folder
    from anima.train.results import summarize
    from anima.train.trainer import memory_peak_gib

    peaks = distributed.gather_objects(memory_peak_gib(compute.device))
    state = distributed.gather_objects(run.engine.optimizer_state_bytes())
    run.progress.message(f"optimizer state per rank: {', '.join(f'{size / 2**30:.2f} GiB' for size in state)}")
    run.progress.close()
    if not run.engine.ranks.is_main:
        return
    output_dir = Path(config.output.output_dir)
    checkpoint.write_folder(output_dir / run_folder.ADAPTER, run.write_adapter)
    summary = summarize(
        config,
        history,
        num_steps=run.num_steps,
        peak_memory_gib=peaks,
        device=compute.name,
        compute_dtype="bf16" if compute.is_bf16 else "fp32",
        files=sorted(path.name + "/" * path.is_dir() for path in output_dir.iterdir()),
        reference=run.reference,
        next_commands=[f"python launch/chat.py --adapter {output_dir / run_folder.ADAPTER}"],
    )
    write_summary(output_dir / run_folder.SUMMARY, summary)
    run.tracker.summary(summary.to_json())
    if config.output.wandb_log_adapter:
        run.tracker.log_adapter(output_dir / run_folder.ADAPTER)
    print(format_summary(summary))


if __name__ == "__main__":
    run_command(main)
