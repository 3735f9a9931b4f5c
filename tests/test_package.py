"""The files that ship with the package are found from a wheel, an sdist and an editable install."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import localllm
from localllm.paths import package_data

ROOT = Path(__file__).resolve().parent.parent
LOOK = """
import json, sys
sys.path.insert(0, sys.argv[1]) if sys.argv[2] == "copy" else __import__("site").addsitedir(sys.argv[1])
import localllm
from localllm.library import resolve_model
from localllm.paths import package_data
print(json.dumps({
    "package": localllm.__file__,
    "version": localllm.__version__,
    "catalog": str(package_data("models.toml")),
    "demo": [resolve_model(name).stat().st_size for name in ("demo", "demo-small")],
    "files": [package_data(name).is_file() for name in ("demo/README.md", "py.typed")],
}))
"""

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the checkout")


def python(*arguments: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, kind: str, out: Path) -> Path:
    python("-m", "hatchling", "build", "-t", kind, "-d", out, cwd=source)
    (built,) = out.iterdir()
    return built


def install(what: str | Path, target: Path) -> None:
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", target, *str(what).split(" "))


def look(target: Path, kind: str = "copy") -> dict[str, object]:
    # Isolated: neither the working directory nor PYTHONPATH may help.
    return json.loads(python("-I", "-c", LOOK, target, kind, cwd=target))


def check(found: dict[str, object], under: Path) -> None:
    assert Path(str(found["package"])).is_relative_to(under)
    assert found["version"] == localllm.__version__
    assert Path(str(found["catalog"])).is_relative_to(under)
    assert Path(str(found["catalog"])).read_bytes() == (ROOT / "models.toml").read_bytes()
    demo = ROOT / "localllm" / "demo"
    assert found["demo"] == [(demo / f"demo-{size}-q8_0.gguf").stat().st_size for size in ("large", "small")]
    assert found["files"] == [True, True]


@pytest.mark.slow
def test_from_a_wheel(tmp_path: Path) -> None:
    wheel = build(ROOT, "wheel", tmp_path / "dist")
    assert wheel.stat().st_size < 10e6
    install(wheel, tmp_path / "site")
    check(look(tmp_path / "site"), tmp_path / "site")


@pytest.mark.slow
def test_from_an_sdist(tmp_path: Path) -> None:
    sdist = build(ROOT, "sdist", tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert {f"{source.name}/{name}" for name in ("LICENSE", "README.md", "models.toml", "tests/test_package.py")} <= set(names)
    assert not [name for name in names if ".venv" in name or "__pycache__" in name]
    install(build(source, "wheel", tmp_path / "wheel"), tmp_path / "site")
    check(look(tmp_path / "site"), tmp_path / "site")


@pytest.mark.slow
def test_from_an_editable_install(tmp_path: Path) -> None:
    install(f"--editable {ROOT}", tmp_path / "site")
    check(look(tmp_path / "site", "editable"), ROOT)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no-such\.toml"):
        package_data("no-such.toml")
