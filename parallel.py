"""Exactness: the same numbers for any number of processes and any size of micro-batch.

The loss of a mini-batch depends on the model only through the log-probs and entropies of its tokens, two
tensors (B, T) that are small even where the logits (B, T, V) are not. So the chain rule is cut there:

1. `score`: every process computes its rows, micro-batch by micro-batch, and all exchange them.
   Covariance, selection, loss and metrics are then computed on the whole mini-batch, by everyone alike.
2. The loss is differentiated with respect to the log-probs: dL/dlogp is (B, T) as well.
3. `backward`: dL/dtheta = sum over tokens of dL/dlogp dlogp/dtheta. Each process takes its rows, micro-batch
   by micro-batch, back through the model, and the gradients are added up. Micro-batches and processes are
   nothing but the order of that sum. A row whose dL/dlogp is zero everywhere is left out of it.

Rows that are the same, as more and more are when a policy loses its entropy, go through the model once.

The price is one more forward pass than if all rows fitted into memory at once. Public implementations
select tokens and average losses within each micro-batch instead, and their results depend on its size.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import entropy as entropies

PARCEL = 2**25  # numbers, 128 MiB in fp32: gradients that travel together, for each exchange takes its time, however small


def world():
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def keep_apart():
    """Each process of a machine keeps to its share of the cores. Left alone, Linux may put those that talk to each other on one."""
    rank, n = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[rank * len(cores) // n : (rank + 1) * len(cores) // n] or [cores[rank % len(cores)]])


def gather(value):
    """[value of rank 0, value of rank 1, ...], alike on all processes."""
    if world()[1] == 1:
        return [value]
    values = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values


def outcome(function, *arguments):
    """(what function(*arguments) returns, None), or (None, its OSError or ValueError)."""
    try:
        return function(*arguments), None
    except (OSError, ValueError) as failure:
        return None, failure


def together(function, *arguments):
    """function(*arguments). Its OSError or ValueError in one process is raised in all: none waits for one that has gone."""
    result, error = outcome(function, *arguments)
    for failure in filter(None, gather(error)):
        raise failure
    return result


def leader(function, *arguments):
    """What function(*arguments) returns in rank 0, the only one to call it, or its OSError or ValueError, in all processes."""
    result, error = gather(outcome(function, *arguments) if world()[0] == 0 else None)[0]
    if error:
        raise error
    return result


def share(function, *lists):
    """function(*lists) with the work divided: each process does every n-th item, all get the whole result, in order.

    `function` maps lists of one length to a list of that length, and empty lists to an empty one.
    """
    rank, n = world()
    mine = function(*(items[rank::n] for items in lists))
    if n == 1:
        return mine
    whole = [None] * len(lists[0])
    for r, part in enumerate(gather(mine)):
        whole[r::n] = part
    return whole


def interleave(mine, counts):
    """Blocks of `counts` rows, whole, on all n processes, by one exchange. `mine` holds rows rank, rank + n, ... of each block."""
    n = world()[1]
    if n == 1 or not mine:
        return mine
    shares = [-(-count // n) for count in counts]  # as many rows for each process
    part = mine[0].new_zeros(sum(shares), *mine[0].shape[1:])
    for own, room in zip(mine, part.split(shares)):
        room[: len(own)] = own
    parts = [torch.empty_like(part) for _ in range(n)]
    dist.all_gather(parts, part)
    return [rows.flatten(0, 1)[:count] for rows, count in zip(torch.stack(parts, 1).split(shares), counts)]


def sum_gradients(model):
    """Adds up the gradients of all processes; the loss is over the whole mini-batch, so no division follows."""
    parcels = [[]]
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if parcels[-1] and sum(g.numel() for g in parcels[-1]) + p.numel() > PARCEL:
                parcels.append([])
            parcels[-1].append(p.grad)
    for parcel in parcels if world()[1] > 1 else []:
        total = torch.cat([g.flatten() for g in parcel]) if len(parcel) > 1 else parcel[0].flatten()  # alone, it is not copied
        dist.all_reduce(total)
        for g, part in zip(parcel, total.split([g.numel() for g in parcel])):
            g.copy_(part.view_as(g))


def adamw(model, o):
    """AdamW. With --shard-optimizer each process keeps the moments of its share of the parameters only (ZeRO-1, arXiv 1910.02054)."""
    settings = dict(lr=o.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if o.shard_optimizer and world()[1] > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # it takes its time, and few need it

        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **settings)
    return torch.optim.AdamW(model.parameters(), **settings)


def collect_shards(optimizer):
    """What each process keeps of a sharded optimizer's state, on rank 0, whose state_dict is whole then.

    Its own consolidate_state_dict does the same by way of a list of bytes, 76 ns for each of them: an hour for 7 billion parameters.
    """
    own, rank, n = optimizer.optim.state_dict(), *world()
    own["state"] = {i: {name: x.cpu() for name, x in moments.items()} for i, moments in own["state"].items()}
    optimizer._all_state_dicts = [None] * n if rank == 0 else []
    dist.gather_object(own, optimizer._all_state_dicts or None)


def distinct(batch):
    """Rows that differ: the first of each kind, as indices (D,), and for every row the place of its kind among them, (B,).

    As a policy loses its entropy, the completions of a prompt become the same. A model need not be asked twice: log-probs and entropies
    of the D rows are gathered to all, and what the B rows send back to them is added up.
    """
    first = {}
    rows = [first.setdefault((tuple(p), tuple(c)), i) for i, (p, c) in enumerate(zip(batch["prompts"], batch["completions"]))]
    return torch.tensor(rows).unique(return_inverse=True)


def micro_batches(prompts, completions, tokens, rows=None):
    """Indices of rows (default: of all) in groups of at most `tokens` tokens, padding included, rows of like length together."""
    length = [len(p) + len(c) for p, c in zip(prompts, completions)]
    groups = [[]]
    for i in sorted(range(len(length)) if rows is None else rows, key=length.__getitem__, reverse=True):
        if groups[-1] and (len(groups[-1]) + 1) * length[groups[-1][0]] > tokens:
            groups.append([])
        groups[-1].append(i)
    return [group for group in groups if group]


def autocast(o):
    """bf16 arithmetic on a GPU; the parameters stay in fp32, or small updates would round away."""
    return torch.autocast("cuda", torch.bfloat16) if o.device == "cuda" else contextlib.nullcontext()


def recompute(model):
    """--gradient-checkpointing: of each layer only the input is kept, and the backward pass computes the layer once more.

    What transformers has for it works in training mode only, and that would bring dropout: the policy is in eval mode throughout.
    """

    def once_more(forward):
        return lambda *x, **more: checkpoint(forward, *x, use_reentrant=False, preserve_rng_state=False, **more) if torch.is_grad_enabled() else forward(*x, **more)

    for layer in model.base_model.layers:
        layer.forward = once_more(layer.forward)


def score(model, batch, temperature, o):
    """Log-prob and entropy of every completion token, without gradient: two tensors (B, T) on the CPU, alike on all processes.

    batch: its "prompts" and "completions" are lists of B lists of token ids.
    """
    return score_each(model, [batch], temperature, o)[0]


def score_each(model, batches, temperature, o):
    """The same of several mini-batches, [(logp, entropy), ...], with one exchange for all."""
    rank, n = world()
    kinds = [distinct(batch) for batch in batches]
    width, mine = max((len(c) for b in batches for c in b["completions"]), default=0), []
    for batch, (first, _) in zip(batches, kinds):
        prompts, completions, rows = batch["prompts"], batch["completions"], first[rank::n]
        scores = torch.zeros(len(prompts), 2, width)
        for group in micro_batches(prompts, completions, o.micro_batch, rows.tolist()):
            with torch.no_grad(), autocast(o):
                logp, ent = entropies.score(model, [prompts[i] for i in group], [completions[i] for i in group], temperature)
            scores[group, :, : logp.shape[1]] = torch.stack((logp, ent), 1).cpu()
        mine.append(scores[rows])
    whole = interleave(mine, [len(first) for first, _ in kinds])
    return [tuple(scores[place, :, : max(map(len, batch["completions"]))].unbind(1)) for batch, (_, place), scores in zip(batches, kinds, whole)]


def backward(model, batch, dlogp, dentropy, o):
    """Takes dL/dlogp and dL/dH (B, T) back to the parameters of the model, this process's rows of them."""
    (rank, n), prompts, completions = world(), batch["prompts"], batch["completions"]
    first, place = distinct(batch)
    dlogp, dentropy = (torch.zeros_like(d).index_add_(0, first[place], d) for d in (dlogp, dentropy))  # of equal rows to the first
    signal = ((dlogp != 0) | (dentropy != 0)).any(1)
    for group in micro_batches(prompts, completions, o.micro_batch, signal.nonzero()[:, 0].tolist()[rank::n]):
        with autocast(o):
            entropies.backward(model, [prompts[i] for i in group], [completions[i] for i in group], dlogp[group], dentropy[group], o.temperature)
    sum_gradients(model)
