"""What lab/law.py promises: the fit of a run, what noise allows, the forecast, the runs above a curve."""

import json
import math

import pytest
import torch
from matplotlib.image import imread

from lab import law

A, B = 0.2, 0.8


def series(n=120, sigma=0.05, seed=0, form=torch.exp, a=A, b=B, top=1.2, bottom=0.02):
    """Steps of a run that obeys R = -a form(H) + b up to noise."""
    H = torch.linspace(math.log(top), math.log(bottom), n, dtype=torch.float64).exp()
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    R = -a * form(H) + b + sigma * noise
    pairs = zip(H.tolist(), R.tolist())
    return [{"step": step, "entropy": h, "reward": r} for step, (h, r) in enumerate(pairs, 1)]


def points(**options):
    return law.points(series(**options))


def test_without_noise_the_fit_is_the_law_and_every_part_predicts_the_end():
    H, R = points(sigma=0)
    w = law.fit([(H, R)])
    assert (w["a"], w["b"], w["ceiling"], w["r2"]["exp(H)"]) == pytest.approx((A, B, B - A, 1))
    assert all(low - 1e-9 <= w[key] <= high + 1e-9 for key, (low, high) in w["interval"].items())
    assert [law.forecast(H, R, part) for part in law.EARLY] == pytest.approx([R[-12:].mean().item()] * 4)


@pytest.mark.parametrize("best, form", law.FORMS.items())
def test_the_form_that_made_the_points_has_the_highest_r_squared(best, form):
    r2 = law.fit([points(sigma=0.002, form=form)])["r2"]
    assert max(r2, key=r2.get) == best and r2[best] > 0.99


def test_block_means_leave_out_an_incomplete_last_block():
    assert law.block_means([torch.arange(12.0), torch.arange(5.0)]).tolist() == [2, 7, 2]


def test_intervals_of_one_run_hold_the_truth_about_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(law, "DRAWS", 200)
    held = 0
    for seed in range(60):
        a, b = law.resample([points(n=100, seed=seed)])
        low, high = (b - a).quantile(law.ENDS)
        held += bool(low <= B - A <= high)
    assert 50 <= held <= 60  # 57 expected


def test_intervals_do_not_depend_on_whether_the_few_early_steps_are_drawn():
    plateau = series(n=60, sigma=0.03, top=0.01, bottom=0.005)
    steps = series(n=60, sigma=0.03, top=0.2, bottom=0.1)[:2] + plateau
    low, high = law.fit([law.points(steps)])["interval"]["a"]
    assert high - low < 2  # resampled steps would leave them out now and then, and have no slope


def test_several_runs_are_drawn_whole():
    runs = [points(n=30, seed=seed) for seed in range(3)]
    a, b = law.resample(runs)
    same = law.fit_law(*runs[1])  # one run three times is among the samples
    assert ((a - same.a).abs() + (b - same.b).abs()).min() < 1e-9


def test_an_entropy_of_zero_has_a_finite_logarithm():
    steps = series()
    steps[-1]["entropy"] = 0.0
    assert math.isfinite(law.fit([law.points(steps)])["r2"]["log H"])


# ---------------------------------------------------------------- on the curve, or above it?


def test_runs_above_the_curve_are_above_it_by_so_much_and_runs_of_the_same_law_are_on_it():
    baseline = [points(seed=seed) for seed in range(5)]
    groups = {"above": [points(seed=seed, b=B + 0.05) for seed in range(10, 15)],
              "on": [points(seed=seed) for seed in range(20, 25)], "itself": baseline}  # fmt: skip
    found = law.compare(groups, baseline)
    assert found["itself"]["equal H"]["mean"] == pytest.approx(0, abs=1e-9)
    for label, shift in (("above", 0.05), ("on", 0.0)):
        for w in found[label].values():
            low, high = w["interval"]
            assert w["runs"] == 5 and low < w["mean"] < high and low - 0.01 < shift < high + 0.01
        assert (found[label]["equal H"]["interval"][0] > 0) == (label == "above")


def test_only_entropies_that_the_baseline_has_count_at_equal_entropy():
    baseline = [points(top=0.5, bottom=0.05)]
    groups = {"far": [points(top=2.0, bottom=0.6)], "near": [points(top=2.0, bottom=0.05)]}
    found = law.compare(groups, baseline)
    assert found["far"]["equal H"] is None and found["far"]["end"]["runs"] == 1
    assert found["near"]["equal H"]["mean"] == pytest.approx(0, abs=0.02)


# ---------------------------------------------------------------- the command


@pytest.fixture
def make_run(tmp_path):
    def make(name, steps, method="grpo", beta=3.0):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"method": method, "kl_cov_beta": beta}))
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
        return tmp_path / name

    return make


def test_the_command_writes_table_figures_and_picture_of_runs_against_a_baseline(make_run, command, tmp_path):
    """Runs of a method whose options differ are not taken for seeds of one experiment."""
    baseline = [make_run(f"g{seed}", series(seed=seed)) for seed in (1, 2)]
    runs = [make_run(f"k{seed}", series(seed=seed, b=B + 0.1), "kl_cov") for seed in (3, 4)]
    runs.append(make_run("k5", series(seed=5), "kl_cov", 1.0))
    status, said, err = command(law.main, *runs, "--against", *baseline, "--out", tmp_path / "out")
    assert status == 0, err
    found = json.loads((tmp_path / "out" / "data" / "law.json").read_text())
    for label, shift in (("kl_cov, kl_cov_beta 3.0", 0.1), ("kl_cov, kl_cov_beta 1.0", 0)):
        assert found["above"][label]["equal H"]["mean"] == pytest.approx(shift, abs=0.02)
    each = {str(run) for run in [*runs, *baseline]}
    assert set(found["fits"]) == each | {"all of kl_cov, kl_cov_beta 3.0", "all of grpo, baseline"}
    text = (tmp_path / "out" / "law.md").read_text()
    assert "| kl_cov, kl_cov_beta 3.0 | 2 | 0.1" in text and text in said
    assert imread(tmp_path / "out" / "law.png").std() > 0.01


@pytest.mark.parametrize("steps", [series(n=9), [line | {"entropy": 0.5} for line in series()], []])
def test_what_cannot_be_fitted_is_one_line_that_names_the_run(make_run, command, tmp_path, steps):
    status, said, err = command(law.main, make_run("bad", steps), "--out", tmp_path / "out")
    assert status == 2 and said == "" and not (tmp_path / "out").exists()
    assert err.startswith("lab.law: error: ") and err.count("\n") == 1 and "bad" in err
