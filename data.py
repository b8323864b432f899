"""Audio, rows, the batches of a stage, benchmarks, corpora.

    python data.py check assets/clips.jsonl      # rows, hours, what would be skipped and why
    python data.py check MIXTURE.json --quick    # what a stage draws, too; decodes nothing
    python data.py convert clotho ROOT           # rows of a corpus as its makers lay it out
    python data.py convert hub NAME --split train --prompt question --response answer

A manifest holds one JSON object a line; audio paths are relative to it, null is a row of text:

    {"audio": "clips/rain.flac", "prompt": "What is heard?", "response": "rain", "task": "caption"}

Optional: "start" and "end" in seconds (a segment of the file), "seconds" (its length, saves opening
the file to sort by length), "choices" (the options of a multiple-choice row) and "question" (what a
judge is shown instead of the prompt). Rows count from 0, here and in all files and messages.
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
import string
import sys
from array import array
from collections import Counter

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from experts import EXPERTS, load, resample_frames
from model import (ASSETS, IGNORE, MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, InputError, build_inputs,
                   check_seconds, check_text, encode_row, load_coat, one_line_errors, pad_batch,
                   pad_rows)

MAX_KERNEL = 2 ** 24      # taps of a resampling kernel; for 44,099 Hz it would take gigabytes
MAX_PEAK = 2.0            # mp3 and resampling go a bit above 1, integers stored as float far above
# A header that states more does not know the length: a program wrote into a pipe.
MAX_FRAMES = 2 ** 40
MAX_BYTES = 0x7f000000
# Formats that show whether a file is whole, by their header or their stream.
FORMATS = ("WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "CAF", "FLAC", "OGG", "MP3")
# How a stream begins; mp3: with a frame or a tag.
STREAMS = {"OGG": rb"OggS\0\x02", "FLAC": rb"fLaC[\0\x80]\0\0\x22", "MP3": rb"ID3|\xff[\xe0-\xff]"}
# The usual way takes an open file for each tensor that comes from a data process.
torch.multiprocessing.set_sharing_strategy("file_system")


# --------------------------------------------------------------------------------------------------
# Audio. A clip is a path, or the bytes of a file.

class Sound(soundfile.SoundFile):
    """A stream of bytes to be decoded once, from front to back.

    length      in frames, or None if the header does not state it"""

    def __init__(self, stream):
        self.stream = stream
        super().__init__(stream)
        self.length = self.frames if self.frames < MAX_FRAMES else None

    def seekable(self):
        return False    # else soundfile seeks after each read; GSM and FLAC of a pipe cannot

    def close(self):
        super().close()
        self.stream.close()


def open_sound(clip):
    """A clip -> Sound. Of an mp3 that states no length libsndfile would estimate it by the first
    frame, and stop there: while it is opened the file is long enough for any bit rate."""
    def stream():
        return open(clip, "rb") if isinstance(clip, str) else io.BytesIO(clip)

    sound = Sound(stream())
    if sound.format != "MP3":
        return sound
    with stream() as file:
        data = file.read()
    tag = 10 + sum(data[9 - i] << 7 * i for i in range(4)) if data[:3] == b"ID3" else 0
    if re.search(b"Xing|Info|VBRI", data[tag:tag + 256]):
        return sound
    longer = io.BytesIO(data + bytes(min(40 * len(data), 2 ** 28)))    # 320 kbit/s against 8
    sound = Sound(longer)
    sound.length = None
    longer.truncate(len(data))
    return sound


def open_audio(clip, start=None, end=None, name=None):
    """Opens a clip, or a segment of it in seconds, and checks all that its header says.

    name    of a clip that is bytes, for messages
    Returns (Sound, first frame, frame after the last). Raises InputError."""
    name = name or clip
    if isinstance(clip, str) and not os.path.isfile(clip):
        raise InputError(f"no file '{name}'; check the path")
    try:
        sound = open_sound(clip)
        if sound.length is None:
            length = 0
            while count := len(sound.read(sound.samplerate)):
                length += count
            sound = open_sound(clip)
            sound.length = length
    except (TypeError, soundfile.LibsndfileError) as e:    # TypeError: .raw, which has no header
        raise InputError(f"cannot decode '{name}' ({getattr(e, 'error_string', 'no header')}); "
                         f"make a wav of it: ffmpeg -i '{name}' clip.wav") from e
    rate = sound.samplerate
    first = round((start or 0) * rate)
    last = sound.length if end is None else min(sound.length, round(end * rate))
    if sound.format not in FORMATS:
        raise InputError(f"'{name}' is {sound.format}, which cannot tell whether it is whole; "
                         "convert it to wav or flac")
    if last == sound.length and is_cut(sound):
        raise InputError(f"'{name}' is cut off, or is two files in one; copy or export it again")
    if not 0 <= first < last:
        raise InputError(f"'{name}' has no samples from {start or 0} s to {end or 'its end'}; "
                         f"it lasts {sound.length / rate:.2f} s")
    check_seconds((last - first) / rate, f"'{name}'")
    return sound, first, last


def is_cut(sound):
    """Whether the header states more than there is. libsndfile reads what is left; its log tells."""
    sizes = re.findall(r": +(\d+) \(should be (\d+)\)", sound.extra_info)
    too_large = [1.01 * int(size) < int(stated) < MAX_BYTES for stated, size in sizes]
    return any(too_large) or "Junk after the last page" in sound.extra_info    # OGG


def goes_on(sound):
    """Whether another stream follows the one that was decoded to its end, as in joined files."""
    if sound.format == "MP3":    # was read frame by frame; what may be left is a frame, or a tag
        tail = sound.stream.read()
        return len(tail) > 4096 and bool(re.match(STREAMS["MP3"], tail))
    sound.stream.seek(4)
    return bool(re.search(STREAMS.get(sound.format, b"$^"), sound.stream.read()))


def read_audio(clip, start=None, end=None, name=None):
    """A clip, or a segment of it in seconds -> ((N,) float32 mono in [-1, 1], its rate in Hz).

    Reads whatever libsndfile decodes. Raises InputError."""
    name = name or clip
    sound, first, last = open_audio(clip, start, end, name)
    with sound:
        before = min(first, sound.samplerate)    # an mp3 frame needs those before it: 1 s
        try:
            if soundfile.SoundFile.seekable(sound):
                sound.seek(first - before)
            else:
                before = first
            frames = sound.read(before + last - first, dtype="float32", always_2d=True)[before:]
        except soundfile.LibsndfileError as e:
            raise InputError(f"'{name}' breaks off ({e.error_string}); export it again") from e
        if len(frames) < 0.99 * (last - first):
            raise InputError(f"'{name}' is cut off: {len(frames)} of {last - first} samples; "
                             "copy it again")
        if last == sound.length and goes_on(sound):
            raise InputError(f"'{name}' goes on after its end at {last / sound.samplerate:.2f} s, "
                             "as joined files do; decode them one by one, or export it again")
    peak = np.abs(frames).max()
    if not peak <= MAX_PEAK:    # so that NaN is refused too
        raise InputError(f"'{name}' has samples up to {peak:g}; export it with samples from -1 to "
                         "1 (or divide: integers were stored as float)")
    return torch.from_numpy(frames).mean(1), sound.samplerate


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
#   about       one line that says what it is
#   draw(n, rng)    (n,) row numbers of a stage in random order

def open_source(text, training_rows=None, seed=0):
    """A manifest (rows.jsonl), a mixture (.json), a benchmark (see Benchmark), or synthetic tones:
    tones[:KINDS[:N]].

    training_rows   how many rows training takes in all. Of tones there are as many, or, with N, N
                    labelled clips of each kind and as many without a label.
                    None: held-out tones, N rows of each kind (60)
    seed            of the labelled clips"""
    if re.split("[@=]", text)[0] in BENCHMARKS:
        return Benchmark(text)
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
    if isinstance(source, Benchmark):
        found.update(json.dumps(source.rows).encode())
    return found.hexdigest()


NUMBER = (int, float, type(None))
KINDS = {"prompt": str, "response": str, "task": str, "audio": (str, type(None)), "start": NUMBER,
         "end": NUMBER, "seconds": NUMBER, "choices": (list, type(None)),
         "question": (str, type(None))}
LOADED_KEYS = {"wave", "rate", "row"}    # what loading adds


def fits(value, kind):
    """Whether a value of a row is of its kind, and of use."""
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    if kind is NUMBER:
        return 0 <= (value or 0) <= 1e6
    if kind is str:
        return bool(value.strip())
    return all(isinstance(part, str) and part.strip() for part in value or ())


def parse_row(line, where, answered=True):
    """A line of a manifest, bytes -> the row. Raises InputError that begins with `where`.

    answered    False: it needs no response"""
    row = {"audio": None, "task": "qa", "seconds": None} | ({} if answered else {"response": "?"})
    try:
        row |= json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()    # fails at half a character
    except (ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{where}: {e}; write one JSON object a line, in UTF-8") from e
    bad = [key for key, kind in KINDS.items() if not fits(row.get(key), kind)]
    bad += row.keys() & LOADED_KEYS    # those are taken
    if bad:
        raise InputError(f'{where}: "{bad[0]}" is missing, empty or of another kind; a row has '
                         '"audio", "prompt" and "response", see data.py; python data.py convert '
                         "reads other formats")
    row["task"] = row["task"].strip().lower()
    return row


class Source:
    """What manifests and benchmarks share. They have [i], row i without its wave; clip(i, row), its
    path or bytes; stated, (rows,) seconds, nan where unknown; left_out, part of skipped; tasks,
    {task: rows}."""

    files = ()
    left_out = ()

    def load(self, i):
        row = self[i]
        if row["audio"] is not None:
            row["wave"], row["rate"] = read_audio(self.clip(i, row), row.get("start"),
                                                  row.get("end"), row["audio"])
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
                sound, first, last = open_audio(self.clip(i, row), row.get("start"),
                                                row.get("end"), row["audio"])
                with sound:
                    lengths[i] = (last - first) / sound.samplerate
            except InputError as e:
                lengths[i] = 0
                skipped.append((i, e))
        return lengths, sorted(skipped, key=lambda found: found[0])

    lengths = property(lambda self: self.headers[0])
    skipped = property(lambda self: self.headers[1])

    def draw(self, n, rng):
        return passes(usable_rows(self), n, rng)

    @property
    def about(self):
        tasks = [f"{n} {task}{' (unknown: exact match)' * (task not in TASKS)}"
                 for task, n in self.tasks.items()]
        return f"{len(self)} rows, {self.lengths.sum() / 3600:.3f} h: {', '.join(tasks)}"


class Manifest(Source):
    """The rows of JSON-lines files, one file after the other.

    Each line is checked once and read again when it is needed, so that a row takes 16 bytes of
    memory. Raises InputError with the line's number if one is malformed."""

    def __init__(self, *paths):
        self.paths = self.files = paths
        self.first = [0]       # number of each file's first row; at the end the number of rows
        self.tasks = Counter()
        starts = array("q")    # first byte of each row in its file
        stated = array("d")
        for path in paths:
            if os.path.isdir(path) or path.endswith(".parquet"):
                raise InputError(f"'{path}' is no manifest; python data.py convert hub writes one")
            if not os.path.isfile(path):
                raise InputError(f"no manifest '{path}'; give a file with one JSON object a line, "
                                 f"or a benchmark: {', '.join(BENCHMARKS)}")
            start = 0
            for number, line in enumerate(open(path, "rb"), 1):
                if line.strip():
                    i = len(starts) - self.first[-1]
                    row = parse_row(line, f"{path}, row {i} (line {number})")
                    seconds = 0 if row["audio"] is None else row["seconds"]
                    starts.append(start)
                    stated.append(math.nan if seconds is None else seconds or -1)
                    self.tasks[row["task"]] += 1
                start += len(line)
            if len(starts) == self.first[-1]:
                raise InputError(f"'{path}' holds no rows; write one JSON object a line")
            self.first.append(len(starts))
        self.starts = np.array(starts)
        self.stated = np.array(stated)

    def __len__(self):
        return len(self.starts)

    def where(self, i):
        """-> (number of the file, path, row in it)"""
        k = np.searchsorted(self.first, i, side="right") - 1
        return k, self.paths[k], i - self.first[k]

    def __getitem__(self, i):
        start = self.starts[i]    # IndexError after the last one, which ends a loop over the rows
        _, path, number = self.where(i)
        with open(path, "rb") as file:    # anew: processes that share an open one share its place
            file.seek(start)
            row = parse_row(file.readline(), f"{path}, row {number}")
        if row["audio"] is not None:
            row["audio"] = os.path.join(os.path.dirname(path), row["audio"])
        return row

    def clip(self, i, row):
        return row["audio"]

    @functools.cached_property
    def usable(self):
        """[usable row numbers] of each file."""
        rows = usable_rows(self)
        return np.split(rows, np.searchsorted(rows, self.first[1:-1]))


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
            spec = json.loads(text, object_pairs_hook=unique_names)
            for group, given in spec.pop("groups").items():
                first = len(paths)
                for source in given.pop("sources"):
                    source = {"rows": source} if isinstance(source, str) else source
                    paths.append(os.path.join(os.path.dirname(path), source["rows"]))
                    limit = source.get("max_epochs", spec.get("max_epochs", math.inf))
                    self.max_epochs.append(float(limit))
                by_size = {"uniform": False, "by size": True}[given.pop("draw", "uniform")]
                members = np.arange(first, len(paths))
                share = float(given.pop("share"))
                if given or not 0 < share < math.inf or not len(members):
                    raise ValueError(f'"{group}" needs a "share" above 0 and "sources"')
                self.groups[group] = (share, by_size, members)
            self.stage_rows = int(spec.pop("rows", 1_600_000))
            if spec.keys() - {"max_epochs"} or not min(self.max_epochs) > 0:
                raise ValueError('it holds "groups", "rows" and "max_epochs" above 0')
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
                RecursionError) as e:
            raise InputError(f"'{path}' is no mixture ({type(e).__name__}: {e}); see "
                             "assets/mixture.json") from e
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

    def draw(self, n, rng):
        """Of a source each row comes k or k+1 times. The caller's generator stays as it is."""
        rng = copy.deepcopy(rng)
        drawn = [passes(rows, k, rng) for rows, k in zip(self.usable, self.counts(n))]
        return rng.permutation(np.concatenate(drawn))

    def report(self, n):
        """Lines that say what a stage of n rows draws from each group and source."""
        counts = self.counts(n)
        lines = [f"{'usable rows':>14}{'share':>8}{'drawn':>10}{'epochs':>8}"]
        for group, (share, _, members) in self.groups.items():
            drawn = counts[members].sum()
            asked = share / sum(share for share, _, _ in self.groups.values())
            lines.append(f"{'':14}{drawn / n:8.2%}{drawn:10}{'':8}  {group} (asked: {asked:.2%})")
            for k in members:
                rows = len(self.usable[k])
                lines.append(f"{rows:14}{counts[k] / n:8.2%}{counts[k]:10}"
                             f"{counts[k] / max(1, rows):8.2f}    {self.paths[k]}")
        return lines


def unique_names(pairs):
    """A JSON object; of two equal names json would keep the last without a word."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a name comes twice among {', '.join(name for name, _ in pairs)}")
    return dict(pairs)


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


def make_clicks(n, answer, rng):
    count = int(answer)
    tenths = rng.choice(np.arange(1, 10), count, replace=False) + rng.uniform(-0.2, 0.2, count)
    decay = np.exp(-np.arange(int(0.05 * SAMPLE_RATE)) / (0.01 * SAMPLE_RATE))    # 10 ms to 1/e
    wave = np.zeros(n)
    for tenth in np.sort(tenths):
        start = int(n * tenth / 10)
        burst = decay * rng.standard_normal(len(decay))
        wave[start:start + len(decay)] += burst[:n - start]
    return wave


def make_timbre(n, answer, rng):
    if answer == "noise":
        tone = rng.standard_normal(n)
    else:
        tone = partials(np.full(n, any_pitch(rng)), answer, rng)
    return tone * envelope(n, 0.5, 0.9, rng)


def make_voices(n, answer, rng):
    second = rng.choice([4, 7, 9])    # semitones above the root
    third = rng.choice([3, 4])
    chord = {"1": (0,), "2": (0, second), "3": (0, third, 7)}[answer]
    root = any_pitch(rng)
    wave = np.zeros(n)
    for semitones in chord:
        wave += partials(np.full(n, root * 2 ** (semitones / 12)), "flute", rng)
    return wave * envelope(n, 0.6, 0.9, rng)


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
    "clicks": ("How many clicks?", ("1", "2", "3", "4"), make_clicks),
    "timbre": ("Which sound?", ("flute", "buzzer", "bell", "noise"), make_timbre),
    "voices": ("How many notes?", ("1", "2", "3"), make_voices),
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
        n += self.n_labelled
        self.lengths = 1.2 + 0.8 * (np.arange(n) * 0.6180339887 % 1)    # 1.2 to 2 s, golden steps
        self.about = f"{n} synthetic tones: {', '.join(kinds)}"

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
    """(steps, batch) row numbers of a stage, rows of a step alike in length.

    `window` steps at a time of what the source draws are sorted by length, see deal, and dealt out
    again in random order; rows of text are dealt evenly over the steps. A function of its arguments
    alone, so that a resumed run only needs to know its step. Raises InputError without any row."""
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
        steps_of_window = deal(np.concatenate(in_order), batch)
        plan.append(steps_of_window[rng.permutation(len(steps_of_window))])
    return np.concatenate(plan)


def deal(rows, batch):
    """(n,) row numbers in order -> (n / batch, batch): each step takes the next ones, but of copies
    of a row, as small sources need them, only one: the others change places with rows of the
    nearest steps that have none."""
    steps = rows.reshape(-1, batch)
    if len(np.unique(rows)) == len(rows):
        return steps
    steps = steps.tolist()
    for i, step in enumerate(steps):
        for place, row in enumerate(step):
            if row in step[:place]:
                spread(steps, i, place)
    return np.array(steps)


def spread(steps, i, place):
    """Swaps the row at a place of step i with one of the nearest step, where both are new there."""
    row = steps[i][place]
    for j in sorted(range(len(steps)), key=lambda j: abs(j - i)):
        new = [k for k, other in enumerate(steps[j]) if other not in steps[i]]
        if new and row not in steps[j]:
            steps[i][place] = steps[j][new[0]]
            steps[j][new[0]] = row
            return


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
# Data sets as tables. assets/corpora.json describes what one trains on, as its makers lay it out,
# assets/benchmarks.json the paper's evaluation sets as lmms-eval has them on the hub; the keys are
# explained there.

def read_descriptions(name):
    """A file of assets -> {name: description}; one that is "like" another has what that one has."""
    with open(os.path.join(ASSETS, name), encoding="utf-8") as file:
        found = json.load(file)["sets"]
    for name, spec in found.items():
        found[name] = found.get(spec.pop("like", name)) | spec
    return found


CORPORA = read_descriptions("corpora.json")
BENCHMARKS = read_descriptions("benchmarks.json")
FAMILIES = ("General", "AIR-Bench", "Music", "Emotion", "ASR")
with open(os.path.join(ASSETS, "corpora.json"), encoding="utf-8") as file:
    WORDINGS = json.load(file)["wordings"]    # of each task; {} is the question
TASKS = {*WORDINGS, *TONES, "unlabelled"}
CLASSES = ("emotion", "genre")    # their wordings ask for one of fixed choices
LETTERS = string.ascii_uppercase
SOUNDS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".au", ".aiff", ".aif", ".w64", ".caf")


class LeftOut(Exception):
    """Why an item of a data set becomes no row, to be counted."""


def as_list(value):
    return [value] if isinstance(value, str) else list(value)


def digest(*words):
    """A number to choose by, the same on every machine."""
    text = " ".join(words).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.md5(text).digest()[:4], "big")


def make_rows(spec, cells, root="", audio=None):
    """[the rows] that a description makes of an item. Raises LeftOut.

    cells       {column: value} of the item
    audio       its clip, where it does not lie in root"""
    def fill(key):
        return [text.format_map(cells) for text in as_list(spec.get(key) or ())]

    task = spec["task"]
    if spec.get("audio"):
        found = (find_audio(os.path.join(root, place)) for place in fill("audio"))
        audio = next(filter(None, found), None)
        if not audio:
            raise LeftOut("no audio file")
    name = os.path.basename(audio or "")
    question = next(filter(str.strip, fill("question")), "").strip()
    wordings = spec.get("wordings") or WORDINGS[task]
    row = {"audio": audio, "prompt": "", "response": "", "task": task}
    choices = spec.get("options") or spec.get("choices")
    lettered = []
    if choices:
        if "options" not in spec:
            choices = (cells[choices] if isinstance(choices, str)
                       else [cells[column] for column in choices])
        choices = read_choices(choices)
        if task in CLASSES:    # in an order of the clip's own, so that no letter is a hint
            question = wordings[digest(name) % len(wordings)]
            choices.sort(key=lambda choice: digest(name, choice))
        lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices)]
        row |= {"task": "mcq", "choices": choices}
    if spec.get("spoken"):
        row["question"] = fill("spoken")[0].strip()
    for key in ("start", "end", "seconds"):
        if key in spec:
            row[key] = round(float(fill(key)[0]), 3)
    if "end" in row:
        row["seconds"] = round(row["end"] - row["start"], 3)
    for key, template in spec.get("keep", {}).items():
        with contextlib.suppress(KeyError):    # older tables have fewer columns
            row[key] = template.format_map(cells)

    rows = []
    for response in fill("response"):
        for pattern, replacement in spec.get("clean", ()):
            response = re.sub(pattern, replacement, response)
        response = response.lower().strip() if spec.get("lower") else response.strip()
        if "clean" in spec:
            response = " ".join(response.split())
        words = re.sub("<.*?>", "", response) if task == "asr" else response
        if spec.get("wer") != "rows" and (not response or task == "asr"
                                          and not re.search(r"\w", words)):
            raise LeftOut("empty text")
        prompt = wordings[digest(name, question, response) % len(wordings)].format(question)
        if choices:
            number = find_choice(response, choices, spec.get("letter"))
            if number is not None:
                response = lettered[number]
            elif "rule" not in spec:    # upstream counts such a row as wrong
                raise LeftOut("with an answer that is none of the choices")
            prompt = question and f"{question} {' '.join(lettered)}"
        prompt = prompt.strip()
        if "prompt" in spec:    # as it is, with white space at its ends
            prompt = spec["prompt"].format_map(cells | {"options": "\n".join(lettered)})
        if not prompt:
            raise LeftOut("empty text")
        rows.append(row | {"prompt": prompt, "response": response})
    return rows


def read_choices(given):
    """A list, {"A": text, ..}, "a|b|c", lines, or a list in a text -> [text]; "A. text" and
    "(A) text" lose their letter. Raises LeftOut."""
    if isinstance(given, str):
        try:
            given = (ast.literal_eval(given) if given.startswith("[")
                     else given.strip().split("\n" if "\n" in given else "|"))
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
    if not all(texts) or not 2 <= len(texts) <= len(LETTERS):    # the letters after it would change
        raise LeftOut("with an empty choice" if texts else "without choices")
    return texts


def find_choice(answer, choices, by_letter=False):
    """The number of the choice that an answer names, or None: by its text, its letter, both, or a
    number from 0; with by_letter only "B" or "(B) .."."""
    forms = ("{text}", "{letter}", "({letter})", "{letter}.", "{letter}. {text}",
             "({letter}) {text}", "{number}")
    if by_letter:
        answer = "".join(re.findall(r"^\(?([A-Z])\b", answer))
        forms = ("{letter}",)
    for form in forms:
        for number, (letter, text) in enumerate(zip(LETTERS, choices)):
            name = form.format(letter=letter, text=text, number=number)
            if answer.casefold() == name.casefold():
                return number
    return None


def find_audio(place):
    """A path that is a file; else the audio file of this name with another ending, in any case of
    letters; else None. Raises LeftOut if there are several."""
    if os.path.isfile(place):
        return place
    folder, name = os.path.split(os.path.normpath(place))
    stems = (name.lower(), os.path.splitext(name)[0].lower())
    found = next(filter(None, map(listing(folder).get, stems)), [None])
    if len(found) > 1:
        raise LeftOut("with several audio files of its name")
    return found[0]


@functools.lru_cache(1024)
def listing(folder):
    """{name in small letters without its ending: [paths]} of a folder's audio files; to ask for
    each file is slow."""
    found = {}
    for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        stem, ending = os.path.splitext(file.lower())
        if ending in SOUNDS:
            found.setdefault(stem, []).append(os.path.join(folder, file))
    return found


# Some tables mix Latin-1 into their UTF-8.
codecs.register_error("latin-1", lambda e: (e.object[e.start:e.end].decode("latin-1"), e.end))


def read_table(path, quoted=True, each=()):
    """Yields the dicts of a file: of a header line and cells between commas, tabs or bars; or of
    JSON, one a line or in an array, alone or as the "data" of an object. null is an empty text."""
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
        if isinstance(items, dict) and not each:
            items = items.get("data", [items])
    except json.JSONDecodeError:
        items = map(json.loads, filter(str.strip, text.split("\n")))
    for key in each:    # lists in lists; the inner object also has what is beside its list
        items = [outer | inner for outer in ([items] if isinstance(items, dict) else items)
                 for inner in outer[key]]
    for item in items:
        yield {key: "" if value is None else value for key, value in dict(item).items()}


def corpus_items(spec, root, split):
    """Yields {column: value} of the items of a corpus, or why one becomes no row."""
    as_named = spec.get("split_names", {}).get(split, split)
    tables = [f"{root}/{table.replace('{split}', as_named)}" for table in as_list(spec["table"])]
    paths = next(filter(None, map(glob.glob, tables)), None)
    if not paths:
        raise InputError(f"no file '{tables[0]}'")
    for path in sorted(paths):
        if "line" in spec:
            with open(path, encoding="utf-8", errors="latin-1") as file:
                lines = re.finditer(spec["line"].replace("{split}", as_named), file.read(), re.M)
            items = (line.groupdict() for line in lines)
        elif "files" in spec:
            items = [{"file": os.path.relpath(path, root)}] * path.lower().endswith(SOUNDS)
        else:
            items = read_table(path, spec.get("quoted", True), spec.get("each", ()))
        column, pattern = spec.get("only", ("", ""))
        for cells in items:
            if not re.search(pattern.replace("{split}", split), str(cells.get(column))):
                continue
            cells |= {"split": split, "folder": os.path.relpath(os.path.dirname(path), root)}
            parsed = {column: re.search(form, cells[column], re.S)
                      for column, form in spec.get("parse", {}).items()}
            odd = [column for column, found in parsed.items() if not found]
            for found in parsed.values():
                cells |= found.groupdict() if found else {}
            for column, names in spec.get("names", {}).items():
                if cells[column] not in names:
                    odd.append(f"{column} {cells[column]}")
                cells[column] = names.get(cells[column])
            yield f"of another {odd[0]}" if odd else cells


def open_dataset(place, config=None, split=None, revision=None, data_files=None):
    """A data set of the hub, a folder that save_to_disk wrote, or parquet files: one, a pattern, or
    all in a folder whose path names config and split -> datasets.Dataset, its audio undecoded."""
    import datasets    # takes a second
    files = sorted(glob.glob(place))
    if os.path.isdir(place):
        files = sorted(glob.glob(f"{glob.escape(place)}/**/*.parquet", recursive=True))
        for word in filter(None, (config, split)):
            named = [path for path in files
                     if re.search(rf"(^|[/._-]){word}([/._-]|$)", os.path.relpath(path, place))]
            if word == split and not named and len(files) > 1:
                raise InputError(f"'{place}' holds {len(files)} parquet files and none of the "
                                 f"split {split}; give those you want, 'FOLDER/NAME*.parquet'")
            files = named or files
    if files:
        table = datasets.load_dataset("parquet", data_files=files, split="train")
    elif os.path.isdir(place):
        table = datasets.load_from_disk(place)
    else:
        data_files = data_files and {split: data_files}
        table = datasets.load_dataset(place, None if data_files else config, split=split,
                                      revision=revision, data_files=data_files)
    if isinstance(table, dict):    # of splits
        if split not in table and len(table) > 1:
            raise InputError(f"'{place}' has the splits {', '.join(table)}; choose one")
        table = table[split if split in table else next(iter(table))]
    for name, kind in table.features.items():
        if isinstance(kind, datasets.Audio) or isinstance(kind, dict) and "bytes" in kind:
            table = table.cast_column(name, datasets.Audio(decode=False))
    return table


class Benchmark(Source):
    """An evaluation set: NAME from the hub, NAME@REVISION, or NAME=PLACE, where files of the same
    columns lie, see open_dataset, or the makers' folder.

    A row has, beside what a manifest has: benchmark, family, max_new_tokens; rule and wer where
    upstream has one; prompt_is_ours."""

    def __init__(self, text):
        self.name, revision, place = re.fullmatch(r"([^@=]+)(?:@([^=]+)|=(.+))?", text).groups()
        spec = BENCHMARKS[self.name]
        corpus = CORPORA.get(spec.get("corpus"))
        hub = spec.get("hub")
        revision = revision or spec.get("revision")
        if not place and not hub:
            raise InputError(f"{self.name} is on no hub; give its makers' folder, "
                             f"{self.name}=ROOT: {layout_of(spec['corpus'])}")
        self.table = None    # datasets.Dataset
        self.column = spec.get("clip", "audio")
        self.origin = place or f"{hub}, {spec['split']}, revision {revision or 'newest'}"
        if corpus and os.path.isdir(place or "") and not glob.glob(f"{place}/*.arrow"):
            found = corpus_items(corpus, place, spec["split"])
            items = [cells for cells in found if not isinstance(cells, str)]
            spec = corpus | spec | {"response": corpus["response"]}
        else:
            self.table = open_dataset(place or hub, spec.get("config"), spec["split"], revision,
                                      spec.get("data_files"))
            if self.column not in self.table.column_names:
                raise InputError(f"{self.origin} has no column '{self.column}', but "
                                 f"{', '.join(self.table.column_names)}")
            items = self.table.remove_columns(self.column)
        kept = ("family", "max_new_tokens", "rule", "wer", "prompt_is_ours")
        common = {"benchmark": self.name} | {key: spec[key] for key in kept if key in spec}
        self.rows = []
        self.left_out = []
        for i, cells in enumerate(items):
            label = f"{self.name}:{i}"
            try:
                self.rows += make_rows(spec, cells, place, label)
            except LeftOut as e:
                self.rows.append({"audio": label})
                self.left_out.append((i, InputError(f"{label}: {e}")))
            except KeyError as e:
                raise InputError(f"{self.origin} has no column {e}") from e
            self.rows[i] |= common
        self.tasks = Counter(row["task"] for row in self.rows if "task" in row)
        self.stated = np.full(len(self.rows), math.nan)
        self.stated[[i for i, _ in self.left_out]] = 0
        self.ours = "; the prompt is ours" * spec.get("prompt_is_ours", False)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return dict(self.rows[i])

    def clip(self, i, row):
        if self.table is None:
            return row["audio"]
        cell = self.table[int(i)][self.column]
        return cell["bytes"] or cell["path"]

    @property
    def about(self):
        return f"{self.name} from {self.origin}: {super().about}{self.ours}"


# --------------------------------------------------------------------------------------------------
# The command line. What can be converted yields arguments of make_rows, or why there is no row.

def layout_of(name):
    """Where the files of a corpus have to lie, in words."""
    spec = CORPORA[name]
    table, audio = (" or ".join(f"ROOT/{place}" for place in as_list(spec.get(key, ())))
                    for key in ("table", "audio"))
    return f"{name} has to lie as {table}, audio {audio or 'none'}; {spec.get('about', '')}"


def any_corpus(args):
    for split in args.split or CORPORA[args.name]["splits"]:
        for cells in corpus_items(CORPORA[args.name], os.path.abspath(args.root), split):
            yield cells if isinstance(cells, str) else (CORPORA[args.name], cells,
                                                        os.path.abspath(args.root))


def any_table(args):
    """The flags name the columns."""
    labels = {}
    if args.name == "hub":
        table = open_dataset(args.root, args.config, *args.split or [None])
        labels = {name: kind.names for name, kind in table.features.items()
                  if hasattr(kind, "names")}    # stored as numbers
        os.makedirs(args.clips, exist_ok=True)
    else:
        table = read_table(args.root)
    spec = {"task": args.task, "response": "{response}", "choices": args.choices and "choices",
            "keep": {f"{name}_" if name in {*KINDS, *LOADED_KEYS} else name: f"{{kept{i}}}"
                     for i, name in enumerate(args.keep)}}
    for i, cells in enumerate(table):
        prompt = args.prompt or ("prompt" if "prompt" in cells and not args.question else None)
        audio = args.audio or ("audio" if "audio" in cells else None)
        if prompt or args.question:
            spec |= {"question": "{question}", "wordings": ["{}"]}
        elif args.choices or not audio or any("{}" in text for text in WORDINGS[args.task]):
            raise InputError("give --prompt COLUMN or --question TEXT; or --audio COLUMN and a "
                             "--task with prompts of ours, such as asr or caption")
        for name, names in labels.items():
            cells[name] = names[cells[name]]
        used = {"response": cells[args.response],
                "question": cells[prompt] if prompt else (args.question or "").format_map(cells)}
        if None in cells:    # where csv puts cells beyond the header's
            yield "with more cells than columns (quote text with commas)"
        elif any(isinstance(text, (list, dict, type(None))) for text in used.values()):
            yield "with no text where one belongs"
        else:
            used |= {f"kept{k}": cells[name] for k, name in enumerate(args.keep)}
            used["choices"] = cells[args.choices] if args.choices else None
            clip = cells[audio] if audio else None
            if isinstance(clip, dict):
                clip = save_clip(clip, os.path.abspath(f"{args.clips}/{i:07}"))
            yield (spec | {"audio": "{clip}" * bool(audio)}, used | {"clip": clip},
                   os.path.dirname(os.path.abspath(args.root)))


def save_clip(cell, stem):
    """Writes a clip of a data set as it is stored -> its path."""
    if not cell["bytes"]:
        return cell["path"]
    ending = os.path.splitext(cell["path"] or "")[1]
    path = stem + (ending or f".{open_sound(cell['bytes']).format.lower()}")
    with open(path, "wb") as file:
        file.write(cell["bytes"])
    return path


CLIP_KEYS = ("audios", "audio", "sounds", "sound", "audio_url", "path", "url")
MARK = re.compile(r"<\|?(audio|sound|speech|music|voice)\w*\|?>", re.I)    # of a clip in a text


def clips_of(value):
    """Paths in a value of a conversation: a text, a list, or a part such as {"audio": path}."""
    if isinstance(value, dict):
        value = [value[key] for key in CLIP_KEYS if value.get(key)]
    if isinstance(value, list):
        return [clip for part in value for clip in clips_of(part)]
    return [str(value)] if value else []


def any_messages(args):
    """Conversations: "messages" or "conversations", "query" and "response", or "instruction",
    "input" and "output"; the clip in "audios", "audio", "sound" or a part of the question."""
    spec = {"task": args.task, "question": "{question}", "response": "{response}",
            "wordings": ["{}"]}
    for item in read_table(args.root):
        turns = item.get("messages") or item.get("conversations") or [
            item.get("query") or f"{item.get('instruction', '')}\n{item.get('input', '')}",
            item.get("response") or item.get("output")]
        turns = [turn.get("content") or turn.get("value") if isinstance(turn, dict) else turn
                 for turn in turns]
        parts = [[part if isinstance(part, dict) else {"text": part} for part in as_list(turn or "")]
                 for turn in turns]
        texts = ["\n".join(part.get("text") or "" for part in turn).strip() for turn in parts]
        clips = clips_of({key: item[key] for key in CLIP_KEYS if key in item}) or clips_of(
            [part for turn in parts[:1] for part in turn])
        marks = MARK.findall(texts[0]) if texts else []
        other = [key for key, value in item.items() if isinstance(value, str)
                 and key not in CLIP_KEYS and value.lower().endswith(SOUNDS)]
        if len(texts) != 2 or item.get("system") or item.get("history"):
            yield "not of one question and one answer"
        elif MARK.search(texts[1]) or clips_of(parts[1]):
            yield "with a clip in the answer"
        elif len(clips) > 1 or len(marks) > 1:
            yield "with several clips"
        elif not clips and (other or marks):
            yield f"with a clip that is not under \"audio\" but {other or 'nowhere'}"
        else:
            yield (spec | {"audio": "{clip}" * len(clips)},
                   {"question": MARK.sub("", texts[0]), "response": texts[1], "clip": clips[:1]
                    and clips[0]}, os.path.dirname(os.path.abspath(args.root)))


ANY = {"csv": any_table, "json": any_table, "hub": any_table, "messages": any_messages}


def pitch_class_of(row):
    """The pitch class with most notes in a clip by basic-pitch: the sum over time of its note
    posteriorgram where that is above 0.5. None without a note. Raises InputError."""
    expert = load("pitch")
    wave, rate = read_audio(row["audio"], row.get("start"), row.get("end"))
    notes = expert.notes(at_rate(wave, rate, expert.sample_rate))    # (F, 88) from A0
    strengths = torch.where(notes > 0.5, notes, 0).sum(0)
    by_class = torch.zeros(12).index_add(0, (torch.arange(88) + 9) % 12, strengths)
    return PITCH_CLASSES[by_class.argmax()] if by_class.any() else None


def convert(args):
    """Rows to stdout; to stderr how many, and how many were left out and why."""
    layout = "see python data.py convert -h" if args.name in ANY else layout_of(args.name)
    written = 0
    left_out = Counter()
    try:
        for found in ANY.get(args.name, any_corpus)(args):
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
            except (LeftOut, InputError, UnicodeError) as e:
                left_out[str(e)] += 1
    except (OSError, LookupError, TypeError, ValueError) as e:
        if isinstance(e, InputError) and args.name in ANY:
            raise
        raise InputError(f"'{args.root}': {type(e).__name__} {e}; {layout}") from e
    reasons = "".join(f", {n} {reason}" for reason, n in left_out.most_common())
    print(f"{args.name}: {written} rows, {left_out.total()} left out{reasons}", file=sys.stderr)
    if not written:
        raise InputError(f"no rows in '{args.root}'; {layout}")


def check(args):
    """Prints what a source holds, and what training would skip -> whether any."""
    source = open_source(args.path)
    skipped = dict(source.skipped)
    rates = {expert.sample_rate for expert in EXPERTS.values()} - {None}
    spec = load_coat("tiny").spec
    for i in set(range(len(source))) - set(skipped) if not args.quick else ():
        _, problems = collate([Rows(source)[i]], spec, rates)
        skipped |= {i: problem for problem in problems}
    print(source.about)
    print(f"{len(skipped)} would be skipped{', by headers and stated lengths' * args.quick}")
    for i, problem in sorted(skipped.items())[:20]:
        where = "{1}, row {2}".format(*source.where(i)) if source.files else f"row {i}"
        print(f"  {where}: {problem}")
    if isinstance(source, Mixture):
        print(f"a stage of {source.stage_rows} rows:")
        print("\n".join(source.report(source.stage_rows)))
    return bool(skipped)


def parse_flags():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="what rows, a mixture or a benchmark hold")
    p.set_defaults(run=check)
    p.add_argument("path", help="rows.jsonl, mixture.json, or a benchmark")
    p.add_argument("--quick", action="store_true", help="believe headers, decode nothing")

    p = commands.add_parser("convert", help="the rows of a corpus or data set", formatter_class=raw,
                            epilog="\n".join(map(layout_of, CORPORA)))
    p.set_defaults(run=convert)
    add = p.add_argument
    add("name", choices=[*CORPORA, *ANY], metavar="NAME", help="see below; csv, json: any table; "
        "messages: conversations; hub: any data set of the hub, save_to_disk or parquet")
    add("root", metavar="ROOT", help="folder of the corpus; the file; the name of the data set")
    add("--split", nargs="+", help="instead of those to train on")
    add("--pitch-class", action="store_true", help="add each clip's dominant pitch class")
    add("--audio", help="csv, json, hub: column with the clips (audio, if there; none: text only)")
    add("--prompt", help="column with the questions (prompt, if there)")
    add("--question", help='instead: one for all rows; may name columns, "Is it {name}?"')
    add("--response", default="response", help="column with the answers (%(default)s)")
    add("--choices", help='column with choices, "a|b|c" or a list')
    add("--keep", nargs="+", default=[], metavar="COLUMN", help="further keys of the rows")
    add("--task", default="qa", choices=[task for task in WORDINGS if task not in CLASSES],
        help="of the rows; without questions of yours, of our prompts (%(default)s)")
    add("--config", help="hub: configuration of the data set")
    add("--clips", default="clips", metavar="FOLDER", help="hub: for the clips (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    one_line_errors()
    flags = parse_flags()
    sys.exit(flags.run(flags))
