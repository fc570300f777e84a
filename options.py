"""Options: all that a run can be told, with defaults for the embedded task and where they come from.

    python train.py --method kl_cov                the embedded policy on the embedded task
    python train.py @FILE --method kl_cov          options may stand in a file, any number to a line, # for comments
    torchrun --nproc_per_node=8 train.py ...       the same options on eight GPUs

A wrong value ends with one line that names the option and what it takes, and exit status 2, before any
model is loaded.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

import losses
import rollout

# ---------------------------------------------------------------- kinds of values


def positive(kind):
    """A number above 0 of a kind, int or float."""

    def check(text):
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"takes a number above 0, got {text}")
        return value

    check.__name__ = kind.__name__
    return check


def number(text):
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"takes a finite number, got {text}")
    return value


def fraction(text):
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"takes a fraction between 0 and 1, got {text}")
    return value


# ---------------------------------------------------------------- the options: name, kind, default, help

OPTIONS = {
    "policy and problems": [
        ("--model", str, rollout.TINY, "checkpoint folder or hub id of the starting policy (default: the embedded tiny/)"),
        ("--data", str, "arithmetic", "training problems: a known name, a local file or a hub id (default: the embedded task)"),
        ("--eval-data", str, "arithmetic_heldout", "held-out problems, likewise (default: those of the embedded task)"),
        ("--prompt-field", str, None, "column of the problem in files with unknown columns (default: found by its name)"),
        ("--answer-field", str, None, "column of the gold answer, likewise (default: found by its name)"),
    ],
    "run": [
        ("--steps", positive(int), 200, "rollout batches (default 200)"),
        ("--seed", int, 0, "seed of data order, sampling and selection (default 0)"),
        ("--out", str, None, "run directory (default runs/METHOD-sSEED)"),
        ("--save-every", positive(int), 20, "steps between checkpoints (default 20)"),
    ],
    "rollout": [
        ("--prompts", positive(int), 64, "problems a step (default 64; published 256)"),
        ("--samples", positive(int), 8, "completions of each, its group (default 8, as published)"),
        ("--temperature", positive(float), 1.0, "of sampling and of the log-probs alike (default 1, as published)"),
        ("--max-prompt-tokens", positive(int), 2048, "longer prompts are dropped (default 2048, as published)"),
        ("--max-new-tokens", positive(int), 40, "longest completion (default 40, for the embedded task; published 8192)"),
    ],
    "update": [
        ("--mini-batch", positive(int), 8, "problems an update (default 8: 8 updates a rollout batch, as published)"),
        ("--passes", positive(int), 1, "times each rollout batch is gone through (default 1, as published)"),
        ("--micro-batch", positive(int), 16384, "tokens in memory at a time, padding included (default 16384); changes no result"),
        ("--lr", positive(float), 3e-4, "learning rate of AdamW, constant, no weight decay (default 3e-4, for the embedded policy; published 5e-7 for 7B)"),
        ("--grad-clip", positive(float), 1.0, "largest norm of the gradient (default 1, as published)"),
    ],
    "methods": [
        ("--clip-low", positive(float), None, "PPO clip: ratio from 1 - this (default 0.2 for grpo, 1 for clip_cov, as published)"),
        ("--clip-high", positive(float), None, "PPO clip: ratio up to 1 + this (defaults as for --clip-low)"),
        ("--clip-cov-ratio", fraction, 0.01, "clip_cov: fraction of tokens without gradient (default 0.01, for small batches; published 2e-4)"),
        ("--cov-low", number, 1.0, "clip_cov: candidates have a covariance above this (default 1, as published)"),
        ("--cov-high", number, 1000.0, "clip_cov: and below this (default 1000; published 5)"),
        ("--kl-cov-ratio", fraction, 0.01, "kl_cov: fraction of tokens with the penalty (default 0.01, for small batches; published 2e-3 for 7B)"),
        ("--kl-cov-beta", positive(float), 3.0, "kl_cov: weight of the penalty (default 3, for the embedded task; published 1)"),
    ],
    "evaluation": [
        ("--eval-every", positive(int), 5, "steps between evaluations on --eval-data (default 5)"),
        ("--eval-limit", positive(int), 512, "problems of --eval-data that are used (default 512)"),
        ("--final-samples", positive(int), 32, "completions of each for pass@k of the final policy (default 32)"),
    ],
}  # fmt: skip


def command_line():
    """The parser."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, fromfile_prefix_chars="@",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    parser.error = lambda message: sys.exit(print(f"train.py: error: {message}", file=sys.stderr) or 2)
    parser.add_argument("--method", choices=losses.METHODS, required=True, help="what is optimised: see losses.py")
    parser.add_argument("--advantage", choices=losses.ESTIMATORS, default="grpo", help="estimator of the advantage (default grpo)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: a GPU if there is one")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue the run that --out holds from its last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that --out already holds")
    parser.add_argument("--check-theorem", action="store_true",
                        help="measure at every update whether -Cov(log pi, change of logits) foretells the change of entropy: see theorem.py")  # fmt: skip
    for heading, rows in OPTIONS.items():
        group = parser.add_argument_group(heading)
        for name, kind, default, text in rows:
            group.add_argument(name, type=kind, default=default, metavar=kind.__name__.upper(), help=text)
    return parser


def options(argv=None):
    """The options as used, with the defaults that depend on the method, and what each may not be beside the others."""
    parser = command_line()
    o = parser.parse_args(argv)
    clip = 1.0 if o.method == "clip_cov" else 0.2
    o.clip_low, o.clip_high = o.clip_low or clip, o.clip_high or clip
    o.out = o.out or f"runs/{o.method}-s{o.seed}"
    if o.samples < 2:
        parser.error("argument --samples: takes 2 or more: the advantage compares the samples of a group")
    if o.prompts % o.mini_batch:
        parser.error(f"argument --mini-batch: takes a divisor of --prompts {o.prompts}, got {o.mini_batch}")
    if o.method == "kl_cov" and o.prompts == o.mini_batch and o.passes == 1:
        print("train.py: warning: kl_cov with one update for each rollout batch is plain policy gradient: its penalty "
              "|logp - old_logp| has no gradient before the policy has moved; take a smaller --mini-batch or more --passes", file=sys.stderr)  # fmt: skip
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no GPU that PyTorch can use; take cpu")
    if o.cov_low >= o.cov_high:
        parser.error(f"argument --cov-low: takes a number below --cov-high {o.cov_high:g}, got {o.cov_low:g}")
    if (Path(o.out) / "metrics.jsonl").exists():
        if not (o.resume or o.overwrite):
            parser.error(f"argument --out: {o.out} already holds a run; take --resume, --overwrite or another directory")
    elif Path(o.out).is_file() or Path(o.out).is_dir() and any(Path(o.out).iterdir()):  # what is no run is never deleted
        parser.error(f"argument --out: {o.out} exists and holds no run; take another directory")
    if o.resume and not (Path(o.out) / "checkpoint").is_dir():
        parser.error(f"argument --resume: {o.out} holds no checkpoint")
    return o
