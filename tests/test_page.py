"""What the page of a run promises: one inert file in which the text of the model is shown and never run."""

import base64
import json
from html.parser import HTMLParser

import pytest
from conftest import ROOT

from data import UserError
from lab import figures, page

HOSTILE = [
    "<script>document.title='x'</script>", '<img src=x onerror="alert(1)">', "</span></article>", '"', "'",
    "&amp;", "a\nb", "\x00", "\x1b[31m", "\ud800", "</style>", "<!--", "日本", "$title",
]  # fmt: skip
CONFIG = {"method": "kl_cov", "seed": 3, "model": "<b>tiny</b>"}


def sample(step, tokens, reward=1.0, selected=(), entropy=None):
    n = len(tokens)
    return {"step": step, "prompt": "1+1=<i>", "completion": "".join(tokens), "reward": reward,
            "tokens": list(tokens), "entropy": entropy or [0.1 * i for i in range(n)],
            "covariance": [(-1) ** i * 0.2 * i for i in range(n)], "advantage": [1.0] * n,
            "selected": list(selected)}  # fmt: skip


SAMPLES = [sample(1, HOSTILE, 0.0, [3]), sample(1, "abc"), sample(6, "x"), sample(11, "abc", selected=[2])]


class Elements(HTMLParser):
    """Every element with its attributes, and the text. What is opened must be closed, in order."""

    def __init__(self, html):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "img", "tr", "th", "td"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    """A function that writes a run directory with these lines of samples.jsonl and returns it."""

    def make(samples, end=""):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "entropy": 0.2}\n')
        text = "".join(json.dumps(line) + "\n" for line in samples)
        (tmp_path / "samples.jsonl").write_text(text + end)
        return tmp_path

    return make


def test_the_page_holds_nothing_that_runs_or_is_fetched():
    html = page.page(CONFIG, SAMPLES, b"png")
    found = Elements(html).found
    assert not {tag for tag, _ in found} & {"script", "link", "iframe", "object", "form", "a", "i", "b"}
    names = {name for _, attributes in found for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("href", "srcset", "action")]
    data = base64.b64encode(b"png").decode()
    assert [a["src"] for _, a in found if "src" in a] == [f"data:image/png;base64,{data}"]
    policy = next(a["content"] for _, a in found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;") and "script" not in policy
    assert "url(" not in html and "@import" not in html


def test_every_token_can_be_read_back_with_signs_for_what_could_not_be_seen():
    text = Elements(page.page(CONFIG, SAMPLES)).text
    for token in HOSTILE:
        assert {"a\nb": "a↵\nb", "\x00": "␀", "\x1b[31m": "␛[31m"}.get(token, token) in text
    assert "1+1=<i>" in text and "<b>tiny</b>" in text


def test_the_first_and_the_last_logged_step_are_shown():
    html = page.page(CONFIG, SAMPLES)
    assert html.count("<article>") == 3 and "Step 1<" in html and "Step 11<" in html and "Step 6<" not in html
    assert html.count("wrong, 14 tokens") == 1 and html.count("right, 3 tokens") == 2


def test_a_value_that_is_not_known_is_a_dash_without_colour():
    html = page.page(CONFIG, [sample(1, "xy", entropy=[None, 0.5])])
    assert 'style="--e:0;' in html and 'title="entropy -,' in html and 'style="--e:1;' in html


def test_a_long_completion_is_cut_and_the_page_says_so():
    html = page.page(CONFIG, [sample(1, "x" * 1000)])
    assert html.count("<span") == page.LONGEST and "... 600 more tokens" in html


def test_the_command_writes_one_file_and_leaves_out_a_torn_line(run, command):
    folder = run(SAMPLES, end='{"step": 12, "prompt": "torn')
    before = {file.name for file in folder.iterdir()}
    assert command(page.main, folder) == (0, f"{folder}/page.html\n", "")
    assert {file.name for file in folder.iterdir()} - before == {"page.html"}
    html = (folder / "page.html").read_text(encoding="utf-8")
    assert "Step 11<" in html and "Step 12<" not in html and "plot.py" in html  # there is no curves.png yet


@pytest.mark.parametrize("samples", [[], [{"step": 1}], [sample(1, "ab") | {"entropy": [0.1]}], [[1]]])
def test_samples_that_cannot_be_shown_are_an_error_that_names_them(run, samples):
    folder = run(samples)
    with pytest.raises(UserError, match=f"{folder}: samples.jsonl"):
        page.write(folder)
    assert not (folder / "page.html").exists()


def test_the_figures_show_the_files_of_a_step_and_the_tokens_of_a_right_and_a_wrong_completion():
    text = lambda figure: {t.get_text() for t in figure.axes[0].texts}
    assert all((ROOT / file).exists() for boxes in figures.STEP for *_, file in boxes if ".json" not in file)
    assert {"rollout", "covariance", "update", "losses.py"} <= text(figures.draw_step())
    shown = text(figures.draw_tokens([sample(1, "ab"), sample(1, "xy", 0.0, [1]), sample(2, "z")]))
    assert {"a", "b", "x", "y"} <= shown and "z" not in shown
