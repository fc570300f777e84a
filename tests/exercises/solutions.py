"""How the house does it. Look last."""

import covariance
import entropy
import losses
import rollout


def rloo(rewards):
    return losses.rloo_advantages(rewards, None, None)


def select(cov, mask, ratio):
    return covariance.select_kl_cov(cov, mask, ratio)


def kl_cov(logp, old_logp, advantages, selected, beta):
    log_ratio = logp - old_logp
    return -log_ratio.exp() * advantages + beta * selected * log_ratio.abs()


def fit_law(H, R):
    law = entropy.fit_law(H, R)
    return law.a, law.b


def draw(probabilities, u):
    return rollout.next_token(probabilities.log(), 1.0, u)
