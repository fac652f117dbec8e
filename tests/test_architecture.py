"""Imports point one way: contracts ... <- search <- strategies <- guard <- the front ends (docs/architecture.md)."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import inferenceguard

ROOT = Path(inferenceguard.__file__).parent

# A module may import what stands in its own group or in an earlier one. Names are modules or packages of the root.
LAYERS = (
    {
        "errors",
        "contracts",
        "beams",
        "budget",
        "objectives",
        "text",
        "checkpoints",
        "chat",
        "kv",
        "four_bits",
        "llama",
        "memory",
        "product",
        "threads",
        "sampling",
    },
    {"search"},
    {"strategies"},
    {"record", "guard", "session"},
    {"cli", "server", "evaluation", "certify", "theory", "config", "embedded", "integrations", "__main__"},
)
LATER = {("guard", "config")}  # Guard.from_preset and from_pretrained are shorthands: imported when they are called
LEAVES = {"engines", "scorers", "critic", "training"}  # import nothing above the first group, and each other
TESTING = "testing"  # shipped for third parties: imports the first group only, and nothing of the product imports it

FILES = sorted(ROOT.rglob("*.py"))


def module_of(file: Path) -> str:
    """The name under the root: "search", "strategies", ...; "" for the package's own __init__."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(file: Path) -> set[str]:
    """The project's modules that a file imports at run time, inside functions too (but for those in LATER)."""
    tree = ast.parse(file.read_text())
    hints = inside(tree, lambda node: isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    delayed = inside(tree, lambda node: isinstance(node, ast.FunctionDef))
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative imports hide the direction"
            module = node.module or ""
            if id(node) in delayed and (module_of(file), module.removeprefix("inferenceguard.")) in LATER:
                continue
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "inferenceguard" else {module}
    return {name.split(".")[1] for name in found if name.startswith("inferenceguard.")}


def inside(tree: ast.AST, chosen: Callable[[ast.AST], bool]) -> set[int]:
    """The identities of all nodes under the chosen ones."""
    return {id(inner) for node in ast.walk(tree) if chosen(node) for inner in ast.walk(node)}


def allowed(module: str) -> set[str]:
    first = LAYERS[0]
    if module in LEAVES:
        return first | LEAVES
    if module == TESTING:
        return first
    if module == "":
        return set().union(*LAYERS) | LEAVES  # the package's front page shows the public names
    level = next((index for index, layer in enumerate(LAYERS) if module in layer), None)
    assert level is not None, f"{module} has no place in the architecture: give it one in LAYERS"
    below = set().union(*LAYERS[: level + 1])
    if level >= 2:
        below |= {"scorers"}  # strategies and the gate put scorers behind a wall (scorers/safe.py)
    if level >= 4:
        below |= LEAVES  # only the front ends know the engines, scorers and critics by name
    return below


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    module = module_of(file)
    wrong = imports(file) - allowed(module) - {module}
    assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_the_first_group_needs_no_model_library():
    """Contracts and arithmetic load without transformers, so that a plugin's own tests start fast."""
    light = {"errors", "contracts", "beams", "budget", "objectives", "search", "strategies", "testing"}
    for file in FILES:
        if module_of(file) in light:
            tree = ast.parse(file.read_text())
            heavy = {
                name.split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
            } & {"transformers", "accelerate", "gguf", "safetensors", "pytest", "hypothesis"}
            assert not heavy, f"{file.relative_to(ROOT)} imports {', '.join(sorted(heavy))}"


def test_rows_are_moved_in_one_place_only():
    """`Beams.take` and `join` alone build rows from rows: nobody else sets two of a row's fields by index."""
    for file in FILES:
        if module_of(file) in ("beams", "testing"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Beams":
                raise AssertionError(f"{file.relative_to(ROOT)}:{node.lineno} builds Beams: use replace, take or join")


def test_one_loop():
    """Only the search (and an engine, inside its own block) calls `extend` of an engine."""
    callers = {
        module_of(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "extend" and "engine" in ast.unparse(node.value)
    }
    assert callers <= {"search", "testing", "critic", "training"}
