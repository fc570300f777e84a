"""What a user can get wrong ends with exit status 2 and one line that names it, and nothing is written."""

import ast
import json
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, subprocess_of

import data
import losses
import options
import train
from rollout import TINY

ROW = '{"problem": "\\\\boxed{1+1=", "answer": "2"}\n'
SMALL = "--prompts 2 --mini-batch 2 --passes 2 --samples 2 --eval-limit 2 --steps 1 --device cpu".split()

FILES = {
    "good.jsonl": ROW, "notes.txt": "text",
    "nogold.jsonl": ROW + '{"problem": "p?"}\n',
    "long.jsonl": json.dumps({"problem": "\\boxed{" + "1+" * 200, "answer": "1"}),
    "unknown.opt": "--learning-rate 1", "itself.opt": "@itself.opt",
    "taken/thesis.tex": "years of work", "folders/metrics.jsonl/x": "",
    "before/metrics.jsonl": "{}\n", "before/good.jsonl": ROW,
}  # fmt: skip


def drop(*names):
    """A change of a checkpoint folder: these files are gone."""
    return lambda folder: [(folder / name).unlink() for name in names]


def put(name, content):
    """A change of a checkpoint folder: a file with other content."""
    return lambda folder: (folder / name).write_bytes(content)


def edit(name, **changes):
    """A change of a checkpoint folder: other values in a JSON file."""

    def change(folder):
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(old | changes))

    return change


def with_code(folder):
    """A checkpoint that brings its own code, which writes a file when it runs."""
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit("config.json", auto_map=classes, model_type="evil")(folder)
    (folder / "evil.py").write_text("open('executed', 'w')\nclass Config: pass\nclass Model: pass\n")


# The embedded checkpoint with one thing wrong: what is changed, and what the line names beside the folder.
CHECKPOINTS = {
    "no config.json": (drop("config.json"), "--model"),
    "an architecture that nobody knows": (edit("config.json", model_type="no_such_thing"), "--model"),
    "no weights": (drop("model.safetensors"), "--model"),
    "weights as a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "--model"),
    "weights that are cut off": (lambda f: os.truncate(f / "model.safetensors", 200_000), "--model"),
    "weights of another width": (edit("config.json", hidden_size=256), "--model"),
    "weights of fewer layers": (edit("config.json", num_hidden_layers=3, layer_types=None), "missing"),
    "no tokenizer": (drop("tokenizer.json", "tokenizer_config.json"), "--model"),
    "no chat template": (drop("chat_template.jinja"), "chat template"),
    "a chat template that does not parse": (put("chat_template.jinja", b"{% for m in %}"), "chat template"),
    "a chat template that says nothing": (put("chat_template.jinja", b""), "chat template"),
    "code of its own": (with_code, "--model"),
}  # fmt: skip

# What stands on the command line beside good options, and the words that the line has to contain.
WRONG = {
    "an unknown method": ("--method gpro", "--method", "kl_cov"),
    "an unknown option": ("--learning-rate 1", "--learning-rate"),
    "an abbreviated option": ("--step 1", "--step"),
    "an option without its value": ("--lr", "--lr"),
    "no steps": ("--steps 0", "--steps"),
    "a negative learning rate": ("--lr -1e-4", "--lr"),
    "a learning rate that is no number": ("--lr nan", "--lr"),
    "a temperature of 0": ("--temperature 0", "--temperature"),
    "a fraction above 1": ("--kl-cov-ratio 2", "--kl-cov-ratio"),
    "a bound below 0": ("--kl-cov-low -1", "--kl-cov-low", "0 or more"),
    "bounds with nothing between": ("--cov-low 2 --cov-high 1", "--cov-low", "--cov-high"),
    "annealing that ends before it begins": ("--anneal -1", "--anneal"),
    "a mini-batch that does not divide": ("--prompts 8 --mini-batch 3", "--mini-batch", "--prompts"),
    "a group of one": ("--samples 1", "--samples", "grpo"),
    "a batch of one": ("--samples 1 --prompts 1 --mini-batch 1 --advantage reinforce_pp", "--prompts"),
    "no signal where all is signal": ("--filter-groups --advantage reinforce_pp", "--filter-groups", "batch"),
    "an unknown device": ("--device tpu", "--device"),
    "a GPU that is not there": ("--device cuda", "--device", "cpu"),
    "completions longer than the context": ("--max-new-tokens 128", "--max-new-tokens", "128"),
    "prompts that are all too long": ("--max-prompt-tokens 3", "--data", "than 3 tokens"),
    "a file of options that is not there": ("@none.txt", "none.txt"),
    "a file of options that names itself": ("@itself.opt", "@itself.opt"),
    "a file of options with an unknown one": ("@unknown.opt", "--learning-rate"),
    "a file of options that is not UTF-8": ("@latin.opt", "UTF-8"),
    "a row without a gold": ("--data nogold.jsonl", "nogold.jsonl: row 2"),
    "problems that are all held out": ("--data good.jsonl --eval-data good.jsonl", "good.jsonl", "held-out"),
    "held-out problems that are all too long": ("--eval-data long.jsonl", "--eval-data", "longer than"),
    "a model that is not there": ("--model no/where/at/all", "--model", "no/where/at/all"),
    "a folder without a model": ("--model taken", "--model", "taken"),
    "an --out that is a file": ("--out notes.txt", "--out", "notes.txt"),
    "an --out with other files": ("--out taken", "--out", "taken"),
    "an --out with other files, to be overwritten": ("--out taken --overwrite", "--out", "taken"),
    "an --out whose metrics.jsonl is a folder": ("--out folders --overwrite", "--out", "folders"),
    "an --out with a name too long": ("--out " + "x" * 300, "--out"),
    "an --out that is not UTF-8": ("--out caf\udce9", "--out", "utf-8"),
    "an --out that holds a run": ("--out before", "--resume", "--overwrite", "before"),
    "nothing to resume": ("--resume", "--out", "--resume"),
    "to overwrite the model": ("--overwrite --out before --model before/tiny", "--overwrite", "before/tiny"),
    "to overwrite the problems": ("--overwrite --out before --data before/good.jsonl", "before/good.jsonl"),
    "to resume and to overwrite": ("--resume --overwrite", "--resume", "--overwrite"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with the files above."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.opt").write_bytes(b"caf\xe9")
    shutil.copytree(TINY, tmp_path / "before" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 8))
    return tmp_path


@pytest.fixture
def main(command):
    """`python train.py ...` within this process: (exit status, standard output, standard error)."""
    return lambda *argv: command(train.main, "--method", "kl_cov", *SMALL, "--out", "run", *argv)


def tree(folder):
    """Every file below a folder, with size and time."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in files}


def refused(result, *words):
    """Exit status 2, and one line that contains the words."""
    status, out, err = result
    assert status == 2 and out == "" and len(err.strip().splitlines()) == 1, err
    assert err.startswith("train.py: error: ") and all(word in err for word in words), err


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_one_line_that_names_it_and_nothing_is_written(place, main, name):
    argv, *words = WRONG[name]
    before = tree(place)
    refused(main(*argv.split()), *words)
    assert tree(place) == before


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_wrong_checkpoint_is_one_line_that_names_it_and_nothing_is_written_or_run(place, main, name):
    change, word = CHECKPOINTS[name]
    change(shutil.copytree(TINY, place / "wrong"))
    before = tree(place)
    refused(main("--model", "wrong"), "wrong", word)
    assert tree(place) == before  # `executed` is not there either


def test_options_are_checked_before_any_model_is_loaded(place, main, monkeypatch):
    monkeypatch.setattr(train, "load", lambda *_: pytest.fail("a model is loaded"))
    for name in ("no steps", "bounds with nothing between", "an --out that holds a run", "a group of one"):
        refused(main(*WRONG[name][0].split()))


def test_more_processes_than_gpus_are_refused(place, main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # of torchrun
    refused(main("--device", "cuda"), "--device", "--nproc_per_node=2")


def test_the_command_itself_refuses_in_one_line(place):
    done = subprocess_of("--method", "kl_cov", *SMALL, "--data", "nogold.jsonl", cwd=place)
    refused((done.returncode, done.stdout, done.stderr), "nogold.jsonl: row 2")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory"),
])  # fmt: skip
def test_running_out_of_memory_is_one_line_with_the_options_that_need_less(place, main, monkeypatch, error):
    def run(*_):
        raise error

    monkeypatch.setattr(train, "train", run)
    status, _, err = main()
    assert status == 1 and len(err.splitlines()) == 1
    assert all(word in err for word in ("--micro-batch 16384", "--sample-batch 4096", "--resume"))
    for error in map(RuntimeError, ("a mistake of ours", "CUDA error: an illegal memory access")):
        with pytest.raises(RuntimeError, match=str(error)):  # keeps its traceback
            main()


def test_nothing_is_unpickled_evaluated_or_run_that_came_from_elsewhere():
    """Read off the source: every call of the programs here."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}: {name}"
            assert name not in ("eval", "exec", "compile", "pickle.load", "pickle.loads", "os.system"), where
            assert "shell" not in given and given.get("trust_remote_code", "False") == "False", where
            assert name != "torch.load" or given.get("weights_only") == "True", where
            if re.fullmatch(r"Auto\w+\.from_pretrained", name):
                assert given["trust_remote_code"] == "False", where
                assert "Model" not in name or given["use_safetensors"] == "True", where


# ---------------------------------------------------------------- right options


def parse(*argv):
    return options.options([*argv, "--out", "nowhere/at/all"])


def test_options_may_stand_in_a_file_and_those_after_it_win(tmp_path):
    (tmp_path / "small.txt").write_text("# a comment\n--lr 0.25   # why\n--steps\n7\n\n--method clip_cov\n")
    o = parse(f"@{tmp_path / 'small.txt'}", "--steps", "9")
    assert (o.method, o.lr, o.steps) == ("clip_cov", 0.25, 9)


@pytest.mark.parametrize("method", losses.METHODS)
def test_every_method_has_its_published_clip_and_goes_with_every_estimator(method):
    low, high = {"clip_higher": (0.2, 0.28), "clip_cov": (1.0, 1.0)}.get(method, (0.2, 0.2))
    for estimator in losses.ESTIMATORS:
        o = parse("--method", method, "--advantage", estimator)
        assert (o.clip_low, o.clip_high) == (low, high)
    assert parse("--method", method, "--clip-high", "0.5").clip_high == 0.5


def test_annealing_is_the_default_with_the_embedded_problems_only():
    argv = "--method", "kl_cov"
    assert parse(*argv).anneal == 640 and parse(*argv, "--data", "gsm8k").anneal == 0
    assert parse(*argv, "--anneal", "0").anneal == 0 and parse(*argv, "--anneal", "7").anneal == 7


@pytest.mark.parametrize("more, warned", [("--mini-batch 64", 1), ("--mini-batch 64 --passes 2", 0), ("", 0)])
def test_kl_cov_with_one_update_a_step_warns_that_it_does_nothing(capsys, more, warned):
    parse("--method", "kl_cov", *more.split())
    assert capsys.readouterr().err.count("no gradient before the policy has moved") == warned


def test_help_names_every_option_and_method(capsys):
    with pytest.raises(SystemExit):
        options.options(["--help"])
    said = capsys.readouterr().out
    names = [name for rows in options.OPTIONS.values() for name, *_ in rows]
    assert all(name in said for name in [*names, *losses.METHODS, *losses.ESTIMATORS])
