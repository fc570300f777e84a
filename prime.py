"""PRIME: a reward for every token, learnt from outcomes alone (arXiv 2502.01456).

A second language model phi, the process reward model (PRM), starts as the reference, which is the starting policy.
Of a completion y with outcome o(y), 1 if it is right and 0 if not,

    r(y_t) = beta log( phi(y_t | y_<t) / ref(y_t | y_<t) )                                (1)
    L(phi) = -[ o log sigmoid(sum_t r(y_t)) + (1 - o) log(1 - sigmoid(sum_t r(y_t))) ]        (2)

So phi learns to tell right completions from wrong ones as a whole, and its log-ratios spread the verdict over the tokens.
Within a group of G completions, both rewards are compared with the others' (leave-one-out):

    A(y_t) = sum_{s >= t} ( r(y_s) - mean over the others of their mean r )  +  o(y) - mean over the others of o    (3)

Each step the rewards are those of phi as it was, then phi learns from the step's outcomes, mini-batch by mini-batch.
In the first step phi is the reference, so all process rewards are 0 and the advantage is RLOO's.
The published code normalises A over the batch besides; the equation does not, nor does this.

    python prime.py      a PRM over three tokens learns from outcomes which of them was the good one
"""

import argparse
import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from parallel import backward, score, score_each
from rollout import load_policy


def process_model(o):
    """phi as the reference policy, loaded from --model, and its optimizer."""
    model = load_policy(o.model, o.device)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.prm_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return argparse.Namespace(model=model, optimizer=optimizer)


def token_rewards(phi_logp, ref_logp, mask, beta):
    """r(y_t), equation 1: (B, T), zero where no token is."""
    return (beta * (phi_logp - ref_logp)).masked_fill(~mask, 0.0)


def outcome_loss(r, outcomes):
    """Cross-entropy of sigmoid(sum_t r) with the outcomes (B,), mean over the completions, equation 2: scalar."""
    return binary_cross_entropy_with_logits(r.sum(1), outcomes)


def process_advantages(r, mask, samples):
    """The sum in equation 3, groups of `samples` rows following each other: (B, T)."""
    means = (r.sum(1) / mask.sum(1)).view(-1, samples)  # (P, G)
    others = ((means.sum(1, keepdim=True) - means) / (samples - 1)).view(-1, 1)
    return (r - others).masked_fill(~mask, 0.0).flip(1).cumsum(1).flip(1) * mask


def judge(prm, batches, o):
    """Process rewards (B, T) of each mini-batch by phi as it is now."""
    scored = score_each(prm.model, batches, o.temperature, o)
    return [token_rewards(phi_logp, batch["ref_logp"], batch["mask"], o.prm_beta) for batch, (phi_logp, _) in zip(batches, scored)]


def learn(prm, batch, o):
    """One update of phi on the outcomes of a mini-batch, exact like the policy's: see parallel.py."""
    phi_logp, entropy = score(prm.model, batch, o.temperature, o)
    loss = outcome_loss(token_rewards(phi_logp.requires_grad_(), batch["ref_logp"], batch["mask"], o.prm_beta), batch["rewards"])
    (dlogp,) = torch.autograd.grad(loss, phi_logp)
    prm.optimizer.zero_grad(set_to_none=True)
    backward(prm.model, batch, dlogp, torch.zeros_like(entropy), o)
    norm = torch.nn.utils.clip_grad_norm_(prm.model.parameters(), o.grad_clip)
    if torch.isfinite(norm) and torch.isfinite(loss):
        prm.optimizer.step()


def process_rewards(prm, batches, o):
    """Adds the sum in equation 3 to the advantages of all mini-batches, then lets phi learn. Returns what is logged of phi as it was."""
    rewards = judge(prm, batches, o)
    for batch, r in zip(batches, rewards):
        batch["advantages"] = batch["advantages"] + process_advantages(r, batch["mask"], o.samples)
        learn(prm, batch, o)
    verdicts, outcomes = torch.cat([r.sum(1) for r in rewards]), torch.cat([batch["rewards"] for batch in batches])
    loss = binary_cross_entropy_with_logits(verdicts, outcomes).item()
    right = (verdicts > 0) == (outcomes > 0.5)
    return {"prm_loss": loss if math.isfinite(loss) else None, "prm_accuracy": right.float().mean().item()}


def main():
    torch.manual_seed(0)
    print("Completions are three tokens, each good (1) or bad (0) by chance; an answer is right if its second token is good.")
    logits = torch.zeros(3, 2, requires_grad=True)  # phi and the reference: a distribution over {bad, good} at each position
    reference = torch.full((3, 2), 0.5).log()
    at, mask, beta = torch.arange(3), torch.ones(64, 3, dtype=torch.bool), 0.5
    for updates in range(201):
        y = torch.randint(2, (64, 3))
        r = token_rewards(torch.log_softmax(logits, -1)[at, y], reference[at, y], mask, beta)
        loss = outcome_loss(r, y[:, 1].float())
        if updates % 50 == 0:
            A = process_advantages(r.detach(), mask, 8)
            mean = lambda x, position, good: x[y[:, position] == good, position].mean().item()
            rewards = "   ".join(f"{mean(r.detach(), t, 0):+.2f} / {mean(r.detach(), t, 1):+.2f}" for t in range(3))
            print(f"{updates:4} updates: loss {loss:.3f}, rewards of a bad / good token at each position {rewards},"
                  f" advantage of a good second token {mean(A, 1, 1):+.2f}")  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 2 * gradient).detach().requires_grad_()


if __name__ == "__main__":
    main()
