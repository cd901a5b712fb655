// SPDX-License-Identifier: Apache-2.0
// Bindings of the measurements that benchmarks divide by.
#include <pybind11/pybind11.h>

#include "base/parallel.h"
#include "bindings/registers.h"
#include "kernels/machine_limits.h"

namespace tf {

namespace py = pybind11;

void register_machine_limits(py::module_& kernels) {
  kernels.def(
      "read_bandwidth",
      [](size_t size, size_t passes, size_t threads) {
        return ReadBandwidth(size, passes, Team(threads));
      },
      py::kw_only(), py::arg("size"), py::arg("passes"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>(),
      "Bytes per second that the threads read together from `size` bytes of memory: the best "
      "pass.");
  kernels.def(
      "dot_peak",
      [](size_t rounds, size_t passes, size_t threads) {
        return DotPeak(rounds, passes, Team(threads));
      },
      py::kw_only(), py::arg("rounds"), py::arg("passes"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>(),
      "Multiply-adds u8 x i8 per second of the threads together: the best pass.");
}

}  // namespace tf
