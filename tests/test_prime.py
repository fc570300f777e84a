"""What prime.py promises: process rewards, returns and the lesson from outcomes as the formulas have them, exact, and part of a run."""

import argparse
import copy
import math

import pytest
import torch
from conftest import _narrow
from test_parallel import batch_of, distance, plain_scores
from test_parallel import options as parallel_options

import data
import losses
import prime
import train

float64 = lambda rows: torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------- the formulas


def test_two_completions_by_hand():
    """beta 1/2. Ratios phi/ref e^2, 1 | e^-2, e^4, e^2: rewards 1, 0 | -1, 2, 1, means 1/2 and 2/3, each the other's baseline."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    ref = float64([[-3, -1, 0], [-2, -5, -4]])
    r = prime.token_rewards(ref + float64([[2, 0, 7], [-2, 4, 2]]), ref, mask, 0.5)
    assert r.tolist() == [[1, 0, 0], [-1, 2, 1]]
    advantages = prime.process_advantages(r, mask, 2)
    assert advantages[0].tolist() == pytest.approx([1 / 3 - 2 / 3, -2 / 3, 0])
    assert advantages[1].tolist() == pytest.approx([0.5, 2.0, 0.5])  # -1.5 + 1.5 + .5, 1.5 + .5, .5
    loss = prime.outcome_loss(r, float64([1, 0]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_advantages_and_loss_equal_the_formulas_one_number_at_a_time(seed):
    g, G, T, beta = torch.Generator().manual_seed(seed), 4, 7, 0.3
    mask = torch.arange(T) < torch.randint(1, T + 1, (3 * G,), generator=g)[:, None]
    phi, ref = (-torch.rand(3 * G, T, dtype=torch.float64, generator=g) * 3 for _ in range(2))
    outcomes = torch.randint(2, (3 * G,), generator=g).double()
    r = prime.token_rewards(phi, ref, mask, beta)
    advantages = prime.process_advantages(r, mask, G)
    rows = [[beta * (phi[i, t] - ref[i, t]).item() for t in range(T) if mask[i, t]] for i in range(3 * G)]
    total = 0.0
    for i, row in enumerate(rows):
        others = [rows[j] for j in range(i // G * G, i // G * G + G) if j != i]
        baseline = sum(math.fsum(x) / len(x) for x in others) / (G - 1)
        for t in range(T):
            assert advantages[i, t].item() == pytest.approx(math.fsum(x - baseline for x in row[t:]), abs=1e-12)
        p = 1 / (1 + math.exp(-math.fsum(row)))
        total -= math.log(p if outcomes[i] else 1 - p)
    assert prime.outcome_loss(r, outcomes).item() == pytest.approx(total / len(rows), rel=1e-12)


def test_while_the_process_model_is_the_reference_all_rewards_are_zero_and_the_advantage_is_that_of_rloo():
    logp, mask = -torch.rand(8, 5), torch.ones(8, 5, dtype=torch.bool)
    r = prime.token_rewards(logp, logp.clone(), mask, 0.05)
    assert (r == 0).all() and (prime.process_advantages(r, mask, 4) == 0).all()
    rewards = torch.rand(2, 4)
    assert torch.equal(losses.group_advantages(rewards, "prime"), losses.group_advantages(rewards, "rloo"))


def test_what_stands_where_no_token_is_has_no_influence():
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]
    phi, ref = torch.randn(4, 5), torch.randn(4, 5)
    clean = prime.token_rewards(phi, ref, mask, 0.5)
    dirty = prime.token_rewards(phi.masked_fill(~mask, math.nan), ref, mask, 0.5)
    assert torch.equal(clean, dirty) and (prime.process_advantages(dirty, mask, 2)[~mask] == 0).all()


# ---------------------------------------------------------------- two choices: what rises, what falls


def test_the_process_model_raises_what_right_completions_have_in_common_and_the_policy_follows():
    """Two positions, two choices each; the outcome depends on the first position alone. So does the reward, after learning."""
    logits, reference = torch.zeros(2, 2, dtype=torch.float64), torch.full((2, 2), 0.5, dtype=torch.float64).log()
    y = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    at, mask, outcomes = torch.arange(2), torch.ones(4, 2, dtype=torch.bool), float64([1, 1, 0, 0])
    for _ in range(100):
        logits.requires_grad_()
        loss = prime.outcome_loss(prime.token_rewards(torch.log_softmax(logits, -1)[at, y], reference[at, y], mask, 1.0), outcomes)
        logits = (logits - torch.autograd.grad(loss, logits)[0]).detach()
    r = prime.token_rewards(torch.log_softmax(logits, -1)[at, y], reference[at, y], mask, 1.0)
    assert (r[:2, 0] > 0.3).all() and (r[2:, 0] < -0.3).all() and r[:, 1].abs().max() < 1e-9 and loss < math.log(2)

    z = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=torch.float64, requires_grad=True)  # the rewarded choice is the likely one
    p = torch.softmax(z.detach(), -1)
    logp = torch.log_softmax(z, -1)[at, y]
    weight = p[at, y].prod(1, keepdim=True)  # each completion as often as it is drawn
    (-logp * weight * prime.process_advantages(r, mask, 4)).sum().backward()
    after = torch.softmax(z.detach() - 0.1 * z.grad, -1)
    H = lambda p: -(p * p.log()).sum(-1)
    assert after[0, 0] > p[0, 0] and H(after)[0] < H(p)[0]
    assert abs(after[1, 0] - p[1, 0]) < abs(after[0, 0] - p[0, 0]) / 10


# ---------------------------------------------------------------- models: exact, and learning


def prm_and_batch(**changes):
    """A process model in float64, plain gradient descent, and a mini-batch scored by a reference that is another model."""
    o = parallel_options("grpo", prm_beta=0.2, samples=4, **changes)
    model = _narrow(dtype=torch.float64)
    batch = batch_of(model, o)
    ref_logp, _ = plain_scores(_narrow(dtype=torch.float64, seed=1), batch["prompts"], batch["completions"], o.temperature)
    batch["ref_logp"] = ref_logp.detach().float()
    batch["rewards"] = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0])
    return argparse.Namespace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)), batch, o


@pytest.mark.parametrize("tokens", [1, 45, 10**6])
def test_the_lesson_is_the_gradient_of_the_whole_mini_batch_whatever_the_micro_batch(tokens):
    prm, batch, o = prm_and_batch(micro_batch=tokens)
    model = copy.deepcopy(prm.model)
    logp, _ = plain_scores(model, batch["prompts"], batch["completions"], o.temperature)
    verdicts = [(0.2 * (logp[i] - batch["ref_logp"][i])[batch["mask"][i]]).sum() for i in range(12)]
    loss = -sum(torch.nn.functional.logsigmoid(v if right else -v) for v, right in zip(verdicts, batch["rewards"])) / 12
    want = torch.autograd.grad(loss, list(model.parameters()))
    prime.learn(prm, batch, o)
    assert distance([p.grad for p in prm.model.parameters()], want) < 1e-6
    assert distance([a - b for a, b in zip(prm.model.parameters(), model.parameters())], [-g for g in want]) < 1e-6


def test_a_step_takes_the_rewards_of_the_process_model_as_it_was_and_then_it_learns_them():
    prm, batch, o = prm_and_batch()
    o.grad_clip = 0.05
    before, outcome_part = prime.judge(prm, [batch], o)[0], batch["advantages"].clone()
    said = [prime.process_rewards(prm, [batch], o)]
    torch.testing.assert_close(batch["advantages"], outcome_part + prime.process_advantages(before, batch["mask"], 4))
    for _ in range(20):
        batch["advantages"] = outcome_part
        said.append(prime.process_rewards(prm, [batch], o))
    assert said[0]["prm_loss"] == pytest.approx(prime.outcome_loss(before, batch["rewards"]).item(), rel=1e-5)
    assert said[0]["prm_accuracy"] == ((before.sum(1) > 0) == batch["rewards"].bool()).float().mean().item()
    assert said[-1]["prm_loss"] < said[0]["prm_loss"] and said[-1]["prm_accuracy"] > said[0]["prm_accuracy"]


def test_a_lesson_that_is_not_finite_is_skipped():
    prm, batch, o = prm_and_batch()
    batch["ref_logp"][0, 0] = math.inf
    before = [p.detach().clone() for p in prm.model.parameters()]
    assert prime.process_rewards(prm, [batch], o)["prm_loss"] is None
    assert all(torch.equal(a, b) for a, b in zip(before, prm.model.parameters()))


# ---------------------------------------------------------------- in a run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """options(method, ...) for small steps of the embedded policy; every third completion is paid for."""
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))
    monkeypatch.setattr(train.reward, "grade_all", lambda texts, answers: [float(i % 3 == 0) for i in range(len(texts))])
    small = "--prompts 4 --mini-batch 2 --samples 4 --max-new-tokens 12 --eval-limit 1 --device cpu --prm-beta 0.5"
    return lambda more: train.options([*small.split(), *more.split(), "--out", str(tmp_path / "run")])


def test_in_the_first_step_prime_is_rloo_and_afterwards_advantages_differ_from_token_to_token(run, monkeypatch):
    steps, after = {}, []
    update = train.update
    monkeypatch.setattr(train, "update", lambda policy, batch, *rest: after.append(batch["advantages"]) or update(policy, batch, *rest))
    for name in ("rloo", "prime"):
        o = run(f"--method grpo --advantage {name} --prm-lr 1e-3")
        policy, problems, _ = train.load(o)
        steps[name], _ = train.step(policy, train.problems_of_step(problems, 1, o), 1, o)
    same = set(steps["rloo"]) - {"seconds"}
    assert {k: steps["prime"][k] for k in same} == {k: steps["rloo"][k] for k in same}
    assert steps["prime"]["prm_loss"] == pytest.approx(math.log(2))
    after.clear()
    metrics, _ = train.step(policy, train.problems_of_step(problems, 2, o), 2, o)
    assert metrics["prm_loss"] != pytest.approx(math.log(2), abs=1e-6)
    assert max((a.amax(1) - a.amin(1)).max().item() for a in after) > 1e-4


@pytest.mark.parametrize("more", ["--method grpo --advantage prime", "--method kl_ref"])
def test_the_reference_is_the_starting_policy_frozen_and_the_process_model_starts_as_it(run, more):
    o = run(more)
    policy, problems, _ = train.load(o)
    start = [p.detach().clone() for p in policy.model.parameters()]
    for number in (1, 2):
        train.step(policy, train.problems_of_step(problems, number, o), number, o)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(start, policy.reference.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(start, policy.model.parameters()))
    assert (policy.prm is not None) == ("prime" in more)
    if policy.prm:
        assert any(not torch.equal(a, b) for a, b in zip(start, policy.prm.model.parameters()))
        assert policy.prm.optimizer.param_groups[0]["lr"] == 2 * o.lr


def test_a_run_that_needs_no_reference_keeps_none(run):
    policy, _, _ = train.load(run("--method kl_cov"))
    assert policy.reference is None and policy.prm is None


def test_the_demonstration_finds_the_token_that_matters(capsys):
    prime.main()
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "200 updates" in last and float(last.rsplit(" ", 1)[1]) > 1
