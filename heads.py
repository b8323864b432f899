"""Projection heads P_k and distillation losses L_k (paper, section 3.3). Can be copied alone.

    >>> import torch, heads
    >>> expert_heads = heads.ExpertHeads(d=64, dims={"recon": 64, "speech": 768})
    >>> z = torch.randn(2, 50, 768)    # z_k (B, L, E) of two clips of 2 s
    >>> expert_heads.calibrate("speech", [z[0], z[1]])    # gives its loss a scale
    >>> think_states = torch.randn(2, 50, 64)    # H_think (B, L, D)
    >>> valid = torch.ones(2, 50, dtype=torch.bool)    # which frames are real
    >>> losses = expert_heads(think_states, valid, {"speech": z})    # {term: sum over real frames}
    >>> losses["speech"] / valid.sum()    # 1.0

Losses are sums over frames, so that a batch can be cut anywhere. Divided by the number of frames, a
calibrated loss is relative to the best constant answer: 1.0 is that answer, 0.0 the expert itself.
That is what "compensates for differences in output scale" (appendix A). Less than 1.0 does not say
that frames are heard, see infer.py frames.
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn

HEAD_DIM = 64           # of the attention in P_k; the paper gives none, this is the usual one
FOCAL_GAMMA = 2.0       # quality focal loss (Li et al. 2020, arXiv 2006.04388), their value
EPS = 1e-6              # keeps the loss of a dimension that never changes finite


class ProjectionHead(nn.Module):
    """P_k: a pre-norm transformer block over the thinking states, then a linear map.

    d       hidden size of the backbone
    dim     e_k, width of the expert's features
    kind    "transformer", or "linear" (the ablation of table 5: the linear map alone)
    width   puts a linear map d -> width in front, to save parameters; not in the paper"""

    def __init__(self, d, dim, kind="transformer", width=None):
        super().__init__()
        if kind not in ("transformer", "linear"):
            raise ValueError(f"kind is 'transformer' or 'linear', not '{kind}'")
        width = width or d
        self.kind = kind
        self.reduce = nn.Linear(d, width) if width != d else nn.Identity()
        if kind == "transformer":
            most = max(1, width // HEAD_DIM)
            self.n_heads = max(n for n in range(1, most + 1) if width % n == 0)
            self.norm1 = nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width)
            self.proj = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.out = nn.Linear(width, dim)

    def forward(self, h, valid):
        """h (B, L, D), valid (B, L) bool -> (B, L, E); beyond a clip's end it means nothing."""
        x = self.reduce(h)
        if self.kind == "transformer":
            x = x + self.attend(self.norm1(x), valid)
            x = x + self.mlp(self.norm2(x))
        return self.out(x)

    def attend(self, x, valid):
        """Attention runs both ways: the whole block is known before the response starts."""
        B, L, W = x.shape
        # A clip's padding is hidden. A padded query sees itself: a softmax over nothing is NaN.
        itself = torch.eye(L, dtype=torch.bool, device=x.device)
        mask = valid[:, None, None, :] | itself                                     # (B, 1, L, L)
        qkv = self.qkv(x).view(B, L, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                        # (B, H, L, W/H)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(a.transpose(1, 2).reshape(B, L, W))


# --------------------------------------------------------------------------------------------------
# Losses. Each takes two (F, E) tensors and returns (F, E).

def mse(pred, target):
    return (pred - target).pow(2)


def bce(logits, q):
    """Binary cross-entropy against soft targets q in [0, 1], less their entropy: 0 when p = q."""
    entropy = -(torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q))
    return F.binary_cross_entropy_with_logits(logits, q, reduction="none") - entropy


def focal_bce(logits, q, gamma=FOCAL_GAMMA):
    """|q - p|^gamma * BCE(p, q): the focal loss where q is 0 or 1, 0 when p = q. gamma 0: `bce`."""
    if gamma == 0:
        return bce(logits, q)
    weight = (q - logits.sigmoid()).abs().pow(gamma)
    return weight * F.binary_cross_entropy_with_logits(logits, q, reduction="none")


# Task -> {term: (loss, does it compare readouts?)}. One that is not listed has MSE on its features.
TASKS = {
    "recon": {"recon": (mse, False)},                                    # L_recon
    "speech": {"speech": (mse, False)},                                  # L_speech
    "sound": {"sound": (bce, True)},                                     # L_sed
    "affect": {"affect": (mse, False)},                                  # L_emo
    "pitch": {"pitch": (mse, False), "pitch_aux": (focal_bce, True)},    # L_pitch
}


def terms(task):
    return TASKS.get(task, {task: (mse, False)})


def best_constant(loss, target):
    """(F, E) -> (1, E), the constant answer with the least loss: of `mse` the mean, of the others
    logits. They are convex in the probability (`focal_bce` for gamma from 1), so halving an
    interval by the sign of their slope finds it. For `bce` that is the logit of the mean."""
    if loss is mse:
        return target.mean(0, keepdim=True)
    low = torch.full_like(target[:1], -20.0)
    high = -low
    for _ in range(32):
        guess = ((low + high) / 2).requires_grad_()
        with torch.enable_grad():
            slope, = torch.autograd.grad(loss(guess.expand_as(target), target).sum(), guess)
        guess = guess.detach()
        low = torch.where(slope < 0, guess, low)
        high = torch.where(slope < 0, high, guess)
    return (low + high) / 2


class ExpertHeads(nn.ModuleDict):
    """P_k of each task, and L_k with its scale.

    d           hidden size of the backbone
    dims        {task: e_k}
    readouts    {task: frozen output layer of the expert, to logits}, for terms that compare there
    kind, width as in ProjectionHead
    focal_gamma of the focal-BCE; 0 makes it plain BCE"""

    def __init__(self, d, dims, readouts=None, kind="transformer", width=None,
                 focal_gamma=FOCAL_GAMMA):
        super().__init__({task: ProjectionHead(d, dim, kind, width) for task, dim in dims.items()})
        self.readouts = readouts or {}    # parts of the experts, neither trained nor saved here
        self.focal_gamma = focal_gamma
        for task in dims:
            for term in terms(task):    # what the best constant answer costs; saved with the heads
                self.register_buffer(f"{term}_scale", torch.ones(()))

    def forward(self, think_states, valid, targets):
        """{term: () its loss, summed over the real frames}.

        think_states    (B, L, D), H_think
        valid           (B, L) bool, which frames are real
        targets         {task: z_k (B, L, E)}; these heads run, the others rest"""
        losses = {}
        for task, z in targets.items():
            z_hat = self[task](think_states, valid)                                 # equation 3
            with torch.autocast(z.device.type, enabled=False):    # sums and readouts in fp32
                found = self.frame_losses(task, z_hat.float(), z.float(), valid)
                for term, value in found.items():
                    losses[term] = value.sum() / getattr(self, f"{term}_scale")
        return losses

    def losses_of(self, task):
        """Yields (term, loss, compares readouts?) of a task, with this run's gamma."""
        for term, (loss, on_readout) in terms(task).items():
            if loss is focal_bce:
                loss = functools.partial(focal_bce, gamma=self.focal_gamma)
            yield term, loss, on_readout

    def frame_losses(self, task, z_hat, z, valid):
        """{term: (F,) mean over E of the real frames}. Gradients flow through the frozen readout
        into z_hat (section 3.3.2)."""
        losses = {}
        z_hat = z_hat * valid[..., None]    # the readout of pitch looks past a clip's end: at zeros
        for term, loss, on_readout in self.losses_of(task):
            if on_readout:
                readout = self.readouts[task]
                losses[term] = loss(readout(z_hat)[valid], readout(z)[valid].sigmoid()).mean(-1)
            else:
                losses[term] = loss(z_hat[valid], z[valid]).mean(-1)
        return losses

    @torch.no_grad()
    def calibrate(self, task, clips):
        """Measures what the best constant answer to `clips`, [(L, E)] z_k, costs, and lets the head
        start from the mean feature: output weights zero, bias the mean."""
        z = torch.cat(clips).float()
        if not z.isfinite().all():    # it would stay in the scales for good
            raise ValueError(f"expert '{task}' gives NaN or infinity")
        for term, loss, on_readout in self.losses_of(task):
            target = z
            if on_readout:
                target = torch.cat([self.readouts[task](clip.float()).sigmoid() for clip in clips])
            guess = best_constant(loss, target).expand_as(target)
            cost = loss(guess, target).mean()
            getattr(self, f"{term}_scale").copy_(cost.clamp(min=EPS))
        out = self[task].out
        nn.init.zeros_(out.weight)
        out.bias.copy_(z.mean(0))


def heads_for(d, experts, **options):
    """The ExpertHeads of {task: anything with `dim`, e_k, and `readout`, g_cls, h or None}."""
    dims = {task: expert.dim for task, expert in experts.items()}
    readouts = {task: expert.readout for task, expert in experts.items()}
    return ExpertHeads(d, dims, readouts, **options)
