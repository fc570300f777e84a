r"""Rewards that can be verified: 1.0 if the last box of a response holds the gold answer, else 0.0.

A policy learns whatever the reward pays for, so a reward has to be strict where a policy may cheat:

- Only the last \boxed{...} (or \fbox{...}) speaks. No box, an empty one or one that is not closed is no
  answer, even if the right number stands elsewhere: `25 is wrong. \boxed{}` scores 0.
- Several answers are no answer. "5 or 6" in a box, and boxes joined by "or", "and" or a comma, are read as
  a list, and a list answers only a question whose gold is that list.
- What an answer is worth is a matter of mathematics, not of spelling: see equivalence.py.
- Nothing that a response contains can hang, crash or fill the memory of the caller: what cannot be
  decided by looking at it is compared in a process that can be killed: see grader.py.

    python reward.py      what is accepted, what is rejected, what a hostile answer does
"""

import os
import re

from equivalence import quick
from grader import Pool

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
JOINT = re.compile(r"(?:\s|\$|\\[()\[\],;: ]|\\q?quad|\\text\{|\}|[,;/]|\b(?:and|or)\b|\\lor\b)*")
HEDGE = re.compile(r"[^.!?\n]{0,60}?\bor\b[^.!?\n]{0,60}?")


def extract_answer(text):
    r"""The content of the last box of `text`, or None if there is none, or it is empty or not closed.

    Boxes that are joined by nothing but "or", "and" or a comma, or by "or" within a short sentence, are one list
    of answers. A box in a box is part of its content. TeX allows \boxed5, without braces, for a single token.
    """
    answers, end = [], None
    for start, after, content in boxes(text):
        between = text[end:start] if answers else ""
        if answers and not (JOINT.fullmatch(between) or HEDGE.fullmatch(between)):
            answers = []
        answers.append(content)
        end = after
    if not answers or not all(answers):
        return None
    return ", ".join(dict.fromkeys(answers))


def boxes(text):
    """(start, end, content) of every outermost box; a box that is not closed has the content ""."""
    position = 0
    while box := BOX.search(text, position):
        content, position = group(text, box.end())
        yield box.start(), position, BOX.sub("", content).strip()


def group(text, i):
    """The group in braces that starts at `i`, or the single character there, and the index after it."""
    if text[i:i + 1] != "{":
        single = re.compile(r"[\dA-Za-z](?![\dA-Za-z.,])").match(text, i)
        return (single[0], single.end()) if single else ("", i)
    depth, start = 0, i + 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, i):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start:match.start()], match.end()
    return "", len(text)


def grade(response, answer):
    """1.0 if the response's last box holds the gold `answer`, else 0.0."""
    return grade_all([response], [answer])[0]


def grade_all(responses, answers):
    """`grade` for many pairs. Equal ones are looked at once, open ones compared in parallel in isolated processes.

    Raises ValueError if the two lists differ in length, RuntimeError if a grader process cannot be started
    (math-verify is not installed, say).
    """
    extracted = {response: extract_answer(response) for response in dict.fromkeys(responses)}
    pairs = [(gold, extracted[response]) for response, gold in zip(responses, answers, strict=True)]
    verdicts = {pair: False if pair[1] is None else quick(*pair) for pair in dict.fromkeys(pairs)}
    undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
    if undecided:
        verdicts.update(zip(undecided, pool().map(undecided)))
    return [float(verdicts[pair]) for pair in pairs]


POOLS = {}    # process id -> its Pool: a forked child must not write into its parent's pipes


def pool():
    """This process's pool of graders, made when first needed."""
    if os.getpid() not in POOLS:
        POOLS[os.getpid()] = Pool()
    return POOLS[os.getpid()]


def timeouts():
    """How many answers of this process scored 0 because comparing them had to be broken off."""
    return POOLS[os.getpid()].broken if os.getpid() in POOLS else 0


def main():
    examples = [
        ("25", r"First \boxed{24}, but a check shows that it is \boxed{25}."),
        ("025", r"\boxed{25}"),
        (r"\frac{1}{2}", r"\boxed{0.5}"),
        ("4.5e33", r"\boxed{4.5 \times 10^{33}}"),
        ("1,-2", r"\boxed{x = -2 \text{ or } x = 1}"),
        (r"\frac{n(n+1)}{2}", r"\boxed{\binom{n+1}{2}}"),
        ("25", r"The answer is 25. \boxed{}"),
        ("25", r"\boxed{25 \text{ or } 26}"),
        ("25", r"\boxed{24} or \boxed{25}"),
        ("204_5", r"\boxed{204_6}"),
        ("[2,5)", r"\boxed{[2,5]}"),
        ("0.333", r"\boxed{\frac{1}{3}}"),
        ("25", r"\boxed{__import__('os').system('rm -rf /')}"),
        ("25", r"\boxed{9^{9^{9^{9}}}}"),
        ("25", r"\boxed{\binom{10^9}{5 \cdot 10^8}}"),
        ("25", r"\boxed{\int_0^1 \prod_{k=1}^{99999999} (x+k)^{k!} dx}"),
        ("25", "\\boxed{" + "(" * 5000 + "}"),
    ]
    POOLS[os.getpid()] = Pool(deadline=1.0)
    for (gold, response), reward in zip(examples, grade_all(*zip(*[(r, g) for g, r in examples]))):
        print(f"{reward}   gold {gold:18} {response[:80]}")
    print(f"\n{timeouts()} broken off after a second: its worker was killed and replaced")


if __name__ == "__main__":
    main()
