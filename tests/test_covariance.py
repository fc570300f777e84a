"""What covariance.py promises: the theorem to first order, the covariance of a token, two selections."""

import collections
import itertools
import math

import pytest
import torch
from conftest import chi_square

from covariance import predicted_entropy_change, select_clip_cov, select_kl_cov, token_covariance
from entropy import entropy

ALL = torch.ones(4, 10, dtype=torch.bool)
GRID = torch.arange(40.0).view(4, 10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(B=5, T=8):
    """logp, advantages, mask (B, T) in float64, rows of length 1 to T."""
    g = generator()
    logp = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, T).clone()
    return logp, advantages, torch.arange(T) < torch.randint(1, T + 1, (B,), generator=g)[:, None]


# ---------------------------------------------------------------- the theorem


@pytest.fixture
def policies():
    """Logits and advantages of six policies over nine actions: (2, 6, 9)."""
    return torch.randn(2, 6, 9, generator=generator(1), dtype=torch.float64)


def test_the_prediction_is_the_derivative_of_entropy_along_the_change_and_ignores_constants(policies):
    z, dz = policies.requires_grad_()
    (slope,) = torch.autograd.grad(entropy(z).sum(), z)
    for shift in (0, 5):
        predicted = predicted_entropy_change(z + shift, dz - shift)
        torch.testing.assert_close(predicted, (slope * dz).sum(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("action, change, rises", [(0, 0.1, False), (1, 0.1, True), (0, -0.1, True)])
def test_a_likely_action_with_high_advantage_lowers_entropy_and_a_rare_one_raises_it(action, change, rises):
    z = torch.tensor([3.0, 0.0, 0.0])
    assert (predicted_entropy_change(z, change * torch.eye(3)[action]) > 0) == rises


# ---------------------------------------------------------------- covariance of tokens


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_token_covariance_is_the_centred_product_over_all_tokens_and_zero_elsewhere(garbage, dtype):
    logp, advantages, mask = batch()
    cov = token_covariance(*(x.masked_fill(~mask, garbage) for x in (logp, advantages)), mask.to(dtype))
    tokens = [(logp[i, j].item(), advantages[i, j].item()) for i, j in mask.nonzero().tolist()]
    mean = [math.fsum(x) / len(tokens) for x in zip(*tokens)]
    assert cov[mask].tolist() == pytest.approx([(p - mean[0]) * (a - mean[1]) for p, a in tokens], rel=1e-12)
    assert cov.shape == mask.shape and (cov[~mask] == 0).all()


def test_a_mini_batch_without_tokens_or_without_signal_selects_nothing():
    none = torch.zeros(4, 10)
    assert (token_covariance(GRID, GRID, none) == 0).all()
    cov = token_covariance(-GRID, torch.full((4, 10), 0.7), ALL)  # all advantages are equal
    for mask in (none, ALL):
        assert not select_kl_cov(cov, mask, 0.5).any()
    assert not select_clip_cov(GRID, none, 0.5, -1, 99, generator()).any()


# ---------------------------------------------------------------- KL-Cov's choice


@pytest.mark.parametrize("ratio, count", [(2e-4, 1), (0.1, 2), (0.13, 3), (0.5, 12), (0.999, 23), (1.0, 24)])
def test_kl_cov_selects_the_top_tokens_of_the_whole_mini_batch(ratio, count):
    cov = torch.rand(4, 10, generator=generator(), dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor([10, 3, 1, 10])[:, None]  # N = 24
    selected = select_kl_cov(cov.masked_fill(~mask, 99.0), mask, ratio)
    assert selected.dtype == torch.bool and selected.shape == cov.shape and not (selected & ~mask).any()
    assert sorted(cov[selected].tolist()) == sorted(cov[mask].tolist())[-count:]


def test_kl_cov_selects_only_positive_covariance_not_a_share_of_each_row_and_not_great_magnitude():
    cov = torch.full((4, 10), -9.0)
    cov[2] = torch.arange(10)
    assert select_kl_cov(cov, ALL, 0.1).nonzero().tolist() == [[2, 6], [2, 7], [2, 8], [2, 9]]
    assert select_kl_cov(cov, ALL, 1.0).nonzero().tolist() == [[2, i] for i in range(1, 10)]
    assert select_kl_cov(cov, ALL, 0.1, low=7).nonzero().tolist() == [[2, 8], [2, 9]]


# ---------------------------------------------------------------- Clip-Cov's choice


@pytest.mark.parametrize("ratio, low, high, count", [
    (2e-4, 11, 39, 1), (0.1, 11, 39, 3), (0.13, 11, 39, 3), (0.5, -1, 40, 15),  # max(1, int(r N)), N = 30
    (0.5, 11, 19, 7), (1.0, -1, 40, 30), (0.1, 11, 14, 2),  # fewer candidates: all of them
    (0.5, 39, 99, 0), (2e-4, 99, 100, 0), (0.0, -1, 40, 0),  # no candidate or ratio 0: none
])  # fmt: skip
def test_clip_cov_selects_a_share_of_all_tokens_strictly_between_the_bounds(ratio, low, high, count):
    mask = torch.arange(10) < torch.tensor([10, 10, 5, 5])[:, None]
    for seed in range(5):
        selected = select_clip_cov(GRID.masked_fill(~mask, 15), mask, ratio, low, high, generator(seed))
        assert selected.dtype == torch.bool and selected.shape == GRID.shape and selected.sum() == count
        assert ((GRID > low) & (GRID < high) & mask)[selected].all()


def test_clip_cov_chooses_uniformly():
    cov = torch.tensor([[2.0, 0.5, 3.0, 9.0], [4.0, 1.5, 2.5, 2.0]])  # five of eight are candidates
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    g, count = generator(), collections.Counter()
    for _ in range(3000):
        selected = select_clip_cov(cov, mask, 0.3, 1.0, 5.0, g)  # int(0.3 * 7) = 2 of them
        count[tuple(selected.flatten().nonzero()[:, 0].tolist())] += 1
    pairs = list(itertools.combinations([0, 2, 4, 5, 6], 2))
    assert set(count) <= set(pairs) and chi_square([count[pair] for pair in pairs], [300] * 10) > 1e-3


def test_clip_cov_draws_from_its_own_generator_and_never_from_the_global_one():
    before, first, again = torch.get_rng_state(), generator(3), generator(3)
    draws = [select_clip_cov(GRID, ALL, 0.1, 1, 30, first) for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(torch.equal(draw, select_clip_cov(GRID, ALL, 0.1, 1, 30, again)) for draw in draws)
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 5
