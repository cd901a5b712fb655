// SPDX-License-Identifier: Apache-2.0
// The Python module `ternaryforge._core`.
#include <pybind11/pybind11.h>

#include "base/check.h"
#include "bindings/registers.h"
#include "simd/targets.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of ternaryforge";
  pybind11::register_exception<tf::FormatError>(m, "FormatError", PyExc_ValueError);
  tf::simd::ActiveTarget();  // chooses the target now, so that a wrong TERNARYFORGE_TARGET fails
                             // the import

  auto parallel = m.def_submodule("parallel", "Threads");
  tf::register_base(parallel);
  auto simd = m.def_submodule("simd", "Instruction sets");
  tf::register_simd(simd);
  auto formats = m.def_submodule("formats", "Weight layouts");
  tf::register_formats(formats);
  auto kernels = m.def_submodule("kernels", "Arithmetic");
  tf::register_kernels(kernels);
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
