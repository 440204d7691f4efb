"""One symbol, one meaning: the chapters' lists of symbols against the tables of the notation page,
and the equations against the lists.

A chapter's list stands below its heading `## Symbols`: `- $\\tau_{ij}$: meaning, unit`, word for
word as in the table. A letter that only numbers something may be told in addition as `- index $i$:
what it numbers here`.
"""
import json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTATION = ROOT / "nbs" / "00_start" / "02_notation.ipynb"
# here every chapter has a list
PARTS = {"acoustics", "classical", "end_to_end", "labels", "masked", "variational"}
GREEK = ("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu "
         "nu xi pi rho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta "
         "Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell").split()
# words, not symbols
ROMAN = (r"\\(?:mathrm|mathsf|mathbf|mathbb|text|operatorname\*?|begin|end|tag)\s*"
         r"(?:\{[^{}]*\}|[A-Za-z])")
SUBSCRIPT = r"_(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|[^\\{}])"
STARS = r"\^(?:\{\s*\}|\*|\+|[xyz](?![A-Za-z]))"  # signs and axes, not exponents
TOKEN = r"\\mathcal\s*\{?\s*[A-Za-z]\}?|\\[A-Za-z]+|[A-Za-z]"


def letters(formula):
    """The base letters of a formula in order: words, accents and subscripts left out, what stands
    in exponents and limits kept."""
    text = re.sub(ROMAN, " ", formula)
    while (shorter := re.sub(SUBSCRIPT, " ", text)) != text: text = shorter
    found = []
    for token in re.findall(TOKEN, re.sub(STARS, " ", text)):
        if token.startswith(r"\mathcal"):
            found.append(r"\mathcal " + re.sub(r"\\mathcal|[\s{}]", "", token))
        elif token[1:] in GREEK if token[0] == "\\" else True: found.append(token)
    return found


def plain(symbol):
    """One way to write a symbol: no braces around a single letter or command, no blanks but the one
    that ends a command."""
    text = re.sub(r"\s+", " ", re.sub(r"\{\s*(\\[A-Za-z]+|[A-Za-z0-9])\s*\}", r" \1", symbol))
    return re.sub(r"(?<![A-Za-z]) | (?![A-Za-z])", "", text)


def cells(path):
    return [("".join(c["source"]), c["cell_type"])
            for c in json.loads(path.read_text(encoding="utf8"))["cells"]]


def under(path, heading):
    "The Markdown below a heading up to the next heading of the same or a higher level, or None."
    level, text, open_ = heading.count("#"), [], False
    for source, kind in cells(path):
        if kind != "markdown": continue
        for line in source.splitlines():
            if line.strip() == heading: open_ = True
            elif open_ and re.match(rf"#{{1,{level}}} ", line): return "\n".join(text)
            elif open_: text.append(line)
    return "\n".join(text) if open_ else None


def table(path=NOTATION):
    "The rows of the tables of symbols: (symbol, meaning, unit, where it is defined)."
    rows = re.findall(r"^\| \$(.+?)\$ \|(.*)\|$", under(path, "## The symbols"), re.M)
    return [(plain(s), *(part.strip() for part in rest.split("|"))) for s, rest in rows]


def index_law(path=NOTATION):
    "The letters that the law of indices names."
    first = re.findall(r"^\| (.+?) \|", under(path, "## The law of indices"), re.M)
    return {letter for cell in first for formula in re.findall(r"\$(.+?)\$", cell)
            for letter in letters(formula)}


def listed(path):
    "What a chapter's list says: its symbols with their text, and its own indices."
    lines = re.findall(r"^- (index )?\$(.+?)\$: (.*)$", under(path, "## Symbols") or "", re.M)
    return ([(plain(s), text.strip()) for index, s, text in lines if not index],
            {s for index, s, _ in lines if index})


def equations(path):
    "The numbered display equations of a notebook."
    text = "\n".join(source for source, kind in cells(path) if kind == "markdown")
    return [e for e in re.findall(r"\$\$(.*?)\$\$", text, re.S) if r"\tag" in e]


def faults(path, rows, law):
    "What is wrong with a chapter's symbols, in words."
    told = {symbol: meaning + (f", {unit}" if unit else "") for symbol, meaning, unit, _ in rows}
    symbols, own = listed(path)
    bad = [f"{s}: not in the table" for s, _ in symbols if s not in told]
    bad += [f"{s}: {text!r}, but the table says {told[s]!r}" for s, text in symbols
            if s in told and text != told[s]]
    known = (law | {letter for s in own for letter in letters(s)}
             | {letters(s)[0] for s, _ in symbols if letters(s)})
    bad += [f"{letter}: in equation {re.search(r'tag *{(.*?)}', e)[1]}, but not in the list"
            for e in equations(path) for letter in dict.fromkeys(letters(e)) if letter not in known]
    return bad


def name(path): return re.sub(r"^\d+[a-z]?_", "", path.stem)


NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
             if not any(s.startswith((".", "_")) for s in p.relative_to(ROOT).parts)]
WITH_LIST = [p for p in NOTEBOOKS if p != NOTATION and under(p, "## Symbols") is not None]


def test_the_table_is_whole_and_no_symbol_stands_twice():
    rows = table()
    assert len(rows) > 100 and all(len(row) == 4 and row[1] and row[3] for row in rows), ([
        r for r in rows if len(r) != 4 or not r[1] or not r[3]])
    symbols = [row[0] for row in rows]
    assert sorted(symbols) == sorted(set(symbols)), sorted({s for s in symbols
                                                            if symbols.count(s) > 1})
    # a letter of the law has no meaning of its own beside it
    assert not {row[0] for row in rows} & index_law()


@pytest.mark.parametrize("path", WITH_LIST, ids=name)
def test_symbols_of_a_chapter(path): assert faults(path, table(), index_law()) == []


def test_chapters_without_a_list():
    missing = ({name(p) for p in NOTEBOOKS if re.sub(r"^\d+_", "", p.parent.name) in PARTS}
               - {name(p) for p in WITH_LIST})
    assert not missing, f"no heading '## Symbols' with a list below it: {sorted(missing)}"


def test_letters_of_a_formula():
    assert letters(r"\Sigma_u = (c\,\sigma)^2\left(E_u^{\mathsf T}\Big[\sum_i (m_i - \bar "
                   r"m)\Big]E_u\right)^{-1}. \tag{6}") == [
        r"\Sigma", "c", r"\sigma", "E", "m", "m", "E"]
    assert letters(r"\mathcal L_{\mathrm{position}} + \mathrm e^{-b_k} X_j^*(k)\,\hat\rho^x_{\hat "
                   r"k+j} \in \mathcal{N}") == [
        r"\mathcal L", "b", "X", "k", r"\rho", r"\mathcal N"]
    assert (plain(r" \tilde  {X}_{i } ") == plain(r"\tilde X_i")
            and letters(plain(r"\tilde X_i")) == ["X"])
    assert letters(r"\int_0^{B} f\,\mathrm df \operatorname{hat}(\chi - i) \begin{cases} "
                   r"\text{else}\end{cases}") == ["B", "f", "f", r"\chi", "i"]


def test_faults_are_seen(tmp_path):
    """A symbol that is not in the table, one with another meaning, and a letter of an equation that
    no list names."""
    def notebook(*sources):
        path = tmp_path / "chapter.ipynb"
        path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": s}
                                              for s in sources]}), encoding="utf8")
        return path
    rows = [("c", "speed of sound", "m/s", "geometry"), (r"\tau_{ij}", "delay", "s", "geometry")]
    good = [r"$$\tau_{ij} = k / c \tag{1}$$", "## Symbols",
            "- $c$: speed of sound, m/s\n- $\\tau_{ij}$: delay, s"]
    assert faults(notebook(*good), rows, {"k"}) == []
    assert faults(notebook(good[0], "## Symbols", "- $c$: speed of sound, m/s\n- $\\tau_{ij}$: "
                                                  "delay, samples"), rows, {"k"})
    assert (faults(notebook(*good[:2], good[2] + "\n- $d$: distance, m"), rows, {"k"})
            == ["d: not in the table"])
    assert faults(notebook(*good), rows, set()) == ["k: in equation 1, but not in the list"]
    assert (faults(notebook(*good[:2], good[2] + "\n- index $k$: number of the bin"), rows, set())
            == [])
    assert faults(notebook(*good[:2], good[2], "## Exercises", "- $z$: not part of the list"), rows,
                  {"k"}) == []
