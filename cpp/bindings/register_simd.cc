// SPDX-License-Identifier: Apache-2.0
// Bindings of the layers base and simd.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/parallel.h"
#include "bindings/registers.h"
#include "simd/targets.h"

namespace tf {

void register_base(pybind11::module_& parallel) {
  WatchForks();
  parallel.def("default_threads", &DefaultThreads,
               "TERNARYFORGE_NUM_THREADS, else the physical cores that this process may use.");
  parallel.def(
      "backend", [] { return std::string(ParallelBackend()); }, "\"openmp\" or \"std::thread\".");
  parallel.def(
      "workers",
      [](size_t threads) {
        size_t count = 0;
        Team(threads).Run([&](Worker& worker) {
          if (worker.index() == 0) count = worker.count();
        });
        return count;
      },
      pybind11::arg("threads"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "How many workers a call with so many threads really has.");
  parallel.def("limit_workers", &LimitTeams, pybind11::kw_only(), pybind11::arg("on"),
               "Whether calls have no more workers than CPUs (at first: yes). For tests.");
}

void register_simd(pybind11::module_& module) {
  module.def("supported_targets", &simd::SupportedTargets,
             "Targets of this CPU and build, best first.");
  module.def("active_target", &simd::ActiveTarget, "The target in use.");
  module.def(
      "use_target", [](const std::string& name) { simd::UseTarget(name); }, pybind11::arg("name"),
      "Uses another target, in the whole process.");
  module.def("dispatched_target", &simd::DispatchedTarget,
             "The target that dispatch really reaches.");
  module.def("compiler", &simd::CompilerVersion, "What the kernels were compiled with.");
  module.def("highway_version", &simd::HighwayVersion, "The Highway in the kernels.");
}

}  // namespace tf
