"""The five frozen experts of CoAT in plain PyTorch, read from their official checkpoints.

    python experts.py --check    # fetches what is missing, loads it and times it
    python experts.py --check --expert-speech spidr_base.pt    # with a file of yours

    >>> import experts, torch, torchaudio
    >>> expert = experts.load("sound", random=True)    # else its weights are fetched once, 330 MB
    >>> rate = 16000    # Hz
    >>> wave = 0.1 * torch.randn(rate)    # (N,) float32 in [-1, 1]: 1 s of noise
    >>> wave = torchaudio.functional.resample(wave, rate, expert.sample_rate)
    >>> z = expert(wave)    # (F, E), expert.frame_rate a second
    >>> n = 25 * len(wave) // expert.sample_rate    # tokens, 25 a second
    >>> z = experts.resample_frames(z, n, expert.frame_rate, expert.offset)    # (n, E)

Resample first, as here: at another rate than its own an expert hears the clip faster or slower.

This file can be copied alone; `pitch` also needs assets/basic_pitch_icassp2022.npz (65 kB). A
further expert is one subclass of Expert and one row of EXPERTS. Constants of a network are those of
its authors' repository. Shapes: B batch, N samples, F frames, E expert dim, D hidden, H heads.
"""
import argparse
import math
import os
import re
import sys
import time
import warnings

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional as F

TOKEN_RATE = 25    # audio tokens, and thinking tokens, per second (paper, appendix A)
LOUDEST = 8.0      # sample: mp3 and resampling go a little beyond [-1, 1], int16 far


def resample_frames(z, n, frame_rate, offset):
    """Frames of an expert (F, E) -> (n, E) at 25 Hz. Row i is the mean of the frames centred in
    [i/25, (i+1)/25) s or, if there is none (slow experts, edges), the one nearest its middle.

    offset: centre of frame 0 in seconds. Sums run in float64, so a constant stays exactly that."""
    tokens = torch.arange(n, dtype=torch.float64, device=z.device)
    frames = torch.arange(len(z), dtype=torch.float64, device=z.device)

    middle = ((tokens + 0.5) / TOKEN_RATE - offset) * frame_rate  # of each token, in frames
    nearest = z[middle.round().long().clamp(0, len(z) - 1)]  # (n, E)

    centre = (frames / frame_rate + offset) * TOKEN_RATE  # of each frame, in tokens
    token = (centre + 1e-6).floor().long()  # 1e-6: despite rounding, a border is the next token's
    inside = (token >= 0) & (token < n)
    count = torch.bincount(token[inside], minlength=n)[:, None]  # (n, 1)
    total = z.new_zeros(n, z.shape[1], dtype=torch.float64)
    total = total.index_add(0, token[inside], z[inside].double())
    mean = (total / count.clamp(min=1)).to(z.dtype)
    return torch.where(count > 0, mean, nearest)


def unwrap(checkpoint):
    """{official name: tensor} of a checkpoint, however nested and prefixed."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            return unwrap(checkpoint[key])
    return {key.removeprefix("module."): torch.as_tensor(value) for key, value in checkpoint.items()
            if isinstance(value, (torch.Tensor, np.ndarray))}


class Expert(nn.Module):
    """A frozen expert. A subclass sets these and gives features(wave (N,)) -> (F, E)."""
    sample_rate = None      # Hz; None: it hears no wave
    frame_rate = None       # Hz
    offset = 0.0            # s: frame j is centred on offset + j / frame_rate
    dim = None              # E
    hop = None              # samples from frame to frame
    lead = 0                # samples: there are (N + lead) // hop frames, at least one
    min_samples = 1         # shorter waves are zero-padded
    standardise = False     # bring the clip to mean 0 and variance 1
    filename = None         # of the weights; None: it has none
    url = None              # None: the weights are in assets/
    sha256 = None           # None: no digest is published
    KEYS = ()               # (pattern, replacement)s that turn our names into the official ones
    readout = None          # or a method (.., E) -> logits through which gradients pass

    @classmethod
    def sizes(cls, sd):
        """The constructor's arguments that an official state dict tells."""
        return {}

    @torch.no_grad()
    def forward(self, wave):
        """z = E(a): wave (N,) float32 in [-1, 1] at sample_rate -> (F, E) float32, also under
        autocast. ValueError on another shape, type or range."""
        x = self.prepare(wave)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(x)[:self.frames(len(wave))]

    def frames(self, n):
        """The number of frames of n samples."""
        return max(1, (n + self.lead) // self.hop)

    def prepare(self, wave):
        """The wave (N,) checked, on the expert's device, standardised and padded."""
        is_wave = wave.ndim == 1 and wave.dtype == torch.float32 and len(wave) > 0
        if not is_wave or not wave.abs().max() <= LOUDEST:
            raise ValueError(f"{type(self).__name__} takes a wave (N,) of float32 in [-1, 1] at "
                             f"{self.sample_rate} Hz; this is {wave.dtype} {tuple(wave.shape)}")
        wave = wave.to(next(self.parameters(), wave).device)  # some have no parameters
        if self.standardise:
            wave = F.layer_norm(wave, wave.shape)
        return F.pad(wave, (0, max(0, self.min_samples - len(wave))))

    def freeze(self):
        return self.eval().requires_grad_(False)

    def official(self, name):
        """Our name of a parameter -> the official one."""
        for pattern, replacement in self.KEYS:
            name = re.sub(pattern, replacement, name)
        return name

    @classmethod
    def from_state_dict(cls, sd):
        """The frozen expert from an official checkpoint. Extra keys are ignored; those that are
        missing or misshapen are named in one ValueError."""
        sd = unwrap(sd)
        with torch.device("meta"):  # no memory, no initialisation
            module = cls(**cls.sizes(sd))
        ours = module.state_dict()
        names = {key: module.official(key) for key in ours if "num_batches_tracked" not in key}
        wrong = [name for key, name in names.items()
                 if name not in sd or sd[name].shape != ours[key].shape]
        if wrong:
            raise ValueError(f"{cls.__name__}: {len(wrong)} of {len(names)} tensors are missing or "
                             f"of another shape: {', '.join(wrong[:3])}")
        module.load_state_dict({key: sd[name].float() for key, name in names.items()}, assign=True)
        return module.freeze()


class Recon(Expert):
    """The backbone's own audio latents, what its language model consumes (section 3.3.1). The
    backbone's forward pass gives them, so there is no network here.

    dim     E, width of the backbone"""
    frame_rate = TOKEN_RATE

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, audio_embeds):
        """(.., E) -> the same."""
        return audio_embeds


class Block(nn.Module):
    """A transformer block whose norms come after the residuals."""

    def __init__(self, dim, qkv_bias):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x, attention, index):
        """x (F, D) -> the same; attention(qkv, index) is that of the encoder."""
        x = self.norm1(x + self.out(attention(self.qkv(x), index)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(Expert):
    """As wav2vec 2: convolutions on the wave, convolutional positions, post-norm blocks.

    prenet: how many of the blocks are called the context encoder's; depth: the other blocks.
    pos: count, kernel and groups of the positional convolutions.
    tokens: learned vectors put in front of the frames.
    scales: rows of learned ALiBi scales; 0 no ALiBi, 1 shared by all blocks, else one a block."""
    sample_rate = 16000     # Hz
    frame_rate = 50.0       # Hz
    offset = 200 / 16000    # s, the middle of the 400 samples that frame 0 sees
    hop = 320               # samples
    lead = -80              # samples, hop - min_samples
    min_samples = 400
    standardise = True
    # channels in and out, kernel, stride: those of wav2vec 2
    CONVS = ((1, 512, 10, 5), *4 * [(512, 512, 3, 2)], *2 * [(512, 512, 2, 2)])
    BIAS_FLOATS = (2 ** 22, 2 ** 27)    # of ALiBi at a time: a CPU's cache; 512 MiB of a GPU

    def __init__(self, dim=768, prenet=0, depth=12, pos=(5, 19, 16), qkv_bias=False, tokens=0,
                 scales=0):
        super().__init__()
        self.dim = dim
        self.heads = dim // 64
        self.extra = tokens
        self.scales = scales
        self.convs = nn.ModuleList(nn.Conv1d(*conv, bias=False) for conv in self.CONVS)
        self.conv_norms = nn.ModuleList(nn.LayerNorm(512) for _ in self.CONVS)
        self.proj_norm = nn.LayerNorm(512)
        self.proj = nn.Linear(512, dim)
        self.norm = nn.LayerNorm(dim)
        count, kernel, groups = pos
        self.pos = nn.ModuleList(nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)
                                 for _ in range(count))
        self.context = nn.ModuleList(Block(dim, qkv_bias) for _ in range(prenet))
        self.blocks = nn.ModuleList(Block(dim, qkv_bias) for _ in range(depth))
        if tokens:
            self.tokens = nn.Parameter(torch.zeros(1, tokens, dim))
        if scales:
            self.alibi_scale = nn.Parameter(torch.ones(scales, 1, self.heads, 1, 1))

    def local(self, wave):
        """(N,) -> (F, 512), a span of frames at a time: frame j sees samples 320 j .. 320 j + 399
        only, and activations that stay in a CPU's cache are 1.6 times as fast."""
        total = self.frames(len(wave))
        span = 64 if wave.device.type == "cpu" else 1500    # frames
        parts = []
        for start in range(0, total, span):
            stop = self.hop * min(start + span, total) - self.lead
            x = wave[None, None, self.hop * start:stop]  # (1, 1, N)
            for conv, norm in zip(self.convs, self.conv_norms):
                x = F.gelu(norm(conv(x).transpose(1, 2))).transpose(1, 2)  # (1, 512, ..)
            parts.append(x[0].T)
        return torch.cat(parts)

    def alibi(self, index, start, step, total):
        """(1, H, step, F): -|i - j| slope_h max(scale_h, 0) for `step` queries from `start` on and
        all keys; 0 for the tokens in front."""
        # Slopes: a geometric series over a power of two, topped up from one twice as dense.
        power = 2 ** int(math.log2(self.heads))
        slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
        slopes += [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
        scale = self.alibi_scale[min(index, self.scales - 1), 0].clamp(min=0)  # (H, 1, 1)
        slopes = scale.new_tensor(slopes[:self.heads])[:, None, None] * scale
        key = torch.arange(total, dtype=torch.float32, device=slopes.device)
        query = key[start:start + step, None]
        in_front = (query < self.extra) | (key < self.extra)
        distance = (query - key).abs_().masked_fill_(in_front, 0)  # (step, F)
        return (distance * -slopes)[None]

    def attention(self, qkv, index):
        """(F, 3 D) -> (F, D), with ALiBi for as many queries at a time as BIAS_FLOATS allow."""
        total = len(qkv)
        q, k, v = qkv.view(total, 3, 1, self.heads, -1).permute(1, 2, 3, 0, 4)  # (1, H, F, D/H)
        if not self.scales:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(total, -1)
        step = max(1, self.BIAS_FLOATS[int(qkv.is_cuda)] // (self.heads * total))
        parts = []
        for start in range(0, total, step):
            bias = self.alibi(index, start, step, total)
            queries = q[:, :, start:start + step]
            parts.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=bias))
        return torch.cat(parts, 2).transpose(1, 2).reshape(total, -1)

    def features(self, wave):
        x = self.proj(self.proj_norm(self.local(wave)))  # (F, D)
        position = x
        for conv in self.pos:
            position = conv(position.T)[:, :len(x)].T  # an even kernel gives a frame too many
            position = F.gelu(F.layer_norm(position, (self.dim,)))
        x = x + position
        if self.extra:
            x = torch.cat([self.tokens[0], x])
        x = self.norm(x)
        for index, block in enumerate([*self.context, *self.blocks]):
            x = block(x, self.attention, index)
        return x[self.extra:]


class SpeechUnits(Encoder):
    """SpidR (Poli et al. 2025; CC BY-NC 4.0: not for commercial use), the encoder's output.
    https://github.com/facebookresearch/spidr"""
    filename = "spidr_base.pt"
    url = "https://dl.fbaipublicfiles.com/shared/devai/assets/models/spidr_base.pt"
    KEYS = (
        (r"^convs\.(\d+)", r"feature_extractor.conv_layers.\1.conv"),
        (r"^conv_norms\.(\d+)", r"feature_extractor.conv_layers.\1.layer_norm"),
        (r"^proj_norm", "feature_projection.layer_norm"),
        (r"^proj\.", "feature_projection.projection."),
        (r"^pos", "student.pos_conv_embed.convs"),
        (r"^norm", "student.layer_norm"),
        (r"^blocks", "student.layers"),
        (r"\.qkv", ".attention.qkv"),
        (r"\.out", ".attention.proj"),
        (r"\.norm1", ".layer_norm"),
        (r"\.up", ".feed_forward.intermediate_dense"),
        (r"\.down", ".feed_forward.output_dense"),
        (r"\.norm2", ".final_layer_norm"),
    )


class Affect(Encoder):
    """emotion2vec (Ma et al. 2024; FunASR Model License 1.1): base (768), plus_base, plus_large
    (1024) and others by the shapes in their files. https://github.com/ddlBoJack/emotion2vec"""
    filename = "emotion2vec_base.pt"
    url = "https://huggingface.co/emotion2vec/emotion2vec_base/resolve/main/emotion2vec_base.pt"
    EMOTIONS = ("angry", "disgusted", "fearful", "happy", "neutral", "other", "sad", "surprised",
                "unknown")      # what the plus models were trained to tell apart
    AUDIO = "modality_encoders.AUDIO."
    POSITION = AUDIO + "relative_positional_encoder."
    KEYS = (
        (r"^convs\.(\d+)", AUDIO + r"local_encoder.conv_layers.\1.0"),
        (r"^conv_norms\.(\d+)", AUDIO + r"local_encoder.conv_layers.\1.2.1"),
        (r"^proj_norm", AUDIO + "project_features.1"),
        (r"^proj\.", AUDIO + "project_features.2."),
        (r"^pos\.(\d+)", lambda match: f"{Affect.POSITION}{int(match[1]) + 1}.0"),
        (r"^norm", AUDIO + "context_encoder.norm"),
        (r"^context\.", AUDIO + "context_encoder.blocks."),
        (r"^tokens", AUDIO + "extra_tokens"),
        (r"^alibi", AUDIO + "alibi"),
        (r"\.qkv", ".attn.qkv"),
        (r"\.out", ".attn.proj"),
        (r"\.up", ".mlp.fc1"),
        (r"\.down", ".mlp.fc2"),
        (r"^emotion\.", "proj."),
    )

    def __init__(self, prenet=4, depth=8, tokens=10, scales=1, emotions=0, **sizes):
        super().__init__(prenet=prenet, depth=depth, qkv_bias=True, tokens=tokens, scales=scales,
                         **sizes)
        if emotions:
            self.emotion = nn.Linear(self.dim, emotions)

    @classmethod
    def sizes(cls, sd):
        def count(prefix):
            return len({key[len(prefix):].split(".")[0] for key in sd if key.startswith(prefix)})

        key = cls.AUDIO + "alibi_scale"  # in older files without the first dimension, the blocks'
        scale = sd[key] = sd[key].reshape(-1, 1, *sd[key].shape[-3:])
        conv = sd[cls.POSITION + "1.0.weight"].shape
        return {
            "dim": conv[0],
            "prenet": count(cls.AUDIO + "context_encoder.blocks."),
            "depth": count("blocks."),
            "tokens": sd[cls.AUDIO + "extra_tokens"].shape[1],
            "scales": len(scale),
            "pos": (count(cls.POSITION), conv[2], conv[0] // conv[1]),
            "emotions": len(sd.get("proj.weight", ())),
        }

    @property
    def readout(self):
        """The emotion head (.., E) -> (.., 9) LOGITS of the plus models, whose softmax gives
        EMOTIONS; None where the file has none, as that of base."""
        return self._modules.get("emotion")


def panns_name(match):
    """convs.3 -> conv_block2.conv2, norms.3 -> conv_block2.bn2"""
    block, place = divmod(int(match[2]), 2)
    kind = "conv" if match[1] == "conv" else "bn"
    return f"conv_block{block + 1}.{kind}{place + 1}"


class SoundEvents(Expert):
    """PANNs Cnn14_DecisionLevelMax (Kong et al. 2020; CC BY 4.0), trained segment by segment. A
    Cnn14 file has the same keys. https://github.com/qiuqiangkong/audioset_tagging_cnn"""
    sample_rate = 32000     # Hz
    frame_rate = 3.125      # Hz
    offset = 0.16           # s
    dim = 2048
    hop = 10240             # samples: 32 STEPs
    lead = 320              # samples
    min_samples = 9920      # 31 STEPs, which give the 32 spectra of one segment
    filename = "Cnn14_DecisionLevelMax_mAP=0.385.pth"
    url = "https://zenodo.org/record/3987831/files/Cnn14_DecisionLevelMax_mAP%3D0.385.pth"
    sha256 = "dd3b4043a87d4ec13df8082c0fcfee3fb5084151808e47e060987a95eabdd142"
    N_FFT = 1024            # samples
    STEP = 320              # samples from spectrum to spectrum
    MELS = 64
    F_MIN = 50.0            # Hz
    F_MAX = 14000.0         # Hz
    WIDTHS = (1, 64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024, 2048, 2048)    # channels
    KEYS = ((r"^(conv|norm)s\.(\d+)", panns_name),)

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(self.MELS)
        self.convs = nn.ModuleList(nn.Conv2d(width, out, 3, padding=1, bias=False)
                                   for width, out in zip(self.WIDTHS, self.WIDTHS[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for out in self.WIDTHS[1:])
        self.fc1 = nn.Linear(2048, 2048)
        self.fc_audioset = nn.Linear(2048, 527)
        self.register_buffer("mel", torch.from_numpy(self.mel_filters()).float(), persistent=False)
        window = torch.hann_window(self.N_FFT, device="cpu")  # from_state_dict builds on meta
        self.register_buffer("window", window, persistent=False)

    def mel_filters(self):
        """(513, 64): triangles of unit area on Slaney's mel scale (linear to 1000 Hz = 15 mel,
        then 27 mel per 6.4-fold)."""
        low = self.F_MIN * 3 / 200  # on the linear part
        high = 15 + 27 * math.log(self.F_MAX / 1000) / math.log(6.4)
        mel = np.linspace(low, high, self.MELS + 2)
        edge = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))  # Hz
        hz = np.linspace(0, self.sample_rate / 2, self.N_FFT // 2 + 1)[:, None]
        rise = (hz - edge[:-2]) / np.diff(edge)[:-1]
        fall = (edge[2:] - hz) / np.diff(edge)[1:]
        return np.minimum(rise, fall).clip(0) * 2 / (edge[2:] - edge[:-2])

    def freeze(self):
        """Also folds the batch normalisations into the convolutions: the same function in fewer
        passes over memory."""
        self.eval()
        if self.norms:  # not folded yet
            folded = [nn.utils.fuse_conv_bn_eval(conv, norm)
                      for conv, norm in zip(self.convs, self.norms)]
            self.convs = nn.ModuleList(folded).to(memory_format=torch.channels_last)
            self.norms = nn.ModuleList()
        return super().freeze()

    def logmel(self, wave):
        """(N,) -> (1 + N // 320, 64) in dB re 1, floor -100 dB."""
        spectrum = torch.stft(wave, self.N_FFT, self.STEP, window=self.window,
                              pad_mode="reflect", return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1).T  # (1 + N // 320, 513)
        return 10 * (power @ self.mel).clamp(min=1e-10).log10()

    def features(self, wave):
        x = self.bn0(self.logmel(wave).T[None, :, :, None])  # (1, 64, 1 + N // 320, 1)
        x = x.permute(0, 3, 2, 1)
        for i, conv in enumerate(self.convs):
            x = F.relu_(conv(x))
            if i in (1, 3, 5, 7, 9):  # the end of every block but the last
                x = F.avg_pool2d(x, 2)
        x = x.mean(3)  # (1, 2048, F)
        x = F.max_pool1d(x, 3, 1, 1) + F.avg_pool1d(x, 3, 1, 1)
        return F.relu_(self.fc1(x[0].T))

    def readout(self, z):
        """(.., 2048) -> (.., 527) AudioSet class LOGITS (the sigmoid gives probabilities)."""
        return self.fc_audioset(z)  # g_cls


class Pitch(Expert):
    """basic-pitch 0.4.0 (Bittner et al. 2022; Apache-2.0) on a clip of any length in one pass:
    constant-Q spectrum, harmonic stack, 3x39 convolution = the feature (8 channels x 264 thirds of
    a semitone, channel-major), 5x5 convolution = readout. The authors' 2 s windows differ only in
    the reach of the level normalisation and at their edges. https://github.com/spotify/basic-pitch
    """
    sample_rate = 22050         # Hz
    frame_rate = 22050 / 256    # Hz
    dim = 8 * 264
    hop = 256                   # samples
    lead = 256                  # samples
    min_samples = 129 * 256     # the lowest octave's reflection needs 129 frames
    filename = "basic_pitch_icassp2022.npz"
    TAPS = 256                  # samples, of the kernels and of the low-pass
    OCTAVES = 9
    PER_OCTAVE = 36             # bins
    BINS = 309
    F_MIN = 27.5                # Hz, A0
    # of the harmonics h = 0.5, 1, 2 .. 7: 36 log2(h) bins
    SHIFTS = (-36, 0, 36, 57, 72, 84, 93, 101)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))   # scale and shift: the input's batch norm
        self.shift = nn.Parameter(torch.zeros(()))
        self.contour1 = nn.Conv2d(8, 8, (3, 39), padding=(1, 19))
        self.contour2 = nn.Conv2d(8, 1, 5, padding=2)
        self.note1 = nn.Conv2d(1, 32, 7, (1, 3), (3, 2))
        self.note2 = nn.Conv2d(32, 1, (7, 3), padding=(3, 1))
        hz = self.F_MIN * 2 ** (np.arange(self.BINS) / self.PER_OCTAVE)
        lengths = np.ceil(self.sample_rate / hz / (2 ** (1 / self.PER_OCTAVE) - 1))
        constants = {
            "kernels": self.top_octave(hz[-self.PER_OCTAVE:], lengths[-self.PER_OCTAVE:]),
            "halve": self.half_band(),
            "lengths": lengths,  # (309,) of the bins' windows, samples
        }
        for name, value in constants.items():
            self.register_buffer(name, torch.from_numpy(value).float(), persistent=False)

    def top_octave(self, hz, lengths):
        """(256, 72): 36 windowed complex exponentials, real parts, then imaginary ones."""
        kernels = np.zeros((self.PER_OCTAVE, self.TAPS), complex)
        for row, f, length in zip(kernels, hz, lengths.astype(int)):
            t = np.arange(length)
            phase = 2j * np.pi * f / self.sample_rate * (t - (length + 1) // 2)
            wave = (1 - np.cos(2 * np.pi * t / length)) * np.exp(phase)
            start = math.ceil((self.TAPS - length) / 2) - length % 2
            row[start:start + length] = wave / np.abs(wave).sum()
        return np.concatenate([kernels.real, kernels.imag]).T

    def half_band(self):
        """(382, 64): low-pass (scipy's firwin2) and decimation of 128 samples to 64."""
        x = np.linspace(0, 1, self.TAPS + 1)  # 0 Hz .. Nyquist
        gain = np.interp(x, [0, 0.5 / 1.001, 0.5 * 1.001, 1], [1, 1, 0, 0])
        response = gain * np.exp(-0.5j * (self.TAPS - 1) * np.pi * x)
        taps = np.fft.irfft(response)[:self.TAPS] * np.hamming(self.TAPS)
        halve = np.zeros((64, 2 * 64 + self.TAPS - 2))
        for i, row in enumerate(halve):
            row[2 * i:2 * i + self.TAPS] = taps
        return halve.T

    def cqt_power(self, wave):
        """(N,) -> (F, 309) squared magnitude. Every octave reuses the top one's kernels on a
        wave decimated once more."""
        octaves = []
        for octave in range(self.OCTAVES):
            padded = F.pad(wave[None], (128, 128), mode="reflect")[0]
            frames = padded.unfold(0, self.TAPS, self.hop >> octave)  # (F, 256)
            power = (frames @ self.kernels).square()  # (F, 72)
            octaves.insert(0, power[:, :self.PER_OCTAVE] + power[:, self.PER_OCTAVE:])
            # 128 samples at a time: conv1d would take 100 times as long on a CPU
            spans = F.pad(wave, (127, 127 + 128)).unfold(0, 382, 128)
            wave = (spans @ self.halve).flatten()[:len(wave) // 2]
        return torch.cat(octaves, 1)[:, -self.BINS:] * self.lengths

    def stack(self, wave):
        """(N,) -> (1, 8, F, 264) channels last: log spectrum brought to 0..1 over the clip;
        channel h is harmonic h."""
        x = 10 * (self.cqt_power(wave) + 1e-10).log10()  # (F, 309) dB
        x = x - x.min()
        x = x / x.max().clamp(min=1e-30) * self.scale + self.shift  # silence: 0, then the shift
        low, high = self.SHIFTS[0], self.SHIFTS[-1]
        x = F.pad(x, (-low, high))
        harmonics = [x[:, shift - low:][:, :264] for shift in self.SHIFTS]
        return torch.stack(harmonics, 2)[None].permute(0, 3, 1, 2)

    def features(self, wave):
        x = F.relu_(self.contour1(self.stack(wave)))  # (1, 8, F, 264)
        return x[0].transpose(0, 1).flatten(1)

    def readout(self, z):
        """(.., F, 2112) -> (.., F, 264) pitch contour LOGITS: the sigmoid gives the
        posteriorgram, bin k at about 27.5 * 2 ** ((k - 1) / 36) Hz. The kernel spans 5 of the
        frames it is given."""
        x = z.reshape(-1, z.shape[-2], 8, 264).transpose(1, 2)  # (B, 8, F, 264)
        return self.contour2(x).reshape(*z.shape[:-1], 264)  # h

    @torch.no_grad()
    def notes(self, wave):
        """(N,) -> (F, 88) posteriorgram of notes, in semitones from A0."""
        contour = self.readout(self.features(self.prepare(wave))).sigmoid()  # (F, 264)
        note = self.note2(F.relu_(self.note1(contour[None, None]))).sigmoid()  # (1, 1, F, 88)
        return note[0, 0, :self.frames(len(wave))]


EXPERTS = {"recon": Recon, "speech": SpeechUnits, "sound": SoundEvents, "affect": Affect,
           "pitch": Pitch}


def path_of(cls):
    """Where a network's weights are: in assets/ if they ship, else where torch.hub keeps its files
    (TORCH_HOME)."""
    if cls.url:
        return os.path.join(torch.hub.get_dir(), "checkpoints", cls.filename)
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", cls.filename)


def fetch(url, path, sha256):
    """Downloads a file that is not there. The other ranks wait for the first."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with FileLock(path + ".lock"):
        if not os.path.exists(path):
            print(f"fetching {url} to {path}", file=sys.stderr, flush=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256)


def random_weights(cls):
    """The frozen expert with seeded random weights; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = cls()
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # torch's own fades out over 12 layers
    return module.freeze()


def load(name, path=None, device="cpu", random=False):
    """The frozen expert `name` from the file `path` or the official one (fetched once).

    random: seeded random weights in the real architecture, except for what ships in assets/.
    RuntimeError, one line, if it cannot be had."""
    cls = EXPERTS[name]
    is_random = random and cls.url is not None
    if is_random:
        warnings.warn(f"!!! {name}: RANDOM WEIGHTS, for tests and timing only: its output means "
                      "nothing !!!", stacklevel=2)
    if is_random or cls.filename is None:
        return random_weights(cls).to(device)
    file = str(path or path_of(cls))
    try:
        if not path and cls.url and not os.path.exists(file):
            fetch(cls.url, file, cls.sha256)
        if file.endswith(".npz"):
            sd = dict(np.load(file))
        else:
            sd = torch.load(file, map_location="cpu", weights_only=True)
        expert = cls.from_state_dict(sd)
        if not expert(torch.ones(1)).isfinite().all():
            raise ValueError("it gives NaN or infinity")
    except Exception as e:  # a damaged file fails in as many ways as it has bytes
        # The first sentence. What follows in torch's is advice to trust the file.
        reason = re.split(r"\. (?=[A-Z])", " ".join(str(e).split()))[0][:300]
        raise RuntimeError(
            f"{name}: cannot load {file} ({type(e).__name__}: {reason}). Delete a damaged file. "
            f"Put {cls.filename} of {cls.url or 'the repository of experts.py'} there, or pass "
            f"--expert-{name} PATH") from e
    return expert.to(device)


def load_experts(tasks, d, device="cpu", random=False, paths={}):
    """{task: its frozen expert}. RuntimeError as from `load`.

    d       width of the backbone, which is e_k of recon
    paths   {task: a file to use instead of the official one}"""
    experts = {}
    for task in tasks:
        is_recon = EXPERTS[task] is Recon
        experts[task] = Recon(d) if is_recon else load(task, paths.get(task), device, random)
    return experts


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", required=True, help="fetch, load and time")
    networks = [name for name, cls in EXPERTS.items() if cls.filename]
    for name in networks:
        parser.add_argument(f"--expert-{name}", metavar="PATH", help="instead of the official file")
    args = vars(parser.parse_args())
    failed = 0
    for name in networks:
        try:
            expert = load(name, args[f"expert_{name}"])
        except RuntimeError as e:
            print(f"error: {e}")
            failed += 1
            continue
        wave = 0.1 * torch.randn(10 * expert.sample_rate)
        expert(wave)  # warms up
        begin = time.perf_counter()
        expert(wave)
        seconds = time.perf_counter() - begin
        print(f"{name:8}{expert.dim:5} x {expert.frame_rate:6.3f} Hz, {seconds:.2f} s for 10 s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
