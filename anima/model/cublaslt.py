"""cuBLASLt's product of e4m3 matrices, with a scale for every row and column, added to a matrix, as one kernel.

torch._scaled_mm is this call without the matrix: a product that is to be added to has to leave in fp32 there, and come
back for the sum. The library is the one that torch has loaded; structures and numbers are those of cublasLt.h from CUDA
12.9 on, where scales of rows came.
"""

import ctypes
import functools
import logging
import threading
from ctypes import byref, c_int8, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

HOPPER = (9, 0)
"""The compute capability whose kernels know scales of rows; torch takes others before and behind it."""
FIRST_VERSION = 120900
WORKSPACE_BYTES = 32 << 20
"""What NVIDIA recommends for Hopper."""
_E4M3, _BF16, _FP32, _COMPUTE_FP32 = 28, 14, 0, 68
_TRANSPOSE_A, _A_SCALES, _B_SCALES, _FAST_SUMS, _A_SCALE_MODE, _B_SCALE_MODE = 3, 17, 18, 25, 31, 32
_SCALE_A_ROW, _WORKSPACE_LIMIT = 3, 1
_log = logging.getLogger(__name__)
_lock = threading.Lock()
_one = ctypes.c_float(1.0)


class _Found(ctypes.Structure):
    """An algorithm that the library proposes."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether `add_product` runs on this device and computes what it should."""
    if torch.cuda.get_device_capability(device) != HOPPER:
        return False
    try:
        problem = "" if _agrees(device) else "it computes something else"
    except (OSError, AttributeError, RuntimeError) as error:
        problem = str(error)
    if problem:
        _log.warning("cuBLASLt cannot add to fp8 products here, which are slower so: %s", problem)
    return not problem


def add_product(onto: Tensor, left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor) -> None:
    """onto += (left x left_scales) (right x right_scales)^T, added up in fp32 and rounded once.

    Args:
        onto: (M, N), bf16, without gaps; overwritten.
        left: (M, K), e4m3, without gaps; K and N are multiples of 16.
        left_scales: fp32 (M, 1).
        right: (N, K), e4m3, without gaps.
        right_scales: fp32 (1, N).

    Raises:
        RuntimeError: the library refuses.
    """
    (rows, width), columns = left.shape, right.shape[0]
    library, workspace = _library(), _workspace(onto.device)
    with _lock:  # a product's description holds the addresses of its scales
        plan = _plan(onto.device, rows, columns, width)
        plan.scales(right_scales, left_scales)
        there, stream = onto.data_ptr(), torch.cuda.current_stream(onto.device).cuda_stream
        _check(
            library.cublasLtMatmul(
                *(_handle(onto.device), plan.product, byref(_one), right.data_ptr(), plan.right),
                *(left.data_ptr(), plan.left, byref(_one), there, plan.onto, there, plan.onto),
                *(byref(plan.found), workspace.data_ptr(), WORKSPACE_BYTES, stream),
            )
        )


class _Plan:
    """A product of one shape. The library counts in columns, so all is transposed: onto^T += right left^T."""

    def __init__(self, device: torch.device, rows: int, columns: int, width: int) -> None:
        self._library = library = _library()
        self.product, self.found = c_void_p(), _Found()
        self.right = self.left = self.onto = c_void_p()
        _check(library.cublasLtMatmulDescCreate(byref(self.product), _COMPUTE_FP32, _FP32))
        self._set(_TRANSPOSE_A, c_int32(1))
        self._set(_FAST_SUMS, c_int8(1))
        for mode in (_A_SCALE_MODE, _B_SCALE_MODE):
            self._set(mode, c_int32(_SCALE_A_ROW))
        unread = _workspace(device)  # an algorithm is only proposed where scales are named
        self.scales(unread, unread)
        self.right = _layout(library, _E4M3, width, columns)
        self.left = _layout(library, _E4M3, width, rows)
        self.onto = _layout(library, _BF16, columns, rows)
        wish, limit, count = c_void_p(), c_size_t(WORKSPACE_BYTES), ctypes.c_int()
        _check(library.cublasLtMatmulPreferenceCreate(byref(wish)))
        _check(library.cublasLtMatmulPreferenceSetAttribute(wish, _WORKSPACE_LIMIT, byref(limit), c_size_t(8)))
        layouts = (self.right, self.left, self.onto, self.onto)
        status = library.cublasLtMatmulAlgoGetHeuristic(
            _handle(device), self.product, *layouts, wish, 1, byref(self.found), byref(count)
        )
        library.cublasLtMatmulPreferenceDestroy(wish)
        _check(status)
        if not count.value:
            raise RuntimeError(f"no algorithm for {rows} x {columns} x {width}")

    def scales(self, right: Tensor, left: Tensor) -> None:
        """Those of the next product."""
        self._set(_A_SCALES, c_void_p(right.data_ptr()))
        self._set(_B_SCALES, c_void_p(left.data_ptr()))

    def _set(self, name: int, value: Any) -> None:  # noqa: ANN401  (a number of ctypes)
        size = c_size_t(ctypes.sizeof(value))
        _check(self._library.cublasLtMatmulDescSetAttribute(self.product, name, byref(value), size))

    def __del__(self) -> None:
        for layout in filter(None, (self.right, self.left, self.onto)):
            self._library.cublasLtMatrixLayoutDestroy(layout)
        if self.product:
            self._library.cublasLtMatmulDescDestroy(self.product)


_plan = functools.lru_cache(maxsize=256)(_Plan)
"""Micro-batches differ in tokens: a run has many shapes, a micro-batch as many as its layers have."""


def _layout(library: Any, form: int, rows: int, columns: int) -> c_void_p:  # noqa: ANN401  (a library of ctypes)
    found = c_void_p()
    _check(library.cublasLtMatrixLayoutCreate(byref(found), form, c_uint64(rows), c_uint64(columns), c_int64(rows)))
    return found


@functools.cache
def _library() -> Any:  # noqa: ANN401  (a library of ctypes)
    cuda = (torch.version.cuda or "").split(".")[0]
    library = ctypes.CDLL(f"libcublasLt.so.{cuda}")
    library.cublasLtGetVersion.restype = c_size_t
    if library.cublasLtGetVersion() < FIRST_VERSION:
        raise OSError(f"cuBLASLt {library.cublasLtGetVersion()} is older than {FIRST_VERSION}")
    library.cublasLtMatmul.argtypes = [
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p),
    ]
    return library


@functools.cache
def _handle(device: torch.device) -> c_void_p:
    found = c_void_p()
    with torch.cuda.device(device):
        _check(_library().cublasLtCreate(byref(found)))
    return found


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """One for all products, which run one behind the other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt answers {status}")


def _agrees(device: torch.device) -> bool:
    """A small product against torch."""
    left, right = (torch.randn(rows, 64, device=device).to(torch.float8_e4m3fn) for rows in (33, 48))
    left_scales, right_scales = torch.rand(33, 1, device=device), torch.rand(1, 48, device=device)
    onto = torch.randn(33, 48, device=device).to(torch.bfloat16)
    expected = onto.float() + left.float() @ right.float().T * left_scales * right_scales
    add_product(onto, left, left_scales, right, right_scales)
    return bool((onto.float() - expected).norm() < 1e-2 * expected.norm())
