"""What parallel.py promises: gradients, selection and metrics that no micro-batch and no number of processes changes.

Two real processes (gloo) are started once, by torchrun, on this file as a program, and four: see `work_of_several`.
"""

import argparse
import contextlib
import copy
import json
import os
import random
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, _narrow
from safetensors.torch import load_file

import checkpoint
import data
import entropy
import losses
import parallel
import plot
import train
from parallel import gather, leader, micro_batches, share, together
from data import UserError

METHODS = list(losses.METHODS)
LENGTHS = [(3, 9), (1, 1), (12, 4), (5, 7), (2, 2), (7, 9), (4, 6), (9, 1), (3, 9), (3, 9), (2, 2), (6, 3)]  # of prompt and completion
COPIES = {8: 0, 9: 0, 10: 4}  # rows that are the same as an earlier one
QUIET = 3  # a row whose group had no signal


def options(method, **changes):
    """Options of train.py under which every method acts on some tokens of `batch_of`."""
    o = train.options(["--method", method, "--out", "nowhere/at/all"])
    chosen = dict(temperature=0.8, device="cpu", grad_clip=1e9, clip_cov_ratio=0.1, cov_low=0.05, kl_cov_ratio=0.2, clip_low=0.2, clip_high=0.2,
                  entropy_coef=0.3, entropy_fraction=0.6)  # fmt: skip
    return argparse.Namespace(**vars(o) | chosen | changes)


def batch_of(model, o):
    """A mini-batch of rows of all lengths, whose old log-probs lie around the present ones."""
    rng, g = random.Random(0), torch.Generator().manual_seed(0)
    ids = lambda n: [rng.randrange(24) for _ in range(n)]  # 0, the id of padding and of end-of-sequence, among them
    prompts, completions = [ids(p) for p, _ in LENGTHS], [ids(c) for _, c in LENGTHS]
    for copy_, i in COPIES.items():
        prompts[copy_], completions[copy_] = list(prompts[i]), list(completions[i])
    mask = torch.arange(9) < torch.tensor([c for _, c in LENGTHS])[:, None]
    with torch.no_grad():
        now, H = plain_scores(model, prompts, completions, o.temperature)
    advantages = torch.randn(len(LENGTHS), 1, generator=g).index_fill(0, torch.tensor([QUIET]), 0.0) * mask
    old_logp = (now + 0.3 * torch.randn(now.shape, generator=g)).float() * mask
    old_logp[QUIET] = now[QUIET].float()  # not moved yet, so that no method has anything to do there
    entropy, ref_logp = H.float(), (now + 0.2 * torch.randn(now.shape, generator=g)).float() * mask
    return {"prompts": prompts, "completions": completions, "old_logp": old_logp, "advantages": advantages, "mask": mask,
            "entropy": entropy, "ref_logp": ref_logp}  # fmt: skip


def plain_scores(model, prompts, completions, temperature):
    """Log-prob and entropy, one row at a time, from whole softmaxes in the model's own precision."""
    logp, H = [], []
    for p, c in zip(prompts, completions):
        every = torch.log_softmax(model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] / temperature, -1)
        logp.append(every.gather(1, torch.tensor(c)[:, None])[:, 0])
        H.append(-(every.exp() * every).sum(-1))
    return (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (logp, H))


def plain_gradient(model, batch, o):
    """Autograd through the whole loss in one piece, and what the method selected."""
    logp, H = plain_scores(model, batch["prompts"], batch["completions"], o.temperature)
    t = losses.Tokens(logp, batch["old_logp"], batch["advantages"], batch["mask"], H, torch.Generator().manual_seed(1),
                      old_entropy=batch["entropy"], ref_logp=batch["ref_logp"])  # fmt: skip
    loss = losses.METHODS[o.method](t, o)[t.kept].mean()
    return torch.autograd.grad(loss, list(model.parameters())), t, loss


def update(model, batch, o, lr=0.1):
    """train.update with plain gradient descent on a copy of the model: its gradients, Tokens, log and parameters afterwards."""
    model = copy.deepcopy(model)
    policy = argparse.Namespace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=lr))
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # left from the update before
    t, log = train.update(policy, batch, torch.Generator().manual_seed(1), False, o)
    return [p.grad for p in model.parameters()], t, log, [p.detach() for p in model.parameters()]


def distance(these, those):
    """Of two lists of tensors, relative to the length of the second."""
    norm = lambda tensors: sum(x.double().square().sum() for x in tensors).sqrt().item()
    return norm([a - b for a, b in zip(these, those)]) / norm(those)


# ---------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 64, 10**6])
def test_micro_batches_keep_every_row_once_and_within_the_budget_unless_a_row_alone_exceeds_it(tokens):
    rng = random.Random(tokens)
    for count in (0, 1, 2, 30):
        rows = [([0] * rng.randint(1, 20), [0] * rng.randint(0, 20)) for _ in range(count)]
        length = [len(p) + len(c) for p, c in rows]
        groups = micro_batches([p for p, _ in rows], [c for _, c in rows], tokens)
        assert sorted(i for group in groups for i in group) == list(range(count))
        for group in groups:
            assert group and (len(group) == 1 or len(group) * max(length[i] for i in group) <= tokens)


def test_rows_of_like_length_share_a_micro_batch_so_that_little_is_padding():
    prompts, completions = [[0] * 3] * 4, [[0] * 7, [0], [0] * 7, [0]]
    assert sorted(map(sorted, micro_batches(prompts, completions, 20))) == [[0, 2], [1, 3]]
    assert len(micro_batches(prompts, completions, 40)) == 1  # a budget is used up before another one is opened


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 20, 45])
def test_gradients_and_selection_are_the_same_for_any_size_of_micro_batch(model, method, tokens):
    o = options(method, micro_batch=10**6)
    batch = batch_of(model, o)
    gradients, t, log, _ = update(model, batch, o)
    split_gradients, split_t, split_log, _ = update(model, batch, argparse.Namespace(**vars(o) | {"micro_batch": tokens}))
    assert len(micro_batches(batch["prompts"], batch["completions"], tokens, parallel.distinct(batch)[0].tolist())) > 2
    assert distance(split_gradients, gradients) < 1e-12
    assert split_log == pytest.approx(log, rel=1e-12)
    for name in ("selected", "clipped"):
        if getattr(t, name) is not None:
            assert getattr(t, name).any() or method == "low_entropy"
            assert torch.equal(getattr(t, name), getattr(split_t, name))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 45, 10**6])
def test_gradients_are_those_of_plain_autograd_through_the_loss_of_the_whole_mini_batch(model, method, tokens):
    o = options(method, micro_batch=tokens)
    batch = batch_of(model, o)
    want, t_want, loss = plain_gradient(model, batch, o)
    gradients, t, log, after = update(model, batch, o)
    assert distance(gradients, want) < 1e-6 and log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert log["tokens"] == sum(c for _, c in LENGTHS)
    assert t.selected is None or torch.equal(t.selected, t_want.selected)
    descent = [p.detach() - 0.1 * g for p, g in zip(model.parameters(), want)]
    assert distance([a - p for a, p in zip(after, model.parameters())], [b - p for b, p in zip(descent, model.parameters())]) < 1e-6


def test_scores_are_exact_and_stand_with_their_own_rows_whatever_the_micro_batch(model):
    o = options("grpo")
    batch = batch_of(model, o)
    want = [x.detach().float() for x in plain_scores(model, batch["prompts"], batch["completions"], 0.8)]
    for tokens in (1, 20, 45, 10**6):
        o.micro_batch = tokens
        got = parallel.score(model, batch, 0.8, o)
        for mine, theirs in zip(got, want):
            assert not mine.requires_grad and mine.dtype == torch.float32
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
            assert (mine[~batch["mask"]] == 0).all()


def test_rows_that_are_the_same_go_through_the_model_once(model):
    """That the step is the same as if all had gone is what the other tests compare: their mini-batches have such rows."""
    o = options("grpo", micro_batch=45)
    batch, seen = batch_of(model, o), []
    model.base_model.register_forward_pre_hook(lambda module, args, kwargs: seen.extend(map(tuple, kwargs["input_ids"].tolist())), with_kwargs=True)
    logp, H = parallel.score(model, batch, o.temperature, o)
    assert len(seen) == len(set(seen)) == len(LENGTHS) - len(COPIES)
    for i, j in COPIES.items():
        assert torch.equal(logp[i], logp[j]) and torch.equal(H[i], H[j])
    seen.clear()
    parallel.backward(model, batch, torch.ones_like(logp), torch.zeros_like(H), o)
    assert len(seen) == len(set(seen)) == len(LENGTHS) - len(COPIES)


def test_rows_differ_if_their_prompts_or_their_completions_do_and_wherever_one_ends():
    rows = [([1, 2], [3]), ([1], [2, 3]), ([1, 2], [3]), ([1, 2], [3, 0]), ([0, 1, 2], [3]), ([1], [2, 3])]
    first, place = parallel.distinct(dict(zip(("prompts", "completions"), zip(*rows))))
    assert first.tolist() == [0, 1, 3, 4] and place.tolist() == [0, 1, 0, 2, 3, 1]


def test_what_copies_send_back_is_added_up_and_may_cancel(model, monkeypatch):
    o = options("grpo")
    batch, seen = batch_of(model, o), seen_with_gradient(monkeypatch)
    dlogp = torch.zeros(len(LENGTHS), 9)
    dlogp[0, 2], dlogp[8, 2], dlogp[4, 1], dlogp[10, 1] = 1.0, 2.0, 1.0, -1.0
    parallel.backward(model, batch, dlogp, torch.zeros_like(dlogp), o)
    logp, _ = plain_scores(model, batch["prompts"], batch["completions"], o.temperature)
    want = torch.autograd.grad(3 * logp[0, 2], list(model.parameters()))
    assert distance([p.grad for p in model.parameters()], want) < 1e-6 and seen == [batch["prompts"][0]]


def test_no_more_than_the_budget_goes_through_the_model_at_a_time_forward_or_backward(model, monkeypatch):
    o = options("grpo", micro_batch=34)
    batch, sizes = batch_of(model, o), []
    hook = lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel())
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    update(model, batch, o)
    assert len(sizes) > 6 and max(sizes) <= 34


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Mistral"])
def test_gradient_checkpointing_keeps_less_of_each_layer_and_changes_no_gradient(narrow, architecture):
    model = narrow(architecture)
    o = options("entropy_bonus", micro_batch=45)
    batch, kept = batch_of(model, o), [0, 0]

    def keep(number):
        def count(x):
            kept[number] += x.numel()
            return x

        return torch.autograd.graph.saved_tensors_hooks(count, lambda x: x)

    with keep(0):
        want, t, log, _ = update(model, batch, o)
    parallel.recompute(model)
    policy = argparse.Namespace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    with keep(1):
        again, log_again = train.update(policy, batch, torch.Generator().manual_seed(1), False, o)
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, p.grad) for a, p in zip(want, model.parameters()))
    assert log_again == log and torch.equal(again.logp, t.logp)


# ---------------------------------------------------------------- rows without gradient


def seen_with_gradient(monkeypatch):
    """The prompts of every call that goes back through the model."""
    seen, backward = [], entropy.backward

    def spy(model, prompts, *rest):
        seen.extend(prompts)
        backward(model, prompts, *rest)

    monkeypatch.setattr(entropy, "backward", spy)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_gradient_is_left_out_and_the_step_is_the_same_as_with_it(model, method, monkeypatch):
    o = options(method, micro_batch=45)
    batch = batch_of(model, o)
    want, _, _ = plain_gradient(model, batch, o)  # of all rows
    seen = seen_with_gradient(monkeypatch)
    gradients, *_ = update(model, batch, o)
    if method in ("grpo", "clip_higher", "clip_cov", "high_entropy", "low_entropy"):  # the others may act on a row whose advantages are 0
        assert batch["prompts"][QUIET] not in seen and 0 < len(seen) < len(LENGTHS) - len(COPIES)
    assert distance(gradients, want) < 1e-6


def test_a_row_whose_only_gradient_is_that_of_its_entropy_is_not_left_out(model):
    o = options("grpo")
    batch = batch_of(model, o)
    dlogp = torch.zeros(len(LENGTHS), 9)
    dentropy = dlogp.clone()
    dentropy[5, 3] = 1.0
    parallel.backward(model, batch, dlogp, dentropy, o)
    _, H = plain_scores(model, batch["prompts"], batch["completions"], o.temperature)
    want = torch.autograd.grad(H[5, 3], list(model.parameters()))
    assert distance([p.grad for p in model.parameters()], want) < 1e-6


def test_without_any_gradient_nothing_goes_through_the_model_and_gradients_are_zero(model, monkeypatch):
    o = options("grpo")
    batch, seen = batch_of(model, o), seen_with_gradient(monkeypatch)
    zero = torch.zeros(len(LENGTHS), 9)
    parallel.backward(model, batch, zero, zero, o)
    assert not seen and all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------- one process and two

COUNTS = (0, 1, 2, 3, 7)


def shared_work(n):
    """What `share` makes of n items, and how many of them this process did."""
    done = []

    def mine(names, numbers):
        done.extend(names)
        return [(name, 10 * number) for name, number in zip(names, numbers)]

    return share(mine, [f"item {i}" for i in range(n)], list(range(n))), done


def test_alone_a_process_does_everything_in_order():
    assert parallel.world() == (0, 1)
    for n in COUNTS:
        whole, done = shared_work(n)
        assert whole == [(f"item {i}", 10 * i) for i in range(n)] and len(done) == n


RUNS = {method: ["--method", method] for method in METHODS} | {
    # with the starting policy, the process reward model and further rounds of sampling; with too few items for all processes
    "all": ["--method", "kl_ref", "--advantage", "prime", "--filter-groups"],
    "few": ["--method", "kl_cov", "--prompts", "1", "--mini-batch", "1", "--samples", "2", "--eval-limit", "1"],
    "sharded": ["--method", "kl_cov", "--shard-optimizer"],
    "odd": ["--method", "clip_cov", "--prompts", "3", "--mini-batch", "3", "--samples", "3", "--eval-data", "{folder}/every_other_too_long.jsonl"],
}
SHORT = ("--steps 2 --seed 3 --prompts 8 --mini-batch 4 --samples 4 --eval-limit 9 --final-samples 2 --eval-every 1 --device cpu"
         " --kl-cov-ratio 0.1 --clip-cov-ratio 0.1 --cov-low 0.1 --passes 2 --lr 1e-4").split()  # fmt: skip


def work(folder):
    """All that is compared between one process and two: shares, scores, gradients, selections and whole runs."""
    argv_of = lambda name: [word.replace("{folder}", str(folder)) for word in [*SHORT, *RUNS[name], "--out", f"{folder}/{name}"]]
    runs = [train.options(argv_of(name)) for name in RUNS]  # before any run exists
    rows = ["\\boxed{" + "1+" * (1 + 200 * (i % 2)) for i in range(8)]
    with open(f"{folder}/every_other_too_long.jsonl", "w") as file:
        file.writelines(json.dumps({"problem": row, "answer": "1"}) + "\n" for row in rows)
    model = _narrow(dtype=torch.float64)
    result = {"share": {n: shared_work(n) for n in COUNTS}, "gather": gather(parallel.world()[0]), "errors": errors(), "leader": leader(parallel.world)}
    for method in METHODS:
        o = options(method, micro_batch=45)
        gradients, t, log, after = update(model, batch_of(model, o), o)
        result[method] = {"gradients": gradients, "selected": t.selected, "log": log, "after": after, "logp": t.logp.detach()}
    with pytest.MonkeyPatch.context() as patch:
        for parcel in (1, 100):  # every gradient by itself; some together
            patch.setattr(parallel, "PARCEL", parcel)
            result["parcel", parcel] = update(model, batch_of(model, options("grpo")), options("grpo"))[0]
    rank, n = parallel.world()
    result["rows"] = parallel.interleave([torch.arange(3.0 * count).view(count, 3)[rank::n] for count in COUNTS], COUNTS)
    with pytest.MonkeyPatch.context() as patch:  # what takes longer than a run: to make 20,000 problems, and to draw
        patch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))
        patch.setattr(plot, "curves", lambda *_: None)
        for o in runs:
            assert train.train(o) == 0
            checkpoint.release()
        o = train.options([*argv_of("sharded"), "--resume", "--steps", "3"])
        result["restored"] = restored(o)
        o.shard_optimizer = parallel.world()[1] == 1  # the checkpoint of a sharded optimizer is that of a whole one, and the reverse
        assert train.train(o) == 0
        checkpoint.release()
    return result


def restored(o):
    """The state of an optimizer that was restored from the last checkpoint and saved once more, on rank 0, and what lies twice in memory."""
    policy = train.load(o)[0]
    checkpoint.restore(policy, checkpoint.checkpoints(o.out)[0])
    if (n := parallel.world()[1]) > 1:
        parallel.collect_shards(policy.optimizer)
    twice = len(policy.optimizer.state) if n > 1 else 0
    return policy.optimizer.state_dict()["state"] if parallel.world()[0] == 0 else None, twice


def errors():
    """What every process learns of an error in the last one, and in the first."""
    learnt, (rank, n) = [], parallel.world()

    def fail(guilty, error):
        if rank == guilty:
            raise error

    for call, guilty, error in ((together, n - 1, OSError(28, "no space")), (together, 0, UserError("no problems")), (leader, 0, OSError(13, "no permission"))):
        try:
            call(fail, guilty, error)
        except (OSError, ValueError) as failure:
            learnt.append((type(failure).__name__, str(failure)))
    return learnt


@pytest.fixture(scope="module")
def work_of_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, work(folder)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def work_of_several(request, tmp_path_factory):
    """The results of all processes, and what they printed."""
    n = request.param
    folder = tmp_path_factory.mktemp("several")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__, folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)], done.stdout


def test_processes_divide_the_work_and_all_get_the_whole_in_order(work_of_one, work_of_several):
    for n in COUNTS:
        (whole, _), *parts = work_of_one[1]["share"][n], *(result["share"][n] for result in work_of_several[1])
        assert all(part == whole for part, _ in parts)
        assert sorted(name for _, done in parts for name in done) == sorted(f"item {i}" for i in range(n))
        assert max(len(done) for _, done in parts) <= -(-n // len(parts))


def test_each_process_keeps_to_cores_of_its_own_where_there_are_enough(work_of_several):
    (whole, *_), own = zip(*(result["cores"] for result in work_of_several[1]))
    assert set.union(*own) <= whole and all(own) == bool(whole)  # none on macOS
    if len(whole) >= len(own):
        assert set.union(*own) == whole and sum(map(len, own)) == len(whole)  # all are used, and none by two
        assert max(map(len, own)) <= min(map(len, own)) + 1


def test_all_processes_learn_what_each_one_has_and_of_an_error_in_one(work_of_one, work_of_several):
    results = work_of_several[1]
    for result in results:
        assert result["gather"] == list(range(len(results))) and result["leader"] == (0, len(results))
        assert result["errors"] == work_of_one[1]["errors"] == [
            ("OSError", "[Errno 28] no space"), ("UserError", "no problems"), ("PermissionError", "[Errno 13] no permission"),
        ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_several_processes_select_the_same_tokens_and_take_the_same_step_as_one(work_of_one, work_of_several, method):
    one, several = work_of_one[1][method], [result[method] for result in work_of_several[1]]
    for mine in several:
        assert distance(mine["gradients"], one["gradients"]) < 1e-12
        assert torch.equal(mine["logp"], one["logp"])
        assert mine["log"] == pytest.approx(one["log"], rel=1e-12)
        assert one["selected"] is None or one["selected"].any() and torch.equal(mine["selected"], one["selected"])
    for other in several[1:]:
        assert all(torch.equal(a, b) for a, b in zip(several[0]["after"], other["after"]))  # or the copies would drift apart


def test_gradients_do_not_depend_on_how_many_travel_together_nor_rows_on_who_has_them(work_of_one, work_of_several):
    for result in [work_of_one[1], *work_of_several[1]]:
        for count, rows in zip(COUNTS, result["rows"], strict=True):
            assert torch.equal(rows, torch.arange(3.0 * count).view(count, 3))
        for parcel in (1, 100):
            assert distance(result["parcel", parcel], work_of_one[1]["grpo"]["gradients"]) < 1e-12


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_several_processes_has_the_metrics_and_the_policy_of_a_run_of_one(work_of_one, work_of_several, run):
    one, several = (folder / run for folder in (work_of_one[0], work_of_several[0]))
    assert [line["step"] for line in lines(several)] == ([1, 2, 3] if run == "sharded" else [1, 2])  # one line for each step, not one for each process
    for a, b in zip(lines(one), lines(several)):
        a.pop("seconds"), b.pop("seconds")
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)
    if run not in ("few", "odd"):
        assert max(line["grad_norm"] for line in lines(one)) > 0.01 and max(line["ratio_max"] for line in lines(one)) > 1.001
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, several)]
    for name in (name for name in weights[0] if "k_proj.bias" not in name):  # no gradient but rounding's, which Adam blows up
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-4)
    assert [json.loads((folder / "config.json").read_text())["processes"] for folder in (one, several)] == [1, len(work_of_several[1])]
    assert (one / "samples.jsonl").read_text().count("\n") == (several / "samples.jsonl").read_text().count("\n")
    assert (one / "final.json").read_text() == (several / "final.json").read_text()


def test_the_state_of_a_sharded_optimizer_is_restored_and_saved_whole_and_kept_but_once(work_of_one, work_of_several):
    (want, _), (mine, _) = work_of_one[1]["restored"], work_of_several[1][0]["restored"]
    assert [result["restored"][1] for result in work_of_several[1]] == [0] * len(work_of_several[1])
    saved = torch.load(work_of_several[0] / "sharded" / "checkpoint" / "step-2" / "state.pt", weights_only=True)["optimizer"]["state"]
    assert list(mine) == list(saved) == list(want)
    for i, moments in mine.items():
        assert all(torch.equal(x, saved[i][name]) for name, x in moments.items()) and moments["exp_avg"].shape == want[i]["exp_avg"].shape
        assert moments["exp_avg_sq"].any()


def test_the_first_steps_of_a_sharded_optimizer_are_those_of_a_whole_one(work_of_several):
    folder = work_of_several[0]
    for a, b in zip(lines(folder / "kl_cov"), lines(folder / "sharded")):
        a.pop("seconds"), b.pop("seconds")
        assert a == b
    state = [torch.load(folder / run / "checkpoint" / "step-2" / "state.pt", weights_only=True)["optimizer"] for run in ("kl_cov", "sharded")]
    assert state[0]["state"].keys() == state[1]["state"].keys()
    for i in state[0]["state"]:
        assert all(torch.equal(state[0]["state"][i][name], state[1]["state"][i][name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.slow
def test_the_command_for_several_nodes_in_the_readme_has_the_metrics_of_one_process(tmp_path):
    """Two nodes of one process each, both on this machine; all but the number of processes and the address is README's."""
    (command,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("torchrun --nnodes=2")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = command.split(" train.py ")[0].replace("nproc_per_node=8", "nproc_per_node=1").replace("node0:29500", f"127.0.0.1:{port}").split()[1:]
    assert f"--rdzv_endpoint=127.0.0.1:{port}" in launcher and "--nproc_per_node=1" in launcher
    argv = [ROOT / "train.py", *SHORT, "--method", "kl_cov", "--out"]
    words = [sys.executable, "-m", "torch.distributed.run", *launcher, *argv, tmp_path / "nodes"]
    start = lambda: subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = [start()]
    try:
        for _ in range(600):  # on two machines only one can be the host; here both could, so the second comes when the first is
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        nodes.append(start())
        said = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(text.count("kl_cov, 2 steps in") for text in said) == 1
    subprocess.run(list(map(str, [sys.executable, *argv, tmp_path / "one"])), check=True, capture_output=True, timeout=300)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "nodes"), strict=True):
        a.pop("seconds"), b.pop("seconds")
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)


def test_only_one_of_the_processes_speaks(work_of_several):
    for method in METHODS:
        others = {"kl_cov": 2, "clip_cov": 1, "kl_ref": 1}.get(method, 0)  # few and sharded, odd, all
        assert work_of_several[2].count(f"{method}, 2 steps in") == 1 + others


if __name__ == "__main__":  # under torchrun
    cores = lambda: os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    whole, _, own = cores(), parallel.keep_apart(), cores()
    torch.distributed.init_process_group("gloo")
    result = {"cores": (whole, own)} | work(sys.argv[1])
    torch.save(result, f"{sys.argv[1]}/{parallel.world()[0]}.pt")
    torch.distributed.destroy_process_group()
