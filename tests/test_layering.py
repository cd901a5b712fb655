"""Every include and import against the table of layers, and what `import ternaryforge` loads."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Layer -> the other layers whose headers it may include. The order is the one of CONTRIBUTING.md.
LAYERS: dict[str, set[str]] = {
    "base": set(),
    "simd": {"base"},
    "formats": {"base"},
    "kernels": {"base", "simd", "formats"},
    "io": {"base", "formats"},
    "quant": {"base", "formats", "kernels", "io"},
    "model": {"base", "formats", "kernels", "io"},
    "runtime": {"base", "simd", "kernels", "model"},
    "bindings": {"base", "simd", "formats", "kernels", "io", "quant", "model", "runtime"},
    "embedded": set(),
}
# Header (or its first folder) -> the only layers that may include it, where not every layer may.
HEADERS: dict[str, set[str]] = {
    "hwy": {"simd", "kernels"},
    "pybind11": {"bindings"},
    "Python.h": {"bindings"},
    "fstream": {"base", "io"},
    "filesystem": {"base", "io"},
    "base/mapped_file.h": {"base", "io", "bindings"},
}
# Module -> the only folders of python/ternaryforge that may import it.
MODULES: dict[str, set[str]] = {
    "torch": {"torch"},
    "transformers": {"hf"},
}

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')
OPENMP = re.compile(r'^\s*#\s*(pragma\s+omp\b|include\s*[<"]omp\.h)|\b_Pragma\s*\(\s*"omp\b')
OPENMP_FILES = {"base/parallel.h", "base/parallel.cc"}


def cpp_violations(cpp: Path) -> Iterator[str]:
    for path in sorted(p for p in cpp.rglob("*") if p.suffix in {".c", ".cc", ".h"}):
        name = path.relative_to(cpp).as_posix()
        layer = name.split("/")[0]
        if layer not in LAYERS:
            yield f"{name}: {layer} is not in the table of layers"
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if OPENMP.search(line) and name not in OPENMP_FILES:
                yield f"{name}:{number}: OpenMP outside base/parallel"
            if (match := INCLUDE.match(line)) is None:
                continue
            header = match[1]
            folder = header.split("/")[0]
            foreign_layer = folder in LAYERS and folder not in {layer, *LAYERS[layer]}
            allowed_layers = HEADERS.get(header, HEADERS.get(folder))
            if foreign_layer or (allowed_layers is not None and layer not in allowed_layers):
                yield f"{name}:{number}: {layer} includes {header}"


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            # With the name, because `from ternaryforge import hf` imports the module ternaryforge.hf.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def python_violations(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        folder = name.split("/")[0]
        for number, module in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            allowed_folders = MODULES.get(module.split(".")[0])
            if allowed_folders is not None and folder not in allowed_folders:
                yield f"{name}:{number}: imports {module}"
            if folder == "torch" and f"{module}.".startswith("ternaryforge.hf."):
                yield f"{name}:{number}: torch imports {module}"


def plant(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")


def test_cpp_keeps_its_layers() -> None:
    assert list((ROOT / "cpp").rglob("*.cc")), "nothing was read"
    assert list(cpp_violations(ROOT / "cpp")) == []


def test_python_keeps_its_layers() -> None:
    assert list((ROOT / "python" / "ternaryforge").rglob("*.py")), "nothing was read"
    assert list(python_violations(ROOT / "python" / "ternaryforge")) == []


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their names alone, so that a whole run would stop at the second one."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_import_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, ternaryforge; print({'torch', 'transformers'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("formats/a.h", "#include <hwy/highway.h>"),
        ("formats/a.h", "#include <omp.h>"),
        ("formats/a.cc", '#include "simd/targets.h"'),
        ("base/a.h", '#include "formats/layout.h"'),
        ("kernels/a.cc", "#pragma omp parallel for"),
        ("kernels/a.cc", "  #  pragma   omp simd"),
        ("kernels/a.h", '#define LOOP _Pragma("omp parallel for")'),
        ("kernels/a.cc", '#include "io/gguf_reader.h"'),
        ("kernels/a.cc", '#include "base/mapped_file.h"'),
        ("kernels/a.cc", "#include <fstream>"),
        ("quant/a.cc", '#include "model/spec.h"'),
        ("model/a.cc", '#include "quant/packer.h"'),
        ("runtime/a.cc", '#  include "quant/packer.h"'),
        ("model/a.cc", "#include <pybind11/pybind11.h>"),
        ("utils/a.h", "#include <vector>"),
    ],
)
def test_cpp_violation_is_caught(tmp_path: Path, name: str, line: str) -> None:
    plant(tmp_path, name, f"// A file.\n{line}\n")
    assert len(list(cpp_violations(tmp_path))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("base/parallel.cc", "#include <omp.h>\n#pragma omp parallel\n"),
        ("kernels/a.cc", '#include "kernels/a.h"\n#include <hwy/highway.h>\n#include "simd/dot-inl.h"\n'),
        ("bindings/a.cc", '#include <pybind11/pybind11.h>\n#include "runtime/generator.h"\n'),
        ("formats/a.cc", '// Not an include: #include "io/x.h", nor a #pragma omp.\n#include <vector>\n'),
    ],
)
def test_cpp_rule_lets_pass(tmp_path: Path, name: str, text: str) -> None:
    plant(tmp_path, name, text)
    assert list(cpp_violations(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("model.py", "import torch.nn"),
        ("model.py", "def f():\n    from transformers import AutoModel"),
        ("hf/config.py", "import torch"),
        ("torch/ops.py", "import transformers"),
        ("torch/ops.py", "from ternaryforge.hf.config import TernaryForgeConfig"),
        ("torch/ops.py", "from ternaryforge import hf"),
    ],
)
def test_python_violation_is_caught(tmp_path: Path, name: str, line: str) -> None:
    plant(tmp_path / "ternaryforge", name, f"{line}\n")
    assert len(list(python_violations(tmp_path / "ternaryforge"))) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("torch/ops.py", "import torch.nn"),
        ("hf/config.py", "from transformers import PretrainedConfig"),
        ("hf/modeling.py", "from ternaryforge.torch import TernaryLinear"),
        ("model.py", "import torchvision_is_not_torch"),
    ],
)
def test_python_rule_lets_pass(tmp_path: Path, name: str, line: str) -> None:
    plant(tmp_path / "ternaryforge", name, f"{line}\n")
    assert list(python_violations(tmp_path / "ternaryforge")) == []
