"""Memory and time of log-probs and entropies, forward and backward, with the vocabulary of 151,936: entropy.score against whole logits.

    python tests/bench/scoring.py [--repeats 3] [--tokens 8192]         CPU; writes results/scoring.json
    python tests/bench/scoring.py --device cuda --size 1.5B             GPU: tokens a second of an update and its share of the bf16 peak

CPU: a narrow Qwen2 with random weights, one process for each measurement, since peak resident memory never falls; "over the start" is what
the computation adds to model and libraries. The plain way holds the logits (B, T, V), their log-softmax and their gradients: 15 GB for 8,192
tokens. Both report the entropy, the gradient is that of the log-probs, compared over all parameters. Padding: the share of tokens that micro_batches pads, for lengths alike and very unequal.
GPU: sequences of 4,096 tokens in micro-batches as train.py makes them. Operations of an update: 6 for each weight and token, and
attention's 6 layers T hidden for each token (half of the square is masked), over the rate of a large bf16 product measured in the same run.
"""

import argparse
import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]

import torch
from machine import machine, padding
from transformers import Qwen2Config, Qwen2ForCausalLM

import entropy
import parallel

V = 151936


def plain(model, prompts, completions):
    """The same two sums from whole logits, as public implementations take them."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions))
    ids = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in zip(prompts, completions)])
    logp = torch.log_softmax(model(ids, use_cache=False).logits[:, :-1], -1)
    mask = torch.zeros(ids.shape[0], width - 1)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        mask[i, len(p) - 1 : len(p) + len(c) - 1] = 1
    with torch.no_grad():
        H = -(logp.exp() * logp).sum(-1)
    return (logp.gather(-1, ids[:, 1:, None])[..., 0] * mask).sum(), (H * mask).sum()


def one(way, tokens, repeats, out):
    """In a process of its own: peak memory before and after, seconds, and the gradient as a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=V, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, tie_word_embeddings=True))  # fmt: skip
    rng = random.Random(0)
    rows = tokens // 512
    prompts, completions = ([[rng.randrange(V) for _ in range(n)] for _ in range(rows)] for n in (1, 511))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start, taken, scored = peak(), [], []
    for _ in range(repeats):
        model.zero_grad(set_to_none=True)
        began = time.process_time()
        if way == "plain":
            logp, H = plain(model, prompts, completions)
            logp.backward()
        else:  # as train.py does it: scores without a graph, then back with dL/dlogp known
            with torch.no_grad():
                logp, H = (x.sum() for x in entropy.score(model, prompts, completions))
            scored.append(time.process_time() - began)
            entropy.backward(model, prompts, completions, torch.ones(rows, 511), torch.zeros(rows, 511))
        taken.append(time.process_time() - began)
    torch.save(torch.cat([p.grad.flatten() for p in model.parameters()]), out)
    print(json.dumps({"start": start, "peak": peak(), "seconds": taken, "of which scoring": scored, "sums": [logp.item(), H.item()]}))


def cpu(o):
    """Both ways in turn, each in a process of its own."""
    found, gradients = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("plain", "chunked"):
            command = [sys.executable, __file__, "--way", way, "--tokens", str(o.tokens), "--repeats", str(o.repeats), "--out", f"{folder}/{way}"]
            found[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            gradients[way] = torch.load(f"{folder}/{way}")
    a, b = found["plain"], found["chunked"]
    return {
        "tokens": o.tokens, "runs": found, "peak memory, chunked / plain": b["peak"] / a["peak"],
        "peak memory over the start, chunked / plain": (b["peak"] - b["start"]) / (a["peak"] - a["start"]),
        "time, forward and backward alone, chunked / plain": (median(b["seconds"]) - median(b["of which scoring"])) / median(a["seconds"]),
        "time with the scoring before, chunked / plain": median(b["seconds"]) / median(a["seconds"]),
        "gradients, relative difference": ((gradients["chunked"] - gradients["plain"]).norm() / gradients["plain"].norm()).item(),
    }  # fmt: skip


def paddings():
    """Shares of padding, in order and sorted: 512 rows, prompts of 64 to 192 tokens."""
    rng, shares = random.Random(0), {}
    draws = {"alike (200 to 400)": lambda: rng.randint(200, 400), "unequal (geometric, median 256, at most 2048)": lambda: min(2048, 1 + int(rng.expovariate(0.693 / 256)))}
    for name, draw in draws.items():
        prompts, completions = [[0] * rng.randint(64, 192) for _ in range(512)], [[0] * draw() for _ in range(512)]
        length = [len(p) + len(c) for p, c in zip(prompts, completions)]
        for budget in (4096, 16384):
            groups = parallel.micro_batches(prompts, completions, budget)
            in_order = [range(i, min(i + len(length) // len(groups), len(length))) for i in range(0, len(length), len(length) // len(groups))]
            shares[f"{name}, {budget} tokens"] = {"sorted": padding(length, groups), "in the order drawn": padding(length, in_order)}
    return shares


def cuda(o):
    """Updates of 16 sequences of 4,096 tokens: tokens a second, share of the rate of a bf16 product of 8,192 x 8,192 matrices."""
    from sampler import qwen

    model = qwen(o.size, 8, "cuda", 1)[0].float()
    if o.gradient_checkpointing:
        parallel.recompute(model)
    settings = argparse.Namespace(device="cuda", micro_batch=o.micro_batch, temperature=1.0)
    rng = random.Random(0)
    batch = {name: [[rng.randrange(V) for _ in range(n)] for _ in range(16)] for name, n in (("prompts", 256), ("completions", 3840))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    dlogp = torch.randn(16, 3840)

    def timed(work, repeats):
        taken = []
        for _ in range(repeats + 2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        return taken[2:]

    def update():
        optimizer.zero_grad(set_to_none=True)
        parallel.backward(model, batch, dlogp, torch.zeros_like(dlogp), settings)
        optimizer.step()

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / min(timed(lambda: a @ a, 20))
    c, N, P = model.config, 16 * 4096, sum(p.numel() for p in model.parameters())
    operations = 6 * P * N + 6 * c.num_hidden_layers * 4096 * c.hidden_size * N
    seconds = timed(update, o.repeats)
    return {"size": o.size, "micro-batch": o.micro_batch, "gradient checkpointing": o.gradient_checkpointing, "bf16 operations a second, measured": rate,
            "seconds of an update": seconds, "tokens a second": N / median(seconds), "share of the peak": operations / median(seconds) / rate,
            "peak memory": torch.cuda.max_memory_allocated()}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("0.5B", "1.5B"), default="1.5B")
    parser.add_argument("--micro-batch", type=int, default=16384)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.way:
        return one(o.way, o.tokens, o.repeats, o.out)
    figures = {"machine": machine()} | ({"scoring": cpu(o), "padding": paddings()} if o.device == "cpu" else {"update": cuda(o)})
    name = "scoring.json" if o.device == "cpu" else f"update_cuda_{o.size}.json"
    (ROOT / "results" / name).write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
