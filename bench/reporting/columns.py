"""The figures of a leaderboard: their names, headings, units and better direction, in one list."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One figure of a trial.

    Attributes:
        name: in files, in MLflow and in `result["figures"]`.
        heading: in printed tables.
        unit: `%` is a share in [0, 1], printed times 100; else what it is printed in.
        better: `higher`, `lower`, or empty: more is neither better nor worse.
        shown: printed by default where the grid has it; else only in the files, and on the page when switched on.
        about: one line for people who read the table.
        low: the least value of a share; a difference of two can be negative.
    """

    name: str
    heading: str
    unit: str
    better: str
    shown: bool
    about: str
    low: float = 0.0

    @property
    def sign(self) -> int:
        """1 if lower is better, -1 if higher is, 0 if neither."""
        return {"lower": 1, "higher": -1, "": 0}[self.better]

    def text(self, value: float | None) -> str:
        """A figure as every table prints it; an en dash where there is none."""
        if value is None or math.isnan(value):
            return "–"
        # `z`: a minus before nothing but zeros is none.
        return f"{100 * value if self.unit == '%' else value:z.{self.decimals}f}"

    @property
    def decimals(self) -> int:
        return 1 if self.unit in ("%", "s") else 0

    def spread(self, mean: float, std: float) -> str:
        """`93.4±0.2`; one seed has no deviation."""
        return self.text(mean) if math.isnan(std) else f"{self.text(mean)}±{self.text(std)}"

    @property
    def title(self) -> str:
        """The heading, with its unit unless that is percent."""
        return self.heading if self.unit in ("%", "") else f"{self.heading} ({self.unit})"


MEASURES = (
    Column("clean_accuracy", "ACC", "%", "higher", True, "clean test accuracy"),
    Column(
        "asr",
        "ASR",
        "%",
        "lower",
        True,
        "share of triggered test images of other classes sent to the target (all-to-all: of all, to the next class)",
    ),
    Column("recovery_accuracy", "recovery", "%", "higher", True, "share of the same images given their true label"),
    Column(
        "robust_accuracy", "robust", "%", "higher", True, "correctly classified images that no iterate of PGD fools"
    ),
    Column("autoattack_accuracy", "AutoAttack L∞", "%", "higher", True, "accuracy under AutoAttack, L∞"),
    Column("autoattack_l2_accuracy", "AutoAttack L2", "%", "higher", False, "accuracy under AutoAttack, L2"),
    Column(
        "der",
        "DER",
        "%",
        "higher",
        False,
        "defense effectiveness rating; blind to collapse: an ACC of 94 ruined to 10 gets 58, a useless defense 50",
    ),
    Column("asr_all_images", "ASR, all images", "%", "lower", False, "ASR with images of the target class counted"),
    Column("false_target_rate", "false target", "%", "lower", False, "the target's share of predictions, no trigger"),
    Column("worst_source_asr", "worst-source ASR", "%", "lower", False, "ASR of the class that suffers most"),
    Column("min_class_accuracy", "worst-class ACC", "%", "higher", False, "clean accuracy of the worst class"),
    Column("consistency", "consistency", "%", "higher", False, "triggered and clean image get the same class"),
    Column("cross_trigger_accuracy", "cross-trigger", "%", "higher", False, "accuracy under triggers of other images"),
    Column("infected_accuracy", "infected ACC", "%", "", False, "clean accuracy before the defense"),
    Column("infected_asr", "infected ASR", "%", "", False, "ASR before the defense"),
    Column("relearn_asr", "relearn ASR", "%", "lower", True, "ASR after fine-tuning on a few poisoned images"),
    Column(
        "relearn_asr_clean_control",
        "relearn control",
        "%",
        "",
        False,
        "the same on a model that never had the backdoor",
    ),
    Column("relearn_gain", "relearn gain", "%", "lower", False, "relearn ASR beyond that of the control", -1.0),
    Column("reactivate_asr", "reactivate ASR", "%", "lower", True, "ASR under an optimised change of the trigger"),
    Column(
        "reactivate_asr_clean_control", "reactivate control", "%", "", False, "the same on a model without backdoor"
    ),
    Column(
        "reactivate_gain", "reactivate gain", "%", "lower", False, "reactivate ASR beyond that of the control", -1.0
    ),
    Column("detection_auroc", "AUROC", "%", "higher", True, "suspicion scores: poisoned against clean images"),
    Column("detection_auprc", "AUPRC", "%", "higher", False, "area under precision and recall of the scores"),
    Column("detection_tpr_at_fpr_5", "TPR at FPR 5 %", "%", "higher", False, "poison found at 5 % false alarms"),
    Column("detection_tpr", "TPR", "%", "higher", True, "poison found by the method's own rule"),
    Column("detection_fpr", "FPR", "%", "lower", True, "clean images flagged by the method's own rule"),
    Column("detection_precision", "precision", "%", "higher", False, "share of flagged images that are poisoned"),
)
COSTS = (
    Column("implant_seconds", "implant", "s", "", False, "seconds of the infected model's training"),
    Column("defend_seconds", "defense", "s", "", True, "seconds of the defense alone"),
    Column("evaluate_seconds", "evaluation", "s", "", False, "seconds of the measures"),
    Column("peak_memory_mib", "memory", "MiB", "", True, "peak memory of the defense"),
    Column("defend_gflop", "compute", "GFLOP", "", True, "estimate: the defense's passes through networks alone"),
    Column("defend_images", "images", "", "", False, "images that went through the defense's training"),
    Column("defend_updates", "updates", "", "", False, "optimizer steps of the defense's training"),
)
COLUMN = {column.name: column for column in (*MEASURES, *COSTS)}
