"""The backbone and the thinking block: prompts, tokens, forward, generation (paper sections 3.1 and 3.2).

    >>> from model import build_inputs, load_coat
    >>> coat = load_coat("tiny")                       # the real Qwen2-Audio classes, random weights, no download
    >>> out = coat(build_inputs(coat, [wave], ["Which note?"], ["C"]))       # a training row
    >>> coat.generate(build_inputs(coat, [wave], ["Which note?"]))           # the same row, up to the response

A row, left padded. The block is placed here and consumed in the prefill; it is never generated:

    pad pad <system, user: .. AUDIO*L_a .. question> <assistant header> start THINK*L_a end  response eos
                              ^audio_mask                                     ^think_mask    ^labels
"""
import argparse
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import sys
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers.cache_utils import StaticLayer

SAMPLE_RATE = 16000                      # Hz, what every backbone hears
TOKEN_RATE = 25                          # audio tokens, and thinking tokens, per second (paper, appendix A)
MIN_SECONDS, MAX_SECONDS = 0.1, 120.0    # below: hardly a token to think with; above: skipped (paper, appendix B)
THINK_START, THINK, THINK_END = "<|audio_think_start|>", "<|audio_think|>", "<|audio_think_end|>"
IGNORE = -100                            # label of a position that is not a cross-entropy target
# The seven linear maps of every decoder layer. A plain list of names would also match inside the audio tower.
LORA_TARGETS = r".*\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"

# Before, the modules had other names and places (so LORA_TARGETS would miss them), and adapters other keys.
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    sys.exit(f"error: transformers {transformers.__version__} is too old; pip install -U 'transformers>=5.23'")

# peft 0.21 asks transformers by a name that it is about to drop; nothing a user could do.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


# --------------------------------------------------------------------------------------------------
# What the user gave

class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do."""


class TooLong(InputError):
    """A clip above MAX_SECONDS, which the paper skips in training and in scoring (appendix B)."""


def check_seconds(seconds, what):
    """Raises InputError, or TooLong, unless a clip lasts MIN_SECONDS to MAX_SECONDS."""
    message = f"{what} lasts {seconds:.2f} s; give {MIN_SECONDS} to {MAX_SECONDS:.0f} s"
    if seconds > MAX_SECONDS:
        raise TooLong(f"{message}, or cut it with \"start\" and \"end\"")
    if not seconds >= MIN_SECONDS:
        raise InputError(message)


def one_line_errors(*kinds, less_memory="a smaller batch"):
    """Lets a program end in one line, without a traceback, where the fault is in what the user gave.

    kinds           exceptions beside InputError that say so
    less_memory     what to try when memory runs out"""
    def hook(kind, error, trace):
        if issubclass(kind, (InputError, *kinds)):
            print(f"error: {error}", file=sys.stderr)
        elif issubclass(kind, torch.OutOfMemoryError):
            print(f"error: {str(error).split('. ')[0]}; less is needed with {less_memory}", file=sys.stderr)
        elif issubclass(kind, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)
    sys.excepthook = hook


def at_least(low):
    """A type for argparse: whole numbers from `low` on."""
    def whole_number(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return value
    return whole_number


def need(module, package):
    """Imports what only one command needs. Raises InputError if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(f"this needs {package}; pip install {package}") from e


def usable_device(name):
    """The torch.device called `name`. Raises InputError if this machine cannot use it."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device {name}: {str(e).splitlines()[0]}; give cpu") from e
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name}: give cpu or cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)    # streams, graphs and memory figures are those of this one
    return device


def checkpoint_steps(run):
    """Steps of the whole checkpoint-STEP folders of a run, in order."""
    names = os.listdir(run) if os.path.isdir(run) else []
    found = (re.fullmatch(r"checkpoint-(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def latest_checkpoint(run):
    """The newest checkpoint-STEP folder of a run, or `run` itself if it is one. Raises InputError if there is none."""
    if os.path.isfile(os.path.join(run, "adapter_config.json")):
        return run
    steps = checkpoint_steps(run)
    if not steps:
        raise InputError(f"'{run}' holds no checkpoint; give the folder of a run of train.py")
    return os.path.join(run, f"checkpoint-{steps[-1]}")


def n_audio_tokens(n_samples):
    """L_a of `n_samples` at 16 kHz: log-mel frames every 160 samples, a stride-2 convolution, pooling by 2."""
    return ((math.ceil(n_samples / 160) + 1) // 2) // 2


# ----------------------------------------------------------------------------------------------------------------------
# Backbones: a row says what differs, the rest of the file is shared

# Two classes of transformers without their eyes. They keep the names, which are written into the folders they save.

class Qwen2_5OmniThinkerForConditionalGeneration(transformers.Qwen2_5OmniThinkerForConditionalGeneration):
    """The thinker without its vision tower, which goes while it is still without memory; its weights are never read."""

    _keys_to_ignore_on_load_unexpected = [r"\bvisual\."]

    def __init__(self, config):
        config.vision_config.depth = 0    # also in what is saved: plain transformers then fills next to nothing in
        super().__init__(config)
        self.model.visual = None

    @classmethod
    def is_custom_code(cls):
        """transformers translates the published names of the weights for its own classes only."""
        return False


class Qwen2_5OmniProcessor(transformers.Qwen2_5OmniProcessor):
    """Text and audio only: the image and video processors of the full one need Pillow and torchvision."""

    def __init__(self, feature_extractor=None, tokenizer=None, chat_template=None):
        skipped = super(transformers.Qwen2_5OmniProcessor, self)
        skipped.__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.audio_token, self.audio_token_id = "<|AUDIO|>", tokenizer.convert_tokens_to_ids("<|AUDIO|>")


@dataclasses.dataclass(frozen=True)
class Backbone:
    hub_id: str                                     # looked up by from_pretrained unless a local folder is given
    model_class: type
    processor_class: type
    model_types: tuple                              # config.json of a folder that fits says one of these
    audio_marks: str                                # how the chat template writes a clip
    audio_token: str                                # the placeholder in it, which the processor expands to L_a ids
    piece_seconds: float                            # the longest clip the processor takes; longer ones go in pieces
    window_seconds: int = 30                        # what its feature extractor pads to
    audio_kwargs: dict = dataclasses.field(default_factory=dict)    # for the feature extractor, at each call
    eos: tuple = ("<|im_end|>", "<|endoftext|>")    # either stops generation; the first closes a training response
    lora_r: int = 16                                # rank and alpha: paper, appendix A
    lora_alpha: int = 32
    text_think: str = " Output the thinking process in <think> </think> and final answer in <answer> </answer>."
    # For building it without its files: what the published config says that its class does not, and the ids in use.
    text_config: dict = dataclasses.field(default_factory=dict)
    audio_config: dict = dataclasses.field(default_factory=dict)
    used_ids: int = 0


BACKBONES = {
    "qwen2-audio": Backbone(
        "Qwen/Qwen2-Audio-7B-Instruct", transformers.Qwen2AudioForConditionalGeneration,
        transformers.Qwen2AudioProcessor, ("qwen2_audio",), "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n",
        "<|AUDIO|>", piece_seconds=30, text_config=dict(vocab_size=156032, intermediate_size=11008), used_ids=154931),
    # The full checkpoint holds the thinker beside a talker. Its extractor would pad every clip to 300 s.
    "qwen2.5-omni": Backbone(
        "Qwen/Qwen2.5-Omni-7B", Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniProcessor,
        ("qwen2_5_omni", "qwen2_5_omni_thinker"), "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|AUDIO|>",
        piece_seconds=MAX_SECONDS, window_seconds=300, audio_kwargs={"max_length": round(MAX_SECONDS * SAMPLE_RATE)},
        used_ids=151665),
    # The processor cuts its 30 s windows itself. It has a thinking adapter of its own, asked for by this sentence.
    "audio-flamingo-3": Backbone(
        "nvidia/audio-flamingo-3-hf", transformers.AudioFlamingo3ForConditionalGeneration,
        transformers.AudioFlamingo3Processor, ("audioflamingo3",), "<sound>", "<sound>", piece_seconds=MAX_SECONDS,
        text_think="\nPlease think and reason about the input audio before you respond.",
        text_config=dict(vocab_size=151672, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                         num_attention_heads=28, num_key_value_heads=4), used_ids=151672),
    # 1.2 M weights of variance 1 / fan-in, so that signals keep their size through layers nobody has trained. A
    # Whisper-type tower computes its whole window whatever the clip, so this one is short. Random weights know nothing
    # worth keeping: tiny trains wider adapters, faster, and leans on its answers.
    "tiny": Backbone(
        "", transformers.Qwen2AudioForConditionalGeneration, transformers.Qwen2AudioProcessor, ("qwen2_audio",),
        "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n", "<|AUDIO|>", piece_seconds=4, window_seconds=4,
        lora_r=32, lora_alpha=64,
        text_config=dict(vocab_size=320, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8192,
                         initializer_range=128 ** -0.5),
        audio_config=dict(d_model=128, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=256,
                          max_source_positions=200, initializer_range=384 ** -0.5), used_ids=262),
}
# What the released chat templates render for text and one clip, for a processor that is built without its files.
TEMPLATE = """<|im_start|>system
You are a helpful assistant.<|im_end|>
{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for c in m['content'] %}{% if c['type'] == 'audio' %}AUDIO_MARKS{% else %}{{ c['text'] }}{% endif %}{% endfor %}\
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_processor(backbone):
    """The backbone's own processor class around a byte-level tokenizer, offline."""
    marks = [t for t in ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<sound>") if t in backbone.audio_marks]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks]
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()) + special)}
    names = dict(zip(("audio_token", "audio_bos_token", "audio_eos_token"), marks)) if len(marks) == 3 else {}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:],
                                            model_specific_special_tokens=names)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=backbone.window_seconds,
                                                     return_attention_mask=True)
    return backbone.processor_class(feature_extractor=extractor, tokenizer=tokenizer,
                                    chat_template=TEMPLATE.replace("AUDIO_MARKS", backbone.audio_marks))


def build_config(backbone):
    """The published configuration, or tiny's."""
    config = backbone.model_class.config_class(text_config=dict(backbone.text_config),
                                               audio_config=dict(backbone.audio_config))
    config.vision_start_token_id = None    # read by Omni's forward, but in no class; nothing has this id
    return config


def build_random(name, device="cpu", dtype=torch.float32, seed=0):
    """(model, processor) with weights drawn from `seed`: tiny, and for time and memory the others at their full size."""
    backbone = BACKBONES[name]
    processor = build_processor(backbone)
    config = build_config(backbone)
    config.audio_token_id = processor.tokenizer.convert_tokens_to_ids(backbone.audio_token)
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if name == "tiny" else device):
        torch.manual_seed(seed)    # tiny is the same on every device; 8 B weights had better be drawn where they live
        model = backbone.model_class._from_config(config, dtype=torch.float32 if name == "tiny" else dtype)
    return model.to(device, dtype), processor


def load_backbone(name, model_path=None, device="cpu", dtype=None, random=False):
    """(model, processor) of a row of BACKBONES, frozen, from the hub or the local folder `model_path`; or random.

    dtype  bf16 on a GPU and fp32 on a CPU unless given
    Raises InputError if the name is unknown or the files are not there, not readable or not this backbone's."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone '{name}'; there are {', '.join(BACKBONES)}")
    backbone, source = BACKBONES[name], model_path or BACKBONES[name].hub_id
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    if random or not source:
        model, processor = build_random(name, device, dtype)
        return model.eval().requires_grad_(False), processor
    if model_path and not os.path.isdir(model_path):
        raise InputError(f"no folder '{model_path}'; give --model-path one with the files of {backbone.hub_id}")
    try:
        found = transformers.PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        if found not in backbone.model_types:
            raise ValueError(f"its config.json is that of '{found}'" if found else "it has no config.json")
        processor = backbone.processor_class.from_pretrained(source)
        if not processor.chat_template:
            raise ValueError("it has no chat template")
        model, report = backbone.model_class.from_pretrained(source, dtype=dtype, device_map=device,
                                                             output_loading_info=True, ignore_mismatched_sizes=True)
        # What transformers passes over: it fills missing weights with noise and makes up a missing tokenizer.
        if wrong := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
            raise ValueError(f"it has no weights for {len(wrong)} tensors, or of another shape, such as {wrong[0]}")
        if processor.tokenizer.convert_tokens_to_ids(backbone.audio_token) != model.config.audio_token_id:
            raise ValueError(f"its tokenizer is missing, or not the one in which {backbone.audio_token} is "
                             f"{model.config.audio_token_id}")
    except (OSError, ValueError, SafetensorError) as e:
        reason = " ".join(str(e).split()).split(". ")[0].rstrip(".")    # the rest is advice about the hub
        raise InputError(f"cannot load {name} from '{source}': {reason} (give a folder with --model-path)") from e
    return model.eval().requires_grad_(False), processor


def add_think_tokens(model, tokenizer):
    """Adds the three tokens and returns their ids. The rows start as the mean of the used ones, the same everywhere;
    a folder that knows the tokens already (a merged checkpoint) keeps its rows."""
    used = len(tokenizer)
    tokens = [THINK_START, THINK, THINK_END]
    new = tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if max(ids) >= model.get_input_embeddings().num_embeddings:     # never shrink a table that has spare rows
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight) if new else ():
        table.data[ids] = table.data[:min(used, min(ids))].mean(0, dtype=torch.float32).to(table.dtype)
    return ids


def add_adapters(model, backbone, think_ids):
    """The PeftModel with new LoRA on the language model and trainable rows for the three tokens."""
    return peft.get_peft_model(model, peft.LoraConfig(
        r=backbone.lora_r, lora_alpha=backbone.lora_alpha, target_modules=LORA_TARGETS,
        trainable_token_indices={"embed_tokens": think_ids}))


# ----------------------------------------------------------------------------------------------------------------------
# Rows to tensors, for training and inference alike

def think_block(n_audio, think_ids):
    """b(L_a) of equation 2: [start, think * L_a, end], empty when there is no audio."""
    start, think, end = think_ids
    return [start] + [think] * n_audio + [end] if n_audio else []


def check_text(coat, text):
    """Raises InputError if a prompt or response spells a token that only build_inputs may place."""
    for token in (coat.backbone.audio_token, THINK_START, THINK, THINK_END):
        if token in text:
            raise InputError(f"the text contains the reserved token {token}; remove it")


def render_prompt(coat, question, n_pieces):
    """The chat as the released template renders it, up to the assistant header, with `n_pieces` audio placeholders."""
    check_text(coat, question)
    content = [{"type": "audio"}] * bool(n_pieces) + [{"type": "text", "text": question}]
    prompt = coat.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                add_generation_prompt=True)
    return prompt.replace(coat.backbone.audio_token, coat.backbone.audio_token * n_pieces)


def build_inputs(coat, waves, prompts, responses=None, think=True, padding_side="left"):
    """A batch from rows; without `responses` it ends where generation starts.

    coat       anything with .backbone, .processor, .think_ids (a CoAT, or its `.spec` in a data worker)
    waves      list of (N,) float32 tensors at 16 kHz, or None for a row without audio (it gets no block)
    think      False leaves the block out: the baseline
    Returns a dict: input_ids, attention_mask, position_ids, think_mask, audio_mask and, with responses, labels, each
    (B, T); n_audio (B,); audio, what the processor made of the sound. Raises InputError on a clip out of range."""
    backbone, processor, tokenizer = coat.backbone, coat.processor, coat.processor.tokenizer
    audio_id, eos_id = tokenizer.convert_tokens_to_ids([backbone.audio_token, backbone.eos[0]])
    piece = round(backbone.piece_seconds * SAMPLE_RATE)
    rows, audio = [], []
    for i, (wave, prompt) in enumerate(zip(waves, prompts, strict=True)):
        n_audio, pieces = 0, []
        if wave is not None:
            check_seconds(len(wave) / SAMPLE_RATE, "the clip")
            n_audio = n_audio_tokens(len(wave))
            # A rest under 30 ms after the last whole piece makes no token; the tower would see only padding.
            pieces = [p.numpy() for p in wave.split(piece) if n_audio_tokens(len(p))]
        # No padding here, and everything about sound in audio_kwargs: flat keywords would reach both halves.
        out = processor(text=render_prompt(coat, prompt, len(pieces)), audio=pieces or None, return_tensors="pt",
                        audio_kwargs={"sampling_rate": SAMPLE_RATE, **backbone.audio_kwargs})
        ids = out.pop("input_ids")[0].tolist()
        out.pop("attention_mask")
        if ids.count(audio_id) != n_audio:
            raise RuntimeError(f"the processor made {ids.count(audio_id)} audio tokens where L_a is {n_audio}")
        if pieces:
            audio.append(dict(out))
        ids += think_block(n_audio, coat.think_ids) if think else []
        target = tokenizer(responses[i], add_special_tokens=False).input_ids + [eos_id] if responses else []
        rows.append((ids + target, len(target), n_audio))

    width = max(len(ids) for ids, _, _ in rows)
    pad_id = tokenizer.pad_token_id
    batch = {"input_ids": torch.full((len(rows), width), pad_id),
             "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
             "labels": torch.full((len(rows), width), IGNORE)}
    for i, (ids, n_target, _) in enumerate(rows):
        start = width - len(ids) if padding_side == "left" else 0
        end = start + len(ids)
        batch["input_ids"][i, start:end] = torch.tensor(ids)
        batch["attention_mask"][i, start:end] = 1
        batch["labels"][i, end - n_target:end] = torch.tensor(ids[len(ids) - n_target:], dtype=torch.long)
    if responses is None:
        del batch["labels"]
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    batch["think_mask"] = batch["input_ids"] == coat.think_ids[1]
    batch["audio_mask"] = batch["input_ids"] == audio_id
    batch["n_audio"] = torch.tensor([n for _, _, n in rows])
    batch["audio"] = {k: torch.cat([a[k] for a in audio]) for k in audio[0]} if audio else {}
    return batch


def pad_rows(flat, lengths):
    """(sum L, D) and (B,) -> (B, L, D), zero where a row has ended, and the mask (B, L) of what is real.

    L is at least 1: where no row has audio, the heads still run, on one masked frame."""
    L = max(1, int(lengths.max()))
    valid = torch.arange(L, device=flat.device) < lengths.to(flat.device)[:, None]      # (B, L)
    return flat.new_zeros(*valid.shape, flat.shape[-1]).masked_scatter(valid[..., None], flat), valid


# ----------------------------------------------------------------------------------------------------------------------
# The model

class Slots(StaticLayer):
    """Keys and values of one decoder layer, in memory that stays where it is. The prefill attends to its own alone: a
    square without a mask, for which attention has its fastest kernels."""

    def update(self, keys, values, *args, **kwargs):
        kept = super().update(keys, values)
        return kept if keys.shape[2] == 1 else (keys, values)                           # (B, H, S or T, D/H) each

    def get_mask_sizes(self, query_length):
        return (self.max_cache_len if query_length == 1 else query_length), 0


class Output(NamedTuple):
    think_states: torch.Tensor    # (B, L, D) final-layer states at the thinking tokens, H_think
    audio_embeds: torch.Tensor    # (B, L, D) what the language model consumed at the audio tokens, x_A; no gradient
    valid: torch.Tensor           # (B, L) which of these are real
    ce_sum: torch.Tensor          # () sum of the cross-entropy over the response tokens
    n_targets: int                # how many there are


class CoAT(nn.Module):
    """A backbone with the thinking tokens. `lm` is a transformers model, or the PeftModel around it."""

    def __init__(self, lm, processor, name, model_path, think_ids):
        super().__init__()
        self.lm, self.processor, self.name, self.model_path, self.think_ids = lm, processor, name, model_path, think_ids
        self.backbone = BACKBONES[name]
        self.register_buffer("suppressed_ids", torch.tensor(think_ids, device=lm.device), persistent=False)
        self.use_graph = False

    @property
    def hf(self):
        """The transformers model: .model.audio_tower, .model.language_model, .lm_head"""
        return self.lm.get_base_model() if isinstance(self.lm, peft.PeftModel) else self.lm

    @property
    def spec(self):
        """What build_inputs needs, without the weights (for data workers)."""
        return SimpleNamespace(backbone=self.backbone, processor=self.processor, think_ids=self.think_ids)

    @property
    def decoder_weights(self):
        """How many weights of the decoder layers a token meets, without the adapters (for FLOP counts)."""
        layers = self.hf.model.language_model.layers
        return sum(p.numel() for name, p in layers.named_parameters() if "lora_" not in name)

    def checkpoint_activations(self):
        """Recomputes the decoder's activations in the backward pass."""
        self.hf.model.language_model.activation_checkpointing_enable()
        self.hf.model.language_model.train()    # only then; it changes nothing else, there is no dropout in it

    def compile_layers(self):
        """Compiles the decoder layers for training; they are alike, so the first one's code serves all."""
        for layer in self.hf.model.language_model.layers:
            layer.compile(dynamic=True)

    def audio_inputs(self, batch):
        """batch["audio"] in the dtype of the tower, which not every class casts to by itself."""
        dtype = self.hf.model.audio_tower.dtype
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch["audio"].items()}

    def states(self, batch, **kwargs):
        """Final states (after the last norm) and the embeddings that went in, both (B, T, D); kwargs go to the model."""
        seen = {}
        hook = self.hf.model.language_model.register_forward_pre_hook(
            lambda module, args, inputs: seen.update(inputs_embeds=inputs["inputs_embeds"]), with_kwargs=True)
        try:
            out = self.hf.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")},
                                **self.audio_inputs(batch), **kwargs)
        finally:
            hook.remove()
        return out.last_hidden_state, seen["inputs_embeds"]

    def forward(self, batch):
        """-> Output. Logits are computed at the response tokens alone: at 156,032 rows they are the larger half."""
        h, embeds = self.states(batch, use_cache=False)
        think_states, valid = pad_rows(h[batch["think_mask"]], batch["n_audio"])
        audio_embeds, _ = pad_rows(embeds.detach()[batch["audio_mask"]], batch["n_audio"])
        targets = batch["labels"][:, 1:]
        is_target = targets != IGNORE
        logits = self.hf.lm_head(h[:, :-1][is_target]).float()                          # (n_targets, V)
        ce_sum = F.cross_entropy(logits, targets[is_target], reduction="sum")
        return Output(think_states, audio_embeds, valid, ce_sum, len(logits))

    def next_ids(self, h):
        """Final states (B, T, D) -> (B,) the likeliest next tokens, never the block's: it is placed, not said."""
        logits = self.hf.lm_head(h[:, -1]).float()                                      # (B, V)
        return logits.index_fill(1, self.suppressed_ids, -torch.inf).argmax(-1)

    def decode(self, token, visible, cache):
        """A step: tokens (B,) -> the next ones (B,). visible (B, S) says which slots of the cache to attend to.

        Nothing in it changes its shape or waits for the GPU, so that it can be compiled and captured."""
        decoder = self.hf.model.language_model
        out = decoder(inputs_embeds=decoder.embed_tokens(token[:, None]), attention_mask=visible[:, None, None],
                      position_ids=visible.sum(-1, keepdim=True) - 1, past_key_values=cache, use_cache=True)
        return self.next_ids(out.last_hidden_state)

    def compile_decode(self, **kwargs):
        """Fuses the small kernels of a step, once for all lengths, and on a GPU replays each answer's steps as a CUDA graph.
        It takes a while, which many or long answers earn back."""
        self.decode = torch.compile(self.decode, dynamic=True, fullgraph=True, **kwargs)
        self.use_graph = self.suppressed_ids.is_cuda

    def capture(self, token, visible, cache):
        """`decode` as a CUDA graph over these tensors: hundreds of kernels for the price of one launch."""
        token, graph = token.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):    # records, computes nothing
            ids = self.decode(token, visible, cache)
        self.graph = graph               # must outlive its last launch; the next capture waits for that

        def replay(new_token, visible, cache):
            token.copy_(new_token)
            graph.replay()
            return ids
        return replay

    @torch.inference_mode()
    def stream(self, batch, max_new_tokens=128, stop=True):
        """Greedy decoding: yields (B,) ids a step until every row has ended; rows that have ended yield padding.

        One prefill over prompt and block, then one step a token. The batch must be left padded. With stop=False all
        max_new_tokens are decoded whatever they are (for timing)."""
        tokenizer, (B, T) = self.processor.tokenizer, batch["input_ids"].shape
        eos = torch.tensor(tokenizer.convert_tokens_to_ids(list(self.backbone.eos)), device=self.suppressed_ids.device)
        cache = transformers.Cache([Slots(T + max_new_tokens) for _ in self.hf.model.language_model.layers])
        h, _ = self.states(batch, past_key_values=cache, use_cache=True)
        ids, decode, on_gpu = self.next_ids(h), self.decode, eos.is_cuda
        visible = F.pad(batch["attention_mask"].bool(), (0, max_new_tokens))            # (B, S)
        done = torch.zeros(B, dtype=torch.bool, device=eos.device)
        for step in range(max_new_tokens):
            token = torch.where(done, tokenizer.pad_token_id, ids)
            yield token
            if step == max_new_tokens - 1:
                return
            if stop:
                done = done | torch.isin(token, eos)
                ended = done.all()
                if on_gpu:    # it is asked while the next step runs, so that the GPU never waits
                    ended, asked = ended.to("cpu", non_blocking=True), torch.cuda.current_stream().record_event()
                elif ended:
                    return
            visible[:, T + step] = True
            if self.use_graph and step == 2:    # the steps before warmed it up, and an answer of a word ends there
                decode = self.capture(token, visible, cache)
            ids = decode(token, visible, cache)
            if stop and on_gpu:
                asked.synchronize()
                if ended:
                    return

    def generate(self, batch, max_new_tokens=128):
        """Greedy answers, one string a row."""
        ids = torch.stack(list(self.stream(batch, max_new_tokens)), dim=1)              # (B, steps)
        return [text.strip() for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def merge(self):
        """Folds the adapter into the weights: the same function, without the adapter's cost at each step."""
        self.eval()    # what is for training ends here: checkpoint_activations would drop the cache
        for layer in self.hf.model.language_model.layers:
            layer._compiled_call_impl = None    # and compile_layers compile each layer anew for it
        if isinstance(self.lm, peft.PeftModel):
            self.lm = self.lm.merge_and_unload()
        return self

    def save(self, folder):
        """Writes a plain PEFT adapter or, once merged, a plain transformers model, with the processor, and in coat.json
        which backbone they belong to."""
        if isinstance(self.lm, peft.PeftModel):
            self.lm.save_pretrained(folder, save_embedding_layers=False)
        else:    # what `stream` does, as transformers' generate has to be told it
            tokenizer = self.processor.tokenizer
            self.lm.generation_config = transformers.GenerationConfig(
                do_sample=False, pad_token_id=tokenizer.pad_token_id, suppress_tokens=self.think_ids,
                eos_token_id=tokenizer.convert_tokens_to_ids(list(self.backbone.eos)))
            self.lm.save_pretrained(folder)
            # The full processor of Qwen2.5-Omni, which ours is a part of, also wants its image settings.
            source = self.model_path or self.backbone.hub_id
            settings = source and transformers.utils.cached_file(
                source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False)
            if settings:
                shutil.copy(settings, folder)
        self.processor.save_pretrained(folder)
        with open(os.path.join(folder, "coat.json"), "w") as file:
            json.dump({"backbone": self.name, "model_path": self.model_path}, file)


def load_coat(name=None, adapter=None, model_path=None, trainable=False, device="cpu", dtype=None, random=False):
    """A CoAT: the backbone `name` with the three tokens and, from the folder `adapter` or (trainable) new, LoRA.

    name       may be left out with an adapter, whose coat.json knows it
    trainable  the adapters and the rows of the three tokens get gradients, in fp32
    dtype      of the frozen weights, see load_backbone
    random     random weights at full size, for time and memory
    Raises InputError on an unknown name or files that cannot be read."""
    if adapter:
        for file in ("coat.json", "adapter_config.json", "adapter_model.safetensors"):
            if not os.path.isfile(os.path.join(adapter, file)):
                raise InputError(f"'{adapter}' holds no {file}; give a checkpoint folder that train.py wrote")
        with open(os.path.join(adapter, "coat.json")) as file:
            trained = json.load(file)
        name, model_path = name or trained["backbone"], model_path or trained["model_path"]
    lm, processor = load_backbone(name, model_path, device, dtype, random)
    think_ids = add_think_tokens(lm, processor.tokenizer)
    if adapter:
        try:
            lm = peft.PeftModel.from_pretrained(lm, adapter, is_trainable=trainable)
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            raise InputError(f"the adapter in '{adapter}' is damaged or not of {name}: {str(e).splitlines()[0]}") from e
    elif trainable:
        lm = add_adapters(lm, BACKBONES[name], think_ids)
    return CoAT(lm, processor, name, model_path, think_ids)


# How names in a model began before transformers 5, and how they begin now.
BEFORE_5 = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
            ("audio_tower.", "model.audio_tower."), ("multi_modal_projector.", "model.multi_modal_projector."))


def load_text_think(name, folder, model_path=None, device="cpu", dtype=None):
    """A backbone with an adapter of its authors that reasons in text, merged: Audio Flamingo 3's (table 2, appendix D).

    folder  its `think` folder: a PEFT adapter and non_lora_trainables.bin. load_state_dict would pass over names of
            another layout in silence, so each has to fit. Raises InputError."""
    for file in ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"):
        if not os.path.isfile(os.path.join(folder, file)):
            raise InputError(f"'{folder}' holds no {file}; give the think folder of {BACKBONES[name].hub_id}")
    lm, processor = load_backbone(name, model_path, device, dtype)
    weights = {}
    for key, value in torch.load(os.path.join(folder, "non_lora_trainables.bin"), map_location=device,
                                 weights_only=True).items():
        key = key.removeprefix("base_model.model.")
        old, new = next((pair for pair in BEFORE_5 if key.startswith(pair[0])), ("", ""))
        weights[new + key[len(old):]] = value.to(lm.dtype)
    if unknown := lm.load_state_dict(weights, strict=False).unexpected_keys:
        raise InputError(f"non_lora_trainables.bin in '{folder}' has {len(unknown)} tensors that {name} has not, such as "
                         f"{unknown[0]}; it belongs to another model")
    with warnings.catch_warnings(record=True) as caught:    # peft only warns when an adapter does not fit
        warnings.simplefilter("always")
        lm = peft.PeftModel.from_pretrained(lm, folder)
    if any("missing adapter keys" in str(w.message) for w in caught):
        raise InputError(f"the adapter in '{folder}' does not fit {name}; it belongs to another model")
    return CoAT(lm, processor, name, model_path, add_think_tokens(lm.get_base_model(), processor.tokenizer)).merge()
