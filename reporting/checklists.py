"""What runs answer of two reporting checklists: TRIPOD+AI (Collins et al. 2024) and CLAIM (Mongan et al. 2020).

The items are named in our own words by their published numbers. An answer comes from run files; what they do not say is
"not reported" and left to the authors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NOT_REPORTED = "not reported"
Facts = dict[str, Any]
Answer = Callable[[Facts], str | None] | None


def _sizes(facts: Facts) -> str | None:
    return "; ".join(f"{title}: {size}" for title, size in facts["tables"].items()) or None


def _when(name: str, text: str) -> Callable[[Facts], str | None]:
    return lambda facts: text if facts[name] else None


def _software(facts: Facts) -> str | None:
    return ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) or None


def _hardware(facts: Facts) -> str | None:
    return f"devices: {', '.join(facts['devices'])}" if facts["devices"] else None


def _model(facts: Facts) -> str | None:
    if not facts["parameters"]:
        return None
    return f"see the commands; {', '.join(f'{n:,}' for n in facts['parameters'])} parameters"


def _data(facts: Facts) -> str | None:
    if facts["synthetic"]:
        return "SYNTHETIC phantoms: no patients"
    pairs = (
        f"; image-caption pairs for training: {', '.join(f'{n:,}' for n in facts['pairs'])}" if facts["pairs"] else ""
    )
    cbis = ["CBIS-DDSM (Lee et al. 2017), digitised film mammograms"] if facts["cbis"] else []
    named = [f"the labelled sets {', '.join(facts['sets'])}, whose origin no run's file holds"] if facts["sets"] else []
    return "; ".join(cbis + named) + pairs if cbis or named else None


def _missing(facts: Facts) -> str | None:
    if not facts["skipped"]:
        return None
    counts = (f"{kind} {sum(parts.values())}" for kind, parts in facts["skipped"].items())
    samples = "images" if facts["sets"] else "lesions"
    return f"{samples} skipped for a missing or corrupt image: {', '.join(counts)}; never imputed"


def _uncertainty(facts: Facts) -> str | None:
    if not facts["rows"]:
        return None
    seeds = (
        f"{facts['seeds']} training seeds and " if facts["seeds"] > 1 else "one training seed (its chance left out), "
    )
    return f"95% intervals over {seeds}bootstrap resamples of the {facts['over']}"


def _comparisons(facts: Facts) -> str | None:
    if not facts["comparisons"]:
        return None
    named = facts["primary"]
    if not named:
        return f"paired over {facts['over']}; no comparison was named as primary"
    late = "after results were there" if named["after_results"] else "before any result"
    return f"paired over {facts['over']}; primary ({named['table']}, {named['row']}) named {late}; Holm over the others"


_SPLIT = _when(
    "splits", "official training and test tables; validation split off the training patients, whole patients"
)


def _all_metrics(facts: Facts) -> str | None:
    return ", ".join(facts["metrics"]) or None


def _output(facts: Facts) -> str | None:
    return "; ".join(f"probabilities of {', '.join(classes)}" for classes in facts["classes"]) or None


def _clusters(facts: Facts) -> str | None:
    return f"{facts['units']} are kept whole in splits and resamples" if facts["units"] and facts["rows"] else None


def _predictors(facts: Facts) -> str | None:
    words = "; reference rows use the radiologist's words" if facts["radiologist"] else ""
    return f"image pixels alone{words}" if facts["rows"] else None


def _eligibility(facts: Facts) -> str | None:
    lesions = "lesions of the case tables with an image; " if facts["cbis"] else ""
    return f"{lesions}see the flow diagram" if facts["flow"] else None


def _of_cbis(text: str) -> Callable[[Facts], str | None]:
    """What is known of that set alone, by its name where there are others."""
    return lambda facts: ("CBIS-DDSM: " * bool(facts["sets"]) + text) if facts["cbis"] else None


_REFERENCE = _of_cbis("pathology in the case tables; benign without callback means neither biopsy nor further films")

TRIPOD_AI: list[tuple[str, str, Answer]] = [
    ("1", "Title names the study as prediction model development or evaluation", None),
    ("2", "Abstract", None),
    ("3a", "Health context and rationale", None),
    ("3b", "Target population, intended use and users", None),
    ("3c", "Known health inequalities", None),
    ("4", "Objectives", None),
    ("5a", "Data sources", _data),
    ("5b", "Dates of the data", None),
    ("6a", "Setting and centres", None),
    ("6b", "Eligibility", _eligibility),
    ("6c", "Treatments received", None),
    ("7", "Data preparation and quality checks", _missing),
    ("8a", "Outcome and how it was assessed", _REFERENCE),
    ("8b", "Assessors of the outcome", None),
    ("8c", "Blinding of outcome assessment", None),
    ("9a", "Choice of predictors", _predictors),
    ("9b", "Definition and measurement of predictors", _when("commands", "preprocessing is in each run's settings")),
    ("9c", "Assessors of predictors", None),
    ("10", "Sample size", _sizes),
    ("11", "Missing data", _missing),
    ("12a", "How data were used for development and evaluation", _SPLIT),
    ("12b", "Handling of predictors", None),
    ("12c", "Model type and building steps", _model),
    ("12d", "Heterogeneity between clusters", _clusters),
    ("12e", "Performance measures", _all_metrics),
    ("12f", "Model updating", None),
    ("12g", "How predictions are computed", _when("commands", "the commands below reproduce each run")),
    ("13", "Class imbalance", None),
    ("14", "Fairness", _when("subgroups", "by density, subtlety, view, side, assessment, size; no demographics exist")),
    ("15", "Output of the model", _output),
    ("16", "Differences between training and evaluation", _SPLIT),
    ("17", "Ethical approval", None),
    ("18a", "Funding", None),
    ("18b", "Conflicts of interest", None),
    ("18c", "Protocol", None),
    ("18d", "Registration", None),
    ("18e", "Data availability", None),
    ("18f", "Code availability", _when("commands", "this repository; commands and versions are below")),
    ("19", "Patient and public involvement", None),
    ("20a", "Flow of participants", _when("flow", "flow diagram")),
    ("20b", "Characteristics of participants", _when("splits", "table of the splits")),
    ("20c", "Comparison of development and evaluation data", _when("splits", "table of the splits")),
    ("21", "Numbers of participants and outcomes in each analysis", _sizes),
    ("22", "Full model specification", _when("commands", "settings and checkpoints of the runs")),
    ("23a", "Performance with intervals, and in key subgroups", _uncertainty),
    ("23b", "Heterogeneity of performance", _when("subgroups", "subgroup table")),
    ("24", "Results of model updating", None),
    ("25", "Interpretation", None),
    ("26", "Limitations", None),
    ("27a", "Poor quality or missing input at use", None),
    ("27b", "Interaction of users with the model", None),
    ("27c", "Next steps", None),
]

CLAIM: list[tuple[str, str, Answer]] = [
    ("1", "Title says that AI is used", None),
    ("2", "Structured summary", None),
    ("3", "Background and clinical role", None),
    ("4", "Aims and hypotheses", _comparisons),
    ("5", "Prospective or retrospective", _of_cbis("retrospective, a public data set")),
    ("6", "Kind of study", None),
    ("7", "Data sources", _data),
    ("8", "Eligibility", _eligibility),
    ("9", "Preprocessing", _when("commands", "in each run's settings")),
    ("10", "Selection of subsets", _when("commands", "caption filters are among the commands' flags")),
    ("11", "Definitions of data elements", _REFERENCE),
    ("12", "De-identification", _of_cbis("by the data set's publishers")),
    ("13", "Missing data", _missing),
    ("14", "Ground truth", _REFERENCE),
    ("15", "Why this reference standard", None),
    ("16", "Annotators and their qualification", None),
    ("17", "Annotation tools", None),
    ("18", "Variability of annotators", None),
    ("19", "Sample size", _sizes),
    ("20", "Assignment to partitions", _SPLIT),
    ("21", "Level at which partitions are disjoint", _when("splits", "patients")),
    ("22", "Model", _model),
    ("23", "Software", _software),
    ("24", "Initial weights", _when("commands", "each run's settings name the file, or the seed")),
    ("25", "Training: augmentation, hyperparameters, number of models", _when("commands", "the commands below")),
    ("26", "Choice of the final model", _when("rows", "on a validation split; the test table is read at the end")),
    ("27", "Ensembling", _when("rows", "none")),
    ("28", "Metrics", _all_metrics),
    ("29", "Uncertainty and significance", _uncertainty),
    ("30", "Robustness", _when("subgroups", "subgroups; several seeds where there are")),
    (
        "31",
        "Explainability",
        _when("saliency", "saliency against the radiologist's outline, fresh weights beside"),
    ),
    ("32", "External validation", None),
    ("33", "Flow of cases", _when("flow", "flow diagram")),
    ("34", "Demographics by partition", _when("splits", "what the case tables say; they hold no age")),
    ("35", "Performance on all partitions", _when("rows", "validation scores are in results.json, test scores above")),
    ("36", "Accuracy with its precision", _uncertainty),
    ("37", "Failure analysis", _when("misread", "missed cases and confident errors are shown")),
    ("38", "Limitations", None),
    ("39", "Implications for practice", None),
    ("40", "Registration", None),
    ("41", "Protocol", None),
    ("42", "Funding", None),
]


def answer(facts: Facts) -> list[dict[str, Any]]:
    """Both checklists: a list of {name, source, items: [(number, item, answer)], answered}."""
    found = []
    for name, source, items in (
        ("TRIPOD+AI", "Collins et al., BMJ 2024;385:e078378", TRIPOD_AI),
        ("CLAIM", "Mongan et al., Radiology: Artificial Intelligence 2020;2(2):e200029", CLAIM),
    ):
        lines = [(number, item, (reply(facts) if reply else None) or NOT_REPORTED) for number, item, reply in items]
        answered = sum(text != NOT_REPORTED for *_, text in lines)
        found.append({"name": name, "source": source, "items": lines, "answered": answered})
    return found
