"""How five fine-tuned models are made of the embedded one, one for each single task that ships with the program.

They stand in for a hub's fine-tunes where none can be had: in `demo` and in the small preset. Nothing is trained here.
"""

TASKS = ("sentiment", "arithmetic", "json", "rewrite", "sql")
TASK_STEPS, TASK_BATCH, TASK_RANK, TASK_EVAL_LIMIT = 8, 8, 16, 16
LEARNING_RATE = 1e-3
