"""Runs checks of Triton's kernels in its interpreter, which a process has on or off from its start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def run_in_interpreter(checks: str) -> None:
    """Fail unless `checks`, Python whose last line prints "kernels agree", gets there; skip without Triton."""
    pytest.importorskip("triton", reason="triton is not installed")
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", checks], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "kernels agree", done.stderr[-3000:]
