"""What earns a reward, what does not, and what nothing that a model writes can do."""

import importlib.util
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from conftest import ROOT

import reward
from reward import Pool, extract_answer, grade, grade_all, numeral

COLLECTION = [json.loads(line) for line in open(ROOT / "tests" / "answers.jsonl", encoding="utf-8")]
SPEC = importlib.util.spec_from_file_location("bench_reward", ROOT / "tests" / "bench" / "reward.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def python(code):
    """Runs `code` as a script of its own in the repository."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_last_box_counts():
    assert extract_answer(r"First \boxed{24}. No: \boxed{25}.") == "25"
    assert extract_answer(r"\boxed{25}, and then much more text. 26.") == "25"


def test_braces_within_the_box_are_balanced_and_escaped_braces_do_not_count():
    assert extract_answer(r"\boxed{\frac{1}{\sqrt{2}}} and }") == r"\frac{1}{\sqrt{2}}"
    assert extract_answer(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert extract_answer(r"\boxed{\left\{1}") == r"\left\{1"


def test_fbox_and_a_single_character_without_braces_are_boxes():
    assert extract_answer(r"\fbox{7}") == extract_answer(r"\boxed 7") == extract_answer(r"\boxed7$") == "7"
    assert extract_answer(r"\boxed 72") is None      # TeX would box the 7 alone


@pytest.mark.parametrize("response", [
    "", "25", "boxed{25}", r"\box{25}", r"\boxed", r"\boxed{", r"\boxed{25", r"\boxedx{25}", r"25 \boxed{}",
    r"25 is wrong. Or 25? \boxed{ }", r"\boxed{25} \boxed{}", r"\boxed{25} so \boxed{25"])
def test_no_box_an_empty_box_and_an_unclosed_box_are_no_answer(response):
    assert extract_answer(response) is None
    assert grade(response, "25") == 0.0


def test_a_box_in_a_box_is_part_of_its_content():
    assert grade(r"\boxed{\boxed{25}}", "25") == 1.0
    assert grade(r"\boxed{24 \boxed{25}}", "25") == 0.0


@pytest.mark.parametrize("response", [
    r"\boxed{24} or \boxed{25}", r"$\boxed{24}$, $\boxed{25}$", r"\boxed{24}\boxed{25}", r"\boxed{25, 26}",
    r"Either \boxed{25} or else \boxed{26}", r"\boxed{25 \text{ or } 26}", r"\boxed{\{25, 26\}}",
    r"\boxed{x=25 \lor x=26}", r"\boxed{\pm 25}", r"\boxed{25 \;\; 26}"])
def test_several_answers_where_one_was_asked_are_no_answer(response):
    assert grade(response, "25") == 0.0


def test_every_undisputed_pair_is_graded_rightly_but_those_that_are_given_up_with_a_reason():
    rewards = grade_all([case["response"] for case in COLLECTION], [case["gold"] for case in COLLECTION])
    wrong = [case for case, r in zip(COLLECTION, rewards) if r != case["verdict"]]
    assert wrong == [case for case in COLLECTION if "given_up" in case]
    assert sum(not case["verdict"] for case in wrong) <= 2 and len(wrong) < len(COLLECTION) / 30


@pytest.mark.parametrize("text, value", [
    ("142.0", "142"), ("025", "25"), ("4.5e33", "45e32"), (r"4.5 \times 10^{33}", "45e32"), ("-1./3", "-1/3"),
    (r"-15\frac35", "-78/5"), ("1e-5", "1/100000"), (".5", "1/2"), (r"10,\!080", "10080"), ("1{,}000", "1e3"),
    (r"1\,000", "1000"), (r"\dfrac 12", "1/2"), (r"\$32,348", "32348"), (r"25 \text{ moves}", "25")])
def test_numerals_are_read_exactly(text, value):
    assert numeral(text)[0] == Fraction(value)


@pytest.mark.parametrize("text", [
    "", "5 6", "1,23", "3..5", "1/0", r"25 \text{ or } 26", r"25 \text{ million}", r"\text{not } 25", "25x",
    "2^5", "-", "1e9999", "٣", "20-5", r"\frac{1}{2}3", "9" * 200])
def test_what_is_no_plain_numeral_is_not_read_as_one(text):
    assert numeral(text) is None


@pytest.mark.parametrize("gold", ["0", "1", "-7", "25", "1,080", "109200000"])
def test_an_integer_is_accepted_in_all_its_spellings_and_none_of_its_neighbours_is(gold):
    assert bench.numerals([gold])["wrong"] == []


@pytest.mark.parametrize("gold, answer", [
    ("1/3", "0.333333"), ("2.7778e-6", r"3 \times 10^{-6}"), (r"\sqrt{2}", "1.41421356237309504880"),
    ("2^{1009}", "2^{1009}+1"), ("2^{-2012}", "2^{-2013}"), (r"\pi", r"\frac{22}{7}"), ("1", "1-e^{-100}")])
def test_close_is_not_equal(gold, answer):
    assert grade(rf"\boxed{{{answer}}}", gold) == 0.0


@pytest.mark.parametrize("gold, answer, verdict", [
    ("40", r"40\%", 1), ("0.4", r"40\%", 1), ("0.5", r"0.5\%", 0), (r"20\%", "0.2", 1), (r"\$36", "36", 1),
    (r"\$36", r"36 \text{ cents}", 0), (r"2\pi", r"2\pi \text{ cm}", 1), (r"2\pi", r"2\pi \text{ or so}", 0),
    ("k=1", "m=1", 0), ("x=5", "5", 1), ("5", "m+n=5", 1), ("x+y=5", "5", 0), ("2nm", "2", 0)])
def test_a_unit_or_a_name_may_be_left_out_but_not_exchanged(gold, answer, verdict):
    assert grade(rf"\boxed{{{answer}}}", gold) == verdict


HANGING = "(((2^{200})^{200})^{200})^{200}+x-x"


@pytest.fixture
def pool(monkeypatch):
    """The pool of this process: one worker, with a second for each answer."""
    monkeypatch.setitem(reward.POOLS, os.getpid(), Pool(size=1, deadline=1.0))
    return reward.POOLS[os.getpid()]


def worker(pool):
    """The worker process of a pool of one."""
    assert grade(r"\boxed{1+x}", "x+1") == 1.0
    return pool.threads.submit(lambda: pool.own.worker).result()


def test_an_answer_that_takes_too_long_ends_its_worker_is_counted_and_the_next_one_is_graded(pool):
    first = worker(pool)
    assert reward.timeouts() == 0
    boxes = [rf"\boxed{{{HANGING}}}", r"\boxed{1+x}", r"\boxed{25}"]
    assert grade_all(boxes, ["x", "x+1", "25"]) == [0.0, 1.0, 1.0]
    assert reward.timeouts() == 1
    assert first.returncode == -signal.SIGALRM and worker(pool).pid != first.pid


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the deadline alone bounds the memory")
def test_a_worker_cannot_take_more_memory_than_it_was_given():
    code = r"""if True:
        import resource, reward
        pool = reward.POOLS[reward.os.getpid()] = reward.Pool(size=1, deadline=20, memory=300 * 2**20)
        print(reward.grade(r"\boxed{1+x}", "x+1"), reward.grade(r"\boxed{HANGING}", "x"), reward.timeouts())
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)""".replace("HANGING", HANGING)
    out = python(code).stdout.split()
    assert out[:3] == ["1.0", "0.0", "1"] and 0 < int(out[3]) < 400 * 2**10     # KiB


def test_nothing_hostile_is_paid_hangs_or_crashes(pool):
    rng, golds = random.Random(3), ["25", "x+1", r"\frac{1}{2}", "(1,2)"]
    attacks = [bench.hostile(rng, golds) for _ in range(400)]
    attacks = [(gold, answer) for gold, answer in attacks if gold not in answer and len(answer) > 12]
    attacks += [("25", sign * 600) for sign in "_^√{("] + [("25", "__import__('os').system('touch hacked')")]
    rewards = grade_all([rf"\boxed{{{answer}}}" for _, answer in attacks], [gold for gold, _ in attacks])
    assert [pair for pair, r in zip(attacks, rewards) if r] == []
    assert worker(pool).poll() is None and not (ROOT / "hacked").exists()


def test_this_process_reads_any_text_in_steps_linear_in_its_length():
    def steps(text):
        count = [0]
        sys.setprofile(lambda *_: count.__setitem__(0, count[0] + 1))
        reward.at_sight("25", extract_answer(text))
        sys.setprofile(None)
        return count[0]

    for piece in (r"\boxed{", r"\boxed5 or ", r"\boxed{a}", r"\boxed{\}", "{}", "a,", " ", "1 "):
        assert steps(piece * 4000) < 2.5 * steps(piece * 2000) + 100
    assert bench.caller(3000)["texts"] == 3000      # none raises, none takes for ever


def test_a_worker_starts_no_program():
    code = r"""if True:
        import os, subprocess, sys, reward
        print(reward.equivalent(r"\frac{x}{2}+1.5", "(x+3)/2"))
        sys.addaudithook(reward.forbid)
        print(reward.equivalent(r"\binom{n}{2}", "n(n-1)/2"))
        for attack in (lambda: os.system("true"), lambda: subprocess.run(["true"]), os.fork):
            try:
                attack()
                print("passed")
            except PermissionError:
                print("refused")"""
    assert python(code).stdout.split() == ["True", "True"] + ["refused"] * 3


def test_answers_decided_at_sight_start_no_worker_and_import_nothing_heavy():
    code = r"""if True:
        import sys, reward
        print(reward.grade_all([r"\boxed{7}", r"\boxed{8}", "7", r"\boxed{1/2}"], ["7", "7", "7", "0.5"]))
        print(reward.POOLS, {"sympy", "math_verify", "torch", "numpy"} & {*sys.modules})"""
    assert python(code).stdout == "[1.0, 0.0, 0.0, 1.0]\n{} set()\n"


def test_the_script_that_grades_is_not_run_again_by_its_workers_and_a_fork_has_workers_of_its_own(tmp_path):
    script = tmp_path / "train_like.py"
    script.write_text(f"import os, sys; sys.path.insert(0, {str(ROOT)!r})" + r"""
print("started", flush=True)
import reward
print(reward.grade(r"\boxed{1+x}", "x+1"), len(reward.POOLS), flush=True)
if os.fork() == 0:
    print(reward.grade(r"\boxed{x+1+0}", "x+1"), len(reward.POOLS), flush=True)
    os._exit(0)
os.wait()""")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert run.stdout == "started\n1.0 1\n1.0 2\n", run.stderr


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs it to wait for a process that is no child")
@pytest.mark.parametrize("answer", ["x+1", HANGING], ids=["idle", "busy"])
def test_workers_die_with_their_parent_even_if_it_is_killed(answer):
    code = r"""if True:
        import os, reward, threading
        pool = reward.POOLS[os.getpid()] = reward.Pool(size=1, deadline=3.0)
        reward.grade(r"\boxed{1+x}", "x+1")
        print(pool.threads.submit(lambda: pool.own.worker.pid).result(), flush=True)
        reward.grade(r"\boxed{ANSWER}", "x")
        threading.Event().wait()""".replace("ANSWER", answer)
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = os.pidfd_open(int(parent.stdout.readline()))
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    assert select.select([child], [], [], 10)[0], "the worker is still there"
    os.close(child)


def test_a_run_that_was_asked_to_stop_still_gets_the_verdicts_of_its_step(pool):
    process = worker(pool)
    assert os.getpgid(process.pid) == process.pid       # a terminal signals whole groups
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    assert grade_all([r"\boxed{1+x}", r"\boxed{2+x}"], ["x+1", "x+1"]) == [1.0, 0.0]
    assert reward.timeouts() == 0 and process.poll() is None


def test_a_worker_that_died_while_idle_is_replaced_and_costs_no_answer(pool):
    process = worker(pool)
    process.kill()
    process.wait()
    assert grade(r"\boxed{1+x}", "x+1") == 1.0 and reward.timeouts() == 0


def test_a_worker_that_cannot_start_is_an_error_and_not_a_reward_of_zero(pool, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(ChildProcessError, match="math-verify"):
        grade(r"\boxed{1+x}", "x+1")
