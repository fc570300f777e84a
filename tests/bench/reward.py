"""How exact, how safe and how fast the reward is: four questions, a line of figures for each.

- numerals: where the gold is an integer, is one of its spellings refused, or a neighbour accepted?
- caller: how long does any text take in the process that asks, where nothing ends it?
- hostile: does any answer hang, crash, or fill the memory? Those that are paid are printed, to be read.
- ordinary: how many ordinary answers are graded in a second of processor time?

The golds are those of ../shared/data where that is, else those of tests/answers.jsonl.

    python tests/bench/reward.py [--hostile 20000] [--caller 200000] [--out FILE.json]
"""

import argparse
import json
import os
import pathlib
import random
import re
import resource
import sys
import time
from decimal import Decimal

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import reward  # noqa: E402

PIECES = r"""\frac \sqrt \binom \sin \sum \lim \infty \pi \pm \cup \cdot \le \in \left( \right) \{ \} \\ &
\text \text{ \mathrm{ \begin{pmatrix} \boxed{ \boxed \bar{ \, \! \% \$ ^\circ \alpha ^ _ ^{ _{ { } ( ) [ ]
+ - * / = < > ! ' | , ; : . $ % # x y n i e d 0 1 2 9 10 99 1e9 3.14 1,000 .5 dx √ ² °""".split() + [" "]
WORDS = """the answer is or and not of which we get possible combinations distinct letters numbers moves
square hour dollars 25 26 between to about degrees x = If there are ways""".split()
# The integer N, another one M, N with commas C, N = S times 10 to the P; a semicolon between two answers.
RIGHT = r"""N.0; N.; +N; C; \frac{N}{1}; \dfrac{N}1; N/1; \$N; \$C.00; N^\circ; N°; x = N; m+n=N; \text{N}
; \angle XYZ = N^\circ; \left(N\right); N \times 10^{0}; N\text{ cm}^2; N cm; N\,\mathrm{kg}; N \text{ moves}
; C \text{ kids}; N \text{ ordered pairs}; N \text{ mi per hour}; S\times10^{P}; S \cdot 10^P; SeP; x_1 = C"""
PERCENT = r"N\%; N \text{ percent}"
WRONG = r"""M; N1; N.5; N.0000001; N or M; N \text{ or } M; N, M; \{N, M\}; (N, M); [N, M]; N-9; x > N; -x = N
; N \text{ to } M; x \ge N; N < x < M; x \ne N; \text{not } N; \pm N; Nx + 1; N+x; N+\sqrt{2}; N+10^{-9}; 0.1N
; N\frac{1}{2}; N+\pi; N \text{ million}; N_{8}; N = M; x = M; x = N, y = M; \frac{N}{M}; N, \text{ or } M; N!
; N \text{ is not it}; \sqrt{N}; N^{3}; N\%M; N:M; x^2 = N; N \cdot M; N \text{ dozen}; N N; 2x = N"""


def remark(rng):
    """A text of LaTeX pieces, of English words, or of one piece many times."""
    kind, count = rng.randrange(4), rng.choice([3, 30, 110, 590, 5000])
    if kind == 0:
        return "".join(rng.choices(PIECES, k=rng.randrange(1, 60)))
    if kind == 1:
        return rng.choice(["25 ", r"25 \text{"]) + " ".join(rng.choices(WORDS, k=rng.randrange(1, 60)))
    if kind == 2:
        return rng.choice(PIECES + WORDS) * count
    return "".join(rng.choice(PIECES + WORDS) * rng.randrange(1, 40) for _ in range(rng.randrange(1, 6)))


def hostile(rng, golds):
    """(gold, answer): the gold with characters exchanged, a remark, or something written to do harm."""
    gold, kind, n = rng.choice(golds), rng.randrange(4), rng.choice([2, 5, 15, 50, 500])
    if kind == 0:
        return gold, remark(rng)
    if kind < 3:
        i = rng.randrange(len(gold) + 1)
        change = rng.choice(PIECES + list("0123456789xyn+-^_/.,"))
        return gold, gold[:i] + change + gold[i + rng.randrange(3):]
    big = rng.choice(["9", "99999", "10^9", "9" * n, "x"])
    return gold, rng.choice([
        "^{".join([big] * n) + "}" * (n - 1), f"{big}!!", rf"\binom{{{big}}}{{{big}/2}}", "+".join("x" * n),
        r"\sqrt{" * n + big + "}" * n, r"\frac{1}{" * n + "2" + "}" * n, "(" * n + ")" * n, "1," * n + "1",
        rf"\sum_{{k=1}}^{{{big}}} k^k", rf"\prod_{{k=1}}^{{{big}}} (x+k)", rf"\int_0^{{{big}}} \sin(x^x) dx",
        rf"(x+y+z)^{{{big}}}", rf"\sin({big}^{{{big}}})", "_" * n, "√" * n, "-" * n, r"\pm" * n, "٣" * n])


def data_golds():
    """{name of a data set: its golds, without a box around them}."""
    sets = {}
    for file in sorted((ROOT.parent / "shared" / "data").glob("*.jsonl")):
        for row in map(json.loads, open(file, encoding="utf-8")):
            truth = row.get("reward_model", {}).get("ground_truth")
            gold = row.get("final_answer") or row.get("answer") or truth or row["solution"]
            gold = ", ".join(gold) if isinstance(gold, list) else gold
            sets.setdefault(file.stem, []).append(gold.split("####")[-1].strip())
    if not sets:
        rows = map(json.loads, open(ROOT / "tests" / "answers.jsonl", encoding="utf-8"))
        sets["answers.jsonl"] = sorted({row["gold"] for row in rows})
    return {name: [reward.extract_answer(gold) or gold for gold in golds] for name, golds in sets.items()}


def graded(pairs):
    """The rewards of pairs (gold, answer)."""
    boxes = [rf"It is $\boxed{{{answer}}}$." for _, answer in pairs]
    return reward.grade_all(boxes, [gold for gold, _ in pairs])


def numerals(golds):
    """The spellings of integers that are refused, and the other answers that are accepted."""
    pairs = []
    for gold in golds:
        n = int(gold.replace(",", ""))
        power = len(str(abs(n))) - 1
        values = {"N": n, "M": abs(n) + 11, "C": f"{n:,}", "S": Decimal(n).scaleb(-power), "P": power}
        lists = [(True, RIGHT)]
        if abs(n) > 2:              # 1\% is not 1, and 1! is
            lists += [(True, PERCENT), (False, WRONG)]
        for verdict, answers in lists:
            answers = re.sub("[NMCSP]", lambda match: str(values[match[0]]), answers).split(";")
            pairs += [(gold, answer.strip(), verdict) for answer in answers]
    rewards = graded([(gold, answer) for gold, answer, _ in pairs])
    wrong = [pair for pair, r in zip(pairs, rewards) if r != pair[2]]
    return {"golds": len(golds), "pairs": len(pairs), "wrong": wrong}


def caller(count):
    """Seconds of the slowest of `count` texts that are read in this process."""
    rng, slowest = random.Random(0), 0.0
    for _ in range(count):
        form = rng.choice([r"\boxed{TEXT}", r"\boxed{TEXT", "TEXT", r"\boxed{1}TEXT\boxed{2}"])
        response = form.replace("TEXT", remark(rng))
        start = time.process_time()
        reward.at_sight("25", reward.extract_answer(response))
        slowest = max(slowest, time.process_time() - start)
    return {"texts": count, "slowest seconds": round(slowest, 4)}


def torture(count, golds):
    """What `count` hostile answers did, in batches of 100, to two workers that have a second for each."""
    pool = reward.POOLS[os.getpid()] = reward.Pool(size=2, deadline=1.0)
    rng, slowest, memory = random.Random(1), 0.0, []
    for _ in range(count // 100):
        pairs = [hostile(rng, golds) for _ in range(100)]
        start = time.time()
        rewards = graded(pairs)
        slowest = max(slowest, time.time() - start)
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        memory.append(pages * resource.getpagesize() >> 20)
        for (gold, answer), r in zip(pairs, rewards):
            if r and gold.strip() != answer.strip():
                print(f"paid: {gold!r:50} {answer!r}")
    return {"answers": count, "broken off": pool.broken, "seconds of the slowest 100": round(slowest, 1),
            "MiB of this process": memory[:: max(1, len(memory) // 8)],
            "MiB of the greatest worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10}


def ordinary(golds):
    """Answers a second of processor time, the worker's included: at first, and when its parser is warm.

    Each gold has eight responses: itself three times, itself respelt, three other golds, and none.
    """
    pool = reward.POOLS[os.getpid()] = reward.Pool(size=1)
    pool.threads.submit(pool.ask, ("x+1", "1+x")).result()
    worker = pool.threads.submit(lambda: pool.own.worker.pid).result()

    def seconds():
        ticks = pathlib.Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        return time.process_time() + sum(map(int, ticks)) / 100

    rates, rng = [], random.Random(0)
    for _ in range(2):
        responses = []
        for gold in golds:
            respelt = gold + ".0" if gold.isdigit() else gold.replace("\\frac", "\\dfrac").replace("+", " + ")
            answers = [gold, gold, gold, respelt, *rng.choices(golds, k=3)]
            boxes = [rf"It is $\boxed{{{answer}}}$." for answer in answers] + [""]
            responses += ["We set up the equation. " * 40 + box for box in boxes]
        start = seconds()
        reward.grade_all(responses, [gold for gold in golds for _ in range(8)])
        rates.append(round(len(responses) / (seconds() - start)))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hostile", type=int, default=20_000, help="answers, default %(default)s")
    parser.add_argument("--caller", type=int, default=200_000, help="texts, default %(default)s")
    parser.add_argument("--out", help="a JSON file for the figures")
    o = parser.parse_args()
    sets = data_golds()
    golds = sorted({gold for of_one in sets.values() for gold in of_one})
    integers = [gold for gold in golds if re.fullmatch("-?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)", gold)]
    parts = {"numerals": lambda: numerals(integers), "caller": lambda: caller(o.caller),
             "hostile": lambda: torture(o.hostile, golds),
             "ordinary": lambda: {name: ordinary(of_one) for name, of_one in sets.items()}}
    figures = {}
    for name, part in parts.items():
        figures[name] = part()
        print(name, figures[name], flush=True)
    if o.out:
        pathlib.Path(o.out).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
