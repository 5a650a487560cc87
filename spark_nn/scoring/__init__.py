"""From a fitted model to predictions: the plan on the driver, and what the executors do with it."""
