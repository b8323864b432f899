"""What thinking costs: base, CoAT and text chain of thought in one engine (paper, tables 2 and E).

    python bench.py --plot latency.png                         # tiny, on any machine
    python bench.py --backbone qwen2-audio --random-weights    # full size, no download
    python bench.py --model runs/tiny --data tones:note:20     # to the end token (table 2)

Without --data the audio is noise. The ways to an answer take turns on the same clips, after one that
is not counted. The clock starts when the batch is on the device: reading files and log-mel features
are not in it. What training costs is in the log.jsonl of a run: tokens/s, MFU, memory, the share of
the teachers. The last line printed is a JSON object.
"""
import argparse
import json
import random
import time
from statistics import mean, median, pstdev
from typing import Callable, NamedTuple

import torch
import transformers

from data import Rows, collate, open_source, to_device
from model import (BACKBONES, COUNT, SAMPLE_RATE, CoAT, InputError, load_coat,
                   load_text_think, one_line_errors, usable_device)

# Seconds of audio. Table E has five ranges from 0 to 120 s; the bounds between them are ours.
RANGES = ((0.1, 5), (5, 10), (10, 30), (30, 60), (60, 120))


class Arm(NamedTuple):
    """A way to an answer."""
    coat: CoAT
    answer: Callable     # our_answer or their_answer
    think: bool          # whether the prompt has the block
    n_tokens: int        # to decode
    stop: bool           # after the end token; n_tokens is then the most
    suffix: str = ""     # of the question, which asks to think in text


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth_of(device):
    """Bytes/s of a copy, read and written, measured here and now."""
    source = torch.ones(2 ** 28 if device.type == "cuda" else 2 ** 26, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        begin = now(device)
        target.copy_(source)
        times.append(now(device) - begin)
    return 2 * source.nbytes / min(times)


def step_bytes(coat, batch, n_tokens):
    """What a decoding step has to read: decoder, output head, keys and values half-way."""
    B, T = batch["input_ids"].shape
    text = coat.hf.config.get_text_config()
    head = coat.hf.lm_head.weight
    head_dim = text.hidden_size // text.num_attention_heads
    kept = 2 * text.num_hidden_layers * head_dim * text.num_key_value_heads    # of a position
    return head.element_size() * (
        coat.decoder_weights + head.numel() + kept * B * (T + n_tokens / 2))


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
    """The same with the generate() of transformers, as greedy as ours."""
    times = []

    def clock(ids, scores):
        times.append(now(device))
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
    return times[0] - begin, end - times[0], ids[:, batch["input_ids"].shape[1]:]


def measure(arm, rows, device, bandwidth):
    """One answer to the loaded rows: lengths in tokens, times in ms, the share of the measured
    bandwidth that decoding used, and the ids."""
    rows = [row | {"prompt": row["prompt"] + arm.suffix} for row in rows]
    (batch,), skipped = collate(rows, arm.coat.spec, think=arm.think, responses=False)
    if skipped:
        raise skipped[0]
    batch = to_device(batch, device)
    first, rest, ids = arm.answer(arm, batch, device)
    n = ids.shape[1]
    return {
        "prompt": batch["input_ids"].shape[1], "decoded": n,
        "block": int(batch["n_audio"][0]) + 2 if arm.think else 0,
        "first": 1e3 * first, "decoding": 1e3 * rest, "total": 1e3 * (first + rest),
        "bandwidth": step_bytes(arm.coat, batch, n) * (n - 1) / max(rest, 1e-9) / bandwidth,
        "seconds": batch["seconds"] / len(rows), "ids": ids}


def load_arms(args):
    """{name: Arm}. Two or three of them may share a model."""
    if args.model:
        ours = load_coat(args.model, model_path=args.model_path,
                         device=args.device).merge()
        plain = load_coat(ours.name, model_path=ours.model_path, device=args.device)
    else:
        ours = plain = load_coat(args.backbone, model_path=args.model_path, device=args.device,
                                 random=args.random_weights)
    text = plain
    if args.text_think:
        text = load_text_think(ours.name, args.text_think, ours.model_path, args.device)
    if args.compile:
        for coat in {ours, plain, text}:
            coat.compile_decode()
    stop = bool(args.data)
    short = args.max_new_tokens if stop else args.answer_tokens
    long = short if stop else short + args.cot_tokens
    return {
        "base": Arm(plain, our_answer, False, short, stop),
        "CoAT": Arm(ours, our_answer, True, short, stop),
        "text-CoT": Arm(text, our_answer, False, long, stop,
                        text.backbone.text_think if stop else ""),
        "generate": Arm(ours, their_answer, True, short, stop)}


def noise(seconds, seed):
    generator = torch.Generator().manual_seed(seed)
    wave = 0.1 * torch.randn(round(seconds * SAMPLE_RATE), generator=generator)
    return {"wave": wave, "rate": SAMPLE_RATE, "prompt": "What is heard?", "response": "x"}


def clips_of(args):
    """{label: [(seed, rows)]}; seed -1 warms up."""
    if args.data:
        source = open_source(args.data)
        rows = [row for row in map(Rows(source).__getitem__, range(len(source)))
                if isinstance(row, dict) and "wave" in row]
        if not rows:
            raise InputError(f"--data {args.data}: no row has audio that can be used")
        longest = max(rows, key=lambda row: len(row["wave"]) / row["rate"])
        timed = [(seed, [row]) for seed in range(args.seeds) for row in rows]
        return {f"{len(rows)} of {len(source)} rows": [(-1, [longest]), *timed]}
    clips = {}
    for low, high in [(s, s) for s in args.seconds or ()] or RANGES:
        clips[f"{low:.3g}-{high:.3g} s"] = found = []
        for seed in range(-1, args.seeds):
            draw = random.Random(seed)
            for _ in range(args.samples if seed >= 0 else 1):
                found.append((seed, [noise(draw.uniform(low, high), max(0, seed))] * args.batch))
    return clips


def main():
    one_line_errors(less_memory="shorter clips, or --batch 1")
    args = parse_args()
    arms = load_arms(args)
    coat = arms["CoAT"].coat
    bandwidth = bandwidth_of(args.device)
    print(f"{coat.name} on {args.device}, {bandwidth / 1e9:.3g} GB/s measured. Milliseconds: mean "
          "(deviation) of the seeds' means, median\n"
          f"{'audio':>12} {'arm':9}{'prompt':>7}{'block':>6}{'decoded':>8}{'first token':>24}"
          f"{'decoding':>24}{'total':>24}{'bandwidth':>10}")
    results, points = [], {name: [] for name in arms}
    for label, clips in clips_of(args).items():
        answers = {name: [] for name in arms}
        for seed, rows in clips:
            for name, arm in arms.items():
                answer = measure(arm, rows, args.device, bandwidth)
                if seed >= 0:
                    answers[name].append(answer | {"seed": seed})
        for name, found in answers.items():
            row = {"audio": label, "arm": name}
            for key in ("prompt", "block", "decoded", "first", "decoding", "total", "bandwidth"):
                by_seed = [mean(a[key] for a in found if a["seed"] == s) for s in range(args.seeds)]
                row[key] = [mean(by_seed), pstdev(by_seed), median(a[key] for a in found)]
            times = "".join("{:10.1f} ({:5.1f}) {:5.1f}".format(*row[key])
                            for key in ("first", "decoding", "total"))
            print(f"{label:>12} {name:9}{row['prompt'][0]:7.0f}{row['block'][0]:6.0f}"
                  f"{row['decoded'][0]:8.1f}{times}{row['bandwidth'][2]:10.0%}")
            results.append(row)
            points[name] += found
        same = sum(torch.equal(a["ids"], b["ids"])
                   for a, b in zip(answers["CoAT"], answers["generate"]))
        ratio = {f"{key} / {other}": median(
                     a[key] / b[key] for a, b in zip(answers["CoAT"], answers[other]))
                 for key, other in (("first", "base"), ("total", "text-CoT"), ("total", "generate"))}
        print(" " * 13 + ", ".join(f"CoAT's {key}: {value:.2f}" for key, value in ratio.items())
              + f"; same ids as generate: {same} of {len(answers['CoAT'])}")
        results.append({"audio": label, "ratios": ratio, "same_ids": same})
    print(json.dumps({"backbone": coat.name, "bandwidth": bandwidth, "rows": results}), flush=True)
    if args.plot:
        plot(points, args.plot, f"{coat.name} on {args.device}")


def plot(points, path, title):
    """Latency against the length of the audio, a point a clip."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for arm, color in (("base", "gray"), ("CoAT", "tab:blue"), ("text-CoT", "tab:red")):
        found = sorted((a["seconds"], a["total"], a["first"]) for a in points[arm])
        seconds, total, first = zip(*found)
        axes.plot(seconds, total, "o-", color=color, markersize=4, label=f"{arm}, whole answer")
        axes.plot(seconds, first, "o:", color=color, markersize=3, label=f"{arm}, first token")
    axes.set(xlabel="audio, s", ylabel="ms", title=title, xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default="tiny", choices=list(BACKBONES))
    add("--model-path", help="a local folder with the backbone, not the hub")
    add("--random-weights", action="store_true", help="full size, no files")
    add("--model", metavar="RUN", help="a run of train.py for CoAT and generate; the others have its "
        "backbone as released")
    add("--data", metavar="ROWS", help="rows.jsonl, mixture.json or tones[:KINDS[:N]]; each row is "
        "answered to the end token")
    add("--max-new-tokens", type=COUNT, default=256, help="with --data (%(default)s)")
    add("--text-think", metavar="FOLDER", help="Audio Flamingo 3's think folder for text-CoT, which "
        "else is the backbone asked to think")
    add("--seconds", type=float, nargs="+", help="noise of these lengths; default: five ranges")
    add("--answer-tokens", type=COUNT, default=20, help="of noise (%(default)s)")
    add("--cot-tokens", type=COUNT, default=100, help="of reasoning before them (%(default)s)")
    add("--samples", type=COUNT, default=1, help="clips of a seed in each range (%(default)s)")
    add("--batch", type=COUNT, default=1, help="clips of noise at once (%(default)s)")
    add("--seeds", type=COUNT, default=3, help="of noise, or runs over the rows (%(default)s)")
    add("--compile", default=torch.cuda.is_available(), action=argparse.BooleanOptionalAction)
    add("--plot", metavar="FILE", help="draw latency against the length of the audio")
    add("--device", help="cpu or cuda; default: the GPU if there is one")
    args = parser.parse_args()
    args.device = usable_device(args.device)
    return args


if __name__ == "__main__":
    main()
