"""Sampling: prompts in, completions out.

1. Each prompt is read once (prefill) and its keys and values are shared by its n samples.
2. Every row has a write position of its own in the key/value cache, so that prompts of different
   length need no padding on the left and no position is spent on it.
3. A step feeds each row its last token and draws the next by inverting the distribution function at
   a uniform random number: token = the first a with  sum_{a' <= a} p(a') > u.  The uniform numbers
   belong to (prompt, sample, position), so a completion does not depend on what else is being sampled,
   in which order, on how many processes.
4. Rows that have ended leave: the batch is compacted when a quarter of it is idle.

Sampling is by temperature alone. Top-k or top-p would draw from another distribution than the one
whose log-probs the loss uses. A row ends with any of the end-of-sequence ids that the checkpoint's
generation_config lists; that token is part of the completion, for stopping is an action too.

    python rollout.py      samples from the embedded policy
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache
from transformers.utils.logging import disable_progress_bar

TINY = str(Path(__file__).parent / "tiny")
disable_progress_bar()  # one bar is enough: the one that shows the training
BUCKET = 32  # attention reads the cache up to the longest row, rounded up to this


class PolicyError(ValueError):
    """A checkpoint that cannot serve as a policy; the message is one line for the user."""


def load_policy(name, device="cpu", dtype=torch.float32):
    """Model (in eval mode: no dropout), tokenizer and the set of end-of-sequence ids of a folder or hub id.

    Only safetensors are read, and no code that comes with a checkpoint is run.
    Raises PolicyError if there is no such checkpoint, if its weights are not those of its architecture, if it has no chat template,
    no end-of-sequence id, fewer embeddings than its tokenizer has tokens, or a sliding window.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, attn_implementation="sdpa",
                                                             trust_remote_code=False, output_loading_info=True)  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged file of a checkpoint makes the libraries raise anything
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PolicyError(f"--model {name}: not a checkpoint folder or hub id that loads: {what}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise PolicyError(f"--model {name}: not the weights of a {type(model).__name__}: {missing[0]} and {len(missing) - 1} others are missing")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise PolicyError(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its model {model.get_input_embeddings().num_embeddings}")
    if tokenizer.chat_template is None:
        raise PolicyError(f"--model {name}: its tokenizer has no chat template; take an instruct checkpoint or add one")
    eos = model.generation_config.eos_token_id  # Qwen lists two; the tokenizer knows only one
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise PolicyError(f"--model {name}: no eos_token_id in generation_config.json nor in the tokenizer")
    layers = getattr(model.config, "layer_types", None)  # None: one kind of layer, windowed if sliding_window is set
    if "sliding_attention" in layers if layers else getattr(model.config, "sliding_window", None):
        raise PolicyError(f"--model {name}: it attends through a sliding window, which the sampler's cache does not do; take another model")
    return model.to(device).eval(), tokenizer, set(eos if isinstance(eos, list) else [eos])


def context(config):
    """The most tokens that prompt and completion may have together."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


class RowCache(Cache):
    """Keys and values of R rows, each written at a position of its own: per layer (R, heads, capacity, dim)."""

    def __init__(self, prefilled, copies, capacity):
        """Takes over the cache of the prompts, each of its rows `copies` times, with room for `capacity` positions."""
        super().__init__(layers=[SimpleNamespace() for _ in prefilled.layers])
        for mine, theirs in zip(self.layers, prefilled.layers):
            P, heads, length, dim = theirs.keys.shape
            for name in ("keys", "values"):
                buffer = theirs.keys.new_zeros(P * copies, heads, capacity, dim)
                buffer[:, :, :length] = getattr(theirs, name).repeat_interleave(copies, 0)
                setattr(mine, name, buffer)
        self.rows = self.positions = None  # (R,): 0 ... R - 1, and where the next token of each is written
        self.length = 0  # how much of the cache attention has to read

    def update(self, k, v, layer, *_):
        """Called by the model's attention with k, v (R, heads, 1, dim); returns what to attend to."""
        keys, values = self.layers[layer].keys, self.layers[layer].values
        keys[self.rows, :, self.positions] = k[:, :, 0]
        values[self.rows, :, self.positions] = v[:, :, 0]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self, layer=0):
        return self.length

    def keep(self, alive):
        """Drops all rows but those in `alive`, indices (R',)."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[alive], layer.values[alive]


def next_token(logits, temperature, u):
    """One token for each row: (R, V) logits and uniform numbers (R,) in [0, 1) -> (R,). Temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    u = (u * cdf[:, -1])[:, None]  # the sum may differ from 1 by rounding
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def uniforms(prompts, n, max_new_tokens, generator=None):
    """The random numbers of a call to `sample`: (prompts, n, max_new_tokens), on the CPU."""
    return torch.rand(prompts, n, max_new_tokens, generator=generator)


@torch.inference_mode()
def sample(model, prompts, n, max_new_tokens, temperature, eos_ids, generator=None, noise=None):
    """n completions of each prompt.

    prompts: list of lists of ids. temperature: 0 is greedy, 1 the policy itself. eos_ids: any of them ends a
    completion, and is its last id. noise: the uniform numbers (P, n, max_new_tokens) if they are not to be
    drawn here from `generator`, a CPU generator.
    Returns a list of P lists of n completions (lists of ids), in the order of the prompts. A completion of
    max_new_tokens ids that does not end with one of eos_ids was truncated. Raises ValueError for an empty prompt.
    """
    if not prompts:
        return []
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    device = model.device
    R = len(prompts) * n
    if noise is None:
        noise = uniforms(len(prompts), n, max_new_tokens, generator)
    noise = noise.reshape(R, max_new_tokens).to(device)
    eos = torch.tensor(sorted(eos_ids), device=device)
    head = model.get_output_embeddings()

    # prefill: padding stands on the right, where causal attention never looks
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    prefill = model.base_model(input_ids=ids, use_cache=True)
    last = prefill.last_hidden_state[torch.arange(len(prompts), device=device), lengths - 1]
    logits = head(last).repeat_interleave(n, 0)  # (R, V)

    cache = RowCache(prefill.past_key_values, n, width + max_new_tokens)
    cache.positions = lengths.repeat_interleave(n)
    cache.rows = row = torch.arange(R, device=device)  # row: which completion a row of the batch belongs to
    longest = width
    out = torch.zeros(R, max_new_tokens, dtype=torch.long, device=device)
    count = torch.full((R,), max_new_tokens, device=device)
    ended = torch.zeros(R, dtype=torch.bool, device=device)

    for t in range(max_new_tokens):
        token = next_token(logits, temperature, noise[row, t])
        out[row, t] = token
        ends = torch.isin(token, eos) & ~ended
        count[row[ends]] = t + 1
        ended |= ends
        if ended.all() or t + 1 == max_new_tokens:
            break
        if ended.float().mean() >= 0.25:
            alive = (~ended).nonzero()[:, 0]
            cache.keep(alive)
            row, token, ended, cache.positions = row[alive], token[alive], ended[alive], cache.positions[alive]
            cache.rows = torch.arange(len(row), device=device)
        longest += 1
        cache.length = min(-(-longest // BUCKET) * BUCKET, width + max_new_tokens)
        visible = torch.arange(cache.length, device=device) <= cache.positions[:, None]  # (R, length)
        hidden = model.base_model(
            input_ids=token[:, None], position_ids=cache.positions[:, None], past_key_values=cache,
            attention_mask=visible[:, None, None], use_cache=True,
        ).last_hidden_state  # fmt: skip
        cache.positions = cache.positions + 1
        logits = head(hidden[:, 0])

    out, count = out.tolist(), count.tolist()
    completions = [ids[:c] for ids, c in zip(out, count)]
    return [completions[i : i + n] for i in range(0, R, n)]


def main():
    from arithmetic import problems

    model, tokenizer, eos_ids = load_policy(TINY)
    prompts = [prompt for prompt, _ in problems("heldout", 16)][4:8]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    generator = torch.Generator().manual_seed(0)
    for prompt, group in zip(prompts, sample(model, ids, 4, 40, 1.0, eos_ids, generator)):
        print(prompt, *(tokenizer.decode(completion, skip_special_tokens=True) for completion in group), sep="\n    ")


if __name__ == "__main__":
    main()
