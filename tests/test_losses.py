"""What losses.py promises: advantages without noise, each method's loss as its formula has it, one mean over all tokens."""

import math
from types import SimpleNamespace

import pytest
import torch

import losses
from losses import METHODS, Tokens, aggregate, group_advantages

O = SimpleNamespace(clip_low=0.2, clip_high=0.28, clip_cov_ratio=0.15, cov_low=0.1, cov_high=2.0, kl_cov_ratio=0.2, kl_cov_beta=1.5,
                    entropy_coef=0.1, kl_ref_beta=0.5, entropy_fraction=0.3)  # fmt: skip


def options(**changes):
    return SimpleNamespace(**{**vars(O), **changes})


def mini_batch(seed=0, B=6, T=7, drift=0.5, logp=None):
    """Tokens in float64, rows of length 1 to T, ratios up to e^drift and beyond."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64) - 0.1
    now = old + drift * torch.randn(B, T, generator=g, dtype=torch.float64) if logp is None else logp
    advantages = torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, T).clone()
    mask = torch.arange(T) < torch.randint(1, T + 1, (B,), generator=g)[:, None]
    mask[0] = True
    return now.requires_grad_(), old, advantages, mask


def tokens(now, old, advantages, mask, seed=0):
    """Tokens whose starting policy is the one that sampled, and whose entropies are those of two choices."""
    p = old.detach().clamp(-9, -1e-3).exp()
    H = -(p * p.log() + (1 - p) * (1 - p).log())
    return Tokens(now, old, advantages, mask, H.clone(), torch.Generator().manual_seed(seed), old_entropy=H, ref_logp=old)


def push(method, batch, o=O, seed=0):
    """A method's losses, d(sum of losses)/dlogp, and the Tokens with what it left there."""
    now = batch[0].detach().clone().requires_grad_()
    t = tokens(now, *batch[1:], seed)
    loss = METHODS[method](t, o)
    (g,) = torch.autograd.grad(aggregate(loss, t.kept, 1), now)
    return loss.detach(), g, t


def numbers(batch):
    """(position, logp, old_logp, advantage) of every token, as Python floats."""
    now, old, advantages, mask = (x.detach() for x in batch)
    return [((i, j), now[i, j].item(), old[i, j].item(), advantages[i, j].item()) for i, j in mask.nonzero().tolist()]


def covariances(batch):
    """{position: Cov} by the paper's formula."""
    ts = numbers(batch)
    mean_p, mean_a = (math.fsum(t[k] for t in ts) / len(ts) for k in (1, 3))
    return {at: (p - mean_p) * (a - mean_a) for at, p, _, a in ts}


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("G", [2, 3, 7, 8, 16])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_no_advantage_whatever_the_rounding(reward, G, dtype):
    for eps in (1e-6, 1e-8, 1e-30):
        assert (group_advantages(torch.full((2, G), reward, dtype=dtype), eps=eps) == 0).all()


def test_a_group_without_signal_leaves_its_neighbours_alone():
    rewards = torch.tensor([[0.7] * 4, [1.0, 0.0, 0.0, 0.0], [1.0] * 4])
    advantages = group_advantages(rewards)
    assert (advantages[[0, 2]] == 0).all()
    assert torch.equal(advantages[1:2], group_advantages(rewards[1:2]))


def test_grpo_advantages_have_mean_zero_and_unit_deviation_in_each_group():
    rewards = torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 3, 5)[:, None]
    advantages = group_advantages(rewards, "grpo")
    assert advantages.shape == rewards.shape and advantages.mean(1).abs().max() < 1e-12
    assert advantages.std(1).tolist() == pytest.approx([1.0] * 5, abs=1e-4)
    assert ((advantages > 0) == (rewards > rewards.mean(1, keepdim=True))).all()


def test_grpo_advantages_equal_the_formula():
    r = [1.0, 0.0, 0.0, 1.0, 0.0]
    mean = sum(r) / 5
    std = math.sqrt(sum((x - mean) ** 2 for x in r) / 4)
    assert group_advantages(torch.tensor([r], dtype=torch.float64))[0].tolist() == pytest.approx([(x - mean) / std for x in r], rel=1e-5)


def test_a_group_of_one_has_nothing_to_compare_with():
    with pytest.raises(ValueError, match="two"):
        group_advantages(torch.ones(4, 1))


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="gpro.*grpo"):
        group_advantages(torch.rand(2, 2), "gpro")


# ---------------------------------------------------------------- PPO's clip


@pytest.mark.parametrize("seed", range(4))
def test_grpo_is_ppo_with_clip(seed):
    batch = mini_batch(seed)
    loss, g, t = push("grpo", batch)
    clipped = 0
    for (i, j), p, old, A in numbers(batch):
        ratio = math.exp(p - old)
        free, bounded = ratio * A, min(max(ratio, 0.8), 1.28) * A
        assert loss[i, j].item() == pytest.approx(-min(free, bounded), rel=1e-12)
        assert g[i, j].item() == pytest.approx(-free if free <= bounded else 0.0, rel=1e-12)  # d ratio/d logp = ratio
        assert bool(t.clipped[i, j]) == (bounded < free)
        clipped += bounded < free
    assert 0 < clipped == t.clipped.sum() < t.mask.sum()


def test_the_clip_stops_what_went_too_far_and_never_what_comes_back():
    old = torch.zeros(1, 4).sub(1.0)
    now = old + torch.tensor([[0.5, 0.5, -0.5, -0.5]])
    _, g, _ = push("grpo", (now, old, torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)))
    assert [x != 0 for x in g[0].tolist()] == [False, True, True, False]


def test_the_clip_reaches_as_far_on_each_side_as_its_own_option_says():
    old, mask = torch.full((1, 4), -1.0), torch.ones(1, 4, dtype=torch.bool)
    now = old + torch.tensor([[1.27, 1.29, 0.81, 0.79]]).log()
    _, g, _ = push("grpo", (now, old, torch.tensor([[1.0, 1.0, -1.0, -1.0]]), mask))
    assert [x != 0 for x in g[0].tolist()] == [True, False, True, False]


# ---------------------------------------------------------------- Clip-Cov


@pytest.mark.parametrize("seed", range(4))
def test_clip_cov_is_ppo_with_clip_but_its_selected_tokens_have_no_gradient(seed):
    batch = mini_batch(seed)
    loss, g, t = push("clip_cov", batch)
    ppo, ppo_g, _ = push("grpo", batch)
    assert torch.equal(loss[t.mask], ppo[t.mask])
    assert t.selected.any() and (g[t.selected] == 0).all()
    assert torch.equal(g[~t.selected], ppo_g[~t.selected]) and (ppo_g[t.selected] != 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_clip_cov_selects_a_share_of_all_tokens_among_the_unclipped_between_the_bounds(seed):
    batch = mini_batch(seed)
    cov = covariances(batch)
    _, _, t = push("clip_cov", batch)
    candidates = {at for at in cov if O.cov_low < cov[at] < O.cov_high and not t.clipped[at]}
    selected = set(map(tuple, t.selected.nonzero().tolist()))
    assert selected <= candidates and len(selected) == min(max(1, int(O.clip_cov_ratio * len(cov))), len(candidates))


def test_clip_cov_never_wastes_its_choice_on_tokens_that_ppo_has_clipped_already():
    old = torch.tensor([[-2.0, -2.0, -0.5, -0.5, -2.0, -2.0]])
    now = old + torch.tensor([[0.0, 0.0, 0.4, 0.0, 0.0, 0.0]])
    A = torch.tensor([[-1.0, -1.0, 2.0, 1.0, -1.0, 0.0]])
    batch = now, old, A, torch.ones(1, 6, dtype=torch.bool)
    cov = covariances(batch)
    assert max(cov, key=cov.get) == (0, 2)  # the clipped one has the highest covariance
    for seed in range(20):
        _, _, t = push("clip_cov", batch, options(clip_cov_ratio=0.9, cov_high=99), seed)
        assert t.clipped.tolist()[0] == [False, False, True, False, False, False]
        assert t.selected.tolist()[0] == [True, True, False, True, True, False]
    _, _, t = push("clip_cov", batch, options(cov_low=cov[0, 2] - 0.01, cov_high=99))  # no other candidate
    assert not t.selected.any()


def test_clip_cov_choice_comes_from_its_generator():
    batch = mini_batch(B=20, T=20)
    before = torch.get_rng_state()
    choices = [push("clip_cov", batch, options(clip_cov_ratio=0.05), seed)[2].selected for seed in (1, 1, 2)]
    assert torch.equal(choices[0], choices[1]) and not torch.equal(choices[0], choices[2])
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- KL-Cov


@pytest.mark.parametrize("seed", range(4))
def test_kl_cov_is_the_plain_ratio_and_a_penalty_on_the_top_tokens(seed):
    batch = mini_batch(seed)
    loss, g, t = push("kl_cov", batch)
    cov = covariances(batch)
    top = sorted(cov, key=cov.get)[-max(1, int(O.kl_cov_ratio * len(cov))) :]
    assert set(map(tuple, t.selected.nonzero().tolist())) == set(top)
    for at, p, old, A in numbers(batch):
        ratio, held = math.exp(p - old), at in top
        assert loss[at].item() == pytest.approx(-ratio * A + held * 1.5 * abs(p - old), rel=1e-12)
        assert g[at].item() == pytest.approx(-ratio * A + held * 1.5 * math.copysign(1, p - old), rel=1e-12)


def test_kl_cov_has_no_clip():
    old, mask = torch.full((1, 4), -3.0), torch.ones(1, 4, dtype=torch.bool)
    now = old + torch.tensor([[9.0, -9.0, 9.0, -9.0]])
    A = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    _, g, _ = push("kl_cov", (now, old, A, mask), options(kl_cov_beta=0.0))
    torch.testing.assert_close(g, -(now - old).exp() * A)


def test_the_penalty_has_no_gradient_where_the_policy_has_not_moved():
    _, old, A, mask = mini_batch()
    for beta in (1.0, 100.0):
        _, g, t = push("kl_cov", (old.clone(), old, A, mask), options(kl_cov_beta=beta))
        assert t.selected.any() and torch.equal(g[mask], -A[mask])


def test_the_penalty_pushes_a_token_back_to_where_it_was():
    _, old, A, mask = mini_batch()
    for moved in (0.1, -0.1):
        o = options(kl_cov_beta=100.0)
        _, g, t = push("kl_cov", (old + moved, old, A, mask), o)
        assert (-g[t.selected] * moved < 0).all()  # descent goes against the movement
        _, free, _ = push("kl_cov", (old + moved, old, A, mask), options(kl_cov_beta=0.0))
        assert torch.equal(g[~t.selected], free[~t.selected])


# ---------------------------------------------------------------- all methods


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_covariance_and_selection_follow_the_current_policy_and_pass_no_gradient(method):
    batch = mini_batch(drift=1.0)
    _, _, t = push(method, batch)
    assert not t.covariance.requires_grad
    want = covariances(batch)
    assert [t.covariance[at].item() for at in want] == pytest.approx(list(want.values()), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_on_the_first_mini_batch_every_method_is_the_policy_gradient_except_where_it_acts(method):
    _, old, A, mask = mini_batch()
    _, g, t = push(method, (old.clone(), old, A, mask))
    assert (t.ratio[mask] == 1).all()
    free = t.kept & ~t.selected if method == "clip_cov" else t.kept  # the penalties of kl_cov and kl_ref have no gradient yet
    torch.testing.assert_close(g[free], -A[free], rtol=1e-12, atol=0)
    assert (g[~free] == 0).all() and free.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("token, advantage, rises, entropy_falls", [
    (0, 1.0, True, True), (1, 1.0, True, False), (0, -1.0, False, False), (1, -1.0, False, True),
])  # fmt: skip
def test_a_rewarded_token_becomes_likelier_and_entropy_falls_if_it_was_likely(method, token, advantage, rises, entropy_falls):
    z = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)  # probabilities .88 and .12
    logp = torch.log_softmax(z, -1)[token].view(1, 1)
    # a second, fixed token keeps the mean advantage away from this one's; no token is a candidate of clip_cov
    logp = torch.cat((logp, torch.full((1, 1), -1.0, dtype=torch.float64)), 1)
    A, mask = torch.tensor([[advantage, 0.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    t = tokens(logp, logp.detach(), A, mask)
    o = options(cov_low=50.0, cov_high=99.0, entropy_fraction=1.0)  # all tokens
    aggregate(METHODS[method](t, o), t.kept, 2).backward()
    before, after = (torch.softmax(x, -1) for x in (z.detach(), z.detach() - 0.1 * z.grad))
    assert (after[token] > before[token]) == rises
    H = lambda p: -(p * p.log()).sum()
    assert (H(after) < H(before)) == entropy_falls


def test_clip_cov_and_kl_cov_slow_the_fall_of_entropy_at_the_tokens_they_act_on():
    """Two updates on one likely, rewarded token of a two-token policy: GRPO sharpens it most."""

    def entropy_after(method):
        z = torch.tensor([1.0, -1.0], dtype=torch.float64)
        old = torch.log_softmax(z, -1)[0].view(1, 1)
        for _ in range(2):
            z.requires_grad_()
            logp = torch.cat((torch.log_softmax(z, -1)[0].view(1, 1), torch.full((1, 1), -2.0, dtype=torch.float64)), 1)
            t = tokens(logp, torch.cat((old, torch.full((1, 1), -2.0, dtype=torch.float64)), 1),
                       torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))  # fmt: skip
            (g,) = torch.autograd.grad(aggregate(METHODS[method](t, options(clip_cov_ratio=1.0)), t.mask, 2), z)
            z = (z - 0.5 * g).detach()
        p = torch.softmax(z, -1)
        return -(p * p.log()).sum().item()

    assert entropy_after("grpo") < min(entropy_after("clip_cov"), entropy_after("kl_cov"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("far", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_beyond_all_bounds_leaves_loss_and_gradient_finite(method, far, dtype):
    old = torch.full((2, 3), -1.0, dtype=dtype)
    now = old.clone()
    now[0, 1] += far
    now[1, 1] += far
    A = torch.tensor([[1.0], [-1.0]], dtype=dtype).expand(2, 3).clone()
    loss, g, t = push(method, (now, old, A, torch.ones(2, 3, dtype=torch.bool)))
    assert torch.isfinite(loss).all() and torch.isfinite(g).all() and torch.isfinite(t.ratio).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_what_stands_where_no_token_is_changes_neither_loss_nor_gradient_nor_selection(method, garbage):
    now, old, A, mask = mini_batch()
    loss, g, t = push(method, (now, old, A, mask))
    dirty = [x.detach().masked_fill(~mask, garbage) for x in (now, old, A)]
    dirty_loss, dirty_g, dirty_t = push(method, (*dirty, mask))
    assert torch.equal(aggregate(dirty_loss, mask, mask.sum()), aggregate(loss, mask, mask.sum()))
    assert torch.equal(dirty_g, g) and (g[~mask] == 0).all()
    for name in ("selected", "clipped"):
        if getattr(t, name) is not None:
            assert torch.equal(getattr(t, name), getattr(dirty_t, name)) and not getattr(t, name)[~mask].any()


# ---------------------------------------------------------------- the mean


def test_aggregate_is_the_sum_of_the_tokens_that_count_over_the_count_given():
    loss, mask = torch.arange(6.0).view(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert aggregate(loss, mask, 3) == aggregate(loss, mask.bool(), torch.tensor(3)) == (0 + 1 + 3) / 3
    assert aggregate(loss, mask, 12) == (0 + 1 + 3) / 12  # the rest of the mini-batch is elsewhere


def test_micro_batches_of_any_size_add_up_to_the_mini_batch():
    loss, mask = torch.randn(6, 5, dtype=torch.float64), torch.arange(5) < torch.tensor([5, 1, 1, 2, 4, 1])[:, None]
    whole = aggregate(loss, mask, mask.sum())
    assert whole.item() == pytest.approx(loss[mask].mean().item())
    for size in (1, 2, 4):
        parts = [aggregate(x, m, mask.sum()) for x, m in zip(loss.split(size), mask.split(size))]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_every_token_has_the_same_weight_however_long_its_completion():
    logp = torch.zeros(2, 5, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([5, 1])[:, None]
    aggregate(logp, mask, mask.sum()).backward()
    assert logp.grad[mask].tolist() == pytest.approx([1 / 6] * 6) and (logp.grad[~mask] == 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_the_loss_of_what_is_no_token_has_no_influence(garbage):
    loss, mask = torch.ones(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    loss = loss.masked_fill(~mask, garbage).requires_grad_()
    total = aggregate(loss, mask, 3)
    total.backward()
    assert total == 1 and (loss.grad[~mask] == 0).all()


def test_a_mini_batch_without_tokens_has_loss_zero():
    assert aggregate(torch.ones(2, 3), torch.zeros(2, 3), 0) == 0


def test_the_demonstration_shows_every_method(capsys):
    losses.main()
    lines = capsys.readouterr().out
    assert all(method in lines for method in METHODS)
