"""Uses a trained model, or a backbone as it is.

    python infer.py ask runs/tiny assets/clips/guitar_chord.flac "Which note?"
    python infer.py ask runs/tiny assets/clips "Which sound?" --out answers.jsonl --no-think
    python infer.py score runs/tiny tones --out coat.jsonl     # tables 1, 4 and 5; again: goes on
    python infer.py score tiny tones --out base.jsonl          # their baseline
    python infer.py score tiny tones --text-think --out cot.jsonl            # tables 2 and F
    python infer.py probe tiny runs/tiny --data tones:note:200 --plot probe.png    # table 3
    python infer.py show runs/tiny assets/clips/guitar_chord.flac --out heads.png  # figure 4
    python infer.py frames runs/tiny --data tones:glide:100    # do the heads follow the sound?
    python infer.py compare runs/* --plot arms.png                           # table 4
    python infer.py merge runs/tiny merged

A model is a run or checkpoint folder of train.py, a folder that `merge` wrote, or the name of a
backbone as it is before training. The thinking block is placed for a model that was trained with
it, for no other. Rows are a manifest, see data.py, or held-out synthetic tones:
tones[:KINDS[:ROWS OF EACH]]. The times of table 2 are those of bench.py latency.
"""
import argparse
import contextlib
import csv
import functools
import http.client
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import safetensors.torch
import torch

from data import (Rows, collate, fingerprint, open_source, parse_row, read_audio,
                  teacher_targets, to_device, usable_rows)
from experts import EXPERTS, ExpertUnavailable, load
from heads import heads_for
from model import (BACKBONES, COUNT, MAX_SECONDS, WORKERS, InputError, TooLong, check_kinds,
                   checkpoint_steps, hold, latest_checkpoint, load_coat, load_text_think, need,
                   one_line_errors, pad_rows, parse_line, publish, read_coat_json, read_json, real,
                   usable_device, write_file)

# Names of files that `ask` takes out of a folder, and of those that soundfile cannot read.
AUDIO = (".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
VIDEO = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)

# Tasks whose answers a judge rates (appendix B); no comparison of strings could.
JUDGED = ("caption", "music", "spoken_instruction", "text")
# Figure A, with the line breaks that our copy of the paper has lost. There is no system message.
JUDGE_PROMPT = """[Question]
{question}

[Reference Answer]
{ground_truth}

[Model Answer]
{model_response}

[Task]
Rate the model's answer based on its alignment with the reference answer, focusing on accuracy and \
relevance to the reference provided. Please be critical on the details.
Criteria: Assess if the model's response mirrors the reference in terms of content, accuracy, and \
relevance.
Score 0: The answer is completely misaligned, providing incorrect or irrelevant information \
compared to the reference.
Score 1: The answer shows minimal alignment, often misunderstanding or providing irrelevant \
details unrelated to the reference.
Score 2: The answer recognizes the topic but diverges significantly from the reference in accuracy \
or relevance.
Score 3: The answer aligns with the reference generally but lacks detail or precise accuracy in \
some aspects.
Score 4: The answer is mostly accurate and relevant, closely following the reference but could be \
clearer or more detailed.
Score 5: The answer is highly accurate, detailed, and matches the reference answer perfectly, \
capturing its essence and detail.

Your response should be formatted as follows:
Explanation: (Provide a concise explanation of your rating, comparing the reference answer with \
the model's response. "The reference answer is [XXX], while the model's answer is [YYY]. I think \
...")
Rating: (int)"""
# For --judge-choices. Ours: the paper says "GPT-eval" (appendix C) and gives no prompt for it.
CHOICE_PROMPT = """[Question]
{question}

[Choices]
{choices}

[Reference Choice]
{ground_truth}

[Model Answer]
{model_response}

[Task]
Does the model's answer, in the end, name the reference choice and no other? A letter names the \
choice that it marks. Reply with one word: yes or no."""
MAX_REPLY = 2 ** 20    # bytes of a judge's reply

# What `show` draws of a task, as figure 4 of the paper or not.
DRAWN = {
    "recon": "features of the audio tower (no codec decoder here, the paper decodes Sim-Whisper)",
    "speech": "features",
    "sound": "the ten events that the teacher hears most, probabilities",
    "affect": "features (the paper draws what an emotion head makes of them; plus files have one)",
    "pitch": "the contour, the strongest third of each semitone",
}
CONTOUR_ON = 0.3    # a pitch is there: the frame threshold of basic-pitch
NEEDS_RUN = "give the folder of a run as train.py wrote it, or copy it again"


# --------------------------------------------------------------------------------------------------
# Models and batches

def model_folder(name):
    """A checkpoint or merged folder itself, or a run's newest checkpoint. Raises InputError."""
    if os.path.isfile(os.path.join(name, "coat.json")):
        return name
    return latest_checkpoint(name)


def known_of(name, model_path=None):
    """coat.json of a model: {"backbone", "think": whether it was trained with the block, ..}.

    Raises InputError."""
    if name not in BACKBONES:
        return read_coat_json(model_folder(name))
    if model_path and os.path.isfile(os.path.join(model_path, "coat.json")):
        return read_coat_json(model_path)
    return {"backbone": name, "think": False}


def device_of(args, *names):
    """The torch.device that --device, or else these models, ask for. Raises InputError."""
    for name in names or [args.model]:
        device = usable_device(args.device, known_of(name, args.model_path)["backbone"])
    return device


def load_model(name, device, model_path=None, text_think=None):
    """A model, see the top of this file, ready to answer: adapters are merged. Raises InputError.

    text_think  folder of the authors' own thinking adapter for a backbone, instead of ours"""
    if text_think:
        return load_text_think(name, text_think, model_path, device)
    if name in BACKBONES:
        return load_coat(name, model_path=model_path, device=device)
    folder = model_folder(name)
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return load_coat(adapter=folder, model_path=model_path, device=device).merge()
    return load_coat(read_coat_json(folder)["backbone"], model_path=folder, device=device)


def check_text_think(args):
    """Raises InputError if --text-think cannot go with the rest."""
    if args.text_think and args.model not in BACKBONES:
        raise InputError(
            "--text-think FOLDER goes with the name of a backbone, not with a run of ours")
    if args.text_think is not None and args.no_think:    # "": without a folder
        raise InputError("--text-think leaves the thinking block out already; drop --no-think")


def places_block(args, trained_with_it):
    """Whether prompts get the thinking block."""
    return trained_with_it and not args.no_think and args.text_think is None


def prepare(rows, spec, think, text_think):
    """collate, without the responses. text_think: asks for reasoning in text after each prompt,
    which stays as it was under "question"."""
    for row in rows:
        if text_think and not isinstance(row, InputError):
            row.setdefault("question", row["prompt"])
            row["prompt"] += spec.backbone.text_think
    return collate(rows, spec, think=think, responses=False)


def batches(coat, source, rows, args, think, text_think=False):
    """Batches of rows, in this order, without their responses.

    "left_out" in a batch: {row number: InputError} of those that cannot be used."""
    order = [rows[i:i + args.batch] for i in range(0, len(rows), args.batch)]
    ready = functools.partial(prepare, spec=coat.spec, think=think, text_think=text_think)
    loader = torch.utils.data.DataLoader(
        Rows(source), batch_sampler=order, collate_fn=ready,
        num_workers=min(args.workers, len(order)))
    for numbers, batch in zip(order, loader):
        used = {row["row"] for row in batch["rows"]}
        left_out = [i for i in numbers if i not in used]
        batch["left_out"] = dict(zip(left_out, batch["skipped"], strict=True))
        yield to_device(batch, coat.hf.device)


def rows_with_audio(source):
    """[number of a row that can be used and has audio]; those that cannot are named."""
    for _, reason in source.skipped:
        print(f"skipped: {reason}")
    return [i for i in usable_rows(source).tolist() if source.lengths[i] > 0]


def longest_first(coat, source, rows, args, skipped, think, text_think=False):
    """Batches of these rows, the longest first: what does not fit in memory fails at once. A row
    that turns out to be unreadable is named and added to `skipped`."""
    rows = sorted(rows, key=lambda i: -source.lengths[i])
    for batch in batches(coat, source, rows, args, think, text_think):
        for reason in batch["skipped"]:
            print(f"skipped: {reason}")
        skipped += batch["skipped"]
        if batch["rows"]:
            yield batch


# --------------------------------------------------------------------------------------------------
# ask

class Questions:
    """What `ask` is asked, as a source of rows, see data.py: [row, or InputError of none]."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def load(self, i):
        row = self.rows[i]
        if isinstance(row, InputError):
            raise row
        if row["audio"] is None:
            return dict(row)
        wave, rate = read_clip(row["audio"], row.get("start"), row.get("end"))
        return row | {"wave": wave, "rate": rate}


def read_clip(path, start=None, end=None):
    """read_audio, which first says what to do about a URL or a video. Raises InputError."""
    if URL.search(path) and not os.path.exists(path):
        raise InputError(f"'{path}': URLs are not read; download the file and give its path")
    if path.lower().endswith(VIDEO):
        raise InputError(f"'{path}': video is not supported; take its sound out with "
                         f"ffmpeg -i {shlex.quote(path)} sound.wav")
    return read_audio(path, start, end)


def names_a_file(text):
    """Whether the last word of `ask` is meant as a file, not as the question."""
    is_known = text.lower().endswith((*AUDIO, *VIDEO, ".jsonl"))
    return is_known or os.path.exists(text) or bool(URL.match(text))


def audio_files(folder):
    """The paths of the audio files in a folder, sorted. Raises InputError if there is none."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    audio = [name for name in names if name.lower().endswith(AUDIO)]
    if not audio:
        raise InputError(f"'{folder}' holds no {', '.join(AUDIO)}; give the folder of the clips")
    if len(audio) < len(names):
        print(f"'{folder}': {len(names) - len(audio)} of {len(names)} are no audio files, left out",
              file=sys.stderr)
    return [os.path.join(folder, name) for name in audio]


def read_prompts(path):
    """[row, or InputError of a line that is none] of a manifest, whose rows may lack a response."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = parse_row(line, f"{path}, line {number}", answered=False)
                    if row["audio"] is not None:
                        row["audio"] = os.path.join(os.path.dirname(path), row["audio"])
                except InputError as e:
                    row = e
                rows.append(row)
    if not rows:
        raise InputError(f"'{path}' holds no rows; write one JSON object a line")
    return rows


def questions(args):
    """[row, or InputError of none] that `ask` is to answer. Raises InputError."""
    clips = list(args.clips)
    asked = args.question or []
    if not asked and len(clips) > 1 and not names_a_file(clips[-1]):
        asked = [clips.pop()]
    if len(asked) > 1:
        raise InputError("one question at a time: several turns are not supported")
    manifests = [path for path in clips if path.endswith(".jsonl")]
    if not asked and len(manifests) < len(clips):
        raise InputError("no question; write it last: infer.py ask MODEL CLIP \"Which sound?\"")
    if len(manifests) == len(clips) and (asked or args.start is not None or args.end is not None):
        raise InputError("each row of a manifest has its own \"prompt\", \"start\" and \"end\"; "
                         "leave the question, --start and --end out")

    rows = []
    for path in clips:
        if path in manifests:
            rows += read_prompts(path)
            continue
        for clip in audio_files(path) if os.path.isdir(path) else [path]:
            rows.append({"audio": clip, "prompt": asked[0], "response": "", "start": args.start,
                         "end": args.end})
    return rows


def ask(args):
    """Questions, without answers to compare with: one answer a clip.

    CLIPS are audio files, folders of them, or manifests: a line is {"audio": .., "prompt": ..}. The
    answer to one clip is printed as it comes. Those to several come in batches, in the order of
    the rows; one that cannot be read is named and counted, and the others are answered.
    Not supported: several clips in one question, several turns, video, URLs."""
    check_text_think(args)
    source = Questions(questions(args))
    is_alone = len(source) == 1 and not args.out
    if is_alone:
        row = source.load(0)    # before the model, which takes its time
    with new_file(args.out) as file:
        coat = load_model(args.model, device_of(args), args.model_path, args.text_think)
        if args.compile:
            coat.compile_decode()
        if is_alone:
            ask_one(coat, row, args)
        else:
            ask_all(coat, source, args, file)


@contextlib.contextmanager
def new_file(path):
    """Opens a file that is not there yet; None without a path. Raises InputError."""
    if not path:
        yield None
        return
    # A file name that is not UTF-8 is written as JSON writes half a character.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file, hold(path):
        if os.path.getsize(path):
            raise InputError(f"'{path}' is there already; give another --out, or delete it")
        yield file


def ask_one(coat, row, args):
    think = places_block(args, coat.think)
    batch = prepare([row], coat.spec, think, args.text_think is not None)
    if batch["skipped"]:
        raise batch["skipped"][0]
    told = tell(coat, to_device(batch, coat.hf.device), args.max_new_tokens, aloud=not args.json)
    if args.json:
        print(json.dumps({"row": 0, "audio": row["audio"], "question": row["prompt"]} | told))


def ask_all(coat, source, args, file):
    """Answers all rows, in their order. Raises InputError if none of them can be used."""
    rows = range(len(source))
    think = places_block(args, coat.think)
    left_out = {}
    for batch in batches(coat, source, rows, args, think, args.text_think is not None):
        left_out |= batch["left_out"]
        for line in answered(coat, batch, args.max_new_tokens):
            give(line, args.json, file)
    if len(left_out) == len(source):
        raise InputError(f"none of the {len(source)} rows can be used; the first: {left_out[0]}")
    if left_out or file:
        print(f"{len(source) - len(left_out)} answered, {len(left_out)} skipped", file=sys.stderr)


def answered(coat, batch, max_new_tokens):
    """[what --json says of a row of the batch], in their order."""
    lines = [{"row": i, "error": str(reason)} for i, reason in batch["left_out"].items()]
    if batch["rows"]:
        texts = coat.generate(batch, max_new_tokens)
        n_audio = batch["n_audio"].tolist()
        n_prompt = batch["attention_mask"].sum(1).tolist()
        for i, row in enumerate(batch["rows"]):
            lines.append({
                "row": row["row"], "audio": row["audio"], "question": row["prompt"],
                "answer": texts[i], "n_audio": n_audio[i], "prompt_tokens": n_prompt[i]})
    return sorted(lines, key=lambda line: line["row"])


def give(line, as_json, file=None):
    """Writes a line of `answered`, or prints it."""
    if file:
        write(file, line)
    if as_json:
        print(json.dumps(line), flush=True)
    elif "error" in line:
        print(f"skipped: {line['error']}", flush=True)
    elif not file:
        print(f"{line['audio'] or 'text'}: {line['answer']}", flush=True)


def tell(coat, batch, max_new_tokens, aloud):
    """Answers a batch of one row -> what --json says of it. aloud: prints it as it comes."""
    begin = time.time()
    first = None
    ids = []
    shown = 0    # characters
    for token in coat.stream(batch, max_new_tokens):
        ids.append(token.item())
        first = first or time.time()
        text = coat.processor.tokenizer.decode(ids, skip_special_tokens=True)
        if aloud and not text.endswith("\ufffd"):    # half a character needs another token
            print(text[shown:], end="", flush=True)
            shown = len(text)
    if aloud:
        print(text[shown:])
    return {
        "answer": text.strip(), "n_audio": int(batch["n_audio"]),
        "prompt_tokens": batch["input_ids"].shape[1], "new_tokens": len(ids),
        "seconds_to_first_token": round(first - begin, 4),
        "seconds": round(time.time() - begin, 4)}


# --------------------------------------------------------------------------------------------------
# score: measures

def plain(text):
    """For comparison: no capitals, single spaces, no marks at the ends."""
    return " ".join(text.lower().split()).strip(" .,:;!?*\"'()")


def parse_choice(answer, choices):
    """The choice that an answer names, or None. In this order, after an "The answer is", capitals
    and marks aside:

    1. the answer is a choice
    2. it is or begins with a choice's letter, "B", "(B)", "B. this", and names no other choice
    3. exactly one choice occurs in it as whole words, one inside a longer one not counted"""
    opening = r"^\W*(the\s+)?(correct\s+)?(answer|option)\b(\s+is\b)?\s*:?\s*"
    short = re.sub(opening, "", answer.strip(), flags=re.I)
    for choice in choices:
        if plain(choice) in (plain(answer), plain(short)):
            return choice

    rest = plain(short)
    named = []
    for choice in sorted(choices, key=len, reverse=True):    # what a longer one takes is gone
        words = rf"(?<!\w){re.escape(plain(choice))}(?!\w)"
        rest, found = re.subn(words, "\0", rest)
        if found:
            named.append(choice)

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


def lmms_choice(answer, n):
    """The rule of lmms-eval 0.7.3 for MMAU, MuchoMusic and AIR-Bench -> the place, below n, of the
    choice whose letter stands in brackets, else alone, else before a full stop, and of several the
    one that stands alone last; None where it draws one at random. (For MMAR and MMSU it also takes
    a letter before a space, and the text of a choice in an answer of more than five words.)"""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    letters = [chr(ord("A") + i) for i in range(n)]
    for form in ("({})", " {} ", "{}."):
        found = [letter for letter in letters if form.format(letter) in answer]
        if found:
            last = max(found, key=lambda letter: answer.rfind(f" {letter} "))
            return letters.index(last)
    return None


def lmms_rating(task, reply):
    """The rule of lmms-eval 0.7.3 for a judge's reply: 0..5 or None. For Alpaca-Audio the first
    digit in it, whatever it counts; for WavCaps what follows a "Rating:" at its end."""
    pattern = "([0-5])" if task == "spoken_instruction" else r"Rating:\s*([0-5])\s*$"
    found = re.search(pattern, reply)
    return int(found[1]) if found else None


def is_right(row, answer):
    if not row.get("choices"):
        return plain(answer) == plain(row["response"])
    right = parse_choice(row["response"], row["choices"])
    return right is not None and parse_choice(answer, row["choices"]) == right


def share(sums):
    """(.., 2) sums -> their ratio, such as errors over words."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def weighted_f1(sums):
    """(.., 3 C) sums of hits, support, predicted -> F1 weighted by support (appendix B)."""
    hits, support, predicted = np.split(sums, 3, axis=-1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    return (f1 * support).sum(-1) / support.sum(-1)


def interval(counts, statistic, samples=1000):
    """statistic of the sums of counts (n, k), and its 95 % interval by drawing rows anew."""
    counts = np.asarray(counts, float)
    n = len(counts)
    rng = np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(n, size=n), minlength=n) @ counts for _ in range(samples)]
    low, high = np.percentile(statistic(np.stack(drawn)), [2.5, 97.5])
    return {"value": float(statistic(counts.sum(0))), "low": float(low), "high": float(high)}


def summary(metric, counts, note="", statistic=share):
    found = {"value": None, "low": None, "high": None}
    if len(counts):
        found = interval(counts, statistic)
    return {"metric": metric, "rows": len(counts)} | found | {"note": note}


def word_error_rate(lines, normalise):
    """References without a word once GigaSpeech's tags are gone are left out (appendix B)."""
    jiwer = need("jiwer", "jiwer")
    counts = []    # (errors, words)
    for line in lines:
        reference = re.sub("<(MUSIC|NOISE|SIL|OTHER)>", " ", line["response"])
        if not reference.strip():
            continue
        reference = normalise(reference)
        heard = normalise(line["answer"])
        if reference.strip():
            out = jiwer.process_words(reference, heard)
            missed = out.substitutions + out.deletions
            counts.append((missed + out.insertions, missed + out.hits))
        else:    # only fillers such as "uh": all that is heard is wrong, as in jiwer over many rows
            counts.append((len(heard.split()), 0))
    return summary("WER", counts, f"{len(lines) - len(counts)} empty references left out")


def mean_rating(lines, ratings, lmms_eval=False):
    """The judge's 0..5, brought to 0..100 (appendix B)."""
    asked = [ratings[line["row"]] for line in lines if line["row"] in ratings]
    unreadable = asked.count(None)
    note = f"{unreadable} unreadable, {len(lines) - len(asked)} not asked for"
    if lmms_eval:
        asked = [rating or 0 for rating in asked]
        note += "; read by lmms-eval's rule, unreadable is 0"
    elif unreadable:
        note += "; unreadable is left out (lmms-eval: 0)"
    return summary("rating", [(20 * rating, 1) for rating in asked if rating is not None], note)


def judged_accuracy(lines, ratings):
    """The share of answers that name the right choice as the judge reads them."""
    asked = [ratings[line["row"]] for line in lines if line["row"] in ratings]
    good = [(named, 1) for named in asked if named is not None]
    note = (f"{len(asked) - len(good)} unreadable, {len(lines) - len(asked)} not asked for; "
            "the judge's prompt is ours")
    return summary("judged accuracy", good, note)


def choices_of(lines, lmms_eval=False):
    """([right choice], [choice in the answer or ""], note) of the rows whose reference is one."""
    truth = []
    said = []
    unreadable = 0
    rng = np.random.default_rng(0)
    for line in lines:
        choices = line["choices"]
        label = parse_choice(line["response"], choices)
        if label is None:
            continue
        answer = parse_choice(line["answer"], choices)
        if lmms_eval:
            place = lmms_choice(line["answer"], len(choices))
            answer = None if place is None else choices[place]
        unreadable += answer is None
        if answer is None and lmms_eval:
            answer = choices[rng.integers(len(choices))]
        truth.append(label)
        said.append(answer or "")

    note = f"{unreadable} without an answer"
    if lmms_eval:
        note += "; read by lmms-eval's rule, which draws a choice for those (seed 0)"
    elif unreadable:
        note += ", so wrong (lmms-eval: a random choice)"
    if len(truth) < len(lines):
        note += f", {len(lines) - len(truth)} references are no choice, left out"
    return truth, said, note


def choice_measures(lines, lmms_eval=False):
    """[accuracy; weighted F1 where all rows have the same choices]"""
    truth, said, note = choices_of(lines, lmms_eval)
    right = [(label == answer, 1) for label, answer in zip(truth, said)]
    results = [summary("accuracy", right, note)]

    if truth and len({frozenset(line["choices"]) for line in lines}) == 1:
        classes = np.array(lines[0]["choices"])
        is_true = np.array(truth)[:, None] == classes    # (n, C)
        is_said = np.array(said)[:, None] == classes
        counts = np.concatenate([is_true & is_said, is_true, is_said], axis=1)    # (n, 3 C)
        results.append(summary("weighted F1", counts, statistic=weighted_f1))
    return results


def measure(lines, ratings=None, normalise=str, lmms_eval=False):
    """[{task, metric, rows, value, low, high, note}] of answered rows, lines of a predictions file.

    ratings     {row: what the judge says or None}: of the JUDGED 0..5, of choices whether it is
                the right one
    normalise   text -> text, for the WER
    lmms_eval   its rules where an answer or a rating cannot be read"""
    results = []
    ratings = ratings or {}
    for task in sorted({line["task"] for line in lines}):
        rows = [line for line in lines if line["task"] == task]
        closed = [line for line in rows if line.get("choices")]
        free = [line for line in rows if not line.get("choices")]
        found = []
        if task == "asr":
            found = [word_error_rate(rows, normalise)]
        elif free and task in JUDGED:
            found = [mean_rating(free, ratings, lmms_eval)]
        elif free:
            right = [(is_right(line, line["answer"]), 1) for line in free]
            found = [summary("exact match", right)]
        if closed and task != "asr":
            found += choice_measures(closed, lmms_eval)
            if any(line["row"] in ratings for line in closed):
                found.append(judged_accuracy(closed, ratings))
        results += [{"task": task} | result for result in found]
    return results


def normaliser(path=None):
    """Whisper's English text normaliser; path: the spellings in normalizer.json of a Whisper model.
    Raises InputError."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    if not path:
        return EnglishTextNormalizer({})
    remedy = "give normalizer.json of a Whisper model"
    words = read_json(path, remedy)
    if not all(isinstance(word, str) for word in words.values()):
        raise InputError(f"'{path}' is no map of words; {remedy}")
    return EnglishTextNormalizer(words)


# --------------------------------------------------------------------------------------------------
# score: answers, ratings, report. The first line of --out says what the others belong to.

def run_of(args, source):
    """What answers belong to: the model, the rows and the flags. think: is the block placed?"""
    model = args.model
    saved = False
    if model not in BACKBONES:
        model = os.path.abspath(model_folder(model))
        saved = os.path.getmtime(os.path.join(model, "coat.json"))
    data = os.path.abspath(args.data) if source.files else args.data
    known = known_of(args.model, args.model_path)
    folder = args.text_think
    return {
        "model": model, "saved": saved, "data": data, "rows": fingerprint(source),
        "model_path": args.model_path, "think": places_block(args, known["think"]),
        "text_think": os.path.abspath(folder) if folder else folder,
        "max_new_tokens": args.max_new_tokens}


def default_out(args, source):
    """Where predictions go without --out: beside the run, or for a backbone into this folder."""
    folder = ""
    names = ["predictions", args.model]
    if args.model not in BACKBONES:
        folder, name = os.path.split(os.path.abspath(model_folder(args.model)))
        names[1] = name
        if not name.startswith("checkpoint-"):    # a merged folder
            folder = os.path.join(folder, name)
            names.pop()
    if args.no_think:
        names.append("no-think")
    if args.text_think is not None:
        names.append("text-think")
    data = os.path.splitext(os.path.basename(args.data))[0] if source.files else args.data
    names.append(re.sub(r"[^\w.]+", "-", data))
    return os.path.join(folder, "-".join(names) + ".jsonl")


def is_prediction(line, n_rows):
    """Whether this is a line as `answer` or `judge` writes it, about one of so many rows."""
    if not isinstance(line, dict) or type(line.get("row")) is not int:
        return False
    if not 0 <= line["row"] < n_rows:
        return False
    if "answer" in line:
        choices = line.get("choices") or []
        texts = [line.get(key) for key in ("task", "prompt", "response", "answer")]
        return isinstance(choices, list) and all(isinstance(x, str) for x in texts + choices)
    tokens = line.get("tokens")
    if not isinstance(tokens, list) or len(tokens) != 2:
        return False
    is_text = isinstance(line.get("judge"), str) and isinstance(line.get("reply"), str)
    return is_text and all(isinstance(n, int) for n in tokens) and line.get("rating", 6) in (
        None, 0, 1, 2, 3, 4, 5)


def earlier(path, run, n_rows):
    """Lines that a stopped `score` left, less the first; what a kill left of a last one is cut off.
    Raises InputError if they are of another run or damaged."""
    if not os.path.getsize(path):
        return []
    remedy = "give another --out, or delete it"
    with open(path, "rb+") as file:
        whole = file.read().rpartition(b"\n")[0]
        first, *lines = [parse_line(text) for text in whole.split(b"\n")]
        was = first.get("run") if isinstance(first, dict) else None
        if not isinstance(was, dict):
            raise InputError(f"'{path}' is no file of predictions; {remedy}")
        for key in run:
            if was.get(key) != run[key]:
                changed = f"{key} was {was.get(key)}, now {run[key]}"
                raise InputError(f"'{path}' belongs to another run ({changed}); {remedy}")
        for number, line in enumerate(lines, 2):
            if not is_prediction(line, n_rows):
                raise InputError(f"'{path}', line {number} is damaged: no answer to one of these "
                                 "rows, nor a rating; delete that line, or give another --out")
        file.truncate(len(whole) + 1)
    return lines


def write(file, line):
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def score(args):
    """Answers to rows, and how good they are.

    Rows of task asr: WER; with choices: accuracy, weighted F1; caption, music, spoken_instruction,
    text: rated by a judge, if there is one; others: exact match. A stopped run goes on with the
    same command. With --text-think the answer in a text is its last <answer>..</answer>, else what
    follows the last "the answer is", else what follows </think>, else all of it."""
    check_text_think(args)
    if args.judge_choices and not args.judge:
        raise InputError("--judge-choices asks the judge; give --judge URL too")
    if args.judge:
        check_judge(args.judge)
    device = device_of(args)
    source = open_source(args.data)
    normalise = normaliser(args.normaliser)
    run = run_of(args, source)
    out = args.out or default_out(args, source)
    print(f"predictions: {out}")

    with open(out, "a", encoding="utf-8") as file, hold(out):
        lines = earlier(out, run, len(source))
        answers = {line["row"]: line for line in lines if "answer" in line}
        ratings = {line["row"]: line for line in lines if line.get("judge") == args.judge_model}
        if not os.path.getsize(out):
            write(file, {"run": run})
        skipped = answer(args, source, run, device, answers, file)
        failed = judge(args, answers, ratings, file)
    report(args, run["model"], answers, ratings, skipped, normalise)
    if failed:
        raise failed


def answer(args, source, run, device, answers, file):
    """Answers the rows that `answers` lacks, adds and writes them -> [why a row is left out].
    Raises InputError if all are."""
    skipped = [reason for _, reason in source.skipped]
    for reason in skipped:
        print(f"skipped: {reason}")
    print(f"{len(source)} rows, {len(skipped)} skipped, {len(answers)} answered before")

    left = np.setdiff1d(usable_rows(source), list(answers)).tolist()
    if left:
        begin = time.time()
        coat = load_model(run["model"], device, args.model_path, args.text_think)
        if args.compile:
            coat.compile_decode()
        in_text = args.text_think is not None
        for batch in longest_first(coat, source, left, args, skipped, run["think"], in_text):
            texts = coat.generate(batch, args.max_new_tokens)
            for row, text in zip(batch["rows"], texts):
                keys = ("row", "audio", "task", "prompt", "question", "choices", "response")
                line = {key: row[key] for key in keys if key in row}
                if in_text:
                    line |= {"answer": final_answer(text), "text": text}
                else:
                    line["answer"] = text
                answers[row["row"]] = line
                write(file, line)
            print(f"{len(answers)} answered, {time.time() - begin:.0f} s")
    if not answers:
        raise InputError(f"none of the {len(source)} rows can be used; the first: {skipped[0]}")
    return skipped


def judge(args, answers, ratings, file):
    """Rates the answers that `ratings` lacks, adds and writes them -> an error, or None."""
    if not args.judge:
        return None
    todo = []
    for i, line in sorted(answers.items()):
        asked = line["task"] in JUDGED
        if line.get("choices"):
            asked = args.judge_choices and line["task"] != "asr"
        if asked and i not in ratings:
            todo.append(line)

    failed = None
    for i in range(0, len(todo), 8):
        errors = 0
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(rating_of, args, line) for line in todo[i:i + 8]]
            for reply in as_completed(asked):
                if reply.exception():
                    failed = reply.exception()
                    errors += 1
                else:
                    rating = reply.result()
                    ratings[rating["row"]] = rating
                    write(file, rating)    # at once: it is paid for
        print(f"{len(ratings)} rated by {args.judge_model}")
        if errors == len(asked):    # it is not about one row
            break
    return failed


def judge_prompt(line):
    """Figure A, or CHOICE_PROMPT where there are choices, about an answered row.

    The question in it is the row's "question", such as the text of a spoken instruction, or else
    its prompt."""
    about = {"question": line.get("question") or line["prompt"], "ground_truth": line["response"]}
    if not line.get("choices"):
        return JUDGE_PROMPT.format(model_response=line["answer"], **about)
    choices = "\n".join(f"{chr(ord('A') + i)}. {c}" for i, c in enumerate(line["choices"]))
    whole = line.get("text", line["answer"])    # what a rule took out of it may be at fault
    return CHOICE_PROMPT.format(choices=choices, model_response=whole, **about)


def check_judge(url):
    """Warns if the key can be read on its way. Raises InputError if URL or key cannot be used."""
    if not re.fullmatch(r"https?://[^\s?#@]+", url, re.I):
        raise InputError(
            "--judge takes http(s)://HOST/PATH, without a user, a password or a query; its key is "
            "read from OPENAI_API_KEY")
    judge_key()
    if not re.match(r"https:|http://(localhost|127\.0\.0\.1|\[::1\])(:|/|$)", url, re.I):
        print(f"warning: {url} is not encrypted, so others can read the key and the rows on "
              "their way; use https")


def judge_key():
    """OPENAI_API_KEY, or "". Raises InputError if it holds what no key does."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise InputError(
            "OPENAI_API_KEY holds a space, a line break or a character that is not ASCII; set it "
            "to the key alone")
    return key


class EveryReply(urllib.request.HTTPErrorProcessor):
    """Hands on replies of any status. A redirect is not followed: it would get the key."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def rating_of(args, line):
    """Asks the judge -> a line of the predictions file. Tries five times. Raises InputError."""
    prompt = judge_prompt(line)
    url = args.judge.rstrip("/") + "/chat/completions"
    body = json.dumps({    # as in appendix B
        "model": args.judge_model, "messages": [{"role": "user", "content": prompt}],
        "temperature": 0, "max_tokens": 1024}).encode()
    headers = {"Content-Type": "application/json"}
    key = judge_key()
    if key:
        headers["Authorization"] = f"Bearer {key}"

    opener = urllib.request.build_opener(EveryReply)
    for attempt in range(5):
        try:
            request = urllib.request.Request(url, body, headers)
            with opener.open(request, timeout=120) as reply:
                content = reply.read(MAX_REPLY + 1)
            if 200 <= reply.status < 300:
                rating = read_reply(content, line.get("choices"))
                rating["reply"] = masked(rating["reply"], key)
                return {"row": line["row"], "judge": args.judge_model} | rating
            if 300 <= reply.status < 400:
                why = f"{reply.status}, a redirect, is not followed: give the URL it leads to"
            else:
                why = f"{reply.status} {reply.reason} {content.decode(errors='replace')}"
            if reply.status < 500 and reply.status not in (408, 409, 429):
                break    # to ask again would not help
        except (OSError, ValueError, LookupError, TypeError, RecursionError,
                http.client.HTTPException) as e:
            why = f"{type(e).__name__}: {e}"    # cut off, or no such reply
        if attempt < 4:
            time.sleep(2 ** attempt)
    why = " ".join(masked(why, key).split())[:300]    # masked first: no part of the key is left
    raise InputError(
        f"the judge at {args.judge} fails ({why}); its key is read from "
        "OPENAI_API_KEY. What it has rated is kept: go on with the same command")


def masked(text, key):
    """The text without the key, which an endpoint may repeat."""
    return text.replace(key, "***") if key else text


def read_reply(content, is_choice):
    """{rating: 0..5 or None, reply, tokens: [in, out]} of the bytes that an endpoint sends.

    Of a choice the rating is whether the answer names the right one, or None. Token counts that
    make no sense are 0."""
    if len(content) > MAX_REPLY:
        raise ValueError(f"a reply of over {MAX_REPLY} bytes")
    reply = json.loads(content, parse_int=float)    # int refuses thousands of digits
    text = reply["choices"][0]["message"]["content"]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise TypeError("its content is no text")
    text = text.encode(errors="replace").decode()    # half a surrogate pair cannot be written

    usage = reply.get("usage")
    tokens = [0, 0]
    for i, kind in enumerate(("prompt_tokens", "completion_tokens")):
        count = usage.get(kind) if isinstance(usage, dict) else None
        if isinstance(count, float) and 0 <= count < 1e9:
            tokens[i] = int(count)
    read = read_verdict if is_choice else read_rating
    return {"rating": read(text), "reply": text, "tokens": tokens}


def read_verdict(text):
    found = re.match(r"\W*(yes|no)\b", text, re.I)
    return found[1].lower() == "yes" if found else None


def read_rating(text):
    # One way to match: in `rating\W*?:\W*(\d+)` a reply of colons would take hours.
    found = re.findall(r"rating(\W+)(\d+)(?![.,]?\d)", text, re.I)
    numbers = [number for marks, number in found if ":" in marks]
    if numbers and re.fullmatch("0*[0-5]", numbers[-1]):
        return int(numbers[-1][-1])
    return None


def report(args, model, answers, ratings, skipped, normalise):
    """Measures the answers and prints a table and a JSON line."""
    too_long = sum(isinstance(reason, TooLong) for reason in skipped)
    skipped = {f"over {MAX_SECONDS:.0f} s": too_long, "unusable": len(skipped) - too_long}
    lines = [answers[i] for i in sorted(answers)]
    said = {i: line["rating"] for i, line in ratings.items()}
    if args.lmms_eval:
        for line in lines:
            if line["row"] in said and not line.get("choices"):
                said[line["row"]] = lmms_rating(line["task"], ratings[line["row"]]["reply"])
    results = measure(lines, said, normalise, args.lmms_eval)

    print(f"{'task':20}{'metric':17}{'rows':>7}{'value':>9}   95 % interval")
    for result in results:
        scale = 1 if result["metric"] == "rating" else 100
        value = "-"
        bounds = ""
        if result["rows"]:
            value = f"{scale * result['value']:.2f}"
            bounds = f"{scale * result['low']:.2f} to {scale * result['high']:.2f}"
        print(f"{result['task']:20}{result['metric']:17}{result['rows']:7}{value:>9}   "
              f"{bounds:18}{result['note']}".rstrip())
    print("skipped: " + ", ".join(f"{n} {why}" for why, n in skipped.items()))

    tokens = [sum(line["tokens"][k] for line in ratings.values()) for k in (0, 1)]
    if ratings:
        cost = ""
        if args.judge_price:
            cost = f", cost {np.dot(tokens, args.judge_price) / 1e6:.4f}"
        print(f"judge: {tokens[0]} tokens in, {tokens[1]} out{cost}")
    print(json.dumps({
        "model": model, "data": args.data, "lmms_eval": args.lmms_eval, "skipped": skipped,
        "judge_tokens": tokens, "results": results}))


# --------------------------------------------------------------------------------------------------
# show

def show(args):
    """What each head reconstructs beside what its teacher hears, as a picture (figure 4).

    unexplained: a loss over that of the best constant answer; 0 is the teacher itself.
    recall: of the frames and bins where the teacher hears a pitch (contour above 0.3), the share
    where the head does."""
    figure = need("matplotlib.figure", "matplotlib")
    wave, rate = read_clip(args.clip, args.start, args.end)
    sound_names = read_sound_names(args.sound_names) if args.sound_names else []
    checkpoint = latest_checkpoint(args.model)
    coat, experts, heads = load_heads(args, checkpoint, device_of(args, checkpoint))

    row = {"wave": wave, "rate": rate, "prompt": args.question, "response": ""}
    batch = batch_with_waves(coat, experts, [row])
    if batch["skipped"]:
        raise batch["skipped"][0]
    fig = figure.Figure(figsize=(9, 2.4 * len(heads)), dpi=80, layout="constrained")
    axes = fig.subplots(len(heads), 2, squeeze=False)
    told = {"clip": args.clip, "model": args.model, "unexplained": {}, "drawn": {}}
    with torch.no_grad():
        think_states, valid, targets = states_and_targets(coat, experts, batch)
        for task, (left, right) in zip(heads, axes):
            expert = experts.get(task)
            z_hat = heads[task](think_states, valid)[0]    # (L, E)
            z = targets[task][0]
            draw(left, right, *pictures(task, z_hat, z, expert, sound_names), len(wave) / rate)
            measured = []
            for term, loss in heads(think_states, valid, {task: targets[task]}).items():
                told["unexplained"][term] = loss.item() / int(batch["n_audio"])
                measured.append(f"{term}: {told['unexplained'][term]:.2f} unexplained")
            if task == "pitch":
                told["pitch_recall"] = recall = pitch_recall(z_hat, z, expert)
                measured.append("no pitch" if recall is None else f"recall {recall:.2f}")
            told["drawn"][task] = DRAWN.get(task, "features")
            if task == "affect" and expert.readout:
                told["drawn"][task] = "the emotions, probabilities"
            title = f"{task}: {told['drawn'][task]}\n{', '.join(measured)}"
            left.set_title(title, fontsize=9, loc="left")    # its first line is as wide as both
            right.set_title(type(expert).__name__ if expert else "the audio tower", fontsize=9)
    fig.savefig(args.out, format="png")
    print("unexplained: share of the best constant answer's loss; 0 is the teacher itself")
    print(json.dumps(told | {"picture": args.out}))


def pitch_recall(z_hat, z, expert):
    """Of the (frame, bin) pairs where the teacher's contour is above CONTOUR_ON, the share where
    the student's is; None if there is none. A head that collapses to all zero has 0 (3.3.2)."""
    on = expert.readout(z).sigmoid() > CONTOUR_ON    # (L, 264)
    if not on.any():
        return None
    return (expert.readout(z_hat).sigmoid() > CONTOUR_ON)[on].float().mean().item()


def read_sound_names(path):
    """Names of the 527 events in AudioSet's table. Raises InputError if it is another table."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            names = [row.get("display_name") for row in csv.DictReader(file)]
    except (UnicodeError, csv.Error):
        names = []
    if len(names) != 527 or None in names:
        raise InputError(f"'{path}' has no 527 rows with a display_name; give AudioSet's own table")
    return names


def run_flags(path, kinds):
    """The flags in config.json of a run. kinds: {flag: type, or types}. Raises InputError."""
    flags = read_json(path, NEEDS_RUN, flags=dict)["flags"]
    check_kinds(flags, f"'{path}'", NEEDS_RUN, kinds)
    return flags


def head_flags(path):
    """The flags of a run that its heads follow from. Raises InputError."""
    kinds = {"random_teachers": bool, "head": str, "head_width": (int, type(None)),
             "focal_gamma": (int, float)}
    kinds |= {f"teacher_{name}": (str, type(None)) for name in EXPERTS}
    return run_flags(path, kinds)


def load_heads(args, checkpoint, device):
    """(CoAT, {task: teacher}, ExpertHeads) of a run as it was trained. Raises InputError."""
    flags = head_flags(os.path.join(checkpoint, "..", "config.json"))
    saved = os.path.join(checkpoint, "heads.safetensors")
    if not os.path.isfile(saved):
        raise InputError(f"no '{saved}'; {NEEDS_RUN}")
    try:
        weights = safetensors.torch.load_file(saved, device=str(device))
    except safetensors.SafetensorError as e:
        raise InputError(f"'{saved}' is damaged ({e}); {NEEDS_RUN}") from e

    names = {key.split(".")[0] for key in weights}    # of "recon.out.weight"
    tasks = [task for task in ("recon", *EXPERTS) if task in names]
    if not tasks:
        raise InputError(f"'{args.model}' was trained without experts; there is no head to show")
    experts = {}
    random = args.random_teachers or flags["random_teachers"]
    for task in tasks:
        if task != "recon":
            path = getattr(args, f"teacher_{task}") or flags[f"teacher_{task}"]
            experts[task] = load(task, path, device, random)
    coat = load_coat(adapter=checkpoint, model_path=args.model_path, device=device).merge()
    d = coat.hf.config.get_text_config().hidden_size
    try:
        heads = heads_for(d, tasks, experts, kind=flags["head"], width=flags["head_width"],
                          focal_gamma=flags["focal_gamma"]).to(device)
        heads.load_state_dict(weights)    # with the scales of the losses
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("a weight is not finite")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"'{saved}' is damaged, or not of its run ({reason}); {NEEDS_RUN}") from e
    return coat, experts, heads


def batch_with_waves(coat, experts, rows):
    """Loaded rows -> a batch as in training, with what the teachers hear; see collate."""
    rates = {expert.sample_rate for expert in experts.values()}
    return to_device(collate(rows, coat.spec, rates, coat.think), coat.hf.device)


def states_and_targets(coat, experts, batch):
    """What the heads read (B, L, D), which of it is real (B, L), and {task: z_k (B, L, E)}."""
    out = coat(batch)
    targets = teacher_targets(experts, batch) | {"recon": out.audio_embeds.float()}
    return out.think_states.float(), out.valid, targets


def pictures(name, z_hat, z, expert, sound_names):
    """(student (K, L), teacher (K, L), {row: its name}) of features (L, E), as figure 4 shows them.

    sound   the ten events that the teacher hears most
    affect  the emotions, where the teacher's file has a head for them
    pitch   the contour, the strongest third of each semitone
    others  the 64 dimensions that vary most"""
    if name == "affect" and expert and expert.readout:
        emotions = dict(enumerate(expert.EMOTIONS))
        return expert.readout(z_hat).softmax(1).T, expert.readout(z).softmax(1).T, emotions
    if name in ("sound", "pitch"):
        z_hat = expert.readout(z_hat).sigmoid()
        z = expert.readout(z).sigmoid()
    if name == "pitch":
        z_hat = z_hat.unflatten(1, (88, 3)).amax(2)    # (L, 88) semitones from A0
        z = z.unflatten(1, (88, 3)).amax(2)
        return z_hat.T, z.T, {12 * octave: f"A{octave}" for octave in range(1, 7)}
    rows = {}
    if name == "sound":
        top = z.amax(0).topk(10).indices.flip(0)
        for row, event in enumerate(top.tolist()):
            rows[row] = sound_names[event] if sound_names else f"event {event}"
    else:
        top = z.var(0).topk(min(64, z.shape[1])).indices
    return z_hat.T[top], z.T[top], rows


def draw(left, right, student, teacher, rows, seconds):
    """Two of the `pictures` side by side, in the same colours."""
    if rows:    # probabilities
        low = 0
        high = teacher.max().item()
    else:
        low, high = teacher.quantile(torch.tensor([0.01, 0.99], device=teacher.device)).tolist()
    for axis, image in ((left, student), (right, teacher)):
        axis.imshow(
            image.cpu().numpy(), aspect="auto", origin="lower", interpolation="nearest",
            vmin=low, vmax=high, extent=(0, seconds, -0.5, len(image) - 0.5))
        axis.set_yticks(list(rows), rows.values())
        axis.set_xlabel("s")
    right.tick_params(labelleft=False)


# --------------------------------------------------------------------------------------------------
# frames: do the heads follow the sound?

def frames(args):
    """How much of their teachers the heads reconstruct: of clips as a whole, and of their course.

    clips: of each clip its mean feature. course: of each frame what that mean leaves. What all
    clips have in common at a frame's place is taken away from both, in student and teacher.
    Squared errors over the teacher's variance: 0 is the teacher; 1 knows nothing of the clip.
    recall: as in `show`, a mean over the clips in which the teacher hears a pitch."""
    source = open_source(args.data)    # before the model, which takes its time
    checkpoint = latest_checkpoint(args.model)
    coat, experts, heads = load_heads(args, checkpoint, device_of(args, checkpoint))
    students, teachers = reconstruct(coat, experts, heads, source, args.batch)
    n_clips = len(next(iter(students.values())))
    used = f"{n_clips} of {len(source)} rows have audio that can be used"
    if n_clips < 2:
        raise InputError(f"{used}; give two or more")

    results = {}
    print(f"{used}\n"
          "unexplained: share of the variance that a head misses\n"
          f"{'':8}{'clips':>8}{'course':>8}")
    for task in heads:
        clips, course = unexplained(students[task], teachers[task])
        results[task] = {"clips": clips, "course": course}
        line = f"{task:8}{clips:8.2f}{course:8.2f}"
        if task == "pitch":
            recalls = [pitch_recall(z_hat, z, experts[task])
                       for z_hat, z in zip(students[task], teachers[task])]
            heard = [recall for recall in recalls if recall is not None]
            results[task]["recall"] = recall = float(np.mean(heard)) if heard else None
            line += "   no pitch" if recall is None else f"   recall {recall:.2f}"
        print(line)
    print(json.dumps({"model": args.model, "data": args.data, "clips": n_clips,
                      "results": results}))


@torch.no_grad()
def reconstruct(coat, experts, heads, source, batch_size):
    """({task: [(L, E)]} of the heads, the same of their teachers): the features of each clip that
    can be used; the others are named."""
    usable = rows_with_audio(source)
    students = {task: [] for task in heads}
    teachers = {task: [] for task in heads}
    for start in range(0, len(usable), batch_size):
        rows = [Rows(source)[i] for i in usable[start:start + batch_size]]
        batch = batch_with_waves(coat, experts, rows)
        for reason in batch["skipped"]:
            print(f"skipped: {reason}")
        if not batch["rows"]:
            continue
        think_states, valid, targets = states_and_targets(coat, experts, batch)
        for task, head in heads.items():
            z_hat = head(think_states, valid)    # (B, L, E)
            for b, n_audio in enumerate(batch["n_audio"].tolist()):
                students[task].append(z_hat[b, :n_audio])
                teachers[task].append(targets[task][b, :n_audio])
    return students, teachers


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
    need("sklearn", "scikit-learn")
    figure = need("matplotlib.figure", "matplotlib") if args.plot else None
    device = device_of(args, *args.models)
    source = open_source(args.data)
    usable = rows_with_audio(source)
    print(f"{len(usable)} of {len(source)} rows have audio that can be used")
    print("think: mean of the thinking states; pre-gen: state before the answer, at which token\n"
          "rho: Spearman's, between the probe's confidence in the true label and right answers")
    print(f"{'model':30}{'step':>7}{'think':>16}{'rho':>7}{'pre-gen':>16}{'rho':>7}  {'at':9}"
          f"{'answers':>9}")

    results = []
    for name in args.models:
        steps = [] if name in BACKBONES else checkpoint_steps(name)
        for step in steps or [None]:
            folder = os.path.join(name, f"checkpoint-{step}") if step else name
            coat = load_model(folder, device, args.model_path)
            labels, found = probe_model(coat, source, usable, args)
            result = {"model": name, "step": step, "rows": len(labels)} | found
            results.append(result)
            cells = "".join(probe_cells(result.get(position)) for position in ("think", "pre-gen"))
            at = result["pre-gen"]["at"]
            print(f"{name:30}{step or '-':>7}{cells}  {at:9}{result['answers']:9.1%}")
    print(json.dumps({
        "data": args.data, "label": args.label, "labels": Counter(labels), "results": results}))
    if args.plot:
        plot_probes(figure, results, args)


def probe_cells(found):
    accuracy = "-"
    rho = "-"
    if found:
        accuracy = f"{found['accuracy']:8.1%} +- {found['deviation']:4.1%}"
        if found["rho"] is not None:
            rho = f"{found['rho']:.2f}"
    return f"{accuracy:>16}{rho:>7}"


def probe_model(coat, source, usable, args):
    """([label of a row], {"answers": share of right ones, position: {accuracy, deviation, rho}, and
    of pre-gen the token "at" which it is}).
    Raises InputError if no probe can be trained on these rows."""
    from scipy.stats import spearmanr
    labels = []
    groups = []
    states = {}
    right = []
    tasks = set()
    for batch in longest_first(coat, source, usable, args, [], coat.think):
        for row in batch["rows"]:
            labels.append(label_of(row, args.label))
            # What stays on one side of a split: a voice would give the label away.
            known = row.get("speaker") or row.get("recording") or row.get("audio")
            groups.append(str(known) if known else row["row"])
            tasks.add(row["task"])
        if len(tasks) > 1 and not args.label:
            raise InputError("these rows are of several tasks; give rows of one, or --label KEY")
        for position, x in probe_states(coat, batch, args.pre_gen).items():
            states.setdefault(position, []).append(x)
        texts = coat.generate(batch, args.max_new_tokens)
        right += [is_right(row, text) for row, text in zip(batch["rows"], texts)]

    counts = Counter(label for _, label in set(zip(groups, labels)))
    if len(counts) < 2 or min(counts.values()) < 5:
        raise InputError(
            f"five folds need two labels, each in five recordings; there are {dict(counts)}")
    found = {"answers": float(np.mean(right))}
    for position, x in states.items():
        accuracy, confidence = linear_probe(np.concatenate(x), np.array(labels), groups)
        rho = None    # where all answers are right, or none is
        if len(set(right)) == 2:
            rho = float(spearmanr(confidence, right).statistic)
        deviation = float(np.std(accuracy, ddof=1))
        found[position] = {
            "accuracy": float(np.mean(accuracy)), "deviation": deviation, "rho": rho}
    found["pre-gen"]["at"] = "end token" if coat.think else args.pre_gen
    return labels, found


def label_of(row, key):
    """What the manifest says at `key`, else the choice that the response names, else the response.
    Raises InputError."""
    if key and row.get(key) in (None, ""):
        raise InputError(
            f"row {row['row']} has no \"{key}\"; give --label another key of the manifest")
    if key:
        return str(row[key])
    return parse_choice(row["response"], row.get("choices") or []) or row["response"]


@torch.no_grad()
def probe_states(coat, batch, pre_gen="last-user"):
    """{position: (B, D)}: the mean of the thinking states, and the state before the answer.

    The latter is that of the block's end token. pre_gen: where it is without a block, "last-user",
    the last input token before the assistant turn (section 4.4), or "last", that of the prompt,
    from which the answer's first token comes."""
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

    x (n, D) states; logistic regression on standardised dimensions, scikit-learn's own settings
    (L2, C = 1)."""
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


def plot_probes(figure, results, args):
    """Accuracy over the checkpoints of each run, a level line for other models (figure 3)."""
    fig = figure.Figure(figsize=(8, 3.2), dpi=90, layout="constrained")
    left, right = fig.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(result["model"] for result in results))
    for axis, position in ((left, "think"), (right, "pre-gen")):
        for i, name in enumerate(names):
            found = [r for r in results if r["model"] == name and position in r]
            steps = [r["step"] for r in found]
            accuracy = [r[position]["accuracy"] for r in found]
            deviation = [r[position]["deviation"] for r in found]
            line = {"color": f"C{i}", "label": name}
            if found and steps[0]:
                axis.errorbar(steps, accuracy, deviation, marker=".", elinewidth=0.6, **line)
            elif found:
                axis.axhline(accuracy[0], **line)
        axis.set_xlabel("step")
    left.set_title("mean of the thinking states", fontsize=10)
    tokens = dict.fromkeys(result["pre-gen"]["at"] for result in results)
    right.set_title(f"pre-gen: state at {' or '.join(tokens)}", fontsize=10)
    right.legend(fontsize=8)
    left.set_ylabel(f"accuracy of the probe, {args.data}", fontsize=8)
    fig.savefig(args.plot, format="png")


# --------------------------------------------------------------------------------------------------
# compare: does the block help?

RESULT = dict(arm=str, data=str, seed=int, task=str, rows=int, accuracy=(int, float))


def compare(args):
    """Accuracy of runs by what they were trained with, over seeds (table 4).

    With 95 % intervals by Student's t over the seeds, and the difference to the first of these
    arms over the seeds that both have. A run folder counts with its heldout.json, see train.py
    --heldout, a predictions file of `score` with its answers."""
    need("scipy", "scikit-learn")
    figure = need("matplotlib.figure", "matplotlib") if args.plot else None
    found = {}    # {(data, task): {arm: {seed: result}}}
    for path in args.runs:
        for result in results_of(path):
            arms = found.setdefault((result["data"], result["task"]), {})
            seeds = arms.setdefault(result["arm"], {})
            if result["seed"] in seeds:
                raise InputError(f"'{path}': \"{result['arm']}\" with {result['data']} and seed "
                                 f"{result['seed']} comes twice; leave one out")
            seeds[result["seed"]] = result
    if args.out:
        results = [result for arms in found.values() for seeds in arms.values()
                   for result in seeds.values()]
        write_file(args.out, "".join(json.dumps(result) + "\n" for result in results))

    first = next(iter(next(iter(found.values()))))    # arm
    means = {}
    print(f"{'data':16}{'question':12}{'arm':32}{'seeds':>6}{'accuracy, %':>16}{'difference':>16}")
    for (data, task), arms in found.items():
        base = arms.get(first, {})
        for arm, seeds in arms.items():
            values = {seed: 100 * result["accuracy"] for seed, result in seeds.items()}
            mean = mean_interval(list(values.values()))
            paired = [values[seed] - 100 * base[seed]["accuracy"] for seed in values
                      if seed in base]
            difference = ""
            if arm != first and paired:
                difference = plus_minus(*mean_interval(paired), sign="+")
            print(f"{data:16}{task:12}{arm:32}{len(seeds):6}{plus_minus(*mean):>16}"
                  f"{difference:>16}".rstrip())
            means[data, task, arm] = mean
    if args.plot:
        plot_arms(figure, means, args.plot)


def plus_minus(mean, half, sign=""):
    interval = "" if math.isnan(half) else f" +- {half:.1f}"
    return f"{mean:{sign}.1f}{interval}"


def mean_interval(values):
    """(mean, half of its 95 % interval by Student's t); of one value alone that half is not known,
    nan."""
    from scipy.stats import t
    half = math.nan
    if len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half)


def results_of(path):
    """[what RESULT says], one a kind of question, of a run folder, a predictions file or a file
    that --out wrote. Raises InputError."""
    if os.path.isdir(path):
        return results_of_run(path)
    with open(path, "rb") as file:
        lines = [parse_line(text) for text in file.read().rpartition(b"\n")[0].split(b"\n")]
    if isinstance(lines[0], dict) and isinstance(lines[0].get("run"), dict):
        return results_of_predictions(path, lines[0]["run"], lines[1:])
    for number, result in enumerate(lines, 1):
        remedy = "give folders of runs, predictions, or a file that --out wrote"
        if not isinstance(result, dict):
            raise InputError(f"'{path}', line {number}, is no result; {remedy}")
        check_kinds(result, f"'{path}', line {number},", remedy, RESULT)
    return lines


def results_of_run(run):
    """Of its heldout.json, which may be wanting where a run has another source than tones."""
    known = known_of_run(run)
    path = os.path.join(run, "heldout.json")
    heldout = read_json(path, "train with tones and --heldout, or give a file of infer.py score")
    results = []
    for task, shares in heldout.items():
        if not isinstance(shares, dict) or not isinstance(shares.get("heard"), float):
            raise InputError(f"'{path}' is damaged; {NEEDS_RUN}")
        rows = known["flags"]["heldout"]
        results.append(known["result"] | {"task": task, "rows": rows, "accuracy": shares["heard"]})
    return results


def results_of_predictions(path, run, lines):
    """Of answers that are right or wrong; transcripts and captions are not."""
    known = known_of_run(os.path.dirname(str(run.get("model"))))
    result = known["result"]
    if run.get("think") is not True and not known["flags"]["no_think"]:
        result["arm"] += ", asked without the block"
    right = {}    # {task: [is the answer right?]}
    for number, line in enumerate(lines, 2):
        if not is_prediction(line, math.inf):
            raise InputError(f"'{path}', line {number} is damaged; score anew into another --out")
        if "answer" in line and (line["task"] not in ("asr", *JUDGED) or line.get("choices")):
            right.setdefault(line["task"], []).append(is_right(line, line["answer"]))
    if not right:
        raise InputError(f"'{path}' has no answers that are right or wrong; see infer.py score")
    return [result | {"task": task, "rows": len(found), "accuracy": sum(found) / len(found)}
            for task, found in right.items()]


def known_of_run(run):
    """{"flags" of a run, "result": what RESULT says and follows from them}. Raises InputError."""
    number = (int, float)
    flags = run_flags(os.path.join(run, "config.json"), dict(
        no_think=bool, stage=list, head=str, w_pitch_aux=number, focal_gamma=number, data=str,
        seed=int, heldout=int))
    result = {"arm": arm_of(flags), "data": data_of(flags), "seed": flags["seed"]}
    return {"flags": flags, "result": result}


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
    if "pitch" in names and flags["w_pitch_aux"] != 1:
        arm += f", w_aux {flags['w_pitch_aux']:g}"
    if "pitch" in names and flags["focal_gamma"] != 2:
        arm += f", gamma {flags['focal_gamma']:g}"
    return arm


def data_of(flags):
    """The rows of a run, without the seed of the run at the end of their name."""
    name = os.path.splitext(os.path.basename(flags["data"]))[0]
    return name.removesuffix(f"-{flags['seed']}")


def plot_arms(figure, means, path):
    """Accuracy against the number at the end of the name of the data, one picture a question."""
    lines = {}    # {task: {arm: [(number, mean, half)]}}
    for (data, task, arm), (mean, half) in means.items():
        number = re.search(r"(\d+)$", data)
        if number:
            lines.setdefault(task, {}).setdefault(arm, []).append((int(number[1]), mean, half))
    if not lines:
        raise InputError("--plot needs data whose names end in numbers, such as tones:note:28")
    fig = figure.Figure(figsize=(1 + 4 * len(lines), 3.5), dpi=90, layout="constrained")
    arms = list(dict.fromkeys(arm for _, _, arm in means))
    drawn = {}    # {arm: its line}
    for axis, task in zip(fig.subplots(1, len(lines), squeeze=False)[0], lines):
        for arm, points in lines[task].items():
            k = arms.index(arm)
            numbers, values, halves = np.transpose(sorted(points))
            apart = 1.04 ** k    # so that intervals do not hide each other
            drawn[arm] = axis.errorbar(numbers * apart, values, halves, marker="o", markersize=3,
                                       color=f"C{k}")
        ticks = sorted({number for points in lines[task].values() for number, _, _ in points})
        axis.set(xscale="log", xlabel="labelled clips", ylabel="right answers, %", title=task)
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    fig.legend(drawn.values(), drawn, loc="outside lower center", ncols=3, fontsize=8)
    fig.savefig(path, format="png")


# --------------------------------------------------------------------------------------------------
# merge

def merge(args):
    """A plain transformers folder, whole or not at all.

    In bf16 on a GPU and fp32 on a CPU, as `ask` computes there."""
    out = os.path.abspath(args.out)
    part = out + ".tmp"
    try:
        os.makedirs(part)    # before all else: of two at once, one gets it
    except FileExistsError as e:
        raise InputError(f"'{part}' is there: another merge is writing it, or one was killed; wait "
                         "for it, or delete it if none runs") from e
    try:
        if os.path.exists(out):
            raise InputError(
                f"'{out}' is there already; delete it, or give the name of a new folder")
        coat = load_model(args.model, device_of(args), args.model_path)
        coat.save(part)
        publish(part, out)
    except BaseException as e:    # Ctrl-C too
        shutil.rmtree(part)
        if isinstance(e, safetensors.SafetensorError):
            raise InputError(f"cannot write '{out}' ({e}); make room on its disk") from e
        raise
    size = sum(os.path.getsize(os.path.join(out, name)) for name in os.listdir(out))
    unit, name = (2 ** 30, "GiB") if size >= 2 ** 30 else (2 ** 20, "MiB")
    how = " README.md shows how to use it without this code; or:" if coat.think else ""
    print(f"{out}: {size / unit:.2f} {name}, {coat.hf.dtype}.{how}\n"
          f"  python infer.py ask {out} CLIP \"question\"")


# --------------------------------------------------------------------------------------------------
# The command line

def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run, add_flags in (
            (ask, ask_flags), (score, score_flags), (show, show_flags), (frames, frames_flags),
            (probe, probe_flags), (compare, compare_flags), (merge, merge_flags)):
        p = commands.add_parser(
            run.__name__, help=run.__doc__.splitlines()[0], description=run.__doc__,
            usage="%(prog)s [flags], see %(prog)s --help")
        p.set_defaults(run=run)
        add_flags(p.add_argument)
    return parser


def model_flags(add, name="model", nargs=None):
    names = ", ".join(BACKBONES)
    add(name, nargs=nargs, help=f"run or checkpoint folder, merged folder, or one of {names}")
    add("--model-path", help="a local folder with the backbone, or NAME@REVISION of the hub")
    add("--device", help="cpu or cuda; None: the GPU, or for tiny and small else the CPU")


def segment_flags(add):
    add("--start", type=real(0, 10 ** 6), help="seconds into the file")
    add("--end", type=real(0, 10 ** 6), help="seconds into the file")


def answer_flags(add):
    add("--no-think", action="store_true",
        help="leave the thinking block out (a model trained without it has none)")
    add("--text-think", nargs="?", const="", metavar="FOLDER",
        help="reason in text instead of the block; FOLDER: the think folder of Audio Flamingo 3, "
        "without it the prompt alone asks for it")
    add("--compile", action="store_true",
        help="faster decoding after a slow start (CoAT.compile_decode)")


def batch_flags(add):
    add("--batch", type=COUNT, default=16, help="rows at once (%(default)s)")
    add("--workers", type=WORKERS, default=2, help="data processes (%(default)s)")


def ask_flags(add):
    model_flags(add)
    add("clips", nargs="+", metavar="CLIP",
        help="audio files: wav, flac, ogg or mp3; a folder of them; rows.jsonl. After them stands "
        "the question, except for rows.jsonl, whose rows have their own")
    add("--question", action="append", help="instead of the one after the clips")
    segment_flags(add)
    answer_flags(add)
    batch_flags(add)
    add("--max-new-tokens", type=COUNT, default=128, help="(%(default)s)")
    add("--json", action="store_true",
        help="prints one JSON object a row, with token counts and, of a single one, times")
    add("--out", metavar="FILE", help="writes these objects, a line a row, into a new file")


def score_flags(add):
    model_flags(add)
    answer_flags(add)
    batch_flags(add)
    add("data", help="rows.jsonl, mixture.json or tones[:KINDS[:ROWS OF EACH]]")
    add("--out", help="predictions, a JSON line a row as they come (beside the run, or "
        "predictions-BACKBONE-DATA.jsonl here)")
    add("--max-new-tokens", type=COUNT, default=256,
        help="(%(default)s) the paper's table D: ClothoAQA 8; VocalSound, GTZAN, MELD, IEMOCAP 20; "
        "MMAU, MMAR 128; SPGISpeech, Switchboard 512; Alpaca-Audio, WavCaps 1024; VoxPopuli 2048; "
        "others 256")
    add("--normaliser", metavar="FILE",
        help="normalizer.json of a Whisper model: American spelling for WER")
    add("--judge", metavar="URL",
        help="an OpenAI-compatible endpoint such as https://api.openai.com/v1, to which questions, "
        "references and answers are sent; its key is read from OPENAI_API_KEY")
    add("--judge-choices", action="store_true",
        help="the judge also says, with a prompt of ours, whether answers to multiple-choice rows "
        "name the right one (the paper evaluates AF3-think so)")
    add("--judge-model", default="gpt-4o-2024-11-20", help="(%(default)s, the paper's)")
    add("--judge-price", metavar=("IN", "OUT"), nargs=2, type=real(0, 10 ** 6),
        help="of a million tokens")
    add("--lmms-eval", action="store_true",
        help="read choices and ratings as lmms-eval 0.7.3 does: the letter of a choice (so prompts "
        "must letter them), where there is none a random one; 0 for an unreadable rating")


def show_flags(add):
    model_flags(add)
    segment_flags(add)
    add("clip", help="audio file: wav, flac, ogg or mp3")
    add("--question", default="Describe the audio.", help="the block comes after it (%(default)s)")
    add("--out", default="show.png", help="(%(default)s)")
    teacher_flags(add)
    add("--sound-names", metavar="FILE", help="class_labels_indices.csv of AudioSet")


def teacher_flags(add):
    for name in EXPERTS:
        add(f"--teacher-{name}", metavar="FILE", help="its checkpoint, if not the one of the run")
    add("--random-teachers", action="store_true", help="as in train.py, for tests")


def frames_flags(add):
    model_flags(add)
    add("--data", required=True, help="rows with audio: a manifest, or tones[:KINDS[:ROWS OF "
        "EACH]]; all their features are kept in memory, so a hundred rows or so")
    add("--batch", type=COUNT, default=16, help="rows at once (%(default)s)")
    teacher_flags(add)


def probe_flags(add):
    model_flags(add, "models", "+")
    batch_flags(add)
    add("--data", required=True,
        help="labelled rows: a manifest, or tones[:KINDS[:ROWS OF EACH]]; rows with the same "
        "\"speaker\", else \"recording\", else audio stay on one side of a split")
    add("--label", metavar="KEY", help="any key of the manifest's rows, instead of the response")
    add("--pre-gen", choices=["last-user", "last"], default="last-user",
        help="where \"pre-gen\", the state before the answer, is taken in models without a block: "
        "at the last token before the assistant turn (%(default)s, the paper's) or of the prompt; "
        "with a block: at its end")
    add("--max-new-tokens", type=COUNT, default=20,
        help="of the model's own answers (%(default)s)")
    add("--plot", metavar="FILE", help="a picture")


def compare_flags(add):
    add("runs", nargs="+", help="folders of runs, predictions in them, or files that --out wrote; "
        "the first arm is the one that others are compared with")
    add("--out", metavar="FILE", help="also write the results, a JSON line a run and question")
    add("--plot", metavar="FILE", help="a picture: accuracy against the number at the end of the "
        "name of the data, such as 28 of tones:note:28")


def merge_flags(add):
    model_flags(add)
    add("out", help="folder to write")


def main():
    one_line_errors(ExpertUnavailable, less_memory="--batch 1")
    args = build_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
