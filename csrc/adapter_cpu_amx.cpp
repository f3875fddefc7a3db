#define AK_ISA amx
#define AK_WIDTH 16
#define AK_PAIRS 2
#include "adapter_cpu_kernels.h"
