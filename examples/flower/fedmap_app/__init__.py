"""A Flower app whose clients share one mask and send survivors alone."""
