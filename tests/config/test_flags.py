"""The command line as text: what belongs to which flag."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from anima.config.flags import flag_table, read_argv
from anima.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Schema:
    inner: Inner = field(default_factory=Inner)
    name: str
    steps: int | None = None
    kind: Literal["a", "b"] = "a"
    quick: bool = field(default=False, metadata={"bare": "True"})
    packing: bool = True


FLAGS = flag_table(Schema)


def read(*argv: str) -> dict[str, tuple[str, ...]]:
    return {name: given.values for name, given in read_argv(argv, FLAGS).items()}


def test_the_table_is_flat_and_knows_what_is_required() -> None:
    assert list(FLAGS) == ["rate", "files", "name", "steps", "kind", "quick", "packing"]
    assert [name for name, flag in FLAGS.items() if flag.required] == ["name"]
    assert FLAGS["files"].takes_many
    assert not FLAGS["name"].takes_many
    assert FLAGS["steps"].allowed == "a whole number or None"
    assert FLAGS["kind"].allowed == "a or b"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--rate", "1e-5", "--name=x"], {"rate": ("1e-5",), "name": ("x",)}),
        (["--name="], {"name": ("",)}),
        (["--name=a=b"], {"name": ("a=b",)}),
        (["--rate", "-1"], {"rate": ("-1",)}),
        (["--name=--rate"], {"name": ("--rate",)}),
        (["--files", "a", "-b", "c d", "--rate", "1"], {"files": ("a", "-b", "c d"), "rate": ("1",)}),
        (["--files"], {"files": ()}),
        (["--files=a"], {"files": ("a",)}),
        (["--files=['a', 'b c']"], {"files": ("a", "b c")}),
        (["--files=[]"], {"files": ()}),
        (["--files=[ab].json"], {"files": ("[ab].json",)}),
        (["--files=[1]"], {"files": ("[1]",)}),
        (["--quick"], {"quick": ("True",)}),
        (["--quick", "False"], {"quick": ("False",)}),
        (["--quick", "--rate=1"], {"quick": ("True",), "rate": ("1",)}),
    ],
)
def test_what_belongs_to_which_flag(argv: list[str], expected: dict[str, tuple[str, ...]]) -> None:
    assert read(*argv) == expected


@pytest.mark.parametrize(
    "added",
    [["--local_rank=1"], ["--local-rank=0"], ["--local_rank", "3"], ["--local-rank", "-1"]],
)
def test_what_launchers_add_is_dropped_wherever_it_stands(added: list[str]) -> None:
    assert read(*added, "--name", "x") == {"name": ("x",)}
    assert read("--name", "x", *added) == {"name": ("x",)}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nam", "x"], ["did you mean name", "--name"]),
        (["--inner.rate=1"], ["no option 'inner.rate'"]),
        (["--name", "x", "--name=y"], ["--name is given twice", "'x'", "--name=y"]),
        (["--files", "a", "--files", "b"], ["given twice", "one list"]),
        (["x"], ["'x' belongs to no flag"]),
        (["--rate", "1", "2"], ["'2' belongs to no flag", "after --rate"]),
        (["-n", "x"], ["'-n' belongs to no flag"]),
        (["--"], ["'--' belongs to no flag"]),
        (["--packing"], ["--packing needs a value", "True or False"]),
        (["--name", "--rate", "1"], ["--name needs a value", "--rate"]),
        (["--files=None"], ["files cannot have this value", "'None'"]),
        (["--local_rank=x"], ["no option 'local_rank'"]),
    ],
)
def test_mistakes_are_named(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    for word in words:
        assert word in str(caught.value)
