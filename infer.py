"""Uses a trained model.

    python infer.py ask runs/tiny assets/clips/guitar_chord.flac --question "Which note?"
    python infer.py ask runs/tiny assets/clips/*.flac --question "Which sound?" --json --no-think
    python infer.py score runs/tiny tones --out predictions.jsonl     # go on with a stopped one: the same command
    python infer.py show runs/tiny assets/clips/guitar_chord.flac --out heads.png
    python infer.py probe tiny runs/tiny --data tones:note:200 --plot probe.png
    python infer.py merge runs/tiny merged

A model is a run or checkpoint folder of train.py, a folder that `merge` wrote, or the name of a backbone as it is
before training. Rows are a manifest, see data.py, or held-out made tones: tones[:KINDS[:ROWS OF EACH]].
"""
import argparse
import csv
import functools
import http.client
import json
import os
import pickle
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import safetensors.torch
import torch

from data import (SAMPLE_RATE, TONES, Rows, Tones, at_rate, check_least, checkpoint_steps, collate, fingerprint,
                  latest_checkpoint, need, one_line_errors, open_source, read_audio, teacher_targets, to_device,
                  usable_device, usable_rows)
from experts import EXPERTS, load
from heads import ProjectionHead, expert_loss
from model import BACKBONES, InputError, build_inputs, load_coat, load_text_think, pad_rows

# Rated by a judge (appendix B), since no comparison of strings could; the other tasks are those of `measure`.
JUDGED = ("caption", "music", "spoken_instruction", "text")
# Figure A, with the line breaks that our copy of the paper has lost. One user message, no system message.
JUDGE_PROMPT = """[Question]
{question}

[Reference Answer]
{ground_truth}

[Model Answer]
{model_response}

[Task]
Rate the model's answer based on its alignment with the reference answer, focusing on accuracy and relevance to the \
reference provided. Please be critical on the details.
Criteria: Assess if the model's response mirrors the reference in terms of content, accuracy, and relevance.
Score 0: The answer is completely misaligned, providing incorrect or irrelevant information compared to the reference.
Score 1: The answer shows minimal alignment, often misunderstanding or providing irrelevant details unrelated to the \
reference.
Score 2: The answer recognizes the topic but diverges significantly from the reference in accuracy or relevance.
Score 3: The answer aligns with the reference generally but lacks detail or precise accuracy in some aspects.
Score 4: The answer is mostly accurate and relevant, closely following the reference but could be clearer or more \
detailed.
Score 5: The answer is highly accurate, detailed, and matches the reference answer perfectly, capturing its essence \
and detail.

Your response should be formatted as follows:
Explanation: (Provide a concise explanation of your rating, comparing the reference answer with the model's response. \
"The reference answer is [XXX], while the model's answer is [YYY]. I think ...")
Rating: (int)"""


# ----------------------------------------------------------------------------------------------------------------------
# Models, rows, answers

def model_folder(name):
    """A checkpoint or merged folder itself, or the newest checkpoint of a run. Raises InputError if it is none of them."""
    return name if os.path.isfile(os.path.join(name, "coat.json")) else latest_checkpoint(name)


def load_model(name, device, model_path=None, text_think=None):
    """A CoAT ready to answer: the adapter of a run or checkpoint folder merged in, a merged folder, or a backbone.

    text_think  folder of the authors' own thinking adapter for a backbone, instead of ours"""
    if text_think:
        return load_text_think(name, text_think, model_path, device)
    if name in BACKBONES:
        return load_coat(name, model_path=model_path, device=device)
    folder = model_folder(name)
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return load_coat(adapter=folder, model_path=model_path, device=device).merge()
    with open(os.path.join(folder, "coat.json")) as file:    # merged
        return load_coat(json.load(file)["backbone"], model_path=folder, device=device)


def open_rows(text):
    """The rows of a manifest, a mixture or made tones, see the top of this file. Raises InputError."""
    if text.split(":")[0] != "tones":
        return open_source(text)
    kinds, n = (text.split(":")[1:] + ["", ""])[:2]
    kinds, n = kinds.split(",") if kinds else list(TONES), n or "60"
    if text.count(":") > 2 or set(kinds) - set(TONES) or not n.isdigit() or int(n) < 1:
        raise InputError(f"'{text}': give tones[:KINDS[:ROWS OF EACH]] with KINDS from {','.join(TONES)}")
    return Tones("heldout", int(n) * len(kinds), kinds)


def batches(coat, source, rows, args, think=True):
    """Batches of these rows without their responses, the longest first: what does not fit in memory fails at once.

    A row that turns out to be unreadable is named here and in batch["skipped"]; batch["rows"] may be empty."""
    lengths = source.seconds()[0]
    order = [int(i) for i in sorted(rows, key=lambda i: -lengths[i])]
    order = [order[i:i + args.batch] for i in range(0, len(order), args.batch)]
    prepare = functools.partial(collate, spec=coat.spec, think=think, responses=False)
    for batch in torch.utils.data.DataLoader(Rows(source), batch_sampler=order, num_workers=args.workers,
                                             collate_fn=prepare):
        for reason in batch["skipped"]:
            print(f"skipped: {reason}")
        yield to_device(batch, coat.hf.device)


def ask(args):
    """One question about each clip; the answer is printed as it comes."""
    folder = args.text_think if isinstance(args.text_think, str) else None    # True: the flag without a folder
    if folder and args.model not in BACKBONES:
        raise InputError("--text-think FOLDER goes with the name of a backbone, not with a run of ours")
    if args.text_think and args.no_think:
        raise InputError("--text-think leaves the thinking block out already; drop --no-think")
    device = usable_device(args.device)
    waves = [at_rate(*read_audio(path, args.start, args.end), SAMPLE_RATE) for path in args.clips]
    coat = load_model(args.model, device, args.model_path, folder)
    if args.compile:
        coat.compile_decode()
    if args.text_think:
        args.question += coat.backbone.text_think
    think = not (args.no_think or args.text_think)
    for path, wave in zip(args.clips, waves):
        batch = to_device(build_inputs(coat, [wave], [args.question], think=think), device)
        if not args.json and len(args.clips) > 1:
            print(f"{path}: ", end="")
        begin, first, ids, shown = time.time(), None, [], 0
        for token in coat.stream(batch, args.max_new_tokens):
            ids.append(token.item())
            first = first or time.time()
            text = coat.processor.tokenizer.decode(ids, skip_special_tokens=True)
            if not args.json and not text.endswith("\ufffd"):    # a character may need another token to be whole
                print(text[shown:], end="", flush=True)
                shown = len(text)
        if args.json:
            print(json.dumps({
                "audio": path, "question": args.question, "answer": text.strip(), "n_audio": int(batch["n_audio"]),
                "prompt_tokens": batch["input_ids"].shape[1], "new_tokens": len(ids),
                "seconds_to_first_token": round(first - begin, 4), "seconds": round(time.time() - begin, 4)}))
        else:
            print(text[shown:])


# ----------------------------------------------------------------------------------------------------------------------
# score

def plain(text):
    """For comparison: no capitals, single spaces, no marks at the ends."""
    return " ".join(text.lower().split()).strip(" .,:;!?*\"'()")


def parse_choice(answer, choices):
    """The choice that an answer names, or None. In this order, after an "The answer is", capitals and marks aside:

    1. the answer is a choice; 2. it is or begins with a choice's letter, "B", "(B)", "B. this", and names no other
    choice; 3. exactly one choice occurs in it as whole words, one inside a longer one not counted."""
    short = re.sub(r"^\W*(the\s+)?(correct\s+)?(answer|option)\b(\s+is\b)?\s*:?\s*", "", answer.strip(), flags=re.I)
    for choice in choices:
        if plain(choice) in (plain(answer), plain(short)):
            return choice
    rest, named = plain(short), []
    for choice in sorted(choices, key=len, reverse=True):
        rest, found = re.subn(rf"(?<!\w){re.escape(plain(choice))}(?!\w)", "\0", rest)
        named += [choice] * bool(found)
    letter = re.match(r"[(*[]*([A-Z])(?:[.):*\]]+(?:\s|$)|$)", short.upper())
    place = ord(letter[1]) - ord("A") if letter else len(choices)
    if place < len(choices):
        return choices[place] if set(named) <= {choices[place]} else None
    return named[0] if len(named) == 1 else None


def is_right(row, answer):
    if row.get("choices"):
        return parse_choice(answer, row["choices"]) == parse_choice(row["response"], row["choices"]) is not None
    return plain(answer) == plain(row["response"])


def weighted_f1(sums):
    """F1 of each class, weighted by its support, from (.., 3 C) sums: true positives, support, predicted."""
    hits, support, predicted = np.split(sums, 3, axis=-1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    return (f1 * support).sum(-1) / support.sum(-1)


def share(sums):
    """(.., 2) sums -> their ratio, such as errors over words."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def interval(counts, statistic, samples=1000):
    """statistic of the sums of counts (n, k) over the rows, and a 95 % interval by drawing rows with replacement."""
    counts, rng, n = np.asarray(counts, float), np.random.default_rng(0), len(counts)
    drawn = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ counts for _ in range(samples)])
    low, high = np.percentile(statistic(drawn), [2.5, 97.5])
    return {"value": float(statistic(counts.sum(0))), "low": float(low), "high": float(high)}


def word_errors(lines, normalise):
    """[(errors, words)] of transcripts; references without a word once GigaSpeech's tags are gone are left out (app. B)."""
    jiwer, counts = need("jiwer", "jiwer"), []
    for line in lines:
        reference, heard = re.sub("<(MUSIC|NOISE|SIL|OTHER)>", " ", line["response"]), normalise(line["answer"])
        if not reference.strip():
            continue
        reference = normalise(reference)
        if reference.strip():
            out = jiwer.process_words(reference, heard)
            missed = out.substitutions + out.deletions
            counts.append((missed + out.insertions, missed + out.hits))
        else:    # nothing but fillers such as "uh": all that is heard is wrong, as jiwer counts over many rows
            counts.append((len(heard.split()), 0))
    return counts


def measure(lines, ratings=None, normalise=str):
    """[{task, metric, rows, value, low, high, note}] of answered rows, lines of a predictions file:

    asr: WER. Rows with "choices": accuracy by parse_choice, no answer being a wrong one, and weighted F1 where all rows
    have the same choices. JUDGED: mean of the ratings {row: 0..5 or None}, brought to 0..100. Others: exact match of
    `plain` texts."""
    results, ratings = [], ratings or {}

    def add(metric, counts, statistic=share, note=""):
        found = interval(counts, statistic) if len(counts) else dict.fromkeys(("value", "low", "high"))
        results.append({"task": task, "metric": metric, "rows": len(counts)} | found | {"note": note})

    for task in sorted({line["task"] for line in lines}):
        rows = [line for line in lines if line["task"] == task]
        closed, free = ([line for line in rows if bool(line.get("choices")) == has] for has in (True, False))
        if task == "asr":
            counts = word_errors(rows, normalise)
            add("WER", counts, note=f"{len(rows) - len(counts)} empty references left out")
        elif free and task in JUDGED:
            asked = [ratings[line["row"]] for line in free if line["row"] in ratings]
            good = [(20 * rating, 1) for rating in asked if rating is not None]
            add("rating", good, note=f"{len(asked) - len(good)} unreadable, {len(free) - len(asked)} not asked for")
        elif free:
            add("exact match", [(is_right(line, line["answer"]), 1) for line in free])
        if closed and task != "asr":
            pairs = [[parse_choice(line[key], line["choices"]) for key in ("response", "answer")] for line in closed]
            good = [(label, said) for label, said in pairs if label is not None]
            add("accuracy", [(label == said, 1) for label, said in good],
                note=f"{sum(said is None for _, said in good)} without an answer"
                + f", {len(pairs) - len(good)} references are no choice, left out" * (len(good) < len(pairs)))
            if good and len({frozenset(line["choices"]) for line in closed}) == 1:
                labels = np.array(closed[0]["choices"])
                truth, said = (np.array([pair[k] or "" for pair in good])[:, None] == labels for k in (0, 1))
                add("weighted F1", np.concatenate([truth & said, truth, said], 1), weighted_f1)
    return results


def normaliser(path=None):
    """Whisper's English text normaliser. Its map from British to American spelling is a file of every Whisper model."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    if not path:
        return EnglishTextNormalizer({})
    with open(path, encoding="utf-8") as file:
        try:
            words = dict(json.load(file))
            if not all(isinstance(word, str) for word in words.values()):
                raise ValueError(path)
            return EnglishTextNormalizer(words)
        except (ValueError, TypeError) as e:
            raise InputError(f"'{path}' is no map of words; give normalizer.json of a Whisper model") from e


def run_of(args, source):
    """What a predictions file belongs to."""
    name = args.model if args.model in BACKBONES else os.path.abspath(model_folder(args.model))
    return {"model": name, "saved": name not in BACKBONES and os.path.getmtime(os.path.join(name, "coat.json")),
            "data": os.path.abspath(args.data) if source.files else args.data, "rows": fingerprint(source),
            "model_path": args.model_path, "think": not args.no_think, "max_new_tokens": args.max_new_tokens}


def earlier(path, run):
    """Lines that a stopped `score` left in `path`, less the first. Raises InputError if they are of another run.

    What a kill left of a last line is cut off."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return []
    with open(path, "rb+") as file:
        whole = file.read().rpartition(b"\n")[0]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            was = lines[0]["run"]
        except (ValueError, LookupError, TypeError) as e:
            raise InputError(f"'{path}' is no file of predictions; give another --out, or delete it") from e
        if changed := [f"{key} was {was.get(key)}, now {run[key]}" for key in run if was.get(key) != run[key]]:
            raise InputError(f"'{path}' belongs to another run ({changed[0]}); give another --out, or delete it")
        file.truncate(len(whole) + 1)
    return lines[1:]


def rate(args, line):
    """Asks the judge -> what a line of the predictions file says of it. Tries five times. Raises InputError."""
    prompt = JUDGE_PROMPT.format(question=line["prompt"], ground_truth=line["response"], model_response=line["answer"])
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    body = json.dumps({"model": args.judge_model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
                       "max_tokens": 1024}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    for attempt in range(5):
        try:
            request = urllib.request.Request(args.judge.rstrip("/") + "/chat/completions", body, headers)
            with urllib.request.urlopen(request, timeout=120) as reply:
                reply = json.load(reply)
            text, usage = reply["choices"][0]["message"]["content"] or "", reply.get("usage") or {}
            found = re.findall(r"rating\W*?:\W*(\d+)(?![.,]?\d)", text, re.I)
            rating = int(found[-1]) if found and int(found[-1]) <= 5 else None
            return {"row": line["row"], "judge": args.judge_model, "rating": rating, "reply": text,
                    "tokens": [int(usage.get(kind) or 0) for kind in ("prompt_tokens", "completion_tokens")]}
        except urllib.error.HTTPError as e:
            why = " ".join(f"{e.code} {e.reason} {e.read(300).decode(errors='replace')}".split())
            if e.code not in (408, 409, 429) and e.code < 500:
                break
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as e:    # cut off, no such reply
            why = " ".join(f"{type(e).__name__}: {e}".split())
        if attempt < 4:
            time.sleep(2 ** attempt)
    raise InputError(f"the judge at {args.judge} fails ({why}); its key is read from OPENAI_API_KEY. What it has rated "
                     "is kept: go on with the same command")


def score(args):
    """Answers to all rows of a manifest, and how good they are."""
    device, source, normalise = usable_device(args.device), open_rows(args.data), normaliser(args.normaliser)
    run = run_of(args, source)
    lines, bad = earlier(args.out, run), source.seconds()[1]
    answers = {line["row"]: line for line in lines if "answer" in line}
    rated = {line["row"]: line for line in lines if line.get("judge") == args.judge_model}
    reasons = [reason for _, reason in bad]
    for reason in reasons:
        print(f"skipped: {reason}")
    left = np.setdiff1d(usable_rows(source), list(answers)).tolist()
    print(f"{len(source)} rows, {len(bad)} skipped, {len(answers)} answered before")

    with open(args.out, "a", encoding="utf-8") as file:
        def write(line):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

        if not os.path.getsize(args.out):
            write({"run": run})
        begin, coat = time.time(), load_model(run["model"], device, args.model_path) if left else None
        if left and args.compile:
            coat.compile_decode()
        for batch in batches(coat, source, left, args, not args.no_think) if left else ():
            reasons += batch["skipped"]
            for row, text in zip(batch["rows"], batch["rows"] and coat.generate(batch, args.max_new_tokens)):
                keep = {k: row[k] for k in ("row", "audio", "task", "prompt", "choices", "response") if k in row}
                answers[row["row"]] = keep | {"answer": text}
                write(answers[row["row"]])
            print(f"{len(answers)} answered, {time.time() - begin:.0f} s")
        if not answers:
            raise InputError(f"none of the {len(source)} rows can be used; the first: {reasons[0]}")
        todo = [line for i, line in sorted(answers.items())
                if args.judge and line["task"] in JUDGED and not line.get("choices") and i not in rated]
        failed = None
        for i in range(0, len(todo), 8):
            with ThreadPoolExecutor(8) as pool:
                asked = [pool.submit(rate, args, line) for line in todo[i:i + 8]]
                for reply in as_completed(asked):    # written at once: it is paid for
                    failed = reply.exception() or failed
                    if not reply.exception():
                        rated[reply.result()["row"]] = reply.result()
                        write(reply.result())
            print(f"{len(rated)} rated by {args.judge_model}")
            if all(reply.exception() for reply in asked):    # it is not about one row
                break

    over = sum("or cut it with" in reason for reason in reasons)    # what data.check_seconds says of those alone
    skipped = {"over 120 s": over, "unusable": len(reasons) - over}
    results = measure([answers[i] for i in sorted(answers)], {i: r["rating"] for i, r in rated.items()}, normalise)
    print(f"{'task':20}{'metric':14}{'rows':>7}{'value':>9}   95 % interval")
    for r in results:
        value, low, high = ("-" if r[k] is None else f"{r[k] * (1 if r['metric'] == 'rating' else 100):.2f}"
                            for k in ("value", "low", "high"))
        print(f"{r['task']:20}{r['metric']:14}{r['rows']:7}{value:>9}   "
              + f"{f'{low} to {high}' if r['rows'] else '':18}{r['note']}".rstrip())
    print("skipped: " + ", ".join(f"{n} {why}" for why, n in skipped.items()))
    tokens = np.sum([r["tokens"] for r in rated.values()] or [[0, 0]], axis=0).tolist()
    if rated:
        cost = f", cost {np.dot(tokens, args.judge_price) / 1e6:.4f}" if args.judge_price else ""
        print(f"judge: {tokens[0]} tokens in, {tokens[1]} out{cost}")
    print(json.dumps({"model": run["model"], "data": args.data, "skipped": skipped, "judge_tokens": tokens,
                      "results": results}))
    if failed:
        raise failed


# ----------------------------------------------------------------------------------------------------------------------
# show

def pictures(name, z_hat, z, expert, sound_names):
    """(student (K, L), teacher (K, L), {row: its name}) of features (L, E), as figure 4 shows them.

    sound: the ten events that the teacher hears most; pitch: the contour, the strongest third of each semitone; others:
    the 64 dimensions that vary most."""
    if name in ("sound", "pitch"):
        z_hat, z = (expert.readout(x).sigmoid() for x in (z_hat, z))
    if name == "pitch":
        z_hat, z = (x.unflatten(1, (88, 3)).amax(2).T for x in (z_hat, z))                  # (88, L) semitones from A0
        return z_hat, z, {12 * octave: f"A{octave}" for octave in range(1, 7)}
    if name == "sound":
        top = z.amax(0).topk(10).indices.flip(0)
        rows = dict(enumerate(sound_names[i] if sound_names else f"event {i}" for i in top.tolist()))
    else:
        top, rows = z.var(0).topk(min(64, z.shape[1])).indices, {}
    return z_hat.T[top], z.T[top], rows


def load_heads(args, device):
    """(CoAT, {name: teacher}, {name: head}, {name: its loss scales}) of a run as it was trained. Raises InputError."""
    checkpoint = latest_checkpoint(args.model)
    config, weights, state = paths = [os.path.join(checkpoint, *place) for place in (
        ("..", "config.json"), ("heads.safetensors",), ("state.pt",))]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise InputError(f"no '{missing[0]}'; show needs the folder of a run as train.py wrote it")
    try:
        with open(config) as file:
            flags = json.load(file)["flags"]
        scales = torch.load(state, map_location=device, weights_only=True, mmap=True)["scales"]
        weights = safetensors.torch.load_file(weights, device=str(device))
    except (ValueError, LookupError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as e:
        raise InputError(f"'{checkpoint}' is damaged ({str(e).splitlines()[0]}); copy it again") from e
    if not scales:
        raise InputError(f"'{args.model}' was trained without experts; there is no head to show")
    random = args.random_teachers or flags["random_teachers"]
    experts = {name: load(name, getattr(args, f"teacher_{name}") or flags[f"teacher_{name}"], device, random)
               for name in scales if name != "recon"}
    coat = load_coat(adapter=checkpoint, model_path=args.model_path, device=device).merge()
    width = coat.hf.config.get_text_config().hidden_size
    heads = torch.nn.ModuleDict({
        name: ProjectionHead(width, experts[name].dim if name in experts else width, flags["head"], flags["head_width"])
        for name in scales}).to(device)
    heads.load_state_dict(weights)
    return coat, experts, heads, scales


def show(args):
    """One picture: what each head reconstructs from the thinking states beside what its teacher hears (figure 4)."""
    figure, device = need("matplotlib.figure", "matplotlib"), usable_device(args.device)
    wave, rate = read_audio(args.clip, args.start, args.end)
    sound_names = []
    if args.sound_names:
        with open(args.sound_names, encoding="utf-8", newline="") as file:
            sound_names = [row.get("display_name") for row in csv.DictReader(file)]
        if len(sound_names) != 527 or None in sound_names:
            raise InputError(f"'{args.sound_names}' has no 527 rows with a display_name; give AudioSet's own table")
    coat, experts, heads, scales = load_heads(args, device)
    row = {"wave": wave, "rate": rate, "prompt": args.question, "response": ""}
    batch = to_device(collate([row], coat.spec, {e.sample_rate for e in experts.values()}), device)
    if batch["skipped"]:
        raise InputError(batch["skipped"][0])
    fig, shares = figure.Figure(figsize=(9, 2.1 * len(scales)), dpi=80, layout="constrained"), {}
    with torch.no_grad():
        out = coat(batch)
        targets = teacher_targets(experts, batch) | {"recon": out.audio_embeds.float()}
        for name, (left, right) in zip(scales, fig.subplots(len(scales), 2, squeeze=False)):
            expert, z_hat = experts.get(name), heads[name](out.think_states.float(), out.valid)
            parts = expert_loss(name, z_hat, targets[name], out.valid, scales[name], getattr(expert, "readout", None))
            parts = {term: value.item() / int(batch["n_audio"]) for term, value in parts.items()}
            shares |= parts
            student, teacher, rows = pictures(name, z_hat[0], targets[name][0], expert, sound_names)
            low, high = teacher.quantile(torch.tensor([0.01, 0.99], device=device)).tolist()
            for axis, image in ((left, student), (right, teacher)):
                axis.imshow(image.cpu().numpy(), aspect="auto", origin="lower", interpolation="nearest",
                            vmin=0 if rows else low, vmax=teacher.max().item() if rows else high,
                            extent=(0, len(wave) / rate, -0.5, len(image) - 0.5))
                axis.set_yticks(list(rows), rows.values() if axis is left else [""] * len(rows))
            left.set_title(", ".join(f"{term}: {value:.2f} unexplained" for term, value in parts.items()), fontsize=10)
            right.set_title("the audio tower" if name == "recon" else type(expert).__name__, fontsize=10)
            left.set_xlabel("s")
            right.set_xlabel("s")
    fig.savefig(args.out, format="png")
    print(json.dumps({"clip": args.clip, "model": args.model, "unexplained": shares, "picture": args.out}))


# ----------------------------------------------------------------------------------------------------------------------
# probe

@torch.no_grad()
def probe_states(coat, batch):
    """{position: (B, D)}: the mean of the thinking states, and the state from which the answer's first token comes.

    Without a block the latter is that of the prompt's last token."""
    h, _ = coat.states(batch, use_cache=False)
    states = {"pre-gen": h[:, -1]}
    if batch["think_mask"].any():
        think, _ = pad_rows(h[batch["think_mask"]], batch["n_audio"])
        states["think"] = think.sum(1) / batch["n_audio"][:, None]
    return {position: x.float().cpu().numpy() for position, x in states.items()}


def linear_probe(x, labels, groups):
    """Out-of-fold over five folds that split no group: ([accuracy of a fold], (n,) probability of the true label).

    x (n, D) states; logistic regression on standardised dimensions, scikit-learn's own settings (L2, C = 1)."""
    need("sklearn", "scikit-learn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    confidence, accuracy = np.zeros(len(labels)), []
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(x, labels, groups):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x[train], labels[train])
        accuracy.append(fitted.score(x[test], labels[test]))
        true = fitted.classes_ == labels[test][:, None]                                     # (n, classes)
        confidence[test] = (fitted.predict_proba(x[test]) * true).sum(1)
    return accuracy, confidence


def label_of(row, key):
    """The response, or the choice that it names, or what the manifest says at `key`. Raises InputError."""
    if key and row.get(key) in (None, ""):
        raise InputError(f"row {row['row']} has no \"{key}\"; give --label another key of the manifest")
    choice = not key and row.get("choices") and parse_choice(row["response"], row["choices"])
    return str(choice or row[key or "response"])


def probe(args):
    """Accuracy of linear probes at two positions, and how their confidence goes with right answers (figure 3, table 3).

    A run stands for all its checkpoints. The name of a backbone is the baseline, without a block."""
    device, source, results = usable_device(args.device), open_rows(args.data), []
    figure, stats = args.plot and need("matplotlib.figure", "matplotlib"), need("scipy.stats", "scikit-learn")
    lengths, bad = source.seconds()
    usable = [i for i in usable_rows(source) if lengths[i] > 0]
    for _, reason in bad:
        print(f"skipped: {reason}")
    print(f"{len(usable)} of {len(source)} rows have audio that can be used\n{'model':30}{'step':>7}"
          f"{'think':>16}{'rho':>7}{'pre-gen':>16}{'rho':>7}{'answers':>9}")
    for name, step in [(n, step) for n in args.models for step in n not in BACKBONES and checkpoint_steps(n) or [None]]:
        coat = load_model(os.path.join(name, f"checkpoint-{step}") if step else name, device, args.model_path)
        rows, labels, states, right = [], [], {}, []
        for batch in batches(coat, source, usable, args, name not in BACKBONES):
            if batch["rows"]:
                rows += batch["rows"]
                labels += [label_of(row, args.label) for row in batch["rows"]]
                if not args.label and len({row["task"] for row in (rows[0], *batch["rows"])}) > 1:
                    raise InputError("these rows are of several tasks; give rows of one, or --label KEY")
                for position, x in probe_states(coat, batch).items():
                    states.setdefault(position, []).append(x)
                texts = coat.generate(batch, args.max_new_tokens)
                right += [is_right(row, text) for row, text in zip(batch["rows"], texts)]
        # All of a recording, or speaker, on one side: a voice would give the label away.
        groups = [next((str(row[k]) for k in ("speaker", "recording", "audio") if row.get(k)), row["row"])
                  for row in rows]
        counts = Counter(label for _, label in set(zip(groups, labels)))
        if len(counts) < 2 or min(counts.values()) < 5:
            raise InputError(f"five folds need two labels, each in five recordings; there are {dict(counts)}")
        result = {"model": name, "step": step, "rows": len(rows), "answers": float(np.mean(right))}
        for position, parts in states.items():
            accuracy, confidence = linear_probe(np.concatenate(parts), np.array(labels), groups)
            rho = float(stats.spearmanr(confidence, right).statistic) if 0 < sum(right) < len(right) else None
            result[position] = {"accuracy": float(np.mean(accuracy)), "deviation": float(np.std(accuracy, ddof=1)),
                                "rho": rho}
        results.append(result)
        cells = ""
        for r in (result.get(position) for position in ("think", "pre-gen")):
            cells += f"{r['accuracy']:8.1%} +- {r['deviation']:4.1%}" if r else f"{'-':>16}"
            cells += f"{'-':>7}" if not r or r["rho"] is None else f"{r['rho']:7.2f}"
        print(f"{name:30}{step or '-':>7}{cells}{result['answers']:9.1%}")
    print(json.dumps({"data": args.data, "label": args.label, "labels": Counter(labels), "results": results}))
    if args.plot:
        plot_probes(figure, results, args)


def plot_probes(figure, results, args):
    """Accuracy at the two positions over the checkpoints of each run, a level line for other models (figure 3)."""
    fig = figure.Figure(figsize=(8, 3.2), dpi=90, layout="constrained")
    names = list(dict.fromkeys(r["model"] for r in results))
    for axis, position, title in zip(fig.subplots(1, 2, sharey=True), ("think", "pre-gen"),
                                     ("mean of the thinking states", "state that the answer comes from")):
        for name in names:
            of = [(r["step"], r[position]["accuracy"], r[position]["deviation"]) for r in results
                  if r["model"] == name and position in r]
            if of and of[0][0]:
                axis.errorbar(*zip(*of), color=f"C{names.index(name)}", marker=".", elinewidth=0.6, label=name)
            elif of:
                axis.axhline(of[0][1], color=f"C{names.index(name)}", label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    fig.axes[1].legend(fontsize=8)
    fig.axes[0].set_ylabel(f"accuracy of the probe, {args.data}", fontsize=8)
    fig.savefig(args.plot, format="png")


# ----------------------------------------------------------------------------------------------------------------------
# merge

def merge(args):
    """A plain transformers folder, whole or not at all; in bf16 on a GPU and fp32 on a CPU, as `ask` computes there."""
    args.out = os.path.abspath(args.out)
    for path in (args.out, args.out + ".tmp"):
        if os.path.exists(path):
            raise InputError(f"'{path}' is there already; delete it, or give the name of a new folder")
    coat = load_model(args.model, usable_device(args.device), args.model_path)
    try:
        coat.save(args.out + ".tmp")
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:
        shutil.rmtree(args.out + ".tmp", ignore_errors=True)
        raise InputError(f"cannot write '{args.out}': {str(e).splitlines()[0]}; make room") from e
    os.rename(args.out + ".tmp", args.out)
    size = sum(os.path.getsize(os.path.join(args.out, n)) for n in os.listdir(args.out)) / 2 ** 30
    print(f"{args.out}: {size:.2f} GiB, {coat.hf.dtype}. README.md shows how to use it without this code; or:\n"
          f"  python infer.py ask {args.out} CLIP --question \"...\"")


if __name__ == "__main__":
    one_line_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, help, *flags):
        """A subcommand; flags: those it shares with others."""
        p = commands.add_parser(run.__name__, help=help)
        p.set_defaults(run=run)
        p.add_argument("model" + "s" * (run is probe), nargs="+" if run is probe else None,
                       help=f"run or checkpoint folder, merged folder, or one of {', '.join(BACKBONES)}")
        p.add_argument("--model-path", help="a local folder with the backbone, instead of the hub")
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if "segment" in flags:
            p.add_argument("--start", type=float, help="seconds into the file")
            p.add_argument("--end", type=float, help="seconds into the file")
        if "answers" in flags:
            p.add_argument("--no-think", action="store_true", help="leave the thinking block out")
            p.add_argument("--compile", action="store_true", help="faster decoding after a slow start (CoAT.compile_decode)")
        if "batches" in flags:
            p.add_argument("--batch", type=int, default=16, help="rows at once (%(default)s)")
            p.add_argument("--workers", type=int, default=2, help="data processes (%(default)s)")
        return p

    p = command(ask, "one question about one or several clips", "segment", "answers")
    p.add_argument("clips", nargs="+", help="audio files: wav, flac, ogg or mp3")
    p.add_argument("--question", required=True)
    p.add_argument("--text-think", nargs="?", const=True, metavar="FOLDER", help="reason in text instead of the block; "
                   "FOLDER: the think folder of Audio Flamingo 3, without it the prompt alone asks for it")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--json", action="store_true", help="one JSON object a clip, with token counts and times")

    p = command(score, "answers to a manifest, and how good they are", "answers", "batches")
    p.description = ("Rows of task asr: WER; with choices: accuracy, weighted F1; " + ", ".join(JUDGED) + ": rated by "
                     "a judge, if there is one; others: exact match. A stopped run goes on with the same command.")
    p.add_argument("data", help="rows.jsonl, mixture.json or tones[:KINDS[:ROWS OF EACH]]")
    p.add_argument("--out", required=True, help="predictions, a JSON line a row as they come")
    p.add_argument("--max-new-tokens", type=int, default=256, help="(%(default)s) the paper's table D: ClothoAQA 8; "
                   "VocalSound, GTZAN, MELD, IEMOCAP 20; MMAU, MMAR 128; SPGISpeech, Switchboard 512; Alpaca-Audio, "
                   "WavCaps 1024; VoxPopuli 2048; others 256")
    p.add_argument("--normaliser", metavar="FILE", help="normalizer.json of a Whisper model: American spelling for WER")
    p.add_argument("--judge", metavar="URL", help="an OpenAI-compatible endpoint such as https://api.openai.com/v1, to "
                   "which questions, references and answers are sent; its key is read from OPENAI_API_KEY")
    p.add_argument("--judge-model", default="gpt-4o-2024-11-20", help="(%(default)s, the paper's)")
    p.add_argument("--judge-price", metavar=("IN", "OUT"), nargs=2, type=float, help="of a million tokens")

    p = command(show, "what the heads reconstruct beside what the teachers hear, as a picture", "segment")
    p.add_argument("clip", help="audio file: wav, flac, ogg or mp3")
    p.add_argument("--question", default="Describe the audio.", help="the block comes after it (%(default)s)")
    p.add_argument("--out", default="show.png", help="(%(default)s)")
    for name in EXPERTS:
        p.add_argument(f"--teacher-{name}", metavar="FILE", help="its checkpoint, if not the one of the run")
    p.add_argument("--random-teachers", action="store_true", help="as in train.py, for tests")
    p.add_argument("--sound-names", metavar="FILE", help="class_labels_indices.csv of AudioSet")

    p = command(probe, "linear probes of the thinking states", "batches")
    p.add_argument("--data", required=True, help="labelled rows: a manifest, or tones[:KINDS[:ROWS OF EACH]]; rows "
                   "with the same \"speaker\", else \"recording\", else audio stay on one side of a split")
    p.add_argument("--label", metavar="KEY", help="of the manifest's rows, instead of the response")
    p.add_argument("--max-new-tokens", type=int, default=20, help="of the model's own answers (%(default)s)")
    p.add_argument("--plot", metavar="FILE", help="a picture")

    p = command(merge, "a plain transformers folder")
    p.add_argument("out", help="folder to write")

    args = parser.parse_args()
    check_least(args, max_new_tokens=1, batch=1, workers=0)
    try:
        args.run(args)
    except BrokenPipeError:    # score .. | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # where the rest goes at exit
        sys.exit(1)
    except OSError as e:    # no such folder, a full disk; what a program wrote before stays
        raise InputError(f"{e}; check the path and the room on the disk") from e
