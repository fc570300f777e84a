"""PRIME: a reward for every token, learnt from outcomes alone (arXiv 2502.01456).

A second language model phi, the process reward model (PRM), starts as the reference, which is the starting
policy. Of a completion y with outcome o(y), 1 if it is right and 0 if not,

    r(y_t) = beta log( phi(y_t | y_<t) / ref(y_t | y_<t) )                                (1)
    L(phi) = -[ o log sigmoid(sum_t r(y_t)) + (1 - o) log(1 - sigmoid(sum_t r(y_t))) ]        (2)

So phi learns to tell right completions from wrong ones as a whole, and its log-ratios spread the verdict over
the tokens. Within a group of G completions, both rewards are compared with the others' (leave-one-out):

    A(y_t) = sum_{s >= t} ( r(y_s) - mean of the others' mean r )  +  o(y) - mean of the others' o       (3)

Each step the rewards are those of phi as it was, then phi learns from the step's outcomes, mini-batch by
mini-batch. In the first step phi is the reference, so all process rewards are 0 and the advantage is RLOO's.
The published code also normalises A over the batch. The equation does not, and neither does this file.

    python prime.py      a PRM over three tokens learns from outcomes which of them was the good one
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import parallel
from rollout import load_policy


def token_rewards(phi_logp, ref_logp, mask, beta):
    """r(y_t), equation 1: (B, T), zero where no token is."""
    return (beta * (phi_logp - ref_logp)).masked_fill(~mask, 0.0)


def outcome_loss(r, outcomes):
    """Cross-entropy of sigmoid(sum_t r) with the outcomes (B,), mean over completions, equation 2."""
    return binary_cross_entropy_with_logits(r.sum(1), outcomes)


def process_advantages(r, mask, samples):
    """The sum in equation 3, groups of `samples` rows following each other: (B, T)."""
    means = (r.sum(1) / mask.sum(1)).view(-1, samples)  # (P, G)
    others = ((means.sum(1, keepdim=True) - means) / (samples - 1)).view(-1, 1)
    return (r - others).masked_fill(~mask, 0.0).flip(1).cumsum(1).flip(1) * mask


class ProcessRewardModel:
    """phi, which starts as the reference policy --model, and its optimizer."""

    def __init__(self, o):
        self.model = load_policy(o.model, o.device)[0]
        self.optimizer = parallel.adamw(self.model, o.prm_lr)

    def step(self, batches, o):
        """Adds the sum in equation 3 to the advantages of all mini-batches, then learns from their outcomes.

        Returns what is logged: loss and accuracy of phi as it was.
        """
        scores, rewards = [parallel.score(self.model, batch, o.temperature, o)[0] for batch in batches], []
        for batch, logp in zip(batches, scores):
            r = token_rewards(logp, batch.ref_logp, batch.mask, o.prm_beta)
            rewards.append(r)
            batch.advantages = batch.advantages + process_advantages(r, batch.mask, o.samples)
            self.learn(batch, o)
        verdicts, outcomes = torch.cat([r.sum(1) for r in rewards]), torch.cat([b.rewards for b in batches])
        loss = binary_cross_entropy_with_logits(verdicts, outcomes)
        right = (verdicts > 0) == (outcomes > 0.5)
        return {"prm_loss": loss.item(), "prm_accuracy": right.float().mean().item()}

    def learn(self, batch, o):
        """One update of phi on the outcomes of a mini-batch, exact like the policy's (parallel.py)."""
        logp, entropy = parallel.score(self.model, batch, o.temperature, o)
        r = token_rewards(logp.requires_grad_(), batch.ref_logp, batch.mask, o.prm_beta)
        loss = outcome_loss(r, batch.rewards)
        (dlogp,) = torch.autograd.grad(loss, logp)
        self.optimizer.zero_grad(set_to_none=True)
        parallel.backward(self.model, batch, dlogp, torch.zeros_like(entropy), o)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.grad_clip)
        if torch.isfinite(norm) and torch.isfinite(loss):
            self.optimizer.step()


def main():
    torch.manual_seed(0)
    print("Completions are three tokens, each good (1) or bad (0) by chance.")
    print("An answer is right if its second token is good. Rewards of a bad / good token at each position:")
    logits = torch.zeros(3, 2, requires_grad=True)  # phi: a distribution over {bad, good} at each position
    reference = torch.full((3, 2), 0.5).log()
    at, mask, beta = torch.arange(3), torch.ones(64, 3, dtype=torch.bool), 0.5
    for updates in range(201):
        y = torch.randint(2, (64, 3))
        r = token_rewards(torch.log_softmax(logits, -1)[at, y], reference[at, y], mask, beta)
        loss = outcome_loss(r, y[:, 1].float())
        if updates % 50 == 0:
            mean = [[r[y[:, t] == good, t].mean().item() for good in (0, 1)] for t in range(3)]
            row = "   ".join(f"{bad:+.2f} / {good:+.2f}" for bad, good in mean)
            print(f"{updates:4} updates   {row}   loss {loss:.3f}")
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 2 * gradient).detach().requires_grad_()
    print("From outcomes alone phi has learnt which token mattered, and rewards only that one.")


if __name__ == "__main__":
    main()
