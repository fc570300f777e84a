"""Watching a run: what ends it in good order, what stops it, and what it warns of.

    Ctrl-C, SIGTERM         the step is finished, a checkpoint saved, and a line says how to go on; once more, at once
    --max-hours             likewise
    --stop-when-entropy     the run is over: the final evaluation follows
    not finite              an update whose loss or gradient is not finite is skipped; ten in a row stop the run
    entropy                 a line when it falls below a tenth of where it started (collapse: what the papers are about), or
                            grows to more than twice that (explosion: a method that is too strong), with the option to turn
"""

import contextlib
import math
import os
import signal
import sys
import time

import torch

import data
from checkpoint import checkpoints
from parallel import world
from data import UserError

IN_A_ROW = 10  # skipped updates in a row that stop a run
ECHO = 2.0  # seconds: a scheduler signals torchrun and its processes, torchrun passes it on, and all this is one wish

HOLD = {"clip_cov": "--clip-cov-ratio", "kl_cov": "--kl-cov-ratio or --kl-cov-beta"}  # method: the option that says how much entropy it keeps


class Broken(RuntimeError):
    """A run that cannot usefully go on; the message is one line for the user."""


@contextlib.contextmanager
def signals(speak):
    """A list to which SIGINT and SIGTERM are added when they come; one that comes more than ECHO seconds after the first acts at once."""
    received, before, first = [], {}, []

    def handler(number, frame):
        first.append(time.monotonic())
        if time.monotonic() - first[0] > ECHO:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        elif not received:
            received.append(number)
            if speak:  # not by print, which a signal may have interrupted
                os.write(2, f"\n{signal.Signals(number).name}: stopping after this step; once more, {ECHO:g} seconds from now, stops at once\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def interruption(received, started, o):
    """(why to stop for now, exit status), or None."""
    if received:
        return signal.Signals(received[0]).name, 128 + received[0]
    if o.max_hours and time.time() - started > 3600 * o.max_hours:
        return f"--max-hours {o.max_hours:g}", 0
    return None


def entropy_is_spent(metrics, o):
    """Whether the run has come to --stop-when-entropy."""
    return bool(metrics and o.stop_when_entropy and metrics["entropy"] is not None and metrics["entropy"] < o.stop_when_entropy)


def count_bad(policy, log, number, o):
    """Counts updates in a row that were skipped as not finite, and raises Broken at the tenth."""
    policy.bad_updates = 0 if log["finite"] else policy.bad_updates + 1
    if policy.bad_updates >= IN_A_ROW:
        raise Broken(f"step {number}: {IN_A_ROW} updates in a row had a loss ({log['loss']:g}) or gradient norm ({log['grad_norm']:g}) that is not finite, "
                     f"and were skipped. Look at --lr {o.lr:g}, --temperature {o.temperature:g} and the weights of --model; to go on from the "
                     f"last checkpoint with other options, begin a run with --model {o.out}/checkpoint/step-N")  # fmt: skip


def remarks(metrics, first, said, o):
    """Lines about a step that the user should see. `said`, a set, holds what has been said before."""
    lines, H, H0 = [], metrics["entropy"], first["entropy"]
    step = f"step {metrics['step']}:"
    if metrics["skipped"]:
        lines.append(f"{step} {metrics['skipped']} updates skipped: loss or gradient not finite")
    elif not metrics["grad_norm"]:
        why = "no group had a signal (equal rewards in each)" if metrics["no_signal"] == 1 else "no token had a gradient"
        lines.append(f"{step} {why}{batch_of_one_kind(metrics, o)}, the policy was left as it was")
    turn = HOLD.get(o.method)
    if H is not None and H0 and H < H0 / 10 and "collapse" not in said:
        said.add("collapse")
        lines.append(f"{step} entropy {H:.3g} is below a tenth of the first step's {H0:.3g}: "
                     + (f"raise {turn} to keep more of it" if turn else "--method clip_cov or kl_cov keeps more of it"))  # fmt: skip
    if H is not None and H0 and H > 2 * H0 and "explosion" not in said:
        said.add("explosion")
        lines.append(f"{step} entropy {H:.3g} is more than twice the first step's {H0:.3g}: lower {turn + ', or ' if turn else ''}--lr {o.lr:g}")
    return lines


def batch_of_one_kind(metrics, o):
    """What all completions of a batch have in common, in words."""
    rewards = {0.0: ": all answers were wrong", 1.0: ": all answers were right"}.get(metrics["reward"], "")
    return rewards + f": all completions were cut off at --max-new-tokens {o.max_new_tokens}" * (metrics["truncated"] == 1)


def plain(value):
    """The value with None for every number that is not finite, for JSON."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sizes(o):
    """One line on running out of memory: what lowers it, and what was in use."""
    return (f"out of memory: lower --micro-batch {o.micro_batch} (tokens scored at a time), or --prompts {o.prompts}, --samples {o.samples} "
            f"or --max-new-tokens {o.max_new_tokens}; --sample-batch {o.sample_batch} (completions sampled at a time by a process); "
            "with several GPUs, --shard-optimizer")  # fmt: skip


def ending(run, o):
    """run(o), and its exit status: 2 for what the user gave, 1 for what went wrong meanwhile, each with one line on standard error."""
    saved = lambda: (f"what {o.out}/checkpoint holds is whole: --resume goes on from there" if checkpoints(o.out)
                     else "no checkpoint was saved yet: --overwrite begins anew")  # fmt: skip
    try:
        return run(o)
    except UserError as error:
        status, line = 2, str(error)
    except OSError as error:
        status, line = 1, f"{error}; {saved()}"
    except Broken as error:
        status, line = 1, str(error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error) and "DefaultCPUAllocator" not in str(error):
            raise
        sys.exit(print(f"train.py: error: {sizes(o)}; {saved()}", file=sys.stderr) or 1)  # of this process alone
    except KeyboardInterrupt:
        status, line = 130, f"stopped at once; {saved()}"
    if world()[0] == 0:
        print(f"train.py: error: {line}", file=sys.stderr)
    return status
