"""What the measurements of this folder share: what they say of the machine, policies of other sizes, and the seconds of a run's steps."""

import json
import os
import pathlib
import platform
import re
import subprocess

import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]


def machine():
    """Processor or GPU, threads, versions, and the load of the last minute: figures taken under load are only good as ratios."""
    text = pathlib.Path("/proc/cpuinfo").read_text() if pathlib.Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    return {
        "processor": name[1] if name else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def padding(lengths, groups):
    """Share of the positions that hold no token when rows of these lengths go through a model in these groups of indices."""
    return 1 - sum(lengths[i] for g in groups for i in g) / sum(len(g) * max(lengths[i] for i in g) for g in groups)


def random_policy(folder, **changes):
    """The embedded policy's architecture and tokenizer with another configuration, its weights random. Returns the number of parameters."""
    config = transformers.AutoConfig.from_pretrained(ROOT / "tiny")
    config.update(changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(ROOT / "tiny").save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def seconds_of_steps(launcher, options, out):
    """`seconds` of each step but the first of a short run of train.py on the CPU, with next to no evaluation. launcher: the words before train.py."""
    command = [*launcher, ROOT / "train.py", *options, "--eval-every", 1000, "--eval-limit", 2, "--final-samples", 2, "--device", "cpu", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    return [json.loads(line)["seconds"] for line in open(pathlib.Path(out) / "metrics.jsonl")][1:]
