"""Kernels held against their references where they run: a silent error would cost the whole run."""

from torch import Tensor

from anima.errors import ModelError


def refuse_difference(kernel: str, got: Tensor, expected: Tensor) -> None:
    """Of what a kernel gives from its reference.

    Raises:
        ModelError: they differ by more than what a tie that is rounded the other way gives.
    """
    wide = expected.float()
    error = float((got.float() - wide).norm() / wide.norm())
    if not error < 1e-2:
        raise ModelError(
            "the fp8 kernels do not compute what they should on this GPU",
            where=kernel,
            got=f"relative error {error:.3g}",
            allowed="below 0.01",
            fix="--compute_dtype bf16, and report the GPU with the versions of torch and triton",
        )
