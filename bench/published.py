"""What others have published of the cost of a training iteration, for the tables beside our own figures."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
    """One row of another's table: decimal gigabytes, minutes per 1,000 iterations; None: out of memory there."""

    name: str
    micro_batch: int
    trainable: int
    gb: float | None
    minutes: float | None
    # LitGPT's table of 20 October 2023: Llama 2 7B, not quantized, on one card; commit 8641822, torch 2.1.0
    model: str = "Llama 2 7B"
    device: str = "NVIDIA A100-SXM4-40GB"
    source: str = "https://github.com/Lightning-AI/litgpt/blob/main/tutorials/resource-tables.md"

    @property
    def title(self) -> str:
        return f"{self.name}, {self.model}, {self.device.removeprefix('NVIDIA ')} (published)"


LITGPT = (
    Published("LitGPT adapter", 1, 1_229_760, 19.98, 1.50),
    Published("LitGPT adapter v2", 1, 4_279_744, 25.51, 1.81),
    Published("LitGPT LoRA", 1, 4_194_304, 21.30, 2.36),
    Published("LitGPT LoRA", 2, 4_194_304, 29.07, 2.52),
    Published("LitGPT LoRA", 4, 4_194_304, None, None),
)


def of_litgpt(micro_batch: int) -> list[Published]:
    """The rows of this micro-batch."""
    return [row for row in LITGPT if row.micro_batch == micro_batch]
