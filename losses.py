"""Losses: what is optimised. Advantages from rewards, a loss for each token, their mean over a mini-batch.

With ratio_i = exp(logp_i - old_logp_i), A_i the advantage of token i and N the number of tokens that count,

    L = 1/N sum_i loss_i        N over the whole mini-batch: all micro-batches, all processes

    grpo       loss_i = -min( ratio_i A_i, clip(ratio_i, 1 - e_low, 1 + e_high) A_i )         PPO's clip
    clip_cov   the same, but a few tokens of high covariance contribute no gradient           2505.22617, section 4
    kl_cov     -ratio_i A_i, and + beta |logp_i - old_logp_i| on the tokens of highest covariance      ibid.

A method is a function of the mini-batch's tokens and the options; METHODS names it. It sees log-probs,
never a model, so the same few lines hold for any number of micro-batches and processes.

    python losses.py      which token's probability each method would raise or lower, on one small mini-batch
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from covariance import select_clip_cov, select_kl_cov, token_covariance


def group_advantages(rewards, estimator="grpo", eps=1e-6):
    """Advantage of each of the G samples of P prompts: (P, G) -> (P, G).

    grpo: (r - mean) / (std + eps) within the group (arXiv 2402.03300). A group with equal rewards has
    advantage exactly 0: detected by max == min, since rounding would make something of nothing.
    Raises ValueError for a group of one (nothing to compare with) and for an unknown estimator.
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least two samples: the advantage compares them with each other")
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}, one of: {', '.join(ESTIMATORS)}")
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return ESTIMATORS[estimator](rewards, eps).masked_fill(equal, 0.0)


def _grpo_advantages(rewards, eps):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)


ESTIMATORS = {"grpo": _grpo_advantages}


@dataclass
class Tokens:
    """The tokens of one mini-batch, whole: every tensor (B, T), B completions of up to T tokens."""

    logp: torch.Tensor  # log-prob under the current policy; the loss is differentiated with respect to it
    old_logp: torch.Tensor  # log-prob under the policy that sampled
    advantages: torch.Tensor
    mask: torch.Tensor  # bool: which entries are tokens
    entropy: torch.Tensor  # nats, current policy; the loss may be differentiated with respect to it
    generator: torch.Generator | None = None  # for methods that choose at random
    selected: torch.Tensor | None = None  # set by a method: the tokens it acted on
    clipped: torch.Tensor | None = None  # set by a method: the tokens whose gradient PPO's clip removes

    def __post_init__(self):
        self.log_ratio = (self.logp - self.old_logp).clamp(-20, 20)  # exp(20) is beyond any use, not beyond fp32
        self.ratio = self.log_ratio.exp()
        self.covariance = token_covariance(self.logp.detach(), self.advantages, self.mask)


def ppo_clip(t, o):
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and which tokens the clip silences (arXiv 1707.06347, eq. 7)."""
    free = t.ratio * t.advantages
    bounded = t.ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * t.advantages
    t.clipped = (bounded < free).detach() & t.mask
    return -torch.min(free, bounded)


def grpo(t, o):
    """PPO's clipped loss with group advantages (arXiv 2402.03300, eq. 3, without its KL term)."""
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


METHODS = {"grpo": grpo, "clip_cov": clip_cov, "kl_cov": kl_cov}


def aggregate(token_loss, mask, count):
    """Sum of the losses of the tokens that count, over `count`, their number in the whole mini-batch: (B, T) -> scalar."""
    return token_loss.masked_fill(~mask.bool(), 0.0).sum() / max(int(count), 1)


def main():
    o = SimpleNamespace(clip_low=0.2, clip_high=0.2, clip_cov_ratio=0.17, cov_low=0.1, cov_high=100.0,
                        kl_cov_ratio=0.17, kl_cov_beta=1.0)  # fmt: skip
    old = torch.tensor([[0.9, 0.6], [0.9, 0.05], [0.8, 0.3]]).log()
    now = torch.tensor([[0.9, 0.8], [0.9, 0.04], [0.8, 0.3]]).log()
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0]]))[0][:, None].expand(3, 2)
    print("three completions of two tokens; only the first was right")
    print("advantage  ", [f"{a:+.2f}" for a in advantages.flatten()])
    for name, method in METHODS.items():
        logp = now.clone().requires_grad_()
        mask = torch.ones(3, 2, dtype=torch.bool)
        t = Tokens(logp, old, advantages, mask, entropy=torch.zeros(3, 2), generator=torch.Generator().manual_seed(0))
        aggregate(method(t, o), mask, mask.sum()).backward()
        if name == "grpo":
            print("covariance ", [f"{c:+.2f}" for c in t.covariance.flatten()])
        acted = "" if t.selected is None else f"   acts on token {t.selected.flatten().nonzero().flatten().tolist()}"
        print(f"{name:11}", [f"{-g:+.2f}" for g in logp.grad.flatten()], f" = push on each log-prob{acted}")


if __name__ == "__main__":
    main()
