"""AdapterHub's ``adapters`` in its own process, since it needs transformers 4.57.

    <python of that environment> -m bench.peers.adapterhub '<StepSpec as JSON>'

Prints its figures as a line of JSON; then, for each line read, makes one step and prints its seconds. The adapter is
the same bottleneck, including the LayerNorm before it; ``adapters`` calls it Houlsby's with ``ln_before``.
"""

import json
import os
import sys
import time
from typing import Any

if "BENCH_CORES" in os.environ:  # before torch starts threads: our parent is bound to one core
    os.sched_setaffinity(0, map(int, os.environ["BENCH_CORES"].split(",")))

import adapters
import torch
import transformers

from bench.llama_step import Step, StepSpec, make_llama
from bench.measure import kept_for_backward, peak_bytes


def make_step(spec: StepSpec) -> Step:
    llama: Any = make_llama(spec)
    adapters.init(llama)
    others = [i for i in range(spec.num_hidden_layers) if i not in spec.sites]
    config = adapters.SeqBnConfig(
        ln_before=True,
        non_linearity="silu",
        reduction_factor=spec.hidden_size / spec.adapter_dim,
        leave_out=others,
    )
    llama.add_adapter("bench", config=config)
    llama.train_adapter("bench")
    llama.to(spec.device, getattr(torch, spec.dtype))  # its fp32 adapters fail on a bf16 backbone
    trained = [p for p in llama.parameters() if p.requires_grad]
    return Step(spec, llama, lambda ids: llama.model(input_ids=ids).last_hidden_state, trained)


def main() -> None:
    given = json.loads(sys.argv[1])
    spec = StepSpec(**given | {"sites": tuple(given["sites"])})
    torch.set_num_threads(spec.threads)
    step, device = make_step(spec), torch.device(spec.device)
    step.loss().backward()
    if any(p.grad is None for p in step.trained):
        raise RuntimeError("AdapterHub left a parameter without a gradient: the adapter is not active")
    step()
    about = {
        "trainable": sum(p.numel() for p in step.parameters),
        **kept_for_backward(step.loss, [*step.llama.parameters(), *step.trained]),
        "peak_bytes": peak_bytes(step, device),
        "versions": {"adapters": adapters.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
