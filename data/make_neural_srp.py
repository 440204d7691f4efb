"""Draw walks, train Neural-SRP on them, and measure it beside steered power in unseen rooms.

    python data/make_neural_srp.py draw train 0 600 FOLDER     # walks
    python data/make_neural_srp.py draw valid 0 48 FOLDER
    python data/make_neural_srp.py draw test 0 40 FOLDER    # also 1000 1040, 2000 2030
    python data/make_neural_srp.py train 0 FOLDER              # seed; goes on where it was stopped
    python data/make_neural_srp.py measure WEIGHTS FOLDER      # folder of weights and card

A training batch holds stretches of two answers (1.92 s) of 80 walks. Walks of the test split have
unheard voices and new rooms, and come with the answers of steered power; `measure` writes
FOLDER/measured.csv, one row for each kind of array, method and thousand of the walks' numbers (a
seed).
"""
import sys, warnings
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from safetensors.torch import save_file
from ssl_nb.acoustics.geometry import angular_error
from ssl_nb.classical.over_time import canonical
from ssl_nb.classical.steered_power import SteeredPower, locate, sphere_grid
from ssl_nb.variational.supervised_trackers import POOL, NeuralSrp, PowerMaps, Walks
from ssl_nb.variational.supervised_trackers import direction_loss, draw_walk, load_trained
from ssl_nb.variational.supervised_trackers import oriented_pairs, pair_features, pair_places
from ssl_nb.variational.supervised_trackers import tracker_frames
from ssl_nb.workshop.localizers import spans
from ssl_nb.workshop.speech import speech
from ssl_nb.workshop.training import Cosine, fit

MICS, SECONDS, PARTS = 6, 10.0, 200  # of a walk; walks in a file
SEEDS = {"train": 0, "valid": 10**6, "test": 2 * 10**6}
warnings.filterwarnings("ignore", message="mics: they lie in a plane")
VISITS, BATCH, EPOCHS, LR = 8, 80, 8, 2e-3


def draw(split, first, last, folder):
    "Walks as correlations of half precision, 200 to a file."
    voices = speech(split)
    for start in range(first, last, PARTS):
        rows = []
        for k in range(start, min(start + PARTS, last)):
            walk = draw_walk(MICS, SECONDS, voices, torch.Generator().manual_seed(SEEDS[split] + k))
            if split == "test": walk |= steered_answers(walk, voices.fs)
            walk["gcc"] = pair_features(walk.pop("audio"), walk["mics"], voices.fs)[0].half()
            rows.append(walk)
        torch.save({k: torch.stack([r[k] for r in rows]) for k in rows[0]},
                   folder / f"{split}_{start}.pt")


def walks(split, folder, **visits):
    parts = [torch.load(p) for p in sorted(folder.glob(f"{split}_*.pt"))]
    return Walks(*(torch.cat([p[k] for p in parts])
                   for k in ("gcc", "mics", "directions", "active")), **visits)


def degrees(model, batch):
    "Mean angular error of each walk, of the steps with speech."
    off = angular_error(model(batch["gcc"], batch["places"]).float(), batch["directions"])
    return off.rad2deg().where(batch["active"], torch.nan).nanmean(-1).nan_to_num(90)


def train(seed, folder):
    torch.manual_seed(seed)
    net = NeuralSrp().to(memory_format=torch.channels_last)
    valid = DataLoader(walks("valid", folder), batch_size=8)
    loader = DataLoader(walks("train", folder, visits=VISITS), batch_size=BATCH, shuffle=True)
    history = fit(net, loader, valid, direction_loss, epochs=EPOCHS, lr=LR, clip=1.0,
                  schedule=Cosine(warmup=0.5, floor=0.02), precision="bf16", device="cpu",
                  metrics={"degrees": degrees}, folder=folder / f"seed{seed}", seed=seed)
    print(history.table.to_string())
    half = {k: v.half().contiguous() if v.is_floating_point() else v
            for k, v in net.state_dict().items()}
    save_file(half, folder / f"seed{seed}" / "weights.safetensors")


METHODS = ("map of 64 x 32, one frame", "map of 64 x 32, mean of five", "steered power, one frame",
           "steered power, 1 s")

def steered_answers(walk, fs):
    "Directions that steered power finds for the steps of a walk, by method."
    audio, mics, steps = walk["audio"], walk["mics"], len(walk["directions"])
    fine, maps = SteeredPower(mics, sphere_grid(4.0), fs, band=(200.0, 4000.0)), PowerMaps(mics, fs)
    pieces = tracker_frames(audio, fs)[:steps * POOL]
    window, hop = round(0.256 * fs), round(0.192 * fs)
    long = audio.unfold(-1, window + (POOL - 1) * hop, POOL * hop).movedim(-2, 0)[:steps]
    rough = maps(audio)[:steps * POOL].unflatten(0, (steps, POOL))
    found = (maps.peaks(rough[:, POOL // 2]), maps.peaks(rough.mean(1)),
             locate(fine, pieces[POOL // 2::POOL]).points[:, 0], locate(fine, long).points[:, 0])
    return {name: canonical(F.normalize(u, dim=-1), *spans(mics))
            for name, u in zip(METHODS, found)}


@torch.no_grad()
def measure(weights, folder):
    net, rows = load_trained(weights), []
    for path in sorted(folder.glob("test_*.pt")):
        drawn = torch.load(path)
        for k, mics in enumerate(drawn["mics"]):
            places = pair_places(mics, oriented_pairs(mics))
            u = F.normalize(net(drawn["gcc"][k].float(), places), dim=-1)
            found = {"neural_srp": canonical(u, *spans(mics)), **{m: drawn[m][k] for m in METHODS}}
            kind = "level plane" if spans(mics)[0] == 2 else "in space"
            for name, u in found.items():
                off = angular_error(u, drawn["directions"][k])[drawn["active"][k]].rad2deg()
                rows += [{"method": name, "seed": int(path.stem.split("_")[1]) // 1000,
                          "array": kind, "error_deg": float(e)} for e in off]
    table = pd.DataFrame(rows)
    error = pd.concat([table, table.assign(array="all")]).groupby(
        ["array", "method", "seed"]).error_deg
    pd.DataFrame({"steps": error.size(), "median_deg": error.median(), "mean_deg": error.mean(),
                  "rms_deg": error.apply(lambda e: (e ** 2).mean() ** 0.5),
                  "within_15_deg": error.apply(lambda e: (e < 15).mean())}
                 ).round(3).to_csv(folder / "measured.csv")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "draw": draw(rest[0], int(rest[1]), int(rest[2]), Path(rest[3]))
    elif what == "train": train(int(rest[0]), Path(rest[1]))
    else: measure(*map(Path, rest))
