"""Sweeps and tables: bad files, failing points, killed and foreign workers, Ctrl-C, names that
collide, formats that must compile."""
import csv, io, json, os, platform, signal, socket, subprocess, sys, threading, time
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from run_notebook import ROOT
from typer.testing import CliRunner
from ssl_nb.workbench.command_line import app
from ssl_nb.workbench.experiments import drop_dead_partials, _rename
from ssl_nb.workbench.sweeps import (_ends, _how_it_ended, _run_point, differences, point_label,
                                     read_sweep, run_sweep, unfinished)
from ssl_nb.workbench.tables import (FORMATS, beside_papers, committed_results, for_reading,
                                     format_table, paper_tables, results_table, summarize)

COMMAND = Path(sys.executable).parent / "ssl-nb"
PARAMETERS = ('mode: str = "fine"  # what to do\nsize: float = 1.0  # to record\nseed: int = 0  # '
              'of nothing\nnames: list[str] = ["a"]  # words')
BODY = """import os, signal, time
from pathlib import Path
from ssl_nb.settings import load_settings
from ssl_nb.workbench.experiments import record
if mode == "fail" and not Path("repaired").exists(): raise ValueError("not repaired")
if mode == "kill": os.kill(os.getppid(), signal.SIGKILL)
if mode == "slow": time.sleep(120)
record({"twice": 2 * size}, rows=[{
    "part": "a", "twice": 2 * size, "threads": int(os.environ.get("OMP_NUM_THREADS", 0)),
    "folder": os.getcwd(), "data": str(load_settings().data)}])"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    "A settings file with one experiment `toy` beside it, the working folder there."
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(BODY)]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    (tmp_path / "nbs/11_experiments").mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}),
                   tmp_path / "nbs/11_experiments/01_toy.ipynb")
    (tmp_path / "settings.ini").write_text("[ssl_nb]\nruns = runs\nprofile = smoke\n")
    monkeypatch.setenv("SSL_NB_SETTINGS", str(tmp_path / "settings.ini"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(house, text):
    (house / "sweep.yaml").write_text(text)
    return read_sweep(house / "sweep.yaml")


def call(*words):
    return subprocess.run([COMMAND, *words], capture_output=True, text=True, timeout=300)


def quick(*words):  # the same in this process, for calls that start no kernel
    return CliRunner().invoke(app, [str(w) for w in words])


def folders(house): return sorted(p.name for p in (house / "runs/toy").iterdir())


# --- the file -------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", sorted((ROOT / "data/sweeps").glob("*.yaml")),
                         ids=lambda p: p.stem)
def test_the_books_own_sweeps_can_be_read(file):
    plan = read_sweep(file)
    assert (plan.points
            and len({point_label(plan, values) for values in plan.points}) == len(plan.points))


def test_points_are_product_then_list_at_every_seed(house):
    sweep = asked(house, "experiment: toy\nparameters: {names: [x, y]}\ngrid: {mode: [fine, fail], "
                         "size: [1, 1e-3]}\npoints: [{mode: slow}]\nseeds: [3, 1]")
    found = [(p["mode"], p["size"], p["seed"]) for p in sweep.points]
    pairs = [("fine", 1.0), ("fine", 0.001), ("fail", 1.0), ("fail", 0.001), ("slow", 1.0)]
    assert (found == [(m, s, seed) for m, s in pairs for seed in (3, 1)]
            and all(p["names"] == ["x", "y"] for p in sweep.points))
    assert point_label(sweep, sweep.points[0]) == "mode=fine, size=1.0, seed=3"
    assert len(asked(house, "experiment: toy").points) == 1
    assert ([p["mode"] for p in asked(house, "experiment: toy\npoints: [{mode: slow}]").points]
            == ["slow"])  # no point of the empty product
    assert ([p["names"] for p in asked(house, "experiment: toy\ngrid: {names: [[a, b], c]}").points]
            == [["a", "b"], ["c"]])


@pytest.mark.parametrize("text, told", [
    ("experiment: toyy", "did you mean 'toy'"), ("grid: {size: [1]}", "'experiment' is missing"),
    ("experiment: 3", "must be a text"), ("", "must be a mapping"), ("[toy]", "must be a mapping"),
    ("experiment: toy\ngrids: {size: [1]}", "did you mean 'grid'"),
    ("experiment: toy\ngrid: {sise: [1]}", "did you mean 'size'"),
    ("experiment: toy\n1: 2", "key 1 is unknown"),
    ("experiment: toy\nparameters: {sise: 1}", "did you mean 'size'"),
    ("experiment: toy\npoints: [{sise: 1}]", "did you mean 'size'"),
    ("experiment: toy\ngrid: {size: [1, large]}", "size='large'"),
    ("experiment: toy\ngrid: {size: [1, .nan]}", "size=nan"),
    ("experiment: toy\ngrid: {size: [1, null]}", "size=None"),
    ("experiment: toy\ngrid: {mode: [yes]}", "mode=True"),
    ("experiment: toy\ngrid: {1: [2]}", "parameter 1"),
    ("experiment: toy\ngrid: {size: [{a: 1}]}", "size={'a': 1}"),
    ("experiment: toy\ngrid: {size: 1}", "grid: size: 1: must be a list"),
    ("experiment: toy\ngrid: {size: []}", "must be a list of one value"),
    ("experiment: toy\ngrid: {}", "grid: is empty"),
    ("experiment: toy\npoints: []", "points: is empty"),
    ("experiment: toy\nseeds: []", "seeds: is empty"),
    ("experiment: toy\npoints: [3]", "points: 3: must be a mapping"),
    ("experiment: toy\ngrid:", "grid: None: must be a mapping"),
    ("experiment: toy\nseeds: 3", "seeds: 3: must be a list"),
    ("experiment: toy\nseeds: [-1]", "seeds='-1'"),
    ("experiment: toy\nseeds: [1.5]", "seeds='1.5'"),
    ("experiment: toy\nseeds: [1, 1]", "there twice"),
    ("experiment: toy\ngrid: {size: [1, 1.0]}", "there twice"),
    ("experiment: toy\ngrid: {size: [1, 2]}\npoints: [{size: 2}]", "there twice"),
    ("experiment: toy\nseeds: [1]\ngrid: {seed: [1, 2]}", "parameter 'seed': given twice"),
    ("experiment: toy\nparameters: {size: 1}\ngrid: {size: [2]}", "given twice"),
    ("experiment: toy\ngrid:\n  size: [1]\n  size: [2]", "key 'size': given twice"),
    ("experiment: toy\nexperiment: toy", "given twice"),
    ("experiment: toy\nprofile: smoke", "parameter 'profile' is unknown"),
    ("experiment: toy\ngrid: {size: &a [*a]}", "sweep.yaml"),
    ("experiment: [toy", "cannot be read as YAML"),
    ("experiment: toy\nparameters: !!python/object/apply:os.system [touch hacked]",
     "cannot be read as YAML"), ("experiment: 2026-13-45", "cannot be read as YAML"),
    (f"experiment: toy\ngrid: {{size: {list(range(1000))}, seed: {list(range(1000))}}}",
     "1000000 points: must be at most"),
])
def test_a_bad_file_is_refused(house, text, told):
    with pytest.raises(ValueError, match="^sweep.yaml: ") as refused: asked(house, text)
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert not (house / "runs").exists() and not (house / "hacked").exists()


def test_refused_calls(house):
    (house / "sweep.yaml").write_text("experiment: toy\ngrid: {sise: [1]}")
    for words, told in ((["sweep.yaml"], "did you mean 'size'"), (["none.yaml"], "none.yaml")):
        done = quick("sweep", *words)
        assert done.exit_code == 2 and told in done.stderr
    sweep = asked(house, "experiment: toy")
    with pytest.raises(ValueError, match="workers=0"): next(run_sweep(sweep, workers=0))
    with pytest.raises(ValueError, match="its own workers"):
        next(run_sweep(sweep, workers=2, scheduler="tcp://127.0.0.1:1"))
    with pytest.raises(ValueError, match="scheduler 'tcp:/x'"):
        next(run_sweep(sweep, scheduler="tcp:/x"))


# --- a local cluster ------------------------------------------------------------------------------

def test_failed_and_killed_points_are_reported_and_tried_again(house):
    asked(house, "experiment: toy\nseeds: [7]\ngrid: {mode: [kill, fail, fine]}")
    plan = quick("sweep", "sweep.yaml", "--dry-run")
    assert (plan.exit_code == 0 and plan.stdout.count("to run  ") == 3
            and "3 points, 0 finished, 3 to run" in plan.stdout and not (house / "runs").exists())
    first = quick("sweep", "sweep.yaml", "--workers", "2")
    assert (first.exit_code == 1 and "[3/3]" in first.stdout and "twice 2" in first.stdout
            and "Traceback" not in first.stderr)
    assert ("2 point(s) failed" in first.stderr and "its worker died" in first.stderr
            and "not repaired" in first.stderr)
    names = folders(house)
    failed, = [n for n in names if n.endswith(".failed")]
    # the third: nothing kept, nothing left
    assert len(names) == 2 and str(house / "runs/toy" / failed / "notebook.ipynb") in first.stderr
    table = json.loads((house / "runs/toy" / next(n for n in names if n != failed) / "metrics.json")
                       .read_text())
    assert table["rows"][0]["threads"] == 1 and table["rows"][0]["folder"] == str(house)
    (house / "repaired").touch()
    asked(house, "experiment: toy\nseeds: [7]\ngrid: {mode: [fail, fine]}")
    again = quick("sweep", "sweep.yaml", "--workers", "1")
    assert (again.exit_code == 0 and "2 points, 1 finished, 1 to run" in again.stdout
            and "[1/1] mode=fail" in again.stdout)
    shown = quick("results", "toy", "--by", "mode,part", "--format", "csv")
    assert (list(csv.DictReader(io.StringIO(shown.stdout)))[0]["mode"] == "fail"
            and shown.exit_code == 0)


def test_control_c_keeps_what_is_finished(house):
    asked(house, "experiment: toy\ngrid: {mode: [fine, slow], seed: [0]}")
    process = subprocess.Popen([COMMAND, "sweep", "sweep.yaml", "--workers", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert "[1/2] mode=fine" in lines[1]
    deadline = time.monotonic() + 60
    while (not list((house / "runs/toy").glob(".*partial/notebook.ipynb"))
           and time.monotonic() < deadline):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, told = process.communicate(timeout=60)
    assert (process.returncode == 130 and "1 of 2 points are left" in told
            and "Traceback" not in told)
    assert (len(folders(house)) == 1
            and [p["mode"] for p in unfinished(read_sweep("sweep.yaml"))] == ["slow"])


# --- a scheduler and workers elsewhere ------------------------------------------------------------

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def cluster(folder, workers):
    """A scheduler and workers as processes of their own, started in another folder with other
    settings. Yields the address and the processes."""
    environ = ({k: v for k, v in os.environ.items() if not k.startswith("SSL_NB_")}
               | {"SSL_NB_RUNS": "elsewhere", "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"})
    start = lambda *words: subprocess.Popen([sys.executable, "-m", "dask", *words],
                                            cwd=folder, env=environ, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL)
    port = free_port()
    processes = [start("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")]
    try:
        processes += [start("worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-nanny",
                            "--no-dashboard") for _ in range(workers)]
        yield f"tcp://127.0.0.1:{port}", processes
    finally:
        for process in processes: process.kill(); process.wait()


def test_workers_of_an_existing_scheduler(house, tmp_path_factory, monkeypatch):
    # not what the settings file says, nor what the workers' own environment says
    monkeypatch.setenv("SSL_NB_RUNS", str(house / "shared"))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    asked(house, "experiment: toy\npoints: [{mode: kill}, {mode: fine}, {size: 2}]")
    deadline = time.monotonic() + 30
    with cluster(elsewhere, 2) as (address, processes):
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))).close()
                break
            except OSError: time.sleep(0.2)
        done = call("sweep", "sweep.yaml", "--scheduler", address)
        assert (done.returncode == 1 and "its worker died" in done.stderr
                and done.stderr.count("\n- ") == 1), done.stderr + done.stdout
        assert "[3/3]" in done.stdout and "instead of" not in done.stderr
    assert not (house / "runs").exists()
    runs = [json.loads(p.read_text()) for p in (house / "shared/toy").glob("2*/metrics.json")]
    assert (sorted(r["metrics"]["twice"] for r in runs) == [2.0, 4.0]
            and {r["rows"][0]["folder"] for r in runs} == {str(house)})
    assert ({r["rows"][0]["data"] for r in runs} == {str(ROOT / "data")}
            and not (elsewhere / "elsewhere").exists())


class Worker:  # stands for a client of one worker that answers with what it is given
    def __init__(self, seen, spec=object()): self.seen, self.spec = seen, spec
    def run(self, what, *_, **options):
        return {"tcp://w": self.spec if options else {**what(*_), **self.seen}}


def test_unlike_workers_are_told_of_or_refused(house):
    from ssl_nb.workbench.sweeps import _check_workers, _look
    sweep = asked(house, "experiment: toy")
    assert _check_workers(Worker({}), sweep) == [platform.node()]
    about = _look("none", str(house / "nbs/11_experiments/01_toy.ipynb"))["about"]
    with pytest.warns(UserWarning,
                      match="worker tcp://w on .* has torch 1.0 instead of .*, git commit abc"):
        _check_workers(Worker({"about": {**about, "torch": "1.0", "git commit": "abc"}}), sweep)
    with pytest.raises(ValueError, match="does not see the runs folder"):
        _check_workers(Worker({"sees": False}), sweep)
    with pytest.raises(ValueError, match="does not see .*01_toy.ipynb"):
        _check_workers(Worker({"about": {**about, "notebook": "missing"}}), sweep)
    with pytest.raises(ValueError, match="has no ssl_nb"):
        _check_workers(Worker({}, spec=ModuleNotFoundError("x")), sweep)
    assert (differences({"a": "1"}, {"a": "1", "b": "2"}) == ""
            and list((house / "runs/toy").iterdir()) == [])


class Gone:  # a client whose scheduler has no workers, or has gone
    status = "closed"
    def __init__(self, error=None): self.error = error
    def nthreads(self):
        if self.error: raise self.error
        return {}


def test_points_without_a_worker_are_given_up(monkeypatch):
    monkeypatch.setattr("ssl_nb.workbench.sweeps.PATIENCE", 0.5)
    for client in (Gone(), Gone(OSError("closed"))):
        ends = [_how_it_ended({"n": n}, future) for n, future in _ends(client, [(), ()])]
        assert ([e.values["n"] for e in ends] == [0, 1]
                and all("no worker was left" in e.reason and e.folder is None for e in ends))


def test_a_point_is_told_its_surroundings_and_leaves_none(house, monkeypatch):
    monkeypatch.setattr("ssl_nb.workbench.sweeps.run_experiment", lambda *_, **__: Path(
        f"{os.getcwd()} {os.environ.get('SSL_NB_SEED')} {os.environ.get('SSL_NB_DEVICE')}"))
    monkeypatch.setenv("SSL_NB_DEVICE", "cuda")
    before, where = dict(os.environ), os.getcwd()
    assert _run_point("toy", {}, "x", {"SSL_NB_SEED": "4"},
                      str(house / "nbs")) == (f"{house / 'nbs'} 4 None", "")
    with pytest.raises(FileNotFoundError):
        _run_point("toy", {}, "x", {"SSL_NB_SEED": "4"}, str(house / "none"))
    assert dict(os.environ) == before and os.getcwd() == where


# --- names that collide ---------------------------------------------------------------------------

def test_runs_that_end_in_the_same_second_all_keep_a_folder(tmp_path):
    for k in range(200):
        (tmp_path / f".{k}.partial").mkdir()
        (tmp_path / f".{k}.partial" / str(k)).touch()
    names, gate = [], threading.Barrier(8)
    def finish(mine):
        gate.wait()
        for k in mine:
            names.append(_rename(tmp_path / f".{k}.partial",
                                 tmp_path / "20260101-000000-aaaaaaaa").name)
    threads = [threading.Thread(target=finish, args=(range(i, 200, 8),)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert (len(set(names)) == 200
            and sorted(int(p.name) for p in tmp_path.glob("2*/*")) == list(range(200)))


def test_partial_runs_of_other_machines_are_left_alone(tmp_path):
    stamp, mine, dead = "20260101-000000-aaaaaaaa", platform.node(), 999999999
    for name in (f".{stamp}-other-host-{dead}", f".{stamp}-{mine}-{dead}",
                 f".{stamp}-{mine}-{os.getpid()}", f".{stamp}-{dead}"):
        (tmp_path / f"{name}.partial").mkdir()
    drop_dead_partials(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f".{stamp}-other-host-{dead}.partial", f".{stamp}-{mine}-{os.getpid()}.partial"])


# --- tables ---------------------------------------------------------------------------------------

def rows(*values, **more):
    "A table of runs, one a seed: (seed, method, error)."
    return pd.DataFrame([{"run": f"r{seed}", "profile": "smoke", "seed": seed, "changed": "-",
                          "method": method, "error": error, **more, "seconds": 9.0, "commit": "c",
                          "hardware": "h"} for seed, method, error in values])


def test_mean_spread_and_number_by_hand():
    found = summarize(rows((0, "a", 1.0), (1, "a", 2.0), (2, "a", 6.0), (0, "b", float("nan")),
                           (1, "b", 5.0)), ["method"])
    assert found.columns.tolist() == ["method", "metric", "mean", "min", "max", "n"]
    assert found.values.tolist() == [["a", "error", 3.0, 1.0, 6.0, 3],
                                     ["b", "error", 5.0, 5.0, 5.0, 1]]
    assert for_reading(found).error.tolist() == ["3 (1 to 6)", "5"]
    with pytest.raises(ValueError, match="did you mean 'method'"):
        summarize(rows((0, "a", 1.0)), ["methods"])
    for by in ([], ["method", "method"]):
        with pytest.raises(ValueError, match="different columns"):
            summarize(rows((0, "a", 1.0)), by)


def test_what_differs_is_not_averaged_and_repeats_count_once():
    table = rows((0, "a", 1.0), (0, "a", 3.0), (0, "a", 7.0),
                 snr_db=5.0).assign(run=["r0", "r1", "r2"], changed="snr_db=5.0")
    # the same point three times: the newest run counts
    assert summarize(table, ["method"])["mean"].tolist() == [7.0]
    table["profile"] = ["smoke", "laptop", "laptop"]
    assert (summarize(table, ["method"]).set_index("profile")["mean"].to_dict()
            == {"smoke": 1.0, "laptop": 7.0})
    table["changed"] = ["-", "snr_db=5.0, words=['a', 'b']", "-"]
    assert (summarize(table, ["method", "profile"]).n.tolist() == [1, 1, 1]
            and set(summarize(table, ["method"]).metric) == {"error"})


def test_papers_numbers(tmp_path):
    ours, file = summarize(rows((0, "a", 1.0), (1, "a", 2.0), (0, "b", 4.0)),
                           ["method"]), tmp_path / "toy.csv"
    assert beside_papers(ours, file) is ours
    file.write_text("method,metric,paper,source\na,error,1.4,Table 1\na,error,1.5,Table 2\n"
                    "c,error,9,Table 1\n")
    both = beside_papers(ours, file)
    assert (both[["method", "paper", "n"]].astype(object).fillna("-").values.tolist()
            == [["a", 1.4, 2], ["a", 1.5, 2], ["b", "-", 1], ["c", 9.0, 0]])
    shown = for_reading(both).set_index("method")
    assert (shown["error, paper"].to_dict() == {"a": "1.4; 1.5", "b": "-", "c": "9"}
            and shown.error.to_dict() == {"a": "1.5 (1 to 2)", "b": "4", "c": "-"})
    assert shown.source["a"] == "Table 1; Table 2"
    file.write_text("method,snr_db,metric,paper,source\na,5,error,1.4,Table 1\n")
    with pytest.warns(UserWarning, match="also depend on snr_db"):
        assert beside_papers(ours, file) is ours
    for text, told in (("method,paper,source\na,1,x\n", "'metric' is missing"),
                       ("metric,paper,source\nerror,about 3,x\n", "'paper': must be numbers"),
                       ("", "cannot be read")):
        file.write_text(text)
        with pytest.raises(ValueError, match=told): beside_papers(ours, file)
    file.write_text("seed,metric,paper,source\nfirst,error,1,x\n")
    with pytest.raises(ValueError, match="not of our column's type"):
        beside_papers(summarize(rows((0, "a", 1.0)), ["seed"]), file)


NASTY = r"100 % of a_b & c # $x$ {y} \z ~ ^ <b> [1] | * "

class Page(HTMLParser):
    "The cells and tags of a page."
    def __init__(self, text):
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(text)
        self.close()
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.cells += [""] if tag in ("td", "th") else []
    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th") and self.cells: self.cells[-1] += data


def test_formats_hold_nasty_texts():
    import re
    table = pd.DataFrame({"[a_b]": [NASTY, "two\nlines"], "50%": [1.23456, None]})
    latex = format_table(table, "latex")
    body = re.sub(r"\\(begin|end)\{tabular\}(\{l+\})?|\\hline|\\\\\n", "", latex)
    # a separator a line, all else escaped
    assert not re.search(r"(?<!\\)[%$#_]", body) and body.count("&") - body.count(r"\&") == 3
    assert (latex.count("{") == latex.count("}") and len(latex.splitlines()) == 8
            and not re.search(r"^\s*[\[*]", latex, flags=re.MULTILINE))
    assert r"100 \% of a\_b \& c \# \$x\$ \{y\} \textbackslash{}z" in latex
    page = Page(format_table(table, "html", "A <script> & B"))
    assert ([c.strip() for c in page.cells]
            == ["[a_b]", "50%", NASTY.strip(), "1.23", "two\nlines", "-"]
            and not {"script", "b", "link", "img"} & set(page.tags))
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(format_table(table, "csv"))), table,
                                  check_dtype=False)
    with pytest.raises(ValueError, match="did you mean 'latex'"): format_table(table, "latx")


def test_results_command(tmp_path):
    words = ["results", "quickstart", "--committed", "--by", "t60,method"]
    shown = quick(*words)
    assert shown.exit_code == 0 and "median_cm" in shown.stdout and " to " in shown.stdout
    for ending in FORMATS.values():
        assert quick(*words, "--out", tmp_path / f"table{ending}").exit_code == 0
    assert ((tmp_path / "table.tex").read_text().startswith(r"\begin{tabular}")
            and (tmp_path / "table.html").read_text().startswith("<!DOCTYPE"))
    assert (tmp_path / "table.txt").read_text().strip() == shown.stdout.strip()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"),
                                  results_table("quickstart", by=["t60", "method"], committed=True))
    refused = quick(*words, "--out", tmp_path / "table.pdf")
    assert (refused.exit_code == 2 and "must end in .txt, .csv" in refused.stderr
            and not (tmp_path / "table.pdf").exists())
    for extra, told in ((["--by", "t6"], "did you mean 't60'"),
                        (["--format", "xls"], "format='xls'"), (["--by", ""], "column ''")):
        done = quick(*words[:3], *extra)
        assert done.exit_code == 2 and told in done.stderr
    lost = call(*words, "--out", tmp_path / "none/x.csv")
    assert lost.returncode == 2 and "none" in lost.stderr and "Traceback" not in lost.stderr
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        committed_results("quikstart")


def test_the_papers_tables_cell_by_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_NB_DATA", str(tmp_path))
    for folder in ("results", "papers"): (tmp_path / folder).mkdir()
    head, run = ("run,profile,seed,changed,code,cells,mae,other\n",
                 "2026-{0},smoke,{0},-,{1},{2},{3},5\n".format)
    (tmp_path / "results/quickstart.csv").write_text(head + run(1, "uld", 2, 1.0) + run(
        2, "uld", 2, 3.0) + run(1, "uld", 16, "") + run(1, "one_hot", 2, 0.5))
    (tmp_path / "papers/quickstart.csv").write_text("code,cells,metric,paper,source\n"
                                                    "one_hot,2,mae,0.25,B\nuld,16,mae,0.5,A\n"
                                                    "uld,2,mae,2.5,A\nuld,4,mae,1.5,A\n")
    tables = paper_tables("quickstart", committed=True)
    assert (list(tables) == ["B", "A"] and list(tables["A"])
            == ["code", "cells", "n", "mae", "mae, paper"])  # `other` is in no paper
    assert tables["A"].values.tolist() == [["uld", "16", "0", "/", "0.5"],
                                           ["uld", "2", "2", "2 (1 to 3)", "2.5"],
                                           ["uld", "4", "0", "-", "1.5"]]
    assert tables["B"].values.tolist() == [["one_hot", "2", "1", "0.5", "0.25"]]
    shown = quick("results", "quickstart", "--committed").stdout
    assert ("A: theirs, and ours" in shown and "2 (1 to 3)" in shown
            and "A: theirs" not in quick("results", "quickstart", "--committed", "--rows").stdout)
    monkeypatch.setenv("SSL_NB_RUNS", str(tmp_path / "none"))
    assert (first := quick("results", "quickstart").stdout).startswith(
        "no finished run of quickstart yet") and first.endswith(shown)  # then what is committed
    assert (quick("results", "quickstart", "--format", "csv").stdout == ""
            and quick("results", "quickstart", "--by", "code,cells").stdout.count("one_hot") == 1)
    (tmp_path / "papers/quickstart.csv").unlink()
    assert paper_tables("quickstart", committed=True) == {}


def test_a_column_that_a_summary_needs_for_itself_is_refused():
    import pandas as pd
    from ssl_nb.workbench.tables import summarize
    table = pd.DataFrame({"run": ["a", "b"], "profile": "smoke", "seed": [0, 1], "changed": "-",
                          "t60": 0.2, "n": 5, "mae": [1.0, 2.0]})
    with pytest.raises(ValueError, match="column 'n': the name is taken"): summarize(table, ["t60"])
