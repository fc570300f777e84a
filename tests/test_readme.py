"""What the pages promise: commands, options, files and links that exist, and recipes as published."""

import argparse
import importlib
import importlib.metadata
import re
import shlex

import pytest
import torch
import transformers
from conftest import ROOT

import data
import losses
import train

PAGES = [ROOT / "README.md", ROOT / "course.md", ROOT / "recipes" / "README.md"]
PAGES += sorted((ROOT / "results").glob("*.md"))
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README, RECIPES = TEXT["README.md"], sorted((ROOT / "recipes").glob("*.txt"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def commands():
    """Every command of python or torchrun in the pages' blocks of shell and in their lines of code."""
    found = []
    for text in TEXT.values():
        blocks = [body for language, body in FENCE.findall(text) if language == "sh"]
        inline = re.findall(r"`((?:python|torchrun)\s[^`]*)`", FENCE.sub("", text))
        lines = "".join(blocks).replace("\\\n", " ").splitlines() + inline
        parts = [" ".join(part.split()) for line in lines for part in re.split(r"&&|;", line)]
        found += [part for part in parts if re.match(r"(\S*/)?(python[\d.]*|torchrun)\s", part)]
    return sorted(set(found))


class Stop(Exception):
    """Raised where a program would parse its options."""


def parser_of(program):
    """The argument parser of a file such as lab/study.py, or None if it makes none."""
    path = ROOT / program
    source = path.read_text(encoding="utf-8")
    if "def main(" not in source or not re.search(r"parse_args|options\(", source):
        return None
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module, parsers = importlib.util.module_from_spec(spec), []

    def parse_args(parser, *_):
        parsers.append(parser)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        spec.loader.exec_module(module)
        with pytest.raises(Stop):
            module.main()
    return parsers[0]


def check(line):
    """Fails unless the command names a program, options and files that exist."""
    words = shlex.split(line, comments=True)[1:]
    while words[0].startswith("--n") or words[0].startswith("--rdzv"):  # torchrun's own options
        words.pop(0)
    if words[0] == "-m" and words[1] in ("pytest", "venv", "pip"):
        program, words = None, words[2:]
    elif words[0] == "-m":
        assert words[1].startswith("lab."), line
        program, words = f"{words[1].replace('.', '/')}.py", words[2:]
    else:
        program, words = words[0], words[1:]
    for word in words:
        if re.match(r"@?(tests|recipes|results|lab)/", word):
            assert list(ROOT.glob(word.lstrip("@").split("::")[0])), f"{line}: no {word}"
    if program:
        assert (ROOT / program).is_file(), f"{line}: no {program}"
        parser = parser_of(program)
        if not parser:
            assert not [word for word in words if word.startswith("-")], f"{line}: {program} takes no options"
        elif not re.search(r"\.\.\.|--help|\b[A-Z_]+\b", line):  # RUN_DIR: a pattern
            parser.error = lambda message: pytest.fail(f"{line}: {message}")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(ROOT)
                parser.parse_args(words)


@pytest.mark.parametrize("line", commands())
def test_the_command_names_a_program_options_and_files_that_exist(line):
    check(line)


def test_every_option_that_the_pages_mention_belongs_to_a_program_here():
    known = {"--nproc_per_node", "--nnodes"}  # torchrun's
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("tests/bench/*.py")]:
        parser = parser_of(path.relative_to(ROOT))
        known |= set(parser._option_string_actions) if parser else set()
    for name, text in TEXT.items():
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", FENCE.sub("", text)))
        assert mentioned <= known, (name, mentioned - known)


@pytest.mark.parametrize("name", TEXT)
def test_links_and_pictures_are_files_of_the_repository(name):
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", FENCE.sub("", TEXT[name])):
        if not re.match(r"\w+:|#", target):
            assert ((ROOT / name).parent / target.split("#")[0]).exists(), target


def test_the_readme_is_short_begins_with_a_picture_and_has_the_commands_that_run_and_test_everything():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 110
    assert "![" in README[: README.index("```")]
    assert any("train.py --method kl_cov" in line for line in lines)
    assert any(line.startswith("python3 -m venv .venv && ") and "-m pytest" in line for line in lines)


def test_the_readmes_example_adds_a_method_that_trains(monkeypatch, tmp_path):
    (block,) = re.findall(r"^```python\n(def .*?)^```", README, re.M | re.S)
    name = re.search(r'^METHODS\["(\w+)"\] = ', block, re.M)[1]
    assert name not in losses.METHODS and len(block.splitlines()) <= 10
    monkeypatch.setattr(losses, "METHODS", dict(losses.METHODS))
    exec(block, vars(losses))
    words = "--data arithmetic_heldout --eval-data arithmetic --eval-limit 1 --prompts 8 --device cpu --out"
    o = train.options(["--method", name, *words.split(), str(tmp_path / "run")])
    policy, problems, _ = train.load(o)
    metrics, _ = train.step(policy, train.problems_of_step(problems, 0, o), 1, o)
    assert metrics["grad_norm"] > 0 and metrics["skipped"] == 0


def test_every_requirement_is_pinned_to_the_version_that_these_tests_run_with():
    for line in (ROOT / "requirements.txt").read_text().split():
        name, version = line.split("==")
        assert importlib.metadata.version(name).split("+")[0] == version, name


# ---------------------------------------------------------------- recipes

SIZES = {  # hidden, intermediate, layers, heads, key/value heads, embeddings tied: as published
    "0.5b": (896, 4864, 24, 14, 2, True), "1.5b": (1536, 8960, 28, 12, 2, True),
    "3b": (2048, 11008, 36, 16, 2, True), "7b": (3584, 18944, 28, 28, 4, False),
}  # fmt: skip


@pytest.mark.parametrize("method", ["grpo", "clip_cov", "kl_cov"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_the_published_settings_with_each_method(path, method, tmp_path):
    o = train.options([f"@{path}", "--method", method, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert o.model.lower() == f"qwen/{path.stem}" and {o.data, o.eval_data} <= set(data.KNOWN)
    assert (o.prompts, o.samples, o.prompts // o.mini_batch, o.passes) == (256, 8, 8, 1)
    assert (o.temperature, o.grad_clip, o.lr, o.filter_groups, o.anneal) == (1.0, 1.0, 5e-7, True, 0)
    assert (o.clip_low, o.clip_high) == ((1.0, 1.0) if method == "clip_cov" else (0.2, 0.2))
    assert (o.clip_cov_ratio, o.cov_low, o.cov_high) == (2e-4, 1, 5)
    assert (o.kl_cov_ratio, o.kl_cov_beta, o.kl_cov_low) == (2e-3, 1, 0)


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_in_table_and_recipe_is_what_the_formula_gives(size, tmp_path):
    hidden, intermediate, layers, heads, kv, tied = SIZES[size]
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        P = sum(p.numel() for p in transformers.Qwen2ForCausalLM(config).parameters())
    path = ROOT / "recipes" / f"qwen2.5-{size}.txt"
    o = train.options([f"@{path}", "--method", "grpo", "--device", "cpu", "--out", str(tmp_path / "run")])
    a, c = layers * (36 * hidden + 8 * intermediate), 4 * layers * kv * hidden // heads
    update = 20 * P + a * o.micro_batch + 1e9
    sampling = 18 * P + c * o.sample_batch * (o.max_prompt_tokens + o.max_new_tokens)
    want = [P, a / 1e6, c / 1e3, o.micro_batch, o.max_new_tokens, *(x * P / 1e9 for x in (18, 11))]
    (row,) = re.findall(rf"^\| {size} \| (.*) \|$", TEXT["recipes/README.md"], re.M | re.I)
    said = [float(x) for x in row.split(" | ")]
    assert said == pytest.approx([*want, update / 1e9, sampling / 1e9], rel=0.003, abs=0.05)
    assert all(f"{x / 1e9:.1f} GB" in path.read_text(encoding="utf-8") for x in (update, sampling))
    assert o.micro_batch >= o.max_prompt_tokens + o.max_new_tokens  # or a row alone would exceed it
