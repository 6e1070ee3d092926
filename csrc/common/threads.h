// A pool of threads that outlives calls, follows the number asked for, and starts anew in a forked child.
#pragma once

#include <cstdint>

namespace ubp {

// Runs task(context, item, worker) for every item in [0, items), each exactly once, on at most `threads`
// threads (the caller is one of them). `worker` is in [0, threads). Which thread takes an item is not fixed,
// so a task must write nothing that depends on it. Items are taken in their order. All threads compute in the
// floating-point mode of the caller. Of calls from several threads at once one has the helpers, the others
// run each on its own thread.
void parallel_for(int64_t items, int threads, void (*task)(void* context, int64_t item, int worker),
                  void* context);

// Lets others run: for a thread that waits for another.
void yield_thread();

// Throws std::bad_alloc. Kernel units call this instead of throwing: library code instantiated there could be
// linked to other instruction sets. Only from the thread that called the kernel.
[[noreturn]] void throw_out_of_memory();

}  // namespace ubp
