"""Policies: a checkpoint folder or hub id, loaded, or one line that says what is wrong with it.

The embedded policy in tiny/ is an ordinary checkpoint and comes in by the same door as Qwen/Qwen2.5-0.5B.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

TINY = str(Path(__file__).parent / "tiny")
disable_progress_bar()  # one bar is enough: the one that shows the training
torch.backends.cuda.enable_cudnn_sdp(False)  # the default on some GPUs; it makes a plan for every shape, and no two micro-batches have the same


class PolicyError(ValueError):
    """A checkpoint that cannot serve as a policy; the message is one line for the user."""


def load_policy(name, device="cpu", dtype=torch.float32):
    """Model (in eval mode: no dropout), tokenizer and the set of end-of-sequence ids of a folder or hub id.

    Only safetensors are read, and no code that comes with a checkpoint is run.
    Raises PolicyError if there is no such checkpoint, if its weights are not those of its architecture, if it has no chat template,
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
    if (rope := (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")) in ("dynamic", "longrope"):
        raise PolicyError(f"--model {name}: its rotary embedding ({rope}) follows the longest row of a batch, so completions would depend on each other; take another model")
    return model.to(device).eval(), tokenizer, set(eos if isinstance(eos, list) else [eos])


def context(config):
    """The most tokens that prompt and completion may have together."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize
