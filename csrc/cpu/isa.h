// SPDX-License-Identifier: BSD-3-Clause
// The instruction set that the CPU kernels run with, chosen when the process first asks.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastrnn {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

// The best set that processor and operating system support; FASTRNN_ISA, one of the names above, lowers it (never
// raises).
inline Isa best_isa() {
  static const Isa isa = [] {
    Isa best = Isa::portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      best = __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    }
#endif
    const char* wanted = std::getenv("FASTRNN_ISA");
    if (!wanted || !*wanted) return best;
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
      if (std::strcmp(wanted, isa_name(isa)) == 0) return isa < best ? isa : best;
    }
    throw std::runtime_error(std::string("FASTRNN_ISA: expected portable, avx2, avx512 or avx512_bf16, got ") + wanted);
  }();
  return isa;
}

// How the kernels take bfloat16 and float16: tensors converted to float before them, storage that they widen to float
// as they read it, or storage whose products the processor makes.
enum class Taken { converted, widened, multiplied };
inline Taken takes_bf16() {
  if (best_isa() == Isa::avx512_bf16) return Taken::multiplied;
  return best_isa() >= Isa::avx2 ? Taken::widened : Taken::converted;
}
inline Taken takes_half() {
  static const bool converts = [] {  // asked once: in a virtual machine cpuid takes microseconds
#if defined(__x86_64__)
    unsigned a, b, features, d;
    return best_isa() >= Isa::avx2 && __get_cpuid(1, &a, &b, &features, &d) && features & bit_F16C;
#else
    return false;
#endif
  }();
  return converts ? Taken::widened : Taken::converted;
}

}  // namespace fastrnn
