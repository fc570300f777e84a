"""What train.py promises: one exact step, metrics that are what their names say, and runs that start, end, resume and fail in order.

A narrow policy with random weights and paid-for nonsense suffice for the step; whole runs take the embedded policy.
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import subprocess_of
from safetensors.torch import load_file

import checkpoint
import data
import eval as evaluation
import losses
import plot
import reward
import train
from lab import warmstart
from rollout import TINY, load_policy
from data import UserError

METHODS = list(losses.METHODS)
WITHOUT_SIGNAL = {"entropy_bonus", "kl_ref"}  # their loss has a gradient where no reward speaks
KEYS = """step reward entropy entropy_seq covariance selected clip_fraction ratio_max loss grad_norm lr
          completion_length truncated no_signal different skipped tokens seconds""".split()
EOS = 1  # of the embedded tokenizer

# ---------------------------------------------------------------- a policy without skill, and its problems


@pytest.fixture(scope="module")
def novice(tmp_path_factory):
    """A checkpoint folder: the embedded tokenizer and a narrow model with random weights."""
    folder = tmp_path_factory.mktemp("novice")
    model = warmstart.make_model(16, 1, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(folder)
    warmstart.make_tokenizer().save_pretrained(folder)
    (folder / "train.jsonl").write_text("".join(f'{{"problem": "\\\\boxed{{{i}+1=", "answer": "{i + 1}"}}\n' for i in reversed(range(20))))
    (folder / "heldout.jsonl").write_text('{"problem": "\\\\boxed{5+2=", "answer": "7"}\n')
    return folder


@pytest.fixture
def options(novice, tmp_path):
    """options(method, "--lr 1 ...") as the command line gives them, for the novice and small batches."""

    def parse(method="grpo", more=""):
        small = "--prompts 4 --mini-batch 2 --passes 1 --samples 4 --max-new-tokens 12 --lr 1e-2 --eval-limit 1 --final-samples 2 --device cpu"
        files = ["--model", novice, "--data", novice / "train.jsonl", "--eval-data", novice / "heldout.jsonl", "--out", tmp_path / "run"]
        return train.options(["--method", method, *small.split(), *map(str, files), *more.split()])

    return parse


@pytest.fixture
def paid(monkeypatch):
    """Rewards for nonsense, so that a policy without skill has something to learn: 1 for every text of even length."""
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [float(len(text) % 2 == 0) for text in texts])


@pytest.fixture
def updates(monkeypatch):
    """Every update of a step as (mini-batch, Tokens, what it logged, dL/dlogp)."""
    kept, update, backward = [], train.update, train.backward

    def spy(policy, batch, *rest):
        t, log = update(policy, batch, *rest)
        kept[-1] = (batch, t, log, kept[-1])
        return t, log

    def spy_backward(model, batch, dlogp, *rest):
        kept.append(dlogp.clone())
        return backward(model, batch, dlogp, *rest)

    monkeypatch.setattr(train, "update", spy)
    monkeypatch.setattr(train, "backward", spy_backward)
    return kept


def step(o, number=1, policy=None, problems=None):
    """One step of a fresh policy, or of the one given: (policy, metrics)."""
    fresh, all_problems, _ = train.load(o) if policy is None or problems is None else (policy, problems, None)
    policy = policy or fresh
    metrics, _ = train.step(policy, train.problems_of_step(problems or all_problems, number, o), number, o)
    return policy, metrics


def draws(monkeypatch, completions):
    """Rollouts that always are these completions."""
    monkeypatch.setattr(train, "draw_rollouts", lambda *_: [list(c) for c in completions])


def weights(policy):
    return [p.detach().clone() for p in policy.model.parameters()]


def unchanged(policy, before):
    return all(torch.equal(p, b) for p, b in zip(policy.model.parameters(), before))


# Sixteen completions, four for each problem: lengths 1 to 12, some without an end, EOS alone, and ids of padding (0) inside.
UNEVEN = [[5, 6, EOS], [7, EOS], [EOS], [3] * 12, [4, 0, 0, EOS], [9, 9, 9, EOS], [8, EOS], [2] * 11 + [EOS],
          [6] * 12, [6] * 9 + [EOS], [3, 4, 5, EOS], [EOS], [7, 7, EOS], [7, 8, EOS], [9, EOS], [10, 11, EOS]]  # fmt: skip
COUNT = sum(map(len, UNEVEN))


# ---------------------------------------------------------------- the ratio


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", ["", "--temperature 0.7", "--micro-batch 40"])
def test_the_ratio_is_exactly_1_on_the_first_mini_batch_and_not_on_the_next(options, paid, updates, method, more):
    step(options(method, more))
    (first, t, log, _), (_, later, later_log, _) = updates
    assert (t.ratio == 1).all() and log["ratio_max"] == 1.0 and torch.equal(t.logp, first["old_logp"])
    assert (later.ratio != 1).any() and later_log["ratio_max"] > 1.0


def test_a_step_of_one_mini_batch_has_a_largest_ratio_of_exactly_1(options, paid):
    assert step(options("grpo", "--mini-batch 4"))[1]["ratio_max"] == 1.0
    assert step(options("grpo", "--mini-batch 4 --passes 2"))[1]["ratio_max"] > 1.0


@pytest.mark.parametrize("noise", [1e-6, -1e-3, math.nan])
def test_old_log_probs_of_another_computation_stop_the_run(options, paid, monkeypatch, noise):
    score = train.score
    calls = []

    def noisy(*arguments):
        calls.append(1)
        logp, H = score(*arguments)
        return (logp + noise * (logp != 0) if len(calls) == 1 else logp), H

    monkeypatch.setattr(train, "score", noisy)
    with pytest.raises(RuntimeError, match="ratio"):
        step(options())


# ---------------------------------------------------------------- what is in the loss


def test_the_end_of_sequence_is_in_the_loss(options, paid, updates):
    o = options("grpo", "--lr 1e-6")  # small, for a token that PPO's clip silences has no gradient
    step(o)
    ended = 0
    for batch, t, _, dlogp in updates:
        for i, completion in enumerate(batch["completions"]):
            assert t.mask[i].sum() == len(completion) and EOS not in completion[:-1]
            if completion[-1] == EOS and batch["advantages"][i, 0] != 0:
                ended += 1
                assert dlogp[i, len(completion) - 1] != 0
    assert ended > 0


def test_stopping_is_trained(options, monkeypatch):
    """Completions that stop at once are rewarded: the policy comes to stop sooner."""
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [float(len(text) < 3) for text in texts])
    o = options("grpo", "--samples 16 --lr 3e-2")
    policy, problems, _ = train.load(o)
    lengths = [step(o, n, policy, problems)[1]["completion_length"] for n in range(1, 9)]
    assert lengths[-1] < lengths[0] / 2


def test_masks_come_from_lengths_so_no_id_is_taken_for_padding(options, paid, updates, monkeypatch):
    draws(monkeypatch, UNEVEN)
    _, metrics = step(options())
    assert metrics["tokens"] == COUNT == sum(log["tokens"] for _, _, log, _ in updates)
    for batch, t, _, _ in updates:
        assert t.mask.sum(1).tolist() == [len(c) for c in batch["completions"]]


def test_the_denominator_is_the_number_of_tokens_of_the_whole_mini_batch_without_signal_or_with(options, updates, monkeypatch):
    """The second problem's group has equal rewards: its tokens have no gradient, but they count."""
    draws(monkeypatch, UNEVEN)
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [float(i in (0, 3, 8, 13)) for i in range(16)])
    o = options("grpo", "--micro-batch 20")
    _, metrics = step(o)
    batch, t, _, dlogp = updates[0]
    count = sum(map(len, UNEVEN[:8]))
    torch.testing.assert_close(dlogp, -batch["advantages"] / count, rtol=1e-6, atol=0)
    assert (dlogp[4:] == 0).all() and (dlogp[:4][t.mask[:4]] != 0).all()
    assert metrics["no_signal"] == 0.25


def test_log_probs_gradients_and_the_update_are_those_of_the_temperature_that_sampled(options, paid, updates):
    o = options("grpo", "--temperature 0.5")
    policy, problems, _ = train.load(o)
    model = policy.model
    step(o, 1, policy, problems)
    batch, t, _, _ = updates[0]
    fresh, _, _ = train.load(o)
    for i in (0, 5):
        p, c = batch["prompts"][i], batch["completions"][i]
        logits = fresh.model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1]
        logp = torch.log_softmax(logits / 0.5, -1).gather(1, torch.tensor(c)[:, None])[:, 0]
        torch.testing.assert_close(batch["old_logp"][i, : len(c)], logp.detach(), rtol=1e-4, atol=1e-4)
    assert model is policy.model


# ---------------------------------------------------------------- no signal


@pytest.mark.parametrize("method", sorted(set(METHODS) - WITHOUT_SIGNAL))
@pytest.mark.parametrize("value", [0.0, 1.0, 0.7])
def test_equal_rewards_leave_every_parameter_bit_identical_even_with_momentum_from_before(options, monkeypatch, method, value):
    o = options(method, "--passes 2")
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [float(len(text) % 2) for text in texts])
    start, problems, _ = train.load(o)
    before = weights(start)
    policy, metrics = step(o, 1, start, problems)
    assert metrics["no_signal"] < 1 and not unchanged(policy, before) and policy.optimizer.state
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [value] * len(texts))
    before = weights(policy)
    _, metrics = step(o, 2, policy, problems)
    assert unchanged(policy, before)
    assert metrics["no_signal"] == 1 and metrics["grad_norm"] == 0 and metrics["loss"] == 0 and metrics["skipped"] == 0
    assert metrics["reward"] == pytest.approx(value) and metrics["ratio_max"] == 1.0


def test_the_seconds_of_a_step_add_up_to_what_it_took(options, paid, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # of this process alone, whatever else runs
    for method, extra in (("grpo", ""), ("kl_ref", "--temperature 0.7"), ("kl_cov", "--filter-groups")):
        o = options(method, extra)
        policy, problems, _ = train.load(o)
        some = train.problems_of_step(problems, 1, o)
        began = time.perf_counter()
        metrics, samples = train.step(policy, some, 1, o)
        took = time.perf_counter() - began
        assert samples and 0.98 * took < sum(metrics["seconds"].values()) <= took


def test_a_profile_is_a_trace_of_three_steps_that_loads_as_json(options, paid, capsys):
    o = options("grpo", "--steps 5 --profile --final-samples 2")
    assert train.train(o) == 0
    checkpoint.release()
    events = json.loads(gzip.decompress((Path(o.out) / "trace.json.gz").read_bytes()))["traceEvents"]
    assert [e["name"] for e in events if str(e.get("name")).startswith("ProfilerStep")] == [f"ProfilerStep#{n}" for n in (1, 2, 3)]
    assert {"aten::mm", "aten::scaled_dot_product_attention"} < {e.get("name") for e in events}


def test_no_signal_is_the_share_of_groups_with_equal_rewards(options, monkeypatch):
    for groups, share in (([0, 0, 0, 0], 1.0), ([1, 1, 1, 1], 0.0), ([1, 0, 0, 0], 0.75), ([1, 0, 1, 0], 0.5)):
        mixed = [float(g and s == 0) for g in groups for s in range(4)]
        monkeypatch.setattr(reward, "grade_all", lambda texts, answers: mixed)
        assert step(options())[1]["no_signal"] == share


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", ["", "--temperature 0.7"])
def test_metrics_hold_every_key_of_the_contract_as_plain_finite_numbers(options, paid, method, more):
    _, metrics = step(options(method, more))
    assert set(KEYS) <= set(metrics) and set(metrics) - set(KEYS) == ({"entropy_sampling"} if more else set())
    assert set(metrics["seconds"]) == {"sample", "reward", "score", "update"}  # the total is added by the loop
    for key, value in (metrics | metrics["seconds"]).items():
        assert key == "seconds" or type(value) in (int, float) and math.isfinite(value), key
    assert metrics["skipped"] == 0 and min(metrics["seconds"].values()) >= 0


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_sums_over_counts_however_uneven_the_mini_batches(options, paid, updates, monkeypatch, method):
    draws(monkeypatch, UNEVEN)
    o = options(method, "--mini-batch 1 --lr 0.3 --passes 2 --clip-cov-ratio 0.2 --cov-low 0.05 --kl-cov-ratio 0.2")
    _, m = step(o)
    assert len(updates) == 8
    tokens = sum(t.mask.sum().item() for _, t, _, _ in updates)
    share = lambda name: sum(getattr(t, name).sum().item() for _, t, _, _ in updates) / tokens
    assert m["covariance"] == pytest.approx(share("covariance"))
    acts = method in ("clip_cov", "kl_cov", "high_entropy", "low_entropy")
    assert m["selected"] == pytest.approx(share("selected") if acts else 0)
    assert m["clip_fraction"] == pytest.approx(0 if method == "kl_cov" else share("clipped"))
    assert m["ratio_max"] == max(t.ratio[t.mask].max().item() for _, t, _, _ in updates) > 1.2
    assert (m["selected"] > 0.01) == acts
    assert method == "kl_cov" or m["clip_fraction"] > 0.01
    assert m["loss"] == pytest.approx(sum(log["loss"] for _, _, log, _ in updates) / 8)
    assert m["grad_norm"] == pytest.approx(sum(log["grad_norm"] for _, _, log, _ in updates) / 8)
    assert m["tokens"] == COUNT and m["completion_length"] == COUNT / 16
    assert m["truncated"] == 2 / 16
    texts = warmstart.make_tokenizer().batch_decode(UNEVEN, skip_special_tokens=True)
    assert m["reward"] == sum(len(text) % 2 == 0 for text in texts) / 16


def exact_entropies(policy, batches, temperature):
    """Of every token, by whole softmaxes: a list of lists."""
    rows = []
    for batch in batches:
        for p, c in zip(batch["prompts"], batch["completions"]):
            logp = torch.log_softmax(policy.model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1].double() / temperature, -1)
            rows.append((-(logp.exp() * logp).sum(-1)).tolist())
    return rows


def test_different_counts_completions_that_are_the_same_to_the_same_prompt_once(options, paid, monkeypatch):
    for rows, share in (([[2, EOS]] * 16, 4 / 16), ([[2, EOS], [2, 2, EOS]] * 8, 8 / 16), ([[2 + i // 8, 2 + i % 8, EOS] for i in range(16)], 1.0)):
        draws(monkeypatch, rows)
        assert step(options())[1]["different"] == share


def test_entropy_is_the_token_mean_and_entropy_seq_the_mean_of_the_means_of_sequences(options, paid, updates, monkeypatch):
    draws(monkeypatch, UNEVEN)
    o = options()
    _, m = step(o)
    H = exact_entropies(train.load(o)[0], [u[0] for u in updates], 1.0)
    assert m["entropy"] == pytest.approx(math.fsum(map(math.fsum, H)) / COUNT, rel=1e-5)
    assert m["entropy_seq"] == pytest.approx(sum(math.fsum(h) / len(h) for h in H) / 16, rel=1e-5)
    assert abs(m["entropy"] - m["entropy_seq"]) > 1e-4


def test_at_another_temperature_entropy_is_reported_at_1_and_at_that_of_sampling(options, paid, updates, monkeypatch):
    draws(monkeypatch, UNEVEN)
    o = options("grpo", "--temperature 0.5")
    _, m = step(o)
    policy, batches = train.load(o)[0], [u[0] for u in updates]
    for key, temperature in (("entropy", 1.0), ("entropy_sampling", 0.5)):
        H = exact_entropies(policy, batches, temperature)
        assert m[key] == pytest.approx(math.fsum(map(math.fsum, H)) / COUNT, rel=1e-5)
        if temperature == 1:
            assert m["entropy_seq"] == pytest.approx(sum(math.fsum(h) / len(h) for h in H) / 16, rel=1e-5)
    assert m["entropy"] > m["entropy_sampling"] + 0.1


def test_the_logged_learning_rate_is_the_one_that_trains(options, paid):
    o = options("grpo", "--lr 0.005 --mini-batch 4")
    policy, problems, _ = train.load(o)
    before = weights(policy)
    _, m = step(o, 1, policy, problems)
    moved = max((p - b).abs().max().item() for p, b in zip(policy.model.parameters(), before))
    assert m["lr"] == o.lr == 0.005 == pytest.approx(moved, rel=0.01)  # Adam's first step is of its learning rate
    policy.optimizer.param_groups[0]["lr"] = 0.25
    assert step(o, 2, policy, problems)[1]["lr"] == 0.25


def test_gradients_are_clipped_at_the_norm_that_the_option_says_and_logged_before(options, paid, monkeypatch):
    clipped = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: clipped.append(limit) or clip(p, limit))
    policy, m = step(options("grpo", "--grad-clip 0.001 --mini-batch 4"))
    assert clipped == [0.001] and m["grad_norm"] > 0.01
    norm = torch.stack([p.grad.norm() for p in policy.model.parameters()]).norm().item()
    assert norm == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e30])  # at the last, gradients are finite and their norm is not
def test_an_update_that_is_not_finite_is_skipped_and_counted_and_logged_as_null(options, paid, monkeypatch, broken):
    o = options()
    policy, problems, _ = train.load(o)
    step(o, 1, policy, problems)  # for momentum
    monkeypatch.setitem(losses.METHODS, "grpo", lambda t, o: broken * t.ratio * t.advantages)
    before = weights(policy)
    _, m = step(o, 2, policy, problems)
    assert unchanged(policy, before) and m["skipped"] == 2
    assert m["grad_norm"] is None and (m["loss"] is None) == (broken != 1e30)
    json.dumps(m, allow_nan=False)


# ---------------------------------------------------------------- truncated, empty, too long


def test_a_batch_of_completions_that_never_end_is_trained_on_and_counted(options, paid, updates, monkeypatch):
    draws(monkeypatch, [[2 + (i + j) % 9 for j in range(12)] for i in range(16)])
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [float(i % 3 == 0) for i in range(16)])
    _, m = step(options("grpo", "--lr 1e-6"))
    assert m["truncated"] == 1 and m["completion_length"] == 12 and m["grad_norm"] > 0
    assert all(t.mask.all() and (dlogp[:, -1] != 0).all() for _, t, _, dlogp in updates)  # the last token, no EOS, counts


def test_a_completion_that_says_nothing_is_one_token_and_is_graded(options, updates, monkeypatch):
    draws(monkeypatch, [[EOS]] * 16)
    asked = []
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: asked.extend(texts) or [float(i % 2) for i in range(16)])
    _, m = step(options("grpo", "--lr 1e-6"))
    assert asked == [""] * 16 and m["tokens"] == 16 and m["truncated"] == 0 and m["entropy"] == pytest.approx(m["entropy_seq"])
    assert all((dlogp != 0).all() for *_, dlogp in updates)


def test_a_last_token_of_any_end_of_sequence_id_is_no_truncation(options, paid, monkeypatch):
    o = options()
    policy, problems, _ = train.load(o)
    draws(monkeypatch, [[5, 1], [5, 7], [5, 6], [7]] * 4)
    policy.eos_ids = {1, 7}
    assert step(o, 1, policy, problems)[1]["truncated"] == 0.25


def test_prompts_longer_than_the_limit_are_dropped_and_counted(options, capsys):
    """A box, the digits of 0 to 19, and three characters: half of the prompts have 5 tokens and half have 6."""
    policy, problems, _ = train.load(options("grpo", "--max-prompt-tokens 5"))
    kept = [(policy.tokenizer.decode(ids), answer) for ids, answer in problems]
    assert kept == [(f"\\boxed{{{i}+1=", str(i + 1)) for i in reversed(range(10))]  # each still with its own answer
    assert "10 problems (0 dropped as held-out, 10 as too long)" in capsys.readouterr().out
    assert len(train.load(options("grpo", "--max-prompt-tokens 6"))[1]) == 20
    with pytest.raises(UserError, match="longer than 4 tokens"):
        train.load(options("grpo", "--max-prompt-tokens 4"))


def test_training_problems_that_are_held_out_are_dropped_and_counted(options, novice, tmp_path, capsys):
    both = tmp_path / "both.jsonl"
    both.write_text((novice / "train.jsonl").read_text() + (novice / "heldout.jsonl").read_text())
    _, problems, _ = train.load(options("grpo", f"--data {both}"))
    assert len(problems) == 20 and "(1 dropped as held-out, 0 as too long)" in capsys.readouterr().out


# ---------------------------------------------------------------- order and randomness


@pytest.mark.parametrize("count, batch", [(7, 3), (8, 4), (3, 8), (5, 5), (4, 1)])
def test_every_problem_comes_once_in_each_epoch(options, count, batch):
    o = options()
    o.prompts = batch
    stream = [p for n in range(1, 41) for p in train.problems_of_step(list(range(count)), n, o)]
    epochs = [stream[i : i + count] for i in range(0, len(stream) - count + 1, count)]
    assert len(stream) == 40 * batch and all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1  # in another order each time


def test_the_problems_of_a_step_follow_from_seed_and_step_alone(options):
    o, other = options(), options("kl_cov", "--seed 1")
    order = [train.problems_of_step(list(range(50)), n, o) for n in range(1, 30)]
    for n in (29, 3, 17):
        random.seed(n), torch.manual_seed(n)
        assert train.problems_of_step(list(range(50)), n, options("clip_cov")) == order[n - 1]
    assert [train.problems_of_step(list(range(50)), n, other) for n in range(1, 30)] != order


def test_every_purpose_step_and_seed_has_random_numbers_of_its_own(options):
    draw = lambda o, *which: torch.rand(4, generator=train.generator(o, *which)).tolist()
    zero, one = options(), options("grpo", "--seed 1")
    several = [draw(o, step, purpose) for o in (zero, one) for step in (1, 2, "1.0", "11") for purpose in ("sample", "select", "order")]
    assert len(set(map(tuple, several))) == len(several)
    assert draw(zero, 1, "sample") == draw(options("kl_cov"), 1, "sample")  # every method meets the same random numbers


def test_every_step_draws_other_completions_and_every_update_chooses_anew(options, paid, monkeypatch):
    o, seeds, update = options(), [], train.update
    policy, problems, _ = train.load(o)
    prompts = [ids for ids, _ in problems[:3]]
    drawn = [train.draw_rollouts(policy, prompts, number, o) for number in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1] and len(set(map(tuple, drawn[0][:4]))) > 1
    monkeypatch.setattr(train, "update", lambda policy, batch, g, *rest: seeds.append(g.initial_seed()) or update(policy, batch, g, *rest))
    for number in (1, 2):
        step(o, number, policy, problems)
    assert len(seeds) == len(set(seeds)) == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_step_neither_draws_from_nor_depends_on_the_global_random_state(options, paid, method):
    o = options(method, "--clip-cov-ratio 0.2 --cov-low 0.01")
    results = []
    for seed in (1, 2):
        policy, problems, held_out = train.load(o)
        random.seed(seed), torch.manual_seed(seed)
        before = torch.get_rng_state(), random.getstate()
        _, metrics = step(o, 1, policy, problems)
        train.evaluate(policy, held_out, 2, 1.0, o)
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        metrics.pop("seconds")
        results.append((metrics, [p.tolist() for p in policy.model.parameters()]))
    assert results[0] == results[1]


def test_each_completion_is_graded_by_the_answer_of_its_own_problem(options, monkeypatch):
    asked = []
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: asked.extend(answers) or [0.0] * len(texts))
    o = options()
    policy, problems, _ = train.load(o)
    step(o, 1, policy, problems)
    assert asked == [answer for _, answer in train.problems_of_step(problems, 1, o) for _ in range(4)]


def test_advantages_compare_the_samples_of_one_problem(options, updates, monkeypatch):
    values = [1.0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1]
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: values)
    step(options())
    got = torch.cat([batch["advantages"][:, 0] for batch, *_ in updates])
    assert torch.equal(got, losses.group_advantages(torch.tensor(values).view(4, 4)).flatten())


# ---------------------------------------------------------------- precision


def test_parameters_gradients_and_the_state_of_the_optimizer_are_fp32(options, paid):
    policy, _ = step(options())
    assert {p.dtype for p in policy.model.parameters()} == {p.grad.dtype for p in policy.model.parameters()} == {torch.float32}
    assert {x.dtype for state in policy.optimizer.state.values() for x in state.values() if torch.is_tensor(x)} == {torch.float32}


def test_an_update_too_small_for_bf16_is_kept(options, paid):
    o = options("grpo", "--lr 1e-6 --mini-batch 4")
    policy, problems, _ = train.load(o)
    before = weights(policy)
    step(o, 1, policy, problems)
    moved = sum((p != b).sum().item() for p, b in zip(policy.model.parameters(), before))
    in_bf16 = sum((p.bfloat16() != b.bfloat16()).sum().item() for p, b in zip(policy.model.parameters(), before))
    assert moved > 20 * in_bf16


def test_on_a_gpu_rollouts_come_from_a_bf16_copy_that_follows_the_policy(options):
    """Nothing here needs the GPU: the device is a word in the options."""
    o = argparse.Namespace(**vars(options()) | {"device": "cuda"})
    policy, _, _ = train.load(options())
    assert policy.sampler is policy.model  # on the CPU there is but one
    sampler = train.sampling_copy(policy.model, o)
    assert {p.dtype for p in sampler.parameters()} == {torch.bfloat16} and sampler is not policy.model
    assert sampler.get_output_embeddings().weight is sampler.get_input_embeddings().weight  # tied weights are still one
    buffers = dict(policy.model.named_buffers())
    assert buffers and all(torch.equal(b, buffers[name]) for name, b in sampler.named_buffers())  # where a token stands is not rounded
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(torch.randn_like(p))
    train.refresh(sampler, policy.model)
    for mine, theirs in zip(sampler.parameters(), policy.model.parameters()):
        assert theirs.dtype == torch.float32 and torch.equal(mine, theirs.bfloat16())


def test_rollouts_and_evaluations_come_from_the_policy_as_it_is_now(options, paid, monkeypatch):
    """If the sampler is a copy, it is brought up to date before it is drawn from."""
    o = options("grpo", "--lr 0.1")
    policy, problems, held_out = train.load(o)
    policy.sampler = copy.deepcopy(policy.model)
    step(o, 1, policy, problems)
    for use in (lambda: train.draw_rollouts(policy, [[2, 3]], 1, o), lambda: train.evaluate(policy, held_out, 1, 0.0, o)):
        with torch.no_grad():
            policy.model.lm_head.weight.add_(0.1)
        assert not torch.equal(policy.sampler.lm_head.weight, policy.model.lm_head.weight)
        use()
        assert torch.equal(policy.sampler.lm_head.weight, policy.model.lm_head.weight)


# ---------------------------------------------------------------- whole runs on the embedded task

FILES = {"config.json", "metrics.jsonl", "checkpoint", "model", "samples.jsonl", "curves.png", "final.json"}
SHORT = "--prompts 8 --mini-batch 4 --samples 4 --eval-limit 12 --final-samples 4 --seed 5 --device cpu --lr 1e-3".split()


@pytest.fixture
def few(monkeypatch):
    """The embedded task with 64 training problems: making all 20,000 takes longer than a run."""
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))


@pytest.fixture
def quick(few, monkeypatch):
    """And no picture at the end."""
    monkeypatch.setattr(plot, "curves", lambda *_: None)


@pytest.fixture
def main(monkeypatch, capsys):
    """`python train.py ...` within this process: (exit status, standard output, standard error)."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        capsys.readouterr()
        try:
            train.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def lines(path):
    return [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} in {path}")) for line in path.read_text().splitlines()]


def metrics_of(run):
    """The lines of metrics.jsonl without their seconds."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(run / "metrics.jsonl")]


def check_run(run, method, steps):
    """That a run directory is as design.md draws it."""
    assert {file.name for file in run.iterdir()} == FILES
    config = json.loads((run / "config.json").read_text())
    assert config["method"] == method and config["steps"] == steps and config["lr"] == 1e-3 and config["processes"] == 1
    assert config["versions"]["torch"] == torch.__version__ and "commit" in config
    assert set(vars(train.options(["--method", method, "--out", "nowhere/at/all"]))) <= set(config)

    metrics = lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    for line in metrics:
        assert set(KEYS) <= set(line) and line["tokens"] > 0 and line["lr"] == 1e-3
        assert set(line["seconds"]) == {"sample", "reward", "score", "update", "total"}
        assert line["seconds"]["total"] == pytest.approx(sum(v for k, v in line["seconds"].items() if k != "total"))
    for line in (metrics[0], metrics[-1]):
        assert 0 <= line["accuracy"] <= 1 and 0 <= line["accuracy_sampled"] <= 1

    samples = lines(run / "samples.jsonl")
    assert samples and {line["step"] for line in samples} <= set(range(1, steps + 1))
    assert len({line["prompt"] for line in samples if line["step"] == 1}) == 4  # of all problems of the first mini-batch
    for line in samples:
        assert "".join(line["tokens"]).startswith(line["completion"]) and len(line["tokens"]) == len(line["entropy"]) == len(line["covariance"])
        assert min(line["entropy"]) >= -1e-5 and line["reward"] in (0.0, 1.0) and all(i < len(line["tokens"]) for i in line["selected"])
    assert any(line["selected"] for line in samples) == (method in ("kl_cov", "high_entropy", "low_entropy")) or method == "clip_cov"

    final = json.loads((run / "final.json").read_text())
    assert list(final["pass_at"]) == ["1", "2", "4"] and list(final["pass_at"].values()) == sorted(final["pass_at"].values())
    assert final["pass_at"]["1"] == pytest.approx(final["accuracy_sampled"]) and 0 <= final["accuracy"] <= 1
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for folder in ("model", f"checkpoint/step-{steps}"):
        model, tokenizer, eos_ids = load_policy(str(run / folder))
        assert {p.dtype for p in model.parameters()} == {torch.float32} and eos_ids == {tokenizer.eos_token_id}
    start = load_policy(TINY)
    assert any(not torch.equal(a, b) for a, b in zip(start[0].parameters(), model.parameters()))
    held_out = data.load_problems("arithmetic_heldout", limit=12)
    greedy = lambda policy: evaluation.evaluate(*policy, held_out, 1, 0.0, 40)["accuracy"]
    assert metrics[0]["accuracy"] == pytest.approx(greedy(start))  # step 1 has that of the policy it starts from
    assert final["accuracy"] == pytest.approx(greedy((model, tokenizer, eos_ids)))
    assert torch.load(run / "checkpoint" / f"step-{steps}" / "state.pt", weights_only=True)["step"] == steps


def test_a_run_as_a_command_of_its_own(tmp_path):
    """Set up, progress, files and last line of `python train.py --method kl_cov`, with short options, from another folder."""
    done = subprocess_of("--method", "kl_cov", "--kl-cov-ratio", 0.5, "--steps", 2, *SHORT, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    run = tmp_path / "runs" / "kl_cov-s5"
    check_run(run, "kl_cov", 2)
    progress = done.stderr
    assert all(re.search(rf"\b{word}=[+-]?\d", progress) for word in ("reward", "entropy", "cov", "accuracy"))
    assert "loss" not in progress and "loss" not in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    first, end = (metrics_of(run)[i]["entropy"] for i in (0, -1))
    assert last.startswith("kl_cov, 2 steps in") and f"entropy {first:.3f} -> {end:.3f}" in last
    assert f"{json.loads((run / 'final.json').read_text())['accuracy']:.1%}" in last
    assert "runs/kl_cov-s5/curves.png" in last
    assert re.search(r"Next: --method (\w+)", last)[1] in set(METHODS) - {"kl_cov"} and "python plot.py runs/*" in last


@pytest.mark.parametrize("method", ["grpo", "clip_cov", "kl_ref", "low_entropy"])
def test_every_method_writes_the_run_directory(few, main, tmp_path, method):
    more = ["--cov-low", "0.01", "--clip-cov-ratio", "0.3", "--eval-every", "2"]
    status, out, err = main("--method", method, "--steps", 2, *SHORT, *more, "--out", tmp_path / "run")
    assert status == 0 and out.strip().splitlines()[-1].startswith(f"{method}, 2 steps in")
    check_run(tmp_path / "run", method, 2)


def test_evaluations_come_first_last_and_as_often_as_asked(quick, main, tmp_path):
    main("--method", "grpo", "--steps", 6, *SHORT, "--eval-every", 2, "--save-every", 9, "--out", tmp_path / "run")
    evaluated = [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "accuracy" in line]
    assert evaluated == [1, 3, 5, 6]
    assert sorted({line["step"] for line in lines(tmp_path / "run" / "samples.jsonl")}) == evaluated


@pytest.mark.parametrize("method", ["grpo", "clip_cov", "kl_cov", "kl_ref --advantage prime --filter-groups"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(quick, main, tmp_path, monkeypatch, method):
    """Stopped in step 4, after the checkpoint of step 2: step 3 is cut off the logs and done again. The last has all that a run can keep."""
    argv = ["--method", *method.split(), "--steps", 5, *SHORT, "--save-every", 2, "--eval-every", 2, "--cov-low", 0.05, "--passes", 2]
    assert main(*argv, "--out", tmp_path / "whole")[0] == 0

    one_step = train.step
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", lambda policy, problems, n, o: one_step(policy, problems, n, o) if n < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(*argv, "--out", tmp_path / "parts")
    assert [line["step"] for line in metrics_of(tmp_path / "parts")] == [1, 2, 3]
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')  # as a full disk or a kill leaves it
    torch.manual_seed(99)
    assert main(*argv, "--resume", "--out", tmp_path / "parts")[0] == 0

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert metrics_of(parts) == metrics_of(whole)
    for file in ("samples.jsonl", "final.json", "model/model.safetensors"):
        assert (parts / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_finished_run_goes_on_with_more_steps(quick, main, tmp_path):
    argv = ["--method", "kl_cov", *SHORT, "--eval-every", 1]
    assert main(*argv, "--steps", 4, "--out", tmp_path / "whole")[0] == 0
    assert main(*argv, "--steps", 2, "--out", tmp_path / "parts")[0] == 0
    status, out, _ = main(*argv, "--steps", 4, "--resume", "--out", tmp_path / "parts")
    assert status == 0 and out.strip().splitlines()[-1].startswith("kl_cov, 4 steps in")
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    assert main(*argv, "--steps", 4, "--resume", "--out", tmp_path / "parts")[0] == 0  # nothing is left to do
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_options_may_stand_in_a_file(options, tmp_path):
    (tmp_path / "small.txt").write_text("# a comment\n--lr 0.25   # and another\n--steps\n7\n\n--method clip_cov\n")
    o = train.options([f"@{tmp_path / 'small.txt'}", "--steps", "9", "--out", str(tmp_path / "run")])
    assert (o.method, o.lr, o.steps) == ("clip_cov", 0.25, 9)


# ---------------------------------------------------------------- what is refused


def refused(result, *words):
    """Exit status 2, and one line that holds the words."""
    status, out, err = result
    err = "".join(line for line in err.splitlines(keepends=True) if "Loading weights" not in line).strip()  # transformers' own bar
    assert status == 2 and out == "" and len(err.splitlines()) == 1, err
    assert all(word in err for word in words) and "Traceback" not in err, err
    return err


def test_without_a_method_the_line_says_so(main):
    refused(main("--steps", 1), "--method")


def test_a_gpu_that_is_not_there_is_refused(main, monkeypatch):
    refused(main("--method", "grpo", "--device", "cuda"), "--device", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # of torchrun
    refused(main("--method", "grpo", "--device", "cuda"), "--device", "--nproc_per_node=2")


def test_a_run_is_never_written_over_unless_asked_and_other_files_never(quick, main, tmp_path):
    run = tmp_path / "run"
    argv = ["--method", "grpo", *SHORT, "--steps", 1, "--out", run]
    assert main(*argv)[0] == 0
    first = (run / "metrics.jsonl").read_bytes()
    err = refused(main(*argv, "--seed", 6), "--out", str(run), "--overwrite", "--resume")
    assert (run / "metrics.jsonl").read_bytes() == first
    assert main(*argv, "--seed", 6, "--overwrite")[0] == 0
    assert len(lines(run / "metrics.jsonl")) == 1 and (run / "metrics.jsonl").read_bytes() != first
    assert json.loads((run / "config.json").read_text())["seed"] == 6

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for out in (other, tmp_path / "file", tmp_path):
        for more in ([], ["--overwrite"]):
            refused(main("--method", "grpo", *SHORT, "--steps", 1, "--out", out, *more), "--out")
    assert (other / "chapter.tex").read_text() == "years of work" and (tmp_path / "file").exists() and run.exists()


def help_of():
    """{option: its help text}, from the parser itself."""
    with pytest.MonkeyPatch.context() as patch:
        kept = {}

        class Seen(Exception):
            pass

        def parse(parser, *_):
            kept.update({a.option_strings[-1]: a for a in parser._actions if a.option_strings})
            raise Seen

        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Seen):
            train.options([])
    return kept


HELP = help_of()


@pytest.mark.parametrize("option", sorted(set(HELP) - {"--help", "--method"}))
def test_the_help_of_an_option_says_its_default(option):
    action = HELP[option]
    if action.nargs == 0:  # a switch is off
        assert action.default is False and action.help
        return
    assert "default" in action.help
    number = re.search(r"default:? (-?\d[\d.e-]*\d|\d)", action.help)
    if number and action.default is not None:
        assert float(number[1]) == action.default  # and not one of last month


def test_help_is_shown(main):
    status, out, _ = main("--help")
    assert status == 0 and all(option in out for option in HELP) and "torchrun" in out


# ---------------------------------------------------------------- real input


REAL = ("--method kl_cov --steps 1 --prompts 4 --mini-batch 2 --samples 2 --max-new-tokens 5 --eval-limit 2 --final-samples 2"
        " --max-prompt-tokens 200 --device cpu").split()  # fmt: skip


@pytest.fixture(scope="module")
def real_run(qwen_checkpoint, shared, tmp_path_factory):
    """Options, run directory and output of one step on the first rows of DAPO-Math-17k with Qwen's tokenizer."""
    folder = tmp_path_factory.mktemp("real")
    argv = ["--model", qwen_checkpoint, "--data", shared / "data" / "dapo_math_17k.jsonl", "--eval-data", shared / "data" / "math500.jsonl", *REAL]
    asked, encode = [], data.encode_prompts

    def spy(tokenizer, prompts, limit, **more):
        asked.append((prompts, encode(tokenizer, prompts, limit, **more)))
        return asked[-1][1]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(data, "encode_prompts", spy)
        patch.setattr(sys, "argv", list(map(str, ["train.py", *argv, "--out", folder / "run"])))
        train.main()
    return argv, folder / "run", said.getvalue(), asked[0]


def check_left_as_it_was(run, output, checkpoint):
    (line,) = lines(run / "metrics.jsonl")
    assert line["no_signal"] == 1 and line["reward"] == 0 and line["grad_norm"] == 0 and line["truncated"] > 0
    assert line["entropy"] == pytest.approx(math.log(151936), abs=0.5)  # random weights choose among the whole vocabulary
    assert re.search(r"step 1: no group had a signal .*the policy was left as it was", output)
    assert output.count("no group had a signal") == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, run / "model"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_random_weights_with_qwens_tokenizer_take_a_step_on_dapo_and_are_left_as_they_were(real_run, qwen_checkpoint):
    _, run, output, _ = real_run
    check_left_as_it_was(run, output, qwen_checkpoint)
    assert re.search(r"\d+ problems \(\d+ dropped as held-out, [1-9]\d* as too long\), 2 held out", output)


def test_prompts_of_dapo_ask_for_a_box_in_qwens_chat_template(real_run):
    _, run, _, (prompts, encoded) = real_run
    assert len(prompts) > 250 and any(ids is None for ids in encoded)
    for prompt in prompts:
        assert "Answer:" not in prompt and prompt.endswith(data.INSTRUCTION)
    for line in lines(run / "samples.jsonl"):
        assert line["prompt"].startswith("<|im_start|>system") and "Answer:" not in line["prompt"]
        assert line["prompt"].endswith(data.INSTRUCTION + "<|im_end|>\n<|im_start|>assistant\n")


def test_torchrun_with_two_processes_does_the_same_on_real_input(real_run, qwen_checkpoint, tmp_path):
    argv, one, _, _ = real_run
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess_of(*argv, "--out", tmp_path / "run", launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    check_left_as_it_was(tmp_path / "run", done.stdout, qwen_checkpoint)
    for mine, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(one)):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert (tmp_path / "run" / "samples.jsonl").read_text().count("\n") == 4
