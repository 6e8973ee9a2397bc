"""Settings for five fine-tuned models of the embedded model, one for each built-in task.

`demo` and the preset `small` train them in place of fine-tuned models from the hub.
"""

TASKS = ("sentiment", "arithmetic", "json", "rewrite", "sql")
TASK_STEPS, TASK_BATCH, TASK_RANK, TASK_EVAL_LIMIT = 8, 8, 16, 16
LEARNING_RATE = 1e-3
