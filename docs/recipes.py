"""Two rarer things that `python data.py convert` does: conversations of other projects become rows
(`convert messages FILE`), and rows are labelled with pitch classes (`--pitch-class`)."""
import os
import re

import torch

from data import PITCH_CLASSES, SOUNDS, as_list, at_rate, read_audio, read_table
from experts import load

CLIP_KEYS = ("audios", "audio", "sounds", "sound", "audio_url", "path", "url")
ROLES = ("user assistant", "human gpt", "user gpt", "human assistant", "user model", "None None")
MARK = re.compile(r"<\|?(?:audio|sound|speech|music|voice)\w*\|?>", re.I)    # of a clip in a text


def any_messages(args):
    """Conversations with the clip under one of CLIP_KEYS, or as a part of the question."""
    for item in read_table(args.root):
        turns = item.get("messages") or item.get("conversations") or [
            {"content": item.get("query")}, {"content": item.get("response")}]
        turns = [turn if isinstance(turn, dict) else {"role": "none"} for turn in turns]
        roles = " ".join(str(turn.get("role") or turn.get("from")) for turn in turns)
        contents = [turn.get("content") or turn.get("value") or "" for turn in turns]
        parts = [[part for part in content if isinstance(part, dict)] for content in contents]
        texts = ["\n".join(part.get("text") or "" for part in of_turn) if of_turn else str(content)
                 for of_turn, content in zip(parts, contents)]
        paths = [[part[key] for part in of_turn for key in CLIP_KEYS if part.get(key)]
                 for of_turn in parts]
        clips = [clip for key in CLIP_KEYS for clip in as_list(item.get(key))] or sum(paths, [])
        other = [key for key in item if str(item[key]).lower().rstrip("]'").endswith(SOUNDS)]
        if roles not in ROLES or item.get("system") or item.get("history"):
            yield "not of one question and one answer"
        elif paths[1] or MARK.search(texts[1]):
            yield "with a clip in the answer"
        elif len(clips) > 1 or len(MARK.findall(texts[0])) > 1:
            yield "with several clips"
        elif not clips and (other or MARK.search(texts[0])):
            yield f"with a clip under '{''.join(other[:1])}', not 'audio'"
        else:
            spec = {"task": args.task, "question": "{q}", "response": "{a}", "wordings": ["{}"],
                    "audio": clips and "{clip}"}
            cells = {"q": MARK.sub("", texts[0]), "a": texts[1], "clip": "".join(clips)}
            yield spec, cells, os.path.dirname(args.root)


def pitch_class_of(row):
    """The pitch class with most notes in a clip by basic-pitch: the sum over time of its note
    posteriorgram where that is above 0.5. None without a note. Raises InputError."""
    expert = load("pitch")
    wave, rate = read_audio(row["audio"], row.get("start"), row.get("end"))
    notes = expert.notes(at_rate(wave, rate, expert.sample_rate))    # (F, 88) from A0
    strengths = torch.where(notes > 0.5, notes, 0).sum(0)
    by_class = torch.zeros(12).index_add(0, (torch.arange(88) + 9) % 12, strengths)
    return PITCH_CLASSES[by_class.argmax()] if by_class.any() else None
