"""Notes of sampled instruments, for docs/evidence.md: clips of 1.2 to 2 s, and what is trained on.

    apt-get install fluidsynth fluid-soundfont-gm timgm6mb-soundfont
    python docs/notes.py notes
    python train.py --data notes/labels-36-0.json --seed 0 --out RUN
    python infer.py score RUN notes/heldout.jsonl --max-new-tokens 12

heldout.jsonl: 240 clips of TimGM6mb. labels-N-SEED.json, half of its rows each: N labelled clips
of FluidR3, as many of each pitch class, and 2,400 others that are only listened to.
own-N-SEED.json: the others have the label that basic-pitch gives them. The N of a seed contain its
smaller ones.
"""
import json
import os
import struct
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import numpy as np
import soundfile
import torch

from data import PITCH_CLASSES, at_rate, read_audio
from experts import load

# General MIDI: piano, mallets, organ, guitar, strings, ensemble, brass, reed, pipe.
SILENT = {31, 43, 44, 45, 46, 47, 52, 53, 54, 55, 58, 67, 78}    # in FluidR3 from C4 to B5; effects
PROGRAMS = sorted({*range(32), *range(40, 80)} - SILENT)
COUNTS = (36, 60, 120)
SEEDS = range(5)


def midi_number(n):
    """As MIDI files write it: seven bits a byte."""
    digits = [n & 127]
    while n := n >> 7:
        digits.append(n & 127 | 128)
    return bytes(digits[::-1])


def render(split, font, n, seed):
    """n clips at 16 kHz, all 24 notes from C4 to B5 in turn, and their rows."""
    os.makedirs(split)
    rng = np.random.default_rng(seed)
    track, now, clips = b"\0\xff\x51\x03\x07\xa1\x20", 0, []    # 960 ticks a second
    for i in range(n):
        key = 60 + i % 24
        seconds = 1.2 + 0.8 * rng.random()
        held = seconds * rng.uniform(0.6, 0.9)
        on = 2.5 * i + rng.uniform(0, seconds - held)
        program = int(rng.choice(PROGRAMS))
        for at, event in ((2.5 * i, [0xC0, program]), (on, [0x90, key, int(rng.integers(60, 121))]),
                          (on + held, [0x80, key, 0]), (2.5 * i + seconds, [0xB0, 120, 0])):
            track += midi_number(round(960 * at) - now) + bytes(event)
            now = round(960 * at)
        clips.append((key, program, seconds, rng.uniform(0.1, 0.7), 10 ** rng.uniform(-4, -2.3)))
    track += b"\0\xff\x2f\0"
    with open("song.mid", "wb") as file:
        file.write(struct.pack(">4sIHHH4sI", b"MThd", 6, 0, 1, 480, b"MTrk", len(track)) + track)
    sound_font = f"/usr/share/sounds/sf2/{font}.sf2"
    subprocess.run(["fluidsynth", "-niq", "-r", "16000", "-R0", "-C0", "-F", "song.wav", sound_font,
                    "song.mid"], check=True)
    song = soundfile.read("song.wav")[0].mean(1)
    rows = []
    for i, (key, program, seconds, peak, noise) in enumerate(clips):
        clip = song[40000 * i:][:round(16000 * seconds)]
        clip = peak * clip / np.abs(clip).max() + noise * rng.standard_normal(len(clip))
        soundfile.write(f"{split}/{i:04}.wav", clip, 16000)
        rows.append({"audio": f"{split}/{i:04}.wav", "prompt": "Which note?",
                     "response": PITCH_CLASSES[key % 12], "task": "note", "choices": PITCH_CLASSES,
                     "seconds": round(len(clip) / 16000, 4), "key": key, "program": program})
    return rows


def write(name, rows):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def mixture(name, *parts):
    groups = {part: {"share": 0.5, "sources": [f"{part}.jsonl"]} for part in parts}
    with open(f"{name}.json", "w") as file:
        json.dump({"groups": groups}, file)


def main():
    os.makedirs(sys.argv[1])
    os.chdir(sys.argv[1])
    write("heldout", render("heldout", "TimGM6mb", 240, 1))
    rows = render("train", "FluidR3_GM", 3600, 0)
    pool, others = rows[:1200], rows[1200:]
    write("unlabelled", [row | {"prompt": "Listen.", "response": "ok", "choices": ["ok"],
                                "task": "unlabelled"} for row in others])
    for seed in SEEDS:
        order = np.random.default_rng([2, seed]).permutation(len(pool))
        classes = [[i for i in order if pool[i]["response"] == name] for name in PITCH_CLASSES]
        for n in COUNTS:
            chosen = [pool[of_class[k]] for k in range(n // 12) for of_class in classes]
            write(f"labelled-{n}-{seed}", chosen)
            mixture(f"labels-{n}-{seed}", f"labelled-{n}-{seed}", "unlabelled")
            mixture(f"own-{n}-{seed}", f"labelled-{n}-{seed}", "heard")

    expert = load("pitch")
    classes = (torch.arange(88) + 9) % 12    # of the keys of a piano, from A0
    heard = []
    for row in others:    # the pitch class with the largest sum of posteriors
        wave = at_rate(*read_audio(row["audio"]), expert.sample_rate)
        by_class = torch.zeros(12).index_add(0, classes, expert.notes(wave).sum(0))
        heard.append(row | {"response": PITCH_CLASSES[by_class.argmax()]})
    write("heard", heard)


if __name__ == "__main__":
    main()
