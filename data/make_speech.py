"""Make the synthetic speech set in data/speech with flite and espeak-ng.

    python data/make_speech.py            make the set (replaces data/speech)
    python data/make_speech.py --check    make it again elsewhere and compare

Nothing here is random: the same engine versions give the same bytes.
"""

import argparse
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SENTENCES = HERE / "sentences.csv"

RATE = 16000  # Hz, of every file
PEAK_DBFS = -12.0  # level of the largest sample of every file (-3 would cost 2.7 MB more)
TRIM_DB = -40.0  # below the loudest frame: quieter frames at the ends are silence
# (flite's awb voice hisses at -43 dB in its pauses, so a lower value would keep them)
FRAME = 160  # samples (10 ms) over which the level is measured for trimming
MARGIN = 0.05  # s kept before the first and after the last audible frame

DIGITS = "zero one two three four five six seven eight nine".split()
# Style -> factor on duration and factor on pitch, for flite.
STYLES = {"slow": (1.3, 0.85), "normal": (0.95, 1.0), "fast": (0.7, 1.18)}

# Style -> words per minute and pitch setting (0..99) of espeak-ng. The pitch
# setting is not in Hz, so there are no factors here.
ESPEAK_STYLES = {"slow": (130, 30), "normal": (185, 50), "fast": (240, 75)}
# Some espeak-ng voices clip at the default amplitude of 100.
ESPEAK_AMPLITUDE = 50

# engine_voice: what the engine is asked for. f0: mean pitch in Hz that flite is
# asked for in the normal style (None: the voice ignores it, see flite()).
Voice = namedtuple("Voice", "name engine engine_voice sex accent split f0")

# Splits are by voice: whoever speaks in one split is silent in the others.
# "en" is British English; espeak-ng 1.51 ignores a variant after "en-gb".
VOICES = [
    Voice("flite_kal16", "flite", "kal16", "male", "American", "train", 100),
    Voice("flite_slt", "flite", "slt", "female", "American", "train", 170),
    Voice("espeak_us_f2", "espeak-ng", "en-us+f2", "female", "American", "train", None),
    Voice("espeak_scotland_m7", "espeak-ng", "en-gb-scotland+m7", "male", "Scottish", "train", None),
    Voice("espeak_rp_f3", "espeak-ng", "en-gb-x-rp+f3", "female", "Received Pronunciation", "train", None),
    Voice("espeak_lancaster_f5", "espeak-ng", "en-gb-x-gbclan+f5", "female", "Lancaster", "train", None),
    Voice("espeak_caribbean_m1", "espeak-ng", "en-029+m1", "male", "Caribbean", "train", None),
    Voice("flite_rms", "flite", "rms", "male", "American", "valid", None),
    Voice("espeak_midlands_f4", "espeak-ng", "en-gb-x-gbcwmd+f4", "female", "West Midlands", "valid", None),
    Voice("flite_awb", "flite", "awb", "male", "Scottish", "test", 130),
    Voice("espeak_nyc_f1", "espeak-ng", "en-us-nyc+f1", "female", "New York City", "test", None),
    Voice("espeak_gb_m4", "espeak-ng", "en+m4", "male", "British", "test", None),
]
VOICES.sort(key=lambda v: v.name)

Item = namedtuple("Item", "file voice kind digit style text")
COLUMNS = "file voice engine sex split kind digit style seconds text".split()


def check_engines():
    """Stop and name the Debian package if a program or a voice is missing."""
    missing = [e for e in ("flite", "espeak-ng") if shutil.which(e) is None]
    if missing:
        sys.exit(f"not found: {', '.join(missing)}. On Debian or Ubuntu: sudo apt-get install {' '.join(missing)}")
    # flite speaks with its default voice when it does not know the one asked for.
    listed = subprocess.run(["flite", "-lv"], capture_output=True, text=True).stdout.split()
    absent = [v.engine_voice for v in VOICES if v.engine == "flite" and v.engine_voice not in listed]
    if absent:
        sys.exit(f"this flite has no voice {', '.join(absent)}; the Debian package flite has them")


def engine_versions():
    flite_out = subprocess.run(["flite", "--version"], capture_output=True, text=True).stdout
    espeak_out = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True).stdout
    flite_line = next((s for s in flite_out.splitlines() if "version" in s), "flite: version unknown")
    return f"{flite_line.strip()}; {espeak_out.split('  Data')[0].strip()}"


def run_engine(command, wav):
    """Run one synthesis command that writes wav; return (samples, rate)."""
    wav.unlink(missing_ok=True)  # a stale file would hide a failed run
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not wav.exists():
        sys.exit(f"failed: {' '.join(command)}\n{done.stderr}")
    samples, rate = sf.read(wav, dtype="float64")
    return samples, rate


def flite(voice, text, style, wav):
    stretch, pitch = STYLES[style]
    command = ["flite", "-voice", voice.engine_voice, "-t", text, "-o", str(wav)]
    if voice.f0 is not None:
        command += ["--setf", f"duration_stretch={stretch}", "--setf", f"int_f0_target_mean={voice.f0 * pitch:.1f}"]
        return run_engine(command, wav)
    # The rms voice has its own pitch model and ignores int_f0_target_mean. Its
    # pitch is changed by resampling instead, and the duration is stretched first
    # so that the styles come out as long as those of the other voices. (This
    # moves the formants too, by the same factor.)
    command += ["--setf", f"duration_stretch={stretch * pitch:.4f}"]
    samples, rate = run_engine(command, wav)
    ratio = Fraction(pitch).limit_denominator(100)
    return resample(samples, ratio.denominator, ratio.numerator), rate


def espeak(voice, text, style, wav):
    wpm, pitch = ESPEAK_STYLES[style]
    options = ["-s", str(wpm), "-p", str(pitch), "-a", str(ESPEAK_AMPLITUDE)]
    return run_engine(["espeak-ng", "-v", voice.engine_voice, *options, "-w", str(wav), text], wav)


def resample(samples, up, down):
    return samples if up == down else resample_poly(samples, up, down)


def trim(samples):
    """Cut the silence at both ends down to MARGIN, or fill up to it with zeros."""
    margin = round(MARGIN * RATE)
    whole = np.pad(samples, (0, -len(samples) % FRAME))
    power = np.mean(whole.reshape(-1, FRAME) ** 2, axis=1)
    audible = np.flatnonzero(power > power.max() * 10 ** (TRIM_DB / 10))
    start, stop = audible[0] * FRAME, (audible[-1] + 1) * FRAME
    return np.pad(whole, margin)[start : stop + 2 * margin]


def to_int16(samples):
    """Scale to the fixed peak level and round (no dither: it would be random)."""
    scaled = samples / np.abs(samples).max() * 10 ** (PEAK_DBFS / 20)
    return np.round(scaled * 32767).astype(np.int16)


def synthesize(voice, text, style, wav):
    engine = flite if voice.engine == "flite" else espeak
    samples, rate = engine(voice, text, style, wav)
    if not np.any(samples):
        sys.exit(f"{voice.name} said nothing for: {text}")
    ratio = Fraction(RATE, rate)
    return to_int16(trim(resample(samples, ratio.numerator, ratio.denominator)))


def read_sentences():
    with open(SENTENCES, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {split: [r["text"] for r in rows if r["split"] == split] for split in ("train", "valid", "test")}


def items():
    """Every file to make, in the order of index.csv."""
    sentences = read_sentences()
    todo = []
    for voice in VOICES:
        for n, text in enumerate(sentences[voice.split], start=1):
            todo.append(Item(f"{voice.name}/sentence_{n:02d}.flac", voice, "sentence", "", "", text))
        for digit, text in enumerate(DIGITS):
            for style in STYLES:
                todo.append(Item(f"{voice.name}/digit_{digit}_{style}.flac", voice, "digit", digit, style, text))
    return sorted(todo, key=lambda item: item.file)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_one(item, folder, wav):
    """Write one FLAC file and return its row of index.csv."""
    samples = synthesize(item.voice, item.text, item.style or "normal", wav)
    path = folder / item.file
    path.parent.mkdir(exist_ok=True)
    sf.write(path, samples, RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    v = item.voice
    seconds = f"{len(samples) / RATE:.3f}"
    return [item.file, v.name, v.engine, v.sex, v.split, item.kind, item.digit, item.style, seconds, item.text]


def make_set(folder):
    with tempfile.TemporaryDirectory() as scratch:
        wav = Path(scratch) / "engine.wav"
        rows = [make_one(item, folder, wav) for item in tqdm(items(), unit="file")]
    with open(folder / "index.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *rows])
    sums = {row[0]: sha256(folder / row[0]) for row in rows}
    sums["index.csv"] = sha256(folder / "index.csv")
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8", newline="\n")


def read_sums(folder):
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def build(out):
    """Make the set beside its final place, then rename: never half a set."""
    if out.exists() and not (out / "SHA256SUMS").is_file() and any(out.iterdir()):
        sys.exit(f"{out} exists and is not a speech set (no SHA256SUMS); it is left alone")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".speech_", dir=out.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        make_set(new)
        if out.exists():
            os.rename(out, Path(scratch) / "old")
        os.rename(new, out)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {len(read_sums(out))} files, {size / 1e6:.2f} MB")


def flac_files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.flac")}


def same_samples(a, b):
    """True if two FLAC files hold the same sound, however it was packed."""
    try:
        return np.array_equal(sf.read(a, dtype="int16")[0], sf.read(b, dtype="int16")[0])
    except sf.LibsndfileError:  # damaged, or not sound (index.csv)
        return False


def compare_on_disk(out, want):
    """Problems of the files in out against SHA256SUMS."""
    problems = [f"missing   {name}" for name in want if not (out / name).is_file()]
    problems += [f"changed   {name}" for name in want if (out / name).is_file() and sha256(out / name) != want[name]]
    return problems + [f"not listed {name}" for name in sorted(flac_files(out) - set(want))]


def compare_remade(new, out, want):
    """Problems of a newly made set against SHA256SUMS."""
    have = read_sums(new)
    problems = [f"not made again {name}" for name in want if name not in have]
    for name, digest in have.items():
        if want.get(name) == digest:
            continue
        note = ""
        if name in want and (out / name).is_file() and same_samples(new / name, out / name):
            note = " (same samples, other FLAC encoder)"
        problems.append(f"made differently {name}{note}")
    return problems


def check(out):
    """Return the number of files that differ from SHA256SUMS."""
    if not (out / "SHA256SUMS").is_file():
        sys.exit(f"{out} has no SHA256SUMS to compare with")
    want = read_sums(out)
    with tempfile.TemporaryDirectory() as scratch:
        new = Path(scratch)
        make_set(new)
        problems = compare_on_disk(out, want) + compare_remade(new, out, want)
    for line in problems:
        print(line)
    print(f"{len(want)} files listed, {len(problems)} problems ({engine_versions()})")
    return len(problems)


def main():
    parser = argparse.ArgumentParser(description="Make (or check) the synthetic speech set.")
    parser.add_argument("--out", type=Path, default=HERE / "speech", help="folder of the set (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="make it again elsewhere and compare with SHA256SUMS")
    args = parser.parse_args()
    check_engines()
    if args.check:
        sys.exit(1 if check(args.out) else 0)
    build(args.out)


if __name__ == "__main__":
    main()
