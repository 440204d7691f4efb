"""What each repair of the published training of wav2pos is worth in a short training: writes
data/repairs.csv, which the chapter shows.

    python data/make_repairs.py      # about 5 minutes on one core; a run that was stopped goes on
    python data/make_repairs.py 3    # three of the nets that are not yet there

Every net has the sizes of the book's weights and is given 100 steps of 16 scenes without echoes.
One row is the mean error over 64 test scenes in one set-up, of one recipe and one seed. A recipe
that has the name of a repair is the published one with this repair alone."""
import dataclasses
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from ssl_nb.masked.wav2pos import RECIPES, Wav2pos, fill_in, training_of, wall_scenes, with_noise
from ssl_nb.workshop.training import fit
from torch.utils.data import DataLoader

TABLE = Path(__file__).parent / "repairs.csv"
SCENES, EPOCHS, BATCH, RATE, TESTS = 160, 10, 16, 2e-3, 64
# statistics of NGCC-PHAT cannot drift where it is not used
REPAIRS = [f.name for f in dataclasses.fields(RECIPES["ours"])
           if f.name not in ("snr_db", "frozen_statistics")]
RUNS = {**RECIPES, **{name: dataclasses.replace(RECIPES["published"], **{name: True})
                      for name in REPAIRS}}


def trained(recipe, seed, folder):
    scenes = wall_scenes(folder / f"train-{seed}", SCENES, 3 * seed, n_mics=8)
    torch.manual_seed(seed)
    net = Wav2pos("map", width=64, depth=1, hidden=256)
    fit(net, DataLoader(scenes, BATCH, shuffle=True), None, **training_of(net, recipe, scenes, RATE),
        epochs=EPOCHS, clip=5.0, seed=seed, progress=False)
    net.counts = (2, 8)  # asked also for what it was not trained for
    return net.eval()


def errors(net, seed, folder):
    "Mean error in every set-up, m."
    made = wall_scenes(folder / f"test-{seed}", TESTS, 3 * seed + 2, "test", n_mics=8, samples=2048,
                       per_room=1).__getitems__(range(TESTS))
    clean, places = (torch.stack([row[k] for row in made]).float() for k in ("audio", "places"))
    torch.manual_seed(seed)
    six, own = (with_noise(clean, (20.0, 20.0))[:, 1:7], places[:, 1:7]), clean[:, 0]
    answers = {"sound unknown": fill_in(net, *six), "sound known": fill_in(net, *six, emitted=own),
               "position 5 lost": fill_in(net, *six, unplaced=[5])}
    return {name: float((a.talker - places[:, 0]).norm(dim=-1).mean())
            for name, a in answers.items()}


def main(most):
    rows = pd.read_csv(TABLE).to_dict("records") if TABLE.is_file() else []
    done = {(row["recipe"], row["seed"]) for row in rows}
    wanted = [(name, seed) for seed in range(3) for name in RUNS if (name, seed) not in done]
    with tempfile.TemporaryDirectory() as folder:
        for name, seed in wanted[:most]:
            net = trained(RUNS[name], seed, Path(folder))
            rows += [{"recipe": name, "seed": seed, "setup": setup, "mean_m": round(e, 4)}
                     for setup, e in errors(net, seed, Path(folder)).items()]
            pd.DataFrame(rows).to_csv(TABLE, index=False)
            print(name, seed, rows[-3]["mean_m"], flush=True)


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
