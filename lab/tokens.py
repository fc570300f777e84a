"""Which tokens carry entropy and covariance: one rollout batch of a model that is not trained.

    python -m lab.tokens --out DIR -- --model DIR_OR_HUB_ID --data gsm8k [other options of train.py]

The problems are those of the first step of train.py with these options, --prompts of them with --samples
completions each. Advantages are GRPO's. Log-probs and entropies are computed in fp32; of the first COMPARED
completions also as an update with --precision bf16 computes them, and by the bf16 copy that would sample. A
token is rare if its log-prob is below the mean.

Written to DIR: tokens.md and tokens.png; data/tokens.json, what they show; completions.png, two of the
completions token by token.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

import checkpoint
import losses
import options
import parallel
import plot
import train
from covariance import kinds, select_kl_cov
from data import UserError
from lab.figures import draw_tokens
from lab.law import markdown, report

SHARES = {0.0002: 5.654, 0.002: 3.112, 0.02: 1.385, 0.2: 0.351, 0.5: 0.152, 1.0: 0.003}  # 2505.22617, table 1
WORDS, OFTEN = 30, 10  # how many words are listed, of those that occur so often at least
COMPARED = 64  # completions whose bf16 log-probs are compared with fp32
RATIOS = 2e-3, 2e-2  # of KL-Cov: published, and this repository's default


def rollout_batch(policy, problems, o):
    """The rollout batch as one mini-batch, scored in fp32, and what a method is given of it."""
    _, lap = checkpoint.stopwatch("sample", "reward")
    o = argparse.Namespace(**vars(o) | {"filter_groups": False, "mini_batch": o.prompts})
    groups, _ = train.collect(policy, train.problems_of_step(problems, 0, o), 1, o, lap)
    rewards = torch.tensor([group.rewards for group in groups])
    if not (rewards.amax(1) > rewards.amin(1)).any():
        raise UserError("no group has different rewards, so there is no covariance; take more --prompts")
    advantages = losses.group_advantages(rewards)
    o.precision = "fp32"
    (batch,) = train.mini_batches(policy, groups, advantages, o)
    t = losses.Tokens(batch.old_logp, batch.old_logp, batch.advantages, batch.mask, batch.entropy)
    return batch, t


def concentration(t):
    """Mean covariance of the top shares of the tokens, and the share of entropy in the top fifth."""
    cov = t.covariance[t.mask].sort(descending=True).values
    H = t.entropy[t.mask].sort(descending=True).values
    shares = {share: cov[: max(1, int(share * len(cov)))].mean().item() for share in SHARES}
    return shares, (H[: len(H) // 5].sum() / H.sum()).item()


def words(batch, values, tokenizer):
    """[(word, mean value, how often)] of the WORDS words of highest mean."""
    of = defaultdict(list)
    for row, completion in enumerate(batch.completions):
        for column, token in enumerate(completion):
            of[token].append(values[row, column].item())
    means = [(sum(v) / len(v), token, len(v)) for token, v in of.items() if len(v) >= OFTEN]
    return [(tokenizer.decode([token]), mean, n) for mean, token, n in sorted(means, reverse=True)[:WORDS]]


def rounding(policy, batch, t, o):
    """What bf16 changes, against fp32: {way: figures} for the update's arithmetic and for the copy's."""
    few = SimpleNamespace(prompts=batch.prompts[:COMPARED], completions=batch.completions[:COMPARED])
    high, low = (argparse.Namespace(**vars(o) | {"precision": name}) for name in ("fp32", "bf16"))
    found, copy = {}, train.sampling_copy(policy.model, low)
    for way, model, how in (("update", policy.model, low), ("sampler", copy, high)):
        logp, H = parallel.score(model, few, o.temperature, how)
        mask = t.mask[:COMPARED, : logp.shape[1]]
        exact = [x[:COMPARED, : logp.shape[1]] for x in (t.logp, t.entropy, t.advantages)]
        found[way] = {}
        for name, x, y in (("logp", logp, exact[0]), ("entropy", H, exact[1])):
            d = (x - y)[mask].abs().double()
            found[way][name] = [d.mean().item(), d.quantile(0.99).item(), d.max().item()]
        for ratio in RATIOS:
            ours, theirs = (select_kl_cov(losses.token_covariance(x, exact[2], mask), mask, ratio)
                            for x in (logp, exact[0]))  # fmt: skip
            found[way][f"changed {ratio:g}"] = [int((theirs & ~ours).sum()), int(theirs.sum())]
    return found


def tables(found):
    """All figures as markdown."""
    shares = [(f"{share:.2%}", f"{mean:.3f}", SHARES[share]) for share, mean in found["shares"].items()]
    text = "Mean covariance of the tokens of highest covariance:\n\n"
    text += markdown(["share of the tokens", "here", "Qwen2.5-7B, published"], shares)
    fifth = found["entropy in the top fifth"]
    text += f"\nThe fifth of highest entropy holds {fifth:.0%} of the entropy.\n\n"
    rows = [[a, *(f"{found['kinds'][f'{a}, {b}'][0]:+.0f} ({found['kinds'][f'{a}, {b}'][1]:,})"
                  for b in ("right", "wrong"))] for a in ("likely", "rare")]  # fmt: skip
    text += "Sum of covariance (number of tokens), by probability and answer:\n\n"
    text += markdown(["tokens", "right answers", "wrong answers"], rows)
    listed = ", ".join(f"`{word!r}` {mean:.2f}" for word, mean, _ in found["words by entropy"])
    text += f"\nWords of highest mean entropy (at least {OFTEN} times): {listed}.\n"
    rows = []
    for way, d in found["bf16"].items():
        rows += [[f"{way}, {name}", *(f"{x:.2g}" for x in d[name])] for name in ("logp", "entropy")]
    text += f"\nbf16 against fp32, absolute differences, {COMPARED} completions:\n\n"
    text += markdown(["", "mean", "99th percentile", "largest"], rows)
    for ratio in RATIOS:
        changed = [f"{n} of {of} ({way})" for way, d in found["bf16"].items()
                   for n, of in [d[f"changed {ratio:g}"]]]  # fmt: skip
        text += f"\nOf KL-Cov's choice with k = {ratio:g} other tokens: {', '.join(changed)}.\n"
    return text


def draw(found):
    """Left: mean covariance of the top shares, here and published. Right: sums by kind of token."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(list(SHARES), list(found["shares"].values()), "o-", color="#D55E00", label="here")
    left.loglog(list(SHARES), list(SHARES.values()), "s--", color="#0072B2", label="Qwen2.5-7B, published")
    left.set(xlabel="share of the tokens, highest covariance first", ylabel="their mean covariance")
    left.set_title("How few tokens hold the covariance")
    left.legend()
    sums = {name.replace(", ", ",\n"): total for name, (total, _) in found["kinds"].items()}
    right.bar(list(sums), list(sums.values()), color=["#999999"] * 3 + ["#D55E00"])
    right.axhline(0, color="black")
    right.set(ylabel="sum of Cov(y_i) over the rollout batch")
    right.set_title("Above 0: the entropy falls")
    return figure


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.tokens", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", default="figures", metavar="DIR", help="where to write (default figures)")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="of train.py")
    own = parser.parse_args()
    out = Path(own.out)
    o = options.options(["--method", "grpo", *own.options, "--mini-batch", "1", "--out", str(out / "unused")])
    try:
        policy, problems, _ = train.load(o)
        batch, t = rollout_batch(policy, problems, o)
        shares, fifth = concentration(t)
        lengths = t.mask.sum(1)
        found = {
            "completions": len(batch.completions), "tokens": int(lengths.sum()),
            "right": batch.rewards.mean().item(), "length": lengths.float().mean().item(),
            "truncated": sum(c[-1] not in policy.eos_ids for c in batch.completions) / len(lengths),
            "entropy": t.entropy[t.mask].mean().item(), "shares": shares, "entropy in the top fifth": fifth,
            "kinds": kinds(t.covariance, t.logp, t.advantages, t.mask),
            "words by entropy": words(batch, t.entropy, policy.tokenizer),
            "bf16": rounding(policy, batch, t, o),
        }  # fmt: skip
        head = (f"Made by lab/tokens.py: {Path(o.model).name}, {Path(o.data).stem}, {found['completions']} "
                f"completions of at most {o.max_new_tokens} tokens, {found['tokens']:,} in all; "
                f"{found['right']:.1%} right, {found['truncated']:.0%} truncated, entropy "
                f"{found['entropy']:.3f} nats.\n\n")  # fmt: skip
        chosen = losses.Loss(t.logp, selected=select_kl_cov(t.covariance, t.mask, RATIOS[0]))
        samples = checkpoint.plain(checkpoint.sample_lines(policy.tokenizer, batch, t, chosen, 1, 16))
        with rc_context(plot.STYLE):
            report(out, "tokens", head + tables(found), found, draw(found))
            draw_tokens(samples).savefig(out / "completions.png", dpi=100)
    except (UserError, OSError) as error:
        parser.exit(2, f"lab.tokens: error: {error}\n")


if __name__ == "__main__":
    main()
