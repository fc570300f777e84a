"""Whether a long run stays as small as it began: 2,000 steps of the smallest possible model.

    python tests/bench/long_run.py [--steps 2000]     writes results/long_run.json

Memory, threads, open files, processes and the size of the logs are read after a twentieth, a quarter, half and three quarters of the steps
and shortly before the last one; what the run leaves on the disk, and of processes, at its end. A few minutes on one core.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import uuid

from machine import ROOT, random_policy

SHORT = "--prompts 2 --mini-batch 2 --samples 2 --max-new-tokens 8 --eval-limit 2 --eval-every 100 --save-every 50 --final-samples 2 --device cpu".split()


def family(mark):
    """Ids of all processes that have `mark` in their environment: the run's and those it started."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [int(path.parent.name)] if mark.encode() in path.read_bytes() else []
        except OSError:
            pass  # it has just ended
    return found


def sizes(pid, out):
    """Of a running process: resident memory in MiB, threads, open files; and what its run takes on the disk."""
    resident, threads = (int(re.search(rf"{key}:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) for key in ("VmRSS", "Threads"))
    kib = lambda paths: round(sum(path.stat().st_size for path in paths if path.is_file()) / 1024)
    return {"resident_mib": round(resident / 1024, 1), "threads": threads, "open_files": len(os.listdir(f"/proc/{pid}/fd")),
            "logs_kib": kib(out.glob("*.jsonl")), "checkpoints": len([path for path in (out / "checkpoint").glob("step-*") if not path.suffix])}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    o = parser.parse_args()
    moments, seen, mark, begun = [o.steps // 20, o.steps // 4, o.steps // 2, 3 * o.steps // 4, o.steps - 20], {}, f"LONG_RUN={uuid.uuid4()}", time.time()
    with tempfile.TemporaryDirectory() as folder:
        out, model = pathlib.Path(folder, "run"), pathlib.Path(folder, "model")
        random_policy(model, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                      layer_types=["full_attention"], head_dim=8)  # fmt: skip
        command = [sys.executable, ROOT / "train.py", "--method", "entropy_bonus", "--model", model, "--steps", o.steps, *SHORT, "--out", out]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict([mark.split("=")])
        said, log = open(f"{folder}/said", "w+"), out / "metrics.jsonl"
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            done = log.read_bytes().count(b"\n") if log.exists() else 0
            if len(seen) < len(moments) and done >= moments[len(seen)]:
                seen[done] = sizes(process.pid, out) | {"processes": len(family(mark))}
            time.sleep(0.05)
        assert process.returncode == 0, said.seek(0) or said.read()[-3000:]
        left = family(mark)
        files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    figures = {"steps": o.steps, "seconds": round(time.time() - begun), "after_steps": seen, "processes_left": len(left), "bytes_of_files": files}
    (ROOT / "results" / "long_run.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
