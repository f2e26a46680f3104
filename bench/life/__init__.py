"""The life of a model in four columns, weights, data, cost and time: from real runs, and planned for a large model."""
