"""Figures: what happened in a run, or in several, readable in a lecture hall.

    python plot.py runs/kl_cov-s0          one run: its curves, into its own directory
    python plot.py runs/*                  several: methods side by side, into figures/ (or --out DIR)

curves.png has three panels over the same steps:

    policy entropy       nats per token. The scale is logarithmic: equal distances are equal ratios
    held-out accuracy    greedy; a dot is an evaluation. One run alone also shows sampled accuracy and reward
    covariance           of log-probability and advantage over a batch's tokens. Above zero, likely tokens are
                         rewarded more than rare ones, and the entropy falls (covariance.py)

A method has the same colour in all pictures, fit for the colour-blind. Thin lines are seeds; the thick one is
their median. Runs of a method whose options differ are not seeds of one experiment: they get their own line,
label and dashes. Null in metrics.jsonl is a gap. Arguments that are no run directories are passed over.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import median

from matplotlib import rc_context
from matplotlib.figure import Figure  # without pyplot there is no window, and no display is needed
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from data import UserError

COLOURS = {  # Okabe and Ito's palette, its yellow darkened for a white wall
    "grpo": "#000000", "clip_cov": "#0072B2", "kl_cov": "#D55E00", "entropy_bonus": "#56B4E9",
    "clip_higher": "#E69F00", "kl_ref": "#CC79A7", "high_entropy": "#A89B00", "low_entropy": "#009E73",
}
FURTHER = ["#882255", "#332288", "#999933", "#661100", "#6699CC", "#888888"]  # Tol's muted palette
DASHES = ["-", (0, (2, 1)), (0, (1, 1)), (0, (4, 1, 1, 1))]  # of a method's variants
PANELS = {  # key in metrics.jsonl: title and label of the axis
    "entropy": ("Policy entropy", "nats per token, logarithmic"),
    "accuracy": ("Held-out accuracy", "problems solved, greedily"),
    "covariance": ("Covariance", "of log-prob and advantage, nats"),
}
IMMATERIAL = {  # options in which seeds of one experiment may differ
    "method", "seed", "out", "steps", "resume", "overwrite", "device", "processes", "versions", "commit",
    "content", "micro_batch", "sample_batch", "save_every", "eval_every", "final_samples",
    "shard_optimizer", "gradient_checkpointing",
}
STYLE = {
    "font.size": 18, "axes.titlesize": 22, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.grid": True, "grid.color": "#DDDDDD", "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False,
}

# ---------------------------------------------------------------- reading


def read_run(run_dir):
    """(config, steps) of a run: its options, and one dict for each line of metrics.jsonl.

    A last line without its newline was cut off by a kill and is left out. UserError if this is no run.
    """
    try:
        config = json.loads((Path(run_dir) / "config.json").read_text())
        *lines, _ = (Path(run_dir) / "metrics.jsonl").read_text(errors="replace").split("\n")
        steps = [json.loads(line) for line in lines]
        config["method"], [line["step"] for line in steps]
    except OSError as error:
        what = f"{Path(error.filename).name}: {error.strerror}"
        raise UserError(f"{run_dir} is no run directory: {what}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} is damaged: {type(error).__name__}: {error}") from None
    if not steps:
        raise UserError(f"{run_dir} has no step yet: metrics.jsonl holds no whole line")
    return config, steps


def colours(methods):
    """{method: colour}, the fixed ones first; other names take the further colours in alphabetical order."""
    others = sorted(set(methods) - set(COLOURS))
    return COLOURS | {method: FURTHER[i % len(FURTHER)] for i, method in enumerate(others)}


def label(config, configs):
    """The method of a run, with the options in which runs of this method differ beyond their seeds."""
    kin = [other for other in configs if other["method"] == config["method"]]
    differ = [k for k in config if k not in IMMATERIAL and any(c.get(k, config[k]) != config[k] for c in kin)]
    return ", ".join([config["method"], *(f"{k} {config[k]}" for k in differ)])


def experiments(runs):
    """Which runs are seeds of what: {(method, label): [steps, ...]}, in the order of the colours."""
    found, configs = {}, [config for config, _ in runs]
    for config, steps in runs:
        found.setdefault((config["method"], label(config, configs)), []).append(steps)
    order = list(colours(method for method, _ in found))
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))


def points(steps, key):
    """Steps and values of one key. Null becomes nan, a gap; evaluations are joined across steps."""
    known = [(s["step"], s[key]) for s in steps if key in s and (s[key] is not None or "accuracy" not in key)]
    return [x for x, _ in known], [math.nan if y is None else y for _, y in known]


def middle(seeds, key):
    """Steps that all seeds have, and the median over the seeds there."""
    known = [dict(zip(*points(steps, key))) for steps in seeds]
    common = [x for x in known[0] if all(x in one for one in known)]
    found = [[one[x] for one in known] for x in common]
    return common, [math.nan if any(map(math.isnan, values)) else median(values) for values in found]


# ---------------------------------------------------------------- drawing


def curves(runs, file):
    """Draws runs, [(config, steps), ...], into one PNG."""
    shown = experiments(runs)
    palette, variants = colours(method for method, _ in shown), {}
    with rc_context(STYLE):
        columns = max(1, min(4, 110 // (12 + max(len(label) for _, label in shown))))  # of the legend
        figure = Figure(figsize=(18, 6 + 0.4 * (len(shown) // columns)), dpi=120, layout="constrained")
        axes = dict(zip(PANELS, figure.subplots(1, 3)))
        for (method, label), seeds in shown.items():
            variants[method] = variants.get(method, -1) + 1
            look = {"color": palette[method], "linestyle": DASHES[variants[method] % len(DASHES)]}
            label += f", {len(seeds)} seeds" if len(seeds) > 1 else ""
            for key, axis in axes.items():
                for steps in seeds if len(seeds) > 1 else []:
                    axis.plot(*points(steps, key), linewidth=0.8, alpha=0.35, **look)
                dots = {"linewidth": 3.5, "marker": "."} if key == "accuracy" else {"linewidth": 2}
                axis.plot(*middle(seeds, key), label=label, **dots, **look)
        handles = axes["entropy"].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=columns, labelcolor="linecolor")
        if len(runs) == 1:
            add_sampling(axes["accuracy"], runs[0][1])
        for key, axis in axes.items():
            dress(axis, key)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)


def add_sampling(axis, steps):
    """What sampling reaches, beside greedy decoding: on held-out problems, and on those of the training."""
    axis.lines[0].set_label("greedy")
    axis.plot(*points(steps, "accuracy_sampled"), "--", linewidth=2.5, color="#0072B2", label="sampled")
    axis.plot(*points(steps, "reward"), linewidth=1, color="#777777", zorder=1.9, label="training reward")
    axis.legend(fontsize=15)


def plain_numbers(axis):
    """Labels such as 0.05 on a logarithmic axis."""
    axis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    axis.set_minor_formatter(NullFormatter())


def dress(axis, key):
    """Title, units and scales of a panel."""
    title, unit = PANELS[key]
    values = [y for line in axis.lines for y in line.get_ydata() if math.isfinite(y)]
    if not values:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    elif key == "entropy" and max(values) > 0:
        low, high = max(min(values), max(values) / 1000), max(values)  # at least a factor of 10, at most 1000
        axis.set(yscale="log", ylim=(min(low, high / 10) / 1.2, high * 1.2))
        plain_numbers(axis.yaxis)
    elif key == "accuracy":
        axis.set_ylim(0, 1.03)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif key == "covariance":
        axis.axhline(0, color="#999999", linewidth=2, zorder=1.6)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set(title=title, xlabel="step", ylabel="problems solved" if axis.get_legend() else unit)


def main():
    parser = argparse.ArgumentParser(description="Curves of runs: entropy, held-out accuracy, covariance.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directories of train.py")
    parser.add_argument("--out", metavar="DIR", help="where curves.png goes (default: the run, or figures/)")
    o = parser.parse_args()
    runs, faults = {}, []
    for folder in o.runs:
        try:
            runs[Path(folder)] = read_run(folder)
        except UserError as error:
            faults.append(error)
    if not runs:
        parser.exit(2, f"plot.py: error: {faults[0]}\n")
    for fault in faults:
        print(f"plot.py: passed over: {fault}", file=sys.stderr)
    file = Path(o.out or (next(iter(runs)) if len(runs) == 1 else "figures")) / "curves.png"
    try:
        curves(list(runs.values()), file)
    except OSError as error:
        parser.exit(2, f"plot.py: error: argument --out: {file.parent}: {error.strerror}\n")
    print(file)


if __name__ == "__main__":
    main()
