"""What lab/theorem.py promises: the entropy change of a model's states, measured and predicted."""

import json

import pytest
import torch

import data
import train
from lab import theorem
from options import options

PROBE = [([3, 1, 4], [1, 5, 9, 2], [0, 3]), ([6], [5, 3, 5], [1, 2]), ([8, 9, 7, 9, 3], [2], [0])]
SMALL = "--method kl_cov --prompts 8 --mini-batch 4 --samples 4 --eval-limit 8 --device cpu --lr 1e-3".split()


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """A function that gives policy, problems, probe and options of a small run of the embedded policy."""
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))

    def load(*more):
        o = options([*SMALL, *more, "--out", str(tmp_path / "unused")])
        policy, problems, held_out = train.load(o)
        return policy, problems, theorem.draw_probe(policy, held_out, o), o

    return load


# ---------------------------------------------------------------- the probe


def test_the_logits_are_those_that_predict_the_token_at_each_position(model):
    with torch.no_grad():
        expected = []
        for prompt, completion, positions in PROBE:
            logits = model(torch.tensor([prompt + completion])).logits[0]
            expected += [logits[len(prompt) + t - 1] for t in positions]
    torch.testing.assert_close(theorem.probe_logits(model, PROBE), torch.stack(expected))


def test_the_probe_follows_from_the_seed_and_leaves_the_global_random_state_alone(loaded):
    state = torch.get_rng_state()
    probe = loaded()[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded()[2] == probe != loaded("--seed", "1")[2]
    assert len(probe) == 8
    assert all(max(positions) < len(completion) for _, completion, positions in probe)


# ---------------------------------------------------------------- measured and predicted


def test_changes_are_those_of_the_definitions_state_by_state():
    z, dz = 2 * torch.randn(130, 9), 0.01 * torch.randn(130, 9)
    p, q = (torch.softmax(x.double(), -1) for x in (z, z + dz))
    change = (z + dz).double() - z.double()
    centred = change - (p * change).sum(-1, keepdim=True)
    H = -(p * p.log()).sum(-1)
    measured, predicted, moved = theorem.changes(z, z + dz)
    torch.testing.assert_close(measured, -(q * q.log()).sum(-1) - H)
    torch.testing.assert_close(predicted, -(p * (p.log() + H[:, None]) * centred).sum(-1))
    torch.testing.assert_close(moved, (p * centred**2).sum(-1).sqrt())


def test_r2_is_that_of_the_prediction_itself_and_the_slope_that_of_the_fitted_line():
    predicted, moved = torch.tensor([[-0.3, 0.1, 0.2, 0.5], [3.0, 4.0, 0.0, 0.0]]).double()
    exact = theorem.figures(torch.stack((predicted, predicted, moved)), 2)
    assert (exact["r2"], exact["slope"], exact["moved"]) == (1.0, 1.0, 2.5) and len(exact["points"]) == 2
    twice = theorem.figures(torch.stack((2 * predicted, predicted, moved)), 2)
    assert twice["slope"] == pytest.approx(2) and twice["r2"] < 0.8
    nothing = theorem.figures(torch.zeros(3, 4).double(), 2)
    assert nothing["r2"] is None and nothing["slope"] is None and nothing["moved"] == 0


# ---------------------------------------------------------------- beside train.py


def test_following_changes_nothing_of_the_training(loaded):
    policy, problems, probe, o = loaded()
    lines = list(theorem.over_steps(policy, problems, probe, 2, o))
    alone, problems, _, o = loaded()
    for number in (1, 2):
        metrics, _ = train.step(alone, train.problems_of_step(problems, number - 1, o), number, o)
        assert lines[number - 1]["covariance"] == metrics["covariance"]
    for p, q in zip(policy.model.parameters(), alone.model.parameters()):
        assert torch.equal(p, q)
    for line in lines:
        assert line["r2"] < 1 and line["moved"] > 0 and line["whole step"]["moved"] > line["moved"]


def test_a_step_without_signal_has_no_line(loaded, monkeypatch):
    policy, problems, probe, o = loaded()
    monkeypatch.setattr(train.reward, "grade_all", lambda texts, answers: [0.0] * len(texts))
    assert list(theorem.over_steps(policy, problems, probe, 1, o)) == []


def test_scaling_the_first_update_equals_training_with_that_learning_rate(loaded):
    policy, problems, probe, o = loaded("--method", "grpo", "--mini-batch", "8", "--lr", "1e-2")
    lines = list(theorem.at_rates(policy, problems, probe, [1e-3], o))
    trained, problems, probe, o = loaded("--method", "grpo", "--mini-batch", "8", "--lr", "1e-3")
    before = theorem.probe_logits(trained.model, probe)
    train.step(trained, train.problems_of_step(problems, 0, o), 1, o)
    change = theorem.changes(before, theorem.probe_logits(trained.model, probe))
    assert lines[0]["dH"] == pytest.approx(change[0].mean().item(), rel=1e-3)
    assert lines[0]["moved"] == pytest.approx(theorem.figures(change, 1)["moved"], rel=1e-3)


def test_the_theorem_holds_at_a_small_learning_rate_and_breaks_at_a_large_one(tmp_path, command):
    status, said, err = command(theorem.main, "--rates", "1e-5", "1e-1", "--out", tmp_path, "--", *SMALL)
    assert status == 0, err
    small, large = map(json.loads, (tmp_path / "data" / "theorem.jsonl").read_text().splitlines())
    assert small["r2"] > 0.999 and small["slope"] == pytest.approx(1, abs=0.01) and small["moved"] < 0.01
    assert large["r2"] < 0.5 and large["moved"] > 1
    assert "| 1e-05 |" in said and (tmp_path / "theorem.png").stat().st_size > 10_000


def test_following_a_run_writes_a_line_for_each_step_a_table_and_a_picture(tmp_path, command):
    status, _, err = command(theorem.main, "--follow", 3, "--out", tmp_path, "--", *SMALL)
    assert status == 0, err
    text = (tmp_path / "data" / "theorem_steps.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "| kl_cov, seed 0 |" in (tmp_path / "theorem_steps.md").read_text()
    assert (tmp_path / "theorem_steps.png").stat().st_size > 10_000


def test_a_model_that_does_not_load_is_one_line_and_status_2(tmp_path, command):
    status, _, err = command(theorem.main, "--out", tmp_path / "out", "--", *SMALL, "--model", tmp_path)
    assert status == 2 and "lab.theorem: error: --model" in err.splitlines()[-1]
