"""Rows, audio, mixtures, made tones, the batches of a stage, and the rows of known corpora.

    python data.py check assets/clips.jsonl                       # rows, hours, and what would be skipped and why
    python data.py check mixture.json --quick                     # what a stage draws, too; decodes nothing
    python data.py convert clotho /corpora/clotho > clotho.jsonl  # rows of a corpus as its makers lay it out

A manifest holds one JSON object a line; audio paths are relative to its folder, null is a text-only row:
    {"audio": "clips/rain.flac", "prompt": "What is heard?", "response": "rain", "task": "caption"}
Optional: "start" and "end" in seconds (a segment of the file), "seconds" (its length, saves opening the file to sort
by length) and "choices" (the options of a multiple-choice row). A mixture draws from manifests, see read_mixture.
"""
import argparse
import codecs
import csv
import functools
import glob
import hashlib
import json
import math
import os
import re
import signal
import sys
from array import array
from collections import Counter

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from experts import resample_frames
from model import (MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, InputError, build_inputs, check_seconds, check_text,
                   one_line_errors, pad_rows)

MAX_KERNEL = 2 ** 24     # taps of a resampling kernel; an odd rate such as 44,099 Hz would need gigabytes


# ----------------------------------------------------------------------------------------------------------------------
# Audio

def open_audio(path, start=None, end=None):
    """(soundfile.SoundFile, first frame, number of frames) of a file or a segment in seconds; checks all the header says.

    Raises InputError: missing, not audio, empty, too short or too long."""
    if not os.path.isfile(path):
        raise InputError(f"no file '{path}'; check the path")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as e:
        raise InputError(f"cannot decode '{path}' ({e.error_string}); give wav, flac, ogg or mp3") from e
    if not math.isfinite(start or 0) or not math.isfinite(end or 0):
        raise InputError(f"from {start} s to {end} s: give numbers of seconds")
    first = round((start or 0) * file.samplerate)
    last = file.frames if end is None else min(file.frames, round(end * file.samplerate))
    if file.frames == 0:
        raise InputError(f"'{path}' holds no samples; record it again or drop the row")
    if not 0 <= first < last:
        raise InputError(f"'{path}' has nothing from {start or 0} s to {end or 'its end'}; it lasts "
                         f"{file.frames / file.samplerate:.2f} s")
    check_seconds((last - first) / file.samplerate, f"'{path}'")
    return file, first, last - first


def check_wave(wave, rate, what):
    """wave (N,) or (N, channels), any float or array type -> (N,) float32 mono. Raises InputError."""
    wave = torch.as_tensor(wave, dtype=torch.float32)
    wave = wave.mean(1) if wave.ndim == 2 else wave
    if not torch.isfinite(wave).all():
        raise InputError(f"{what} has NaN or infinite samples; export it again")
    check_seconds(len(wave) / rate, what)
    return wave


def read_audio(path, start=None, end=None):
    """((N,) float32 mono in [-1, 1], its sample rate in Hz) of any file that libsndfile decodes. Raises InputError."""
    file, first, count = open_audio(path, start, end)
    with file:
        try:
            file.seek(first)
            wave = file.read(count, dtype="float32", always_2d=True)                # (N, channels)
        except soundfile.LibsndfileError as e:
            raise InputError(f"'{path}' breaks off while decoding ({e.error_string}); export it again") from e
    if len(wave) < 0.99 * count:
        raise InputError(f"'{path}' is cut off: {len(wave)} of {count} samples; copy it again")
    return check_wave(wave, file.samplerate, f"'{path}'"), file.samplerate


def at_rate(wave, rate, new_rate):
    """(N,) at `rate` Hz -> (ceil(N new_rate / rate),) at `new_rate`, windowed sinc."""
    gcd = math.gcd(rate, new_rate)
    if max(rate, new_rate) // gcd * (new_rate // gcd) > MAX_KERNEL:
        raise InputError(f"cannot resample from {rate} Hz; convert the file to a usual rate such as 16000 or 44100 Hz")
    return resample(wave, rate, new_rate)


# ----------------------------------------------------------------------------------------------------------------------
# Sources of rows. Each has len(), load(i) -> a row, lengths: (rows,) seconds, 0 without audio, skipped: [(row number,
# InputError)] of those that cannot be used, files: what it is read from, and draw(n, seed, stage) where that is not
# whole passes over all usable rows.

class Manifest:
    """The rows of JSON-lines files, one after the other. Raises InputError with the line's number if one is malformed.

    Each line is checked once and read again when it is needed, so that a row takes 16 bytes of memory."""

    def __init__(self, *paths):
        self.paths, self.first, self.tasks = paths, [0], []
        starts, stated = array("q"), array("d")    # a row's first byte; its seconds, 0 without audio, nan if not known
        for path in paths:
            if not os.path.isfile(path):
                raise InputError(f"no manifest '{path}'; give a file with one JSON object a line")
            start, tasks = 0, Counter()
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        row = self.parse(line, f"{path}, line {number}")
                        starts.append(start)
                        known = 0 if row["audio"] is None else row["seconds"]
                        stated.append(math.nan if known is None else known)
                        tasks[row["task"]] += 1
                    start += len(line)
            if not tasks:
                raise InputError(f"'{path}' holds no rows; write one JSON object a line")
            self.first.append(len(starts))
            self.tasks.append(tasks)
        self.starts, self.stated = np.array(starts), np.array(stated)

    def parse(self, line, where):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(f"{where}: not JSON ({e.msg} at column {e.colno}); write one JSON object a line") from e
        except UnicodeDecodeError as e:
            raise InputError(f"{where}: not UTF-8; save the file as UTF-8") from e
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object; write {{\"audio\": .., \"prompt\": .., \"response\": ..}}")
        row = {"audio": None, "seconds": None, "task": "qa"} | row
        for key in ("prompt", "response", "task"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise InputError(f"{where}: \"{key}\" is missing or empty; every row needs one")
            if re.search("[\ud800-\udfff]", row[key]):
                raise InputError(f"{where}: \"{key}\" holds half a character (a lone surrogate); remove it")
        choices = row.get("choices") or []
        if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise InputError(f"{where}: \"choices\" is no list of texts; write [\"yes\", \"no\"]")
        if not isinstance(row["audio"], (str, type(None))):
            raise InputError(f"{where}: \"audio\" is no path; give one, or null for a row of text")
        for key in ("start", "end", "seconds"):
            if not isinstance(row.get(key), (int, float, type(None))) or not math.isfinite(row.get(key) or 0):
                raise InputError(f"{where}: \"{key}\" is no number; give seconds")
        if row["audio"] is not None and row["seconds"] is not None and row["seconds"] <= 0:
            raise InputError(f"{where}: \"seconds\" is not above 0; leave it out")
        return row

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        """Row i without its wave. The file is opened anew: processes that share an open one share its position."""
        start = self.starts[i]    # IndexError after the last one, which ends a loop over the rows
        k = np.searchsorted(self.first, i, side="right") - 1
        with open(self.paths[k], "rb") as file:
            file.seek(start)
            row = self.parse(file.readline(), f"{self.paths[k]}, row {i - self.first[k]}")
        if row["audio"] is not None:
            row["audio"] = os.path.join(os.path.dirname(self.paths[k]), row["audio"])
        return row

    files = property(lambda self: self.paths)    # all that it is read from

    @functools.cached_property
    def headers(self):
        """(lengths, skipped), see above; opens the headers of files whose length is not stated, once."""
        lengths, skipped = self.stated.copy(), []
        for i in np.flatnonzero((lengths != 0) & ~((lengths >= MIN_SECONDS) & (lengths <= MAX_SECONDS))).tolist():
            row, lengths[i] = self[i], 0
            try:
                if row["seconds"] is not None:
                    check_seconds(row["seconds"], f"'{row['audio']}'")
                file, _, count = open_audio(row["audio"], row.get("start"), row.get("end"))
                lengths[i] = count / file.samplerate
                file.close()
            except InputError as e:
                skipped.append((i, e))
        return lengths, skipped

    lengths = property(lambda self: self.headers[0])
    skipped = property(lambda self: self.headers[1])

    def load(self, i):
        """The row, with "wave" and "rate" where it has audio. Raises InputError."""
        row = self[i]
        if row["audio"] is not None:
            row["wave"], row["rate"] = read_audio(row["audio"], row.get("start"), row.get("end"))
        return row


def read_mixture(path):
    """({group: share}, [(group, manifest, max_epochs)], rows of a stage) of a mixture file. Raises InputError.

        // lines that start so are comments; paths are relative to this file
        {"groups": {"asr": {"share": 3, "sources": ["a.jsonl", {"rows": "b.jsonl", "max_epochs": 2}]}, ..},
         "max_epochs": 4, "rows": 1600000}

    max_epochs is how often a row may come in a stage, of a source or of all; without it there is no limit. rows only
    tells `check` how long a stage to show: train.py's flags say how long it is."""
    def must(ok, problem):
        if not ok:
            raise InputError(f"'{path}': {problem}; README.md shows a mixture")

    def unique(pairs):    # of two equal names json would keep the last without a word
        must(len(dict(pairs)) == len(pairs), "a name comes twice among " + ", ".join(name for name, _ in pairs))
        return dict(pairs)

    positive = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf
    must(os.path.isfile(path), "no such file")
    with open(path, encoding="utf-8") as file:
        text = "".join("\n" if line.lstrip().startswith("//") else line for line in file)    # lines keep their numbers
    try:
        spec = {"max_epochs": None, "rows": 1_600_000} | dict(json.loads(text, object_pairs_hook=unique))
    except json.JSONDecodeError as e:
        raise InputError(f"{path}, line {e.lineno}: not JSON ({e.msg}); only whole lines can be // comments") from e
    except TypeError as e:
        raise InputError(f"'{path}' is not a JSON object; README.md shows a mixture") from e
    must(set(spec) == {"groups", "max_epochs", "rows"}, "give \"groups\", and \"max_epochs\" and \"rows\" if needed")
    must(isinstance(spec["groups"], dict) and spec["groups"], "there is no group")
    must(type(spec["rows"]) is int and spec["rows"] > 0, "\"rows\" is not a whole number above 0")
    sources = []
    for group, given in spec["groups"].items():
        must(isinstance(given, dict) and set(given) == {"share", "sources"}, f"{group} needs \"share\" and \"sources\"")
        must(positive(given["share"]), f"the share of {group} is not a number above 0")
        must(isinstance(given["sources"], list) and given["sources"], f"{group} lists no sources")
        for source in given["sources"]:
            source = {"max_epochs": spec["max_epochs"]} | (source if isinstance(source, dict) else {"rows": source})
            must(set(source) == {"rows", "max_epochs"} and isinstance(source["rows"], str),
                 f"a source of {group} is neither a path nor {{\"rows\": path, \"max_epochs\": number}}")
            cap = math.inf if source["max_epochs"] is None else source["max_epochs"]
            must(cap == math.inf or positive(cap), f"max_epochs of {source['rows']} is not a number above 0")
            sources.append((group, os.path.join(os.path.dirname(path), source["rows"]), cap))
    return {group: given["share"] for group, given in spec["groups"].items()}, sources, spec["rows"]


def allot(n, weights, caps):
    """Whole numbers by weights (largest remainders), none above its cap, that sum to n or, if less, to the sum of caps.

    What a full one cannot take goes to the others by their weights."""
    weights, caps = np.asarray(weights, float), np.asarray(caps)
    counts, free = np.zeros(len(caps), int), np.ones(len(caps), bool)
    while free.any():
        ideal = np.where(free, (n - counts.sum()) * weights / weights[free].sum(), 0)
        full = free & (ideal >= caps)
        if not full.any():
            counts += ideal.astype(int)
            counts[np.argsort(-(ideal % 1), kind="stable")[:n - counts.sum()]] += 1
            break
        counts[full], free = caps[full], free & ~full
    return counts


class Mixture(Manifest):
    """Manifests in groups with shares, from a file as in read_mixture (appendix A). Raises InputError.

    A stage draws each group by its share and the sources in it alike, each in whole passes and none beyond its
    max_epochs. What a source cannot give goes to the others of its group. Appendix A caps epochs and yet fixes the rows
    of a stage (its steps follow from them), so what a group cannot give goes to the other groups; report() says so."""

    def __init__(self, path):
        self.shares, sources, self.stage_rows = read_mixture(path)
        self.path, (self.groups, paths, self.max_epochs) = path, zip(*sources)
        super().__init__(*paths)

    files = property(lambda self: (self.path, *self.paths))

    @functools.cached_property
    def usable(self):
        """[row numbers that can be used] of each source."""
        return np.split(usable_rows(self), np.searchsorted(usable_rows(self), self.first[1:-1]))

    def caps(self, n):
        """(sources,) the most rows of each in a stage of n."""
        limits = zip(self.max_epochs, self.usable)
        return np.array([int(min(n, limit * len(rows))) if len(rows) else 0 for limit, rows in limits])

    def counts(self, n):
        """(sources,) how many of the n rows of a stage come from each. Raises InputError if there are not that many."""
        caps, groups, counts = self.caps(n), np.array(self.groups), np.zeros(len(self.groups), int)
        budget = allot(n, list(self.shares.values()), [caps[groups == group].sum() for group in self.shares])
        if budget.sum() < n:
            raise InputError(f"a stage of {n} rows, but '{self.path}' has {budget.sum()} under its max_epochs; "
                             "train fewer steps, raise max_epochs or add rows")
        for group, rows in zip(self.shares, budget):
            counts[groups == group] = allot(rows, np.ones(self.groups.count(group)), caps[groups == group])
        return counts

    def draw(self, n, seed, stage):
        """(n,) row numbers of a stage in random order; each row of a source comes k or k + 1 times."""
        rng = np.random.default_rng([seed, stage])
        return rng.permutation(np.concatenate([passes(rows, k, rng) for rows, k in zip(self.usable, self.counts(n))]))

    def report(self, n):
        """Lines that say what a stage of n rows draws, and where max_epochs keeps it from the shares of the file."""
        counts, caps, lengths, total = self.counts(n), self.caps(n + 1), self.lengths, sum(self.shares.values())
        lines = [f"{'usable rows':>14}{'hours':>10}{'share':>8}{'drawn':>10}{'epochs':>8}"]
        for group, share in self.shares.items():
            at = [k for k, g in enumerate(self.groups) if g == group]
            drawn, meant = counts[at].sum(), n * share / total
            lines.append(f"{'':24}{drawn / n:8.2%}{drawn:10}{'':8}  {group}" + (
                f": {meant - drawn:.0f} short of its share, left to other groups" if drawn < meant - 1 else
                f": {drawn - meant:.0f} above its share, for other groups" if drawn > meant + 1 else ""))
            for k in at:
                rows = self.usable[k]
                lines.append(f"{len(rows):14}{lengths[rows].sum() / 3600:10.1f}{counts[k] / n:8.2%}{counts[k]:10}"
                             f"{counts[k] / max(1, len(rows)):8.2f}    {self.paths[k]}"
                             + ", no more by its max_epochs" * bool(counts[k] == caps[k]))
        return lines


def open_source(text, split="heldout", rows=None):
    """The rows of a manifest (rows.jsonl), a mixture (.json), or synthetic tones: tones[:KINDS[:ROWS OF EACH]].

    split, rows     of tones: "train" or "heldout", and how many rows in all, which the text then must not say
    Raises InputError."""
    name, *more = text.split(":")
    if name != "tones":
        return Mixture(text) if text.endswith(".json") else Manifest(text)
    kinds = more[0].split(",") if more and more[0] else list(TONES)
    each = more[1] if len(more) > 1 else "60"
    usage = "tones[:KINDS[:ROWS OF EACH]]" if rows is None else "tones[:KINDS]"
    if len(more) > (1 if rows else 2) or set(kinds) - set(TONES) or not each.isdigit() or int(each) < 1:
        raise InputError(f"'{text}': give {usage} with KINDS from {','.join(TONES)}")
    return Tones(split, rows or int(each) * len(kinds), kinds)


def fingerprint(source):
    """Hex digest of what the plan of a stage follows from: the source's files and the lengths of its audio."""
    found = hashlib.sha256(source.lengths.tobytes())
    for path in source.files:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


# What has to be heard, the question, and every possible answer. Chance is one over their number.
TONES = {
    "louder": ("Which half is louder?", ("first", "last")),
    "glide": ("Up, down or flat?", ("up", "down", "flat")),
    "clicks": ("How many clicks?", ("1", "2", "3", "4")),
    "timbre": ("Which sound?", ("flute", "buzzer", "bell", "noise")),
    "voices": ("How many notes?", ("1", "2", "3")),
    "note": ("Which note?", ("C", "D", "E", "F", "G", "A", "B")),
}
SEMITONES = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11)))


class Tones:
    """Made sounds with a question that only the sound answers; row i of a split is the same on every machine.

    split  "train" or "heldout", drawn from separate random streams;  n: number of rows"""

    files, skipped = (), ()

    def __init__(self, split, n, kinds=tuple(TONES)):
        self.split, self.kinds = ("train", "heldout").index(split), tuple(kinds)
        self.lengths = 1.2 + 0.8 * (np.arange(n) * 0.6180339887 % 1)    # 1.2 to 2 s, evenly (golden-ratio steps)

    def __len__(self):
        return len(self.lengths)

    def load(self, i):
        kind = self.kinds[i % len(self.kinds)]
        question, answers = TONES[kind]
        rng = np.random.default_rng([self.split, i])
        answer = answers[rng.integers(len(answers))]
        n = round(SAMPLE_RATE * self.lengths[i])
        wave = globals()[f"make_{kind}"](rng, n, answer)
        level = rng.uniform(0.1, 0.7) / np.abs(wave).max()
        wave = level * wave + 10 ** rng.uniform(-4, -2.3) * rng.standard_normal(n)      # background, -80 to -46 dB
        return {"wave": torch.tensor(wave, dtype=torch.float32), "rate": SAMPLE_RATE, "prompt": question,
                "response": answer, "choices": answers, "task": kind}


def partials(f, timbre, rng):
    """f (N,) Hz -> (N,) a tone of that momentary frequency; the timbre sets the partials' ratios and strengths."""
    ratios, strengths = {"flute": ((1, 2), (1, 0.15)), "buzzer": ((1, 3, 5, 7, 9), (1, 1, 0.8, 0.6, 0.5)),
                         "bell": ((1, 2.76, 5.4), (1, 0.8, 0.6)),
                         "reed": ((1, 2, 3, 4, 5), (1, 0.7, 0.5, 0.35, 0.25))}[timbre]
    phase = 2 * np.pi * np.cumsum(f) / SAMPLE_RATE
    return sum(s * np.sin(r * phase + rng.uniform(0, 2 * np.pi)) for r, s in zip(ratios, strengths))


def placed(rng, n, shortest, longest):
    """An envelope (n,) with 10 ms flanks and random onset and length (shares of n)."""
    length = int(n * rng.uniform(shortest, longest))
    onset, t = rng.integers(0, n - length + 1), np.arange(n) / SAMPLE_RATE
    return np.clip(np.minimum(t - onset / SAMPLE_RATE, (onset + length) / SAMPLE_RATE - t) / 0.01, 0, 1)


def any_pitch(rng, low=220.0, octaves=2.0):
    return low * 2 ** rng.uniform(0, octaves)


def make_louder(rng, n, answer):
    quiet = 10 ** (-rng.uniform(10, 20) / 20)                                           # 10 to 20 dB apart
    gains = (1, quiet) if answer == "first" else (quiet, 1)
    t, middle = np.arange(n) / n, rng.uniform(0.4, 0.6)
    return rng.standard_normal(n) * np.where(t < middle, *gains)


def make_glide(rng, n, answer):
    octaves = rng.uniform(0.5, 1.5) * {"up": 1, "down": -1, "flat": 0}[answer]
    f = any_pitch(rng, 400, 1) * 2 ** (octaves * np.linspace(-0.5, 0.5, n))
    return partials(f, rng.choice(["flute", "reed"]), rng) * placed(rng, n, 0.7, 1)


def make_clicks(rng, n, answer):
    times = np.sort(rng.choice(np.arange(1, 10), int(answer), replace=False) + rng.uniform(-0.2, 0.2, int(answer)))
    wave, decay = np.zeros(n), np.exp(-np.arange(int(0.05 * SAMPLE_RATE)) / (0.01 * SAMPLE_RATE))
    for t in times:
        start = int(n * t / 10)
        burst = decay * rng.standard_normal(len(decay))
        wave[start:start + len(decay)] += burst[:n - start]
    return wave


def make_timbre(rng, n, answer):
    tone = rng.standard_normal(n) if answer == "noise" else partials(np.full(n, any_pitch(rng)), answer, rng)
    return tone * placed(rng, n, 0.5, 0.9)


def make_voices(rng, n, answer):
    intervals = {"1": (0,), "2": (0, rng.choice([4, 7, 9])), "3": (0, rng.choice([3, 4]), 7)}[answer]
    root = any_pitch(rng)
    return sum(partials(np.full(n, root * 2 ** (i / 12)), "flute", rng) for i in intervals) * placed(rng, n, 0.6, 0.9)


def make_note(rng, n, answer):
    f = 440 * 2 ** ((SEMITONES[answer] - 9) / 12 + rng.integers(0, 2) + rng.uniform(-0.1, 0.1) / 12)    # octave 4 or 5
    return partials(np.full(n, f), rng.choice(["flute", "reed"]), rng) * placed(rng, n, 0.6, 0.9)


# ----------------------------------------------------------------------------------------------------------------------
# Stages and batches

def passes(rows, n, rng):
    """n of the rows: whole passes over them in random order, the last one perhaps cut short."""
    return np.concatenate([rows[:0], *(rng.permutation(rows) for _ in range(-(-n // max(1, len(rows)))))])[:n]


def usable_rows(source):
    """Row numbers that can be used, as far as headers and stated lengths tell."""
    return np.setdiff1d(np.arange(len(source)), [i for i, _ in source.skipped])


def plan_stage(source, steps, batch, seed, stage, window=50):
    """(steps, batch) row numbers, rows of a step alike in length: what the source draws for this stage, or else whole
    passes over its usable rows in random order.

    A function of its arguments alone, so that a resumed run only needs to know its step. `window` steps at a time are
    drawn, sorted by length and dealt out again in random order."""
    lengths, usable = source.lengths, usable_rows(source)
    if not len(usable):
        raise InputError(f"none of the {len(source)} rows can be used; the first: {source.skipped[0][1]}")
    rng = np.random.default_rng([seed, stage])
    need = steps * batch
    drawn = source.draw(need, seed, stage) if hasattr(source, "draw") else passes(usable, need, rng)
    plan = []
    for start in range(0, need, window * batch):
        rows = drawn[start:start + window * batch]
        rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(-1, batch)
        plan.append(rows[rng.permutation(len(rows))])
    return np.concatenate(plan)


class Rows(torch.utils.data.Dataset):
    """Loads rows of a source for a DataLoader; a row that cannot be read becomes its InputError."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        try:
            return self.source.load(i) | {"row": int(i)}
        except InputError as e:
            return e


def collate(rows, spec, rates=(), think=True, responses=True):
    """Loaded rows -> the batch of build_inputs, with what training and scoring need beside it:

    waves {rate: [(N,) or None, one a row]} for the teachers, rows (the loaded rows), seconds (of audio), skipped
    (InputErrors). None of the rows usable: only `rows` (empty) and `skipped`."""
    kept, skipped = [], []
    for row in rows:
        if isinstance(row, InputError):
            skipped.append(row)
            continue
        try:
            check_text(spec, row["prompt"] + row["response"])
            kept.append((row, {rate: at_rate(row["wave"], row["rate"], rate) if "wave" in row else None
                               for rate in {SAMPLE_RATE, *rates}}))
        except InputError as e:
            skipped.append(InputError(f"row {row.get('row')}: {e}"))
    if not kept:
        return {"rows": [], "skipped": skipped}
    rows, waves = zip(*kept)
    waves = {rate: [w[rate] for w in waves] for rate in waves[0]}
    batch = build_inputs(spec, waves[SAMPLE_RATE], [row["prompt"] for row in rows],
                         [row["response"] for row in rows] if responses else None, think=think)
    seconds = sum(len(row["wave"]) / row["rate"] for row in rows if "wave" in row)
    keep = [{k: v for k, v in row.items() if k != "wave"} for row in rows]
    return batch | {"waves": waves, "rows": keep, "seconds": seconds, "skipped": skipped}


def to_device(batch, device):
    """Moves the tensors of a batch, and of the dicts in it, except the teachers' waves (they go one by one)."""
    move = lambda v: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
    return {k: {j: move(w) for j, w in v.items()} if k == "audio" else move(v) for k, v in batch.items()}


def teacher_targets(experts, batch):
    """{name: (B, L, E)} features of the frozen experts at the 25 Hz of the thinking tokens, clip by clip, unpadded.

    Unpadded because clip-wide normalisation, reflection at the ends and ALiBi all depend on the true length.
    In fp32 (a GPU's convolutions: TF32), since bf16 would show in their log spectra."""
    targets, lengths = {}, batch["n_audio"]
    for name, expert in experts.items():
        frames = [torch.zeros(0, expert.dim, device=lengths.device)]    # a batch without audio has no frames
        for wave, n in zip(batch["waves"][expert.sample_rate], lengths.tolist()):
            if wave is not None:
                z = expert(wave.to(lengths.device))                                     # (F, E)
                frames.append(resample_frames(z, n, expert.frame_rate, expert.offset))
        targets[name] = pad_rows(torch.cat(frames), lengths)[0]
    return targets


# ----------------------------------------------------------------------------------------------------------------------
# Corpora. A generator yields rows, and reasons (str) why one is left out; its docstring is the layout it reads.

# Several wordings a task. The paper names its tasks, not its prompts: these are ours. {} is the row's own question.
WORDINGS = {
    "asr": ("Transcribe the speech.", "Transcribe the audio.", "What does the speaker say?", "Write down what is said.",
            "Recognize the speech and give the transcript.", "Please convert the speech into text."),
    "qa": ("{}", "{} Answer briefly.", "Listen to the audio and answer: {}", "Answer the question about the audio. {}"),
    "caption": ("Describe the audio.", "What is heard?", "Write a caption for this audio clip.",
                "Describe the sounds in one sentence.", "What is happening in this recording?"),
    "emotion": ("Which emotion does the speaker express?", "How does the speaker feel?",
                "What is the emotion of the speech?", "Choose the emotion that fits the speaker's voice."),
    "music": ("Describe the music.", "What does this piece of music sound like?", "Write a caption for this music.",
              "Describe the genre, the instruments and the mood of this piece."),
    "spoken_instruction": ("Follow the spoken instruction.", "Answer the question in the audio.",
                           "Respond to the speaker."),
    "mcq": ("{}",), "text": ("{}",),
}
# Some tables mix Latin-1 into their UTF-8.
codecs.register_error("latin-1", lambda e: (e.object[e.start:e.end].decode("latin-1"), e.end))


def digest(*words):
    return hashlib.md5(" ".join(words).encode()).digest()


@functools.lru_cache(1024)
def listing(folder):
    """{name without its ending: path} of a folder's audio files; to ask for a million files one by one is slow."""
    names = [os.path.splitext(name) for name in (os.listdir(folder) if os.path.isdir(folder) else ())]
    return {n: os.path.join(folder, n + end) for n, end in names if end in (".wav", ".flac", ".ogg", ".opus", ".mp3")}


def make_row(task, response, places=(), question="", wordings=None, **more):
    """A row, or why it is left out.  places: where its audio may lie, whatever the file's ending."""
    split = [(os.path.dirname(p), os.path.splitext(os.path.basename(p))[0]) for p in places]
    found = [listing(folder)[name] for folder, name in split if name in listing(folder)]
    if places and not found:
        return "no audio file"
    wordings = wordings or WORDINGS[task]
    number = int.from_bytes(digest(os.path.basename(found[0]) if found else "", question, response)[:4], "big")
    prompt = wordings[number % len(wordings)].format(question.strip()).strip()
    if not prompt or not response.strip():
        return "empty text"
    return {"audio": found[0] if found else None, "prompt": prompt, "response": response.strip(), "task": task} | more


def make_choice(place, question, choices, answer, **more):
    """A multiple-choice row: "Question? A. this B. that", answered with "B. that"."""
    lettered = [f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", choices)]
    return make_row("mcq", lettered[choices.index(answer)], [place], " ".join([question, *lettered]), choices=choices,
                    **more)


def make_emotion(place, emotions, answer, **more):
    """make_choice() among emotions, in an order of the clip's own, so that no letter is a hint."""
    name = os.path.basename(place)
    question = WORDINGS["emotion"][digest(name)[0] % len(WORDINGS["emotion"])]
    return make_choice(place, question, sorted(emotions, key=lambda e: digest(name, e)), answer, **more)


def first_of(*paths):
    """The first path that is there, or else the first of all, for the error to name."""
    return next((path for path in paths if os.path.exists(path)), paths[0])


def table(path, quoted=True):
    """The dicts of a file with a JSON object a line (.json), or a header line and cells between commas, tabs, bars."""
    csv.field_size_limit(2 ** 24)
    with open(path, encoding="utf-8-sig", errors="latin-1", newline="") as file:
        if path.endswith(".json"):
            yield from map(json.loads, file)
            return
        mark = max(",\t|", key=file.readline().count)
        file.seek(0)
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        yield from csv.DictReader(file, delimiter=mark, quoting=quoting, restval="")


def from_table(task, tables, places, responses, questions=(), quoted=True, seconds=None, wordings=None):
    """A corpus that is a table. Templates with its columns say where the audio may lie and what the rows are: one for
    each of the responses, about the first of the questions that is not empty."""
    def corpus(root, split):
        for r in table(first_of(*(os.path.join(root, t.format(split=split)) for t in tables)), quoted):
            fill = lambda templates: [template.format_map(r | {"split": split}) for template in templates]
            audio = [os.path.join(root, place) for place in fill(places)]
            question = next(filter(str.strip, fill(questions)), "")
            for response in fill(responses):
                yield make_row(task, response, audio, question, wordings,
                               **({"seconds": round(seconds(r), 3)} if seconds else {}))
    corpus.__doc__ = (" or ".join(f"ROOT/{t}" for t in tables) + f" with {', '.join([*responses, *questions])}"
                      + (", audio " if places else "") + " or ".join(f"ROOT/{p}" for p in places))
    return corpus


def librispeech(root, split):
    """ROOT/SPLIT/SPEAKER/CHAPTER/*.trans.txt, lines "ID TEXT", and ID.flac beside it"""
    folder = first_of(f"{root}/{split}", f"{root}/LibriSpeech/{split}")
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*/*/*.trans.txt")):
        with open(path, encoding="utf-8") as file:
            for name, text in (line.split(" ", 1) for line in file):    # all in capitals, which say nothing
                yield make_row("asr", text.lower(), [f"{os.path.dirname(path)}/{name}.flac"])


def common_voice(root, split):
    """ROOT/SPLIT.tsv with path, sentence, and audio in ROOT/clips (and ROOT/clip_durations.tsv in later releases); ROOT
    is the folder of the language"""
    lengths = f"{root}/clip_durations.tsv"
    lengths = {r["clip"]: int(r["duration[ms]"]) / 1000 for r in table(lengths)} if os.path.exists(lengths) else {}
    for r in table(f"{root}/{split}.tsv", quoted=False):
        stated = {"seconds": lengths[r["path"]]} if r["path"] in lengths else {}
        yield make_row("asr", r["sentence"], [f"{root}/clips/{r['path']}"], **stated)


def gigaspeech(root, split):
    """ROOT/GigaSpeech.json with audios and their segments, and audio in ROOT/audio; SPLIT is a subset: XL, L, M, S, XS,
    DEV, TEST"""
    with open(f"{root}/GigaSpeech.json", encoding="utf-8") as file:
        audios = json.load(file)["audios"]    # one object for 10,000 hours: takes many GB of memory
    for audio in audios:
        for s in audio["segments"]:
            if f"{{{split}}}" not in s["subsets"]:
                continue
            text = re.sub("<(MUSIC|NOISE|SIL|OTHER)>", " ", s["text_tn"])    # stripped, and dropped if emptied (app. B)
            for tag, mark in (("COMMA", ","), ("PERIOD", "."), ("QUESTIONMARK", "?"), ("EXCLAMATIONPOINT", "!")):
                text = re.sub(rf"\s*<{tag}>", mark, text)
            start, end, text = s["begin_time"], s["end_time"], " ".join(text.lower().split())
            yield make_row("asr", text, [f"{root}/{audio['path']}"], start=start, end=end,
                           seconds=round(end - start, 3)) if re.search(r"\w", text) else "nothing but tags"


def iemocap(root, split):
    """ROOT/SessionN/dialog/EmoEvaluation/DIALOG.txt, and audio in ROOT/SessionN/sentences/wav/DIALOG; SPLIT is train
    (sessions 1 to 4) or test (session 5)"""
    labels = {"ang": "angry", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"}    # the usual four
    for session in {"train": (1, 2, 3, 4), "test": (5,)}[split]:
        for path in sorted(glob.glob(f"{glob.escape(root)}/Session{session}/dialog/EmoEvaluation/Ses*.txt")):
            with open(path, encoding="utf-8", errors="latin-1") as file:
                turns = re.findall(r"^\[([\d.]+) - ([\d.]+)\]\t(\w+)\t(\w+)\t", file.read(), re.M)
            for start, end, turn, label in turns:
                place = f"{root}/Session{session}/sentences/wav/{turn.rsplit('_', 1)[0]}/{turn}.wav"
                yield make_emotion(place, ["angry", "happy", "sad", "neutral"], labels[label], seconds=round(
                    float(end) - float(start), 3)) if label in labels else f"of emotion {label}"


def meld(root, split):
    """ROOT/SPLIT_sent_emo.csv and ROOT/train_splits, dev_splits_complete, output_repeated_splits_test (or both in
    ROOT/SPLIT), and beside each of their .mp4 its sound: ffmpeg -i dia0_utt0.mp4 dia0_utt0.wav"""
    emotions = ["neutral", "joy", "sadness", "anger", "surprise", "fear", "disgust"]
    folder = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}[split]
    folder = first_of(f"{root}/{folder}", f"{root}/{split}/{folder}")
    for r in table(first_of(f"{root}/{split}_sent_emo.csv", f"{root}/{split}/{split}_sent_emo.csv")):
        yield make_emotion(f"{folder}/dia{r['Dialogue_ID']}_utt{r['Utterance_ID']}.wav", emotions, r["Emotion"].strip())


def librisqa(root, split):
    """ROOT/LibriSQA-PartI/LibriSQA-PartI-train.json and the like, and LibriSpeech's train-clean-360 and test-clean in
    ROOT/LibriSpeech"""
    part, kind = split.split("-")
    folder = f"{root}/LibriSpeech/{'train-clean-360' if kind == 'train' else 'test-clean'}"
    with open(f"{root}/LibriSQA-{part}/LibriSQA-{split}.json", encoding="utf-8") as file:
        items = json.load(file)
    for r in items:
        name = os.path.splitext(os.path.basename(r["speech_path"]))[0]    # SPEAKER-CHAPTER-NUMBER
        place, seconds = f"{folder}/{'/'.join(name.split('-')[:2])}/{name}.flac", round(float(r["duration"]), 3)
        if part == "PartI":
            yield make_row("qa", r["answer"], [place], r["question"], seconds=seconds)
            continue
        parts = re.match(r"(.*\S)" + "".join(rf"\s+{x}[.):]\s*(.*?)" for x in "ABCD") + r"\s*$",
                         r["question_and_option"], re.S)
        letter = "ABCD".find(r["answer"].strip()[:1] or "-")
        if not parts or letter < 0:
            yield "without options A to D and the letter of one"
            continue
        question, *options = (" ".join(text.split()) for text in parts.groups())
        yield make_choice(place, question, options, options[letter], seconds=seconds)    # in order: "all of the above"


CORPORA = {    # the generator, and the splits to train on
    "librispeech": (librispeech, ["train-clean-100", "train-clean-360", "train-other-500"]),
    "common_voice": (common_voice, ["train"]),
    "gigaspeech": (gigaspeech, ["XL"]),
    "voxpopuli": (from_table("asr", ["transcribed_data/en/asr_{split}.tsv"], ["transcribed_data/en/{id:.4}/{id}.ogg"],
                             ["{normalized_text}"], quoted=False), ["train"]),
    "spgispeech": (from_table("asr", ["{split}.csv"], ["{split}/{wav_filename}", "spgispeech/{split}/{wav_filename}"],
                              ["{transcript}"], quoted=False,    # a header of 44 bytes, then 16 bits at 16 kHz
                              seconds=lambda r: (int(r["wav_filesize"]) - 44) / 32000), ["train"]),
    "audiocaps": (from_table("caption", ["{split}.csv", "dataset/{split}.csv"], [    # its audio has no official place
        "{split}/{audiocap_id}.wav", "{split}/{youtube_id}.wav", "{split}/{youtube_id}_{start_time}.wav"],
        ["{caption}"]), ["train"]),
    "clotho": (from_table("caption", ["clotho_captions_{split}.csv"], ["{split}/{file_name}"],
                          [f"{{caption_{k}}}" for k in range(1, 6)]), ["development"]),
    "clotho_aqa": (from_table("qa", ["clotho_aqa_{split}.csv"], ["audio_files/{file_name}"], ["{answer}"],
                              ["{QuestionText}"]), ["train"]),
    "iemocap": (iemocap, ["train"]),
    "meld": (meld, ["train"]),
    "librisqa": (librisqa, ["PartI-train", "PartII-train"]),
    "musicbench": (from_table("music", ["MusicBench_{split}.json"], ["datashare/{location}", "{location}"],
                              ["{main_caption}"]), ["train"]),
    "wildjailbreak": (from_table("text", ["{split}/{split}.tsv"], [], ["{completion}"], ["{adversarial}", "{vanilla}"]),
                      ["train"]),
}


def layout_of(corpus):
    return " ".join(corpus.__doc__.split())


def convert(args):
    """Rows to stdout; to stderr how many, and how many were left out and why."""
    root, written, dropped = os.path.abspath(args.root), 0, Counter()
    if args.name == "csv":    # columns by name; the audio lies relative to the table
        column = lambda name: [f"{{{name}}}"] if name else []
        corpus, splits = from_table(args.task, [os.path.basename(root)], column(args.audio), column(args.response),
                                    column(args.prompt), wordings=["{}"] if args.prompt else None), ["all"]
        root = os.path.dirname(root)
    else:
        corpus, splits = CORPORA[args.name]
    layout = f"{args.name} has to lie as {layout_of(corpus)}"
    for split in args.split or splits:
        try:
            for row in corpus(root, split):
                if isinstance(row, str):
                    dropped[row] += 1
                else:
                    print(json.dumps(row, ensure_ascii=False))
                    written += 1
        except KeyError as e:
            raise InputError(f"nothing is called {e} in '{args.root}'; {layout}") from e
        except (FileNotFoundError, NotADirectoryError) as e:
            raise InputError(f"no file '{e.filename}'; {layout}") from e
        except (ValueError, TypeError, csv.Error) as e:
            raise InputError(f"'{args.root}' holds something else ({str(e).splitlines()[0]}); {layout}") from e
    why = "".join(f", {n} {reason}" for reason, n in dropped.most_common())
    print(f"{args.name}: {written} rows, {dropped.total()} left out{why}", file=sys.stderr)
    if not written:
        raise InputError(f"no rows in '{args.root}'; {layout}")


def check(args):
    """Prints what a manifest or mixture holds and what training would skip and why -> whether there is any."""
    source = open_source(args.path)
    lengths, bad = source.lengths, source.skipped
    if not args.quick:
        bad = [(i, e) for i in range(len(source)) if isinstance(e := Rows(source)[i], InputError)]
    tasks = sum(source.tasks, Counter())
    print(f"{len(source)} rows, {lengths.sum() / 3600:.3f} h, " + ", ".join(f"{n} {t}" for t, n in tasks.items()))
    if isinstance(source, Mixture):
        print("\n".join([f"a stage of {source.stage_rows} rows:", *source.report(source.stage_rows)]))
    print(f"{len(bad)} would be skipped" + ", by headers and stated lengths" * args.quick)
    for path, a, b in zip(source.paths, source.first, source.first[1:]):
        here = [f"  {path}, row {i - a}: {why}" for i, why in bad if a <= i < b]
        for line in here[:20] + [f"  {path}: {len(here) - 20} more"] * (len(here) > 20):
            print(line)
    return bool(bad)


if __name__ == "__main__":
    one_line_errors()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)    # convert .. | head
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="what a manifest or a mixture holds and what would be skipped")
    p.set_defaults(run=check)
    p.add_argument("path", help="rows.jsonl or mixture.json")
    p.add_argument("--quick", action="store_true", help="believe headers and stated lengths, decode nothing")
    p = commands.add_parser("convert", help="the rows of a corpus",
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            epilog="\n".join(f"{name}: {layout_of(corpus)}" for name, (corpus, _) in CORPORA.items()))
    p.set_defaults(run=convert)
    p.add_argument("name", choices=[*CORPORA, "csv"], metavar="NAME", help=", ".join(CORPORA) + "; csv: any table")
    p.add_argument("root", metavar="ROOT", help="the folder of the corpus, see below; for csv the table")
    p.add_argument("--split", nargs="+", help="instead of those to train on")
    p.add_argument("--audio", help="csv: column with audio files relative to the table (none: text only)")
    p.add_argument("--prompt", help="csv: column with prompts (none: our wordings for the task)")
    p.add_argument("--response", default="response", help="csv: column with responses (%(default)s)")
    p.add_argument("--task", default="qa", choices=[t for t in WORDINGS if t != "emotion"], help="csv: (%(default)s)")
    args = parser.parse_args()
    sys.exit(args.run(args))
