"""Arrows point down only: a room imports what stands to its left in ORDER, and no files import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "leanlm"
ORDER = ("common", "models", "data", "launch", "memory", "optimizers", "strategies", "config", "reporting", "training",
         "inference", "planning", "")  # fmt: skip


def imports(file: Path) -> set[Path]:
    """The files of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == ROOT.name:
            place = ROOT.joinpath(*node.module.split(".")[1:])  # type: ignore[union-attr]
            inside = [(place / f"{alias.name}.py") for alias in node.names]
            found |= {each for each in inside if each.is_file()} or {place.with_suffix(".py")}
    return {each for each in found if each.is_file() and each != file}


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0] if file.parent != ROOT else ""


GRAPH = {file: imports(file) for file in ROOT.rglob("*.py")}


def test_rooms_import_what_is_below_them() -> None:
    order = [each for each in ORDER if each == "" or (ROOT / each).is_dir()]
    assert {room(file) for file in GRAPH} == {*order}
    upwards = [
        f"{file.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for file, others in GRAPH.items()
        for other in others
        if order.index(room(other)) > order.index(room(file)) or room(other) == ""
    ]
    assert upwards == []


def test_no_files_import_each_other() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError with the files that stand in a circle


def test_the_root_holds_commands_of_a_page() -> None:
    assert {
        file.name: len(file.read_text().splitlines()) for file in ROOT.glob("*.py") if len(file.read_text().splitlines()) > 60
    } == {}
