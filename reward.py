r"""Rewards that can be verified: 1.0 if the last box of a response holds the gold answer, else 0.0.

A policy learns whatever the reward pays for, so the reward is strict where a policy could cheat:

- Only the last \boxed{...} (or \fbox{...}) counts. No box, or an empty or unclosed one, scores 0, even if the
  right number stands elsewhere. Boxes with nothing but space, "or", "and" or a comma between are one list.
- Plain numerals are compared exactly: 0.333 is not 1/3, and "5 or 6" is not 5. For the rest, substitutions
  correct the spelling and what math-verify's parser misreads, and math-verify decides.
- A response is untrusted input: some fill the memory or keep a parser busy for hours. No exception stops C
  code. So this process only finds the box and reads numerals. The rest is left to worker processes, which
  the system ends at a deadline or a memory limit; that answer scores 0.

    python reward.py      what is accepted, what is refused, and what hostile answers do
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

DEADLINE = 5.0          # seconds for one answer; ordinary ones take milliseconds
MEMORY = 768 * 2**20    # bytes of address space; a worker that has imported sympy has about 100 MiB
SHORT, LONG = 120, 600  # characters: of a numeral, and of an answer that is read at all
POOLS = {}              # process id -> its Pool: a forked child must not write into its parent's pipes
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
SINGLE = re.compile(r"[0-9A-Za-z](?![0-9A-Za-z.,])|(?!\{)")     # \boxed5; nothing where no brace opens
JOINT = re.compile(r"(?:[\s$,;/}]|\\[()\[\],;: ]|\\q?quad|\\text\{|\b(?:and|or)\b|\\lor\b)*"
                   r"|[^.!?\n]{0,60}?\bor\b[^.!?\n]{0,60}")


def extract_answer(text):
    r"""The content of the last box of `text`. None if there is no box, or if it is empty or not closed.
    Boxes with only space, "or", "and" or a comma between give one list. A box in a box is part of it."""
    answers, end = [], 0
    while box := BOX.search(text, end):
        if not JOINT.fullmatch(text, end, box.start()):
            answers = []
        content, end = braces(text, box.end())
        answers.append(BOX.sub("", content).strip())
    return ", ".join(dict.fromkeys(answers)) if answers and all(answers) else None


def braces(text, start):
    """What the braces at `start` hold, "" if they do not close, and the index after them."""
    if single := SINGLE.match(text, start):
        return single[0], single.end()
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1:match.start()], match.end()
    return "", len(text)


def grade(response, answer):
    """1.0 if the last box of `response` holds the gold `answer`, else 0.0."""
    return grade_all([response], [answer])[0]


def grade_all(responses, answers):
    """`grade` for two lists, as a list. Equal pairs are compared once, open ones in parallel.
    ValueError if the lists differ in length, ChildProcessError if a worker cannot be started."""
    pairs = [(extract_answer(gold) or gold, extract_answer(response))
             for response, gold in zip(responses, answers, strict=True)]
    verdicts = {pair: at_sight(*pair) for pair in dict.fromkeys(pairs)}
    undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
    if undecided:
        pool = POOLS[os.getpid()] = POOLS.get(os.getpid()) or Pool()
        verdicts.update(zip(undecided, pool.threads.map(pool.ask, undecided)))
        pool.broken += sum(verdicts[pair] is None for pair in undecided)
    return [float(verdicts[pair] is True) for pair in pairs]


def timeouts():
    """How many answers of this process scored 0 because comparing them was broken off."""
    return POOLS[os.getpid()].broken if os.getpid() in POOLS else 0


def at_sight(gold, answer):
    """True or False where the letters or the numerals decide whether `answer` is the gold, else None."""
    if answer is None or gold.strip() == answer.strip():
        return answer is not None
    exact, other = numeral(gold), numeral(answer)
    if exact is None or other is None or "=" in gold:
        return False if max(len(gold), len(answer)) > LONG else None
    (x, unit), (y, other_unit) = exact, other
    if unit and other_unit:                 # a unit may be left out, but not be another one
        return exact == other
    if other_unit == "percent":             # 40\% is 0.4, and it is 40 where the question asks for percent
        return y / 100 == x or y == x and abs(x) > 1
    return x == y or unit == "percent" and y == x / 100


END = "(?![a-zA-Z])"    # of a command
FUNCTION = "(?:arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp)"
KEPT = (rf"(?:{FUNCTION}|frac|sqrt|binom|cdot|pi|infty|[lr]floor|[lr]ceil|emptyset|cup|cap|setminus|text|in"
        rf"|begin|end|[lgn]e|pm|mp|not|approx|ldots|sum|prod|int|lim|to){END}")
SYMBOL = (rf"(?:[a-zA-Z]|\\(?!{KEPT})[a-zA-Z]+{END}(?: *\{{[^{{}}]*\}})?)"       # x, \alpha, \dot{x}, with
          r"(?: ?_ ?(?:\{[^{}]*\}|[a-zA-Z0-9]))?'*(?: *\( ?[a-zA-Z0-9] ?\))?")    # an index, primes, (t)
NAME = (rf"^(?![+-]|.*\bnot\b)(?:\\text\{{[^{{}}]*\}}|\\(?!{KEPT})[a-zA-Z]+{END}(?: *\{{[a-zA-Z]*\}})?"
        r"|_ ?(?:\{[^{}]*\}|[a-zA-Z0-9])|\([0-9]\)|[a-zA-Z ()+'-])+=")           # m+n=, \angle ABC=
STOP = (r"\b(?:(?:hal(?:f|ve)|third|quarter|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+tie|hundred"
        r"|thousand)th|dozen|score|hundred|thousand|[a-z]+illion)s?|one|two|three|four|five|six|seven|eight"
        r"|nine|ten|eleven|twelve|[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|or|and|not?|is|are"
        r"|to|between|about|around|mod|base|plus|minus|squared|cubed|factorial|root|power|if|less|more|over"
        r"|than|least|most|negative|[eixyz]|pi)\b")
THOUSANDS = "[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)"
SPELLING = [            # 10,\!080 is 10080, \dfrac is \frac, \mbox is \text, 30^\circ is 30\text{degree}
    (r"(?<=[0-9])(?:,\s*\\!\s*|\{,\})(?=[0-9]{3})", ""), ("[−–]", "-"), (r"\\?%", r"\\text{percent}"),
    (rf"\\(?:left|right|displaystyle){END}|(?<!\\)(?:\\[!()\[\]]|\$)", ""), (r"\\[dtc](frac|binom)", r"\\\1"),
    (rf"\\(?:times|ast){END}|[*×·⋅]", r"\\cdot "), (r"(?<![0-9])\\\$ *([-0-9.,]*)", r"\1\\text{dollar}"),
    (r"\\(?:text|math)(?:rm|bf|it|sf|normal|up)? *(?=\{)|\\[mh]box *(?=\{)", r"\\text"),
    (rf"\^ *(?:\{{ *\\circ *\}}|\\circ{END})|\\degree{END}|°", r"\\text{degree}"), ("²", "^2"), ("³", "^3"),
    (rf"\\q?quad{END}|(?<!\\)\\[,;: ]|[\s~]+", " "), (r"\\text\{ *([-+0-9.,/]+) *\}", r"\1"),
]
NUMERALS = [            # 3\frac12 is 7/2, 4\cdot10^3 is 4e3, 25 \text{ cm} is 25 ~ cm, x=5 is 5
    (NAME, ""), (r"\\text\{([^{}]*)\}", r"~\1"), (r"\\frac *([0-9])", r"\\frac{\1}"), ("^ ?([+-]) ", r"\1"),
    (r"\\frac *\{ *([-+0-9.]+) *\} *(?:\{ *([-+0-9.]+) *\}|([0-9]))", r" \1/\2\3 "), (" */ *", "/"),
    (rf"(?<![0-9.,]){THOUSANDS}(?![0-9]|,[0-9])", lambda match: re.sub("[ ,]", "", match[0])), (" +", " "),
    ("(?<![0-9./])([0-9]+) ([0-9]+)/([0-9]+)", lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}"),
    (r" *(?:\\cdot|x) *10 *\^ *(?:\{ *([-+]?[0-9]+) *\}|([0-9]))", r"e\1\2"), ("([+-]) ", r"\1"),
]
SIGNED = r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)"
UNIT = r"(?: ?~|(?= (?:[ckm]m|kg|ft|[a-zA-Z]{3})))[a-zA-Z~ ./'()-]*(?:\^ ?\{? ?-?[0-9] ?\}?)?"
NUMERAL = re.compile(rf" ?{SIGNED}(?:/{SIGNED})?\.?((?:{UNIT})?)[ .]*")


def replaced(text, table):
    """`text` after the substitutions of a table [(pattern, replacement)], in order."""
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text


def numeral(text):
    r"""(value, unit) of a numeral: 1,024, -3\frac12, 4.5e33, 25 \text{ moves}, x = 30^\circ. Else None."""
    match = NUMERAL.fullmatch(replaced(text, SPELLING + NUMERALS)) if len(text) < SHORT else None
    if not match or re.search(STOP, match[3], re.I) or Fraction(match[2] or 1) == 0:
        return None
    return Fraction(match[1]) / Fraction(match[2] or 1), re.sub(r"s\b|[^a-z0-9/-]", "", match[3].lower())


class Pool:
    """`size` threads with a worker process each, and a counter of the answers that were broken off."""

    def __init__(self, size=None, deadline=DEADLINE, memory=MEMORY):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads, self.own = ThreadPoolExecutor(size or min(8, cores)), threading.local()
        self.limits, self.broken = (str(deadline), str(memory)), 0

    def ask(self, pair):
        """The verdict of this thread's worker on (gold, answer). None if that died; it is then replaced."""
        worker = getattr(self.own, "worker", None)
        if worker is None or worker.poll() is not None:
            worker = self.own.worker = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--worker", *self.limits], start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            if worker.stdout.readline() != "true\n":
                raise ChildProcessError("no process that compares answers starts: is math-verify installed?")
        try:
            print(json.dumps(pair), file=worker.stdin, flush=True)
            return json.loads(worker.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):     # it died, and wrote nothing
            worker.kill()
            worker.communicate()


def serve(deadline, memory):
    """A worker: a verdict for each [gold, answer] of standard input. That ends when the parent dies."""
    import resource
    channel, sys.stdout = sys.stdout, sys.stderr    # what libraries print must not reach the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)   # without a handler it ends the process, even in C code
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent finishes its step and needs the verdicts
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":                     # elsewhere the deadline alone bounds the memory
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.addaudithook(forbid)
    signal.setitimer(signal.ITIMER_REAL, 120)       # seconds to import sympy, perhaps from a cold, busy disk
    print(json.dumps(equivalent(r"\frac{x}{2}+1.5", "(x+3)/2")), file=channel, flush=True)
    for question in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, deadline)
        try:
            verdict = equivalent(*json.loads(question))
        except MemoryError:
            os._exit(1)
        except Exception:                           # mostly the parser's: this is no expression
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=channel, flush=True)


def forbid(event, details):
    """Audit hook: no programs and no connections, whatever a library is led to do with an answer."""
    if event in ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
        raise PermissionError(event)


GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
ATOM = rf"(?: ?[0-9.]+| ?(?:\\frac{GROUP}{GROUP}|\\sqrt(?:\[[^\]]*\])?{GROUP}|\\pi|{SYMBOL})(?:\^{GROUP})?)"
ONE = r"(\\[a-zA-Z]+|[0-9a-zA-Z])"
CLEANING = SPELLING + [ # \frac12 is \frac{1}{2}, 1 \text{ or } 2 is 1,2, a word is a \text, x\in[0,1] [0,1]
    ("√", r"\\sqrt "), ("π", r"\\pi "), ("≤", r"\\le "), ("≥", r"\\ge "), (rf"\\div{END}|÷", "/"),
    (rf"\\[bB]igg?[lrm]?{END}|\\phantom *\S|np\.(?=[a-z])|\\text\{{ *for a.*|\\pmod *\{{.*?\}}", ""),
    (r"{([^{}]*)\\choose([^{}]*)}", r"\\binom{\1}{\2}"), (r"{([^{}]*)\\over\b([^{}]*)}", r"\\frac{\1}{\2}"),
    (rf"\\text\{{ *({FUNCTION}) *\}}|(?<![\\a-zA-Z{{])({FUNCTION}|pi|sqrt){END}", r"\\\1\2 "),
    (rf"\\varnothing{END}|∅", r"\\emptyset"),
    (r"\\text\{([ei])\}", r"\1 "), (rf"\\([lgn])eq?(?:slant)?{END}", r"\\\1e "), (rf"\\equiv{END}", "="),
    (rf",? *\\text\{{ *,? *(?:and|or) *\}},? *|,?(?<![a-zA-Z\\])(?:and|or){END},? *|\\lor{END}", ", "),
    (r"(\\text\{[^{}]*\}|\\(?:begin|end) *\{.*?\})|(?<![\\\w}^{])([a-zA-Z]{3,}(?:[ '-]+[a-zA-Z]{2,})*)",
     lambda match: match[1] or rf"\text{{{match[2]}}}"), (r"^\(?([A-Z])\)?$", r"\\text{\1}"),
    (r"\\text\{[( ]*([^{}]*?)[ ).]*\}", lambda match: r"\text{%s}" % match[1].lower()),
    (r"(\\begin|\\end) *\{(?:[bB]?matrix|array)\}(?: *\{[lcr|]*\})?", r"\1{pmatrix}"),
    (r"(\\sqrt|[\^_]) *(-?[0-9]+)", r"\1{\2}"), (r"(\\sqrt|\^) *\(([^()]*)\)", r"\1{\2}"),
    (rf"(\\sqrt|[\^_]|\\frac|\\binom) *{ONE}", r"\1{\2}"), (rf"(\\(?:frac|binom){GROUP}) *{ONE}", r"\1{\2}"),
    (rf"^ *(?:{SYMBOL} *\\in{END}|\([a-z, ]*\) *(?:\\in{END}|=))", ""), ("[.,; ]+$|^ +", ""),
    (rf"^[ ({{]*\\\{{(?: *{SYMBOL} *(?::|\\mid))?(.*)\\\}}[ )}}]*$", r"\1"), (" +", " "),
    (rf"^{THOUSANDS}$", lambda match: re.sub("[ ,]", "", match[0])), (r"(?<!\w) | (?!\w)", ""),
]
MISREAD = [             # what math-verify's parser takes for something else, such as 2\binom{5}{2} for 2+10
    ("([0-9])[eE]([+-]?[0-9]+)", r"\1\\cdot 10^{\2}"),                      # 4.5e33 for 4.5 times e times 33
    (r"([0-9.]+) *\\text\{degree\}", r"(\\frac{\1\\pi}{180})"),             # \sin 30^\circ for the sine of 30
    (r"(?<![0-9.}])([0-9]+) *\\frac\{([0-9]+)\}\{([0-9]+)\}", r"(\1+\\frac{\2}{\3})"),  # 6\frac23\pi for 4\pi
    (rf"\\({FUNCTION})((?: *[_^]{GROUP})?)((?:{ATOM})+)", r"\\\1\2(\3)"),   # \ln 2\cdot\ln 3 for \ln(2\ln 3)
    (r"([0-9]*)\.(?!\.)([0-9]*)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}"),  # 0.333 for 1/3
    (r"(?<=[0-9)]) *(?=[({])|(?<=\)) *(?=[0-9])|(?<=[0-9)}])(?<!x}) *(?=\\binom|\\frac)", r"\\cdot "),
]
SYMBOLS = re.compile(rf"\\(?:begin|end)\{{[a-z]*\}}|\\{KEPT}|[ei](?![_'])|({SYMBOL})")
BAD = re.compile(r"\\text|\\ldots|!!|[?@#:;\"]|[0-9]\)?_|[0-9] [0-9]|\.|\\mp|\\[lr]angle")
RELATION = re.compile(rf"[<>]|\\[lgn]e{END}")
UNITS = re.compile(rf"(?: *\\text\{{(?!degree|percent|[^{{}}]*{STOP})[^{{}}0-9,]*\}}(?:\^\{{-?[0-9]\}})?)+$")


def equivalent(gold, answer):
    """Whether two answers are the same. Only for a worker: this may take any time and memory."""
    import sympy
    from math_verify import verify
    gold, answer = replaced(gold, CLEANING), replaced(answer, CLEANING)
    names = {*re.findall(rf"(?:^|,)({SYMBOL})=", f"{gold},{answer}")}
    g, a = (re.sub(rf"(^|,){SYMBOL}=", r"\1", text) for text in (gold, answer))     # x=5, or x=1,x=2
    if "=" in g + a or len(names) > 1:
        g, a = gold, answer                                                         # equations, if both
    if not (UNITS.search(g) and UNITS.search(a)):
        g, a = UNITS.sub("", g), UNITS.sub("", a)
    if g == a:
        return True
    g, a = replaced(g, MISREAD), replaced(a, MISREAD)
    symbols = [{match[1] for match in SYMBOLS.finditer(text)} - {None} for text in (g, a)]
    shapes = [(text.count(","), {text[0], text[-1]} & {*"()[]"}) for text in (g, a) if "," in text]
    alike = symbols[0] == symbols[1] and (shapes[:1] == shapes[1:] or r"\pm" in g + a)
    if not (alike or RELATION.search(g + a)) or ("=" in g) != ("=" in a) or BAD.search(g + "|" + a):
        return False
    letters = dict(zip(sorted(symbols[0] | symbols[1]), "abckmnopqrstuvwxyz"))     # \gamma is a number
    g, a = (read(SYMBOLS.sub(lambda m: letters[m[1]] if m[1] else m[0], text)) for text in (g, a))
    point = {x: sympy.Rational(ord(x.name), 101) for x in g.free_symbols | a.free_symbols}
    try:
        if abs((g / a).xreplace(point).evalf(80, strict=True) - 1) > sympy.Float(10) ** -60:
            return False    # they differ at a point. verify takes longer, and compares 15 digits
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError):
        pass                # a list, a set, or no value there
    return verify(g, a, timeout_seconds=None, allow_set_relation_comp=True)


def read(text):
    """The sympy object that math-verify's parser makes of `text`. All letters are real, but i is not."""
    from sympy import I, Symbol
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse
    raw = LatexNormalizationConfig(basic_latex=False, boxed="none")
    (tree,) = parse(f"${text}$", [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=raw)],
                    fallback_mode="no_fallback", parsing_timeout=None)      # no timeout: it would use SIGALRM
    return tree.xreplace({x: Symbol(x.name, real=True) if x.name != "i" else I for x in tree.free_symbols})


def main():
    """Prints the rewards of some responses."""
    POOLS[os.getpid()] = Pool(deadline=1.0)
    pairs = [(r"\boxed{x = -2 \text{ or } x = 1}", "1,-2"), (r"\boxed{4.5 \times 10^{33}}", "4.5e33"),
             (r"\boxed{\binom{n+1}{2}}", r"\frac{n(n+1)}{2}"), (r"\boxed{24}, \boxed{25}", "25"),
             (r"\boxed{\frac13}", "0.333"), (r"\boxed{[2,5]}", "[2,5)"), (r"\boxed{9^{9^{9^{9}}}}", "25")]
    for (response, gold), reward in zip(pairs, grade_all(*zip(*pairs))):
        print(f"{reward}   gold {gold:18} {response}")
    print(f"Values count, hedges do not. Broken off after a second: {timeouts()}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(float(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
