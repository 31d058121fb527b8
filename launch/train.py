"""Fine-tune: argv -> Config -> method, tokenizer, data, tracker, model, objective, engine -> run -> results.

deepspeed launch/train.py --deepspeed ds_configs/zero2.json --config launch/configs/quickstart_sft.yaml
torchrun --nproc_per_node 2 launch/train.py --config FILE.yaml --learning_rate 1e-4
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.cli import describe, parse_config
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
    from anima.train.engine import Engine
    from anima.train.method import Method, Setup
    from anima.train.opening import Opened
    from anima.train.run import Identity, Run
    from anima.train.stop import StopRequest


def main(argv: Sequence[str]) -> None:
    """Parse, then print (`--dry_run`) or train."""
    config, options = parse_config(argv)
    from anima.distributed import read_ranks
    from anima.model.compute import compute_for_training

    ranks = read_ranks()
    compute = compute_for_training(config, ranks.local_rank, dry_run=options.dry_run)
    merged = merge_deepspeed(config, bf16=compute.is_bf16)
    if options.dry_run:
        print(describe(config, merged), end="")
        return
    if compute.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported, by whichever library
    train(config, ranks, compute)


def train(config: Config, ranks: Ranks, compute: Compute) -> None:
    """The whole line; what a user can have got wrong is found before the base is loaded."""
    from anima import distributed
    from anima.errors import AnimaError
    from anima.train.opening import open_run
    from anima.train.results import write_results
    from anima.train.stop import StopRequest
    from anima.train.trainer import train as run_steps

    check(config, ranks, compute)
    from anima.train.choice import choose_method

    method = choose_method(config)
    stop = StopRequest.catching(config.max_hours)
    inputs = prepare_inputs(config, method)
    distributed.start(ranks, compute.device, config.backend, hang_minutes=config.hang_timeout_minutes)
    identity = identify(config, ranks, compute, inputs)
    opened = open_run(config, ranks, identity)
    try:
        network = build_network(config, compute)
        setup = set_up(config, ranks, compute, inputs, network, method)
        engine = build_engine(config, ranks, compute, network)
        run = build_run(config, ranks, compute, inputs, network, setup, engine, identity, opened, stop)
        run, history = run_steps(run)
        write_results(run, history, device=compute.name, compute_dtype=compute.label)
    except BaseException as error:
        opened.tracker.finish(error.exit_code if isinstance(error, AnimaError) else 1)
        raise
    opened.tracker.finish(0)
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
    from anima.evaluation.mmlu import read_choices
    from anima.model.base_model import load_settings, skeleton
    from anima.model.compute import check_offload, claim_device
    from anima.model.lora import check_adapter, resolve_targets
    from anima.tracking.tracker import check_tracker
    from anima.train.run_folder import check_run_folder

    for path in config.benchmarks.eval_benchmarks:
        read_choices(path)
    check_run_folder(config.output.output_dir, config.resume)
    check_tracker(config.output, is_main=ranks.is_main)
    resolve_targets(skeleton(load_settings(config.model)), config.lora.lora_target_modules)
    if config.model.adapter_path is not None:
        check_adapter(config.lora, config.model.adapter_path)
    claim_device(compute, config.max_gpu_memory_gib)
    check_offload(compute, config.optimization.recompute)


def prepare_inputs(config: Config, method: Method) -> Inputs:
    """Tokenizer, template and tokenised data."""
    from anima.data.prepare import prepare_records
    from anima.data.templates import make_template
    from anima.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    template = make_template(config.data.chat_template, tokenizer, mask_answers=config.data.train_on == "assistant")
    data = prepare_records(method.records, config.data, tokenizer, seed=config.seed, template=template)
    return Inputs(tokenizer, template, data)


def identify(config: Config, ranks: Ranks, compute: Compute, inputs: Inputs) -> Identity:
    """What a resumed run must have in common with the one that saved; the base is not loaded yet."""
    from anima.inference.adapter_folder import rendering_of
    from anima.train.results import library_versions
    from anima.train.run import Identity

    return Identity(
        config=config.flat(),
        base_fingerprint="",
        data_fingerprint=inputs.data.train.fingerprint,
        rendering=rendering_of(inputs.template),
        versions=library_versions(),
        place=compute.place,
        world_size=ranks.world_size,
    )


def build_network(config: Config, compute: Compute) -> PackedModel:
    """Frozen base with a trainable adapter."""
    from anima.cluster.staging import local_base
    from anima.model.base_model import load_base
    from anima.model.lora import attach_lora, compute_in_fp8
    from anima.model.packed import PackedModel
    from anima.tracking.progress import Progress

    folder = local_base(config.model, Progress(0, is_main=True).message)
    base = load_base(config.model, compute, folder=folder)
    adapter_path = config.model.adapter_path
    adapted = attach_lora(base, config.lora, dtype=compute.dtype, seed=config.seed, adapter_path=adapter_path)
    if compute.fp8:
        compute_in_fp8(adapted, forward=compute.fp8 == "fp8")
    recompute = config.optimization.recompute
    return PackedModel(adapted, "all" if recompute == "auto" else recompute)


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
    from anima.inference.answering import Answerer

    answerer = Answerer(network.causal_lm, inputs.tokenizer, inputs.template)

    def answer(prompts: Sequence[str]) -> list[str]:
        asked = [[Message("user", prompt)] for prompt in prompts]
        return answerer.answer(asked, max_new_tokens=config.output.sample_max_new_tokens)

    return answer


def benchmarking(
    config: Config, ranks: Ranks, inputs: Inputs, network: PackedModel, batch_tokens: int
) -> Callable[[Callable[[str], None]], dict[str, float]] | None:
    """The scores of --eval_benchmarks, a collective."""
    from anima.evaluation.benchmarks import Benchmarks

    if not config.benchmarks.eval_benchmarks:
        return None
    return Benchmarks(config.benchmarks, ranks, inputs.tokenizer, network.causal_lm, batch_tokens).score


def build_engine(config: Config, ranks: Ranks, compute: Compute, network: PackedModel) -> Engine:
    """DeepSpeed around network and optimizer."""
    from anima.model.base_model import fingerprint
    from anima.model.lora import trainable_parameters
    from anima.train.engine import Engine
    from anima.train.optimizer import build_optimizer

    parameters = list(trainable_parameters(network).values())
    settings = merge_deepspeed(config, bf16=compute.is_bf16)
    return Engine(network, build_optimizer(parameters, config.optimization), settings, ranks, fingerprint)


def build_run(
    config: Config,
    ranks: Ranks,
    compute: Compute,
    inputs: Inputs,
    network: PackedModel,
    setup: Setup,
    engine: Engine,
    identity: Identity,
    opened: Opened,
    stop: StopRequest,
) -> Run:
    """The loop's parts, and the lines that tell a person what is about to happen."""
    from anima.model.lora import lora_b_parameters
    from anima.tracking.progress import Progress
    from anima.train.briefing import opening_lines
    from anima.train.fitting import fit
    from anima.train.resume import check_base
    from anima.train.run import Run
    from anima.train.step import GradientProbe
    from anima.train.watchdog import Watchdog

    optimization = config.optimization
    fitted = fit(config, ranks, setup, engine, network, Progress(0, is_main=ranks.is_main).message)
    num_steps = optimization.max_steps or fitted.steps.num_steps(optimization.num_train_epochs)
    identity = replace(identity, base_fingerprint=engine.base_fingerprint)
    progress = Progress(num_steps, opened.origin.step if opened.origin else 0, is_main=ranks.is_main)
    notices = (*opened.notices, *check_base(opened.origin, identity, config.allow_changed))
    report = inputs.data.report.lines()
    for line in opening_lines(config, compute, network, engine, report, num_steps, fitted.plan.why):
        progress.message(line)
    for notice in notices:
        progress.message(f"resume: {notice}")
    return Run(
        config=config,
        num_steps=num_steps,
        num_train_epochs=None if optimization.max_steps else optimization.num_train_epochs,
        engine=engine,
        objective=setup.objective,
        fitted=fitted,
        probe=GradientProbe(lora_b_parameters(network)),
        tracker=opened.tracker,
        progress=progress,
        answer=answering(config, inputs, network),
        adapter_writer=lambda: adapter_writer(config, compute, inputs, network, setup, engine),
        identity=identity,
        origin=opened.origin,
        stop=stop,
        watchdog=Watchdog(config.hang_timeout_minutes * 60, Path(config.output.output_dir), ranks.rank),
        reference=setup.reference,
        reference_answers=setup.reference_answers,
        benchmarks=benchmarking(config, ranks, inputs, network, fitted.plan.micro_batch_tokens),
        check_start=setup.check_start,
        watch=setup.watch,
    )


def adapter_writer(
    config: Config, compute: Compute, inputs: Inputs, network: PackedModel, setup: Setup, engine: Engine
) -> Callable[[Path], None]:
    """Copy the adapter now; what is returned writes it, with all that its users need beside it."""
    from anima.inference.adapter_folder import AdapterRecord, rendering_of, writer
    from anima.model.tokenizer import model_location

    record = AdapterRecord(
        model_name_or_path=model_location(config.model.model_name_or_path),
        base_fingerprint=engine.base_fingerprint,
        quantization=config.model.quantization,
        chat_template=inputs.template.name,
        rendering=rendering_of(inputs.template),
        objective=config.objective,
        reference=setup.reference,
        compute=compute.form,
    )
    return writer(network.adapted, inputs.tokenizer, record)


if __name__ == "__main__":
    run_command(main)
