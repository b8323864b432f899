"""Audio, rows, the batches of a stage, benchmarks, corpora.

    python data.py check assets/clips.jsonl    # rows, hours, what would be skipped and why
    python data.py check MIXTURE.json --quick  # what a stage draws, too; decodes nothing
    python data.py convert clotho ROOT         # rows of a corpus as its makers lay it out
    python data.py convert hub NAME --split train --prompt question --response answer

A manifest holds one JSON object a line; audio paths are relative to it, null is a row of text:

    {"audio": "clips/rain.flac", "prompt": "What is heard?", "response": "rain", "task": "caption"}

Optional: "start" and "end" in seconds (a segment of the file), "seconds" (its length, saves opening
it), "choices" (the options), "question" (what a judge is shown instead of the prompt). Rows count
from 0 in all files and messages.
"""
import argparse
import ast
import codecs
import contextlib
import copy
import csv
import functools
import glob
import hashlib
import io
import json
import math
import os
import re
import sys
from array import array
from collections import Counter

# First: it says in one line which library is missing.
from model import (ASSETS, IGNORE, MAX_PEAK, MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, InputError,
                   at_rate, build_inputs, check_seconds, check_text, encode_row, load_coat,
                   one_line_errors, pad_batch, pad_rows, read_json)

import numpy as np
import soundfile
import torch

from experts import EXPERTS, load, resample_frames

STARTS = {"OGG": rb"OggS\0\x02", "FLAC": rb"fLaC[\0\x80]\0\0\x22",    # of a stream
          "MP3": rb"\AID3|\A\xff[\xe0-\xff]"}
WHOLE = {*STARTS, "WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "CAF"}    # or they show that not
# Else each tensor from a data process takes an open file.
torch.multiprocessing.set_sharing_strategy("file_system")


# --------------------------------------------------------------------------------------------------
# Audio. A clip is a path, or the bytes of a file.

class Sound(soundfile.SoundFile):
    """A clip, to be decoded once from front to back. length: in frames, None if not stated"""

    def __init__(self, clip):
        self.stream = open(clip, "rb") if isinstance(clip, str) else io.BytesIO(clip)
        super().__init__(self.stream)
        self.length = self.frames if self.frames < 2 ** 40 else None
        if self.format == "MP3":
            self.stream.seek(0)
            data = self.stream.read()
            self.close()
            tag = 10 + sum(data[9 - i] << 7 * i for i in range(4)) if data[:3] == b"ID3" else 0
            stated = re.search(b"Xing|Info|VBRI", data[tag:tag + 256])
            # Without it libsndfile takes the first frame's bit rate for that of all, and stops
            # there. So the file is longer while it is opened.
            self.stream = io.BytesIO(data + bytes(0 if stated else min(40 * len(data), 2 ** 28)))
            super().__init__(self.stream)
            self.stream.truncate(len(data))
            self.length = self.frames if stated else None

    def seekable(self):
        return False    # else soundfile seeks after each read; GSM and FLAC of a pipe cannot


def read_audio(clip, start=None, end=None, name=None, decode=True):
    """A clip, or a segment in seconds -> ((N,) float32 mono in [-1, 1], its rate in Hz); without
    decode its seconds by the header. Raises InputError."""
    name = name or clip
    try:
        sound = Sound(clip)
        rate = sound.samplerate
        if sound.length is None:
            length = sum(map(len, iter(lambda: list(sound.read(rate)), [])))
            sound = Sound(clip)
            sound.length = length
    except FileNotFoundError as e:
        raise InputError(f"no file '{name}'") from e
    except (OSError, TypeError, soundfile.LibsndfileError) as e:    # TypeError: .raw
        raise InputError(f"cannot decode '{name}' ({getattr(e, 'error_string', e)}); make a wav: "
                         f"ffmpeg -i '{name}' x.wav") from e
    first = round((start or 0) * rate)
    last = sound.length if end is None else min(sound.length, round(end * rate))
    # libsndfile reads what is left; only its log tells. The header of a pipe states 2 GB.
    sizes = re.findall(r": +(\d+) \(should be (\d+)\)", sound.extra_info)
    is_cut = [1.01 * int(there) < int(stated) < 0x7f000000 for stated, there in sizes]
    if last == sound.length and (any(is_cut) or sound.format not in WHOLE
                                 or "Junk after the last page" in sound.extra_info):
        raise InputError(f"'{name}' ({sound.format}) is cut off or joined, or its kind does not tell")
    if not 0 <= first < last:
        raise InputError(f"'{name}' has no samples from {start or 0} s to {end or 'its end'}")
    check_seconds((last - first) / rate, f"'{name}'")
    with sound:
        if not decode:
            return (last - first) / rate
        seeks = soundfile.SoundFile.seekable(sound)
        before = min(first, rate) if seeks else first    # an mp3 frame needs 1 s
        try:
            if seeks:
                sound.seek(first - before)
            frames = sound.read(before + last - first, dtype="float32", always_2d=True)[before:]
        except soundfile.LibsndfileError as e:
            raise InputError(f"'{name}' breaks off ({e.error_string}); export it again") from e
        if sound.format != "MP3":    # that was read frame by frame; of one more a rest may be left
            sound.stream.seek(4)
        rest = sound.stream.read() if last == sound.length else b""
    goes_on = len(rest) > 4096 and re.search(STARTS.get(sound.format, b"$^"), rest)
    if len(frames) < 0.99 * (last - first) or goes_on:
        raise InputError(f"'{name}' is cut off, or joined: of {last - first} samples by its header "
                         f"it has {len(frames)}{', and then more' if goes_on else ''}")
    peak = np.abs(frames).max()
    if not peak <= MAX_PEAK:    # so that NaN is refused too
        raise InputError(f"'{name}' has samples up to {peak:g}; divide integers stored as float")
    wave = torch.from_numpy(frames).mean(1)
    if peak and not wave.any():
        raise InputError(f"the channels of '{name}' cancel each other; give one of them")
    return wave, rate


# --------------------------------------------------------------------------------------------------
# Sources of rows. Each has
#   len(), load(i)   number of rows; row i, with "wave" (N,) and "rate" in Hz if it has audio
#   lengths          (rows,) seconds of audio, 0 without
#   skipped          [(row, InputError)] of those that headers or stated lengths rule out
#   files, about     what it is read from; what it is, in one line
#   draw(n, rng)     (n,) row numbers in random order

def open_source(text, training_rows=None, seed=0):
    """rows.jsonl, mixture.json, a benchmark (see Benchmark), or synthetic tones, tones[:KINDS[:N]]:
    training_rows, and with N so many labelled ones of each kind before them; without training_rows
    held-out ones, N of each kind (60)."""
    if re.split("[@=]", text)[0] in BENCHMARKS:
        return Benchmark(text)
    if not re.match("tones(:|$)", text):
        return Mixture(text) if text.endswith(".json") else Manifest(text)
    found = re.fullmatch(r"tones(?::([\w,]*)(?::([1-9]\d{0,5}))?)?", text)
    kinds = (found and found[1] or ",".join(DEFAULT_TONES)).split(",")
    if not found or set(kinds) - set(TONES):
        raise InputError(f"'{text}': give tones[:KINDS[:N]], kinds {','.join(TONES)}")
    if training_rows is None:
        return Tones("heldout", int(found[2] or 60) * len(kinds), kinds)
    return Tones("train", training_rows, kinds, int(found[2] or 0), seed)


def usable_rows(source):
    """(usable,) row numbers, as far as headers and stated lengths tell."""
    return np.setdiff1d(np.arange(len(source)), [i for i, _ in source.skipped])


def passes(rows, n, rng):
    """(n,) of the rows: whole passes in random order, the last one cut short."""
    whole = math.ceil(n / max(1, len(rows)))
    return np.concatenate([rows[:0], *(rng.permutation(rows) for _ in range(whole))])[:n]


def fingerprint(source):
    """Hex digest of what plans follow from: rows and lengths."""
    found = hashlib.sha256(source.lengths.tobytes())
    for path in source.files:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    found.update(json.dumps(getattr(source, "rows", "")).encode())    # of a benchmark
    return found.hexdigest()


NUMBER = (int, float, type(None))
KINDS = {"prompt": str, "response": str, "task": str, "audio": (str, type(None)), "start": NUMBER,
         "end": NUMBER, "seconds": NUMBER, "choices": (list, type(None)),
         "question": (str, type(None))}
LOADED_KEYS = ("wave", "rate", "row")    # what loading adds


def parse_row(line, where, answered=True):
    """A line of a manifest, bytes -> the row; answered: it needs a response. Raises InputError."""
    row = {"audio": None, "task": "qa", "seconds": None} | ({} if answered else {"response": "?"})
    try:
        row |= json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()    # fails at half a character
    except (ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{where}: {e}; write one JSON object a line, in UTF-8") from e
    bad = [key for key in LOADED_KEYS if key in row]
    for key, kind in KINDS.items():
        value = row.get(key)
        texts = [value] if kind is str else value if isinstance(value, list) else ["-"]
        if not isinstance(value, kind) or isinstance(value, bool) or not all(
                isinstance(text, str) and text.strip() for text in texts) or (
                kind is NUMBER and not 0 <= (value or 0) <= 1e6):
            bad.append(key)
    if bad:
        raise InputError(f'{where}: "{bad[0]}" is missing, empty, taken or of another kind; '
                         "data.py convert reads other formats")
    row["task"] = row["task"].strip().lower()
    return row


class Manifest:
    """The rows of JSON-lines files. Each line is checked once and read again when it is needed, so
    that a row takes 16 bytes of memory. Raises InputError with a malformed one's number."""

    files = ()
    left_out = ()    # of skipped, what is known without the audio

    def __init__(self, *paths):
        self.paths = self.files = paths
        self.first = [0]       # number of each file's first row; at the end the number of rows
        self.tasks = Counter()
        starts = array("q")    # first byte of each row in its file
        stated = array("d")    # seconds of each row, nan where unknown
        for path in paths:
            if not os.path.isfile(path) or path.endswith(".parquet"):
                raise InputError(f"'{path}' is neither JSON lines, as convert writes, nor one of "
                                 f"{', '.join(BENCHMARKS)}")
            start = 0
            for number, line in enumerate(open(path, "rb"), 1):
                if line.strip():
                    i = len(starts) - self.first[-1]
                    row = parse_row(line, f"{path}, row {i} (line {number})")
                    seconds = math.nan if row["seconds"] is None else row["seconds"] or -1
                    starts.append(start)
                    stated.append(0 if row["audio"] is None else seconds)
                    self.tasks[row["task"]] += 1
                start += len(line)
            if len(starts) == self.first[-1]:
                raise InputError(f"'{path}' holds no rows")
            self.first.append(len(starts))
        self.starts = np.array(starts)
        self.stated = np.array(stated)

    def __len__(self):
        return len(self.stated)

    def where(self, i):
        """-> the path of row i's file, its number there"""
        k = np.searchsorted(self.first, i, side="right") - 1
        return self.paths[k], i - self.first[k]

    def __getitem__(self, i):
        """Row i without its wave."""
        start = self.starts[i]    # IndexError after the last one, which ends a loop over the rows
        path, number = self.where(i)
        with open(path, "rb") as file:    # anew: processes that share an open one share its place
            file.seek(start)
            row = parse_row(file.readline(), f"{path}, row {number}")
        if row["audio"] is not None:
            row["audio"] = os.path.join(os.path.dirname(path), row["audio"])
        return row

    def clip(self, i, row):    # what read_audio takes
        return row["audio"], row.get("start"), row.get("end"), row["audio"]

    def load(self, i):
        row = self[i]
        if row["audio"] is not None:
            row["wave"], row["rate"] = read_audio(*self.clip(i, row))
        return row

    @functools.cached_property
    def headers(self):
        """(lengths, skipped); opens the clips whose length is not stated, once."""
        lengths = self.stated.copy()
        skipped = list(self.left_out)
        in_range = (lengths >= MIN_SECONDS) & (lengths <= MAX_SECONDS)    # nan is not
        for i in np.flatnonzero(~in_range & (lengths != 0)).tolist():
            row = self[i]
            try:
                if row.get("seconds") is not None:
                    check_seconds(row["seconds"], f"'{row['audio']}'")
                lengths[i] = read_audio(*self.clip(i, row), decode=False)
            except InputError as e:
                lengths[i] = 0
                skipped.append((i, e))
        return lengths, sorted(skipped, key=lambda found: found[0])

    lengths = property(lambda self: self.headers[0])
    skipped = property(lambda self: self.headers[1])

    @property
    def about(self):
        tasks = [f"{n} {task}{' (unknown: exact match)' * (task not in TASKS)}"
                 for task, n in self.tasks.items()]
        return f"{len(self)} rows, {self.lengths.sum() / 3600:.3f} h: {', '.join(tasks)}"

    @functools.cached_property
    def usable(self):
        """[usable row numbers] of each file."""
        rows = usable_rows(self)
        return np.split(rows, np.searchsorted(rows, self.first[1:-1]))

    def draw(self, n, rng):
        return passes(usable_rows(self), n, rng)


def allot(n, weights, caps):
    """Whole numbers by weights, none above its cap, that sum to n or to the sum of caps, if that is
    less. What a full one cannot take goes to the others by their weights."""
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
    """Manifests in groups with shares, and in a group alike or by size (appendix A says both), in
    whole passes and none beyond its max_epochs. What a source cannot give goes to the others of its
    group, what a group cannot give to other groups."""

    def __init__(self, path):
        self.path = path
        self.groups = {}        # {group: (share, draw by size?, numbers of its sources)}
        self.max_epochs = []    # of each source
        paths = []
        with open(path, encoding="utf-8") as file:
            text = "".join(line for line in file if not line.lstrip().startswith("//"))
        spec = json.loads(text)
        limit = spec.pop("max_epochs", math.inf)
        self.stage_rows = int(spec.pop("rows", 1_600_000))
        for group, given in spec.pop("groups").items():
            first = len(paths)
            for source in given.pop("sources"):
                source = {"rows": source} if isinstance(source, str) else source
                paths.append(os.path.join(os.path.dirname(path), source["rows"]))
                self.max_epochs.append(float(source.get("max_epochs", limit)))
            share = float(given.pop("share"))
            by_size = {"uniform": False, "by size": True}[given.pop("draw", "uniform")]
            self.groups[group] = (share, by_size, np.arange(first, len(paths)))
            spec |= given    # nothing may be left
            if not 0 < share < math.inf or first == len(paths):
                raise InputError(f"'{path}': {group} needs a share and sources")
        if spec or not min(self.max_epochs) > 0 or text.count('"share"') > len(self.groups):
            raise InputError(f"'{path}': max_epochs of 0, a group twice, or keys {list(spec)}")
        super().__init__(*paths)
        self.files = (path, *paths)

    def counts(self, n):
        """(sources,) how many of n rows come from each. Raises InputError if there are fewer."""
        caps = np.array([int(min(n, limit * len(rows))) if len(rows) else 0
                         for rows, limit in zip(self.usable, self.max_epochs)])
        shares = [share for share, _, _ in self.groups.values()]
        budget = allot(n, shares, [caps[members].sum() for _, _, members in self.groups.values()])
        if budget.sum() < n:
            raise InputError(f"{n} rows, but '{self.path}' has {budget.sum()} under its max_epochs")
        counts = np.zeros(len(caps), int)
        for (_, by_size, members), rows in zip(self.groups.values(), budget):
            weights = [max(1, len(self.usable[k])) if by_size else 1 for k in members]
            counts[members] = allot(rows, weights, caps[members])
        return counts

    def draw(self, n, rng):
        """Of a source each row comes k or k+1 times."""
        rng = copy.deepcopy(rng)    # the caller's stays as it is
        drawn = [passes(rows, k, rng) for rows, k in zip(self.usable, self.counts(n))]
        return rng.permutation(np.concatenate(drawn))

    def report(self, n):
        counts = self.counts(n)
        lines = [f"{'usable rows':>14}{'drawn':>10}{'share':>8}{'epochs':>8}"]
        for path, rows, count in zip(self.paths, self.usable, counts):
            epochs = count / max(1, len(rows))
            lines.append(f"{len(rows):14}{count:10}{count / n:8.2%}{epochs:8.2f}  {path}")
        return lines


# --------------------------------------------------------------------------------------------------
# Synthetic tones, each with a question that only the sound answers: {kind: (question, answers)}

TONES = read_json(os.path.join(ASSETS, "tones.json"))
TIMBRES = TONES.pop("timbres")    # {name: (ratios, strengths) of the partials}
PITCH_CLASSES = TONES["semitone"][1]    # C, C# .. B
DEFAULT_TONES = [kind for kind in TONES if kind != "semitone"]    # that one only by name
UNLABELLED = {"prompt": "Listen.", "response": "ok", "choices": ["ok"], "task": "unlabelled"}


def partials(pitch, timbre, rng):
    """pitch (N,) in Hz -> (N,) a tone"""
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    wave = np.zeros(len(pitch))
    for ratio, strength in zip(*TIMBRES[timbre]):
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


def make_tone(kind, n, answer, rng):
    """(n,) samples in which the answer is right."""
    def any_pitch(low=220.0, octaves=2.0):
        return low * 2 ** rng.uniform(0, octaves)

    if kind == "louder":
        quiet = 10 ** (-rng.uniform(10, 20) / 20)    # 10 to 20 dB below
        first, last = (1, quiet) if answer == "first" else (quiet, 1)
        middle = rng.uniform(0.4, 0.6)
        return rng.standard_normal(n) * np.where(np.arange(n) / n < middle, first, last)
    if kind == "glide":
        octaves = rng.uniform(0.5, 1.5) * {"up": 1, "down": -1, "flat": 0}[answer]
        pitch = any_pitch(400, 1) * 2 ** (octaves * np.linspace(-0.5, 0.5, n))
        return partials(pitch, rng.choice(["flute", "reed"]), rng) * envelope(n, 0.7, 1, rng)
    if kind == "clicks":
        count = int(answer)
        tenths = rng.choice(np.arange(1, 10), count, replace=False) + rng.uniform(-0.2, 0.2, count)
        decay = np.exp(-np.arange(int(0.05 * SAMPLE_RATE)) / (0.01 * SAMPLE_RATE))    # 10 ms to 1/e
        wave = np.zeros(n)
        for tenth in np.sort(tenths):
            start = int(n * tenth / 10)
            burst = decay * rng.standard_normal(len(decay))
            wave[start:start + len(decay)] += burst[:n - start]
        return wave
    if kind == "timbre":
        tone = (rng.standard_normal(n) if answer == "noise"
                else partials(np.full(n, any_pitch()), answer, rng))
        return tone * envelope(n, 0.5, 0.9, rng)
    if kind == "voices":
        second = rng.choice([4, 7, 9])    # semitones above the root
        third = rng.choice([3, 4])
        root = any_pitch()
        wave = np.zeros(n)
        for semitones in {"1": (0,), "2": (0, second), "3": (0, third, 7)}[answer]:
            wave += partials(np.full(n, root * 2 ** (semitones / 12)), "flute", rng)
        return wave * envelope(n, 0.6, 0.9, rng)
    semitones = PITCH_CLASSES.index(answer)    # note and semitone
    octave = rng.integers(0, 2)    # 4 or 5
    detuned = rng.uniform(-0.1, 0.1)
    pitch = 440 * 2 ** ((semitones - 9) / 12 + octave + detuned / 12)
    tone = partials(np.full(n, pitch), rng.choice(["flute", "reed"]), rng)
    return tone * envelope(n, 0.6, 0.9, rng)


class Tones:
    """A source of n rows. Row i of a split, "train" or "heldout", is the same on every machine.

    labelled    clips of each kind, chosen by seed, that come first and are half of a stage; the
                other half are n clips that are all answered by ok"""

    files = ()
    skipped = ()

    def __init__(self, split, n, kinds=DEFAULT_TONES, labelled=0, seed=0):
        self.stream = ("train", "heldout").index(split)
        self.kinds = tuple(kinds)
        self.n_labelled = labelled * len(kinds)
        self.seed = seed
        n += self.n_labelled
        self.lengths = 1.2 + 0.8 * (np.arange(n) * 0.6180339887 % 1)    # 1.2 to 2 s, golden steps
        self.about = f"{n} synthetic tones: {', '.join(kinds)}"

    def __len__(self):
        return len(self.lengths)

    def load(self, i):
        kind = self.kinds[i % len(self.kinds)]
        question, answers = TONES[kind]
        if i < self.n_labelled:
            rng = np.random.default_rng([2, self.seed, i])    # 0 and 1 are the splits
            answer = answers[i // len(self.kinds) % len(answers)]
        else:
            rng = np.random.default_rng([self.stream, i])
            answer = answers[rng.integers(len(answers))]
        n = round(SAMPLE_RATE * self.lengths[i])
        wave = make_tone(kind, n, answer, rng)
        wave *= rng.uniform(0.1, 0.7) / np.abs(wave).max()
        wave += 10 ** rng.uniform(-4, -2.3) * rng.standard_normal(n)    # noise at -80 to -46 dB
        row = {"wave": torch.tensor(wave, dtype=torch.float32), "rate": SAMPLE_RATE,
               "prompt": question, "response": answer, "choices": answers, "task": kind}
        return row | UNLABELLED if 0 < self.n_labelled <= i else row

    def draw(self, n, rng):
        labelled, others = np.split(np.arange(len(self)), [self.n_labelled])
        if not len(labelled):
            return passes(others, n, rng)
        rng = copy.deepcopy(rng)    # the caller's stays as it is
        drawn = [passes(labelled, n // 2, rng), passes(others, n - n // 2, rng)]
        return rng.permutation(np.concatenate(drawn))


# --------------------------------------------------------------------------------------------------
# Batches of a stage

def plan_stage(source, steps, batch, seed, stage, window=50):
    """(steps, batch) row numbers of a stage, a function of its arguments alone. Of what the source
    draws, `window` steps at a time are sorted by length and come in random order; rows of text are
    dealt evenly over them."""
    if len(source.skipped) == len(source):
        raise InputError(f"none of the {len(source)} rows can be used; "
                         f"the first: {source.skipped[0][1]}")
    rng = np.random.default_rng([seed, stage])
    drawn = source.draw(steps * batch, rng)
    plan = []
    for start in range(0, len(drawn), window * batch):
        rows = drawn[start:start + window * batch]
        rows = rows[np.argsort(source.lengths[rows], kind="stable")]
        text, sound = np.split(rows, [np.sum(source.lengths[rows] == 0)])
        in_order = []
        for text_of_step in np.array_split(text, len(rows) // batch):
            n_sound = batch - len(text_of_step)
            in_order += [text_of_step, sound[:n_sound]]
            sound = sound[n_sound:]
        plan.append(rng.permutation(np.concatenate(in_order).reshape(-1, batch)))
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

    A batch is that of build_inputs with rows (without waves; none: an idle batch), seconds of audio
    and waves, {rate in Hz: [(N,) or None, one a row]}. A micro-batch has at most micro_tokens
    tokens with its padding, or one row."""
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

    if responses:    # scoring keeps the order
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
    """A row of text without targets, for a rank that has no row and must take a turn."""
    batch = build_inputs(spec, [None], ["nothing"], [""])
    batch["labels"].fill_(IGNORE)
    return batch | {"waves": {rate: [None] for rate in rates}, "rows": [], "seconds": 0.0}


def expert_targets(experts, batch, audio_embeds=None):
    """{name: (B, L, E)} z_k, the features of the frozen experts at the thinking tokens (25 Hz).

    Clip by clip, unpadded: clip-wide normalisation, reflection at the ends and ALiBi depend on the
    true length. In fp32: bf16 would show in log spectra."""
    targets = {}
    lengths = batch["n_audio"]
    for name, expert in experts.items():
        if expert.sample_rate is None:    # recon: what the language model consumes
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
# Data sets as tables: assets/corpora.json, what one trains on, as its makers lay it out, and
# assets/benchmarks.json, evaluation sets as lmms-eval has them. Both explain their keys.

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SOUNDS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".au", ".aiff", ".aif", ".w64", ".caf")
FAMILIES = ("General", "AIR-Bench", "Music", "Emotion", "ASR")    # of benchmarks, table 1
TABLES = ("csv", "json", "hub")    # what `convert` reads by names of columns
CLASSES = ("emotion", "genre")    # tasks whose wordings ask for one of fixed options
ROW_KEYS = ("benchmark", "family", "max_new_tokens", "rule", "wer", "prompt_is_ours")
CORPORA = read_json(os.path.join(ASSETS, "corpora.json"))
WORDINGS = CORPORA.pop("wordings")    # {task: prompts}, {} is the question
BENCHMARKS = read_json(os.path.join(ASSETS, "benchmarks.json"))
TASKS = {*WORDINGS, *TONES, "unlabelled"}
for SETS in (CORPORA, BENCHMARKS):
    SETS.pop("keys")    # what they mean
    for name, spec in SETS.items():
        SETS[name] = SETS.get(spec.pop("like", name)) | spec


class LeftOut(Exception):
    """Why an item becomes no row."""


def as_list(value):
    return [value] if isinstance(value, str) else list(value or ())


def digest(*words):
    """A number to choose by, the same on every machine."""
    return int(hashlib.md5(" ".join(words).encode(errors="surrogatepass")).hexdigest()[:8], 16)


def make_rows(spec, cells, root="", audio=None):
    """[the rows] that a description makes of an item, {column: value}, its audio in root if it is
    not given. Raises LeftOut."""
    def fill(key):
        return [text.format_map(cells) for text in as_list(spec.get(key))]

    for place in filter(None, fill("audio")):
        audio = audio or find_audio(os.path.join(root, place))
    if spec.get("audio") and not audio:
        raise LeftOut("no audio file")
    name = os.path.basename(audio or "")
    row = {"audio": audio, "prompt": "", "response": "", "task": spec["task"]}
    row |= {key: spec[key] for key in ROW_KEYS if key in spec}
    row |= {"question": text.strip() for text in fill("spoken")}
    row |= {key: round(float(text), 3) for key in ("start", "end", "seconds") for text in fill(key)}
    if "end" in row:
        row["seconds"] = round(row["end"] - row["start"], 3)
    for key, template in spec.get("keep", {}).items():
        with contextlib.suppress(KeyError):    # older tables have fewer columns
            row[key] = template.format_map(cells)
    row |= spec.get("more", {})
    question = next(filter(str.strip, fill("question")), "").strip()
    wordings = spec.get("wordings") or WORDINGS[spec["task"]]
    lettered = []
    columns = spec.get("choices")
    options = spec.get("options") or (cells[columns] if isinstance(columns, str)
                                      else [cells[column] for column in columns or ()])
    if columns or options:
        row["choices"] = read_choices(options)
        if spec["task"] in CLASSES:    # in an order of the clip's own, so that no letter is a hint
            question = wordings[digest(name) % len(wordings)]
            row["choices"].sort(key=lambda choice: digest(name, choice))
        lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"])]
        row["task"] = "mcq"

    rows = []
    for response in fill("response"):
        for pattern, replacement in spec.get("clean", ()):
            response = " ".join(re.sub(pattern, replacement, response).split())
        response = response.lower().strip() if spec.get("lower") else response.strip()
        prompt = wordings[digest(name, question, response) % len(wordings)].format(question).strip()
        if lettered:
            number = find_choice(response, row["choices"], spec.get("letter"))
            if number is not None:
                response = lettered[number]
            elif "rule" not in spec:    # upstream counts such a row as wrong
                raise LeftOut("an answer that is none of the choices")
            prompt = question and " ".join([question, *lettered])
        if "prompt" in spec:    # as it is, with white space at its ends
            prompt = spec["prompt"].format_map(cells | {"options": "\n".join(lettered)})
        words = re.sub("<.*?>", "", response)
        empty = not re.search(r"\w", words) if spec["task"] == "asr" else not response
        if not prompt or empty and spec.get("wer") != "rows":    # that rule counts them
            raise LeftOut("empty text")
        families = [family for family, names in spec.get("families", {}).items()
                    if re.search(rf"\b({names})s?\b", response, re.I)]
        if len(families) == 1 and "instrument" in prompt.split("\n")[0].lower():
            row["instrument_family"] = families[0]
        rows.append(row | {"prompt": prompt, "response": response})
    return rows


def read_choices(given):
    """A list, also in a text, "a|b|c", or lines -> [text] without letters. Raises LeftOut."""
    if isinstance(given, str) and given.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            given = ast.literal_eval(given)
    if isinstance(given, str):    # "(A) this (B) that", too
        given = re.split(r"\n|\s(?=\([B-Z]\)\s)|\|", given.strip())
    texts = ["" if text is None else str(text).strip() for text in given or ()]
    while texts and not texts[-1]:
        texts.pop()
    marks = [re.match(rf"\(?{letter}[.):]\s*", text) for letter, text in zip(LETTERS, texts)]
    if all(marks):
        texts = [text[mark.end():] for mark, text in zip(marks, texts)]
    if not all(texts) or not 2 <= len(texts) <= len(LETTERS):    # the letters after it would change
        raise LeftOut("an empty choice, or fewer than two")
    return texts


def find_choice(answer, choices, by_letter=False):
    """The number of the choice that an answer names, or None: by text, letter, both, or a number
    from 0; by_letter: by its first letter whatever follows."""
    texts = [choice.casefold() for choice in choices]
    if not by_letter and answer.casefold() in texts:
        return texts.index(answer.casefold())
    found = re.fullmatch(r"\(?([A-Z]|\d+)\b[.):]*\s*(.*)", answer, re.I | re.S)
    if found:
        name = found[1]
        number = int(name) if name.isdigit() else LETTERS.index(name.upper())
        if name.isdigit() and any(text.isdigit() for text in texts):    # it is a text, of no choice
            return None
        if number < len(texts) and (by_letter or found[2].casefold() in ("", texts[number])):
            return number
    return None


def find_audio(place):
    """A path that is a file; else the one audio file of its name, with any ending and in any case
    of letters, or None. Raises LeftOut."""
    if os.path.isfile(place):
        return place
    folder, name = os.path.split(os.path.normpath(place))
    name = name.lower()
    stem = os.path.splitext(name)[0] if name.endswith(SOUNDS) else name
    found = listing(folder).get(name) or listing(folder).get(stem, [None])
    if len(found) > 1:
        raise LeftOut("several audio files of its name")
    return found[0]


@functools.lru_cache(1024)
def listing(folder):
    """{name in small letters without its ending: [paths]} of a folder's audio files."""
    found = {}
    for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        stem, ending = os.path.splitext(file.lower())
        if ending in SOUNDS:
            found.setdefault(stem, []).append(os.path.join(folder, file))
    return found


# Some tables mix Latin-1 into their UTF-8.
codecs.register_error("latin-1", lambda e: (e.object[e.start:e.end].decode("latin-1"), e.end))


def read_table(path, quoted=True, each=()):
    """Yields the dicts of a file: a header and cells between commas, tabs or bars; or JSON, one a
    line or in an array, alone or as the "data" of an object; each: keys of lists in lists, items
    also have what is beside their list. null is an empty text."""
    csv.field_size_limit(2 ** 24)
    with open(path, encoding="utf-8-sig", errors="latin-1", newline="") as file:
        if not path.endswith((".json", ".jsonl")):
            mark = max(",\t|", key=file.readline().count)
            file.seek(0)
            quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            yield from csv.DictReader(file, delimiter=mark, quoting=quoting, restval="")
            return
        text = file.read()
    try:
        items = json.loads(text)
    except json.JSONDecodeError:
        items = map(json.loads, filter(str.strip, text.split("\n")))
    if isinstance(items, dict):
        items = [items] if each else items.get("data", [items])
    for key in each:
        items = [outer | inner for outer in items for inner in outer[key]]
    for item in items:
        yield {key: "" if value is None else value for key, value in dict(item).items()}


def corpus_items(name, root, split):
    """Yields arguments of make_rows for the items of a corpus, or why one becomes no row."""
    spec = CORPORA[name]
    as_named = spec.get("split_names", {}).get(split, split)
    tables = [table.replace("{split}", as_named) for table in as_list(spec["table"])]
    found = (glob.glob(f"{glob.escape(root)}/{table}") for table in tables)
    paths = next(filter(None, found), None)
    if not paths:
        raise InputError(f"no file '{root}/{tables[0]}'; {layout_of(name)}")
    for path in sorted(paths):
        if "line" in spec:
            with open(path, encoding="utf-8", errors="latin-1") as file:
                lines = re.finditer(spec["line"].replace("{split}", as_named), file.read(), re.M)
            items = [line.groupdict() for line in lines]
        elif "files" in spec:
            items = [{"file": os.path.relpath(path, root)}] * path.lower().endswith(SOUNDS)
        else:
            items = read_table(path, spec.get("quoted", True), spec.get("each", ()))
        for cells in items:
            cells |= {"split": split, "folder": os.path.relpath(os.path.dirname(path), root)}
            odd = []
            for column, form in spec.get("parse", {}).items():
                found = re.search(form.replace("{split}", split), str(cells[column]), re.S)
                cells |= found.groupdict() if found else {}
                odd += [] if found else [column]
            yield f"with another {odd[0]}" if odd else (spec, cells, root)


def open_dataset(place, config=None, split=None, **options):
    """A data set of the hub, a folder of save_to_disk, or parquet files (a pattern, or those in a
    folder that name config and split) -> datasets.Dataset, its audio undecoded."""
    import datasets    # takes a second
    files = glob.glob(place)
    if os.path.isdir(place):
        found = glob.glob(f"{glob.escape(place)}/**/*.parquet", recursive=True)
        files = [path for path in found if all(    # as whole words of the path
            re.search(rf"(^|[-./]){re.escape(word)}($|[-./])", os.path.relpath(path, place))
            for word in (config, split) if word)]
        if not split and len({os.path.basename(path).split("-")[0] for path in files}) > 1:
            raise InputError(f"'{place}' holds several splits; choose one")
        if found and not files:
            raise InputError(f"'{place}' has no parquet file of {config or ''} {split}")
    if files:
        table = datasets.load_dataset("parquet", data_files=sorted(files), split="train")
    elif glob.glob(f"{place}/dataset_*.json"):
        table = datasets.load_from_disk(place)
    else:
        table = datasets.load_dataset(place, config, split=split, **options)
    if isinstance(table, dict):    # of splits
        if split not in table and len(table) > 1:
            raise InputError(f"'{place}' has the splits {', '.join(table)}; choose one")
        table = table.get(split, next(iter(table.values())))
    for name, kind in table.features.items():
        if isinstance(kind, datasets.Audio) or isinstance(kind, dict) and "bytes" in kind:
            table = table.cast_column(name, datasets.Audio(decode=False))
    return table


class Benchmark(Manifest):
    """An evaluation set: NAME or NAME@REVISION of the hub, or NAME=PLACE, files of the same columns
    (see open_dataset) or the makers' folder. Its rows also have ROW_KEYS."""

    def __init__(self, text):
        name, revision, place = re.fullmatch(r"([^@=]+)(?:@([^=]+)|=(.+))?", text).groups()
        spec = BENCHMARKS[name] | {"benchmark": name}
        corpus = spec.get("corpus")
        hub = spec.get("hub")
        revision = revision or spec.get("revision")
        self.column = spec.get("clip", "audio")
        self.table = None    # datasets.Dataset
        if place and not glob.glob(place) or not place and not hub:
            raise InputError(f"no files; give {name}=PLACE, {corpus and layout_of(corpus)}")
        if corpus and os.path.isdir(place or "") and not glob.glob(f"{place}/dataset_*.json"):
            items = [found[1] for found in corpus_items(corpus, place, spec["split"])
                     if not isinstance(found, str)]
            spec = CORPORA[corpus] | spec | {"response": CORPORA[corpus]["response"]}
        else:
            self.table = open_dataset(place or hub, spec.get("config"), spec["split"],
                                      revision=revision, data_files=spec.get("data_files"))
            items = self.table.remove_columns(self.column)
        self.rows = []
        self.left_out = []
        for i, cells in enumerate(items):
            label = f"{name}:{i}"
            try:
                self.rows += make_rows(spec, cells, place, self.table and label)
            except LeftOut as e:
                self.rows.append({"audio": label, "task": spec["task"]})
                self.left_out.append((i, InputError(f"{label}: {e}")))
            except KeyError as e:
                raise InputError(f"{place or hub} has no column {e}, but {', '.join(cells)}") from e
        self.paths = (name,)
        self.first = [0, len(self.rows)]
        self.tasks = Counter(row["task"] for row in self.rows)
        self.stated = np.full(len(self.rows), math.nan)
        self.stated[[i for i, _ in self.left_out]] = 0
        self.origin = place or f"{hub}, {spec['split']}, revision {revision or 'newest'}"
        self.origin += "; the prompt is ours" * spec.get("prompt_is_ours", False)

    def __getitem__(self, i):
        return dict(self.rows[i])

    def clip(self, i, row):
        if not self.table:
            return super().clip(i, row)
        cell = self.table[int(i)][self.column]
        return cell["bytes"] or cell["path"], None, None, row["audio"]

    @property
    def about(self):
        return f"{self.paths[0]}: {super().about}; from {self.origin}"


# --------------------------------------------------------------------------------------------------
# The command line

def layout_of(name):
    table, audio = (" or ".join(f"ROOT/{place}" for place in as_list(CORPORA[name].get(key)))
                    for key in ("table", "audio"))
    return f"{name} has to lie as {table}, audio {audio or 'none'}{CORPORA[name].get('about', '')}"


def segment_of(cells):
    """What make_rows takes of an item that is a part of its file."""
    keys = ("start", "end")
    given = all(cells.get(key) not in (None, "") for key in keys)
    return {key: f"{{{key}}}" for key in keys} if given else {}


def any_table(args):
    """The flags name the columns."""
    labels = {}
    if args.name == "hub":
        if len(args.split or ()) > 1:
            raise InputError("hub: one --split at a time")
        table = open_dataset(args.root, args.config, args.split and args.split[0])
        labels = {name: kind.names for name, kind in table.features.items()
                  if hasattr(kind, "names")}    # stored as numbers
    else:
        table = read_table(args.root)
    for i, cells in enumerate(table):
        prompt = args.prompt or ("prompt" if "prompt" in cells and not args.question else None)
        audio = args.audio or ("audio" if "audio" in cells else None)
        if not prompt and not args.question and (
                args.choices or not audio or "{}" in "".join(WORDINGS[args.task])):
            raise InputError("give --prompt or --question, or --audio and a --task such as asr")
        cells |= {name: dict(enumerate(names)).get(cells[name], "")    # -1, or null, is no label
                  for name, names in labels.items()}
        response = cells[args.response]
        question = cells[prompt] if prompt else (args.question or "").format_map(cells)
        clip = cells[audio] if audio else None
        if None in cells or any(isinstance(text, (list, dict, type(None)))
                                for text in (response, question)):
            yield "no text where one belongs, or commas outside of quotes"
            continue
        if isinstance(clip, dict) and clip["bytes"]:    # of a data set; written as it is stored
            ending = os.path.splitext(clip["path"] or "")[1]
            name = hashlib.md5(clip["bytes"]).hexdigest()[:16]    # another split keeps its own
            path = f"{args.clips}/{name}{ending or '.' + Sound(clip['bytes']).format.lower()}"
            os.makedirs(args.clips, exist_ok=True)
            with open(path, "wb") as file:
                file.write(clip["bytes"])
            clip = {"path": os.path.abspath(path)}
        spec = {"task": args.task, "response": "{response}", "choices": args.choices,
                "wordings": ["{}"] if question else None, "question": "{question}",
                "audio": audio and "{clip}", "more": {
                    f"{name}_" if name in (*KINDS, *LOADED_KEYS) else name: cells[name]
                    for name in args.keep}} | segment_of(cells)
        cells |= {"response": response, "question": question,
                  "clip": clip["path"] if isinstance(clip, dict) else clip}
        yield spec, cells, os.path.dirname(args.root)


ROLES = (["user", "assistant"], ["human", "gpt"], ["user", "gpt"], ["human", "assistant"])
CLIP_KEYS = ("audios", "audio", "sounds", "sound", "audio_url", "path", "url")
MARK = re.compile(r"<\|?(?:audio|sound|speech|music|voice)\w*\|?>", re.I)    # of a clip in a text


def any_messages(args):
    """Conversations with the clip under one of CLIP_KEYS, or as a part of the question."""
    for item in read_table(args.root):
        turns = [turn if isinstance(turn, dict) else {}
                 for turn in item.get("messages") or item.get("conversations") or []]
        roles = [turn.get("role") or turn.get("from") for turn in turns]
        contents = [turn.get("content") or turn.get("value") or "" for turn in turns]
        parts = [[part for part in content if isinstance(part, dict)] for content in contents]
        texts = ["\n".join(part.get("text") or "" for part in of_turn) if of_turn else str(content)
                 for of_turn, content in zip(parts, contents)]
        paths = [[part[key] for part in of_turn for key in CLIP_KEYS if part.get(key)]
                 for of_turn in parts]
        clips = [clip for key in CLIP_KEYS for clip in as_list(item.get(key))] or sum(paths, [])
        other = [key for key in item if str(item[key]).lower().rstrip("]'").endswith(SOUNDS)
                 or item[key] and re.search("audio|sound|clip|wav", key)]
        other += [part["type"] for part in sum(parts, []) if part.get("type", "text") != "text"]
        if roles not in ROLES or item.get("system") or item.get("history"):
            yield "not of one question and one answer"
        elif paths[1] or MARK.search(texts[1]):
            yield "with a clip in the answer"
        elif len(clips) > 1 or len(MARK.findall(texts[0])) > 1:
            yield "with several clips"
        elif any(not isinstance(clip, str) for clip in clips):
            yield "with a clip that is no path"
        elif not clips and (other or MARK.search(texts[0])):
            yield f"with a clip under '{''.join(other[:1])}', not 'audio'"
        else:
            spec = {"task": args.task, "question": "{q}", "response": "{a}", "wordings": ["{}"],
                    "audio": clips and "{clip}"} | segment_of(item)
            cells = item | {"q": MARK.sub("", texts[0]), "a": texts[1], "clip": "".join(clips)}
            yield spec, cells, os.path.dirname(args.root)


def pitch_class_of(row):
    """The pitch class with most notes in a clip by basic-pitch (sum of posteriors above 0.5)."""
    expert = load("pitch")
    wave, rate = read_audio(row["audio"], row.get("start"), row.get("end"))
    notes = expert.notes(at_rate(wave, rate, expert.sample_rate))    # (F, 88) from A0
    strengths = torch.where(notes > 0.5, notes, 0).sum(0)
    by_class = torch.zeros(12).index_add(0, (torch.arange(88) + 9) % 12, strengths)
    return PITCH_CLASSES[by_class.argmax()] if by_class.any() else None


def items_of(args):
    """Yields arguments of make_rows, or why there is no row."""
    if args.name not in CORPORA:
        return any_table(args) if args.name in TABLES else any_messages(args)
    splits = args.split or CORPORA[args.name]["splits"]
    return (item for split in splits for item in corpus_items(args.name, args.root, split))


def convert(args):
    """Rows to stdout; to stderr how many, and what was left out."""
    written = 0
    left_out = Counter()
    if args.name != "hub":
        args.root = os.path.abspath(args.root)
    try:
        for found in items_of(args):
            try:
                if isinstance(found, str):
                    raise LeftOut(found)
                for row in make_rows(*found):
                    if args.pitch_class:
                        row["pitch_class"] = pitch_class_of(row)
                    line = json.dumps(row, ensure_ascii=False)
                    parse_row(line.encode(), "that training would refuse")
                    print(line)
                    written += 1
            except (LeftOut, ValueError) as e:
                left_out[str(e)] += 1
    except LookupError as e:
        raise InputError(f"'{args.root}' has no column {e}") from e
    reasons = "".join(f", {n} {reason}" for reason, n in left_out.most_common())
    print(f"{args.name}: {written} rows, {left_out.total()} left out{reasons}", file=sys.stderr)
    if not written:
        raise InputError(f"no rows in '{args.root}'")


def check(args):
    """Prints what a source holds and what training would skip -> whether any."""
    source = open_source(args.path)
    skipped = dict(source.skipped)
    rates = {expert.sample_rate for expert in EXPERTS.values()} - {None}
    spec = None if args.quick else load_coat("tiny").spec
    for i in set(range(len(source))) - set(skipped) if not args.quick else ():
        _, problems = collate([Rows(source)[i]], spec, rates)
        skipped |= {i: problem for problem in problems}
    print(source.about)
    print(f"{len(skipped)} would be skipped{', by their headers' * args.quick}")
    for i, problem in sorted(skipped.items())[:20]:
        print("  {}, row {}: {}".format(*source.where(i), problem))
    if isinstance(source, Mixture):
        print(f"a stage of {source.stage_rows} rows:", *source.report(source.stage_rows), sep="\n")
    return bool(skipped)


def parse_flags():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="what rows, a mixture or a benchmark hold")
    p.add_argument("path", help="rows.jsonl, mixture.json, or a benchmark")
    p.add_argument("--quick", action="store_true", help="believe headers, decode nothing")
    p = commands.add_parser("convert", help="the rows of a corpus or data set", formatter_class=raw,
                            epilog="\n".join(map(layout_of, CORPORA)))
    add = p.add_argument
    add("name", choices=[*CORPORA, *TABLES, "messages"], metavar="NAME", help="see below, or csv, "
        "json, hub (any data set of the hub, save_to_disk, parquet), messages (conversations)")
    add("root", metavar="ROOT", help="folder, file, or name of the data set")
    add("--split", nargs="+", help="instead of those to train on")
    add("--pitch-class", action="store_true", help="add each clip's dominant pitch class")
    for column in ("prompt", "audio", "choices", "response"):
        add(f"--{column}", default="response" if column == "response" else None,
            help=f"csv, json, hub: the column with it ({column}, if there)")
    add("--question", help='one for all rows; may name columns: "Is it {name}?"')
    add("--keep", nargs="+", default=[], metavar="COLUMN", help="further keys of the rows")
    add("--task", default="qa", choices=[task for task in WORDINGS if task not in CLASSES])
    add("--config", help="hub: configuration")
    add("--clips", default="clips", metavar="FOLDER", help="hub: for the clips")
    return parser.parse_args()


if __name__ == "__main__":
    one_line_errors()
    flags = parse_flags()
    sys.exit({"check": check, "convert": convert}[flags.command](flags))
