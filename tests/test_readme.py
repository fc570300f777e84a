"""What the README says can be done: commands of files and options that exist, links that lead somewhere, pinned versions, no one's machine."""

import argparse
import ast
import importlib
import importlib.metadata
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
MODULES = {"pytest", "venv", "pip", "torch.distributed.run"}  # what `python -m` runs in the README


def commands():
    """Every command of python or torchrun in the README's blocks of shell, as its words."""
    found = []
    blocks = "\n".join(body for language, body in FENCE.findall(TEXT) if language in ("sh", "bash", "shell", "console"))
    for line in blocks.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;|\|", line.removeprefix("$ ")):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):  # variables of the environment
                words.pop(0)
            if words and re.fullmatch(r"python[\d.]*|torchrun", pathlib.PurePath(words[0]).name):
                found.append(words)
    return found


def parser_of(script):
    """The argument parser that a program of this folder itself makes, or None if it makes none."""
    script = {"entropy.py": "law.py"}.get(script, script)  # entropy.py with arguments is law.py
    if not re.search(r"ArgumentParser|import options", (ROOT / script).read_text(encoding="utf-8")):
        return None
    module, parsers = importlib.import_module(script.removesuffix(".py")), []

    class Stop(Exception):
        pass

    def parse_args(parser, *_):
        parsers.append(parser)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Stop):
            module.options([]) if hasattr(module, "options") else module.main()
    return parsers[0]


def check(words):
    """Fails unless the command names a program, files and options that exist."""
    line = shlex.join(words)
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if words[1:2] == ["-m"] and words[2] != "torch.distributed.run":
        assert words[2] in MODULES, line
        for word in words[3:]:
            assert words[2] != "pytest" or word.startswith("-") or (ROOT / word.split("::")[0]).exists(), f"{line}: no {word}"
        return
    if words[1:2] == ["-c"]:
        return
    assert scripts, f"{line}: which program?"
    script, argv = words[scripts[0]], words[scripts[0] + 1 :]
    assert (ROOT / script).is_file(), f"{line}: no {script}"
    parser = parser_of(script) if "/" not in script else None
    if parser is None:
        assert not [word for word in argv if word.startswith("-")], f"{line}: {script} takes no options"
        return
    parser.error = lambda message: pytest.fail(f"{line}: {message}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # for @files
        parser.parse_args(argv)


def test_the_readme_begins_with_a_picture_and_has_the_commands_that_run_and_test_everything():
    assert re.search(r"!\[[^\]]*\]\(|<img ", TEXT[: TEXT.index("```")])
    lines = [shlex.join(words) for words in commands()]
    assert any(line.endswith("train.py --method kl_cov") for line in lines) and any("-m pytest" in line for line in lines)


@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_the_command_names_programs_files_and_options_that_exist(words):
    check(words)


@pytest.mark.parametrize("line", [
    "python trian.py --method grpo", "python train.py --methode grpo", "python train.py --method gpro", "python train.py --method grpo --steps 0",
    "torchrun --nproc_per_node=2 train.py --metod grpo", "python train.py @recipes/none.txt --method grpo", "python losses.py --fast",
    "python eval.py --model tiny --sample 3 4", "python -m pytest tests/test_none.py", "python -m http.server", "python study.py phenomena",
])  # fmt: skip
def test_a_command_that_cannot_run_would_be_found(line):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(shlex.split(line))


def test_every_option_that_the_text_mentions_belongs_to_a_program_here():
    known = {"--nproc_per_node", "--nnodes", "--standalone"}  # torchrun's
    for path in ROOT.glob("*.py"):
        parser = parser_of(path.name)
        known |= {name for action in parser._actions for name in action.option_strings} if parser else set()
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", FENCE.sub("", TEXT)))
    assert mentioned <= known, mentioned - known


def test_links_and_pictures_of_the_text_are_files_of_the_repository():
    prose = FENCE.sub("", TEXT)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    for target in targets:
        if not re.match(r"\w+:|#", target):
            assert (ROOT / target.split("#")[0]).exists(), target


def pins():
    """{distribution: version} of requirements.txt."""
    rows = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    rows = [re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.!+]+)", row) or row for row in rows if row]
    assert not [row for row in rows if isinstance(row, str)], "not pinned by =="
    return {row[1].lower(): row[2] for row in rows}


def test_every_requirement_is_pinned_exactly():
    assert {"torch", "transformers", "pytest"} <= set(pins())
    for name, version in pins().items():
        assert importlib.metadata.version(name).split("+")[0] == version.split("+")[0], f"{name}: these tests run with another version"


def test_every_package_that_is_imported_is_a_requirement_or_comes_with_one():
    own = {path.stem for folder in (ROOT, ROOT / "tests") for path in folder.glob("*.py")}
    plain = lambda name: name.lower().replace("_", "-")
    needed, more = set(), {plain(name) for name in pins()}
    while more:
        needed |= more
        more = {plain(re.match(r"[\w.-]+", need)[0]) for name in more for need in requires(name)} - needed
    owners = importlib.metadata.packages_distributions()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in modules} - own - set(sys.stdlib_module_names):
                assert set(map(plain, owners.get(module, []))) & needed, f"{path.name} imports {module}"


def requires(name):
    """What a distribution needs without extras."""
    try:
        return [need for need in importlib.metadata.requires(name) or [] if "extra ==" not in need]
    except importlib.metadata.PackageNotFoundError:
        return []


def test_no_file_names_a_place_on_someones_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git here")
    place = re.compile(rb"(?<![\w.:/-])/(?:home|root|Users|work|mnt|tmp|opt|workspace)/\w|[A-Z]:\\\\Users")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".png", ".safetensors", ".jsonl") or not path.is_file():
            continue
        found = place.search(path.read_bytes())
        assert not found, f"{name}: {found[0].decode()}"
