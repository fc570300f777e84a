"""How much more two processes of one thread each do than one process of one thread, for policies of several widths.

    python tests/bench/ranks.py [--widths 64 128 256] [--pairs 3] [--steps 6]      adds a measurement to results/ranks.json

Width 64 is the embedded policy (75,000 parameters) under grpo with the default options. The others are as deep, wider and have
random weights, which no reward would ever move: there entropy_bonus makes the gradient. The figure is the ratio of the median seconds a step, without
the first step. Beside it stands what it would be if the processes needed nothing of each other: one process is also given half of the work. The three kinds of runs
alternate. Meaningful only where two cores are idle; the load is noted, too. Measurements are kept, for they differ from one quarter of an hour to the next.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from statistics import median

from machine import ROOT, machine, random_policy, seconds_of_steps


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
        taken = {"one": [], "two": [], "half": []}
        with tempfile.TemporaryDirectory() as folder:
            parameters = random_policy(folder, hidden_size=width, intermediate_size=2 * width, head_dim=width // 4)  # four heads
            work, prompts, mini_batch = (["--method", "grpo"], 64, 8) if width == 64 else (["--method", "entropy_bonus", "--model", folder], 32, 16)
            for pair in range(o.pairs):
                for name, ranks, part in (("one", 1, 1), ("two", 2, 1), ("half", 1, 2)):
                    size = ["--prompts", prompts // part, "--mini-batch", mini_batch // part, "--steps", o.steps]
                    taken[name] += seconds(ranks, [*work, *size], pathlib.Path(folder, f"{name}-{pair}"))
        one, two, half = ({phase: median(step[phase] for step in steps) for phase in steps[0]} for steps in taken.values())
        gain, bound = one["total"] / two["total"], one["total"] / half["total"]
        figures.append({"width": width, "parameters": parameters, "seconds_of_one": one, "seconds_of_two": two, "seconds_of_half": half,
                        "times_the_work": gain, "without_exchange": bound, "load": os.getloadavg()[0]})  # fmt: skip
        print(f"width {width}, {parameters:,} parameters: {one['total']:.3f} s a step with one process, {two['total']:.3f} with two: {gain:.2f} times the work;"
              f" half of it alone {half['total']:.3f} s, so {bound:.2f} at best (load {os.getloadavg()[0]:.1f})", flush=True)  # fmt: skip
    rounded = json.loads(json.dumps({"machine": machine(), "widths": figures}), parse_float=lambda x: float(f"{float(x):.3g}"))
    before = json.loads(o.out.read_text()) if o.out.exists() else []
    o.out.write_text(json.dumps([*before, rounded], indent=1) + "\n")


if __name__ == "__main__":
    main()
