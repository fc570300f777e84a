"""What --resume promises: a run killed at any moment goes on as if it had not been, and whatever cannot be gone on with is refused.

The runs are real processes, forked from this one, so that torch need not be imported again. `at` stops them at a chosen moment of their
work with files: Python announces every opening, renaming and removal (audit events), and at the n-th below the run directory the
process sends itself a signal.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import subprocess_of

import checkpoint
import data
import losses
import options
import plot
import train
from rollout import TINY, load_policy
from data import UserError

SHORT = ("--steps 4 --save-every 1 --eval-every 2 --prompts 4 --mini-batch 2 --samples 4 --eval-limit 4 --final-samples 2 --seed 5"
         " --device cpu --lr 1e-3 --cov-low 0.05 --clip-cov-ratio 0.1 --kl-cov-ratio 0.1").split()  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The embedded task with few problems, and no picture at the end."""
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))
    monkeypatch.setattr(plot, "curves", lambda *_: None)


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory):
    """What is imported when first needed is imported here, once for all forks."""
    load_policy(TINY)[0].save_pretrained(tmp_path_factory.mktemp("warm"))


def run(out, *argv, at=None, send=signal.SIGKILL, file_size=None):
    """train.py in a process of its own: (exit status or minus its signal, what it said, how many events there were)."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        status = 99
        try:
            os.dup2(writer, 1), os.dup2(writer, 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
            seen = []

            def watch(event, details):
                if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate") and str(details[0]).startswith(str(out)):
                    seen.append(event)
                    if len(seen) == at:
                        os.kill(os.getpid(), send)

            sys.addaudithook(watch)
            if file_size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            sys.argv = ["train.py", *SHORT, *map(str, argv), "--out", str(out)]
            train.main()
            status = 0
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
    return status, said, int(said.rsplit("events ", 1)[1]) if "events " in said else None


def metrics(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one, other):
    """Fails unless two runs ended alike."""
    assert metrics(one) == metrics(other)
    for file in ("samples.jsonl", "final.json", "model/model.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    kept = sorted(path.name for path in (other / "checkpoint").iterdir())
    assert kept == ["step-3", "step-4"] and not list(other.glob("*.new"))
    mine, theirs = (torch.load(folder / "checkpoint/step-4/state.pt", weights_only=True)["optimizer"]["state"] for folder in (one, other))
    assert mine.keys() == theirs.keys() and mine
    for i in mine:
        assert mine[i].keys() == theirs[i].keys() and all(torch.equal(mine[i][name], theirs[i][name]) for name in mine[i])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each method a run that was never interrupted, and its number of events; made when first asked for."""
    made = {}

    def of(method):
        if method not in made:
            out = tmp_path_factory.mktemp(method.replace(" ", "")) / "run"
            status, said, events = run(out, "--method", *method.split())
            assert status == 0, said
            made[method] = out, events
        return made[method]

    return of


def resumed(out, method):
    """The run taken to its end: with --resume if it has left a run, else anew."""
    status, said, _ = run(out, "--method", *method.split(), *(["--resume"] if (out / "metrics.jsonl").exists() else []))
    assert status == 0, said
    return said


# ---------------------------------------------------------------- killed


def killed_and_resumed(whole, tmp_path, method, moments):
    reference, events = whole(method)
    for i in moments(events):
        out = tmp_path / str(i)
        status, said, _ = run(out, "--method", *method.split(), at=i)
        assert status == -signal.SIGKILL, said
        resumed(out, method)
        same(reference, out)


@pytest.mark.parametrize("method", [*losses.METHODS, "grpo --advantage prime", "kl_cov --filter-groups"])
def test_killed_at_moments_of_its_writing_a_run_goes_on_as_if_it_had_not_been(whole, tmp_path, method):
    killed_and_resumed(whole, tmp_path, method, lambda n: [n // 3, 4 * n // 5])


@pytest.mark.slow
def test_killed_at_every_moment_of_its_writing_a_run_goes_on_as_if_it_had_not_been(whole, tmp_path):
    killed_and_resumed(whole, tmp_path, "kl_cov", lambda n: range(1, n + 1))


def test_killed_again_while_it_goes_on(whole, tmp_path):
    reference, events = whole("kl_cov")
    out = tmp_path / "run"
    assert run(out, "--method", "kl_cov", at=events // 2)[0] == -signal.SIGKILL
    for i in (3, 30):
        assert run(out, "--method", "kl_cov", "--resume", at=i)[0] == -signal.SIGKILL
    resumed(out, "kl_cov")
    same(reference, out)


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize("send", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_a_run_finishes_the_step_saves_and_says_how_to_go_on(whole, tmp_path, send):
    reference, events = whole("grpo")
    out = tmp_path / "run"
    status, said, _ = run(out, "--method", "grpo", "--save-every", 99, at=8, send=send)  # a moment of the first step: the logs are open
    assert status == 128 + send and "Traceback" not in said, said
    steps = [line["step"] for line in metrics(out)]
    assert steps and len(steps) < 4 and [path.name for path in (out / "checkpoint").iterdir()] == [f"step-{steps[-1]}"]
    assert f"stopped by {send.name} after step {steps[-1]}" in said and "--resume" in said.splitlines()[-2]
    resumed(out, "grpo")
    assert metrics(out) == metrics(reference)


def test_max_hours_stop_and_go_on_likewise(whole, tmp_path):
    out = tmp_path / "run"
    status, said, _ = run(out, "--method", "grpo", "--max-hours", 1e-9)
    assert status == 0 and "stopped by --max-hours 1e-09 after step 1" in said and len(metrics(out)) == 1
    resumed(out, "grpo")
    same(whole("grpo")[0], out)


def test_a_run_whose_entropy_is_spent_is_over(whole, tmp_path):
    reference, out = whole("grpo")[0], tmp_path / "run"
    H = [line["entropy"] for line in metrics(reference)]
    argv = ["--method", "grpo", "--stop-when-entropy", max(H[1:]) + 1e-9 if H[0] > max(H[1:]) else max(H) + 1e-9]
    for more in ([], ["--resume"]):  # resumed, it is still over
        status, said, _ = run(out, *argv, *more)
        assert status == 0 and "below --stop-when-entropy" in said and (out / "final.json").exists()
        assert metrics(out)[-1]["entropy"] < argv[-1] and [m["entropy"] < argv[-1] for m in metrics(out)].count(True) == 1


# ---------------------------------------------------------------- damaged


def stopped(out, method="grpo"):
    """A run stopped after step 4, before its final evaluation, with checkpoints of steps 3 and 4."""
    status, said, _ = run(out, "--method", method, "--max-hours", 1e-9, "--steps", 4)
    for _ in range(3):
        status, said, _ = run(out, "--method", method, "--max-hours", 1e-9, "--resume")
    assert status == 0 and len(metrics(out)) == 4, said


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of the weights": ("model.safetensors", flip),
    "a bit of the state": ("state.pt", flip),
    "a state that is cut off": ("state.pt", lambda path: os.truncate(path, 1000)),
    "a tokenizer that is gone": ("tokenizer.json", lambda path: path.unlink()),
    "no sums": ("sums.json", lambda path: path.unlink()),
    "sums that are none": ("sums.json", lambda path: path.write_text("[]")),
    "sums nested without end": ("sums.json", lambda path: path.write_text("[" * 100_000)),
    "sums that leave out the state": ("state.pt", lambda path: (path.parent / "sums.json").write_text("{}")),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A finished run, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.EMBEDDED, "arithmetic", ("train", 64))
        patch.setattr(plot, "curves", lambda *_: None)
        out = tmp_path_factory.mktemp("four") / "run"
        status, said, _ = run(out, "--method", "grpo")
        assert status == 0, said
    return out


def copy(source, out):
    subprocess.run(["cp", "-r", source, out], check=True)
    return out


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(four, tmp_path, name):
    out, (file, harm) = copy(four, tmp_path / "run"), DAMAGE[name]
    harm(out / "checkpoint" / "step-4" / file)
    said = resumed(out, "grpo")
    assert said.count("is damaged") == 1 and f"{out}/checkpoint/step-4 is damaged" in said and file in said
    same(four, out)


def one_line(status, said):
    said = "\n".join(line for line in said.splitlines() if "parameters on cpu" not in line)  # a state is read when the policy is there
    said = said.replace(f"events {said.rsplit('events ', 1)[-1].strip()}", "").strip()
    assert status == 2 and "Traceback" not in said and len([line for line in said.splitlines() if "warning" not in line]) == 1, said
    return said


def tree(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def forge(change):
    """Alters the state of a run's last checkpoint, sums and all."""

    def harm(out):
        folder = out / "checkpoint" / "step-4"
        torch.save(change(torch.load(folder / "state.pt", weights_only=True)), folder / "state.pt")
        sums = json.loads((folder / "sums.json").read_text()) | {"state.pt": checkpoint.checksum(folder / "state.pt")}
        (folder / "sums.json").write_text(json.dumps(sums))

    return harm


def smaller(state):
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"][:1]
    return state


BROKEN = {
    "both checkpoints": (lambda out: [flip(path / "state.pt") for path in (out / "checkpoint").iterdir()], "no checkpoint"),
    "a log that lacks a step": (lambda out: (out / "metrics.jsonl").write_text("".join((out / "metrics.jsonl").read_text().splitlines(True)[1:])),
                                "of steps 1 to 4"),
    "a log without figures": (lambda out: (out / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 5))), "of steps 1 to 4"),
    "an empty log": (lambda out: (out / "metrics.jsonl").write_text(""), "metrics.jsonl"),
    "config.json": (lambda out: (out / "config.json").write_text("{"), "config.json"),
    "a config.json of something else": (lambda out: (out / "config.json").write_text("[]"), "config.json"),
    "a config.json that lacks something": (lambda out: (out / "config.json").write_text('{"steps": 4}'), "config.json"),
    "a log nested without end": (lambda out: (out / "metrics.jsonl").write_text("[" * 100_000 + "\n"), "of steps 1 to 4"),
    "a state of other things": (forge(lambda state: {"step": 4}), "step-4/state.pt"),
    "a state of another kind": (forge(lambda state: [4]), "step-4/state.pt"),
    "moments of another shape": (forge(smaller), "step-4/state.pt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_gone_on_with_is_refused_and_left_as_it_was(four, tmp_path, name):
    out, (harm, word) = copy(four, tmp_path / "run"), BROKEN[name]
    harm(out)
    before = tree(out)
    status, said, _ = run(out, "--method", "grpo", "--resume")
    assert word in one_line(status, said)
    assert tree(out) == before


def test_what_is_no_checkpoint_is_not_taken_for_one(four, tmp_path):
    out = copy(four, tmp_path / "run")
    for name in ("step-\u00b2", "step-9.new", "step-", "notes"):
        (out / "checkpoint" / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(out)][:2] == ["step-4", "step-3"]
    assert "damaged" not in resumed(out, "grpo")
    same(four, out)


def test_a_run_that_another_process_has_begun_and_ended_meanwhile_is_not_replaced(four, tmp_path):
    """Both found no run in --out when they started; the quicker one had it to itself."""
    out = copy(four, tmp_path / "run")
    before, config = tree(out), json.loads((out / "config.json").read_text())
    try:
        with pytest.raises(UserError, match="--out: another process"):
            checkpoint.begin(config | {"out": str(out), "resume": False, "overwrite": False})
        assert tree(out) == before
    finally:
        checkpoint.release()


def test_a_run_that_another_process_is_at_work_on_is_left_alone(four, tmp_path):
    out = copy(four, tmp_path / "run")
    before = tree(out)
    checkpoint.take(out)  # by this process
    handle = checkpoint.HELD.copy()
    try:
        checkpoint.HELD.clear()  # the child shall not take it for its own
        for more in ("--resume", "--overwrite"):
            status, said, _ = run(out, "--method", "grpo", more)
            assert "--out: another process is at work" in one_line(status, said)
        assert tree(out) == before
    finally:
        os.close(handle[0])
    assert run(out, "--method", "grpo", "--resume")[0] == 0


# ---------------------------------------------------------------- other options


def test_options_that_would_change_the_run_are_refused_by_name_and_the_others_are_not(four):
    argv = ["--method", "grpo", *SHORT, "--resume", "--out", str(four)]
    for name, value in vars(options.options(argv)).items():
        o = options.options(argv)
        setattr(o, name, "other" if value is None or isinstance(value, str) else not value if isinstance(value, bool) else value + 1)
        if name in checkpoint.FREE:
            if name not in ("out", "resume"):
                checkpoint.refuse_changes(four, o)
            continue
        with pytest.raises(UserError, match="--" + name.replace("_", "-")):
            checkpoint.refuse_changes(four, o)


def test_a_refused_change_is_one_line_and_changes_nothing(four, tmp_path):
    out = copy(four, tmp_path / "run")
    before = tree(out)
    status, said, _ = run(out, "--method", "grpo", "--lr", "1e-5", "--samples", "2", "--resume")
    said = one_line(status, said)
    assert "--lr 0.001, not 1e-05" in said and "--samples 4, not 2" in said
    status, said, _ = run(out, "--method", "grpo", "--steps", "3", "--resume")
    assert "--steps 4" in one_line(status, said)
    assert tree(out) == before


def test_problems_that_have_changed_are_refused(four, tmp_path, monkeypatch):
    out = copy(four, tmp_path / "run")
    before = tree(out)
    monkeypatch.setitem(data.EMBEDDED, "arithmetic", ("train", 63))
    status, said, _ = run(out, "--method", "grpo", "--resume", "--steps", 5)
    assert status == 2 and "the problems of --data are not those" in said
    assert tree(out) == before


def test_steps_may_grow_and_config_json_says_so(four, tmp_path):
    out = copy(four, tmp_path / "run")
    assert run(out, "--method", "grpo", "--steps", 6, "--resume", "--save-every", 3)[0] == 0
    assert metrics(out)[:4] == metrics(four) and len(metrics(out)) == 6
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 6 and config["save_every"] == 3


# ---------------------------------------------------------------- no room


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint_whole(four, tmp_path):
    """No file may grow beyond what the weights take: the state, twice as large, cannot be written."""
    out = copy(four, tmp_path / "run")
    size = (out / "checkpoint/step-4/model.safetensors").stat().st_size
    status, said, _ = run(out, "--method", "grpo", "--steps", 6, "--resume", file_size=size + 1000)
    assert status == 1 and "Traceback" not in said and said.count("train.py: error:") == 1, said
    assert "step-5.new" in said and "--resume" in said
    assert checkpoint.damage(out / "checkpoint/step-4") is None and not list((out / "checkpoint").glob("*.new"))
    assert run(out, "--method", "grpo", "--steps", 6, "--resume")[0] == 0 and len(metrics(out)) == 6


def test_a_full_file_system_likewise(four, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    room = sum(path.stat().st_size for path in four.rglob("*") if path.is_file()) + 2**20
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        out = copy(four, disk / "run")
        with open(disk / "filler", "wb") as file:
            file.write(b"x" * 2**19)
        (disk / "filler").open("ab").write(b"x" * max(0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 2**18))
        status, said, _ = run(out, "--method", "grpo", "--steps", 6, "--resume")
        assert status == 1 and said.count("train.py: error:") == 1 and "Traceback" not in said and "No space left" in said, said
        assert checkpoint.damage(out / "checkpoint/step-4") is None
        (disk / "filler").unlink()
        assert run(out, "--method", "grpo", "--steps", 6, "--resume")[0] == 0 and len(metrics(out)) == 6
        subprocess.run(["rm", "-r", out / "model", out / "final.json"], check=True)
        with open(disk / "filler", "wb") as file:
            file.write(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 2**17))
        status, said, _ = run(out, "--method", "grpo", "--steps", 6, "--resume")  # to its end: the final policy has no room
        assert status == 1 and said.count("train.py: error:") == 1 and "Traceback" not in said and "run/model: " in said, said
    finally:
        subprocess.run(["umount", disk])


# ---------------------------------------------------------------- what a checkpoint holds


def test_whatever_the_policy_keeps_is_saved_and_restored(four, tmp_path):
    """A further model and its optimizer are one line each: an entry of policy.kept."""

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2)).sum().backward()
    optimizer.step()

    policy = SimpleNamespace(kept={"judge": model, "optimizer": optimizer}, rounds=5, bad_updates=3)
    policy.model, policy.tokenizer, _ = load_policy(TINY)
    checkpoint.write_checkpoint(policy, 7, tmp_path / "step-7")
    assert checkpoint.damage(tmp_path / "step-7") is None
    other = torch.nn.Linear(2, 2)
    fresh = SimpleNamespace(kept={"judge": other, "optimizer": torch.optim.AdamW(other.parameters(), lr=0.1)}, rounds=0, bad_updates=0)
    checkpoint.restore(fresh, tmp_path / "step-7")
    assert (fresh.rounds, fresh.bad_updates) == (5, 3) and all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    for a, b in zip(optimizer.state.values(), fresh.kept["optimizer"].state.values()):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- as commands


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def signalled(out, argv, number, launcher=(), to_all=False):
    """train.py as a command that gets a signal when the first line of metrics.jsonl is there: (exit status, standard output, standard error)."""
    command = [sys.executable, *launcher, train.__file__, *argv, "--out", out]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = out / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    those = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in read(path)] if to_all else [process.pid]
    for pid in those:
        os.kill(int(pid), number)
    return *process.communicate(timeout=300), process.returncode


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has just ended


@pytest.mark.slow
def test_the_command_itself_stops_and_goes_on(tmp_path):
    argv = ["--method", "kl_cov", *SHORT, "--steps", "20"]
    out, err, status = signalled(tmp_path / "run", argv, signal.SIGINT)
    assert status == 130 and "Traceback" not in err and "--resume" in out, err
    assert subprocess_of(*argv, "--resume", "--out", tmp_path / "run").returncode == 0
    assert subprocess_of(*argv, "--out", tmp_path / "whole").returncode == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_stop_and_go_on_whoever_gets_the_signal(tmp_path):
    """torchrun passes Ctrl-C and SIGTERM on to its processes; a scheduler signals all of them besides."""
    argv = ["--method", "kl_cov", *SHORT, "--steps", "12", "--save-every", "99"]
    assert subprocess_of(*argv, "--out", tmp_path / "whole", launcher=TORCHRUN).returncode == 0
    for number, to_all in ((signal.SIGINT, False), (signal.SIGTERM, True)):
        run = tmp_path / number.name
        out, err, _ = signalled(run, argv, number, TORCHRUN, to_all)
        done = len(metrics(run))
        assert done < 12 and [path.name for path in (run / "checkpoint").iterdir()] == [f"step-{done}"], err
        assert out.count(f"stopped by {number.name} after step {done}") == 1 and "--resume" in out and "train.py: error" not in err
        assert subprocess_of(*argv, "--resume", "--out", run, launcher=TORCHRUN).returncode == 0
        assert metrics(run) == metrics(tmp_path / "whole")
