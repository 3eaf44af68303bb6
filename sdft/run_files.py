"""The names of the files that a run leaves in its folder; docs/outputs.md says what is in each."""

RECORD = "run.json"
RESOLVED_FILE = "resolved_recipe.yaml"
METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
SUMMARY_FILE = "summary.json"
CURVES_FILE = "curves.png"
REPORT_FILE = "report.html"
#: Of several runs of training, one after the other; see `sdft.report.continual`.
CONTINUAL_FILE = "continual.json"

READ_BY_REPORT = (RECORD, RESOLVED_FILE, METRICS_FILE, COMPLETIONS_FILE, SUMMARY_FILE, CONTINUAL_FILE)

#: What `sdft continual` leaves too: scores of the model before training, and in a stage's folder its scores and digests
#: of what it learned from: each skill's training rows and the weights that it began with.
BASE_FILE = "base.json"
SCORES_FILE = "scores.json"
STAGE_FILE = "stage.json"
