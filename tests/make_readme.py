"""README.md from nbs/index.ipynb: the text and figures, without the code of the cells tagged
hide_input."""
import re
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.writers import FilesWriter
from traitlets.config import Config

settings = Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"hide_input"}})
text, resources = MarkdownExporter(config=settings).from_filename(
    "nbs/index.ipynb", {"output_files_dir": "README_files", "unique_key": "README"})
# links are relative to nbs/ there
text = re.sub(r"\]\((?!https?:|README_files/)([^)]*\.ipynb)\)", r"](nbs/\1)", text)
FilesWriter(build_directory=str(Path.cwd())).write(
    re.sub(r"\n{3,}", "\n\n", text).replace("![png]", "![A room from above: microphones, talker, "
                                            "and where the talker was found]"), resources, "README")
