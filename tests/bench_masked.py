"""Rows of the bench: NGCC-PHAT. The peer does the published code's work in its order, written here
from its description: both channels of every pair through the front end, 1,023 taps directly,
convolutions and correlations by torch's own operations with automatic slopes."""
import torch
from bench import Case, Peer, close, row
from torch import nn
from torch.nn import functional as F

from ssl_nb.acoustics.geometry import mic_pairs
from ssl_nb.masked.ngcc_phat import NgccPhat, sinc_bank


def windows(n, mics):
    return torch.randn(n, mics, 2048, generator=torch.Generator().manual_seed(0))


def one_channel(net, x):
    "The front end on (batch, 1, time)."
    for layer in net.front.layers:
        if hasattr(layer, "low"):
            filters = sinc_bank(layer.low, layer.width, layer.taps, layer.fs)[:, None]
            x = F.conv1d(F.pad(x, (511, 511), mode="circular"), filters)
        elif isinstance(layer, nn.Conv1d):
            half = layer.kernel_size[0] // 2
            x = F.conv1d(F.pad(x, (half, half), mode="circular"), layer.weight, layer.bias)
        elif isinstance(layer, nn.BatchNorm1d):
            x = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias,
                             layer.training, layer.momentum, layer.eps)
        else: x = F.leaky_relu(x, 0.2)
    return x


def one_pair(net, x1, x2):
    n = 2 * x1.shape[-1]
    cross = (torch.fft.rfft(one_channel(net, x1), n)
             * torch.fft.rfft(one_channel(net, x2), n).conj())
    gcc = torch.fft.irfft(cross / (cross.abs() + 1e-3), n)
    return net.head(torch.cat([gcc[..., -23:], gcc[..., :24]], -1))[:, 0]


def step(net, scores):
    "One training step on 32 windows of two microphones; returns its loss before the step."
    net.train()
    optimizer, audio = torch.optim.AdamW(net.parameters(), 1e-3), windows(32, 2)
    target = torch.arange(32) % 47
    def once():
        optimizer.zero_grad()
        loss = F.cross_entropy(scores(net, audio), target)
        loss.backward()
        optimizer.step()
        return loss.detach()
    return once


@row("ngcc_step", "NGCC-PHAT, training step, 32 pairs of 2,048 samples")
def _():
    ours = step(NgccPhat(), lambda net, x: net(x))
    peer = lambda: step(NgccPhat(), lambda net, x: one_pair(net, x[:, :1], x[:, 1:]))
    return Case(ours, [Peer("torch, the published order", peer, "weights and dropout are drawn")])


@row("ngcc_pairs", "NGCC-PHAT, all 66 pairs of 12 microphones, one window of 128 ms")
def _():
    net, audio = NgccPhat().eval(), windows(1, 12)
    some = mic_pairs(12)[:3]
    @torch.no_grad()
    def every_pair(): return net.pairwise(audio)
    @torch.no_grad()
    def pair_by_pair():
        return torch.stack([one_pair(net, audio[:, i:i + 1], audio[:, j:j + 1])
                            for i, j in some.tolist()], 1)
    agree = close(1e-3)
    return Case(every_pair, [Peer("torch, the published order", lambda: pair_by_pair,
                                  lambda a, b: agree(a[:, :3], b), times=66 / 3)])


@row("ngcc_pairs_32", "The same with 32 channels, the size of the book's weights")
def _():
    net, audio = NgccPhat(width=32).eval(), windows(1, 12)
    @torch.no_grad()
    def every_pair(): return net.pairwise(audio)
    return Case(every_pair)
