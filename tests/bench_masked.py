"""Rows of the bench: NGCC-PHAT and wav2pos. The peers do the published code's work in its order,
written here from its description. NGCC-PHAT: both channels of every pair through the front end,
1,023 taps directly, convolutions and correlations by torch's own operations with automatic slopes.
wav2pos: the front end once for each channel, then correlations pair by pair and the same head."""
import torch
from bench import Case, Peer, close, row
from torch import nn
from torch.nn import functional as F

from ssl_nb.acoustics.geometry import mic_pairs
from ssl_nb.masked.ngcc_phat import NgccPhat, sinc_bank
from ssl_nb.masked.wav2pos import (SOUND_WEIGHT, Wav2pos, draw_known, fill_loss, make_recipe,
                                   standardized, with_noise)


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


# --- wav2pos --------------------------------------------------------------------------------------

def channel_by_channel(net, audio):
    "Scores of all pairs of channels, then of the same pairs turned around."
    batch, heard, time = audio.shape
    features = one_channel(net, audio.reshape(-1, 1, time)).unflatten(0, (batch, heard))
    n, reach, cut = 2 * time, net.max_lag, []
    for i, j in mic_pairs(heard).tolist():
        cross = torch.fft.rfft(features[:, i], n) * torch.fft.rfft(features[:, j], n).conj()
        gcc = torch.fft.irfft(cross / (cross.abs() + 1e-3), n)
        cut.append(torch.cat([gcc[..., -reach:], gcc[..., :reach + 1]], -1))
    lags = torch.stack(cut, 1)
    both = torch.cat([lags, lags.flip(-1)], 1)
    return net.head(both.flatten(0, 1))[:, 0].unflatten(0, both.shape[:2])


def second_of_noise(audio):
    "A second of coloured noise for every channel, of which a window is used."
    shape = (*audio.shape[:-1], 16000)
    spectrum = torch.fft.rfft(torch.randn(shape))
    slope = torch.linspace(1, 8000 ** 0.5, spectrum.shape[-1])
    noise = torch.fft.irfft(spectrum / slope ** (4 * torch.rand(*shape[:-1], 1) - 2), 16000)
    noise = noise[..., :audio.shape[-1]]
    level = 10 ** (-30 * torch.rand(*shape[:-1], 1) / 20)
    rms = lambda x: x.square().mean(-1, keepdim=True).sqrt()
    return audio + noise / rms(noise) * rms(audio) * level


def wav2pos_step(noisy, lags_of, batch=8):
    "One training step on windows of six microphones and the talker; returns its loss."
    g = torch.Generator().manual_seed(0)
    net, recipe = Wav2pos().train(), make_recipe("ours")
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-3)
    clean = torch.randn(batch, 7, 2048, generator=g)
    places = torch.rand(batch, 7, 3, generator=g)
    def once():
        torch.manual_seed(0)
        given, audio = draw_known(batch, 6, recipe), noisy(clean)
        optimizer.zero_grad()
        filled = net(audio, places, given, lags_of(net, audio, given))
        sound, place = fill_loss(filled, clean, places, given, net.scale)
        (SOUND_WEIGHT * sound + place).backward()
        optimizer.step()
        return place.detach()
    return once


@row("wav2pos_step", "wav2pos, training step, 8 windows of 7 channels, published sizes")
def _():
    def their_lags(net, audio, given):
        heard = audio[given.heard].unflatten(0, (len(audio), -1))
        with torch.no_grad(): return channel_by_channel(net.ngcc, standardized(heard))
    ours = wav2pos_step(with_noise, lambda net, audio, given: None)
    peer = lambda: wav2pos_step(second_of_noise, their_lags)
    return Case(ours, [Peer("torch, the published order", peer, "weights and noise are drawn")])


@row("wav2pos_pairs", "What frozen NGCC-PHAT tells wav2pos, 2 windows of 6 microphones, 629 lags")
def _():
    net, audio = Wav2pos().eval(), standardized(windows(2, 6))
    @torch.no_grad()
    def ours():
        lags = net.ngcc.correlations(audio, max_lag=314)
        return net.ngcc.scores(torch.cat([lags, lags.flip(-1)], 1))
    @torch.no_grad()
    def theirs(): return channel_by_channel(net.ngcc, audio)
    return Case(ours, [Peer("torch, the published order", lambda: theirs, close(1e-3))])


@row("wav2pos_step_kept", "The wav2pos step where the answers of frozen NGCC-PHAT are kept on disk")
def _():
    kept = {}
    def remember(net, audio, given):
        pairs = int(given.heard[0].sum())
        if pairs not in kept: kept[pairs] = torch.randn(len(audio), pairs * (pairs - 1), 629)
        return kept[pairs]
    return Case(wav2pos_step(with_noise, remember))
