"""What law.py promises: the fit of a run, what noise alone would allow, the doubt, the forecast, and who lies above whose curve."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from matplotlib.image import imread

from lab import law

A, B = 0.2, 0.8


def series(n=120, sigma=0.05, seed=0, f=torch.exp, a=A, b=B, top=1.2, bottom=0.02):
    """Steps of a run that obeys R = -a f(H) + b but for noise."""
    H = torch.linspace(math.log(top), math.log(bottom), n, dtype=torch.float64).exp()
    R = -a * f(H) + b + sigma * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [{"step": i + 1, "entropy": h, "reward": r} for i, (h, r) in enumerate(zip(H.tolist(), R.tolist()))]


@pytest.fixture
def make_run(tmp_path):
    def make(name, steps, **config):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"method": "grpo", "seed": 0, **config}))
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
        return tmp_path / name

    return make


def strict(path):
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


# ---------------------------------------------------------------- one run


def test_without_noise_the_fit_is_the_law_and_the_forecast_what_came():
    w = law.analyse(series(sigma=0))
    assert (w["a"], w["b"], w["ceiling"], w["r2"], w["rmse"]) == pytest.approx((A, B, B - A, 1, 0), abs=1e-9)
    assert all(low <= value + 1e-9 and value - 1e-9 <= high for value, (low, high) in ((w[k], w["interval"][k]) for k in ("a", "b", "ceiling")))
    for part, steps in (("10%", 12), ("20%", 24), ("36%", 43), ("50%", 60)):
        f = w["forecast"][part]
        assert f["steps"] == steps and f["exp H"]["rmse"] < 1e-9 and f["exp H"]["end"] == pytest.approx(f["end"])
        assert f["log H"]["rmse"] > 0.05  # the wrong form is not as good


@pytest.mark.parametrize("best, f", law.FORMS.items())
def test_the_form_that_made_the_points_fits_them_best(best, f):
    forms = law.analyse(series(sigma=0.002, f=f))["forms"]
    assert max(forms, key=lambda name: forms[name]["r2"]) == best and forms[best]["r2"] > 0.99
    assert forms[best]["slope"] == pytest.approx(-A, rel=0.02) and forms[best]["intercept"] == pytest.approx(B, rel=0.02)


def test_the_noise_is_found_whatever_the_law_beneath_and_says_what_r2_it_allows():
    for f in law.FORMS.values():
        for sigma in (0.01, 0.05):
            R = law.points(series(2000, sigma, f=f))[1]
            assert law.noise(R) == pytest.approx(sigma, rel=0.1)
    for width in (1, 5, 20):
        w = law.analyse(series(2000, 0.1), width=width)
        assert w["r2"] == pytest.approx(w["noise_allows"], abs=0.05)
    assert law.analyse(series(2000, 0.1), width=1)["r2"] < 0.6 < 0.9 < law.analyse(series(2000, 0.1), width=20)["r2"]  # smoothing tells


def test_means_of_steps_leave_a_perfect_law_perfect():
    H, R = law.points(series(sigma=0))
    assert law.line(law.blocks(H.exp(), 7), law.blocks(R, 7)) == pytest.approx((-A, B))
    assert law.blocks(torch.arange(8.0), 3).tolist() == [1, 4]  # the last, incomplete one is left out
    assert law.blocks(torch.arange(3.0), 5).tolist() == [1]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(100):
        H, R = law.points(series(100, 0.05, seed))
        samples = law.resample_steps(H, R, 5, count=400, seed=seed)
        low, high = law.interval(samples[:, 1] - samples[:, 0])
        held += low <= B - A <= high
    assert 85 <= held <= 99


def test_intervals_do_not_hang_on_the_few_first_steps_in_which_the_entropy_falls():
    H, R = law.points(series(60, 0.03, top=0.2, bottom=0.1)[:2] + series(60, 0.03, top=0.01, bottom=0.005))
    low, high = law.interval(law.resample_steps(H, R, 5)[:, 0])
    assert high - low < 2  # resampled points would leave those out now and then, and have no slope at all


def test_the_bootstrap_over_runs_is_the_fit_to_resampled_runs():
    runs = [law.points(series(30, 0.05, seed)) for seed in range(3)]
    one = law.fit_law(*runs[1])
    samples = law.resample_runs(runs, count=300)
    assert any(s == pytest.approx((one.a, one.b)) for s in samples.tolist())  # the same run three times
    pooled = law.fit_law(*map(torch.cat, zip(*runs)))
    assert any(s == pytest.approx((pooled.a, pooled.b)) for s in samples.tolist())


def test_bend_says_how_far_exp_is_from_a_straight_line():
    assert law.analyse(series(top=0.1))["bend"] < 0.02 < 0.1 < law.analyse(series(top=1.2))["bend"]


def test_an_entropy_of_zero_has_no_logarithm_and_the_rest_is_told():
    steps = series()
    steps[-1]["entropy"] = 0.0
    w = law.analyse(steps)
    assert w["forms"]["log H"] is None and w["forecast"]["50%"]["log H"] is None and w["r2"] > 0
    assert "-" in "".join(law.tables({"r": w}))


# ---------------------------------------------------------------- on the curve, or above it


def test_runs_above_the_others_curve_are_above_it_by_so_much_and_others_are_on_it():
    others = [series(seed=s) for s in range(5)]
    above = [series(seed=s, b=B + 0.05) for s in range(10, 15)]
    on = [series(seed=s) for s in range(20, 25)]
    d = law.distances({"above": above, "on": on}, others)
    assert d["of"]["the others"]["distance"]["mean"] == pytest.approx(0, abs=1e-9)
    for label, shift in (("above", 0.05), ("on", 0.0)):
        for found in (d["of"][label]["distance"], d["of"][label]["end"], d["of"][label]["apart"], *d["of"][label]["bands"]):
            low, high = found["interval"]
            assert found["runs"] == 5 and low - 0.01 < shift < high + 0.01 and low < found["mean"] < high
        for key in ("distance", "apart"):
            low, high = d["of"][label][key]["interval"]
            assert (low > 0) == (label == "above")


def test_only_entropies_that_the_others_have_count_for_the_distance_and_bands_show_where_the_law_itself_fails():
    others = [series(top=0.5, bottom=0.05, f=torch.log, a=0.1, b=0.3)]
    far = series(top=2.0, bottom=0.6)
    near = series(top=2.0, bottom=0.05, f=torch.log, a=0.1, b=0.3)
    d = law.distances({"far": [far], "near": [near]}, others)
    assert d["of"]["far"]["distance"] is None and d["of"]["far"]["bands"] == [None] * 4
    assert d["edges"] == pytest.approx(sorted(d["edges"], reverse=True)) and (d["edges"][0], d["edges"][-1]) == pytest.approx((0.5, 0.05))
    bands = [[band["mean"] for band in d["of"][label]["bands"]] for label in ("near", "the others")]
    assert max(abs(a - b) for a, b in zip(*bands)) < 0.03  # they are alike, and neither is near 0 everywhere:
    assert max(map(abs, bands[1])) > 0.01


def test_equal_h_against_equal_h_is_right_even_where_the_law_is_wrong():
    """Runs on the curve of the others, which is not of the law's form, but at lower entropies more often: above the fit, and not apart."""
    wrong = dict(f=torch.log, a=0.1, b=0.3, sigma=0.005)
    others = [series(top=1.0, bottom=0.01, seed=s, **wrong) for s in range(4)]
    runs = [series(top=0.05, bottom=0.01, seed=s, **wrong) for s in range(10, 14)]
    of = law.distances({"runs": runs}, others)["of"]["runs"]
    assert of["distance"]["interval"][0] > 0.02
    assert abs(of["apart"]["mean"]) < 0.01 and of["apart"]["interval"][0] < 0.005 and of["apart"]["interval"][1] > -0.005
    assert law.distances({"one": runs[:1]}, others)["of"]["one"]["apart"] is None


# ---------------------------------------------------------------- the commands


def command(*arguments, cwd):
    return subprocess.run([sys.executable, ROOT / "entropy.py", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def test_each_run_gets_law_json_and_law_png_and_a_line_in_each_table(make_run):
    runs = [make_run(f"r{s}", series(seed=s), seed=s) for s in (1, 2)]
    done = command(*runs, cwd=runs[0])
    assert done.returncode == 0, done.stderr
    for run, steps in zip(runs, (1, 2)):
        w = strict(run / "law.json")
        assert w["ceiling"] == pytest.approx(w["b"] - w["a"]) == law.analyse(series(seed=steps))["ceiling"]
        assert imread(run / "law.png").std() > 0.01
        assert done.stdout.count(str(run)) == 2 + len(law.EARLY) and f"{w['ceiling']:.3f}" in done.stdout


def test_runs_against_others_go_to_figures_or_out(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    others = [make_run(f"g{s}", series(seed=s), seed=s) for s in (1, 2)]
    runs = [make_run(f"k{s}", series(seed=s, b=0.9), method="kl_cov", seed=s) for s in (1, 2)]
    law.main([*map(str, runs), "--against", *map(str, others)])
    table = capsys.readouterr().out
    assert "kl_cov, 2 seeds" in table and "curve of the 2 others" in table
    d = strict(tmp_path / "figures" / "law.json")
    assert d["of"]["kl_cov, 2 seeds"]["distance"]["mean"] == pytest.approx(0.1, abs=0.02) and "curves" not in d
    assert imread(tmp_path / "figures" / "law.png").std() > 0.01
    law.main([str(runs[0]), "--against", str(others[0]), "--out", "there"])
    assert (tmp_path / "there" / "law.png").exists() and not (runs[0] / "law.json").exists()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        law.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("entropy.py: error: ")
    return err


def test_what_cannot_be_fitted_exits_2_with_one_line_that_names_it_and_writes_nothing(make_run, tmp_path, capsys):
    good = make_run("good", series())
    short = make_run("short", series(7))
    still = make_run("still", [line | {"entropy": 0.5} for line in series()])
    none = make_run("none", [line | {"reward": None} for line in series()])
    for bad in (short, still, none, tmp_path / "missing"):
        assert bad.name in refused(capsys, good, bad)
        assert bad.name in refused(capsys, good, "--against", bad, "--out", tmp_path / "out")
    assert "accuracy" in refused(capsys, good, "--of", "accuracy")
    assert "--smooth" in refused(capsys, good, "--smooth", 0)
    assert not (good / "law.json").exists() and not (tmp_path / "out").exists()


def test_r_may_be_another_key_such_as_held_out_accuracy(make_run, capsys):
    run = make_run("r", [line | ({"accuracy_sampled": line["reward"] / 2} if i % 5 == 0 else {}) for i, line in enumerate(series(sigma=0))])
    law.main([str(run), "--of", "accuracy_sampled", "--smooth", "1"])
    w = strict(run / "law.json")
    assert (w["of"], w["steps"], w["a"]) == ("accuracy_sampled", 24, pytest.approx(A / 2))
