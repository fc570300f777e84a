"""What arithmetic.py promises: right answers, disjoint splits, a habit that is right half of the time."""

import random
import re

import pytest

import arithmetic
from arithmetic import answer_of, chain_of_thought, correct, draw, leftmost, problems, split_of
from lab.warmstart import anywhere
from reward import extract_answer

COUNTS = {"heldout": 512, "train": 2000, "warmstart": 2000}


def evaluate(expression):
    """Python's parser does the precedence, and no step is taken modulo 10 but the last."""
    assert re.fullmatch(r"\d([+*]\d)*", expression)
    return str(eval(expression) % 10)


@pytest.fixture(scope="module")
def sets():
    """{split: prompts}, those of the warm start as it draws them."""
    rng = random.Random(0)
    found = {name: [p for p, _ in problems(name, COUNTS[name])] for name in ("heldout", "train")}
    return found | {"warmstart": [draw("warmstart", rng, hard=rng.random() < 0.5) for _ in range(2000)]}


# ---------------------------------------------------------------- problems and their splits


def test_warm_start_training_and_evaluation_share_no_problem_since_a_hash_decides(sets):
    assert sorted(tenth for tenths in arithmetic.SPLITS.values() for tenth in tenths) == list(range(10))
    assert all(split_of(prompt) == split for split, prompts in sets.items() for prompt in prompts)
    assert [split_of(p) for p in ("6+1*3*3=", "2+1*3*3=", "2*3+4*5=")] == ["train", "warmstart", "train"]


def test_problems_are_always_the_same_whatever_else_draws_random_numbers():
    first, state = problems("train", 100), random.getstate()
    assert problems("train", 200)[:100] == first and random.getstate() == state
    assert first[0] == ("2*6*7*3+5=", "7")


def test_problems_are_four_or_five_digits_with_both_operators_and_a_right_answer(sets):
    for split, prompts in sets.items():
        assert all(re.fullmatch(r"[1-9]([+*][1-9]){3,4}=", p) and "+" in p and "*" in p for p in prompts)
        assert all(answer_of(prompt) == evaluate(prompt[:-1]) for prompt in prompts)
    assert problems("heldout", 512) == [(prompt, evaluate(prompt[:-1])) for prompt in sets["heldout"]]


def test_the_habit_is_right_on_every_other_problem(sets):
    for prompts in (sets["heldout"], sets["train"]):
        wrong = [answer_of(p, leftmost) != evaluate(p[:-1]) for p in prompts]
        assert wrong == [False, True] * (len(prompts) // 2)


# ---------------------------------------------------------------- chains of thought


@pytest.mark.parametrize("strategy, chain", [
    (correct, "6+3*3=6+9=\\boxed{5}"), (leftmost, "7*3*3=1*3=\\boxed{3}"),
    (lambda operators, rng: len(operators) - 1, "6+1*9=6+9=\\boxed{5}"),
])  # fmt: skip
def test_a_chain_joins_the_pair_that_its_strategy_asks_for(strategy, chain):
    assert chain_of_thought("6+1*3*3=", strategy) == chain


@pytest.mark.parametrize("strategy", [correct, leftmost, anywhere])
def test_each_line_of_a_chain_joins_one_pair_and_the_last_is_the_boxed_answer(sets, strategy):
    for prompt in sets["heldout"]:
        chain = chain_of_thought(prompt, strategy)
        lines = [prompt[:-1], *chain.split("=")[:-1], chain[-2]]
        assert extract_answer(chain) == chain[-2] and len(lines[-1]) == 1
        for before, after in zip(lines, lines[1:]):
            pairs = range(0, len(before) - 2, 2)
            assert after in [before[:i] + evaluate(before[i : i + 3]) + before[i + 3 :] for i in pairs]
            assert strategy is not correct or evaluate(before) == evaluate(after)


def test_a_slip_changes_the_result_of_a_step_alone_and_comes_as_often_as_asked(sets):
    rng, slips = random.Random(0), 0
    for prompt in sets["train"]:
        right = chain_of_thought(prompt, leftmost).split("=")[0]
        always, often = (chain_of_thought(prompt, leftmost, slip, rng).split("=")[0] for slip in (1.0, 0.1))
        assert always[0] != right[0] and always[1:] == right[1:]
        slips += often != right
    assert 160 < slips < 240
    last = {chain_of_thought("2+3=", correct, 1.0, rng) for _ in range(200)}
    assert last == {"\\boxed{%d}" % d for d in range(10) if d != 5}
