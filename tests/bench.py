"""Speed ratios against the named peers, both sides in one process: five repeats, medians. `make
bench` writes data/bench/<hardware>.json and the page of it."""
import json, re, shutil, statistics, tempfile, time
from pathlib import Path

import numpy as np
import pyroomacoustics as pra
import torch
from scipy.optimize import least_squares
from ssl_nb.workshop.scenes import SceneSpec, SceneStore
from ssl_nb.classical.gcc_phat import gcc_phat
from ssl_nb.acoustics.geometry import mic_pairs, pair_differences, robot_head_array, tdoas
from ssl_nb.acoustics.geometry import wall_array
from ssl_nb.acoustics.rooms import Room, rirs
from ssl_nb.acoustics.moving_sources import moving_source, random_trajectory
from ssl_nb.acoustics.signals import speech_like
from ssl_nb.classical.correlations import band_bins, transform_length
from ssl_nb.classical.multilateration import multilaterate
from ssl_nb.classical.steered_power import SteeredPower, direction_grid
from ssl_nb.settings import load_settings
from ssl_nb.workbench.experiments import circumstances

REPEATS = 5


def seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_seconds(action, repeats=REPEATS):
    action()  # warm up
    return statistics.median(seconds(action) for _ in range(repeats))


def both_medians(ours, peer, repeats=15):
    "Seconds of two short actions, taken in turns, so that a busy moment of the machine hits both."
    ours(); peer()
    times = [(seconds(ours), seconds(peer)) for _ in range(repeats)]
    return [statistics.median(side) for side in zip(*times)]


def row(what, against, ours, peer, target):
    return {"what": what, "against": against, "ours_seconds": ours, "peer_seconds": peer,
            "ratio": peer / ours, "target": target}


# --- rooms ----------------------------------------------------------------------------------------

def library_room(room, source, mics):
    "Full image order by pyroomacoustics."
    absorption, order = pra.inverse_sabine(room.t60, room.size)
    box = pra.ShoeBox(room.size, fs=16000, materials=pra.Material(absorption), max_order=order)
    box.add_source(source.numpy())
    box.add_microphone_array(mics.numpy().T)
    return box.compute_rir


def rir_sets():
    """Six rooms of 7 x 7 x 4.2 m with 30 microphones, T60 0.2 to 1.2 s. The library's pass over
    them is long: it is timed once a repeat without warming up."""
    g = torch.Generator().manual_seed(0)
    points = torch.rand(31, 3, generator=g) * torch.tensor([7, 7, 4.2])
    rooms = [Room((7, 7, 4.2), t) for t in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)]
    ours = median_seconds(lambda: [rirs(room, points[0], points[1:], method="hybrid")
                                   for room in rooms])
    peer = statistics.median(seconds(lambda: [library_room(room, points[0], points[1:])()
                                              for room in rooms]) for _ in range(REPEATS))
    image = median_seconds(lambda: [rirs(room, points[0], points[1:]) for room in rooms], 3)
    what = "RIR set, 30 mics, 7 x 7 x 4.2 m, T60 0.2, 0.4, ... 1.2 s"
    yield row(f"{what}, hybrid", "pyroomacoustics, full image order", ours, peer, 50)
    yield row(f"{what}, all image sources", "pyroomacoustics, full image order", image, peer, None)


def moving():
    """The library's side is measured at 4 of the 156 positions a repeat and multiplied: all of them
    would take minutes. Its convolutions are not counted."""
    room, mics = Room((6, 5, 3), 0.7), robot_head_array() + torch.tensor([3.0, 2.5, 1.2])
    track, voice = random_trajectory(room, 20, torch.Generator().manual_seed(0)), speech_like(20.0)
    ours = median_seconds(lambda: moving_source(voice, room, track, mics, interval=20 / 155))
    spots = track.at(torch.tensor([2.0, 7.0, 12.0, 17.0]))
    peer = statistics.median(seconds(lambda: [library_room(room, s, mics)() for s in spots])
                             for _ in range(REPEATS)) * 156 / len(spots)
    yield row("moving source, 20 s, 12 mics, T60 0.7 s, 156 positions",
              "pyroomacoustics, full image order at every position", ours, peer, 30)


# --- features and maps ----------------------------------------------------------------------------

def per_pair_irfft(audio, max_lag):
    """GCC-PHAT as most code does it: pair after pair, both channels transformed each time, all lags
    computed."""
    n = 2 * audio.shape[-1]
    features = []
    for i, j in mic_pairs(audio.shape[-2]).tolist():
        cross = torch.fft.rfft(audio[..., i, :], n) * torch.fft.rfft(audio[..., j, :], n).conj()
        gcc = torch.fft.irfft(cross / (cross.abs() + 1e-12), n)
        features.append(torch.cat([gcc[..., -max_lag:], gcc[..., :max_lag + 1]], -1))
    return torch.stack(features, -2)


def gcc_features():
    for frames in (1, 50):
        audio = torch.randn(frames, 12, 4096, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(gcc_phat(audio, max_lag=32), per_pair_irfft(audio, 32) / 1,
                                   rtol=0, atol=0.05)
        yield row(f"GCC-PHAT features, 12 mics, 64 lags, {frames} frame{'s' * (frames > 1)} of "
                  f"4096", "per-pair irfft in torch",
                  *both_medians(lambda: gcc_phat(audio, max_lag=32),
                                lambda: per_pair_irfft(audio, 32)), 4)


def srp_map():
    """The mean map of 8 frames of 4096 samples, 500 to 4000 Hz, on the library's own 64 x 32 grid
    and the same bins; the maps agree to 1e-4."""
    mics, grid, band, fs = robot_head_array(), direction_grid(64, 32), (500.0, 4000.0), 16000
    frames = torch.randn(8, 12, 4096, generator=torch.Generator().manual_seed(0))
    ours = SteeredPower(mics, grid, fs, band=band)
    n = transform_length(4096, ours.max_lag)
    azimuth, colatitude = np.pi * np.arange(-31, 33) / 32, np.pi * (np.arange(32) + 0.5) / 32
    theirs, bins = pra.doa.SRP(mics.double().numpy().T, fs, n, azimuth=azimuth,
                               colatitude=colatitude, dim=3), list(range(*band_bins(band, n, fs)))
    theirs.grid.neighbors  # the library's convex hull, once
    library = lambda: theirs.locate_sources(torch.fft.rfft(frames, n).permute(1, 2, 0).numpy(),
                                            freq_bins=bins)
    mine, peer = median_seconds(lambda: ours(frames).mean(0)), median_seconds(library)
    own = (12
           + 2 * ours(frames).mean(0).unflatten(-1, grid.shape).flip(1).T.reshape(-1).numpy()) / 66
    np.testing.assert_allclose(own, theirs.grid.values, rtol=0, atol=1e-4)
    yield row("SRP-PHAT map, 12 mics, 64 x 32 directions, 8 frames of 4096, 500-4000 Hz",
              "pyroomacoustics.doa.SRP", mine, peer, 15)


def multilateration():
    """10,000 solves, six microphones on the walls, errors of 10 µs; SciPy's 200 solves a repeat are
    multiplied. The answers agree to a hundredth of a millimetre."""
    g, room, pairs = torch.Generator().manual_seed(0), torch.tensor([6.0, 5.0, 3.0]), mic_pairs(6)
    mics, box = wall_array(room, g).double(), torch.stack([torch.zeros(3), room])
    talkers = (0.5 + torch.rand(10000, 3, generator=g) * (room - 1)).double()
    errors = 1e-5 * torch.randn(10000, 6, generator=g).double()
    delays = tdoas(mics, talkers) + pair_differences(errors)
    places, (i, j) = mics.numpy(), pairs.T.numpy()
    def residuals(p, measured):
        far = np.linalg.norm(p - places, axis=1) / 343.0
        return (far[i] - far[j] - measured) * 1e6
    lm = lambda d: least_squares(residuals, places.mean(0), method="lm", args=(d.numpy(),)).x
    ours = lambda d=delays: multilaterate(mics, d, bounds=box).position.numpy()
    np.testing.assert_allclose(ours(delays[:100]), [lm(d) for d in delays[:100]], rtol=0, atol=1e-5)
    mine, peer = both_medians(ours, lambda: [lm(d) for d in delays[:200]])
    yield row("multilateration, 10,000 solves, 6 mics", "scipy least_squares(method='lm')", mine,
              peer * 50, 50)
    mine, peer = both_medians(lambda: [ours(d) for d in delays[:20]],
                              lambda: [lm(d) for d in delays[:20]])
    yield row("multilateration, one solve, 6 mics", "scipy least_squares(method='lm')", mine / 20,
              peer / 20, 1)


# --- a store of scenes ----------------------------------------------------------------------------

def scene_store(count=2000):
    """Dataset Ad-1 of the ULD paper, 30 microphones, written by one process a core; memory is the
    largest sum of resident sizes of all processes."""
    spec = SceneSpec(seconds=2.0, size=((4, 10), (4, 10), (4.2, 4.2)), t60=(0.2, 1.2), n_mics=30,
                     mic_height=(0.9, 0.9), source_height=(0.95, 0.95),
                     placement_grid=16, snr_db=(0, 50))
    folder = Path(tempfile.mkdtemp())
    peak, watch = watch_memory()
    taken = seconds(lambda: SceneStore.write(folder / "ad1", spec, count, precision="float16",
                                             progress=True))
    watch.set()
    shutil.rmtree(folder)
    print(f"{count} scenes of type Ad-1: {taken:.0f} s, {peak[0] / 2**30:.2f} GB")
    return {"scenes": count, "seconds": taken, "gigabytes": peak[0] / 2**30}


def watch_memory():
    """The largest resident size of this process and its children so far, in a list, and an event
    that stops the watching."""
    import psutil, threading
    peak, stop, me = [0], threading.Event(), psutil.Process()
    def look():
        while not stop.wait(0.5):
            total = 0
            for p in [me, *me.children(recursive=True)]:
                try: total += p.memory_info().rss
                except psutil.Error: pass
            peak[0] = max(peak[0], total)
    threading.Thread(target=look, daemon=True).start()
    return peak, stop


# --- the report -----------------------------------------------------------------------------------

def main():
    table, about = [], circumstances()
    for part in (gcc_features, srp_map, multilateration, moving, rir_sets):
        for r in part():
            table.append(r)
            target = f" (target {r['target']}x)" if r["target"] else ""
            print(f"{r['what']}: {r['ours_seconds'] * 1e3:.1f} ms, {r['against']} "
                  f"{r['peer_seconds'] * 1e3:.1f} ms: {r['ratio']:.1f}x{target}", flush=True)
    store = scene_store()
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['hardware']['processor']} "
                                      f"{about['hardware']['cores']} cores".lower()).strip("-")
    target = load_settings().data / "bench" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"repeats": REPEATS, "threads": torch.get_num_threads(),
                                  "rows": table, "scene_store": store, **about}, indent=1) + "\n")
    print(f"written: {target.name}; `make outputs NB=nbs/10_workbench/07_speed.ipynb` shows it on "
          f"the website")


if __name__ == "__main__": main()
