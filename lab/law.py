"""The law: accuracy is bought with entropy, R = -a exp(H) + b (arXiv 2505.22617, section 2). Fitted to runs, foretold, and doubted.

    python entropy.py RUN ...                          each run by itself: law.json and law.png into it
    python entropy.py RUN ... --against RUN ...        do the runs lie on the curve that is fitted to the others? Into figures/

Each step of a run is a point: H, the policy's entropy on the rollouts of the step, and R, the share of these that were right.
Both belong to the policy that entered the step, and the problems are new ones, so R is an unbiased estimate of the sampled
accuracy; but with 64 problems a step its noise is some .05, and caps the R^2 of even a perfect law. So:

    the fit         least squares through all steps: smoothing would not make it better
    its quality     R^2 and RMSE of means over --smooth consecutive steps, of R and of what the fit says alike. Every form here
                    is linear in some f(H), so the mean of its predictions is its prediction at the mean of f(H)
    the noise       from the steps themselves: R_t - (R_{t-1} + R_{t+1}) / 2 has variance 3/2 sigma^2 where the truth is straight
                    over three steps (Gasser, Sroka and Jennen-Steinmetz 1986). `noise allows` is the R^2 that a perfect law would have
    intervals       95%, bootstrap: of one run over its residuals, in blocks of --smooth consecutive steps; of several over the runs
    the doubt       the same points with R linear in H, and in log H. Where H is below a third or so, exp(H) is nearly a
                    straight line, and no such data tell the first two apart: `bend` is the greatest distance, in units of the
                    range, between exp(H) and the line through its ends
    the forecast    the fit to the first 10, 20, 36 and 50% of the steps, applied to the entropies of the rest

Entropy here is the token mean at temperature 1 (`entropy` in metrics.jsonl); a and b depend on that choice.
"""

import argparse
import json
import math
from pathlib import Path

import torch

import plot
from entropy import fit_law
from data import UserError

FORMS = {"exp H": torch.exp, "H": lambda H: H, "log H": torch.log}  # R is a straight line in one of these; the first is the law
EARLY = (0.1, 0.2, 0.36, 0.5)


def points(steps, key="reward"):
    """(H, R) of the steps that have both, in float64."""
    known = [(s["entropy"], s[key]) for s in steps if s.get("entropy") is not None and s.get(key) is not None]
    if len(known) < 8:
        raise UserError(f"has {len(known)} steps with entropy and {key}; a law needs 8 or more")
    H, R = torch.tensor(known, dtype=torch.float64).T
    if H.min() == H.max():
        raise UserError("its entropy never changes; there is nothing to fit")
    return H, R


def line(x, R):
    """(slope, intercept) of the least-squares line of R over x."""
    dx = x - x.mean()
    slope = (dx * R).sum() / (dx * dx).sum()
    return slope.item(), (R.mean() - slope * x.mean()).item()


def blocks(x, width):
    """Means over `width` consecutive values; what is left at the end, fewer than that, is left out."""
    width = min(width, len(x))
    return x[: len(x) // width * width].view(-1, width).mean(1)


def quality(R, predicted, width):
    """R^2 and RMSE of the means over `width` consecutive points."""
    R, predicted = blocks(R, width), blocks(predicted, width)
    error, total = (R - predicted).square(), (R - R.mean()).square()
    return {"r2": (1 - error.sum() / total.sum()).item() if total.sum() > 0 else None, "rmse": error.mean().sqrt().item()}


def noise(R):
    """Standard deviation of the noise of a series whose truth is smooth, from its second differences."""
    return ((R[1:-1] - (R[:-2] + R[2:]) / 2).square().mean() / 1.5).sqrt().item()


def noise_allows(R, width):
    """The R^2 of a perfect law on means over `width` points: 1 - sigma^2 / (width Var), not below 0; None where R never changes."""
    variance = blocks(R, width).var(correction=0).item()
    return max(0.0, 1 - noise(R) ** 2 / width / variance) if variance > 0 else None


def resample_steps(H, R, width, count=2000, seed=0):
    """a and b of `count` refits of the law to one run: its fit plus residuals, drawn in blocks of consecutive steps: (count, 2)."""
    law, n, width = fit_law(H, R), len(H), min(width, len(H))
    fitted = law.predict(H)
    starts = torch.randint(n - width + 1, (count, -(-n // width)), generator=torch.Generator().manual_seed(seed))
    drawn = (starts[:, :, None] + torch.arange(width)).view(count, -1)[:, :n]
    new, dx = fitted + (R - fitted)[drawn], H.exp() - H.exp().mean()
    slope = new @ dx / (dx @ dx)
    return torch.stack((-slope, new.mean(1) - slope * H.exp().mean()), 1)


def resample_runs(runs, count=2000, seed=0):
    """a and b of `count` fits of the law to as many runs as there are, drawn with replacement: (count, 2). runs: [(H, R), ...]."""
    moments = torch.stack([torch.stack((torch.ones_like(x), x, R, x * x, x * R)).sum(1) for x, R in ((H.exp(), R) for H, R in runs)])
    chosen = torch.randint(len(runs), (count, len(runs)), generator=torch.Generator().manual_seed(seed))
    n, x, R, xx, xR = moments[chosen].sum(1).T
    slope = (n * xR - x * R) / (n * xx - x * x)
    return torch.stack((-slope, (R - slope * x) / n), 1)


def interval(values):
    """The middle 95%."""
    return values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0).tolist()


def forecast(H, R, fraction, width):
    """Each form, fitted to the first part of the steps, against the rest: RMSE there, and the last tenth foretold."""
    n, last = max(2, round(fraction * len(H))), max(1, len(H) // 10)
    out = {"steps": n, "end": R[-last:].mean().item()}
    for name, f in FORMS.items():
        x = f(H)
        if not x.isfinite().all() or x[:n].min() == x[:n].max():
            out[name] = None
            continue
        slope, intercept = line(x[:n], R[:n])
        predicted = slope * x + intercept
        out[name] = {"rmse": quality(R[n:], predicted[n:], width)["rmse"], "end": predicted[-last:].mean().item()}
    return out


def analyse(steps, key="reward", width=5):
    """law.json: everything that the tables say of one run."""
    H, R = points(steps, key)
    law, x = fit_law(H, R), H.exp()
    samples = resample_steps(H, R, width)
    chord = x.min() + (x.max() - x.min()) * (H - H.min()) / (H.max() - H.min())
    forms = {}
    for name, f in FORMS.items():
        finite = f(H).isfinite().all()  # log 0 is not
        slope, intercept = line(f(H), R) if finite else (None, None)
        forms[name] = {"slope": slope, "intercept": intercept} | quality(R, slope * f(H) + intercept, width) if finite else None
    return {
        "of": key, "smooth": width, "steps": len(H), "entropy": [H[0].item(), H[-1].item()],
        "a": law.a, "b": law.b, "ceiling": law.ceiling, "r2": forms["exp H"]["r2"], "rmse": forms["exp H"]["rmse"],
        "r2_of_steps": law.r2, "rmse_of_steps": law.rmse,
        "interval": {"a": interval(samples[:, 0]), "b": interval(samples[:, 1]), "ceiling": interval(samples[:, 1] - samples[:, 0])},
        "noise": noise(R), "noise_allows": noise_allows(R, width), "bend": ((x - chord).abs().max() / (x.max() - x.min())).item(),
        "forms": forms, "forecast": {f"{fraction:.0%}": forecast(H, R, fraction, width) for fraction in EARLY},
    }  # fmt: skip


def tables(laws):
    """Three tables as lines of text: {run: analyse(...)}."""
    cell = lambda x, form=".3f": "-" if x is None else format(x, form)
    span = lambda x, ends: f"{x:.3f} [{ends[0]:.2f}, {ends[1]:.2f}]"
    pair = lambda form: f"{cell(form['r2'])} {form['rmse']:.3f}" if form else "-"
    yield f"{'run':28} steps  entropy         {'a':22} {'b':22} {'ceiling -a + b':22} R^2    noise allows  RMSE"
    for run, w in laws.items():
        ends = "{:.3f}->{:.4f}".format(*w["entropy"])
        yield (f"{run:28} {w['steps']:5}  {ends:15} {span(w['a'], w['interval']['a']):22} {span(w['b'], w['interval']['b']):22} "
               f"{span(w['ceiling'], w['interval']['ceiling']):22} {cell(w['r2']):6} {cell(w['noise_allows']):>12}  {w['rmse']:.3f}")  # fmt: skip
    yield f"\n{'R^2 and RMSE of R linear in':28} " + "  ".join(f"{name:13}" for name in FORMS) + "  bend of exp H"
    for run, w in laws.items():
        yield f"{run:28} " + "  ".join(f"{pair(w['forms'][name]):13}" for name in FORMS) + f"  {w['bend']:.3f}"
    yield f"\n{'the rest, from the first':28} part  steps  " + "  ".join(f"{name + ': RMSE, end':19}" for name in FORMS) + "  end, measured"
    for run, w in laws.items():
        for part, f in w["forecast"].items():
            ends = "  ".join(f"{'{rmse:.3f}, {end:.3f}'.format(**f[name]) if f[name] else '-':19}" for name in FORMS)
            yield f"{run:28} {part:>4} {f['steps']:6}  {ends}  {f['end']:.3f}"


# ---------------------------------------------------------------- on the curve, or above it?


def distances(runs, others, key="reward", width=5, bands=4):
    """Where runs lie against the law that is fitted to others. runs: {label: [steps, ...]}; others: [steps, ...].

    For each label, as mean and 95% interval over bootstraps of both the others (the curve) and the runs:
        distance   mean of R - law(H) over the steps whose H occurs among the others
        end        R over the last tenth of the steps, less the ceiling
        bands      the distance in bands of equal width in log H, high to low; `others` has the same bands, and where these are
                   themselves off their curve, it is the law that does not hold
        apart      the runs' bands less the others' bands, three times as narrow, mean over those that both have: equal H against
                   equal H, whether the law holds or not. Two runs or more of each
    """
    base = [points(steps, key) for steps in others]
    H = torch.cat([h for h, _ in base])
    law = fit_law(H, torch.cat([r for _, r in base]))
    curves = resample_runs(base) if len(base) > 1 else resample_steps(*base[0], width)
    cut = lambda n: torch.linspace(math.log(H.max().item()), math.log(max(H.min().item(), 1e-6)), n + 1, dtype=torch.float64).exp()
    edges, narrow = cut(bands), cut(3 * bands)
    inside = lambda h, low, high: (h >= low * (1 - 1e-9)) & (h <= high * (1 + 1e-9))

    def measure(group, low, high):
        """[mean of R, mean of exp(H)] of each run's steps between two entropies: (runs, 2); the law is linear in the second."""
        rows = [torch.stack((r[k].mean(), h[k].exp().mean())) for h, r in group if (k := inside(h, low, high)).any()]
        return torch.stack(rows) if rows else None

    def against(rows):
        """Mean distance of (runs, 2) from the curve, and its interval."""
        if rows is None:
            return None
        chosen = torch.randint(len(rows), (len(curves), len(rows)), generator=torch.Generator().manual_seed(1))
        R, x = rows[chosen].mean(1).T
        return {"mean": (rows[:, 0] + law.a * rows[:, 1] - law.b).mean().item(), "runs": len(rows),
                "interval": interval(R + curves[:, 0] * x - curves[:, 1])}  # fmt: skip

    def residuals(group):
        """Mean distance of each run in each narrow band: (runs, bands), nan where it has no step."""
        distance = [(h, r + law.a * h.exp() - law.b) for h, r in group]
        return torch.stack([torch.stack([d[inside(h, low, high)].mean() for high, low in zip(narrow, narrow[1:])]) for h, d in distance])

    def apart(group):
        mine, theirs = residuals(group), residuals(base)
        mean = (mine.nanmean(0) - theirs.nanmean(0)).nanmean().item()
        if len(group) < 2 or len(base) < 2 or math.isnan(mean):
            return None
        redrawn = lambda x, seed: x[torch.randint(len(x), (2000, len(x)), generator=torch.Generator().manual_seed(seed))].nanmean(1)
        ends = (redrawn(mine, 2) - redrawn(theirs, 3)).nanmean(1)
        return {"mean": mean, "runs": len(group), "interval": interval(ends[ends.isfinite()])}

    def summary(group):
        last = lambda r: r[-max(1, len(r) // 10) :].mean()
        ends = torch.stack([torch.stack((last(r), torch.ones_like(r[0]))) for _, r in group])  # exp(0) = 1: the ceiling
        return {"distance": against(measure(group, edges[-1], edges[0])), "end": against(ends), "apart": apart(group),
                "bands": [against(measure(group, low, high)) for high, low in zip(edges, edges[1:])]}  # fmt: skip

    groups = {"the others": base} | {label: [points(steps, key) for steps in seeds] for label, seeds in runs.items()}
    return {"a": law.a, "b": law.b, "ceiling": law.ceiling, "others": len(base), "edges": edges.tolist(),
            "curves": curves, "of": {label: summary(group) for label, group in groups.items()}}  # fmt: skip


def distance_table(d):
    """The same as lines of text."""
    cell = lambda x: "-" if x is None else f"{x['mean']:+.3f} [{x['interval'][0]:+.2f}, {x['interval'][1]:+.2f}]"
    yield f"curve of the {d['others']} others: R = -{d['a']:.3f} exp(H) + {d['b']:.3f}, ceiling {d['ceiling']:.3f}"
    names = [f"H {high:.3g}..{low:.3g}" for high, low in zip(d["edges"], d["edges"][1:])]
    yield f"{'R above the curve, 95%':28} " + " ".join(f"{name:24}" for name in ("at equal H", *names, "apart from the others", "end above the ceiling"))
    for label, s in d["of"].items():
        yield f"{label:28} " + " ".join(f"{cell(x):24}" for x in (s["distance"], *s["bands"], s["apart"], s["end"]))


# ---------------------------------------------------------------- pictures


def draw(file, shown, laws=(), width=5, key="reward"):
    """R against H on a logarithmic axis: steps pale, their means full. shown: [(label, colour, [steps, ...])].

    laws: [(label, colour, a, b, curves (N, 2) or None)]; the curves are drawn as their middle 95%.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(plot.STYLE | {"font.size": 14, "axes.titlesize": 16}):
        figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
        axis = figure.subplots()
        H = []
        for label, colour, seeds in shown:
            for i, (h, r) in enumerate(points(steps, key) for steps in seeds):
                H.append(h[h > 0])
                axis.plot(h, r, ".", color=colour, alpha=0.25, markersize=3)
                axis.plot(blocks(h.exp(), width).log(), blocks(r, width), "o", color=colour, alpha=0.7, markersize=5, label=None if i else label)
        grid = torch.logspace(*(math.log10(x) for x in (torch.cat(H).min(), torch.cat(H).max())), 200, dtype=torch.float64)
        for label, colour, a, b, curves in laws:
            axis.plot(grid, -a * grid.exp() + b, color=colour, linewidth=2.5, label=label)
            if curves is not None:
                band = (curves[:, 1:] - curves[:, :1] * grid.exp()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
                axis.fill_between(grid, *band, color=colour, alpha=0.2, linewidth=0)
        axis.set(xscale="log", xlabel="policy entropy H, nats per token, logarithmic; training goes to the left",
                 ylabel=f"R, {'sampled training accuracy' if key == 'reward' else key}, means of {width} steps",
                 title="R = -a exp(H) + b")  # fmt: skip
        axis.legend(fontsize=12)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="entropy.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of train.py")
    parser.add_argument("--against", nargs="+", metavar="RUN", help="fit the law to these and say where the others lie")
    parser.add_argument("--of", default="reward", metavar="KEY", help="R: a key of metrics.jsonl, such as accuracy_sampled (default reward)")
    parser.add_argument("--smooth", type=int, default=5, metavar="STEPS", help="consecutive points of which a mean is taken (default 5)")
    parser.add_argument("--out", metavar="DIR", help="where the picture of --against goes (default figures/)")
    o = parser.parse_args(argv)
    if o.smooth < 1:
        parser.exit(2, "entropy.py: error: argument --smooth: takes a number of steps, 1 or more\n")
    try:
        read = {run: plot.read_run(run) for run in [*o.runs, *(o.against or [])]}
        for run, (_, steps) in read.items():
            try:
                points(steps, o.of)
            except UserError as error:
                raise UserError(f"{run} {error}") from None
        (compare if o.against else fit_each)(read, o)
    except UserError as error:
        parser.exit(2, f"entropy.py: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"entropy.py: error: {error.filename} cannot be written to: {error.strerror}\n")


def fit_each(read, o):
    """law.json and law.png into each run, and the tables."""
    laws = {run: analyse(steps, o.of, o.smooth) for run, (_, steps) in read.items()}
    for run, (config, steps) in read.items():
        w, colour = laws[run], plot.colours([config["method"]])[config["method"]]
        (Path(run) / "law.json").write_text(json.dumps(w, indent=1) + "\n")
        curves = resample_steps(*points(steps, o.of), o.smooth)
        label = f"a {w['a']:.2f}, b {w['b']:.2f}, R^2 {w['r2']:.2f}" if w["r2"] is not None else "R never changes"
        draw(Path(run) / "law.png", [(Path(run).name, colour, [steps])], [(label, colour, w["a"], w["b"], curves)], o.smooth, o.of)
    print(*tables(laws), sep="\n")


def compare(read, o):
    """law.json and law.png of runs against others into figures/, and the table."""
    shown = plot.experiments([read[run] for run in o.runs])
    others = [read[run][1] for run in o.against]
    d = distances({label: seeds for _, label, seeds in shown}, others, o.of, o.smooth)
    colour = plot.colours(method for method, *_ in shown)
    base = read[o.against[0]][0]["method"]
    out = Path(o.out or "figures")
    draw(out / "law.png", [(f"{base}: the others", "#888888", others), *((label, colour[method], seeds) for method, label, seeds in shown)],
         [(f"{base}: a {d['a']:.2f}, b {d['b']:.2f}", "#000000", d["a"], d["b"], d.pop("curves"))], o.smooth, o.of)  # fmt: skip
    (out / "law.json").write_text(json.dumps(d, indent=1) + "\n")
    print(*distance_table(d), out / "law.png", sep="\n")


if __name__ == "__main__":
    main()
