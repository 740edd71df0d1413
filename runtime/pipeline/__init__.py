"""Pipeline parallelism: a model cut into stages, and the schedule that moves micro-batches through them."""
