"""Two figures for the course: a training step, and completions in the colours of their tokens.

    python -m lab.figures runs/kl_cov-s0      results/step.png, and results/tokens.png from the run's samples

The second takes completions of the first step in samples.jsonl: the right one with the lowest covariance of a
token, and the wrong one with the highest.
"""

import argparse
import math
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

import plot
from lab.page import read_samples

LINES = 3  # of a completion that are shown
STEP = [  # what is done, what comes out, where it is written; four of the second row are repeated
    [("problems", "P prompts", "data.py"), ("rollout", "P x G completions", "rollout.py"),
     ("reward", "right or wrong: (P, G)", "reward.py"),
     ("advantages", "above its group? (P, G)", "losses.py"),
     ("log-probs, entropy", "of each token: (B, T)", "entropy.py")],
    [("covariance", "of each token: (B, T)", "covariance.py"),
     ("selection", "the top k N tokens", "covariance.py"), ("loss", "one number", "losses.py"),
     ("update", "a new policy", "train.py"), ("log", "metrics.jsonl", "checkpoint.py")],
]  # fmt: skip


def draw_step():
    """A training step: ten boxes in two rows, the order of train.step and train.update."""
    figure = Figure(figsize=(16, 6), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.1, 10), ylim=(-0.55, 3.1), title="One training step")
    axis.axis("off")
    arrow = {"arrowstyle": "-|>", "linewidth": 2.5, "color": "#555555"}
    around = {"boxstyle": "round,pad=0.12", "fc": "#FFF3E6", "ec": "#D55E00"}
    box = {"boxstyle": "round,pad=0.05", "fc": "white", "ec": "#0072B2"}
    centre = {"ha": "center", "va": "center"}
    axis.add_patch(FancyBboxPatch((0.05, -0.2), 7.7, 1.15, **around))
    axis.text(3.9, -0.45, "for each mini-batch, 8 times", color="#D55E00", fontsize=16, **centre)
    for boxes, y in zip(STEP, (2, 0)):
        for i, (name, what, file) in enumerate(boxes):
            axis.add_patch(FancyBboxPatch((2 * i + 0.1, y), 1.6, 0.75, **box))
            axis.text(2 * i + 0.9, y + 0.58, name, weight="bold", fontsize=15, **centre)
            axis.text(2 * i + 0.9, y + 0.34, what, fontsize=12, **centre)
            axis.text(2 * i + 0.9, y + 0.12, file, fontsize=12, color="#0072B2", **centre)
            if i < 4:
                axis.annotate("", (2 * i + 2.05, y + 0.37), (2 * i + 1.75, y + 0.37), arrowprops=arrow)
    axis.annotate("", (0.9, 0.82), (8.9, 1.95), arrowprops=arrow)
    return figure


def window(line, room):
    """(first, last) token of a line's `room` characters around the token of largest |covariance|."""
    size = [len(text) for text in line["tokens"]]
    first = last = max(range(len(size)), key=lambda i: abs(line["covariance"][i]))
    while (first > 0 or last < len(size) - 1) and sum(size[first : last + 1]) < room:
        first, last = max(0, first - 1), min(len(size) - 1, last + 1)
    return first, last


def strip(axis, y, width, line, key, colour):
    """The window's tokens from y down, in the colours of their values of a key. Returns the next free y."""
    (first, last), x = window(line, LINES * (width - 8)), 0
    axis.text(-0.5, y - 0.5, key, ha="right", va="center", fontsize=16)
    for i in range(first, last + 1):
        text = "(end)" if "<|" in line["tokens"][i] else line["tokens"][i].replace("\n", "\u21b5")
        if x + len(text) > width:
            x, y = 0, y - 1
        frame = {"ec": "black", "linewidth": 2, "zorder": 3} if i in line["selected"] else {"ec": "white"}
        axis.add_patch(Rectangle((x, y - 0.9), len(text), 0.85, fc=colour(line[key][i]), **frame))
        for j, sign in enumerate(text):  # one by one: all signs then take the same room
            axis.text(x + j + 0.5, y - 0.5, sign.replace("$", "\\$"), fontsize=min(20, 1350 / width),
                      family="monospace", ha="center", va="center", zorder=4)  # fmt: skip
        x += len(text)
    return y - 1.3


def draw_tokens(samples):
    """A right and a wrong completion: each token in the colour of its entropy, and of its covariance."""
    first = [line for line in samples if line["step"] == samples[0]["step"]]
    shown = [min(first, key=lambda line: (-line["reward"], min(line["covariance"]))),
             max(first, key=lambda line: (-line["reward"], max(line["covariance"])))]  # fmt: skip
    width = min(90, max(60, *(sum(map(len, line["tokens"])) for line in shown)))
    largest = max(abs(c) for line in shown for c in line["covariance"]) or 1
    blue = lambda H: colormaps["Blues"](0.7 * min(H / 1.5, 1))
    orange = lambda c: colormaps["PuOr_r"](0.5 + 0.3 * math.copysign(math.sqrt(abs(c) / largest), c))
    figure, y = Figure(layout="constrained"), 0
    axis = figure.subplots()
    axis.set_title("Where entropy sits, and where covariance")
    axis.axis("off")
    for line in shown:
        question = line["prompt"].rpartition("user\n")[2].split("<|")[0].replace("\n", " ")[:100]
        verdict = "right" if line["reward"] else "wrong"
        axis.text(0, y - 0.5, f"{verdict}: {question}".replace("$", "\\$"), fontsize=16, va="center")
        y = strip(axis, y - 1, width, line, "entropy", blue)
        y = strip(axis, y, width, line, "covariance", orange) - 0.4
    legend = ("blue: up to 1.5 nats; orange: covariance above 0, purple: below (colour as its root); "
              "framed: the method's choice")
    axis.text(0, y, legend, fontsize=15, va="center")
    axis.set(xlim=(-0.13 * width, width), ylim=(y - 0.5, 0))
    figure.set_size_inches(16, 0.7 + 0.4 * -y)
    return figure


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", help="the directory of a run")
    parser.add_argument("--out", default="results", help="where to write (default results)")
    o = parser.parse_args()
    Path(o.out).mkdir(parents=True, exist_ok=True)
    with rc_context(plot.STYLE | {"savefig.dpi": 100}):
        draw_step().savefig(Path(o.out) / "step.png")
        draw_tokens(read_samples(o.run)).savefig(Path(o.out) / "tokens.png")


if __name__ == "__main__":
    main()
