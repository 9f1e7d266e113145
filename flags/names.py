"""The closed sets that flags choose from, as names alone; tests/test_flags.py compares each with its registry."""

from __future__ import annotations

from pathlib import Path

CATALOG = Path(__file__).resolve().parents[1] / "dataset_catalog.json"
PRECISIONS = ("fp32", "fp32-onednn", "bf16", "fp16")  # distributed.PRECISIONS
READERS = (  # datasets.READERS
    "roco", "roco_nonradiology", "roco_all", "rocov2", "csv", "yfcc15m", "coco", "cc3m", "cc12m", "redcaps",
    "webdataset",
)  # fmt: skip
OBJECTIVES = ("clip", "simclr", "slip", "siglip", "sigslip")  # models.OBJECTIVES
SIGMOID = ("siglip", "sigslip")  # those of them whose loss judges each pair by itself
TOWERS = ("VITT16", "VITS16", "VITB16", "VITL16")  # models.TOWERS
MODELS = {  # models.MODELS, and the objective of each
    **{f"{objective.upper()}_{tower}": objective for objective in OBJECTIVES for tower in TOWERS},
    "MEDCLIP_VIT": "clip",
    "MEDCLIP_RESNET": "clip",
    "MEDSLIP_VIT": "slip",
    "MEDSLIP_RESNET": "slip",
    **{objective.upper(): objective for objective in OBJECTIVES},
}
BEIT_MODELS = ("beit_small_patch16_224", "beit_base_patch16_224", "beit_large_patch16_224")
CBIS_SETS = ("cbis_calc", "cbis_mass", "cbis_both")  # inputs.cbis
CBIS_IMAGES = ("crop", "full", "mask")
CBIS_COLUMNS = ("lesion", "type", "split", "patient", "side", "view", "abnormality", "pathology", *CBIS_IMAGES)
PROTOCOLS = ("logistic", "medslip")  # evaluation.heads
CLASS_WEIGHTS = ("none", "balanced", "validated")
FORMATS = ("open-clip", "transformers", "timm", "safetensors", "onnx", "medclip")  # exporting.formats
