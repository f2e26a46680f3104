"""Planning: predicts, before anything runs, the operations, memory and seconds of training and serving."""
