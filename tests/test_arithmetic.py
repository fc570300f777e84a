"""What arithmetic.py promises: right answers, disjoint splits that are always the same, and a habit that is right half of the time."""

import random
import re
import runpy

import pytest

import arithmetic
from arithmetic import CONVENTIONS, OPERATORS, SPLITS, answer_of, chain_of_thought, correct, draw, leftmost, problems, split_of
from reward import extract_answer

# An evaluator of its own: Python's parser does the precedence, and no step is taken modulo 10 but the last.


COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def evaluate(prompt):
    convention, expression = re.fullmatch(r"([*+<-]):(\d(?:[*+-]\d)*)=", prompt).groups()
    if convention == "<":  # a op (the rest)
        value = int(expression[-1])
        for digit, operator in zip(expression[-3::-2], expression[-2::-2]):
            value = COMPUTE[operator](int(digit), value)
        return str(value % 10)
    second, third = (operator for operator in OPERATORS if operator != convention)

    class Number(int):  # Python's `*`, the tightest, computes what the convention's tightest computes, and so on
        __mul__ = lambda a, b: Number(COMPUTE[convention](int(a), int(b)))
        __add__ = lambda a, b: Number(COMPUTE[second](int(a), int(b)))
        __sub__ = lambda a, b: Number(COMPUTE[third](int(a), int(b)))

    source = expression.translate(str.maketrans({convention: "*", second: "+", third: "-"}))
    return str(eval(re.sub(r"\d", r"Number(\g<0>)", source), {"Number": Number}) % 10)


def test_the_evaluator_of_these_tests_agrees_with_sums_done_by_hand():
    by_hand = {"*:6+1*3-3=": 6, "+:6+1*3-3=": 8, "-:6+1*3-3=": 0, "<:6+1*3-3=": 6, "-:2*3-9+1=": 9, "<:9-1-1-1=": 8, "*:1-2-3-4=": 2}
    assert {prompt: int(evaluate(prompt)) for prompt in by_hand} == by_hand


def drawn(split, count, seed=0):
    """Prompts as the warm start draws them."""
    rng = random.Random(seed)
    return [draw(split, rng, rng.choice(CONVENTIONS), hard=rng.random() < 0.5) for _ in range(count)]


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
    assert [split_of(p) for p in ("*:6+1*3-3=", "+:1+1+1+1=", "*:9+8+4-2=")] == ["warmstart", "train", "heldout"]


def test_problems_are_always_the_same_whatever_else_draws_random_numbers():
    first = problems("train", 100)
    random.seed(5)
    state = random.getstate()
    assert problems("train", 200)[:100] == first
    assert random.getstate() == state
    assert problems("train", 100) != problems("heldout", 100)


# ---------------------------------------------------------------- problems


def test_problems_are_four_digits_under_each_convention_in_turn(sets):
    assert all(re.fullmatch(r"[*+<-]:[1-9]([*+-][1-9]){3}=", prompt) for prompts in sets.values() for prompt in prompts)
    assert [prompt[0] for prompt in sets["train"]] == list(CONVENTIONS * 1250)


def test_answers_are_right(sets):
    for split, count in (("heldout", 512), ("train", 5000)):
        assert all(answer == evaluate(prompt) for prompt, answer in problems(split, count))
    assert all(answer_of(prompt) == evaluate(prompt) for prompt in sets["warmstart"])


def test_the_habit_is_right_on_one_half_and_wrong_on_the_other_under_every_convention(sets):
    for prompts in (sets["heldout"], sets["train"][:4000]):
        for convention in CONVENTIONS:
            wrong = [chain_of_thought(p, leftmost)[-2] != evaluate(p) for p in prompts if p[0] == convention]
            assert sum(wrong) * 2 == len(wrong)


def test_the_same_expression_needs_another_strategy_under_another_convention():
    answers = {p: {evaluate(c + p[1:]) for c in CONVENTIONS} for p in drawn("train", 200)}
    assert sum(len(a) > 1 for a in answers.values()) > 100


# ---------------------------------------------------------------- chains of thought


@pytest.mark.parametrize("convention, chain", [
    ("*", "b6+3-3=a9-3=\\boxed{6}"), ("+", "a7*3-3=a1-3=\\boxed{8}"),
    ("-", "c6+1*0=a7*0=\\boxed{0}"), ("<", "c6+1*0=b6+0=\\boxed{6}"),
])  # fmt: skip
def test_a_chain_names_and_joins_the_pair_that_its_convention_asks_for(convention, chain):
    assert chain_of_thought(convention + ":6+1*3-3=", correct) == chain


@pytest.mark.parametrize("strategy", [correct, leftmost])
def test_a_chain_ends_in_its_boxed_answer(sets, strategy):
    for prompt in sets["heldout"]:
        chain = chain_of_thought(prompt, strategy)
        assert re.fullmatch(r"[abc]\d[*+-]\d[*+-]\d=[ab]\d[*+-]\d=\\boxed\{\d\}", chain)
        assert extract_answer(chain) == chain[-2]
        if strategy is correct:
            assert extract_answer(chain) == evaluate(prompt)


def test_every_line_names_the_pair_that_it_joins_of_the_line_before(sets):
    for prompt in sets["heldout"]:
        line = prompt[2:-1]
        for after in re.fullmatch(r"(.*)=(.*)=\\boxed\{(.)\}", chain_of_thought(prompt, correct)).groups():
            i = 2 * "abc".index(after[0]) if len(after) > 1 else 0  # the box joins the one pair that is left
            line = line[:i] + str(COMPUTE[line[i + 1]](int(line[i]), int(line[i + 2])) % 10) + line[i + 3 :]
            assert after[-len(line) :] == line


def test_a_slip_changes_the_result_of_every_step(sets):
    rng = random.Random(0)
    for prompt in sets["heldout"]:
        right = chain_of_thought(prompt, leftmost)
        slipped = chain_of_thought(prompt, leftmost, slip=1.0, rng=rng)
        assert slipped[0] == right[0] == "a" and slipped[1] != right[1] and slipped[2:7] == right[2:7]  # its result alone
        assert chain_of_thought(prompt, leftmost, slip=0.0, rng=rng) == right


def test_slips_come_as_often_as_asked(sets):
    rng = random.Random(0)
    slips = [chain_of_thought(p, leftmost, slip=0.1, rng=rng)[1] != chain_of_thought(p, leftmost)[1] for p in sets["train"]]
    assert 0.08 < sum(slips) / len(slips) < 0.12


def test_a_slip_in_the_last_step_is_a_wrong_answer():
    rng, seen = random.Random(0), set()
    for _ in range(200):
        seen.add(chain_of_thought("*:2+3=", correct, slip=1.0, rng=rng))
    assert seen == {"\\boxed{%d}" % d for d in range(10) if d != 5}


def test_the_demonstration_counts_the_problems_that_defeat_the_habit(capsys):
    runpy.run_path(arithmetic.__file__, run_name="__main__")
    assert "fails on 256 of 512 held-out problems" in capsys.readouterr().out


def test_clumsiness_makes_a_result_one_too_high_as_often_as_asked(sets):
    rng = random.Random(0)
    pairs = [(chain_of_thought(p, leftmost, clumsy=0.4, rng=rng)[1], chain_of_thought(p, leftmost)[1]) for p in sets["train"]]
    assert {(int(clumsy) - int(right)) % 10 for clumsy, right in pairs} == {0, 1}
    assert 0.37 < sum(clumsy != right for clumsy, right in pairs) / len(pairs) < 0.43


def test_in_every_problem_the_habit_begins_with_the_wrong_pair(sets):
    for prompt in sets["train"] + sets["heldout"]:
        assert chain_of_thought(prompt, leftmost)[0] == "a" != chain_of_thought(prompt, correct)[0]
