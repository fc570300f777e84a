r"""Equivalence: when are two mathematical answers the same?

A reward is only as good as this relation, and its two errors differ: a right answer that is refused
costs one sample, a wrong answer that is accepted is taught. So what cannot be shown to be equal is
not equal. Four layers, each for what the one before leaves open:

1. Spelling (`clean`): one for what LaTeX can write in many ways. `\dfrac12` is `\frac{1}{2}`,
   `10,\!080` is `10{,}080` and `10080`, `\left( 0, 1 \right]` is `(0,1]`.
2. Shape (`compare`): lists and sets agree in any order; tuples, intervals and matrices in theirs, and
   in their brackets. `x=5` may answer `5`, `2<x\le3` may answer `(2,3]`, `a\pm b` is two answers.
   A list never answers a single value: "5 or 6" is not 5.
3. Single values (`decide`): numerals are compared exactly, so that rounding is not equality (0.333 is not
   1/3); units may be left out, but not exchanged; words are compared as words.
4. Algebra (algebra.py) for what is still open, only inside a worker of grader.py.

The first three need the standard library alone and microseconds, and decide most answers either way.

What math-verify 0.9.0 gets wrong and is put right here:

- It reads 4.5e33 as 4.5*E*33, 204_5 as 204, "25 26" as 51, 3(\frac12) as 3\frac12, x' as x, 2B as 2b,
  and takes a name such as LQSX for a product, whose letters may change places.
- It rounds to 6 decimals (2.7778e-6 is 3e-6) and drops what is below 10^-15 (2^{-2012} is 2^{-2013}).
- It strips single letters as units (2t is 2) and a \text at the end whatever it says, and of an
  equation keeps the right side (24=25 is 25).
- It rejects `5.` and `\frac{n^2} 4`, which `clean` spells out.
- Its plain-text extraction hands the model's text to sympy's parse_expr, which calls eval. That path
  is not used. `latex2sympy`, a grammar that builds objects, reaches eval once, in sympy.Number of a numeral's
  text: algebra.py reads numerals itself, and a worker of grader.py refuses whatever else might be compiled.

    python equivalence.py      what is decided at sight, and what is left to algebra
"""

import re

from notation import DIGITS, clean, closing, gold_text, number, parseable, unit

ITEMS = 64    # lists are compared pair by pair


def quick(gold, answer):
    """True or False if spelling, shape and numerals decide whether the answer is the gold's, else None."""
    return same(gold, answer, decide)


def same(gold, answer, leaf):
    """Whether two answers are the same: by spelling, else part by part, each part judged by `leaf`; None if open."""
    if gold.strip() == answer.strip():
        return True
    if not parseable(answer) or not parseable(gold):
        return False
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
            pieces.append(text[start:match.start()].strip())
            found.append(match[0])
            start = match.end()
    return pieces + [text[start:].strip()], found


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
    g, a = coordinates(g, a), coordinates(a, g)
    if len(g) != len(a) or len(g) > ITEMS:
        return False
    if len(g) == 1:
        return single(g[0], a[0], leaf)
    if g_union != a_union and not all(relation(x) for x in (a if g_union else g)):
        return False
    names = [{named(x)[0] for x in items} - {None} for items in (g, a)]
    if names[0] != names[1] and max(map(len, names)) > 1:
        return False                                                        # which value is whose?
    if any(words(x) for x in g):
        return every(compare(x, y, leaf) for x, y in zip(g, a))             # a ranking
    return matching(g, a, leaf)


def coordinates(items, other):
    """x=1, y=2 as the point (1,2), if that is what it is compared with."""
    if len(items) > 1 == len(other) and shape(named(other[0])[1][-1])[0] == "()":
        names, values = zip(*(named(item) for item in items))
        if None not in names and list(names) == sorted({*names}):
            return ["(" + ",".join(value[-1] for value in values) + ")"]
    return items


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
    hole = HOLE.fullmatch(text)
    if hole and (hole[1] is None or is_name(hole[1])):
        return [rf"(-\infty,{hole[2]})", rf"({hole[2]},\infty)"], True
    pieces, separators = split(text, r",|;|\\cup")
    if len(pieces) == 1 and (inner := re.fullmatch(r"(?:[^=]*=)?\\\{(.*)\\\}", text)) \
            and not re.search(r"\\mid|\||:", text) and closed(text, text.index("{")):
        pieces, separators = split(inner[1], ",|;")
    return [member for piece in pieces for member in both_signs(piece)], r"\cup" in separators


def both_signs(text):
    r"""a\pm b as [a+b, a-b]; text with no \pm, or with several that may go together or not, as it is."""
    if len(PLUS_MINUS.findall(text)) != 1 or r"\mp" in text:
        return [text]
    return [LEADING_PLUS.sub("", PLUS_MINUS.sub(sign, text)) for sign in "+-"]


HOLE = re.compile(r"(?:(.+)\\ne|\(-\\infty,\\infty\)\\(?:setminus|backslash)\\\{)([^,\\]+?)(?:\\\})?")    # x \ne 3
PLUS_MINUS = re.compile(r"\\pm(?![a-z]) ?")
LEADING_PLUS = re.compile(r"(?<![^=(\[{,])\+")


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
    if verdict is not True and g_name and "=" in answer and letters(g[-1]):
        return leaf(gold, answer)                  # y=2x+3 against 2x-y=-3
    return verdict


def shaped(gold, answer, leaf):
    """`compare` for values without names: brackets, matrices and relations piece by piece, the rest by `leaf`."""
    g_kind, g, g_name = shape(gold)
    a_kind, a, a_name = shape(answer)
    if g_kind == "<<" and a_kind == "()":
        g_kind = "()"                              # 2<x<4 asks for an interval, (2,4) might ask for a point
    if g_kind != a_kind or len(g) != len(a) or (g_name and a_name and g_name != a_name):
        return False
    if g_kind == "value":
        return leaf(g[0], a[0])
    return every(compare(x, y, leaf) for x, y in zip(g, a))


def shape(text):
    """(kind, items in order, name): a matrix, brackets around several items, a relation, or a single value."""
    while text[:1] in ("(", "{") and closed(text) and len(split(text[1:-1], ",|;")[0]) == 1:
        text = text[1:-1]
    matrix = re.fullmatch(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)¶?\\end\{\1\}", text)
    if matrix:
        rows = [row.split("&") for row in matrix[2].split("¶")]
        return f"matrix {[len(row) for row in rows]}", [x for row in rows for x in row], None
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and closed(text):
        items = split(text[1:-1], ",|;")[0]
        if len(items) > 1:
            return text[0] + text[-1], items, None
    return relation(text) or ("value", [text], None)


def closed(text, start=0):
    """Whether the bracket at `start` is closed by the last character of `text`."""
    try:
        return closing(text, start) == len(text)
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
        kind = "<<"
    return kind, [pieces[0], pieces[2]], pieces[1]


GREEK = (r"(?:[aA]lpha|[bB]eta|[gG]amma|[dD]elta|(?:var)?epsilon|[zZ]eta|eta|(?:var)?[tT]heta|kappa|[lL]ambda|mu|nu|[xX]i|rho"
         r"|[sS]igma|tau|(?:var)?[pP]hi|chi|[pP]si|[oO]mega|ell)(?![a-zA-Z])")
NAME = re.compile(rf"(?:[a-zA-Z']|\\{GREEK}|\\(?:angle|triangle|max|min|sin|cos|tan|cdot)(?![a-zA-Z])"
                  r"|\\text\{[^{}]*\}|\\overline\{[A-Z]+\}|\|[A-Z]\||[(), +-])+")
COMMAND = re.compile(rf"\\(?!{GREEK})[a-zA-Z]+")
LETTER = re.compile(rf"\\{GREEK}|[a-zA-Z]")


def is_name(text):
    """Whether `text` may stand before `=` without being part of the answer: x, f(x), a+b, P(A), x_{1}, \\angle ABC."""
    text = re.sub(r"_\{[^{}]*\}|(?<=[a-zA-Z}])\([^()]*\)", "", text)
    if re.fullmatch(r"\\frac\{d[a-zA-Z]\}\{d[a-zA-Z]\}", text):
        return True
    return bool(NAME.fullmatch(text) and text[0] not in "-+" and letters(text) and "not" not in text)


def letters(text):
    """The letters of an expression, Greek ones included, other than those of commands and the constants e and i."""
    return {*LETTER.findall(COMMAND.sub("", text))} - {"e", "i"}


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


# --------------------------------------------------------------------------- 3. single values


def words(text):
    """`text` as a word to be compared as such (a name, a direction, a string of labels), else None."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if not re.fullmatch(r"[a-zA-Z_']{3,}(?:-[a-zA-Z_']{2,})*|[A-Z]{1,2}|[nN]o", plain):
        return None
    return plain.replace("_", "").lower() if len(plain) > 1 else plain


BASED = re.compile(r"\d\)?_|[0-9A-F]{2}_\{\d")    # 204_5: a numeral with a base


def decide(gold, answer):
    """Whether two single values agree, as far as numerals, units and words decide it; else None."""
    if gold == answer:
        return True
    if "=" in gold or "=" in answer:
        return None if "=" in gold and "=" in answer and letters(gold) == letters(answer) else False
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
    if letters(g) != letters(a):       # n against m; one could cancel, but who writes that
        return False
    if not (algebraic(g) and algebraic(a)) or "percent" in (g_unit, a_unit):
        return False
    return None


UNREADABLE = re.compile(r"""\d[ ]\d | \d[ ]?\{\d | \.\d*\. | [^a-zA-Z']' | \\[a-z]+' | [:;?@#&<>"=]
                        | \\(?:text|le|ge|ne|in|pm|mp|ldots|begin|percent|dollar|cup|equiv|mid)(?![a-z])""", re.X)


def algebraic(text):
    """Whether `text` is for the parser: an expression, without words, relations, omissions or giant numerals."""
    return not UNREADABLE.search(text) and not re.search(rf"\d{{{DIGITS}}}", text)


def same_number(x, x_unit, y, y_unit):
    """Units may be left out. 40% is 40 (the question says in what) and 0.4; but 0.5 is not 0.5%."""
    if "percent" in (x_unit, y_unit) and x_unit != y_unit:
        fraction = x / 100 == y if x_unit else x == y / 100
        return fraction or (x == y and (x_unit == "percent" or x > 1))
    return x == y


def main():
    pairs = [(r"\frac{1}{2}", "0.5"), ("204_5", "204_6"), ("1,-2", r"-2 \text{ and } 1"), ("5", r"5 \text{ or } 6"),
             ("4.5e33", r"4.5 \times 10^{33}"), ("(0,1]", "[0,1)"), (r"15\text{ cm}", r"15\text{ m}"), ("5", "x=5"),
             ("2^{-2012}", "2^{-2013}"), (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"), ("y = 2x+3", "4x-2y=-6")]
    said = {True: "the same", False: "different", None: "left to algebra"}
    for gold, answer in pairs:
        print(f"{gold:18} {answer:24} {said[quick(gold, answer)]}")


if __name__ == "__main__":
    main()
