"""Specifications, scenes and stores: what is refused, what is the same, and what survives being
killed."""
import dataclasses, errno, os, shutil, signal, subprocess, sys, time, zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from ssl_nb.workshop import scene_bank, scenes
from ssl_nb.workshop.scene_bank import SceneBank
from ssl_nb.workshop.scenes import (SceneDataset, SceneSpec, SceneStore, scene_generator,
                                    simulate_scene, write_scenes)
from ssl_nb.workshop.speech import speech
from ssl_nb.acoustics.geometry import distances

TINY = SceneSpec(seconds=0.1, array="compact", mics=((-0.1, 0, 0), (0.1, 0, 0)), t60=(0.2, 0.2),
                 size=((4, 5), (4, 5), (3, 3)))


# --- specifications -------------------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    ({"t60": (-0.1, 0.5)}, "t60="), ({"t60": (0.0, 0.5)}, "t60="),
    ({"t60": (0.3, float("nan"))}, "t60="), ({"size": ((4, 8), (4, 8))}, "size="),
    ({"size": ((0.5, 8), (4, 8), (3, 3))}, "size="), ({"snr_db": (10, 5)}, "snr_db="),
    ({"seconds": 0.0}, "seconds=0.0"), ({"fs": 100}, "fs=100"),
    ({"n_mics": 0}, "n_mics=0"), ({"n_sources": 0}, "n_sources=0"),
    ({"array": "wall", "mic_height": (1, 1)}, "mic_height="), ({"array": "compact"}, "mics="),
    ({"array": "fixed", "mics": ((9, 1, 1),)}, "mics: not all"),
    ({"array": "compact", "mics": ((9, 1),)}, "mics: shape"), ({"noise": "wind"}, "noise='wind'"),
    ({"motion": "wal"}, "did you mean 'walk'"), ({"placement_grid": 2}, "fewer cells"),
    ({"placement_grid": 8, "motion": "line"}, "placement_grid=8"),
    ({"source_height": (1, 9)}, "source_height="), ({"margin": -1.0}, "margin=-1.0"),
    ({"mic_jitter": float("inf")}, "mic_jitter=inf"), ({"method": "ray"}, "method='ray'"),
    ({"size": 5}, "size=5"),
    ({"size": (5, "wide", 3)}, "size='wide'"), ({"fs": 16000.5}, "fs=16000.5"),
    ({"t60": None}, "t60=None"), ({"snr_db": "loud"}, "snr_db='loud'"),
    ({"n_mics": 2.5}, "n_mics=2.5"), ({"mics": ((0, 0, float("nan")),)}, "mics: nan"),
])
def test_impossible_specifications_are_refused(change, words):
    with pytest.raises(ValueError, match=words): SceneSpec(**change)


def test_specifications_travel_as_json_and_can_be_keys():
    spec = SceneSpec(mics=[[0, 0, 0], [0.1, 0, 0]], array="compact", size=[[4, 5], [4, 5], [3, 3]])
    assert (SceneSpec.from_json(spec.to_json()) == spec
            and {spec: 1}[SceneSpec.from_json(spec.to_json())] == 1)
    with pytest.raises(ValueError, match="secnds: unknown .* did you mean 'seconds'"):
        SceneSpec.from_json('{"secnds": 1}')


def test_a_number_is_the_range_of_itself_and_arrays_are_taken(tmp_path):
    spec = SceneSpec(t60=.5, size=(5, 4, 3), snr_db=np.float32(20), mic_height=1, n_mics=3.0,
                     speech=tmp_path)
    pairs = SceneSpec(t60=(.5, .5), size=((5, 5), (4, 4), (3, 3)), snr_db=(20, 20),
                      mic_height=(1, 1), n_mics=3, speech=str(tmp_path))
    assert spec == pairs and spec.to_json() == pairs.to_json() and hash(spec) == hash(pairs)
    mics = [[-0.1, 0.0, 0.0], [0.1, 0.0, 0.0]]
    for kind in (np.array, torch.tensor, tuple):
        given = SceneSpec(array="compact", mics=kind(mics), size=kind([5.0, 4.0, 3.0]))
        torch.testing.assert_close(torch.tensor(given.mics), torch.tensor(mics))
        assert given.size == ((5, 5), (4, 4), (3, 3))


# --- scenes ---------------------------------------------------------------------------------------

ALL_KINDS = [TINY, SceneSpec(seconds=0.1, n_sources=2, placement_grid=8, n_mics=4,
                             mic_height=(0.9, 0.9), source_height=(1.5, 1.5)),
             SceneSpec(seconds=0.3, array="robot_head", motion="walk",
                       source_height=(1.6, 1.6), noise="diffuse"),
             SceneSpec(seconds=0.3, array="wall", motion="line", n_sources=2, noise="directional",
                       method="anechoic", t60=(0, 0)),
             SceneSpec(seconds=0.1, array="fixed", mics=((1, 1, 1), (2, 1, 1)), mic_jitter=0.01,
                       method="image", t60=(0.2, 0.25), noise="none")]


@pytest.mark.parametrize("spec", ALL_KINDS, ids=lambda s: f"{s.array}-{s.motion}-{s.noise}")
def test_scenes_hold_what_was_asked_for(spec):
    voices = speech("train")
    for i in range(3):
        scene = simulate_scene(spec, voices, scene_generator(3, i))
        size, frames = scene["size"], int(spec.seconds * 50)
        assert (scene["audio"].shape == (len(scene["mics"]), round(spec.seconds * spec.fs))
                and torch.isfinite(scene["audio"]).all() and scene["audio"].any())
        assert scene["sources"].shape == ((spec.n_sources, 3) if spec.motion == "static"
                                          else (spec.n_sources, frames, 3))
        assert scene["activity"].shape == (spec.n_sources, frames)
        assert (all(low <= v <= high for v, (low, high) in zip(size.double() + 0, spec.size))
                and (scene["sources"] >= 0).all() and (scene["sources"] <= size).all())
        if spec.source_height:
            assert (scene["sources"][..., 2] - spec.source_height[0]).abs().max() < 1e-5
        if spec.t60[1]: assert spec.t60[0] - 1e-6 <= scene["t60"] <= max(spec.t60[1], 0.2) + 1e-6
        if not spec.placement_grid:
            assert distances(scene["mics"], scene["sources"]).min() > spec.min_distance - 0.05


def test_a_grid_puts_nobody_into_the_same_cell():
    spec, voices = ALL_KINDS[1], speech("train")
    for i in range(20):
        scene = simulate_scene(spec, voices, scene_generator(0, i))
        places = torch.cat([scene["mics"], scene["sources"]])[:, :2] / scene["size"][:2] * 8
        assert len({tuple(cell) for cell in places.floor().int().tolist()}) == 6
        torch.testing.assert_close(places - places.floor(), torch.full_like(places, 0.5), rtol=0,
                                   atol=1e-4)


def test_snr_is_what_the_scene_says():
    quiet = dataclasses.replace(TINY, snr_db=(7, 7))
    voices = speech("train")
    noisy, clean = (simulate_scene(s, voices, scene_generator(0, 1))["audio"]
                    for s in (quiet, dataclasses.replace(quiet, noise="none")))
    snr = 10 * torch.log10(clean.square().mean() / (noisy - clean).square().mean())
    assert abs(snr - 7) < 0.5


def test_workers_and_order_change_nothing():
    dataset = SceneDataset(TINY, 12, seed=5)
    forward = torch.stack([dataset[i]["audio"] for i in range(12)])
    backward = torch.stack([dataset[i]["audio"] for i in reversed(range(12))]).flip(0)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=2)
    assert forward.equal(backward) and forward.equal(torch.cat([b["audio"] for b in loader]))
    assert not forward.equal(torch.stack([SceneDataset(TINY, 12, seed=6)[i]["audio"]
                                          for i in range(12)]))
    assert dataset[-1]["audio"].equal(forward[-1])
    with pytest.raises(IndexError, match="there are 12"): dataset[12]


# --- stores ---------------------------------------------------------------------------------------

def test_a_store_returns_the_scenes(tmp_path):
    store, dataset = SceneStore.write(tmp_path / "s", TINY, 10, seed=2, shard=4,
                                      workers=0), SceneDataset(TINY, 10, seed=2)
    assert len(store) == 10 and not (tmp_path / "s.partial").exists()
    for i in range(10):
        scene = store[i]
        assert all(scene[k].equal(v) for k, v in dataset[i].items())
    loader = torch.utils.data.DataLoader(store, batch_size=5, num_workers=2)
    assert torch.cat([b["audio"]
                      for b in loader]).equal(torch.stack([dataset[i]["audio"] for i in range(10)]))


def test_a_store_of_the_first_version_stays_readable(tmp_path):
    zipfile.ZipFile(Path(__file__).with_name("store_v1.zip")).extractall(tmp_path)
    path = tmp_path / "store"
    spec = SceneSpec(seconds=0.05, fs=4000, array="compact", mics=((-0.1, 0, 0), (0.1, 0, 0)),
                     t60=(0.2, 0.3), size=((4, 5), (4, 5), (3, 3)))
    store = SceneStore(path, checksums=True)
    assert store.spec == spec and len(store) == 3 and store[2]["audio"].shape == (2, 200)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    SceneStore.write(path, spec, 3, seed=5, shard=2, precision="float16", workers=0)
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before, "all is there"
    for i, drawn in enumerate(SceneDataset(spec, 3, seed=5)[k] for k in range(3)):
        torch.testing.assert_close(store[i]["sources"], drawn["sources"])


def test_what_is_zero_throughout_a_shard_is_stored(tmp_path):
    dry = SceneSpec(seconds=0.05, fs=4000, t60=0, n_mics=2, method="anechoic", snr_db=0,
                    source_height=(0.5, 0.5), size=(4, 4, 3))
    store, dataset = (SceneStore.write(tmp_path / "s", dry, 5, shard=2, workers=0),
                      SceneDataset(dry, 5))
    for i in range(5):
        assert all(store[i][k].equal(v) for k, v in dataset[i].items())
    SceneStore(tmp_path / "s", checksums=True)


def test_half_precision_loses_little_and_halves_the_files(tmp_path):
    store, half = (SceneStore.write(tmp_path / p, TINY, 4, precision=p, workers=0, shard=4)
                   for p in ("float32", "float16"))
    audio, rounded = store[1]["audio"], half[1]["audio"]
    assert (rounded.dtype == torch.float32
            and (audio - rounded).square().mean() < 1e-6 * audio.square().mean())
    size = lambda p: (tmp_path / p / "audio" / "c" / "0" / "0" / "0").stat().st_size
    assert size("float16") < 0.51 * size("float32")


def test_damage_is_noticed_and_repaired(tmp_path):
    path = tmp_path / "s"
    SceneStore.write(path, TINY, 8, shard=4, workers=0)
    file = path / "audio" / "c" / "1" / "0" / "0"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="missing or damaged: 1, the first is number 1"):
        SceneStore(path)
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match="missing or damaged: 1"): SceneStore(path, checksums=True)
    with pytest.raises(Exception, match="checksum"): [SceneStore(path)[i] for i in range(4, 8)]
    assert (SceneStore.write(path, TINY, 8, shard=4, workers=0)[6]["audio"]
            .equal(SceneDataset(TINY, 8)[6]["audio"]) and file.read_bytes() == whole)
    receipt = path / "receipts" / "000000.json"
    for broken in ("{", "[]", "{}", None):
        receipt.unlink() if broken is None else receipt.write_text(broken)
        with pytest.raises(ValueError, match="the first is number 0"): SceneStore(path)


@pytest.mark.parametrize("lost",
                         ["zarr.json", "t60/zarr.json", "audio/zarr.json", "audio", "receipts"])
def test_what_a_store_has_lost_is_named_and_written_again(tmp_path, lost):
    path, dataset = tmp_path / "s", SceneDataset(TINY, 4)
    SceneStore.write(path, TINY, 4, shard=2, workers=0)
    if (path / lost).is_dir(): shutil.rmtree(path / lost)
    else: (path / lost).write_text("{broken") if lost == "zarr.json" else (path / lost).unlink()
    with pytest.raises(ValueError, match="lost|missing or damaged: 2"): SceneStore(path)
    store = SceneStore.write(path, TINY, 4, shard=2, workers=0)
    assert all(store[i]["audio"].equal(dataset[i]["audio"]) for i in range(4))
    assert not list(path.rglob(".again-*"))


def test_a_broken_description_is_one_sentence(tmp_path):
    SceneStore.write(tmp_path / "s", TINY, 2, workers=0)
    for text in ("{broken", "[]", "{}"):
        (tmp_path / "s/about.json").write_text(text)
        for action in (lambda: SceneStore(tmp_path / "s"),
                       lambda: SceneStore.write(tmp_path / "s", TINY, 2, workers=0)):
            with pytest.raises(ValueError, match="about.json: cannot be read .* delete"): action()


def test_leftovers_of_killed_writers_go(tmp_path):
    SceneStore.write(tmp_path / "s", TINY, 4, shard=2, workers=0)
    (tmp_path / "s").rename(tmp_path / "s.partial")
    left = [tmp_path / "s.partial" / name for name in ("receipts/.000001.json.4711",
            ".about.json.4711", "audio/c/0/0/0.partial", ".again-x/zarr.json")]
    for file in left: file.parent.mkdir(exist_ok=True); file.write_text("half")
    SceneStore.write(tmp_path / "s", TINY, 4, shard=2, workers=0)
    assert not [p for p in (tmp_path / "s").rglob("*") if "47" in p.name or "again" in p.name
                or p.suffix == ".partial"]


def test_a_full_disk_is_one_sentence_with_its_path(tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(scenes, "_write_atomically", full)
    with pytest.raises(OSError) as told: write_scenes(tmp_path / "s", TINY, 2, workers=0)
    assert str(told.value) == f"{tmp_path / 's'}: the disk is full"


def test_a_scheduler_that_is_not_there_or_has_no_workers(tmp_path, monkeypatch):
    from distributed import LocalCluster
    monkeypatch.setattr(scenes, "_PATIENCE", 0.5)
    with pytest.raises(ValueError, match="does not answer"):
        write_scenes(tmp_path / "s", TINY, 2, scheduler="tcp:/x")
    with LocalCluster(n_workers=0, processes=False, dashboard_address=None) as empty:
        with pytest.raises(ValueError, match="has no workers after 0.5 s"):
            write_scenes(tmp_path / "s", TINY, 2, scheduler=empty.scheduler_address)


@pytest.mark.parametrize("change, words", [({"spec": dataclasses.replace(
    TINY, seconds=0.2)}, "seconds is 0.1, wanted 0.2"), ({"count": 9}, "count is 8, wanted 9"),
    ({"seed": 1}, "seed is 0, wanted 1"), ({"precision": "float16"}, "precision is 'float32'")])
def test_stores_are_not_mixed(tmp_path, change, words):
    arguments = {"spec": TINY, "count": 8, "shard": 8, "workers": 0}
    SceneStore.write(tmp_path / "s", **arguments)
    with pytest.raises(ValueError, match=words):
        SceneStore.write(tmp_path / "s", **arguments | change)


def test_no_store_and_other_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no scene store there"):
        SceneStore(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="holds no scenes"):
        write_scenes(tmp_path / "mine", TINY, 4, workers=0)
    for wrong, words in (({"precision": "int8"}, "precision='int8'"), ({"shard": 0}, "shard=0"),
                         ({"count": 0}, "count=0"), ({"seed": -1}, "seed=-1"),
                         ({"workers": -1}, "workers=-1"), ({"count": 2.5}, "count=2.5")):
        with pytest.raises(ValueError, match=words):
            write_scenes(tmp_path / "x", **{"spec": TINY, "count": 4, "workers": 0} | wrong)


def test_a_killed_writer_goes_on_where_it_was(tmp_path):
    code = (f"from ssl_nb.workshop.scenes import *\nif __name__ == '__main__':\n    "
            f"write_scenes({str(tmp_path / 's')!r}, "
            f"SceneSpec.from_json({TINY.to_json()!r}), 200, shard=2, workers=2, progress=False)")
    script = tmp_path / "write.py"
    script.write_text(code)
    writer = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    receipts = tmp_path / "s.partial" / "receipts"
    deadline = time.time() + 90
    while time.time() < deadline and (not receipts.is_dir()
                                      or len(list(receipts.glob("0*.json"))) < 6):
        time.sleep(0.05)
    os.killpg(writer.pid, signal.SIGKILL)  # the writer, its nannies and its workers
    writer.wait()
    done = {p.name: p.stat().st_mtime_ns for p in receipts.glob("0*.json")}
    assert 6 <= len(done) < 100, "killed in the middle"
    with pytest.raises(ValueError, match="unfinished"): SceneStore(tmp_path / "s")
    store = SceneStore.write(tmp_path / "s", TINY, 200, shard=2, workers=0)
    assert (len(store) == 200 and not (tmp_path / "s.partial").exists()
            and not list((tmp_path / "s").rglob("*.partial")))
    assert all((tmp_path / "s" / "receipts" / name).stat().st_mtime_ns == when
               for name, when in done.items()), "nothing is computed twice"
    for i in (0, 57, 199): assert store[i]["audio"].equal(SceneDataset(TINY, 200)[i]["audio"])
    SceneStore(tmp_path / "s", checksums=True)


def test_memory_stays_flat(tmp_path):
    """Four times the scenes must not need more memory: resident size of one process, after shards
    and at the end."""
    code = (f"import resource, torch\nfrom ssl_nb.workshop.scenes "
            f"import *\nspec = SceneSpec.from_json({TINY.to_json()!r})\nfor n in (40, 160):\n"
            f"    write_scenes({str(tmp_path)!r} + f'/{{n}}', spec, n, shard=20, workers=0, "
            f"progress=False)\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    few, many = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True,
                                        text=True, check=True).stdout.split())
    assert many < few + 30_000  # kB


# --- banks ----------------------------------------------------------------------------------------

BANK = SceneSpec(seconds=0.2, array="compact", mics=((-0.1, 0, 0), (0.1, 0, 0)), t60=(0.2, 0.3),
                 size=((4, 5), (4, 5), (3, 3)), n_sources=2)


def test_a_test_bank_is_the_same_whatever_the_batch_and_a_fresh_one_follows_the_global_seed():
    fixed, again = SceneBank(BANK, 7, 3, per_room=3,
                             fresh=False), SceneBank(BANK, 7, 3, per_room=3, fresh=False)
    torch.testing.assert_close(fixed[5]["audio"], again.__getitems__([0, 5, 2])[1]["audio"], rtol=0,
                               atol=1e-6)
    before = torch.get_rng_state(); fixed[0]; assert torch.equal(before, torch.get_rng_state())
    fresh = SceneBank(BANK, 7, 3, per_room=3)
    with torch.random.fork_rng():
        torch.manual_seed(1); a, b = fresh[5], fresh[5]
        torch.manual_seed(1); c = fresh[5]
    assert (torch.equal(a["audio"], c["audio"]) and not torch.allclose(a["audio"], b["audio"])
            and torch.equal(a["sources"], b["sources"]))


def test_rooms_are_shared_by_so_many_scenes_and_the_last_room_may_have_fewer():
    bank = SceneBank(BANK, 7, 0, per_room=3)
    scenes = bank.__getitems__(range(7))
    assert ([float(s["t60"]) == float(scenes[0]["t60"]) for s in scenes] == [True] * 3 + [False] * 4
            and len(bank.rooms) == 3)
    assert len({tuple(s["sources"].flatten().tolist()) for s in scenes}) == 7
    assert bank.nbytes == sum(2 * 2 * 4 * r["rirs"].shape[-1] * n
                              for r, n in zip(bank.rooms, (3, 3, 1)))


def test_a_bank_hears_what_an_outside_convolution_hears():
    bank = SceneBank(dataclasses.replace(BANK, noise="none"), 3, 0, fresh=False)
    scene, g = bank[1], scene_generator(0, bank.count + 1)
    words, _ = scene_bank._draw_words(bank.tracks, "stretch", 2, 3200, bank.taps, g)
    outside = [sum(scipy.signal.fftconvolve(w.double(), h.double())[bank.taps:bank.taps + 3200]
                   for w, h in zip(words, bank.rooms[1]["rirs"][0][:, m])) for m in range(2)]
    assert (np.abs(scene["audio"].double().numpy() - np.array(outside)).max()
            < 1e-5 * np.abs(outside).max())
    torch.testing.assert_close(scene["images"].sum(0), scene["audio"][0], rtol=0, atol=1e-6)
    assert torch.isinf(scene["snr_db"])


def test_a_bank_of_digits_says_one_whole_digit_and_tells_which():
    bank = SceneBank(dataclasses.replace(BANK, seconds=1.0, n_sources=1, t60=(0, 0),
                                         method="anechoic", noise="none"), 2, 0, kind="digit")
    with torch.random.fork_rng(): torch.manual_seed(0); said = [bank[0] for _ in range(60)]
    assert {int(s["words"]) for s in said} == set(range(10))
    table = bank.tracks
    spoken, _ = scene_bank._draw_words(table, "digit", 1, 16000, 500,
                                       torch.Generator().manual_seed(0))
    # nothing before the recording begins
    assert spoken.shape == (1, 16500) and spoken[:, :500].abs().max() == 0
    onsets = {int(scene_bank._draw_words(table, "digit", 1, 32000, 0, torch.Generator().manual_seed(
        k))[0][0].abs().gt(0).nonzero()[0]) for k in range(8)}
    assert len(onsets) == 8 and max(onsets) - min(onsets) > 4000  # the word may lie anywhere
    energy = {d: sorted(float(u.square().sum()) for a, digits in table.words
                        for u, k in zip(a, digits) if k == d) for d in range(10)}
    distance = (bank.rooms[0]["sources"][0, 0] - bank.rooms[0]["real"][0]).norm()
    # anechoic: the image is the word over its distance, unless its end arrives too late
    for s in said[:10]:
        assert min(abs(float(s["images"].square().sum() * distance**2) / e - 1)
                   for e in energy[int(s["words"])]) < 0.05


@pytest.mark.parametrize("change, words", [
    ({"count": 0}, "count=0"), ({"per_room": 0}, "per_room=0"),
    ({"kind": "vowel"}, "kind='vowel'"), ({"seed": -1}, "seed=-1"),
    ({"spec": dataclasses.replace(BANK, motion="line", seconds=1.0)}, "motion='line'")])
def test_bad_banks_are_refused(change, words):
    with pytest.raises(ValueError, match=words): SceneBank(**{"spec": BANK, "count": 3, **change})


def test_a_bank_takes_the_numbers_of_numpy():
    assert len(SceneBank(BANK, np.int64(2), np.int64(3), per_room=2.0)) == 2


def test_words_that_do_not_fit_and_indices_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="too short for an utterance"), torch.random.fork_rng():
        SceneBank(BANK, 1, kind="digit")[0]
    with pytest.raises(ValueError, match="more than the voice"):
        SceneBank(dataclasses.replace(BANK, seconds=100.0), 1)[0]
    with pytest.raises(IndexError, match="index=3"): SceneBank(BANK, 3)[3]
