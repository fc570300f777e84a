"""What watch.py promises: ten updates in a row that are not finite end a run, what leaves the policy untouched is said, entropy raises alerts."""

import ast
import contextlib
import json
import math
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import checkpoint
import data
import losses
import plot
import reward
import train
import watch
from rollout import TINY, load_policy

SHORT = ("--steps 12 --prompts 4 --mini-batch 2 --samples 4 --eval-limit 2 --final-samples 2 --eval-every 99 --device cpu --max-new-tokens 12").split()


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """train.py within this process: (exit status, standard output, standard error, metrics)."""
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 16))
    monkeypatch.setattr(plot, "curves", lambda *_: None)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, *map(str, argv), "--out", str(tmp_path / "run")])
        status = 0
        try:
            train.main()
        except SystemExit as stop:
            status = stop.code
        log = (tmp_path / "run" / "metrics.jsonl").read_text()
        refuse = lambda word: pytest.fail(word)
        return status, *capsys.readouterr(), [json.loads(line, parse_constant=refuse) for line in log.splitlines()]

    return run


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("method", losses.METHODS)
def test_a_policy_that_has_become_nan_stops_after_ten_updates_in_a_row_with_what_to_look_at(main, monkeypatch, method):
    """The learning rate takes the weights to infinity in the first update with a signal; nothing else is forced."""
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [float(i % 2) for i in range(len(texts))])
    status, out, err, lines = main("--method", method, "--lr", "1e38")
    assert status == 1 and len(err.strip().splitlines()[-1]) and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert "10 updates in a row" in last and "--lr 1e+38" in last and "--model" in last
    assert sum(line["skipped"] for line in lines) >= 8 and all(line["skipped"] in (0, 1, 2) for line in lines)
    assert lines[-1]["loss"] is None and "updates skipped: loss or gradient not finite" in out


def test_updates_in_a_row_are_counted_over_steps_and_a_good_one_ends_the_row():
    policy, o = SimpleNamespace(bad_updates=0), SimpleNamespace(lr=1.0, temperature=1.0, out="runs/x")
    log = lambda finite: {"finite": finite, "loss": math.nan, "grad_norm": math.inf}
    for finite in [False] * 9 + [True] + [False] * 9:
        watch.count_bad(policy, log(finite), 3, o)
    with pytest.raises(watch.Broken, match="step 4: 10 updates in a row had a loss .nan. or gradient norm .inf."):
        watch.count_bad(policy, log(False), 4, o)


def test_a_skipped_update_leaves_weights_and_moments_as_they_were(main, monkeypatch):
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [float(i % 2) for i in range(len(texts))])
    seen = []
    update = train.update

    def spy(policy, *rest):
        before = [p.detach().clone() for p in policy.model.parameters()], json.dumps(str(policy.optimizer.state_dict()))
        t, log = update(policy, *rest)
        if not log["finite"]:
            equal = all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(policy.model.parameters(), before[0]))
            seen.append(equal and json.dumps(str(policy.optimizer.state_dict())) == before[1])
        return t, log

    monkeypatch.setattr(train, "update", spy)
    main("--method", "grpo", "--lr", "1e38")
    assert len(seen) == 10 and all(seen)


def test_the_importance_ratio_cannot_overflow():
    logp = torch.tensor([[0.0, -1e4]], requires_grad=True)
    t = losses.Tokens(logp, torch.tensor([[-1e4, 0.0]]), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2))
    assert t.ratio.isfinite().all() and t.ratio.max() < 1e9
    (gradient,) = torch.autograd.grad(t.ratio.sum(), logp)
    assert gradient.isfinite().all()


# ---------------------------------------------------------------- nothing to learn from


def remarks(o=None, first=1.0, said=None, **metrics):
    metrics = {"step": 7, "entropy": 1.0, "skipped": 0, "grad_norm": 0.1, "no_signal": 0.0, "truncated": 0.0, "reward": 0.5} | metrics
    o = o or SimpleNamespace(method="grpo", lr=1e-3, max_new_tokens=12)
    return watch.remarks(metrics, {"entropy": first}, set() if said is None else said, o)


@pytest.mark.parametrize("value, words", [(0.0, "all answers were wrong"), (1.0, "all answers were right")])
def test_batches_all_wrong_or_all_right_leave_the_policy_untouched_and_say_so(main, monkeypatch, tmp_path, value, words):
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [value] * len(texts))
    status, out, _, lines = main("--method", "kl_cov", "--steps", 2)
    assert status == 0 and all(line["grad_norm"] == 0 for line in lines)
    for step in (1, 2):
        assert f"step {step}: no group had a signal (equal rewards in each): {words}" in out
    assert out.count("the policy was left as it was") == 2
    before, after = (load_policy(str(folder))[0] for folder in (TINY, tmp_path / "run" / "model"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_a_batch_that_is_all_cut_off_says_so_and_leaves_the_policy_untouched(main):
    status, out, _, lines = main("--method", "grpo", "--steps", 1, "--max-new-tokens", 1)
    assert status == 0 and lines[0]["truncated"] == 1 and lines[0]["grad_norm"] == 0
    assert "all completions were cut off at --max-new-tokens 1, the policy was left as it was" in out


def test_the_line_follows_the_gradient_not_the_rewards():
    assert not remarks(no_signal=1.0, grad_norm=0.2)  # a penalty moved the policy: it was not left as it was
    assert "no token had a gradient, the policy was left as it was" in remarks(no_signal=0.5, grad_norm=0)[0]
    assert remarks(skipped=2, grad_norm=None) == ["step 7: 2 updates skipped: loss or gradient not finite"]


# ---------------------------------------------------------------- entropy


def test_entropy_below_a_tenth_or_above_twice_the_first_is_said_once_with_the_option_to_turn():
    for method, option in (("kl_cov", "--kl-cov-ratio"), ("clip_cov", "--clip-cov-ratio"), ("grpo", "--method clip_cov or kl_cov")):
        o, said = SimpleNamespace(method=method, lr=1e-3, max_new_tokens=12), set()
        (line,) = remarks(o, said=said, entropy=0.09)
        assert "below a tenth" in line and option in line
        assert not remarks(o, said=said, entropy=0.08) and not remarks(o, entropy=0.11) and not remarks(o, entropy=1.9)
        (line,) = remarks(o, said=said, entropy=2.1)
        assert "more than twice" in line and "--lr" in line and (method == "grpo" or option in line)
        assert not remarks(o, said=said, entropy=2.2)
    assert not remarks(first=None) and not remarks(entropy=None)


# ---------------------------------------------------------------- signals


def test_a_wish_to_stop_that_comes_by_several_ways_is_one_and_one_that_is_repeated_later_acts_at_once(capfd, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with watch.signals(True) as received:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert received == [signal.SIGTERM]
        assert capfd.readouterr().err.count("stopping after this step") == 1
        monkeypatch.setattr(watch, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_names_the_options_that_lower_it_and_the_sizes_in_use(capsys, tmp_path, error):
    def run(o):
        raise error

    (tmp_path / "saved" / "checkpoint" / "step-20").mkdir(parents=True)
    o = SimpleNamespace(out=tmp_path / "saved", micro_batch=16384, prompts=64, samples=8, max_new_tokens=40, sample_batch=4096)
    with pytest.raises(SystemExit) as stop:
        watch.ending(run, o)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    for words in ("--micro-batch 16384", "--prompts 64", "--samples 8", "--max-new-tokens 40", "--sample-batch 4096", "--shard-optimizer", "--resume"):
        assert words in line
    o.out = tmp_path / "not saved"
    with pytest.raises(SystemExit):
        watch.ending(run, o)
    assert "no checkpoint was saved yet: --overwrite" in capsys.readouterr().err


def test_any_other_error_of_the_program_keeps_its_traceback():
    def run(o):
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="ours"):
        watch.ending(run, SimpleNamespace(out="x"))


# ---------------------------------------------------------------- safe with what it loads


def test_nothing_is_unpickled_evaluated_or_run_that_came_from_elsewhere():
    """Read off the source: every call of the programs here."""
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ("eval", "exec", "compile", "pickle.load", "pickle.loads", "os.system", "os.popen"), f"{path.name}: {name}"
            assert "shell" not in given and given.get("trust_remote_code", "False") == "False", f"{path.name}: {name}"
            assert name != "torch.load" or given.get("weights_only") == "True", path.name
            if re.fullmatch(r"Auto\w+\.from_pretrained", name):  # names and folders that a user gives
                assert given["trust_remote_code"] == "False" and ("Model" not in name or given["use_safetensors"] == "True"), path.name


def test_a_state_with_a_pickle_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"step": 1, "bad_updates": 0, "optimizer": Evil()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        checkpoint.restore(SimpleNamespace(kept={}), tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("end, destroyed", [(0, 1), (torch.OutOfMemoryError("CUDA out of memory"), 0), (RuntimeError("a bug"), 0), (OSError(28, "full"), 0)])
def test_after_an_error_a_process_goes_without_waiting_for_the_others(monkeypatch, tmp_path, end, destroyed):
    """With NCCL, to destroy the process group is to wait for all; they may be waiting for this one elsewhere."""
    calls = []

    def run(o):
        if end:
            raise end
        return 0

    monkeypatch.setattr(train, "train", run)
    monkeypatch.setattr(train, "dist", SimpleNamespace(is_initialized=lambda: True, destroy_process_group=lambda: calls.append(1)))
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "grpo", "--out", str(tmp_path / "run")])
    with contextlib.suppress(RuntimeError, SystemExit):
        train.main()
    assert len(calls) == destroyed
