"""What prime.py promises: rewards, returns and learning by the formulas, exact, and part of a run."""

import copy
import math

import pytest
import torch
from conftest import narrow, plain_scores
from test_parallel import agree, batch_of, options

import prime
import train

# ---------------------------------------------------------------- the formulas


@pytest.mark.parametrize("seed", range(3))
def test_advantages_and_loss_are_the_formulas_one_number_at_a_time(seed):
    g, G, T, beta = torch.Generator().manual_seed(seed), 4, 7, 0.3
    mask = torch.arange(T) < torch.randint(1, T + 1, (3 * G,), generator=g)[:, None]
    phi, ref = -3 * torch.rand(2, 3 * G, T, dtype=torch.float64, generator=g)
    outcomes = torch.randint(2, (3 * G,), generator=g).double()
    r = prime.token_rewards(phi.masked_fill(~mask, math.nan), ref, mask, beta)  # no token is there
    advantages = prime.process_advantages(r, mask, G)
    rows = [[beta * (phi[i, t] - ref[i, t]).item() for t in range(T) if mask[i, t]] for i in range(3 * G)]
    total = 0.0
    for i, row in enumerate(rows):
        others = [rows[j] for j in range(i // G * G, i // G * G + G) if j != i]
        baseline = sum(math.fsum(x) / len(x) for x in others) / (G - 1)
        want = [math.fsum(x - baseline for x in row[t:]) for t in range(len(row))]
        assert advantages[i].tolist() == pytest.approx(want + [0.0] * (T - len(row)), abs=1e-12)
        p = 1 / (1 + math.exp(-math.fsum(row)))
        total -= math.log(p if outcomes[i] else 1 - p)
    assert prime.outcome_loss(r, outcomes).item() == pytest.approx(total / len(rows), rel=1e-12)


# ---------------------------------------------------------------- the process reward model


@pytest.fixture
def prm_and_batch():
    """A PRM in float64 that learns by gradient descent, a mini-batch that another model scored, options."""
    o = options("grpo", prm_beta=0.2, samples=4)
    prm = prime.ProcessRewardModel(o)
    prm.optimizer = torch.optim.SGD(prm.model.double().parameters(), lr=1.0)
    batch = batch_of(prm.model, o)
    reference = narrow(dtype=torch.float64, vocab_size=prm.model.config.vocab_size)
    logp, _ = plain_scores(reference, batch.prompts, batch.completions, o.temperature)
    batch.ref_logp = logp.detach().float()
    return prm, batch, o


@pytest.mark.parametrize("tokens", [1, 45, 10**6])
def test_it_learns_by_the_gradient_of_the_whole_mini_batch_whatever_the_micro_batch(prm_and_batch, tokens):
    prm, batch, o = prm_and_batch
    model, o.micro_batch = copy.deepcopy(prm.model), tokens
    logp, _ = plain_scores(model, batch.prompts, batch.completions, o.temperature)
    loss = prime.outcome_loss((0.2 * (logp - batch.ref_logp)) * batch.mask, batch.rewards.double())
    want = torch.autograd.grad(loss, list(model.parameters()))
    prm.learn(batch, o)
    assert agree([p.grad for p in prm.model.parameters()], want)
    assert agree(list(prm.model.parameters()), [p - g for p, g in zip(model.parameters(), want)])


def test_a_step_takes_the_rewards_of_the_model_as_it_was_and_then_it_learns(prm_and_batch):
    prm, batch, o = prm_and_batch
    o.grad_clip, outcome_part, logged = 0.05, batch.advantages, []
    logp, _ = plain_scores(prm.model, batch.prompts, batch.completions, o.temperature)
    before = prime.token_rewards(logp.float(), batch.ref_logp, batch.mask, 0.2)
    for number in range(20):
        batch.advantages = outcome_part
        logged.append(prm.step([batch], o))
        if number == 0:
            added = prime.process_advantages(before, batch.mask, 4)
            torch.testing.assert_close(batch.advantages, outcome_part + added)
    loss = prime.outcome_loss(before, batch.rewards).item()
    right = ((before.sum(1) > 0) == batch.rewards.bool()).float().mean().item()
    assert logged[0] == pytest.approx({"prm_loss": loss, "prm_accuracy": right}, rel=1e-5)
    assert logged[-1]["prm_loss"] < loss and logged[-1]["prm_accuracy"] > right


def test_an_update_that_is_not_finite_is_skipped(prm_and_batch):
    prm, batch, o = prm_and_batch
    batch.ref_logp[0, 0] = math.inf
    before = copy.deepcopy(prm.model.state_dict())
    prm.step([batch], o)
    assert all(torch.equal(x, before[name]) for name, x in prm.model.state_dict().items())


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("words, reference", [
    ("kl_cov", False), ("kl_ref", True), ("grpo --advantage rloo", False), ("grpo --advantage prime", True),
])  # fmt: skip
def test_the_reference_stays_the_starting_policy_and_the_prm_learns_from_it(tmp_path, words, reference):
    small = "--data arithmetic_heldout --eval-data arithmetic --prompts 8 --mini-batch 4 --eval-limit 1"
    out = ["--device", "cpu", "--out", str(tmp_path / "run")]
    o = train.options(["--method", *words.split(), *small.split(), *out])
    policy, problems, _ = train.load(o)
    start = copy.deepcopy(policy.model.state_dict())
    same = lambda model: all(torch.equal(x, start[name]) for name, x in model.state_dict().items())
    logs = [train.step(policy, train.problems_of_step(problems, n, o), n + 1, o)[0] for n in (0, 1)]
    assert not same(policy.model) and (policy.reference is not None) == reference
    assert policy.reference is None or same(policy.reference)
    assert (policy.prm is not None) == ("prime" in words)
    if policy.prm:
        assert not same(policy.prm.model) and policy.prm.optimizer.param_groups[0]["lr"] == 2 * o.lr
        first = [log["prm_loss"] == pytest.approx(math.log(2), abs=1e-6) for log in logs]
        assert first == [True, False]  # in the first step all process rewards are 0
