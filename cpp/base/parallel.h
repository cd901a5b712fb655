// SPDX-License-Identifier: Apache-2.0
// Team: the one place with threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <string_view>
#include <type_traits>

namespace tf {

// A half-open range of indices.
struct Range {
  size_t begin;
  size_t end;
};

// One thread inside Team::Run.
class Worker {
 public:
  // `crowded`: more workers than CPUs, so that nobody should spin for long.
  Worker(size_t index, size_t count, std::atomic<size_t>* arrived, bool crowded)
      : index_(index), count_(count), arrived_(arrived), crowded_(crowded) {}

  size_t index() const { return index_; }
  size_t count() const { return count_; }

  // This worker's contiguous share of 0 .. size - 1; shares differ by one item at most and cover
  // all.
  Range Share(size_t size) const {
    const size_t base = size / count_, extra = size % count_;
    const size_t begin = index_ * base + (index_ < extra ? index_ : extra);
    return {begin, begin + base + (index_ < extra ? 1 : 0)};
  }

  // Waits until all workers of the team have come here. All memory written before is visible after.
  void Barrier();

 private:
  size_t index_;
  size_t count_;
  std::atomic<size_t>* arrived_;  // counts arrivals, never reset: round r ends at (r + 1) * count
  size_t round_ = 0;
  bool crowded_;
};

// A number of threads that run one function together. Threads come from OpenMP where the build has
// it and the process is not the child of a fork, else they are std::threads of the call. Holds no
// threads itself, changes no global state, and may be used from several Python threads at once.
class Team {
 public:
  // `threads` >= 1.
  explicit Team(size_t threads);

  size_t threads() const { return threads_; }

  // Calls run(worker) once on every worker, the calling thread included, and returns when all have.
  // `run` must not throw. Fewer workers than `threads` when the process may use fewer CPUs now
  // (affinity mask, cgroup quota), since two workers on one CPU only wait for each other, and when
  // the system refuses more: use worker.count(). No result may depend on the number.
  template <typename Function>
  void Run(Function&& run) const {
    using Plain = std::remove_reference_t<Function>;
    RunErased([](void* function, Worker& worker) { (*static_cast<Plain*>(function))(worker); },
              const_cast<void*>(static_cast<const void*>(&run)));
  }

 private:
  using Erased = void (*)(void* function, Worker& worker);
  void RunErased(Erased call, void* function) const;

  size_t threads_;
};

// TERNARYFORGE_NUM_THREADS where it is set (throws std::invalid_argument unless it is a positive
// number), else the physical cores that this process may use: within its affinity mask and its
// cgroup's CPU quota; at least 1.
size_t DefaultThreads();

// Whether teams take no more workers than the process may use CPUs; they do at first. Off for
// tests, which share work among many workers on small machines.
void LimitTeams(bool on);

// Makes teams of forked children leave OpenMP alone, whose threads, ours or another library's, do
// not survive a fork. Called once, before the first fork that matters.
void WatchForks();

// "openmp" or "std::thread": what Team::Run uses now.
std::string_view ParallelBackend();

}  // namespace tf
