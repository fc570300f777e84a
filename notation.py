r"""Notation: how answers are written, before anything is worked out.

`clean` gives one spelling to what LaTeX can write in many ways, so that the same answer by two authors is
mostly the same string:

    \dfrac12, \frac 12, \tfrac{1}{2}            ->  \frac{1}{2}
    10,\!080, 10{,}080, 10\,080, 10,080         ->  10080
    \left( 0,\, 1 \right]                       ->  (0,1]
    30^\circ, 30^{\circ}, 30°                    ->  30\degree
    5 \text{ or } 6, 5, 6                       ->  5,6
    \sqrt3, sqrt(3), \sqrt{3}                   ->  \sqrt{3}

`number` reads a numeral as an exact fraction: 142.0, 025, 4.5e33, 4.5\cdot10^{33}, 0.\overline{3}, 3\frac12,
-1./3. (math-verify reads 4.5e33 as 4.5*E*33.) `unit` takes a unit off: 15\text{ cm}^2, \$36, 30^\circ, 20\%.

Every pattern runs on text of bounded length, and nothing recurses deeper than DEPTH, whatever a model writes.

    python notation.py      examples
"""

import re
from fractions import Fraction
from functools import lru_cache

LENGTH, DEPTH = 600, 16    # a longer or deeper answer keeps its spelling, and is never parsed
DIGITS = 400               # a numeral of more digits, or with a greater power of ten, has no value here

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
    (r"(?<=\d),\s*\\!\s*(?=\d{3})", ""),
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
    (r"\\(?:dots[cbm]?|cdots)(?![a-zA-Z])|\.\.\.", r"\\ldots "),
    (r"\*\*", "^"),
    (r"\\(?:times|cdot|ast)(?![a-zA-Z])|\*", r"\\cdot "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\[lr]?vert(?![a-zA-Z])", "|"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
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
        return arguments(text).replace("} ", "}")
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
    sentence = re.search(r"\b(?:is|are|equals)\s*(?:\\\(|\$)((?:[^$\\]|\\[^()$])*)(?:\\\)|\$)\s*\.?\s*$", gold)
    gold = sentence[1] if sentence else gold
    missing = len(re.findall(r"(?<!\\)\{", gold)) - len(re.findall(r"(?<!\\)\}", gold))
    if missing < 0 and gold.rstrip().endswith("}" * -missing):
        gold = gold.rstrip()[:missing]
    return clean(gold + "}" * missing)


# ------------------------------------------------------------------------- numerals and units

NUMERAL = r"(?:\d+\.?\d*|\.\d+)"
PLAIN = re.compile(NUMERAL)
POWER = re.compile(rf"({NUMERAL})[eE]([+-]?\d+)|(?:({NUMERAL})\\cdot)?10\^\{{(-?\d+)\}}")
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
RATIO = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}|([^{}/]+)/([^{}/]+)")
MIXED = re.compile(r"(\d+)(?:\\frac\{(\d+)\}\{(\d+)\}| (\d+)/(\d+))")


def number(text):
    """The exact value of a numeral as a Fraction, or None if `text` is no numeral."""
    if len(text) > DIGITS:
        return None
    sign, text = (-1, text[1:]) if text[:1] == "-" else (1, text)
    try:
        value = unsigned(text)
    except (ZeroDivisionError, OverflowError):
        return None
    return None if value is None else sign * value


def unsigned(text):
    """The exact value of a numeral without a sign, or None if the text is none."""
    if PLAIN.fullmatch(text):
        return Fraction(text)
    if match := POWER.fullmatch(text):
        exponent = int(match[2] or match[4])
        return Fraction(match[1] or match[3] or 1) * Fraction(10) ** exponent if abs(exponent) <= DIGITS else None
    if match := MIXED.fullmatch(text):
        return int(match[1]) + Fraction(int(match[2] or match[4]), int(match[3] or match[5]))
    if match := REPEATING.fullmatch(text):
        whole, fixed, period = match.groups()
        tail = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed)
        return Fraction(f"{whole or 0}.{fixed or 0}") + tail
    if match := RATIO.fullmatch(text):
        top, bottom = number(match[1] or match[3]), number(match[2] or match[4])
        return None if top is None or bottom is None else top / bottom
    return None


# Each line: what counts as one unit, for the things that answers count or measure. Unknown words are not
# units: `5 \text{ million}`, `\text{not } 5` and `25 \text{ or so}` must not be read as 5, 5 and 25.
UNITS = """cm centimeter centimetre;mm millimeter millimetre;m meter metre;km kilometer kilometre;in inch inche;ft foot feet
yd yard;mi mile;g gram;kg kilogram;lb pound;oz ounce;ton;l liter litre;ml milliliter;gal gallon;s sec second;min minute
h hr hour;day;week;month;yr year;mph;cent;dollar usd;degree deg;radian rad;unit;square sq;cubic cu;percent;people person
man men;woman women;child children;boy;girl;student;teacher;player;member;friend;apple;orange;egg;book;page;pencil;card
marble;ball;coin;piece;slice;cookie;flower;tree;dog;cat;car;box boxe;bag;ticket;game;point;time;way;digit;side;edge;face
triangle;solution;integer;step;question;problem;row;seat;room;house;vote;chair;toy;candy candie;cup;bottle;erg;j joule
n newton;w watt;v volt;a amp ampere;c coulomb;t tesla;k kelvin;pa pascal;hz hertz;ev;pc parsec;au;mol mole;ohm;nm;ms;kj;kw
mhz;ghz;kpc;mpc;kev;mev;gev;angstrom;atm;kmph;kph;knot;revolution;rpm;bit;byte"""
UNITS = {alias: names.split()[0] for names in UNITS.replace("\n", ";").split(";") for alias in names.split()}
TRIGONOMETRIC = r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)"
TEXT_UNIT = re.compile(r"((?:\\text\{[^{}]*\}(?:\^\{-?\d\})?(?:/|\\cdot)?)+)$")
BARE_UNIT = re.compile(r"(?<=[\d} )])((?:square|cubic|sq)?[a-zA-Z]{2,}(?:\^\{\d\})?)$")


def unit(text):
    """(value, unit) of `15\\text{cm}^{2}`, `\\dollar36`, `30\\degree`, `20\\percent`; the unit is "" if there is none."""
    if re.match(r"-?\\dollar", text):
        return text.replace(r"\dollar", "", 1), "dollar"
    for sign in ("degree", "percent"):
        if text.endswith("\\" + sign) and not re.search(TRIGONOMETRIC, text):
            return text[:-len(sign) - 1], sign
    match = TEXT_UNIT.search(text) or BARE_UNIT.search(text)
    phrase = match and canonical_unit(match[1])
    return (text[:match.start()].rstrip(" "), phrase) if phrase and match.start() else (text, "")


def canonical_unit(phrase):
    """`square inches` and `inches^2` as in^2, `miles per hour` as mi/h; None if a word is not a unit."""
    phrase = phrase.replace(r"\text", " ").replace("_", " ").replace("^{", " ^").lower()
    if not re.fullmatch(r"(?:[a-z]+|\^-?\d|[ /{}.]|\\cdot)*", phrase):
        return None
    words = re.findall(r"[a-z]+|/|\^-?\d", re.sub(r"(?<![a-z])(square|cubic|sq(?!uare))(?=[a-z])", r"\1 ", phrase))
    result, power = "", ""
    for word in words:
        if word in ("square", "sq", "cubic", "cu") and len(words) > 1:
            power = "^3" if word[0] == "c" else "^2"
        elif word in ("per", "/", "squared", "cubed") or word[0] == "^":
            result += {"per": "/", "squared": "^2", "cubed": "^3"}.get(word, word)
        elif name := UNITS.get(word) or UNITS.get(word.removesuffix("s")):
            result, power = result + name + power, ""
        else:
            return None
    return result


def main():
    for text in (r"\dfrac 12", r"10,\!080", r"\left( 0,\, 1 \right]", r"15\mbox{ cm}^2", r"5 \text{ or } 6", "sqrt(3)", "4.5e3",
                 r"4.5 \times 10^{3}", r"-3\frac12", r"0.1\overline{6}", r"\$36", "30^{\\circ}"):
        value, name = unit(clean(text))
        print(f"{text:22} spelt {clean(text):20} worth {number(value)!s:8} {name}")


if __name__ == "__main__":
    main()
