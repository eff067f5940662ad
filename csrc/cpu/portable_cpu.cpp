// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels for any processor: 16-byte vectors, which every compiler lowers to what the target has.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "../kernels.h"
#include "../plan.h"
#include "scratch.h"
#include "team.h"

#define FASTRNN_ISA portable
#define FASTRNN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FASTRNN_REGISTERS 32
#else
#define FASTRNN_REGISTERS 16
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
