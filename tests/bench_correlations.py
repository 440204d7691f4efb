"""Rows of the bench: GCC-PHAT and maps of steered power."""
import numpy as np
import torch
from bench import Case, Peer, close, fft_flops, growth, memory, noise, row
from ssl_nb.acoustics.geometry import mic_pairs, robot_head_array, wall_array
from ssl_nb.acoustics.signals import stft
from ssl_nb.classical.gcc_phat import gcc_phat
from ssl_nb.classical.steered_power import (SteeredPower, direction_grid, music,
                                            position_grid)


def by_torch(audio, max_lag, n, anew=False):
    "GCC-PHAT pair after pair; each channel is transformed for every pair, or once."
    def compute():
        whole = None if anew else torch.fft.rfft(audio, n)
        rows = []
        for i, j in mic_pairs(audio.shape[-2]).tolist():
            a, b = ((torch.fft.rfft(audio[..., k, :], n) for k in (i, j)) if anew
                    else (whole[..., k, :] for k in (i, j)))
            cross = a * b.conj()
            gcc = torch.fft.irfft(cross / (cross.abs() + 1e-12), n)
            rows.append(torch.cat([gcc[..., -max_lag:], gcc[..., :max_lag + 1]], -1))
        return torch.stack(rows, -2)
    return compute


def by_scipy(audio, max_lag, n):
    "All pairs of a recording in one inverse transform."
    import scipy.fft
    first, second = mic_pairs(audio.shape[-2]).numpy().T
    x = audio.numpy()
    def compute():
        out = []
        for frame in x.reshape(-1, *x.shape[-2:]):
            spectrum = scipy.fft.rfft(frame, n)
            cross = spectrum[first] * spectrum[second].conj()
            gcc = scipy.fft.irfft(cross / (np.abs(cross) + 1e-12), n)
            out.append(np.concatenate([gcc[..., -max_lag:], gcc[..., :max_lag + 1]], -1))
        return np.stack(out).reshape(*x.shape[:-2], len(first), -1)
    return compute


def length(time, max_lag):
    import scipy.fft
    from ssl_nb.classical.correlations import transform_length
    return transform_length(time, max_lag)


def gcc_case(audio, max_lag):
    n, scale = length(audio.shape[-1], max_lag), float(gcc_phat(audio, max_lag=max_lag).abs().max())
    pairs = len(mic_pairs(audio.shape[-2]))
    same = close(1e-3)
    frames = audio.numel() // audio.shape[-1] // audio.shape[-2]
    peers = [Peer("torch, every pair anew", lambda: by_torch(audio, max_lag, n, True), same),
             Peer("torch, channels once", lambda: by_torch(audio, max_lag, n), same)]
    if audio.device.type == "cpu":
        peers.append(Peer("scipy", lambda: by_scipy(audio, max_lag, n), same))
    return Case(lambda: gcc_phat(audio, max_lag=max_lag), peers,
                work={"fft": fft_flops(n, frames * (audio.shape[-2] + pairs))})


@row("gcc_frames", "GCC-PHAT, 12 microphones, 100 frames of 4096, 65 lags")
def _(device="cpu"): return gcc_case(noise(100, 12, 4096, device=device), 32)


@row("gcc_one", "GCC-PHAT, 4 microphones, one frame of 8000, 801 lags")
def _(device="cpu"): return gcc_case(noise(4, 8000, device=device), 400)


@row("gcc_six", "GCC-PHAT, 6 microphones, one frame of 8000, 801 lags")
def _(device="cpu"): return gcc_case(noise(6, 8000, device=device), 400)


@row("gcc_six_frames", "GCC-PHAT, 6 microphones, 64 frames of 8000, 801 lags")
def _(device="cpu"): return gcc_case(noise(64, 6, 8000, device=device), 400)


@growth("gcc_mics", "GCC-PHAT of 50 frames of 4096 against microphones", (4, 8, 16, 32))
def _(mics):
    audio = noise(50, mics, 4096)
    return lambda: gcc_phat(audio, max_lag=32)


@memory("gcc_framed", "GCC-PHAT, 8 microphones x 600 s in frames of 4096, 65 lags")
def _():
    audio = noise(8, 600 * 16000)
    gcc_phat(audio[:, :4096], max_lag=32)
    return lambda: gcc_phat(audio.unfold(-1, 4096, 4096).transpose(0, 1), max_lag=32)


def mean_map(theirs, bins, frames, n):
    def compute():
        theirs.locate_sources(torch.fft.rfft(frames, n).permute(1, 2, 0).numpy(), freq_bins=bins)
        return theirs.grid.values
    return compute


@row("srp_mean", "mean SRP-PHAT map of 60 frames of 4096, 12 microphones, 64 x 32 directions")
def _():
    from ssl_nb.classical.correlations import band_bins, transform_length
    mics, grid, band, part = robot_head_array(), direction_grid(64, 32), (500.0, 4000.0), 6
    frames = noise(60, 12, 4096)
    ours = SteeredPower(mics, grid, 16000, band=band)
    n = transform_length(4096, ours.max_lag)
    def library():
        import pyroomacoustics as pra
        azimuth = np.pi * np.arange(-31, 33) / 32
        theirs = pra.doa.SRP(mics.double().numpy().T, 16000, n, azimuth=azimuth,
                             colatitude=np.pi * (np.arange(32) + 0.5) / 32, dim=3)
        theirs.grid.neighbors  # the library's convex hull, once
        return mean_map(theirs, list(range(*band_bins(band, n, 16000))), frames[:part], n)
    def agree(_, b):
        own = ours(frames[:part]).mean(0).unflatten(-1, grid.shape).flip(1).T.reshape(-1)
        return close(1e-4)((12 + 2 * own) / 66, b)
    return Case(lambda: ours(frames).mean(0), [Peer("pyroomacoustics", library, agree, 60 / part)])


def pra_doa(kind, mics, n, azimuths, colatitudes):
    "A library's direction finder on our 64 x 32 grid, its convex hull computed once."
    import pyroomacoustics as pra
    theirs = getattr(pra.doa, kind)(mics.double().numpy().T, 16000, n, num_src=1, dim=3,
                                    azimuth=azimuths, colatitude=colatitudes)
    theirs.grid.neighbors
    return theirs


AZIMUTHS = np.pi * np.arange(-31, 33) / 32
COLATITUDES = np.pi * (np.arange(32) + 0.5) / 32


# commit dd71899 took 2.7 times as long here and 24 times as long in srp_near, measured in turns in
# one process on the AMD EPYC of data/bench, load 7; the maps differ by 1e-6 at most
@row("srp_one", "one SRP-PHAT map of a frame of 4096, 12 microphones, 64 x 32 directions")
def _():
    from ssl_nb.classical.correlations import band_bins, transform_length
    mics, grid, band = robot_head_array(), direction_grid(64, 32), (500.0, 4000.0)
    frame = noise(12, 4096)
    ours = SteeredPower(mics, grid, 16000, band=band)
    n = transform_length(4096, ours.max_lag)
    def agree(a, b):
        own = a.unflatten(-1, grid.shape).flip(1).T.reshape(-1)
        return close(1e-4)((12 + 2 * own) / 66, b)
    return Case(lambda: ours(frame), [Peer("pyroomacoustics", lambda: mean_map(
        pra_doa("SRP", mics, n, AZIMUTHS, COLATITUDES), list(range(*band_bins(band, n, 16000))),
        frame[None], n), agree)])


@row("srp_near", "one SRP-PHAT map of a frame of 4096, 12 microphones on walls, 480,000 points")
def _():
    mics = wall_array([6.0, 5.0, 3.0], torch.Generator().manual_seed(0))
    mics = torch.cat([mics, wall_array([6.0, 5.0, 3.0], torch.Generator().manual_seed(1))])
    grid = position_grid([8.0, 7.5, 8.0], 0.1)
    ours, frame = SteeredPower(mics, grid, 16000), noise(12, 4096)
    ours(frame)  # what belongs to the array is computed at the first call
    return Case(lambda: ours(frame))


def doa_py_map(mics, recording, length, bins):
    "NormMUSIC of one recording by doa-py's narrow-band function, bin after bin."
    from doa_py.algorithm.music_based import music as narrow
    from doa_py.arrays import Array
    array = Array(*mics.double().numpy().T)
    theta, phi = np.meshgrid(np.pi / 2 - COLATITUDES, AZIMUTHS)
    angles = np.stack([phi.ravel(), theta.ravel()])
    def compute():
        spectra, total = stft(recording, length).numpy(), 0
        # the library takes the mean off; with their negatives the frames have none
        spectra = np.concatenate([spectra, -spectra], -1)
        for k in bins:
            # the library's waves travel at 3e8 m/s, away from the array
            found = narrow(spectra[:, k].conj(), 1, array, k * 16000 / length * 3e8 / 343.0,
                           angles, unit="rad")
            total = total + found / found.max()
        return total
    return compute


@row("music_many", "MUSIC maps of 60 recordings of 4096, 12 microphones, 64 x 32 directions")
def _():
    from ssl_nb.classical.correlations import band_bins
    mics, grid, length = robot_head_array(), direction_grid(64, 32), 512
    recordings, bins = noise(60, 12, 4096), range(*band_bins((500.0, 4000.0), 512, 16000))
    ours = lambda: music(recordings, mics, 16000, grid)[0]
    def alike(theirs):
        def agree(a, b):
            own = theirs(a[0].unflatten(-1, grid.shape)).reshape(-1).double().numpy()
            found = float(np.corrcoef(own, np.asarray(b).reshape(-1))[0, 1])
            assert found > 0.95, f"correlation {found:.3f}"
            return f"maps correlate {found:.4f}"
        return agree
    def library():
        theirs = pra_doa("NormMUSIC", mics, length, AZIMUTHS, COLATITUDES)
        spectra = stft(recordings[0], length).numpy()
        def compute():
            theirs.locate_sources(spectra, freq_bins=list(bins))
            return theirs.grid.values
        return compute
    return Case(ours, [
        Peer("pyroomacoustics", library, alike(lambda m: m.flip(1).T), 60),
        Peer("doa-py", lambda: doa_py_map(mics, recordings[0], length, bins),
             alike(lambda m: m.flip(1)), 60)])


@memory("stft_600", "STFT, 8 microphones x 600 s, windows of 512")
def _():
    audio = noise(8, 600 * 16000)
    stft(audio[:, :4096])
    return lambda: stft(audio)


@growth("srp_points", "SRP-PHAT maps of 20 frames against directions", (512, 2048, 8192))
def _(points):
    columns = round((2 * points) ** 0.5)
    steered = SteeredPower(robot_head_array(), direction_grid(columns, points // columns), 16000)
    frames = noise(20, 12, 4096)
    return lambda: steered(frames)


@memory("srp_framed", "SRP-PHAT maps, 8 microphones x 600 s in frames of 4096, 64 x 32 directions")
def _():
    audio = noise(8, 600 * 16000)
    steered = SteeredPower(robot_head_array()[:8], direction_grid(64, 32), 16000)
    steered(audio[:, :4096])
    return lambda: steered(audio.unfold(-1, 4096, 4096).transpose(0, 1))


@memory("music_framed", "MUSIC maps, 8 microphones x 60 s in frames of 4096, 64 x 32 directions")
def _():
    audio = noise(8, 60 * 16000).unfold(-1, 4096, 4096).transpose(0, 1)
    mics, grid = robot_head_array()[:8], direction_grid(64, 32)
    music(audio[:1], mics, 16000, grid)
    return lambda: music(audio, mics, 16000, grid)
