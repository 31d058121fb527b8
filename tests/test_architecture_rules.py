"""Every rule of test_architecture.py fails on a source that breaks it, and keeps quiet on the nearest good one."""

import re

import pytest
from test_architecture import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    Source,
    docstrings,
    known_homes,
    layer_order,
    library_owners,
    one_direction,
    order_in_folder,
    safe_formats,
    sizes,
    swallowed_errors,
    telling_names,
)

PROTOCOL = '"""D."""\nfrom typing import Protocol\nclass A(Protocol):\n    """D."""\n    def f(self):\n'
TYPES_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import T\n"
BROKEN = [
    (layer_order, "anima/data/a.py", "from anima.train.step import x", "later stage"),
    (layer_order, "anima/errors.py", "import anima.objectives.sft", "later stage"),
    (layer_order, "anima/train/a.py", "def f():\n    from anima import preflight", "a.py:2: anima.preflight"),
    (layer_order, "anima/evaluation/a.py", "from launch.train import main", "later stage"),
    (layer_order, "anima/data/a.py", "from anima.model.lora import x", "do not know each other"),
    (layer_order, "anima/model/a.py", "from anima.data import records", "do not know each other"),
    (layer_order, "anima/data/a.py", "from . import records", "relative import"),
    (layer_order, "anima/stuff/a.py", "", "no such stage"),
    (layer_order, "anima/train/a.py", "import anima.nowhere", "later stage"),
    (layer_order, "anima/__init__.py", "from anima.errors import AnimaError", "later stage"),
    (library_owners, "anima/train/step.py", "import deepspeed.ops", "only anima/train/engine.py"),
    (library_owners, "launch/a.py", "from transformers import AutoTokenizer", "anima/inference/"),
    (library_owners, "anima/data/a.py", TYPES_ONLY, "anima/inference/"),
    (library_owners, "launch/a.py", TYPES_ONLY + "import peft", "only anima/model/lora"),
    (library_owners, "anima/data/a.py", "import torch.distributed as dist", "only anima/distributed.py"),
    (library_owners, "anima/data/a.py", "from torch import distributed", "only anima/distributed.py"),
    (library_owners, "anima/data/a.py", "import torch as t\nt.distributed.barrier()", "a.py:2: torch.distributed"),
    (library_owners, "anima/data/a.py", "import importlib\nimportlib.import_module('peft')", "only anima/model/lora"),
    (telling_names, "anima/data/utils.py", "", "says nothing"),
    (telling_names, "anima/common/records.py", "", "says nothing"),
    (telling_names, "launch/datasets.py", "", "hides the library"),
    (telling_names, "launch/profile.py", "", "hides the library"),
    (telling_names, "launch/numpy.py", "", "hides the library"),
    (sizes, "anima/data/a.py", "x = 1\n" * (MAX_FILE_LINES + 1), "301 lines"),
    (sizes, "launch/a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "f has 61 lines"),
    (sizes, "launch/a.py", "class A:\n  async def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "f has 61 lines"),
    (docstrings, "launch/a.py", "x = 1", "no docstring"),
    (docstrings, "anima/data/a.py", '"""D."""\ndef f(): pass', "f has no docstring"),
    (docstrings, "anima/data/a.py", '"""D."""\nclass A:\n    """D."""\n    def f(self): pass', "A.f has no docstring"),
    (docstrings, "anima/data/a.py", '"""D."""\nclass A:\n    pass', "A has no docstring"),
    (docstrings, "anima/data/a.py", PROTOCOL + "        return 1", "A.f has no docstring"),
    (swallowed_errors, "launch/a.py", "try:\n    f()\nexcept:\n    raise", "a.py:3: bare except"),
    (swallowed_errors, "launch/a.py", "try:\n    f()\nexcept Exception:\n    pass", "swallowed"),
    (
        swallowed_errors,
        "launch/a.py",
        "while x:\n  try: f()\n  except (OSError, BaseException): continue",
        "swallowed",
    ),
    (swallowed_errors, "launch/a.py", "import contextlib\nwith contextlib.suppress(Exception):\n    f()", "swallowed"),
    (safe_formats, "anima/data/a.py", "import pickle", "safetensors"),
    (known_homes, "launch/a.py", "from pathlib import Path\nPath(x).expanduser()", "a.py:2: Path.expanduser"),
    (safe_formats, "anima/data/a.py", "from cloudpickle import dumps", "safetensors"),
    (safe_formats, "anima/data/a.py", "import torch\ntorch.load(f)", "a.py:2: torch.load"),
    (safe_formats, "anima/data/a.py", "from torch import load", "torch.load"),
    (safe_formats, "anima/data/a.py", "import pandas as pd\npd.read_pickle(f)", "reads pickles"),
    (safe_formats, "anima/data/a.py", "import numpy as np\nnp.load(f, allow_pickle=True)", "reads pickles"),
]
GOOD = [
    (
        layer_order,
        "anima/train/a.py",
        "import anima.errors\nfrom anima import __version__\nimport anima.train.b",
    ),
    (layer_order, "anima/inference/a.py", "from anima.train.step import x"),
    (layer_order, "launch/train.py", "import anima.evaluation.elo"),
    (layer_order, "launch/train.py", "from launch.training import assemble"),
    (library_owners, "anima/train/engine.py", "import deepspeed\nimport torch.distributed"),
    (library_owners, "launch/a.py", TYPES_ONLY),
    (library_owners, "anima/data/a.py", "import torch\nimport yamlish\ntorch.distributions.Normal"),
    (telling_names, "anima/data/records.py", ""),
    (telling_names, "anima/data/datasets.py", ""),
    (telling_names, "launch/prequantize.py", ""),
    (sizes, "anima/data/a.py", "x = 1\n" * MAX_FILE_LINES),
    (sizes, "launch/a.py", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
    (docstrings, "launch/a.py", '"""D."""\ndef f(): pass'),
    (docstrings, "anima/data/a.py", '"""D."""\ndef _f(): pass\nclass A(Base):\n    """D."""\n    def f(self): pass'),
    (docstrings, "anima/data/a.py", PROTOCOL + "        ..."),
    (swallowed_errors, "launch/a.py", "try:\n    f()\nexcept Exception:\n    say()\n    raise"),
    (swallowed_errors, "launch/a.py", "try:\n    f()\nexcept OSError:\n    pass"),
    (known_homes, "anima/data/a.py", "import os\nos.path.expanduser(x)"),
    (safe_formats, "anima/data/a.py", "import numpy as np\nnp.load(f, allow_pickle=False)\nimport json\njson.load(f)"),
]


@pytest.mark.parametrize(("rule", "path", "text", "message"), BROKEN)
def test_a_broken_rule_is_reported(rule, path, text, message):
    reports = list(rule(Source(path, text)))
    assert len(reports) >= 1
    assert all(re.match(rf"{re.escape(path)}(:\d+)?: .* - ", report) for report in reports)
    assert any(message in report for report in reports), reports


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_a_kept_rule_is_quiet(rule, path, text):
    assert list(rule(Source(path, text))) == []


def stage(docstring: str, **files: str) -> list[Source]:
    init = Source("anima/data/__init__.py", f'"""{docstring}"""')
    return [init, *(Source(f"anima/data/{name}.py", text) for name, text in files.items())]


def test_files_of_a_stage_follow_its_list():
    listing = "Rows: one (rows. and so on),\ntwo, three (each imports only earlier ones).\n\nKnows no four: five."
    good = stage(listing, one="", two="from anima.data.one import x", three="import anima.data.two")
    assert list(order_in_folder(good)) == []
    wrong_way = stage(listing, one="from anima.data import three", two="", three="")
    assert [report.split(" - ")[0] for report in order_in_folder(wrong_way)] == [
        "anima/data/one.py:1: three is listed later"
    ]
    unlisted = list(order_in_folder(stage(listing, one="", two="", four="")))
    assert [report.split(" - ")[0] for report in unlisted] == [
        "anima/data/four.py: there but not listed",
        "anima/data/three.py: listed but not there",
    ]
    assert "there but not listed" in next(order_in_folder(stage("Rows.", one="")))
    assert "no __init__.py" in next(order_in_folder(stage(listing, one="")[1:]))
    importing = [Source("anima/data/__init__.py", '"""Rows: one."""\nimport anima.data.one'), *stage("", one="")[1:]]
    assert "imports something" in next(order_in_folder(importing))


def test_stages_of_one_row_know_each_other_in_one_direction():
    there = Source("anima/train/a.py", "from anima.inference.chat import x")
    back = Source("anima/inference/chat.py", "import anima.train.b")
    assert list(one_direction([there])) == list(one_direction([back])) == []
    assert "anima/inference and anima/train import each other" in next(one_direction([there, back]))
