"""What a user can get wrong: every case ends with exit status 2 and one line that names the option or file, and nothing is written."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import subprocess_of

import data
import eval as evaluation
import train
from rollout import TINY

ROW = '{"problem": "\\\\boxed{1+1=", "answer": "2"}\n'
SMALL = "--prompts 2 --mini-batch 2 --passes 2 --samples 2 --eval-limit 2 --final-samples 2 --steps 1 --device cpu".split()


def texts(folder):
    """Data files, files of options, and places that --out cannot be."""
    files = {
        "good.jsonl": ROW, "empty.jsonl": "", "blank.jsonl": "\n\n", "cut.jsonl": ROW + '{"problem": "p?", "ans', "list.jsonl": "[1, 2]\n",
        "number.jsonl": "3\n", "nogold.jsonl": ROW + '{"problem": "p?"}\n', "emptygold.jsonl": '{"problem": "p?", "answer": " "}\n',
        "noproblem.jsonl": '{"problem": "", "answer": "1"}\n', "boolean.jsonl": '{"problem": "p?", "answer": true}\n',
        "worked.jsonl": json.dumps({"problem": "p?", "solution": "so\nno box"}) + "\n", "columns.jsonl": '{"task": "p?", "result": "1"}\n',
        "long.jsonl": json.dumps({"problem": "\\boxed{" + "1+" * 200, "answer": "1"}) + "\n", "deep.jsonl": "[" * 100_000 + "\n",
        "empty.json": "", "cut.json": '[{"problem": "p?", "answer": "1"}', "object.json": '{"rows": []}\n', "empty.csv": "", "header.csv": "problem,answer\n",
        "quote.csv": 'problem,answer\n"p?,1\n', "empty.parquet": "", "text.parquet": "no parquet", "notes.txt": "text", "noname": ROW,
        "unknown.opt": "--learning-rate 1\n", "itself.opt": f"@{folder}/itself.opt\n", "value.opt": "--lr\n", "taken/thesis.tex": "years of work",
        "folders/metrics.jsonl/x": "",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in ("latin.jsonl", "latin.csv", "latin.json", "latin.opt"):
        (folder / name).write_bytes(b'[{"problem": "caf\xe9?", "answer": "1"}]\n')
    (folder / "folder.jsonl").mkdir()
    (folder / "dangling").symlink_to(folder / "nowhere")
    shutil.copy(folder / "good.jsonl", folder / "locked.jsonl")


def checkpoints(folder):
    """Checkpoint folders, each the embedded one with one thing wrong."""

    def variant(name, change=None, **files):
        made = shutil.copytree(TINY, folder / name)
        for file, value in files.items():
            path = next(p for p in made.iterdir() if p.stem == file)
            path.unlink() if value is None else path.write_bytes(value) if isinstance(value, bytes) else None
            if isinstance(value, dict):
                path.write_text(json.dumps({k: v for k, v in (json.loads(read(path)) | value).items() if v is not ...}))
        if change:
            change(made)

    originals = {p.name: p.read_text() for p in Path(TINY).glob("*.json")}
    read = lambda path: originals[path.name]
    weights = (Path(TINY) / "model.safetensors").read_bytes()
    layers = json.loads(originals["config.json"])["num_hidden_layers"]
    more = {"num_hidden_layers": layers + 2, "layer_types": ...}
    remote = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}

    def evil(made):
        (made / "evil.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")

    (folder / "hollow").mkdir()
    shutil.copytree(TINY, folder / "run-before" / "model")
    (folder / "run-before" / "metrics.jsonl").write_text("{}\n")
    (folder / "run-before" / "good.jsonl").write_text(ROW)
    variant("noconfig", config=None)
    variant("tornconfig", config=b'{"model_type": ')
    variant("latinconfig", config=b'{"model_type": "caf\xe9"}')
    variant("listconfig", config=b"[]")
    variant("strange", config={"model_type": "no_such_thing", "architectures": ["NoSuchThing"]})
    variant("weightless", model=None)
    variant("pickled", lambda made: (made / "pytorch_model.bin").write_bytes(b"cos\nsystem\n"), model=None)
    variant("cutweights", model=weights[: len(weights) // 2])
    variant("noweights", model=b"")
    variant("garbage", model=b"\xff" * 4096)
    variant("wider", config={"hidden_size": 256})
    variant("deeper", config=more)
    variant("othervocab", config={"vocab_size": 7})
    variant("notokenizer", lambda made: (made / "tokenizer_config.json").unlink(), tokenizer=None)
    variant("torntokenizer", tokenizer=b'{"version": ')
    variant("mute", chat_template=None)
    variant("templatesyntax", chat_template=b"{% for message in %}")
    variant("templateraises", chat_template=b"{{ raise_exception('no users here') }}")
    variant("templateblank", chat_template=b"")
    variant("endless", generation_config={"eos_token_id": ...}, config={"eos_token_id": None}, tokenizer_config={"eos_token": None})
    variant("windowed", config={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": ["sliding_attention"] * layers})
    variant("remote", evil, config=remote)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    texts(folder)
    checkpoints(folder)
    return folder


# name of a case: what stands on the command line beside a good one, and what the line has to name
WRONG = {
    "an unknown method": ("--method gpro", "--method", "kl_cov"),
    "an unknown estimator": ("--advantage best", "--advantage", "grpo"),
    "an unknown option": ("--learning-rate 1", "--learning-rate"),
    "an abbreviated option": ("--step 1", "--step"),
    "a word too many": ("more", "more"),
    "an option without its value": ("--lr", "--lr"),
    "no steps": ("--steps 0", "--steps"),
    "half a step": ("--steps 1.5", "--steps"),
    "more steps than can be counted": ("--steps 1" + "0" * 400, "--steps"),
    "a negative learning rate": ("--lr -1e-4", "--lr"),
    "a learning rate that is no number": ("--lr nan", "--lr"),
    "an infinite learning rate": ("--lr inf", "--lr"),
    "a word for a number": ("--temperature warm", "--temperature"),
    "a temperature of 0": ("--temperature 0", "--temperature"),
    "a fraction above 1": ("--kl-cov-ratio 2", "--kl-cov-ratio"),
    "a fraction that is no number": ("--clip-cov-ratio nan", "--clip-cov-ratio"),
    "a negative fraction": ("--clip-cov-ratio -0.1", "--clip-cov-ratio"),
    "a bound that is no number": ("--cov-low nan", "--cov-low"),
    "bounds with nothing between": ("--cov-low 2 --cov-high 1", "--cov-low", "--cov-high"),
    "a mini-batch that does not divide": ("--prompts 8 --mini-batch 3", "--mini-batch", "--prompts"),
    "a group of one": ("--samples 1", "--samples", "grpo"),
    "a group of one for PRIME": ("--samples 1 --advantage prime", "--samples", "prime"),
    "nothing to compare with": ("--samples 1 --prompts 1 --mini-batch 1 --advantage reinforce_pp", "--prompts"),
    "no signal where all is signal": ("--filter-groups --advantage reinforce_pp", "--filter-groups", "whole batch"),
    "no tokens": ("--entropy-fraction 0", "--entropy-fraction"),
    "no entropy bonus": ("--entropy-coef 0", "--entropy-coef"),
    "a reward model that does not learn": ("--prm-lr 0", "--prm-lr"),
    "a seed that is no number": ("--seed x", "--seed"),
    "no hours": ("--max-hours 0", "--max-hours"),
    "an entropy below 0": ("--stop-when-entropy -1", "--stop-when-entropy"),
    "no checkpoints": ("--save-every 0", "--save-every"),
    "no micro-batch": ("--micro-batch 0", "--micro-batch"),
    "a clip of 0": ("--clip-low 0", "--clip-low"),
    "an unknown device": ("--device tpu", "--device"),
    "completions longer than the model's context": ("--max-new-tokens 128", "--max-new-tokens", "128"),
    "prompts that are all too long": ("--max-prompt-tokens 3", "longer than 3 tokens", "shortest"),
    "a file of options that is not there": ("@none.txt", "none.txt"),
    "a file of options that is a folder": ("@folder.jsonl", "folder.jsonl"),
    "a file of options that names itself": ("@itself.opt", "@itself.opt"),
    "a file of options with an unknown one": ("@unknown.opt", "--learning-rate"),
    "a file of options without a value": ("@value.opt", "--lr"),
    "a file of options that is not UTF-8": ("@latin.opt", "@latin.opt", "UTF-8"),
    "a data file that is not there": ("--data none.jsonl", "none.jsonl"),
    "a data file without a line": ("--data empty.jsonl", "empty.jsonl", "no problems"),
    "a data file of empty lines": ("--data blank.jsonl", "blank.jsonl", "no problems"),
    "a data file that is cut off": ("--data cut.jsonl", "cut.jsonl:2", "JSON"),
    "a data file that is not UTF-8": ("--data latin.jsonl", "latin.jsonl:1", "UTF-8"),
    "rows that are lists": ("--data list.jsonl", "list.jsonl:1", "list"),
    "rows that are numbers": ("--data number.jsonl", "number.jsonl:1", "int"),
    "a row nested without end": ("--data deep.jsonl", "deep.jsonl"),
    "a row without a gold": ("--data nogold.jsonl", "nogold.jsonl:2"),
    "an empty gold": ("--data emptygold.jsonl", "emptygold.jsonl:1"),
    "a gold that is neither text nor number": ("--data boolean.jsonl", "boolean.jsonl:1"),
    "an empty problem": ("--data noproblem.jsonl", "noproblem.jsonl:1"),
    "a worked solution without a box": ("--data worked.jsonl", "worked.jsonl:1", "boxed"),
    "unknown columns": ("--data columns.jsonl", "columns.jsonl", "task", "--prompt-field"),
    "a column that is not there": ("--data good.jsonl --answer-field gold", "good.jsonl", "'gold'", "--answer-field"),
    "an empty .json": ("--data empty.json", "empty.json"),
    "a .json that is cut off": ("--data cut.json", "cut.json"),
    "a .json of another shape": ("--data object.json", "object.json"),
    "a .json that is not UTF-8": ("--data latin.json", "latin.json"),
    "an empty .csv": ("--data empty.csv", "empty.csv"),
    "a .csv without rows": ("--data header.csv", "header.csv"),
    "a .csv with an open quote": ("--data quote.csv", "quote.csv"),
    "a .csv that is not UTF-8": ("--data latin.csv", "latin.csv"),
    "an empty .parquet": ("--data empty.parquet", "empty.parquet"),
    "a .parquet that is none": ("--data text.parquet", "text.parquet"),
    "a data file of another kind": ("--data notes.txt", "notes.txt", ".jsonl"),
    "a data file without an ending": ("--data noname", "noname", ".jsonl"),
    "a folder for data": ("--data folder.jsonl", "folder.jsonl", "folder"),
    "a data set nobody knows": ("--data dapo17k", "dapo17k", "dapo_math_17k"),
    "a data set that is not cached": ("--data no/such-set", "no/such-set", "network"),
    "training problems that are all held out": ("--data good.jsonl --eval-data good.jsonl", "good.jsonl", "held-out"),
    "held-out problems that are not there": ("--eval-data none.csv", "none.csv"),
    "held-out problems without a line": ("--eval-data empty.jsonl", "empty.jsonl"),
    "held-out problems that are all too long": ("--eval-data long.jsonl", "longer than", "shortest"),
    "a model that is not there": ("--model no/where/at/all", "--model", "no/where/at/all"),
    "a file for a model": ("--model notes.txt", "--model", "notes.txt"),
    "an empty folder for a model": ("--model hollow", "--model", "hollow"),
    "a checkpoint without config.json": ("--model noconfig", "--model", "noconfig"),
    "a config.json that is cut off": ("--model tornconfig", "--model", "tornconfig"),
    "a config.json that is not UTF-8": ("--model latinconfig", "--model", "latinconfig"),
    "a config.json that is a list": ("--model listconfig", "--model", "listconfig"),
    "an architecture nobody knows": ("--model strange", "--model", "strange"),
    "a checkpoint without weights": ("--model weightless", "--model", "weightless"),
    "weights as a pickle": ("--model pickled", "--model", "pickled"),
    "weights that are cut off": ("--model cutweights", "--model", "cutweights"),
    "weights of no bytes": ("--model noweights", "--model", "noweights"),
    "weights that are none": ("--model garbage", "--model", "garbage"),
    "weights of another width": ("--model wider", "--model", "wider"),
    "weights of fewer layers": ("--model deeper", "--model", "deeper", "missing"),
    "weights of another vocabulary": ("--model othervocab", "--model", "othervocab"),
    "no tokenizer": ("--model notokenizer", "--model", "notokenizer"),
    "a tokenizer that is cut off": ("--model torntokenizer", "--model", "torntokenizer"),
    "a tokenizer without chat template": ("--model mute", "--model", "mute", "chat template"),
    "a chat template that does not parse": ("--model templatesyntax", "templatesyntax", "chat template"),
    "a chat template that refuses": ("--model templateraises", "templateraises", "chat template"),
    "a chat template that says nothing": ("--model templateblank", "templateblank", "chat template"),
    "no end of sequence": ("--model endless", "--model", "endless", "eos_token_id"),
    "a sliding window": ("--model windowed", "--model", "windowed", "sliding window"),
    "a checkpoint with code of its own": ("--model remote", "--model", "remote"),
    "an --out that is a file": ("--out notes.txt", "--out", "notes.txt"),
    "an --out with other files": ("--out taken", "--out", "taken"),
    "an --out with other files, to be overwritten": ("--out taken --overwrite", "--out", "taken"),
    "an --out whose metrics.jsonl is a folder": ("--out folders --overwrite", "--out", "folders"),
    "an --out below a file": ("--out notes.txt/run", "--out", "notes.txt"),
    "an --out that leads nowhere": ("--out dangling", "--out", "dangling"),
    "an --out with a name too long": ("--out " + "x" * 300, "--out"),
    "nothing to resume": ("--resume", "--out", "--resume"),
    "an --out that is not UTF-8": ("--out caf\udce9", "--out", "utf-8"),
    "to overwrite the model that one begins with": ("--overwrite --out run-before --model run-before/model", "--overwrite", "run-before/model"),
    "to overwrite the problems": ("--overwrite --out run-before --data run-before/good.jsonl", "--overwrite", "run-before/good.jsonl"),
    "to resume and to overwrite": ("--resume --overwrite", "--resume", "--overwrite"),
}


@pytest.fixture
def main(monkeypatch, capsys):
    """A program's main within this process: (exit status, standard output, standard error)."""

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.main()
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 8))


def tree(folder):
    """Every file below a folder, with size and time."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*")) if not p.is_dir()}


def refused(result, *words):
    """Exit status 2, and one line that holds the words."""
    status, out, err = result
    assert status == 2 and out == "" and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err
    return err


def test_the_table_has_at_least_60_cases():
    assert len(WRONG) >= 60


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_one_line_with_its_name_and_nothing_is_written(place, few, main, monkeypatch, name):
    monkeypatch.chdir(place)
    argv, *words = WRONG[name]
    before = tree(place)
    refused(main(train, "--method", "kl_cov", *SMALL, "--out", "run", *argv.split()), *words)
    assert tree(place) == before


@contextlib.contextmanager
def nobody():
    """Within it files are opened as a user without rights, also where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


@pytest.mark.parametrize("argv, word", [("--data locked.jsonl", "locked.jsonl"), ("--model locked", "--model"), ("--out sealed/run", "--out"),
                                        ("@locked.jsonl", "locked.jsonl")])  # fmt: skip
def test_what_may_not_be_read_or_written_is_refused(place, few, main, monkeypatch, argv, word):
    monkeypatch.chdir(place)
    sealed, locked = place / "sealed", place / "locked"
    sealed.mkdir(exist_ok=True)
    if not locked.exists():
        shutil.copytree(TINY, locked)
    for path in [place / "locked.jsonl", *locked.iterdir()]:
        path.chmod(0)
    sealed.chmod(0o555)
    place.chmod(0o777)
    before = tree(place)
    with nobody():
        result = main(train, "--method", "grpo", *SMALL, "--out", "run", *argv.split())
    refused(result, word)
    assert tree(place) == before


def test_code_that_comes_with_a_checkpoint_has_not_been_run(place, few, main, monkeypatch):
    monkeypatch.chdir(place)
    refused(main(train, "--method", "grpo", *SMALL, "--out", "run", "--model", "remote"), "remote")
    assert not (place / "executed").exists()


EVAL = {
    "a model that is not there": ("--model none", "--model"),
    "weights that are cut off": ("--model cutweights", "cutweights"),
    "weights of fewer layers": ("--model deeper", "deeper"),
    "no chat template": ("--model mute", "chat template"),
    "a benchmark that is not there": ("--benchmarks none.jsonl", "none.jsonl"),
    "an empty benchmark": ("--benchmarks empty.jsonl", "empty.jsonl"),
    "a benchmark of prompts too long": ("--benchmarks long.jsonl", "longer than"),
    "an --out in a folder that is not there": ("--out none/e.json", "--out"),
    "an --out that is a folder": ("--out result.json", "--out"),
}


@pytest.mark.parametrize("name", EVAL)
def test_a_wrong_input_of_an_evaluation_is_one_line_and_nothing_is_written(place, main, monkeypatch, name):
    monkeypatch.chdir(place)
    (place / "result.json").mkdir(exist_ok=True)
    argv, *words = EVAL[name]
    before = tree(place)
    good = ["--model", TINY, "--benchmarks", "good.jsonl", "--max-new-tokens", "20", "--device", "cpu"]
    status, _, err = main(evaluation, *good, *argv.split())
    assert status == 2 and all(word in err for word in words) and len(err.strip().splitlines()) == 1, err
    assert tree(place) == before


def test_the_command_itself_refuses_in_one_line_without_a_traceback(place, tmp_path):
    for argv, word in (("--steps 0", "--steps"), (f"--data {place}/cut.jsonl", "cut.jsonl:2")):
        done = subprocess_of("--method", "kl_cov", *SMALL, *argv.split(), cwd=tmp_path)
        refused((done.returncode, done.stdout, done.stderr), word)
        assert not list(tmp_path.iterdir())
