// SPDX-License-Identifier: BSD-3-Clause
// The bfloat16 kernels for x86-64 processors with AVX-512 BF16.
#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#define FASTRNN_ISA avx512_bf16
#define FASTRNN_BF16
#define FASTRNN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32

#include "../kernels.h"
#include "../plan.h"
#include "scratch.h"
#include "team.h"

// Only what follows may use the instructions: a standard header compiled with them could end up in the portable build.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#include "vector.h"
// vector.h comes first
#include "tile.h"
// then tile.h
#include "norm.h"
#include "weights.h"
// then what the passes use
#include "backward.h"
#include "forward.h"
#include "gradients.h"
#include "launch.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)
