"""Run directory: what a run leaves behind, and how it goes on after it was stopped.

    config.json          every option as used, versions, git commit, what the problems were
    metrics.jsonl        a line for each step            samples.jsonl    a few completions, token by token
    checkpoint/step-N/   the last two: the policy as a Hugging Face folder, state.pt with the rest, and sums.json
    model/               the final policy                final.json, curves.png

A checkpoint is written beside, as step-N.new, carried to the disk, and renamed; older ones are removed only then. So a
run may be killed at any moment and the last whole checkpoint is there. `--resume` takes the latest whose sums are right,
cuts the logs back to its step, and goes on: metrics.jsonl becomes what it would have been, to the digit on a CPU (the
backward pass of a GPU's attention adds up in an order that changes).

All randomness follows from (seed, step, purpose), so there are no generator states to keep.
Only rank 0 reads and writes the logs; with several nodes, --out is a folder that all of them see.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import losses
import plot
from parallel import collect_shards, world
from data import UserError

KEPT = 2  # checkpoints
HELD = []  # the handle of the run directory's lock
FREE = {  # options in which a run that goes on may differ: they change no line of metrics.jsonl (by more than rounding), or only its end
    "resume", "overwrite", "out", "steps", "save_every", "max_hours", "stop_when_entropy", "micro_batch", "sample_batch", "shard_optimizer", "final_samples",
    "gradient_checkpointing", "profile",
}  # fmt: skip


def describe(o, problems, held_out):
    """config.json: every option as used, versions, the git commit if there is one, and digests of the problems."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
    content = {"data": digest(problems), "eval_data": digest(held_out)}
    return vars(o) | {"processes": world()[1], "versions": versions, "commit": git.stdout.strip() or None, "content": content}


def write(path, text):
    """A small file, whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def sync(path):
    """Carries a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def take(out):
    """Keeps other processes out of a run directory until `release`, or the end of this process. Raises UserError if one is at work there
    (torchrun's processes, for one, outlive a torchrun that was killed)."""
    if HELD:
        return
    HELD.append(os.open(out / "metrics.jsonl", os.O_RDWR | os.O_CREAT))  # by this file a directory is known to be a run's
    try:
        fcntl.flock(HELD[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        release()
        raise UserError(f"--out: another process is at work in {out}") from None
    except OSError:
        pass  # a file system without locks


def release():
    """Lets others in."""
    while HELD:
        os.close(HELD.pop())


def begin(config):
    """An empty run directory. config.json leaves first and comes last: where it is missing, nothing has been done yet."""
    out = Path(config["out"])
    out.mkdir(parents=True, exist_ok=True)
    take(out)
    if (out / "metrics.jsonl").stat().st_size and not (config["resume"] or config["overwrite"]):
        raise UserError(f"--out: another process has begun a run in {out} meanwhile")
    (out / "metrics.jsonl").write_text("")
    (out / "config.json").unlink(missing_ok=True)
    for path in out.iterdir():
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write(out / "config.json", json.dumps(config, indent=1))


# ---------------------------------------------------------------- saving


def checksum(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def whole_or_none(folder):
    """Removes the folder that is written within if that fails, and raises OSError: a full disk has many names, among them
    OSError, SafetensorError, torch's RuntimeError and tokenizers' Exception."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder.parent).free / 2**20
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"{folder}: {(str(error) or type(error).__name__).splitlines()[0]}; {free:.1f} MiB were free there") from error


def save(policy, number, o):
    """checkpoint/step-NUMBER: all that the next step needs. Called by all processes. Raises OSError if it cannot be written."""
    for part in policy.kept.values():
        if hasattr(part, "optim"):  # sharded: rank 0 collects what the others keep
            collect_shards(part)
    if world()[0] > 0:
        return
    out, folder = Path(o.out), Path(o.out) / "checkpoint" / f"step-{number}"
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    with whole_or_none(new):
        write_checkpoint(policy, number, new)
        for log in ("metrics.jsonl", "samples.jsonl"):
            sync(out / log)
    shutil.rmtree(folder, ignore_errors=True)  # of this step there can only be a damaged one
    new.rename(folder)
    sync(folder.parent)
    prune(out, number)


def prune(out, last):
    """Removes all but the last finished checkpoints up to step `last`."""
    for old in set((out / "checkpoint").iterdir()) - set(checkpoints(out, last)[:KEPT]):
        shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(policy, number, folder):
    """The files of a checkpoint and their sums, all of them on the disk when this returns."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    state = {"step": number, "rounds": policy.rounds, "bad_updates": policy.bad_updates} | {name: part.state_dict() for name, part in policy.kept.items()}
    torch.save(state, folder / "state.pt")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    (folder / "sums.json").write_text(json.dumps({str(path.relative_to(folder)): checksum(path) for path in files}, indent=1))
    for path in [*files, folder / "sums.json", folder]:
        sync(path)


# ---------------------------------------------------------------- going on


def checkpoints(out, last=sys.maxsize):
    """Folders of finished checkpoints up to step `last`, whole or damaged, the latest first."""
    number = lambda path: int(path.name.removeprefix("step-")) if path.name.removeprefix("step-").isdecimal() else -1
    found = [path for path in Path(out, "checkpoint").glob("*") if path.suffix != ".new" and number(path) <= last]
    return sorted(found, key=number, reverse=True)


def damage(folder):
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((folder / "sums.json").read_text())
        for name, expected in {"state.pt": None, **sums}.items():
            if checksum(folder / name) != expected:
                return f"the checksum of {name} is wrong"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"{getattr(error, 'filename', None) or 'sums.json'} cannot be read"
    return None


def find(o):
    """(checkpoint to go on from, metrics up to it); (None, []) for a new run and for one that was stopped before its first.

    Raises UserError if no checkpoint is whole, a log lacks steps, or options would change the run. Writes nothing.
    """
    out = Path(o.out)
    if (out / "metrics.jsonl").exists():
        take(out)
    if not o.resume or not (out / "config.json").exists():
        return None, []
    refuse_changes(out, o)
    damaged = 0
    for folder in checkpoints(out):
        if fault := damage(folder):
            print(f"train.py: warning: {folder} is damaged ({fault}); the checkpoint before it is used", file=sys.stderr)
            damaged += 1
            continue
        done = int(folder.name.removeprefix("step-"))
        lines, _ = read_log(out / "metrics.jsonl", done)
        if [line["step"] for line in lines if "entropy" in line] != list(range(1, done + 1)):
            raise UserError(f"--resume: {out}/metrics.jsonl does not hold the figures of steps 1 to {done} of {folder}; begin anew with --overwrite")
        return folder, lines
    if damaged:
        raise UserError(f"--resume: no checkpoint in {out}/checkpoint is whole; begin anew with --overwrite")
    return None, []


def refuse_changes(out, o):
    """Raises UserError where an option would make another run of the one that --out holds."""
    try:
        old = json.loads((out / "config.json").read_text())
        steps, _ = int(old["steps"]), dict(old["content"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"--resume: {out}/config.json cannot be read; begin anew with --overwrite") from None
    option = lambda name: "--" + name.replace("_", "-")
    changed = [f"{option(name)} {old[name]}, not {value}" for name, value in vars(o).items() if name not in FREE and old.get(name, value) != value]
    if changed:
        raise UserError(f"--resume: the run in {out} has {'; '.join(changed)}: give what it has, or begin another run")
    if o.steps < steps:
        raise UserError(f"--resume: the run in {out} has --steps {steps}, which may grow, not shrink to {o.steps}")


def read_log(path, last):
    """(lines of a log up to step `last`, the bytes that they take). A line that was cut off ends it."""
    lines, size = [], 0
    for line in open(path, "rb") if path.exists() else ():
        try:
            row = json.loads(line) if line.endswith(b"\n") else {"step": sys.maxsize}
            if row["step"] > last:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        lines.append(row)
        size += len(line)
    return lines, size


def go_on(config, done):
    """The logs cut back to step `done`, in place, and config.json brought up to date."""
    out = Path(config["out"])
    old = json.loads((out / "config.json").read_text())
    for name, digest in config["content"].items():
        if old["content"].get(name) != digest:
            raise UserError(f"--resume: the problems of --{name.replace('_', '-')} are not those that the run in {out} began with")
    for log in ("metrics.jsonl", "samples.jsonl"):
        if (out / log).exists():
            os.truncate(out / log, read_log(out / log, done)[1])
    prune(out, done)  # a kill may have come before the older ones were removed
    write(out / "config.json", json.dumps(config, indent=1))


def restore(policy, folder):
    """State of a checkpoint's optimizer, and of all else in policy.kept. Raises UserError if it is not that of this policy."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        policy.rounds, policy.bad_updates = state["rounds"], state["bad_updates"]
        for name, part in policy.kept.items():
            part.load_state_dict(state[name])
            for p, moments in getattr(part, "optim", part).state.items() if hasattr(part, "param_groups") else ():
                moments["step"] = moments["step"].to(p.device)  # the sharded optimizer leaves it on the CPU, fused AdamW wants it here
                if moments["exp_avg"].shape != p.shape:
                    raise ValueError("moments of another shape")
            if hasattr(part, "optim"):
                part.state.clear()  # sharded: the same again, on the GPU as well
    except (KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--resume: {folder}/state.pt is not the state of this run ({what}); begin anew with --overwrite") from error


# ---------------------------------------------------------------- the end


def conclude(policy, greedy, sampled, first, last, seconds, o):
    """model/, curves.png, final.json, and the line that says what happened. greedy, sampled: eval.summary of the final policy."""
    out = Path(o.out)
    with whole_or_none(out / "model"):
        policy.model.save_pretrained(out / "model")
        policy.tokenizer.save_pretrained(out / "model")
    plot.curves([out], out / "curves.png")
    final = {"accuracy": greedy["accuracy"], "accuracy_sampled": sampled["accuracy"], "pass_at": sampled["pass"]}
    write(out / "final.json", json.dumps(final, indent=1))  # last: by this a run is known to be over
    others = " or ".join(m for m in losses.METHODS if m != o.method)
    entropy = " -> ".join("undefined" if x["entropy"] is None else f"{x['entropy']:.3f}" for x in (first, last))
    print(f"{o.method}, {last['step']} steps in {seconds:.0f} s: entropy {entropy} nats, "
          f"held-out accuracy {first['accuracy']:.1%} -> {final['accuracy']:.1%} (sampled {final['accuracy_sampled']:.1%}, "
          f"pass@{o.final_samples} {final['pass_at'][str(o.final_samples)]:.1%}). See {out}/curves.png. Next: --method {others}, "
          f"then python plot.py {out.parent}/*")  # fmt: skip
