"""The backbone and the thinking block: prompts, tokens, forward, generation (paper, 3.1 and 3.2).

    >>> import torch
    >>> from model import build_inputs, load_coat
    >>> coat = load_coat("tiny")           # Qwen2-Audio's classes, small and random, no download
    >>> wave = 0.1 * torch.randn(16000)    # 1 s
    >>> coat.answer(wave, 16000, "Which note?")    # noise, since nothing is trained yet
    >>> out = coat(build_inputs(coat, [wave], ["Which note?"], ["C"]))    # Output of a training row

A row, left padded. The block is placed here and consumed in the prefill; it is never generated:

pad pad <system, user: .. AUDIO*L_a .. question> <assistant header> start THINK*L_a end response eos
                          ^audio_mask                                     ^think_mask   ^labels
"""
import argparse
import contextlib
import functools
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import string
import sys
import warnings
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import NamedTuple


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do."""


class TooLong(InputError):
    """A clip above MAX_SECONDS, which training and scoring skip."""


def one_line_errors(*kinds, less_memory="a smaller batch, or shorter clips"):
    """Any exception, or one of these kinds, ends the program in the line `error: what it says`.

    With COAT_TRACEBACK=1 there is a traceback. less_memory: what to try when memory runs out"""
    def hook(kind, error, trace):
        line = "error: " + (" ".join(str(error).split()) or kind.__name__)
        if os.environ.get("COAT_TRACEBACK") or kinds and not issubclass(kind, kinds):
            return sys.__excepthook__(kind, error, trace)
        if issubclass(kind, BrokenPipeError):    # a program | head
            return os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if kind is KeyboardInterrupt:
            line = "stopped"
        elif "OutOfMemory" in kind.__name__ or kind is MemoryError or "CPUAllocator" in line:
            line = f"error: no memory left ({line[7:200]}); less is needed with {less_memory}"
        elif kinds or issubclass(kind, ImportError):
            here = [f"{d.name} {d.version}" for d in importlib.metadata.distributions()
                    if d.name in ("torch", "torchaudio", "transformers", "peft")]
            line += f" (beside {', '.join(here)}); pip install -r requirements.txt"
        print(line, file=sys.stderr)

    sys.excepthook = hook
    if not kinds and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)    # a closed pipe shows at once


# The programs import this file first, so that a library which is missing or broken is one line too.
one_line_errors(ImportError, OSError, RuntimeError, KeyboardInterrupt)

import torch
import torch.nn.functional as F
import torchaudio
import transformers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers.cache_utils import StaticLayer

one_line_errors(ImportError)

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
SAMPLE_RATE = 16000    # Hz, what every backbone hears
MIN_SECONDS = 0.1      # of a clip
MAX_SECONDS = 120.0    # above: skipped (paper, appendix B)
MAX_PEAK = 2.0         # mp3 and resampling go a bit above 1, integers far

THINK_START = "<|audio_think_start|>"
THINK = "<|audio_think|>"
THINK_END = "<|audio_think_end|>"
IGNORE = -100          # label of a position that is not a cross-entropy target

# The linear maps of a decoder layer. Names alone would also match in the audio tower.
LORA_TARGETS = (r".*\.language_model\.layers\.\d+\."
                r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)")

TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
# Before, modules had other names, which LORA_TARGETS would miss.
if TRANSFORMERS < (5, 23):
    sys.exit(f"error: transformers {transformers.__version__} is too old; "
             "pip install -U 'transformers>=5.23'")
CACHE = "cache" if TRANSFORMERS >= (5, 24) else "past_key_values"    # how models call it

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)    # no line for each retry
# peft 0.21 calls transformers by a name that is about to go.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


# --------------------------------------------------------------------------------------------------
# Backbones: a row of the table says what differs

@dataclass(frozen=True)
class Backbone:
    hub_id: str           # where its files are by default
    licence: str
    model: str            # classes of transformers, imported when they are used, since that
    processor: str        # takes two seconds
    model_types: tuple    # config.json of a folder that fits says one of these
    audio_marks: str      # how the chat template writes a clip
    audio_token: str = "<|AUDIO|>"    # the placeholder in it, which becomes L_a ids
    piece_seconds: float = 30    # longer clips go in pieces of this
    audio_kwargs: dict = field(default_factory=dict)    # for that extractor, at each call
    eos: tuple = ("<|im_end|>", "<|endoftext|>")    # all stop; the first closes a response
    lora_r: int = 16      # rank and alpha: paper, appendix A
    lora_alpha: int = 32
    text_think: str = (" Output the thinking process in <think> </think>"
                       " and final answer in <answer> </answer>.")
    # To build it without files: what differs from its class.
    text_config: dict = field(default_factory=dict)
    audio_config: dict = field(default_factory=dict)

    @property
    def model_class(self):
        return getattr(transformers, self.model)

    @property
    def processor_class(self):
        is_omni = "Omni" in self.processor
        return omni_processor() if is_omni else getattr(transformers, self.processor)


@functools.cache
def omni_processor():
    """Omni's class, for text and audio only; images and video would need Pillow and torchvision."""
    class Qwen2_5OmniProcessor(transformers.Qwen2_5OmniProcessor):
        def __init__(self, feature_extractor=None, tokenizer=None, chat_template=None):
            skipped = super(transformers.Qwen2_5OmniProcessor, self)
            skipped.__init__(feature_extractor, tokenizer, chat_template=chat_template)
            self.audio_token = "<|AUDIO|>"
            self.audio_token_id = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    return Qwen2_5OmniProcessor


BACKBONES = {
    "qwen2-audio": Backbone(
        hub_id="Qwen/Qwen2-Audio-7B-Instruct", licence="apache-2.0",
        model="Qwen2AudioForConditionalGeneration", processor="Qwen2AudioProcessor",
        model_types=("qwen2_audio",),
        audio_marks="Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n",
        text_config=dict(vocab_size=156032, intermediate_size=11008)),
    # Its extractor would pad every clip to 300 s.
    "qwen2.5-omni": Backbone(
        hub_id="Qwen/Qwen2.5-Omni-7B", licence="apache-2.0",
        model="Qwen2_5OmniThinkerForConditionalGeneration", processor="Qwen2_5OmniProcessor",
        model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
        audio_marks="<|audio_bos|><|AUDIO|><|audio_eos|>",
        piece_seconds=MAX_SECONDS,
        audio_kwargs={"max_length": round(MAX_SECONDS * SAMPLE_RATE)}),
    # Its processor cuts 30 s windows itself.
    "audio-flamingo-3": Backbone(
        hub_id="nvidia/audio-flamingo-3-hf", licence="other (NVIDIA OneWay, non-commercial)",
        model="AudioFlamingo3ForConditionalGeneration", processor="AudioFlamingo3Processor",
        model_types=("audioflamingo3",),
        audio_marks="<sound>", audio_token="<sound>",
        piece_seconds=MAX_SECONDS,
        text_think="\nPlease think and reason about the input audio before you respond.",
        text_config=dict(vocab_size=151672, hidden_size=3584, intermediate_size=18944,
                         num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)),
}
# Random, of variance 1 / fan-in, so that signals keep their size; a short window, since the
# spectrogram is that of all of it; wide adapters, since nothing in it is worth keeping.
BACKBONES["tiny"] = replace(
    BACKBONES["qwen2-audio"],
    hub_id="", lora_r=32, lora_alpha=64, piece_seconds=4,
    text_config=dict(vocab_size=320, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                     num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8192,
                     initializer_range=128 ** -0.5),
    audio_config=dict(d_model=128, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=256,
                      max_source_positions=200, initializer_range=384 ** -0.5))


# --------------------------------------------------------------------------------------------------
# Audio and text to tensors, for training and inference alike

def check_seconds(seconds, what):
    """Raises InputError, or TooLong, unless a clip lasts MIN_SECONDS to MAX_SECONDS."""
    message = f"{what} lasts {seconds:.2f} s; give {MIN_SECONDS} to {MAX_SECONDS:.0f} s"
    if seconds > MAX_SECONDS:
        raise TooLong(f"{message}, or cut it with \"start\" and \"end\"")
    if not seconds >= MIN_SECONDS:    # so that NaN is refused too
        raise InputError(message)


def as_wave(wave):
    """A clip, numpy or torch, -> (N,) float32. Raises InputError if it is of another kind."""
    wave = torch.as_tensor(wave)
    if wave.ndim != 1 or not wave.is_floating_point():
        raise InputError(f"a clip is (N,) floats, mono, not {tuple(wave.shape)} of {wave.dtype}")
    if len(wave) and not wave.abs().max() <= MAX_PEAK:    # so that NaN is refused too
        raise InputError(f"a clip is in [-1, 1], this one goes to {wave.abs().max():.3g}; divide "
                         "16-bit integers by 32768")
    return wave.float().cpu()


def at_rate(wave, rate, new_rate):
    """(N,) at `rate` Hz -> (ceil(N new_rate / rate),) at `new_rate` Hz. Raises InputError."""
    taps = math.lcm(rate, new_rate) // math.gcd(rate, new_rate)
    if taps > 2 ** 24:    # of the kernel; for 44,099 Hz it would take gigabytes
        raise InputError(f"cannot resample from {rate} to {new_rate} Hz; give a usual rate")
    return torchaudio.functional.resample(wave, rate, new_rate)


def n_audio_tokens(n_samples):
    """L_a at 16 kHz: a frame every 160 samples, a stride-2 convolution, pooling by 2."""
    return ((math.ceil(n_samples / 160) + 1) // 2) // 2


def think_block(n_audio, think_ids):
    """b(L_a): a thinking token for each audio token, between two marks."""
    start, think, end = think_ids
    return [start] + [think] * n_audio + [end] if n_audio else []    # equation 2


def check_text(coat, text):
    """Raises InputError if a text spells a special token, which it would become."""
    found = coat.special_tokens.search(text)
    if found:
        raise InputError(f"the text contains the special token {found[0]}; remove it")


def render_prompt(coat, question, n_pieces):
    """The chat as the released template renders it, with `n_pieces` audio placeholders, up to the
    assistant header. Raises InputError."""
    check_text(coat, question)
    content = [{"type": "audio"}] * bool(n_pieces) + [{"type": "text", "text": question}]
    prompt = coat.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    return prompt.replace(coat.backbone.audio_token, coat.backbone.audio_token * n_pieces)


def encode_row(coat, wave, prompt, response=None, think=True):
    """One row of build_inputs -> its ids (list), how many of them at the end are targets (response,
    eos), n_audio, and what the processor made of the sound (dict, empty without)."""
    n_audio = 0
    pieces = []
    if wave is not None:
        wave = as_wave(wave)
        check_seconds(len(wave) / SAMPLE_RATE, "the clip")
        n_audio = n_audio_tokens(len(wave))
        cut = wave.split(round(coat.backbone.piece_seconds * SAMPLE_RATE))
        # A rest under 30 ms after a whole piece makes no token; the tower would see only padding.
        pieces = [piece.numpy() for piece in cut if n_audio_tokens(len(piece))]

    out = coat.processor(    # flat keywords would reach the tokenizer too
        text=render_prompt(coat, prompt, len(pieces)), audio=pieces or None, return_tensors="pt",
        audio_kwargs={"sampling_rate": SAMPLE_RATE, **coat.backbone.audio_kwargs})
    ids = out.pop("input_ids")[0].tolist()
    out.pop("attention_mask")
    found = ids.count(coat.audio_id)
    assert found == n_audio, f"the processor made {found} audio tokens where L_a is {n_audio}"
    if think:
        ids += think_block(n_audio, coat.think_ids)
    target = []
    if response is not None:
        check_text(coat, response)
        target = coat.processor.tokenizer(response, add_special_tokens=False).input_ids
        target.append(coat.eos_ids[0])
    return ids + target, len(target), n_audio, dict(out) if pieces else {}


def pad_batch(coat, rows):
    """Results of encode_row -> what build_inputs returns."""
    T = max(len(ids) for ids, *_ in rows)
    input_ids = torch.full((len(rows), T), coat.processor.tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(rows), T, dtype=torch.long)
    labels = torch.full((len(rows), T), IGNORE)
    audio = {}
    for i, (ids, n_target, _, features) in enumerate(rows):
        input_ids[i, T - len(ids):] = torch.tensor(ids)
        attention_mask[i, T - len(ids):] = 1
        labels[i, T - n_target:] = input_ids[i, T - n_target:]
        for name, value in features.items():
            audio.setdefault(name, []).append(value)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
        "think_mask": input_ids == coat.think_ids[1],
        "audio_mask": input_ids == coat.audio_id,
        "labels": labels,
        "n_audio": torch.tensor([n_audio for _, _, n_audio, _ in rows]),
        "audio": {name: torch.cat(values) for name, values in audio.items()},
    }


def build_inputs(coat, waves, prompts, responses=None, think=None):
    """A batch from rows; without `responses` it ends where generation starts. Raises InputError.

    coat       a CoAT, or its `.spec` in a worker
    waves      list of (N,) floats at 16 kHz, or None for a row without audio and block
    think      whether prompts have the block; None: as the model was trained
    Returns a dict: input_ids, attention_mask, position_ids, think_mask, audio_mask and labels, each
    (B, T); n_audio (B,); audio, what the processor made of the sound."""
    think = coat.think if think is None else think
    responses = responses or [None] * len(waves)
    return pad_batch(coat, [encode_row(coat, *row, think)
                            for row in zip(waves, prompts, responses, strict=True)])


def pad_rows(flat, lengths):
    """(sum L, D) and (B,) -> (B, L, D), zero where a row has ended, and (B, L), false there. L is
    at least 1, so that the heads run without audio too, on one masked frame."""
    L = max(1, int(lengths.max()))
    valid = torch.arange(L, device=flat.device) < lengths.to(flat.device)[:, None]    # (B, L)
    zeros = flat.new_zeros(*valid.shape, flat.shape[-1])                              # (B, L, D)
    return zeros.masked_scatter(valid[..., None], flat), valid


def to_device(value, device):
    """A tensor, or the tensors in a dict, on a device."""
    if isinstance(value, dict):
        return {key: to_device(inner, device) for key, inner in value.items()}
    return value.to(device, non_blocking=True) if torch.is_tensor(value) else value


# --------------------------------------------------------------------------------------------------
# The model

class Slots(StaticLayer):
    """Keys and values of one decoder layer, in memory that stays where it is. The prefill attends
    to its own alone, without a mask: attention's fastest kernels."""

    def update(self, keys, values, *args, **kwargs):
        cached = super().update(keys, values)    # (B, heads, S, D / heads) each
        return cached if keys.shape[2] == 1 else (keys, values)

    def get_mask_sizes(self, query_length):
        return (self.max_cache_len if query_length == 1 else query_length), 0


class Output(NamedTuple):
    think_states: torch.Tensor    # (B, L, D) H_think; without the block, states at the audio tokens
    audio_embeds: torch.Tensor    # (B, L, D) x_A, what the LM consumed there; no gradient
    valid: torch.Tensor           # (B, L) which of these are real
    ce_sum: torch.Tensor          # () sum of the cross-entropy over the response tokens
    n_targets: int                # how many there are


class CoAT(nn.Module):
    """A backbone with the thinking tokens. `lm`: a transformers model or a PeftModel around it.
    `think`: whether its prompts have the block."""

    def __init__(self, lm, processor, name, model_path, think=True):
        super().__init__()
        self.lm = lm
        self.processor = processor
        self.name = name
        self.model_path = model_path
        self.think = think
        self.backbone = BACKBONES[name]
        ids_of = processor.tokenizer.convert_tokens_to_ids
        self.audio_id = ids_of(self.backbone.audio_token)
        self.eos_ids = ids_of(list(self.backbone.eos))
        self.think_ids = ids_of([THINK_START, THINK, THINK_END])
        added = processor.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        self.special_tokens = re.compile("|".join(map(re.escape, special)))
        suppressed_ids = torch.tensor(self.think_ids, device=lm.device)
        self.register_buffer("suppressed_ids", suppressed_ids, persistent=False)

    @property
    def hf(self):
        """The model of transformers."""
        return self.lm.get_base_model() if self.has_adapter else self.lm

    @property
    def has_adapter(self):
        """Whether `lm` is a PeftModel."""
        return hasattr(self.lm, "get_base_model")

    @property
    def spec(self):
        """What build_inputs needs, without weights (for data workers)."""
        names = "backbone processor think think_ids audio_id eos_ids special_tokens"
        return SimpleNamespace(**{name: getattr(self, name) for name in names.split()})

    @property
    def new_projector(self):
        """The parameters of a projector that is trained."""
        return [p for name, p in self.lm.named_parameters()
                if "modules_to_save" in name and p.requires_grad]

    @property
    def decoder_weights(self):
        """How many weights of the decoder layers a token meets, without adapters."""
        layers = self.hf.model.language_model.layers
        return sum(p.numel() for name, p in layers.named_parameters() if "lora_" not in name)

    def checkpoint_activations(self):
        """Recomputes the decoder's activations in the backward pass."""
        decoder = self.hf.model.language_model
        decoder.activation_checkpointing_enable()
        decoder.train()    # only then; there is no dropout

    def compile_layers(self):
        """Compiles the decoder layers for training; one's code serves all."""
        for layer in self.hf.model.language_model.layers:
            layer.compile(dynamic=True)

    def states(self, batch, **kwargs):
        """Final states (after the last norm) and the embeddings that went in, both (B, T, D)."""
        dtype = self.hf.model.audio_tower.dtype    # not every class casts to it by itself
        audio = {name: value.to(dtype) if value.is_floating_point() else value
                 for name, value in batch["audio"].items()}
        embeds = []
        hook = self.hf.model.language_model.register_forward_pre_hook(
            lambda module, args, inputs: embeds.append(inputs["inputs_embeds"]), with_kwargs=True)
        with hook, self.short_windows(audio):
            out = self.hf.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                position_ids=batch["position_ids"], **audio, **kwargs)
        return out.last_hidden_state, embeds[0]

    @contextlib.contextmanager
    def short_windows(self, audio):
        """Cuts the windows of a tower of Whisper's kind to the longest piece of the batch. It would
        compute 30 s of each, and what it makes of padding is masked."""
        tower = self.hf.model.audio_tower
        if not audio or not hasattr(tower, "embed_positions"):    # Omni's takes true lengths
            yield
            return
        mask = next(value for name, value in audio.items() if name.endswith("mask"))
        window = mask.shape[1]
        # The convolutions at the last frame see two more; they and pooling halve twice.
        frames = min(window, math.ceil((int(mask.sum(1).max()) + 2) / 4) * 4)
        for name, value in audio.items():
            audio[name] = value[..., :frames] if value.shape[-1] == window else value
        positions = tower.embed_positions.weight
        whole = positions.data
        try:
            positions.data = whole[:frames // 2]
            tower.config.max_source_positions = frames // 2
            yield
        finally:
            positions.data = whole
            tower.config.max_source_positions = window // 2

    def forward(self, batch):
        """A batch of build_inputs -> Output. Logits are computed at the response alone."""
        batch = to_device(batch, self.hf.device)
        h, embeds = self.states(batch, use_cache=False)    # (B, T, D) each
        at = batch["think_mask"] if self.think else batch["audio_mask"]    # the control
        think_states, valid = pad_rows(h[at], at.sum(1))
        audio_embeds, _ = pad_rows(embeds.detach()[batch["audio_mask"]], batch["n_audio"])
        targets = batch["labels"][:, 1:]
        is_target = targets != IGNORE
        logits = self.hf.lm_head(h[:, :-1][is_target]).float()    # (n_targets, V)
        ce_sum = F.cross_entropy(logits, targets[is_target], reduction="sum")    # equation 1
        return Output(think_states, audio_embeds, valid, ce_sum, len(logits))

    def next_ids(self, logits):
        """(B, V) -> (B,) the likeliest next tokens, never the block's."""
        return logits.float().index_fill(1, self.suppressed_ids, -torch.inf).argmax(-1)

    def decode(self, token, visible, cache):
        """A step: tokens (B,) -> the next ones (B,). visible (B, S): which slots to attend to."""
        decoder = self.hf.model.language_model
        out = decoder(
            inputs_embeds=decoder.embed_tokens(token[:, None]),    # (B, 1, D)
            attention_mask=visible[:, None, None],                 # (B, 1, 1, S)
            position_ids=visible.sum(-1, keepdim=True) - 1,        # (B, 1)
            use_cache=True, **{CACHE: cache})
        return self.next_ids(self.hf.lm_head(out.last_hidden_state[:, -1]))

    def compile_decode(self, **kwargs):
        """Fuses the kernels of a step, once for all lengths; on a GPU they become a CUDA graph. It
        takes a while, which many or long answers earn back. After merge()."""
        if self.suppressed_ids.is_cuda:
            kwargs = {"mode": "reduce-overhead"} | kwargs
        self.decode = torch.compile(self.decode, dynamic=True, fullgraph=True, **kwargs)
        self.new_cache = functools.lru_cache(1)(self.new_cache)    # a graph is bound to its memory

    def new_cache(self, B, n_slots):
        """Room for the keys and values of n_slots tokens a row."""
        return transformers.Cache([Slots(n_slots) for _ in self.hf.model.language_model.layers])

    @torch.inference_mode()
    def stream(self, batch, max_new_tokens=128, stop=True):
        """Greedy decoding: yields (B,) ids a step until every row has ended, padding for those that
        have: one prefill over prompt and block, then one step a token. With stop=False (for
        timing) rows never end. Raises InputError if the logits are no numbers."""
        batch = to_device(batch, self.hf.device)
        B, T = batch["input_ids"].shape
        n_slots = math.ceil((T + max_new_tokens) / 256) * 256    # few sizes
        cache = self.new_cache(B, n_slots)
        cache.reset()
        visible = F.pad(batch["attention_mask"].bool(), (0, n_slots - T))    # (B, S)
        h, _ = self.states(batch, use_cache=True, **{CACHE: cache})
        logits = self.hf.lm_head(h[:, -1])
        if not logits.isfinite().all():
            raise InputError(f"{self.name} gives NaN or infinity; are its weights damaged?")
        ids = self.next_ids(logits)
        eos = torch.tensor(self.eos_ids, device=ids.device)
        done = torch.zeros(B, dtype=torch.bool, device=ids.device)
        for step in range(max_new_tokens):
            token = torch.where(done, self.processor.tokenizer.pad_token_id, ids)
            yield token
            if stop:
                done |= torch.isin(token, eos)
            if done.all() or step == max_new_tokens - 1:
                return
            visible[:, T + step] = True
            ids = self.decode(token, visible, cache).clone()    # before the graph writes again

    def generate(self, batch, max_new_tokens=128):
        """Greedy answers, one string a row."""
        ids = torch.stack(list(self.stream(batch, max_new_tokens)), dim=1)    # (B, steps)
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def answer(self, wave, rate, question, max_new_tokens=128):
        """The answer to a question about a clip; of lists of all three, a list. Raises InputError.

        wave    (N,) floats in [-1, 1], mono, numpy or torch, `rate` a second; None: no audio"""
        if not isinstance(wave, (list, tuple)):
            return self.answer([wave], [rate], [question], max_new_tokens)[0]
        if isinstance(question, str):
            raise InputError("of several clips give a list of questions, too")
        waves = [clip if clip is None else at_rate(as_wave(clip), int(hertz), SAMPLE_RATE)
                 for clip, hertz in zip(wave, rate, strict=True)]
        return self.generate(build_inputs(self, waves, question), max_new_tokens)

    def merge(self):
        """Folds the adapter into the weights: the same function, without its cost."""
        self.eval()    # ends checkpoint_activations, which would drop the cache
        for layer in self.hf.model.language_model.layers:
            layer._compiled_call_impl = None    # ends compile_layers
        if self.has_adapter:
            dtype = self.hf.dtype
            for module in self.lm.modules():
                if hasattr(module, "lora_A"):    # peft would round before it adds
                    module.base_layer.float()
                    module.merge()
                    module.base_layer.to(dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "All adapters are already merged")
                self.lm = self.lm.merge_and_unload().to(dtype)    # and the rows of the tokens
        return self

    def save(self, folder):
        """Writes a plain PEFT adapter or, once merged, a plain transformers model, with the
        processor, and in coat.json what load_coat has to know."""
        is_adapter = self.has_adapter
        if is_adapter:
            self.lm.save_pretrained(folder, save_embedding_layers=False)
        else:    # transformers' generate finds in its settings what `stream` does
            self.lm.generation_config = transformers.GenerationConfig(
                do_sample=False, suppress_tokens=self.think_ids, eos_token_id=self.eos_ids,
                pad_token_id=self.processor.tokenizer.pad_token_id)
            self.lm.save_pretrained(folder)
        if self.name == "qwen2.5-omni":
            self.complete_omni(folder, is_adapter)
        template = self.processor.chat_template
        if self.think:
            self.processor.chat_template = template + read_asset("thinking_block.jinja")
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"    # for generation
        self.processor.save_pretrained(folder)
        self.processor.chat_template = template
        known = {"backbone": self.name, "model_path": self.model_path, "think": self.think}
        write_file(os.path.join(folder, "coat.json"), json.dumps(known))
        if self.think and not (is_adapter and self.name == "tiny"):
            self.write_card(folder, "adapter_card.md" if is_adapter else "model_card.md")

    def write_card(self, folder, card):
        """README.md: how to use the folder without this code."""
        place, revision = origin(self.name, self.model_path)
        write_file(os.path.join(folder, "README.md"), string.Template(read_asset(card)).substitute(
            name=self.name, licence=getattr(self.hf.config, "licence", self.backbone.licence),
            model_class=type(self.hf).__name__, dtype=str(self.hf.dtype).removeprefix("torch."),
            origin=place, revision=f', revision="{revision}"' if revision else "",
            window=f"{self.backbone.piece_seconds:.0f}"))

    def complete_omni(self, folder, is_adapter):
        """Adds what plain Qwen2.5-Omni wants: the settings for images, and a merged thinker's
        config inside the full model's, the only one that vLLM knows."""
        place, revision = origin(self.name, self.model_path)
        settings = transformers.utils.cached_file(
            place, "preprocessor_config.json", revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False)
        if settings:
            shutil.copy(settings, folder)
        if not is_adapter:
            path = os.path.join(folder, "config.json")
            thinker = read_json(path)
            thinker["text_config"]["tie_word_embeddings"] = False    # vLLM takes its word for it
            write_file(path, json.dumps({
                "architectures": ["Qwen2_5OmniForConditionalGeneration"],
                "model_type": "qwen2_5_omni", "enable_audio_output": False,
                "dtype": thinker["dtype"], "thinker_config": thinker}, indent=2))


# --------------------------------------------------------------------------------------------------
# Loading

def load_coat(name="tiny", model_path=None, trainable=False, device="cpu", dtype=None,
              random=False, train_projector=False):
    """A CoAT: a backbone with the three tokens and, if it was or is to be trained, LoRA. A bare
    backbone has no block in its prompts. Raises InputError.

    name        a run, a checkpoint, a merged folder, or a name of BACKBONES
    model_path  where that backbone's files are: a folder, or NAME@REVISION of the hub; a run knows
    trainable   LoRA, which is new unless name has it, and the three rows get gradients, in fp32
    dtype       bf16 on a GPU and fp32 on a CPU unless given
    random      random weights at full size, for time and memory
    train_projector    a new adapter trains the projector between tower and language model too"""
    adapter = None
    think = trainable
    if name not in BACKBONES:
        folder = latest_checkpoint(name)
        known = saved_as(folder)
        name, think = known["backbone"], known["think"]
        if os.path.isfile(os.path.join(folder, "adapter_config.json")):
            adapter = folder
            model_path = model_path or known["model_path"]
        else:
            model_path = folder
    elif not trainable and model_path and os.path.isfile(os.path.join(model_path, "coat.json")):
        think = saved_as(model_path)["think"]
    if model_path and os.path.isdir(model_path):
        model_path = os.path.abspath(model_path)
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    place, revision = origin(name, model_path)
    if random or not place:    # tiny has no files
        lm, processor = build_random(name, device, dtype)
    else:
        with reading(f"{name} from '{place}'"):
            lm, processor = read_backbone(BACKBONES[name], place, revision, device, dtype)
    lm.eval().requires_grad_(False)
    think_ids = add_tokens(lm, processor.tokenizer)
    if adapter:
        lm = load_adapter(lm, adapter, name, trainable)
    elif trainable:
        import peft
        lm = peft.get_peft_model(lm, peft.LoraConfig(
            r=BACKBONES[name].lora_r, lora_alpha=BACKBONES[name].lora_alpha,
            target_modules=LORA_TARGETS, trainable_token_indices={"embed_tokens": think_ids},
            modules_to_save=["multi_modal_projector"] if train_projector else None))
    if trainable:
        for p in lm.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        for module in lm.modules():
            if hasattr(module, "lora_A"):
                module.cast_input_dtype_enabled = False    # autocast does; an fp32 copy would stay
    return CoAT(lm, processor, name, model_path, think)


@contextlib.contextmanager
def reading(what):
    """What goes wrong while files are read, of any kind, becomes an InputError that names them."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        reason = " ".join(str(e).split()).split(". ")[0][:300]    # then comes advice about the hub
        raise InputError(f"cannot load {what}: {reason} ({type(e).__name__})") from e


def origin(name, model_path=None):
    """Where a backbone's files are: (folder, None) or (name, revision). Raises InputError."""
    given = str(model_path or BACKBONES[name].hub_id)
    if os.path.isdir(given):
        return os.path.abspath(given), None
    place, _, revision = given.partition("@")
    if model_path and not revision:
        raise InputError(f"no folder '{given}'; give one, or NAME@REVISION of the hub")
    return place, revision or "main"


def read_backbone(backbone, place, revision, device, dtype):
    """(model, processor). Raises ValueError where transformers would make up what is missing."""
    given, _ = transformers.PreTrainedConfig.get_config_dict(place, revision=revision)
    if given.get("model_type") not in backbone.model_types:
        raise ValueError(f"its config.json is that of '{given.get('model_type')}'")
    if None in (given.get(part, "") for part in ("text_config", "audio_config", "thinker_config")):
        raise ValueError("a part of its config is null")    # it would be the default, of 30 GB
    if given.get("quantization_config"):
        raise ValueError("its weights are quantised, no adapter fits them")
    processor = backbone.processor_class.from_pretrained(place, revision=revision)
    if not processor.chat_template:
        raise ValueError("it has no chat template")
    # Without the block that CoAT.save adds: encode_row places it.
    processor.chat_template = processor.chat_template.partition("{# the thinking block #}")[0]
    config = backbone.model_class.config_class.from_pretrained(place, revision=revision)
    if backbone.model_types[0] == "qwen2_5_omni":
        config.vision_config.depth = 0    # also in what is saved, for plain transformers
        # The blocks of its vision tower are neither built nor read.
        backbone.model_class._keys_to_ignore_on_load_unexpected = [r"\bvisual\.blocks\."]
    model = read_weights(backbone.model_class, place, revision=revision, config=config, dtype=dtype,
                         device_map=device)
    audio_id = model.config.audio_token_id
    if processor.tokenizer.convert_tokens_to_ids(backbone.audio_token) != audio_id:
        raise ValueError(f"its tokenizer is missing, or does not give {audio_id} to "
                         f"{backbone.audio_token}")
    return model, processor


def read_weights(model_class, place, **kwargs):
    """A model with all of its weights. Raises ValueError where transformers fills in noise."""
    model, report = model_class.from_pretrained(
        place, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    wrong = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if wrong:
        raise ValueError(f"{len(wrong)} tensors are missing or misshapen, such as {min(wrong)}")
    return model


# What the released templates render, for a processor without its files.
TEMPLATE = """<|im_start|>system
You are a helpful assistant.<|im_end|>
{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for c in m['content'] %}{% if c['type'] == 'audio' %}AUDIO_MARKS\
{% else %}{{ c['text'] }}{% endif %}{% endfor %}\
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_random(name, device, dtype):
    """(model, processor) without files, of full size but for tiny, with a tokenizer of bytes."""
    backbone = BACKBONES[name]
    named = {"audio_token": backbone.audio_token, "audio_bos_token": "<|audio_bos|>",
             "audio_eos_token": "<|audio_eos|>"}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()) + special)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], extra_special_tokens=special[1:],
        model_specific_special_tokens=named)
    config = backbone.model_class.config_class(
        text_config=dict(backbone.text_config), audio_config=dict(backbone.audio_config))
    config.audio_token_id = vocab[backbone.audio_token]
    if name == "qwen2.5-omni":
        config.vision_config.depth = 0
        config.vision_start_token_id = None    # read by its forward, in no class; no token has it
    window = config.audio_config.max_source_positions // 50    # s
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=window, return_attention_mask=True)
    processor = backbone.processor_class(
        feature_extractor=extractor, tokenizer=tokenizer,
        chat_template=TEMPLATE.replace("AUDIO_MARKS", backbone.audio_marks))
    # Large weights are drawn where they live; tiny is the same on every device.
    where, kind = ("cpu", torch.float32) if name == "tiny" else (device, dtype)
    with torch.random.fork_rng(devices=[]), torch.device(where):
        torch.manual_seed(0)
        model = backbone.model_class._from_config(config, dtype=kind)
    return model.to(device, dtype), processor


def add_tokens(model, tokenizer, tokens=(THINK_START, THINK, THINK_END)):
    """Adds tokens -> their ids. New rows start as the mean of the used ones."""
    used = len(tokenizer)
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    n_new = tokenizer.add_tokens(added, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if max(ids) >= model.get_input_embeddings().num_embeddings:    # spare rows stay
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    if n_new:
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            table = embedding.weight.data    # (V, D)
            table[ids] = table[:used].mean(0, dtype=torch.float32).to(table.dtype)
    return ids


def load_adapter(lm, folder, name, trainable=False):
    """The PeftModel of a saved adapter. Raises InputError."""
    import peft
    with reading(f"the adapter in '{folder}' for {name}"):
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = not trainable
        lm = peft.PeftModel(lm, config)
        loaded = lm.load_adapter(folder, "default", is_trainable=trainable)
        wrong = [*loaded.missing_keys, *loaded.unexpected_keys]
        if wrong:    # peft would only warn
            raise ValueError(f"it lacks, or has no place for, {wrong[0]}")
    return lm


def load_text_think(name, folder, model_path=None, device="cpu", dtype=None):
    """A backbone with its authors' adapter that reasons in text, merged (table 2, appendix D):
    Audio Flamingo 3's `think` folder. Raises InputError."""
    coat = load_coat(name, model_path, device=device, dtype=dtype)
    path = os.path.join(folder, "non_lora_trainables.bin")
    weights = {}
    for key, value in torch.load(path, map_location=device, weights_only=True).items():
        key = key.removeprefix("base_model.model.")
        for old, new in BEFORE_5.items():
            key = re.sub("^" + re.escape(old), new, key)
        weights[key] = value.to(coat.hf.dtype)
    unknown = coat.lm.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise InputError(f"'{path}' is of another model: {name} has no {unknown[0]}")
    coat.lm = load_adapter(coat.lm, folder, name)
    return coat.merge()


# How names in a model began before transformers 5, and how they begin now.
BEFORE_5 = {"language_model.model.": "model.language_model.", "audio_tower.": "model.audio_tower.",
            "multi_modal_projector.": "model.multi_modal_projector."}


# --------------------------------------------------------------------------------------------------
# What the programs share

def read_asset(name):
    """The text of a file in assets/."""
    with open(os.path.join(ASSETS, name), encoding="utf-8") as file:
        return file.read()


def read_json(path):
    """The JSON object of a file. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise InputError(f"'{path}' is missing or damaged ({e})") from e


def write_file(path, text):
    """A text file, whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def in_range(kind, low, high):
    """A type for argparse: numbers from `low` to `high`."""
    def number(text):
        if not low <= kind(text) <= high:    # so that NaN is refused too
            raise argparse.ArgumentTypeError(f"'{text}' is not from {low} to {high}")
        return kind(text)
    return number


COUNT = in_range(int, 1, 2 ** 20)    # rows, tokens, clips: more is a slip of the keyboard
WORKERS = in_range(int, 0, 1024)


def usable_device(device=None, name="tiny"):
    """A torch.device for a model, see load_coat; by default the GPU or, for tiny, the CPU. Raises
    InputError."""
    backbone = name if name in BACKBONES else saved_as(latest_checkpoint(name))["backbone"]
    if device is None and not torch.cuda.is_available() and backbone != "tiny":
        raise InputError(f"torch {torch.__version__} finds no GPU (CUDA 13 needs driver 580 or "
                         f"later); to run {backbone} without, in fp32, say --device cpu")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # With a mask its backward pass, which torch 2.11 prefers, can give NaN (pytorch 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def saved_as(folder):
    """{"backbone", "model_path", "think"} as CoAT.save wrote it. Raises InputError."""
    return read_json(os.path.join(folder, "coat.json"))


def checkpoint_steps(run):
    """Steps of the whole checkpoint-STEP folders of a run, in order."""
    names = os.listdir(run) if os.path.isdir(run) else []
    return sorted(int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d+", name))


def latest_checkpoint(run):
    """The newest checkpoint-STEP folder of a run, or `run` if CoAT.save wrote it. Raises
    InputError."""
    if os.path.isfile(os.path.join(run, "coat.json")):
        return run
    steps = checkpoint_steps(run)
    if not steps:
        names = ", ".join(f"{name} ({row.hub_id or 'random'})" for name, row in BACKBONES.items())
        raise InputError(f"'{run}' is no run, checkpoint, merged folder or backbone: {names}")
    return os.path.join(run, f"checkpoint-{steps[-1]}")
