"""What plot.py promises: the curves that were logged, one colour a method, medians of equal experiments."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import plot


def logged(steps, height=1.0):
    """Steps as train.py logs them, every third with an evaluation."""
    evaluation, lines = {"accuracy": 0.5, "accuracy_sampled": 0.25}, []
    for s in range(1, steps + 1):
        line = {"step": s, "reward": 0.5, "entropy": height / s, "covariance": 0.1 / s}
        lines.append(line | evaluation if s % 3 == 1 else line)
    return lines


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make_run(name, lines, end, option=..., ...) writes a run directory into the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(name, lines=None, end="", **config):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({"method": "grpo", "seed": 0, **config}))
        text = "".join(json.dumps(line) + "\n" for line in (logged(6) if lines is None else lines))
        Path(name, "metrics.jsonl").write_text(text + end)
        return name

    return make


def axes(run_dirs, monkeypatch):
    """The three panels of the figure."""
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file: kept.append(figure))
        plot.curves([plot.read_run(run) for run in run_dirs], "curves.png")
    return dict(zip(plot.PANELS, kept[0].axes))


def named(axis):
    """The lines that the legend names: {label: line}."""
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("torn", ["", '{"step": 7, "rew', "\0\0\0"])
def test_a_run_is_read_as_its_options_and_its_steps_without_a_torn_last_line(make_run, torn):
    assert plot.read_run(make_run("r", end=torn, seed=3)) == ({"method": "grpo", "seed": 3}, logged(6))


def test_null_is_a_gap_but_evaluations_are_joined_whatever_lies_between():
    steps = [{"step": 1, "entropy": 3.0, "accuracy": 0.5}, {"step": 2, "entropy": None, "accuracy": None},
             {"step": 3, "entropy": 1.0}, {"step": 4, "entropy": 1.0, "accuracy": 0.75}]  # fmt: skip
    xs, ys = plot.points(steps, "entropy")
    assert xs == [1, 2, 3, 4] and math.isnan(ys[1]) and ys[::2] == [3.0, 1.0]
    assert plot.points(steps, "accuracy") == ([1, 4], [0.5, 0.75])


# ---------------------------------------------------------------- which lines are drawn


def test_every_seed_is_a_thin_line_and_their_median_over_common_steps_a_thick_one(make_run, monkeypatch):
    heights = {0: 1.0, 1: 9.0, 2: 2.0}
    runs = [make_run(f"r{s}", logged(4 + s, h), seed=s, out=f"r{s}", steps=s) for s, h in heights.items()]
    runs.append(make_run("r3", [{"step": 2, "entropy": None}, {"step": 3, "entropy": 3.0}], seed=3))
    lines = axes(runs[:3], monkeypatch)["entropy"].lines
    assert [line.get_ydata()[0] for line in lines] == [1.0, 9.0, 2.0, 2.0]
    assert list(lines[3].get_xdata()) == [1, 2, 3, 4] and lines[0].get_linewidth() < lines[3].get_linewidth()
    assert list(named(axes(runs[:3], monkeypatch)["entropy"])) == ["grpo, 3 seeds"]
    gap, value = plot.middle([plot.read_run(run)[1] for run in runs], "entropy")[1]
    assert math.isnan(gap) and value == pytest.approx((2 / 3 + 3) / 2)


def test_one_run_alone_shows_what_sampling_reaches_as_well(make_run, monkeypatch):
    panels = axes([make_run("r")], monkeypatch)
    assert list(named(panels["accuracy"])) == ["greedy", "sampled", "training reward"]


def test_runs_with_other_options_are_another_experiment_with_its_own_dashes(make_run, monkeypatch):
    runs = [make_run(f"r{s}", seed=s, clip_high=0.2) for s in (0, 1)]
    runs += [make_run("control", clip_high=9.0), make_run("other", method="clip_cov", clip_high=1.0)]
    shown = named(axes(runs, monkeypatch)["entropy"])
    assert list(shown) == ["grpo, clip_high 0.2, 2 seeds", "grpo, clip_high 9.0", "clip_cov"]
    looks = [(line.get_color(), line.get_linestyle()) for line in shown.values()]
    assert looks[0][0] == looks[1][0] == plot.COLOURS["grpo"] and looks[0][1] != looks[1][1]
    assert looks[2] == (plot.COLOURS["clip_cov"], looks[0][1])


# ---------------------------------------------------------------- files and the command line


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("line", [
    {"step": 1, "reward": 0.0, "entropy": 11.9, "covariance": 0.0},
    {"step": 1, "reward": 0.0, "entropy": 0.0, "covariance": None, "accuracy": 0.5, "accuracy_sampled": 0.25},
    {"step": 1, "reward": None, "entropy": None, "covariance": None, "accuracy": None},
], ids=["no evaluation", "no entropy left", "nothing but null"])  # fmt: skip
def test_a_run_that_has_hardly_begun_is_drawn_without_a_warning(make_run, command, line):
    assert command(plot.main, make_run("r", [line])) == (0, "r/curves.png\n", "")
    assert Path("r/curves.png").exists()


@pytest.mark.parametrize("words, file", [
    (["a"], "a/curves.png"), (["a", "b"], "figures/curves.png"),
    (["a", "--out", "new/er"], "new/er/curves.png"),
])  # fmt: skip
def test_one_run_is_drawn_into_its_directory_and_several_into_figures_or_out(make_run, command, words, file):
    make_run("a"), make_run("b", method="kl_cov")
    assert command(plot.main, *words) == (0, file + "\n", "")
    height, width = imread(file).shape[:2]
    assert width == 2160 and height < width / 2


def test_what_is_no_run_is_passed_over_with_a_word_and_an_error_if_nothing_else_is_there(make_run, command):
    Path("study").mkdir()
    Path("table.md").write_text("")
    make_run("begun", [], end='{"step": 1, "rew')
    make_run("broken", end='{"step": 7, "rew\n{"step": 8}\n')
    Path(make_run("list"), "config.json").write_text("[]")
    others = ["study", "table.md", "begun", "broken", "list", "missing"]
    for name in others:
        status, out, error = command(plot.main, name)
        assert status == 2 and not out and error.startswith(f"plot.py: error: {name} ")
    status, out, error = command(plot.main, make_run("good"), *others)
    assert (status, out) == (0, "good/curves.png\n")
    assert [line.split(": ")[2].split(" ")[0] for line in error.splitlines()] == others


def test_an_out_that_cannot_be_a_directory_exits_2_with_one_line_that_names_it(make_run, command):
    Path("file").write_text("")
    status, out, error = command(plot.main, make_run("r"), "--out", "file")
    assert status == 2 and not out and error.count("\n") == 1 and "--out" in error
