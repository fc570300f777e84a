"""What each method and each estimator costs: seconds a step against GRPO's, side by side, in one run.

    python tests/bench/methods.py [--rounds 2] [--steps 20]     writes results/methods_seconds.json

A round is a short run of each, one after the other, the same problems in all; the figure is the ratio of median seconds a step, without
the first step, to GRPO's of the same rounds. It follows the entropy: the more completions are the same, and the more groups have no signal, the less
there is to compute, so the first steps of a run are its dearest, and a method that keeps the entropy costs more than one that lets it fall.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from statistics import median

from machine import ROOT, seconds_of_steps

sys.path.insert(0, str(ROOT))

import losses  # noqa: E402

ROWS = {f"--method {m}": m for m in losses.METHODS} | {f"--method grpo --advantage {e}": e for e in losses.ESTIMATORS if e != "grpo"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    o = parser.parse_args()
    taken = {row: [] for row in ROWS}
    for _ in range(o.rounds):
        for row in ROWS:
            with tempfile.TemporaryDirectory() as folder:
                steps = seconds_of_steps([sys.executable], [*row.split(), "--steps", o.steps], pathlib.Path(folder, "run"))
                taken[row] += [step["total"] for step in steps]
    base = median(taken["--method grpo"])
    figures = {name: {"seconds_a_step": round(median(taken[row]), 3), "against_grpo": round(median(taken[row]) / base, 2)} for row, name in ROWS.items()}
    for name, f in figures.items():
        print(f"{name:14} {f['seconds_a_step']:.3f} s a step, {f['against_grpo']:.2f} times GRPO's")
    (ROOT / "results" / "methods_seconds.json").write_text(json.dumps({"load": os.getloadavg()[0], "steps": o.steps, "of": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
