"""Fixes of simulated scenes and what `Fix.trust` is made of: writes data/trust/multilateration.csv.

    python data/make_trust.py                # about 10 minutes on one core
    python data/make_trust.py --check 20     # the first 20 rows of both splits against the file
"""
import sys
from pathlib import Path

import pandas as pd
import torch
from ssl_nb.acoustics.geometry import max_pair_tdoas
from ssl_nb.classical.gcc_phat import delays_from_gcc, gcc_phat
from ssl_nb.classical.multilateration import multilaterate, trust_features
from ssl_nb.classical.trust import trial
from ssl_nb.workshop.speech import speech

SPLITS = {"train": (101, 3000), "test": (202, 2500)}  # of the voices: seed, scenes
TABLE = Path(__file__).parent / "trust" / "multilateration.csv"


def heard(voices, seed, index):
    "A scene and the delays that are measured in it, as the chapter on multilateration does."
    kind, scene = trial(voices, seed, index)
    limits = max_pair_tdoas(scene.mics)
    reach = min(int(limits.max() * scene.fs) + 2, scene.audio.shape[-1] - 1)
    delays = delays_from_gcc(gcc_phat(scene.audio, max_lag=reach), scene.fs, max_delay=limits)
    return {"kind": kind, "index": index, "size": list(scene.room.size), "t60": scene.room.t60,
            "mics": scene.mics, "talker": scene.sources[0], "delays": delays}


def rows(split, scene):
    "A fix with each loss; in the plane where microphones and talker are level."
    dim = 2 if scene["kind"] == "plane" else 3
    mics, talker = scene["mics"][:, :dim], scene["talker"][:dim]
    box = torch.tensor([[0.0] * dim, scene["size"][:dim]])
    for loss in ("squared", "cauchy"):
        fix = multilaterate(mics, scene["delays"], bounds=box, loss=loss)
        about, geometry, edge = trust_features(mics, scene["delays"], fix.position,
                                             bounds=box).tolist()
        yield {"split": split, "index": scene["index"], "kind": scene["kind"], "mics": len(mics),
               "t60": round(scene["t60"], 2), "loss": loss, "evidence": round(about, 3),
               "geometry": round(geometry, 3), "on_bounds": int(edge),
               "error_m": round(float((fix.position - talker).norm()), 3)}


def main():
    few = int(sys.argv[2]) if sys.argv[1:2] == ["--check"] else None
    table = []
    for split, (seed, count) in SPLITS.items():
        voices = speech(split)
        for index in range(few or count):
            table += rows(split, heard(voices, seed, index))
    table = pd.DataFrame(table)
    if few is None:
        TABLE.parent.mkdir(exist_ok=True)
        return table.to_csv(TABLE, index=False)
    stored = pd.read_csv(TABLE)
    pd.testing.assert_frame_equal(table, stored[stored["index"] < few].reset_index(drop=True),
                                  rtol=0, atol=0.02)
    print(f"{len(table)} rows are those of {TABLE.name}")


if __name__ == "__main__": main()
