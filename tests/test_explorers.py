"""Explorers of the website: their pure functions in node, and their tables against the nets."""
import json, math, shutil, subprocess

import pytest
import torch
from run_notebook import ROOT

FOLDER = ROOT / "nbs" / "explorers"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def in_node(name, expression):
    "What an expression gives in a module."
    code = (FOLDER / f"{name}.js").read_text() + f"\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run(["node", "--input-type=module", "-"], input=code, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wav2pos_table(): return json.loads((FOLDER / "wav2pos.json").read_text())


@needs_node
def test_wav2pos_states_and_distances():
    "A microphone goes on, hidden, off, and skips what would leave too few."
    once = "[0, 1, 2].reduce((s, _) => [...s, turned(s.at(-1), 0)], [[0, 0, 0, 0, 0, 0]])"
    told = in_node("wav2pos", f"""[{once}, turned([0, 0, 0, 0, 2, 2], 0),
        turned([1, 0, 0, 0, 2, 2], 0), turned([0, 0, 1, 1, 1, 1], 0),
        allowed([0, 0, 0, 2, 2, 2]), distance([1, 2, 3], [4, 6, 3])]""")
    assert [s[0] for s in told[0]] == [0, 1, 2, 0]
    assert told[1][0] == 1 and told[2][0] == 0 and told[3][0] == 0
    assert told[4] is False and told[5] == 5


@needs_node
def test_wav2pos_model_answers_from_its_table():
    table = '{"000000u": [100, 200, 50], "000010k": [130, 240, 50, 400, 400, 0]}'
    scene = ('{size: [5, 5, 2], talker: [1, 2, .5], mics: [0, 1, 2, 3, 4, 5].map(k => [4, 4, 0])}')
    first, later, words = in_node("wav2pos", f"""(() => {{
        const m = fixed_model({scene}, {table}), first = m.get("found"); let heard = 0;
        m.on("change:found", () => {{ heard += 1; }});
        m.set("states", [0, 0, 0, 0, 1, 0]); m.set("emitted", true); m.save_changes();
        return [first, [heard, m.get("found")], told({scene}, m.get("states"), m.get("found"))];
    }})()""")
    assert first == [[1, 2, 0.5]] and later == [1, [[1.3, 2.4, 0.5], [4, 4, 0]]]
    assert "50 cm from where she is" in words and "Microphone 4 is put 0 cm" in words


def test_wav2pos_table_is_whole_and_small(wav2pos_table):
    """Set-ups by counting: 2, 1 or no microphone off, of the others any hidden but for none or one
    that is left in a known place."""
    n = sum(math.comb(6, off) * (2 ** (6 - off) - 1 - (6 - off)) for off in (0, 1, 2))
    assert len(wav2pos_table["answers"]) == 2 * n == 756
    assert all(len(v) == 3 * (1 + k.count("1")) for k, v in wav2pos_table["answers"].items())
    assert (FOLDER / "wav2pos.json").stat().st_size < 100_000


def test_wav2pos_table_is_of_the_weights_that_are_there(wav2pos_table, monkeypatch):
    "Some answers, made again."
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    import make_explorer
    from ssl_nb.masked.wav2pos import load_wav2pos
    net, (audio, mics, own, talker) = load_wav2pos(), make_explorer.scene()
    assert torch.allclose(torch.tensor(wav2pos_table["scene"]["talker"]), talker)
    for name in ("000000u", "000000k", "000001u", "201020k", "112001u"):
        now = make_explorer.answer(net, audio, mics, own if name[-1] == "k" else None,
                                   tuple(map(int, name[:-1])))
        assert wav2pos_table["answers"][name] == pytest.approx(now, abs=1)
