"""What recipes/ promises: every file parses with each of the three methods, says what is published, and needs the memory that it says."""

import argparse
import re

import pytest
import torch
import transformers
from conftest import ROOT

import data
import train

RECIPES = sorted((ROOT / "recipes").glob("*.txt"))
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
SIZES = {  # hidden, intermediate, layers, heads, key/value heads, embeddings tied: from the config.json that each model is published with
    "0.5B": (896, 4864, 24, 14, 2, True), "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True), "7B": (3584, 18944, 28, 28, 4, False),
}  # fmt: skip


def parsed(path, method, tmp_path, *more):
    return train.options([f"@{path}", "--method", method, "--device", "cpu", "--out", str(tmp_path / "run"), *more])


def test_there_is_one_for_each_size():
    assert [path.stem for path in RECIPES] == [f"qwen2.5-{size.lower()}" for size in SIZES]


@pytest.mark.parametrize("method", ["grpo", "clip_cov", "kl_cov"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_with_each_method_and_has_the_published_settings(path, method, tmp_path, capsys):
    o = parsed(path, method, tmp_path)
    assert o.model.lower() == f"qwen/{path.stem}" and o.data in data.KNOWN and o.eval_data in data.KNOWN
    assert (o.prompts, o.samples, o.prompts // o.mini_batch, o.temperature, o.grad_clip, o.passes) == (256, 8, 8, 1.0, 1.0, 1)
    assert o.filter_groups and o.advantage == "grpo" and o.lr == 5e-7
    assert (o.clip_low, o.clip_high) == ((1.0, 1.0) if method == "clip_cov" else (0.2, 0.2))
    assert (o.clip_cov_ratio, o.cov_low, o.cov_high, o.kl_cov_ratio, o.kl_cov_beta) == (2e-4, 1.0, 5.0, 2e-3, 1.0)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_one_option_a_line_and_gives_way_to_what_follows_it(path, tmp_path):
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split("#")[0].split()
        assert not words or words[0].startswith("--") and len(words) <= 2
    assert parsed(path, "grpo", tmp_path, "--lr", "1e-6", "--max-new-tokens", "100").lr == 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_in_table_and_recipe_is_what_the_formula_gives(size, tmp_path):
    hidden, intermediate, layers, heads, kv, tied = SIZES[size]
    config = transformers.Qwen2Config(vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                                      num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied)  # fmt: skip
    with torch.device("meta"):
        P = sum(p.numel() for p in transformers.Qwen2ForCausalLM(config).parameters())
    path = ROOT / "recipes" / f"qwen2.5-{size.lower()}.txt"
    o = parsed(path, "grpo", tmp_path)
    a, c = layers * (36 * hidden + 8 * intermediate), 4 * layers * kv * hidden // heads
    update = 20 * P + a * o.micro_batch + 1e9
    sampling = 18 * P + c * o.sample_batch * (o.max_prompt_tokens + o.max_new_tokens)
    assert o.micro_batch >= o.max_prompt_tokens + o.max_new_tokens  # or a row alone would exceed it

    row = next(line for line in README.splitlines() if line.startswith(f"| {size} |"))
    said = [float(x) for x in re.findall(r"\d+\.?\d*(?:e9)?", row.split("|", 2)[2])]
    want = [P, a / 1e6, c / 1e3, o.micro_batch, o.max_new_tokens, 18 * P / 1e9, 11 * P / 1e9, update / 1e9, sampling / 1e9]
    assert said[:9] == pytest.approx(want, rel=0.003, abs=0.05)
    if size == "7B":  # AdamW's 8 bytes, an eighth of them on each GPU
        assert o.shard_optimizer and said[11:13] == pytest.approx([(update - 7 * P) / 1e9, (sampling - 7 * P) / 1e9], rel=0.003)
    for number in (update, sampling):
        assert f"{number / 1e9:.1f} GB" in path.read_text(encoding="utf-8")


def test_an_option_file_may_hold_comments_blank_lines_and_several_options_a_line(tmp_path):
    (tmp_path / "file.txt").write_text("# a comment\n\n--lr 0.25   # and another\n--steps\n7\n--method clip_cov --seed 3\n", encoding="utf-8")
    o = train.options([f"@{tmp_path / 'file.txt'}", "--steps", "9", "--out", str(tmp_path / "run")])
    assert isinstance(o, argparse.Namespace) and (o.method, o.lr, o.steps, o.seed) == ("clip_cov", 0.25, 9, 3)
