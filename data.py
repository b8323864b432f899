"""Rows, audio, mixtures, synthetic tones, the batches of a stage, and the rows of known corpora.

    python data.py check assets/clips.jsonl      # rows, hours, what would be skipped and why
    python data.py check MIXTURE.json --quick    # what a stage draws, too; decodes nothing
    python data.py convert clotho ROOT           # rows of a corpus as its makers lay it out
    python data.py convert mmau ROOT             # or of a benchmark

A manifest holds one JSON object a line; audio paths are relative to it, null is a row of text:

    {"audio": "clips/rain.flac", "prompt": "What is heard?", "response": "rain", "task": "caption"}

Optional: "start" and "end" in seconds (a segment of the file), "seconds" (its length, saves opening
the file to sort by length), "choices" (the options of a multiple-choice row) and "question" (what a
judge is shown instead of the prompt). A mixture draws from manifests; README.md shows one.
"""
import argparse
import ast
import codecs
import csv
import functools
import glob
import hashlib
import json
import math
import os
import re
import string
import sys
from array import array
from collections import Counter

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from experts import EXPERTS, resample_frames
from model import (ASSETS, BACKBONES, IGNORE, MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, InputError,
                   build_inputs, check_seconds, check_text, encode_row, load_coat, one_line_errors,
                   pad_batch, pad_rows)

MAX_KERNEL = 2 ** 24    # taps of a resampling kernel; for 44,099 Hz it would take gigabytes


# --------------------------------------------------------------------------------------------------
# Audio

def open_audio(path, start=None, end=None):
    """Opens a file, or a segment of it in seconds, and checks what its header says.

    Returns (soundfile.SoundFile, first frame, number of frames). Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"no file '{path}'; check the path")
    try:
        file = soundfile.SoundFile(path)
    except (OSError, TypeError, soundfile.LibsndfileError) as e:    # TypeError: .raw has no header
        raise InputError(f"cannot decode '{path}' ({e}); give wav, flac, ogg or mp3") from e
    first = round((start or 0) * file.samplerate)
    last = file.frames if end is None else min(file.frames, round(end * file.samplerate))
    if last == file.frames and is_cut(file):
        raise InputError(f"'{path}' is cut off; copy it again")
    if not 0 <= first < last:
        raise InputError(f"'{path}' has no samples from {start or 0} s to {end or 'its end'}; "
                         f"it lasts {file.frames / file.samplerate:.2f} s")
    check_seconds((last - first) / file.samplerate, f"'{path}'")
    return file, first, last - first


def is_cut(file):
    """Whether a WAV or OGG file ends early. libsndfile reads what is left; only its log tells. (A
    program that writes into a pipe states 2 GB or more.)"""
    stated = re.search(r"^data : (\d+) \(should be", file.extra_info, re.M)
    is_cut_wav = stated and int(stated[1]) < 0x7ffff000
    return bool(is_cut_wav) or "Junk after the last page" in file.extra_info


def read_audio(path, start=None, end=None):
    """A file, or a segment of it in seconds -> ((N,) float32 mono in [-1, 1], its rate in Hz).

    Reads whatever libsndfile decodes. Raises InputError."""
    file, first, count = open_audio(path, start, end)
    with file:
        try:
            file.seek(first)
            channels = file.read(count, dtype="float32", always_2d=True)    # (N, channels)
        except soundfile.LibsndfileError as e:
            raise InputError(f"'{path}' breaks off ({e.error_string}); export it again") from e
    wave = torch.from_numpy(channels).mean(1)
    if len(wave) < 0.99 * count or not wave.isfinite().all():
        raise InputError(f"'{path}' is cut off or has NaN; export it again")
    return wave, file.samplerate


def at_rate(wave, rate, new_rate):
    """(N,) at `rate` Hz -> (ceil(N new_rate / rate),) at `new_rate` Hz. Raises InputError."""
    taps = math.lcm(rate, new_rate) // math.gcd(rate, new_rate)
    if taps > MAX_KERNEL:
        raise InputError(f"cannot resample from {rate} to {new_rate} Hz; convert the file to a "
                         "usual rate such as 16000 or 44100 Hz")
    return resample(wave, rate, new_rate)


# --------------------------------------------------------------------------------------------------
# Sources of rows. Each has
#   len()       number of rows
#   load(i)     row i, with "wave" (N,) and "rate" in Hz if it has audio; raises InputError
#   lengths     (rows,) seconds of audio, 0 without
#   skipped     [(row number, InputError)] of those that headers and stated lengths rule out
#   files       what it is read from
#   draw(n, seed, stage)    (n,) row numbers of a stage in random order

def open_source(text, training_rows=None, seed=0):
    """A manifest (rows.jsonl), a mixture (.json), or synthetic tones: tones[:KINDS[:N]].

    training_rows   how many rows training takes in all. Of tones there are as many, or, with N, N
                    labelled clips of each kind and as many without a label.
                    None: held-out tones, N rows of each kind (60)
    seed            of the labelled clips"""
    if not re.match("tones(:|$)", text):
        return Mixture(text) if text.endswith(".json") else Manifest(text)
    found = re.fullmatch(r"tones(?::([\w,]*)(?::([1-9]\d{0,5}))?)?", text)
    kinds = (found and found[1] or ",".join(DEFAULT_TONES)).split(",")
    if not found or set(kinds) - set(TONES):
        raise InputError(f"'{text}': give tones[:KINDS[:N]] with KINDS from {','.join(TONES)} and "
                         "N from 1 to 999999")
    if training_rows is None:
        return Tones("heldout", int(found[2] or 60) * len(kinds), kinds)
    return Tones("train", training_rows, kinds, int(found[2] or 0), seed)


def usable_rows(source):
    """(usable,) row numbers that can be used, as far as headers and stated lengths tell."""
    return np.setdiff1d(np.arange(len(source)), [i for i, _ in source.skipped])


def passes(rows, n, rng):
    """(n,) of the rows: whole passes in random order, the last one perhaps cut short."""
    whole = math.ceil(n / max(1, len(rows)))
    return np.concatenate([rows[:0], *(rng.permutation(rows) for _ in range(whole))])[:n]


def fingerprint(source):
    """Hex digest of what the plan of a stage follows from: the rows and the lengths of the audio."""
    found = hashlib.sha256(source.lengths.tobytes())
    for path in source.files:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


NUMBER = (int, float, type(None))
KINDS = {"prompt": str, "response": str, "task": str, "audio": (str, type(None)), "start": NUMBER,
         "end": NUMBER, "seconds": NUMBER, "choices": (list, type(None))}
LOADED_KEYS = ("wave", "rate", "row")    # what loading adds


def parse_row(line, where, answered=True):
    """A line of a manifest, bytes -> the row. Raises InputError that begins with `where`.

    answered    False: it needs no response"""
    unanswered = {} if answered else {"response": "none"}
    try:
        row = {"audio": None, "task": "qa", "seconds": None} | json.loads(line.decode("utf-8-sig"))
    except (ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{where}: {e}; write one JSON object a line, in UTF-8") from e
    row = unanswered | row
    for key, kind in KINDS.items():
        value = row.get(key)
        fits = isinstance(value, kind) and (
            value.strip() if kind is str else kind is not NUMBER or 0 <= (value or 0) <= 1e6)
        if not fits:
            raise InputError(f'{where}: "{key}" is missing or of another kind; a row has "audio", '
                             '"prompt" and "response", see data.py')
    return row


class Manifest:
    """The rows of JSON-lines files, one file after the other.

    Each line is checked once and read again when it is needed, so that a row takes 16 bytes of
    memory. Raises InputError with the line's number if one is malformed."""

    def __init__(self, *paths):
        self.paths = self.files = paths
        self.first = [0]       # number of each file's first row; at the end the number of rows
        self.tasks = Counter()
        starts = array("q")    # first byte of each row in its file
        stated = array("d")    # seconds of each row: 0 without audio, nan if not stated
        for path in paths:
            if not os.path.isfile(path):
                raise InputError(f"no manifest '{path}'; give a file with one JSON object a line")
            start = 0
            for number, line in enumerate(open(path, "rb"), 1):
                if line.strip():
                    row = parse_row(line, f"{path}, line {number}")
                    seconds = 0 if row["audio"] is None else row["seconds"]
                    starts.append(start)
                    stated.append(math.nan if seconds is None else seconds)
                    self.tasks[row["task"]] += 1
                start += len(line)
            if len(starts) == self.first[-1]:
                raise InputError(f"'{path}' holds no rows; write one JSON object a line")
            self.first.append(len(starts))
        self.starts = np.array(starts)
        self.stated = np.array(stated)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        """Row i without its wave."""
        start = self.starts[i]    # IndexError after the last one, which ends a loop over the rows
        k = np.searchsorted(self.first, i, side="right") - 1
        path = self.paths[k]
        with open(path, "rb") as file:    # anew: processes that share an open one share its place
            file.seek(start)
            row = parse_row(file.readline(), f"{path}, row {i - self.first[k]}")
        if row["audio"] is not None:
            row["audio"] = os.path.join(os.path.dirname(path), row["audio"])
        return row

    def load(self, i):
        """Row i, with "wave" and "rate" where it has audio. Raises InputError."""
        row = self[i]
        if row["audio"] is not None:
            row["wave"], row["rate"] = read_audio(row["audio"], row.get("start"), row.get("end"))
        return row

    @functools.cached_property
    def headers(self):
        """(lengths, skipped); opens the files whose length is not stated, once."""
        lengths = self.stated.copy()
        skipped = []
        in_range = (lengths >= MIN_SECONDS) & (lengths <= MAX_SECONDS)    # nan is not
        for i in np.flatnonzero(~in_range & (lengths != 0)).tolist():
            row = self[i]
            try:
                if row["seconds"] is not None:
                    check_seconds(row["seconds"], f"'{row['audio']}'")
                file, _, count = open_audio(row["audio"], row.get("start"), row.get("end"))
                with file:
                    lengths[i] = count / file.samplerate
            except InputError as e:
                lengths[i] = 0
                skipped.append((i, e))
        return lengths, skipped

    lengths = property(lambda self: self.headers[0])
    skipped = property(lambda self: self.headers[1])

    @functools.cached_property
    def usable(self):
        """[usable row numbers] of each source."""
        rows = usable_rows(self)
        return np.split(rows, np.searchsorted(rows, self.first[1:-1]))

    def draw(self, n, seed, stage):
        """(n,) row numbers of a stage in random order: whole passes over the usable rows."""
        return passes(usable_rows(self), n, np.random.default_rng([seed, stage]))


def allot(n, weights, caps):
    """Whole numbers by weights (largest remainders), none above its cap, that sum to n or, if that
    is less, to the sum of caps. What a full one cannot take goes to the others by their weights."""
    weights = np.asarray(weights, float)
    caps = np.asarray(caps)
    counts = np.zeros(len(caps), int)
    free = np.ones(len(caps), bool)
    while free.any():
        left = n - counts.sum()
        ideal = np.where(free, left * weights / weights[free].sum(), 0)
        full = free & (ideal >= caps)
        if not full.any():
            counts += ideal.astype(int)
            by_remainder = np.argsort(-(ideal % 1), kind="stable")
            counts[by_remainder[:n - counts.sum()]] += 1
            break
        counts[full] = caps[full]
        free &= ~full
    return counts


class Mixture(Manifest):
    """Manifests in groups with shares, from a mixture file (appendix A). Raises InputError.

    A stage draws each group by its share and the sources in it alike or by size (appendix A says
    both), in whole passes and none beyond its max_epochs. What a source cannot give goes to the
    others of its group, what a group cannot give to other groups."""

    def __init__(self, path):
        self.path = path
        self.groups = {}        # {group: (share, draw by size?, numbers of its sources)}
        self.max_epochs = []    # of each source
        paths = []
        try:
            with open(path, encoding="utf-8") as file:
                text = "".join(line for line in file if not line.lstrip().startswith("//"))
            spec = json.loads(text)
            names = [set(spec), *(set(given) - {"draw"} for given in spec["groups"].values())]
            if names[0] - {"groups", "max_epochs", "rows"} or any(
                    found != {"share", "sources"} for found in names[1:]):
                raise ValueError(f"it has other keys: {names}")
            for group, given in spec["groups"].items():
                first = len(paths)
                for source in given["sources"]:
                    source = {"rows": source} if isinstance(source, str) else source
                    paths.append(os.path.join(os.path.dirname(path), source["rows"]))
                    limit = source.get("max_epochs", spec.get("max_epochs", math.inf))
                    self.max_epochs.append(float(limit))
                by_size = {"uniform": False, "by size": True}[given.get("draw", "uniform")]
                members = np.arange(first, len(paths))
                self.groups[group] = (float(given["share"]), by_size, members)
            self.stage_rows = int(spec.get("rows", 1_600_000))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise InputError(f"'{path}' is no mixture ({type(e).__name__}: {e}); README.md shows "
                             "one") from e
        super().__init__(*paths)
        self.files = (path, *paths)

    def caps(self, n):
        """(sources,) the most rows of each in a stage of n."""
        return np.array([int(min(n, limit * len(rows))) if len(rows) else 0
                         for rows, limit in zip(self.usable, self.max_epochs)])

    def counts(self, n):
        """(sources,) how many of n rows come from each. Raises InputError if there are fewer."""
        caps = self.caps(n)
        shares = [share for share, _, _ in self.groups.values()]
        budget = allot(n, shares, [caps[members].sum() for _, _, members in self.groups.values()])
        if budget.sum() < n:
            raise InputError(f"a stage of {n} rows, but '{self.path}' has {budget.sum()} under its "
                             "max_epochs; train fewer steps, raise max_epochs or add rows")
        counts = np.zeros(len(caps), int)
        for (_, by_size, members), rows in zip(self.groups.values(), budget):
            weights = [max(1, len(self.usable[k])) if by_size else 1 for k in members]
            counts[members] = allot(rows, weights, caps[members])
        return counts

    def draw(self, n, seed, stage):
        """(n,) row numbers of a stage in random order; a row of a source comes k or k+1 times."""
        rng = np.random.default_rng([seed, stage])
        drawn = [passes(rows, k, rng) for rows, k in zip(self.usable, self.counts(n))]
        return rng.permutation(np.concatenate(drawn))

    def report(self, n):
        """Lines that say what a stage of n rows draws from each group and source."""
        counts = self.counts(n)
        lines = [f"{'usable rows':>14}{'share':>8}{'drawn':>10}{'epochs':>8}"]
        for group, (share, _, members) in self.groups.items():
            drawn = counts[members].sum()
            lines.append(f"{'':14}{drawn / n:8.2%}{drawn:10}{'':8}  {group} (asked for "
                         f"{share / sum(s for s, _, _ in self.groups.values()):.2%})")
            for k in members:
                rows = len(self.usable[k])
                lines.append(f"{rows:14}{counts[k] / n:8.2%}{counts[k]:10}"
                             f"{counts[k] / max(1, rows):8.2f}    {self.paths[k]}")
        return lines


# --------------------------------------------------------------------------------------------------
# Synthetic tones, each with a question that only the sound answers

def partials(pitch, timbre, rng):
    """pitch (N,) in Hz -> (N,) a tone; its timbre sets ratios and strengths of the partials."""
    ratios, strengths = {
        "flute": ((1, 2), (1, 0.15)),
        "buzzer": ((1, 3, 5, 7, 9), (1, 1, 0.8, 0.6, 0.5)),
        "bell": ((1, 2.76, 5.4), (1, 0.8, 0.6)),
        "reed": ((1, 2, 3, 4, 5), (1, 0.7, 0.5, 0.35, 0.25)),
    }[timbre]
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    wave = np.zeros(len(pitch))
    for ratio, strength in zip(ratios, strengths):
        wave += strength * np.sin(ratio * phase + rng.uniform(0, 2 * np.pi))
    return wave


def envelope(n, shortest, longest, rng):
    """(n,) with 10 ms flanks and random onset and length (shares of n)."""
    length = int(n * rng.uniform(shortest, longest))
    onset = rng.integers(0, n - length + 1)
    t = np.arange(n) / SAMPLE_RATE
    since_onset = t - onset / SAMPLE_RATE
    until_end = (onset + length) / SAMPLE_RATE - t
    return np.clip(np.minimum(since_onset, until_end) / 0.01, 0, 1)


def any_pitch(rng, low=220.0, octaves=2.0):
    return low * 2 ** rng.uniform(0, octaves)


def make_louder(n, answer, rng):
    quiet = 10 ** (-rng.uniform(10, 20) / 20)    # 10 to 20 dB below
    first, last = (1, quiet) if answer == "first" else (quiet, 1)
    middle = rng.uniform(0.4, 0.6)
    return rng.standard_normal(n) * np.where(np.arange(n) / n < middle, first, last)


def make_glide(n, answer, rng):
    octaves = rng.uniform(0.5, 1.5) * {"up": 1, "down": -1, "flat": 0}[answer]
    pitch = any_pitch(rng, 400, 1) * 2 ** (octaves * np.linspace(-0.5, 0.5, n))
    tone = partials(pitch, rng.choice(["flute", "reed"]), rng)
    return tone * envelope(n, 0.7, 1, rng)


def make_timbre(n, answer, rng):
    if answer == "noise":
        tone = rng.standard_normal(n)
    else:
        tone = partials(np.full(n, any_pitch(rng)), answer, rng)
    return tone * envelope(n, 0.5, 0.9, rng)


def make_note(n, answer, rng):
    semitones = PITCH_CLASSES.index(answer)
    octave = rng.integers(0, 2)    # 4 or 5
    detuned = rng.uniform(-0.1, 0.1)
    pitch = 440 * 2 ** ((semitones - 9) / 12 + octave + detuned / 12)
    tone = partials(np.full(n, pitch), rng.choice(["flute", "reed"]), rng)
    return tone * envelope(n, 0.6, 0.9, rng)


PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
TONES = {    # kind: (question, all possible answers, function (samples, answer, rng) -> (samples,))
    "louder": ("Which half is louder?", ("first", "last"), make_louder),
    "glide": ("Up, down or flat?", ("up", "down", "flat"), make_glide),
    "timbre": ("Which sound?", ("flute", "buzzer", "bell", "noise"), make_timbre),
    "note": ("Which note?", ("C", "D", "E", "F", "G", "A", "B"), make_note),
    "semitone": ("Which pitch class?", PITCH_CLASSES, make_note),
}
DEFAULT_TONES = tuple(kind for kind in TONES if kind != "semitone")    # that one only by name
UNLABELLED = {"prompt": "Listen.", "response": "ok", "choices": ("ok",), "task": "unlabelled"}


class Tones:
    """A source of n rows. Row i of a split, "train" or "heldout", is the same on every machine.

    labelled    few labels: half of a stage is drawn from so many clips of each kind, which come
                first and have each answer as often, half from n clips whose answer is "ok"
    seed        chooses the labelled clips"""

    files = ()
    skipped = ()

    def __init__(self, split, n, kinds=DEFAULT_TONES, labelled=0, seed=0):
        self.stream = ("train", "heldout").index(split)
        self.kinds = tuple(kinds)
        self.n_labelled = labelled * len(kinds)
        self.seed = seed
        steps = np.arange(self.n_labelled + n) * 0.6180339887 % 1    # golden: no pattern
        self.lengths = 1.2 + 0.8 * steps                             # 1.2 to 2 s

    def __len__(self):
        return len(self.lengths)

    def load(self, i):
        kind = self.kinds[i % len(self.kinds)]
        question, answers, make = TONES[kind]
        if i < self.n_labelled:
            rng = np.random.default_rng([2, self.seed, i])    # 0 and 1 are the splits
            answer = answers[i // len(self.kinds) % len(answers)]
        else:
            rng = np.random.default_rng([self.stream, i])
            answer = answers[rng.integers(len(answers))]
        n = round(SAMPLE_RATE * self.lengths[i])
        wave = make(n, answer, rng)
        wave *= rng.uniform(0.1, 0.7) / np.abs(wave).max()
        wave += 10 ** rng.uniform(-4, -2.3) * rng.standard_normal(n)    # noise at -80 to -46 dB
        row = {"wave": torch.tensor(wave, dtype=torch.float32), "rate": SAMPLE_RATE,
               "prompt": question, "response": answer, "choices": answers, "task": kind}
        return row | UNLABELLED if 0 < self.n_labelled <= i else row

    def draw(self, n, seed, stage):
        """(n,) row numbers of a stage in random order."""
        rng = np.random.default_rng([seed, stage])
        labelled, others = np.split(np.arange(len(self)), [self.n_labelled])
        n_labelled = n // 2 if len(labelled) else 0
        drawn = [passes(labelled, n_labelled, rng), passes(others, n - n_labelled, rng)]
        return rng.permutation(np.concatenate(drawn)) if n_labelled else drawn[1]


# --------------------------------------------------------------------------------------------------
# Batches of a stage

def plan_stage(source, steps, batch, seed, stage, window=50):
    """(steps, batch) row numbers of a stage, rows of a step alike in length.

    `window` steps at a time of what the source draws are sorted by length and dealt out again in
    random order. A function of its arguments alone, so that a resumed run only needs to know its
    step. Raises InputError without any row."""
    if len(source.skipped) == len(source):
        raise InputError(f"none of the {len(source)} rows can be used; "
                         f"the first: {source.skipped[0][1]}")
    drawn = source.draw(steps * batch, seed, stage)
    rng = np.random.default_rng([seed, stage])
    plan = []
    for start in range(0, len(drawn), window * batch):
        rows = drawn[start:start + window * batch]
        rows = rows[np.argsort(source.lengths[rows], kind="stable")].reshape(-1, batch)
        plan.append(rng.permutation(rows))
    return np.concatenate(plan)


class Rows(torch.utils.data.Dataset):
    """Loads rows of a source for a DataLoader; one that cannot be read becomes its InputError."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        try:
            return self.source.load(i) | {"row": int(i)}
        except InputError as e:
            return e


def collate(rows, spec, rates=(), think=True, responses=True, micro_tokens=None):
    """Loaded rows of a step -> ([its micro-batches], [InputError of those left out]).

    A batch is that of build_inputs, with labels, and what training and scoring need beside it:
    waves       {rate in Hz: [(N,) or None, one a row]} at 16 kHz and at the teachers' rates
    rows        the loaded rows without their waves
    seconds     of audio
    A micro-batch has at most micro_tokens tokens with its padding, or one row. The losses are sums,
    so any cut gives the same step. None of the rows usable: one idle batch, whose "rows" is empty."""
    encoded = []
    skipped = []
    for row in rows:
        waves = dict.fromkeys((SAMPLE_RATE, *rates))
        try:
            if isinstance(row, InputError):
                raise row
            check_text(spec, row["prompt"] + row["response"])
            if "wave" in row:
                waves = {rate: at_rate(row["wave"], row["rate"], rate) for rate in waves}
            response = row["response"] if responses else None
            ids = encode_row(spec, waves[SAMPLE_RATE], row["prompt"], response, think)
            encoded.append((ids, waves, row))
        except InputError as e:
            skipped.append(e if e is row else InputError(f"row {row.get('row')}: {e}"))

    if micro_tokens:
        encoded.sort(key=lambda found: len(found[0][0]))
    cuts = []
    for found in encoded:
        tokens = len(found[0][0])    # of the longest row so far
        if not cuts or micro_tokens and (len(cuts[-1]) + 1) * tokens > micro_tokens:
            cuts.append([])
        cuts[-1].append(found)
    batches = []
    for cut in cuts:
        ids, waves, used = zip(*cut)
        batches.append(pad_batch(spec, ids) | {
            "waves": {rate: [of_row[rate] for of_row in waves] for rate in waves[0]},
            "rows": [{key: row[key] for key in row if key != "wave"} for row in used],
            "seconds": sum(len(row["wave"]) / row["rate"] for row in used if "wave" in row)})
    return batches or [idle_batch(spec, rates)], skipped


def idle_batch(spec, rates):
    """A row of text without targets, for a rank that must take a turn and has no row."""
    batch = build_inputs(spec, [None], ["nothing"], [""])
    batch["labels"].fill_(IGNORE)
    return batch | {"waves": {rate: [None] for rate in rates}, "rows": [], "seconds": 0.0}


def to_device(batch, device):
    """Moves the tensors of a batch, except the teachers' waves: they go one by one."""
    def move(value):
        return value.to(device, non_blocking=True) if torch.is_tensor(value) else value

    moved = {key: move(value) for key, value in batch.items()}
    return moved | {"audio": {key: move(value) for key, value in batch["audio"].items()}}


def expert_targets(experts, batch, audio_embeds=None):
    """{name: (B, L, E)} z_k, the features of the frozen experts at the thinking tokens (25 Hz).
    audio_embeds    (B, L, D) of the model's Output, which are recon's

    Clip by clip, unpadded: clip-wide normalisation, reflection at the ends and ALiBi depend on the
    true length. In fp32 (a GPU's convolutions: TF32): bf16 would show in their log spectra."""
    targets = {}
    lengths = batch["n_audio"]
    for name, expert in experts.items():
        if expert.sample_rate is None:    # recon: what the language model consumes
            if audio_embeds is not None:
                targets[name] = expert(audio_embeds)
            continue
        frames = [torch.zeros(0, expert.dim, device=lengths.device)]    # none in a batch of text
        for wave, n_audio in zip(batch["waves"][expert.sample_rate], lengths.tolist()):
            if wave is not None:
                z = expert(wave.to(lengths.device))    # (F, E)
                frames.append(resample_frames(z, n_audio, expert.frame_rate, expert.offset))
        targets[name], _ = pad_rows(torch.cat(frames), lengths)
    return targets


# --------------------------------------------------------------------------------------------------
# Corpora. assets/corpora.json describes those that are one table, and holds our prompts. A corpus is
# a function of (root, split); it yields arguments of make_row, or why an item becomes no row.

with open(os.path.join(ASSETS, "corpora.json"), encoding="utf-8") as file:
    SHIPPED = json.load(file)
WORDINGS = SHIPPED["wordings"]    # {} is the question; the paper names its tasks, not its prompts
CLASSES = ("emotion", "vocal_sound", "genre")    # their wordings ask for one of fixed choices
LETTERS = string.ascii_uppercase


class LeftOut(Exception):
    """Why an item of a corpus becomes no row, to be counted."""


def as_list(value):
    return [value] if isinstance(value, str) else list(value)


def digest(*words):
    """A number to choose by, the same on every machine."""
    text = " ".join(words).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.md5(text).digest()[:4], "big")


def make_row(task, response, audio=(), question="", wordings=(), choices=None,
             choice_prompt="{} {line}", spoken="", more=None):
    """A row of a manifest. Raises LeftOut.

    audio       where the clip may lie, whatever its ending; a path or several
    wordings    prompts around the question, instead of the task's
    choices     in any form that read_choices takes; the response names one of them
    spoken      the question that the clip itself asks, for a judge
    more        further keys"""
    places = as_list(audio)
    if choices is not None:
        choices = read_choices(choices)
        if task in CLASSES:    # in an order of the clip's own, so that no letter is a hint
            name = os.path.basename(places[0])
            question = WORDINGS[task][digest(name) % len(WORDINGS[task])]
            choices.sort(key=lambda choice: digest(name, choice))
        question, response = letter_choices(question, choices, response.strip(), choice_prompt)
        task, wordings = "mcq", ["{}"]
    clip = next(filter(None, map(find_audio, places)), None)
    if places and not clip:
        raise LeftOut("no audio file")
    wordings = wordings or WORDINGS[task]
    wording = wordings[digest(os.path.basename(clip or ""), question, response) % len(wordings)]
    row = {"audio": clip, "prompt": wording.format(question.strip()).strip(),
           "response": response.strip(), "task": task}
    if not row["prompt"] or not row["response"]:
        raise LeftOut("empty text")
    if choices is not None:
        row["choices"] = choices
    if spoken:
        row["question"] = spoken.strip()
    for key, value in (more or {}).items():    # MMAU's "task" becomes "task_"
        row[f"{key}_" if key in row or key in LOADED_KEYS else key] = value
    return row


def read_choices(given):
    """A list, {"A": text, ..}, "a|b|c", or a list in a text -> [text]; "A. text" loses its letter."""
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given) if given.startswith("[") else given.split("|")
        except (ValueError, SyntaxError) as e:
            raise LeftOut("with choices that are no list") from e
    if isinstance(given, dict):
        given = given.values()
    texts = ["" if text is None else str(text).strip() for text in given]
    marks = [re.match(rf"\(?{letter}[.):]\s*", text) for letter, text in zip(LETTERS, texts)]
    if all(mark or not text for mark, text in zip(marks, texts)):
        texts = [text[mark.end():] if mark else text for mark, text in zip(marks, texts)]
    while texts and not texts[-1]:
        texts.pop()
    if not all(texts):    # the letters after it would change
        raise LeftOut("with an empty choice")
    return texts


def letter_choices(question, choices, answer, choice_prompt):
    """-> ("Which? A. this B. that", "B. that"); the answer is a text, a letter, both, or a number
    from 0. Raises LeftOut."""
    if not question.strip():
        raise LeftOut("empty text")
    if not 2 <= len(choices) <= len(LETTERS):
        raise LeftOut(f"with {len(choices)} choices")
    lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices)]
    prompt = choice_prompt.format(question, line=" ".join(lettered), lines="\n".join(lettered))
    for form in ("{text}", "{letter}", "({letter})", "{letter}.", "{letter}. {text}",
                 "({letter}) {text}", "{number}"):
        for number, (letter, text) in enumerate(zip(LETTERS, choices)):
            name = form.format(letter=letter, text=text, number=number)
            if answer.casefold() == name.casefold():
                return prompt, lettered[number]
    raise LeftOut("with an answer that is none of the choices")


def find_audio(place):
    """The audio file of this name, whatever its ending, or None."""
    folder, name = os.path.split(os.path.normpath(place))
    return listing(folder).get(os.path.splitext(name)[0])


@functools.lru_cache(1024)
def listing(folder):
    """{name without its ending: path} of a folder's audio files; to ask for each file is slow."""
    found = {}
    for file in os.listdir(folder) if os.path.isdir(folder) else ():
        name, ending = os.path.splitext(file)
        if ending in (".wav", ".flac", ".ogg", ".opus", ".mp3", ".au"):
            found[name] = os.path.join(folder, file)
    return found


def first_of(*paths):
    """The first path that is there, or else the first of all, for the error to name."""
    return next(filter(os.path.exists, paths), paths[0])


# Some tables mix Latin-1 into their UTF-8.
codecs.register_error("latin-1", lambda e: (e.object[e.start:e.end].decode("latin-1"), e.end))


def read_table(path, quoted=True):
    """Yields the dicts of a JSON file, or of a header line and cells between commas, tabs, bars."""
    if path.endswith((".json", ".jsonl")):
        yield from json_items(path)
        return
    csv.field_size_limit(2 ** 24)
    with open(path, encoding="utf-8-sig", errors="latin-1", newline="") as file:
        mark = max(",\t|", key=file.readline().count)
        file.seek(0)
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        yield from csv.DictReader(file, delimiter=mark, quoting=quoting, restval="")


def json_items(path):
    """Yields the objects of a file: one a line, or of an array, alone or as the "data" of an
    object. null becomes an empty text."""
    with open(path, encoding="utf-8-sig", errors="latin-1") as file:
        text = file.read()
    try:
        items = json.loads(text)
        if isinstance(items, dict):
            items = items.get("data", [items])
    except json.JSONDecodeError:
        items = map(json.loads, filter(str.strip, text.split("\n")))
    for item in items:
        yield {key: "" if value is None else value for key, value in dict(item).items()}


def from_table(root, split, *, task, table, response, audio=(), question=(), choices=(),
               quoted=True, seconds=None, only=None, keep=False, spoken="", **rest):
    """The rows of an entry of assets/corpora.json. Texts are templates of {split} and the columns;
    of several tables and places the first that is there counts, of several questions the first that
    is not empty; each response gives a row. keep: columns that are not used stay in the row."""
    path = first_of(*(f"{root}/{name.format(split=split)}" for name in as_list(table)))
    used = {*choices, *re.findall(r"{(\w+)", " ".join(as_list(response) + as_list(question)))}
    for cells in read_table(path, quoted):
        if only and not re.match(only[split], cells["task_name"]):
            continue

        def fill(templates):
            return [text.format_map(cells | {"split": split}) for text in as_list(templates)]

        more = {key: cells[key] for key in cells if key not in used} if keep else {}
        if seconds:
            more["seconds"] = round(float(fill(seconds)[0]), 3)
        options = [cells.get(name, "") for name in choices] or [None]
        for text in fill(response):
            yield rest | {
                "task": task, "response": text, "more": more,
                "audio": [f"{root}/{place}" for place in fill(audio)],
                "question": next(filter(str.strip, fill(question)), ""),
                "choices": options if len(options) > 1 else options[0],
                "spoken": fill(spoken)[0]}


def librispeech(root, split):
    """ROOT/SPLIT/SPEAKER/CHAPTER/*.trans.txt, lines "ID TEXT", and ID.flac beside it"""
    folder = first_of(f"{root}/{split}", f"{root}/LibriSpeech/{split}")
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*/*/*.trans.txt")):
        for line in open(path, encoding="utf-8"):
            name, text = line.split(" ", 1)
            # All in capitals, which say nothing.
            yield dict(task="asr", response=text.lower(), audio=f"{os.path.dirname(path)}/{name}.flac")


def gigaspeech(root, split):
    """ROOT/GigaSpeech.json with audios and their segments, and audio in ROOT/audio; SPLIT is a
    subset: XL, L, M, S, XS, DEV, TEST"""
    with open(f"{root}/GigaSpeech.json", encoding="utf-8") as file:
        audios = json.load(file)["audios"]    # one object for 10,000 hours: many GB of memory
    marks = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
    for audio in audios:
        for segment in audio["segments"]:
            if f"{{{split}}}" not in segment["subsets"]:
                continue
            text = re.sub("<(MUSIC|NOISE|SIL|OTHER)>", "", segment["text_tn"])    # appendix B
            for tag, mark in marks.items():
                text = re.sub(rf"\s*{tag}", mark, text)
            if not re.search(r"\w", text):
                yield "nothing but tags"
                continue
            start, end = segment["begin_time"], segment["end_time"]
            yield dict(task="asr", response=" ".join(text.lower().split()),
                       audio=f"{root}/{audio['path']}",
                       more={"start": start, "end": end, "seconds": round(end - start, 3)})


def iemocap(root, split):
    """ROOT/SessionN/dialog/EmoEvaluation/DIALOG.txt, and audio in
    ROOT/SessionN/sentences/wav/DIALOG; SPLIT is train (sessions 1 to 4) or test (session 5)"""
    # The usual four; there are others.
    labels = {"ang": "angry", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"}
    for session in {"train": (1, 2, 3, 4), "test": (5,)}[split]:
        folder = f"{root}/Session{session}"
        for path in sorted(glob.glob(f"{glob.escape(folder)}/dialog/EmoEvaluation/Ses*.txt")):
            text = open(path, encoding="utf-8", errors="latin-1").read()
            turns = re.findall(r"^\[([\d.]+) - ([\d.]+)\]\t(\w+)\t(\w+)\t", text, re.M)
            for start, end, turn, label in turns:
                if label not in labels:
                    yield f"of emotion {label}"
                    continue
                dialog, number = turn.rsplit("_", 1)    # number: F000, M000 ..
                yield dict(task="emotion", response=labels[label], choices=set(labels.values()),
                           audio=f"{folder}/sentences/wav/{dialog}/{turn}.wav",
                           more={"seconds": round(float(end) - float(start), 3),
                                 "speaker": f"Ses{session:02}{number[0]}", "recording": dialog})


def iemocap_qa(root, split):
    """ROOT/SessionN as for iemocap; asks how the speaker feels, without choices"""
    for row in iemocap(root, split):
        change = {"task": "qa", "choices": None, "wordings": WORDINGS["emotion"]}
        yield row if isinstance(row, str) else row | change


def meld(root, split):
    """ROOT/SPLIT_sent_emo.csv and ROOT/train_splits, dev_splits_complete,
    output_repeated_splits_test (or both in ROOT/SPLIT), and beside each of their .mp4 its sound:
    ffmpeg -i dia0_utt0.mp4 dia0_utt0.wav"""
    emotions = ["neutral", "joy", "sadness", "anger", "surprise", "fear", "disgust"]
    folder = {"train": "train_splits", "dev": "dev_splits_complete",
              "test": "output_repeated_splits_test"}[split]
    folder = first_of(f"{root}/{folder}", f"{root}/{split}/{folder}")
    table = first_of(f"{root}/{split}_sent_emo.csv", f"{root}/{split}/{split}_sent_emo.csv")
    for cells in read_table(table):
        name = f"dia{cells['Dialogue_ID']}_utt{cells['Utterance_ID']}.wav"
        yield dict(task="emotion", response=cells["Emotion"], choices=emotions,
                   audio=f"{folder}/{name}")


def librisqa(root, split):
    """ROOT/LibriSQA-PartI/LibriSQA-PartI-train.json and the like, and LibriSpeech's train-clean-360
    and test-clean in ROOT/LibriSpeech"""
    part, kind = split.split("-")
    folder = f"{root}/LibriSpeech/{'train-clean-360' if kind == 'train' else 'test-clean'}"
    options = "".join(rf"\s+{letter}[.):]\s*(.*?)" for letter in "ABCD")
    for item in json_items(f"{root}/LibriSQA-{part}/LibriSQA-{split}.json"):
        name = os.path.splitext(os.path.basename(item["speech_path"]))[0]
        speaker_and_chapter = "/".join(name.split("-")[:2])    # the name: SPEAKER-CHAPTER-NUMBER
        row = dict(audio=f"{folder}/{speaker_and_chapter}/{name}.flac",
                   more={"seconds": round(float(item["duration"]), 3)})
        if part == "PartI":
            yield row | dict(task="qa", question=item["question"], response=item["answer"])
            continue
        parts = re.match(rf"(.*\S){options}\s*$", item["question_and_option"], re.S)
        if not parts:
            yield "without options A to D and the letter of one"
            continue
        question, *choices = (" ".join(part.split()) for part in parts.groups())
        # Their order stays: some say "all of the above".
        yield row | dict(task="mcq", question=question, choices=choices,
                         response=item["answer"].strip()[:1])


def switchboard(root, split):
    """ROOT/reference/hub5e00.english.000405.stm and a wav for each side, ROOT/wav/sw_4390-A.wav
    (of the makers' sph: sph2pipe -f wav -p -c 1); SPLIT is eval2000 or its half swbd or callhome"""
    starts = {"eval2000": ("sw_", "en_"), "swbd": "sw_", "callhome": "en_"}[split]
    for line in open(f"{root}/reference/hub5e00.english.000405.stm", encoding="latin-1"):
        if not line.startswith(starts):
            continue
        if "IGNORE_TIME_SEGMENT" in line:
            yield "not to be scored"
            continue
        name, side, speaker, start, end, _, *words = line.split()
        start, end = float(start), float(end)
        # Without hesitations and fragments, which stand in parentheses and are not scored.
        text = re.sub(r"\(+[^()]*\)+|<\w+>", " ", " ".join(words)).lower()
        yield dict(task="asr", response=" ".join(text.split()),
                   audio=f"{root}/wav/{name}-{side}.wav",
                   more={"start": start, "end": end, "seconds": round(end - start, 3),
                         "speaker": speaker})


def vocalsound(root, split):
    """ROOT/datafiles/SPLIT.json (tr, val, te) with data, wav, and audio in ROOT/audio_16k or
    ROOT/audio_44k: f0003_0_cough.wav"""
    sounds = ["laughter", "sigh", "cough", "throat clearing", "sneeze", "sniff"]
    for item in json_items(f"{root}/datafiles/{split}.json"):
        name = os.path.basename(item["wav"])
        speaker, _, sound = os.path.splitext(name)[0].split("_")
        yield dict(task="vocal_sound", response=sound.replace("throatc", "throat c"), choices=sounds,
                   audio=[f"{root}/audio_16k/{name}", f"{root}/audio_44k/{name}"],
                   more={"speaker": speaker})


def gtzan(root, split):
    """ROOT/genres/GENRE/GENRE.00000.wav (or .au), or the same in ROOT/genres_original"""
    genres = ["blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae",
              "rock"]
    folder = first_of(f"{root}/genres", f"{root}/genres_original")
    for genre in genres:
        for path in sorted(listing(f"{folder}/{genre}").values()):
            yield dict(task="genre", response=genre, choices=genres, audio=path)


def muchomusic(root, split):
    """ROOT/data/muchomusic.csv, and audio where the makers' scripts look for it:
    ROOT/data/sdd/audio/00/415600.2min.mp3, ROOT/data/musiccaps/audio/[YTID]-[30-40].wav; a row has
    instrument_family where music_knowledge names instrumentation and the answer one family"""
    clips = f"{root}/data/musiccaps/audio"
    for cells in read_table(f"{root}/data/muchomusic.csv"):
        name = cells["dataset_identifier"].removesuffix(".json")
        start = f"[{name.rpartition('_')[0]}]-["
        audio = [path for clip, path in listing(clips).items() if clip.startswith(start)]
        if cells["dataset"] == "sdd":
            audio = f"{root}/data/sdd/audio/{int(name) % 100:02}/{name}.2min.mp3"
        answer = cells["correct_answer"]
        choices = [answer, *(cells[f"distractor_{k}_answer"] for k in (1, 2, 3))]
        choices.sort(key=lambda choice: digest(name, cells["question"], choice))

        keys = ("dataset", "genre", "music_knowledge", "music_reasoning")
        more = {key: cells[key] for key in keys}
        families = [family for family, names in SHIPPED["instrument_families"].items()
                    if re.search(rf"\b({names})s?\b", answer, re.I)]
        if "instrument" in more["music_knowledge"].lower() and len(families) == 1:
            more["instrument_family"] = families[0]
        yield dict(task="mcq", response=answer, audio=audio or f"{clips}/{start}", choices=choices,
                   question=cells["question"], more=more,
                   choice_prompt=SHIPPED["tables"]["mmau"]["choice_prompt"])


CORPORA = {    # name: (corpus, the splits to train on, of a benchmark those to score)
    "librispeech": (librispeech, ["train-clean-100", "train-clean-360", "train-other-500"]),
    "gigaspeech": (gigaspeech, ["XL"]),
    "switchboard": (switchboard, ["eval2000"]),
    "iemocap": (iemocap, ["train"]),
    "iemocap_qa": (iemocap_qa, ["train"]),
    "meld": (meld, ["train"]),
    "librisqa": (librisqa, ["PartI-train", "PartII-train"]),
    "librisqa_part1": (librisqa, ["PartI-train"]),
    "librisqa_part2": (librisqa, ["PartII-train"]),
    "vocalsound": (vocalsound, ["te"]),
    "gtzan": (gtzan, ["all"]),
    "muchomusic": (muchomusic, ["all"]),
}
for name, entry in SHIPPED["tables"].items():
    splits = entry.pop("splits")
    CORPORA[name] = (functools.partial(from_table, **entry), splits)


# --------------------------------------------------------------------------------------------------
# The command line

def layout_of(corpus):
    """Where the files of a corpus have to lie, in words."""
    if not isinstance(corpus, functools.partial):
        return " ".join(corpus.__doc__.split())
    entry = corpus.keywords
    texts = " or ".join(f"ROOT/{name}" for name in as_list(entry["table"]))
    audio = " or ".join(f"ROOT/{place}" for place in as_list(entry.get("audio", ())))
    return f"{texts} with {entry['response']}, audio {audio or 'none'}"


def any_table(root, split, args):
    """Rows of the table of the flags, which name its columns."""
    if args.choices and not args.prompt:
        raise InputError("--choices needs --prompt, the column with the questions")
    if not args.prompt and (not args.audio or any("{}" in text for text in WORDINGS[args.task])):
        raise InputError("give --prompt, the column with the questions; or --audio and a --task "
                         "with prompts of ours, such as asr or caption")
    for cells in read_table(os.path.abspath(args.root)):
        texts = [cells[name] for name in (args.response, args.prompt, args.audio) if name]
        if None in cells:    # where csv puts cells beyond the header's
            yield "with more cells than columns (quote text with commas)"
        elif any(isinstance(text, (list, dict)) for text in texts):
            yield "with a list or an object where a text belongs"
        else:
            yield dict(task=args.task, response=str(cells[args.response]),
                       audio=f"{root}/{cells[args.audio]}" if args.audio else (),
                       question=str(cells[args.prompt]) if args.prompt else "",
                       wordings=["{}"] if args.prompt else (),
                       choices=cells[args.choices] if args.choices else None,
                       more={name: cells[name] for name in args.keep})


def any_messages(root, split, args):
    """Conversations of one question about one clip at most and one answer: "messages" or
    "conversations" of texts, "query" and "response", or "instruction", "input" and "output", and
    "audios" beside them"""
    for item in json_items(os.path.abspath(args.root)):
        turns = item.get("messages") or item.get("conversations") or []
        texts = [str(turn.get("content") or turn.get("value")) for turn in turns] or [
            item.get("query") or f"{item.get('instruction')}\n{item.get('input')}",
            item.get("response") or item.get("output")]
        clips = item.get("audios") or item.get("audio") or []
        clips = as_list(clips)
        if len(texts) != 2 or len(clips) > 1 or item.get("system") or item.get("history"):
            yield "not of one question about one clip at most and one answer"
            continue
        yield dict(task=args.task, response=texts[1], question=texts[0].replace("<audio>", ""),
                   wordings=["{}"], audio=[os.path.join(root, clip) for clip in clips])


def pitch_class_of(row):
    """The pitch class with most notes in a clip by basic-pitch: the sum over time of its note
    posteriorgram where that is above 0.5. None without a note. Raises InputError."""
    from experts import load
    teacher = load("pitch")
    wave, rate = read_audio(row["audio"], row.get("start"), row.get("end"))
    notes = teacher.notes(at_rate(wave, rate, teacher.sample_rate))    # (F, 88) from A0
    strengths = torch.where(notes > 0.5, notes, 0).sum(0)
    by_class = torch.zeros(12).index_add(0, (torch.arange(88) + 9) % 12, strengths)
    return PITCH_CLASSES[by_class.argmax()] if by_class.any() else None


def convert(args):
    """Rows to stdout; to stderr how many, and how many were left out and why."""
    root = os.path.abspath(args.root)
    if args.name in ANY_FILE:
        corpus = functools.partial(ANY_FILE[args.name], args=args)
        splits, layout = ["all"], " ".join(ANY_FILE[args.name].__doc__.split())
        root = os.path.dirname(root)    # the audio lies relative to the table
        if not os.path.isfile(args.root):
            raise InputError(f"no file '{args.root}'; give the table itself")
    else:
        corpus, splits = CORPORA[args.name]
        layout = f"{args.name} has to lie as {layout_of(corpus)}"
    if args.split and splits == ["all"]:
        raise InputError(f"{args.name} has no splits; leave --split out; {layout}")
    written = 0
    left_out = Counter()
    try:
        for split in args.split or splits:
            for found in corpus(root, split):
                try:
                    if isinstance(found, str):
                        raise LeftOut(found)
                    row = make_row(**found)
                    if args.pitch_class:
                        row["pitch_class"] = pitch_class_of(row)
                    line = json.dumps(row, ensure_ascii=False)
                    parse_row(line.encode(), "that training would refuse")
                except (LeftOut, InputError, UnicodeError) as e:
                    left_out[str(e)] += 1
                else:
                    print(line)
                    written += 1
    except (OSError, LookupError, ValueError, TypeError, csv.Error) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"'{args.root}': {type(e).__name__} {e}; {layout}") from e
    reasons = "".join(f", {n} {reason}" for reason, n in left_out.most_common())
    print(f"{args.name}: {written} rows, {left_out.total()} left out{reasons}", file=sys.stderr)
    if not written:
        raise InputError(f"no rows in '{args.root}'; {layout}")


ANY_FILE = {"csv": any_table, "json": any_table, "messages": any_messages}


def check(args):
    """Prints what a manifest or mixture holds, and what training would skip -> whether any."""
    source = open_source(args.path)
    if not source.files:
        raise InputError(f"'{args.path}' has no file; give rows.jsonl or mixture.json")
    skipped = dict(source.skipped)
    rates = {expert.sample_rate for expert in EXPERTS.values()}
    spec = load_coat("tiny").spec
    for i in set(range(len(source))) - set(skipped) if not args.quick else ():
        _, problems = collate([Rows(source)[i]], spec, rates)
        skipped |= {i: problem for problem in problems}
    tasks = ", ".join(f"{n} {task}" for task, n in source.tasks.items())
    print(f"{len(source)} rows, {source.lengths.sum() / 3600:.3f} h, {tasks}")
    print(f"{len(skipped)} would be skipped{', by headers and stated lengths' * args.quick}")
    for i, problem in sorted(skipped.items())[:20]:
        k = np.searchsorted(source.first, i, side="right") - 1
        print(f"  {source.paths[k]}, row {i - source.first[k]}: {problem}")
    if isinstance(source, Mixture):
        print(f"a stage of {source.stage_rows} rows:")
        print("\n".join(source.report(source.stage_rows)))
    return bool(skipped)


def parse_flags():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="what a manifest or a mixture holds")
    p.set_defaults(run=check)
    p.add_argument("path", help="rows.jsonl or mixture.json")
    p.add_argument("--quick", action="store_true", help="believe headers, decode nothing")

    layouts = "\n".join(f"{name}: {layout_of(corpus)}" for name, (corpus, _) in CORPORA.items())
    p = commands.add_parser("convert", help="the rows of a corpus or benchmark",
                            formatter_class=raw, epilog=layouts)
    p.set_defaults(run=convert)
    add = p.add_argument
    add("name", choices=[*CORPORA, *ANY_FILE], metavar="NAME", help="see below; csv, json: any "
        "table; messages: conversations")
    add("root", metavar="ROOT", help="the folder of the corpus; for csv, json, messages the file")
    add("--split", nargs="+", help="instead of those to train on or to score")
    add("--pitch-class", action="store_true", help="add each clip's dominant pitch class")
    add("--audio", help="csv, json: the column with audio files (none: text only)")
    add("--prompt", help="csv, json: with prompts (none: our wordings of a --task such as asr)")
    add("--response", default="response", help="csv, json: with responses (%(default)s)")
    add("--choices", help='csv, json: with choices, "a|b|c" or a list')
    add("--keep", nargs="+", default=[], metavar="COLUMN", help="csv, json: further keys")
    add("--task", default="qa", choices=[t for t in WORDINGS if t not in CLASSES])
    return parser.parse_args()


if __name__ == "__main__":
    one_line_errors()
    flags = parse_flags()
    sys.exit(flags.run(flags))
