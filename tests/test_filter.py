"""What --filter-groups promises: a batch of groups with signal, from other problems each round, in ten rounds at most, all of it counted."""

import pytest
import torch

import data
import losses
import train

EMPTY = {"covariance", "selected", "clip_fraction", "ratio_max", "loss", "grad_norm"}


@pytest.fixture
def run(tmp_path):
    """options(...) for small steps of the embedded policy."""
    small = "--prompts 4 --mini-batch 2 --samples 4 --max-new-tokens 8 --eval-limit 1 --device cpu"
    return lambda more="--method grpo": train.options([*small.split(), *more.split(), "--out", str(tmp_path / "run")])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    o = train.options(["--method", "grpo", "--eval-limit", "1", "--device", "cpu", "--out", str(tmp_path_factory.mktemp("none") / "run")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))
        return train.load(o)


@pytest.fixture
def policy(loaded):
    """The embedded policy, whose learning is undone; its position in the data starts at zero."""
    before = {k: v.clone() for k, v in loaded[0].model.state_dict().items()}
    loaded[0].rounds = 0
    yield loaded[0]
    loaded[0].model.load_state_dict(before)
    loaded[0].optimizer.state.clear()


@pytest.fixture
def graded(monkeypatch):
    """graded(list of booleans): the groups with signal, in the order of sampling. Returns the answers that were asked for, one a group."""
    asked = []

    def grade_all(signals):
        left = iter(signals)

        def grade(texts, answers):
            asked.extend(answers[::4])
            return [r for _ in answers[::4] for r in ([1.0, 0.0, 0.0, 0.0] if next(left) else [0.0] * 4)]

        monkeypatch.setattr(train.reward, "grade_all", grade)
        return asked

    return grade_all


def step(policy, problems, number, o):
    return train.step(policy, train.problems_of_step(problems, policy.rounds + 1, o), number, o)


@pytest.fixture
def updates(monkeypatch):
    """The mini-batches that are trained on."""
    kept, update = [], train.update
    monkeypatch.setattr(train, "update", lambda policy, batch, *rest: kept.append(batch) or update(policy, batch, *rest))
    return kept


def test_rounds_follow_until_the_batch_is_full_and_only_groups_with_signal_are_trained_on(run, loaded, policy, graded, updates, monkeypatch):
    released = []
    monkeypatch.setattr(train.rollout, "release", released.append)
    asked = graded([0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0])  # 1, 2 and 5 with signal after each round
    o = run("--method grpo --filter-groups")
    metrics, samples = step(policy, loaded[1], 1, o)
    assert metrics["rounds"] == 3 and metrics["filtered"] == 7 and metrics["no_signal"] == pytest.approx(7 / 12)
    assert released == [policy.sampler]  # once, after the last round: a GPU records its graphs anew after it
    assert len(asked) == 12 == len({tuple(ids) for ids, _ in train.problems_of_step(loaded[1], 1, o)[:12]})
    assert [len(batch["rewards"]) for batch in updates] == [8, 8]
    assert torch.cat([batch["rewards"] for batch in updates]).tolist() == [1, 0, 0, 0] * 4
    ids = [ids for ids, _ in train.problems_of_step(loaded[1], 1, o)]
    assert [b["prompts"][i] for b in updates for i in (0, 4)] == [ids[1], ids[4], ids[8], ids[9]]  # the fifth found no room
    assert metrics["reward"] == pytest.approx(5 / 48)  # over all rollouts
    assert samples[0]["prompt"] == policy.tokenizer.decode(ids[1])


def test_the_entropy_and_what_else_is_the_policys_is_over_all_rollouts_before_filtering(run, loaded, policy, graded):
    """The rollouts of three rounds, drawn again and scored by themselves."""
    signals = [0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]
    graded(signals)
    start = {k: v.clone() for k, v in policy.model.state_dict().items()}
    filtered, _ = step(policy, loaded[1], 1, run("--method grpo --filter-groups"))
    policy.model.load_state_dict(start)

    drawn, o = [], run("--method grpo")
    for r in range(3):  # each round's own random numbers
        ids = [ids for ids, _ in train.problems_of_step(loaded[1], r + 1, o)]
        drawn += [(ids[i // 4], c) for i, c in enumerate(train.draw_rollouts(policy, ids, f"1.{r}" if r else 1, o))]
    _, H = train.score(policy.model, {"prompts": [p for p, _ in drawn], "completions": [c for _, c in drawn]}, 1.0, o)
    tokens = sum(len(c) for _, c in drawn)
    assert filtered["tokens"] == tokens and filtered["completion_length"] == tokens / 48
    assert filtered["entropy"] == pytest.approx(H.sum().item() / tokens, rel=1e-5)
    trained_on = [i * 4 + s for i in range(12) if signals[i] for s in range(4)]
    assert abs(H[trained_on].sum().item() / sum(len(drawn[i][1]) for i in trained_on) - filtered["entropy"]) > 1e-4


def test_the_first_round_is_that_of_a_run_without_the_filter_and_a_full_one_changes_nothing(run, loaded, policy, graded):
    start = {k: v.clone() for k, v in policy.model.state_dict().items()}
    results = []
    for more in ("--method grpo", "--method grpo --filter-groups"):
        graded([1] * 4)
        policy.model.load_state_dict(start)
        policy.optimizer.state.clear()
        policy.rounds = 0
        metrics, samples = step(policy, loaded[1], 1, run(more))
        results.append(({k: v for k, v in metrics.items() if k != "seconds"}, samples))
    assert results[1][0] == results[0][0] | {"rounds": 1, "filtered": 0} and results[0][1] == results[1][1]


def test_after_ten_rounds_the_batch_is_what_was_found_and_nothing_at_all_leaves_the_policy_alone(run, loaded, policy, graded, updates):
    o = run("--method kl_ref --filter-groups")
    policy.reference = policy.model
    try:
        graded([i in (3, 20, 39) for i in range(40)])
        metrics, _ = step(policy, loaded[1], 1, o)
        assert metrics["rounds"] == train.ROUNDS == 10 and metrics["filtered"] == 37
        assert [len(batch["rewards"]) for batch in updates] == [8, 4]  # three groups: the last mini-batch is smaller
        before = [p.detach().clone() for p in policy.model.parameters()]
        graded([0] * 40)
        metrics, samples = step(policy, loaded[1], 2, o)
    finally:
        policy.reference = None
    assert {key for key, value in metrics.items() if value is None} == EMPTY and samples == []
    assert metrics["filtered"] == 40 and metrics["entropy"] > 0 and metrics["reward"] == 0 and metrics["skipped"] == 0
    assert len(updates) == 2 and all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters()))


def test_no_problem_comes_twice_in_an_epoch_however_many_rounds_the_steps_take(run, loaded, policy, graded):
    o = run("--method grpo --filter-groups")
    problems = [(ids, str(i)) for i, (ids, _) in enumerate(loaded[1][:60])]
    asked = graded([1] * 4 + [0] * 8 + [1] * 4 + [0, 1, 0, 1, 0, 1, 0, 1] + [1] * 36)  # 1, 3, 2, 1, 1, ... rounds
    rounds = [step(policy, problems, number, o)[0]["rounds"] for number in range(1, 9)]
    assert rounds == [1, 3, 2, 1, 1, 1, 1, 1] and policy.rounds == 11
    assert len(asked) == 44 == len(set(asked))
    stream = [answer for n in range(1, 12) for _, answer in train.problems_of_step(problems, n, run())]
    assert asked == stream  # the order of a run without the filter


def test_every_round_has_random_numbers_of_its_own(run, loaded, policy, graded, monkeypatch):
    seen, draw = [], train.generator
    monkeypatch.setattr(train, "generator", lambda o, step, purpose: seen.append((str(step), purpose)) or draw(o, step, purpose))
    graded([0] * 8 + [1] * 4)
    step(policy, loaded[1], 7, run("--method grpo --filter-groups"))
    assert [key for key, purpose in seen if purpose == "sample"] == ["7", "7.1", "7.2"]


def test_advantages_are_those_of_the_kept_groups(run, loaded, policy, graded, updates):
    graded([0, 1, 1, 0, 1, 1, 0, 0])
    step(policy, loaded[1], 1, run("--method grpo --advantage rloo --filter-groups"))
    want = losses.group_advantages(torch.tensor([[1.0, 0, 0, 0]]), "rloo")[0].tolist()
    for batch in updates:
        assert batch["advantages"][:, 0].tolist() == want * 2


@pytest.mark.parametrize("at_once", [1, 8, 12])
def test_sampling_a_few_at_a_time_draws_the_same(run, loaded, policy, at_once):
    ids = [ids for ids, _ in loaded[1][:5]]
    assert train.draw_rollouts(policy, ids, 1, run(f"--method grpo --sample-batch {at_once}")) == train.draw_rollouts(policy, ids, 1, run())
