"""Answers of the global search in simulated rooms, and what their trust is made of.

    python data/make_trust_positions.py train 0 600     # the weights are fitted on these scenes
    python data/make_trust_positions.py test 0 600      # and proved on these: other rooms, voices
    python data/make_trust_positions.py --fit           # prints `POSITION_TRUST`

Adds rows to data/trust/positions.csv, from where an earlier call was stopped. Arrays of 4 to 12
microphones: on the walls, anywhere in the room, on the ceiling, or compact (a device or a cube with
a side of 0.1 to 1 m). Every third scene has two talkers, every eighth holds noise alone, a third of
the noise is diffuse. Two frames of each scene are searched. Scenes from 600 on have no devices,
which hardly ever state much, and are searched for one talker: they fill the classes of high trust.
The stored test rows hold scenes 0 to 720, 1100 to 1500 and 2000 to 3200, as far as time went.
"""
import sys
from pathlib import Path

import pandas as pd
import torch
from make_trust_maps import FS, recorded, small_array
from ssl_nb.acoustics.geometry import wall_array
from ssl_nb.classical import global_search
from ssl_nb.classical.multilateration import WITHIN
from ssl_nb.classical.trust import fit_calibration
from ssl_nb.workshop.speech import speech

TABLE = Path(__file__).parent / "trust" / "positions.csv"
SIGNS = ["over_noise", "consent", "log_mics", "second", "geometry", "log_aperture", "mirror"]
TIMES = {"cube": 3, "wall": 2}  # how often their rows count in the fit: as in the test


def array(seed, size, g):
    "Which kind of array, and the microphones in the room."
    u = lambda low, high: low + (high - low) * float(torch.rand((), generator=g))
    kinds = ("wall", "compact", "anywhere", "ceiling", "compact", "anywhere", "cube")
    if seed >= 600: kinds = ("wall", "cube", "anywhere", "ceiling", "wall", "anywhere", "cube")
    kind = kinds[seed % 7]
    if kind == "wall": return kind, wall_array(size.tolist(), g)
    n = 4 + int(torch.randint(9, (), generator=g))
    if kind in ("anywhere", "ceiling"):
        mics = 0.1 + torch.rand(n, 3, generator=g) * (size - 0.2)
        if kind == "ceiling": mics[:, 2] = size[2] - 0.02
        return kind, mics
    shape = (small_array(n, g) if kind == "compact"
             else (torch.rand(n, 3, generator=g) - 0.5) * u(0.1, 1.0))
    return kind, shape + torch.tensor([u(0.8, float(side) - 0.8) for side in size])


def rows(split, voices, seed):
    "Two frames of a scene, searched for one or two talkers."
    kind, s = recorded(split, voices, seed, array, 0.3)
    length = round((0.15, 0.2, 0.2, 0.2, 0.4)[int(torch.randint(5, (), generator=s.g))] * FS)
    starts = torch.arange(0, s.audio.shape[-1] - length + 1, round(0.3 * FS))
    speaks = torch.tensor([bool(s.late[k // 160:(k + length) // 160].any()) for k in starts])
    use = starts[speaks | s.silent]
    use = use[torch.randperm(len(use), generator=s.g)[:2]]
    if not len(use): return
    frames = torch.stack([s.audio[:, k:k + length] for k in use])
    kept, ours = [], global_search.position_signs
    def keep(*arguments):  # a look at the signs of the library itself
        kept.append(ours(*arguments))
        return kept[-1]
    global_search.position_signs = keep
    n = 2 if seed % 6 in (0, 1, 3) and seed < 600 else 1
    found = global_search.highest_points(frames, s.mics, s.size, FS, n, most=5e3)
    global_search.position_signs = ours
    error = (found.position[:, :, None] - s.places).norm(dim=-1).amin(-1)
    for f in range(len(frames)):
        for k in range(n):
            yield {"split": split, "scene": seed, "kind": kind, "mics": len(s.mics),
                   "t60": round(s.t60, 2), "talkers": 0 if s.silent else len(s.places),
                   **{a: round(float(v), 3) for a, v in zip(SIGNS, kept[k][f])},
                   "error_m": round(99.0 if s.silent else float(error[f, k]), 3)}


def fit(table):
    "The weights of `POSITION_TRUST`, rounded."
    table = table[(table.split == "train") & (table.mirror == 0)]
    table = table.loc[table.index.repeat(table.kind.map(TIMES).fillna(1).astype(int))]
    terms = global_search.position_terms(torch.tensor(table[SIGNS].to_numpy()))
    fitted = fit_calibration(terms, torch.tensor((table.error_m < WITHIN).to_numpy()), ridge=0.3)
    return fitted._replace(weights=tuple(round(w, 2) for w in fitted.weights),
                           bias=round(fitted.bias, 2))


def main(split, first=0, last=0):
    if split == "--fit": return print(fit(pd.read_csv(TABLE)))
    voices, done, first, last = speech(split), set(), int(first), int(last)
    if TABLE.exists(): done = set(pd.read_csv(TABLE).query("split == @split").scene)
    for seed in range(first, last):
        if seed in done: continue
        new = pd.DataFrame(rows(split, voices, seed))
        if len(new): new.to_csv(TABLE, mode="a", index=False, header=not TABLE.exists())


if __name__ == "__main__": main(*sys.argv[1:])
