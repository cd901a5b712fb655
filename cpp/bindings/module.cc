// SPDX-License-Identifier: Apache-2.0
// The Python module `ternaryforge._core`.
#include <pybind11/pybind11.h>

#include <cerrno>
#include <exception>

#include "base/check.h"
#include "bindings/registers.h"
#include "simd/targets.h"

namespace {

// The file system's errors become the OSError of their number.
void TranslateFileError(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const tf::FileError& file_error) {
    errno = file_error.number();
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, file_error.path().c_str());
  }
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of ternaryforge";
  pybind11::register_exception<tf::FormatError>(m, "FormatError", PyExc_ValueError);
  pybind11::register_exception_translator(&TranslateFileError);
  tf::simd::ActiveTarget();  // chooses the target now, so that a wrong TERNARYFORGE_TARGET fails
                             // the import

  auto parallel = m.def_submodule("parallel", "Threads");
  tf::register_base(parallel);
  auto simd = m.def_submodule("simd", "Instruction sets");
  tf::register_simd(simd);
  auto formats = m.def_submodule("formats", "Weight layouts");
  tf::register_formats(formats);
  tf::register_file_formats(formats);
  auto io = m.def_submodule("io", "Files");
  tf::register_io(io);
  auto kernels = m.def_submodule("kernels", "Arithmetic");
  tf::register_kernels(kernels);
  tf::register_raw_linear(kernels);
  tf::register_float_kernels(kernels);
  tf::register_machine_limits(kernels);
  tf::register_head(kernels);
  auto quant = m.def_submodule("quant", "Quantizers");
  tf::register_quant(quant);
  auto model = m.def_submodule("model", "The decoder");
  tf::register_model(model);
  auto runtime = m.def_submodule("runtime", "Generation");
  tf::register_runtime(runtime);
}
