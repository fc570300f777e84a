"""The theorem on a language model: does -Cov(log pi, change of logits) foretell the change of entropy, state by state?

covariance.py shows it on one softmax. Here the same is measured on real updates of a whole model (arXiv 2505.22617, section 3):

    dH(s)  ~=  -Cov_{a ~ pi(.|s)}( log pi(a|s), z'(s,a) - z(s,a) )         for each state s of a fixed probe batch

A state is a prompt and the beginning of a completion. The probe batch is drawn once, from the starting policy on the first
held-out problems, and kept in the run as probe.json. The logits z and z' over the whole vocabulary are those before and
after an update, at temperature 1 and in the model's own precision; what follows from them is computed in float64. The run itself
is the same with and without; the time it takes is counted as that of the update.

    train.py --check-theorem ...      adds to each line of metrics.jsonl, over all states and all updates of the step,
        theorem.r2         1 - sum (dH - predicted)^2 / sum (dH - mean dH)^2; nothing is fitted, so it may be below 0
        theorem.slope      of the least-squares line of dH over predicted
        theorem.moved      root mean square of the standard deviation, under pi, of z' - z: the size of an update
        theorem.step       the same three with all updates of the step taken as one
        theorem.dH         mean over the states, nats, of what the step did to their entropy
        difficulty         of the groups with 0, 1, ... G right answers: their tokens, and the mean covariance of these
    python theorem.py RUN ...         what that comes to over runs; theorem.json in each, and a picture
    python theorem.py                 where it breaks: one gradient of the embedded policy, AdamW's learning rate over five decades

The theorem is of first order, and the demonstration says where that ends. For the embedded policy R^2 was .999 where one update
moved the logits by .03, .98 at .09, .70 at .3 and below 0 from .7 on; the last is a learning rate of 3e-3. In a run the mean hides
that a few states go far, and R^2 can fall earlier. The updates of a step add up: `theorem.step` says what is left of the theorem then.

The batch's token covariance, which Clip-Cov and KL-Cov act on, is the same quantity seen through the sampled tokens, with the advantage
in place of the change of logits. It has other units, so it is compared with -dH by correlation and sign, step by step.
"""

import argparse
import copy
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import plot
import rollout
from covariance import predicted_entropy_change
from entropy import LOGITS_AT_ONCE, entropy
from parallel import micro_batches
from rollout import TINY, load_policy
from data import UserError

PROBLEMS, STATES = 32, 512  # held-out problems that the probe's completions answer, and how many of their states are kept

# ---------------------------------------------------------------- the probe batch


def draw_probe(policy, problems, o):
    """{"rows": [[prompt ids, completion ids], ...], "states": [[row, t], ...]}: the states before token t of completions.

    One completion of each of the first problems, by seed; of all their states as many as the logits' memory allows, at random.
    """
    generator = torch.Generator().manual_seed(o.seed)
    encoded = data.encode_prompts(policy.tokenizer, [prompt for prompt, _ in problems[:PROBLEMS]], o.max_prompt_tokens)
    prompts = [ids for ids in encoded if ids]
    groups = rollout.sample(policy.sampler, prompts, 1, o.max_new_tokens, 1.0, policy.eos_ids, generator)
    states = [[i, t] for i, (completion,) in enumerate(groups) for t in range(len(completion))]
    count = min(STATES, max(1, LOGITS_AT_ONCE // policy.model.config.vocab_size))
    kept = sorted(torch.randperm(len(states), generator=generator)[:count].tolist())
    return {"rows": [[p, c] for p, (c,) in zip(prompts, groups)], "states": [states[i] for i in kept]}


def open_probe(policy, problems, o):
    """The probe batch of a run, with the logits of the policy as it is. Drawn at the run's start, read when it is resumed."""
    file = Path(o.out) / "probe.json"
    if not (o.resume and file.exists()):
        file.with_suffix(".new").write_text(json.dumps(draw_probe(policy, problems, o)))
        os.replace(file.with_suffix(".new"), file)
    probe = json.loads(file.read_text())
    return probe | {"logits": probe_logits(policy.model, probe, o.micro_batch), "changes": []}


@torch.no_grad()
def probe_logits(model, probe, tokens=16384):
    """z(s, .) of every state: (S, V), at most LOGITS_AT_ONCE numbers. `tokens` are read at a time, padding included."""
    head, rows = model.get_output_embeddings(), probe["rows"]
    z = torch.empty(len(probe["states"]), head.weight.shape[0], dtype=head.weight.dtype, device=model.device)
    for group in micro_batches(*zip(*rows), tokens):
        width = max(len(rows[i][0]) + len(rows[i][1]) for i in group)
        ids = torch.tensor([(rows[i][0] + rows[i][1] + [0] * width)[:width] for i in group], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, width, D)
        here = [(s, group.index(i), len(rows[i][0]) + t - 1) for s, (i, t) in enumerate(probe["states"]) if i in group]
        if here:  # a token is predicted one position earlier
            s, b, position = zip(*here)
            z[list(s)] = head(hidden[list(b), list(position)])
    return z


# ---------------------------------------------------------------- measured against predicted


def changes(before, after):
    """dH measured, dH predicted, and how far the logits moved (their standard deviation under pi): (S, V) twice -> 3 of (S,)."""
    parts = []
    for z, new in zip(*(x.split(max(1, LOGITS_AT_ONCE // 16 // x.shape[1])) for x in (before, after))):
        z, new = z.double(), new.double()
        p, dz = torch.softmax(z, -1), new - z
        mean = (p * dz).sum(-1, keepdim=True)
        moved = (p * (dz - mean) ** 2).sum(-1).sqrt()
        parts.append(torch.stack((entropy(new) - entropy(z), predicted_entropy_change(z, dz), moved)))
    return torch.cat(parts, 1).cpu()


def agreement(measured, predicted, moved):
    """r2, slope and moved from (N,) each; None where there is nothing to divide by, or a logit is not finite."""
    dm, dp = measured - measured.mean(), predicted - predicted.mean()
    figures = {
        "r2": 1 - ((measured - predicted) ** 2).sum() / (dm**2).sum(),
        "slope": (dm * dp).sum() / (dp**2).sum(),
        "moved": moved.square().mean().sqrt(),
    }
    return {k: v.item() if v.isfinite() else None for k, v in figures.items()}


def follow(policy, o):
    """After an update: what it did to the probe's states. The logits that the step began with are kept as `first`."""
    probe = policy.probe
    probe.setdefault("first", probe["logits"])
    before, probe["logits"] = probe["logits"], probe_logits(policy.model, probe, o.micro_batch)
    probe["changes"].append(changes(before, probe["logits"]))


def figures(policy, updates, rewards):
    """What --check-theorem adds to a line of metrics.jsonl, at the end of a step."""
    probe = policy.probe
    whole = changes(probe.pop("first"), probe["logits"])
    dH = whole[0].mean()
    theorem = agreement(*torch.cat(probe["changes"], 1)) | {"step": agreement(*whole), "dH": dH.item() if dH.isfinite() else None}
    probe["changes"] = []
    return {"theorem": theorem, "difficulty": by_difficulty(updates, rewards)}


def by_difficulty(updates, rewards):
    """Mean token covariance of the groups with k = 0, 1, ... G right answers, over all updates of a step.

    updates: the Tokens of each, groups in order, pass after pass. rewards: (P, G), 0 or 1. A hard problem has k = 1, an easy one G - 1.
    """
    P, G = rewards.shape
    right, first = (rewards > 0.5).sum(1), 0
    tokens, total = torch.zeros(G + 1), torch.zeros(G + 1)
    for t in updates:
        k = right[(first + torch.arange(len(t.mask) // G)) % P].repeat_interleave(G)  # (B,)
        first += len(t.mask) // G
        tokens.index_add_(0, k, t.mask.sum(1).float())
        total.index_add_(0, k, t.covariance.sum(1).float())
    means = [s / n if n and math.isfinite(s) else None for s, n in zip(total.tolist(), tokens.tolist())]
    return {"tokens": [int(n) for n in tokens], "covariance": means}


# ---------------------------------------------------------------- over a run


def correlation(x, y):
    """Pearson's, None where it is undefined."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (x, y))
    dx, dy = x - x.mean(), y - y.mean()
    scale = ((dx**2).sum() * (dy**2).sum()).sqrt()
    return (dx @ dy / scale).item() if len(x) > 1 and scale > 0 else None


def quartiles(values):
    """First quartile, median, third quartile; None of nothing."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(at).tolist() if values else None


def over_run(steps):
    """The figures of a run from the lines of its metrics.jsonl. UserError without --check-theorem."""
    known = [s for s in steps if s.get("theorem") and s["theorem"]["dH"] is not None and s["covariance"] is not None]
    if not known:
        raise UserError("metrics.jsonl has no `theorem`: the run was made without --check-theorem")
    covariance, fall = [s["covariance"] for s in known], [-s["theorem"]["dH"] for s in known]
    pairs = [(a["covariance"], a["entropy"] - b["entropy"]) for a, b in zip(known, known[1:]) if b["step"] == a["step"] + 1]
    groups = [s["difficulty"] for s in known]
    G = len(groups[0]["tokens"]) - 1
    tokens = [sum(g["tokens"][k] for g in groups) for k in range(G + 1)]
    total = [sum(g["tokens"][k] * (g["covariance"][k] or 0) for g in groups) for k in range(G + 1)]
    spread = lambda lines, key: quartiles([line[key] for line in lines if line[key] is not None])
    updates, whole = [s["theorem"] for s in known], [s["theorem"]["step"] for s in known]
    return {
        "steps": len(known),
        "update": {key: spread(updates, key) for key in ("r2", "slope", "moved")},
        "step": {key: spread(whole, key) for key in ("r2", "slope", "moved")},
        "correlation": correlation(covariance, fall),
        "correlation_of_batches": correlation(*zip(*pairs)) if pairs else None,  # dH from step to step: other problems, so noisier
        "sign_agreement": sum((c > 0) == (f > 0) for c, f in zip(covariance, fall)) / len(known),
        "positive_covariance": sum(c > 0 for c in covariance) / len(known),
        "difficulty": {f"{k}/{G}": {"tokens": tokens[k], "covariance": total[k] / tokens[k] if tokens[k] else None} for k in range(G + 1)},
    }


def table(figures):
    """Two tables, as lines of text: {run: figures of over_run}."""
    cell = lambda x, form: "-" if x is None else format(x, form)
    spread = lambda x: "-" if x is None else f"{x[1]:.3g} ({x[0]:.2g}..{x[2]:.2g})"
    yield f"{'run':28} {'R^2, median (quartiles)':24} {'slope':20} {'moved':22} corr(cov, -dH)  same sign  cov > 0"
    for run, f in figures.items():
        update, step = ([spread(f[k][key]) for key in ("r2", "slope", "moved")] for k in ("update", "step"))
        yield (f"{run:28} {update[0]:24} {update[1]:20} {update[2]:22} {cell(f['correlation'], '.2f'):>14} "
               f"{f['sign_agreement']:10.0%} {f['positive_covariance']:8.0%}")  # fmt: skip
        yield f"{'  whole steps':28} {step[0]:24} {step[1]:20} {step[2]:22}"
    yield "\nmean covariance of the tokens of groups by their share of right answers, hard to easy"
    for run, f in figures.items():
        shares = list(f["difficulty"].items())[1:-1]  # a group of equal rewards has no advantage
        yield f"{run:28} " + "  ".join(f"{share} {cell(d['covariance'], '.4f')}" for share, d in shares)


def draw(runs, file):
    """Covariance and -dH over the steps in one panel, R^2 and slope in the other; a column for each run: {label: (steps, figures)}."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(plot.STYLE | {"font.size": 12, "axes.titlesize": 14}):
        figure = Figure(figsize=(max(8, 6 * len(runs)), 8), dpi=120, layout="constrained")
        for (label, steps), (top, bottom) in zip(runs.items(), figure.subplots(2, len(runs), squeeze=False).T):
            known = [s for s in steps if s.get("theorem")]
            at = [s["step"] for s in known]
            value = lambda key: [math.nan if s["theorem"][key] is None else s["theorem"][key] for s in known]
            twin = top.twinx()
            (covariance,) = top.plot(at, [s["covariance"] for s in known], color="#D55E00", label="covariance of the batch's tokens (left)")
            (fall,) = twin.plot(at, [-v for v in value("dH")], color="#0072B2", label="-dH, mean over the probe's states, nats (right)")
            drawn = [[y for y in axis.lines[0].get_ydata() if math.isfinite(y)] for axis in (top, twin)]
            ends = [(min(ys, default=0), max(ys, default=0)) for ys in drawn]
            below = max(max(-low, 0) / max(high, -low, 1e-12) for low, high in ends)  # both zeros at one height
            for axis, (low, high) in zip((top, twin), ends):
                reach = max(high, -low, 1e-12)
                axis.set_ylim(-1.1 * max(below, 0.1) * reach, 1.1 * reach)
            twin.grid(False)
            top.axhline(0, color="#999999", zorder=0)
            top.legend(handles=[covariance, fall], fontsize=10)
            top.set(title=Path(label).name)
            bottom.plot(at, value("r2"), ".-", color="#000000", label="R^2 of the prediction, single updates")
            bottom.plot(at, value("slope"), ".-", color="#009E73", label="slope, measured over predicted")
            bottom.plot(at, [s["theorem"]["step"]["r2"] for s in known], ".", color="#999999", label="R^2, whole steps")
            bottom.axhline(1, color="#999999", zorder=0)
            bottom.set(xlabel="step", ylim=(-0.5, 2))
            bottom.legend(fontsize=10)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)


# ---------------------------------------------------------------- where it breaks


def demonstrate(rates=tuple(10.0**e for e in (-6, -5, -4, -3.5, -3, -2.5, -2, -1))):
    """One policy gradient of the embedded policy, AdamW's first step along it at each learning rate, in float64."""
    import reward
    from entropy import score
    from losses import group_advantages

    model, tokenizer, eos_ids = load_policy(TINY, dtype=torch.float64)
    policy = SimpleNamespace(model=model, sampler=model, tokenizer=tokenizer, eos_ids=eos_ids)
    o = SimpleNamespace(seed=0, max_new_tokens=40, max_prompt_tokens=80)
    problems = data.load_problems("arithmetic", limit=64)
    prompts = data.encode_prompts(tokenizer, [prompt for prompt, _ in problems], 80)
    groups = rollout.sample(model, prompts, 8, 40, 1.0, eos_ids, torch.Generator().manual_seed(1))
    completions = [c for group in groups for c in group]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = torch.tensor(reward.grade_all(texts, [answer for _, answer in problems for _ in range(8)])).view(-1, 8)
    logp, _ = score(model, [p for p in prompts for _ in range(8)], completions)
    (-(group_advantages(rewards).view(-1, 1) * logp).sum() / sum(map(len, completions))).backward()

    probe = draw_probe(policy, data.load_problems("arithmetic_heldout", limit=PROBLEMS), o)
    before = probe_logits(model, probe)
    S, V = before.shape
    print(f"one step of AdamW along one policy gradient of the embedded policy, {S} states, vocabulary of {V}\n")
    print(f"{'learning rate':>13} {'moved':>9} {'mean dH':>11} {'predicted':>11} {'R^2':>11} {'slope':>9}")
    for lr in rates:
        moved = copy.deepcopy(model)
        for p, q in zip(moved.parameters(), model.parameters()):
            p.grad = q.grad
        torch.optim.AdamW(moved.parameters(), lr=lr, weight_decay=0.0).step()
        c = changes(before, probe_logits(moved, probe))
        f = agreement(*c)
        print(f"{lr:13.1e} {f['moved']:9.2g} {c[0].mean():11.2e} {c[1].mean():11.2e} {f['r2']:11.4f} {f['slope']:9.4f}")
    print("\nmoved: how far the logits went, as standard deviation under the policy. The theorem holds where that is small.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directory of train.py --check-theorem; without any, the demonstration")
    parser.add_argument("--out", metavar="DIR", help="where theorem.png goes (default: a single run's directory, else figures/)")
    o = parser.parse_args()
    if not o.runs:
        return demonstrate()
    runs, figures = {}, {}
    try:
        for run in o.runs:
            runs[run] = plot.read_run(run)[1]
            try:
                figures[run] = over_run(runs[run])
            except UserError as error:
                raise UserError(f"{run}: {error}") from None
        for run in o.runs:
            (Path(run) / "theorem.json").write_text(json.dumps(figures[run], indent=1) + "\n")
        file = Path(o.out or (o.runs[0] if len(o.runs) == 1 else "figures")) / "theorem.png"
        draw(runs, file)
    except UserError as error:
        parser.exit(2, f"theorem.py: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"theorem.py: error: {error.filename}: {error.strerror}\n")
    print(*table(figures), file, sep="\n")


if __name__ == "__main__":
    main()
