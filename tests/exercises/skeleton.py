"""Five exercises of course.md. Copy this file, fill in the functions, and hold your copy against the tests:

ANSWERS=my_answers.py python -m pytest -q tests/exercises
"""


def rloo(rewards):
    """Lesson 4. RLOO's advantages (arXiv 2402.14740): the reward minus the mean of the others in the group.

    rewards: (P, G), G >= 2 samples of each of P prompts. Returns (P, G).
    """
    raise NotImplementedError


def select(covariance, mask, ratio):
    """Lesson 3. KL-Cov's choice: the max(1, int(ratio N)) tokens of highest covariance, if it is positive.

    covariance, mask: (B, T), N = mask.sum(). Returns bool (B, T), False where the mask is False.
    """
    raise NotImplementedError


def kl_cov(logp, old_logp, advantages, selected, beta):
    """Lesson 4. The loss of each token: -ratio A, and beta |logp - old_logp| more at the selected ones.

    All tensors are (B, T), selected is bool. Returns (B, T).
    """
    raise NotImplementedError


def fit_law(entropy, reward):
    """Lesson 6. (a, b) of R = -a exp(H) + b by least squares. entropy, reward: (n,) tensors, n >= 2."""
    raise NotImplementedError


def draw(probabilities, u):
    """Lesson 5. A token for each row: the first whose cumulated probability exceeds u.

    probabilities: (n, V), each row adds up to 1. u: (n,) uniform numbers in [0, 1). Returns (n,) indices.
    """
    raise NotImplementedError
