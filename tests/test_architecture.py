"""The house rules, held by walking the syntax trees of anima/ and launch/; README.md draws the picture.

Each rule yields "file:line: what is wrong - what to do". test_architecture_rules.py shows that each can fail.
"""

import ast
import functools
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
from source_file import Source, within

REPOSITORY = Path(__file__).resolve().parents[1]

LAYERS = (
    ("errors", "disk", "entry", "free_memory", "transfer", "config"),
    ("distributed", "tracking"),
    ("data", "model"),
    ("objectives", "inspection"),
    ("train", "inference"),
    ("preflight", "evaluation", "cluster", "sweeps"),
    ("launch",),
)
"""Stages from the first to the last: an import goes to an earlier row or stays in its own."""
STRANGERS = {("data", "model"), ("model", "data")}
"""Stages of one row that must not import each other. Others of one row may, in one direction."""
OWNERS = {
    "deepspeed": ("anima/train/engine.py",),
    "bitsandbytes": ("anima/model/", "anima/train/optimizer.py"),
    "peft": ("anima/model/lora.py", "anima/model/lora_layers.py", "anima/model/adapters.py"),
    "transformers": ("anima/model/", "anima/inference/"),
    "huggingface_hub": ("anima/model/weights.py", "anima/cluster/staging.py"),
    "prompt_toolkit": ("launch/chat.py",),
    "tqdm": ("anima/tracking/bar.py",),
    "lm_eval": ("anima/evaluation/harness.py",),
    "tokenizers": ("anima/model/",),
    "gguf": ("anima/model/gguf.py",),
    "liger_kernel": ("anima/model/", "anima/objectives/token_logps.py"),
    "safetensors": ("anima/model/", "anima/train/checkpoint.py"),
    "datasets": ("anima/data/",),
    "datasketch": ("anima/inspection/near_duplicates.py",),
    "pyarrow": ("anima/data/",),
    "pandas": ("anima/data/",),
    "wandb": ("anima/tracking/",),
    "tyro": ("anima/config/cli.py",),
    "yaml": ("anima/config/cli.py", "anima/sweeps/sweep_file.py"),
    "optuna": ("anima/sweeps/sampler.py",),
    "matplotlib": ("anima/sweeps/plot.py",),
    "openai": ("anima/evaluation/judge.py",),
    "httpx": ("anima/evaluation/judge.py",),
    "requests": ("anima/evaluation/judge.py",),
    "psutil": ("anima/free_memory.py",),
    "scipy": ("anima/evaluation/bradley_terry.py",),
    "torch.distributed": ("anima/distributed.py", "anima/train/engine.py"),
}
"""Library -> the only files and folders that import it; launch/, which hands objects on, may name their types."""
UNHIDING = {"evaluate"}
"""Names of libraries that a script of launch/ may have: it takes launch/ off the search path, and nobody else asks."""
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "core", "manager"}
UNSAFE_FORMATS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60


def layer_order(source: Source) -> Iterator[str]:
    rows = {stage: row for row, stages in enumerate(LAYERS) for stage in stages}
    if source.stage and source.stage not in rows:
        yield f"{source.path}: no such stage - add it to LAYERS here and to README.md, or put the file into a stage"
        return
    for line, name in source.imports:
        if name.startswith("."):
            yield f"{source.path}:{line}: relative import - write it from anima on"
        if not within(name, "anima") and not within(name, "launch"):
            continue
        target = "launch" if within(name, "launch") else name.split(".")[1] if "." in name else ""
        if target in ("", "__version__", source.stage):
            continue
        if rows.get(target, len(LAYERS)) > rows.get(source.stage, -1):
            yield f"{source.path}:{line}: {name} belongs to a later stage - pass what is needed as an argument"
        elif (source.stage, target) in STRANGERS:
            yield f"{source.path}:{line}: {name}: data and model do not know each other - meet in a later stage"


def library_owners(source: Source) -> Iterator[str]:
    for line, name in source.imports:
        for library, owners in OWNERS.items():
            names_a_type = source.stage == "launch" and line in source.type_only_lines
            if within(name, library) and not source.path.startswith(owners) and not names_a_type:
                yield f"{source.path}:{line}: {name} - only {', '.join(owners)} may; ask it for what is needed"


def telling_names(source: Source) -> Iterator[str]:
    path = PurePosixPath(source.path)
    for part in path.with_suffix("").parts:
        if part in EMPTY_NAMES:
            yield f"{source.path}: the name {part} says nothing - name it after what it owns"
    if path.parts[0] == "launch" and path.stem in library_names() - UNHIDING:
        yield f"{source.path}: the name hides the library {path.stem} from every script in launch/ - rename it"


@functools.cache
def library_names() -> frozenset[str]:
    return frozenset({*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), *OWNERS} - {"anima"})


def sizes(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{source.path}: {lines} lines, the ceiling is {MAX_FILE_LINES} - split it by what its parts own"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield (
                    f"{source.path}:{node.lineno}: {node.name} has {length} lines, the ceiling is "
                    f"{MAX_FUNCTION_LINES} - give a part of it a name"
                )


def docstrings(source: Source) -> Iterator[str]:
    """Modules; public names of anima/; methods too, unless a base class documents them or the body is `...`."""
    if ast.get_docstring(source.tree) is None:
        yield f"{source.path}:1: no docstring - say what the file owns and what it does not know"
    if source.stage == "launch":
        return
    scopes: list[tuple[str, list[ast.stmt]]] = [("", source.tree.body)]
    scopes += [
        (f"{node.name}.", node.body)
        for node in source.tree.body
        if isinstance(node, ast.ClassDef) and all(source.dotted(base) == "typing.Protocol" for base in node.bases)
    ]
    for prefix, body in scopes:
        for node in body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if not named or prefix.startswith("_") or node.name.startswith("_") or ast.unparse(node.body) == "...":
                continue
            if ast.get_docstring(node) is None:
                yield f"{source.path}:{node.lineno}: {prefix}{node.name} has no docstring - say what it promises"


def swallowed_errors(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{source.path}:{node.lineno}: bare except - name the exceptions that are expected"
            elif is_broad(node.type) and all(isinstance(step, ast.Pass | ast.Continue) for step in node.body):
                yield f"{source.path}:{node.lineno}: every error is swallowed - name the expected ones, or handle it"
        suppress = isinstance(node, ast.Call) and source.dotted(node.func) == "contextlib.suppress"
        if suppress and any(map(is_broad, node.args)):
            yield f"{source.path}:{node.lineno}: every error is swallowed - name the expected ones"


def is_broad(kind: ast.expr) -> bool:
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(name, ast.Name) and name.id in ("Exception", "BaseException") for name in names)


def safe_formats(source: Source) -> Iterator[str]:
    """No file format that runs code when it is read: tensors go into safetensors, the rest into JSON."""
    for line, name in source.imports:
        if name == "pickle.PicklingError":  # what sending an object to a process raises; reads nothing
            continue
        if name.split(".")[0] in UNSAFE_FORMATS or name in ("torch.load", "torch.save"):
            yield f"{source.path}:{line}: {name} - use safetensors for tensors and JSON for the rest"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and (
            source.dotted(node.func).endswith(".read_pickle")
            or any(keyword.arg == "allow_pickle" and not is_false(keyword.value) for keyword in node.keywords)
        ):
            yield f"{source.path}:{node.lineno}: reads pickles - use safetensors for tensors and JSON for the rest"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def known_homes(source: Source) -> Iterator[str]:
    """Path.expanduser raises RuntimeError for a user who is not there: a traceback instead of an error."""
    for node in ast.walk(source.tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "expanduser"
            and source.dotted(node) != "os.path.expanduser"
        ):
            yield f"{source.path}:{node.lineno}: Path.expanduser - use expanded of anima/config/paths.py"


def order_in_folder(sources: list[Source]) -> Iterator[str]:
    """`__init__.py` of a stage lists its files ("What: a, b, c (…)."); each imports only files listed before it."""
    folders: dict[str, dict[str, Source]] = {}
    for source in sources:
        parts = PurePosixPath(source.path).parts
        if parts[0] == "anima" and len(parts) > 2:
            folders.setdefault("/".join(parts[:-1]), {})[parts[-1].removesuffix(".py")] = source
    for folder, files in folders.items():
        if "__init__" not in files:
            yield f"{folder}: no __init__.py - write one whose docstring lists the files in order"
            continue
        init = files.pop("__init__")
        if init.imports:
            yield f"{init.path}: imports something - leave it to the files, or every import loads the folder"
        order = listed_files(ast.get_docstring(init.tree) or "")
        for name in sorted(files.keys() ^ set(order)):
            where = "listed but not there" if name in order else "there but not listed"
            yield f'{folder}/{name}.py: {where} - __init__.py begins "What it is: file, file, … (each imports only …)."'
        for position, name in enumerate(order):
            for line, target in files[name].imports if name in files else ():
                for other in order[position + 1 :]:
                    if within(target, f"{folder.replace('/', '.')}.{other}"):
                        yield f"{folder}/{name}.py:{line}: {other} is listed later - move what both need to the front"


def listed_files(docstring: str) -> list[str]:
    """Names after the first colon up to the end of the sentence, without what stands in parentheses, in order."""
    found = re.search(r":\s*(.+?)\.(?:\s|$)", re.sub(r"\s*\([^)]*\)", "", docstring), re.DOTALL)
    return re.split(r",\s*", found[1]) if found else []


def one_direction(sources: list[Source]) -> Iterator[str]:
    """Two stages of one row may know each other in one direction only."""
    edges = {
        (source.stage, name.split(".")[1])
        for source in sources
        for _, name in source.imports
        if name.startswith("anima.")
    }
    for here, there in sorted(edges):
        if here < there and (there, here) in edges:
            yield f"anima/{here} and anima/{there} import each other - move what both need to an earlier stage"


FILE_RULES = (
    layer_order,
    library_owners,
    telling_names,
    sizes,
    docstrings,
    swallowed_errors,
    safe_formats,
    known_homes,
)
TREE_RULES = (order_in_folder, one_direction)


@functools.cache
def all_sources() -> list[Source]:
    files = sorted([*REPOSITORY.glob("anima/**/*.py"), *REPOSITORY.glob("launch/**/*.py")])
    return [Source(file.relative_to(REPOSITORY).as_posix(), file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize("rule", FILE_RULES)
def test_every_file_keeps(rule: Callable[[Source], Iterator[str]]) -> None:
    broken = [message for source in all_sources() for message in rule(source)]
    if broken:
        pytest.fail("\n".join(broken), pytrace=False)


@pytest.mark.parametrize("rule", TREE_RULES)
def test_the_tree_keeps(rule: Callable[[list[Source]], Iterator[str]]) -> None:
    broken = list(rule(all_sources()))
    if broken:
        pytest.fail("\n".join(broken), pytrace=False)


def test_every_stage_of_the_picture_is_looked_at() -> None:
    """The rules would hold for no files as well."""
    assert {source.stage for source in all_sources()} >= {"", "errors", "config", "data", "model", "train", "launch"}
