"""A policy: loading it, and sampling from it.

1. Each prompt is read once (prefill), and its keys and values are copied to the n rows that complete it.
2. Every row has a write position of its own in the buffers of keys and values, so prompts of different
   length need no padding on the left, and a token's place in the buffers is its position.
3. A token is drawn by inverting the distribution function at a uniform random number u: it is the first a
   with sum_{a' <= a} p(a') > u.  The number belongs to (prompt, sample, position), so a completion does not
   depend on what else is being sampled, in which order, or on how many processes.
4. Rows that have ended leave, and the last rows move into their places.
5. A step only writes into buffers that never move. So a GPU records it once as a CUDA graph, for each number
   of rows and each length, and replays it, also with new weights if they are written in place.

Sampling is by temperature alone. Top-k or top-p would draw from another distribution than the one whose
log-probs the loss uses. A completion ends with any of the end-of-sequence ids. That token is part of it,
since stopping is an action too.

    python rollout.py      completions of the embedded policy, their rewards, and where their entropy is
"""

import functools
import sys
import weakref
from hashlib import sha256
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils.logging import disable_progress_bar

from data import UserError, one_line

# ---------------------------------------------------------------- loading

TINY = str(Path(__file__).parent / "tiny")
disable_progress_bar()  # one bar is enough: the one that shows the training
torch.backends.cuda.enable_cudnn_sdp(False)  # the default on some GPUs; it plans anew for every shape


def load_policy(name, device="cpu", dtype=torch.float32):
    """The policy in a folder or of a hub id: model (in eval mode), tokenizer, set of end-of-sequence ids.

    Only safetensors are read, and no code that comes with a checkpoint is run.
    Raises UserError if nothing loads from there, or if the model would be sampled or scored wrongly.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, attn_implementation="sdpa", trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        check_parts(model, tokenizer, loaded["missing_keys"])
        check_attention(model.config.get_text_config())
        check_logits(model.eval())
        eos_ids = end_of_sequence(model, tokenizer)
    except UserError as error:
        raise UserError(f"--model {name}: {error}") from None
    except Exception as error:  # a damaged file of a checkpoint makes the libraries raise anything
        raise UserError(f"--model {name}: no checkpoint that runs here: {one_line(error)}") from error
    return model.to(device), tokenizer, eos_ids


def check_parts(model, tokenizer, missing):
    """UserError if the checkpoint lacks weights, embeddings or a chat template, or mixes dtypes."""
    if missing:
        what = f"{min(missing)} and {len(missing) - 1} others are missing"
        raise UserError(f"not the weights of a {type(model).__name__}: {what}")
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(f"its tokenizer has {len(tokenizer)} tokens, its model {embeddings} embeddings")
    if tokenizer.chat_template is None:
        raise UserError("its tokenizer has no chat template; take an instruct checkpoint or add one")
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    if len(dtypes) > 1:
        raise UserError(f"its parameters have mixed dtypes: {', '.join(dtypes)}")


def check_attention(config):
    """UserError if a layer is not full attention, or if rotations depend on what else is in the batch."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # one kind of layer
        kinds = ["sliding_attention"] if getattr(config, "sliding_window", None) else ["full_attention"]
    if others := ", ".join(sorted(set(kinds) - {"full_attention"})):
        raise UserError(f"it has layers of {others}, and sampling only does full_attention")
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # one for all layers, or one for each kind of layer
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind in ("dynamic", "longrope"):
            raise UserError(f"its rotary embedding ({kind}) depends on the batch; take another model")


@torch.no_grad()
def check_logits(model):
    """UserError if the model does more than apply its head to hidden states, as scoring and sampling do."""
    head = model.get_output_embeddings()
    ids = torch.arange(9)[None] % head.weight.shape[0]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(head(hidden), logits, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise UserError("it scales, caps or else changes the logits of its head; take another model")


def end_of_sequence(model, tokenizer):
    """The set of ids that end a completion. UserError if there is none, or one that is no token."""
    own, size = tokenizer.eos_token_id, model.get_output_embeddings().weight.shape[0]
    eos = model.generation_config.eos_token_id
    eos = own if eos is None else eos
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(isinstance(i, int) and 0 <= i < size for i in ids):
        raise UserError(f"eos_token_id {eos} of generation_config.json or the tokenizer ends nothing")
    # A base model that was fine-tuned for chats may end its turns with the tokenizer's id, and still have the
    # generation_config of the base, whose id it never says. Either is an end.
    return set(ids) | {i for i in [own] if i is not None and 0 <= i < size}


def context(config):
    """The most tokens that prompt and completion may have together."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


# ---------------------------------------------------------------- rows and their buffers

# Every so many tokens, rows that have ended leave, down to a multiple of so many rows. Attention reads a
# multiple of so many positions. On a GPU these are not 1: to look at what was drawn is to wait for it, and
# each number of rows and of positions needs a graph of its own.
GRAIN_ON_CPU, GRAIN_ON_GPU = (1, 1, 1), (8, 32, 128)
BUFFERS = weakref.WeakKeyDictionary()  # model -> its Rows, kept for the next call


def round_up(number, multiple):
    """The least multiple that is not below `number`."""
    return -(-number // multiple) * multiple


class Rows(Cache):
    """R rows that are being completed: all that a step reads and writes but the weights.

    The keys and values of each layer are (R, heads, capacity, dim). The first rows are in use. A CUDA graph
    refers to buffers and weights by their addresses, so it serves later calls too.
    """

    def __init__(self, prefilled, R, capacity, T, eos_ids):
        cpu = prefilled.layers[0].keys.device.type == "cpu"
        self.look, self.some_rows, self.some_positions = GRAIN_ON_CPU if cpu else GRAIN_ON_GPU
        capacity = round_up(capacity, self.some_positions)
        super().__init__(layers=[DynamicLayer() for _ in prefilled.layers])
        for mine, theirs in zip(self.layers, prefilled.layers):
            for name in ("keys", "values"):
                prompts = getattr(theirs, name)  # (P, heads, width, dim)
                setattr(mine, name, prompts.new_zeros(R, prompts.shape[1], capacity, prompts.shape[3]))
        self.size, self.kind = (R, capacity, T), (prompts.dtype, prompts.device, eos_ids)
        # Of each row: its last token, the position where that will be written, which completion it is, how
        # many tokens that has, and whether it has ended.
        self.state = prompts.new_zeros(5, R, dtype=torch.long)
        self.token, self.position, self.who, self.count, self.ended = self.state
        self.noise = prompts.new_zeros(R, T, dtype=torch.float32)  # of each completion
        self.out = prompts.new_zeros(R, T, dtype=torch.long)
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=prompts.device)
        self.length = 0  # how many positions attention reads
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle() if prompts.is_cuda else None

    def begin(self, prefilled, lengths, noise, n):
        """n rows of each prompt take over its keys and values. lengths: (P,), noise: (R, T)."""
        (R, T), self.length = noise.shape, prefilled.layers[0].keys.shape[2]
        for mine, theirs in zip(self.layers, prefilled.layers):
            for buffer, prompts in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                buffer[:R, :, self.length :] = 0  # what an earlier call left may be NaN, which no mask hides
                buffer[:R, :, : self.length] = prompts.repeat_interleave(n, 0)
        self.state.zero_()
        self.position[:R] = lengths.repeat_interleave(n)
        self.who[:R] = torch.arange(R, device=lengths.device)
        self.noise[:R, :T] = noise

    def update(self, keys, values, layer, *_):
        """The model's attention gives those of a new token, (n, heads, 1, dim), and gets all so far."""
        n, layer = len(keys), self.layers[layer]
        row, position = torch.arange(n, device=keys.device), self.position[:n]
        layer.keys[row, :, position] = keys[:, :, 0]
        layer.values[row, :, position] = values[:, :, 0]
        return layer.keys[:n, :, : self.length], layer.values[:n, :, : self.length]

    def compact(self, n):
        """Of n rows, those that have ended leave. Returns how many stay: the rest, rounded up."""
        ended = self.ended[:n].bool()
        m = round_up(n - int(ended.sum()), self.some_rows)
        if m >= n:
            return n
        moving = m + (~ended[m:]).nonzero()[:, 0]
        places = ended[:m].nonzero()[: len(moving), 0]
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[places, :, : self.length] = buffer[moving, :, : self.length]
        self.state[:, places] = self.state[:, moving]
        return m


def rows_for(model, prefilled, R, capacity, T, eos_ids):
    """The model's Rows from the calls before, with their graphs, or larger ones."""
    rows, like = BUFFERS.pop(model, None), prefilled.layers[0].keys
    same = rows is not None and rows.kind == (like.dtype, like.device, frozenset(eos_ids))
    if not same or any(have < need for have, need in zip(rows.size, (R, capacity, T))):
        rows = None  # gives its memory back first
        rows = Rows(prefilled, R, capacity, T, frozenset(eos_ids))
    BUFFERS[model] = rows
    return rows


def release(model):
    """Gives back buffers of more than a sixteenth of a GPU's memory: the update after it may need that."""
    rows = BUFFERS.get(model)
    if rows is not None and rows.state.is_cuda:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in rows.layers)
        if held * 16 > torch.cuda.get_device_properties(rows.state.device).total_memory:
            del BUFFERS[model]


# ---------------------------------------------------------------- a step


def next_token(logits, temperature, u):
    """A token for each uniform number u (n,) in [0, 1), from logits (n, V): (n,). Temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    u = (u * cdf[:, -1])[:, None]  # the sum may differ from 1 by rounding
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def draw(rows, logits, temperature):
    """The next token of the first rows, from logits (n, V)."""
    n = len(logits)
    who, count = rows.who[:n], rows.count[:n]
    token = next_token(logits, temperature, rows.noise[who, count])
    rows.token[:n] = rows.out[who, count] = token
    rows.ended[:n] |= (token[:, None] == rows.eos).any(1)
    count += 1


def decode(model, rows, n, length, temperature):
    """One more token for the first n rows; attention reads `length` positions. Only writes into `rows`."""
    position = rows.position[:n]
    ahead = torch.arange(length, device=position.device) > position[:, None]  # (n, length)
    mask = torch.zeros_like(ahead, dtype=rows.kind[0]).masked_fill_(ahead, -torch.inf)
    hidden = model.base_model(
        input_ids=rows.token[:n, None], position_ids=position[:, None], attention_mask=mask[:, None, None],
        past_key_values=rows, use_cache=True,
    ).last_hidden_state  # fmt: skip
    position += 1
    draw(rows, model.get_output_embeddings()(hidden[:, 0]), temperature)


def attend(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of one query a row, on a CPU, where two batched products are faster than the fused kernel.

    query: (n, heads, 1, dim), key and value: (n, kv_heads, length, dim). Returns (n, 1, heads, dim).
    """
    (n, heads, _, dim), (_, kv_heads, length, _) = query.shape, key.shape
    query = query.reshape(n * kv_heads, -1, dim)  # the query heads that share keys and values
    mask = attention_mask.expand(n, heads, 1, length).reshape(n * kv_heads, -1, length)
    scaling = dim**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(mask, query, key.flatten(0, 1).transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(n, 1, heads, -1), None


AttentionInterface.register("one_query", attend)


def record(step, pool):
    """A function that repeats on a GPU what `step` does: a CUDA graph, one launch in place of hundreds."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as NCCL's, may use the GPU meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph.replay


RECORD = {"cuda": record}  # device -> how a step is recorded there; taken out when that fails


def advance(model, rows, n, length, temperature):
    """`decode`, as a recording if there can be one."""
    step = functools.partial(decode, model, rows, n, length, temperature)
    rows.length = length  # here and not in the step, for a replay runs no Python
    replay = rows.graphs.get((n, length, temperature))
    if replay:
        replay()
    elif rows.state.device.type in RECORD:
        record_and_compare(rows, n, (n, length, temperature), step)
    else:
        step()


def record_and_compare(rows, n, key, step):
    """Takes the step, and records it for later. No more recordings if this fails or draws other tokens."""
    before, problem = rows.state.clone(), None
    step()  # as it is; this also does what is only done the first time, and cannot be recorded
    plain = rows.state.clone()
    rows.state.copy_(before)
    try:
        rows.graphs[key] = RECORD[rows.state.device.type](step, rows.pool)
        rows.graphs[key]()
        agree = (rows.state == plain)[:, :n].float().mean(1).min()
        if agree < 0.9:  # a recording may use other kernels, whose rounding changes a token here and there
            problem = "a recorded step draws other tokens"
    except RuntimeError as error:
        problem = one_line(error)
    if problem:
        print(f"warning: sampling goes on without CUDA graphs, more slowly: {problem}", file=sys.stderr)
        del RECORD[rows.state.device.type]
        rows.graphs.clear()
        rows.state.copy_(before)
        step()


# ---------------------------------------------------------------- sampling


def seeded(*key):
    """A CPU generator that depends on the key alone, such as (seed, step, purpose): no state to be saved."""
    digest = sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.inference_mode()
def sample(model, prompts, n, max_new_tokens, temperature, eos_ids, generator=None, noise=None):
    """n completions of each prompt.

    prompts: list of P lists of ids. temperature: 0 is greedy, 1 the policy itself. eos_ids: any of them ends
    a completion, and is its last id. noise: the uniform numbers (P, n, max_new_tokens), if they are not to be
    drawn here from `generator`, a CPU generator.
    Returns P lists of n completions (lists of ids), in the order of the prompts. A completion of
    max_new_tokens ids that does not end with one of eos_ids was truncated. ValueError for an empty prompt.
    """
    if not prompts:
        return []
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    device, R, T = model.device, len(prompts) * n, max_new_tokens
    if noise is None:
        noise = torch.rand(len(prompts), n, T, generator=generator)

    # Prefill. Padding stands on the right, where causal attention never looks.
    lengths, width = torch.tensor([len(p) for p in prompts], device=device), max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    prefill = model.base_model(input_ids=ids, use_cache=True)
    last = prefill.last_hidden_state[torch.arange(len(prompts), device=device), lengths - 1]
    rows = rows_for(model, prefill.past_key_values, R, width + T, T, eos_ids)
    rows.begin(prefill.past_key_values, lengths, noise.reshape(R, T).to(device), n)
    del prefill
    draw(rows, model.get_output_embeddings()(last).repeat_interleave(n, 0), temperature)

    alive = R
    if device.type == "cpu":
        model.set_attn_implementation("one_query")
    try:
        for t in range(1, T):
            if t % rows.look == 0:
                alive = rows.compact(alive)
            if alive == 0:
                break
            advance(model, rows, alive, round_up(width + t, rows.some_positions), temperature)
    finally:
        model.set_attn_implementation("sdpa")

    out = rows.out[:R, :T]
    ends = torch.isin(out, rows.eos)
    count = torch.where(ends.any(1), ends.int().argmax(1) + 1, T).tolist()
    completions = [ids[:c] for ids, c in zip(out.tolist(), count)]
    return [completions[i : i + n] for i in range(0, R, n)]


def main():
    """Completions of the embedded policy, their rewards, and the tokens that hold most of their entropy."""
    from arithmetic import problems
    from entropy import score
    from reward import grade

    model, tokenizer, eos_ids = load_policy(TINY)
    generator, entropies = torch.Generator().manual_seed(0), []
    for prompt, answer in problems("heldout", 8):
        ids = tokenizer(prompt)["input_ids"]
        completion = sample(model, [ids], 1, 40, 1.0, eos_ids, generator)[0][0]
        with torch.no_grad():
            H = score(model, [ids], [completion])[1][0].tolist()
        text = tokenizer.decode(completion, skip_special_tokens=True)
        open_ones = [f"{tokenizer.decode(token)} {h:.2f}" for token, h in zip(completion, H) if h > 0.1]
        print(f"{prompt}{text}   reward {grade(text, answer):.0f}\n    nats:", *open_ones)
        entropies += H
    many = [h for h in entropies if h > 0.1]
    print(f"{sum(many) / sum(entropies):.0%} of the entropy is at {len(many)} of {len(entropies)} tokens:"
          " where it is decided which pair to join, and with what result.")  # fmt: skip


if __name__ == "__main__":
    main()
