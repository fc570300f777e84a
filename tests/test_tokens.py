"""Which tokens carry entropy and covariance, and the base that answers briefly."""

import json
import random
import shutil
from types import SimpleNamespace

import torch
from conftest import narrow

import entropy
from lab import brief, tokens
from reward import grade


def test_the_figures_fit_together_and_are_written(tmp_path, command):
    status, _, err = command(tokens.main, "--out", tmp_path, "--", *"--prompts 32 --device cpu".split())
    assert status == 0, err
    found = json.loads((tmp_path / "data" / "tokens.json").read_text())
    shares = list(found["shares"].values())
    assert shares == sorted(shares, reverse=True) and len(shares) == 6
    assert sum(count for _, count in found["kinds"].values()) <= found["tokens"]
    assert found["kinds"]["rare, wrong"][0] > 0 > found["kinds"]["rare, right"][0]
    assert all(often >= 10 for _, _, often in found["words by entropy"])
    for figures in found["bf16"].values():  # rounding to 8 bits shows, and is no other computation
        mean, high, largest = figures["logp"]
        assert 0 < mean < high <= largest < 2 and mean < 0.02
        assert figures["changed 0.02"][0] <= figures["changed 0.02"][1] > 5
    assert "| 0.02% |" in (tmp_path / "tokens.md").read_text()
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("tokens.png", "completions.png"))


def test_the_problems_of_the_brief_base_have_their_answers_and_differ():
    found = brief.problems(300, random.Random(0), 1, 9)
    assert len(dict(found)) == 300
    for expression, answer in found:
        assert grade(f"\\boxed{{{answer}}}", str(eval(expression.replace("x", "*")))) == 1


def test_learning_raises_the_log_prob_of_what_is_taught(monkeypatch):
    model = narrow(vocab_size=64)
    monkeypatch.setattr(brief, "encode_problems", lambda _, asked, *__: [([1, 2], c) for _, c in asked])
    kept = [("1 + 1", [5, 6, 7])] * 40 + [("2 + 2", [8, 9])] * 24
    monkeypatch.setattr(brief, "LR", 1e-2)
    before = entropy.score(model, [[1, 2]], [[5, 6, 7]])[0].mean().item()
    o = SimpleNamespace(device="cpu", precision="fp32", micro_batch=64, temperature=1.0)
    brief.learn(model, None, kept, random.Random(0), o)
    assert entropy.score(model, [[1, 2]], [[5, 6, 7]])[0].mean().item() > before + 0.01


def test_a_model_that_answers_nothing_brief_is_refused(qwen_tokenizer, tmp_path, monkeypatch, command):
    shutil.copytree(qwen_tokenizer, tmp_path / "model")
    torch.manual_seed(0)
    narrow(vocab_size=151936, hidden_size=16).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(brief, "CHATS", 2)
    status, _, err = command(brief.main, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert status == 2 and "no answer ends and has a box" in err
