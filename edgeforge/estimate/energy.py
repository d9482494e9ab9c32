"""Energy of an inference: arithmetic, on-chip and DRAM traffic, and power that flows while the chip is on.

    E = MACs * e_mac + SRAM bytes * e_sram + DRAM bytes * e_dram + T * P

No phone was measured for these constants. Published anchors bound the sum within about a factor of 2.5:
    Hexagon-family server card, ResNet-50 int8: 5.8 mJ per inference for the whole system (MLPerf Inference 1.0)
    phone NPU, image classification of about 1 GMAC: 3.9 mJ (MLPerf mobile, Edge TPU, published in AOSP's tree)
    phone, 1.2 B parameters at 4 bits: 78 mJ per token for the whole phone (LFM2 on Galaxy S25 Ultra, battery gauge)"""

from __future__ import annotations

from dataclasses import dataclass

#: pJ per multiply-accumulate at 4 nm: between the ALU energies that stillwater-sc/esim lists for 7, 5 and 3 nm
#: (data/alu-fpu-switching-energy.md).
PJ_PER_MAC = {"w8a8": 0.30, "w8a16": 0.55, "float": 0.80}
#: pJ per byte of on-chip SRAM and of LPDDR5X with its controller (4 to 8 pJ per bit).
PJ_PER_SRAM_BYTE, PJ_PER_DRAM_BYTE = 1.2, 48.0
#: W while an inference runs: NPU idle power and the part of the chip that is awake with it (0.5 to 2 W).
ACTIVE_WATTS = 1.0
#: What the anchors leave open: the interval is x / this to x * this.
UNCERTAINTY = 2.5
SOURCE = "uncalibrated constants; anchors within a factor of 2.5"


@dataclass(frozen=True)
class Energy:
    """Millijoules by cause."""

    compute_mj: float
    sram_mj: float
    dram_mj: float
    static_mj: float

    @property
    def total_mj(self) -> float:
        return self.compute_mj + self.sram_mj + self.dram_mj + self.static_mj


def energy(macs: dict[str, float], sram_bytes: float, dram_bytes: float, time_us: float) -> Energy:
    """macs: by precision. Monotone in everything it is given."""
    compute = sum(count * PJ_PER_MAC[precision] for precision, count in macs.items())
    return Energy(
        compute * 1e-9,
        sram_bytes * PJ_PER_SRAM_BYTE * 1e-9,
        dram_bytes * PJ_PER_DRAM_BYTE * 1e-9,
        time_us * 1e-3 * ACTIVE_WATTS,
    )
