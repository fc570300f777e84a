"""Entropy: how undecided a policy is, token by token, and what that says about its accuracy.

    H(P)      = -sum_a p(a) log p(a)              entropy, in nats
    H(P, Q)   = -sum_a p(a) log q(a)              cross-entropy
    KL(P||Q)  =  sum_a p(a) log(p(a) / q(a))      so H(P, Q) = H(P) + KL(P||Q)

The entropy of a policy at a token is that of the full softmax, not -log p of the token that was sampled.
Along a run of reinforcement learning, accuracy R and policy entropy H obey, by arXiv 2505.22617 section 2,
the law

    R = -a exp(H) + b

so accuracy is bought with entropy, and the ceiling, reached when H = 0, is -a + b.

    python entropy.py       entropy of a few distributions; the law, fitted to points that obey it
"""

import math
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint


def entropy(logits):
    """H(P) of softmax(logits) over the last dimension, in nats: (..., V) -> (...,)."""
    return entropy_of(torch.log_softmax(logits, -1))


def entropy_of(logp):
    """The same from log-probabilities (..., V).

    0 log 0 = 0, in the gradient too: below the clamp, p is 0 in every precision.
    """
    return (logp.exp() * -logp.clamp(min=-1e4)).sum(-1)


def cross_entropy(p_logits, q_logits):
    """H(P, Q) = -sum p log q over the last dimension, in nats: (..., V), (..., V) -> (...,)."""
    p, logq = torch.softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    return -torch.where(p == 0, 0.0, p * logq).sum(-1)


def kl_divergence(p_logits, q_logits):
    """KL(P || Q) = sum p log(p / q) over the last dimension, in nats: (..., V), (..., V) -> (...,)."""
    logp, logq = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    p = logp.exp()
    return torch.where(p == 0, 0.0, p * (logp - logq)).sum(-1)


# ---------------------------------------------------------------- the tokens of a model's completions

LOGITS_AT_ONCE = 2**25  # numbers, 128 MiB in fp32: what the chunks below keep within


def log_softmax_of(hidden, head, temperature):
    """Log-probability of every token of the vocabulary, (N, V), from hidden states (N, D)."""
    logits = head(hidden).float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)


def logp_and_entropy_of(hidden, head, tokens, temperature):
    """Log-probability of `tokens` (N,) and entropy, from hidden states (N, D): (2, N)."""
    logp = log_softmax_of(hidden, head, temperature)
    return torch.stack((logp.gather(-1, tokens[:, None])[:, 0], entropy_of(logp)))


def states(model, prompts, completions):
    """Hidden states that predict all N completion tokens (N, D), the tokens, their rows and columns, (N,)."""
    device = model.device
    rows = [p + c for p, c in zip(prompts, completions)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    # Padding stands on the right, and attention is causal: no token that counts ever sees it.
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, width, D)
    b = torch.tensor([i for i, c in enumerate(completions) for _ in c], dtype=torch.long, device=device)
    t = torch.tensor([j for c in completions for j in range(len(c))], dtype=torch.long, device=device)
    start = torch.tensor([len(p) for p in prompts], device=device)[b]
    return hidden[b, start + t - 1], ids[b, start + t], b, t  # a token is predicted one position earlier


def chunks(model):
    """The head, and how many tokens it may take at a time."""
    head = model.get_output_embeddings()
    return head, max(1, LOGITS_AT_ONCE // head.weight.shape[0])


def score(model, prompts, completions, temperature=1.0):
    """Log-probability and entropy of every completion token under the model, differentiable.

    prompts, completions: lists of B lists of token ids. Which positions count is known from the
    lengths alone: an id is never compared with padding or end-of-sequence, and the end-of-sequence
    token of a completion is scored like any other. The logits are divided by `temperature`, as they
    were when the tokens were sampled.
    Returns two tensors (B, T) in fp32, T the length of the longest completion, zero beyond each one's end.

    The logits (B, T, V) are what runs out of memory with a vocabulary of 151,936. They are never held:
    the head works on chunks of tokens, and the backward pass computes each chunk once more.
    """
    hidden, tokens, b, t = states(model, prompts, completions)
    head, chunk = chunks(model)
    if len(tokens) <= chunk:
        both = logp_and_entropy_of(hidden, head, tokens, temperature)
    else:
        parts = [
            checkpoint(logp_and_entropy_of, h, head, y, temperature, use_reentrant=False)
            for h, y in zip(hidden.split(chunk), tokens.split(chunk))
        ]
        both = torch.cat(parts, 1)
    blank = torch.zeros(len(prompts), max(map(len, completions)), device=both.device)
    return blank.index_put((b, t), both[0]), blank.index_put((b, t), both[1])


def backward(model, prompts, completions, dlogp, dentropy, temperature=1.0):
    """Adds to the model's gradients what `score` and autograd would, for known dL/dlogp and dL/dH, (B, T).

    Since they are known, the backward pass of each chunk follows its forward pass at once, and no chunk is
    computed twice. Entropies are left out if there is no gradient for them.
    """
    hidden, tokens, b, t = states(model, prompts, completions)
    head, chunk = chunks(model)
    given = torch.stack((dlogp, dentropy)).to(hidden.device)[:, b, t]  # (2, N)
    cut, with_entropy = hidden.detach().requires_grad_(), bool(dentropy.any())
    for h, y, g in zip(cut.split(chunk), tokens.split(chunk), given.split(chunk, 1)):
        if with_entropy:
            logp_and_entropy_of(h, head, y, temperature).backward(g)
        else:
            log_softmax_of(h, head, temperature).gather(-1, y[:, None]).backward(g[0, :, None])
    hidden.backward(cut.grad)


# ---------------------------------------------------------------- the law


@dataclass
class Law:
    """R = -a exp(H) + b, with the quality of its fit: R^2 and root mean squared error."""

    a: float
    b: float
    r2: float
    rmse: float

    @property
    def ceiling(self):
        """The accuracy at H = 0, when all entropy is spent: -a + b."""
        return self.b - self.a

    def predict(self, H):
        """R at entropy H (a number or a tensor)."""
        return -self.a * (math.exp(H) if isinstance(H, (int, float)) else torch.as_tensor(H).exp()) + self.b


def fit_law(entropy, performance):
    """Least squares of R = -a exp(H) + b (arXiv 2505.22617, section 2) through points (H, R).

    entropy (nats) and performance: two sequences of one length. The law is linear in exp(H), so the
    fit has a closed form. Raises ValueError with fewer than two different entropies, and for NaN.
    """
    x = torch.as_tensor(entropy, dtype=torch.float64).exp()
    R = torch.as_tensor(performance, dtype=torch.float64)
    if len(x) != len(R) or len(x) < 2 or not x.max() > x.min() or R.isnan().any():
        raise ValueError("a fit needs as many accuracies as entropies, two different entropies, and no NaN")
    dx, dR = x - x.mean(), R - R.mean()
    a = -(dx * dR).sum() / (dx * dx).sum()
    b = R.mean() + a * x.mean()
    residual = R + a * x - b
    total = (dR * dR).sum()
    r2 = 1 - (residual**2).sum() / total if total > 0 else torch.tensor(1.0)
    return Law(a.item(), b.item(), r2.item(), residual.square().mean().sqrt().item())


def main():
    print("distribution                     H (nats)   exp(H): as undecided as between so many equal choices")
    for name, p in [
        ("a certain token", [1.0, 0.0, 0.0, 0.0]),
        ("0.97 and three rare ones", [0.97, 0.01, 0.01, 0.01]),
        ("a fork of two", [0.5, 0.5, 0.0, 0.0]),
        ("four equal choices", [0.25] * 4),
    ]:
        H = entropy(torch.tensor(p).log()).item()
        print(f"{name:30} {H:10.4f}   {math.exp(H):.2f}")
    H = torch.linspace(1.2, 0.05, 24, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    R = -0.2 * H.exp() + 0.8 + 0.01 * torch.randn(24, generator=generator, dtype=torch.float64)
    whole, early = fit_law(H, R), fit_law(H[:9], R[:9])
    print("\n24 points of R = -0.2 exp(H) + 0.8 with noise 0.01")
    print(f"the fit: a {whole.a:.3f}, b {whole.b:.3f}, R^2 {whole.r2:.3f}, ceiling {whole.ceiling:.3f}")
    print(f"the first 9 points alone, H above {H[8]:.2f}, predict the ceiling {early.ceiling:.3f}")


if __name__ == "__main__":
    main()
