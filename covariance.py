"""Covariance: what drives the entropy of a policy down, and which tokens carry it.

For a softmax policy whose logits change from z to z' (arXiv 2505.22617, section 3),

    H(pi') - H(pi)  ~=  -Cov_{a ~ pi}( log pi(a), z'(a) - z(a) )          to first order.

Under a policy gradient step the change of a logit follows the advantage A of its action:

    vanilla, step eta:   z' - z = eta pi(a) A(a)    =>   dH ~= -eta Cov( log pi(a), pi(a) A(a) )
    natural, step eta:   z' - z = eta A(a)          =>   dH ~= -eta Cov( log pi(a), A(a) )

So a likely action with a high advantage lowers the entropy, and a rare one with a high advantage raises it.
In training, over the N response tokens of a mini-batch, each token contributes

    Cov(y_i) = (log pi(y_i) - mean_j log pi(y_j)) (A(y_i) - mean_j A(y_j))

Few tokens contribute orders of magnitude more than the rest. Clip-Cov and KL-Cov act on these.

    python covariance.py      the theorem on a softmax of 8 actions: a table and figures/covariance.png
"""

import argparse
from pathlib import Path

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


def select_kl_cov(cov, mask, ratio):
    """KL-Cov's choice: the max(1, int(ratio N)) tokens of highest covariance, as far as it is positive.

    cov, mask: (B, T) over the whole mini-batch, N = mask.sum(). In a mini-batch without any signal all
    covariances are 0, and no token is chosen. Returns bool (B, T).
    """
    cov = cov.masked_fill(~mask.bool(), 0)
    return top(cov, min(quota(ratio, mask), int((cov > 0).sum())))


def quota(ratio, mask):
    """How many tokens a ratio stands for: max(1, int(ratio N)), and 0 for ratio 0."""
    return max(1, int(ratio * int(mask.sum()))) if ratio > 0 else 0


def top(values, count):
    """True at the `count` greatest of the values: (B, T) -> bool (B, T)."""
    selected = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    selected[values.flatten().topk(count).indices] = True
    return selected.view(values.shape)


# ---------------------------------------------------------------- demonstration


def steps_of(logits, direction, sizes):
    """[(eta, measured dH, predicted dH), ...] of a policy (V,) whose logits move by eta x direction (V,)."""
    rows = []
    for eta in sizes:
        measured = entropy(logits + eta * direction) - entropy(logits)
        rows.append((eta, measured.item(), predicted_entropy_change(logits, eta * direction).item()))
    return rows


def draw(rows, file):
    """Predicted against measured dH, and the error against the step on two logarithmic axes."""
    from matplotlib.figure import Figure  # here, so that training does not import it

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, points), colour in zip(rows.items(), ("#0072B2", "#D55E00")):
        eta, measured, predicted = map(list, zip(*points))
        left.plot(predicted, measured, "o-", color=colour, label=name)
        right.loglog(eta, [abs(m - p) for m, p in zip(measured, predicted)], "o-", color=colour, label=name)
    left.axline((0, 0), slope=1, color="#999999", zorder=0)
    left.set(xlabel="predicted: -Cov(log pi, dz), nats", ylabel="measured change of entropy, nats")
    left.set_title("The prediction holds for small steps (grey: exact)")
    right.set(xlabel="step eta", ylabel="error, nats", title="Half the step, a quarter of the error")
    left.legend(frameon=False)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description="The theorem on a softmax of 8 actions.")
    parser.add_argument("--out", default="figures/covariance.png", metavar="FILE")
    o = parser.parse_args()
    z = torch.tensor([3.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0], dtype=torch.float64)
    p = torch.softmax(z, 0)
    likely, rare = torch.eye(8, dtype=torch.float64)[[0, 6]]
    rows = {}
    for name, reward in (("the likely action is rewarded", likely), ("a rare action is rewarded", rare)):
        advantages = reward - (p * reward).sum()  # an advantage has mean 0 under its policy
        rows[name] = steps_of(z, advantages, [2.0**-i for i in range(6)])
    print("natural policy gradient on a softmax of 8 actions, entropy", f"{entropy(z):.3f} nats")
    print(f"the likely action has p = {p[0]:.2f}, the rare one p = {p[6]:.2f}\n")
    print(f"{'':30} {'step':>8} {'measured dH':>12} {'-Cov':>9} {'error':>9}")
    for name, points in rows.items():
        for eta, measured, predicted in points:
            error = abs(measured - predicted)
            print(f"{name:30} {eta:8.5f} {measured:+12.4f} {predicted:+9.4f} {error:9.1e}")
    try:
        draw(rows, o.out)
    except OSError as error:
        parser.exit(2, f"covariance.py: error: argument --out: {o.out}: {error.strerror}\n")
    print(f"\n{o.out}\nRewarding what is likely lowers the entropy, rewarding what is rare raises it,")
    print("and -Cov(log pi, dz) predicts by how much: half the step, a quarter of the error.")


if __name__ == "__main__":
    main()
