"""What thinking costs: the time of an answer (paper, tables 2 and E) and of a training step.

    python bench.py latency                                            # tiny, noise of five lengths
    python bench.py latency --backbone qwen2-audio --random-weights    # full size, no download
    python bench.py latency --model runs/tiny --data tones:note:20     # all rows (table 2)
    python bench.py latency --model runs/tiny --data tones:note:20 --samples 5    # by length (E)
    python bench.py train    # steps of ours beside those of transformers' Trainer

Without --data the audio is noise. What is compared takes turns, after one turn that is not counted.
The last line printed is a JSON object.
"""
import argparse
import functools
import json
import math
import tempfile
import time
from statistics import mean, median, pstdev
from typing import Callable, NamedTuple

import numpy as np
import torch
import transformers

from data import collate, expert_targets, open_source, to_device, usable_rows
from experts import EXPERTS, load_experts
from heads import heads_for
from model import (BACKBONES, COUNT, SAMPLE_RATE, CoAT, InputError, load_coat, load_text_think,
                   one_line_errors, usable_device)

# Seconds of audio. Table E has five ranges from 0 to 120 s; the bounds between them are ours.
RANGES = ((0.1, 5), (5, 10), (10, 30), (30, 60), (60, 120.001))


def noise(seconds, seed):
    """A row of noise, as data.py loads rows."""
    generator = torch.Generator().manual_seed(seed)
    wave = 0.1 * torch.randn(round(seconds * SAMPLE_RATE), generator=generator)
    return {"wave": wave, "rate": SAMPLE_RATE, "prompt": "What is heard?", "response": "x" * 40}


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(function, device):
    """The least seconds of five calls."""
    times = []
    for _ in range(5):
        begin = now(device)
        function()
        times.append(now(device) - begin)
    return min(times)


# --------------------------------------------------------------------------------------------------
# latency

class Arm(NamedTuple):
    """A way to an answer."""
    coat: CoAT
    answer: Callable     # our_answer or their_answer
    think: bool          # whether the prompt has the block
    n_tokens: int        # to decode
    stop: bool           # after the end token; n_tokens is then the most
    suffix: str = ""     # of the question, which asks to think in text


def our_answer(arm, batch, clock):
    """ids (B, decoded); clock() after each token."""
    ids = []
    for token in arm.coat.stream(batch, arm.n_tokens, arm.stop):
        ids.append(token)
        clock()
    return torch.stack(ids, 1)


def their_answer(arm, batch, clock):
    """The same with the generate() of transformers, as greedy as ours."""
    def watch(ids, scores):
        clock()
        return scores

    coat = arm.coat
    ids = coat.hf.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        **coat.audio_inputs(batch), do_sample=False, repetition_penalty=1.0,
        max_new_tokens=arm.n_tokens, min_new_tokens=0 if arm.stop else arm.n_tokens,
        suppress_tokens=coat.think_ids, eos_token_id=coat.eos_ids,
        pad_token_id=coat.processor.tokenizer.pad_token_id,
        logits_processor=transformers.LogitsProcessorList([watch]))
    return ids[:, batch["input_ids"].shape[1]:]


def measure(arm, row, args):
    """An answer to a batch of copies of a row: lengths in tokens, times in ms, the ids. The clock
    starts when the batch is on the device: reading files and log-mel features are not in it.
    Raises InputError."""
    row = row | {"prompt": row["prompt"] + arm.suffix}
    (batch,), skipped = collate([row] * args.batch, arm.coat.spec, think=arm.think, responses=False)
    if skipped:
        raise skipped[0]
    batch = to_device(batch, args.device)
    times = [now(args.device)]
    ids = arm.answer(arm, batch, lambda: times.append(now(args.device)))
    end = now(args.device)
    return {"prompt": batch["input_ids"].shape[1], "decoded": ids.shape[1],
            "block": int(batch["n_audio"][0]) + 2 if arm.think else 0,
            "first": 1e3 * (times[1] - times[0]), "decoding": 1e3 * (end - times[1]),
            "total": 1e3 * (end - times[0]), "ids": ids}


def load_arms(args):
    """{name: Arm}. Two or three of them may share a model."""
    if args.model:
        ours = load_coat(args.model, model_path=args.model_path, device=args.device).merge()
        plain = load_coat(ours.name, model_path=ours.model_path, device=args.device)
    else:
        ours = plain = load_coat(args.backbone, model_path=args.model_path, device=args.device,
                                 random=args.random_weights)
    text = plain
    if args.text_think:
        text = load_text_think(ours.name, args.text_think, ours.model_path, args.device)
    if args.device.type == "cuda":
        for coat in {ours, plain, text}:
            coat.compile_decode()
    stop = bool(args.data)
    short, long = (args.max_new_tokens, args.max_new_tokens) if stop else (20, 120)
    suffix = text.backbone.text_think if stop else ""
    return {"base": Arm(plain, our_answer, False, short, stop),
            "CoAT": Arm(ours, our_answer, True, short, stop),
            "text-CoT": Arm(text, our_answer, False, long, stop, suffix),
            "generate": Arm(ours, their_answer, True, short, stop)}


def clips_of(args):
    """{range of length: [(seed, function that loads the row)]}, the longest first to warm up.
    Raises InputError without any clip."""
    ranges = [(s, s + 1e-3) for s in args.seconds or ()] or RANGES
    n = args.samples or 1
    if args.data:
        source = open_source(args.data)
        clips = [(source.lengths[i], functools.partial(source.load, i)) for i in usable_rows(source)]
        if not args.samples:
            ranges, n = [(0.1, math.inf)], len(clips)
    else:
        draw = np.random.default_rng(0).uniform
        lengths = [draw(*bounds) for bounds in ranges for _ in range(n * args.seeds)]
        clips = [(s, functools.partial(noise, s, i)) for i, s in enumerate(lengths)]
    found = {}
    for low, high in ranges:
        inside = sorted((c for c in clips if low <= c[0] < high), key=lambda clip: clip[0])
        if inside:
            found[f"{low:.3g}-{high:.3g} s"] = drawn = [(None, inside[-1][1])]
            for seed in range(args.seeds):
                order = np.random.default_rng(seed).permutation(len(inside))[:n]
                drawn += [(seed, inside[i][1]) for i in order]
    if not found:
        raise InputError(f"--data {args.data}: no row has audio that can be used")
    return found


def latency(args):
    """Times to the first token and to the last of base, CoAT, text-CoT and generate()."""
    arms = load_arms(args)
    coat = arms["CoAT"].coat
    # A decoding step has to read the decoder and the output head at least.
    step_bytes = (coat.decoder_weights + coat.hf.lm_head.weight.numel()) * coat.hf.dtype.itemsize
    copied = torch.ones(2 ** 28 if args.device.type == "cuda" else 2 ** 26, device=args.device)
    target = torch.empty_like(copied)
    limit = step_bytes * fastest(lambda: target.copy_(copied), args.device) / (2 * copied.nbytes)
    print(f"{coat.name} on {args.device}, whose memory allows {1e3 * limit:.3g} ms a token. Tokens, "
          f"ms: mean (deviation) of the means of {args.seeds} seeds\n{'audio':>12} {'arm':9}"
          + "".join(f"{key:>17}" for key in ("prompt", "block", "decoded", "first", "decoding", "total")))
    results = []
    left_out = 0
    for label, drawn in clips_of(args).items():
        answers = []    # [(seed, {arm: its answer})]
        for seed, load in drawn:
            try:
                row = load()
                answers.append((seed, {name: measure(arm, row, args) for name, arm in arms.items()}))
            except InputError as e:
                print(f"left out: {e}")
                left_out += seed is not None
        del answers[:1]
        for name in arms:
            line = {"audio": label, "arm": name, "clips": len(answers)}
            for key in ("prompt", "block", "decoded", "first", "decoding", "total"):
                of_seeds = [mean(found[name][key] for s, found in answers if s == seed)
                            for seed in {seed for seed, _ in answers}]
                line[key] = [mean(of_seeds), pstdev(of_seeds)]
            cells = [f"{value[0]:9.1f} ({value[1]:5.1f})" for value in line.values()
                     if isinstance(value, list)]
            print(f"{label:>12} {name:9}{''.join(cells)}")
            results.append(line)
        ratios = {}
        for key, other in (("first", "base"), ("total", "text-CoT"), ("total", "generate")):
            pairs = [(found["CoAT"], found[other]) for _, found in answers]
            ratios[f"{key} / {other}"] = median(a[key] / b[key] for a, b in pairs)
        same = sum(torch.equal(a["ids"], b["ids"]) for a, b in pairs)
        print(" " * 13 + ", ".join(f"CoAT's {key}: {value:.2f}" for key, value in ratios.items())
              + f"; same ids as generate: {same} of {len(pairs)}")
        results.append({"audio": label, "ratios": ratios, "same_ids": same})
    print(json.dumps({"backbone": coat.name, "left_out": left_out, "rows": results}))


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
    heads = heads_for(d, experts, width=args.head_width).to(device)
    n = args.batch * (args.steps + 1)    # the first step warms up
    rows = [noise(s, i) for i, s in enumerate(np.linspace(*args.seconds, n))]
    if args.data:
        source = open_source(args.data)
        rows = [source.load(i) for i in np.resize(usable_rows(source), n)]
        rows.sort(key=lambda row: len(row["wave"]) / row["rate"])    # rows of a step are alike
    times, counts = [], []    # of a step: its end; its tokens, and with padding

    def batch_of(rows, names=()):
        rates = {experts[name].sample_rate for name in names} - {None}
        (batch,), _ = collate(rows, coat.spec, rates, coat.think)
        counts.append((int(batch["attention_mask"].sum()), batch["input_ids"].numel()))
        return batch

    def our_steps(names):
        params = [p for p in [*coat.parameters(), *heads.parameters()] if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-5, fused=on_gpu)
        for start in range(0, n, args.batch):
            batch = to_device(batch_of(rows[start:start + args.batch], names), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                out = coat(batch)
                some = {name: experts[name] for name in names}
                targets = expert_targets(some, batch, out.audio_embeds)
                losses = heads(out.think_states, out.valid, targets)
                loss = out.ce_sum / out.n_targets + sum(losses.values()) / out.valid.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(now(device))

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **kwargs):
            times.append(now(device))

    def collator(items):
        batch = batch_of([item["row"] for item in items])
        names = ("input_ids", "attention_mask", "labels")
        return {name: batch[name] for name in names} | coat.audio_inputs(batch)

    def their_steps(strategy):
        items = [{"input_ids": row["wave"], "row": row} for row in rows]    # it sorts by input_ids
        with tempfile.TemporaryDirectory() as folder:
            settings = transformers.TrainingArguments(
                folder, per_device_train_batch_size=args.batch, max_steps=args.steps + 1,
                train_sampling_strategy=strategy, remove_unused_columns=False, report_to="none",
                save_strategy="no", disable_tqdm=True, use_cpu=not on_gpu, bf16=on_gpu)
            transformers.Trainer(coat.lm, settings, collator, items, callbacks=[Clock()]).train()

    side = 8192 if on_gpu else 1024
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    flops = 2 * side ** 3 / fastest(lambda: a @ a, device)
    print(f"{coat.name} on {device}, {flops / 1e12:.3g} TFLOP/s measured; {args.steps} steps of "
          f"{args.batch} rows\n{'':24}{'rows/s':>8}{'tokens/s':>10}{'padding':>9}{'MFU':>7}{'GiB':>7}")
    ways = {"no block": (our_steps, False, ()), "block": (our_steps, True, ()),
            "two experts": (our_steps, True, ("recon", "pitch")),
            "five experts": (our_steps, True, tuple(EXPERTS)),
            "Trainer": (their_steps, True, "random"),    # with logits at all positions
            "Trainer, by length": (their_steps, True, "group_by_length")}
    results = {}
    for way, (steps, coat.think, what) in ways.items():
        times.clear()
        counts.clear()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        steps(what)
        seconds = times[-1] - times[0]
        tokens, slots = np.sum(counts[1:args.steps + 1], 0)
        results[way] = {"rows_per_s": (n - args.batch) / seconds, "tokens_per_s": tokens / seconds,
                        "padding": 1 - tokens / slots,
                        "mfu": 4 * coat.decoder_weights * tokens / seconds / flops,
                        "gib": torch.cuda.max_memory_allocated() / 2 ** 30 if on_gpu else 0}
        print("{:24}{rows_per_s:8.2f}{tokens_per_s:10.0f}{padding:9.1%}{mfu:7.1%}{gib:7.1f}".format(
            way, **results[way]))
    coat.think = True
    batch = to_device(batch_of(rows[-args.batch:], EXPERTS), device)
    for name, expert in experts.items():
        seconds = fastest(lambda: expert_targets({name: expert}, batch, torch.ones(1)), device)
        results[f"expert {name}"] = {"s": seconds, "audio_s": batch["seconds"]}
        print(f"expert {name:17}{seconds:8.3f} s for {batch['seconds']:.1f} s of audio")
    print(json.dumps({"backbone": coat.name, "flops": flops, "ways": results}))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (latency, train):
        p = commands.add_parser(command.__name__, help=command.__doc__, usage="%(prog)s [flags]")
        p.set_defaults(run=command)
        add = p.add_argument
        add("--backbone", default="tiny", choices=list(BACKBONES))
        add("--model-path", help="a local folder with the backbone, not the hub")
        add("--random-weights", action="store_true", help="full size, no files")
        add("--data", metavar="ROWS", help="real rows, see data.py; else noise")
        add("--device", help="cpu or cuda; default: the GPU if there is one")
    add("--steps", type=COUNT, default=5, help="(5)")
    add("--batch", type=COUNT, default=8, help="rows a step (8)")
    add("--seconds", type=float, nargs=2, default=(1, 4), help="of noise, from and to (1 4)")
    add("--head-width", type=COUNT, help="width inside the heads")
    add("--checkpointing", action="store_true")
    add("--compile", action="store_true")
    add = commands.choices["latency"].add_argument
    add("--model", metavar="RUN", help="for CoAT and generate; the others: its backbone as released")
    add("--text-think", metavar="FOLDER", help="Audio Flamingo 3's think folder, for text-CoT")
    add("--samples", type=COUNT, help="clips of a seed in each range of length (1 of noise, all rows)")
    add("--seeds", type=COUNT, default=3, help="(3)")
    add("--seconds", type=float, nargs="+", help="lengths instead of ranges")
    add("--batch", type=COUNT, default=1, help="copies of a clip at once (1)")
    add("--max-new-tokens", type=COUNT, default=256, help="with --data (256)")
    args = parser.parse_args()
    args.device = usable_device(args.device, args.backbone)
    return args


if __name__ == "__main__":
    one_line_errors(less_memory="shorter clips or a smaller --batch")
    args = parse_args()
    args.run(args)
