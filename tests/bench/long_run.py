"""Whether a long run stays as small as it began: 2,000 steps of the smallest possible model.

    python tests/bench/long_run.py [--steps 2000]     writes results/long_run.json

Resident memory is read at every tenth of the run; files and processes are counted at its end.
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

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SHORT = "--prompts 2 --mini-batch 2 --samples 2 --max-new-tokens 8 --eval-limit 2 --eval-every 100 --save-every 50 --final-samples 2 --device cpu".split()


def smallest(folder):
    """The embedded tokenizer with one layer of width 8."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(ROOT / "tiny")
    config.update({"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
                   "layer_types": ["full_attention"], "head_dim": 8})  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(ROOT / "tiny").save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out, model = pathlib.Path(folder, "run"), pathlib.Path(folder, "model")
        smallest(model)
        command = [sys.executable, ROOT / "train.py", "--method", "kl_cov", "--model", model, "--steps", o.steps, "--passes", 2, *SHORT, "--out", out]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        process = subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        memory, log = {}, out / "metrics.jsonl"
        while process.poll() is None:
            done = log.read_bytes().count(b"\n") if log.exists() else 0
            if done >= o.steps // 10 * (len(memory) + 1) and (found := re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{process.pid}/status").read_text())):
                memory[done] = round(int(found[1]) / 1024, 1)
            time.sleep(0.05)
        assert process.returncode == 0
        left = subprocess.run(["ps", "-o", "pid=", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
        files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    figures = {"steps": o.steps, "resident_mib_after_steps": memory, "processes_left": len(left), "bytes_of_files": files}
    (ROOT / "results" / "long_run.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
