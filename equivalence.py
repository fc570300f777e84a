r"""Equivalence: when are two mathematical answers the same?

A reward is only as good as this relation, and its two errors differ: a right answer that is refused
costs one sample, a wrong answer that is accepted is taught. So what cannot be shown to be equal is
not equal. Four layers, each for what the one before leaves open:

1. Spelling (`clean`): one for what LaTeX can write in many ways. `\dfrac12` is `\frac{1}{2}`,
   `10,\!080` is `10{,}080` and `10080`, `\left( 0, 1 \right]` is `(0,1]`.
2. Shape (`compare`): lists and sets agree in any order; tuples, intervals and matrices in theirs, and
   in their brackets. `x=5` may answer `5`, `2<x\le3` may answer `(2,3]`, `a\pm b` is two answers.
   A list never answers a single value: "5 or 6" is not 5.
3. Numerals, units and words (`decide`). Numerals are exact fractions: 142.0, 025, 4.5e33,
   4.5\cdot10^{33}, 0.\overline{3}, 3\frac12, -1./3. Rounding is not equality: 0.333 is not 1/3.
4. Algebra (`algebra`), only inside a worker of grader.py. math-verify's parser reads both sides, gold
   first; one random point at which their 60-digit values differ refutes, several that agree convince.
   What has no value at points is left to math-verify's `verify`.

Layers 1 to 3 need the standard library alone and microseconds, and decide most answers either way.

What math-verify 0.9.0 gets wrong and is put right here:

- It reads 4.5e33 as 4.5*E*33, 204_5 as 204, "25 26" as 51, 3(\frac12) as 3\frac12, x' as x, 2B as 2b,
  and takes a name such as LQSX for a product, whose letters may change places.
- It rounds to 6 decimals (2.7778e-6 is 3e-6) and drops what is below 10^-15 (2^{-2012} is 2^{-2013}).
- It strips single letters as units (2t is 2) and a \text at the end whatever it says, and of an
  equation keeps the right side (24=25 is 25).
- It rejects `5.` and `\frac{n^2} 4`, which `clean` spells out.
- Its plain-text extraction hands the model's text to sympy's parse_expr, which calls eval. That path
  is not used: `latex2sympy` is a grammar that builds objects and runs no code. (grader.py makes sure.)

    python equivalence.py      which layer decides what
"""

import random
import re
from fractions import Fraction

from notation import clean, closing, gold_text, parseable

DIGITS = 400    # a numeral of more digits, or with a greater power of ten, has no value here
ITEMS = 64      # lists are compared pair by pair


def quick(gold, answer):
    """True or False if spelling, shape and numerals decide whether the answer is the gold's, else None."""
    return same(gold, answer, decide)


def equivalent(gold, answer):
    """Whether the answer is the gold's. Only for a worker of grader.py: algebra takes any time and memory."""
    return same(gold, answer, algebra) is True


def same(gold, answer, leaf):
    if not parseable(answer) or not parseable(gold):
        return gold.strip() == answer.strip()
    return compare(gold_text(gold), clean(answer), leaf)


# ------------------------------------------------------------------------------------- 2. shape


def split(text, separators):
    """Pieces of `text` between separators (a regex) that stand outside all brackets, and the separators."""
    pieces, found, level, start = [], [], 0, 0
    for match in re.finditer(r"[{(\[]|[})\]]|" + separators, text):
        if match[0] in "{([":
            level += 1
        elif match[0] in "})]":
            level -= 1
        elif level == 0:
            pieces.append(text[start:match.start()])
            found.append(match[0])
            start = match.end()
    return pieces + [text[start:]], found


def every(verdicts):
    """Three-valued conjunction: False if any is False, else None (undecided) if any is None, else True."""
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided = undecided or verdict is None
    return None if undecided else True


def compare(gold, answer, leaf):
    """Whether two clean answers agree; `leaf` judges single values. True, False or None: undecided."""
    if gold == answer:
        return True
    g, g_union = members(gold)
    a, a_union = members(answer)
    if len(g) != len(a) or len(g) > ITEMS:
        return False
    if len(g) == 1:
        return single(g[0], a[0], leaf)
    if g_union != a_union and not all(relation(x) for x in (a if g_union else g)):
        return False
    names = [{named(x)[0] for x in items} for items in (g, a)]
    in_order = any(words(x) for x in g) or (names[0] != names[1] and max(map(len, names)) > 1)
    if in_order:      # a ranking, or values without the names that say which is which
        return every(compare(x, y, leaf) for x, y in zip(g, a))
    return matching(g, a, leaf)


def matching(gold, answer, leaf):
    """Whether the members pair off. Equality is transitive, so the first that fits may be taken."""
    rest, undecided = list(answer), []
    for x in gold:
        verdicts = [compare(x, y, leaf) for y in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            undecided.append(x)
        else:
            return False
    return None if undecided else True


def members(text):
    r"""The members of a list, a set or a union, and whether it is a union. Each \pm stands for two."""
    hole = re.fullmatch(r"(?:(.+)\\ne|\(-\\infty,\\infty\)\\(?:setminus|backslash)\\\{)([^,\\]+?)(?:\\\})?", text)
    if hole and (hole[1] is None or is_name(hole[1])):
        return [rf"(-\infty,{hole[2]})", rf"({hole[2]},\infty)"], True
    pieces, separators = split(text, r",|;|\\cup")
    if len(pieces) == 1 and (inner := re.fullmatch(r"(?:[^=]*=)?\\\{(.*)\\\}", text)) \
            and not re.search(r"\\mid|\||:", text) and closing_set(text):
        pieces, separators = split(inner[1], ",|;")
    signs = [[piece.replace(r"\pm", sign) for sign in "+-"] if piece.count(r"\pm") == 1 and r"\mp" not in piece
             else [piece] for piece in pieces]
    pieces = [re.sub(r"(?<![^=(\[{,])\+", "", piece) for pair in signs for piece in pair]
    return pieces, r"\cup" in separators


def closing_set(text):
    start = text.index("{")
    return closing(text, start) == len(text)


def single(gold, answer, leaf):
    """`compare` for one value each, either of which may carry a name: x=5, f(x)=x+1, x\\in[0,1]."""
    g_name, g = named(gold)
    a_name, a = named(answer)
    if len(g) > 1 and not g_name:                  # the gold is an equation
        return leaf(gold, answer)
    if g_name and a_name and g_name != a_name:
        verdict = False
    elif (g[-1], a[0]) == (gold, answer):
        return shaped(gold, answer, leaf)
    else:
        verdict = every(compare(g[-1], value, leaf) for value in a)    # 3+2=5, but not 24=25
    if verdict is not True and g_name and "=" in answer and variables(g[-1]):
        return leaf(gold, answer)                  # y=2x+3 against 2x-y=-3
    return verdict


def shaped(gold, answer, leaf):
    """`compare` for values without names: brackets, matrices and relations piece by piece, the rest by `leaf`."""
    g_kind, g, g_name = shape(gold)
    a_kind, a, a_name = shape(answer)
    if g_kind != a_kind or len(g) != len(a) or (g_name and a_name and g_name != a_name):
        return False
    if g_kind == "value":
        return leaf(g[0], a[0])
    return every(compare(x, y, leaf) for x, y in zip(g, a))


def shape(text):
    """(kind, items in order, name): a matrix, brackets around several items, a relation, or a single value."""
    while text[:1] in ("(", "{") and balanced_until_end(text) and len(split(text[1:-1], ",|;")[0]) == 1:
        text = text[1:-1]
    matrix = re.fullmatch(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)¶?\\end\{\1\}", text)
    if matrix:
        rows = [row.split("&") for row in matrix[2].split("¶")]
        return f"matrix {[len(row) for row in rows]}", [x for row in rows for x in row], None
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and balanced_until_end(text):
        items = split(text[1:-1], ",|;")[0]
        if len(items) > 1:
            return text[0] + text[-1], items, None
    return relation(text) or ("value", [text], None)


def balanced_until_end(text):
    try:
        return closing(text, 0) == len(text)
    except IndexError:
        return False


def relation(text):
    r"""x<3 as the interval (-\infty,3) with the name x; None if `text` is not a bound on a name."""
    pieces, signs = split(text, r"\\le(?![a-z])|\\ge(?![a-z])|<|>")
    if len(pieces) == 2:
        if is_name(pieces[1]):
            pieces, signs = pieces[::-1], [{"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[signs[0]]]
        upper = signs[0] in ("<", r"\le")
        pieces = [r"-\infty", *pieces] if upper else [r"\infty", *pieces]
        signs = ["<" if upper else ">", *signs]
    if len(pieces) != 3 or not is_name(pieces[1]) or is_name(pieces[0]) or is_name(pieces[2]):
        return None
    if signs[0] in (">", r"\ge"):
        pieces, signs = pieces[::-1], signs[::-1]
        signs = [{">": "<", r"\ge": r"\le"}.get(sign) for sign in signs]
    if not {*signs} <= {"<", r"\le"}:
        return None
    kind = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    if kind == "()" and r"\infty" not in pieces[0] + pieces[2]:
        kind = "<<"                                # (2,4) might be a point, 2<x<4 is none
    return kind, [pieces[0], pieces[2]], pieces[1]


NAME = re.compile(r"(?:[a-zA-Z']|\\(?!pi|infty)(?:[aA]lpha|[bB]eta|[gG]amma|[dD]elta|[eE]psilon|theta|[lL]ambda|mu|[rR]ho"
                  r"|[sS]igma|tau|[pP]hi|[oO]mega|angle|triangle|max|min|sin|cos|tan|cdot|ell|text\{[^{}]*\}|overline\{[A-Z]+\})"
                  r"|[(),| +-])+")


def is_name(text):
    """Whether `text` may stand before `=` without being part of the answer: x, f(x), a+b, P(A), x_{1}, \\angle ABC."""
    text = re.sub(r"_\{[^{}]*\}", "", text)
    derivative = re.fullmatch(r"\\frac\{d[a-zA-Z]\}\{d[a-zA-Z]\}", text)
    return bool(derivative or NAME.fullmatch(text) and text[0] not in "-+" and variables(text))


def variables(text):
    """Whether letters other than the constants e and i occur outside commands (Greek letters count)."""
    return bool(re.search(r"[a-df-hj-zA-Z]|\\(?:text|alpha|beta|theta|lambda|omega|sigma|tau|mu|rho|phi)",
                          re.sub(r"\\(?!text|alpha|beta|theta|lambda|omega|sigma|tau|mu|rho|phi)[a-zA-Z]+", "", text)))


def named(text):
    r"""(name or None, values) of x=5, x\in[0,1], f(x)=(x+1)^2=x^2+2x+1; an equation is (None, its two sides)."""
    inside = split(text, r"\\in(?![a-z])")[0]
    if len(inside) == 2 and is_name(inside[0]):
        return inside[0], inside[1:]
    exact = split(text, r"\\approx")[0]
    text = "=".join(exact) if is_name(exact[0]) else exact[0]
    values = split(text, "=")[0]
    if len(values) == 2 and is_name(values[1]) and not is_name(values[0]):
        values = values[::-1]
    name = values[0] if len(values) > 1 and is_name(values[0]) else None
    while len(values) > 1 and is_name(values[0]):
        values = values[1:]
    return name, values


# ------------------------------------------------------------------- 3. numerals, units and words

NUMERAL = r"(?:\d+\.?\d*|\.\d+)"
PLAIN = re.compile(NUMERAL)
POWER = re.compile(rf"({NUMERAL})[eE]([+-]?\d+)|(?:({NUMERAL})\\cdot)?10\^\{{(-?\d+)\}}")
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
RATIO = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}|([^{}/]+)/([^{}/]+)")
MIXED = re.compile(r"(\d+)(?:\\frac\{(\d+)\}\{(\d+)\}| (\d+)/(\d+))")
BASED = re.compile(r"\d\)?_|[0-9A-F]{2}_\{\d")


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
triangle;solution;integer;number;step;question;problem;row;seat;room;house;point;vote;chair;toy;candy candie;cup;bottle"""
UNITS = {alias: names.split()[0] for names in UNITS.replace("\n", ";").split(";") for alias in names.split()}
TEXT_UNIT = re.compile(r"((?:\\text\{[^{}]*\}(?:\^\{\d\})?/?)+)$")
BARE_UNIT = re.compile(r"(?<=[\d} )])((?:square|cubic|sq)?[a-zA-Z]{2,}(?:\^\{\d\})?)$")


def unit(text):
    """(value, unit) of `15\\text{cm}^{2}`, `\\dollar36`, `30\\degree`, `20\\percent`; the unit is "" if there is none."""
    if re.match(r"-?\\dollar", text):
        return text.replace(r"\dollar", "", 1), "dollar"
    for sign in ("degree", "percent"):
        if text.endswith("\\" + sign) and not re.search(FUNCTION, text):
            return text[:-len(sign) - 1], sign
    match = TEXT_UNIT.search(text) or BARE_UNIT.search(text)
    phrase = match and canonical_unit(match[1])
    return (text[:match.start()].rstrip(" "), phrase) if phrase and match.start() else (text, "")


FUNCTION = r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)"


def canonical_unit(phrase):
    """`square inches` and `inches^2` as in^2, `miles per hour` as mi/h; None if a word is not a unit."""
    phrase = phrase.replace(r"\text", " ").replace("^{", " ^").lower()
    words = re.findall(r"[a-z]+|/|\^\d", re.sub(r"(?<![a-z])(square|cubic|sq)(?=[a-z])", r"\1 ", phrase))
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


def words(text):
    """`text` as a word to be compared as such (a name, a direction, a string of labels), else None."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return plain.lower().replace("_", "") if re.fullmatch(r"[a-zA-Z_'-]{3,}|[A-Z]{2}|[nN]o", plain) else None


def decide(gold, answer):
    """Whether two single values agree, as far as numerals, units and words decide it; else None."""
    if gold == answer:
        return True
    if "=" in gold or "=" in answer:
        return None if "=" in gold and "=" in answer else False
    (g, g_unit), (a, a_unit) = unit(gold), unit(answer)
    if g_unit and a_unit and g_unit != a_unit:
        return False
    x, y = number(g), number(a)
    if x is not None and y is not None:
        return same_number(x, g_unit, y, a_unit)
    if g == a and "percent" not in (g_unit, a_unit):
        return True
    if BASED.search(g) or BASED.search(a):
        return re.sub(r"[()]", "", g) == re.sub(r"[()]", "", a)
    if words(g) or words(a):
        return words(g) == words(a)
    if (x is not None and variables(a)) or (y is not None and variables(g)):
        return False
    return None if algebraic(g) and algebraic(a) and g_unit == a_unit or not {g_unit, a_unit} & {"percent"} else False


def same_number(x, x_unit, y, y_unit):
    """Units may be left out. 40% is 40 (the question says in what) and 0.4; but 0.5 is not 0.5%."""
    if "percent" in (x_unit, y_unit) and x_unit != y_unit:
        fraction = x / 100 == y if x_unit else x == y / 100
        return fraction or (x == y and (x_unit == "percent" or x > 1))
    return x == y


# ------------------------------------------------------------------------------------ 4. algebra

UNREADABLE = re.compile(r"\d \d|[:;?@#&<>\"=]|\\(?:text|le|ge|ne|in|pm|mp|[lc]?dots|begin|percent|dollar|cup|equiv|mid)(?![a-z])")


def algebraic(text):
    """Whether `text` is for the parser: an expression, without words, relations, omissions or giant numerals."""
    return not UNREADABLE.search(text) and not re.search(rf"\d{{{DIGITS}}}", text)


def algebra(gold, answer):
    """Whether two single values agree. Only for a worker: this may take any time and memory."""
    verdict = decide(gold, answer)
    if verdict is not None:
        return verdict
    if "=" in gold:
        return same_equation(gold, answer)
    g, a = read(unit(gold)[0]), read(unit(answer)[0])
    return agree(g, a)


def read(text):
    """A sympy expression, decimals as exact fractions. ValueError, or the parser's error, if it is none."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Expr, I, Symbol
    if not algebraic(text):
        raise ValueError("not an expression")
    text = re.sub(rf"({NUMERAL})\\degree", r"(\\frac{\1\\pi}{180})", text)
    text = re.sub(r"\d*\.\d+|\d+\.", lambda m: "(\\frac{%d}{%d})" % Fraction(m[0]).as_integer_ratio(), text)
    text = re.sub(r"(?<=\d)\(|(?<=\))(?=\(|\d|\\frac)", lambda m: r"\cdot " + m[0], text)    # a product, not 3 + 1/2
    text = re.sub(r"([a-zA-Z])('+)", lambda m: f"{m[1]}_{{{'p' * len(m[2])}}}", text)         # x' is not x
    expression = latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None,
                             conversion_config=ConversionConfig(lowercase_symbols=False))
    if not isinstance(expression, Expr):
        raise ValueError("not an expression")
    return expression.xreplace({Symbol("i", real=True): I})


def agree(g, a):
    """Whether two expressions have the same values: one point where they differ refutes."""
    import sympy
    from math_verify import verify
    unknown = {f for e in (g, a) for f in e.atoms(sympy.core.function.AppliedUndef, sympy.Derivative)}
    names = {f: sympy.Symbol(str(f), real=True) for f in unknown}
    g, a = g.xreplace(names), a.xreplace(names)
    if g.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit):
        return bool(verify(g, a, timeout_seconds=None))
    symbols = sorted(g.free_symbols | a.free_symbols, key=str)
    if not symbols:
        return same_value(value(g), value(a)) is True
    discrete = (sympy.floor, sympy.ceiling, sympy.factorial, sympy.binomial)
    for whole in ([True] if g.has(*discrete) or a.has(*discrete) else [False, True]):
        agreeing = 0
        for point in points(symbols, whole):
            verdict = same_value(value(g.xreplace(point)), value(a.xreplace(point)), real=not (g.has(sympy.I) or a.has(sympy.I)))
            if verdict is False:
                return False
            agreeing += verdict is True
            if agreeing == 6:
                return True
    return bool(verify(g, a, timeout_seconds=None))


def points(symbols, whole):
    """Values for the symbols, the same in every run: natural numbers, or fractions of either sign."""
    from sympy import Integer, Rational
    rng = random.Random(0)
    for _ in range(24):
        yield {s: Integer(rng.randrange(1, 16)) if whole else Rational(rng.randrange(-300, 300) or 1, 97) for s in symbols}


def value(expression):
    """The value of an expression without symbols: exact if rational, else 60 digits; None if it has none.

    Towers of powers and giant factorials raise ValueError, from the inside out, before they are worked out.
    """
    import sympy
    for node in sympy.postorder_traversal(expression):
        limit = 20000 if node.is_Pow and node.exp.is_number else 5000 if isinstance(node, sympy.factorial) else None
        if limit and abs(node.args[-1].evalf(5)) > limit:
            raise ValueError("too large")
    result = expression.doit()
    if not result.is_Rational:
        result = result.evalf(60)
        if result.is_Float and result._prec < 20:       # nothing left but rounding noise
            result = sympy.Integer(0)
    return result if result.is_number and result.is_finite else None


def same_value(x, y, real=False):
    """Whether two values agree to 40 digits; None if one is missing, or not real where it should be."""
    if x is None or y is None or (real and not (x.is_real and y.is_real)):
        return None
    if x.is_Rational and y.is_Rational:
        return bool(x == y)
    return bool(abs(x - y) <= max(abs(x), abs(y)) * 10 ** -40)


def same_equation(gold, answer):
    """Whether one equation is a multiple of the other: y = 2x+3 and 4x - 2y + 6 = 0."""
    sides = [split(text, "=")[0] for text in (gold, answer)]
    if [len(x) for x in sides] != [2, 2]:
        return False
    g, a = (read(left) - read(right) for left, right in sides)
    for point in points(sorted(g.free_symbols | a.free_symbols, key=str), False):
        x, y = value(g.xreplace(point)), value(a.xreplace(point))
        if x and y:
            return agree(g, a * x / y)
    return False


def main():
    pairs = [(r"\frac{1}{2}", "0.5"), ("204_5", "204_6"), ("1,-2", r"-2 \text{ and } 1"), ("5", r"5 \text{ or } 6"),
             ("4.5e33", r"4.5 \times 10^{33}"), ("(0,1]", "[0,1)"), (r"2^{-2012}", r"2^{-2013}"),
             (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"), ("y = 2x+3", "4x-2y=-6")]
    for gold, answer in pairs:
        first = quick(gold, answer)
        print(f"{gold:18} {answer:24} {equivalent(gold, answer)!s:6} {'algebra' if first is None else 'at sight'}")


if __name__ == "__main__":
    main()
