"""The page as text: the template with style, script, data and a strict content security policy."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from functools import cache
from importlib import resources
from typing import Any

from hra_fx.view.drawing import Drawing
from hra_fx.view.html.data import page_data
from hra_fx.view.html.pictures import legend, pictures
from hra_fx.view.options import Options
from hra_fx.view.text import clean
from hra_fx.view.theme import as_css

#: The files of the style; later ones have priority.
STYLES = ("colors", "controls", "drawing", "panel", "media")
#: The files of the script, each before those that import it.
SCRIPTS = ("data", "elements", "heat", "stage", "spectrum", "panel", "search", "keyboard", "main")
_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:class|const|function) (\w+))", re.MULTILINE)
_SLOT = re.compile(r"\{\{(\w+)\}\}")


def render(drawing: Drawing, options: Options) -> str:
    """The page of a drawing: one self-contained HTML file.

    Args:
        drawing: the drawing of a model.
        options: levels that are open at first, the module that is the root, the heatmap that is shown at first.

    Example:
        >>> import hra_fx, torch
        >>> from hra_fx.view.drawing import drawing_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> model = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> render(drawing_of(model), Options())[:15]
        '<!doctype html>'
    """
    style, script, tree = _style(), _script(), drawing.tree()
    words = {
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "theme": f' data-theme="{options.theme}"' if options.theme else "",
        "title": html.escape(clean(drawing.title)),
        "style": style,
        "legend": legend(drawing, tree),
        "pictures": pictures(drawing, tree, options),
        "data": as_json(page_data(drawing, tree, options)),
        "script": script,
    }
    return _SLOT.sub(lambda slot: words[slot[1]], _file("page.html"))


def as_json(data: Any) -> str:
    """Data as JSON that cannot be read as markup: ASCII, without `<`.

    >>> as_json({"name": "</script>"})
    '{"name":"\\\\u003c/script>"}'
    """
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    """The source expression that allows only this text inside the page (https://www.w3.org/TR/CSP3/)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    return "\n".join(["", as_css(), *(_file(f"style/{name}.css") for name in STYLES)])


@cache
def _script() -> str:
    """The modules of the script as one text; each is a function with its own names that returns its exports."""
    return "\n" + "\n".join(_as_function(name, _file(f"script/{name}.js")) for name in SCRIPTS)


def _as_function(name: str, text: str) -> str:
    exports = ", ".join(_EXPORT.findall(text))
    body = _EXPORT.sub("", _IMPORT.sub(r"const \1 = $\2;", text))
    return f"const ${name} = (() => {{\n{body}return {{ {exports} }};\n}})();\n"
