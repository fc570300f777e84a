"""What data.py promises, on the real sets' first rows where they lie beside the checkout, and on rows written here."""

import csv
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"

import data  # noqa: E402
from data import UserError, load_problems  # noqa: E402

shared = pytest.mark.skipif(not SHARED.exists(), reason="the real sets are not here")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def golds(path, rows, **options):
    return [gold for _, gold in load_problems(write(path, rows), **options)]


def error_of(name, **options):
    with pytest.raises(UserError) as caught:
        load_problems(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Real files.

FILES = {  # file: (problems, {row: gold})
    "math500": (500, {0: "\\left( 3, \\frac{\\pi}{2} \\right)", 1: "p - q"}),
    "aime2024": (30, {7: "025", 15: "073"}),
    "aime2025": (30, {0: "70"}),
    "amc23": (40, {15: "-1"}),
    "olympiadbench": (100, {0: "2", 1: "$\\frac{1}{2 n+2}$"}),
    "minerva": (120, {1: "4.5e33", 5: "np.arcsin(10/13)"}),
    "omni_math": (150, {0: "115440", 28: "\\frac{n+1}{4n-2}", 43: "1999"}),
    "gsm8k_test": (400, {0: "18"}),
    "gsm8k_train": (1000, {0: "72"}),
    "dapo_math_17k": (300, {0: "34"}),
    "dapo_math_17k_processed": (300, {0: "34"}),
    "math_train_lvl3to5": (1000, {0: "230"}),
}


@shared
@pytest.mark.parametrize("name", FILES)
def test_every_real_file_loads_whole_and_with_its_golds(name):
    problems = load_problems(SHARED / "data" / f"{name}.jsonl")
    count, expected = FILES[name]
    assert len(problems) == count
    assert {row: problems[row][1] for row in expected} == expected
    assert all("\\boxed" in prompt and prompt.strip() and gold.strip() for prompt, gold in problems)


@shared
def test_gsm8k_golds_lose_their_thousands_commas():
    problems = load_problems(SHARED / "data" / "gsm8k_test.jsonl") + load_problems(SHARED / "data" / "gsm8k_train.jsonl")
    assert not [gold for _, gold in problems if "," in gold or "#" in gold]
    assert {"2125", "109200000"} <= {gold for _, gold in problems}


@shared
def test_dapo_template_is_off_and_the_box_instruction_on():
    raw = load_problems(SHARED / "data" / "dapo_math_17k.jsonl")
    assert not [prompt for prompt, _ in raw if "Answer:" in prompt or "step by step. The last line" in prompt]
    assert all(prompt.endswith(data.INSTRUCTION) for prompt, _ in raw)
    assert raw == load_problems(SHARED / "data" / "dapo_math_17k_processed.jsonl")  # whose authors took it off themselves


@shared
def test_repeated_training_problems_are_removed(tmp_path):
    lines = (SHARED / "data" / "dapo_math_17k.jsonl").read_text().splitlines(keepends=True)[:20]
    (tmp_path / "repeated.jsonl").write_text("".join(lines * 100))
    assert len(load_problems(tmp_path / "repeated.jsonl")) == 20


@shared
def test_training_problems_that_occur_in_an_evaluation_set_are_dropped_and_counted():
    train = load_problems(SHARED / "data" / "dapo_math_17k.jsonl")
    benchmark = load_problems(SHARED / "data" / "olympiadbench.jsonl")
    kept, dropped = data.drop_overlap(train, benchmark)
    assert dropped == 1 and len(kept) == 299  # Gugu's napkin, with other spacing in the two sets
    assert data.drop_overlap(train, train) == ([], 300)


# Rows as they occur in the wild.


def test_overlap_ignores_spacing_case_and_dollars_but_no_operator():
    train = [("What is $x + 1$?" + data.INSTRUCTION, "a"), ("6+1*3=", "9"), ("6*1+3=", "9"), ("计算一", "1")]
    kept, dropped = data.drop_overlap(train, [("what is  x+1 ?", "a"), ("6*1+3=", "9"), ("计算二", "1")])
    assert dropped == 2 and [prompt for prompt, _ in kept] == ["6+1*3=", "计算一"]


def test_embedded_sets_are_disjoint_and_carry_no_instruction():
    train, heldout = load_problems("arithmetic", limit=200), load_problems("arithmetic_heldout")
    assert (len(train), len(heldout)) == (200, 512)
    assert data.drop_overlap(train, heldout)[1] == 0
    assert all(prompt.endswith("=") for prompt, _ in train + heldout)


VARIANTS = {
    "AIME in capitals": ({"ID": "2024-I-1", "Problem": "p?", "Solution": "s", "Answer": "025"}, "025"),
    "AIME 2025 with degrees": ({"question": "p?", "answer": "336^\\circ"}, "336^\\circ"),
    "AMC with float golds": ({"id": 1, "problem": "p?", "answer": 142.0}, "142"),
    "integer golds": ({"problem": "p?", "answer": 204}, "204"),
    "Hendrycks MATH": ({"problem": "p?", "level": "Level 5", "type": "Algebra", "solution": "no \\boxed{1}, \\boxed{\\frac{1}{2}}."}, "\\frac{1}{2}"),
    "a box without braces": ({"problem": "p?", "solution": "so $x=\\boxed 2$."}, "2"),
    "an fbox": ({"problem": "p?", "solution": "so \\fbox{3}."}, "3"),
    "escaped braces in a box": ({"problem": "p?", "solution": "\\boxed{\\left\\{1,2\\right.}"}, "\\left\\{1,2\\right."),
    "Minerva": ({"problem": "p?", "type": "Physics", "solution": "Long.\nThen $\\boxed{4.5e33}$ erg"}, "4.5e33"),
    "GSM8K": ({"question": "p?", "answer": "1,000*2=2,000\n#### 2,000"}, "2000"),
    "OlympiadBench": ({"question": "p?", "context": None, "solution": ["long"], "final_answer": ["$2n$"]}, "$2n$"),
    "several golds": ({"question": "p?", "final_answer": ["1", "3"]}, "1, 3"),
    "processed DAPO": ({"prompt": "p?", "solution": "34"}, "34"),
    "DAPO": ({"prompt": [{"role": "user", "content": "p?"}], "reward_model": {"ground_truth": "34"}}, "34"),
    "a gold in a box": ({"problem": "p?", "answer": "\\[\n\\boxed{60}\n\\]"}, "60"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_loads_without_options(tmp_path, name):
    row, gold = VARIANTS[name]
    assert load_problems(write(tmp_path / "a.jsonl", [row])) == [("p?" + data.INSTRUCTION, gold)]


def test_context_precedes_the_question(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"context": "Let n > 1.", "question": "Find n.", "final_answer": ["2"]}])
    assert load_problems(file)[0][0] == "Let n > 1.\n\nFind n." + data.INSTRUCTION


def test_last_user_message_of_a_chat_is_the_problem(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "p?"}, {"role": "assistant", "content": ""}]
    file = write(tmp_path / "a.jsonl", [{"prompt": chat, "reward_model": {"ground_truth": "1"}}])
    assert load_problems(file) == [("p?" + data.INSTRUCTION, "1")]


def test_problem_that_asks_for_a_box_gets_no_second_instruction(tmp_path):
    assert load_problems(write(tmp_path / "a.jsonl", [{"problem": "p? Use \\boxed{}.", "answer": "1"}]))[0][0] == "p? Use \\boxed{}."


def test_all_four_formats_give_the_same_problems(tmp_path):
    rows = [{"problem": f"p{i}, \"ü\"\nline?", "answer": f"0{i}", "extra": None} for i in range(3)]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "lines.json", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    loaded = [load_problems(file) for file in sorted(tmp_path.iterdir())]
    assert len(loaded) == 5 and all(problems == loaded[0] for problems in loaded)
    assert [gold for _, gold in loaded[0]] == ["00", "01", "02"]


def test_nested_parquet_of_dapo_and_olympiadbench_loads(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    dapo = {"prompt": [{"content": "p?", "role": "user"}], "reward_model": {"ground_truth": "34", "style": "rule"}}
    for row, gold in ((dapo, "34"), ({"question": "p?", "final_answer": ["2"], "context": None}, "2")):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
        assert load_problems(tmp_path / "a.parquet") == [("p?" + data.INSTRUCTION, gold)]


def test_limit_takes_the_first_problems(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"problem": str(i), "answer": i} for i in range(5)])
    assert [gold for _, gold in load_problems(file, limit=2)] == ["0", "1"]


# What goes wrong, in one line each.


def test_unknown_columns_are_named_with_the_options_that_choose(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"task": "p?", "result": "1"}])
    assert all(word in error_of(file) for word in ("task", "result", "--prompt-field"))
    assert "--answer-field" in error_of(file, prompt_field="task")
    assert "'tusk'" in error_of(file, prompt_field="tusk")
    assert load_problems(file, prompt_field="task", answer_field="result") == [("p?" + data.INSTRUCTION, "1")]


def test_options_win_over_known_columns(tmp_path):
    row = {"problem": "p?", "rewritten": {"problem": "q?"}, "answer": "1"}
    assert load_problems(write(tmp_path / "a.jsonl", [row]), prompt_field="rewritten.problem")[0][0].startswith("q?")


BAD_ROWS = {
    "no JSON": "{'problem': 1}",
    "no object": '["p?", "1"]',
    "no gold": '{"problem": "p?"}',
    "gold null": '{"problem": "p?", "answer": null}',
    "gold empty": '{"problem": "p?", "answer": "  "}',
    "gold an object": '{"problem": "p?", "answer": {"a": 1}}',
    "gold true": '{"problem": "p?", "answer": true}',
    "gold NaN": '{"problem": "p?", "answer": NaN}',
    "gold an empty list": '{"problem": "p?", "answer": []}',
    "problem empty": '{"problem": "", "answer": "1"}',
    "problem a number": '{"problem": 7, "answer": "1"}',
    "not UTF-8": b'{"problem": "\xff?", "answer": "1"}',
    "nested too deeply": '{"problem": ' + "[" * 100_000,
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_reported_with_file_and_line(tmp_path, name):
    bad = BAD_ROWS[name] if isinstance(BAD_ROWS[name], bytes) else BAD_ROWS[name].encode()
    file = tmp_path / "some.jsonl"
    file.write_bytes(b'{"problem": "p?", "answer": "1"}\n\n' + bad + b"\n")
    assert error_of(file).startswith(f"{file}:3: ")


def test_worked_solution_without_a_box_is_a_bad_row(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"problem": "p?", "solution": "First this.\nThen 5."}])
    assert "a.jsonl:1: no \\boxed" in error_of(file)
    file = write(tmp_path / "a.jsonl", [{"problem": "p?", "solution": "so \\boxed{5"}])
    assert "a.jsonl:1:" in error_of(file)


def test_bad_csv_row_is_reported_with_its_line(tmp_path):
    (tmp_path / "a.csv").write_text('problem,answer\np?,1\n"two\nlines?",2\nq?\n')
    assert error_of(tmp_path / "a.csv").startswith(f"{tmp_path / 'a.csv'}:5: ")


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", b""), ("a.json", b"[]"), ("a.csv", b"problem,answer\n"), ("a.csv", b""), ("a.jsonl", b"\n\n"),
    ("a.json", b"[{"), ("a.json", b"\xff\xfe"), ("a.csv", b"problem,answer\n\xff,1\n"), ("a.parquet", b"PAR1 no"), ("a.parquet", b""),
    ("a.json", b"[" * 100_000), ("a.csv", b'problem,answer\n"p?,1\n'), ("a.txt", b"p?"),
])  # fmt: skip
def test_empty_or_damaged_file_is_one_line_with_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert error_of(tmp_path / name).startswith(str(tmp_path / name))


def test_folder_and_missing_file_and_nonsense_are_one_line(tmp_path):
    assert "a folder" in error_of(tmp_path)
    assert "No such file" in error_of(tmp_path / "none.jsonl")
    assert "math500" in error_of("mathfivehundred") and "math500" in error_of("../nowhere/at/all")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_one_line(tmp_path):
    write(tmp_path / "a.jsonl", [{"problem": "p?", "answer": "1"}]).chmod(0)
    assert "ermission" in error_of(tmp_path / "a.jsonl")


def test_uncached_hub_id_without_network_ends_in_one_line_in_time(tmp_path):
    """A proxy that nobody listens at stands for no network."""
    dead = dict(os.environ, HF_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
    dead.pop("no_proxy", None), dead.pop("NO_PROXY", None)
    start = time.time()
    done = subprocess.run([sys.executable, ROOT / "data.py", "gsm8k"], env=dead, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and time.time() - start < 20
    assert len(done.stderr.strip().splitlines()) == 1
    assert "hf download openai/gsm8k --repo-type dataset" in done.stderr and ".parquet" in done.stderr


# The hub, played by a function that notes how it was asked.


@pytest.fixture
def hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked, rows = [], []

    def load_dataset(hub_id, config, split):
        asked.append((hub_id, config, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "hub_reachable", lambda: True)
    return asked, rows


def test_known_names_ask_the_hub_for_config_and_split_by_purpose(hub):
    asked, rows = hub
    rows.append({"question": "p?", "answer": "2*3=6\n#### 6"})
    assert load_problems("gsm8k") == load_problems("gsm8k", benchmark=True) == [("p?" + data.INSTRUCTION, "6")]
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    rows[0] = {"problem": "p?", "solution": "\\boxed{1}"}
    load_problems("math")
    load_problems("some/set:sub:validation")
    load_problems("some/set", benchmark=True)
    load_problems("some/set", config="c", split="s")
    assert asked[3:] == [("some/set", "sub", "validation"), ("some/set", None, "test"), ("some/set", "c", "s")]


def test_bad_rows_of_the_hub_are_left_out_and_counted(hub, capsys):
    hub[1].extend([{"problem": "p?", "answer": "1"}, {"problem": "q?", "answer": ""}])
    assert len(load_problems("omni_math")) == 1
    assert "1 rows left out, the first: row 2" in capsys.readouterr().err


def test_name_or_split_that_the_hub_does_not_have_is_one_line(hub, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ValueError("Unknown split \"train\". Should be one of ['test'].\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "some/set (config None, split train): Unknown split" in error_of("some/set")


def test_every_known_set_has_a_split_and_fields():
    for name, (hub_id, _, train, test, problem, gold) in data.KNOWN.items():
        assert "/" in hub_id and (train or test) and problem and gold, name


# Prompts as the model reads them.


@pytest.fixture(scope="module")
def tokenizer():
    if not SHARED.exists():
        pytest.skip("the real tokenizer is not here")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "qwen-tokenizer")


def test_prompts_go_through_the_chat_template_of_the_tokenizer(tokenizer):
    first, second = data.encode_prompts(tokenizer, ["p?", "What is 1+1?"], 100)
    assert all(type(i) is int for i in first)
    assert tokenizer.decode(first).endswith("<|im_start|>user\np?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(second).count("<|im_start|>") == 3


def test_prompts_that_are_too_long_are_none_and_an_error_if_all_are(tokenizer):
    assert data.encode_prompts(tokenizer, ["p?", "p " * 100], 30)[1] is None
    with pytest.raises(UserError, match="all 1 prompts are longer than 30 tokens: the shortest has 1"):
        data.encode_prompts(tokenizer, ["p " * 100], 30)


def test_tokenizer_without_chat_template_is_one_line():
    from lab import warmstart

    tokenizer = warmstart.make_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = None, "some/base"
    with pytest.raises(UserError, match="some/base: no chat template that puts a prompt to this model"):
        data.encode_prompts(tokenizer, ["p?"], 10)


def test_demonstration_runs_in_seconds():
    done = subprocess.run([sys.executable, ROOT / "data.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "arithmetic" in done.stdout and "-> 2125" in done.stdout
