"""The planner: what a training run, a tuning or a served model will take, with the error of each answer."""
