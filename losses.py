"""Losses: what is optimised. Advantages from rewards, a loss for each token, their mean over a mini-batch.

With ratio_i = exp(logp_i - old_logp_i), A_i the advantage of token i, H_i its entropy, N the number of tokens
that count,

    L = 1/N sum_i loss_i        N over the whole mini-batch: all micro-batches, all processes

    grpo           loss_i = -min(ratio_i A_i, clip(ratio_i, 1 - e_low, 1 + e_high) A_i)    1707.06347, eq. 7
    clip_higher    the same with e_high above e_low: 0.2 / 0.28                            2503.14476, eq. 10
    clip_cov       the same, but a few tokens of high covariance get no gradient           2505.22617, sec. 4
    kl_cov         -ratio_i A_i, + beta |logp_i - old_logp_i| where covariance is highest  ibid.
    entropy_bonus  grpo's loss_i - c H_i                                                   1602.01783, sec. 4
    kl_ref         grpo's loss_i + beta k3_i, k3 estimating KL(policy || starting policy)  2402.03300, eq. 4
    high_entropy   grpo's loss_i, only the 20% of tokens with the highest entropy          2506.01939, sec. 5
    low_entropy    grpo's loss_i, only the other 80%                                       ibid.
    cw_grpo        grpo's loss_i, A_i smaller where |covariance| is large                  2605.11538
    opefo          grpo's loss_i, weighted so that changes of the entropy cancel           2605.11491
    adaptive_entropy  entropy_bonus, with c rising while the entropy is below a target     2505.22312
    entrocraft     grpo's loss_i, only right or only wrong answers outside of a band of H  2604.26326

A method is a function of the mini-batch's tokens and the options; METHODS names it, and it goes with any
estimator of the advantage. It sees log-probs, never a model, so the same few lines serve any number of
micro-batches and processes.

    python losses.py      how each method pushes likely and rare tokens of right and wrong answers
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from covariance import select_clip_cov, select_kl_cov, token_covariance, top

# ---------------------------------------------------------------- advantages: how much better than expected


def grpo_advantages(r, lengths, eps):
    """(r - mean) / (std + eps), both of the group (arXiv 2402.03300, section 4.1)."""
    return (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)


def dr_grpo_advantages(r, lengths, eps):
    """r - mean of the group (Dr. GRPO, arXiv 2503.20783): std favours problems nearly always or never solved.

    Its other half, one divisor for completions of any length, is in `aggregate`, for all estimators.
    """
    return r - r.mean(1, keepdim=True)


def rloo_advantages(r, lengths, eps):
    """r - mean of the others in the group (RLOO, arXiv 2402.14740). Equals dr_grpo's times G / (G - 1)."""
    G = r.shape[1]
    return r - (r.sum(1, keepdim=True) - r) / (G - 1)


def reinforce_pp_advantages(r, lengths, eps):
    """(r - mean) / std over all tokens of all groups, the baseline (REINFORCE++, arXiv 2501.03262).

    Without discount and without a KL term in the reward, the return of each token is its completion's reward,
    so a completion counts by its length (P, G) in mean and std.
    """
    w = lengths / lengths.sum()
    mean = (w * r).sum()
    return (r - mean) / ((w * (r - mean) ** 2).sum().sqrt() + eps)


ESTIMATORS = {
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce_pp": reinforce_pp_advantages,
    "prime": rloo_advantages,  # of the outcome; prime.py adds that of its process rewards, token by token
}
COMPARE_BATCH = {"reinforce_pp"}  # the others compare only the samples of a group with each other


def group_advantages(rewards, estimator="grpo", eps=1e-6, lengths=None):
    """Advantage of each of the G samples of P prompts: (P, G) -> (P, G). lengths (P, G): tokens of each,
    default all alike.

    Where all rewards that are compared are equal the advantage is exactly 0. This is detected by max == min:
    rounding would turn a difference of nothing into an advantage.
    Raises ValueError for a group of one if only the group is compared, and for an unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}, one of: {', '.join(ESTIMATORS)}")
    if rewards.shape[1] < 2 and estimator not in COMPARE_BATCH:
        raise ValueError("a group needs at least two samples: the advantage compares them with each other")
    compared = (0, 1) if estimator in COMPARE_BATCH else 1
    equal = rewards.amax(compared, keepdim=True) == rewards.amin(compared, keepdim=True)
    lengths = torch.ones_like(rewards) if lengths is None else lengths.to(rewards.dtype)
    return ESTIMATORS[estimator](rewards, lengths, eps).masked_fill(equal, 0.0)


# ---------------------------------------------------------------- what a method is given, and what it returns


@dataclass
class Tokens:
    """The tokens of one whole mini-batch: every tensor is (B, T), B completions of up to T tokens."""

    logp: torch.Tensor  # log-prob under the current policy; the loss is differentiated with respect to it
    old_logp: torch.Tensor  # log-prob under the policy that sampled
    advantages: torch.Tensor
    mask: torch.Tensor  # bool: which entries are tokens
    entropy: torch.Tensor  # nats, current policy; the loss may be differentiated with respect to it
    generator: torch.Generator | None = None  # for methods that choose at random
    old_entropy: torch.Tensor | None = None  # nats, the policy that sampled
    ref_logp: torch.Tensor | None = None  # log-prob under the starting policy, for those that NEED_REFERENCE
    strength: float = 1.0  # what --anneal leaves of the method's own strength at this step, from 1 down to 0
    memory: dict = field(default_factory=dict)  # what a method remembers; saved with the run

    def __post_init__(self):
        self.log_ratio = (self.logp - self.old_logp).clamp(-20, 20)  # keeps exp() finite
        self.ratio = self.log_ratio.exp()
        self.covariance = token_covariance(self.logp.detach(), self.advantages, self.mask)


@dataclass
class Loss:
    """What a method returns: the loss of each token and three sets of tokens, all (B, T)."""

    token_loss: torch.Tensor
    clipped: torch.Tensor | None = None  # bool: PPO's clip removes their gradient
    selected: torch.Tensor | None = None  # bool: what the method acted on
    kept: torch.Tensor | None = None  # bool: what the mean is over, if not all tokens


# ---------------------------------------------------------------- methods: (Tokens, options) -> Loss


def grpo(t, o):
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (arXiv 2402.03300, eq. 3, without its KL).

    The ratio corrects for the updates since sampling. The clip removes the gradient of a token whose
    probability has already moved far enough in the direction of its advantage.
    """
    free = t.ratio * t.advantages
    bounded = t.ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * t.advantages
    return Loss(-torch.min(free, bounded), clipped=(bounded < free).detach() & t.mask)


def clip_higher(t, o):
    """Clip-Higher (DAPO, arXiv 2503.14476, eq. 10): grpo with more room upwards, 0.28, for rare tokens."""
    return grpo(t, o)


def clip_cov(t, o):
    """Clip-Cov (arXiv 2505.22617, section 4): a random few tokens of high covariance get no gradient."""
    ppo = grpo(t, o)
    cov = t.covariance.masked_fill(ppo.clipped, -torch.inf)  # a clipped token has no gradient left to remove
    selected = select_clip_cov(cov, t.mask, o.clip_cov_ratio * t.strength, o.cov_low, o.cov_high, t.generator)
    token_loss = torch.where(selected, ppo.token_loss.detach(), ppo.token_loss)
    return replace(ppo, token_loss=token_loss, selected=selected)


def kl_cov(t, o):
    """KL-Cov (arXiv 2505.22617, section 4): the tokens of highest covariance are pulled back.

    These are rare tokens of wrong answers. The policy gradient pushes all such tokens down with |A|, the
    penalty pushes at most k N of them up with beta. If beta is above |A| the two balance at a share of
    k beta / |A| of all tokens: so many errors stay. --anneal lowers beta, and with it this floor, to 0.

    Once fewer than k N tokens are rare and wrong, the next in covariance are ordinary tokens, also of right
    answers. --kl-cov-low, which is not in the paper, leaves them alone.
    """
    beta = o.kl_cov_beta * t.strength
    selected = select_kl_cov(t.covariance, t.mask, o.kl_cov_ratio if beta > 0 else 0, o.kl_cov_low)
    penalty = torch.where(selected, beta * t.log_ratio.abs(), 0.0)
    return Loss(-t.ratio * t.advantages + penalty, selected=selected)


def entropy_bonus(t, o):
    """loss - c H (arXiv 1602.01783, section 4): entropy is rewarded for its own sake, at every token."""
    ppo = grpo(t, o)
    return replace(ppo, token_loss=ppo.token_loss - o.entropy_coef * t.strength * t.entropy)


def kl_ref(t, o):
    """loss + beta k3, k3 = exp(d) - 1 - d, d = ref_logp - logp (arXiv 2402.03300, eq. 4)."""
    ppo, d = grpo(t, o), (t.ref_logp - t.logp).clamp(-20, 20)
    return replace(ppo, token_loss=ppo.token_loss + o.kl_ref_beta * (d.exp() - 1 - d))


def top_entropy(t, fraction):
    """True at the round(fraction N) tokens that had the highest entropy when they were sampled."""
    return top(t.old_entropy.masked_fill(~t.mask, -torch.inf), round(fraction * int(t.mask.sum())))


def high_entropy(t, o):
    """Forking tokens only (arXiv 2506.01939, section 5): those of highest entropy."""
    kept = top_entropy(t, o.entropy_fraction)
    return replace(grpo(t, o), selected=kept, kept=kept)


def low_entropy(t, o):
    """The control (arXiv 2506.01939, section 5): all other tokens, those of lowest entropy."""
    kept = t.mask & ~top_entropy(t, 1 - o.entropy_fraction)
    return replace(grpo(t, o), selected=kept, kept=kept)


def mean_entropy(t):
    """The mean entropy, in nats, of the mini-batch's tokens under the policy that sampled."""
    return t.old_entropy[t.mask].mean().item()


def cw_grpo(t, o):
    """CW-GRPO (arXiv 2605.11538): A_i w_i N / sum w, with w_i = exp(-Cov_i^2 / (2 Var(Cov))).

    Taken from a public summary of the paper, as is opefo.
    """
    variance = t.covariance[t.mask].var(correction=0).clamp(min=1e-12)
    log_w = (-t.covariance.square() / (2 * variance)).masked_fill(~t.mask, -torch.inf)
    share = torch.softmax(log_w.flatten(), 0).view(log_w.shape)  # w_i / sum w
    return grpo(replace(t, advantages=t.advantages * share * t.mask.sum()), o)


def opefo(t, o):
    """OPEFO (arXiv 2605.11491): tokens that raise the entropy x (1 + l), those that lower it x (1 - l).

    Token i changes it by dH_i ~= -A_i p_i (log p_i + H_i), counting the move of its own logit alone; with D+
    and D- the sums of the positive and of the negative ones, l = (|D-| - D+) / (|D-| + D+) makes them cancel.
    """
    logp, H = t.logp.detach().clamp(-50, 0), t.entropy.detach()
    change = (-t.advantages * logp.exp() * (logp + H)).masked_fill(~t.mask, 0)
    balance = t.strength * -change.sum() / change.abs().sum().clamp(min=1e-12)
    ppo = grpo(t, o)
    return replace(ppo, token_loss=ppo.token_loss * (1 + balance * change.sign()))


def adaptive_entropy(t, o):
    """Skywork-OR1's coefficient (arXiv 2505.22312): loss - alpha H, only while the entropy is below a target.

    alpha begins at 0. Each update moves it by 1/50 of its bound, up if the mini-batch's entropy is below
    the target, else down.
    """
    low = mean_entropy(t) < o.entropy_target * t.strength
    alpha = t.memory.get("alpha", 0.0) + (o.entropy_coef if low else -o.entropy_coef) / 50
    t.memory["alpha"] = alpha = min(max(alpha, 0.0), o.entropy_coef)
    ppo = grpo(t, o)
    return replace(ppo, token_loss=ppo.token_loss - alpha * low * t.entropy)


def entrocraft(t, o):
    """Entrocraft (arXiv 2604.26326): entropy above the target +10%: only A > 0 counts; below -10%: A < 0.

    --anneal lowers the target; once it is 0, only right answers count.
    """
    H, target, kept = mean_entropy(t), o.entropy_target * t.strength, t.mask
    if H > 1.1 * target:
        kept = kept & (t.advantages > 0)
    elif H < 0.9 * target:
        kept = kept & (t.advantages < 0)
    return replace(grpo(t, o), selected=kept, kept=kept)


METHODS = {method.__name__: method for method in (
    grpo, clip_higher, clip_cov, kl_cov, entropy_bonus, kl_ref, high_entropy, low_entropy, cw_grpo, opefo,
    adaptive_entropy, entrocraft,
)}  # fmt: skip
NEED_REFERENCE = {"kl_ref", "prime"}  # they compare with the starting policy, which stays in memory


def aggregate(token_loss, mask, count):
    """Sum of the losses where the mask is 1, over `count`, that of the whole mini-batch: (B, T) -> scalar."""
    return token_loss.masked_fill(~mask.bool(), 0.0).sum() / max(int(count), 1)


# ---------------------------------------------------------------- demonstration


def example(logp):
    """A right and a wrong answer, each with a likely and a rare token, after an update. logp: (2, 2)."""
    old = torch.tensor([[0.90, 0.05], [0.90, 0.05]]).log()
    advantages = group_advantages(torch.tensor([[1.0, 0.0]]))[0][:, None].expand(2, 2)
    p = logp.exp()
    H = -(p * p.log() + (1 - p) * (1 - p).log())  # as if there were one other choice
    return Tokens(logp, old, advantages, torch.ones(2, 2, dtype=torch.bool), H,
                  generator=torch.Generator().manual_seed(0), ref_logp=old, memory={"alpha": 0.1},
                  old_entropy=torch.tensor([[0.1, 1.0], [0.1, 1.0]]))  # fmt: skip


def main():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    print("advantages of two groups of three completions with rewards", rewards.int().tolist())
    for name in ESTIMATORS:
        print(f"{name:17}", *(f"{a:+8.2f}" for a in group_advantages(rewards, name).flatten()))

    o = SimpleNamespace(clip_low=0.2, clip_high=0.2, clip_cov_ratio=0.25, cov_low=1.1, cov_high=100.0,
                        kl_cov_ratio=0.25, kl_cov_beta=3.0, kl_cov_low=1.0, entropy_coef=0.1, kl_ref_beta=1.0,
                        entropy_fraction=0.5, entropy_target=0.7)  # fmt: skip
    now = torch.tensor([[0.92, 0.062], [0.88, 0.042]]).log()
    t = example(now)
    print("\nhow strongly each method pushes the log-prob of a token up or down, after an update")
    kinds = "likely, right", "rare, right", "likely, wrong", "rare, wrong"
    print(f"{'':17}", *(f"{kind:>13}" for kind in kinds))
    print(f"{'p when sampled':17}", *(f"{p:13.3f}" for p in t.old_logp.exp().flatten()))
    print(f"{'covariance':17}", *(f"{c:+13.2f}" for c in t.covariance.flatten()))
    for name, method in METHODS.items():
        logp = now.clone().requires_grad_()
        o.clip_high = {"clip_higher": 0.28, "clip_cov": 1.0}.get(name, 0.2)
        loss = method(t := example(logp), o)
        kept = t.mask if loss.kept is None else loss.kept
        aggregate(loss.token_loss, kept, 1).backward()
        print(f"{name:17}", *(f"{0.0 - g:+13.2f}" for g in logp.grad.flatten()))
    print("(The rare token of the right answer has grown by 24%: PPO's clip of 20% stops it, 28% does not.)")
    print("The last token has the highest covariance: Clip-Cov leaves it alone, KL-Cov pulls it back up.")


if __name__ == "__main__":
    main()
