"""A run as one page: its curves, its completions token by token, and the tokens that carry entropy and covariance.

    python plot.py RUN --html        writes RUN/page.html

The page is one file that opens by double click. It has no script and fetches nothing, and its content security policy forbids
both; model text is escaped, so a completion that contains HTML is shown and never run. Colours follow the browser's light or
dark mode. Which quantity colours the tokens is chosen with radio buttons and CSS alone. The tokens of a completion are radio
buttons too: one tab stop for each completion, arrow keys from token to token, and the values of the token in a bar at the bottom.

What is shown is what samples.jsonl holds: a few completions of the steps with an evaluation, as the method saw them before the
step's first update. A token's covariance is centred over its mini-batch (covariance.py).
"""

import argparse
import json
import math
from collections import defaultdict
from html import escape
from pathlib import Path
from statistics import fmean
from data import UserError
import plot

LONGEST = 400  # tokens shown of a completion, so that a page stays a page
QUANTITIES = {  # key in samples.jsonl: what the radio button says, unit
    "entropy": ("entropy", "nats"),
    "covariance": ("covariance", "nats"),
    "advantage": ("advantage", ""),
    "selected": ("acted on by the method", ""),
}
CURVES = [  # title, unit, logarithmic, {key in metrics.jsonl: label}
    ("Policy entropy", "nats per token, logarithmic", True, {"entropy": "entropy"}),
    ("Accuracy", "share of problems solved", False,
     {"accuracy": "held-out, greedy", "accuracy_sampled": "held-out, sampled", "reward": "training reward"}),
    ("Covariance", "of log-prob and advantage, nats", False, {"covariance": "covariance"}),
    ("Length", "tokens per completion", False, {"completion_length": "length"}),
]  # fmt: skip
SIGNS = {i: chr(0x2400 + i) for i in range(32)} | {ord("\n"): "↵\n", ord("\t"): "⇥", 127: "␡"}
ACTIONS = {"clip_cov": "its gradient was removed", "kl_cov": "held by the KL penalty"}



# ---------------------------------------------------------------- text of the model


def visible(token):
    """Model text as HTML: escaped, and what would not be seen, or is not allowed in HTML, as a sign."""
    return escape(token.translate(SIGNS))


def number(x, sign=""):
    """Three digits, or a dash for what was not measured."""
    return "-" if x is None or not math.isfinite(x) else f"{x:{sign}.3g}"


def token_rows(line):
    """(token, {quantity: value}) of a line of samples.jsonl; selected is 1 for a token that the method acted on."""
    chosen = set(line["selected"])
    keys = ("entropy", "covariance", "advantage")
    return [(token, dict(zip(keys, values)) | {"selected": float(i in chosen)})
            for i, (token, *values) in enumerate(zip(line["tokens"], *(line[k] for k in keys), strict=True))]  # fmt: skip


def scales(samples):
    """{quantity: the value of full colour}, the greatest magnitude among the completions shown, so that early and late compare."""
    values = [v for line in samples for _, v in token_rows(line)]
    return {key: max((abs(v[key]) for v in values if math.isfinite(v[key])), default=0) or 1.0 for key in QUANTITIES}


def completion(line, name, full, method):
    """One completion as HTML. name: of its radio buttons, one group for each completion."""
    out, rows = [], token_rows(line)
    for token, values in rows[:LONGEST]:
        share = {k: max(-1.0, min(1.0, v / full[k])) if math.isfinite(v) else 0.0 for k, v in values.items()}
        style = ";".join(f"--{k[0]}:{v:.3g}" for k, v in share.items())
        entropy, covariance, advantage = number(values["entropy"]), number(values["covariance"], "+"), number(values["advantage"], "+")
        said = f"entropy {entropy} nats, covariance {covariance}, advantage {advantage}"
        if values["selected"]:
            said += f"; {ACTIONS.get(method, 'the method acted on it')}"
        acted = " acted" if values["selected"] else ""
        out.append(f'<label class="t{acted}" style="{style}"><input type="radio" name="{name}">{visible(token)}'
                   f'<span class="v"><b>{visible(token)}</b> {escape(said)}</span></label>')  # fmt: skip
    more = f"<p>and {len(rows) - LONGEST} more tokens</p>" if len(rows) > LONGEST else ""
    return (f'<article><h4>{"right" if line["reward"] > 0.5 else "wrong"}, {len(rows)} tokens</h4>'
            f'<p class="prompt">{visible(line["prompt"])}</p><div class="tokens">{"".join(out)}</div>{more}</article>')  # fmt: skip


# ---------------------------------------------------------------- the tokens that carry it


def token_means(samples, key, least):
    """[(token, mean, count)] of tokens that occur at least `least` times, highest mean first."""
    values = defaultdict(list)
    for line in samples:
        for token, v in token_rows(line):
            if math.isfinite(v[key]):
                values[token].append(v[key])
    means = [(token, fmean(v), len(v)) for token, v in values.items() if len(v) >= least]
    return sorted(means, key=lambda m: -m[1])


def token_table(samples, key, title, top=12):
    """The tokens of highest mean as an HTML table."""
    least = max(2, sum(len(line["tokens"]) for line in samples) // 2000)
    rows = "".join(f'<tr><th scope="row"><code>{visible(token).replace(" ", "␣")}</code><td>{number(mean)}<td>{count}'
                   for token, mean, count in token_means(samples, key, least)[:top])  # fmt: skip
    head = "".join(f'<th scope="col">{word}' for word in ("token", f"mean {key}", "times"))
    return f"<table><caption>{title}; tokens seen {least} times or more</caption><tr>{head}{rows}</table>"


# ---------------------------------------------------------------- curves


def ticks(low, high, log):
    """A few round values between low and high."""
    if log:
        all_ = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
        inside = [x for x in all_ if low * 0.999 <= x <= high * 1.001]
        if len(inside) > 1:
            return inside if len(inside) <= 6 else [x for x in inside if f"{x:e}"[0] == "1"]
    step = 10.0 ** math.floor(math.log10((high - low) / 2 or 1))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def curve(steps, title, unit, log, keys, width=440, height=240):
    """One panel as inline SVG, in colours of the page. A value that was not measured is a gap, an evaluation a dot."""
    shown = lambda y: y is not None and math.isfinite(y) and (y > 0 or not log)
    found = {label: [(s["step"], s[k]) for s in steps if shown(s.get(k))] for k, label in keys.items()}
    ys = [y for series in found.values() for _, y in series]
    if not ys:
        return f"<figure><figcaption><b>{title}</b> was not measured</figcaption></figure>"
    low, high = (min(ys), max(ys)) if log else (min(*ys, 0), max(*ys, 0.01))
    scale = math.log if log else float
    if log:
        low, high = max(low, high / 1000) / 1.1, high * 1.1
    last = max(s["step"] for s in steps)
    X = lambda x: 46 + (width - 60) * (x - 1) / max(1, last - 1)
    Y = lambda y: 12 + (height - 40) * (1 - (scale(max(y, low)) - scale(low)) / (scale(high) - scale(low)))
    lines = [f'<line class="grid" x1="46" x2="{width - 14}" y1="{Y(y):.1f}" y2="{Y(y):.1f}"/>'
             f'<text x="40" y="{Y(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>' for y in ticks(low, high, log)]  # fmt: skip
    lines += [f'<text x="{X(x):.1f}" y="{height - 10}" text-anchor="middle">{x:.0f}</text>' for x in ticks(1, last, False) if x == int(x)]
    names = []
    for i, (label, series) in enumerate(found.items()):
        if series:
            path = " ".join(f"{X(x):.1f},{Y(y):.1f}" for x, y in series)
            dots = "".join(f'<circle cx="{X(x):.1f}" cy="{Y(y):.1f}" r="2.5"/>' for x, y in series) if len(series) < len(steps) else ""
            lines.append(f'<g class="c{i}"><polyline points="{path}"/>{dots}</g>')
            names.append(f'<span class="c{i}">{label}: {number(series[0][1])} to {number(series[-1][1])}</span>')
    return (f'<figure><figcaption><b>{title}</b>, {unit}<br>{" ".join(names)}</figcaption>'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} over {last} steps">{"".join(lines)}</svg></figure>')  # fmt: skip


def values_table(steps):
    """The curves as numbers."""
    keys = {"step": "step"} | {k: label for *_, keys in CURVES for k, label in keys.items()}
    rows = "".join("<tr>" + "".join(f"<td>{number(s.get(k))}" for k in keys) for s in steps)
    head = "".join(f"<th scope=col>{label}" for label in keys.values())
    return f"<details><summary>The curves as numbers</summary><table><tr>{head}{rows}</table></details>"


# ---------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #111; --faint: #5a5a5a; --edge: #ccc;
        --up: 230 120 0; --down: 0 114 178; --c0: #0060a0; --c1: #b34700; --c2: #5a5a5a }
@media (prefers-color-scheme: dark) {
  :root { --bg: #111; --fg: #eee; --faint: #aaa; --edge: #444; --c0: #6cb8f0; --c1: #ff9a4d; --c2: #aaa } }
body { background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem 1rem 5rem }
.columns { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.columns > * { min-width: 0 }
details { overflow-x: auto }
table { border-collapse: collapse }
th, td { text-align: right; padding: .1rem .6rem; border-bottom: 1px solid var(--edge) }
th:first-child { text-align: left }
caption { text-align: left; color: var(--faint) }

figure { margin: 0 }
svg { width: 100% }
svg text { font-size: 11px; fill: var(--faint) }
.grid { stroke: var(--edge) }
polyline { fill: none; stroke-width: 1.8 }
g.c0 { stroke: var(--c0); fill: var(--c0) } span.c0 { color: var(--c0); margin-right: 1em }
g.c1 { stroke: var(--c1); fill: var(--c1) } span.c1 { color: var(--c1); margin-right: 1em } g.c1 polyline { stroke-dasharray: 6 3 }
g.c2 { stroke: var(--c2); fill: var(--c2) } span.c2 { color: var(--c2); margin-right: 1em } g.c2 polyline { stroke-width: 1 }

fieldset { position: sticky; top: 0; z-index: 1; min-width: 0; background: var(--bg); border: 1px solid var(--edge) }
fieldset label { margin-right: 1.2rem; display: inline-block }
article { border-top: 1px solid var(--edge) }
h4 { margin: .4rem 0; font-weight: normal; color: var(--faint) }
.prompt, .tokens { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 }
.prompt { color: var(--faint); max-height: 7.5em; overflow: auto }

.t { --v: var(--e); background-color: rgb(var(--up) / calc(.6 * var(--v)));
     background-image: linear-gradient(rgb(var(--down) / calc(-.6 * var(--v))) 0 0);
     unicode-bidi: isolate; border-radius: 2px; cursor: default }
body:has(#by-covariance:checked) .t { --v: var(--c) }
body:has(#by-advantage:checked) .t { --v: var(--a) }
body:has(#by-selected:checked) .t { --v: var(--s) }
.t input { appearance: none; position: absolute; opacity: 0; width: 1px; height: 1px; margin: 0 }
.t:hover, .t:focus-within { outline: 2px solid var(--fg) }
.acted { text-decoration: underline 2px }
.v { display: none; position: fixed; left: 0; right: 0; bottom: 0; padding: .5rem 1rem;
     background: var(--fg); color: var(--bg); font: 16px/1.5 system-ui, sans-serif }
.t:focus-within .v { display: block; z-index: 2 }
.t:hover .v { display: block; z-index: 3 }
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
"""


def read_samples(run_dir):
    """The lines of samples.jsonl; a torn last line is left out. UserError if it is missing, empty or damaged."""
    try:
        *lines, torn = (Path(run_dir) / "samples.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
        samples = [json.loads(line) for line in lines]
        for line in samples:
            token_rows(line), line["step"], line["prompt"], line["reward"] > 0
    except OSError as error:
        raise UserError(f"{run_dir}: samples.jsonl: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} is damaged: samples.jsonl: {type(error).__name__}: {error}") from None
    if not samples:
        raise UserError(f"{run_dir} has no completions yet: samples.jsonl holds no whole line")
    return samples


def page(config, steps, samples):
    """The page as a string: config.json, the lines of metrics.jsonl, the lines of samples.jsonl."""
    title = escape(f"{config['method']}, seed {config.get('seed')}")
    logged = sorted({line["step"] for line in samples})
    third = max(1, len(logged) // 3)
    of = lambda chosen: [line for line in samples if line["step"] in set(chosen)]
    first, final, early, late = of(logged[:1]), of(logged[-1:]), of(logged[:third]), of(logged[-third:])
    full = scales(first + final)
    radios = "".join(f'<label><input type="radio" name="by" id="by-{key}"{" checked" if key == "entropy" else ""}> {said}'
                     f'{"" if key == "selected" else f" (full colour at {number(full[key])} {unit}".rstrip() + ")"}</label> '
                     for key, (said, unit) in QUANTITIES.items())  # fmt: skip
    column = lambda name, lines: (f'<section><h3>Step {lines[0]["step"]}</h3>'
        + "".join(completion(line, f"{name}{i}", full, config["method"]) for i, line in enumerate(lines)) + "</section>")  # fmt: skip
    span = lambda lines: f"steps {lines[0]['step']} to {lines[-1]['step']}"
    tables = "".join(f"<section>{token_table(lines, key, f'{when}, {span(lines)}')}</section>"
                     for key in ("entropy", "covariance") for when, lines in (("early", early), ("late", late)))  # fmt: skip
    options = "".join(f'<tr><th scope="row">{escape(str(k))}<td>{escape(str(v))}' for k, v in config.items())
    return f"""{HEAD}<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{len(steps)} steps of {escape(str(config.get("model", "")))} on {escape(str(config.get("data", "")))}.</p>
<details><summary>All options</summary><table>{options}</table></details>
<h2>Curves</h2><div class="columns">{"".join(curve(steps, *panel) for panel in CURVES)}</div>{values_table(steps)}
<h2>Completions, early and late</h2>
<p>Orange is above zero, blue below. Underlined: the method acted on the token.
Point at a token, or go to it with Tab and the arrow keys, for its values.</p>
<fieldset><legend>Tokens are coloured by</legend>{radios}</fieldset>
<div class="columns">{column("early", first)}{column("late", final)}</div>
<h2>The tokens that carry it</h2>
<p>Means over the completions that samples.jsonl holds of the first and of the last third of the logged steps.
High entropy marks forks, where the policy decides; high covariance marks those that carry the fall of the entropy.</p>
<div class="columns">{tables}</div>
</body></html>
"""


def write(run_dir, config, steps):
    """RUN/page.html; returns its path. UserError for samples that cannot be shown."""
    file = Path(run_dir) / "page.html"
    file.write_text(page(config, steps, read_samples(run_dir)), encoding="utf-8", errors="replace")  # half a surrogate pair is no text
    return file


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directory of train.py")
    for run in parser.parse_args().runs:
        try:
            print(write(run, *plot.read_run(run)))
        except (UserError, OSError) as error:
            parser.exit(2, f"lab.page: error: {error}\n")


if __name__ == "__main__":
    main()
