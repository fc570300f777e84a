"""Answers to the exercises of course.md: those of the file that ANSWERS names, or else the house's own."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))


def load(file):
    """The module that a file holds."""
    spec = importlib.util.spec_from_file_location("answers", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


answers = load(os.environ.get("ANSWERS") or HERE / "solutions.py")


def test_rloo_compares_each_sample_with_the_others_of_its_own_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    want = torch.tensor([[1.0, -0.5, -0.5], [0.5, 0.5, -1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(answers.rloo(rewards), want)


@pytest.mark.parametrize("ratio, count", [(0.001, 1), (0.25, 2), (0.5, 4), (1.0, 6)])
def test_select_takes_the_highest_positive_covariances_of_the_whole_mini_batch(ratio, count):
    cov = torch.tensor([[5.0, -1.0, 3.0, 99.0], [0.5, 4.0, 0.0, 1.0], [2.0, 99.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    selected = answers.select(cov, mask, ratio)
    assert selected.dtype == torch.bool and selected.shape == cov.shape
    assert sorted(cov[selected].tolist(), reverse=True) == [5.0, 4.0, 3.0, 2.0, 1.0, 0.5][:count]


def test_select_takes_nothing_where_there_is_no_signal():
    assert not answers.select(torch.zeros(2, 3), torch.ones(2, 3).bool(), 0.5).any()


def test_kl_cov_and_its_gradient_by_hand():
    old = torch.tensor([[0.5, 0.5, 0.2, 0.2]]).log()
    logp = torch.tensor([[0.6, 0.6, 0.1, 0.1]]).log().requires_grad_()
    A, selected = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.tensor([[False, True, False, True]])
    loss = answers.kl_cov(logp, old, A, selected, 3.0)
    up, down = torch.tensor([1.2, 0.5]).log().abs().tolist()
    torch.testing.assert_close(loss.detach(), torch.tensor([[-1.2, -1.2 + 3 * up, 0.5, 0.5 + 3 * down]]))
    loss.sum().backward()  # d ratio / d logp = ratio; the penalty pulls back with beta, from both sides
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.2, -1.2 + 3, 0.5, 0.5 - 3]]))


def test_the_fit_finds_the_law_under_noise():
    H = torch.linspace(1.2, 0.05, 50, dtype=torch.float64)
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = answers.fit_law(H, -0.2 * H.exp() + 0.8 + 0.01 * noise)
    assert float(a) == pytest.approx(0.2, abs=0.01) and float(b) == pytest.approx(0.8, abs=0.02)


def test_the_sampler_draws_each_token_with_its_probability_and_never_one_of_none():
    p = torch.tensor([[0.5, 0.0, 0.25, 0.25]])
    u = (torch.arange(1000) + 0.5) / 1000
    tokens = answers.draw(p.expand(1000, 4), u)
    assert torch.bincount(tokens, minlength=4).tolist() == [500, 0, 250, 250]
    assert answers.draw(p, torch.tensor([0.0])).item() == 0 and answers.draw(p, torch.tensor([0.5])).item() == 2
