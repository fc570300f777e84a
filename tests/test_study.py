"""Studies: real runs, interrupted and continued; the share of a strategy; tables and pictures."""

import json
import random
import re
import shutil
from dataclasses import replace

import pytest
from conftest import ROOT
from matplotlib.image import imread

import losses
import options
from arithmetic import chain_of_thought, correct, leftmost, problems
from lab import study
from lab.controls import CONTROLS

DATA = sorted((ROOT / "results" / "data").glob("*.json"))


# ---------------------------------------------------------------- the share of a strategy


def test_a_chain_follows_its_own_strategy_whatever_the_slips_and_no_other_one():
    rng, forks = random.Random(0), 0
    for prompt, _ in problems("train", 300):
        for strategy in (correct, leftmost):
            assert study.follows(prompt, chain_of_thought(prompt, strategy, 0.5, rng), strategy)
        if not study.follows(prompt, chain_of_thought(prompt, leftmost), correct):
            forks += 1
            assert not study.follows(prompt, chain_of_thought(prompt, correct), leftmost)
    assert forks > 100


@pytest.mark.parametrize("response", [
    "7+3*3=6+9=\\boxed{5}",  # another digit has changed
    "6+3*3=\\boxed{5}",  # a line is missing
    "6+3*3=6+9=5=\\boxed{5}",  # a line too many
    "",
])  # fmt: skip
def test_a_chain_that_does_something_else_follows_no_strategy(response):
    assert study.follows("6+1*3*3=", "6+3*3=6+9=\\boxed{5}", correct)
    assert not study.follows("6+1*3*3=", response, correct)


def test_the_embedded_policy_rarely_tries_precedence():
    found = study.starting_policy(study.TINY)
    assert 0 < found["share"] < 0.01
    assert found["sampled"] < found["greedy"] < found["pass@32"]


# ---------------------------------------------------------------- runs


def test_every_row_is_a_command_that_train_takes_and_its_name_is_one_directory(monkeypatch):
    monkeypatch.setattr(losses, "METHODS", losses.METHODS | CONTROLS)
    for _, rows in study.STUDIES.values():
        for row in rows:
            options.command_line().parse_args(["--method", row.method, *row.options.split()])
            assert row.base in ("tiny", *study.BASES) and "/" not in row.name
        places = [study.place(row.name) for row in rows]
        assert len(set(places)) == len(places)


def test_a_study_runs_continues_and_writes_table_data_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "place", lambda name: tmp_path / name.replace(", ", "-"))
    monkeypatch.setattr(study, "starting_policy",
                        lambda folder: {"share": 0.001, "greedy": 0.5, "sampled": 0.25, "pass@32": 0.9})
    small = "--steps 2 --prompts 4 --samples 2 --mini-batch 2 --eval-limit 4 --save-every 1"
    rows = [study.Row("grpo", "grpo", small), study.Row("kl_cov", "kl_cov", small)]
    for row in rows:
        study.run(row, 1)
    metrics = (tmp_path / "grpo-s1" / "metrics.jsonl").read_text()
    (tmp_path / "grpo-s1" / "final.json").unlink()  # as if it had been interrupted
    (other,) = study.collect("x", rows, [1], {})["rows"]  # no baseline, no comparison
    assert other["name"] == "kl_cov" and other["runs"][0]["ratio"] is None
    study.run(rows[0], 1)
    assert (tmp_path / "grpo-s1" / "metrics.jsonl").read_text() == metrics

    found = study.collect("methods", rows, [1, 2], {})  # seed 2 was not run
    assert [[run["seed"] for run in row["runs"]] for row in found["rows"]] == [[1], [1]]
    assert found["rows"][0]["runs"][0]["first"] == json.loads(metrics.splitlines()[0])["entropy"]
    assert found["rows"][0]["runs"][0]["curve of entropy"][0][0] == 1
    shutil.rmtree(tmp_path / "kl_cov-s1")  # another machine, where only the figures are known
    assert study.collect("methods", rows, [1, 2], found) == found
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "methods.json").write_text(json.dumps(found))
    shared = study.collect("rivals", rows, [1], study.before(tmp_path, "rivals", [1]))  # another study
    assert shared["rows"] == json.loads(json.dumps(found))["rows"]
    assert study.before(tmp_path, "rivals", [2])["rows"][0]["runs"] == []
    changed = [rows[0], replace(rows[1], options="--steps 3")]
    assert len(study.collect("methods", changed, [1], found)["rows"]) == 1
    study.report(tmp_path, "methods", study.tables(found), found, study.draw_final(found))
    text = (tmp_path / "methods.md").read_text()
    assert "`python -m lab.study methods`" in text and "| kl_cov |" in text
    assert json.loads((tmp_path / "data" / "methods.json").read_text()) == json.loads(json.dumps(found))


# ---------------------------------------------------------------- tables and pictures


@pytest.mark.parametrize("file", [file for file in DATA if file.stem in study.STUDIES], ids=lambda f: f.stem)
def test_tables_and_pictures_follow_from_the_data_alone(file, tmp_path):
    found = json.loads(file.read_text())
    assert study.tables(found) == (ROOT / "results" / f"{file.stem}.md").read_text()
    study.PICTURES.get(file.stem, study.draw_final)(found).savefig(tmp_path / "p.png", dpi=30)
    assert imread(tmp_path / "p.png").std() > 0.01


def test_the_floor_is_drawn_at_the_k_and_beta_that_a_run_had():
    found = json.loads((ROOT / "results" / "data" / "floor.json").read_text())
    dots = [line.get_xdata()[0] for line in study.draw_floor(found).axes[0].lines if line.get_marker() == "o"]
    for x, row in zip(dots, found["rows"], strict=True):
        k, beta = re.findall(r"[\d.]+", row["name"])
        assert x == pytest.approx(float(k) * float(beta) / row["runs"][0]["|A| there"])


def test_the_table_shows_every_seed_with_mean_and_median():
    def run(seed, accuracy, fell):
        return {"seed": seed, "accuracy": accuracy, "sampled": 0.5, "pass@32": None, "first": 0.2,
                "window": 0.1, "ratio": 2.0, "last": 0.05, "fell": fell, "top fifth": 0.9}  # fmt: skip

    row = {"name": "grpo", "method": "grpo", "base": "tiny",
           "runs": [run(1, 0.5, 9), run(2, 0.52, None), run(3, 1.0, 19)]}  # fmt: skip
    other = {"name": "kl_cov", "method": "kl_cov", "base": "tiny", "runs": [run(1, 0.7, 9), run(3, 1.0, 19)]}
    control = {"name": "c", "method": "kl_cov_random", "base": "tiny",
               "runs": [run(1, 0.6, 9) | {"acted on": 0.02, "of right answers": 0.25}]}  # fmt: skip
    bases = {"tiny": {"share": 0.0015, "greedy": 0.5, "sampled": 0.25, "pass@32": 0.9}}
    text = study.tables({"study": "s", "bases": bases, "rows": [row, other, control]})
    assert "| tiny | 0.15% | 50.00% | 25.00% | 90.00% |" in text
    assert "pass@32 |" not in text.partition("| run |")[2]  # a column without a value
    assert "| grpo | 1 to 3 | 50 52 100 | 67.3% | 52.0% | - | +10 | 50.0% |" in text
    assert "| kl_cov | 1 3 | 70 100 | 85.0% | 85.0% | +10 | - | 50.0% |" in text
    assert "| c | 1 | 60 | 60.0% | 60.0% | +10 | +10 | 50.0% |" in text
    assert "| kl_cov | - | - | - |\n| c | 2.00% | 25% | -10 |\n" in text
    assert "| grpo | 0.200 | 0.100 | 0.050 | 2.0 | 2 of 3, step 15 | 90% |" in text


def test_rare_wrong_counts_the_tokens_that_kl_cov_holds():
    line = {"covariance": [2.0, 0.5, 1.5, 3.0], "advantage": [-1.0, -1.0, 2.0, -0.5]}
    assert study.rare_wrong([line, line]) == (0.75, pytest.approx(2.5 / 3))
    assert study.rare_wrong([{"covariance": [-0.5], "advantage": [-1.0]}]) == (0, None)
