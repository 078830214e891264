"""Renders pages and forms: Jinja files in a `templates/` folder beside the code that fills them in, and the form that both sides need.

`default_policy` is the policy that a new site folder begins with: `SitePolicy` in its defaults, with a comment on each rule for whoever
edits it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape

Filters = Mapping[str, Callable[..., Any]]


def render(package: str, name: str, /, filters: Filters | None = None, **values: Any) -> str:
    """Renders the template `name` of `package`.

    Args:
        package: the package in whose folder `templates/` lies; callers pass their own `__package__`. What is not found there is
            looked for in the folder beside this module, which holds what pages share: `base.html`, `macros.html`, `style.css`.
        name: the file's path below `templates/`. Values are escaped where it ends in `.html`, and nowhere else.
        filters: what the template calls with `|`, by name, beyond Jinja's own.
        values: what the template names.

    Raises:
        jinja2.TemplateNotFound: there is no such file.
        jinja2.UndefinedError: the template names a value that was not given.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(__package__)]),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name).render(values)


def default_policy() -> str:
    """Writes the text of a new `policy.yaml`."""
    return render("pneumofed.common.config", "policy.yaml")
