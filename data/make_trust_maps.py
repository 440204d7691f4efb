"""Fit the trust of steered power's directions, and prove it on unseen rooms and voices.

    python data/make_trust_maps.py 400 250   # scenes to fit on, scenes to prove on

Prints the weights that stand in the chapter (`DIRECTION_TRUST` of steered power) and writes
data/trust/directions.csv: stated and true shares in the rooms of the test.
Every third scene has two talkers, every eighth holds noise alone, a third of the noise is diffuse.
"""
import sys, warnings
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from ssl_nb.acoustics.diffuse_noise import diffuse_noise
from ssl_nb.acoustics.geometry import (angular_error, circular_array, linear_array,
                                         robot_head_array)
from ssl_nb.acoustics.moving_sources import mix_at_snr
from ssl_nb.acoustics.rooms import Room, reverberate, rirs
from ssl_nb.acoustics.signals import voice_activity
from ssl_nb.classical import steered_power
from ssl_nb.classical.over_time import canonical, directions_of
from ssl_nb.classical.trust import fit_calibration, reliability, trust_of
from ssl_nb.workshop.speech import speech

FS, QUIET, TALK = 16000, 0.7, 1.6  # Hz; s of noise before and after; s of speech
warnings.simplefilter("ignore")  # flat arrays


class Recorded(NamedTuple):
    "A simulated recording and all that is known about it."
    audio: torch.Tensor
    mics: torch.Tensor  # m
    size: torch.Tensor  # of the room, m
    places: torch.Tensor  # of the talkers, m
    late: torch.Tensor  # of every 10 ms, whether there is anybody to be heard
    silent: bool  # noise alone
    t60: float  # s
    g: torch.Generator


def small_array(n, g):
    "A ring, a line, a robot's head, or microphones anywhere in a small cube."
    u = lambda low, high: low + (high - low) * float(torch.rand((), generator=g))
    return (circular_array(n, u(0.03, 0.12)), linear_array(n, u(0.02, 0.08)), robot_head_array(),
            (torch.rand(n, 3, generator=g) - 0.5) * u(0.08, 0.3))[
                min(int(torch.randint(5, (), generator=g)), 3)]


def array(seed, size, g):
    "A small array of 4 to 12 microphones somewhere in a room."
    u = lambda low, high: low + (high - low) * float(torch.rand((), generator=g))
    shape = small_array(int(torch.randint(4, 13, (), generator=g)), g)
    return "small", shape + torch.tensor([u(0.8, float(side) - 0.8) for side in size])


def recorded(split, voices, seed, array, nearest):
    "The kind of the array, and a `Recorded`; talkers are at least `nearest` m off."
    g = torch.Generator().manual_seed({"train": 1, "test": 2}[split] * 10**6 + seed)
    u = lambda low, high: low + (high - low) * float(torch.rand((), generator=g))
    size = torch.tensor([u(3.5, 8), u(3.5, 7), u(2.4, 3.5)])
    t60, snr_db = max(u(0.2, 0.9), 1.001 * Room(size.tolist()).min_t60()), u(5, 30)
    (kind, mics), places = array(seed, size, g), []
    while len(places) < 1 + (seed % 3 == 0):
        p = torch.tensor([u(0.4, float(size[0]) - 0.4), u(0.4, float(size[1]) - 0.4), u(1, 1.9)])
        if (float((p - mics).norm(dim=-1).min()) > nearest
                and all(float((p - q).norm()) > 0.8 for q in places)): places.append(p)
    dry = [torch.nn.functional.pad(v / v.square().mean().sqrt().clamp(min=1e-6), 2 * [
        round(QUIET * FS)]) for v in (voices.talk(TALK, g) for _ in places)]
    room = Room(size.tolist(), t60)
    heard = sum(reverberate(d, rirs(room, p, mics, FS, "hybrid", generator=g))
                for d, p in zip(dry, places))
    noise = (diffuse_noise(mics, heard.shape[-1], FS, g) if seed % 3 == 1
             else torch.randn(heard.shape, generator=g))
    silent, tail = seed % 8 == 0, round(min(t60, 0.4) * 100)
    active = torch.stack([voice_activity(d, FS, hop=160, length=320) for d in dry]).any(0)
    late = torch.nn.functional.max_pool1d(torch.nn.functional.pad(
        active[None].float(), (tail, 0)), tail + 1, 1)[0] > 0
    audio = noise if silent else mix_at_snr(heard, noise, snr_db)
    return kind, Recorded(audio, mics, size, torch.stack(places), late & (not silent), silent, t60,
                          g)


def answers(split, voices, seed):
    "Features of the answers of a scene, whether they are right, and whether there was only noise."
    audio, mics, size, places, late, silent, _, g = recorded(split, voices, seed, array, 0.6)[1]
    length = round((0.15, 0.2, 0.2, 0.2, 0.4)[int(torch.randint(5, (), generator=g))] * FS)
    starts = range(0, audio.shape[-1] - length + 1, round(0.15 * FS))
    frames = torch.stack([audio[:, k:k + length] for k in starts])
    heard = torch.tensor([bool(late[k // 160:(k + length) // 160].any()) for k in starts])
    kept, keep = [], lambda features, calibration: (kept.append(features),
                                                    trust_of(features, calibration))[1]
    steered_power.trust_of = keep  # a look at the features of the library itself
    middle = mics.mean(0)
    grid, dims, axes = directions_of(mics - middle)
    steered = steered_power.SteeredPower(mics - middle, grid, FS, band=(200.0, 4000.0))
    points = canonical(steered_power.locate(steered, frames, 2).points, dims, axes)
    features = torch.cat(kept)
    wanted = canonical(torch.nn.functional.normalize(places - middle, dim=-1), dims, axes)
    flat = (lambda v: v - (v @ axes[2].float())[..., None] * axes[2].float()) if dims == 2 \
        else (lambda v: v)
    off = angular_error(flat(points)[:, :, None], flat(wanted)).rad2deg().amin(-1) / 10
    steered_power.trust_of = trust_of
    use = heard | silent
    return (features[use].flatten(0, 1).double(), ((off < 1) & heard[:, None])[use].flatten(),
            torch.full((2 * int(use.sum()),), silent))


def main(fit_on, prove_on):
    gather = lambda split, n: [torch.cat(part) for part in zip(*(
        answers(split, voices[split], k) for k in range(n)))]
    voices = {split: speech(split) for split in ("train", "test")}
    x, good, _ = gather("train", fit_on)
    stated = fit_calibration(x, good, ridge=0.3)
    stated = stated._replace(weights=tuple(round(w, 2) for w in stated.weights),
                             bias=round(stated.bias, 2))
    print("fitted on", len(x), "answers:", stated, flush=True)
    x, good, silent = gather("test", prove_on)
    trust = trust_of(x, stated)
    near = (trust > 0.85) & (trust < 0.95)
    print(f"{len(x)} answers; stated 0.85 to 0.95: {float(good[near].double().mean()):.3f} of "
          f"{int(near.sum())} right; noise alone: "
          f"{float((trust[silent] > 0.5).double().mean()):.4f} of {int(silent.sum())} above 0.5")
    table = pd.DataFrame(reliability(trust, good)._asdict())
    (Path(__file__).parent / "trust").mkdir(exist_ok=True)
    table.round(4).to_csv(Path(__file__).parent / "trust" / "directions.csv", index=False)


if __name__ == "__main__": main(int(sys.argv[1]), int(sys.argv[2]))
