"""The bench: our functions against their peers, against themselves as the work grows, and against
what the machine can do. `make bench` runs all rows of tests/bench_*.py and writes
data/bench/PROCESSOR.json, which the chapter on speed shows; `make bench ROWS="gcc music"` runs
those whose name begins with one of the words and replaces only these in the file.

A file of rows takes what it needs from here:

    from bench import Case, Peer, close, growth, memory, row

    @row("gcc_frames", "GCC-PHAT, 12 microphones, 309 frames of 4096, 65 lags")
    def _(device="cpu"):  # a row that takes a device runs on a GPU too, if there is one
        audio = noise(309, 12, 4096, device=device)
        return Case(lambda: gcc_phat(audio, max_lag=32),
                    [Peer("torch, every pair anew", lambda: lambda: every_pair(audio), close(1e-5)),
                     Peer("speechbrain", speechbrain_gcc, close(1e-5), times=309 / 10)],
                    work={"fft": fft_flops(8192, 309 * 12)})

    @growth("gcc_mics", "GCC-PHAT against microphones", sizes=(4, 8, 16, 32))
    def _(mics): ...                    # returns what is timed

    @memory("gcc_long", "GCC-PHAT, 8 microphones x 600 s in frames of 4096, 65 lags")
    def _(): ...                        # makes the input, returns what is measured

    @report("threads", "One and two threads")
    def _(): ...                        # measures by itself, returns dictionaries for the chapter

`Peer` takes a function that makes ready and returns what is timed: an ImportError in it means that
the peer is not installed, which is said in the report. `times` multiplies the peer's time where it
is given only a part of the work. Results are compared before anything is timed."""
import os

# one thread on both sides; before the libraries are loaded that read it
for _name in ("OMP", "MKL", "OPENBLAS", "NUMBA", "NUMEXPR"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

import argparse, importlib, importlib.metadata, inspect, json, math, platform, re, statistics
import subprocess, sys, time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from ssl_nb.settings import load_settings
from ssl_nb.workbench.experiments import circumstances

BUDGET = 2.0  # seconds of timing for each side of a row
ROUNDS = 15  # at most
PEERS = ("pyroomacoustics", "torchrir", "rir-generator", "xsrp", "doa-py", "acoular",
         "speechbrain")


# --- what a file of rows uses ---------------------------------------------------------------------

@dataclass
class Peer:
    name: str
    build: Callable  # () -> what is timed, or (what is timed, its arguments' maker)
    agree: Callable | str  # (ours, theirs) -> words, or AssertionError; why not, where it cannot be
    times: float = 1.0  # so many times the work that the peer is given is ours


@dataclass
class Case:
    ours: Callable
    peers: list[Peer] = field(default_factory=list)
    work: dict[str, float] = field(default_factory=dict)  # matmul, fft: flop; copy: bytes
    share: str = ""  # of which other row this is reported as a part, such as loading of a training


ROWS, GROWTHS, MEMORIES, REPORTS = {}, {}, {}, {}


def _keep(registry, name, what, sizes=None):
    def kept(function):
        if name in registry: raise ValueError(f"row {name!r} is there twice")
        registry[name] = (what, function, sizes)
        return function
    return kept


def row(name, what): return _keep(ROWS, name, what)
def growth(name, what, sizes): return _keep(GROWTHS, name, what, sizes)
def memory(name, what): return _keep(MEMORIES, name, what)
def report(name, what): return _keep(REPORTS, name, what)  # its function returns rows of its own


def _array(x): return x.detach().cpu().double().numpy() if hasattr(x, "detach") else np.asarray(x)


def close(tolerance, ours=lambda x: x, theirs=lambda x: x):
    """Agreement to `tolerance`, relative to our largest value, after `ours` and `theirs` have put
    the two results into one form."""
    def agree(a, b):
        a, b = _array(ours(a)), _array(theirs(b))
        assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
        off = float(np.abs(a - b).max() / np.abs(a).max())
        assert off <= tolerance, f"differ by {off:.1e} of the largest value"
        return f"to {off:.0e}"
    return agree


def fft_flops(n, count): return 2.5 * n * math.log2(n) * count  # of `count` real transforms


def noise(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


# --- timing ---------------------------------------------------------------------------------------

def _sync():
    if torch.cuda.is_available(): torch.cuda.synchronize()


def _timed(action, clock, inner=1):
    "(seconds of one call, the last result)."
    start = clock()
    for _ in range(inner): result = action()
    _sync()
    return (clock() - start) / inner, result


def _in_turns(actions, clock):
    """Seconds of each action, a list of rounds for each, None where it had used up its time: so a
    busy moment of the machine hits all of them."""
    first = [_timed(a, clock)[0] for a in actions]
    inner = [max(1, min(1000, int(0.005 / max(t, 1e-7)))) for t in first]
    rounds, spent = [[] for _ in actions], [0.0] * len(actions)
    for k in range(ROUNDS):
        for i, action in enumerate(actions):
            if k and spent[i] + first[i] > BUDGET: rounds[i].append(None); continue
            rounds[i].append(_timed(action, clock, inner[i])[0])
            spent[i] += rounds[i][-1] * inner[i]
    return rounds


def _median_ms(rounds): return statistics.median(t for t in rounds if t is not None) * 1e3


def machine_rates():
    """What one thread reaches here: float32 matmul and real FFT in flop/s, copying in bytes/s. The
    best of seven, for it is a limit."""
    a, x, y = noise(1024, 1024), noise(512, 8192), torch.empty(32, 2**20)
    big = noise(32, 2**20)
    best = lambda action: min(_timed(action, time.process_time)[0] for _ in range(7))
    return {"matmul": 2 * 1024**3 / best(lambda: a @ a),
            "fft": fft_flops(8192, 512) / best(lambda: torch.fft.rfft(x)),
            "copy": big.numel() * 4 / best(lambda: y.copy_(big))}


# --- one row --------------------------------------------------------------------------------------

def _agreement(peer, ours, theirs):
    return peer.agree if isinstance(peer.agree, str) else peer.agree(ours, theirs)


def measure_row(name, rates, device="cpu"):
    "A row as a dictionary. Raises `AssertionError` where a peer's result is another one."
    what, function, _ = ROWS[name]
    case = function(device) if device != "cpu" else function()
    ready, missing = [], []
    for peer in case.peers:
        try: ready.append((peer, peer.build()))
        except ImportError as e: missing.append(f"{peer.name}: {e}")
    ours = case.ours()
    said = [_agreement(peer, ours, action()) for peer, action in ready]
    clock = time.process_time if device == "cpu" else time.perf_counter
    rounds = _in_turns([case.ours, *(action for _, action in ready)], clock)
    result = {"name": name, "what": what, "device": device, "ours_ms": _median_ms(rounds[0]),
              "missing": missing, "share": case.share, "load": os.getloadavg()[0], "peers": []}
    for (peer, _), theirs, words in zip(ready, rounds[1:], said):
        pairs = [t / o * peer.times for o, t in zip(rounds[0], theirs) if o and t]
        result["peers"].append({"name": peer.name, "ms": _median_ms(theirs) * peer.times,
                                "part": round(1 / peer.times, 6), "pairs": len(pairs),
                                "ratio": statistics.median(pairs), "agreement": words})
    if result["peers"]:
        best = min(result["peers"], key=lambda p: p["ratio"])
        result |= {"best": best["name"], "ratio": best["ratio"]}
    if case.work and device == "cpu":
        limit = sum(amount / rates[kind] for kind, amount in case.work.items()) * 1e3
        result |= {"limit_ms": limit, "from_limit": result["ours_ms"] / limit}
    return result


def measure_growth(name):
    what, function, sizes = GROWTHS[name]
    ms = [_median_ms(_in_turns([function(size)], time.process_time)[0]) for size in sizes]
    x, y = np.log(sizes), np.log(ms)
    return {"name": name, "what": what, "sizes": list(sizes), "ms": ms,
            "exponent": float(np.polyfit(x, y, 1)[0]),
            "last_exponent": float((y[-1] - y[-2]) / (x[-1] - x[-2])), "load": os.getloadavg()[0]}


# --- memory: the peak of a fresh process ----------------------------------------------------------

def _resident(key):
    "VmRSS or VmHWM of this process, bytes."
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024


def _bytes_of(result):
    if isinstance(result, torch.Tensor): return result.numel() * result.element_size()
    if isinstance(result, dict): result = result.values()
    return sum(map(_bytes_of, result)) if isinstance(result, (list, tuple)) else 0


def weigh(name):
    "In this process: bytes beyond what was there when the input stood ready."
    action = MEMORIES[name][1]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    result = action()
    return {"beyond_input_mb": (_resident("VmHWM") - before) / 2**20,
            "output_mb": _bytes_of(result) / 2**20, "input_and_libraries_mb": before / 2**20}


def measure_memory(name):
    done = subprocess.run([sys.executable, __file__, "--weigh", name], capture_output=True,
                          text=True)
    if done.returncode: raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return {"name": name, "what": MEMORIES[name][0], **json.loads(done.stdout.splitlines()[-1])}


# --- the report -----------------------------------------------------------------------------------

def collect():
    "Import every tests/bench_*.py, which puts its rows on the lists."
    for file in sorted(Path(__file__).parent.glob("bench_*.py")): importlib.import_module(file.stem)


def _version(package):
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return None


def _processor():
    "The processor's full name; Linux writes it into /proc/cpuinfo."
    try: names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError: names = []
    return names[0] if names else platform.processor() or platform.machine()


def about():
    now = circumstances()
    hardware = now["hardware"] | {"processor": _processor(),
                                  "threads": torch.get_num_threads()}
    return now | {"hardware": hardware, "load": list(os.getloadavg()),
                  "peers": {p: _version(p) for p in PEERS}}


def line(r):
    "A row in words."
    name = r["what"] + (f", {r['device']}" if r["device"] != "cpu" else "")
    peers = "; ".join(f"{p['name']} {p['ms']:.4g} ms ({p['ratio']:.3g}x, {p['agreement']})"
                      for p in r["peers"])
    far = f"; {r['from_limit']:.1f}x from the machine's limit" if "from_limit" in r else ""
    gone = f"; not installed: {', '.join(r['missing'])}" if r["missing"] else ""
    return f"{r['name']}: {name}: {r['ours_ms']:.4g} ms; {peers or 'no peer'}{far}{gone}"


def _chosen(registry, words):
    return [n for n in registry if not words or any(n.startswith(w) for w in words)]


def _measure(kind, names, function, show, after=lambda results: None):
    "Results of the rows that succeed; what went wrong with the others is said and kept."
    results, failures = [], []
    for name in names:
        try: results.append(function(name))
        except Exception as e:  # a row that fails must not take the others with it
            failures.append(f"{kind} {name}: {type(e).__name__}: {e}")
            print(failures[-1], flush=True)
        else:
            print(show(results[-1]), flush=True)
            after(results)
    return results, failures


def run(words, keep):
    "Measure; `keep` gets what is there after each row, so that an end by Ctrl-C loses little."
    nothing = {"growth": [], "memory": [], "reports": [], "failures": []}
    rates = machine_rates()
    print("one thread: " + ", ".join(f"{k} {v / 1e9:.0f} G/s" for k, v in rates.items()))
    rows, bad = _measure("row", _chosen(ROWS, words), lambda n: measure_row(n, rates), line,
                         lambda done: keep({"rates": rates, "rows": done, **nothing}))
    if torch.cuda.is_available():
        able = [n for n in _chosen(ROWS, words) if inspect.signature(ROWS[n][1]).parameters]
        more, worse = _measure("row on cuda", able, lambda n: measure_row(n, rates, "cuda"), line)
        rows, bad = rows + more, bad + worse
    growths, worse = _measure("growth", _chosen(GROWTHS, words), measure_growth, lambda g:
                              f"{g['name']}: {g['what']}: exponent {g['exponent']:.2f}, last "
                              f"step {g['last_exponent']:.2f}", lambda done: keep(
                                  nothing | {"rates": rates, "rows": rows, "growth": done}))
    memories, worst = _measure("memory", _chosen(MEMORIES, words), measure_memory, lambda m:
                               f"{m['name']}: {m['what']}: {m['beyond_input_mb']:.0f} MB beyond "
                               f"the input, {m['output_mb']:.0f} MB of them the result")
    reports, last = _measure("report", _chosen(REPORTS, words), lambda n: {
        "name": n, "what": REPORTS[n][0], "load": os.getloadavg()[0], "rows": REPORTS[n][1]()},
        lambda r: "\n".join([f"{r['name']}: {r['what']}", *(f"  {x}" for x in r["rows"])]))
    return {"rates": rates, "rows": rows, "growth": growths, "memory": memories,
            "reports": reports, "failures": bad + worse + worst + last}


def merged(old, new):
    "`new` and the rows of `old` that `new` does not have."
    both = old | new
    for part in ("rows", "growth", "memory", "reports"):
        have = {(r["name"], r.get("device")) for r in new[part]}
        both[part] = new[part] + [r for r in old.get(part, [])
                                  if (r["name"], r.get("device")) not in have]
    return both


def main():
    parser = argparse.ArgumentParser(description="Measure rows of the bench.")
    parser.add_argument("names", nargs="*", help="how names of rows begin; all if none is given")
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    parser.add_argument("--dry", action="store_true", help="measure and write no file")
    parser.add_argument("--weigh", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    collect()
    every = {**ROWS, **GROWTHS, **MEMORIES, **REPORTS}
    if given.weigh: return print(json.dumps(weigh(given.weigh)))
    if given.list: return print("\n".join(f"{n}: {every[n][0]}" for n in every))
    if unknown := [w for w in given.names if not _chosen(every, [w])]:
        parser.error(f"no row begins with {unknown[0]!r}; --list prints the names")
    begin, told = time.perf_counter(), about()
    file = load_settings().data / "bench" / (re.sub(r"[^a-z0-9]+", "-", (
        f"{told['hardware']['processor']} {told['hardware']['cores']} cores").lower()
        ).strip("-") + ".json")
    before = json.loads(file.read_text()) if given.names and file.exists() else {}
    def keep(new):
        if given.dry: return
        for part in ("rows", "growth", "memory", "reports"):
            for r in new[part]: r["commit"] = told["git"]["commit"]
        all_of_it = merged(before, new) | told | {"seconds": time.perf_counter() - begin}
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(all_of_it, indent=1) + "\n")
    keep(run(given.names, keep))
    print(f"{time.perf_counter() - begin:.0f} s")
    if not given.dry:
        print(f"written: {file.name}; `make outputs NB=nbs/10_workbench/07_speed.ipynb` shows it "
              f"on the website")


if __name__ == "__main__":
    from bench import main as only_one  # the rows' lists are those of the module, not the script's
    only_one()
