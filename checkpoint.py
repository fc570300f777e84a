"""What a run leaves behind, and how it goes on after it was stopped.

    config.json          every option as used, versions, git commit, digests of the problems
    metrics.jsonl        a line for each step            samples.jsonl    a few completions, token by token
    checkpoint/step-N/   the last two: the policy as a Hugging Face folder, state.pt, and sums.json
    model/               the final policy                final.json, curves.png

A checkpoint is written as step-N.new, carried to the disk, and renamed; older ones are removed only then. So
a run may be killed at any moment. `--resume` takes the latest checkpoint whose checksums are right, cuts the
logs back to its step, and goes on: metrics.jsonl becomes what it would have been, to the digit on a CPU. (The
backward pass of a GPU's attention adds up in an order that changes.)

All randomness follows from (seed, step, purpose), and all counters from metrics.jsonl, so a checkpoint holds
neither. Only rank 0 reads and writes the logs. With several nodes, --out is a folder that all of them see.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from data import UserError, one_line
from parallel import whole_state, world

KEPT = 2  # checkpoints
FREE = {  # options that may differ when a run goes on: they change metrics.jsonl by rounding, or only its end
    "resume", "overwrite", "out", "steps", "save_every", "micro_batch", "sample_batch",
    "shard_optimizer", "final_samples", "gradient_checkpointing",
}

# ---------------------------------------------------------------- what is logged


def stopwatch(*names):
    """Seconds of each name, and lap(name), which adds the time since the last lap."""
    seconds, last = dict.fromkeys(names, 0.0), [time.perf_counter()]

    def lap(name):
        now = time.perf_counter()
        seconds[name] += now - last[0]
        last[0] = now

    return seconds, lap


def summary(batches, logs, eos_ids, o):
    """The figures of a step: sums over counts, never means of means; None where there was nothing.

    batches: all of the step, also those that --filter-groups drops; they are what reward, entropy, lengths
    and no_signal are over. logs: one for each update.
    """
    completions = [c for batch in batches for c in batch.completions]
    rewards = torch.cat([batch.rewards for batch in batches])
    groups = rewards.view(-1, o.samples)
    no_signal = (groups.amax(1) == groups.amin(1)).sum().item()
    tokens = sum(map(len, completions))
    by_sequence = [(batch.entropy1.sum(1) / batch.mask.sum(1)).sum().item() for batch in batches]
    metrics = {
        "reward": rewards.mean().item(),
        "entropy": sum(batch.entropy1.sum().item() for batch in batches) / tokens,
        "entropy_seq": sum(by_sequence) / len(completions),
        "completion_length": tokens / len(completions),
        "truncated": sum(c[-1] not in eos_ids for c in completions) / len(completions),
        "no_signal": no_signal / len(groups),
        "tokens": tokens,
        "updates": len(logs),
        "skipped": sum(not log["finite"] for log in logs),
        "ratio_max": max((log["ratio_max"] for log in logs), default=None),
    }
    trained = sum(log["tokens"] for log in logs)
    for key, name in (("covariance", "covariance"), ("selected", "selected"), ("clip_fraction", "clipped")):
        metrics[key] = sum(log[name] for log in logs) / trained if logs else None
    for key in ("loss", "grad_norm"):
        metrics[key] = sum(log[key] for log in logs) / len(logs) if logs else None
    if o.temperature != 1:
        metrics["entropy_sampling"] = sum(batch.entropy.sum().item() for batch in batches) / tokens
    if o.filter_groups:
        metrics |= {"rounds": len(groups) // o.prompts, "filtered": no_signal}
    return metrics


def sample_lines(tokenizer, batch, t, loss, number, count=8):
    """Some completions of a mini-batch, of different problems, token by token, with what the method saw."""
    lines = []
    for i in range(0, len(batch.completions), -(-len(batch.completions) // count)):
        n = len(batch.completions[i])
        row = lambda x: [float(f"{v:.4g}") for v in x[i, :n].tolist()]
        lines.append({
            "step": number,
            "prompt": tokenizer.decode(batch.prompts[i]),
            "completion": batch.texts[i],
            "reward": batch.rewards[i].item(),
            "tokens": tokenizer.batch_decode([[y] for y in batch.completions[i]]),
            "entropy": row(batch.entropy),
            "covariance": row(t.covariance),
            "advantage": row(t.advantages),
            "selected": [] if loss.selected is None else loss.selected[i, :n].nonzero()[:, 0].tolist(),
        })
    return lines


def plain(value):
    """The value with None for every number that is not finite: JSON has no NaN."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def append(out, metrics, samples):
    """Adds a line to metrics.jsonl and lines to samples.jsonl, both `plain`."""
    for name, lines in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
        with open(Path(out, name), "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


# ---------------------------------------------------------------- the run directory


def describe(o, problems, held_out):
    """config.json: options as used, versions, git commit, digests of the problems (prompt ids and answers).

    Of ids, not of texts, for a chat template may hold today's date.
    """
    here = Path(__file__).parent
    command = ["git", "rev-parse", "HEAD"]
    git = shutil.which("git") and subprocess.run(command, capture_output=True, text=True, cwd=here)
    digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
    return vars(o) | {
        "processes": world()[1],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": git and git.stdout.strip() or None,
        "content": {"data": digest(problems), "eval_data": digest(held_out)},
    }


def write_json(path, value):
    """A small JSON file, written whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=1))
    new.replace(path)


def lock(out):
    """Keeps other runs out of the run directory while the file returned is open. UserError if one is there.

    Rank 0 holds the lock, for torchrun's processes may outlive a torchrun that was killed.
    """
    if world()[0] > 0:
        return None
    Path(out).mkdir(parents=True, exist_ok=True)
    file = open(Path(out, "metrics.jsonl"), "a")  # by this file a directory is known to be a run's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out: another process is at work in {out}") from None
    except OSError:
        pass  # a file system without locks
    return file


def begin(config):
    """An empty run directory. UserError if meanwhile another process has made a run there and ended.

    config.json is removed first and written last: without it and without steps nothing has been done yet.
    """
    out = Path(config["out"])
    if os.path.getsize(out / "metrics.jsonl") and not (config["resume"] or config["overwrite"]):
        raise UserError(f"--out: {out} now holds a run; take --resume, --overwrite or another directory")
    (out / "config.json").unlink(missing_ok=True)
    for path in out.iterdir():
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    os.truncate(out / "metrics.jsonl", 0)
    write_json(out / "config.json", config)


# ---------------------------------------------------------------- saving


def parts(policy):
    """What a checkpoint holds beside the model: {name: something with a state_dict}."""
    own = {"optimizer": policy.optimizer}
    if policy.prm:
        own |= {"prm": policy.prm.model, "prm_optimizer": policy.prm.optimizer}
    return own


def checksum(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path):
    """Carries a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextlib.contextmanager
def whole_or_none(folder):
    """If writing fails, removes the folder and raises OSError. Libraries have many names for a full disk."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder.parent).free / 2**20
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"{folder}: {one_line(error)}; {free:.1f} MiB were free there") from error


def save_model(policy, folder):
    """The policy as a Hugging Face folder, whole or not at all."""
    with whole_or_none(folder):
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)


def save(policy, number, o):
    """checkpoint/step-NUMBER: all that the next step needs. All processes call it. OSError if it fails."""
    state = {name: whole_state(part) for name, part in parts(policy).items()} | {"memory": policy.memory}
    if world()[0] > 0:
        return
    folder = Path(o.out, "checkpoint", f"step-{number}")
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    save_model(policy, new)
    with whole_or_none(new):
        torch.save(state, new / "state.pt")
        files = sorted(path for path in new.rglob("*") if path.is_file())
        sums = {str(path.relative_to(new)): checksum(path) for path in files}
        write_json(new / "sums.json", sums)
        logs = [Path(o.out, "metrics.jsonl"), Path(o.out, "samples.jsonl")]
        for path in [*files, new / "sums.json", new, *logs]:
            sync(path)
    shutil.rmtree(folder, ignore_errors=True)  # of this step there can only be a damaged one
    new.rename(folder)
    sync(folder.parent)
    prune(o.out, number)


def checkpoints(out, last=sys.maxsize):
    """Folders of finished checkpoints up to step `last`, whole or damaged, the latest first."""
    found = [(int(p.name[5:]), p) for p in Path(out, "checkpoint").glob("step-*") if p.name[5:].isdecimal()]
    return [path for number, path in sorted(found, reverse=True) if number <= last]


def prune(out, last):
    """Removes all checkpoints, finished or not, but the last finished ones up to step `last`."""
    kept = checkpoints(out, last)[:KEPT]
    for old in Path(out, "checkpoint").glob("step-*"):
        if old not in kept and old.name[5:].removesuffix(".new").isdecimal():  # a user's copies stay
            shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- going on


def damage(folder):
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((folder / "sums.json").read_text())
        for name, expected in {"state.pt": None, **sums}.items():
            if checksum(folder / name) != expected:
                return f"the checksum of {name} is wrong"
    except (OSError, ValueError, TypeError) as error:
        return f"{getattr(error, 'filename', None) or 'sums.json'} cannot be read"
    return None


def find(o):
    """(checkpoint to go on from, metrics up to it); (None, []) for a new run and for one that has none yet.

    Writes nothing. UserError if no checkpoint is whole, a log lacks steps, or options would change the run.
    """
    out = Path(o.out)
    if not o.resume or not ((out / "config.json").exists() or os.path.getsize(out / "metrics.jsonl")):
        return None, []
    refuse_changes(out, o)
    found = checkpoints(out)
    for folder in found:
        if fault := damage(folder):
            print(f"train.py: warning: {folder} is damaged ({fault}); taking the one before", file=sys.stderr)
            continue
        done = int(folder.name[5:])
        lines = read_log(out / "metrics.jsonl", done)[0]
        if [line["step"] for line in lines] != list(range(1, done + 1)):
            raise UserError(f"--resume: {out}/metrics.jsonl lacks steps; begin anew with --overwrite")
        return folder, lines
    if found:
        raise UserError(f"--resume: no checkpoint in {out}/checkpoint is whole; begin anew with --overwrite")
    return None, []


def refuse_changes(out, o):
    """Raises UserError where an option would make another run of the one that --out holds."""
    try:
        old = json.loads((out / "config.json").read_text())
        steps = int(old["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        what = f"{out} has no config.json that can be read"
        raise UserError(f"--resume: {what}; begin anew with --overwrite") from None
    changed = [f"--{name.replace('_', '-')} {old[name]}, not {value}"
               for name, value in vars(o).items() if name not in FREE and old.get(name, value) != value]
    if changed:
        raise UserError(f"--resume: {out} has {'; '.join(changed)}: give what it has, or begin another run")
    if o.steps < steps:
        raise UserError(f"--resume: {out} has --steps {steps}, which may grow, not shrink to {o.steps}")


def read_log(path, last):
    """(lines of a log up to step `last`, the bytes that they take). A line that was cut off ends it."""
    lines, size = [], 0
    for line in open(path, "rb") if path.exists() else ():
        try:
            row = json.loads(line)
            if not line.endswith(b"\n") or row["step"] > last:
                break
        except (ValueError, KeyError, TypeError):
            break
        lines.append(row)
        size += len(line)
    return lines, size


def go_on(config, done):
    """Cuts the logs back to step `done` and updates config.json. UserError if the prompts are other ones."""
    out = Path(config["out"])
    old = json.loads((out / "config.json").read_text())
    for name, digest in config["content"].items():
        if old.get("content", {}).get(name) != digest:
            option = name.replace("_", "-")
            raise UserError(f"--resume: the prompts of --{option} are not those that {out} began with")
    for log in ("metrics.jsonl", "samples.jsonl"):
        if (out / log).exists():
            os.truncate(out / log, read_log(out / log, done)[1])
    prune(out, done)  # a kill may have come before the older ones were removed
    write_json(out / "config.json", config)


def restore(policy, folder):
    """The state of all `parts` from a checkpoint. Raises UserError if it is not that of this policy."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        policy.memory = state["memory"]
        for name, part in parts(policy).items():
            part.load_state_dict(state[name])
            own = getattr(part, "optim", part)  # of a sharded optimizer: what this process keeps
            for p, moments in getattr(own, "state", {}).items():
                moments["step"] = moments["step"].to(p.device)  # fused AdamW wants it there
                if moments["exp_avg"].shape != p.shape:
                    raise ValueError("moments of another shape")
            if own is not part:
                part.state.clear()  # a second copy of the same moments
    except (KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        why = f"does not fit ({one_line(error)}); begin anew with --overwrite"
        raise UserError(f"--resume: {folder} {why}") from error
