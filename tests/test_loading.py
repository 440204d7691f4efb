"""Loading, threads and the bench: what is read is what Zarr reads, nothing is left changed, and
hundreds of bad calls are refused in words."""
import dataclasses, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from ssl_nb.settings import Settings, load_settings, thread_environment, using_threads
from ssl_nb.workshop import scene_bank
from ssl_nb.workshop.scene_bank import SceneBank
from ssl_nb.workshop.scenes import SceneDataset, SceneSpec, SceneStore, as_index, write_scenes

ROOT = Path(__file__).parent.parent
SPEC = SceneSpec(seconds=0.1, fs=8000, array="compact", mics=((-0.1, 0, 0), (0.1, 0, 0)),
                 t60=(0.2, 0.3), size=((4, 5), (4, 5), (3, 3)))


# --- stores ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_store_reads_what_zarr_reads(tmp_path, precision):
    write_scenes(tmp_path / "s", SPEC, 7, shard=3, precision=precision, workers=0)
    store, group = SceneStore(tmp_path / "s"), zarr.open_group(str(tmp_path / "s"), mode="r")
    order = [6, 0, 3, -1, 0]
    for i, scene in zip(order, store.__getitems__(order)):
        for name, value in scene.items():
            kept = np.asarray(group[name][i % 7])
            assert np.array_equal(value.numpy(), kept.astype(value.numpy().dtype)), name


def test_a_turned_bit_in_any_tensor_is_found(tmp_path):
    write_scenes(tmp_path / "s", SPEC, 3, shard=3, workers=0)
    for file in [p for p in (tmp_path / "s").rglob("c/0*") if p.is_file()] + [
            p for p in (tmp_path / "s").rglob("c/0/**/0") if p.is_file()]:
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
            with pytest.raises(ValueError, match="checksum"):
                SceneStore(tmp_path / "s").__getitems__([0, 1, 2])
        file.write_bytes(whole)
    SceneStore(tmp_path / "s").__getitems__([0, 1, 2])


def test_an_opened_store_that_is_cut_says_so(tmp_path):
    write_scenes(tmp_path / "s", SPEC, 3, shard=3, workers=0)
    store, file = SceneStore(tmp_path / "s"), tmp_path / "s/audio/c/0/0/0"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises((ValueError, OSError)): store[0]


# --- banks ----------------------------------------------------------------------------------------

def test_spectra_that_are_kept_and_spectra_anew_give_the_same(monkeypatch):
    kept = SceneBank(SPEC, 5, per_room=2, fresh=False)
    monkeypatch.setattr(scene_bank, "SPECTRA_KEPT", 0)
    anew = SceneBank(SPEC, 5, per_room=2, fresh=False)
    assert "spectra" in kept.rooms[0] and "spectra" not in anew.rooms[0]
    for a, b in zip(kept.__getitems__(range(5)), anew.__getitems__(range(5))):
        torch.testing.assert_close(a["audio"], b["audio"], rtol=0, atol=1e-7)


def test_fresh_noise_has_the_snr_and_a_normal_distribution():
    spec = dataclasses.replace(SPEC, snr_db=(5, 5))
    noisy = SceneBank(spec, 64, per_room=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scenes = noisy.__getitems__(range(64))
    for s in scenes:
        # one microphone's clean signal is known: the image of the only source
        noise = (s["audio"][0] - s["images"][0]).double()
        fourth = float((noise**4).mean() / noise.square().mean()**2)
        assert 2 < fourth < 4.5  # 3 for a normal distribution; 800 samples
    ratio = torch.stack([s["images"][0].square().mean()
                         / (s["audio"][0] - s["images"][0]).square().mean() for s in scenes])
    # the SNR is that of the mean over the two microphones, which differ by some decibels
    assert abs(float(10 * ratio.log10().mean()) - 5) < 1


# --- threads --------------------------------------------------------------------------------------

def test_threads_are_put_back_also_after_an_error(tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(KeyError), using_threads(before + 1): raise KeyError
    assert torch.get_num_threads() == before
    with using_threads(before + 1):
        write_scenes(tmp_path / "s", SPEC, 2, workers=0)
        assert torch.get_num_threads() == before + 1


def test_a_variable_that_is_set_stands_and_several_processes_take_one_thread():
    nothing = Settings(Path(), Path(), Path(), threads=3)
    assert thread_environment(nothing, environ={})["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in thread_environment(nothing, environ={"OMP_NUM_THREADS": "7"})
    assert thread_environment(nothing, True, environ={})["MKL_NUM_THREADS"] == "1"
    assert "OMP_WAIT_POLICY" not in thread_environment(
        dataclasses.replace(nothing, waiting="spin"), environ={})


def test_importing_the_library_changes_no_thread():
    code = ("import os, torch\nbefore = dict(os.environ), torch.get_num_threads()\n"
            "import ssl_nb.settings, ssl_nb.workshop.scenes, ssl_nb.workbench.command_line\n"
            "assert (dict(os.environ), torch.get_num_threads()) == before")
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the bench ------------------------------------------------------------------------------------

def test_the_bench_compares_before_it_times_and_says_what_is_missing():
    import bench
    calls = []
    def gone(): raise ImportError("No module named 'nowhere'")
    case = bench.Case(lambda: torch.ones(3) * (calls.append(1) or 1), [
        bench.Peer("same", lambda: lambda: np.ones(3), bench.close(1e-6), times=2),
        bench.Peer("gone", gone, bench.close(1e-6))], work={"fft": 1e6})
    bench.ROWS["of a test"] = ("what", lambda: case, None)
    try:
        row = bench.measure_row("of a test", {"fft": 1e9})
        assert row["missing"] == ["gone: No module named 'nowhere'"] and row["best"] == "same"
        assert row["peers"][0]["part"] == 0.5 and row["from_limit"] == row["ours_ms"] / 1.0
        case.peers[0].build, before = lambda: lambda: np.zeros(3), len(calls)
        with pytest.raises(AssertionError, match="differ by 1"):
            bench.measure_row("of a test", {"fft": 1e9})
        assert len(calls) == before + 1, "nothing was timed"
    finally: del bench.ROWS["of a test"]


def test_the_bench_finds_the_exponent_of_a_quadratic_loop():
    import bench
    def loop(n): return lambda: sum(1 for _ in range(n * n))
    bench.GROWTHS["of a test"] = ("what", loop, (100, 200, 400))
    try: assert abs(bench.measure_growth("of a test")["exponent"] - 2) < 0.3
    finally: del bench.GROWTHS["of a test"]


# --- bad calls ------------------------------------------------------------------------------------

NO_NUMBER = ["x", None, [], {}, object(), float("nan"), float("inf"), 1j]
BAD_SPEC = {
    "seconds": [*NO_NUMBER, -1, 0, (1, 2)], "fs": [*NO_NUMBER, -1, 0, 100, 16000.5],
    "size": ["x", None, 5, (), (5, 4), (5, 4, 3, 2), (5, 4, -3), (0, 0, 0), (5, 4, "x"),
             (5, 4, float("nan")), ((5, 4), 4, 3), {}, object()],
    "t60": [*[v for v in NO_NUMBER if v is not None], -1, (0.5, 0.2), (0.1, 0.2, 0.3), 0.001],
    "method": ["x", None, 3, [], "Hybrid"], "array": ["x", None, 3, [], "ad hoc"],
    "noise": ["x", None, 3, [], "loud"], "motion": ["x", None, 3, [], "run"],
    "n_mics": [*NO_NUMBER, 0, -1, 2.5], "n_sources": [*NO_NUMBER, 0, -1, 1.5],
    "mics": [3, "x", ((0, 0),), ((0, 0, "x"),), ((0, 0, float("nan")),), object()],
    "mic_height": ["x", -1, (2, 1), 100, float("nan"), {}],
    "source_height": ["x", -1, (2, 1), 100, float("nan"), {}],
    "mic_jitter": [*NO_NUMBER, -1], "margin": [*NO_NUMBER, -1, 10],
    "min_distance": [*NO_NUMBER, -1], "placement_grid": [*NO_NUMBER, -1, 1, 1.5],
    "snr_db": ["x", None, [], (3, 1), float("nan"), {}, object()], "speech": [3, None, [], {}],
}
BAD_WRITING = {"count": [*NO_NUMBER, 0, -1, 2.5], "seed": [*NO_NUMBER, -1, 2.5, 2**40],
               "precision": ["x", None, 3, "float64", "int8"], "shard": [*NO_NUMBER, 0, -1, 1.5],
               "workers": [v for v in NO_NUMBER if v is not None] + [-1, 1.5],
               "path": [3, None, [], {}, 1.5], "spec": ["x", None, 3, {}, []]}
BAD_BANK = {"count": [*NO_NUMBER, 0, -1, 2.5], "seed": [*NO_NUMBER, -1, 2.5],
            "per_room": [*NO_NUMBER, 0, -1, 1.5], "kind": ["x", None, 3, []],
            "spec": ["x", None, 3, {}, []]}


def every(table): return [(name, value) for name, values in table.items() for value in values]
def named(value): return type(value).__name__


def each(table): return pytest.mark.parametrize("name, value", every(table), ids=named)


def refused(action, name):
    """The call ends in an exception that names the argument; a wrong type may also be refused by
    the annotations, which the tests check."""
    with pytest.raises(Exception) as told: action()
    kind = type(told.value).__name__
    assert "Violation" in kind or (isinstance(told.value, (ValueError, TypeError))
                                   and name in str(told.value)), f"{kind}: {told.value}"


@each(BAD_SPEC)
def test_bad_specifications(name, value):
    refused(lambda: SceneSpec(**{name: value}), name)


@each(BAD_WRITING)
def test_bad_writing(tmp_path, name, value):
    good = {"path": tmp_path / "s", "spec": SPEC, "count": 2, "workers": 0}
    refused(lambda: write_scenes(**good | {name: value}), name)


@each(BAD_BANK)
def test_bad_banks(name, value):
    refused(lambda: SceneBank(**{"spec": SPEC, "count": 2} | {name: value}), name)


@each({k: BAD_BANK[k] for k in ("count", "seed", "spec")})
def test_bad_datasets(name, value):
    refused(lambda: SceneDataset(**{"spec": SPEC, "count": 2} | {name: value}), name)


@pytest.mark.parametrize("value", [*NO_NUMBER, 1.5, "1", (0, 1), slice(2)], ids=named)
def test_bad_indices(value): refused(lambda: as_index(value, 3), "index")


@pytest.mark.parametrize("value", [3, -4, 10**9, np.int64(3)], ids=named)
def test_indices_outside(value):
    with pytest.raises(IndexError, match="there are 3"): as_index(value, 3)


@pytest.mark.parametrize("value", [*NO_NUMBER, 0, -1, 1.5, "auto", True, 10**6], ids=named)
def test_bad_threads(value):
    def use():
        with using_threads(value): pass
    refused(use, "threads")


@pytest.mark.parametrize("key, value", [(k, v) for k in ("threads", "waiting") for v in (
    "", "0", "-1", "1.5", "all", "Sleep", "x", "99999")], ids=named)
def test_bad_thread_settings(tmp_path, key, value):
    (tmp_path / "settings.ini").write_text(f"[ssl_nb]\n{key} = {value}\n")
    refused(lambda: load_settings(tmp_path / "settings.ini", {}), key)
