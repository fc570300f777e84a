"""What parallel.py promises: the same step and the same run for any micro-batch and number of processes.

Two real processes (gloo) are started once, by torchrun, with this file as their program: see `several`.
"""

import argparse
import copy
import random
import subprocess
import sys

import pytest
import torch
from conftest import metrics, narrow, plain_scores
from safetensors.torch import load_file

import entropy
import losses
import parallel
import train
from data import UserError

METHODS = list(losses.METHODS)
LENGTHS = [(3, 9), (1, 1), (12, 4), (5, 7), (2, 2), (7, 9), (4, 6), (9, 1), (3, 9), (3, 9), (2, 2), (6, 3)]
COPIES = {8: 0, 9: 0, 10: 4}  # rows that are equal to an earlier one
QUIET = 3  # a row whose group had no signal


def options(method, **changes):
    """Options of train.py with which every method acts on some tokens of `batch_of`."""
    words = ("--device cpu --out nowhere/at/all --temperature 0.8 --grad-clip 1e9 --clip-low 0.2 --clip-high"
             " 0.2 --clip-cov-ratio 0.1 --cov-low 0.05 --kl-cov-ratio 0.2 --kl-cov-low 0"
             " --entropy-fraction 0.6").split()
    return argparse.Namespace(**vars(train.options(["--method", method, *words])) | changes)


def batch_of(model, o):
    """A mini-batch of rows of all lengths, whose old log-probs lie around the present ones."""
    rng, g = random.Random(0), torch.Generator().manual_seed(0)
    V = model.config.vocab_size  # 0 is the id of padding and of the end, and occurs in the rows
    prompts, completions = zip(*[[[rng.randrange(V) for _ in range(n)] for n in pair] for pair in LENGTHS])
    prompts, completions = list(prompts), list(completions)
    for row, i in COPIES.items():
        prompts[row], completions[row] = list(prompts[i]), list(completions[i])
    mask = torch.arange(9) < torch.tensor([c for _, c in LENGTHS])[:, None]
    with torch.no_grad():
        now, H = (x.float() for x in plain_scores(model, prompts, completions, o.temperature))
    advantages = torch.randn(len(LENGTHS), 1, generator=g).index_fill(0, torch.tensor([QUIET]), 0.0) * mask
    old_logp = (now + 0.3 * torch.randn(now.shape, generator=g)) * mask
    old_logp[QUIET] = now[QUIET]  # it has not moved yet, so no method has anything to do there
    ref_logp = (now + 0.2 * torch.randn(now.shape, generator=g)) * mask
    rewards = (torch.arange(len(LENGTHS)) % 3 == 0).float()
    return train.Batch(prompts, completions, [], rewards, mask, advantages, old_logp, H, H, ref_logp)


def plain_gradient(model, batch, o):
    """Autograd through the whole loss in one piece: gradients, what the method selected, the loss."""
    logp, H = plain_scores(model, batch.prompts, batch.completions, o.temperature)
    t = losses.Tokens(logp, batch.old_logp, batch.advantages, batch.mask, H, torch.Generator().manual_seed(1),
                      old_entropy=batch.entropy, ref_logp=batch.ref_logp)  # fmt: skip
    loss = losses.METHODS[o.method](t, o)
    mean = loss.token_loss[t.mask if loss.kept is None else loss.kept].mean()
    return torch.autograd.grad(mean, list(model.parameters())), loss.selected, mean.item()


def update(model, o):
    """train.update on a copy of the model, by plain gradient descent.

    Returns its gradients, Tokens, Loss, what is logged, and the parameters afterwards.
    """
    batch, model = batch_of(model, o), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = train.Policy(model, model, None, set(), optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # left from the update before
    t, loss, log = train.update(policy, batch, torch.Generator().manual_seed(1), 1.0, False, o)
    return [p.grad for p in model.parameters()], t, loss, log, [p.detach() for p in model.parameters()]


def agree(these, those, within=1e-6):
    """Whether two lists of tensors differ by less than a share of the length of the second."""
    a, b = (torch.cat([x.detach().double().flatten() for x in xs]) for xs in (these, those))
    return (a - b).norm() <= within * b.norm()


def same(a, b):
    """Whether two tensors are equal, or both are None."""
    return a is b is None or torch.equal(a, b)


# ---------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("tokens", [1, 7, 33, 10**6])
def test_micro_batches_hold_every_row_once_and_only_a_row_alone_may_exceed_the_budget(tokens):
    prompts, completions = zip(*[([0] * p, [0] * c) for p, c in LENGTHS])
    groups = parallel.micro_batches(prompts, completions, tokens, range(0, 12, 2))
    assert sorted(i for group in groups for i in group) == list(range(0, 12, 2))
    lengths = [[sum(LENGTHS[i]) for i in group] for group in groups]
    assert all(len(some) == 1 or len(some) * max(some) <= tokens for some in lengths)
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)  # like lengths together: little padding


@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_that_of_plain_autograd_whatever_the_micro_batch(model, method):
    o = options(method, micro_batch=10**6)
    want, selected, loss = plain_gradient(model, batch_of(model, o), o)
    whole, t, own, log, after = update(model, o)
    assert agree(whole, want) and log["loss"] == pytest.approx(loss, rel=1e-6)
    descent = [p - 0.1 * g for p, g in zip(model.parameters(), want)]
    assert agree(after, descent) and log["tokens"] == sum(c for _, c in LENGTHS)
    assert same(own.selected, selected) and (selected is None or selected.any())
    for tokens in (1, 20, 45):
        o.micro_batch = tokens
        gradients, split_t, split, split_log, _ = update(model, o)
        assert agree(gradients, whole, 1e-12) and split_log == pytest.approx(log, rel=1e-12)
        assert same(split.selected, own.selected) and same(split.clipped, own.clipped)
        torch.testing.assert_close(split_t.logp, t.logp, rtol=1e-6, atol=1e-6)


def test_no_more_than_the_budget_goes_through_the_model_at_a_time_and_equal_rows_once(model):
    o, seen = options("grpo", micro_batch=34), []
    hook = lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist())
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    batch = batch_of(model, o)
    seen.clear()
    logp, H = parallel.score(model, batch, o.temperature, o)
    parallel.backward(model, batch, torch.ones_like(logp), torch.zeros_like(H), o)
    rows = [tuple(row) for rows in seen for row in rows]
    assert len(rows) == 2 * len(set(rows)) == 2 * (len(LENGTHS) - len(COPIES))
    assert max(len(rows) * len(rows[0]) for rows in seen) <= 34
    assert all(torch.equal(x[i], x[j]) for x in (logp, H) for i, j in COPIES.items())


def test_rows_are_equal_if_both_prompt_and_completion_are():
    rows = [([1, 2], [3]), ([1], [2, 3]), ([1, 2], [3]), ([1, 2], [3, 0]), ([0, 1, 2], [3]), ([1], [2, 3])]
    first, place = parallel.distinct(*zip(*rows))
    assert first.tolist() == [0, 1, 3, 4] and place.tolist() == [0, 1, 0, 2, 3, 1]


@pytest.mark.parametrize("dlogp, dentropy, rows", [
    ({(0, 2): 1, (8, 2): 2, (4, 1): 1, (10, 1): -1}, {}, [0]), ({}, {(5, 3): 1}, [5]), ({}, {}, []),
], ids=["equal rows add up and may cancel", "that of an entropy counts", "none"])  # fmt: skip
def test_only_rows_with_a_gradient_go_back_through_the_model(model, monkeypatch, dlogp, dentropy, rows):
    o, seen, real, given = options("grpo"), [], entropy.backward, torch.zeros(2, 12, 9)
    batch = batch_of(model, o)
    for x, values in zip(given, (dlogp, dentropy)):
        for at, value in values.items():
            x[at] = value
    monkeypatch.setattr(entropy, "backward", lambda *a: [seen.extend(a[1]), real(*a)])
    parallel.backward(model, batch, *given, o)
    assert seen == [batch.prompts[i] for i in rows]
    both = torch.stack(plain_scores(model, batch.prompts, batch.completions, o.temperature))
    want = torch.autograd.grad((given * both).sum(), list(model.parameters()))
    assert agree([p.grad for p in model.parameters()], want)


@pytest.mark.parametrize("architecture, more", [
    ("Qwen2", {}), ("Llama", {}), ("GPTNeoX", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
])  # fmt: skip
def test_gradient_checkpointing_keeps_less_of_each_layer_and_changes_no_gradient(architecture, more):
    model, o, kept = narrow(architecture, **more), options("entropy_bonus", micro_batch=45), [[], []]

    def keeping(numbers):
        count = lambda x: numbers.append(x.numel()) or x
        return torch.autograd.graph.saved_tensors_hooks(count, lambda x: x)

    with keeping(kept[0]):
        want, *_, log, _ = update(model, o)
    train.recompute(model, o)
    with keeping(kept[1]):
        gradients, *_, again, _ = update(model, o)
    assert sum(kept[1]) < sum(kept[0]) / 2 and again == log and all(map(torch.equal, gradients, want))
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="--gradient-checkpointing: --model .* cannot do it"):
        train.recompute(model, o)


# ---------------------------------------------------------------- one process and two

COUNTS = (0, 1, 2, 3, 7)
RUNS = {
    "kl_cov": "--method kl_cov --kl-cov-ratio 0.1 --kl-cov-low 0",
    "sharded": "--method kl_cov --kl-cov-ratio 0.1 --kl-cov-low 0 --shard-optimizer",
    "all": "--method kl_ref --advantage prime --filter-groups",  # a reference, a PRM, rounds of sampling
    "few": "--method clip_cov --prompts 1 --mini-batch 1 --samples 3 --eval-limit 1 --gradient-checkpointing",
}
SHORT = ("--data arithmetic_heldout --eval-data arithmetic --seed 3 --prompts 8 --mini-batch 4 --samples 4 "
         "--passes 2 --eval-limit 9 --final-samples 2 --eval-every 1 --lr 1e-4 --device cpu").split()


def fail(guilty, error):
    """Raises the error in one process."""
    if parallel.world()[0] == guilty:
        raise error


def learnt(call, guilty, error):
    """The name of the error that this process learns of."""
    try:
        call(fail, guilty, error)
    except (OSError, ValueError) as failure:
        return type(failure).__name__


def work(folder):
    """All that is compared between one process and two: shares, errors, updates and whole runs."""
    rank, n = parallel.world()
    model, result = narrow(dtype=torch.float64), {}
    done_by = lambda items: [(item, rank) for item in items]
    result["share"] = [parallel.share(done_by, list(range(count))) for count in COUNTS]
    result["errors"] = [
        learnt(parallel.together, n - 1, OSError(28, "no space")),
        learnt(parallel.together, 0, UserError("no problems")),
        learnt(parallel.leader, 0, OSError(13, "no permission")),
    ]
    result["updates"] = {method: update(model, options(method, micro_batch=45)) for method in METHODS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "PARCEL", 100)  # most gradients travel by themselves
        result["parcels"] = update(model, options("grpo", micro_batch=45))[0]
    for name, words in RUNS.items():
        run(words, f"{folder}/{name}", "--steps", "2")
    run(RUNS["sharded"], f"{folder}/sharded", "--steps", "3", "--resume")
    return result


def run(words, out, *more):
    """A run of train.py in these processes."""
    o = train.options([*SHORT, *words.split(), *more, "--out", out])
    assert train.train(o) == 0


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The work of one process: the folder of its runs, and its result."""
    folder = tmp_path_factory.mktemp("one")
    return folder, work(folder)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request, tmp_path_factory):
    """The same work of several processes: the folder, the results of all, and what they printed."""
    n, folder = request.param, tmp_path_factory.mktemp("several")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    done = subprocess.run([sys.executable, "-m", *launcher, __file__, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(n)], done.stdout


def test_processes_divide_the_work_and_all_get_the_whole_in_order(one, several):
    for results in ([one[1]], several[1]):
        for result in results:
            for count, done in zip(COUNTS, result["share"], strict=True):
                assert done == [(i, i % len(results)) for i in range(count)]


def test_an_error_of_one_process_is_raised_in_all(one, several):
    for result in [one[1], *several[1]]:
        assert result["errors"] == ["OSError", "UserError", "PermissionError"]


@pytest.mark.parametrize("method", METHODS)
def test_several_processes_select_the_same_tokens_and_take_the_same_step_as_one(one, several, method):
    gradients, t, loss, log, _ = one[1]["updates"][method]
    for result in several[1]:
        mine = result["updates"][method]
        assert agree(mine[0], gradients, 1e-12) and mine[3] == pytest.approx(log, rel=1e-12)
        assert torch.equal(mine[1].logp, t.logp) and same(mine[2].selected, loss.selected)
        first = several[1][0]["updates"][method][4]
        assert all(torch.equal(a, b) for a, b in zip(mine[4], first))  # or the copies would drift apart
        if method == "grpo":
            assert agree(result["parcels"], gradients, 1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_several_processes_has_the_metrics_and_the_policy_of_a_run_of_one(one, several, name):
    mine, theirs = one[0] / name, several[0] / name
    assert len(metrics(mine)) == (3 if name == "sharded" else 2)
    for a, b in zip(metrics(mine), metrics(theirs), strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)
    want, got = (load_file(run / "model" / "model.safetensors") for run in (mine, theirs))
    for key in want:
        if "k_proj.bias" not in key:  # its gradient is nothing but rounding, which Adam scales up
            torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-4)
    for file in ("final.json", "samples.jsonl"):
        assert (mine / file).read_text().count("\n") == (theirs / file).read_text().count("\n")
    assert several[2].count(f"See {theirs}/curves.png") == len(metrics(theirs)) - 1  # one process speaks


def test_a_sharded_optimizer_takes_the_steps_of_a_whole_one_and_saves_its_whole_state(several):
    runs = [several[0] / name for name in ("kl_cov", "sharded")]
    assert metrics(runs[1])[:2] == metrics(runs[0])
    files = [torch.load(run / "checkpoint" / "step-2" / "state.pt", weights_only=True) for run in runs]
    whole, sharded = (file["optimizer"]["state"] for file in files)
    assert list(sharded) == list(whole)
    for i, moments in whole.items():
        assert all(torch.equal(sharded[i][key], value) for key, value in moments.items())


if __name__ == "__main__":  # under torchrun
    parallel.start_process("cpu")
    result = work(sys.argv[1])
    torch.save(result, f"{sys.argv[1]}/{parallel.world()[0]}.pt")
    torch.distributed.destroy_process_group()
