"""20,000 hostile and mutated answers: nothing hangs, nothing crashes, memory stays flat.

Half of the answers are real golds with a few characters exchanged, doubled or dropped; a quarter is LaTeX
at random; a quarter is written to do harm (towers, factorials, binomials, nests, long runs, unclosed braces,
control characters, code). Each is graded through `grade_all`, in batches, against the gold it came from or
another one. Mutants that score 1 are printed: all of them must be equal to their gold.

    nice -n 10 python tests/bench/fuzz_reward.py [--count 20000]      writes results/fuzz_reward.json
"""

import argparse
import json
import pathlib
import random
import resource
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import reward
from grader import Pool
from notation import clean, gold_text

COLLECTION = [json.loads(line) for line in open(ROOT / "tests" / "answers.jsonl", encoding="utf-8")]
GOLDS = sorted({case["gold"] for case in COLLECTION})
TOKENS = (r"\frac \sqrt \binom \sin \cos \log \ln \int \sum \prod \lim \infty \pi \pm \cup \cdot \times \le \ge \ne \in \to \left( \right) \{ \} "
          r"\begin{pmatrix} \end{pmatrix} \\ & \text{ \operatorname{eye} \operatorname{rank} \overline \lfloor \rfloor \gcd \max ^ _ { } ( ) [ ] "
          r"+ - * / = < > ! ' | , ; : . $ % # @ ? ~ ^{ _{ x y n i e d 0 1 2 9 10 99 1e9 3.14 and or of dx").split()
DEADLINE = 1.0


def mutated(rng):
    gold = rng.choice(GOLDS)
    text = gold
    for _ in range(rng.randrange(1, 4)):
        i, j = rng.randrange(len(text)), rng.randrange(len(text))
        change = rng.randrange(4)
        text = (text[:i] + text[i + 1:] if change == 0 else text[:i] + text[j] + text[i:] if change == 1 else
                text[:i] + rng.choice("0123456789xyn+-^_/.,!|'(){}[]\\") + text[i + 1:] if change == 2 else
                text[:i] + rng.choice(TOKENS) + text[i:]) or "0"
    return gold, text


def at_random(rng):
    return rng.choice(GOLDS), " ".join(rng.choices(TOKENS, k=rng.randrange(1, 60)))


def hostile(rng):
    n = rng.choice([2, 5, 15, 50, 400, 10_000])
    big = rng.choice(["9", "99999", "10^9", "9" * n, "1e9", "x"])
    forms = ["^{".join([big] * n) + "}" * (n - 1), f"{big}!", f"({big}!)!", "!" * n, rf"\binom{{{big}}}{{{big}/2}}", "(" * n + "x" + ")" * n,
             "{" * n + "}" * n, "{" * n, r"\sqrt{" * n + big + "}" * n, r"\frac{1}{" * n + "2" + "}" * n, r"\frac" * n, "a" * n, "1," * n + "1",
             rf"\sum_{{k=1}}^{{{big}}} k^k", rf"\prod_{{k=1}}^{{{big}}} (x+k)", rf"\int_0^{{{big}}} \sin(x^x) dx", rf"\lim_{{x\to {big}}} x^x",
             rf"\operatorname{{eye}}({big})", rf"\operatorname{{zeros}}({big},{big})", rf"(x+y+z)^{{{big}}}", rf"\sin({big}^{{{big}}})",
             "$" * n, "\x00" * n, "\ud800", "٣" * n, "𝟗^𝟗", r"\pm" * n, "x=" * n + "1", r"\text{" * n, r"\cup" * n, "\\" * n, " " * n,
             "__import__('os').system('touch hacked')", "eval('1')", r"\begin{pmatrix}" + "1&" * n + r"\end{pmatrix}", r"\sin " * n + "x",
             "-" * n + "1", "+".join(["x"] * n), rf"\gcd({big}^{{{big}}}, 6)", "|" * n, rf"\lfloor {big}^{{9999}} \pi \rfloor", "e^{" * n + "1" + "}" * n]
    return rng.choice(GOLDS), rng.choice(forms)[:100_000]


def resident():
    """Bytes of memory this process occupies now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="how many answers (default 20000)")
    count = parser.parse_args().count
    rng = random.Random(0)
    pool = reward.POOLS[reward.os.getpid()] = Pool(size=1, deadline=DEADLINE)
    start, memory, slowest, accepted, done = time.time(), [], 0.0, [], 0
    while done < count:
        cases = [rng.choice([mutated, mutated, at_random, hostile])(rng) for _ in range(100)]
        responses = [rng.choice(["\\boxed{%s}", "so $\\boxed{%s}$.", "\\boxed{1} \\boxed{%s", "%s"]) % answer for _, answer in cases]
        for response, (gold, answer) in zip(responses, cases):
            began = time.perf_counter()
            if reward.grade(response, gold) == 1.0 and clean(answer) != gold_text(gold):
                accepted.append((gold, response))
            seconds = time.perf_counter() - began
            slowest = max(slowest, seconds)
            if seconds > DEADLINE + 2:
                print(f"{seconds:.1f} s: {gold!r:.60} {response!r:.100}", flush=True)
        done += len(cases)
        memory.append(resident())
        if done % 1000 == 0:
            print(f"{done:6} answers, {time.time() - start:5.0f} s, {pool.broken} broken off, slowest {slowest:.2f} s, {memory[-1] / 2**20:.0f} MiB", flush=True)
    pool.close()
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    figures = {"answers": done, "seconds": round(time.time() - start), "deadline": DEADLINE, "broken off": pool.broken,
               "slowest seconds, a worker's start included": round(slowest, 2), "parent MiB after 1,000": round(memory[9] / 2**20, 1) if done > 1000 else None,
               "parent MiB at the end": round(memory[-1] / 2**20, 1), "greatest worker MiB": round(worker), "hacked": (ROOT / "hacked").exists(),
               "equal to the gold though spelt otherwise": len(accepted)}
    print("\n".join(f"{gold!r:60} {response!r}" for gold, response in accepted))
    print(figures)
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "fuzz_reward.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
