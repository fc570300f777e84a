"""Figures: what happened in a run, or in many, readable from the back row of a lecture hall.

    python plot.py runs/kl_cov-s0          one run: its curves, into its own directory
    python plot.py runs/*                  several: methods side by side, into figures/ (or --out DIR)

curves.png has three panels over the same steps:

    policy entropy       nats per token. The scale is logarithmic and spans a factor of 10 at least and 1000 at most:
                         equal distances are equal ratios, so a fall to a tenth looks alike wherever it starts
    held-out accuracy    greedy; a dot is an evaluation. One run alone also shows sampled accuracy and training reward
    covariance           of log-probability and advantage over a batch's tokens. Above zero, likely tokens are
                         rewarded more than rare ones, and the entropy falls (covariance.py)

A method has the same colour in all pictures, fit for the colour-blind. A thin line is a seed, a thick one the
mean of the seeds at the steps that all of them have, so it ends with the shortest run. Runs of a method whose
options differ are not seeds of one experiment: they get means, dashes and labels of their own. Null in
metrics.jsonl is a gap. What is drawn is what the other files have measured; nothing is measured here.

Files among the arguments are passed over, so that `runs/*` may hold tables and logs as well.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.figure import Figure  # without pyplot there is no window, and no display is needed
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from data import UserError

COLOURS = {  # Okabe and Ito's palette, its yellow darkened for a white wall
    "grpo": "#000000", "clip_cov": "#0072B2", "kl_cov": "#D55E00", "clip_higher": "#E69F00", "entropy_bonus": "#56B4E9",
    "kl_ref": "#CC79A7", "high_entropy": "#A89B00", "low_entropy": "#009E73"}  # fmt: skip
FURTHER = ["#882255", "#332288", "#999933", "#661100", "#6699CC", "#888888"]  # Tol's muted palette, for other names
DASHES = ["-", (0, (2, 1)), (0, (1, 1)), (0, (4, 1, 1, 1))]  # of a method's variants, the one with most seeds first
PANELS = {  # key in metrics.jsonl: title and label of the axis
    "entropy": ("Policy entropy", "nats per token, logarithmic"),
    "accuracy": ("Held-out accuracy", "problems solved, greedily"),
    "covariance": ("Covariance", "of log-prob and advantage, nats")}  # fmt: skip
IMMATERIAL = {  # options in which seeds of one experiment may differ
    "seed", "out", "steps", "resume", "overwrite", "device", "processes", "versions", "commit", "micro_batch", "save_every",
    "eval_every", "final_samples", "max_hours", "stop_when_entropy", "shard_optimizer", "content",
    "sample_batch", "check_theorem"}  # fmt: skip
STYLE = {
    "font.size": 18, "axes.titlesize": 22, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#DDDDDD", "legend.frameon": False}  # fmt: skip


def read_run(run_dir):
    """(config, steps) of a run: its options, and one dict per line of metrics.jsonl, in order.

    A last line without its newline was torn by a kill, and is left out. Raises UserError if this is no run.
    """
    try:
        config = json.loads((Path(run_dir) / "config.json").read_text())
        *lines, torn = (Path(run_dir) / "metrics.jsonl").read_text(errors="replace").split("\n")
        steps = [json.loads(line) for line in lines]
        config["method"], [line["step"] for line in steps]
    except OSError as error:
        raise UserError(f"{run_dir} is no run directory: {Path(error.filename).name}: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} is damaged: {type(error).__name__}: {error}")
    if not steps:
        raise UserError(f"{run_dir} has no step yet: metrics.jsonl holds no whole line")
    return config, steps


def experiments(runs):
    """Which runs are seeds of what: [(method, label, [steps, ...])], methods in the order of COLOURS, most seeds first.

    An option that the config.json of a run lacks, for it was made before the option was, tells no runs apart.
    """
    found = {}
    for config, steps in runs:
        kin = [other for other, _ in runs if other["method"] == config["method"]]
        options = [k for k in config if k not in IMMATERIAL and any(other.get(k, config[k]) != config[k] for other in kin)]
        name = ", ".join([config["method"], *(f"{k} {config[k]}" for k in options)])
        found.setdefault((config["method"], name), []).append((config.get("seed"), steps))
    order = list(colours(method for method, _ in found))
    found = sorted(found.items(), key=lambda item: (order.index(item[0][0]), -len(item[1])))
    count = lambda seeds: f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0][0]}"
    return [(method, f"{name}, {count(seeds)}", [steps for _, steps in seeds]) for (method, name), seeds in found]


def colours(methods):
    """{method: colour}, the fixed ones first; other names take the further colours in alphabetical order."""
    others = sorted(set(methods) - set(COLOURS))
    return COLOURS | {method: FURTHER[i % len(FURTHER)] for i, method in enumerate(others)}


def points(steps, key):
    """Steps and values of one key. Null becomes nan, a gap; evaluations are joined, for they are steps apart."""
    known = [(line["step"], line[key]) for line in steps if key in line and (line[key] is not None or "accuracy" not in key)]
    return [x for x, _ in known], [math.nan if y is None else y for _, y in known]


def mean(seeds, key):
    """Steps that all seeds have, and the mean over the seeds there."""
    known = [dict(zip(*points(steps, key))) for steps in seeds]
    common = [x for x in known[0] if all(x in one for one in known)]
    return common, [fmean(one[x] for one in known) for x in common]


def draw(axis, xs, ys, dots=False, **style):
    """A line. With `dots` every point is marked, without only a point between gaps, which no line would show."""
    here = [False, *map(math.isfinite, ys), False]
    marked = [i for i in range(len(ys)) if here[i + 1] and (dots or not (here[i] or here[i + 2]))]
    axis.plot(xs, ys, marker="o" if marked else None, markevery=marked, markersize=3 + style["linewidth"], **style)


def dress(axis, key, last):
    """Title, units and scales; `last` is the last step of all, at least 1."""
    values = [y for line in axis.lines for y in line.get_ydata() if math.isfinite(y)]
    low, top = min(values, default=0), max(values, default=0)
    if not values:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    elif key == "entropy" and top > 0:
        axis.set(yscale="log", ylim=(min(max(low, top / 1000), top / 10) / 1.2, top * 1.2))
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    elif key == "accuracy":
        middle, half = min(max((low + top) / 2, 0.05), 0.95), max((top - low) / 2 + 0.01, 0.06)  # noise must not fill the panel
        axis.set_ylim(middle - half, middle + half)
        axis.yaxis.set(major_locator=MaxNLocator(6, steps=(1, 2, 5, 10)), major_formatter=PercentFormatter(1, decimals=0))
    elif key == "covariance":
        axis.axhline(0, color="#999999", linewidth=2, zorder=1.6)  # above the grid, below the curves
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set(title=PANELS[key][0], xlabel="step", ylabel=axis.get_ylabel() or PANELS[key][1], xlim=(-0.03 * last, 1.03 * last))


def curves(run_dirs, file, names=None):
    """Draws the runs into one PNG: entropy, accuracy and covariance side by side. UserError before anything is written.

    names: of the experiment that each run belongs to, with a colour of its own, in this order (default: by method and options).
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    seeds_of = {name: [steps for other, (_, steps) in zip(names, runs) if other == name] for name in names or ()}
    shown = [(name, f"{name}, {len(seeds)} seeds", seeds) for name, seeds in seeds_of.items()] or experiments(runs)
    columns = max(1, min(4, 100 // (6 + max(len(label) for _, label, _ in shown))))  # of the legend
    variants = {}
    with rc_context(STYLE):
        figure = Figure(figsize=(16, 6 + 0.4 * ((len(shown) - 1) // columns)), dpi=150, layout="constrained")
        axes = dict(zip(PANELS, figure.subplots(1, 3)))
        for method, label, seeds in shown:
            variants[method] = variants.get(method, -1) + 1
            look = {"color": colours(m for m, _, _ in shown)[method], "linestyle": DASHES[variants[method] % len(DASHES)]}
            for key, axis in axes.items():
                for steps in seeds if len(seeds) > 1 else []:
                    draw(axis, *points(steps, key), linewidth=1, alpha=min(0.35, 1.4 / len(shown)), **look)
                width = 4 if len(seeds) > 1 else 2.5
                draw(axis, *mean(seeds, key), dots=key == "accuracy", linewidth=width, zorder=3, label=label, **look)
        figure.legend(*axes["entropy"].get_legend_handles_labels(), loc="outside upper center", ncols=columns,
                      fontsize=22, labelcolor="linecolor")  # fmt: skip
        if len(run_dirs) == 1:
            add_sampling(axes["accuracy"], seeds[0], look["color"])
        last = max(1, *(line["step"] for _, _, seeds in shown for steps in seeds for line in steps))
        for key, axis in axes.items():
            dress(axis, key, last)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)


def add_sampling(axis, steps, colour):
    """What sampling reaches, beside greedy decoding: on held-out problems, and on those of the training."""
    axis.set_ylabel("problems solved")
    axis.lines[0].set_label("greedy")
    draw(axis, *points(steps, "accuracy_sampled"), linewidth=2.5, linestyle=(0, (2, 1)), color=colour, label="sampled")
    draw(axis, *points(steps, "reward"), linewidth=1, color="#555555", alpha=0.6, zorder=1.9, label="training reward")
    axis.legend(fontsize=16)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directory of train.py; files are passed over")
    parser.add_argument("--out", metavar="DIR", help="where curves.png goes (default: a single run's directory, else figures/)")
    o = parser.parse_args()
    run_dirs = [Path(run) for run in o.runs if not Path(run).is_file()] or [Path(o.runs[0])]
    file = Path(o.out or (run_dirs[0] if len(run_dirs) == 1 else "figures")) / "curves.png"
    try:
        curves(run_dirs, file)
    except UserError as error:
        parser.exit(2, f"plot.py: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"plot.py: error: argument --out: {file.parent} cannot be written to: {error.strerror}\n")
    print(file)


if __name__ == "__main__":
    main()
