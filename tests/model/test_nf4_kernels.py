"""The kernels that read NF4, in Triton's interpreter: what is looked up in tables has the bits of the plain kernel."""

import random

from interpreter import run_in_interpreter
from nf4_matrix import choose_bytes


def look_up(word: int, table: list[int]) -> list[int]:
    """The kernel's steps for a word of eight nibbles: two words of four bytes, in the order of the nibbles."""
    first, second, third, fourth = (int.from_bytes(table[i : i + 4], "little") for i in (0, 4, 8, 12))
    within, half = word & 0x77777777, word >> 1 & 0x44444444 | 0x32103210
    found = []
    for shift in (0, 16):
        below = choose_bytes(first, second, within >> shift)
        above = choose_bytes(third, fourth, within >> shift)
        found.append(choose_bytes(below, above, half >> shift))
    return found


def weights(packed: bytes, table: list[int]) -> list[int]:
    """What the bytes stand for: the first of two weights is in the high nibble."""
    return [table[nibble] for byte in packed for nibble in (byte >> 4, byte & 15)]


def test_a_word_of_nibbles_becomes_its_eight_bytes() -> None:
    chance = random.Random(0)
    for _ in range(500):
        packed, table = chance.randbytes(4), list(chance.randbytes(16))
        found = [choose_bytes(word, word, 0x2301) for word in look_up(int.from_bytes(packed, "little"), table)]
        assert [byte for word in found for byte in word.to_bytes(4, "little")] == weights(packed, table)


def test_words_of_four_rows_become_eight_columns() -> None:
    chance = random.Random(0)
    for _ in range(200):
        rows, tables = [chance.randbytes(4) for _ in range(4)], [list(chance.randbytes(16)) for _ in range(4)]
        words = [look_up(int.from_bytes(row, "little"), table) for row, table in zip(rows, tables, strict=True)]
        found = []
        for a, b, c, d in zip(*words, strict=True):
            for pairs in (0x5140, 0x7362):
                ab, cd = choose_bytes(a, b, pairs), choose_bytes(c, d, pairs)
                found += [choose_bytes(ab, cd, 0x7632), choose_bytes(ab, cd, 0x5410)]
        by_row = [weights(row, table) for row, table in zip(rows, tables, strict=True)]
        columns = [list(column) for column in zip(*by_row, strict=True)]
        assert [list(word.to_bytes(4, "little")) for word in found] == columns


CHOICE = """
import torch
import triton
import triton.language as tl
from nf4_matrix import choose_bytes
from anima.model import nf4_kernels


@triton.jit
def choose(low, high, selector, chosen):
    i = tl.arange(0, 512)
    tl.store(chosen + i, nf4_kernels._choose_bytes(tl.load(low + i), tl.load(high + i), tl.load(selector + i), True))


given = torch.randint(-(2**31), 2**31, (3, 512), dtype=torch.int64).to(torch.int32)
chosen = torch.empty(512, dtype=torch.int32)
choose[(1,)](*given, chosen)
expected = [choose_bytes(*(n & 0xFFFFFFFF for n in three)) for three in given.T.tolist()]
assert [n & 0xFFFFFFFF for n in chosen.tolist()] == expected
print("kernels agree")
"""


def test_what_stands_for_prmt_in_the_interpreter_does_what_prmt_does() -> None:
    run_in_interpreter(CHOICE)


TABLES = """
import torch
from nf4_matrix import by_table, plain, random_nf4, same_in_a_wider_matrix
from anima.model import nf4_kernels

torch.manual_seed(0)
small = {"tile": (16, 128, 4)}
for transposed in (False, True):
    for shape in ((16, 64), (20, 320), (36, 192)):
        for nested in (True, False):
            given = random_nf4(shape, nested=nested, scaled=nested, groupsize=16)
            expected = plain(given, transposed=transposed, **small)
            assert len(expected.unique()) > 50
            assert torch.equal(by_table(given, transposed=transposed, **small), expected)
    assert torch.equal(by_table(given, transposed=transposed), expected)
    for left, right in ((0, 16), (48, 0), (4, 4)):
        given = random_nf4((20, 192), nested=True, groupsize=16)
        same_in_a_wider_matrix(given, left, right, transposed=transposed, **small)
for shape, transposed, left, width in (
    ((20, 72), False, 0, 72),  # rows that are no whole blocks
    ((6, 64), True, 0, 6),  # columns that are no whole words
    ((8, 64), True, 2, 12),  # words that are not aligned
    ((8, 64), False, 0, 67),  # rows that are not aligned
):
    given = random_nf4(shape, nested=True)
    wide = torch.zeros((shape[transposed], width), dtype=torch.uint8).view(torch.float8_e4m3fn)
    part = wide[:, left : left + shape[not transposed]]
    found = nf4_kernels.unpack(**given, transposed=transposed, output=part, **small).view(torch.uint8)
    assert torch.equal(found, plain(given, transposed=transposed, **small))
print("kernels agree")
"""


def test_what_is_looked_up_has_the_bits_of_the_plain_kernel() -> None:
    run_in_interpreter(TABLES)
