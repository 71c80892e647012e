"""Fine-tuning methods: what of a pretrained model is trained, and what is added to it (docs/finetuning.md).

To write your own, subclass `Tuning`; `adapt` finds the places to act by `blocks`, `sites` and `maps`.
"""

from __future__ import annotations

from speechkit.tuning.adapters import Across, Adapters, Bottleneck, DenseMixture, SoftMixture
from speechkit.tuning.base import Around, Tuning
from speechkit.tuning.choices import BitFit, Full, Gradual, LinearProbe
from speechkit.tuning.convolutions import Convpass, TimeConvolution
from speechkit.tuning.layer_sum import LayerSum
from speechkit.tuning.peft import Peft
from speechkit.tuning.prompts import GatedPrefix, Prefix, Prompts
from speechkit.tuning.scales import ScaleShift
from speechkit.tuning.sites import Site, blocks, depths, maps, sites, targets

__all__ = [
    "Across",
    "Adapters",
    "Around",
    "BitFit",
    "Bottleneck",
    "Convpass",
    "DenseMixture",
    "Full",
    "GatedPrefix",
    "Gradual",
    "LayerSum",
    "LinearProbe",
    "Peft",
    "Prefix",
    "Prompts",
    "ScaleShift",
    "Site",
    "SoftMixture",
    "TimeConvolution",
    "Tuning",
    "blocks",
    "depths",
    "maps",
    "sites",
    "targets",
]
