r"""Notation: one spelling for what LaTeX can write in many ways.

    \dfrac12, \frac 12, \tfrac{1}{2}            ->  \frac{1}{2}
    10,\!080, 10{,}080, 10\,080, 10,080         ->  10080
    \left( 0,\, 1 \right]                       ->  (0,1]
    30^\circ, 30^{\circ}, 30°                    ->  30\degree
    \mathrm{cm}, \mbox{cm}                      ->  \text{cm}
    5 \text{ or } 6, 5, 6                       ->  5,6
    \sqrt3, sqrt(3), \sqrt{3}                   ->  \sqrt{3}

Nothing here knows what an expression is worth (equivalence.py does): after `clean`, the same answer
written by two authors is mostly the same string. Every pattern runs in linear time on text of bounded
length, and nothing recurses deeper than DEPTH, whatever a model writes.

    python notation.py      the examples above
"""

import re
from functools import lru_cache

LENGTH, DEPTH = 600, 16    # a longer or deeper answer keeps its spelling, and is never parsed

UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "θ": r"\theta ", "√": r"\sqrt ", "°": r"\degree ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "∪": r"\cup ", "∈": r"\in ", "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "≈": r"\approx ", "ℝ": r"\mathbb{R}",
    "（": "(", "）": ")", "，": ",", "\u00a0": " ", "\n": " ", "\t": " ", "~": " "})

FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|sqrt|ln|log|exp"

SPELLING = [(re.compile(pattern), spelling) for pattern, spelling in [
    (r"\\\\(?:\[[^\]]*\])?(?![a-zA-Z])", "¶"),                          # the end of a matrix row
    (r"\\\\(?=[a-zA-Z])", r"\\"),                                       # \\frac, escaped once too often
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|strut)(?![a-zA-Z])", ""),
    (r"\\!|\\phantom\s*(?:\{[^{}]*\}|-)|\\[()\[\]]", ""),
    (r"\\\$", r"\\dollar "),
    (r"\$", ""),
    (r"\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|\\[,;:> ]", " "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:mathrm|operatorname|text)\*?\s*\{(" + FUNCTIONS + r")\}", r"\\\1 "),
    (r"\\(?:mathrm|textup)\s*\{([eid])\}", r"\1"),
    (r"\\(?:mathbf|mathit|boldsymbol|bm|textbf|text)\s*\{\s*([-\d.,]+|\\[a-z]+)\s*\}", r"\1"),
    (r"\\(?:mathbf|mathit|boldsymbol|bm)\s*\{\s*([a-zA-Z])\s*\}", r"\1"),
    (r"\\(?:math(?:rm|bf|sf|it)|text(?:bf|it|rm|sf|normal|up)|mbox|hbox|operatorname\*?)(?=\s*\{)", r"\\text"),
    (r"\\?%|\\text\s*\{\s*percent\s*\}|(?<=\d)\s*percent\b", r"\\percent "),
    (r"\\(?:leqslant|leqq|leq|le)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geqslant|geqq|geq|ge)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq?(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\*\*", "^"),
    (r"\\(?:times|cdot|ast)(?![a-zA-Z])|\*", r"\\cdot "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\[lr]?vert(?![a-zA-Z])", "|"),
    (r"\\mathbb\s*(?:\{R\}|R)|\\R(?![a-zA-Z])", r"(-\\infty,\\infty)"),
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\deg(?:ree)?(?![a-zA-Z])", r"\\degree "),
    (r"\^\s*(?:\{\s*\\prime\s*\}|\\prime)", "'"),
    (r"\\(?:bar|overline)\s*\{(\d+)\}", r"\\overline{\1}"),
    (r"(?<![a-z])(?:np|numpy|math)\.(?=[a-z])", ""),
    (r"(?<![\\a-zA-Z{])(" + FUNCTIONS + r"|pi)(?![a-zA-Z])", r"\\\1 "),
    (r"(?<=\d)\{,\}(?=\s*\d{3})", ""),
]]

THOUSANDS = re.compile(r"(?<![\d,.])([1-9]\d{0,2})((?:,\d{3})+|(?: \d{3})+)(?![\d]|,\d)")
CONNECTIVE = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\lor)\s*")


@lru_cache(4096)
def clean(text):
    """One spelling of a LaTeX answer. Text too long or too deep to be parsed comes back as it is."""
    text = text.strip()
    if len(text) > LENGTH or depth(text) > DEPTH:
        return text
    text = text.translate(UNICODE)
    for pattern, spelling in SPELLING:
        text = pattern.sub(spelling, text)
    whole = re.fullmatch(r"\s*\\text\s*\{([^{}]*)\}\s*\.?\s*", text)
    text = whole[1] if whole else text
    if not re.search(r"[<>]|\\[lg]e |\\cup|\\in ", text) or not re.search(r"\band\b", text):
        text = CONNECTIVE.sub(", ", text)        # but x<1 and x>0 is not x<1 or x>0
    if not re.search(r"[(\[&]|\\\{", text):      # inside brackets a comma separates
        text = THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)
    text = re.sub(r"\\text\s*\{([^{}]*)\}", lambda m: r"\text{" + "_".join(m[1].split()) + "}", text)
    text = re.sub(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])|(?<=\d)\s+(?=\d)", r"\1~", text)   # these spaces mean something
    text = re.sub(r"\s+", "", text).replace("~", " ").rstrip(".,;")
    text = re.sub(r"(?<![^=(\[{,])\+", "", text)
    try:
        return arguments(text)
    except IndexError:                            # an argument or a closing brace is missing
        return text


def depth(text):
    """How deeply braces, brackets and parentheses are nested, whether or not they match."""
    level = deepest = 0
    for character in text:
        level += (character in "{([") - (character in "})]")
        deepest = max(deepest, level)
    return deepest


def closing(text, start):
    """The index after the bracket that closes the one at `start`. IndexError if none does."""
    level, i = 0, start
    while True:
        level += (text[i] in "{([") - (text[i] in "})]")
        i += 1
        if level == 0:
            return i


def arguments(text):
    r"""Braces around every argument: \frac12, x^2, \sqrt3 become \frac{1}{2}, x^{2}, \sqrt{3}."""
    parts, i = [], 0
    while i < len(text):
        part, i = element(text, i)
        parts.append(part)
    return "".join(parts)


def element(text, i):
    """The element that starts at `i`, its arguments in braces, and the index after it."""
    command = re.compile(r"\\(?:[a-zA-Z]+|.)|.").match(text, i)[0]
    i += len(command)
    if command == r"\text" and text[i:i + 1] == "{":
        end = closing(text, i)
        return command + text[i:end], end
    if command in (r"\frac", r"\binom"):
        top, i = argument(text, i)
        bottom, i = argument(text, i)
        return f"{command}{{{top}}}{{{bottom}}}", i
    if command == r"\sqrt":
        root = re.compile(r"\[[^\]]*\]|").match(text, i)[0]
        base, i = argument(text, i + len(root), parentheses=True)
        return f"{command}{root}{{{base}}}", i
    if command in "^_":
        script, i = argument(text, i, parentheses=True, number=True)
        return f"{command}{{{script}}}", i
    return command, i


def argument(text, i, parentheses=False, number=False):
    """A group in braces, or one token. x^(n-1) and x^-10 are read as they are meant, not as TeX reads them."""
    i += text[i] == " "
    if text[i] == "{" or (parentheses and text[i] == "("):
        end = closing(text, i)
        return arguments(text[i + 1:end - 1]), end
    run = re.compile(r"-?\d+").match(text, i) if number else None
    return (run[0], run.end()) if run else element(text, i)


def parseable(text):
    """Whether `text` is short and flat enough to be looked into."""
    return len(text) <= LENGTH and depth(text) <= DEPTH


def gold_text(gold):
    r"""A gold answer as data sets write it: in a box, in \[ \], as a sentence that ends in it, with a brace too many."""
    boxed = re.search(r"\\boxed\s*\{", gold)
    if boxed:
        try:
            gold = gold[boxed.end():closing(gold, boxed.end() - 1) - 1]
        except IndexError:
            pass
    sentence = re.search(r"[a-z]{2,} (?:is|are|equals)\s*(?:\\\(|\$)((?:[^$\\]|\\[^()$])*)(?:\\\)|\$)\s*\.?\s*$", gold)
    gold = sentence[1] if sentence else gold
    missing = len(re.findall(r"(?<!\\)\{", gold)) - len(re.findall(r"(?<!\\)\}", gold))
    if missing < 0 and gold.rstrip().endswith("}" * -missing):
        gold = gold.rstrip()[:missing]
    return clean(gold + "}" * missing)


def main():
    for text in (r"\dfrac 12", r"10,\!080", r"\left( 0,\, 1 \right]", r"30^{\circ}", r"15\mbox{ cm}^2", r"5 \text{ or } 6", "sqrt(3)"):
        print(f"{text:24} {clean(text)}")


if __name__ == "__main__":
    main()
