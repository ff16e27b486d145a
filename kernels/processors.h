// How many threads the process may run at a time.
#pragma once

#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace pmclip {

inline int processors() {
#if defined(__linux__)
    cpu_set_t allowed;  // under taskset and in containers fewer than the machine has
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    const int all = int(std::thread::hardware_concurrency());
    return all > 0 ? all : 1;
}

}  // namespace pmclip
