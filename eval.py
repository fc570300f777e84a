"""Benchmarks: how often a model is right, how sure one can be of it, and what it reaches in k attempts.

    python eval.py --model tiny --benchmarks arithmetic_heldout
    python eval.py --model A B C --benchmarks math500 aime24 aime25 amc23 omni_math olympiadbench minerva

Completions come from the sampler of the training (rollout.py), rewards from its verifier (reward.py). Of
P problems, n completions are sampled for each, and c of them are right:

    avg@n     = mean over problems of c / n                        the accuracy
    pass@k    = mean over problems of 1 - C(n - c, k) / C(n, k)    unbiased for every k <= n
    interval  = Wilson's, with P p (1 - p) / Var(c / n) in the place of the number of trials

Completions of one problem resemble each other, so the problem is the unit of the interval, not the
completion: with n = 1 the number of trials is P, and more completions make it larger only as far as they
make the problems' means agree. Unlike mean +- 1.96 standard errors, Wilson's interval stays between 0 and 1
and does not shrink to nothing when all answers are right or all are wrong.

Protocol of the paper (arXiv 2505.22617), the default here: AIME and AMC are sampled 32 times at
temperature 0.6, all others are decoded greedily, once; at most 8192 tokens. pass@k: arXiv 2107.03374.
Wilson, J. Am. Stat. Assoc. 22 (1927); number of trials: Korn and Graubard, Surv. Methodol. 24 (1998).

Random numbers belong to a problem, so the batch changes an answer only by rounding. FILE.json is written
after each benchmark, and what it holds is not computed again: an interrupted command can be repeated.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import reward
import rollout
from checkpoint import write_json
from data import EMBEDDED, KNOWN, UserError, encode_problems, load_problems, one_line, out_of_memory
from options import BOUND, INT
from rollout import context, load_policy

# 1. What is measured.


def pass_at_k(n, c, k):
    """Chance that at least one of k attempts is right, if c of n attempts were: 1 - C(n-c, k) / C(n, k).

    As a product, 1 - prod_{i=n-c+1..n} (1 - k/i), for the binomials overflow.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def interval(means, samples, z=1.96):
    """95% interval of the accuracy, from each problem's mean over its samples: (low, high)."""
    P, p = len(means), sum(means) / len(means)
    variance = sum((m - p) ** 2 for m in means) / P
    trials = min(P * p * (1 - p) / variance, P * samples) if variance > 0 else P
    centre, half = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    return max(0.0, (centre - half) / (1 + z * z / trials)), min(1.0, (centre + half) / (1 + z * z / trials))


def summary(records, timeouts=0):
    """The figures of a benchmark from its problems' records. Shares are from 0 to 1, lengths in tokens."""
    n = len(records[0]["rewards"])
    right = [round(sum(record["rewards"])) for record in records]
    lengths = [length for record in records for length in record["lengths"]]
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    return {
        "problems": len(records),
        "samples": n,
        "accuracy": sum(right) / n / len(records),
        "interval": interval([c / n for c in right], n),
        "pass": {str(k): sum(pass_at_k(n, c, k) for c in right) / len(records) for k in ks},
        "length": sum(lengths) / len(lengths),
        "truncated": sum(sum(record["truncated"]) for record in records) / len(lengths),
        "too_long": sum(record["too_long"] for record in records),
        "timeouts": timeouts,
    }


# 2. Asking the model.


def complete(model, prompts, ids, samples, temperature, max_new_tokens, eos_ids, batch, seed):
    """`samples` completions (lists of ids) of each prompt, at most `batch` rows at a time."""
    own = [rollout.seeded(seed, prompt) for prompt in prompts]
    u = torch.stack([torch.rand(samples, max_new_tokens, generator=g) for g in own])  # (P, n, T)
    completions = [[] for _ in prompts]
    for part in u.split(max(1, batch // len(prompts)), dim=1):
        groups = rollout.sample(model, ids, part.shape[1], max_new_tokens, temperature, eos_ids, noise=part)
        for mine, group in zip(completions, groups):
            mine += group
    return completions


def evaluate(model, tokenizer, eos_ids, problems, samples=1, temperature=0.0, max_new_tokens=8192, batch=64,
             seed=0, title=None):  # fmt: skip
    """The figures of `summary` and, under "completions", a record of each problem.

    `title` stands beside a progress bar; None shows none. A prompt that does not fit into the model's context
    scores 0 and stays in the mean. Raises UserError if none fits. Leaves the global random state alone.
    """
    room = context(model.config) - max_new_tokens
    ids = [ids for ids, _ in encode_problems(tokenizer, problems, room, "--benchmarks")]
    fits = [i for i in range(len(problems)) if ids[i] is not None]
    completions, step = [[[]] * samples for _ in problems], max(1, batch // samples)
    for start in tqdm(range(0, len(fits), step), desc=title, disable=title is None):
        part = fits[start : start + step]
        groups = complete(model, [problems[i][0] for i in part], [ids[i] for i in part], samples, temperature,
                          max_new_tokens, eos_ids, batch, seed)  # fmt: skip
        for i, group in zip(part, groups):
            completions[i] = group
    timeouts = reward.timeouts()
    texts = tokenizer.batch_decode(sum(completions, []), skip_special_tokens=True)
    rewards = reward.grade_all(texts, [answer for _, answer in problems for _ in range(samples)])
    records = []
    for i, (prompt, answer) in enumerate(problems):
        mine = slice(i * samples, (i + 1) * samples)
        records.append({
            "index": i, "prompt": prompt, "answer": answer,
            "responses": texts[mine], "rewards": rewards[mine],
            "lengths": [len(c) for c in completions[i]],
            "truncated": [bool(c) and c[-1] not in eos_ids for c in completions[i]],
            "too_long": ids[i] is None,
        })  # fmt: skip
    return summary(records, reward.timeouts() - timeouts) | {"completions": records}


# 3. The table.


def table(results):
    """A line for each model and benchmark, and each model's mean accuracy over the benchmarks, as text."""
    columns = ["problems", "samples", "temperature", "length", "too_long", "timeouts"]
    rows = [["", "accuracy, %", "95% interval", "pass@samples, %", "truncated, %", *columns]]
    for model in dict.fromkeys(r["model"] for r in results):
        mine = [r for r in results if r["model"] == model]
        for r in mine:
            shares = r["accuracy"], *r["interval"], r["pass"][str(r["samples"])], r["truncated"]
            accuracy, low, high, passed, truncated = (f"{100 * share:.1f}" for share in shares)
            name = f"{model[-40:]} {Path(r['benchmark']).stem}"
            figures = [f"{r[column]:.6g}" for column in columns]
            rows.append([name, accuracy, f"{low} to {high}", passed, truncated, *figures])
        mean = sum(r["accuracy"] for r in mine) / len(mine)
        rows.append([f"{model[-40:]} mean", f"{100 * mean:.1f}"] + [""] * (len(rows[0]) - 2))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


# 4. The command.


def options():
    """The parser of the command line. Its errors are one line, for it has no usage to print."""
    parser = argparse.ArgumentParser("eval.py", argparse.SUPPRESS, __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    known, contests = ", ".join([*EMBEDDED, *KNOWN]), "names that begin with aime or amc"
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="DIR_OR_HUB_ID", help="each is a row of the table")
    add("--benchmarks", nargs="+", default=["arithmetic_heldout"], metavar="NAME_OR_FILE",
        help=f"{known}; a file; a hub id, as owner/name:config:split (default arithmetic_heldout)")
    add("--samples", type=INT, metavar="N",
        help=f"completions of each problem (default, as in the paper: 32 for {contests}, else 1)")
    add("--temperature", type=BOUND, metavar="T",
        help=f"default, as in the paper, 0, greedy; 0.6 for {contests}, and with --samples above 1")
    add("--limit", type=INT, metavar="N", help="only the first N problems of each (default all)")
    add("--max-new-tokens", type=INT, metavar="N",
        help="tokens at which a completion is cut off (default 8192, or 3/4 of a shorter context)")
    add("--batch", type=INT, default=64, metavar="N",
        help="completions sampled at a time; lower it if memory runs out (default 64)")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="bfloat16 on cuda, float32 on cpu (default cuda if there is one)")
    add("--prompt-field", metavar="COLUMN", help="the problem's column in other sets (default: a usual name)")
    add("--answer-field", metavar="COLUMN", help="the gold's column in other sets (default: a usual name)")
    add("--out", type=Path, default=Path("eval.json"), metavar="FILE.json",
        help="where figures and completions are added (default eval.json)")
    return parser  # fmt: skip


def protocol(benchmark, samples, temperature):
    """(samples, temperature) of a benchmark: those of the command line, or else the paper's."""
    contest = Path(benchmark).stem.lower().startswith(("aime", "amc"))
    if temperature is None:
        temperature = 0.6 if contest or (samples or 1) > 1 else 0.0
    samples = samples or (32 if contest and temperature else 1)
    if samples > 1 and not temperature:
        raise UserError(f"--samples {samples}: with --temperature 0 all of them are the same; take 1")
    return samples, temperature


def plan(model, o):
    """For each benchmark, what the model's answers depend on. Raises UserError before weights are loaded."""
    from transformers import AutoConfig

    try:
        window = context(AutoConfig.from_pretrained(model, trust_remote_code=False))
    except Exception as error:  # a damaged file makes the library raise anything
        raise UserError(f"--model {model}: no checkpoint that loads: {one_line(error)}") from None
    tokens = o.max_new_tokens or min(8192, 3 * window // 4)
    if tokens >= window:
        raise UserError(f"--max-new-tokens {tokens}: no room for a prompt in a context of {window}")
    changed = max((file.stat().st_mtime for file in Path(model).glob("*")), default=None)
    fixed = {"model": model, "changed": changed, "max_new_tokens": tokens, "seed": o.seed, "device": o.device}
    settings = []
    for benchmark in o.benchmarks:
        samples, temperature = protocol(benchmark, o.samples, o.temperature)
        settings.append(fixed | {"benchmark": benchmark, "samples": samples, "temperature": temperature})
    return settings


def read_results(path):
    """The results that FILE.json holds, [] if there is no such file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
        return [result for result in results if result["completions"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--out {path}: is no file of eval.py; choose another name") from None


def holds(result, settings, problems):
    """Whether a stored result is what these settings would give on these problems."""
    asked = [(record["prompt"], record["answer"]) for record in result["completions"]]
    return all(result.get(name) == value for name, value in settings.items()) and asked == problems


def run(o):
    """Every model on every benchmark, one after the other. What FILE.json holds is taken from there."""
    if o.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is none here; take cpu")
    if o.out.suffix != ".json" or not os.access(o.out.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {o.out}: takes a name that ends in .json, in a folder that can be written")
    problems = {b: load_problems(b, o.prompt_field, o.answer_field, o.limit, True) for b in o.benchmarks}
    plans = [settings for model in dict.fromkeys(o.model) for settings in plan(model, o)]
    stored, shown, policy, loaded = read_results(o.out), [], None, None
    for settings in plans:
        model, benchmark = settings["model"], settings["benchmark"]
        found = [result for result in stored if holds(result, settings, problems[benchmark])]
        if not found:
            if loaded != model:
                policy = None  # frees its memory before the next one is loaded
                policy = load_policy(model, o.device, torch.bfloat16 if o.device == "cuda" else torch.float32)
                loaded = model
            asked = {name: settings[name] for name in ("samples", "temperature", "max_new_tokens", "seed")}
            title = f"{model[-30:]} {Path(benchmark).stem}"
            found = [settings | evaluate(*policy, problems[benchmark], **asked, batch=o.batch, title=title)]
            stored = read_results(o.out) + found  # another process may have added to it meanwhile
            write_json(o.out, {"results": stored})
        shown.append(found[0])
    print(f"{table(shown)}\n\nfigures and completions: {o.out}")


def main(argv=None):
    """The command: its errors are one line and exit status 2."""
    parser = options()
    o = parser.parse_args(argv)
    try:
        run(o)
    except (UserError, OSError) as error:
        parser.error(str(error))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        parser.error(f"out of memory with --batch {o.batch}: lower it, or --max-new-tokens")
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished benchmarks are in {o.out}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
