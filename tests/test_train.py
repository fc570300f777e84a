"""train.py: one exact step, metrics that are what their names say, and whole runs.

For a step a narrow policy with random weights suffices, rewarded for nonsense. Whole runs take the embedded
policy.
"""

import copy
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import narrow, plain_scores, subprocess_of
from safetensors.torch import load_file

import data
import losses
import parallel
import reward
import rollout
import train
from losses import METHODS
from rollout import TINY, load_policy

ACTING = ["clip_cov", "kl_cov", "high_entropy", "low_entropy", "entrocraft"]  # they select tokens
EOS = 1  # of the embedded tokenizer
KEYS = """step reward entropy entropy_seq covariance selected clip_fraction ratio_max loss grad_norm lr
strength completion_length truncated no_signal skipped updates tokens seconds""".split()
# Four completions for each of four problems: 1 to 12 tokens, some without an end, padding ids (0) inside.
UNEVEN = [
    [5, 6, EOS], [7, EOS], [EOS], [3] * 12, [4, 0, 0, EOS], [9, 9, 9, EOS], [8, EOS], [2] * 11 + [EOS],
    [6] * 12, [6] * 9 + [EOS], [3, 4, 5, EOS], [EOS], [7, 7, EOS], [7, 8, EOS], [9, EOS], [10, 11, EOS],
]  # fmt: skip
COUNT = sum(map(len, UNEVEN))


@pytest.fixture(scope="module")
def novice(tmp_path_factory):
    """A checkpoint folder: the embedded tokenizer and random weights; training problems, a held-out one."""
    folder = tmp_path_factory.mktemp("novice")
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    narrow(vocab_size=17, hidden_size=16, head_dim=4, num_hidden_layers=1, max_position_embeddings=128,
           eos_token_id=EOS, tie_word_embeddings=True).save_pretrained(folder)  # fmt: skip
    rows = [{"problem": f"\\boxed{{{i}+1=", "answer": str(i + 1)} for i in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "heldout.jsonl").write_text('{"problem": "\\\\boxed{5+2=", "answer": "7"}\n')
    return folder


@pytest.fixture
def options(novice, tmp_path):
    """options(method, "--lr 1 ..."): options for the novice and small batches."""

    def parse(method="grpo", more=""):
        files = f"--model {novice} --data {novice}/train.jsonl --eval-data {novice}/heldout.jsonl"
        small = "--prompts 4 --mini-batch 2 --samples 4 --max-new-tokens 12 --lr 1e-2 --device cpu"
        argv = f"--method {method} {files} {small} --out {tmp_path}/run {more}"
        return train.options(argv.split())

    return parse


@pytest.fixture
def graded(monkeypatch):
    """graded(rule): completions are rewarded by a function of their texts, here 1 for an even length."""

    def by(rule):
        monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [float(r) for r in rule(texts)])

    by(lambda texts: [len(text) % 2 == 0 for text in texts])
    return by


@pytest.fixture
def updates(monkeypatch):
    """Every update of a step: its mini-batch, Tokens, Loss, log, and dL/dlogp (B, T)."""
    kept, slopes, update, backward = [], [], train.update, parallel.backward

    def spy(policy, batch, *rest):
        t, loss, log = update(policy, batch, *rest)
        kept.append(SimpleNamespace(batch=batch, t=t, loss=loss, log=log, dlogp=slopes[-1]))
        return t, loss, log

    def spy_backward(model, batch, dlogp, *rest):
        slopes.append(dlogp.clone())
        return backward(model, batch, dlogp, *rest)

    monkeypatch.setattr(train, "update", spy)
    monkeypatch.setattr(parallel, "backward", spy_backward)
    return kept


def step(o, number=1, loaded=None):
    """One step of a fresh policy, or of the one given: its metrics."""
    policy, problems, _ = loaded or train.load(o)
    return train.step(policy, train.problems_of_step(problems, number - 1, o), number, o)[0]


@pytest.fixture
def draws(monkeypatch):
    """draws(completions): all rollouts are these; at first the uneven ones."""

    def these(completions):
        monkeypatch.setattr(train, "draw_rollouts", lambda *_: [list(c) for c in completions])

    these(UNEVEN)
    return these


def weights(policy):
    return [p.detach().clone() for p in policy.model.parameters()]


def unchanged(policy, before):
    return all(torch.equal(p, b) for p, b in zip(policy.model.parameters(), before))


# ---------------------------------------------------------------- the ratio, the mask, the mean


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", ["", "--temperature 0.7 --micro-batch 40"])
def test_the_ratio_is_exactly_1_on_the_first_mini_batch_only(options, graded, updates, method, more):
    step(options(method, more))
    first, later = updates
    assert (first.t.ratio == 1).all() and first.log["ratio_max"] == 1
    assert torch.equal(first.t.logp, first.batch.old_logp)
    assert (later.t.ratio != 1).any() and later.log["ratio_max"] > 1


@pytest.mark.parametrize("noise", [1e-6, math.nan])
def test_old_log_probs_of_another_computation_stop_the_run(options, graded, monkeypatch, noise):
    score, calls = parallel.score, itertools.count()

    def noisy(*arguments):
        logp, entropy = score(*arguments)
        return logp + (noise if next(calls) else 0.0) * (logp != 0), entropy  # the first call is right

    monkeypatch.setattr(parallel, "score", noisy)
    with pytest.raises(RuntimeError, match="first ratio is not 1"):
        step(options())


def test_every_token_is_in_the_loss_the_last_too_and_no_id_is_padding(options, graded, updates, draws):
    """Also completions that were cut off, and one that is only the end of sequence."""
    graded(lambda texts: [i % 3 == 0 for i in range(16)])
    metrics = step(options("grpo", "--lr 1e-6"))  # small: a token that PPO's clip silences has no gradient
    for u in updates:
        assert u.t.mask.sum(1).tolist() == [len(c) for c in u.batch.completions]
        assert torch.equal(u.dlogp != 0, u.t.mask)
    assert metrics["tokens"] == COUNT and metrics["truncated"] == 2 / 16


def test_the_denominator_is_the_number_of_tokens_of_the_whole_mini_batch(options, updates, graded, draws):
    """The second problem's group has equal rewards: its tokens have no gradient, but they count."""
    graded(lambda texts: [i in (0, 3, 8, 13) for i in range(16)])
    step(options("grpo", "--micro-batch 20"))
    first, count = updates[0], sum(map(len, UNEVEN[:8]))
    torch.testing.assert_close(first.dlogp, -first.batch.advantages / count, rtol=1e-6, atol=0)
    assert (first.dlogp[4:] == 0).all() and (first.dlogp[:4][first.t.mask[:4]] != 0).all()


def test_completions_are_graded_by_their_problem_and_compared_within_it(options, updates, monkeypatch):
    asked, values = [], [1.0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1]
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: asked.extend(answers) or values)
    o = options()
    loaded = train.load(o)
    step(o, 1, loaded)
    assert asked == [answer for _, answer in train.problems_of_step(loaded[1], 0, o) for _ in range(4)]
    advantages = torch.cat([u.batch.advantages[:, 0] for u in updates])
    assert torch.equal(advantages, losses.group_advantages(torch.tensor(values).view(4, 4)).flatten())


# ---------------------------------------------------------------- no signal


@pytest.mark.parametrize("method", METHODS)
def test_a_mini_batch_without_signal_leaves_every_parameter_bit_identical(options, graded, updates, method):
    """Even with momentum from before. Entropy and distance to the start are a signal of their own."""
    more = "--passes 2 --kl-cov-ratio 0.5 --kl-cov-low 0 --clip-cov-ratio 0.5 --cov-low 0 --entropy-target 9"
    o = options(method, more)
    loaded = train.load(o)
    start = weights(loaded[0])
    step(o, 1, loaded)
    assert not unchanged(loaded[0], start)
    graded(lambda texts: [0.7] * len(texts))
    before = weights(loaded[0])
    metrics = step(o, 2, loaded)
    assert metrics["no_signal"] == 1 and metrics["skipped"] == 0 and metrics["reward"] == pytest.approx(0.7)
    if method in ("entropy_bonus", "kl_ref", "adaptive_entropy"):
        assert metrics["grad_norm"] > 0
        return
    assert unchanged(loaded[0], before)
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0 and metrics["ratio_max"] == 1
    assert method not in ("kl_cov", "clip_cov") or metrics["selected"] == 0


@pytest.mark.parametrize("broken", [math.nan, 1e30])  # of 1e30 the gradients are finite and their norm is not
def test_an_update_that_is_not_finite_is_skipped_and_counted(options, graded, monkeypatch, broken):
    o = options()
    loaded = train.load(o)
    step(o, 1, loaded)  # for momentum
    bad = lambda t, o: losses.Loss(broken * t.ratio * t.advantages)
    monkeypatch.setitem(METHODS, "grpo", bad)
    before, moments = weights(loaded[0]), copy.deepcopy(loaded[0].optimizer.state_dict()["state"])
    metrics = step(o, 2, loaded)
    assert unchanged(loaded[0], before) and metrics["skipped"] == metrics["updates"] == 2
    after = loaded[0].optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i][name], after[i][name]) for i in moments for name in moments[i])


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_plain_numbers_and_sums_over_counts(options, graded, updates, draws, method):
    more = "--clip-cov-ratio 0.2 --cov-low 0.05 --kl-cov-ratio 0.2 --kl-cov-low 0"
    m = step(options(method, f"--mini-batch 1 --lr 0.3 --passes 2 {more}"))
    assert set(m) == set(KEYS) and set(m["seconds"]) == {"sample", "reward", "score", "update", "total"}
    assert all(type(value) in (int, float) for key, value in m.items() if key != "seconds")
    tokens = sum(u.t.mask.sum().item() for u in updates)
    share = lambda sets: sum(s.sum().item() for s in sets if s is not None) / tokens
    assert m["covariance"] == pytest.approx(share([u.t.covariance for u in updates]))
    assert m["selected"] == pytest.approx(share([u.loss.selected for u in updates]))
    assert (m["selected"] > 0.01) == (method in ACTING)
    clipped = [u.loss.clipped if u.loss.kept is None else u.loss.clipped & u.loss.kept for u in updates]
    assert m["clip_fraction"] == pytest.approx(share(clipped))
    assert (m["clip_fraction"] > 0.01) == (method != "kl_cov")
    assert m["ratio_max"] == max(u.t.ratio[u.t.mask].max().item() for u in updates) > 1.2
    for key in ("loss", "grad_norm"):
        assert m[key] == pytest.approx(sum(u.log[key] for u in updates) / 8)
    assert m["tokens"] == COUNT and m["completion_length"] == COUNT / 16 and m["updates"] == 8
    assert len({u.t.generator.initial_seed() for u in updates}) == 8  # each chooses by its own random numbers
    tokenizer = load_policy(TINY)[1]
    texts = tokenizer.batch_decode(UNEVEN, skip_special_tokens=True)
    assert m["reward"] == sum(len(text) % 2 == 0 for text in texts) / 16


def test_entropy_is_exact_and_a_mean_over_tokens(options, graded, updates, draws):
    """At temperature 1 and at that of sampling; entropy_seq is the mean of the means of completions.

    Log-probs are at the temperature of sampling.
    """
    o = options("grpo", "--temperature 0.5")
    m, model = step(o), train.load(o)[0].model
    for key, temperature in (("entropy", 1.0), ("entropy_sampling", 0.5)):
        scored = [plain_scores(model, u.batch.prompts, u.batch.completions, temperature) for u in updates]
        assert m[key] == pytest.approx(sum(H.sum().item() for _, H in scored) / COUNT, rel=1e-5)
        if temperature == 1:
            means = [(H.sum(1) / u.batch.mask.sum(1)).sum().item() for (_, H), u in zip(scored, updates)]
            assert m["entropy_seq"] == pytest.approx(sum(means) / 16, rel=1e-5)
    for (logp, _), u in zip(scored, updates):
        torch.testing.assert_close(u.batch.old_logp, logp.detach(), rtol=1e-4, atol=1e-4)
    assert m["entropy"] > m["entropy_sampling"] + 0.1 and abs(m["entropy"] - m["entropy_seq"]) > 1e-4


def test_the_logged_learning_rate_is_the_one_that_trains_and_the_norm_that_before_clipping(options, graded):
    o = options("grpo", "--lr 0.005 --mini-batch 4 --grad-clip 0.001")
    loaded = train.load(o)
    before = weights(loaded[0])
    m = step(o, 1, loaded)
    moved = max((p - b).abs().max().item() for p, b in zip(loaded[0].model.parameters(), before))
    assert m["lr"] == 0.005 == pytest.approx(moved, rel=0.01)  # the length of Adam's first step
    norm = torch.stack([p.grad.norm() for p in loaded[0].model.parameters()]).norm().item()
    assert norm == pytest.approx(0.001, rel=1e-3) and m["grad_norm"] > 0.01


# ---------------------------------------------------------------- annealing


@pytest.mark.parametrize("anneal, expected", [(4, [1, 0.75, 0.5, 0.25, 0, 0]), (0, [1] * 6)])
def test_the_strength_falls_linearly_to_0_or_is_constant(options, graded, anneal, expected):
    o = options("kl_cov", f"--anneal {anneal}")
    loaded = train.load(o)
    assert [step(o, n, loaded)["strength"] for n in range(1, 7)] == expected


# ---------------------------------------------------------------- problems and randomness


def test_prompts_too_long_and_held_out_problems_are_dropped_and_counted(options, novice, tmp_path, capsys):
    """A box, the digits of 0 to 19, and three characters: half of the prompts have 5 tokens and half 6."""
    both = tmp_path / "both.jsonl"
    both.write_text((novice / "train.jsonl").read_text() + (novice / "heldout.jsonl").read_text())
    policy, problems, _ = train.load(options("grpo", f"--max-prompt-tokens 5 --data {both}"))
    kept = [(policy.tokenizer.decode(ids), answer) for ids, answer in problems]
    assert kept == [(f"\\boxed{{{i}+1=", str(i + 1)) for i in range(10)]  # each with its own answer
    assert "10 problems (1 dropped as held-out, 10 as too long)" in capsys.readouterr().out


def test_a_held_out_prompt_that_does_not_fit_scores_0(options, monkeypatch):
    policy, problems, _ = train.load(options())
    monkeypatch.setattr(reward, "grade_all", lambda texts, answers: [1.0] * len(texts))
    rewards = train.evaluate(policy, [problems[0], (None, "1"), problems[1]], 2, 1.0, options())
    assert rewards.tolist() == [[1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize("count, batch", [(7, 3), (8, 4), (3, 8), (4, 1)])
def test_every_problem_comes_once_in_each_epoch_in_an_order_of_the_seed(options, count, batch):
    o, other, problems = options(), options("grpo", "--seed 1"), list(range(count))
    o.prompts = other.prompts = batch
    order = lambda o: [p for n in range(40) for p in train.problems_of_step(problems, n, o)]
    epochs = [order(o)[i : i + count] for i in range(0, 40 * batch - count + 1, count)]
    assert all(sorted(epoch) == problems for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert order(o) == order(o) != order(other)


@pytest.mark.parametrize("method", ["clip_cov", "kl_ref"])
def test_a_step_neither_draws_from_nor_depends_on_the_global_random_state(options, graded, method):
    o, results = options(method, "--clip-cov-ratio 0.2 --cov-low 0.01"), []
    for seed in (1, 2):
        loaded = train.load(o)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        metrics = step(o, 1, loaded)
        train.evaluate(loaded[0], loaded[2], 2, 1.0, o)
        assert torch.equal(torch.get_rng_state(), before)
        metrics.pop("seconds")
        results.append((metrics, [p.tolist() for p in loaded[0].model.parameters()]))
    assert results[0] == results[1]


def test_every_step_draws_other_completions_however_many_at_a_time(options):
    policy, problems, _ = train.load(options())
    prompts = [ids for ids, _ in problems[:3]]
    at_once = [options("grpo", f"--sample-batch {count}") for count in (1, 8, 4096)]
    drawn = [train.draw_rollouts(policy, prompts, 1, o) for o in at_once]
    assert drawn[0] == drawn[1] == drawn[2] != train.draw_rollouts(policy, prompts, 2, at_once[2])
    assert len(set(map(tuple, drawn[0][:4]))) > 1  # the samples of one prompt


# ---------------------------------------------------------------- precision and memory


def test_weights_and_moments_are_fp32_so_an_update_too_small_for_bf16_is_kept(options, graded):
    o = options("grpo", "--lr 1e-6 --mini-batch 4")
    loaded = train.load(o)
    before = weights(loaded[0])
    step(o, 1, loaded)
    pairs = list(zip(loaded[0].model.parameters(), before))
    moved = sum((p != b).sum().item() for p, b in pairs)
    assert moved > 20 * sum((p.bfloat16() != b.bfloat16()).sum().item() for p, b in pairs)
    moments = [x for state in loaded[0].optimizer.state.values() for x in state.values()]
    assert {x.dtype for x in [*moments, *weights(loaded[0])]} == {torch.float32}


def test_with_precision_bf16_a_copy_in_bf16_samples_and_follows_the_policy(options, graded):
    """As by default on a GPU; a CPU can do it, too, if more slowly."""
    plain = train.load(options())[0]
    assert plain.sampler is plain.model  # on a CPU there is only one
    o = options(more="--precision bf16")
    policy, problems, held_out = train.load(o)
    sampler = policy.sampler
    assert {p.dtype for p in sampler.parameters()} == {torch.bfloat16}
    assert sampler.lm_head.weight is sampler.model.embed_tokens.weight  # still tied
    assert {b.dtype for b in sampler.buffers()} == {torch.float32}  # the rotary frequencies are not rounded
    for use in (lambda: train.draw_rollouts(policy, [[2, 3]], 1, o),
                lambda: train.evaluate(policy, held_out, 1, 0.0, o)):  # fmt: skip
        torch._foreach_add_([p.data for p in policy.model.parameters()], 0.1)
        use()
        for mine, theirs in zip(sampler.parameters(), policy.model.parameters()):
            assert theirs.dtype == torch.float32 and torch.equal(mine, theirs.bfloat16())


def test_with_precision_bf16_products_are_rounded_and_weights_are_not(options, graded, draws):
    """Old and new log-probs still come from one computation: train.update checks it in every step."""
    lines, moved = {}, {}
    for precision in ("fp32", "bf16"):
        o = options("kl_cov", f"--precision {precision} --lr 1e-4")
        loaded = train.load(o)
        before = weights(loaded[0])
        lines[precision] = step(o, 1, loaded)
        moved[precision] = [p - b for p, b in zip(loaded[0].model.parameters(), before)]
        assert {p.dtype for p in loaded[0].model.parameters()} == {torch.float32}
    difference = lines["bf16"]["entropy"] - lines["fp32"]["entropy"]
    assert 0 < abs(difference) < 0.02 * lines["fp32"]["entropy"]
    one, other = (torch.cat([d.flatten() for d in moved[p]]) for p in ("fp32", "bf16"))
    assert torch.nn.functional.cosine_similarity(one, other, 0) > 0.7


# ---------------------------------------------------------------- --filter-groups


@pytest.fixture
def signals(monkeypatch):
    """signals([...]): which groups differ in their rewards, in the order of sampling. Returns the answers."""

    def of(groups):
        asked, left = [], iter(groups)

        def grade(texts, answers):
            asked.extend(answers[::4])
            return [float(i == 0 and signal) for _, signal in zip(answers[::4], left) for i in range(4)]

        monkeypatch.setattr(reward, "grade_all", grade)
        return asked

    return of


def test_rounds_follow_until_the_batch_is_full_of_groups_with_signal(options, signals, updates, monkeypatch):
    released = []
    monkeypatch.setattr(rollout, "release", released.append)
    asked = signals([0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0])  # 1, 2 and 5 with signal after each round
    o = options("grpo", "--filter-groups --advantage rloo")
    loaded = train.load(o)
    m = step(o, 1, loaded)
    assert m["rounds"] == 3 and m["filtered"] == 7 and m["no_signal"] == pytest.approx(7 / 12)
    assert m["reward"] == pytest.approx(5 / 48)  # over all rollouts
    assert len(asked) == len(set(asked)) == 12 and released == [loaded[0].sampler]  # once, at the end
    ids = [ids for ids, _ in train.problems_of_step(loaded[1], 0, o)]
    kept = [u.batch.prompts[i] for u in updates for i in (0, 4)]
    assert kept == [ids[1], ids[4], ids[8], ids[9]]  # for the fifth there was no room
    for u in updates:
        assert u.batch.advantages[:, 0].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3] * 2)


def test_the_entropy_is_over_all_rollouts_also_those_that_are_dropped(options, signals):
    """The rollouts of three rounds, drawn again and scored by themselves."""
    signals([0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0])
    o = options("grpo", "--filter-groups")
    policy, problems, _ = train.load(o)
    drawn = SimpleNamespace(prompts=[], completions=[])
    for r in range(3):
        ids = [ids for ids, _ in train.problems_of_step(problems, 0, o)[4 * r : 4 * r + 4]]
        drawn.completions += train.draw_rollouts(policy, ids, f"1.{r}" if r else 1, o)
        drawn.prompts += [prompt for prompt in ids for _ in range(4)]
    _, entropy = parallel.score(policy.model, drawn, 1.0, o)
    m = step(o, 1, (policy, problems, None))
    tokens = sum(map(len, drawn.completions))
    assert m["tokens"] == tokens and m["completion_length"] == tokens / 48
    assert m["entropy"] == pytest.approx(entropy.sum().item() / tokens, rel=1e-5)


def test_after_ten_rounds_the_batch_is_what_was_found_even_if_nothing(options, signals, updates):
    o = options("kl_ref", "--filter-groups")
    loaded = train.load(o)
    signals([i in (3, 20, 39) for i in range(40)])
    m = step(o, 1, loaded)
    assert m["rounds"] == train.ROUNDS == 10 and m["filtered"] == 37
    assert [len(u.batch.rewards) for u in updates] == [8, 4]  # three groups: the last mini-batch is smaller
    before = weights(loaded[0])
    signals([0] * 40)
    m = step(o, 2, loaded)
    empty = {"covariance", "selected", "clip_fraction", "ratio_max", "loss", "grad_norm"}
    assert {key for key, value in m.items() if value is None} == empty
    assert m["filtered"] == 40 and m["entropy"] > 0 and m["skipped"] == m["updates"] == 0
    assert unchanged(loaded[0], before)


# ---------------------------------------------------------------- whole runs on the embedded task

SHORT = (
    "--prompts 8 --mini-batch 4 --samples 4 --eval-limit 12 --final-samples 4 --seed 5 --device cpu --lr 1e-3"
)


@pytest.fixture
def main(monkeypatch, command):
    """`python train.py ...` within this process, with few problems: (exit status, output, errors)."""
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))
    return lambda *argv: command(train.main, *SHORT.split(), *argv)


def lines(path):
    """The objects of a .jsonl file, which has no NaN."""
    refuse = lambda word: pytest.fail(f"{word} in {path}")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def check_run(run, method):
    """That a run directory of two steps is as design.md says."""
    names = "checkpoint config.json curves.png final.json metrics.jsonl model samples.jsonl"
    assert " ".join(sorted(file.name for file in run.iterdir())) == names
    config, final = (json.loads((run / name).read_text()) for name in ("config.json", "final.json"))
    assert config["method"] == method and config["lr"] == 1e-3 and config["processes"] == 1
    assert config["versions"]["torch"] == torch.__version__ and "commit" in config
    assert list(final["pass_at"]) == ["1", "4"] and final["accuracy_sampled"] == final["pass_at"]["1"]
    assert 0 <= final["accuracy"] <= 1 and final["pass_at"]["1"] <= final["pass_at"]["4"] <= 1
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    start, end = load_policy(TINY)[0].parameters(), load_policy(str(run / "model"))[0].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(start, end))
    for number, line in enumerate(lines(run / "metrics.jsonl"), 1):
        assert line["step"] == number <= 2 and set(KEYS) | {"accuracy", "accuracy_sampled"} == set(line)
        assert 0 <= line["accuracy"] <= 1 and 0 <= line["accuracy_sampled"] <= 1
        total = line["seconds"].pop("total")
        assert total == pytest.approx(sum(line["seconds"].values()))
    samples = lines(run / "samples.jsonl")
    assert len({line["prompt"] for line in samples if line["step"] == 1}) == 4  # all of the first mini-batch
    for line in samples:
        assert "".join(line["tokens"]).startswith(line["completion"]) and line["reward"] in (0.0, 1.0)
        count = len(line["tokens"])
        assert all(len(line[key]) == count for key in ("entropy", "covariance", "advantage"))
        assert all(0 <= i < count for i in line["selected"])
    assert any(line["selected"] for line in samples)


def test_a_run_as_a_command_of_its_own(tmp_path):
    """`python train.py --method kl_cov` from another folder: its output, its progress and its files."""
    argv = f"--method kl_cov --kl-cov-ratio 0.5 --kl-cov-low 0 --steps 2 --eval-every 1 {SHORT}".split()
    done = subprocess_of(*argv, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    run = tmp_path / "runs" / "kl_cov-s5"
    check_run(run, "kl_cov")
    for word in ("reward", "entropy", "cov", "accuracy"):
        assert re.search(rf"\b{word}=[+-]?\d", done.stderr)
    assert "loss" not in done.stderr + done.stdout  # which says nothing of how it goes
    last, (first, end) = done.stdout.strip().splitlines()[-1], lines(run / "metrics.jsonl")
    assert last.startswith("kl_cov, 2 steps") and "runs/kl_cov-s5/curves.png" in last
    assert f"entropy {first['entropy']:.3f} -> {end['entropy']:.3f} nats" in last


def test_evaluations_come_first_last_and_as_often_as_asked_and_a_run_can_be_overwritten(main, tmp_path):
    run = tmp_path / "run"
    for seed, steps, expected in ((5, 6, [1, 3, 5, 6]), (6, 2, [1, 2])):
        argv = ("--seed", seed, "--eval-every", 2, "--overwrite", "--steps", steps, "--out", run)
        assert main("--method", "grpo", *argv)[0] == 0
        assert [line["step"] for line in lines(run / "metrics.jsonl") if "accuracy" in line] == expected
        assert sorted({line["step"] for line in lines(run / "samples.jsonl")}) == expected
    assert json.loads((run / "config.json").read_text())["seed"] == 6


def test_with_filtering_a_step_goes_on_with_the_problem_after_the_last_one(main, tmp_path, monkeypatch):
    begun, real = [], train.problems_of_step
    spy = lambda problems, rounds, o: begun.append(rounds) or real(problems, rounds, o)
    monkeypatch.setattr(train, "problems_of_step", spy)
    assert main("--method", "grpo", "--filter-groups", "--steps", 4, "--out", tmp_path / "run")[0] == 0
    taken = [line["rounds"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert begun == [sum(taken[:i]) for i in range(4)] and max(taken) > 1


def test_a_policy_that_has_become_nan_stops_the_run_with_one_line(main, tmp_path):
    """The learning rate takes the weights to infinity in the first update."""
    status, _, err = main("--method", "grpo", "--lr", 1e38, "--steps", 20, "--out", tmp_path / "run")
    last, metrics = err.strip().splitlines()[-1], lines(tmp_path / "run" / "metrics.jsonl")
    assert status == 2 and "step 4: no update of the last 3" in last and "--lr 1e+38" in last
    assert "Traceback" not in err
    assert metrics[-1]["loss"] is None and metrics[-1]["entropy"] is None
    assert [line["skipped"] == line["updates"] for line in metrics] == [False, True, True, True]


# ---------------------------------------------------------------- real input


def test_two_processes_take_a_step_on_dapo_with_qwens_tokenizer(qwen_checkpoint, shared, tmp_path):
    """Random weights get nothing right, so there is no signal, and they are left as they were."""
    small = "--method kl_cov --steps 1 --prompts 4 --mini-batch 2 --samples 2 --max-new-tokens 5 --device cpu"
    more = f"--eval-limit 2 --final-samples 2 --max-prompt-tokens 200 --model {qwen_checkpoint}"
    files = f"--data {shared}/data/dapo_math_17k.jsonl --eval-data {shared}/data/math500.jsonl"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    argv = f"{small} {more} {files} --out {tmp_path}/run".split()
    done = subprocess_of(*argv, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"problems \(\d+ dropped as held-out, [1-9]\d* as too long\), 2 held out", done.stdout)
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["no_signal"] == 1 and line["reward"] == 0 and line["grad_norm"] == 0 and line["selected"] == 0
    assert line["entropy"] == pytest.approx(math.log(151936), abs=0.5)  # of the whole vocabulary
    folders = qwen_checkpoint, tmp_path / "run" / "model"
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for sample in lines(tmp_path / "run" / "samples.jsonl"):
        assert sample["prompt"].startswith("<|im_start|>system") and "Answer:" not in sample["prompt"]
        assert sample["prompt"].endswith(data.INSTRUCTION + "<|im_end|>\n<|im_start|>assistant\n")
