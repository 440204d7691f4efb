"""Settings: precedence, and every way to get them wrong."""
from pathlib import Path

import pytest
from ssl_nb.settings import find_settings, load_settings, torch_device


def written(tmp_path, text):
    (tmp_path / "settings.ini").write_text(text, encoding="utf-8")
    return tmp_path / "settings.ini"


def test_environment_over_file_over_defaults(tmp_path):
    file = written(tmp_path,
                   "[ssl_nb]\nprofile = paper\nseed = 3\n[datasets]\nlocata = here/locata\n")
    s = load_settings(file, {"SSL_NB_SEED": "4"})
    assert (s.profile, s.seed, s.device) == ("paper", 4, "auto")
    assert s.datasets == {"locata": tmp_path / "here/locata"} and s.runs == tmp_path / "runs"


def test_home_and_absolute_folders(tmp_path):
    s = load_settings(written(tmp_path, "\ufeff[ssl_nb]\nruns = ~/r\n"),
                      {"SSL_NB_CACHE": "/c", "SSL_NB_LOCATA": "l"})
    assert (s.runs == Path.home() / "r" and s.cache == Path("/c")
            and s.datasets["locata"] == Path.cwd() / "l")
    assert (s.data / "speech").is_dir()  # the embedded speech is found from anywhere


@pytest.mark.parametrize("text, environ, words", [
    ("[ssl_nb]\nsede = 1", {}, ["sede", "value '1'", "did you mean 'seed'", "profile"]),
    ("[ssl_nb]\n[dataset]\n", {}, ["'dataset'", "did you mean 'datasets'"]),
    ("[ssl_nb]\n[datasets]\nlocatta = x", {}, ["locatta", "did you mean 'locata'"]),
    ("[ssl_nb]\nprofile = fast", {}, ["profile='fast'", "smoke, laptop, paper"]),
    ("[ssl_nb]\ndevice = gpu", {}, ["device='gpu'", "auto, cpu, cuda, mps"]),
    ("[ssl_nb]\nseed = -1", {}, ["seed='-1'", "whole number"]),
    ("[ssl_nb]\nseed = 99999999999999999999", {}, ["seed="]),
    ("[ssl_nb]\nseed = ²", {}, ["seed='²'"]),
    ("[ssl-nb]\nseed = 1", {}, ["'ssl-nb'", "did you mean 'ssl_nb'"]),
    ("[ssl_nb\nseed = 1", {}, ["cannot be read"]),
    ("[ssl_nb]\nruns =", {}, ["runs=''", "folder"]),
    ("[ssl_nb]", {"SSL_NB_PROFIL": "smoke"}, ["SSL_NB_PROFIL", "did you mean 'SSL_NB_PROFILE'"]),
    ("[ssl_nb]", {"SSL_NB_DEVICE": ""}, ["device=''"]),
    ("[ssl_nb]\nno equals sign", {}, ["settings.ini", "cannot be read"]),
    ("[ssl_nb]\nseed=1\nseed=2", {}, ["settings.ini", "cannot be read"]),
])
def test_refusals_name_key_value_and_what_is_allowed(tmp_path, text, environ, words):
    with pytest.raises(ValueError) as refusal: load_settings(written(tmp_path, text), environ)
    for word in words: assert word in str(refusal.value)


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.ini"):
        load_settings(environ={"SSL_NB_SETTINGS": str(tmp_path / "nowhere.ini")})


def test_other_tools_settings_are_passed_over(tmp_path, monkeypatch):
    written(tmp_path, "[DEFAULT]\nlib_name = other\n")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_settings(tmp_path / "below") != tmp_path / "settings.ini"
    written(tmp_path, "[ssl_nb]\n")
    assert find_settings(tmp_path / "below") == tmp_path / "settings.ini"


def test_torch_device():
    assert torch_device("cpu").type == "cpu" and torch_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="device='gpu'"): torch_device("gpu")
