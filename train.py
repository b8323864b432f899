"""Trains adapters, token rows and projection heads, stage by stage (section 3.4, appendix A).

    python train.py --backbone tiny                     # two to three minutes, no download
    python train.py --resume runs/tiny                  # goes on after the last checkpoint
    torchrun --nproc-per-node 4 train.py --backbone qwen2-audio --data mixture.json    # four GPUs

Without --data it trains on synthetic tones. The run folder gets config.json, log.jsonl (a line a
step), losses.png and checkpoint-STEP/: a plain PEFT adapter with the tokenizer, the heads with the
scales of their losses (heads.safetensors), and what a resumed run needs (state.pt).

Read from top to bottom: flags, ranks, rows, student, start or resume, the loop.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import safetensors.torch
import soundfile
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (TONES, Mixture, Rows, Tones, collate, fingerprint, idle_batch, open_source,
                  plan_stage, expert_targets, to_device)
from experts import EXPERTS, load_experts
from heads import heads_for, terms
from model import (BACKBONES, COUNT, IGNORE, WORKERS, InputError, checkpoint_steps, in_range,
                   latest_checkpoint, load_coat, mixed_precision, one_line_errors, read_json,
                   usable_device, write_file)

# Flags whose default is another one for a backbone. 8 B weights leave little memory. Random weights
# know nothing worth keeping: tiny learns faster, and leans on its answers.
LARGE = dict(checkpointing=True, micro_tokens=8192)
DEFAULTS = {
    "qwen2-audio": LARGE, "qwen2.5-omni": LARGE, "audio-flamingo-3": LARGE,
    "tiny": dict(stage=["100:recon=0.3", "260:recon=0.3,pitch=0.3"], batch=8, lr=2e-3,
                 calibrate=32, threads=1, workers=1),
}
# What may differ in a resumed run: the steps stay the same.
FREE_FLAGS = {"resume", "out", "save_every", "keep", "workers", "device", "heldout"}
# What the adapter and the heads of a run fit.
MODEL_FLAGS = ("backbone", "model_path", "head", "head_width", "focal_gamma")
MAX_LOST = 5    # steps in a row that cannot be taken
# Dense bf16 peaks by the vendor's datasheets, FLOP/s, for the log's MFU.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


# --------------------------------------------------------------------------------------------------
# Flags

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default="tiny", choices=list(BACKBONES))
    add("--model-path", help="a local folder, or NAME@REVISION of the hub; of small WHISPER,TEXT")
    add("--data", default="tones", help="mixture.json, rows.jsonl or tones[:KINDS[:LABELLED]]")
    add("--out", help="run folder (a new one under runs/)")
    add("--resume", help="run folder to go on with; its config.json gives the other flags")
    add("--init-from", help="run or checkpoint folder whose adapter and heads to start from")
    add("--stage", action="append", help="once a stage: STEPS:EXPERTS[:LR], an expert perhaps with "
        "its weight: 500:recon,pitch=0.5:2e-4; or all, or none (100000:recon, 100000:all)")
    add("--no-think", action="store_true", help="no thinking block; experts that --stage names "
        "stand on the audio tokens' own states, without --stage there are none")
    add("--w-pitch-aux", type=in_range(float, 0, 1e9), default=1.0, help="focal-BCE in L_pitch (1)")
    add("--focal-gamma", type=in_range(float, 0, 100), default=2.0, help="0 is plain BCE (2)")
    add("--lr", type=in_range(float, 1e-30, 1e30), default=1e-4, help="unless --stage says (1e-4)")
    add("--batch", type=COUNT, default=16, help="rows a step, over all ranks (16)")
    add("--micro-tokens", type=COUNT, help="most tokens at once on a rank, with padding (all)")
    add("--warmup", type=in_range(float, 0, 1), default=0.03, help="share of a stage (0.03)")
    add("--weight-decay", type=in_range(float, 0, 100), default=0.1, help="heads' matrices (0.1)")
    add("--clip", type=in_range(float, 1e-9, 1e9), default=1.0, help="norm of the gradient (1)")
    add("--head", default="transformer", choices=["transformer", "linear"], help="projection heads")
    add("--head-width", type=COUNT, help="width inside the heads (the backbone's)")
    add("--calibrate", type=COUNT, default=64, help="clips that give the scales of the losses (64)")
    for task, expert in EXPERTS.items():
        if expert.filename:
            add(f"--expert-{task}", help=f"checkpoint of {expert.__name__} (fetched, or shipped)")
    add("--random-experts", action="store_true", help="for tests and timing only")
    add("--seed", type=in_range(int, 0, 2 ** 63 - 1), default=0, help="weights, order of rows (0)")
    # What follows changes nothing in what is learned.
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="recompute activations in the backward pass: less memory, more time")
    add("--compile", action="store_true", help="torch.compile each decoder layer")
    add("--save-every", type=COUNT, default=1000, help="steps between checkpoints (1000)")
    add("--keep", type=COUNT, default=2, help="how many checkpoints stay (2)")
    add("--workers", type=WORKERS, default=2, help="data processes a rank (2)")
    add("--device", help="cpu or cuda (the GPU, or for tiny and small else the CPU)")
    add("--threads", type=COUNT, help="CPU threads of a rank; the last bit of sums depends on them")
    add("--heldout", type=in_range(int, 0, 10 ** 6), default=60, help="questions of a kind (60)")
    return parser


def read_flags():
    """The flags. One that is not given comes from the run to resume, or to start from, else from
    DEFAULTS of the backbone, else from the parser. Raises InputError."""
    parser = build_parser()
    given = parser.parse_args()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))    # torchrun --max-restarts
    if restarted and given.out and checkpoint_steps(given.out):
        given.resume = given.out
    saved = {}
    if given.resume:
        saved = read_json(os.path.join(given.resume, "config.json"))["flags"]
    elif given.init_from:
        run = os.path.dirname(os.path.abspath(latest_checkpoint(given.init_from)))
        flags = read_json(os.path.join(run, "config.json"))["flags"]
        saved = {name: flags[name] for name in MODEL_FLAGS}
    defaults = DEFAULTS.get(saved.get("backbone", given.backbone), {}) | saved
    parser.set_defaults(**defaults | {"stage": None})    # a default list would be appended to
    args = parser.parse_args()
    args.resume = given.resume
    args.out = given.resume or args.out
    if not args.stage:
        args.stage = defaults.get("stage") or ["100000:recon", "100000:all"]
        if args.no_think and not args.resume:
            args.stage = [stage.split(":")[0] + ":none" for stage in args.stage]
    for name, value in saved.items():
        if getattr(args, name, value) != value and name not in FREE_FLAGS:
            raise InputError(f"--{name.replace('_', '-')} was {value} when the run began; leave it "
                             "out, or start a new run")
    return args


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
                tasks[name] = in_range(float, 1e-9, 1e9)(weight or 1)
        if len(lr) > 1 or set(tasks) - set(EXPERTS):
            raise ValueError(f"there is no expert '{experts}'")
        steps = in_range(int, 1, 10 ** 9)(steps)
        lr = in_range(float, 1e-30, 1e30)(*lr) if lr else args.lr
    except (ValueError, argparse.ArgumentTypeError) as e:
        raise InputError(f"--stage {text}: {e}; give STEPS:EXPERTS[:LR] with EXPERTS from "
                         f"{','.join(EXPERTS)}, or all, or none") from e
    weights = {term: weight * (args.w_pitch_aux if term == "pitch_aux" else 1)
               for task, weight in tasks.items() for term in terms(task)}
    return Stage(steps, list(tasks), weights, lr)


# --------------------------------------------------------------------------------------------------
# What is trained, and pieces of the loop

class Student(torch.nn.Module):
    """The backbone with its adapters, and the heads of a stage's experts."""

    def __init__(self, coat, heads, tasks):
        super().__init__()
        self.coat = coat
        self.heads = heads
        self.tasks = tasks
        for task, head in heads.items():
            head.requires_grad_(task in tasks)    # those of other stages rest

    def forward(self, batch, targets):
        """{"ce", and every term of the experts: () sum over the batch}.

        targets     {task: z_k (B, L, E)} of the teachers; recon's is what the model itself hears"""
        out = self.coat(batch)    # H_think, x_A, cross-entropy
        targets = targets | {"recon": out.audio_embeds}
        active = {task: targets[task] for task in self.tasks}
        ce = out.ce_sum
        for p in self.coat.new_projector:    # DDP wants all in each step, also one of text alone
            ce = ce + 0 * p.sum()
        return {"ce": ce} | self.heads(out.think_states, out.valid, active)


def learning_rate(stage, i, warmup):
    """Of step i of a stage: a straight rise, then a cosine to zero."""
    warm = max(1, round(warmup * stage.steps))
    if i < warm:
        return stage.lr * (i + 1) / warm
    return stage.lr * (0.5 + 0.5 * math.cos(math.pi * (i - warm) / (stage.steps - warm)))


def ignore_signals(worker):
    """A signal to all processes is for the rank, which saves."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def share_right(coat, rows, batch_size):
    """The share of rows whose response the model gives."""
    right = 0
    for start in range(0, len(rows), batch_size):
        some = rows[start:start + batch_size]
        (batch,), _ = collate(some, coat.spec, think=coat.think, responses=False)
        answers = coat.generate(to_device(batch, coat.hf.device), max_new_tokens=12)
        right += sum(answer == row["response"] for answer, row in zip(answers, some))
    return right / len(rows)


def draw(lines, stages, path):
    """losses.png: means over at most 300 pieces of the run."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(["ce", *(term for stage in stages for term in stage.weights)]):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            pieces = np.array_split(points, min(300, len(points)))
            axes.semilogy(*np.transpose([piece.mean(0) for piece in pieces]), label=name)
    axes.set(xlabel="step", ylabel="ce: nats a token; experts: 1 is the best constant")
    axes.legend()
    figure.savefig(path, dpi=80)


def main():
    one_line_errors(RuntimeError, less_memory="--micro-tokens 2048, --checkpointing or "
                    "--head-width 1024")
    args = read_flags()
    stages = [parse_stage(text, args) for text in args.stage]
    total_steps = sum(stage.steps for stage in stages)
    if args.threads:
        torch.set_num_threads(args.threads)

    # ----------------------------------------------------------------------------------------------
    # Ranks: the processes that torchrun started, by the variables it sets; without it there is one

    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and args.device in (None, "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = usable_device(args.device, args.backbone)
    on_gpu = device.type == "cuda"
    if args.batch % world:
        raise InputError(f"--batch {args.batch} is not a multiple of {world} ranks")
    if world > 1:    # rank 0 calibrates and saves while the others wait
        dist.init_process_group("nccl" if on_gpu else "gloo",
                                timeout=datetime.timedelta(hours=2))

    def gather(value):
        """[value of each rank]"""
        values = [value] * world
        if world > 1:
            dist.all_gather_object(values, value)
        return values

    def sum_over_ranks(counts):
        """Counter -> the same, over all ranks."""
        t = torch.tensor(list(counts.values()), dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(t)
        return dict(zip(counts, t.tolist()))

    def say(text):
        if rank == 0:
            tqdm.write(text)

    # ----------------------------------------------------------------------------------------------
    # Rows and the run folder. A stage's rows are a function of (seed, stage), so the step alone says
    # where a run stands.

    source = open_source(args.data, total_steps * args.batch, args.seed)
    plans = []    # [(steps, rows) row numbers of each stage that are this rank's]
    for number, stage in enumerate(stages):
        plan = plan_stage(source, stage.steps, args.batch, args.seed, number)
        plans.append(plan.reshape(stage.steps, world, -1)[:, rank])
    config = {"flags": vars(args), "data": fingerprint(source), "world": world,
              "torch": torch.__version__}
    if len(set(gather(config["data"]))) > 1:
        raise InputError(f"the ranks find different rows or audio in {args.data}")
    names = [f"runs/{args.backbone}", *(f"runs/{args.backbone}-{i}" for i in range(2, 1000))]
    free = next(name for name in names if not os.path.exists(name))
    args.out = gather(args.out or free)[0]
    os.makedirs(args.out, exist_ok=True)
    if bool(checkpoint_steps(args.out)) != bool(args.resume):
        has = "no checkpoint yet" if args.resume else "checkpoints already"
        raise InputError(f"'{args.out}' holds {has}; start anew with another --out, or go on with "
                         "--resume")

    # ----------------------------------------------------------------------------------------------
    # Student, teachers, optimizer; the same seed on every rank gives the same weights

    torch.manual_seed(args.seed)
    began_from = args.resume or args.init_from
    checkpoint = latest_checkpoint(began_from) if began_from else None
    coat = load_coat(checkpoint or args.backbone, args.model_path, trainable=True, device=device)
    coat.think = not args.no_think
    if args.checkpointing:
        coat.checkpoint_activations()
    if args.compile:
        coat.compile_layers()
    tasks = list(dict.fromkeys(task for stage in stages for task in stage.tasks))
    d = coat.hf.config.get_text_config().hidden_size
    paths = {task: getattr(args, f"expert_{task}", None) for task in tasks}
    experts = load_experts(tasks, d, device, args.random_experts, paths)
    rates = {expert.sample_rate for expert in experts.values()} - {None}
    heads = heads_for(d, experts, kind=args.head, width=args.head_width,
                      focal_gamma=args.focal_gamma).to(device)
    matrices = [p for p in heads.parameters() if p.ndim >= 2]    # they alone decay
    others = [p for p in coat.parameters() if p.requires_grad]
    others += [p for p in heads.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0},
         {"params": matrices, "weight_decay": args.weight_decay}], betas=(0.9, 0.95), fused=on_gpu)
    say(f"{args.backbone} on {world} x {device}: {sum(p.numel() for p in coat.parameters()):,} "
        f"weights; heads {sum(p.numel() for p in heads.parameters()):,} ({', '.join(tasks)})\n"
        f"{total_steps} steps of {args.batch} rows from {args.data}, to {args.out}")
    if isinstance(source, Mixture):
        say("\n".join(source.report(stages[0].steps * args.batch)))

    def collate_step(rows):
        return collate(rows, coat.spec, rates, coat.think, micro_tokens=args.micro_tokens)

    def steps_of(number, first):
        """Yields ([micro-batches], [InputError]) of the steps of stage `number`, from `first` on."""
        yield from torch.utils.data.DataLoader(
            Rows(source), batch_sampler=plans[number][first:].tolist(), num_workers=args.workers,
            collate_fn=collate_step, worker_init_fn=ignore_signals, pin_memory=on_gpu,
            generator=torch.Generator())    # else it draws from the one whose state is saved

    def forward(student, batch, teachers):
        """{name: () loss summed over the batch}"""
        targets = expert_targets(teachers, batch)    # z_k = E_k(a) at 25 Hz
        with mixed_precision(device):
            return student(batch, targets)

    # ----------------------------------------------------------------------------------------------
    # Start or resume

    step = lost = lost_in_a_row = 0
    skipped = len(source.skipped)    # rows that could not be used
    known = []                       # tasks whose head is not new
    if checkpoint and not args.resume:
        weights = safetensors.torch.load_file(os.path.join(checkpoint, "heads.safetensors"))
        known = [task for task in heads if f"{task}.out.weight" in weights]
        names = [name for task in known for name in heads.tensors_of(task)]
        heads.load_state_dict({name: weights[name] for name in names}, strict=False)

    if args.resume:
        began = read_json(os.path.join(args.resume, "config.json"))
        if began["data"] != config["data"]:
            raise InputError(f"the rows of {args.data}, or the lengths of their audio, are not those "
                             "that the run began with; bring them back, or start a new run")
        for what in ("world", "torch"):
            if began[what] != config[what]:
                say(f"!! not bit for bit: {what} was {began[what]}, now {config[what]}")
        try:
            safetensors.torch.load_model(heads, os.path.join(checkpoint, "heads.safetensors"))
            state = torch.load(os.path.join(checkpoint, "state.pt"), map_location=device,
                               weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            step, skipped, lost = state["step"], state["skipped"], state["lost"]
            torch.set_rng_state(state["rng"][rank % len(state["rng"])].cpu())
        except torch.OutOfMemoryError:
            raise
        except Exception as e:    # what torch makes of a strange file is of any kind
            raise InputError(f"'{checkpoint}' is damaged ({type(e).__name__}: {e}); delete it to go "
                             "on after the checkpoint before it") from e
    else:
        # Scales of the losses and best constant answers over the first clips, on rank 0 for all.
        clips = {task: [] for task in tasks if task not in known}
        first = plan_stage(source, stages[0].steps, args.batch, args.seed, 0).ravel()
        first = list(dict.fromkeys(first[source.lengths[first] > 0].tolist()))    # each clip once
        for row in first[:args.calibrate] if rank == 0 and clips else ():
            (batch,), _ = collate([Rows(source)[row]], coat.spec, rates)
            if batch["rows"]:
                batch = to_device(batch, device)
                heard = expert_targets(experts, batch)
                with torch.no_grad(), mixed_precision(device):
                    heard["recon"] = coat(batch).audio_embeds
                for task in clips:
                    clips[task].append(heard[task][0])    # (L, E)
        for task, found in clips.items():
            if found:
                heads.calibrate(task, found)
        for tensor in heads.state_dict().values() if world > 1 else ():
            dist.broadcast(tensor, 0)
        if rank == 0:
            write_file(os.path.join(args.out, "config.json"), json.dumps(config, indent=1))

    # The step with the longest row, of which nothing is learned: what does not fit in memory says so
    # now, and not in a week.
    longest = max((plan[source.lengths[plan].max(1).argmax()] for plan in plans),
                  key=lambda rows: source.lengths[rows].max())
    rng = torch.get_rng_state()
    for batch in collate_step([Rows(source)[row] for row in longest.tolist()])[0]:
        student = Student(coat, heads, stages[-1].tasks)
        teachers = {task: experts[task] for task in stages[-1].tasks}
        sum(forward(student, to_device(batch, device), teachers).values()).backward()
    optimizer.zero_grad(set_to_none=True)
    torch.set_rng_state(rng)

    def save():
        """checkpoint-STEP, whole or not at all: it gets its name last. All ranks call this."""
        rng = gather(torch.get_rng_state())
        final = os.path.join(args.out, f"checkpoint-{step}")
        if rank == 0 and not os.path.exists(final):
            new = final + ".tmp"
            try:
                shutil.rmtree(new, ignore_errors=True)
                coat.save(new)
                safetensors.torch.save_model(heads, os.path.join(new, "heads.safetensors"))
                torch.save({"step": step, "skipped": skipped, "lost": lost, "rng": rng,
                            "optimizer": optimizer.state_dict()}, os.path.join(new, "state.pt"))
                os.rename(new, final)
            except BaseException:    # such as a full disk
                shutil.rmtree(new, ignore_errors=True)
                raise
            for old in checkpoint_steps(args.out)[:-args.keep]:
                shutil.rmtree(os.path.join(args.out, f"checkpoint-{old}"))
        gather(None)    # torchrun ends all ranks when one does, so none goes before this

    # ----------------------------------------------------------------------------------------------
    # The loop. Every loss is a sum over the global batch divided by its count over the global batch,
    # so that it does not matter how the rows are cut into micro-batches and ranks.

    log_path = os.path.join(args.out, "log.jsonl")
    lines = []
    if os.path.exists(log_path):
        with open(log_path) as file, contextlib.suppress(ValueError):    # a kill may cut a line
            for text in file:
                lines.append(json.loads(text))
    lines = [line for line in lines if line["step"] <= step]    # what came later is done again
    if rank == 0:
        write_file(log_path, "".join(json.dumps(line) + "\n" for line in lines))
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:    # as nohup leaves it
            signal.signal(number, lambda number, frame: stopped.append(number))
    begin, first_step = time.time(), step

    for number, stage in enumerate(stages):
        first = step - sum(before.steps for before in stages[:number])
        if first >= stage.steps:
            continue
        teachers = {task: experts[task] for task in stage.tasks}
        student = Student(coat, heads, stage.tasks)
        if world > 1:
            optimizer.zero_grad(set_to_none=True)    # they are parts of the last stage's buckets
            student = DistributedDataParallel(student, broadcast_buffers=False, init_sync=False,
                                              gradient_as_bucket_view=True)
            # The first backward pass decides the order of the buckets, which shows in the last bit.
            # After an idle one, a resumed run sums as an uninterrupted one does.
            idle = to_device(idle_batch(coat.spec, rates), device)
            sum(forward(student, idle, teachers).values()).backward()
            optimizer.zero_grad(set_to_none=False)
        t0 = time.time()
        for i, (batches, left_out) in enumerate(steps_of(number, first), first):
            t1 = time.time()
            for reason in left_out:
                tqdm.write(f"skipped: {reason}")
            n = dict(targets=0, frames=0, tokens=0, slots=0, seconds=0, stop=len(stopped),
                     skipped=len(left_out))
            for batch in batches:
                if batch["rows"]:
                    n["targets"] += (batch["labels"][:, 1:] != IGNORE).sum().item()
                    n["frames"] += batch["n_audio"].sum().item()
                    n["tokens"] += batch["attention_mask"].sum().item()
                    n["slots"] += batch["input_ids"].numel()
                    n["seconds"] += batch["seconds"]
            n = sum_over_ranks(n)
            if n["stop"]:
                break

            sums = Counter()
            for batch in batches:
                last = batch is batches[-1]    # only the last micro-batch exchanges gradients
                with contextlib.nullcontext() if last or world == 1 else student.no_sync():
                    losses = forward(student, to_device(batch, device), teachers)
                    losses = {name: loss / max(1, n["targets" if name == "ce" else "frames"])
                              for name, loss in losses.items()}
                    total = losses["ce"]                     # equation 4
                    for term, weight in stage.weights.items():
                        total = total + weight * losses[term]
                    (total * world).backward()               # DDP takes the mean over ranks
                for name, loss in ({"loss": total} | losses).items():
                    sums[name] += loss.item()
            losses = sum_over_ranks(sums)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(params, args.clip).item()
            lr = learning_rate(stage, i, args.warmup)
            step += 1
            skipped += int(n["skipped"])
            if n["targets"] and math.isfinite(norm + sum(losses.values())):
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                lost_in_a_row = 0
            else:
                lost += 1
                lost_in_a_row += 1
                rows = [row["row"] for batch in batches for row in batch["rows"]]
                why = f"the loss is not finite; rows {rows} of this rank are in it"
                if not n["targets"]:
                    why = "none of its rows can be used; see the reasons above"
                say(f"!! step {step} is left out: {why}")
                losses, norm = dict.fromkeys(losses), None
            optimizer.zero_grad(set_to_none=world == 1)    # DDP's buckets stay
            if not n["frames"]:    # rows of text alone say nothing about the experts
                losses |= dict.fromkeys(stage.weights)

            took = time.time() - t0
            line = {"step": step, "stage": number + 1, "lr": lr, **losses, "grad_norm": norm,
                    "tokens_per_s": n["tokens"] / took, "audio_s_per_s": n["seconds"] / took,
                    "padding": 1 - n["tokens"] / max(1, n["slots"]), "data_wait": (t1 - t0) / took,
                    "skipped": skipped, "lost": lost}
            if on_gpu:
                # Forward, and backward to the activations but not to the frozen weights: 4 FLOPs.
                flops = 4 * coat.decoder_weights * n["tokens"] / took / world
                chip = torch.cuda.get_device_name()
                line["mfu"] = max((flops / peak for name, peak in PEAKS.items() if name in chip),
                                  default=None)
                line["gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
            lines.append(line)
            if rank == 0:
                with open(log_path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            eta = (time.time() - begin) / (step - first_step) * (total_steps - step)
            cells = [f"{key} {value:.3g}" for key, value in line.items() if value is not None]
            say(" ".join([*cells, f"of {total_steps}, eta {eta:.0f} s"]))
            if lost_in_a_row == MAX_LOST:
                save()
                raise InputError(f"step {step} is the {MAX_LOST}th in a row that is left out: {why}. "
                                 "The run is saved")
            if step % args.save_every == 0 and step < total_steps:
                save()
            t0 = time.time()
    save()

    # ----------------------------------------------------------------------------------------------
    # Does it hear? Held-out questions about tones and, as a control, the same over another clip

    if rank == 0:
        draw(lines, stages, os.path.join(args.out, "losses.png"))
        if step < total_steps:
            say(f"stopped after step {step}; go on with: python train.py --resume {args.out}")
    if rank == 0 and step == total_steps and isinstance(source, Tones) and args.heldout:
        coat.merge()
        heldout = Tones("heldout", args.heldout * len(source.kinds), source.kinds)
        loaded = [Rows(heldout)[i] for i in range(len(heldout))]
        results = {}
        say(f"\n{'held-out question':28}{'heard':>8}{'other clip':>12}{'chance':>8}")
        for kind in source.kinds:
            question, answers, _ = TONES[kind]
            rows = [row for row in loaded if row["task"] == kind]
            others = [row | {"wave": rows[i - 1]["wave"]} for i, row in enumerate(rows)]
            shares = [share_right(coat, rows, args.batch), share_right(coat, others, args.batch),
                      1 / len(answers)]
            results[kind] = dict(zip(("heard", "other_clip", "chance"), shares))
            say("{:28}{:8.0%}{:12.0%}{:8.0%}".format(question, *shares))
        write_file(os.path.join(args.out, "heldout.json"), json.dumps(results, indent=1))
        clip = os.path.join(args.out, f"heldout-{kind}-{rows[0]['response']}.wav")
        soundfile.write(clip, rows[0]["wave"].numpy(), rows[0]["rate"])
        say("\nNow ask about a clip it has never heard; the answer is in the file's name:\n"
            f"  python infer.py ask {args.out} {clip} \"{question}\"")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
