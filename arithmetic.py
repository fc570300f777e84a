"""The embedded task: the last digit of an expression, and a habit that is right half of the time.

A prompt is an expression of four or five digits with `+` and `*`, both of them, to be worked out modulo 10.
An answer is a chain of thought: each line rewrites the expression with one pair of neighbours joined, the
last one is a box. `*` goes before `+`:

    6+1*3*3=  ->  6+3*3=6+9=\\boxed{5}<|endoftext|>

Which pair to join is a *fork*: several are plausible, and the choice decides the result; the copying and
the arithmetic around it are mere skill. The pocket calculator's habit is to join the first pair:

    6+1*3*3=  ->  7*3*3=1*3=\\boxed{3}<|endoftext|>

On half of the problems (the easy ones) the habit ends with the right result, so a policy that clings to it
saturates at 50%, while one that respects precedence can solve everything. The base policy (lab/warmstart.py)
has the habit, and the right first pair is rare. The quickest way to more reward is to give up slips and rare
pairs together: then the entropy is gone before the policy has learnt *which* rare pair is the right one.

Every problem belongs to exactly one split, by a hash of its prompt: what the warm start has seen can
never occur in training, and what training has seen can never occur in the evaluation.
"""

import random
import zlib

SPLITS = {"warmstart": range(0, 4), "train": range(4, 9), "heldout": range(9, 10)}  # tenths of all problems


def join(a, operator, b):
    """One step of arithmetic on digits: `join("7", "*", "8") == "6"` (56 modulo 10)."""
    a, b = int(a), int(b)
    return str((a + b if operator == "+" else a * b) % 10)


# A strategy looks at the operators that are left and says which of them to carry out next.


def leftmost(operators, rng=random):
    """The habit: the first pair, whatever it is."""
    return 0


def correct(operators, rng=random):
    """Precedence: the first `*`, and when there is none left, the first `+`."""
    return operators.index("*") if "*" in operators else 0


def chain_of_thought(prompt, strategy, slip=0.0, rng=random):
    """Work out a prompt by a strategy. Returns the completion as text, without the end-of-sequence token:
    `chain_of_thought("6+1*3*3=", correct) == "6+3*3=6+9=\\\\boxed{5}"`.

    slip: probability that a step's result is a random wrong digit.
    """
    expression = prompt.rstrip("=")
    digits, operators = list(expression[0::2]), list(expression[1::2])
    lines = []
    while operators:
        i = strategy(operators, rng)
        result = join(digits[i], operators[i], digits[i + 1])
        if slip and rng.random() < slip:
            result = rng.choice([d for d in "0123456789" if d != result])
        digits[i : i + 2] = [result]
        del operators[i]
        lines.append("".join(d + o for d, o in zip(digits, operators + ["="])))
    lines[-1] = "\\boxed{%s}" % digits[0]
    return "".join(lines)


def answer_of(prompt, strategy=correct):
    """The digit in the box when `strategy` is followed without a slip."""
    return chain_of_thought(prompt, strategy)[-2]


def split_of(prompt):
    """The split that a problem belongs to, by a hash of its text."""
    tenth = zlib.crc32(prompt.encode()) % 10
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def draw(split, rng, hard):
    """A random prompt of a split. `hard`: the habit ends with a wrong result; else with the right one."""
    while True:
        length = rng.choice((4, 5))
        prompt = "".join(rng.choice("123456789") + rng.choice("+*") for _ in range(length))[:-1] + "="
        if "+" in prompt and "*" in prompt and split_of(prompt) == split:
            if (answer_of(prompt) != answer_of(prompt, leftmost)) == hard:
                return prompt


def problems(split, count):
    """The first `count` problems of a split as (prompt, answer), always the same; easy and hard alternate."""
    rng = random.Random(f"arithmetic/{split}")
    prompts = [draw(split, rng, hard=bool(i % 2)) for i in range(count)]
    return [(prompt, answer_of(prompt)) for prompt in prompts]


if __name__ == "__main__":
    for prompt, answer in problems("train", 8):
        right, habit = chain_of_thought(prompt, correct), chain_of_thought(prompt, leftmost)
        print(f"{prompt:11} right: {right:35} habit: {habit}")
    hard = [answer_of(p, leftmost) != a for p, a in problems("heldout", 512)]
    print(f"\nthe habit fails on {sum(hard)} of {len(hard)} held-out problems")
