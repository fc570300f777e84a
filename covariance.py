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

    python covariance.py      the theorem on a tabular softmax: prediction against measurement, as a table and a picture
                              (figures/covariance.png, or --out FILE); on a language model: theorem.py
"""

import argparse
from pathlib import Path

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


def errors(logits, advantages, steps):
    """Measured and predicted dH of one policy (V,) for both gradients: {name: [(step, measured, predicted), ...]}."""
    directions = {"vanilla": torch.softmax(logits, -1) * advantages, "natural": advantages}
    return {
        name: [(eta, (entropy(logits + eta * dz) - entropy(logits)).item(), predicted_entropy_change(logits, eta * dz).item()) for eta in steps]
        for name, dz in directions.items()
    }


def draw(rows, file):
    """Left: measured against predicted change. Right: the error against the step, on two log axes, where a square is a line of slope 2."""
    from matplotlib.figure import Figure  # here, for training needs no picture of this

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, points), colour in zip(rows.items(), ("#0072B2", "#D55E00")):
        eta, measured, predicted = map(list, zip(*points))
        left.plot(predicted, measured, "o-", color=colour, label=f"{name} policy gradient")
        right.loglog(eta, [abs(m - p) for m, p in zip(measured, predicted)], "o-", color=colour)
        right.loglog(eta, [abs(p) for p in predicted], ":", color=colour)
    left.axline((0, 0), slope=1, color="#999999", zorder=0)
    left.set(xlabel="predicted: -Cov(log pi, dz), nats", ylabel="measured change of entropy, nats", title="the theorem is the grey line")
    right.set(xlabel="step", ylabel="nats", title="error, slope 2 (dotted: the change, slope 1)")
    left.legend(frameon=False)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="figures/covariance.png", metavar="FILE", help="the picture (default figures/covariance.png)")
    o = parser.parse_args()
    torch.manual_seed(0)
    z = torch.randn(8, dtype=torch.float64) * 2
    A = torch.randn(8, dtype=torch.float64)
    A = A - (torch.softmax(z, 0) * A).sum()  # an advantage has mean 0 under its policy
    rows = errors(z, A, [2.0**-i for i in range(11)])
    print("tabular softmax with 8 actions: measured change of entropy against -Cov(log pi, dz); each step is half the one before\n")
    print(f"{'gradient':9} {'step':>8} {'measured':>12} {'predicted':>12} {'error':>10} {'of it before':>13}")
    for name, points in rows.items():
        before = None
        for eta, measured, predicted in points:
            error = abs(measured - predicted)
            print(f"{name:9} {eta:8.5f} {measured:12.3e} {predicted:12.3e} {error:10.1e} {f'1/{before / error:.2f}' if before else '':>13}")
            before = error
    print("\nHalf the step, a quarter of the error: it falls as the square, and the theorem is exact to first order.")
    try:
        draw(rows, o.out)
    except OSError as error:
        parser.exit(2, f"covariance.py: error: argument --out: {o.out} cannot be written to: {error.strerror}\n")
    print(o.out)


if __name__ == "__main__":
    main()
