"""What the house promises: files of a readable size, imports that only run downwards, each concept shown."""

import ast
import graphlib
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

COURSE, LAB = sorted(ROOT.glob("*.py")), sorted(ROOT.glob("lab/*.py"))
TESTS = [*sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob("tests/bench/*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*COURSE, *LAB, *TESTS]}


def imported(path):
    """The modules of this repository that a file imports anywhere, as `train` or `lab.study`."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in [*COURSE, *LAB]}


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_have_110_characters_functions_50_lines_at_most_and_docstrings(path):
    assert not [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 110]
    assert ast.get_docstring(TREES[path])
    for node in ast.walk(TREES[path]) if path not in TESTS else ():
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
            public = node in TREES[path].body and node.name != "main"
            assert ast.get_docstring(node) or not public, f"{node.name} has no docstring"


def test_nothing_at_top_level_imports_the_laboratory_and_no_imports_form_a_circle():
    graph = {path.stem: imported(path) for path in COURSE}
    assert len(graph) <= 14 and not [name for name in set().union(*graph.values()) if name[:3] == "lab"]
    graph |= {f"lab.{path.stem}": imported(path) for path in LAB}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_who_reads_train_reads_at_most_ten_other_files():
    command = [sys.executable, "-c", "import sys, train; print(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    own = set(done.stdout.split()) & {path.stem for path in COURSE}
    assert "train" in own and len(own - {"train"}) <= 10, own


SHOWN = {"entropy": "the ceiling 0.6", "covariance": "stand in wrong answers",
         "losses": "+2.41", "rollout": "of the entropy is at", "prime": " -4.",
         "reward": "Broken off after a second: 1.", "arithmetic": "fails on 256 of 512"}  # fmt: skip


@pytest.mark.parametrize("name, shown", SHOWN.items(), ids=SHOWN)
def test_a_file_of_the_course_run_by_itself_shows_its_concept(name, shown, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # for figures/
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert shown in said and len(said.splitlines()) <= 25 and "-0.0000" not in said


def test_no_file_names_a_place_on_someones_machine():
    place = re.compile(rb"(?<![\w.:/-])/(?:home|root|Users|work|mnt|workspace)/\w|[A-Z]:\\\\Users")
    for path in [*TREES, *ROOT.glob("*.md"), *ROOT.glob("recipes/*"), *ROOT.glob("results/**/*.[mj]*")]:
        assert not place.search(path.read_bytes()), path
