"""Which captions the named filters keep, on sentences as ROCO has them."""

import pytest

from inputs.caption_filters import caption_pattern

MAMMO = [
    "Mammogram of the left breast",
    "MLO mammographic view",
    "Mammographie cliché de profil",
    "digital MAMMOGRAPHY",
    "Galactography shows a filling defect",
    "Breast tomosynthesis slice",
]
XRAY = [
    "Chest X-ray (PA)",
    "x ray of the hand",
    "AP Xray pelvis",
    "thorax x‐ray",
    "Postoperative radiograph",
    "Lateral radiographs",
    "A radio-graph after filling",
    "radiograma de tórax",
    "Chest roentgenogram",
    "Röntgen thorax",
    "Skiagram of the shoulder",
    "Bedside CXR",
    "Plain abdominal film",
    "Chest AP film on admission",
    "Orthopantomogram",
    "Preoperative OPG",
    "Lateral cephalogram",
]
OTHER = [
    "Axial CT of the chest",
    "internal mammary artery on CT",
    "reduction mammoplasty, MRI",
    "Mammotome probe on ultrasound",
    "Right breast ultrasound",
    "Autoradiography of the section",
    "microradiograph of enamel",
    "T1 postcontrast MRI film",
    "Carotid angiography, lateral view",
    "electroencephalogram",
    "Panoramic CBCT",
    "externodorsal rays of the bursa",
    "TEM image of a thin film",
]


@pytest.mark.parametrize("name, kept", [("all", MAMMO + XRAY + OTHER), ("mammo-xray", MAMMO + XRAY), ("mammo", MAMMO)])
def test_named_filters_keep_what_their_name_says(name, kept):
    pattern = caption_pattern(name)
    assert [text for text in MAMMO + XRAY + OTHER if pattern is None or pattern.search(text)] == kept


def test_a_filter_is_a_regular_expression_blind_to_case():
    assert caption_pattern(r"\bct\b").search("Axial CT") and not caption_pattern(r"\bct\b").search("act")
    with pytest.raises(ValueError, match=r"'\(ct'.*all, mammo-xray, mammo"):
        caption_pattern("(ct")
