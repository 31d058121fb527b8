"""Package metadata: what Anima needs to run, and its extras. Exact tested versions are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
ARENA = ["openai>=2.0", "scipy>=1.15", "fastapi>=0.115", "uvicorn>=0.30"]
"""The judge's client, the optimizer of ratings, and what `transformers serve` needs to be a judge of one's own."""
SWEEPS = ["matplotlib>=3.10", "optuna>=4.5"]
"""Sweeps without W&B: what chooses the trials, and what draws them."""


def read_version() -> str:
    """`__version__` of anima/__init__.py, read as text: importing it would need what is being installed."""
    text = (HERE / "anima" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('anima/__init__.py: no line __version__ = "…"')
    return match.group(1)


setup(
    name="anima",
    version=read_version(),
    description="QLoRA fine-tuning of models that do not fit: SFT and DPO under DeepSpeed ZeRO-2",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["anima", "anima.*"]),
    package_data={"anima.evaluation": ["page.css", "page.js"]},
    install_requires=[
        "bitsandbytes>=0.50",
        "datasets>=5.0",
        "datasketch>=2.0",
        "deepspeed>=0.19",
        "filelock>=3.20",
        "gguf>=0.19",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "numpy>=2.0",
        "peft>=0.21",
        "prompt_toolkit>=3.0.50",
        "psutil>=6.0",
        "pyarrow>=20",
        "pyyaml>=6.0",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
        "torch>=2.11",
        "tqdm>=4.67",
        "transformers>=5.17",
        "tyro>=1.0",
        "wandb>=0.31",
    ],
    extras_require={
        "gpu": ["liger-kernel>=0.8"],
        "arena": ARENA,
        "harness": ["lm-eval>=0.4.13"],
        "sweeps": SWEEPS,
        "dev": [*ARENA, *SWEEPS, "hypothesis>=6.150", "mypy>=2.4", "pytest>=9.1", "ruff>=0.17", "types-PyYAML>=6.0"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
