"""What a user would take instead of train.py and infer.py, and a stopwatch for both.

    python docs/beside.py folder tiny30 --window 30          # tiny as a plain Qwen2-Audio folder
    python docs/beside.py rows clips --seconds 1 30          # clips of tones and rows.jsonl
    python docs/beside.py training tiny30 clips/rows.jsonl   # train.py and Trainer, in turn
    python docs/beside.py answers merged clips/rows.jsonl    # score, generate and vLLM, in turn

`trainer`, `swift`, `generate` and `vllm` are the other ways, written as the documentation of the
libraries shows them; the stopwatch starts them. `answers` takes a folder that `infer.py merge`
wrote. ms-swift and vLLM want environments of their own (--swift, --vllm).
"""
import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from statistics import median

import numpy as np
import soundfile

HERE = os.path.abspath(__file__)
PROGRAMS = os.path.dirname(os.path.dirname(HERE))
NEVER = ["<|audio_think_start|>", "<|audio_think|>", "<|audio_think_end|>"]
MAPS = (r".*\.language_model\.layers\.\d+\."
        r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)")
sys.path.insert(0, PROGRAMS)


# --------------------------------------------------------------------------------------------------
# What all are given

def folder(args):
    """tiny, with a window of --window seconds and room for --vocabulary tokens."""
    import model
    tiny = model.BACKBONES["tiny"]
    audio_config = tiny.audio_config | {"max_source_positions": 50 * args.window}
    text_config = tiny.text_config | {"vocab_size": args.vocabulary}
    model.BACKBONES["tiny"] = dataclasses.replace(
        tiny, audio_config=audio_config, text_config=text_config)
    lm, processor = model.build_random("tiny", "cpu", None)
    lm.save_pretrained(args.folder)
    processor.save_pretrained(args.folder)


def rows(args):
    """--n clips of tones, repeated to lengths drawn evenly from --seconds."""
    from data import Tones
    os.makedirs(args.folder)
    source = Tones("train", args.n, ["note"])
    lengths = np.random.default_rng(0).uniform(*args.seconds, args.n)
    with open(f"{args.folder}/rows.jsonl", "w") as file:
        for i, seconds in enumerate(lengths):
            row = source.load(i)
            wave = np.resize(row["wave"].numpy(), round(seconds * row["rate"]))
            soundfile.write(f"{args.folder}/{i:03}.wav", wave, row["rate"])
            kept = {key: row[key] for key in ("prompt", "response", "choices", "task")}
            file.write(json.dumps({"audio": f"{i:03}.wav", **kept, "seconds": seconds}) + "\n")


def read_rows(path):
    return [row | {"audio": os.path.join(os.path.dirname(path), row["audio"])}
            for row in map(json.loads, open(path))]


# --------------------------------------------------------------------------------------------------
# The other ways

def prompt_of(processor, row, **n_audio):
    """The chat of a row up to the assistant's header."""
    content = [{"type": "audio"}, {"type": "text", "text": row["prompt"]}]
    return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True, **n_audio)


def trainer(args):
    """LoRA with transformers' Trainer. Labels stand at the answers, as in train.py."""
    import datasets
    import peft
    import torch
    import transformers
    torch.set_num_threads(args.threads)
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(args.folder)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=MAPS))
    processor = transformers.AutoProcessor.from_pretrained(args.folder)
    processor.tokenizer.padding_side = "left"

    def collate(items):
        answers = [item["response"] + "<|im_end|>" for item in items]
        batch = processor(
            text=[prompt_of(processor, item) + answer for item, answer in zip(items, answers)],
            audio=[soundfile.read(item["audio"], dtype="float32")[0] for item in items],
            sampling_rate=16000, padding=True, return_tensors="pt")
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for labels, ids, answer in zip(batch["labels"], batch["input_ids"], answers):
            n = len(processor.tokenizer(answer).input_ids)
            labels[-n:] = ids[-n:]
        return batch

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, settings, state, control, **kwargs):
            print(f"step {state.global_step}/{args.steps}", flush=True)

    table = [row | {"length": row["seconds"]} for row in read_rows(args.rows)]
    settings = transformers.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=args.batch, max_steps=args.steps,
        train_sampling_strategy="group_by_length" if args.by_length else "random",
        dataloader_num_workers=args.workers, remove_unused_columns=False, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True)
    transformers.Trainer(model, settings, collate, datasets.Dataset.from_list(table),
                         callbacks=[Steps()]).train()


def swift(args):
    """The same with ms-swift, in whose environment this runs. Its model wants a key in config.json
    that transformers no longer writes."""
    with tempfile.TemporaryDirectory() as out:
        shutil.copytree(args.folder, f"{out}/model")
        with open(f"{out}/model/config.json") as file:
            config = json.load(file) | {"ignore_index": -100}
        with open(f"{out}/model/config.json", "w") as file:
            json.dump(config, file)
        with open(f"{out}/rows.jsonl", "w") as file:
            for row in read_rows(args.rows):
                turns = [{"role": "user", "content": "<audio>" + row["prompt"]},
                         {"role": "assistant", "content": row["response"]}]
                item = {"messages": turns, "audios": [os.path.abspath(row["audio"])]}
                file.write(json.dumps(item) + "\n")
        flags = {
            "model": f"{out}/model", "model_type": "qwen2_audio", "template": "qwen2_audio",
            "dataset": f"{out}/rows.jsonl", "split_dataset_ratio": 0, "lazy_tokenize": "true",
            "check_model": "false", "use_cpu": "true", "torch_dtype": "float32", "fp16": "false",
            "tuner_type": "lora", "lora_rank": 16, "lora_alpha": 32, "target_regex": MAPS,
            "per_device_train_batch_size": args.batch, "gradient_accumulation_steps": 1,
            "max_steps": args.steps, "gradient_checkpointing": "false", "logging_steps": 1,
            "dataloader_num_workers": args.workers, "eval_strategy": "no", "save_strategy": "no",
            "report_to": "none", "output_dir": f"{out}/run"}
        command = [os.path.join(os.path.dirname(sys.executable), "swift"), "sft"]
        command += [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
        offline = {"USE_HF": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
        subprocess.run(command, check=True, env=os.environ | offline, stderr=subprocess.STDOUT)


def with_waves(processor, path):
    """Yields (prompt with its block, wave) of each row."""
    for row in read_rows(path):
        wave, _ = soundfile.read(row["audio"], dtype="float32")
        n_audio = ((-(-len(wave) // 160) + 1) // 2) // 2
        yield prompt_of(processor, row, n_audio=n_audio), wave


def generate(args):
    """Answers by transformers' generate, --batch rows at a time, in the order of the file."""
    import torch
    import transformers
    torch.set_num_threads(args.threads)
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(args.folder)
    processor = transformers.AutoProcessor.from_pretrained(args.folder)
    pairs = list(with_waves(processor, args.rows))
    for start in range(0, len(pairs), args.batch):
        prompts, waves = map(list, zip(*pairs[start:start + args.batch]))
        inputs = processor(text=prompts, audio=waves, sampling_rate=16000, padding=True,
                           return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens)
        ids = ids[:, inputs["input_ids"].shape[1]:]
        for text in processor.batch_decode(ids, skip_special_tokens=True):
            print(json.dumps(text.strip()))


def vllm(args):
    """Answers by vLLM, which makes its own batches."""
    import transformers
    from vllm import LLM, SamplingParams
    processor = transformers.AutoProcessor.from_pretrained(args.folder)
    model = LLM(args.folder, limit_mm_per_prompt={"audio": 1}, dtype="float32",
                gpu_memory_utilization=0.3)    # on a CPU, of its memory
    never = {i: -100 for i in processor.tokenizer.convert_tokens_to_ids(NEVER)}
    settings = SamplingParams(temperature=0, max_tokens=args.max_new_tokens, logit_bias=never)
    prompts = [{"prompt": prompt, "multi_modal_data": {"audio": (wave, 16000)}}
               for prompt, wave in with_waves(processor, args.rows)]
    for answer in model.generate(prompts, settings):
        print(json.dumps(answer.outputs[0].text.strip()))


# --------------------------------------------------------------------------------------------------
# The stopwatch

def watch(command):
    """Runs it -> {step: seconds from the start}, its lines, seconds in all, GiB at its peak."""
    start = time.time()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    steps, lines = {}, []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"\b(?:step |global_step/max_steps': ')(\d+)/", line):
            steps[int(found[1])] = time.time() - start
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return steps, lines, time.time() - start, used.ru_maxrss / 2 ** 20


def in_turn(ways, times):
    """{name: function -> {key: number}} -> a table of medians with least and most, and the ratio to
    the first way of each turn."""
    found = {name: [] for name in ways}
    for _ in range(times):
        for name, way in ways.items():
            found[name].append(way())
            print(name, found[name][-1], file=sys.stderr, flush=True)
    first = next(iter(ways))
    for name, results in found.items():
        cells = []
        for key in results[0]:
            values = [result[key] for result in results]
            ratios = [result[key] / base[key] for result, base in zip(results, found[first])]
            cells.append(f"{key} {median(values):.3g} ({min(values):.3g}-{max(values):.3g}), "
                         f"x {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        print(f"{name:24}", "; ".join(cells), flush=True)


def training(args):
    """Rows a second, seconds to the first step, and GiB, of train.py and of the others."""
    ours = [sys.executable, f"{PROGRAMS}/train.py", "--backbone", "qwen2-audio", "--device", "cpu",
            "--model-path", args.folder, "--data", args.rows, "--batch", args.batch,
            "--no-checkpointing", "--random-experts", "--calibrate", 8, "--heldout", 0,
            "--threads", args.threads, "--workers", args.workers, "--log-every", 1]
    theirs = [sys.executable, HERE, "trainer", args.folder, args.rows, "--steps", args.steps,
              "--threads", args.threads, "--workers", args.workers, "--batch", args.batch]
    commands = {
        "Trainer": theirs,
        "Trainer, by length": [*theirs, "--by-length"],
        "train.py, no block": [*ours, "--no-think", "--stage", f"{args.steps}:none"],
        "block": [*ours, "--stage", f"{args.steps}:none"],
        "block, recon and pitch": [*ours, "--stage", f"{args.steps}:recon,pitch"],
        "block, five experts": [*ours, "--stage", f"{args.steps}:all"],
    }
    if args.swift:
        commands["ms-swift"] = [args.swift, HERE, "swift", *theirs[3:]]

    def way(command):
        with tempfile.TemporaryDirectory() as out:
            steps, _, _, gib = watch([*command, "--out", f"{out}/run"] if command[1] != HERE
                                     else command)
        rate = args.batch * (args.steps - 1) / (steps[args.steps] - steps[1])
        return {"rows/s": rate, "first step, s": steps[1], "GiB": gib}

    in_turn({name: functools.partial(way, command) for name, command in commands.items()
             if not args.only or name in args.only}, args.times)


def answers(args):
    """Answers a minute once started, seconds in all, GiB, and how many are those of `score`."""
    whole = read_rows(args.rows)
    first = {}    # answers of `score`

    def score(path, out):
        found = watch([sys.executable, f"{PROGRAMS}/infer.py", "score", args.folder, path, "--out",
                       out, "--batch", 16, "--device", "cpu", "--max-new-tokens",
                       args.max_new_tokens])
        lines = sorted(map(json.loads, open(out)), key=lambda line: line.get("row", -1))
        return *found[2:], [line["answer"] for line in lines if "answer" in line]

    def other(python, name, *flags):
        def run(path, out):
            found = watch([python, HERE, name, args.folder, path, "--max-new-tokens",
                           args.max_new_tokens, "--threads", args.threads, *flags])
            return *found[2:], [json.loads(line) for line in found[1] if line.startswith('"')]
        return run

    def way(run):
        with tempfile.TemporaryDirectory() as out:
            with open(f"{out}/few.jsonl", "w") as file:    # for the start, which is the same
                for row in whole[:16]:
                    file.write(json.dumps(row | {"audio": os.path.abspath(row["audio"])}) + "\n")
            short, _, _ = run(f"{out}/few.jsonl", f"{out}/few-predictions.jsonl")
            seconds, gib, texts = run(args.rows, f"{out}/predictions.jsonl")
        same = sum(a == b for a, b in zip(texts, first.setdefault("score", texts), strict=True))
        return {"answers/min": 60 * (len(whole) - 16) / (seconds - short), "seconds": seconds,
                "GiB": gib, "same answers": same}

    runs = {"score": score}
    for batch in (1, 16):
        runs[f"generate, batch {batch}"] = other(sys.executable, "generate", "--batch", batch)
    if args.vllm:
        runs["vLLM"] = other(args.vllm, "vllm")
    in_turn({name: functools.partial(way, run) for name, run in runs.items()}, args.times)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    commands = (folder, rows, trainer, swift, generate, vllm, training, answers)
    add("command", choices=[command.__name__ for command in commands])
    add("folder")
    add("rows", nargs="?")
    add("--window", type=int, default=4)
    add("--seconds", type=float, nargs=2, default=(0.5, 4))
    add("--n", type=int, default=400)
    add("--steps", type=int, default=50)
    add("--by-length", action="store_true")
    add("--threads", type=int, default=1)
    add("--workers", type=int, default=1)
    add("--batch", type=int, default=8)
    add("--vocabulary", type=int, default=320)
    add("--max-new-tokens", type=int, default=20)
    add("--times", type=int, default=3)
    add("--only", nargs="+")
    add("--vllm", help="python of its environment")
    add("--swift", help="python of the environment of ms-swift")
    args = parser.parse_args()
    globals()[args.command](args)


if __name__ == "__main__":
    main()
