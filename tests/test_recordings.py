"""The published sets: loaders checked by sound and by hand, damaged sets, downloads that break,
archives that lie."""
import errno, hashlib, http.server, io, os, platform, re, shutil, stat, tarfile, threading, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from test_command_line import call
from ssl_nb.workshop import recordings
from ssl_nb.workshop.recordings import (ADHOC40_LOUDSPEAKERS, ADHOC40_MICS, LIBRISPEECH,
                                        LibriAdhoc40, LibriSpeech, Locata, RealMAN, Recording,
                                        downloads, fetch, missing_recordings, realman_array)
from ssl_nb.workshop.speech import Speech
from ssl_nb.classical.gcc_phat import delays_from_gcc, gcc_phat
from ssl_nb.acoustics.geometry import random_array, robot_head_array, tdoas, to_angles
from ssl_nb.acoustics.signals import frames
from ssl_nb.settings import DATASETS


def close(a, b, atol):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


def heard_and_true(recording, start=6000, n=18, max_lag=8, distance=None):
    "Delays that the audio shows, and delays that the truth demands, in samples: (frames, pairs)."
    audio = recording.audio[:, start:start + 1024 + (n - 1) * 512]
    truth = recording.at((start + torch.arange(n) * 512 + 512) / recording.fs)
    shown = delays_from_gcc(gcc_phat(frames(audio, 1024, 512).transpose(0, 1), max_lag=max_lag),
                            recording.fs)
    demanded = tdoas(recording.mics,
                     truth.positions[0] if distance is None else truth.directions[0] * distance)
    return shown * recording.fs, demanded * recording.fs


# --- LOCATA ---------------------------------------------------------------------------------------

def head(folder, task=5, split="dev", sources=None, **options):
    here = folder / f"{split}/task{task}/recording1/benchmark2"
    recordings.write_locata(here, "benchmark2", robot_head_array(),
                             sources or {"anna": ([3.5, 2.5, 1.6], [-0.6, 0.8, 0.0])}, **options)
    return here


@pytest.fixture(scope="module")
def turning(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locata")
    head(folder, turning=2.0)
    return folder


@pytest.fixture
def mine(turning, tmp_path):
    "A copy to damage."
    shutil.copytree(turning, tmp_path / "set")
    return tmp_path / "set", tmp_path / "set/dev/task5/recording1/benchmark2"


@pytest.mark.parametrize("turn, start, velocity", [(0.0, [2.2, 3.5, 1.9], [0, 0, 0]),
                                                   (-3.0, [0.2, 1.0, 0.9], [0.5, 0.5, 0.2])])
def test_locata_sound_agrees_with_truth(tmp_path, turn, start, velocity):
    head(tmp_path, turning=turn, sources={"a": (start, velocity)})
    shown, demanded = heard_and_true(Locata(tmp_path, tasks=[5])[0])
    assert ((shown - demanded).abs().median() < 0.05
            and (shown - demanded).abs().quantile(0.95) < 0.3)


def test_locata_other_arrays_keep_their_order_of_channels(tmp_path):
    mics = random_array(15, (1, 1, 0.6), torch.Generator().manual_seed(2), spacing=0.05) * 0.3
    recordings.write_locata(tmp_path / "eval/task3/recording2/dicit", "dicit", mics,
                             {"a": ([3, 3, 1.5], [0.2, 0, 0])}, turning=0.5)
    read = Locata(tmp_path, "eval", tasks=[3], array="dicit", channels=[14, 0, 7])[0]
    close(read.mics, mics[[14, 0, 7]], 1e-4)
    shown, demanded = heard_and_true(read, max_lag=30)
    assert (shown - demanded).abs().median() < 0.05 and demanded.abs().max() > 2


def by_hand(here, vad="1\n" * 4900):
    """Two looks, written by hand: an array at (1, 2, 3), turned by 90 degrees about z, so that its
    +x is the world's +y."""
    here.mkdir(parents=True)
    clock = "2017\t8\t7\t23\t59\t59.9{}\t"
    names = "year\tmonth\tday\thour\tminute\tsecond\t"
    soundfile.write(here / "audio_array_dummy.wav", np.full((4900, 4), 0.1), 48000)
    (here / "required_time.txt").write_text(names + "valid_flag\n" + clock.format(0) + "1\n"
                                            + "2017\t8\t8\t0\t0\t0\t1\n")
    pose = ("x\ty\tz\tref_vec_x\tref_vec_y\tref_vec_z\t"
            + "\t".join(f"rotation_{i}{j}" for i in (1, 2, 3) for j in (1, 2, 3)))
    mics = "".join(f"\tmic{m}_x\tmic{m}_y\tmic{m}_z" for m in (1, 2, 3, 4))
    array = ("1\t2\t3\t-1\t0\t0\t0\t-1\t0\t1\t0\t0\t0\t0\t1" + "\t1\t2.1\t3" + "\t0.8\t2\t3"
             + "\t1\t2\t3.3" + "\t1\t2\t3")
    source = "1\t4\t3\t0\t1\t0\t1\t0\t0\t0\t1\t0\t0\t0\t1"
    for name, values, more in (("position_array_dummy", array, mics),
                               ("position_source_talker1", source, "")):
        (here / f"{name}.txt").write_text(names + pose + more + "\n" + clock.format(0) + values
                                          + "\n" + "2017\t8\t8\t0\t0\t0\t" + values + "\n")
    if vad: (here / "VAD_dummy_talker1.txt").write_text("VAD\n" + vad)


def test_locata_written_by_hand_over_midnight(tmp_path):
    by_hand(tmp_path / "dev/task1/recording1/dummy")
    read = Locata(tmp_path, tasks=[1], array="dummy", fs=48000)[0]
    # +y of the world is the array's +x, -x its +y
    close(read.mics, [[0.1, 0, 0], [0, 0.2, 0], [0, 0, 0.3], [0, 0, 0]], 1e-6)
    close(read.directions[0], [[1.0, 0, 0], [1, 0, 0]], 1e-6)
    close(read.distances[0], [2.0, 2.0], 1e-6)
    close(read.times, [0.0, 0.1], 1e-4)
    assert (read.sources == ("talker1",) and read.activity.all() and read.audio.shape == (4, 4900)
            and read.name == "dev/task1/recording1/dummy")


def test_locata_activity_comes_from_the_sample_at_the_look(tmp_path):
    by_hand(tmp_path / "dev/task1/recording1/dummy", "1\n" * 4790 + "0\n" * 110)
    assert Locata(tmp_path, tasks=[1], array="dummy")[0].activity.tolist() == [[True, False]]


def test_locata_several_sources_and_what_the_table_says(tmp_path):
    head(tmp_path, 4, sources={"bert": ([0.5, 0.5, 1.0], [0, 1, 0]),
                               "anna": ([3.5, 2.5, 1.6], [-0.6, 0.8, 0])}, turning=1.0)
    (tmp_path / "dev/task4/recording10").mkdir()
    two = Locata(tmp_path, tasks=[4])
    read = two[-1]
    assert (read.sources == ("anna", "bert") and read.directions.shape == (2, 119, 3)
            and len(two) == 1)
    assert (two.table.sources[0] == "anna, bert" and two.table.seconds[0] == 1.0
            and "1 recordings, 12 channels" in repr(two))
    world = torch.einsum("kij,skj->ski", read.rotations, read.positions) + read.origins
    t = read.times[:, None]
    close(world[0], torch.tensor([3.5, 2.5, 1.6]) + t * torch.tensor([-0.6, 0.8, 0]), 1e-4)
    close(world[1], torch.tensor([0.5, 0.5, 1.0]) + t * torch.tensor([0, 1.0, 0]), 1e-4)


def test_locata_invalid_looks_and_the_late_start(turning):
    read = Locata(turning, tasks=[5])[0]
    # the first look came before the audio
    close(read.times[:2], [1 / 120 - 0.004, 2 / 120 - 0.004], 1e-4)
    # look 60 was invalid
    assert len(read.times) == 119 and not ((read.times - (60 / 120 - 0.004)).abs() < 1e-3).any()
    onset = read.times[read.activity[0]].min()
    assert 0.3 <= onset < 0.3 + 1 / 100


def test_locata_without_truth_or_activity(mine):
    folder, here = mine
    (here / "VAD_benchmark2_anna.txt").unlink()
    with pytest.warns(UserWarning, match="VAD_benchmark2_anna.txt: missing"):
        read = Locata(folder, tasks=[5])[0]
    assert read.activity.all()
    (here / "position_source_anna.txt").unlink()
    read = Locata(folder, tasks=[5])[0]
    assert (read.sources == () and read.directions.shape == (0, len(read.times), 3)
            and read.activity.shape == (0, len(read.times)))
    assert read.at(torch.tensor([0.2])).directions.shape == (0, 1, 3)


def test_locata_folder_without_audio_is_left_out_aloud(mine):
    folder, here = mine
    shutil.copytree(here, folder / "dev/task5/recording2/benchmark2")
    (folder / "dev/task5/recording2/benchmark2/audio_array_benchmark2.wav").unlink()
    with pytest.warns(UserWarning, match="recording2"): assert len(Locata(folder, tasks=[5])) == 1


@pytest.mark.parametrize("options, told", [
    ({"array": "benchmark"}, "did you mean 'benchmark2'"), ({"split": "test"}, "split='test'"),
    ({"tasks": [7]}, "tasks=7"), ({"tasks": [1]}, "task1: missing"),
    ({"channels": [0, 12]}, "0 to 11"), ({"channels": [1, 1]}, "channels=[1, 1]"),
    ({"channels": []}, "channels=[]"), ({"fs": 0}, "fs=0"),
    ({"array": "dicit"}, "no recording of dicit"), ({"folder": "/nowhere/locata"}, "'locata'"),
    ({"folder": None}, "SSL_NB_LOCATA")])
def test_locata_asked_wrongly(turning, options, told):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(told)):
        Locata(**{"folder": turning, "tasks": [5], **options})


@pytest.mark.parametrize("name", ["required_time.txt", "position_array_benchmark2.txt"])
def test_locata_a_missing_file_is_named(mine, name):
    (mine[1] / name).unlink()
    with pytest.raises(FileNotFoundError, match=name): Locata(mine[0], tasks=[5])[0]


def lines(edit):
    "A damage done to the lines of a text file."
    return lambda path: path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")


def cell(line, column, text):
    parts = line.split("\t"); parts[column] = text
    return "\t".join(parts)


DAMAGE = [
    ("position_array_benchmark2.txt",
     lines(lambda t: t[:5] + [t[5].rsplit("\t", 1)[0]] + t[6:]), "malformed"),
    ("position_array_benchmark2.txt",
     lines(lambda t: t[:-1]), "120 rows, required_time.txt has 121"),
    ("position_array_benchmark2.txt",
     lines(lambda t: [t[0].replace("mic12_z", "mic13_z")] + t[1:]), "no column mic12_z"),
    ("position_array_benchmark2.txt", lines(lambda t: [t[0] + "\tmore"] + t[1:]), "numbers a row"),
    ("position_array_benchmark2.txt",
     lines(lambda t: t[:20] + [cell(t[20], 12, "5")] + t[21:]), "a rotation is none"),
    ("position_array_benchmark2.txt",
     lines(lambda t: t[:20] + [cell(t[20], 6, "NaN")] + t[21:]), "a number is missing"),
    ("position_source_anna.txt",
     lines(lambda t: t[:20] + [cell(t[20], 7, "nan")] + t[21:]), "a position is missing"),
    ("position_source_anna.txt", lines(lambda t: t[:20]), "19 rows"),
    ("position_source_anna.txt", lambda p: p.write_bytes(b"\xff\xfe\x00"), "malformed"),
    ("required_time.txt", lines(lambda t: t[:1]), "no row of numbers"),
    ("required_time.txt", lines(lambda t: t[:20] + [cell(t[20], 5, "soon")] + t[21:]), "malformed"),
    ("required_time.txt", lines(lambda t: t[:20] + [cell(t[20], 1, "13")] + t[21:]), "no date"),
    ("required_time.txt", lines(lambda t: t[:20] + [t[50]] + t[20:50] + t[51:]), "backwards"),
    ("required_time.txt",
     lines(lambda t: t[:1] + [cell(line, 6, "0") for line in t[1:]]), "no valid time stamp"),
    ("VAD_benchmark2_anna.txt", lines(lambda t: t[:30000]), "29999 rows for 48000 samples"),
    ("VAD_benchmark2_anna.txt", lines(lambda t: t[:30000] + ["yes"] + t[30001:]), "malformed"),
    ("audio_array_benchmark2.wav", lambda p: p.write_bytes(p.read_bytes()[:-1000]), "cut off"),
    ("audio_array_benchmark2.wav", lambda p:
     soundfile.write(p, soundfile.read(p)[0][:, :11], 48000), "11 channels, benchmark2 has 12"),
    ("audio_array_benchmark2.wav",
     lambda p: soundfile.write(p, soundfile.read(p)[0][:20000], 48000), "cut off?"),
]


@pytest.mark.parametrize("name, damage, told", DAMAGE, ids=[f"{n}-{t}" for n, _, t in DAMAGE])
def test_locata_damage_is_named(mine, name, damage, told):
    damage(mine[1] / name)
    with pytest.raises(ValueError, match=re.escape(told)) as error: Locata(mine[0], tasks=[5])[0]
    assert name in str(error.value) or "cut off?" in told


# --- a recording's truth at other times -----------------------------------------------------------

def walk(times, angles_deg, **more):
    a = torch.tensor(angles_deg).deg2rad()
    n = len(times)
    return Recording(torch.zeros(1, 1000), 1000, torch.zeros(1, 3), torch.tensor(times),
                     torch.stack([a.cos(), a.sin(), 0 * a], -1)[None],
                     torch.tensor([[k % 2 == 0 for k in range(n)]]), ("a",), "walk",
                     torch.arange(n).float()[None] + 1, **more)


def test_truth_at_other_times():
    read = walk([0.1, 0.3, 0.3, 0.5], [0.0, 60.0, 60.0, 80.0])
    new = read.at(torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 1.0]))
    close(to_angles(new.directions[0])[0].rad2deg(), [0.0, 0, 30, 60, 70, 75, 80], 0.1)
    close(new.distances[0], [1.0, 1, 1.5, 2, 3.5, 3.75, 4], 1e-5)
    assert (new.activity[0].tolist() == [True, True, True, False, True, False, False]
            and new.directions.norm(dim=-1).allclose(torch.ones(1)))
    close(walk([0.0], [30.0]).at(torch.tensor([0.0, 0.7])).distances[0], [1.0, 1.0], 0)
    for bad in (-0.01, 1.01):
        with pytest.raises(ValueError, match="lasts from 0 to 1 s"):
            read.at(torch.tensor([0.5, bad]))


def test_positions_need_distances():
    from dataclasses import replace
    with pytest.raises(ValueError, match="only directions"):
        replace(walk([0.0], [30.0]), distances=None).positions


# --- Libri-adhoc40 --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def adhoc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adhoc")
    recordings.write_libriadhoc40(folder, "test", "3", ADHOC40_LOUDSPEAKERS["test"][3])
    recordings.write_libriadhoc40(folder, "train", "9d", (5.1, 3.6, 0.95))
    return folder


@pytest.mark.parametrize("split", ["test", "train"])
def test_adhoc40_sound_agrees_with_truth(adhoc, split):
    read = LibriAdhoc40(adhoc, split, channels=[39, 20, 11, 2])[0]
    shown = delays_from_gcc(gcc_phat(read.audio, max_lag=300), read.fs) * read.fs
    close(shown, tdoas(read.mics, read.positions[0, 0]) * read.fs, 0.1)
    assert len(read.times) == 1 and read.sources == ("229",)


def test_adhoc40_positions_are_those_of_the_readme():
    "Copied by hand from the README's tables; microphone 4 of the development grid is the misprint."
    for split, mic, place in (
            ("train", 1, (9.1, 5.2)), ("train", 2, (8.3, 6.0)), ("train", 7, (9.1, 0.4)),
            ("train", 12, (6.7, 4.4)), ("train", 20, (5.1, 4.4)), ("train", 37, (2.7, 2.0)),
            ("train", 40, (1.9, 1.2)), ("test", 1, (8.3, 6.0)), ("dev", 9, (6.7, 6.0)),
            ("test", 22, (5.1, 2.0)), ("dev", 40, (1.9, 0.4)), ("dev", 12, (6.7, 3.6))):
        close(ADHOC40_MICS[split][mic - 1], [*place, 0.9], 1e-5)
    assert (ADHOC40_LOUDSPEAKERS["train"][6] == (8.3, 2.0, 0.95) and ADHOC40_LOUDSPEAKERS["dev"][7]
            == (5.9, 5.2, 0.95) and ADHOC40_LOUDSPEAKERS["test"][1] == (2.7, 1.2, 0.95))


def test_adhoc40_damage_is_named(adhoc, tmp_path):
    folder = shutil.copytree(adhoc, tmp_path / "set")
    one = next(folder.rglob("adhoc40-test/*/*/*/*-ch-7.wav"))
    soundfile.write(one, np.zeros(4000), 16000)
    with pytest.raises(ValueError, match="ch-7.wav: 4000 samples"): LibriAdhoc40(folder)[0]
    soundfile.write(one, np.zeros((4800, 2)), 16000)
    with pytest.raises(ValueError, match="ch-7.wav: 2 channels"): LibriAdhoc40(folder)[0]
    one.unlink()
    with pytest.raises(FileNotFoundError, match="ch-7.wav"): LibriAdhoc40(folder)[0]
    # what is asked for is there
    assert LibriAdhoc40(folder, channels=[0, 1])[0].audio.shape[0] == 2
    (folder / "adhoc40-test/pos 3").rename(folder / "adhoc40-test/pos 11")
    with pytest.raises(ValueError, match="pos 11"): LibriAdhoc40(folder)[0]
    with pytest.raises(FileNotFoundError, match="adhoc40-dev"): LibriAdhoc40(folder, "dev")
    with pytest.raises(ValueError, match="split='val'"): LibriAdhoc40(folder, "val")


# --- RealMAN --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def realman(tmp_path_factory):
    folder = tmp_path_factory.mktemp("realman")
    recordings.write_realman(folder, start_deg=200.0, turning_deg=-90.0)
    recordings.write_realman(folder, motion="static", start_deg=250.0)
    return folder


@pytest.mark.parametrize("motion, channels",
                         [("moving", [0, 2, 9, 13, 18, 24]), ("static", [25, 27, 3, 17]),
                          ("static", [28, 29, 1, 31])])
def test_realman_sound_agrees_with_truth(realman, motion, channels):
    read = RealMAN(realman, motion=motion, channels=channels)[0]
    shown, demanded = heard_and_true(read, max_lag=14, distance=2.0)
    assert ((shown - demanded).abs().median() < 0.05 and (shown - demanded).abs().max() < 0.5
            and demanded.abs().max() > 0.4)
    assert (read.horizontal and read.directions[..., 2].abs().max() == 0
            and len(read.times) == (10 if motion == "moving" else 1))


def test_realman_labels_and_array(realman):
    moving, static = RealMAN(realman)[0], RealMAN(realman, motion="static")[0]
    close(moving.times[:2], [0.05, 0.15], 1e-6)
    close(to_angles(moving.directions[0])[0].rad2deg() % 360,
          200 - 90 * (torch.arange(10) + 0.5) / 10, 0.06)
    close(to_angles(static.directions[0])[0].rad2deg() % 360, [250.0], 1e-3)
    mics = realman_array()
    close(mics[[0, 1, 3, 11, 25, 27, 28]], [[0, 0, 0], [0.03, 0, 0], [0, 0.03, 0], [0, 0.06, 0],
                                            [-0.12, 0, 0], [0.15, 0, 0], [0, 0, 0.09]], 1e-6)
    assert torch.pdist(mics).min() > 0.02 and static.audio.shape == (32, 16000)


def test_realman_table_scenes_and_other_forms_of_names(realman, tmp_path):
    folder = shutil.copytree(realman, tmp_path / "set")
    labels = folder / "val/val_static_source_location.csv"
    table = pd.read_csv(labels, dtype=str)
    table["filename"] = table["filename"].str.replace(".flac", "_CH1.flac")
    table["ele"] = "-1000"
    table.to_csv(labels, index=False, encoding="utf-8-sig")
    read = RealMAN(folder, scenes=["OfficeRoom3"], motion="static")
    assert (read.table.scene.tolist() == ["OfficeRoom3"] and read.table.ele.tolist() == ["-1000"]
            and read[0].audio.shape[0] == 32)
    with pytest.raises(ValueError, match="did you mean 'OfficeRoom3'"):
        RealMAN(folder, scenes=["OfficeRoom"], motion="static")


@pytest.mark.parametrize("column, text, told", [("angle(°)", "12.0,x", "angle(°) of"),
                                                ("angle(°)", ",".join(["1.0"] * 40), "40 labels"),
                                                ("angle(°)", "inf", "not finite"),
                                                ("angle(°)", "", "empty cell"),
                                                ("filename", "a.flac", "is not SPLIT/KIND")])
def test_realman_malformed_labels(realman, tmp_path, column, text, told):
    folder = shutil.copytree(realman, tmp_path / "set")
    labels = folder / "val/val_moving_source_location.csv"
    table = pd.read_csv(labels, dtype=str)
    table[column] = text
    table.to_csv(labels, index=False)
    with pytest.raises(ValueError, match=re.escape(told)): RealMAN(folder)[0]
    table.drop(columns=column).to_csv(labels, index=False)
    with pytest.raises(ValueError, match=re.escape(column)): RealMAN(folder)


def test_realman_what_is_not_there(realman, tmp_path):
    with pytest.raises(FileNotFoundError, match="train_moving_source_location.csv"):
        RealMAN(realman, "train")
    with pytest.raises(ValueError, match="motion='walking'"): RealMAN(realman, motion="walking")
    folder = shutil.copytree(realman, tmp_path / "set")
    one = next(folder.rglob("*VAL_M*_CH5.flac"))
    one.write_bytes(one.read_bytes()[:5000])
    with pytest.raises(ValueError, match="_CH5.flac"): RealMAN(folder)[0]
    one.unlink()
    with pytest.raises(FileNotFoundError, match="_CH5.flac"): RealMAN(folder)[0]


# --- LibriSpeech ----------------------------------------------------------------------------------

def librispeech(root):
    for speaker, chapter, n in (("84", "121123", 2), ("84", "121550", 1), ("1272", "128104", 2)):
        (root / "dev-clean" / speaker / chapter).mkdir(parents=True)
        (root / f"dev-clean/{speaker}/{chapter}/{speaker}-{chapter}.trans.txt").write_text("x")
        for k in range(n):
            soundfile.write(root
                            / f"dev-clean/{speaker}/{chapter}/{speaker}-{chapter}-{k:04d}.flac",
                            0.1 * np.sin(np.arange(8000) * (k + 1) / 9), 16000)
    return root


def test_librispeech_is_speech(tmp_path):
    root = librispeech(tmp_path / "LibriSpeech")
    read = LibriSpeech(tmp_path, ["dev-clean"], fs=8000)
    assert (isinstance(read, Speech) and len(read) == 5 and read.table.voice.tolist()
            == ["1272", "1272", "84", "84", "84"] and len(read[0]) == 4000)
    first, again = (read.talk(1.0, torch.Generator().manual_seed(1)) for _ in range(2))
    assert len(first) == 8000 and first.equal(again)
    # the folder with the subsets will do
    assert LibriSpeech(root, "dev-clean").table.equals(read.table)
    with pytest.raises(FileNotFoundError, match="fetch librispeech --part test-clean"):
        LibriSpeech(tmp_path, "test-clean")
    with pytest.raises(ValueError, match="did you mean 'dev-clean'"):
        LibriSpeech(tmp_path, "dev_clean")
    one = next(root.rglob("*.flac"))
    one.write_bytes(one.read_bytes()[:-500])
    with pytest.raises(ValueError, match=one.name): list(LibriSpeech(tmp_path, "dev-clean"))


# --- what is there --------------------------------------------------------------------------------

def test_missing_names_what_is_not_there(mine, adhoc, realman, tmp_path):
    folder, here = mine
    for task in range(1, 7): (folder / f"dev/task{task}").mkdir(exist_ok=True)
    assert (missing_recordings("locata", folder)["dev"] == []
            and "task1: missing" in missing_recordings("locata", folder)["eval"][0])
    (here / "VAD_benchmark2_anna.txt").unlink(); (here / "required_time.txt").unlink()
    assert ({Path(m.removesuffix(": missing")).name
             for m in missing_recordings("locata", folder, "dev")["dev"]}
            == {"VAD_benchmark2_anna.txt", "required_time.txt"})
    assert (missing_recordings("libriadhoc40", adhoc, "test") == {"test": []}
            and list(missing_recordings("libriadhoc40", adhoc)) == ["train", "dev", "test"])
    assert missing_recordings("realman", realman, "val") == {"val": []}
    librispeech(tmp_path / "LibriSpeech")
    assert missing_recordings("librispeech", tmp_path,
                              "dev-clean") == {"dev-clean": ["dev-clean: 5 of 2703 utterances"]}
    with pytest.raises(ValueError, match="did you mean 'locata'"):
        missing_recordings("locatta", folder)
    with pytest.raises(ValueError, match="part='test'"):
        missing_recordings("locata", folder, "test")


# --- downloads ------------------------------------------------------------------------------------

class Server(http.server.ThreadingHTTPServer):
    "Serves bytes, with Range unless `ranges` is False; hangs up after `cut` bytes once."
    def __init__(self):
        self.body, self.cut, self.ranges, self.asked, self.sent = b"", None, True, [], 0
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        s = self.server
        given = self.headers.get("Range")
        s.asked.append(given)
        start = int(given[6:-1]) if given and s.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(s.body) - 1}/{len(s.body)}")
        self.send_header("Content-Length", str(len(s.body) - start))
        self.end_headers()
        end, s.cut = s.cut or len(s.body), None
        self.wfile.write(s.body[start:end])
        s.sent += len(s.body[start:end])
    def log_message(self, *args): pass


@pytest.fixture
def server():
    with Server() as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield s
        s.shutdown()


def tar(*members, mode="w:gz"):
    "A tar file of (name, bytes) or of ready TarInfo."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as t:
        for m in members:
            if isinstance(m, tarfile.TarInfo): t.addfile(m)
            else:
                info = tarfile.TarInfo(m[0]); info.size = len(m[1])
                t.addfile(info, io.BytesIO(m[1]))
    return buffer.getvalue()


def zipped(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, content in members: z.writestr(name, content)
    return buffer.getvalue()


GOOD = [("LibriSpeech/README.TXT", b"read"),
        ("LibriSpeech/dev-clean/84/1/84-1-0000.flac", np.random.default_rng(0).bytes(50000))]


def offer(server, folder, body, **more):
    "A table with one part whose archive the server holds."
    server.body = body
    row = {"set": "librispeech", "part": "dev-clean",
           "url": f"http://127.0.0.1:{server.server_port}/a", "bytes": len(body), "unpacked": 60000,
           "checksum": "sha256:" + hashlib.sha256(body).hexdigest(),
           "gives": "LibriSpeech/dev-clean", "licence": "mine", "instructions": "", **more}
    folder.mkdir(exist_ok=True)
    pd.DataFrame([row]).to_csv(folder / "recordings.csv", index=False)
    return folder / "recordings.csv"


def names(folder): return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("body, checksum", [(tar(*GOOD), "sha256"), (zipped(*GOOD), "sha256"),
                                            (tar(*GOOD, mode="w"), "md5")])
def test_fetch(server, tmp_path, body, checksum):
    table = offer(server, tmp_path / "t", body,
                  checksum=f"{checksum}:{hashlib.new(checksum, body).hexdigest()}")
    assert server.asked == []
    place, = fetch("librispeech", tmp_path / "here", progress=False, table=table)
    assert ((place / "84/1/84-1-0000.flac").read_bytes() == GOOD[1][1]
            and names(tmp_path / "here") == ["LibriSpeech"])
    (tmp_path / "here/LibriSpeech/mine.txt").write_text("keep")
    fetch("librispeech", tmp_path / "here", progress=False, table=table)
    assert server.asked == [None]  # it is there: nothing is asked for again
    shutil.rmtree(place)
    fetch("librispeech", tmp_path / "here", progress=False, table=table)
    assert (tmp_path / "here/LibriSpeech/mine.txt").read_text() == "keep" and place.is_dir()


def test_fetch_continues_after_a_broken_connection(server, tmp_path):
    body = tar(*GOOD)
    table, here = offer(server, tmp_path / "t", body), tmp_path / "here"
    for cut, total in ((20000, 20000), (30000, 30000)):
        server.cut = cut
        with pytest.raises(OSError, match=f"after {total} of {len(body)} bytes; run it again"):
            fetch("librispeech", here, progress=False, table=table)
        assert names(here) == ["librispeech-dev-clean.archive.part"]
    fetch("librispeech", here, progress=False, table=table)
    assert (server.asked == [None, "bytes=20000-", "bytes=30000-"] and server.sent == len(body)
            and names(here) == ["LibriSpeech"])


def test_fetch_starts_again_where_the_server_does_not_continue(server, tmp_path):
    table, here = offer(server, tmp_path / "t", tar(*GOOD)), tmp_path / "here"
    server.cut, server.ranges = 20000, False
    with pytest.raises(OSError): fetch("librispeech", here, progress=False, table=table)
    assert (fetch("librispeech", here, progress=False, table=table)[0].is_dir()
            and server.asked[1] == "bytes=20000-")


def test_fetch_refuses_a_wrong_checksum(server, tmp_path):
    body = tar(*GOOD)
    table, here = offer(server, tmp_path / "t", body, checksum="sha256:"
                        + hashlib.sha256(b"other").hexdigest()), tmp_path / "here"
    with pytest.raises(OSError, match="wrong checksum"):
        fetch("librispeech", here, progress=False, table=table)
    assert names(here) == []


def test_fetch_starts_anew_from_a_part_that_is_too_long(server, tmp_path):
    body = tar(*GOOD)
    table, here = offer(server, tmp_path / "t", body), tmp_path / "here"
    here.mkdir()
    (here / "librispeech-dev-clean.archive.part").write_bytes(body + b"more")
    assert (fetch("librispeech", here, progress=False, table=table)[0].is_dir()
            and server.asked == [None])


def test_fetch_stops_a_server_that_sends_without_end(server, tmp_path):
    table = offer(server, tmp_path / "t", tar(*GOOD), bytes=3000)
    server.body = bytes(5_000_000)
    with pytest.raises(OSError, match="more than the 3000 bytes"):
        fetch("librispeech", tmp_path / "here", progress=False, table=table)
    assert (tmp_path / "here/librispeech-dev-clean.archive.part").stat().st_size <= 1 << 20


def test_fetch_looks_at_the_disk_first(server, tmp_path, monkeypatch):
    table = offer(server, tmp_path / "t", tar(*GOOD))
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda folder: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(OSError, match="are free"):
        fetch("librispeech", tmp_path / "here", progress=False, table=table)
    assert server.asked == [] and names(tmp_path / "here") == []


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name); info.type, info.linkname = kind, target
    return info


def zip_link():
    info = zipfile.ZipInfo("LibriSpeech/dev-clean/out")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


BAD = {"tar upwards": tar(*GOOD, ("../evil.txt", b"x")),
       "tar deep": tar(*GOOD, ("LibriSpeech/../../evil.txt", b"x")),
       "tar link": tar(*GOOD, link("LibriSpeech/out", "/etc")),
       "tar link upwards": tar(*GOOD, link("LibriSpeech/out", "../../..")),
       "tar hard link": tar(*GOOD, link("LibriSpeech/out", "../../evil", tarfile.LNKTYPE)),
       "tar device": tar(*GOOD, link("LibriSpeech/device", "", tarfile.CHRTYPE)),
       "zip upwards": zipped(*GOOD, ("../evil.txt", b"x")),
       "zip absolute": zipped(*GOOD, ("/evil.txt", b"x")), "zip drive":
       zipped(*GOOD, ("C:/evil.txt", b"x")), "zip backslash": zipped(*GOOD, ("..\\evil.txt", b"x")),
       "zip link": zipped(*GOOD, (zip_link(), b"/etc")), "no archive": b"<html>sorry</html>" * 100}


@pytest.mark.parametrize("name", BAD)
def test_fetch_refuses_an_archive_that_leaves_its_folder(server, tmp_path, name):
    table, here = offer(server, tmp_path / "t", BAD[name]), tmp_path / "here"
    with pytest.raises(OSError, match="refused|neither"):
        fetch("librispeech", here, progress=False, table=table)
    # what was verified stays; nothing was unpacked
    assert names(here) == ["librispeech-dev-clean.archive"] and names(tmp_path) == ["here", "t"]


def test_an_absolute_name_in_a_tar_file_stays_inside(server, tmp_path):
    table = offer(server, tmp_path / "t", tar(*GOOD, (f"{tmp_path}/evil.txt", b"x")))
    fetch("librispeech", tmp_path / "here", progress=False, table=table)
    assert names(tmp_path) == ["here", "t"]  # Python's filter makes it relative


def test_a_zip_bomb_is_measured_before_it_is_unpacked(server, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("LibriSpeech/dev-clean/zeros", bytes(3_000_000))
    table = offer(server, tmp_path / "t", buffer.getvalue())
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda folder: shutil._ntuple_diskusage(10**7, 10**7 - 10**6, 10**6))
    with pytest.raises(OSError, match="are needed"):
        fetch("librispeech", tmp_path / "here", progress=False, table=table)
    assert names(tmp_path / "here") == ["librispeech-dev-clean.archive"]


@pytest.mark.parametrize("left", ["librispeech-dev-clean.archive",
                                  "librispeech-dev-clean.archive.part"])
def test_what_a_kill_left_is_used_or_cleaned_and_nothing_is_asked_for_twice(server, tmp_path, left):
    body, here = tar(*GOOD), tmp_path / "here"
    table = offer(server, tmp_path / "t", body)
    alive = f".unpack-{platform.node()}-{os.getpid()}-abc"
    def leave():
        here.mkdir(exist_ok=True)
        for name in (".unpack-abcdefgh", f".unpack-{platform.node()}-999999999-abc", alive,
                     ".unpack-other-host-1-abc"):
            (here / name / "x").mkdir(parents=True, exist_ok=True)
        (here / left).write_bytes(body)
    for _ in range(2):  # killed before the part was in place, and after
        leave()
        fetch("librispeech", here, progress=False, table=table)
        assert names(here) == sorted([".unpack-other-host-1-abc", alive, "LibriSpeech"])
    assert server.asked == []


def test_a_kill_while_the_parts_are_moved_in_loses_none(server, tmp_path, monkeypatch):
    table, here = offer(server, tmp_path / "t", tar(*GOOD)), tmp_path / "here"
    def killed(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(recordings, "_move_into", killed)
        fetch("librispeech", here, progress=False, table=table)
    fetch("librispeech", here, progress=False, table=table)
    assert server.asked == [None] and names(here / "LibriSpeech") == ["README.TXT", "dev-clean"]


def test_a_disk_that_fills_up_is_one_sentence_with_its_path(server, tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    table, here = offer(server, tmp_path / "t", tar(*GOOD)), tmp_path / "here"
    for name in ("_pour", "_extract"):
        with monkeypatch.context() as m, pytest.raises(OSError) as told:
            m.setattr(recordings, name, full)
            fetch("librispeech", here, progress=False, table=table)
        assert str(told.value) == f"{here}: the disk is full"
    assert fetch("librispeech", here, progress=False, table=table)[0].is_dir()


def test_an_archive_of_something_else(server, tmp_path):
    table = offer(server, tmp_path / "t", tar(("other/a", b"x")))
    with pytest.raises(OSError, match="holds no LibriSpeech/dev-clean"):
        fetch("librispeech", tmp_path / "here", progress=False, table=table)
    assert "other" not in names(tmp_path / "here")


def test_fetch_asked_wrongly(server, tmp_path):
    body = tar(*GOOD)
    for more in ({"url": "file:///etc/passwd"}, {"checksum": " "}, {"checksum": "md5:"}):
        table = offer(server, tmp_path / "t", body, **more)
        with pytest.raises(ValueError, match="no http address or no checksum"):
            fetch("librispeech", tmp_path / "here", progress=False, table=table)
    table = offer(server, tmp_path / "t", body)
    with pytest.raises(ValueError, match="part='test'"):
        fetch("librispeech", tmp_path / "here", "test", table=table)
    with pytest.raises(ValueError, match="SSL_NB_LIBRISPEECH"): fetch("librispeech", table=table)
    with pytest.raises(ValueError, match="ask its authors"):
        fetch("libriadhoc40", tmp_path / "here")
    with pytest.raises(OSError, match="run it again to continue"):
        fetch("librispeech", tmp_path / "here", progress=False,
              table=offer(server, tmp_path / "t", body, url="http://127.0.0.1:9/a"))
    assert server.asked == []


def test_the_published_table():
    table = downloads()
    assert set(table.set) == set(DATASETS) and not table.duplicated(["set", "part"]).any()
    plain = table[table.url != ""]
    assert (plain.checksum.str.fullmatch("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}").all()
            and plain.url.str.startswith("https://").all() and (plain.unpacked > plain.bytes).all())
    assert ((table[table.url == ""].instructions != "").all()
            and set(table[table.set == "librispeech"].part) == set(LIBRISPEECH))


def test_importing_reads_no_table(tmp_path):
    import subprocess, sys
    code = "import ssl_nb.workshop.speech"
    assert subprocess.run([sys.executable, "-c", code],
                          env={**os.environ, "SSL_NB_DATA": str(tmp_path),
                               "SSL_NB_SETTINGS": "/nowhere"}).returncode == 0


# --- the command ----------------------------------------------------------------------------------

def test_data_commands(server, tmp_path, realman):
    listed = call("data", "list", SSL_NB_REALMAN=str(realman))
    assert (listed.returncode == 0 and f"realman: {realman}" in listed.stdout
            and "train-clean-100: 6.39 GB" in listed.stdout and "ODC-BY" in listed.stdout)
    body = tar(*GOOD)
    offer(server, tmp_path / "t", body)
    here = {"SSL_NB_DATA": str(tmp_path / "t"), "SSL_NB_LIBRISPEECH": str(tmp_path / "here")}
    server.cut = 30000
    broken = call("data", "fetch", "librispeech", **here)
    assert (broken.returncode == 1 and "30000 of" in broken.stderr
            and "Traceback" not in broken.stderr)
    done = call("data", "fetch", "librispeech", "--part", "dev-clean", **here)
    assert (done.returncode == 0 and str(tmp_path / "here/LibriSpeech/dev-clean") in done.stdout
            and server.asked == [None, "bytes=30000-"])
    lacking = call("data", "check", "librispeech", "--part", "dev-clean", **here)
    assert lacking.returncode == 1 and "1 of 2703" in lacking.stdout
    whole = call("data", "check", "realman", "--part", "val", SSL_NB_REALMAN=str(realman))
    assert whole.returncode == 0 and "val: whole" in whole.stdout
    assert "here" in call("data", "list", **here).stdout


@pytest.mark.parametrize("words, told", [
    (["fetch", "locatta"], "did you mean 'locata'"), (["check", "locata"], "key 'locata'"),
    (["fetch", "realman"], "huggingface-cli"), (["fetch", "locata"], "SSL_NB_LOCATA"),
    (["check", "librispeech", "--part", "x"], "librispeech")])
def test_data_commands_refused(words, told):
    done = call("data", *words)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
