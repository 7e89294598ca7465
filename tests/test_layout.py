"""The package mapping of docs/adr/0002: folders at the root, imported through src/paceline."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [
    "bench",
    "cluster",
    "decode_worker",
    "engine",
    "kernels",
    "kv_transfer",
    "prefill_worker",
    "router",
    "worker",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_linked_into_the_package_by_a_relative_link(folder: str) -> None:
    link = ROOT / "src" / "paceline" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", "..", folder)
    assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_package_is_imported_through_src(folder: str) -> None:
    package = importlib.import_module(f"paceline.{folder}")
    assert list(package.__path__) == [str(ROOT / "src" / "paceline" / folder)]


def test_repository_root_is_not_on_the_import_path() -> None:
    # An empty entry stands for the working directory, which is the root when pytest starts there.
    assert ROOT not in {Path(entry).resolve() for entry in sys.path}


def test_kernels_has_no_init_file() -> None:
    # With one, a root on sys.path would let transformers take our folder for its `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_conftest_at_the_root() -> None:
    assert not (ROOT / "conftest.py").exists()


def test_every_linked_folder_is_named_here() -> None:
    links = {path.name for path in (ROOT / "src" / "paceline").iterdir() if path.is_symlink()}
    assert links == set(FOLDERS)
