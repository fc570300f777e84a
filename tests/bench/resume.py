"""Whether a run that is killed twenty times at random ends as one that was never killed.

    python tests/bench/resume.py [--method kl_cov] [--processes 1] [--kills 20] [--out FILE.json]

All processes of the run get SIGKILL at once: sometimes while it starts, else after a random number of steps
and a random part of another, so also in evaluations and while it writes. Every second step writes a
checkpoint. Then metrics.jsonl (but for its seconds), samples.jsonl, final.json and the final weights are
compared with those of a run of the same options that nobody killed. Exit status 0 if all are identical.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--prompts 4 --mini-batch 2 --samples 4 --eval-limit 8 --eval-every 3 --save-every 2 --seed 5"
         " --final-samples 2 --lr 2e-4 --cov-low 0.05 --clip-cov-ratio 0.1 --kl-cov-ratio 0.1"
         " --kl-cov-low 0 --device cpu")


def start(o, out, *more):
    """A run as a process, alone or under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={o.processes}"]
    options = ["--method", o.method, *SHORT.split(), "--steps", o.steps, "--out", out, *more]
    command = [sys.executable, *(launcher if o.processes > 1 else []), ROOT / "train.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), env=environment, **quiet)


def steps_of(out):
    """Whole lines of metrics.jsonl."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill(o, out, rng, seconds):
    """Starts or resumes the run and kills it. Returns the steps logged by then; None if it ended before."""
    process = start(o, out, *(["--resume"] if (out / "metrics.jsonl").exists() else []))
    if rng.random() < 0.15:  # while it starts
        time.sleep(rng.uniform(0, 1))
    else:
        least, wanted = steps_of(out), rng.randint(1, 4)
        while process.poll() is None and steps_of(out) < least + wanted:
            least = min(least, steps_of(out))  # a resumed run first cuts its logs back to the checkpoint
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2 * seconds))
    if process.poll() is not None:
        return None
    for path in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's processes have sessions of their own
        try:
            if str(out).encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            pass  # it has just ended
    process.wait()
    return steps_of(out)


def content(out):
    """What must be identical: {file: content}."""
    names = "samples.jsonl", "final.json", "model/model.safetensors"
    files = {name: (out / name).read_bytes() for name in names}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return files | {"metrics.jsonl": [{k: v for k, v in line.items() if k != "seconds"} for line in lines]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="kl_cov")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", help="file for the figures")
    o = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        assert start(o, whole).wait() == 0
        lines = (whole / "metrics.jsonl").read_text().splitlines()
        typical = sorted(json.loads(line)["seconds"]["total"] for line in lines)[len(lines) // 2]
        killed = [kill(o, parts, rng, typical) for _ in range(o.kills)]
        assert None not in killed, f"the run was over after {killed.index(None)} kills: take more --steps"
        assert start(o, parts, "--resume").wait() == 0
        wanted, got = content(whole), content(parts)
    same = {name: got[name] == wanted[name] for name in wanted}
    print(f"{o.kills} kills after {killed} logged steps: {sum(same.values())} of {len(same)} files identical")
    if o.out:
        figures = {"method": o.method, "processes": o.processes, "steps": o.steps, "identical": same}
        Path(o.out).write_text(json.dumps(figures | {"logged when killed": killed}, indent=1) + "\n")
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
