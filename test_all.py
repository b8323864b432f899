"""What holds, as tests: on the CPU, without network, in two minutes on two cores.

    python -m pytest -q -n 2 test_all.py
    python -m pytest -q test_all.py -k "corpus or mixture"

The first ten are the method of the paper. Then come the files, from model.py to bench.py, then what
goes wrong: bad input, damaged files, signals, a full disk. Fixtures and helpers stand at the end:
`coat` is each of the four backbones in turn, the real ones laid out as published, with next to no
weights; `rows` are four rows of a batch, `trained` and `mixed_runs` runs of train.py.
"""
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
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest.mock
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")    # each of two processes has its core

import datasets
import filelock
import numpy as np
import pytest
import safetensors.torch
import sklearn.metrics
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch.testing import assert_close

import data
import heads
import infer
import model
from data import (Manifest, Mixture, Rows, Tones, at_rate, collate, open_source, plan_stage,
                  read_audio)
from experts import (EXPERTS, TOKEN_RATE, Affect, Expert, Pitch, SoundEvents, SpeechUnits, load,
                     resample_frames)
from model import (BACKBONES, IGNORE, THINK, THINK_END, THINK_START, InputError, TooLong,
                   build_inputs, load_coat, n_audio_tokens, render_prompt)

# On the CPU also where there is a GPU, unless COAT_TEST_GPU is set.
if "COAT_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
HERE = Path(__file__).parent.resolve()
REAL = [name for name in BACKBONES if name != "tiny"]    # backbones
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def cases(name):
    """A table of assets/reference/cases.json: what goes in, what has to come out."""
    return json.loads((HERE / "assets/reference/cases.json").read_text("utf-8"))[name]


# --------------------------------------------------------------------------------------------------
# The method

def test_training_sees_the_ids_of_inference(coat, rows):
    """A training row is the row that is asked, and then the response."""
    for wave, prompt, response in zip(*rows):
        asked = build_inputs(coat, [wave], [prompt])
        trained = build_inputs(coat, [wave], [prompt], [response])
        n = asked["input_ids"].shape[1]
        assert torch.equal(trained["input_ids"][:, :n], asked["input_ids"])
        assert (trained["labels"][:, :n] == IGNORE).all()
        assert coat.processor.decode(trained["labels"][0, n:]) == response + "<|im_end|>"


def test_block_has_L_a_plus_2_ids_from_a_tenth_of_a_second_to_two_minutes(coat):
    """Equation 2: start, a thinking token for each audio token, end."""
    window = 16000 * (4 if coat.name == "tiny" else 30)
    lengths = [1600, 1601, 15999, window - 1, window, window + 1, window + 100, window + 480,
               2 * window + 7 * 160, 77 * 16000 + 5, 120 * 16000]
    batch = build_inputs(coat, [torch.zeros(n) for n in lengths], ["?"] * len(lengths))
    start, think, end = coat.think_ids
    n_audios = batch["n_audio"].tolist()
    for ids, n_samples, n_audio in zip(batch["input_ids"].tolist(), lengths, n_audios):
        assert n_audio == n_audio_tokens(n_samples)
        assert ids[-n_audio - 2:] == [start] + [think] * n_audio + [end]
    assert torch.equal(batch["audio_mask"].sum(1), batch["n_audio"])
    assert torch.equal(batch["think_mask"].sum(1), batch["n_audio"])
    longest = coat.hf.config.get_text_config().max_position_embeddings
    assert batch["n_audio"][-1] == 3000 and batch["input_ids"].shape[1] < longest


def test_thinking_lengthens_the_one_prefill_and_adds_no_decode_step(coat):
    """The claim of section 3.2: the block is consumed in the prefill."""
    inner = coat.hf.model
    for think, block in ((True, 50 + 2), (False, 0)):
        calls = []
        with (inner.audio_tower.register_forward_pre_hook(lambda *args: calls.append("tower")),
              inner.language_model.register_forward_pre_hook(
                  lambda module, args, inputs: calls.append(inputs["inputs_embeds"].shape[1]),
                  with_kwargs=True)):
            greedy(coat, build_inputs(coat, [noise(2.0)], ["?"], think=think), 7)
        prompt = build_inputs(coat, [noise(2.0)], ["?"], think=False)["input_ids"].shape[1]
        assert calls == ["tower", prompt + block, 1, 1, 1, 1, 1, 1]


def test_cross_entropy_is_transformers_loss_over_the_response_alone(coat, rows):
    """Equation 1."""
    batch = build_inputs(coat, *rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids", "labels")}
    with torch.no_grad():
        out = coat(batch)
        theirs = coat.hf(**inputs, **batch["audio"])
    assert_close(out.ce_sum / out.n_targets, theirs.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind, reach", [("transformer", 7), ("linear", 1)])
@pytest.mark.parametrize("width", [None, 64])
def test_head_looks_both_ways_and_never_beyond_its_clip(kind, reach, width):
    """P_k of equation 3, and the linear one of table 5, which looks at its own frame alone."""
    head = heads.ProjectionHead(128, 10, kind, width)
    h = torch.randn(3, 7, 128, requires_grad=True)
    lengths = torch.tensor([7, 3, 0])
    valid = torch.arange(7) < lengths[:, None]
    out = head(h, valid)
    assert out.shape == (3, 7, 10) and out.isfinite().all()
    for i, n in enumerate([7, 3]):
        alone = head(h[i:i + 1, :n], valid[i:i + 1, :n])[0]
        assert_close(out[i, :n], alone, rtol=1e-4, atol=1e-5)
        grad, = torch.autograd.grad(out[i, 1].sum(), h, retain_graph=True)
        reached = grad.abs().sum(-1) > 0
        assert reached.sum() == reached[i, :n].sum() == min(n, reach)


@pytest.mark.parametrize("task", ["recon", "speech", "sound", "affect", "pitch", "another"])
def test_loss_is_0_at_the_expert_and_1_at_the_best_constant_answer(task):
    """Every L_k of section 3.3, with what compensates for its scale (appendix A)."""
    readout = torch.nn.Linear(6, 4).requires_grad_(False)
    clips = [3 * torch.randn(40, 6) + 1, 3 * torch.randn(25, 6) + 1]
    z, valid = model.pad_rows(torch.cat(clips), torch.tensor([40, 25]))
    expert_heads = heads.ExpertHeads(8, {task: 6}, {task: readout})
    expert_heads.calibrate(task, clips)

    def loss_of(z_hat, term):
        expert_heads[task].forward = lambda h, valid: z_hat
        return expert_heads(None, valid, {task: z})[term].item() / 65

    for term, (loss, on_readout) in heads.terms(task).items():
        if on_readout:
            logits = heads.best_constant(loss, readout(torch.cat(clips)).sigmoid())
            constant = (logits - readout.bias) @ torch.linalg.pinv(readout.weight).T
        else:
            constant = torch.cat(clips).mean(0)
        assert loss_of(z, term) == pytest.approx(0, abs=1e-5)
        assert loss_of(constant.expand_as(z), term) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("seconds", [0.3, 1, 3.77])
def test_a_click_shows_at_its_own_token(seconds):
    """Features of any frame rate are brought to the 25 Hz of the thinking tokens (section 3.3)."""
    affect, sound, pitch = an_expert("affect"), an_expert("sound"), an_expert("pitch")

    def amplitude(wave):
        return pitch.cqt_power(wave).sqrt()

    n = int(seconds * TOKEN_RATE)
    tokens = sorted({1, n // 3, 2 * n // 3, n - 2})
    for token, change in clicks(affect, affect.local, tokens, seconds):    # attention would see all
        assert change.nonzero().flatten().tolist() == [token]
    # Before the clip's level is normalised. The lowest notes' windows reach 1.3 s to both sides.
    for token, change in clicks(pitch, amplitude, tokens, seconds):
        assert change.argmax() == token
    # A segment is 8 tokens, and is pooled with its neighbours.
    last = sound.frames(round(seconds * sound.sample_rate)) - 1
    for token, change in clicks(sound, sound.features, tokens, seconds):
        assert abs(int(change.argmax()) // 8 - min(token // 8, last)) <= 1


def test_gradient_is_that_of_the_whole_batch_however_it_is_cut(mixed_runs):
    """Equation 4, as sums over the global batch divided by its counts."""
    for step, most in ((1, 1e-5), (4, 0.05)):    # AdamW magnifies what is near zero
        whole = moments(mixed_runs / f"batch/checkpoint-{step}")
        for name in ("micro_batches", "two_ranks"):
            cut = moments(mixed_runs / f"{name}/checkpoint-{step}")
            for ours, of_batch in zip(cut, whole, strict=True):
                assert (ours - of_batch).norm() <= most * of_batch.norm()
            losses = logged(mixed_runs / name), logged(mixed_runs / "batch")
            np.testing.assert_allclose(*losses, rtol=2e-3)
    assert all(moment.any() for moment in whole)    # of the heads' inner weights from step 2 on


def test_run_killed_while_saving_goes_on_bit_for_bit(mixed_runs):
    """Over two ranks and two stages."""
    killed = mixed_runs / "killed"
    left = sorted(path.name for path in killed.glob("checkpoint*"))
    assert left == ["checkpoint-1", "checkpoint-2.tmp"]
    ended(*two_ranks(mixed_runs / "resumed.log", "--resume", killed))
    for key in ("step", "loss", "recon", "grad_norm"):
        assert logged(killed, key) == logged(mixed_runs / "two_ranks", key)
    for name in ("adapter_model", "heads"):
        path = f"checkpoint-4/{name}.safetensors"
        resumed = safetensors.torch.load_file(killed / path)
        whole = safetensors.torch.load_file(mixed_runs / "two_ranks" / path)
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_merged_model_says_what_the_adapter_says(written):
    """At inference nothing is left but the backbone's weights and the block."""
    again = load_coat(written.adapter)
    assert torch.equal(greedy(again, written.batch), written.said)
    assert torch.equal(greedy(again.merge(), written.batch), written.said)


# --------------------------------------------------------------------------------------------------
# model.py: prompts and batches

HEADER = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
MARKS = {    # as the published chat templates write a clip
    "qwen2-audio": "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n",
    "qwen2.5-omni": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "audio-flamingo-3": "<sound>",
}
MARKS["tiny"] = MARKS["qwen2-audio"]


@pytest.mark.parametrize("seconds, n_audio", [(None, 0), (1.0, 25), (121 * 0.75, 2269)])
def test_row_is_the_published_prompt_and_the_block(coat, seconds, n_audio):
    """The pieces of a long clip stand between one pair of marks; white space is kept."""
    wave = None if seconds is None else noise(seconds)
    ids = build_inputs(coat, [wave], [" What is it?\n "])["input_ids"][0]
    token = coat.backbone.audio_token
    clip = MARKS[coat.name].replace(token, token * n_audio) if n_audio else ""
    block = THINK_START + THINK * n_audio + THINK_END if n_audio else ""
    assert coat.processor.tokenizer.decode(ids) == (
        HEADER + clip + " What is it?\n <|im_end|>\n<|im_start|>assistant\n" + block)


def test_special_tokens_in_a_text_are_refused(coat):
    for token in (coat.backbone.audio_token, THINK, "<|im_end|>", "<|endoftext|>"):
        for prompt, response in ((f"what is {token}?", "yes"), ("what?", token)):
            with pytest.raises(InputError, match="special token"):
                build_inputs(coat, [None], [prompt], [response])


@pytest.mark.parametrize("wave, words", [
    (torch.zeros(1000), "lasts 0.06 s"), (torch.zeros(121 * 16000), "lasts 121.00 s"),
    (torch.zeros(16000, 2), "mono"), (torch.zeros(16000, dtype=torch.int16), "int16"),
    (torch.full((16000,), 9830.0), "goes to 9.83e"),
    (torch.full((16000,), math.nan), "goes to nan")])
def test_clip_that_is_no_sound_is_refused(tiny, wave, words):
    with pytest.raises(InputError, match=words):
        build_inputs(tiny, [wave], ["?"])


# --------------------------------------------------------------------------------------------------
# model.py: forward

def test_batch_gives_each_row_what_it_gets_alone(coat, rows):
    batch = build_inputs(coat, *rows)
    with torch.no_grad():
        out = coat(batch)
        singles = [coat(build_inputs(coat, *([value] for value in row))) for row in zip(*rows)]
    assert sum(single.n_targets for single in singles) == out.n_targets
    assert_close(sum(single.ce_sum for single in singles), out.ce_sum, rtol=1e-5, atol=1e-4)
    for i, single in enumerate(singles):
        n = int(batch["n_audio"][i])
        for ours, alone in zip(out[:2], single[:2]):    # think_states, audio_embeds
            assert_close(ours[i, :n], alone[0, :n], rtol=1e-4, atol=1e-4)
        assert not out.think_states[i, n:].any()


def test_tower_hears_the_same_in_windows_as_long_as_the_longest_clip(coat, monkeypatch):
    tower = coat.hf.model.audio_tower
    whole = {name: value.clone() for name, value in tower.state_dict().items()}
    batch = build_inputs(coat, [noise(0.53), noise(1.9, 1)], ["a", "b"], ["c", "d"])
    widths = []
    with tower.conv1.register_forward_hook(lambda module, args, out: widths.append(out.shape[-1])):
        short = coat(batch)
        monkeypatch.setattr(type(coat), "short_windows", lambda *args: contextlib.nullcontext())
        long = coat(batch)
    assert_close(short[:2], long[:2], rtol=1e-4, atol=1e-5)
    assert widths[0] < widths[1] or coat.name == "qwen2.5-omni"
    assert all(torch.equal(value, whole[key]) for key, value in tower.state_dict().items())


def test_audio_embeds_are_the_projected_tower_and_build_no_graph(coat):
    batch = build_inputs(coat, [noise(0.1), None, noise(31, 1)], ["a", "t", "b"], ["c", "d", "e"])
    inner = coat.hf.model
    last = inner.audio_tower.proj if coat.name == "qwen2.5-omni" else inner.multi_modal_projector
    kept = []
    with last.register_forward_hook(lambda module, args, out: kept.append(out)):
        out = coat(batch)
    projected, = kept
    assert projected.requires_grad == bool(coat.new_projector)
    if projected.ndim == 3:
        mask = next(value for key, value in batch["audio"].items() if key.endswith("mask"))
        n_frames = [(n + 1) // 2 // 2 for n in mask.sum(1).tolist()]
        projected = torch.cat([window[:n] for window, n in zip(projected, n_frames)])
    assert torch.equal(out.audio_embeds[out.valid], projected)    # (2 + 775, D)
    assert out.think_states.requires_grad and not out.audio_embeds.requires_grad


def test_without_the_block_there_are_no_thinking_states_but_for_the_control(
        coat, rows, monkeypatch):
    """The control takes the states at the audio tokens."""
    batch = build_inputs(coat, *rows, think=False)
    with torch.no_grad():
        out = coat(batch)
        monkeypatch.setattr(coat, "think", False)
        control = coat(batch)
        h, _ = coat.states(batch, use_cache=False)
    assert not batch["think_mask"].any() and not out.valid.any()
    assert out.ce_sum > 0 and out.audio_embeds.any()
    assert torch.equal(control.valid.sum(1), batch["n_audio"])
    assert torch.equal(control.think_states[control.valid], h[batch["audio_mask"]])


def test_bf16_trains_as_fp32_does_and_merges_with_one_rounding(coat, hub):
    rows = [noise(1.0), None, noise(3.0)], ["?", "hi", "what?"], ["yes", "no", "so"]
    with torch.no_grad():
        want = coat(build_inputs(coat, *rows))
    low = loaded(coat.name, hub, dtype=torch.bfloat16)
    batch = build_inputs(low, *rows)
    with torch.autocast("cpu", torch.bfloat16):    # as train.py runs it on a GPU
        out = low(batch)
    (out.ce_sum + out.think_states.sum()).backward()
    for p in low.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        assert not p.requires_grad or p.grad.isfinite().all()
    assert_close(out.ce_sum, want.ce_sum, rtol=0.05, atol=0.1)

    layer = next(m for m in low.hf.modules() if hasattr(m, "lora_A"))
    merged = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    low.merge()
    assert torch.equal(layer.base_layer.weight, merged.bfloat16())
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert greedy(low, batch, 3).shape == (3, 3)


# --------------------------------------------------------------------------------------------------
# model.py: generation

def test_cached_steps_say_what_whole_forwards_say(coat):
    batch = two_questions(coat)
    said = greedy(coat, batch, 6)
    ids = []
    for _ in range(6):
        logits = last_logits(coat, batch)
        logits[:, coat.think_ids] = -torch.inf
        ids.append(logits.argmax(-1))
        batch["input_ids"] = torch.cat([batch["input_ids"], ids[-1][:, None]], 1)
        batch["attention_mask"] = F.pad(batch["attention_mask"], (0, 1), value=1)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(said, torch.stack(ids, 1))


def test_transformers_generate_says_the_same_and_neither_warns(coat, recwarn):
    batch = two_questions(coat)
    said = greedy(coat, batch, 6)
    assert not [w.message for w in recwarn if issubclass(w.category, FutureWarning)]
    theirs = coat.hf.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **batch["audio"],
        do_sample=False, max_new_tokens=6, min_new_tokens=6, suppress_tokens=coat.think_ids)
    assert torch.equal(said, theirs[:, batch["input_ids"].shape[1]:])


def test_answer_takes_numpy_or_torch_at_any_rate_and_lists_as_it_takes_each_alone(coat):
    wave = torchaudio.functional.resample(noise(1.0), 16000, 44100)
    clips = [wave.double().numpy(), noise(2.2, 5), None]
    said = coat.answer(clips, [44100, 16000, None], ["Which?", "Which note is it?", "Hello"], 6)
    assert said == [coat.answer(wave, 44100, "Which?", 6),
                    coat.answer(clips[1].numpy(), 16000, "Which note is it?", 6),
                    coat.answer(None, None, "Hello", max_new_tokens=6)]
    batch = build_inputs(coat, [at_rate(wave, 44100, 16000)], ["Which?"])
    assert coat.generate(batch, 6) == said[:1]


def test_thinking_tokens_are_never_said(coat):
    batch = build_inputs(coat, [noise(1.0)], ["Which?"])
    tempted = copy.deepcopy(coat)
    with torch.no_grad():
        tempted.hf.lm_head.weight[coat.think_ids] = 100 * tempted.states(batch)[0][0, -1]
    assert last_logits(tempted, batch).argmax().item() in coat.think_ids
    assert not torch.isin(greedy(tempted, batch, 5), torch.tensor(coat.think_ids)).any()


def test_step_is_compiled_once_for_all_lengths_and_says_the_same(monkeypatch):
    coat = load_coat("tiny")
    batches = [build_inputs(coat, [noise(seconds), noise(seconds / 2)], ["?", "Which note is it?"])
               for seconds in (1.0, 2.2)]
    plain = [greedy(coat, batch) for batch in batches]
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    coat.compile_decode(backend="eager")
    for batch, ids in zip(batches, plain):
        assert torch.equal(greedy(coat, batch), ids)


# --------------------------------------------------------------------------------------------------
# model.py: weights

def test_lora_sits_on_the_language_model_alone_and_a_new_projector_is_trained_whole(coat):
    trained = {name for name, p in coat.named_parameters() if p.requires_grad}
    layers = coat.hf.config.get_text_config().num_hidden_layers
    projector = {name for name in trained if ".multi_modal_projector.modules_to_save." in name}
    assert len(projector) == len(coat.new_projector) == (2 if coat.name == "qwen2-audio" else 0)
    trained -= projector
    assert len(trained) == layers * 7 * 2 + 1    # A and B of each linear map, and the three rows
    assert all(".language_model." in name for name in trained)


def test_new_rows_start_as_the_mean_of_the_used_ones_and_a_table_with_room_keeps_its_size(
        coat, hub):
    spare = {"tiny": 58} | {name: layout[1] for name, layout in LAYOUTS.items()}
    plain = load_coat(coat.name, hub[coat.name])
    used = len(plain.processor.tokenizer) - 3
    assert plain.think_ids == [used, used + 1, used + 2]
    for table in (plain.hf.get_input_embeddings().weight, plain.hf.get_output_embeddings().weight):
        assert len(table) == plain.hf.config.get_text_config().vocab_size
        assert len(table) == used + max(3, spare[coat.name])
        assert_close(table[plain.think_ids], table[:used].mean(0).expand(3, -1))


def test_run_a_checkpoint_and_a_merged_folder_are_loaded_by_their_path_from_anywhere(
        coat, written, tmp_path, monkeypatch):
    os.symlink(written.adapter, tmp_path / "checkpoint-3")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, "checkpoint-3", written.merged):
        again = load_coat(path)
        assert again.think and torch.equal(greedy(again, written.batch), written.said)
    by_name = load_coat(coat.name, model_path=written.merged)
    assert by_name.think and torch.equal(greedy(by_name, written.batch), written.said)
    assert not load_coat("tiny").think


def test_adapter_cards_lines_with_peft_alone_say_what_it_says(coat, written, tmp_path):
    if coat.name not in ("qwen2-audio", "audio-flamingo-3"):
        pytest.skip("random, or its processor needs torchvision")
    clip = wav(tmp_path, "clip.wav", noise(1.0).numpy(), subtype="FLOAT")
    said = coat.answer(noise(1.0), 16000, "Which?")
    assert run_card(written.adapter, clip, "Which?").rstrip("\n") == said


@pytest.mark.parametrize("folder", ["adapter", "merged"])
def test_saved_template_asks_for_the_block_and_writes_it(coat, written, folder):
    template = (getattr(written, folder) / "chat_template.jinja").read_text()
    clip, text = {"type": "audio"}, {"type": "text", "text": "Which?"}

    def render(content, **kwargs):
        return coat.processor.apply_chat_template(
            [{"role": "user", "content": content}], template, add_generation_prompt=True, **kwargs)

    prompt = render_prompt(coat, "Which?", 1)
    block = THINK_START + 25 * THINK + THINK_END
    assert render([clip, text], n_audio=25) == prompt + block
    assert render([clip | {"n_audio": 25}, text]) == prompt + block
    assert render([clip, text], n_audio=0) == prompt
    assert render("Say hello.") == render_prompt(coat, "Say hello.", 0)
    for content in ([clip, text], coat.backbone.audio_token + "Which?"):
        with pytest.raises(Exception, match="n_audio"):
            render(content)


def test_merged_folder_is_plain_transformers_whose_batch_says_what_each_clip_gets_alone(
        coat, written):
    """Padded on the left, with a block of its own for each clip."""
    plain = BACKBONES[coat.name].model_class.from_pretrained(written.merged)
    batch = written.batch
    ids = plain.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **batch["audio"],
        max_new_tokens=8)    # the rest is in its generation_config.json
    assert torch.equal(ids[:, batch["input_ids"].shape[1]:], greedy(coat, batch, stop=True))
    if coat.name == "qwen2.5-omni":
        pytest.skip("its own processor cannot be built without torchvision")
    processor = transformers.AutoProcessor.from_pretrained(written.merged)
    waves = [noise(1.0), noise(2.2, 5)]
    chats = [[{"role": "user", "content": [
        {"type": "audio", "n_audio": n_audio_tokens(len(wave))},
        {"type": "text", "text": "Which?"}]}] for wave in waves]
    prompts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=prompts, audio=[wave.numpy() for wave in waves], return_tensors="pt",
                       sampling_rate=16000, text_kwargs={"padding": True})
    ids = plain.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1]:]
    said = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert said == [coat.answer(wave, 16000, "Which?", 6) for wave in waves]


def test_omni_is_loaded_without_its_vision_blocks_and_talker(hub):
    coat = load_coat("qwen2.5-omni", hub["qwen2.5-omni"])
    names = [name for name, _ in coat.named_parameters()]
    assert not any("visual.blocks" in name or "talker" in name for name in names)


def test_composed_backbone_knows_what_its_text_model_knows(tmp_path):
    """docs/compose.py: a Whisper of the real window, a text model without spare rows."""
    whisper, llama, folder = (str(tmp_path / name) for name in ("whisper", "llama", "small"))
    transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        **TOWER, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )).save_pretrained(whisper)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(whisper)
    vocab = tiny_tokenizer(llama)
    text_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **NARROW, vocab_size=len(vocab), tie_word_embeddings=True)).eval()
    text_model.save_pretrained(llama)
    runpy.run_path(str(HERE / "docs/compose.py"))["compose"](whisper, llama, folder)

    coat = load_coat("qwen2-audio", folder)
    batch = build_inputs(coat, [None], ["Hello"])
    with torch.no_grad():
        logits = text_model(batch["input_ids"]).logits[:, -1]
        assert_close(last_logits(coat, batch)[:, :len(vocab)], logits)


def test_text_thinking_adapter_of_the_old_layout_is_loaded_whole(hub, text_think, tmp_path):
    """Audio Flamingo 3's own, from before transformers 5."""
    name = "audio-flamingo-3"
    want = text_think.ours.merge().hf.state_dict()
    thinking = model.load_text_think(name, text_think.folder, hub[name])
    for key, value in thinking.hf.state_dict().items():
        if key.endswith("multi_modal_projector.linear_2.bias"):
            assert torch.equal(value, text_think.bias)
        elif "embed_tokens" not in key and "lm_head" not in key:    # ours has trained rows there
            assert_close(value, want[key])
    torch.save({"elsewhere.bias": text_think.bias}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(InputError, match="elsewhere.bias"):
        model.load_text_think(name, tmp_path, hub[name])


# --------------------------------------------------------------------------------------------------
# heads.py

def test_focal_bce_at_hard_targets_is_the_focal_loss():
    logits = torch.randn(50, 4)
    hard = torch.randint(0, 2, (50, 4)).float()
    p = torch.where(hard == 1, logits.sigmoid(), 1 - logits.sigmoid())
    assert_close(heads.focal_bce(logits, hard), -(1 - p) ** 2 * p.log())


@pytest.mark.parametrize("loss", [heads.bce, heads.focal_bce])
def test_soft_losses_vanish_at_the_target_alone(loss):
    logits = torch.randn(50, 4)
    assert_close(loss(logits, logits.sigmoid()), torch.zeros(50, 4), atol=1e-6, rtol=0)
    assert (loss(logits + 0.1, logits.sigmoid()).mean(-1) > 0).all()
    q = torch.rand(50, 4)
    assert torch.equal(heads.focal_bce(logits, q, gamma=0), heads.bce(logits, q))


@pytest.mark.parametrize("loss", [heads.mse, heads.bce, heads.focal_bce])
@pytest.mark.parametrize("power", [1, 12, 100])    # the higher, the rarer is what is not near 0
def test_no_constant_answer_costs_less_than_the_best(loss, power):
    target = torch.rand(80, 6) ** power
    best = heads.best_constant(loss, target).double()    # fp32 would not tell neighbours apart
    target = target.double()
    least = loss(best.expand_as(target), target).mean(0)
    for step in (-0.5, -0.05, 0.05, 0.5):
        assert (loss((best + step).expand_as(target), target).mean(0) > least).all()


def test_padded_batch_costs_what_its_clips_cost(two_heads):
    expert_heads, h, valid, targets = two_heads
    torch.nn.init.normal_(expert_heads["pitch"].out.weight)
    together = expert_heads(h, valid, targets)
    alone = dict.fromkeys(together, 0)
    for i, n in enumerate(valid.sum(1).tolist()):
        of_clip = {task: z[i:i + 1, :n] for task, z in targets.items()}
        losses = expert_heads(h[i:i + 1, :n], valid[i:i + 1, :n], of_clip)
        alone = {term: alone[term] + loss for term, loss in losses.items()}
    for term, loss in together.items():
        assert_close(loss, alone[term], rtol=1e-4, atol=1e-4)


def test_batch_without_audio_gives_every_head_a_gradient_of_zero(two_heads):
    """Of zero, not none: the ranks wait for each other's gradients."""
    expert_heads, h, valid, targets = two_heads
    sum(expert_heads(h, torch.zeros_like(valid), targets).values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in expert_heads.parameters())


def test_losses_are_summed_in_fp32_under_autocast(two_heads):
    expert_heads, *batch = two_heads
    with torch.autocast("cpu", torch.bfloat16):
        losses = expert_heads(*batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_features_that_are_not_finite_give_no_scale(two_heads):
    """A NaN among the first clips would stay in the scales for good."""
    with pytest.raises(ValueError, match="^expert 'recon' gives NaN or infinity"):
        two_heads[0].calibrate("recon", [torch.zeros(5, 8), torch.full((5, 8), math.nan)])


@pytest.mark.parametrize("name, result", [
    ("heads", "round(losses['speech'].item(), 2) == 100"), ("experts", "z.shape == (25, 2048)")])
def test_file_copied_alone_does_what_its_docstring_says(name, result, tmp_path, monkeypatch):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    lines = re.findall(r"^    >>> (.*)$", sys.modules[name].__doc__, re.M)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name)
    names = {}
    exec("\n".join(lines), names)
    assert names[name].__file__.startswith(str(tmp_path)) and eval(result, names)


# --------------------------------------------------------------------------------------------------
# experts.py. assets/reference holds what the reference implementations give: for pitch with the
# official weights, for the others with parameters from the recipe of `fill`.

def test_speech_equals_the_reference_implementation():
    weights = {"module." + key: value for key, value in official(SpeechUnits).items()}
    speech = SpeechUnits.from_state_dict({"model": weights})
    close(speech(audio(16000, 2.0))[::11], reference("speech")["encoder_out"], 1e-5)


def test_sound_equals_the_reference_implementation():
    sound = an_expert("sound")
    wave = audio(32000, 2.0)
    close(sound.logmel(wave)[::20], reference("sound")["logmel"], 5e-4)
    z = sound(wave)
    close(z[:, ::4], reference("sound")["feat"], 1e-3, 1e-4)
    close(sound.readout(z), reference("sound")["logits"], 1e-3, 1e-4)


def test_affect_equals_the_reference_implementation_and_takes_its_sizes_from_the_file(monkeypatch):
    affect = an_expert("affect")
    assert (affect.dim, len(affect.context), len(affect.blocks), affect.extra) == (256, 3, 2, 5)
    for floats in (affect.BIAS_FLOATS[0], 4 * 104 * 7):    # all queries at once, 7 at a time
        monkeypatch.setattr(affect, "BIAS_FLOATS", [floats])
        close(affect(audio(16000, 2.0))[::9], reference("affect_tiny")["feat"], 5e-5)


def test_pitch_equals_the_official_onnx_file():
    pitch = an_expert("pitch")
    wave = chord()
    z = pitch(wave)
    close(z.view(-1, 8, 264).transpose(0, 1)[:, ::43], reference("pitch")["feat"], 1e-2)
    close(pitch.readout(z).sigmoid()[::8], reference("pitch")["contour"], 1e-3)
    close(pitch.notes(wave)[::8], reference("pitch")["note"], 1e-3)


@pytest.mark.parametrize("name", ["sound", "pitch"])
def test_readout_is_that_of_each_clip_and_passes_gradients_to_its_input_alone(name):
    expert = an_expert(name)
    z = torch.randn(2, 6, expert.dim, requires_grad=True)
    logits = expert.readout(z)
    close(logits[1], expert.readout(z[1]).detach(), 1e-4)
    logits.square().sum().backward()
    assert z.grad.abs().sum() > 0 and not expert.training
    assert all(p.grad is None and not p.requires_grad for p in expert.parameters())


@pytest.mark.parametrize("name", ["affect", "sound", "pitch"])
def test_there_are_as_many_frames_as_announced_and_at_least_one(name):
    expert = an_expert(name)
    for n in (1, 79, 400, 5000, 33024, 40001):
        z = expert(torch.randn(n) * 0.1)
        assert z.shape == (expert.frames(n), expert.dim) and z.dtype == torch.float32


@pytest.mark.parametrize("frames, n, rate, offset", [    # the four networks', and others
    (1, 7, 50.0, 0.0125), (99, 50, 50.0, 0.0125), (87, 25, 22050 / 256, 0.0), (3, 25, 3.125, 0.16),
    (400, 3, 400.0, 0.0), (5, 40, 50.0, 0.01)])
def test_frame_lands_in_the_token_that_holds_its_centre_and_constants_stay(frames, n, rate, offset):
    constant = torch.randn(1, 6)
    resampled = resample_frames(constant.expand(frames, 6), n, rate, offset)
    assert torch.equal(resampled, constant.expand(n, 6))
    hits = resample_frames(torch.eye(frames), n, rate, offset)
    for j in range(frames):
        token = int((offset + j / rate) * TOKEN_RATE + 1e-6)
        assert token >= n or hits[token, j] == hits[:, j].max() > 0


def test_random_experts_are_loud_and_always_the_same(shipped, monkeypatch):
    with warnings.catch_warnings(action="error"):
        load("pitch", random=True)    # ships its weights
    EXPERTS["affect"] = Affect    # until `shipped` ends
    monkeypatch.setattr(Affect, "__init__", functools.partialmethod(Affect.__init__, **TINY))
    with pytest.warns(UserWarning, match="affect: RANDOM WEIGHTS"):
        first, second = [load("affect", random=True)(audio(16000, 0.5)) for _ in range(2)]
    assert torch.equal(first, second)


def test_emotion_head_of_a_plus_file_is_kept():
    plus = Affect.from_state_dict(official(Affect, emotions=9, **TINY))
    assert plus.readout(torch.randn(4, 256)).shape == (4, len(plus.EMOTIONS))
    assert an_expert("affect").readout is SpeechUnits.readout is None


def test_sixth_expert_is_one_class_and_one_row(monkeypatch, tmp_path):
    class Loudness(Expert):
        sample_rate = 16000
        frame_rate = 100.0
        dim = 1
        hop = 160

        def features(self, wave):
            return wave.unfold(0, 160, 160).square().mean(1, keepdim=True)

    monkeypatch.setitem(EXPERTS, "loudness", Loudness)
    run("train.py", *QUICK, "--stage", "2:recon=0.3,loudness=0.5", "--out", tmp_path)
    first, second = log_lines(tmp_path)
    assert first["loudness"] != second["loudness"] > 0
    weighted = 0.3 * second["recon"] + 0.5 * second["loudness"]
    assert second["loss"] == pytest.approx(second["ce"] + weighted)


# --------------------------------------------------------------------------------------------------
# data.py: audio

@pytest.mark.parametrize("name, subtype, more", [
    *[("a.wav", subtype, {}) for subtype in ("PCM_16", "FLOAT", "IMA_ADPCM", "GSM610", "G721_32")],
    *[(f"a.{ending}", "PCM_16", {}) for ending in ("aiff", "au", "w64", "rf64", "caf", "flac")],
    ("a.ogg", "VORBIS", {}), ("a.ogg", "OPUS", {}),
    ("a.mp3", None, {"bitrate_mode": "CONSTANT", "compression_level": 0.99}),
    ("a.mp3", None, {"bitrate_mode": "VARIABLE", "compression_level": 0.9})])
def test_every_format_is_read_to_its_end_in_parts_and_not_when_cut(tmp_path, name, subtype, more):
    samples = noise(5.0).numpy() * np.repeat([1, 0.01, 1, 1, 0.1], 16000)    # of many bit rates
    path = wav(tmp_path, name, samples, subtype=subtype, **more)
    wave, rate = read_audio(path)
    assert abs(len(wave) - 80000) < 1500 and Manifest(one_row(path)).lengths[0] * rate == len(wave)
    for start in (0.25, 1.3, 3.1):
        part, _ = read_audio(path, start, start + 0.5)
        whole = wave[round(start * rate):][:8000]
        assert (part - whole).abs().max() < (0.01 if subtype == "OPUS" else 1e-6)
    cut_in_half(path)
    with pytest.raises(InputError, match=f"{name}' .*(cut off|breaks off|malformed|internal)"):
        read_audio(path)
    if name in ("a.wav", "a.aiff", "a.flac"):
        assert len(read_audio(path, 0.2, 0.9)[0]) == 11200    # that lies before the cut


@pytest.mark.parametrize("name, subtype", [("a.flac", None), ("a.ogg", None), ("a.ogg", "OPUS"),
                                           ("a.mp3", None), ("a.wav", None)])
def test_files_joined_in_one_are_named(tmp_path, name, subtype):
    paths = [wav(tmp_path, f"{i}{name}", noise(1.0 + i, i).numpy(), subtype=subtype)
             for i in range(2)]
    path = write(tmp_path / name, b"".join(Path(path).read_bytes() for path in paths))
    with pytest.raises(InputError, match="and then more|joined|RIFF"):
        read_audio(path)


def without_length(data):
    """An mp3 without the frame that states its length; a FLAC or WAV as it comes out of a pipe."""
    if data[:4] == b"RIFF":
        return data[:40] + b"\xff\xff\xff\xff" + data[44:]
    if data[:4] == b"fLaC":
        return data[:21] + bytes([data[21] & 0xf0]) + bytes(4) + data[26:]
    return data[data.index(data[:2], data.index(b"Xing")):]


@pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a.wav"])
def test_length_that_no_header_states_is_counted(tmp_path, name):
    more = {"bitrate_mode": "VARIABLE", "compression_level": 0.5} if name == "a.mp3" else {}
    samples = noise(20.0).numpy() * np.repeat([0.001, 1], 160000)
    path = wav(tmp_path, name, samples, **more)
    write(path, without_length(Path(path).read_bytes()))
    wave, _ = read_audio(path)
    assert abs(len(wave) - 320000) < 2000 and Manifest(one_row(path)).lengths[0] > 19.9
    assert (read_audio(path, 15, 16)[0] - wave[240000:256000]).abs().max() < 1e-6


BAD_CLIPS = {    # file: what the message must say
    "missing.wav": "no file", "empty.wav": "cannot decode", "text.wav": "ffmpeg -i",
    "x.raw": "cannot decode", "talk.sph": "NIST. is cut off or joined, or its kind",
    "zero_samples.wav": "no samples", "short.wav": "0.02 s", "long.wav": "121.00 s",
    "nan.wav": "up to nan", "huge.wav": "up to 1e", "int16.wav": "up to 9830; divide integers",
}


@pytest.mark.parametrize("name, words", BAD_CLIPS.items())
def test_bad_audio_is_refused_with_its_name_in_one_line(bad_clips, name, words):
    with pytest.raises(InputError, match=words) as error:
        read_audio(bad_clips[name])
    assert name in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, TooLong) == (name == "long.wav")


# --------------------------------------------------------------------------------------------------
# data.py: rows and tones

def test_shipped_clips_all_decode_and_their_mixture_is_one(tmp_path):
    source = Manifest(str(HERE / "assets/clips.jsonl"))
    assert len(source) >= 12 and not source.skipped
    for i in range(len(source)):
        assert source.load(i)["wave"].abs().max() > 0.02 and 1 < source.lengths[i] < 15
    text = (HERE / "assets/mixture.json").read_text()
    names = re.findall(r'"(\w+)\.jsonl"', text)
    assert set(names) <= set(data.CORPORA) and len(names) == len(set(names)) > 15
    for name in names:
        jsonl(tmp_path / f"{name}.jsonl", 3)
    assert len(Mixture(write(tmp_path / "mixture.json", text))) == 3 * len(names)


ROW = {"audio": "a.wav", "prompt": "a", "response": "b"}


@pytest.mark.parametrize("line, words", [
    *[(json.dumps(ROW | {key: value}), f'"{key}" is missing, empty, taken or of another kind')
      for key, value in [
          ("seconds", 1e308), ("seconds", "4"), ("seconds", False), ("start", -1),
          ("end", math.nan), ("wave", [0.1]), ("row", 1), ("audio", ["a.wav"]), ("prompt", " "),
          ("response", None),
          ("question", ["a"]), ("choices", "yes"), ("choices", [""]), ("task", None)]],
    (json.dumps(ROW | {"more": "\ud800"}), "surrogates not"), ("not json", "Expecting value"),
    ("[1]", "write one JSON object"), ("[" * 40000, "recursion"), (b"\xff", "codec can't decode"),
    ('{"messages": []}', '"prompt" is missing.*convert reads other formats')])
def test_row_that_cannot_be_used_gives_one_line_with_its_number(tmp_path, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "rows.jsonl", json.dumps(ROW).encode() + b"\n\n" + line)
    with pytest.raises(InputError, match=words) as error:
        Manifest(path)
    assert str(error.value).startswith(f"{path}, row 1 (line 3): ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_tasks_are_read_in_any_case_and_unknown_ones_named(tmp_path):
    rows = [ROW | {"task": task, "seconds": 1} for task in ("ASR", " asr ", "Poetry")]
    source = Manifest(write_lines(tmp_path / "rows.jsonl", rows))
    assert source[0]["task"] == "asr"
    assert source.about == "3 rows, 0.001 h: 2 asr, 1 poetry (unknown: exact match)"


def test_answers_about_tones_are_balanced_and_splits_differ():
    source = Tones("train", 600)
    answers = {kind: [] for kind in data.DEFAULT_TONES}
    for i in range(600):
        row = source.load(i)
        assert len(row["wave"]) == round(16000 * source.lengths[i]) and row["wave"].abs().max() < 1
        answers[row["task"]].append(row["response"])
    for kind, given in answers.items():
        counts = [given.count(answer) for answer in data.TONES[kind][1]]
        assert min(counts) > 0 and max(counts) < 2.2 * len(given) / len(counts)
    assert torch.equal(source.load(7)["wave"], Tones("train", 9).load(7)["wave"])
    assert not torch.equal(source.load(7)["wave"][:99], Tones("heldout", 9).load(7)["wave"][:99])


def test_few_labels_are_half_of_a_stage_and_the_rest_only_listens():
    source = open_source("tones:note,glide:21", 400, seed=1)
    plan = plan_stage(source, 50, 8, seed=1, stage=0)
    assert len(source) == 442 and (plan < 42).mean() == 0.5
    assert set(np.bincount(plan[plan < 42])) <= {4, 5} and len(set(plan[plan >= 42])) == 200
    rows = [source.load(i) for i in range(44)]
    given = Counter((row["task"], row["response"]) for row in rows)
    assert set(given.values()) == {2, 3, 7} and given["unlabelled", "ok"] == 2
    waves = [open_source("tones:note:7", 40, seed).load(0)["wave"] for seed in (1, 1, 2)]
    assert torch.equal(waves[0], waves[1]) and not torch.equal(waves[0], waves[2])


# --------------------------------------------------------------------------------------------------
# data.py: the batches of a stage

class Clips:
    """A source of which only the lengths are known."""

    draw = Manifest.draw

    def __init__(self, lengths, skipped=()):
        self.lengths = lengths
        self.skipped = skipped

    def __len__(self):
        return len(self.lengths)


def test_stage_passes_over_every_row_and_pads_little():
    rng = np.random.default_rng(0)
    source = Clips(rng.uniform(1, 30, 640), [(3, InputError("bad"))])
    plan = plan_stage(source, 100, 16, seed=1, stage=0)
    counts = np.bincount(plan.ravel(), minlength=640)
    assert counts[3] == 0 and set(counts[np.arange(640) != 3]) <= {2, 3}
    lengths = source.lengths[plan]
    assert 1 - lengths.sum() / (lengths.max(1).sum() * 16) < 0.1
    assert abs(np.corrcoef(np.arange(100), lengths.mean(1))[0, 1]) < 0.3    # not from short to long
    plans = [plan_stage(source, 100, 16, *more) for more in ((1, 0), (1, 1), (2, 0))]
    assert [np.array_equal(plan, other) for other in plans] == [True, False, False]


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_rows_of_text_are_dealt_evenly_over_the_steps(share):
    rng = np.random.default_rng(0)
    lengths = rng.uniform(1, 30, 8000) * (rng.random(8000) > share)
    plan = plan_stage(Clips(lengths), 500, 16, seed=1, stage=0)
    for window in (lengths[plan] == 0).sum(1).reshape(10, 50):
        assert window.max() - window.min() <= 1
    assert len(set(plan.ravel())) == 8000


def test_batch_without_audio_has_one_masked_frame_and_targets_of_zero(tiny):
    row = {"prompt": "Say hello.", "response": "hello"}
    (batch,), _ = collate([row, row], tiny.spec, rates=[22050])
    targets = data.expert_targets({"pitch": an_expert("pitch")}, batch)
    assert targets["pitch"].shape == (2, 1, 8 * 264) and not targets["pitch"].any()
    assert tiny(batch).valid.tolist() == [[False], [False]]


def test_targets_are_made_clip_by_clip(tiny):
    """The level of a clip, its ends and its length are its own, so it must not be padded."""
    pitch = an_expert("pitch")
    row = {"wave": noise(1.3), "rate": 16000, "prompt": "?", "response": "x"}
    (batch,), _ = collate([row, row | {"wave": noise(0.4)}], tiny.spec, [22050], responses=False)
    targets = data.expert_targets({"pitch": pitch}, batch)["pitch"]
    z = pitch(at_rate(noise(0.4), 16000, pitch.sample_rate))
    assert torch.equal(targets[1, :10], resample_frames(z, 10, pitch.frame_rate, pitch.offset))
    assert not targets[1, 10:].any()


def test_what_the_header_tells_keeps_a_row_out_of_the_plan_and_the_rest_out_of_its_batch(
        tiny, bad_clips, tmp_path):
    bad_clips = bad_clips | {"good.wav": wav(tmp_path, "good.wav", noise(1.0).numpy())}
    names = ("nan.wav", "good.wav", "long.wav", "missing.wav")
    source = Manifest(rows_about(tmp_path, bad_clips, *names))
    assert [(i, type(error)) for i, error in source.skipped] == [(2, TooLong), (3, InputError)]
    assert set(plan_stage(source, 5, 2, 0, 0).ravel()) == {0, 1}
    rows = [Rows(source)[i] for i in range(4)]
    rows += [rows[1] | {"response": THINK, "row": 7}, rows[1] | {"rate": 44099}]
    (batch,), skipped = collate(rows, tiny.spec)
    assert [row["row"] for row in batch["rows"]] == [1] and batch["seconds"] == 1.0
    assert [type(error) for error in skipped] == [InputError, TooLong, *[InputError] * 3]
    assert "row 7" in str(skipped[3]) and "44099" in str(skipped[4])
    (idle,), _ = collate(rows[:1], tiny.spec)
    assert idle["rows"] == [] and (idle["labels"] == IGNORE).all()


def test_large_batch_comes_through_few_open_files(tmp_path):
    path = manifest(tmp_path, [0.2] * 80)
    code = ("import resource, torch; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128));"
            "from data import *; spec = load_coat('tiny').spec;"
            "rows = torch.utils.data.DataLoader(Rows(Manifest(sys.argv[1])), num_workers=1,"
            "batch_sampler=[range(80)],"
            "collate_fn=lambda rows: collate(rows, spec, (22050,))[0]);"
            "print(sum(len(batch['rows']) for found in rows for batch in found))")
    ran = subprocess.run([sys.executable, "-c", code, path], cwd=HERE, text=True, timeout=60,
                         capture_output=True)
    assert ran.stdout == "80\n", ran.stderr[-1000:]


# --------------------------------------------------------------------------------------------------
# data.py: mixtures, check

MIXTURE = """// shares as in the paper
{"groups": {
  // two sources, one of them small
  "asr": {"share": 3, "sources": ["a.jsonl", {"rows": "deep/b.jsonl", "max_epochs": 2}]},
  "caption": {"share": 2, "sources": ["c.jsonl"]},
  "text": {"share": 1, "sources": ["t.jsonl"]}},
 "max_epochs": 4, "rows": 600}
"""


@pytest.fixture
def mixture(tmp_path):
    """500, 40, 300 and 70 rows."""
    for name, n in (("a", 500), ("deep/b", 40), ("c", 300)):
        jsonl(tmp_path / f"{name}.jsonl", n, task=name)
    jsonl(tmp_path / "t.jsonl", 70, audio=None, task="text")
    return Mixture(write(tmp_path / "mixture.json", MIXTURE))


def draw(source, n, seed=0, stage=0):
    return source.draw(n, np.random.default_rng([seed, stage]))


@pytest.mark.parametrize("n, counts", [
    (120, [30, 30, 40, 20]),       # 3 : 2 : 1, sources of a group alike
    (600, [220, 80, 200, 100]),    # deep/b has 40 rows, twice; the rest goes to its group
    (2400, [1192, 80, 848, 280]),  # text has 4 * 70, the rest goes to other groups
    (3560, [2000, 80, 1200, 280])])
def test_mixture_gives_shares_and_what_is_capped_to_the_others(mixture, n, counts):
    assert mixture.counts(n).tolist() == counts
    drawn = draw(mixture, n, 3, 1)
    assert np.array_equal(drawn, draw(mixture, n, 3, 1))
    assert not np.array_equal(drawn, draw(mixture, n, 3, 2))
    times = np.bincount(drawn, minlength=len(mixture))
    for begin, end, cap, count in zip(mixture.first, mixture.first[1:], (4, 2, 4, 4), counts):
        of_source = times[begin:end]
        assert of_source.sum() == count
        assert of_source.max() - of_source.min() <= 1 and of_source.max() <= cap
    with pytest.raises(InputError, match="3561 rows, but .* has 3560 under"):
        draw(mixture, 3561)


def test_unusable_rows_are_never_drawn_and_a_group_of_them_leaves_its_share(mixture, tmp_path):
    row = {"prompt": "?", "response": "x"}
    rows = [row | {"audio": "none.wav"}]
    rows += [row | {"audio": "x.wav", "seconds": seconds} for seconds in (0, 5, 121, 6)]
    write(tmp_path / "c.jsonl", "\n\n".join(map(json.dumps, rows)))    # an empty line is no row
    source = Mixture(mixture.path)
    kinds = {i: type(error) for i, error in source.skipped}
    assert kinds == {540: InputError, 541: InputError, 543: TooLong}
    times = np.bincount(draw(source, 300), minlength=len(source))
    assert times[540:545].tolist() == [0, 0, 4, 0, 4]
    jsonl(tmp_path / "c.jsonl", 1, audio="none.wav", seconds=None)
    assert Mixture(mixture.path).counts(240).tolist() == [100, 80, 0, 60]
    write(mixture.path, MIXTURE.replace('"share"', '"draw": "by size", "share"'))
    assert Mixture(mixture.path).counts(240).tolist() == [167, 13, 0, 60]


@pytest.mark.parametrize("old, new", [
    ("3,", "3"), ('"share": 3', '"share": 0'), ('"share": 3', '"shares": 3'), ('"c.jsonl"', "3"),
    ('["c.jsonl"]', "[]"), ('"text"', '"asr"'), ('"max_epochs": 4', '"max_epochs": 0'),
    ('"share": 2', '"share": 2, "draw": "alike"'), ('"c.jsonl"', '"no.jsonl"')])
def test_bad_mixture_is_refused(mixture, old, new):
    write(mixture.path, MIXTURE.replace(old, new, 1))
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        Mixture(mixture.path)


def test_check_says_what_a_stage_draws_and_what_training_skips(mixture, tmp_path, capsys):
    assert data.check(SimpleNamespace(path=mixture.path, quick=True)) is False
    text = capsys.readouterr().out
    assert "910 rows" in text and "0 would be skipped" in text
    line, = [line for line in text.splitlines() if "deep/b.jsonl" in line]
    assert line.split()[:4] == ["40", "80", "13.33%", "2.00"]

    wav(tmp_path, "good.wav", noise(1.0).numpy())
    wav(tmp_path, "nan.wav", np.full(16000, np.nan), subtype="FLOAT")
    cut_in_half(wav(tmp_path, "cut.wav", noise(1.0).numpy()))
    row = {"prompt": "?", "response": "x"}
    rows = [row | {"audio": f"{name}.wav"} for name in ("good", "nan", "cut", "none")]
    rows += [row | {"audio": "cut.wav", "seconds": 1}, row | {"prompt": f"a {THINK}"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    for quick, found in ((False, {1, 2, 3, 4, 5}), (True, {2, 3})):
        assert data.check(SimpleNamespace(path=path, quick=quick)) is True
        text = capsys.readouterr().out
        assert {int(i) for i in re.findall(r"rows.jsonl, row (\d+): ", text)} == found
        assert f"{len(found)} would be skipped" in text


# --------------------------------------------------------------------------------------------------
# data.py: benchmarks

LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def parquet(path, *rows, column="audio"):
    """Rows as the hub stores them, with a FLAC of 1 s, 1.5 s .. in each."""
    clips = [wav(path.parent, f"{i}.flac", noise(1 + i / 2, i).numpy()) for i in range(len(rows))]
    table = {key: [row[key] for row in rows] for key in rows[0]}
    table[column] = [{"bytes": Path(clip).read_bytes(), "path": clip} for clip in clips]
    datasets.Dataset.from_dict(table).to_parquet(str(path))
    return path


@pytest.mark.parametrize("name, cells, prompt, response, limit, more", cases("benchmarks"))
def test_benchmark_gives_the_prompt_reference_and_limit_of_lmms_eval(
        tmp_path, name, cells, prompt, response, limit, more):
    spec = data.BENCHMARKS[name]
    path = parquet(tmp_path / "x.parquet", cells, cells, column=spec.get("clip", "audio"))
    source = open_source(f"{name}={path}")
    row = source[1]
    assert (row["prompt"], row["response"]) == (prompt, response)
    assert row | more == row and (row["benchmark"], row["max_new_tokens"]) == (name, limit)
    assert ("choices" in row) == (row["task"] == "mcq") and row["family"] in data.FAMILIES
    assert source.lengths.tolist() == [1, 1.5] and not source.skipped and str(path) in source.about
    assert torch.equal(source.load(0)["wave"], read_audio(str(tmp_path / "0.flac"))[0])


def test_benchmark_leaves_out_references_of_tags_alone_and_answers_that_are_no_choice(tmp_path):
    path = parquet(tmp_path / "x.parquet", *({"gt": gt} for gt in (
        "YES", "<MUSIC>", "<NOISE> <PERIOD>", "<OTHER> NO")))
    source = open_source(f"gigaspeech={path}")
    assert [i for i, _ in source.skipped] == [1, 2] and len(source) == 4
    path = parquet(tmp_path / "y.parquet", {"answer": "bored"}, column="context")
    assert "none of the choices" in str(open_source(f"meld={path}").skipped[0][1])


def test_benchmark_lies_in_files_or_a_folder_of_save_to_disk(tmp_path):
    (tmp_path / "hub/en").mkdir(parents=True)
    for name in ("clean", "other"):
        parquet(tmp_path / f"hub/en/librispeech_test_{name}-0.parquet", {"gt": "0"}, {"gt": "1"})
    table = datasets.load_dataset("parquet", data_files=f"{tmp_path}/hub/en/*clean*.parquet")
    table.save_to_disk(tmp_path / "saved")    # {"train": ..}
    table["train"].save_to_disk(tmp_path / "one")
    first = data.fingerprint(open_source(f"librispeech-clean={tmp_path}/hub"))
    for place in ("hub/en/*clean-0.parquet", "saved", "one"):
        source = open_source(f"librispeech-clean={tmp_path}/{place}")
        assert data.fingerprint(source) == first and len(source.load(1)["wave"]) == 24000
    with pytest.raises(InputError, match="no column 'sentence', but gt"):
        open_source(f"common_voice={tmp_path}/one")
    with pytest.raises(InputError, match="no parquet file of  test_mini"):
        open_source(f"mmau={tmp_path}/hub")


def test_benchmark_is_asked_of_the_hub_in_its_revision_or_read_from_its_makers_folder(
        monkeypatch, tmp_path):
    asked = []
    table = datasets.load_dataset("parquet", data_files=str(
        parquet(tmp_path / "x.parquet", {"gt": "a", "normalized_text": "a"})), split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append(
        (args, more)) or table)
    for name in ("librispeech-clean", "librispeech-clean@abc123", "voxpopuli"):
        open_source(name)
    config = "librispeech_test_clean"
    assert asked == [
        *[(("lmms-lab-audio/librispeech", config),
           {"split": config, "revision": revision, "data_files": None})
          for revision in (None, "abc123")],
        (("facebook/voxpopuli", None), {"split": "test", "revision": "refs/convert/parquet",
                                        "data_files": {"test": "en/test/*.parquet"}})]

    iemocap(tmp_path / "full", 5, ["ang", "xxx", "exc"], wav(tmp_path, "a.wav", noise(1.0).numpy()))
    source = open_source(f"iemocap={tmp_path}/full")
    assert [row["response"] for row in source] == ["A. angry", "B. happy"]
    row = source.load(0)
    assert len(row["wave"]) == 16000 and row["speaker"] == "Ses05F" and row["prompt_is_ours"]
    assert row["prompt"] == ("Which emotion does the speaker express?\nA. angry\nB. happy\n"
                             "C. neutral\nD. sad" + LETTER)
    with pytest.raises(InputError, match="give gtzan=PLACE, gtzan has to lie as ROOT/genres"):
        open_source("gtzan")


# --------------------------------------------------------------------------------------------------
# data.py: corpora

@pytest.mark.parametrize("name, files, wanted, told", cases("corpora"))
def test_corpus_is_read_as_its_makers_lay_it_out(tmp_path, capsys, name, files, wanted, told):
    root = tmp_path / "cor[p]us"
    mixed = {path: text.encode("latin-1") for path, text in files.items() if name == "clotho"}
    lay_out(root, files | mixed)
    rows, counts = convert(capsys, name, root, data.CORPORA[name]["splits"][:1])
    for row, (audio, response, more) in zip(rows, wanted, strict=True):
        want = {"audio": audio and str(root / audio), "response": response} | more
        assert row["prompt"] in [more.get("prompt"), *data.WORDINGS[row["task"]]]
        assert row == want | {key: row[key] for key in ("prompt", "task")}
    assert counts == f"{name}: {len(wanted)} rows, {told}"


def assert_choices(rows, answers, choices):
    for row, answer in zip(rows, answers, strict=True):
        lettered = [f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", row["choices"])]
        assert sorted(row["choices"]) == sorted(choices)
        assert row["response"] == lettered[row["choices"].index(answer)]
        assert row["prompt"].endswith(("? " + " ".join(lettered), "voice. " + " ".join(lettered)))


def test_emotions_and_genres_are_letters_balanced_and_always_the_same(tmp_path, capsys):
    with pytest.raises(InputError, match="no file .*; meld has to lie as ROOT/"):
        convert(capsys, "meld", tmp_path)
    iemocap(tmp_path / "full", 1, ["neu", "exc", "xxx", "fru", *["hap"] * 400])
    rows, counts = convert(capsys, "iemocap", tmp_path / "full")
    assert_choices(rows, ["neutral", *["happy"] * 401], ["angry", "happy", "sad", "neutral"])
    letters = [row["response"][0] for row in rows]
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")
    assert {row["prompt"].split(" A. ")[0] for row in rows} == set(data.WORDINGS["emotion"])
    assert convert(capsys, "iemocap", tmp_path / "full")[0] == rows
    assert {(row["speaker"], row["recording"]) for row in rows} == {("Ses01F", "Ses01F_impro01")}
    open_rows, _ = convert(capsys, "iemocap_qa", tmp_path / "full")
    assert open_rows[0]["response"] == "neutral" and "choices" not in open_rows[0]
    lay_out(tmp_path / "g/genres", {"rock/0.wav": "", "rock/x.mf": "", "pop/1.au": ""})
    rows, _ = convert(capsys, "gtzan", tmp_path / "g")
    assert_choices(rows, ["pop", "rock"], data.BENCHMARKS["gtzan"]["options"])


# --------------------------------------------------------------------------------------------------
# data.py: tables, data sets and conversations of one's own

@pytest.mark.parametrize("given, choices", cases("choices"))
def test_choices_are_read_however_they_are_written(given, choices):
    assert data.read_choices(given) == (choices or given)
    for bad in ("[1", ["a", "", "b"], ["A. x", "B.", "C. y"], ["a"], "", None):
        with pytest.raises(data.LeftOut):
            data.read_choices(bad)


@pytest.mark.parametrize("answer, number", [
    ("No", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("(b) No", 1), ("0", 0), ("2", 2), ("3", None),
    ("D", None), ("B. yes", None), ("none", None), ("", None)])
def test_answer_is_a_text_a_letter_or_an_index(answer, number):
    assert data.find_choice(answer, ["yes", "no", "perhaps"]) == number
    assert data.find_choice("1", ["2", "1", "0"]) == 1    # texts go before letters and numbers
    assert data.find_choice("(A) x", ["C", "B", "A"], by_letter=True) == 0


@pytest.fixture
def table(tmp_path):
    text = "file name\tq\ta\tid\nx/1.wav\tWhy?\tBecause\t1\nx/2.wav\tWho?\tMe\t2\n"
    lay_out(tmp_path / "t", {"x/1.wav": "", "my.tsv": text})
    return tmp_path / "t" / "my.tsv"


@pytest.mark.parametrize("flags, prompt, response", cases("tables"))
def test_any_table_is_read_by_the_names_of_its_columns(table, capsys, flags, prompt, response):
    rows, _ = convert(capsys, "csv", table, **flags)
    audio = str(table.parent / "x/1.wav") if "audio" in flags else None
    assert rows[0] == {"audio": audio, "prompt": prompt or rows[0]["prompt"], "response": response,
                       "task": flags.get("task", "qa")}
    assert rows[0]["prompt"] in ([prompt] if prompt else data.WORDINGS["caption"])
    assert len(rows) == (1 if audio else 2)


@pytest.mark.parametrize("flags", [{}, {"audio": "file name"}, {"task": "asr"},
                                   {"audio": "file name", "task": "asr", "choices": "q"}])
def test_table_that_would_give_no_prompt_is_refused(table, capsys, flags):
    with pytest.raises(InputError, match="give --prompt or --question"):
        convert(capsys, "csv", table, response="a", **flags)


def test_columns_of_the_usual_names_need_no_flag_and_what_is_no_text_is_counted(tmp_path, capsys):
    lay_out(tmp_path / "t", {"t.csv": 'prompt,response\nWhy?,Hello, world\nWhy?,"Hello, world"\n'})
    rows, counts = convert(capsys, "csv", tmp_path / "t/t.csv")
    assert [row["response"] for row in rows] == ["Hello, world"]
    assert "1 left out, 1 no text where one belongs, or commas" in counts
    items = [{"prompt": "?", "response": a} for a in (["x"], {"b": "c"}, 3, "\ud800")]
    write_lines(tmp_path / "t/t.jsonl", items)
    rows, counts = convert(capsys, "json", tmp_path / "t/t.jsonl")
    assert [row["response"] for row in rows] == ["3"]
    assert "2 no text where one belongs" in counts and "surrogates" in counts


@pytest.mark.parametrize("there, named, found", cases("clip_names"))
def test_clip_is_the_file_that_is_named_or_the_only_one_of_its_name(
        tmp_path, capsys, there, named, found):
    lay_out(tmp_path / "t", {name: "" for name in there} | {
        "t.csv": f"audio,prompt,response\n{named},?,x\n{there[0]},?,y\n"})
    rows, counts = convert(capsys, "csv", tmp_path / "t/t.csv")
    assert rows[0]["audio"] == str(tmp_path / "t" / found) or len(rows) == 1 and found in counts


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_any_data_set_becomes_rows_and_clips(tmp_path, capsys, kind):
    rows = [{"q": "Which?", "label": label} for label in (1, 0)]
    path = parquet(tmp_path / "x.parquet", *rows, column="sound")
    if kind == "disk":
        table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        table = table.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
        table.cast_column("sound", datasets.Audio()).save_to_disk(path := tmp_path / "disk")
    found, counts = convert(capsys, "hub", path, audio="sound", prompt="q", response="label",
                            clips=str(tmp_path / "clips"))
    assert [row["response"] for row in found] == (["dog", "cat"] if kind == "disk" else ["1", "0"])
    for i, row in enumerate(found):
        assert Path(row["audio"]).parent == tmp_path / "clips"
        assert Path(row["audio"]).read_bytes() == (tmp_path / f"{i}.flac").read_bytes()


def test_pitch_class_is_the_one_with_most_notes(tmp_path, capsys):
    t = np.arange(32000) / 16000
    (tmp_path / "t").mkdir()
    for name, hz in (("a", 440), ("fis", 185), ("low_c", 65.4), ("silent", 0)):
        tone = sum(np.sin(2 * np.pi * k * hz * t) / k for k in (1, 2, 3))
        wav(tmp_path / "t", f"{name}.wav", 0.2 * tone)
    lay_out(tmp_path / "t", {"broken.wav": "no sound", "t.csv": "audio,response\n" + "".join(
        f"{name}.wav,x\n" for name in ("silent", "broken", "a", "fis", "low_c"))})
    rows, counts = convert(capsys, "csv", tmp_path / "t/t.csv", task="asr", pitch_class=True)
    assert [row["pitch_class"] for row in rows] == [None, "A", "F#", "C"]
    assert "1 left out, 1 cannot decode" in counts


SAY_YES = {"messages": [{"role": "user", "content": "Say yes."},
                        {"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize("item", cases("conversations"))
def test_conversations_of_other_projects_become_rows(tmp_path, capsys, item):
    items = "\n".join(map(json.dumps, [item, SAY_YES]))
    lay_out(tmp_path / "t", {"1.wav": "", "t.jsonl": items})
    rows, counts = convert(capsys, "messages", tmp_path / "t/t.jsonl")
    assert rows == [
        {"audio": str(tmp_path / "t/1.wav"), "prompt": "Why?", "response": "x", "task": "qa"},
        {"audio": None, "prompt": "Say yes.", "response": "Yes.", "task": "qa"}]


@pytest.mark.parametrize("item, reason", cases("no_conversations"))
def test_conversations_that_are_no_row_are_left_out_and_counted(tmp_path, capsys, item, reason):
    items = "\n".join(map(json.dumps, [item, SAY_YES]))
    lay_out(tmp_path / "t", {"1.wav": "", "t.jsonl": items})
    rows, counts = convert(capsys, "messages", tmp_path / "t/t.jsonl")
    assert len(rows) == 1 and counts == f"messages: 1 rows, 1 left out, 1 {reason}"


# --------------------------------------------------------------------------------------------------
# train.py

def test_training_learns_to_hear_and_another_clip_brings_it_back_to_chance(trained):
    for result in trained.heldout.values():
        assert deviations(result["heard"], result["chance"]) > 3, result
        assert deviations(result["other_clip"], result["chance"]) < 3, result
    ce = logged(trained.folder, "ce")
    assert np.mean(ce[-10:]) < np.mean(ce[:3]) / 3
    command = re.search("python infer.py (ask .*)", trained.printed)[1]    # its last words
    assert run("infer.py", *shlex.split(command)).strip()


def test_all_five_experts_train_together(all_five):
    process, folder = all_five
    ended(process)
    first, second = log_lines(folder)
    for term in ("recon", "speech", "sound", "affect", "pitch", "pitch_aux"):
        assert 0 < second[term] != first[term] > 0
    saved = safetensors.torch.load_file(folder / "checkpoint-2" / "heads.safetensors")
    assert {name.split(".")[0] for name in saved if "." in name} == set(EXPERTS)


def test_no_term_begins_a_stage_far_above_the_best_constant_answer(trained, all_five, mixed_runs):
    ended(all_five[0])
    for folder in (trained.folder, all_five[1], mixed_runs / "batch"):
        first = {line["stage"]: line for line in reversed(log_lines(folder))}
        for line in first.values():
            terms = {*EXPERTS, "pitch_aux"} & set(line)
            assert max(line[term] for term in terms) < 3, (folder, line)


def test_stages_have_their_own_weights_rates_and_data(tmp_path):
    text = write_lines(tmp_path / "text.jsonl", [{"audio": None, "prompt": "?", "response": "."}])
    run("train.py", *QUICK, "--data", "tones:note", text, "--w-pitch-aux", 0.25, "--stage",
        "2:recon=0.5,pitch=2:1e-3", "--stage", "1:recon", "--out", tmp_path / "run")
    first, second, third = log_lines(tmp_path / "run")
    for line in (first, second):
        terms = 0.5 * line["recon"] + 2 * line["pitch"] + 2 * 0.25 * line["pitch_aux"]
        assert line["loss"] == pytest.approx(line["ce"] + terms)
    assert first["lr"] == 1e-3
    assert third["recon"] is None and third["audio_s_per_s"] == 0    # of text, there is nothing
    assert third["loss"] == pytest.approx(third["ce"])
    assert os.path.getsize(tmp_path / "run" / "losses.png") > 5000


def test_losses_of_held_out_rows_are_those_of_a_step_that_learns_nothing(short_run):
    """Here the rows of the step are the held-out ones."""
    run("train.py", *QUICK, "--data", "rows.jsonl", "--batch", 3, "--stage", "1:recon:1e-30",
        "--heldout", "rows.jsonl", "--out", "one")
    line, = log_lines(Path("one"))
    for name in ("ce", "recon"):
        assert line[f"heldout_{name}"] == pytest.approx(line[name], rel=1e-5)


def test_stages_of_the_paper_are_the_default():
    train_py = runpy.run_path(str(HERE / "train.py"))
    args = SimpleNamespace(w_pitch_aux=1.0, lr=1e-4)
    one, two = [train_py["parse_stage"](text, args) for text in train_py["PAPER_STAGES"]]
    assert one.steps == two.steps == 100_000
    assert (one.tasks, two.tasks) == (["recon"], list(EXPERTS))


@pytest.mark.parametrize("stage, tasks", [("2:none", set()), ("2:recon,pitch", {"recon", "pitch"})])
def test_run_without_the_block_trains_its_experts_and_remembers_it(tmp_path, stage, tasks):
    run("train.py", *QUICK, "--no-think", "--stage", stage, "--checkpointing", "--out", tmp_path)
    first, second = log_lines(tmp_path)
    assert set(EXPERTS) & set(first) == tasks
    assert all(0 < second[term] != first[term] > 0 for term in tasks)
    assert not load_coat(tmp_path / "checkpoint-2").think


def test_checkpointing_changes_no_step(short_run):
    run("train.py", *short_run, "--checkpointing", "--out", "other")
    np.testing.assert_allclose(logged(Path("other")), logged(Path("run")), rtol=1e-6)


def test_ranks_with_different_numbers_of_usable_rows_are_one_batch(tmp_path):
    """Five and three in the first step, five and none in the second, and none in the third."""
    seconds = [0.4 + 0.05 * i for i in range(30)]
    rows = manifest(tmp_path, seconds)
    plan = plan_stage(Manifest(rows), 3, 10, seed=0, stage=0)
    for i in [*plan[0][[6, 8]], *plan[1][5:], *plan[2]]:    # rank 1 has the last five of a step
        nan = np.full(round(seconds[i] * 16000), np.nan)
        wav(tmp_path, f"{i}.wav", nan, subtype="FLOAT")
    flags = [*QUICK, "--data", rows, "--stage", "3:recon,pitch", "--batch", 10,
             "--micro-tokens", 1, "--calibrate", 10]
    ended(*two_ranks(tmp_path / "log", *flags, "--out", tmp_path / "two"))
    run("train.py", *flags, "--out", tmp_path / "one")
    for key, want in (("skipped", [2, 7, 17]), ("lost", [0, 0, 1])):
        assert logged(tmp_path / "two", key) == logged(tmp_path / "one", key) == want
    for key in ("ce", "recon", "pitch", "grad_norm"):
        *two, lost = logged(tmp_path / "two", key)
        assert lost is None
        np.testing.assert_allclose(two, logged(tmp_path / "one", key)[:2], rtol=2e-3)


def test_new_run_can_begin_with_what_another_has_learned(trained, tmp_path):
    """With its adapter and heads, which a rate of next to nothing leaves as they are."""
    run("train.py", *QUICK, "--init-from", trained.folder, "--stage", "1:recon,pitch:1e-30",
        "--out", tmp_path)
    for name in ("adapter_model", "heads"):
        ours = safetensors.torch.load_file(tmp_path / f"checkpoint-1/{name}.safetensors")
        theirs = safetensors.torch.load_file(trained.folder / f"checkpoint-60/{name}.safetensors")
        assert set(ours) == set(theirs)
        for key in ours:
            assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-12)
    first, = log_lines(tmp_path)
    assert first["ce"] < logged(trained.folder, "ce")[0] / 2
    assert first["recon"] < logged(trained.folder, "recon")[0]
    optimizer = load_optimizer(tmp_path / "checkpoint-1")
    assert {int(p["step"]) for p in optimizer["state"].values()} == {1}    # it is new


# --------------------------------------------------------------------------------------------------
# infer.py: ask, merge

def asked(*args, **kwargs):
    flags = ["--workers", 0, "--max-new-tokens", 20]
    return run("infer.py", "ask", *args, *flags, **kwargs)


def test_merged_folder_its_card_and_score_say_what_ask_says(
        answers, three_notes, trained, merged, tmp_path):
    assert answers[trained.folder] == answers[merged] != [""] * 3
    for name, said in answers.items():
        out = tmp_path / name.name
        run("infer.py", "score", name, three_notes / "rows.jsonl", "--out", out, "--workers", 0,
            "--max-new-tokens", 20)
        assert [line["answer"] for line in predictions(out)] == said
    printed = run_card(merged, three_notes / "0.wav", "Which note?")    # without our code
    assert printed == 2 * (answers[merged][0] + "\n")    # by generate, and by a pipeline


@pytest.mark.parametrize("batch", [1, 4])
def test_ask_on_a_manifest_says_what_score_says(trained, three_notes, answers, tmp_path, batch):
    rows = [{"audio": str(three_notes / f"{i % 3}.wav"), "prompt": "Which note?"} for i in range(5)]
    path = write_lines(tmp_path / "rows.jsonl", rows)    # without a response
    printed = asked(trained.folder, path, "--json", "--batch", batch)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["answer"] for line in lines] == [answers[trained.folder][i % 3] for i in range(5)]
    assert [line["audio"] for line in lines] == [row["audio"] for row in rows]
    assert [line["row"] for line in lines] == list(range(5))


def test_clip_that_cannot_be_read_is_named_and_the_others_are_answered(
        trained, three_notes, answers, bad_clips):
    bad = [bad_clips["text.wav"], bad_clips["nan.wav"]]
    errors = io.StringIO()
    printed = asked(trained.folder, bad[0], three_notes, bad[1], "Which note?", errors=errors)
    said = answers[trained.folder]    # in a folder rows.jsonl is left out
    assert printed.splitlines() == [f"{three_notes}/{i}.wav: {said[i]}" for i in range(3)]
    assert "text.wav" in errors.getvalue() and "nan.wav" in errors.getvalue()
    assert "none of the 2 rows" in asked(trained.folder, *bad, "Which?", fails=True)


@pytest.mark.parametrize("words, message", [
    ("a.wav", "last, a question"),
    ("{rows} What?", "whose rows have their own"), ("nowhere.jsonl", "nowhere.jsonl"),
    ("{empty} What?", "give clips"), ("missing.wav What?", "missing.wav")])
def test_ask_says_what_it_needs(three_notes, tmp_path, words, message):
    words = words.format(rows=three_notes / "rows.jsonl", empty=tmp_path)
    assert message in asked("tiny", *words.split(), fails=True)


# --------------------------------------------------------------------------------------------------
# infer.py: where the block is placed

@pytest.fixture(scope="session")
def no_block(tmp_path_factory):
    """A run of train.py --no-think."""
    folder = tmp_path_factory.mktemp("runs") / "no_block"
    run("train.py", "--data", "tones:note", "--stage", "1:none", "--no-think", *QUICK,
        "--out", folder)
    return folder


def test_block_is_placed_for_models_trained_with_it_alone(trained, merged, no_block, tmp_path):
    run("infer.py", "merge", no_block, tmp_path / "merged")
    expected = {"tiny": False, trained.folder: True, merged: True, no_block: False,
                tmp_path / "merged": False}
    for name, block in expected.items():
        ask = ["ask", name, trained.clip, "?", "--json", "--workers", 0, "--max-new-tokens", 1]
        told = last_json(run("infer.py", *ask))
        without = last_json(run("infer.py", *ask, "--no-think"))
        extra = told["n_audio"] + 2 if block else 0
        assert told["prompt_tokens"] == without["prompt_tokens"] + extra


# --------------------------------------------------------------------------------------------------
# infer.py: how an answer is read

FEELINGS = ["angry", "happy", "very happy", "sad"]


@pytest.mark.parametrize("case", cases("readings"))
def test_choice_is_read_as_a_person_reads_it(case):
    for answer in case["answers"]:
        assert infer.read_choice(answer, case["choices"]) == case["read"], answer


@pytest.mark.parametrize("text, answer", cases("final_answers"))
def test_answer_is_taken_out_of_a_text_that_reasons(text, answer):
    assert infer.final_answer(text) == answer


@pytest.mark.parametrize("answer, response", [
    ("a dog", "A dog."), ("Café", "Cafe\u0301"), ("don’t", "don't"), ("a\u200b dog", "a dog")])
def test_forms_of_a_text_are_one(answer, response):
    row = {"row": 0, "task": "qa", "response": response, "answer": answer}
    assert infer.measure([row])[0]["value"] == 1


@pytest.mark.parametrize("answer, first, second", cases("lmms_choices"))
def test_choice_is_read_as_in_lmms_eval(answer, first, second):
    choices = ["angry", "happy", "sad", "bored"]
    for rule, letter in (("lmms-1", first), ("lmms-2", second)):
        expected = choices["ABCD".index(letter)] if letter else None
        assert infer.lmms_choice(answer, choices, rule) == expected


@pytest.mark.parametrize("reply, rating", cases("ratings"))
def test_rating_is_a_whole_number_from_0_to_5_or_none(reply, rating):
    assert infer.read_rating(reply) == rating
    assert infer.read_rating("rating" + ":" * 2 ** 18) is None    # and soon


# --------------------------------------------------------------------------------------------------
# infer.py: measures

def spoken(response, answer, **more):
    return {"row": 0, "task": "asr", "response": response, "answer": answer} | more


@pytest.mark.parametrize("response, answer, rate, more", cases("error_rates"))
def test_error_rate_counts_what_its_rule_says(response, answer, rate, more):
    first, *_ = infer.measure([spoken(response, answer, **more)])
    assert first["value"] == pytest.approx(rate)
    assert first["metric"] == ("CER" if re.match("[今ไ]", response) else "WER")


def test_accuracy_and_weighted_f1_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    lines = []
    for i, answer in enumerate(rng.choice([*FEELINGS, "bored", "", "angry or sad"], 60)):
        choices = rng.permutation([*FEELINGS, "sad"]).tolist()    # one is listed twice
        lines.append({"row": i, "task": "emotion", "choices": choices, "answer": str(answer),
                      "response": FEELINGS[i * i % 3]})    # none of them is sad
    found = {result["metric"]: result["value"] for result in infer.measure(lines)}
    truth = [line["response"] for line in lines]
    said = [line["answer"] if line["answer"] in FEELINGS else "none" for line in lines]
    assert found["accuracy"] == sklearn.metrics.accuracy_score(truth, said)
    theirs = sklearn.metrics.f1_score(truth, said, average="weighted")
    np.testing.assert_allclose(found["weighted F1"], theirs, rtol=1e-12)
    assert found["no answer"] == said.count("none") / 60


def test_benchmark_is_scored_by_lmms_evals_rule_and_by_ours():
    row = {"task": "mcq", "benchmark": "mmau", "family": "General", "rule": "lmms-1",
           "choices": ["yes", "no"], "response": "A. yes"}
    rows = [row | {"row": i, "answer": "Yes, certainly"} for i in range(200)]
    theirs, ours, *_ = infer.measure(rows)
    assert ours["value"] == 1 and abs(theirs["value"] - 0.5) < 0.15    # it draws one
    assert (theirs["task"], theirs["rule"], ours["rule"]) == ("mmau", "lmms-1", "ours")
    row = {"row": 0, "task": "qa", "benchmark": "clotho_aqa", "response": "t-shirt"}
    assert [r["value"] for r in infer.measure([row | {"answer": "tshirt"}])] == [1, 0]


def test_families_average_benchmarks_of_the_same_metric_that_all_arms_have():
    results = [
        {"arm": arm, "data": None, "seed": None, "task": task, "metric": metric, "value": value,
         "family": "General"} for arm, task, metric, value in (
            ("a", "mmau", "accuracy", 60), ("a", "mmar", "accuracy", 50),
            ("a", "wavcaps", "rating", 30), ("b", "mmau", "accuracy", 70),
            ("b", "mmsu", "accuracy", 10), ("b", "mmar", "accuracy", 60))]
    means = {(r["arm"], r["task"], r["metric"]): r["value"] for r in infer.family_means(results)}
    assert means == {("a", "General: mean of mmau, mmar", "accuracy"): 55,
                     ("b", "General: mean of mmau, mmar", "accuracy"): 65,
                     ("a", "General: mean of wavcaps", "rating"): 30}


# --------------------------------------------------------------------------------------------------
# infer.py: score

def test_score_that_was_stopped_goes_on_without_losing_or_repeating_a_row(scored, monkeypatch):
    stream = model.CoAT.stream
    calls = []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 3:
            raise InputError("stopped")
        return stream(*args)

    monkeypatch.setattr(model.CoAT, "stream", stopping)
    cut = scored.out.with_name("cut")
    assert "stopped" in scored.again(cut, fails=True)
    os.truncate(cut, os.path.getsize(cut) - 5)    # as a kill in the middle of a line leaves it
    assert last_json(scored.again(cut)) == scored.result
    assert len(calls) == 3 + 2    # seven of twelve rows were there
    assert predictions(cut) == predictions(scored.out)
    assert [line["row"] for line in predictions(cut)] == list(range(12))


def test_several_sets_are_answered_with_their_own_limits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits = []
    monkeypatch.setattr(model.CoAT, "generate", lambda self, batch, limit: (
        limits.append(limit) or ["B"] * len(batch["rows"])))
    text = {"audio": None, "seconds": None, "choices": ["yes", "no"], "response": "B. no"}
    jsonl("own.jsonl", 2, **text)
    jsonl("mmau.jsonl", 2, **text, benchmark="mmau", family="General", rule="lmms-1",
          max_new_tokens=8)
    jsonl("mmar.jsonl", 2, **text | {"response": "A. yes"}, benchmark="mmar", family="General",
          rule="lmms-2", max_new_tokens=9)
    printed = run("infer.py", "score", "tiny", "own.jsonl", "mmau.jsonl", "mmar.jsonl",
                  "--workers", 0)
    assert limits == [256, 8, 9]
    assert printed.splitlines()[-1] == "General: mean of mmau, mmar, accuracy: 50.00"


def test_score_that_fails_leaves_no_file(tmp_path, bad_clips, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = rows_about(tmp_path, bad_clips, "nan.wav")
    assert "none of the 1 rows" in run("infer.py", "score", "tiny", path, *SCORE, fails=True)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_predictions_go_beside_the_checkpoints_or_into_the_working_folder(
        trained, merged, three_notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir(merged))
    for name, flags in ((trained.folder, []), (trained.folder, ["--no-think"]), (merged, []),
                        ("tiny", [])):
        run("infer.py", "score", name, three_notes / "rows.jsonl", *SCORE, *flags)
    found = {path.name for path in trained.folder.glob("predictions*rows*")}
    assert found == {"predictions-checkpoint-60-rows.jsonl",
                     "predictions-checkpoint-60-no-think-rows.jsonl"}
    assert sorted(os.listdir()) == ["predictions-model-rows.jsonl", "predictions-tiny-rows.jsonl"]
    assert set(os.listdir(merged)) == before    # which is to be published


@pytest.fixture
def lettered(tmp_path):
    """Four rows of text with the choices yes and no; the right one is yes."""
    return jsonl(tmp_path / "rows.jsonl", 4, audio=None, seconds=None, task="mcq",
                 prompt="Is it? A. yes B. no", response="A. yes", choices=["yes", "no"])


def test_score_asks_for_reasoning_and_keeps_the_whole_text(lettered, tmp_path, monkeypatch):
    texts = ["hm <answer>A</answer>", "so the answer is B", "<think>..</think> yes", "perhaps"]
    prompts = []
    monkeypatch.setattr(model.CoAT, "generate", lambda self, batch, limit: (
        prompts.extend(row["prompt"] for row in batch["rows"]) or texts))
    out = tmp_path / "out"
    score = ["score", "tiny", lettered, "--out", out, *SCORE, "--text-think"]
    accuracy, no_answer, _ = last_json(run("infer.py", *score))["results"]
    assert (accuracy["value"], no_answer["value"]) == (0.5, 0.25)
    assert [line["answer"] for line in predictions(out)] == ["A", "B", "yes", "perhaps"]
    assert [line["text"] for line in predictions(out)] == texts
    assert prompts == ["Is it? A. yes B. no" + BACKBONES["tiny"].text_think] * 4
    assert {line["question"] for line in predictions(out)} == {"Is it? A. yes B. no"}


@pytest.mark.parametrize("more, words", [
    (["--max-new-tokens", 5], "max_new_tokens was 4, now 5"), (["--no-think"], "no_think was F")])
def test_score_refuses_the_file_of_another_run(scored, more, words):
    before = scored.out.read_text()
    assert words in scored.again(scored.out, *more, fails=True)
    assert "data was" in scored.again(scored.out, rows="tones:note", fails=True)
    assert scored.out.read_text() == before


# --------------------------------------------------------------------------------------------------
# infer.py: the judge

def test_judge_rates_each_row_once_and_keeps_what_is_paid_for(judged):
    replies = ["Explanation: good.\nRating: 4", 429, "**Rating:** (2)", 500, "Rating: 7"]
    with judge(replies) as (url, seen):
        rating, = last_json(judged("--judge", url))["results"]
        judged("--judge", url)
        assert len(seen) == 5    # three rows, two of them twice, and nothing when it was run again
    assert rating["value"] == pytest.approx(0.6) and (rating["rows"], rating["left_out"]) == (2, 1)


def test_judge_is_sent_figure_a_as_the_paper_sends_it(judged):
    with judge(["Rating: 4"] * 3) as (url, seen):
        judged("--judge", url)
    path, key, body = seen[0]
    message, = body.pop("messages")
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {"model": "gpt-4o-2024-11-20", "temperature": 0, "max_tokens": 1024}
    assert message["content"].startswith("[Question]\nSay ") and message["role"] == "user"
    assert "\n\n[Reference Answer]\nIt is " in message["content"]
    assert message["content"].endswith("\nRating: (int)")


@pytest.fixture
def rate(monkeypatch):
    """A function: what a judge at a URL makes of a caption. The key is sk-secret."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    line = {"row": 0, "task": "caption", "prompt": "?", "response": "r", "answer": "a",
            "question": "Name a {fruit}."}
    return lambda url: infer.rate(SimpleNamespace(judge=url, judge_model="m"), line)


def test_key_goes_to_no_other_host(rate):
    with judge(["Rating: 4"]) as (other, seen):
        elsewhere = other.replace("127.0.0.1", "localhost")
        with judge([307], location=f"{elsewhere}/chat/completions") as (url, _):
            rate(url)
    assert [key for _, key, _ in seen] == [None]


@pytest.mark.parametrize("reply", [
    401, 403, "", '{"choices": []}', "[]", "null", "7", "<html>", "sk-secret"])
def test_judge_that_fails_is_one_line_without_the_key(rate, reply):
    with judge([reply] * 9, raw=True) as (url, seen), pytest.raises(InputError) as e:
        rate(url)
    assert "its key is read from OPENAI_API_KEY" in str(e.value)
    assert "secret" not in str(e.value) and "\n" not in str(e.value)


def test_rating_does_not_hold_the_key_that_a_judge_repeats(rate):
    with judge(["You are sk-secret. Rating: 4"]) as (url, seen):
        assert rate(url)["reply"] == "You are ***. Rating: 4"
    assert "[Question]\nName a {fruit}.\n" in seen[0][2]["messages"][0]["content"]


@pytest.mark.parametrize("key", ["sk-1\nsk-2", "sk-1\r\nX: y", "sk-1\x7f", "sk-1\u2028x", "sk-1 a"])
def test_key_that_no_header_carries_is_refused_unseen(rate, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="^OPENAI_API_KEY holds a space") as e:
        rate("http://localhost:1/v1")
    assert "sk-" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# infer.py: show, frames

def test_show_draws_each_head_beside_its_expert(trained, tmp_path):
    told = last_json(run("infer.py", "show", trained.folder, trained.clip, "--out",
                         tmp_path / "show.png"))
    assert list(told["unexplained"]) == ["recon", "pitch", "pitch_aux"]
    assert 0 < told["unexplained"]["recon"] < 3 and 0 <= told["pitch_recall"] <= 1
    assert 5000 < os.path.getsize(tmp_path / "show.png") < 400000


def test_frames_tell_a_clip_from_its_course():
    means = 3 * torch.randn(6, 1, 4)
    experts = list(means + torch.randn(6, 9, 4))
    common = torch.randn(9, 4)
    without_course = [z.mean(0).expand(9, 4) for z in experts]
    for students, expected in (
            (experts, (0, 0)),
            ([z + common for z in experts], (0, 0)),    # known without hearing the clip
            ([common for _ in experts], (1, 1)),
            (without_course, (0, 1))):
        found = infer.unexplained(students, experts)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("command", [["show", "CLIP"], ["frames", "--data", "tones:note:3"]])
def test_head_that_gives_nan_is_named_and_no_number(trained, tmp_path, command):
    copy = shutil.copytree(trained.folder, tmp_path / "run")
    path = copy / "checkpoint-60" / "heads.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["recon.out.weight"][:] = math.nan
    safetensors.torch.save_file(weights, path)
    command = [trained.clip if word == "CLIP" else word for word in command]
    assert "NaN" in run("infer.py", command[0], copy, *command[1:], fails=True)


def test_pitch_recall_shows_a_head_that_collapses_to_all_zero():
    pitch = SimpleNamespace(readout=lambda z: z)
    z = torch.full((5, 264), -6.0)
    assert infer.pitch_recall(z, z, pitch) is None    # the expert hears no pitch
    heard = z.clone()
    heard[1:3, 40] = 2.0
    half = z.clone()
    half[1, 40:] = 2.0    # what the expert does not hear is not asked for
    assert [infer.pitch_recall(x, heard, pitch) for x in (z, half, heard)] == [0, 0.5, 1]


# --------------------------------------------------------------------------------------------------
# infer.py: probe

def test_probe_compares_a_run_with_its_backbone(trained, tmp_path):
    printed = run("infer.py", "probe", "tiny", trained.folder, "--data", "tones:louder:40",
                  "--workers", 0, "--plot", tmp_path / "p.png")
    base, ours = last_json(printed)["results"]
    assert "think" not in base and ours["step"] == 60
    assert ours["think"]["accuracy"] > 0.8 and ours["answers"] > 0.5
    assert 5000 < os.path.getsize(tmp_path / "p.png") < 150000


def test_probe_leaves_out_rows_without_the_label_and_splits_no_speaker(
        tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(infer, "linear_probe", lambda x, labels, groups: (
        seen.append((labels, groups)) or ([1.0, 1.0], np.zeros(len(labels)))))
    rows = [{"family": "ab"[i % 2], "speaker": i % 7} for i in range(21)]
    rows += [{"family": None, "speaker": 0}, {"family": "", "speaker": 0}, {"speaker": 0}]
    wav(tmp_path, "a.wav", noise(0.2).numpy())
    path = write_lines(tmp_path / "rows.jsonl", [
        {"audio": "a.wav", "prompt": "?", "response": "x"} | row for row in rows])
    args = SimpleNamespace(label="family", batch=8, workers=0, max_new_tokens=1, text_think=None,
                           no_think=False)
    source = open_source(path)
    found = infer.probe_model(tiny, source, range(24), args)
    (labels, groups), *_ = seen
    assert (found["rows"], found["left_out"]) == (21, 3) and Counter(labels) == {"a": 11, "b": 10}
    assert Counter(groups) == {str(speaker): 3 for speaker in range(7)}    # 0 is one of them


@torch.no_grad()
def test_state_before_the_answer_is_at_the_token_before_the_assistant_header(coat):
    """The last input token before the assistant turn, section 4.4; with a block at its end."""
    prompts = ["Which?", "Which note is it?"]
    batch = build_inputs(coat, [noise(1.0), noise(0.5)], prompts, think=False)
    h, _ = coat.states(batch, use_cache=False)
    found = infer.probe_states(coat, batch)
    for i, ids in enumerate(batch["input_ids"]):
        text = coat.processor.tokenizer.decode(ids)
        before = text[:text.rindex("<|im_start|>assistant")]
        n = len(coat.processor.tokenizer(before).input_ids)
        np.testing.assert_array_equal(found["pre-gen"][i], h[i, n - 1])
    batch = build_inputs(coat, [noise(1.0), noise(0.5)], prompts, think=True)
    h, _ = coat.states(batch, use_cache=False)
    assert (batch["input_ids"][:, -1] == coat.think_ids[2]).all()
    np.testing.assert_array_equal(infer.probe_states(coat, batch)["pre-gen"], h[:, -1])


# --------------------------------------------------------------------------------------------------
# infer.py: compare

def test_compare_gives_means_with_intervals_and_paired_differences(tmp_path):
    path = write_lines(tmp_path / "results.jsonl", [
        {"arm": arm, "data": f"tones:note:{n}", "seed": seed, "task": "note", "metric": "accuracy",
         "value": mean + seed} for arm, n, mean in (
             ("fine-tuning", 7, 20), ("fine-tuning", 28, 50), ("+ pitch", 28, 60))
        for seed in (-1, 0, 1)])
    printed = run("infer.py", "compare", path, "--plot", tmp_path / "arms.png").splitlines()
    half = 4.303 / math.sqrt(3)    # Student's t, two degrees of freedom
    assert [line.split()[-3:] for line in printed[1:]] == [
        ["20.0", "+-", f"{half:.1f}"], ["50.0", "+-", f"{half:.1f}"], ["+10.0", "+-", "0.0"]]
    assert (tmp_path / "arms.png").stat().st_size > 1000


def test_compare_takes_runs_predictions_and_backbones_and_skips_what_has_no_result(
        trained, scored, merged, three_notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("infer.py", "score", "tiny", "tones:note,louder:6", *SCORE, "--out", "tiny.jsonl")
    scored.again(tmp_path / "base.jsonl", "--no-think")
    err = io.StringIO()
    printed = run("infer.py", "compare", "tiny.jsonl", trained.folder, scored.out, "base.jsonl",
                  merged, "--out", "found.jsonl", errors=err)
    assert "skipped" in err.getvalue() and "heldout.json" in err.getvalue()
    assert printed == run("infer.py", "compare", "found.jsonl")
    found = {(r["arm"], r["task"], r.get("set", "held out")): r["value"]
             for r in read_lines("found.jsonl")}
    assert found["+ recon, pitch", "note", "held out"] == 100 * trained.heldout["note"]["heard"]
    told = {r["task"]: r["value"] for r in scored.result["results"] if r["metric"] == "accuracy"}
    for task in told:
        assert found["+ recon, pitch", task, "tones:note,louder:6"] == 100 * told[task]
        assert ("tiny", task, "tones:note,louder:6") in found
    assert "+ recon, pitch, asked without the block" in printed
    assert "note of tones:note,louder:6" in printed    # beside "note" of the held-out questions


@pytest.mark.parametrize("changes, arm", [
    ({"no_think": True, "stage": ["3:none"]}, "fine-tuning"), ({"stage": ["3:none"]}, "+ block"),
    ({"no_think": True, "stage": ["3:pitch"]}, "+ pitch, no block"),
    ({"stage": ["3:recon=0.3", "4:recon,pitch=2:1e-3"]}, "+ recon, pitch"),
    ({"stage": ["3:recon"], "head": "linear", "focal_gamma": 0}, "+ recon, linear heads"),
    ({"stage": ["3:pitch"], "focal_gamma": 0, "w_pitch_aux": 9.0}, "+ pitch, w_aux 9, gamma 0")])
def test_arm_of_a_run_is_named_by_its_flags(changes, arm):
    flags = {"no_think": False, "stage": ["3:all"], "head": "transformer", "focal_gamma": 2.0,
             "w_pitch_aux": 1.0, "data": ["/x/music-48-7.jsonl"], "seed": 7}
    assert infer.described(flags | changes) == {"arm": arm, "data": "music-48", "seed": 7}


# --------------------------------------------------------------------------------------------------
# bench.py

def bench_of_rows(path, *args):
    """({(range of length, arm): its line}, what was printed) of bench.py latency"""
    printed = run("bench.py", "latency", "--data", path, "--seeds", 1, "--max-new-tokens", 8, *args)
    return {(line["audio"], line["arm"]): line for line in last_json(printed)["rows"]}, printed


def test_bench_of_noise_counts_tokens_and_says_what_transformers_says():
    by = {line["arm"]: line for line in bench("latency", "--seconds", 1, "--seeds", 1)["rows"]}
    assert by["CoAT"]["prompt"][0] - by["base"]["prompt"][0] == by["CoAT"]["block"][0] == 25 + 2
    assert [line["decoded"][0] for line in by.values()] == [20, 20, 120, 20]
    assert by["generate"]["same_ids"] == 1


def test_bench_of_rows_decodes_to_the_end_token_by_ranges_of_length(tmp_path, tiny):
    """What tiny says third to the first row, after the block, is an end token here."""
    asked = [(noise(seconds, i), f"Which {i}?") for i, seconds in enumerate((0.5, 1.1, 5.3))]
    clips = [wav(tmp_path, f"{i}.wav", wave.numpy()) for i, (wave, _) in enumerate(asked)]
    rows = [(clip, question) for clip, (_, question) in zip(clips, asked)]
    path = write(tmp_path / "rows.jsonl", "\n".join(
        json.dumps({"audio": clip, "prompt": prompt, "response": "C"})
        for clip, prompt in [*rows, (None, "text"), (clips[0], THINK)]))
    third = greedy(tiny, build_inputs(tiny, *([x] for x in asked[0])), 3)[0, 2]
    eos = (tiny.processor.tokenizer.convert_ids_to_tokens(third.item()), "<|endoftext|>")
    with unittest.mock.patch.dict(BACKBONES, tiny=dataclasses.replace(BACKBONES["tiny"], eos=eos)):
        arms, printed = bench_of_rows(path)
        by_length, _ = bench_of_rows(path, "--samples", 2)
        coat = load_coat("tiny")
    for arm, think in (("base", False), ("CoAT", True), ("text-CoT", False)):
        suffix = coat.backbone.text_think if arm == "text-CoT" else ""
        batches = [build_inputs(coat, [wave], [question + suffix], think=think)
                   for wave, question in asked]
        lengths = [len(list(coat.stream(batch, 8))) for batch in batches]
        assert arms["0-121 s", arm]["decoded"][0] == pytest.approx(np.mean(lengths))
        assert by_length["5-10 s", arm]["prompt"][0] == batches[2]["input_ids"].shape[1]
    assert arms["0-121 s", "generate"]["same_ids"] == arms["0-121 s", "CoAT"]["clips"] == 3
    assert printed.count("left out: ") == 1 and len(by_length) == 2 * 4


def test_bench_trains_every_way_and_times_each_expert(shipped):
    ways = bench("train", "--steps", 1, "--batch", 2, "--seconds", 0.5, 2)["ways"]
    assert list(ways) == ["no block", "block", "block, recon", "block, pitch", "block, all experts",
                          "Trainer", "Trainer, by length"]
    assert ways["block"]["padding"] < ways["Trainer"]["padding"]
    assert all(way["rows/s"] > 0 for way in ways.values())


# --------------------------------------------------------------------------------------------------
# What goes wrong: weights

@pytest.mark.parametrize("file, content, words", [
    ("model.safetensors", None, "model.safetensors"), ("tokenizer.json", None, "is missing"),
    ("config.json", {"model_type": "bert"}, "config.json is that of 'bert'"),
    ("config.json", {"text_config": None}, "part of its config is null"),
    ("config.json", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
    ("config.json", {"intermediate_size": 96}, "6 tensors are missing"),
    ("tokenizer.json", b"[]", "TypeError"),
    ("chat_template.jinja", b"{{ messages[0].role }}", "number of audio inputs"),
    ("model.safetensors", b"<html>" * 99, "SafetensorError")])
def test_folder_of_a_backbone_with_an_odd_file_is_refused(hub, tmp_path, file, content, words):
    """None: it is not there. A dict: what changes in it."""
    folder = tmp_path / "model"
    shutil.copytree(hub["qwen2-audio"], folder)
    if content is None:
        os.remove(folder / file)
    elif isinstance(content, bytes):
        write(folder / file, content)
    else:
        with edited_json(folder / file) as config:
            (config["text_config"] if "intermediate_size" in content else config).update(content)
    with pytest.raises(ValueError, match=words) as error:
        coat = load_coat("qwen2-audio", model_path=folder)
        build_inputs(coat, [noise(1.0)], ["?"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "Qwen/Qwen2-Audio-7B-Instruct", "."])
def test_name_of_nothing_names_what_there_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no run.* qwen2-audio .Qwen/Qwen2-Audio-7B.*tiny"):
        load_coat(name)
    with pytest.raises(InputError, match="no folder 'nowhere'"):
        load_coat("qwen2-audio", model_path="nowhere")


@pytest.mark.parametrize("part", ["audio_tower.conv2.weight", "layers.1.mlp.up_proj", "lm_head"])
def test_states_that_are_no_numbers_are_an_error_and_no_answer(part, hub):
    coat = load_coat("qwen2-audio", hub["qwen2-audio"])
    name = next(name for name, _ in coat.hf.named_parameters() if part in name)
    coat.hf.get_parameter(name).data.view(-1)[0] = math.nan
    with pytest.raises(InputError, match="NaN"):
        coat.answer(noise(1.0), 16000, "?")


def test_adapter_that_lacks_tensors_is_refused(written, tmp_path):
    shutil.copytree(written.adapter, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights.popitem()
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="adapter"):
        load_coat(tmp_path)


@pytest.mark.parametrize("package, code, words", [
    ("torchaudio", "raise OSError('undefined symbol: torch_x')", "undefined symbol.*torchaudio 2"),
    ("peft", "import no_such_package", "No module named 'no_such_package'")])
def test_library_that_does_not_import_is_one_line(package, code, words, tmp_path):
    write(tmp_path / f"{package}.py", code)
    done = subprocess.run([sys.executable, "-c", "import model; model.load_coat(trainable=True)"],
                          cwd=HERE, capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and re.fullmatch(f"error: .*{words}.*\n", done.stderr)


def test_transformers_that_is_too_old_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.9.1")
    with pytest.raises(SystemExit, match="^error: transformers 5.9.1 is too old; pip install"):
        runpy.run_path(str(HERE / "model.py"))


@pytest.mark.parametrize("error, words", [
    (ValueError("two\nlines"), "error: two lines\n"), (KeyError("x"), "error: 'x'\n"),
    (KeyboardInterrupt(), "stopped\n"), (BrokenPipeError(), ""),
    (torch.OutOfMemoryError("2 GiB"), "error: no memory left (2 GiB); less is needed with care\n")])
def test_any_exception_ends_a_program_in_one_line(error, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", None)
    monkeypatch.setattr(os, "dup2", lambda *args: None)
    model.one_line_errors(less_memory="care")
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == words


# --------------------------------------------------------------------------------------------------
# What goes wrong: weights of an expert

def test_weights_are_fetched_once_for_all_processes(monkeypatch, tmp_path):
    shipped = HERE / "assets" / Pitch.filename
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(Pitch, "url", shipped.as_uri())
    fetch = unittest.mock.Mock(wraps=torch.hub.download_url_to_file)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load, ["pitch"] * 2))
    assert fetch.call_count == 1
    assert (tmp_path / "checkpoints" / Pitch.filename).read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize("write_file, words", [
    (lambda path: path.write_bytes(b""), "EOFError"),
    (lambda path: path.write_bytes(pickle.dumps(os.system, 2)), "Weights only load failed"),
    (lambda path: torch.save({"scale": torch.ones(2)}, path), "10 of 10 tensors are missing or of"),
    (lambda path: torch.save({key: value * torch.nan for key, value in
                              an_expert("pitch").state_dict().items()}, path), "gives NaN or inf")])
def test_file_that_is_no_expert_is_named_in_one_line(write_file, words, tmp_path):
    path = tmp_path / "file.pt"
    write_file(path)
    with pytest.raises(RuntimeError) as error:
        load("pitch", path)
    line = str(error.value)
    assert line.startswith(f"pitch: cannot load {path} (") and words in line and "\n" not in line
    assert "--expert-pitch PATH" in line and "weights_only" not in line


@pytest.mark.parametrize("wave", [
    torch.zeros(0), torch.zeros(2, 800), torch.zeros(800).half(), torch.zeros(800).short(),
    torch.full((800,), math.nan), torch.full((800,), 1e30), torch.full((800,), 9830.0)])
def test_wave_that_is_none_is_refused_by_an_expert_in_one_line(wave):
    with pytest.raises(ValueError, match=r"^Affect takes a wave .* in \[-1, 1\][^\n]*\Z"):
        an_expert("affect")(wave)


def test_missing_expert_stops_a_run_before_its_first_step(tmp_path):
    error = run("train.py", *QUICK, "--stage", "2:all", "--expert-speech", tmp_path / "no.pt",
                "--out", tmp_path / "run", fails=True)
    assert "no.pt" in error and not (tmp_path / "run" / "log.jsonl").exists()


# --------------------------------------------------------------------------------------------------
# What goes wrong: programs

def test_error_ends_a_program_in_one_line_without_traceback(bad_clips):
    done = subprocess.run(
        [sys.executable, "infer.py", "ask", "tiny", bad_clips["text.wav"], "?"],
        capture_output=True, text=True, cwd=HERE, timeout=100)
    assert done.returncode == 1 and not done.stdout
    line, = done.stderr.splitlines()
    assert line.startswith("error: ") and "text.wav" in line


@pytest.mark.parametrize("program, flags, words", cases("wrong_flags"))
def test_wrong_flags_end_in_one_line(program, flags, words):
    assert words in run(program, *flags.split(), fails=True)


def test_attention_of_cudnn_is_off_where_a_gpu_is_chosen(monkeypatch):
    """Its backward pass gives NaN with a mask and some lengths (pytorch issue 196678)."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert model.usable_device("cuda").type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# --------------------------------------------------------------------------------------------------
# What goes wrong: while training

def no_room(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    replies = [torch.save, no_room]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *args: replies.pop(0)(*args))
        error = run("train.py", *QUICK, "--stage", "2:recon", "--stage", "4:recon", "--save-every",
                    2, "--out", tmp_path, fails=True)
    assert "No space left" in error
    assert model.checkpoint_steps(tmp_path) == [2]
    run("train.py", "--resume", tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    assert logged(tmp_path, "step") == [1, 2, 3, 4, 5, 6]


def test_step_that_will_not_fit_in_memory_ends_a_run_before_its_first(tmp_path, monkeypatch):
    def forward(self, batch):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return plain(self, batch)

    plain = model.CoAT.forward
    monkeypatch.setattr(model.CoAT, "forward", forward)
    error = run("train.py", *QUICK, "--stage", "4:recon", "--out", tmp_path, fails=True)
    assert "no memory left" in error and "--micro-tokens" in error
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_all_processes_of_a_rank_saves_and_the_run_goes_on(tmp_path, number):
    process = start(train_in_a_group, tmp_path / "log", *QUICK, "--stage", "60:recon",
                    "--workers", 1, "--log-every", 3, "--out", tmp_path / "run")
    wait_for(process, "step 3/")
    os.killpg(process.pid, number)
    ended(process)
    step = logged(tmp_path / "run", "step")[-1]
    assert 3 <= step < 60 and "go on with" in open(process.log).read()
    assert model.checkpoint_steps(tmp_path / "run") == [step]


def test_killed_data_process_ends_the_run_in_one_line_with_a_save(tmp_path):
    process = start(train, tmp_path / "log", *QUICK, "--stage", "999:recon", "--workers", 1,
                    "--log-every", 3, "--out", tmp_path / "run")
    wait_for(process, "step 3/")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    ended(process, status=1)
    step = logged(tmp_path / "run", "step")[-1]
    last = open(process.log).read().strip().splitlines()[-1]
    assert "DataLoader worker" in last and f"saved after step {step}" in last
    assert os.path.exists(tmp_path / "run" / f"checkpoint-{step}" / "state.pt")


@pytest.mark.parametrize("steps, lost", [(3, [0, 1, 2]), (9, [0, 1, 2, 3, 4, 5])])
def test_steps_that_are_not_finite_are_left_out_and_five_in_a_row_end_the_run(tmp_path, steps, lost):
    flags = [*QUICK, "--stage", f"{steps}:recon:1e30", "--out", tmp_path]
    printed = run("train.py", *flags, fails=len(lost) > 3)
    assert re.search(r"step \d is left out: the loss of rows \[(\d+, ){3}\d+\] is not fin", printed)
    assert logged(tmp_path, "lost") == lost
    assert logged(tmp_path)[1:] == [None] * (len(lost) - 1)
    state = torch.load(tmp_path / f"checkpoint-{len(lost)}/state.pt", weights_only=True)
    assert state["progress"]["lost"] == lost[-1]


def test_run_whose_output_nobody_reads_saves_and_goes_on(tmp_path):
    """As in train.py | head."""
    process = start(train_into_a_closed_pipe, tmp_path / "log", *QUICK, "--stage", "2:recon",
                    "--out", tmp_path / "run")
    ended(process, status=1)
    assert "Broken pipe. The run is saved after step 0; go on with" in open(process.log).read()
    run("train.py", "--resume", tmp_path / "run")
    assert logged(tmp_path / "run", "step") == [1, 2]


def test_torchrun_restarts_a_run_where_it_stands(short_run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("train.py", *short_run)
    assert logged(Path("run"), "step") == [1, 2]


def test_run_is_resumed_from_any_folder(finished, short_run, tmp_path, monkeypatch):
    flags = json.loads(Path("run/config.json").read_text())["flags"]
    assert flags["data"] == [str(finished[0] / "rows.jsonl")]
    monkeypatch.chdir("/")
    run("train.py", "--resume", tmp_path / "run")


@pytest.mark.parametrize("flags, words", [
    (["--resume", "run", "--lr", 1], "--lr was 0.002 in that run"),
    (["--resume", "elsewhere"], "'elsewhere' is no run"),
    (["--out", "run"], "'run' holds a run"),
    (["--data", "rows.jsonl", "tones", "--stage", "1:recon"], "--data names 2 for 1 stages"),
    (["--stage", "5"], "give STEPS:EXPERTS"), (["--stage", "5:reconn"], "no such expert"),
    (["--stage", "5:recon=x"], "could not convert"), (["--stage", "0:recon"], "is not from 1"),
    (["--stage", "5:recon:nan"], "'nan' is not from"),
])
def test_flags_that_do_not_fit_are_refused(short_run, flags, words):
    assert words in run("train.py", *flags, fails=True)


def add_row():
    with open("rows.jsonl", "a") as file:
        file.write('\n{"audio": null, "prompt": "One", "response": "more"}')


@pytest.mark.parametrize("change", [
    add_row, lambda: soundfile.write("1.wav", noise(0.7).numpy(), 16000)])
def test_resume_refuses_other_rows_and_audio_of_another_length(short_run, change):
    change()
    error = run("train.py", "--resume", "run", "--data", "rows.jsonl", fails=True)
    assert "not those that the run began with" in error


def test_resume_names_another_torch_and_number_of_ranks_and_goes_on(short_run):
    assert "not bit for bit" not in run("train.py", "--resume", "run")
    was = {"torch": "1.0", "world": 2}
    with edited_json("run/config.json") as config:
        config |= was
    printed = run("train.py", "--resume", "run")
    assert all(f"not bit for bit: {what} was {value}" in printed for what, value in was.items())


def test_folder_that_another_run_holds_is_refused(short_run, monkeypatch):
    acquire = filelock.FileLock.acquire
    monkeypatch.setattr(filelock.FileLock, "acquire", lambda lock, timeout: acquire(lock, 0))
    with acquire(filelock.FileLock("run/.lock-0")):
        assert "run/.lock-0" in run("train.py", "--resume", "run", fails=True)


@pytest.mark.parametrize("name", ["state.pt", "heads.safetensors", "adapter_model.safetensors"])
def test_damaged_file_of_a_checkpoint_is_refused_in_one_line(short_run, name):
    write(f"run/checkpoint-2/{name}", b"{}" * 99)
    assert run("train.py", "--resume", "run", fails=True).startswith("error: ")
    os.remove(f"run/checkpoint-2/{name}")
    assert "run/checkpoint-2" in run("train.py", "--resume", "run", fails=True)


def test_state_that_is_not_finite_is_refused(short_run):
    path = "run/checkpoint-2/state.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"].fill_(math.nan)
    torch.save(state, path)
    assert "holds NaN" in run("train.py", "--resume", "run", fails=True)


# --------------------------------------------------------------------------------------------------
# Harness: backbones. Folders laid out like the real ones on the hub: the real classes, towers with
# their real windows, random weights of next to no width, and a byte-level tokenizer.

QWEN_TOKENS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
LAYOUTS = {    # special tokens, rows of the table that none uses, seconds of the feature extractor
    "qwen2-audio": (QWEN_TOKENS, 20, 30),
    "qwen2.5-omni": (QWEN_TOKENS, 20, 300),
    "audio-flamingo-3": (["<sound>", "[BOS]", "[PAD]"], 0, 30),
}
NARROW = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=8192, initializer_range=64 ** -0.5)
TOWER = dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64)


def tiny_tokenizer(folder, tokens=(), pad="<|im_end|>"):
    """Writes a tokenizer of bytes and these tokens -> its ids."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tokens]
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()) + special)}
    named = ("audio_token", "audio_bos_token", "audio_eos_token")
    transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], extra_special_tokens=special[1:], pad_token=pad,
        model_specific_special_tokens=dict(zip(named, tokens)) if tokens == QWEN_TOKENS else {},
    ).save_pretrained(folder)
    return vocab


def tiny_hub(name, folder):
    """Writes config, weights, tokenizer, feature extractor and chat template of a backbone."""
    tokens, spare, seconds = LAYOUTS[name]
    pad = "<|endoftext|>" if tokens == QWEN_TOKENS else "[PAD]"
    vocab = tiny_tokenizer(folder, tokens, pad)
    transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=seconds, return_attention_mask=True).save_pretrained(folder)
    if name != "qwen2-audio":    # whose template is in its class
        template = model.TEMPLATE.replace("AUDIO_MARKS", MARKS[name])
        write_json(folder / "chat_template.json", {"chat_template": template})

    text = NARROW | {"vocab_size": len(vocab) + spare, "pad_token_id": None}
    audio = TOWER | {"initializer_range": 128 ** -0.5}
    more = {}
    if name == "qwen2.5-omni":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6,
                                   "mrope_section": [4, 6, 6]}    # of a head's width / 2
        audio["output_dim"] = 64
        more = {"initializer_range": 64 ** -0.5, "vision_config": {
            "depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}}
    model_class = BACKBONES[name].model_class
    config = model_class.config_class(text_config=text, audio_config=audio, **more)
    config.audio_token_id = vocab[tokens[0]]
    config.vision_start_token_id = 3    # a field of Omni's published config, not of the class
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)    # by the names of the published files
    if name == "qwen2.5-omni":    # the published folder is that of the full model
        path = folder / "model.safetensors"
        weights = safetensors.torch.load_file(path) | {"talker.model.norm.weight": torch.ones(8)}
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        with edited_json(folder / "config.json") as full:
            thinker = dict(full)
            full.clear()
            full |= {"model_type": "qwen2_5_omni", "thinker_config": thinker}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """{name: model_path}, None for tiny, which has no files"""
    folders = {"tiny": None}
    for name in REAL:
        folder = tmp_path_factory.mktemp(name)
        tiny_hub(name, folder)
        folders[name] = str(folder)
    return folders


def loaded(name, hub, **kwargs):
    """A CoAT with adapters that do something (a fresh LoRA is zero); one trains its projector."""
    torch.manual_seed(1)
    coat = load_coat(name, hub[name], trainable=True,
                     train_projector=name == "qwen2-audio", **kwargs)
    with torch.no_grad():
        for key, p in coat.named_parameters():
            if "lora_B" in key or "trainable_tokens_delta" in key:
                p.add_(0.05 * torch.randn_like(p))
    return coat.eval()


@pytest.fixture(scope="session", params=BACKBONES)
def coat(request, hub):
    return loaded(request.param, hub)


@pytest.fixture(scope="session")
def tiny():
    return load_coat("tiny")


@pytest.fixture(scope="session")
def written(coat, tmp_path_factory):
    """What `coat` says to a batch, its adapter's folder, and the folder of the merged model."""
    folder = tmp_path_factory.mktemp("written")
    coat.save(folder / "adapter")
    load_coat(folder / "adapter").merge().save(folder / "merged")
    batch = build_inputs(coat, [noise(1.0), noise(31, 5)], ["Which?", "Which note is it?"])
    return SimpleNamespace(adapter=folder / "adapter", merged=folder / "merged", batch=batch,
                           said=greedy(coat, batch))


@pytest.fixture(scope="session")
def text_think(hub, tmp_path_factory):
    """The adapter of Audio Flamingo 3's authors for thinking in text, in its old layout."""
    folder = tmp_path_factory.mktemp("think")
    ours = loaded("audio-flamingo-3", hub)
    ours.lm.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_model.safetensors"
    old = {key.replace("model.model.language_model", "model.language_model.model"): value
           for key, value in safetensors.torch.load_file(path).items() if "lora" in key}
    safetensors.torch.save_file(old, path, metadata={"format": "pt"})
    with edited_json(folder / "adapter_config.json") as config:
        config["trainable_token_indices"] = None
    bias = torch.randn(64)
    torch.save({"base_model.model.multi_modal_projector.linear_2.bias": bias},
               folder / "non_lora_trainables.bin")
    return SimpleNamespace(ours=ours, folder=str(folder), bias=bias)


@pytest.fixture(scope="session")
def rows():
    """Four rows of unequal length: one beyond tiny's 4 s window, one without audio."""
    waves = [noise(1.3, 1), noise(5.21, 2), None, noise(0.5, 3)]
    prompts = ["Which note?", "How many?", "Say hello.", "What?"]
    return waves, prompts, ["C", "three of them", "hello", "a dog"]


def two_questions(coat):
    return build_inputs(coat, [noise(1.0), noise(2.2, 5)], ["Which?", "Which note is it?"],
                        think=True)


def noise(seconds, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(seconds * 16000), generator=generator)


def greedy(coat, batch, n=8, stop=False):
    """(B, n) ids; stop: until all rows have ended."""
    return torch.stack(list(coat.stream(batch, n, stop)), 1)


def run_card(folder, clip, question):
    """What the lines of a folder's README.md print, without those for vLLM."""
    blocks = re.findall("```python\n(.*?)```", (Path(folder) / "README.md").read_text(), re.S)
    code = "".join(block for block in blocks if "vllm" not in block)
    code = code.replace('"."', repr(str(folder))).replace('"clip.wav"', repr(str(clip)))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.replace("What is heard?", question), {})
    return out.getvalue()


@torch.no_grad()
def last_logits(coat, batch):
    """(B, V) after the prompt."""
    return coat.hf.lm_head(coat.states(batch)[0][:, -1])


# --------------------------------------------------------------------------------------------------
# Harness: heads and experts

class AcrossFrames(torch.nn.Conv1d):
    """(.., L, E) -> (.., L, E'), a readout that looks at neighbours, as that of pitch does."""

    def forward(self, z):
        return super().forward(z.mT).mT


@pytest.fixture
def two_heads():
    """Calibrated heads of two tasks, and a padded batch of two clips: states, valid, targets."""
    lengths = torch.tensor([9, 5])
    readout = AcrossFrames(6, 4, 3, padding=1).requires_grad_(False)
    expert_heads = heads.ExpertHeads(64, {"recon": 8, "pitch": 6}, {"pitch": readout})
    targets = {}
    for task, dim in (("recon", 8), ("pitch", 6)):
        clips = [3 * torch.randn(n, dim) + 1 for n in lengths]
        expert_heads.calibrate(task, clips)
        targets[task], valid = model.pad_rows(torch.cat(clips), lengths)
    return expert_heads, torch.randn(2, 9, 64), valid, targets


@pytest.fixture
def shipped():
    """Leaves the experts that need no other file."""
    with unittest.mock.patch.dict(EXPERTS):
        for name in ("speech", "sound", "affect"):
            del EXPERTS[name]
        yield


# Sizes of the emotion2vec of the reference numbers
TINY = dict(dim=256, prenet=3, depth=2, tokens=5)


def fill(key, shape):
    """What the reference implementations' parameters were filled with: seeded by their official
    name, scaled by their kind."""
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if key.endswith("running_var"):
        return 1 + 0.1 * r.abs()
    if key.endswith("running_mean"):
        return 0.1 * r
    if key.endswith("alibi_scale"):
        return 0.7 + 0.5 * r
    if key.endswith("extra_tokens"):
        return 0.5 * r
    if r.ndim == 1:
        return 1 + 0.1 * r if key.endswith("weight") else 0.05 * r
    return r * math.sqrt((2 if r.ndim == 4 else 1) / (r.numel() / r.shape[0]))


def official(cls, **sizes):
    """{official name: filled tensor} of an expert."""
    with torch.device("meta"):
        module = cls(**sizes)
    shapes = {module.official(key): value.shape for key, value in module.state_dict().items()
              if "num_batches" not in key}
    return {name: fill(name, shape) for name, shape in shapes.items()}


@functools.cache
def an_expert(name):
    """The official pitch; the others filled by the recipe, emotion2vec in a small size."""
    if name == "pitch":
        return load("pitch")
    if name == "sound":
        return SoundEvents.from_state_dict({"model": official(SoundEvents)})
    return Affect.from_state_dict({"model": official(Affect, **TINY)})


def reference(name):
    return np.load(HERE / f"assets/reference/{name}.npz")


def close(ours, reference, atol, rtol=0.0):
    np.testing.assert_allclose(ours.detach(), torch.as_tensor(reference), atol=atol, rtol=rtol)


def audio(rate, seconds):
    """Gated tones, a chirp, amplitude modulation and noise."""
    n = round(rate * seconds)
    t = np.arange(n) / rate

    def tone(f, phase=0.0):
        return np.sin(2 * np.pi * f * t + phase)

    x = 0.2 * tone(110)
    x += 0.15 * tone(440, 0.3) * (t > 0.25 * seconds)
    x += 0.1 * tone(1320.5, 0.7) * ((t > 0.1 * seconds) & (t < 0.6 * seconds))
    x += 0.08 * tone(3100, 1.1) * (0.5 + 0.5 * tone(4))
    x += 0.1 * np.sin(2 * np.pi * (200 * t + 2400 / seconds * t * t))
    x += 0.02 * np.random.RandomState(1234).standard_normal(n)
    return torch.tensor(x, dtype=torch.float32)


def chord():
    """C4 E4 G4 with 8 harmonics, staggered and decaying, 43844 samples at 22050 Hz."""
    t = np.arange(43844) / 22050
    x = np.zeros(len(t))
    for f, onset in ((261.6255653, 0.2), (329.6275569, 0.5), (391.9954360, 0.9)):
        u = np.maximum(t - onset, 0)
        for h in range(1, 9):
            x += 0.2 * (t >= onset) * np.sin(2 * np.pi * f * h * u) / h * np.exp(-0.8 * h * u)
    return torch.tensor(x, dtype=torch.float32)


def clicks(expert, front, tokens, seconds):
    """Yields (token, (tokens,) how much a click in its middle changes what the front end gives)."""
    generator = torch.Generator().manual_seed(0)
    quiet = torch.randn(round(seconds * expert.sample_rate), generator=generator) * 1e-3
    padding = 0, max(0, expert.min_samples - len(quiet))
    before = front(F.pad(quiet, padding))
    for token in tokens:
        wave = quiet.clone()
        wave[int((token + 0.5) / TOKEN_RATE * expert.sample_rate)] += 0.5
        change = (front(F.pad(wave, padding)) - before).detach()[:expert.frames(len(wave))]
        n = int(seconds * TOKEN_RATE)
        yield token, resample_frames(change, n, expert.frame_rate, expert.offset).norm(dim=1)


@contextlib.contextmanager
def serving(handler):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# --------------------------------------------------------------------------------------------------
# Harness: files, rows, corpora

def write(path, text):
    """Text or bytes into a file, with its folders."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def write_json(path, value):
    write(path, json.dumps(value))


@contextlib.contextmanager
def edited_json(path):
    value = json.loads(Path(path).read_text())
    yield value
    write_json(path, value)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_lines(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def last_json(printed):
    return json.loads(printed.splitlines()[-1])


def wav(folder, name, samples, rate=16000, **kwargs):
    path = str(folder / name)
    soundfile.write(path, samples, rate, **kwargs)
    return path


def cut_in_half(path):
    os.truncate(path, os.path.getsize(path) // 2)
    return path


def one_row(clip):
    """A manifest with a row about this clip."""
    return write_lines(f"{clip}.jsonl", [{"audio": clip, "prompt": "?", "response": "x"}])


def jsonl(path, n, **more):
    rows = []
    for i in range(n):
        row = {"audio": f"{i}.wav", "prompt": "?", "response": f"{i}", "seconds": 1 + i % 29}
        rows.append(row | more)
    return write_lines(path, rows)


def manifest(folder, seconds):
    """Rows about clips of noise of these lengths -> the path of rows.jsonl."""
    rows = []
    for i, length in enumerate(seconds):
        wav(folder, f"{i}.wav", noise(length, i).numpy())
        rows.append({"audio": f"{i}.wav", "prompt": "What?", "response": "noise " * i + "!"})
    return write_lines(folder / "rows.jsonl", rows)


def rows_about(folder, clips, *names):
    rows = [{"audio": clips[name], "prompt": "?", "response": "yes"} for name in names]
    return write_lines(folder / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def bad_clips(tmp_path_factory):
    """{name: path} of BAD_CLIPS"""
    folder = tmp_path_factory.mktemp("bad")
    t = np.arange(16000)
    tone = np.sin(t / 20).astype(np.float32) / 2
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound\n" * 100)
    write(folder / "x.raw", b"\0" * 32000)
    wav(folder, "talk.sph", tone, format="NIST", subtype="PCM_16")
    wav(folder, "zero_samples.wav", tone[:0])
    wav(folder, "nan.wav", np.where(t == 8000, np.nan, tone), subtype="FLOAT")
    wav(folder, "short.wav", tone[:320])
    wav(folder, "long.wav", np.zeros(121 * 8000, np.float32), 8000)
    wav(folder, "huge.wav", np.where(t == 8000, 1e30, tone), subtype="FLOAT")
    wav(folder, "int16.wav", 9830 * np.sign(tone), subtype="FLOAT")
    return {name: str(folder / name) for name in BAD_CLIPS}


def lay_out(root, files):
    for name, content in files.items():
        write(root / name, content)


def convert(capsys, name, root, split=None, **flags):
    """[rows] and the line with the counts. What is written is read as a manifest, too."""
    flags = {"audio": None, "prompt": None, "response": "response", "task": "qa", "choices": None,
             "keep": [], "pitch_class": False, "question": None, "config": None,
             "clips": "clips"} | flags
    capsys.readouterr()
    data.listing.cache_clear()    # files have come since the last conversion
    data.convert(SimpleNamespace(name=name, root=str(root), split=split, **flags))
    out, counts = capsys.readouterr()
    if out:
        Manifest(write(Path(root).parent / "converted.jsonl", out))
    return [json.loads(line) for line in out.splitlines()], counts.strip().splitlines()[-1]


def iemocap(root, session, labels, clip=None):
    """A dialog of this session, one turn for each label, as IEMOCAP lays it out."""
    dialog = f"Ses0{session}F_impro01"
    text = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    folder = root / f"Session{session}"
    for i, label in enumerate(labels):
        turn = f"{dialog}_F{i:03}"
        write(folder / "sentences" / "wav" / dialog / f"{turn}.wav",
              Path(clip).read_bytes() if clip else "")
        text += f"[6.2901 - 8.2357]\t{turn}\t{label}\t[2.5000, 2.5000, 2.5000]\n"
        text += "C-E2:\tNeutral;\t()\n\n"
    write(folder / "dialog" / "EmoEvaluation" / f"{dialog}.txt", text)
    write(folder / "dialog" / "EmoEvaluation" / f"._{dialog}.txt", b"\xff\0")    # a Mac's


# --------------------------------------------------------------------------------------------------
# Harness: programs run in this process, since starting Python and its imports takes 4 s

QUICK = ["--data", "tones:note", "--batch", 4, "--calibrate", 4, "--workers", 0, "--heldout", 0]
SCORE = ["--workers", 0, "--max-new-tokens", 4, "--batch", 4]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def run_path(program, args):
    sys.argv = [program, *map(str, args)]
    runpy.run_path(str(HERE / program), run_name="__main__")


def run(program, *args, fails=False, out=None, errors=None):
    """Runs one of our programs -> what it printed.

    fails   it must end with a status other than 0 and one line that says why, which is returned
    out, errors     files to print to instead"""
    out = out or io.StringIO()
    err = errors or io.StringIO()
    status = 0
    argv = sys.argv
    hook = sys.excepthook
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_path(program, args)
        except SystemExit as e:
            status = e.code or 0
        except Exception as e:
            status = 1
            sys.excepthook(type(e), e, e.__traceback__)    # the program's own, as at its end
        finally:
            sys.argv = argv
            sys.excepthook = hook
            signal.signal(signal.SIGTERM, handler)
    assert bool(status) == fails, err.getvalue()[-2000:]
    if not fails:
        return out.getvalue()
    lines = err.getvalue().strip().splitlines()
    lines = [x for x in lines if not re.search("^usage:|^ |^skipped:|Loading weights", x)]
    assert len(lines) == 1, lines
    line, = lines
    return line


def train(*args):
    run_path("train.py", args)


def bench(*args):
    return last_json(run("bench.py", *args))


def log_lines(folder):
    return read_lines(folder / "log.jsonl")


def logged(folder, key="loss"):
    return [line[key] for line in log_lines(folder)]


def load_optimizer(checkpoint):
    return torch.load(checkpoint / "state.pt", weights_only=True)["optimizer"]


def moments(checkpoint):
    """[AdamW's first moment of each parameter]; after one step, (1 - beta1) times the gradient."""
    return [p["exp_avg"] for p in load_optimizer(checkpoint)["state"].values()]


def deviations(share, chance):
    """How far a share of 40 right answers lies above chance."""
    return (share - chance) / math.sqrt(chance * (1 - chance) / 40)


def predictions(path):
    """The answers of a predictions file, in the order of their rows."""
    lines = [line for line in read_lines(path) if "answer" in line]
    return sorted(lines, key=lambda line: line["row"])


@pytest.fixture(scope="session")
def trained(tmp_path_factory, all_five):
    """A run long enough to learn two kinds of question."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    printed = run("train.py", "--data", "tones:louder,note", "--stage", "40:recon",
                  "--stage", "20:recon,pitch", "--out", folder, "--heldout", 40, "--calibrate", 16,
                  "--workers", 2)
    clip, = folder.glob("*.wav")
    heldout = json.loads((folder / "heldout.json").read_text())
    return SimpleNamespace(folder=folder, printed=printed, heldout=heldout, clip=clip)


@pytest.fixture(scope="session")
def merged(trained, tmp_path_factory):
    """The folder that `merge` wrote of it."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    run("infer.py", "merge", trained.folder, folder)
    return folder


@pytest.fixture(scope="session")
def three_notes(tmp_path_factory):
    """A folder with three clips and rows.jsonl."""
    folder = tmp_path_factory.mktemp("notes")
    tones = Tones("heldout", 3, ["note"])
    rows = []
    for i in range(3):
        wav(folder, f"{i}.wav", tones.load(i)["wave"].numpy())
        rows.append({"audio": f"{i}.wav", "prompt": "Which note?", "response": "C"})
    write_lines(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def answers(trained, merged, three_notes):
    """{model: what `ask` says to the three notes}"""
    said = {}
    for name in (trained.folder, merged):
        clips = [three_notes / f"{i}.wav" for i in range(3)]
        printed = run("infer.py", "ask", name, *clips, "Which note?", "--json", "--workers", 0,
                      "--max-new-tokens", 20)
        said[name] = [json.loads(line)["answer"].strip() for line in printed.splitlines()]
    return said


@pytest.fixture(scope="session")
def scored(trained, tmp_path_factory):
    """A file of predictions, the result printed with it, and again(out, ..): the same command."""
    out = tmp_path_factory.mktemp("scored") / "predictions"

    def again(out, *more, rows="tones:note,louder:6", **kwargs):
        return run("infer.py", "score", trained.folder, rows, "--out", out, *SCORE, *more, **kwargs)

    return SimpleNamespace(out=out, result=last_json(again(out)), again=again)


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A function: scores three captions, with these flags."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    rows = [{"audio": None, "prompt": f"Say {i} {{", "response": f"It is {i}.", "task": "caption"}
            for i in range(3)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    flags = ["score", "tiny", path, "--out", tmp_path / "out", *SCORE]
    return functools.partial(run, "infer.py", *flags)


@contextlib.contextmanager
def judge(replies, raw=False, location=None):
    """An OpenAI-compatible endpoint that gives these replies, status or text, in turn.

    raw         the texts are whole replies, not what the judge says
    location    where it redirects to
    -> (its URL, what was sent)"""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Authorization"], body))
            reply = replies[len(seen) - 1]
            self.send_response(reply if isinstance(reply, int) else 200)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            if isinstance(reply, int):
                reply = "sk-secret is wrong"
            elif not raw:
                reply = json.dumps({"choices": [{"message": {"content": reply}}]})
            self.wfile.write(reply.encode())

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        yield f"{url}/v1", seen


# --------------------------------------------------------------------------------------------------
# Harness: programs run in other processes. They fork from a server that has the imports done; a
# fork of this process, which has used its threads, could not train.

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_all", "peft"])    # peft imports transformers' models


@pytest.fixture(scope="session", autouse=True)
def server():
    multiprocessing.forkserver.ensure_running()    # it imports while the first tests run


def child(target, log, args, env):
    multiprocessing.set_start_method("fork", force=True)    # of data processes, as anywhere else
    torch.set_num_threads(1)                                # a fork waits for more for ever
    os.environ.update(env)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*args)


def start(target, log, *args, **env):
    """A process that runs target(*args) and prints to the file `log`."""
    process = PROCESSES.Process(target=child, args=(target, str(log), args, env))
    process.log = str(log)
    open(log, "w").close()
    process.start()
    return process


def wait_for(process, words):
    while process.is_alive() and words not in open(process.log).read():
        time.sleep(0.05)


def ended(*processes, status=0):
    for process in processes:
        process.join(60)
        process.kill()    # if it hangs
        assert process.exitcode == status, open(process.log).read()[-2000:]


def two_ranks(log, *args, rank0=train):
    """Two processes of train.py as torchrun would start them, in fewer seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(rank0, f"{log}0", *args, RANK="0", **env),
            start(train, f"{log}1", *args, RANK="1", **env)]


def train_in_a_group(*args):
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background ignores it
    train(*args)


def train_into_a_closed_pipe(*args):
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)
    train(*args)


def train_and_die(*args):
    """Killed inside its second checkpoint: the adapter is written, the optimizer is not."""
    save = safetensors.torch.save_model
    saves = []

    def save_heads(*args):
        saves.append(args)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*args)

    safetensors.torch.save_model = save_heads
    train(*args)


@pytest.fixture(scope="session")
def all_five(tmp_path_factory):
    """(process, folder) of a run with all experts: 2 GB, and ten seconds beside `trained`."""
    folder = tmp_path_factory.mktemp("all_five")
    process = start(train, folder / "log", *QUICK, "--stage", "2:all", "--batch", 2,
                    "--calibrate", 2, "--random-experts", "--out", folder / "run")
    return process, folder / "run"


@pytest.fixture(scope="session")
def mixed_runs(tmp_path_factory):
    """A folder with runs of two stages of two steps over the same rows: batch/, micro_batches/,
    two_ranks/ and killed/, which lacks its end. The rows are uneven in all ways: rank 0 gets text
    alone, rank 1 clips, one of them of NaN."""
    folder = tmp_path_factory.mktemp("mixed")
    path = manifest(folder, [0.4 + 0.17 * i for i in range(7)] + [2])
    wav(folder, "7.wav", np.full(32000, np.nan), subtype="FLOAT")
    text = [{"audio": None, "prompt": "Say " + "it " * i, "response": "yes"} for i in range(8)]
    write_lines(path, text + read_lines(path))
    assert ((plan_stage(Manifest(path), 2, 8, 0, 0) < 8) == ([True] * 4 + [False] * 4)).all()

    flags = ["--data", path, "--stage", "2:recon,pitch", "--stage", "2:recon", "--batch", 8,
             "--calibrate", 8, "--save-every", 1, "--keep", 9, "--workers", 1]
    killed = two_ranks(folder / "killed.log", *flags, "--out", folder / "killed",
                       rank0=train_and_die)
    whole = two_ranks(folder / "whole.log", *flags, "--out", folder / "two_ranks")
    ended(killed[0], status=-signal.SIGKILL)
    killed[1].kill()
    ended(*whole)
    run("train.py", *flags, "--out", folder / "batch")
    run("train.py", *flags, "--out", folder / "micro_batches", "--micro-tokens", 1)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with three clips, rows.jsonl and a run of two steps over them, and its flags."""
    folder = tmp_path_factory.mktemp("finished")
    manifest(folder, [0.4, 0.5, 0.6])
    flags = [*QUICK, "--data", "rows.jsonl", "--stage", "2:recon", "--out", "run"]
    with contextlib.chdir(folder):
        run("train.py", *flags)
    return folder, flags


@pytest.fixture
def short_run(finished, tmp_path, monkeypatch):
    """Flags of a run in a folder of its own, which is the working directory."""
    folder, flags = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return flags
