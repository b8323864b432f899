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
import struct
import sys
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from experts import EXPERTS, resample_frames
from model import (BACKBONES, IGNORE, MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, InputError,
                   build_inputs, check_seconds, check_text, encode_row, one_line_errors, pad_batch,
                   pad_rows)

MAX_KERNEL = 2 ** 24    # taps of a resampling kernel; for 44,099 Hz it would take gigabytes
MAX_LINE = 100_000      # bytes of a row: 20 times what two minutes of speech say
MAX_TIME = 10 ** 6      # s, of "start", "end", "seconds": eleven days


# --------------------------------------------------------------------------------------------------
# Audio

def open_audio(path, start=None, end=None):
    """Opens a file, or a segment of it in seconds, and checks all that its header says.

    Returns (soundfile.SoundFile, first frame, number of frames). Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"no file {path!r}; check the path")
    if not is_time(start or 0) or not is_time(end or 0):
        raise InputError(f"from {start} s to {end} s: give numbers of seconds")
    cut = False
    try:
        cut = is_cut(path)
        file = soundfile.SoundFile(path)
    except OSError as e:
        raise InputError(f"cannot read '{path}' ({e.strerror}); check its permissions") from e
    except (soundfile.LibsndfileError, TypeError) as e:    # TypeError: .raw, which has no header
        reason = "it is cut off" if cut else getattr(e, "error_string", "it has no header")
        raise InputError(f"cannot decode '{path}' ({reason}); give wav, flac, ogg or mp3") from e

    first = round((start or 0) * file.samplerate)
    last = file.frames
    if end is not None:
        last = min(last, round(end * file.samplerate))
    if cut and last == file.frames:    # what ends before the cut can be used
        raise InputError(f"'{path}' is cut off; copy it again")
    if file.frames == 0:
        raise InputError(f"'{path}' holds no samples; record it again or drop the row")
    if not 0 <= first < last:
        raise InputError(f"'{path}' has nothing from {start or 0} s to {end or 'its end'}; "
                         f"it lasts {file.frames / file.samplerate:.2f} s")
    check_seconds((last - first) / file.samplerate, f"'{path}'")
    return file, first, last - first


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_time(value):
    """Is it a number of seconds?"""
    return is_number(value) and abs(value) <= MAX_TIME


def is_cut(path):
    """Does a WAV file hold less than its header says, or an OGG file end within a page? libsndfile
    would read what is left without a word. An OGG cut between two pages looks whole."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        kind = file.read(12)[:4]
        if kind == b"OggS":
            file.seek(max(0, size - 2 ** 16))    # a page is shorter
            tail = file.read()
            page = tail[tail.rfind(b"OggS\0"):]
            lengths = page[27:27 + page[26]] if len(page) > 26 else b""    # of its segments
            return 27 + len(lengths) + sum(lengths) > len(page)
        while kind == b"RIFF" and len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            if name == b"data":    # who writes into a pipe states 2 GB or more
                return length < 0x7ffff000 and size - file.tell() < 0.99 * length
            file.seek(length + length % 2, os.SEEK_CUR)
    return False


def read_audio(path, start=None, end=None):
    """A file, or a segment of it in seconds -> ((N,) float32 mono in [-1, 1], its rate in Hz).

    Reads whatever libsndfile decodes. Raises InputError."""
    file, first, count = open_audio(path, start, end)
    with file:
        try:
            file.seek(first)
            channels = file.read(count, dtype="float32", always_2d=True)    # (N, channels)
        except soundfile.LibsndfileError as e:
            raise InputError(f"'{path}' breaks off while decoding ({e.error_string}); "
                             "export it again") from e
    if len(channels) < 0.99 * count:
        raise InputError(f"'{path}' is cut off: {len(channels)} of {count} samples; copy it again")
    wave = torch.from_numpy(channels).mean(1)
    if not torch.isfinite(wave).all():
        raise InputError(f"'{path}' has NaN or infinite samples; export it again")
    check_seconds(len(wave) / file.samplerate, f"'{path}'")
    return wave, file.samplerate


def at_rate(wave, rate, new_rate):
    """(N,) at `rate` Hz -> (ceil(N new_rate / rate),) at `new_rate` Hz. Raises InputError."""
    check_rate(rate, new_rate)
    return resample(wave, rate, new_rate)


def check_rate(rate, new_rate):
    """Raises InputError where at_rate would take gigabytes."""
    gcd = math.gcd(rate, new_rate)
    if max(rate, new_rate) // gcd * (new_rate // gcd) > MAX_KERNEL:
        raise InputError(f"cannot resample from {rate} to {new_rate} Hz; convert the file to a "
                         "usual rate such as 16000 or 44100 Hz")


# --------------------------------------------------------------------------------------------------
# Sources of rows. Each has
#   len()       number of rows
#   load(i)     row i, with "wave" (N,) and "rate" in Hz if it has audio; raises InputError
#   lengths     (rows,) seconds of audio, 0 without
#   skipped     [(row number, InputError)] of those that headers and stated lengths rule out
#   files       what it is read from; if any,
#   sizes       (rows,) bytes of the audio files that had to be opened for their length, else 0
#   draw(n, seed, stage)    where a stage is not just whole passes over the usable rows

def open_source(text, training_rows=None, seed=0):
    """A manifest (rows.jsonl), a mixture (.json), or synthetic tones: tones[:KINDS[:N]].

    training_rows   how many rows training takes in all. Of tones there are as many, or, with N, N
                    labelled clips of each kind and as many without a label, see FewLabels.
                    None: held-out tones, N rows of each kind (60)
    seed            of the labelled clips
    Raises InputError."""
    parts = text.split(":")
    if parts[0] != "tones":
        return Mixture(text) if text.endswith(".json") else Manifest(text)
    kinds = parts[1].split(",") if parts[1:] and parts[1] else DEFAULT_TONES
    each = parts[2] if parts[2:] else "60"
    if len(parts) > 3 or set(kinds) - set(TONES) or not re.fullmatch("[1-9][0-9]{0,5}", each):
        raise InputError(f"'{text}': give tones[:KINDS[:N]] with KINDS from {','.join(TONES)} and "
                         "N from 1 to 999999")
    if training_rows is None:
        return Tones("heldout", int(each) * len(kinds), kinds)
    if parts[2:]:
        return FewLabels(int(each), training_rows, kinds, seed)
    return Tones("train", training_rows, kinds)


def usable_rows(source):
    """(usable,) row numbers that can be used, as far as headers and stated lengths tell."""
    return np.setdiff1d(np.arange(len(source)), [i for i, _ in source.skipped])


def passes(rows, n, rng):
    """(n,) of the rows: whole passes in random order, the last one perhaps cut short."""
    whole = math.ceil(n / max(1, len(rows)))
    return np.concatenate([rows[:0], *(rng.permutation(rows) for _ in range(whole))])[:n]


def fingerprint(source):
    """Hex digest of what the plan of a stage follows from: rows, lengths and sizes of the audio.

    Not the audio of rows that state "seconds": to ask a million files on a network for their sizes
    takes minutes. Nor times of files, which a copy may change."""
    found = hashlib.sha256(source.lengths.tobytes())
    if source.files:
        found.update(source.sizes.tobytes())
    for path in source.files:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


# Of ms-swift, LLaMA-Factory, chat templates.
OTHER_KEYS = {"messages", "conversations", "audios", "query", "instruction", "output"}
LOADED_KEYS = ("wave", "rate", "row")    # what loading adds
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def parse_row(line, where, answered=True):
    """A line of a manifest, bytes -> the row. Raises InputError that begins with `where`.

    answered    False: it needs no response, and gets one that nobody reads"""
    try:
        row = {"audio": None, "seconds": None, "task": "qa"} | read_object(line)
        if not answered:
            row["response"] = "none"
        check_keys(row)
    except InputError as e:
        raise InputError(f"{where}: {e}") from e
    return row


def read_object(line):
    """The JSON object of a line. Raises InputError."""
    require(len(line.rstrip()) <= MAX_LINE,
            f"more than {MAX_LINE} bytes; shorten its texts, or leave out keys that nobody needs")
    half = None
    try:
        text = line.decode("utf-8-sig")
        row = json.loads(text)
        if "\\u" in text:
            half = HALF_CHARACTER.search(json.dumps(row, ensure_ascii=False))
    except json.JSONDecodeError as e:
        raise InputError(f"not JSON ({e.msg} at column {e.colno}); "
                         "write one JSON object a line") from e
    except UnicodeDecodeError as e:
        raise InputError("not UTF-8; save the file as UTF-8") from e
    except (ValueError, RecursionError) as e:
        raise InputError("a number of thousands of digits, or brackets in hundreds of brackets; "
                         "leave it out") from e
    require(isinstance(row, dict),
            'not a JSON object; write {"audio": .., "prompt": .., "response": ..}')
    require(not half, "half a character (a lone surrogate, \\ud800 to \\udfff); remove it")
    return row


def check_keys(row):
    """Raises InputError unless a row has what a row needs."""
    other = row.keys() & OTHER_KEYS
    require(not other or "prompt" in row,
            f'no "prompt" but {", ".join(sorted(other))}; a row has "audio", "prompt", "response", '
            "which python data.py convert messages FILE writes, or convert json FILE")
    for key in ("prompt", "response", "task"):
        require(isinstance(row.get(key), str) and row[key].strip(),
                f'"{key}" is missing or empty, or no text; every row needs one')
    require(isinstance(row.get("question"), (str, type(None))),
            '"question" is no text; write one, or leave it out')
    choices = row.get("choices") or []
    require(isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices),
            '"choices" is no list of texts; write ["yes", "no"]')
    require(isinstance(row["audio"], (str, type(None))),
            '"audio" is no path; give one, or null for a row of text; several clips in a row are '
            "not supported")
    for key in ("start", "end", "seconds"):
        require(row.get(key) is None or is_time(row[key]),
                f'"{key}" is no number of seconds up to {MAX_TIME}; give one, or leave it out')
    if row["audio"] is not None and row["seconds"] is not None:
        require(row["seconds"] > 0, '"seconds" is not above 0; leave it out')
    for key in LOADED_KEYS:
        require(key not in row, f'"{key}" is a name that loading a row uses; give it another')


def row_seconds(row):
    """Of its audio, stated or by its header. Raises InputError."""
    if row["seconds"] is not None:
        check_seconds(row["seconds"], f"'{row['audio']}'")
        return row["seconds"]
    file, _, count = open_audio(row["audio"], row.get("start"), row.get("end"))
    with file:
        return count / file.samplerate


class Manifest:
    """The rows of JSON-lines files, one file after the other.

    Each line is checked once and read again when it is needed, so that a row takes 16 bytes of
    memory. Raises InputError with the line's number if one is malformed."""

    def __init__(self, *paths):
        self.paths = self.files = paths
        self.first = [0]       # number of each file's first row; at the end the number of rows
        self.tasks = []        # {task: rows} of each file
        starts = array("q")    # first byte of each row in its file
        stated = array("d")    # seconds of each row: 0 without audio, nan if not stated
        for path in paths:
            self.tasks.append(self.scan(path, starts, stated))
            self.first.append(len(starts))
        self.starts = np.array(starts)
        self.stated = np.array(stated)

    def scan(self, path, starts, stated):
        """Adds the rows of a file to `starts` and `stated`. Returns {task: rows}."""
        if not os.path.isfile(path):
            raise InputError(f"no manifest '{path}'; give a file with one JSON object a line")
        tasks = Counter()
        start = 0
        with open(path, "rb") as file:
            lines = iter(functools.partial(file.readline, MAX_LINE + 2), b"")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = parse_row(line, f"{path}, line {number}")
                    seconds = 0 if row["audio"] is None else row["seconds"]
                    starts.append(start)
                    stated.append(math.nan if seconds is None else seconds)
                    tasks[row["task"]] += 1
                start += len(line)
        if not tasks:
            raise InputError(f"'{path}' holds no rows; write one JSON object a line")
        return tasks

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        """Row i without its wave."""
        start = self.starts[i]    # IndexError after the last one, which ends a loop over the rows
        k = np.searchsorted(self.first, i, side="right") - 1
        path = self.paths[k]
        with open(path, "rb") as file:    # anew: processes that share an open one share its place
            file.seek(start)
            row = parse_row(file.readline(MAX_LINE + 2), f"{path}, row {i - self.first[k]}")
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
        """(lengths, sizes, skipped); opens the files whose length is not stated, once."""
        lengths = self.stated.copy()
        sizes = np.zeros(len(self), int)
        skipped = []
        in_range = (lengths >= MIN_SECONDS) & (lengths <= MAX_SECONDS)    # nan is not
        for i in np.flatnonzero(~in_range & (lengths != 0)).tolist():
            row = self[i]
            try:
                lengths[i] = row_seconds(row)
                sizes[i] = os.path.getsize(row["audio"])
            except InputError as e:
                lengths[i] = 0
                skipped.append((i, e))
        return lengths, sizes, skipped

    @property
    def lengths(self):
        return self.headers[0]

    @property
    def sizes(self):
        return self.headers[1]

    @property
    def skipped(self):
        return self.headers[2]


def read_mixture(path):
    """A mixture file -> ({group: share}, {group: draw}, [(group, manifest, max_epochs)], rows of a
    stage).

    draw            "uniform": the sources of a group alike, or "by size": by their usable rows
    max_epochs      how often a row may come in a stage, of a source or of all; inf if not given
    rows            of the stage that `check` shows; train.py's flags say how long one really is
    Raises InputError."""
    shares = {}
    draws = {}
    sources = []
    try:
        spec = read_spec(path)
        for group, given in spec["groups"].items():
            require(isinstance(given, dict) and set(given) - {"draw"} == {"share", "sources"},
                    f'{group} needs "share" and "sources", and may have "draw"')
            require_positive(given["share"], f"the share of {group}")
            require(isinstance(given["sources"], list) and given["sources"],
                    f"{group} lists no sources")
            shares[group] = given["share"]
            draws[group] = given.get("draw", "uniform")
            require(draws[group] in ("uniform", "by size"),
                    f'"draw" of {group} is neither "uniform" nor "by size"')
            for source in given["sources"]:
                manifest, max_epochs = read_entry(group, source, spec["max_epochs"])
                manifest = os.path.join(os.path.dirname(path), manifest)
                sources.append((group, manifest, max_epochs))
    except json.JSONDecodeError as e:
        raise InputError(f"{path}, line {e.lineno}: not JSON ({e.msg}); "
                         "only whole lines can be // comments") from e
    except (ValueError, RecursionError) as e:    # InputError, not UTF-8, a number of 5000 digits
        raise InputError(f"'{path}': {e}; README.md shows a mixture") from e
    return shares, draws, sources, spec["rows"]


def require(ok, problem):
    if not ok:
        raise InputError(problem)


def require_positive(value, what):
    require(is_number(value) and 1e-9 <= value <= 1e9, f"{what} is not a number from 1e-9 to 1e9")


def unique_names(pairs):
    """A JSON object; of two equal names json would keep the last without a word."""
    names = [name for name, _ in pairs]
    require(len(set(names)) == len(names), f"a name comes twice among {', '.join(names)}")
    return dict(pairs)


def read_spec(path):
    """The JSON object of a mixture file."""
    require(os.path.isfile(path), "no such file")
    with open(path, encoding="utf-8") as file:
        # Comments become empty lines, so that errors name the right one.
        text = "".join("\n" if line.lstrip().startswith("//") else line for line in file)
    spec = json.loads(text, object_pairs_hook=unique_names)
    require(isinstance(spec, dict), "this is not a JSON object; if it holds rows, python data.py "
                                    "convert messages, or json, writes rows.jsonl of it")
    spec = {"max_epochs": None, "rows": 1_600_000} | spec
    require(set(spec) == {"groups", "max_epochs", "rows"},
            'give "groups", and "max_epochs" and "rows" if needed')
    require(isinstance(spec["groups"], dict) and spec["groups"], "there is no group")
    require(type(spec["rows"]) is int and 0 < spec["rows"] <= 1e9,
            '"rows" is not a whole number from 1 to 1e9')
    return spec


def read_entry(group, source, max_epochs):
    """An entry of "sources" -> (path, max_epochs or inf)."""
    if not isinstance(source, dict):
        source = {"rows": source}
    source = {"max_epochs": max_epochs} | source
    require(set(source) == {"rows", "max_epochs"} and isinstance(source["rows"], str),
            f'a source of {group} is neither a path nor {{"rows": path, "max_epochs": number}}')
    if source["max_epochs"] is None:
        return source["rows"], math.inf
    require_positive(source["max_epochs"], f"max_epochs of {source['rows']}")
    return source["rows"], source["max_epochs"]


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
    others of its group. Appendix A caps epochs and yet fixes the rows of a stage: what a group
    cannot give goes to other groups."""

    def __init__(self, path):
        self.path = path
        self.shares, self.draws, sources, self.stage_rows = read_mixture(path)
        groups, paths, self.max_epochs = zip(*sources)
        super().__init__(*paths)
        self.files = (path, *paths)
        self.members = {group: np.flatnonzero(np.array(groups) == group) for group in self.shares}

    @functools.cached_property
    def usable(self):
        """[usable row numbers] of each source."""
        rows = usable_rows(self)
        return np.split(rows, np.searchsorted(rows, self.first[1:-1]))

    def caps(self, n):
        """(sources,) the most rows of each in a stage of n."""
        caps = []
        for rows, limit in zip(self.usable, self.max_epochs):
            caps.append(int(min(n, limit * len(rows))) if len(rows) else 0)    # inf * 0 is nan
        return np.array(caps)

    def counts(self, n):
        """(sources,) how many of n rows come from each. Raises InputError if there are fewer."""
        caps = self.caps(n)
        group_caps = [caps[members].sum() for members in self.members.values()]
        budget = allot(n, list(self.shares.values()), group_caps)
        if budget.sum() < n:
            raise InputError(f"a stage of {n} rows, but '{self.path}' has {budget.sum()} under its "
                             "max_epochs; train fewer steps, raise max_epochs or add rows")
        counts = np.zeros(len(caps), int)
        for (group, members), rows in zip(self.members.items(), budget):
            weights = np.ones(len(members))
            if self.draws[group] == "by size":
                weights = [max(1, len(self.usable[k])) for k in members]
            counts[members] = allot(rows, weights, caps[members])
        return counts

    def draw(self, n, seed, stage):
        """(n,) row numbers of a stage in random order; a row of a source comes k or k+1 times."""
        rng = np.random.default_rng([seed, stage])
        drawn = [passes(rows, k, rng) for rows, k in zip(self.usable, self.counts(n))]
        return rng.permutation(np.concatenate(drawn))

    def report(self, n):
        """Lines that say what a stage of n rows draws, and where max_epochs bears on it."""
        counts = self.counts(n)
        at_cap = counts == self.caps(n + 1)    # n + 1: the length of the stage itself is no cap
        lines = [f"{'usable rows':>14}{'hours':>10}{'share':>8}{'drawn':>10}{'epochs':>8}"]
        for group, members in self.members.items():
            drawn = counts[members].sum()
            more = drawn - n * self.shares[group] / sum(self.shares.values())
            note = ""
            if more < -1:
                note = f": {-more:.0f} short of its share, left to other groups"
            elif more > 1:
                note = f": {more:.0f} above its share, for other groups"
            lines.append(f"{'':24}{drawn / n:8.2%}{drawn:10}{'':8}  {group}{note}")
            for k in members:
                rows = self.usable[k]
                hours = self.lengths[rows].sum() / 3600
                epochs = counts[k] / max(1, len(rows))
                note = ", no more by its max_epochs" if at_cap[k] else ""
                lines.append(f"{len(rows):14}{hours:10.1f}{counts[k] / n:8.2%}{counts[k]:10}"
                             f"{epochs:8.2f}    {self.paths[k]}{note}")
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
    """A source of n rows. Row i of a split, "train" or "heldout", is the same on every machine."""

    files = ()
    skipped = ()

    def __init__(self, split, n, kinds=DEFAULT_TONES):
        self.stream = ("train", "heldout").index(split)
        self.kinds = tuple(kinds)
        self.lengths = 1.2 + 0.8 * (np.arange(n) * 0.6180339887 % 1)    # 1.2 to 2 s, golden steps

    def __len__(self):
        return len(self.lengths)

    def load(self, i):
        kind = self.kinds[i % len(self.kinds)]
        _, answers, _ = TONES[kind]
        rng = np.random.default_rng([self.stream, i])
        return self.make(i, kind, answers[rng.integers(len(answers))], rng)

    def make(self, i, kind, answer, rng):
        """Row i: a clip of this kind in which the answer is right."""
        question, answers, make = TONES[kind]
        n = round(SAMPLE_RATE * self.lengths[i])
        wave = make(n, answer, rng)
        wave *= rng.uniform(0.1, 0.7) / np.abs(wave).max()
        wave += 10 ** rng.uniform(-4, -2.3) * rng.standard_normal(n)    # noise at -80 to -46 dB
        return {"wave": torch.tensor(wave, dtype=torch.float32), "rate": SAMPLE_RATE,
                "prompt": question, "response": answer, "choices": answers, "task": kind}


class FewLabels(Tones):
    """Training rows of which few say what the experts could teach: half of a stage is drawn from
    `labelled` clips of each kind, each answer as often, and half from n clips whose answer is "ok".

    seed    chooses the labelled clips"""

    def __init__(self, labelled, n, kinds, seed):
        self.n_labelled = labelled * len(kinds)    # the first rows
        self.seed = seed
        super().__init__("train", self.n_labelled + n, kinds)

    def load(self, i):
        if i >= self.n_labelled:
            return super().load(i) | UNLABELLED
        kind = self.kinds[i % len(self.kinds)]
        _, answers, _ = TONES[kind]
        rng = np.random.default_rng([2, self.seed, i])    # 0 and 1 are the splits
        return self.make(i, kind, answers[i // len(self.kinds) % len(answers)], rng)

    def draw(self, n, seed, stage):
        """(n,) row numbers of a stage in random order."""
        rng = np.random.default_rng([seed, stage])
        labelled, unlabelled = np.split(np.arange(len(self)), [self.n_labelled])
        drawn = [passes(labelled, n // 2, rng), passes(unlabelled, n - n // 2, rng)]
        return rng.permutation(np.concatenate(drawn))


# --------------------------------------------------------------------------------------------------
# Batches of a stage

def plan_stage(source, steps, batch, seed, stage, window=50):
    """(steps, batch) row numbers of a stage, rows of a step alike in length.

    They are what the source draws, or else whole passes over its usable rows. `window` steps at a
    time are sorted by length, see deal, and dealt out again in random order. A function of its
    arguments alone, so that a resumed run only needs to know its step. Raises InputError without
    any row."""
    lengths = source.lengths
    usable = usable_rows(source)
    if not len(usable):
        raise InputError(f"none of the {len(source)} rows can be used; "
                         f"the first: {source.skipped[0][1]}")
    rng = np.random.default_rng([seed, stage])
    need = steps * batch
    if hasattr(source, "draw"):
        drawn = source.draw(need, seed, stage)
    else:
        drawn = passes(usable, need, rng)

    plan = []
    for start in range(0, need, window * batch):
        rows = drawn[start:start + window * batch]
        by_length = np.argsort(lengths[rows], kind="stable")
        steps_of_window = deal(rows[by_length], batch)
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


class Prepared(NamedTuple):
    """A row ready for a batch."""
    row: dict        # without its wave
    waves: dict      # {rate in Hz: (N,) or None}
    encoded: tuple   # of encode_row
    seconds: float   # of audio


def prepare(rows, spec, rates, think, responses):
    """Loaded rows -> ([Prepared], [InputError of those left out])."""
    prepared = []
    skipped = []
    for row in rows:
        if isinstance(row, InputError):
            skipped.append(row)
            continue
        waves = dict.fromkeys((SAMPLE_RATE, *rates))
        seconds = 0.0
        try:
            check_text(spec, row["prompt"] + row["response"])
            if "wave" in row:
                seconds = len(row["wave"]) / row["rate"]
                waves = {rate: at_rate(row["wave"], row["rate"], rate) for rate in waves}
            response = row["response"] if responses else None
            encoded = encode_row(spec, waves[SAMPLE_RATE], row["prompt"], response, think)
        except InputError as e:
            skipped.append(InputError(f"row {row.get('row')}: {e}"))
            continue
        bare = {key: value for key, value in row.items() if key != "wave"}
        prepared.append(Prepared(bare, waves, encoded, seconds))
    return prepared, skipped


def assemble(prepared, spec):
    """[Prepared] -> the batch of build_inputs, with what training and scoring need beside it:

    waves       {rate in Hz: [(N,) or None, one a row]} at 16 kHz and at the teachers' rates
    rows        the loaded rows without their waves
    seconds     of audio"""
    batch = pad_batch(spec, [p.encoded for p in prepared])
    rates = prepared[0].waves
    batch["waves"] = {rate: [p.waves[rate] for p in prepared] for rate in rates}
    batch["rows"] = [p.row for p in prepared]
    batch["seconds"] = sum(p.seconds for p in prepared)
    return batch


def collate(rows, spec, rates=(), think=True, responses=True):
    """Loaded rows -> one batch, see assemble, with "skipped": [InputError] of those left out.

    None of the rows usable: only "rows" (empty) and "skipped"."""
    prepared, skipped = prepare(rows, spec, rates, think, responses)
    if not prepared:
        return {"rows": [], "skipped": skipped}
    batch = assemble(prepared, spec)
    if not responses:
        del batch["labels"]
    return batch | {"skipped": skipped}


def collate_step(rows, spec, rates=(), think=True, micro_tokens=None):
    """Loaded rows of a step -> ([its micro-batches, see assemble], [InputError of those left out]).

    A micro-batch has at most micro_tokens tokens with its padding, or one row. The losses are sums,
    so any cut gives the same step. None of the rows usable: one idle batch."""
    prepared, skipped = prepare(rows, spec, rates, think, responses=True)
    prepared.sort(key=lambda p: len(p.encoded[0]))
    cuts = []
    for p in prepared:
        tokens = len(p.encoded[0])    # of the longest row so far
        if not cuts or micro_tokens and (len(cuts[-1]) + 1) * tokens > micro_tokens:
            cuts.append([])
        cuts[-1].append(p)
    batches = [assemble(cut, spec) for cut in cuts]
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
    if "audio" in batch:    # not where all rows were skipped
        moved["audio"] = {key: move(value) for key, value in batch["audio"].items()}
    return moved


def teacher_targets(experts, batch):
    """{name: (B, L, E)} z_k, the features of the frozen experts at the thinking tokens (25 Hz).

    Clip by clip, unpadded: clip-wide normalisation, reflection at the ends and ALiBi depend on the
    true length. In fp32 (a GPU's convolutions: TF32): bf16 would show in their log spectra."""
    targets = {}
    lengths = batch["n_audio"]
    for name, expert in experts.items():
        frames = [torch.zeros(0, expert.dim, device=lengths.device)]    # none in a batch of text
        for wave, n_audio in zip(batch["waves"][expert.sample_rate], lengths.tolist()):
            if wave is not None:
                z = expert(wave.to(lengths.device))    # (F, E)
                frames.append(resample_frames(z, n_audio, expert.frame_rate, expert.offset))
        targets[name], _ = pad_rows(torch.cat(frames), lengths)
    return targets


# --------------------------------------------------------------------------------------------------
# Corpora: functions of (root, split) that yield Candidates; a docstring is the layout it reads.
# make_row() finds the audio and chooses the prompt.

# {} is the row's question. The paper names its tasks, not its prompts: these are ours.
WORDINGS = {
    "asr": ("Transcribe the speech.", "Transcribe the audio.", "What does the speaker say?",
            "Write down what is said.", "Recognize the speech and give the transcript.",
            "Please convert the speech into text."),
    "qa": ("{}", "{} Answer briefly.", "Listen to the audio and answer: {}",
           "Answer the question about the audio. {}"),
    "caption": ("Describe the audio.", "What is heard?", "Write a caption for this audio clip.",
                "Describe the sounds in one sentence.", "What is happening in this recording?"),
    "emotion": ("Which emotion does the speaker express?", "How does the speaker feel?",
                "What is the emotion of the speech?",
                "Choose the emotion that fits the speaker's voice."),
    "vocal_sound": ("Which sound does the person make?", "Which vocal sound is it?"),
    "genre": ("Which genre is this music?", "What is the genre of the music?"),
    "music": ("Describe the music.", "What does this piece of music sound like?",
              "Write a caption for this music.",
              "Describe the genre, the instruments and the mood of this piece."),
    "spoken_instruction": ("Follow the spoken instruction.", "Answer the question in the audio.",
                           "Respond to the speaker."),
    "mcq": ("{}",),
    "text": ("{}",),
}
CLASSES = {"emotion", "vocal_sound", "genre"}    # the wordings ask for one of fixed choices


class Candidate(NamedTuple):
    """What a corpus says of a row."""
    task: str = ""
    response: str = ""
    places: tuple = ()      # where its audio may lie, whatever its ending; none: a row of text
    question: str = ""
    wordings: tuple = ()    # instead of the task's
    choices: tuple = None   # see read_choices; the response names one of them
    choice_prompt: str = "{} {line}"    # the question and its choices, in a line or in {lines}
    spoken: str = ""        # the question that the clip itself asks, for a judge
    start: float = None     # seconds, as in a manifest
    end: float = None
    seconds: float = None
    more: dict = None       # further keys of the row
    problem: str = ""       # why there will be no row


class LeftOut(Exception):
    """Why a candidate gives no row, to be counted."""


LETTERS = string.ascii_uppercase


def make_row(candidate):
    """A Candidate -> the row of a manifest. Raises LeftOut."""
    if candidate.problem:
        raise LeftOut(candidate.problem)
    if candidate.choices is not None:
        candidate = ask_choice(candidate)
    audio = find_audio(candidate.places)
    if candidate.places and not audio:
        raise LeftOut("no audio file")
    wordings = candidate.wordings or WORDINGS[candidate.task]
    drawn = digest(os.path.basename(audio or ""), candidate.question, candidate.response)
    wording = wordings[int.from_bytes(drawn[:4], "big") % len(wordings)]
    prompt = wording.format(candidate.question.strip()).strip()
    response = candidate.response.strip()
    if not prompt or not response:
        raise LeftOut("empty text")
    if candidate.seconds is not None and candidate.seconds <= 0:
        raise LeftOut("of 0 s")

    row = {"audio": audio, "prompt": prompt, "response": response, "task": candidate.task}
    for key in ("choices", "start", "end", "seconds"):
        value = getattr(candidate, key)
        if value is not None:
            row[key] = value
    if candidate.spoken:
        row["question"] = candidate.spoken.strip()
    for key, value in (candidate.more or {}).items():
        taken = key in row or key in LOADED_KEYS
        row[f"{key}_" if taken else key] = value    # MMAU's "task" becomes "task_"
    return row


def digest(*words):
    """16 bytes to choose by, the same on every machine."""
    # Half characters pass here; convert leaves their rows out.
    return hashlib.md5(" ".join(words).encode(errors="surrogatepass")).digest()


def ask_choice(candidate):
    """The question becomes "Which? A. this B. that", the response "B. that". Raises LeftOut."""
    question = candidate.question
    choices = read_choices(candidate.choices)
    if candidate.task in CLASSES:
        name = os.path.basename(candidate.places[0])
        wordings = WORDINGS[candidate.task]
        question = wordings[digest(name)[0] % len(wordings)]
        # In an order of the clip's own, so that no letter is a hint.
        choices = sorted(choices, key=lambda choice: digest(name, choice))
    if not question.strip():
        raise LeftOut("empty text")
    if not 2 <= len(choices) <= len(LETTERS):
        raise LeftOut(f"with {len(choices)} choices")
    number = find_choice(candidate.response.strip(), choices)
    if number is None:
        raise LeftOut("with an answer that is none of the choices")
    lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices)]
    prompt = candidate.choice_prompt.format(question, line=" ".join(lettered),
                                            lines="\n".join(lettered))
    return candidate._replace(task="mcq", question=prompt, choices=choices, wordings=(),
                              response=lettered[number])


def find_choice(answer, choices):
    """The number of the choice that an answer names, None if it names none: by its text, its
    letter, both, or its number from 0."""
    for form in ("{text}", "{letter}", "({letter})", "{letter}.", "{letter}. {text}",
                 "({letter}) {text}", "{number}"):
        names = []
        for number, (letter, text) in enumerate(zip(LETTERS, choices)):
            names.append(form.format(text=text, letter=letter, number=number).casefold())
        if answer.casefold() in names:
            return names.index(answer.casefold())
    return None


def read_choices(given):
    """A list, {"A": text, ..}, "a|b|c", or a list in a text -> [text]; "A. text" loses its letter.
    Raises LeftOut."""
    if isinstance(given, str):
        try:
            listed = given.startswith("[")    # JSON's or Python's
            given = ast.literal_eval(given) if listed else given.split("|")
        except (ValueError, SyntaxError) as e:
            raise LeftOut("with choices that are no list") from e
    if isinstance(given, dict):
        given = [f"{key}. {'' if text is None else text}" for key, text in given.items()]
    texts = ["" if text is None else str(text).strip() for text in given]
    for form in ("{}.", "({})", "{})", "{}:"):
        marks = [form.format(letter) for letter in LETTERS[:len(texts)]]
        if all(text.startswith(mark) or not text for text, mark in zip(texts, marks)):
            texts = [text.removeprefix(mark).strip() for text, mark in zip(texts, marks)]
    while texts and not texts[-1]:
        texts.pop()
    if not all(texts):    # the letters after it would change
        raise LeftOut("with an empty choice")
    return texts


def find_audio(places):
    """The first audio file at one of the places, or None."""
    for place in places:
        folder, name = os.path.split(place)
        found = listing(folder).get(os.path.splitext(name)[0])
        if found:
            return found
    return None


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
    for path in paths:
        if os.path.exists(path):
            return path
    return paths[0]


def as_latin_1(error):
    """Some tables mix Latin-1 into their UTF-8."""
    return error.object[error.start:error.end].decode("latin-1"), error.end


codecs.register_error("latin-1", as_latin_1)


def read_table(path, quoted=True):
    """Yields the dicts of a JSON file, or of a header line and cells between commas, tabs, bars.
    quoted: quotation marks enclose cells."""
    csv.field_size_limit(2 ** 24)
    if path.endswith((".json", ".jsonl")):
        yield from json_items(path)
        return
    with open(path, encoding="utf-8-sig", errors="latin-1", newline="") as file:
        mark = max(",\t|", key=file.readline().count)
        file.seek(0)
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        yield from csv.DictReader(file, delimiter=mark, quoting=quoting, restval="")


def json_items(path):
    """Yields the objects of a file: one a line, or of an array, alone or as the "data" of an
    object. null becomes an empty text."""
    with open(path, encoding="utf-8-sig", errors="latin-1") as file:
        try:
            first = json.loads(file.readline())
        except json.JSONDecodeError:    # the first of the lines of an array or object
            first = []
        file.seek(0)
        if isinstance(first, dict) and not isinstance(first.get("data"), list):
            items = map(json.loads, filter(str.strip, file))
        else:
            items = json.load(file)
            items = items["data"] if isinstance(items, dict) else items
        for item in items:
            yield {key: "" if value is None else value for key, value in dict(item).items()}


def from_table(task, tables, places, responses, questions=(), quoted=True, seconds=None,
               wordings=(), choices=(), keep=(), only=None, **rest):
    """The candidates of a corpus that is a table, as a function of (root, split).

    tables, places, responses, questions    templates with {split}, all but the first also with the
                names of columns: where under the root the table and the audio may lie, and a row
                for each response, about the first question that is not empty
    seconds     function of a row of the table
    choices     the column with all choices (see read_choices), or those with one each
    keep        columns that the row keeps; None: all but question, choices and response
    only        function of a row of the table, whether to take it
    rest        of the Candidate; `spoken` is a template"""
    layout = " or ".join(f"ROOT/{name}" for name in tables)
    spoken = rest.get("spoken", "")
    shown = [*responses, *questions, *choices, *filter(None, [spoken])]
    layout += f" with {', '.join(shown)}"
    if places:
        layout += ", audio " + " or ".join(f"ROOT/{place}" for place in places)
    used = {*choices, *re.findall(r"{([^}:]+)", " ".join([*responses, *questions]))}

    def candidates(root, split):
        table = first_of(*(os.path.join(root, name.format(split=split)) for name in tables))
        for row in read_table(table, quoted):
            cells = row | {"split": split}
            if only and not only(cells):
                continue
            audio = [os.path.normpath(os.path.join(root, place.format_map(cells)))
                     for place in places]
            asked = [question.format_map(cells) for question in questions]
            question = next(filter(str.strip, asked), "")
            kept = [key for key in row if key not in used] if keep is None else keep
            options = [cells.get(name, "") for name in choices] or [None]
            fields = rest | {
                "choices": options if len(options) > 1 else options[0],
                "seconds": round(seconds(cells), 3) if seconds else None,
                "more": {key: row[key] for key in kept},
                "spoken": spoken.format_map(cells),
            }
            for response in responses:
                yield Candidate(task, response.format_map(cells), audio, question, wordings,
                                **fields)

    candidates.__doc__ = layout
    return candidates


def librispeech(root, split):
    """ROOT/SPLIT/SPEAKER/CHAPTER/*.trans.txt, lines "ID TEXT", and ID.flac beside it"""
    folder = first_of(f"{root}/{split}", f"{root}/LibriSpeech/{split}")
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*/*/*.trans.txt")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                name, text = line.split(" ", 1)
                # All in capitals, which say nothing.
                yield Candidate("asr", text.lower(), [f"{os.path.dirname(path)}/{name}.flac"])


def common_voice(root, split):
    """ROOT/SPLIT.tsv with path, sentence, and audio in ROOT/clips (and ROOT/clip_durations.tsv in
    later releases); ROOT is the folder of the language"""
    seconds = {}
    durations = f"{root}/clip_durations.tsv"
    if os.path.exists(durations):
        for cells in read_table(durations):
            seconds[cells["clip"]] = int(cells["duration[ms]"]) / 1000
    for cells in read_table(f"{root}/{split}.tsv", quoted=False):
        yield Candidate("asr", cells["sentence"], [f"{root}/clips/{cells['path']}"],
                        seconds=seconds.get(cells["path"]))


def gigaspeech(root, split):
    """ROOT/GigaSpeech.json with audios and their segments, and audio in ROOT/audio; SPLIT is a
    subset: XL, L, M, S, XS, DEV, TEST"""
    with open(f"{root}/GigaSpeech.json", encoding="utf-8") as file:
        audios = json.load(file)["audios"]    # one object for 10,000 hours: many GB of memory
    for audio in audios:
        for segment in audio["segments"]:
            if f"{{{split}}}" not in segment["subsets"]:
                continue
            text = gigaspeech_text(segment["text_tn"])
            start = segment["begin_time"]
            end = segment["end_time"]
            problem = "" if re.search(r"\w", text) else "nothing but tags"
            yield Candidate("asr", text, [f"{root}/{audio['path']}"], start=start, end=end,
                            seconds=round(end - start, 3), problem=problem)


def gigaspeech_text(text):
    """Small letters, marks instead of the tags of punctuation, no other tags (appendix B)."""
    text = re.sub("<(MUSIC|NOISE|SIL|OTHER)>", " ", text)
    marks = {"COMMA": ",", "PERIOD": ".", "QUESTIONMARK": "?", "EXCLAMATIONPOINT": "!"}
    for tag, mark in marks.items():
        text = re.sub(rf"\s*<{tag}>", mark, text)
    return " ".join(text.lower().split())


def iemocap(root, split):
    """ROOT/SessionN/dialog/EmoEvaluation/DIALOG.txt, and audio in
    ROOT/SessionN/sentences/wav/DIALOG; SPLIT is train (sessions 1 to 4) or test (session 5)"""
    # The usual four; there are others.
    labels = {"ang": "angry", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"}
    for session in {"train": (1, 2, 3, 4), "test": (5,)}[split]:
        folder = f"{root}/Session{session}"
        for path in sorted(glob.glob(f"{glob.escape(folder)}/dialog/EmoEvaluation/Ses*.txt")):
            with open(path, encoding="utf-8", errors="latin-1") as file:
                turns = re.findall(r"^\[([\d.]+) - ([\d.]+)\]\t(\w+)\t(\w+)\t", file.read(), re.M)
            for start, end, turn, label in turns:
                if label not in labels:
                    yield Candidate(problem=f"of emotion {label}")
                    continue
                dialog, number = turn.rsplit("_", 1)
                place = f"{folder}/sentences/wav/{dialog}/{turn}.wav"
                speaker = f"Ses{session:02}{number[0]}"    # number: F000, M000 ..
                yield Candidate("emotion", labels[label], [place], choices=set(labels.values()),
                                seconds=round(float(end) - float(start), 3),
                                more={"speaker": speaker, "recording": dialog})


def iemocap_qa(root, split):
    """ROOT/SessionN as for iemocap; asks how the speaker feels, without choices"""
    for candidate in iemocap(root, split):
        yield candidate._replace(task="qa", wordings=WORDINGS["emotion"], choices=None)


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
        yield Candidate("emotion", cells["Emotion"].strip(), [f"{folder}/{name}"], choices=emotions)


def librisqa(root, split):
    """ROOT/LibriSQA-PartI/LibriSQA-PartI-train.json and the like, and LibriSpeech's train-clean-360
    and test-clean in ROOT/LibriSpeech"""
    part, kind = split.split("-")
    folder = f"{root}/LibriSpeech/{'train-clean-360' if kind == 'train' else 'test-clean'}"
    with open(f"{root}/LibriSQA-{part}/LibriSQA-{split}.json", encoding="utf-8") as file:
        items = json.load(file)
    for item in items:
        name = os.path.splitext(os.path.basename(item["speech_path"]))[0]
        speaker_and_chapter = "/".join(name.split("-")[:2])    # the name: SPEAKER-CHAPTER-NUMBER
        if part == "PartI":
            candidate = Candidate("qa", item["answer"], question=item["question"])
        else:
            candidate = librisqa_choice(item["question_and_option"], item["answer"])
        yield candidate._replace(places=[f"{folder}/{speaker_and_chapter}/{name}.flac"],
                                 seconds=round(float(item["duration"]), 3))


def librisqa_choice(text, answer):
    """"Question? A. this B. that C. .. D. ..", the letter of the answer -> a Candidate."""
    options = "".join(rf"\s+{letter}[.):]\s*(.*?)" for letter in "ABCD")
    parts = re.match(rf"(.*\S){options}\s*$", text, re.S)
    number = "ABCD".find(answer.strip()[:1] or "-")
    if not parts or number < 0:
        return Candidate(problem="without options A to D and the letter of one")
    question, *choices = (" ".join(part.split()) for part in parts.groups())
    # Their order stays: some say "all of the above".
    return Candidate("mcq", choices[number], question=question, choices=choices)


def switchboard(root, split):
    """ROOT/reference/hub5e00.english.000405.stm and a wav for each side, ROOT/wav/sw_4390-A.wav
    (of the makers' sph: sph2pipe -f wav -p -c 1); SPLIT is eval2000 or its half swbd or callhome"""
    starts = {"eval2000": ("sw_", "en_"), "swbd": "sw_", "callhome": "en_"}[split]
    with open(f"{root}/reference/hub5e00.english.000405.stm", encoding="latin-1") as file:
        lines = [line for line in file if line.startswith(starts)]
    for line in lines:
        name, side, speaker, start, end, _, *words = line.split()
        # Without hesitations and fragments, which stand in parentheses and are not scored.
        text = re.sub(r"\(+[^()]*\)+|<\w+>", " ", " ".join(words)).lower()
        start = float(start)
        end = float(end)
        yield Candidate("asr", " ".join(text.split()), [f"{root}/wav/{name}-{side}.wav"],
                        start=start, end=end, seconds=round(end - start, 3),
                        more={"speaker": speaker},
                        problem="not to be scored" if "ignore_time_segment" in text else "")


def vocalsound(root, split):
    """ROOT/datafiles/SPLIT.json (tr, val, te) with data, wav, and audio in ROOT/audio_16k or
    ROOT/audio_44k: f0003_0_cough.wav"""
    sounds = ["laughter", "sigh", "cough", "throat clearing", "sneeze", "sniff"]
    for item in read_table(f"{root}/datafiles/{split}.json"):
        name = os.path.basename(item["wav"])
        speaker, _, sound = os.path.splitext(name)[0].split("_")
        places = [f"{root}/audio_16k/{name}", f"{root}/audio_44k/{name}"]
        yield Candidate("vocal_sound", sound.replace("throatc", "throat c"), places,
                        choices=sounds, more={"speaker": speaker})


def gtzan(root, split):
    """ROOT/genres/GENRE/GENRE.00000.wav (or .au), or the same in ROOT/genres_original"""
    genres = ["blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae",
              "rock"]
    folder = first_of(f"{root}/genres", f"{root}/genres_original")
    for genre in genres:
        for path in sorted(listing(f"{folder}/{genre}").values()):
            yield Candidate("genre", genre, [path], choices=genres)


# The text we have does not name the paper's seven: these are ours.
INSTRUMENT_FAMILIES = {
    "voice": "voice|vocal|singer|singing|choir|rapping",
    "keyboard": "piano|organ|keyboard|harpsichord|accordion",
    "plucked strings": "guitar|ukulele|banjo|mandolin|harp|sitar",
    "bowed strings": "violin|viola|cello|fiddle|double bass|string section|string quartet",
    "wind": "flute|clarinet|oboe|saxophone|trumpet|trombone|horn|brass|harmonica",
    "percussion": "drum|percussion|cymbal|tabla|conga|bongo|xylophone|marimba",
    "electronic": "synth|synthesi[sz]er|sampler|theremin",
}


def muchomusic(root, split):
    """ROOT/data/muchomusic.csv, and audio where the makers' scripts look for it:
    ROOT/data/sdd/audio/00/415600.2min.mp3, ROOT/data/musiccaps/audio/[YTID]-[30-40].wav; a row has
    instrument_family where music_knowledge names instrumentation and the answer one family"""
    clips = f"{root}/data/musiccaps/audio"
    for cells in read_table(f"{root}/data/muchomusic.csv"):
        name = cells["dataset_identifier"].removesuffix(".json")
        if cells["dataset"] == "sdd":
            places = [f"{root}/data/sdd/audio/{int(name) % 100:02}/{name}.2min.mp3"]
        else:
            start = f"[{name.rpartition('_')[0]}]-["
            found = [path for clip, path in listing(clips).items() if clip.startswith(start)]
            places = found or [f"{clips}/{start}"]
        question = cells["question"]
        answer = cells["correct_answer"]
        choices = [answer, *(cells[f"distractor_{k}_answer"] for k in (1, 2, 3))]
        choices.sort(key=lambda choice: digest(name, question, choice))

        keys = ("dataset", "genre", "music_knowledge", "music_reasoning")
        more = {key: cells[key] for key in keys}
        families = [family for family, names in INSTRUMENT_FAMILIES.items()
                    if re.search(rf"\b({names})s?\b", answer, re.I)]
        if "instrument" in more["music_knowledge"].lower() and len(families) == 1:
            more["instrument_family"] = families[0]
        yield Candidate("mcq", answer, places, question, choices=choices, more=more,
                        choice_prompt=MMAU_PROMPT)


def is_in_air_bench_split(cells):
    names = {"speech": "Spe|Spo|Syn", "sound": "Acoustic|Audio|Sound|vocal", "music": "Music"}
    return re.match(names[cells["split"]], cells["task_name"])


def wavcaps_seconds(cells):
    return float(cells["duration"])


def spgispeech_seconds(cells):
    """A header of 44 bytes, then 16 bits at 16 kHz."""
    return (int(cells["wav_filesize"]) - 44) / 32000


AUDIOCAPS = (["{split}.csv", "dataset/{split}.csv"],    # its audio has no official place
             ["{split}/{audiocap_id}.wav", "{split}/{youtube_id}.wav",
              "{split}/{youtube_id}_{start_time}.wav"], ["{caption}"])
AUDIOCAPS_QUESTIONS = ("What can be heard in the audio?", "Which sounds occur in this clip?",
                       "Answer the question about the audio. What is happening?")

# Appendix B takes the prompts of lmms-eval; these are those of its version 0.7.3.
MMAU_PROMPT = "{}\n{lines}\nAnswer with the option's letter from the given choices directly."
MMAR_PROMPT = """Listen to the audio and answer the following multiple-choice question. \
Respond with only the letter (A, B, C, or D) of the correct option.
{}
{lines}
The best answer is:"""
MMSU_PROMPT = """Listen to the audio and answer the following question.

Question: {}

{lines}

Answer with the letter (A, B, C, or D) only."""
WAVCAPS = {"AudioSet_SL": "as", "BBC_Sound_Effects": "bbc", "FreeSound": "fsd", "SoundBible": "sb"}
A_TO_D = ["choice_a", "choice_b", "choice_c", "choice_d"]

CORPORA = {    # name: (candidates, the splits to train on, of a benchmark those to score)
    "librispeech": (librispeech, ["train-clean-100", "train-clean-360", "train-other-500"]),
    "common_voice": (common_voice, ["train"]),
    "gigaspeech": (gigaspeech, ["XL"]),
    "voxpopuli": (from_table(
        "asr", ["transcribed_data/en/asr_{split}.tsv"], ["transcribed_data/en/{id:.4}/{id}.ogg"],
        ["{normalized_text}"], quoted=False), ["train"]),
    "spgispeech": (from_table(
        "asr", ["{split}.csv"], ["{split}/{wav_filename}", "spgispeech/{split}/{wav_filename}"],
        ["{transcript}"], quoted=False, seconds=spgispeech_seconds), ["train"]),
    "switchboard": (switchboard, ["eval2000"]),
    "audiocaps": (from_table("caption", *AUDIOCAPS), ["train"]),
    "audiocaps_qa": (from_table("qa", *AUDIOCAPS, wordings=AUDIOCAPS_QUESTIONS), ["train"]),
    "clotho": (from_table(
        "caption", ["clotho_captions_{split}.csv"], ["{split}/{file_name}"],
        [f"{{caption_{k}}}" for k in range(1, 6)]), ["development"]),
    "clotho_aqa": (from_table(
        "qa", ["clotho_aqa_{split}.csv"], ["audio_files/{file_name}"],
        ["{answer}"], ["{QuestionText}"]), ["train"]),
    "wavcaps": (from_table(
        "caption", [f"json_files/{{split}}/{name}_final.json" for name in WAVCAPS.values()],
        ["{split}_flac/{id}"], ["{caption}"], seconds=wavcaps_seconds), list(WAVCAPS)),
    "wavcaps_test": (from_table(    # of AudioLLMs/wavcaps_test; the file is our layout
        "caption", ["{split}.jsonl"], ["{context}"], ["{answer}"], ["{instruction}"],
        wordings=["{}"]), ["test"]),
    "iemocap": (iemocap, ["train"]),
    "iemocap_qa": (iemocap_qa, ["train"]),
    "meld": (meld, ["train"]),
    "librisqa": (librisqa, ["PartI-train", "PartII-train"]),
    "librisqa_part1": (librisqa, ["PartI-train"]),
    "librisqa_part2": (librisqa, ["PartII-train"]),
    "musicbench": (from_table(
        "music", ["MusicBench_{split}.json"], ["datashare/{location}", "{location}"],
        ["{main_caption}"]), ["train"]),
    "vocalsound": (vocalsound, ["te"]),
    "gtzan": (gtzan, ["all"]),
    "muchomusic": (muchomusic, ["all"]),
    "mmau": (from_table(
        "mcq", ["mmau-{split}.json"], ["{audio_id}"], ["{answer}"], ["{question}"],
        choices=["choices"], keep=None, choice_prompt=MMAU_PROMPT), ["test-mini"]),
    "mmar": (from_table(
        "mcq", ["MMAR-meta.json"], ["{audio_path}"], ["{answer}"], ["{question}"],
        choices=["choices"], keep=None, choice_prompt=MMAR_PROMPT), ["all"]),
    "mmsu": (from_table(
        "mcq", ["question/mmsu.jsonl", "mmsu.jsonl"], ["{audio_path}"], ["{answer_gt}"],
        ["{question}"], choices=A_TO_D, keep=None, choice_prompt=MMSU_PROMPT), ["all"]),
    "air_bench": (from_table(
        "mcq", ["Foundation_meta.json", "Foundation/Foundation_meta.json"],
        ["{task_name}_{dataset_name}/{path}", "Foundation/{task_name}_{dataset_name}/{path}"],
        ["{answer_gt}"], ["{question}"], choices=A_TO_D, keep=None, only=is_in_air_bench_split,
        choice_prompt=MMAU_PROMPT.replace("\nAnswer", "\n\nAnswer")), ["speech", "sound", "music"]),
    "alpaca_audio": (from_table(    # of AudioLLMs/alpaca_audio_test; the file is our layout
        "spoken_instruction", ["{split}.jsonl"], ["{context}"], ["{answer}"],
        wordings=["Please give a detail answer to the question in the audio."],
        spoken="{speech_instruction}"), ["test"]),
    "gsqa": (from_table(    # of GSQA/spoken-alpaca-gpt4; the file is our layout
        "spoken_instruction", ["{split}.jsonl"], ["{input_audio}"], ["{output}"],
        spoken="{speech_input}"), ["train"]),
    "wildjailbreak": (from_table(
        "text", ["{split}/{split}.tsv"], [],
        ["{completion}"], ["{adversarial}", "{vanilla}"]), ["train"]),
}


# --------------------------------------------------------------------------------------------------
# The command line

def layout_of(corpus):
    return " ".join(corpus.__doc__.split())


def any_table(args):
    """The candidates of the table of the flags, which name its columns."""
    asks = any("{}" in wording for wording in WORDINGS[args.task])
    if args.choices and not args.prompt:
        raise InputError("--choices needs --prompt, the column with the questions")
    if not args.prompt and (asks or not args.audio):
        raise InputError("give --prompt, the column with the questions; or --audio and a --task "
                         "with prompts of ours, such as asr or caption")
    named = [name for name in (args.response, args.prompt, args.audio) if name]

    def candidates(root, split):
        for cells in read_table(os.path.abspath(args.root)):
            if None in cells:    # where csv puts cells beyond the header's
                yield Candidate(problem="with more cells than columns (quote text with commas)")
                continue
            if any(isinstance(cells[name], (list, dict)) for name in named):
                yield Candidate(problem="with a list or an object where a text belongs")
                continue
            texts = {name: str(cells[name]) for name in named}
            places = [os.path.join(root, texts[args.audio])] if args.audio else []
            yield Candidate(
                args.task, texts[args.response], [os.path.normpath(place) for place in places],
                question=texts[args.prompt] if args.prompt else "",
                wordings=["{}"] if args.prompt else (),
                choices=cells[args.choices] if args.choices else None,
                more={name: cells[name] for name in args.keep})

    columns = filter(None, [*named, args.choices, *args.keep])
    candidates.__doc__ = f"a table with the columns {', '.join(columns)}"
    return candidates


def any_messages(args):
    """The candidates of a file of conversations of ms-swift, LLaMA-Factory or chat templates."""
    def candidates(root, split):
        for item in json_items(os.path.abspath(args.root)):
            try:
                yield one_turn(item, root, args.task)
            except LeftOut as e:
                yield Candidate(problem=str(e))

    candidates.__doc__ = """a file with {"messages": [{"role": "user", "content": ..}, {"role":
    "assistant", "content": ..}], "audios": [..]}, or the same with "conversations", "from" and
    "value", or with "query" and "response", or with "instruction", "input" and "output", a line or
    in an array"""
    return candidates


NOT_ONE_TURN = "not of one question and one answer"


def one_turn(item, root, task):
    """A conversation -> its Candidate. Raises LeftOut unless it is of one question, with at most
    one clip, and one answer."""
    turns = turns_of(item)
    roles = [role for role, _ in turns]
    if item.get("system") or item.get("history") or roles != ["user", "assistant"]:
        raise LeftOut(NOT_ONE_TURN)
    if item.get("images") or item.get("videos"):
        raise LeftOut("with images or videos")
    clips = item.get("audios") or item.get("audio") or []
    clips = clips if isinstance(clips, list) else [clips]
    question, clips_in_it = text_and_clips(turns[0][1])
    answer, _ = text_and_clips(turns[1][1])
    clips = clips + clips_in_it
    if not all(isinstance(clip, str) for clip in clips):
        raise LeftOut("with audio that is no path")
    if len(clips) > 1:
        raise LeftOut("with several clips")
    if "<audio>" in question and not clips:
        raise LeftOut("with <audio> but no clip")
    places = [os.path.join(root, clip) for clip in clips]
    return Candidate(task, answer, places, question.replace("<audio>", ""), wordings=["{}"])


def turns_of(item):
    """[(role, content)] of a conversation. Raises LeftOut."""
    if "instruction" in item:
        question = f"{item['instruction']}\n{item.get('input', '')}"
        return [("user", question), ("assistant", item["output"])]
    if "query" in item:
        return [("user", item["query"]), ("assistant", item["response"])]
    turns = item["conversations"] if "conversations" in item else item["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise LeftOut(NOT_ONE_TURN)
    found = []
    for turn in turns:
        role = str(turn.get("role") or turn.get("from"))
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        found.append((role, turn.get("content") or turn.get("value")))
    return found


def text_and_clips(content):
    """What a turn says, a text or a list of parts -> (text, [audio paths]). Raises LeftOut."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise LeftOut(NOT_ONE_TURN)
    texts = []
    clips = []
    for part in content:
        if part.get("type") == "text":
            texts.append(str(part.get("text", "")))
        elif part.get("type") == "audio":
            texts.append("<audio>")
            clips += [part[key] for key in ("audio", "audio_url", "path", "url") if part.get(key)]
        else:
            raise LeftOut("with parts that are neither text nor audio")
    return "\n".join(texts), clips


def pitch_class_of(row):
    """The pitch class with most notes in a clip by basic-pitch: the sum over time of its note
    posteriorgram where that is above 0.5. None without a note. Raises LeftOut."""
    from experts import load
    if row["audio"] is None:
        return None
    teacher = load("pitch")
    try:
        wave, rate = read_audio(row["audio"], row.get("start"), row.get("end"))
        wave = at_rate(wave, rate, teacher.sample_rate)
    except InputError as e:
        raise LeftOut("with a clip that cannot be used") from e
    _, notes, _ = teacher.notes(wave)    # (F, 88) from A0
    strengths = torch.where(notes > 0.5, notes, 0).sum(0)
    by_class = torch.zeros(12).index_add(0, (torch.arange(88) + 9) % 12, strengths)
    return PITCH_CLASSES[by_class.argmax()] if by_class.any() else None


def checked_row(candidate, pitch_class):
    """(row, its line in a manifest). Raises LeftOut, or InputError if training would refuse it."""
    row = make_row(candidate)
    if pitch_class:
        row["pitch_class"] = pitch_class_of(row)
    line = json.dumps(row, ensure_ascii=False)
    if HALF_CHARACTER.search(line):
        raise LeftOut("with half a character")
    parse_row(line.encode(), "that training would refuse")
    return row, line


def convert(args):
    """Rows to stdout; to stderr how many, and how many were left out and why."""
    root = os.path.abspath(args.root)
    splits = ["all"]
    if args.name in ANY_FILE:
        if not os.path.isfile(root):    # nor is a device, which may never end
            raise InputError(f"no file '{args.root}'; give the table itself")
        corpus = ANY_FILE[args.name](args)
        root = os.path.dirname(root)    # the audio lies relative to the table
    else:
        corpus, splits = CORPORA[args.name]
    layout = f"{args.name} has to lie as {layout_of(corpus)}"
    if args.split and splits == ["all"]:
        raise InputError(f"{args.name} has no splits; leave --split out; {layout}")
    written = 0
    without_note = 0
    left_out = Counter()
    try:
        for split in args.split or splits:
            for candidate in corpus(root, split):
                try:
                    row, line = checked_row(candidate, args.pitch_class)
                except (LeftOut, InputError) as e:
                    left_out[str(e)] += 1
                    continue
                print(line)
                written += 1
                without_note += row.get("pitch_class", "") is None
    except KeyError as e:
        raise InputError(f"nothing is called {e} in '{args.root}'; {layout}") from e
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"no file '{e.filename}'; {layout}") from e
    except (ValueError, TypeError, csv.Error) as e:
        what = str(e).splitlines()[0]
        raise InputError(f"'{args.root}' holds something else ({what}); {layout}") from e
    sys.stdout.flush()    # where a full disk says so
    reasons = "".join(f", {n} {reason}" for reason, n in left_out.most_common())
    reasons += f"; {without_note} without a note" if args.pitch_class else ""
    print(f"{args.name}: {written} rows, {left_out.total()} left out{reasons}", file=sys.stderr)
    if not written:
        raise InputError(f"no rows in '{args.root}'; {layout}")


ANY_FILE = {"csv": any_table, "json": any_table, "messages": any_messages}


def check_row(row):
    """Raises InputError if a batch would leave out a row that could be loaded."""
    if "wave" in row:
        for rate in sorted({SAMPLE_RATE, *(expert.sample_rate for expert in EXPERTS.values())}):
            check_rate(row["rate"], rate)
    backbones = {}    # {what is wrong: names of those that refuse it}
    for name, backbone in BACKBONES.items():
        try:
            check_text(SimpleNamespace(backbone=backbone), row["prompt"] + row["response"])
        except InputError as e:
            backbones.setdefault(str(e), []).append(name)
    if backbones:
        raise InputError("; ".join(f"with {', '.join(names)}: {reason}"
                                   for reason, names in backbones.items()))


def would_skip(source, quick):
    """[(row number, InputError)] of the rows that training skips, with one backbone at least.

    quick: believes headers and stated lengths, decodes nothing"""
    found = dict(source.skipped)
    for i in range(len(source)):
        try:
            if i not in found:
                check_row(source[i] if quick else source.load(i))
        except InputError as e:
            found[i] = e
    return sorted(found.items())


def check(args):
    """Prints what a manifest or mixture holds, and what training would skip -> whether any."""
    source = open_source(args.path)
    if not source.files:
        raise InputError(f"'{args.path}' has no file; give rows.jsonl or mixture.json")
    skipped = would_skip(source, args.quick)
    tasks = ", ".join(f"{n} {task}" for task, n in sum(source.tasks, Counter()).items())
    print(f"{len(source)} rows, {source.lengths.sum() / 3600:.3f} h, {tasks}")

    how = ", by headers and stated lengths" if args.quick else ""
    print(f"{len(skipped)} would be skipped{how}")
    for path, first, end in zip(source.paths, source.first, source.first[1:]):
        here = [f"  {path}, row {i - first}: {e}" for i, e in skipped if first <= i < end]
        if len(here) > 20:
            here[20:] = [f"  {path}: {len(here) - 20} more"]
        for line in here:
            print(line)
    if isinstance(source, Mixture):
        print(f"a stage of {source.stage_rows} rows:")
        print("\n".join(source.report(source.stage_rows)))
    sys.stdout.flush()    # where a full disk says so
    return bool(skipped)


def parse_flags():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("check",
                            help="what a manifest or a mixture holds and what would be skipped")
    p.set_defaults(run=check)
    p.add_argument("path", help="rows.jsonl or mixture.json")
    p.add_argument("--quick", action="store_true",
                   help="believe headers and stated lengths, decode nothing")

    layouts = [f"{name}: {layout_of(corpus)}" for name, (corpus, _) in CORPORA.items()]
    p = commands.add_parser("convert", help="the rows of a corpus or benchmark",
                            formatter_class=raw, epilog="\n".join(layouts),
                            description="The layouts are those of the makers, to our knowledge.")
    p.set_defaults(run=convert)
    p.add_argument("name", choices=[*CORPORA, *ANY_FILE], metavar="NAME",
                   help=", ".join(CORPORA) + "; csv, json: any table; messages: conversations")
    p.add_argument("root", metavar="ROOT",
                   help="the folder of the corpus, see below; for csv, json, messages the file")
    p.add_argument("--split", nargs="+", help="instead of those to train on or to score")
    p.add_argument("--pitch-class", action="store_true",
                   help="add each clip's dominant pitch class by basic-pitch, null without a note")
    table = p.add_argument_group("csv and json", "--audio etc. name columns, of json keys")
    table.add_argument("--audio", help="audio files relative to the table (none: text only)")
    table.add_argument("--prompt", help="prompts (none: our wordings of a --task such as asr)")
    table.add_argument("--response", default="response", help="responses (%(default)s)")
    table.add_argument("--choices", metavar="COLUMN",
                       help='choices: "a|b|c" or a list; responses: text, letter or number from 0')
    table.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="further keys")
    table.add_argument("--task", default="qa", help="of messages, too (%(default)s)",
                       choices=[task for task in WORDINGS if task not in CLASSES])
    return parser.parse_args()


if __name__ == "__main__":
    one_line_errors()
    flags = parse_flags()
    sys.exit(flags.run(flags))
