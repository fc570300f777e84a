"""Memory and time of a mini-batch's scores and gradient: entropy.py against whole logits, side by side.

    python tests/bench/scoring.py [--model DIR] [--rows 16 64] [--tokens 128] [--device cuda] [--out FILE]

The plain way keeps the logits (B, T, V), their log-softmax and their gradient. entropy.py works on chunks of
tokens: scores without a graph, then the backward pass for known dL/dlogp, as train.py does it. Both report
the entropy; the gradient is that of the log-probs. Without --model it is a narrow random Qwen2 with Qwen's
vocabulary of 151,936. Rows have a prompt of one token and a completion of --tokens.

Each measurement is a process of its own, for the peak of resident memory never falls. "Memory" is what the
computation adds to model and libraries.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import entropy
from rollout import load_policy


def load(model, device):
    """The model of a folder, or a narrow random one."""
    if model:
        return load_policy(model, device)[0]
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=151936, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    return Qwen2ForCausalLM(config).to(device).eval()


def plain(model, prompts, completions):
    """The gradient of the sum of all log-probs, and the entropies, from whole logits."""
    ids = torch.tensor([p + c for p, c in zip(prompts, completions)], device=model.device)
    logp = torch.log_softmax(model(ids, use_cache=False).logits[:, :-1].float(), -1)
    with torch.no_grad():
        H = -(logp.exp() * logp).sum(-1)
    logp.gather(-1, ids[:, 1:, None]).sum().backward()
    return H


def chunked(model, prompts, completions):
    """The same as train.py does it."""
    with torch.no_grad():
        logp, H = entropy.score(model, prompts, completions)
    entropy.backward(model, prompts, completions, torch.ones_like(logp), torch.zeros_like(logp))
    return H


WAYS = {"plain": plain, "chunked": chunked}


def peak(device):
    """The most memory that this process has held, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(o):
    """One way in this process: the memory added, the seconds of each repetition, and the entropy."""
    torch.set_num_threads(1)
    model, rng, seconds = load(o.model, o.device), random.Random(0), []
    rows = [rng.choices(range(model.config.vocab_size), k=1 + o.tokens) for _ in range(o.rows[0])]
    prompts, completions = [row[:1] for row in rows], [row[1:] for row in rows]
    start = peak(o.device)
    for _ in range(o.repeats):
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        with torch.autocast(o.device, torch.bfloat16, enabled=o.device == "cuda"):
            H = WAYS[o.way](model, prompts, completions).mean().item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"memory": peak(o.device) - start, "seconds": seconds, "entropy": H}))


def compare(o, rows):
    """Both ways for so many rows, and their ratios."""
    given, found = ["--rows", rows, "--tokens", o.tokens, "--repeats", o.repeats, "--device", o.device], {}
    given += ["--model", o.model] if o.model else []
    for way in WAYS:
        command = list(map(str, [sys.executable, __file__, "--way", way, *given]))
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    memory = found["chunked"]["memory"] / found["plain"]["memory"]
    seconds = median(found["chunked"]["seconds"]) / median(found["plain"]["seconds"])
    print(f"{rows} rows of {o.tokens} tokens, chunked / plain: memory {memory:.3f}, time {seconds:.2f} "
          f"(entropies {found['chunked']['entropy']:.4f} and {found['plain']['entropy']:.4f})", flush=True)
    return {"rows": rows, "tokens": o.tokens, "memory": memory, "time": seconds, "runs": found}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help="file for the figures")
    o = parser.parse_args()
    if o.way:
        return one(o)
    figures = [compare(o, rows) for rows in o.rows]
    if o.out:
        Path(o.out).write_text(json.dumps({"model": o.model, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
