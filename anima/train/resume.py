"""Going on from a checkpoint: which one, whether this run may, and putting everything back.

Rank 0 chooses and every rank follows. What may differ from the saved run stands in three tables below.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anima import distributed
from anima.config.paths import expanded
from anima.config.schema import Config
from anima.errors import CheckpointError
from anima.train import checkpoint, optimizer_state, run_folder, saving
from anima.train.meter import History, Meter
from anima.train.run import Identity, Origin, Run

FREE = frozenset(
    {
        *("output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "sample_prompts"),
        *("eval_benchmarks", "eval_benchmark_questions"),
        *("sample_max_new_tokens", "tracker", "wandb_project", "wandb_log_adapter", "run_name", "data_cache_dir"),
        *("resume", "allow_changed", "max_hours", "hang_timeout_minutes", "max_gpu_memory_gib", "trust_remote_code"),
        "base_staging_dir",
    }
)
"""Options without effect on what is learned."""
NOTICED = frozenset(
    {
        *("learning_rate", "lr_scheduler_type", "warmup_ratio", "num_train_epochs", "max_steps", "max_grad_norm"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "recompute", "micro_batch_tokens", "packing"),
        *("deepspeed", "device", "backend", "eval_files"),
    }
)
"""Options whose new value wins, with a line that says so."""
JUDGED = frozenset(
    {
        *("model_name_or_path", "train_files", "eval_size", "dataset_format", "chat_template", "max_seq_length"),
        *("source_max_len", "target_max_len", "truncation", "train_on"),
    }
)
"""Options that only lead to what is compared itself: the fingerprints of base and data, and the template."""
FIXED = frozenset({"lora_r", "lora_target_modules", "objective", "optimizer"})
"""Options that the saved tensors cannot follow. All others may differ if --allow_changed names them."""

FINGERPRINTS = {"base_fingerprint": "base model", "data_fingerprint": "training data", "rendering": "chat template"}
"""Parts of an Identity that must agree, in words; each may be named by --allow_changed."""
PROBE_TOLERANCE = 1e-3


def choose(config: Config) -> tuple[Origin | None, tuple[str, ...]]:
    """The checkpoint that --resume means, or None for a fresh start; and what a person should know about the choice.

    Called on rank 0 alone. Sets checkpoints aside from which this run turns back, so that none is taken again later.

    Raises:
        CheckpointError: --resume names a folder that is no whole checkpoint, or the checkpoint is of another format.
    """
    if config.resume == "never":
        return None, ()
    own = (expanded(config.output.output_dir, "--output_dir") / run_folder.CHECKPOINTS).resolve()
    notices: list[str] = []
    if config.resume == "auto":
        folder, passed_over = checkpoint.newest_whole(own)
        notices += [f"passed over {found.folder.name}: {'; '.join(found.problems)}" for found in passed_over]
    else:
        folder = expanded(config.resume, "--resume").resolve()
        if why := checkpoint.problems(folder):
            raise CheckpointError(
                "the checkpoint is not whole",
                where=f"--resume {config.resume}",
                got="; ".join(why),
                allowed="a folder such as runs/NAME/checkpoints/step-200",
                fix="python launch/checkpoint.py list shows the whole ones; --resume auto takes the newest",
            )
    state = None if folder is None else _state(folder)
    continues = folder is None or folder.parent == own
    if continues:
        aside = checkpoint.set_aside(own, after=-1 if state is None else state["step"])
        notices += [f"{path.name.removeprefix('aside-')} is set aside as {path.name}" for path in aside]
    if folder is None or state is None:
        return None, (*notices, f"--resume auto: no whole checkpoint in {own}, so this is a fresh start")
    return Origin(folder, state["step"], state, continues), tuple(notices)


def _state(folder: Path) -> dict[str, Any]:
    try:
        return saving.state_of(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the checkpoint cannot be resumed",
            where=folder / saving.STATE,
            got=error,
            allowed=f"format {saving.FORMAT}",
            fix="it can still be chatted with, or trained on from: --adapter_path",
        ) from None


def check_config(origin: Origin, now: Mapping[str, object], allowed: Sequence[str]) -> list[str]:
    """Compare options with those of the saved run.

    Args:
        origin: Where the run goes on from.
        now: All options of this run, flat.
        allowed: Names that --allow_changed gave.

    Returns:
        What differs and is taken over.

    Raises:
        CheckpointError: an option differs that must not.
    """
    saved = origin.state["identity"]["config"]
    current = json.loads(json.dumps(now))
    notices = []
    for name in sorted(saved.keys() | current.keys()):
        old, new = saved.get(name), current.get(name)
        if _kind(name, old) == _kind(name, new) or name in FREE or name in JUDGED:
            continue
        if name in NOTICED or (name in allowed and name not in FIXED):
            notices.append(f"--{name} is now {new}; it was {old}")
        else:
            raise _changed(origin, f"--{name}", old, new, None if name in FIXED else name)
    return notices


def _kind(name: str, value: object) -> object:
    """Both 8-bit optimizers keep the same state; they differ in where it lies."""
    return value.removeprefix("paged_") if name == "optimizer" and isinstance(value, str) else value


def check_identity(origin: Origin, now: Identity, allowed: Sequence[str]) -> list[str]:
    """Compare fingerprints, versions and ranks with those of the saved run; see `check_config`.

    A field of `now` that is empty is not known yet and not compared.

    Raises:
        CheckpointError: base, data or template differ and --allow_changed does not name that.
    """
    saved = origin.state["identity"]
    notices = []
    for name, words in FINGERPRINTS.items():
        old, new = saved[name], getattr(now, name)
        if new in ("", old):
            continue
        if name not in allowed:
            raise _changed(origin, f"the {words}", repr(old), repr(new), name)
        notices.append(f"the {words} has changed, as --allow_changed {name} allows")
    for name, version in now.versions.items():
        if saved["versions"].get(name) != version:
            notices.append(f"{name} is {version}; the checkpoint was written with {saved['versions'].get(name)}")
    if saved["world_size"] != now.world_size:
        notices.append(
            f"{now.world_size} rank(s) instead of {saved['world_size']}: the same steps, summed in another order; "
            "dropout is drawn anew"
        )
    return notices


def check_base(origin: Origin | None, now: Identity, allowed: Sequence[str]) -> list[str]:
    """Compare the base, once it is loaded; see `check_identity`."""
    if origin is None:
        return []
    return check_identity(
        origin,
        replace(now, data_fingerprint="", rendering="", versions={}, world_size=origin.state["identity"]["world_size"]),
        allowed,
    )


def _changed(origin: Origin, what: str, old: object, new: object, flag: str | None) -> CheckpointError:
    return CheckpointError(
        f"{what} differs from the run that is to be resumed",
        where=f"--resume: {origin.folder}",
        got=new,
        allowed=old,
        fix="give the saved value, or start a new run"
        + (f"; if you mean it: --allow_changed {flag}" if flag else " (the saved tensors have another form)"),
    )


def restore(run: Run, origin: Origin, meter: Meter) -> History:
    """Put masters, moments, random states and history back, and prove it by the probe. A collective.

    Raises:
        CheckpointError: a rank cannot see the folder, or the probe's loss is another one.
    """
    started = time.perf_counter()
    ranks = run.engine.ranks
    if not all(distributed.gather_objects((origin.folder / saving.OPTIMIZER).is_file())):
        raise CheckpointError(
            "not every rank can see the checkpoint",
            where=f"--resume: {origin.folder}",
            fix="keep --output_dir on a file system that all nodes share",
        )
    groups = optimizer_state.from_files(
        checkpoint.read_tensors(origin.folder / saving.OPTIMIZER), origin.state["optimizer"]
    )
    exact = run.engine.import_optimizer(groups)
    by_rank: list[dict[str, torch.Tensor]] = [{} for _ in range(origin.state["identity"]["world_size"])]
    for name, value in checkpoint.read_tensors(origin.folder / saving.RANKS).items():
        rank, _, rest = name.partition(".")
        by_rank[int(rank)][rest] = value
    check_probe(run, origin)
    if len(by_rank) == ranks.world_size:
        saving.set_random_state(_part(by_rank[ranks.rank], "random."), run.engine.device)
        meter.restore([_part(by_rank[ranks.rank], "meter.")])
    else:
        seed_rank(run.config.seed, origin.step, ranks.rank)
        meter.restore([_part(values, "meter.") for values in by_rank] if ranks.is_main else [])
    seconds = time.perf_counter() - started
    run.progress.message(
        f"resumed from {origin.folder}, step {origin.step}, in {seconds:.1f} s; optimizer state "
        f"{'restored exactly' if exact else 'partly rounded anew, because its blocks of 256 were cut otherwise'}"
        f"{', paged' if run.engine.paged_state() else ''}"
    )
    return History.from_json(origin.state["history"])


def _part(values: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def check_probe(run: Run, origin: Origin) -> None:
    """Compare the probe's loss with the saved one; nothing else shows that base, adapter and code mean the same.

    Raises:
        CheckpointError: they differ by more than rounding: at all on the same CPU, by 1e-3 elsewhere.
    """
    saved, now = origin.state["identity"], run.identity
    if saved["data_fingerprint"] != now.data_fingerprint:
        run.progress.message("the probe is not compared: the training data has changed")
        return
    old, new = float(origin.state["probe_loss"]), saving.probe_loss(run)
    same_place = saved["place"] == now.place and saved["versions"] == now.versions and now.place.startswith("cpu")
    tolerance = 0.0 if same_place else PROBE_TOLERANCE
    if not math.isfinite(new) or abs(new - old) > tolerance * abs(old):
        agree = [words for name, words in FINGERPRINTS.items() if saved[name] == getattr(now, name)]
        raise CheckpointError(
            "the resumed model is not the saved one: its loss on the probe differs",
            where=f"--resume: {origin.folder}",
            got=f"{new!r}; equal: {', '.join(agree)}, the adapter's file",
            allowed=f"{old!r}, within {tolerance:g}",
            fix="compare library versions and --compute_dtype with the checkpoint's trainer_state.json",
        )
    run.progress.message(f"probe loss {new:.6f}, {'the same bits' if new == old else f'was {old:.6f}'}")


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Random numbers of a rank from step `step` on, where no saved state fits: a function of its arguments alone."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
