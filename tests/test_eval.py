"""What eval.py promises: unbiased figures, honest intervals, the paper's protocol, and a whole path that is right."""

import fractions
import functools
import importlib
import itertools
import json
import math
import os
import pathlib
import random
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"

import data  # noqa: E402
import rollout  # noqa: E402
from rollout import load_policy  # noqa: E402
from data import UserError

evaluation = importlib.import_module("eval")
BENCHMARKS = ["math500", "aime2024", "aime2025", "amc23", "omni_math", "olympiadbench", "minerva", "gsm8k_test"]


# The estimators.


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_k_subsets_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_stable_where_binomials_overflow():
    exact = 1 - fractions.Fraction(math.comb(9000, 50), math.comb(10_000, 50))  # 1e0 - 1e130 / 1e132, in whole numbers
    assert evaluation.pass_at_k(10_000, 1000, 50) == pytest.approx(float(exact), rel=1e-12)
    assert evaluation.pass_at_k(10_000, 1, 1) == pytest.approx(1e-4)
    assert evaluation.pass_at_k(32, 0, 32) == 0.0 and evaluation.pass_at_k(32, 1, 32) == 1.0


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses_what_has_no_meaning(n, c, k):
    with pytest.raises(ValueError):
        evaluation.pass_at_k(n, c, k)


def test_interval_of_single_samples_is_wilsons():
    assert evaluation.interval([1.0] * 15 + [0.0] * 15, 1) == pytest.approx((0.3315, 0.6685), abs=1e-4)
    assert evaluation.interval([0.0] * 30, 1) == pytest.approx((0.0, 0.1135), abs=1e-4)


def test_interval_counts_problems_not_completions():
    """32 completions that always agree say no more about the benchmark than one."""
    agreeing = [1.0] * 15 + [0.0] * 15
    assert evaluation.interval(agreeing, 32) == evaluation.interval(agreeing, 1)
    assert evaluation.interval([0.0] * 30, 32) == evaluation.interval([0.0] * 30, 1)
    low, high = evaluation.interval([0.4, 0.6] * 15, 32)
    assert 0.4 < low < 0.5 < high < 0.6


def test_interval_covers_the_truth_about_95_times_in_100():
    rng, covered = random.Random(0), 0
    for _ in range(1000):  # problems of every difficulty: half are hardly ever solved, the truth is 0.25
        chances = [rng.betavariate(0.5, 1.5) for _ in range(30)]
        low, high = evaluation.interval([sum(rng.random() < p for _ in range(32)) / 32 for p in chances], 32)
        covered += low <= 0.25 <= high
    assert 0.91 < covered / 1000 < 0.98


def test_summary_of_records_by_hand():
    records = [
        {"rewards": [1.0, 0.0, 0.0, 0.0], "lengths": [1, 2, 3, 4], "truncated": [True, False, False, False], "too_long": False},
        {"rewards": [1.0, 1.0, 1.0, 1.0], "lengths": [5, 5, 5, 5], "truncated": [False] * 4, "too_long": False},
    ]
    s = evaluation.summary(records, timeouts=2)
    assert (s["problems"], s["samples"], s["accuracy"], s["length"], s["truncated"], s["timeouts"]) == (2, 4, 0.625, 3.75, 0.125, 2)
    assert s["pass"] == {"1": 0.625, "2": 0.75, "4": 1.0}
    assert evaluation.summary([{**records[0], "rewards": [0.0] * 6, "lengths": [1] * 6}])["pass"].keys() == {"1", "2", "4", "6"}


def test_protocol_of_the_paper_is_the_default():
    for name in ("aime24", "aime25", "amc23", "some/where/aime2024.jsonl", "AIME_2025.json"):
        assert evaluation.protocol(name, None, None) == (32, 0.6)
    for name in ("math500", "omni_math", "olympiadbench", "minerva", "gsm8k", "arithmetic_heldout"):
        assert evaluation.protocol(name, None, None) == (1, 0.0)
    assert evaluation.protocol("aime24", None, 0.0) == (1, 0.0)
    assert evaluation.protocol("math500", 8, None) == (8, 0.6)
    assert evaluation.protocol("math500", 8, 1.0) == (8, 1.0)
    with pytest.raises(UserError, match="--samples 8"):
        evaluation.protocol("math500", 8, 0.0)


# A narrow model with the real tokenizer.


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    if not SHARED.exists():
        pytest.skip("the real tokenizer is not here")
    from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = Qwen2Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=4096,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config)
        model.generation_config = GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643)
        folders.append(tmp_path_factory.mktemp(f"narrow{seed}"))
        model.save_pretrained(folders[-1])
        AutoTokenizer.from_pretrained(SHARED / "qwen-tokenizer").save_pretrained(folders[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_policy", functools.cache(load_policy))  # the tokenizer takes 0.6 s each time
        yield [str(folder) for folder in folders]


@pytest.fixture(scope="module")
def policy(narrow):
    return load_policy(narrow[0], "cpu", torch.float32)


def run(*options):
    """The command in this process: (exit status, the results it wrote)."""
    out = pathlib.Path(options[options.index("--out") + 1])
    try:
        evaluation.main([str(o) for o in options])
    except SystemExit as error:
        return error.code, None
    return 0, json.loads(out.read_text())["results"]


def speaker(monkeypatch, tokenizer, problems, say, ends=True):
    """Puts in the sampler's place one that answers each prompt with say(gold)."""
    ids = data.encode_prompts(tokenizer, [prompt for prompt, _ in problems], 10**9)
    said = {tuple(i): tokenizer.encode(say(gold)) + [151645] * ends for i, (_, gold) in zip(ids, problems)}
    monkeypatch.setattr(rollout, "sample", lambda _, prompts, n, *__, **___: [[said[tuple(p)]] * n for p in prompts])


# The whole path.


@pytest.mark.parametrize("name", [*BENCHMARKS, "arithmetic_heldout"])
def test_sampler_that_answers_every_gold_scores_100_and_a_wrong_one_0(narrow, policy, monkeypatch, tmp_path, capsys, name):
    file = name if name in data.EMBEDDED else SHARED / "data" / f"{name}.jsonl"
    problems = data.load_problems(file)
    command = ("--model", narrow[0], "--benchmarks", file, "--samples", 2, "--temperature", 0.6, "--max-new-tokens", 1, "--batch", 1000)
    speaker(monkeypatch, policy[1], problems, lambda gold: f"So it is \\boxed{{{gold}}}.")
    status, (right,) = run(*command, "--out", tmp_path / "right.json")
    failed = [record["answer"] for record in right["completions"] if record["rewards"] != [1.0, 1.0]]
    assert status == 0 and not failed
    assert right["accuracy"] == 1.0 and right["pass"] == {"1": 1.0, "2": 1.0} and right["truncated"] == 0.0
    assert " 100.0 [" in capsys.readouterr().out
    speaker(monkeypatch, policy[1], problems, lambda gold: "It is \\boxed{987654.321}.", ends=False)
    status, (wrong,) = run(*command, "--limit", 50, "--out", tmp_path / "wrong.json")  # sympy takes its time to say no
    passed = [record["answer"] for record in wrong["completions"] if record["rewards"] != [0.0, 0.0]]
    assert status == 0 and not passed
    assert wrong["accuracy"] == 0.0 and wrong["truncated"] == 1.0
    assert " 0.0 [0.0," in capsys.readouterr().out


def test_gold_outside_a_box_scores_0(policy, monkeypatch):
    problems = data.load_problems("arithmetic_heldout", limit=20)
    speaker(monkeypatch, policy[1], problems, lambda gold: f"It is {gold}.")
    assert evaluation.evaluate(*policy, problems, max_new_tokens=20)["accuracy"] == 0.0


def test_narrow_random_model_runs_on_a_real_benchmark(narrow, tmp_path, capsys):
    file = SHARED / "data" / "aime2024.jsonl"
    status, (result,) = run("--model", narrow[0], "--benchmarks", file, "--limit", 3, "--max-new-tokens", 6, "--out", tmp_path / "a.json")
    assert status == 0 and (result["problems"], result["samples"], result["temperature"]) == (3, 32, 0.6)
    assert result["pass"].keys() == {"1", "2", "4", "8", "16", "32"} and 0 < result["length"] <= 6
    record = result["completions"][0]
    assert len(record["responses"]) == len(record["rewards"]) == len(set(record["responses"])) == 32
    shown = capsys.readouterr().out
    assert "aime2024" in shown and "pass@32" in shown and "0.0 [0.0, 56.2]" in shown


def test_several_models_stand_in_one_table_of_models_by_benchmarks(narrow, tmp_path, capsys):
    files = [SHARED / "data" / f"{name}.jsonl" for name in ("math500", "minerva")]
    status, results = run("--model", *narrow, "--benchmarks", *files, "--limit", 2, "--max-new-tokens", 4, "--out", tmp_path / "a.json")
    assert status == 0 and [(r["model"], pathlib.Path(r["benchmark"]).stem) for r in results] == [
        (model, name) for model in narrow for name in ("math500", "minerva")
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["accuracy,", "%", "math500", "minerva", "avg"]
    assert [line.split()[0] for line in lines[1:3]] == [model[-40:] for model in narrow] and lines[3] == ""


def test_table_averages_over_benchmarks():
    common = {"problems": 2, "samples": 1, "temperature": 0.0, "interval": (0.1, 0.9), "pass": {"1": 0.5}, "length": 3.0, "truncated": 0.0, "too_long": 0, "timeouts": 0}
    results = [{**common, "model": "A", "benchmark": "x", "accuracy": 0.25}, {**common, "model": "A", "benchmark": "y", "accuracy": 0.5}]
    assert evaluation.tables(results).splitlines()[1].split() == ["A", "25.0", "[10.0,", "90.0]", "50.0", "[10.0,", "90.0]", "37.5"]


# The function that train.py calls.


@pytest.fixture
def problems():
    return data.load_problems("arithmetic_heldout", limit=4)


def test_batch_and_order_do_not_change_the_answers(policy, problems):
    figures = [
        evaluation.evaluate(*policy, part, samples=3, temperature=1.0, max_new_tokens=4, batch=batch, seed=5)["completions"]
        for part, batch in ((problems, 100), (problems, 6), (problems, 2), (problems[::-1], 100))
    ]
    texts = [{record["prompt"]: record["responses"] for record in records} for records in figures]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_seed_and_only_the_seed_changes_the_samples(policy, problems):
    texts = [
        [record["responses"] for record in evaluation.evaluate(*policy, problems, 2, 1.0, 3, seed=seed)["completions"]] for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_evaluate_leaves_the_global_generator_and_the_disk_alone(policy, problems, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    greedy = evaluation.evaluate(*policy, problems, max_new_tokens=3)
    evaluation.evaluate(*policy, problems, samples=2, temperature=0.6, max_new_tokens=3)
    assert torch.equal(before, torch.get_rng_state())
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")
    assert json.loads(json.dumps(greedy))["samples"] == 1


def test_prompt_that_does_not_fit_scores_0_and_is_counted(policy, problems, monkeypatch):
    problems = problems + [("x " * 4096, "1")]
    speaker(monkeypatch, policy[1], problems, lambda gold: f"\\boxed{{{gold}}}")
    result = evaluation.evaluate(*policy, problems, max_new_tokens=20, batch=4)
    assert (result["problems"], result["too_long"], result["accuracy"]) == (5, 1, 4 / 5)


# Interrupt and continue.


@pytest.fixture
def command(narrow):
    return ("--model", narrow[0], "--benchmarks", SHARED / "data" / "math500.jsonl", "arithmetic_heldout", "--samples", 2,
            "--limit", 5, "--max-new-tokens", 3, "--batch", 4)  # fmt: skip


def test_interrupted_and_continued_equals_uninterrupted(command, tmp_path, monkeypatch, capsys):
    _, expected = run(*command, "--out", tmp_path / "a.json")
    original, calls = rollout.sample, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # in the middle of the second benchmark
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(rollout, "sample", interrupted)
    assert run(*command, "--out", tmp_path / "b.json") == (130, None)
    assert "continue" in capsys.readouterr().err and not (tmp_path / "b.json").exists()
    with open(tmp_path / "b.jsonl", "a") as log:
        log.write('{"settings": {"model"')  # as if the power had failed while a line was written
    calls.clear()
    assert run(*command, "--out", tmp_path / "b.json") == (0, expected)
    assert len(calls) == 2  # only what was missing: 6 batches less the 4 that were finished
    calls.clear()
    assert run(*command, "--out", tmp_path / "b.json") == (0, expected) and not calls


def test_finished_evaluation_is_shown_again_without_loading_the_model(command, tmp_path, monkeypatch):
    run(*command, "--out", tmp_path / "a.json")
    monkeypatch.setattr(evaluation, "load_policy", None)
    assert run(*command, "--out", tmp_path / "a.json")[0] == 0


def test_continuing_with_other_settings_is_refused_in_one_line(command, narrow, tmp_path, monkeypatch, capsys):
    run(*command, "--out", tmp_path / "a.json")
    before = (tmp_path / "a.jsonl").read_bytes()
    monkeypatch.setattr(evaluation, "load_policy", None)
    for option, value, name in (("--samples", 4, "samples"), ("--limit", 3, "content"), ("--seed", 1, "seed"), ("--temperature", 1, "temperature")):
        capsys.readouterr()
        assert run(*command, option, value, "--out", tmp_path / "a.json") == (2, None)
        error = capsys.readouterr().err
        assert name in error and len(error.strip().splitlines()) == 1
    assert (tmp_path / "a.jsonl").read_bytes() == before
    os.utime(pathlib.Path(narrow[0]) / "model.safetensors")  # trained on since
    assert run(*command, "--out", tmp_path / "a.json") == (2, None)
    assert "weights" in capsys.readouterr().err


def test_foreign_result_is_not_overwritten(command, tmp_path, capsys):
    (tmp_path / "a.json").write_text("precious")
    assert run(*command, "--out", tmp_path / "a.json") == (2, None) and (tmp_path / "a.json").read_text() == "precious"
    (tmp_path / "b.jsonl").write_text('{"precious": 1}\n')
    assert run(*command, "--out", tmp_path / "b.json") == (2, None) and "b.jsonl:1" in capsys.readouterr().err


# What goes wrong, in one line, before a model is loaded.

WRONG = {
    "no model": [],
    "model that is not there": ["--model", "no/such/folder"],
    "folder without a checkpoint": ["--model", str(ROOT / "tests")],
    "unknown option": ["--model", "NARROW", "--sample", "3"],
    "samples 0": ["--model", "NARROW", "--samples", "0"],
    "samples a word": ["--model", "NARROW", "--samples", "many"],
    "temperature below 0": ["--model", "NARROW", "--temperature", "-1"],
    "temperature NaN": ["--model", "NARROW", "--temperature", "nan"],
    "samples at temperature 0": ["--model", "NARROW", "--samples", "4", "--temperature", "0"],
    "limit 0": ["--model", "NARROW", "--limit", "0"],
    "batch 0": ["--model", "NARROW", "--batch", "0"],
    "no room for a prompt": ["--model", "NARROW", "--max-new-tokens", "4096"],
    "unknown device": ["--model", "NARROW", "--device", "tpu"],
    "unknown benchmark": ["--model", "NARROW", "--benchmarks", "mathfivehundred"],
    "missing file": ["--model", "NARROW", "--benchmarks", "none.jsonl"],
    "column that is not there": ["--model", "NARROW", "--benchmarks", str(SHARED / "data" / "minerva.jsonl"), "--prompt-field", "task"],
    "out without .json": ["--model", "NARROW", "--out", "here.txt"],
    "out in no folder": ["--model", "NARROW", "--out", "no/such/folder/a.json"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_value_is_one_line_and_status_2_before_a_model_is_loaded(name, narrow, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "load_policy", None)
    with pytest.raises(SystemExit) as caught:
        evaluation.main([narrow[0] if word == "NARROW" else word for word in WRONG[name]])
    out, error = capsys.readouterr()
    assert caught.value.code == 2 and not out and len(error.strip().splitlines()) == 1 and error.startswith("eval.py: ")
    assert not list(tmp_path.iterdir())


def test_help_names_meaning_and_default_of_every_option():
    done = subprocess.run([sys.executable, ROOT / "eval.py", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("default") >= 10 and "8192, the paper's" in done.stdout
