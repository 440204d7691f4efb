"""Speed ratios against the named peers, both sides in one process: five repeats, medians. `make bench` writes data/bench/<hardware>.json."""
import json, re, statistics, time

import torch
from ssl_nb.foundations.gcc_phat import gcc_phat
from ssl_nb.foundations.geometry import mic_pairs
from ssl_nb.settings import load_settings
from ssl_nb.workbench.experiments import circumstances

REPEATS = 5


def per_pair_irfft(audio, max_lag):
    "GCC-PHAT as most code does it: pair after pair, both channels transformed each time, all lags computed."
    n = 2 * audio.shape[-1]
    features = []
    for i, j in mic_pairs(audio.shape[-2]).tolist():
        cross = torch.fft.rfft(audio[..., i, :], n) * torch.fft.rfft(audio[..., j, :], n).conj()
        gcc = torch.fft.irfft(cross / (cross.abs() + 1e-12), n)
        features.append(torch.cat([gcc[..., -max_lag:], gcc[..., :max_lag + 1]], -1))
    return torch.stack(features, -2)


def median_seconds(action):
    action()  # warm up
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rows():
    audio = torch.randn(50, 12, 4096, generator=torch.Generator().manual_seed(0))
    ours, peer = median_seconds(lambda: gcc_phat(audio, max_lag=32)), median_seconds(lambda: per_pair_irfft(audio, 32))
    yield {"what": "GCC-PHAT features, 12 mics, 64 lags, 50 frames of 4096", "against": "per-pair irfft in torch",
           "ours_seconds": ours, "peer_seconds": peer, "ratio": peer / ours, "target": 4}


if __name__ == "__main__":
    table, about = list(rows()), circumstances()
    for row in table: print(f"{row['what']}: {row['ours_seconds'] * 1e3:.1f} ms, {row['against']} {row['peer_seconds'] * 1e3:.1f} ms: {row['ratio']:.1f}x (target {row['target']}x)")
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['hardware']['processor']} {about['hardware']['cores']} cores".lower()).strip("-")
    target = load_settings().data / "bench" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"repeats": REPEATS, "rows": table, **about}, indent=1) + "\n")
    print(f"written: {target.name}")
