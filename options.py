"""Options: all that a run can be told, with defaults for the embedded task and where they come from.

    python train.py --method kl_cov                the embedded policy on the embedded task
    python train.py @FILE --method kl_cov          options may stand in a file, any number to a line, # for comments
    torchrun --nproc_per_node=8 train.py ...       the same options on eight GPUs

A wrong value ends with one line that names the option and what it takes, and exit status 2, before any
model is loaded.
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


def positive(kind):
    """A number above 0 of a kind, int or float."""

    def check(text):
        value = kind(text)
        if not 0 < value < (math.inf if kind is float else 2**53):
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
        ("--model", str, TINY, "checkpoint folder or hub id of the starting policy (default: the embedded tiny/)"),
        ("--data", str, "arithmetic", "training problems: a known name, a local file or a hub id (default: the embedded task)"),
        ("--eval-data", str, "arithmetic_heldout", "held-out problems, likewise (default: those of the embedded task)"),
        ("--prompt-field", str, None, "column of the problem in files with unknown columns (default: found by its name)"),
        ("--answer-field", str, None, "column of the gold answer, likewise (default: found by its name)"),
    ],
    "run": [
        ("--steps", positive(int), 200, "rollout batches (default 200)"),
        ("--seed", int, 0, "seed of data order, sampling and selection (default 0)"),
        ("--out", str, None, "run directory (default runs/METHOD-sSEED, with another --advantage than grpo runs/METHOD-ADVANTAGE-sSEED)"),
        ("--save-every", positive(int), 20, "steps between checkpoints, of which the last two are kept (default 20)"),
        ("--max-hours", positive(float), None, "hours after which the run saves and stops, to go on with --resume (default: none)"),
        ("--stop-when-entropy", positive(float), None, "policy entropy, nats per token, below which the run is over (default: none)"),
    ],
    "rollout": [
        ("--prompts", positive(int), 64, "problems a step (default 64; published 256)"),
        ("--samples", positive(int), 8, "completions of each, its group (default 8, as published)"),
        ("--temperature", positive(float), 1.0, "of sampling and of the log-probs alike (default 1, as published)"),
        ("--max-prompt-tokens", positive(int), 2048, "longer prompts are dropped (default 2048, as published)"),
        ("--sample-batch", positive(int), 4096, "completions sampled at a time by each process (default 4096); changes results by rounding alone"),
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
        ("--clip-low", positive(float), None, "PPO clip, all but kl_cov: ratio from 1 - this (default 0.2; 1 for clip_cov, as published)"),
        ("--clip-high", positive(float), None, "and up to 1 + this (default 0.2; 0.28 for clip_higher and 1 for clip_cov, as published)"),
        ("--clip-cov-ratio", fraction, 0.01, "clip_cov: fraction of tokens without gradient (default 0.01, for small batches; published 2e-4)"),
        ("--cov-low", number, 1.0, "clip_cov: candidates have a covariance above this (default 1, as published)"),
        ("--cov-high", number, 1000.0, "clip_cov: and below this (default 1000; published 5)"),
        ("--kl-cov-ratio", fraction, 0.01, "kl_cov: fraction of tokens with the penalty (default 0.01, for small batches; published 2e-3 for 7B)"),
        ("--kl-cov-beta", positive(float), 3.0, "kl_cov: weight of the penalty (default 3, for the embedded task; published 1)"),
        ("--entropy-coef", positive(float), 0.03, "entropy_bonus: weight of a nat of entropy (default 0.03, for the embedded task)"),
        ("--kl-ref-beta", positive(float), 0.04, "kl_ref: weight of the KL to the starting policy (default 0.04, that of arXiv 2402.03300)"),
        ("--entropy-fraction", fraction, None, "high_entropy, low_entropy: fraction of the tokens of a mini-batch that is trained on "
         "(default 0.2 for high_entropy, 0.8 for low_entropy, as published in arXiv 2506.01939)"),
    ],
    "advantage": [
        ("--prm-beta", positive(float), 0.05, "prime: scale of the process rewards (default 0.05, as published in arXiv 2502.01456)"),
        ("--prm-lr", positive(float), None, "prime: learning rate of the process reward model (default twice --lr, as published: 1e-6 beside 5e-7)"),
    ],
    "evaluation": [
        ("--eval-every", positive(int), 5, "steps between evaluations on --eval-data (default 5)"),
        ("--eval-limit", positive(int), 512, "problems of --eval-data that are used (default 512)"),
        ("--final-samples", positive(int), 32, "completions of each for pass@k of the final policy (default 32)"),
    ],
}  # fmt: skip


def refuse(message):
    """One line on standard error and exit status 2."""
    say(f"error: {' '.join(message.split())}")
    sys.exit(2)


def say(line):
    """A line on standard error, from one process of each node: what is wrong may be so on one of them only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"train.py: {line}", file=sys.stderr)


def command_line():
    """The parser."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, fromfile_prefix_chars="@", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    parser.error = refuse
    parser.add_argument("--method", choices=losses.METHODS, required=True, help="what is optimised: see losses.py")
    parser.add_argument("--advantage", choices=losses.ESTIMATORS, default="grpo", help="estimator of the advantage (default grpo)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: a GPU if there is one")  # fmt: skip
    parser.add_argument("--filter-groups", action="store_true", help="drop groups whose rewards are all equal and sample more problems "
                        "until the batch is full, in at most 10 rounds a step (published; arXiv 2503.14476)")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue the run that --out holds from its last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that --out already holds")
    parser.add_argument("--shard-optimizer", action="store_true",
                        help="with several processes: each keeps its share of the moments of AdamW only, to save memory; changes no result")  # fmt: skip
    parser.add_argument("--gradient-checkpointing", action="store_true",
                        help="keep only each layer's input for the backward pass, to save memory: a third more operations in the update; changes no result")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="record the first steps but one, three of them, in OUT/trace.json.gz, for chrome://tracing or Perfetto")
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
    try:
        o = parser.parse_args(argv)
    except (RecursionError, UnicodeDecodeError) as error:
        files = " ".join(word for word in argv or sys.argv[1:] if word.startswith("@"))
        parser.error(f"{files}: a file of options that {'names itself' if isinstance(error, RecursionError) else 'is not UTF-8'}")
    low, high = {"clip_higher": (0.2, 0.28), "clip_cov": (1.0, 1.0)}.get(o.method, (0.2, 0.2))
    o.clip_low, o.clip_high = o.clip_low or low, o.clip_high or high
    if o.entropy_fraction == 0:
        parser.error("argument --entropy-fraction: takes a fraction above 0: without tokens there is no update")
    o.entropy_fraction = o.entropy_fraction or (0.8 if o.method == "low_entropy" else 0.2)
    o.prm_lr = o.prm_lr or 2 * o.lr
    estimator = "" if o.advantage == "grpo" else f"-{o.advantage}"
    o.out = o.out or f"runs/{o.method}{estimator}-s{o.seed}"
    if o.samples < 2 and o.advantage not in losses.COMPARE_BATCH:
        parser.error(f"argument --samples: takes 2 or more with --advantage {o.advantage}, which compares the samples of a group")
    if o.advantage in losses.COMPARE_BATCH and o.filter_groups:
        parser.error(f"argument --filter-groups: not with --advantage {o.advantage}: it compares with the whole batch, "
                     "to it a group with equal rewards is a signal")  # fmt: skip
    if o.samples * o.prompts < 2:
        parser.error("argument --prompts: takes 2 or more with --samples 1: the advantage compares the completions of the batch")
    if o.prompts % o.mini_batch:
        parser.error(f"argument --mini-batch: takes a divisor of --prompts {o.prompts}, got {o.mini_batch}")
    if o.method == "kl_cov" and o.prompts == o.mini_batch and o.passes == 1:
        say("warning: kl_cov with one update for each rollout batch is plain policy gradient: its penalty |logp - old_logp| "
            "has no gradient before the policy has moved; take a smaller --mini-batch or more --passes")  # fmt: skip
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no GPU that PyTorch can use; take cpu")
    if o.device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > (gpus := torch.cuda.device_count()):
        parser.error(f"argument --device: takes a GPU for each process, and there are {gpus} here; take torchrun --nproc_per_node={gpus}")
    if o.cov_low >= o.cov_high:
        parser.error(f"argument --cov-low: takes a number below --cov-high {o.cov_high:g}, got {o.cov_low:g}")
    if o.resume and o.overwrite:
        parser.error("argument --resume: goes on with the run that --overwrite would remove; take one of them")
    try:
        check_out(o)
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {getattr(error, 'strerror', None) or error}: {o.out[:200]!r}")
    return o


def check_out(o):
    """That --out can be a run directory, and is one if there is something to resume. Raises ValueError or OSError if not."""
    out = Path(o.out)
    o.out.encode()  # a name that is not UTF-8 could not be written into config.json, nor by safetensors
    sources = [Path(name).resolve() for name in (o.model, o.data, o.eval_data) if o.overwrite and os.path.exists(name)]
    if lost := [str(path) for path in sources if path.is_relative_to(out.resolve())]:
        raise ValueError(f"--overwrite would remove {lost[0]}, which the run needs; take another directory")
    if (out / "metrics.jsonl").is_file():
        if not (o.resume or o.overwrite):
            raise ValueError("already holds a run; take --resume, --overwrite or another directory")
    elif o.resume:
        raise ValueError("holds no run for --resume")
    elif os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):  # what is no run is never deleted
        raise ValueError("exists and holds no run; take another directory")
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is no directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write in {there}")
