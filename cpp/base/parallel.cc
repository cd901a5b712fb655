// SPDX-License-Identifier: Apache-2.0
// Team over OpenMP or std::thread; the barrier; counting usable cores.
#include "base/parallel.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "base/check.h"

#ifdef TERNARYFORGE_OPENMP
#include <omp.h>
#endif

#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace tf {
namespace {

void Pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// libgomp's threads do not survive fork(), and its next region in the child would wait for them for
// ever.
std::atomic<bool> openmp_is_safe{true};

std::atomic<bool> teams_are_limited{true};

#ifdef __linux__
// One identifier per physical core for every CPU in the affinity mask; a CPU whose topology cannot
// be read counts.
size_t CoresInAffinityMask() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) return 0;
  std::set<std::string> cores;
  for (size_t cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    std::ifstream file(
        StrCat("/sys/devices/system/cpu/cpu", cpu, "/topology/thread_siblings_list"));
    std::string siblings;
    cores.insert(std::getline(file, siblings) ? siblings : StrCat("cpu", cpu));
  }
  return cores.size();
}

// The CPU quota of cgroup v2, rounded up; 0 when there is none.
size_t CoresInQuota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (!(file >> quota >> period) || period <= 0) return 0;  // "max" is no number
  return static_cast<size_t>(quota / period + 0.999);
}
#endif

// CPUs that this process may use now, cores with several threads counted by thread; at least 1.
size_t UsableCpus() {
  size_t cpus = std::thread::hardware_concurrency();
#ifdef __linux__
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) cpus = static_cast<size_t>(CPU_COUNT(&mask));
  static const size_t quota = CoresInQuota();
  if (quota > 0) cpus = std::min(cpus, quota);
#endif
  return std::max<size_t>(1, cpus);
}

}  // namespace

void Worker::Barrier() {
  if (count_ == 1) return;
  const size_t target = ++round_ * count_;
  arrived_->fetch_add(1, std::memory_order_acq_rel);
  // Most waits are shorter than a system call; beyond that let others run. With more workers than
  // CPUs the one waited for needs the CPU of one who waits: let it run at once.
  const int spins = crowded_ ? 0 : 4000;
  for (int spin = 0; arrived_->load(std::memory_order_acquire) < target; ++spin) {
    if (spin < spins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

Team::Team(size_t threads) : threads_(threads) {
  Check(threads >= 1, "[threads] at least one thread is needed, got ", threads);
}

void Team::RunErased(Erased call, void* function) const {
  std::atomic<size_t> arrived{0};
  const size_t cpus = threads_ == 1 ? 1 : UsableCpus();
  const size_t workers = teams_are_limited ? std::min(threads_, cpus) : threads_;
  if (workers == 1) {
    Worker worker(0, 1, &arrived, false);
    call(function, worker);
    return;
  }
  const bool crowded = workers > cpus;
#ifdef TERNARYFORGE_OPENMP
  if (openmp_is_safe) {
#pragma omp parallel num_threads(static_cast<int>(workers))
    {
      Worker worker(static_cast<size_t>(omp_get_thread_num()),
                    static_cast<size_t>(omp_get_num_threads()), &arrived, crowded);
      call(function, worker);
    }
    return;
  }
#endif
  // Threads learn their count once all that the system grants have started.
  std::atomic<size_t> count{0};
  std::vector<std::thread> others;
  others.reserve(workers - 1);
  try {
    for (size_t index = 1; index < workers; ++index) {
      others.emplace_back([=, &arrived, &count] {
        while (count.load(std::memory_order_acquire) == 0) std::this_thread::yield();
        Worker worker(index, count.load(std::memory_order_relaxed), &arrived, crowded);
        call(function, worker);
      });
    }
  } catch (const std::system_error&) {  // refused: go on with those that started
  }
  count.store(others.size() + 1, std::memory_order_release);
  Worker worker(0, others.size() + 1, &arrived, crowded);
  call(function, worker);
  for (std::thread& other : others) other.join();
}

size_t DefaultThreads() {
  if (const char* wanted = std::getenv("TERNARYFORGE_NUM_THREADS");
      wanted != nullptr && *wanted != '\0') {
    const std::string_view text = wanted;
    size_t threads = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), threads);
    Check(error == std::errc() && end == text.data() + text.size() && threads >= 1,
          "[threads] TERNARYFORGE_NUM_THREADS is a positive number, got '", text, "'");
    return threads;
  }
  size_t cores = std::thread::hardware_concurrency();
#ifdef __linux__
  if (const size_t allowed = CoresInAffinityMask(); allowed > 0) cores = allowed;
  if (const size_t quota = CoresInQuota(); quota > 0) cores = std::min(cores, quota);
#endif
  return std::max<size_t>(1, cores);
}

void LimitTeams(bool on) { teams_are_limited = on; }

void WatchForks() {
#ifndef _WIN32
  static const bool watching =
      pthread_atfork(nullptr, nullptr, [] { openmp_is_safe = false; }) == 0;
  Check(watching, "[threads] pthread_atfork failed: out of memory");
#endif
}

std::string_view ParallelBackend() {
#ifdef TERNARYFORGE_OPENMP
  if (openmp_is_safe) return "openmp";
#endif
  return "std::thread";
}

}  // namespace tf
