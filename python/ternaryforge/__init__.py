# SPDX-License-Identifier: Apache-2.0
"""Convert, train and run language models with ternary weights on CPUs.

    import ternaryforge as tf

    model = tf.TernaryModel.demo()
    print(model.generate("Once upon a time", max_new_tokens=64))

Names are loaded when they are first used, so that the import is quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ternaryforge import simd
    from ternaryforge._core import FormatError
    from ternaryforge.analysis import AnalysisReport, analyze
    from ternaryforge.bit_map_search import search
    from ternaryforge.calibration import CalibrationReport, calibrate
    from ternaryforge.chat_template import ChatTemplate, ChatTemplateError
    from ternaryforge.conversion import ConversionReport, convert
    from ternaryforge.evaluation import EvaluationResult
    from ternaryforge.exporting import ExportReport, OnebitReport, export
    from ternaryforge.formats import matmul, pack, quantize_weights, unpack
    from ternaryforge.generation import GenerationResult, Piece
    from ternaryforge.gguf.importing import ImportReport, import_gguf
    from ternaryforge.model import TernaryModel
    from ternaryforge.planning import PlanReport, plan
    from ternaryforge.search_report import SearchResult
    from ternaryforge.validation import ValidationReport, validate
    from ternaryforge.verification import VerificationReport, verify

    __version__: str

__all__ = [
    "AnalysisReport",
    "CalibrationReport",
    "ChatTemplate",
    "ChatTemplateError",
    "ConversionReport",
    "EvaluationResult",
    "ExportReport",
    "FormatError",
    "GenerationResult",
    "ImportReport",
    "OnebitReport",
    "Piece",
    "PlanReport",
    "SearchResult",
    "TernaryModel",
    "ValidationReport",
    "VerificationReport",
    "__version__",
    "analyze",
    "calibrate",
    "convert",
    "export",
    "import_gguf",
    "matmul",
    "pack",
    "plan",
    "quantize_weights",
    "search",
    "simd",
    "unpack",
    "validate",
    "verify",
]

MISSING_CORE = (
    "ternaryforge: the compiled core is missing; install the package with `pip install .` in its folder "
    "(a C++ compiler and CMake are needed)"
)

_MODULE_OF = {
    "AnalysisReport": "analysis",
    "CalibrationReport": "calibration",
    "ChatTemplate": "chat_template",
    "ChatTemplateError": "chat_template",
    "ConversionReport": "conversion",
    "EvaluationResult": "evaluation",
    "ExportReport": "exporting",
    "FormatError": "_core",
    "GenerationResult": "generation",
    "ImportReport": "gguf.importing",
    "OnebitReport": "exporting",
    "Piece": "generation",
    "PlanReport": "planning",
    "SearchResult": "search_report",
    "TernaryModel": "model",
    "ValidationReport": "validation",
    "VerificationReport": "verification",
    "analyze": "analysis",
    "calibrate": "calibration",
    "convert": "conversion",
    "export": "exporting",
    "import_gguf": "gguf.importing",
    "matmul": "formats",
    "pack": "formats",
    "plan": "planning",
    "quantize_weights": "formats",
    "search": "bit_map_search",
    "simd": "simd",
    "unpack": "formats",
    "validate": "validation",
    "verify": "verification",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("ternaryforge")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ternaryforge' has no attribute {name!r}")
    try:
        module = importlib.import_module("ternaryforge." + _MODULE_OF[name])
    except ModuleNotFoundError as error:
        if error.name != "ternaryforge._core":
            raise
        raise ImportError(MISSING_CORE, name=error.name) from error
    value: object = module if name == "simd" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
