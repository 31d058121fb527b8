"""Where and in which number format a rank computes.

bf16 only where the processor really has it: on most CPUs it is emulated and 20 times slower than fp32, and
older GPUs claim support by emulation as well.
"""

import os
from dataclasses import dataclass

import torch

from anima.config.policy import parse_policy
from anima.config.schema import Config
from anima.errors import ConfigError

BF16_COMPUTE_CAPABILITY = (8, 0)
"""First CUDA compute capability with bf16 units (Ampere)."""
FP8_COMPUTE_CAPABILITY = (8, 9)
"""First one with fp8 units (Ada); Hopper and Blackwell have them too."""
HOPPER = (9, 0)
"""The one on which fp8_backward was measured to be faster than bf16, and to train as well."""
FP8_PRODUCTS = {"fp8": "products with the base", "fp8_backward": "products of input gradients with the base"}
"""Number formats with products in fp8, and which those are."""
_ALLOCATOR = "expandable_segments:True"
"""Segments that grow hold little more than tensors need. Blocks of fixed sizes held 5 GiB more on a 33B recipe: on a
nearly full card that drove the paged optimizer states out, which each step then waited for."""


@dataclass(frozen=True)
class Compute:
    """Device and number format of this rank, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    fp8: str = ""
    """One of FP8_PRODUCTS, whose products with the frozen base run in e4m3; empty for none. All else is in `dtype`."""

    @property
    def label(self) -> str:
        """The number format in a word."""
        return self.fp8 or ("bf16" if self.is_bf16 else "fp32")

    @property
    def form(self) -> str:
        """Kind of device and format of dequantised weights, such as `cuda bfloat16`: fingerprints of one can be
        compared."""
        return f"{self.device.type} {str(self.dtype).removeprefix('torch.')}"

    @property
    def name(self) -> str:
        """What a person calls the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def place(self) -> str:
        """Where a CPU repeats every bit of a computation: the same kernels and as many threads; else the device."""
        if self.device.type == "cuda":
            return self.name
        return f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"

    @property
    def is_bf16(self) -> bool:
        """True if the computation runs in bf16 over fp32 masters."""
        return self.dtype == torch.bfloat16


def compute_for_training(config: Config, local_rank: int, *, dry_run: bool) -> Compute:
    """What a run computes in, and what prepares its reference; a dry run takes any device. Errors as below."""
    nf4 = config.model.quantization == "nf4"
    device = "auto" if dry_run else config.device
    return choose_compute(device, config.model.compute_dtype, local_rank, trains_nf4=nf4)


def choose_compute(device: str, compute_dtype: str, local_rank: int, *, trains_nf4: bool = False) -> Compute:
    """Pick this rank's device and number format.

    Args:
        device: auto, cuda or cpu.
        compute_dtype: auto, bf16, fp32, fp8 or fp8_backward.
        local_rank: Index of this process on its machine; it is also its GPU.
        trains_nf4: The base is NF4 and gradients go through it; then auto is fp8_backward where that was measured.

    Raises:
        ConfigError: CUDA is asked for and absent, or there are fewer GPUs than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "this run needs a GPU and torch sees none",
            where="--device",
            got="cuda",
            allowed="auto or cpu on this machine",
            fix="run it on a GPU node (nvidia-smi must list one), or rehearse with --device cpu",
        )
    if device == "cpu" or not torch.cuda.is_available():
        return _choose_cpu(compute_dtype)
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there are {count}",
            where="launcher",
            got=f"LOCAL_RANK={local_rank}",
            allowed=f"at most {count} processes on this machine",
            fix=f"deepspeed --num_gpus {count} … or torchrun --nproc_per_node {count} …",
        )
    measured = trains_nf4 and torch.cuda.get_device_capability(local_rank) == HOPPER
    return _choose_cuda("fp8_backward" if compute_dtype == "auto" and measured else compute_dtype, local_rank)


def _choose_cuda(compute_dtype: str, index: int) -> Compute:
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():  # what a user wrote stands
        os.environ["PYTORCH_ALLOC_CONF"] = _ALLOCATOR  # read when the device is first used
    target = torch.device("cuda", index)
    name = torch.cuda.get_device_name(index)
    capable = torch.cuda.get_device_capability(index) >= BF16_COMPUTE_CAPABILITY
    if compute_dtype == "bf16" and not capable:
        raise ConfigError(
            f"{name} has no bf16 units (it would be emulated)",
            where="--compute_dtype",
            got="bf16",
            allowed="auto or fp32 on this GPU",
            fix="--compute_dtype fp32",
        )
    if compute_dtype in FP8_PRODUCTS:
        if torch.cuda.get_device_capability(index) < FP8_COMPUTE_CAPABILITY:
            raise ConfigError(
                f"{name} has no fp8 units",
                where="--compute_dtype",
                got=compute_dtype,
                allowed="auto, bf16 or fp32 on this GPU; fp8 on Ada, Hopper and Blackwell",
                fix="--compute_dtype auto",
            )
        reason = f"fp8 (e4m3) {FP8_PRODUCTS[compute_dtype]}, bf16 else, on {name}"
        return Compute(target, torch.bfloat16, reason, fp8=compute_dtype)
    if compute_dtype == "fp32" or not capable:
        return Compute(target, torch.float32, f"fp32 on {name}")
    return Compute(target, torch.bfloat16, f"bf16 on {name}")


def _choose_cpu(compute_dtype: str) -> Compute:
    target = torch.device("cpu")
    capable = cpu_has_bf16()
    if compute_dtype in FP8_PRODUCTS:
        dtype = torch.bfloat16 if capable else torch.float32
        reason = f"{compute_dtype} emulated on the CPU: a rehearsal, slower than without it"
        return Compute(target, dtype, reason, fp8=compute_dtype)
    if compute_dtype == "bf16":
        note = "" if capable else "; this processor emulates it, expect it to be many times slower than fp32"
        return Compute(target, torch.bfloat16, f"bf16 on the CPU as asked{note}")
    if compute_dtype == "auto" and capable:
        return Compute(target, torch.bfloat16, "bf16 on the CPU (it has AVX-512 BF16 or AMX)")
    return Compute(target, torch.float32, "fp32 on the CPU")


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices natively (AVX-512 BF16 or AMX).

    torch has no public question for it; Linux tells in /proc/cpuinfo, elsewhere the safe answer is no.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def claim_device(compute: Compute, max_gpu_memory_gib: float | None) -> None:
    """Make the GPU this process's current one and cap what it may take there; nothing on a CPU.

    Raises:
        ConfigError: the cap is more than the card has, or there is no card to cap.
    """
    if compute.device.type != "cuda":
        if max_gpu_memory_gib is not None:
            raise ConfigError(
                "a cap on GPU memory has no effect on a CPU",
                where="--max_gpu_memory_gib",
                got=max_gpu_memory_gib,
                fix="leave it out, or run on a GPU",
            )
        return
    torch.cuda.set_device(compute.device)
    if max_gpu_memory_gib is None:
        return
    total = torch.cuda.get_device_properties(compute.device).total_memory / 2**30
    if not 0 < max_gpu_memory_gib <= total:
        raise ConfigError(
            "the cap does not fit the card",
            where="--max_gpu_memory_gib",
            got=max_gpu_memory_gib,
            allowed=f"up to {total:.1f} GiB on {torch.cuda.get_device_name(compute.device)}",
        )
    torch.cuda.set_per_process_memory_fraction(max_gpu_memory_gib / total, compute.device)


def check_offload(compute: Compute, recompute: str) -> None:
    """Refuse host memory for activations where they lie there anyway, with a ConfigError."""
    if recompute != "auto" and parse_policy(recompute)[1] and compute.device.type != "cuda":
        raise ConfigError(
            "there is no GPU whose activations could wait in host memory",
            where="--recompute",
            got=recompute,
            allowed=f"{parse_policy(recompute)[0]} on a CPU",
        )
