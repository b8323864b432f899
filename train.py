"""Trains adapters, token rows and projection heads, stage by stage (section 3.4, appendix A).

    python train.py --backbone tiny                     # two to three minutes, no download
    python train.py --resume runs/tiny                  # goes on after the last checkpoint
    torchrun --nproc-per-node 4 train.py --backbone qwen2-audio --data mixture.json    # four GPUs

Without --data it trains on synthetic tones. It writes to the run folder config.json, log.jsonl (a
line a step), losses.png and checkpoint-STEP/: a plain PEFT adapter with the tokenizer, the heads
with the scales of their losses (heads.safetensors), and what a resumed run needs (state.pt).

`main` at the end says what happens; `train` is the method.
"""
import argparse
import contextlib
import datetime
import functools
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import peft
import safetensors.torch
import soundfile
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (TONES, Mixture, Rows, Tones, collate, collate_step, fingerprint, idle_batch,
                  open_source, plan_stage, teacher_targets, to_device)
from experts import EXPERTS, ExpertUnavailable, load
from heads import ExpertHeads, heads_for, terms
from model import (BACKBONES, COUNT, IGNORE, WORKERS, CoAT, InputError, checkpoint_steps, hold,
                   latest_checkpoint, load_coat, mixed_precision, need, one_line_errors, parse_line,
                   publish, read_json, real, usable_device, whole, write_file)

EVERY_EXPERT = ["recon", *EXPERTS]
# Flags whose default is another one for a backbone. 8 B weights leave little memory. Random weights
# know nothing worth keeping: tiny learns faster, and leans on its answers.
LARGE = dict(checkpointing=True, micro_tokens=8192)
DEFAULTS = {
    "qwen2-audio": LARGE,
    "qwen2.5-omni": LARGE,
    "audio-flamingo-3": LARGE,
    "tiny": dict(stage=["100:recon=0.3", "260:recon=0.3,pitch=0.3"], batch=8, lr=2e-3,
                 calibrate=32, threads=1, workers=1),
}
# What may differ in a resumed run: the steps stay the same.
FREE_FLAGS = {"resume", "out", "save_every", "keep", "workers", "device", "heldout", "tensorboard"}
# What the adapter and the heads of a run fit.
MODEL_FLAGS = ("backbone", "head", "head_width", "focal_gamma")
LESS_MEMORY = "--micro-tokens 2048, --checkpointing or --head-width 1024"
STEPS = whole(1, 10 ** 9)
LR = real(1e-30, 1e30)    # within fp32
WEIGHT = real(1e-9, 10 ** 9)    # of an expert
MAX_LOST = 5    # steps in a row that cannot be taken
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)    # after which a run saves and ends
# What config.json holds, and of which kind.
CONFIG = dict(flags=dict, data=str, world=int, commit=(str, type(None)), device=str, versions=dict)
# Dense bf16 peaks by the vendor's datasheets, FLOP/s, for the log's MFU.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


# --------------------------------------------------------------------------------------------------
# Flags

def build_parser(**kwargs):
    class Format(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Format,
                                     usage="%(prog)s [flags], see --help", **kwargs)
    add = parser.add_argument
    add("--backbone", default="tiny", help=f"one of {', '.join(BACKBONES)}")
    add("--model-path", help="a local folder with the backbone, or NAME@REVISION of the hub; of "
        "small also two with a comma: Whisper's and a text model's")
    add("--data", default="tones", help="mixture.json or rows.jsonl, see data.py; or synthetic "
        "tones, or some: tones:note,glide; or few labels: tones:note:28, see data.FewLabels")
    add("--out", help="run folder; None: a new one under runs/")
    add("--resume", help="run folder to go on with; its config.json gives the other flags")
    add("--init-from", help="run or checkpoint folder whose adapter and heads to start from, with "
        "a new optimizer: other data or flags for a further stage")
    add("--stage", action="append", help="once a stage, STEPS:EXPERTS[:LR], an expert with its "
        "weight: 500:recon,pitch=0.5:2e-4; or all, or none; None: 100000:recon and 100000:all")
    add("--no-think", action="store_true", help="no thinking block, and without --stage no "
        "experts: plain fine-tuning, the first row of table 4; experts that --stage names stand on "
        "the audio tokens' own states, a control")
    add("--w-pitch-aux", type=real(0, 10 ** 9), default=1.0,
        help="of the focal-BCE inside L_pitch (3.3.2)")
    add("--focal-gamma", type=real(0, 100), default=2.0,
        help="of that term: 0 is plain BCE, else from 1")
    add("--lr", type=LR, default=1e-4, help="learning rate of a stage that names none")
    add("--batch", type=COUNT, default=16, help="rows a step, over all ranks")
    add("--micro-tokens", type=COUNT, help="most tokens at once on a rank, with padding; a "
        "longer row goes alone; None: all of its rows at once")
    add("--warmup", type=real(0, 1), default=0.03, help="share of a stage in which the "
        "learning rate rises, before a cosine to zero")
    add("--weight-decay", type=real(0, 100), default=0.1, help="of the heads' matrices; adapters, "
        "token rows, norms and biases have none")
    add("--clip", type=real(1e-9, 10 ** 9), default=1.0, help="largest norm of the gradient")
    add("--head", default="transformer", choices=["transformer", "linear"], help="projection heads")
    add("--head-width", type=COUNT, help="width inside the heads; None: the backbone's")
    add("--calibrate", type=COUNT, default=64, help="clips over which the scale of each loss "
        "is measured")
    for task, expert in EXPERTS.items():
        add(f"--teacher-{task}", help=f"checkpoint of {expert.__name__}; None: fetched, or shipped")
    add("--random-teachers", action="store_true", help="the teachers' architectures with random "
        "weights, for tests and timing only")
    add("--seed", type=whole(0, 2 ** 63 - 1), default=0,
        help="of new weights and of the order of the rows")
    add_upkeep(add)
    return parser


def add_upkeep(add):
    """Flags that change nothing in what is learned."""
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="recompute "
        "the decoder's activations in the backward pass: less memory, more time")
    add("--compile", action="store_true", help="torch.compile each decoder layer")
    add("--save-every", type=STEPS, default=1000, help="steps between checkpoints")
    add("--keep", type=COUNT, default=2, help="how many checkpoints stay")
    add("--workers", type=WORKERS, default=2, help="data processes a rank")
    add("--device", help="cpu or cuda; None: the GPU, or for tiny and small else the CPU")
    add("--threads", type=whole(1, 1024), help="CPU threads of a rank; sums, "
        "and so a resumed run, depend on them in the last bit")
    add("--heldout", type=whole(0, 10 ** 6), default=60, help="held-out rows of each kind of tone "
        "question, asked at the end")
    add("--tensorboard", action="store_true", help="also write the log for TensorBoard")


def read_config(run, flag, used=None):
    """config.json of a run folder. Raises InputError, also where its flags are not what the parser
    would read, were they given.

    used    the flags that matter; None: all"""
    path = os.path.join(run, "config.json")
    remedy = f"give {flag} the folder of a run, with the config.json that it began with"
    config = read_json(path, remedy, **CONFIG)
    parser = build_parser(exit_on_error=False)
    defaults = vars(parser.parse_args([]))
    try:
        read = vars(parser.parse_args(as_given(config["flags"], used or defaults)))
    except argparse.ArgumentError as e:
        raise InputError(f"'{path}': {e}; {remedy}") from e

    flags = {name: defaults[name] for name in FREE_FLAGS} | config["flags"]
    missing = object()
    odd = [f"--{name.replace('_', '-')}" for name in used or sorted(defaults | flags)
           if flags.get(name, missing) != read.get(name)]
    if odd:
        raise InputError(f"'{path}': {', '.join(odd)} is missing, of another kind, or nothing this "
                         "train.py knows; bring the file back, or go on with the code that wrote "
                         f"it, commit {config['commit']}")
    return config


def as_given(flags, known):
    """Flags of a config.json, of the names in `known` -> as they stand in a command line."""
    argv = []
    for name in known:
        flag = "--" + name.replace("_", "-")
        value = flags.get(name)
        if isinstance(value, list):
            argv += [f"{flag}={one}" for one in value]
        elif value is True:
            argv.append(flag)
        elif value is not None and value is not False:
            argv.append(f"{flag}={value}")
    return argv


def read_flags():
    """The flags. One that is not given comes from the run to resume, or to start from, else from
    DEFAULTS of the backbone, else from the parser. Raises InputError."""
    parser = build_parser()
    given = parser.parse_args()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))    # torchrun --max-restarts
    if restarted and given.out and checkpoint_steps(given.out):
        given.resume = given.out
    if given.resume:
        saved = read_config(given.resume, "--resume")["flags"]
        fixed = set(saved) - FREE_FLAGS
    elif given.init_from:
        run = os.path.dirname(os.path.abspath(latest_checkpoint(given.init_from)))
        used = (*MODEL_FLAGS, "model_path")
        flags = read_config(run, "--init-from", used)["flags"]
        saved = {name: flags[name] for name in used}
        fixed = MODEL_FLAGS
    else:
        saved = {}
        fixed = ()
    backbone = saved.get("backbone", given.backbone)
    if backbone not in BACKBONES:
        raise InputError(f"--backbone {backbone}: there are {', '.join(BACKBONES)}")
    saved = DEFAULTS.get(backbone, {}) | saved
    parser.set_defaults(**saved | {"stage": None})    # a default list would be appended to
    args = parser.parse_args()
    args.resume = given.resume
    if not args.stage:
        args.stage = saved.get("stage") or ["100000:recon", "100000:all"]
        if args.no_think and not args.resume:
            args.stage = [stage.split(":")[0] + ":none" for stage in args.stage]
    changed = [f"--{name.replace('_', '-')} (was {saved[name]}, now {getattr(args, name)})"
               for name in sorted(fixed) if getattr(args, name) != saved[name]]
    if changed:
        raise InputError(f"'{given.resume or given.init_from}' was trained with other flags; leave "
                         f"out {', '.join(changed)}, or start a new run")
    if args.resume and args.out not in (None, saved.get("out"), args.resume):
        raise InputError(f"--resume {args.resume} goes on in that folder; leave out --out "
                         f"{args.out}")
    args.out = args.resume or args.out
    return args


class Stage(NamedTuple):
    """A stage of section 3.4."""
    steps: int
    tasks: list       # A_s, its experts
    weights: dict     # {term: w_k}; pitch_aux has w_k times w_aux, since it stands inside L_pitch
    lr: float         # the highest learning rate


def parse_stage(text, args):
    """Stage of STEPS:EXPERTS[:LR], such as 500:recon,pitch=0.5:2e-4. Raises InputError."""
    steps, _, rest = text.partition(":")
    experts, colon, lr = rest.partition(":")
    try:
        n_steps = STEPS(steps)
        stage_lr = LR(lr) if colon else args.lr
        task_weights = {}
        for part in experts.split(","):
            task, _, weight = part.partition("=")
            for name in EVERY_EXPERT if task == "all" else [task]:
                task_weights[name] = WEIGHT(weight or 1)
        task_weights.pop("none", None)
        if unknown := set(task_weights) - set(EVERY_EXPERT):
            raise argparse.ArgumentTypeError(f"there is no expert '{unknown.pop()}'")
    except argparse.ArgumentTypeError as e:
        raise InputError(
            f"--stage {text}: {e}; give STEPS:EXPERTS or STEPS:EXPERTS:LR with EXPERTS from "
            f"{','.join(EVERY_EXPERT)}, each perhaps with a weight as in pitch=0.5, or all, or "
            "none") from e
    weights = {}
    for task, weight in task_weights.items():
        for term in terms(task):
            weights[term] = weight * (args.w_pitch_aux if term == "pitch_aux" else 1)
    return Stage(n_steps, list(task_weights), weights, stage_lr)


def prepare(args, world):
    """What has to be right, or set, before anything is loaded. Raises InputError."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tensorboard:
        need("torch.utils.tensorboard", "tensorboard")
    if args.batch % world:
        raise InputError(f"--batch {args.batch} is not a multiple of {world} ranks")
    if not (args.focal_gamma == 0 or 1 <= args.focal_gamma < math.inf):
        raise InputError(f"--focal-gamma {args.focal_gamma}: give 0, or a number from 1")


@contextlib.contextmanager
def folder_held(args, ranks):
    """Makes the run folder, and in here keeps other runs out of it.

    Raises InputError if one is in it, or if it is not what --out and --resume expect."""
    made = False
    held = contextlib.nullcontext()
    if ranks.rank == 0:
        if args.out:
            made = not os.path.isdir(args.out)
            os.makedirs(args.out, exist_ok=True)
        else:
            args.out = new_folder(f"runs/{args.backbone}")
            made = True
        held = hold(args.out)
    with held:
        try:
            args.out = ranks.gather(args.out)[0]
            begun = checkpoint_steps(args.out)
            if args.resume and not begun:
                raise InputError(f"'{args.out}' holds no checkpoint yet; start anew with --out "
                                 f"{args.out} and the flags in its config.json")
            if begun and not args.resume:
                raise InputError(f"'{args.out}' already holds checkpoints; give --resume "
                                 f"{args.out} to go on, or another --out")
            yield
        finally:
            if made and os.listdir(args.out) == [".lock"]:    # nothing came of it
                shutil.rmtree(args.out, ignore_errors=True)


def new_folder(name):
    """Makes the folder NAME, or NAME-2, or .. -> which. Of two runs each gets its own."""
    i = 1
    while True:
        folder = name if i == 1 else f"{name}-{i}"
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            i += 1


# --------------------------------------------------------------------------------------------------
# Ranks

class Ranks:
    """The processes that torchrun started, by the variables it sets; without it there is one."""

    def __init__(self, device, backbone):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = device or ("cuda" if torch.cuda.is_available() else None)
        if device == "cuda" and self.world > 1:
            n_gpus = torch.cuda.device_count()
            if 0 < n_gpus <= local:
                raise InputError(f"rank {local} has no GPU of its own, there are {n_gpus}; say "
                                 f"--nproc-per-node {n_gpus}")
            device = f"cuda:{local}"
        self.device = usable_device(device, backbone)
        self.stop = []    # why the run is to end after this step: signals, and OSErrors of outputs
        if self.world > 1:    # rank 0 calibrates and saves while the others wait
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(hours=2))

    def sum(self, *numbers):
        """Sums over the ranks, as floats."""
        t = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.world > 1:
            self.exchange(dist.all_reduce, t)
        return t.tolist()

    def gather(self, value):
        """[value of each rank]"""
        values = [value] * self.world
        if self.world > 1:
            self.exchange(dist.all_gather_object, values, value)
        return values

    def exchange(self, collective, *args):
        """Raises InputError if another rank has ended, which gloo tells by a RuntimeError."""
        try:
            collective(*args)
        except RuntimeError as e:
            raise InputError(f"another rank has ended and says why ({str(e).splitlines()[0]}); "
                             "if it was killed, go on with --resume") from e

    def say(self, text, each=False):
        """Prints on rank 0, or on each. Where nobody reads on, the run is to save and end."""
        if self.rank and not each:
            return
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError as e:
            self.stop.append(e)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# --------------------------------------------------------------------------------------------------
# The student: what is trained

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


@dataclass
class Run:
    """A run between two steps."""
    args: SimpleNamespace
    stages: list
    ranks: Ranks
    source: object          # of rows, see data.py
    coat: CoAT
    experts: dict           # {task: frozen teacher}
    heads: ExpertHeads
    optimizer: torch.optim.Optimizer
    step: int = 0
    skipped: int = 0        # rows that could not be used
    lost: int = 0           # steps that were not taken, and
    lost_in_a_row: int = 0

    @property
    def tasks(self):
        return list(self.heads)

    @property
    def total(self):
        return sum(stage.steps for stage in self.stages)

    @functools.cached_property
    def plans(self):
        """[(steps, rows) row numbers of each stage that are this rank's]"""
        plans = []
        for number, stage in enumerate(self.stages):
            plan = plan_stage(self.source, stage.steps, self.args.batch, self.args.seed, number)
            plans.append(plan.reshape(stage.steps, self.ranks.world, -1)[:, self.ranks.rank])
        return plans

    def teachers(self, stage):
        """{task: frozen teacher} of a stage; recon's is the model itself."""
        return {task: self.experts[task] for task in stage.tasks if task != "recon"}

    @property
    def rates(self):
        """Sample rates that the teachers hear."""
        return {expert.sample_rate for expert in self.experts.values()}

    def autocast(self):
        return mixed_precision(self.ranks.device)


def build_models(args, tasks, device, adapter):
    """(CoAT, {task: teacher}, ExpertHeads); the same seed on every rank gives the same weights."""
    torch.manual_seed(args.seed)
    coat = load_coat(args.backbone, adapter, args.model_path, trainable=True, device=device)
    coat.think = not args.no_think
    experts = {}
    for task in tasks:
        if task != "recon":
            path = getattr(args, f"teacher_{task}")
            experts[task] = load(task, path, device, args.random_teachers)
    d = coat.hf.config.get_text_config().hidden_size
    heads = heads_for(d, tasks, experts, kind=args.head, width=args.head_width,
                      focal_gamma=args.focal_gamma)
    heads.to(device)
    if args.checkpointing:
        coat.checkpoint_activations()
    if args.compile:
        coat.compile_layers()
    return coat, experts, heads


def build_optimizer(coat, heads, weight_decay, device):
    """AdamW in which only the matrices of the heads decay."""
    adapters = [p for p in coat.parameters() if p.requires_grad]
    matrices = [p for p in heads.parameters() if p.ndim >= 2]
    vectors = [p for p in heads.parameters() if p.ndim < 2]
    groups = [{"params": adapters + vectors, "weight_decay": 0.0},
              {"params": matrices, "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")


# --------------------------------------------------------------------------------------------------
# Data: a stage's rows are a function of (seed, stage), so the step alone says where a run stands

def open_data(args, stages, ranks):
    """(source of rows, its fingerprint). Raises InputError if the ranks see different files."""
    n_rows = sum(stage.steps for stage in stages) * args.batch
    source = open_source(args.data, n_rows, args.seed)
    found = fingerprint(source)
    if len(set(ranks.gather(found))) > 1:
        raise InputError(f"the ranks find different rows or audio in {args.data}; give all of them "
                         "the same files")
    for row, reason in source.skipped:
        ranks.say(f"skipped row {row}: {reason}")
    if isinstance(source, Mixture):
        for n in sorted({stage.steps * args.batch for stage in stages}):    # none fails in a week
            ranks.say(f"a stage of {n} rows from {args.data}:\n" + "\n".join(source.report(n)))
    return source, found


def can_fork():
    """Where processes are spawned, a data process would run this script once more."""
    return torch.multiprocessing.get_start_method() == "fork"


@contextlib.contextmanager
def signals_blocked():
    """Processes that are started in here get no signal: one to all is for the rank, which saves."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def collate_fn(run):
    return functools.partial(collate_step, spec=run.coat.spec, rates=run.rates,
                             think=run.coat.think, micro_tokens=run.args.micro_tokens)


def step_batches(run, number, first, clock):
    """Yields (step of stage `number`, [this rank's micro-batches of it], [InputError of rows left
    out]), from step `first` on."""
    loader = torch.utils.data.DataLoader(
        Rows(run.source), batch_sampler=run.plans[number][first:].tolist(),
        num_workers=run.args.workers if can_fork() else 0, collate_fn=collate_fn(run),
        pin_memory=run.ranks.device.type == "cuda",
        generator=torch.Generator())    # else it draws from the one whose state is saved
    with signals_blocked():
        loader = iter(loader)
    for i in range(first, run.stages[number].steps):
        with clock("data"):
            batches, skipped = next(loader)
            batches = [to_device(batch, run.ranks.device) for batch in batches]
        for reason in skipped:
            run.ranks.say(f"skipped: {reason}", each=True)
        yield i, batches, skipped


# --------------------------------------------------------------------------------------------------
# Start, save, resume

def rehearse(run):
    """The step with the longest row of the run, with the heads of the last stage and room for
    AdamW's moments: what does not fit in memory says so now, and not in a week. Nothing is
    learned. Raises InputError."""
    lengths = run.source.lengths
    rows = max((plan[lengths[plan].max(1).argmax()] for plan in run.plans),
               key=lambda rows: lengths[rows].max())
    student = Student(run.coat, run.heads, run.stages[-1].tasks)
    teachers = run.teachers(run.stages[-1])
    try:
        moments = []
        for p in student.parameters():
            if p.requires_grad and p not in run.optimizer.state:
                moments += [torch.empty_like(p), torch.empty_like(p)]
        batches, _ = collate_fn(run)([Rows(run.source)[row] for row in rows.tolist()])
        for batch in batches:
            batch = to_device(batch, run.ranks.device)
            targets = teacher_targets(teachers, batch)
            with run.autocast():
                losses = student(batch, targets)
            sum(losses.values()).backward()
    except torch.OutOfMemoryError as e:
        raise InputError(
            f"the step with the longest row, {lengths[rows].max():.0f} s, does not fit in memory "
            f"({str(e).split('. ')[0]}); less is needed with {LESS_MEMORY}") from e
    run.optimizer.zero_grad(set_to_none=True)
    if run.ranks.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        run.ranks.say(f"the step with the longest row, {lengths[rows].max():.0f} s, takes "
                      f"{peak:.1f} GiB")


def calibrate(run, tasks):
    """Measures scales and best constant answers over the first clips, on rank 0 for all."""
    args, device = run.args, run.ranks.device
    lengths = run.source.lengths
    clips = {task: [] for task in tasks}
    rows = []
    if run.ranks.rank == 0 and tasks:
        longest = max(stage.steps for stage in run.stages)    # all as one may exceed a max_epochs
        rows = plan_stage(run.source, longest, args.batch, args.seed, 0).ravel()
        rows = list(dict.fromkeys(rows[lengths[rows] > 0].tolist()))    # each clip once
    for row in rows[:args.calibrate]:
        batch = to_device(collate([Rows(run.source)[row]], run.coat.spec, run.rates), device)
        if batch["rows"]:
            heard = teacher_targets(run.experts, batch)
            if "recon" in tasks:
                with torch.no_grad(), run.autocast():
                    heard["recon"] = run.coat(batch).audio_embeds
            for task in tasks:
                clips[task].append(heard[task][0])    # (L, E)
    for task, found in clips.items():
        if found:
            run.heads.calibrate(task, found)
    if run.ranks.gather(not all(clips.values()) and bool(lengths.any()))[0]:
        raise InputError(f"none of the first {args.calibrate} clips can be used; see python "
                         f"data.py check {args.data}")
    if run.ranks.world > 1:
        for tensor in run.heads.state_dict().values():
            dist.broadcast(tensor, 0)


def start(run):
    """A new run: heads from another run or from the best constant answer."""
    known = []
    if run.args.init_from:
        known = load_heads(run.heads, latest_checkpoint(run.args.init_from))
    calibrate(run, [task for task in run.tasks if task not in known])


def load_heads(heads, checkpoint):
    """Loads the heads, with their scales, that another run has too -> their tasks.

    Raises InputError."""
    path = os.path.join(checkpoint, "heads.safetensors")
    try:
        weights = safetensors.torch.load_file(path)
        known = [task for task in heads if f"{task}.out.weight" in weights]
        for task in known:
            found = {name: weights[name] for name in heads.tensors_of(task)}
            heads.load_state_dict(found, strict=False)
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as e:
        raise InputError(f"--init-from: '{path}' cannot be read or has heads of another size "
                         f"({str(e).splitlines()[0]}); give its --head and --head-width") from e
    return known


def resume(run, checkpoint, config):
    """Loads what `save` saved. Raises InputError if the run would go another way than it began."""
    began = read_config(run.args.resume, "--resume")
    if began["data"] != config["data"]:
        raise InputError(f"the rows of {run.args.data}, or lengths or sizes of their audio, are "
                         "not those that the run began with; bring them back, or start a new run")
    for what in ("world", "commit", "device", "versions"):
        if began[what] != config[what]:
            run.ranks.say(f"!! not bit for bit: {what} was {began[what]} when the run began and is "
                          f"now {config[what]}")
    path = os.path.join(checkpoint, "heads.safetensors")
    try:
        safetensors.torch.load_model(run.heads, path)
        path = os.path.join(checkpoint, "state.pt")
        load_state(run, path)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:    # what torch makes of a strange file is of any kind
        reason = " ".join(str(e).split()).split(". ")[0][:200]
        raise InputError(f"'{path}' is missing, damaged or of another run ({type(e).__name__}: "
                         f"{reason}); delete '{checkpoint}' to go on after the checkpoint before "
                         "it, or start a new run") from e


def load_state(run, path):
    """The optimizer, and where the run stood. Raises an error of any kind if the file is damaged,
    and ValueError if it is of another model or checkpoint."""
    state = torch.load(path, map_location=run.ranks.device, weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("it holds something else")
    run.optimizer.load_state_dict(state["optimizer"])
    for p, moments in run.optimizer.state.items():
        if not moments["exp_avg"].shape == moments["exp_avg_sq"].shape == p.shape:
            raise ValueError("its moments are of another size")
    if os.path.basename(os.path.dirname(path)) != f"checkpoint-{state['step']}":
        raise ValueError(f"it is of step {state['step']}")
    run.step = int(state["step"])
    run.skipped = int(state["skipped"])
    run.lost = int(state["lost"])
    if len(state["rng"]) == run.ranks.world:
        set_rng(state["rng"][run.ranks.rank])


def rng_state(device):
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state())
    return states


def set_rng(states):
    for set_state, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), states):
        set_state(state.cpu())


def save(run):
    """checkpoint-STEP, whole or not at all: it gets its name last. All ranks call this."""
    rng = run.ranks.gather(rng_state(run.ranks.device))
    final = os.path.join(run.args.out, f"checkpoint-{run.step}")
    if run.ranks.rank == 0 and not os.path.exists(final):
        new = final + ".tmp"
        state = {"step": run.step, "skipped": run.skipped, "lost": run.lost, "rng": rng,
                 "optimizer": run.optimizer.state_dict()}
        try:
            shutil.rmtree(new, ignore_errors=True)
            run.coat.save(new)
            safetensors.torch.save_model(run.heads, os.path.join(new, "heads.safetensors"))
            torch.save(state, os.path.join(new, "state.pt"))
            publish(new, final)
        except (OSError, RuntimeError, safetensors.SafetensorError) as e:    # e.g. a full disk
            shutil.rmtree(new, ignore_errors=True)
            again = "start anew with --out"
            if checkpoint_steps(run.args.out):
                again = "go on with --resume"
            raise InputError(f"cannot write {final}: {str(e).splitlines()[0]}; make room and "
                             f"{again} {run.args.out}") from e
        for step in checkpoint_steps(run.args.out)[:-run.args.keep]:
            shutil.rmtree(os.path.join(run.args.out, f"checkpoint-{step}"))
    run.ranks.gather(None)    # torchrun ends all ranks when one does, so none goes before this


def describe(args, data, ranks):
    """config.json of a run: what would have to be the same for the same steps."""
    device = f"cpu, {torch.get_num_threads()} threads"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name()
    commit = None
    if shutil.which("git"):
        here = os.path.dirname(os.path.abspath(__file__))
        done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True,
                              text=True)
        commit = done.stdout.strip()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return {"flags": vars(args), "data": data, "world": ranks.world, "commit": commit,
            "device": device, "versions": versions}


# --------------------------------------------------------------------------------------------------
# The log

class Clock:
    """Seconds of a step, and of its parts: `with clock("data"): ...`"""

    def __init__(self, device):
        self.device = device
        self.restart()

    def restart(self):
        self.begin = time.time()
        self.parts = Counter()

    @contextlib.contextmanager
    def __call__(self, part):
        begin = time.time()
        yield
        if self.device.type == "cuda" and part != "data":
            torch.cuda.synchronize()
        self.parts[part] += time.time() - begin


def read_log(path):
    """{step: its line} of a log.jsonl. A line that is no such is left out: a kill may cut one."""
    lines = {}
    with open(path, "rb") as file:
        for text in file:
            line = parse_line(text)
            if isinstance(line, dict) and "step" in line:
                if all(isinstance(value, (int, float, type(None))) for value in line.values()):
                    lines[line["step"]] = line
    return lines


class Log:
    """log.jsonl, its lines on the screen, and TensorBoard if asked for. Rank 0 writes."""

    def __init__(self, run):
        self.run = run
        self.begin = time.time()
        self.begin_step = run.step
        self.writes = run.ranks.rank == 0
        self.bar = tqdm(total=run.total, initial=run.step, dynamic_ncols=True,
                        disable=not self.writes or not sys.stderr.isatty())
        self.board = None
        self.path = os.path.join(run.args.out, "log.jsonl")
        if self.writes:
            self.drop_later_steps()
        if self.writes and run.args.tensorboard:
            board = need("torch.utils.tensorboard", "tensorboard")
            self.board = board.SummaryWriter(run.args.out, purge_step=run.step + 1)
        chip = torch.cuda.get_device_name() if run.ranks.device.type == "cuda" else ""
        self.peak = next((flops for name, flops in PEAKS.items() if name in chip), None)

    def drop_later_steps(self):
        """What was logged after the checkpoint is done again; a new run starts empty."""
        step = self.run.step
        lines = read_log(self.path) if step and os.path.exists(self.path) else {}
        kept = [lines[i] for i in range(1, step + 1) if i in lines]
        if len(kept) < step:
            self.run.ranks.say(f"!! log.jsonl lacks {step - len(kept)} of the {step} steps that "
                               "the checkpoint has; the run goes on without these lines")
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, number, lr, losses, norm, n, clock):
        """One step of stage `number`. losses: {"loss", "ce", terms}, None where there is none."""
        run = self.run
        took = time.time() - clock.begin
        line = {"step": run.step, "stage": number + 1, "lr": lr, **losses, "grad_norm": norm}
        line |= {"tokens_per_s": n.tokens / took, "audio_s_per_s": n.seconds / took,
                 "padding": 1 - n.tokens / max(1, n.slots), "data_wait": clock.parts["data"] / took,
                 "teachers": clock.parts["teachers"] / took, "skipped": run.skipped,
                 "lost": run.lost,
                 "mfu": None, "gib": None}
        if self.peak:
            # Forward, and backward to the activations but not to the frozen weights: 4 FLOPs each.
            flops = 4 * run.coat.decoder_weights * n.tokens
            line["mfu"] = flops / took / (self.peak * run.ranks.world)
        if run.ranks.device.type == "cuda":
            line["gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
        try:
            if self.writes:
                self.put(line)
        except OSError as e:    # a full disk
            run.ranks.stop.append(e)

    def put(self, line):
        run = self.run
        with open(self.path, "a") as file:    # anew: what cannot be written does not stay behind
            file.write(json.dumps(line) + "\n")
        if self.board:
            for key, value in line.items():
                if value is not None and key != "step":
                    self.board.add_scalar(key, value, run.step)
        seconds_a_step = (time.time() - self.begin) / (run.step - self.begin_step)
        cells = [f"{key} {value:.3g}" for key, value in line.items()
                 if value is not None and key not in ("step", "skipped", "lost")]
        eta = f"eta {seconds_a_step * (run.total - run.step):.0f} s"
        run.ranks.say(" ".join([f"step {run.step}/{run.total}", *cells, eta]))
        self.bar.update()

    def close(self):
        self.bar.close()
        if self.board:
            self.board.close()
        if self.writes and self.run.step:
            self.draw()

    def draw(self):
        """losses.png: means over at most 300 pieces of the run; dashed where a stage begins."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return self.run.ranks.say("no losses.png without matplotlib; pip install matplotlib")
        lines = read_log(self.path).values()
        if not lines:
            return
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        names = dict.fromkeys(["ce", *(term for task in self.run.tasks for term in terms(task))])
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                pieces = np.array_split(points, min(300, len(points)))
                steps, values = np.transpose([piece.mean(0) for piece in pieces])
                axes.semilogy(steps, values, label=name)
        for begin in np.cumsum([stage.steps for stage in self.run.stages])[:-1]:
            axes.axvline(begin, color="gray", linestyle="--", linewidth=1)
        axes.set(xlabel="step", ylabel="ce: nats a token; experts: 1 is the best constant")
        axes.legend()
        figure.savefig(os.path.join(self.run.args.out, "losses.png"), dpi=80)


# --------------------------------------------------------------------------------------------------
# The method

def train(run, log):
    """All stages, step by step (section 3.4). Every loss is a sum over the global batch divided by
    its count over the global batch, so that it does not matter how the rows are cut into
    micro-batches and ranks."""
    world = run.ranks.world
    clock = Clock(run.ranks.device)
    for number, stage in enumerate(run.stages):
        first = run.step - sum(before.steps for before in run.stages[:number])
        if first >= stage.steps:
            continue
        teachers = run.teachers(stage)
        student = distribute(run, Student(run.coat, run.heads, stage.tasks), teachers)
        for i, batches, skipped in step_batches(run, number, first, clock):
            n = count_over_ranks(run, batches, skipped)
            if n.stop:
                return
            sums = Counter()
            for batch in batches:
                with clock("teachers"):
                    targets = teacher_targets(teachers, batch)    # z_k = E_k(a) at 25 Hz
                with syncing(student, batch is batches[-1]):
                    with run.autocast():
                        losses = student(batch, targets)
                    losses = {name: value / n.of(name) for name, value in losses.items()}
                    total = losses["ce"]                     # equation 4
                    for term, weight in stage.weights.items():
                        total = total + weight * losses[term]
                    (total * world).backward()               # DDP takes the mean over ranks
                for name, value in ({"loss": total} | losses).items():
                    sums[name] += value.detach()
            lr = learning_rate(stage, i, run.args.warmup)
            losses, norm = finish_step(run, n, sums, lr, batches)
            if not n.frames:    # rows of text alone say nothing about the experts
                losses |= dict.fromkeys(stage.weights)
            log.write(number, lr, losses, norm, n, clock)
            clock.restart()
            if run.step % run.args.save_every == 0 and run.step < run.total:
                save(run)


def distribute(run, student, teachers):
    """DDP exchanges gradients while the backward pass goes on, and never the frozen weights."""
    if run.ranks.world == 1:
        return student
    run.optimizer.zero_grad(set_to_none=True)    # they are parts of the buckets of the stage before
    student = DistributedDataParallel(student, broadcast_buffers=False, init_sync=False,
                                      gradient_as_bucket_view=True)
    # Its first backward pass decides the order of its buckets, and the order of a sum shows in its
    # last bit. After an idle pass, a resumed run sums as an uninterrupted one does.
    batch = to_device(idle_batch(run.coat.spec, run.rates), run.ranks.device)
    with run.autocast():
        losses = student(batch, teacher_targets(teachers, batch))
    sum(losses.values()).backward()
    zero_grad(run)
    return student


def zero_grad(run):
    """DDP's buckets stay, with the gradients in them; one rank alone gives the memory back."""
    run.optimizer.zero_grad(set_to_none=run.ranks.world == 1)


def syncing(student, last):
    """Only the last micro-batch of a step exchanges the gradients."""
    if last or not isinstance(student, DistributedDataParallel):
        return contextlib.nullcontext()
    return student.no_sync()


class Counts(SimpleNamespace):
    """What a step holds over all ranks: targets, frames, tokens, slots, seconds, skipped, stop."""

    def of(self, name):
        """What the sum of a loss is divided by; at least 1, for a step of text alone."""
        return max(1, self.targets if name == "ce" else self.frames)


def count_over_ranks(run, batches, skipped):
    """Counts of a step."""
    here = Counter(stop=len(run.ranks.stop), skipped=len(skipped))
    for batch in batches:
        if batch["rows"]:
            here["targets"] += (batch["labels"][:, 1:] != IGNORE).sum().item()
            here["frames"] += batch["n_audio"].sum().item()
            here["tokens"] += batch["attention_mask"].sum().item()
            here["slots"] += batch["input_ids"].numel()
            here["seconds"] += batch["seconds"]
    names = ("targets", "frames", "tokens", "slots", "seconds", "skipped", "stop")
    return Counts(**dict(zip(names, run.ranks.sum(*(here[name] for name in names)))))


def learning_rate(stage, i, warmup):
    """Of step i of a stage: a straight rise, then a cosine to zero."""
    warm = max(1, round(warmup * stage.steps))
    if i < warm:
        return stage.lr * (i + 1) / warm
    return stage.lr * (0.5 + 0.5 * math.cos(math.pi * (i - warm) / (stage.steps - warm)))


def finish_step(run, n, sums, lr, batches):
    """Clips, checks, and takes the step -> ({name: loss over all ranks}, norm of the gradient).

    A step without a usable row, or with a number that is not finite, is not taken."""
    losses = dict(zip(sums, run.ranks.sum(*torch.stack(list(sums.values())).tolist())))
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, run.args.clip).item()
    run.step += 1
    run.skipped += int(n.skipped)
    if n.targets and math.isfinite(norm + sum(losses.values())):
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        run.lost_in_a_row = 0
    else:
        lose_step(run, n, batches)
        losses, norm = dict.fromkeys(losses), None
    zero_grad(run)
    return losses, norm


def lose_step(run, n, batches):
    """Counts a step that is not taken. Raises InputError, after a save, when there are too many."""
    run.lost += 1
    run.lost_in_a_row += 1
    rows = [row["row"] for batch in batches for row in batch["rows"]]
    why = f"the loss is not finite; rows {rows} of this rank are in it"
    if not n.targets:
        why = "none of its rows can be used; see the reasons above"
    run.ranks.say(f"!! step {run.step} is left out: {why}")
    if run.lost_in_a_row == MAX_LOST:
        save(run)
        raise InputError(f"step {run.step} is the {MAX_LOST}th in a row that is left out: {why}. "
                         "The run is saved; look at these rows, or start a new run with a lower "
                         "--lr")


# --------------------------------------------------------------------------------------------------
# Does it hear?

def ask_heldout(run):
    """Held-out questions about tones and, as a control, the same over another row's clip."""
    kinds = run.source.kinds
    coat = run.coat.merge()
    heldout = Tones("heldout", run.args.heldout * len(kinds), kinds)
    loaded = [Rows(heldout)[i] for i in range(len(heldout))]
    results = {}
    run.ranks.say(f"\n{'held-out question':28}{'heard':>8}{'other clip':>12}{'chance':>8}")
    for kind in kinds:
        rows = [row for row in loaded if row["task"] == kind]
        others = [row | {"wave": rows[i - 1]["wave"]} for i, row in enumerate(rows)]
        found = {"heard": share_right(coat, rows, run.args.batch),
                 "other_clip": share_right(coat, others, run.args.batch),
                 "chance": 1 / len(TONES[kind][1])}
        results[kind] = found
        run.ranks.say(f"{TONES[kind][0]:28}{found['heard']:8.0%}{found['other_clip']:12.0%}"
                      f"{found['chance']:8.0%}")
    write_file(os.path.join(run.args.out, "heldout.json"), json.dumps(results, indent=1))
    clip = os.path.join(run.args.out, f"heldout-{kind}-{rows[0]['response']}.wav")
    sound = io.BytesIO()    # on a full disk soundfile itself raises an AssertionError
    soundfile.write(sound, rows[0]["wave"].numpy(), rows[0]["rate"], format="WAV")
    with open(clip, "wb") as file:
        file.write(sound.getvalue())
    run.ranks.say("\nNow ask about a clip it has never heard; the answer is in the file's name:\n"
                  f"  python infer.py ask {run.args.out} {clip} \"{TONES[kind][0]}\"")


def share_right(coat, rows, batch_size):
    """The share of rows whose response the model gives."""
    right = 0
    for start in range(0, len(rows), batch_size):
        some = rows[start:start + batch_size]
        batch = collate(some, coat.spec, think=coat.think, responses=False)
        batch = to_device(batch, coat.hf.device)
        answers = coat.generate(batch, max_new_tokens=12)
        right += sum(answer == row["response"] for answer, row in zip(answers, some))
    return right / len(rows)


# --------------------------------------------------------------------------------------------------

def finish(run, log):
    """After the last save. Raises InputError if an output is gone."""
    ranks = run.ranks
    go_on = f"go on with: python train.py --resume {run.args.out}"
    for reason in ranks.stop:
        if isinstance(reason, OSError):
            raise InputError(f"{reason}; the run is saved after step {run.step}; {go_on}")
    log.close()
    if run.skipped or run.lost:
        ranks.say(f"{run.skipped} rows were skipped and {run.lost} steps left out, see above")
    if ranks.stop or run.step < run.total:
        ranks.say(f"stopped after step {run.step}; {go_on}")
    elif ranks.rank == 0 and isinstance(run.source, Tones) and run.args.heldout:
        ask_heldout(run)


@contextlib.contextmanager
def signals_awaited(ranks):
    """In here a signal ends the run after its step, with a save; before and after there is nothing
    to lose. One that is ignored, as by nohup, stays so."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: ranks.stop.append(number))
    ranks.gather(None)    # one that still dies of a signal would take the others with it
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def announce(run, seconds):
    """What is trained on what."""
    args, ranks = run.args, run.ranks
    weights = sum(p.numel() for p in run.coat.parameters()) / 1e6
    trained = sum(p.numel() for p in run.coat.parameters() if p.requires_grad) / 1e6
    of_heads = sum(p.numel() for p in run.heads.parameters()) / 1e6
    ranks.say(f"{args.backbone} on {ranks.world} x {ranks.device}: {weights:.1f} M weights, of "
              f"which {trained:.2f} M trained; heads {of_heads:.2f} M "
              f"({', '.join(run.tasks) or 'none'})")
    ranks.say(f"{run.total} steps of {args.batch} rows from {args.data}, to {args.out}, set up in "
              f"{seconds:.0f} s")
    if args.workers and not can_fork():
        ranks.say("no data processes on this system (--workers 0): rows are loaded between steps")
    if "recon" in run.tasks and run.coat.new_projector:
        ranks.say("!! the projector is new, and while it learns it moves what recon is to "
                  "reconstruct; train it first with --no-think, merge, and start from that folder")
    if isinstance(run.source, Tones) and args.backbone != "tiny":
        ranks.say("!! training on synthetic tones, which teach nothing about speech or sound; give "
                  "--data a manifest, see data.py")


def set_up(args, stages, ranks, source, data):
    """The Run, new or resumed. data: the fingerprint of the source."""
    tasks = list(dict.fromkeys(task for stage in stages for task in stage.tasks))
    began_from = args.resume or args.init_from
    checkpoint = latest_checkpoint(began_from) if began_from else None
    coat, experts, heads = build_models(args, tasks, ranks.device, checkpoint)
    optimizer = build_optimizer(coat, heads, args.weight_decay, ranks.device)
    run = Run(args, stages, ranks, source, coat, experts, heads, optimizer,
              skipped=len(source.skipped))
    config = describe(args, data, ranks)
    if args.resume:
        resume(run, checkpoint, config)
    else:
        start(run)
        if ranks.rank == 0:
            write_file(os.path.join(args.out, "config.json"), json.dumps(config, indent=1))
    return run


def main():
    one_line_errors(ExpertUnavailable, less_memory=LESS_MEMORY)
    begin = time.time()
    args = read_flags()
    stages = [parse_stage(text, args) for text in args.stage]
    ranks = Ranks(args.device, args.backbone)
    prepare(args, ranks.world)
    source, data = open_data(args, stages, ranks)

    with folder_held(args, ranks):
        run = set_up(args, stages, ranks, source, data)
        announce(run, time.time() - begin)
        rehearse(run)
        log = Log(run)
        with signals_awaited(ranks):
            train(run, log)
            save(run)
        finish(run, log)
    ranks.say(f"done in {time.time() - begin:.0f} s")
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
