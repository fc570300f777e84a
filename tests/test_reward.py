"""What earns a reward, what does not, and what nothing that a model writes can do."""

import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

import reward
from equivalence import quick
from grader import Pool
from notation import clean, number
from reward import extract_answer, grade, grade_all

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
COLLECTION = [json.loads(line) for line in open(ROOT / "tests" / "answers.jsonl", encoding="utf-8")]


def python(code, **options):
    """Run `code` as a script of its own in the repository."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


# ------------------------------------------------------------------------------------ extraction


def test_the_last_box_speaks():
    assert extract_answer(r"First \boxed{24}. No: \boxed{25}.") == "25"
    assert extract_answer(r"\boxed{25}, and then much more text. 26.") == "25"


def test_braces_within_the_box_are_balanced_and_escaped_braces_do_not_count():
    assert extract_answer(r"\boxed{\frac{1}{\sqrt{2}}} and }") == r"\frac{1}{\sqrt{2}}"
    assert extract_answer(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert extract_answer(r"\boxed{\left\{1}") == r"\left\{1"


def test_fbox_and_a_single_token_without_braces_are_boxes():
    assert extract_answer(r"\fbox{7}") == "7"
    assert extract_answer(r"\boxed 7") == "7"
    assert extract_answer(r"\boxed7$") == "7"
    assert extract_answer(r"\boxed 72") is None      # TeX would box the 7 alone


@pytest.mark.parametrize("response", ["", "25", "$25$", "boxed{25}", r"\box{25}", r"\boxed", r"\boxed{", r"\boxed{25", r"\boxedx{25}",
                                      r"25 \boxed{}", r"25 \boxed{ }", r"\boxed{25} \boxed{}", r"\boxed{25} so \boxed{25"])
def test_no_box_an_empty_box_and_an_unclosed_box_are_no_answer(response):
    assert extract_answer(response) is None
    assert grade(response, "25") == 0.0


def test_an_empty_box_scores_zero_even_if_the_number_stands_elsewhere():
    assert grade(r"25 is wrong. Or 25? $25$ \boxed{}", "25") == 0.0


def test_a_box_in_a_box_is_part_of_its_content():
    assert grade(r"\boxed{\boxed{25}}", "25") == 1.0
    assert grade(r"\boxed{24 \boxed{25}}", "25") == 0.0


@pytest.mark.parametrize("response", [r"\boxed{24} or \boxed{25}", r"$\boxed{24}$, $\boxed{25}$", r"\boxed{24}\boxed{25}",
                                      r"Either \boxed{25} or else \boxed{26}", r"\boxed{25 \text{ or } 26}", r"\boxed{25, 26}",
                                      r"\boxed{\{25, 26\}}", r"\boxed{x=25 \lor x=26}", r"\boxed{\pm 25}", r"\boxed{25 \;\; 26}"])
def test_several_answers_where_one_was_asked_are_no_answer(response):
    assert grade(response, "25") == 0.0


def test_boxes_side_by_side_answer_a_question_for_several_values():
    assert grade(r"$x = \boxed{1}$ or $\boxed{2}$".replace("x = ", ""), "2, 1") == 1.0


# ----------------------------------------------------------------------------------- equivalence


def test_every_undisputed_case_is_graded_as_it_should_be_and_no_wrong_answer_is_accepted():
    rewards = grade_all([case["response"] for case in COLLECTION], [case["gold"] for case in COLLECTION])
    wrong = [case for case, r in zip(COLLECTION, rewards) if r != float(case["verdict"])]
    assert not [case for case in wrong if not case["verdict"]], "accepted though wrong"
    assert not wrong, "refused though right"
    assert len(COLLECTION) >= 400 and sum(not case["verdict"] for case in COLLECTION) >= len(COLLECTION) / 2


@pytest.mark.parametrize("text, value", [("142.0", "142"), ("025", "25"), ("4.5e33", "45e32"), (r"4.5 \times 10^{33}", "45e32"),
                                         ("-1./3", "-1/3"), (r"-15\frac35", "-78/5"), (r"0.1\overline{6}", "1/6"), ("1e-5", "1/100000"),
                                         (r"10,\!080", "10080"), ("1{,}000", "1000"), (r"1\,000", "1000"), (".5", "1/2")])
def test_numerals_are_exact(text, value):
    from fractions import Fraction
    assert number(clean(text)) == Fraction(value)


@pytest.mark.parametrize("gold, answer", [("1/3", "0.333333"), ("2.7778e-6", r"3 \times 10^{-6}"), (r"\sqrt{2}", "1.41421356237309504880"),
                                          ("2^{-2012}", "2^{-2013}"), ("2^{1009}", "2^{1009}+1"), (r"\pi", r"\frac{355}{113}")])
def test_close_is_not_equal(gold, answer):
    assert grade(rf"\boxed{{{answer}}}", gold) == 0.0


def test_spelling_is_settled_after_one_pass():
    golds = {case["gold"] for case in COLLECTION}
    assert [gold for gold in golds if clean(clean(gold)) != clean(gold) and "boxed" not in gold] == []


def test_the_same_pairs_get_the_same_rewards_one_by_one_and_together():
    cases = COLLECTION[::40]
    together = grade_all([c["response"] for c in cases], [c["gold"] for c in cases])
    assert together == [grade(c["response"], c["gold"]) for c in cases]


def test_lists_of_different_length_are_an_error():
    with pytest.raises(ValueError):
        grade_all([r"\boxed{1}"], [])


def real_golds():
    for file in sorted(DATA.glob("*.jsonl")):
        for line in open(file, encoding="utf-8"):
            row = json.loads(line)
            gold = row.get("final_answer") or row.get("answer") or row.get("reward_model", {}).get("ground_truth") or row["solution"]
            gold = ", ".join(gold) if isinstance(gold, list) else gold
            yield gold.split("####")[-1].strip()


@pytest.mark.skipif(not DATA.exists(), reason="no real data here")
def test_every_real_gold_is_its_own_right_answer_and_that_is_decided_at_sight():
    golds = [gold for gold in real_golds() if "boxed" not in gold and gold.count("{") == gold.count("}")]
    assert len(golds) > 2500
    assert [gold for gold in golds if quick(gold, extract_answer(rf"\boxed{{{gold}}}")) is not True] == []


@pytest.mark.skipif(not DATA.exists(), reason="no real data here")
def test_no_real_gold_accepts_another_integer():
    golds = sorted({gold for gold in real_golds() if "boxed" not in gold})
    accepted = [gold for gold in golds if quick(gold, "31415") is True]
    assert accepted in ([], ["31415"])


# ------------------------------------------------------------------------------------- isolation

HANGING = [r"\binom{10^9}{5 \cdot 10^8}", "(((2^{200})^{200})^{200})^{200}", r"e^{e^{e^{e^{e^{e}}}}}"]
HOSTILE = ["9^{9^{9^{9}}}", "10000000!", "(" * 50 + "x" + ")" * 50, "a" * 10_000, "{" * 10_000 + "}" * 10_000, "$x", "9" * 10_000,
           "x^" * 200 + "2", "-" * 500 + "1", r"\frac" * 200, r"\sqrt" * 200, "\\", "\x00", "\ud800", "}{", "=" * 300, r"\text{" * 15 + "}" * 15,
           r"__import__('os').system('touch hacked')", r"\operatorname{eye}(99999)", "0^{-1}", r"\begin{pmatrix}" + "1&" * 200 + r"1\end{pmatrix}"]


@pytest.fixture(scope="module")
def pool():
    pool = Pool(size=1, deadline=1.0)
    yield pool
    pool.close()


@pytest.mark.parametrize("answer", HANGING)
def test_an_answer_that_takes_forever_scores_zero_within_the_deadline_and_is_counted(pool, answer):
    assert pool.ask(("x+1", "1+x"))                       # a worker is running
    broken, start = pool.broken, time.monotonic()
    assert pool.ask(("25", answer)) is False
    assert time.monotonic() - start < 3
    assert pool.broken == broken + 1


def test_the_pool_goes_on_after_a_worker_was_killed_for_its_answer(pool):
    pool.ask(("25", HANGING[0]))
    assert pool.map([("x+1", "1+x"), ("x+1", "x+2"), (r"\sqrt{8}", r"2\sqrt{2}")]) == [True, False, True]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: ascii(answer[:12]))
def test_a_hostile_answer_scores_zero(pool, answer):
    for gold in ("25", "x+1"):
        verdict = quick(gold, answer)
        assert not (pool.ask((gold, answer)) if verdict is None else verdict)
        assert grade(rf"\boxed{{{answer}", gold) == 0.0   # not closed
    assert not (ROOT / "hacked").exists()


def test_a_worker_that_died_while_idle_is_replaced_and_costs_no_answer(pool):
    pool.ask(("x+1", "1+x"))
    worker, broken = pool.idle.get(), pool.broken
    pool.idle.put(worker)
    worker.process.kill()
    worker.process.wait()
    assert pool.ask(("x+1", "1+x")) is True
    assert pool.broken == broken


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such limit; the deadline bounds memory there")
def test_a_worker_cannot_take_more_memory_than_it_was_given():
    code = f"""if True:
        import resource
        from grader import Pool
        small = Pool(size=1, deadline=20, memory=300 * 2**20)
        print(small.ask(("x+1", "1+x")), small.ask(("25", {HANGING[1]!r})), small.broken)  # a number of 1.6 billion bits
        small.close()
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert out[:3] == ["True", "False", "1"] and int(out[3]) < 400 * 2**10  # KiB; its own children alone


def test_a_worker_compiles_no_text_and_starts_no_program():
    code = """if True:
        import grader, os, subprocess
        import algebra
        grader.forbid()
        print(algebra.equivalent(r"\\\\frac{x}{2}+1.5", "(x+3)/2"))
        for attack in (lambda: eval("1+1"), lambda: exec("x=1"), lambda: os.system("true"), lambda: subprocess.run(["true"])):
            try:
                attack()
                print("passed")
            except PermissionError:
                print("refused")"""
    assert python(code).stdout.split() == ["True"] + ["refused"] * 4


def test_answers_decided_at_sight_start_no_worker_and_import_nothing_heavy():
    code = r"""if True:
        import sys, reward
        print(reward.grade_all([r"\boxed{7}", r"\boxed{8}", "7", r"\boxed{1/2}"], ["7", "7", "7", "0.5"]))
        print(reward.POOLS, [name for name in ("sympy", "math_verify", "antlr4", "torch", "numpy") if name in sys.modules])"""
    assert python(code).stdout == "[1.0, 0.0, 0.0, 1.0]\n{} []\n"


def test_grading_works_off_the_main_thread():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.extend(grade_all([r"\boxed{1+x}", r"\boxed{2+x}"], ["x+1", "x+1"])))
    thread.start()
    thread.join()
    assert rewards == [1.0, 0.0]


def test_a_script_without_a_main_guard_is_not_run_again_by_the_workers(tmp_path):
    script = tmp_path / "train_like.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nprint('started')\nimport reward\n"
                      "print(reward.grade(r'\\boxed{1+x}', 'x+1'))\n")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert run.stdout == "started\n1.0\n", run.stderr


def test_ranks_of_one_machine_share_its_cores_and_each_has_its_own_workers():
    code = r"""if True:
        import os, parallel, reward
        os.environ |= {"LOCAL_RANK": "63", "LOCAL_WORLD_SIZE": "64"}
        parallel.keep_apart()
        print(reward.grade(r"\boxed{1+x}", "x+1"), reward.pool().size)
        if os.fork() == 0:
            print(reward.grade(r"\boxed{x+1+0}", "x+1"), len(reward.POOLS), flush=True)
            os._exit(0)
        os.wait()"""
    assert sorted(python(code).stdout.split("\n")) == ["", "1.0 1", "1.0 2"]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waiting for a process that is no child needs pidfd")
@pytest.mark.parametrize("answer", ["1+x", HANGING[0]], ids=["idle", "hanging"])
def test_workers_die_with_their_parent_even_if_it_is_killed(answer):
    code = f"""if True:
        import threading, grader
        pool = grader.Pool(size=1, deadline=1.0)
        pool.ask(("x+1", "1+x"))
        worker = pool.idle.get()
        pool.idle.put(worker)
        if {answer!r} != "1+x":
            threading.Thread(target=pool.ask, args=(("25", {answer!r}),)).start()
        print(worker.process.pid, flush=True)
        threading.Event().wait()"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = os.pidfd_open(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert select.select([worker], [], [], 10)[0], "the worker is still there"
    os.close(worker)


def test_a_run_that_was_asked_to_stop_still_gets_the_verdicts_of_its_step(pool):
    """A scheduler signals every process, torchrun and the terminal whole groups: workers stand apart and wait for their parent's end."""
    pool.ask(("x+1", "1+x"))
    worker, broken = pool.idle.get(), pool.broken
    pool.idle.put(worker)
    assert os.getpgid(worker.process.pid) == worker.process.pid
    for number in (signal.SIGTERM, signal.SIGINT):
        worker.process.send_signal(number)
    assert pool.map([("x+1", "1+x"), ("x+1", "x+2")]) == [True, False]
    assert pool.broken == broken and worker.process.poll() is None


def test_a_worker_that_cannot_start_is_an_error_and_not_a_reward_of_zero(monkeypatch):
    monkeypatch.setattr("grader.subprocess.Popen", lambda command, **options: REAL_POPEN([sys.executable, "-c", "pass"], **options))
    with pytest.raises(RuntimeError, match="grader"):
        Pool(size=1).ask(("x+1", "1+x"))


REAL_POPEN = subprocess.Popen


def test_broken_off_answers_are_counted_for_the_training_log(monkeypatch):
    monkeypatch.setitem(reward.POOLS, os.getpid(), Pool(size=1, deadline=1.0))
    assert reward.timeouts() == 0
    assert grade_all([rf"\boxed{{{HANGING[0]}}}", r"\boxed{25}"], ["25", "25"]) == [0.0, 1.0]
    assert reward.timeouts() == 1


def test_the_demonstration_runs():
    run = subprocess.run([sys.executable, "reward.py"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and re.search("broken off", run.stdout), run.stderr
