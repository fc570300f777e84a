"""What the page of a run promises: all of it in one inert file, model text shown and never run, usable without a mouse and in the dark.

The tests at the end open it in a real browser, over the pipe of Chrome's DevTools protocol, and are skipped where there is none.
"""

import base64
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT

from lab import page
import plot

HOSTILE = ["<script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">", "</label></article><h1>big</h1>",
           "&amp;", '"', "'", "a\nb", "\x00", "\x1b[31m", "\u202eelif", " ", "\ud800", "</style>", "<!--", "日本", "{", "%"]  # fmt: skip
CONFIG = {"method": "kl_cov", "seed": 3, "model": "<b>tiny</b>", "data": "arithmetic"}


def sample(step, tokens, reward=1.0, selected=(), entropy=None, prompt="1+1=<i>"):
    n = len(tokens)
    return {"step": step, "prompt": prompt, "completion": "".join(tokens), "reward": reward, "tokens": list(tokens), "selected": list(selected),
            "entropy": entropy or [0.1 * i for i in range(n)], "covariance": [(-1) ** i * 0.2 * i for i in range(n)], "advantage": [1.0] * n}  # fmt: skip


def metrics(n=30):
    evaluation = lambda s: {"accuracy": 0.5, "accuracy_sampled": 0.4} if s % 5 == 1 else {}
    return [{"step": s, "reward": 0.3 + s / 100, "entropy": 1 / s, "covariance": 0.1 / s, "completion_length": 16.0} | evaluation(s) for s in range(1, n + 1)]


SAMPLES = [sample(1, HOSTILE, 0.0, [3, 6]), sample(1, "a b c".split()), *(sample(s, "a b fork c".split(), selected=[2]) for s in (6, 11, 30))]


@pytest.fixture
def run(tmp_path):
    """run(samples=..., end=...) writes a run directory and returns it."""

    def make(samples=SAMPLES, steps=None, end=""):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(json.dumps(CONFIG))
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps or metrics()))
        (tmp_path / "run" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples) + end)
        return tmp_path / "run"

    return make


class Elements(HTMLParser):
    """Every element with its attributes, the text, and the checks that a browser leaves out: what is opened is closed, in order."""

    LONE = {"meta", "input", "br", "line", "circle", "polyline"}
    OPTIONAL = {"td", "th", "tr"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.LONE | self.OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.OPTIONAL | self.LONE:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


# ---------------------------------------------------------------- the file


def test_the_page_is_well_formed_and_holds_nothing_that_runs_or_is_fetched():
    html = page.page(CONFIG, metrics(), SAMPLES)
    elements = Elements(html)
    assert not {tag for tag, _ in elements.found} & {"script", "img", "link", "iframe", "object", "embed", "b1", "i", "form", "a", "image", "use"}
    attributes = {name for _, attributes in elements.found for name in attributes}
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "srcset", "action", "xlink:href")]
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy
    assert "url(" not in html and "@import" not in html and "http" not in html.replace("http-equiv", "")


def test_every_token_can_be_read_back_from_the_page():
    text = "".join(Elements(page.page(CONFIG, metrics(), SAMPLES)).text)
    for token in HOSTILE[:6] + ["a↵\nb", "␀", "␛[31m", "日本"]:
        assert token in text
    assert "1+1=<i>" in text and "<b>tiny</b>" in text


def test_ids_are_unique_and_the_radio_buttons_of_each_completion_are_a_group_of_their_own():
    found = Elements(page.page(CONFIG, metrics(), SAMPLES)).found
    ids = [a["id"] for _, a in found if "id" in a]
    assert len(ids) == len(set(ids)) == len(page.QUANTITIES)
    groups = [a["name"] for tag, a in found if tag == "input"]
    counts = {name: groups.count(name) for name in groups}
    assert counts == {"by": 4, "early0": len(HOSTILE), "early1": 3, "late0": 4}


def test_values_of_a_token_are_in_words_and_as_shares_of_full_colour():
    html = page.completion(sample(1, "x y z".split(), selected=[2]), "k", {"entropy": 0.2, "covariance": 0.4, "advantage": 2.0, "selected": 1.0}, "kl_cov")
    x, y, z = html.split("<label ")[1:]
    assert 'style="--e:0;--c:0;--a:0.5;--s:0"' in x and 'class="t"' in x
    assert 'style="--e:0.5;--c:-0.5;--a:0.5;--s:0"' in y and "entropy 0.1 nats, covariance -0.2, advantage +1<" in y
    assert 'style="--e:1;--c:1;--a:0.5;--s:1"' in z and 'class="t acted"' in z and "held by the KL penalty" in z


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_dash_without_colour(bad):
    html = page.page(CONFIG, metrics(), [sample(1, ["x", "y"], entropy=[bad, 0.5])])
    assert "entropy - nats" in html and "--e:0;" in html and "--e:1;" in html and "nan" not in html.lower() and ":inf" not in html


def test_a_long_completion_is_cut_and_the_page_says_so():
    html = page.page(CONFIG, metrics(), [sample(1, ["x"] * 1000, entropy=[0.1] * 1000)])
    assert html.count("<label class") == 2 * page.LONGEST and html.count("and 600 more tokens") == 2  # early and late are the same


def test_token_means_are_means_over_all_completions_highest_first():
    lines = [sample(1, ["a", "b", "a"], entropy=[1.0, 0.2, 2.0]), sample(2, ["a", "c"], entropy=[3.0, 9.0])]
    assert page.token_means(lines, "entropy", 1) == [("c", 9.0, 1), ("a", 2.0, 3), ("b", 0.2, 1)]
    assert page.token_means(lines, "entropy", 2) == [("a", 2.0, 3)]


def test_early_and_late_tables_are_of_the_first_and_the_last_third():
    lines = [sample(s, [f"t{s}"] * 2, entropy=[1.0, 1.0]) for s in range(1, 10)]
    tables = page.page(CONFIG, metrics(), lines).split("<table><caption>")[1:]
    of = [[f"t{s}" for s in range(1, 10) if f"<code>t{s}</code>" in table] for table in tables]
    assert of == [["t1", "t2", "t3"], ["t7", "t8", "t9"]] * 2


# ---------------------------------------------------------------- curves


def test_a_curve_draws_every_value_in_order_and_skips_what_was_not_measured():
    steps = [{"step": s, "x": v} for s, v in enumerate([1.0, None, 0.5, math.nan, 0.0], 1)]
    svg = page.curve(steps, "T", "u", False, {"x": "x", "y": "none of it"})
    points = [tuple(map(float, p.split(","))) for p in svg.split('points="')[1].split('"')[0].split()]
    assert len(points) == 3 and svg.count("<polyline") == 1 and svg.count("<circle") == 3
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x1 < x2 < x3 and x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and y3 - y2 == pytest.approx(y2 - y1, abs=0.2) and y1 < y2
    assert "was not measured" in page.curve(steps, "T", "u", False, {"y": "y"})


def test_equal_ratios_are_equal_distances_on_a_logarithmic_axis_and_zero_is_left_out():
    svg = page.curve([{"step": s, "x": v} for s, v in enumerate([1.0, 0.1, 0.01, 0.0], 1)], "T", "u", True, {"x": "x"})
    ys = [float(p.split(",")[1]) for p in svg.split('points="')[1].split('"')[0].split()]
    assert len(ys) == 3 and ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2) and ys[0] < ys[1]


@pytest.mark.parametrize("low, high, log", [(0, 1, False), (0, 0.01, False), (-0.02, 0.3, False), (1, 120, False), (1, 1, False), (0.001, 0.5, True), (11, 13, True)])
def test_ticks_are_few_round_and_within(low, high, log):
    found = page.ticks(low, high, log)
    assert (2 if low < high else 0) <= len(found) <= 7 and all(low - 1e-9 <= x <= high + 1e-9 for x in found) and found == sorted(found)
    assert all(len(f"{x:.6g}".replace("0", "").replace(".", "").replace("-", "")) <= 3 for x in found)


@pytest.mark.parametrize("steps", [metrics(1), [{"step": 1, "reward": None, "entropy": None, "covariance": None}], [{"step": 1, "entropy": 0.0, "reward": 0.0}]])
def test_a_run_that_has_hardly_begun_has_a_page(steps):
    Elements(page.page(CONFIG, steps, [sample(1, ["x"])]))


# ---------------------------------------------------------------- the command


def command(*arguments):
    return subprocess.run([sys.executable, ROOT / "plot.py", *map(str, arguments), "--html"], capture_output=True, text=True)


def test_the_command_writes_the_page_into_the_run_and_nothing_else(run):
    folder = run(end='{"step": 31, "prompt": "torn')
    done = command(folder)
    assert (done.returncode, done.stdout) == (0, f"{folder}/page.html\n"), done.stderr
    assert {file.name for file in folder.iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl", "page.html"}
    Elements((folder / "page.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("damage", ["none", "empty", "broken", "short", "list"])
def test_samples_that_cannot_be_shown_exit_2_with_one_line_and_no_page(run, damage, monkeypatch, capsys):
    short = sample(1, ["a", "b"]) | {"entropy": [0.1]}
    folder = run({"none": [], "empty": [], "broken": [{"step": 1}], "short": [short], "list": [[1]]}[damage])
    if damage == "none":
        (folder / "samples.jsonl").unlink()
    monkeypatch.setattr(sys, "argv", ["plot.py", str(folder), "--html"])
    with pytest.raises(SystemExit) as end:
        plot.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "samples.jsonl" in err and str(folder) in err
    assert not (folder / "page.html").exists()


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """ask(method, **parameters) of a headless Chromium's page; ask.until(event) waits for an event of it."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium")
    (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_read, from_write)]

    def descriptors():  # the browser reads commands from 3 and answers on 4
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe about:blank".split()
    process = subprocess.Popen([program, *flags], preexec_fn=descriptors, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for fd in (*theirs, to_read, from_write):
        os.close(fd)
    answers, session, count = os.fdopen(from_read, "rb"), {}, iter(range(1, 10**6))

    def receive():
        message = b""
        while not message.endswith(b"\0"):
            byte = answers.read(1)
            assert byte, "the browser ended"
            message += byte
        return json.loads(message[:-1])

    def until(true):
        while not true(message := receive()):
            pass
        return message

    def ask(method, **parameters):
        number = next(count)
        os.write(to_write, json.dumps({"id": number, "method": method, "params": parameters} | session).encode() + b"\0")
        answer = until(lambda m: m.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    ask.until = lambda event: until(lambda m: m.get("method") == event)
    target = next(t for t in ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
    session["sessionId"] = ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
    ask("Page.enable")
    yield ask
    process.kill()
    process.wait()


@pytest.fixture
def opened(browser, run):
    """js(expression) in the opened page, and the browser."""
    folder = run()
    page.write(folder, *plot.read_run(folder))
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
    browser("Page.navigate", url=f"file://{folder}/page.html")
    browser.until("Page.loadEventFired")

    def js(expression):
        answer = browser("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    return js, browser


def press(browser, key, modifiers=0):
    codes = {"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37}
    for kind in ("rawKeyDown", "keyUp"):
        browser("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], modifiers=modifiers)


def test_in_the_browser_model_text_is_shown_and_nothing_of_it_runs(opened):
    js, _ = opened
    assert js("document.title") == "kl_cov, seed 3"
    assert js("document.scripts.length + document.images.length + document.querySelectorAll('article h1').length") == 0
    shown = js("[...document.querySelector('article').querySelectorAll('.t')].map(t => t.childNodes[1].textContent)")
    assert shown == ["a↵\nb" if t == "a\nb" else "␀" if t == "\x00" else "␛[31m" if t == "\x1b[31m" else "?" if t == "\ud800" else t for t in HOSTILE]
    assert js("performance.getEntriesByType('resource').length") == 0  # nothing was fetched


def test_in_the_browser_a_script_would_not_run_even_if_one_got_in(opened):
    js, _ = opened
    js("(() => { const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s) })()")
    assert js("document.title") == "kl_cov, seed 3"


COLOURS = "[...document.querySelectorAll('article')[1].querySelectorAll('.t')].map(t => getComputedStyle(t).backgroundColor + getComputedStyle(t).backgroundImage)"


def test_in_the_browser_the_keyboard_chooses_the_quantity_that_colours_the_tokens(opened):
    js, browser = opened
    js("document.querySelector('#by-entropy').focus()")
    seen = [js(COLOURS)]
    for key in list(page.QUANTITIES)[1:]:
        press(browser, "ArrowRight")
        assert js("document.activeElement.id") == f"by-{key}" and js(f"document.querySelector('#by-{key}').checked")
        seen.append(js(COLOURS))
    assert len({tuple(colours) for colours in seen}) == 4
    assert len(set(seen[0])) == 3 and len(set(seen[2])) == 1  # entropies 0, .1, .2; one advantage


def test_in_the_browser_a_completion_is_one_tab_stop_and_arrows_go_from_token_to_token_with_their_values(opened):
    js, browser = opened
    js("document.querySelector('#by-entropy').focus()")
    bar = "[...document.querySelectorAll('.v')].filter(v => getComputedStyle(v).display != 'none').map(v => v.textContent)"
    assert js(bar) == []
    press(browser, "Tab")
    assert js("document.activeElement.name") == "early0"
    (first,) = js(bar)
    assert first.startswith("<script>") and "entropy 0 nats" in first
    press(browser, "ArrowRight")
    (second,) = js(bar)
    assert second.startswith("<img") and "covariance -0.2" in second
    press(browser, "Tab")
    assert js("document.activeElement.name") == "early1"
    box = js("(() => { const r = document.activeElement.parentNode.querySelector('.v').getBoundingClientRect(); return [r.top, r.bottom, innerHeight] })()")
    assert 0 <= box[0] < box[1] <= box[2]  # within the window


def test_in_the_browser_the_values_come_on_hover(opened):
    js, browser = opened
    x, y = js("(() => { const t = document.querySelectorAll('article')[1].querySelectorAll('.t')[2]; t.scrollIntoView({block: 'center'});"
              " const r = t.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()")  # fmt: skip
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert js("[...document.querySelectorAll('.v')].filter(v => getComputedStyle(v).display != 'none').map(v => v.textContent)") == [
        "c entropy 0.2 nats, covariance +0.4, advantage +1"
    ]


CONTRAST = """(() => {
  const channels = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                       return .2126 * r + .7152 * g + .0722 * b };
  const over = (top, under, alpha) => under.map((v, i) => v * (1 - alpha) + top[i] * alpha);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((x, y) => y - x); return (x + .05) / (y + .05) };
  const back = channels(getComputedStyle(document.body).backgroundColor).slice(0, 3), out = {};
  for (const e of document.querySelectorAll('p, h1, h4, td, th, caption, figcaption span, svg text, legend, summary, .prompt')) {
    const s = getComputedStyle(e), c = channels(e.tagName == 'text' ? s.fill : s.color);
    out[e.tagName + e.className] = Math.min(out[e.tagName + e.className] ?? 99, ratio(c, back));
  }
  const text = channels(getComputedStyle(document.querySelector('.t')).color);
  for (const name of ['--up', '--down'])
    out[name] = ratio(text, over(channels(getComputedStyle(document.documentElement).getPropertyValue(name)), back, .6));
  const v = getComputedStyle(document.querySelector('.v'));
  out.bar = ratio(channels(v.color), channels(v.backgroundColor));
  return [light(back), out];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_the_browser_everything_is_readable_in_light_and_in_dark(opened, scheme):
    js, browser = opened
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    lightness, contrast = js(CONTRAST)
    assert (lightness > 0.9) if scheme == "light" else (lightness < 0.02)
    assert len(contrast) > 10 and {k: round(v, 2) for k, v in contrast.items() if v < 4.5} == {}  # WCAG 2, level AA


@pytest.mark.parametrize("width", [360, 1200])
def test_in_the_browser_nothing_is_wider_than_the_window(opened, width):
    js, browser = opened
    browser("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    assert js("document.documentElement.scrollWidth <= innerWidth")


def test_in_the_browser_the_page_is_drawn(opened):
    js, browser = opened
    png = base64.b64decode(browser("Page.captureScreenshot")["data"])
    assert png[:4] == b"\x89PNG" and len(png) > 10_000  # an empty page of this size has 4 kB
    inside = "[...document.querySelectorAll('polyline')].every(p => { const a = p.getBoundingClientRect(), b = p.ownerSVGElement.getBoundingClientRect();"
    assert js(inside + " return a.left >= b.left && a.right <= b.right && a.top >= b.top - 1 && a.bottom <= b.bottom })")
    assert js("document.querySelectorAll('polyline').length") == 6
