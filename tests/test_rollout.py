"""What rollout.py promises: the model's own distribution, and one completion whatever surrounds it."""

import copy
import gc
import itertools
from types import SimpleNamespace

import pytest
import torch

import rollout
from entropy import score
from rollout import TINY, load_policy
from rollout import next_token, sample, uniforms

V = 24
EOS = {5, 11}
PROMPTS = [[3, 1, 4, 1, 5], [2], list(range(24)) + list(range(9)), [5, 11, 5], [7, 8] * 16]  # 1 to 33 ids, EOS among them


def greedy_by_transformers(model, prompts, max_new_tokens, eos_ids):
    """transformers' generate, one prompt at a time, without padding."""
    out = []
    for p in prompts:
        ids = torch.tensor([p])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
                               eos_token_id=sorted(eos_ids), pad_token_id=0)  # fmt: skip
        out.append([whole[0, len(p) :].tolist()])
    return out


def cut(ids, eos_ids):
    """ids up to and including the first end-of-sequence."""
    ends = [i for i, y in enumerate(ids) if y in eos_ids]
    return ids[: ends[0] + 1] if ends else ids


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Mistral"])
def test_greedy_completions_equal_those_of_transformers_whatever_the_lengths(narrow, architecture):
    model = narrow(architecture, torch.float64, seed=5)
    for eos_ids in (EOS, {V - 1}):
        mine = sample(model, PROMPTS, 1, 40, 0.0, eos_ids)
        assert mine == greedy_by_transformers(model, PROMPTS, 40, eos_ids)
    assert len({tuple(c[0]) for c in mine}) == len(PROMPTS) and max(len(set(c[0])) for c in mine) > 3  # not trivially so


def test_greedy_is_the_same_for_all_samples_and_uses_no_noise(model):
    groups = sample(model, PROMPTS, 3, 20, 0.0, EOS)
    assert all(group == [group[0]] * 3 for group in groups)


# ---------------------------------------------------------------- the distribution


def sequences(vocabulary, eos_ids, length):
    """Every completion there can be: ended by EOS, or of `length` ids without one."""
    for n in range(1, length + 1):
        for ids in itertools.product(range(vocabulary), repeat=n):
            if not set(ids[:-1]) & eos_ids and (ids[-1] in eos_ids or n == length):
                yield list(ids)


def probabilities(model, prompt, completions, temperature):
    """Of each completion, from whole softmaxes in float64."""
    out = []
    for c in completions:
        logp = torch.log_softmax(model(torch.tensor([prompt + c])).logits[0] / temperature, -1)
        out.append(sum(logp[len(prompt) + i - 1, y] for i, y in enumerate(c)).exp().item())
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
@torch.no_grad()
def test_completions_come_as_often_as_exact_enumeration_says(narrow, chi_square, temperature):
    model, prompt, n = narrow(dtype=torch.float64, vocab_size=4, seed=1), [2, 0, 3], 6000
    every = list(sequences(4, {0}, 3))
    p = probabilities(model, prompt, every, temperature)
    assert p.sum().item() == pytest.approx(1)
    drawn = sample(model, [prompt, [1]], n, 3, temperature, {0}, torch.Generator().manual_seed(0))[0]
    counts = [drawn.count(ids) for ids in every]
    assert sum(counts) == n  # nothing else was drawn
    assert chi_square(counts, p * n) > 1e-3
    other = probabilities(model, prompt, every, temperature * 1.3)
    assert chi_square(counts, other * n) < 1e-6  # and the test would notice


@torch.no_grad()
def test_no_token_is_cut_off_whatever_the_generation_config_lists(narrow, chi_square):
    model, n = narrow(dtype=torch.float64, vocab_size=80, seed=2), 30_000
    model.generation_config.update(top_k=5, top_p=0.3, min_p=0.1, repetition_penalty=1.3, temperature=0.2, do_sample=True)
    p = torch.softmax(model(torch.tensor([[3, 1]])).logits[0, -1], -1)
    drawn = torch.tensor(sample(model, [[3, 1]], n, 1, 1.0, {0}, torch.Generator().manual_seed(0))[0])[:, 0]
    assert chi_square(torch.bincount(drawn, minlength=80), p * n) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_the_scores_of_completions_are_those_of_the_distribution_they_were_drawn_from(narrow, chi_square, temperature):
    model, prompt, n = narrow(dtype=torch.float64, vocab_size=4, seed=1), [2, 0, 3], 4000
    every = list(sequences(4, {0}, 3))
    logp, H = score(model, [prompt] * len(every), every, temperature)
    p = logp.double().sum(1).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = sample(model, [prompt], n, 3, temperature, {0}, torch.Generator().manual_seed(1))[0]
    assert chi_square([drawn.count(ids) for ids in every], p / p.sum() * n) > 1e-3
    of = {tuple(ids): x for ids, x in zip(every, zip(logp.sum(1).tolist(), H.sum(1).tolist()))}
    mean = [sum(of[tuple(ids)][k] for ids in drawn) / n for k in (0, 1)]
    assert -mean[0] == pytest.approx(mean[1], rel=0.04)  # the mean of -log p is the entropy of what was drawn


def test_a_token_is_the_first_whose_cumulated_probability_exceeds_the_random_number():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 1 - 2**-24])
    assert next_token(logits.expand(8, 4), 1.0, u).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_has_no_probability_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    u = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-24])
    assert next_token(logits.expand(4, 5), 1.0, u).tolist() == [1, 1, 3, 3]
    logits = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, -9:] = -torch.inf  # sums of so many differ from 1 by more than the last random number does
    assert next_token(logits, 1.0, torch.full((200,), 1 - 2**-24)).max() < 3000 - 9


# ---------------------------------------------------------------- random numbers


def test_a_generator_makes_completions_reproducible_and_the_global_one_is_left_alone(model):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(model, PROMPTS, 4, 12, 1.0, EOS, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    torch.rand(100)
    assert sample(model, PROMPTS, 4, 12, 1.0, EOS, torch.Generator().manual_seed(7)) == first
    assert sample(model, PROMPTS, 4, 12, 1.0, EOS, torch.Generator().manual_seed(8)) != first


def test_the_generator_moves_on_by_as_much_whatever_was_drawn(model, narrow):
    states = []
    for policy, eos_ids in ((model, EOS), (model, {0}), (narrow(seed=3), EOS)):
        generator = torch.Generator().manual_seed(7)
        sample(policy, PROMPTS, 4, 12, 1.0, eos_ids, generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("apart", [False, True])  # as on a CPU and, but for the graphs, as on a GPU
def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(narrow, architecture, apart, monkeypatch):
    monkeypatch.setattr(rollout, "apart", lambda device: apart)
    model, sizes = narrow(architecture, torch.float64), decoded(monkeypatch)
    noise = uniforms(len(PROMPTS), 6, 40, torch.Generator().manual_seed(3))
    together = sample(model, PROMPTS, 6, 40, 1.0, EOS, noise=noise)
    assert sizes[0] == 30 or not apart
    assert len(set(sizes)) >= 3 and sizes[-1] < max(sizes) / 2  # rows did leave, more than once
    for i, prompt in enumerate(PROMPTS):  # alone no row ever leaves before the end
        assert [sample(model, [prompt], 1, 40, 1.0, EOS, noise=noise[i : i + 1, j : j + 1])[0][0] for j in range(6)] == together[i]
    assert len({len(c) for group in together for c in group}) > 8


def decoded(monkeypatch):
    """How many rows each call of decode has."""
    sizes, decode = [], rollout.decode

    def spy(model, s, n, *rest):
        sizes.append(n)
        decode(model, s, n, *rest)

    monkeypatch.setattr(rollout, "decode", spy)
    return sizes


@pytest.mark.parametrize("temperature", [1.0, 0.4, 0.0])
def test_completions_have_one_row_in_common_as_long_as_they_are_the_same(narrow, temperature, monkeypatch):
    model, sizes = narrow(vocab_size=4, dtype=torch.float64), decoded(monkeypatch)
    noise = uniforms(3, 40, 9, torch.Generator().manual_seed(3))
    groups = sample(model, [[1, 2], [3], [1, 2]], 40, 9, temperature, {0}, noise=noise)
    alike = [sum(len({tuple(c[:t]) for c in group if len(c) > t}) for group in groups) for t in range(1, 9)]
    assert sizes and sizes == [n for n in alike if n] and (temperature == 0 or max(sizes) > 4 * min(sizes))
    monkeypatch.setattr(rollout, "apart", lambda device: True)
    assert sample(model, [[1, 2], [3], [1, 2]], 40, 9, temperature, {0}, noise=noise) == groups  # each in a row of its own


def test_completions_stand_in_the_order_of_their_prompts(model):
    noise = uniforms(5, 3, 20, torch.Generator().manual_seed(3))
    forth = sample(model, PROMPTS, 3, 20, 1.0, EOS, noise=noise)
    order = [3, 0, 4, 2, 1]
    assert sample(model, [PROMPTS[i] for i in order], 3, 20, 1.0, EOS, noise=noise[order]) == [forth[i] for i in order]
    assert [len(group) for group in forth] == [3] * 5 and len({str(group) for group in forth}) == 5


# ---------------------------------------------------------------- buffers


@pytest.mark.parametrize("apart", [False, True])
def test_buffers_stay_where_they_are_and_serve_other_prompts_other_lengths_and_new_weights(narrow, apart, monkeypatch):
    monkeypatch.setattr(rollout, "apart", lambda device: apart)
    model, other = narrow(dtype=torch.float64), narrow(dtype=torch.float64, seed=9)
    noise = uniforms(5, 6, 40, torch.Generator().manual_seed(3))
    fresh = lambda *arguments, **more: sample(copy.deepcopy(model), *arguments, **more)
    first = sample(model, PROMPTS, 6, 40, 1.0, EOS, noise=noise)
    s = rollout.BUFFERS[model]
    every = [s.token, s.position, s.who, s.ended, s.noise, s.out, s.t, s.eos] + [x for layer in s.layers for x in (layer.keys, layer.values)]
    addresses = [x.data_ptr() for x in every]
    for p, q in zip(model.parameters(), other.parameters()):
        p.data.fill_(torch.nan)
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "apart", lambda device: True)
        sample(model, PROMPTS, 6, 40, 1.0, EOS, noise=noise)  # leaves behind what is not a number, in all rows
    for p, q in zip(model.parameters(), other.parameters()):
        p.data.copy_(q)
    again = sample(model, PROMPTS, 6, 40, 1.0, EOS, noise=noise)
    assert again == fresh(PROMPTS, 6, 40, 1.0, EOS, noise=noise) != first
    few = noise[2:4, :2, :7]
    assert sample(model, PROMPTS[1:3], 2, 7, 0.5, EOS, noise=few) == fresh(PROMPTS[1:3], 2, 7, 0.5, EOS, noise=few)
    assert sample(model, PROMPTS, 1, 40, 0.0, EOS) == fresh(PROMPTS, 1, 40, 0.0, EOS)
    rollout.release(model)  # a GPU's memory is what it is about
    assert rollout.BUFFERS[model] is s and [x.data_ptr() for x in every] == addresses
    assert sample(model, PROMPTS, 7, 41, 1.0, {V - 1}, torch.Generator().manual_seed(0)) == fresh(PROMPTS, 7, 41, 1.0, {V - 1}, torch.Generator().manual_seed(0))
    assert rollout.BUFFERS[model] is not s  # they were too small


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Mistral"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_never_asks_what_a_tensor_holds_and_needs_none_from_elsewhere(narrow, architecture, temperature):
    """As a CUDA graph demands. On the meta device tensors hold nothing: to look at one, or to mix it with one on the CPU, is an error."""
    model = narrow(architecture).to("meta")
    keys = torch.zeros(2, 2, 9, 8, device="meta")
    s = rollout.RowCache(SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=keys)] * 2), 6, 32, 20, EOS)
    rollout.advance(model, s, 4, 16, temperature)
    assert s.token.device.type == "meta"
    with pytest.raises(RuntimeError):
        s.ended.sum().item()  # such as this
    with pytest.raises(RuntimeError):
        s.who + torch.arange(6)  # or this


def test_completions_are_the_same_if_a_step_leaves_nothing_behind_but_in_the_buffers(narrow, monkeypatch):
    """As a CUDA graph does, which runs no Python when it is replayed."""
    monkeypatch.setattr(rollout, "apart", lambda device: True)
    model, sizes, noise = narrow(dtype=torch.float64), decoded(monkeypatch), uniforms(len(PROMPTS), 6, 40, torch.Generator().manual_seed(3))
    want = sample(model, PROMPTS, 6, 40, 1.0, EOS, noise=noise)
    decode = rollout.decode

    def replayed(model, s, *arguments):
        before = dict(vars(s))
        decode(model, s, *arguments)
        vars(s).update(before)

    monkeypatch.setattr(rollout, "decode", replayed)
    assert sample(model, PROMPTS, 6, 40, 1.0, EOS, noise=noise) == want and len(set(sizes)) > 2


def test_buffers_go_with_their_model(narrow):
    before = len(rollout.BUFFERS)
    model = narrow()
    sample(model, PROMPTS, 1, 3, 0.0, EOS)
    assert len(rollout.BUFFERS) == before + 1
    del model
    gc.collect()
    assert len(rollout.BUFFERS) <= before


@pytest.mark.parametrize("n", [1, 2, 7, 512])
def test_rows_leave_when_a_quarter_of_them_is_idle_and_batches_come_in_few_sizes(n):
    sizes = {rollout.rows_for(n, alive) for alive in range(1, n + 1)}
    assert rollout.rows_for(n, 0) == 0
    assert all(alive <= rollout.rows_for(n, alive) for alive in range(1, n + 1)) and n in sizes and 1 in sizes
    assert all(rollout.rows_for(n, alive) * 3 // 4 < alive for alive in range(1, n + 1))
    assert len(sizes) <= 22 and all(rollout.rows_for(size, 1) == 1 for size in sizes)


# ---------------------------------------------------------------- where a completion ends


def test_each_of_several_end_of_sequence_ids_ends_a_completion_and_is_its_last_id(model):
    noise = uniforms(len(PROMPTS), 8, 30, torch.Generator().manual_seed(3))
    endless = sample(model, PROMPTS, 8, 30, 1.0, {V + 1}, noise=noise)  # an id that no token has
    assert all(len(c) == 30 for group in endless for c in group)
    completions = sample(model, PROMPTS, 8, 30, 1.0, EOS, noise=noise)
    assert completions == [[cut(c, EOS) for c in group] for group in endless]
    assert {c[-1] for group in completions for c in group} > EOS  # both occur, and truncated ones as well


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_a_completion_that_does_not_end_has_max_new_tokens_ids(model, limit):
    noise = uniforms(len(PROMPTS), 8, 7, torch.Generator().manual_seed(3))[:, :, :limit]
    completions = [c for group in sample(model, PROMPTS, 8, limit, 1.0, EOS, noise=noise) for c in group]
    assert all(1 <= len(c) <= limit and not set(c[:-1]) & EOS for c in completions)
    assert all(c[-1] in EOS for c in completions if len(c) < limit) and any(c[-1] not in EOS for c in completions)


def test_end_of_sequence_inside_a_prompt_ends_nothing(model):
    model.config.pad_token_id = 5
    assert len({len(c) for c in sample(model, [[5, 11, 5]], 50, 20, 1.0, EOS, torch.Generator().manual_seed(0))[0]}) > 3


def test_an_empty_prompt_is_an_error_and_no_prompts_are_no_completions(model):
    with pytest.raises(ValueError, match="prompt"):
        sample(model, [[1, 2], []], 2, 5, 1.0, EOS)
    assert sample(model, [], 2, 5, 1.0, EOS) == []


# ---------------------------------------------------------------- the embedded policy


@pytest.fixture(scope="module")
def tiny():
    return load_policy(TINY, dtype=torch.float64)


def test_the_embedded_policy_completes_as_transformers_does(tiny):
    from arithmetic import problems

    model, tokenizer, eos_ids = tiny
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in problems("heldout", 12)]
    mine = sample(model, prompts, 1, 40, 0.0, eos_ids)
    assert mine == greedy_by_transformers(model, prompts, 40, eos_ids)
    assert all(c[0][-1] in eos_ids and len(c[0]) < 40 for c in mine)
    assert all("\\boxed{" in tokenizer.decode(c[0]) for c in mine)


def test_the_demonstration_shows_samples_of_the_embedded_policy(capsys):
    rollout.main()
    assert capsys.readouterr().out.count("\\boxed{") > 8
