r"""Algebra: whether two expressions are the same, when spelling, shape and numerals do not decide it.

math-verify's parser (latex2sympy, an ANTLR grammar: it builds objects and runs no code) reads both sides,
the gold first. Then both are evaluated, to 60 digits, at the same random points:

- One point at which they differ refutes. Differences are relative, and rational values are compared
  exactly: 2^{-2012} is not 2^{-2013}, 2^{1009} is not 2^{1009} + 1.
- Several points at which they agree convince (the argument of Schwartz and Zippel). The points are fractions of
  either sign; natural numbers if both sides round (and not x), or if fractions give no value, as in (-1)^n.
- A point at which a side is not real (roots, logarithms) says nothing, unless i occurs.

What has no values at points (integrals, sums, limits) is left to math-verify's `verify`, gold first.
It is not asked otherwise: it rounds to 6 decimals, drops what is below 10^-15, and its `simplify` runs
for seconds where evaluation takes milliseconds.

Nothing here is safe to call on a model's text: it may take any time and memory. grader.py calls it, in a
process that can be killed.

    python algebra.py      expressions that are the same, and some that are not
"""

import random
import re
from fractions import Fraction
from functools import lru_cache

import sympy
from antlr4 import Token
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from math_verify import verify

from equivalence import algebraic, decide, same, split
from notation import NUMERAL, number, unit


def equivalent(gold, answer):
    """Whether the answer is the gold's, by all there is: spelling, shape, numerals and algebra."""
    return same(gold, answer, algebra) is True


def algebra(gold, answer):
    """Whether two single values agree. Only for a worker: this may take any time and memory."""
    verdict = decide(gold, answer)
    if verdict is not None:
        return verdict
    if "=" in gold:
        return same_equation(gold, answer)
    g, a = read(unit(gold)[0]), read(unit(answer)[0])
    return agree(g, a)


class Reader(_Latex2Sympy):
    """math-verify's parser, with numerals as exact fractions. Its own are floats, which round, and go through
    sympy.Number(text), which calls eval."""

    def __init__(self):
        super().__init__(is_real=True, config=ConversionConfig(lowercase_symbols=False))

    def parse(self, text):
        """All of `text` as one expression. The grammar's simple mode of prediction fails on some, but is right and
        several times faster when it succeeds."""
        try:
            return self.parse_in(PredictionMode.SLL, text)
        except Exception:
            return self.parse_in(PredictionMode.LL, text)

    def parse_in(self, mode, text):
        parser = self.create_parser(text)
        parser._interp.predictionMode = mode
        tree = parser.expr()
        if parser.getTokenStream().LA(1) != Token.EOF:
            raise ValueError("not an expression")
        return self.convert_expr(tree)

    def parse_number(self, text):
        return sympy.Rational(*Fraction(text.replace(",", "")).as_integer_ratio())


@lru_cache(1024)    # the answers of a group share their gold
def read(text):
    """The sympy expression of a clean text. ValueError, or the parser's own error, if it is none."""
    if (numeral := number(text)) is not None:
        return sympy.Rational(*numeral.as_integer_ratio())
    if not algebraic(text):
        raise ValueError("not an expression")
    text = re.sub(rf"({NUMERAL})\\degree", r"(\\frac{\1\\pi}{180})", text)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", re.sub(r"(?<=\d)\.(?!\d)", "", text))             # .5 and 5. are numerals
    text = re.sub(r"(?<=\d)\(|(?<=\))(?=\(|\d|\\frac)", lambda m: r"\cdot " + m[0], text)    # a product, not 3 + 1/2
    text = re.sub(r"([a-zA-Z])('+)", lambda m: f"{m[1]}_{{{'p' * len(m[2])}}}", text)         # x' is not x
    text = re.sub(r"\\(max|min) ?([a-zA-Z])", r"m_{\1\2}", text).replace(r"\odot", "sun")
    expression = Reader().parse(text)
    if not isinstance(expression, sympy.Expr):
        raise ValueError("not an expression")
    return expression.xreplace({sympy.Symbol("i", real=True): sympy.I})


def agree(g, a):
    """Whether two expressions have the same values: one point where they differ refutes."""
    unknown = {f for e in (g, a) for f in e.atoms(sympy.core.function.AppliedUndef, sympy.Derivative)}
    names = {f: sympy.Symbol(str(f), real=True) for f in unknown}
    g, a = g.xreplace(names), a.xreplace(names)
    if g.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit):
        return bool(verify(g, a, timeout_seconds=None))
    symbols = sorted(g.free_symbols | a.free_symbols, key=str)
    if not symbols:
        return same_value(value(g), value(a)) is True
    real = not (g.has(sympy.I) or a.has(sympy.I))
    rounding = [e.has(sympy.floor, sympy.ceiling) for e in (g, a)]
    counts = not any(str(s) in "xyz" for s in symbols)      # floor(x) is not ceil(x), n counts something
    for whole in ([True] if all(rounding) and counts else [False] if any(rounding) else [False, True]):
        agreeing = 0
        for point in points(symbols, whole):
            verdict = same_value(value(g.xreplace(point)), value(a.xreplace(point)), real)
            if verdict is False:
                return False
            agreeing += verdict is True
            if agreeing == (8 if whole else 4):
                return True
    return bool(verify(g, a, timeout_seconds=None))


def points(symbols, whole):
    """Values for the symbols, the same in every run: natural numbers, or fractions of either sign."""
    rng = random.Random(0)
    for _ in range(24):
        yield {s: sympy.Integer(rng.randrange(1, 16)) if whole else sympy.Rational(rng.randrange(-300, 300) or 1, 97)
               for s in symbols}


def value(expression):
    """The value of an expression without symbols: exact if rational, else 60 digits; None if it has none.

    Towers of powers and giant factorials raise ValueError, from the inside out, before they are worked out.
    """
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
    pairs = [(r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"), (r"\cot x", r"\frac{\cos x}{\sin x}"), ("2^{-2012}", "2^{-2013}"),
             (r"\sqrt{a^2+b^2}", "a+b"), ("42x\\sqrt{5x}", r"\sqrt{8820x^3}"), ("y = 2x+3", "4x-2y=-6"), ("2k", "2K")]
    for gold, answer in pairs:
        print(f"{gold:20} {answer:26} {equivalent(gold, answer)}")


if __name__ == "__main__":
    main()
