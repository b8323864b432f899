"""What thinking costs: base, CoAT and text chain of thought in one engine (paper, tables 2 and E).

    python bench.py latency --plot latency.png                         # tiny, on any machine
    python bench.py latency --backbone qwen2-audio --random-weights    # full size, no download
    python bench.py latency --model runs/tiny --data tones:note:20     # to the end token (table 2)
    python bench.py train       # training steps against the plain way, and each teacher's share
    python bench.py loss        # output head and loss at Qwen2-Audio's vocabulary
    python bench.py scale       # cost against audio length and number of ranks, with exponents
    python bench.py facts       # sizes of the full backbones and heads, without their weights

The audio is noise, but for --data. What is compared takes turns, after one that is not counted.
What the hardware could do is measured first, for figures as a share of it. The last line printed is
a JSON object.
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from statistics import mean, median, pstdev
from typing import Callable, NamedTuple

import numpy as np
import torch
import transformers

from data import Rows, collate, open_source, plan_stage, teacher_targets, to_device
from experts import EXPERTS, ExpertUnavailable, load
from heads import ExpertHeads, heads_for
from model import (BACKBONES, COUNT, MIN_SECONDS, SAMPLE_RATE, CoAT, InputError, TooLong,
                   add_adapters, add_think_tokens, build_config, build_inputs, build_processor,
                   check_seconds, latest_checkpoint, load_coat, load_text_think,
                   mixed_precision, need, one_line_errors, usable_device, whole)

# Seconds of audio. Table E has five ranges from 0 to 120 s; the text that we have of the paper does
# not give the bounds between them, so these are ours.
RANGES = ((MIN_SECONDS, 5), (5, 10), (10, 30), (30, 60), (60, 120))

# What to try where memory runs out.
LESS_MEMORY = {
    "latency": "shorter clips or, without --data, --batch 1",
    "train": "--batch 1, --checkpointing or --head-width 1024",
    "loss": "fewer --tokens, or a smaller --hidden",
    "scale": "shorter --seconds or fewer --ranks",
    "facts": "nothing else running",
}

# Flags of latency that only noise has, or only --data, and what they are unless given.
NOISE_FLAGS = {"seconds": None, "answer_tokens": 20, "cot_tokens": 100, "samples": 1, "batch": 1}
DATA_FLAGS = {"max_new_tokens": 256, "text_think": None}


class Noise:
    """A source as in data.py: n rows of noise of `low` to `high` seconds."""

    skipped = ()

    def __init__(self, n, low, high):
        # Evenly spread, in an order without pattern (golden-ratio steps).
        self.lengths = low + (high - low) * (np.arange(n) * 0.6180339887 % 1)

    def __len__(self):
        return len(self.lengths)

    def load(self, i):
        generator = torch.Generator().manual_seed(int(i))
        wave = 0.1 * torch.randn(round(self.lengths[i] * SAMPLE_RATE), generator=generator)
        return {"wave": wave, "rate": SAMPLE_RATE, "prompt": "What is heard?", "response": "x" * 40}


def load_student(args, trainable):
    torch.manual_seed(0)
    return load_coat(args.backbone, model_path=args.model_path, trainable=trainable,
                     device=args.device, random=args.random_weights)


def noise_batch(coat, n, seconds, device, **options):
    """n rows of noise of `seconds` each, as a batch; options as in data.collate."""
    source = Noise(n, seconds, seconds)
    rows = [source.load(i) for i in range(n)]
    return to_device(collate(rows, coat.spec, **options), device)


def print_json(args, found):
    """The last line, at once: a full disk or a closed pipe would else show only at the very end."""
    print(json.dumps({"bench": args.command} | found), flush=True)


def read_seconds(text):
    """The seconds of a flag such as 2.5,20. Raises InputError."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as e:
        raise InputError(f"'{text}' is no list of seconds; give such as 2.5,20") from e
    for seconds in values:
        check_seconds(seconds, "a clip of the flags")
    return values


# --------------------------------------------------------------------------------------------------
# Time, memory, hardware

def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, device):
    begin = now(device)
    function()
    return now(device) - begin


def median_seconds(functions, device, repeats=5):
    """The median for each function; they take turns, and the first turn is not counted."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, counted in zip(functions, times):
            seconds = seconds_of(function, device)
            if turn > 0:
                counted.append(seconds)
    return [median(counted) for counted in times]


def resident_peak():
    """MiB, the most that was resident since the last reset, on Linux."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024


def peak_mib(function, device):
    """How far memory rises while `function` runs: what is allocated on a GPU, what is resident on
    Linux, else, or where that is not allowed, NaN."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20

    if not sys.platform.startswith("linux"):
        return math.nan

    ctypes.CDLL(None).malloc_trim(0)    # gives back what is free already
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")             # the peak becomes what is resident now
    except OSError:                     # some containers forbid it
        return math.nan
    before = resident_peak()
    function()
    return resident_peak() - before


def hardware(device):
    """{machine, flops: FLOP/s of a matrix product, bandwidth: bytes/s of a copy, read and written},
    measured here and now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        n = 16384    # some 10 ms on an H100, beside which a launch is nothing
        copied = 2 ** 28
        dtype = torch.bfloat16
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
        n = 1024
        copied = 2 ** 26
        dtype = torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    source = torch.ones(copied, device=device)    # untouched memory would not really be read
    target = torch.empty_like(source)
    product, copy = median_seconds([lambda: a @ b, lambda: target.copy_(source)], device)

    flops = 2 * n ** 3 / product
    bandwidth = 2 * source.nbytes / copy
    print(f"{name}: measured {flops / 1e12:.3g} TFLOP/s and {bandwidth / 1e9:.3g} GB/s")
    return {"machine": name, "flops": flops, "bandwidth": bandwidth}


# --------------------------------------------------------------------------------------------------
# latency: first token, decoding and total

def prefill_flops(coat, batch):
    """2 a weight and position, 4 a channel and pair of positions; causal: half of the pairs."""
    B, T = batch["input_ids"].shape
    audio = coat.hf.config.audio_config
    if hasattr(audio, "n_window"):    # Omni: the clip without padding, attention in blocks
        positions = 2 * int(batch["n_audio"].sum())
        reach = audio.n_window
    else:                             # whole windows, with half as many positions as log-mel frames
        windows, _, frames = batch["audio"]["input_features"].shape
        positions = windows * frames // 2
        reach = frames // 2
    weights = count(coat.hf.model.audio_tower.parameters())
    tower = positions * (2 * weights + 4 * audio.encoder_layers * audio.d_model * reach)
    text = coat.hf.config.get_text_config()
    pairs = text.num_hidden_layers * text.hidden_size * T // 2
    return tower + B * T * (2 * coat.decoder_weights + 4 * pairs)


def decode_bytes(coat, batch, n_tokens):
    """What a step has to read: decoder, output head, keys and values up to the answer's middle."""
    B, T = batch["input_ids"].shape
    head = coat.hf.lm_head.weight
    text = coat.hf.config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    kept = 2 * text.num_hidden_layers * head_dim * text.num_key_value_heads    # of a position
    numbers = coat.decoder_weights + head.numel() + kept * B * (T + n_tokens / 2)
    return head.element_size() * numbers


class Arm(NamedTuple):
    """A way to an answer."""
    coat: CoAT
    answer: Callable     # our_answer or their_answer
    think: bool          # whether the prompt has the block
    n_tokens: int        # to decode
    stop: bool = False   # after the end token; n_tokens is then the most
    suffix: str = ""     # of the question, which asks to think in text


def our_answer(arm, batch, device):
    """(seconds to the first token, seconds for the others, ids (B, decoded))"""
    ids = []
    begin = now(device)
    for token in arm.coat.stream(batch, arm.n_tokens, arm.stop):
        ids.append(token)
        if len(ids) == 1:
            first = now(device)
    end = now(device)
    return first - begin, end - first, torch.stack(ids, 1)


def their_answer(arm, batch, device):
    """The same with the generate() of transformers, as greedy as ours: the settings that come with
    a backbone may have a penalty on repetition and other end tokens."""
    first = []

    def clock(ids, scores):
        if not first:
            first.append(now(device))
        return scores

    coat = arm.coat
    begin = now(device)
    ids = coat.hf.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        **coat.audio_inputs(batch), do_sample=False, repetition_penalty=1.0,
        max_new_tokens=arm.n_tokens, min_new_tokens=0 if arm.stop else arm.n_tokens,
        suppress_tokens=coat.think_ids, eos_token_id=coat.eos_ids,
        pad_token_id=coat.processor.tokenizer.pad_token_id,
        logits_processor=transformers.LogitsProcessorList([clock]))
    end = now(device)
    return first[0] - begin, end - first[0], ids[:, batch["input_ids"].shape[1]:]


@contextlib.contextmanager
def tower_clock(coat, device):
    """A list of the seconds that the audio tower and its projector took, as they come.

    To wait for the GPU there costs next to nothing: the backbones do, to count audio tokens."""
    began = {}
    took = []

    def start(module, inputs):
        began[module] = now(device)

    def stop(module, inputs, output):
        took.append(now(device) - began[module])

    hooks = []
    for name in ("audio_tower", "multi_modal_projector"):    # Omni's projector is in its tower
        module = getattr(coat.hf.model, name, None)
        if module is not None:
            hooks.append(module.register_forward_pre_hook(start))
            hooks.append(module.register_forward_hook(stop))
    try:
        yield took
    finally:
        for hook in hooks:
            hook.remove()


def same_until_eos(eos, ours, theirs):
    """Whether ids (B, decoded) agree up to the eos. Without a stop ours goes on after it, theirs
    may not end."""
    if ours.shape != theirs.shape:
        return False
    alive = torch.isin(ours, eos).cumsum(1) == 0
    return torch.equal(ours[alive], theirs[alive])


def measure_answer(arm, rows, args, machine):
    """One answer to the loaded rows: tokens (prompt, block, decoded), ms (first: tower + prefill,
    decoding, total), shares of what the hardware could do (prefill_at, decoding_at) and of the rows
    with an end token (ended), seconds of audio, and the ids. The clock starts when the batch is on
    the device: reading files and log-mel features are not in it."""
    coat = arm.coat
    rows = [row | {"prompt": row["prompt"] + arm.suffix} for row in rows]
    batch = collate(rows, coat.spec, think=arm.think, responses=False)
    batch = to_device(batch, args.device)
    with tower_clock(coat, args.device) as tower:
        first, rest, ids = arm.answer(arm, batch, args.device)
    n = ids.shape[1]
    ended = torch.isin(ids, torch.tensor(coat.eos_ids, device=args.device)).any(1)
    return {
        "prompt": batch["input_ids"].shape[1],
        "block": int(batch["n_audio"][0]) + 2 if arm.think else 0,
        "decoded": n,
        "tower": 1e3 * sum(tower),
        "prefill": 1e3 * (first - sum(tower)),
        "first": 1e3 * first,
        "decoding": 1e3 * rest,
        "total": 1e3 * (first + rest),
        "prefill_at": prefill_flops(coat, batch) / machine["flops"] / first,
        "decoding_at": decode_bytes(coat, batch, n) / machine["bandwidth"] * (n - 1) / rest,
        "ended": ended.float().mean().item(),
        "seconds": batch["seconds"] / len(rows),
        "ids": ids}


def measure_arms(arms, clips, args, machine):
    """{arm: [its answers]}. The arms take turns on each of the clips, which are (seed, rows); those
    of seed -1 warm up."""
    answers = {name: [] for name in arms}
    for seed, rows in clips:
        for name, arm in arms.items():
            answer = measure_answer(arm, rows, args, machine)
            if seed >= 0:
                answers[name].append(answer | {"seed": seed})
    return answers


def noise_clips(low, high, args):
    """Yields (seed, rows): `--samples` times for each seed, `--batch` clips of one length."""
    for seed in range(-1, args.seeds):
        draw = random.Random(seed)
        for _ in range(args.samples if seed >= 0 else 1):
            seconds = draw.uniform(low, high)
            source = Noise(args.batch, seconds, seconds)
            yield seed, [source.load(i) for i in range(args.batch)]


def data_clips(source, usable, args):
    """Yields (seed, [row]) of the usable rows, once for each seed. The longest warms up, so that
    what does not fit in memory fails at once."""
    longest = max(usable, key=lambda i: source.lengths[i])
    yield -1, [source.load(longest)]
    for seed in range(args.seeds):
        for i in usable:
            yield seed, [source.load(i)]


def usable_clips(source, coat):
    """([numbers of the rows that can be asked], {why: how many others}); says what is wrong with
    those that have a fault. Raises InputError if none can be."""
    left_out = {"too long": 0, "unreadable": 0, "without audio": 0}
    known = dict(source.skipped)
    usable = []
    for i in range(len(source)):
        row = known.get(i) or Rows(source)[i]
        batch = collate([row], coat.spec, responses=False)
        if batch["skipped"]:
            error, = batch["skipped"]
            print(f"left out, row {i}: {error}")
            left_out["too long" if isinstance(error, TooLong) else "unreadable"] += 1
        elif "wave" not in row:
            left_out["without audio"] += 1
        else:
            usable.append(i)
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not usable:
        raise InputError(f"--data: no row is left to ask ({why}); give rows with audio")
    print(f"{len(usable)} rows; left out: {why}")
    return usable, left_out


def summarise(answers, seeds):
    """Each figure's median of the clips, and mean and deviation of the seeds' means."""
    row = {}
    for key in ("prompt", "block", "decoded", "tower", "prefill", "first", "decoding", "total",
                "prefill_at", "decoding_at", "ended"):
        of_seeds = []
        for seed in range(seeds):
            of_seeds.append(mean(a[key] for a in answers if a["seed"] == seed))
        row[key] = median(a[key] for a in answers)
        row[f"{key}_mean"] = mean(of_seeds)
        row[f"{key}_sd"] = pstdev(of_seeds)
    return row


def compare_arms(answers, eos):
    """Medians of ratios, taken clip by clip so that the clips' lengths fall out."""
    def ratio(key, arm, other):
        pairs = zip(answers[arm], answers[other])
        return median(a[key] / b[key] for a, b in pairs)

    both = list(zip(answers["CoAT"], answers["generate"]))
    speeds = []
    for a, b in both:
        if a["decoded"] > 1 and b["decoded"] > 1:    # else there is no step
            steps = (a["decoded"] - 1) / (b["decoded"] - 1)
            speeds.append(steps * b["decoding"] / a["decoding"])
    return {
        "prompt": ratio("prompt", "CoAT", "base"),
        "first": ratio("first", "CoAT", "base"),
        "total": ratio("total", "CoAT", "text-CoT"),
        "first_generate": ratio("first", "CoAT", "generate"),
        "speed_generate": median(speeds) if speeds else math.nan,
        "clips": len(both),
        "same_ids": sum(same_until_eos(eos, a["ids"], b["ids"]) for a, b in both)}


def settle_flags(args):
    """Fills in what was not given. Raises InputError on a flag that would not be read."""
    refused, mode = (NOISE_FLAGS, "with") if args.data else (DATA_FLAGS, "without")
    for name in refused:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} has no meaning {mode} --data; drop it")
    for name, value in (NOISE_FLAGS | DATA_FLAGS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.random_weights and (args.model or args.text_think):
        raise InputError("--model and --text-think bring weights; drop --random-weights")


def load_arms(args):
    """{name: Arm}. Two or three of them may share a model."""
    if args.model:
        ours = load_coat(adapter=latest_checkpoint(args.model), model_path=args.model_path,
                         device=args.device).merge()
        plain = load_coat(ours.name, model_path=ours.model_path, device=args.device)
    else:
        ours = plain = load_student(args, trainable=False)
    text = plain
    if args.text_think:
        text = load_text_think(ours.name, args.text_think, ours.model_path, args.device)
    if args.compile:
        for coat in {ours, plain, text}:
            coat.compile_decode()

    if args.data:
        suffix = text.backbone.text_think
        short = long = args.max_new_tokens
    else:
        suffix = ""
        short = args.answer_tokens
        long = args.cot_tokens + short
    stop = bool(args.data)
    return {
        "base": Arm(plain, our_answer, False, short, stop),
        "CoAT": Arm(ours, our_answer, True, short, stop),
        "text-CoT": Arm(text, our_answer, False, long, stop, suffix),
        "generate": Arm(ours, their_answer, True, short, stop)}


def print_weights(arms, args):
    """Says which arms' answers mean nothing, so that only their times count; -> {arm: weights}"""
    weights = {}
    timed = []
    for name, arm in arms.items():
        coat = arm.coat
        if coat.think or (args.model and arm.think):
            weights[name] = "trained"
        elif args.random_weights or not (coat.model_path or coat.backbone.hub_id):
            weights[name] = "random"
        elif arm.suffix and coat is not arms["base"].coat:
            weights[name] = "its authors' adapter"
        else:
            weights[name] = "released"
        if weights[name] == "random" or coat.think != arm.think:
            timed.append(name)
    print("Weights: " + ", ".join(f"{name} {kind}" for name, kind in weights.items()) + ".")
    if timed:
        print(f"Of {', '.join(timed)} only the times mean something, not what is said or when it "
              "ends: their weights are random,\nor their training had the block where the prompt "
              "has none, or the reverse.")
    return weights


NOISE_HEAD = """\
{backbone}, batch {batch}: answers of {answer_tokens} tokens, text-CoT after {cot_tokens} of \
reasoning."""
RANGES_NOTE = """\
Ranges: 0 to 120 s in five, as in table E; the bounds between them are ours (our text of the paper \
has none)."""
DATA_HEAD = """\
{backbone}, rows of {data} one by one: answers to the end token, which counts, or \
{max_new_tokens} tokens."""
LATENCY_HEAD = """\
generate is that of transformers. Milliseconds: mean (deviation) of {seeds} seeds or runs, median \
of the clips. First
token = audio tower with projector + decoder's prefill; they and counts: mean. at: share of what \
the hardware could do.

    audio arm      prompt block decoded            first token   tower prefill    at\
               decoding    at                  total"""
LATENCY_ROW = (
    "{audio:>9} {arm:8}{prompt_mean:7.0f}{block_mean:6.0f}{decoded_mean:8.1f}"
    "{first_mean:8.1f} ({first_sd:5.1f}){first:7.1f}{tower_mean:8.1f}{prefill_mean:8.1f}"
    "{prefill_at:6.0%}"
    "{decoding_mean:8.1f} ({decoding_sd:5.1f}){decoding:7.1f}{decoding_at:6.0%}"
    "{total_mean:8.1f} ({total_sd:5.1f}){total:7.1f}")
LATENCY_RATIOS = """\
          CoAT / base: prompt {prompt:.2f}, first token {first:.2f}; / text-CoT: total {total:.2f};
          / generate: first token {first_generate:.2f}, tokens/s {speed_generate:.2f}, same ids \
{same_ids} of {clips}
"""


def plan_clips(coat, args):
    """([(label, clips of measure_arms)], what else to report); prints what there is to know."""
    flags = vars(args) | {"backbone": coat.name}
    if args.data:
        source = open_source(args.data)
        print(DATA_HEAD.format(**flags))
        usable, left_out = usable_clips(source, coat)
        clips = data_clips(source, usable, args)
        return [(f"{len(usable)} rows", clips)], {"data": args.data, "left_out": left_out}

    print(NOISE_HEAD.format(**flags))
    plan = []
    if args.seconds:
        for s in read_seconds(args.seconds):
            plan.append((f"{s:.3g} s", noise_clips(s, s, args)))
    else:
        print(RANGES_NOTE)
        for low, high in RANGES:
            plan.append((f"{low:.0f}-{high:.0f} s", noise_clips(low, high, args)))
    return plan, {}


def print_ended(rows):
    """Where few have ended, the count of decoded tokens is that of the limit."""
    shares = [f"{row['arm']} {row['ended_mean']:.0%}" for row in rows]
    print(f"          ended by an end token: {', '.join(shares)}")


def latency(args):
    """First token, decoding and total of base, CoAT, text-CoT and transformers' generate."""
    settle_flags(args)
    if args.plot:
        check_plot(args.plot)
    arms = load_arms(args)
    coat = arms["CoAT"].coat
    eos = torch.tensor(coat.eos_ids, device=args.device)
    machine = hardware(args.device)
    plan, more = plan_clips(coat, args)
    more["weights"] = print_weights(arms, args)
    print(LATENCY_HEAD.format(**vars(args)))

    rows, ratios = [], []
    all_answers = {name: [] for name in arms}
    for audio, clips in plan:
        answers = measure_arms(arms, clips, args, machine)
        for name in arms:
            row = {"audio": audio, "arm": name} | summarise(answers[name], args.seeds)
            print(LATENCY_ROW.format(**row))
            rows.append(row)
            all_answers[name] += answers[name]
        if args.data:
            print_ended(rows)
        ratios.append({"audio": audio} | compare_arms(answers, eos))
        print(LATENCY_RATIOS.format(**ratios[-1]))

    print_json(args, machine | more | {
        "backbone": coat.name, "batch": args.batch, "rows": rows, "ratios": ratios})
    if args.plot:
        plot(all_answers, args.plot, f"{coat.name} on {machine['machine']}")


def check_plot(path):
    """Raises InputError or OSError if no picture can be written there: before the measuring."""
    canvas = need("matplotlib.figure", "matplotlib").Figure().canvas
    kinds = canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in kinds:
        raise InputError(f"--plot {path}: give a name that ends in one of .{', .'.join(kinds)}")
    open(path, "a+b").close()    # without waiting for a pipe, or losing an older picture


def plot(answers, path, title):
    """Latency against the length of the audio, a point a clip. answers: {arm: [its answers]}"""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for arm, color in (("base", "gray"), ("CoAT", "tab:blue"), ("text-CoT", "tab:red")):
        points = sorted((a["seconds"], a["total"], a["first"]) for a in answers[arm])
        seconds, total, first = zip(*points)
        axes.plot(seconds, total, "o-", color=color, markersize=4, label=f"{arm}, whole answer")
        if arm != "text-CoT":    # it has base's
            axes.plot(seconds, first, "o:", color=color, markersize=3, label=f"{arm}, first token")
    axes.set(xlabel="audio, s", ylabel="ms", title=title, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


# --------------------------------------------------------------------------------------------------
# train: steps our way and the plain way, and with experts

def our_loss(coat, batch):
    out = coat(batch)
    return out.ce_sum / out.n_targets


def plain_loss(coat, batch):
    """transformers' own: logits at every position, whatever the labels."""
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    inputs = {name: batch[name] for name in names}
    return coat.hf(**inputs, **coat.audio_inputs(batch), use_cache=False).loss


WAYS = {"ours": our_loss, "plain": plain_loss}


def adamw(*modules):
    """Over what is trained; for time any learning rate will do."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=1e-5, fused=params[0].is_cuda)


def learn(loss, optimizer):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def n_tokens(batch):
    return int(batch["attention_mask"].sum())


def n_slots(batch):
    """Tokens with the padding."""
    return batch["input_ids"].numel()


def divide(row, other):
    """Key by key; NaN over 0, such as the padding of rows that are alike."""
    return {key: row[key] / other[key] if other[key] else math.nan for key in row}


class Trainer:
    """What a training step needs: backbone, teachers with random weights, a head for each task."""

    def __init__(self, args):
        self.coat = load_student(args, trainable=True)
        if args.checkpointing:
            self.coat.checkpoint_activations()
        if args.compile:
            self.coat.compile_layers()

        self.teachers = {}
        if not args.no_teachers:
            for task in EXPERTS:
                self.teachers[task] = load(task, device=args.device, random=True)
        d = self.coat.hf.config.get_text_config().hidden_size
        tasks = ["recon", *self.teachers]
        # Not calibrated, the scales stay 1: that changes the losses and not the time.
        self.heads = heads_for(d, tasks, self.teachers, width=args.head_width).to(args.device)

        self.optimizer = adamw(self.coat, self.heads)
        self.autocast = mixed_precision(args.device)

    def tune(self, way, batch):
        """A step without experts."""
        with self.autocast:
            loss = way(self.coat, batch)
        learn(loss, self.optimizer)

    def step(self, batch, targets):
        """A step with experts."""
        with self.autocast:
            out = self.coat(batch)
            targets = targets | {"recon": out.audio_embeds}
            losses = self.heads(out.think_states, out.valid, targets)
        ce = out.ce_sum / out.n_targets
        learn(ce + sum(losses.values()) / out.valid.sum(), self.optimizer)    # equation 4


def draw_steps(coat, mix, args):
    """{way: [batch a step]} of the same rows, alike in length for ours and shuffled for plain."""
    source = Noise(args.batch * args.steps, mix[0], mix[-1])
    alike = plan_stage(source, args.steps, args.batch, seed=0, stage=0)    # (steps, B) row numbers
    shuffled = np.random.default_rng(0).permutation(alike.ravel()).reshape(alike.shape)
    steps = {}
    for name, plan in (("ours", alike), ("plain", shuffled)):
        batches = [collate([source.load(i) for i in numbers], coat.spec) for numbers in plan]
        steps[name] = [to_device(batch, args.device) for batch in batches]
    return steps


def measure_ways(trainer, mix, args):
    """{way: {rows_per_s, tokens_per_s, padding, peak_mib}, ratio: ..} over the same rows."""
    steps = draw_steps(trainer.coat, mix, args)
    took = dict.fromkeys(WAYS, 0.0)
    for name, way in WAYS.items():    # warms up
        trainer.tune(way, steps[name][0])
    for i in range(args.steps):
        for name, way in WAYS.items():
            took[name] += seconds_of(lambda: trainer.tune(way, steps[name][i]), args.device)

    table = {}
    for name, way in WAYS.items():
        tokens = sum(map(n_tokens, steps[name]))
        largest = max(steps[name], key=n_slots)
        table[name] = {
            "rows_per_s": args.batch * args.steps / took[name],
            "tokens_per_s": tokens / took[name],
            "padding": 1 - tokens / sum(map(n_slots, steps[name])),
            "peak_mib": peak_mib(lambda: trainer.tune(way, largest), args.device)}
    table["ratio"] = divide(table["ours"], table["plain"])
    return table


def measure_experts(trainer, seconds, args, machine):
    """[{seconds, work, s, tokens_per_s, peak_mib, mfu}]: each teacher alone (it has no tokens: 0),
    then a step whose targets are known, and a whole one."""
    teachers = trainer.teachers
    rates = {teacher.sample_rate for teacher in teachers.values()}
    batch = noise_batch(trainer.coat, args.batch, seconds, args.device, rates=rates)
    known = teacher_targets(teachers, batch)
    work = {}
    for task, teacher in teachers.items():
        work[task] = functools.partial(teacher_targets, {task: teacher}, batch)
    work["step, targets known"] = lambda: trainer.step(batch, known)
    work["step"] = lambda: trainer.step(batch, teacher_targets(teachers, batch))

    rows = []
    took = median_seconds(work.values(), args.device, args.repeats)
    for (name, function), s in zip(work.items(), took):
        speed = 0.0 if name in teachers else n_tokens(batch) / s
        rows.append({
            "seconds": seconds, "work": name, "s": s, "tokens_per_s": speed,
            "peak_mib": peak_mib(function, args.device),
            "mfu": 4 * trainer.coat.decoder_weights * speed / machine["flops"]})
    return rows


def print_ways(table, args):
    print(f"{args.backbone}, {args.steps} steps of {args.batch} rows of {args.mix} s, no experts. "
          "Ours: clips alike in length, logits at the answers;\n"
          "plain: random batches, transformers' loss.\n"
          "          rows/s  tokens/s  padding  peak MiB")
    row = "{:8}{rows_per_s:8.2f}{tokens_per_s:10.0f}{padding:9.1%}{peak_mib:10.0f}"
    for name in WAYS:
        print(row.format(name, **table[name]))
    row = "{:8}{rows_per_s:8.2f}{tokens_per_s:10.2f}{padding:9.2f}{peak_mib:10.2f}\n"
    print(row.format("ratio", **table["ratio"]))


def print_experts(rows):
    for row in rows:
        line = "{seconds:7.1f}s {work:19}{s:8.3f}{peak_mib:10.0f}".format(**row)
        if row["tokens_per_s"]:
            line += "{tokens_per_s:10.0f}{mfu:7.1%}".format(**row)
        print(line)
    *_, known, whole = rows
    print(f"         the teachers are {1 - known['s'] / whole['s']:.0%} of a step\n")


def train(args):
    """Training steps against the plain way, then the share of each teacher in a step."""
    mix = read_seconds(args.mix)
    lengths = read_seconds(args.seconds)
    trainer = Trainer(args)
    machine = hardware(args.device)

    table = measure_ways(trainer, mix, args)
    print_ways(table, args)

    width = trainer.heads["recon"].out.in_features
    print(f"Steps of {args.batch} rows with experts, heads at width {width}; MFU counts 4 FLOPs a "
          "decoder weight and token\n"
          "   audio work                seconds  peak MiB  tokens/s    MFU")
    rows = []
    for seconds in lengths:
        found = measure_experts(trainer, seconds, args, machine)
        print_experts(found)
        rows += found
    print_json(args, machine | {
        "backbone": args.backbone, "batch": args.batch, "mix": table, "rows": rows})


# --------------------------------------------------------------------------------------------------
# loss: the output head and the cross-entropy

def build_head_only(hidden, device):
    """A CoAT of Qwen2-Audio's class and vocabulary, without layers."""
    backbone = BACKBONES["qwen2-audio"]
    config = build_config(backbone)
    config.text_config.num_hidden_layers = 0
    config.text_config.hidden_size = hidden
    config.audio_config.encoder_layers = 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        lm = backbone.model_class._from_config(config, dtype=dtype).requires_grad_(False)
    lm.model.language_model.norm.requires_grad_(True)    # a way back through the output head
    processor = build_processor(backbone)
    think_ids = add_think_tokens(lm, processor.tokenizer)
    return CoAT(lm, processor, "qwen2-audio", None, think_ids)


ROUNDED = """\
plain: Qwen2-Audio's class in transformers leaves the logits in bf16, which rounds each \
log-probability to bf16. Ours, and
transformers' other classes, go to fp32 first. By that the losses differ; in fp32 plain would take \
more time and memory."""


def loss(args):
    """Output head and loss, there and back, at Qwen2-Audio's vocabulary against the plain way.

    On a GPU both run under autocast, as in training, and yet differ: see ROUNDED."""
    coat = build_head_only(args.hidden, args.device)
    answer = "x" * (args.targets - 1)    # a token a letter, and the one that ends it
    shortest = n_slots(build_inputs(coat, [None], [""], [answer]))
    if args.tokens <= shortest:
        raise InputError(f"with {args.targets} targets give --tokens at least {shortest + 1}")
    question = "x" * (args.tokens - shortest)
    batch = to_device(build_inputs(coat, [None], [question], [answer]), args.device)
    machine = hardware(args.device)

    def value_of(way):
        with mixed_precision(args.device):
            return way(coat, batch)

    work = {}
    for name, way in WAYS.items():
        work[name] = lambda way=way: value_of(way).backward()
    took = median_seconds(work.values(), args.device, args.repeats)
    rows = {}
    for (name, way), s in zip(WAYS.items(), took):
        rows[name] = {
            "loss": value_of(way).item(), "s": s, "peak_mib": peak_mib(work[name], args.device)}
    rows["plain / ours"] = divide(rows["plain"], rows["ours"])

    vocabulary = coat.hf.lm_head.out_features
    print(f"{vocabulary} x {args.hidden}, {args.tokens} tokens, {args.targets} targets\n"
          "                   loss  seconds  peak MiB")
    for name, row in rows.items():
        print("{:14}{loss:9.5f}{s:9.3f}{peak_mib:10.1f}".format(name, **row))
    if args.device.type == "cuda":
        print(ROUNDED)
    print_json(args, machine | {"hidden": args.hidden, "rows": rows})


# --------------------------------------------------------------------------------------------------
# scale: audio length and ranks

def ranks_speed(n, args):
    """Tokens/s of train.py with 8 rows of synthetic tones on each of `n` ranks of one thread."""
    here = os.path.dirname(os.path.abspath(__file__))
    launcher = [sys.executable]
    if n > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    device = args.device.type if n > 1 else args.device    # of several ranks each has its own GPU
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "run")
        flags = ["--backbone", args.backbone, "--stage", "12:recon", "--batch", 8 * n,
                 "--calibrate", 4, "--heldout", 0, "--threads", 1, "--workers", 0, "--out", out,
                 "--device", device]
        if args.model_path:
            flags += ["--model-path", args.model_path]
        done = subprocess.run([*launcher, "train.py", *map(str, flags)],
                              capture_output=True, text=True, cwd=here)
        if done.returncode:
            why = (done.stderr.strip() or "?").splitlines()[-1]
            raise InputError(f"train.py fails on {n} ranks: {why}")
        with open(os.path.join(out, "log.jsonl")) as file:
            steps = [json.loads(line) for line in file]
    return median(step["tokens_per_s"] for step in steps[2:])    # two warm up


def exponent(x, y):
    """k of y ~ x ** k, a straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure_lengths(coat, lengths, args):
    """[(prefill, training step)] in seconds, of one row of each length."""
    optimizer = adamw(coat)
    print(f"{args.backbone}, one row\n   audio  first token, ms  training step, ms")
    costs = []
    for seconds in lengths:
        prompt = noise_batch(coat, 1, seconds, args.device, responses=False)
        whole = noise_batch(coat, 1, seconds, args.device)
        work = [lambda: next(coat.stream(prompt, 1)),
                lambda: learn(our_loss(coat, whole), optimizer)]
        prefill, step = median_seconds(work, args.device, args.repeats)
        print(f"{seconds:7.1f}s{1e3 * prefill:17.1f}{1e3 * step:19.1f}")
        costs.append((prefill, step))
    return costs


def scale(args):
    """Prefill and training step of one row of growing length; train.py on more and more ranks."""
    lengths = read_seconds(args.seconds)
    coat = load_student(args, trainable=True)
    machine = hardware(args.device)

    costs = measure_lengths(coat, lengths, args)
    fits = {}
    if len(lengths) > 1:
        for name, start in (("all", 0), ("last two", -2)):
            x = lengths[start:]
            fits[name] = [exponent(x, cost[start:]) for cost in zip(*costs)]
            print("cost ~ length to the power of {:.2f} and {:.2f} ({})".format(*fits[name], name))

    ranks = args.ranks
    if args.random_weights:
        print("ranks: not with --random-weights, which train.py does not have")
        ranks = []
    speeds = []
    for n in ranks:
        speeds.append(ranks_speed(n, args))
        share = (speeds[-1] / n) / (speeds[0] / ranks[0])
        print(f"{n} ranks: {speeds[-1]:.0f} tokens/s, a rank {share:.0%} of the first")
    if len(speeds) > 1:
        fits["ranks"] = exponent(ranks, speeds)
        print(f"tokens/s ~ ranks to the power of {fits['ranks']:.2f}")
    print_json(args, machine | {
        "seconds": lengths, "costs": costs, "exponents": fits, "ranks": ranks,
        "tokens_per_s": speeds})


# --------------------------------------------------------------------------------------------------
# facts: sizes

def count(tensors):
    return sum(t.numel() for t in tensors)


def sizes(backbone, head_width):
    """{what: parameters, or GiB of memory in training} of a backbone, without its weights."""
    config = build_config(backbone)
    text = config.get_text_config()
    ids = [backbone.used_ids + i for i in range(3)]
    text.vocab_size = max(text.vocab_size, ids[-1] + 1)    # as add_think_tokens would make it grow
    with torch.device("meta"):
        lm = backbone.model_class(config).requires_grad_(False)
        decoder = count(lm.model.language_model.parameters())
        output_head = count(lm.lm_head.parameters())
        total = count(lm.parameters())
        d = text.hidden_size
        dims = {"recon": d} | {task: expert().dim for task, expert in EXPERTS.items()}
        heads = count(ExpertHeads(d, dims).parameters())
        narrow = count(ExpertHeads(d, dims, width=head_width).parameters())
        lm = add_adapters(lm, backbone, ids)
    trained = [(name, p) for name, p in lm.named_parameters() if p.requires_grad]
    lora = count(p for name, p in trained if "lora_" in name)
    rows = count(p for name, p in trained if "lora_" not in name)

    # Bytes: frozen weights are bf16; trained ones have weight, gradient and AdamW's two moments,
    # all in fp32.
    gib = 2 ** 30
    frozen = 2 * total
    with_heads = 16 * (lora + rows + heads)
    with_narrow = 16 * (lora + rows + narrow)
    return {
        "tower and projector": total - decoder - output_head, "language model": decoder,
        "output head": output_head, "all": total,
        "LoRA of rank 16 (tiny: 32)": lora, "rows of the three tokens": rows,
        "their ids": f"{ids[0]} .. {ids[-1]}",
        "five heads": heads, f"five heads, --head-width {head_width}": narrow,
        "GiB, frozen": frozen / gib, "GiB, trained": with_heads / gib,
        "GiB, sum": (frozen + with_heads) / gib,
        f"GiB, sum, --head-width {head_width}": (frozen + with_narrow) / gib}


def cell(value):
    if isinstance(value, str):
        return f"{value:>20}"
    if isinstance(value, float):
        return f"{value:20,.1f}"
    return f"{value:20,}"


def facts(args):
    """Parameters, token ids and training memory of the full backbones, without their weights."""
    table = {name: sizes(backbone, args.head_width) for name, backbone in BACKBONES.items()}
    print(f"{'parameters':32}" + "".join(map(cell, table)))
    for key in table["tiny"]:
        print(f"{key:32}" + "".join(cell(column[key]) for column in table.values()))
    print("\nGiB a GPU: frozen weights in bf16; trained ones in fp32 with gradient and two Adam "
          "moments. Not counted: activations, the\nteachers, and the copy that peft makes of the "
          "embedding table in every forward.")
    print_json(args, {"backbones": table})


# --------------------------------------------------------------------------------------------------
# The command line

def add_command(commands, run, with_model=True):
    """The add_argument of a new subcommand, called as the function it runs."""
    parser = commands.add_parser(run.__name__, help=run.__doc__,
                                 usage="%(prog)s [flags], see %(prog)s --help")
    parser.set_defaults(run=run)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if with_model:
        parser.add_argument("--backbone", default="tiny", choices=list(BACKBONES))
        parser.add_argument("--model-path", help="a local folder with the backbone, not the hub")
        parser.add_argument("--random-weights", action="store_true", help="full size, no files")
    return parser.add_argument


def add_latency(commands, gpus):
    add = add_command(commands, latency)
    add("--model", metavar="RUN", help="a run of train.py for CoAT and generate; the others have "
        "its backbone as released, whatever --backbone says")
    add("--data", metavar="ROWS", help="rows.jsonl, mixture.json or tones[:KINDS[:ROWS OF EACH]], "
        "each to the end token; default: noise")
    add("--max-new-tokens", type=COUNT, help="data: the most that an answer has "
        f"({DATA_FLAGS['max_new_tokens']}); infer.py score --help has the paper's")
    add("--text-think", metavar="FOLDER", help="data: Audio Flamingo 3's think folder for "
        "text-CoT, which else is the backbone asked to think")
    add("--seconds", help="noise: exact lengths, such as 2.5,20; default: five ranges to 120 s")
    add("--answer-tokens", type=COUNT, help=f"noise ({NOISE_FLAGS['answer_tokens']})")
    add("--cot-tokens", type=COUNT, help=f"noise ({NOISE_FLAGS['cot_tokens']})")
    add("--samples", type=COUNT,
        help=f"noise: clips of a seed in each range ({NOISE_FLAGS['samples']})")
    add("--batch", type=COUNT, help=f"noise: clips at once ({NOISE_FLAGS['batch']})")
    add("--seeds", type=COUNT, default=3, help="of noise, or runs over the data (%(default)s)")
    add("--compile", default=gpus > 0, action=argparse.BooleanOptionalAction,
        help="fuse the kernels of a decoding step")
    add("--plot", metavar="FILE", help="draw latency against the length of the audio")


def checked(args):
    """The flags, if their lists have the numbers that are needed. Raises InputError."""
    if args.command == "train" and len(read_seconds(args.mix)) != 2:
        raise InputError(f"--mix {args.mix}: give two lengths, such as 1,30")
    if args.command == "scale":
        for flag, values in (("--seconds", read_seconds(args.seconds)), ("--ranks", args.ranks)):
            if values != sorted(set(values)):
                raise InputError(f"{flag}: give each number once, the smallest first")
    return args


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gpus = torch.cuda.device_count()

    add_latency(commands, gpus)

    add = add_command(commands, train)
    add("--batch", type=COUNT, default=8, help="rows of a step")
    add("--mix", default="1,30", metavar="S,S", help="shortest and longest clip of the comparison")
    add("--steps", type=COUNT, default=8, help="of the comparison")
    add("--seconds", default="1", help="audio lengths of the steps with experts")
    add("--repeats", type=COUNT, default=2)
    add("--head-width", type=COUNT, help="width inside the heads; default the backbone's")
    add("--no-teachers", action="store_true", help="recon alone")
    add("--checkpointing", action="store_true", help="as in train.py")
    add("--compile", action="store_true", help="as in train.py")

    add = add_command(commands, loss, with_model=False)
    add("--hidden", type=COUNT, default=1024, help="width; Qwen2-Audio's is 4096")
    add("--tokens", type=COUNT, default=800)
    add("--targets", type=COUNT, default=40)
    add("--repeats", type=COUNT, default=3)

    add = add_command(commands, scale)
    add("--seconds", default="1,3,10,30,60,120")
    add("--ranks", type=whole(1, 1024), nargs="*", default=list(range(1, gpus + 1)) or [1, 2])
    add("--repeats", type=COUNT, default=3)

    add = add_command(commands, facts, with_model=False)
    add("--head-width", type=COUNT, default=1024, help="narrow heads, counted beside the full")
    return checked(parser.parse_args())


def main():
    one_line_errors()
    args = parse_args()
    one_line_errors(ExpertUnavailable, less_memory=LESS_MEMORY[args.command])
    args.device = usable_device(args.device)
    args.run(args)


if __name__ == "__main__":
    main()
