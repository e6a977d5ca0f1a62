"""How the package hangs together: no circle of imports, nothing private used outside, torch only where it works."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lfm2_export

ROOT = Path(lfm2_export.__file__).parent
MODULES = {
    ".".join(("lfm2_export", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imported(name: str, *, also_late: bool) -> Iterator[str]:
    """The package's modules that a module imports when it is loaded; ``also_late``: wherever in its code."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree) if also_late else _at_load(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lfm2_export"):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (one if one in MODULES else str(node.module) for one in found)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def _at_load(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not is_typing and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _at_load(child)


def test_no_module_imports_itself_through_others() -> None:
    arrows = {name: set(imported(name, also_late=False)) - {name, "lfm2_export"} for name in MODULES}
    done: set[str] = set()
    while free := {name for name in arrows.keys() - done if arrows[name] <= done}:
        done |= free
    assert arrows.keys() - done == set()


def test_families_and_what_opens_a_checkpoint_do_not_know_the_nets() -> None:
    seen, waiting = set[str](), ["lfm2_export.checkpoint", "lfm2_export.inspection", "lfm2_export.artifact"]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imported(name, also_late=False)
    assert not [name for name in seen if name.startswith(("lfm2_export.models", "lfm2_export.parity"))]


def test_what_is_private_to_a_package_is_not_imported_from_outside_of_it() -> None:
    found = []
    for name, path in MODULES.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lfm2_export"):
                words = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                private = any(word.startswith("_") and not word.startswith("__") for word in words)
                if private and str(node.module).rpartition(".")[0] != package and node.module != package:
                    found.append(f"{name}: {node.module} {[alias.name for alias in node.names]}")
    assert found == []


def test_what_a_tensor_is_is_asked_of_its_family() -> None:
    """No file outside of families/ spells out a published name to find out what a tensor is."""
    words = (".experts.", "expert_bias", "feed_forward.gate", "embed_tokens.weight", "lm_head.weight")
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES.values()
        if "families" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare | ast.Call)
        for part in (_tested(node))
        if any(word in part for word in words)
    ]
    assert found == []


def _tested(node: ast.Compare | ast.Call) -> list[str]:
    """The texts that a name is compared with: ``in``, ``==``, ``startswith``, ``endswith``."""
    if isinstance(node, ast.Compare):
        values: list[ast.expr] = [node.left, *node.comparators]
    elif isinstance(node.func, ast.Attribute) and node.func.attr in ("startswith", "endswith"):
        values = list(node.args)
    else:
        return []
    return [
        one.value
        for value in values
        for one in ast.walk(value)
        if isinstance(one, ast.Constant) and isinstance(one.value, str)
    ]
