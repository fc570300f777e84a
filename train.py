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
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
import losses
import reward
import rollout
from lab import theorem
from checkpoint import begin, conclude, describe, find, go_on, release, restore, save
from metrics import recorder, sample_lines, stopwatch, summary
from options import options
from parallel import adamw, backward, gather, keep_apart, leader, recompute, score, score_each, share, together, world
from rollout import context, load_policy
from prime import process_model, process_rewards
from watch import count_bad, ending, entropy_is_spent, interruption, plain, remarks, signals
from data import UserError

ROUNDS = 10  # of sampling in a step at most, with --filter-groups: as published in arXiv 2505.22617

# ---------------------------------------------------------------- one step


def sampling_copy(model, o):
    """What rollouts are drawn from: on a GPU a copy with weights in bf16, for reading them is what takes the time; else the model."""
    if o.device != "cuda":
        return model
    sampler = copy.deepcopy(model)
    for p in sampler.parameters():  # not sampler.bfloat16(): the frequencies of the rotary embedding are a buffer and stay in fp32
        p.data = p.data.bfloat16()
    return sampler


def refresh(sampler, model):
    """The sampler's weights become the model's, in place."""
    if sampler is not model:
        torch._foreach_copy_([p.data for p in sampler.parameters()], [p.data for p in model.parameters()])


def update(policy, batch, generator, first, o):
    """One mini-batch: covariance -> selection -> loss -> update. Returns its Tokens and what is logged, as sums and counts."""
    logp, entropy = score(policy.model, batch, o.temperature, o)
    if first and not torch.equal(logp.nan_to_num(), batch["old_logp"].nan_to_num()):  # a policy of NaN is another matter: skipped below
        raise RuntimeError("the first ratio is not exactly 1: old and new log-probs come from different computations")
    t = losses.Tokens(logp.requires_grad_(), batch["old_logp"], batch["advantages"], batch["mask"], entropy.requires_grad_(), generator,
                      old_entropy=batch["entropy"], ref_logp=batch.get("ref_logp"))  # fmt: skip
    token_loss = losses.METHODS[o.method](t, o)
    loss = losses.aggregate(token_loss, t.kept, t.kept.sum())
    dlogp, dentropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True, materialize_grads=True)

    policy.optimizer.zero_grad(set_to_none=True)
    backward(policy.model, batch, dlogp, dentropy, o)
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
    """The problems of round 1, 2, ...: all in random order, then all in another random order, and so on.

    A step is a round, unless --filter-groups makes it ask for more: then this holds the problems of the ROUNDS that it may take.
    """
    first, count = (number - 1) * o.prompts, o.prompts * (ROUNDS if o.filter_groups else 1)
    epochs = range(first // len(problems), (first + count - 1) // len(problems) + 1)
    order = [i for e in epochs for i in torch.randperm(len(problems), generator=generator(o, e, "order")).tolist()]
    start = first - epochs[0] * len(problems)
    return [problems[i] for i in order[start : start + count]]


def draw_rollouts(policy, prompts, number, o):
    """o.samples completions of each prompt. The random numbers belong to prompt and sample, whichever process draws them."""
    noise = rollout.uniforms(len(prompts), o.samples, o.max_new_tokens, generator(o, number, "sample"))
    refresh(policy.sampler, policy.model)

    def mine(prompts, noise):
        at_once = max(1, o.sample_batch // o.samples)
        parts = [(prompts[i : i + at_once], torch.stack(noise[i : i + at_once])) for i in range(0, len(prompts), at_once)]
        return [group for some, u in parts
                for group in rollout.sample(policy.sampler, some, o.samples, o.max_new_tokens, o.temperature, policy.eos_ids, noise=u)]  # fmt: skip

    return [completion for group in share(mine, prompts, list(noise)) for completion in group]


def collect(policy, problems, number, o, lap):
    """The groups of a step: those that are trained on, and those that are dropped.

    A group is a problem's prompt, its o.samples completions, their texts and rewards. All groups of one round of o.prompts
    problems are kept. With --filter-groups (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2) a group is kept if its
    rewards are not all equal, and rounds follow until there are o.prompts of them or `problems` is at its end.
    """
    kept, dropped = [], []
    for r in range(0, len(problems), o.prompts):
        prompts, answers = zip(*problems[r : r + o.prompts])
        completions = draw_rollouts(policy, list(prompts), f"{number}.{r // o.prompts}" if r else number, o)
        lap("sample")
        texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = share(reward.grade_all, texts, [answer for answer in answers for _ in range(o.samples)])
        lap("reward")
        for i, prompt in enumerate(prompts):
            s = slice(i * o.samples, (i + 1) * o.samples)
            keep = len(kept) < o.prompts and not (o.filter_groups and min(rewards[s]) == max(rewards[s]))
            (kept if keep else dropped).append({"prompt": prompt, "completions": completions[s], "texts": texts[s], "rewards": rewards[s]})
        if len(kept) == o.prompts:
            break
    return kept, dropped


def mini_batches(policy, groups, advantages, o):
    """Groups as mini-batches, with old log-probs and entropies: computed as the update computes them, so that the first ratio is 1."""
    batches = []
    for i in range(0, len(groups), o.mini_batch):
        some = groups[i : i + o.mini_batch]
        rows = lambda key: [x for g in some for x in g[key]]
        prompts, completions = [g["prompt"] for g in some for _ in g["completions"]], rows("completions")
        lengths = torch.tensor([len(c) for c in completions])
        mask = torch.arange(lengths.max()) < lengths[:, None]  # from the lengths, never the ids
        batches.append({
            "prompts": prompts, "completions": completions, "texts": rows("texts"), "rewards": torch.tensor(rows("rewards")), "mask": mask,
            "advantages": advantages[i : i + o.mini_batch].reshape(-1, 1) * mask,
        })  # fmt: skip
    for batch, (logp, entropy) in zip(batches, score_each(policy.model, batches, o.temperature, o)):
        batch |= {"old_logp": logp, "entropy": entropy}
    if o.temperature != 1:  # the policy's own entropy, beside that of what was sampled from
        for batch, (_, entropy) in zip(batches, score_each(policy.model, batches, 1.0, o)):
            batch["entropy1"] = entropy
    return batches


def step(policy, problems, number, o):
    """One step from (prompt ids, answer) to an updated policy. Returns a line of metrics.jsonl and a few of samples.jsonl."""
    seconds, lap = stopwatch("sample", "reward", "score", "update")
    kept, dropped = collect(policy, problems, number, o, lap)
    rollout.release(policy.sampler)
    policy.rounds += (len(kept) + len(dropped)) // o.prompts

    rewards = torch.tensor([g["rewards"] for g in kept]).view(-1, o.samples)  # (P, G)
    lengths = torch.tensor([[len(c) for c in g["completions"]] for g in kept]).view(-1, o.samples)
    advantages = losses.group_advantages(rewards, o.advantage, lengths=lengths) if kept else rewards
    lap("reward")

    batches = mini_batches(policy, kept, advantages, o)
    others = mini_batches(policy, dropped, torch.zeros(len(dropped), o.samples), o)  # the policy's entropy is over all rollouts
    if policy.reference:
        for batch, (logp, _) in zip(batches, score_each(policy.reference, batches, o.temperature, o)):
            batch["ref_logp"] = logp
    judged = process_rewards(policy.prm, batches, o) if policy.prm and batches else {}
    lap("score")

    logs, updates = [], []
    for n in range(o.passes * len(batches)):
        t, log = update(policy, batches[n % len(batches)], generator(o, f"{number}.{n}", "select"), n == 0, o)
        logs.append(log)
        updates.append(t)
        count_bad(policy, log, number, o)
        if policy.probe:
            theorem.follow(policy, o)

    metrics = {"step": number} | summary(policy, batches, others, logs, o) | judged | {"seconds": seconds}
    if policy.probe and updates:
        metrics |= theorem.figures(policy, updates, rewards)
    samples = sample_lines(policy, batches[0], updates[0], number) if batches else []
    lap("update")  # and what is said of it: the seconds of a step add up
    return metrics, samples


def evaluate(policy, problems, samples, temperature, o):
    """The figures of eval.summary on held-out problems, the work divided among the processes."""
    refresh(policy.sampler, policy.model)

    def mine(problems):
        return evaluation.evaluate(policy.sampler, policy.tokenizer, policy.eos_ids, problems, samples, temperature,
                                   o.max_new_tokens, batch=min(512, o.sample_batch), seed=o.seed)["completions"] if problems else []  # fmt: skip

    return evaluation.summary(share(mine, problems))


# ---------------------------------------------------------------- a run


def load(o, checkpoint=None):
    """Policy and problems. All that can be wrong with them is found here, before the run directory is touched."""
    fields = lambda name: {} if name in data.KNOWN else {"prompt_field": o.prompt_field, "answer_field": o.answer_field}
    train = data.load_problems(o.data, **fields(o.data))
    held_out = data.load_problems(o.eval_data, **fields(o.eval_data), limit=o.eval_limit, benchmark=True)
    config = describe(o, train, held_out)
    train, overlap = data.drop_overlap(train, held_out)
    source = str(checkpoint or o.model)
    compares = bool(losses.NEED_REFERENCE & {o.method, o.advantage})  # with the starting policy, also when it is resumed
    if not all(Path(name).is_dir() for name in [source] + [o.model] * compares):
        data.hub_reachable()  # without a network, only the hub's cache is asked, and at once
    model, tokenizer, eos_ids = load_policy(source, o.device)
    room = context(model.config) - o.max_new_tokens
    if room <= 0:
        raise UserError(f"--max-new-tokens {o.max_new_tokens}: leaves no room for a prompt in the {context(model.config)} positions of the model")
    encoded = data.encode_prompts(tokenizer, [prompt for prompt, _ in train], min(o.max_prompt_tokens, room))
    if train and not any(encoded):
        raise UserError(f"--model {source}: its tokenizer and chat template leave nothing of a prompt")
    problems = [(ids, answer) for ids, (_, answer) in zip(encoded, train) if ids]
    if not problems:
        raise UserError(f"--data {o.data}: no prompt is left to train on ({overlap} dropped as held-out)")
    data.encode_prompts(tokenizer, [prompt for prompt, _ in held_out], room)  # an error if none fits
    optimizer = adamw(model, o)
    if world()[0] == 0:
        print(f"{o.method}: {sum(p.numel() for p in model.parameters()):,} parameters on {o.device}, {len(problems):,} problems"
              f" ({overlap} dropped as held-out, {len(train) - len(problems)} as too long), {len(held_out)} held out")  # fmt: skip
    policy = argparse.Namespace(
        model=model, sampler=sampling_copy(model, o), tokenizer=tokenizer, eos_ids=eos_ids, optimizer=optimizer,
        reference=load_policy(o.model, o.device)[0].requires_grad_(False) if compares else None,
        prm=process_model(o) if o.advantage == "prime" else None, config=config, rounds=0, bad_updates=0, probe=None,
    )  # fmt: skip
    for trained in filter(None, (model, policy.prm and policy.prm.model)) if o.gradient_checkpointing else ():
        recompute(trained)
    policy.kept = {"optimizer": optimizer}  # what checkpoints hold beside the model: name -> whatever has a state_dict
    if policy.prm:
        policy.kept |= {"prm": policy.prm.model, "prm_optimizer": policy.prm.optimizer}
    return policy, problems, held_out


def loop(policy, problems, held_out, lines, started, o):
    """Steps until the last one, or until something ends the run. Returns its first and last metrics and why it was interrupted, or None."""
    first, last, said = (lines or [None])[0], (lines or [None])[-1], set()
    accuracy = next((line["accuracy"] for line in reversed(lines) if "accuracy" in line), math.nan)
    interrupted, rank = None, world()[0]
    log = lambda name: open(Path(o.out) / name if rank == 0 else os.devnull, "a")
    with signals(rank == 0) as received, log("metrics.jsonl") as metrics_file, log("samples.jsonl") as samples_file, recorder(o, rank) as trace:
        progress = tqdm(range(len(lines) + 1, o.steps + 1), desc=o.method, initial=len(lines), total=o.steps, disable=rank > 0)
        for number in progress:
            if entropy_is_spent(last, o):
                progress.write(f"entropy {last['entropy']:.3g} is below --stop-when-entropy {o.stop_when_entropy:g}: the run is over")
                break
            measured = {}
            if number % o.eval_every == 1 or o.eval_every == 1 or number == o.steps:  # of the policy that enters the step
                accuracy = evaluate(policy, held_out, 1, 0.0, o)["accuracy"]
                measured = {"accuracy": accuracy, "accuracy_sampled": evaluate(policy, held_out, 1, 1.0, o)["accuracy"]}
            metrics, samples = step(policy, problems_of_step(problems, policy.rounds + 1, o), number, o)
            trace.step()
            progress.set_postfix(reward=f"{metrics['reward']:.2f}", entropy=f"{metrics['entropy']:.3f}",
                                 cov=f"{metrics['covariance'] or 0:+.4f}", accuracy=f"{accuracy:.2f}")  # fmt: skip
            last = plain(metrics | measured)
            last["seconds"]["total"] = sum(last["seconds"].values())
            first = first or last

            def record():
                print(json.dumps(last), file=metrics_file, flush=True)
                if measured and samples:
                    print(*(json.dumps(plain(line)) for line in samples), sep="\n", file=samples_file, flush=True)
                for line in remarks(last, first, said, o):
                    progress.write(line)

            leader(record)
            interrupted = next(filter(None, gather(interruption(received, started, o))), None)
            if number % o.save_every == 0 or number == o.steps or interrupted or entropy_is_spent(last, o):
                together(save, policy, number, o)
            if interrupted:
                break
    return first, last, interrupted


def train(o):
    """A run, from its beginning or its last checkpoint. Returns the exit status."""
    started = time.time()
    checkpoint, lines = leader(find, o)
    policy, problems, held_out = together(load, o, checkpoint)
    if checkpoint:
        together(restore, policy, checkpoint)
    leader(go_on, policy.config, len(lines)) if checkpoint else leader(begin, policy.config)
    if o.check_theorem and world()[0] == 0:
        policy.probe = theorem.open_probe(policy, held_out, o)
    first, last, interrupted = loop(policy, problems, held_out, lines, started, o)
    if interrupted:
        why, status = interrupted
        if world()[0] == 0:
            print(f"stopped by {why} after step {last['step']}, all is saved: the same command with --resume{' for --overwrite' * o.overwrite} goes on")
        return status
    sampled, greedy = evaluate(policy, held_out, o.final_samples, 1.0, o), evaluate(policy, held_out, 1, 0.0, o)
    leader(conclude, policy, greedy, sampled, first, last, time.time() - started, o)
    return 0


def main():
    o = options()
    if "RANK" in os.environ:  # set by torchrun
        keep_apart()
        if o.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if o.device == "cuda" else "gloo")
    try:
        status = ending(train, o)
    finally:
        release()
    if dist.is_initialized() and status not in (1, 130):  # after an error of one process the others may wait elsewhere; torchrun ends them
        dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
