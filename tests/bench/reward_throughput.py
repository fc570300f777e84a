"""How many ordinary answers a second the reward grades, and what share is decided at sight.

An ordinary batch: every gold of a data set is asked 8 times. Three responses give the gold, as the data
writes it; one gives it in another spelling (\\dfrac, spaces, a decimal zero); three give the gold of another
problem of the same set, as a wrong answer looks like; one is cut off before its box. With the real golds
in ../shared/data if they are there, else with those of tests/answers.jsonl.

The rate is per core: answers over the processor time of this process and its workers, the workers' start
(about a second each, once) apart. The verdicts of the collection in tests/answers.jsonl are reported beside
those of plain math-verify on the last box.

    python tests/bench/reward_throughput.py      writes results/reward_throughput.json
"""

import json
import logging
import pathlib
import random
import resource
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import reward
from equivalence import quick
from grader import Pool

DATA = ROOT.parent / "shared" / "data"
COLLECTION = [json.loads(line) for line in open(ROOT / "tests" / "answers.jsonl", encoding="utf-8")]
REASONING = "Let us see. We set up the equation and solve it, $x^2 + \\frac{1}{2} = y$ and so on. " * 20


def golds():
    """name -> gold answers."""
    if not DATA.exists():
        return {"collection": sorted({case["gold"] for case in COLLECTION})}
    sets = {}
    for file in sorted(DATA.glob("*.jsonl")):
        for row in map(json.loads, open(file, encoding="utf-8")):
            gold = row.get("final_answer") or row.get("answer") or row.get("reward_model", {}).get("ground_truth") or row["solution"]
            gold = ", ".join(gold) if isinstance(gold, list) else gold
            sets.setdefault(file.stem, []).append(gold.split("####")[-1].strip())
    return sets


def respelt(gold, rng):
    if gold.lstrip("-").isdigit():
        return gold + rng.choice([".0", ".", " "])
    return gold.replace("\\frac", "\\dfrac").replace("+", " + ").replace("\\left", "").replace("\\right", "").replace(",", ", ")


def batch(golds, rng):
    """(responses, golds): 8 responses to each problem."""
    pairs = []
    for gold in golds:
        answers = [gold] * 3 + [respelt(gold, rng)] + rng.choices(golds, k=3)
        pairs += [(REASONING + f"The answer is $\\boxed{{{answer}}}$.", gold) for answer in answers] + [(REASONING, gold)]
    return [list(column) for column in zip(*pairs)]


def processor_time(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def measure(name, golds, rng):
    pool = Pool(size=1)
    pool.ask(("x+1", "1+x"))
    reward.POOLS.clear()
    reward.POOLS[reward.os.getpid()] = pool
    responses, answers = batch(golds, rng)
    started = worker_time(pool)
    own, wall = processor_time(resource.RUSAGE_SELF), time.perf_counter()
    rewards = reward.grade_all(responses, answers)
    wall, own = time.perf_counter() - wall, processor_time(resource.RUSAGE_SELF) - own
    children = worker_time(pool) - started
    boxed = [(g, a) for r, g in zip(responses, answers) if (a := reward.extract_answer(r)) is not None]
    at_sight = sum(quick(g, a) is not None for g, a in boxed) + len(responses) - len(boxed)
    pool.close()
    result = {"answers": len(responses), "mean reward": round(sum(rewards) / len(rewards), 4), "seconds": round(wall, 3),
              "per second per core": round(len(responses) / (own + children)), "decided at sight": round(at_sight / len(responses), 4),
              "in workers": round(children / (own + children), 4), "broken off": pool.broken}
    print(f"{name:26}", result)
    return result


def worker_time(pool):
    """Processor seconds of the pool's only worker so far."""
    worker = pool.idle.get()
    pool.idle.put(worker)
    fields = pathlib.Path(f"/proc/{worker.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def plain_math_verify():
    """Wrong verdicts of math-verify on the last box, with its own extraction and defaults."""
    from math_verify import parse, verify
    logging.disable(logging.CRITICAL)
    accepted = refused = 0
    for case in COLLECTION:
        box = reward.extract_answer(case["response"])
        gold = case["gold"] if "$" in case["gold"] or "\\[" in case["gold"] else f"${case['gold']}$"
        try:
            verdict = box is not None and verify(parse(gold), parse(f"$\\boxed{{{box}}}$"))
        except BaseException:
            verdict = False
        accepted += verdict and not case["verdict"]
        refused += case["verdict"] and not verdict
    return {"accepted though wrong": accepted, "refused though right": refused}


def main():
    rng = random.Random(0)
    figures = {"sets": {name: measure(name, values, rng) for name, values in golds().items()}}
    rewards = reward.grade_all([c["response"] for c in COLLECTION], [c["gold"] for c in COLLECTION])
    wrong = [(c["verdict"], r) for c, r in zip(COLLECTION, rewards) if float(c["verdict"]) != r]
    figures["collection"] = {"cases": len(COLLECTION), "right": sum(c["verdict"] for c in COLLECTION),
                             "this grader": {"accepted though wrong": sum(not v for v, _ in wrong), "refused though right": sum(v for v, _ in wrong)},
                             "plain math-verify": plain_math_verify()}
    print(figures["collection"])
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "reward_throughput.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
