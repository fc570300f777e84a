"""Reinforcement learning with verifiable rewards, and what its entropy does meanwhile.

    python train.py --method kl_cov                          the embedded policy on the embedded task, minutes on a CPU
    python train.py --method grpo --model Qwen/Qwen2.5-0.5B --data dapo_math_17k --eval-data math500
    torchrun --nproc_per_node=8 train.py ...                 the same on eight GPUs

One step, in this order: problems -> rollout -> reward -> advantages -> old log-probs and entropy ->
for each mini-batch: covariance -> selection -> loss -> update -> log.

Selection, means and gradients are exact, whatever the micro-batches and processes: parallel.py says how.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
import losses
import plot
import reward
import rollout
import theorem
from checkpoint import describe, restore, save
from options import options
from parallel import backward, score, share, world

# ---------------------------------------------------------------- one step


def sampling_copy(model, o):
    """What rollouts are drawn from: on a GPU a copy in bf16, for reading the weights is what takes the time; else the model."""
    return copy.deepcopy(model).bfloat16() if o.device == "cuda" else model


def refresh(sampler, model):
    """The sampler's weights become the model's, in place."""
    if sampler is not model:
        torch._foreach_copy_([p.data for p in sampler.parameters()], [p.data for p in model.parameters()])


def update(policy, batch, generator, first, o):
    """One mini-batch: covariance -> selection -> loss -> update. Returns its Tokens and what is logged, as sums and counts."""
    logp, entropy = score(policy.model, batch["prompts"], batch["completions"], o.temperature, o)
    if first and not torch.equal(logp, batch["old_logp"]):
        raise RuntimeError("the first ratio is not exactly 1: old and new log-probs come from different computations")
    t = losses.Tokens(logp.requires_grad_(), batch["old_logp"], batch["advantages"], batch["mask"], entropy.requires_grad_(), generator)
    loss = losses.aggregate(losses.METHODS[o.method](t, o), t.mask, t.mask.sum())
    dlogp, dentropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True, materialize_grads=True)

    policy.optimizer.zero_grad(set_to_none=True)
    backward(policy.model, batch["prompts"], batch["completions"], dlogp, dentropy, o)
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), o.grad_clip)
    finite = bool(torch.isfinite(norm) and torch.isfinite(loss))
    if finite and norm > 0:  # without a signal AdamW would still move, by its momentum
        policy.optimizer.step()
    number = lambda x: 0 if x is None else x.sum().item()
    return t, {
        "tokens": number(t.mask), "covariance": number(t.covariance), "selected": number(t.selected), "clipped": number(t.clipped),
        "ratio_max": t.ratio[t.mask].max().item(), "loss": loss.item(), "grad_norm": norm.item(), "finite": finite,
    }  # fmt: skip


def generator(o, step, purpose):
    """A CPU generator for one purpose in one step: all randomness follows from (seed, step, purpose), so resuming needs no state."""
    digest = hashlib.sha256(f"{o.seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def problems_of_step(problems, number, o):
    """The problems of step 1, 2, ...: all in random order, then all in another random order, and so on."""
    first = (number - 1) * o.prompts
    epochs = range(first // len(problems), (first + o.prompts - 1) // len(problems) + 1)
    order = [i for e in epochs for i in torch.randperm(len(problems), generator=generator(o, e, "order")).tolist()]
    start = first - epochs[0] * len(problems)
    return [problems[i] for i in order[start : start + o.prompts]]


def draw_rollouts(policy, prompts, number, o):
    """o.samples completions of each prompt. The random numbers belong to prompt and sample, whichever process draws them."""
    noise = rollout.uniforms(len(prompts), o.samples, o.max_new_tokens, generator(o, number, "sample"))
    refresh(policy.sampler, policy.model)

    def mine(prompts, noise):
        return rollout.sample(policy.sampler, prompts, o.samples, o.max_new_tokens, o.temperature, policy.eos_ids,
                              noise=torch.stack(noise) if noise else None)  # fmt: skip

    return [completion for group in share(mine, prompts, list(noise)) for completion in group]


def step(policy, problems, number, o):
    """One step from (prompt ids, answer) to an updated policy. Returns a line of metrics.jsonl and one of samples.jsonl."""
    clock = [time.perf_counter()]
    tick = lambda: clock.append(time.perf_counter())

    prompts = [ids for ids, _ in problems for _ in range(o.samples)]
    completions = draw_rollouts(policy, [ids for ids, _ in problems], number, o)
    lengths = torch.tensor([len(c) for c in completions])
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]  # (B, T): from the lengths, never from the ids
    tick()

    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    answers = [answer for _, answer in problems for _ in range(o.samples)]
    rewards = torch.tensor(share(reward.grade_all, texts, answers)).view(-1, o.samples)  # (P, G)
    advantages = losses.group_advantages(rewards, o.advantage).view(-1, 1) * mask  # (B, T)
    tick()

    batches = []  # old log-probs are computed as the update computes them, so that the first ratio is exactly 1
    for i in range(0, len(completions), o.mini_batch * o.samples):
        s = slice(i, i + o.mini_batch * o.samples)
        old_logp, entropy = score(policy.model, prompts[s], completions[s], o.temperature, o)
        w = old_logp.shape[1]
        batches.append({"prompts": prompts[s], "completions": completions[s], "old_logp": old_logp, "entropy": entropy,
                        "advantages": advantages[s, :w], "mask": mask[s, :w]})  # fmt: skip
        if o.temperature != 1:  # the policy's own entropy, beside that of what was sampled from
            batches[-1]["entropy1"] = score(policy.model, prompts[s], completions[s], 1.0, o)[1]
    tick()

    logs, updates = [], []
    for n in range(o.passes * len(batches)):
        t, log = update(policy, batches[n % len(batches)], generator(o, f"{number}.{n}", "select"), n == 0, o)
        logs.append(log)
        updates.append(t)
        if policy.probe:
            theorem.follow(policy, o)
    tick()

    metrics = {"step": number} | summary(policy, rewards, completions, batches, logs, o)
    if policy.probe:
        metrics |= theorem.figures(policy, updates, rewards)
    metrics["seconds"] = {k: b - a for k, a, b in zip(("sample", "reward", "score", "update"), clock, clock[1:])}
    return metrics, sample_lines(policy, batches[0], updates[0], texts, rewards, number)


def summary(policy, rewards, completions, batches, logs, o):
    """The figures of a step, over all its tokens or all its updates: sums over counts, never means of means."""
    tokens = sum(map(len, completions))
    total = lambda key: sum(log[key] for log in logs)
    mean = lambda key: total(key) / len(logs) if math.isfinite(total(key)) else None
    token_mean = lambda key: sum(b[key].sum().item() for b in batches) / tokens
    seq_mean = lambda key: sum((b[key].sum(1) / b["mask"].sum(1)).sum().item() for b in batches) / len(completions)
    own = "entropy" if o.temperature == 1 else "entropy1"  # the policy's own entropy is that at temperature 1
    metrics = {
        "reward": rewards.mean().item(),
        "entropy": token_mean(own),
        "entropy_seq": seq_mean(own),
        "covariance": total("covariance") / total("tokens"),
        "selected": total("selected") / total("tokens"),
        "clip_fraction": total("clipped") / total("tokens"),
        "ratio_max": max(log["ratio_max"] for log in logs),
        "loss": mean("loss"),
        "grad_norm": mean("grad_norm"),
        "lr": policy.optimizer.param_groups[0]["lr"],
        "completion_length": tokens / len(completions),
        "truncated": sum(c[-1] not in policy.eos_ids for c in completions) / len(completions),
        "no_signal": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "skipped": sum(not log["finite"] for log in logs),
        "tokens": tokens,
    }
    return metrics if o.temperature == 1 else metrics | {"entropy_sampling": token_mean("entropy")}


def sample_lines(policy, batch, t, texts, rewards, number, count=8):
    """Some completions of a step, of different problems, token by token, with what the method saw: lines of samples.jsonl."""
    lines, B = [], len(batch["completions"])
    for i in range(0, B, -(-B // count)):
        row = lambda x: [float(f"{v:.4g}") for v in x[i, : len(batch["completions"][i])].tolist()]
        lines.append({
            "step": number, "prompt": policy.tokenizer.decode(batch["prompts"][i]), "completion": texts[i],
            "reward": rewards.flatten()[i].item(), "tokens": policy.tokenizer.batch_decode([[y] for y in batch["completions"][i]]),
            "entropy": row(batch["entropy"]), "covariance": row(t.covariance), "advantage": row(t.advantages),
            "selected": [] if t.selected is None else t.selected[i, : len(batch["completions"][i])].nonzero()[:, 0].tolist(),
        })  # fmt: skip
    return lines


def evaluate(policy, problems, samples, temperature, o):
    """Rewards (P, samples) on held-out problems, the work divided among the processes."""
    refresh(policy.sampler, policy.model)

    def mine(problems):
        return evaluation.evaluate(policy.sampler, policy.tokenizer, policy.eos_ids, problems, samples, temperature,
                                   o.max_new_tokens, batch=512, seed=o.seed)["completions"] if problems else []  # fmt: skip

    return torch.tensor([record["rewards"] for record in share(mine, problems)])


# ---------------------------------------------------------------- a run


def load(o):
    """Policy and problems. All that can be wrong with them is found here, before the run directory is touched."""
    fields = lambda name: {} if name in data.KNOWN else {"prompt_field": o.prompt_field, "answer_field": o.answer_field}
    train = data.load_problems(o.data, **fields(o.data))
    held_out = data.load_problems(o.eval_data, **fields(o.eval_data), limit=o.eval_limit, benchmark=True)
    train, overlap = data.drop_overlap(train, held_out)
    source = str(Path(o.out) / "checkpoint") if o.resume else o.model
    if not Path(source).is_dir():
        data.hub_reachable()  # without a network, only the hub's cache is asked, and at once
    model, tokenizer, eos_ids = rollout.load_policy(source, o.device)
    window = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    if o.max_new_tokens >= window:
        raise data.DataError(f"--max-new-tokens {o.max_new_tokens}: leaves no room for a prompt in the {window} positions of the model")
    encoded = data.encode_prompts(tokenizer, [prompt for prompt, _ in train], min(o.max_prompt_tokens, window - o.max_new_tokens))
    problems = [(ids, answer) for ids, (_, answer) in zip(encoded, train) if ids]
    if not problems:
        raise data.DataError(f"--data {o.data}: no prompt is left to train on")
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if world()[0] == 0:
        print(f"{o.method}: {sum(p.numel() for p in model.parameters()):,} parameters on {o.device}, {len(problems):,} problems"
              f" ({overlap} dropped as held-out, {len(train) - len(problems)} as too long), {len(held_out)} held out")  # fmt: skip
    policy = argparse.Namespace(model=model, sampler=sampling_copy(model, o), tokenizer=tokenizer, eos_ids=eos_ids, optimizer=optimizer, probe=None)
    return policy, problems, held_out


def conclude(policy, held_out, first, last, started, o):
    """The final policy's accuracy and pass@k into final.json, the curves, and the line that says what happened."""
    rewards = evaluate(policy, held_out, o.final_samples, 1.0, o)
    final = {"accuracy": evaluate(policy, held_out, 1, 0.0, o).mean().item(), "accuracy_sampled": rewards.mean().item()}
    ks = [2**i for i in range(o.final_samples.bit_length()) if 2**i <= o.final_samples]
    final["pass_at"] = {k: sum(evaluation.pass_at_k(o.final_samples, int(c), k) for c in rewards.sum(1)) / len(rewards) for k in ks}
    if world()[0] == 0:
        out = Path(o.out)
        (out / "final.json").write_text(json.dumps(final, indent=1))
        policy.model.save_pretrained(out / "model")
        policy.tokenizer.save_pretrained(out / "model")
        plot.curves([out], out / "curves.png")
        others = " or ".join(m for m in losses.METHODS if m != o.method)
        print(f"{o.method}, {last['step']} steps in {time.time() - started:.0f} s: entropy {first['entropy']:.3f} -> {last['entropy']:.3f} nats, "
              f"held-out accuracy {first['accuracy']:.1%} -> {final['accuracy']:.1%} (sampled {final['accuracy_sampled']:.1%}, "
              f"pass@{ks[-1]} {final['pass_at'][ks[-1]]:.1%}). See {out}/curves.png. Next: --method {others}, "
              f"then python plot.py {out.parent}/*")  # fmt: skip


def train(o):
    """The loop."""
    started = time.time()
    policy, problems, held_out = load(o)
    out, leader = Path(o.out), world()[0] == 0
    if leader and not o.resume:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / "metrics.jsonl").touch()  # by this a directory is known to be a run's
        (out / "config.json").write_text(json.dumps(describe(o), indent=1))
    done = restore(policy, o) if o.resume else 0
    if o.check_theorem and leader:
        policy.probe = theorem.open_probe(policy, held_out, o)
    log = (lambda name: open(out / name, "a")) if leader else (lambda name: open(os.devnull, "w"))
    with log("metrics.jsonl") as metrics_file, log("samples.jsonl") as samples_file:
        progress = tqdm(range(done + 1, o.steps + 1), desc=o.method, initial=done, total=o.steps, disable=not leader)
        accuracy, first = None, None
        for number in progress:
            measured = {}
            if number % o.eval_every == 1 or o.eval_every == 1 or number == o.steps:  # of the policy that enters the step
                accuracy = evaluate(policy, held_out, 1, 0.0, o).mean().item()
                measured = {"accuracy": accuracy, "accuracy_sampled": evaluate(policy, held_out, 1, 1.0, o).mean().item()}
            metrics, samples = step(policy, problems_of_step(problems, number, o), number, o)
            metrics |= measured
            first = first or metrics
            metrics["seconds"]["total"] = sum(metrics["seconds"].values())
            print(json.dumps(metrics), file=metrics_file, flush=True)
            if measured:
                print(*map(json.dumps, samples), sep="\n", file=samples_file, flush=True)
            if metrics["no_signal"] == 1 and leader:
                progress.write(f"step {number}: no group had a signal (equal rewards in each), the policy was left as it was")
            progress.set_postfix(reward=f"{metrics['reward']:.2f}", entropy=f"{metrics['entropy']:.3f}",
                                 cov=f"{metrics['covariance']:+.4f}", accuracy=f"{accuracy:.2f}")  # fmt: skip
            if leader and (number % o.save_every == 0 or number == o.steps):
                save(policy, number, o)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if leader else [None]
    conclude(policy, held_out, lines[0], lines[-1], started, o)


def main():
    o = options()
    if "RANK" in os.environ:  # set by torchrun
        if o.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if o.device == "cuda" else "gloo")
    try:
        train(o)
    except (data.DataError, rollout.PolicyError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
