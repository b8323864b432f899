"""The backbone and the thinking block: prompts, tokens, forward, generation (paper, 3.1 and 3.2).

    >>> import torch
    >>> from model import build_inputs, load_coat
    >>> coat = load_coat("tiny")           # the real Qwen2-Audio classes, random, no download
    >>> wave = 0.1 * torch.randn(16000)    # 1 s
    >>> out = coat(build_inputs(coat, [wave], ["Which note?"], ["C"]))    # a training row
    >>> coat.generate(build_inputs(coat, [wave], ["Which note?"]))        # it, up to the response

A row, left padded. The block is placed here and consumed in the prefill; it is never generated:

pad pad <system, user: .. AUDIO*L_a .. question> <assistant header> start THINK*L_a end response eos
                          ^audio_mask                                     ^think_mask   ^labels
"""
import argparse
import json
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

import peft
import torch
import torch.nn.functional as F
import transformers
from peft.tuners.lora import LoraLayer
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers.cache_utils import StaticLayer

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
SAMPLE_RATE = 16000    # Hz, what every backbone hears
# Audio tokens, and thinking tokens, per second (paper, appendix A). It stands in experts.py too, so
# that experts.py can be copied alone; a test holds the two equal.
TOKEN_RATE = 25
MIN_SECONDS = 0.1      # of a clip; below: hardly a token to think with
MAX_SECONDS = 120.0    # above: skipped (paper, appendix B)

THINK_START = "<|audio_think_start|>"
THINK = "<|audio_think|>"
THINK_END = "<|audio_think_end|>"
IGNORE = -100          # label of a position that is not a cross-entropy target

# The seven linear maps of a decoder layer. Names alone would also match in the audio tower.
LORA_TARGETS = (r".*\.language_model\.layers\.\d+\."
                r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)")


# --------------------------------------------------------------------------------------------------
# Backbones: a row of the table says what differs, the rest of the file is shared

# Two classes without their eyes. They keep the names, which go into the folders they save.

class Qwen2_5OmniThinkerForConditionalGeneration(
        transformers.Qwen2_5OmniThinkerForConditionalGeneration):
    """The thinker without its vision tower, whose weights are never read."""

    _keys_to_ignore_on_load_unexpected = [r"\bvisual\."]

    def __init__(self, config):
        config.vision_config.depth = 0    # also in what is saved, for plain transformers
        super().__init__(config)
        self.model.visual = None          # while it is still without memory

    @classmethod
    def is_custom_code(cls):
        """transformers translates the published names of the weights for its own classes only."""
        return False


class Qwen2_5OmniProcessor(transformers.Qwen2_5OmniProcessor):
    """Text and audio only: those for images and video need Pillow and torchvision."""

    def __init__(self, feature_extractor=None, tokenizer=None, chat_template=None):
        skipped = super(transformers.Qwen2_5OmniProcessor, self)
        skipped.__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.audio_token = "<|AUDIO|>"
        self.audio_token_id = tokenizer.convert_tokens_to_ids("<|AUDIO|>")


@dataclass(frozen=True)
class Backbone:
    hub_id: str    # where its files are, unless a local folder is given
    licence: str
    model_class: type
    processor_class: type
    model_types: tuple    # config.json of a folder that fits says one of these
    audio_marks: str      # how the chat template writes a clip
    audio_token: str = "<|AUDIO|>"    # the placeholder in it, which becomes L_a ids
    piece_seconds: float = None    # longer clips go in pieces of this; None: the extractor's window
    window_seconds: int = 30    # what its feature extractor pads to, if built without files
    audio_kwargs: dict = field(default_factory=dict)    # for that extractor, at each call
    eos: tuple = ("<|im_end|>", "<|endoftext|>")    # all stop; the first closes a response
    lora_r: int = 16      # rank and alpha: paper, appendix A
    lora_alpha: int = 32
    text_think: str = (" Output the thinking process in <think> </think>"
                       " and final answer in <answer> </answer>.")


BACKBONES = {
    "qwen2-audio": Backbone(
        hub_id="Qwen/Qwen2-Audio-7B-Instruct",
        licence="apache-2.0",
        model_class=transformers.Qwen2AudioForConditionalGeneration,
        processor_class=transformers.Qwen2AudioProcessor,
        model_types=("qwen2_audio",),
        audio_marks="Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n"),
    # The checkpoint also holds a talker. Its extractor would pad every clip to 300 s.
    "qwen2.5-omni": Backbone(
        hub_id="Qwen/Qwen2.5-Omni-7B",
        licence="apache-2.0",
        model_class=Qwen2_5OmniThinkerForConditionalGeneration,
        processor_class=Qwen2_5OmniProcessor,
        model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
        audio_marks="<|audio_bos|><|AUDIO|><|audio_eos|>",
        piece_seconds=MAX_SECONDS,
        window_seconds=300,
        audio_kwargs={"max_length": round(MAX_SECONDS * SAMPLE_RATE)}),
    # The processor cuts its 30 s windows itself. It has its own thinking adapter and sentence.
    "audio-flamingo-3": Backbone(
        hub_id="nvidia/audio-flamingo-3-hf",
        licence="other (NVIDIA OneWay, non-commercial)",
        model_class=transformers.AudioFlamingo3ForConditionalGeneration,
        processor_class=transformers.AudioFlamingo3Processor,
        model_types=("audioflamingo3",),
        audio_marks="<sound>",
        audio_token="<sound>",
        piece_seconds=MAX_SECONDS,
        text_think="\nPlease think and reason about the input audio before you respond."),
}
# Whisper's encoder and a text model that knows ChatML, in Qwen2-Audio's classes; the projector
# between them is new, and trained with the adapters. For evidence, not for use.
BACKBONES["small"] = replace(
    BACKBONES["qwen2-audio"],
    hub_id="openai/whisper-tiny,HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="other (those of its two parts)")
# 1.2 M weights of variance 1 / fan-in, so that signals keep their size through untrained layers.
# A tower computes its whole window whatever the clip, so this one is short. Random weights know
# nothing worth keeping: the adapters are wider.
BACKBONES["tiny"] = replace(
    BACKBONES["qwen2-audio"], hub_id="", window_seconds=4, lora_r=32, lora_alpha=64)
LIGHT = ("tiny", "small")    # a CPU is enough for them

# --------------------------------------------------------------------------------------------------
# Prompts and rows to tensors, for training and inference alike

def n_audio_tokens(n_samples):
    """L_a at 16 kHz: a log-mel frame every 160 samples, a stride-2 convolution, pooling by 2."""
    return ((math.ceil(n_samples / 160) + 1) // 2) // 2


def think_block(n_audio, think_ids):
    """b(L_a) of equation 2: [start, think * L_a, end], empty when there is no audio."""
    if n_audio == 0:
        return []
    start, think, end = think_ids
    return [start] + [think] * n_audio + [end]


def check_text(coat, text):
    """Raises InputError if a text spells a token that only build_inputs may place."""
    for token in (coat.backbone.audio_token, THINK_START, THINK, THINK_END):
        if token in text:
            raise InputError(f"the text contains the reserved token {token}; remove it")


# What CoAT.save adds to the chat template of a model that thinks: the block for n_audio audio
# tokens and, so that no server forgets it, an error without. No template knows how long a clip is.
BLOCK_MARK = "{# the thinking block #}"    # where it begins, whatever code wrote it
BLOCK_TEMPLATE = BLOCK_MARK + f"""\
{{% if add_generation_prompt %}}{{% if n_audio is defined %}}\
{{% if n_audio %}}{THINK_START}{{{{ '{THINK}' * n_audio }}}}{THINK_END}{{% endif %}}{{% else %}}\
{{% for m in messages %}}{{% for c in ([m] if m.content is string else m.content) %}}\
{{% if c.type in ('audio', 'audio_url', 'input_audio') or c.content is string and \
('<|AUDIO|>' in c.content or '<sound>' in c.content) %}}\
{{{{ raise_exception('this model has to think first: give the chat template n_audio, the number of '
'audio tokens, 25 a second; README.md of the model shows how') }}}}\
{{% endif %}}{{% endfor %}}{{% endfor %}}{{% endif %}}{{% endif %}}"""


def render_prompt(coat, question, n_pieces):
    """The chat as the released template renders it, with `n_pieces` audio placeholders, up to the
    assistant header. Raises InputError, see check_text."""
    check_text(coat, question)
    content = [{"type": "text", "text": question}]
    if n_pieces:
        content.insert(0, {"type": "audio"})
    prompt = coat.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    return prompt.replace(coat.backbone.audio_token, coat.backbone.audio_token * n_pieces)


def window_seconds(coat):
    """How much audio the processor takes; longer clips go in pieces."""
    return coat.backbone.piece_seconds or coat.processor.feature_extractor.chunk_length


def encode_row(coat, wave, prompt, response=None, think=True):
    """One row of build_inputs -> its ids (list), how many of them at the end are targets (response,
    eos), n_audio, and what the processor made of the sound (dict, empty without)."""
    tokenizer = coat.processor.tokenizer
    n_audio = 0
    pieces = []
    if wave is not None:
        check_seconds(len(wave) / SAMPLE_RATE, "the clip")
        n_audio = n_audio_tokens(len(wave))
        cut = wave.split(round(window_seconds(coat) * SAMPLE_RATE))
        # A rest under 30 ms after a whole piece makes no token; the tower would see only padding.
        pieces = [piece.numpy() for piece in cut if n_audio_tokens(len(piece))]

    # What is about sound goes in audio_kwargs: flat keywords would reach the tokenizer too.
    out = coat.processor(
        text=render_prompt(coat, prompt, len(pieces)),
        audio=pieces or None,
        return_tensors="pt",
        audio_kwargs={"sampling_rate": SAMPLE_RATE, **coat.backbone.audio_kwargs})
    ids = out.pop("input_ids")[0].tolist()
    out.pop("attention_mask")
    found = ids.count(tokenizer.convert_tokens_to_ids(coat.backbone.audio_token))
    assert found == n_audio, f"the processor made {found} audio tokens where L_a is {n_audio}"
    if think:
        ids += think_block(n_audio, coat.think_ids)
    target = []
    if response is not None:
        target += tokenizer(response, add_special_tokens=False).input_ids
        target.append(tokenizer.convert_tokens_to_ids(coat.backbone.eos[0]))
    return ids + target, len(target), n_audio, dict(out) if pieces else {}


def pad_batch(coat, rows, padding_side="left"):
    """Results of encode_row -> what build_inputs returns, with labels."""
    tokenizer = coat.processor.tokenizer
    audio_id = tokenizer.convert_tokens_to_ids(coat.backbone.audio_token)
    T = max(len(ids) for ids, *_ in rows)
    input_ids = torch.full((len(rows), T), tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(rows), T, dtype=torch.long)
    labels = torch.full((len(rows), T), IGNORE)
    audio = {}
    for i, (ids, n_target, _, features) in enumerate(rows):
        start = T - len(ids) if padding_side == "left" else 0
        end = start + len(ids)
        input_ids[i, start:end] = torch.tensor(ids)
        attention_mask[i, start:end] = 1
        labels[i, end - n_target:end] = input_ids[i, end - n_target:end]
        for name, value in features.items():
            audio.setdefault(name, []).append(value)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
        "think_mask": input_ids == coat.think_ids[1],
        "audio_mask": input_ids == audio_id,
        "labels": labels,
        "n_audio": torch.tensor([n_audio for _, _, n_audio, _ in rows]),
        "audio": {name: torch.cat(values) for name, values in audio.items()},
    }


def build_inputs(coat, waves, prompts, responses=None, think=None, padding_side="left"):
    """A batch from rows; without `responses` it ends where generation starts.

    coat       anything with .backbone, .processor, .think_ids (CoAT, or its `.spec` in a worker)
    waves      list of (N,) float32 tensors at 16 kHz, or None for a row without audio and block
    think      whether prompts have the block; None: as the model was trained
    Returns a dict: input_ids, attention_mask, position_ids, think_mask, audio_mask and, with
    responses, labels, each (B, T); n_audio (B,); audio, what the processor made of the sound.
    Raises InputError on a clip out of range or a reserved token in a prompt."""
    think = coat.think if think is None else think
    rows = []
    for i, (wave, prompt) in enumerate(zip(waves, prompts, strict=True)):
        response = responses[i] if responses else None
        rows.append(encode_row(coat, wave, prompt, response, think))

    batch = pad_batch(coat, rows, padding_side)
    if responses is None:
        del batch["labels"]
    return batch


def pad_rows(flat, lengths):
    """(sum L, D) and (B,) -> (B, L, D), zero where a row has ended, and (B, L), false there.

    L is at least 1: where no row has audio, the heads still run, on one masked frame."""
    L = max(1, int(lengths.max()))
    valid = torch.arange(L, device=flat.device) < lengths.to(flat.device)[:, None]    # (B, L)
    zeros = flat.new_zeros(*valid.shape, flat.shape[-1])                              # (B, L, D)
    return zeros.masked_scatter(valid[..., None], flat), valid


# --------------------------------------------------------------------------------------------------
# The model

class Slots(StaticLayer):
    """Keys and values of one decoder layer, in memory that stays where it is. The prefill attends
    to its own alone: a square without a mask, for which attention has its fastest kernels."""

    def update(self, keys, values, *args, **kwargs):
        cached = super().update(keys, values)    # (B, heads, S, D / heads) each
        return cached if keys.shape[2] == 1 else (keys, values)

    def get_mask_sizes(self, query_length):
        return (self.max_cache_len if query_length == 1 else query_length), 0


class Output(NamedTuple):
    think_states: torch.Tensor    # (B, L, D) final-layer states at the thinking tokens, H_think;
                                  # of a model without the block at the audio tokens
    audio_embeds: torch.Tensor    # (B, L, D) what the LM consumed there, x_A; no gradient
    valid: torch.Tensor           # (B, L) which of these are real
    ce_sum: torch.Tensor          # () sum of the cross-entropy over the response tokens
    n_targets: int                # how many there are


class CoAT(nn.Module):
    """A backbone with the thinking tokens. `lm`: a transformers model or a PeftModel around it.

    think       whether its prompts have the block: it was, or is to be, trained with it"""

    def __init__(self, lm, processor, name, model_path, think_ids, think=True):
        super().__init__()
        self.lm = lm
        self.processor = processor
        self.name = name
        self.model_path = model_path
        self.think_ids = think_ids
        self.think = think
        self.backbone = BACKBONES[name]
        suppressed_ids = torch.tensor(think_ids, device=lm.device)
        self.register_buffer("suppressed_ids", suppressed_ids, persistent=False)

    @property
    def hf(self):
        """The transformers model: .model.audio_tower, .model.language_model, .lm_head"""
        return self.lm.get_base_model() if isinstance(self.lm, peft.PeftModel) else self.lm

    @property
    def spec(self):
        """What build_inputs needs, without the weights (for data workers)."""
        return SimpleNamespace(
            backbone=self.backbone, processor=self.processor, think_ids=self.think_ids,
            think=self.think)

    @property
    def eos_ids(self):
        """Ids of the tokens that stop generation."""
        return self.processor.tokenizer.convert_tokens_to_ids(list(self.backbone.eos))

    @property
    def new_projector(self):
        """The parameters of a projector that is trained, see compose; of other backbones none."""
        return [p for name, p in self.lm.named_parameters()
                if "modules_to_save" in name and p.requires_grad]

    @property
    def decoder_weights(self):
        """How many weights of the decoder layers a token meets, without the adapters."""
        layers = self.hf.model.language_model.layers
        return sum(p.numel() for name, p in layers.named_parameters() if "lora_" not in name)

    def checkpoint_activations(self):
        """Recomputes the decoder's activations in the backward pass."""
        decoder = self.hf.model.language_model
        decoder.activation_checkpointing_enable()
        decoder.train()    # only then; it changes nothing else, there is no dropout in it

    def compile_layers(self):
        """Compiles the decoder layers for training; they are alike, so one's code serves all."""
        for layer in self.hf.model.language_model.layers:
            layer.compile(dynamic=True)

    def audio_inputs(self, batch):
        """batch["audio"] in the dtype of the tower, which not every class casts to by itself."""
        dtype = self.hf.model.audio_tower.dtype
        inputs = {}
        for name, value in batch["audio"].items():
            inputs[name] = value.to(dtype) if value.is_floating_point() else value
        return inputs

    def states(self, batch, **kwargs):
        """Final states (after the last norm) and the embeddings that went in, both (B, T, D);
        kwargs go to the model."""
        embeds = []
        hook = self.hf.model.language_model.register_forward_pre_hook(
            lambda module, args, inputs: embeds.append(inputs["inputs_embeds"]), with_kwargs=True)
        try:
            out = self.hf.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                position_ids=batch["position_ids"],
                **self.audio_inputs(batch), **kwargs)
        finally:
            hook.remove()
        return out.last_hidden_state, embeds[0]

    def forward(self, batch):
        """-> Output. Logits, the larger half at 156,032 ids, are computed at the response alone."""
        h, embeds = self.states(batch, use_cache=False)    # (B, T, D) each
        at = batch["think_mask"] if self.think else batch["audio_mask"]    # the control
        think_states, valid = pad_rows(h[at], at.sum(1))
        audio_embeds, _ = pad_rows(embeds.detach()[batch["audio_mask"]], batch["n_audio"])
        labels = batch.get("labels", torch.full_like(batch["input_ids"], IGNORE))    # a prompt alone
        targets = labels[:, 1:]
        is_target = targets != IGNORE
        logits = self.hf.lm_head(h[:, :-1][is_target]).float()    # (n_targets, V)
        ce_sum = F.cross_entropy(logits, targets[is_target], reduction="sum")
        return Output(think_states, audio_embeds, valid, ce_sum, len(logits))

    def next_ids(self, h):
        """Final states (B, T, D) -> (B,) the likeliest next tokens, never the block's."""
        logits = self.hf.lm_head(h[:, -1]).float()    # (B, V)
        return logits.index_fill(1, self.suppressed_ids, -torch.inf).argmax(-1)

    def decode(self, token, visible, cache):
        """A step: tokens (B,) -> the next ones (B,). visible (B, S): which slots to attend to."""
        decoder = self.hf.model.language_model
        out = decoder(
            inputs_embeds=decoder.embed_tokens(token[:, None]),    # (B, 1, D)
            attention_mask=visible[:, None, None],                 # (B, 1, 1, S)
            position_ids=visible.sum(-1, keepdim=True) - 1,        # (B, 1)
            past_key_values=cache,
            use_cache=True)
        return self.next_ids(out.last_hidden_state)

    def compile_decode(self, **kwargs):
        """Fuses the small kernels of a step, once for all lengths, and on a GPU replays them as a
        CUDA graph. It takes a while, which many or long answers earn back. After merge()."""
        if self.suppressed_ids.is_cuda:
            kwargs = {"mode": "reduce-overhead"} | kwargs
        self.decode = torch.compile(self.decode, dynamic=True, fullgraph=True, **kwargs)

    @torch.inference_mode()
    def stream(self, batch, max_new_tokens=128, stop=True):
        """Greedy decoding: yields (B,) ids a step until every row has ended, padding for those that
        have: one prefill over prompt and block, then one step a token.

        The batch must be left padded. With stop=False all max_new_tokens are decoded whatever they
        are (for timing)."""
        B, T = batch["input_ids"].shape
        layers = [Slots(T + max_new_tokens) for _ in self.hf.model.language_model.layers]
        cache = transformers.Cache(layers)
        visible = F.pad(batch["attention_mask"].bool(), (0, max_new_tokens))    # (B, S)
        h, _ = self.states(batch, past_key_values=cache, use_cache=True)
        ids = self.next_ids(h)
        eos = torch.tensor(self.eos_ids, device=ids.device)
        done = torch.zeros(B, dtype=torch.bool, device=ids.device)
        for step in range(max_new_tokens):
            token = torch.where(done, self.processor.tokenizer.pad_token_id, ids)
            yield token
            done = done | torch.isin(token, eos)
            if step == max_new_tokens - 1 or stop and done.all():
                return
            if not stop:
                done = torch.zeros_like(done)
            visible[:, T + step] = True
            ids = self.decode(token, visible, cache).clone()

    def generate(self, batch, max_new_tokens=128):
        """Greedy answers, one string a row."""
        ids = torch.stack(list(self.stream(batch, max_new_tokens)), dim=1)    # (B, steps)
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def merge(self):
        """Folds the adapter into the weights: the same function, without its cost at each step."""
        self.eval()    # ends checkpoint_activations, which would drop the cache
        for layer in self.hf.model.language_model.layers:
            layer._compiled_call_impl = None    # ends compile_layers, which would compile anew
        if isinstance(self.lm, peft.PeftModel):
            dtype = self.hf.dtype
            for module in self.lm.modules():
                if isinstance(module, LoraLayer):    # peft would round the update before adding it
                    weight = module.base_layer.weight
                    weight.data = weight.data.float()
                    module.merge()
                    weight.data = weight.data.to(dtype)
            self.lm = self.lm.merge_and_unload().to(dtype)    # and the rows of the three tokens
        return self

    def save(self, folder):
        """Writes a plain PEFT adapter or, once merged, a plain transformers model, with the
        processor, and in coat.json which backbone they belong to and whether prompts have the
        block."""
        if isinstance(self.lm, peft.PeftModel):
            self.lm.save_pretrained(folder, save_embedding_layers=False)
        else:
            self.save_merged(folder)
        if self.name == "qwen2.5-omni":
            self.copy_image_settings(folder)
        template = self.processor.chat_template
        if self.think:
            self.processor.chat_template = template + BLOCK_TEMPLATE
        self.processor.save_pretrained(folder)
        self.processor.chat_template = template
        known = {"backbone": self.name, "model_path": self.model_path, "think": self.think}
        write_file(os.path.join(folder, "coat.json"), json.dumps(known))
        if self.think:
            self.write_card(folder)

    def write_card(self, folder):
        """README.md: how to use the folder without this code."""
        is_adapter = isinstance(self.lm, peft.PeftModel)
        found = origins(self.name, self.model_path)
        if is_adapter and len(found) != 1:    # only for a backbone that is one folder
            return
        card = os.path.join(ASSETS, "adapter_card.md" if is_adapter else "model_card.md")
        stock = next(kind for kind in type(self.hf).__mro__
                     if kind.__module__.startswith("transformers."))
        names = [origin["pretrained_model_name_or_path"] for origin in found]
        revision = found[0].get("revision") if found else None
        with open(card, encoding="utf-8") as file:
            text = string.Template(file.read()).substitute(
                name=self.name, licence=self.backbone.licence, model_class=stock.__name__,
                dtype=str(self.hf.dtype).removeprefix("torch."), origins=json.dumps(names),
                origin="".join(names[:1]), revision=f', revision="{revision}"' if revision else "",
                window=f"{window_seconds(self):.0f}")
        write_file(os.path.join(folder, "README.md"), text)

    def save_merged(self, folder):
        """The plain model, in whose settings transformers' generate finds what `stream` does."""
        self.lm.generation_config = transformers.GenerationConfig(
            do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            suppress_tokens=self.think_ids,
            eos_token_id=self.eos_ids)
        self.lm.save_pretrained(folder)

    def copy_image_settings(self, folder):
        """The full processor of Qwen2.5-Omni, which ours is a part of, wants them."""
        origin, = origins(self.name, self.model_path)
        settings = transformers.utils.cached_file(
            origin["pretrained_model_name_or_path"], "preprocessor_config.json",
            revision=origin.get("revision"), _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False)
        if settings:
            shutil.copy(settings, folder)


# --------------------------------------------------------------------------------------------------
# Loading

def saved_as(folder):
    """What CoAT.save wrote of a folder: {"backbone", "model_path", "think"}. Raises InputError."""
    return read_json(os.path.join(folder, "coat.json"))


def backbone_of(name):
    """The row of BACKBONES that a name given to load_coat stands for. Raises InputError."""
    return name if name in BACKBONES else saved_as(latest_checkpoint(name))["backbone"]


def load_coat(name="tiny", model_path=None, trainable=False, device="cpu", dtype=None,
              random=False):
    """A CoAT: a backbone with the three tokens and, if it was or is to be trained, LoRA.

    name        a run, a checkpoint, a merged folder, or a name of BACKBONES
    model_path  where that backbone's files are, see load_backbone; a run remembers it
    trainable   the adapters and the rows of the three tokens get gradients, in fp32
    Its prompts have the block if it was trained so, or is to be trained; a bare backbone has none.
    Raises InputError on an unknown name or files that cannot be read."""
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
    lm, processor = load_backbone(name, model_path, device, dtype, random)
    think_ids = add_think_tokens(lm, processor.tokenizer)
    if adapter:
        lm = load_adapter(lm, adapter, name, trainable)
    elif trainable:
        is_composed = len(origins(name, model_path)) == 2 and not random
        lm = add_adapters(lm, BACKBONES[name], think_ids, new_projector=is_composed)
    if trainable:
        for p in lm.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        for module in lm.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False    # autocast does; an fp32 copy would stay
    return CoAT(lm, processor, name, model_path, think_ids, think)


def load_backbone(name, model_path=None, device="cpu", dtype=None, random=False):
    """(model, processor) of a row of BACKBONES, frozen.

    model_path  a local folder, or a NAME@REVISION of the hub; of `small` also two, with a comma:
                Whisper's and a text model's. None: the table's
    dtype       bf16 on a GPU and fp32 on a CPU unless given
    random      random weights at full size, for time and memory
    Raises InputError if the name is unknown or the files are missing or not this backbone's."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone '{name}'; there are {', '.join(BACKBONES)}")
    backbone = BACKBONES[name]
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    found = origins(name, model_path)
    try:
        if random or not found:
            model, processor = build_random(name, device, dtype)
        elif len(found) == 2:
            model, processor = compose(backbone, *found)
        else:
            model, processor = read_backbone(backbone, found[0], device, dtype)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:    # what transformers makes of a strange file is of any kind
        # Its first sentence: what follows is advice about the hub.
        reason = " ".join(str(e).split()).split(". ")[0].rstrip(".")
        raise InputError(f"cannot load {name} from '{model_path or backbone.hub_id}': {reason} "
                         f"({type(e).__name__}); give a local folder with its files as "
                         "model_path") from e
    return model.to(device, dtype).eval().requires_grad_(False), processor


def origins(name, model_path=None):
    """[keywords of from_pretrained that say where files of a backbone are]: none for tiny, one, or
    two for `small`. Raises InputError."""
    found = []
    given = model_path or BACKBONES[name].hub_id
    for part in filter(None, given.split(",") if name == "small" else [given]):
        origin, _, revision = part.partition("@")
        if os.path.isdir(part):
            found.append({"pretrained_model_name_or_path": part})
        elif revision or not model_path:
            found.append({"pretrained_model_name_or_path": origin, "revision": revision or "main"})
        else:
            raise InputError(f"model_path '{part}': there is no folder of that name; give one, or "
                             "NAME@REVISION of the hub")
    return found


def read_backbone(backbone, origin, device, dtype):
    """(model, processor) from a folder or the hub. Raises ValueError where transformers passes over
    what is missing: it makes up a tokenizer, for one."""
    config, _ = transformers.PreTrainedConfig.get_config_dict(**origin)
    if config.get("model_type") not in backbone.model_types:
        raise ValueError(f"its config.json is that of '{config.get('model_type')}'")
    if config.get("quantization_config"):
        raise ValueError("its weights are quantised, so an adapter could not be merged into them")
    processor = backbone.processor_class.from_pretrained(**origin)
    if not processor.chat_template:
        raise ValueError("it has no chat template")
    processor.chat_template = processor.chat_template.partition(BLOCK_MARK)[0]
    model = read_weights(backbone.model_class, origin, dtype=dtype, device_map=device)
    audio_id = model.config.audio_token_id
    if processor.tokenizer.convert_tokens_to_ids(backbone.audio_token) != audio_id:
        raise ValueError("its tokenizer is missing, or not the one in which "
                         f"{backbone.audio_token} is {audio_id}")
    return model, processor


def read_weights(model_class, origin, **kwargs):
    """A model with all of its weights. Raises ValueError where transformers fills in noise."""
    model, report = model_class.from_pretrained(
        **origin, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    wrong = set(report["missing_keys"])
    wrong.update(key for key, *_ in report["mismatched_keys"])    # they are only in the report
    if wrong:
        raise ValueError(f"it has no weights for {len(wrong)} tensors, or of another shape, "
                         f"such as {min(wrong)}")
    return model


def compose(backbone, whisper, text_model):
    """(model, processor) of Qwen2-Audio's classes from Whisper's encoder and a text model, each the
    keywords of from_pretrained. The projector is random, the same every time, of a size at which
    audio embeddings are as large as those of text. Raises ValueError."""
    encoder = read_weights(transformers.WhisperModel, whisper, dtype=torch.float32).encoder
    lm = read_weights(transformers.AutoModelForCausalLM, text_model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**text_model)
    if not set(backbone.eos) <= set(tokenizer.get_vocab()):
        raise ValueError(f"its text model has no {' or '.join(backbone.eos)}, so it is not ChatML")
    tokenizer.pad_token = backbone.eos[1]
    marks = [backbone.audio_token, "<|audio_bos|>", "<|audio_eos|>"]
    audio_id, *_ = add_tokens(lm, tokenizer, marks)

    sizes = ("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads",
             "encoder_ffn_dim", "max_source_positions")
    config = transformers.Qwen2AudioConfig(
        text_config=lm.config.to_dict(), audio_token_index=audio_id,
        audio_config={name: getattr(encoder.config, name) for name in sizes})
    config.tie_word_embeddings = False    # the head becomes a copy
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = backbone.model_class(config)
        projector = model.model.multi_modal_projector.linear
        nn.init.normal_(projector.weight)
    model.model.audio_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(lm.model.state_dict())
    embeddings = lm.get_input_embeddings().weight
    model.lm_head.load_state_dict({"weight": lm.get_output_embeddings().weight})
    loudness = encoder.layer_norm.weight.norm()    # of a state of the tower, about
    projector.weight.data *= embeddings.pow(2).mean().sqrt() / loudness

    extractor = transformers.WhisperFeatureExtractor.from_pretrained(**whisper)
    template = TEMPLATE.replace("AUDIO_MARKS", backbone.audio_marks)
    return model, backbone.processor_class(extractor, tokenizer, chat_template=template)


# What the released templates render for text and one clip, for a processor without its files.
TEMPLATE = """<|im_start|>system
You are a helpful assistant.<|im_end|>
{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for c in m['content'] %}{% if c['type'] == 'audio' %}AUDIO_MARKS\
{% else %}{{ c['text'] }}{% endif %}{% endfor %}\
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_processor(backbone):
    """The backbone's own processor class around a byte-level tokenizer, offline."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", backbone.audio_token]
    named = {}
    if "<|audio_bos|>" in backbone.audio_marks:
        special += ["<|audio_bos|>", "<|audio_eos|>"]
        named = dict(zip(("audio_token", "audio_bos_token", "audio_eos_token"), special[3:]))
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()) + special)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], extra_special_tokens=special[1:],
        model_specific_special_tokens=named)
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=backbone.window_seconds, return_attention_mask=True)
    return backbone.processor_class(
        feature_extractor=extractor, tokenizer=tokenizer,
        chat_template=TEMPLATE.replace("AUDIO_MARKS", backbone.audio_marks))


def build_random(name, device="cpu", dtype=torch.float32, seed=0):
    """(model, processor) with weights drawn from `seed`; all but tiny at their full size."""
    backbone = BACKBONES[name]
    processor = build_processor(backbone)
    with open(os.path.join(ASSETS, "backbones.json")) as file:    # what differs from the class's own
        config = backbone.model_class.config_class(**json.load(file)[name])
    config.vision_start_token_id = None    # read by Omni's forward, in no class; no token has it
    config.audio_token_id = processor.tokenizer.convert_tokens_to_ids(backbone.audio_token)
    # 8 B weights had better be drawn where they live; tiny is the same on every device.
    drawn_on = "cpu" if name == "tiny" else device
    drawn_as = torch.float32 if name == "tiny" else dtype
    with torch.random.fork_rng(devices=[]), torch.device(drawn_on):
        torch.manual_seed(seed)
        model = backbone.model_class._from_config(config, dtype=drawn_as)
    return model.to(device, dtype), processor


def add_think_tokens(model, tokenizer):
    """Adds the three tokens -> their ids. A merged checkpoint knows them and keeps their rows."""
    return add_tokens(model, tokenizer, [THINK_START, THINK, THINK_END])


def add_tokens(model, tokenizer, tokens):
    """Adds tokens -> their ids. Rows of new ones start as the mean of the used rows, the same
    everywhere."""
    used = len(tokenizer)
    n_new = tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens],
        special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    # A table with spare rows never shrinks.
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    if n_new:
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            table = embedding.weight.data    # (V, D)
            mean = table[:min(used, min(ids))].mean(0, dtype=torch.float32)
            table[ids] = mean.to(table.dtype)
    return ids


def add_adapters(model, backbone, think_ids, new_projector=False):
    """The PeftModel with new LoRA on the language model and trainable rows of the three tokens; a
    new projector is trained and saved with them."""
    return peft.get_peft_model(model, peft.LoraConfig(
        r=backbone.lora_r, lora_alpha=backbone.lora_alpha, target_modules=LORA_TARGETS,
        trainable_token_indices={"embed_tokens": think_ids},
        modules_to_save=["multi_modal_projector"] if new_projector else None))


def load_adapter(lm, folder, name, trainable=False):
    """The PeftModel of a saved adapter. Raises InputError if it is damaged or another model's."""
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = not trainable
        lm = peft.PeftModel(lm, config)
        loaded = lm.load_adapter(folder, "default", is_trainable=trainable)
        if loaded.missing_keys:    # PeftModel.from_pretrained would only warn
            raise ValueError(f"it has no {loaded.missing_keys[0]}")
        if loaded.unexpected_keys:
            raise ValueError(f"its settings leave no place for {loaded.unexpected_keys[0]}")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:    # what peft makes of a strange file is of any kind
        reason = " ".join(str(e).split())[:300]
        raise InputError(f"the adapter in '{folder}' is damaged or not of {name}: {reason} "
                         f"({type(e).__name__}); give another checkpoint") from e
    return lm


# How names in a model began before transformers 5, and how they begin now.
BEFORE_5 = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "audio_tower.": "model.audio_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def name_since_5(key):
    """The name of a tensor in an old adapter's file -> its name in the model."""
    key = key.removeprefix("base_model.model.")
    for old, new in BEFORE_5.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def load_text_think(name, folder, model_path=None, device="cpu", dtype=None):
    """A backbone with its authors' adapter that reasons in text, merged: Audio Flamingo 3's, see
    table 2 and appendix D.

    folder  its `think` folder: a PEFT adapter and non_lora_trainables.bin
    Raises InputError if one of the files is missing or does not fit."""
    lm, processor = load_backbone(name, model_path, device, dtype)
    path = os.path.join(folder, "non_lora_trainables.bin")
    weights = {}
    for key, value in torch.load(path, map_location=device, weights_only=True).items():
        weights[name_since_5(key)] = value.to(lm.dtype)
    # load_state_dict would pass over the names of another layout in silence.
    unknown = lm.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise InputError(f"non_lora_trainables.bin in '{folder}' has {len(unknown)} tensors that "
                         f"{name} has not, such as {unknown[0]}; it belongs to another model")
    lm = load_adapter(lm, folder, name)
    think_ids = add_think_tokens(lm.get_base_model(), processor.tokenizer)
    return CoAT(lm, processor, name, model_path, think_ids, think=False).merge()


# --------------------------------------------------------------------------------------------------
# What the user gave: errors, flags, devices, folders of runs

class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do."""


class TooLong(InputError):
    """A clip above MAX_SECONDS, which the paper skips in training and in scoring (appendix B)."""


def check_seconds(seconds, what):
    """Raises InputError, or TooLong, unless a clip lasts MIN_SECONDS to MAX_SECONDS."""
    message = f"{what} lasts {seconds:.2f} s; give {MIN_SECONDS} to {MAX_SECONDS:.0f} s"
    if seconds > MAX_SECONDS:
        raise TooLong(f"{message}, or cut it with \"start\" and \"end\"")
    if not seconds >= MIN_SECONDS:    # so that NaN is refused too
        raise InputError(message)


def one_line_errors(*kinds, less_memory="a smaller batch"):
    """Lets a program end in one line, without a traceback, where the fault is the user's.

    kinds        exceptions beside InputError that say so
    less_memory  what to try when memory runs out"""
    def hook(kind, error, trace):
        reason = " ".join(str(error).split()) or kind.__name__
        if issubclass(kind, (torch.OutOfMemoryError, MemoryError)):
            reason = f"no memory left ({reason[:200]}); less is needed with {less_memory}"
        elif issubclass(kind, ImportError):
            reason += "; pip install -r requirements.txt"
        elif not issubclass(kind, (InputError, OSError, KeyboardInterrupt, *kinds)):
            return sys.__excepthook__(kind, error, trace)
        print(f"error: {reason}", file=sys.stderr)

    sys.excepthook = hook


def read_json(path):
    """The JSON object of a file. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise InputError(f"'{path}' is missing or damaged ({e}); give a folder that this code wrote, "
                         "or copy it again") from e


def write_file(path, text):
    """A text file, whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def in_range(kind, low, high):
    """A type for argparse: numbers from `low` to `high`."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:    # so that NaN is refused too
            raise argparse.ArgumentTypeError(f"'{text}' is not from {low} to {high}")
        return value
    return number


COUNT = in_range(int, 1, 2 ** 20)    # rows, tokens, clips: more is a slip of the keyboard
WORKERS = in_range(int, 0, 1024)


def usable_device(name=None, backbone="tiny"):
    """The torch.device called `name`; without a name the GPU or, for a light backbone, the CPU.

    Raises InputError if this machine cannot use it."""
    if name is None and not torch.cuda.is_available() and backbone not in LIGHT:
        raise InputError(f"torch {torch.__version__} finds no GPU for {backbone} (CUDA 13 needs "
                         "driver 580 or later); to go on without, in fp32, say cpu as device")
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not (device.index or 0) < torch.cuda.device_count():
            raise InputError(f"there is no {device}; torch {torch.__version__} finds "
                             f"{torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
        # With a mask and some lengths the backward pass of cuDNN's attention, which torch 2.11
        # prefers on Hopper and later, gives NaN (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def mixed_precision(device):
    """The autocast of a training step: bf16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def checkpoint_steps(run):
    """Steps of the whole checkpoint-STEP folders of a run, in order."""
    names = os.listdir(run) if os.path.isdir(run) else []
    matches = [re.fullmatch(r"checkpoint-(\d+)", name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def latest_checkpoint(run):
    """The newest checkpoint-STEP folder of a run, or `run` itself if CoAT.save wrote it.

    Raises InputError if there is none."""
    if os.path.isfile(os.path.join(run, "coat.json")):
        return run
    steps = checkpoint_steps(run)
    if not steps:
        raise InputError(f"'{run}' is no run, checkpoint or merged folder, nor one of the backbones "
                         f"{', '.join(BACKBONES)}")
    return os.path.join(run, f"checkpoint-{steps[-1]}")
