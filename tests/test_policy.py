"""What policy.py promises: policies that load as they are used, or one line that says why not."""

import json
import shutil

import pytest
import torch

from entropy import score
from rollout import TINY, load_policy
from rollout import sample
from data import UserError


def variant(checkpoint, folder, **changes):
    """A copy of a checkpoint whose JSON files are changed: {file: function of its content}."""
    shutil.copytree(checkpoint, folder)
    for name, change in changes.items():
        path = folder / f"{name}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return folder


def refused(folder):
    with pytest.raises(UserError) as error:
        load_policy(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def test_a_folder_with_qwens_tokenizer_loads_with_both_its_end_of_sequence_ids(qwen_checkpoint):
    model, tokenizer, eos_ids = load_policy(str(qwen_checkpoint))
    assert eos_ids == {151645, 151643}  # of generation_config.json; the tokenizer and config.json know one
    assert tokenizer.eos_token_id == model.config.eos_token_id == 151645
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1+1?"}], add_generation_prompt=True)["input_ids"]
    assert 151645 in ids  # it stands in every chat prompt
    groups = sample(model, [ids], 2, 4, 1.0, eos_ids, torch.Generator().manual_seed(0))
    assert [len(c) for c in groups[0]] == [4, 4]


def test_a_policy_is_in_eval_mode_and_fp32_and_on_the_device_asked_for(qwen_checkpoint, tmp_path):
    folder = variant(qwen_checkpoint, tmp_path / "dropout", config=lambda c: c.update(attention_dropout=0.9, dtype="bfloat16"))
    model, _, _ = load_policy(str(folder))
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(*(score(model, [[1, 2, 3]], [[4, 5]])[0] for _ in range(2)))


def test_one_end_of_sequence_id_is_a_set_of_one_and_the_tokenizers_is_taken_where_there_is_no_other(qwen_checkpoint, tmp_path):
    one = variant(qwen_checkpoint, tmp_path / "one", generation_config=lambda c: c.update(eos_token_id=151643))
    assert load_policy(str(one))[2] == {151643}
    none = variant(qwen_checkpoint, tmp_path / "none", generation_config=lambda c: c.pop("eos_token_id"),
                   config=lambda c: c.update(eos_token_id=None))  # fmt: skip
    assert load_policy(str(none))[2] == {151645}


def test_a_policy_that_cannot_stop_or_chat_or_is_not_there_is_refused_in_one_line(qwen_checkpoint, qwen_tokenizer, tmp_path):
    refused(tmp_path / "nowhere")
    refused(qwen_tokenizer)  # no weights
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    mute = variant(qwen_checkpoint, tmp_path / "mute", tokenizer_config=lambda c: c.pop("chat_template"))
    assert "chat template" in refused(mute)
    endless = variant(
        qwen_checkpoint, tmp_path / "endless", generation_config=lambda c: c.pop("eos_token_id"),
        config=lambda c: c.update(eos_token_id=None), tokenizer_config=lambda c: c.update(eos_token=None),
        special_tokens_map=lambda c: c.pop("eos_token"),
    )  # fmt: skip
    assert "eos_token_id" in refused(endless)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_follows_the_longest_row_of_a_batch_is_refused(qwen_checkpoint, tmp_path, kind):
    more = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32} if kind == "longrope" else {}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0} | more
    folder = variant(qwen_checkpoint, tmp_path / kind, config=lambda c: c.update(rope_parameters=rope))
    assert kind in refused(folder)


def test_on_a_gpu_attention_is_not_left_to_what_plans_anew_for_every_shape():
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_a_folder_whose_files_are_broken_is_refused_in_one_line(qwen_checkpoint, tmp_path):
    folder = variant(qwen_checkpoint, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(folder)


# ---------------------------------------------------------------- the embedded policy


def test_the_embedded_policy_spells_every_problem_and_chain_of_thought():
    from arithmetic import chain_of_thought, correct, problems

    model, tokenizer, eos_ids = load_policy(TINY)
    assert len(tokenizer) == model.config.vocab_size < 32 and eos_ids == {tokenizer.eos_token_id}
    for prompt, _ in problems("heldout", 64):
        for text in (prompt, chain_of_thought(prompt, correct)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text and not set(ids) & eos_ids
        assert tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True) == prompt
