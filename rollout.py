"""Sampling: prompts in, completions out.

1. Each prompt is read once (prefill), and its keys and values serve all of its n samples. On a CPU these have one row of the
   batch in common as long as they are the same; where they draw different tokens, the row is copied (`branch`).
2. Every row has a write position of its own in the key/value cache, so that prompts of different
   length need no padding on the left and no position is spent on it.
3. A step only writes into buffers that never move, so a GPU records it once as a CUDA graph, for each number of rows and
   bucket of lengths, and replays it: with new weights, too, as long as they are written in place.
4. A token is drawn by inverting the distribution function at a uniform random number: it is the first a with
   sum_{a' <= a} p(a') > u.  The uniform numbers belong to (prompt, sample, position), so a completion does not
   depend on what else is being sampled, in which order, on how many processes.
5. Rows that have ended leave: on a CPU at once, on a GPU, which looks at every eighth token, when a quarter of
   them is idle, so that there are few sizes to record.

Sampling is by temperature alone. Top-k or top-p would draw from another distribution than the one
whose log-probs the loss uses. A row ends with any of the end-of-sequence ids that the checkpoint's
generation_config lists; that token is part of the completion, for stopping is an action too.

    python rollout.py      samples from the embedded policy
"""

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache
from transformers.utils.logging import disable_progress_bar

from data import UserError

# ---------------------------------------------------------------- loading

TINY = str(Path(__file__).parent / "tiny")
disable_progress_bar()  # one bar is enough: the one that shows the training
torch.backends.cuda.enable_cudnn_sdp(False)  # the default on some GPUs; it makes a plan for every shape, and no two micro-batches have the same


def load_policy(name, device="cpu", dtype=torch.float32):
    """Model (in eval mode: no dropout), tokenizer and the set of end-of-sequence ids of a folder or hub id.

    Only safetensors are read, and no code that comes with a checkpoint is run.
    Raises UserError if there is no such checkpoint, if its weights are not those of its architecture, if it has no chat template,
    no end-of-sequence id, fewer embeddings than its tokenizer has tokens, a sliding window, or a rotary embedding that follows the batch.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, attn_implementation="sdpa",
                                                             trust_remote_code=False, output_loading_info=True)  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged file of a checkpoint makes the libraries raise anything
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {name}: not a checkpoint folder or hub id that loads: {what}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"--model {name}: not the weights of a {type(model).__name__}: {missing[0]} and {len(missing) - 1} others are missing")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its model {model.get_input_embeddings().num_embeddings}")
    if tokenizer.chat_template is None:
        raise UserError(f"--model {name}: its tokenizer has no chat template; take an instruct checkpoint or add one")
    eos = model.generation_config.eos_token_id  # Qwen lists two; the tokenizer knows only one
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise UserError(f"--model {name}: no eos_token_id in generation_config.json nor in the tokenizer")
    layers = getattr(model.config, "layer_types", None)  # None: one kind of layer, windowed if sliding_window is set
    if "sliding_attention" in layers if layers else getattr(model.config, "sliding_window", None):
        raise UserError(f"--model {name}: it attends through a sliding window, which the sampler's cache does not do; take another model")
    if (rope := (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")) in ("dynamic", "longrope"):
        raise UserError(f"--model {name}: its rotary embedding ({rope}) follows the longest row of a batch, so completions would depend on each other; take another model")
    return model.to(device).eval(), tokenizer, set(eos if isinstance(eos, list) else [eos])


def context(config):
    """The most tokens that prompt and completion may have together."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


# ---------------------------------------------------------------- sampling



class RowCache(Cache):
    """R rows that are being completed, in buffers that never move: keys and values, and what else a step reads and writes.

    Per layer (R, capacity, heads, dim), only the first rows in use. A CUDA graph of a step refers to these buffers and to the weights
    by their addresses, so it serves for all later calls, and after updates in place.
    """

    def __init__(self, prefilled, R, capacity, T, eos_ids):
        super().__init__(layers=[SimpleNamespace() for _ in prefilled.layers])
        for mine, theirs in zip(self.layers, prefilled.layers):
            for name in ("keys", "values"):
                prompts = getattr(theirs, name)  # (P, heads, width, dim)
                setattr(mine, name, prompts.new_zeros(R, capacity, prompts.shape[1], prompts.shape[3]))
        self.R, self.capacity, self.T, self.eos_ids = R, capacity, T, eos_ids
        new = lambda dtype, *shape: torch.zeros(shape, dtype=dtype, device=prompts.device)
        self.token, self.position = new(torch.long, R), new(torch.long, R)  # of each row: its last id, and where that will be written
        self.who, self.ended = new(torch.long, R), new(torch.bool, R)  # the completions that go on; `draw` leaves their tokens in self.token
        self.noise, self.out, self.t = new(torch.float32, R, T), new(torch.long, R, T), new(torch.long, 1)  # t: which token is drawn next
        self.eos = torch.tensor(sorted(eos_ids), device=prompts.device)
        self.at, self.length = None, 0  # (R,) position in all rows one after another; how much of the cache attention has to read
        self.graphs, self.pool = {}, None

    def begin(self, prefilled, lengths, noise, n):
        """n rows of each prompt take over its keys and values. lengths: (P,), noise: (completions, T)."""
        (R, T), rows = noise.shape, len(lengths) * n
        for mine, theirs in zip(self.layers, prefilled.layers):
            for name in ("keys", "values"):
                buffer, prompts = getattr(mine, name), getattr(theirs, name).transpose(1, 2)
                buffer[:R, prompts.shape[1] :] = 0  # no mask hides what is not a number
                buffer[:rows, : prompts.shape[1]] = prompts.repeat_interleave(n, 0)
        self.position[:rows], self.who[:R], self.ended[:R] = lengths.repeat_interleave(n), torch.arange(R), False
        self.noise[:R, :T], self.t[:], self.length = noise, 0, prompts.shape[1]

    def update(self, k, v, layer, *_):
        """Called by the model's attention with k, v (R, heads, 1, dim); returns what to attend to."""
        buffers = self.layers[layer].keys, self.layers[layer].values
        for buffer, new in zip(buffers, (k, v)):
            buffer.flatten(0, 1).index_copy_(0, self.at, new[:, :, 0])
        return (buffer[: len(k), : self.length].transpose(1, 2) for buffer in buffers)

    def get_seq_length(self, layer=0):
        return self.length

    def keep(self, rows, completions):
        """The first rows become those with these indices, the first completions likewise; the others leave."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[moved, : self.length] = buffer[rows[moved], : self.length]
        for buffer, kept in (self.position, rows), (self.token, completions), (self.who, completions), (self.ended, completions):
            buffer[: len(kept)] = buffer[kept]

    def compact(self, n):
        """Those of n rows that have ended leave if they are many: how many rows go on. Each has a completion of its own."""
        fewer = rows_for(n, n - int(self.ended[:n].sum()))
        if fewer < n:
            alive = self.ended[:n].long().argsort(stable=True)[:fewer]  # and a few that are not
            self.keep(alive, alive)
        return fewer

    def branch(self, of):
        """Completions that were in one row and drew different tokens go on in rows of their own. of: (C,) the row that each was in.

        Returns the number of rows, and the row of each completion that goes on.
        """
        alive = (~self.ended[: len(of)]).nonzero()[:, 0]
        kinds, of = (of[alive] * 2**32 + self.token[alive]).unique(return_inverse=True)  # sorted by row, then by token
        n, parent = len(kinds), kinds >> 32
        # The first kind of each row stays in it, if that is among the first n; the others get what is free of these.
        stays = (parent < n) & (parent.diff(prepend=parent.new_tensor([-1])) != 0)
        free = torch.ones(n, dtype=torch.bool).index_fill_(0, parent[stays], False)
        place = parent.masked_scatter(~stays, free.nonzero()[:, 0])
        self.keep(parent[place.argsort()], alive)
        self.token[place] = kinds % 2**32
        return n, place[of]


BUFFERS = weakref.WeakKeyDictionary()  # model -> its RowCache, kept for the next call


def buffers(model, prefilled, R, length, T, eos_ids):
    """The model's RowCache: that of the calls before, or a larger one if it is too small."""
    s, like = BUFFERS.pop(model, None), prefilled.layers[0].keys
    fits = s and s.R >= R and s.capacity >= length and s.T >= T and s.eos_ids == eos_ids and s.layers[0].keys.dtype == like.dtype and s.eos.device == like.device
    if not fits:
        s = None  # gives its memory back first
        s = RowCache(prefilled, R, round_up(length, bucket(like.device)), T, set(eos_ids))
    BUFFERS[model] = s
    return s


def release(model):
    """Between rollouts: on a GPU, buffers of more than a sixteenth of its memory go, and the graphs with them; the update may need the room."""
    s = BUFFERS.get(model)
    if s and s.eos.is_cuda:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in s.layers)
        if held * 16 > torch.cuda.get_device_properties(s.eos.device).total_memory:
            del BUFFERS[model]


def next_token(logits, temperature, u, of=None):
    """A token for each of the uniform numbers u (C,) in [0, 1), from logits (n, V) -> (C,). Temperature 0 is greedy.

    of: (C,) which row of logits belongs to each; None: C = n, and they stand in the same order.
    """
    of = slice(None) if of is None else of
    if temperature == 0:
        return logits.argmax(-1)[of]
    cdf = torch.softmax(logits.float() / temperature, -1).cumsum(-1)[of]
    u = (u * cdf[:, -1])[:, None]  # the sum may differ from 1 by rounding
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def uniforms(prompts, n, max_new_tokens, generator=None):
    """The random numbers of a call to `sample`: (prompts, n, max_new_tokens), on the CPU."""
    return torch.rand(prompts, n, max_new_tokens, generator=generator)


def draw(s, logits, temperature, of=None):
    """The next token of the completions that go on, from logits (n, V); of: (C,) the row of each, None: each has its own."""
    C = len(logits) if of is None else len(of)
    who = s.who[:C]
    token = next_token(logits, temperature, s.noise[who, s.t], of)
    s.token[:C] = s.out[who, s.t] = token
    s.ended[:C] |= (token[:, None] == s.eos).any(1)
    s.t += 1


def decode(model, s, n, length, temperature, of=None):
    """One more token for the completions in the first n rows, reading `length` positions of the cache. It only writes into the buffers of s."""
    position = s.position[:n]
    s.at = torch.arange(n, device=model.device) * s.capacity + position
    ahead = torch.arange(length, device=model.device) > position[:, None]  # (n, length)
    mask = torch.zeros(n, length, dtype=model.dtype, device=model.device).masked_fill_(ahead, -torch.inf)
    hidden = model.base_model(
        input_ids=s.token[:n, None], position_ids=position[:, None], past_key_values=s,
        attention_mask=mask[:, None, None], use_cache=True,
    ).last_hidden_state  # fmt: skip
    position += 1
    draw(s, model.get_output_embeddings()(hidden[:, 0]), temperature, of)


def advance(model, s, n, length, temperature, of=None):
    """decode; on a GPU as a CUDA graph, one launch in place of hundreds. The first time as it is, the second time it is recorded."""
    s.length = length  # here, for a replay runs no Python
    if model.device.type != "cuda":
        return decode(model, s, n, length, temperature, of)
    arguments = n, length, temperature
    if arguments not in s.graphs:
        s.graphs[arguments] = None
        return decode(model, s, *arguments)
    if s.graphs[arguments] is None:
        s.pool = s.pool or torch.cuda.graph_pool_handle()  # one for all: none needs what another has left there
        s.graphs[arguments] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(s.graphs[arguments], pool=s.pool):
            decode(model, s, *arguments)
    s.graphs[arguments].replay()


def round_up(length, multiple):
    """The least multiple that is not below `length`."""
    return -(-length // multiple) * multiple


def bucket(device):
    """Attention reads the cache up to the longest row, rounded up to this; on a GPU every length is a graph of its own."""
    return 128 if device.type == "cuda" else 16


def rows_for(n, alive):
    """How many of n rows go on if so many are alive: 3/4 of n, 3/4 of that, ... so that batches come in few sizes."""
    while n > alive and alive <= n * 3 // 4:
        n = n * 3 // 4
    return n


def apart(device):
    """Whether every completion has a row of its own from the start: on a GPU, where to ask which ones are the same is to wait for it."""
    return device.type == "cuda"


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
    R, T = len(prompts) * n, max_new_tokens
    if noise is None:
        noise = uniforms(len(prompts), n, T, generator)

    # prefill: padding stands on the right, where causal attention never looks
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    prefill = model.base_model(input_ids=ids, use_cache=True)
    last = prefill.last_hidden_state[torch.arange(len(prompts), device=device), lengths - 1]
    s = buffers(model, prefill.past_key_values, R, width + T, T, eos_ids)
    own = apart(device)
    s.begin(prefill.past_key_values, lengths, noise.reshape(R, T).to(device), n if own else 1)
    del prefill
    of = torch.arange(len(prompts), device=device).repeat_interleave(n)  # in which row each completion is
    draw(s, model.get_output_embeddings()(last), temperature, of)

    rows = R
    for t in range(1, T):
        if not own:
            rows, of = s.branch(of)
        elif t % 8 == 0:  # to look at what a GPU has drawn is to wait for it
            rows = s.compact(rows)
        if rows == 0:
            break
        advance(model, s, rows, round_up(width + t, bucket(device)), temperature, None if own else of)

    out = s.out[:R, :T]
    ends = torch.isin(out, s.eos)
    count = torch.where(ends.any(1), ends.int().argmax(1) + 1, T).tolist()
    completions = [ids[:c] for ids, c in zip(out.tolist(), count)]
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
