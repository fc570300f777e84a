"""How the cost of a step grows with rows, completion length, vocabulary and model size, over a factor of 16 each.

    python tests/bench/scaling.py [--repeats 2]          CPU, writes results/scaling.json
    python tests/bench/scaling.py --device cuda

One quantity varies, the others stay: 64 rows of 32 tokens, vocabulary 256, width 64 (2 layers). A step is what train.py does to a mini-batch:
sample, score, and one update (score, backward, AdamW) with an advantage for every row. Nothing ends a completion, weights are random.
Seconds are those of the processor on a CPU. The exponent is the slope of log seconds against log quantity, over all five
points and over the last two: small sizes are calls of Python, whose cost is constant. "model" counts the parameters of the layers, which grow as width squared.
"""

import argparse
import json
import math
import pathlib
import sys
import time
from statistics import linear_regression

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from machine import machine
from transformers import Qwen2Config, Qwen2ForCausalLM

import parallel
import rollout

BASE = {"rows": 64, "length": 32, "vocabulary": 256, "model": 64}
POINTS = {"rows": (64, 128, 256, 512, 1024), "length": (32, 64, 128, 256, 512), "vocabulary": (256, 512, 1024, 2048, 4096),
          "model": (64, 96, 128, 192, 256)}  # four heads of 16 to 64, which a GPU takes as they are # fmt: skip


def measure(rows, length, vocabulary, model, device, repeats):
    """Best seconds of sampling, scoring and updating."""
    torch.manual_seed(0)
    policy = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, hidden_size=model, intermediate_size=2 * model, num_hidden_layers=2, num_attention_heads=4,
                                          num_key_value_heads=2, tie_word_embeddings=True)).to(device).eval()  # fmt: skip
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    o = argparse.Namespace(micro_batch=16384, device=device, temperature=1.0)
    prompts = [[1 + i % 200, 2, 3, 4] for i in range(rows)]
    clock = time.process_time if device == "cpu" else time.perf_counter

    def update(batch):
        parallel.score(policy, batch, 1.0, o)
        optimizer.zero_grad(set_to_none=True)
        parallel.backward(policy, batch, torch.ones(rows, length), torch.zeros(rows, length), o)
        optimizer.step()
        return sum(p.sum() for p in policy.parameters()).item()  # a GPU is waited for

    best = dict.fromkeys(("sample", "score", "update"), math.inf)
    for _ in range(repeats + 1):  # the first of them warms up
        times = [clock()]
        completions = [c for group in rollout.sample(policy, prompts[::8], 8, length, 1.0, {-1}, torch.Generator().manual_seed(0)) for c in group]
        times.append(clock())
        batch = {"prompts": prompts, "completions": completions}
        parallel.score(policy, batch, 1.0, o)
        times.append(clock())
        update(batch)
        times.append(clock())
        for name, a, b in zip(best, times, times[1:]):
            best[name] = min(best[name], b - a)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    o = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"machine": machine(), "quantities": {}}
    for name, values in POINTS.items():
        found = [measure(**BASE | {name: value}, device=o.device, repeats=o.repeats) for value in values]
        size = [math.log(value) * (2 if name == "model" else 1) for value in values]
        table = {"values": values, "seconds": found, "exponents": {}}
        for phase in ("sample", "score", "update"):
            y = [math.log(f[phase]) for f in found]
            table["exponents"][phase] = {"all": round(linear_regression(size, y).slope, 2), "last two": round((y[-1] - y[-2]) / (size[-1] - size[-2]), 2)}
        figures["quantities"][name] = table
        print(name, {phase: [round(f[phase], 4) for f in found] for phase in table["exponents"]}, table["exponents"], flush=True)
    (ROOT / "results" / f"scaling{'_cuda' * (o.device == 'cuda')}.json").write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
