"""What thinking costs: the time of an answer (paper, tables 2 and E) and of a training step.

    python bench.py latency                                            # tiny, noise
    python bench.py latency --backbone qwen2-audio --random-weights    # full size, no download
    python bench.py latency --model runs/tiny --data tones:note:20     # all rows (table 2)
    python bench.py latency --model runs/tiny --data tones --samples 5    # by length (table E)
    python bench.py train    # steps of ours beside those of transformers' Trainer

The last line printed is a JSON object.
"""
import argparse
import json
import tempfile
import time
from functools import partial
from statistics import mean, median, pstdev

# First: it says in one line which library does not import.
from model import (BACKBONES, COUNT, IGNORE, SAMPLE_RATE, InputError, load_coat, load_text_think,
                   one_line_errors, to_device, usable_device)

import numpy as np
import torch
import transformers

from data import collate, open_source, usable_rows
from experts import EXPERTS, load_experts
from heads import heads_for
from train import PEAKS, Student

# Seconds of audio. Table E has five ranges from 0 to 120 s; the bounds between them are ours.
RANGES = ((0, 5), (5, 10), (10, 30), (30, 60), (60, 121))
KEYS = ("prompt", "block", "decoded", "first", "decoding", "total", "GB/s")


def noise(seconds, seed):
    """A row of noise, as data.py loads rows."""
    generator = torch.Generator().manual_seed(seed)
    wave = 0.1 * torch.randn(round(seconds * SAMPLE_RATE), generator=generator)
    return {"wave": wave, "rate": SAMPLE_RATE, "prompt": "What is heard?", "response": "x" * 40}


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def library_inputs(coat, batch):
    """What transformers' own functions take of a batch."""
    audio = {name: value.to(coat.hf.dtype) if value.is_floating_point() else value
             for name, value in batch["audio"].items()}
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | audio


# --------------------------------------------------------------------------------------------------
# latency

def our_answer(coat, batch, n_tokens, stop, clock):
    """ids (B, decoded), at most n_tokens, or as many unless stop; clock() after each token."""
    ids = []
    for token in coat.stream(batch, n_tokens, stop):
        ids.append(token)
        clock()
    return torch.stack(ids, 1)


def their_answer(coat, batch, n_tokens, stop, clock):
    """The same with the generate() of transformers, as greedy as ours."""
    def watch(ids, scores):
        clock()
        return scores

    ids = coat.hf.generate(
        **library_inputs(coat, batch), do_sample=False, repetition_penalty=1.0,
        max_new_tokens=n_tokens, min_new_tokens=0 if stop else n_tokens,
        suppress_tokens=coat.think_ids, eos_token_id=coat.eos_ids,
        pad_token_id=coat.processor.tokenizer.pad_token_id,
        logits_processor=transformers.LogitsProcessorList([watch]))
    return ids[:, batch["input_ids"].shape[1]:]


def load_arms(args):
    """{name: (model, way to an answer, with the block?, most tokens, what ends the question)}"""
    load = partial(load_coat, device=args.device)
    if args.model:
        ours = load(args.model, args.model_path).merge()
        plain = load(ours.name, ours.model_path)
    else:
        ours = plain = load(args.backbone, args.model_path, random=args.random_weights)
    text = plain
    if args.text_think:
        text = load_text_think(ours.name, args.text_think, ours.model_path, args.device)
    for coat in {ours, plain, text} if args.device.type == "cuda" else ():
        coat.compile_decode()
    short, long, suffix = 20, 120, ""    # of noise; of rows to the end token
    if args.data:
        short = long = args.max_new_tokens
        suffix = text.backbone.text_think
    return {"base": (plain, our_answer, False, short, ""),
            "CoAT": (ours, our_answer, True, short, ""),
            "text-CoT": (text, our_answer, False, long, suffix),
            "generate": (ours, their_answer, True, short, "")}


def measure(row, args, coat, answer, think, n_tokens, suffix):
    """An answer to a batch of copies of a row: tokens, ms, GB/s that decoding read at least, ids.
    The clock starts with the batch on the device, after log-mel features. Raises InputError."""
    row = row | {"prompt": row["prompt"] + suffix}
    (batch,), skipped = collate([row] * args.batch, coat.spec, think=think, responses=False)
    if skipped:
        raise skipped[0]
    batch = to_device(batch, args.device)
    times = [now(args.device)]
    ids = answer(coat, batch, n_tokens, bool(args.data), lambda: times.append(now(args.device)))
    end = now(args.device)
    n_bytes = (coat.decoder_weights + coat.hf.lm_head.weight.numel()) * coat.hf.dtype.itemsize
    return {"prompt": batch["input_ids"].shape[1], "decoded": ids.shape[1],
            "block": int(batch["n_audio"][0]) + 2 if think else 0,
            "first": 1e3 * (times[1] - times[0]), "decoding": 1e3 * (end - times[1]),
            "total": 1e3 * (end - times[0]), "ids": ids,
            "GB/s": 1e-9 * n_bytes * (ids.shape[1] - 1) / (end - times[1])}


def clips_of(args):
    """{range of length: [(seed, function that loads a row)]}. Raises InputError without a clip."""
    if not args.data:
        return {f"{s:g} s": [(seed, partial(noise, s, seed)) for seed in range(args.seeds)]
                for s in args.seconds}
    source = open_source(args.data)
    clips = {}
    for low, high in RANGES if args.samples else [(0, 121)]:
        inside = [i for i in usable_rows(source) if low < source.lengths[i] <= high]
        drawn = [(seed, partial(source.load, i)) for seed in range(args.seeds)
                 for i in np.random.default_rng(seed).permutation(inside)[:args.samples]]
        if drawn:
            clips[f"{low}-{high} s"] = drawn
    if not clips:
        raise InputError(f"--data {args.data}: no row has audio that can be used")
    return clips


def latency(args):
    """Times to the first token and to the last of base, CoAT, text-CoT and generate()."""
    arms = load_arms(args)
    print(f"Tokens, ms, GB/s: mean (deviation) over {args.seeds} seeds\n{'audio':>8} arm      "
          + "".join(f"{key:>17}" for key in KEYS) + "  CoAT's total / this")
    for arm in arms.values():    # warms up
        measure(noise(5, 0), args, *arm)
    results = []
    for label, drawn in clips_of(args).items():
        answers = []    # [(seed, {arm: its answer})]; the arms take turns on each clip
        for seed, load in drawn:
            try:
                row = load()
                answers.append((seed, {arm: measure(row, args, *arms[arm]) for arm in arms}))
            except InputError as e:
                print(f"left out: {e}")
        for arm in arms if answers else ():
            pairs = [(found["CoAT"], found[arm]) for _, found in answers]
            line = {"audio": label, "arm": arm, "clips": len(answers),
                    "ratio": median(a["total"] / b["total"] for a, b in pairs),
                    "same_ids": sum(torch.equal(a["ids"], b["ids"]) for a, b in pairs)}
            for key in KEYS:
                of_seeds = [mean(found[arm][key] for s, found in answers if s == seed)
                            for seed in {seed for seed, _ in answers}]
                line[key] = [mean(of_seeds), pstdev(of_seeds)]
            cells = ["{:9.1f} ({:5.1f})".format(*line[key]) for key in KEYS]
            print(f"{label:>8} {arm:9}{''.join(cells)}{line['ratio']:8.2f}")
            results.append(line)
    print(json.dumps({"flags": vars(args), "rows": results}, default=str))


# --------------------------------------------------------------------------------------------------
# train

def train(args):
    """Steps from loaded rows on: ours, and those of transformers' Trainer."""
    device = args.device
    on_gpu = device.type == "cuda"
    coat = load_coat(args.backbone, args.model_path, trainable=True, device=device,
                     random=args.random_weights)
    if args.checkpointing:
        coat.checkpoint_activations()
    if args.compile:
        coat.compile_layers()
    d = coat.hf.config.get_text_config().hidden_size
    experts = load_experts(EXPERTS, d, device, random=True)
    n = args.batch * (args.steps + 1)    # the first step warms up
    rows = [noise(s, i) for i, s in enumerate(np.linspace(*args.seconds, n))]
    if args.data:
        source = open_source(args.data)
        usable = [i for i in usable_rows(source) if source.lengths[i] > 0]
        rows = [source.load(i) for i in np.resize(usable, n)]
        rows.sort(key=lambda row: len(row["wave"]) / row["rate"])    # rows of a step are alike
    times, counts = [], []    # of a step: its end; its tokens, and with padding

    def batch_of(rows, names=()):
        rates = {experts[name].sample_rate for name in names} - {None}
        (batch,), _ = collate(rows, coat.spec, rates, coat.think)
        counts.append((int(batch["attention_mask"].sum()), batch["input_ids"].numel()))
        return batch

    def our_steps(names):
        some = {name: experts[name] for name in names}
        student = Student(coat, heads_for(d, some, width=args.head_width).to(device), some)
        params = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-5, fused=on_gpu)
        for start in range(0, n, args.batch):
            batch = to_device(batch_of(rows[start:start + args.batch], names), device)
            losses = student(batch)
            ce = losses.pop("ce") / (batch["labels"][:, 1:] != IGNORE).sum()
            (ce + sum(losses.values()) / batch["n_audio"].sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(now(device))

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **kwargs):
            times.append(now(device))

    def collator(items):
        batch = batch_of([item["row"] for item in items])
        return library_inputs(coat, batch) | {"labels": batch["labels"]}

    def their_steps(strategy):
        items = [{"input_ids": row["wave"], "row": row} for row in rows]    # it sorts by input_ids
        with tempfile.TemporaryDirectory() as folder:
            settings = transformers.TrainingArguments(
                folder, per_device_train_batch_size=args.batch, max_steps=args.steps + 1,
                train_sampling_strategy=strategy, remove_unused_columns=False, report_to="none",
                save_strategy="no", disable_tqdm=True, use_cpu=not on_gpu, bf16=on_gpu)
            transformers.Trainer(coat.lm, settings, collator, items, callbacks=[Clock()]).train()

    ways = {"no block": (our_steps, False, ()), "block": (our_steps, True, ()),
            **{f"block, {name}": (our_steps, True, (name,)) for name in EXPERTS},
            "block, all experts": (our_steps, True, tuple(EXPERTS)),
            "Trainer": (their_steps, True, "random"),    # with logits at all positions
            "Trainer, by length": (their_steps, True, "group_by_length")}
    chip = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = next((peak for name, peak in PEAKS.items() if name in chip), float("inf"))
    results = {}
    for way, (steps, coat.think, what) in ways.items():
        times.clear()
        counts.clear()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        steps(what)
        seconds = times[-1] - times[0]
        tokens, slots = np.sum(counts[1:args.steps + 1], 0)
        results[way] = {
            "rows/s": (n - args.batch) / seconds, "tokens/s": tokens / seconds,
            "padding": 1 - tokens / slots,
            "MFU": 4 * coat.decoder_weights * tokens / seconds / peak,
            "GiB": torch.cuda.max_memory_allocated() / 2 ** 30 if on_gpu else 0}
        print(f"{way:18}", *(f"  {key} {value:.4g}" for key, value in results[way].items()))
    print(json.dumps({"flags": vars(args), "chip": chip, "ways": results}, default=str))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (latency, train):
        p = commands.add_parser(command.__name__, help=command.__doc__, usage="%(prog)s [flags]")
        add = p.add_argument
        add("--backbone", default="tiny", choices=list(BACKBONES))
        add("--model-path", help="a local folder, not the hub")
        add("--random-weights", action="store_true", help="full size, no files")
        add("--data", metavar="ROWS", help="real rows, see data.py")
        add("--device", help="cpu or cuda")
    add("--steps", type=COUNT, default=5)
    add("--batch", type=COUNT, default=8, help="rows a step")
    add("--seconds", type=float, nargs=2, default=(1, 4), help="of noise, from and to")
    add("--head-width", type=COUNT, help="inside the heads")
    add("--checkpointing", action="store_true")
    add("--compile", action="store_true")
    add = commands.choices["latency"].add_argument
    add("--model", metavar="RUN", help="for CoAT and generate; base is its backbone")
    add("--text-think", metavar="FOLDER", help="AF3's think folder, for text-CoT")
    add("--samples", type=COUNT, help="rows a seed and range (all rows, no ranges)")
    add("--seeds", type=COUNT, default=3)
    add("--seconds", type=float, nargs="+", default=(5, 10, 30, 60, 120), help="of noise")
    add("--batch", type=COUNT, default=1, help="copies of a clip at once")
    add("--max-new-tokens", type=COUNT, default=256, help="with --data")
    args = parser.parse_args()
    args.device = usable_device(args.device, args.backbone)
    return args


if __name__ == "__main__":
    one_line_errors(less_memory="shorter clips or a smaller --batch")
    args = parse_args()
    {"latency": latency, "train": train}[args.command](args)
