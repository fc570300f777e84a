"""Run directory: what a run leaves behind, and how it goes on after it was stopped.

    config.json      every option as used, versions, git commit
    metrics.jsonl    a line for each step            samples.jsonl    a few completions, token by token
    checkpoint/      policy, optimizer, PRIME's model and optimizer, step and position in the data: all that the next step needs
    model/           the final policy                final.json, curves.png

All randomness follows from (seed, step, purpose), so there are no generator states to keep.
"""

import json
import platform
import shutil
import subprocess
from pathlib import Path

import torch
import transformers

from parallel import world


def describe(o):
    """config.json: every option as used, versions, and the git commit if there is one."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return vars(o) | {"processes": world()[1], "versions": versions, "commit": git.stdout.strip() or None}


def save(policy, number, o):
    """checkpoint/: all that the next step needs. Written beside and renamed; a kill just before the renaming leaves it in checkpoint.new."""
    new, old = Path(o.out) / "checkpoint.new", Path(o.out) / "checkpoint"
    shutil.rmtree(new, ignore_errors=True)
    policy.model.save_pretrained(new)
    policy.tokenizer.save_pretrained(new)
    state = {"step": number, "rounds": policy.rounds, "optimizer": policy.optimizer.state_dict()}
    if policy.prm:
        state["prm"] = {"model": policy.prm.model.state_dict(), "optimizer": policy.prm.optimizer.state_dict()}
    torch.save(state, new / "state.pt")
    if old.exists():
        shutil.rmtree(old)
    new.rename(old)


def restore(policy, o):
    """The step that the checkpoint ends with; metrics.jsonl and samples.jsonl are cut back to it."""
    state = torch.load(Path(o.out) / "checkpoint" / "state.pt", map_location=o.device, weights_only=True)
    policy.optimizer.load_state_dict(state["optimizer"])
    policy.rounds = state["rounds"]
    if policy.prm:
        policy.prm.model.load_state_dict(state["prm"]["model"])
        policy.prm.optimizer.load_state_dict(state["prm"]["optimizer"])
    for group in policy.optimizer.param_groups:
        group["lr"] = o.lr  # not the one that the checkpoint was written with
    if world()[0] == 0:
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = Path(o.out) / name
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= state["step"]))
    return state["step"]
