"""Covariance: what drives the entropy of a policy down, and which tokens carry it.

For a softmax policy whose logits change from z to z' (arXiv 2505.22617, section 3),

    H(pi') - H(pi)  ~=  -Cov_{a ~ pi}( log pi(a), z'(a) - z(a) )          to first order.

Under a policy gradient step the change of a logit follows the advantage A of its action:

    vanilla, step eta:   z' - z = eta pi(a) A(a)    =>   dH ~= -eta Cov( log pi(a), pi(a) A(a) )
    natural, step eta:   z' - z = eta A(a)          =>   dH ~= -eta Cov( log pi(a), A(a) )

So a likely action with a high advantage lowers the entropy, and a rare one with a high advantage raises it.
In training, over the N response tokens of a mini-batch, each token contributes

    Cov(y_i) = (log pi(y_i) - mean_j log pi(y_j)) (A(y_i) - mean_j A(y_j))

A few tokens contribute orders of magnitude more than the rest. Clip-Cov and KL-Cov act on these.

    python covariance.py      the theorem on one softmax, then who carries the covariance in a rollout batch
"""

import torch

from entropy import entropy


def predicted_entropy_change(logits, delta_logits):
    """-Cov_{a ~ pi}(log pi(a), dz(a)), the first-order change of entropy: (..., V), (..., V) -> (...,)."""
    logp = torch.log_softmax(logits, -1)
    p = logp.exp()
    centred = logp - (p * logp).sum(-1, keepdim=True)
    moved = delta_logits - (p * delta_logits).sum(-1, keepdim=True)
    return -(p * centred * moved).sum(-1)


def token_covariance(logp, advantages, mask):
    """Cov(y_i) of every response token (arXiv 2505.22617, section 4.1).

    logp, advantages, mask: (B, T), the whole mini-batch; the means are over all tokens that the mask counts.
    Returns (B, T), zero where the mask is 0.
    """
    mask = mask.bool()
    count = mask.sum().clamp(min=1)
    logp, advantages = logp.masked_fill(~mask, 0), advantages.masked_fill(~mask, 0)
    return ((logp - logp.sum() / count) * (advantages - advantages.sum() / count)).masked_fill(~mask, 0)


def select_clip_cov(cov, mask, ratio, low, high, generator=None):
    """Clip-Cov's choice: max(1, int(ratio N)) tokens, uniformly at random among those with low < Cov < high.

    cov, mask: (B, T) over the whole mini-batch, N = mask.sum(). If there are fewer candidates, all of them;
    with ratio 0, none. `generator` is a CPU generator of the caller's own, so that a run can be repeated and
    resumed. Returns bool (B, T).
    """
    candidates = mask.bool() & (cov > low) & (cov < high)
    noise = torch.rand(cov.shape, generator=generator).to(cov.device).masked_fill(~candidates, -1.0)
    return top(noise, min(quota(ratio, mask), int(candidates.sum())))


def select_kl_cov(cov, mask, ratio, low=0.0):
    """KL-Cov's choice: the max(1, int(ratio N)) tokens of highest covariance, as far as it is above `low`.

    cov, mask: (B, T) over the whole mini-batch, N = mask.sum(). low: at least 0. In a mini-batch without any
    signal all covariances are 0, and no token is chosen. Returns bool (B, T).
    """
    cov = cov.masked_fill(~mask.bool(), 0)
    return top(cov, min(quota(ratio, mask), int((cov > low).sum())))


def quota(ratio, mask):
    """How many tokens a ratio stands for: max(1, int(ratio N)), and 0 for ratio 0."""
    return max(1, int(ratio * int(mask.sum()))) if ratio > 0 else 0


def top(values, count):
    """True at the `count` greatest of the values: (B, T) -> bool (B, T)."""
    selected = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    selected[values.flatten().topk(count).indices] = True
    return selected.view(values.shape)


# ---------------------------------------------------------------- demonstration


def theorem():
    """Prints measured and predicted changes of entropy of a softmax of 8 actions, for falling steps."""
    z = torch.tensor([3.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0], dtype=torch.float64)
    p = torch.softmax(z, 0)
    print(f"1. One softmax of 8 actions, entropy {entropy(z):.3f} nats; one is rewarded; natural gradient\n")
    print(f"{'rewarded action':20} {'step':>8} {'measured dH':>12} {'-Cov':>9} {'error':>9}")
    for action, name in ((0, "likely"), (6, "rare")):
        reward = torch.eye(8, dtype=torch.float64)[action]
        advantages = reward - (p * reward).sum()  # an advantage has mean 0 under its policy
        for eta in (1.0, 0.5, 0.25, 0.125):
            measured = (entropy(z + eta * advantages) - entropy(z)).item()
            predicted = predicted_entropy_change(z, eta * advantages).item()
            print(f"{name + f', p = {p[action]:.2f}':20} {eta:8.3f} {measured:+12.4f} {predicted:+9.4f} "
                  f"{abs(measured - predicted):9.1e}")  # fmt: skip


def embedded_rollouts():
    """(logp, advantages, mask), each (512, T): 8 completions of 64 problems by the embedded policy."""
    from arithmetic import problems
    from entropy import score
    from reward import grade
    from rollout import TINY, load_policy, sample

    model, tokenizer, eos_ids = load_policy(TINY)
    prompts, answers = zip(*problems("train", 64))
    ids = tokenizer(list(prompts))["input_ids"]
    groups = sample(model, ids, 8, 40, 1.0, eos_ids, torch.Generator().manual_seed(0))
    texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in groups]
    r = torch.tensor([[grade(text, answer) for text in group] for group, answer in zip(texts, answers)])
    advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
    completions = [completion for group in groups for completion in group]
    with torch.no_grad():
        logp, _ = score(model, [prompt for prompt in ids for _ in range(8)], completions)
    mask = torch.arange(logp.shape[1]) < torch.tensor([len(c) for c in completions])[:, None]
    return logp, advantages.view(-1, 1) * mask, mask


def kinds(cov, logp, advantages, mask):
    """Sum of Cov(y_i) and number of tokens: {"likely, right": (sum, count), ...}, four kinds.

    cov, logp, advantages, mask: (B, T). Likely: log-prob at least its mean. Right: A > 0; wrong: A < 0.
    """
    likely, found = logp >= logp[mask].mean(), {}
    for name, probable in (("likely", likely), ("rare", ~likely)):
        for answer, signed in (("right", advantages > 0), ("wrong", advantages < 0)):
            of = mask & probable & signed
            found[f"{name}, {answer}"] = (cov[of].sum().item(), int(of.sum()))
    return found


def carriers(logp, advantages, mask):
    """Prints who carries the covariance."""
    cov = token_covariance(logp, advantages, mask)
    found = kinds(cov, logp, advantages, mask)
    print(f"\n{'sum of Cov(y_i)':20} {'right answers':>15} {'wrong answers':>15}")
    for name in ("likely", "rare"):
        sums = [found[f"{name}, {answer}"][0] for answer in ("right", "wrong")]
        print(f"{name + ' tokens':20} {sums[0]:+15.0f} {sums[1]:+15.0f}")
    selected = select_kl_cov(cov, mask, 0.01)
    print(f"The top 1% of the tokens hold {cov[selected].sum() / cov.sum():.0%} of the net sum, "
          f"{cov.sum():.0f}. Their median probability\nis {logp[selected].exp().median():.2f}, and "
          f"{(advantages[selected] < 0).float().mean():.0%} of them stand in wrong answers.")  # fmt: skip
    wrong = mask & (advantages < 0)
    rarest = top((-logp).masked_fill(~wrong, -torch.inf), int(selected.sum()))
    hard = wrong & (advantages > -0.6)  # -0.54 in a group with 2 of 8 right, -0.72 with 3
    share = [f"{hard[tokens].float().mean():.0%}" for tokens in (selected, rarest)]
    print(f"From hard groups (1 or 2 of 8 right) come {share[0]} of them. Of as many tokens, chosen as the\n"
          f"rarest of wrong answers, {share[1]} do: there |A| is small, and with it the covariance.")


def main():
    theorem()
    print("\nLikely: entropy falls. Rare: it rises. Half of a small step leaves about 1/4 of the error.")
    print("\n2. The first rollout batch of the embedded policy")
    carriers(*embedded_rollouts())
    print("So the entropy falls mostly because rare tokens of wrong answers die out.")


if __name__ == "__main__":
    main()
