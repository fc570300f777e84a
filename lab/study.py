"""Studies: the same training with many seeds and methods, and tables in which every seed is shown.

    python -m lab.study annealing        GRPO, the paper's methods, annealed and constant, and two rivals
    python -m lab.study rivals           more of them; those with a strength have the better of two
    python -m lab.study strengths        the two strengths of each method
    python -m lab.study controls         the acts of KL-Cov and Clip-Cov on other tokens: see lab/controls.py
    python -m lab.study floor            the errors that KL-Cov keeps alive at constant k and beta
    python -m lab.study phenomenon       GRPO, Clip-Cov and KL-Cov at constant strength
    python -m lab.study methods          every method so; `estimators`: every estimator of the advantage
    python -m lab.study shares           starting policies in which the right strategy is rarer or more common
    python -m lab.study NAME --table     no runs: tables and picture again, from data/NAME.json

It writes results/NAME.md, NAME.png and data/NAME.json. A run is a process with one thread; as many run at a
time as there are cores. A study may be stopped at any time; the same command continues it, and does not
repeat the runs in data/NAME.json. Studies with a row in common share its runs, in runs/study/ and data/. A
run is known by the name of its row and its seed: a row whose options change needs another name.

The baseline of a run has the same seed and is the first row with the same starting policy. The window is the
20 steps after the baseline's entropy has fallen to a tenth of its first value. `ratio` compares the entropy
of a run with that of its baseline in the window.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import data
import eval as evaluation
import losses
import plot
from arithmetic import chain_of_thought, correct, leftmost
from lab.controls import CONTROLS
from lab.law import markdown, report
from lab.page import read_samples
from rollout import TINY, load_policy

ROOT = Path(__file__).parents[1]
WINDOW = 20  # steps


@dataclass(frozen=True)
class Row:
    """One row of a table: a training that is repeated with every seed of the study."""

    name: str  # in tables, in pictures and of the run directories
    method: str
    options: str = ""  # further options
    base: str = "tiny"  # the starting policy: tiny/, or a key of BASES
    program: str = "train.py"  # or "-m lab.NAME": a module that adds to losses.METHODS and calls train.main


BASES = {  # other starting policies: the options of lab/warmstart.py that make them
    "share 0.3": "--share 0.3",
    "share 0.05": "--share 0.05",
    "share 0.005": "--share 0.005",
    "share 0.0001": "--share 0.0001 --wander 0.002",
}
COV = ["grpo", "clip_cov", "kl_cov"]  # the baseline and the two methods of the paper
NEWER = ["cw_grpo", "opefo", "adaptive_entropy", "entrocraft"]
UNBOUND = "--kl-cov-low 0"  # KL-Cov as published takes the highest covariances, however low they are
K = f"--kl-cov-ratio 0.01 {UNBOUND}"
FIXED = f"--steps 200 --anneal 0 {K}"  # of a constant strength
OFTEN = "--eval-every 1 --eval-limit 8"  # so that samples.jsonl has completions of every step
ANNEALED = "--steps 800 --anneal 640 --eval-every 20"  # as by default
CONSTANT = "--steps 800 --anneal 0 --eval-every 20"
OTHER = {  # a second strength: the published one, or another where the default is the published one
    "clip_cov": ("published", "--clip-cov-ratio 0.0002 --cov-high 5"),
    "kl_cov": ("published", f"--kl-cov-ratio 0.002 --kl-cov-beta 1 {UNBOUND}"),
    "entropy_bonus": ("published", "--entropy-coef 0.005"),
    "kl_ref": ("beta 0.01", "--kl-ref-beta 0.01"),
    "clip_higher": ("to 1.5", "--clip-high 0.5"),
}
FREE = "--clip-low 1 --clip-high 1"  # Clip-Cov's range, in effect no clip


def annealed(methods):
    """Rows of methods as by default."""
    return [Row(f"{method}, annealed", method, ANNEALED) for method in methods]


def other(row):
    """The row with the other strength of its method."""
    name, options = OTHER[row.method]
    return replace(row, name=f"{row.name}, {name}", options=f"{row.options} {options}")


def controls(method, options):
    """Rows of the controls of a method."""
    names = [name for name in CONTROLS if name.startswith(method)]
    return [Row(name, name, f"{ANNEALED} {options}", program="-m lab.controls") for name in names]


NO_BOUND = Row("kl_cov, no bound", "kl_cov", f"{ANNEALED} {UNBOUND}")
ON_POLICY = Row("grpo, on-policy", "grpo", f"{ANNEALED} --mini-batch 64")  # one update a rollout batch
HELD = [Row(f"{m}, constant", m, CONSTANT) for m in ("clip_cov", "kl_cov", "entropy_bonus")]
TUNED = [*annealed(OTHER), *HELD]
BETTER = [*annealed(["clip_cov", "kl_cov", "entropy_bonus", "kl_ref"]), other(*annealed(["clip_higher"]))]
STUDIES = {  # name: (seeds; rows, of which the first is the baseline)
    "annealing": (range(61, 77), [*annealed([*COV, "entropy_bonus"]), *HELD, ON_POLICY, NO_BOUND]),
    "controls": (range(61, 69), [*annealed(["grpo", "clip_cov"]), *controls("clip_cov", FREE),
                                 NO_BOUND, *controls("kl_cov", UNBOUND), *annealed(["kl_cov"])]),
    "strengths": (range(301, 304), [*annealed(["grpo"]), *(x for row in TUNED for x in (row, other(row)))]),
    "rivals": (range(61, 69), [*annealed(["grpo"]), ON_POLICY, *BETTER, *HELD, *annealed(NEWER)]),
    "floor": ([81], [
        Row(f"k {k}, beta {b}", "kl_cov", f"{FIXED} {OFTEN} --kl-cov-ratio {k} --kl-cov-beta {b}")
        for k, b in ((0.002, 1), (0.005, 1), (0.01, 1), (0.005, 3), (0.01, 3), (0.02, 3), (0.02, 6))
    ]),
    "phenomenon": (range(51, 59), [*(Row(m, m, FIXED) for m in COV),
                                   Row("grpo, clip 1.0", "grpo", f"{FIXED} {FREE}")]),
    "methods": (range(51, 56), [Row(m, m, FIXED) for m in losses.METHODS if m not in NEWER]),
    "estimators": (range(51, 56), [Row(e, "grpo", f"{FIXED} --advantage {e}") for e in losses.ESTIMATORS]),
    "shares": (range(51, 56), [Row(f"{m}, {base}", m, f"--steps 100 --anneal 0 {K}", base)
                               for base in ("tiny", *BASES) for m in COV]),
}  # fmt: skip


# ---------------------------------------------------------------- runs


def place(name):
    """Where a run or a starting policy is kept."""
    return ROOT / "runs" / "study" / name.replace(", ", "-").replace(" ", "")


def folder_of(base):
    """The folder of a starting policy."""
    return place(base) if base in BASES else Path(TINY)


def process(*command):
    """Runs Python with one thread and prints the last line of its output, or of its error."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    text = done.stdout if done.returncode == 0 else done.stderr
    print((text.strip() or f"{command[1]} printed nothing").splitlines()[-1], flush=True)


def make_base(base):
    """Makes a starting policy, unless it is there."""
    if not folder_of(base).exists():
        new = place(f"{base} new")
        process("-m", "lab.warmstart", *BASES[base].split(), "--out", new)
        new.rename(place(base))


def run(row, seed):
    """One run, or what is missing of it."""
    out = place(f"{row.name}-s{seed}")
    if not (out / "final.json").exists():
        again = "--resume" if (out / "checkpoint").is_dir() else "--overwrite"
        process(*row.program.split(), "--method", row.method, *row.options.split(), "--device", "cpu",
                "--model", folder_of(row.base), "--seed", seed, "--out", out, again)  # fmt: skip


# ---------------------------------------------------------------- figures


def follows(prompt, response, strategy):
    """Whether every line of a chain of thought joins the pair that the strategy chooses, slips aside."""
    line = prompt.rstrip("=")
    for new in response.split("=")[:-1]:
        i = 2 * strategy(line[1::2])
        if len(new) != len(line) - 2 or new[:i] != line[:i] or new[i + 1 :] != line[i + 3 :]:
            return False
        line = new
    return len(line) == 3  # one pair is left for the box


def starting_policy(folder):
    """Accuracies of a starting policy on the held-out problems, and its share of the right strategy.

    The share is that of the sampled chains that respect precedence, on problems where the habit does not.
    """
    policy, problems = load_policy(str(folder)), data.load_problems("arithmetic_heldout")
    greedy = evaluation.evaluate(*policy, problems, 1, 0.0, 40, batch=512)
    sampled = evaluation.evaluate(*policy, problems, 32, 1.0, 40, batch=2048)
    followed = []
    for record in sampled["completions"]:
        prompt = record["prompt"]
        if not follows(prompt, chain_of_thought(prompt, leftmost), correct):
            followed += [follows(prompt, response, correct) for response in record["responses"]]
    return {"share": fmean(followed), "greedy": greedy["accuracy"], "sampled": sampled["accuracy"],
            "pass@32": sampled["pass"]["32"]}  # fmt: skip


def top_fifth(samples):
    """The share of all entropy that the fifth of the tokens with the highest entropy holds (2506.01939)."""
    entropy = sorted((H for line in samples for H in line["entropy"]), reverse=True)
    return sum(entropy[: len(entropy) // 5]) / sum(entropy)


def rare_wrong(samples):
    """(share, mean |A|) of rare tokens of wrong answers: Cov > 0 and A < 0, so log p is below its mean."""
    pairs = [pair for line in samples for pair in zip(line["covariance"], line["advantage"])]
    found = [-A for cov, A in pairs if cov > 0 and A < 0]
    return len(found) / len(pairs), fmean(found) if found else None


def measure(run_dir, baseline=None):
    """The figures of one run. baseline: those of the baseline with the same seed; None: the run is one."""
    steps, final = plot.read_run(run_dir)[1], json.loads((run_dir / "final.json").read_text())
    entropy, samples = [line["entropy"] for line in steps], read_samples(run_dir)
    fell = next((step for step, H in enumerate(entropy) if H <= entropy[0] / 10), None)  # to a tenth
    figures = {"first": entropy[0], "fell": fell, "window": None, "ratio": None,
               "last": fmean(entropy[-10:]), "accuracy": final["accuracy"],
               "top fifth": top_fifth([line for line in samples if line["step"] <= WINDOW]),
               "sampled": final["accuracy_sampled"], "pass@32": final["pass_at"]["32"]}  # fmt: skip
    half = len(steps) // 2
    figures["rare wrong"], figures["|A| there"] = rare_wrong([s for s in samples if s["step"] > half])
    chosen = [s["advantage"][i] > 0 for s in samples if s["step"] <= half for i in s["selected"]]
    figures["acted on"] = fmean(line["selected"] or 0 for line in steps[:half])
    figures["of right answers"] = fmean(chosen) if chosen else None
    baseline = baseline or figures
    if (start := baseline["fell"]) is not None:
        figures["window"] = fmean(entropy[start : start + WINDOW])
        figures["ratio"] = figures["window"] / baseline["window"]
    means = [(line["step"], fmean(entropy[i : i + 5])) for i, line in enumerate(steps) if i % 5 == 0]
    figures["curve of entropy"] = [[step, float(f"{H:.4g}")] for step, H in means]
    figures["curve of accuracy"] = [[x["step"], x["accuracy"]] for x in steps if "accuracy" in x]
    return figures


def before(out, study, seeds):
    """data/STUDY.json as it was before, with what the other studies in `out` know of these seeds."""
    files = {name: Path(out) / "data" / f"{name}.json" for name in STUDIES}
    known = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    own = known.pop(study, {})
    others = [row | {"runs": [run for run in row["runs"] if run["seed"] in seeds]}
              for other in known.values() for row in other["rows"]]  # fmt: skip
    return own | {"rows": others + own.get("rows", [])}  # its own come last, and count


def kept(old, row):
    """{seed: figures} of the runs of a row that were known before."""
    same = lambda other: all(other[key] == getattr(row, key) for key in ("name", "method", "options", "base"))
    return {run["seed"]: run for other in old.get("rows", []) if same(other) for run in other["runs"]}


def collect(study, rows, seeds, old):
    """data/STUDY.json: the starting policies, and every row with the figures of its complete runs.

    old: what was known `before`, of which the runs are kept that are not on this machine.
    """
    bases, baselines = dict(old.get("bases", {})), {}
    for row in rows:
        if row.base not in bases:
            bases[row.base] = starting_policy(folder_of(row.base))
    found = {"study": study, "bases": bases, "rows": []}
    for row in rows:
        runs = kept(old, row)
        for seed in seeds:
            out = place(f"{row.name}-s{seed}")
            if (out / "final.json").exists():
                runs[seed] = {"seed": seed} | measure(out, baselines.get(row.base, {}).get(seed))
        baselines.setdefault(row.base, runs)
        if runs:
            found["rows"].append(asdict(row) | {"runs": [runs[seed] for seed in sorted(runs)]})
    return found


# ---------------------------------------------------------------- tables and pictures


def known(row, key):
    """The known values of one figure over the runs of a row."""
    return [run[key] for run in row["runs"] if run.get(key) is not None]


def shown(row):
    """The name of a row in tables and pictures."""
    return row["name"].replace(", annealed", "")


def mean(row, key, form):
    """The mean of a figure over the runs, or a dash."""
    values = known(row, key)
    return form.format(fmean(values)) if values else "-"


def seeds_of(row):
    """The seeds of a row: the first and the last, or all if some between them are missing."""
    seeds = [run["seed"] for run in row["runs"]]
    whole = seeds[-1] - seeds[0] == len(seeds) - 1 > 0
    return f"{seeds[0]} to {seeds[-1]}" if whole else " ".join(map(str, seeds))


def gain(row, baseline):
    """Mean gain in accuracy over the baseline of the same seed, in points; from five seeds on with a 95%
    bootstrap interval."""
    before = {run["seed"]: run["accuracy"] for run in baseline["runs"]}
    gains = [100 * (run["accuracy"] - before[run["seed"]]) for run in row["runs"] if run["seed"] in before]
    if row is baseline or not gains:
        return "-"
    if len(gains) < 5:
        return f"{fmean(gains):+.0f}"
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(gains, k=len(gains))) for _ in range(4000))
    return f"{fmean(gains):+.0f} [{means[99]:+.0f}, {means[-100]:+.0f}]"


def known_columns(head, rows):
    """A table in markdown, without the columns of which nothing is known."""
    head, *rows = zip(*(column for column in zip(head, *rows) if set(column[1:]) != {"-"}))
    return markdown(head, rows)


def tables(found):
    """The starting policies, the accuracies and the entropies, as markdown."""
    bases, accuracies, entropies = [], [], []
    kl_cov = next((row for row in found["rows"] if shown(row) == "kl_cov"), {"runs": []})
    for base, policy in found["bases"].items():
        bases.append([base, *(f"{x:.2%}" for x in policy.values())])
    for row in found["rows"]:
        greedy, fell, runs = known(row, "accuracy"), known(row, "fell"), row["runs"]
        every = " ".join(f"{100 * x:.0f}" for x in greedy)
        baseline = next(other for other in found["rows"] if other["base"] == row["base"])
        accuracies.append([shown(row), seeds_of(row), every, f"{fmean(greedy):.1%}", f"{median(greedy):.1%}",
                           gain(row, baseline), gain(kl_cov, row), mean(row, "sampled", "{:.1%}"),
                           mean(row, "pass@32", "{:.1%}")])  # fmt: skip
        when = f"{len(fell)} of {len(runs)}" + (f", step {median(fell) + 1:.0f}" if fell else "")
        entropies.append([shown(row), *(mean(row, key, "{:.3f}") for key in ("first", "window", "last")),
                          mean(row, "ratio", "{:.1f}"), when, mean(row, "top fifth", "{:.0%}"),
                          mean(row, "rare wrong", "{:.2%}"), mean(row, "|A| there", "{:.2f}")])  # fmt: skip
    text = [
        f"Made by `python -m lab.study {found['study']}`. Accuracies are on held-out problems.\n",
        markdown(["starting policy", "right strategy", "greedy", "sampled", "pass@32"], bases),
        known_columns(["run", "seeds", "greedy, each seed, %", "mean", "median",
                       "above the first row, points [95%]", "KL-Cov above it", "sampled", "pass@32"],
                      accuracies),
        known_columns(["entropy of", "first step", "window", "last 10", "ratio", "fell to a tenth (median)",
                       "in the top fifth", "rare and wrong, late", "their mean absolute A"], entropies),
    ]  # fmt: skip
    return "\n".join(text + compare_controls(found["rows"]))


def compare_controls(rows):
    """A table of methods with their controls and variants, in a list that is empty if there are none."""
    varies = lambda row, other: row["base"] == other["base"] and (
        row["method"] == other["method"] or row["method"].startswith(other["method"] + "_"))  # fmt: skip
    table = []
    for row in rows:
        method = next(other for other in rows if varies(row, other))
        if method is not rows[0] and (method is not row or sum(varies(other, row) for other in rows) > 1):
            table.append([shown(row), mean(row, "acted on", "{:.2%}"),
                          mean(row, "of right answers", "{:.0%}"), gain(row, method)])  # fmt: skip
    head = ["first half", "tokens acted on", "of right answers", "above its method, points [95%]"]
    return [markdown(head, table)] if table else []


def look_of(row):
    """The colour of the paper's method that a row is or varies, hollow if it varies one; grey for others."""
    own = next((method for method in COV if shown(row).startswith(method)), None)
    whole = own in (shown(row), None)
    return {"color": plot.COLOURS.get(own, "#999999"), "fillstyle": "full" if whole else "none"}


def accuracy_axis(axis, title, label, percent=None):
    """Title and label, and percent on the vertical axis or on the given one."""
    axis.set(title=title, ylabel=label, ylim=(0, 1.03))
    (percent or axis.yaxis).set_major_formatter(PercentFormatter(1))


def draw_curves(found):
    """Entropy and accuracy over the steps: each run thin, the median thick; the first row of each method."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = {row["method"]: row for row in reversed(found["rows"]) if row["method"] in COV}
    for row in reversed(first.values()):
        for axis, key in ((left, "entropy"), (right, "accuracy")):
            curves = [run[f"curve of {key}"] for run in row["runs"]]
            for curve in curves:
                axis.plot(*zip(*curve), **look_of(row), alpha=0.25)
            steps = [step for step, _ in curves[0]]
            middle = [median(value for _, value in points) for points in zip(*curves)]
            axis.plot(steps, middle, **look_of(row), linewidth=4, label=shown(row))
    start = found["bases"]["tiny"]
    for value, text in ((start["greedy"], "the habit"), (start["pass@32"], "pass@32 at the start")):
        right.axhline(value, color="#777777", linestyle="--", linewidth=2)
        right.text(steps[-1], value - 0.025, text, color="#555555", fontsize=14, ha="right")
    left.set(title="Policy entropy", ylabel="nats per token", yscale="log", xlabel="step")
    plot.plain_numbers(left.yaxis)
    left.legend(title="all runs and their median", frameon=True, framealpha=0.8)
    accuracy_axis(right, "Held-out accuracy", "greedy")
    right.set(xlabel="step", ylim=(0.3, 1.03))
    return figure


def draw_final(found):
    """Final accuracies, a dot per run and a bar for the median; median accuracy against median entropy."""
    figure = Figure(figsize=(16, 3 + 0.55 * len(found["rows"])), layout="constrained")
    left, right = figure.subplots(1, 2)
    start, names = found["bases"]["tiny"]["greedy"], []
    low = min(x for row in found["rows"] for x in [start, *known(row, "accuracy")]) - 0.04
    for i, row in enumerate(found["rows"], 1):
        greedy, look = known(row, "accuracy"), look_of(row)
        names.append(f"{shown(row)}  {i}")
        left.plot(greedy, [i] * len(greedy), "o", alpha=0.6, markeredgewidth=2, **look)
        left.plot([median(greedy)] * 2, [i - 0.3, i + 0.3], linewidth=4, **look)
        if entropy := known(row, "window"):
            at = median(entropy), median(greedy)
            right.plot(*at, "o", markersize=14, markeredgewidth=2, **look)
            right.annotate(i, at, (9, 4), textcoords="offset points", fontsize=15)
    left.axvline(start, color="#777777", linestyle="--", linewidth=2)
    left.set_yticks(range(1, len(names) + 1), names)
    accuracy_axis(left, "Accuracy of every run", "", left.xaxis)
    accuracy_axis(right, "Entropy and accuracy", "median accuracy, greedy")
    left.set(xlabel="greedy, on held-out problems; dashed: the start")
    left.set(xlim=(low, 1.03), ylim=(len(names) + 0.5, 0.5))
    right.set(xscale="log", xlabel="median entropy in the window, nats", ylim=(low, 1.03))
    plot.plain_numbers(right.xaxis)
    return figure


def draw_floor(found):
    """The share of rare tokens of wrong answers on the plateau against k beta / |A|: one dot a run."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    axis = figure.subplots()
    for row in found["rows"]:
        words = row["options"].split()
        last = dict(zip(words, words[1:]))  # of an option that is given twice
        k, beta = (float(last[f"--kl-cov-{x}"]) for x in ("ratio", "beta"))
        points = [(k * beta / run["|A| there"], run["rare wrong"]) for run in row["runs"]]
        axis.plot(*zip(*points), "o", markersize=12, color=plot.COLOURS["kl_cov"])
        x, y = points[0]
        beside = (12, -5) if y < x else (-5, 12)  # apart from each other
        axis.annotate(row["name"], (x, y), beside, textcoords="offset points", fontsize=14)
    axis.axline((0.01, 0.01), slope=1, color="#777777", linestyle="--", linewidth=2)
    axis.set(xscale="log", yscale="log", title="KL-Cov keeps a share of errors alive",
             xlabel="k beta / |A| (dashed: equal)", ylabel="share of rare tokens of wrong answers")
    for side in (axis.xaxis, axis.yaxis):
        plot.plain_numbers(side)
    return figure


def draw_shares(found):
    """Final accuracy against the share of the right strategy in the starting policy."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axis = figure.subplots()
    for i, method in enumerate(COV):
        means = []
        for row in found["rows"]:
            if row["method"] == method:
                share = found["bases"][row["base"]]["share"] * 1.06 ** (i - 1)  # side by side
                greedy = known(row, "accuracy")
                axis.plot([share] * len(greedy), greedy, "o", color=plot.COLOURS[method], alpha=0.5)
                means.append((share, fmean(greedy)))
        axis.plot(*zip(*sorted(means)), color=plot.COLOURS[method], linewidth=4, label=method)
    start = sorted((policy["share"], policy["greedy"]) for policy in found["bases"].values())
    axis.plot(*zip(*start), color="#888888", linestyle=":", linewidth=3, label="before training")
    accuracy_axis(axis, "When does collapse cost accuracy?", "held-out accuracy, greedy; lines: means")
    axis.set(xscale="log", xlabel="share of the right strategy in the starting policy")
    axis.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axis.legend()
    return figure


PICTURES = {"phenomenon": draw_curves, "annealing": draw_curves, "shares": draw_shares,
            "floor": draw_floor}  # else draw_final


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the study's own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: cores)")
    parser.add_argument("--table", action="store_true", help="no runs: from data/NAME.json")
    parser.add_argument("--out", default=ROOT / "results", help="where to write (default results)")
    o = parser.parse_args()
    seeds, rows = STUDIES[o.study]
    seeds = o.seeds or seeds
    if o.table:
        found = json.loads((Path(o.out) / "data" / f"{o.study}.json").read_text())
    else:
        old = before(o.out, o.study, seeds)
        jobs = [(row, seed) for seed in seeds for row in rows if seed not in kept(old, row)]
        with ThreadPoolExecutor(o.jobs) as pool:
            list(pool.map(make_base, {row.base for row, _ in jobs if row.base in BASES}))
            list(pool.map(lambda job: run(*job), jobs))
        found = collect(o.study, rows, seeds, old)
    with rc_context(plot.STYLE | {"lines.markersize": 10}):
        report(o.out, o.study, tables(found), found, PICTURES.get(o.study, draw_final)(found))


if __name__ == "__main__":
    main()
