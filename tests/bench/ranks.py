"""How many times the work of one process two do, by the seconds of a step, in runs that alternate.

    python tests/bench/ranks.py [--widths 64 256] [--pairs 3] [--steps 6] [--out FILE.json]

Width 64 is the embedded policy (75 thousand parameters) under grpo. The others have its depth and random
weights (width 256: 1.2 million parameters); no reward would ever move these, so entropy_bonus makes the
gradient. Each process has one thread. The first step of a run is left out. The ratio means something only
where two cores are idle, so the load of the machine stands beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def work_of(width, folder):
    """The options of a run, and the number of parameters of its policy."""
    config = AutoConfig.from_pretrained(ROOT / "tiny")
    config.update({"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tiny").save_pretrained(folder)
    words = ["--method", "entropy_bonus", "--model", folder, "--prompts", "32", "--mini-batch", "16"]
    return ["--method", "grpo"] if width == 64 else words, model.num_parameters()


def seconds(processes, words, steps, out):
    """Seconds of each step but the first of a run with so many processes and next to no evaluation."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    short = ["--steps", steps, "--eval-every", 1000, "--eval-limit", 2, "--final-samples", 2]
    command = [sys.executable, *launcher, ROOT / "train.py", *words, *short, "--device", "cpu", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    lines = Path(out, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"]["total"] for line in lines[1:]]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", help="file for the figures")
    o = parser.parse_args()
    figures = []
    for width in o.widths:
        taken = {1: [], 2: []}
        with tempfile.TemporaryDirectory() as folder:
            words, parameters = work_of(width, folder)
            for pair in range(o.pairs):
                for processes in taken:
                    taken[processes] += seconds(processes, words, o.steps, f"{folder}/{pair}-{processes}")
        one, two = median(taken[1]), median(taken[2])
        figures.append({"parameters": parameters, "ratio": one / two, "seconds": taken,
                        "load": os.getloadavg()[0]})  # fmt: skip
        print(f"{parameters:,} parameters: two processes do {one / two:.2f} times the work of one "
              f"({one:.3f} and {two:.3f} s a step; load {os.getloadavg()[0]:.1f})", flush=True)  # fmt: skip
    if o.out:
        Path(o.out).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
