"""The rules of the house: what is generated is fresh, parts import downwards, cells are short,
stored outputs are clean."""
import ast, json, os, re, shutil, subprocess, sys, tomllib
from pathlib import Path

import pytest
from run_notebook import ROOT, chapters

BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))


def code_cells(path):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == "code"]


# --- what is generated is fresh -------------------------------------------------------------------

def copy_of_tree(target):
    "The files of the working tree that git tracks or would track, committed in a new repository."
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if name.startswith("data/speech/") or not (ROOT / name).exists(): continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "tree"]):
        subprocess.run([*git, *command], cwd=target, check=True)


def sync(folder):
    "What `make sync` does."
    # with it nbdev-export does nothing
    environ = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    for command in (["nbdev-clean"], ["nbdev-export"], ["python", "tests/make_readme.py"]):
        subprocess.run([BIN / command[0], *command[1:]], cwd=folder, check=True,
                       capture_output=True, env=environ)
    return subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True,
                          text=True, check=True).stdout


def test_clean_export_and_readme_change_nothing(tmp_path):
    copy_of_tree(tmp_path)
    assert sync(tmp_path) == "", "run `make sync` and commit what it changes"


def test_a_new_chapter_without_its_module_is_noticed(tmp_path):
    copy_of_tree(tmp_path)
    source = (tmp_path / "nbs/03_workshop/06_metrics.ipynb").read_text(encoding="utf-8")
    (tmp_path / "nbs/03_workshop/99_more.ipynb").write_text(
        source.replace("default_exp workshop.metrics", "default_exp workshop.more"),
        encoding="utf-8")
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "add", "-A"], cwd=tmp_path,
                   check=True)
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "chapter"],
                   cwd=tmp_path, check=True)
    assert "?? ssl_nb/workshop/more.py" in sync(tmp_path)


# --- parts import downwards -----------------------------------------------------------------------

CELLAR = {"settings", "arguments"}  # what every part stands on
# what the parts with nets stand on
FLOOR = CELLAR | {"acoustics", "classical", "workshop", "plots"}
ALLOWED = {"settings": set(), "arguments": {"settings"}, "acoustics": CELLAR,
           "plots": CELLAR | {"acoustics"}, "workshop": CELLAR | {"acoustics", "plots"},
           "classical": CELLAR | {"acoustics", "workshop", "plots"},
           **dict.fromkeys(("end_to_end", "labels", "masked", "variational", "adaptation"), FLOOR),
           "deployment": FLOOR | {"end_to_end", "labels", "masked", "variational", "adaptation"}}
# allowed inside functions, not at the top of a module: what draws, and what starts the command
DRAWN = {"acoustics": {"plots"}, "settings": {"workbench"}}


def imports(source, package, inside_functions=True):
    "(module, name or None) of every import of a module of `package` (such as 'ssl_nb.acoustics')."
    tree, found = ast.parse(source), []
    drawing = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda))
               for n in ast.walk(f)}
    for node in ast.walk(tree):
        if id(node) in drawing and not inside_functions: continue
        if isinstance(node, ast.Import): found += [(a.name, None) for a in node.names]
        if isinstance(node, ast.ImportFrom):
            above = (package.split(".")[:len(package.split(".")) - node.level + 1] if node.level
                     else [])
            module = ".".join([*above, *filter(None, [node.module])])
            found += [(module, a.name) for a in node.names]
    return found


def imported_parts(source, package, inside_functions=True):
    "Parts of ssl_nb that are imported, by any form of import."
    names = [f"{m}.{n}" if m == "ssl_nb" and n else m
             for m, n in imports(source, package, inside_functions)]
    return {n.split(".")[1] for n in names if n.startswith("ssl_nb.")}


def forbidden(part, source, package="ssl_nb.acoustics"):
    """Parts that `part` must not import: anywhere, or at the top of the module where drawing is
    allowed."""
    everything = {*ALLOWED, "workbench"}
    allowed, drawn = ALLOWED.get(part, everything), DRAWN.get(part, set())
    return (imported_parts(source, package) - {part} - allowed - drawn
            | imported_parts(source, package, False) - {part} - allowed)


MODULES = [p for p in sorted((ROOT / "ssl_nb").rglob("*.py"))
           if p.stem not in ("__init__", "_modidx")]
by_module = pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(ROOT)))


def package_of(module): return ".".join(module.relative_to(ROOT).parent.parts)


@by_module
def test_import_rule(module):
    part = module.relative_to(ROOT / "ssl_nb").with_suffix("").parts[0]
    assert not forbidden(part, module.read_text(encoding="utf-8"), package_of(module))


def test_import_rule_sees_every_form_of_import():
    assert forbidden("acoustics", "from ssl_nb.labels import x") == {"labels"}
    assert forbidden("acoustics", "import ssl_nb.workbench.experiments") == {"workbench"}
    assert forbidden("acoustics", "def f():\n    from ssl_nb import labels") == {"labels"}
    assert forbidden("acoustics", "from ..labels.codes import x") == {"labels"}
    assert forbidden("acoustics", "from .. import labels") == {"labels"}
    assert forbidden("acoustics", "from ..plots import x") == {"plots"}
    assert not forbidden("acoustics", "def f():\n    from ..plots import x")
    assert not forbidden("acoustics", "from ssl_nb.settings import s\nfrom ..arguments import x\n"
                                      "from .geometry import y")


def private_imports(source, own):
    "Private names that the module `own` (such as 'ssl_nb.acoustics.rooms') takes from another one."
    return {f"{m}.{n}" for m, n in imports(source, own.rsplit(".", 1)[0])
            if m.startswith("ssl_nb") and m != own and (n or m.split(".")[-1]).startswith("_")}


@by_module
def test_no_private_name_is_imported_from_another_module(module):
    own = ".".join(module.relative_to(ROOT).with_suffix("").parts)
    assert private_imports(module.read_text(encoding="utf-8"), own) == set()


def test_private_imports_are_seen():
    own = "ssl_nb.acoustics.rooms"
    assert private_imports("from .signals import _x, y", own) == {"ssl_nb.acoustics.signals._x"}
    assert private_imports("def f():\n    from ssl_nb.plots import _z", own) == {"ssl_nb.plots._z"}
    assert private_imports("from .rooms import _x\nfrom jaxtyping import _y", own) == set()


def modules_of(notebooks):
    "Module of every chapter that exports, and what is wrong with how it says so."
    homes, faults = {}, []
    for path in notebooks:
        lines = [line for c in code_cells(path) for line in "".join(c["source"]).splitlines()]
        named = [m[1] for line in lines if (m := re.match(r"#\|\s*default_exp (\S+)", line))]
        exports = [m[1] for line in lines if (m := re.match(r"#\|\s*exports?\b *(\S*)", line))]
        if any(exports): faults.append(f"{path.name} exports into {next(filter(None, exports))}")
        if bool(exports) != bool(named) or len(named) > 1: faults.append(f"{path.name}: {named}")
        for name in named:
            if name in homes: faults.append(f"{name} is fed by {homes[name]} and {path.name}")
            if name.split(".")[-1] != path.stem[3:]: faults.append(f"{path.name} makes {name}")
            homes[name] = path.name
    return homes, faults


def test_one_chapter_makes_one_module_of_its_name():
    homes, faults = modules_of(NOTEBOOKS)
    assert faults == []
    made = {".".join(p.relative_to(ROOT / "ssl_nb").with_suffix("").parts) for p in MODULES}
    assert made == set(homes), "modules without a chapter, or chapters without a module"


def test_a_module_of_two_chapters_is_seen(tmp_path):
    def notebook(name, *sources):
        path = tmp_path / name
        cells = [{"cell_type": "code", "source": [s]} for s in sources]
        path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
        return path
    good = notebook("01_rooms.ipynb", "#| default_exp acoustics.rooms", "#| export\nx = 1")
    assert modules_of([good]) == ({"acoustics.rooms": "01_rooms.ipynb"}, [])
    assert modules_of([good, notebook("02_rooms.ipynb", "#| default_exp acoustics.rooms",
                                      "#| exports")])[1]
    assert modules_of([notebook("03_more.ipynb", "#| export acoustics.rooms\ny = 1")])[1]
    assert modules_of([notebook("04_more.ipynb", "#| default_exp acoustics.less", "#| export")])[1]


def test_numbers_of_chapters_have_no_letters_and_no_gaps():
    for folder in sorted({p.parent for p in NOTEBOOKS} - {ROOT / "nbs"}):
        numbers = [p.stem.split("_")[0] for p in sorted(folder.glob("*.ipynb"))]
        assert numbers == [f"{k:02d}" for k in range(1, len(numbers) + 1)], folder.name


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch matplotlib pyroomacoustics pandas scipy papermill anywidget soundfile "
             "numpy".split())
    code = f"import sys, ssl_nb, ssl_nb.settings; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          check=True).stdout.strip() == "[]"


def test_importing_the_floor_leaves_plots_and_simulator_alone():
    names = [m for m in sorted(modules_of(NOTEBOOKS)[0])
             if m.split(".")[0] in ("arguments", "acoustics", "classical", "workshop")]
    heavy = ("matplotlib pyroomacoustics papermill anywidget accelerate zarr dask distributed "
             "pooch".split())
    code = (f"import importlib, sys\nfor m in {names}: importlib.import_module('ssl_nb.' + m)\n"
            f"print([m for m in {heavy} if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          check=True).stdout.strip() == "[]"


# --- cells and stored outputs ---------------------------------------------------------------------

def cell_faults(cells):
    "What breaks the cell budget: hard stop 40 lines, median at most 10."
    lines = sorted(len("".join(c["source"]).splitlines()) for c in cells)
    faults = [f"a cell of {n} lines" for n in lines if n > 40]
    return faults + ([f"median cell of {lines[len(lines) // 2]} lines"]
                     if lines and lines[len(lines) // 2] > 10 else [])


WIDEST = 100  # characters: what a column of the website shows


def wide_lines(text):
    "Lines of code that are too long; directives such as captions are not shown as code."
    return [line for line in text.splitlines() if len(line) > WIDEST and not line.startswith("#|")]


def output_faults(cells, size):
    """What must not be stored: nothing at all, tracebacks, error streams, machine paths, more than
    300 KB of outputs."""
    outputs = [o for c in cells for o in c.get("outputs", [])]
    text = json.dumps(outputs)
    pictures = re.sub(r'"image/png": "[^"]*"', '""', text)
    faults = [] if outputs else ["no output is stored"]
    if any(o["output_type"] == "error" for o in outputs): faults.append("a stored traceback")
    if any(o.get("name") == "stderr" for o in outputs): faults.append("a stored error stream")
    if "jupyter.widget" in text: faults.append("a stored widget, which is dead without its kernel")
    faults += [f"a machine path: {m}" for m in re.findall(
        r"(?:/(?:home|root|Users|tmp|work)/|[A-Z]:\\\\\\\\Users)[^\"\\s]{0,40}", pictures)]
    if len(text) > 300_000: faults.append(f"{len(text) / 1e3:.0f} KB of outputs")
    return faults


@by_name
def test_cells_are_short(path): assert cell_faults(code_cells(path)) == []


@by_name
def test_code_fits_the_column(path):
    assert [line for c in code_cells(path) for line in wide_lines("".join(c["source"]))] == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda p: p.name)
def test_tests_fit_the_column(path): assert wide_lines(path.read_text(encoding="utf-8")) == []


def test_wide_lines_are_seen(): assert wide_lines("x" * 100) == [] and wide_lines("x\n" + "x" * 101)


@by_name
def test_stored_outputs(path): assert output_faults(code_cells(path), path.stat().st_size) == []


def test_the_output_gate_can_fail():
    stream = lambda text, name="stdout": {"source": [], "outputs":
                                          [{"output_type": "stream", "name": name, "text": [text]}]}
    assert output_faults([stream("fine")], 0) == []
    assert (output_faults([stream("/home/me/x")], 0) and output_faults([stream("x", "stderr")], 0)
            and output_faults([], 0))
    assert output_faults([{"source": [], "outputs": [{"output_type": "error", "traceback": []}]}],
                         0)
    assert output_faults([stream("x" * 300_001)], 0)
    assert output_faults([{"source": [], "outputs": [{"output_type": "display_data", "data": {
        "application/vnd.jupyter.widget-view+json": {}}}]}], 0)
    assert (cell_faults([{"source": ["x\n"] * 41}]) and cell_faults([{"source": ["x\n"] * 11}])
            and not cell_faults([{"source": ["x\n"] * 5}]))


@by_name
def test_title_cell_holds_title_and_subtitle_only(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    lines = [line for line in "".join(first["source"]).splitlines() if line.strip()]
    assert (first["cell_type"] == "markdown" and len(lines) == 2 and lines[0].startswith("# ")
            and lines[1].startswith("> "))


@by_name
def test_headings_and_imports_stand_alone(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"][1:]:
        lines = [line for line in "".join(cell["source"]).splitlines() if line.strip()]
        if cell["cell_type"] == "markdown" and any(re.match(r"#{1,6} ", line) for line in lines):
            assert len(lines) == 1, lines[0]
        if cell["cell_type"] != "code": continue
        tree = ast.parse("".join(cell["source"])).body
        imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree]
        assert all(imports) or not any(imports), "".join(cell["source"])[:200]


def unused_imports(source):
    """Names that are imported and then neither used nor spoken of in any string (annotations of
    shapes are strings)."""
    tree = ast.parse(source)
    names = {(a.asname or a.name).split(".")[0] for node in ast.walk(tree)
             if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names} - {"*"}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    strings = " ".join(node.value for node in ast.walk(tree)
                       if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {name for name in names - used if not re.search(rf"\b{name}\b", strings)}


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted((ROOT / "ssl_nb").rglob("*.py")),
                                  *sorted((ROOT / "tests").glob("*.py"))],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_every_import_is_used(path):
    text = (path.read_text(encoding="utf-8") if path.suffix == ".py"
            else "\n".join("".join(c["source"]) for c in code_cells(path)))
    assert unused_imports(text) == set()


def test_unused_imports_are_seen():
    assert unused_imports("import os, json\nfrom math import pi as p, tau\nfrom x import *\n"
                          "json.loads, tau") == {"os", "p"}


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/11_experiments").glob("*.ipynb")),
                         ids=lambda p: p.stem)
def test_experiments_have_a_parameters_cell(path):
    from ssl_nb.workbench.experiments import read_parameters
    known = read_parameters(path)
    assert {"profile", "seed"} <= set(known) and all(p.help for p in known.values())


# --- versions -------------------------------------------------------------------------------------

def test_lock_pins_every_dependency_at_or_above_its_lower_bound():
    from packaging.requirements import Requirement
    from packaging.version import Version
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines()
             if line and not line.startswith("#")]
    assert lines[0] == "torch==2.13.0" and all(re.fullmatch(r"[A-Za-z0-9._-]+==[^=\s+]+", line)
                                               for line in lines)
    pins = {name.lower().replace("_", "-"): Version(version)
            for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier, text


def test_the_website_lists_every_notebook_once():
    entries = re.findall(r"^\s+- (\S+\.ipynb)$", (ROOT / "_quarto.yml").read_text(),
                         flags=re.MULTILINE)
    assert sorted(entries) == sorted(p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS)
    assert (ROOT / "nbs/_quarto.yml").resolve() == ROOT / "_quarto.yml"  # nbdev reads it there


def test_every_chapter_is_found(): assert len(chapters()) >= 10


# --- lessons --------------------------------------------------------------------------------------

def cells_of(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def exercise_faults(cells):
    "Exercises without a folded answer cell that asserts or shows something."
    text = lambda c: "".join(c["source"])
    heads = [k for k, c in enumerate(cells) if text(c).strip() == "## Exercises"]
    if not heads: return []
    after = cells[heads[0] + 1:]
    asked = [int(n) for c in after if c["cell_type"] == "markdown"
             for n in re.findall(r"^(\d+)\. ", text(c), flags=re.M)]
    answers = [c for c in after
               if text(c).startswith("#| code-fold: true\n#| code-summary: \"Answer")]
    told = [int(re.search(r"Answer to exercise (\d+)\"", text(c))[1]) for c in answers]
    faults = [] if asked and told == asked else [f"exercises {asked}, answer cells {told}"]
    return faults + [f"answer {n} neither asserts nor shows anything" for n, c in zip(told, answers)
                     if "assert" not in text(c) and not c.get("outputs")]


@by_name
def test_every_exercise_has_an_answer_that_runs(path): assert exercise_faults(cells_of(path)) == []


def test_a_missing_answer_is_seen():
    markdown = lambda text: {"cell_type": "markdown", "source": [text]}
    answer = lambda n, code="assert True": {"cell_type": "code", "outputs": [], "source": [
        f"#| code-fold: true\n#| code-summary: \"Answer to exercise {n}\"\n{code}"]}
    asked = [markdown("## Exercises"), markdown("1. Why?\n2. How?")]
    assert exercise_faults([*asked, answer(1), answer(2)]) == []
    assert exercise_faults([*asked, answer(1)]) and exercise_faults([*asked, answer(2), answer(1)])
    assert exercise_faults([*asked, answer(1), answer(2, "x = 1")])
    assert exercise_faults(asked) and not exercise_faults([markdown("no exercises")])


def citations(text):
    "Keys cited in Pandoc's way: [@key], [@a; @b], @key in running text; e-mail addresses are none."
    text = re.sub(r"`[^`]*`", "", text)
    return set(re.findall(r"(?<![\w.])@([a-z]\w*\d{4}\w*)", text))


def entries(bib): return set(re.findall(r"^@\w+\{([^,\s]+),", bib, flags=re.M))


@by_name
def test_every_citation_resolves(path):
    cited = set().union(*(citations("".join(c["source"])) for c in cells_of(path)
                          if c["cell_type"] == "markdown"), set())
    known = entries((ROOT / "nbs/references.bib").read_text(encoding="utf-8"))
    assert cited - known == set()


def test_citations_are_seen():
    text = ("Knapp [@knapp1976gcc; see @allen1979image, p. 3] but me@host2024x, `@code2024x` and "
            "@door")
    assert citations(text) == {"knapp1976gcc", "allen1979image"}
    assert (entries("@article{knapp1976gcc,\n title={x}}\n@misc{b2020c, }")
            == {"knapp1976gcc", "b2020c"})


@pytest.mark.parametrize("path",
                         [p for p in NOTEBOOKS
                          if p.parent.name[:2] in ("01", "02", "04", "05", "06", "07")],
                         ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_a_chapter_shows_its_method(path):
    "The website prints the source of `exports` cells only: a chapter of methods has some."
    sources = ["".join(c["source"]) for c in code_cells(path)]
    assert any(re.match(r"#\|\s*exports\b", line) for s in sources for line in s.splitlines())


def played_bytes(cells):
    "Size of every sound that is stored in a notebook."
    import base64
    htmls = ["".join(o.get("data", {}).get("text/html", "")) for c in cells
             for o in c.get("outputs", [])]
    return [len(base64.b64decode(s)) for h in htmls
            for s in re.findall(r'src="data:audio/[\w-]+;base64,([^"]+)"', h)]


@by_name
def test_sounds_are_small(path): assert all(n <= 50_000 for n in played_bytes(code_cells(path)))


def test_sounds_are_seen():
    sound = '<audio><source src="data:audio/ogg;base64,AAAA" type="audio/ogg" /></audio>'
    assert played_bytes([{"outputs": [{"data": {"text/html": [sound]}}]}]) == [3]
