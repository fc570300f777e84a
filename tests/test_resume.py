"""--resume: a run that was killed at any moment goes on as if it had not been; what does not fit is refused.

The runs are real processes, forked from this one, so that torch need not be imported again. They are stopped
at chosen moments of their work with files: Python announces each opening, renaming and removal (audit
events), and at the n-th below the run directory the process sends itself a signal.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import metrics, subprocess_of

import checkpoint
import data
import options
import parallel
import train
from data import UserError
from rollout import TINY, load_policy

SHORT = (
    "--steps 4 --save-every 1 --eval-every 2 --prompts 4 --mini-batch 2 --samples 4 --eval-limit 4 --seed 5 "
    "--final-samples 2 --device cpu --lr 1e-3 --cov-low 0.05 --clip-cov-ratio 0.1 --kl-cov-ratio 0.1 "
    "--kl-cov-low 0"
).split()
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Few problems, no picture at the end; what is imported late is imported here, once for all forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))
        patch.setattr(train, "subprocess", SimpleNamespace(run=lambda *_, **__: None, DEVNULL=None))
        load_policy(TINY)
        yield


def run(out, *argv, at=(), send=signal.SIGKILL, file_size=None):
    """train.py in a process of its own: (exit status, or minus its signal; what it said; number of events).

    at: the events at which it sends itself the signal. file_size: bytes that no file can exceed.
    """
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        seen, status = [], 99

        def watch(event, details):
            if event in FILE_EVENTS and str(details[0]).startswith(str(out)):
                seen.append(event)
                if len(seen) in at:
                    os.kill(os.getpid(), send)

        try:
            os.dup2(writer, 1), os.dup2(writer, 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
            sys.addaudithook(watch)
            if file_size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            sys.argv = ["train.py", *SHORT, *map(str, argv), "--out", str(out)]
            train.main()
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            print(f"events {len(seen)}")
            os._exit(status)
    os.close(writer)
    with open(reader, errors="replace") as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said, _, events = said.rpartition("events ") if "events " in said else (said, "", "0")
    return status, said, int(events)


def tree(folder):
    """Every file below a folder with its content."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same(one, other):
    """Fails unless two runs ended alike, to the byte."""
    assert metrics(one) == metrics(other)
    for file in ("samples.jsonl", "final.json", "model/model.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    kept = sorted(path.name for path in (other / "checkpoint").iterdir())
    assert kept == ["step-3", "step-4"] and not list(other.glob("*.new"))
    states = [torch.load(folder / "checkpoint/step-4/state.pt", weights_only=True) for folder in (one, other)]
    mine, theirs = (state["optimizer"]["state"] for state in states)
    assert mine.keys() == theirs.keys() and mine
    assert all(torch.equal(mine[i][name], theirs[i][name]) for i in mine for name in mine[i])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(method): a run that was never interrupted, and its number of events."""
    made = {}

    def of(method):
        if method not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            status, said, events = run(out, "--method", *method.split())
            assert status == 0, said
            made[method] = out, events
        return made[method]

    return of


def resumed(out, method="grpo"):
    """The run taken to its end, with --resume if it has left something. Returns what it said."""
    again = ["--resume"] if (out / "metrics.jsonl").exists() else []
    status, said, _ = run(out, "--method", *method.split(), *again)
    assert status == 0, said
    return said


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize("method", [
    "kl_cov", "clip_cov --anneal 3", "adaptive_entropy --entropy-target 9", "kl_ref --passes 2",
    "grpo --advantage prime", "grpo --filter-groups",
])  # fmt: skip
def test_a_run_that_is_killed_again_and_again_goes_on_as_if_it_had_not_been(whole, tmp_path, method):
    reference, events = whole(method)
    out = tmp_path / "run"
    argv = "--method", *method.split()
    assert run(out, *argv, at=[events // 3])[0] == -signal.SIGKILL
    for moment in (3, events // 3):
        assert run(out, *argv, "--resume", at=[moment])[0] == -signal.SIGKILL
    resumed(out, method)
    same(reference, out)


@pytest.mark.slow
def test_killed_at_any_moment_of_its_writing_a_run_goes_on_as_if_it_had_not_been(whole, tmp_path):
    reference, events = whole("kl_cov")
    for moment in range(1, events + 1):
        out = tmp_path / str(moment)
        status, said, _ = run(out, "--method", "kl_cov", at=[moment])
        assert status == -signal.SIGKILL, said
        resumed(out, "kl_cov")
        same(reference, out)


def test_a_line_that_was_cut_off_is_done_again(whole, tmp_path):
    """The kill came when step 4 was half in the logs and not yet in a checkpoint."""
    out = copy(whole("grpo")[0], tmp_path)
    shutil.rmtree(out / "checkpoint" / "step-4")
    for name in ("metrics.jsonl", "samples.jsonl"):
        os.truncate(out / name, (out / name).stat().st_size - 10)
    resumed(out)
    assert metrics(out) == metrics(whole("grpo")[0])
    assert (out / "samples.jsonl").read_bytes() == (whole("grpo")[0] / "samples.jsonl").read_bytes()


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize("moments, send, expected", [
    ([8], signal.SIGTERM, 143),
    ([8, 9], signal.SIGINT, 130),  # twice: torchrun passes on what a terminal sends to all
])  # fmt: skip
def test_asked_to_stop_a_run_finishes_the_step_saves_and_says_how_to_go_on(
    whole, tmp_path, moments, send, expected
):
    out = tmp_path / "run"
    status, said, _ = run(out, "--method", "grpo", "--save-every", "99", at=moments, send=send)
    assert status == expected and "Traceback" not in said, said
    done = len(metrics(out))
    assert 0 < done < 4 and [path.name for path in (out / "checkpoint").iterdir()] == [f"step-{done}"]
    assert f"stopped by {send.name} after step {done}" in said and "--resume" in said.splitlines()[-1]
    assert said.count("stopping after this step") == 1
    resumed(out)
    same(whole("grpo")[0], out)


@pytest.mark.parametrize("send, expected", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_asked_a_second_time_it_stops_at_once(whole, tmp_path, monkeypatch, send, expected):
    monkeypatch.setattr(parallel, "ECHO", 0.0)  # seconds within which a second signal is taken for the first
    out, moment = tmp_path / "run", whole("grpo")[1] // 2
    status, said, _ = run(out, "--method", "grpo", at=[moment, moment + 1], send=send)
    assert status == expected and "Traceback" not in said, said
    assert ("stopped at once" in said) == (send == signal.SIGINT)
    resumed(out)
    same(whole("grpo")[0], out)


# ---------------------------------------------------------------- damaged


def copy(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "run"))


def flip(path):
    """One bit in the middle of a file is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file, harm", [
    ("model.safetensors", flip),
    ("state.pt", lambda path: os.truncate(path, 1000)),
    ("tokenizer.json", lambda path: path.unlink()),
    ("sums.json", lambda path: path.unlink()),
    ("state.pt", lambda path: (path.parent / "sums.json").write_text("{}")),
])  # fmt: skip
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(whole, tmp_path, file, harm):
    out = copy(whole("grpo")[0], tmp_path)
    harm(out / "checkpoint" / "step-4" / file)
    said = resumed(out)
    assert said.count("is damaged") == 1 and f"{out}/checkpoint/step-4 is damaged" in said and file in said
    same(whole("grpo")[0], out)


def refused(result, *words):
    """Exit status 2, and one line of error, with these words."""
    status, said, _ = result
    errors = [line for line in said.splitlines() if "error:" in line]
    assert status == 2 and "Traceback" not in said and len(errors) == 1, said
    assert all(word in errors[0] for word in words), said


class Code:
    """Unpickled, it would write a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def forge(state):
    """Puts another state into a run's last checkpoint, checksums and all."""

    def harm(out):
        folder = out / "checkpoint" / "step-4"
        torch.save(state, folder / "state.pt")
        sums = json.loads((folder / "sums.json").read_text())
        sums["state.pt"] = checkpoint.checksum(folder / "state.pt")
        (folder / "sums.json").write_text(json.dumps(sums))

    return harm


def both(out):
    for path in (out / "checkpoint").iterdir():
        flip(path / "state.pt")


def first_line_gone(out):
    lines = (out / "metrics.jsonl").read_text().splitlines(True)
    (out / "metrics.jsonl").write_text("".join(lines[1:]))


@pytest.mark.parametrize("harm, word", [
    (both, "no checkpoint"),
    (first_line_gone, "metrics.jsonl lacks steps"),
    (lambda out: (out / "metrics.jsonl").write_text(""), "metrics.jsonl lacks steps"),
    (lambda out: (out / "config.json").write_text("{"), "config.json"),
    (lambda out: (out / "config.json").unlink(), "no config.json"),
    (forge({"step": 4}), "step-4 does not fit"),
    (forge({"optimizer": Code()}), "step-4 does not fit"),
])  # fmt: skip
def test_what_cannot_be_gone_on_with_is_refused_and_left_as_it_was(whole, tmp_path, monkeypatch, harm, word):
    out = copy(whole("grpo")[0], tmp_path)
    harm(out)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    refused(run(out, "--method", "grpo", "--resume"), word)
    assert tree(tmp_path) == before


def test_a_run_that_another_process_is_at_work_on_is_left_alone(whole, tmp_path):
    out = copy(whole("grpo")[0], tmp_path)
    before = tree(out)
    with checkpoint.lock(out):
        for more in ("--resume", "--overwrite"):
            refused(run(out, "--method", "grpo", more), "--out: another process is at work")
        assert tree(out) == before
    resumed(out)


def test_a_run_that_another_process_has_made_since_this_one_began_is_not_replaced(whole, tmp_path):
    """Both found no run in --out when they began; the quicker one had it to itself."""
    out = copy(whole("grpo")[0], tmp_path)
    before, config = tree(out), json.loads((out / "config.json").read_text()) | {"out": str(out)}
    with pytest.raises(UserError, match="now holds a run"):
        checkpoint.begin(config)
    assert tree(out) == before


# ---------------------------------------------------------------- other options, other prompts


def test_options_that_would_change_the_run_are_refused_by_name_and_the_others_are_not(whole):
    out = whole("grpo")[0]
    argv = ["--method", "grpo", *SHORT, "--resume", "--out", str(out)]
    for name, value in vars(options.options(argv)).items():
        o = options.options(argv)
        if value is None or isinstance(value, str):
            setattr(o, name, "other")
        else:
            setattr(o, name, not value if isinstance(value, bool) else value + 1)
        if name in checkpoint.FREE:
            checkpoint.refuse_changes(out, o)
        else:
            with pytest.raises(UserError, match="--" + name.replace("_", "-")):
                checkpoint.refuse_changes(out, o)


def test_a_refused_change_is_one_line_and_changes_nothing(whole, tmp_path, monkeypatch):
    out = copy(whole("grpo")[0], tmp_path)
    before = tree(out)
    result = run(out, "--method", "grpo", "--lr", "1e-5", "--samples", "2", "--resume")
    refused(result, "--lr 0.001, not 1e-05", "--samples 4, not 2")
    refused(run(out, "--method", "grpo", "--steps", "3", "--resume"), "--steps 4")
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 63))  # as if a file had been edited
    refused(run(out, "--method", "grpo", "--steps", "5", "--resume"), "the prompts of --data are not those")
    assert tree(out) == before


def test_a_chat_template_that_makes_other_prompts_of_the_same_problems_is_refused(tmp_path):
    """One that tells the time, as that of some models does: a run would go on with other prompts, unseen."""
    model, out = shutil.copytree(TINY, tmp_path / "model"), tmp_path / "run"
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%f') }}" + template.read_text())
    argv = "--method", "grpo", "--model", model
    status, said, _ = run(out, *argv, "--steps", 1)
    assert status == 0, said
    before = tree(out)
    refused(run(out, *argv, "--steps", 2, "--resume"), "the prompts of --data are not those")
    assert tree(out) == before


def test_steps_may_grow_and_a_finished_run_goes_on_as_a_longer_one(whole, tmp_path, monkeypatch):
    out = copy(whole("grpo")[0], tmp_path)
    (out / "checkpoint" / "step-4-best").mkdir()  # is the user's
    monkeypatch.setenv("PATH", "")  # no git
    assert run(out, "--method", "grpo", "--steps", 6, "--resume", "--save-every", 3)[0] == 0
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 6 and config["save_every"] == 3 and config["commit"] is None
    assert (out / "checkpoint" / "step-4-best").is_dir()
    assert metrics(out)[:4] == metrics(whole("grpo")[0])
    assert metrics(out)[4:] == metrics(whole("grpo --steps 6")[0])[4:]


# ---------------------------------------------------------------- no room


@pytest.mark.parametrize("steps, room, word", [
    (6, 1000, "step-5.new"),  # bytes more than the weights take: the optimizer's state cannot be written
    (6, -1000, "step-5.new"),  # less: the weights themselves
    (4, -1000, "run/model: "),  # all steps are done, the final policy is to be written
])  # fmt: skip
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(whole, tmp_path, steps, room, word):
    out = copy(whole("grpo")[0], tmp_path)
    shutil.rmtree(out / "model")
    size = (out / "checkpoint/step-4/model.safetensors").stat().st_size
    argv = "--method", "grpo", "--steps", steps, "--resume"
    status, said, _ = run(out, *argv, file_size=size + room)
    assert status == 1 and "Traceback" not in said and said.count("train.py: error:") == 1, said
    assert word in said and "MiB were free" in said and "--resume" in said
    assert checkpoint.damage(out / "checkpoint/step-4") is None
    assert not list((out / "checkpoint").glob("*.new")) and not (out / "model").exists()
    assert run(out, *argv)[0] == 0 and len(metrics(out)) == steps


# ---------------------------------------------------------------- two processes

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_and_go_on(tmp_path, monkeypatch):
    """The signal goes to torchrun after the first step, and torchrun passes it on."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    argv = ["--method", "kl_cov", *SHORT, "--steps", "12", "--save-every", "99"]
    command = [sys.executable, *TORCHRUN, train.__file__, *argv, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=300)
    done = len(metrics(out))
    assert done < 12 and [path.name for path in (out / "checkpoint").iterdir()] == [f"step-{done}"], errors
    assert said.count(f"stopped by SIGTERM after step {done}") == 1 and "train.py: error" not in errors
    assert subprocess_of(*argv, "--resume", "--out", out, launcher=TORCHRUN).returncode == 0
    assert subprocess_of(*argv, "--out", tmp_path / "whole", launcher=TORCHRUN).returncode == 0
    assert metrics(out) == metrics(tmp_path / "whole")
