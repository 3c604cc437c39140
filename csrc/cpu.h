// The instruction sets that kernels are compiled for beside the compiler's baseline, and whether this machine runs them.
#pragma once

// gcc's: clang takes no target region.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VK_X86_TARGETS 1
#if defined(__linux__) && __GNUC__ >= 11
#define VK_BF16_TARGETS 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace var_kernels {

inline bool runs_avx2() {
#ifdef VK_X86_TARGETS
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

inline bool runs_avx512() {
#ifdef VK_X86_TARGETS
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

inline bool runs_avx512_bf16() {
#ifdef VK_BF16_TARGETS
  return runs_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Linux gives a process the tiles' registers on request (arch_prctl ARCH_REQ_XCOMP_PERM, state 18): for all of its threads
// and their children's. It refuses where an alternate signal stack is too small for them.
inline bool runs_amx() {
#if defined(VK_EMULATE_AMX)  // tests/amx_emulation.h
  return runs_avx512();
#elif defined(VK_BF16_TARGETS)
  unsigned a, b, c, d;
  if (!runs_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// VDPBF16PS does twice the work of a multiply-add: AMD's run as many of both, Intel's (measured: model 207) a third.
inline bool prefers_bf16() {
#ifdef VK_BF16_TARGETS
  return runs_avx512_bf16() && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace var_kernels
