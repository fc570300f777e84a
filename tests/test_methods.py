"""What losses.py promises of the methods beside Clip-Cov and KL-Cov: each is its formula, its direction is right, a new one is a function and a line."""

import math
import re

import pytest
import torch
from conftest import ROOT
from test_losses import mini_batch, numbers, options, push

import data
import losses
from lab import study
import train
from losses import METHODS, Tokens, aggregate

float64 = lambda *rows: torch.tensor(rows, dtype=torch.float64)


def entropy_of(p):
    return -(p * p.log() + (1 - p) * (1 - p).log())


def ppo(p, old, A, low=0.2, high=0.28):
    """PPO's loss of one token, and its derivative by the log-prob."""
    ratio = math.exp(p - old)
    free, bounded = ratio * A, min(max(ratio, 1 - low), 1 + high) * A
    return -min(free, bounded), -free if free <= bounded else 0.0


def tokens_of(now, old, A, old_entropy=None, ref=None, entropy=None):
    """A mini-batch of one row, every probability given: Tokens whose log-probs are a leaf."""
    logp = float64(now).log().requires_grad_()
    old = float64(old).log()
    H = torch.zeros_like(old) if entropy is None else entropy
    old_entropy = H if old_entropy is None else float64(old_entropy)
    return Tokens(logp, old, float64(A), torch.ones_like(old, dtype=torch.bool), H, old_entropy=old_entropy,
                  ref_logp=old if ref is None else float64(ref).log())  # fmt: skip


def gradient(method, t, o):
    loss = METHODS[method](t, o)
    return loss.detach(), torch.autograd.grad(aggregate(loss, t.kept, t.kept.sum()), t.logp)[0]


# ---------------------------------------------------------------- clip-higher


def test_clip_higher_by_hand():
    """Ratios 1.25 and 1.3, 0.75 and 0.85: the first is free under 0.28 and silenced under 0.2."""
    t = lambda: tokens_of([0.5, 0.52, 0.3, 0.34], [0.4, 0.4, 0.4, 0.4], [1.0, 1.0, -1.0, -1.0])
    loss, g = gradient("clip_higher", t(), options(clip_low=0.2, clip_high=0.28))
    assert loss[0].tolist() == pytest.approx([-1.25, -1.28, 0.8, 0.85])
    assert g[0].tolist() == pytest.approx([-1.25 / 4, 0, 0, 0.85 / 4])
    loss, g = gradient("grpo", t(), options(clip_low=0.2, clip_high=0.2))
    assert loss[0].tolist() == pytest.approx([-1.2, -1.2, 0.8, 0.85]) and g[0, 0] == 0


@pytest.mark.parametrize("seed", range(3))
def test_clip_higher_is_ppo_with_room_upwards(seed):
    batch = mini_batch(seed)
    loss, g, t = push("clip_higher", batch, options(clip_low=0.2, clip_high=0.28))
    for at, p, old, A in numbers(batch):
        assert (loss[at].item(), g[at].item()) == pytest.approx(ppo(p, old, A), rel=1e-12)
    assert t.clipped.any()


def test_each_method_has_its_published_clip_unless_told_otherwise(tmp_path):
    clip = lambda *argv: (lambda o: (o.clip_low, o.clip_high))(train.options([*argv, "--out", str(tmp_path / "run")]))
    for method in METHODS:
        want = {"clip_higher": (0.2, 0.28), "clip_cov": (1.0, 1.0)}.get(method, (0.2, 0.2))
        assert clip("--method", method) == want and clip("--method", method, "--clip-high", "0.5") == (want[0], 0.5)


# ---------------------------------------------------------------- entropy bonus


def test_the_entropy_bonus_by_hand():
    """Two tokens, H = ln 2 and (2/3) ln 3 + ... = 0.6365: each token's loss is lower by c H."""
    t = tokens_of([0.5, 1 / 3], [0.5, 1 / 3], [1.0, -2.0], entropy=float64([math.log(2), math.log(3) - 2 / 3 * math.log(2)]))
    loss, g = gradient("entropy_bonus", t, options(entropy_coef=0.1))
    assert loss[0].tolist() == pytest.approx([-1 - 0.0693147, 2 - 0.0636514], rel=1e-6)
    assert g[0].tolist() == pytest.approx([-0.5, 1.0])  # by the log-prob it is the policy gradient; the rest goes through H


@pytest.mark.parametrize("seed", range(3))
def test_the_entropy_bonus_is_ppo_less_c_h_at_every_token(seed):
    batch = mini_batch(seed)
    now = batch[0].detach().clone().requires_grad_()
    H = torch.rand(now.shape, dtype=torch.float64, requires_grad=True)
    t = Tokens(now, *batch[1:], H)
    loss = METHODS["entropy_bonus"](t, options(entropy_coef=0.3))
    dlogp, dH = torch.autograd.grad(aggregate(loss, t.mask, t.mask.sum()), (now, H))
    N = len(numbers(batch))
    for at, p, old, A in numbers(batch):
        value, slope = ppo(p, old, A)
        assert loss[at].item() == pytest.approx(value - 0.3 * H[at].item(), rel=1e-12)
        assert (dlogp[at].item(), dH[at].item()) == pytest.approx((slope / N, -0.3 / N), rel=1e-12)


@pytest.mark.parametrize("coefficient, rises", [(0.5, True), (1e-4, False)])
def test_the_entropy_bonus_holds_the_entropy_against_the_policy_gradient_if_it_is_large(coefficient, rises):
    z = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(z, -1)
    H = -(logp.exp() * logp).sum().view(1, 1)
    t = Tokens(logp[:1, None], logp[:1, None].detach(), float64([0.1]), torch.ones(1, 1, dtype=torch.bool), H)
    aggregate(METHODS["entropy_bonus"](t, options(entropy_coef=coefficient)), t.kept, 1).backward()
    after = torch.softmax(z.detach() - 0.1 * z.grad, -1)
    assert (entropy_of(after[0]) > H.detach()) == rises
    assert (after[0] < logp[0].exp()) == rises  # the likely, rewarded choice


# ---------------------------------------------------------------- KL to the starting policy


def test_kl_ref_by_hand():
    """A token that was .5 at the start and is .25 now: d = ln 2, k3 = 2 - 1 - ln 2, slope 1 - 2. One that has not moved: 0 and 0."""
    t = tokens_of([0.25, 0.3], [0.25, 0.3], [0.0, 1.0], ref=[0.5, 0.3])
    loss, g = gradient("kl_ref", t, options(kl_ref_beta=2.0))
    assert loss[0].tolist() == pytest.approx([2 * (1 - math.log(2)), -1.0])
    assert g[0].tolist() == pytest.approx([-2 / 2, -1 / 2])


@pytest.mark.parametrize("seed", range(3))
def test_kl_ref_is_ppo_and_beta_k3_at_every_token(seed):
    batch = mini_batch(seed)
    now = batch[0].detach().clone().requires_grad_()
    ref = batch[1] + 0.3 * torch.randn_like(batch[1])
    t = Tokens(now, *batch[1:], torch.zeros_like(ref), ref_logp=ref)
    loss = METHODS["kl_ref"](t, options(kl_ref_beta=0.7))
    (g,) = torch.autograd.grad(aggregate(loss, t.mask, 1), now)
    for at, p, old, A in numbers(batch):
        d, (value, slope) = ref[at].item() - p, ppo(p, old, A)
        assert loss[at].item() == pytest.approx(value + 0.7 * (math.exp(d) - 1 - d), rel=1e-12)
        assert g[at].item() == pytest.approx(slope + 0.7 * (1 - math.exp(d)), rel=1e-12)


def test_k3_is_an_unbiased_estimate_of_the_kl_and_never_negative():
    p, q = torch.softmax(torch.randn(6, dtype=torch.float64), -1), torch.softmax(torch.randn(6, dtype=torch.float64), -1)
    t = tokens_of(p.tolist(), p.tolist(), [0.0] * 6, ref=q.tolist())
    k3 = METHODS["kl_ref"](t, options(kl_ref_beta=1.0))[0].detach()
    assert (k3 >= 0).all() and (p * k3).sum().item() == pytest.approx((p * (p / q).log()).sum().item())


@pytest.mark.parametrize("moved", [0.8, -0.8])
def test_kl_ref_draws_the_policy_back_to_where_it_started(moved):
    z0 = torch.tensor([0.5, -0.5], dtype=torch.float64)
    z = (z0 + torch.tensor([moved, 0.0])).requires_grad_()
    logp, ref = torch.log_softmax(z, -1), torch.log_softmax(z0, -1)
    p = logp.exp().detach()
    # both choices, as often as the policy takes them
    t = Tokens(logp[None], logp.detach()[None], torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool),
               torch.zeros(1, 2, dtype=torch.float64), ref_logp=ref[None])  # fmt: skip
    (METHODS["kl_ref"](t, options(kl_ref_beta=1.0))[0] * p).sum().backward()
    after = torch.softmax(z.detach() - 0.1 * z.grad, -1)
    assert (after[0] - p[0]) * moved < 0
    closer = entropy_of(after[0]) - entropy_of(p[0])  # sharpened, it becomes softer
    assert (closer > 0) == (moved > 0)


# ---------------------------------------------------------------- tokens of high and of low entropy

HS = [0.1, 0.9, 0.3, 0.7, 0.2, 0.5, 0.6, 0.05, 0.4, 0.8]


def test_high_and_low_entropy_by_hand():
    """Ten tokens: the two of .9 and .8 are forks, and the loss is averaged over these two; low_entropy has the other eight."""
    A = [float(i + 1) for i in range(10)]
    t = lambda: tokens_of([0.5] * 10, [0.5] * 10, A, old_entropy=HS)
    high, low = t(), t()
    _, g = gradient("high_entropy", high, options(entropy_fraction=0.2))
    assert g[0].tolist() == pytest.approx([-A[i] / 2 if i in (1, 9) else 0 for i in range(10)])
    _, h = gradient("low_entropy", low, options(entropy_fraction=0.8))
    assert h[0].tolist() == pytest.approx([0 if i in (1, 9) else -A[i] / 8 for i in range(10)])
    assert torch.equal(high.selected, ~low.selected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.75, 1.0])
def test_the_fraction_is_of_the_tokens_of_the_whole_mini_batch_and_the_two_methods_divide_them(seed, fraction):
    batch = mini_batch(seed, B=8, T=9)
    H = torch.rand(8, 9, dtype=torch.float64)
    made = {}
    for method, f in (("high_entropy", fraction), ("low_entropy", 1 - fraction)):
        now = batch[0].detach().clone().requires_grad_()
        t = made[method] = Tokens(now, *batch[1:], torch.zeros_like(H), old_entropy=H.masked_fill(~batch[3], 9.0))
        loss = METHODS[method](t, options(entropy_fraction=f))
        (g,) = torch.autograd.grad(aggregate(loss, t.kept, t.kept.sum()), now) if t.kept.any() else (torch.zeros_like(H),)
        ranked = sorted((at for at, *_ in numbers(batch)), key=lambda at: -H[at].item())
        top = set(ranked[: round(fraction * len(ranked))])
        want = top if method == "high_entropy" else set(ranked) - top
        assert set(map(tuple, t.kept.nonzero().tolist())) == want
        for at, p, old, A in numbers(batch):
            assert g[at].item() == pytest.approx(ppo(p, old, A)[1] / len(want) if at in want else 0.0, rel=1e-12)
        assert t.clipped is None or not (t.clipped & ~t.kept).any()
    assert torch.equal(made["high_entropy"].kept | made["low_entropy"].kept, batch[3])


def test_keeping_fewer_tokens_does_not_shorten_the_step():
    """All tokens alike: whatever the fraction, the sum of the gradient is the same."""
    for fraction in (0.1, 0.5, 1.0):
        t = tokens_of([0.5] * 10, [0.5] * 10, [1.0] * 10, old_entropy=HS)
        assert gradient("high_entropy", t, options(entropy_fraction=fraction))[1].sum().item() == pytest.approx(-1.0)


@pytest.mark.parametrize("method, fork_moves", [("high_entropy", True), ("low_entropy", False)])
def test_high_entropy_trains_the_fork_and_leaves_the_sure_token_and_low_entropy_the_reverse(method, fork_moves):
    z = float64([0.0, 0.0], [2.0, -2.0]).requires_grad_()  # a fork, and a token that is nearly sure
    logp = torch.log_softmax(z, -1)
    H = -(logp.exp() * logp).sum(-1).detach()[None]
    t = Tokens(logp[None, :, 0], logp[None, :, 0].detach(), float64([1.0, 1.0]), torch.ones(1, 2, dtype=torch.bool), H, old_entropy=H)
    aggregate(METHODS[method](t, options(entropy_fraction=0.5)), t.kept, t.kept.sum()).backward()
    p, after = torch.softmax(z.detach(), -1), torch.softmax(z.detach() - 0.5 * z.grad, -1)
    rises = (after[:, 0] > p[:, 0]).tolist()
    assert rises == [fork_moves, not fork_moves]
    falls = (entropy_of(after[:, 0]) < entropy_of(p[:, 0])).tolist()
    assert falls == rises


# ---------------------------------------------------------------- combinations


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("estimator", losses.ESTIMATORS)
def test_any_method_goes_with_any_estimator(method, estimator, tmp_path):
    o = train.options(["--method", method, "--advantage", estimator, "--out", str(tmp_path / "run")])
    assert (o.method, o.advantage) == (method, estimator)


@pytest.mark.parametrize("more, warned", [("--mini-batch 64", True), ("--mini-batch 64 --passes 2", False), ("", False)])
def test_kl_cov_with_one_update_for_each_rollout_batch_warns_that_it_does_nothing_and_why(more, warned, tmp_path, capsys):
    train.options(["--method", "kl_cov", "--prompts", "64", *more.split(), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert said.count("\n") == warned and ("no gradient before the policy has moved" in said) == warned
    train.options(["--method", "grpo", "--prompts", "64", *more.split(), "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err == ""


def test_every_row_of_a_study_is_something_that_train_can_be_told(tmp_path):
    assert set(METHODS) <= set(study.STUDIES["methods"][1]) and set(losses.ESTIMATORS) <= set(study.STUDIES["estimators"][1])
    for _, rows in study.STUDIES.values():
        for row in rows:
            train.options([*study.ROWS[row].split(), "--out", str(tmp_path / "run")])


# ---------------------------------------------------------------- one's own method


def readme_example():
    """The block of Python in the README's section on adding a method, and the name it adds."""
    section = re.search(r"^## Add a method$(.*?)(?=^## )", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    return block, re.search(r'^METHODS\["(\w+)"\] =', block, re.M)[1]


def test_the_readmes_example_adds_a_method_that_trains(monkeypatch, tmp_path):
    block, name = readme_example()
    assert len(block.splitlines()) <= 10 and name not in METHODS
    monkeypatch.setattr(losses, "METHODS", dict(METHODS))
    exec(block, vars(losses))
    monkeypatch.setattr(losses, "aggregate", lambda loss, kept, count, real=losses.aggregate: seen.append(count) or real(loss, kept, count))
    seen = []
    argv = f"--method {name} --prompts 4 --mini-batch 2 --samples 4 --max-new-tokens 12 --eval-limit 1 --device cpu --out {tmp_path / 'run'}"
    o = train.options(argv.split())
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))
    policy, problems, _ = train.load(o)
    monkeypatch.setattr(train.reward, "grade_all", lambda texts, answers: [float(i % 2) for i in range(len(texts))])
    before = [p.detach().clone() for p in policy.model.parameters()]
    metrics, samples = train.step(policy, train.problems_of_step(problems, 1, o), 1, o)
    assert metrics["grad_norm"] > 0 and metrics["ratio_max"] > 1 and len(seen) == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.model.parameters()))


def test_the_readmes_example_is_the_formula_that_it_cites(monkeypatch):
    block, name = readme_example()
    scope = dict(vars(losses)) | {"METHODS": dict(METHODS)}
    exec(block, scope)
    monkeypatch.setitem(METHODS, name, scope["METHODS"][name])
    batch = mini_batch(1)
    _, g, _ = push(name, batch, options(clip_high=0.28))
    for at, p, old, A in numbers(batch):
        assert g[at].item() == pytest.approx(-min(math.exp(p - old), 1.28) * A, rel=1e-12)  # CISPO: the weight is bounded, the token heard
