"""Reinforcement learning with verifiable rewards, and what the policy's entropy does meanwhile.

    python train.py --method kl_cov                          the embedded policy and task, minutes on a CPU
    python train.py --method grpo --model Qwen/Qwen2.5-0.5B --data dapo_math_17k --eval-data math500
    torchrun --nproc_per_node=8 train.py ...                 the same on eight GPUs

One step, in this order: problems -> rollout -> reward -> advantages -> old log-probs and entropy ->
for each mini-batch: covariance -> selection -> loss -> update -> log.
"""

import copy
import math
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import data
import losses
import parallel
import reward
import rollout
from data import UserError
from options import options, say
from parallel import leader, share, together, world

ROUNDS = 10  # of sampling in a step at most, with --filter-groups: as published in arXiv 2505.22617
STUCK = 3  # steps in a row without a finite update, after which a run stops


@dataclass
class Policy:
    """The model that is trained, and what goes with it."""

    model: torch.nn.Module
    sampler: torch.nn.Module  # what rollouts are drawn from: the model itself, or its copy in bf16
    tokenizer: Any
    eos_ids: set
    optimizer: torch.optim.Optimizer
    reference: torch.nn.Module | None = None  # the starting policy, for losses.NEED_REFERENCE
    prm: Any = None  # prime.py's process reward model
    memory: dict = field(default_factory=dict)  # what a method remembers from update to update


@dataclass
class Group:
    """The completions of one problem, their texts and their rewards: G of each."""

    prompt: list
    completions: list
    texts: list
    rewards: list


@dataclass
class Batch:
    """A mini-batch of B completions of up to T tokens. Tensors are (B, T), rewards (B,)."""

    prompts: list  # B lists of token ids
    completions: list
    texts: list
    rewards: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logp: torch.Tensor | None = None  # under the policy that sampled, like the two entropies
    entropy: torch.Tensor | None = None  # nats, at the sampling temperature
    entropy1: torch.Tensor | None = None  # nats, at temperature 1
    ref_logp: torch.Tensor | None = None


# ---------------------------------------------------------------- one step


def step(policy, problems, number, o):
    """One step, from problems (prompt ids, answer) to an updated policy.

    Returns a line of metrics.jsonl and some lines of samples.jsonl, as dicts.
    """
    seconds, lap = checkpoint.stopwatch("sample", "reward", "score", "update")
    groups, dropped = collect(policy, problems, number, o, lap)
    rollout.release(policy.sampler)

    rewards = torch.tensor([g.rewards for g in groups]).view(-1, o.samples)  # (P, G)
    lengths = torch.tensor([[len(c) for c in g.completions] for g in groups]).view(-1, o.samples)
    advantages = losses.group_advantages(rewards, o.advantage, lengths=lengths) if groups else rewards
    lap("reward")

    batches = mini_batches(policy, groups, advantages, o)
    others = mini_batches(policy, dropped, torch.zeros(len(dropped), o.samples), o)  # the entropy is over all
    if policy.reference:
        for batch in batches:
            batch.ref_logp = parallel.score(policy.reference, batch, o.temperature, o)[0]
    extra = policy.prm.step(batches, o) if policy.prm and batches else {}
    lap("score")

    updates = []
    strength = max(0.0, 1 - (number - 1) / o.anneal) if o.anneal else 1.0
    for n in range(o.passes * len(batches)):
        choice = rollout.seeded(o.seed, f"{number}.{n}", "select")
        updates.append(update(policy, batches[n % len(batches)], choice, strength, n == 0, o))

    logs = [log for *_, log in updates]
    metrics = {"step": number} | checkpoint.summary(batches + others, logs, policy.eos_ids, o)
    metrics |= extra | {"lr": policy.optimizer.param_groups[0]["lr"], "strength": strength}
    samples = []
    if batches:
        t, loss, _ = updates[0]
        samples = checkpoint.sample_lines(policy.tokenizer, batches[0], t, loss, number)
    lap("update")
    return metrics | {"seconds": seconds | {"total": sum(seconds.values())}}, samples


def problems_of_step(problems, rounds, o):
    """The problems of a step that `rounds` rounds of o.prompts problems came before.

    All problems come in random order, then in another one, and so on. A step takes one round, or with
    --filter-groups up to ROUNDS.
    """
    first, count = rounds * o.prompts, o.prompts * (ROUNDS if o.filter_groups else 1)
    size, order = len(problems), []
    for epoch in range(first // size, (first + count - 1) // size + 1):
        order += torch.randperm(size, generator=rollout.seeded(o.seed, epoch, "order")).tolist()
    return [problems[i] for i in order[first % size :][:count]]


def collect(policy, problems, number, o, lap):
    """The groups of a step: (those that are trained on, those that are dropped).

    Without --filter-groups all groups of one round are kept. With it (dynamic sampling, DAPO, arXiv
    2503.14476, section 3.2) a group is kept if its rewards differ, and rounds follow until o.prompts groups
    are kept.
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
            own = slice(i * o.samples, (i + 1) * o.samples)
            group = Group(prompt, completions[own], texts[own], rewards[own])
            useful = min(group.rewards) < max(group.rewards) or not o.filter_groups
            (kept if useful and len(kept) < o.prompts else dropped).append(group)
        if len(kept) == o.prompts:
            break
    return kept, dropped


def draw_rollouts(policy, prompts, number, o):
    """o.samples completions of each prompt, as one list. The random numbers belong to prompt and sample."""
    generator = rollout.seeded(o.seed, number, "sample")
    noise = torch.rand(len(prompts), o.samples, o.max_new_tokens, generator=generator)
    at_once = max(1, o.sample_batch // o.samples)
    return sample(policy, prompts, list(noise), o.samples, o.temperature, at_once, o)


def sample(policy, prompts, noise, n, temperature, at_once, o):
    """n completions of each prompt, as one list; the processes divide the prompts, `at_once` at a time."""
    refresh(policy)

    def mine(prompts, noise):
        groups = []
        for i in range(0, len(prompts), at_once):
            some, u = prompts[i : i + at_once], torch.stack(noise[i : i + at_once])
            groups += rollout.sample(policy.sampler, some, n, o.max_new_tokens, temperature, policy.eos_ids,
                                     noise=u)
        return groups

    return [completion for group in share(mine, prompts, noise) for completion in group]


def refresh(policy):
    """The sampler's weights become the model's, in place."""
    if policy.sampler is not policy.model:
        own, new = policy.sampler.parameters(), policy.model.parameters()
        torch._foreach_copy_([p.data for p in own], [p.data for p in new])


def mini_batches(policy, groups, advantages, o):
    """The groups as mini-batches. Old log-probs are computed as the update will compute them."""
    batches = []
    for i in range(0, len(groups), o.mini_batch):
        some = groups[i : i + o.mini_batch]
        completions = [c for g in some for c in g.completions]
        lengths = torch.tensor([len(c) for c in completions])
        mask = torch.arange(lengths.max()) < lengths[:, None]  # from the lengths, never from the ids
        batches.append(Batch(
            prompts=[g.prompt for g in some for _ in g.completions],
            completions=completions,
            texts=[text for g in some for text in g.texts],
            rewards=torch.tensor([r for g in some for r in g.rewards]),
            mask=mask,
            advantages=advantages[i : i + o.mini_batch].reshape(-1, 1) * mask,
        ))
    for batch in batches:
        batch.old_logp, batch.entropy = parallel.score(policy.model, batch, o.temperature, o)
        batch.entropy1 = batch.entropy
        if o.temperature != 1:  # the policy's own, beside that of the distribution that was sampled from
            batch.entropy1 = parallel.score(policy.model, batch, 1.0, o)[1]
    return batches


def update(policy, batch, choice, strength, first, o):
    """One mini-batch: covariance -> selection -> loss -> update. Returns Tokens, Loss and a log."""
    logp, entropy = parallel.score(policy.model, batch, o.temperature, o)
    if first and not torch.equal(logp.nan_to_num(), batch.old_logp.nan_to_num()):
        raise RuntimeError("the first ratio is not 1: old and new log-probs come from different computations")
    t = losses.Tokens(
        logp.requires_grad_(), batch.old_logp, batch.advantages, batch.mask, entropy.requires_grad_(),
        generator=choice, old_entropy=batch.entropy, ref_logp=batch.ref_logp, strength=strength,
        memory=policy.memory,
    )
    loss = losses.METHODS[o.method](t, o)
    kept = t.mask if loss.kept is None else loss.kept
    mean = losses.aggregate(loss.token_loss, kept, kept.sum())
    dlogp, dentropy = torch.autograd.grad(mean, (logp, entropy), allow_unused=True, materialize_grads=True)

    policy.optimizer.zero_grad(set_to_none=True)
    parallel.backward(policy.model, batch, dlogp, dentropy, o)
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), o.grad_clip)
    finite = bool(torch.isfinite(norm) and torch.isfinite(mean))
    if finite and norm > 0:  # without a signal AdamW would still move, by its momentum
        policy.optimizer.step()
    return t, loss, {
        "tokens": int(t.mask.sum()),
        "covariance": t.covariance.sum().item(),
        "selected": 0 if loss.selected is None else int(loss.selected.sum()),
        "clipped": 0 if loss.clipped is None else int((loss.clipped & kept).sum()),
        "ratio_max": t.ratio[t.mask].max().item(),
        "loss": mean.item(),
        "grad_norm": norm.item(),
        "finite": finite,
    }


# ---------------------------------------------------------------- a run


def load(o, source=None):
    """Policy, problems and held-out problems, both as [(prompt ids or None if too long, answer), ...].

    source: a checkpoint to load the model from, instead of --model. All that can be wrong with model and data
    is found here, before the run directory is touched; then UserError.
    """
    fields = o.prompt_field, o.answer_field
    train = data.load_problems(o.data, *fields)
    held_out = data.load_problems(o.eval_data, *fields, limit=o.eval_limit, benchmark=True)
    train, overlap = data.drop_overlap(train, held_out)
    if not train:
        raise UserError(f"--data {o.data}: no problem is left, all {overlap} are held-out problems as well")
    model, tokenizer, eos_ids = rollout.load_policy(str(source or o.model), o.device)
    context = rollout.context(model.config)
    room = context - o.max_new_tokens
    if room <= 0:
        raise UserError(f"--max-new-tokens {o.max_new_tokens}: takes less than the {context} of the model")
    held_out = data.encode_problems(tokenizer, held_out, room, f"--eval-data {o.eval_data}")
    encoded = data.encode_problems(tokenizer, train, min(o.max_prompt_tokens, room), f"--data {o.data}")
    problems = [(ids, answer) for ids, answer in encoded if ids]
    if not problems:
        raise UserError(f"--model {o.model}: its tokenizer and chat template leave nothing of a prompt")
    optimizer = parallel.adamw(model, o.lr, o.shard_optimizer)
    policy = Policy(model, sampling_copy(model, o), tokenizer, eos_ids, optimizer)
    if losses.NEED_REFERENCE & {o.method, o.advantage}:
        policy.reference = rollout.load_policy(o.model, o.device)[0].requires_grad_(False)
    if o.advantage == "prime":
        from prime import ProcessRewardModel  # here, since no other run needs it

        policy.prm = ProcessRewardModel(o)
    if o.gradient_checkpointing:
        recompute(model, o)
        if policy.prm:
            recompute(policy.prm.model, o)
    if world()[0] == 0:
        size = sum(p.numel() for p in model.parameters())
        too_long = len(encoded) - len(problems)
        print(f"{o.method}: {size:,} parameters on {o.device}, {len(problems):,} problems ({overlap} dropped "
              f"as held-out, {too_long} as too long), {len(held_out)} held out")
    return policy, problems, held_out


def sampling_copy(model, o):
    """What samples: with --precision bf16 a copy, since reading the weights takes most of the time."""
    if o.precision == "fp32":
        return model
    sampler = copy.deepcopy(model)
    for p in sampler.parameters():  # not sampler.bfloat16(): rotary frequencies are a buffer and stay in fp32
        p.data = p.data.bfloat16()
    return sampler


def recompute(model, o):
    """--gradient-checkpointing, by the model's own means."""
    try:
        model.gradient_checkpointing_enable()
    except ValueError as error:
        raise UserError(f"--gradient-checkpointing: --model {o.model} cannot do it: {error}") from error


def evaluate(policy, held_out, n, temperature, o):
    """Rewards of n completions of each held-out problem: (P, n). A prompt that does not fit scores 0."""
    fits = [i for i, (ids, _) in enumerate(held_out) if ids]
    own = [rollout.seeded(o.seed, i, "evaluate") for i in fits]
    noise = [torch.rand(n, o.max_new_tokens, generator=generator) for generator in own]
    at_once = max(1, min(512, o.sample_batch) // n)
    completions = sample(policy, [held_out[i][0] for i in fits], noise, n, temperature, at_once, o)
    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = torch.zeros(len(held_out), n)
    answers = [held_out[i][1] for i in fits for _ in range(n)]
    rewards[fits] = torch.tensor(share(reward.grade_all, texts, answers)).view(-1, n)
    return rewards


def loop(policy, problems, held_out, lines, received, o):
    """Steps until the last one, or until a process has `received` a signal, which is returned.

    Adds to `lines`. Raises UserError if updates are not finite any more.
    """
    accuracy = next((line["accuracy"] for line in reversed(lines) if "accuracy" in line), math.nan)
    done, steps = len(lines), range(len(lines) + 1, o.steps + 1)
    progress = tqdm(steps, o.method, initial=done, total=o.steps, disable=world()[0] > 0)
    for number in progress:
        measured = {}
        if (number - 1) % o.eval_every == 0 or number == o.steps:  # of the policy that enters the step
            accuracy = evaluate(policy, held_out, 1, 0.0, o).mean().item()
            sampled = evaluate(policy, held_out, 1, 1.0, o).mean().item()
            measured = {"accuracy": accuracy, "accuracy_sampled": sampled}
        rounds = sum(line.get("rounds", 1) for line in lines)
        metrics, samples = step(policy, problems_of_step(problems, rounds, o), number, o)
        lines.append(checkpoint.plain(metrics | measured))
        leader(checkpoint.append, o.out, lines[-1], checkpoint.plain(samples) if measured else [])
        progress.set_postfix(reward=f"{metrics['reward']:.2f}", entropy=f"{metrics['entropy']:.3f}",
                             cov=f"{metrics['covariance'] or 0:+.4f}", accuracy=f"{accuracy:.2f}")
        if number >= STUCK and all(line["skipped"] == line["updates"] > 0 for line in lines[-STUCK:]):
            raise UserError(f"step {number}: no update of the last {STUCK} steps was finite; look at "
                            f"--lr {o.lr:g} and the weights of --model")
        stop = next((signals[0] for signals in parallel.gather(received) if signals), None)
        if number % o.save_every == 0 or number == o.steps or stop:
            together(checkpoint.save, policy, number, o)
        if stop:
            return stop


def train(o, received=()):
    """A run, from its beginning or from its last checkpoint. Returns the exit status.

    received: signals that ask the run to stop; it does so after the step, with everything saved.
    """
    started = time.time()
    folder, lines = leader(checkpoint.find, o)
    policy, problems, held_out = together(load, o, folder)
    config = checkpoint.describe(o, problems, held_out)
    if folder:
        together(checkpoint.restore, policy, folder)
    lock = together(checkpoint.lock, o.out)  # held until this function returns
    if folder:
        leader(checkpoint.go_on, config, len(lines))
    else:
        leader(checkpoint.begin, config)
    if stop := loop(policy, problems, held_out, lines, received, o):
        if world()[0] == 0:
            name = signal.Signals(stop).name
            print(f"stopped by {name} after step {len(lines)}; everything is saved, --resume goes on")
        return 128 + stop
    sampled = evaluate(policy, held_out, o.final_samples, 1.0, o)
    greedy = evaluate(policy, held_out, 1, 0.0, o)
    leader(finish, policy, greedy, sampled, lines, time.time() - started, o)
    return 0


def finish(policy, greedy, sampled, lines, seconds, o):
    """model/, curves.png, final.json, and a line that says what happened. greedy, sampled: rewards (P, n)."""
    once, passed, key = sampled.mean().item(), sampled.amax(1).mean().item(), str(o.final_samples)
    final = {"accuracy": greedy.mean().item(), "accuracy_sampled": once, "pass_at": {"1": once, key: passed}}
    checkpoint.save_model(policy, Path(o.out) / "model")
    subprocess.run([sys.executable, Path(__file__).parent / "plot.py", o.out], stdout=subprocess.DEVNULL)
    checkpoint.write_json(Path(o.out) / "final.json", final)  # last: by this file a run is known to be over
    before, after = (math.nan if x["entropy"] is None else x["entropy"] for x in (lines[0], lines[-1]))
    print(f"{o.method}, {len(lines)} steps, {seconds:.0f} s: entropy {before:.3f} -> {after:.3f} nats, "
          f"held-out accuracy {lines[0]['accuracy']:.1%} -> {final['accuracy']:.1%} "
          f"(sampled {once:.1%}, pass@{key} {passed:.1%}). See {o.out}/curves.png; plot.py compares runs")


def main():
    o = options()
    parallel.start_process(o.device)
    saved = f"if {o.out} holds a checkpoint, --resume goes on from there"
    try:
        status = train(o, parallel.listen())
    except UserError as error:
        status = complain(2, error)
    except OSError as error:
        status = complain(1, f"{error}; {saved}")
    except KeyboardInterrupt:
        status = complain(130, f"stopped at once; {saved}")
    except (RuntimeError, MemoryError) as error:
        if not data.out_of_memory(error):
            raise
        print(f"train.py: error: out of memory: lower --micro-batch {o.micro_batch}, --sample-batch "
              f"{o.sample_batch}, --prompts or --max-new-tokens; {saved}", file=sys.stderr)  # of any process
        status = 1
    if dist.is_initialized() and status not in (1, 130):  # else others may wait for this one
        dist.destroy_process_group()
    sys.exit(status)


def complain(status, message):
    """One line on standard error, from the first process of each node. Returns the exit status."""
    say(f"error: {message}")
    return status


if __name__ == "__main__":
    main()
