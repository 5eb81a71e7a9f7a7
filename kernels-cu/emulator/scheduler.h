// Runs launches; the driver's side of the scheduler.
#pragma once

#include "include/emulator_core.h"

#include <string>

namespace emu {

struct Launch {
    const Kernel* kernel;
    dim3 grid, block;
    unsigned dynamic;
    void** parameters;
};

Kernel* find_kernel(const std::string& name);
/// An integer from the environment, or `otherwise`.
unsigned long long setting(const char* name, unsigned long long otherwise);
/// Whether these bytes lie within one allocation.
bool is_device_memory(uint64_t address, size_t bytes);
/// False if a thread trapped.
bool run(const Launch& launch);

} // namespace emu
