// SPDX-License-Identifier: Apache-2.0
// The functions that fill the submodules of `_core`, one per layer.
#pragma once

#include <pybind11/pybind11.h>

namespace tf {

void register_base(pybind11::module_& module);
void register_simd(pybind11::module_& module);
void register_formats(pybind11::module_& module);
void register_file_formats(pybind11::module_& module);
void register_io(pybind11::module_& module);
void register_kernels(pybind11::module_& module);
void register_raw_linear(pybind11::module_& module);
void register_float_kernels(pybind11::module_& module);
void register_machine_limits(pybind11::module_& module);
void register_head(pybind11::module_& module);
void register_quant(pybind11::module_& module);
void register_model(pybind11::module_& module);
void register_runtime(pybind11::module_& module);

}  // namespace tf
