"""What the starting policy decides: how rare the right strategy may be before collapse costs accuracy, and what size does to the law.

    python study.py shares      accuracy after training, against the share of the right strategy before it
    python study.py sizes       a and b of R = -a exp(H) + b, fitted to GRPO on policies of 30,000 to 1,200,000 parameters

Both are studies like the others (study.py); this file is what is made of their runs. A share is measured, not taken from the
options of warmstart.py: of the chains of thought that the policy samples, those that respect precedence from the first line to
the last, slips aside, on problems in which the habit goes another way.
"""

from statistics import fmean

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import data
import eval as evaluation
from lab import law
import plot
from arithmetic import correct, leftmost
from entropy import fit_law
from rollout import load_policy

METHODS = ["grpo", "clip_cov", "kl_cov"]
EMBEDDED = "embedded"  # the base of rows without a comma: tiny/


def path_of(prompt, strategy):
    """The pairs that a strategy joins: indices among the operators that are left, line by line."""
    operators, path = list(prompt[1:-1:2]), []
    while operators:
        path.append(strategy(operators))
        del operators[path[-1]]
    return path


def follows(prompt, response, path):
    """Whether each line of a chain joins the pair that `path` says, whatever the digit that it gets for it.

    Of the last line only the box is seen, and there only one pair is left to join.
    """
    line = prompt.rstrip("=")
    lines = response.split("=")
    if len(lines) != len(path):
        return False
    for i, new in zip(path, lines[:-1]):
        if len(new) != len(line) - 2 or new[: 2 * i] != line[: 2 * i] or new[2 * i + 1 :] != line[2 * i + 3 :]:
            return False
        line = new
    return True


def describe(folder, samples=32):
    """A starting policy: parameters, share of the right strategy, greedy and sampled accuracy, pass@samples."""
    model, tokenizer, eos_ids = load_policy(str(folder))
    problems = data.load_problems("arithmetic_heldout")
    figures = lambda n, temperature: evaluation.evaluate(model, tokenizer, eos_ids, problems, n, temperature, 40, batch=4096)
    greedy, sampled = figures(1, 0.0), figures(samples, 1.0)
    paths = [(r, path_of(r["prompt"], correct)) for r in sampled["completions"]]
    forks = [(r, path) for r, path in paths if path != path_of(r["prompt"], leftmost)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "share": fmean(follows(r["prompt"], response, path) for r, path in forks for response in r["responses"]),
        "greedy": greedy["accuracy"], "sampled": sampled["accuracy"], "pass": sampled["pass"][str(samples)],
    }  # fmt: skip


def base_of(row):
    """The starting policy of a row: what stands behind the comma, if anything. Not all that may stand there is one."""
    return row.partition(", ")[2] or EMBEDDED


# ---------------------------------------------------------------- when does collapse cost accuracy?


def accuracies(results, runs, last):
    """Greedy accuracy of each run after `last` steps: at the end of those that end there, else by the evaluation that came then."""
    return [r["accuracy"] if len(steps) == last else steps[last]["accuracy"] for r, steps in zip(results, runs)]


def shares(results, runs, bases, out):
    """Accuracy of every run against the share of its starting policy: shares.png, and a table as text.

    results: {row: [study.measure(...)]}; runs: {row: [steps, ...]}; bases: {name: describe(...)}; out: where the picture goes.
    Runs that are longer than the shortest are looked at where that one ends.
    """
    last = min(len(steps) for group in runs.values() for steps in group)
    found = {row: accuracies(results[row], runs[row], last) for row in runs}
    lines = [f"Accuracies after {last} steps.", "", "| starting policy | share | greedy | sampled | pass@32 | method | greedy accuracy of each seed, % | mean |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for base in sorted(bases, key=lambda base: -bases[base]["share"]):
        b = bases[base]
        for row in sorted((row for row in found if base_of(row) == base), key=lambda row: METHODS.index(row.partition(", ")[0])):
            seeds = " ".join(f"{100 * x:.0f}" for x in found[row])
            lines.append(f"| {base} | {b['share']:.2%} | {b['greedy']:.1%} | {b['sampled']:.1%} | {b['pass']:.1%} | {row.partition(', ')[0]} "
                         f"| {seeds} | {fmean(found[row]):.1%} |")  # fmt: skip
    with rc_context(plot.STYLE):
        figure = Figure(figsize=(13, 8), layout="constrained")
        axis = figure.add_subplot()
        for i, method in enumerate(METHODS):
            known = sorted((bases[base_of(row)]["share"], ys) for row, ys in found.items() if row.partition(", ")[0] == method)
            aside = 1.06 ** (i - 1)  # side by side, or they would hide each other
            axis.plot([x * aside for x, _ in known], [fmean(y) for _, y in known], color=plot.COLOURS[method], linewidth=4, label=method)
            for x, ys in known:
                axis.plot([x * aside] * len(ys), ys, "o", color=plot.COLOURS[method], alpha=0.5, markersize=10)
        axis.plot(*zip(*sorted((b["share"], b["greedy"]) for b in bases.values())), color="#888888", linestyle=":", linewidth=3, label="before training")
        axis.set(xscale="log", ylim=(0, 1.03), xlabel="share of the right strategy in the starting policy, logarithmic", ylabel=f"held-out accuracy after {last} steps, greedy",
                 title="When does collapse cost accuracy?")  # fmt: skip
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.2%}" if x < 0.01 else f"{x:.0%}")
        axis.legend()
        figure.savefig(out / "shares.png", dpi=100)
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- what does size do to the law?


def sizes(runs, bases, out, width=5):
    """The law fitted to the pooled steps of each size: sizes.png, and a table as text. Each run is fitted by itself, too.

    Arguments as above. All runs are cut to the shortest: a and b depend on how long one looks.
    """
    runs = {base_of(row): group for row, group in runs.items()}
    last = min(len(steps) for group in runs.values() for steps in group)
    lines = ["", "", "| parameters | share | seeds | entropy, first step | last | a | b | ceiling -a + b | R^2 of means over 5 steps | ceiling of each seed |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    shown, laws = [], []
    order = sorted(runs, key=lambda base: bases[base]["parameters"])
    for base, colour in zip(order, ("#E69F00", "#000000", "#0072B2", "#D55E00")):
        cut = [steps[:last] for steps in runs[base]]
        pairs = [law.points(steps) for steps in cut]
        H, R = (torch.cat(x) for x in zip(*pairs))
        fit, curves = fit_law(H, R), law.resample_runs(pairs)
        a, b = curves.T
        span = lambda x, xs: "{:.3f} [{:.2f}, {:.2f}]".format(x, *law.interval(xs))
        r2 = law.quality(R, fit.predict(H), width)["r2"]
        ceilings = " ".join(f"{fit_law(*pair).ceiling:.2f}" for pair in pairs)
        ends = [fmean(steps[i]["entropy"] for steps in cut) for i in (0, -1)]
        lines.append(f"| {bases[base]['parameters']:,} | {bases[base]['share']:.2%} | {len(pairs)} | {ends[0]:.3f} | {ends[1]:.3f} | {span(fit.a, a)} | {span(fit.b, b)} "
                     f"| {span(fit.ceiling, b - a)} | {r2:.2f} | {ceilings} |")  # fmt: skip
        label = f"{bases[base]['parameters']:,} parameters: a {fit.a:.2f}, b {fit.b:.2f}"
        shown.append((None, colour, cut))
        laws.append((label, colour, fit.a, fit.b, curves))
    law.draw(out / "sizes.png", shown, laws, width)
    return "\n".join(lines) + "\n"
