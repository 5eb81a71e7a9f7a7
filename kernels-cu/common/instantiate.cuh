// Compiles the file KERNELS once per element type. There, Element is the type and KERNEL(name) the kernel's name with its suffix.
//
// An op's .cu includes itself so: what does not depend on the type stands under `#ifndef Element`, the kernels in the `#else`.

#define Element float
#define KERNEL(name) name##_f32
#include KERNELS
#undef Element
#undef KERNEL

#define Element bf16
#define KERNEL(name) name##_bf16
#include KERNELS
#undef Element
#undef KERNEL
