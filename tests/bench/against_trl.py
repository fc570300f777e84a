"""How much faster train.py is than TRL's GRPOTrainer at the same training, side by side in one run.

TRL is no requirement of this repository. It gets an environment of its own (about 2 GB):

    python3 -m venv trl && trl/bin/pip install -q -r requirements.txt trl==1.16.0
    python tests/bench/against_trl.py --python trl/bin/python [--batches 10] [--out FILE.json]

Both train the embedded policy with GRPO on the embedded task by the defaults of train.py: 64 prompts, 8
completions each of at most 40 tokens, 8 updates, AdamW, fp32, one thread, the same reward; no reference
model, no evaluation, no checkpoints. TRL is spared gradient checkpointing and logs, which are its defaults.

Rounds of rollout batches alternate between the two. The ratio is TRL's seconds over train.py's, by the clock
on the wall and by that of the processor. Later in a run many completions are equal and many groups have no
signal, and train.py takes less time for them. So train.py also runs to its default last step, and is compared
with TRL's mean batch, which does not depend on the signal.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def ours(batches, out, clock):
    """The steps of train.py, without what a run evaluates and saves."""
    import train

    o = train.options(["--method", "grpo", "--device", "cpu", "--eval-limit", "1", "--out", out])
    policy, problems, _ = train.load(o)
    clock()
    for number in range(1, batches + 1):
        train.step(policy, train.problems_of_step(problems, number - 1, o), number, o)
        clock()


def theirs(batches, out, clock):
    """In the environment with TRL: GRPOTrainer's rollout batches, each with its 8 updates."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import arithmetic
    import reward

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock()

        def on_step_end(self, args, state, *_, **__):
            if state.global_step % 8 == 0:
                clock()

    config = GRPOConfig(
        output_dir=out, use_cpu=True, bf16=False, seed=0, report_to=[], save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, logging_strategy="no", per_device_train_batch_size=64,
        gradient_accumulation_steps=1, steps_per_generation=8, num_generations=8, max_steps=8 * batches,
        max_completion_length=40, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=0.2,
        loss_type="dapo", learning_rate=3e-4, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95,
        weight_decay=0.0, max_grad_norm=1.0, model_init_kwargs={"dtype": "float32"},
        generation_kwargs={"use_cache": True},
    )  # fmt: skip
    problems = arithmetic.problems("train", max(640, 64 * batches))
    trainer = GRPOTrainer(
        model=str(ROOT / "tiny"), args=config, callbacks=[Clock()],
        reward_funcs=lambda completions, answer, **_: reward.grade_all(completions, answer),
        train_dataset=Dataset.from_list([{"prompt": p, "answer": a} for p, a in problems]),
        processing_class=AutoTokenizer.from_pretrained(ROOT / "tiny"),
    )  # fmt: skip
    trainer.train()


SIDES = {"ours": ours, "theirs": theirs}


def one_side(side, batches, out):
    """Trains, and prints the seconds of each rollout batch: on the wall, of the processor."""
    import torch

    torch.set_num_threads(1)
    times = []
    SIDES[side](batches, out, lambda: times.append((time.perf_counter(), time.process_time())))
    print(json.dumps([[b - a for a, b in zip(pair, after)] for pair, after in zip(times, times[1:])]))


def measure(python, side, batches):
    """[(seconds on the wall, seconds of the processor) of each rollout batch], from a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [python, __file__, "--side", side, "--batches", str(batches), "--out", f"{folder}/run"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="the Python of the environment that has TRL")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800, help="of the whole run (train.py's default)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help="file for the figures")
    o = parser.parse_args()
    if o.side:
        return one_side(o.side, o.batches, o.out)
    pythons, taken = {"ours": sys.executable, "theirs": o.python}, {"ours": [], "theirs": []}
    for _ in range(o.rounds):
        for side in SIDES:
            taken[side] += measure(pythons[side], side, o.batches)
    whole = {"ours": measure(sys.executable, "ours", o.steps)}
    figures = {"batches": o.batches, "steps": o.steps, "seconds": taken, "seconds of the whole run": whole}
    for k, clock in enumerate(("wall", "processor")):
        first = {side: mean(batch[k] for batch in taken[side]) for side in SIDES}
        last = {side: mean(batch[k] for batch in whole.get(side, taken[side])) for side in SIDES}
        ratios = first["theirs"] / first["ours"], last["theirs"] / last["ours"]
        figures[f"ratio, {clock}"] = ratios
        print(f"{clock}: {ratios[0]:.2f} times as fast as TRL in the first {o.batches} batches "
              f"({first['ours']:.3f} against {first['theirs']:.3f} s), {ratios[1]:.2f} over {o.steps}")
    if o.out:
        Path(o.out).write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
