"""Benchmarks: how often a model is right, how sure one can be of it, and what it reaches in k attempts.

    python eval.py --model tiny --benchmarks arithmetic_heldout
    python eval.py --model A B C --benchmarks math500 aime24 aime25 amc23 omni_math olympiadbench minerva

Completions come from the sampler of the training (rollout.py), verdicts from its grader (reward.py). Of
P problems, n completions are drawn for each, and c of them are right:

    avg@n     = mean over problems of c / n                        the accuracy
    pass@k    = mean over problems of 1 - C(n - c, k) / C(n, k)    unbiased for every k <= n
    interval  = Wilson's, with P p (1 - p) / Var(c / n) in the place of the number of trials

Completions of one problem resemble each other, so the problem is the unit of the interval, not the
completion: with n = 1 the number of trials is P, and drawing more completions can make it larger only as
far as it makes the problems' means agree. Unlike mean +- 1.96 standard errors, Wilson's interval stays
between 0 and 1 and does not shrink to nothing when all answers are right or all are wrong.

Protocol of the paper (arXiv 2505.22617), the default here: AIME and AMC are sampled 32 times at
temperature 0.6, all others are decoded greedily, once; at most 8192 tokens. pass@k: arXiv 2107.03374.
Wilson, J. Am. Stat. Assoc. 22 (1927); effective number of trials: Korn and Graubard, Surv. Methodol. 24 (1998).

Random numbers belong to a problem, so neither the batch nor an interruption changes an answer but by
rounding. Each finished batch is a line of a .jsonl beside the result, and is not computed again.
"""

import argparse
import hashlib
import json
import math
import pathlib
import sys

import torch
from tqdm import tqdm

import data
import reward
import rollout
from rollout import context, load_policy
from data import UserError

# 1. What is measured.


def pass_at_k(n, c, k):
    """Chance that at least one of k attempts is right, from n attempts of which c were: 1 - C(n-c, k) / C(n, k).

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
    """The figures of a benchmark from its problems' records, as plain numbers; shares and accuracies from 0 to 1."""
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


def noise(prompt, samples, max_new_tokens, seed):
    """The problem's own uniform numbers for the sampler: (samples, max_new_tokens)."""
    digest = hashlib.sha256(f"{seed}/{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return rollout.uniforms(1, samples, max_new_tokens, generator)[0]


def draw(model, prompts, ids, samples, temperature, max_new_tokens, eos_ids, batch, seed):
    """`samples` completions of each prompt, at most `batch` rows at a time."""
    u = torch.stack([noise(prompt, samples, max_new_tokens, seed) for prompt in prompts])  # (P, n, T)
    parts = [
        rollout.sample(model, ids, part.shape[1], max_new_tokens, temperature, eos_ids, noise=part)
        for part in u.split(max(1, batch // len(prompts)), dim=1)
    ]
    return [sum(groups, []) for groups in zip(*parts)]


def answer(model, tokenizer, eos_ids, problems, samples, temperature, max_new_tokens, batch, seed, done=()):
    """Yields (start, records, timeouts) for each batch of problems that is not in `done`; a record is one problem."""
    ids = data.encode_prompts(tokenizer, [prompt for prompt, _ in problems], context(model.config) - max_new_tokens, refuse=False)
    step = max(1, batch // samples)
    for start in (s for s in range(0, len(problems), step) if s not in done):
        part = range(start, min(start + step, len(problems)))
        fits = [i for i in part if ids[i] is not None]  # a prompt that does not fit scores 0: it stays in the mean
        drawn = draw(model, [problems[i][0] for i in fits], [ids[i] for i in fits], samples, temperature,
                     max_new_tokens, eos_ids, batch, seed) if fits else []  # fmt: skip
        completions = {i: [[]] * samples for i in part} | dict(zip(fits, drawn))
        texts = tokenizer.batch_decode(sum(completions.values(), []), skip_special_tokens=True)
        before = reward.timeouts()
        rewards = reward.grade_all(texts, [problems[i][1] for i in part for _ in range(samples)])
        records = [
            {
                "index": i, "prompt": problems[i][0], "answer": problems[i][1],
                "responses": texts[j : j + samples], "rewards": rewards[j : j + samples],
                "lengths": [len(c) for c in completions[i]],
                "truncated": [bool(c) and c[-1] not in eos_ids for c in completions[i]],
                "too_long": ids[i] is None,
            }
            for i, j in zip(part, range(0, len(texts), samples))
        ]  # fmt: skip
        yield start, records, reward.timeouts() - before


def evaluate(model, tokenizer, eos_ids, problems, samples=1, temperature=0.0, max_new_tokens=8192, batch=64, seed=0):
    """The figures of `summary` and, under "completions", every problem's record. No files, no global random state."""
    parts = list(answer(model, tokenizer, eos_ids, problems, samples, temperature, max_new_tokens, batch, seed))
    records = [record for _, part, _ in parts for record in part]
    return summary(records, sum(timeouts for *_, timeouts in parts)) | {"completions": records}


# 3. The log that makes an evaluation safe to interrupt.


def read_log(path, evaluations):
    """{(model, benchmark): {start: line}} of finished batches. A line that was cut off while it was written is removed."""
    done = {key: {} for key in evaluations}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.endswith("\n") and text:
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(line)
            there = line["settings"]
            key = there["model"], there["benchmark"]
            line["start"], line["records"], line["timeouts"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--out: {path}:{number} is not a line of an evaluation; choose another name") from None
        here = evaluations.get(key)
        differ = [f"{k} {there.get(k)} there, {v} here" for k, v in (here or {}).items() if there.get(k) != v]
        if differ:
            what = f"{key[0]} on {key[1]} with other settings ({'; '.join(differ)})"
            raise UserError(f"--out: {path} holds {what}; choose another name, or remove it")
        if here:
            done[key][line["start"]] = line
    return done


def fingerprint(model, config):
    """What tells another checkpoint of the same name: sizes and times of a folder's files, or the hub's commit."""
    files = sorted(pathlib.Path(model).glob("*.safetensors")) + sorted(pathlib.Path(model).glob("*.json"))
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files] or getattr(config, "_commit_hash", None)
    return digest(state)


def digest(value):
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


# 4. Tables.


def aligned(rows):
    """Rows of texts as lines, the first column to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)


def tables(results):
    """The paper's layout, models by benchmarks in percent with 95% intervals, and below it every figure."""
    models, benchmarks = (list(dict.fromkeys(r[name] for r in results)) for name in ("model", "benchmark"))
    cells = {(r["model"], r["benchmark"]): r for r in results}
    paper = [["accuracy, %", *(title(b) for b in benchmarks), "avg"]]
    for model in models:
        row = [cells[model, b] for b in benchmarks]
        shown = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (r["accuracy"], *r["interval"]))) for r in row]
        paper.append([model[-40:], *shown, f"{100 * sum(r['accuracy'] for r in row) / len(row):.1f}"])
    ks = sorted({int(k) for r in results for k in r["pass"]})
    every = [["", "problems", "samples", "temp.", *(f"pass@{k}" for k in ks), "tokens", "truncated", "too long", "timeouts"]]
    for r in results:
        passes = [f"{100 * r['pass'][str(k)]:.1f}" if str(k) in r["pass"] else "" for k in ks]
        every.append([f"{r['model'][-40:]} {title(r['benchmark'])}", str(r["problems"]), str(r["samples"]), f"{r['temperature']:g}", *passes,
                      f"{r['length']:.0f}", f"{100 * r['truncated']:.1f}%", str(r["too_long"]), str(r["timeouts"])])  # fmt: skip
    return f"{aligned(paper)}\n\n{aligned(every)}"


def title(benchmark):
    """The name of a benchmark in tables: a file's without folder and ending."""
    return pathlib.Path(benchmark).stem


# 5. The command.


def options(argv):
    """The command line; a wrong value ends here with one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail

    def number(kind, low, meaning):
        def check(text):
            try:
                value = kind(text)
            except ValueError:
                value = math.nan
            if not low <= value < math.inf:
                raise argparse.ArgumentTypeError(f"takes {meaning}, not {text!r}")
            return value

        return check

    count = number(int, 1, "a whole number above 0")
    contests = "names that begin with aime or amc"
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="DIR_OR_ID", help="checkpoint folders or hub ids; each is a row of the table")
    add("--benchmarks", nargs="+", default=["arithmetic_heldout"], metavar="NAME_OR_FILE",
        help=f"known names ({', '.join([*data.EMBEDDED, *data.KNOWN])}), files ({', '.join(data.READERS)}) or hub ids "
        "as owner/name:config:split (default arithmetic_heldout, the embedded one)")  # fmt: skip
    add("--samples", type=count, metavar="N", help=f"completions per problem (default: 32 for {contests}, else 1: the paper's protocol)")
    add("--temperature", type=number(float, 0, "a number of at least 0"), metavar="T",
        help=f"of sampling, 0 is greedy (default: 0.6 for {contests} or if --samples is above 1, else 0: the paper's protocol)")
    add("--limit", type=count, metavar="N", help="only the first N problems of each benchmark (default: all)")
    add("--max-new-tokens", type=count, metavar="N",
        help="tokens at which a completion is cut off (default: 8192, the paper's, or 3/4 of the model's context if that is less)")
    add("--batch", type=count, default=64, metavar="N",
        help="completions sampled at a time; lower it when memory runs out (default 64, a guess for 24 GB and a small model)")
    add("--seed", type=number(int, 0, "a whole number of at least 0"), default=0, metavar="N", help="of the sampling (default 0)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="bfloat16 on cuda, float32 on cpu (default: cuda if there is one)")
    add("--prompt-field", metavar="COLUMN", help="the problem's column in files with unknown columns (default: found by its name)")
    add("--answer-field", metavar="COLUMN", help="the gold answer's column, likewise (default: found by its name)")
    add("--out", type=pathlib.Path, default=pathlib.Path("eval.json"), metavar="FILE.json",
        help="figures and completions; finished batches are kept in FILE.jsonl beside it (default eval.json)")
    o = parser.parse_args(argv)
    if o.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no such device here; take cpu")
    if o.out.suffix != ".json" or not o.out.absolute().parent.is_dir():
        fail(f"--out takes a name that ends in .json, in a folder that exists, not {str(o.out)!r}")
    if o.out.exists() and not o.out.with_suffix(".jsonl").exists():
        fail(f"--out: {o.out} exists, without the .jsonl of an evaluation to continue; choose another name")
    o.model, o.benchmarks = list(dict.fromkeys(o.model)), list(dict.fromkeys(o.benchmarks))
    return o


def fail(message):
    """One line on standard error and exit status 2."""
    sys.exit(print(f"eval.py: {message}", file=sys.stderr) or 2)


def protocol(benchmark, samples, temperature):
    """(samples, temperature) of a benchmark: what the command line says, and else the paper's."""
    contest = title(benchmark).lower().startswith(("aime", "amc"))
    if temperature is None:
        temperature = 0.6 if contest or (samples or 1) > 1 else 0.0
    samples = samples or (32 if contest and temperature else 1)
    if samples > 1 and not temperature:
        raise UserError(f"--samples {samples} at --temperature 0 are {samples} times the same; take 1 sample, or a temperature above 0")
    return samples, temperature


def plan(o, problems):
    """{(model, benchmark): settings}: everything an answer depends on. Fails before any weights are loaded."""
    from transformers import AutoConfig

    evaluations = {}
    for model in o.model:
        try:
            if not pathlib.Path(model).is_dir():
                data.hub_reachable()
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        except Exception as error:  # a damaged file makes the library raise anything
            raise UserError(f"--model {model}: no checkpoint folder or hub id that loads: {data.one_line(error)}") from None
        window = context(config)
        max_new_tokens = o.max_new_tokens or min(8192, 3 * window // 4)
        if max_new_tokens >= window:
            raise UserError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the {window} positions of {model}")
        for benchmark in o.benchmarks:
            samples, temperature = protocol(benchmark, o.samples, o.temperature)
            evaluations[model, benchmark] = {
                "model": model, "weights": fingerprint(model, config), "benchmark": benchmark, "content": digest(problems[benchmark]),
                "samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens,
                "batch": o.batch, "seed": o.seed, "device": o.device,
            }  # fmt: skip
    return evaluations


def run(settings, policy, problems, done, log):
    """One model on one benchmark: the batches that are not done yet, each logged as it ends; then the figures."""
    asked = {name: settings[name] for name in ("samples", "temperature", "max_new_tokens", "batch", "seed")}
    if (finished := sum(len(line["records"]) for line in done.values())) < len(problems):  # an error if no prompt fits
        data.encode_prompts(policy[1], [prompt for prompt, _ in problems], context(policy[0].config) - settings["max_new_tokens"])
    desc = f"{settings['model'][-30:]} {title(settings['benchmark'])}"
    with tqdm(total=len(problems), initial=finished, desc=desc, unit="problem") as bar:
        for start, records, timeouts in answer(*policy, problems, **asked, done=done) if finished < len(problems) else ():
            done[start] = {"settings": settings, "start": start, "timeouts": timeouts, "records": records}
            log.write(json.dumps(done[start]) + "\n")
            log.flush()
            bar.update(len(records))
    lines = [done[start] for start in sorted(done)]
    records = [record for line in lines for record in line["records"]]
    return settings | summary(records, sum(line["timeouts"] for line in lines)) | {"completions": records}


def main(argv=None):
    o = options(argv)
    fields = {"prompt_field": o.prompt_field, "answer_field": o.answer_field}
    try:
        problems = {b: data.load_problems(b, **fields, limit=o.limit, benchmark=True) for b in o.benchmarks}
        evaluations = plan(o, problems)
        log_path, results = o.out.with_suffix(".jsonl"), []
        done = read_log(log_path, evaluations)
        with open(log_path, "a", encoding="utf-8") as log:
            for model in o.model:
                policy = None
                for benchmark in o.benchmarks:
                    key = model, benchmark
                    if policy is None and sum(len(line["records"]) for line in done[key].values()) < len(problems[benchmark]):
                        policy = load_policy(model, o.device, torch.bfloat16 if o.device == "cuda" else torch.float32)
                    results.append(run(evaluations[key], policy, problems[benchmark], done[key], log))
    except (UserError, OSError) as error:
        if (log := o.out.with_suffix(".jsonl")).is_file() and not log.stat().st_size:  # nothing is finished
            log.unlink()
        fail(error)
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory with --batch {o.batch}: lower it, or --max-new-tokens; what is finished is kept")
    except KeyboardInterrupt:
        sys.exit(print(f"\ninterrupted; the same command continues from {log_path}", file=sys.stderr) or 130)
    beside = o.out.with_suffix(".json.tmp")
    beside.write_text(json.dumps({"results": results}, indent=1), encoding="utf-8")
    beside.replace(o.out)
    print(f"{tables(results)}\n\nfigures and completions: {o.out}")


if __name__ == "__main__":
    main()
