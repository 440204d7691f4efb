"""The command `ssl-nb` as a user calls it: good and bad calls, whole runs, interrupted runs."""
import errno, json, os, re, signal, subprocess, time

import nbformat
import pytest
from run_command import COMMAND, in_own_process, in_process
from run_notebook import ROOT
from ssl_nb.workbench.command_line import app
from ssl_nb.workbench.experiments import (RunFailed, experiments, find_experiment, kernel_state,
                                          resolve_parameters, run_experiment)
from typer.testing import CliRunner

call = in_process  # in_own_process where the process itself is the point


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_runs_at_smoke(name, tmp_path):
    done = call("run", name, "--profile", "smoke", "--seed", "1", runs=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path / name).iterdir()
    assert ({p.name for p in folder.iterdir()} - {"weights.safetensors", "card.json"}
            == {"metrics.json", "notebook.ipynb", "report.html"})
    summary = json.loads((folder / "metrics.json").read_text())
    assert summary["parameters"]["profile"] == "smoke" and summary["parameters"]["seed"] == 1
    assert (summary["metrics"] and summary["versions"]["torch"] and summary["hardware"]["cores"]
            and summary["wall_seconds"] > 0)
    assert str(folder / "report.html") in done.stdout and summary["note"] in done.stdout
    table = call("results", name, runs=tmp_path)
    assert table.returncode == 0 and folder.name in table.stdout


def test_same_seed_same_numbers_and_another_seed_others(tmp_path, monkeypatch):
    "A run and, without a start of a kernel each, its cells with the same seed and with another."
    given = {"t60": "0.2", "n_scenes": "2"}
    words = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
    assert call("run", "quickstart", "--profile", "smoke", "--seed", "5", *words,
                runs=tmp_path).returncode == 0
    folder, = (tmp_path / "quickstart").iterdir()
    first = json.loads((folder / "metrics.json").read_text())["metrics"]
    notebook = find_experiment("quickstart")
    code = "\n".join(c.source for c in nbformat.read(notebook, as_version=4).cells
                     if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", []))
    monkeypatch.setenv("SSL_NB_RUN_FOLDER", str(tmp_path))
    def numbers(seed):
        exec(code, resolve_parameters(notebook, given, "smoke", seed))
        return json.loads((tmp_path / "recorded.json").read_text())["metrics"]
    assert first == numbers(5) and first != numbers(3)


def test_own_speech_folder(tmp_path):
    import numpy as np, soundfile
    rng = np.random.default_rng(0)
    (tmp_path / "voice").mkdir()
    for k in range(3):
        soundfile.write(tmp_path / "voice" / f"{k}.wav",
                        0.3 * rng.standard_normal((6000, 2)).clip(-3, 3), 8000)
    done = call("run", "quickstart", "--profile", "smoke", "-p", f"speech={tmp_path / 'voice'}",
                "-p", "t60=[0.0]", "-p", "n_scenes=2", runs=tmp_path / "runs")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words, told", [
    (["run", "quikstart"], "did you mean 'quickstart'"),
    (["run", "quickstart", "-p", "snr_bd=3"], "did you mean 'snr_db'"),
    (["run", "quickstart", "-p", "n_scenes=2.5"], "n_scenes='2.5'"),
    (["run", "quickstart", "-p", "t60=[0.2,x]"], "t60="),
    (["run", "quickstart", "-p", "seed"], "key=value"),
    (["run", "quickstart", "-p", "seed=1", "-p", "seed=2"], "given twice"),
    (["run", "quickstart", "-p", "seed=1", "--seed", "2"], "given twice"),
    (["run", "quickstart", "--profile", "labtop"], "did you mean 'laptop'"),
    (["run", "quickstart", "--seed", "x"], "--seed"),
    (["run", "quickstart", "--seed", "-1"], "seed=-1"),
    (["run", "quickstart", "-p", "seed=99999999999"], "seed=99999999999"),
    (["run", "quickstart", "-p", "snr_db=nan"], "snr_db='nan'"),
    (["results", "quikstart"], "did you mean 'quickstart'"),
    (["runn"], "runn"),
])
def test_refused_before_anything_runs(words, told, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_NB_RUNS", str(tmp_path))
    # in this process: none of them may come as far as a kernel
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and told in done.output and "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    done = in_own_process("run", "quickstart", "-p", "snr_bd=3", runs=tmp_path)
    assert (done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
            and "did you mean 'snr_db'" in done.stderr and list(tmp_path.iterdir()) == [])


@pytest.mark.parametrize("word, told",
                         [("t60=0,0", "different"), ("t60=8", "at most 2"),
                          ("weighting=foo", "weighting='foo'"), ("method=foo", "method='foo'"),
                          ("window=0", "window=0"), ("room_size=3,3", "room_size"),
                          ("speech=", "split=''"), ("snr_db=-500", "snr_db=-500")])
def test_bad_values_are_refused_before_anything_is_simulated(word, told):
    notebook, (name, value) = find_experiment("quickstart"), word.split("=")
    cells = nbformat.read(notebook, as_version=4).cells
    before = cells[:next(k for k, c in enumerate(cells) if c.source == "## Simulate")]
    code = [c.source for c in before
            if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])]
    with pytest.raises(ValueError, match=re.escape(told)):
        exec("\n".join(code), resolve_parameters(notebook, {name: value}))


def test_a_dead_kernel_is_one_line_and_its_run_is_kept(tmp_path):
    source = json.loads((ROOT / "nbs/11_experiments/01_quickstart.ipynb").read_text())
    cells = [c for c in source["cells"] if "parameters" in c["metadata"].get("tags", [])]
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("".join(cells[0]["source"]), metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")],
        metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}})
    (tmp_path / "nbs/11_experiments").mkdir(parents=True)
    nbformat.write(notebook, tmp_path / "nbs/11_experiments/01_dies.ipynb")
    (tmp_path / "settings.ini").write_text("[ssl_nb]\n")
    done = in_own_process("run", "dies", runs=tmp_path / "runs",
                SSL_NB_SETTINGS=str(tmp_path / "settings.ini"))
    assert (done.returncode == 1 and "the kernel died" in done.stderr
            and "Traceback" not in done.stderr)
    assert [p.name.endswith(".failed") for p in (tmp_path / "runs/dies").iterdir()] == [True]


KERNEL = """import json
from pathlib import Path
from ipykernel import get_connection_file
from ssl_nb.workbench.experiments import record
record({"inside": int(Path(get_connection_file()).parent.name.endswith(".partial"))})"""


def kernel_experiment(folder):
    cells = [nbformat.v4.new_code_cell("seed: int = 0  # of nothing",
                                       metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(KERNEL)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
        "name": "python3", "display_name": "x", "language": "python"}}), folder / "01_kernel.ipynb")


def test_a_run_uses_its_own_interpreter_whatever_kernelspecs_there_are(tmp_path, monkeypatch):
    kernel_experiment(tmp_path)
    spec = tmp_path / "kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/nowhere/python", "{connection_file}"],
                                "display_name": "of another Python", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("SSL_NB_RUNS", str(tmp_path / "runs"))
    folder = run_experiment("kernel", progress=False, folder=tmp_path)
    assert json.loads((folder / "metrics.json").read_text())["metrics"] == {"inside": 1}
    assert "kernel.json" not in {p.name for p in folder.iterdir()}


def test_a_kernel_that_cannot_start_is_not_a_lack_of_memory(tmp_path, monkeypatch):
    kernel_experiment(tmp_path)
    (tmp_path / "ipykernel_launcher.py").write_text("raise ImportError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SSL_NB_RUNS", str(tmp_path / "runs"))
    with pytest.raises(OSError, match="does not start: ImportError: broken installation"):
        kernel_state()
    with pytest.raises(RunFailed, match="no kernel starts: .*doctor"):
        run_experiment("kernel", progress=False, folder=tmp_path)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    kernel_experiment(tmp_path)
    def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("ssl_nb.workbench.experiments._execute", full)
    monkeypatch.setenv("SSL_NB_RUNS", str(tmp_path / "runs"))
    with pytest.raises(RunFailed, match="runs/kernel/.*: the disk is full"):
        run_experiment("kernel", progress=False, folder=tmp_path)


def test_damaged_and_abandoned_runs(tmp_path):
    home = tmp_path / "quickstart"
    for name, text in (("20260101-000000-aaaaaaaa", "{broken"), ("20260101-000001-bbbbbbbb", "{}")):
        (home / name).mkdir(parents=True)
        (home / name / "metrics.json").write_text(text)
    (home / ".20260101-000002-cccccccc-999999999.partial").mkdir()  # of a process that was killed
    assert call("run", "quickstart", "--profile", "smoke", "-p", "n_scenes=1", "-p", "t60=0",
                runs=tmp_path).returncode == 0
    with pytest.warns(UserWarning, match="left out, cannot be read") as left_out:
        listed = call("results", "quickstart", runs=tmp_path)
    (tmp_path / "label_codes" / "20260101-000000-aaaaaaaa").mkdir(parents=True)
    (tmp_path / "label_codes" / "20260101-000000-aaaaaaaa" / "metrics.json").write_text("{broken")
    # once, though the papers' tables read the runs again
    with pytest.warns(UserWarning, match="left out") as once:
        call("results", "label_codes", runs=tmp_path)
    assert len(once) == 1 and len(left_out) == 2 and "aaaaaaaa" in str(left_out[0].message)
    assert listed.returncode == 0 and "smoke" in listed.stdout
    assert not list(home.glob(".*"))


def test_bad_settings_are_one_line(tmp_path):
    for words in (["doctor"], ["list"], ["run", "quickstart"]):
        done = call(*words, runs=tmp_path, SSL_NB_PROFILE="fast")
        assert (done.returncode == 2 and "profile='fast'" in done.stderr
                and "Traceback" not in done.stderr)


def test_an_experiment_that_raises_is_kept_as_failed_and_exits_1(tmp_path):
    done = call("run", "quickstart", "--profile", "smoke", "-p", "t60=0.05", runs=tmp_path)
    assert done.returncode == 1 and "smallest T60" in done.stderr
    folder, = (tmp_path / "quickstart").iterdir()
    assert folder.name.endswith(".failed") and not (folder / "metrics.json").exists()
    assert "no finished run" in call("results", "quickstart", runs=tmp_path).stdout


def test_control_c_leaves_nothing_that_looks_whole(tmp_path):
    process = subprocess.Popen([COMMAND, "run", "quickstart", "-p", "n_scenes=500"], cwd=ROOT,
                               env={**os.environ, "SSL_NB_RUNS": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    deadline = time.monotonic() + 120
    while (not list(tmp_path.glob("quickstart/.*partial/notebook.ipynb"))
           and time.monotonic() < deadline):
        time.sleep(0.2)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in told
    assert list((tmp_path / "quickstart").iterdir()) == []


def test_list_and_doctor(tmp_path):
    listed, state = call("list"), call("doctor", runs=tmp_path)
    assert listed.returncode == 0 and "snr_db: float" in listed.stdout
    assert (state.returncode == 0 and "all checksums right" in state.stdout
            and "all is well" in state.stdout)
    broken = call("doctor", runs=tmp_path, SSL_NB_DATA=str(tmp_path),
                  SSL_NB_LOCATA=str(tmp_path / "none"))
    assert broken.returncode == 1 and "SHA256SUMS" in broken.stdout and "locata" in broken.stdout


def test_a_run_needs_the_tag(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("seed: int = 0  # x")],
        metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}),
        tmp_path / "01_bare.ipynb")
    with pytest.raises(ValueError, match="tagged 'parameters'"):
        run_experiment("bare", folder=tmp_path)
