"""What arithmetic.py promises: right answers, disjoint splits that are always the same, and a habit that is right half of the time."""

import random
import re
import runpy

import pytest

import arithmetic
from arithmetic import SPLITS, answer_of, anywhere, chain_of_thought, correct, draw, leftmost, problems, split_of
from reward import extract_answer


def evaluate(expression):
    """An evaluator of its own: Python's parser does the precedence, and no step is taken modulo 10 but the last."""
    assert re.fullmatch(r"\d([+*]\d)*", expression)
    return str(eval(expression) % 10)


def drawn(split, count, seed=0):
    """Prompts as the warm start draws them."""
    rng = random.Random(seed)
    return [draw(split, rng, hard=rng.random() < 0.5) for _ in range(count)]


@pytest.fixture(scope="module")
def sets():
    return {
        "heldout": [p for p, _ in problems("heldout", 512)],
        "train": [p for p, _ in problems("train", 5000)],
        "warmstart": drawn("warmstart", 5000),
    }


# ---------------------------------------------------------------- splits


def test_every_problem_belongs_to_the_split_it_is_drawn_for(sets):
    for split, prompts in sets.items():
        assert all(split_of(prompt) == split for prompt in prompts)


def test_warm_start_training_and_evaluation_share_no_problem(sets):
    heldout, train, warmstart = (set(sets[name]) for name in ("heldout", "train", "warmstart"))
    assert not heldout & train and not heldout & warmstart and not train & warmstart


def test_they_are_disjoint_by_construction_since_every_tenth_belongs_to_one_split():
    assert sorted(tenth for tenths in SPLITS.values() for tenth in tenths) == list(range(10))


def test_a_split_is_the_same_in_every_process_and_session():
    assert [split_of(p) for p in ("6+1*3*3=", "2+1*3*3=", "2*3+4*5=")] == ["train", "warmstart", "train"]


def test_problems_are_always_the_same_whatever_else_draws_random_numbers():
    first = problems("train", 100)
    random.seed(5)
    state = random.getstate()
    assert problems("train", 200)[:100] == first
    assert random.getstate() == state
    assert problems("train", 100) != problems("heldout", 100)


# ---------------------------------------------------------------- problems


def test_problems_are_four_or_five_digits_with_both_operators(sets):
    for prompts in sets.values():
        assert all(re.fullmatch(r"[1-9]([+*][1-9]){3,4}=", prompt) and "+" in prompt and "*" in prompt for prompt in prompts)
        assert 0.4 < sum(len(prompt) == 8 for prompt in prompts) / len(prompts) < 0.5


def test_answers_are_right(sets):
    for split, count in (("heldout", 512), ("train", 5000)):
        assert all(answer == evaluate(prompt[:-1]) for prompt, answer in problems(split, count))
    assert all(answer_of(prompt) == evaluate(prompt[:-1]) for prompt in sets["warmstart"])


def test_the_habit_is_right_on_every_other_problem(sets):
    for prompts in (sets["heldout"], sets["train"]):
        assert [answer_of(p, leftmost) != evaluate(p[:-1]) for p in prompts] == [False, True] * (len(prompts) // 2)


# ---------------------------------------------------------------- chains of thought


@pytest.mark.parametrize("strategy, chain", [
    (correct, "6+3*3=6+9=\\boxed{5}"), (leftmost, "7*3*3=1*3=\\boxed{3}"), (lambda operators, rng: len(operators) - 1, "6+1*9=6+9=\\boxed{5}"),
])  # fmt: skip
def test_a_chain_joins_the_pair_that_its_strategy_asks_for(strategy, chain):
    assert chain_of_thought("6+1*3*3=", strategy) == chain


def test_without_a_product_the_sum_is_taken_from_the_left():
    assert chain_of_thought("6+7+8=", correct) == chain_of_thought("6+7+8=", leftmost) == "3+8=\\boxed{1}"


@pytest.mark.parametrize("strategy", [correct, leftmost, anywhere])
def test_a_chain_gets_shorter_by_one_pair_a_line_and_ends_in_its_boxed_answer(sets, strategy):
    for prompt in sets["heldout"]:
        chain = chain_of_thought(prompt, strategy)
        lines = [prompt[:-1], *chain.split("=")[:-1], chain[-2]]
        assert [len(line) for line in lines] == list(range(len(prompt) - 1, 0, -2))
        assert extract_answer(chain) == chain[-2]
        for before, after in zip(lines, lines[1:]):  # some pair has been joined, and nothing else has changed
            joined = [before[:i] + evaluate(before[i : i + 3]) + before[i + 3 :] for i in range(0, len(before) - 2, 2)]
            assert after in joined


def test_a_chain_by_precedence_never_changes_the_value(sets):
    for prompt in sets["heldout"]:
        *lines, box = chain_of_thought(prompt, correct).split("=")
        assert {evaluate(line) for line in (prompt[:-1], *lines, box[-2])} == {evaluate(prompt[:-1])}


def test_anywhere_joins_every_pair_equally_often():
    rng = random.Random(0)
    first = [chain_of_thought("1+2*3+4=", anywhere, rng=rng)[:5] for _ in range(3000)]
    assert all(900 < first.count(line) < 1100 for line in ("3*3+4", "1+6+4", "1+2*7"))


def test_a_slip_changes_the_result_of_every_step(sets):
    rng = random.Random(0)
    for prompt in sets["heldout"]:
        right = chain_of_thought(prompt, leftmost)
        slipped = chain_of_thought(prompt, leftmost, slip=1.0, rng=rng)
        n = right.index("=")
        assert slipped[0] != right[0] and slipped[1:n] == right[1:n]  # its result alone
        assert chain_of_thought(prompt, leftmost, slip=0.0, rng=rng) == right


def test_slips_come_as_often_as_asked(sets):
    rng = random.Random(0)
    slips = [chain_of_thought(p, leftmost, slip=0.1, rng=rng)[0] != chain_of_thought(p, leftmost)[0] for p in sets["train"]]
    assert 0.08 < sum(slips) / len(slips) < 0.12


def test_a_slip_in_the_last_step_is_a_wrong_answer():
    rng, seen = random.Random(0), set()
    for _ in range(200):
        seen.add(chain_of_thought("2+3=", correct, slip=1.0, rng=rng))
    assert seen == {"\\boxed{%d}" % d for d in range(10) if d != 5}


def test_the_demonstration_counts_the_problems_that_defeat_the_habit(capsys):
    runpy.run_path(arithmetic.__file__, run_name="__main__")
    assert "fails on 256 of 512 held-out problems" in capsys.readouterr().out
