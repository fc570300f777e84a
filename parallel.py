"""Exactness: the same numbers for any number of processes and any size of micro-batch.

The loss of a mini-batch depends on the model only through the log-probs and entropies of its tokens: two
tensors (B, T), which are small even where the logits (B, T, V) are not. So the chain rule is cut there:

1. `score`: every process computes its rows, micro-batch by micro-batch, and all exchange them.
   Covariance, selection, loss and metrics are then computed on the whole mini-batch, by every process alike.
2. The loss is differentiated with respect to the log-probs: dL/dlogp is (B, T) as well.
3. `backward`: dL/dtheta = sum over tokens of dL/dlogp dlogp/dtheta. Each process takes its rows, micro-batch
   by micro-batch, back through the model, and the gradients are added up. Micro-batches and processes only
   change the order of that sum. A row whose dL/dlogp is zero everywhere is left out.

When a policy loses its entropy, many completions of a prompt are equal: such rows go through the model once.

The price is one more forward pass than if all rows fitted into memory at once. Public implementations select
tokens and average losses within each micro-batch instead, so their results depend on its size.
"""

import os
import signal
import time

import torch
import torch.distributed as dist
from transformers.modeling_layers import GradientCheckpointingLayer

import entropy as entropies

ECHO = 2.0  # seconds: torchrun passes a signal on, so the same one may arrive twice
PARCEL = 2**25  # numbers (128 MiB in fp32) of gradients that are exchanged at once: each exchange takes time

# ---------------------------------------------------------------- processes


def world():
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_process(device):
    """Joins the processes that torchrun has started, if it has. Each keeps to its own share of the cores.

    Left alone, Linux may put processes that talk to each other on one core.
    """
    if "RANK" not in os.environ:
        return
    rank, n = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        own = cores[rank * len(cores) // n : (rank + 1) * len(cores) // n]
        os.sched_setaffinity(0, own or [cores[rank % len(cores)]])
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")


def gather(value):
    """[value of rank 0, value of rank 1, ...], the same on all processes."""
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
    """function(*arguments). An OSError or ValueError of one process is raised in all: none waits for it."""
    result, error = outcome(function, *arguments)
    for failure in gather(error):
        if failure:
            raise failure
    return result


def leader(function, *arguments):
    """function(*arguments) in rank 0 alone; all get the result, or its OSError or ValueError."""
    result, error = gather(outcome(function, *arguments) if world()[0] == 0 else None)[0]
    if error:
        raise error
    return result


def share(function, *lists):
    """function(*lists), divided: each process does every n-th item; all get all results, in order.

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


def sum_gradients(model):
    """Adds up the gradients of all processes. The loss is one mean over all tokens, so nothing is divided."""
    parcels = [[]]
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if parcels[-1] and sum(g.numel() for g in parcels[-1]) + p.numel() > PARCEL:
                parcels.append([])
            parcels[-1].append(p.grad)
    for parcel in parcels if world()[1] > 1 else []:
        total = torch.cat([g.flatten() for g in parcel])
        dist.all_reduce(total)
        for g, part in zip(parcel, total.split([g.numel() for g in parcel])):
            g.copy_(part.view_as(g))


def adamw(model, lr, shard=False):
    """AdamW without weight decay. `shard`: each process keeps a share of the moments (ZeRO-1, 1910.02054)."""
    settings = dict(lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if shard and world()[1] > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # a second of import, and few need it

        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **settings)
    return torch.optim.AdamW(model.parameters(), **settings)


def listen():
    """SIGINT and SIGTERM let the step end, and are noted in the list returned; one more stops at once."""
    received, since = [], []

    def handler(number, frame):
        since.append(time.monotonic())
        if since[-1] - since[0] > ECHO:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        if not received and world()[0] == 0:  # not by print, which the signal may have interrupted
            os.write(2, b"\ntrain.py: stopping after this step; another signal, 2 s later, stops at once\n")
        received.append(number)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return received


def whole_state(part):
    """The state_dict of a model or optimizer; of a sharded one, on rank 0, with the moments of all processes.

    Its own consolidate_state_dict sends a list of bytes, 58 ns each: most of an hour for 7B parameters.
    """
    if not hasattr(part, "optim"):
        return part.state_dict()
    params = [p for group in part.param_groups for p in group["params"]]
    place = {p: i for i, p in enumerate(params)}
    own = {place[p]: {k: v.cpu() for k, v in moments.items()} for p, moments in part.optim.state.items()}
    every = [None] * world()[1] if world()[0] == 0 else None
    dist.gather_object(own, every)
    groups = [group | {"params": [place[p] for p in group["params"]]} for group in part.param_groups]
    moments = {i: own for shard in every or [] for i, own in shard.items()}
    return {"state": dict(sorted(moments.items())), "param_groups": groups}


# ---------------------------------------------------------------- the rows of a mini-batch


def distinct(prompts, completions):
    """The first row of each kind, as indices (D,), and the place of each row's kind among them, (B,)."""
    first = {}
    rows = [first.setdefault((tuple(p), tuple(c)), i) for i, (p, c) in enumerate(zip(prompts, completions))]
    return torch.tensor(rows).unique(return_inverse=True)


def micro_batches(prompts, completions, tokens, rows):
    """The rows in groups of at most `tokens` tokens, padding included; rows of similar length go together."""
    length = [len(p) + len(c) for p, c in zip(prompts, completions)]
    groups = [[]]
    for i in sorted(rows, key=length.__getitem__, reverse=True):
        if groups[-1] and (len(groups[-1]) + 1) * length[groups[-1][0]] > tokens:
            groups.append([])
        groups[-1].append(i)
    return [group for group in groups if group]


def autocast(o):
    """With --precision bf16, products in bf16. Parameters stay in fp32, or small updates would round away."""
    return torch.autocast(o.device, torch.bfloat16, enabled=o.precision == "bf16")


@torch.no_grad()
def score(model, batch, temperature, o):
    """Log-probs and entropies of all completion tokens: two (B, T) on the CPU, the same on all processes.

    batch has .prompts and .completions, lists of B lists of token ids. No gradient is kept.
    """
    rank, n = world()
    first, place = distinct(batch.prompts, batch.completions)
    rows = first[rank::n]
    scores = torch.zeros(len(batch.prompts), 2, max(map(len, batch.completions)))
    for group in micro_batches(batch.prompts, batch.completions, o.micro_batch, rows.tolist()):
        prompts, completions = [batch.prompts[i] for i in group], [batch.completions[i] for i in group]
        with autocast(o):
            logp, ent = entropies.score(model, prompts, completions, temperature)
        scores[group, :, : logp.shape[1]] = torch.stack((logp, ent), 1).cpu()
    for r, part in enumerate(gather(scores[rows])):
        scores[first[r::n]] = part
    return scores[first[place]].unbind(1)


def backward(model, batch, dlogp, dentropy, o):
    """Takes dL/dlogp and dL/dH (B, T) back to the parameters' gradients; the processes divide the rows."""
    rank, n = world()
    first, place = distinct(batch.prompts, batch.completions)
    dlogp, dentropy = (torch.zeros_like(d).index_add_(0, first[place], d) for d in (dlogp, dentropy))
    rows = ((dlogp != 0) | (dentropy != 0)).any(1).nonzero()[:, 0].tolist()[rank::n]
    keep_inputs(model, True)
    for group in micro_batches(batch.prompts, batch.completions, o.micro_batch, rows):
        prompts, completions = [batch.prompts[i] for i in group], [batch.completions[i] for i in group]
        with autocast(o):
            entropies.backward(model, prompts, completions, dlogp[group], dentropy[group], o.temperature)
    keep_inputs(model, False)
    sum_gradients(model)


def keep_inputs(model, on):
    """After `model.gradient_checkpointing_enable()`: layers keep their input, backward computes them again.

    transformers does so only for a layer in training mode. What is inside stays in eval mode: no dropout.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = on
