"""Optimizer state for any number of ranks: exact where blocks stay whole, rounded by a block's grid elsewhere."""

import pytest
import torch
from torch import Tensor

from anima.errors import CheckpointError
from anima.train.optimizer_state import (
    BLOCK,
    MASTER,
    GroupState,
    RankState,
    check_parameters,
    cut,
    encode,
    from_files,
    join,
    to_files,
)

MAP = {"state1": torch.cat([torch.arange(-127, 128) / 127, torch.tensor([2.0])])}
PARAMETERS = (("a", (40, 60)), ("b", (50, 12)))


def split_over(ranks: int, numel: int = 3000) -> tuple[list[RankState], Tensor]:
    """A known vector cut and encoded as ZeRO and bitsandbytes do on so many ranks, and the vector."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(ranks))
    part = -(-numel // (2 * ranks)) * 2
    padded = torch.nn.functional.pad(values, (0, part * ranks - numel))
    states = []
    for piece in padded.split(part):
        codes, scales = encode(piece, MAP["state1"])
        states.append(RankState({MASTER: piece, "state1": codes}, {"state1": scales}, MAP, {"step": 7}))
    return states, values


def decoded(state: RankState) -> Tensor:
    if "state1" not in state.scales:
        return state.vectors["state1"]
    scales = state.scales["state1"].repeat_interleave(BLOCK)[: state.vectors["state1"].numel()]
    return MAP["state1"][state.vectors["state1"].int()] * scales


def test_a_state_comes_back_bit_by_bit_on_as_many_ranks() -> None:
    for ranks in (1, 2, 3, 4, 7):
        states, values = split_over(ranks)
        group = join(PARAMETERS, states)
        assert torch.equal(group.vectors[MASTER], values)
        for rank, state in enumerate(states):
            again, exact = cut(group, state.vectors[MASTER].numel(), rank, MAP)
            assert exact
            assert torch.equal(decoded(again), decoded(state))
            assert torch.equal(again.scales["state1"], state.scales["state1"])
            assert torch.equal(again.vectors[MASTER], state.vectors[MASTER])
            assert again.scalars == {"step": 7}


def test_whole_blocks_move_exactly_and_cut_ones_are_rounded_to_their_grid() -> None:
    """Parts of 1500 become one of 3000: blocks 0-4 of the first part stay where they were, all others shift."""
    states, _ = split_over(2)
    group = join(PARAMETERS, states)
    before = torch.cat([decoded(state) for state in states])[:3000]
    now, exact = cut(group, 3000, 0, MAP)
    assert not exact
    after = decoded(now)
    assert torch.equal(after[: 5 * BLOCK], before[: 5 * BLOCK])
    step = 1 / 127
    for start in range(5 * BLOCK, 3000, BLOCK):
        block = slice(start, min(start + BLOCK, 3000))
        largest = before[block].abs().max()
        assert (after[block] - before[block]).abs().max() <= largest * step / 2 * 1.001
    assert not torch.equal(after[5 * BLOCK :], before[5 * BLOCK :])


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4)])
def test_parts_that_are_multiples_of_a_block_move_exactly(old: int, new: int) -> None:
    numel = 4 * BLOCK * 3
    states, values = split_over(old, numel)
    group = join((("a", (numel,)),), states)
    parts = [cut(group, numel // new, rank, MAP) for rank in range(new)]
    assert all(exact for _, exact in parts)
    whole = torch.cat([decoded(state) for state, _ in parts])
    assert torch.equal(whole, torch.cat([decoded(state) for state in states]))
    assert torch.equal(torch.cat([state.vectors[MASTER] for state, _ in parts]), values)


def test_padding_is_cut_off_and_made_anew() -> None:
    states, _ = split_over(7)  # 7 parts of 430 hold 3010 elements
    group = join(PARAMETERS, states)
    assert group.vectors[MASTER].numel() == group.numel == 3000
    last, _ = cut(group, 1004, 2, MAP)  # 3 parts of 1004 hold 3012
    assert last.vectors[MASTER].numel() == 1004
    assert not decoded(last)[-12:].any()
    beyond, exact = cut(group, 1000, 3, MAP)
    assert exact
    assert not decoded(beyond).any()


def test_tiny_parts_have_fp32_moments_and_change_their_form_on_the_way() -> None:
    states, _ = split_over(1)
    group = join(PARAMETERS, states)
    plain = [cut(group, 1500, rank, {})[0] for rank in range(2)]
    assert all(state.vectors["state1"].dtype == torch.float32 and not state.scales for state in plain)
    values = torch.cat([state.vectors["state1"] for state in plain])
    assert torch.equal(values, decoded(states[0]))
    back, exact = cut(join(PARAMETERS, plain), 3000, 0, MAP)
    assert not exact
    assert torch.allclose(decoded(back), values, atol=float(values.abs().max()) / 254)


def test_our_codes_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    values[256:512] = 0
    codes = create_dynamic_map(signed=True)
    ours, scales = encode(values, codes)
    theirs, state = quantize_blockwise(values, code=codes, blocksize=BLOCK)
    assert torch.equal(scales, state.absmax)
    live = torch.cat([torch.arange(256), torch.arange(512, 1000)])
    assert torch.equal(ours[live], theirs[live])
    assert not codes[ours[256:512].int()].any()


def test_files_hold_everything() -> None:
    states, _ = split_over(3)
    group = join(PARAMETERS, states)
    tensors, notes = to_files([group, group])
    again: GroupState = from_files(tensors, notes)[1]
    assert again.parameters == PARAMETERS
    assert again.part == group.part
    assert again.scalars == group.scalars
    for kind in ("vectors", "scales", "maps"):
        ours, theirs = getattr(group, kind), getattr(again, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("other", [(PARAMETERS[1], PARAMETERS[0]), PARAMETERS[:1], (("a", (60, 40)), PARAMETERS[1])])
def test_another_adapter_of_as_many_elements_is_refused(other: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
    states, _ = split_over(1)
    with pytest.raises(CheckpointError, match="another adapter"):
        check_parameters(join(PARAMETERS, states), other)
