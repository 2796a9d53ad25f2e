"""The learner: student, loss, gradient cache, step loop, and its launch on Ray Train."""
