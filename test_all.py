"""What holds, as tests: on the CPU, without network, in three to four minutes on two cores.

    python -m pytest -q test_all.py
    python -m pytest -q test_all.py -k "converter or mixture"

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
import importlib.util
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
from typing import NamedTuple

import jiwer
import numpy as np
import peft
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
import experts
import heads
import infer
import model
from data import (Manifest, Mixture, Rows, Tones, allot, at_rate, collate, open_source, plan_stage,
                  read_audio)
from docs import pictures
from experts import (EXPERTS, TOKEN_RATE, Affect, Expert, SoundEvents, SpeechUnits, load,
                     load_experts, resample_frames)
from model import (BACKBONES, IGNORE, THINK, THINK_END, THINK_START, InputError, TooLong,
                   build_inputs, load_coat, n_audio_tokens, render_prompt)

# On the CPU also where there is a GPU, unless COAT_TEST_GPU is set.
if "COAT_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
HERE = Path(__file__).parent.resolve()
REAL = [name for name in BACKBONES if name != "tiny"]    # backbones
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


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
        assert (trained["labels"][:, n:] != IGNORE).all()


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
    prompts = {}
    for think in (True, False):
        batch = build_inputs(coat, [noise(2.0)], ["?"], think=think)
        prompts[think] = batch["input_ids"].shape[1]
        with watched(coat) as calls:
            assert greedy(coat, batch, 7).shape == (1, 7)
        assert calls == ["audio tower", prompts[think], 1, 1, 1, 1, 1, 1]
    assert prompts[True] == prompts[False] + 50 + 2


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
def test_loss_is_0_at_the_teacher_and_1_at_the_best_constant_answer(task):
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
    """Teachers of any frame rate are brought to the 25 Hz of the thinking tokens (section 3.3)."""
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


def test_labels_are_the_response_and_its_end(coat, rows):
    batch = build_inputs(coat, *rows)
    for labels, mask, response in zip(batch["labels"], batch["attention_mask"], rows[2]):
        said = coat.processor.tokenizer.decode(labels[labels != IGNORE])
        assert said == response + "<|im_end|>"
        assert (labels[mask == 0] == IGNORE).all() and mask[-1] == 1


def test_closed_form_of_L_a_is_that_of_the_towers():
    frames = np.arange(3, 3001)
    of_tower = [((f - 1) // 2 + 1 - 2) // 2 + 1 for f in frames]
    assert [n_audio_tokens(160 * f) for f in frames] == of_tower


def test_special_tokens_in_a_text_are_refused(coat):
    for token in (coat.backbone.audio_token, THINK, "<|im_end|>", "<|endoftext|>"):
        for row in ([f"what is {token}?"], ["yes"]), (["what?"], [token]):
            with pytest.raises(InputError, match="special token"):
                build_inputs(coat, [noise(1.0)], *row)


@pytest.mark.parametrize("wave, words", [
    (torch.zeros(1000), "lasts 0.06 s"), (torch.zeros(121 * 16000), "lasts 121.00 s"),
    (torch.zeros(16000, 2), "mono"), (torch.zeros(16000, dtype=torch.int16), "int16"),
    (torch.full((16000,), 9830.0), "divide by 32768"),
    (torch.full((16000,), math.nan), "samples up to nan")])
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


def test_two_minutes_beside_a_text_row_give_3000_states_and_no_features_beyond_them(coat):
    batch = build_inputs(coat, [noise(120), None], ["?", "hello"], ["a", "b"])
    with torch.no_grad():
        out = coat(batch)
    features = batch["audio"]["input_features"]
    assert features.shape[0] * features.shape[2] == 12000
    assert out.valid.sum(1).tolist() == [3000, 0]
    assert out.think_states.isfinite().all() and out.ce_sum.isfinite()


def test_audio_embeds_are_the_projected_tower(coat):
    batch = build_inputs(coat, [noise(0.1), None, noise(31, 1)], ["a", "t", "b"], ["c", "d", "e"])
    out, projected = forward_and_projected(coat, batch)
    mask = next(value for key, value in batch["audio"].items() if key.endswith("mask"))
    if projected.ndim == 3:
        n_frames = [(n + 1) // 2 // 2 for n in mask.sum(1).tolist()]
        projected = torch.cat([window[:n] for window, n in zip(projected, n_frames)])
    assert torch.equal(out.audio_embeds[out.valid], projected)    # (2 + 775, D)


def test_audio_tower_builds_no_graph(coat):
    batch = build_inputs(coat, [noise(0.1)], ["a"], ["b"])
    out, projected = forward_and_projected(coat, batch)
    assert projected.requires_grad == bool(coat.new_projector)
    assert not out.audio_embeds.requires_grad
    assert out.think_states.requires_grad


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


def test_two_clips_give_different_logits_for_the_same_ids(coat):
    first = build_inputs(coat, [noise(1.0, 1)], ["Which?"])
    second = build_inputs(coat, [noise(1.0, 2)], ["Which?"])
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert (last_logits(coat, first) - last_logits(coat, second)).abs().max() > 1e-2


def test_bf16_trains_as_fp32_does(coat, hub):
    rows = [noise(1.0), None, noise(3.0)], ["?", "hi", "what?"], ["yes", "no", "so"]
    with torch.no_grad():
        want = coat(build_inputs(coat, *rows))
    low = loaded(coat.where, hub, dtype=torch.bfloat16)
    batch = build_inputs(low, *rows)
    with torch.autocast("cpu", torch.bfloat16):    # as train.py runs it on a GPU
        out = low(batch)
    (out.ce_sum + out.think_states.sum()).backward()
    for p in low.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        assert not p.requires_grad or p.grad.isfinite().all()
    assert_close(out.ce_sum, want.ce_sum, rtol=0.05, atol=0.1)


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


@pytest.mark.parametrize("think", [True, False])
def test_batch_answers_each_row_as_it_is_answered_alone(coat, rows, think):
    together = greedy(coat, build_inputs(coat, *rows[:2], think=think), 6, stop=True)
    for i, (wave, prompt) in enumerate(zip(*rows[:2])):
        alone = greedy(coat, build_inputs(coat, [wave], [prompt], think=think), 6, stop=True)[0]
        assert together[i, :len(alone)].tolist() == alone.tolist()


def test_answer_takes_numpy_or_torch_at_any_rate_and_lists(coat):
    wave = torchaudio.functional.resample(noise(1.0), 16000, 44100)
    heard = at_rate(wave, 44100, 16000)
    want = coat.generate(build_inputs(coat, [heard, None], ["Which?", "Hello"]), 6)
    clips = [wave.double().numpy(), None]
    assert coat.answer(clips, [44100, None], ["Which?", "Hello"], 6) == want
    assert coat.answer(wave, 44100, "Which?", max_new_tokens=6) == want[0]


def test_thinking_tokens_are_never_said(coat):
    batch = build_inputs(coat, [noise(1.0)], ["Which?"])
    tempted = copy.deepcopy(coat)
    with torch.no_grad():
        tempted.hf.lm_head.weight[coat.think_ids] = 100 * tempted.states(batch)[0][0, -1]
    assert last_logits(tempted, batch).argmax().item() in coat.think_ids
    assert not torch.isin(greedy(tempted, batch, 5), torch.tensor(coat.think_ids)).any()


def test_stream_pads_rows_that_have_ended_and_ends_with_the_last(tiny, monkeypatch):
    batch = two_questions(tiny)
    free = greedy(tiny, batch, 12)
    monkeypatch.setattr(tiny, "eos_ids", [free[0, 2], free[1, 4]])
    ids = greedy(tiny, batch, 12, stop=True)
    assert ids.shape[1] == 5
    assert torch.equal(ids[0, :3], free[0, :3]) and torch.equal(ids[1], free[1, :5])
    assert (ids[0, 3:] == tiny.processor.tokenizer.pad_token_id).all()


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
    assert len(projector) == len(coat.new_projector) == (2 if coat.where == "composed" else 0)
    trained -= projector
    assert len(trained) == layers * 7 * 2 + 1    # A and B of each linear map, and the three rows
    assert all(".language_model." in name for name in trained)


def test_training_leaves_the_base_weights_byte_identical(coat, hub):
    fresh = loaded(coat.where, hub)
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1e-2)
    out = fresh(build_inputs(fresh, [noise(0.5), None], ["?", "hi"], ["yes", "no"]))
    (out.ce_sum + out.think_states.pow(2).mean()).backward()
    optimizer.step()
    for name, p in fresh.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_new_rows_start_as_the_mean_of_the_used_ones_and_a_table_with_room_keeps_its_size(
        coat, hub):
    spare = {"tiny": 58, "composed": 0} | {name: layout.spare for name, layout in LAYOUTS.items()}
    plain = load_coat(*hub[coat.where])
    used = len(plain.processor.tokenizer) - 3
    assert plain.think_ids == [used, used + 1, used + 2]
    for table in (plain.hf.get_input_embeddings().weight, plain.hf.get_output_embeddings().weight):
        assert len(table) == plain.hf.config.get_text_config().vocab_size
        assert len(table) == used + max(3, spare[coat.where])
        assert_close(table[plain.think_ids], table[:used].mean(0).expand(3, -1))


def test_adapter_is_plain_peft(coat, hub, written):
    plain = load_coat(*hub[coat.where])
    plain.lm = peft.PeftModel.from_pretrained(plain.lm, written.adapter)
    assert torch.equal(greedy(plain, written.batch), written.said)


def test_merged_folder_is_plain_transformers(coat, written):
    batch = written.batch
    theirs = BACKBONES[coat.name].model_class.from_pretrained(written.merged).generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **batch["audio"],
        max_new_tokens=8)    # the rest is in its generation_config.json
    assert torch.equal(theirs[:, batch["input_ids"].shape[1]:], greedy(coat, batch, stop=True))


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
    template = (Path(getattr(written, folder)) / "chat_template.jinja").read_text()
    clip = {"type": "audio"}
    text = {"type": "text", "text": "Which?"}

    def render(content, **kwargs):
        chat = [{"role": "user", "content": content}]
        return coat.processor.apply_chat_template(chat, template, tokenize=False, **kwargs)

    prompt = render_prompt(coat, "Which?", 1)
    block = THINK_START + 25 * THINK + THINK_END
    assert render([clip, text], add_generation_prompt=True, n_audio=25) == prompt + block
    assert render([clip | {"n_audio": 25}, text], add_generation_prompt=True) == prompt + block
    assert render([clip, text], add_generation_prompt=True, n_audio=0) == prompt
    for content in ([clip, text], coat.backbone.audio_token + "Which?"):
        with pytest.raises(Exception, match="n_audio"):
            render(content, add_generation_prompt=True)
    assert prompt.startswith(render([clip, text]))
    assert render("Say hello.", add_generation_prompt=True) == render_prompt(coat, "Say hello.", 0)


def test_batch_in_plain_transformers_says_what_each_clip_gets_alone(coat, written):
    """Padded on the left, with a block of its own for each clip."""
    if coat.name == "qwen2.5-omni":
        pytest.skip("its own processor cannot be built without torchvision")
    processor = transformers.AutoProcessor.from_pretrained(written.merged)
    merged = load_coat(written.merged)
    waves = [noise(1.0), noise(2.2, 5)]
    chats = [[{"role": "user", "content": [
        {"type": "audio", "n_audio": n_audio_tokens(len(wave))},
        {"type": "text", "text": "Which?"}]}] for wave in waves]
    prompts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=prompts, audio=[wave.numpy() for wave in waves], return_tensors="pt",
                       sampling_rate=16000, text_kwargs={"padding": True})
    ids = merged.hf.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1]:]
    said = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert said == [merged.answer(wave, 16000, "Which?", 6) for wave in waves]


def test_merged_bf16_is_bf16_throughout_and_each_weight_is_rounded_once(coat, hub):
    low = loaded(coat.where, hub, dtype=torch.bfloat16)
    layer = next(m for m in low.hf.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    merged = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    low.merge()
    assert torch.equal(layer.base_layer.weight, merged.bfloat16())
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    batch = build_inputs(low, [noise(1.0), None, noise(3.0)], ["?", "hi", "what?"])
    assert greedy(low, batch, 3).shape == (3, 3)


def test_omni_is_loaded_without_its_vision_blocks_and_talker_and_saved_as_the_full_model(hub):
    coat = loaded("qwen2.5-omni", hub)
    assert not any("visual.blocks" in name or "talker" in name for name, _ in coat.named_parameters())
    assert not hasattr(coat.processor, "image_processor")


def test_text_thinking_adapter_of_the_old_layout_is_loaded_whole(hub, text_think):
    """Audio Flamingo 3's own, from before transformers 5."""
    coat = model.load_text_think("audio-flamingo-3", text_think.folder, hub["audio-flamingo-3"][1])
    want = text_think.ours.merge().hf.state_dict()
    for key, value in coat.hf.state_dict().items():
        if key.endswith("multi_modal_projector.linear_2.bias"):
            assert torch.equal(value, text_think.bias)
        elif "embed_tokens" not in key and "lm_head" not in key:    # ours has trained rows there
            assert_close(value, want[key])


def test_text_thinking_asks_with_the_sentence_of_its_authors_and_without_the_block(text_think):
    told = json.loads(run("infer.py", *text_think.ask, text_think.folder))
    assert told["question"].endswith("reason about the input audio before you respond.")
    wave = at_rate(*read_audio(told["audio"]), 16000)
    asked = build_inputs(text_think.ours, [wave], [told["question"]], think=False)
    assert told["prompt_tokens"] == asked["input_ids"].shape[1]


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


def test_focal_bce_of_gamma_0_is_bce():
    logits = torch.randn(50, 4)
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


def test_heads_start_at_the_best_constant_answer_and_learn(two_heads):
    expert_heads, h, valid, targets = two_heads
    losses = expert_heads(h, valid, targets)
    for task in targets:
        assert (losses[task] / valid.sum()).item() == pytest.approx(1, abs=1e-4)
    losses["recon"].backward()
    assert expert_heads["recon"].out.weight.grad.any()
    assert all(p.grad is None for p in expert_heads["pitch"].parameters())


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
    targets = {task: z[:, :1] for task, z in targets.items()}
    losses = expert_heads(h[:, :1], torch.zeros_like(valid[:, :1]), targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in expert_heads.parameters())


def test_losses_are_summed_in_fp32_under_autocast(two_heads):
    expert_heads, *batch = two_heads
    with torch.autocast("cpu", torch.bfloat16):
        losses = expert_heads(*batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_scales_are_saved_with_the_heads_and_readouts_are_not(two_heads):
    names = set(two_heads[0].state_dict())
    assert {"recon_scale", "pitch_scale", "pitch_aux_scale", "pitch.out.weight"} < names
    assert not any("readout" in name for name in names)


@pytest.mark.parametrize("name, result", [
    ("heads", "round(losses['speech'].item(), 2) == 100"), ("experts", "z.shape == (25, 2048)")])
def test_file_copied_alone_does_what_its_docstring_says(name, result, tmp_path, monkeypatch):
    path = shutil.copy(HERE / f"{name}.py", tmp_path)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    names = {}
    exec("\n".join(re.findall(r"^    >>> (.*)$", module.__doc__, re.M)), names)
    assert eval(result, names)


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


def test_affect_equals_the_reference_implementation_and_takes_its_sizes_from_the_file():
    affect = an_expert("affect")
    close(affect(audio(16000, 2.0))[::9], reference("affect_tiny")["feat"], 5e-5)
    blocks = len(affect.context) + len(affect.blocks)
    assert (affect.dim, affect.heads, blocks, affect.extra) == (256, 4, 5, 5)


def test_pitch_equals_the_official_onnx_file():
    pitch = an_expert("pitch")
    wave = chord()
    z = pitch(wave)
    close(z.view(-1, 8, 264).transpose(0, 1)[:, ::43], reference("pitch")["feat"], 1e-2)
    close(pitch.readout(z).sigmoid()[::8], reference("pitch")["contour"], 1e-3)
    close(pitch.notes(wave)[::8], reference("pitch")["note"], 1e-3)


def test_attention_in_pieces_equals_attention_at_once(monkeypatch):
    affect = an_expert("affect")
    whole = affect(audio(16000, 2.0))
    monkeypatch.setattr(affect, "BIAS_FLOATS", [4 * 104 * 7])    # 7 queries at a time
    close(affect(audio(16000, 2.0)), whole, 1e-5)


@pytest.mark.parametrize("name", ["sound", "pitch"])
def test_readout_is_that_of_each_clip_and_passes_gradients_to_its_input_alone(name):
    expert = an_expert(name)
    z = torch.randn(2, 6, expert.dim, requires_grad=True)
    logits = expert.readout(z)
    close(logits[1], expert.readout(z[1]).detach(), 1e-4)
    logits.square().sum().backward()
    assert z.grad.abs().sum() > 0 and not expert.training
    assert all(p.grad is None and not p.requires_grad for p in expert.parameters())


@pytest.mark.parametrize("name, frames", [
    ("affect", {1: 1, 719: 1, 720: 2, 32000: 99}),
    ("sound", {1: 1, 64000: 6}),
    ("pitch", {1: 1, 44100: 173}),
])
def test_there_are_as_many_frames_as_announced_and_at_least_one(name, frames):
    expert = an_expert(name)
    assert {n: expert.frames(n) for n in frames} == frames
    for n in (1, 79, 400, 5000, 33024, 40001):
        z = expert(torch.randn(n) * 0.1)
        assert z.shape == (expert.frames(n), expert.dim) and z.dtype == torch.float32


# (frames, tokens, Hz, centre of frame 0 in seconds): the four networks', and others
RESAMPLED = [(1, 7, 50.0, 0.0125), (99, 50, 50.0, 0.0125), (87, 25, 22050 / 256, 0.0),
             (3, 25, 3.125, 0.16), (400, 3, 400.0, 0.0), (5, 40, 50.0, 0.01)]


@pytest.mark.parametrize("frames, n, rate, offset", RESAMPLED)
def test_frame_lands_in_the_token_that_holds_its_centre_and_constants_stay(frames, n, rate, offset):
    constant = torch.randn(1, 6)
    resampled = resample_frames(constant.expand(frames, 6), n, rate, offset)
    assert torch.equal(resampled, constant.expand(n, 6))
    hits = resample_frames(torch.eye(frames), n, rate, offset)
    for j in range(frames):
        token = int((offset + j / rate) * TOKEN_RATE + 1e-6)
        assert token >= n or hits[token, j] == hits[:, j].max() > 0


def test_random_experts_are_loud_and_always_the_same(monkeypatch):
    init = functools.partialmethod(Affect.__init__, **TINY)
    monkeypatch.setattr(Affect, "__init__", init)
    with pytest.warns(UserWarning, match="affect: RANDOM WEIGHTS"):
        first = load("affect", random=True)
        second = load("affect", random=True)
    assert torch.equal(first(audio(16000, 0.5)), second(audio(16000, 0.5)))


def test_random_experts_leave_out_the_one_that_ships_its_weights():
    with warnings.catch_warnings(action="error"):
        load("pitch", random=True)


def test_emotion_head_of_a_plus_file_is_kept_and_read_out():
    weights = official(Affect, **TINY)
    weights["proj.weight"] = torch.randn(9, 256)
    weights["proj.bias"] = torch.randn(9)
    plus = Affect.from_state_dict({"model": weights})
    z = torch.randn(4, 256)
    assert_close(plus.readout(z), F.linear(z, weights["proj.weight"], weights["proj.bias"]))
    assert len(plus.EMOTIONS) == 9 and not any(p.requires_grad for p in plus.parameters())
    assert an_expert("affect").readout is SpeechUnits.readout is None


def test_recon_is_an_expert_like_the_others():
    experts = load_experts(["recon", "pitch"], d=6)
    assert list(experts) == ["recon", "pitch"] and experts["recon"].dim == 6
    x = torch.randn(2, 5, 6)
    batch = {"n_audio": torch.tensor([5, 0]), "waves": {22050: [chord()[:4410], None]}}
    targets = data.expert_targets(experts, batch, x)
    assert targets["recon"] is x and targets["pitch"].shape == (2, 5, 2112)


def test_sixth_expert_is_one_class_and_one_row(monkeypatch, tmp_path):
    class Loudness(Expert):
        sample_rate = 16000
        frame_rate = 100.0
        dim = 1
        hop = 160
        offset = 0.005

        def features(self, wave):
            return wave.unfold(0, 160, 160).square().mean(1, keepdim=True)

    monkeypatch.setitem(EXPERTS, "loudness", Loudness)
    run("train.py", *QUICK, "--stage", "2:recon=0.3,loudness=0.5", "--out", tmp_path)
    first, second = log_lines(tmp_path)
    assert first["loudness"] != second["loudness"] > 0
    weighted = 0.3 * second["recon"] + 0.5 * second["loudness"]
    assert second["loss"] == pytest.approx(second["ce"] + weighted)


# --------------------------------------------------------------------------------------------------
# data.py: audio and sources

def test_eight_channels_at_96_khz_are_read_as_mono(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(96000) / 96000) / 2
    path = wav(tmp_path, "eight.wav", np.stack([tone] * 8, 1), 96000)
    wave, rate = read_audio(path)
    assert rate == 96000 and wave.shape == (96000,)
    down = at_rate(wave, rate, 16000)
    want = torch.sin(2 * np.pi * 440 * torch.arange(16000) / 16000) / 2
    assert len(down) == 16000 and (down - want)[200:-200].abs().max() < 1e-3


def test_segment_of_a_file_is_that_part_of_it(tmp_path):
    path = wav(tmp_path, "a.wav", noise(2.0).numpy(), subtype="FLOAT")
    assert torch.equal(read_audio(path, 0.5, 1.25)[0], read_audio(path)[0][8000:20000])


def test_shipped_clips_all_decode():
    source = Manifest(HERE / "assets/clips.jsonl")
    assert len(source) >= 12 and not source.skipped
    assert 1 < source.lengths.min() and source.lengths.max() < 15
    for i in range(len(source)):
        row = source.load(i)
        assert row["wave"].abs().max() > 0.02
        choices = row.get("choices", [row["response"]])
        assert any(row["response"].endswith(choice) for choice in choices)


def test_tones_are_the_same_everywhere_and_differ_between_splits():
    train = Tones("train", 600)
    heldout = Tones("heldout", 600)
    assert torch.equal(train.load(7)["wave"], Tones("train", 600).load(7)["wave"])
    assert not torch.equal(train.load(7)["wave"][:100], heldout.load(7)["wave"][:100])


def test_answers_about_tones_are_balanced():
    source = Tones("train", 600)
    answers = {kind: [] for kind in data.DEFAULT_TONES}
    for i in range(600):
        row = source.load(i)
        assert len(row["wave"]) == round(16000 * source.lengths[i]) and row["wave"].abs().max() < 1
        assert row["response"] in row["choices"]
        answers[row["task"]].append(row["response"])
    for kind, given in answers.items():
        counts = [given.count(answer) for answer in data.TONES[kind][1]]
        assert min(counts) > 0 and len(counts) == len(set(given))
        assert max(counts) < 2.2 * len(given) / len(counts)


@pytest.mark.parametrize("text, rows", [
    ("tones", 360), ("tones:note", 60), ("tones:note,louder:5", 10), ("tones::5", 30)])
def test_synthetic_tones_are_a_source_by_name(text, rows):
    assert len(open_source(text)) == rows
    assert open_source(text).load(0)["task"] in text.replace("tones", "louder")


def test_tones_for_training_are_counted_by_the_trainer():
    source = open_source("tones:note", 7)
    assert len(source) == 7
    assert torch.equal(source.load(3)["wave"], Tones("train", 7, ["note"]).load(3)["wave"])


def test_few_labels_are_half_of_a_stage_and_the_rest_only_listens():
    source = open_source("tones:note,glide:21", 400, seed=1)
    plan = plan_stage(source, 50, 8, seed=1, stage=0)
    assert len(source) == 442 and (plan < 42).mean() == 0.5
    assert set(np.bincount(plan[plan < 42])) <= {4, 5} and len(set(plan[plan >= 42])) == 200
    rows = [source.load(i) for i in range(44)]
    given = Counter((row["task"], row["response"]) for row in rows)
    assert set(given.values()) == {2, 3, 7} and given["unlabelled", "ok"] == 2
    assert len([answer for _, answer in given]) == 7 + 3 + 1


def test_seed_chooses_the_labelled_clips():
    waves = [open_source("tones:note:7", 40, seed).load(0)["wave"] for seed in (1, 1, 2)]
    assert torch.equal(waves[0], waves[1]) and not torch.equal(waves[0], waves[2])


# --------------------------------------------------------------------------------------------------
# data.py: the batches of a stage

class Clips:
    """A source of which only the lengths are known."""

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


@pytest.mark.parametrize("rows, distinct", [(100, 16), (24, 16), (5, 5)])
def test_copies_of_a_row_go_to_different_steps(rows, distinct):
    source = Clips(np.random.default_rng(0).uniform(1, 30, rows))
    plan = plan_stage(source, 100, 16, seed=1, stage=0)
    assert {len(set(step)) for step in plan.tolist()} == {distinct}
    counts = np.bincount(plan.ravel())
    assert max(counts) - min(counts) <= 1


def test_stage_is_a_function_of_seed_and_stage():
    source = Clips(np.random.default_rng(0).uniform(1, 30, 640))
    plan = plan_stage(source, 100, 16, seed=1, stage=0)
    assert np.array_equal(plan, plan_stage(source, 100, 16, seed=1, stage=0))
    assert not np.array_equal(plan, plan_stage(source, 100, 16, seed=1, stage=1))
    assert not np.array_equal(plan, plan_stage(source, 100, 16, seed=2, stage=0))


def test_manifest_is_drawn_in_whole_passes(mixture):
    source = Manifest(mixture.paths[0])
    rng = np.random.default_rng([5, 1])
    drawn = np.concatenate([rng.permutation(500), rng.permutation(500)])[:600]
    assert np.array_equal(np.sort(plan_stage(source, 50, 12, 5, 1), axis=None), np.sort(drawn))


def test_batch_without_audio_has_one_masked_frame_and_targets_of_zero(tiny):
    row = {"prompt": "Say hello.", "response": "hello"}
    batch = collate([row, row], tiny.spec, rates=[an_expert("pitch").sample_rate])
    targets = data.expert_targets({"pitch": an_expert("pitch")}, batch)
    assert targets["pitch"].shape == (2, 1, 8 * 264) and not targets["pitch"].any()
    assert tiny(batch).valid.tolist() == [[False], [False]]


def test_micro_batch_has_at_most_its_tokens_or_one_row(tiny):
    row = {"rate": 16000, "prompt": "?", "response": "x"}
    rows = [row | {"row": i, "wave": noise(0.3 + i % 7)} for i in range(20)]
    batches, skipped = data.collate_step(rows, tiny.spec, micro_tokens=400)
    found = [found["row"] for batch in batches for found in batch["rows"]]
    assert sorted(found) == list(range(20)) and not skipped
    assert all(b["input_ids"].numel() <= 400 or len(b["rows"]) == 1 for b in batches)
    assert {len(b["rows"]) for b in batches} > {1} and len(batches) < 20


def test_targets_are_made_clip_by_clip(tiny):
    """The level of a clip, its ends and its length are its own, so it must not be padded."""
    pitch = an_expert("pitch")
    row = {"wave": noise(1.3), "rate": 16000, "prompt": "?", "response": "x"}
    batch = collate([row, row | {"wave": noise(0.4)}], tiny.spec, rates=[pitch.sample_rate])
    targets = data.expert_targets({"pitch": pitch}, batch)["pitch"]
    z = pitch(at_rate(noise(0.4), 16000, pitch.sample_rate))
    assert torch.equal(targets[1, :10], resample_frames(z, 10, pitch.frame_rate, pitch.offset))
    assert not targets[1, 10:].any()


# --------------------------------------------------------------------------------------------------
# data.py: mixtures

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
    """500, 40, 300 and 70 rows."""
    for name, n in (("a", 500), ("deep/b", 40), ("c", 300)):
        jsonl(tmp_path / f"{name}.jsonl", n, task=name)
    jsonl(tmp_path / "t.jsonl", 70, audio=None, task="text")
    return Mixture(write(tmp_path / "mixture.json", MIXTURE))


def per_source(mixture, rows):
    ends = zip(mixture.first, mixture.first[1:])
    return [int(((begin <= rows) & (rows < end)).sum()) for begin, end in ends]


def test_mixture_gives_groups_their_shares_and_sources_of_a_group_alike(mixture):
    rows = mixture.draw(120, 0, 0)
    assert len(mixture) == 910 and len(rows) == 120
    assert per_source(mixture, rows) == [30, 30, 40, 20]    # 3 : 2 : 1
    assert mixture.draw(601, 0, 0).shape == (601,)


def test_mixture_leaves_what_a_capped_source_cannot_give_to_its_group(mixture):
    rows = mixture.draw(600, 0, 0)
    assert per_source(mixture, rows) == [220, 80, 200, 100]    # deep/b: 40 rows, twice


def test_mixture_leaves_what_a_group_cannot_give_to_the_others_and_reports_it(mixture):
    n = 2400    # text would be 400, its cap is 4 * 70; the rest at 3 : 2
    counts = per_source(mixture, mixture.draw(n, 0, 0))
    assert counts == mixture.counts(n).tolist() == [1192, 80, 848, 280]
    text = "\n".join(mixture.report(n))
    assert "text: 120 short of its share, left to other groups" in text
    assert "asr: 72 above its share" in text
    assert "t.jsonl, no more by its max_epochs" in text and "c.jsonl, no more" not in text


def test_mixture_that_is_used_up_is_refused(mixture):
    assert mixture.counts(3560).tolist() == [2000, 80, 1200, 280]
    with pytest.raises(InputError, match="3561 rows, but .* has 3560 under its max_epochs"):
        mixture.draw(3561, 0, 0)


def test_each_row_of_a_source_comes_k_or_one_more_times(mixture):
    for n in (120, 600, 2400, 3560):
        times = np.bincount(mixture.draw(n, 3, 1), minlength=len(mixture))
        assert times.sum() == n
        for begin, end, cap in zip(mixture.first, mixture.first[1:], (4, 2, 4, 4)):
            of_source = times[begin:end]
            assert of_source.max() - of_source.min() <= 1 and of_source.max() <= cap


def test_mixture_is_drawn_by_seed_and_stage_alone(mixture, tmp_path):
    again = Mixture(str(tmp_path / "mixture.json"))
    plan = plan_stage(mixture, 50, 12, 7, 1)
    again.draw(99, 1, 1)
    assert np.array_equal(plan, plan_stage(again, 50, 12, 7, 1)) and plan.shape == (50, 12)
    drawn = mixture.draw(600, 7, 1)
    assert np.array_equal(np.sort(plan.ravel()), np.sort(drawn))
    assert not np.array_equal(drawn, mixture.draw(600, 7, 2))
    assert not np.array_equal(drawn, mixture.draw(600, 8, 1))


def test_rows_of_a_step_are_alike_in_length(mixture):
    lengths = mixture.lengths[plan_stage(mixture, 50, 12, 7, 1)]
    assert 1 - lengths.sum() / (lengths.max(1).sum() * 12) < 0.2


def test_paths_are_relative_to_their_manifest(mixture, tmp_path):
    assert mixture[0]["audio"] == str(tmp_path / "0.wav")
    assert mixture[500]["audio"] == str(tmp_path / "deep/0.wav")
    wav(tmp_path / "deep", "0.wav", np.zeros(16000))
    assert len(mixture.load(500)["wave"]) == 16000
    assert "no file" in str(Rows(mixture)[501]) and isinstance(Rows(mixture)[501], InputError)


def test_mixture_holds_the_rows_of_its_sources_in_order(mixture):
    tasks = ["a"] * 500 + ["deep/b"] * 40 + ["c"] * 300 + ["text"] * 70
    assert [row["task"] for row in mixture] == tasks
    assert mixture[909]["response"] == "69"
    row = mixture.load(845)    # of text
    assert row["audio"] is None and "wave" not in row and mixture.lengths[845] == 0


def test_unusable_rows_are_never_drawn(mixture, tmp_path):
    row = {"prompt": "?", "response": "x"}
    rows = [row | {"audio": "none.wav"}]
    rows += [row | {"audio": "x.wav", "seconds": seconds} for seconds in (0.05, 5, 121, 6)]
    write(tmp_path / "c.jsonl", "\n\n".join(map(json.dumps, rows)))    # an empty line is no row
    source = Mixture(str(tmp_path / "mixture.json"))
    kinds = {i: type(error) for i, error in source.skipped}
    assert kinds == {540: InputError, 541: InputError, 543: TooLong}
    assert [len(rows) for rows in source.usable] == [500, 40, 2, 70]
    times = np.bincount(source.draw(300, 0, 0), minlength=len(source))
    assert times[540:545].tolist() == [0, 0, 4, 0, 4]


def test_group_without_a_usable_row_leaves_its_share(mixture, tmp_path):
    jsonl(tmp_path / "c.jsonl", 1, audio="none.wav", seconds=None)
    again = Mixture(str(tmp_path / "mixture.json"))
    assert again.counts(240).tolist() == [100, 80, 0, 60]


def test_allot_sums_to_n_and_keeps_caps_and_proportions():
    rng = np.random.default_rng(0)
    for _ in range(300):
        k = rng.integers(1, 8)
        weights = rng.uniform(0.01, 5, k)
        caps = rng.integers(0, 60, k)
        n = int(rng.integers(0, 200))
        counts = allot(n, weights, caps)
        assert counts.sum() == min(n, caps.sum())
        assert (0 <= counts).all() and (counts <= caps).all()
        free = counts < caps    # those that are not full got the same for their weight, within one
        if free.sum() > 1:
            each = counts[free] / weights[free]
            assert each.max() - each.min() <= (1 / weights[free]).max() + 1e-9


def test_check_prints_each_source_and_what_a_stage_draws(mixture, capsys):
    assert data.check(SimpleNamespace(path=mixture.path, quick=True)) is False
    text = capsys.readouterr().out
    assert "910 rows" in text and "a stage of 600 rows" in text and "0 would be skipped" in text
    line, = [line for line in text.splitlines() if "deep/b.jsonl" in line]
    assert line.split()[:5] == ["40", "0.1", "13.33%", "80", "2.00"]
    assert line.endswith(", no more by its max_epochs")


def test_check_names_what_would_be_skipped(tmp_path, capsys):
    path = jsonl(tmp_path / "few.jsonl", 25)
    assert data.check(SimpleNamespace(path=path, quick=False)) is True
    text = capsys.readouterr().out
    assert "25 would be skipped" in text
    assert "row 19: no file" in text and "few.jsonl: 5 more" in text


def test_check_finds_what_training_skips(tiny, tmp_path):
    wav(tmp_path, "good.wav", noise(1.0).numpy())
    wav(tmp_path, "nan.wav", np.full(16000, np.nan), subtype="FLOAT")
    wav(tmp_path, "odd.wav", noise(1.0).numpy(), 44099)
    cut_in_half(wav(tmp_path, "cut.wav", noise(1.0).numpy()))
    write(tmp_path / "x.raw", b"\0" * 32000)
    row = {"prompt": "?", "response": "x"}
    names = ("good", "nan", "odd", "cut", "none", "good")
    rows = [row | {"audio": f"{name}.wav"} for name in names]
    rows += [row | {"audio": "x.raw"}, row | {"audio": "cut.wav", "seconds": 1}]
    rows += [row | {"audio": "good.wav", **more} for more in (
        {"start": -1}, {"start": 2}, {"end": 0.01}, {"start": 0.5, "end": 999}, {"seconds": 121},
        {"seconds": 0.01}, {"prompt": f"a {THINK}"}, {"response": "<sound>"})]
    rows += [{"prompt": "<|AU", "response": "DIO|>"}, row, row | {"response": THINK_END}]
    source = Manifest(write_lines(tmp_path / "rows.jsonl", rows))

    skipped = {i for i, _ in source.skipped}
    rates = {expert.sample_rate for expert in EXPERTS.values()}
    for i in set(range(len(rows))) - skipped:
        _, errors = data.collate_step([Rows(source)[i]], tiny.spec, rates)
        skipped |= {i for _ in errors}
    found = {i: str(error) for i, error in data.would_skip(source, quick=False)}
    of_another_backbone = {i for i, text in found.items() if text.startswith("with audio-flamingo")}
    assert {i for i in found if "<sound>" in found[i]} == of_another_backbone == {15}
    assert found.keys() - of_another_backbone == skipped == set(range(19)) - {0, 5, 11, 15, 17}
    assert all("\n" not in text for text in found.values())
    assert all(f"with {', '.join(BACKBONES)}: the" in found[i] for i in (14, 18))
    assert "with qwen2-audio, qwen2.5-omni, small, tiny: the" in found[16]
    quick = {i for i, _ in data.would_skip(source, quick=True)}
    assert found.keys() - quick == {1, 2, 7}    # what only decoding tells


def test_digest_of_rows_holds_the_sizes_of_their_files_and_no_times(tmp_path):
    path = manifest(tmp_path, [1.0, 1.0])
    before = data.fingerprint(Manifest(path))
    os.utime(tmp_path / "0.wav", (0, 0))
    assert data.fingerprint(Manifest(path)) == before
    wav(tmp_path, "0.wav", noise(1.0).numpy(), subtype="PCM_24")    # as long
    assert data.fingerprint(Manifest(path)) != before


# --------------------------------------------------------------------------------------------------
# data.py: converters

# Name; files as its makers lay them out (of audio the name alone); splits; task; the rows wanted:
# audio, response, what else they hold, where a prompt is the row's own question; what is told.
LIBRISPEECH = "dev-clean/84/121123/84-121123"
LIBRISQA = "LibriSpeech/train-clean-360/100/121669/100-121669-0000.flac"
LIBRISQA_ROW = {"speech_path": "train-clean-360/100/121669/100-121669-0000.wav", "text": "TOM",
                "duration": 15.65}
VOXPOPULI = "20180613-0900-PLENARY-12-en_20180613-17:14:36_4"
COMMON_VOICE = {
    "clips/common_voice_en_1.mp3": "",
    "clips/common_voice_en_2.mp3": "",
    "train.tsv": "client_id\tpath\tsentence\tup_votes\n"
                 'x\tcommon_voice_en_1.mp3\t"Well, é," he said.\t2\n'
                 "y\tcommon_voice_en_2.mp3\t \t2\n",
}
DURATIONS = {"clip_durations.tsv": "clip\tduration[ms]\ncommon_voice_en_1.mp3\t3456\n"}


def gigaspeech(*segments):
    """GigaSpeech.json, with (text, begin, subsets) of the segments of a file."""
    audio = {"aid": "POD1", "path": "audio/podcast/POD1.opus", "segments": []}
    for text, begin, subsets in segments:
        audio["segments"].append({
            "text_tn": text, "begin_time": begin, "end_time": begin + 2.5, "subsets": subsets})
    return json.dumps({"dataset": "GigaSpeech", "audios": [audio]})


GIGASPEECH = {
    "audio/podcast/POD1.opus": "",
    "GigaSpeech.json": gigaspeech(
        ("AS THEY'RE LEAVING <COMMA> CAN YOU <QUESTIONMARK>", 1.0, ["{XL}", "{L}"]),
        ("<MUSIC>", 4, ["{XL}"]), ("<NOISE> <PERIOD>", 5, ["{XL}"]),
        ("YES <EXCLAMATIONPOINT> <OTHER> NO <PERIOD>", 7.25, ["{XL}"]), ("TEST", 9, ["{TEST}"])),
}
GIGASPEECH_ROWS = [
    ("audio/podcast/POD1.opus", "as they're leaving, can you?",
     {"start": 1.0, "end": 3.5, "seconds": 2.5}),
    ("audio/podcast/POD1.opus", "yes! no.", {"start": 7.25, "end": 9.75, "seconds": 2.5}),
]
CONVERTERS = [
    ("librispeech", {
        f"{LIBRISPEECH}-0000.flac": "",
        f"{LIBRISPEECH}-0001.flac": "",
        f"{LIBRISPEECH}.trans.txt": "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n"
                                    "84-121123-0002 GONE\n",
    }, ["dev-clean"], "asr", [
        (f"{LIBRISPEECH}-0000.flac", "go do you hear", {}),
        (f"{LIBRISPEECH}-0001.flac", "but in less", {}),
    ], "1 left out, 1 no audio file"),
    ("common_voice", COMMON_VOICE, None, "asr", [
        ("clips/common_voice_en_1.mp3", '"Well, é," he said.', {}),
    ], "1 left out, 1 empty text"),
    ("common_voice", COMMON_VOICE | DURATIONS, None, "asr", [
        ("clips/common_voice_en_1.mp3", '"Well, é," he said.', {"seconds": 3.456}),
    ], "1 left out, 1 empty text"),
    ("gigaspeech", GIGASPEECH, None, "asr", GIGASPEECH_ROWS, "2 left out, 2 nothing but tags"),
    ("gigaspeech", GIGASPEECH, ["L"], "asr", GIGASPEECH_ROWS[:1], "0 left out"),
    ("voxpopuli", {
        f"transcribed_data/en/2018/{VOXPOPULI}.ogg": "",
        "transcribed_data/en/asr_train.tsv":
            "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender\n"
            f'{VOXPOPULI}\tSo, "we" agree.\tso "we agree\t1\ttrain\tfemale\n',
    }, None, "asr", [
        (f"transcribed_data/en/2018/{VOXPOPULI}.ogg", 'so "we agree', {}),
    ], "0 left out"),
    *[("spgispeech", {
        f"{folder}/13aa/12.wav": "",
        "train.csv": "wav_filename|wav_filesize|transcript\n"
                     '13aa/12.wav|333164|Daniel, how "do we think?\n',
    }, None, "asr", [(f"{folder}/13aa/12.wav", 'Daniel, how "do we think?', {"seconds": 10.41})],
        "0 left out") for folder in ("train", "spgispeech/train")],
    ("audiocaps", {
        "train/91139.ogg": "",
        "train/UDGBjjwyaqE_20.wav": "",
        "train.csv": "audiocap_id,youtube_id,start_time,caption\n"
                     '91139,r1nicOVtvkQ,130,"A woman talks, water pours"\n'
                     "58146,UDGBjjwyaqE,20,Clanging\n1,gone,0,Gone\n",
    }, None, "caption", [
        ("train/91139.ogg", "A woman talks, water pours", {}),
        ("train/UDGBjjwyaqE_20.wav", "Clanging", {}),
    ], "1 left out, 1 no audio file"),
    ("clotho", {
        "development/Señal 1.wav": "",
        "clotho_captions_development.csv":
            "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
            'Señal 1.wav,"One, two.",Two.,Three.,Four.,Five.\n'.encode("latin-1"),
    }, None, "caption", [("development/Señal 1.wav", caption, {})
                         for caption in ("One, two.", "Two.", "Three.", "Four.", "Five.")],
        "0 left out"),
    ("clotho_aqa", {
        "audio_files/rain.wav": "",
        "clotho_aqa_train.csv":
            "file_name,QuestionText,answer,confidence\nrain.wav,Is {it} raining?,yes,yes\n",
    }, None, "qa", [("audio_files/rain.wav", "yes", {"prompt": "Is {it} raining?"})], "0 left out"),
    ("librisqa", {
        LIBRISQA: "",
        "LibriSQA-PartI/LibriSQA-PartI-train.json": json.dumps([
            LIBRISQA_ROW | {"question": "Who?", "answer": "Tom."}]),
        "LibriSQA-PartII/LibriSQA-PartII-train.json": json.dumps([
            LIBRISQA_ROW | {"answer": "B", "question_and_option":
                            "Who is A. Tom?\nA. A son B. A king\nC) None D: All of the above"},
            LIBRISQA_ROW | {"answer": "B", "question_and_option": "What?"}]),
    }, None, "qa", [
        (LIBRISQA, "Tom.", {"prompt": "Who?", "seconds": 15.65}),
        (LIBRISQA, "B. A king", {
            "prompt": "Who is A. Tom? A. A son B. A king C. None D. All of the above",
            "choices": ["A son", "A king", "None", "All of the above"],
            "task": "mcq", "seconds": 15.65}),
    ], "1 left out, 1 without options A to D and the letter of one"),
    *[("musicbench", {
        f"{folder}data_aug2/-0SdAVK79lg_1.wav": "",
        "MusicBench_train.json": '{"dataset": "MusicBench", "main_caption": "A guitar {solo}.", '
                                 '"location": "data_aug2/-0SdAVK79lg_1.wav"}\n',
    }, None, "music", [(f"{folder}data_aug2/-0SdAVK79lg_1.wav", "A guitar {solo}.", {})],
        "0 left out") for folder in ("datashare/", "")],
    ("wildjailbreak", {
        "train/train.tsv":
            "vanilla\tadversarial\tcompletion\tdata_type\n"
            'How do I kill a process?\t\t"Use ""kill"".\nThen wait."\tvanilla_benign\n'
            "plain\tImagine {x}\tNo.\tadversarial_harmful\n",
    }, None, "text", [
        (None, 'Use "kill".\nThen wait.', {"prompt": "How do I kill a process?"}),
        (None, "No.", {"prompt": "Imagine {x}"}),
    ], "0 left out"),
]


LETTER_ONLY = "\nAnswer with the option's letter from the given choices directly."
MMAU = {"id": "3fe64f3d", "audio_id": "./test-mini-audios/3fe64f3d.wav",
        "question": "Based on the given audio, identify the source of the speaking voice.",
        "choices": ["Man", "Woman", "Child", "Robot"], "answer": "Woman", "dataset": "AudioSet",
        "task": "sound", "split": "test-mini", "category": "Reasoning",
        "sub-category": "Acoustic Source Inference", "difficulty": "medium"}
MMAU_ROW = {"prompt": f"{MMAU['question']}\nA. Man\nB. Woman\nC. Child\nD. Robot" + LETTER_ONLY,
            "choices": MMAU["choices"], "id": "3fe64f3d", "audio_id": MMAU["audio_id"],
            "dataset": "AudioSet", "task_": "sound",
            "split": "test-mini", "category": "Reasoning",
            "sub-category": "Acoustic Source Inference", "difficulty": "medium"}
MMAR = {"id": "id1", "audio_path": "./audio/id1.wav", "question": "Which accent?",
        "choices": ["British", "American"], "answer": "American", "modality": "speech",
        "category": "Signal Layer", "sub-category": "Accent", "language": "en", "source": "youtube",
        "url": "https://example.com", "timestamp": "00:11:10,00:11:30"}
MMAR_ROW = {"prompt": "Listen to the audio and answer the following multiple-choice question. "
                      "Respond with only the letter (A, B, C, or D) of the correct option.\n"
                      "Which accent?\nA. British\nB. American\nThe best answer is:",
            **{key: MMAR[key] for key in MMAR if key not in ("question", "answer")}}
MMSU = {"id": "s1", "task_name": "accent", "question": "Who?", "choice_a": "one", "choice_b": 2,
        "choice_c": "three", "choice_d": "four", "answer_gt": "2", "category": "Perception",
        "sub-category": "Phonology", "audio_path": "audio/s1.wav"}
MMSU_ROW = {"prompt": "Listen to the audio and answer the following question.\n\nQuestion: Who?\n\n"
                      "A. one\nB. 2\nC. three\nD. four\n\n"
                      "Answer with the letter (A, B, C, or D) only.",
            "choices": ["one", "2", "three", "four"], "id": "s1", "task_name": "accent",
            "category": "Perception", "sub-category": "Phonology", "audio_path": "audio/s1.wav"}


def air_bench(task, dataset, **more):
    """An item of Foundation_meta.json."""
    return {"path": "1.wav", "question": "Which?", "choice_a": "yes", "choice_b": "no",
            "choice_c": None, "choice_d": None, "answer_gt": "no", "task_name": task,
            "dataset_name": dataset, "uniq_id": 7} | more


AIR_BENCH = {
    "Spoken_Language_Identification_covost2/1.wav": "",
    "Audio_Grounding_AudioGrounding/1.flac": "",    # named wav
    "Music_AQA_music_avqa/1.wav": "",
    "Foundation_meta.json": json.dumps([
        air_bench("Spoken_Language_Identification", "covost2"),
        air_bench("Audio_Grounding", "AudioGrounding"), air_bench("Music_AQA", "music_avqa"),
        air_bench("Music_AQA", "music_avqa", path="2.wav"),
        air_bench("vocal_sound_classification", "VocalSound", answer_gt="perhaps")]),
}
AIR_BENCH_ROWS = []
for audio, task, dataset in (
        ("1.wav", "Spoken_Language_Identification", "covost2"),
        ("1.flac", "Audio_Grounding", "AudioGrounding"), ("1.wav", "Music_AQA", "music_avqa")):
    AIR_BENCH_ROWS.append((f"{task}_{dataset}/{audio}", "B. no", {
        "prompt": "Which?\nA. yes\nB. no\n" + LETTER_ONLY, "choices": ["yes", "no"],
        "path": "1.wav", "task_name": task, "dataset_name": dataset, "uniq_id": 7}))
STM = """;; "O" "Overall" "Overall"
sw_4390 A sw_4390_A 0.00 3.10 <O,sw,M,sw-M> IGNORE_TIME_SEGMENT_IN_SCORING
sw_4390 A sw_4390_A 3.10 5.35 <O,sw,M,sw-M> (%HESITATION) WELL I (TH-) THINK <B_ASIDE> SO
sw_4390 B inter_segment_gap 0.00 5.35 <O,sw,F,sw-F>
en_4156 B en_4156_B 357.64 359.64 <O,en,F,en-F>  HE IS A POLICE OFFICER
"""
SWITCHBOARD = {"reference/hub5e00.english.000405.stm": STM, "wav/sw_4390-A.wav": "",
               "wav/sw_4390-B.wav": "", "wav/en_4156-B.wav": ""}
SWITCHBOARD_ROWS = [
    ("wav/sw_4390-A.wav", "well i think so",
     {"start": 3.1, "end": 5.35, "seconds": 2.25, "speaker": "sw_4390_A"}),
    ("wav/en_4156-B.wav", "he is a police officer",
     {"start": 357.64, "end": 359.64, "seconds": 2.0, "speaker": "en_4156_B"}),
]
MORE_CONVERTERS = [
    ("switchboard", SWITCHBOARD, None, "asr", SWITCHBOARD_ROWS,
     "2 left out, 1 not to be scored, 1 empty text"),
    ("switchboard", SWITCHBOARD, ["callhome"], "asr", SWITCHBOARD_ROWS[1:], "0 left out"),
    ("audiocaps_qa", {
        "test/91139.wav": "",
        "test.csv": "audiocap_id,youtube_id,start_time,caption\n91139,x,1,Rain\n",
    }, ["test"], "qa", [("test/91139.wav", "Rain", {
        "prompt": "Answer the question about the audio. What is happening?"})],
        "0 left out"),
    ("wavcaps", {
        "SoundBible_flac/2219.flac": "", "AudioSet_SL_flac/Yb0RFKhbpFJA.flac": "",
        "json_files/SoundBible/sb_final.json": json.dumps({"num_captions_per_audio": 1, "data": [
            {"id": "2219", "caption": "An airplane is landing.", "duration": 14.1424375},
            {"id": "2218", "caption": "A bell.", "duration": 1.5},
            {"id": "2219", "caption": "Nothing.", "duration": 0.0}]}),
        "json_files/AudioSet_SL/as_final.json": json.dumps({"data": [
            {"id": "Yb0RFKhbpFJA.wav", "caption": "Wind.", "duration": 10.0}]}, indent=1),
    }, ["AudioSet_SL", "SoundBible"], "caption", [
        ("AudioSet_SL_flac/Yb0RFKhbpFJA.flac", "Wind.", {"seconds": 10.0}),
        ("SoundBible_flac/2219.flac", "An airplane is landing.", {"seconds": 14.142}),
    ], "2 left out, 1 no audio file, 1 of 0 s"),
    ("wavcaps_test", {
        "clips/0.wav": "", "test.jsonl": json.dumps(
            {"context": "clips/0.wav", "instruction": "Please {describe} it.", "answer": "Rain."}),
    }, None, "caption", [("clips/0.wav", "Rain.", {"prompt": "Please {describe} it."})],
        "0 left out"),
    ("librisqa_part1", {
        LIBRISQA: "", "LibriSQA-PartI/LibriSQA-PartI-train.json": json.dumps([
            LIBRISQA_ROW | {"question": "Who?", "answer": "Tom."}]),
    }, None, "qa", [(LIBRISQA, "Tom.", {"prompt": "Who?", "seconds": 15.65})], "0 left out"),
    ("librisqa_part2", {
        LIBRISQA: "", "LibriSQA-PartII/LibriSQA-PartII-train.json": json.dumps([
            LIBRISQA_ROW | {"answer": "A", "question_and_option": "Who? A. x B. y C. z D. w"}]),
    }, None, "mcq", [(LIBRISQA, "A. x", {
        "prompt": "Who? A. x B. y C. z D. w", "choices": list("xyzw"), "seconds": 15.65})],
        "0 left out"),
    ("mmau", {
        "test-mini-audios/3fe64f3d.wav": "",
        "mmau-test-mini.json": json.dumps([
            MMAU, MMAU | {"answer": "Ghost"}, MMAU | {"audio_id": "./gone.wav"},
            MMAU | {"choices": ["Man"]}, MMAU | {"choices": "[1"}, MMAU | {"question": None}],
            indent=2),
    }, None, "mcq", [("test-mini-audios/3fe64f3d.wav", "B. Woman", MMAU_ROW)],
        "5 left out, 1 with an answer that is none of the choices, 1 no audio file, "
        "1 with 1 choices, 1 with choices that are no list, 1 empty text"),
    ("mmar", {
        "audio/id1.wav": "", "MMAR-meta.json": json.dumps([
            MMAR, MMAR | {"choices": "['British', 'American']", "answer": " American "}]),
    }, None, "mcq", [("audio/id1.wav", "B. American", MMAR_ROW)] * 2, "0 left out"),
    ("mmsu", {
        "audio/s1.wav": "", "question/mmsu.jsonl":
            f"{json.dumps(MMSU)}\n{json.dumps(MMSU | {'answer_gt': 'D'})}\n",
    }, None, "mcq", [("audio/s1.wav", "B. 2", MMSU_ROW), ("audio/s1.wav", "D. four", MMSU_ROW)],
        "0 left out"),
    ("air_bench", AIR_BENCH, None, "mcq", AIR_BENCH_ROWS,
     "2 left out, 1 with an answer that is none of the choices, 1 no audio file"),
    *[("air_bench", {f"Foundation/{name}": text for name, text in AIR_BENCH.items()}, [split],
       "mcq", [(f"Foundation/{audio}", response, more)], told)
      for split, (audio, response, more), told in zip(
          ("speech", "sound", "music"), AIR_BENCH_ROWS,
          ("0 left out", "1 left out, 1 with an answer that is none of the choices",
           "1 left out, 1 no audio file"))],
    ("alpaca_audio", {
        "clips/0.wav": "", "test.jsonl": json.dumps(
            {"context": "clips/0.wav", "instruction": "Obey.", "speech_instruction": "Name {one}.",
             "answer": "Mars."}),
    }, None, "spoken_instruction", [("clips/0.wav", "Mars.", {
        "prompt": "Please give a detail answer to the question in the audio.",
        "question": "Name {one}."})], "0 left out"),
    ("gsqa", {
        "0.wav": "", "train.jsonl": json.dumps(
            {"instruction": "Name a", "input": "planet", "output": "Mars.", "input_audio": "0.wav",
             "speech_input": "Name a planet."}),
    }, None, "spoken_instruction", [("0.wav", "Mars.", {"question": "Name a planet."})],
        "0 left out"),
]


CONVERTERS += MORE_CONVERTERS


# --------------------------------------------------------------------------------------------------
# data.py: tones

def test_semitones_are_a_source_by_name_alone():
    assert {row["task"] for row in map(open_source("tones::7").load, range(42))} == set(
        data.TONES) - {"semitone"}
    row = open_source("tones:semitone").load(0)
    assert row["prompt"] == "Which pitch class?" and len(row["choices"]) == 12
    for answer in row["choices"]:    # "C" is no "C#", and "B" is no letter
        assert infer.parse_choice(answer, row["choices"]) == answer


# --------------------------------------------------------------------------------------------------
# data.py: mixtures

def test_group_may_draw_its_sources_by_size(mixture, tmp_path):
    text = MIXTURE.replace('"share": 3,', '"share": 3, "draw": "by size",')
    source = Mixture(write(tmp_path / "by_size.json", text))
    # 500 : 40 rows of 60 and of 300, then the second at its cap of 80 and the first of 3560 - 80
    assert source.counts(120).tolist() == [56, 4, 40, 20]
    assert source.counts(600).tolist() == [278, 22, 200, 100]
    assert source.counts(3560).tolist() == mixture.counts(3560).tolist()
    assert "\n".join(source.report(600)).count("\n") == "\n".join(mixture.report(600)).count("\n")
    uniform = MIXTURE.replace('"share": 3,', '"share": 3, "draw": "uniform",')
    again = Mixture(write(tmp_path / "uniform.json", uniform))
    assert np.array_equal(again.draw(600, 3, 1), mixture.draw(600, 3, 1))


def test_group_by_size_without_a_usable_row_leaves_its_share(mixture, tmp_path):
    jsonl(tmp_path / "c.jsonl", 1, audio="none.wav", seconds=None)
    text = MIXTURE.replace('"share"', '"draw": "by size", "share"')
    source = Mixture(write(tmp_path / "by_size.json", text))
    assert source.counts(240).tolist() == [167, 13, 0, 60]


@pytest.mark.parametrize("draw", ['"alike"', "[]", "null", "1"])
def test_unknown_draw_is_refused_in_one_line(mixture, tmp_path, draw):
    bad = write(tmp_path / "bad.json", MIXTURE.replace('"share": 2', f'"share": 2, "draw": {draw}'))
    with pytest.raises(InputError, match='"draw" of caption is neither') as error:
        Mixture(bad)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# data.py: converters

@pytest.mark.parametrize("name, files, splits, task, wanted, told", CONVERTERS)
def test_converter_reads_the_layout_of_its_corpus(
        tmp_path, capsys, name, files, splits, task, wanted, told):
    root = tmp_path / "corpus"
    lay_out(root, files)
    rows, counts = convert(capsys, name, root, splits)
    for row, (audio, response, more) in zip(rows, wanted, strict=True):
        question = more.get("prompt", "")
        prompts = [wording.format(question).strip() for wording in data.WORDINGS[row["task"]]]
        assert row["prompt"] in [*prompts, question]
        audio = audio and str(root / audio)
        want = {"audio": audio, "response": response, "task": task} | more
        assert row == want | {"prompt": row["prompt"]}
    assert counts == f"{name}: {len(wanted)} rows, {told}"


def assert_choices(rows, answers, choices):
    for row, answer in zip(rows, answers, strict=True):
        lettered = [f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", row["choices"])]
        assert sorted(row["choices"]) == sorted(choices)
        assert row["response"] == lettered[row["choices"].index(answer)]
        assert row["prompt"].endswith(("? " + " ".join(lettered), "voice. " + " ".join(lettered)))
        assert row["task"] == "mcq"


@pytest.mark.parametrize("given, choices", [
    (["a", None, ""], ["a"]), ([1, 2.5], ["1", "2.5"]), ("a| b |c", ["a", "b", "c"]),
    ('["a", "b"]', ["a", "b"]), ("['it\\'s', 'b']", ["it's", "b"]),
    (["A. yes", "B. no"], ["yes", "no"]), (["(A) yes", "(B) no"], ["yes", "no"]),
    ({"A": "yes", "B": "no", "C": None}, ["yes", "no"]), (["A. yes", "C. no"], ["A. yes", "C. no"]),
    (["A.M.", "P.M."], ["A.M.", "P.M."]), (["A: x", "B: y", None], ["x", "y"])])
def test_choices_are_read_however_they_are_written(given, choices):
    assert data.read_choices(given) == choices


@pytest.mark.parametrize("given, words", [
    ("[1", "no list"), (["a", "", "b"], "empty choice"), (["A. x", "B.", "C. y"], "empty choice")])
def test_choices_that_cannot_be_read_leave_the_row_out(given, words):
    with pytest.raises(data.LeftOut, match=words):
        data.read_choices(given)


@pytest.mark.parametrize("answer, number", [
    ("no", 1), ("No", 1), ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("B. no", 1), ("(b) No", 1),
    ("0", 0), ("2", 2), ("3", None), ("D", None), ("B. yes", None), ("none", None), ("", None)])
def test_answer_is_a_text_a_letter_or_an_index(answer, number):
    assert data.find_choice(answer, ["yes", "no", "perhaps"]) == number


def test_text_of_a_choice_goes_before_letters_and_indices():
    assert data.find_choice("1", ["2", "1", "0"]) == 1
    assert data.find_choice("A", ["C", "B", "A"]) == 2


@pytest.mark.parametrize("name", ["t.csv", "t.json", "t.jsonl"])
def test_any_table_may_have_choices_and_keep_columns(tmp_path, capsys, name):
    items = [{"file": "1.wav", "q": "Why?", "a": "1", "c": "x|y", "id": "7"},
             {"file": "1.wav", "q": "Who?", "a": "z", "c": "['x', 'y']", "id": "8"},
             {"file": "1.wav", "q": "", "a": "x", "c": "x|y", "id": "9"}]
    text = json.dumps(items) if name == "t.json" else "\n".join(map(json.dumps, items))
    if name == "t.csv":
        text = "\n".join([",".join(items[0]),
                          *(",".join(f'"{cell}"' for cell in item.values()) for item in items)])
    lay_out(tmp_path / "t", {"1.wav": "", name: text})
    generic = "csv" if name == "t.csv" else "json"
    rows, counts = convert(capsys, generic, tmp_path / "t" / name, audio="file", prompt="q",
                           response="a", choices="c", keep=["id", "a"])
    assert rows == [{"audio": str(tmp_path / "t/1.wav"), "prompt": "Why? A. x B. y", "id": "7",
                     "response": "B. y", "task": "mcq", "choices": ["x", "y"], "a": "1"}]
    assert counts == (f"{generic}: 1 rows, 2 left out, 1 with an answer that is none of the "
                      "choices, 1 empty text")
    with pytest.raises(InputError, match="'speaker' in"):
        convert(capsys, generic, tmp_path / "t" / name, prompt="q", response="a", keep=["speaker"])


def test_choices_of_a_table_need_its_questions(table, capsys):
    with pytest.raises(InputError, match="--choices needs --prompt"):
        convert(capsys, "csv", table, choices="q", response="a")


@pytest.mark.parametrize("name", ["mmar", "mmsu", "gtzan", "muchomusic", "csv"])
def test_split_of_what_has_none_is_refused(table, capsys, name):
    with pytest.raises(InputError, match=f"{name} has no splits"):
        convert(capsys, name, table, ["test"], response="a", prompt="q")


def test_vocal_sounds_and_genres_are_asked_by_our_wordings(tmp_path, capsys):
    names = ["f0003_0_throatclearing", "m0004_1_cough", "f0005_0_sigh"]
    data_file = {"data": [{"wav": f"/data/sls/x/{name}.wav", "labels": "/m/x"} for name in names]}
    lay_out(tmp_path / "vs", {"datafiles/te.json": json.dumps(data_file, indent=1),
                              f"audio_44k/{names[0]}.wav": "", f"audio_16k/{names[1]}.wav": ""})
    rows, counts = convert(capsys, "vocalsound", tmp_path / "vs")
    assert_choices(rows, ["throat clearing", "cough"],
                   ["laughter", "sigh", "cough", "throat clearing", "sneeze", "sniff"])
    assert [row["speaker"] for row in rows] == ["f0003", "m0004"]
    assert counts == "vocalsound: 2 rows, 1 left out, 1 no audio file"

    for folder in ("genres", "genres_original"):
        lay_out(tmp_path / folder, {f"{folder}/rock/rock.00000.wav": "",
                                    f"{folder}/blues/blues.00001.au": ""})
        rows, counts = convert(capsys, "gtzan", tmp_path / folder)
        assert len(rows[0]["choices"]) == 10
        assert_choices(rows, ["blues", "rock"], rows[0]["choices"])


def test_iemocap_names_speaker_and_dialog_and_may_be_asked_without_choices(tmp_path, capsys):
    iemocap(tmp_path / "full", 1, ["neu", "exc", "xxx"])
    rows, _ = convert(capsys, "iemocap", tmp_path / "full")
    assert {(row["speaker"], row["recording"]) for row in rows} == {("Ses01F", "Ses01F_impro01")}
    open_rows, counts = convert(capsys, "iemocap_qa", tmp_path / "full")
    assert [row["response"] for row in open_rows] == ["neutral", "happy"]
    for row in open_rows:
        assert row["prompt"] in data.WORDINGS["emotion"]
        assert row["task"] == "qa" and "choices" not in row and row["speaker"] == "Ses01F"
    assert counts == "iemocap_qa: 2 rows, 1 left out, 1 of emotion xxx"


MUCHOMUSIC_HEADER = ("question,dataset,dataset_identifier,correct_answer,distractor_1_answer,"
                     "distractor_2_answer,distractor_3_answer,genre,music_knowledge,"
                     "music_reasoning\n")


def test_muchomusic_is_found_and_mixed_and_names_instrument_families(tmp_path, capsys):
    clip = "data/musiccaps/audio/[-0Gj8-vB1q4]-[30-40].wav"
    lines = [
        "What plays?,sdd,415600.json,A distorted guitar,Drums,A flute,Silence,Rock,"
        "\"['instrumentation', 'performance']\",[]\n",
        "What plays?,musiccaps,-0Gj8-vB1q4_3.json,Guitar and drums,a,b,c,,['instrumentation'],\n",
        "Which mood?,musiccaps,-0Gj8-vB1q4_3.json,A violin,a,b,c,,[],['mood and expression']\n",
        "What?,sdd,7.json,a,b,c,d,,[],[]\n"]
    lay_out(tmp_path / "m", {"data/muchomusic.csv": MUCHOMUSIC_HEADER + "".join(lines), clip: "",
                             "data/sdd/audio/00/415600.2min.mp3": ""})
    rows, counts = convert(capsys, "muchomusic", tmp_path / "m")
    assert [row.get("instrument_family") for row in rows] == ["plucked strings", None, None]
    assert rows[0]["audio"] == str(tmp_path / "m/data/sdd/audio/00/415600.2min.mp3")
    assert rows[1]["audio"] == str(tmp_path / "m" / clip)
    assert sorted(rows[0]["choices"]) == ["A distorted guitar", "A flute", "Drums", "Silence"]
    assert rows[0]["genre"] == "Rock" and rows[0]["dataset"] == "sdd"
    letter = "ABCD"[rows[0]["choices"].index("A distorted guitar")]
    assert rows[0]["response"] == f"{letter}. A distorted guitar"
    lettered = [f"{mark}. {choice}" for mark, choice in zip("ABCD", rows[0]["choices"])]
    assert rows[0]["prompt"] == "\n".join(["What plays?", *lettered]) + LETTER_ONLY
    assert counts == "muchomusic: 3 rows, 1 left out, 1 no audio file"


def test_right_answers_of_muchomusic_are_at_every_letter(tmp_path, capsys):
    lines = [f"What {i}?,sdd,100.json,right,b,c,d,,[],[]\n" for i in range(200)]
    lay_out(tmp_path / "m", {"data/muchomusic.csv": MUCHOMUSIC_HEADER + "".join(lines),
                             "data/sdd/audio/00/100.2min.mp3": ""})
    rows, _ = convert(capsys, "muchomusic", tmp_path / "m")
    letters = [row["response"][0] for row in rows]
    assert all(30 < letters.count(letter) < 70 for letter in "ABCD")


def test_pitch_class_is_the_one_with_most_notes(tmp_path, capsys):
    folder = tmp_path / "t"
    folder.mkdir()
    t = np.arange(32000) / 16000
    for name, hz in (("a.wav", 440), ("fis.wav", 185), ("low_c.wav", 65.4)):
        tone = sum(np.sin(2 * np.pi * k * hz * t) / k for k in (1, 2, 3))
        wav(folder, name, 0.2 * tone)
    wav(folder, "silent.wav", np.zeros(16000))
    write(folder / "broken.wav", "no sound")
    names = ["a.wav", "fis.wav", "low_c.wav", "silent.wav", "broken.wav"]
    write(folder / "t.csv", "file,a\n" + "".join(f"{name},x\n" for name in names))
    rows, counts = convert(capsys, "csv", folder / "t.csv", audio="file", response="a",
                           task="asr", pitch_class=True)
    assert [row["pitch_class"] for row in rows] == ["A", "F#", "C", None]
    assert counts == ("csv: 4 rows, 1 left out, 1 with a clip that cannot be used; "
                      "1 without a note")


def conversation(*texts, roles=("user", "assistant"), **more):
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return {"messages": turns} | more


def sharegpt(*texts, **more):
    turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), texts)]
    return {"conversations": turns} | more


AUDIO_PART = {"type": "audio", "path": "1.wav"}
TEXT_PART = {"type": "text", "text": "Why?"}


@pytest.mark.parametrize("item", [    # each asks Why? of 1.wav, and the answer is x
    conversation("<audio>Why?", "x", audios=["1.wav"]), conversation("Why? <audio>", "x",
                                                                     audio="1.wav"),
    conversation([AUDIO_PART, TEXT_PART], "x"),
    conversation([TEXT_PART, {"type": "audio", "audio_url": "1.wav"}], [TEXT_PART | {"text": "x"}]),
    conversation([{"type": "audio"}, TEXT_PART], "x", audios=["1.wav"]),
    sharegpt("<audio>Why?", "x", audios=["1.wav"]),
    {"query": "<audio>Why?", "response": "x", "audios": ["1.wav"], "history": []},
    {"instruction": "<audio>", "input": "Why?", "output": "x", "audios": ["1.wav"]},
    {"instruction": "Why?", "input": "", "output": "x", "audios": ["1.wav"]}])
def test_conversations_of_other_projects_become_rows(tmp_path, capsys, item):
    items = [item, conversation("Say yes.", "Yes.")]
    lay_out(tmp_path / "t", {"1.wav": "", "t.jsonl": "\n".join(map(json.dumps, items))})
    rows, counts = convert(capsys, "messages", tmp_path / "t/t.jsonl")
    assert rows == [
        {"audio": str(tmp_path / "t/1.wav"), "prompt": "Why?", "response": "x", "task": "qa"},
        {"audio": None, "prompt": "Say yes.", "response": "Yes.", "task": "qa"}]
    assert counts == "messages: 2 rows, 0 left out"


@pytest.mark.parametrize("item, reason", [
    (conversation("<audio>Why?", "x", audios=["1.wav", "1.wav"]), "with several clips"),
    (conversation([AUDIO_PART, AUDIO_PART], "x"), "with several clips"),
    (conversation("<audio>Why?", "x"), "with <audio> but no clip"),
    (conversation("<audio>Why?", "x", audios=["2.wav"]), "no audio file"),
    (conversation([{"type": "audio", "url": "https://x/1.wav"}], "x"), "no audio file"),
    (conversation("Why?", "x", audio={"array": [0]}), "with audio that is no path"),
    (conversation([{"type": "image", "path": "1.png"}], "x"),
     "with parts that are neither text nor audio"),
    *[(item, "not of one question and one answer") for item in (
        conversation("Be kind.", "Why?", roles=("system", "user")), conversation(None, "x"),
        conversation("Why?", "x") | {"system": "Be kind."}, {"messages": "Why?"},
        {"messages": ["Why?"]}, sharegpt("Why?"), {"instruction": 1, "output": 2},
        {"query": "Why?", "response": "x", "history": [["a", "b"]]})]])
def test_conversations_that_are_no_row_are_left_out_and_counted(tmp_path, capsys, item, reason):
    items = [item, conversation("Say yes.", "Yes.")]
    lay_out(tmp_path / "t", {"1.wav": "", "t.jsonl": "\n".join(map(json.dumps, items))})
    rows, counts = convert(capsys, "messages", tmp_path / "t/t.jsonl")
    assert len(rows) == 1 and counts == f"messages: 1 rows, 1 left out, 1 {reason}"


# --------------------------------------------------------------------------------------------------
# What goes wrong: data

@pytest.mark.parametrize("row", [
    conversation("Why?", "x", audios=["1.wav"]), {"conversations": [], "audios": []},
    {"query": "Why?", "response": "x"}, {"instruction": "Why?", "input": "", "output": "x"}])
def test_manifest_of_another_project_is_refused_with_the_keys_it_needs(tmp_path, row):
    path = write_lines(tmp_path / "rows.jsonl", [row])
    keys = ", ".join(sorted(row.keys() - {"response", "input"}))
    words = f'line 1: no "prompt" but {keys}; a row has "audio", "prompt", "response"'
    with pytest.raises(InputError, match=re.escape(words)) as error:
        Manifest(path)
    assert "convert messages FILE" in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Harness: files, rows, corpora

def convert(capsys, name, root, split=None, **flags):
    """[rows] and the line with the counts. What is written is read as a manifest, too."""
    flags = {"audio": None, "prompt": None, "response": "response", "task": "qa", "choices": None,
             "keep": [], "pitch_class": False} | flags
    capsys.readouterr()
    data.listing.cache_clear()    # files have come since the last conversion
    data.convert(SimpleNamespace(name=name, root=str(root), split=split, **flags))
    out, counts = capsys.readouterr()
    if out:
        Manifest(write(root.parent / "converted.jsonl", out))
    return [json.loads(line) for line in out.splitlines()], counts.strip()


def test_librispeech_is_found_in_the_folder_above(tmp_path, capsys):
    name, files, splits, *_ = CONVERTERS[0]
    lay_out(tmp_path / "LibriSpeech", files)
    below = convert(capsys, name, tmp_path / "LibriSpeech", splits)
    assert convert(capsys, name, tmp_path, splits) == below


def test_iemocap_has_four_emotions(tmp_path, capsys):
    iemocap(tmp_path / "full", 1, ["neu", "exc", "xxx", "fru"])
    rows, counts = convert(capsys, "iemocap", tmp_path / "full")
    assert_choices(rows, ["neutral", "happy"], ["angry", "happy", "sad", "neutral"])
    assert [row["seconds"] for row in rows] == [1.946, 1.946]
    place = "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    assert rows[0]["audio"] == str(tmp_path / "full" / place)
    assert counts == "iemocap: 2 rows, 2 left out, 1 of emotion xxx, 1 of emotion fru"


def test_session_5_of_iemocap_is_the_test(tmp_path, capsys):
    iemocap(tmp_path / "full", 1, ["neu"])
    iemocap(tmp_path / "full", 5, ["ang"])
    rows, _ = convert(capsys, "iemocap", tmp_path / "full", ["test"])
    assert_choices(rows, ["angry"], ["angry", "happy", "sad", "neutral"])


def test_letters_of_emotions_are_balanced_and_always_the_same(tmp_path, capsys):
    iemocap(tmp_path / "full", 1, ["hap"] * 400)
    rows, _ = convert(capsys, "iemocap", tmp_path / "full")
    letters = [row["response"][0] for row in rows]
    assert len(letters) == 400
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")
    assert {row["prompt"].split(" A. ")[0] for row in rows} == set(data.WORDINGS["emotion"])
    assert convert(capsys, "iemocap", tmp_path / "full")[0] == rows


@pytest.mark.parametrize("place", ["", "train/"])
def test_meld_wants_the_sound_of_its_videos(tmp_path, capsys, place):
    root = tmp_path / "MELD.Raw"
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID\n"
    text = header + '1,"So, it\x92s",Joey,surprise,positive,0,3\n2,No,Ross,joy,positive,1,0\n'
    lay_out(root, {f"{place}train_sent_emo.csv": text.encode("latin-1"),
                   f"{place}train_splits/dia0_utt3.mp4": ""})
    with pytest.raises(InputError, match="no rows in .*ffmpeg -i"):
        convert(capsys, "meld", root)
    lay_out(root, {f"{place}train_splits/dia0_utt3.wav": ""})
    rows, counts = convert(capsys, "meld", root)
    emotions = ["neutral", "joy", "sadness", "anger", "surprise", "fear", "disgust"]
    assert_choices(rows, ["surprise"], emotions)
    assert rows[0]["audio"].endswith("train_splits/dia0_utt3.wav")
    assert counts.endswith("1 left out, 1 no audio file")


@pytest.fixture
def table(tmp_path):
    text = "file name\tq\ta\tid\nx/1.wav\tWhy?\tBecause\t1\nx/2.wav\tWho?\tMe\t2\n"
    lay_out(tmp_path / "t", {"x/1.wav": "", "my.tsv": text})
    return tmp_path / "t" / "my.tsv"


def test_any_table_is_read_by_the_names_of_its_columns(table, capsys):
    rows, counts = convert(capsys, "csv", table, audio="file name", prompt="q", response="a",
                           task="music")
    audio = str(table.parent / "x/1.wav")
    assert rows == [{"audio": audio, "prompt": "Why?", "response": "Because", "task": "music"}]
    assert counts == "csv: 1 rows, 1 left out, 1 no audio file"


def test_table_without_prompts_gets_those_of_the_task(table, capsys):
    rows, _ = convert(capsys, "csv", table, audio="file name", response="a", task="caption")
    assert rows[0]["prompt"] in data.WORDINGS["caption"]


def test_table_without_audio_is_text(table, capsys):
    rows, _ = convert(capsys, "csv", table, prompt="q", response="a", task="text")
    assert rows[1] == {"audio": None, "prompt": "Who?", "response": "Me", "task": "text"}


def test_columns_of_a_table_are_taken_by_their_literal_names(tmp_path, capsys):
    lay_out(tmp_path / "t", {"1.wav": "", "2.wav": "", "t.csv": (
        "wav,wav.path,a[0],{q},a,wave\n1.wav,2.wav,zero,Why?,abc,9\n")})
    rows, counts = convert(capsys, "csv", tmp_path / "t/t.csv", audio="wav.path", prompt="{q}",
                           response="a[0]", keep=["a", "wave"])
    assert rows == [{"audio": str(tmp_path / "t/2.wav"), "prompt": "Why?", "response": "zero",
                     "task": "qa", "a": "abc", "wave_": "9"}]
    assert counts == "csv: 1 rows, 0 left out"


@pytest.mark.parametrize("flags", [{}, {"audio": "file"}, {"task": "asr"}, {"task": "text"},
                                   {"audio": "file", "task": "mcq"}])
def test_table_that_would_give_no_prompt_is_refused(tmp_path, capsys, flags):
    lay_out(tmp_path / "t", {"1.wav": "", "t.csv": "file,a\n1.wav,x\n"})
    with pytest.raises(InputError, match="give --prompt, the column with the questions; or"):
        convert(capsys, "csv", tmp_path / "t/t.csv", response="a", **flags)


def test_rows_that_are_no_texts_are_left_out_and_counted(tmp_path, capsys):
    lay_out(tmp_path / "t", {"t.csv": 'q,a\nWhy?,Hello, world\nWhy?,"Hello, world"\n'})
    rows, counts = convert(capsys, "csv", tmp_path / "t/t.csv", prompt="q", response="a")
    assert [row["response"] for row in rows] == ["Hello, world"]
    assert counts == ("csv: 1 rows, 1 left out, 1 with more cells than columns (quote text with "
                      "commas)")
    items = [{"q": "?", "a": a} for a in (["x"], {"b": "c"}, 3, "\ud800", "long " * 30000)]
    write_lines(tmp_path / "t/t.jsonl", items)
    rows, counts = convert(capsys, "json", tmp_path / "t/t.jsonl", prompt="q", response="a")
    assert [row["response"] for row in rows] == ["3"]
    assert "2 with a list or an object where a text belongs" in counts
    assert "1 with half a character" in counts
    assert "1 that training would refuse: more than 100000 bytes" in counts


@pytest.mark.parametrize("name", ["csv", "json", "messages"])
@pytest.mark.parametrize("path", [".", "/dev/full", "none.csv"])
def test_table_that_is_no_file_is_refused(capsys, name, path):
    with pytest.raises(InputError, match=f"no file '{re.escape(path)}'"):
        convert(capsys, name, Path(path), prompt="q")


def test_wordings_vary_and_do_not_depend_on_the_folder(tmp_path, capsys):
    prompts = []
    for folder in ("a", "b"):
        files = {f"{i}.wav": "" for i in range(50)}
        table = "file,text\n" + "".join(f"{name},x\n" for name in files)
        lay_out(tmp_path / folder, files | {"t.csv": table})
        rows, _ = convert(capsys, "csv", tmp_path / folder / "t.csv", audio="file", response="text",
                          task="asr")
        prompts.append([row["prompt"] for row in rows])
    assert prompts[0] == prompts[1]
    assert set(prompts[0]) == set(data.WORDINGS["asr"]) and len(prompts[0]) == 50


# --------------------------------------------------------------------------------------------------
# train.py

def test_training_learns_to_hear_and_another_clip_brings_it_back_to_chance(trained):
    for result in trained.heldout.values():
        assert deviations(result["heard"], result["chance"]) > 3, result
        assert deviations(result["other_clip"], result["chance"]) < 3, result
    ce = logged(trained.folder, "ce")
    assert np.mean(ce[-10:]) < np.mean(ce[:3]) / 3


def test_command_that_training_ends_with_works(trained):
    command = re.search("python infer.py (ask .*)", trained.printed)[1]
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
    text = jsonl(tmp_path / "text.jsonl", 4, audio=None, seconds=None)
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


def test_no_clip_is_calibrated_on_twice(short_run, monkeypatch):
    def watched(self, task, clips):
        seen.append(len(clips))
        calibrate(self, task, clips)

    seen = []
    calibrate = heads.ExpertHeads.calibrate
    monkeypatch.setattr(heads.ExpertHeads, "calibrate", watched)
    run("train.py", *short_run, "--calibrate", 8, "--out", "new")    # 8 rows of 3 clips
    assert seen == [3]


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


def test_merged_folder_and_score_say_what_ask_says(answers, three_notes, trained, merged, tmp_path):
    assert answers[trained.folder] == answers[merged] != [""] * 3
    for name, said in answers.items():
        out = tmp_path / name.name
        run("infer.py", "score", name, three_notes / "rows.jsonl", "--out", out, "--workers", 0,
            "--max-new-tokens", 20)
        assert [line["answer"] for line in predictions(out)] == said


def test_the_model_cards_lines_without_our_code_say_what_ask_says(answers, three_notes, merged):
    for i in range(3):
        said = run_card(merged, three_notes / f"{i}.wav", "Which note?")
        assert said == 2 * (answers[merged][i] + "\n")    # by generate, and by a pipeline


def test_merge_refuses_a_folder_that_is_there_and_leaves_none_where_it_fails(
        trained, merged, tmp_path):
    assert "there already" in run("infer.py", "merge", trained.folder, merged, fails=True)
    with unittest.mock.patch.object(model.CoAT, "save", side_effect=OSError(28, "No space")):
        assert "No space" in run("infer.py", "merge", trained.folder, tmp_path / "x", fails=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("batch", [1, 4])
def test_ask_on_a_manifest_says_what_score_says(trained, three_notes, answers, tmp_path, batch):
    rows = [{"audio": str(three_notes / f"{i % 3}.wav"), "prompt": "Which note?"} for i in range(5)]
    path = write_lines(tmp_path / "rows.jsonl", rows)    # without a response
    printed = asked(trained.folder, path, "--json", "--batch", batch)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["answer"] for line in lines] == [answers[trained.folder][i % 3] for i in range(5)]
    assert [line["audio"] for line in lines] == [row["audio"] for row in rows]
    assert [line["row"] for line in lines] == list(range(5))


def test_folder_is_its_clips_in_order(trained, three_notes, answers):
    printed = asked(trained.folder, three_notes, "Which note?")    # rows.jsonl is left out
    said = [f"{three_notes / f'{i}.wav'}: {answers[trained.folder][i]}" for i in range(3)]
    assert printed.splitlines() == said


def test_clip_that_cannot_be_read_is_named_and_the_others_are_answered(
        trained, three_notes, answers, bad_clips, capfd):
    clips = [bad_clips["text.wav"], three_notes / "0.wav", bad_clips["nan.wav"]]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        printed = run("infer.py", "ask", trained.folder, *clips, "Which note?", "--workers", 0,
                      "--max-new-tokens", 20, errors=errors)
    assert printed == f"{clips[1]}: {answers[trained.folder][0]}\n"
    assert "text.wav" in errors.getvalue() and "nan.wav" in errors.getvalue()
    assert "none of the 2 rows" in asked(trained.folder, *clips[::2], "Which?", fails=True)


@pytest.mark.parametrize("words, message", [
    ("a.wav", "last, a question"), ("a.wav {rows}", "last, a question"),
    ("{rows} What?", "whose rows have their own"), ("nowhere.jsonl", "nowhere.jsonl"),
    ("{empty} What?", "give clips"), ("missing.wav What?", "missing.wav")])
def test_ask_says_what_it_needs(three_notes, tmp_path, words, message):
    words = words.format(rows=three_notes / "rows.jsonl", empty=tmp_path)
    assert message in asked("tiny", *words.split(), fails=True)


def test_warning_never_goes_through_an_answer(trained, monkeypatch):
    """Both streams in the order in which they are written."""
    stream = model.CoAT.stream

    def warning(*args):
        for token in stream(*args):
            print("a warning", file=sys.stderr)
            yield token

    monkeypatch.setattr(model.CoAT, "stream", warning)
    both = io.StringIO()
    run("infer.py", "ask", trained.folder, trained.clip, "Which note?", "--workers", 0, out=both,
        errors=both)
    *warnings_, answer = both.getvalue().splitlines()
    assert set(warnings_) == {"a warning"} and answer != "a warning"


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


def test_show_says_that_a_run_without_experts_has_no_heads(no_block, trained):
    error = run("infer.py", "show", no_block, trained.clip, fails=True)
    assert "trained without experts" in error


# --------------------------------------------------------------------------------------------------
# infer.py: how an answer is read

FEELINGS = ["angry", "happy", "very happy", "sad"]
ANIMALS = ["Dog", "Cat", "Cow", "Horse"]
READ = [    # choices, the one that a person reads, answers
    (FEELINGS, "happy", ["happy", "Happy.", "b.", "B. happy", "B) happy", "(B)", "**B.** happy",
                         "It is not sad but happy"]),
    (FEELINGS, "very happy", ["very  happy", "Answer: (C) very happy", "she is very happy"]),
    (FEELINGS, None, ["B. angry", "angry or sad", "unhappy", "", "E", "A man is heard", "bored"]),
    (ANIMALS, "Cat", [
        "The best answer is: B", "The best answer is B.", "The correct option is B", "Answer: B",
        "I would choose option B because it meows.", "I think it is B", "I'd go with B.", "My answer is (b).",
        "It must be B, as the sound is a meow.", "B is correct.", "Most likely B", "Therefore, B.",
        "So the correct answer should be B.", "The answer is not A, it is B.", "A is wrong, so B",
        "At first I thought A, but the answer is B", "Between A and B, I choose B.", "B, not A",
        "**B**", "**B. Cat**", "`B`", "__B__", "# Answer\nB", "### B", "**Answer:** B", "- B", "[B]",
        r"\boxed{B}", r"$\boxed{\text{B}}$", r"The answer is \boxed{\text{B. Cat}}.", r"\(B\)",
        "（B）", "【B】", "Ｂ", "答案：B", "答案是B。", "选B", "B\u200b", "“B”", "Cat (B)", "B - Cat",
        "B\n", "B\n\nThe sound is a meow, not a dog's bark.", "Let me think.\nDogs bark.\nB",
        "A. Dog\nB. Cat\nThe answer is B", "B. Cat. The others are dog, cow and horse.",
        "B, because the cat meows louder than the dog barks.", "A cat is meowing, so B", "a cat",
        "It's a cat, not a dog.", "It is a cat rather than a dog", "There is no doubt it is a cat.",
        "The options are dog, cat, cow and horse. The answer is cat.", "I hear a cat",
        "<think>the answer is A</think>B", "<think>A or B</think> <answer>B</answer>",
        "<think>The answer is A.</think>\n\nThe sound is a cat.", "<think>hm, the answer is B"]),
    (ANIMALS, "Dog", ["A dog barks.", "a", "A is the answer.", "It's A.", "I believe A is right."]),
    (ANIMALS, None, [
        "(A) or (B)", "A/B", "Either A or B", "It could be A or B.", "A, B", "B or maybe C", "I",
        "It is not a cat.", "It's not B.", "It isn't a cat", "I don't think it is a cat", "cats",
        "It cannot be a cat.", "Neither dog nor cat", "no cat is heard", "None of the above",
        "The answer is in the recording.", "I cannot tell.", "It could be any of A, B, C or D."]),
    (list("CDEFGAB"), "B", ["B", "(b)"]), (["C", "C#"], "C#", ["it is C#", "It is C♯."]),
    (list("CDEFGAB"), "D", ["B. D"]), (["12", "120"], "120", ["120", "at 120 BPM"]),
    (["minor", "major", "atonal", "modal"], "major", ["The piece is in D major."]),
    (["yes", "no"], "no", ["No, it is not.", "no", "B. no"]), (["狗叫", "猫叫"], "狗叫", ["我认为是狗叫"]),
    (["answering machine", "bell"], "answering machine", ["answering machine"]),
    (["cafe\u0301", "rock ’n’ roll"], "cafe\u0301", ["café", "Caf\u00e9."]),
    (["happy", "not happy"], "not happy", ["The man is not happy"])]


@pytest.mark.parametrize("choices, said, answer", [
    (choices, said, answer) for choices, said, answers in READ for answer in answers])
def test_choice_is_read_as_a_person_reads_it(choices, said, answer):
    assert infer.read_choice(answer, choices) == said


@pytest.mark.parametrize("text, answer", [
    ("<think>A or B</think> <answer> B </answer>", "B"), ("<think>A or B</think>\nB", "B"),
    ("<answer>A</answer> no: <answer>B</answer> so the answer is C", "B"), ("<answer> B", "B"),
    ("the answer is A? No. The answer is: (B) happy.", "(B) happy."), ("B", "B"), ("", "")])
def test_answer_is_taken_out_of_a_text_that_reasons(text, answer):
    assert infer.final_answer(text) == answer


@pytest.mark.parametrize("answer, response", [
    ("a dog", "A dog."), ("Café", "Cafe\u0301"), ("don’t", "don't"), ("a\u200b dog", "a dog")])
def test_forms_of_a_text_are_one(answer, response):
    row = {"row": 0, "task": "qa", "response": response, "answer": answer}
    assert infer.measure([row])[0]["value"] == 1


@pytest.mark.parametrize("answer, first, second", [
    ("B", "B", "B"), ("(B)", "B", "B"), ("B. happy", "B", "B"), ("It is B or C", "C", "C"),
    ("(A) or (B)", "A", "B"), ("b", None, None), ("", None, None), ("A man is heard", "A", "A"),
    ("The answer is B: happy as ever", None, "B"), ("I think that it is happy here", None, "B")])
def test_choice_is_read_as_in_lmms_eval(answer, first, second):
    choices = ["angry", "happy", "sad", "bored"]
    for rule, letter in (("lmms-1", first), ("lmms-2", second)):
        expected = choices["ABCD".index(letter)] if letter else None
        assert infer.lmms_choice(answer, choices, rule) == expected


@pytest.mark.parametrize("reply, rating", [
    ("Explanation: 2 dogs.\nRating: 4", 4), ("**Rating:** (2)", 2), ("Rating: 04", 4),
    ("Rating: 4.0", 4), ("Rating (0-5): 3", 3), ("Rating: 4 (on a scale of 0 to 5)", 4),
    ("Rating: 4/5", 4), ('{"rating": 3}', 3), ("The rating is 2.", 2), ("rating: 1\nRating: 5", 5),
    ("Rating: 4/10", None), ("Rating: -1", None), ("Rating: 3-4", None), ("Rating: 3 to 4", None),
    ("Rating: 7", None), ("Rating: 4.5", None), ("Rating: 4 on a scale of 1 to 10", None),
    ("Rating: 4 out of 10", None), ("Good.", None), ("rating" + ":" * 2 ** 18, None)])
def test_rating_is_a_whole_number_from_0_to_5_or_none(reply, rating):
    assert infer.read_rating(reply) == rating


# --------------------------------------------------------------------------------------------------
# infer.py: measures

def spoken(response, answer, **more):
    return {"row": 0, "task": "asr", "response": response, "answer": answer} | more


def test_word_error_rate_is_that_of_jiwer():
    rng = np.random.default_rng(0)
    words = ["don't", "Colour", "two", "cat", "the"]
    pairs = [[" ".join(rng.choice(words, n)) for n in rng.integers(1, 6, 2)] for _ in range(40)]
    english, _ = infer.normalisers()
    theirs = jiwer.wer(*([english(text) for text in side] for side in zip(*pairs)))
    wer, = infer.measure([spoken(*pair) for pair in pairs] + [spoken("<NOISE>", "x")])
    assert wer["value"] == pytest.approx(theirs) and (wer["rows"], wer["left_out"]) == (40, 1)
    assert wer["low"] < wer["value"] < wer["high"]


@pytest.mark.parametrize("response, answer, rate, more", [
    ("the colour", "The color.", 0, {}), ("don’t", "do not", 0, {}), ("uh", "the cat", 2, {}),
    ("今天天气很好", "今天天气真好", 1 / 6, {}), ("ไปไหน", "ไปไหม", 1 / 5, {}),
    ("नमस्ते दुनिया", "नमस्ते दुनियो", 1 / 2, {}), ("l'école est là", "l'ecole est là", 1 / 4,
     {"language": "fr"}), ("it costs 20 dollars", "it costs 20", 0, {"wer": "whisper+basic"}),
    ("it costs 20 dollars", "it costs 20", 1 / 3, {"wer": "whisper"}),
    ("mr president thank you very much", "Mr President, thank you very much.", 1 / 3,
     {"wer": "rows"}),
    ("it is good", "The original content of this audio is: 'it is good'", 0, {"wer": "rows"})])
def test_error_rate_counts_what_its_rule_says(response, answer, rate, more):
    first, *_ = infer.measure([spoken(response, answer, **more)])
    assert first["value"] == pytest.approx(rate)
    assert first["metric"] == ("CER" if re.match("[今ไ]", response) else "WER")


def test_voxpopuli_is_the_mean_of_the_rows_and_over_all_words():
    rows = [spoken("a b c d", "a b c d", wer="rows"), spoken("a", "b", wer="rows")]
    assert [result["value"] for result in infer.measure(rows)] == [0.5, 0.2]


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


def test_interval_of_a_share_is_the_normal_approximation_where_that_holds():
    right = np.random.default_rng(1).random(400) < 0.7
    found = infer.share([(r, 1) for r in right])
    half = 1.96 * np.sqrt(found["value"] * (1 - found["value"]) / 400)
    np.testing.assert_allclose((found["high"] - found["low"]) / 2, half, rtol=0.1)


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
    def result(arm, task, metric, value, family="General"):
        return {"arm": arm, "data": None, "seed": None, "task": task, "metric": metric,
                "value": value, "family": family}

    results = [result("a", "mmau", "accuracy", 60), result("a", "mmar", "accuracy", 50),
               result("a", "wavcaps", "rating", 30), result("b", "mmau", "accuracy", 70),
               result("b", "mmsu", "accuracy", 10), result("b", "mmar", "accuracy", 60),
               result("a", "gigaspeech", "WER", 9, "ASR"), result("a", "voxpopuli", "WER", 5, "ASR")]
    means = {(r["arm"], r["task"], r["metric"]): r["value"] for r in infer.family_means(results)}
    assert means == {
        ("a", "General: mean of mmau, mmar", "accuracy"): 55,
        ("b", "General: mean of mmau, mmar", "accuracy"): 65,
        ("a", "General: mean of wavcaps", "rating"): 30,
        ("a", "ASR: mean of gigaspeech, voxpopuli", "WER"): 7}


# --------------------------------------------------------------------------------------------------
# infer.py: score

def test_score_finds_what_training_found(trained, tmp_path):
    run("infer.py", "score", trained.folder, "tones:louder,note:40", "--out", tmp_path / "tones",
        "--workers", 0, "--max-new-tokens", 12)
    for task, result in trained.heldout.items():    # of the same rows
        lines = [line for line in predictions(tmp_path / "tones") if line["task"] == task]
        assert np.mean([line["answer"] == line["response"] for line in lines]) == result["heard"]


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


def test_score_counts_what_it_leaves_out(trained, tmp_path, bad_clips):
    good = wav(tmp_path, "good.wav", noise(0.5).numpy())
    row = {"prompt": "?", "response": "hello", "task": "asr"}
    rows = [row | {"audio": path} for path in bad_clips.values()]
    rows += [row | {"audio": good, "response": text} for text in ("a word", "<SIL>")]
    path = write_lines(tmp_path / "bad.jsonl", rows)
    result = last_json(run("infer.py", "score", trained.folder, path, "--out", tmp_path / "out",
                           *SCORE))
    assert result["skipped"] == {"over 120 s": 1, "unusable": len(bad_clips) - 1}
    wer, = result["results"]
    assert (wer["rows"], wer["left_out"]) == (1, 1)


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


def test_score_reasons_with_the_adapter_of_audio_flamingo_3(hub, text_think, lettered, tmp_path):
    name = "audio-flamingo-3"
    out = tmp_path / "out"
    run("infer.py", "score", name, lettered, "--out", out, *SCORE, "--device", "cpu",
        "--model-path", hub[name][1], "--text-think", text_think.folder)
    prompts = [row["prompt"] + BACKBONES[name].text_think for row in read_lines(lettered)]
    coat = model.load_text_think(name, text_think.folder, hub[name][1])
    said = coat.generate(build_inputs(coat, [None] * 4, prompts, think=False), 4)
    assert [line["text"] for line in predictions(out)] == said


@pytest.mark.parametrize("more, words", [
    (["--max-new-tokens", 5], "max_new_tokens was 4, now 5"), (["--no-think"], "no_think was False")])
def test_score_refuses_the_file_of_another_run(scored, more, words):
    before = scored.out.read_text()
    assert words in scored.again(scored.out, *more, fails=True)
    assert "data was" in scored.again(scored.out, rows="tones:note", fails=True)
    assert scored.out.read_text() == before


@pytest.mark.parametrize("text", ["no JSON\n", "5\n", "notes", '{"run": {}}\n', '{"a": 1}\n5\n'])
def test_file_that_is_none_of_its_predictions_is_left_as_it_is(scored, tmp_path, text):
    path = write(tmp_path / "other", text)
    assert "other" in scored.again(path, fails=True)
    assert open(path).read() == text


# --------------------------------------------------------------------------------------------------
# infer.py: the judge

def test_judge_rates_each_row_once_and_keeps_what_is_paid_for(judged):
    replies = ["Explanation: good.\nRating: 4", 429, "**Rating:** (2)", 500, "Rating: 7"]
    with judge(replies) as (url, seen):
        rating, = last_json(judged("--judge", url))["results"]
        judged("--judge", url)
        assert len(seen) == 5    # three rows, two of them twice, and nothing when it was run again
    assert rating["value"] == pytest.approx(0.6) and (rating["rows"], rating["left_out"]) == (2, 1)


def test_judge_is_not_asked_without_the_flag(judged):
    with judge([]) as (_, seen):
        result, = last_json(judged())["results"]
    assert not seen and result["value"] is None and result["left_out"] == 3


def test_judge_that_refuses_some_rows_rates_the_others(judged):
    with judge(["Rating: 4", 400, "Rating: 2"]) as (url, seen):
        assert "400" in judged("--judge", url, fails=True)
    with judge(["Rating: 3"]) as (url, seen):
        assert last_json(judged("--judge", url))["results"][0]["rows"] == 3
        assert len(seen) == 1


def test_judge_is_sent_figure_a_as_the_paper_sends_it(judged):
    with judge(["Rating: 4"] * 3) as (url, seen):
        judged("--judge", url)
    path, key, body = seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["model"] == "gpt-4o-2024-11-20"
    assert (body["temperature"], body["max_tokens"]) == (0, 1024)
    message, = body["messages"]
    assert message["role"] == "user" and message["content"].startswith("[Question]\nSay ")
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
    401, 403, "", '{"choices": []}', "[]", "null", "7", "<html>", "sk-secret", '{"choices": ["a"]}'])
def test_judge_that_fails_is_one_line_without_the_key(rate, reply):
    with judge([reply] * 9, raw=True) as (url, seen), pytest.raises(InputError) as e:
        rate(url)
    assert "its key is read from OPENAI_API_KEY" in str(e.value)
    assert "secret" not in str(e.value) and "\n" not in str(e.value)


def test_rating_does_not_hold_the_key_that_a_judge_repeats(rate):
    with judge(["You are sk-secret. Rating: 4"]) as (url, seen):
        rating = rate(url)
    assert rating["rating"] == 4 and rating["reply"] == "You are ***. Rating: 4"
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
    assert 5000 < os.path.getsize(tmp_path / "show.png") < 150000


def test_show_names_the_events_that_the_expert_hears_most():
    z = torch.rand(7, 20)
    sound = SimpleNamespace(readout=lambda z: z)
    student, expert, rows = pictures.picture("sound", z.flip(0), z, sound)
    assert expert[-1].max() == z.max().sigmoid() and rows[9] == f"event {int(z.amax(0).argmax())}"
    assert torch.equal(student, expert.flip(1))


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


def test_frames_take_clips_of_several_lengths_and_silence():
    experts = [torch.randn(n, 4) for n in (2, 5, 9, 9)]
    silent = [torch.zeros_like(z) for z in experts]
    np.testing.assert_allclose(infer.unexplained(experts, experts), (0, 0), atol=1e-6)
    np.testing.assert_allclose(infer.unexplained(silent, experts), (1, 1), atol=1e-6)
    assert infer.unexplained(experts, silent) == [None, None]    # there is nothing to explain


def test_frames_are_those_of_show(trained, tmp_path):
    clips = [trained.clip, HERE / "assets/clips/cow.flac"]
    path = write_lines(tmp_path / "rows.jsonl", [
        {"audio": str(clip), "prompt": "Which?", "response": "A"}
        for clip in (*clips, tmp_path / "none.wav")])
    found = last_json(run("infer.py", "frames", trained.folder, "--data", path))
    assert found["clips"] == 2 and list(found["results"]) == ["recon", "pitch"]
    shown = [last_json(run("infer.py", "show", trained.folder, clip, "--question", "Which?",
                           "--out", tmp_path / "show.png"))["pitch_recall"] for clip in clips]
    np.testing.assert_allclose(found["results"]["pitch"]["recall"],
                               np.mean([recall for recall in shown if recall is not None]))
    assert "two or more" in run("infer.py", "frames", trained.folder, "--data", "tones:note:1",
                                fails=True)


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
    assert infer.pitch_recall(z, heard, pitch) == 0
    assert infer.pitch_recall(heard, heard, pitch) == 1
    half = heard.clone()
    half[1, 40] = -2.0
    half[:, 100:] = 2.0    # what the expert does not hear is not asked for
    assert infer.pitch_recall(half, heard, pitch) == 0.5


# --------------------------------------------------------------------------------------------------
# infer.py: probe

def test_probe_finds_what_is_there():
    rng = np.random.default_rng(0)
    labels = np.array(list("abc") * 40)
    directions = rng.standard_normal((3, 8))
    x = rng.standard_normal((120, 8)) + 4 * (labels[:, None] == list("abc")) @ directions
    accuracy, confidence = infer.linear_probe(x, labels, np.arange(120) // 3)
    assert np.mean(accuracy) > 0.95 and confidence.mean() > 0.9


def test_probe_never_has_a_recording_on_both_sides():
    rng = np.random.default_rng(0)
    recordings = np.arange(120) // 3
    labels = rng.choice(list("ab"), 40)[recordings]
    voices = rng.standard_normal((40, 64))[recordings] + 0.01 * rng.standard_normal((120, 64))
    assert np.mean(infer.linear_probe(voices, labels, recordings)[0]) < 0.8
    by_row, _ = infer.linear_probe(voices, labels, np.arange(120))
    assert np.mean(by_row) > 0.8    # what a split by row would say of voices alone


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
    args = SimpleNamespace(label="family", batch=8, workers=0, max_new_tokens=1)
    source = open_source(path)
    found = infer.probe_model(tiny, source, range(24), args)
    (labels, groups), *_ = seen
    assert (found["rows"], found["left_out"]) == (21, 3) and sorted(labels) == ["a"] * 11 + ["b"] * 10
    assert Counter(groups) == {str(speaker): 3 for speaker in range(7)}    # 0 is one of them


@pytest.mark.parametrize("rows, words", [
    ("tones:louder,note:5", "several tasks"), ("tones:louder:5", "five recordings")])
def test_probe_refuses_rows_that_cannot_be_split(rows, words):
    assert words in run("infer.py", "probe", "tiny", "--data", rows, "--workers", 0, fails=True)


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

def results_file(path, means, **more):
    """Results of three seeds about these means, {(arm, data): mean}."""
    return write_lines(path, [
        {"arm": arm, "data": name, "seed": seed, "task": "note", "metric": "accuracy",
         "value": 100 * (mean + change)} | more
        for (arm, name), mean in means.items() for seed, change in enumerate((-0.01, 0, 0.01))])


def test_compare_gives_means_with_intervals_and_paired_differences(tmp_path):
    means = {("fine-tuning", "tones:note:7"): 0.2, ("fine-tuning", "tones:note:28"): 0.5,
             ("+ pitch", "tones:note:28"): 0.6}
    path = results_file(tmp_path / "results.jsonl", means)
    printed = run("infer.py", "compare", path, "--plot", tmp_path / "arms.png").splitlines()
    half = 4.303 * 0.01 / math.sqrt(3) * 100    # Student's t, two degrees of freedom
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


@pytest.mark.parametrize("content", ["{}\n", "5\n", "["])
def test_compare_refuses_what_is_no_result_or_comes_twice(trained, tmp_path, content):
    path = write(tmp_path / "results.jsonl", content)
    assert path in run("infer.py", "compare", path, fails=True)
    assert "comes twice" in run("infer.py", "compare", trained.folder, trained.folder, fails=True)


@pytest.mark.parametrize("name", ["few_labels", "heads_and_losses", "small"])
def test_compare_makes_a_table_of_each_stored_file(name):
    lines = run("infer.py", "compare", HERE / f"assets/{name}.jsonl").splitlines()
    assert len(lines) == 1 + len({(r["arm"], r["data"], r["task"])
                                  for r in read_lines(HERE / f"assets/{name}.jsonl")})


# --------------------------------------------------------------------------------------------------
# bench.py

def bench_of_rows(path, *args):
    """({(range of length, arm): its line}, {range: its ratios}, the JSON) of bench.py latency"""
    found = bench("latency", "--data", path, "--seeds", 1, "--max-new-tokens", 8, *args)
    arms = {(line["audio"], line["arm"]): line for line in found["rows"] if "arm" in line}
    ratios = {line["audio"]: line for line in found["rows"] if "ratios" in line}
    return arms, ratios, found


def test_bench_of_noise_counts_tokens_and_says_what_transformers_says():
    *lines, ratios = bench("latency", "--seconds", 1, "--seeds", 1, "--batch", 2)["rows"]
    by = {line["arm"]: line for line in lines}
    added = by["CoAT"]["prompt"][0] - by["base"]["prompt"][0]
    assert added == by["CoAT"]["block"][0] == 25 + 2
    decoded = {arm: line["decoded"][0] for arm, line in by.items()}
    assert decoded == {"base": 20, "CoAT": 20, "text-CoT": 120, "generate": 20}
    assert ratios["same_ids"] == 1


def test_bench_of_rows_decodes_to_the_end_token_by_ranges_of_length(tmp_path, tiny):
    """What tiny says third to the first row, after the block, is an end token here."""
    asked = []
    lines = [{"audio": None, "prompt": "?", "response": "C"}]
    for i, seconds in enumerate((0.5, 1.1, 5.3)):
        path = wav(tmp_path, f"{i}.wav", noise(seconds, i).numpy())
        asked.append((read_audio(path)[0], f"Which {i}?"))
        lines.append({"audio": path, "prompt": f"Which {i}?", "response": "C"})
    lines.append(lines[1] | {"prompt": THINK})
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, lines)))
    third = greedy(tiny, build_inputs(tiny, [asked[0][0]], [asked[0][1]]), 3)[0, 2]
    eos = (tiny.processor.tokenizer.convert_ids_to_tokens(third.item()), "<|endoftext|>")
    ends_early = dataclasses.replace(BACKBONES["tiny"], eos=eos)
    with unittest.mock.patch.dict(BACKBONES, tiny=ends_early):
        arms, ratios, found = bench_of_rows(path)
        by_length, _, _ = bench_of_rows(path, "--samples", 1)
        coat = load_coat("tiny")
    for arm, think in (("base", False), ("CoAT", True), ("text-CoT", False)):
        suffix = coat.backbone.text_think if arm == "text-CoT" else ""
        batches = [build_inputs(coat, [wave], [question + suffix], think=think)
                   for wave, question in asked]
        lengths = [len(list(coat.stream(batch, 8))) for batch in batches]
        prompts = [batch["input_ids"].shape[1] for batch in batches]
        assert arms["0.1-inf s", arm]["decoded"][0] == pytest.approx(np.mean(lengths))
        assert arms["0.1-inf s", arm]["prompt"][0] == pytest.approx(np.mean(prompts))
        assert by_length["5-10 s", arm]["decoded"][0] == lengths[2]
    assert ratios["0.1-inf s"]["same_ids"] == arms["0.1-inf s", "CoAT"]["clips"] == 3
    assert found["left_out"] == 1 and len(by_length) == 2 * 4


def test_bench_takes_the_block_from_the_run_and_base_from_its_backbone(tmp_path, hub, text_think):
    loaded("tiny", None).save(tmp_path / "checkpoint-1")
    arms, ratios, _ = bench_of_rows("tones:note:2", "--model", tmp_path)
    assert arms["0.1-inf s", "CoAT"]["block"][0] == 38 and ratios["0.1-inf s"]["same_ids"] == 2
    name = "audio-flamingo-3"
    arms, *_ = bench_of_rows("tones:note:1", "--backbone", name, "--model-path", hub[name],
                             "--text-think", text_think.folder, "--device", "cpu")
    assert arms["0.1-inf s", "text-CoT"]["prompt"][0] > arms["0.1-inf s", "base"]["prompt"][0]


def test_bench_trains_every_way_and_times_each_expert(shipped):
    ways = bench("train", "--steps", 1, "--batch", 2, "--seconds", 0.5, 2)["ways"]
    assert list(ways) == ["no block", "block", "two experts", "five experts", "Trainer",
                          "Trainer, by length", "expert recon", "expert pitch"]
    assert ways["block"]["padding"] < ways["Trainer"]["padding"]
    assert all(way.get("rows_per_s", 1) > 0 for way in ways.values())


# --------------------------------------------------------------------------------------------------
# What goes wrong: audio and rows

BAD_CLIPS = {    # file: what the message must say
    "missing.wav": "no file", "empty.wav": "cannot decode", "text.wav": "cannot decode",
    "zero_samples.wav": "no samples", "nan.wav": "NaN", "short.wav": "0.02 s",
    "long.wav": "121.00 s", "cut.flac": "cut.flac",
}


@pytest.mark.parametrize("name, words", BAD_CLIPS.items())
def test_bad_audio_is_refused_with_its_name_in_one_line(bad_clips, name, words):
    with pytest.raises(InputError, match=words) as error:
        read_audio(bad_clips[name])
    assert name in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, TooLong) == (name == "long.wav")


@pytest.mark.parametrize("seconds, kind", [(0.02, InputError), (121, TooLong)])
def test_clip_out_of_range_is_refused_by_the_builder(tiny, seconds, kind):
    with pytest.raises(kind, match=f"{seconds:.2f} s"):
        build_inputs(tiny, [noise(seconds)], ["?"])


def test_segment_beyond_the_end_is_refused(tmp_path):
    path = wav(tmp_path, "a.wav", noise(2.0).numpy())
    with pytest.raises(InputError, match="nothing from 3"):
        read_audio(path, 3.0, 4.0)


@pytest.mark.parametrize("text, words", [
    ("", "no rows"), ("[1]", "line 1: not a JSON object"),
    ('{"prompt": "a", "response": "b"}\nnot json', "line 2: not JSON"),
    (b'{"prompt": "\xff"}', "line 1: not UTF-8"),
    ('{"prompt": "a"}', '"response" is missing'),
    ('{"prompt": "", "response": "b"}', '"prompt" is missing'),
    ('{"prompt": "a", "response": "b", "audio": 3}', 'line 1: "audio"'),
    ('{"prompt": "a", "response": "b", "seconds": "4"}', 'line 1: "seconds"'),
    ('{"prompt": "a", "response": "b", "start": []}', 'line 1: "start"'),
    ('{"prompt": "a", "response": "b", "task": null}', 'line 1: "task"')])
def test_bad_manifest_is_refused_with_its_line(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        Manifest(write(tmp_path / "rows.jsonl", text))


@pytest.mark.parametrize("old, new, words", [
    ("3,", "3", "line 4: not JSON"), ('"share": 3', '"share": 0', "share of asr"),
    ('"share": 3', '"shares": 3', "asr needs"), ('"share": 3', '"share": "a"', "share of asr"),
    ('["c.jsonl"]', "[]", "caption lists no"), ('"text"', '"asr"', "comes twice"),
    ('"max_epochs": 4', '"epochs": 4', "give"),
    ('"max_epochs": 4', '"max_epochs": 0', "max_epochs of a.jsonl"),
    ('"c.jsonl"', "3", "a source of caption"),
    ('"c.jsonl"', '"no.jsonl"', "no manifest '.*no.jsonl'"),
    ('"rows": 600', '"rows": 0.5', "whole number"),
    (MIXTURE, "[]", "there is no group|not a JSON object|give"),
    (MIXTURE, "3", "not a JSON object"), (MIXTURE, '{"groups": {}}', "there is no group")])
def test_bad_mixture_is_refused_in_one_line(mixture, tmp_path, old, new, words):
    assert MIXTURE.count(old) >= 1
    with pytest.raises(InputError, match=words) as error:
        Mixture(write(tmp_path / "bad.json", MIXTURE.replace(old, new, 1)))
    assert "\n" not in str(error.value)


def test_missing_mixture_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Mixture(str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize("text", ["tones:xyz", "tones:note:0", "tones:note:x", "tones:note:5:5"])
def test_tones_that_do_not_exist_are_refused(text):
    with pytest.raises(InputError, match="give tones"):
        open_source(text)


def test_what_the_header_tells_keeps_a_row_out_of_the_plan(bad_clips, tmp_path):
    source = Manifest(rows_about(tmp_path, bad_clips, "nan.wav", "long.wav", "missing.wav"))
    assert [(i, type(error)) for i, error in source.skipped] == [(1, TooLong), (2, InputError)]
    assert set(plan_stage(source, 5, 2, 0, 0).ravel()) == {0}


def test_what_only_decoding_tells_leaves_a_row_out_of_its_batch(tiny, bad_clips, tmp_path):
    bad_clips = bad_clips | {"good.wav": wav(tmp_path, "good.wav", noise(1.0).numpy())}
    source = Manifest(rows_about(tmp_path, bad_clips, "nan.wav", "good.wav", "missing.wav"))
    batch = collate([Rows(source)[i] for i in range(3)], tiny.spec)
    assert [row["row"] for row in batch["rows"]] == [1] and batch["seconds"] == 1.0
    assert [type(error) for error in batch["skipped"]] == [InputError] * 2
    assert collate([Rows(source)[0]], tiny.spec)["rows"] == []


def test_reserved_tokens_and_odd_rates_leave_a_row_out_of_its_batch(coat):
    row = {"wave": noise(1.0), "rate": 16000, "prompt": "what?", "response": "it"}
    for token in (coat.backbone.audio_token, THINK):
        rows = [row | {"response": token, "row": 7}, row, row | {"rate": 44099}]
        batch = collate(rows, coat.spec)
        assert len(batch["rows"]) == 1
        reserved, odd = map(str, batch["skipped"])
        assert "row 7" in reserved and "44099" in odd


def cut_in_half(path):
    os.truncate(path, os.path.getsize(path) // 2)
    return path


@pytest.mark.parametrize("name, flags", [
    ("a.wav", {}), ("a.wav", {"subtype": "FLOAT"}), ("a.wav", {"subtype": "IMA_ADPCM"}),
    ("a.ogg", {})])
def test_file_that_is_cut_off_is_named_by_its_header(tmp_path, name, flags):
    path = wav(tmp_path, name, noise(20.0).numpy(), **flags)
    read_audio(path)
    read_audio(cut_in_half(path), 1, 2)    # that lies before the cut
    for start, end in ((None, None), (1, 19), (15, 16)):
        with pytest.raises(InputError, match=f"{name}' is cut off"):
            data.open_audio(path, start, end)


def test_wav_of_a_stream_states_no_length_and_is_no_cut_file(tmp_path):
    path = Path(wav(tmp_path, "a.wav", noise(1.0).numpy()))
    whole = path.read_bytes()
    for length in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):    # as ffmpeg and sox write it
        path.write_bytes(whole[:40] + length + whole[44:])
        assert len(read_audio(str(path))[0]) == 16000


def test_file_without_a_header_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"\Acannot decode .*x.raw' \(it has no header\); "):
        read_audio(write(tmp_path / "x.raw", b"\0" * 32000))


ROW = {"audio": "a.wav", "prompt": "a", "response": "b"}
ENDLESS = "1" + "0" * 400


@pytest.mark.parametrize("line, words", [
    *[(json.dumps(ROW | more), words) for more, words in [
        ({"seconds": 1e308}, '"seconds" is no number of seconds up to 1000000'),
        ({"start": 1e30}, '"start" is no number'), ({"end": math.nan}, '"end" is no number'),
        ({"end": math.inf}, '"end" is no number'), ({"start": True}, '"start" is no number'),
        ({"seconds": False}, '"seconds" is no number'), ({"seconds": [1]}, '"seconds" is no'),
        ({"seconds": 0}, '"seconds" is not above 0'),
        ({"audio": "\ud800.wav"}, "half a character"), ({"prompt": "\udc00"}, "half a character"),
        ({"choices": ["a", "\ud800"]}, "half a character"), ({"question": "\ud800"}, "half a"),
        ({"more": {"a": [{"\udfff": 1}]}}, "half a character"), ({"\ud800": 1}, "half a character"),
        ({"wave": [0.1]}, '"wave" is a name that loading a row uses'),
        ({"rate": 8000}, '"rate" is a name'), ({"row": 1}, '"row" is a name'),
        ({"audio": ["a.wav"]}, '"audio" is no path'),
        ({"prompt": ["a"]}, '"prompt" is missing or empty, or no text'),
        ({"question": ["a"]}, '"question" is no text'),
        ({"choices": "yes"}, '"choices" is no list'),
        ({"choices": [1]}, '"choices" is no list'), ({"task": None}, '"task" is missing'),
        ({"prompt": "a" * 10 ** 6}, "more than 100000 bytes; shorten its texts"),
        ({"more": "b" * 10 ** 6}, "more than 100000 bytes")]],
    (f'{{"prompt": "a", "response": "b", "end": {ENDLESS}}}', '"end" is no number'),
    (f'{{"prompt": "a", "response": "b", "more": {ENDLESS * 20}}}', "thousands of digits"),
    (f'{{"prompt": "a", "response": "b", "more": {"[" * 40000}{"]" * 40000}}}', "in hundreds of"),
    ("[" * 40000, "brackets in hundreds of brackets"), ("[" * 10 ** 6, "more than 100000 bytes"),
    (b'{"prompt": "\xed\xa0\x80", "response": "b"}', "not UTF-8"),
    (json.dumps(ROW).encode("utf-16"), "not UTF-8; save the file as UTF-8")])
def test_row_that_cannot_be_used_gives_one_line(tmp_path, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "rows.jsonl", json.dumps(ROW).encode() + b"\n\n" + line)
    with pytest.raises(InputError) as error:
        Manifest(path)
    text = str(error.value)
    assert text.startswith(f"{path}, line 3: {words}") or words in text
    assert "\n" not in text and len(text) < 500 and text.isprintable()


@pytest.mark.parametrize("old, new, words", [
    (MIXTURE, MIXTURE.encode("utf-16"), "codec can't decode"),
    (MIXTURE, b'{"groups": {"\xff": 1}}', "codec can't decode"),
    (MIXTURE, "[" * 40000, "recursion"), (MIXTURE, '[{"messages": []}]', "convert messages"),
    (MIXTURE, '{"groups": [1]}', "there is no group"),
    (MIXTURE, '{"groups": {"asr": []}}', "asr needs"),
    ('"share": 3', '"share": [3]', "share of asr"),
    ('"share": 3', '"share": 1e308', "share of asr"),
    ('"share": 3', '"share": true', "share of asr"), ('"share": 3', '"share": NaN', "share of asr"),
    ('"share": 3', f'"share": {ENDLESS}', "share of asr is not a number from 1e-9 to 1e9"),
    ('"share": 3', f'"share": {ENDLESS * 20}', "digits"),
    ('"max_epochs": 4', f'"max_epochs": {ENDLESS}', "max_epochs of a.jsonl"),
    ('"rows": 600', f'"rows": {ENDLESS}', '"rows" is not a whole number from 1 to 1e9'),
    ('"c.jsonl"', '["c.jsonl"]', "a source of caption"), ('"c.jsonl"', '"."', "no manifest"),
    ('"c.jsonl"', '"/dev/full"', "no manifest")])
def test_mixture_that_cannot_be_used_gives_one_line(mixture, tmp_path, old, new, words):
    text = new if isinstance(new, bytes) else MIXTURE.replace(old, new, 1)
    with pytest.raises(InputError, match=words) as error:
        Mixture(write(tmp_path / "bad.json", text))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# What goes wrong: corpora

@pytest.mark.parametrize("name", list(data.CORPORA))
@pytest.mark.parametrize("split", [None, "nonsense"])
def test_missing_layout_is_one_line_that_says_what_is_expected(tmp_path, capsys, name, split):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{name} has to lie as ROOT/") as error:
        convert(capsys, name, tmp_path / "empty", split and [split])
    assert "\n" not in str(error.value) and "  " not in str(error.value)


@pytest.mark.parametrize("name, files, words", [
    ("clotho", {"clotho_captions_development.csv": "file,caption\na,b\n"},
     "'file_name'.*clotho has to lie as ROOT/clotho_captions"),
    ("gigaspeech", {"GigaSpeech.json": "[1"}, "gigaspeech has to lie as ROOT/GigaSpeech.json")])
def test_unexpected_content_is_one_line_too(tmp_path, capsys, name, files, words):
    lay_out(tmp_path / "c", files)
    with pytest.raises(InputError, match=words):
        convert(capsys, name, tmp_path / "c")


def test_column_that_a_table_has_not_is_named(table, capsys):
    with pytest.raises(InputError, match="'wrong'.*a table with the columns wrong, q"):
        convert(capsys, "csv", table, response="wrong", prompt="q")


# --------------------------------------------------------------------------------------------------
# What goes wrong: weights

@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("lacks, words", [
    ("*", "config.json"), ("model.safetensors", "model.safetensors"),
    ("preprocessor_config.json", "feature extractor"), ("tokenizer*", "tokenizer is missing"),
    ("chat_template*", "no chat template")])
def test_folder_of_a_backbone_without_one_of_its_files_is_refused(
        name, lacks, words, hub, tmp_path):
    if lacks == "chat_template*" and not LAYOUTS[name].template:
        pytest.skip("it is in the processor's class")
    shutil.copytree(hub[name][1], tmp_path / "x", ignore=shutil.ignore_patterns(lacks))
    with pytest.raises(InputError, match=f"cannot load {name} from .*{words}"):
        load_coat(name, model_path=tmp_path / "x")


@pytest.mark.parametrize("file, content, words", [
    ("config.json", {"model_type": "bert"}, "config.json is that of 'bert'"),
    ("config.json", {"text_config": None}, "part of its config is null"),
    ("config.json", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
    ("config.json", {"text_config": {"num_hidden_layers": 3}}, "tensors are missing"),
    ("config.json", b"\xff\0", "not a valid JSON"), ("tokenizer.json", b"[]", "TypeError"),
    ("chat_template.jinja", b"{{ messages[0].role }}", "number of audio inputs"),
    ("model.safetensors", b"<html>" * 99, "SafetensorError"),
    ("model.safetensors", 10000, "incomplete")])
def test_folder_of_a_backbone_with_an_odd_file_is_refused(hub, tmp_path, file, content, words):
    """A dict: what changes in the file. A number: where it is cut."""
    folder = tmp_path / "model"
    shutil.copytree(hub["qwen2-audio"][1], folder)
    if isinstance(content, dict):
        with edited_json(folder / file) as value:
            value |= content
    elif isinstance(content, int):
        os.truncate(folder / file, content)
    else:
        write(folder / file, content)
    with pytest.raises(ValueError, match=words) as error:
        coat = load_coat("qwen2-audio", model_path=folder)
        build_inputs(coat, [noise(1.0)], ["?"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "Qwen/Qwen2-Audio-7B-Instruct", "."])
def test_name_of_nothing_names_what_there_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no run.* qwen2-audio .Qwen/Qwen2-Audio-7B-Instruct.*tiny"):
        load_coat(name)
    with pytest.raises(InputError, match="no folder 'nowhere'"):
        load_coat("qwen2-audio", model_path="nowhere")


def test_block_in_a_template_is_dropped_whatever_code_wrote_it(hub, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(hub["qwen2-audio"][1], folder)
    template = load_coat("qwen2-audio", folder).processor.chat_template
    other = "{# the thinking block #}{{ raise_exception('other code') }}"
    write(folder / "chat_template.jinja", template + other)
    assert load_coat("qwen2-audio", folder).processor.chat_template == template


@pytest.mark.parametrize("part", ["audio_tower.conv2.weight", "layers.1.mlp.up_proj", "lm_head"])
def test_states_that_are_no_numbers_are_an_error_and_no_answer(part, hub):
    coat = load_coat(*hub["qwen2-audio"])
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


def test_text_thinking_adapter_of_another_model_is_refused(text_think, tmp_path):
    folder = tmp_path / "think"
    shutil.copytree(text_think.folder, folder)
    torch.save({"elsewhere.bias": text_think.bias}, folder / "non_lora_trainables.bin")
    assert "elsewhere.bias" in run("infer.py", *text_think.ask, folder, fails=True)
    os.remove(folder / "non_lora_trainables.bin")
    assert "non_lora_trainables.bin" in run("infer.py", *text_think.ask, folder, fails=True)


@pytest.mark.parametrize("package, code, words", [
    ("torchaudio", "raise OSError('undefined symbol: torch_x')", "undefined symbol.*torchaudio 2"),
    ("torchaudio", "raise ImportError('no CUDA 12')", "no CUDA 12 .beside.*torch 2"),
    ("peft", "import no_such_package", "No module named 'no_such_package'")])
def test_library_that_does_not_import_is_one_line(package, code, words, tmp_path):
    write(tmp_path / f"{package}.py", code)
    done = subprocess.run([sys.executable, "-c", "import model"], cwd=HERE, capture_output=True,
                          text=True, timeout=100, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and re.fullmatch(f"error: .*{words}.*\n", done.stderr)


def test_transformers_that_is_too_old_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(model.transformers, "__version__", "5.9.1")
    line = "^error: transformers 5.9.1 is too old; pip install -U 'transformers>=5.23'$"
    with pytest.raises(SystemExit, match=line):
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
    monkeypatch.setenv("COAT_TRACEBACK", "1")
    sys.excepthook(type(error), error, None)
    assert type(error).__name__ in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# What goes wrong: weights of an expert

class Small(Expert):
    """An expert of two numbers."""
    sample_rate = 16000
    frame_rate = 100.0
    dim = 1
    hop = 160
    filename = "small.pt"
    url = "http://127.0.0.1:9/small.pt"    # nobody listens

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(1, 1)

    def features(self, wave):
        return self.map(wave[::160, None])


def saved(value):
    """The bytes that torch.save makes of it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def small_file(weight=1.0):
    """The bytes of a file of Small; further tensors are ignored."""
    tensors = {"map.weight": torch.full((1, 1), weight).double(), "map.bias": torch.zeros(1).half()}
    return saved({"state_dict": {"model": tensors | {"ema": torch.zeros(9)}}})


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Registers Small. -> where its file would be"""
    monkeypatch.setitem(EXPERTS, "small", Small)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints" / "small.pt"


@contextlib.contextmanager
def weights_server(payload, monkeypatch):
    """Serves them as the weights of Small. -> the requests so far"""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", len(payload))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        monkeypatch.setattr(Small, "url", f"{url}/small.pt")
        yield asked


def test_weights_are_fetched_once_for_all_processes_and_loaded_as_float32(small, monkeypatch):
    with weights_server(small_file(), monkeypatch) as asked, ThreadPoolExecutor(2) as pool:
        experts = list(pool.map(load, ["small"] * 2))
    assert asked == ["/small.pt"] and small.read_bytes() == small_file()
    assert {p.dtype for expert in experts for p in expert.parameters()} == {torch.float32}


def test_download_of_another_digest_is_not_kept(small, monkeypatch):
    monkeypatch.setattr(Small, "sha256", "0" * 64)
    with weights_server(small_file(), monkeypatch):
        with pytest.raises(RuntimeError, match="^small: .* invalid hash value [^\n]*$"):
            load("small")
    assert not small.exists()


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), (b"", "EOFError"), (b"<html>", "Weights only load failed"),
    (small_file()[:900], "failed reading zip archive"),
    (pickle.dumps({"model": os.system}, 2), "Weights only load failed"),
    (saved([1]), "AttributeError"),
    (saved({"map.weight": torch.ones(1)}), "2 of 2 tensors are missing or of another shape"),
    (small_file(math.nan), "it gives NaN or infinity")])
def test_file_that_is_no_expert_is_named_in_one_line(content, words, small, tmp_path):
    path = tmp_path / "file.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RuntimeError) as error:
        load("small", path)
    line = str(error.value)
    assert line.startswith(f"small: cannot load {path} (") and words in line and "\n" not in line
    assert "--expert-small PATH" in line and "weights_only" not in line


def test_missing_weights_say_where_to_get_them(small, monkeypatch):
    with pytest.raises(RuntimeError, match="refused.* small.pt of http://127.0.0.1:9/small.pt. "):
        load("small")
    monkeypatch.setattr(experts, "__file__", str(small))    # as if copied alone
    with pytest.raises(RuntimeError, match="basic_pitch_icassp2022.npz of the repository"):
        load("pitch")


@pytest.mark.parametrize("wave", [
    torch.zeros(0), torch.zeros(2, 800), torch.zeros(800).double(), torch.zeros(800).half(),
    torch.zeros(800).short(), torch.full((800,), math.nan), torch.full((800,), 1e30),
    torch.full((800,), 9830.0)])
def test_wave_that_is_none_is_refused_by_an_expert_in_one_line(wave):
    with pytest.raises(ValueError, match=r"^Affect takes a wave .* in \[-1, 1\][^\n]*\Z"):
        an_expert("affect")(wave)


def test_features_that_are_not_finite_give_no_scale(two_heads):
    """A NaN among the first clips would stay in the scales for good."""
    clips = [torch.zeros(5, 8), torch.full((5, 8), math.nan)]
    with pytest.raises(ValueError, match="^expert 'recon' gives NaN or infinity"):
        two_heads[0].calibrate("recon", clips)


def test_missing_expert_stops_a_run_before_its_first_step(tmp_path):
    error = run("train.py", *QUICK, "--stage", "2:all", "--expert-speech", tmp_path / "no.pt",
                "--out", tmp_path / "run", fails=True)
    assert "no.pt" in error and not (tmp_path / "run" / "log.jsonl").exists()


def test_random_experts_of_a_run_are_announced(all_five):
    process, _ = all_five
    ended(process)
    assert open(process.log).read().count("RANDOM WEIGHTS") == 3


def test_check_goes_on_after_a_missing_expert(shipped, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experts.py", "--check", "--expert-small", str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        experts.main()
    pitch, missing = capsys.readouterr().out.splitlines()
    assert error.value.code == 1 and missing.startswith("error: small: ") and "2112 x" in pitch


# --------------------------------------------------------------------------------------------------
# What goes wrong: programs

def test_error_ends_a_program_in_one_line_without_traceback(bad_clips):
    done = subprocess.run(
        [sys.executable, "infer.py", "ask", "tiny", bad_clips["text.wav"], "?"],
        capture_output=True, text=True, cwd=HERE, timeout=100)
    assert done.returncode == 1 and not done.stdout
    line, = done.stderr.splitlines()
    assert line.startswith("error: ") and "text.wav" in line


def test_out_of_memory_is_one_line_with_the_flags_that_need_less(monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB.")
    monkeypatch.setattr(data, "open_source", unittest.mock.Mock(side_effect=error))
    line = run("train.py", *QUICK, fails=True)
    assert re.fullmatch("error: no memory left .CUDA out of memory.*--micro-tokens 2048.*", line)


@pytest.mark.parametrize("program, flags, words", [
    ("train.py", "--nonsense", "unrecognized arguments: --nonsense"),
    ("train.py", "--backbone gpt", "gpt"), ("train.py", "--resume nowhere", "nowhere"),
    ("train.py", "--data nowhere.jsonl", "nowhere.jsonl"), ("train.py", "--data tones:xyz", "xyz"),
    ("train.py", "--stage x:recon", "--stage"), ("train.py", "--stage 3:ears", "ears"),
    ("train.py", "--stage 3:recon=nan", "--stage"), ("train.py", "--stage 3:recon:-1", "--stage"),
    ("train.py", "--lr nan", "--lr"), ("train.py", "--batch 0", "--batch"),
    ("train.py", "--batch 2.5", "--batch"), ("train.py", "--workers -1", "--workers"),
    ("train.py", "--clip inf", "--clip"), ("train.py", "--warmup 1.5", "--warmup"),
    ("train.py", "--init-from nowhere", "nowhere"),
    ("infer.py", "ask tiny missing.wav ?", "missing.wav"), ("infer.py", "ask nowhere x.wav ?", "no"),
    ("infer.py", "ask tiny x.wav ? --max-new-tokens 9999999", "--max-new-tokens"),
    ("infer.py", "score tiny tones --batch 0", "--batch"),
    ("infer.py", "score tiny tones --workers 9999", "--workers"),
    ("infer.py", "score tiny tones tones:note --out x", "--out takes the answers to one set"),
    ("infer.py", "score runs/x tones --text-think folder", "x"),
    ("infer.py", "probe tiny --data tones --max-new-tokens 0", "--max-new-tokens"),
    ("bench.py", "latency --seeds 0", "--seeds"),
    ("bench.py", "train --head-width -1", "--head-width")])
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


def test_real_backbone_never_runs_on_a_cpu_by_accident(trained, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU for qwen2-audio" in run("infer.py", "ask", "qwen2-audio", trained.clip, "?",
                                           fails=True)


def test_show_says_where_it_cannot_write(trained, tmp_path):
    nowhere = tmp_path / "no" / "x.png"
    error = run("infer.py", "show", trained.folder, trained.clip, "--out", nowhere, fails=True)
    assert str(nowhere) in error


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
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-2"]
    run("train.py", "--resume", tmp_path)
    assert logged(tmp_path, "step") == [1, 2, 3, 4, 5, 6]


def test_signal_to_all_processes_of_a_rank_saves_too(tmp_path):
    process = start(train_in_a_group, tmp_path / "log", *QUICK, "--stage", "999:recon",
                    "--workers", 1, "--out", tmp_path / "run")
    wait_for(process, "step 3/")
    os.killpg(process.pid, signal.SIGTERM)
    ended(process)
    step = logged(tmp_path / "run", "step")[-1]
    assert 3 <= step < 999 and "go on with" in open(process.log).read()
    assert os.path.exists(tmp_path / "run" / f"checkpoint-{step}" / "state.pt")


def test_killed_data_process_ends_the_run_in_one_line_with_a_save(tmp_path):
    process = start(train, tmp_path / "log", *QUICK, "--stage", "999:recon", "--workers", 1,
                    "--out", tmp_path / "run")
    wait_for(process, "step 3/")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    ended(process, status=1)
    step = logged(tmp_path / "run", "step")[-1]
    last = open(process.log).read().strip().splitlines()[-1]
    assert last.startswith("error: DataLoader worker") and f"saved after step {step}" in last
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_stopped_by_a_signal_saves_and_goes_on(tmp_path, monkeypatch, number):
    save = torch.save

    def stopping(*args):
        save(*args)
        os.kill(os.getpid(), number)

    inherited = signal.signal(number, signal.SIG_DFL)    # SIGINT is ignored in a shell's background
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", stopping)
            printed = run("train.py", *QUICK, "--stage", "4:recon", "--save-every", 2,
                          "--out", tmp_path)
    finally:
        signal.signal(number, inherited)
    assert "stopped after step 2; go on with" in printed
    run("train.py", "--resume", tmp_path)
    assert logged(tmp_path, "step") == [1, 2, 3, 4]


def test_run_whose_output_nobody_reads_saves_and_goes_on(tmp_path):
    """As in train.py | head."""
    process = start(train_into_a_closed_pipe, tmp_path / "log", *QUICK, "--stage", "2:recon",
                    "--out", tmp_path / "run")
    ended(process, status=1)
    assert "Broken pipe. The run is saved after step 0; go on with" in open(process.log).read()
    run("train.py", "--resume", tmp_path / "run")
    assert logged(tmp_path / "run", "step") == [1, 2]


def test_start_that_came_to_no_checkpoint_can_be_begun_anew(tmp_path):
    (tmp_path / "log.jsonl").write_text("of a run that was killed before its first checkpoint")
    run("train.py", *QUICK, "--stage", "1:recon", "--out", tmp_path)
    assert logged(tmp_path, "step") == [1]


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
    (["--resume", "run", "--lr", 1], "--lr was 0.002 when the run began"),
    (["--resume", "elsewhere"], "'elsewhere' is no run"),
    (["--out", "run"], "holds checkpoints already"),
    (["--data", "rows.jsonl", "tones", "--stage", "1:recon"], "--data names 2 for 1 stages"),
    (["--stage", "5"], "give STEPS:EXPERTS"), (["--stage", "5:reconn"], "there is no such expert"),
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
    acquire = model.FileLock.acquire
    monkeypatch.setattr(model.FileLock, "acquire", lambda lock, timeout: acquire(lock, timeout=0))
    with model.FileLock("run/.lock"):
        assert "run/.lock" in run("train.py", "--resume", "run", fails=True)


@pytest.mark.parametrize("name", ["state.pt", "heads.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}" * 99, "nan"])
def test_damaged_checkpoint_is_refused_in_one_line(short_run, name, content):
    path = f"run/checkpoint-2/{name}"
    if content == "nan" and name == "state.pt":
        state = torch.load(path, weights_only=True)
        state["optimizer"]["state"][0]["exp_avg"].fill_(math.nan)
        torch.save(state, path)
    elif content == "nan":
        weights = safetensors.torch.load_file(path)
        safetensors.torch.save_file({key: w * math.nan for key, w in weights.items()}, path)
    else:
        os.remove(path)
        if content is not None:
            write(path, content)
    printed = run("train.py", "--resume", "run", fails=True)
    assert printed.startswith("error: ")


# --------------------------------------------------------------------------------------------------
# Harness: backbones. Folders laid out like the real ones on the hub: the real classes, towers with
# their real windows, random weights of next to no width, and a byte-level tokenizer.

# What the released templates render for text and audio (Omni's without pictures and video; AF3's
# puts the sound first wherever it stands). Qwen2-Audio's is in its processor class.
TEMPLATE = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for c in m['content'] if c['type'] == 'audio' %}AUDIO{% endfor %}\
{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN_TOKENS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
BEFORE_5 = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
            "model.": ""}
OF_THE_THINKER = {"model.language_model.": "thinker.model.", "lm_head.": "thinker.lm_head.",
                  "model.": "thinker."}


class Layout(NamedTuple):
    tokens: list             # after the text ones, the audio placeholder first
    spare: int               # rows of the table that no token uses
    seconds: int             # of the feature extractor
    template: str | None
    renames: dict            # how names begin in the model: how in the files; the first that fits


LAYOUTS = {
    "qwen2-audio": Layout(QWEN_TOKENS, 20, 30, None, BEFORE_5),
    "qwen2.5-omni": Layout(QWEN_TOKENS, 20, 300,
                           TEMPLATE.replace("AUDIO", "<|audio_bos|><|AUDIO|><|audio_eos|>"),
                           OF_THE_THINKER),
    "audio-flamingo-3": Layout(["<sound>", "[BOS]", "[PAD]"], 0, 30,
                               TEMPLATE.replace("AUDIO", "<sound>"), BEFORE_5),
}


def tiny_hub(name, folder):
    """Writes config, weights, tokenizer, feature extractor and chat template of a backbone."""
    layout = LAYOUTS[name]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *layout.tokens]
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()) + special)}
    named = {}
    if layout.tokens == QWEN_TOKENS:
        named = dict(zip(("audio_token", "audio_bos_token", "audio_eos_token"), QWEN_TOKENS))
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], extra_special_tokens=special[1:],
        pad_token=special[0] if named else "[PAD]", model_specific_special_tokens=named)
    tokenizer.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=layout.seconds, return_attention_mask=True)
    extractor.save_pretrained(folder)
    if layout.template:
        write_json(os.path.join(folder, "chat_template.json"), {"chat_template": layout.template})

    model_class, config = tiny_config(name, vocab[layout.tokens[0]], len(vocab) + layout.spare)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = model_class(config).state_dict()
    published = {}
    for key, value in weights.items():
        begin = next(begin for begin in layout.renames if key.startswith(begin))
        published[layout.renames[begin] + key[len(begin):]] = value.contiguous()
    config = config.to_dict() | {"architectures": [model_class.__name__]}
    if name == "qwen2.5-omni":
        config = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni",
                  "thinker_config": config}
        published["talker.model.norm.weight"] = torch.ones(8)
        published["token2wav.code2wav_bigvgan_model.x"] = torch.ones(8)
    write_json(os.path.join(folder, "config.json"), config)
    safetensors.torch.save_file(published, os.path.join(folder, "model.safetensors"),
                                metadata={"format": "pt"})


def tiny_config(name, audio_id, vocab_size):
    """(class, config) of a backbone of two narrow layers."""
    text = dict(vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2 if name == "qwen2-audio" else 1,
                max_position_embeddings=8192, initializer_range=64 ** -0.5, pad_token_id=None)
    audio = dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
                 initializer_range=128 ** -0.5)
    if name == "qwen2-audio":
        config = transformers.Qwen2AudioConfig(
            text_config=text, audio_config=audio, audio_token_index=audio_id)
        return transformers.Qwen2AudioForConditionalGeneration, config
    if name == "audio-flamingo-3":
        config = transformers.AudioFlamingo3Config(
            text_config=text, audio_config=audio, audio_token_id=audio_id)
        return transformers.AudioFlamingo3ForConditionalGeneration, config
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6,
                               "mrope_section": [4, 6, 6]}    # of a head's width / 2
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=text, audio_config=audio | {"output_dim": 64}, vision_config=vision,
        audio_token_index=audio_id, image_token_index=1, video_token_index=2,
        initializer_range=64 ** -0.5)
    config.vision_start_token_id = 3    # a field of the published config, not of the class
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration, config


def tiny_whisper(folder):
    """A Whisper of the real window and next to no width, as its makers' folders lie."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        init_std=32 ** -0.5)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def tiny_llama(folder):
    """A text model with tied embeddings, no spare rows and the tokens of ChatML."""
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()) + special)}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special,
                                            pad_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        max_position_embeddings=8192,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=64 ** -0.5,
        tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """{key of `coat`: (name, model_path)}; tiny has no files"""
    folder = tmp_path_factory.mktemp("hub")
    folders = {"tiny": ("tiny", None), "composed": ("qwen2-audio", str(folder / "composed"))}
    tiny_whisper(folder / "whisper")
    tiny_llama(folder / "llama")
    compose = runpy.run_path(str(HERE / "docs/compose.py"))["compose"]
    compose(str(folder / "whisper"), str(folder / "llama"), str(folder / "composed"))
    for name in REAL:
        folders[name] = name, str(folder / name)
        tiny_hub(name, folder / name)
    return folders


def loaded(key, hub, **kwargs):
    """A CoAT with adapters that do something (a fresh LoRA is zero)."""
    torch.manual_seed(1)
    coat = load_coat(*hub[key], trainable=True, train_projector=key == "composed", **kwargs)
    coat.where = key
    with torch.no_grad():
        for name, p in coat.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                p.add_(0.05 * torch.randn_like(p))
    return coat.eval()


@pytest.fixture(scope="session", params=[*BACKBONES, "composed"])
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
    load_coat(str(folder / "adapter")).merge().save(folder / "merged")
    batch = build_inputs(coat, [noise(1.0), noise(31, 5)], ["Which?", "Which note is it?"])
    return SimpleNamespace(adapter=str(folder / "adapter"), merged=str(folder / "merged"),
                           batch=batch, said=greedy(coat, batch))


@pytest.fixture(scope="session")
def text_think(hub, tmp_path_factory):
    """The adapter of Audio Flamingo 3's authors for thinking in text, in its old layout."""
    name = "audio-flamingo-3"
    folder = tmp_path_factory.mktemp("think")
    ours = loaded(name, hub)
    ours.lm.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_model.safetensors"
    old = {}
    for key, value in safetensors.torch.load_file(path).items():
        if "lora" in key:
            old[key.replace("model.model.language_model", "model.language_model.model")] = value
    safetensors.torch.save_file(old, path, metadata={"format": "pt"})
    with edited_json(folder / "adapter_config.json") as config:
        config["trainable_token_indices"] = None
    bias = torch.randn(64)
    torch.save({"base_model.model.multi_modal_projector.linear_2.bias": bias},
               folder / "non_lora_trainables.bin")
    ask = ["ask", name, HERE / "assets/clips/cow.flac", "?", "--workers", 0, "--device", "cpu",
           "--model-path", hub[name][1], "--max-new-tokens", 2, "--json", "--text-think"]
    return SimpleNamespace(ours=ours, folder=str(folder), bias=bias, ask=ask)


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


@contextlib.contextmanager
def watched(coat):
    """A list that grows by "audio tower", and by the length of each input to the language model."""
    calls = []

    def tower_runs(module, args, kwargs):
        calls.append("audio tower")

    def language_model_runs(module, args, kwargs):
        calls.append(kwargs["inputs_embeds"].shape[1])

    inner = coat.hf.model
    hooks = [inner.audio_tower.register_forward_pre_hook(tower_runs, with_kwargs=True),
             inner.language_model.register_forward_pre_hook(language_model_runs, with_kwargs=True)]
    yield calls
    for hook in hooks:
        hook.remove()


def forward_and_projected(coat, batch):
    """What `coat` gives for a batch, and what the last module before the language model gave."""
    inner = coat.hf.model
    last = inner.audio_tower.proj if coat.name == "qwen2.5-omni" else inner.multi_modal_projector
    kept = []
    hook = last.register_forward_hook(lambda module, args, out: kept.append(out))
    out = coat(batch)
    hook.remove()
    return out, kept[0]


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
    filled = {}
    for key, value in module.state_dict().items():
        if "num_batches" not in key:
            name = official_name(module, key)
            filled[name] = fill(name, value.shape)
    return filled


def official_name(module, key):
    for pattern, replacement in module.KEYS:
        key = re.sub(pattern, replacement, key)
    return key


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
    wav(folder, "zero_samples.wav", tone[:0])
    wav(folder, "nan.wav", np.where(t == 8000, np.nan, tone), subtype="FLOAT")
    wav(folder, "short.wav", tone[:320])
    wav(folder, "long.wav", np.zeros(121 * 8000, np.float32), 8000)
    whole = wav(folder, "cut.flac", np.random.default_rng(0).standard_normal(160000) / 8)
    os.truncate(whole, os.path.getsize(whole) // 2)
    return {name: str(folder / name) for name in BAD_CLIPS}


def lay_out(root, files):
    for name, content in files.items():
        write(root / name, content)


def iemocap(root, session, labels):
    """A dialog of this session, one turn for each label, as IEMOCAP lays it out."""
    dialog = f"Ses0{session}F_impro01"
    text = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    folder = root / f"Session{session}"
    for i, label in enumerate(labels):
        turn = f"{dialog}_F{i:03}"
        write(folder / "sentences" / "wav" / dialog / f"{turn}.wav", "")
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
            if raw or isinstance(reply, int):
                self.wfile.write(b"sk-secret is wrong" if isinstance(reply, int) else reply.encode())
            else:
                answer = {"choices": [{"message": {"content": reply}}],
                          "usage": {"prompt_tokens": 300, "completion_tokens": 50}}
                self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        yield f"{url}/v1", seen


# --------------------------------------------------------------------------------------------------
# Harness: programs run in other processes. They fork from a server that has the imports done; a
# fork of this process, which has used its threads, could not train.

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
    two_ranks/ and killed/, which lacks its end. The rows are uneven in all ways: first rank 0 gets
    text alone, then rank 1 a clip of NaN."""
    folder = tmp_path_factory.mktemp("mixed")
    path = manifest(folder, [0.4 + 0.17 * i for i in range(9)] + [2])
    wav(folder, "9.wav", np.full(32000, np.nan), subtype="FLOAT")
    text = [{"audio": None, "prompt": "Say " + "it " * i, "response": "yes"} for i in range(6)]
    write_lines(path, text + read_lines(path))
    assert (plan_stage(Manifest(path), 2, 8, 0, 0)[0] < 6).sum() == 6

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
