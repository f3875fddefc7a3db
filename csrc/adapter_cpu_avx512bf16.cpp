#define AK_ISA avx512bf16
#define AK_WIDTH 16
#define AK_PAIRS 1
#include "adapter_cpu_kernels.h"
