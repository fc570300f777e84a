"""What entropy.py promises: exact entropies, scores of a model in bounded memory, and the fit of the law."""

import itertools
import math
import weakref

import pytest
import torch
from conftest import narrow, plain_scores

import entropy as entropy_module
from entropy import cross_entropy, entropy, fit_law, kl_divergence, score

INF = math.inf


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def logits_of(seed, shape=(3, 4, 7)):
    return 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- categoricals


def test_entropy_cross_entropy_and_kl_equal_their_definitions():
    P, Q = logits_of(0), logits_of(1)
    assert entropy(P).shape == (3, 4)
    for i, j in itertools.product(range(3), range(4)):
        p, q = (torch.softmax(x[i, j], -1).tolist() for x in (P, Q))
        H = math.fsum(-a * math.log(a) for a in p)
        cross = math.fsum(-a * math.log(b) for a, b in zip(p, q))
        got = [f[i, j].item() for f in (entropy(P), cross_entropy(P, Q), kl_divergence(P, Q))]
        assert got == pytest.approx([H, cross, cross - H], rel=1e-10)
    assert entropy(torch.full((151_936,), 3.0)).item() == pytest.approx(math.log(151_936), rel=1e-6)


@pytest.mark.parametrize("rest", [-INF, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_certain_outcome_has_no_entropy_and_its_gradient_is_finite(rest, dtype):
    logits = torch.full((3, 5), rest, dtype=dtype)
    logits[[0, 1, 2], [0, 2, 4]] = 7.0
    assert entropy(logits.requires_grad_()).tolist() == [0.0, 0.0, 0.0]
    assert cross_entropy(logits, logits).tolist() == kl_divergence(logits, logits).tolist() == [0.0, 0.0, 0.0]
    entropy(logits).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_impossible_outcomes_count_nothing_and_what_only_Q_excludes_is_infinitely_far():
    z, q = logits_of(0), logits_of(1, (3, 4, 9))
    more = torch.cat((z, torch.full((3, 4, 2), -INF)), -1)
    assert torch.allclose(entropy(more), entropy(z))
    assert torch.allclose(kl_divergence(more, q), cross_entropy(more, q) - entropy(z))
    p, q = float64(0, 0), float64(0, -INF)
    assert kl_divergence(p, q) == cross_entropy(p, q) == INF
    rounded = torch.tensor([0.0, -200.0])  # whose second probability is 0 in float32
    assert kl_divergence(rounded, q.float()) == cross_entropy(rounded, q.float()) == 0


def test_a_broken_distribution_has_no_entropy_rather_than_none_left():
    broken, fine = float64(0, math.nan), float64(0, 0)
    assert entropy(broken).isnan()  # 0 would read as a collapse
    assert cross_entropy(broken, fine).isnan() and kl_divergence(broken, fine).isnan()


# ---------------------------------------------------------------- the tokens of a model's completions

EOS = 0  # of the narrow models, and the id of padding as well, as with Qwen
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [7, 11, 8], [EOS, 23, EOS, 5]]
COMPLETIONS = [[2, 6, EOS], [5, EOS, 3, 5, 8, 9, EOS], [EOS], [1, 2, 3, 4, 5]]  # 16 tokens
MASK = torch.arange(7) < torch.tensor([3, 7, 1, 5])[:, None]


def weights():
    """dL/dlogp and dL/dH (2, 4, 7), different for every token, zero where none is."""
    return torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0)).masked_fill(~MASK, 0)


def gradients(model, both):
    """Of the weighted sum of log-probs and entropies (2, 4, 7), for every parameter."""
    return torch.autograd.grad((weights() * both).sum(), list(model.parameters()))


def assert_close(these, those):
    """Two lists of tensors agree, each relative to the greatest number of all."""
    greatest = max(x.abs().max().item() for x in those)
    for a, b in zip(these, those, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * greatest)


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Mistral"])
@pytest.mark.parametrize("tokens, temperature", [(1, 1.0), (3, 0.6), (15, 1.0), (16, 0.6)])
def test_scores_and_gradients_are_those_of_the_full_softmax_for_chunks_of_any_size(
    monkeypatch, architecture, tokens, temperature
):
    monkeypatch.setattr(entropy_module, "LOGITS_AT_ONCE", 24 * tokens)
    model = narrow(architecture, torch.float64)
    both = torch.stack(score(model, PROMPTS, COMPLETIONS, temperature))
    whole = torch.stack(plain_scores(model, PROMPTS, COMPLETIONS, temperature))
    torch.testing.assert_close(both.double(), whole, rtol=1e-5, atol=1e-6)
    assert (both[:, ~MASK] == 0).all() and (both[1, MASK] > 0).all()
    want = gradients(model, whole)
    assert_close(gradients(model, both), want)
    for times in (1, 2):  # backward adds what autograd would
        entropy_module.backward(model, PROMPTS, COMPLETIONS, *weights(), temperature)
        assert_close([p.grad for p in model.parameters()], [times * g for g in want])


@pytest.mark.parametrize("dentropy", [weights()[1], torch.zeros(4, 7)], ids=["with entropy", "without"])
def test_tokens_that_are_ruled_out_have_a_finite_entropy_in_score_and_backward(dentropy):
    model = narrow("Phi", torch.float64, num_key_value_heads=4)
    with torch.no_grad():
        model.lm_head.bias[12:] = -INF  # as in a pruned vocabulary
    pruned = [[min(y, 11) for y in c] for c in COMPLETIONS]
    logp, H = score(model, PROMPTS, pruned)
    possible = torch.log_softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1, :12], -1)
    assert H[0, 0].item() == pytest.approx(torch.special.entr(possible.exp()).sum().item(), rel=1e-5)
    assert torch.isfinite(logp).all() and torch.isfinite(H).all() and (H[MASK] > 0).all()
    want = torch.autograd.grad((weights()[0] * logp + dentropy * H).sum(), list(model.parameters()))
    entropy_module.backward(model, PROMPTS, pruned, weights()[0], dentropy)
    assert all(torch.isfinite(g).all() for g in want)
    assert_close([p.grad for p in model.parameters()], want)


@pytest.mark.parametrize("what", ["score", "backward"])
def test_the_logits_of_all_tokens_are_never_held_but_three_tokens_at_a_time(monkeypatch, what):
    V, chunks, alive = 100, [], []
    model = narrow(vocab_size=V)
    monkeypatch.setattr(entropy_module, "LOGITS_AT_ONCE", 3 * V + V // 2)
    hook = lambda module, x, logits: chunks.append(logits.numel())
    model.get_output_embeddings().register_forward_hook(hook)

    def keep(x):
        if x.shape[-1:] == (V,) and len(x) <= 16:  # logits or their softmax, not the head's weight
            alive.append(weakref.ref(x))
            sizes = {ref().data_ptr(): ref().numel() for ref in alive if ref() is not None}
            assert sum(sizes.values()) <= 4 * 3 * V
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if what == "backward":
            entropy_module.backward(model, PROMPTS, COMPLETIONS, *weights())
        else:
            both = torch.stack(score(model, PROMPTS, COMPLETIONS))
            assert not alive
            both.sum().backward()
    times = {"score": 2, "backward": 1}[what]  # autograd computes each chunk once more
    assert sum(chunks) == times * 16 * V and max(chunks) == 3 * V  # of the completions alone


# ---------------------------------------------------------------- the law


def test_the_fit_is_the_least_squares_one_and_says_how_good_it_is():
    H = torch.linspace(1.5, 0.1, 30, dtype=torch.float64)
    R = -0.2 * H.exp() + 0.8 + 0.05 * torch.randn(30, dtype=torch.float64)
    law = fit_law(H, R)
    X = torch.stack((-H.exp(), torch.ones_like(H)), 1)
    assert [law.a, law.b] == pytest.approx(torch.linalg.lstsq(X, R[:, None]).solution[:, 0].tolist())
    residual = R - law.predict(H)
    assert law.rmse == pytest.approx(residual.square().mean().sqrt().item())
    assert law.r2 == pytest.approx(1 - (residual.var() / R.var()).item()) and 0.5 < law.r2 < 0.99


@pytest.mark.parametrize("H, R", [
    ([], []), ([0.5], [0.1]), ([0.5, 0.5], [0.1, 0.2]), ([0.1, 0.2], [0.3]),
    ([0.1, math.nan, 0.2], [0.1, 0.2, 0.3]), ([0.1, 0.2], [0.1, math.nan]),
])  # fmt: skip
def test_a_fit_needs_two_different_entropies_and_no_nan(H, R):
    with pytest.raises(ValueError, match="two different"):
        fit_law(H, R)
