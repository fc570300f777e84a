"""Tokens a second of rollout.sample and of transformers' generate, same model, side by side; on a GPU also its share of what the memory allows.

    python tests/bench/sampler.py [--repeats 5]                          CPU: the embedded policy, and completions of very unequal length
    python tests/bench/sampler.py --device cuda [--size 1.5B] [--rows 64 256 512]      Qwen2.5's shape, random weights, bf16, 1,024 tokens

writes results/sampler.json or results/sampler_cuda_SIZE.json. Both sample at temperature 1 from the full distribution, 8 completions of
each prompt, and tokens behind the end of a completion do not count. generate is told use_cache=True: without it it is ten times slower, and a
checkpoint may say so silently. On the CPU, times are those of the processor, which other programs disturb least.

"unequal": a narrow random Qwen2 whose head has a bias that ends a completion with the same probability at every token, so lengths
are geometric: median 24, cut at 192. The bound of a decoding step on the GPU: all weights are read once and the keys and values of each
row up to its position, over the bandwidth of copying a large tensor, measured in the same run.
"""

import argparse
import json
import math
import pathlib
import sys
import time
from statistics import median

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from machine import machine
from transformers import Qwen2Config, Qwen2ForCausalLM

import arithmetic
import rollout
from rollout import TINY, load_policy

QWEN = {"0.5B": (896, 4864, 24, 14, 2), "1.5B": (1536, 8960, 28, 12, 2)}  # hidden, intermediate, layers, heads, key/value heads


def ours(model, prompts, n, T, eos_ids, seed):
    groups = rollout.sample(model, prompts, n, T, 1.0, eos_ids, torch.Generator().manual_seed(seed))
    return [completion for group in groups for completion in group]


@torch.inference_mode()
def generate(model, prompts, n, T, eos_ids, seed):
    """The same by transformers: prompts padded on the left, then one call."""
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=T, num_return_sequences=n,
                         eos_token_id=sorted(eos_ids) or None, pad_token_id=0, use_cache=True)[:, width:].tolist()  # fmt: skip
    ends = [next((i + 1 for i, y in enumerate(row) if y in eos_ids), T) for row in out]
    return [row[:end] for row, end in zip(out, ends)]


def unequal(middle=24):
    """A narrow random model that ends a completion with probability p at every token: half of them within `middle` tokens."""
    torch.manual_seed(0)
    V, D, p = 512, 128, 1 - 0.5 ** (1 / middle)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=V, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, eos_token_id=0, pad_token_id=0, bos_token_id=None)).eval()  # fmt: skip
    model.lm_head = torch.nn.Linear(D, V)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[0] = math.log(p * (V - 1) / (1 - p))
    return model, [[1 + i % 500, 7, 3] for i in range(64)], 8, 8 * middle, {0}


def embedded():
    model, tokenizer, eos_ids = load_policy(TINY)
    return model, [tokenizer(prompt)["input_ids"] for prompt, _ in arithmetic.problems("heldout", 64)], 8, 40, eos_ids


def qwen(size, rows, device, T):
    """Qwen2.5's shape with random weights; nothing ends a completion, prompts of 64 to 128 tokens."""
    hidden, intermediate, layers, heads, kv = QWEN[size]
    config = Qwen2Config(vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv, tie_word_embeddings=True, max_position_embeddings=4096)  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model, [[1 + (7 * i + j) % 1000 for j in range(64 + 8 * (i % 9))] for i in range(rows // 8)], 8, T, set()


def compare(case, repeats):
    """Seconds of both in turn, and what they made. Each is called before, to warm up."""
    cpu = case[0].device.type == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    taken, made = {"ours": [], "generate": []}, {}
    for repeat in range(-1 if cpu else -2, repeats):  # on a GPU the second call records graphs
        for name, sampler in (("ours", ours), ("generate", generate)):
            if repeat < 0 and case[3] > 40 and cpu:  # long: a short call will do
                sampler(*case[:3], 40, *case[4:], 0)
                continue
            began = clock()
            made[name] = sampler(*case, max(repeat, 0))
            taken[name].append((clock() - began, sum(map(len, made[name]))))
    speeds = {name: [tokens / s for s, tokens in runs[-repeats:]] for name, runs in taken.items()}
    lengths = sorted(map(len, made["ours"]))
    return {
        "completions": len(lengths), "length, mean, median, longest": [sum(lengths) / len(lengths), median(lengths), lengths[-1]],
        "tokens a second": speeds, "ratio of medians": median(speeds["ours"]) / median(speeds["generate"]),
    }  # fmt: skip


def bandwidth(device):
    """Bytes a second of copying 1 GiB, read and write counted."""
    a = torch.empty(2**28, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    best = math.inf
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * a.nbytes / best


def bound(model, prompts, n, T, bytes_a_second):
    """Tokens a second if a step took as long as reading the weights once and the keys and values of each row up to its position."""
    c = model.config
    position = 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * 2  # bytes of a token's keys and values
    weights = sum(p.nbytes for p in model.parameters())
    read = sum(weights + position * n * sum(len(p) + t for p in prompts) for t in range(T))
    return len(prompts) * n * T / (read / bytes_a_second)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=QWEN, default="0.5B")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    o = parser.parse_args()
    figures = {"machine": machine()}
    if o.device == "cpu":
        torch.set_num_threads(1)
        figures |= {"alike": compare(embedded(), o.repeats), "unequal": compare(unequal(), min(o.repeats, 2))}
    else:
        rate = figures["bytes a second, copying"] = bandwidth(o.device)
        for rows in o.rows:
            case = qwen(o.size, rows, o.device, o.tokens)
            result = figures[f"{o.size}, {rows} rows"] = compare(case, min(o.repeats, 3))
            result["tokens a second, bound"] = bound(*case[:4], rate)
            result["share of the bound"] = median(result["tokens a second"]["ours"]) / result["tokens a second, bound"]
            print(json.dumps(result, indent=1), flush=True)
    name = "sampler.json" if o.device == "cpu" else f"sampler_cuda_{o.size}.json"
    (ROOT / "results" / name).write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
