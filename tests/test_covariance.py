"""What covariance.py promises: the theorem to first order, the covariance of every token, and whom the two methods choose."""

import collections
import itertools
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from matplotlib.image import imread

import covariance
from covariance import predicted_entropy_change, select_clip_cov, select_kl_cov, token_covariance
from entropy import entropy


def batch(seed=0, B=5, T=8):
    """logp, advantages, mask (B, T) in float64, rows of length 1 to T."""
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, T).clone()
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    return logp, advantages, torch.arange(T) < lengths[:, None]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the theorem


def policies(n=6, V=9):
    g = generator(1)
    return 2 * torch.randn(n, V, generator=g, dtype=torch.float64), torch.randn(n, V, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("gradient", ["vanilla", "natural"])
def test_the_error_of_the_predicted_entropy_change_falls_as_the_square_of_the_step(gradient):
    z, A = policies()
    direction = A if gradient == "natural" else torch.softmax(z, -1) * A

    def error(eta):
        return (entropy(z + eta * direction) - entropy(z) - predicted_entropy_change(z, eta * direction)).abs()

    ratio = error(1e-2) / error(1e-3)
    assert ratio.shape == (6,) and ((ratio > 80) & (ratio < 120)).all(), ratio
    change = (entropy(z + 1e-4 * direction) - entropy(z)).abs()
    assert (error(1e-4) < 0.01 * change).all()  # and it is not the change itself that is small


def test_the_prediction_is_the_derivative_of_entropy_along_the_change():
    z, dz = policies()
    z.requires_grad_()
    (slope,) = torch.autograd.grad(entropy(z).sum(), z)
    torch.testing.assert_close(predicted_entropy_change(z.detach(), dz), (slope * dz).sum(-1), rtol=1e-9, atol=1e-12)


def test_a_likely_action_with_high_advantage_lowers_entropy_and_a_rare_one_raises_it():
    z = torch.tensor([3.0, 0.0, 0.0])
    assert predicted_entropy_change(z, torch.tensor([0.1, 0.0, 0.0])) < 0
    assert predicted_entropy_change(z, torch.tensor([0.0, 0.1, 0.0])) > 0
    assert predicted_entropy_change(z, torch.tensor([-0.1, 0.0, 0.0])) > 0


def test_the_prediction_takes_no_notice_of_a_constant_added_to_logits():
    z, dz = policies()
    torch.testing.assert_close(predicted_entropy_change(z + 5, dz - 3), predicted_entropy_change(z, dz), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- covariance of tokens


def test_token_covariance_is_the_centred_product_over_all_tokens_of_the_mini_batch():
    logp, advantages, mask = batch()
    cov = token_covariance(logp, advantages, mask)
    tokens = [(logp[i, j].item(), advantages[i, j].item()) for i, j in mask.nonzero().tolist()]
    mean = [math.fsum(x) / len(tokens) for x in zip(*tokens)]
    want = [(p - mean[0]) * (a - mean[1]) for p, a in tokens]
    assert cov[mask].tolist() == pytest.approx(want, rel=1e-12)


def test_it_is_zero_where_the_mask_is_zero_and_of_any_dtype_of_mask():
    logp, advantages, mask = batch()
    cov = token_covariance(logp, advantages, mask)
    assert cov.shape == logp.shape and (cov[~mask] == 0).all() and (cov[mask] != 0).all()
    for dtype in (torch.int64, torch.float32):
        assert torch.equal(token_covariance(logp, advantages, mask.to(dtype)), cov)


def test_its_mean_over_tokens_is_the_population_covariance():
    logp, advantages, mask = batch()
    both = torch.stack((logp[mask], advantages[mask]))
    mean = token_covariance(logp, advantages, mask).sum() / mask.sum()
    assert mean.item() == pytest.approx(torch.cov(both, correction=0)[0, 1].item(), rel=1e-10)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_where_no_token_is_has_no_influence(garbage):
    logp, advantages, mask = batch()
    want = token_covariance(logp, advantages, mask)
    dirty = [x.masked_fill(~mask, garbage) for x in (logp, advantages)]
    assert torch.equal(token_covariance(*dirty, mask), want)
    dirty = want.masked_fill(~mask, garbage)
    assert torch.equal(select_kl_cov(dirty, mask, 0.2), select_kl_cov(want, mask, 0.2))
    chosen = [select_clip_cov(x, mask, 0.2, -0.5, 2.0, generator()) for x in (dirty, want)]
    assert torch.equal(*chosen) and chosen[0].any()


def test_a_mini_batch_without_tokens_selects_nothing():
    nothing, mask = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert (token_covariance(nothing, nothing, mask) == 0).all()
    assert not select_kl_cov(nothing, mask, 0.5).any()
    assert not select_clip_cov(nothing, mask, 0.5, -1, 1, generator()).any()


# ---------------------------------------------------------------- KL-Cov's choice


@pytest.mark.parametrize("ratio, count", [(2e-4, 1), (0.04, 1), (0.1, 2), (0.13, 3), (0.5, 12), (0.999, 23), (1.0, 24)])
def test_kl_cov_selects_the_top_tokens_of_the_whole_mini_batch(ratio, count):
    cov = torch.randn(4, 10, generator=generator(), dtype=torch.float64)
    lengths = torch.tensor([10, 3, 1, 10])  # N = 24, of 40 entries
    mask = torch.arange(10) < lengths[:, None]
    selected = select_kl_cov(cov.masked_fill(~mask, 99.0), mask, ratio)
    assert selected.dtype == torch.bool and selected.shape == cov.shape
    assert selected.sum() == count == max(1, int(ratio * 24))
    assert not (selected & ~mask).any()
    assert set(cov[selected].tolist()) == set(sorted(cov[mask].tolist())[-count:])


def test_kl_cov_selects_over_the_mini_batch_and_not_a_share_of_each_row():
    cov = torch.zeros(4, 10)
    cov[2] = torch.arange(10) + 1.0
    selected = select_kl_cov(cov, torch.ones(4, 10), 0.1)
    assert selected.nonzero().tolist() == [[2, 6], [2, 7], [2, 8], [2, 9]]


def test_kl_cov_selects_high_covariance_and_not_great_magnitude():
    cov = torch.tensor([[-9.0, 0.1, 0.5, -0.2]])
    assert select_kl_cov(cov, torch.ones(1, 4), 0.25).tolist() == [[False, False, True, False]]


# ---------------------------------------------------------------- Clip-Cov's choice

GRID = torch.arange(40.0).view(4, 10)


def test_clip_cov_selects_among_the_tokens_strictly_between_the_bounds():
    seen = torch.zeros(4, 10, dtype=torch.bool)
    for seed in range(100):
        seen |= select_clip_cov(GRID, torch.ones(4, 10), 0.1, 11.0, 19.0, generator(seed))
    assert seen.flatten().nonzero()[:, 0].tolist() == list(range(12, 19))


@pytest.mark.parametrize("ratio, low, high, count", [
    (2e-4, 11, 39, 1), (0.1, 11, 39, 4), (0.12, 11, 39, 4), (0.5, -1, 40, 20),  # max(1, int(r N)), N = 40
    (0.5, 11, 19, 7), (1.0, -1, 40, 40), (0.1, 11, 14, 2),  # fewer candidates: all of them
    (0.5, 39, 99, 0), (0.5, 5, 5, 0), (2e-4, 99, 100, 0),  # no candidate: none
])  # fmt: skip
def test_clip_cov_selects_exactly_a_share_of_all_tokens_or_all_candidates_or_none(ratio, low, high, count):
    for seed in range(5):
        selected = select_clip_cov(GRID, torch.ones(4, 10), ratio, low, high, generator(seed))
        assert selected.dtype == torch.bool and selected.shape == GRID.shape and selected.sum() == count


def test_clip_cov_takes_its_share_of_the_tokens_and_not_of_the_entries_or_the_candidates():
    mask = torch.arange(10) < torch.tensor([10, 10, 5, 5])[:, None]  # N = 30
    selected = select_clip_cov(GRID, mask, 0.2, 3, 99, generator())
    assert selected.sum() == 6 and not (selected & ~mask).any()


def test_clip_cov_chooses_uniformly(chi_square):
    cov = torch.tensor([[2.0, 0.5, 3.0, 9.0], [4.0, 1.5, 2.5, 2.0]])  # five of eight are candidates
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    g, count = generator(), collections.Counter()
    for _ in range(3000):
        selected = select_clip_cov(cov, mask, 0.3, 1.0, 5.0, g)  # int(0.3 * 7) = 2 of them
        count[tuple(selected.flatten().nonzero()[:, 0].tolist())] += 1
    pairs = list(itertools.combinations([0, 2, 4, 5, 6], 2))
    assert set(count) <= set(pairs)
    assert chi_square([count[pair] for pair in pairs], [300] * 10) > 1e-3


def test_clip_cov_draws_from_its_own_generator_and_never_from_the_global_one():
    before = torch.get_rng_state()
    first = [select_clip_cov(GRID, torch.ones(4, 10), 0.1, 1, 30, g) for g in [generator(3)] for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = [select_clip_cov(GRID, torch.ones(4, 10), 0.1, 1, 30, g) for g in [generator(3)] for _ in range(5)]
    assert all(map(torch.equal, first, again))
    assert len({tuple(s.flatten().tolist()) for s in first}) == 5  # and the draws of one generator differ


def test_clip_cov_goes_on_from_a_saved_generator():
    g = generator()
    select_clip_cov(GRID, torch.ones(4, 10), 0.1, 1, 30, g)
    saved = g.get_state()
    rest = [select_clip_cov(GRID, torch.ones(4, 10), 0.1, 1, 30, g) for _ in range(3)]
    resumed = torch.Generator()
    resumed.set_state(saved)
    assert all(torch.equal(s, select_clip_cov(GRID, torch.ones(4, 10), 0.1, 1, 30, resumed)) for s in rest)


def test_the_demonstration_shows_half_the_step_to_leave_a_quarter_of_the_error_and_draws_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["covariance.py", "--out", str(tmp_path / "new" / "c.png")])
    covariance.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for gradient in ("vanilla", "natural"):
        rows = [line for line in lines if line and line[0] == gradient]
        errors = [abs(float(line[4])) for line in rows]
        assert len(rows) == 11 and errors[-2] / errors[-1] == pytest.approx(4, rel=0.05) and rows[-1][-1] in ("1/4.00", "1/4.01")
    assert imread(tmp_path / "new" / "c.png").std() > 0.01


def test_a_picture_that_cannot_be_written_is_one_line_and_exit_status_2(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, ROOT / "covariance.py", "--out", tmp_path / "file" / "c.png"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out" in done.stderr
