"""Answers of the trained wav2pos to one scene in every set-up of its explorer: writes
nbs/explorers/wav2pos.json.

    python data/make_explorer.py    # a minute on one core; after new weights

A microphone is on, on with its position hidden, or off. Places are in centimetres; an answer is the
talker's, then those of the hidden microphones in their order."""
import itertools
import json
import tempfile
from pathlib import Path

import torch
from ssl_nb.masked.wav2pos import ROOM, fill_in, load_wav2pos, wall_scenes, with_noise

FILE = Path(__file__).parents[1] / "nbs" / "explorers" / "wav2pos.json"
ON, HIDDEN, OFF = range(3)


def scene():
    "Noisy sound of six microphones, their places, the talker's sound and her place."
    with tempfile.TemporaryDirectory() as folder:
        row = wall_scenes(folder, 1, 31, "test", samples=2048, per_room=1)[0]
    torch.manual_seed(0)
    clean, places = row["audio"].float(), (100 * row["places"]).round() / 100
    return with_noise(clean[1:], (20.0, 20.0)), places[1:], clean[0], places[0]


def setups():
    "At least four microphones that hear and two whose positions are known."
    for states in itertools.product(range(3), repeat=6):
        if states.count(OFF) <= 2 and states.count(ON) >= 2: yield states


def answer(net, audio, mics, own, states):
    "Centimetres."
    there = [k for k in range(6) if states[k] != OFF]
    hidden = [n for n, k in enumerate(there) if states[k] == HIDDEN]
    found = fill_in(net, audio[there], mics[there], own, unplaced=hidden)
    points = torch.cat([found.talker[None], found.mics[hidden]])
    return (100 * points).round().int().flatten().tolist()


def main():
    net, (audio, mics, own, talker) = load_wav2pos(), scene()
    answers = {"".join(map(str, states)) + letter: answer(net, audio, mics, sound, states)
               for states in setups() for letter, sound in (("u", None), ("k", own))}
    tidy = lambda x: [[round(v, 2) for v in p] for p in x.tolist()]
    about = {"size": list(ROOM), "mics": tidy(mics), "talker": tidy(talker[None])[0]}
    FILE.write_text(json.dumps({"scene": about, "answers": answers}, separators=(",", ":")) + "\n")
    print(len(answers), FILE.stat().st_size)


if __name__ == "__main__": main()
