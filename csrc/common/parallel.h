// Spread independent pieces of work over threads. The pieces, not the threads, decide what is computed: every result is
// the same for any number of threads.
//
// OpenMP, because torch's wheels carry libgomp under the same soname: the process has one pool, and a fork-join costs
// about 1 us. Its pool does not survive fork(), so a forked child, such as a DataLoader worker, gets plain threads; so
// does a build with PGOLF_STD_THREADS, because ThreadSanitizer cannot see into libgomp.
#pragma once
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace pgolf {

inline const pid_t kProcessAtLoad = getpid();

// Call body(i, worker) for i in [0, n), worker in [0, threads). Without a parallel region if one thread suffices. The
// first exception a piece throws is thrown again here, after the other workers stopped.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
  if (threads > n) threads = int(n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
  std::atomic<int64_t> next{0};  // dynamic: a static split waits for the core that someone else uses
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto work = [&](int worker) {
    for (int64_t i; !failed && (i = next.fetch_add(1)) < n;) {
      try {
        body(i, worker);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  };
#ifndef PGOLF_STD_THREADS
  if (getpid() == kProcessAtLoad) {
    std::atomic<int> workers{0};
#pragma omp parallel num_threads(threads)
    work(workers.fetch_add(1));
  } else
#endif
  {
    std::vector<std::thread> pool;
    for (int worker = 1; worker < threads; ++worker) pool.emplace_back(work, worker);
    work(0);
    for (auto& thread : pool) thread.join();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace pgolf
