"""The documentation: `make docs` builds it into build/docs."""

project = "rmsprop"
copyright = "rmsprop contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = "rmsprop"
html_extra_path = [
    f"{picture}-{theme}.svg"
    for picture in ("speed", "step", "dialects", "precision")
    for theme in ("light", "dark")
]
