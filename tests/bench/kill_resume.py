"""Whether a run that is killed twenty times at random ends as one that was never killed.

All processes of the run are killed by SIGKILL at once: sometimes while it starts, else after a random
number of steps and a random part of another, so also within evaluations and while it writes. A checkpoint is written at
every second step, so that many kills fall into the writing of one. Then metrics.jsonl is compared, apart from seconds,
and samples.jsonl, final.json and the final weights byte by byte.

    python tests/bench/kill_resume.py [--method kl_cov] [--ranks 1] [--kills 20]     adds to results/kill_resume.json
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHORT = ("--prompts 4 --mini-batch 2 --samples 4 --eval-limit 8 --eval-every 3 --save-every 2 --final-samples 2 --seed 5 --device cpu"
         " --lr 2e-4 --cov-low 0.05 --kl-cov-ratio 0.1 --clip-cov-ratio 0.1").split()  # fmt: skip


def start(o, out, *more):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={o.ranks}"] if o.ranks > 1 else []
    command = [sys.executable, *launcher, ROOT / "train.py", "--method", o.method, "--steps", o.steps, *SHORT, "--out", out, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def steps_of(out):
    """Whole lines of metrics.jsonl."""
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


def kill(o, out, rng, seconds):
    """Starts or resumes the run and kills it. Returns what had been logged by then, or None if it ended before."""
    process = start(o, out, *(["--resume"] if (out / "metrics.jsonl").exists() else []))
    if rng.random() < 0.15:  # while it starts
        time.sleep(rng.uniform(0, 1))
    else:
        begun, wanted = steps_of(out), rng.randint(1, 4)
        shrunk = False  # the logs are cut back to the checkpoint before steps are added to them
        while process.poll() is None and not (shrunk and steps_of(out) >= begun + wanted):
            begun, shrunk = min(begun, steps_of(out)), shrunk or (out / "checkpoint").exists() or steps_of(out) > begun
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2 * seconds))
    if process.poll() is not None:
        return None
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's processes have sessions of their own
        try:
            if str(out).encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            pass  # it has just ended
    process.wait()
    return steps_of(out)


def content(out):
    metrics = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in open(out / "metrics.jsonl")]
    return metrics, *((out / name).read_bytes() for name in ("samples.jsonl", "final.json", "model/model.safetensors"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="kl_cov")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    o = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = pathlib.Path(folder, "whole"), pathlib.Path(folder, "parts")
        assert start(o, whole).wait() == 0
        seconds = [json.loads(line)["seconds"]["total"] for line in open(whole / "metrics.jsonl")]
        killed = [kill(o, parts, rng, sorted(seconds)[len(seconds) // 2]) for _ in range(o.kills)]
        assert None not in killed, f"the run was over after {killed.index(None)} kills: take more --steps"
        unfinished = sorted(path.name for path in (parts / "checkpoint").glob("*.new"))
        assert start(o, parts, "--resume").wait() == 0
        same = dict(zip(("metrics.jsonl", "samples.jsonl", "final.json", "weights"), (a == b for a, b in zip(content(whole), content(parts)))))
    figures = {"steps": o.steps, "kills": o.kills, "logged_when_killed": killed, "checkpoint_in_writing_at_the_last_kill": unfinished, "identical": same}
    path = ROOT / "results" / "kill_resume.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[f"{o.method}, {o.ranks} process{'es' * (o.ranks > 1)}"] = figures
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(figures))
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
