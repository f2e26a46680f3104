"""The planner: what a training run, a fine-tune or a served model will take, with the error of each answer."""
