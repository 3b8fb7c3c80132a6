"""The house: imports run one way, ten modules at most stand in the root, no module does work when imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # a module imports from lower floors and from its own room
    ["utils"],
    ["options"],
    ["ratings"],
    ["dataloader"],
    ["models"],
    ["maml"],
    ["evaluation"],
    ["training", "serving"],
    ["main"],
    ["benchmarks"],  # what it measures is the outer loop of main.py
    ["pretrain", "recommend", "compare", "benchmark", "datasets"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(
    path
    for folder in (ROOT, *(ROOT / name for name in FLOOR if (ROOT / name).is_dir()))
    for path in folder.glob("*.py")
    if path.name != "__init__.py"
)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def room(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree):
    """The first part of the name of each module that is imported anywhere in a file, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name whole paths"
            yield node.module.split(".")[0]


@each_file
def test_imports_run_one_way(path):
    for name in imported(ast.parse(path.read_text())):
        if name in FLOOR and name != room(path):
            assert FLOOR[name] < FLOOR[room(path)], f"{path.relative_to(ROOT)} imports {name}"


def test_at_most_ten_modules_stand_in_the_root():
    names = [path.stem for path in FILES if path.parent == ROOT]
    assert len(names) <= 10 and set(names) <= set(FLOOR)


DEFINES = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AugAssign,
    ast.AnnAssign, ast.Pass,
)  # fmt: skip


def defines(node):
    """Whether a statement only defines something, or tries to import it, or stands under __main__."""
    if isinstance(node, ast.Try):
        return all(isinstance(part, DEFINES) for part in [*node.body, *(p for h in node.handlers for p in h.body)])
    is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    return isinstance(node, DEFINES) or is_main


@each_file
def test_no_module_does_work_when_imported(path):
    docstring, *rest = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    for node in rest:
        assert defines(node), f"line {node.lineno} runs when imported"
