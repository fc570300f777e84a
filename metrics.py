"""Metrics: what is logged of a step, a line of metrics.jsonl and a few of samples.jsonl.

All figures are sums over counts, never means of means. Those of the policy (reward, entropy, completion_length, truncated,
no_signal, different, tokens) are over all its rollouts, also over those that --filter-groups drops; those of the updates (covariance,
selected, clip_fraction, ratio_max, loss, grad_norm) over what was trained on. null stands where there was nothing.
"""

import contextlib
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import profile, schedule


def stopwatch(*names):
    """Seconds of each name, and lap(name), which adds the time since the lap before."""
    seconds, then = dict.fromkeys(names, 0.0), [time.perf_counter()]

    def lap(name):
        now = time.perf_counter()
        seconds[name] += now - then[0]
        then[0] = now

    return seconds, lap


def recorder(o, rank):
    """--profile: a context that records the steps 2 to 4 of this process in OUT/trace.json.gz; step() is to be called after each."""
    if not o.profile or rank > 0:
        return contextlib.nullcontext(SimpleNamespace(step=lambda: None))
    save = lambda trace: trace.export_chrome_trace(str(Path(o.out) / "trace.json.gz"))
    return profile(schedule=schedule(wait=0, warmup=1, active=3, repeat=1), on_trace_ready=save)


def summary(policy, batches, others, logs, o):
    """The figures of a step: mini-batches that were trained on, others that were not, and the log of each update."""
    every = batches + others
    completions = [c for b in every for c in b["completions"]]
    rewards = torch.cat([b["rewards"] for b in every])
    no_signal = (rewards.view(-1, o.samples).amax(1) == rewards.view(-1, o.samples).amin(1)).float()
    tokens = sum(map(len, completions))
    total = lambda key: sum(log[key] for log in logs)
    mean = lambda key: total(key) / len(logs) if logs and math.isfinite(total(key)) else None
    fraction = lambda key: total(key) / total("tokens") if logs else None
    token_mean = lambda key: sum(b[key].sum().item() for b in every) / tokens
    seq_mean = lambda key: sum((b[key].sum(1) / b["mask"].sum(1)).sum().item() for b in every) / len(completions)
    own = "entropy" if o.temperature == 1 else "entropy1"  # the policy's own entropy is that at temperature 1
    metrics = {
        "reward": rewards.mean().item(),
        "entropy": token_mean(own),
        "entropy_seq": seq_mean(own),
        "covariance": fraction("covariance"),
        "selected": fraction("selected"),
        "clip_fraction": fraction("clipped"),
        "ratio_max": max((log["ratio_max"] for log in logs), default=None),
        "loss": mean("loss"),
        "grad_norm": mean("grad_norm"),
        "lr": policy.optimizer.param_groups[0]["lr"],
        "completion_length": tokens / len(completions),
        "truncated": sum(c[-1] not in policy.eos_ids for c in completions) / len(completions),
        "no_signal": no_signal.mean().item(),
        "different": len({(tuple(p), tuple(c)) for b in every for p, c in zip(b["prompts"], b["completions"])}) / len(completions),
        "skipped": sum(not log["finite"] for log in logs),
        "tokens": tokens,
    }
    if o.temperature != 1:
        metrics["entropy_sampling"] = token_mean("entropy")
    if o.filter_groups:
        metrics |= {"rounds": len(no_signal) // o.prompts, "filtered": int(no_signal.sum())}
    return metrics


def sample_lines(policy, batch, t, number, count=8):
    """Some completions of a step, of different problems, token by token, with what the method saw: lines of samples.jsonl."""
    lines, B = [], len(batch["completions"])
    for i in range(0, B, -(-B // count)):
        row = lambda x: [float(f"{v:.4g}") for v in x[i, : len(batch["completions"][i])].tolist()]
        lines.append({
            "step": number, "prompt": policy.tokenizer.decode(batch["prompts"][i]), "completion": batch["texts"][i],
            "reward": batch["rewards"][i].item(), "tokens": policy.tokenizer.batch_decode([[y] for y in batch["completions"][i]]),
            "entropy": row(batch["entropy"]), "covariance": row(t.covariance), "advantage": row(t.advantages),
            "selected": [] if t.selected is None else t.selected[i, : len(batch["completions"][i])].nonzero()[:, 0].tolist(),
        })  # fmt: skip
    return lines
