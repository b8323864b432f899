"""A small real backbone, for evidence and not for use: Whisper's encoder and a text model that
knows ChatML, in Qwen2-Audio's classes, with a projector that is still to be trained.

    python docs/compose.py openai/whisper-tiny@main HuggingFaceTB/SmolLM2-135M-Instruct@main small
    python train.py --backbone qwen2-audio --model-path small --train-projector --device cpu

Each of the two is a local folder or NAME@REVISION of the hub. The result is a plain Qwen2-Audio
folder.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from model import (BACKBONES, TEMPLATE, InputError, add_tokens, one_line_errors, origin, reading,
                   read_weights)

import torch
import transformers

AUDIO_SIZES = ("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads",
               "encoder_ffn_dim", "max_source_positions")


def compose(whisper, text_model, folder):
    """Writes the folder. Its projector is random, the same every time, of a size at which audio
    embeddings are as large as those of text. Raises InputError if one of the two is something
    else, or if the folder is there already."""
    if os.path.exists(folder):
        raise InputError(f"'{folder}' is there already; give a new folder")
    backbone = BACKBONES["qwen2-audio"]
    with reading(f"'{whisper}' as a Whisper"):
        place, revision = origin("qwen2-audio", whisper)
        encoder = read_weights(transformers.WhisperModel, place, revision=revision,
                               dtype=torch.float32).encoder
        extractor = transformers.WhisperFeatureExtractor.from_pretrained(place, revision=revision)
    with reading(f"'{text_model}' as a text model"):
        place, revision = origin("qwen2-audio", text_model)
        lm = read_weights(transformers.AutoModelForCausalLM, place, revision=revision,
                          dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision)
        if not set(backbone.eos) <= set(tokenizer.get_vocab()):
            raise ValueError(f"it has no {' or '.join(backbone.eos)}, so it is not ChatML")
    tokenizer.pad_token = backbone.eos[1]
    audio_id, *_ = add_tokens(lm, tokenizer, ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])

    config = transformers.Qwen2AudioConfig(
        text_config=lm.config.to_dict(), audio_token_index=audio_id,
        audio_config={name: getattr(encoder.config, name) for name in AUDIO_SIZES})
    config.tie_word_embeddings = False    # the head becomes a copy
    config.licence = "other (those of its two parts)"    # for the cards of what is trained from it
    torch.manual_seed(0)
    model = backbone.model_class(config)
    projector = model.model.multi_modal_projector.linear
    torch.nn.init.normal_(projector.weight)
    model.model.audio_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(lm.model.state_dict())
    model.lm_head.load_state_dict({"weight": lm.get_output_embeddings().weight})
    loudness = encoder.layer_norm.weight.norm()    # of a state of the tower, about
    projector.weight.data *= lm.get_input_embeddings().weight.pow(2).mean().sqrt() / loudness

    model.save_pretrained(folder)
    template = TEMPLATE.replace("AUDIO_MARKS", backbone.audio_marks)
    backbone.processor_class(extractor, tokenizer, chat_template=template).save_pretrained(folder)


if __name__ == "__main__":
    one_line_errors()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for place in ("whisper", "text_model", "folder"):
        parser.add_argument(place)
    args = parser.parse_args()
    compose(args.whisper, args.text_model, args.folder)
