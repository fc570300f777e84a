"""The theorem on a language model: does -Cov(log pi, change of the logits) predict the change of entropy?

    dH(s)  ~=  -Cov_{a ~ pi(.|s)}( log pi(a|s), z'(s,a) - z(s,a) )        to first order, for each state s

(arXiv 2505.22617, section 3; covariance.py shows it on a single softmax.) A state is a prompt and the
beginning of a completion. The probe, some states of completions of held-out problems, is drawn once from the
starting policy. Its logits over the whole vocabulary are computed before and after each update.

    python -m lab.theorem                  the first update at several learning rates: where it breaks
    python -m lab.theorem --follow N       N steps of training: every update, and each step as a whole

Options of train.py may follow after --, such as `python -m lab.theorem -- --model DIR --method clip_cov`.
Written to OUT: theorem.md and theorem.png, or with --follow theorem_steps.md and theorem_steps.png, and into
data/ one JSON line for each learning rate or step:

    r2         1 - sum (dH - predicted)^2 / sum (dH - mean dH)^2 over the states; nothing is fitted
    slope      of the least-squares line of dH over the prediction
    moved      how far the logits went: root mean square of the standard deviation, under pi, of z' - z
    points     [predicted, measured] dH of some states
    dH         mean over the states, nats: of the update, or with --follow of the whole step
    bf16       share of the weights that the update changes if they are rounded to bf16; not with --follow

With --follow, `covariance` is that of the step's tokens. There the advantage stands in the place of z' - z,
so its unit is another one, and it is compared with -dH by correlation.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

import options
import plot
import rollout
import train
from covariance import predicted_entropy_change
from data import UserError
from entropy import LOGITS_AT_ONCE, entropy
from lab.law import markdown, report

ROWS, STATES = 32, 512  # completions in the probe, and the most of their states
RATES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


# ---------------------------------------------------------------- the probe


def draw_probe(policy, held_out, o):
    """[(prompt ids, completion ids, positions)]: a state is what precedes the token at a position."""
    prompts = [ids for ids, _ in held_out if ids][:ROWS]
    generator = torch.Generator().manual_seed(o.seed)
    groups = rollout.sample(policy.sampler, prompts, 1, o.max_new_tokens, 1.0, policy.eos_ids, generator)
    states = [(i, t) for i, (completion,) in enumerate(groups) for t in range(len(completion))]
    most = min(STATES, len(states), max(1, LOGITS_AT_ONCE // policy.model.config.vocab_size))
    chosen = random.Random(o.seed).sample(states, most)
    probe = []
    for i, (prompt, (completion,)) in enumerate(zip(prompts, groups)):
        positions = sorted(t for row, t in chosen if row == i)
        if positions:
            probe.append((prompt, completion, positions))
    return probe


@torch.no_grad()
def probe_logits(model, probe):
    """z(s, .) of all states of the probe: (S, V)."""
    head, logits = model.get_output_embeddings(), []
    for prompt, completion, positions in probe:
        ids = torch.tensor([prompt + completion], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]  # (T, D)
        logits.append(head(hidden[[len(prompt) + t - 1 for t in positions]]))
    return torch.cat(logits)


def changes(before, after):
    """Measured dH, predicted dH, and the standard deviation under pi of z' - z: (S, V) twice -> (3, S)."""
    parts = []
    for z, new in zip(before.split(64), after.split(64)):  # float64 of a large vocabulary takes memory
        z, new = z.double(), new.double()
        p, dz = torch.softmax(z, -1), new - z
        mean = (p * dz).sum(-1, keepdim=True)
        moved = (p * (dz - mean) ** 2).sum(-1).sqrt()
        parts.append(torch.stack((entropy(new) - entropy(z), predicted_entropy_change(z, dz), moved)))
    return torch.cat(parts, 1).cpu()


def figures(change, count):
    """r2, slope, moved and some points of (3, N) changes; None where undefined, e.g. if nothing moved."""
    measured, predicted, moved = change
    dm, dp = measured - measured.mean(), predicted - predicted.mean()
    found = {"r2": 1 - (measured - predicted).square().sum() / dm.square().sum(),
             "slope": (dm * dp).sum() / dp.square().sum(), "moved": moved.square().mean().sqrt()}  # fmt: skip
    found = {key: x.item() if x.isfinite() else None for key, x in found.items()}
    every = max(1, len(measured) // count)
    return found | {"points": torch.stack((predicted, measured), 1)[::every].tolist()}


# ---------------------------------------------------------------- measurements


def at_rates(policy, problems, probe, rates, o):
    """The first update at each learning rate, as lines.

    Without weight decay the first update of AdamW is the learning rate times a direction that does not depend
    on it. So one step of train.py is enough: the model is then moved along its direction by each rate.
    """
    start = [p.detach().clone() for p in policy.model.parameters()]
    before = probe_logits(policy.model, probe)
    train.step(policy, train.problems_of_step(problems, 0, o), 1, o)
    direction = [(p.detach() - s) / o.lr for p, s in zip(policy.model.parameters(), start)]
    for rate in rates:
        changed = 0
        with torch.no_grad():
            for p, s, d in zip(policy.model.parameters(), start, direction):
                p.copy_(s + rate * d)
                changed += int((p.bfloat16() != s.bfloat16()).sum())
        change = changes(before, probe_logits(policy.model, probe))
        mean = {"dH": change[0].mean().item(), "predicted": change[1].mean().item()}
        share = changed / sum(s.numel() for s in start)
        yield {"rate": rate} | mean | figures(change, 200) | {"bf16": share}


def over_steps(policy, problems, probe, steps, o):
    """Training, with the probe's logits computed after each update: a line for each step."""
    logits, updates = [probe_logits(policy.model, probe)], []

    def after_update(*_):
        new = probe_logits(policy.model, probe)
        updates.append(changes(logits[-1], new))
        logits[1:] = [new]  # the first and the last logits of the step

    handle, rounds = policy.optimizer.register_step_post_hook(after_update), 0
    for number in range(1, steps + 1):
        metrics, _ = train.step(policy, train.problems_of_step(problems, rounds, o), number, o)
        rounds += metrics.get("rounds", 1)
        if updates:
            whole = changes(logits[0], logits[-1])
            line = {"step": number, "covariance": metrics["covariance"], "dH": whole[0].mean().item()}
            yield line | figures(torch.cat(updates, 1), 20) | {"whole step": figures(whole, 20)}
        logits[:] = logits[-1:]
        updates.clear()
    handle.remove()


# ---------------------------------------------------------------- tables and the picture


def of_rates(lines):
    """The lines of at_rates as a table in markdown, and a panel for each learning rate."""
    rows, panels = [], []
    for line in lines:
        keys = ("rate", "moved", "dH", "predicted", "r2", "slope")
        cells = ["-" if line[key] is None else f"{line[key]:.3g}" for key in keys]
        cells.append(f"{line['bf16']:.1%}")
        title = f"lr {cells[0]}: logits moved {cells[1]}\nR^2 {cells[4]}, slope {cells[5]}"
        rows.append(cells)
        panels.append((title, "predicted dH, nats", "measured dH, nats", line["points"]))
    head = ["learning rate", "logits moved", "mean dH, nats", "predicted", "R^2", "slope",
            "bf16 weights changed"]  # fmt: skip
    return markdown(head, rows), panels


def middle(lines, key, form="{:.2f} ({:.2f} to {:.2f})"):
    """Median and quartiles of the known values of a figure; a form may show the median only."""
    known = torch.tensor([line[key] for line in lines if line[key] is not None], dtype=torch.float64)
    quartiles = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    return form.format(*known.quantile(quartiles)) if len(known) else "-"


def of_steps(name, lines):
    """The lines of over_steps as a table in markdown, and three panels."""
    whole = [line["whole step"] for line in lines]
    pairs = torch.tensor([[line["covariance"], -line["dH"]] for line in lines], dtype=torch.float64)
    row = [name, middle(lines, "r2"), middle(lines, "slope", "{:.2f}"), middle(lines, "moved", "{:.3f}"),
           middle(whole, "r2"), f"{torch.corrcoef(pairs.T)[0, 1]:.2f}",
           f"{(pairs[:, 0] > 0).double().mean():.0%}"]  # fmt: skip
    head = ["R^2, updates", "slope", "moved", "R^2, whole steps", "corr(cov, -dH)", "cov > 0"]
    panels = [("steps", "covariance of the step's tokens", "-dH, nats", pairs.tolist())]
    for title, of in (("whole steps", whole), ("single updates", lines)):
        points = [point for line in of for point in line["points"]]
        panels.insert(0, (title, "predicted dH, nats", "measured dH, nats", points))
    return markdown(["run", *head], [row]), panels


def draw(panels):
    """Scatters side by side, three in a row. panels: [(title, label of x, label of y, points)]."""
    rows = -(-len(panels) // 3)
    with rc_context(plot.STYLE | {"font.size": 14, "axes.titlesize": 15}):
        figure = Figure(figsize=(15, 5 * rows), layout="constrained")
        for i, (title, x, y, points) in enumerate(panels, 1):
            axis = figure.add_subplot(rows, 3, i)
            axis.plot(*zip(*points), ".", color="#0072B2", alpha=0.5)
            if x.startswith("predicted"):
                axis.axline((0, 0), slope=1, color="#999999", zorder=0)  # where the theorem is exact
            axis.set(title=title, xlabel=x, ylabel=y)
            axis.locator_params(nbins=5)
    return figure


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.theorem", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--follow", type=int, metavar="N", help="watch N steps of training")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to compare")
    parser.add_argument("--out", default="figures", metavar="DIR", help="where to write (default figures)")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="of train.py (default: grpo)")
    own = parser.parse_args()
    out = Path(own.out)
    # train.step writes no files, so the run directory that its options ask for is never made.
    o = options.options(["--method", "grpo", *own.options, "--out", str(out / "unused")])
    if not own.follow:
        o.mini_batch, o.passes, o.lr = o.prompts, 1, max(own.rates)  # one update
    try:
        policy, problems, held_out = train.load(o)
        probe = draw_probe(policy, held_out, o)
        if own.follow:
            measured = over_steps(policy, problems, probe, own.follow, o)
        else:
            measured = at_rates(policy, problems, probe, own.rates, o)
        lines, name = [], "theorem_steps" if own.follow else "theorem"
        (out / "data").mkdir(parents=True, exist_ok=True)
        with open(out / "data" / f"{name}.jsonl", "w") as file:
            for line in measured:
                lines.append(line)
                print(json.dumps(line), file=file, flush=True)
        if not lines:
            raise UserError("no group had different rewards, so there was no update")
        run = f"{o.method}, seed {o.seed}"
        text, panels = of_steps(run, lines) if own.follow else of_rates(lines)
        states = sum(len(positions) for *_, positions in probe)
        model = Path(o.model).name
        head = f"Made by lab/theorem.py: {model}, {run}, {states} states.\n\n"
        report(out, name, head + text, None, draw(panels))
    except (UserError, OSError) as error:
        parser.exit(2, f"lab.theorem: error: {error}\n")


if __name__ == "__main__":
    main()
