"""What the measurements of this folder say of the machine they were taken on."""

import os
import pathlib
import platform
import re

import torch
import transformers


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
