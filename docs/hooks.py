"""For the site: what mkdocs (``on_files``) and griffe, which reads the docstrings (``Options``), need to be told."""

import re
from pathlib import Path
from typing import Any

from griffe import Attribute, ExprCall, Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

_LINK = re.compile(r"\]\((\.\./[^)#\s]+)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that a page links to (results, programs), under their paths in the repository.

    A missing file, or a link to a page outside docs/, then fails the strict build.
    """
    docs = Path(config.docs_dir).resolve()
    links = {link for page in docs.glob("*.md") for link in _LINK.findall(page.read_text(encoding="utf-8"))}
    for link in sorted(links):
        path = (docs / link).resolve()
        if path.is_file() and path.suffix != ".md":
            file = File.generated(config, link, abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED)
            file.dest_uri = path.relative_to(docs.parent).as_posix()
            files.append(file)
    return files


class Options(Extension):
    """Shows the default of a field made by ``checks.option(default, help)``, not the call."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        if isinstance(attr.value, ExprCall) and str(attr.value.function) == "checks.option":
            attr.value = attr.value.arguments[0]
