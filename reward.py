"""Rewards that can be verified: 1.0 if the last box of a response holds the gold answer, else 0.0."""
import os
import re

from grader import Pool

POOL = {}      # process id -> Pool: a forked child must not share its parent's pipes


def extract_answer(text):
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    opening = re.compile(r"\\[a-z]+\s*\{").match(text, start)
    if not opening:
        return None
    depth, i = 1, opening.end()
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[opening.end():i].strip() or None
        i += 1
    return None


def normalise(text):
    text = re.sub(r"\\left|\\right|\\!|\\,|\s|\$|\\%", "", text).replace("dfrac", "frac").rstrip(".")
    return re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)


def quick(gold, answer):
    gold, answer = normalise(gold), normalise(answer)
    if gold == answer:
        return True
    try:
        return float(gold) == float(answer)
    except ValueError:
        return None


def equivalent(gold, answer):
    """Runs in a worker only."""
    from math_verify import verify
    from latex2sympy2_extended.latex2sympy2 import latex2sympy
    gold, answer = [latex2sympy(normalise(x), is_real=True, normalization_config=None) for x in (gold, answer)]
    return bool(verify(gold, answer, timeout_seconds=None))


def grade_all(responses, answers):
    verdicts = [False if (a := extract_answer(r)) is None else quick(g, a)
                for r, g in zip(responses, answers, strict=True)]
    open_pairs = {(g, extract_answer(r)): None for r, g, v in zip(responses, answers, verdicts) if v is None}
    if open_pairs:
        open_pairs = dict(zip(open_pairs, pool().map(list(open_pairs))))
    return [float(open_pairs[g, extract_answer(r)] if v is None else v)
            for r, g, v in zip(responses, answers, verdicts)]


def grade(response, answer):
    return grade_all([response], [answer])[0]


def pool():
    if os.getpid() not in POOL:
        POOL[os.getpid()] = Pool()
    return POOL[os.getpid()]


def timeouts():
    return POOL[os.getpid()].broken if os.getpid() in POOL else 0


if __name__ == "__main__":
    for gold, response in [("25", r"\boxed{25}"), (r"\frac12", r"\boxed{0.5}"), ("x+1", r"\boxed{1+x}"), ("9", r"\boxed{9^{9^{9^9}}}")]:
        print(gold, response, grade(response, gold), timeouts())
