"""Covariance: what drives the entropy of a policy down, and which tokens carry it.

For a softmax policy whose logits change from z to z' (arXiv 2505.22617, section 3),

    H(pi') - H(pi)  ~=  -Cov_{a ~ pi}( log pi(a), z'(a) - z(a) )          to first order.

Under a policy gradient step the change of a logit follows the advantage A of its action:

    vanilla, step eta:   z' - z = eta pi(a) A(a)    =>   dH ~= -eta Cov( log pi(a), pi(a) A(a) )
    natural, step eta:   z' - z = eta A(a)          =>   dH ~= -eta Cov( log pi(a), A(a) )

A likely action with a high advantage lowers the entropy, a rare one with a high advantage raises it.
In training, over the N response tokens of a mini-batch, each token contributes

    Cov(y_i) = (log pi(y_i) - mean_j log pi(y_j)) (A(y_i) - mean_j A(y_j))

and a few tokens contribute orders of magnitude more than the rest: Clip-Cov and KL-Cov act on those.

    python covariance.py      the theorem on a tabular softmax: prediction against measurement
"""

import torch

from entropy import entropy


def predicted_entropy_change(logits, delta_logits):
    """-Cov_{a ~ pi}(log pi(a), delta z(a)), the first-order change of entropy: (..., V), (..., V) -> (...,)."""
    logp = torch.log_softmax(logits, -1)
    p = logp.exp()
    mean = lambda x: (p * x).sum(-1, keepdim=True)  # expectation under pi
    return -mean((logp - mean(logp)) * (delta_logits - mean(delta_logits)))[..., 0]


def token_covariance(logp, advantages, mask):
    """Cov(y_i) of every response token; means over all tokens that the mask counts.

    logp, advantages, mask: (B, T), the whole mini-batch, however it is computed. Returns (B, T), zero where mask is 0.
    """
    mask = mask.bool()
    count = mask.sum().clamp(min=1)
    centred = lambda x: (x - x.masked_fill(~mask, 0).sum() / count).masked_fill(~mask, 0)
    return centred(logp) * centred(advantages)


def select_clip_cov(cov, mask, ratio, low, high, generator=None):
    """Clip-Cov's choice: max(1, int(ratio N)) tokens, uniformly at random among those with low < Cov < high.

    cov, mask: (B, T) over the whole mini-batch, N = mask.sum(). All candidates if there are fewer, none if
    there is none. `generator` is a CPU generator of the caller's own, so that a run can be repeated and resumed.
    Returns bool (B, T).
    """
    candidates = mask.bool() & (cov > low) & (cov < high)
    count = min(max(1, int(ratio * mask.sum().item())), int(candidates.sum()))
    noise = torch.rand(cov.shape, generator=generator).to(cov.device).masked_fill(~candidates, -1.0)
    return _top(noise, count)


def select_kl_cov(cov, mask, ratio):
    """KL-Cov's choice: the max(1, int(ratio N)) tokens of highest covariance.

    cov, mask: (B, T) over the whole mini-batch, N = mask.sum(). Returns bool (B, T).
    """
    n = int(mask.sum())
    return _top(cov.masked_fill(~mask.bool(), -torch.inf), min(max(1, int(ratio * n)), n))


def _top(values, count):
    """True at the `count` greatest of `values`."""
    selected = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    selected[values.flatten().topk(count).indices] = True
    return selected.view(values.shape)


def main():
    torch.manual_seed(0)
    z = torch.randn(8, dtype=torch.float64) * 2
    A = torch.randn(8, dtype=torch.float64)
    print("tabular softmax with 8 actions: measured change of entropy against -Cov(log pi, dz)\n")
    print(f"{'gradient':9} {'step':>8} {'measured':>12} {'predicted':>12} {'error':>10}   error / step^2")
    for name, direction in (("vanilla", torch.softmax(z, 0) * A), ("natural", A)):
        for eta in (1.0, 0.1, 0.01, 0.001):
            dz = eta * direction
            measured = entropy(z + dz) - entropy(z)
            predicted = predicted_entropy_change(z, dz)
            error = (measured - predicted).abs()
            print(f"{name:9} {eta:8} {measured:12.3e} {predicted:12.3e} {error:10.1e}   {error / eta**2:.4f}")
    print("\nThe error falls as the square of the step: the theorem is exact to first order.")


if __name__ == "__main__":
    main()
