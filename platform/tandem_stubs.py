"""Makes the Python package `tandem.v1` from the files in proto/, by protoc.

Building or installing the package does it (`[tool.setuptools.cmdclass]` in pyproject.toml names `BuildPy`). By hand,
after a change of a .proto file: `python platform/tandem_stubs.py`. What it makes is not committed, and this module is
not part of the installed package. It needs grpcio-tools, whose version fixes what is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGE = "tandem.v1"
_INIT = '"""Messages and services of Tandem\'s gRPC APIs, made from proto/tandem/v1/ by tandem_stubs.py."""\n'


def generate(root: Path = _ROOT) -> Path:
    """Make modules and type stubs from proto/ under `root`; return their folder. Raises RuntimeError."""
    import grpc_tools
    from grpc_tools import protoc

    protos = sorted(root.glob("proto/tandem/v1/*.proto"))
    if not protos:
        raise RuntimeError(f"{root / 'proto/tandem/v1'} holds no .proto file, so tandem.v1 cannot be made.")
    target = root / "platform"
    folder = target / "tandem" / "v1"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text(_INIT)
    bundled = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "pyi")]
    if protoc.main(["protoc", f"-I{root / 'proto'}", f"-I{bundled}", *outputs, *map(str, protos)]):
        raise RuntimeError("protoc found errors in proto/ (above), so tandem.v1 was not made.")
    return folder


class BuildPy(build_py):  # type: ignore[misc]  # setuptools has no types
    """Makes the stubs first, so that they are there to be packed, also in an editable install."""

    def finalize_options(self) -> None:
        generate()
        packages: list[Any] = self.distribution.packages
        if _PACKAGE not in packages:  # they were listed before it existed
            packages.append(_PACKAGE)
        super().finalize_options()

    def get_source_files(self) -> list[str]:
        """A source distribution also holds what is needed to make the stubs."""
        needed = [Path(__file__).resolve(), *_ROOT.glob("proto/**/*.proto")]
        return [*super().get_source_files(), *(str(file.relative_to(_ROOT)) for file in needed)]


if __name__ == "__main__":
    print(generate())
