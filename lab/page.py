"""A run as one HTML page: its curves, and some of its completions token by token.

    python -m lab.page RUN ...        writes RUN/page.html

The page shows completions of samples.jsonl: those of the first and of the last logged step. Each token is
coloured by its entropy, its covariance, its advantage, or by whether the method selected it; its title holds
the values.

The page is a single file. It contains no script and loads nothing, and its content security policy forbids
both. Text of the model is escaped: HTML in a completion is shown as text. Radio buttons and CSS choose the
colours.
"""

import argparse
import base64
import json
from html import escape
from pathlib import Path
from string import Template

import plot
from data import UserError

LONGEST = 400  # tokens of a completion that are shown
QUANTITIES = {  # key: what the radio button says. The CSS property of a key is its first letter.
    "entropy": "entropy, nats",
    "covariance": "covariance",
    "advantage": "advantage",
    "selected": "selected by the method",
}
# Control characters have no place in HTML; each has a picture in Unicode.
SIGNS = {code: chr(0x2400 + code) for code in range(32)} | {ord("\n"): "↵\n", ord("\t"): "⇥", 127: "␡"}

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --back: #fff; --text: #111; --faint: #5a5a5a; --edge: #ccc;
        --above: 230 120 0; --below: 0 114 178 }
@media (prefers-color-scheme: dark) { :root { --back: #111; --text: #eee; --faint: #aaa; --edge: #444 } }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
       margin: 0 auto; max-width: 75rem; padding: 1rem }
img { width: 100% }
.columns { display: grid; gap: 1.5rem;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.columns > * { min-width: 0 }
table { border-collapse: collapse }
th, td { text-align: right; padding: .1rem .6rem; border-bottom: 1px solid var(--edge) }
th:first-child { text-align: left }
h4 { color: var(--faint); font-weight: normal; margin: .4rem 0 }
details { overflow-x: auto }
fieldset { position: sticky; top: 0; background: var(--back); border: 1px solid var(--edge); min-width: 0 }
fieldset label { margin-right: 1.2rem; display: inline-block }
article { border-top: 1px solid var(--edge) }
article p { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
            margin: .3rem 0 }
.prompt { color: var(--faint); max-height: 7.5em; overflow: auto }
.t { --v: var(--e); background-color: rgb(var(--above) / calc(.6 * var(--v)));
     background-image: linear-gradient(rgb(var(--below) / calc(-.6 * var(--v))) 0 0); unicode-bidi: isolate }
body:has(#by-covariance:checked) .t { --v: var(--c) }
body:has(#by-advantage:checked) .t { --v: var(--a) }
body:has(#by-selected:checked) .t { --v: var(--s) }
.t:hover { outline: 2px solid var(--text) }
.selected { text-decoration: underline 2px }
</style></head><body>
<h1>$title</h1>
<details><summary>All options</summary><table>$options</table></details>
<h2>Curves</h2>
$curves
<h2>Completions, early and late</h2>
<p>Orange is above zero, blue below; the strongest colour is the largest value on this page. The tokens that
the method selected are underlined. Point at a token for its values.</p>
<fieldset><legend>Colour the tokens by</legend>$radios</fieldset>
<div class="columns">$completions</div>
</body></html>
""")


def read_samples(run_dir):
    """The lines of samples.jsonl, without a torn last line. UserError if they are missing or damaged."""
    try:
        text = (Path(run_dir) / "samples.jsonl").read_text(encoding="utf-8", errors="replace")
        whole_lines = text.split("\n")[:-1]
        samples = [json.loads(line) for line in whole_lines]
        for line in samples:
            token_values(line)
            line["step"], line["prompt"], line["reward"] + 0  # raise here, not half way through the page
    except OSError as error:
        raise UserError(f"{run_dir}: samples.jsonl: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir}: samples.jsonl is damaged: {type(error).__name__}: {error}") from None
    if not samples:
        raise UserError(f"{run_dir}: samples.jsonl holds no completions yet")
    return samples


def token_values(line):
    """[(token, {quantity: number or None})] of a line of samples.jsonl."""
    columns = zip(line["tokens"], line["entropy"], line["covariance"], line["advantage"], strict=True)
    return [(token, {"entropy": H, "covariance": c, "advantage": A, "selected": int(i in line["selected"])})
            for i, (token, H, c, A) in enumerate(columns)]  # fmt: skip


def largest(samples):
    """{quantity: its largest magnitude among these completions}, so that early and late colours compare."""
    scale = {}
    for key in QUANTITIES:
        values = [abs(v[key]) for line in samples for _, v in token_values(line) if v[key] is not None]
        scale[key] = max(values, default=0) or 1
    return scale


def visible(text):
    """Text of the model as HTML: escaped, with a sign for each character that could not be seen."""
    return escape(text.translate(SIGNS))


def token_html(token, values, scale):
    """One token: its colours as CSS properties between -1 and 1, its values in the title."""
    style = ";".join(f"--{key[0]}:{(values[key] or 0) / scale[key]:.3g}" for key in QUANTITIES)
    title = ", ".join(f"{key} -" if values[key] is None else f"{key} {values[key]:.3g}"
                      for key in ("entropy", "covariance", "advantage"))  # fmt: skip
    name = "t"
    if values["selected"]:
        title += ", selected"
        name = "t selected"
    return f'<span class="{name}" style="{style}" title="{title}">{visible(token)}</span>'


def completion_html(line, scale):
    """One completion: right or wrong, its prompt, its tokens."""
    rows = token_values(line)
    verdict = "right" if line["reward"] > 0.5 else "wrong"
    tokens = "".join(token_html(token, values, scale) for token, values in rows[:LONGEST])
    if len(rows) > LONGEST:
        tokens += f" ... {len(rows) - LONGEST} more tokens"
    head = f"<article><h4>{verdict}, {len(rows)} tokens</h4>"
    return f'{head}<p class="prompt">{visible(line["prompt"])}</p><p>{tokens}</p></article>'


def page(config, samples, curves=None):
    """The page as text, from config.json, the lines of samples.jsonl, and the bytes of curves.png or None."""
    columns = {}
    for step in (samples[0]["step"], samples[-1]["step"]):
        columns[step] = [line for line in samples if line["step"] == step]
    scale = largest([line for lines in columns.values() for line in lines])
    completions = ""
    for step, lines in columns.items():
        completions += f"<section><h3>Step {step}</h3>"
        completions += "".join(completion_html(line, scale) for line in lines) + "</section>"
    radios = ""
    for key, label in QUANTITIES.items():
        checked = " checked" if key == "entropy" else ""
        radios += f'<label><input type="radio" name="by" id="by-{key}"{checked}> {label}</label>'
    image = "<p>No curves.png yet: <code>python plot.py</code> draws it.</p>"
    if curves is not None:
        data = base64.b64encode(curves).decode()
        image = f'<img alt="curves of the run over its steps" src="data:image/png;base64,{data}">'
    options = "".join(f"<tr><th>{escape(str(key))}<td>{escape(str(value))}" for key, value in config.items())
    title = escape(f"{config['method']}, seed {config.get('seed')}")
    return PAGE.substitute(title=title, options=options, curves=image, radios=radios,
                           completions=completions)  # fmt: skip


def write(run_dir):
    """Writes RUN/page.html and returns its path. UserError if there is no run or nothing to show."""
    config, _ = plot.read_run(run_dir)
    picture = Path(run_dir) / "curves.png"
    text = page(config, read_samples(run_dir), picture.read_bytes() if picture.exists() else None)
    file = Path(run_dir) / "page.html"
    file.write_text(text, encoding="utf-8", errors="replace")  # a model may emit half of a surrogate pair
    return file


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of train.py")
    for run in parser.parse_args().runs:
        try:
            print(write(run))
        except (UserError, OSError) as error:
            parser.exit(2, f"lab.page: error: {error}\n")


if __name__ == "__main__":
    main()
