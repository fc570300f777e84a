"""Evaluation: unbiased figures, honest intervals, the paper's protocol, and a command that shows a table."""

import fractions
import itertools
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import rollout
from rollout import TINY, load_policy

BENCHMARKS = "math500 aime2024 aime2025 amc23 omni_math olympiadbench minerva gsm8k_test".split()


# The estimators.


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_k_subsets_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        solved = [any(subset) for subset in itertools.combinations([1] * c + [0] * (n - c), k)]
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(solved) / len(solved), abs=1e-12)


def test_pass_at_k_is_stable_where_binomials_overflow():
    exact = 1 - fractions.Fraction(math.comb(9000, 50), math.comb(10_000, 50))
    assert evaluation.pass_at_k(10_000, 1000, 50) == pytest.approx(float(exact), rel=1e-12)
    assert evaluation.pass_at_k(32, 0, 32) == 0.0 and evaluation.pass_at_k(32, 1, 32) == 1.0
    with pytest.raises(ValueError):
        evaluation.pass_at_k(4, 1, 5)


def test_interval_of_single_samples_is_wilsons():
    assert evaluation.interval([1.0] * 15 + [0.0] * 15, 1) == pytest.approx((0.3315, 0.6685), abs=1e-4)
    assert evaluation.interval([0.0] * 30, 1) == pytest.approx((0.0, 0.1135), abs=1e-4)


def test_interval_counts_problems_and_not_completions():
    agreeing = [1.0] * 15 + [0.0] * 15  # 32 completions that always agree say no more than one
    assert evaluation.interval(agreeing, 32) == evaluation.interval(agreeing, 1)
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
    record = {"rewards": [1.0, 0.0, 0.0, 0.0], "lengths": [1, 2, 3, 4], "truncated": [True] + [False] * 3}
    all_right = {"rewards": [1.0] * 4, "lengths": [5] * 4, "truncated": [False] * 4, "too_long": True}
    assert evaluation.summary([record | {"too_long": False}, all_right], timeouts=2) == {
        "problems": 2, "samples": 4, "accuracy": 0.625, "pass": {"1": 0.625, "2": 0.75, "4": 1.0},
        "interval": evaluation.interval([0.25, 1.0], 4), "length": 3.75, "truncated": 0.125, "too_long": 1,
        "timeouts": 2,
    }  # fmt: skip


def test_protocol_of_the_paper_is_the_default():
    for name in ("aime24", "aime25", "amc23", "some/where/aime2024.jsonl", "AIME_2025.json"):
        assert evaluation.protocol(name, None, None) == (32, 0.6)
    for name in ("math500", "omni_math", "olympiadbench", "minerva", "gsm8k", "arithmetic_heldout"):
        assert evaluation.protocol(name, None, None) == (1, 0.0)
    assert evaluation.protocol("aime24", None, 0.0) == (1, 0.0)
    assert evaluation.protocol("math500", 8, None) == (8, 0.6)
    assert evaluation.protocol("math500", 8, 1.0) == (8, 1.0)


# Asking a model.


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY)


@pytest.fixture
def problems():
    return data.load_problems("arithmetic_heldout", limit=4)


def speak(monkeypatch, policy, problems, say, end=True):
    """Puts in the sampler's place one that answers each prompt with say(gold)."""
    _, tokenizer, eos_ids = policy
    ids = [ids for ids, _ in data.encode_problems(tokenizer, problems, 10**9, "--benchmarks")]
    completions = [tokenizer.encode(say(gold)) + sorted(eos_ids)[:1] * end for _, gold in problems]
    said = dict(zip(map(tuple, ids), completions))
    sample = lambda _, prompts, n, *__, **___: [[said[tuple(prompt)]] * n for prompt in prompts]
    monkeypatch.setattr(rollout, "sample", sample)


@pytest.mark.parametrize("name", [*BENCHMARKS, "arithmetic_heldout"])
def test_answering_every_gold_scores_100_and_a_wrong_number_0(qwen_checkpoint, shared, monkeypatch, name):
    policy = load_policy(str(qwen_checkpoint))
    policy[0].config.max_position_embeddings = 4096  # for long prompts; the model itself is not asked
    file = name if name in data.EMBEDDED else shared / "data" / f"{name}.jsonl"
    problems = data.load_problems(file, limit=100, benchmark=True)
    speak(monkeypatch, policy, problems, lambda gold: f"So it is \\boxed{{{gold}}}.")
    right = evaluation.evaluate(*policy, problems, samples=2, temperature=0.6, max_new_tokens=1, batch=64)
    assert not [record["answer"] for record in right["completions"] if record["rewards"] != [1.0, 1.0]]
    assert right["accuracy"] == 1.0 and right["pass"] == {"1": 1.0, "2": 1.0} and right["truncated"] == 0.0
    speak(monkeypatch, policy, problems[:40], lambda gold: "It is \\boxed{987654.321}.", end=False)
    wrong = evaluation.evaluate(*policy, problems[:40], max_new_tokens=1)
    assert wrong["accuracy"] == 0.0 and wrong["truncated"] == 1.0


def test_only_the_seed_changes_the_answers_not_batch_order_or_global_generator(policy, problems):
    def texts(problems, batch, seed):
        result = evaluation.evaluate(*policy, problems, 3, 1.0, 30, batch=batch, seed=seed)
        return {record["prompt"]: record["responses"] for record in result["completions"]}

    state = torch.get_rng_state()
    first = texts(problems, 100, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == texts(problems, 6, 5) == texts(problems, 2, 5) == texts(problems[::-1], 100, 5)
    assert first != texts(problems, 100, 6)


def test_prompt_that_does_not_fit_scores_0_and_is_counted(policy, problems, monkeypatch):
    problems = problems + [("1+" * 500 + "1=", "1")]
    speak(monkeypatch, policy, problems, lambda gold: f"\\boxed{{{gold}}}")
    result = evaluation.evaluate(*policy, problems, max_new_tokens=20, batch=4)
    assert (result["problems"], result["too_long"], result["accuracy"]) == (5, 1, 4 / 5)


# The command.


@pytest.fixture
def run(tmp_path, monkeypatch, command):
    """The command in an empty folder: exit status, results in its file, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        status, said, err = command(evaluation.main, *options)
        file = Path("eval.json")
        results = json.loads(file.read_text())["results"] if file.exists() else None
        return status, results, said, err

    return run


@pytest.fixture
def other(tmp_path):
    """A second checkpoint."""
    return str(shutil.copytree(TINY, tmp_path / "other"))


def test_models_and_benchmarks_give_a_table_and_a_file(run, other):
    benchmarks = ["arithmetic", "arithmetic_heldout"]
    options = "--limit", 3, "--max-new-tokens", 40, "--samples", 4
    status, results, out, _ = run("--model", TINY, other, "--benchmarks", *benchmarks, *options)
    assert status == 0
    pairs = [(result["model"], result["benchmark"]) for result in results]
    assert pairs == list(itertools.product([TINY, other], benchmarks))
    assert [len(record["responses"]) for record in results[0]["completions"]] == [4, 4, 4]
    assert results[0]["completions"] == results[2]["completions"]
    lines = out.splitlines()
    mean = (results[0]["accuracy"] + results[1]["accuracy"]) / 2
    assert len(lines) == 9 and lines[3].split() == [TINY[-40:], "mean", f"{100 * mean:.1f}"]


def test_repeated_command_computes_only_what_its_file_lacks(run, other, monkeypatch):
    options = "--limit", 3, "--max-new-tokens", 40, "--model", TINY
    evaluate, calls = evaluation.evaluate, []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", counted)
    status, results, _, err = run(*options, other)
    assert status == 130 and len(results) == 1 and "finished benchmarks are in eval.json" in err
    run(*options, other)
    assert len(calls) == 3
    for changed in (("--seed", 1), ("--limit", 2), ("--temperature", 1), ("--samples", 2)):
        run(*options, *changed)
    os.utime(Path(other) / "model.safetensors")  # trained on since
    status, results, _, _ = run(*options, other)
    assert status == 0 and len(calls) == 8 and len(results) == 7


def test_running_out_of_memory_is_one_line(run, monkeypatch):
    def sample(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rollout, "sample", sample)
    status, results, _, err = run("--model", TINY, "--limit", 2)
    assert status == 2 and results is None
    assert err.splitlines()[-1].startswith("eval.py: error: out of memory")


WRONG = {  # options beside --model TINY; a word of the line
    "a folder without a checkpoint": ("--model empty", "empty"),
    "an unknown option": ("--sample 3", "--sample"),
    "no samples": ("--samples 0", "--samples"),
    "a negative temperature": ("--temperature -1", "--temperature"),
    "a temperature that is no number": ("--temperature nan", "--temperature"),
    "samples at temperature 0": ("--samples 4 --temperature 0", "--samples 4"),
    "a limit of 0": ("--limit 0", "--limit"),
    "a batch of 0": ("--batch 0", "--batch"),
    "no room for a prompt": ("--max-new-tokens 4096", "--max-new-tokens"),
    "a device that is not there": ("--device cuda", "--device"),
    "an unknown benchmark": ("--benchmarks mathfivehundred", "mathfivehundred"),
    "a file of another kind": ("--out here.txt", "--out"),
    "a folder that is not there": ("--out no/such/a.json", "--out"),
    "somebody else's file": ("--out theirs.json", "--out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_value_is_one_line_before_weights_are_loaded(name, run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_policy", None)
    Path("empty").mkdir()
    Path("theirs.json").write_text("[1, 2]")
    options, word = WRONG[name]
    status, results, out, err = run("--model", TINY, *options.split())
    assert status == 2 and not out and results is None and word in err
    assert len(err.splitlines()) == 1 and err.startswith("eval.py: error: ")
    assert len(list(tmp_path.iterdir())) == 2 and Path("theirs.json").read_text() == "[1, 2]"


def test_benchmark_of_prompts_too_long_is_one_line(run):
    Path("long.jsonl").write_text(json.dumps({"problem": "1+" * 500, "answer": "1"}))
    status, results, _, err = run("--model", TINY, "--benchmarks", "long.jsonl")
    assert status == 2 and results is None and "longer than" in err
