"""The phases of a default step of train.py against their bounds: operations over the measured matrix rate, bytes over the measured bandwidth.

    python tests/bench/phases.py [--steps 10] [--method grpo]      CPU, one thread; writes results/phases.json (phases_METHOD.json, ..._cuda.json)
    python tests/bench/phases.py --device cuda                      the embedded policy on a GPU: launches more than anything, the bounds still those of fp32

Operations are those of the matrix products alone: 2 for each weight and token forward, 4 backward; a prompt is sampled from once and scored with each
of its completions. Completions that are the same count once, when sampling on a CPU also as long as they are the same; a row without signal has no backward.
Bytes: when sampling, all weights at every token, and keys and values up to the position;
else every weight once for each mini-batch and direction, and 4 x 10 numbers for each token, layer and unit of width, which is what
the elementwise operations of a layer read and write at least (norms, rotary embedding, gate, residual). The bound is the larger of the two times.
Seconds are those of the processor on a CPU. The parts of "update" are timed by themselves: the second scoring, and the rest. Beside them stand the share
of padding in what is scored, and the shares that kinds of operators have in the time that all operators of a scoring pass take.
"""

import argparse
import json
import math
import pathlib
import sys
import tempfile
import time
from statistics import median

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from machine import machine, padding

import entropy
import train
from parallel import distinct, micro_batches


def best(work, clock, device, repeats=20):
    """Seconds of the fastest of a few calls."""
    taken = math.inf
    for _ in range(repeats):
        began = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken = min(taken, clock() - began)
    return taken


def rates(model, clock, device):
    """Operations a second of a large product and of one with the policy's shapes (1,024 tokens through its widest layer); bytes a second of copying."""
    a, b = (torch.randn(1024, 1024, device=device) for _ in range(2))
    wide = max((p for p in model.parameters() if p.ndim == 2), key=torch.numel)
    x = torch.randn(1024, wide.shape[1], device=device)
    big = torch.empty(2**24, device=device)
    other = torch.empty_like(big)
    return {
        "operations a second, large product": 2 * 1024**3 / best(lambda: a @ b, clock, device),
        "operations a second, the policy's widest": 2 * 1024 * wide.numel() / best(lambda: x @ wide.T, clock, device, 100),
        "bytes a second": 2 * big.nbytes / best(lambda: other.copy_(big), clock, device),
    }


def bounds(policy, kept, o, rate):
    """Seconds of each phase at best for the rollouts of a step, and what there is to compute: rows, and tokens to decode."""
    c = policy.model.config
    P = sum(p.numel() for p in policy.model.parameters() if p.ndim == 2)
    completions = [(i, tuple(y)) for i, g in enumerate(kept) for y in g["completions"]]  # a problem's number makes the prompt part of it
    decoded = [(i, y[:t]) for i, y in completions for t in range(1, len(y))]  # a token for each, beyond the first one
    rows, to_decode = set(completions), set(decoded) if o.device == "cpu" else decoded
    tokens = lambda pieces: sum(len(kept[i]["prompt"]) + len(y) for i, y in pieces)
    prompts, scored = sum(len(g["prompt"]) for g in kept), tokens(rows)
    signal = tokens((i, y) for i, y in rows if min(kept[i]["rewards"]) < max(kept[i]["rewards"]))
    position = 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * 4
    elementwise = 4 * 10 * c.num_hidden_layers * c.hidden_size
    updates = len(kept) // o.mini_batch
    operations = {"sample": 2 * P * (prompts + len(to_decode)), "score": 2 * P * scored, "update": 2 * P * (scored + 3 * signal)}
    moved = {
        "sample": 4 * P * max(len(y) for _, y in rows) + position * tokens(to_decode) + elementwise * (prompts + len(to_decode)),
        "score": 4 * P * updates + elementwise * scored,
        "update": updates * (4 * P * 4 + 28 * P) + elementwise * (scored + 3 * signal),
    }
    by = {"operations": "operations a second, the policy's widest", "bytes": "bytes a second"}
    work = {"rows": len(completions), "of them different": len(rows), "tokens drawn": len(decoded), "tokens decoded": len(to_decode)}
    return {phase: {"operations": operations[phase] / rate[by["operations"]], "bytes": moved[phase] / rate[by["bytes"]]} for phase in operations}, work


def mini_batch(groups, o):
    """Prompts and completions of its rows, and those that the model sees of them, as groups of indices."""
    prompts, completions = zip(*[(g["prompt"], c) for g in groups for c in g["completions"]])
    first, _ = distinct({"prompts": prompts, "completions": completions})
    return prompts, completions, micro_batches(prompts, completions, o.micro_batch, first.tolist())


def padding_of(kept, o):
    """Share of padding when the rollouts of a step are scored, mini-batch by mini-batch."""
    batches = [mini_batch(kept[i : i + o.mini_batch], o) for i in range(0, len(kept), o.mini_batch)]
    lengths = [len(p) + len(c) for prompts, completions, _ in batches for p, c in zip(prompts, completions)]
    size = o.mini_batch * o.samples
    return padding(lengths, [[n * size + i for i in group] for n, (_, _, groups) in enumerate(batches) for group in groups])


def shares(policy, kept, o):
    """Of the time that the operators of a scoring pass over the first mini-batch take, as the profiler sees it, the shares of kinds of them."""
    prompts, completions, groups = mini_batch(kept[: o.mini_batch], o)
    with torch.profiler.profile() as trace, torch.no_grad():
        for group in groups * 10:
            entropy.score(policy.model, [prompts[i] for i in group], [completions[i] for i in group])
    spent = {e.key: e.self_cpu_time_total for e in trace.key_averages()}
    part = lambda *words: sum(t for key, t in spent.items() if any(word in key for word in words)) / sum(spent.values())
    products, attention = part("aten::mm", "addmm", "bmm"), part("scaled_dot_product")
    return {"products": products, "attention": attention, "others": 1 - products - attention}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--method", default="grpo")
    parser.add_argument("--steps", type=int, default=10)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.device == "cpu":
        time.perf_counter = time.process_time  # the clock of train.py's own laps
    clock, taken, kept_of, again, different = time.perf_counter, [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        o = train.options(["--method", a.method, "--device", a.device, "--eval-limit", "1", "--out", f"{folder}/run"])
        policy, problems, _ = train.load(o)
        collect, score = train.collect, train.score

        def spy(*arguments):
            kept_of.append(collect(*arguments))
            return kept_of[-1]

        def timed(*arguments):
            began = clock()
            result = score(*arguments)
            again.append(clock() - began)
            return result

        train.collect, train.score = spy, timed
        for number in range(1, a.steps + 1):
            again.clear()
            metrics, _ = train.step(policy, train.problems_of_step(problems, policy.rounds + 1, o), number, o)
            different.append(round(metrics["different"], 3))
            second = sum(again)
            taken.append(metrics["seconds"] | {"update: second scoring": second, "update: the rest": metrics["seconds"]["update"] - second})
        rate = rates(policy.model, clock, a.device)
        spent = shares(policy, kept_of[-1][0], o)
        bound, work = bounds(policy, kept_of[-1][0], o, rate)
    last = taken[len(taken) // 2 :]
    figures = {
        "machine": machine(), "rates": rate, "work of the last step": work, "no_signal": metrics["no_signal"], "different, each step": different,
        "padding": padding_of(kept_of[-1][0], o),
        "shares of a scoring pass": spent, "bound of the last step, seconds": bound,
        "seconds, median of the later half": {phase: median(t[phase] for t in last) for phase in taken[0]}, "seconds of each step": taken,
    }  # fmt: skip
    name = f"phases{f'_{a.method}' * (a.method != 'grpo')}{'_cuda' * (a.device == 'cuda')}.json"
    (ROOT / "results" / name).write_text(json.dumps(figures) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if "each step" not in key}, indent=1))


if __name__ == "__main__":
    main()
