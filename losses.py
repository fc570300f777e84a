"""Losses: what is optimised. Advantages from rewards, a loss for each token, their mean over a mini-batch.

With ratio_i = exp(logp_i - old_logp_i), A_i the advantage of token i, H_i its entropy and N the number of tokens that count,

    L = 1/N sum_i loss_i        N over the whole mini-batch: all micro-batches, all processes

    grpo           loss_i = -min( ratio_i A_i, clip(ratio_i, 1 - e_low, 1 + e_high) A_i )      PPO's clip, on all tokens
    clip_higher    the same, e_high above e_low: 0.2 / 0.28                                    2503.14476, eq. 10
    clip_cov       the same, but a few tokens of high covariance contribute no gradient        2505.22617, section 4
    kl_cov         -ratio_i A_i, and + beta |logp_i - old_logp_i| on those of highest covariance            ibid.
    entropy_bonus  grpo's loss_i - c H_i                                                       1602.01783, section 4
    kl_ref         grpo's loss_i + beta k3_i, k3 an estimate of KL(policy || starting policy)  2402.03300, eq. 3 and 4
    high_entropy   grpo's loss_i, of the 20% of tokens with the highest entropy alone          2506.01939, section 5
    low_entropy    grpo's loss_i, of the other 80% alone                                                    ibid.

A method is a function of the mini-batch's tokens and the options; METHODS names it, and any estimator of the
advantage may go with it. It sees log-probs, never a model, so the same few lines hold for any number of
micro-batches and processes.

    python losses.py      which token's probability each method would raise or lower, on one small mini-batch
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from covariance import select_clip_cov, select_kl_cov, token_covariance

# ---------------------------------------------------------------- advantages: how much better than expected


def grpo_advantages(r, lengths, eps):
    """(r - mean) / (std + eps), both of the group (arXiv 2402.03300, section 4.1)."""
    return (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)


def dr_grpo_advantages(r, lengths, eps):
    """r - mean of the group (Dr. GRPO, arXiv 2503.20783): the division by std favours problems nearly always or never solved.

    Its other half, dividing by a constant in place of each completion's length, is done by `aggregate` for all
    estimators: N is one number for the whole mini-batch, so a token weighs the same in a long completion and in a short one.
    """
    return r - r.mean(1, keepdim=True)


def rloo_advantages(r, lengths, eps):
    """r - mean of the others in the group (RLOO, arXiv 2402.14740). Equals dr_grpo's times G / (G - 1)."""
    G = r.shape[1]
    return r - (r.sum(1, keepdim=True) - r) / (G - 1)


def reinforce_pp_advantages(r, lengths, eps):
    """(r - mean) / std, both over all tokens of all groups (REINFORCE++, arXiv 2501.03262): the batch is the baseline.

    Undiscounted and without a KL term in the reward, each token's return is its completion's reward, so a completion
    weighs by its length (P, G) in mean and std.
    """
    w = lengths / lengths.sum()
    mean = (w * r).sum()
    return (r - mean) / ((w * (r - mean) ** 2).sum().sqrt() + eps)


ESTIMATORS = {
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce_pp": reinforce_pp_advantages,
    "prime": rloo_advantages,  # of the outcome; prime.py adds the advantage of its process rewards, token by token
}
COMPARE_BATCH = {"reinforce_pp"}  # the others compare the samples of a group with each other alone


def group_advantages(rewards, estimator="grpo", eps=1e-6, lengths=None):
    """Advantage of each of the G samples of P prompts: (P, G) -> (P, G). lengths (P, G): tokens of each, else all alike.

    Where all rewards that are compared are equal the advantage is exactly 0: detected by max == min, since
    rounding would make something of nothing.
    Raises ValueError for a group of one if the group is all there is to compare with, and for an unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}, one of: {', '.join(ESTIMATORS)}")
    if rewards.shape[1] < 2 and estimator not in COMPARE_BATCH:
        raise ValueError("a group needs at least two samples: the advantage compares them with each other")
    compared = (0, 1) if estimator in COMPARE_BATCH else 1
    equal = rewards.amax(compared, keepdim=True) == rewards.amin(compared, keepdim=True)
    lengths = torch.ones_like(rewards) if lengths is None else lengths.to(rewards.dtype)
    return ESTIMATORS[estimator](rewards, lengths, eps).masked_fill(equal, 0.0)


# ---------------------------------------------------------------- the tokens of a mini-batch


@dataclass
class Tokens:
    """The tokens of one mini-batch, whole: every tensor (B, T), B completions of up to T tokens."""

    logp: torch.Tensor  # log-prob under the current policy; the loss is differentiated with respect to it
    old_logp: torch.Tensor  # log-prob under the policy that sampled
    advantages: torch.Tensor
    mask: torch.Tensor  # bool: which entries are tokens
    entropy: torch.Tensor  # nats, current policy; the loss may be differentiated with respect to it
    generator: torch.Generator | None = None  # for methods that choose at random
    old_entropy: torch.Tensor | None = None  # nats, the policy that sampled
    ref_logp: torch.Tensor | None = None  # log-prob under the starting policy, for those that NEED_REFERENCE
    selected: torch.Tensor | None = None  # set by a method: the tokens it acted on
    clipped: torch.Tensor | None = None  # set by a method: the kept tokens whose gradient PPO's clip removes
    kept: torch.Tensor | None = None  # set by a method: the tokens whose losses are averaged, if not all

    def __post_init__(self):
        self.kept = self.mask if self.kept is None else self.kept
        self.log_ratio = (self.logp - self.old_logp).clamp(-20, 20)  # exp(20) is beyond any use, not beyond fp32
        self.ratio = self.log_ratio.exp()
        self.covariance = token_covariance(self.logp.detach(), self.advantages, self.mask)


# ---------------------------------------------------------------- methods: (Tokens, options) -> loss of each token (B, T)


def ppo_clip(t, o):
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and which tokens the clip silences (arXiv 1707.06347, eq. 7)."""
    free = t.ratio * t.advantages
    bounded = t.ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * t.advantages
    t.clipped = (bounded < free).detach() & t.kept
    return -torch.min(free, bounded)


def grpo(t, o):
    """PPO's clipped loss with group advantages (arXiv 2402.03300, eq. 3, without its KL term)."""
    return ppo_clip(t, o)


def clip_higher(t, o):
    """Clip-Higher (DAPO, arXiv 2503.14476, eq. 10): room upwards, 0.28 against 0.2, for rare tokens; the rest is grpo."""
    return ppo_clip(t, o)


def clip_cov(t, o):
    """Clip-Cov (arXiv 2505.22617, section 4): a random few tokens of high covariance contribute no gradient."""
    loss = ppo_clip(t, o)
    candidates = t.covariance.masked_fill(t.clipped, -torch.inf)  # a clipped token has no gradient left to remove
    t.selected = select_clip_cov(candidates, t.mask, o.clip_cov_ratio, o.cov_low, o.cov_high, t.generator)
    return torch.where(t.selected, loss.detach(), loss)


def kl_cov(t, o):
    """KL-Cov (arXiv 2505.22617, section 4): the tokens of highest covariance are held where they were."""
    t.selected = select_kl_cov(t.covariance, t.mask, o.kl_cov_ratio)
    penalty = o.kl_cov_beta * t.log_ratio.abs()
    return -t.ratio * t.advantages + torch.where(t.selected, penalty, 0.0)


def entropy_bonus(t, o):
    """loss - c H (arXiv 1602.01783, section 4): entropy is rewarded for its own sake, at every token."""
    return ppo_clip(t, o) - o.entropy_coef * t.entropy


def kl_ref(t, o):
    """loss + beta k3, k3 = exp(d) - 1 - d, d = ref_logp - logp (arXiv 2402.03300, eq. 4): near the starting policy."""
    d = (t.ref_logp - t.logp).clamp(-20, 20)
    return ppo_clip(t, o) + o.kl_ref_beta * (d.exp() - 1 - d)


def top_entropy(t, fraction):
    """True at the round(fraction N) tokens of the mini-batch with the highest entropy when they were sampled."""
    n = int(t.mask.sum())
    chosen = torch.zeros(t.mask.numel(), dtype=torch.bool)
    chosen[t.old_entropy.masked_fill(~t.mask, -torch.inf).flatten().topk(round(fraction * n)).indices] = True
    return chosen.view(t.mask.shape)


def high_entropy(t, o):
    """Forking tokens only (arXiv 2506.01939, section 5): the loss of the fraction of highest entropy, averaged over these."""
    t.selected = t.kept = top_entropy(t, o.entropy_fraction)
    return ppo_clip(t, o)


def low_entropy(t, o):
    """The control (arXiv 2506.01939, section 5): all but those tokens, the fraction of lowest entropy."""
    t.selected = t.kept = t.mask & ~top_entropy(t, 1 - o.entropy_fraction)
    return ppo_clip(t, o)


METHODS = {
    "grpo": grpo,
    "clip_higher": clip_higher,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "entropy_bonus": entropy_bonus,
    "kl_ref": kl_ref,
    "high_entropy": high_entropy,
    "low_entropy": low_entropy,
}
NEED_REFERENCE = {"kl_ref", "prime"}  # methods and estimators that compare with the starting policy: it is kept in memory


def aggregate(token_loss, mask, count):
    """Sum of the losses of the tokens that count, over `count`, their number in the whole mini-batch: (B, T) -> scalar."""
    return token_loss.masked_fill(~mask.bool(), 0.0).sum() / max(int(count), 1)


def main():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    print("advantages of two groups of three completions with rewards", rewards.int().tolist())
    for name in ESTIMATORS:
        note = "   and those of its process rewards: python prime.py" if name == "prime" else ""
        print(f"{name:14}", [f"{a:+.2f}" for a in group_advantages(rewards, name).flatten()], note)

    o = SimpleNamespace(clip_low=0.2, clip_high=0.2, clip_cov_ratio=0.17, cov_low=0.1, cov_high=100.0, kl_cov_ratio=0.17,
                        kl_cov_beta=1.0, entropy_coef=0.1, kl_ref_beta=1.0, entropy_fraction=0.5)  # fmt: skip
    start = torch.tensor([[0.8, 0.5], [0.9, 0.1], [0.8, 0.3]])
    old = torch.tensor([[0.9, 0.6], [0.9, 0.05], [0.8, 0.3]])
    now = torch.tensor([[0.9, 0.75], [0.9, 0.04], [0.8, 0.3]])
    H = lambda p: -(p * p.log() + (1 - p) * (1 - p).log())  # a vocabulary of two
    advantages = group_advantages(rewards[:1])[0][:, None].expand(3, 2)
    mask = torch.ones(3, 2, dtype=torch.bool)
    print("\nthe first group, two tokens each, after an update: the push on the probability of each token")
    for name, values in (("probability", now), ("when sampled", old), ("at the start", start), ("advantage", advantages)):
        print(f"{name:14}", [f"{x:5.2f}" for x in values.flatten()])
    for name, method in METHODS.items():
        p = now.clone().requires_grad_()
        options = SimpleNamespace(**vars(o) | {"clip_high": 0.28 if name == "clip_higher" else 0.2})
        t = Tokens(p.log(), old.log(), advantages, mask, H(p), torch.Generator().manual_seed(0), H(old), start.log())
        aggregate(method(t, options), t.kept, t.kept.sum()).backward()
        if name == "grpo":
            print(f"{'covariance':14}", [f"{c:5.2f}" for c in t.covariance.flatten()], "\n")
        acted = "" if t.selected is None else f"   acts on token {t.selected.flatten().nonzero().flatten().tolist()}"
        print(f"{name:14}", [f"{0.0 - g:+.2f}" for g in p.grad.flatten()], acted)


if __name__ == "__main__":
    main()
