"""Studies: the same training many times, with other seeds and other methods, and a table in which every run is shown.

    python study.py phenomenon             all runs of a study, then results/phenomenon.md, .json and .png
    python study.py phenomenon --seeds 1 2 fewer seeds         --table        only the table, from the runs that are there
    python study.py shares                 other starting policies: those in which the right strategy is rarer or more common
    python study.py sizes                  and those with fewer or more parameters; starting.py says what is made of these two
    python study.py theorem                the theorem over whole runs: theorem.py

A run is a process of its own with one thread, as many at a time as there are cores. A study may be
interrupted at any time; the same command goes on with the runs that are missing. A starting policy other than
the embedded one is made by warmstart.py before the runs that need it.

The window: of each seed, the 20 steps after the entropy of *its* GRPO run has first fallen to a tenth of
where it started. There the entropies of a method and of GRPO are compared, as means over the window. "In a fifth of
the tokens" is the share of all entropy that the fifth with the highest holds, in the completions logged in the first 20 steps.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

import data
import eval as evaluation
import losses
from lab import page
import plot
from lab import starting
from lab import theorem
from rollout import TINY, load_policy

HERE = Path(__file__).parents[1]
WINDOW = 20

# Bases: what warmstart.py is told, to make starting policies from the most common right strategy to the rarest, and of four sizes.
# Rows: what train.py is told, and after the comma maybe the base. Studies: their seeds, none of which served for tuning, and their rows.
BASES = {
    "share 0.3": "--share 0.3",
    "share 0.05": "--share 0.05",
    "share 0.005": "--share 0.005",
    "share 0.0001": "--share 0.0001 --wander 0.002",
    "hidden 40": "--hidden 40",
    "hidden 128": "--hidden 128",
    "hidden 256": "--hidden 256",
}
ROWS = (
    {name: f"--method grpo --advantage {name}" for name in losses.ESTIMATORS}
    | {method: f"--method {method}" for method in losses.METHODS}
    | {
        "grpo, clip 1.0": "--method grpo --clip-low 1 --clip-high 1",
        "grpo, 400 steps": "--method grpo --steps 400",
        "kl_cov, beta 1": "--method kl_cov --kl-cov-ratio 0.02 --kl-cov-beta 1",
        "kl_cov, 16 mini-batches": "--method kl_cov --kl-cov-ratio 0.02 --kl-cov-beta 1 --mini-batch 4",
        "kl_cov, 2 passes": "--method kl_cov --kl-cov-ratio 0.005 --kl-cov-beta 1 --passes 2",
        "kl_cov, 400 steps": "--method kl_cov --steps 400",
        "entropy_bonus, 0.005": "--method entropy_bonus --entropy-coef 0.005",
        "kl_ref, 0.01": "--method kl_ref --kl-ref-beta 0.01",
    }
    | {f"{method}, {base}": f"--method {method} --steps 100 --eval-every 20" for method in starting.METHODS for base in BASES if "share" in base}
    | {f"{method}, theorem": f"--method {method} --steps 100 --check-theorem" for method in starting.METHODS}
    | {f"grpo, {base}": f"--method grpo --steps 100 --lr {3e-4 * 64 / int(base.split()[1]):.3g}" for base in BASES if "hidden" in base}
)
STUDIES = {
    "phenomenon": (range(51, 59), ["grpo", "clip_cov", "kl_cov", "grpo, clip 1.0"]),
    "kl_cov": (range(51, 54), ["grpo", "grpo, 400 steps", "kl_cov", "kl_cov, beta 1", "kl_cov, 16 mini-batches", "kl_cov, 2 passes", "kl_cov, 400 steps"]),
    "methods": (range(51, 56), list(losses.METHODS)),
    "weights": (range(51, 56), ["grpo", "entropy_bonus, 0.005", "entropy_bonus", "kl_ref, 0.01", "kl_ref"]),
    "estimators": (range(51, 56), list(losses.ESTIMATORS)),
    "shares": (range(51, 56), [*starting.METHODS, *(row for row in ROWS if "share" in row)]),
    "sizes": (range(51, 54), ["grpo", *(row for row in ROWS if "hidden" in row)]),
    "theorem": (range(51, 54), [row for row in ROWS if "theorem" in row]),
}


def place(name):
    """Where a run or a base is kept."""
    return HERE / "runs" / "study" / name.replace(", ", "_").replace(" ", "")


def directory(row, seed):
    """Where a run is kept; studies with a row in common share its runs."""
    return place(f"{row}-s{seed}")


def process(*command):
    """A Python process with one thread and its last line: of what it says, or of what it complains about."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, cwd=HERE)
    print((done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1], flush=True)


def make_base(base):
    """The starting policy of that name, unless it is there."""
    if not place(base).exists():
        process("-m", "lab.warmstart", *BASES[base].split(), "--out", place(base + " new"))
        place(base + " new").rename(place(base))


def run(row, seed):
    """One run, or what is missing of it."""
    out, base = directory(row, seed), starting.base_of(row)
    if not (out / "final.json").exists():
        model = ["--model", place(base)] if base in BASES else []
        resume = ["--resume"] if (out / "checkpoint").is_dir() else ["--overwrite"]
        process(HERE / "train.py", *ROWS[row].split(), *model, "--device", "cpu", "--seed", seed, "--out", out, *resume)


def collapse(entropy):
    """Index of the first step at which the entropy is at most a tenth of the first one, or None."""
    return next((i for i, H in enumerate(entropy) if H <= entropy[0] / 10), None)


def top_fifth(samples):
    """The share of the entropy that the fifth of the tokens with the highest entropy holds (the forks of arXiv 2506.01939, figure 2)."""
    entropy = sorted((H for line in samples for H in line["entropy"]), reverse=True)
    return sum(entropy[: len(entropy) // 5]) / sum(entropy)


def measure(row, seed):
    """The figures of one run, as they stand in the table. Its window is that of GRPO from the same starting policy."""
    _, steps = plot.read_run(directory(row, seed))
    base = starting.base_of(row)
    reference = [s["entropy"] for s in plot.read_run(directory(f"grpo, {base}" if base in BASES else "grpo", seed))[1]]
    entropy = [s["entropy"] for s in steps]
    final = json.loads((directory(row, seed) / "final.json").read_text())
    start = collapse(reference)
    mean = lambda H: fmean(H[start : start + WINDOW])
    return {
        "seed": seed,
        "entropy_start": entropy[0],
        "collapse_step": None if collapse(entropy) is None else collapse(entropy) + 1,
        "entropy_window": None if start is None else mean(entropy),
        "entropy_ratio": None if start is None else mean(entropy) / mean(reference),
        "entropy_end": fmean(entropy[-10:]),
        "entropy_min": min(entropy),
        "top_fifth": top_fifth([line for line in page.read_samples(directory(row, seed)) if line["step"] <= WINDOW]),
        "accuracy": final["accuracy"],
        "accuracy_sampled": final["accuracy_sampled"],
        "pass": final["pass_at"][max(final["pass_at"], key=int)],
        "seconds": sum(s["seconds"]["total"] for s in steps),
        "curve": {k: [None if s.get(k) is None else float(f"{s[k]:.4g}") for s in steps]
                  for k in ("entropy", "reward", "covariance", "accuracy", "accuracy_sampled")},
    }  # fmt: skip


def starting_policy(samples=32):
    """Greedy and sampled accuracy and pass@32 of the policy that all runs start from: one line."""
    policy = load_policy(TINY)
    problems = data.load_problems("arithmetic_heldout")
    greedy, sampled = (evaluation.evaluate(*policy, problems, n, t, 40, batch=4096) for n, t in ((1, 0.0), (samples, 1.0)))
    return (f"The starting policy: greedy {greedy['accuracy']:.1%}, sampled {sampled['accuracy']:.1%}, "
            f"pass@{samples} {sampled['pass'][str(samples)]:.1%}.")  # fmt: skip


COLUMNS = {
    "entropy, first step": ("entropy_start", "{:.3f}"),
    "falls to a tenth at step": ("collapse_step", "{:.0f}"),
    "in the window": ("entropy_window", "{:.3f}"),
    "against grpo's": ("entropy_ratio", "{:.1f}"),
    "last 10 steps": ("entropy_end", "{:.3f}"),
    "in a fifth of the tokens": ("top_fifth", "{:.0%}"),
    "accuracy, greedy": ("accuracy", "{:.1%}"),
    "sampled": ("accuracy_sampled", "{:.1%}"),
    "pass@32": ("pass", "{:.1%}"),
    "seconds": ("seconds", "{:.0f}"),
}


def table(results):
    """Markdown: a line for every run, then means and standard deviations over the seeds."""
    cell = lambda form, x: "-" if x is None else form.format(x)
    head = ["run", "seed", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, runs in results.items():
        for r in runs:
            lines.append("| " + " | ".join([row, str(r["seed"]), *(cell(f, r[k]) for k, f in COLUMNS.values())]) + " |")
    summary = ["| " + " | ".join(["mean +- standard deviation", "seeds", *COLUMNS]) + " |", "|" + "---|" * len(head)]
    for row, runs in results.items():
        cells = []
        for key, form in COLUMNS.values():
            values = [r[key] for r in runs if r[key] is not None]
            spread = f" +- {form.format(stdev(values))}" if len(values) > 1 else ""
            cells.append(form.format(fmean(values)) + spread if values else "-")
        summary.append("| " + " | ".join([row, str(len(runs)), *cells]) + " |")
    return "\n".join(summary + [""] + lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the study's own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one for each core)")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table of the runs that are there")
    o = parser.parse_args()
    seeds, rows = STUDIES[o.study]
    todo = [(row, seed) for seed in o.seeds or seeds for row in rows]
    if not o.table:
        with ThreadPoolExecutor(o.jobs) as pool:
            list(pool.map(make_base, sorted({starting.base_of(row) for row in rows} & set(BASES))))
            list(pool.map(lambda job: run(*job), todo))
    done = [job for job in todo if (directory(*job) / "final.json").exists()]
    report(o.study, {row: seeds for row in rows if (seeds := [seed for r, seed in done if r == row])})


def report(study, runs, out=HERE / "results"):
    """STUDY.md, .json and .png into `out`. runs: {row: seeds that are there}."""
    out.mkdir(exist_ok=True)
    results = {row: [measure(row, seed) for seed in seeds] for row, seeds in runs.items()}
    read = {row: [plot.read_run(directory(row, seed))[1] for seed in seeds] for row, seeds in runs.items()}
    if study in ("shares", "sizes"):
        results["bases"] = bases = {base: starting.describe(place(base) if base in BASES else TINY) for base in map(starting.base_of, read)}
        text = starting.shares(results, read, bases, out) if study == "shares" else starting.sizes(read, bases, out)
    elif study == "theorem":
        results["theorem"] = figures = {f"{row}-s{seed}": theorem.over_run(steps) for row in read for seed, steps in zip(runs[row], read[row])}
        theorem.draw({row: read[row][0] for row in read}, out / "theorem.png")
        text = "\n\n```\n" + "\n".join(theorem.table(figures)) + "\n```\n"
    else:
        text = f"{starting_policy()}\n\n{table(results)}"
        found = [(row, seed) for row, seeds in runs.items() for seed in seeds]
        plot.curves([directory(*job) for job in found], out / f"{study}.png", [row for row, _ in found])
    (out / f"{study}.json").write_text(json.dumps(results) + "\n")
    (out / f"{study}.md").write_text(f"Made by `python study.py {study}`. {text}")
    print(text)


if __name__ == "__main__":
    main()
