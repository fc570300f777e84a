"""What rollout.py promises: the model's own distribution, whatever surrounds a completion, or a refusal."""

import copy
import gc
import itertools
import json
import shutil

import pytest
import torch
import transformers
from conftest import ROOT, chi_square, generate, narrow, plain_scores

import rollout
from data import UserError
from entropy import score
from rollout import load_policy, next_token, sample

V = 24
EOS = {5, 11}
PROMPTS = [[3, 1, 4, 1, 5], [2], list(range(24)) + list(range(9)), [5, 11, 5], [7, 8] * 16]  # 1 to 33 ids


def noise_for(prompts, n, T):
    return torch.rand(prompts, n, T, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def grain(request, monkeypatch):
    """Both ways in which rows leave and lengths are rounded up."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(rollout, "GRAIN_ON_CPU", (3, 4, 16))


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Mistral", "Phi", "GPTNeoX", "Doge"])
def test_greedy_completions_equal_those_of_transformers_whatever_the_lengths(architecture):
    model = narrow(architecture, torch.float64, seed=5)
    for eos_ids in (EOS, {V - 1}):
        mine = sample(model, PROMPTS, 1, 40, 0.0, eos_ids)
        assert mine == generate(model, PROMPTS, 40, eos_ids)
    assert len({tuple(c[0]) for c in mine}) > 3 and max(len(set(c[0])) for c in mine) > 3
    assert sample(model, PROMPTS, 3, 40, 0.0, eos_ids) == [group * 3 for group in mine]


# ---------------------------------------------------------------- the distribution


def every_completion(vocabulary, eos_ids, length):
    """Every completion there can be: ended by an end-of-sequence id, or of `length` ids without one."""
    for n in range(1, length + 1):
        for ids in itertools.product(range(vocabulary), repeat=n):
            if not set(ids[:-1]) & eos_ids and (ids[-1] in eos_ids or n == length):
                yield list(ids)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
@torch.no_grad()
def test_completions_come_as_often_as_their_scores_say(temperature):
    model, prompt, n = narrow(dtype=torch.float64, vocab_size=4, seed=1), [2, 0, 3], 6000
    every = list(every_completion(4, {0}, 3))
    drawn = sample(model, [prompt, [1]], n, 3, temperature, {0}, torch.Generator().manual_seed(0))[0]
    counts = [drawn.count(ids) for ids in every]
    assert sum(counts) == n  # nothing else was drawn
    exact = plain_scores(model, [prompt] * len(every), every, temperature)[0].sum(1).exp()
    assert exact.sum().item() == pytest.approx(1) and chi_square(counts, exact * n) > 1e-3
    logp, H = score(model, [prompt] * len(every), every, temperature)
    assert torch.allclose(logp.sum(1).exp(), exact.float(), rtol=1e-4)
    assert -(exact * logp.sum(1)).sum().item() == pytest.approx((exact * H.sum(1)).sum().item(), rel=1e-4)
    hotter = score(model, [prompt] * len(every), every, temperature * 1.3)[0].sum(1).double().exp()
    assert chi_square(counts, hotter / hotter.sum() * n) < 1e-6  # the test would notice


@torch.no_grad()
def test_no_token_is_cut_off_whatever_the_generation_config_lists():
    model, n = narrow(dtype=torch.float64, vocab_size=80, seed=2), 30_000
    model.generation_config.update(top_k=5, top_p=0.3, min_p=0.1, repetition_penalty=1.3, temperature=0.2)
    p = torch.softmax(model(torch.tensor([[3, 1]])).logits[0, -1], -1)
    drawn = torch.tensor(sample(model, [[3, 1]], n, 1, 1.0, {0}, torch.Generator().manual_seed(0))[0])[:, 0]
    assert chi_square(torch.bincount(drawn, minlength=80), p * n) > 1e-3


def test_what_has_no_probability_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    u = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-24])
    assert next_token(logits.expand(4, 5), 1.0, u).tolist() == [1, 1, 3, 3]
    logits = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, -9:] = -torch.inf  # sums of so many differ from 1 by more than the last random number does
    assert next_token(logits, 1.0, torch.full((200,), 1 - 2**-24)).max() < 3000 - 9


# ---------------------------------------------------------------- random numbers and neighbours


def test_a_generator_makes_completions_reproducible_and_moves_on_by_as_much_whatever_is_drawn(model):
    before, made = torch.get_rng_state(), []
    for policy, eos_ids, seed in (model, EOS, 7), (model, EOS, 7), (model, EOS, 8), (narrow(seed=3), {0}, 7):
        generator = torch.Generator().manual_seed(seed)
        made.append((sample(policy, PROMPTS, 4, 12, 1.0, eos_ids, generator), generator.get_state().tolist()))
    assert made[0] == made[1] and made[0][0] != made[2][0] and made[0][1] == made[3][1]
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


@pytest.mark.parametrize("architecture", ["Qwen2", "Phi"])
def test_a_completion_does_not_depend_on_the_rest_of_the_batch_nor_on_its_order(architecture, grain):
    model, noise, order = narrow(architecture, torch.float64), noise_for(5, 6, 40), [3, 0, 4, 2, 1]
    together = sample(model, PROMPTS, 6, 40, 1.0, EOS, noise=noise)
    for i, prompt in enumerate(PROMPTS):
        own = [noise[i : i + 1, j : j + 1] for j in range(6)]
        assert [sample(model, [prompt], 1, 40, 1.0, EOS, noise=u)[0][0] for u in own] == together[i]
    shuffled = sample(model, [PROMPTS[i] for i in order], 6, 40, 1.0, EOS, noise=noise[order])
    assert shuffled == [together[i] for i in order]
    assert len({len(c) for group in together for c in group}) > 8


def test_rows_that_have_ended_leave(grain, monkeypatch):
    sizes, decode = [], rollout.decode

    def spy(model, rows, n, length, temperature):
        sizes.append((n, int((rows.ended[:n] == 0).sum())))
        decode(model, rows, n, length, temperature)

    monkeypatch.setattr(rollout, "decode", spy)
    completions = sum(sample(narrow(), PROMPTS, 20, 40, 1.0, EOS, noise=noise_for(5, 20, 40)), [])
    look, some, _ = rollout.GRAIN_ON_CPU
    assert len(sizes) == max(map(len, completions)) - 1 or look > 1
    for t, (n, alive) in enumerate(sizes, 1):
        assert alive == sum(len(c) > t for c in completions) and (t % look or n < alive + some)
    assert len({n for n, _ in sizes}) > 4


# ---------------------------------------------------------------- where a completion ends


@pytest.mark.parametrize("limit", [1, 2, 30])
def test_each_end_of_sequence_id_ends_a_completion_and_is_its_last_id_else_it_is_truncated(model, limit):
    noise = noise_for(5, 8, 30)[:, :, :limit]
    endless = sample(model, PROMPTS, 8, limit, 1.0, {V + 1}, noise=noise)  # an id that no token has
    ended = sample(model, PROMPTS, 8, limit, 1.0, EOS, noise=noise)
    for whole, c in zip(sum(endless, []), sum(ended, [])):
        assert len(whole) == limit and c == whole[: len(c)] and not set(c[:-1]) & EOS
        assert c[-1] in EOS or len(c) == limit
    assert {c[-1] for c in sum(ended, [])} > EOS  # both occur, and truncated ones as well


def test_an_empty_prompt_is_an_error_and_no_prompts_are_no_completions(model):
    with pytest.raises(ValueError, match="prompt"):
        sample(model, [[1, 2], []], 2, 5, 1.0, EOS)
    assert sample(model, [], 2, 5, 1.0, EOS) == []


# ---------------------------------------------------------------- buffers and recorded steps


def test_buffers_stay_where_they_are_serve_other_prompts_and_new_weights_and_go_with_their_model():
    model, other = narrow(dtype=torch.float64), narrow(dtype=torch.float64, seed=9)

    def both(*arguments, **more):
        mine = sample(model, *arguments, **more)
        assert mine == sample(copy.deepcopy(model), *arguments, **more)  # which has no buffers yet
        return mine

    noise = noise_for(5, 6, 40)
    first = both(PROMPTS, 6, 40, 1.0, EOS, noise=noise)
    rows = rollout.BUFFERS[model]
    for p in model.parameters():
        p.data.fill_(torch.nan)
    sample(model, PROMPTS, 6, 40, 1.0, EOS, noise=noise)  # leaves NaN behind in all rows
    for p, q in zip(model.parameters(), other.parameters()):
        p.data.copy_(q)
    assert both(PROMPTS, 6, 40, 1.0, EOS, noise=noise) != first
    both(PROMPTS[1:3], 2, 7, 0.5, EOS, noise=noise[2:4, :2, :7])
    rollout.release(model)  # gives back a GPU's memory only
    assert rollout.BUFFERS[model] is rows
    both(PROMPTS, 7, 41, 1.0, {V - 1}, noise=noise_for(5, 7, 41))
    assert rollout.BUFFERS[model] is not rows  # they were too small
    count = len(rollout.BUFFERS)
    del model, both
    gc.collect()
    assert len(rollout.BUFFERS) < count


def replays(step, pool):
    """As a CUDA graph: the step's work on tensors, but nothing that Python does besides."""
    rows = step.args[1]

    def replay():
        before = dict(vars(rows))
        step()
        vars(rows).update(before)

    return replay


def fails(step, pool):
    raise RuntimeError("operation not permitted when stream is capturing\nand more lines")


def differs(step, pool):
    rows = step.args[1]

    def replay():
        noise = rows.noise.clone()
        rows.noise.fill_(0.5)
        step()
        rows.noise.copy_(noise)

    return replay


RECORDERS = {replays: "", fails: "not permitted", differs: "other tokens"}


@pytest.mark.parametrize("recorder, warning", RECORDERS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_recorded_step_changes_no_token_and_one_that_fails_or_differs_is_given_up_in_one_line(
    model, recorder, warning, monkeypatch, capsys
):
    noise = noise_for(5, 6, 40)
    want = sample(copy.deepcopy(model), PROMPTS, 6, 40, 1.0, EOS, noise=noise)
    monkeypatch.setattr(rollout, "GRAIN_ON_CPU", (4, 8, 16))
    monkeypatch.setitem(rollout.RECORD, "cpu", recorder)
    for _ in range(2):
        assert sample(model, PROMPTS, 6, 40, 1.0, EOS, noise=noise) == want
    said = capsys.readouterr().err
    assert said.count("\n") == bool(warning) and warning in said
    assert len(rollout.BUFFERS[model].graphs) > 3 or warning
    assert ("cpu" in rollout.RECORD) == (not warning)


# ---------------------------------------------------------------- loading


@pytest.fixture
def checkpoint(tmp_path):
    """A function that saves a model with the embedded tokenizer: the folder."""

    def save(model, **files):
        model.save_pretrained(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(ROOT / "tiny" / name, tmp_path)
        for name, changes in files.items():
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path

    return save


def refusal(folder):
    with pytest.raises(UserError) as error:
        load_policy(str(folder))
    assert str(error.value).startswith(f"--model {folder}: ") and "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_with_qwens_tokenizer_loads_in_fp32_without_dropout_and_with_both_its_ends(qwen_checkpoint):
    model, tokenizer, eos_ids = load_policy(str(qwen_checkpoint))
    assert eos_ids == {151645, 151643} and tokenizer.eos_token_id == 151645
    chat = [{"role": "user", "content": "1+1?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert 151645 in ids  # it stands in every chat prompt, and ends nothing there
    assert [len(c) for c in sample(model, [ids], 2, 4, 1.0, eos_ids, noise=noise_for(1, 2, 4))[0]] == [4, 4]
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("listed, ends", [
    (3, {3, 1}), ([3, 1], {3, 1}), (None, {1}), ([], None), (-1, None), (V, None), ([3, V], None),
])  # fmt: skip
def test_a_completion_ends_with_the_ids_of_generation_config_and_tokenizer_if_all_are_tokens(
    checkpoint, listed, ends
):
    folder = checkpoint(narrow(), generation_config={"eos_token_id": listed}, config={"eos_token_id": None})
    if ends is None:
        assert "eos_token_id" in refusal(folder)
    else:
        assert load_policy(str(folder))[2] == ends  # 1 is the tokenizer's


SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=1)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("architecture, config, reason", [
    ("Mistral", {"sliding_window": 8}, "sliding_attention"),
    ("Gemma3", {"text_config": SHAPE | {"bos_token_id": 2}, "vision_config": VISION}, "sliding_attention"),
    ("Qwen3Next", HYBRID, "linear_attention"),
    ("Granite", {"logits_scaling": 8.0}, "logits"), ("Cohere", {}, "logits"), ("NanoChat", {}, "logits"),
    ("Llama", {"rope_parameters": DYNAMIC}, "dynamic"),
    ("Llama", {"rope_parameters": DYNAMIC | LONGROPE}, "longrope"),
    ("Llama", {"vocab_size": 9}, "9 embeddings"),
])  # fmt: skip
def test_a_model_that_would_be_sampled_or_scored_wrongly_is_refused(checkpoint, architecture, config, reason):
    config = getattr(transformers, architecture + "Config")(**SHAPE | config)
    assert reason in refusal(checkpoint(transformers.AutoModelForCausalLM.from_config(config)))


def test_parameters_of_mixed_dtypes_are_refused(checkpoint):
    model, tokenizer, _ = load_policy(str(checkpoint(narrow())))
    model.lm_head.bfloat16()
    with pytest.raises(UserError, match="mixed dtypes: torch.bfloat16, torch.float32"):
        rollout.check_parts(model, tokenizer, set())
