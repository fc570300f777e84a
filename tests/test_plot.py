"""What the pictures show: the curves that were logged, one colour a method, nothing averaged that is not alike."""

import itertools
import json
import math
import subprocess
import sys

import numpy
import pytest
from conftest import ROOT
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

import plot
from data import UserError


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, lines=..., method=..., seed=...) writes a run directory and returns it."""

    def make(name, lines=None, end="", **config):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"method": "grpo", "seed": 0, **config}))
        lines = logged(6) if lines is None else lines
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
        return tmp_path / name

    return make


def logged(steps, height=1.0):
    """Step 0 with an evaluation alone, then steps as train.py logs them, every third with an evaluation."""
    evaluation = {"accuracy": 0.5, "accuracy_sampled": 0.25}
    lines = [{"step": s, "reward": 0.5, "entropy": height / s, "covariance": 0.1 / s} for s in range(1, steps + 1)]
    return [{"step": 0, **evaluation}, *(line | evaluation if line["step"] % 3 == 0 else line for line in lines)]


@pytest.fixture
def axes(monkeypatch, tmp_path):
    """axes(run_dirs) draws and returns the three panels instead of their pixels."""

    def drawn(run_dirs):
        kept = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, file: kept.append(figure))
        plot.curves(run_dirs, tmp_path / "curves.png")
        return dict(zip(plot.PANELS, kept[0].axes))

    return drawn


def labelled(axis):
    """The lines that the legend names: {label: line}."""
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def command(*arguments, cwd):
    return subprocess.run([sys.executable, ROOT / "plot.py", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


# ---------------------------------------------------------------- reading


def test_a_run_is_read_as_its_options_and_its_steps(make_run):
    config, steps = plot.read_run(make_run("r", seed=3))
    assert config == {"method": "grpo", "seed": 3}
    assert steps == logged(6)


@pytest.mark.parametrize("torn", ['{"step": 7, "rew', '{"step": 7, "seconds": {"total": 1.0}', "{", "\0\0\0"])
def test_a_torn_last_line_is_ignored(make_run, torn):
    assert plot.read_run(make_run("r", end=torn))[1] == logged(6)


@pytest.mark.parametrize("damage", ['{"step": 7, "rew\n{"step": 8}\n', "7\n", '{"loss": 1}\n'])
def test_a_broken_line_elsewhere_is_not_ignored(make_run, damage):
    with pytest.raises(UserError, match="damaged"):
        plot.read_run(make_run("r", end=damage))


# ---------------------------------------------------------------- curves


def test_null_is_a_gap_and_nothing_is_drawn_across_it():
    steps = [{"step": 1, "entropy": 3.0}, {"step": 2, "entropy": None}, {"step": 3, "entropy": 1.0}]
    xs, ys = plot.points(steps, "entropy")
    assert xs == [1, 2, 3] and ys[0] == 3.0 and math.isnan(ys[1]) and ys[2] == 1.0


def test_a_value_between_gaps_is_a_dot(make_run, axes):
    values = [3.0, 2.0, None, 1.0, None, 2.0, 2.0]
    run = make_run("r", [{"step": s, "entropy": h} for s, h in enumerate(values, 1)])
    (line,) = labelled(axes([run])["entropy"]).values()
    assert line.get_marker() == "o" and line.get_markevery() == [3]


@pytest.mark.parametrize("between", [{}, {"accuracy": None}])
def test_evaluations_are_joined_whatever_the_steps_between_them_log(between):
    steps = [{"step": 0, "accuracy": 0.5}, {"step": 1, **between}, {"step": 2, "accuracy": 0.75}]
    assert plot.points(steps, "accuracy") == ([0, 2], [0.5, 0.75])


def test_the_starting_policy_s_evaluation_leaves_no_gap_in_the_entropy():
    assert plot.points(logged(2), "entropy") == ([1, 2], [1.0, 0.5])


def test_the_mean_is_over_steps_that_all_seeds_have():
    long, short = logged(6, height=1.0), logged(4, height=3.0)
    assert plot.mean([long, short], "entropy") == ([1, 2, 3, 4], [2.0, 1.0, pytest.approx(2 / 3), 0.5])
    assert plot.mean([short, long], "accuracy") == ([0, 3], [0.5, 0.5])
    assert plot.mean([long, logged(0)], "entropy") == ([], [])


def test_every_seed_is_a_thin_line_and_their_mean_a_thick_one(make_run, axes):
    runs = [make_run(f"r{s}", logged(6, height=s), seed=s) for s in (1, 2, 3)]
    lines = axes(runs)["entropy"].lines
    assert [line.get_ydata()[0] for line in lines] == [1.0, 2.0, 3.0, 2.0]
    assert max(line.get_linewidth() for line in lines[:3]) < lines[3].get_linewidth()
    assert list(labelled(axes(runs)["entropy"])) == ["grpo, 3 seeds"]


def test_one_run_alone_shows_what_sampling_reaches_as_well(make_run, axes):
    panel = axes([make_run("r")])["accuracy"]
    assert list(labelled(panel)) == ["greedy", "sampled", "training reward"] and "greed" not in panel.get_ylabel()


def test_every_panel_names_what_it_shows_and_in_which_unit(make_run, axes):
    panels = axes([make_run("a"), make_run("b", seed=1)])
    assert all(axis.get_title(loc="left") and axis.get_xlabel() == "step" for axis in panels.values())
    assert [panels[key].get_ylabel() for key in plot.PANELS] == [unit for _, unit in plot.PANELS.values()]


# ---------------------------------------------------------------- methods


def test_one_colour_per_method_in_every_panel_and_every_picture(make_run, axes):
    runs = [make_run(f"{m}{s}", method=m, seed=s) for m in ("kl_cov", "grpo") for s in (0, 1)]
    for axis in axes(runs).values():
        drawn = {label.split(",")[0]: line.get_color() for label, line in labelled(axis).items()}
        assert drawn == {"grpo": plot.COLOURS["grpo"], "kl_cov": plot.COLOURS["kl_cov"]}
    assert labelled(axes(runs[:1])["entropy"])["kl_cov, seed 0"].get_color() == plot.COLOURS["kl_cov"]


def test_methods_without_a_fixed_colour_get_further_ones():
    colours = plot.colours(["grpo", "mine", "another", "mine"])
    assert len(set(colours.values())) == len(colours) == len(plot.COLOURS) + 2
    assert colours["grpo"] == plot.COLOURS["grpo"]


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "none": numpy.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour, blindness):
    """CIE L*a*b* of a colour as the colour-blind see it."""
    rgb = numpy.array(to_rgb(colour))
    linear = numpy.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = numpy.cbrt(xyz @ numpy.clip(BLINDNESS[blindness] @ linear, 0.009, 1) / [0.9505, 1.0, 1.089])
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_the_colour_blind_can_tell_the_methods_of_the_paper_apart(blindness):
    for a, b in itertools.combinations(("grpo", "clip_cov", "kl_cov"), 2):
        distance = numpy.linalg.norm(lab(plot.COLOURS[a], blindness) - lab(plot.COLOURS[b], blindness))
        assert distance > 40, (a, b, distance)  # 2.3 is just noticeable


def test_runs_of_a_method_with_other_options_are_not_averaged_with_it(make_run, axes):
    runs = [make_run(f"r{s}", seed=s, clip_high=0.2, out=f"r{s}", steps=6 + s) for s in (0, 1)]
    runs.append(make_run("control", seed=0, clip_high=1000.0, out="control", steps=6))
    shown = labelled(axes(runs)["entropy"])
    assert list(shown) == ["grpo, clip_high 0.2, 2 seeds", "grpo, clip_high 1000.0, seed 0"]
    colours, dashes = zip(*((line.get_color(), line.get_linestyle()) for line in shown.values()))
    assert colours == (plot.COLOURS["grpo"],) * 2 and dashes == ("-", "--")


def test_what_differs_between_methods_is_no_variant(make_run):
    runs = [plot.read_run(make_run(m, method=m, clip_low=c)) for m, c in (("clip_cov", 1.0), ("grpo", 0.2))]
    assert [label for _, label, _ in plot.experiments(runs)] == ["grpo, seed 0", "clip_cov, seed 0"]


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("values", [[11.9, 11.8], [0.3, 0.1], [0.3, 0.01], [0.3, 1e-9, 0.0]])
def test_the_entropy_axis_spans_a_factor_of_10_at_least_and_1000_at_most(make_run, axes, values):
    axis = axes([make_run("r", [{"step": s, "entropy": h} for s, h in enumerate(values, 1)])])["entropy"]
    low, top = axis.get_ylim()
    assert axis.get_yscale() == "log" and 10 <= top / low <= 1000 * 1.2**2 * 1.001


@pytest.mark.parametrize("values", [[0.0], [1.0, 0.99], [0.02, 0.03], [0.0, 1.0], [0.5, 0.9]])
def test_the_accuracy_axis_shows_all_values_and_spans_at_least_ten_points(make_run, axes, values):
    low, top = axes([make_run("r", [{"step": s, "accuracy": a} for s, a in enumerate(values)])])["accuracy"].get_ylim()
    assert low < min(values) and max(values) < top and top - low > 0.1
    assert low > -0.015 and top < 1.015


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.13, 0.17, 0.3, 0.6])
def test_the_accuracy_axis_is_labelled_with_whole_percents_only(make_run, axes, spread):
    ticks = axes([make_run("r", [{"step": s, "accuracy": 0.2 + s * spread} for s in (0, 1)])])["accuracy"].get_yticks()
    assert all(abs(100 * tick - round(100 * tick)) < 1e-6 for tick in ticks) and len(ticks) > 3


# ---------------------------------------------------------------- files and the command line


def test_the_png_is_16_to_6_and_sharp_enough_for_a_projector(make_run, tmp_path):
    plot.curves([make_run("r")], tmp_path / "new" / "curves.png")
    assert imread(tmp_path / "new" / "curves.png").shape[:2] == (900, 2400)


def test_a_legend_of_many_rows_takes_nothing_from_the_panels(make_run, tmp_path):
    runs = [make_run(f"r{i}", an_option_with_a_long_name=i, another_option_with_a_long_name=i) for i in range(4)]
    plot.curves(runs, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").shape[:2] == (1080, 2400)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lines", [
    [{"step": 1, "reward": 0.0, "entropy": 11.9, "covariance": 0.0}],
    [{"step": 0, "accuracy": 0.5, "accuracy_sampled": 0.25}],
    [{"step": s, "reward": 0.0, "entropy": 0.0, "covariance": None} for s in (1, 2, 3)],
    [{"step": 1, "reward": None, "entropy": None, "covariance": None, "accuracy": None}],
], ids=["one step", "the starting policy alone", "no evaluation", "nothing but null"])  # fmt: skip
def test_a_run_that_has_hardly_begun_is_drawn_without_a_warning(make_run, tmp_path, lines):
    plot.curves([make_run("r", lines)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_one_run_is_drawn_into_its_directory_and_several_into_figures_or_out(make_run, tmp_path):
    a, b = make_run("a"), make_run("b", method="kl_cov")
    (tmp_path / "table.md").write_text("a file among the runs is passed over")
    assert command("a", cwd=tmp_path).stdout == "a/curves.png\n" and (a / "curves.png").exists()
    assert command(a, b, "table.md", cwd=tmp_path).returncode == 0 and (tmp_path / "figures/curves.png").exists()
    assert command(a, b, "--out", "deep/er", cwd=tmp_path).returncode == 0 and (tmp_path / "deep/er/curves.png").exists()


def refused(arguments, monkeypatch, capsys):
    """The one line that the command ends with, at exit status 2."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        plot.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("plot.py: error: ")
    return err


def test_a_directory_that_is_no_run_exits_2_with_one_line_that_names_it(make_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (make_run("half") / "metrics.jsonl").unlink()
    make_run("begun", [])
    make_run("torn", [], end='{"step": 1, "rew')
    (make_run("list") / "config.json").write_text("[]")
    (make_run("nameless") / "config.json").write_text("{}")
    good = make_run("good")
    for name in ("missing", "empty", "file", "half", "begun", "torn", "list", "nameless"):
        assert name in refused([tmp_path / name], monkeypatch, capsys)
        if name != "file":
            assert name in refused([good, tmp_path / name, "--out", tmp_path / "out"], monkeypatch, capsys)
    assert not (tmp_path / "missing").exists() and not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_a_directory_exits_2_with_one_line_that_names_it(make_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert "--out" in refused([make_run("r"), "--out", tmp_path / "file"], monkeypatch, capsys)


def test_no_display_and_no_pyplot_is_needed():
    code = "import sys, plot; assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
