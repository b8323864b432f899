"""What thinking costs: base, CoAT and text chain of thought in one engine (paper, tables 2 and E).

    python bench.py latency --plot latency.png                         # tiny, on any machine
    python bench.py latency --backbone qwen2-audio --random-weights    # full size, no download
    python bench.py train       # training steps against the plain way, and each teacher's share
    python bench.py loss        # output head and loss at Qwen2-Audio's vocabulary
    python bench.py scale       # cost against audio length and number of ranks, with exponents
    python bench.py facts       # sizes of the full backbones and heads, without their weights

The audio is noise. What is compared takes turns, after one that is not counted. What the hardware
could do is measured first, for figures as a share of it. The last line printed is a JSON object.
"""
import argparse
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

import numpy as np
import torch
import transformers

from data import collate, plan_stage, teacher_targets, to_device
from experts import EXPERTS, ExpertUnavailable, load
from heads import ExpertHeads
from model import (BACKBONES, SAMPLE_RATE, CoAT, InputError, add_adapters, add_think_tokens,
                   at_least, build_config, build_inputs, build_processor, check_seconds, load_coat,
                   need, one_line_errors, usable_device)

RANGES = ((0.1, 5), (5, 10), (10, 30), (30, 60), (60, 120))    # seconds of audio, table E


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
    Linux, else NaN."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20

    if not sys.platform.startswith("linux"):
        return math.nan

    ctypes.CDLL(None).malloc_trim(0)    # gives back what is free already
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                 # the peak becomes what is resident now
    before = resident_peak()
    function()
    return resident_peak() - before


def hardware(device):
    """{machine, flops: FLOP/s of a matrix product, bandwidth: bytes/s of a copy, read and written},
    measured here and now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        a, b = torch.randn(2, 4096, 4096, device=device, dtype=torch.bfloat16)
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
        a, b = torch.randn(2, 1024, 1024)
    n = len(a)
    source = torch.ones(n * 2 ** 16, device=device)    # untouched memory would not really be read
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


def our_answer(coat, batch, n_tokens, device):
    """(seconds to the first token, seconds for the others, ids (B, n_tokens))"""
    ids = []
    begin = now(device)
    for token in coat.stream(batch, n_tokens, stop=False):
        ids.append(token)
        if len(ids) == 1:
            first = now(device)
    end = now(device)
    return first - begin, end - first, torch.stack(ids, 1)


def their_answer(coat, batch, n_tokens, device):
    """The same with the generate() of transformers."""
    first = []

    def clock(ids, scores):
        if not first:
            first.append(now(device))
        return scores

    begin = now(device)
    ids = coat.hf.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        **coat.audio_inputs(batch), do_sample=False, max_new_tokens=n_tokens,
        min_new_tokens=n_tokens, suppress_tokens=coat.think_ids,
        logits_processor=transformers.LogitsProcessorList([clock]))
    end = now(device)
    return first[0] - begin, end - first[0], ids[:, batch["input_ids"].shape[1]:]


def same_until_eos(eos, ours, theirs):
    """Whether ids (B, n_tokens) agree up to the eos; ours goes on after it, theirs may not end."""
    alive = torch.isin(ours, eos).cumsum(1) == 0
    return torch.equal(ours[alive], theirs[alive])


def measure_answer(coat, arm, seconds, args, machine):
    """One answer to `--batch` clips: tokens (prompt, block, decoded), ms (first, decoding, total),
    shares of what the hardware could do (prefill_at, decoding_at), and the ids."""
    answer, think, n = arm
    batch = noise_batch(coat, args.batch, seconds, args.device, think=think, responses=False)
    first, rest, ids = answer(coat, batch, n, args.device)
    return {
        "prompt": batch["input_ids"].shape[1],
        "block": int(batch["n_audio"][0]) + 2 if think else 0,
        "decoded": ids.shape[1],
        "first": 1e3 * first,
        "decoding": 1e3 * rest,
        "total": 1e3 * (first + rest),
        "prefill_at": prefill_flops(coat, batch) / machine["flops"] / first,
        "decoding_at": decode_bytes(coat, batch, n) / machine["bandwidth"] * (n - 1) / rest,
        "ids": ids}


def measure_arms(coat, arms, low, high, args, machine):
    """{arm: [its answers]} on clips of low to high seconds, `--samples` for each seed; the arms
    take turns on each."""
    answers = {name: [] for name in arms}
    for seed in range(-1, args.seeds):    # seed -1 warms up
        draw = random.Random(seed)
        for _ in range(args.samples if seed >= 0 else 1):
            seconds = draw.uniform(low, high)
            for name, arm in arms.items():
                answer = measure_answer(coat, arm, seconds, args, machine)
                if seed >= 0:
                    answers[name].append(answer | {"seed": seed, "seconds": seconds})
    return answers


def summarise(answers, seeds):
    """Each figure's median of the clips, and mean and deviation of the seeds' means."""
    row = {}
    for key in ("prompt", "block", "decoded", "first", "decoding", "total", "prefill_at",
                "decoding_at"):
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
    return {
        "prompt": ratio("prompt", "CoAT", "base"),
        "first": ratio("first", "CoAT", "base"),
        "total": ratio("total", "CoAT", "text-CoT"),
        "first_generate": ratio("first", "CoAT", "generate"),
        "speed_generate": ratio("decoding", "generate", "CoAT"),
        "clips": len(both),
        "same_ids": sum(same_until_eos(eos, a["ids"], b["ids"]) for a, b in both)}


LATENCY_HEAD = """\
{backbone}, batch {batch}: answers of {answer_tokens} tokens, text-CoT after {cot_tokens} of \
reasoning; generate is that of transformers.
Milliseconds: mean (deviation) of {seeds} seeds, median of the clips; at: share of what the \
hardware could do.

   audio arm      prompt block decoded            first token    at               decoding    at\
                  total"""
LATENCY_ROW = (
    "{audio:>8} {arm:8}{prompt:7.0f}{block:6.0f}{decoded:8.0f}"
    "{first_mean:8.1f} ({first_sd:5.1f}){first:7.1f}{prefill_at:6.0%}"
    "{decoding_mean:8.1f} ({decoding_sd:5.1f}){decoding:7.1f}{decoding_at:6.0%}"
    "{total_mean:8.1f} ({total_sd:5.1f}){total:7.1f}")
LATENCY_RATIOS = """\
         CoAT / base: prompt {prompt:.2f}, first token {first:.2f}; / text-CoT: total {total:.2f};
         / generate: first token {first_generate:.2f}, tokens/s {speed_generate:.2f}, same ids \
{same_ids} of {clips}
"""


def latency(args):
    """First token, decoding and total of base, CoAT, text-CoT and transformers' generate."""
    ranges = [(s, s) for s in read_seconds(args.seconds)] if args.seconds else RANGES
    coat = load_student(args, trainable=False).merge()
    if args.compile:
        coat.compile_decode()
    eos = coat.processor.tokenizer.convert_tokens_to_ids(list(coat.backbone.eos))
    eos = torch.tensor(eos, device=args.device)
    machine = hardware(args.device)
    n = args.answer_tokens
    arms = {    # what decodes, whether there is a block, tokens to decode
        "base": (our_answer, False, n),
        "CoAT": (our_answer, True, n),
        "text-CoT": (our_answer, False, args.cot_tokens + n),
        "generate": (their_answer, True, n)}

    print(LATENCY_HEAD.format(**vars(args)))
    rows, ratios = [], []
    all_answers = {name: [] for name in arms}
    for low, high in ranges:
        audio = f"{low:.3g} s" if low == high else f"{low:.0f}-{high:.0f} s"
        answers = measure_arms(coat, arms, low, high, args, machine)
        for name in arms:
            row = {"audio": audio, "arm": name} | summarise(answers[name], args.seeds)
            print(LATENCY_ROW.format(**row))
            rows.append(row)
            all_answers[name] += answers[name]
        ratios.append({"audio": audio} | compare_arms(answers, eos))
        print(LATENCY_RATIOS.format(**ratios[-1]))

    if args.plot:
        plot(all_answers, args.plot, f"{args.backbone} on {machine['machine']}")
    return machine | {"backbone": args.backbone, "batch": args.batch, "rows": rows,
                      "ratios": ratios}


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
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as e:    # no such folder, or kind of picture
        raise InputError(f"--plot {path}: {str(e).splitlines()[0]}") from e


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
        dims = {"recon": d} | {task: teacher.dim for task, teacher in self.teachers.items()}
        readouts = {task: teacher.readout for task, teacher in self.teachers.items()}
        # Not calibrated, the scales stay 1: that changes the losses and not the time.
        self.heads = ExpertHeads(d, dims, readouts, width=args.head_width).to(args.device)

        self.optimizer = adamw(self.coat, self.heads)
        on_gpu = args.device.type == "cuda"
        self.autocast = torch.autocast(args.device.type, torch.bfloat16, enabled=on_gpu)

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
    return machine | {"backbone": args.backbone, "batch": args.batch, "mix": table, "rows": rows}


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


def loss(args):
    """Output head and loss, there and back, at Qwen2-Audio's vocabulary against the plain way."""
    coat = build_head_only(args.hidden, args.device)
    answer = "x" * (args.targets - 1)    # a token a letter, and the one that ends it
    shortest = n_slots(build_inputs(coat, [None], [""], [answer]))
    if args.tokens <= shortest:
        raise InputError(f"with {args.targets} targets give --tokens at least {shortest + 1}")
    question = "x" * (args.tokens - shortest)
    batch = to_device(build_inputs(coat, [None], [question], [answer]), args.device)
    machine = hardware(args.device)

    work = {}
    for name, way in WAYS.items():
        work[name] = lambda way=way: way(coat, batch).backward()
    took = median_seconds(work.values(), args.device, args.repeats)
    rows = {}
    for (name, way), s in zip(WAYS.items(), took):
        value = way(coat, batch).item()
        rows[name] = {"loss": value, "s": s, "peak_mib": peak_mib(work[name], args.device)}
    rows["plain / ours"] = divide(rows["plain"], rows["ours"])

    vocabulary = coat.hf.lm_head.out_features
    print(f"{vocabulary} x {args.hidden}, {args.tokens} tokens, {args.targets} targets\n"
          "                   loss  seconds  peak MiB")
    for name, row in rows.items():
        print("{:14}{loss:9.5f}{s:9.3f}{peak_mib:10.1f}".format(name, **row))
    return machine | {"hidden": args.hidden, "rows": rows}


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
    return machine | {"seconds": lengths, "costs": costs, "exponents": fits, "ranks": ranks,
                      "tokens_per_s": speeds}


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
    return {"backbones": table}


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


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    number = at_least(1)
    gpus = torch.cuda.device_count()

    add = add_command(commands, latency)
    add("--seconds", help="exact audio lengths, such as 2.5,20; default: the ranges of table E")
    add("--answer-tokens", type=number, default=20)
    add("--cot-tokens", type=number, default=100)
    add("--seeds", type=number, default=3)
    add("--samples", type=number, default=1, help="clips of a seed in each range")
    add("--batch", type=number, default=1)
    add("--compile", default=gpus > 0, action=argparse.BooleanOptionalAction,
        help="fuse the kernels of a decoding step")
    add("--plot", metavar="FILE", help="draw latency against the length of the audio")

    add = add_command(commands, train)
    add("--batch", type=number, default=8, help="rows of a step")
    add("--mix", default="1,30", metavar="S,S", help="shortest and longest clip of the comparison")
    add("--steps", type=number, default=8, help="of the comparison")
    add("--seconds", default="1", help="audio lengths of the steps with experts")
    add("--repeats", type=number, default=2)
    add("--head-width", type=number, help="width inside the heads; default the backbone's")
    add("--no-teachers", action="store_true", help="recon alone")
    add("--checkpointing", action="store_true", help="as in train.py")
    add("--compile", action="store_true", help="as in train.py")

    add = add_command(commands, loss, with_model=False)
    add("--hidden", type=number, default=1024, help="width; Qwen2-Audio's is 4096")
    add("--tokens", type=number, default=800)
    add("--targets", type=number, default=40)
    add("--repeats", type=number, default=3)

    add = add_command(commands, scale)
    add("--seconds", default="1,3,10,30,60,120")
    add("--ranks", type=number, nargs="*", default=list(range(1, gpus + 1)) or [1, 2])
    add("--repeats", type=number, default=3)

    add = add_command(commands, facts, with_model=False)
    add("--head-width", type=number, default=1024, help="narrow heads, counted beside the full")
    return parser.parse_args()


def main():
    one_line_errors(ExpertUnavailable,
                    less_memory="--batch 1, --checkpointing or --head-width 1024")
    args = parse_args()
    args.device = usable_device(args.device)
    print(json.dumps({"bench": args.command} | args.run(args)))


if __name__ == "__main__":
    main()
