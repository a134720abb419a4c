"""Who may import whom, and what a command started as a script finds under the names of its neighbours."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(path for folder in ("training", "hub") for path in (ROOT / folder).glob("[!_]*.py"))
OURS = ("modeling_notellm2", "training", "hub", "tests")
ALLOWED = {
    "modeling_notellm2": ("modeling_notellm2",),
    "training": ("modeling_notellm2", "training"),
    "training/tables": ("modeling_notellm2", "training.tables"),
    "training/experiments": ("modeling_notellm2", "training"),
    "hub": ("modeling_notellm2", "training.tables", "hub"),
}
"""Folder to the packages of ours that its files may import; the longest folder counts."""


def imports_of(path: Path) -> Iterator[str]:
    """Full names of what a file imports when it runs, in functions too."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level] if node.level else ())
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder):
    files = [
        path
        for path in (ROOT / folder).rglob("*.py")
        if max((other for other in ALLOWED if is_within_folder(path, other)), key=len) == folder
    ]
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports_of(path)
        if name.split(".")[0] in OURS and not any(is_within(name, package) for package in ALLOWED[folder])
    ]
    assert not wrong


def is_within_folder(path: Path, folder: str) -> bool:
    return path.is_relative_to(ROOT / folder)


def test_nothing_of_the_product_uses_the_experiments():
    product = [path for path in (ROOT / "training").rglob("*.py") if not is_within_folder(path, "training/experiments")]
    assert not [path for path in product for name in imports_of(path) if is_within(name, "training.experiments")]


def test_one_console_prints_all():
    """The one of `plain_console`, for which `[/x]` in a path or title is no markup."""
    makers = [
        path.relative_to(ROOT).as_posix()
        for folder in OURS[:3]
        for path in (ROOT / folder).rglob("*.py")
        if "Console(" in path.read_text(encoding="utf-8") or "rich.print" in {*imports_of(path)}
    ]
    assert makers == ["training/tables/commands/handler.py"]


def test_no_circle_of_imports():
    """Of any files of ours, those inside functions counted too."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in OURS[:3]
        for path in (ROOT / package).rglob("*.py")
    }
    needs = {
        name: {
            found
            for imported in imports_of(path)
            if (found := imported if imported in names else imported.rpartition(".")[0]) in names and found != name
        }
        for name, path in names.items()
    }
    TopologicalSorter(needs).prepare()  # CycleError names the circle


@cache
def helped(command: Path) -> str:
    """A command's help, and where its process finds modules: `-i` goes on behind its end with what stands on stdin."""
    asked = "import importlib.util as u\n" + "".join(
        f"s = u.find_spec({name!r}); print('FOUND', {name!r}, s.origin if s else None)\n"
        for name in ("evaluate", command.stem, "metrics", "tables", "index")
    )
    done = subprocess.run(
        [sys.executable, "-i", str(command), "--help"], input=asked, capture_output=True, text=True, cwd=ROOT.parent
    )
    assert "usage:" in done.stdout
    return done.stdout


each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda path: f"{path.parent.name}-{path.stem}")


@each_command
def test_a_command_as_a_script_shadows_no_library(command):
    places = {line.split()[1]: line.split()[2] for line in helped(command).splitlines() if line.startswith("FOUND")}
    assert Path(places["evaluate"]).parent.name == "evaluate"
    assert not [place for place in places.values() if place.startswith(str(ROOT)) and ".venv" not in place]


@each_command
def test_who_reads_tables_says_what_may_be_fetched(command):
    reads = any(option in helped(command) for option in ("--items ", "--interactions "))
    assert ("--allow_remote " in helped(command)) == (reads or command.name == "serve.py")
