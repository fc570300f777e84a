"""What losses.py promises of its estimators: each is its formula, counts what it says, and pushes the policy the right way."""

import math
import statistics

import pytest
import torch

from losses import COMPARE_BATCH, ESTIMATORS, aggregate, group_advantages

IN_GROUPS = sorted(set(ESTIMATORS) - COMPARE_BATCH)
float64 = lambda rows: torch.tensor(rows, dtype=torch.float64)


def reference(name, rewards, lengths):
    """The formula of each estimator, one number at a time."""
    G, out = len(rewards[0]), []
    tokens = [r for rs, ls in zip(rewards, lengths) for r, length in zip(rs, ls) for _ in range(length)]  # each token its completion's reward
    for group in rewards:
        mean = math.fsum(group) / G
        for i, r in enumerate(group):
            others = [x for j, x in enumerate(group) if j != i]
            out.append({
                "grpo": lambda: (r - mean) / (statistics.stdev(group) + 1e-6),
                "dr_grpo": lambda: r - mean,
                "rloo": lambda: r - math.fsum(others) / len(others),
                "reinforce_pp": lambda: (r - statistics.fmean(tokens)) / (statistics.pstdev(tokens) + 1e-6),
                "prime": lambda: r - math.fsum(others) / len(others),  # the outcome's part
            }[name]())  # fmt: skip
    return out


# ---------------------------------------------------------------- the formulas


@pytest.mark.parametrize("name, by_hand", [
    ("grpo", [[1.5, -0.5, -0.5, -0.5], [0.5 * math.sqrt(3), 0.5 * math.sqrt(3), -0.5 * math.sqrt(3), -0.5 * math.sqrt(3)]]),  # std 1/2 and 1/sqrt 3
    ("dr_grpo", [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]),
    ("rloo", [[1, -1 / 3, -1 / 3, -1 / 3], [2 / 3, 2 / 3, -2 / 3, -2 / 3]]),
    ("reinforce_pp", [[math.sqrt(5 / 3), *[-math.sqrt(3 / 5)] * 3], [math.sqrt(5 / 3)] * 2 + [-math.sqrt(3 / 5)] * 2]),  # mean 3/8, variance 15/64
    ("prime", [[1, -1 / 3, -1 / 3, -1 / 3], [2 / 3, 2 / 3, -2 / 3, -2 / 3]]),
])  # fmt: skip
def test_two_groups_of_four_by_hand(name, by_hand):
    advantages = group_advantages(float64([[1, 0, 0, 0], [1, 1, 0, 0]]), name)
    torch.testing.assert_close(advantages, float64(by_hand), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_every_estimator_is_its_formula(name, seed):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.rand(5, 6, dtype=torch.float64, generator=g)
    lengths = torch.randint(1, 9, (5, 6), generator=g)
    advantages = group_advantages(rewards, name, lengths=lengths)
    assert advantages.shape == (5, 6)
    assert advantages.flatten().tolist() == pytest.approx(reference(name, rewards.tolist(), lengths.tolist()), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", IN_GROUPS)
def test_a_group_is_compared_with_itself_alone_and_adds_up_to_zero(name):
    rewards = torch.rand(4, 5, dtype=torch.float64)
    advantages = group_advantages(rewards, name)
    assert advantages.sum(1).abs().max() < 1e-9
    assert torch.equal(group_advantages(rewards[2:3], name)[0], advantages[2])
    assert torch.equal(group_advantages(rewards, name, lengths=torch.randint(1, 99, (4, 5))), advantages)


@pytest.mark.parametrize("name", IN_GROUPS)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0, 1 / 3])
def test_a_group_with_equal_rewards_has_exactly_none(name, reward):
    rewards = torch.full((3, 7), reward)
    rewards[1, 0] = 2.0
    advantages = group_advantages(rewards, name)
    assert (advantages[[0, 2]] == 0).all() and (advantages[1] != 0).all()


def test_rloo_is_dr_grpo_times_g_over_g_minus_1():
    rewards = torch.rand(4, 8, dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, "rloo"), group_advantages(rewards, "dr_grpo") * 8 / 7)


def test_grpo_favours_problems_that_are_almost_always_or_never_solved_and_dr_grpo_does_not():
    rewards = float64([[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    push = {name: group_advantages(rewards, name).abs().mean(1) for name in ("grpo", "dr_grpo")}
    hard_against_middling = {name: (x[0] / x[1]).item() for name, x in push.items()}
    assert hard_against_middling["dr_grpo"] == pytest.approx(7 / 16)  # 2 p (1 - p)
    assert hard_against_middling["grpo"] == pytest.approx(7 / 16 * math.sqrt(16 / 7), rel=1e-4)  # over the square root of p (1 - p)


def test_a_token_weighs_the_same_in_a_long_completion_and_in_a_short_one():
    """Dr. GRPO's other half: no division by each completion's own length."""
    lengths = torch.tensor([[9, 2, 5, 1]])
    mask = torch.arange(9) < lengths.flatten()[:, None]
    advantages = group_advantages(float64([[1, 0, 0, 1]]), "dr_grpo", lengths=lengths).view(-1, 1) * mask
    logp = torch.zeros(4, 9, dtype=torch.float64, requires_grad=True)
    aggregate(-logp * advantages, mask, mask.sum()).backward()
    torch.testing.assert_close(-logp.grad, advantages / 17)


# ---------------------------------------------------------------- REINFORCE++: the batch is the baseline


def test_reinforce_pp_has_mean_zero_and_variance_one_over_the_tokens_of_the_whole_batch():
    lengths = torch.randint(1, 30, (6, 4))
    advantages = group_advantages(torch.rand(6, 4, dtype=torch.float64), "reinforce_pp", lengths=lengths)
    tokens = advantages.flatten().repeat_interleave(lengths.flatten())
    assert abs(tokens.mean()) < 1e-12 and tokens.var(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_to_reinforce_pp_a_group_with_equal_rewards_is_a_signal_and_a_batch_with_equal_rewards_is_none():
    advantages = group_advantages(float64([[1, 1], [0, 0], [1, 0]]), "reinforce_pp")
    assert (advantages[0] > 0).all() and (advantages[1] < 0).all()
    for value in (0.1, 0.7, 1 / 3):
        lengths = torch.randint(1, 30, (5, 3))
        assert (group_advantages(torch.full((5, 3), value), "reinforce_pp", lengths=lengths) == 0).all()


def test_only_reinforce_pp_takes_groups_of_one():
    assert group_advantages(float64([[1], [0]]), "reinforce_pp").flatten().tolist() == pytest.approx([1, -1], rel=1e-5)
    for name in IN_GROUPS:
        with pytest.raises(ValueError, match="two"):
            group_advantages(torch.ones(4, 1), name)


# ---------------------------------------------------------------- two choices: what rises, what falls


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("good, entropy_falls", [(0, True), (1, False)])
def test_the_rewarded_choice_rises_and_entropy_falls_if_it_was_the_likely_one(name, good, entropy_falls):
    z = float64([1.0, -1.0]).requires_grad_()  # probabilities .88 and .12
    choices = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0]])  # as the policy draws: mostly the likely one
    advantages = group_advantages((choices == good).double(), name)
    logp = torch.log_softmax(z, -1)[choices]
    aggregate(-logp * advantages, torch.ones_like(choices), choices.numel()).backward()
    before, after = (torch.softmax(x, -1) for x in (z.detach(), z.detach() - 0.1 * z.grad))
    assert after[good] > before[good] and after[1 - good] < before[1 - good]
    H = lambda p: -(p * p.log()).sum()
    assert (H(after) < H(before)) == entropy_falls
