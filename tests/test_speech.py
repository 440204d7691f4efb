"""The embedded speech: what it promises, and every way it can be damaged."""
import os, shutil, sys, warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
from ssl_nb.workshop.speech import SPLITS, speech
from ssl_nb.settings import load_settings

DATA = load_settings().data


def test_format_and_promises():
    sets = {s: speech(s) for s in SPLITS}
    voices = [set(s.table.voice) for s in sets.values()]
    texts = [set(s.table[s.table.kind == "sentence"].text) for s in sets.values()]
    assert (len(set.union(*voices)) == sum(map(len, voices)) >= 10
            and len(set.union(*texts)) == sum(map(len, texts)))
    for s in sets.values():
        for voice, rows in s.table.groupby("voice"):
            assert (rows.kind == "sentence").sum() >= 30, voice
            assert ((rows[rows.kind == "digit"].groupby("digit")["style"].nunique() == 3).all()
                    and rows.digit.nunique() == 10), voice
    files = sorted((DATA / "speech").rglob("*.flac"))
    assert (len(files) == sum(map(len, sets.values()))
            and sum(f.stat().st_size for f in files) < 17e6)
    for f in files[::7]:
        info = soundfile.info(f)
        assert (info.samplerate, info.channels, info.format,
                info.subtype) == (16000, 1, "FLAC", "PCM_16")
        assert 0.01 < np.abs(soundfile.read(f)[0]).max() < 1


@pytest.fixture
def copied(tmp_path, monkeypatch):
    shutil.copytree(DATA / "speech", tmp_path / "speech")
    monkeypatch.setenv("SSL_NB_DATA", str(tmp_path))
    return tmp_path / "speech"


@pytest.mark.parametrize("victim", ["flite_awb/sentence_03.flac", "index.csv"])
@pytest.mark.parametrize("damage", ["missing", "one bit", "truncated", "empty"])
def test_damage_is_named(copied, victim, damage):
    path = copied / victim
    content = bytearray(path.read_bytes())
    if damage == "missing": path.unlink()
    if damage == "one bit": content[len(content) // 2] ^= 4; path.write_bytes(content)
    if damage == "truncated": path.write_bytes(content[:-7])
    if damage == "empty": path.write_bytes(b"")
    with pytest.raises((ValueError, FileNotFoundError)) as told: speech("test")
    assert (Path(victim).name in str(told.value)
            and ("missing" if damage == "missing" else "damaged") in str(told.value))


def test_missing_checksums(copied):
    (copied / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS"): speech("train")


def test_own_folder(tmp_path):
    t = np.arange(44100) / 44100
    (tmp_path / "ann").mkdir()
    soundfile.write(tmp_path / "ann" / "a.wav", np.stack([np.sin(900 * t), np.zeros_like(t)], 1),
                    44100)
    soundfile.write(tmp_path / "b.flac", 0.5 * np.sin(900 * t[:8000]), 8000)
    soundfile.write(tmp_path / "c.ogg", 0.5 * np.sin(900 * t), 44100)
    (tmp_path / "notes.txt").write_text("not audio")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = speech(tmp_path, fs=16000)
    assert (len(own) == 3 and [len(u) for u in own] == [16000] * 3
            and set(own.table.voice) == {"ann", tmp_path.name})
    halves = speech(tmp_path, channel="mean")
    assert abs(float(halves[0].abs().max()) - 0.5) < 0.05 < float(own[0].abs().max())


def test_unreadable_files_are_named_once(tmp_path):
    for name in ("x.wav", "y.flac"): (tmp_path / name).write_bytes(b"junk")
    soundfile.write(tmp_path / "ok.wav", np.ones(100) * 0.1, 8000)
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 16000),
                    16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:5000])
    with pytest.warns(UserWarning) as seen: own = speech(tmp_path)
    assert len(seen) == 1 and all(n in str(seen[0].message)
                                  for n in ("x.wav", "y.flac", "cut.flac")) and len(own) == 1
    (tmp_path / "ok.wav").unlink()
    with pytest.raises(ValueError, match="no readable sound file"): speech(tmp_path)


def test_sounds_of_other_formats_are_read_or_named(tmp_path):
    t = np.sin(np.arange(8000) / 8)
    for name, form in (("a.wav", "WAV"), ("b.aif", "AIFF"), ("c.au", "AU"), ("d.W64", "W64"),
                       ("e.caf", "CAF"), ("f.oga", "OGG")):
        soundfile.write(tmp_path / name, t, 8000, format=form)
    for name in ("x.m4a", "y.WMA", "z.opus"): (tmp_path / name).write_bytes(b"something")
    (tmp_path / "notes.txt").write_text("no sound, no warning")
    with pytest.warns(UserWarning) as seen: own = speech(tmp_path)
    assert sorted(own.table.file) == ["a.wav", "b.aif", "c.au", "d.W64", "e.caf", "f.oga"]
    assert len(seen) == 1 and all(n in str(seen[0].message) for n in ("x.m4a", "y.WMA", "z.opus"))
    assert "notes" not in str(seen[0].message) and all(len(u) == 16000 for u in own)


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are Unicode there")
def test_a_name_that_is_not_utf8_loses_only_its_file(tmp_path):
    soundfile.write(tmp_path / "good.wav", np.ones(800) * 0.1, 8000)
    bad = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    shutil.copy(tmp_path / "good.wav", bad)
    with pytest.warns(UserWarning) as seen: own = speech(tmp_path)
    assert own.table.file.tolist() == ["good.wav"] and len(own[0]) == 1600
    assert len(seen) == 1 and r"caf\udce9.wav" in str(seen[0].message)
    str(seen[0].message).encode()  # can be printed
    os.remove(tmp_path / "good.wav")
    with pytest.raises(ValueError, match="no readable sound file") as told: speech(tmp_path)
    str(told.value).encode()


@pytest.mark.parametrize("call, words", [
    (lambda: speech("tain"), "did you mean 'train'"),
    (lambda: speech("train", kind="song"), "kind='song'"), (lambda: speech("train", fs=0), "fs=0"),
    (lambda: speech("train", channel="left"), "channel='left'"),
])
def test_bad_calls(call, words):
    with pytest.raises(ValueError, match=words): call()
