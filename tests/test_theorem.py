"""What theorem.py promises: the change of entropy of a model's states, measured and predicted, without touching the run."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from matplotlib.image import imread

import data
from lab import page
import plot
from lab import theorem
import train
from covariance import token_covariance
from rollout import TINY, load_policy

PROBE = {
    "rows": [[[3, 1, 4], [1, 5, 9, 2]], [[6], [5, 3, 5]], [[8, 9, 7, 9, 3], [2]]],
    "states": [[0, 0], [0, 3], [1, 1], [1, 2], [2, 0]],
}


@pytest.fixture
def model(narrow):
    return narrow(dtype=torch.float64)


def direct(model):
    """The logits before each of the probe's tokens, each row read by itself."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([p + c])).logits[0, len(p) + t - 1] for (p, c), t in ((PROBE["rows"][i], t) for i, t in PROBE["states"])])


# ---------------------------------------------------------------- logits and changes


@pytest.mark.parametrize("tokens", [1, 8, 1000])
def test_the_logits_are_those_that_predict_the_token_however_the_rows_are_batched(model, tokens):
    torch.testing.assert_close(theorem.probe_logits(model, PROBE, tokens), direct(model), rtol=1e-9, atol=1e-9)


def test_changes_are_measured_and_predicted_state_by_state_in_float64_whatever_the_chunks(monkeypatch):
    z = 2 * torch.randn(7, 9)
    dz = 0.01 * torch.randn(7, 9)
    whole = theorem.changes(z, z + dz)
    p, q = (torch.softmax(x.double(), -1) for x in (z, z + dz))
    H = lambda p: -(p * p.log()).sum(-1)
    change = (z + dz).double() - z.double()
    centred = change - (p * change).sum(-1, keepdim=True)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole[0], H(q) - H(p), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole[1], -(p * (p.log() + H(p)[:, None]) * centred).sum(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole[2], (p * centred**2).sum(-1).sqrt(), rtol=1e-9, atol=1e-12)
    for numbers in (1, 16 * 9 * 2, 16 * 9 * 3):  # a chunk of 1, 2, 3 states
        monkeypatch.setattr(theorem, "LOGITS_AT_ONCE", numbers)
        torch.testing.assert_close(theorem.changes(z, z + dz), whole, rtol=1e-12, atol=1e-15)


def test_r2_is_that_of_the_prediction_itself_and_the_slope_that_of_the_fitted_line():
    predicted, moved = torch.tensor([-0.3, 0.1, 0.2, 0.5]).double(), torch.tensor([3.0, 4.0, 0.0, 0.0]).double()
    assert theorem.agreement(predicted, predicted, moved) == {"r2": 1.0, "slope": 1.0, "moved": 2.5}
    twice = theorem.agreement(2 * predicted, predicted, moved)
    assert twice["slope"] == pytest.approx(2) and twice["r2"] < 0.8  # a line would fit exactly; the prediction does not
    assert theorem.agreement(-predicted, predicted, moved)["r2"] < 0
    nothing = torch.zeros(4).double()
    assert theorem.agreement(nothing, nothing, nothing) == {"r2": None, "slope": None, "moved": 0.0}
    assert theorem.agreement(predicted * torch.nan, predicted, moved)["r2"] is None


def test_the_theorem_holds_for_a_small_move_of_all_parameters_and_breaks_for_a_great_one(model):
    before, start = theorem.probe_logits(model, PROBE), [p.detach().clone() for p in model.parameters()]
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype) for i, p in enumerate(start)]
    found = {}
    for size in (1e-5, 1.0):
        with torch.no_grad():
            for p, q, d in zip(model.parameters(), start, direction):
                p.copy_(q + size * d)
        found[size] = theorem.agreement(*theorem.changes(before, theorem.probe_logits(model, PROBE)))
        with torch.no_grad():
            for p, q in zip(model.parameters(), start):
                p.copy_(q)
    assert found[1e-5]["r2"] > 0.9999 and found[1e-5]["slope"] == pytest.approx(1, abs=1e-2) and found[1e-5]["moved"] < 1e-2
    assert found[1.0]["r2"] < 0.5 and found[1.0]["moved"] > 1


# ---------------------------------------------------------------- difficulty


def test_covariance_by_difficulty_is_the_token_mean_over_the_groups_with_so_many_right():
    rewards = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])  # 1, 2, 0, 1 of 3
    g = torch.Generator().manual_seed(0)
    updates, want = [], {k: [] for k in range(4)}
    for n in range(4):  # two mini-batches of two groups, gone through twice
        mask = torch.arange(5) < torch.randint(1, 6, (6, 1), generator=g)
        logp, advantages = torch.randn(2, 6, 5, generator=g)
        updates.append(SimpleNamespace(mask=mask, covariance=token_covariance(logp, advantages, mask)))
        for row in range(6):
            k = int(rewards[(n % 2) * 2 + row // 3].sum())
            want[k] += updates[-1].covariance[row][mask[row]].tolist()
    found = theorem.by_difficulty(updates, rewards)
    assert found["tokens"] == [len(want[k]) for k in range(4)] and found["tokens"][3] == 0
    assert found["covariance"][3] is None
    assert found["covariance"][:3] == pytest.approx([sum(want[k]) / len(want[k]) for k in range(3)], rel=1e-4)


# ---------------------------------------------------------------- the probe batch


def embedded(**o):
    model, tokenizer, eos_ids = load_policy(TINY)
    policy = SimpleNamespace(model=model, sampler=model, tokenizer=tokenizer, eos_ids=eos_ids)
    return policy, SimpleNamespace(**{"seed": 0, "max_new_tokens": 12, "max_prompt_tokens": 80, "micro_batch": 999, "resume": False} | o)


def test_the_probe_follows_from_the_seed_and_leaves_the_global_random_state_alone():
    problems, state = data.load_problems("arithmetic_heldout", limit=6), torch.get_rng_state()
    policy, o = embedded()
    probe = theorem.draw_probe(policy, problems, o)
    assert torch.equal(torch.get_rng_state(), state)
    assert theorem.draw_probe(policy, problems, o) == probe != theorem.draw_probe(policy, problems, embedded(seed=1)[1])
    assert len(probe["rows"]) == 6 and all(t < len(probe["rows"][i][1]) for i, t in probe["states"])
    assert len(probe["states"]) == len({tuple(s) for s in probe["states"]}) == sum(len(c) for _, c in probe["rows"])


def test_the_states_are_as_many_as_the_memory_for_their_logits_allows(monkeypatch):
    monkeypatch.setattr(theorem, "LOGITS_AT_ONCE", 10 * 23 + 5)
    policy, o = embedded()
    probe = theorem.draw_probe(policy, data.load_problems("arithmetic_heldout", limit=6), o)
    assert len(probe["states"]) == (10 * 23 + 5) // policy.model.config.vocab_size
    assert theorem.probe_logits(policy.model, probe).numel() <= 10 * 23 + 5


def test_a_vocabulary_of_151936_stays_within_the_memory(qwen_checkpoint):
    model, tokenizer, eos_ids = load_policy(str(qwen_checkpoint))
    policy = SimpleNamespace(model=model, sampler=model, tokenizer=tokenizer, eos_ids=eos_ids)
    probe = theorem.draw_probe(policy, [(f"What is {i} + 1?", "2") for i in range(20)], embedded()[1])
    before = theorem.probe_logits(model, probe)
    assert before.shape == (220, 151936) and before.numel() <= theorem.LOGITS_AT_ONCE
    with torch.no_grad():
        model.lm_head.weight.mul_(1.001)
    assert theorem.agreement(*theorem.changes(before, theorem.probe_logits(model, probe)))["r2"] > 0.99


# ---------------------------------------------------------------- in a run

SHORT = "--prompts 8 --mini-batch 4 --samples 4 --eval-limit 8 --final-samples 2 --device cpu --lr 1e-3 --eval-every 1".split()


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(name, options...) trains the embedded policy in this process; returns the lines of metrics.jsonl without their seconds."""
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))
    monkeypatch.setattr(plot, "curves", lambda *_: None)

    def train_(name, *more):
        monkeypatch.setattr(sys, "argv", ["train.py", "--method", "grpo", *SHORT, "--out", str(tmp_path / name), *more])
        train.main()
        return metrics_of(tmp_path / name)

    return train_


def metrics_of(out):
    strict = lambda line: json.loads(line, parse_constant=lambda word: pytest.fail(word))
    return [{k: v for k, v in strict(line).items() if k != "seconds" and "accuracy" not in k} for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_checking_changes_nothing_of_the_run_and_a_resumed_run_goes_on_with_the_same_probe(run, tmp_path):
    plain = run("plain", "--steps", "4")
    checked = run("checked", "--steps", "4", "--check-theorem")
    assert [{k: v for k, v in line.items() if k not in ("theorem", "difficulty")} for line in checked] == plain
    for line in checked:
        t, d = line["theorem"], line["difficulty"]
        assert set(t) == {"r2", "slope", "moved", "step", "dH"} and set(t["step"]) == {"r2", "slope", "moved"}
        assert t["r2"] <= 1 and t["moved"] > 0 and sum(d["tokens"]) == line["tokens"] and len(d["covariance"]) == 5
        total = sum(n * (c or 0) for n, c in zip(d["tokens"], d["covariance"]))
        assert total / line["tokens"] == pytest.approx(line["covariance"], rel=1e-3, abs=1e-6)

    run("stopped", "--steps", "2", "--check-theorem")
    probe = (tmp_path / "stopped" / "probe.json").read_bytes()
    assert probe == (tmp_path / "checked" / "probe.json").read_bytes()
    assert run("stopped", "--steps", "4", "--check-theorem", "--resume") == checked
    assert (tmp_path / "stopped" / "probe.json").read_bytes() == probe
    assert not (tmp_path / "plain" / "probe.json").exists()

    config, steps = plot.read_run(tmp_path / "checked")  # what a run leaves is what the tables and the page take
    assert theorem.over_run(steps)["steps"] == 4
    html = page.write(tmp_path / "checked", config, steps).read_text()
    assert html.count("<article>") == 16 and html.count("Step 1<") == html.count("Step 4<") == 1


def test_a_step_without_signal_moves_nothing_and_has_no_r2(run, monkeypatch):
    monkeypatch.setattr(train.reward, "grade_all", lambda texts, answers: [0.0] * len(texts))
    (line,) = run("r", "--steps", "1", "--check-theorem")
    assert line["theorem"]["r2"] is None and line["theorem"]["slope"] is None and line["theorem"]["dH"] == 0


def test_two_processes_measure_what_one_does(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        command = [sys.executable, *launcher, ROOT / "train.py", "--method", "grpo", *SHORT, "--steps", "1", "--check-theorem",
                   "--out", tmp_path / name]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    one, two = (metrics_of(tmp_path / name)[0]["theorem"] for name in ("one", "two"))
    assert [two[k] for k in ("r2", "slope", "moved", "dH")] == pytest.approx([one[k] for k in ("r2", "slope", "moved", "dH")], rel=1e-3)


# ---------------------------------------------------------------- over a run, and the demonstration


def logged(n=6):
    theorem_of = lambda s: {"r2": 1 - s / 10, "slope": 0.9, "moved": 0.1 * s, "step": {"r2": 0.5, "slope": 0.8, "moved": 0.2}, "dH": -0.1 / s}
    lines = [{"step": s, "entropy": 1 / s, "covariance": 0.5 / s - 0.1, "theorem": theorem_of(s),
              "difficulty": {"tokens": [5, 10, 30, 0, 5], "covariance": [0.0, 0.1, 0.2 + s, None, 0.0]}} for s in range(1, n + 1)]  # fmt: skip
    empty = {"r2": None, "slope": None, "moved": 0.0}
    lines.append(lines[-1] | {"step": n + 1, "covariance": -0.2, "theorem": empty | {"step": empty, "dH": 0.0}})
    return lines


def test_over_a_run_spreads_correlation_signs_and_difficulty():
    f = theorem.over_run(logged())
    fall = [0.1 / s for s in range(1, 7)] + [0.0]
    covariance = [0.5 / s - 0.1 for s in range(1, 7)] + [-0.2]
    assert f["steps"] == 7 and f["update"]["r2"][1] == pytest.approx(0.65) and f["step"]["slope"] == pytest.approx([0.8] * 3)
    want = torch.corrcoef(torch.tensor([covariance, fall], dtype=torch.float64))[0, 1].item()
    assert f["correlation"] == pytest.approx(want)
    assert f["positive_covariance"] == pytest.approx(4 / 7) and f["sign_agreement"] == pytest.approx(5 / 7)  # 0.5/5 - 0.1 is 0
    assert f["difficulty"]["2/4"] == {"tokens": 210, "covariance": pytest.approx(sum([0.2 + s for s in range(1, 7)] + [6.2]) / 7)}
    assert f["difficulty"]["3/4"] == {"tokens": 0, "covariance": None}


@pytest.fixture
def made(tmp_path):
    def make(name, lines):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"method": "grpo", "seed": 0}')
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)

    return make


@pytest.mark.filterwarnings("error")
def test_the_command_prints_writes_and_draws(made, monkeypatch, capsys, tmp_path):
    runs = [made("a", logged()), made("b", logged(3))]
    for arguments, picture in ((runs[:1], tmp_path / "a" / "theorem.png"), ([*runs, "--out", str(tmp_path / "out")], tmp_path / "out" / "theorem.png")):
        monkeypatch.setattr(sys, "argv", ["theorem.py", *arguments])
        theorem.main()
        assert imread(picture).std() > 0.01
    out = capsys.readouterr().out
    assert "0.65 (0.5" in out and "57%" in out and "2/4" in out and "0/4" not in out
    assert json.loads((tmp_path / "b" / "theorem.json").read_text()) == theorem.over_run(logged(3))


def test_a_run_without_the_check_is_refused_in_one_line(made, monkeypatch, capsys):
    run = made("r", [{"step": 1, "entropy": 1.0, "covariance": 0.1}])
    monkeypatch.setattr(sys, "argv", ["theorem.py", run])
    with pytest.raises(SystemExit) as end:
        theorem.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and run in err and "--check-theorem" in err


def test_the_demonstration_finds_the_theorem_at_small_learning_rates_and_its_end_at_large_ones(capsys):
    theorem.demonstrate((1e-6, 1e-1))
    small, large = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:3] in ("1.0",)]
    assert float(small[4]) > 0.999 and abs(float(small[5]) - 1) < 0.01
    assert float(large[4]) < 0.5 and float(large[1]) > 1 > 1e-2 > float(small[1])
