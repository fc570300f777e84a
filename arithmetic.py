"""The embedded task: one expression, four conventions, and a habit that is right half of the time.

A prompt names a convention and gives an expression of four digits, to be worked out modulo 10:

    *:6+1*3-3=      `*` binds tightest, the rest goes from left to right (school, nearly)
    +:6+1*3-3=      `+` binds tightest
    -:6+1*3-3=      `-` binds tightest
    <:6+1*3-3=      from right to left (as APL reads)

An answer is a chain of thought. Each line first names the pair it joins (a: the first two digits, b, c),
then rewrites the expression with that pair joined; the last one is a box:

    *:6+1*3-3=  ->  b6+3-3=a9-3=\\boxed{6}<|endoftext|>

Naming the pair is a *fork*: several tokens are plausible there, and the choice decides the result;
carrying it out is mere skill. The pocket calculator's habit is to name `a` in every line. In every problem
that is the wrong pair to begin with, yet on half of the problems (the easy ones) its result happens to be
right, and nothing that can be seen at the fork tells them from the hard ones. So a policy that clings to
the habit saturates at 50%, and one that follows the conventions can solve everything. But a base policy
(warmstart.py) follows them rarely and clumsily: at first the habit pays more. Whoever gives up the rare
strategy because it does not pay yet never finds out that it would have, with practice.

Every problem belongs to exactly one split, by a hash of its prompt: what the warm start has seen can
never occur in training, and what training has seen can never occur in the evaluation.
"""

import random
import zlib

OPERATORS = "+-*"
CONVENTIONS = "*+-<"
SPLITS = {"warmstart": range(0, 4), "train": range(4, 9), "heldout": range(9, 10)}  # tenths of all problems


def join(a, operator, b):
    """One step of arithmetic on digits: `join("7", "*", "8") == "6"` (56 modulo 10)."""
    a, b = int(a), int(b)
    return str((a + b if operator == "+" else a - b if operator == "-" else a * b) % 10)


# A strategy looks at the operators that are left and says which of them to carry out next.


def leftmost(operators, convention=None):
    """The habit: the first pair, whatever the convention."""
    return 0


def correct(operators, convention):
    """The strategy that the convention asks for."""
    if convention == "<":
        return len(operators) - 1
    return operators.index(convention) if convention in operators else 0


def chain_of_thought(prompt, strategy, slip=0.0, clumsy=0.0, rng=random):
    """Work out a prompt by a strategy. Returns the completion as text, without the end-of-sequence token:
    `chain_of_thought("*:6+1*3-3=", correct) == "b6+3-3=a9-3=\\\\boxed{6}"`.

    slip: probability that a step's result is a random wrong digit. clumsy: probability that it is one too
    high, which is the mistake of someone who has not practised.
    """
    convention, expression = prompt.rstrip("=").split(":")
    digits, operators = list(expression[0::2]), list(expression[1::2])
    lines = []
    while operators:
        i = strategy(operators, convention)
        result = join(digits[i], operators[i], digits[i + 1])
        if clumsy and rng.random() < clumsy:
            result = join(result, "+", "1")
        if slip and rng.random() < slip:
            result = rng.choice([d for d in "0123456789" if d != result])
        digits[i : i + 2] = [result]
        del operators[i]
        lines.append("abc"[i] + "".join(d + o for d, o in zip(digits, operators + ["="])))
    lines[-1] = "\\boxed{%s}" % digits[0]
    return "".join(lines)


def answer_of(prompt, strategy=correct):
    """The digit in the box when `strategy` is followed without a slip."""
    return chain_of_thought(prompt, strategy)[-2]


def split_of(prompt):
    """The split that a problem belongs to, by a hash of its text."""
    tenth = zlib.crc32(prompt.encode()) % 10
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def draw(split, rng, convention, hard):
    """A random prompt of a split on which the habit begins with the wrong pair; `hard`: and ends with a wrong result."""
    while True:
        expression = "".join(rng.choice("123456789") + rng.choice(OPERATORS) for _ in range(4))[:-1]
        prompt = f"{convention}:{expression}="
        fork = correct(expression[1::2], convention) != leftmost(expression[1::2])
        if fork and split_of(prompt) == split and (answer_of(prompt) != answer_of(prompt, leftmost)) == hard:
            return prompt


def problems(split, count):
    """The first `count` problems of a split as (prompt, answer), always the same ones.

    Conventions take turns, and four easy problems (the habit's result is right) alternate with four hard ones.
    """
    rng = random.Random(f"arithmetic/{split}")
    prompts = [draw(split, rng, CONVENTIONS[i % 4], hard=bool(i // 4 % 2)) for i in range(count)]
    return [(prompt, answer_of(prompt)) for prompt in prompts]


if __name__ == "__main__":
    for prompt, answer in problems("train", 8):
        print(f"{prompt:13} right: {chain_of_thought(prompt, correct):28} habit: {chain_of_thought(prompt, leftmost)}")
    hard = [answer_of(p, leftmost) != a for p, a in problems("heldout", 512)]
    print(f"\nthe leftmost habit fails on {sum(hard)} of {len(hard)} held-out problems")
