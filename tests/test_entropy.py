"""What entropy.py promises: exact entropies, log-probs and entropies of a model's tokens in bounded memory, and the law."""

import math
import weakref

import pytest
import torch

import entropy as entropy_module
from entropy import cross_entropy, entropy, fit_law, kl_divergence, score

INF = torch.inf


def categoricals(seed, shape=(3, 4, 7), scale=3.0):
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def brute(f, *logits):
    """f(p, q) summed over the last dimension by a loop in Python floats; p, q: lists of probabilities."""
    rows = [x.reshape(-1, x.shape[-1]).tolist() for x in logits]
    softmax = lambda z: [math.exp(v - max(z)) / math.fsum(math.exp(w - max(z)) for w in z) for v in z]
    out = [math.fsum(f(*ps) for ps in zip(*map(softmax, row))) for row in zip(*rows)]
    return torch.tensor(out, dtype=torch.float64).view(logits[0].shape[:-1])


# ---------------------------------------------------------------- categoricals


@pytest.mark.parametrize("V", [2, 20, 151_936])
def test_entropy_of_a_uniform_distribution_is_log_V(V):
    torch.testing.assert_close(entropy(torch.full((V,), 3.0, dtype=torch.float64)).item(), math.log(V), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rest", [-INF, -1e4])
def test_entropy_of_a_certain_outcome_is_zero(rest):
    logits = torch.full((3, 5), rest)
    logits[[0, 1, 2], [0, 2, 4]] = 7.0
    assert entropy(logits).tolist() == [0.0, 0.0, 0.0]
    assert cross_entropy(logits, logits).tolist() == [0.0, 0.0, 0.0]
    assert kl_divergence(logits, logits).tolist() == [0.0, 0.0, 0.0]


def test_impossible_outcomes_count_nothing():
    z = categoricals(0)
    more = torch.cat((z, torch.full((3, 4, 2), -INF)), -1)
    other = torch.cat((categoricals(1), categoricals(1, (3, 4, 2))), -1)
    assert torch.allclose(entropy(more), entropy(z))
    assert torch.allclose(kl_divergence(more, other), cross_entropy(more, other) - entropy(z))


def test_what_P_does_and_Q_cannot_do_is_infinitely_far():
    p, q = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -INF])
    assert kl_divergence(p, q) == cross_entropy(p, q) == INF
    assert kl_divergence(q, p).item() == pytest.approx(math.log(2))


def test_entropy_cross_entropy_and_kl_equal_their_definitions():
    p, q = categoricals(0), categoricals(1)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    close(entropy(p), brute(lambda p: -p * math.log(p), p))
    close(cross_entropy(p, q), brute(lambda p, q: -p * math.log(q), p, q))
    close(kl_divergence(p, q), brute(lambda p, q: p * math.log(p / q), p, q))


def test_cross_entropy_is_entropy_plus_kl():
    p, q = categoricals(0), categoricals(1)
    torch.testing.assert_close(cross_entropy(p, q), entropy(p) + kl_divergence(p, q), rtol=1e-12, atol=1e-12)
    assert (kl_divergence(p, q) > 0).all() and kl_divergence(p, p).abs().max() < 1e-12


def test_the_gradient_of_entropy_is_minus_p_times_logp_plus_H():
    z = categoricals(0, (4, 6)).requires_grad_()
    entropy(z).sum().backward()
    logp = torch.log_softmax(z.detach(), -1)
    H = -(logp.exp() * logp).sum(-1, keepdim=True)
    torch.testing.assert_close(z.grad, -logp.exp() * (logp + H), rtol=1e-9, atol=1e-12)


def test_the_gradient_is_finite_where_an_outcome_is_impossible():
    z = torch.tensor([0.3, -0.2, -INF], requires_grad=True)
    entropy(z).backward()
    assert torch.isfinite(z.grad[:2]).all() and z.grad[2] == 0


def test_a_broken_distribution_has_no_entropy_rather_than_none_left():
    broken, fine = torch.tensor([0.0, math.nan]), torch.zeros(2)
    assert entropy(broken).isnan()  # 0 would read as a collapse
    assert cross_entropy(broken, fine).isnan() and kl_divergence(broken, fine).isnan()


# ---------------------------------------------------------------- the tokens of a model's completions

EOS = PAD = 0  # of the narrow models: pad is eos, as with Qwen
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [7, 11, 8], [EOS, 23, EOS, 5]]
COMPLETIONS = [[2, 6, EOS], [5, EOS, 3, 5, 8, 9, EOS], [EOS], [1, 2, 3, 4, 5]]  # two contain EOS midway or alone, one is truncated


def reference(model, prompts, completions, temperature=1.0):
    """One row at a time, without padding, from whole logits in float64: lists of (log-prob, entropy) with gradient."""
    rows = []
    for p, c in zip(prompts, completions):
        logits = model(torch.tensor([p + c])).logits[0].double() / temperature
        logp = logits - logits.logsumexp(-1, keepdim=True)
        rows.append([(logp[len(p) + i - 1, y], -(logp[len(p) + i - 1].exp() * logp[len(p) + i - 1]).sum()) for i, y in enumerate(c)])
    return rows


def assert_equals_reference(model, prompts, completions, temperature=1.0):
    logp, H = score(model, prompts, completions, temperature)
    T = max(map(len, completions))
    assert logp.shape == H.shape == (len(prompts), T)
    for i, row in enumerate(reference(model, prompts, completions, temperature)):
        for j in range(T):
            want = (row[j][0].item(), row[j][1].item()) if j < len(row) else (0.0, 0.0)
            assert (logp[i, j].item(), H[i, j].item()) == pytest.approx(want, abs=2e-5)
            assert j < len(row) or (logp[i, j], H[i, j]) == (0.0, 0.0)


def gradient(model, prompts, completions, scorer=score):
    """d/dtheta of a sum with another weight for each log-prob and entropy, flat."""
    logp, H = scorer(model, prompts, completions)
    weight = torch.linspace(0.5, 2, logp.numel(), dtype=logp.dtype).view(logp.shape)
    model.zero_grad()
    ((weight * logp).sum() + (weight.flip(0) * H).sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Mistral"])
def test_logp_and_entropy_equal_those_of_the_full_softmax_whatever_the_lengths(narrow, architecture):
    assert_equals_reference(narrow(architecture, torch.float64), PROMPTS, COMPLETIONS)


def test_the_gradient_equals_that_of_the_full_softmax(model):
    def plain(model, prompts, completions):
        rows, T = reference(model, prompts, completions), max(map(len, completions))
        padded = [[row[j] if j < len(row) else (torch.zeros(()),) * 2 for j in range(T)] for row in rows]
        return (torch.stack([torch.stack([x[k].double() for x in row]) for row in padded]) for k in (0, 1))

    mine, want = gradient(model, PROMPTS, COMPLETIONS), gradient(model, PROMPTS, COMPLETIONS, plain)
    assert (mine - want).norm() < 1e-5 * want.norm()


def test_the_end_of_sequence_is_an_action_like_any_other(model):
    logp, H = score(model, [[3, 1, 4]], [[2, 6, EOS]])
    assert logp[0, 2] < 0 and H[0, 2] > 0
    (g,) = torch.autograd.grad(logp[0, 2], model.get_output_embeddings().weight)
    assert g[EOS].abs().max() > 0


def test_masks_come_from_lengths_so_ids_of_pad_and_eos_change_nothing(model):
    prompts, completions = [[EOS, PAD, EOS], [PAD]], [[PAD, EOS, PAD, EOS], [5, PAD]]
    assert_equals_reference(model, prompts, completions)
    before = score(model, prompts, completions)
    model.config.pad_token_id = model.config.eos_token_id = 23  # the same tokens, under other names
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 23
    for a, b in zip(before, score(model, prompts, completions)):
        assert torch.equal(a, b)


def test_a_row_scores_the_same_alone_and_among_longer_ones(model):
    logp, H = score(model, PROMPTS, COMPLETIONS)
    for i, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS)):
        for whole, alone in zip((logp, H), score(model, [p], [c])):
            torch.testing.assert_close(whole[i : i + 1, : len(c)], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_divides_the_logits_of_logp_and_entropy_alike(model, temperature):
    assert_equals_reference(model, PROMPTS, COMPLETIONS, temperature)
    cold, warm = (score(model, PROMPTS, COMPLETIONS, t)[0] for t in (1.0, temperature))
    assert (cold - warm).abs().max() > 0.1


def test_entropy_belongs_to_the_softmax_and_not_to_the_token_that_was_drawn(model):
    _, first = score(model, [[3, 1, 4]] * 2, [[2, 6, 1], [2, 6, 9]])
    logp, _ = score(model, [[3, 1, 4]] * 2, [[2, 6, 1], [2, 6, 9]])
    assert first[0, 2] == first[1, 2] and (logp[0, 2] - logp[1, 2]).abs() > 0.1


def test_entropy_is_the_mean_of_minus_logp_over_all_tokens(model):
    logp, H = score(model, [[3, 1, 4]] * 24, [[y] for y in range(24)])
    torch.testing.assert_close(-(logp.exp() * logp).sum(), H[0, 0], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- memory


def test_chunks_change_neither_values_nor_order_nor_gradients(model, monkeypatch):
    whole = score(model, PROMPTS, COMPLETIONS)
    whole_gradient = gradient(model, PROMPTS, COMPLETIONS)
    for tokens in (1, 3, 15, 16):  # 16 tokens in all
        monkeypatch.setattr(entropy_module, "LOGITS_AT_ONCE", 24 * tokens)
        for a, b in zip(whole, score(model, PROMPTS, COMPLETIONS)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        g = gradient(model, PROMPTS, COMPLETIONS)
        assert (g - whole_gradient).norm() < 1e-6 * whole_gradient.norm()


def three_at_a_time(narrow, monkeypatch, V=100):
    """V, a model with that vocabulary whose head takes three tokens at a time, and the numbers of logits that it will have computed."""
    model, chunks = narrow(vocab_size=V), []
    monkeypatch.setattr(entropy_module, "LOGITS_AT_ONCE", 3 * V + V // 2)
    model.get_output_embeddings().register_forward_hook(lambda module, x, logits: chunks.append(logits.numel()))
    return V, model, chunks


def test_the_logits_of_all_tokens_are_never_held_neither_forward_nor_for_the_backward(narrow, monkeypatch):
    V, model, chunks = three_at_a_time(narrow, monkeypatch)
    kept = []

    def keep(x):
        if x.shape[-1:] == (V,):  # logits or their softmax
            kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logp, H = score(model, PROMPTS, COMPLETIONS)
    assert sum(chunks) == 16 * V and max(chunks) == 3 * V  # the completions alone, a chunk at a time
    assert not kept
    (logp.sum() + H.sum()).backward()
    assert sum(chunks) == 2 * 16 * V and max(chunks) == 3 * V  # each chunk once more


def weights_of(model):
    """dL/dlogp and dL/dH (4, 7) that are different for every token."""
    given = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    return given.masked_fill(torch.arange(7) >= torch.tensor([len(c) for c in COMPLETIONS])[:, None], 0)


@pytest.mark.parametrize("tokens", [1, 3, 15, 16])
def test_backward_adds_to_the_gradients_what_autograd_would_through_the_scores(model, monkeypatch, tokens):
    given = weights_of(model)
    logp, H = score(model, PROMPTS, COMPLETIONS, 0.7)
    want = torch.autograd.grad((given * torch.stack((logp, H))).sum(), list(model.parameters()))
    monkeypatch.setattr(entropy_module, "LOGITS_AT_ONCE", 24 * tokens)
    for times in (1, 2):
        entropy_module.backward(model, PROMPTS, COMPLETIONS, *given, 0.7)
        for p, g in zip(model.parameters(), want):
            torch.testing.assert_close(p.grad, times * g, rtol=1e-6, atol=1e-6 * g.abs().max().item())


def test_backward_computes_each_chunk_once_and_holds_one_at_a_time(narrow, monkeypatch):
    V, model, chunks = three_at_a_time(narrow, monkeypatch)
    kept = []

    def keep(x):
        if x.shape[-1:] == (V,) and len(x) <= 16:  # logits or their softmax, not the head's weight
            kept.append(weakref.ref(x))
            assert sum(ref().numel() for ref in kept if ref() is not None) <= 5 * 3 * V  # what one chunk keeps
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        entropy_module.backward(model, PROMPTS, COMPLETIONS, *weights_of(model))
    assert sum(chunks) == 16 * V and max(chunks) == 3 * V and len(kept) >= 6


def test_the_head_reads_completions_only_never_the_prompt_or_the_padding(model):
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, x, logits: seen.append(logits.shape))
    score(model, PROMPTS, COMPLETIONS)
    assert seen == [(16, 24)]


# ---------------------------------------------------------------- the law


def test_the_fit_recovers_the_law():
    H = [1.3, 0.9, 0.5, 0.2, 0.05]
    law = fit_law(H, [-0.21 * math.exp(h) + 0.83 for h in H])
    assert (law.a, law.b, law.r2, law.rmse) == pytest.approx((0.21, 0.83, 1.0, 0.0), abs=1e-12)
    assert law.ceiling == pytest.approx(0.62)
    assert law.predict(0.7) == pytest.approx(-0.21 * math.exp(0.7) + 0.83)
    assert law.predict(0) == pytest.approx(law.ceiling)
    assert law.predict(torch.tensor([0.7, 0.0])).tolist() == pytest.approx([law.predict(0.7), law.ceiling])


def test_the_fit_is_the_least_squares_one_and_says_how_good_it_is():
    generator = torch.Generator().manual_seed(0)
    H = torch.linspace(1.5, 0.1, 30, dtype=torch.float64)
    R = -0.2 * H.exp() + 0.8 + 0.05 * torch.randn(30, generator=generator, dtype=torch.float64)
    law = fit_law(H, R)
    X = torch.stack((-H.exp(), torch.ones_like(H)), 1)
    assert [law.a, law.b] == pytest.approx(torch.linalg.lstsq(X, R[:, None]).solution[:, 0].tolist())
    residual = R - law.predict(H)
    assert law.rmse == pytest.approx(residual.square().mean().sqrt().item())
    assert law.r2 == pytest.approx(1 - (residual.var() / R.var()).item()) and 0.5 < law.r2 < 0.99


def test_the_fit_does_not_take_accuracy_for_gain_where_entropy_rises_it():
    assert fit_law([0.1, 0.5, 1.0], [0.2, 0.4, 0.7]).a < 0  # whatever the data say, not what the law expects


@pytest.mark.parametrize("H, R", [([], []), ([0.5], [0.1]), ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]), ([0.1, 0.2], [0.3])])
def test_a_fit_needs_two_different_entropies(H, R):
    with pytest.raises(ValueError):
        fit_law(H, R)


def test_the_demonstration_foretells_the_ceiling(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["entropy.py"])
    entropy_module.main()
    assert "ceiling 0.6" in capsys.readouterr().out
