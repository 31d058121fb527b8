"""Every option of a run: one frozen dataclass per concern, flat names, a unit under every field.

A field name is the flag, the YAML key and the sweep parameter. Checks that need nothing but the values
themselves live in `__post_init__`; whatever needs a file, a device or a library is checked by its stage.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from anima.config.benchmarks import BenchmarkConfig
from anima.config.checks import require as _require
from anima.config.policy import is_policy
from anima.config.preference import ConversationFormat, PairFormat, PreferenceConfig, check_objective

DatasetFormat = Literal["auto", ConversationFormat, PairFormat]
ChatTemplate = Literal["auto", "model", "model_thinking", "alpaca", "vicuna", "guanaco", "plain"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base and where training starts from."""

    model_name_or_path: str
    """Folder with a Hugging Face model, or its name on the hub."""
    quantization: Literal["nf4", "none"] = "nf4"
    """Storage of the base's linear layers: 4-bit NF4 with double quantisation, or 16 bit (plain LoRA)."""
    compute_dtype: Literal["auto", "bf16", "fp32", "fp8", "fp8_backward"] = "auto"
    """Number format; auto: bf16 where the processor really has it (on Hopper over NF4 fp8_backward), else fp32;
    fp8_backward: input gradients through an NF4 base in e4m3, the rest bf16, from Ada on; fp8 (experimental): all."""
    adapter_path: str | None = None
    """Folder of a PEFT LoRA adapter to go on training from; None starts a new one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""
    base_staging_dir: str | None = None
    """Node-local folder that the base is copied to, once a node, and loaded from; None loads it where it lies."""
    random_weights: bool = False
    """Ignore the model's weights and draw random ones on the device: for benchmarks."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The trained part."""

    lora_r: int = 64
    """Rank of the update."""
    lora_alpha: float = 16.0
    """Scale of the update: it is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that is zeroed in training, 0 to 1."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Last parts of the names of the linear layers to adapt; all-linear is every one but the output head."""

    def __post_init__(self) -> None:
        _require(self.lora_r >= 1, "the LoRA rank must be positive", "lora_r", self.lora_r, "1 or more")
        _require(0 <= self.lora_dropout < 1, "dropout is a share", "lora_dropout", self.lora_dropout, "0 <= x < 1")
        _require(
            len(self.lora_target_modules) > 0,
            "no module to adapt",
            "lora_target_modules",
            self.lora_target_modules,
            "all-linear, or names such as q_proj v_proj",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is rendered, and what carries the loss."""

    train_files: tuple[str, ...]
    """Files (.json .jsonl .csv .tsv .parquet, the text ones also with .gz), folders, globs or hub names of the
    training set; a.jsonl:2 uses each row twice an epoch, a.jsonl:0.5 a half of the rows chosen by the seed."""
    eval_files: tuple[str, ...] = ()
    """The same for the held-out set; empty: taken from the training set by --eval_size."""
    eval_size: float = 0.0
    """Held-out part of the training set: rows if 1 or more, share of the rows if below 1, 0 for none."""
    dataset_format: DatasetFormat = "auto"
    """Layout of a row; auto looks at the keys of the first one."""
    chat_template: ChatTemplate = "auto"
    """How a conversation becomes text; auto is the model's own template, or alpaca if it has none. model_thinking
    is the model's own for answers that hold thoughts (<think>); model asks hybrid models for answers without."""
    max_seq_length: int | None = None
    """Longest sequence (dpo: each side), tokens; None: source_max_len + target_max_len if both are given, else 1024."""
    source_max_len: int | None = None
    """Longest context before the last answer, tokens; None: only max_seq_length counts."""
    target_max_len: int | None = None
    """Longest last answer with its stop token, tokens; None: only max_seq_length counts."""
    truncation: Literal["drop", "trim_prompt", "error"] = "drop"
    """What happens to a row over a limit: drop it (counted), shorten the user's text from its start
    (answers are never cut; a row whose answer alone is too long is dropped, counted), or stop."""
    bad_rows: Literal["error", "drop"] = "error"
    """What happens to a row that cannot be used (broken JSON, no answer): stop, or leave it out, counted by reason."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Tokens that carry the loss: the assistant's turns with their stop tokens, or all."""
    data_cache_dir: str = "~/.cache/anima/data"
    """Folder for tokenised data, keyed by everything the tokens depend on."""
    data_workers: int | None = None
    """Processes that tokenise; None: one a core, at most 16. Without effect on the result."""
    hub_streaming: bool = False
    """Read hub sets over the network row by row instead of storing them first: for sets larger than the disk."""

    def __post_init__(self) -> None:
        _require(len(self.train_files) > 0, "no training data", "train_files", self.train_files, "one file or more")
        _require(self.eval_size >= 0, "the held-out part cannot be negative", "eval_size", self.eval_size, ">= 0")
        _require(
            not (self.eval_size and self.eval_files),
            "--eval_size and --eval_files exclude each other",
            "eval_size",
            self.eval_size,
            "one of the two",
        )
        whole = self.eval_size <= 1 or self.eval_size == int(self.eval_size)
        _require(whole, "a number of rows is whole", "eval_size", self.eval_size, "a share below 1, or whole rows")
        workers = self.data_workers
        _require(workers is None or workers >= 1, "nobody would work", "data_workers", workers, "1 or more, or None")
        for name in ("max_seq_length", "source_max_len", "target_max_len"):
            value = getattr(self, name)
            _require(value is None or value >= 2, "a length limit is too small", name, value, "2 tokens or more")

    @property
    def sequence_limit(self) -> int:
        """Longest sequence in tokens, with the default filled in."""
        if self.max_seq_length is not None:
            return self.max_seq_length
        if self.source_max_len is not None and self.target_max_len is not None:
            return self.source_max_len + self.target_max_len
        return 1024


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """A step, defined over all ranks, and how it is cut into micro-batches."""

    global_batch_size: int = 16
    """Sequences (pairs for dpo) of one optimizer step over all ranks."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward and backward pass on one rank, at most; a memory budget without effect on the result.
    Counts what is computed: the common prompt of a pair once.
    0: as many as --recompute auto finds fastest."""
    packing: bool = True
    """Fill micro-batches with several sequences kept apart by attention; False: one sequence each."""

    def __post_init__(self) -> None:
        _require(self.global_batch_size >= 1, "an empty step", "global_batch_size", self.global_batch_size, ">= 1")
        tokens = self.micro_batch_tokens
        _require(tokens >= 0, "an empty pass", "micro_batch_tokens", tokens, ">= 1, or 0 with --recompute auto")

    def tokens_unmeasured(self, longest: int) -> int:
        """micro_batch_tokens, or, where that is 0 and nothing is measured, the default; at least `longest`."""
        return self.micro_batch_tokens or max(BatchConfig.micro_batch_tokens, longest)


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimizer and schedule."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up: constant, or down to zero at the last step."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the learning rate rises from zero to its peak."""
    num_train_epochs: float = 1.0
    """Passes over the training set; without effect when max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps; None: from num_train_epochs."""
    max_grad_norm: float = 0.3
    """Global gradient norm above which the gradient is scaled down; 0 for no clipping."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter."""
    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "adamw_torch"] = "paged_adamw_8bit"
    """Optimizer class: bitsandbytes' paged or plain 8-bit AdamW, or torch's fp32 AdamW."""
    recompute: str = "all"
    """Activations computed again in the backward pass: all (least memory), cheap (norms and the SwiGLU product,
    almost free), none, a number N: the first N layers as a whole, the cheap parts of the others; or auto: measured on
    the GPU before the first step, as fast as its memory allows. cheap/M, none/M, N/M, all/M: what M layers keep waits
    in pinned host memory (GPUs only), first of those not recomputed, then inputs of others. No effect on results."""

    def __post_init__(self) -> None:
        allowed = "auto, all, cheap, none, a number of layers, or one of the last four with /M"
        known = self.recompute == "auto" or is_policy(self.recompute)
        _require(known, "unknown policy", "recompute", self.recompute, allowed)
        _require(self.learning_rate > 0, "no learning", "learning_rate", self.learning_rate, "> 0")
        _require(0 <= self.warmup_ratio <= 1, "a share is 0 to 1", "warmup_ratio", self.warmup_ratio, "0 to 1")
        _require(self.num_train_epochs > 0, "no training", "num_train_epochs", self.num_train_epochs, "> 0")
        _require(self.max_steps is None or self.max_steps >= 1, "no training", "max_steps", self.max_steps, ">= 1")
        _require(self.max_grad_norm >= 0, "a norm cannot be negative", "max_grad_norm", self.max_grad_norm, ">= 0")
        _require(self.weight_decay >= 0, "decay cannot be negative", "weight_decay", self.weight_decay, ">= 0")
        _require(0 <= self.adam_beta1 < 1, "a decay is below 1", "adam_beta1", self.adam_beta1, "0 <= x < 1")
        _require(0 <= self.adam_beta2 < 1, "a decay is below 1", "adam_beta2", self.adam_beta2, "0 <= x < 1")
        _require(self.adam_epsilon > 0, "epsilon must be positive", "adam_epsilon", self.adam_epsilon, "> 0")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written, how often, and who is told."""

    output_dir: str
    """Folder of this run; it must not hold another one, unless --resume goes on with that."""
    logging_steps: int = 1
    """Optimizer steps between two lines of metrics."""
    eval_steps: int = 0
    """Optimizer steps between two evaluations; 0: before the first and after the last step only."""
    save_steps: int = 0
    """Optimizer steps between two checkpoints; 0: none before the end."""
    save_total_limit: int = 3
    """Checkpoints kept: the newest ones, and beside them the one with the lowest held-out loss."""
    sample_prompts: tuple[str, ...] = ()
    """Questions that the model answers at every evaluation."""
    sample_max_new_tokens: int = 64
    """Longest such answer, tokens."""
    tracker: Literal["wandb", "jsonl", "none"] = "jsonl"
    """Weights & Biases beside the local metrics.jsonl; only the latter; or neither."""
    wandb_project: str = "anima"
    """Project of the run on Weights & Biases."""
    wandb_log_adapter: bool = False
    """Upload the final adapter as an artifact."""
    run_name: str | None = None
    """Name of the run in trackers; None: the last part of output_dir."""

    def __post_init__(self) -> None:
        _require(self.logging_steps >= 1, "nothing would be logged", "logging_steps", self.logging_steps, ">= 1")
        for name in ("eval_steps", "save_steps"):
            _require(getattr(self, name) >= 0, "an interval cannot be negative", name, getattr(self, name), ">= 0")
        _require(self.save_total_limit >= 1, "keep at least one", "save_total_limit", self.save_total_limit, ">= 1")
        _require(self.output_dir != "", "no output folder", "output_dir", self.output_dir, "a folder")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `launch/train.py` fills it from defaults < `--config` YAML < command line."""

    model: ModelConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    benchmarks: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    output: OutputConfig
    objective: Literal["sft", "dpo"] = "sft"
    """Minimised: sft: mean negative log-likelihood of supervised tokens; dpo: mean loss of pairs (chosen, rejected)."""
    seed: int = 42
    """Seed of the split, the order, the adapter's start values and dropout."""
    deepspeed: str = "ds_configs/zero2.json"
    """DeepSpeed JSON: ZeRO, buckets, communication; "auto" entries are filled from this config."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute; auto is the GPU where there is one. cuda makes a missing GPU an error."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication between ranks; auto is NCCL on GPUs and gloo on CPUs. gloo lets two ranks share one GPU."""
    max_gpu_memory_gib: float | None = None
    """GPU memory this process may take, GiB: rehearse a smaller card on a larger one; None for all."""
    resume: str = "never"
    """never, auto (newest whole checkpoint of output_dir, else a fresh start), or a checkpoint folder."""
    allow_changed: tuple[str, ...] = ()
    """With --resume: options, or base_fingerprint, data_fingerprint, rendering, that may differ from the saved run."""
    max_hours: float | None = None
    """Stop in time to have saved so many hours after the start; None for no limit."""
    hang_timeout_minutes: float = 30.0
    """End the process, with the stack of every thread, when nothing has moved for so long, minutes."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "a seed is a natural number", "seed", self.seed, "0 to 4294967295")
        dtype, nf4 = self.model.compute_dtype, self.model.quantization == "nf4"
        _require(nf4 or "fp8" not in dtype, "fp8 reads an NF4 base", "compute_dtype", dtype, "--quantization nf4")
        tokens = self.batch.micro_batch_tokens
        _require(
            tokens > 0 or self.optimization.recompute == "auto",
            "0 means that --recompute auto chooses",
            "micro_batch_tokens",
            tokens,
            "a number of tokens, or 0 with --recompute auto",
        )
        _require(self.max_hours is None or self.max_hours > 0, "no time at all", "max_hours", self.max_hours, "> 0")
        timeout = self.hang_timeout_minutes
        _require(timeout > 0, "everything would count as a hang", "hang_timeout_minutes", timeout, "> 0")
        check_objective(
            self.objective,
            self.preference,
            longest=self.data.sequence_limit,
            micro_batch_tokens=tokens,
            dataset_format=self.data.dataset_format,
            train_on=self.data.train_on,
        )

    def flat(self) -> dict[str, object]:
        """All options by their flag names, in the order of the schema; tuples stay tuples."""
        values: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if hasattr(value, "__dataclass_fields__"):
                values.update({inner.name: getattr(value, inner.name) for inner in fields(value)})
            else:
                values[item.name] = value
        return values
