"""Lists GPUs by the figures of their data sheets, each with its source.

Rates are dense: the sheets print most of them with sparsity, which doubles them. Memory is the sheet's, in 10^9 bytes;
what a process may use of it is `fleet.USABLE_SHARE`. Links count one direction: the sheets add both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import FLOAT_BYTES, quantised_components

_H100 = "NVIDIA H100 data sheet, SXM, https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "NVIDIA H200 data sheet, SXM, https://www.nvidia.com/en-us/data-center/h200/"
_HGX = "NVIDIA HGX specifications, HGX B200 (8 GPUs), https://www.nvidia.com/en-us/data-center/hgx/"
_A100 = (
    "NVIDIA A100 data sheet, 80 GB SXM, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-nvidia-us-2188504-web.pdf"
)
_L40S = "NVIDIA L40S data sheet, https://www.nvidia.com/en-us/data-center/l40s/"
_RTX_PRO = (
    "NVIDIA RTX PRO Blackwell GPU architecture, table 4, Workstation Edition, https://www.nvidia.com/content/dam/en-zz/"
    "Solutions/design-visualization/quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf"
)
_RTX_50 = (
    "NVIDIA RTX Blackwell GPU architecture, table 3, https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/"
    "nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_SPARK = "NVIDIA DGX Spark hardware overview, https://docs.nvidia.com/dgx/dgx-spark/hardware.html"
_CUDA = "CUDA GPU compute capability, https://developer.nvidia.com/cuda-gpus"

_DENSE = "half of the figure with sparsity"


@dataclass(frozen=True)
class Figure:
    """One number of a data sheet, in SI units. `derived` says how it follows from the sheet if it is not printed."""

    value: float
    source: str
    derived: str = ""


@dataclass(frozen=True)
class Gpu:
    """One GPU: `memory` in bytes, `bandwidth` and `link` in bytes per second, `rates` in operations per second by
    precision ("bf16", "fp16", "fp8", "int8"; a missing one cannot be computed)."""

    name: str
    title: str
    driver_name: str  # pattern of the name by which nvidia-smi lists it
    capability: int  # 90 for 9.0
    per_node: int  # GPUs of a usual node, which `link` connects
    memory: Figure
    bandwidth: Figure
    rates: Mapping[str, Figure]
    link: Figure  # from one GPU to another of its node, one direction

    @property
    def figures(self) -> dict[str, Figure]:
        """Return all figures by name, with the source of the compute capability."""
        rates = {f"{precision} rate": figure for precision, figure in self.rates.items()}
        shown = {"memory": self.memory, "bandwidth": self.bandwidth, **rates, "link": self.link}
        return {**shown, "compute capability": Figure(self.capability, _CUDA)}

    def rate(self, precision: str) -> float:
        """Return the operations per second at which a product runs whose weights have `precision`. Weights that alone
        are quantised are multiplied in bf16, and fp32 products in a fraction of that, which nothing here plans."""
        return self.rates[precision if precision in self.rates else "bf16"].value


def _floats(rate: float, source: str, derived: str = "") -> dict[str, Figure]:
    """Return the rates of bf16 and fp16, which are the same on every GPU here, accumulated in fp32."""
    return dict.fromkeys(("bf16", "fp16"), Figure(rate, source, derived))


def _eights(rate: float, source: str, derived: str = "") -> dict[str, Figure]:
    return dict.fromkeys(("fp8", "int8"), Figure(rate, source, derived))


_GPUS = (
    Gpu(
        name="h100",
        title="H100 SXM 80 GB",
        driver_name="H100 80GB HBM3",
        capability=90,
        per_node=8,
        memory=Figure(80e9, _H100),
        bandwidth=Figure(3.35e12, _H100),
        rates={**_floats(989.5e12, _H100, _DENSE), **_eights(1979e12, _H100, _DENSE)},
        link=Figure(450e9, _H100, "NVLink: half of 900 GB/s in both directions"),
    ),
    Gpu(
        name="h200",
        title="H200 SXM 141 GB",
        driver_name="H200(?! NVL)",
        capability=90,
        per_node=8,
        memory=Figure(141e9, _H200),
        bandwidth=Figure(4.8e12, _H200),
        rates={**_floats(989.5e12, _H200, _DENSE), **_eights(1979e12, _H200, _DENSE)},
        link=Figure(450e9, _H200, "NVLink: half of 900 GB/s in both directions"),
    ),
    Gpu(
        name="b200",
        title="B200 SXM 180 GB",
        driver_name=r"\bB200",
        capability=100,
        per_node=8,
        memory=Figure(180e9, _HGX, "an eighth of 1.44 TB"),
        bandwidth=Figure(8e12, _HGX, "an eighth of the baseboard's; boards report 7.7 TB/s"),
        rates={
            **_floats(2250e12, _HGX, "a sixteenth of the baseboard's 36 PFLOPS with sparsity"),
            **_eights(4500e12, _HGX, "a sixteenth of the baseboard's 72 PFLOPS with sparsity"),
        },
        link=Figure(900e9, _HGX, "NVLink: half of 1.8 TB/s in both directions"),
    ),
    Gpu(
        name="a100",
        title="A100 SXM 80 GB",
        driver_name="A100-SXM4-80GB",
        capability=80,
        per_node=8,
        memory=Figure(80e9, _A100),
        bandwidth=Figure(2.039e12, _A100),
        rates={**_floats(312e12, _A100), "int8": Figure(624e12, _A100)},
        link=Figure(300e9, _A100, "NVLink: half of 600 GB/s in both directions"),
    ),
    Gpu(
        name="l40s",
        title="L40S 48 GB",
        driver_name="L40S",
        capability=89,
        per_node=8,
        memory=Figure(48e9, _L40S),
        bandwidth=Figure(864e9, _L40S),
        rates={**_floats(362.05e12, _L40S), **_eights(733e12, _L40S)},
        link=Figure(32e9, _L40S, "PCIe 4.0 x16: half of 64 GB/s in both directions"),
    ),
    Gpu(
        name="rtx-pro-6000",
        title="RTX PRO 6000 Blackwell Workstation Edition 96 GB",
        driver_name="RTX PRO 6000 Blackwell W",
        capability=120,
        per_node=8,
        memory=Figure(96e9, _RTX_PRO),
        bandwidth=Figure(1.792e12, _RTX_PRO),
        rates={**_floats(503.8e12, _RTX_PRO), **_eights(1007.6e12, _RTX_PRO, "twice the rate of bf16")},
        link=Figure(64e9, _RTX_PRO, "PCIe 5.0 x16: 16 lanes of 32 GT/s"),
    ),
    Gpu(
        name="rtx-5090",
        title="GeForce RTX 5090 32 GB",
        driver_name="RTX 5090(?! [DL])",
        capability=120,
        per_node=4,
        memory=Figure(32e9, _RTX_50),
        bandwidth=Figure(1.792e12, _RTX_50),
        rates={
            **_floats(209.5e12, _RTX_50),
            "fp8": Figure(419e12, _RTX_50),  # accumulated in fp32; in fp16 twice that
            "int8": Figure(838e12, _RTX_50),
        },
        link=Figure(64e9, _RTX_50, "PCIe 5.0 x16: 16 lanes of 32 GT/s"),
    ),
    Gpu(
        name="dgx-spark",
        title="DGX Spark (GB10) 128 GB, shared with the CPU",
        driver_name="GB10",
        capability=121,
        per_node=1,
        memory=Figure(128e9, _SPARK),
        bandwidth=Figure(273e9, _SPARK),
        rates={
            **_floats(125e12, _SPARK, "an eighth of 1 PFLOPS in FP4 with sparsity"),
            **_eights(250e12, _SPARK, "a quarter of 1 PFLOPS in FP4 with sparsity"),
        },
        link=Figure(25e9, _SPARK, "ConnectX-7 of 200 Gb/s, to the other DGX Spark of a pair"),
    ),
)
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _GPUS}

_OLDEST_FP8 = 89
_BLACKWELL = 100
_DATA_CENTER_BLACKWELL = range(_BLACKWELL, 120)


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name. Raises EngineError for an unknown name."""
    if name not in GPUS:
        raise EngineError(
            f"GPU {name!r} is not one of: {', '.join(GPUS)}; choose with --gpu, or give --bandwidth, --tflops "
            "and --memory"
        )
    return GPUS[name]


def recognise(name: str) -> Gpu | None:
    """Return the GPU that nvidia-smi lists under this name; None for a GPU whose data sheet is not here."""
    return next((gpu for gpu in _GPUS if re.search(gpu.driver_name, name)), None)


def refused(gpu: Gpu, precisions: Mapping[str, str], split: bool, crosses: bool) -> str | None:
    """Return why a GPU does not run an engine in `precisions` and what to choose, None if it does. Takes the other
    arguments of `refused_by_capability`."""
    return refused_by_capability(gpu.capability, gpu.title, precisions, split, crosses)


def refused_by_capability(
    capability: int, title: str, precisions: Mapping[str, str], split: bool, crosses: bool
) -> str | None:
    """Return why GPUs of a compute capability (90 for 9.0) do not run an engine in `precisions`, and what to choose;
    None if they do.

    `crosses`: whether the model has cross-attention. `split`: whether TensorRT-LLM runs the engine, which has no INT8
    and INT4 kernels for compute capabilities 10.0 to 11.9, and no mask for cross-attention from 10.0 on (read in
    version 1.3.0rc3)."""
    used = {precisions[component] for component in quantised_components(precisions)}
    where = f"{title} (compute capability {capability // 10}.{capability % 10})"
    if "fp8" in used and capability < _OLDEST_FP8:
        return f"fp8 needs compute capability 8.9 or newer, this is {where}; choose int8 or bf16 with --precision"
    if split and capability in _DATA_CENTER_BLACKWELL and used - {"fp8"}:
        named = ", ".join(sorted(used - {"fp8"}))
        return f"TensorRT-LLM has no kernels for {named} on {where}; choose fp8 or bf16 with --precision"
    if split and crosses and capability >= _BLACKWELL:
        return (
            f"TensorRT-LLM masks no cross-attention on {where}, so tokens of NVLM-X and NVLM-H would read images that "
            "they must not see; choose h100, h200, a100 or l40s"
        )
    return None


def check_gpu(gpu: Gpu, precisions: Mapping[str, str], split: bool, crosses: bool) -> None:
    """Raise EngineError with the message of `refused`, if there is one."""
    reason = refused(gpu, precisions, split, crosses)
    if reason:
        raise EngineError(reason)


def product_precision(precisions: Mapping[str, str]) -> str:
    """Return the precision in which most products of the decoder run: bf16 or fp16 for weights in blocks."""
    decoder = precisions["decoder"]
    floating = next((name for name in precisions.values() if name in FLOAT_BYTES), "bf16")
    return decoder if decoder in ("int8", "fp8") else floating
