"""Controls: does it matter which tokens KL-Cov and Clip-Cov act on? The same act, on as many other tokens.

    kl_cov_random, clip_cov_random       uniformly at random
    ..._rare_wrong                       at random among rare tokens (log p below its mean) with A < 0
    ..._rarest_wrong                     the rarest tokens with A < 0
    ..._right                            at random among tokens with A > 0
    kl_cov_high, clip_cov_highest        each with the other's choice: at random among tokens whose covariance
                                         is above --cov-low, and the highest

    python -m lab.controls --method kl_cov_random      with the other options of train.py; for those of
                                                       clip_cov also --clip-low 1 --clip-high 1, for those of
                                                       kl_cov --kl-cov-low 0, to act on as many as published
    python -m lab.study controls                       the comparison
"""

import copy

import torch

import losses
import train
from covariance import top


def choices(t, o):
    """{name: (score (B, T), candidates (B, T))}: the candidates of highest score are taken."""
    noise = torch.rand(t.logp.shape, generator=t.generator).to(t.logp.device)
    logp, wrong = t.logp.detach(), t.mask & (t.advantages < 0)
    return {
        "random": (noise, t.mask),
        "rare_wrong": (noise, wrong & (logp < logp[t.mask].mean())),
        "rarest_wrong": (-logp, wrong),
        "right": (noise, t.mask & (t.advantages > 0)),
        "high": (noise, t.mask & (t.covariance > o.cov_low)),
        "highest": (t.covariance, t.mask & (t.covariance > 0)),
    }


def control(method, name):
    """The method, told that the covariance is high at the control's tokens and 0 elsewhere."""

    def controlled(t, o):
        score, candidates = choices(t, o)[name]
        count = min(int(method(t, o).selected.sum()), int(candidates.sum()))
        chosen = top(score.masked_fill(~candidates, -torch.inf), count)
        told = copy.copy(t)  # t itself is logged as it is
        told.covariance = torch.where(chosen, (o.cov_low + o.cov_high) / 2, 0.0)
        return method(told, o)

    return controlled


KINDS = ("random", "rare_wrong", "rarest_wrong", "right")
CONTROLS = {
    f"{method}_{name}": control(losses.METHODS[method], name)
    for method, kinds in {"kl_cov": (*KINDS, "high"), "clip_cov": (*KINDS, "highest")}.items()
    for name in kinds
}


if __name__ == "__main__":
    losses.METHODS |= CONTROLS
    train.main()
