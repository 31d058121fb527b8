"""On a GPU: NF4 to e4m3 by tables of blocks against the plain kernel, bit for bit."""

import pytest
import torch
from nf4_matrix import by_table, plain, random_nf4, same_in_a_wider_matrix

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHAPES = [(6656, 6656), (17920, 6656), (6656, 17920), (576, 1536), (16, 64), (1040, 192), (132, 4160), (28, 576)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_by_tables_has_the_bits_of_the_plain_kernel(
    shape: tuple[int, int], nested: bool, transposed: bool
) -> None:
    for scaled in (True, False):
        given = random_nf4(shape, nested=nested, scaled=scaled, device="cuda")
        expected = plain(given, transposed=transposed)
        assert torch.equal(by_table(given, transposed=transposed), expected)


@pytest.mark.parametrize("shape", [(6656, 6656), (576, 1536), (48, 192)])
@pytest.mark.parametrize(("left", "right"), [(0, 16), (6656, 0), (16, 32), (4, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_of_a_wider_matrix_get_the_same_bits(
    shape: tuple[int, int], left: int, right: int, transposed: bool
) -> None:
    given = random_nf4(shape, nested=True, device="cuda")
    same_in_a_wider_matrix(given, left, right, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_any_tile_gives_the_same_bits_every_time(transposed: bool) -> None:
    given = random_nf4((2064, 6656), nested=True, device="cuda")
    expected = plain(given, transposed=transposed)
    for tile in ((4, 1024, 4), (16, 256, 2), (32, 64, 4), (64, 256, 8), (256, 64, 4), (128, 256, 8)):
        assert torch.equal(by_table(given, transposed=transposed, tile=tile), expected)
    for _ in range(20):
        assert torch.equal(by_table(given, transposed=transposed), expected)


def test_the_largest_place_does_not_fit_in_32_bits() -> None:
    shape = (65600, 65536)
    given = random_nf4(shape, nested=True, device="cuda")
    last = {**given, "shape": (64, shape[1])}
    for name, weights in (("packed", 2), ("absmax", 64)):
        last[name] = given[name][-64 * shape[1] // weights :]
    last["nested"] = (given["nested"][0], given["nested"][1][-64 * shape[1] // 64 // 256 :], given["nested"][2])
    for transposed in (False, True):
        end = by_table(given, transposed=transposed)
        end = end[:, -64:] if transposed else end[-64:]
        assert torch.equal(end, plain(last, transposed=transposed))


@pytest.mark.parametrize("transposed", [False, True])
def test_what_has_no_tables_is_read_by_the_plain_kernel(transposed: bool) -> None:
    from anima.model import nf4_kernels

    for shape in ((16, 72), (6, 200)):
        given = random_nf4(shape, nested=True, device="cuda")
        found = nf4_kernels.unpack(**given, transposed=transposed).view(torch.uint8)
        assert torch.equal(found, plain(given, transposed=transposed))
    given = random_nf4((64, 192), nested=True, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        wide, scale = (
            {**given, "dtype": dtype, "inverse_scale": inverse} for inverse in (None, given["inverse_scale"])
        )
        by_weight = nf4_kernels.unpack(**wide, transposed=transposed)
        assert torch.equal(by_weight, nf4_kernels.unpack(**wide).T if transposed else by_weight)
        assert torch.isfinite(nf4_kernels.unpack(**scale, transposed=transposed)).all()
