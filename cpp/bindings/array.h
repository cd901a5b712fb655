// SPDX-License-Identifier: Apache-2.0
// NumPy arrays in and out of the bindings: exact dtype, rank and contiguity, or a clear error.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"

namespace tf {

inline constexpr pybind11::ssize_t kAnyRank = -1;

// The elements of a C-contiguous, aligned array of dtype T. Nothing is converted or copied:
// TypeError for another dtype or number of dimensions, ValueError for another memory order. The
// span lives as long as the array.
template <typename T>
std::span<const T> TakeArray(const pybind11::array& array, pybind11::ssize_t rank,
                             std::string_view op, std::string_view name) {
  namespace py = pybind11;
  using Contiguous = py::array_t<T, py::array::c_style>;
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw py::type_error(StrCat("[", op, "] ", name, " has dtype ",
                                std::string(py::str(py::dtype::of<T>())), ", got ",
                                std::string(py::str(array.dtype()))));
  }
  if (rank != kAnyRank && array.ndim() != rank) {
    throw py::type_error(
        StrCat("[", op, "] ", name, " has ", rank, " dimensions, got ", array.ndim()));
  }
  Check(py::isinstance<Contiguous>(array), "[", op, "] ", name,
        " is C-contiguous, got a strided array: pass numpy.ascontiguousarray(", name, ")");
  Check((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0, "[", op, "] ", name,
        " is aligned to its elements, got an unaligned array");
  return {static_cast<const T*>(array.data()), static_cast<size_t>(array.size())};
}

// The shape of an array, as sizes.
inline std::vector<size_t> ShapeOf(const pybind11::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

// The elements of a new array that is not filled yet.
template <typename T>
std::span<T> SpanOf(pybind11::array_t<T>& array) {
  return {array.mutable_data(), static_cast<size_t>(array.size())};
}

// The bytes of a C-contiguous buffer of any element type. They live as long as `info`.
inline std::span<const uint8_t> BytesOf(const pybind11::buffer_info& info, std::string_view op) {
  pybind11::ssize_t expected_stride = info.itemsize;
  for (pybind11::ssize_t axis = info.ndim - 1; axis >= 0; --axis) {
    const auto i = static_cast<size_t>(axis);
    Check(info.shape[i] <= 1 || info.strides[i] == expected_stride, "[", op,
          "] data is C-contiguous");
    expected_stride *= info.shape[i];
  }
  return {static_cast<const uint8_t*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

}  // namespace tf
