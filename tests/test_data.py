"""Data: every set becomes prompts that ask for a box, and golds as text; what cannot be read is one line."""

import csv
import json
import os
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

import data
from data import INSTRUCTION, UserError, load_problems


def write(path, *rows):
    """The rows as a file of one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(name, **options):
    """The one line with which loading ends."""
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


@pytest.mark.parametrize("name", FILES)
def test_every_real_file_loads_whole_with_its_golds_and_the_instruction_last(shared, name):
    problems = load_problems(shared / "data" / f"{name}.jsonl")
    count, expected = FILES[name]
    assert len(problems) == count
    assert {row: problems[row][1] for row in expected} == expected
    assert all(prompt.endswith(INSTRUCTION) and gold.strip() for prompt, gold in problems)
    assert not name.startswith("gsm8k") or not [gold for _, gold in problems if "," in gold or "#" in gold]


def test_without_its_template_dapo_is_what_its_processed_copy_is(shared):
    raw = load_problems(shared / "data" / "dapo_math_17k.jsonl")
    assert raw == load_problems(shared / "data" / "dapo_math_17k_processed.jsonl")
    assert not [prompt for prompt, _ in raw if "Answer:" in prompt or "step by step. The last line" in prompt]


def test_training_loses_repeated_problems_and_a_benchmark_keeps_them(shared, tmp_path):
    lines = (shared / "data" / "dapo_math_17k.jsonl").read_text().splitlines(keepends=True)[:20]
    (tmp_path / "a.jsonl").write_text("".join(lines * 100))
    assert len(load_problems(tmp_path / "a.jsonl")) == 20
    assert len(load_problems(tmp_path / "a.jsonl", benchmark=True)) == 2000


def test_training_problems_that_are_held_out_are_dropped_and_counted(shared):
    train = load_problems(shared / "data" / "dapo_math_17k.jsonl")
    kept, dropped = data.drop_overlap(train, load_problems(shared / "data" / "olympiadbench.jsonl"))
    assert (len(kept), dropped) == (299, 1)  # with other spacing in the two sets
    train = [("What is $x + 1$?" + INSTRUCTION, "a"), ("6+1*3=", "9"), ("6*1+3=", "9"), ("计算一", "1")]
    kept, _ = data.drop_overlap(train, [("what is  x+1 ?", "a"), ("6*1+3=", "9"), ("计算二", "1")])
    assert [prompt for prompt, _ in kept] == ["6+1*3=", "计算一"]


# Rows as they occur in the wild.

ROWS = {
    "AIME in capitals": ({"ID": "I-1", "Problem": "p?", "Solution": "s", "Answer": "025"}, "025"),
    "degrees": ({"question": "p?", "answer": "336^\\circ"}, "336^\\circ"),
    "a float": ({"problem": "p?", "answer": 142.0}, "142"),
    "an integer": ({"problem": "p?", "answer": 204}, "204"),
    "the last box": ({"problem": "p?", "solution": "Not \\boxed{1} but \\boxed{\\frac12}."}, "\\frac12"),
    "two boxes": ({"problem": "p?", "solution": "The roots are $\\boxed{3}$ and $\\boxed{5}$."}, "3, 5"),
    "a box without braces": ({"problem": "p?", "solution": "so $x=\\boxed 12$."}, "12"),
    "an fbox": ({"problem": "p?", "solution": "so \\fbox{3}."}, "3"),
    "escaped braces": ({"problem": "p?", "solution": "\\boxed{\\{1,2\\}}"}, "\\{1,2\\}"),
    "GSM8K": ({"question": "p?", "answer": "1,000*2=2,000\n#### 2,000"}, "2000"),
    "a list": ({"question": "p?", "context": None, "solution": ["long"], "final_answer": ["1", "3"]}, "1, 3"),
    "a list as text": ({"problem": "p?", "answer": "['588']"}, "588"),
    "a JSON list as text": ({"problem": "p?", "answer": '["\\\\frac{1}{2}"]'}, "\\frac{1}{2}"),
    "an interval": ({"problem": "p?", "answer": "[2,5)"}, "[2,5)"),
    "processed DAPO": ({"prompt": "p?", "solution": "34"}, "34"),
    "a chat": ({"prompt": [{"role": "user", "content": "p?"}], "reward_model": {"ground_truth": "34"}}, "34"),
    "a list as NumPy writes it": ({"problem": "p?", "answer": "['2' '3']"}, "2, 3"),
    "a list with an apostrophe": ({"problem": "p?", "answer": """["f'(1)=2", '3']"""}, "f'(1)=2, 3"),
    "a gold in a box": ({"problem": "p?", "answer": "\\[\n\\boxed{60}\n\\]"}, "60"),
}


@pytest.mark.parametrize("name", ROWS)
def test_row_loads_without_options(tmp_path, name):
    row, gold = ROWS[name]
    assert load_problems(write(tmp_path / "a.jsonl", row)) == [("p?" + INSTRUCTION, gold)]


def test_golds_of_several_types_in_one_column_load(tmp_path):
    rows = [{"problem": str(gold), "answer": gold} for gold in (1, "1/2", 2.5, ["3"])]
    file = write(tmp_path / "a.jsonl", *rows)
    assert [gold for _, gold in load_problems(file)] == ["1", "1/2", "2.5", "3"]
    assert [gold for _, gold in load_problems(file, limit=2)] == ["1", "1/2"]


@pytest.mark.parametrize("name", ["proof", "notfound", "Not found", "N/A"])
def test_golds_that_are_no_answers_are_left_out_and_counted(tmp_path, capsys, name):
    file = write(tmp_path / "a.jsonl", {"problem": "p?", "answer": "1"}, {"problem": "q?", "answer": name})
    assert load_problems(file) == [("p?" + INSTRUCTION, "1")]
    assert capsys.readouterr().err == f"{file}: 1 rows without a gold left out, first 2\n"


@pytest.mark.parametrize("problem, asks", [
    ("p? Use \\boxed{}.", True), ("p?\nPut your answer within $\\boxed{answer}$", True), ("p?", False),
    ("We found \\boxed{3}. Square it.", False), ("Solution: \\boxed{3.5}\n\nSquare it", False),
])  # fmt: skip
def test_prompt_gets_the_instruction_unless_it_ends_with_a_request_for_a_box(tmp_path, problem, asks):
    ((prompt, _),) = load_problems(write(tmp_path / "a.jsonl", {"problem": problem, "answer": "1"}))
    assert prompt == problem + INSTRUCTION * (not asks)


def test_context_precedes_the_question(tmp_path):
    file = write(tmp_path / "a.jsonl", {"context": "Let n > 1.", "question": "Find n.", "answer": "2"})
    assert load_problems(file)[0][0] == "Let n > 1.\n\nFind n." + INSTRUCTION


def test_of_a_longer_chat_the_last_user_message_is_asked_and_a_line_says_so(tmp_path, capsys):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "p?"}]
    file = write(tmp_path / "a.jsonl", {"prompt": chat, "answer": "1"})
    assert load_problems(file) == [("p?" + INSTRUCTION, "1")]
    assert capsys.readouterr().err == f"{file}: only the last user message is asked of 1 longer chats\n"


def test_every_kind_of_file_gives_the_same_problems(tmp_path):
    rows = [{"problem": f'p{i}, "ü"\nline?', "answer": f"0{i}", "extra": None} for i in range(3)]
    write(tmp_path / "a [1]*.jsonl", *rows)
    write(tmp_path / "lines.json", *rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    loaded = [load_problems(file) for file in tmp_path.iterdir()]
    assert len(loaded) == 5 and all(problems == loaded[0] for problems in loaded)
    assert [gold for _, gold in loaded[0]] == ["00", "01", "02"]


def test_changed_file_is_read_anew_and_nothing_is_left_beside_it(tmp_path):
    for gold in ("1", "2"):
        assert load_problems(write(tmp_path / "a.jsonl", {"problem": "p?", "answer": gold}))[0][1] == gold
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_options_choose_columns_also_inner_ones_and_win_over_known_names(tmp_path):
    row = {"task": "p?", "result": "1", "problem": "q?", "rewritten": {"text": "r?"}}
    file = write(tmp_path / "a.jsonl", row)
    assert load_problems(file, "task", "result") == [("p?" + INSTRUCTION, "1")]
    assert load_problems(file, "rewritten.text", "result") == [("r?" + INSTRUCTION, "1")]


# What goes wrong, in one line each.


def test_unknown_columns_are_named_with_the_option_that_chooses(tmp_path):
    file = write(tmp_path / "a.jsonl", {"task": "p?", "result": "1"})
    assert all(word in error_of(file) for word in (str(file), "task", "result", "--prompt-field"))
    assert "--answer-field" in error_of(file, prompt_field="task")
    assert "tusk" in error_of(file, prompt_field="tusk")


@pytest.mark.parametrize("row", [
    {"problem": "p?"}, {"problem": "p?", "answer": None}, {"problem": "p?", "answer": "  "}, {"answer": "1"},
    {"problem": "p?", "answer": {"a": 1}}, {"problem": "p?", "answer": True}, {"problem": "p?", "answer": []},
    {"problem": "", "answer": "1"}, {"problem": 7, "answer": "1"}, {"problem": "p?", "answer": "\\boxed{5"},
])  # fmt: skip
def test_row_without_a_problem_or_a_gold_is_named(tmp_path, row):
    file = write(tmp_path / "a.jsonl", {"problem": "p?", "answer": "1"}, row)
    assert error_of(file).startswith(f"{file}: row 2: ")


GOOD, DEEP, HEADER = b'{"problem": "p?", "answer": "1"}\n', b"[" * 100_000, b"problem,answer\n"
DAMAGED = [
    ("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.jsonl", GOOD + GOOD[:20]), ("a.jsonl", GOOD + b"{'a': 1}"),
    ("a.jsonl", b"[1, 2]\n"), ("a.jsonl", b"3\n"), ("a.jsonl", GOOD + GOOD.replace(b"?", b"\xff")),
    ("a.jsonl", b'{"problem": ' + DEEP), ("a.jsonl", b'{"problem": "p?", "solution": "long,\\nno box"}'),
    ("a.json", DEEP), ("a.json", b"[]"), ("a.json", b"[{"), ("a.json", b"\xff\xfe"), ("a.parquet", b"PAR1"),
    ("a.parquet", b""), ("a.csv", b""), ("a.csv", HEADER), ("a.csv", HEADER + b'"p?,1\n'), ("a", b"p?"),
    ("a.csv", HEADER + b"\xff,1\n"), ("a.csv", HEADER + b"p, q?,1\n"), ("a.txt", b"p?"),
]  # fmt: skip


@pytest.mark.parametrize("name, content", DAMAGED, ids=range(len(DAMAGED)))
def test_empty_or_damaged_file_is_named(tmp_path, capfd, name, content):
    (tmp_path / name).write_bytes(content)
    assert error_of(tmp_path / name).startswith(str(tmp_path / name))
    assert capfd.readouterr() == ("", "")


def test_folder_missing_file_and_unknown_name_are_told_apart(tmp_path):
    assert "not a data file" in error_of(tmp_path)
    assert "no such file" in error_of(tmp_path / "none.jsonl")
    assert "math500" in error_of("mathfivehundred") and "math500" in error_of("../nowhere/at/all")


def test_hub_id_without_a_network_says_what_to_do(tmp_path):
    """A proxy that nobody listens at stands for no network."""
    dead = os.environ | {"HF_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, ROOT / "data.py", "gsm8k"]
    done = subprocess.run(command, env=dead, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("data.py: error: openai/gsm8k: ")
    assert "hf download openai/gsm8k --repo-type dataset" in done.stderr


# The hub, played by a function that notes how it was asked.


@pytest.fixture
def hub(monkeypatch):
    asked, rows = [], []

    def load_dataset(hub_id, config, split):
        asked.append((hub_id, config, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, rows


def test_hub_is_asked_for_config_and_split_by_purpose(hub):
    asked, rows = hub
    rows.append({"question": "p?", "answer": "2*3=6\n#### 6"})
    assert load_problems("gsm8k") == [("p?" + INSTRUCTION, "6")]
    load_problems("gsm8k", "a column for other sets", benchmark=True)
    load_problems("amc23")
    load_problems("some/set:sub:validation")
    load_problems("some/set", benchmark=True)
    assert asked == [
        ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test"), ("math-ai/amc23", None, "test"),
        ("some/set", "sub", "validation"), ("some/set", None, "test"),
    ]  # fmt: skip


def test_bad_rows_of_the_hub_are_left_out_and_counted(hub, capsys):
    hub[1].extend([{"problem": "p?", "answer": "1"}, {"problem": "q?", "answer": ""}])
    assert len(load_problems("omni_math")) == 1 and "1 rows without a gold" in capsys.readouterr().err


# Prompts as the model reads them.


@pytest.fixture(scope="module")
def tokenizer(qwen_tokenizer):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_tokenizer)


def encode(tokenizer, *prompts):
    """The prompts, each with its place as gold, in at most 30 tokens."""
    problems = [(prompt, str(i)) for i, prompt in enumerate(prompts)]
    return data.encode_problems(tokenizer, problems, 30, "--data FILE")


def test_prompts_go_through_the_chat_template_of_the_tokenizer(tokenizer):
    (first, _), (second, gold) = encode(tokenizer, "p?", "What is 1+1?")
    assert gold == "1"
    assert tokenizer.decode(first).endswith("<|im_start|>user\np?<|im_end|>\n<|im_start|>assistant\n")
    assert all(type(i) is int for i in first) and tokenizer.decode(second).count("<|im_start|>") == 3


def test_prompts_that_are_too_long_are_none_and_an_error_if_all_are(tokenizer):
    assert encode(tokenizer, "p?", "p " * 100)[1] == (None, "1")
    said = "--data FILE: all prompts are longer than 30 tokens: the shortest has 1"
    with pytest.raises(UserError, match=said):
        encode(tokenizer, "p " * 100)
