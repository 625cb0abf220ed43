"""The hooks of mkdocs.yml: some pages are made from the code when the site is built."""

from nixbox.cli.site import on_config, on_files

__all__ = ["on_config", "on_files"]
