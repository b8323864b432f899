"""Trains the adapters, the three token rows and the projection heads, stage by stage (paper section 3.4, appendix A).

    python train.py --backbone tiny                                         # a laptop, two minutes, nothing to download
    torchrun --nproc-per-node 4 train.py --backbone qwen2-audio --data mixture.json    # four GPUs
    python train.py --resume runs/tiny                                      # goes on after the last checkpoint

Reads from top to bottom: flags, ranks, model, data, start or resume, loop, held-out questions. Without --data it trains
on made tones. Writes to the run folder config.json, log.jsonl (a line a step), losses.png and checkpoint-STEP/: a plain
PEFT adapter with the tokenizer, the heads (heads.safetensors) and what a resumed run needs (state.pt).
"""
import argparse
import functools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import peft
import safetensors
import safetensors.torch
import soundfile
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from data import (TONES, Mixture, Rows, Tones, check_least, checkpoint_steps, collate, fingerprint, latest_checkpoint,
                  one_line_errors, open_source, plan_stage, teacher_targets, to_device, usable_device)
from experts import EXPERTS, load
from heads import ProjectionHead, expert_loss, loss_scales, terms
from model import BACKBONES, IGNORE, InputError, load_coat

one_line_errors()
started = time.time()
# Dense bf16 peaks by the vendor's datasheets, FLOP/s, for the log's MFU.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}

# ----------------------------------------------------------------------------------------------------------------------
# Flags. Where one is not given it comes from the resumed run, else from the backbone's row, else from here.

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 argument_default=argparse.SUPPRESS, usage="%(prog)s [flags], see --help")
defaults = {}


def add(flag, default, help, **kwargs):
    defaults[flag.strip("-").replace("-", "_")] = default
    parser.add_argument(flag, help=f"{help} (default: {default})".replace("%", "%%"), **kwargs)


add("--backbone", "tiny", f"one of {', '.join(BACKBONES)}")
add("--model-path", None, "a local folder with the backbone, instead of the hub")
add("--data", "tones", "mixture.json or rows.jsonl, see data.py; or made tones, or some: tones:note,glide")
add("--out", None, "run folder; None: a new one under runs/")
add("--resume", None, "run folder to go on with; its config.json gives the other flags")
add("--stage", ["100000:recon", "100000:all"],
    "once a stage, STEPS:EXPERTS or STEPS:EXPERTS:LR, such as 500:recon,pitch:2e-4", action="append")
add("--lr", 1e-4, "learning rate of a stage that names none", type=float)
add("--batch", 16, "rows a step, over all ranks", type=int)
add("--micro-batch", None, "rows at once on a rank; None: all of its share", type=int)
add("--warmup", 0.03, "share of a stage in which the rate rises, before a cosine to zero", type=float)
add("--weight-decay", 0.1, "of the heads' matrices; adapters, token rows, norms and biases have none", type=float)
add("--clip", 1.0, "largest norm of the gradient", type=float)
add("--head", "transformer", "projection heads", choices=["transformer", "linear"])
add("--head-width", None, "width inside the heads; None: the backbone's", type=int)
add("--calibrate", 64, "clips over which the scale of each loss is measured", type=int)
for task in ["recon", *EXPERTS]:
    for term in terms(task):
        add(f"--w-{term.replace('_', '-')}", 1.0, f"weight of the {term} loss", type=float)
for task, expert in EXPERTS.items():
    add(f"--teacher-{task}", None, f"checkpoint of {expert.__name__}; None: fetched, or shipped")
add("--random-teachers", False, "the teachers' architectures with random weights, for tests and timing only",
    action="store_true")
add("--checkpointing", False, "recompute the decoder's activations in the backward pass: less memory, more time",
    action="store_true")
add("--compile", False, "torch.compile each decoder layer", action="store_true")
add("--seed", 0, "of new weights and of the order of the rows", type=int)
add("--save-every", 1000, "steps between checkpoints", type=int)
add("--keep", 2, "how many checkpoints stay", type=int)
add("--workers", 2, "data processes a rank", type=int)
add("--device", "cuda" if torch.cuda.is_available() else "cpu", "where to train")
add("--threads", None, "CPU threads of a rank; sums, and so a resumed run, depend on them in the last bit", type=int)
add("--heldout", 60, "held-out rows of each kind of tone question, asked at the end", type=int)
add("--tensorboard", False, "also write the log for TensorBoard, into the run folder", action="store_true")

given = vars(parser.parse_args())
begun_as, saved = {}, {}    # config.json of the run to go on with, and the flags in it
if "resume" in given:
    path = os.path.join(given["resume"], "config.json")
    if not os.path.isfile(path):
        raise InputError(f"no '{path}'; give --resume the folder of a run")
    with open(path) as file:
        begun_as = json.load(file)
    saved = begun_as["flags"]
    free = ("resume", "save_every", "keep", "workers", "device", "heldout", "tensorboard")    # the steps stay the same
    changed = [f"--{k.replace('_', '-')} (was {saved.get(k)}, now {v})" for k, v in given.items()
               if k not in free and saved.get(k) != v]
    if changed:
        raise InputError(f"a resumed run keeps its flags; leave out {', '.join(changed)}, or start a new run")
    saved["out"] = given["resume"]
name = (saved | given).get("backbone", defaults["backbone"])
if name not in BACKBONES:
    raise InputError(f"--backbone {name}: there are {', '.join(BACKBONES)}")
args = SimpleNamespace(**defaults | BACKBONES[name].train | saved | given)
check_least(args, batch=1, micro_batch=1, calibrate=1, save_every=1, keep=1, threads=1, head_width=1, workers=0, heldout=0,
            seed=0)

if args.threads:
    torch.set_num_threads(args.threads)
if args.tensorboard:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise InputError("--tensorboard needs a package of its own; pip install tensorboard") from e

stages = []    # (steps, experts, lr)
for text in args.stage:
    try:
        steps, names, rate = (text.split(":") + [args.lr] * (text.count(":") == 1))
        names = ["recon", *EXPERTS] if names == "all" else list(dict.fromkeys(names.split(",")))
        if int(steps) < 1 or not 0 < float(rate) < math.inf or not set(names) <= {"recon", *EXPERTS, "none"}:
            raise ValueError(text)
    except ValueError as e:
        raise InputError(f"--stage {text}: give STEPS:EXPERTS or STEPS:EXPERTS:LR with EXPERTS from "
                         f"recon,{','.join(EXPERTS)}, or all, or none; LR, or --lr, is a number above 0") from e
    stages.append((int(steps), [n for n in names if n != "none"], float(rate)))
tasks = list(dict.fromkeys(name for _, names, _ in stages for name in names))    # of any stage, in order
total = sum(steps for steps, _, _ in stages)

# ----------------------------------------------------------------------------------------------------------------------
# Ranks: torchrun sets these variables; without it there is one

rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
device = usable_device(f"cuda:{local}" if args.device == "cuda" else args.device)
if world > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def all_sum(*numbers):
    """Sums over the ranks, as floats."""
    t = torch.tensor(numbers, dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(t)
    return t.tolist()


def gather(value):
    """[value of each rank]"""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def say(text):
    if rank == 0:
        tqdm.write(text)


micro = args.micro_batch or max(1, args.batch // world)
if args.batch % (micro * world):
    raise InputError(f"--batch {args.batch} is not a multiple of {world} ranks times --micro-batch {micro}")
accumulate = args.batch // (micro * world)    # micro-batches a step on each rank

# ----------------------------------------------------------------------------------------------------------------------
# Model, heads, teachers. The same seed on every rank gives the same new weights.

if args.resume and not checkpoint_steps(args.out):
    raise InputError(f"'{args.out}' holds no checkpoint yet; start anew with --out {args.out} and the flags in its config.json")
checkpoint = latest_checkpoint(args.out) if args.resume else None
torch.manual_seed(args.seed)
coat = load_coat(args.backbone, checkpoint, args.model_path, trainable=True, device=device)
experts = {name: load(name, getattr(args, f"teacher_{name}"), device=device, random=args.random_teachers)
           for name in tasks if name != "recon"}
readouts = {name: getattr(expert, "readout", None) for name, expert in experts.items()}
width = coat.hf.config.get_text_config().hidden_size
heads = torch.nn.ModuleDict({
    name: ProjectionHead(width, experts[name].dim if name in experts else width, args.head, args.head_width)
    for name in tasks}).to(device)

if args.checkpointing:
    coat.checkpoint_activations()
if args.compile:
    coat.compile_layers()

adapters = [p for p in coat.parameters() if p.requires_grad]
decayed = [p for p in heads.parameters() if p.ndim >= 2]
others = [p for p in heads.parameters() if p.ndim < 2]
optimizer = torch.optim.AdamW([{"params": adapters + others, "weight_decay": 0.0},
                               {"params": decayed, "weight_decay": args.weight_decay}],
                              betas=(0.9, 0.95), fused=device.type == "cuda")
# Forward, and backward to the activations but not to the frozen weights: 4 FLOPs a weight and token.
flops_per_token = 4 * coat.decoder_weights
peak = device.type == "cuda" and next((v for k, v in PEAKS.items() if k in torch.cuda.get_device_name(device)), None)
autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

# ----------------------------------------------------------------------------------------------------------------------
# Data: a stage's rows are a function of (seed, stage), so the step alone says where a run stands

tones = args.data.split(":")[0] == "tones" and (args.data.split(":", 1)[1:] or [",".join(TONES)])[0].split(",")
if tones and set(tones) - set(TONES):
    raise InputError(f"--data {args.data}: give tones, or tones:KINDS with KINDS from {','.join(TONES)}")
source = Tones("train", total * args.batch, tones) if tones else open_source(args.data)
found = fingerprint(source)
if len(set(gather(found))) > 1:
    raise InputError(f"the ranks find different rows or audio in {args.data}; give all of them the same files")
spec, rates = coat.spec, {e.sample_rate for e in experts.values()}
for row, reason in source.seconds()[1]:
    say(f"skipped row {row}: {reason}")
skipped = len(source.seconds()[1])
if isinstance(source, Mixture):
    for n in sorted({steps * args.batch for steps, _, _ in stages}):    # all of them now: none should fail in a week
        say(f"a stage of {n} rows from {args.data}:\n" + "\n".join(source.report(n)))
can_fork = torch.multiprocessing.get_start_method() == "fork"    # else a data process would run this script once more
if args.workers and not can_fork:
    say("no data processes on this system (--workers 0): rows are loaded between the steps")


def own_group(worker):
    os.setpgid(0, 0)    # a signal to all processes is for the rank, which saves; its data processes end with it


def micro_batches(stage, first=0):
    """This rank's micro-batches of a stage, from step `first` on."""
    plan = plan_stage(source, stages[stage][0], args.batch, args.seed, stage)[first:]
    mine = plan.reshape(-1, accumulate, world, micro)[:, :, rank].reshape(-1, micro).tolist()
    return torch.utils.data.DataLoader(
        Rows(source), batch_sampler=mine, num_workers=args.workers * can_fork, pin_memory=device.type == "cuda",
        collate_fn=functools.partial(collate, spec=spec, rates=rates), worker_init_fn=own_group)


def targets_of(batch, names):
    """{name: (B, L, E)} of the teachers, in fp32 (a GPU's convolutions: TF32): bf16 would show in their log spectra."""
    return teacher_targets({name: experts[name] for name in names if name != "recon"}, batch)


# ----------------------------------------------------------------------------------------------------------------------
# Start afresh or go on

commit = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                                cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
config = {"flags": vars(args), "data": found, "world": world, "commit": commit,
          "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
          "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)}}
if args.resume:
    for file in ("state.pt", "heads.safetensors"):
        if not os.path.isfile(os.path.join(checkpoint, file)):
            raise InputError(f"'{checkpoint}' holds no {file}; delete it to go on after the checkpoint before it")
    if begun_as["data"] != found:
        raise InputError(f"the rows of {args.data}, or the lengths of their audio, are not those that the run began with; "
                         "bring them back, or start a new run")
    for what in ("world", "commit", "device", "versions"):
        if begun_as[what] != config[what]:
            say(f"!! not bit for bit: {what} was {begun_as[what]} when the run began and is now {config[what]}")
    try:
        state = torch.load(os.path.join(checkpoint, "state.pt"), map_location=device, weights_only=True)
        safetensors.torch.load_model(heads, os.path.join(checkpoint, "heads.safetensors"))
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, LookupError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as e:
        raise InputError(f"'{checkpoint}' is damaged ({str(e).splitlines()[0]}); delete it to go on after the one "
                         "before") from e
    if len(state["rng"]) == world:
        for set_state, value in zip((torch.set_rng_state, torch.cuda.set_rng_state), state["rng"][rank]):
            set_state(value.cpu())
    step, scales, skipped = state["step"], state["scales"], state["skipped"]
else:
    if rank == 0 and not args.out:
        free = (f"runs/{args.backbone}" + (f"-{i}" if i > 1 else "") for i in range(1, 10 ** 6))
        args.out = next(path for path in free if not os.path.exists(path))
    args.out = gather(args.out)[0]
    if checkpoint_steps(args.out):
        raise InputError(f"'{args.out}' already holds checkpoints; give --resume {args.out} to go on, or another --out")
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {args.out}: {e.strerror}; give a folder that can be made") from e
    # The scale of each loss: what the best constant answer would cost over the first clips (heads.loss_scales).
    clips, rows = {name: [] for name in tasks}, []
    if rank == 0 and tasks:
        longest = max(steps for steps, _, _ in stages)    # all as one could be more than a mixture's max_epochs allow
        rows = plan_stage(source, longest, args.batch, args.seed, 0).ravel()
        rows = rows[source.seconds()[0][rows] > 0][:args.calibrate]    # those with audio
    for i in range(0, len(rows), micro):
        batch = to_device(collate([Rows(source)[int(r)] for r in rows[i:i + micro]], spec, rates), device)
        if batch["rows"] and batch["n_audio"].any():
            with torch.no_grad(), autocast():
                heard = {"recon": coat(batch).audio_embeds} if "recon" in tasks else {}
            for name, z in (targets_of(batch, tasks) | heard).items():
                clips[name] += [z[j, :n] for j, n in enumerate(batch["n_audio"]) if n]
    scales = gather({name: loss_scales(name, z, readouts.get(name)) for name, z in clips.items() if z})[0]
    if source.seconds()[0].any() and set(scales) != set(tasks):
        raise InputError(f"none of the first {args.calibrate} clips can be used; see python data.py check {args.data}")
    del clips
    step = 0

log_path = os.path.join(args.out, "log.jsonl")
if rank == 0:
    if args.resume:    # what was logged after the checkpoint is done, and logged, again
        with open(log_path, "a+") as file, open(log_path + ".tmp", "w") as new:
            file.seek(0)
            new.writelines(line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step)
        os.replace(log_path + ".tmp", log_path)
    else:
        open(log_path, "w").close()    # of a start that came to no checkpoint
        with open(os.path.join(args.out, "config.json.tmp"), "w") as file:
            json.dump(config, file, indent=1)
        os.replace(file.name, os.path.join(args.out, "config.json"))
count = lambda params: sum(p.numel() for p in params) / 1e6
say(f"{args.backbone} on {world} x {device}: {count(coat.parameters()):.1f} M weights, of which {count(adapters):.2f} M "
    f"trained; heads {count(heads.parameters()):.2f} M ({', '.join(tasks) or 'none'})")
say(f"{total} steps of {args.batch} rows from {args.data}, to {args.out}, set up in {time.time() - started:.0f} s")
if tones and args.backbone != "tiny":
    say("!! training on made tones, which teach nothing about speech or sound; give --data a manifest, see data.py")


def save():
    """checkpoint-STEP, whole or not at all: it is written under another name and renamed. All ranks call it."""
    rng = gather([torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device.type == "cuda" else []))
    final = os.path.join(args.out, f"checkpoint-{step}")
    if rank == 0 and not os.path.exists(final):
        try:
            shutil.rmtree(final + ".tmp", ignore_errors=True)
            coat.save(final + ".tmp")
            safetensors.torch.save_model(heads, os.path.join(final + ".tmp", "heads.safetensors"))
            torch.save({"step": step, "optimizer": optimizer.state_dict(), "scales": scales, "skipped": skipped,
                        "rng": rng}, os.path.join(final + ".tmp", "state.pt"))
        except (OSError, RuntimeError, safetensors.SafetensorError) as e:    # each library has its own for a full disk
            shutil.rmtree(final + ".tmp", ignore_errors=True)
            raise InputError(f"cannot write {final}: {str(e).splitlines()[0]}; make room and go on with --resume "
                             f"{args.out}") from e
        os.rename(final + ".tmp", final)
        for n in checkpoint_steps(args.out)[:-args.keep]:
            shutil.rmtree(os.path.join(args.out, f"checkpoint-{n}"))
    gather(None)    # torchrun ends all ranks when one does, so none goes before this is written


def draw():
    """losses.png: every loss, as means over at most 300 pieces of the run; dashed where a stage begins."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("no losses.png without matplotlib; pip install matplotlib")
    with open(log_path) as file:
        lines = [json.loads(line) for line in file]
    fig = Figure(figsize=(8, 4), layout="constrained")
    axes = fig.subplots()
    for term in ["ce", *(term for name in tasks for term in terms(name))]:
        points = [(line["step"], line[term]) for line in lines if line.get(term) is not None]
        means = [np.mean(piece, 0) for piece in np.array_split(points, min(300, len(points)))] if points else [(0, np.nan)]
        axes.semilogy(*np.transpose(means), label=term)
    for begin in np.cumsum([steps for steps, _, _ in stages])[:-1]:
        axes.axvline(begin, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel="ce: nats a token; experts: 1 ignores the audio")
    axes.legend()
    fig.savefig(os.path.join(args.out, "losses.png"), dpi=80)


# ----------------------------------------------------------------------------------------------------------------------
# The loop

stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append("SIGTERM"))
bar = tqdm(total=total, initial=step, disable=rank > 0 or not sys.stderr.isatty(), dynamic_ncols=True)
log = open(log_path, "a") if rank == 0 else None
board = SummaryWriter(args.out, purge_step=step + 1) if rank == 0 and args.tensorboard else None
begin, begun = time.time(), step
for stage, (steps, names, rate) in enumerate(stages):
    first = step - sum(s for s, _, _ in stages[:stage])    # steps of this stage that are behind us
    if first >= steps:
        continue
    params = adapters + [p for name in names for p in heads[name].parameters()]
    loader = iter(micro_batches(stage, first))
    for i in range(first, steps):
        tick = time.time()
        try:
            batches = [to_device(next(loader), device) for _ in range(accumulate)]
        except RuntimeError:    # a data process is gone, perhaps by the signal that is to stop this one too
            time.sleep(1)
            if not stop:
                raise
            batches = []
        waited = time.time() - tick
        skipped_here = [reason for batch in batches for reason in batch["skipped"]]
        for reason in skipped_here:    # of every rank, hence not say()
            tqdm.write(f"skipped: {reason}")
        batches = [batch for batch in batches if batch["rows"]]

        # Every loss is a sum over the whole global batch divided by its count over the whole global batch, so that it
        # does not matter how the rows are cut into micro-batches and ranks.
        n_targets, n_frames, n_tokens, n_slots, seconds, n_skipped, stopped = all_sum(
            sum((b["labels"][:, 1:] != IGNORE).sum().item() for b in batches),
            sum(b["n_audio"].sum().item() for b in batches), sum(b["attention_mask"].sum().item() for b in batches),
            sum(b["input_ids"].numel() for b in batches), sum(b["seconds"] for b in batches), len(skipped_here), len(stop))
        if stopped:
            break
        if not n_targets:
            raise InputError(f"step {step + 1}: none of the {args.batch} rows can be used; see the reasons above")
        sums = dict.fromkeys(["ce", *(term for name in names for term in terms(name))], 0.0)
        taught = 0.0    # seconds spent in the teachers
        for batch in batches:
            audible = batch["n_audio"].any()
            mark = time.time()
            targets = targets_of(batch, names) if audible else {}
            if device.type == "cuda":
                torch.cuda.synchronize()
            taught += time.time() - mark
            with autocast():
                out = coat(batch)
                z_hats = {name: heads[name](out.think_states, out.valid) for name in names} if audible else {}
            targets["recon"] = out.audio_embeds
            loss = out.ce_sum / n_targets
            sums["ce"] += loss.item()
            for name, z_hat in z_hats.items():
                parts = expert_loss(name, z_hat.float(), targets[name], out.valid, scales[name], readouts.get(name))
                for term, value in parts.items():
                    loss = loss + getattr(args, f"w_{term}") * value / n_frames
                    sums[term] += value.item() / n_frames
            loss.backward()
        for p in params:    # a rank without audio in this step has no gradient for the heads
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if world > 1:
            flat = torch.cat([p.grad.flatten() for p in params])
            dist.all_reduce(flat)
            for p, grad in zip(params, flat.split([p.numel() for p in params])):
                p.grad.copy_(grad.view_as(p))
        sums = dict(zip(sums, all_sum(*sums.values())))
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip).item()
        if not math.isfinite(norm + sum(sums.values())):
            save()
            rows = [row["row"] for batch in batches for row in batch["rows"]]
            raise InputError(f"step {step + 1}: the loss is not finite; rows {rows} of this rank are in it. The last good "
                             "step is saved; look at these rows, or start a new run with a lower --lr")
        warm = max(1, round(args.warmup * steps))
        lr = rate * ((i + 1) / warm if i < warm else 0.5 + 0.5 * math.cos(math.pi * (i - warm) / (steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        skipped += int(n_skipped)

        took = time.time() - tick
        total_loss = sums["ce"] + sum(getattr(args, f"w_{term}") * v for term, v in sums.items() if term != "ce")
        if not n_frames:    # rows of text alone say nothing about the experts
            sums = dict.fromkeys(sums) | {"ce": sums["ce"]}
        line = {"step": step, "stage": stage + 1, "lr": lr, "loss": total_loss} | sums | {
            "grad_norm": norm, "tokens_per_s": n_tokens / took, "audio_s_per_s": seconds / took,
            "padding": 1 - n_tokens / n_slots, "data_wait": waited / took, "teachers": taught / took, "skipped": skipped,
            "mfu": flops_per_token * n_tokens / took / (peak * world) if peak else None,
            "gib": torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None}
        if rank == 0:
            log.write(json.dumps(line) + "\n")
            log.flush()
            eta = (time.time() - begin) / (step - begun) * (total - step)
            say(f"step {step}/{total} stage {stage + 1} lr {lr:.1e} loss {total_loss:.3f} "
                + " ".join(f"{k} -" if v is None else f"{k} {v:.3f}" for k, v in sums.items())
                + f" norm {norm:.2f} | {n_tokens / took:.0f} tok/s, {seconds / took:.1f} audio s/s, padding "
                f"{line['padding']:.0%}, data wait {line['data_wait']:.0%}, teachers {line['teachers']:.0%}, "
                + (f"MFU {line['mfu']:.0%} of {peak / 1e12:.0f} TFLOP/s, {line['gib']:.1f} GiB, " if peak else "")
                + f"eta {eta:.0f} s")
            for key, value in line.items() if board else ():
                if value is not None and key != "step":
                    board.add_scalar(key, value, step)
        bar.update()
        if step % args.save_every == 0 and step < total:
            save()
    else:
        continue
    break    # stopped by a signal
bar.close()
loader = None    # ends the data processes here, in order
save()
if rank == 0 and step:
    draw()
if board:
    board.close()
if skipped:
    say(f"{skipped} rows were skipped, see above and log.jsonl")
if step < total:
    say(f"stopped after step {step}; go on with: python train.py --resume {args.out}")
    sys.exit(0)

# ----------------------------------------------------------------------------------------------------------------------
# Does it hear? Held-out questions about tones, and as a control the same questions over another row's clip.

if rank == 0 and tones and args.heldout:
    coat.merge()
    heldout, results = Tones("heldout", args.heldout * len(tones), tones), {}
    say(f"\n{'held-out question':28}{'heard':>8}{'other clip':>12}{'chance':>8}")
    for kind in tones:
        rows = [row for i in range(len(heldout)) if (row := Rows(heldout)[i])["task"] == kind]
        score = []
        for shift in (0, 1):
            asked = [row | {"wave": rows[i - shift]["wave"]} for i, row in enumerate(rows)]
            answers = []
            for i in range(0, len(asked), args.batch):
                batch = to_device(collate(asked[i:i + args.batch], spec, responses=False), device)
                answers += coat.generate(batch, max_new_tokens=12)
            score.append(sum(a == row["response"] for a, row in zip(answers, asked)) / len(asked))
        results[kind] = {"heard": score[0], "other_clip": score[1], "chance": 1 / len(TONES[kind][1])}
        say(f"{TONES[kind][0]:28}{score[0]:8.0%}{score[1]:12.0%}{results[kind]['chance']:8.0%}")
    with open(os.path.join(args.out, "heldout.json"), "w") as file:
        json.dump(results, file, indent=1)
    clip = os.path.join(args.out, f"heldout-{kind}-{rows[0]['response']}.wav")    # the last kind's first clip
    soundfile.write(clip, rows[0]["wave"].numpy(), rows[0]["rate"])
    say(f"\ndone in {time.time() - started:.0f} s. Now ask about a clip it has never heard; the answer is in the file's "
        f"name:\n  python infer.py ask {args.out} {clip} --question \"{TONES[kind][0]}\"")
else:
    say(f"\ndone in {time.time() - started:.0f} s. Now ask:\n  python infer.py ask {args.out} CLIP --question \"...\"")
if world > 1:
    dist.destroy_process_group()
