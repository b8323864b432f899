"""Uses a trained model, or a backbone as it is.

    python infer.py ask runs/tiny assets/clips/guitar_chord.flac "Which note?"
    python infer.py score runs/tiny tones --out coat.jsonl     # tables 1, 4 and 5; again: goes on
    python infer.py score tiny tones --text-think              # tables 2 and F
    python infer.py probe tiny runs/tiny --data tones:note:200 --plot probe.png    # table 3
    python infer.py show runs/tiny assets/clips/guitar_chord.flac --out heads.png  # figure 4
    python infer.py frames runs/tiny --data tones:glide:100    # do the heads follow the sound?
    python infer.py compare runs/* --plot arms.png             # table 4
    python infer.py merge runs/tiny merged

A model is a run or checkpoint folder of train.py, a folder that `merge` wrote, or the name of a
backbone. The thinking block is placed for a model that was trained with it, for no other. Rows are a
manifest, see data.py, or held-out synthetic tones: tones[:KINDS[:N]].
"""
import argparse
import contextlib
import functools
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import safetensors.torch
import torch
from huggingface_hub.utils import http_backoff

from data import (Rows, collate, fingerprint, open_source, parse_row, read_audio, expert_targets,
                  usable_rows)
from experts import EXPERTS, load_experts
from heads import heads_for
from model import (ASSETS, BACKBONES, COUNT, WORKERS, InputError, TooLong,
                   checkpoint_steps, latest_checkpoint, load_coat, load_text_think, one_line_errors, pad_rows, read_json,
                   to_device, usable_device, write_file)

AUDIO = (".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
# Tasks whose answers a judge rates (appendix B); no comparison of strings could.
JUDGED = ("caption", "music", "spoken_instruction", "text")
CONTOUR_ON = 0.3    # a pitch is there: the frame threshold of basic-pitch


# --------------------------------------------------------------------------------------------------
# Models and batches

def load_model(args, name=None):
    """A model, see the top of this file, ready to answer: adapters are merged. Raises InputError."""
    name = name or args.model
    device = usable_device(args.device, name)
    if getattr(args, "text_think", None):    # the authors' own adapter
        return load_text_think(name, args.text_think, args.model_path, device)
    coat = load_coat(name, args.model_path, device=device).merge()
    if getattr(args, "compile", False):
        coat.compile_decode()
    return coat


class Prepared(torch.utils.data.Dataset):
    """Batches of rows without their responses, the longest first: what does not fit in memory
    fails at once."""

    def __init__(self, coat, source, rows, args):
        rows = sorted(rows, key=lambda i: -source.lengths[i])
        self.rows = Rows(source)
        self.numbers = [rows[i:i + args.batch] for i in range(0, len(rows), args.batch)]
        self.spec = coat.spec
        self.text_think = getattr(args, "text_think", None) is not None
        self.think = coat.think and not self.text_think and not getattr(args, "no_think", False)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        rows = [self.rows[number] for number in self.numbers[i]]
        for row in rows:
            if self.text_think and isinstance(row, dict):    # asks for reasoning in text
                row.setdefault("question", row["prompt"])
                row["prompt"] += self.spec.backbone.text_think
        return collate(rows, self.spec, think=self.think, responses=False)


def batches(coat, source, rows, args, skipped):
    """Yields batches of rows on the device. What cannot be used is printed and added to `skipped`."""
    prepared = Prepared(coat, source, rows, args)
    loader = torch.utils.data.DataLoader(prepared, batch_size=None, num_workers=args.workers)
    for (batch,), left_out in loader:
        for reason in left_out:
            print(f"skipped: {reason}", file=sys.stderr)
        skipped += left_out
        if batch["rows"]:
            yield to_device(batch, coat.hf.device)


# --------------------------------------------------------------------------------------------------
# ask

class Asked:
    """What `ask` is asked, as a source of rows, see data.py."""

    skipped = ()

    def __init__(self, rows):
        self.rows = rows
        self.lengths = np.zeros(len(rows))    # the order stays

    def load(self, i):
        row = dict(self.rows[i])
        if row["audio"] is not None:
            row["wave"], row["rate"] = read_audio(row["audio"], row.get("start"), row.get("end"))
        return row


def rows_to_ask(args):
    """The rows that `ask` is to answer. Raises InputError."""
    rows = []
    *clips, question = args.clips
    if question.endswith(".jsonl"):
        clips, question = args.clips, None
    for path in clips:
        if path.endswith(".jsonl"):
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    row = parse_row(line, f"{path}, line {number}", answered=False)
                    if row["audio"] is not None:
                        row["audio"] = os.path.join(os.path.dirname(path), row["audio"])
                    rows.append(row)
            continue
        found = [path]
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if name.lower().endswith(AUDIO))
            found = [os.path.join(path, name) for name in names]
        rows += [{"audio": clip, "prompt": question, "response": "", "start": args.start,
                  "end": args.end} for clip in found]
    if not rows or any(row["prompt"] is None for row in rows):
        raise InputError("give clips and, last, a question: infer.py ask MODEL CLIP \"Which sound?\"")
    return rows


def ask(args):
    """Questions, without answers to compare with: one answer a clip.

    CLIPS are audio files, folders of them, or manifests: a line is {"audio": .., "prompt": ..}. A
    clip that cannot be read is named, and the others are answered. Not supported: several clips in
    one question, several turns, video, URLs."""
    source = Asked(rows_to_ask(args))
    if len(source.rows) == 1:
        source.load(0)    # raises before the model is loaded, which takes its time
    coat = load_model(args)
    skipped = []
    for batch in batches(coat, source, range(len(source.rows)), args, skipped):
        for i, text in enumerate(coat.generate(batch, args.max_new_tokens)):
            row = batch["rows"][i]
            if args.json:
                print(json.dumps({
                    "row": row["row"], "audio": row["audio"], "question": row["prompt"],
                    "answer": text, "n_audio": int(batch["n_audio"][i]),
                    "prompt_tokens": int(batch["attention_mask"][i].sum())}), flush=True)
            else:
                name = f"{row['audio'] or 'text'}: " if len(source.rows) > 1 else ""
                print(name + text, flush=True)
    if len(skipped) == len(source.rows):
        raise InputError(f"none of the {len(skipped)} rows can be used; the first: {skipped[0]}")


# --------------------------------------------------------------------------------------------------
# score: measures

def plain(text):
    """For comparison: no capitals, single spaces, no marks at the ends."""
    return " ".join(text.lower().split()).strip(" .,:;!?*\"'()")


def parse_choice(answer, choices):
    """The choice that an answer names, or None: after an "The answer is" a choice itself; a choice's
    letter, "B", "(B)", "B. this", without the name of another choice; or exactly one choice as whole
    words, one inside a longer one not counted."""
    opening = r"^\W*(the\s+)?(correct\s+)?(answer|option)\b(\s+is\b)?\s*:?\s*"
    short = re.sub(opening, "", answer.strip(), flags=re.I)
    for choice in choices:
        if plain(choice) in (plain(answer), plain(short)):
            return choice
    rest, named = plain(short), []
    for choice in sorted(choices, key=len, reverse=True):    # what a longer one takes is gone
        rest, found = re.subn(rf"(?<!\w){re.escape(plain(choice))}(?!\w)", "\0", rest)
        named += [choice] if found else []
    letter = re.match(r"[(*[]*([A-Z])(?:[.):*\]]+(?:\s|$)|$)", short.upper())
    if letter and ord(letter[1]) - ord("A") < len(choices):
        choice = choices[ord(letter[1]) - ord("A")]
        return choice if set(named) <= {choice} else None
    return named[0] if len(named) == 1 else None


def final_answer(text):
    """The answer in a text that reasons first: the last <answer>..</answer>; else what follows the
    last "the answer is" (Audio Flamingo 3 ends so); else what follows </think>; else all of it."""
    before, _, _ = text.rpartition("</answer>")
    if "<answer>" in before:
        return before.rpartition("<answer>")[2].strip()
    parts = re.split(r"\bthe answer is\b", text, flags=re.I)
    if len(parts) > 1:
        return parts[-1].strip(" :\n")
    return text.rpartition("</think>")[2].strip()


def is_right(line):
    """Whether an answer is the response, or names the choice that the response names."""
    if not line.get("choices"):
        return plain(line["answer"]) == plain(line["response"])
    right = parse_choice(line["response"], line["choices"])
    return right is not None and parse_choice(line["answer"], line["choices"]) == right


def interval(counts, statistic, samples=1000):
    """statistic of the sums of counts (n, k), and its 95 % interval by drawing rows anew."""
    counts = np.asarray(counts, float)
    n = len(counts)
    rng = np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(n, size=n), minlength=n) @ counts for _ in range(samples)]
    low, high = np.percentile(statistic(np.stack(drawn)), [2.5, 97.5])
    return {"value": float(statistic(counts.sum(0))), "low": float(low), "high": float(high)}


def share(sums):
    """(.., 2) sums -> their ratio, such as errors over words."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def weighted_f1(sums):
    """(.., 3 C) sums of hits, support, predicted -> F1 weighted by support (appendix B)."""
    hits, support, predicted = np.split(sums, 3, axis=-1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    return (f1 * support).sum(-1) / support.sum(-1)


def word_errors(line, normalise):
    """(errors, words) of a transcript, None for a reference of GigaSpeech's tags alone."""
    import jiwer
    reference = re.sub("<(MUSIC|NOISE|SIL|OTHER)>", " ", line["response"])    # appendix B
    if not reference.strip():
        return None
    reference, heard = normalise(reference), normalise(line["answer"])
    if not reference.strip():    # only fillers such as "uh": all that is heard is wrong
        return len(heard.split()), 0
    out = jiwer.process_words(reference, heard)
    missed = out.substitutions + out.deletions
    return missed + out.insertions, missed + out.hits


def measure(lines, ratings, normalise):
    """[{task, metric, rows, value, low, high}] of answered rows, lines of a predictions file.

    ratings     {row: what the judge says or None}: of the JUDGED 0..5, of choices whether it is
                the right one
    normalise   text -> text, for the WER"""
    results = []

    def add(metric, counts, statistic=share):
        counts = [count for count in counts if count is not None]
        found = interval(counts, statistic) if counts else dict.fromkeys(("value", "low", "high"))
        results.append({"task": task, "metric": metric, "rows": len(counts)} | found)

    for task in sorted({line["task"] for line in lines}):
        rows = [line for line in lines if line["task"] == task]
        closed = [line for line in rows if line.get("choices")]
        rated = {line["row"]: ratings.get(line["row"]) for line in rows}
        if task == "asr":
            add("WER", [word_errors(line, normalise) for line in rows])
        elif closed:
            add("accuracy", [(is_right(line), 1) for line in closed])
            if any(value is not None for value in rated.values()):
                add("judged accuracy", [value if value is None else (value, 1)
                                        for value in rated.values()])
            if len({frozenset(line["choices"]) for line in closed}) == 1:
                classes = np.array(closed[0]["choices"])
                truth = [parse_choice(line["response"], line["choices"]) for line in closed]
                said = [parse_choice(line["answer"], line["choices"]) or "" for line in closed]
                is_true = np.array(truth)[:, None] == classes    # (n, C)
                is_said = np.array(said)[:, None] == classes
                add("weighted F1", np.concatenate([is_true & is_said, is_true, is_said], 1),
                    weighted_f1)
        elif task in JUDGED:
            add("rating", [value if value is None else (20 * value, 1) for value in rated.values()])
        else:
            add("exact match", [(is_right(line), 1) for line in rows])
    return results


def normaliser(path=None):
    """Whisper's English text normaliser; path: the spellings in normalizer.json of a Whisper model."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    return EnglishTextNormalizer(read_json(path) if path else {})


# --------------------------------------------------------------------------------------------------
# score: answers, ratings, report. The first line of --out says what the others belong to.

def default_out(args):
    """Where predictions go without --out: into the model's folder, or for a backbone into this one."""
    rows = os.path.splitext(os.path.basename(args.data))[0]
    parts = ["predictions", *([args.model] if args.model in BACKBONES else []), rows]
    parts += ["no-think"] * args.no_think + ["text-think"] * (args.text_think is not None)
    folder = "" if args.model in BACKBONES else args.model
    return os.path.join(folder, re.sub(r"[^\w.]+", "-", "-".join(parts)) + ".jsonl")


def earlier(path, run):
    """Lines that a stopped `score` left, less the first; one that a kill cut is dropped. Raises
    InputError if they are of another run."""
    lines = [{"run": run}]
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = []
            for text in file:
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(text))
        if not lines or not isinstance(lines[0], dict) or lines[0].get("run") != run:
            raise InputError(f"'{path}' is of another model, other rows or flags; give another "
                             "--out, or delete it")
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines[1:]


def score(args):
    """Answers to rows, and how good they are.

    Rows of task asr: WER; with choices: accuracy, weighted F1; caption, music, spoken_instruction,
    text: rated by a judge, if there is one; others: exact match. A stopped run goes on with the
    same command. With --text-think the answer in a text is its last <answer>..</answer>, else what
    follows the last "the answer is", else what follows </think>, else all of it."""
    source = open_source(args.data)
    normalise = normaliser(args.normaliser)
    run = {key: getattr(args, key) for key in ("model", "model_path", "data", "no_think",
                                               "text_think", "max_new_tokens")}
    run["rows"] = fingerprint(source)
    out = args.out or default_out(args)
    lines = earlier(out, run)
    answers = {line["row"]: line for line in lines if "answer" in line}
    ratings = {line["row"]: line for line in lines if line.get("judge") == args.judge_model}
    skipped = [reason for _, reason in source.skipped]
    print(f"predictions: {out}\n{len(source)} rows, {len(skipped)} skipped, {len(answers)} answered "
          "before")

    with open(out, "a", encoding="utf-8") as file:
        left = np.setdiff1d(usable_rows(source), list(answers)).tolist()
        coat = load_model(args) if left else None
        for batch in batches(coat, source, left, args, skipped) if left else ():
            for row, text in zip(batch["rows"], coat.generate(batch, args.max_new_tokens)):
                keys = ("row", "audio", "task", "prompt", "question", "choices", "response")
                line = {key: row[key] for key in keys if key in row} | {"answer": text}
                if args.text_think is not None:
                    line |= {"answer": final_answer(text), "text": text}
                answers[row["row"]] = line
                print(json.dumps(line), file=file, flush=True)
            print(f"{len(answers)} answered")
        if not answers:
            raise InputError(f"none of the {len(source)} rows can be used; the first: {skipped[0]}")
        todo = [line for i, line in answers.items() if i not in ratings and (
                    args.judge_choices if line.get("choices") else line["task"] in JUDGED)]
        with ThreadPoolExecutor(8) as pool:
            for rating in pool.map(functools.partial(rate, args), todo if args.judge else ()):
                ratings[rating["row"]] = rating
                print(json.dumps(rating), file=file, flush=True)    # at once: it is paid for
    report(args, [answers[i] for i in sorted(answers)], ratings, skipped, normalise)


def rate(args, line):
    """Asks an OpenAI-compatible judge about an answer (figure A; where there are choices, our own
    prompt) -> a line of the predictions file. Raises InputError."""
    closed = bool(line.get("choices"))
    with open(os.path.join(ASSETS, "judge_choice.txt" if closed else "judge.txt")) as file:
        prompt = file.read().format(
            question=line.get("question") or line["prompt"], ground_truth=line["response"],
            choices="\n".join(line.get("choices") or ()),
            model_response=line.get("text", line["answer"]) if closed else line["answer"])
    key = os.environ.get("OPENAI_API_KEY", "")
    try:
        reply = http_backoff(
            "POST", args.judge.rstrip("/") + "/chat/completions", timeout=120,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            json={"model": args.judge_model, "temperature": 0, "max_tokens": 1024,
                  "messages": [{"role": "user", "content": prompt}]})
        reply.raise_for_status()
        found = reply.json()
        text = str(found["choices"][0]["message"]["content"] or "")
    except Exception as e:    # no answer, an error, or no such reply
        raise InputError(f"the judge at {args.judge} fails ({e}); its key is read from "
                         "OPENAI_API_KEY. What it has rated is kept: the same command goes on") from e
    if closed:
        said = re.match(r"\W*(yes|no)\b", text, re.I)
        rating = said and said[1].lower() == "yes"
    else:
        said = re.findall(r"rating\W{1,9}?([0-5])(?![.,]?\d)", text, re.I)
        rating = int(said[-1]) if said else None
    return {"row": line["row"], "judge": args.judge_model, "rating": rating, "reply": text,
            "usage": found.get("usage")}


def report(args, lines, ratings, skipped, normalise):
    """Measures the answers and prints a table and a JSON line."""
    results = measure(lines, {i: line["rating"] for i, line in ratings.items()}, normalise)
    print(f"{'task':20}{'metric':17}{'rows':>7}{'value':>9}   95 % interval")
    for result in results:
        scale = 1 if result["metric"] == "rating" else 100
        cells = ["-", "", ""]
        if result["rows"]:
            cells = [f"{scale * result[key]:.2f}" for key in ("value", "low", "high")]
        print("{task:20}{metric:17}{rows:7}".format(**result)
              + "{:>9}   {} to {}".format(*cells))
    too_long = sum(isinstance(reason, TooLong) for reason in skipped)
    print(json.dumps({"model": args.model, "data": args.data, "results": results,
                      "skipped": {"over 120 s": too_long, "unusable": len(skipped) - too_long}}))


# --------------------------------------------------------------------------------------------------
# show, frames: what the heads reconstruct

def load_heads(args):
    """(CoAT, {task: teacher}, ExpertHeads) of a run as it was trained. Raises InputError."""
    checkpoint = latest_checkpoint(args.model)
    flags = read_json(os.path.join(checkpoint, "..", "config.json"))["flags"]
    coat = load_model(args, checkpoint)
    device = coat.hf.device
    try:
        path = os.path.join(checkpoint, "heads.safetensors")
        weights = safetensors.torch.load_file(path, device=str(device))
        found = {key.split(".")[0] for key in weights}    # of "recon.out.weight"
        tasks = [task for task in EXPERTS if task in found]
        random = args.random_experts or flags["random_experts"]
        d = coat.hf.config.get_text_config().hidden_size
        paths = {task: flags.get(f"expert_{task}") for task in tasks}
        experts = load_experts(tasks, d, device, random, paths)
        heads = heads_for(d, experts, kind=flags["head"], width=flags["head_width"],
                          focal_gamma=flags["focal_gamma"]).to(device)
        heads.load_state_dict(weights)    # with the scales of the losses
    except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as e:
        raise InputError(f"'{path}' is missing, damaged or not of its run ({e})") from e
    if not tasks:
        raise InputError(f"'{args.model}' was trained without experts; there is no head to show")
    return coat, experts, heads


@torch.no_grad()
def reconstruct(coat, experts, heads, rows):
    """Loaded rows -> [({task: student (L, E)}, {task: teacher (L, E)}, {term: loss})], one a row
    that can be used. Loss: relative to the best constant answer."""
    rates = {expert.sample_rate for expert in experts.values()} - {None}
    found = []
    for row in rows:
        (batch,), skipped = collate([row], coat.spec, rates, coat.think)
        batch = to_device(batch, coat.hf.device)
        for reason in skipped:
            print(f"skipped: {reason}", file=sys.stderr)
        if not batch["rows"] or not batch["n_audio"].any():
            continue
        out = coat(batch)
        targets = expert_targets(experts, batch) | {"recon": out.audio_embeds.float()}
        targets = {task: targets[task] for task in heads}
        states = out.think_states.float()
        student = {task: head(states, out.valid)[0] for task, head in heads.items()}
        losses = heads(states, out.valid, targets)
        losses = {term: loss.item() / int(batch["n_audio"]) for term, loss in losses.items()}
        found.append((student, {task: z[0] for task, z in targets.items()}, losses))
    return found


def pitch_recall(z_hat, z, expert):
    """Of the (frame, bin) pairs where the teacher's contour is above CONTOUR_ON, the share where
    the student's is; None if there is none. A head that collapses to all zero has 0 (3.3.2)."""
    on = expert.readout(z).sigmoid() > CONTOUR_ON    # (L, 264)
    if not on.any():
        return None
    return (expert.readout(z_hat).sigmoid() > CONTOUR_ON)[on].float().mean().item()


def picture(task, z_hat, z, expert):
    """(student (K, L), teacher (K, L), {row: its name}) of features (L, E), as figure 4 shows them:
    events and emotions that the teacher's file can name, the contour, else the 64 dimensions that
    vary most."""
    if task == "affect" and expert.readout:
        return (*(expert.readout(x).softmax(1).T for x in (z_hat, z)), dict(enumerate(expert.EMOTIONS)))
    if task == "pitch":    # the strongest third of each semitone
        contours = [expert.readout(x).sigmoid().unflatten(1, (88, 3)).amax(2).T for x in (z_hat, z)]
        return (*contours, {12 * octave: f"A{octave}" for octave in range(1, 7)})
    if task == "sound":
        z_hat, z = (expert.readout(x).sigmoid() for x in (z_hat, z))
        top = z.amax(0).topk(10).indices.flip(0)
        return z_hat.T[top], z.T[top], {row: f"event {i}" for row, i in enumerate(top.tolist())}
    top = z.var(0).topk(min(64, z.shape[1])).indices
    return z_hat.T[top], z.T[top], {}


def show(args):
    """What each head reconstructs beside what its teacher hears, as a picture (figure 4).

    unexplained: a loss over that of the best constant answer; 0 is the teacher itself.
    recall: of the frames and bins where the teacher hears a pitch, the share where the head does."""
    from matplotlib.figure import Figure
    wave, rate = read_audio(args.clip, args.start, args.end)
    coat, experts, heads = load_heads(args)
    row = {"wave": wave, "rate": rate, "prompt": args.question, "response": ""}
    (student, teacher, losses), = reconstruct(coat, experts, heads, [row])
    figure = Figure(figsize=(9, 2.4 * len(heads)), dpi=80, layout="constrained")
    told = {"clip": args.clip, "model": args.model, "unexplained": losses, "picture": args.out}
    for task, axes in zip(heads, figure.subplots(len(heads), 2, squeeze=False)):
        *images, names = picture(task, student[task], teacher[task], experts.get(task))
        low, high = images[1].quantile(torch.tensor([0.01, 0.99], device=images[1].device)).tolist()
        for axis, image in zip(axes, images):
            axis.imshow(image.cpu().numpy(), aspect="auto", origin="lower", vmin=low, vmax=high,
                        interpolation="nearest", extent=(0, len(wave) / rate, -0.5, len(image) - 0.5))
            axis.set_yticks(list(names), names.values())
        title = ", ".join(f"{term}: {loss:.2f} unexplained" for term, loss in losses.items()
                          if term.startswith(task))
        if task == "pitch":
            told["pitch_recall"] = pitch_recall(student[task], teacher[task], experts[task])
            title += f", recall {told['pitch_recall']}"
        axes[0].set_title(f"{task}: {title}", fontsize=9, loc="left")
        axes[1].set_title(type(experts[task]).__name__ if task in experts else "the audio tower",
                          fontsize=9)
    figure.savefig(args.out, format="png")
    print(json.dumps(told))


def frames(args):
    """How much of their teachers the heads reconstruct: of clips as a whole, and of their course.

    clips: of each clip its mean feature. course: of each frame what that mean leaves. What all
    clips have in common at a frame's place is taken away from both, in student and teacher.
    Squared errors over the teacher's variance: 0 is the teacher; 1 knows nothing of the clip."""
    source = open_source(args.data)
    coat, experts, heads = load_heads(args)
    found = reconstruct(coat, experts, heads, [Rows(source)[i] for i in usable_rows(source)])
    if len(found) < 2:
        raise InputError(f"{len(found)} of {len(source)} rows have audio that can be used; give two "
                         "or more")
    results = {}
    for task in heads:
        student = [s[task] for s, _, _ in found]
        teacher = [t[task] for _, t, _ in found]
        clips, course = unexplained(student, teacher)
        results[task] = {"clips": clips, "course": course}
        if task == "pitch":
            recalls = [pitch_recall(*pair, experts[task]) for pair in zip(student, teacher)]
            results[task]["recall"] = float(np.mean([r for r in recalls if r is not None] or [0]))
        print(f"{task:8}" + "  ".join(f"{key} {value:.2f}" for key, value in results[task].items()))
    print(json.dumps({"model": args.model, "data": args.data, "clips": len(found),
                      "results": results}))


def unexplained(students, teachers):
    """(of the clips' means, of their course): squared error over the teacher's variance.

    students, teachers    [features of a clip (L, E)], L as it is in each"""
    parts = zip(means_and_course(students), means_and_course(teachers))
    return tuple(((z_hat - z).square().nansum() / z.square().nansum()).item() for z_hat, z in parts)


def means_and_course(clips):
    """[(L, E)] -> (B, 1, E) and (B, L, E), NaN where a clip has ended. Their sum is the features
    without what all clips have in common at a frame's place."""
    z = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=math.nan)
    z = z - z.nanmean(0)
    means = z.nanmean(1, keepdim=True)
    return means, z - means


# --------------------------------------------------------------------------------------------------
# probe

def probe(args):
    """Linear probes of the thinking states.

    Accuracy at two positions, and how the confidence goes with right answers (section 4.4: figure
    3, table 3). A run stands for all its checkpoints. The name of a backbone is the baseline,
    without a block."""
    source = open_source(args.data)
    usable = [i for i in usable_rows(source).tolist() if source.lengths[i] > 0]
    print("think: mean of the thinking states; pre-gen: state before the answer\n"
          "rho: Spearman's, between the probe's confidence in the true label and right answers")
    results = []
    for name in args.models:
        steps = [] if name in BACKBONES else checkpoint_steps(name)
        for step in steps or [None]:
            coat = load_model(args, os.path.join(name, f"checkpoint-{step}") if step else name)
            found = probe_model(coat, source, usable, args)
            results.append({"model": name, "step": step, "rows": len(usable)} | found)
            cells = [f"{position} {f['accuracy']:.1%} +- {f['deviation']:.1%} rho {f['rho'] or '-'}"
                     for position, f in found.items() if isinstance(f, dict)]
            print(f"{name:30}{step or '-':>7}  {'  '.join(cells)}  answers {found['answers']:.1%}")
    print(json.dumps({"data": args.data, "label": args.label, "results": results}))
    if args.plot:
        plot_probes(results, args)


def probe_model(coat, source, usable, args):
    """{"answers": share of right ones, position: {accuracy, deviation, rho}}. Raises InputError if
    no probe can be trained on these rows."""
    from scipy.stats import spearmanr
    labels, groups, right, states = [], [], [], {}
    for batch in batches(coat, source, usable, args, []):
        for row in batch["rows"]:
            choice = parse_choice(row["response"], row.get("choices") or [])
            labels.append(str(row[args.label] if args.label else choice or row["response"]))
            # What stays on one side of a split: a voice would give the label away.
            group = row.get("speaker") or row.get("recording") or row.get("audio") or row["row"]
            groups.append(str(group))
        for position, x in probe_states(coat, batch, args.pre_gen).items():
            states.setdefault(position, []).append(x)
        texts = coat.generate(batch, args.max_new_tokens)
        right += [is_right(row | {"answer": text}) for row, text in zip(batch["rows"], texts)]
    counts = Counter(label for _, label in set(zip(groups, labels)))
    if len(counts) < 2 or min(counts.values()) < 5:
        raise InputError(f"five folds need two labels, each in five recordings; there are "
                         f"{dict(counts)}")
    found = {"answers": float(np.mean(right))}
    for position, x in states.items():
        accuracy, confidence = linear_probe(np.concatenate(x), np.array(labels), groups)
        both = len(set(right)) == 2    # else all answers are right, or none is
        found[position] = {
            "accuracy": float(np.mean(accuracy)), "deviation": float(np.std(accuracy, ddof=1)),
            "rho": float(spearmanr(confidence, right).statistic) if both else None}
    return found


@torch.no_grad()
def probe_states(coat, batch, pre_gen="last-user"):
    """{position: (B, D)}: the mean of the thinking states, and the state before the answer.

    The latter is that of the block's end token. pre_gen: where it is without a block, "last-user",
    the last input token before the assistant turn (section 4.4), or "last", that of the prompt."""
    h, _ = coat.states(batch, use_cache=False)    # (B, T, D)
    states = {"pre-gen": h[:, -1]}
    if batch["think_mask"].any():
        think, _ = pad_rows(h[batch["think_mask"]], batch["n_audio"])    # (B, L, D)
        states["think"] = think.sum(1) / batch["n_audio"][:, None]
    elif pre_gen == "last-user":
        header = coat.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
        from_end = (batch["input_ids"] == header).int().flip(1).argmax(1)    # (B,) of the last one
        states["pre-gen"] = h[torch.arange(len(h), device=h.device), -2 - from_end]
    return {position: x.float().cpu().numpy() for position, x in states.items()}


def linear_probe(x, labels, groups):
    """([accuracy of a fold], (n,) probability of the true label), five folds that split no group.

    x (n, D) states; logistic regression on standardised dimensions, scikit-learn's own settings."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    confidence = np.zeros(len(labels))
    accuracy = []
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for train, test in folds.split(x, labels, groups):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        fitted.fit(x[train], labels[train])
        accuracy.append(fitted.score(x[test], labels[test]))
        is_true = fitted.classes_ == labels[test][:, None]    # (n, C)
        confidence[test] = (fitted.predict_proba(x[test]) * is_true).sum(1)
    return accuracy, confidence


def plot_probes(results, args):
    """Accuracy over the checkpoints of each run, a level line for other models (figure 3)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 3.2), dpi=90, layout="constrained")
    for axis, position in zip(figure.subplots(1, 2, sharey=True), ("think", "pre-gen")):
        for i, name in enumerate(args.models):
            found = [r for r in results if r["model"] == name and position in r]
            accuracy = [r[position]["accuracy"] for r in found]
            if found and found[0]["step"]:
                axis.errorbar([r["step"] for r in found], accuracy,
                              [r[position]["deviation"] for r in found], color=f"C{i}", label=name)
            elif found:
                axis.axhline(accuracy[0], color=f"C{i}", label=name)
        axis.set(xlabel="step", title=position, ylabel=f"accuracy of the probe, {args.data}")
        axis.legend(fontsize=8)
    figure.savefig(args.plot, format="png")


# --------------------------------------------------------------------------------------------------
# compare: does the block help?

def compare(args):
    """Accuracy of runs by what they were trained with, over seeds (table 4).

    With 95 % intervals by Student's t over the seeds, and the difference to the first of these
    arms over the seeds that both have. A run folder counts with its heldout.json, a predictions file
    of `score` with its answers."""
    results = [result for path in args.runs for result in results_of(path)]
    if args.out:
        write_file(args.out, "".join(json.dumps(result) + "\n" for result in results))
    found = {}    # {(data, task): {arm: {seed: accuracy in %}}}
    for r in results:
        arms = found.setdefault((r["data"], r["task"]), {})
        arms.setdefault(r["arm"], {})[r["seed"]] = 100 * r["accuracy"]
    first = results[0]["arm"]
    means = {}
    print(f"{'data':16}{'question':12}{'arm':32}{'seeds':>6}{'accuracy, %':>16}{'difference':>16}")
    for (data, task), arms in found.items():
        for arm, seeds in arms.items():
            base = arms.get(first, {})
            paired = [seeds[s] - base[s] for s in seeds if s in base and arm != first]
            mean, half = means[data, task, arm] = mean_interval(list(seeds.values()))
            difference = "{:+.1f} +- {:.1f}".format(*mean_interval(paired)) if paired else ""
            print(f"{data:16}{task:12}{arm:32}{len(seeds):6}{f'{mean:.1f} +- {half:.1f}':>16}"
                  f"{difference:>16}".rstrip())
    if args.plot:
        plot_arms(means, args.plot)


def mean_interval(values):
    """(mean, half of its 95 % interval by Student's t, NaN for one value)"""
    from scipy.stats import sem, t
    half = math.nan
    if len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * sem(values)
    return float(np.mean(values)), float(half)


def results_of(path):
    """[{arm, data, seed, task, rows, accuracy}] of a run folder, a predictions file in it, or a file
    that --out wrote. Raises InputError."""
    try:
        if os.path.isdir(path):
            flags = read_json(os.path.join(path, "config.json"))["flags"]
            heldout = read_json(os.path.join(path, "heldout.json"))
            right = {task: [shares["heard"]] * flags["heldout"] for task, shares in heldout.items()}
            arm = arm_of(flags)
        else:
            with open(path) as file:
                head, *lines = [json.loads(line) for line in file]
            if "run" not in head:
                return [head, *lines]
            folder = os.path.dirname(os.path.abspath(path))
            if os.path.basename(folder).startswith("checkpoint-"):
                folder = os.path.dirname(folder)
            flags = read_json(os.path.join(folder, "config.json"))["flags"]
            arm = arm_of(flags) + ", asked without the block" * head["run"]["no_think"]
            right = {}
            for line in lines:
                if "answer" in line and (line.get("choices") or line["task"] not in ("asr", *JUDGED)):
                    right.setdefault(line["task"], []).append(is_right(line))
        data = os.path.splitext(os.path.basename(flags["data"]))[0].removesuffix(f"-{flags['seed']}")
    except (ValueError, LookupError, TypeError) as e:
        raise InputError(f"'{path}' is no run or file of results ({type(e).__name__}: {e})") from e
    return [{"arm": arm, "data": data, "seed": flags["seed"], "task": task, "rows": len(found),
             "accuracy": float(np.mean(found))} for task, found in right.items()]


def arm_of(flags):
    """What a run was trained with, in the words of table 4; flags that are not the usual ones."""
    experts = ",".join(stage.split(":")[1] for stage in flags["stage"])
    names = dict.fromkeys(name.split("=")[0] for name in experts.split(","))
    names.pop("none", None)
    if flags["no_think"] and not names:
        return "fine-tuning"
    arm = "+ " + (", ".join(names) or "block")
    if flags["no_think"]:
        arm += ", no block"
    if flags["head"] != "transformer":
        arm += f", {flags['head']} heads"
    if "pitch" in names and (flags["w_pitch_aux"], flags["focal_gamma"]) != (1, 2):
        arm += f", w_aux {flags['w_pitch_aux']:g}, gamma {flags['focal_gamma']:g}"
    return arm


def plot_arms(means, path):
    """Accuracy against the number at the end of the name of the data, one picture a question."""
    from matplotlib.figure import Figure
    tasks = list(dict.fromkeys(task for _, task, _ in means))
    arms = list(dict.fromkeys(arm for _, _, arm in means))
    figure = Figure(figsize=(1 + 4 * len(tasks), 3.5), dpi=90, layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for k, arm in enumerate(arms):
            points = sorted((int(re.search(r"\d+$", data)[0]), *mean)
                            for (data, t, a), mean in means.items() if (t, a) == (task, arm))
            if points:
                numbers, values, halves = np.transpose(points)
                apart = 1.04 ** k    # so that intervals do not hide each other
                axis.errorbar(numbers * apart, values, halves, marker="o", markersize=3, label=arm)
        axis.set(xscale="log", xlabel="labelled clips", ylabel="right answers, %", title=task)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, format="png")


# --------------------------------------------------------------------------------------------------
# merge

def merge(args):
    """A plain transformers folder, in bf16 on a GPU and fp32 on a CPU, as `ask` computes there."""
    if os.path.exists(args.out):
        raise InputError(f"'{args.out}' is there already; give the name of a new folder")
    coat = load_model(args)
    part = args.out.rstrip("/") + ".tmp"
    shutil.rmtree(part, ignore_errors=True)
    coat.save(part)
    os.rename(part, args.out)
    print(f"{args.out}: its README.md shows how to use it without this code; or:\n"
          f"  python infer.py ask {args.out} CLIP \"question\"")


# --------------------------------------------------------------------------------------------------
# The command line

def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run, name="model", nargs=None):
        """The add_argument of a subcommand, called as the function it runs."""
        p = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0],
                                description=run.__doc__)
        p.set_defaults(run=run)
        if run is not compare:
            p.add_argument(name, nargs=nargs, help=f"a folder, or one of {', '.join(BACKBONES)}")
            p.add_argument("--model-path", help="the backbone's folder, or NAME@REVISION of the hub")
            p.add_argument("--device", help="cpu or cuda (the GPU, or for tiny and small the CPU)")
            p.add_argument("--batch", type=COUNT, default=16, help="rows at once (%(default)s)")
            p.add_argument("--workers", type=WORKERS, default=2, help="data processes (%(default)s)")
        return p.add_argument

    def answer_flags(add, new_tokens):
        add("--no-think", action="store_true", help="leave the thinking block out")
        add("--text-think", nargs="?", const="", metavar="FOLDER",
            help="reason in text instead; FOLDER: the think folder of Audio Flamingo 3")
        add("--compile", action="store_true", help="faster decoding after a slow start")
        add("--max-new-tokens", type=COUNT, default=new_tokens, help="(%(default)s)")

    add = command(ask)
    answer_flags(add, 128)
    add("clips", nargs="+", metavar="CLIP", help="audio files, folders or rows.jsonl; the question")
    add("--start", type=float, help="seconds into the file")
    add("--end", type=float, help="seconds into the file")
    add("--json", action="store_true", help="prints one JSON object a row")

    add = command(score)
    answer_flags(add, 256)    # the paper's table D: README.md
    add("data", help="rows.jsonl, mixture.json or tones[:KINDS[:N]]")
    add("--out", help="predictions, a JSON line a row as they come (beside the run)")
    add("--normaliser", metavar="FILE", help="normalizer.json of a Whisper model, for WER")
    add("--judge", metavar="URL", help="OpenAI-compatible, gets questions, references and answers")
    add("--judge-choices", action="store_true", help="it also reads multiple-choice answers")
    add("--judge-model", default="gpt-4o-2024-11-20", help="(%(default)s, the paper's)")

    add = command(show)
    add("clip", help="audio file: wav, flac, ogg or mp3")
    add("--start", type=float, help="seconds into the file")
    add("--end", type=float, help="seconds into the file")
    add("--question", default="Describe the audio.", help="(%(default)s)")
    add("--out", default="show.png", help="(%(default)s)")
    add("--random-experts", action="store_true", help="as in train.py, for tests")

    add = command(frames)
    add("--data", required=True, help="a hundred rows with audio or so")
    add("--random-experts", action="store_true", help="as in train.py, for tests")

    add = command(probe, "models", "+")
    add("--data", required=True, help="labelled rows; a speaker's stay on one side of a split")
    add("--label", metavar="KEY", help="any key of the rows, instead of the response")
    add("--pre-gen", choices=["last-user", "last"], default="last-user",
        help="the state before the answer in models without a block (%(default)s, the paper's)")
    add("--max-new-tokens", type=COUNT, default=20, help="(%(default)s)")
    add("--plot", metavar="FILE", help="a picture")

    add = command(compare)
    add("runs", nargs="+", help="run folders, predictions, or files of --out; the first is the base")
    add("--out", metavar="FILE", help="also write the results, a JSON line a run and question")
    add("--plot", metavar="FILE", help="accuracy against the number that ends the data's name")
    command(merge)("out", help="folder to write")
    return parser


def main():
    one_line_errors(RuntimeError, less_memory="--batch 1")
    args = build_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
