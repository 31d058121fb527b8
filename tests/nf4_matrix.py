"""Random packed matrices whose scales reach all of e4m3, and its bits from either kernel."""

from typing import Any
from unittest.mock import patch

import torch

NF4 = (-1.0, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0.0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1.0)


def choose_bytes(low: int, high: int, selector: int) -> int:
    """prmt.b32 as PTX's manual defines it (9.7.9, its default mode), unsigned."""
    chosen = 0
    for i in range(4):
        nibble = selector >> (4 * i) & 0xF
        byte = (high << 32 | low) >> (8 * (nibble & 7)) & 0xFF
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        chosen |= byte << (8 * i)
    return chosen


def random_nf4(
    shape: tuple[int, int], *, nested: bool, scaled: bool = True, groupsize: int = 256, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of `nf4_kernels.unpack` for e4m3. Some scales are so large that e4m3 saturates, some so small that only
    its subnormal numbers or 0 are left; half are negative."""
    num_blocks = -(-shape[0] * shape[1] // 64)
    num_scales = -(-num_blocks // groupsize) if nested else num_blocks
    scales = torch.randn(num_scales, device=device) * 10.0 ** torch.randint(-4, 3, (num_scales,), device=device)
    absmax, of_codes = scales, None
    if nested:
        absmax = torch.randint(0, 256, (num_blocks,), dtype=torch.uint8, device=device)
        of_codes = (torch.linspace(-1, 1, 256, device=device) ** 3, scales, torch.tensor(1e-3, device=device))
    return {
        "packed": torch.randint(0, 256, (shape[0] * shape[1] // 2, 1), dtype=torch.uint8, device=device),
        "absmax": absmax,
        "nested": of_codes,
        "codes": torch.tensor(NF4, device=device),
        "shape": shape,
        "dtype": torch.float8_e4m3fn,
        "blocksize": 64,
        "groupsize": groupsize,
        "inverse_scale": torch.tensor(123.4, device=device) if scaled else None,
    }


def by_table(given: dict[str, Any], **more: Any) -> torch.Tensor:
    """e4m3 by tables, as bytes; fails where the other kernel would be taken."""
    from anima.model import nf4_kernels

    with patch.object(nf4_kernels, "_unpack", None):
        return nf4_kernels.unpack(**given, **more).view(torch.uint8)


def plain(given: dict[str, Any], **more: Any) -> torch.Tensor:
    """e4m3 weight by weight, as bytes."""
    from anima.model import nf4_kernels

    return nf4_kernels.unpack(**given, **more, by_table=False).view(torch.uint8)


def same_in_a_wider_matrix(given: dict[str, Any], left: int, right: int, **more: Any) -> None:
    """By tables into columns of a matrix that has `left` and `right` more: the same bytes, and none beside them."""
    expected = plain(given, **more)
    wider = torch.full((len(expected), left + expected.shape[1] + right), 77, dtype=torch.uint8, device=expected.device)
    wanted = wider.clone()
    wanted[:, left : left + expected.shape[1]] = expected
    part = wider.view(torch.float8_e4m3fn)[:, left : left + expected.shape[1]]
    by_table(given, output=part, **more)
    assert torch.equal(wider, wanted)
