"""Rollout batches a second of train.py and of TRL's GRPOTrainer at the same training, side by side in one run.

    python tests/bench/against_trl.py [--env DIR] [--batches 10] [--whole]      writes results/against_trl.json

Both train the embedded policy with GRPO on the embedded task by the defaults of train.py: 64 prompts, 8 completions each of at most
40 tokens, 8 updates, AdamW, fp32, no reference model, no evaluation, the same reward function, one thread, no checkpoints. TRL is spared what it
would do by default and train.py does not: gradient checkpointing and its logs; as it comes it is measured, too. It is installed, with the packages of
requirements.txt, into an environment of its own (--env, made if it is not there, about 2 GB).

Rounds of --batches rollout batches alternate: TRL, train.py, TRL as it comes. The first batch of each is reported apart. Late in a run most groups
have lost their signal; train.py then is run to its default 200 batches once, and compared with TRL's mean batch, for TRL does the
same work whether there is a signal or not (checked here: the share of groups without one in its batches is reported);
--whole runs TRL to the end as well, which takes long.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import venv
from statistics import mean, median

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRL = "1.16.0"


def theirs(batches, out, **defaults):
    """In the environment with TRL: GRPOTrainer's rollout batches, each with its 8 updates. defaults: what it is not spared."""
    sys.path = [str(ROOT)] + sys.path[1:]
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import arithmetic
    import reward

    torch.set_num_threads(1)
    wall, processor, quiet = [], [], []

    def rewards(completions, answer, **_):
        graded = reward.grade_all(completions, answer)
        groups = [graded[i : i + 8] for i in range(0, len(graded), 8)]
        quiet.append(mean(min(g) == max(g) for g in groups))
        return graded

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.on_step_end(None, argparse.Namespace(global_step=0))

        def on_step_end(self, args, state, *_, **__):
            if state.global_step % 8 == 0:
                wall.append(time.perf_counter())
                processor.append(time.process_time())

    spared = dict(gradient_checkpointing=False, logging_strategy="no") | defaults
    config = GRPOConfig(
        output_dir=out, use_cpu=True, bf16=False, seed=0, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=64, gradient_accumulation_steps=1, steps_per_generation=8, num_generations=8, max_steps=8 * batches,
        max_completion_length=40, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=0.2, loss_type="dapo", learning_rate=3e-4,
        lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
        model_init_kwargs={"dtype": "float32"}, generation_kwargs={"use_cache": True}, **spared,
    )  # fmt: skip
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in arithmetic.problems("train", max(640, 64 * batches))]
    trainer = GRPOTrainer(model=str(ROOT / "tiny"), reward_funcs=rewards, args=config, train_dataset=Dataset.from_list(rows),
                          processing_class=AutoTokenizer.from_pretrained(ROOT / "tiny"), callbacks=[Clock()])  # fmt: skip
    trainer.train()
    report(wall, processor, quiet)


def theirs_as_it_comes(batches, out):
    """The same with TRL's defaults for gradient checkpointing and logs."""
    theirs(batches, out, gradient_checkpointing=True, logging_strategy="steps")


def ours(batches, out):
    """In this environment: the same from train.py, its own steps without what a run evaluates and saves."""
    import torch

    sys.path[:0] = [str(ROOT)]
    import train

    torch.set_num_threads(1)
    o = train.options(["--method", "grpo", "--device", "cpu", "--eval-limit", "1", "--out", out])
    policy, problems, _ = train.load(o)
    wall, processor, quiet = [time.perf_counter()], [time.process_time()], []
    for number in range(1, batches + 1):
        metrics, _ = train.step(policy, train.problems_of_step(problems, policy.rounds + 1, o), number, o)
        wall.append(time.perf_counter())
        processor.append(time.process_time())
        quiet.append(metrics["no_signal"])
    report(wall, processor, quiet)


SIDES = {"theirs": theirs, "ours": ours, "theirs as it comes": theirs_as_it_comes}


def report(wall, processor, quiet):
    """For each rollout batch: seconds, seconds of the processor, share of groups without signal."""
    between = lambda x: [b - a for a, b in zip(x, x[1:])]
    print(json.dumps({"seconds": between(wall), "processor": between(processor), "no_signal": quiet}))


def run(python, side, batches, out):
    """What one side reports, from a process of its own."""
    command = [python, __file__, "--side", side, "--batches", str(batches), "--out", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


def install(folder):
    """The Python of an environment that has TRL."""
    python = folder / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import trl"], capture_output=True).returncode:
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", ROOT / "requirements.txt", f"trl=={TRL}"], check=True)
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), f"trl-{TRL}"))
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="of the whole run (default 200, as train.py's)")
    parser.add_argument("--whole", action="store_true", help="TRL to the end, too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.side:
        return SIDES[o.side](o.batches, o.out)
    from machine import machine

    trl = install(o.env)
    pythons, taken = {"theirs": trl, "ours": sys.executable, "theirs as it comes": trl}, {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for r in range(o.rounds):
            for side in taken:
                taken[side].append(run(pythons[side], side, o.batches, f"{folder}/{side}-{r}"))
                s, p = taken[side][-1]["seconds"], taken[side][-1]["processor"]
                print(f"{side:18} {sum(s):6.2f} s for {o.batches} batches, {sum(p):6.2f} s of the processor, first {p[0]:.2f}, then median {median(p[1:]):.3f}", flush=True)
        whole = {"ours": run(pythons["ours"], "ours", o.steps, f"{folder}/whole")}
        whole["theirs"] = run(pythons["theirs"], "theirs", o.steps, f"{folder}/whole-theirs") if o.whole else None
    figures = {"machine": machine(), "TRL": TRL, "batches": o.batches, "rounds": taken, "TRL ran to the end": o.whole, "whole run": whole}
    for clock in ("seconds", "processor"):
        total = {side: [sum(r[clock]) for r in rounds] for side, rounds in taken.items()}
        a_batch = mean(s for r in ([whole["theirs"]] if o.whole else taken["theirs"]) for s in r[clock])
        figures[f"ratio, {clock}"] = {
            "first batches, each round": [a / b for a, b in zip(total["theirs"], total["ours"])],
            "as it comes": [a / b for a, b in zip(total["theirs as it comes"], total["ours"])],
            f"{o.steps} batches": o.steps * a_batch / sum(whole["ours"][clock]),
        }  # fmt: skip
    quiet = {side: round(mean(x for r in rounds for x in r["no_signal"]), 3) for side, rounds in taken.items()}
    figures["no_signal"] = quiet | {"last tenth of the whole run, ours": mean(whole["ours"]["no_signal"][-o.steps // 10 :])}
    (ROOT / "results" / "against_trl.json").write_text(json.dumps(figures) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key not in ("rounds", "whole run")}, indent=1))


if __name__ == "__main__":
    main()
