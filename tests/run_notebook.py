"""Run notebooks from top to bottom, each in a fresh kernel process of its own.

`python tests/run_notebook.py --inplace [NOTEBOOK ...]` stores the new outputs (all chapters by
default)."""
import argparse, base64, io, os, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
CELL_TIMEOUT = 120  # seconds
# an int is a fine float
TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
# Runs before the first cell: shapes are checked by beartype, in the library and in the notebook's
# own functions, and a warning that our code causes is an error.
CHECKS = f"""
import warnings
from jaxtyping import install_import_hook
install_import_hook("ssl_nb", "{TYPECHECKER}")
get_ipython().run_line_magic("load_ext", "jaxtyping")
get_ipython().run_line_magic("jaxtyping.typechecker", "{TYPECHECKER}")
warnings.filterwarnings("error", module=r"ssl_nb|__main__")
"""


def chapters():
    "The chapters' notebooks in reading order: all under nbs/ but the experiments."
    return [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(
        s.startswith((".", "_")) or s == "11_experiments" for s in p.relative_to(ROOT).parts)]


def shrink_pictures(notebook):
    """Store every PNG with a palette of 128 colours: a third of the size, and no difference that an
    eye would see."""
    from PIL import Image
    for output in (o for c in notebook.cells if c.cell_type == "code" for o in c.outputs):
        data = output.get("data", {}).get("image/png")
        if not data: continue
        picture, small = Image.open(io.BytesIO(base64.b64decode(data))), io.BytesIO()
        few = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        few.save(small, "PNG", optimize=True)
        text = base64.b64encode(small.getvalue()).decode()
        if len(text) < len(data): output["data"]["image/png"] = text


def run(path, inplace=False):
    """Execute one notebook; raises `nbclient.exceptions.CellExecutionError` at the first cell that
    fails."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3",
                                       "language": "python"}
    if not inplace: notebook.cells.insert(0, nbformat.v4.new_code_cell(CHECKS))
    environ = {**os.environ, "IN_TEST": "1",
               "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    client = NotebookClient(notebook,
                            timeout=None if "11_experiments" in path.parts else CELL_TIMEOUT,
                            kernel_name="python3", extra_arguments=["--log-level=ERROR"],
                            resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=environ, cleanup_kc=True)
    if inplace:
        shrink_pictures(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--inplace", action="store_true")
    arguments.add_argument("notebooks", nargs="*", type=Path)
    given = arguments.parse_args()
    for notebook in given.notebooks or chapters():
        start = time.perf_counter()
        run(Path(notebook).resolve(), given.inplace)
        print(f"{notebook}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
