"""Trains adapters, token rows and projection heads, stage by stage (section 3.4, appendix A).

    python train.py --backbone tiny                     # two to three minutes, no download
    python train.py --resume runs/tiny                  # goes on after the last checkpoint
    torchrun --nproc-per-node 4 train.py --backbone qwen2-audio --data mixture.json    # four GPUs

Without --data it trains on synthetic tones. The run folder gets config.json (the flags), log.jsonl
(a line a step), losses.png and checkpoint-STEP/: a plain PEFT adapter with the tokenizer, the heads
with the scales of their losses (heads.safetensors), and what a resumed run needs (state.pt).
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from typing import NamedTuple

from model import (BACKBONES, COUNT, IGNORE, WORKERS, InputError, checkpoint_steps, in_range,
                   latest_checkpoint, load_coat, one_line_errors, read_json, to_device,
                   usable_device, write_file)    # first: it names a library that does not import
import numpy as np
import safetensors.torch
import soundfile
import torch
import torch.distributed as dist
from filelock import FileLock
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (TONES, Rows, Tones, collate, expert_targets, fingerprint, idle_batch, open_source,
                  plan_stage)
from experts import EXPERTS, load_experts
from heads import heads_for, terms

PAPER_STAGES = ["100000:recon", "100000:all"]    # section 3.4
# 8 B weights leave little memory. Random weights know nothing worth keeping: tiny learns faster.
LARGE = dict(checkpointing=True, micro_tokens=8192)
DEFAULTS = {
    "qwen2-audio": LARGE, "qwen2.5-omni": LARGE, "audio-flamingo-3": LARGE,
    "tiny": dict(stage=["100:recon=0.3", "260:recon=0.3,pitch=0.3"], batch=8, lr=2e-3,
                 calibrate=32, threads=1, workers=1),
}
FREE_FLAGS = {"resume", "out", "data", "save_every", "log_every", "keep", "workers", "device",
              "heldout"}    # may differ in a resumed run
MODEL_FLAGS = ("backbone", "model_path", "head", "head_width", "focal_gamma")    # of --init-from
MAX_LOST = 5    # steps in a row that cannot be taken
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}    # bf16 FLOP/s, dense
POSITIVE = in_range(float, 1e-30, 1e30)    # within fp32
RANK = int(os.environ.get("RANK", 0))    # torchrun sets these; without it there is one process
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))    # torchrun --max-restarts
STOP = []    # why the run is to save and end before its next step


# --------------------------------------------------------------------------------------------------
# Flags, ranks

def absolute(text):
    """A path that is there as an absolute one: a run may be resumed from another folder."""
    return os.path.abspath(text) if os.path.exists(text) and text != "tones" else text


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default="tiny", choices=list(BACKBONES))
    add("--model-path", type=absolute, help="a local folder, or NAME@REVISION of the hub")
    add("--data", type=absolute, nargs="+", default=["tones"], help="mixture.json, rows.jsonl or "
        "tones[:KINDS[:LABELLED]]; one for all stages, or one for each (tones)")
    add("--out", help="run folder (runs/BACKBONE)")
    add("--resume", help="run to go on with; its config.json gives the flags")
    add("--init-from", type=absolute, help="run or checkpoint to take adapter and heads from")
    add("--stage", action="append", help="once a stage: STEPS:EXPERTS[:LR], an expert perhaps with "
        f"its weight: 500:recon,pitch=0.5:2e-4; or all, or none ({' '.join(PAPER_STAGES)})")
    add("--no-think", action="store_true", help="no block, and experts only if --stage names them")
    add("--head", default="transformer", choices=["transformer", "linear"], help="projection heads")
    add("--head-width", type=COUNT, help="width inside the heads (the backbone's)")
    add("--micro-tokens", type=COUNT, help="most tokens at once on a rank, with padding (all)")
    add("--threads", type=COUNT, help="CPU threads of a rank; last bits of sums depend on them")
    add("--device", help="cpu or cuda (the GPU; for tiny also the CPU)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="recompute activations: less memory, slower")
    add("--compile", action="store_true", help="torch.compile decoder layers")
    add("--train-projector", action="store_true", help="the audio projector, too")
    add("--random-experts", action="store_true", help="for tests and timing only")
    for task, expert in EXPERTS.items():
        if expert.filename:
            add(f"--expert-{task}", type=absolute, help=f"checkpoint of {expert.__name__}")
    for flag, kind, default, meaning in (
            ("lr", POSITIVE, 1e-4, "learning rate of a stage that names none"),
            ("batch", COUNT, 16, "rows a step, over all ranks"),
            ("warmup", in_range(float, 0, 1), 0.03, "share of a stage"),
            ("weight-decay", in_range(float, 0, 100), 0.1, "of the heads' matrices"),
            ("clip", POSITIVE, 1.0, "largest norm of the gradient"),
            ("w-pitch-aux", in_range(float, 0, 1e9), 1.0, "of the focal-BCE inside L_pitch"),
            ("focal-gamma", in_range(float, 0, 100), 2.0, "of that term; 0 is plain BCE"),
            ("calibrate", COUNT, 64, "first clips of stage 1, which give the losses their scales"),
            ("seed", in_range(int, 0, 2 ** 31 - 1), 0, "of new weights and the order of rows"),
            ("save-every", COUNT, 1000, "steps between checkpoints"),
            ("keep", COUNT, 2, "how many checkpoints stay"),
            ("workers", WORKERS, 2, "data processes a rank"),
            ("log-every", COUNT, 10, "steps between lines on the screen; log.jsonl has all"),
            ("heldout", lambda text: int(text) if text.isdigit() else absolute(text), 60,
             "rows.jsonl for losses at each checkpoint; or tone questions of a kind, at the end")):
        add(f"--{flag}", type=kind, default=default, help=f"{meaning} ({default})")
    return parser


def read_flags():
    """(flags, checkpoint to begin with or None). A flag that is not given is that of the run to go
    on with or to start from, else DEFAULTS of the backbone, else the parser's."""
    parser = build_parser()
    given = parser.parse_args()
    if RESTARTS and given.out and checkpoint_steps(given.out):
        given.resume = given.out
    saved = {}
    checkpoint = given.resume or given.init_from
    if checkpoint:
        checkpoint = os.path.abspath(latest_checkpoint(checkpoint))
        saved = read_json(os.path.join(os.path.dirname(checkpoint), "config.json"))["flags"]
    if not given.resume:
        saved = {name: saved[name] for name in MODEL_FLAGS if saved}
    defaults = DEFAULTS.get(saved.get("backbone", given.backbone), {}) | saved
    parser.set_defaults(**defaults | {"stage": None})    # a default list would be appended to
    args = parser.parse_args()
    args.resume = given.resume
    args.out = given.resume or args.out or f"runs/{args.backbone}"
    if not args.stage:
        args.stage = defaults.get("stage", PAPER_STAGES)
        if args.no_think and not args.resume:
            args.stage = [stage.split(":")[0] + ":none" for stage in args.stage]
    if len(args.data) == 1:
        args.data *= len(args.stage)
    for name, value in saved.items():
        if getattr(args, name, value) != value and name not in FREE_FLAGS:
            raise InputError(f"--{name.replace('_', '-')} was {value} in that run; leave it out")
    if len(args.data) != len(args.stage):
        raise InputError(f"--data names {len(args.data)} for {len(args.stage)} stages")
    if args.batch % WORLD:
        raise InputError(f"--batch {args.batch} is not a multiple of {WORLD} ranks")
    return args, checkpoint


class Stage(NamedTuple):
    """A stage of section 3.4."""
    steps: int
    tasks: list       # A_s, its experts
    weights: dict     # {term: w_k}; pitch_aux has w_k times w_aux, since it stands inside L_pitch
    lr: float         # the highest learning rate


def parse_stage(text, args):
    """Stage of STEPS:EXPERTS[:LR], such as 500:recon,pitch=0.5:2e-4. Raises InputError."""
    try:
        steps, experts, *lr = text.split(":")
        tasks = {}
        for part in experts.split(","):
            task, _, weight = part.partition("=")
            for name in {"all": EXPERTS, "none": []}.get(task, [task]):
                tasks[name] = POSITIVE(weight or 1)
        if set(tasks) - set(EXPERTS):
            raise ValueError("no such expert")
        weights = {term: weight * (args.w_pitch_aux if term == "pitch_aux" else 1)
                   for task, weight in tasks.items() for term in terms(task)}
        return Stage(COUNT(steps), list(tasks), weights, POSITIVE(*lr) if lr else args.lr)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as e:
        raise InputError(f"--stage {text}: {e}; give STEPS:EXPERTS[:LR] with EXPERTS of "
                         f"{','.join(EXPERTS)}, all, none") from e


def gather(value):
    """[value of each rank]"""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(numbers):
    """{name: number} -> {name: sum over all ranks}"""
    found = gather(numbers)
    return {name: sum(of_rank[name] for of_rank in found) for name in numbers}


def together(work, *args):
    """work(*args) on each rank. If it fails on one, all end, and none waits for hours."""
    try:
        result, error = work(*args), None
    except Exception as e:
        error = e
    failed = [text for text in gather(error and f"rank {RANK} ends: {error}") if text]
    if failed:
        raise error or InputError(failed[0])
    return result


def say(text, each=False):
    """Prints on rank 0, or on each."""
    if RANK == 0 or each:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError as e:    # nobody reads it, as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            STOP.append(e)


def on_signals(handler):
    """Sets what a signal does. One that is ignored, as by nohup, stays so."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# What is trained, and on what

class Student(torch.nn.Module):
    """The backbone with its adapters, and the heads of a stage's experts."""

    def __init__(self, coat, heads, experts):
        super().__init__()
        self.coat = coat
        self.heads = heads
        self.experts = experts    # {task: E_k}, frozen; a dict, so that DDP does not see them
        for task, head in heads.items():
            head.requires_grad_(task in experts)    # those of other stages rest

    def forward(self, batch):
        """{"ce", and every term of the experts: () sum over the batch}; leaves z_k in `targets`."""
        device = self.coat.hf.device
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = self.coat(batch)    # H_think, x_A, cross-entropy
            self.targets = expert_targets(self.experts, batch, out.audio_embeds)    # (B, L, E)
            losses = self.heads(out.think_states, out.valid, self.targets)
        ce = out.ce_sum
        for p in self.coat.new_projector:    # DDP wants all in each step, also one of text alone
            ce = ce + 0 * p.sum()
        return {"ce": ce} | losses


def build(args, tasks, device, checkpoint):
    """CoAT, {task: frozen expert}, heads, and the optimizer; the same weights on every rank."""
    torch.manual_seed(args.seed)
    coat = load_coat(checkpoint or args.backbone, args.model_path, trainable=True, device=device,
                     train_projector=args.train_projector)
    coat.think = not args.no_think
    if args.checkpointing:
        coat.checkpoint_activations()
    if args.compile:
        coat.compile_layers()
    d = coat.hf.config.get_text_config().hidden_size
    paths = {task: getattr(args, f"expert_{task}", None) for task in tasks}
    experts = load_experts(tasks, d, device, args.random_experts, paths)
    heads = heads_for(d, experts, kind=args.head, width=args.head_width,
                      focal_gamma=args.focal_gamma).to(device)
    adapters = [p for p in coat.parameters() if p.requires_grad]
    vectors = [p for p in heads.parameters() if p.ndim < 2]
    matrices = [p for p in heads.parameters() if p.ndim >= 2]
    groups = [{"params": adapters + vectors, "weight_decay": 0.0},
              {"params": matrices, "weight_decay": args.weight_decay}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    return coat, experts, heads, optimizer


def open_data(args, stages):
    """([source of each stage], [(steps, rows) row numbers of each stage that are this rank's])"""
    n_rows = sum(stage.steps for stage in stages) * args.batch
    opened = {text: open_source(text, n_rows, args.seed) for text in args.data}
    sources = [opened[text] for text in args.data]
    plans = []
    for number, (stage, source) in enumerate(zip(stages, sources)):
        plan = plan_stage(source, stage.steps, args.batch, args.seed, number)
        plans.append(plan.reshape(stage.steps, WORLD, -1)[:, RANK])
        epochs = plan.size / (len(source) - len(source.skipped))
        say(f"stage {number + 1}: {source.about}; {epochs:.3g} epochs")
        if source.skipped:
            say(f"{len(source.skipped)} rows are skipped, such as: {source.skipped[0][1]}")
    return sources, plans


def load_steps(source, plan, collate_step, args, device):
    """Yields ([micro-batches], [InputError of rows left out]) of each step of a plan."""
    steps = iter(torch.utils.data.DataLoader(
        Rows(source), batch_sampler=plan.tolist(), num_workers=args.workers,
        collate_fn=collate_step, pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if args.workers else None,
        worker_init_fn=lambda worker: os.setpgid(0, 0)))    # signals to a group are for the rank
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # torch's raises in the midst of a step
    try:
        yield from steps
    except RuntimeError as e:    # a data process was killed
        STOP.append(InputError(str(e)))    # without its frames
        yield [], []


def calibrate(student, tasks, source, rows, collate_step):
    """Scales of the losses, and best constant answers to begin with, from these clips."""
    clips = {task: [] for task in tasks}
    for row in rows if tasks else ():
        (batch,), _ = collate_step([Rows(source)[row]])
        if batch["rows"]:
            with torch.no_grad():
                student(batch)
            for task in tasks:
                clips[task].append(student.targets[task][0])    # (L, E)
    for task, found in clips.items():
        if not found:
            raise InputError(f"none of {len(rows)} clips of stage 1 gives {task} its scale")
        student.heads.calibrate(task, found)


def rehearse(student, sources, plans, collate_step):
    """The step with the longest row, without learning: what does not fit in memory says so now."""
    source, plan = max(zip(sources, plans), key=lambda of: of[0].lengths[of[1]].max())
    rows = plan[source.lengths[plan].max(1).argmax()]
    for batch in collate_step([Rows(source)[row] for row in rows.tolist()])[0]:
        sum(student(batch).values()).backward()


def claim_folder(args):
    """Makes the run folder -> a lock against other runs."""
    os.makedirs(args.out, exist_ok=True)
    if checkpoint_steps(args.out) and not args.resume:
        raise InputError(f"'{args.out}' holds a run; give --resume or another --out")
    lock = FileLock(os.path.join(args.out, f".lock-{RANK}"))
    return lock.acquire(timeout=15)    # data processes of a killed run need some seconds to end


def save(args, progress, coat, heads, optimizer):
    """checkpoint-STEP, whole or not at all: it gets its name last. Rank 0 writes."""
    final = os.path.join(args.out, f"checkpoint-{progress['step']}")
    if RANK or os.path.exists(final):
        return
    new = final + ".tmp"
    shutil.rmtree(new, ignore_errors=True)    # of a kill, or a full disk
    coat.save(new)
    safetensors.torch.save_model(heads, os.path.join(new, "heads.safetensors"))
    state = {"progress": progress, "optimizer": optimizer.state_dict()}
    torch.save(state, os.path.join(new, "state.pt"))
    os.rename(new, final)
    for old in checkpoint_steps(args.out)[:-args.keep]:
        shutil.rmtree(os.path.join(args.out, f"checkpoint-{old}"))


def load_heads(heads, checkpoint):
    """Loads the heads, with their scales, that a checkpoint has -> names of what is loaded."""
    weights = safetensors.torch.load_file(os.path.join(checkpoint, "heads.safetensors"))
    known = {name: weights[name] for name in heads.state_dict() if name in weights}
    heads.load_state_dict(known, strict=False)
    return known


def load_progress(optimizer, checkpoint, device):
    """Loads the optimizer -> {"step", "skipped", "lost"}."""
    state = torch.load(os.path.join(checkpoint, "state.pt"), map_location=device, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    for p, moments in optimizer.state.items():
        if not (p + moments["exp_avg"] + moments["exp_avg_sq"]).isfinite().all():
            raise InputError(f"'{checkpoint}' holds NaN; delete it to go on with the one before")
    return state["progress"]


def draw(lines, path):
    """losses.png: means over at most 300 pieces of the run."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    names = ["ce", *(term for task in EXPERTS for term in terms(task))]
    for name in names + [f"heldout_{name}" for name in names]:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            pieces = np.array_split(points, min(300, len(points)))
            style = "o--" if name.startswith("heldout") else "-"
            axes.semilogy(*np.transpose([piece.mean(0) for piece in pieces]), style, label=name)
    axes.set(xlabel="step", ylabel="ce: nats a token; experts: 1 is the best constant")
    axes.legend()
    figure.savefig(path, dpi=80)


def learning_rate(stage, i, warmup):
    """Of step i of a stage: a straight rise, then a cosine to zero."""
    warm = max(1, round(warmup * stage.steps))
    if i < warm:
        return stage.lr * (i + 1) / warm
    return stage.lr * (0.5 + 0.5 * math.cos(math.pi * (i - warm) / (stage.steps - warm)))


def count(batches):
    """What micro-batches hold."""
    n = dict(targets=0, frames=0, tokens=0, slots=0, seconds=0)
    for batch in batches:
        if batch["rows"]:
            n["targets"] += (batch["labels"][:, 1:] != IGNORE).sum().item()
            n["frames"] += batch["n_audio"].sum().item()
            n["tokens"] += batch["attention_mask"].sum().item()
            n["slots"] += batch["input_ids"].numel()    # with padding
            n["seconds"] += batch["seconds"]
    return n


def forward_backward(student, batches, n, weights):
    """{"loss", "ce", and the experts' terms} of a step over all ranks; leaves the gradients.

    Each is a sum over the global batch divided by its count over the global batch, n, however the
    rows are cut into micro-batches and ranks. weights: {term: w_k}"""
    sums = Counter()
    for batch in batches:
        last = batch is batches[-1]    # only the last micro-batch exchanges gradients
        with contextlib.nullcontext() if last or WORLD == 1 else student.no_sync():
            losses = student(batch)
            losses = {name: loss / max(1, n["targets" if name == "ce" else "frames"])
                      for name, loss in losses.items()}
            total = losses["ce"]                     # equation 4
            for term, weight in weights.items():
                total = total + weight * losses[term]
            (total * WORLD).backward()               # DDP takes the mean over ranks
        for name, loss in ({"loss": total} | losses).items():
            sums[name] += loss.detach()
    return sum_over_ranks(dict(zip(sums, torch.stack(list(sums.values())).tolist())))


@torch.no_grad()
def heldout_losses(student, source, weights, collate_step, batch_size):
    """{"heldout_ce", and of the terms in `weights`}: means over rows that are not trained on."""
    rows = np.argsort(source.lengths, kind="stable")[RANK::WORLD].tolist()
    sums = Counter()
    for i in range(0, len(rows), batch_size):
        batches, left_out = collate_step([Rows(source)[row] for row in rows[i:i + batch_size]])
        for reason in left_out:
            say(f"skipped: {reason}", each=True)
        sums.update(count(batches))
        for batch in batches:
            losses = student(batch)
            sums.update({name: loss.item() for name, loss in losses.items()})
    sums = sum_over_ranks({name: sums[name] for name in ("targets", "frames", "ce", *weights)})
    return {f"heldout_{name}": sums[name] / max(1, sums["targets" if name == "ce" else "frames"])
            for name in ("ce", *weights)}


def ask_heldout(coat, kinds, args):
    """Held-out questions about tones and, as a control, the same over another row's clip."""
    coat.merge()
    heldout = Rows(Tones("heldout", args.heldout * len(kinds), kinds))
    results = {}
    say(f"\n{'held-out question':28}{'heard':>8}{'other clip':>12}{'chance':>8}")
    for i, kind in enumerate(kinds):
        rows = [heldout[row] for row in range(i, args.heldout * len(kinds), len(kinds))]
        others = [row | {"wave": rows[j - 1]["wave"]} for j, row in enumerate(rows)]
        shares = []
        for asked in (rows, others):
            (batch,), _ = collate(asked, coat.spec, think=coat.think, responses=False)
            answers = coat.generate(batch, max_new_tokens=12)
            shares.append(np.mean([a == row["response"] for a, row in zip(answers, rows)]))
        question, answers = TONES[kind]
        shares.append(1 / len(answers))
        results[kind] = dict(zip(("heard", "other_clip", "chance"), shares))
        say("{:28}{:8.0%}{:12.0%}{:8.0%}".format(question, *shares))
    write_file(os.path.join(args.out, "heldout.json"), json.dumps(results, indent=1))
    clip = os.path.join(args.out, f"heldout-{kind}-{rows[0]['response']}.wav")
    soundfile.write(clip, rows[0]["wave"].numpy(), rows[0]["rate"])
    say("\nNow ask about a clip it has never heard; the answer is in the file's name:\n"
        f"  python infer.py ask {args.out} {clip} \"{question}\"")


def train(args, stages, device, sources, plans, config, checkpoint):
    """All stages, step by step (section 3.4)."""
    total_steps = sum(stage.steps for stage in stages)
    tasks = list(dict.fromkeys(task for stage in stages for task in stage.tasks))
    coat, experts, heads, optimizer = together(build, args, tasks, device, checkpoint)
    rates = {expert.sample_rate for expert in experts.values()} - {None}
    collate_step = functools.partial(collate, spec=coat.spec, rates=rates, think=coat.think,
                                     micro_tokens=args.micro_tokens)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    flops = 4 * coat.decoder_weights    # a token: forward, and backward to activations alone
    weights, trained = [sum(p.numel() for p in some) for some in (coat.parameters(), params)]
    say(f"{args.backbone} on {WORLD} x {device}: {weights:,} weights; with heads of "
        f"{', '.join(tasks) or 'none'} {trained:,} trained; {flops / 1e9:.3g} GFLOP a token\n"
        f"{total_steps} steps of {args.batch} rows, to {args.out}")
    known = together(load_heads, heads, checkpoint) if checkpoint else ()
    progress = {"step": 0, "skipped": sum(len(s.skipped) for s in set(sources)), "lost": 0}
    if args.resume:
        began = read_json(os.path.join(args.resume, "config.json"))
        if began["rows"] != config["rows"]:
            raise InputError("the rows or lengths of audio are not those that the run began with")
        for what in ("world", "torch"):
            if began[what] != config[what]:
                say(f"!! not bit for bit: {what} was {began[what]}, now {config[what]}")
        progress = together(load_progress, optimizer, checkpoint, device)
        say(f"{progress['step']} of {total_steps} steps are done already")
    else:
        most = max(stage.steps for stage in stages)
        rows = plan_stage(sources[0], most, args.batch, args.seed, 0).ravel()
        rows = list(dict.fromkeys(rows[sources[0].lengths[rows] > 0].tolist()))    # each clip once
        new = [task for task in tasks if f"{task}.out.weight" not in known and RANK == 0]
        together(calibrate, Student(coat, heads, experts), new, sources[0],
                 rows[:args.calibrate], collate_step)
        for tensor in heads.state_dict().values() if WORLD > 1 else ():
            dist.broadcast(tensor, 0)
        if RANK == 0:
            write_file(os.path.join(args.out, "config.json"), json.dumps(config, indent=1))
    student = Student(coat, heads, {task: experts[task] for task in stages[-1].tasks})
    together(rehearse, student, sources, plans, collate_step)
    optimizer.zero_grad(set_to_none=True)

    log_path = os.path.join(args.out, "log.jsonl")
    if RANK == 0:    # what came after the checkpoint is done again; a kill may have cut a line
        with open(log_path, "a+") as file:
            file.seek(0)
            lines = [json.loads(text) for text in file if text.endswith("}\n")]
        lines = [line for line in lines if line["step"] <= progress["step"]]
        write_file(log_path, "".join(json.dumps(line) + "\n" for line in lines))
    chip = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = max((flops for name, flops in PEAKS.items() if name in chip), default=None)
    heldout_rows = together(open_source, args.heldout) if isinstance(args.heldout, str) else None
    bar = tqdm(total=total_steps, initial=progress["step"], disable=True if RANK else None)
    lost_in_a_row = 0
    on_signals(lambda number, frame: STOP.append(number))

    for number, stage in enumerate(stages):
        i = progress["step"] - sum(before.steps for before in stages[:number])
        if not 0 <= i < stage.steps:
            continue
        student = Student(coat, heads, {task: experts[task] for task in stage.tasks})
        trained = student
        if WORLD > 1:
            optimizer.zero_grad(set_to_none=True)    # they are parts of the last stage's buckets
            trained = DistributedDataParallel(student, broadcast_buffers=False, init_sync=False,
                                              gradient_as_bucket_view=True)
            # The first backward pass orders the buckets, and so the sums: an idle one, so that a
            # resumed run has the last bits of an uninterrupted one.
            sum(trained(idle_batch(coat.spec, rates)).values()).backward()
            optimizer.zero_grad(set_to_none=False)
        plan = plans[number][i:]
        t0 = time.time()
        for batches, left_out in load_steps(sources[number], plan, collate_step, args, device):
            t1 = time.time()
            for reason in left_out:
                say(f"skipped: {reason}", each=True)
            n = sum_over_ranks(count(batches) | {"stop": len(STOP), "skipped": len(left_out)})
            if n["stop"]:
                break
            losses = forward_backward(trained, batches, n, stage.weights)
            norm = torch.nn.utils.clip_grad_norm_(params, args.clip).item()
            lr = learning_rate(stage, i, args.warmup)
            i += 1
            progress["step"] += 1
            progress["skipped"] += n["skipped"]
            if n["targets"] and math.isfinite(norm + sum(losses.values())):
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                lost_in_a_row = 0
            else:
                progress["lost"] += 1
                lost_in_a_row += 1
                rows = [row["row"] for batch in batches for row in batch["rows"]]
                why = f"the loss of rows {rows} is not finite" if rows else "no row can be used"
                why = f"step {progress['step']} is left out: {why}"
                say(f"!! {why}", each=True)
                losses, norm = dict.fromkeys(losses), None
                if lost_in_a_row == MAX_LOST:
                    STOP.append(InputError(f"{why}. It is the {MAX_LOST}th in a row"))
            optimizer.zero_grad(set_to_none=WORLD == 1)    # DDP's buckets stay
            if not n["frames"]:    # rows of text alone say nothing about the experts
                losses |= dict.fromkeys(stage.weights)
            took = time.time() - t0
            line = progress | {
                "stage": number + 1, "lr": lr, **losses, "grad_norm": norm,
                "tokens_per_s": n["tokens"] / took, "audio_s_per_s": n["seconds"] / took,
                "padding": 1 - n["tokens"] / max(1, n["slots"]), "data_wait": (t1 - t0) / took}
            if device.type == "cuda":
                line["mfu"] = peak and flops * n["tokens"] / took / WORLD / peak
                line["gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
            saves = progress["step"] % args.save_every == 0 or progress["step"] == total_steps
            if saves and heldout_rows:
                line |= heldout_losses(student, heldout_rows, stage.weights, collate_step,
                                       args.batch // WORLD)
            if saves or progress["step"] % args.log_every == 0:
                cells = [f"{key} {value:.3g}" for key, value in line.items()
                         if value is not None and key not in progress]
                eta = took * (total_steps - progress["step"])
                say(f"step {progress['step']}/{total_steps} {' '.join(cells)} eta {eta:.0f} s")
            bar.update()
            if RANK == 0:
                lines.append(line)
                with open(log_path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            if saves:
                together(save, args, progress, coat, heads, optimizer)
            t0 = time.time()
    together(save, args, progress, coat, heads, optimizer)
    on_signals(signal.SIG_DFL)
    bar.close()

    go_on = f"after step {progress['step']}; go on with: python train.py --resume {args.out}"
    for reason in STOP:
        if isinstance(reason, Exception):
            raise InputError(f"{reason}. The run is saved {go_on}")
    if RANK == 0:
        draw(lines, os.path.join(args.out, "losses.png"))
        kinds = [source.kinds for source in sources if isinstance(source, Tones)]
        if progress["step"] < total_steps:
            say(f"stopped {go_on}")
        elif kinds and args.heldout and not heldout_rows:
            ask_heldout(coat, kinds[0], args)


def main():
    one_line_errors(less_memory="--micro-tokens 2048, --checkpointing or --head-width 1024")
    if WORLD > 1:    # rank 0 calibrates and saves while the others wait
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(str(RESTARTS), store)    # else it gives addresses of before
        dist.init_process_group(backend, rank=RANK, world_size=WORLD, store=store,
                                timeout=datetime.timedelta(hours=2))
    args, checkpoint = together(read_flags)
    stages = [parse_stage(text, args) for text in args.stage]
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpus = WORLD > 1 and args.device != "cpu" and torch.cuda.is_available()
    name = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else args.device
    device = together(usable_device, name, args.backbone)
    sources, plans = together(open_data, args, stages)
    config = {"flags": vars(args), "rows": [fingerprint(source) for source in sources],
              "world": WORLD, "torch": torch.__version__}
    if len(set(map(str, gather([config["rows"], os.path.basename(checkpoint or "")])))) > 1:
        raise InputError("the ranks find different rows, audio or checkpoints")
    with together(claim_folder, args):
        train(args, stages, device, sources, plans, config, checkpoint)
    if WORLD > 1:    # gloo's threads outlive the group, and may abort an interpreter that ends
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
