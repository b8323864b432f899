"""Projection heads and distillation losses (paper section 3.3). Tensors in, tensors out: this file can be copied alone.

    >>> from heads import ProjectionHead, expert_loss
    >>> head = ProjectionHead(d=4096, dim=768)                        # P_speech for Qwen2-Audio
    >>> z_hat = head(think_states, valid)                             # (B, L, 4096) -> (B, L, 768)
    >>> expert_loss("speech", z_hat, z, valid, scales)                # {"speech": sum over the real frames}

Every loss is given relative to the best constant answer (see `loss_scales`): 1.0 is an answer that ignores the audio, 0.0
is the teacher itself. That is also what "compensates for differences in output scale" (appendix A).
"""
import torch
import torch.nn.functional as F
from torch import nn

HEAD_DIM = 64           # of the attention in P_k; the paper gives none, this is the usual one
FOCAL_GAMMA = 2.0       # quality focal loss (Li et al. 2020, arXiv 2006.04388), their value
EPS = 1e-6              # keeps a constant teacher dimension, and log 0, finite


class ProjectionHead(nn.Module):
    """P_k of equation 3: one pre-norm transformer block over the thinking states, then a linear map to e_k.

    d       hidden size of the backbone;  dim: e_k, width of the expert's features
    kind    "transformer", or "linear" (the ablation of table 5: the linear map alone)
    width   puts a linear map d -> width in front, to save parameters; not in the paper"""

    def __init__(self, d, dim, kind="transformer", width=None):
        super().__init__()
        self.kind, width = kind, width or d
        self.reduce = nn.Linear(d, width) if width != d else nn.Identity()
        if kind == "transformer":
            self.n_heads = max(k for k in range(1, max(1, width // HEAD_DIM) + 1) if width % k == 0)
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        elif kind != "linear":
            raise ValueError(f"kind is 'transformer' or 'linear', not '{kind}'")
        self.out = nn.Linear(width, dim)

    def forward(self, h, valid):
        """h (B, L, D) thinking states, valid (B, L) bool -> (B, L, E); rows beyond a clip's end hold no meaning."""
        x = self.reduce(h)
        if self.kind == "transformer":
            B, L, W = x.shape
            # Attention runs both ways: the whole block is known before the response starts. A clip's padding is hidden;
            # a padded query sees itself, since a softmax over nothing is NaN.
            mask = valid[:, None, None, :] | torch.eye(L, dtype=torch.bool, device=h.device)          # (B, 1, L, L)
            q, k, v = self.qkv(self.norm1(x)).view(B, L, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, W/H)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.proj(a.transpose(1, 2).reshape(B, L, W))
            x = x + self.mlp(self.norm2(x))
        return self.out(x)


# ----------------------------------------------------------------------------------------------------------------------
# Losses. Each takes two (frames, dim) tensors and returns (frames,), the mean over dim, so that the caller can sum over
# the frames of a whole global batch and divide by their number once.

def mse(pred, target):
    return (pred.float() - target.float()).pow(2).mean(-1)


def bce(logits, q):
    """Binary cross-entropy against soft targets q in [0, 1], less the entropy of q: excess nats, 0 when p = q."""
    q = q.float()
    entropy = -(torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q))
    return (F.binary_cross_entropy_with_logits(logits.float(), q, reduction="none") - entropy).mean(-1)


def focal_bce(logits, q):
    """|q - p|^gamma * BCE(p, q): the focal loss where q is 0 or 1, and 0 when p = q."""
    logits, q = logits.float(), q.float()
    weight = (q - logits.sigmoid()).abs().pow(FOCAL_GAMMA)
    return (weight * F.binary_cross_entropy_with_logits(logits, q, reduction="none")).mean(-1)


# Task -> {term: (loss, compares readouts?)}. An expert that is not listed is representational: MSE on its features.
TASKS = {
    "recon": {"recon": (mse, False)},
    "speech": {"speech": (mse, False)},
    "sound": {"sound": (bce, True)},                                        # BCE(g_cls(z_hat), g_cls(z))
    "affect": {"affect": (mse, False)},
    "pitch": {"pitch": (mse, False), "pitch_aux": (focal_bce, True)},       # MSE + w_aux focal-BCE(h(z_hat), h(z))
}


def terms(task):
    """{term: (loss, compares readouts?)} of a task."""
    return TASKS.get(task, {task: (mse, False)})


def loss_scales(task, clips, readout=None):
    """{term: loss of the best constant answer} over a list of features (L, E), one a clip: for MSE the variance.

    readout  the expert's frozen output layer, to logits, for the terms that compare there"""
    scales = {}
    for term, (loss, on_readout) in terms(task).items():
        target = torch.cat([readout(z).sigmoid() if on_readout else z for z in clips]).float()
        mean = target.mean(0, keepdim=True)
        guess = torch.logit(mean, eps=EPS) if on_readout else mean
        scales[term] = max(loss(guess.expand_as(target), target).mean().item(), EPS)
    return scales


def expert_loss(task, z_hat, z, valid, scales, readout=None):
    """{term: () loss summed over the frames, each 1.0 on average for the best constant answer}.

    z_hat, z (B, L, E), valid (B, L) bool; gradients flow through the frozen readout into z_hat (section 3.3.2)."""
    losses = {}
    z_hat = z_hat * valid[..., None]    # beyond a clip's end h must see zeros, as it does at the end of a longest clip
    for term, (loss, on_readout) in terms(task).items():
        pred, target = (readout(z_hat), readout(z).sigmoid()) if on_readout else (z_hat, z)
        losses[term] = loss(pred[valid], target[valid]).sum() / scales[term]
    return losses
