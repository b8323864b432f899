"""Uses a trained model, or a backbone as it is.

    python infer.py ask runs/tiny assets/clips/guitar_chord.flac "Which note?"
    python infer.py score runs/tiny tones          # answers, and how good they are; again: goes on
    python infer.py score tiny tones --text-think  # tables 2 and F
    python infer.py score runs/mine mmau mmar librispeech-clean       # tables 1, 4 and 5
    python infer.py compare runs/*                 # arms over seeds (table 4)
    python infer.py probe tiny runs/tiny --data tones:note:200        # table 3
    python infer.py show runs/tiny assets/clips/guitar_chord.flac     # figure 4
    python infer.py frames runs/tiny --data tones:glide:100           # do heads follow the sound?
    python infer.py merge runs/tiny merged

A model is a run or checkpoint folder, a folder that `merge` wrote, or the name of a backbone. The
thinking block is placed for a model that was trained with it, for no other.
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

from data import (SOUNDS, Rows, collate, expert_targets, fingerprint, open_source, parse_row,
                  read_audio, usable_rows)
from experts import EXPERTS, load_experts
from heads import heads_for

# Tasks whose answers a judge rates (appendix B)
JUDGED = ("caption", "music", "spoken_instruction", "text")
CONTOUR_ON = 0.3    # a pitch is there: the frame threshold of basic-pitch


# --------------------------------------------------------------------------------------------------
# Models, batches, ask

def load_model(args, name=None):
    """A model, see the top of this file, ready to answer: adapters are merged."""
    name = name or args.model
    device = usable_device(args.device, name)
    if args.text_think:
        if name not in BACKBONES:
            raise InputError("--text-think FOLDER goes with the name of a backbone, not with a run")
        return load_text_think(name, args.text_think, args.model_path, device)
    coat = load_coat(name, args.model_path, device=device).merge()
    if args.compile:
        coat.compile_decode()
    return coat


def prepare(rows, spec, think, text_think):
    """collate, without responses. text_think: asks for reasoning after each prompt."""
    for row in rows:
        if text_think and isinstance(row, dict):
            row.setdefault("question", row["prompt"])
            row["prompt"] += spec.backbone.text_think
    return collate(rows, spec, think=think, responses=False)


def batches(coat, source, rows, args, skipped):
    """Yields batches, the longest first: what does not fit in memory fails at once. Rows that
    cannot be used are printed and added to `skipped`."""
    rows = sorted(rows, key=lambda i: -source.lengths[i])
    text_think = args.text_think is not None
    think = coat.think and not text_think and not args.no_think
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


class Asked(list):
    """Rows that are asked, as a source, see data.py."""

    lengths = Counter()    # all 0: the order stays

    def load(self, i):
        row = dict(self[i])
        if row["audio"] is not None:
            row["wave"], row["rate"] = read_audio(row["audio"], row.get("start"), row.get("end"))
        return row


def rows_to_ask(args):
    """The rows that `ask` is to answer."""
    *clips, question = args.clips
    rows = Asked()
    if question.endswith(".jsonl"):
        for path in args.clips:
            for number, line in enumerate(open(path, "rb")):
                row = parse_row(line, f"{path}, row {number}", answered=False)
                if row["audio"] is not None:
                    row["audio"] = os.path.join(os.path.dirname(path), row["audio"])
                rows.append(row)
        return rows
    for path in clips:
        files = [path]
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in sorted(os.listdir(path))
                     if name.lower().endswith(SOUNDS)]
        rows += [{"audio": file, "prompt": question, "response": "", "start": args.start,
                  "end": args.end} for file in files]
    if not rows or os.path.exists(question) or any(path.endswith(".jsonl") for path in clips):
        raise InputError('give clips and, last, a question: infer.py ask MODEL CLIP "Which '
                         'sound?"; or rows.jsonl alone, whose rows have their own')
    return rows


def ask(args):
    """Questions, without answers to compare with: one answer a clip.

    CLIPS are audio files, folders of them, or manifests: a line is {"audio": .., "prompt": ..}. A
    clip that cannot be read is named, and the others are answered."""
    rows = rows_to_ask(args)
    if len(rows) == 1:
        rows.load(0)    # missed before the model is loaded
    coat = load_model(args)
    skipped = []
    for batch in batches(coat, rows, range(len(rows)), args, skipped):
        for i, text in enumerate(coat.generate(batch, args.max_new_tokens)):
            row = batch["rows"][i]
            line = text if len(rows) == 1 else f"{row['audio'] or 'text'}: {text}"
            if args.json:
                line = json.dumps({
                    "row": row["row"], "audio": row["audio"], "question": row["prompt"],
                    "answer": text, "n_audio": int(batch["n_audio"][i]),
                    "prompt_tokens": int(batch["attention_mask"][i].sum())})
            print(line, flush=True)
    if len(skipped) == len(rows):
        raise InputError(f"none of the {len(rows)} rows can be used; the first: {skipped[0]}")


# --------------------------------------------------------------------------------------------------
# score

LETTERS = string.ascii_uppercase
READING = read_json(os.path.join(ASSETS, "reading.json"))


def fold(text):
    """One form of what can be written in several: NFKC, straight quotes, nothing of no width."""
    text = unicodedata.normalize("NFKC", text.translate(str.maketrans(*READING["marks_as"])))
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


def pattern(name):
    return re.compile(READING[name].replace("{after}", READING["after"]))


def mentioned(text, choices):
    """{choice} that a text names by its words or its letter, and does not deny."""
    matches = []
    for choice in sorted(choices, key=len, reverse=True):    # what a longer one takes is gone
        phrase = re.escape(re.sub(r"^(?:an?|the)\s+", "", plain(choice)) or "\0")
        if not re.search("[\u2e80-\uffff]", phrase):    # of a script with spaces
            phrase = rf"(?<!\w){phrase}(?!\w)"
        matches += [(choice, match) for match in re.finditer(phrase, text, re.I)]
        text = re.sub(phrase, lambda match: "\0" * len(match[0]), text, flags=re.I)
    for match in pattern("letter").finditer(text):
        place = LETTERS.index(match[match.lastindex].upper())
        matches += [(choice, match) for choice in choices[place:place + 1]]
    before, after = pattern("denied"), pattern("denied_after")
    return {choice for choice, match in matches
            if not before.search(text[:match.start()]) and not after.match(text[match.end():])}


def read_choice(answer, choices):
    """The choice that an answer names as a person would read it, or None where it names none, two,
    or denies the one it names. A line that is a choice, its letter or both counts before all else,
    then a letter at the beginning, then what is mentioned."""
    text = pattern("opening").sub("", fold(final_answer(answer)))
    text = pattern("dropped").sub("", text).strip()
    def words_of(text):
        return " ".join(pattern("marks").sub(" ", plain(text)).split())

    names = {}
    for letter, choice in zip(LETTERS.lower(), choices):
        words = words_of(choice)
        names |= {letter: choice, f"{letter} {words}": choice, f"{words} {letter}": choice}
    names |= {plain(choice): choice for choice in choices}
    lines = [line for line in text.split("\n") if line.strip()]
    found = {names.get(plain(part), names.get(words_of(part)))
             for part in (text, *lines[:1], *lines[-1:])} - {None}
    first = pattern("first_letter").match(text)
    if not found and first and first[first.lastindex].lower() in names:
        choice, after = names[first[first.lastindex].lower()], text[first.end():]
        others = "|".join(re.escape(plain(other)) for other in choices if other != choice)
        if pattern("second_letter").match(after) or re.match(rf"(?:{others})(?!\w)", plain(after)):
            return None
        if not pattern("denied_after").match(after):
            return choice
    found = found or mentioned(text, choices)
    return found.pop() if len(found) == 1 else None


def lmms_choice(answer, choices, rule):
    """The choice that lmms-eval 0.7.3 reads, None where it draws one: of the letters in brackets,
    else alone, else before a full stop, the one that stands alone last. "lmms-2", of MMAR and MMSU:
    a letter before a space will do, and in answers of over five words the last text."""
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
    """Whether an answer is the response, or names the choice that it names."""
    if not line.get("choices"):
        return plain(final_answer(line["answer"])) == plain(line["response"])
    right = read_choice(line["response"], line["choices"])
    return right is not None and read_choice(line["answer"], line["choices"]) == right


@functools.cache
def normalisers():
    """(Whisper's English normaliser with American spellings, its basic one)"""
    from transformers.models.whisper import english_normalizer as whisper
    spellings = read_json(os.path.join(ASSETS, "english_spellings.json"))
    return whisper.EnglishTextNormalizer(spellings), whisper.BasicTextNormalizer()


def words_heard(text, line, rule):
    """[word], in a script without spaces [character]. rule: one of lmms-eval's, or "ours": English
    by Whisper's normaliser, elsewhere without capitals and marks (its basic one takes vowels)."""
    if rule == "rows":
        return text.lower().split()
    english, basic = normalisers()
    text = re.sub(r"<\|.*?\|>|<(?:MUSIC|NOISE|SIL|OTHER)>", " ", text)    # appendix B
    if rule == "ours":
        letters = filter(str.isalpha, line["response"])
        is_latin = all("LATIN" in unicodedata.name(c, "") for c in letters)
        if line.get("language", "en" if is_latin else "").lower().startswith("en"):
            return english(fold(text)).split()
        text = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in fold(text))
        return pattern("unspaced").sub(r" \g<0> ", text.casefold()).split()
    text = english(re.sub(" ?([!,.?;:])", r"\1", re.sub(r"\s+", " ", text)).lstrip(" "))
    text = basic(text) if rule == "whisper+basic" else text
    return [word for word in text.lower().split()
            if any(unicodedata.category(c)[0] != "P" for c in word)]


def word_errors(line, rule):
    """(wrong, missing and surplus words, words of the reference), None for an empty reference."""
    import jiwer
    heard = line["answer"]
    if rule == "rows":
        found = (re.search(form, heard.strip(), re.I | re.S) for form in READING["transcript"])
        heard = next(filter(None, found))[1].strip()
    if not re.sub("<(MUSIC|NOISE|SIL|OTHER)>", "", line["response"]).strip():
        return None
    reference, heard = words_heard(line["response"], line, rule), words_heard(heard, line, rule)
    if not reference:    # only fillers such as "uh": all that is heard is wrong
        return len(heard), 0
    found = jiwer.process_words(" ".join(reference), " ".join(heard))
    missed = found.substitutions + found.deletions
    wrong, n = missed + found.insertions, missed + found.hits
    return (wrong / n, 1) if rule == "rows" else (wrong, n)


def share(counts, samples=1000):
    """Counts (x, n) of rows -> the sum of x over that of n, and its 95 % interval by drawing rows
    anew."""
    if not counts:
        return {"value": None}
    counts = np.asarray(counts, float)
    n = len(counts)
    rng = np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(n, size=n), minlength=n) @ counts for _ in range(samples)]
    x, n = np.stack([counts.sum(0), *drawn]).T
    value, *values = (x / np.maximum(n, 1)).tolist()
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    return {"value": value, "low": low, "high": high}


def scores_of(line, rating, draws):
    """Yields (metric, rule, (x, n)) of an answer, see `share`; None leaves the row out. lmms-eval's
    rule comes first: the paper uses it "as-is" (appendix B). rating: 0..5 of the judge, or None.
    draws: random.Random for choices that lmms-eval cannot read."""
    choices = line.get("choices")
    if line["task"] == "asr":
        unit = "CER" if pattern("unspaced").search(line["response"]) else "WER"
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
    elif line["task"] in JUDGED:
        yield "rating", "judge", None if rating is None else (rating / 5, 1)
    else:
        if "benchmark" in line:    # ClothoAQA
            said, right = (line[key].lower().translate(str.maketrans("", "", string.punctuation))
                           for key in ("answer", "response"))
            yield "exact match", "lmms", (said == right, 1)
        yield "exact match", "ours", (is_right(line), 1)


def measure(lines, ratings={}):
    """[{task, family, metric, rule, rows, left_out, value, low, high}] of predictions; task may be
    a benchmark's name. ratings: {row: the judge's}."""
    tasks = {}
    for line in lines:
        tasks.setdefault(line.get("benchmark") or line["task"], []).append(line)
    results = []
    for task, rows in sorted(tasks.items()):
        counts = {}
        draws = random.Random(0)
        for line in rows:
            for metric, rule, found in scores_of(line, ratings.get(line["row"]), draws):
                counts.setdefault((metric, rule), []).append(found)
        choices = {frozenset(line.get("choices") or [line["row"]]) for line in rows}
        truth = [read_choice(line["response"], line.get("choices") or []) for line in rows]
        if len(choices) == 1 and all(truth):
            from sklearn.metrics import f1_score
            said = [read_choice(line["answer"], line["choices"]) or "\0" for line in rows]
            f1 = float(f1_score(truth, said, average="weighted", zero_division=0))    # appendix B
            counts["weighted F1", "ours"] = said
        for (metric, rule), found in counts.items():
            kept = [count for count in found if count is not None]
            result = {"task": task, "family": rows[0].get("family"), "metric": metric, "rule": rule,
                      "rows": len(kept), "left_out": len(found) - len(kept)}
            results.append(result | ({"value": f1} if "F1" in metric else share(kept)))
    return results


def shown(results):
    """Of `measure` what the paper's tables show, in 0..100: lmms-eval's rule before ours, exact
    match as accuracy, F1 of MELD alone."""
    found = {}
    for r in results:
        metric = "accuracy" if r["metric"] == "exact match" else r["metric"]
        in_tables = ("accuracy", "WER", "CER", "rating", *["weighted F1"] * (r["task"] == "meld"))
        if metric in in_tables and r["rows"]:
            found.setdefault((r["task"], metric), {
                "task": r["task"], "family": r["family"], "metric": metric,
                "value": 100 * r["value"]})
    return list(found.values())


def family_means(results):
    """The means of a family's benchmarks with the same metric, those that all arms have (tables 4
    and 5)."""
    groups = {}    # {(family, metric): {(arm, data, seed): {benchmark: value}}}
    for r in results:
        if r.get("family"):
            arms = groups.setdefault((r["family"], r["metric"]), {})
            arms.setdefault((r["arm"], r["data"], r["seed"]), {})[r["task"]] = r["value"]
    found = []
    for (family, metric), arms in groups.items():
        common = [task for task in [*arms.values()][0] if all(task in v for v in arms.values())]
        for (arm, data, seed), values in arms.items() if common else ():
            found.append({"arm": arm, "data": data, "seed": seed, "metric": metric,
                          "task": f"{family}: mean of {', '.join(common)}",
                          "value": float(np.mean([values[task] for task in common]))})
    return found


def score(args):
    """Answers to rows, and how good they are. A stopped run goes on with the same command.

    Rows of task asr: WER; with choices: accuracy, F1; caption, music, spoken_instruction, text:
    rated by a judge, if there is one; others: exact match. A benchmark has the paper's limit of
    tokens and lmms-eval's rule, ours beside it."""
    if args.out and len(args.data) > 1:
        raise InputError("--out takes the answers to one set; leave it out")
    sources = {name: open_source(name) for name in args.data}    # a wrong name shows at once
    model = functools.cache(functools.partial(load_model, args))
    results = []
    for name, source in sources.items():
        results += score_set(args, name, source, model)
    who = {"arm": args.model, "data": None, "seed": None}
    for mean in family_means([who | result for result in shown(results)]):
        print("{task}, {metric}: {value:.2f}".format(**mean))


def score_set(args, name, source, model):
    """Answers one set -> what `measure` says. model(): loads it, once for all sets."""
    path, run = predictions_of(args, name, source)
    lines = earlier(path, run)
    answers = {line["row"]: line for line in lines if "answer" in line}
    ratings = {line["row"]: line["rating"] for line in lines
               if line.get("judge") == args.judge_model}
    skipped = [reason for _, reason in source.skipped]
    print(f"{name}: {source.about}; {len(skipped)} skipped, {len(answers)} answered before\n"
          f"predictions: {path}")
    left = np.setdiff1d(usable_rows(source), list(answers)).tolist()
    for batch in batches(model(), source, left, args, skipped) if left else ():
        limit = args.max_new_tokens or batch["rows"][0].get("max_new_tokens", 256)
        new = {}
        for row, text in zip(batch["rows"], model().generate(batch, limit)):
            line = {key: row[key] for key in row if key != "rate"} | {"answer": text}
            if args.text_think is not None:
                line |= {"answer": final_answer(text), "text": text}
            new[row["row"]] = line
        keep(path, run, new.values())
        answers |= new
        print(f"{len(answers)} answered", flush=True)
    if not answers:
        raise InputError(f"none of the {len(source)} rows can be used; the first: {skipped[0]}")

    todo = [line for row, line in answers.items()
            if line["task"] in JUDGED and not line.get("choices") and row not in ratings]
    failed = []
    for start in range(0, len(todo) if args.judge else 0, 8):
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(rate, args, line) for line in todo[start:start + 8]]
        rated = [reply.result() for reply in asked if not reply.exception()]
        keep(path, run, rated)    # at once: they are paid for
        ratings |= {line["row"]: line["rating"] for line in rated}
        failed += [reply.exception() for reply in asked if reply.exception()]
        if not rated:    # it is not about one row
            break

    results = measure([answers[row] for row in sorted(answers)], ratings)
    print(f"{'task':20}{'metric':17}{'rule':15}{'rows':>7}{'left out':>10}  value, 95 % interval")
    for result in results:
        bounds = [f"{100 * result[key]:.2f}" for key in ("value", "low", "high") if result.get(key)
                  is not None]
        print("{task:20}{metric:17}{rule:15}{rows:7}{left_out:10}".format(**result), *bounds)
    too_long = sum(isinstance(reason, TooLong) for reason in skipped)
    print(json.dumps({"model": args.model, "data": name, "results": results,
                      "skipped": {"over 120 s": too_long, "unusable": len(skipped) - too_long}}))
    if failed:
        raise failed[0]
    return results


def predictions_of(args, name, source):
    """(path, run): where predictions go, and what they belong to. Without --out they go into the
    run, of another model into this folder."""
    model, folder = args.model, ""
    if model not in BACKBONES:
        model = os.path.abspath(latest_checkpoint(model))
        if os.path.exists(os.path.join(model, "..", "config.json")):
            folder = os.path.dirname(model)
    name = os.path.abspath(name) if source.files else name
    flags = ("model_path", "no_think", "text_think", "max_new_tokens")
    run = {"model": model, "data": name, "rows": fingerprint(source)}
    run |= {flag: getattr(args, flag) for flag in flags}
    words = [os.path.basename(model), "no-think" * args.no_think,
             "text-think" * (args.text_think is not None), os.path.basename(name)]
    words = re.sub(r"\W+", "-", "-".join(filter(None, words)).removesuffix(".jsonl"))
    return args.out or os.path.join(folder, f"predictions-{words}.jsonl"), run


def read_lines(path):
    """The JSON objects of a file, less a last line that is not whole."""
    with open(path, "rb") as file:
        whole = file.read().rpartition(b"\n")[0]
    try:
        return [dict(json.loads(line)) for line in whole.split(b"\n")]
    except (ValueError, TypeError) as e:
        raise InputError(f"'{path}' holds no predictions or results ({e})") from e


def earlier(path, run):
    """The lines that a stopped `score` left. InputError if they are of another run."""
    if not os.path.exists(path):
        return []
    first, *lines = read_lines(path)
    was = first.get("run", {})
    for key in run:
        if was.get(key) != run[key]:
            raise InputError(f"'{path}' is of another run ({key} was {was.get(key)}, now "
                             f"{run[key]}); give another --out")
    with open(path, "rb+") as file:    # a kill may have left half a line
        file.truncate(file.read().rfind(b"\n") + 1)
    return lines


def keep(path, run, lines):
    """Adds lines to a predictions file, which begins with the run they belong to."""
    lines = lines if os.path.exists(path) else [{"run": run}, *lines]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_rating(text):
    """The 0..5 of a judge's last "Rating: 4"; None for "-1", "3-4", "4/10" or no number."""
    number, after = [("", ""), *pattern("rating").findall(fold(text))][-1]
    whole = re.fullmatch(r"0*([0-5])(?:[.,]0*)?", number)
    return int(whole[1]) if whole and not pattern("other_scale").search(after) else None


def rate(args, line):
    """Asks a judge about an answer (figure A) -> a line of the predictions file. The key goes to no
    other host, should the judge redirect, and into no message."""
    with open(os.path.join(ASSETS, "judge.txt")) as file:
        prompt = file.read().format(question=line.get("question") or line["prompt"],
                                    ground_truth=line["response"], model_response=line["answer"])
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):    # an error would show it
        raise InputError("OPENAI_API_KEY holds a space or a character that is not ASCII")
    try:
        reply = http_backoff(    # tries again after 429 and 5xx
            "POST", args.judge.rstrip("/") + "/chat/completions", timeout=120,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            json={"model": args.judge_model, "temperature": 0, "max_tokens": 1024,    # appendix B
                  "messages": [{"role": "user", "content": prompt}]})
        reply.raise_for_status()
        text = str(reply.json()["choices"][0]["message"]["content"] or "")
    except Exception as e:
        reason = " ".join(str(e).replace(key or "\0", "***").split())
        raise InputError(f"the judge at {args.judge} fails ({reason}); its key is read from "
                         "OPENAI_API_KEY. The same command goes on") from e
    return {"row": line["row"], "judge": args.judge_model, "rating": read_rating(text),
            "reply": text.replace(key or "\0", "***")}


# --------------------------------------------------------------------------------------------------
# show, frames, probe: what the heads and the thinking states hold

def load_heads(args):
    """(CoAT, {task: expert}, ExpertHeads) of a run as it was trained. Raises InputError."""
    checkpoint = latest_checkpoint(args.model)
    flags = read_json(os.path.join(checkpoint, "..", "config.json"))["flags"]
    weights = safetensors.torch.load_file(os.path.join(checkpoint, "heads.safetensors"))
    found = {key.split(".")[0] for key in weights}
    tasks = [task for task in EXPERTS if task in found]
    if not tasks:
        raise InputError(f"'{args.model}' was trained without experts; there is no head to show")
    coat = load_model(args, checkpoint)
    d = coat.hf.config.get_text_config().hidden_size
    experts = load_experts(tasks, d, coat.hf.device, args.random_experts or flags["random_experts"],
                           {task: flags.get(f"expert_{task}") for task in tasks})
    heads = heads_for(d, experts, kind=flags["head"], width=flags["head_width"],
                      focal_gamma=flags["focal_gamma"]).to(coat.hf.device)
    heads.load_state_dict(weights)
    return coat, experts, heads


@torch.no_grad()
def reconstruct(coat, experts, heads, row):
    """A loaded row -> {task: z_hat (L, E)} of the heads, {task: z (L, E)} of the experts, {term:
    loss over that of the best constant answer}. InputError if it cannot be used."""
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
    """(student (K, L), expert (K, L)) of features (L, E): emotions, if the expert's file has them,
    the contour, the ten strongest events, else the 64 dimensions that vary most."""
    if task == "affect" and expert.readout:
        return [expert.readout(x).softmax(1).T for x in (z_hat, z)]
    if task == "pitch":    # the strongest third of each semitone
        return [expert.readout(x).sigmoid().unflatten(1, (88, 3)).amax(2).T for x in (z_hat, z)]
    if task == "sound":
        z_hat, z = (expert.readout(x).sigmoid() for x in (z_hat, z))
    strength = z.amax(0) if task == "sound" else z.var(0)
    top = strength.topk(10 if task == "sound" else min(64, len(strength))).indices
    return z_hat.T[top], z.T[top]


def show(args):
    """What each head reconstructs beside what its expert hears, as a picture (figure 4).

    unexplained: a loss over that of the best constant answer; 0 is the expert itself."""
    from matplotlib.figure import Figure
    wave, rate = read_audio(args.clip, args.start, args.end)
    coat, experts, heads = load_heads(args)
    row = {"wave": wave, "rate": rate, "prompt": args.question, "response": ""}
    student, target, losses = reconstruct(coat, experts, heads, row)
    told = {"clip": args.clip, "model": args.model, "unexplained": losses, "picture": args.out}
    if "pitch" in heads:
        told["pitch_recall"] = pitch_recall(student["pitch"], target["pitch"], experts["pitch"])
    figure = Figure(figsize=(9, 2.4 * len(heads)), dpi=80, layout="constrained")
    for task, axes in zip(heads, figure.subplots(len(heads), 2, squeeze=False)):
        images = picture(task, student[task], target[task], experts[task])
        low, high = np.quantile(images[1].cpu(), [0.01, 0.99])
        for axis, image in zip(axes, images):
            axis.imshow(image.cpu().numpy(), aspect="auto", origin="lower", vmin=low, vmax=high,
                        interpolation="nearest", extent=(0, len(wave) / rate, 0, len(image)))
        axes[0].set_title(", ".join(f"{term}: {loss:.2f} unexplained" for term, loss
                                    in losses.items() if term.startswith(task)), fontsize=9)
        axes[1].set_title(type(experts[task]).__name__, fontsize=9)
    figure.savefig(args.out, format="png")
    print(json.dumps(told, allow_nan=False))


def frames(args):
    """How much of their experts the heads reconstruct: of clips as a whole, and of their course.

    clips: of each clip its mean feature. course: what that leaves of each frame. Both without what
    all clips share at a frame's place; as shares of the expert's variance that are missed."""
    source = open_source(args.data)
    coat, experts, heads = load_heads(args)
    found = [reconstruct(coat, experts, heads, source.load(i)) for i in with_audio(source)]
    if len(found) < 2:
        raise InputError("give two or more rows with audio")
    results = {}
    for task in heads:
        pairs = [(student[task], target[task]) for student, target, _ in found]
        results[task] = dict(zip(("clips", "course"), unexplained(*zip(*pairs))))
        if task == "pitch":
            recalls = [pitch_recall(*pair, experts[task]) for pair in pairs]
            recalls = [recall for recall in recalls if recall is not None]
            results[task]["recall"] = float(np.mean(recalls)) if recalls else None
        print(f"{task:8}", *(f"{key} {value if value is None else round(value, 2)}"
                             for key, value in results[task].items()))
    print(json.dumps({"model": args.model, "data": args.data, "clips": len(found),
                      "results": results}, allow_nan=False))


def with_audio(source):
    """[number of a row that can be used and has audio]; those that cannot are named."""
    for _, reason in source.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    return [i for i in usable_rows(source).tolist() if source.lengths[i] > 0]


def unexplained(students, targets):
    """[of the clips' means, of their course]: squared error over the expert's variance, None if it
    is 0. students, targets: [features of a clip (L, E)], finite, L as it is in each."""
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


def probe(args):
    """Linear probes of the thinking states (section 4.4: figure 3, table 3).

    think: of their mean; pre-gen: of the state before the answer; rho: Spearman's, between the
    probe's confidence in the true label and right answers. A run stands for all its checkpoints.
    Rows without the key of --label are left out."""
    source = open_source(args.data)
    usable = with_audio(source)
    results = []
    for name in args.models:
        steps = [] if name in BACKBONES else checkpoint_steps(name)
        for step in steps or [None]:
            coat = load_model(args, os.path.join(name, f"checkpoint-{step}") if step else name)
            found = {"model": name, "step": step} | probe_model(coat, source, usable, args)
            results.append(found)
            cells = [f"{key} {f['accuracy']:.1%} +- {f['deviation']:.1%}, rho {f['rho']}"
                     for key, f in found.items() if key in ("think", "pre-gen")]
            print(f"{name:30}{step}  {'; '.join(cells)}; answers {found['answers']:.1%}; "
                  f"{found['rows']} rows, {found['left_out']} without a label")
    print(json.dumps({"data": args.data, "label": args.label, "results": results}, allow_nan=False))
    if args.plot:
        plot_probes(results, args)


def value_at(row, *keys):
    """The value of the first of these keys that a row has, and be it 0; None if it has none."""
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)


def probe_model(coat, source, usable, args):
    """{rows, left_out, answers: share of right ones, position: {accuracy, deviation, rho}}."""
    from scipy.stats import spearmanr
    rows, right, states = [], [], {}
    for batch in batches(coat, source, usable, args, []):
        for position, x in probe_states(coat, batch).items():
            states.setdefault(position, []).extend(x)
        texts = coat.generate(batch, args.max_new_tokens)
        right += [is_right(row | {"answer": text}) for row, text in zip(batch["rows"], texts)]
        rows += batch["rows"]
    if len({row["task"] for row in rows}) > 1 and not args.label:
        raise InputError("these rows are of several tasks; give rows of one, or --label KEY")
    labels = [value_at(row, args.label) if args.label
              else read_choice(row["response"], row.get("choices") or []) or row["response"]
              for row in rows]
    labelled = np.array([label is not None for label in labels])
    # What stays on one side of a split: a voice would give the label away.
    groups = [value_at(row, "speaker", "recording", "audio") for row in rows]
    groups = [row["row"] if group is None else str(group) for group, row in zip(groups, rows)]
    labels, groups, right = (np.array(x)[labelled] for x in (list(map(str, labels)), groups, right))
    counts = Counter(label for _, label in set(zip(groups, labels)))
    if len(counts) < 2 or min(counts.values()) < 5:
        raise InputError(f"five folds need two labels, each in five recordings; there are {counts}")
    found = {"rows": len(labels), "left_out": len(rows) - len(labels),
             "answers": float(right.mean())}
    for position, x in states.items():
        accuracy, confidence = linear_probe(np.array(x)[labelled], labels, groups)
        can_rank = len(set(right)) == 2 and np.ptp(confidence) > 0
        found[position] = {
            "accuracy": float(np.mean(accuracy)), "deviation": float(np.std(accuracy, ddof=1)),
            "rho": float(spearmanr(confidence, right).statistic) if can_rank else None}
    return found


@torch.no_grad()
def probe_states(coat, batch):
    """{position: (B, D)}: the mean of the thinking states, and the state before the answer: that of
    the block's end, without a block of the last input token before the assistant turn (4.4)."""
    h, _ = coat.states(batch, use_cache=False)    # (B, T, D)
    states = {"pre-gen": h[:, -1]}
    if batch["think_mask"].any():
        think, _ = pad_rows(h[batch["think_mask"]], batch["n_audio"])    # (B, L, D)
        states["think"] = think.sum(1) / batch["n_audio"][:, None]
    else:
        header = coat.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
        from_end = (batch["input_ids"] == header).int().flip(1).argmax(1)    # (B,) of the last one
        states["pre-gen"] = h[torch.arange(len(h), device=h.device), -2 - from_end]
    return {position: x.float().cpu().numpy() for position, x in states.items()}


def linear_probe(x, labels, groups):
    """([accuracy of a fold], (n,) probability of the true label), five folds that split no group.

    x (n, D) states; logistic regression on standardised dimensions, scikit-learn's own settings."""
    from sklearn import linear_model, model_selection, pipeline, preprocessing
    probe = pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=2000))
    folds = {"groups": groups,
             "cv": model_selection.StratifiedGroupKFold(5, shuffle=True, random_state=0)}
    accuracy = model_selection.cross_val_score(probe, x, labels, **folds)
    chances = model_selection.cross_val_predict(probe, x, labels, method="predict_proba", **folds)
    _, true = np.unique(labels, return_inverse=True)
    return accuracy, chances[np.arange(len(true)), true]


def plot_probes(results, args):
    """Accuracy over checkpoints, a level line for other models (figure 3)."""
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
# compare, merge, the command line

def compare(args):
    """Results of runs and backbones by what they were trained with, over seeds (table 4).

    With 95 % intervals by Student's t, and the difference to the first arm over the seeds that both
    have. A run counts with its heldout.json, a predictions file of `score` with its answers."""
    results = []
    for path in args.runs:
        try:
            results += results_of(path)
        except InputError as e:
            print(f"skipped: {e}", file=sys.stderr)
    if not results:
        raise InputError("nothing here has results; infer.py score makes them")
    if args.out:
        write_file(args.out, "".join(json.dumps(result) + "\n" for result in results))
    results += family_means(results)
    all_data = dict.fromkeys(r["data"] for r in results if r["data"]) or ["-"]
    found = {}    # {(data, question): {arm: {seed: value}}}
    for r in results:
        question = r["task"] if r["metric"] == "accuracy" else f"{r['task']} {r['metric']}"
        if r.get("set") and not r.get("family"):
            question += f" of {r['set']}"
        for data in [r["data"]] if r["data"] else all_data:
            seeds = found.setdefault((data, question), {}).setdefault(r["arm"], {})
            if r["seed"] in seeds:
                raise InputError(f"{question} of {r['arm']}, {data}, seed {r['seed']}, comes twice")
            seeds[r["seed"]] = r["value"]

    first = results[0]["arm"]
    width = max(12, *(len(question) + 2 for _, question in found))
    print(f"{'data':16}{'question':{width}}{'arm':32}{'seeds':>6}{'accuracy, %':>16}"
          f"{'difference':>16}")
    for (data, question), arms in found.items():
        base = arms.get(first, {})
        for arm, seeds in arms.items():
            paired = [seeds[s] - base.get(s, base.get(None)) for s in seeds
                      if arm != first and (s in base or None in base)]
            print(f"{data:16}{question:{width}}{arm:32}{len(seeds):6}"
                  f"{in_words([*seeds.values()]):>16}{in_words(paired, '+'):>16}".rstrip())
    if args.plot:
        plot_arms(found, args.plot)


def mean_interval(values):
    """(mean, half of its 95 % interval by Student's t)"""
    from scipy.stats import sem, t
    alone = len(values) == 1
    return float(np.mean(values)), (
        math.nan if alone else float(t.ppf(0.975, len(values) - 1) * sem(values)))


def in_words(values, sign=""):
    """Their mean and its interval."""
    if not values:
        return ""
    mean, half = mean_interval(values)
    return f"{mean:{sign}.1f}" + f" +- {half:.1f}" * (not math.isnan(half))


def results_of(path):
    """[{arm, data, seed, task, metric, value in 0..100}] of a run folder, a predictions file, or a
    file that --out wrote. Raises InputError."""
    if os.path.isdir(path):
        heldout = read_json(os.path.join(path, "heldout.json"))
        flags = read_json(os.path.join(path, "config.json"))["flags"]
        return [described(flags) | {"task": task, "metric": "accuracy", "value": 100 * of["heard"]}
                for task, of in heldout.items()]
    lines = read_lines(path)
    run = lines[0].get("run")
    if run is None:
        if not all({"arm", "data", "seed", "task", "value"} <= line.keys() for line in lines):
            raise InputError(f"'{path}' holds no results of --out, nor predictions")
        return lines
    who = {"arm": os.path.basename(run["model"]), "data": None, "seed": None}
    config = os.path.join(run["model"], "..", "config.json")
    if os.path.exists(config):
        who = described(read_json(config)["flags"])
        who["arm"] += ", asked without the block" * (run["no_think"] and who["arm"][0] == "+")
    judges = [line["judge"] for line in lines if "judge" in line]    # the last one counts
    ratings = {line["row"]: line["rating"] for line in lines if line.get("judge") in judges[-1:]}
    answered = sorted((x for x in lines if "answer" in x), key=lambda line: line["row"])
    who["set"] = os.path.basename(run["data"])
    found = shown(measure(answered, ratings))
    if not found:
        raise InputError(f"'{path}' has no result, or none without a judge")
    return [who | result for result in found]


def described(flags):
    """{arm, data, seed} of a run: what it was trained with, in the words of table 4, and unusual
    flags; its data without the seed at the end of their names."""
    experts = ",".join(stage.split(":")[1] for stage in flags["stage"])
    names = dict.fromkeys(name.split("=")[0] for name in experts.split(","))
    names.pop("none", None)
    arm = "+ " + (", ".join(names) or "block") + ", no block" * flags["no_think"]
    arm = "fine-tuning" if flags["no_think"] and not names else arm
    if names and flags["head"] != "transformer":
        arm += f", {flags['head']} heads"
    for flag, word, usual in (("w_pitch_aux", "w_aux", 1), ("focal_gamma", "gamma", 2)):
        if "pitch" in names and flags[flag] != usual:
            arm += f", {word} {flags[flag]:g}"
    data = [os.path.splitext(os.path.basename(name))[0].removesuffix(f"-{flags['seed']}")
            for name in dict.fromkeys(flags["data"])]
    return {"arm": arm, "data": ", ".join(data), "seed": flags["seed"]}


def plot_arms(found, path):
    """Accuracy against the number that ends the data's name. found: as in `compare`."""
    from matplotlib.figure import Figure
    numbered = {key: int(number[0]) for key in found if (number := re.search(r"\d+$", key[0]))}
    questions = list(dict.fromkeys(question for _, question in numbered))
    if not questions:
        raise InputError("--plot needs data that end in a number, such as tones:note:28")
    arms = list(dict.fromkeys(arm for seeds in found.values() for arm in seeds))
    figure = Figure(figsize=(1 + 4 * len(questions), 3.5), dpi=90, layout="constrained")
    for axis, question in zip(figure.subplots(1, len(questions), squeeze=False)[0], questions):
        for k, arm in enumerate(arms):
            keys = [key for key in numbered if key[1] == question and arm in found[key]]
            points = sorted((numbered[key], *mean_interval([*found[key][arm].values()]))
                            for key in keys)
            if points:
                numbers, values, halves = np.transpose(points)
                apart = 1.04 ** k    # so that none hides another
                axis.errorbar(numbers * apart, values, halves, marker="o", markersize=3,
                              color=f"C{k}", label=arm)
        axis.set(xscale="log", xlabel="labelled clips", ylabel="right answers, %", title=question)
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, format="png")


def merge(args):
    """A plain transformers folder, in bf16 on a GPU and fp32 on a CPU, as `ask` computes there."""
    if os.path.exists(args.out):
        raise InputError(f"'{args.out}' is there already; give the name of a new folder")
    coat = load_model(args)
    part = args.out.rstrip("/") + ".tmp"
    shutil.rmtree(part, ignore_errors=True)    # of a merge that was stopped
    coat.save(part)
    os.rename(part, args.out)
    print(f"{args.out}: its README.md shows how to use it without this code")


def build_parser():
    """assets/commands.json names the flags."""
    types = {"count": COUNT, "workers": WORKERS, "seconds": float}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    table = read_json(os.path.join(ASSETS, "commands.json"))
    for run in (ask, score, compare, probe, show, frames, merge):
        p = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0],
                                description=run.__doc__)
        p.set_defaults(run=run, text_think=None, no_think=False, compile=False)
        for group in table["commands"][run.__name__]:
            for flag, settings in table["flags"][group].items():
                kind = {"type": types[settings["type"]]} if "type" in settings else {}
                p.add_argument(flag, **settings | kind)
    return parser


def main():
    one_line_errors(less_memory="--batch 1")
    args = build_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
