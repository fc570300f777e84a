"""How much more two processes of one thread each do than one process of one thread, for policies of several widths.

    python tests/bench/ranks.py [--widths 64 128 256] [--pairs 3] [--steps 6]                             writes results/ranks.json
    chrt -r 1 python tests/bench/ranks.py --out results/ranks_realtime.json       the same with precedence over all else (root)

Width 64 is the embedded policy (75,000 parameters) under grpo with the default options. The others are as deep, wider and have
random weights, which no reward would ever move: there entropy_bonus makes the gradient. Runs of one and of two processes alternate; the figure is the
ratio of their median seconds a step, without the first step. Meaningful only where two cores are idle; the load is noted beside it.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from statistics import median

from machine import ROOT, random_policy, seconds_of_steps


def seconds(ranks, work, out):
    """Seconds of each step but the first, with so many processes."""
    return seconds_of_steps([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"], work, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "ranks.json")
    o = parser.parse_args()
    figures = []
    for width in o.widths:
        taken = {1: [], 2: []}
        with tempfile.TemporaryDirectory() as folder:
            parameters = random_policy(folder, hidden_size=width, intermediate_size=2 * width, head_dim=width // 4)  # four heads
            work = ["--method", "grpo"] if width == 64 else ["--method", "entropy_bonus", "--model", folder, "--prompts", 32, "--mini-batch", 16]
            for pair in range(o.pairs):
                for ranks in (1, 2):
                    taken[ranks] += seconds(ranks, [*work, "--steps", o.steps], pathlib.Path(folder, f"{ranks}-{pair}"))
        one, two = ({part: median(step[part] for step in taken[ranks]) for part in taken[1][0]} for ranks in (1, 2))
        figures.append({"width": width, "parameters": parameters, "seconds_of_one": one, "seconds_of_two": two,
                        "times_the_work": one["total"] / two["total"], "load": os.getloadavg()[0]})  # fmt: skip
        print(f"width {width}, {parameters:,} parameters: {one['total']:.3f} s a step with one process, {two['total']:.3f} with two:"
              f" {one['total'] / two['total']:.2f} times the work (load {os.getloadavg()[0]:.1f})", flush=True)  # fmt: skip
    rounded = json.loads(json.dumps(figures), parse_float=lambda x: float(f"{float(x):.3g}"))
    o.out.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
