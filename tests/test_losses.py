"""What losses.py promises: advantages without noise, each method by its formula, one mean over all tokens."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from losses import ESTIMATORS, METHODS, Tokens, aggregate, group_advantages

PPO = [name for name in METHODS if name != "kl_cov"]  # the methods with PPO's clip
WITHOUT_SIGNAL = ["entropy_bonus", "kl_ref", "adaptive_entropy"]  # a gradient where all advantages are 0
O = SimpleNamespace(
    clip_low=0.2, clip_high=0.28, clip_cov_ratio=0.15, cov_low=0.1, cov_high=2.0, kl_cov_ratio=0.2,
    kl_cov_beta=1.5, kl_cov_low=0.0, entropy_coef=0.1, kl_ref_beta=0.5, entropy_fraction=0.3,
    entropy_target=9.0,
)  # fmt: skip


def options(**changes):
    return SimpleNamespace(**{**vars(O), **changes})


def float64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def tokens(logp, old_logp, advantages, mask=None, **more):
    """Tokens whose entropies and starting policy follow from old_logp, as if each were one of two choices."""
    mask = torch.ones(old_logp.shape, dtype=torch.bool) if mask is None else mask
    p = old_logp.detach().clamp(-9, -1e-3).exp()
    H = -(p * p.log() + (1 - p) * (1 - p).log())
    logp = logp if logp.requires_grad else logp.detach().clone().requires_grad_()
    given = {"generator": torch.Generator().manual_seed(0), "old_entropy": H, "ref_logp": old_logp - 0.3}
    return Tokens(logp, old_logp, advantages, mask, H.clone().requires_grad_(), **(given | more))


def mini_batch(seed=0, B=6, T=7, drift=0.5, **more):
    """Tokens in float64: rows of length 1 to T, ratios up to e^drift and beyond."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64) - 0.1
    now = old + drift * torch.randn(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, T).clone()
    mask = torch.arange(T) < torch.randint(1, T + 1, (B,), generator=g)[:, None]
    mask[0] = True
    return tokens(now, old, advantages, mask, **more)


def push(method, t, o=O):
    """A method's Loss, and the derivatives of the sum of its kept tokens by log-prob and by entropy."""
    loss = METHODS[method](t, o)
    kept = t.mask if loss.kept is None else loss.kept
    total = aggregate(loss.token_loss, kept, 1)
    more = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    return loss, *torch.autograd.grad(total, (t.logp, t.entropy), **more)


def places(mask):
    """The positions (i, j) at which a bool tensor (B, T) is True."""
    return {tuple(at) for at in mask.nonzero().tolist()}


def covariances(t):
    """{position: Cov} by the paper's formula, in Python floats."""
    values = {at: (t.logp[at].item(), t.advantages[at].item()) for at in places(t.mask)}
    mean_p, mean_A = (math.fsum(x) / len(values) for x in zip(*values.values()))
    return {at: (p - mean_p) * (A - mean_A) for at, (p, A) in values.items()}


# ---------------------------------------------------------------- advantages


def estimate(name, rewards, lengths):
    """The formula of each estimator, one number at a time."""
    pairs = [(r, n) for rs, ns in zip(rewards, lengths) for r, n in zip(rs, ns)]
    by_token = [r for r, n in pairs for _ in range(n)]  # each token has its completion's reward
    out = []
    for group in rewards:
        for i, r in enumerate(group):
            others = statistics.fmean(group[:i] + group[i + 1 :])
            out.append({
                "grpo": (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6),
                "dr_grpo": r - statistics.fmean(group),
                "rloo": r - others,
                "reinforce_pp": (r - statistics.fmean(by_token)) / (statistics.pstdev(by_token) + 1e-6),
                "prime": r - others,  # the part of the outcome
            }[name])
    return out


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_every_estimator_is_its_formula(name, seed):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.rand(5, 6, dtype=torch.float64, generator=g)
    lengths = torch.randint(1, 9, (5, 6), generator=g)
    advantages = group_advantages(rewards, name, lengths=lengths)
    want = estimate(name, rewards.tolist(), lengths.tolist())
    assert advantages.shape == (5, 6) and advantages.flatten().tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_no_advantage_whatever_the_rounding(name, reward, dtype):
    for G, eps in ((2, 1e-6), (7, 1e-8), (16, 1e-30)):
        rewards = torch.full((3, G), reward, dtype=dtype)
        assert (group_advantages(rewards, name, eps, torch.randint(1, 30, (3, G))) == 0).all()


# ---------------------------------------------------------------- methods


def formula(method, p, old, A, H, ref, acts):
    """(loss, its derivative by log-prob, by entropy) of a token; `acts`: the method has selected it."""
    ratio = math.exp(p - old)
    free, bounded = ratio * A, min(max(ratio, 0.8), 1.28) * A
    loss, slope = -min(free, bounded), 0.0 if bounded < free else -free  # d ratio / d logp = ratio
    if method == "kl_cov":
        loss, slope = -free + acts * 1.5 * abs(p - old), -free + acts * 1.5 * math.copysign(1, p - old)
    if method == "clip_cov" and acts:
        slope = 0.0
    if method == "entropy_bonus":
        return loss - 0.1 * H, slope, -0.1
    if method == "kl_ref":
        d = ref - p
        loss, slope = loss + 0.5 * (math.exp(d) - 1 - d), slope + 0.5 * (1 - math.exp(d))
    if method in ("high_entropy", "low_entropy", "entrocraft") and not acts:
        slope = 0.0  # not in the mean
    if method == "adaptive_entropy":
        return loss - 0.1 / 50 * H, slope, -0.1 / 50
    return loss, slope, 0.0


def weights(method, t):
    """{position: what the method multiplies the token's loss by}."""
    cov = covariances(t)
    if method == "cw_grpo":
        w = {at: math.exp(-(c**2) / (2 * statistics.pvariance(cov.values()))) for at, c in cov.items()}
        return {at: w[at] / statistics.fmean(w.values()) for at in w}
    if method == "opefo":
        A, logp, H = t.advantages, t.logp.detach().clamp(max=0), t.entropy.detach()
        flow = {at: (-A[at] * logp[at].exp() * (logp[at] + H[at])).item() for at in cov}
        up, down = (sum(max(sign * x, 0) for x in flow.values()) for sign in (1, -1))
        share = (down - up) / (down + up)
        return {at: 1 + share if x > 0 else 1 - share for at, x in flow.items()}
    return dict.fromkeys(cov, 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_every_method_is_its_formula_and_so_is_its_gradient(method, seed):
    t = mini_batch(seed)
    loss, dlogp, dH = push(method, t)
    clipped, factor = set(), weights(method, t)
    for at in places(t.mask):
        p, old, A, H, ref = (x[at].item() for x in (t.logp, t.old_logp, t.advantages, t.entropy, t.ref_logp))
        acts = loss.selected is not None and bool(loss.selected[at])
        got = loss.token_loss[at].item(), dlogp[at].item(), dH[at].item()
        want = formula(method, p, old, A, H, ref, acts)
        want = want[0] * factor[at], want[1] * factor[at], want[2]
        assert got == pytest.approx(want, rel=1e-9, abs=1e-15)
        if min(max(math.exp(p - old), 0.8), 1.28) * A < math.exp(p - old) * A:
            clipped.add(at)
    assert (dlogp[~t.mask] == 0).all() and (dH[~t.mask] == 0).all()
    if method in PPO:
        assert 0 < len(clipped) < t.mask.sum() and places(loss.clipped) == clipped


@pytest.mark.parametrize("seed", range(3))
def test_every_method_acts_on_the_tokens_of_the_whole_mini_batch_that_it_says(seed):
    t = mini_batch(seed)
    cov, N = covariances(t), int(t.mask.sum())
    assert {at: t.covariance[at].item() for at in cov} == pytest.approx(cov, rel=1e-9)
    chosen = {method: push(method, t)[0] for method in METHODS}
    assert all(chosen[method].selected is None for method in ("grpo", "clip_higher", *WITHOUT_SIGNAL))
    top = sorted((at for at in cov if cov[at] > 0), key=cov.get)[-max(1, int(0.2 * N)) :]
    assert places(chosen["kl_cov"].selected) == set(top)
    candidates = {at for at in cov if 0.1 < cov[at] < 2} - places(chosen["clip_cov"].clipped)
    assert places(chosen["clip_cov"].selected) <= candidates
    assert chosen["clip_cov"].selected.sum() == min(max(1, int(0.15 * N)), len(candidates))
    ranked = sorted(cov, key=lambda at: -t.old_entropy[at].item())
    assert places(chosen["high_entropy"].kept) == set(ranked[: round(0.3 * N)])
    low = METHODS["low_entropy"](t, options(entropy_fraction=0.7))
    assert torch.equal(low.kept, t.mask & ~chosen["high_entropy"].kept)  # the two divide the tokens
    assert torch.equal(low.selected, low.kept)
    assert torch.equal(chosen["entrocraft"].kept, t.mask & (t.advantages < 0))  # the entropy is low


def test_opefo_leaves_the_entropy_as_it_is_to_first_order():
    t = mini_batch(drift=0.0)
    _, slope, _ = push("opefo", t)
    flow = slope * t.logp.exp() * (t.logp + t.entropy)
    assert flow.sum().abs() < 1e-12 * flow.abs().sum()
    assert push("opefo", mini_batch(drift=0.0, strength=0.0))[1].equal(push("grpo", t)[1])


def test_the_adaptive_coefficient_rises_below_its_target_falls_above_and_stays_within_its_bounds():
    memory, H = {}, mini_batch().old_entropy[mini_batch().mask].mean().item()

    def alpha(target, times):
        for _ in range(times):
            added = push("adaptive_entropy", mini_batch(memory=memory), options(entropy_target=target))[2]
            assert added[mini_batch().mask].unique().item() == (-memory["alpha"] if H < target else 0)
        return memory["alpha"]

    assert alpha(H - 0.01, 2) == 0
    assert alpha(H + 0.01, 3) == pytest.approx(0.006)
    assert alpha(H - 0.01, 1) == pytest.approx(0.004)
    assert alpha(H + 0.01, 99) == 0.1


def test_entrocraft_lets_only_the_right_answers_count_above_its_band_and_all_within():
    t = mini_batch()
    H = t.old_entropy[t.mask].mean().item()
    kept = [push("entrocraft", t, options(entropy_target=H * f))[0].kept for f in (0.9, 1.0, 1.12)]
    assert [places(k) for k in kept] == [places(t.mask & (t.advantages > 0)), places(t.mask),
                                         places(t.mask & (t.advantages < 0))]  # fmt: skip


def test_clip_cov_never_wastes_its_choice_on_tokens_that_are_clipped_already():
    old, A = float64([-2, -2, -0.5, -0.5, -2, -2]), float64([-1, -1, 2, 1, -1, 0])
    t = tokens(old + float64([0, 0, 0.4, 0, 0, 0]), old, A)
    assert t.covariance.argmax() == 2  # the clipped one
    loss, *_ = push("clip_cov", t, options(clip_cov_ratio=0.9, cov_high=99))
    assert places(loss.clipped) == {(0, 2)} and places(loss.selected) == {(0, 0), (0, 1), (0, 3), (0, 4)}
    assert not push("clip_cov", t, options(cov_low=t.covariance.max() - 0.01, cov_high=99))[0].selected.any()


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_annealing_takes_from_the_strength_of_what_a_method_adds(strength):
    t, full = mini_batch(strength=strength), mini_batch()
    chosen, whole = (places(push("clip_cov", x)[0].selected) for x in (t, full))
    assert len(chosen) == int(strength * 0.15 * t.mask.sum()) < len(whole)
    ppo = push("grpo", t)[0].token_loss
    for method, plain in (("kl_cov", -t.ratio * t.advantages), ("entropy_bonus", ppo)):
        added, left = (push(method, x)[0].token_loss - plain for x in (full, t))
        torch.testing.assert_close(left, strength * added)
        assert (added != 0).any()
    assert bool(push("kl_cov", t)[0].selected.any()) == (strength > 0)


@pytest.mark.parametrize("method", METHODS)
def test_on_the_first_mini_batch_every_method_is_the_policy_gradient_except_where_it_acts(method):
    t = mini_batch(drift=0.0)
    t.ref_logp = t.old_logp  # the first mini-batch of a run
    loss, slope, _ = push(method, t, options(kl_cov_beta=100.0))
    free = t.mask if loss.kept is None else loss.kept
    if method == "clip_cov":
        free = free & ~loss.selected
    assert (t.ratio == 1).all() and free.any() and (slope[~free] == 0).all()
    factor = weights(method, t)
    want = [-t.advantages[at].item() * factor[at] for at in map(tuple, free.nonzero().tolist())]
    assert slope[free].tolist() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_a_ratio_beyond_all_bounds_leaves_loss_and_gradient_finite(method, far):
    old = torch.full((2, 3), -1.0)  # in fp32, as in training
    A = torch.tensor([[1.0], [-1.0]]).expand(2, 3).clone()
    loss, slope, _ = push(method, tokens(old + far * torch.eye(3)[:2], old, A))
    assert torch.isfinite(loss.token_loss).all() and torch.isfinite(slope).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_what_stands_where_no_token_is_changes_neither_loss_nor_gradient_nor_selection(method, garbage):
    t = mini_batch()
    dirty = [x.detach().masked_fill(~t.mask, garbage) for x in (t.logp, t.old_logp, t.advantages)]
    more = {"old_entropy": t.old_entropy.masked_fill(~t.mask, garbage), "ref_logp": t.ref_logp}
    (a, da, _), (b, db, _) = push(method, t), push(method, tokens(*dirty, t.mask, **more))
    kept = t.mask if a.kept is None else a.kept
    assert torch.equal(aggregate(a.token_loss, kept, 9), aggregate(b.token_loss, kept, 9))
    assert torch.equal(da, db) and (da[~t.mask] == 0).all()
    for mine, theirs in ((a.selected, b.selected), (a.clipped, b.clipped), (a.kept, b.kept)):
        assert mine is theirs is None or torch.equal(mine, theirs) and not mine[~t.mask].any()


# ---------------------------------------------------------------- the mean


def test_the_mean_gives_every_token_the_same_weight_and_adds_up_over_micro_batches_of_any_size():
    loss, mask = torch.randn(6, 5, dtype=torch.float64), torch.arange(5) < float64(5, 1, 1, 2, 4, 1)[:, None]
    loss.masked_fill_(~mask, math.nan).requires_grad_()
    whole = aggregate(loss, mask, mask.sum())
    (weight,) = torch.autograd.grad(whole, loss)
    assert whole.item() == pytest.approx(loss[mask].mean().item()) and torch.equal(weight, mask.double() / 14)
    for size in (1, 2, 4):
        parts = [aggregate(x, m, 14) for x, m in zip(loss.split(size), mask.split(size))]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)
    assert aggregate(loss, torch.zeros(6, 5), 0) == 0  # a mini-batch without tokens
