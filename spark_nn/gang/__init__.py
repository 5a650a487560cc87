"""N processes on a barrier stage that run one function together."""
