"""Blocks of pinned memory: bytes come back as they went, blocks are used again, the limit holds."""

import pytest
import torch

from anima.free_memory import FreeMemory
from anima.model import host_memory
from anima.model.host_memory import HostMemory, Tape


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "SLAB_BYTES", 8192)
    monkeypatch.setattr(host_memory, "BLOCK_BYTES", 2048)


def read(tape: Tape, parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    into = torch.empty_like(like)
    tape.read(parts, into)
    return into


def test_tensors_come_back_across_borders_of_blocks() -> None:
    tape = Tape(HostMemory())
    values = [
        torch.arange(300, dtype=torch.float32).view(30, 10),  # 1,200 bytes
        torch.arange(-500, 0, dtype=torch.int64),  # 4,000 bytes from 1,536 on: in blocks 0, 1 and 2
        torch.linspace(0, 1, 7).to(torch.bfloat16),
    ]
    parts = [tape.write(value) for value in values]
    assert [[part.numel() for part in found] for found in parts] == [[1200], [512, 2048, 1440], [14]]
    for value, found in zip(values, parts, strict=True):
        assert torch.equal(read(tape, found, value), value)


def test_released_blocks_are_used_again_and_nothing_new_is_taken() -> None:
    memory = HostMemory()
    assert memory.held_bytes == 0
    for _ in range(5):
        tapes = [Tape(memory) for _ in range(2)]
        for tape in tapes:
            tape.write(torch.zeros(3000, dtype=torch.uint8))
        assert (memory.held_bytes, memory.used_bytes) == (8192, 2 * 2 * 2048)
        for tape in tapes:
            tape.release()
        assert memory.used_bytes == 0
    assert memory.held_bytes == 8192


def test_a_block_belongs_to_one_tape_at_a_time() -> None:
    memory = HostMemory()
    first, second = Tape(memory), Tape(memory)
    ones, twos = torch.ones(5000, dtype=torch.uint8), torch.full((5000,), 2, dtype=torch.uint8)
    parts_of_ones, parts_of_twos = first.write(ones), second.write(twos)
    assert torch.equal(read(first, parts_of_ones, ones), ones)
    first.release()
    first.release()  # twice is once
    third = Tape(memory)
    parts_of_threes = third.write(ones + 2)
    assert torch.equal(read(second, parts_of_twos, twos), twos)
    assert torch.equal(read(third, parts_of_threes, ones), ones + 2)
    assert memory.used_bytes == 2 * 3 * 2048


def test_the_limit_counts_slabs_and_a_failed_write_can_be_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "free_host_memory", lambda: FreeMemory(20480, limit=3 << 30))
    memory = HostMemory()  # 0.8 x 20,480 = 16,384 bytes: two slabs, eight blocks
    tape = Tape(memory)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"may not take more than 80% .* of the 3.0 GiB that this job may use"
    ):
        tape.write(torch.zeros(8 * 2048 + 1, dtype=torch.uint8))
    assert "80%" in str(memory.refusal)
    assert memory.held_bytes == 16384
    tape.release()
    assert memory.used_bytes == 0
    Tape(memory).write(torch.zeros(8 * 2048, dtype=torch.uint8))
    assert memory.refusal is None


def test_a_tenth_stays_free_whoever_takes_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [FreeMemory(100_000), FreeMemory(18_192), FreeMemory(18_191)]  # at the start, and before each slab of 8,192
    monkeypatch.setattr(host_memory, "free_host_memory", lambda: free.pop(0))
    memory = HostMemory()
    tape = Tape(memory)
    tape.write(torch.zeros(8192, dtype=torch.uint8))
    with pytest.raises(torch.OutOfMemoryError, match=r"of host memory, and it ends: 0\.0 GiB free"):
        tape.write(torch.zeros(1, dtype=torch.uint8))
    assert memory.held_bytes == 8192
    assert "it ends" in str(memory.refusal)
