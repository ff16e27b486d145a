"""How the documentation is built: ``make docs``. Nothing in it is fetched from elsewhere, and every warning is an error."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pmclip-deploy"
author = "The pmclip-deploy authors"
project_copyright = author
version = release = version_of(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "checks", "generated", "surface"]
exclude_patterns = ["_ext"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = project
html_theme_options = {"navigation_with_keys": False}
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

# Types of other packages, and ours that are not public, are named in signatures without a link: no inventory is fetched.
nitpick_ignore_regex = [("py:.*", r"(?!pmclip_deploy\.).*"), ("py:class", r"pmclip_deploy\.\w+\..*")]
python_use_unqualified_type_names = True
autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"

# Every example finds CT_small of pydicom's test files as scan.dcm.
doctest_global_setup = """
import os, shutil, tempfile
from pydicom.data import get_testdata_file
import pmclip_deploy as pm
_before, _folder = os.getcwd(), tempfile.mkdtemp()
os.chdir(_folder)
_ = shutil.copy(str(get_testdata_file("CT_small.dcm")), "scan.dcm")
"""
doctest_global_cleanup = """
os.chdir(_before)
shutil.rmtree(_folder)
"""
