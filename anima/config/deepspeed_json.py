"""The DeepSpeed JSON of a run: "auto" entries filled from the config, everything that contradicts it refused.

The JSON owns ZeRO, buckets and communication. Batch, clipping, precision, optimizer and schedule belong to the
config, and a number for them here is an error that names both. Does not import deepspeed.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anima.config.paths import expanded
from anima.config.schema import Config
from anima.config.spelling import nearest
from anima.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]

Keys = tuple[str, ...]

# Names in DeepSpeed 0.19 (runtime/config.py, runtime/zero/config.py), cut down to those that act here.
_KNOWN: dict[Keys, tuple[str, ...]] = {
    (): (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("managed_gradient_accumulation", "bf16", "fp16", "zero_optimization", "zero_allow_untested_optimizer"),
        *("communication_data_type", "data_types", "gradient_allreduce_op", "steps_per_print", "wall_clock_breakdown"),
        *("memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "checkpoint", "log_level"),
    ),
    ("zero_optimization",): (
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions"),
        *("allgather_bucket_size", "overlap_comm", "load_from_fp32_weights", "elastic_checkpoint"),
        *("compute_grad_norm", "offload_optimizer", "offload_param"),
    ),
    ("bf16",): ("enabled", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"),
    ("data_types",): ("grad_accum_dtype",),
}

_REFUSED = {
    "optimizer": "the optimizer is --optimizer with --weight_decay, --adam_beta1, --adam_beta2 and --adam_epsilon",
    "scheduler": "the schedule is --learning_rate, --lr_scheduler_type and --warmup_ratio",
    "amp": "the number format is --compute_dtype",
    "torch_autocast": "the number format is --compute_dtype",
    "activation_checkpointing": "recomputation is --recompute",
    "elasticity": "a step is --global_batch_size sequences on any number of ranks",
    "autotuning": "it would change numbers that the config owns",
    "data_efficiency": "the order of the data is the config's",
    "curriculum_learning": "the order of the data is the config's",
    "wandb": "trackers are --tracker",
    "tensorboard": "trackers are --tracker",
    "csv_monitor": "metrics are in metrics.jsonl",
}

# Entries with one value that is right here: (where, value, why).
_FIXED: tuple[tuple[Keys, object, str], ...] = (
    (("fp16", "enabled"), False, "fp16 overflows without loss scaling; computation is bf16 or fp32"),
    (("bf16", "check_grad_overflow"), True, "without it a gradient that is not finite enters the weights"),
    (("bf16", "bf16_master_weights_and_grads"), False, "small updates vanish in bf16; masters are fp32"),
    (("bf16", "bf16_optimizer_states"), False, "the optimizer's states are those of --optimizer"),
    (("data_types", "grad_accum_dtype"), "fp32", "gradients of many micro-batches are summed in fp32"),
    (("zero_optimization", "contiguous_gradients"), False, "gradients add up in one vector of the engine's own"),
    (("zero_optimization", "reduce_scatter"), True, "every rank gets its part of the summed gradients, no more"),
    (("zero_optimization", "overlap_comm"), False, "gradients travel once a step, after its last backward pass"),
    (("zero_optimization", "elastic_checkpoint"), False, "it cuts the states of 8-bit optimizers and loses data"),
    (("zero_optimization", "compute_grad_norm"), True, "clipping and the logged norm need it"),
    (("zero_allow_untested_optimizer",), True, "DeepSpeed counts every bitsandbytes optimizer as untested"),
    (("gradient_allreduce_op",), "mean", "the engine scales the loss for a mean over ranks"),
    (("managed_gradient_accumulation",), True, "the engine marks the last micro-batch of a step itself"),
)

_BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")
"""Found in every DeepSpeed JSON, and without effect here."""

_DEFAULTS: tuple[tuple[Keys, object], ...] = (
    (("zero_allow_untested_optimizer",), True),
    (("communication_data_type",), "fp32"),
    (("data_types", "grad_accum_dtype"), "fp32"),
    (("zero_optimization", "contiguous_gradients"), False),
    (("zero_optimization", "overlap_comm"), False),
    (("steps_per_print",), None),
    (("wall_clock_breakdown",), False),
)


def merge_deepspeed(config: Config, *, bf16: bool) -> dict[str, Any]:
    """Read the run's DeepSpeed JSON and fill it from the config.

    Args:
        config: The run's config.
        bf16: True if this run computes in bf16.

    Returns:
        What `deepspeed.initialize` takes. One sequence a micro-batch and no accumulation stand there because
        DeepSpeed wants numbers: the micro-batches of a step vary, and the engine marks its end.

    Raises:
        ConfigError: the file is missing or broken, or an entry is unknown or contradicts the config.
    """
    source = _read(config.deepspeed)
    _check_names(source)
    _check_batch(source, config)
    _check_stage(source)
    merged = copy.deepcopy(source.entries)
    for keys, value, reason in _FIXED:
        if _look_up(merged, keys) is not None:
            _set(merged, keys, _agreed(source, keys, value, reason))
    for keys, default in _DEFAULTS:
        if _look_up(merged, keys) in (None, "auto"):
            _set(merged, keys, default)
    clipping, enabled = ("gradient_clipping",), ("bf16", "enabled")
    max_grad_norm = config.optimization.max_grad_norm
    _set(merged, clipping, _agreed(source, clipping, max_grad_norm, f"the config has --max_grad_norm {max_grad_norm}"))
    resolved = f"--compute_dtype {config.model.compute_dtype} is {'bf16' if bf16 else 'fp32'} here"
    _set(merged, enabled, _agreed(source, enabled, bf16, resolved))
    merged.pop("train_batch_size", None)  # DeepSpeed multiplies it out for the number of ranks
    merged.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    _check_communication(source, merged)
    return merged


@dataclass(frozen=True)
class _Source:
    """A JSON file as written, to tell where an entry stands."""

    path: str
    text: str
    entries: dict[str, Any]

    def where(self, keys: Keys) -> str:
        """`file:line (key.key)`; the line of the innermost key that is found after its parents."""
        position = 0
        for key in keys:
            found = re.compile(rf'"{re.escape(key)}"\s*:').search(self.text, position)
            position = found.start() if found else position
        return f"{self.path}:{self.text.count(chr(10), 0, position) + 1} ({'.'.join(keys)})"

    def error(self, keys: Keys, what: str, *, allowed: object, fix: str | None = None) -> ConfigError:
        """What is wrong with one entry."""
        got = json.dumps(_look_up(self.entries, keys), ensure_ascii=False)
        return ConfigError(what, where=self.where(keys), got=got, allowed=allowed, fix=fix)


def _read(name: str) -> _Source:
    written = expanded(name, "--deepspeed")
    candidates = [written] if written.is_absolute() else [written, REPOSITORY / written]
    path = next((item for item in candidates if item.is_file()), None)
    if path is None:
        there = ", ".join(sorted(f"ds_configs/{item.name}" for item in (REPOSITORY / "ds_configs").glob("*.json")))
        raise ConfigError("there is no such DeepSpeed JSON", where="--deepspeed", got=name, allowed=there)
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = json.loads(text, object_pairs_hook=lambda pairs: _without_doubles(pairs, str(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the DeepSpeed JSON cannot be read", where=path, got=str(error)) from None
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise ConfigError("this is not JSON", where=where, got=error.msg, allowed="JSON without comments") from None
    if not isinstance(entries, dict):
        raise ConfigError("a DeepSpeed JSON is an object", where=path, got=type(entries).__name__, allowed="{…}")
    return _Source(str(path), text, entries)


def _without_doubles(pairs: list[tuple[str, object]], path: str) -> dict[str, object]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the key {name!r} stands twice in one object", where=path, allowed="each key once")
    return dict(pairs)


def _check_names(source: _Source) -> None:
    for key in source.entries:
        if key in _REFUSED:
            raise source.error((key,), f"{key!r} has no place in this file: {_REFUSED[key]}", allowed="no such entry")
    for parent, known in _KNOWN.items():
        section = _look_up(source.entries, parent) if parent else source.entries
        if section is None:
            continue
        if not isinstance(section, dict):
            raise source.error(parent, f"{parent[-1]!r} holds entries of its own", allowed="{…}")
        for key in section:
            if key not in known:
                guess = nearest(key, known)
                hint = f"; did you mean {guess}?" if guess else "; it acts in stage 3 only" * key.startswith("stage3_")
                raise source.error((*parent, key), f"no such entry acts here{hint}", allowed=", ".join(known))


def _check_batch(source: _Source, config: Config) -> None:
    batch = config.batch
    owner = f"the config has --global_batch_size {batch.global_batch_size}, --micro_batch_tokens "
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if source.entries.get(key, "auto") != "auto":
            what = f"batches are the config's: {owner}{batch.micro_batch_tokens}"
            raise source.error((key,), what, allowed='"auto"', fix=f'write "{key}": "auto", and change the flags')


def _check_stage(source: _Source) -> None:
    zero = source.entries.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != 2 or not isinstance(stage, int):
        reason = {
            3: "stage 3 would cut the frozen base up as well, and gather each layer again in every pass; in 4 bits "
            "it is small enough to lie whole on every rank",
            0: "stage 0 shards nothing",
            1: "stage 1 leaves whole gradients on every rank",
        }.get(stage if isinstance(stage, int) else -1, "the ZeRO stage must be written down")
        fix = 'write "zero_optimization": {"stage": 2, …}, as ds_configs/zero2.json does'
        raise source.error(
            ("zero_optimization", "stage"), f"only ZeRO stage 2 is supported: {reason}", allowed=2, fix=fix
        )
    for key in ("offload_optimizer", "offload_param"):
        if zero is not None and zero.get(key) not in (None, {"device": "none"}):
            reason = "it needs an op compiled on the spot; --optimizer paged_adamw_8bit pages its states by itself"
            raise source.error(
                ("zero_optimization", key), f"offloading is not supported: {reason}", allowed="no such entry"
            )


def _check_communication(source: _Source, merged: dict[str, Any]) -> None:
    zero = merged["zero_optimization"]
    for key in _BUCKETS:
        if zero.pop(key, "auto") != "auto":
            what = "this has no effect: gradients and parameters travel in one piece, without a bucket"
            raise source.error(("zero_optimization", key), what, allowed='"auto"', fix="leave it out")
    if merged["communication_data_type"] not in ("fp32", "bf16"):
        raise source.error(("communication_data_type",), "gradients cannot travel so", allowed='"fp32" or "bf16"')
    for keys in _autos(merged, ()):  # DeepSpeed does not know the word
        raise source.error(keys, 'the config has nothing to fill this "auto" with', allowed="a value")


def _autos(entries: Mapping[str, Any], parents: Keys) -> Iterator[Keys]:
    for key, value in entries.items():
        if value == "auto":
            yield (*parents, key)
        elif isinstance(value, dict):
            yield from _autos(value, (*parents, key))


def _agreed(source: _Source, keys: Keys, value: object, reason: str) -> object:
    """`value`, if the file says the same, "auto" or nothing."""
    written = _look_up(source.entries, keys)
    if written in (None, "auto") or (written == value and isinstance(written, bool) == isinstance(value, bool)):
        return value
    right = json.dumps(value)
    fix = f'write "{keys[-1]}": "auto", or {right}'
    raise source.error(keys, f"{'.'.join(keys)} contradicts the run: {reason}", allowed=f'"auto" or {right}', fix=fix)


def _look_up(entries: Mapping[str, Any], keys: Keys) -> Any:  # noqa: ANN401  (whatever JSON holds)
    """The entry, or None where there is none."""
    found: Any = entries
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _set(entries: dict[str, Any], keys: Keys, value: object) -> None:
    for key in keys[:-1]:
        entries = entries.setdefault(key, {})
    entries[keys[-1]] = value
