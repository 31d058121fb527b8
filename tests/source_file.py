"""A Python file as the house rules look at it: its stage, its imports, full names of what it uses."""

import ast
import functools
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Source:
    """One file: its path from the repository's root with forward slashes, and its text."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @functools.cached_property
    def stage(self) -> str:
        """Name of the stage: launch, or the part after anima/; empty for anima/__init__.py."""
        parts = PurePosixPath(self.path).with_suffix("").parts
        name = parts[0] if parts[0] == "launch" else parts[1]
        return "" if name == "__init__" else name

    def dotted(self, node: ast.expr) -> str:
        """`a.b.c` of an expression, with `import x as a` undone; empty if it is something else."""
        if isinstance(node, ast.Attribute):
            front = self.dotted(node.value)
            return f"{front}.{node.attr}" if front else ""
        return self.aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    @functools.cached_property
    def aliases(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found.update({alias.asname: alias.name for alias in node.names if alias.asname})
            elif isinstance(node, ast.ImportFrom):
                found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        return found

    @functools.cached_property
    def type_only_lines(self) -> set[int]:
        """Lines under `if TYPE_CHECKING:`."""
        blocks = [node for node in ast.walk(self.tree) if isinstance(node, ast.If)]
        blocks = [block for block in blocks if self.dotted(block.test) == "typing.TYPE_CHECKING"]
        return {inner.lineno for block in blocks for inner in block.body}

    @functools.cached_property
    def imports(self) -> list[tuple[int, str]]:
        """Line and full name of all that is imported, inside functions, by importlib and as `torch.x` as well."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                front = "." * node.level + (node.module or "")
                found += [(node.lineno, f"{front}.{alias.name}") for alias in node.names]
            elif isinstance(node, ast.Call) and self.dotted(node.func) in ("importlib.import_module", "__import__"):
                found += [(node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            elif isinstance(node, ast.Attribute) and self.dotted(node).startswith("torch."):
                found.append((node.lineno, self.dotted(node)))
        return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")
