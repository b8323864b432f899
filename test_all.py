"""Invariants, on the CPU, without network:    python -m pytest -q test_all.py"""
import contextlib
import copy
import dataclasses
import functools
import http.server
import io
import json
import math
import multiprocessing.forkserver
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import unittest.mock
import warnings
import zlib

import jiwer
import numpy as np
import peft
import pytest
import safetensors.torch
import sklearn.metrics
import soundfile
import torch
import torch.nn.functional as F
import transformers
from tokenizers.pre_tokenizers import ByteLevel

import data
import experts
import heads
import infer
import model
from data import (Manifest, Mixture, Rows, Tones, allot, at_rate, collate, make_row, plan_stage,
                  read_audio)
from experts import (EXPERTS, TOKEN_RATE, Affect, Expert, ExpertUnavailable, SoundEvents, SpeechUnits, load,
                     resample_frames)
from model import (BACKBONES, IGNORE, InputError, build_inputs, load_backbone, load_coat, n_audio_tokens,
                   render_prompt)

HERE = os.path.dirname(os.path.abspath(__file__))
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


# Flags of a run in seconds: two stages, made tones.
SHORT = ["--stage", "4:recon", "--stage", "4:recon,pitch", "--batch", 4, "--calibrate", 4, "--workers", 0, "--heldout", 2]


def noise(seconds, seed=0):
    return 0.1 * torch.randn(round(seconds * 16000), generator=torch.Generator().manual_seed(seed))


def run_path(program, args):
    sys.argv = [program, *map(str, args)]
    runpy.run_path(os.path.join(HERE, program), run_name="__main__")


def run(program, *args, fails=False):
    """Runs one of our programs here (starting Python and its imports takes 4 s) -> what it printed. fails: it must end in
    one line that says why, and a status that is not 0."""
    out, err, status, argv, handler = io.StringIO(), io.StringIO(), 0, sys.argv, signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_path(program, args)
    except SystemExit as e:
        status = e.code or 0
    except (InputError, experts.ExpertUnavailable) as e:    # what one_line_errors prints, see the next function
        status = 1
        err.write(f"error: {e}")
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    assert bool(status) == fails, err.getvalue()[-2000:]
    lines = [line for line in err.getvalue().strip().splitlines() if not re.search("^usage:|Loading weights", line)]
    assert not fails or len(lines) == 1, lines
    return err.getvalue() if fails else out.getvalue()


# Processes of a server that has the imports done: a fork of this one, which has used its threads, could not train.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_all"])


@pytest.fixture(scope="session", autouse=True)
def server():
    multiprocessing.forkserver.ensure_running()    # it imports while the first tests run


def child(target, log, args, env):
    multiprocessing.set_start_method("fork", force=True)    # of data processes, as anywhere else
    torch.set_num_threads(1)                                # a fork waits for more for ever
    os.environ.update(env)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    target(*args)


def start(target, log, *args, **env):
    """A process that runs target(*args) and prints to the file `log`."""
    process = PROCESSES.Process(target=child, args=(target, str(log), args, env))
    process.log = str(log)
    open(log, "w").close()
    process.start()
    return process


def ended(*processes, status=0):
    for process in processes:
        process.join(60)
        process.kill()    # if it hangs
        assert process.exitcode == status, open(process.log).read()[-2000:]


def train(*args):
    run_path("train.py", args)


@pytest.fixture(scope="session")
def rows():
    """Four rows of unequal length, one longer than tiny's 4 s window, one without audio."""
    return ([noise(1.3, 1), noise(5.21, 2), None, noise(0.5, 3)], ["Which note?", "How many?", "Say hello.", "What?"],
            ["C", "three of them", "hello", "a dog"])


# ----------------------------------------------------------------------------------------------------------------------
# Backbones: `tiny`, and folders laid out like the three real ones on the hub: the real classes, towers with their real
# windows, random weights of next to no width, and a byte-level tokenizer.

# Renders what the released templates render for text and audio (the Omni one, without pictures and video; that of AF3
# puts the sound first wherever it stands). Qwen2-Audio's is in its processor class.
TEMPLATE = """{%% if messages[0]['role'] != 'system' %%}<|im_start|>system
You are a helpful assistant.<|im_end|>
{%% endif %%}{%% for m in messages %%}<|im_start|>{{ m['role'] }}
{%% if m['content'] is string %%}{{ m['content'] }}{%% else %%}{%% for c in m['content'] if c['type'] == 'audio' %%}%s\
{%% endfor %%}{%% for c in m['content'] if c['type'] == 'text' %%}{{ c['text'] }}{%% endfor %%}{%% endif %%}<|im_end|>
{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant
{%% endif %%}"""
QWEN = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
OLD = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""}
# Tokens after the text ones; rows of the table that no token uses; seconds of the feature extractor; chat template; how
# names in the model begin, and how they do in the published files (the first that fits).
LAYOUTS = {
    "qwen2-audio": (QWEN, 20, 30, None, OLD),
    "qwen2.5-omni": (QWEN, 20, 300, TEMPLATE % "<|audio_bos|><|AUDIO|><|audio_eos|>",
                     {"model.language_model.": "thinker.model.", "lm_head.": "thinker.lm_head.", "model.": "thinker."}),
    "audio-flamingo-3": (["<sound>", "[BOS]", "[PAD]"], 0, 30, TEMPLATE % "<sound>", OLD),
}


def tiny_hub(name, folder, seed=0):
    """Writes config, weights, tokenizer, feature extractor and chat template of backbone `name` into `folder`."""
    tokens, spare, seconds, template, renames = LAYOUTS[name]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tokens]
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()) + special)}
    named = dict(zip(("audio_token", "audio_bos_token", "audio_eos_token"), tokens if tokens == QWEN else ()))
    transformers.Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:],
                                pad_token=special[0 if named else -1],
                                model_specific_special_tokens=named).save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=seconds, return_attention_mask=True)
    extractor.save_pretrained(folder)
    if template:
        with open(os.path.join(folder, "chat_template.json"), "w") as file:
            json.dump({"chat_template": template}, file)

    text = dict(vocab_size=len(vocab) + spare, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2 if name == "qwen2-audio" else 1,
                max_position_embeddings=8192, initializer_range=64 ** -0.5, pad_token_id=None)
    audio = dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
                 initializer_range=128 ** -0.5)
    audio_id = vocab[tokens[0]]
    if name == "qwen2-audio":
        config = transformers.Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=audio_id)
        model_class = transformers.Qwen2AudioForConditionalGeneration
    elif name == "audio-flamingo-3":
        config = transformers.AudioFlamingo3Config(text_config=text, audio_config=audio, audio_token_id=audio_id)
        model_class = transformers.AudioFlamingo3ForConditionalGeneration
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}    # of a head's width / 2
        config = transformers.Qwen2_5OmniThinkerConfig(
            text_config=text | {"rope_parameters": rope}, audio_config=audio | {"output_dim": 64},
            vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64),
            audio_token_index=audio_id, image_token_index=1, video_token_index=2, initializer_range=64 ** -0.5)
        config.vision_start_token_id = 3    # a field of the published config, not of the class
        model_class = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = model_class(config).state_dict()
    published = {}
    for key, value in weights.items():
        old = next(old for old in renames if key.startswith(old))
        published[renames[old] + key[len(old):]] = value.contiguous()
    config = config.to_dict() | {"architectures": [model_class.__name__]}
    if name == "qwen2.5-omni":
        config = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "thinker_config": config}
        published |= {"talker.model.norm.weight": torch.ones(8), "token2wav.code2wav_bigvgan_model.x": torch.ones(8)}
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)
    safetensors.torch.save_file(published, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


NAMES = list(LAYOUTS)    # of the real ones
HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TAIL = "What is it?<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {    # as the published chat templates render them
    "qwen2-audio": HEAD + "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n" + TAIL,
    "qwen2.5-omni": HEAD + "<|audio_bos|><|AUDIO|><|audio_eos|>" + TAIL,
    "audio-flamingo-3": HEAD + "<sound>" + TAIL,
}
PROMPTS["tiny"] = PROMPTS["qwen2-audio"]


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """{name: folder}, None for tiny, which is built in memory"""
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in NAMES}
    for name, folder in folders.items():
        tiny_hub(name, folder)
    return folders | {"tiny": None}


def loaded(name, folder, **kwargs):
    """With adapters that do something (a fresh LoRA is zero)."""
    torch.manual_seed(1)
    coat = load_coat(name, model_path=folder, trainable=True, **kwargs)
    with torch.no_grad():
        for key, p in coat.named_parameters():
            if "lora_B" in key or "trainable_tokens_delta" in key:
                p.add_(0.05 * torch.randn_like(p))
    return coat.eval()


@pytest.fixture(scope="session", params=["tiny", *NAMES])
def coat(request, hub):
    return loaded(request.param, hub[request.param])


@pytest.fixture(scope="session")
def tiny():
    return load_coat("tiny")


def greedy(coat, batch, n=8):
    return torch.stack(list(coat.stream(batch, n, stop=False)), 1)


# ----------------------------------------------------------------------------------------------------------------------
# model.py

def test_training_ids_up_to_the_response_equal_inference_ids(coat, rows):
    waves, prompts, responses = rows
    for wave, prompt, response in zip(waves, prompts, responses):
        asked = build_inputs(coat, [wave], [prompt])
        trained = build_inputs(coat, [wave], [prompt], [response])
        n = asked["input_ids"].shape[1]
        assert torch.equal(trained["input_ids"][:, :n], asked["input_ids"])
        assert (trained["labels"][:, :n] == IGNORE).all() and (trained["labels"][:, n:] != IGNORE).all()
        text = coat.processor.tokenizer.decode(asked["input_ids"][0])
        block = "".join(["<|audio_think_start|>"] + ["<|audio_think|>"] * int(asked["n_audio"][0]) + ["<|audio_think_end|>"])
        assert text.endswith("<|im_start|>assistant\n" + block * (wave is not None))


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_decode_to_the_response_and_eos(coat, rows, side):
    batch = build_inputs(coat, *rows, padding_side=side)
    for labels, mask, response in zip(batch["labels"], batch["attention_mask"], rows[2]):
        assert coat.processor.tokenizer.decode(labels[labels != IGNORE]) == response + "<|im_end|>"
        assert (labels[mask == 0] == IGNORE).all() and mask[0 if side == "right" else -1] == 1


def test_batch_of_4_equals_4_singles(coat, rows):
    batch = build_inputs(coat, *rows)
    with torch.no_grad():
        out = coat(batch)
        singles = [coat(build_inputs(coat, *[[column[i]] for column in rows])) for i in range(4)]
    assert sum(s.n_targets for s in singles) == out.n_targets
    torch.testing.assert_close(sum(s.ce_sum for s in singles), out.ce_sum, rtol=1e-5, atol=1e-4)
    for i, single in enumerate(singles):
        n = int(batch["n_audio"][i])
        for both in ("think_states", "audio_embeds"):
            torch.testing.assert_close(getattr(out, both)[i, :n], getattr(single, both)[0], rtol=1e-4, atol=1e-4)
        assert not out.think_states[i, n:].any()
    for think in (True, False):
        together = torch.stack(list(coat.stream(build_inputs(coat, *rows[:2], think=think), 6)), 1)
        for i in range(4):
            alone = torch.stack(list(coat.stream(build_inputs(coat, [rows[0][i]], [rows[1][i]], think=think), 6)), 1)[0]
            assert together[i, :len(alone)].tolist() == alone.tolist()


def test_left_and_right_padding_give_the_same_loss_and_states(coat, rows):
    with torch.no_grad():
        left, right = (coat(build_inputs(coat, *rows, padding_side=side)) for side in ("left", "right"))
    torch.testing.assert_close(left.ce_sum, right.ce_sum, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(left.think_states, right.think_states, rtol=1e-4, atol=1e-4)


def test_one_prefill_holds_the_block_and_decode_steps_are_those_of_the_baseline(coat):
    calls = {}
    for think in (True, False):
        seen = calls[think] = []
        hooks = [coat.hf.model.language_model.register_forward_pre_hook(
                     lambda m, a, kw: seen.append(kw["inputs_embeds"].shape[1]), with_kwargs=True),
                 coat.hf.model.audio_tower.register_forward_pre_hook(lambda m, a, kw: seen.append("tower"), with_kwargs=True)]
        batch = build_inputs(coat, [noise(2.0)], ["?"], think=think)
        n = len(list(coat.stream(batch, 7, stop=False)))
        for hook in hooks:
            hook.remove()
        assert n == 7 and seen[0] == "tower" and seen[1] == batch["input_ids"].shape[1] and seen[2:] == [1] * 6
    assert calls[True][1] == calls[False][1] + 50 + 2


def test_cached_greedy_equals_uncached_and_transformers_generate(coat):
    batch = build_inputs(coat, [noise(1.0), noise(2.2, 5)], ["Which?", "Which note is it?"])
    ours = torch.stack(list(coat.stream(batch, 6, stop=False)), 1)
    again, longer = [], {k: v for k, v in batch.items()}
    for _ in range(6):
        with torch.no_grad():
            logits = coat.hf.lm_head(coat.states(longer)[0][:, -1])
        logits[:, coat.think_ids] = -torch.inf
        again.append(logits.argmax(-1))
        longer["input_ids"] = torch.cat([longer["input_ids"], again[-1][:, None]], 1)
        longer["attention_mask"] = F.pad(longer["attention_mask"], (0, 1), value=1)
        longer["position_ids"] = (longer["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(ours, torch.stack(again, 1))
    theirs = coat.hf.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **batch["audio"],
                              do_sample=False, max_new_tokens=6, min_new_tokens=6, suppress_tokens=coat.think_ids)
    assert torch.equal(ours, theirs[:, batch["input_ids"].shape[1]:])


def test_a_compiled_step_says_the_same_and_is_compiled_once_for_all_lengths(monkeypatch):
    coat = load_coat("tiny")
    batches = [build_inputs(coat, [noise(s), noise(s / 2)], ["?", "Which note is it?"]) for s in (1.0, 2.2)]
    plain = [greedy(coat, batch) for batch in batches]
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    coat.compile_decode(backend="eager")
    assert all(torch.equal(greedy(coat, batch), ids) for batch, ids in zip(batches, plain))


def test_rows_that_have_ended_yield_padding_and_the_last_one_ends_the_stream(tiny, monkeypatch):
    batch = build_inputs(tiny, [noise(1.0), noise(2.2, 5)], ["Which?", "Which note is it?"])
    free = greedy(tiny, batch, 12)
    eos = tiny.processor.tokenizer.convert_ids_to_tokens([free[0, 2], free[1, 4]])
    monkeypatch.setattr(tiny, "backbone", dataclasses.replace(tiny.backbone, eos=tuple(eos)))
    ids = torch.stack(list(tiny.stream(batch, 12)), 1)
    assert ids.shape[1] == 5 and torch.equal(ids[0, :3], free[0, :3]) and torch.equal(ids[1], free[1, :5])
    assert (ids[0, 3:] == tiny.processor.tokenizer.pad_token_id).all()


def test_response_only_ce_equals_the_loss_of_transformers(coat, rows):
    batch = build_inputs(coat, *rows)
    with torch.no_grad():
        out = coat(batch)
        theirs = coat.hf(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "labels")}, **batch["audio"])
    torch.testing.assert_close(out.ce_sum / out.n_targets, theirs.loss, rtol=1e-5, atol=1e-6)


def test_two_clips_give_different_logits_and_thinking_tokens_are_never_said(coat):
    first, second = (build_inputs(coat, [noise(1.0, s)], ["Which?"]) for s in (1, 2))
    assert torch.equal(first["input_ids"], second["input_ids"])
    with torch.no_grad():
        a, b = (coat.hf.lm_head(coat.states(batch)[0][:, -1]) for batch in (first, second))
    assert (a - b).abs().max() > 1e-2
    with torch.no_grad():
        tempted = copy.deepcopy(coat)
        tempted.hf.lm_head.weight[coat.think_ids] = 100 * tempted.states(first)[0][0, -1]
    assert all(token.item() not in coat.think_ids for token in tempted.stream(first, 5))


@pytest.mark.parametrize("wave, words", [(noise(0.02), "0.02 s"), (torch.zeros(121 * 16000), "121.00 s")])
def test_clip_out_of_range_is_refused_by_the_builder(tiny, wave, words):
    with pytest.raises(InputError, match=words):
        build_inputs(tiny, [wave], ["?"])


def test_prompt_is_the_published_one(coat):
    assert render_prompt(coat, "What is it?", 1) == PROMPTS[coat.name]
    assert render_prompt(coat, "What is it?", 0) == HEAD + TAIL
    many = render_prompt(coat, "What is it?", 3)
    assert many.count(coat.backbone.audio_token) == 3 and many.replace(coat.backbone.audio_token * 3, "") \
        == PROMPTS[coat.name].replace(coat.backbone.audio_token, "")


def test_block_has_L_a_tokens_from_a_tenth_of_a_second_to_two_minutes(coat):
    window = 16000 * (coat.backbone.piece_seconds if coat.name == "tiny" else 30)
    lengths = [1600, 1601, 15999, window - 1, window, window + 1, window + 100, window + 480, 2 * window + 7 * 160,
               77 * 16000 + 5, 120 * 16000]
    batch = build_inputs(coat, [torch.zeros(n) for n in lengths], ["?"] * len(lengths))
    want = torch.tensor([n_audio_tokens(n) for n in lengths])
    for counted in (batch["n_audio"], batch["audio_mask"].sum(1), batch["think_mask"].sum(1)):
        assert torch.equal(counted, want)
    assert batch["input_ids"].shape[1] < coat.hf.config.get_text_config().max_position_embeddings


def test_closed_form_of_L_a_is_that_of_the_towers():
    frames = np.arange(3, 3001)
    assert [n_audio_tokens(160 * f) for f in frames] == [((f - 1) // 2 + 1 - 2) // 2 + 1 for f in frames]


def test_two_minutes_beside_a_text_row_give_3000_states_and_no_features_beyond_them(coat):
    batch = build_inputs(coat, [noise(120), None], ["?", "hello"], ["a", "b"])
    with torch.no_grad():
        out = coat(batch)
    features = batch["audio"]["input_features"]
    assert features.shape[0] * features.shape[2] == 12000 and out.valid.sum(1).tolist() == [3000, 0]
    assert out.think_states.isfinite().all() and out.ce_sum.isfinite()


def test_audio_embeds_are_the_projected_tower_as_transformers_gives_them_and_the_tower_builds_no_graph(coat):
    inner, kept = coat.hf.model, []
    last = inner.audio_tower.proj if coat.name == "qwen2.5-omni" else inner.multi_modal_projector
    hook = last.register_forward_hook(lambda m, a, out: kept.append(out))
    batch = build_inputs(coat, [noise(0.1), None, noise(31, 1)], ["a", "t", "b"], ["c", "d", "e"])
    out = coat(batch)
    hook.remove()
    assert not kept[0].requires_grad and not out.audio_embeds.requires_grad and out.think_states.requires_grad
    mask = next(v for k, v in batch["audio"].items() if k.endswith("mask"))
    got = out.audio_embeds[out.valid]                                                   # (2 + 775, D)
    frames = kept[0] if kept[0].ndim == 2 else \
        torch.cat([window[:(n + 1) // 2 // 2] for window, n in zip(kept[0], mask.sum(1).tolist())])
    assert torch.equal(got, frames)
    if hasattr(coat.hf, "get_audio_features"):
        theirs = coat.hf.get_audio_features(batch["audio"]["input_features"], mask)
        assert torch.equal(got, theirs.last_hidden_state if coat.name == "qwen2.5-omni" else theirs.pooler_output)


def test_lora_sits_on_the_language_model_alone_and_base_weights_stay_byte_identical(coat, hub):
    coat = load_coat(coat.name, model_path=hub[coat.name], trainable=True)
    layers = coat.hf.config.get_text_config().num_hidden_layers
    trained = {n for n, p in coat.named_parameters() if p.requires_grad}
    assert len(trained) == 7 * layers * 2 + 1 and all(".language_model." in n for n in trained)
    before = {n: p.detach().clone() for n, p in coat.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in coat.parameters() if p.requires_grad], lr=1e-2)
    batch = build_inputs(coat, [noise(0.5), None], ["?", "hi"], ["yes", "no"])
    for _ in range(3):
        out = coat(batch)
        (out.ce_sum + out.think_states.pow(2).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in coat.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name


def test_new_rows_are_the_same_at_every_load_and_padded_tables_keep_their_size(coat, hub):
    spare, rows = LAYOUTS[coat.name][1] if coat.name in NAMES else 58, []
    for seed in (0, 1):
        torch.manual_seed(seed)
        lm, processor = load_backbone(coat.name, hub[coat.name])
        size, used = lm.get_input_embeddings().num_embeddings, len(processor.tokenizer)
        assert size == used + spare
        ids = model.add_think_tokens(lm, processor.tokenizer)
        tables = [lm.get_input_embeddings().weight, lm.get_output_embeddings().weight]
        assert [len(t) for t in tables] == [max(size, used + 3)] * 2 and ids == [used, used + 1, used + 2]
        assert lm.config.get_text_config().vocab_size == max(size, used + 3)
        rows.append([t[ids] for t in tables])
        for table, new in zip(tables, rows[-1]):
            torch.testing.assert_close(new, table[:used].mean(0).expand(3, -1))
    assert all(torch.equal(a, b) for a, b in zip(*rows))


def print_greedy(adapter, batch):
    print(greedy(load_coat(adapter=adapter), torch.load(batch, weights_only=True)).tolist())


def test_adapter_reloaded_merged_and_in_plain_peft_and_plain_transformers_says_the_same(coat, hub, tmp_path):
    batch = build_inputs(coat, [noise(1.0), noise(31, 5)], ["Which?", "Which note is it?"])
    want = greedy(coat, batch)
    coat.save(tmp_path / "adapter")
    again = load_coat(adapter=str(tmp_path / "adapter"))
    assert torch.equal(greedy(again, batch), want) and torch.equal(greedy(again.merge(), batch), want)

    if coat.name == "audio-flamingo-3":    # the one whose table has to grow again
        torch.save(batch, tmp_path / "batch.pt")
        process = start(print_greedy, tmp_path / "log", str(tmp_path / "adapter"), tmp_path / "batch.pt")
        ended(process)
        assert json.loads(open(process.log).read().splitlines()[-1]) == want.tolist()

    lm, processor = load_backbone(coat.name, hub[coat.name])
    model.add_think_tokens(lm, processor.tokenizer)
    plain = peft.PeftModel.from_pretrained(lm, tmp_path / "adapter")
    assert torch.equal(greedy(model.CoAT(plain, processor, coat.name, None, coat.think_ids), batch), want)

    merged = str(tmp_path / "merged")
    again.save(merged)
    stock = next(c for c in BACKBONES[coat.name].model_class.__mro__ if c.__module__.startswith("transformers.models"))
    lm = stock.from_pretrained(merged)
    theirs = lm.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **batch["audio"],
                         max_new_tokens=8)    # all else is in its generation_config.json
    assert torch.equal(theirs[:, batch["input_ids"].shape[1]:], torch.stack(list(coat.stream(batch, 8)), 1))
    # Its processor makes the same ids of a string; that of Omni cannot be built without torchvision.
    theirs = processor if coat.name == "qwen2.5-omni" else transformers.AutoProcessor.from_pretrained(merged)
    block = model.THINK_START + model.THINK * 25 + model.THINK_END
    inputs = theirs(text=render_prompt(coat, "Which?", 1) + block, audio=[noise(1.0).numpy()], sampling_rate=16000,
                    return_tensors="pt")
    assert torch.equal(inputs["input_ids"], build_inputs(coat, [noise(1.0)], ["Which?"])["input_ids"])
    assert torch.equal(greedy(load_coat(coat.name, model_path=merged), batch), want)    # its trained rows are kept


def test_bf16_trains_and_answers(coat, hub):
    low = loaded(coat.name, hub[coat.name], dtype=torch.bfloat16)
    rows = [noise(1.0), None, noise(3.0)], ["?", "hi", "what?"], ["yes", "no", "so"]
    with torch.no_grad():
        want = coat(build_inputs(coat, *rows))
    batch = build_inputs(low, *rows)
    with torch.autocast("cpu", torch.bfloat16):    # as train.py runs it on a GPU
        out = low(batch)
    out.ce_sum.backward()
    assert {p.dtype for n, p in low.named_parameters()} == {torch.bfloat16, torch.float32}
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in low.parameters() if p.requires_grad)
    torch.testing.assert_close(out.ce_sum, want.ce_sum, rtol=0.05, atol=0.1)
    merged = low.merge()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert greedy(merged, build_inputs(low, *rows[:2]), 3).shape == (3, 3)


def test_text_thinking_adapter_of_the_layout_before_transformers_5_is_loaded_whole_or_refused(hub, tmp_path):
    name, folder = "audio-flamingo-3", str(tmp_path / "think")
    ours = loaded(name, hub[name])
    ours.lm.save_pretrained(folder, save_embedding_layers=False)
    weights = safetensors.torch.load_file(os.path.join(folder, "adapter_model.safetensors"))
    safetensors.torch.save_file({k.replace("model.model.language_model", "model.language_model.model"): v
                                 for k, v in weights.items() if "lora" in k},
                                os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    config = json.load(open(os.path.join(folder, "adapter_config.json")))
    with open(os.path.join(folder, "adapter_config.json"), "w") as file:
        json.dump(config | {"trainable_token_indices": None}, file)
    bias = torch.randn(64)
    torch.save({"base_model.model.multi_modal_projector.linear_2.bias": bias}, os.path.join(folder, "non_lora_trainables.bin"))
    coat = model.load_text_think(name, folder, hub[name])
    merged = ours.merge().hf.state_dict()
    for key, value in coat.hf.state_dict().items():
        if key.endswith("multi_modal_projector.linear_2.bias"):
            assert torch.equal(value, bias)
        elif "embed_tokens" not in key and "lm_head" not in key:    # ours has trained rows there
            torch.testing.assert_close(value, merged[key])
    clip = os.path.join(HERE, "assets", "clips", "cow.flac")
    ask = ["ask", name, clip, "--question", "?", "--model-path", hub[name], "--max-new-tokens", 2, "--json", "--text-think"]
    told = json.loads(run("infer.py", *ask, folder))
    assert told["question"].endswith("reason about the input audio before you respond.")
    assert told["prompt_tokens"] == build_inputs(coat, [at_rate(*read_audio(clip), 16000)], [told["question"]],
                                                 think=False)["input_ids"].shape[1]
    torch.save({"elsewhere.bias": bias}, os.path.join(folder, "non_lora_trainables.bin"))
    assert "elsewhere.bias" in run("infer.py", *ask, folder, fails=True)
    assert "adapter_config.json" in run("infer.py", *ask, tmp_path, fails=True)


def test_omni_is_loaded_without_its_vision_tower_and_talker(hub):
    lm, processor = load_backbone("qwen2.5-omni", hub["qwen2.5-omni"])
    assert lm.model.visual is None and not any("visual" in n or "talker" in n for n, _ in lm.named_parameters())
    assert not hasattr(processor, "image_processor")


def test_reserved_tokens_in_a_prompt_are_refused_and_such_rows_and_odd_rates_left_out_of_a_batch(coat):
    row = {"wave": noise(1.0), "rate": 16000, "prompt": "what?", "response": "it"}
    for token in (coat.backbone.audio_token, "<|audio_think|>"):
        with pytest.raises(InputError, match="reserved"):
            build_inputs(coat, [noise(1.0)], [f"what is {token}?"])
        batch = collate([row | {"response": token, "row": 7}, row, row | {"rate": 44099}], coat.spec)
        assert len(batch["rows"]) == 1 and ["row 7" in s or "44099" in s for s in batch["skipped"]] == [True, True]


@pytest.mark.parametrize("name", NAMES)
def test_folder_that_does_not_fit_is_refused_in_one_line(name, hub, tmp_path):
    def refused(folder, *words):
        with pytest.raises(InputError) as error:
            load_coat(name, model_path=str(folder))
        text = str(error.value)
        assert "\n" not in text and len(text) < 400 and all(w in text for w in words), text

    refused(tmp_path / "nowhere", "no folder", "nowhere")
    refused(tmp_path, "no config.json")
    refused(hub[NAMES[NAMES.index(name) - 1]], "config.json is that of")
    without = {"config.json": "no config.json", "model.safetensors": "model.safetensors",
               "tokenizer*": "tokenizer is missing", "preprocessor_config.json": "feature extractor",
               "chat_template*": "no chat template"}
    for pattern, words in without.items():
        if pattern != "chat_template*" or LAYOUTS[name][3]:
            shutil.copytree(hub[name], tmp_path / pattern, ignore=shutil.ignore_patterns(pattern))
            refused(tmp_path / pattern, name, words)
    shutil.copytree(hub[name], tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 10000)
    refused(tmp_path / "cut", name, "incomplete")


@pytest.mark.parametrize("change, words", [
    ({"num_hidden_layers": 3, "layer_types": None}, "for 12 tensors"), ({"intermediate_size": 96}, "for 6 tensors")])
def test_missing_and_misshapen_weights_are_an_error_not_noise(change, words, hub, tmp_path):
    shutil.copytree(hub["qwen2-audio"], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["text_config"] |= change
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        load_backbone("qwen2-audio", str(tmp_path / "other"))


def test_transformers_that_is_too_old_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(model.transformers, "__version__", "5.9.1")
    with pytest.raises(SystemExit, match="^error: transformers 5.9.1 is too old; pip install -U 'transformers>=5.23'$"):
        runpy.run_path(os.path.join(HERE, "model.py"))


# ----------------------------------------------------------------------------------------------------------------------
# heads.py

@pytest.mark.parametrize("kind, width", [("transformer", None), ("linear", None), ("transformer", 64), ("linear", 64)])
def test_head_of_a_padded_batch_equals_the_head_of_each_clip(kind, width):
    head, h, lengths = heads.ProjectionHead(128, 10, kind, width), torch.randn(3, 7, 128), [7, 3, 0]
    valid = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    out = head(h, valid)
    assert out.shape == (3, 7, 10) and out.isfinite().all()
    for i, n in enumerate(lengths[:2]):
        torch.testing.assert_close(out[i, :n], head(h[i:i + 1, :n], valid[i:i + 1, :n])[0], rtol=1e-4, atol=1e-5)


def test_transformer_head_sees_both_ways_and_the_linear_one_only_its_frame():
    h, valid = torch.randn(1, 5, 64, requires_grad=True), torch.ones(1, 5, dtype=torch.bool)
    for kind, reach in (("transformer", 5), ("linear", 1)):
        grad, = torch.autograd.grad(heads.ProjectionHead(64, 3, kind)(h, valid)[0, 2].sum(), h)
        assert (grad[0].abs().sum(-1) > 0).sum() == reach


def test_focal_bce_at_hard_targets_is_the_focal_loss_and_soft_losses_vanish_at_the_target():
    logits, hard = torch.randn(50, 4), torch.randint(0, 2, (50, 4)).float()
    p = torch.where(hard == 1, logits.sigmoid(), 1 - logits.sigmoid())
    torch.testing.assert_close(heads.focal_bce(logits, hard), (-(1 - p) ** 2 * p.log()).mean(-1))
    torch.testing.assert_close(heads.bce(logits, logits.sigmoid()), torch.zeros(50), atol=1e-6, rtol=0)
    torch.testing.assert_close(heads.focal_bce(logits, logits.sigmoid()), torch.zeros(50), atol=1e-6, rtol=0)
    assert (heads.bce(logits + 0.1, logits.sigmoid()) > 0).all()


@pytest.mark.parametrize("task", ["recon", "speech", "sound", "affect", "pitch", "anything"])
def test_best_constant_answer_costs_1_and_the_teacher_itself_0(task):
    linear = torch.nn.Linear(6, 4).requires_grad_(False)
    clips = [3 * torch.randn(n, 6) + 1 for n in (40, 25)]
    z, valid = model.pad_rows(torch.cat(clips), torch.tensor([40, 25]))
    scales = heads.loss_scales(task, clips, linear)
    assert all(v == pytest.approx(0, abs=1e-5) for v in heads.expert_loss(task, z, z, valid, scales, linear).values())
    for term, (loss, on_readout) in heads.terms(task).items():
        if not on_readout:
            mean = torch.cat(clips).mean(0).expand_as(z)
            assert heads.expert_loss(task, mean, z, valid, scales, linear)[term].item() / 65 == pytest.approx(1, rel=1e-4)
        else:
            q = linear(torch.cat(clips)).sigmoid()
            constant = torch.logit(q.mean(0)).expand_as(q)
            assert loss(constant, q).mean().item() / scales[term] == pytest.approx(1, rel=1e-4)
            better = [loss(constant + d, q).mean().item() for d in (-0.3, 0.3)]
            assert min(better) > 0


# ----------------------------------------------------------------------------------------------------------------------
# experts.py

REFERENCE = os.path.join(HERE, "assets", "reference")
TINY = dict(dim=256, prenet=3, depth=2, tokens=5, scale_heads=4)      # the emotion2vec of the reference numbers


def fill(key, shape):
    """The recipe the reference implementations' parameters were filled with: seeded by the official key, scaled by its kind."""
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if key.endswith(("running_var", "running_mean")):
        return 1 + 0.1 * r.abs() if key.endswith("var") else 0.1 * r
    if key.endswith(("alibi_scale", "extra_tokens")):
        return 0.5 * r + (0.7 if key.endswith("scale") else 0)
    if r.ndim == 1:
        return 1 + 0.1 * r if key.endswith("weight") else 0.05 * r
    return r * math.sqrt((2 if r.ndim == 4 else 1) / (r.numel() / r.shape[0]))


def official(cls, **sizes):
    """{official key: filled tensor} of a teacher."""
    with torch.device("meta"):
        module = cls(**sizes)
    name = lambda key: functools.reduce(lambda key, rule: re.sub(*rule, key), module.KEYS, key)
    return {name(k): fill(name(k), v.shape) for k, v in module.state_dict().items() if "num_batches" not in k}


def audio(rate, seconds):
    """Gated tones, a chirp, amplitude modulation and noise."""
    n = round(rate * seconds)
    t, s = np.arange(n) / rate, lambda f, phase=0.0: np.sin(2 * np.pi * f * t + phase)
    x = 0.2 * s(110) + 0.15 * s(440, 0.3) * (t > 0.25 * seconds) + 0.1 * s(1320.5, 0.7) * ((t > 0.1 * seconds) & (t < 0.6 * seconds))
    x += 0.08 * s(3100, 1.1) * (0.5 + 0.5 * s(4)) + 0.1 * np.sin(2 * np.pi * (200 * t + 2400 / seconds * t * t))
    return torch.tensor(x + 0.02 * np.random.RandomState(1234).standard_normal(n), dtype=torch.float32)


def chord():
    """C4 E4 G4 with 8 harmonics, staggered and decaying, 43844 samples at 22050 Hz."""
    t, x = np.arange(43844) / 22050, 0
    for f, on in ((261.6255653, 0.2), (329.6275569, 0.5), (391.9954360, 0.9)):
        u = np.maximum(t - on, 0)
        x = x + 0.2 * (t >= on) * sum(np.sin(2 * np.pi * f * h * u) / h * np.exp(-0.8 * h * u) for h in range(1, 9))
    return torch.tensor(x, dtype=torch.float32)


def close(ours, reference, atol, rtol=0.0):
    np.testing.assert_allclose(ours.detach().numpy(), reference, atol=atol, rtol=rtol)


@functools.cache
def teacher(name):
    """The official pitch weights; the others filled by the recipe (emotion2vec in a small size), built once."""
    cls = {"sound": SoundEvents, "affect": Affect}.get(name)
    return cls.from_state_dict({"model": official(cls, **(TINY if name == "affect" else {}))}) if cls else load("pitch")


def test_speech_equals_the_reference_implementation_at_both_outputs():
    ref, sd = np.load(os.path.join(REFERENCE, "speech.npz")), official(SpeechUnits)
    expert = SpeechUnits.from_state_dict({"model": {"module." + k: v for k, v in sd.items()}})
    close(expert(audio(16000, 2.0))[::11], ref["encoder_out"], 1e-5)
    expert.layer = 6
    close(expert(audio(16000, 2.0))[::11], ref["l6_ffn"], 1e-5)


def test_sound_equals_the_reference_implementation():
    sound, ref, wave = teacher("sound"), np.load(os.path.join(REFERENCE, "sound.npz")), audio(32000, 2.0)
    close(sound.logmel(wave)[::20], ref["logmel"], 5e-4)
    close(sound(wave)[:, ::4], ref["feat"], 1e-3, 1e-4)
    close(sound.readout(sound(wave)), ref["logits"], 1e-3, 1e-4)


def test_affect_takes_its_sizes_from_the_file_and_equals_the_reference_implementation():
    tiny = teacher("affect")
    assert (tiny.dim, tiny.heads, len(tiny.blocks), tiny.extra) == (256, 4, 5, 5)
    close(tiny(audio(16000, 2.0))[::9], np.load(os.path.join(REFERENCE, "affect_tiny.npz"))["feat"], 5e-5)


def test_pitch_equals_the_official_onnx_file():
    ref, pitch = np.load(os.path.join(REFERENCE, "pitch.npz")), teacher("pitch")
    close(pitch(chord()).view(-1, 8, 264).transpose(0, 1)[:, ::43], ref["feat"], 1e-2)
    close(pitch.contour(chord())[::8], ref["contour"], 1e-3)
    for ours, name in zip(pitch.notes(chord()), ("contour", "note", "onset")):
        close(ours[::8], ref[name], 1e-3)


def test_attention_in_pieces_equals_attention_at_once(monkeypatch):
    tiny, whole = teacher("affect"), teacher("affect")(audio(16000, 2.0))
    monkeypatch.setattr(tiny, "BIAS_FLOATS", [4 * 104 * 7])              # 7 queries at a time
    close(tiny(audio(16000, 2.0)), whole, 1e-5)


@pytest.mark.parametrize("name", ["sound", "pitch"])
def test_readout_passes_gradients_to_its_input_and_none_to_the_frozen_teacher(name):
    expert = teacher(name)
    z = torch.randn(2, 6, expert.dim, requires_grad=True)              # a batch of 2
    assert not expert.training and not any(p.requires_grad for p in expert.parameters())
    expert.readout(z).square().sum().backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in expert.parameters())
    close(expert.readout(z)[1], expert.readout(z[1]).detach().numpy(), 1e-4)


def click(expert, front, token, seconds):
    """(tokens,) how much a click in the middle of `token` changes the front end's output, resampled to 25 Hz."""
    quiet = torch.randn(round(seconds * expert.sample_rate), generator=torch.Generator().manual_seed(0)) * 1e-3
    wave = quiet.clone()
    wave[int((token + 0.5) / TOKEN_RATE * expert.sample_rate)] += 0.5
    pad = lambda x: torch.nn.functional.pad(x, (0, max(0, expert.min_samples - len(x))))
    change = (front(pad(wave)) - front(pad(quiet))).detach()[:expert.frames(len(wave))]
    return resample_frames(change, int(seconds * TOKEN_RATE), expert.frame_rate, expert.offset).norm(dim=1)


@pytest.mark.parametrize("seconds", [0.3, 1, 3.77])
def test_a_click_shows_at_its_own_token(seconds):
    n, (tiny, sound, pitch) = int(seconds * TOKEN_RATE), map(teacher, ("affect", "sound", "pitch"))
    for token in {1, n // 3, 2 * n // 3, n - 2}:
        change = click(tiny, tiny.local, token, seconds)               # before attention, which sees the whole clip
        assert change.nonzero().flatten().tolist() == [token]
        change = click(pitch, lambda w: pitch.cqt_power(w).sqrt(), token, seconds)     # before the clip's level normalisation
        assert change.argmax() == token            # the lowest notes' windows reach 1.3 s to both sides
        change = click(sound, sound.features, token, seconds)          # a segment is 8 tokens and is pooled with its neighbours
        assert abs(int(change.argmax()) // 8 - min(token // 8, sound.frames(round(seconds * 32000)) - 1)) <= 1


def test_frames_follow_the_clip_and_short_clips_still_give_one():
    tiny, sound, pitch = map(teacher, ("affect", "sound", "pitch"))
    for expert in (tiny, sound, pitch):
        for n in (1, 79, 400, 5000, 33024, 40001):
            z = expert(torch.randn(n) * 0.1)
            assert z.shape == (expert.frames(n), expert.dim) and z.dtype == torch.float32 and z.isfinite().all()
    assert [tiny.frames(n) for n in (1, 719, 720, 32000)] == [1, 1, 2, 99] and pitch.frames(44100) == 173 and sound.frames(64000) == 6


@pytest.mark.parametrize("wave", [[0.0] * 800, torch.zeros(0), torch.zeros(2, 800), torch.zeros(800).double(), torch.full((800,), math.nan)])
def test_a_bad_wave_is_refused_in_one_line(wave):
    with pytest.raises(ValueError, match=r"^Affect takes a wave.*\Z"):
        teacher("affect")(wave)


def test_resampling_keeps_constants_exactly_and_puts_frames_where_they_belong():
    for frames, n, rate, offset in ((1, 7, 50.0, 0.0125), (99, 50, 50.0, 0.0125), (87, 25, 22050 / 256, 0.0), (3, 25, 3.125, 0.16),
                                    (400, 3, None, None), (2, 90, None, None), (5, 40, 50.0, None)):
        constant = torch.randn(1, 6).expand(frames, 6)
        assert torch.equal(resample_frames(constant, n, rate, offset), constant[:1].expand(n, 6))
        hits = resample_frames(torch.eye(frames), n, rate, offset)
        for j in range(frames if rate else 0):      # each frame's centre lies in the token it lands in
            token = int(((0.5 / rate if offset is None else offset) + j / rate) * TOKEN_RATE + 1e-6)
            assert token >= n or hits[token, j] == hits[:, j].max() > 0
    z = torch.randn(30, 4, requires_grad=True)
    resample_frames(z, 9, 50.0, 0.0).sum().backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
    with pytest.raises(ValueError):
        resample_frames(torch.zeros(0, 4), 5)


def test_missing_and_misshapen_tensors_are_counted_and_named_and_extra_ones_ignored():
    sd = official(Affect, **TINY)
    Affect.from_state_dict({"state_dict": {**sd, "_ema": torch.zeros(3), "cfg": None}})
    sd["blocks.1.attn.qkv.weight"] = torch.zeros(3, 3)
    del sd["modality_encoders.AUDIO.extra_tokens"]
    with pytest.raises(ValueError, match="Affect: 2 of .*extra_tokens is missing; blocks.1.attn.qkv.weight is .3, 3., not .768, 256.$"):
        Affect.from_state_dict(sd)
    with pytest.raises(ValueError, match="68 of 68 .* bn0.weight is missing"):
        SoundEvents.from_state_dict({})


def test_damaged_wrong_or_absent_files_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("COAT_CACHE", str(tmp_path))
    monkeypatch.setattr(SpeechUnits, "url", "http://127.0.0.1:9/spidr_base.pt")        # nobody listens there
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "other.pt")
    for path, words in ((None, ["spidr_base.pt", "127.0.0.1:9", str(tmp_path), "--teacher-speech PATH"]), (tmp_path / "no.pt", ["no file"]),
                        (tmp_path / "cut.pt", ["damaged"]), (tmp_path / "other.pt", ["conv_layers.0.conv.weight is missing"])):
        with pytest.raises(ExpertUnavailable) as e:
            load("speech", path)
        assert "\n" not in str(e.value) and all(word in str(e.value) for word in ("speech: ", *words)), str(e.value)


def test_a_broken_download_is_resumed_once_for_all_processes_and_a_wrong_digest_is_refused(tmp_path, monkeypatch):
    data, asked = os.urandom(3_000_000), []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(int(self.headers["Range"][6:-1]))
            self.send_response(206)
            self.send_header("Content-Length", len(data) - asked[-1])
            self.end_headers()
            self.wfile.write(data[asked[-1]:2_000_000 if len(asked) == 1 else None])   # the first answer breaks off

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(SpeechUnits, "url", f"http://127.0.0.1:{server.server_port}/spidr_base.pt")
        path = str(tmp_path / "cache" / "spidr_base.pt")
        with pytest.raises(ExpertUnavailable, match="broke off"):
            experts.download("speech", path)
        both = [threading.Thread(target=experts.download, args=("speech", path)) for _ in range(2)]
        [t.start() for t in both], [t.join() for t in both]
        assert open(path, "rb").read() == data and asked == [0, 1_999_999] and os.listdir(tmp_path / "cache") == ["spidr_base.pt"]
        monkeypatch.setattr(SpeechUnits, "sha256", "0" * 64)
        with pytest.raises(ExpertUnavailable, match="wrong sha256"):
            experts.download("speech", path + "2")
        assert not os.path.exists(path + "2")
        server.shutdown()


def test_random_teachers_are_loud_and_always_the_same(monkeypatch):
    monkeypatch.setattr(Affect, "__init__", functools.partialmethod(Affect.__init__, **TINY))
    with pytest.warns(UserWarning, match="affect: RANDOM WEIGHTS"):
        a, b = load("affect", random=True), load("affect", random=True)
    assert torch.equal(a(audio(16000, 0.5)), b(audio(16000, 0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("pitch", random=True)                                     # its weights are here


def test_a_sixth_teacher_is_one_class_and_one_row(monkeypatch, tmp_path):
    class Loudness(Expert):
        sample_rate, frame_rate, dim, hop, offset = 16000, 100.0, 1, 160, 0.005

        def features(self, wave):
            return wave.unfold(0, 160, 160).square().mean(1, keepdim=True)

    monkeypatch.setitem(EXPERTS, "loudness", Loudness)
    run("train.py", "--stage", "2:recon,loudness", *SHORT[4:], "--w-loudness", 0.5, "--out", tmp_path / "run")
    first, second = (json.loads(line) for line in open(tmp_path / "run" / "log.jsonl"))
    assert first["loudness"] != second["loudness"] > 0
    assert second["loss"] == pytest.approx(second["ce"] + 0.3 * second["recon"] + 0.5 * second["loudness"])


# ----------------------------------------------------------------------------------------------------------------------
# data.py

def wav(folder, name, samples, rate=16000, **kwargs):
    path = str(folder / name)
    soundfile.write(path, samples, rate, **kwargs)
    return path


@pytest.fixture
def bad_clips(tmp_path):
    """{file name: what the message must say}"""
    tone = np.sin(np.arange(16000) / 20).astype(np.float32) / 2
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is no sound\n" * 100)
    wav(tmp_path, "zero_samples.wav", tone[:0])
    wav(tmp_path, "nan.wav", np.where(np.arange(16000) == 8000, np.nan, tone), subtype="FLOAT")
    wav(tmp_path, "short.wav", tone[:320])
    wav(tmp_path, "long.wav", np.zeros(121 * 8000, np.float32), 8000)
    whole = open(wav(tmp_path, "whole.flac", np.random.default_rng(0).standard_normal(160000) / 8), "rb").read()
    (tmp_path / "cut.flac").write_bytes(whole[:len(whole) // 2])
    return {"missing.wav": "no file", "empty.wav": "cannot decode", "text.wav": "cannot decode", "zero_samples.wav": "no samples",
            "nan.wav": "NaN", "short.wav": "0.02 s", "long.wav": "121.00 s", "cut.flac": "cut.flac"}


def test_bad_audio_is_refused_with_its_name_and_a_remedy(bad_clips, tmp_path):
    for name, words in bad_clips.items():
        with pytest.raises(InputError, match=words) as error:
            read_audio(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)


def test_error_ends_a_program_in_one_line_without_traceback(bad_clips, tmp_path):
    done = subprocess.run([sys.executable, "infer.py", "ask", "tiny", tmp_path / "text.wav", "--question", "?"],
                          capture_output=True, text=True, cwd=HERE, timeout=100)
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: cannot decode") and "text.wav" in done.stderr
    assert "missing.wav" in run("infer.py", "ask", "tiny", tmp_path / "missing.wav", "--question", "?", fails=True)


def test_out_of_memory_is_one_line_with_the_flags_that_need_less(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    data.one_line_errors()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB.")
    sys.excepthook(type(error), error, None)
    assert re.fullmatch("error: CUDA out of memory; .*--micro-batch 1, --checkpointing.*\n", capsys.readouterr().err)


def test_eight_channels_at_96_khz_are_read_as_mono(tmp_path):
    t = np.arange(96000) / 96000
    path = wav(tmp_path, "eight.wav", np.stack([np.sin(2 * np.pi * 440 * t)] * 8, 1) / 2, 96000)
    wave, rate = read_audio(path)
    assert rate == 96000 and wave.shape == (96000,)
    down = at_rate(wave, rate, 16000)
    want = torch.sin(2 * np.pi * 440 * torch.arange(16000) / 16000) / 2
    assert len(down) == 16000 and (down - want)[200:-200].abs().max() < 1e-3


def test_segment_of_a_file_is_that_part_of_it(tmp_path):
    path = wav(tmp_path, "a.wav", noise(2.0).numpy(), subtype="FLOAT")
    assert torch.equal(read_audio(path, 0.5, 1.25)[0], read_audio(path)[0][8000:20000])
    with pytest.raises(InputError, match="nothing from 3"):
        read_audio(path, 3.0, 4.0)


@pytest.mark.parametrize("text, words", [
    ("", "no rows"), ('{"prompt": "a", "response": "b"}\nnot json', "line 2: not JSON"), ("[1]", "line 1: not a JSON object"),
    ('{"prompt": "a"}', '"response" is missing'), ('{"prompt": "", "response": "b"}', '"prompt" is missing')])
def test_bad_manifest_is_refused_with_its_line(tmp_path, text, words):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        Manifest(str(tmp_path / "rows.jsonl"))


def test_shipped_clips_all_decode_and_choices_hold_the_response():
    source = Manifest(os.path.join(HERE, "assets", "clips.jsonl"))
    lengths, bad = source.seconds()
    assert len(source) >= 12 and not bad and 1 < lengths.min() and lengths.max() < 15
    for i in range(len(source)):
        row = source.load(i)
        assert row["wave"].abs().max() > 0.02
        assert any(row["response"].endswith(choice) for choice in row.get("choices", [row["response"]]))


def test_bad_rows_are_skipped_and_counted_and_the_batch_holds_the_rest(tiny, bad_clips, tmp_path):
    wav(tmp_path, "good.wav", noise(1.0).numpy())
    names = ["nan.wav", "good.wav", "missing.wav"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"audio": n, "prompt": "?", "response": "yes"}) for n in names))
    source = Manifest(str(tmp_path / "rows.jsonl"))
    assert [i for i, _ in source.seconds()[1]] == [2]                      # what the header tells
    assert set(plan_stage(source, 5, 2, 0, 0).ravel()) == {0, 1}
    batch = collate([Rows(source)[i] for i in range(3)], tiny.spec)        # what only decoding tells
    assert len(batch["skipped"]) == 2 and [r["row"] for r in batch["rows"]] == [1] and batch["seconds"] == 1.0
    assert collate([Rows(source)[0]], tiny.spec)["rows"] == []


def test_stage_is_a_function_of_seed_and_stage_passes_over_every_row_and_pads_little():
    rng = np.random.default_rng(0)

    class Lengths:
        lengths = rng.uniform(1, 30, 640)
        seconds = lambda self: (self.lengths, [(3, "bad")])
        __len__ = lambda self: 640

    plan = plan_stage(Lengths(), 100, 16, seed=1, stage=0)
    assert np.array_equal(plan, plan_stage(Lengths(), 100, 16, seed=1, stage=0))
    assert not np.array_equal(plan, plan_stage(Lengths(), 100, 16, seed=1, stage=1))
    counts = np.bincount(plan.ravel(), minlength=640)
    assert counts[3] == 0 and set(counts[np.arange(640) != 3]) <= {2, 3}
    lengths = Lengths.lengths[plan]
    assert 1 - lengths.sum() / (lengths.max(1).sum() * 16) < 0.1
    assert abs(np.corrcoef(np.arange(100), lengths.mean(1))[0, 1]) < 0.3    # and not from short to long


def test_tones_are_the_same_everywhere_differ_between_splits_and_answers_are_balanced():
    train, heldout = Tones("train", 600), Tones("heldout", 600)
    assert torch.equal(train.load(7)["wave"], Tones("train", 600).load(7)["wave"])
    assert not torch.equal(train.load(7)["wave"][:100], heldout.load(7)["wave"][:100])
    seen = {}
    for i in range(600):
        row = train.load(i)
        assert len(row["wave"]) == round(16000 * train.seconds()[0][i]) and row["wave"].abs().max() < 1
        assert row["response"] in row["choices"]
        seen.setdefault(row["task"], []).append(row["response"])
    for kind, answers in seen.items():
        assert len(set(answers)) == len(data.TONES[kind][1])
        assert max(map(answers.count, set(answers))) < 2.2 * len(answers) / len(set(answers))


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures and converters

def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return str(path)


def touch(root, *names):
    """Converters look at names only."""
    for name in names:
        write(root / name, b"")


def jsonl(path, n, **more):
    row = lambda i: {"audio": f"{i}.wav", "prompt": "?", "response": f"{i}", "seconds": 1 + i % 29} | more
    return write(path, "".join(json.dumps(row(i)) + "\n" for i in range(n)))


# ----------------------------------------------------------------------------------------------------------------------
# Mixture

MIXTURE = """// shares as in the paper
{"groups": {
  // two sources, one of them small
  "asr": {"share": 3, "sources": ["a.jsonl", {"rows": "deep/b.jsonl", "max_epochs": 2}]},
  "caption": {"share": 2, "sources": ["c.jsonl"]},
    // no audio
  "text": {"share": 1, "sources": ["t.jsonl"]}},
 "max_epochs": 4, "rows": 600}
"""


@pytest.fixture
def mixture(tmp_path):
    for name, n in (("a", 500), ("deep/b", 40), ("c", 300)):
        jsonl(tmp_path / f"{name}.jsonl", n, task=name)
    jsonl(tmp_path / "t.jsonl", 70, audio=None, task="text")
    return Mixture(write(tmp_path / "mixture.json", MIXTURE))


def per_source(mixture, rows):
    return [int(((a <= rows) & (rows < b)).sum()) for a, b in zip(mixture.first, mixture.first[1:])]


def test_shares_hold_sources_are_alike_and_a_capped_source_leaves_the_rest_to_its_group(mixture):
    assert len(mixture) == 910 and len(mixture.draw(120, 0, 0)) == 120
    assert per_source(mixture, mixture.draw(120, 0, 0)) == [30, 30, 40, 20]          # 3 : 2 : 1, and alike in a group
    assert per_source(mixture, mixture.draw(600, 0, 0)) == [220, 80, 200, 100]       # b: 40 rows, twice
    assert mixture.draw(601, 0, 0).shape == (601,)


def test_what_a_whole_group_cannot_give_goes_to_the_others_and_is_reported(mixture):
    n = 2400                                     # text would be 400, its cap is 4 * 70; the rest at 3 : 2
    counts = per_source(mixture, mixture.draw(n, 0, 0))
    assert counts == [1192, 80, 848, 280] == mixture.counts(n).tolist()
    text = "\n".join(mixture.report(n))
    assert "text: 120 short of its share, left to other groups" in text and "asr: 72 above its share" in text
    assert "t.jsonl, no more by its max_epochs" in text and "c.jsonl, no more" not in text
    assert mixture.counts(2000 + 80 + 1200 + 280).tolist() == [2000, 80, 1200, 280]
    with pytest.raises(InputError, match="a stage of 3561 rows, but .* has 3560 under its max_epochs"):
        mixture.draw(3561, 0, 0)


def test_each_row_of_a_source_comes_k_or_one_more_times(mixture):
    for n in (120, 600, 2400, 3560):
        times = np.bincount(mixture.draw(n, 3, 1), minlength=len(mixture))
        assert times.sum() == n
        for a, b, cap in zip(mixture.first, mixture.first[1:], (4, 2, 4, 4)):
            assert times[a:b].max() - times[a:b].min() <= 1 and times[a:b].max() <= cap


def test_stage_is_a_function_of_seed_and_stage_alone_and_resuming_is_slicing(mixture, tmp_path):
    again = Mixture(str(tmp_path / "mixture.json"))
    plan = plan_stage(mixture, 50, 12, 7, 1)
    again.draw(99, 1, 1)
    assert np.array_equal(plan, plan_stage(again, 50, 12, 7, 1)) and plan.shape == (50, 12)
    assert np.array_equal(np.sort(plan.ravel()), np.sort(mixture.draw(600, 7, 1)))
    for other in ((7, 2), (8, 1)):
        assert not np.array_equal(mixture.draw(600, 7, 1), mixture.draw(600, *other))
    lengths = mixture.seconds()[0][plan]
    assert 1 - lengths.sum() / (lengths.max(1).sum() * 12) < 0.2                      # rows of a step are alike


def test_manifest_and_tones_are_drawn_as_before(mixture):
    source = Manifest(mixture.paths[0])
    rng = np.random.default_rng([5, 1])
    drawn = np.concatenate([rng.permutation(500), rng.permutation(500)])[:600]
    plan = drawn[np.argsort(source.seconds()[0][drawn], kind="stable")].reshape(-1, 12)
    assert np.array_equal(plan_stage(source, 50, 12, 5, 1), plan[rng.permutation(50)])


def test_rows_of_all_sources_load_and_paths_are_relative_to_their_manifest(mixture, tmp_path):
    assert mixture[0]["audio"] == str(tmp_path / "0.wav") and mixture[500]["audio"] == str(tmp_path / "deep/0.wav")
    assert [row["task"] for row in mixture] == ["a"] * 500 + ["deep/b"] * 40 + ["c"] * 300 + ["text"] * 70
    assert len(mixture) == 910 and mixture[-1 + 910]["response"] == "69"
    row = mixture.load(845)
    assert row["audio"] is None and "wave" not in row and mixture.seconds()[0][845] == 0
    soundfile.write(tmp_path / "deep/0.wav", np.zeros(16000), 16000)
    assert len(mixture.load(500)["wave"]) == 16000
    assert "no file" in str(Rows(mixture)[501]) and isinstance(Rows(mixture)[501], InputError)


def test_unusable_rows_are_never_drawn_and_counted(mixture, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"audio": "none.wav", "prompt": "?", "response": "x"}\n\n' + "".join(json.dumps(
        {"audio": "x.wav", "prompt": "?", "response": "x", "seconds": s}) + "\n" for s in (0.05, 5, 121, 6)))
    source = Mixture(str(tmp_path / "mixture.json"))
    assert [i for i, _ in source.seconds()[1]] == [540, 541, 543]
    assert [len(rows) for rows in source.usable] == [500, 40, 2, 70]
    times = np.bincount(source.draw(300, 0, 0), minlength=len(source))
    assert times[540:545].tolist() == [0, 0, 4, 0, 4]
    write(tmp_path / "c.jsonl", '{"audio": "none.wav", "prompt": "?", "response": "x"}')
    assert Mixture(str(tmp_path / "mixture.json")).counts(240).tolist() == [100, 80, 0, 60]


def test_allot_sums_to_n_keeps_caps_and_proportions():
    rng = np.random.default_rng(0)
    for _ in range(300):
        k = rng.integers(1, 8)
        weights, caps, n = rng.uniform(0.01, 5, k), rng.integers(0, 60, k), int(rng.integers(0, 200))
        counts = allot(n, weights, caps)
        assert counts.sum() == min(n, caps.sum()) and (0 <= counts).all() and (counts <= caps).all()
        free = counts < caps                       # all that are not full got the same for their weight, within one
        if free.sum() > 1:
            per = (counts / weights)[free]
            assert per.max() - per.min() <= (1 / weights[free]).max() + 1e-9


@pytest.mark.parametrize("change, words", [
    (("3,", "3"), "line 4: not JSON"), (('"share": 3', '"share": 0'), "share of asr"),
    (('"share": 3', '"shares": 3'), "asr needs"), (('"share": 3', '"share": "a"'), "share of asr"),
    (('["c.jsonl"]', "[]"), "caption lists no"), (('"text"', '"asr"'), "comes twice"),
    (('"max_epochs": 4', '"epochs": 4'), "give"), (('"max_epochs": 4', '"max_epochs": 0'), "max_epochs of a.jsonl"),
    (('"c.jsonl"', "3"), "a source of caption"), (('"c.jsonl"', '"no.jsonl"'), "no manifest '.*no.jsonl'"),
    (('"rows": 600', '"rows": 0.5'), "whole number"), ((MIXTURE, "[]"), "there is no group|not a JSON object|give"),
    ((MIXTURE, "3"), "not a JSON object"), ((MIXTURE, '{"groups": {}}'), "there is no group")])
def test_bad_mixture_is_refused_in_one_line(mixture, tmp_path, change, words):
    assert MIXTURE.count(change[0]) >= 1
    path = write(tmp_path / "bad.json", MIXTURE.replace(*change, 1))
    with pytest.raises(InputError, match=words) as error:
        Mixture(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        Mixture(str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize("row, words", [
    ({"audio": 3}, "audio"), ({"seconds": "4"}, "seconds"), ({"start": []}, "start"), ({"task": None}, "task")])
def test_bad_row_is_refused_with_its_line(tmp_path, row, words):
    with pytest.raises(InputError, match=f"line 1: \"{words}\""):
        Manifest(write(tmp_path / "rows.jsonl", json.dumps({"prompt": "a", "response": "b"} | row)))
    with pytest.raises(InputError, match="line 1: not UTF-8"):
        Manifest(write(tmp_path / "rows.jsonl", b'{"prompt": "\xff"}'))


def test_check_prints_each_source_and_what_would_be_skipped(mixture, tmp_path, capsys):
    assert data.check(types.SimpleNamespace(path=mixture.path, quick=True)) is False
    text = capsys.readouterr().out
    assert "910 rows" in text and "a stage of 600 rows" in text and "0 would be skipped" in text
    line, = [line for line in text.splitlines() if "deep/b.jsonl" in line]
    assert line.split()[:5] == ["40", "0.1", "13.33%", "80", "2.00"] and line.endswith(", no more by its max_epochs")
    jsonl(tmp_path / "few.jsonl", 25)
    assert data.check(types.SimpleNamespace(path=str(tmp_path / "few.jsonl"), quick=False)) is True
    text = capsys.readouterr().out
    assert "25 would be skipped" in text and "row 19: no file" in text and "few.jsonl: 5 more" in text


# ----------------------------------------------------------------------------------------------------------------------
# Converters

def convert(capsys, name, root, split=None, **flags):
    """[rows] and the line with the counts."""
    flags = {"audio": None, "prompt": None, "response": "response", "task": "qa"} | flags
    capsys.readouterr()
    data.listing.cache_clear()
    data.convert(types.SimpleNamespace(name=name, root=str(root), split=split, **flags))
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    if rows:
        Manifest(write(root.parent / "made.jsonl", out))            # what is written can be read
    return rows, err.strip()


def plain(rows, root):
    """Rows without the prompt, whose wording must be one of the task's; audio relative to the root."""
    for row in rows:
        assert row["task"] in ("mcq", "text", "qa") or row["prompt"] in data.WORDINGS[row["task"]]
    relative = lambda k, v: os.path.relpath(v, root) if k == "audio" and v else v
    return [{k: relative(k, v) for k, v in row.items() if k != "prompt"} for row in rows]


def test_librispeech(tmp_path, capsys):
    root = tmp_path / "LibriSpeech"
    touch(root, "dev-clean/84/121123/84-121123-0000.flac", "dev-clean/84/121123/84-121123-0001.flac")
    write(root / "dev-clean/84/121123/84-121123.trans.txt",
          "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n84-121123-0002 GONE\n")
    rows, told = convert(capsys, "librispeech", root, ["dev-clean"])
    assert plain(rows, root) == [
        {"audio": f"dev-clean/84/121123/84-121123-000{i}.flac", "response": text, "task": "asr"}
        for i, text in enumerate(["go do you hear", "but in less"])]
    assert told == "librispeech: 2 rows, 1 left out, 1 no audio file"
    assert convert(capsys, "librispeech", tmp_path, ["dev-clean"])[0] == rows        # the folder above is fine too


def test_common_voice(tmp_path, capsys):
    root = tmp_path / "cv-corpus-15.0-2023-09-08" / "en"
    touch(root, "clips/common_voice_en_1.mp3", "clips/common_voice_en_2.mp3")
    write(root / "train.tsv", "client_id\tpath\tsentence\tup_votes\n"
          'x\tcommon_voice_en_1.mp3\t"Well, é," he said.\t2\n' "y\tcommon_voice_en_2.mp3\t \t2\n")
    rows, told = convert(capsys, "common_voice", root)
    want = {"audio": "clips/common_voice_en_1.mp3", "response": '"Well, é," he said.', "task": "asr"}
    assert plain(rows, root) == [want] and told.endswith("1 rows, 1 left out, 1 empty text")
    write(root / "clip_durations.tsv", "clip\tduration[ms]\ncommon_voice_en_1.mp3\t3456\n")
    assert plain(convert(capsys, "common_voice", root)[0], root) == [want | {"seconds": 3.456}]


def test_gigaspeech_turns_punctuation_tags_into_marks_and_drops_what_only_has_meta_tags(tmp_path, capsys):
    segment = lambda text, begin, *subsets: {"sid": "s", "begin_time": begin, "end_time": begin + 2.5, "text_tn": text,
                                             "subsets": [f"{{{x}}}" for x in subsets]}
    audio = {"aid": "POD1", "path": "audio/podcast/P0000/POD1.opus", "segments": [
        segment("AS THEY'RE LEAVING <COMMA> CAN YOU <QUESTIONMARK>", 1.0, "XL", "L"), segment("<MUSIC>", 4, "XL"),
        segment("<NOISE> <PERIOD>", 5, "XL"), segment("YES <EXCLAMATIONPOINT> <OTHER> NO <PERIOD>", 7.25, "XL"),
        segment("TEST", 9, "TEST")]}
    write(tmp_path / "G" / "GigaSpeech.json", json.dumps({"dataset": "GigaSpeech", "audios": [audio]}))
    touch(tmp_path / "G", audio["path"])
    rows, told = convert(capsys, "gigaspeech", tmp_path / "G")
    want = [("as they're leaving, can you?", 1.0), ("yes! no.", 7.25)]
    assert plain(rows, tmp_path / "G") == [{"audio": audio["path"], "response": text, "task": "asr", "start": start,
                                            "end": start + 2.5, "seconds": 2.5} for text, start in want]
    assert told == "gigaspeech: 2 rows, 2 left out, 2 nothing but tags"
    assert len(convert(capsys, "gigaspeech", tmp_path / "G", ["L"])[0]) == 1


def test_voxpopuli(tmp_path, capsys):
    root, name = tmp_path / "vp", "20180613-0900-PLENARY-12-en_20180613-17:14:36_4"
    touch(root, f"transcribed_data/en/2018/{name}.ogg")
    write(root / "transcribed_data/en/asr_train.tsv", "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender\n"
          f'{name}\tSo, "we" agree.\tso "we agree\t1\ttrain\tfemale\n')
    rows, told = convert(capsys, "voxpopuli", root)
    assert plain(rows, root) == [
        {"audio": f"transcribed_data/en/2018/{name}.ogg", "response": 'so "we agree', "task": "asr"}]


@pytest.mark.parametrize("folder", ["train", "spgispeech/train"])
def test_spgispeech(tmp_path, capsys, folder):
    root = tmp_path / "spgi"
    touch(root, f"{folder}/13aa/12.wav")
    write(root / "train.csv", 'wav_filename|wav_filesize|transcript\n13aa/12.wav|333164|Daniel, how "do we think?\n')
    assert plain(convert(capsys, "spgispeech", root)[0], root) == [
        {"audio": f"{folder}/13aa/12.wav", "response": 'Daniel, how "do we think?', "task": "asr", "seconds": 10.41}]


def test_audiocaps(tmp_path, capsys):
    root = tmp_path / "ac"
    touch(root, "train/91139.ogg", "train/UDGBjjwyaqE_20.wav")
    write(root / "train.csv", "audiocap_id,youtube_id,start_time,caption\n"
          '91139,r1nicOVtvkQ,130,"A woman talks, water pours"\n' "58146,UDGBjjwyaqE,20,Clanging\n1,gone,0,Gone\n")
    rows, told = convert(capsys, "audiocaps", root)
    assert plain(rows, root) == [
        {"audio": "train/91139.ogg", "response": "A woman talks, water pours", "task": "caption"},
        {"audio": "train/UDGBjjwyaqE_20.wav", "response": "Clanging", "task": "caption"}]
    assert told == "audiocaps: 2 rows, 1 left out, 1 no audio file"


def test_clotho_has_a_row_for_each_caption_and_names_in_latin_1_are_found(tmp_path, capsys):
    root = tmp_path / "clotho"
    touch(root, "development/Señal 1.wav")
    write(root / "clotho_captions_development.csv", "file_name," + ",".join(f"caption_{k}" for k in range(1, 6))
          + '\nSeñal 1.wav,"One, two.",Two.,Three.,Four.,Five.\n', "latin-1")
    assert plain(convert(capsys, "clotho", root)[0], root) == [
        {"audio": "development/Señal 1.wav", "response": text, "task": "caption"}
        for text in ("One, two.", "Two.", "Three.", "Four.", "Five.")]


def test_clotho_aqa(tmp_path, capsys):
    root = tmp_path / "aqa"
    touch(root, "audio_files/rain.wav")
    write(root / "clotho_aqa_train.csv",
          "file_name,QuestionText,answer,confidence\nrain.wav,Is {it} raining?,yes,yes\n")
    (row,), _ = convert(capsys, "clotho_aqa", root)
    assert plain([row], root) == [{"audio": "audio_files/rain.wav", "response": "yes", "task": "qa"}]
    assert row["prompt"] in [w.format("Is {it} raining?") for w in data.WORDINGS["qa"]]


def assert_choices(rows, answers, choices):
    for row, answer in zip(rows, answers, strict=True):
        letters = [f"{letter}. {text}" for letter, text in zip("ABCDEFG", row["choices"])]
        assert sorted(row["choices"]) == sorted(choices) and row["response"] == letters[row["choices"].index(answer)]
        assert row["prompt"].endswith("? " + " ".join(letters)) or row["prompt"].endswith("voice. " + " ".join(letters))
        assert row["task"] == "mcq"


def test_iemocap_has_four_emotions_and_session_5_is_the_test(tmp_path, capsys):
    root = tmp_path / "IEMOCAP_full_release"
    for session, turns in ((1, ("neu", "exc", "xxx", "fru")), (5, ("ang",))):
        dialog = f"Ses0{session}F_impro01"
        text = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        for i, label in enumerate(turns):
            touch(root, f"Session{session}/sentences/wav/{dialog}/{dialog}_F00{i}.wav")
            text += f"[6.2901 - 8.2357]\t{dialog}_F00{i}\t{label}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n"
        write(root / f"Session{session}/dialog/EmoEvaluation/{dialog}.txt", text)
        write(root / f"Session{session}/dialog/EmoEvaluation/._{dialog}.txt", b"\xff\0")
    rows, told = convert(capsys, "iemocap", root)
    assert_choices(rows, ["neutral", "happy"], ["angry", "happy", "sad", "neutral"])
    assert [row["seconds"] for row in rows] == [1.946, 1.946]
    assert rows[0]["audio"] == str(root / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav")
    assert told == "iemocap: 2 rows, 2 left out, 1 of emotion xxx, 1 of emotion fru"
    assert_choices(convert(capsys, "iemocap", root, ["test"])[0], ["angry"], ["angry", "happy", "sad", "neutral"])


@pytest.mark.parametrize("place", ["", "train/"])
def test_meld_wants_the_sound_of_its_videos(tmp_path, capsys, place):
    root, emotions = tmp_path / "MELD.Raw", ["neutral", "joy", "sadness", "anger", "surprise", "fear", "disgust"]
    write(root / f"{place}train_sent_emo.csv", "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID\n"
          '1,"So, it\x92s",Joey,surprise,positive,0,3\n2,No,Ross,joy,positive,1,0\n', "latin-1")
    touch(root, f"{place}train_splits/dia0_utt3.mp4")
    with pytest.raises(InputError, match="no rows in .*ffmpeg -i"):
        convert(capsys, "meld", root)
    touch(root, f"{place}train_splits/dia0_utt3.wav")
    rows, told = convert(capsys, "meld", root)
    assert_choices(rows, ["surprise"], emotions)
    assert rows[0]["audio"].endswith("train_splits/dia0_utt3.wav") and told.endswith("1 left out, 1 no audio file")


def test_letters_of_emotions_are_balanced_and_always_the_same(tmp_path):
    touch(tmp_path, *(f"{i}.wav" for i in range(400)))
    make = lambda i: data.make_emotion(str(tmp_path / f"{i}.wav"), ["joy", "fear", "anger", "sadness"], "joy")
    rows = [make(i) for i in range(400)]
    letters = [row["response"][0] for row in rows]
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")
    assert len({row["prompt"].split("?")[0] for row in rows}) > 3 and rows[7] == make(7)


def test_librisqa(tmp_path, capsys):
    root, place = tmp_path / "sqa", "LibriSpeech/train-clean-360/100/121669/100-121669-0000.flac"
    touch(root, place)
    common = {"speech_path": "train-clean-360/100/121669/100-121669-0000.wav", "text": "TOM", "duration": 15.65}
    write(root / "LibriSQA-PartI/LibriSQA-PartI-train.json",
          json.dumps([common | {"question": "Who?", "answer": "Tom."}]))
    asked = "Who is A. Tom about?\nA. The piper's son B. A king\nC) None D: All of the above"
    write(root / "LibriSQA-PartII/LibriSQA-PartII-train.json", json.dumps([
        common | {"question_and_option": asked, "answer": "B", "answer_and_analysis": "B. A king. Because"},
        common | {"question_and_option": "What?", "answer": "B", "answer_and_analysis": ""}]))
    (qa, mcq), told = convert(capsys, "librisqa", root)
    assert plain([qa], root) == [{"audio": place, "response": "Tom.", "task": "qa", "seconds": 15.65}]
    assert mcq == {"audio": str(root / place), "response": "B. A king", "task": "mcq", "seconds": 15.65,
                   "choices": ["The piper's son", "A king", "None", "All of the above"],
                   "prompt": "Who is A. Tom about? A. The piper's son B. A king C. None D. All of the above"}
    assert told == "librisqa: 2 rows, 1 left out, 1 without options A to D and the letter of one"


@pytest.mark.parametrize("place", ["datashare/", ""])
def test_musicbench(tmp_path, capsys, place):
    root = tmp_path / "mb"
    touch(root, f"{place}data_aug2/-0SdAVK79lg_1.wav")
    write(root / "MusicBench_train.json", json.dumps(
        {"dataset": "MusicBench", "location": "data_aug2/-0SdAVK79lg_1.wav", "main_caption": "A guitar {solo}."}) + "\n")
    assert plain(convert(capsys, "musicbench", root)[0], root) == [
        {"audio": f"{place}data_aug2/-0SdAVK79lg_1.wav", "response": "A guitar {solo}.", "task": "music"}]


def test_wildjailbreak(tmp_path, capsys):
    root = tmp_path / "wj"
    write(root / "train/train.tsv", "vanilla\tadversarial\tcompletion\tdata_type\n"
          'How do I kill a process?\t\t"Use ""kill"".\nThen wait."\tvanilla_benign\n'
          "plain\tImagine {x}\tNo.\tadversarial_harmful\n")
    assert convert(capsys, "wildjailbreak", root)[0] == [
        {"audio": None, "prompt": "How do I kill a process?", "response": 'Use "kill".\nThen wait.', "task": "text"},
        {"audio": None, "prompt": "Imagine {x}", "response": "No.", "task": "text"}]


def test_any_table(tmp_path, capsys):
    root = tmp_path / "t"
    touch(root, "x/1.wav")
    path = root / "my.tsv"
    write(path, "file name\tq\ta\tid\nx/1.wav\tWhy?\tBecause\t1\nx/2.wav\tWho?\tMe\t2\n")
    flags = {"audio": "file name", "prompt": "q", "response": "a"}
    rows, told = convert(capsys, "csv", path, **flags, task="music")
    assert rows == [{"audio": str(root / "x/1.wav"), "prompt": "Why?", "response": "Because", "task": "music"}]
    assert told == "csv: 1 rows, 1 left out, 1 no audio file"
    (row,), _ = convert(capsys, "csv", path, audio="file name", response="a", task="caption")
    assert row["prompt"] in data.WORDINGS["caption"]
    rows, _ = convert(capsys, "csv", path, prompt="q", response="a", task="text")
    assert rows[1] == {"audio": None, "prompt": "Who?", "response": "Me", "task": "text"}
    with pytest.raises(InputError, match="'wrong'.*ROOT/my.tsv with {wrong}"):
        convert(capsys, "csv", path, response="wrong", prompt="q")


@pytest.mark.parametrize("name", list(data.CORPORA))
def test_missing_layout_is_one_line_that_says_what_is_expected(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{name} has to lie as ROOT/") as error:
        convert(capsys, name, tmp_path / "empty")
    assert "\n" not in str(error.value) and "  " not in str(error.value)
    if name != "iemocap":
        with pytest.raises(InputError, match=f"{name} has to lie as ROOT/"):
            convert(capsys, name, tmp_path / "empty", ["nonsense"])


def test_unexpected_columns_are_one_line(tmp_path, capsys):
    write(tmp_path / "c" / "clotho_captions_development.csv", "file,caption\na,b\n")
    with pytest.raises(InputError, match="'file_name'.*clotho has to lie as ROOT/clotho_captions"):
        convert(capsys, "clotho", tmp_path / "c")
    write(tmp_path / "c" / "GigaSpeech.json", "[1")
    with pytest.raises(InputError, match="gigaspeech has to lie as ROOT/GigaSpeech.json"):
        convert(capsys, "gigaspeech", tmp_path / "c")


def test_wordings_vary_and_do_not_depend_on_the_folder(tmp_path):
    touch(tmp_path, *(f"{f}/{i}.wav" for f in "ab" for i in range(50)))
    a, b = ([make_row("asr", "x", [str(tmp_path / f / f"{i}.wav")])["prompt"] for i in range(50)] for f in "ab")
    assert a == b and len(set(a)) == len(data.WORDINGS["asr"])


# ----------------------------------------------------------------------------------------------------------------------
# train.py, infer.py, bench.py as programs

def logged(folder, key="loss"):
    with open(os.path.join(folder, "log.jsonl")) as file:
        return [json.loads(line)[key] for line in file]


ALL_FIVE = ["--data", "tones:note", "--stage", "2:all", "--batch", 2, "--calibrate", 2, "--workers", 0, "--heldout", 0]


@pytest.fixture(scope="session")
def all_five(tmp_path_factory):
    """(process, folder) of a run with all experts; it takes 2 GB, and ten seconds beside the run of `trained`."""
    folder = tmp_path_factory.mktemp("all_five")
    return start(train, folder / "log", *ALL_FIVE, "--random-teachers", "--out", folder / "all"), folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, all_five):
    """(run folder, what was printed) of a run long enough to learn two kinds of question."""
    out = str(tmp_path_factory.mktemp("runs") / "learned")
    return out, run("train.py", "--data", "tones:louder,note", "--stage", "40:recon", "--stage", "20:recon,pitch",
                    "--out", out, "--heldout", 40, "--calibrate", 16, "--workers", 2)


def test_training_learns_to_hear_and_another_clip_brings_it_back_to_chance(trained):
    out, text = trained
    results = json.load(open(os.path.join(out, "heldout.json")))
    deviations = lambda share, chance: (share - chance) / math.sqrt(chance * (1 - chance) / 40)
    for r in results.values():
        assert deviations(r["heard"], r["chance"]) > 3 and deviations(r["other_clip"], r["chance"]) < 3, results
    loss = logged(out, "ce")
    assert np.mean(loss[-10:]) < np.mean(loss[:3]) / 3
    assert "infer.py ask" in text


def test_ask_answers_from_a_run_and_the_printed_command_works(trained):
    out, text = trained
    clip = next(os.path.join(out, n) for n in os.listdir(out) if n.endswith(".wav"))
    plain = run("infer.py", "ask", out, clip, "--question", "Which note?").strip()
    told, base = (json.loads(run("infer.py", "ask", out, clip, "--question", "Which note?", "--json", *flags))
                  for flags in ([], ["--no-think"]))
    assert plain == told["answer"] != ""
    assert told["prompt_tokens"] == base["prompt_tokens"] + told["n_audio"] + 2


def test_all_five_experts_train_together_and_a_missing_teacher_stops_before_the_first_step(all_five, tmp_path):
    process, folder = all_five
    ended(process)
    assert open(process.log).read().count("RANDOM WEIGHTS") == 3
    first, second = (json.loads(line) for line in open(folder / "all" / "log.jsonl"))
    for term in ("recon", "speech", "sound", "affect", "pitch", "pitch_aux"):
        assert 0 < second[term] != first[term] > 0
    names = safetensors.torch.load_file(folder / "all" / "checkpoint-2" / "heads.safetensors")
    assert {name.split(".")[0] for name in names} == {"recon", *EXPERTS}
    missing = run("train.py", *ALL_FIVE, "--teacher-speech", tmp_path / "no.pt", "--out", tmp_path / "none", fails=True)
    assert "no.pt" in missing and not os.path.exists(tmp_path / "none")


def test_a_full_disk_leaves_the_checkpoint_before_and_a_run_stopped_by_a_signal_goes_on(tmp_path, monkeypatch):
    flags = ["--data", "tones:note", *SHORT[:8], "--workers", 0, "--heldout", 0, "--save-every", 2, "--out", tmp_path / "run"]
    torch_save, saved = torch.save, []

    def full(*args):
        saved.append(args)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        torch_save(*args)

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in run("train.py", *flags, fails=True)
    assert [n for n in os.listdir(tmp_path / "run") if n.startswith("checkpoint")] == ["checkpoint-2"]

    def stopping(*args):
        torch_save(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch, "save", stopping)
    assert "stopped after step 4; go on with" in run("train.py", "--resume", tmp_path / "run")
    monkeypatch.setattr(torch, "save", torch_save)
    run("train.py", "--resume", tmp_path / "run")
    assert logged(tmp_path / "run", "step") == list(range(1, 9))


def train_in_a_group(*args):
    os.setpgid(0, 0)
    train(*args)


def test_a_signal_to_all_processes_of_a_rank_saves_too_and_a_start_without_checkpoint_can_be_started_anew(tmp_path):
    flags = ["--data", "tones:note", "--stage", "999:recon", *SHORT[4:8], "--workers", 1, "--out", tmp_path / "run"]
    os.makedirs(tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").write_text("of a run that was killed before its first checkpoint")
    process = start(train_in_a_group, tmp_path / "log", *flags)
    while process.is_alive() and "step 3/" not in open(process.log).read():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    ended(process)
    step = logged(tmp_path / "run", "step")[-1]
    assert 3 <= step < 999 and "go on with" in open(process.log).read()
    (tmp_path / "run" / f"checkpoint-{step}" / "state.pt").write_bytes(b"torn")
    assert "is damaged" in run("train.py", "--resume", tmp_path / "run", fails=True)
    assert "already holds checkpoints" in run("train.py", *flags, fails=True)


def test_a_loss_that_is_not_finite_stops_with_the_rows_and_keeps_the_last_good_step(tmp_path):
    flags = ["--data", "tones:note", "--stage", "4:recon:1e30", *SHORT[4:], "--out", tmp_path / "run"]
    error = run("train.py", *flags, fails=True)
    step = int(re.search(r"step (\d+): the loss is not finite; rows \[(\d+, ){3}\d+\]", error)[1])
    assert os.path.exists(tmp_path / "run" / f"checkpoint-{step - 1}" / "state.pt")


def test_checkpointing_changes_no_step(tmp_path):
    flags = ["--data", "tones:note", "--stage", "2:recon", *SHORT[4:]]
    for name, extra in (("plain", []), ("flags", ["--checkpointing"])):
        run("train.py", *flags, *extra, "--out", tmp_path / name)
    np.testing.assert_allclose(logged(tmp_path / "flags"), logged(tmp_path / "plain"), rtol=1e-6)


def two_ranks(log, *args, rank0=train):
    """Two processes of train.py as torchrun would start them, in fewer seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [start(target, f"{log}{rank}", *args, RANK=str(rank), **env) for rank, target in enumerate((rank0, train))]


def train_and_die(*args):
    """train.py, killed in the middle of its second checkpoint: the adapter is written and the optimizer is not."""
    saves, save = [], safetensors.torch.save_model

    def save_heads(*args):
        saves.append(args)
        os.kill(os.getpid(), signal.SIGKILL) if len(saves) == 2 else save(*args)

    safetensors.torch.save_model = save_heads
    train(*args)


@pytest.fixture(scope="session")
def mixed_runs(tmp_path_factory):
    """(flags, folder) with runs of four steps, two stages and two ranks in whole/ and killed/. The rows are uneven in all
    ways: at first rank 0 gets text alone, then rank 1 a clip of NaN."""
    folder = tmp_path_factory.mktemp("mixed")
    audio = [wav(folder, f"{i}.wav", noise(0.4 + 0.17 * i, i).numpy()) for i in range(9)]
    audio.append(wav(folder, "nan.wav", np.full(32000, np.nan), subtype="FLOAT"))
    rows = [{"audio": None, "prompt": "Say " + "it " * i, "response": "yes"} for i in range(6)]
    rows += [{"audio": path, "prompt": "What?", "response": "noise " * i + "!"} for i, path in enumerate(audio)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data", folder / "rows.jsonl", "--stage", "2:recon,pitch", "--stage", "2:recon", "--batch", 8, "--calibrate", 8,
             "--save-every", 1, "--keep", 9, "--workers", 1]
    assert (plan_stage(Manifest(str(folder / "rows.jsonl")), 2, 8, 0, 0)[0] < 6).sum() == 6
    killed = two_ranks(folder / "killed.log", *flags, "--out", folder / "killed", rank0=train_and_die)
    whole = two_ranks(folder / "whole.log", *flags, "--out", folder / "whole")
    ended(killed[0], status=-signal.SIGKILL)
    killed[1].kill()
    ended(*whole)
    return flags, folder


def test_gradients_of_a_batch_of_its_micro_batches_and_of_two_ranks_are_equal(mixed_runs):
    flags, folder = mixed_runs
    run("train.py", *flags, "--out", folder / "one")
    run("train.py", *flags, "--out", folder / "micro", "--micro-batch", 1)
    moments = {}    # after one step AdamW's first moment is (1 - beta1) times the gradient
    for name in ("one", "micro", "whole"):
        state = torch.load(folder / name / "checkpoint-1" / "state.pt", weights_only=True)
        moments[name] = [p["exp_avg"] for p in state["optimizer"]["state"].values()]
        assert logged(folder / name, "skipped") == [0, 1, 2, 2]
    assert sum(moment.any() for moment in moments["one"]) > 40
    for other in ("micro", "whole"):
        for a, b in zip(moments[other], moments["one"], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
        np.testing.assert_allclose(logged(folder / other), logged(folder / "one"), rtol=2e-3)


def test_two_ranks_killed_while_saving_resume_bit_for_bit_across_stages_and_refuse_what_would_change_the_run(mixed_runs):
    flags, folder = mixed_runs
    killed = folder / "killed"
    assert sorted(n for n in os.listdir(killed) if "checkpoint" in n) == ["checkpoint-1", "checkpoint-2.tmp"]
    assert "--lr (was 0.002, now 1.0)" in run("train.py", "--resume", killed, "--lr", 1, fails=True)
    ended(*two_ranks(f"{killed}.log", "--resume", killed))
    for key in ("step", "loss", "recon", "grad_norm"):
        assert logged(killed, key) == logged(folder / "whole", key)
    for name in ("adapter_model", "heads"):
        ours, whole = (safetensors.torch.load_file(folder / run / "checkpoint-4" / f"{name}.safetensors")
                       for run in ("killed", "whole"))
        assert all(torch.equal(ours[key], whole[key]) for key in whole)
    with open(folder / "rows.jsonl", "a") as file:
        file.write('\n{"audio": null, "prompt": "One", "response": "more"}')
    assert "not those that the run began with" in run("train.py", "--resume", killed, fails=True)
    os.remove(killed / "checkpoint-4" / "adapter_model.safetensors")
    assert "adapter_model.safetensors" in run("train.py", "--resume", killed, fails=True)


def test_rows_of_text_alone_train_and_log_nothing_of_the_experts(tmp_path):
    jsonl(tmp_path / "text.jsonl", 4, audio=None, seconds=None)
    run("train.py", "--data", tmp_path / "text.jsonl", "--stage", "2:recon", *SHORT[4:], "--out", tmp_path / "run")
    assert logged(tmp_path / "run", "recon") == [None, None] and logged(tmp_path / "run")[1] > 0
    assert os.path.getsize(tmp_path / "run" / "losses.png") > 5000


def test_tensorboard_gets_the_log_and_is_asked_for_in_one_line(tmp_path, monkeypatch):
    board = types.ModuleType("torch.utils.tensorboard")
    flags = ["--data", "tones:note", "--stage", "2:recon", *SHORT[4:], "--heldout", 0, "--tensorboard"]
    monkeypatch.setitem(sys.modules, board.__name__, board)    # as it is without the package
    assert "pip install tensorboard" in run("train.py", *flags, "--out", tmp_path / "none", fails=True)
    board.SummaryWriter = unittest.mock.Mock()
    run("train.py", *flags, "--out", tmp_path / "run")
    written = {call.args for call in board.SummaryWriter().add_scalar.call_args_list}
    assert {("loss", loss, i) for i, loss in enumerate(logged(tmp_path / "run"), 1)} < written


@pytest.mark.parametrize("program, flags, words", [
    ("train.py", ["--nonsense"], "unrecognized arguments: --nonsense"), ("train.py", ["--backbone", "gpt"], "there are"),
    ("train.py", ["--stage", "x:recon"], "STEPS:EXPERTS"), ("train.py", ["--batch", "0"], "--batch must be at least 1"),
    ("train.py", ["--stage", "3:recon:abc"], "STEPS:EXPERTS"), ("train.py", ["--lr", "nan"], "a number above 0"),
    ("train.py", ["--data", "tones:xyz"], "tones:KINDS"), ("train.py", ["--workers", "-1"], "--workers must be at least 0"),
    ("train.py", ["--device", "meta"], "give cpu or cuda"),
    ("train.py", ["--resume", "nowhere"], "nowhere"),
    ("train.py", ["--data", "nowhere.jsonl"], "no manifest"), ("infer.py", ["ask", "nowhere", "x.wav", "--question", "?"], "no file"),
    ("bench.py", ["latency", "--seconds", "1,x"], "no list of seconds"), ("bench.py", ["latency", "--seeds", "0"], "at least 1"),
    ("bench.py", ["loss", "--tokens", "20", "--hidden", "16"], "--tokens at least")])
def test_wrong_flags_end_in_one_line(program, flags, words):
    assert words in run(program, *flags, fails=True)


# ----------------------------------------------------------------------------------------------------------------------
# infer.py: score, show, probe, merge

FEELINGS = ["angry", "happy", "very happy", "sad"]


@pytest.mark.parametrize("answer, choices, said", [
    ("happy", FEELINGS, "happy"), ("Happy.", FEELINGS, "happy"), ("very  happy", FEELINGS, "very happy"),
    ("B", FEELINGS, "happy"), ("b.", FEELINGS, "happy"), ("(B)", FEELINGS, "happy"), ("[B]", FEELINGS, "happy"),
    ("B. happy", FEELINGS, "happy"),
    ("B) happy", FEELINGS, "happy"), ("**B.** happy", FEELINGS, "happy"), ("The answer is B.", FEELINGS, "happy"),
    ("Answer: (C) very happy", FEELINGS, "very happy"),
    ("The speaker sounds sad to me", FEELINGS, "sad"), ("she is very happy", FEELINGS, "very happy"),
    ("B. angry", FEELINGS, None), ("angry or sad", FEELINGS, None), ("unhappy", FEELINGS, None), ("", FEELINGS, None),
    ("E", FEELINGS, None), ("A man is heard", FEELINGS, None), ("bored", FEELINGS, None), ("B", list("CDEFGAB"), "B"),
    ("answering machine", ["answering machine", "bell"], "answering machine"),
    ("C# major", ["C major", "C# major"], "C# major"), ("it is C#", ["C", "C#"], "C#"), ("3 clicks", list("123"), "3")])
def test_choice_is_named_by_text_letter_or_as_the_only_one_in_a_sentence(answer, choices, said):
    assert infer.parse_choice(answer, choices) == said


def test_wer_is_jiwers_and_accuracy_and_f1_are_sklearns(tmp_path):
    rng, lines = np.random.default_rng(0), []
    words = ["don't", "Colour", "two", "cat", "the", "uh"]
    for i in range(40):
        said = [" ".join(rng.choice(words, n)) for n in rng.integers(0, 6, 2)]
        lines.append({"row": i, "task": "asr", "response": said[0] + " <NOISE>", "answer": said[1] * (i % 9 > 0)})
    lines.append({"row": 40, "task": "asr", "response": "uh", "answer": "the cat"})
    normalise = infer.normaliser()
    kept = [(normalise(x["response"].removesuffix("<NOISE>")), normalise(x["answer"])) for x in lines
            if x["response"] != " <NOISE>"]
    theirs = jiwer.process_words(*map(list, zip(*(pair for pair in kept if pair[0]))))
    wrong = theirs.substitutions + theirs.deletions + theirs.insertions
    fillers = sum(len(heard.split()) for reference, heard in kept if not reference)    # "uh": all that is heard is wrong
    wer, = infer.measure(lines, normalise=normalise)
    np.testing.assert_allclose(wer["value"], (wrong + fillers) / (theirs.substitutions + theirs.deletions + theirs.hits))
    assert fillers and wer["rows"] == len(kept) < 41
    assert wer["low"] < wer["value"] < wer["high"] and f"{41 - len(kept)} empty references" in wer["note"]
    assert infer.normaliser(write(tmp_path / "spelling.json", '{"colour": "color"}'))("The Colour, uh!") == "the color"

    answers = rng.choice([*FEELINGS, "bored", "", "angry or sad"], 60)
    lines = [{"row": i, "task": "emotion", "choices": sorted(FEELINGS, key=lambda _: rng.random()),
              "answer": str(answer), "response": FEELINGS[i * i % 3]} for i, answer in enumerate(answers)]    # no sad
    accuracy, f1 = infer.measure(lines)
    truth, said = [x["response"] for x in lines], [x["answer"] if x["answer"] in FEELINGS else "none" for x in lines]
    assert accuracy["value"] == sklearn.metrics.accuracy_score(truth, said)
    np.testing.assert_allclose(f1["value"], sklearn.metrics.f1_score(truth, said, average="weighted"), rtol=1e-12)
    assert f"{said.count('none')} without an answer" in accuracy["note"]
    right = np.random.default_rng(1).random(400) < 0.7
    found = infer.interval([(r, 1) for r in right], infer.share)
    wide = 1.96 * np.sqrt(found["value"] * (1 - found["value"]) / 400)    # the normal approximation
    np.testing.assert_allclose((found["high"] - found["low"]) / 2, wide, rtol=0.1)
    assert infer.measure([{"row": 0, "task": "qa", "response": "A dog.", "answer": "a dog"}])[0]["value"] == 1


def predictions(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def merged(trained, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("merged") / "model")
    run("infer.py", "merge", trained[0], folder)
    return folder


def test_ask_score_the_merged_folder_and_the_readmes_ten_lines_say_the_same(trained, merged, tmp_path):
    tones = Tones("heldout", 3, ["note"])
    clips = [wav(tmp_path, f"{i}.wav", tones.load(i)["wave"].numpy()) for i in range(3)]
    rows = [{"audio": os.path.basename(clip), "prompt": "Which note?", "response": "C"} for clip in clips]
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    texts = []
    for name in (trained[0], merged):
        asked = run("infer.py", "ask", name, *clips, "--question", "Which note?", "--json", "--max-new-tokens", 20)
        asked = [json.loads(line) for line in asked.splitlines()]
        out = tmp_path / f"{len(texts)}.jsonl"
        run("infer.py", "score", name, tmp_path / "rows.jsonl", "--out", out, "--workers", 0, "--max-new-tokens", 20)
        scored = {line["audio"]: line for line in predictions(out)[1:]}
        assert [scored[a["audio"]]["answer"] for a in asked] == [a["answer"].strip() for a in asked]
        texts.append([a["answer"].strip() for a in asked])
    with open(os.path.join(HERE, "README.md")) as file:
        code = next(block for block in re.findall("```python\n(.*?)```", file.read(), re.S) if "AutoProcessor" in block)
    plain = []
    for clip in clips:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code.replace('"merged"', repr(merged)).replace('"runs/tiny/heldout-note-A.wav"', repr(clip)), {})
        plain.append(out.getvalue().strip())
    assert texts[0] == texts[1] == plain and plain != [""] * 3
    run("infer.py", "score", trained[0], "tones:louder,note:40", "--out", tmp_path / "tones", "--max-new-tokens", 12)
    heldout = json.load(open(os.path.join(trained[0], "heldout.json")))    # the same rows, as train.py asked them
    for task, result in heldout.items():
        lines = [line for line in predictions(tmp_path / "tones")[1:] if line["task"] == task]
        assert np.mean([line["answer"] == line["response"] for line in lines]) == result["heard"]
    assert "there already" in run("infer.py", "merge", trained[0], merged, fails=True)


def test_stopped_score_goes_on_without_repeating_or_losing_a_row_and_counts_what_it_leaves_out(
        trained, tmp_path, bad_clips, monkeypatch):
    flags = ["--workers", 0, "--max-new-tokens", 4, "--batch", 4]
    score = lambda data, out, *more, **kwargs: run(
        "infer.py", "score", trained[0], data, "--out", out, *flags, *more, **kwargs)
    result = json.loads(score("tones:note,louder:6", tmp_path / "whole").splitlines()[-1])
    stream, calls = model.CoAT.stream, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 3:
            raise InputError("stopped")
        return stream(*args)

    monkeypatch.setattr(model.CoAT, "stream", stopping)
    assert "stopped" in score("tones:note,louder:6", tmp_path / "cut", fails=True)
    with open(tmp_path / "cut", "rb+") as file:    # as a kill in the middle of a line leaves it
        file.truncate(os.path.getsize(tmp_path / "cut") - 5)
    assert json.loads(score("tones:note,louder:6", tmp_path / "cut").splitlines()[-1]) == result
    assert len(calls) == 3 + 2    # seven of twelve rows were there
    whole, cut = (sorted(predictions(tmp_path / name)[1:], key=lambda line: line["row"]) for name in ("whole", "cut"))
    assert whole == cut and [line["row"] for line in cut] == list(range(12))
    assert "was 4, now 5" in score("tones:note,louder:6", tmp_path / "cut", "--max-new-tokens", 5, fails=True)
    assert "data was" in score("tones:note", tmp_path / "cut", fails=True)
    write(tmp_path / "other", "no JSON\n")
    assert "no file of predictions" in score("tones:note", tmp_path / "other", fails=True)
    assert open(tmp_path / "other").read() == "no JSON\n"

    rows = [{"audio": path, "prompt": "?", "response": "hello", "task": "asr"} for path in bad_clips]
    rows += [{"audio": "good.wav", "prompt": "?", "response": text, "task": "asr"} for text in ("a word", "<SIL>")]
    wav(tmp_path, "good.wav", noise(0.5).numpy())
    write(tmp_path / "bad.jsonl", "\n".join(map(json.dumps, rows)))
    result = json.loads(score(tmp_path / "bad.jsonl", tmp_path / "bad").splitlines()[-1])
    assert result["skipped"] == {"over 120 s": 1, "unusable": len(bad_clips) - 1}
    assert result["results"][0]["rows"] == 1 and "1 empty reference" in result["results"][0]["note"]
    monkeypatch.setitem(sys.modules, "jiwer", None)
    assert "pip install jiwer" in score(tmp_path / "bad.jsonl", tmp_path / "bad", fails=True)


@contextlib.contextmanager
def judge(replies):
    """An OpenAI-compatible endpoint that gives these replies, status or text, in turn -> (its URL, what was sent)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Authorization"], body))
            reply = replies[len(seen) - 1]
            self.send_response(200 if isinstance(reply, str) else reply)
            self.end_headers()
            if isinstance(reply, str):
                self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}],
                                             "usage": {"prompt_tokens": 300, "completion_tokens": 50}}).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def test_judge_is_asked_once_a_row_with_figure_a_and_never_without_the_flag(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    rows = [{"audio": None, "prompt": f"Say {i} {{", "response": f"It is {i}.", "task": "caption"} for i in range(3)]
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    flags = ["tiny", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--workers", 0, "--max-new-tokens", 2]
    score = lambda *more, **kwargs: run("infer.py", "score", *flags, *more, **kwargs)
    with judge(["Explanation: good.\nRating: 4", 429, "**Rating:** (2)", 500, "Rating: 7"]) as (url, seen):
        result = json.loads(score().splitlines()[-1])["results"][0]
        assert not seen and result["value"] is None and "3 not asked for" in result["note"]
        text = score("--judge", url, "--judge-price", 2, 10)
        result = json.loads(text.splitlines()[-1])
        assert result["results"][0]["value"] == 60 and "1 unreadable, 0 not asked for" in result["results"][0]["note"]
        assert result["judge_tokens"] == [900, 150] and "cost 0.0033" in text
        score("--judge", url)
        assert len(seen) == 5    # three rows, two of them twice, and nothing when it was run again
        path, key, body = seen[0]
        assert path == "/v1/chat/completions" and key == "Bearer secret"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4o-2024-11-20", 0, 1024)
        message, = body["messages"]
        assert message["role"] == "user" and message["content"].startswith("[Question]\nSay ")
        assert "\n\n[Reference Answer]\nIt is " in message["content"] and message["content"].endswith("\nRating: (int)")
    with judge([401] * 3) as (url, seen):
        assert "401" in score("--judge", url, "--judge-model", "other", fails=True) and len(seen) == 3


def test_show_draws_each_head_beside_its_teacher(trained, tmp_path):
    clip = next(os.path.join(trained[0], n) for n in os.listdir(trained[0]) if n.endswith(".wav"))
    shown = json.loads(run("infer.py", "show", trained[0], clip, "--out", tmp_path / "show.png").splitlines()[-1])
    assert list(shown["unexplained"]) == ["recon", "pitch", "pitch_aux"] and 0 < shown["unexplained"]["recon"] < 3
    assert 5000 < os.path.getsize(tmp_path / "show.png") < 150000
    assert "check the path" in run("infer.py", "show", trained[0], clip, "--out", tmp_path / "no" / "x.png", fails=True)
    z = torch.rand(7, 20, generator=torch.Generator().manual_seed(0))
    sound = types.SimpleNamespace(readout=lambda z: z)
    student, teacher, rows = infer.pictures("sound", z.flip(0), z, sound, [f"name {i}" for i in range(20)])
    assert teacher[-1].max() == z.max().sigmoid() and rows[9] == f"name {int(z.amax(0).argmax())}"
    assert torch.equal(student, teacher.flip(1))
    assert [x.shape for x in infer.pictures("affect", z, z, None, [])[:2]] == [(20, 7)] * 2


def test_probe_finds_what_is_there_and_no_recording_lies_on_both_sides(trained, tmp_path):
    rng = np.random.default_rng(0)
    labels, groups = np.array(list("abc") * 40), np.arange(120) // 3
    x = rng.standard_normal((120, 8)) + 4 * (labels[:, None] == list("abc")) @ rng.standard_normal((3, 8))
    accuracy, confidence = infer.linear_probe(x, labels, groups)
    assert np.mean(accuracy) > 0.95 and confidence.mean() > 0.9
    voices = rng.standard_normal((40, 64))[groups] + 0.01 * rng.standard_normal((120, 64))    # tell the recording alone
    labels = rng.choice(list("ab"), 40)[groups]
    assert np.mean(infer.linear_probe(voices, labels, groups)[0]) < 0.8
    assert np.mean(infer.linear_probe(voices, labels, np.arange(120))[0]) > 0.8    # what a split by row would say

    probe = lambda data, *more, **kwargs: run(
        "infer.py", "probe", "tiny", *more, "--data", data, "--workers", 0, "--plot", tmp_path / "p.png", **kwargs)
    text = probe("tones:louder:40", trained[0])
    base, ours = json.loads(text.splitlines()[-1])["results"]
    assert "think" not in base and ours["step"] == 60 and ours["think"]["accuracy"] > 0.8 and ours["answers"] > 0.8
    assert -1 <= ours["pre-gen"]["rho"] <= 1 if ours["answers"] < 1 else ours["pre-gen"]["rho"] is None
    assert 5000 < os.path.getsize(tmp_path / "p.png") < 150000
    assert "several tasks" in probe("tones:louder,note:5", fails=True)
    assert "five recordings" in probe("tones:louder:5", fails=True)


# ----------------------------------------------------------------------------------------------------------------------
# bench.py

def bench(*args):
    return json.loads(run("bench.py", *args).splitlines()[-1])


def test_bench_latency_counts_tokens_and_says_what_transformers_says(tmp_path):
    found = bench("latency", "--seconds", "1,3", "--cot-tokens", 6, "--answer-tokens", 3, "--seeds", 1, "--batch", 2,
                  "--plot", tmp_path / "latency.png")
    by = {(row["audio"], row["arm"]): row for row in found["rows"]}
    assert by["3 s", "CoAT"]["prompt"] - by["3 s", "base"]["prompt"] == by["3 s", "CoAT"]["block"] == 75 + 2
    assert [by["1 s", arm]["decoded"] for arm in ("base", "CoAT", "text-CoT", "generate")] == [3, 3, 9, 3]
    assert all(ratio["same_ids"] == ratio["clips"] == 1 for ratio in found["ratios"])
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_bench_train_takes_the_same_rows_both_ways_with_less_padding_in_ours():
    found = bench("train", "--steps", 2, "--batch", 4, "--mix", "1,4", "--seconds", "1", "--repeats", 1, "--no-teachers")
    assert found["mix"]["ours"]["padding"] < found["mix"]["plain"]["padding"]
    assert found["mix"]["ratio"]["rows_per_s"] == pytest.approx(found["mix"]["ratio"]["tokens_per_s"])
    assert [row["work"] for row in found["rows"]] == ["step, targets known", "step"]


def test_bench_loss_is_that_of_transformers_in_less_time_and_memory():
    rows = bench("loss", "--hidden", 16, "--tokens", 200, "--targets", 10, "--repeats", 1)["rows"]
    assert rows["ours"]["loss"] == pytest.approx(rows["plain"]["loss"])
    assert rows["plain / ours"]["s"] > 2 and not rows["plain / ours"]["peak_mib"] <= 5    # NaN where it cannot be measured


def test_bench_scale_fits_a_power_and_facts_count():
    found = bench("scale", "--seconds", "1,4", "--repeats", 1, "--ranks")
    first = [cost[0] for cost in found["costs"]]
    assert found["exponents"]["all"][0] == pytest.approx(math.log(first[1] / first[0]) / math.log(4))
    facts = bench("facts")["backbones"]
    assert [facts[name]["LoRA of rank 16 (tiny: 32)"] for name in NAMES] == [39976960, 40370176, 40370176]
    assert facts["audio-flamingo-3"]["their ids"] == "151672 .. 151674"
