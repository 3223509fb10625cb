"""What MkDocs builds: files of the whole repository at their own paths; links then work as on a code host."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "lowmem_kernels/*/README.md",
    "bench/**/*.md",
    "examples/**/*.md",
)
# pictures, figures and sources that pages link to; they are copied as they are
ASSETS = (
    "docs/**/*.png",
    "docs/**/*.svg",
    "docs/**/*.css",
    "docs/**/*.py",
    "bench/**/*.csv",
    "bench/**/*.json",
    "bench/**/*.png",
    "bench/**/*.py",
    "examples/**/*.py",
    "lowmem_kernels/**/*.py",
    "python/**/*.py",
    "tests/**/*.py",
    "LICENSE",
    "Makefile",
    "pyproject.toml",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of ``docs_dir``, which MkDocs found, by those of the repository; a theme's files stay."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for pattern in PAGES + ASSETS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
