"""How much more two processes of one thread each do than one process of one thread: side by side, in one run.

    python tests/bench/ranks.py [--pairs 3]

Runs of one and of two processes alternate; the figure is the ratio of their median seconds a step, without the first step.
Meaningful on a machine with two idle cores only; the load is printed beside it.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from statistics import median

ROOT = pathlib.Path(__file__).resolve().parents[2]


def seconds(ranks, steps, out):
    """Seconds of each step but the first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", ROOT / "train.py", "--method", "grpo",
               "--steps", steps, "--eval-every", 1000, "--eval-limit", 16, "--final-samples", 2, "--device", "cpu", "--out", out]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    return [json.loads(line)["seconds"]["total"] for line in open(out / "metrics.jsonl")][1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    o = parser.parse_args()
    taken = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(o.pairs):
            for ranks in (1, 2):
                taken[ranks] += seconds(ranks, o.steps, pathlib.Path(folder, f"{ranks}-{pair}"))
                print(f"pair {pair + 1}, {ranks} process{'es' * (ranks > 1)}: {median(taken[ranks]):.3f} s a step, load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"two processes do {median(taken[1]) / median(taken[2]):.2f} times the work of one")


if __name__ == "__main__":
    main()
