"""The stages: each reads artifacts of one kind and writes one, and `run` chains them."""

# In the order of a run: a stage's name, which is its command's and its file's here, and what it
# does.
STAGES = {
    "ingest": "Read source files into pairs.",
    "embed": "Embed the pairs with the teacher.",
    "cluster": "Fit k-means of every source.",
    "shard": "Leave out what tests hold out, group rows by cluster and tokenise them.",
    "contamination": "Count what of the tests occurs in what is trained on.",
    "train": "Train the student of every arm.",
    "evaluate": "Score students and references.",
    "report": "Write the HTML report.",
}

# What libraries read when they are imported, here and in the processes that Ray starts: their own
# progress bars and notices would bury ours. What the user's environment says comes first.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    "RAY_COLOR_PREFIX": "0",  # colour codes go into files too
    "RAY_DEDUP_LOGS": "0",  # a remark on what is repeated, in colour
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints each line of a rank a second time
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

PACKAGES = ("clusterlib", "train", "tune", "pipelines")  # what a Ray cluster is sent
