"""The law R = -a exp(H) + b (arXiv 2505.22617, section 2), fitted to runs and tested on them.

    python -m lab.law RUN ...                      the law of each run
    python -m lab.law RUN ... --against RUN ...    and: do the runs lie on the baseline's curve or above it?

Each step of a run is one point: H, the policy entropy on its rollouts (`entropy` in metrics.jsonl, the token
mean in nats), and R, the share of these rollouts that were right (`reward`). Both belong to the policy that
entered the step, and the problems are new, so R is an unbiased but noisy estimate of the sampled accuracy.

    fit         least squares over all steps: a, b, and the ceiling b - a, which is R at H = 0
    R^2         of means over 5 consecutive steps, which reduces the noise; the same with R linear in H and in
                log H. Noise of R keeps it below 1 where the law is true
    last        of entropy, R and so on: over the last tenth of the steps; `first`: over the first
    forecast    the law fitted to the first 10, 20, 36 and 50% of the steps predicts R at the end
    above       mean of R - law(H) over the steps whose H occurs in the baseline too, and R at the end minus
                the ceiling, both for the baseline's law

Intervals hold 95%, by bootstrap: over the runs if there are several, over the residuals of a single run.
Written to OUT: law.md, law.png and data/law.json.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

import plot
from data import UserError
from entropy import fit_law

FORMS = {  # R is a straight line in one of these
    "exp(H)": torch.exp,
    "H": torch.clone,
    "log H": lambda H: H.clamp(min=1e-6).log(),
}
EARLY = (0.1, 0.2, 0.36, 0.5)  # parts of a run that predict its end
WIDTH = 5  # consecutive steps of which means are taken, and that the bootstrap keeps together
DRAWS = 1000  # of the bootstrap
ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)  # of a 95% interval


def report(out, name, text, data, figure):
    """Writes OUT/NAME.png, OUT/data/NAME.json (without data: none) and OUT/NAME.md; prints the text."""
    out = Path(out)
    (out / "data").mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=100)
    if data is not None:
        (out / "data" / f"{name}.json").write_text(json.dumps(data) + "\n")
    (out / f"{name}.md").write_text(text)
    print(text)


def markdown(head, rows):
    """A table in markdown, from the names of its columns and the cells of its rows."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell) for cell in row) + " |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the law of one run


def points(steps, run="the run"):
    """(H, R) of the steps: (N,) each, float64. UserError for too few, or a constant H."""
    known = [(s["entropy"], s["reward"]) for s in steps if None not in (s["entropy"], s["reward"])]
    if len(known) < 2 * WIDTH:
        raise UserError(f"{run}: {len(known)} steps have an entropy; a fit needs {2 * WIDTH}")
    H, R = torch.tensor(known, dtype=torch.float64).T
    if H.min() == H.max():
        raise UserError(f"{run}: the entropy never changes, so there is nothing to fit")
    return H, R


def block_means(series):
    """Means over WIDTH consecutive values of each series, in one tensor; incomplete blocks are left out."""
    return torch.cat([x[: len(x) // WIDTH * WIDTH].view(-1, WIDTH).mean(1) for x in series])


def r_squared(runs, form):
    """R^2 of block means if R is a straight line in form(H). runs: [(H, R)]. None where R never changes."""
    x, R = [form(H) for H, _ in runs], [R for _, R in runs]
    design = torch.stack((torch.cat(x), torch.ones(sum(map(len, x)), dtype=torch.float64)), 1)
    slope, intercept = torch.linalg.lstsq(design, torch.cat(R)[:, None]).solution.flatten()
    x, R = block_means(x), block_means(R)
    total = (R - R.mean()).square().sum()
    return (1 - (R - slope * x - intercept).square().sum() / total).item() if total > 0 else None


def pool(runs):
    """The steps of all runs as one (H, R)."""
    return torch.cat([H for H, _ in runs]), torch.cat([R for _, R in runs])


def resample(runs):
    """(a, b) of the law on bootstrap samples: (DRAWS,) each. runs: [(H, R)].

    Several runs are drawn with replacement. Of a single run the residuals are drawn, in blocks of WIDTH
    steps; its H stay, because a few early steps determine the slope.
    """
    rng, samples = random.Random(0), []
    H, R = runs[0]
    predicted = fit_law(H, R).predict(H)
    residuals = R - predicted
    for _ in range(DRAWS):
        if len(runs) > 1:
            law = fit_law(*pool(rng.choices(runs, k=len(runs))))
        else:
            starts = rng.choices(range(len(H) - WIDTH + 1), k=-(-len(H) // WIDTH))
            drawn = torch.cat([residuals[s : s + WIDTH] for s in starts])[: len(H)]
            law = fit_law(H, predicted + drawn)
        samples.append((law.a, law.b))
    return torch.tensor(samples, dtype=torch.float64).T


def fit(runs):
    """The law of all steps of the runs, its intervals, and R^2 of each form, as plain numbers."""
    law, (a, b) = fit_law(*pool(runs)), resample(runs)
    interval = {"a": a.quantile(ENDS), "b": b.quantile(ENDS), "ceiling": (b - a).quantile(ENDS)}
    return {
        "a": law.a, "b": law.b, "ceiling": law.ceiling,
        "interval": {key: ends.tolist() for key, ends in interval.items()},
        "r2": {name: r_squared(runs, form) for name, form in FORMS.items()},
    }  # fmt: skip


def forecast(H, R, part):
    """R in the last tenth of the steps as the law of the first `part` of the steps predicts it, or None."""
    n = round(part * len(H))
    if n < 2 or H[:n].min() == H[:n].max():
        return None
    return fit_law(H[:n], R[:n]).predict(last_tenth(H)).mean().item()


def last_tenth(x):
    """The last tenth of a series, at least one value."""
    return x[-max(1, len(x) // 10) :]


def course(steps):
    """Means over the first and last tenth of entropy, reward and accuracies; how often covariance is > 0."""
    found = {}
    for key in ("entropy", "reward", "accuracy", "accuracy_sampled"):
        known = torch.tensor([s[key] for s in steps if s.get(key) is not None], dtype=torch.float64)
        if len(known):
            found[key] = [last_tenth(known.flip(0)).mean().item(), last_tenth(known).mean().item()]
    known = [s["covariance"] for s in steps if s.get("covariance") is not None]
    return found | {"covariance above 0": sum(c > 0 for c in known) / len(known) if known else None}


# ---------------------------------------------------------------- on the curve of a baseline, or above it?


def above(rows, law, curves):
    """Mean over runs of R + a exp(H) - b, with its interval. The bootstrap draws the runs and the curve; of a
    single run only the curve.

    rows (runs, 2): R and exp(H) of each run, both means over steps, for the law is linear in exp(H).
    """
    rows, (a, b) = torch.tensor(rows, dtype=torch.float64), curves
    chosen = torch.randint(len(rows), (DRAWS, len(rows)), generator=torch.Generator().manual_seed(1))
    R, x = rows[chosen].mean(1).T
    mean = (rows[:, 0] + law.a * rows[:, 1] - law.b).mean().item()
    return {"mean": mean, "interval": (R + a * x - b).quantile(ENDS).tolist(), "runs": len(rows)}


def compare(groups, baseline):
    """How far the runs of each group lie above the law of the baseline. groups: {label: [(H, R)]}.

    "equal H": over the steps whose entropy occurs in the baseline, None if there is none; "end": R at the end
    minus the ceiling.
    """
    H, R = pool(baseline)
    law, curves, low, high = fit_law(H, R), resample(baseline), H.min(), H.max()
    found = {}
    for label, runs in groups.items():
        equal, ends = [], []
        for H, R in runs:
            inside = (H >= low) & (H <= high)
            if inside.any():
                equal.append((R[inside].mean(), H[inside].exp().mean()))
            ends.append((last_tenth(R).mean(), 1.0))  # exp(0) = 1 is the ceiling
        found[label] = {"equal H": above(equal, law, curves) if equal else None,
                        "end": above(ends, law, curves)}  # fmt: skip
    return found


# ---------------------------------------------------------------- tables and the picture


def number(x, ends=None):
    """Two digits, with an interval if there is one; a dash for None."""
    text = "-" if x is None else f"{x:.2f}".replace("-0.00", "0.00")
    return text if ends is None else f"{text} [{ends[0]:.2f}, {ends[1]:.2f}]"


def tables(found):
    """The figures as markdown. found: data/law.json, a dict with "runs", "fits", "forecasts" and "above"."""
    runs, fits, above_rows = [], [], []
    for run, w in found["runs"].items():
        ratio = w["entropy"][1] / found["baseline"] if found["baseline"] else None
        runs.append([run, *(f"{x:.3f}" for x in w["entropy"]), number(ratio),
                     *(" to ".join(f"{x:.1%}" for x in w.get(key, [])) or "-"
                       for key in ("reward", "accuracy", "accuracy_sampled")),
                     number(w["covariance above 0"])])  # fmt: skip
    for run, w in found["fits"].items():
        values = [number(w[key], w["interval"][key]) for key in ("a", "ceiling")]
        fits.append([run, number(w["b"]), *values, *map(number, w["r2"].values())])
    forecasts = [[run, *map(number, values)] for run, values in found["forecasts"].items()]
    for label, w in found["above"].items():
        cells = ["-" if x is None else number(x["mean"], x["interval"]) for x in w.values()]
        above_rows.append([label, w["end"]["runs"], *cells])
    forms, parts = [f"R^2, {name}" for name in FORMS], [f"from {part:.0%}" for part in EARLY]
    text = "Made by lab/law.py: R = -a exp(H) + b, R is the reward; 95% intervals.\n\n"
    text += markdown(["run", "entropy, first", "last", "to the baseline's", "reward", "held-out, greedy",
                      "sampled", "steps with covariance > 0"], runs)  # fmt: skip
    text += "\n" + markdown(["run", "b", "a", "ceiling", *forms], fits)
    text += "\n" + markdown(["R at the end of", *parts, "measured"], forecasts)
    if above_rows:
        head = ["above the law of the baseline", "runs", "at equal H", "end - ceiling"]
        text += "\n" + markdown(head, above_rows)
    return text


def draw(groups, fitted):
    """R against exp(H): pale steps, strong block means, the law of the labels in `fitted`, its 95% band.

    groups: {label: [(H, R)]}; a label begins with the method. A curve covers the entropies of its own points.
    """
    with rc_context(plot.STYLE):
        figure = Figure(figsize=(12, 8), layout="constrained")
        axis, methods = figure.subplots(), [label.split(",")[0] for label in groups]
        for i, (label, runs) in enumerate(groups.items()):
            colour = plot.COLOURS.get(methods[i], "#888888")
            marker = "o^sD"[methods[:i].count(methods[i]) % 4]  # variants of a method differ in it
            H, R = pool(runs)
            x, means = block_means([H.exp() for H, _ in runs]), block_means([R for _, R in runs])
            axis.plot(H.exp(), R, ".", color=colour, alpha=0.12, markersize=4)
            axis.plot(x, means, marker, color=colour, alpha=0.5, markersize=6, label=label)
            if label in fitted:
                law, (a, b) = fit_law(H, R), resample(runs)
                x = torch.linspace(H.min().exp(), H.max().exp(), 100, dtype=torch.float64)
                band = (b[:, None] - a[:, None] * x).quantile(ENDS, 0)
                r2 = number(r_squared(runs, torch.exp))
                name = f"R = {-law.a:.2f} exp(H) + {law.b:.2f}, R^2 {r2}"
                axis.plot(x, law.b - law.a * x, color=colour, linewidth=4, label=name, zorder=3)
                axis.fill_between(x, *band, color=colour, alpha=0.2, linewidth=0)
        axis.set(ylim=(0, 1), xlabel="exp(H), H = policy entropy, nats per token; training goes to the left",
                 ylabel=f"R, means of {WIDTH} steps", title="Accuracy against entropy: the law")  # fmt: skip
        axis.legend()
    return figure


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.law", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of train.py")
    parser.add_argument("--against", nargs="+", default=[], metavar="RUN", help="runs of the baseline")
    parser.add_argument("--out", default="figures", metavar="DIR", help="where to write (default figures)")
    o = parser.parse_args()
    found = {"runs": {}, "baseline": None, "fits": {}, "forecasts": {}, "above": {}}
    groups, baseline = {}, []
    try:
        read = {run: plot.read_run(run) for run in [*o.against, *o.runs]}
        for run, (config, steps) in read.items():
            H, R = points(steps, run)
            found["runs"][run] = course(steps)
            found["fits"][run] = fit([(H, R)])
            found["forecasts"][run] = [*(forecast(H, R, part) for part in EARLY), last_tenth(R).mean().item()]
            label = plot.label(config, [other for other, _ in read.values()])
            if run in o.against:
                label += ", baseline"
                baseline.append((H, R))
            groups.setdefault(label, []).append((H, R))
        for label, runs in groups.items():
            if len(runs) > 1:
                found["fits"][f"all of {label}"] = fit(runs)
        if baseline:
            found["baseline"] = sum(last_tenth(H).mean().item() for H, _ in baseline) / len(baseline)
            found["above"] = compare(groups, baseline)
        fitted = [label for label in groups if label.endswith("baseline") or not baseline]
        report(o.out, "law", tables(found), found, draw(groups, fitted))
    except (UserError, OSError) as error:
        parser.exit(2, f"lab.law: error: {error}\n")


if __name__ == "__main__":
    main()
