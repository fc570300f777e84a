"""Options: all that a run can be told, with defaults for the embedded task and where the values come from.

    python train.py --method kl_cov                the embedded policy on the embedded task
    python train.py @FILE --method kl_cov          options may stand in a file, with # for comments
    torchrun --nproc_per_node=8 train.py ...       the same options on eight GPUs

A wrong value ends with one line that names the option and what it takes, and exit status 2, before any model
is loaded (where it depends on the model: before anything is written).
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch

import losses
from rollout import TINY

# ---------------------------------------------------------------- kinds of values


def checked(kind, allowed, what):
    """A kind of value, int or float, of which only some are allowed: `what` says which."""

    def check(text):
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"takes {what}, got {text}")
        return value

    check.__name__ = kind.__name__
    return check


INT = checked(int, lambda x: 0 < x < 2**53, "a number above 0")
FLOAT = checked(float, lambda x: 0 < x < math.inf, "a number above 0")
NUMBER = checked(float, math.isfinite, "a finite number")
BOUND = checked(float, lambda x: 0 <= x < math.inf, "a number, 0 or more")
FRACTION = checked(float, lambda x: 0 < x <= 1, "a fraction above 0 and up to 1")
COUNT = checked(int, lambda x: 0 <= x < 2**53, "a whole number, 0 or more")


# ---------------------------------------------------------------- the options: name, kind, default, help

OPTIONS = {
    "policy and problems": [
        ("--model", str, TINY, "checkpoint folder or hub id of the starting policy"),
        ("--data", str, "arithmetic", "training problems: a known name, a local file or a hub id"),
        ("--eval-data", str, "arithmetic_heldout", "held-out problems, likewise"),
        ("--prompt-field", str, None, "column of the problem in other files (default: found by its name)"),
        ("--answer-field", str, None, "column of the gold answer, likewise"),
    ],
    "run": [
        ("--steps", INT, 800, "rollout batches"),
        ("--seed", int, 0, "seed of data order, sampling and selection"),
        ("--out", str, None, "run directory (default runs/METHOD-sSEED, or runs/METHOD-ADVANTAGE-sSEED)"),
        ("--save-every", INT, 20, "steps between checkpoints, of which the last two are kept"),
    ],
    "rollout": [
        ("--prompts", INT, 64, "problems a step; published 256"),
        ("--samples", INT, 8, "completions of each, its group; as published"),
        ("--temperature", FLOAT, 1.0, "of sampling and of the log-probs alike; as published"),
        ("--max-prompt-tokens", INT, 2048, "longer prompts are dropped; as published"),
        ("--max-new-tokens", INT, 40, "longest completion; published 8192"),
        ("--sample-batch", INT, 4096, "completions sampled at a time; changes only rounding"),
    ],
    "update": [
        ("--mini-batch", INT, 8, "problems an update: 8 updates a rollout batch, as published"),
        ("--passes", INT, 1, "times each rollout batch is gone through; as published"),
        ("--micro-batch", INT, 16384, "tokens in memory at a time; changes only rounding"),
        ("--lr", FLOAT, 3e-4, "learning rate of AdamW, constant; published 5e-7 for 7B"),
        ("--grad-clip", FLOAT, 1.0, "largest norm of the gradient; as published"),
    ],
    "methods": [
        ("--clip-low", FLOAT, None, "PPO clip from 1 - this (default 0.2, clip_cov 1; published)"),
        ("--clip-high", FLOAT, None, "to 1 + this (0.2, clip_higher 0.28, clip_cov 1; published)"),
        ("--clip-cov-ratio", FRACTION, 0.01, "clip_cov: fraction of tokens without gradient; published 2e-4"),
        ("--cov-low", NUMBER, 1.0, "clip_cov: candidates have a covariance above this; as published"),
        ("--cov-high", NUMBER, 1000.0, "clip_cov: and below this; published 5"),
        ("--kl-cov-ratio", FRACTION, 0.02, "kl_cov: fraction of tokens with the penalty; published 2e-3"),
        ("--kl-cov-beta", FLOAT, 3.0, "kl_cov: weight of the penalty; published 1"),
        ("--kl-cov-low", BOUND, 1.0, "kl_cov: only above this covariance; published 0, no bound"),
        ("--entropy-coef", FLOAT, 0.03, "entropy_bonus: weight of a nat of entropy; "
         "adaptive_entropy: its largest weight, published 5e-3"),
        ("--entropy-target", FLOAT, 0.1, "adaptive_entropy, entrocraft: nats that they hold; "
         "published: 0.2; 0.65 falling to 0.45"),
        ("--anneal", COUNT, None, "clip_cov, kl_cov, entropy_bonus, opefo, adaptive_entropy, entrocraft: "
         "steps over which their strength falls linearly to 0; 0: it is constant, as published (default 640 "
         "with the embedded problems, for any --steps; else 0)"),
        ("--kl-ref-beta", FLOAT, 0.04, "kl_ref: weight of the KL term (arXiv 2402.03300)"),
        ("--entropy-fraction", FRACTION, None, "high_entropy, low_entropy: fraction of tokens that is kept "
         "(default 0.2 and 0.8, arXiv 2506.01939)"),
    ],
    "advantage": [
        ("--prm-beta", FLOAT, 0.05, "prime: scale of the process rewards; as published"),
        ("--prm-lr", FLOAT, None, "prime: learning rate of its model (default 2 x --lr)"),
    ],
    "evaluation": [
        ("--eval-every", INT, 10, "steps between evaluations on --eval-data"),
        ("--eval-limit", INT, 512, "problems of --eval-data that are used"),
        ("--final-samples", INT, 32, "completions of each for pass@k of the final policy"),
    ],
}


def say(line):
    """A line on standard error, from one process of each node: what is wrong may be so on one node only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"train.py: {' '.join(str(line).split())}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse, with files of options that may hold comments, and errors of one line."""

    def convert_arg_line_to_args(self, line):
        return line.split("#")[0].split()

    def error(self, message):
        say(f"error: {message}")
        sys.exit(2)


def command_line():
    """The parser."""
    parser = Parser(prog="train.py", description=__doc__, fromfile_prefix_chars="@", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=losses.METHODS, required=True, help="what is optimised: see losses.py")
    add("--advantage", choices=losses.ESTIMATORS, default="grpo", help="its estimator (default grpo)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU if there is one")
    add("--precision", choices=("fp32", "bf16"), help="of sampling and of products; the trained weights, "
        "gradients and moments are fp32 (default bf16 on a GPU, else fp32; few CPUs compute in bf16)")
    add("--filter-groups", action="store_true", help="drop groups whose rewards are all equal and sample "
        "more problems until the batch is full, in at most 10 rounds a step (published; arXiv 2503.14476)")
    add("--resume", action="store_true", help="continue the run that --out holds from its last checkpoint")
    add("--overwrite", action="store_true", help="replace a run that --out already holds")
    add("--shard-optimizer", action="store_true", help="each process keeps the moments of AdamW only for its "
        "share of the parameters, to save memory")
    add("--gradient-checkpointing", action="store_true", help="compute activations again in the backward "
        "pass, to save memory, for a third more operations in the update")
    for heading, rows in OPTIONS.items():
        group = parser.add_argument_group(heading)
        for name, kind, default, text in rows:
            text += "" if default is None else f" (default {default})"
            group.add_argument(name, type=kind, default=default, metavar=kind.__name__.upper(), help=text)
    return parser


def options(argv=None):
    """The options as used. Defaults that depend on other options are filled in, and conflicts refused."""
    parser = command_line()
    try:
        o = parser.parse_args(argv)
    except (RecursionError, UnicodeDecodeError):
        files = " ".join(word for word in argv or sys.argv if word.startswith("@"))
        parser.error(f"{files}: a file of options includes itself or is not UTF-8")
    low, high = {"clip_higher": (0.2, 0.28), "clip_cov": (1.0, 1.0)}.get(o.method, (0.2, 0.2))
    o.clip_low, o.clip_high = o.clip_low or low, o.clip_high or high
    o.entropy_fraction = o.entropy_fraction or (0.8 if o.method == "low_entropy" else 0.2)
    o.prm_lr = o.prm_lr or 2 * o.lr
    o.precision = o.precision or ("bf16" if o.device == "cuda" else "fp32")
    if o.anneal is None:
        o.anneal = 640 if o.data == "arithmetic" else 0
    estimator = "" if o.advantage == "grpo" else f"-{o.advantage}"
    o.out = o.out or f"runs/{o.method}{estimator}-s{o.seed}"
    if fault := conflict(o):
        parser.error(fault)
    try:
        check_out(o)
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {getattr(error, 'strerror', None) or error}: {o.out[:200]!r}")
    if o.method == "kl_cov" and o.prompts == o.mini_batch and o.passes == 1:
        say("warning: kl_cov with one update a rollout batch is plain policy gradient: its penalty "
            "|logp - old_logp| has no gradient before the policy has moved; take a smaller --mini-batch")
    return o


def conflict(o):
    """What is wrong with the options beside each other or on this machine, or None."""
    gpus = torch.cuda.device_count()
    if o.samples < 2 and o.advantage not in losses.COMPARE_BATCH:
        return f"argument --samples: takes 2 or more with --advantage {o.advantage}, which compares them"
    if o.samples * o.prompts < 2:
        return "argument --prompts: takes 2 or more with --samples 1: completions of the batch are compared"
    if o.advantage in losses.COMPARE_BATCH and o.filter_groups:
        return (f"argument --filter-groups: not with --advantage {o.advantage}, which compares with the "
                "whole batch: to it a group with equal rewards is a signal")
    if o.prompts % o.mini_batch:
        return f"argument --mini-batch: takes a divisor of --prompts {o.prompts}, got {o.mini_batch}"
    if o.cov_low >= o.cov_high:
        return f"argument --cov-low: takes a number below --cov-high {o.cov_high:g}, got {o.cov_low:g}"
    if o.resume and o.overwrite:
        return "argument --resume: goes on with the run that --overwrite would remove; take one of them"
    if o.device == "cuda" and not gpus:
        return "argument --device: there is no GPU that PyTorch can use; take cpu"
    if o.device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        return f"argument --device: each process takes a GPU; take torchrun --nproc_per_node={gpus}"


def check_out(o):
    """Raises ValueError or OSError if --out cannot be a run directory, or holds no run to resume."""
    out = Path(o.out)
    o.out.encode()  # a name that is not UTF-8 could not be written into config.json
    sources = [Path(name).resolve() for name in (o.model, o.data, o.eval_data) if os.path.exists(name)]
    lost = [str(path) for path in sources if o.overwrite and path.is_relative_to(out.resolve())]
    if lost:
        raise ValueError(f"--overwrite would remove {lost[0]}, which the run needs; take another directory")
    if (out / "metrics.jsonl").is_file():
        if not (o.resume or o.overwrite):
            raise ValueError("already holds a run; take --resume, --overwrite or another directory")
    elif o.resume:
        raise ValueError("holds no run for --resume")
    elif os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):  # no run is ever deleted
        raise ValueError("exists and holds no run; take another directory")
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is no directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write in {there}")
