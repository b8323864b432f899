"""What thinking costs: base, CoAT and text chain of thought in the same engine (paper table 2, table E).

    python bench.py latency --plot latency.png                         # tiny, on any machine
    python bench.py latency --backbone qwen2-audio --random-weights    # full size, no download
    python bench.py train       # training steps against the plain way, and the share of each teacher
    python bench.py loss        # output head and loss at Qwen2-Audio's vocabulary against the plain way
    python bench.py scale       # cost against audio length and number of ranks, with the fitted exponents
    python bench.py facts       # sizes of the full backbones and heads, without their weights

Noise as audio; what is compared takes turns, after a turn that is not counted. What the hardware could do is measured
first, and figures are given as a share of it. The last line of the output is one JSON object.
"""
import argparse
import ctypes
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import transformers

from data import (Rows, check_seconds, collate, need, one_line_errors, plan_stage, teacher_targets, to_device,
                  usable_device)
from experts import EXPERTS, load
from heads import ProjectionHead, expert_loss, terms
from model import (BACKBONES, SAMPLE_RATE, CoAT, InputError, add_adapters, add_think_tokens, build_config, build_inputs,
                   build_processor, load_coat)

RANGES = ((0.1, 5), (5, 10), (10, 30), (30, 60), (60, 120))    # seconds, table E


class Noise:
    """n rows of noise of `low` to `high` seconds, evenly spread in an order without pattern; answers of 41 tokens."""

    def __init__(self, n, low, high):
        self.lengths = low + (high - low) * (np.arange(n) * 0.6180339887 % 1)

    def __len__(self):
        return len(self.lengths)

    def seconds(self):
        return self.lengths, []

    def load(self, i):
        wave = torch.randn(round(self.lengths[i] * SAMPLE_RATE), generator=torch.Generator().manual_seed(int(i)))
        return {"wave": 0.1 * wave, "rate": SAMPLE_RATE, "prompt": "What is heard?", "response": "x" * 40}


def positive(text):
    """An int of at least 1, for argparse."""
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return n


def lengths(text):
    """The seconds of a flag such as 2.5,20."""
    try:
        values = [float(s) for s in text.split(",")]
    except ValueError as e:
        raise InputError(f"'{text}' is no list of seconds; give such as 2.5,20") from e
    for seconds in values:
        check_seconds(seconds, "a clip of the flags")
    return values


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
    turns = [[seconds_of(f, device) for f in functions] for _ in range(repeats + 1)]
    return [statistics.median(times) for times in zip(*turns[1:])]


def peak_mib(function, device):
    """How far memory rises while `function` runs: what is allocated on a GPU, what is resident on Linux, else NaN."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if not sys.platform.startswith("linux"):
        return float("nan")

    def high_water():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    ctypes.CDLL(None).malloc_trim(0)    # gives back what is free already
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                 # the high-water mark becomes what is resident now
    before = high_water()
    function()
    return high_water() - before


def hardware(device):
    """{machine, flops: FLOP/s of a matrix product, bandwidth: bytes/s of a copy, read and written}, here and now."""
    dtype, n = (torch.bfloat16, 4096) if device.type == "cuda" else (torch.float32, 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(n * 2 ** 16, device=device)    # memory nobody has written to yet is not read
    target = torch.empty_like(source)
    product, copy = median_seconds([lambda: a @ b, lambda: target.copy_(source)], device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found = {"machine": name, "flops": 2 * n ** 3 / product, "bandwidth": 2 * source.nbytes / copy}
    print(f"{name}: measured {found['flops'] / 1e12:.3g} TFLOP/s and {found['bandwidth'] / 1e9:.3g} GB/s")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# latency

def prefill_flops(coat, batch):
    """2 a weight and position, 4 a channel and pair of positions; the decoder's attention sees half of the pairs."""
    config, tower, (B, T) = coat.hf.config, coat.hf.model.audio_tower, batch["input_ids"].shape
    text, audio = config.get_text_config(), config.audio_config
    windows, _, frames = batch["audio"]["input_features"].shape    # 100 log-mel frames a second, half as many positions
    positions, reach = windows * frames // 2, frames // 2
    if hasattr(audio, "n_window"):                                 # Omni: the clip without padding, in blocks
        positions, reach = 2 * int(batch["n_audio"].sum()), audio.n_window
    of_tower = 2 * sum(p.numel() for p in tower.parameters()) + 4 * audio.encoder_layers * audio.d_model * reach
    return positions * of_tower + B * T * 2 * (coat.decoder_weights + text.num_hidden_layers * text.hidden_size * T)


def decode_bytes(coat, batch, n_tokens):
    """What a step has to read: decoder, output head, and the keys and values up to the middle of the answer."""
    head, text, (B, T) = coat.hf.lm_head.weight, coat.hf.config.get_text_config(), batch["input_ids"].shape
    kept = 2 * text.num_hidden_layers * text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return head.element_size() * (coat.decoder_weights + head.numel() + kept * B * (T + n_tokens / 2))


def ours(coat, batch, n_tokens, device):
    """(seconds to the first token, seconds for the others, ids (B, n_tokens))"""
    begin, ids = now(device), []
    for token in coat.stream(batch, n_tokens, stop=False):
        ids.append(token)
        if len(ids) == 1:
            first = now(device)
    return first - begin, now(device) - first, torch.stack(ids, 1)


def theirs(coat, batch, n_tokens, device):
    """The same with the generate() of transformers."""
    times = [now(device)]

    def clock(ids, scores):
        if len(times) == 1:
            times.append(now(device))
        return scores
    ids = coat.hf.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                           **coat.audio_inputs(batch), do_sample=False, max_new_tokens=n_tokens,
                           min_new_tokens=n_tokens, suppress_tokens=coat.think_ids,
                           logits_processor=transformers.LogitsProcessorList([clock]))
    return times[1] - times[0], now(device) - times[1], ids[:, batch["input_ids"].shape[1]:]


def same_until(eos, a, b):
    """Whether ids (B, n) agree up to the eos, after which ours goes on and theirs was not allowed to end."""
    alive = torch.isin(a, eos).cumsum(1) == 0
    return torch.equal(a[alive], b[alive])


def listen(coat, arms, low, high, args, machine, device):
    """{arm: [a run a clip]}: for each seed `--samples` clips of low to high seconds, heard by every arm in turn."""
    runs = {arm: [] for arm in arms}
    for seed in range(-1, args.seeds):    # seed -1 warms up
        draw = random.Random(seed)
        for _ in range(args.samples if seed >= 0 else 1):
            clips = Noise(args.batch, *[draw.uniform(low, high)] * 2)
            waves = [clips.load(i)["wave"] for i in range(args.batch)]
            for arm, (engine, think, n) in arms.items():
                batch = to_device(build_inputs(coat, waves, ["What is heard?"] * args.batch, think=think), device)
                first, rest, ids = engine(coat, batch, n, device)
                run = {"arm": arm, "seed": seed, "seconds": clips.lengths[0], "ids": ids, "decoded": ids.shape[1],
                       "prompt": batch["input_ids"].shape[1], "block": int(batch["n_audio"][0]) + 2 if think else 0,
                       "first": 1e3 * first, "decoding": 1e3 * rest, "total": 1e3 * (first + rest),
                       "prefill_at": prefill_flops(coat, batch) / machine["flops"] / first,
                       "decoding_at": decode_bytes(coat, batch, n) / machine["bandwidth"] * (n - 1) / rest}
                runs[arm] += [run] if seed >= 0 else []
    return runs


def latency(args):
    """First token, decoding and total of the arms on clips from the ranges of table E, or of exactly --seconds."""
    device = usable_device(args.device)
    ranges = [(s, s) for s in lengths(args.seconds)] if args.seconds else RANGES
    coat = load_coat(args.backbone, model_path=args.model_path, device=device, random=args.random_weights).merge()
    if args.compile:
        coat.compile_decode()
    machine, n = hardware(device), args.answer_tokens
    arms = {"base": (ours, False, n), "CoAT": (ours, True, n), "text-CoT": (ours, False, args.cot_tokens + n),
            "generate": (theirs, True, n)}
    print(f"{args.backbone}, batch {args.batch}: answers of {n} tokens, text-CoT after {args.cot_tokens} of reasoning; "
          f"generate is that of transformers.\nMilliseconds: mean (deviation) of {args.seeds} seeds, median of the "
          f"clips; at: share of what the hardware could do.\n\n{'audio':>8} {'arm':8}{'prompt':>7}{'block':>6}"
          f"{'decoded':>8}{'first token':>23}{'at':>6}{'decoding':>23}{'at':>6}{'total':>23}")
    eos = torch.tensor(coat.processor.tokenizer.convert_tokens_to_ids(list(coat.backbone.eos)), device=device)
    rows, ratios, points = [], [], []
    for low, high in ranges:
        runs = listen(coat, arms, low, high, args, machine, device)
        for arm, mine in runs.items():
            row = {"audio": f"{low:.3g} s" if low == high else f"{low:.0f}-{high:.0f} s", "arm": arm}
            for key in ("prompt", "block", "decoded", "first", "decoding", "total", "prefill_at", "decoding_at"):
                seeds = [statistics.mean(run[key] for run in mine if run["seed"] == s) for s in range(args.seeds)]
                row |= {key: statistics.median(run[key] for run in mine), key + "_mean": statistics.mean(seeds),
                        key + "_sd": statistics.pstdev(seeds)}
            print("{audio:>8} {arm:8}{prompt:7.0f}{block:6.0f}{decoded:8.0f}"
                  "{first_mean:8.1f} ({first_sd:5.1f}){first:7.1f}{prefill_at:6.0%}"
                  "{decoding_mean:8.1f} ({decoding_sd:5.1f}){decoding:7.1f}{decoding_at:6.0%}"
                  "{total_mean:8.1f} ({total_sd:5.1f}){total:7.1f}".format(**row))
            rows.append(row)
            points += mine

        def ratio(key, a, b):    # clip by clip, so that their lengths fall out
            return statistics.median(x[key] / y[key] for x, y in zip(runs[a], runs[b]))
        ratios.append({
            "audio": row["audio"], "prompt": ratio("prompt", "CoAT", "base"), "first": ratio("first", "CoAT", "base"),
            "total": ratio("total", "CoAT", "text-CoT"), "first_generate": ratio("first", "CoAT", "generate"),
            "speed_generate": ratio("decoding", "generate", "CoAT"), "clips": len(runs["CoAT"]),
            "same_ids": sum(same_until(eos, x["ids"], y["ids"]) for x, y in zip(runs["CoAT"], runs["generate"]))})
        print("{0:9}CoAT / base: prompt {prompt:.2f}, first token {first:.2f}; / text-CoT: total {total:.2f};\n{0:9}"
              "/ generate: first token {first_generate:.2f}, tokens/s {speed_generate:.2f}, same ids {same_ids} of "
              "{clips}\n".format("", **ratios[-1]))
    if args.plot:
        plot(points, args.plot, f"{args.backbone} on {machine['machine']}")
    return machine | {"backbone": args.backbone, "batch": args.batch, "rows": rows, "ratios": ratios}


def plot(points, path, title):
    """Latency against the length of the audio, a point a clip."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for arm, color in (("base", "gray"), ("CoAT", "tab:blue"), ("text-CoT", "tab:red")):
        x, total, first = zip(*sorted((p["seconds"], p["total"], p["first"]) for p in points if p["arm"] == arm))
        axes.plot(x, total, "o-", color=color, markersize=4, label=f"{arm}, whole answer")
        if arm != "text-CoT":    # it has base's
            axes.plot(x, first, "o:", color=color, markersize=3, label=f"{arm}, first token")
    axes.set(xlabel="audio, s", ylabel="ms", title=title, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as e:    # no such folder, or kind of picture
        raise InputError(f"--plot {path}: {str(e).splitlines()[0]}") from e


# ----------------------------------------------------------------------------------------------------------------------
# train, loss, scale

def our_loss(coat, batch):
    out = coat(batch)
    return out.ce_sum / out.n_targets


def plain_loss(coat, batch):
    """transformers' own: logits at every position, whatever the labels."""
    return coat.hf(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "labels")},
                   **coat.audio_inputs(batch), use_cache=False).loss


WAYS = {"ours": our_loss, "plain": plain_loss}


def load_trainable(args, device):
    torch.manual_seed(0)
    return load_coat(args.backbone, None, args.model_path, True, device, random=args.random_weights)


def learn(value, optimizer):
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


def n_slots(batch):
    return batch["input_ids"].numel()


def compare(coat, args, tune, device):
    """{way: {rows_per_s, tokens_per_s, padding, peak_mib}, ratio: ..} over the same rows."""
    source = Noise(args.batch * args.steps, lengths(args.mix)[0], lengths(args.mix)[-1])
    alike = plan_stage(source, args.steps, args.batch, 0, 0)
    shuffled = np.random.default_rng(0).permutation(alike.ravel()).reshape(alike.shape)
    steps = {name: [to_device(collate([Rows(source)[r] for r in rows], coat.spec), device) for rows in plan]
             for name, plan in zip(WAYS, (alike, shuffled))}
    took, table = {name: [] for name in WAYS}, {}
    for i in range(-1, args.steps):    # the first step twice: it warms up
        for name, way in WAYS.items():
            seconds = seconds_of(functools.partial(tune, way, steps[name][max(i, 0)]), device)
            took[name] += [seconds] if i >= 0 else []
    for name, way in WAYS.items():
        seconds, tokens = sum(took[name]), sum(int(batch["attention_mask"].sum()) for batch in steps[name])
        table[name] = {"rows_per_s": len(source) / seconds, "tokens_per_s": tokens / seconds,
                       "padding": 1 - tokens / sum(map(n_slots, steps[name])),
                       "peak_mib": peak_mib(functools.partial(tune, way, max(steps[name], key=n_slots)), device)}
    table["ratio"] = {key: table["ours"][key] / table["plain"][key] for key in table["ours"]}
    return table


def train(args):
    """Steps our way and the plain way, without experts; then each teacher alone and steps with all of them."""
    device = usable_device(args.device)
    coat = load_trainable(args, device)
    if args.checkpointing:
        coat.checkpoint_activations()
    if args.compile:
        coat.compile_layers()
    width = coat.hf.config.get_text_config().hidden_size
    teachers = {name: load(name, device=device, random=True) for name in EXPERTS if not args.no_teachers}
    dims = {"recon": width} | {name: teacher.dim for name, teacher in teachers.items()}
    heads = torch.nn.ModuleDict({name: ProjectionHead(width, dim, width=args.head_width) for name, dim in dims.items()})
    params = [p for p in [*coat.parameters(), *heads.to(device).parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=device.type == "cuda")
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
    machine = hardware(device)

    def tune(way, batch):
        with autocast():
            value = way(coat, batch)
        learn(value, optimizer)

    def step(batch, targets):
        with autocast():
            out = coat(batch)
            z_hats = {name: head(out.think_states, out.valid) for name, head in heads.items()}
        value = out.ce_sum / out.n_targets
        for name, z in (targets | {"recon": out.audio_embeds}).items():
            scales, readout = dict.fromkeys(terms(name), 1.0), getattr(teachers.get(name), "readout", None)
            value = value + sum(expert_loss(name, z_hats[name].float(), z, out.valid, scales, readout).values())
        learn(value, optimizer)

    table, rows = compare(coat, args, tune, device), []
    print(f"{args.backbone}, {args.steps} steps of {args.batch} rows of {args.mix} s, no experts. Ours: clips alike in "
          f"length, logits at the answers;\nplain: random batches, transformers' loss.\n"
          f"{'':8}{'rows/s':>8}{'tokens/s':>10}{'padding':>9}{'peak MiB':>10}")
    for name in WAYS:
        print("{:8}{rows_per_s:8.2f}{tokens_per_s:10.0f}{padding:9.1%}{peak_mib:10.0f}".format(name, **table[name]))
    print("{:8}{rows_per_s:8.2f}{tokens_per_s:10.2f}{padding:9.2f}{peak_mib:10.2f}\n".format("ratio", **table["ratio"]))

    print(f"Steps of {args.batch} rows with experts, heads at width {args.head_width or width}; MFU counts 4 FLOPs a "
          f"decoder weight and token\n{'audio':>8} {'work':19}{'seconds':>8}{'peak MiB':>10}{'tokens/s':>10}{'MFU':>7}")
    for seconds in lengths(args.seconds):
        batch = to_device(collate([Noise(1, seconds, seconds).load(0)] * args.batch, coat.spec,
                                  {teacher.sample_rate for teacher in teachers.values()}), device)
        teach, ready = functools.partial(teacher_targets, batch=batch), teacher_targets(teachers, batch)
        work = {name: functools.partial(teach, {name: teacher}) for name, teacher in teachers.items()}
        work |= {"step, targets known": lambda: step(batch, ready), "step": lambda: step(batch, teach(teachers))}
        for (name, function), took in zip(work.items(), median_seconds(work.values(), device, args.repeats)):
            speed = int(batch["attention_mask"].sum()) / took * name.startswith("step")
            rows.append({"seconds": seconds, "work": name, "s": took, "tokens_per_s": speed, "peak_mib":
                         peak_mib(function, device), "mfu": 4 * coat.decoder_weights * speed / machine["flops"]})
            line = "{seconds:7.1f}s {work:19}{s:8.3f}{peak_mib:10.0f}{tokens_per_s:10.0f}{mfu:7.1%}".format(**rows[-1])
            print(line if speed else line[:-17])    # a teacher has no tokens
        print(f"{'':9}the teachers are {1 - rows[-2]['s'] / rows[-1]['s']:.0%} of a step\n")
    return machine | {"backbone": args.backbone, "batch": args.batch, "mix": table, "rows": rows}


def loss(args):
    """Output head and cross-entropy, there and back, in Qwen2-Audio's class with its vocabulary but no decoder layers:
    CoAT's forward against model(labels=...)."""
    device, backbone = usable_device(args.device), BACKBONES["qwen2-audio"]
    config, processor = build_config(backbone), build_processor(backbone)
    config.text_config.num_hidden_layers, config.audio_config.encoder_layers = 0, 0
    config.text_config.hidden_size = args.hidden
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        lm = backbone.model_class._from_config(config, dtype=dtype).requires_grad_(False)
    lm.model.language_model.norm.requires_grad_(True)    # so that there is a way back through the head
    coat = CoAT(lm, processor, "qwen2-audio", None, add_think_tokens(lm, processor.tokenizer))
    answer = "x" * (args.targets - 1)                    # a token a letter, and the one that ends it
    spare = args.tokens - n_slots(build_inputs(coat, [None], [""], [answer]))
    if min(args.targets, spare) < 1:
        raise InputError(f"--targets must be at least 1, and --tokens at least {args.tokens - spare + 1} with as many")
    batch = to_device(build_inputs(coat, [None], ["x" * spare], [answer]), device)
    machine = hardware(device)
    work = [lambda way=way: way(coat, batch).backward() for way in WAYS.values()]
    took = median_seconds(work, device, args.repeats)
    rows = {name: {"loss": way(coat, batch).item(), "s": s, "peak_mib": peak_mib(function, device)}
            for (name, way), s, function in zip(WAYS.items(), took, work)}
    rows["plain / ours"] = {key: rows["plain"][key] / rows["ours"][key] for key in rows["ours"]}
    print(f"{lm.lm_head.out_features} x {args.hidden}, {args.tokens} tokens, {args.targets} targets\n{'':14}{'loss':>9}"
          f"{'seconds':>9}{'peak MiB':>10}")
    for name, row in rows.items():
        print("{:14}{loss:9.5f}{s:9.3f}{peak_mib:10.1f}".format(name, **row))
    return machine | {"hidden": args.hidden, "rows": rows}


def ranks_speed(n, args):
    """Tokens a second of train.py with 8 rows of made tones on each of `n` ranks of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--backbone", args.backbone, "--stage", "12:recon", "--batch", 8 * n, "--calibrate", 4, "--heldout", 0,
                 "--threads", 1, "--workers", 0, "--device", args.device, "--out", os.path.join(folder, "run")]
        flags += ["--model-path", args.model_path] if args.model_path else []
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
        done = subprocess.run([sys.executable, *torchrun, "train.py", *map(str, flags)], capture_output=True, text=True,
                              cwd=os.path.dirname(os.path.abspath(__file__)))
        if done.returncode:
            raise InputError(f"train.py fails on {n} ranks: {(done.stderr.strip() or '?').splitlines()[-1]}")
        with open(os.path.join(folder, "run", "log.jsonl")) as file:
            return statistics.median(json.loads(line)["tokens_per_s"] for line in list(file)[2:])    # two warm up


def exponent(x, y):
    """k of y ~ x ** k, a straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def scale(args):
    """The prefill and the training step of one row of growing length; then train.py on more and more ranks."""
    device, seconds, costs, speeds, fits = usable_device(args.device), lengths(args.seconds), [], [], {}
    coat = load_trainable(args, device)
    optimizer = torch.optim.AdamW([p for p in coat.parameters() if p.requires_grad], lr=1e-5)
    machine = hardware(device)
    print(f"{args.backbone}, one row\n{'audio':>8}{'first token, ms':>17}{'training step, ms':>19}")
    for s in seconds:
        asked, taught = (to_device(collate([Noise(1, s, s).load(0)], coat.spec, responses=with_them), device)
                         for with_them in (False, True))
        work = [lambda: next(coat.stream(asked, 1)), lambda: learn(our_loss(coat, taught), optimizer)]
        costs.append(median_seconds(work, device, args.repeats))
        print(f"{s:7.1f}s{1e3 * costs[-1][0]:17.1f}{1e3 * costs[-1][1]:19.1f}")
    for name, some in (("all", slice(None)), ("last two", slice(-2, None))) if len(seconds) > 1 else ():
        fits[name] = [exponent(seconds[some], cost[some]) for cost in zip(*costs)]
        print("cost ~ length to the power of {:.2f} and {:.2f} ({})".format(*fits[name], name))
    if args.random_weights:
        print("ranks: not with --random-weights, which train.py does not have")
        args.ranks = []
    for n in args.ranks:
        speeds.append(ranks_speed(n, args))
        print(f"{n} ranks: {speeds[-1]:.0f} tokens/s, a rank {speeds[-1] / n * args.ranks[0] / speeds[0]:.0%} of the first")
    if len(speeds) > 1:
        fits["ranks"] = exponent(args.ranks, speeds)
        print(f"tokens/s ~ ranks to the power of {fits['ranks']:.2f}")
    return machine | {"seconds": seconds, "costs": costs, "exponents": fits, "ranks": args.ranks, "tokens_per_s": speeds}


def facts(args):
    """Parameters and training memory of the full-size backbones, built on the meta device, without weights."""
    count = lambda tensors: sum(t.numel() for t in tensors)
    trained = lambda lm, lora: count(p for n, p in lm.named_parameters() if p.requires_grad and ("lora_" in n) == lora)
    table, gib = {}, 2 ** 30
    for name, backbone in BACKBONES.items():
        used, config = backbone.used_ids, build_config(backbone)
        ids, text = [used, used + 1, used + 2], config.get_text_config()
        text.vocab_size = max(text.vocab_size, used + 3)    # grows where add_think_tokens would make it grow
        with torch.device("meta"):
            lm = backbone.model_class(config).requires_grad_(False)
            dims = [text.hidden_size] + [expert().dim for expert in EXPERTS.values()]
            heads = [count(p for dim in dims for p in ProjectionHead(text.hidden_size, dim, width=width).parameters())
                     for width in (None, args.head_width)]
            decoder, head, total = (count(m.parameters()) for m in (lm.model.language_model, lm.lm_head, lm))
            lm = add_adapters(lm, backbone, ids)
        lora, rows = trained(lm, True), trained(lm, False)
        # Frozen weights in bf16; what is trained has weight, gradient and two moments of AdamW, all in fp32.
        frozen, full, narrow = 2 * total, *(16 * (lora + rows + n) for n in heads)
        table[name] = {
            "tower and projector": total - decoder - head, "language model": decoder, "output head": head, "all": total,
            "LoRA of rank 16 (tiny: 32)": lora, "rows of the three tokens": rows,
            "their ids": f"{ids[0]} .. {ids[-1]}", "five heads": heads[0],
            f"five heads, --head-width {args.head_width}": heads[1], "GiB, frozen": frozen / gib,
            "GiB, trained": full / gib, "GiB, sum": (frozen + full) / gib,
            f"GiB, sum, --head-width {args.head_width}": (frozen + narrow) / gib}
    print(f"{'parameters':32}" + "".join(f"{name:>20}" for name in table))
    for key in next(iter(table.values())):
        cells = [row[key] for row in table.values()]
        print(f"{key:32}" + "".join(f"{c:>20}" if isinstance(c, str) else f"{c:20,.1f}" if isinstance(c, float)
                                    else f"{c:20,}" for c in cells))
    print("\nGiB a GPU: frozen weights in bf16; trained ones in fp32 with gradient and two Adam moments. Not counted: "
          "activations, the\nteachers, and the copy that peft makes of the embedding table in every forward.")
    return {"backbones": table}


if __name__ == "__main__":
    one_line_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    on_gpu = torch.cuda.is_available()

    def command(run, help, with_model=True):
        p = commands.add_parser(run.__name__, help=help, usage="%(prog)s [flags], see %(prog)s --help")
        p.set_defaults(run=run)
        p.add_argument("--device", default="cuda" if on_gpu else "cpu")
        if with_model:
            p.add_argument("--backbone", default="tiny", choices=list(BACKBONES))
            p.add_argument("--model-path", help="a local folder with the backbone, instead of the hub")
            p.add_argument("--random-weights", action="store_true", help="full size without its files")
        return p.add_argument

    add = command(latency, "first token, decoding and total of base, CoAT, text-CoT and transformers' generate")
    add("--seconds", help="exact audio lengths, such as 2.5,20; default: drawn from the ranges of table E")
    add("--answer-tokens", type=positive, default=20)
    add("--cot-tokens", type=positive, default=100)
    add("--seeds", type=positive, default=3)
    add("--samples", type=positive, default=1, help="clips of a seed in each range")
    add("--batch", type=positive, default=1)
    add("--compile", default=on_gpu, action=argparse.BooleanOptionalAction, help="fuse the kernels of a decoding step")
    add("--plot", metavar="FILE", help="draw latency against the length of the audio")
    add = command(train, "training steps against the plain way, and the share of each teacher")
    add("--batch", type=positive, default=8, help="rows of a step")
    add("--mix", default="1,30", metavar="S,S", help="shortest and longest clip of the comparison")
    add("--steps", type=positive, default=8, help="of the comparison")
    add("--seconds", default="1", help="audio lengths of the steps with experts")
    add("--repeats", type=positive, default=2)
    add("--head-width", type=positive, help="width inside the heads; default the backbone's")
    add("--no-teachers", action="store_true", help="recon alone")
    add("--checkpointing", action="store_true", help="as in train.py")
    add("--compile", action="store_true", help="as in train.py")
    add = command(loss, "output head and loss at Qwen2-Audio's vocabulary against the plain way", with_model=False)
    add("--hidden", type=positive, default=1024, help="width; Qwen2-Audio's is 4096")
    add("--tokens", type=positive, default=800)
    add("--targets", type=positive, default=40)
    add("--repeats", type=positive, default=3)
    add = command(scale, "cost against audio length and number of ranks")
    add("--seconds", default="1,3,10,30,60,120")
    add("--ranks", type=positive, nargs="*", default=[1, 2] if not on_gpu else list(range(1, torch.cuda.device_count() + 1)))
    add("--repeats", type=positive, default=3)
    add = command(facts, "parameters, token ids and training memory of the full backbones", with_model=False)
    add("--head-width", type=positive, default=1024, help="the narrow heads to count beside the full ones")
    args = parser.parse_args()
    print(json.dumps({"bench": args.command} | args.run(args)))
