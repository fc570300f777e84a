"""Studies: a real one, interrupted and continued; the share of a strategy; the law of each size."""

import json
import math
import random

import pytest
import torch

from lab import starting
from lab import study
from arithmetic import chain_of_thought, correct, leftmost, problems


def test_a_chain_follows_its_own_strategy_whatever_the_slips_and_no_other_one():
    rng, forks = random.Random(0), 0
    for prompt, _ in problems("train", 300):
        paths = {s: starting.path_of(prompt, s) for s in (correct, leftmost)}
        for s, path in paths.items():
            assert starting.follows(prompt, chain_of_thought(prompt, s, 0.5, rng), path)
        if paths[correct] != paths[leftmost]:
            forks += 1
            assert not starting.follows(prompt, chain_of_thought(prompt, leftmost, 0.5, rng), paths[correct])
    assert forks > 100


def test_the_paths_are_those_of_the_strategies():
    assert starting.path_of("6+1*3*3=", correct) == [1, 1, 0]
    assert starting.path_of("6+1*3*3=", leftmost) == [0, 0, 0]
    assert starting.follows("6+1*3*3=", "6+3*3=6+9=\\boxed{5}", [1, 1, 0])
    assert not starting.follows("6+1*3*3=", "7+3*3=6+9=\\boxed{5}", [1, 1, 0])  # another digit has changed
    assert not starting.follows("6+1*3*3=", "6+3*3=\\boxed{5}", [1, 1, 0])  # a line is missing
    assert not starting.follows("6+1*3*3=", "", [1, 1, 0])


def test_the_embedded_policy_rarely_tries_precedence():
    found = starting.describe(study.TINY, samples=4)
    assert 0 < found["share"] < 0.01
    assert found["sampled"] < found["greedy"] < found["pass"]


def line_of(step, H, R):
    return {"step": step, "entropy": H, "reward": R}


def test_sizes_recovers_the_law_that_the_runs_obey(tmp_path):
    H = torch.linspace(0.3, 0.01, 30).tolist()
    runs = {f"grpo, {base}": [[line_of(i + 1, h, -a * math.exp(h) + b + 0.001 * (-1) ** (i + k)) for i, h in enumerate(H)] for k in range(3)]
            for base, a, b in (("small", 1.0, 1.5), ("large", 2.0, 2.7))}  # fmt: skip
    runs["grpo, large"][0] = runs["grpo, large"][0][:20]  # all are cut to the shortest
    bases = {"small": {"parameters": 1000, "share": 0.002}, "large": {"parameters": 9000, "share": 0.003}}
    table = starting.sizes(runs, bases, tmp_path).strip().splitlines()
    assert (tmp_path / "sizes.png").exists()
    cells = [[cell.strip().split(" ")[0] for cell in row.split("|")[1:-1]] for row in table[2:]]
    assert [row[:2] for row in cells] == [["1,000", "0.20%"], ["9,000", "0.30%"]]
    assert [float(row[5]) for row in cells] == pytest.approx([1.0, 2.0], abs=0.01)
    assert [float(row[7]) for row in cells] == pytest.approx([0.5, 0.7], abs=0.01)
    assert float(cells[0][4]) == pytest.approx(H[19], abs=0.001)


def test_shares_has_a_row_for_each_base_and_method_common_first(tmp_path):
    bases = {base: {"share": s, "greedy": 0.5, "sampled": 0.25, "pass": 0.9} for base, s in (("rare", 0.001), ("common", 0.3))}
    results = {f"{m}, {b}": [{"accuracy": x} for x in (0.5, 0.7)] for b in bases for m in ("clip_cov", "grpo")}
    runs = {row: [[{}] * 3, [{}] * 3] for row in results}
    runs["grpo, common"][1] = [{}, {}, {}, {"accuracy": 0.6}, {}]  # a longer run counts as it was after 3 steps
    text = starting.shares(results, runs, bases, tmp_path)
    rows = [line for line in text.splitlines() if "%" in line][1:]
    assert [row.split("|")[1].strip() + row.split("|")[6] for row in rows] == ["common grpo ", "common clip_cov ", "rare grpo ", "rare clip_cov "]
    assert "| 50 60 | 55.0% |" in rows[0] and "| 50 70 | 60.0% |" in rows[1]
    assert "after 3 steps" in text
    assert (tmp_path / "shares.png").stat().st_size > 10_000


def test_a_study_runs_goes_on_and_writes_its_tables(tmp_path, monkeypatch):
    small = "--steps 2 --prompts 4 --samples 2 --mini-batch 2 --eval-limit 4 --final-samples 32 --save-every 1"
    monkeypatch.setattr(study, "place", lambda name: tmp_path / name.replace(", ", "_").replace(" ", ""))
    monkeypatch.setattr(study, "ROWS", {"grpo": f"--method grpo {small}", "kl_cov, theorem": f"--method kl_cov --check-theorem {small}"})
    for row in study.ROWS:
        study.run(row, 1)
    metrics = (tmp_path / "grpo-s1" / "metrics.jsonl").read_text()
    (tmp_path / "grpo-s1" / "final.json").unlink()  # as if it had been interrupted
    study.run("grpo", 1)
    assert (tmp_path / "grpo-s1" / "metrics.jsonl").read_text() == metrics
    monkeypatch.setattr(study, "starting_policy", lambda: "The starting policy.")
    study.report("methods", {"grpo": [1]}, tmp_path / "results")
    study.report("theorem", {"kl_cov, theorem": [1]}, tmp_path / "results")
    found = json.loads((tmp_path / "results" / "methods.json").read_text())["grpo"][0]
    assert found["entropy_start"] == json.loads(metrics.splitlines()[0])["entropy"]
    text = (tmp_path / "results" / "methods.md").read_text()
    assert "python study.py methods" in text and "| grpo | 1 |" in text
    assert "kl_cov, theorem-s1" in (tmp_path / "results" / "theorem.md").read_text()
    assert (tmp_path / "results" / "theorem.png").exists()


def test_every_row_is_a_command_that_train_takes_and_every_base_one_of_warmstart():
    import options

    assert all(row in study.ROWS for _, rows in study.STUDIES.values() for row in rows)
    for row, text in study.ROWS.items():
        options.command_line().parse_args(text.split())
    named = {starting.base_of(row) for row in study.ROWS}
    assert set(study.BASES) <= named
    assert all(text.split()[0] in ("--share", "--hidden") for text in study.BASES.values())
