"""Uses a trained model, or a backbone as it is.

    python infer.py ask runs/tiny assets/clips/guitar_chord.flac "Which note?"
    python infer.py score runs/tiny tones          # answers, and how good they are; again: goes on
    python infer.py score tiny tones --text-think  # tables 2 and F
    python infer.py score runs/mine mmau mmar librispeech-clean    # tables 1, 4 and 5
    python infer.py compare runs/*                 # arms over seeds (table 4)
    python infer.py probe tiny runs/tiny --data tones:note:200 --plot probe.png    # table 3
    python infer.py show runs/tiny assets/clips/guitar_chord.flac --out heads.png  # figure 4
    python infer.py frames runs/tiny --data tones:glide:100    # do the heads follow the sound?
    python infer.py merge runs/tiny merged

A model is a run or checkpoint folder of train.py, a folder that `merge` wrote, or the name of a
backbone. The thinking block is placed for a model that was trained with it, for no other. Rows are
a manifest, a benchmark by its name, or held-out synthetic tones; see data.py.
"""
import argparse
import functools
import json
import math
import os
import random
import re
import shutil
import string
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from model import (ASSETS, BACKBONES, COUNT, WORKERS, InputError, TooLong, checkpoint_steps,
                   latest_checkpoint, load_coat, load_text_think, one_line_errors, pad_rows,
                   read_json, to_device, usable_device, write_file)

import numpy as np
import safetensors.torch
import torch
from huggingface_hub.utils import http_backoff

from data import (Rows, collate, expert_targets, fingerprint, open_source, parse_row, read_audio,
                  usable_rows)
from experts import EXPERTS, load_experts
from heads import heads_for

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
        if name not in BACKBONES:
            raise InputError("--text-think FOLDER goes with the name of a backbone, not with a run")
        coat = load_text_think(name, args.text_think, args.model_path, device)
    else:
        coat = load_coat(name, args.model_path, device=device).merge()
    if getattr(args, "compile", False):
        coat.compile_decode()
    return coat


def prepare(rows, spec, think, text_think):
    """collate, without the responses. text_think: asks for reasoning in text after each prompt."""
    for row in rows:
        if text_think and isinstance(row, dict):
            row.setdefault("question", row["prompt"])
            row["prompt"] += spec.backbone.text_think
    return collate(rows, spec, think=think, responses=False)


def batches(coat, source, rows, args, skipped):
    """Yields batches on the device, the longest rows first: what does not fit in memory fails at
    once. Rows that cannot be used are printed and added to `skipped`."""
    rows = sorted(rows, key=lambda i: -source.lengths[i])
    text_think = getattr(args, "text_think", None) is not None
    think = coat.think and not text_think and not getattr(args, "no_think", False)
    loader = torch.utils.data.DataLoader(
        Rows(source), num_workers=args.workers,
        batch_sampler=[rows[i:i + args.batch] for i in range(0, len(rows), args.batch)],
        collate_fn=functools.partial(prepare, spec=coat.spec, think=think, text_think=text_think))
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

    def __init__(self, rows):
        self.rows = rows
        self.lengths = np.zeros(len(rows))    # so that the order stays

    def __len__(self):
        return len(self.rows)

    def load(self, i):
        row = dict(self.rows[i])
        if row["audio"] is not None:
            row["wave"], row["rate"] = read_audio(row["audio"], row.get("start"), row.get("end"))
        return row


def rows_to_ask(args):
    """The rows that `ask` is to answer. Raises InputError."""
    *clips, question = args.clips
    if question.endswith(".jsonl"):
        clips, question = args.clips, None
    rows = []
    for path in clips:
        if path.endswith(".jsonl"):
            for number, line in enumerate(open(path, "rb"), 1):
                row = parse_row(line, f"{path}, line {number}", answered=False)
                if row["audio"] is not None:
                    row["audio"] = os.path.join(os.path.dirname(path), row["audio"])
                rows.append(row)
            continue
        files = [path]
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in sorted(os.listdir(path))]
            files = [file for file in files if file.lower().endswith(AUDIO)]
        rows += [{"audio": file, "prompt": question, "response": "", "start": args.start,
                  "end": args.end} for file in files]
    is_file = question and (os.path.exists(question) or question.lower().endswith(AUDIO))
    if not rows or is_file or any(row["prompt"] != question for row in rows if question):
        raise InputError('give clips and, last, a question: infer.py ask MODEL CLIP "Which sound?"; '
                         "or rows.jsonl, whose rows have their own")
    return rows


def ask(args):
    """Questions, without answers to compare with: one answer a clip.

    CLIPS are audio files, folders of them, or manifests: a line is {"audio": .., "prompt": ..}. A
    clip that cannot be read is named, and the others are answered. Not supported: several clips in
    one question, several turns, video, URLs."""
    source = Asked(rows_to_ask(args))
    if len(source) == 1:
        source.load(0)    # raises before the model is loaded, which takes its time
    coat = load_model(args)
    for batch in batches(coat, source, range(len(source)), args, []):
        # Printed when it is whole, so that no warning comes in between.
        for i, text in enumerate(coat.generate(batch, args.max_new_tokens)):
            row = batch["rows"][i]
            if args.json:
                print(json.dumps({
                    "row": row["row"], "audio": row["audio"], "question": row["prompt"],
                    "answer": text, "n_audio": int(batch["n_audio"][i]),
                    "prompt_tokens": int(batch["attention_mask"][i].sum())}), flush=True)
            else:
                name = f"{row['audio'] or 'text'}: " if len(source) > 1 else ""
                print(name + text, flush=True)


# --------------------------------------------------------------------------------------------------
# score: how an answer is read

LETTERS = string.ascii_uppercase
QUOTES = str.maketrans("‘’‚‛`´“”„«»♯♭", "''''''\"\"\"\"\"#b")


def fold(text):
    """One form of what can be written in several: NFKC, straight quotes, nothing of no width."""
    text = unicodedata.normalize("NFKC", text.translate(QUOTES))
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def plain(text):
    """For comparison: no capitals, single spaces, no marks at the ends."""
    return " ".join(fold(text).casefold().split()).strip(" .,:;!?*\"'()[]。、")


def final_answer(text):
    """The answer in a text that reasons first: what follows </think>; in that the last
    <answer>..</answer> or \\boxed{..}; else what follows the last "the answer is"."""
    text = re.sub("<think>", " ", text.rpartition("</think>")[2].strip() or text)
    marked = (re.findall("<answer>(.*?)(?:</answer>|$)", text, re.S)
              or re.findall(r"\\boxed\s*{((?:[^{}]|{[^{}]*})*)}", text))
    after = re.split(r"\banswer(?:\s+is\b|\s*:)", text, flags=re.I)[-1]
    return (marked[-1] if marked else after.strip(" :*\n") or text).strip()


# A capital stands for a choice where one of these follows: "A dog barks" does not name choice A.
AFTER = (r"(?=\s*(?:$|[.,;:!?)\]/\n=\"-]|[\u2e80-\uffff])|\s+(?:is|was|or|and|seems?|fits|matches"
         r"|because|since|as|would|sounds|to me)\b)")
LETTER = re.compile(rf"(?<![A-Za-z0-9'&.-])(?:[(\[]([A-Za-z])[)\]]|([A-Z]){AFTER}"
                    r"|(?i:option|choice|letter)\s+[(\"']*([A-Z])(?![A-Za-z0-9]))")
FIRST_LETTER = re.compile(rf"[(\[]*([A-Za-z])[)\].:]+(?=\s|$)|([A-Z]){AFTER}")
TWO_LETTERS = re.compile(r"\s*(?:(?:or\b|/)\W*(?:\w+ )?|(?:and\b|,)\W*)[A-Z]\b")
# What denies a choice, before it in its clause or right after it.
DENIED = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor|without|unlike|no|rather than|instead of)|n't)"
    r"(?:\s+(?!(?:but|and|however|so|doubt)\b)[\w\0]+){0,5}\s*[(\[\"']*$", re.I)
DENIED_AFTER = re.compile(
    r"[)\]\"']*\s+(?:(?:is|are|was|seems|would be|can be)\s+)?"
    r"(?:not|cannot|\w+n't|wrong|incorrect|ruled out|excluded|unlikely)\b", re.I)


def mentioned(text, choices):
    """{choice} that a text names by its words or its letter, and does not deny."""
    matches = []
    for choice in sorted(choices, key=len, reverse=True):    # what a longer one takes is gone
        phrase = re.escape(re.sub(r"^(?:an?|the)\s+", "", plain(choice)) or "\0")
        if not re.search("[\u2e80-\uffff]", phrase):    # a script with spaces between its words
            phrase = rf"(?<!\w){phrase}(?!\w)"
        matches += [(choice, match) for match in re.finditer(phrase, text, re.I)]
        text = re.sub(phrase, lambda match: "\0" * len(match[0]), text, flags=re.I)
    matches += [(choice, match) for match in LETTER.finditer(text)
                for choice in choices[LETTERS.index(match[match.lastindex].upper()):][:1]]
    return {choice for choice, match in matches if not DENIED.search(text[:match.start()])
            and not DENIED_AFTER.match(text[match.end():])}


def read_choice(answer, choices):
    """The choice that an answer names as a person would read it, or None where it names none, two,
    or denies the one it names.

    A line that is a choice, its letter or both counts before all that is mentioned; a letter that
    an answer begins with counts before what is said about it."""
    text = re.sub(r"\\text\w*{([^{}]*)}", r"\1", fold(final_answer(answer)))
    text = re.split(r"\bI(?:'d| would| will)? (?:choose|pick|select|say|go with)\b", text)[-1]
    text = re.sub(r"[*${}\\]+|^[#>\s]+(?=\w)|(?<!\w)_+|_+(?!\w)", "", text, flags=re.M).strip()
    names = {}
    for letter, choice in zip(LETTERS.lower(), choices):
        words = words_of(choice)
        names |= {letter: choice, f"{letter} {words}": choice, f"{words} {letter}": choice}
    names |= {plain(choice): choice for choice in choices}

    lines = [line for line in text.split("\n") if line.strip()]
    found = {names.get(plain(part), names.get(words_of(part)))
             for part in (text, *lines[:1], *lines[-1:])} - {None}
    first = FIRST_LETTER.match(text)
    if not found and first and first[first.lastindex].lower() in names:
        choice = names[first[first.lastindex].lower()]
        after = text[first.end():]
        others = "|".join(re.escape(plain(other)) for other in choices if other != choice)
        if TWO_LETTERS.match(after) or re.match(rf"(?:{others})(?!\w)", plain(after)):
            return None
        if not DENIED_AFTER.match(after):
            return choice
    found = found or mentioned(text, choices)
    return found.pop() if len(found) == 1 else None


def words_of(text):
    """Plain, and without the marks between its words."""
    return " ".join(re.sub(r"[().,:\[\]\"']|(?<=\s)-(?=\s)", " ", plain(text)).split())


def lmms_choice(answer, choices, rule):
    """The choice that lmms-eval 0.7.3 reads, None where it draws one at random: of the letters in
    brackets, else alone, else before a full stop, the one that stands alone last. "lmms-2", of MMAR
    and MMSU: a letter before a space will do, and in answers of over five words the last text."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    second = rule == "lmms-2"
    for form in ("({})", "{} " if second else " {} ", "{}."):
        found = [letter for letter in LETTERS[:len(choices)] if form.format(letter) in answer]
        if found:
            alone = form if second and form == "({})" else " {} "
            last = max(found, key=lambda letter: answer.rfind(alone.format(letter)))
            return choices[LETTERS.index(last)]
    found = [choice for choice in choices if choice.lower() in answer.lower()]
    if second and len(answer.split()) > 5:
        return max(found, key=lambda choice: answer.lower().rfind(choice.lower()), default=None)
    return None


def is_right(line):
    """Whether an answer is the response, or names the choice that the response names."""
    if not line.get("choices"):
        return plain(final_answer(line["answer"])) == plain(line["response"])
    right = read_choice(line["response"], line["choices"])
    return right is not None and read_choice(line["answer"], line["choices"]) == right


# --------------------------------------------------------------------------------------------------
# score: the words of a transcript

# Scripts that put no space between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
                      "\uf900-\ufaff\U00020000-\U0003ffff]")
QUOTED = r"['\"](?P<text>.+?)['\"]"
TRANSCRIPT = (    # where lmms-eval finds one in an answer about VoxPopuli; the first that matches
    *(rf"<{tag}>\s*(?P<text>.*?)\s*</{tag}>"
      for tag in ("answer", "response", "result", "transcription", "text")),
    rf"original\s+content\s+(of\s+)?(this\s+)?audio\s+is\s*:\s*{QUOTED}\s*$",
    rf"(audio|speech)\s+(content|transcription|says)\s*:\s*{QUOTED}\s*$",
    rf"transcription\s*:\s*{QUOTED}\s*$", f"^{QUOTED}$", r"['\"](?P<text>[^'\"]{20,})['\"]",
    r"^((here\s+is\s+)?(the\s+)?transcription\s*:\s*)?"
    r"((the\s+)?(audio|speech)\s+(says|contains)\s*:\s*)?"
    r"((answer|response|result)\s*:\s*)?(?P<text>.*)")


@functools.cache
def normalisers():
    """(Whisper's English normaliser with American spellings, its basic one)"""
    from transformers.models.whisper import english_normalizer as whisper
    spellings = read_json(os.path.join(ASSETS, "english_spellings.json"))
    return whisper.EnglishTextNormalizer(spellings), whisper.BasicTextNormalizer()


def is_english(line):
    """By "language", or without it by the letters of the reference."""
    if line.get("language"):
        return line["language"].lower().startswith("en")
    return all("LATIN" in unicodedata.name(c, "") for c in line["response"] if c.isalpha())


def words_heard(text, line, rule):
    """[word] that are counted, in a script without spaces [character].

    rule    "ours": English by Whisper's normaliser, of other languages capitals and marks go (its
            basic one would take the vowel signs of Hindi); or lmms-eval's, see data.BENCHMARKS"""
    english, basic = normalisers()
    text = re.sub(r"<\|.*?\|>|<(?:MUSIC|NOISE|SIL|OTHER)>", " ", text)    # appendix B
    if rule == "rows":
        return text.lower().split()
    if rule == "ours":
        text = fold(text)
        if is_english(line):
            return english(text).split()
        text = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text.casefold())
        return UNSPACED.sub(r" \g<0> ", text).split()
    text = english(re.sub(" ?([!,.?;:])", r"\1", re.sub(r"\s+", " ", text)).lstrip(" "))
    text = basic(text) if rule == "whisper+basic" else text
    return [word for word in text.lower().split()
            if any(unicodedata.category(c)[0] != "P" for c in word)]


def word_errors(line, rule):
    """(wrong, missing and surplus words, words of the reference), None for an empty reference."""
    import jiwer
    heard = line["answer"]
    if rule == "rows":
        found = (re.search(pattern, heard.strip(), re.I | re.S) for pattern in TRANSCRIPT)
        heard = next(filter(None, found))["text"].strip()
    if not re.sub("<(MUSIC|NOISE|SIL|OTHER)>", "", line["response"]).strip():    # appendix B
        return None
    reference, heard = words_heard(line["response"], line, rule), words_heard(heard, line, rule)
    if not reference:    # only fillers such as "uh": all that is heard is wrong
        return len(heard), 0
    found = jiwer.process_words(" ".join(reference), " ".join(heard))
    missed = found.substitutions + found.deletions
    wrong, n = missed + found.insertions, missed + found.hits
    return (wrong / n, 1) if rule == "rows" else (wrong, n)    # "rows": each weighs alike


# --------------------------------------------------------------------------------------------------
# score: measures

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


def scores_of(line, rating, draws):
    """Yields (metric, rule, counts) of an answer; counts (x, n) are summed over the rows, None leaves
    the row out. The first rule of a benchmark is lmms-eval's, whose results the paper's tables show.

    rating  what the judge says: of the JUDGED 0..5, of choices whether it is the right one
    draws   random.Random for choices that lmms-eval cannot read"""
    choices = line.get("choices")
    if line["task"] == "asr":
        unit = "CER" if UNSPACED.search(line["response"]) else "WER"
        for rule in [line["wer"], "ours"] if "wer" in line else ["ours"]:
            yield unit, rule, word_errors(line, rule)
    elif choices:
        right = read_choice(line["response"], choices)
        if "rule" in line:
            said = lmms_choice(line["answer"], choices, line["rule"])
            said = draws.choice(choices) if said is None else said
            yield "accuracy", line["rule"], (said == right, 1)
        said = read_choice(line["answer"], choices)
        yield "accuracy", "ours", (said == right, 1) if right else None
        yield "no answer", "ours", (said is None, 1)
        if rating is not None:
            yield "judged accuracy", "judge", (rating, 1)
    elif line["task"] in JUDGED:
        yield "rating", "judge", None if rating is None else (20 * rating, 1)    # to 0..100
    else:
        if "benchmark" in line:    # ClothoAQA
            said, right = (re.sub(f"[{re.escape(string.punctuation)}]", "", line[key].lower())
                           for key in ("answer", "response"))
            yield "exact match", "lmms", (said == right, 1)
        yield "exact match", "ours", (is_right(line), 1)


def measure(lines, ratings=()):
    """[{task, metric, rule, rows, left_out, value, low, high}] of lines of a predictions file; of a
    benchmark its name is the task, and there is its "family". ratings: {row: the judge's}."""
    tasks = {}
    for line in lines:
        tasks.setdefault(line.get("benchmark") or line["task"], []).append(line)
    results = []
    for task, rows in sorted(tasks.items()):
        draws = random.Random(0)
        counts = {}
        for line in rows:
            for metric, rule, found in scores_of(line, dict(ratings).get(line["row"]), draws):
                counts.setdefault((metric, rule, share), []).append(found)
        lists = [line.get("choices") for line in rows]
        truth = [read_choice(line["response"], line["choices"]) for line in rows if all(lists)]
        if all(lists) and len(set(map(frozenset, lists))) == 1 and any(truth):
            classes = np.array(list(dict.fromkeys(lists[0])))    # (C,)
            said = [read_choice(line["answer"], line["choices"]) for line in rows]
            is_true, is_said = (np.array(x, str)[:, None] == classes for x in (truth, said))
            counts["weighted F1", "ours", weighted_f1] = list(
                np.concatenate([is_true & is_said, is_true, is_said], axis=1))    # (n, 3 C)
        for (metric, rule, statistic), found in counts.items():
            kept = [count for count in found if count is not None]
            result = {"task": task, "metric": metric, "rule": rule, "rows": len(kept),
                      "left_out": len(found) - len(kept), "value": None, "low": None, "high": None}
            result |= interval(kept, statistic) if kept else {}
            results.append(result | {key: rows[0][key] for key in ("family",) if key in rows[0]})
    return results


# --------------------------------------------------------------------------------------------------
# score: answers, ratings, report. The first line of a predictions file says whose answers it holds.

def score(args):
    """Answers to rows, and how good they are.

    Rows of task asr: WER; with choices: accuracy, weighted F1; caption, music, spoken_instruction,
    text: rated by a judge, if there is one; others: exact match. A benchmark by its name has the
    paper's limit of tokens and lmms-eval's rule, with ours beside it. A stopped run goes on with the
    same command. With --text-think the answer is what a text ends with, see final_answer."""
    if args.out and len(args.data) > 1:
        raise InputError("--out takes the answers to one set; give one, or leave --out out")
    sources = {name: open_source(name) for name in args.data}    # a wrong name shows at once
    model = functools.cache(functools.partial(load_model, args))
    results = []
    for name, source in sources.items():
        results += score_set(args, name, source, model)
    for mean in family_means(shown(results)):
        print("{task}, {metric}: {value:.2f}".format(**mean))


def score_set(args, name, source, model):
    """Answers and measures one set -> results of `measure`. model(): loads it, once for all."""
    checkpoint = None if args.model in BACKBONES else os.path.abspath(latest_checkpoint(args.model))
    run = {key: getattr(args, key) for key in ("model", "model_path", "no_think", "text_think",
                                               "max_new_tokens")}
    run |= {"checkpoint": checkpoint, "data": os.path.abspath(name) if source.files else name,
            "rows": fingerprint(source)}
    out = args.out or predictions_of(args, name, source, checkpoint)
    lines = earlier(out, run)
    answers = {line["row"]: line for line in lines if "answer" in line}
    ratings = {line["row"]: line["rating"] for line in lines
               if line.get("judge") == args.judge_model}
    skipped = [reason for _, reason in source.skipped]
    print(f"{name}: {len(source)} rows, {len(skipped)} skipped, {len(answers)} answered before\n"
          f"predictions: {out}")

    left = np.setdiff1d(usable_rows(source), list(answers)).tolist()
    for batch in batches(model(), source, left, args, skipped) if left else ():
        limits = {row.get("max_new_tokens", 256) for row in batch["rows"]}
        if len(limits) > 1 and not args.max_new_tokens:
            raise InputError(f"'{name}' has rows of several benchmarks; give --max-new-tokens")
        new = []
        for row, text in zip(batch["rows"], model().generate(batch, args.max_new_tokens
                                                             or limits.pop())):
            line = {key: value for key, value in row.items() if key != "rate"} | {"answer": text}
            if args.text_think is not None:
                line |= {"answer": final_answer(text), "text": text}
            new.append(line)
        keep(out, run, new)
        answers |= {line["row"]: line for line in new}
        print(f"{len(answers)} answered", flush=True)

    todo = [line for row, line in answers.items() if row not in ratings and (
        args.judge_choices if line.get("choices") else line["task"] in JUDGED)]
    failed = None
    for start in range(0, len(todo) if args.judge else 0, 8):
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(rate, args, line) for line in todo[start:start + 8]]
        rated = [reply.result() for reply in asked if not reply.exception()]
        keep(out, run, rated)    # at once: they are paid for
        ratings |= {line["row"]: line["rating"] for line in rated}
        failed = next(filter(None, (reply.exception() for reply in asked)), failed)
        if not rated:    # it is not about one row
            break
    results = measure([answers[row] for row in sorted(answers)], ratings)
    report(args, name, results, skipped)
    if failed:
        raise failed
    return results


def predictions_of(args, name, source, checkpoint):
    """Where predictions go without --out: into the run; of another model into this folder."""
    folder, model = "", os.path.basename(os.path.abspath(args.model))
    if checkpoint and os.path.exists(os.path.join(checkpoint, "..", "config.json")):
        folder, model = os.path.split(checkpoint)
    rows = os.path.splitext(os.path.basename(name))[0] if source.files else name
    parts = ["predictions", model] + ["no-think"] * args.no_think
    parts += ["text-think"] * (args.text_think is not None) + [re.sub(r"[^\w.]+", "-", rows)]
    return os.path.join(folder, "-".join(parts) + ".jsonl")


def read_lines(path):
    """The JSON objects of a file, less a last line that is not whole. Raises InputError."""
    with open(path, "rb") as file:
        whole = file.read().rpartition(b"\n")[0]
    try:
        return [dict(json.loads(line)) for line in whole.split(b"\n")]
    except (ValueError, TypeError) as e:
        raise InputError(f"'{path}' holds no predictions or results ({e})") from e


def earlier(path, run):
    """The lines that a stopped `score` left. Raises InputError if they are of another run."""
    if not os.path.exists(path):
        return []
    first, *lines = read_lines(path)
    was = first.get("run", {})
    changed = [f"{key} was {was.get(key)}, now {run[key]}" for key in run if was.get(key) != run[key]]
    if changed:
        raise InputError(f"'{path}' is of another run ({changed[0]}); give another --out")
    with open(path, "rb+") as file:    # a kill may have left half a line
        file.truncate(file.read().rfind(b"\n") + 1)
    return lines


def keep(path, run, lines):
    """Adds lines to a predictions file, which begins with the run they belong to."""
    lines = lines if os.path.exists(path) else [{"run": run}, *lines]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def report(args, name, results, skipped):
    """Prints a table of a set's results, and all of them as JSON."""
    print(f"{'task':20}{'metric':17}{'rule':15}{'rows':>7}{'left out':>10}{'value':>9}"
          "   95 % interval")
    for result in results:
        scale = 1 if result["metric"] == "rating" else 100
        cells = "        -"
        if result["rows"]:
            cells = "{:9.2f}   {:.2f} to {:.2f}".format(*(scale * result[key]
                                                          for key in ("value", "low", "high")))
        print("{task:20}{metric:17}{rule:15}{rows:7}{left_out:10}".format(**result) + cells)
    too_long = sum(isinstance(reason, TooLong) for reason in skipped)
    print(json.dumps({"model": args.model, "data": name, "results": results,
                      "skipped": {"over 120 s": too_long, "unusable": len(skipped) - too_long}}))


RATING = re.compile(r"rating[ \t]*(?:\([^()\n]{0,40}\))?\W{0,6}?(?::|=|\bis\b)[\s*_\"'`(\[]{0,6}"
                    r"(?P<number>-?\d[\d.,]{0,9})(?P<after>[^\n]{0,60})", re.I)


def read_rating(text):
    """The 0..5 of a judge's last "Rating: 4"; None for "-1", "3-4", "4/10" or no number."""
    found = [*RATING.finditer(fold(text))]
    number = re.fullmatch(r"0*([0-5])(?:[.,]0*)?", found[-1]["number"]) if found else None
    if not number:
        return None
    after = found[-1]["after"]
    scale = re.search(r"(?:^[\s*_)\]]*/|out of|scale\D{0,20}\d+\s*(?:-|–|to))\s*(\d+)", after)
    if re.match(r"\s*(?:-|–|to|or|and)\s*\d", after) or scale and scale[1] != "5":
        return None
    return int(number[1])


def rate(args, line):
    """Asks an OpenAI-compatible judge about an answer (figure A; where there are choices, our own
    prompt) -> a line of the predictions file. Its key goes to no other host, should the judge
    redirect, and into no message. Raises InputError."""
    closed = bool(line.get("choices"))
    with open(os.path.join(ASSETS, "judge_choice.txt" if closed else "judge.txt")) as file:
        prompt = file.read().format(
            question=line.get("question") or line["prompt"], ground_truth=line["response"],
            choices="\n".join(map(". ".join, zip(LETTERS, line.get("choices") or ()))),
            model_response=line.get("text", line["answer"]) if closed else line["answer"])
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):    # an error of the header would show it
        raise InputError("OPENAI_API_KEY holds a space or a character that is not ASCII")
    try:
        reply = http_backoff(    # which tries again after 429 and 5xx
            "POST", args.judge.rstrip("/") + "/chat/completions", timeout=120,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            json={"model": args.judge_model, "temperature": 0, "max_tokens": 1024,    # appendix B
                  "messages": [{"role": "user", "content": prompt}]})
        reply.raise_for_status()
        found = reply.json()
        text = str(found["choices"][0]["message"]["content"] or "").replace(key or "\0", "***")
    except Exception as e:    # no answer, an error, or no such reply
        reason = " ".join(str(e).replace(key or "\0", "***").split())
        raise InputError(f"the judge at {args.judge} fails ({reason}); its key is read from "
                         "OPENAI_API_KEY. What it has rated is kept; the same command goes on") from e
    rating = read_rating(text)
    if closed:
        said = re.match(r"\W*(yes|no)\b", text, re.I)
        rating = said and said[1].lower() == "yes"
    return {"row": line["row"], "judge": args.judge_model, "rating": rating, "reply": text,
            "usage": found.get("usage")}


# --------------------------------------------------------------------------------------------------
# show, frames: what the heads reconstruct

def load_heads(args):
    """(CoAT, {task: expert}, ExpertHeads) of a run as it was trained. Raises InputError."""
    checkpoint = latest_checkpoint(args.model)
    flags = read_json(os.path.join(checkpoint, "..", "config.json"))["flags"]
    weights = safetensors.torch.load_file(os.path.join(checkpoint, "heads.safetensors"))
    found = {key.split(".")[0] for key in weights}    # of "recon.out.weight"
    tasks = [task for task in EXPERTS if task in found]
    if not tasks:
        raise InputError(f"'{args.model}' was trained without experts; there is no head to show")
    coat = load_model(args, checkpoint)
    d = coat.hf.config.get_text_config().hidden_size
    experts = load_experts(tasks, d, coat.hf.device, args.random_experts or flags["random_experts"],
                           {task: flags.get(f"expert_{task}") for task in tasks})
    heads = heads_for(d, experts, kind=flags["head"], width=flags["head_width"],
                      focal_gamma=flags["focal_gamma"]).to(coat.hf.device)
    heads.load_state_dict(weights)    # with the scales of the losses
    return coat, experts, heads


@torch.no_grad()
def reconstruct(coat, experts, heads, row):
    """A loaded row -> {task: z_hat (L, E)} of the heads, {task: z (L, E)} of the experts, {term:
    loss relative to the best constant answer}. Raises InputError if it cannot be used."""
    rates = {expert.sample_rate for expert in experts.values()} - {None}
    (batch,), skipped = collate([row], coat.spec, rates, coat.think)
    if skipped:
        raise skipped[0]
    batch = to_device(batch, coat.hf.device)
    out = coat(batch)
    states = out.think_states.float()
    targets = expert_targets(experts, batch, out.audio_embeds.float())
    student = {task: head(states, out.valid)[0] for task, head in heads.items()}
    losses = {term: loss.item() / int(batch["n_audio"])
              for term, loss in heads(states, out.valid, targets).items()}
    if not all(map(math.isfinite, losses.values())):
        raise InputError(f"a head or an expert gives NaN: {losses}")
    return student, {task: z[0] for task, z in targets.items()}, losses


def pitch_recall(z_hat, z, expert):
    """Of the (frame, bin) pairs where the expert's contour is above CONTOUR_ON, the share where
    the student's is; None if there is none. A head that collapses to all zero has 0 (3.3.2)."""
    on = expert.readout(z).sigmoid() > CONTOUR_ON    # (L, 264)
    if not on.any():
        return None
    return (expert.readout(z_hat).sigmoid() > CONTOUR_ON)[on].float().mean().item()


def picture(task, z_hat, z, expert):
    """(student (K, L), expert (K, L), {row: its name}) of features (L, E), as figure 4 shows them:
    events and emotions that the expert's file can name, the contour, else the 64 dimensions that
    vary most."""
    names = {}
    top = z.var(0).topk(min(64, z.shape[1])).indices
    if task == "affect" and expert.readout:
        z_hat, z = (expert.readout(x).softmax(1) for x in (z_hat, z))
        names = dict(enumerate(expert.EMOTIONS))
        top = slice(None)
    elif task == "pitch":    # the strongest third of each semitone
        z_hat, z = (expert.readout(x).sigmoid().unflatten(1, (88, 3)).amax(2) for x in (z_hat, z))
        names = {12 * octave: f"A{octave}" for octave in range(1, 7)}
        top = slice(None)
    elif task == "sound":
        z_hat, z = (expert.readout(x).sigmoid() for x in (z_hat, z))
        top = z.amax(0).topk(10).indices.flip(0)
        names = {row: f"event {i}" for row, i in enumerate(top.tolist())}
    return z_hat.T[top], z.T[top], names


def show(args):
    """What each head reconstructs beside what its expert hears, as a picture (figure 4).

    unexplained: a loss over that of the best constant answer; 0 is the expert itself.
    recall: of the frames and bins where the expert hears a pitch, the share where the head does."""
    from matplotlib.figure import Figure
    wave, rate = read_audio(args.clip, args.start, args.end)
    coat, experts, heads = load_heads(args)
    row = {"wave": wave, "rate": rate, "prompt": args.question, "response": ""}
    student, target, losses = reconstruct(coat, experts, heads, row)
    told = {"clip": args.clip, "model": args.model, "unexplained": losses, "picture": args.out}
    figure = Figure(figsize=(9, 2.4 * len(heads)), dpi=80, layout="constrained")
    for task, axes in zip(heads, figure.subplots(len(heads), 2, squeeze=False)):
        *images, names = picture(task, student[task], target[task], experts[task])
        low, high = np.quantile(images[1].cpu(), [0.01, 0.99])
        for axis, image in zip(axes, images):
            axis.imshow(image.cpu().numpy(), aspect="auto", origin="lower", vmin=low, vmax=high,
                        extent=(0, len(wave) / rate, -0.5, len(image) - 0.5))
            axis.set_yticks(list(names), names.values())
        title = ", ".join(f"{term}: {loss:.2f} unexplained" for term, loss in losses.items()
                          if term.startswith(task))
        if task == "pitch":
            told["pitch_recall"] = pitch_recall(student[task], target[task], experts[task])
            title += f", recall {told['pitch_recall']}"
        axes[0].set_title(title, fontsize=9, loc="left")
        axes[1].set_title(f"{task}: {type(experts[task]).__name__}", fontsize=9)
    figure.savefig(args.out, format="png")
    print(json.dumps(told, allow_nan=False))


def frames(args):
    """How much of their experts the heads reconstruct: of clips as a whole, and of their course.

    clips: of each clip its mean feature. course: of each frame what that mean leaves. What all
    clips have in common at a frame's place is taken away from both, in student and expert.
    Squared errors over the expert's variance: 0 is the expert; 1 knows nothing of the clip."""
    source = open_source(args.data)
    coat, experts, heads = load_heads(args)
    found = [reconstruct(coat, experts, heads, source.load(i) | {"row": i})
             for i in with_audio(source)]
    if len(found) < 2:
        raise InputError(f"{len(found)} rows have audio that can be used; give two or more")
    results = {}
    for task in heads:
        student = [s[task] for s, _, _ in found]
        target = [z[task] for _, z, _ in found]
        results[task] = dict(zip(("clips", "course"), unexplained(student, target)))
        if task == "pitch":
            recalls = [pitch_recall(*pair, experts[task]) for pair in zip(student, target)]
            recalls = [recall for recall in recalls if recall is not None]
            results[task]["recall"] = float(np.mean(recalls)) if recalls else None
        print(f"{task:8}" + "  ".join(f"{key} {value}" if value is None else f"{key} {value:.2f}"
                                      for key, value in results[task].items()))
    print(json.dumps({"model": args.model, "data": args.data, "clips": len(found),
                      "results": results}, allow_nan=False))


def with_audio(source):
    """[number of a row that can be used and has audio]; those that cannot are named."""
    for _, reason in source.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    return [i for i in usable_rows(source).tolist() if source.lengths[i] > 0]


def unexplained(students, targets):
    """[of the clips' means, of their course]: squared error over the expert's variance, None where
    that is 0.

    students, targets    [features of a clip (L, E)], finite, L as it is in each"""
    found = []
    for z_hat, z in zip(means_and_course(students), means_and_course(targets)):
        variance = z.square().nansum()    # NaN is where a clip has ended, and nowhere else
        error = (z_hat - z).square().nansum()
        found.append((error / variance).item() if variance > 0 else None)
    return found


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
    without a block. Rows without the key of --label are left out."""
    source = open_source(args.data)
    usable = with_audio(source)
    print("think: mean of the thinking states; pre-gen: state before the answer\n"
          "rho: Spearman's, between the probe's confidence in the true label and right answers")
    results = []
    for name in args.models:
        steps = [] if name in BACKBONES else checkpoint_steps(name)
        for step in steps or [None]:
            coat = load_model(args, os.path.join(name, f"checkpoint-{step}") if step else name)
            found = {"model": name, "step": step} | probe_model(coat, source, usable, args)
            results.append(found)
            cells = ["{} {accuracy:.1%} +- {deviation:.1%} rho {rho}".format(position, **f)
                     for position, f in found.items() if isinstance(f, dict)]
            print(f"{name:30}{step or '-':>7}  {'  '.join(cells)}  answers {found['answers']:.1%}"
                  f"  rows {found['rows']}, left out {found['left_out']}")
    print(json.dumps({"data": args.data, "label": args.label, "results": results}, allow_nan=False))
    if args.plot:
        plot_probes(results, args)


def first_key(row, *keys):
    """The value of the first key that a row has, and be it 0; None if it has none."""
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)


def probe_model(coat, source, usable, args):
    """{"rows", "left_out", "answers": share of right ones, position: {accuracy, deviation, rho}}.
    Raises InputError if no probe can be trained on these rows."""
    from scipy.stats import spearmanr
    rows, right, states = [], [], {}
    for batch in batches(coat, source, usable, args, []):
        for position, x in probe_states(coat, batch, args.pre_gen).items():
            states.setdefault(position, []).extend(x)
        texts = coat.generate(batch, args.max_new_tokens)
        right += [is_right(row | {"answer": text}) for row, text in zip(batch["rows"], texts)]
        rows += batch["rows"]
    if len({row["task"] for row in rows}) > 1 and not args.label:
        raise InputError("these rows are of several tasks; give rows of one, or --label KEY")
    labels = [first_key(row, args.label) if args.label
              else read_choice(row["response"], row.get("choices") or []) or row["response"]
              for row in rows]
    labelled = np.array([label is not None for label in labels])
    labels = np.array(labels, str)[labelled]
    # What stays on one side of a split: a voice would give the label away.
    groups = [first_key(row, "speaker", "recording", "audio") for row in rows]
    groups = [row["row"] if group is None else str(group) for group, row in zip(groups, rows)]
    groups = np.array(groups)[labelled]
    counts = Counter(label for _, label in set(zip(groups, labels)))
    if len(counts) < 2 or min(counts.values()) < 5:
        raise InputError(f"five folds need two labels, each in five recordings; there are {counts}")
    right = np.array(right)[labelled]
    found = {"rows": len(labels), "left_out": int((~labelled).sum()), "answers": float(right.mean())}
    for position, x in states.items():
        accuracy, confidence = linear_probe(np.array(x)[labelled], labels, groups)
        both = len(set(right)) == 2 and np.ptp(confidence) > 0    # else there is nothing to rank
        found[position] = {
            "accuracy": float(np.mean(accuracy)), "deviation": float(np.std(accuracy, ddof=1)),
            "rho": round(float(spearmanr(confidence, right).statistic), 4) if both else None}
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
    """Results of runs and backbones by what they were trained with, over seeds (table 4).

    With 95 % intervals by Student's t over the seeds, and the difference to the first of these
    arms over the seeds that both have; a backbone stands beside all. A run folder counts with its
    heldout.json, a predictions file of `score` with its answers."""
    results = []
    skipped = []
    for path in args.runs:
        try:
            results += results_of(path)
        except InputError as e:
            skipped.append(f"skipped: {e}")
    if not results:
        raise InputError(f"nothing here has results, see infer.py score; {skipped[0]}")
    print("\n".join(skipped), end="\n" * bool(skipped), file=sys.stderr)
    if args.out:
        write_file(args.out, "".join(json.dumps(result) + "\n" for result in results))
    results += family_means(results)
    sets = Counter(task for task, _ in {(r["task"], r.get("set")) for r in results})
    all_data = dict.fromkeys(r["data"] for r in results if r["data"]) or ["-"]
    found = {}    # {(data, question): {arm: {seed: value}}}
    for r in results:
        question = r["task"] if r["metric"] == "accuracy" else f"{r['task']} {r['metric']}"
        if sets[r["task"]] > 1 and "set" in r:
            question += f" of {r['set']}"
        for data in [r["data"]] if r["data"] else all_data:
            seeds = found.setdefault((data, question), {}).setdefault(r["arm"], {})
            if r["seed"] in seeds:
                raise InputError(f"{question} of \"{r['arm']}\", trained on {data} with seed "
                                 f"{r['seed']}, comes twice; leave one out")
            seeds[r["seed"]] = r["value"]

    first = results[0]["arm"]
    means = {}
    width = max(12, *(len(question) + 2 for _, question in found))
    print(f"{'data':16}{'question':{width}}{'arm':32}{'seeds':>6}{'accuracy, %':>16}{'difference':>16}")
    for (data, question), arms in found.items():
        base = arms.get(first, {})
        for arm, seeds in arms.items():
            paired = [seeds[s] - base.get(s, base.get(None)) for s in seeds
                      if arm != first and (s in base or None in base)]
            means[data, question, arm] = mean_interval([*seeds.values()])
            print(f"{data:16}{question:{width}}{arm:32}{len(seeds):6}"
                  f"{plus_minus('', [*seeds.values()]):>16}{plus_minus('+', paired):>16}".rstrip())
    if args.plot:
        plot_arms(means, args.plot)


def mean_interval(values):
    """(mean, half of its 95 % interval by Student's t, NaN for one value)"""
    from scipy.stats import sem, t
    half = math.nan
    if len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * sem(values)
    return float(np.mean(values)), float(half)


def plus_minus(sign, values):
    """Their mean and its interval in words, "" without any."""
    if not values:
        return ""
    mean, half = mean_interval(values)
    return f"{mean:{sign}.1f}" + ("" if math.isnan(half) else f" +- {half:.1f}")


def results_of(path):
    """[{arm, data, seed, task, metric, rows, value in 0..100}] of a run folder, a predictions file,
    or a file that --out wrote. Raises InputError."""
    if os.path.isdir(path):
        heldout = read_json(os.path.join(path, "heldout.json"))
        flags = read_json(os.path.join(path, "config.json"))["flags"]
        return [run_of(flags) | {"task": task, "metric": "accuracy", "rows": flags["heldout"],
                                 "value": 100 * shares["heard"]} for task, shares in heldout.items()]
    lines = read_lines(path)
    run = lines[0].get("run")
    if run is None:
        if not all({"arm", "data", "seed", "task"} <= line.keys() for line in lines):
            raise InputError(f"'{path}' holds no results of --out, nor predictions")
        # "accuracy": as the files in assets/ have it
        return [{"metric": "accuracy", "value": 100 * line.get("accuracy", math.nan)} | line
                for line in lines]
    who = {"arm": os.path.basename(run["model"]), "data": None, "seed": None}
    config = os.path.join(os.path.dirname(run["checkpoint"] or ""), "config.json")
    if run["checkpoint"] and os.path.exists(config):
        who = run_of(read_json(config)["flags"])
        who["arm"] += ", asked without the block" * run["no_think"]
    judges = [line["judge"] for line in lines if "judge" in line]    # the last one counts
    ratings = {line["row"]: line["rating"] for line in lines if line.get("judge") in judges[-1:]}
    answered = [line for line in lines if "answer" in line]
    results = measure(sorted(answered, key=lambda line: line["row"]), ratings)
    return [who | {"set": run["data"]} | result for result in shown(results)]


def shown(results):
    """Of results of `measure` those in the paper's tables, their values in 0..100: lmms-eval's rule
    before ours, exact match beside accuracy, F1 of MELD alone."""
    found = {}
    for r in results:
        metric = "accuracy" if r["metric"] == "exact match" else r["metric"]
        if metric in ("accuracy", "WER", "CER", "rating") or r["task"] == "meld" and "F1" in metric:
            scale = 1 if metric == "rating" else 100
            if r["rows"]:
                found.setdefault((r["task"], metric), {
                    key: r[key] for key in ("task", "rows", "family") if key in r} | {
                    "metric": metric, "value": scale * r["value"]})
    return list(found.values())


def family_means(results):
    """Of the paper's families the means of benchmarks with the same metric, those that all arms
    have (tables 4 and 5)."""
    groups = {}    # {(family, metric): {(arm, data, seed): {benchmark: value}}}
    for r in results:
        if "family" in r:
            arms = groups.setdefault((r["family"], r["metric"]), {})
            arm = r.get("arm"), r.get("data"), r.get("seed")
            arms.setdefault(arm, {})[r["task"]] = r["value"]
    found = []
    for (family, metric), arms in groups.items():
        common = [task for task in next(iter(arms.values()))
                  if all(task in values for values in arms.values())]
        for (arm, data, seed), values in arms.items() if common else ():
            found.append({"arm": arm, "data": data, "seed": seed, "metric": metric,
                          "task": f"{family}: mean of {', '.join(common)}",
                          "value": float(np.mean([values[task] for task in common]))})
    return found


def run_of(flags):
    """{arm, data, seed} of a run; of its data the names without the seed at their end."""
    data = [flags["data"]] if isinstance(flags["data"], str) else flags["data"]
    names = [os.path.splitext(os.path.basename(name))[0] for name in dict.fromkeys(data)]
    names = [name.removesuffix(f"-{flags['seed']}") for name in names]
    return {"arm": arm_of(flags), "data": ", ".join(names), "seed": flags["seed"]}


def arm_of(flags):
    """What a run was trained with, in the words of table 4; flags that are not the usual ones."""
    experts = ",".join(stage.split(":")[1] for stage in flags["stage"])
    names = dict.fromkeys(name.split("=")[0] for name in experts.split(","))
    names.pop("none", None)
    if flags["no_think"] and not names:
        return "fine-tuning"
    arm = "+ " + (", ".join(names) or "block") + ", no block" * flags["no_think"]
    if flags["head"] != "transformer":
        arm += f", {flags['head']} heads"
    if "pitch" in names and flags["w_pitch_aux"] != 1:
        arm += f", w_aux {flags['w_pitch_aux']:g}"
    if "pitch" in names and flags["focal_gamma"] != 2:
        arm += f", gamma {flags['focal_gamma']:g}"
    return arm


def plot_arms(means, path):
    """Accuracy against the number at the end of the name of the data, one picture a question."""
    from matplotlib.figure import Figure
    points = {}    # {question: {arm: [(number, mean, half)]}}
    for (data, question, arm), mean in means.items():
        number = re.search(r"\d+$", data)
        if number:
            points.setdefault(question, {}).setdefault(arm, []).append((int(number[0]), *mean))
    if not points:
        raise InputError("--plot needs data whose names end in numbers, such as tones:note:28")
    figure = Figure(figsize=(1 + 4 * len(points), 3.5), dpi=90, layout="constrained")
    for axis, question in zip(figure.subplots(1, len(points), squeeze=False)[0], points):
        for k, (arm, found) in enumerate(points[question].items()):
            numbers, values, halves = np.transpose(sorted(found))
            apart = 1.04 ** k    # so that intervals do not hide each other
            axis.errorbar(numbers * apart, values, halves, marker="o", markersize=3, label=arm)
        axis.set(xscale="log", xlabel="labelled clips", ylabel="right answers, %", title=question)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, format="png")


# --------------------------------------------------------------------------------------------------
# merge, the command line

def merge(args):
    """A plain transformers folder, in bf16 on a GPU and fp32 on a CPU, as `ask` computes there."""
    if os.path.exists(args.out):
        raise InputError(f"'{args.out}' is there already; give the name of a new folder")
    coat = load_model(args)
    part = args.out.rstrip("/") + ".tmp"
    shutil.rmtree(part, ignore_errors=True)    # of a merge that was stopped
    coat.save(part)
    os.rename(part, args.out)
    print(f"{args.out}: its README.md shows how to use it without this code; or:\n"
          f"  python infer.py ask {args.out} CLIP \"question\"")


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run, name=None, nargs=None, model="a run or checkpoint folder of train.py"):
        """The add_argument of a subcommand, called as the function it runs."""
        p = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0],
                                description=run.__doc__)
        p.set_defaults(run=run)
        if name:
            p.add_argument(name, nargs=nargs, help=model)
            p.add_argument("--model-path", help="the backbone's folder, or NAME@REVISION of the hub")
            p.add_argument("--device", help="cpu or cuda (the GPU, or for tiny the CPU)")
        if run in (ask, score, probe):
            p.add_argument("--batch", type=COUNT, default=16, help="rows at once (%(default)s)")
            p.add_argument("--workers", type=WORKERS, default=2, help="data processes (%(default)s)")
        if run in (ask, score):
            p.add_argument("--no-think", action="store_true", help="leave the thinking block out")
            p.add_argument("--text-think", nargs="?", const="", metavar="FOLDER", help="reason in "
                           "text instead; FOLDER: the think folder of Audio Flamingo 3")
            p.add_argument("--compile", action="store_true", help="faster after a slow start")
        if run in (ask, show):
            p.add_argument("--start", type=float, help="seconds into the file")
            p.add_argument("--end", type=float, help="seconds into the file")
        if run in (show, frames):
            p.add_argument("--random-experts", action="store_true", help="as in train.py, for tests")
        return p.add_argument

    any_model = f"a run, checkpoint or merged folder, or one of {', '.join(BACKBONES)}"
    add = command(ask, "model", model=any_model)
    add("clips", nargs="+", metavar="CLIP", help="audio files, folders or rows.jsonl; the question")
    add("--max-new-tokens", type=COUNT, default=128, help="(%(default)s)")
    add("--json", action="store_true", help="prints one JSON object a row")
    add = command(score, "model", model=any_model)
    add("data", nargs="+", help="benchmarks, rows.jsonl, mixture.json or tones[:KINDS[:N]]")
    add("--out", help="predictions, a JSON line a row (in the run, or else in this folder)")
    add("--max-new-tokens", type=COUNT, help="(a benchmark has its own limit; of other rows 256)")
    add("--judge", metavar="URL", help="OpenAI-compatible, gets questions, references and answers")
    add("--judge-choices", action="store_true", help="it also reads multiple-choice answers")
    add("--judge-model", default="gpt-4o-2024-11-20", help="(%(default)s, the paper's)")
    add = command(show, "model")
    add("clip", help="audio file: wav, flac, ogg or mp3")
    add("--question", default="Describe the audio.", help="(%(default)s)")
    add("--out", default="show.png", help="(%(default)s)")
    command(frames, "model")("--data", required=True, help="a hundred rows with audio or so")
    add = command(probe, "models", "+", any_model)
    add("--data", required=True, help="labelled rows; a speaker's stay on one side of a split")
    add("--label", metavar="KEY", help="any key of the rows, instead of the response")
    add("--pre-gen", choices=["last-user", "last"], default="last-user",
        help="the state before the answer in models without a block (%(default)s, the paper's)")
    add("--max-new-tokens", type=COUNT, default=20, help="(%(default)s)")
    add("--plot", metavar="FILE", help="a picture")
    add = command(compare)
    add("runs", nargs="+", help="runs, predictions, or files of --out; the first is the base")
    add("--out", metavar="FILE", help="also write the results, a JSON line each")
    add("--plot", metavar="FILE", help="accuracy against the number that ends the data's name")
    command(merge, "model", model=any_model)("out", help="folder to write")
    return parser


def main():
    one_line_errors(less_memory="--batch 1")
    args = build_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
