"""Every chapter, from top to bottom, in a fresh process of its own."""
import pytest
from run_notebook import ROOT, chapters, run


@pytest.mark.parametrize("chapter", chapters(), ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_chapter_runs(chapter): run(chapter)
